"""`make cluster-test`: the workflow on a real SLURM, and training that is interrupted in every way SLURM has.

To be run on the cluster of `up.sh`: `tests/cluster/in.sh .venv/bin/python tests/cluster/run.py`. In copies of the
project it runs, word for word, `snakemake --profile slurm all` on the experiment micro, beside the same on this machine
without SLURM. Then, in the middle of each training phase, it cancels the job, lets its time run out, has SLURM requeue
it, kills Snakemake on the head node, and preempts the job; and compares the final weights with those of the local run
that nobody disturbed. The last line it prints is its figure.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import yaml
from safetensors.torch import load_file

from vpae.experiment import load
from vpae.graph import stages_of

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".cluster" / "work"
PHASES = ("priming", "equilibrium")
STEPS = 10
PATIENCE_SECONDS = 2400
BEGIN = time.monotonic()
RUNS: list[subprocess.Popen] = []  # all of Snakemake

# What makes micro worth interrupting: some more steps, GPUs to ask for, a stage cut into parts. VBench is left out, and
# what takes a hundred evaluations.
LONGER = {
    phase: {"training": {"steps": STEPS, "batch_size": 2, "ema_decay": 0.5, "checkpoint_every": 1}} for phase in PHASES
}
LONGER |= {"evaluation": {"vbench": {"backbones": "off"}}, "samples": {"rows": {"teacher-100nfe": None}}}
CLUSTER = {"jobs": {"latents": 2}, "cluster": {phase: {"gpus": 1} for phase in PHASES}}
# What a user might write into the profile on a cluster that answers quickly.
PROFILE = {"config": ["experiment=micro"], "latency-wait": 10, "vpae-slurm-init-seconds-before-status-checks": 3}


class Failed(Exception):
    """Something is not as it has to be."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:4.0f} s] {text}", flush=True)


def slurm(*command: str) -> str:
    """What one of SLURM's commands prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait_for(what: str, condition: Callable[[], object]):
    """The first true value of the condition."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise Failed(f"waited {PATIENCE_SECONDS} s for {what}")


class Copy:
    """The project as a fresh clone has it, with the edits of a user who wants to run micro on this cluster."""

    def __init__(self, name: str, **changes: dict):
        self.name, self.folder = name, WORK / name
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", ":!store", ":!docs"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for file in filter(None, listed.split("\0")):
            if (ROOT / file).is_symlink() or (ROOT / file).is_file():
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, self.folder / file, follow_symlinks=False)
        _edit(self.folder / "configs/micro.yaml", LONGER, CLUSTER, changes)
        _edit(self.folder / "profiles/slurm/profile.yaml", PROFILE)
        self.micro = self.folder / "results/micro"
        self.log = self.folder / "snakemake.log"
        self.target = "all"

    def take(self, other: "Copy", *stages: str) -> None:
        """Begin with stages that another copy has made, and with what Snakemake knows of them."""
        for stage in stages:
            shutil.copytree(other.micro / stage, self.micro / stage, copy_function=shutil.copy2)
        shutil.copytree(other.folder / ".snakemake/metadata", self.folder / ".snakemake/metadata")

    def start(self, *arguments: str) -> subprocess.Popen:
        """Begin a run of Snakemake on what is in this folder."""
        bin_folder = Path(sys.executable).parent
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("VPAE_", "SNAKEMAKE_", "SLURM_"))}
        environment |= {"PATH": f"{bin_folder}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            command = [str(bin_folder / "snakemake"), *arguments]
            RUNS.append(subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log))
        return RUNS[-1]

    def run(self, *arguments: str) -> None:
        """Run Snakemake to its end."""
        self.finish(self.start(*arguments))

    def finish(self, process: subprocess.Popen) -> None:
        """Wait for a run's end, which has to be a good one."""
        wait_for(f"{self.name}: snakemake to end", lambda: process.poll() is not None)
        if process.returncode:
            raise Failed(f"{self.name}: snakemake ended with {process.returncode}; its last lines:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-30:])

    def outputs(self, stage: str) -> dict[str, str]:
        """File -> hash of a finished stage; of what depends on the machine's speed, only the rest.

        Frames are compared as PNG: samples are encoded with x264's assembly, which is not bound to equal bytes.
        """
        outputs = json.loads((self.micro / stage / "provenance.json").read_text())["outputs"]
        if stage == "samples":
            return {name: value for name, value in outputs.items() if not name.endswith(".mp4")}
        if stage == "evaluation":
            rows = json.loads((self.micro / stage / "scores.json").read_text())["rows"]
            return {row: str(metrics["frechet"]) for row, metrics in rows.items()}
        return outputs

    def job(self, phase: str) -> str:
        """The unfinished SLURM job of a phase."""
        lines = slurm("squeue", "--noheader", "--format=%i|%k|%Z").splitlines()
        found = [
            job
            for job, rule, folder in (line.split("|") for line in lines)
            if folder == str(self.folder) and phase in rule
        ]
        if len(found) != 1:
            raise Failed(f"{self.name}: {phase} should be one job, but is {found}")
        return found[0]

    def trainers(self, phase: str) -> list[int]:
        """The processes that train a phase."""
        return [
            pid
            for pid, words in _processes(self.folder)
            if words[1:2] and words[1].endswith("/vpae") and words[2] == phase
        ]

    def steps(self, phase: str) -> int:
        """Up to which step the state of a phase is saved."""
        return max((int(p.name.removeprefix("step-")) for p in self.micro.glob(f".state/{phase}-*/step-*")), default=0)

    def wait_until_made(self, stage: str, run: subprocess.Popen) -> None:
        """Wait until a stage is finished, or Snakemake gives up."""
        made = self.micro / stage / "provenance.json"
        wait_for(f"{self.name}: {stage} to end", lambda: made.exists() or run.poll())

    def hold(self, phase: str, run: subprocess.Popen) -> None:
        """Stop the phase's processes in the middle of its training. A signal of SLURM's wakes them, to end."""
        wait_for(f"{self.name}: {phase} to train", lambda: self.steps(phase) >= 2 or run.poll() is not None)
        pids = self.trainers(phase)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        if not pids or self.steps(phase) >= STEPS:
            raise Failed(f"{self.name}: {phase} was over before it could be interrupted")


def _edit(path: Path, *changes: dict) -> None:
    def merge(tree: dict, change: dict) -> dict:
        for key, value in change.items():
            tree[key] = merge(tree.get(key, {}), value) if isinstance(value, dict) else value
        return tree

    tree = yaml.safe_load(path.read_text())
    for change in changes:
        merge(tree, change)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def _processes(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Pid and command line of the processes that work in a folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cwd").resolve() == folder:
                yield int(entry.name), (entry / "cmdline").read_bytes().decode().split("\0")


# What can happen to a job. Each event comes while the phase's processes stand still, and returns the job that goes on
# and the run of Snakemake that waits for it.


def cancelled(copy: Copy, phase: str, job: str, run: subprocess.Popen) -> tuple[str, subprocess.Popen]:
    """scancel: the job has failed, and the workflow submits another."""
    slurm("scancel", job)
    return wait_for("another job", lambda: _other_job(copy, phase, job)), run


def out_of_time(copy: Copy, phase: str, job: str, run: subprocess.Popen) -> tuple[str, subprocess.Popen]:
    """The time limit comes near: the job saves, and queues again by itself."""
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=5")  # the warning comes 300 seconds before
    wait_for("the job to queue again", lambda: _restarts(job) == 1)
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    return job, run


def requeued(copy: Copy, phase: str, job: str, run: subprocess.Popen) -> tuple[str, subprocess.Popen]:
    """Somebody requeues the job, or SLURM does in order to preempt it."""
    slurm("scontrol", "requeue", job)
    wait_for("the job to queue again", lambda: _restarts(job) == 1)
    return job, run


def orphaned(copy: Copy, phase: str, job: str, run: subprocess.Popen) -> tuple[str, subprocess.Popen]:
    """The head node dies, and with it Snakemake, which is started again."""
    run.kill()
    run.wait()
    run = copy.start("--profile", "slurm", copy.target)
    return wait_for("another job", lambda: _other_job(copy, phase, job)), run


def preempted(copy: Copy, phase: str, job: str, run: subprocess.Popen) -> tuple[str, subprocess.Popen]:
    """SLURM cancels the job in favour of a more urgent one that takes the whole cluster."""
    _submit_urgent_job()
    wait_for("the job to be preempted", lambda: "JobState=PREEMPTED" in slurm("scontrol", "show", "job", job))
    return wait_for("another job", lambda: _other_job(copy, phase, job)), run


def preempted_with_notice(copy: Copy, phase: str, job: str, run: subprocess.Popen) -> tuple[str, subprocess.Popen]:
    """The same in a partition with a grace time: the job saves in it, and queues again by itself."""
    _submit_urgent_job()
    wait_for("the job to queue again", lambda: _restarts(job) == 1)
    return job, run


def _submit_urgent_job() -> None:
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def _other_job(copy: Copy, phase: str, job: str) -> str | None:
    with suppress(Failed):
        return other if (other := copy.job(phase)) != job else None


def _restarts(job: str) -> int:
    fields = dict(word.split("=", 1) for word in slurm("scontrol", "show", "job", job).split() if "=" in word)
    return int(fields["Restarts"])


def interrupt(copy: Copy, undisturbed: Copy, event: Callable, phases: tuple[str, ...] = PHASES) -> dict[str, str]:
    """Run the phases on the cluster, each disturbed by the event; returns what is wrong, by phase."""
    wrong: dict[str, str] = {}
    copy.target = f"results/micro/{phases[-1]}"
    run = copy.start("--profile", "slurm", copy.target)
    for phase in phases:
        copy.hold(phase, run)
        job, at = copy.job(phase), copy.steps(phase)
        after, run = event(copy, phase, job, run)
        spent = copy.log.read_text().count("Trying to restart job")
        say(f"{copy.name}: {phase} after {at} of {STEPS} steps; job {job}, then {after}; retries so far: {spent}")
        copy.wait_until_made(phase, run)
        if event in (out_of_time, requeued, preempted_with_notice) and (after != job or spent):
            wrong[phase] = "it did not go on in the same job, or spent a retry"
    copy.finish(run)
    for phase in phases:
        logs = "".join(p.read_text() for p in copy.folder.glob(f"results/slurm-logs/rule_{phase}/micro/*.log"))
        if "the state is in" not in logs and event is not preempted:
            wrong[phase] = "it did not save when it was told to end"
        if _weights(copy, phase) != _weights(undisturbed, phase):
            wrong[phase] = "its weights differ from those of the undisturbed run"
    return wrong


def _weights(copy: Copy, phase: str) -> dict[str, str]:
    found = {name: value for name, value in copy.outputs(phase).items() if name.endswith((".safetensors", ".jsonl"))}
    if not found:
        raise Failed(f"{copy.name}: {phase} has no weights")
    return found


def whole_workflow() -> tuple[Copy, Copy]:
    """Run all stages on the cluster and on this machine, and compare; returns both copies."""
    cluster, local = Copy("slurm"), Copy("local")
    runs = [cluster.start("--profile", "slurm", "all"), local.start("all", "--config", "experiment=micro")]
    cluster.finish(runs[0])
    say("snakemake --profile slurm all: exit 0")
    local.finish(runs[1])
    compared = [
        stage for stage in stages_of(load("configs/micro.yaml").settings) if stage != "report"
    ]  # it holds dates and latencies
    other = [stage for stage in compared if cluster.outputs(stage) != local.outputs(stage)]
    if other:
        raise Failed(f"the cluster's results differ from the local ones: {', '.join(other)}")
    say(f"the same results as without SLURM: {', '.join(compared)}")
    logs = sorted(
        str(p.parent.relative_to(cluster.folder)) for p in cluster.folder.glob("results/slurm-logs/*/*/*.log")
    )
    if not {f"results/slurm-logs/rule_{phase}/micro" for phase in PHASES} <= set(logs):
        raise Failed(f"SLURM's logs are not named by rule and wildcards: {logs}")
    return cluster, local


def on_two_nodes(cluster: Copy) -> tuple[Copy, Copy]:
    """A phase sharded over two processes on two nodes: undisturbed, and ready to be disturbed.

    Undisturbed it has to end as one process does that accumulates twice as often.
    """
    shared = {"training": {"sharding": {"strategy": "full", "activation_checkpointing": True}}}
    asked = {"priming": {"nodes": 2, "gpus": 0}}
    two, out_of_time = (Copy(name, cluster=asked, priming=shared) for name in ("two-nodes", "two-nodes-out-of-time"))
    alone = Copy("alone", priming={"training": {"accumulate": 2}})
    for copy in (two, out_of_time, alone):
        copy.take(cluster, "clips", "teacher", "latents")
    alone.run("results/micro/priming", "--config", "experiment=micro")
    two.run("--profile", "slurm", "results/micro/priming")
    if wrong := difference(two, alone):
        raise Failed(f"two processes on two nodes do not what one does that accumulates twice as often: {wrong}")
    say("two processes on two nodes trained as one does that accumulates twice as often")
    return two, out_of_time


def difference(found: Copy, expected: Copy) -> str:
    """In what two primings differ by more than rounding; empty if in nothing."""
    folders = [copy.micro / "priming" for copy in (found, expected)]
    mine, theirs = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders)
    if [len(mine), len(theirs)] != [STEPS, STEPS]:
        return f"{len(mine)} lines of metrics for {STEPS} steps"
    for one, other in zip(mine, theirs, strict=True):
        if any(abs(one[key] - value) > 1e-5 * max(1, abs(value)) for key, value in other.items() if "loss" in key):
            return f"the losses {one}, not {other}"
    for file in ("generator.safetensors", "fake_lora.safetensors"):
        one, other = (load_file(folder / file) for folder in folders)
        furthest = max((one[key] - other[key]).abs().max().item() for key in other)
        if one.keys() != other.keys() or furthest > 1e-4:
            return f"{file}: a weight differs by {furthest:.1e}"
    return ""


def main() -> int:
    shutil.rmtree(WORK, ignore_errors=True)
    say("snakemake --profile slurm all, and beside it snakemake all")
    cluster, local = whole_workflow()

    results: dict[str, str] = {}  # copy and phase -> what is wrong

    def check(copy: Copy, reference: Copy, event: Callable, phases: tuple[str, ...] = PHASES) -> None:
        try:
            wrong = interrupt(copy, reference, event, phases)
        except Exception as failure:  # whatever happens to one run, the others go on
            wrong = dict.fromkeys(phases, f"{type(failure).__name__}: {failure}\n{copy.tail()}")
        results.update({f"{copy.name}: {phase}": wrong.get(phase, "") for phase in phases})

    copies = {
        event: Copy(event.__name__.replace("_", "-"))
        for event in (cancelled, out_of_time, requeued, orphaned, preempted, preempted_with_notice)
    }
    for copy in copies.values():
        copy.take(cluster, "clips", "teacher", "latents")
    noticed = {"default-resources": {"slurm_partition": "noticed"}}
    _edit(copies[preempted_with_notice].folder / "profiles/slurm/profile.yaml", noticed)
    # These empty the cluster.
    alone = {event: copies.pop(event) for event in (preempted, preempted_with_notice)}
    # What SLURM does to a job is the same in both phases; that the workflow goes on after it, twice, are the others'.
    phases = {event: PHASES[:1] if event in (cancelled, requeued) else PHASES for event in copies}
    threads = [
        Thread(target=check, args=(copy, local, event, phases[event]), daemon=True) for event, copy in copies.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    two, two_out_of_time = on_two_nodes(cluster)
    if _weights(two, "priming") == _weights(local, "priming"):
        raise Failed("two processes see twice the clips of one, and yet have the same weights")
    check(two_out_of_time, two, out_of_time, ("priming",))
    for event, copy in alone.items():
        check(copy, local, event, ("priming",))

    wrong = {name: text for name, text in results.items() if text}
    for name, text in wrong.items():
        say(f"WRONG {name}: {text}")
    print(
        f"cluster-test: {len(results) - len(wrong)} of {len(results)} interrupted runs ended with the same checkpoints"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as failure:
        sys.exit(f"cluster-test: {failure}")
    finally:
        for run in RUNS:
            run.kill()
