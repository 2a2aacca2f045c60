"""Part of `make cluster-test`: what `vpae launch` prints, on two real nodes of SLURM, over gloo.

To be run on the cluster of `up.sh`: `tests/cluster/in.sh .venv/bin/python tests/cluster/launch.py`. It renders a job of
two nodes with two processes each for the experiment micro's priming, sharded over all four, and submits it: once
undisturbed, and once with its time running out in the middle, whereupon it has to save, to queue again and to go on.
Both have to end with the weights of one process that accumulates four times as often. The last line it prints is its
figure.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import yaml
from run import RUNS, STEPS, WORK, Copy, Failed, say, slurm, wait_for
from safetensors.torch import load_file

PROCESSES = 4
LEARNING = {"generator": {"learning_rate": 1e-3}, "fake": {"learning_rate": 1e-3}}  # so far that mistakes can be seen
SHARED_OUT = {"sharding": {"strategy": "full", "activation_checkpointing": True}}
WEIGHTS = ("generator.safetensors", "fake_lora.safetensors", "student/transformer/diffusion_pytorch_model.safetensors")


class Project(Copy):
    """A copy whose experiments are overlays of micro: one for each way to run its priming."""

    def __init__(self, **experiments: dict):
        super().__init__("launch")
        if not (self.folder / ".venv").exists():  # the script looks for its programs there
            (self.folder / ".venv").symlink_to(Path(sys.executable).parents[1])
        for name, training in experiments.items():
            tree = {"extends": "micro", "priming": {"training": training, **LEARNING}}
            (self.folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(tree))
            (self.folder / "results" / name / "logs").mkdir(parents=True)

    def vpae(self, *arguments: str) -> str:
        """Run the program here; what it prints."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [str(self.folder / ".venv/bin/vpae"), *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"vpae {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def config(self, name: str) -> str:
        return f"configs/{name}.yaml"

    def script(self, name: str) -> Path:
        """The rendered job of an experiment."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = ("--nodes", "2", "--gpus-per-node", "0", "--cpus-per-node", "2", "--hours", "1", "--port", port)
        path = self.folder / f"{name}.sh"
        path.write_text(self.vpae("launch", "priming", "--config", self.config(name), *arguments))
        return path

    def submit(self, script: Path) -> str:
        """The job that runs a script."""
        done = subprocess.run(
            ["sbatch", "--parsable", script.name], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failed(f"sbatch {script.name}: {done.stderr}")
        return done.stdout.strip()

    def end(self, name: str, job: str) -> dict[str, str]:
        """Wait for a job's good end; what SLURM then says of it."""

        def ended() -> dict[str, str] | None:
            fields = about(job)
            return fields if fields["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") else None

        fields = wait_for(f"{name}'s job {job} to end", ended)
        if fields["JobState"] != "COMPLETED":
            logs = "\n".join(p.read_text()[-3000:] for p in self.results(name).glob(f"logs/*-{job}.log"))
            raise Failed(f"{name}: job {job} ended as {fields['JobState']}; its log ends with\n{logs}")
        return fields

    def results(self, name: str) -> Path:
        return self.folder / "results" / name


def about(job: str) -> dict[str, str]:
    """SLURM's fields of a job."""
    return dict(word.split("=", 1) for word in slurm("scontrol", "show", "job", job).split() if "=" in word)


def run_out_of_time(project: Project, name: str, job: str) -> None:
    """Let the job's time run out while it trains. The warning comes 300 seconds before the end, that is at once."""
    project.micro = project.results(name)  # whose steps are counted
    wait_for(f"{name} to train", lambda: project.steps("priming") >= 2)
    pids = project.trainers("priming")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # SLURM's warning wakes them
    at = project.steps("priming")
    if not pids or at >= STEPS:
        raise Failed(f"{name} was over before its time could run out")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    wait_for(f"{name}'s job to queue again", lambda: about(job)["Restarts"] == "1")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    say(f"{name}: told after {at} of {STEPS} steps that its time is up, job {job} saved and queued again")


def difference(project: Project, name: str) -> str:
    """In what an experiment's priming differs from that of one process; empty if in nothing."""
    found, expected = (project.results(n) / "priming" for n in (name, "alone"))
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (found, expected)]
    if [len(one) for one in lines] != [STEPS, STEPS]:
        return f"{len(lines[0])} lines of metrics for {STEPS} steps"
    for mine, theirs in zip(*lines, strict=True):
        if any(abs(mine[key] - value) > 1e-5 * max(1, abs(value)) for key, value in theirs.items() if "loss" in key):
            return f"the losses {mine}, not {theirs}"
    for file in WEIGHTS:
        mine, theirs = load_file(found / file), load_file(expected / file)
        if mine.keys() != theirs.keys():
            return f"{file}: other weights"
        furthest = max((mine[key] - theirs[key]).abs().max().item() for key in theirs)
        if furthest > 1e-4:
            return f"{file}: a weight differs by {furthest:.1e}"
    return ""


def main() -> int:
    project = Project(
        **dict.fromkeys(("launched", "interrupted"), SHARED_OUT),
        alone={"accumulate": PROCESSES},
    )
    for stage in ("clips", "teacher", "latents"):
        project.vpae(stage, "--config", project.config("micro"))
    project.vpae("priming", "--config", project.config("alone"))
    say("one process has trained")

    job = project.submit(project.script("launched"))
    fields = project.end("launched", job)
    say(f"launched: job {job} on {fields['NodeList']} ({fields['NumNodes']} nodes) completed after {fields['RunTime']}")

    script = project.script("interrupted")
    # The script queues itself again only near the end of its hours, which it counts itself.
    script.write_text(script.read_text().replace("set -euo pipefail\n", "set -euo pipefail\nSECONDS=3500\n"))
    if "SECONDS=3500" not in script.read_text():
        raise Failed("the script has no place any more to set its clock")
    job = project.submit(script)
    run_out_of_time(project, "interrupted", job)
    project.end("interrupted", job)

    wrong = {name: text for name in ("launched", "interrupted") if (text := difference(project, name))}
    if fields["NumNodes"] != "2":
        wrong["launched"] = f"on {fields['NumNodes']} nodes"
    for name, text in wrong.items():
        say(f"WRONG {name}: {text}")
    print(f"launch-test: {2 - len(wrong)} of 2 jobs of {PROCESSES} processes on two nodes trained as one process does")
    return 1 if wrong else 0


if __name__ == "__main__":
    shutil.rmtree(WORK / "launch", ignore_errors=True)
    try:
        sys.exit(main())
    except Failed as failure:
        sys.exit(f"launch-test: {failure}")
    finally:
        for run in RUNS:
            run.kill()
