"""What is asked of SLURM, what is made of its answers, and the page for users of clusters.

No SLURM: a stand-in answers. The real one is tried by `make cluster-test`.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import snakemake_executor_plugin_vpae_slurm as plugin
from conftest import STAGES
from test_workflow import ROOT, Clone
from vpae.experiment import ConfigError, load
from vpae.graph import stage_settings
from vpae.locks import lock

# Plays sbatch, squeue, sinfo, scontrol, scancel and sacct. Jobs end at once: sbatch makes the folder that the job's
# rule would make. What is submitted, and what is cancelled or requeued, is written down.
STAND_IN = f"""#!{sys.executable}
import json, sys
from pathlib import Path
here, name, words = Path(__file__).parent, Path(sys.argv[0]).name, sys.argv[1:]
jobs = here / "jobs.json"
known = json.loads(jobs.read_text()) if jobs.exists() else []
if name == "sbatch":
    known.append(words)
    jobs.write_text(json.dumps(known))
    rule, _, experiment = words[words.index("--comment") + 1].removeprefix("rule_").partition("_wildcards_")
    stage = Path("results") / experiment / rule
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "made").write_text("")
    (stage.parent / "logs" / f"{{rule}}.benchmark.tsv").write_text("")
    print(len(known))
elif name == "squeue" and "--states=all" in words:
    print("".join(f"{{number}}|COMPLETED\\n" for number in range(1, len(known) + 1)), end="")
elif name == "squeue" and "--format=%T" in words:
    print((here / "state").read_text())
elif name == "sinfo":
    print("standard*")
elif name in ("scontrol", "scancel"):
    with (here / "said").open("a") as file:
        print(name, *words, file=file)
elif name == "sacct":
    sys.exit("no accounting here")
"""
LARGE = """
extends: micro
cluster:
  clips: {memory_gb: 16, minutes: 90}
  samples: {gpus: 1, cpus: 8}
  priming: {nodes: 4, gpus: 8, cpus: 96, memory_gb: 1000, minutes: 1440, warning_seconds: 900}
  equilibrium: {gpus: 8, cpus: 64, memory_gb: 500, minutes: 2880}
seed: 1
"""


def add_slurm(folder: Path) -> Path:
    """A folder of SLURM's commands."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sbatch", "squeue", "sinfo", "scontrol", "scancel", "sacct"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone on a machine that has SLURM's commands."""
    clone = Clone(tmp_path)
    add_slurm(tmp_path / "bin")
    profile = tmp_path / "profiles/slurm/profile.yaml"
    changed = re.sub(r"(before-status-checks): \d+", r"\1: 1", profile.read_text())
    profile.write_text(re.sub(r"latency-wait: \d+", "latency-wait: 5", changed))
    return clone


@pytest.mark.slow
def test_the_cluster_is_asked_for_what_the_experiment_needs(clone: Clone) -> None:
    (clone.folder / "configs/large.yaml").write_text(LARGE)
    code, printed = clone.snakemake("--profile", "slurm", "all", "--config", "experiment=large")
    assert code == 0, printed
    submitted = [" ".join(words) for words in json.loads((clone.folder / "bin/jobs.json").read_text())]
    jobs = {re.search(r"--comment rule_(\w+?)_wildcards_large", job)[1]: job for job in submitted}
    assert set(jobs) == set(STAGES)
    for stage, job in jobs.items():
        assert f" --signal=TERM@{900 if stage == 'priming' else 300} " in job
        assert " --open-mode=append" in job and "--requeue" in job
        assert " -p standard " in job and " -A " not in job
    assert "--gres" not in jobs["clips"] and " -t 90 --mem 16000 " in jobs["clips"]
    assert "--gres=gpu:1 " in jobs["samples"] and "--cpus-per-task=8" in jobs["samples"]
    # One task a node, in which torchrun starts a process for each GPU.
    several = jobs["priming"]
    assert "--nodes=4 " in several and "--ntasks=4 " in several and "--gres=gpu:8 " in several
    assert "--cpus-per-task=96 " in several and " -t 1440 --mem 1000000 " in several
    assert "--ntasks-per-gpu" not in several and "--gpus" not in several
    one = jobs["equilibrium"]
    assert "--nodes=1 " in one and "--gres=gpu:8 " in one and " -t 2880 --mem 500000 " in one
    assert [p.name for p in (clone.folder / "results/slurm-logs").iterdir()].count("rule_priming") == 1


def test_what_is_asked_of_the_cluster_decides_nothing_else(tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs/micro.yaml", tmp_path)
    (tmp_path / "large.yaml").write_text(LARGE.replace("seed: 1", ""))
    settings = {name: load(tmp_path / f"{name}.yaml", environment=False).settings for name in ("micro", "large")}
    for stage in STAGES:
        assert stage_settings(settings["micro"], stage) == stage_settings(settings["large"], stage)


@pytest.mark.parametrize(
    ("experiment", "nodes", "gpus"),
    [("micro", 1, 0), ("tiny", 1, 0), ("480p-lora", 1, 8), ("480p", 2, 8), ("720p", 4, 8)],
)
def test_shipped_experiments_ask_for_the_gpus_that_their_size_needs(experiment: str, nodes: int, gpus: int) -> None:
    name = experiment if gpus == 0 else f"wan2.1-i2v-14b-{experiment}"
    cluster = load(ROOT / f"configs/{name}.yaml", environment=False).settings.cluster
    for stage in STAGES:
        asked = getattr(cluster, stage)
        if stage in ("priming", "equilibrium"):
            assert (asked.nodes, asked.gpus) == (nodes, gpus)
        else:
            on_gpu = gpus > 0 and stage in ("latents", "samples", "evaluation")
            assert (asked.nodes, asked.gpus) == (1, int(on_gpu))


def test_only_the_profile_says_how_often_a_job_is_submitted_again() -> None:
    """A rule's own retries would start again inside the job that is about to end."""
    assert not [path for path in (ROOT / "workflow").rglob("*.smk") if "retries" in path.read_text()]
    assert yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text())["retries"] == 3


def test_only_the_phases_may_have_several_processes(tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs/micro.yaml", tmp_path)
    (tmp_path / "wrong.yaml").write_text("extends: micro\ncluster: {samples: {nodes: 2}}\n")
    with pytest.raises(ConfigError, match=r"cluster: samples asks for 2 nodes .* only the methods"):
        load(tmp_path / "wrong.yaml", environment=False)


def test_processes_that_share_clips_have_to_be_there(tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs/micro.yaml", tmp_path)
    shared = "extends: micro\ncluster: {priming: {nodes: 1, gpus: GPUS}}\n"
    shared += "priming: {training: {sharding: {context_parallel: 2}}}\n"
    for gpus in (0, 1, 4):  # one process alone keeps everything whole
        (tmp_path / "shared.yaml").write_text(shared.replace("GPUS", str(gpus)))
        load(tmp_path / "shared.yaml", environment=False)
    (tmp_path / "shared.yaml").write_text(shared.replace("GPUS", "3"))
    with pytest.raises(ConfigError, match=r"priming.training.sharding.context_parallel = 2 does not divide the 3 proc"):
        load(tmp_path / "shared.yaml", environment=False)


# The executor: what becomes of a job, given what SLURM says of it at one look after another.


def watch(monkeypatch: pytest.MonkeyPatch, *answers: str | None, accounted: str | None = None) -> tuple[str, int]:
    """What is reported of job 7, and after how many looks ("": it is still watched after all of them)."""
    executor = object.__new__(plugin.Executor)
    reported: list[str] = []
    left = list(answers)

    async def answer(command: str) -> str | None:
        return left.pop(0) if command.startswith("squeue") else accounted

    @asynccontextmanager
    async def limiter() -> AsyncIterator[None]:
        yield

    monkeypatch.setattr(plugin, "_answer", answer)
    executor._last_seen, executor.run_uuid, executor.status_rate_limiter = {}, "run", limiter()
    executor.workflow = SimpleNamespace(executor_settings=SimpleNamespace(init_seconds_before_status_checks=8))
    executor.logger = SimpleNamespace(warning=lambda text: reported.append(text))
    executor.next_seconds_between_status_checks = 8
    executor.report_job_success = lambda info: reported.append("success")
    executor.report_job_error = lambda info, text, aux_logs: reported.append(text)
    jobs = [SimpleNamespace(external_jobid="7", aux={"slurm_logfile": "7.log"})]

    async def look() -> list:
        executor.status_rate_limiter = limiter()
        return [info async for info in executor.check_active_jobs(jobs)]

    for looks in range(1, len(answers) + 1):
        jobs = asyncio.run(look())
        if not jobs:
            return "; ".join(reported), looks
    return "", len(answers)


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        (("7|PENDING\n", "7|RUNNING\n", "7|COMPLETED\n"), ("success", 3)),
        (("7|RUNNING\n", "7|TIMEOUT\n"), ("SLURM job 7: TIMEOUT. ", 2)),
        (("7|CANCELLED\n",), ("SLURM job 7: CANCELLED. ", 1)),
        # Preempted by cancelling; by requeueing; a node lost, the job begun anew elsewhere.
        (("7|PREEMPTED\n", "7|PREEMPTED\n"), ("SLURM job 7: PREEMPTED. ", 2)),
        (("7|PREEMPTED\n", "7|PENDING\n", "7|RUNNING\n"), ("", 3)),
        (("7|NODE_FAIL\n", "7|PENDING\n"), ("", 2)),
        # SLURM is away for a while.
        (("7|RUNNING\n", None, None, "7|RUNNING\n", "7|COMPLETED\n"), ("success", 5)),
        (("8|RUNNING\n", "7|RUNNING\n"), ("", 2)),
    ],
)
def test_the_end_of_a_job_is_noticed(monkeypatch: pytest.MonkeyPatch, answers: tuple, result: tuple) -> None:
    assert watch(monkeypatch, *answers) == result


def test_a_forgotten_job_is_looked_up_in_the_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch(monkeypatch, "7|RUNNING\n", "", "", accounted="CANCELLED by 0\n") == ("SLURM job 7: CANCELLED. ", 3)
    assert watch(monkeypatch, "7|RUNNING\n", "", "", accounted="COMPLETED\n") == ("success", 3)
    for state in ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL"):  # of one that SLURM has forgotten, that is the end
        assert watch(monkeypatch, "7|RUNNING\n", "", "", accounted=state) == (f"SLURM job 7: {state}. ", 3)
        assert watch(monkeypatch, f"7|{state}\n", "", "", accounted=state) == (f"SLURM job 7: {state}. ", 3)
    said, looks = watch(monkeypatch, "7|RUNNING\n", "", "", accounted=None)
    assert looks == 3 and said.endswith("success") and "MinJobAge" in said


def test_a_job_of_a_living_snakemake_is_refused_at_every_attempt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin.RUNS.mkdir(parents=True)
    lines = f"mine\nof two lines|{tmp_path}|40|other\nrule_priming|{tmp_path}|41|living\n"
    monkeypatch.setattr(plugin, "_ask", lambda *command: lines if "%k" in command[-1] else "")
    monkeypatch.setattr(plugin, "get_job_wildcards", lambda job: "")
    executor = object.__new__(plugin.Executor)
    executor.workflow = SimpleNamespace(workdir_init=tmp_path)
    executor.logger = SimpleNamespace(info=lambda text: None)
    executor._others = executor._jobs_of_others()
    job = SimpleNamespace(name="priming")
    with lock(plugin.RUNS / "living"):
        for _ in range(3):
            with pytest.raises(plugin.WorkflowError, match="SLURM job 41 does the same for another Snakemake"):
                executor._end_orphan(job)
    executor._end_orphan(job)  # it has died meanwhile
    assert "rule_priming" not in executor._others


# workflow/launch.sh


def launch(folder: Path, nodes: int, gpus: int, *command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a command by it, with the stand-in's SLURM."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    path = f"{add_slurm(folder / 'bin')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "workflow/launch.sh", str(nodes), str(gpus), "2", *command],
        cwd=folder,
        env={**kept, "PATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_command_is_run_as_it_is(tmp_path: Path) -> None:
    done = launch(tmp_path, 1, 1, "bash", "-c", 'echo "$0 of $1"; exit 5', "a b", "c")
    assert (done.returncode, done.stdout) == (5, "a b of c\n")


def test_without_slurm_jobs_that_run_at_once_share_the_gpus_out(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nprintf '0, GPU-a\\n1, GPU-b\\n2, GPU-c\\n'\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    (tmp_path / "out").mkdir()
    body = "shopt -s nullglob; echo $CUDA_VISIBLE_DEVICES >out/$$.begun; for i in $(seq 100); do n=(out/*);"
    body += " ((${#n[@]} < 3)) || break; sleep 0.1; done; mv out/$$.begun out/$$.ended"

    def run(*_: int) -> int:
        return launch(tmp_path, 1, 1, "bash", "-c", body, TMPDIR=str(tmp_path)).returncode

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(run, range(3))] == [0, 0, 0]
    assert sorted(p.read_text().strip() for p in (tmp_path / "out").iterdir()) == ["GPU-a", "GPU-b", "GPU-c"]
    say = ("bash", "-c", 'echo "${CUDA_VISIBLE_DEVICES-unset}"')
    for visible, gpus, seen in (("2", 1, "GPU-c"), ("1,GPU-a", 1, "GPU-a"), ("", 1, ""), ("0", 2, "0")):
        done = launch(tmp_path, 1, gpus, *say, TMPDIR=str(tmp_path), CUDA_VISIBLE_DEVICES=visible)
        assert gpus > 1 or done.stdout.strip() == seen, visible
    assert launch(tmp_path, 1, 0, *say, TMPDIR=str(tmp_path)).stdout.strip() == "unset"


def test_a_job_that_waits_for_a_gpu_says_so_and_can_be_ended(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\necho 0, GPU-a\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    held = tmp_path / f"vpae-gpus.{os.getuid()}" / "GPU-a"
    held.parent.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "CUDA_"))}
    environment = kept | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    with lock(held):
        command = [ROOT / "workflow/launch.sh", "1", "1", "2", "touch", str(tmp_path / "ran")]
        job = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        assert "waits until 1 of 1 GPUs are free" in job.stderr.readline()
        job.terminate()
        assert job.wait(60) == -signal.SIGTERM
    assert not (tmp_path / "ran").exists()


def test_several_nodes_need_slurm(tmp_path: Path) -> None:
    done = launch(tmp_path, 2, 8, "true")
    assert done.returncode == 2
    assert "asks for 2 nodes; run it with `snakemake --profile slurm`" in done.stderr


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_job_that_saved_queues_again_unless_it_was_cancelled(tmp_path: Path, state: str, requeued: bool) -> None:
    add_slurm(tmp_path / "bin")
    (tmp_path / "bin/state").write_text(state)
    (tmp_path / "bin/sleep").write_text("#!/bin/sh\n")  # in which SLURM would end the job
    (tmp_path / "bin/sleep").chmod(0o755)
    done = launch(tmp_path, 1, 1, "bash", "-c", "exit 3", SLURM_JOB_ID="7")
    assert done.returncode == 3
    assert (tmp_path / "bin/said").exists() is requeued
    if requeued:
        assert (tmp_path / "bin/said").read_text() == "scontrol requeue 7\n"
    assert launch(tmp_path, 1, 1, "bash", "-c", "exit 1", SLURM_JOB_ID="8").returncode == 1
    assert not (tmp_path / "bin/said").exists() or "requeue 8" not in (tmp_path / "bin/said").read_text()


@pytest.mark.parametrize(
    ("gpus", "variable"), [(8, "PYTORCH_CUDA_ALLOC_CONF=expandable"), (0, "ACCELERATE_USE_CPU=true")]
)
def test_the_processes_of_all_nodes_meet_on_the_first(tmp_path: Path, gpus: int, variable: str) -> None:
    stand_ins = {
        # Thousands of nodes: what it prints does not fit into a pipe that nobody reads to its end.
        "scontrol": 'printf "node%s\\n" {1..20000}',
        "srun": 'echo "srun $*" | head -n 1 >> calls; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "torchrun": 'echo "torchrun $*" | head -n 1 >> calls; env >> environment',
    }
    first = tmp_path / "first"
    first.mkdir()
    for name, body in stand_ins.items():
        (first / name).write_text(f"#!/bin/bash\n{body}\n")
        (first / name).chmod(0o755)
    variables = {"PATH": f"{first}:{os.environ['PATH']}"}
    variables |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODEID": "1", "SLURM_NNODES": "2"}
    done = launch(tmp_path, 2, gpus, "vpae", "priming", **variables)
    assert done.returncode == 0, done.stderr
    srun, torchrun = (tmp_path / "calls").read_text().splitlines()
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=2 --kill-on-bad-exit=1" in srun
    assert f"--nproc-per-node={max(1, gpus)} --max-restarts=0 --no-python" in torchrun
    assert "--nnodes=2 --node-rank=1 --master-addr=node1 --master-port=20007" in torchrun
    assert variable in (tmp_path / "environment").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_one_process_for_each_gpu(tmp_path: Path) -> None:
    show = 'echo "$RANK of $WORLD_SIZE: $0"; if (( RANK == 1 )); then exit $1; fi'
    done = launch(tmp_path, 1, 2, "bash", "-c", show, "a b", "0")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 of 2: a b", "1 of 2: a b"]
    # torchrun's own exit code would be 1.
    assert launch(tmp_path, 1, 2, "bash", "-c", show, "a b", "3").returncode == 3
    assert launch(tmp_path, 1, 2, "bash", "-c", show, "a b", "4").returncode == 1


# The page for users.

# What nobody can do but the user.
BEFORE = ["git clone YOUR-COPY-OF-THIS-REPOSITORY vpae", "cd vpae", "source .venv/bin/activate"]


def commands() -> list[str]:
    """Every command of the page."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def is_of_the_test_cluster(command: str) -> bool:
    return command.startswith(("make ", "tests/cluster/"))


def recipe(*targets: str) -> set[str]:
    """The lines that make would run."""
    dry = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=True)
    return {line for line in dry.stdout.splitlines() if not re.match(r"make(\[\d+\])?: ", line)}  # remarks


def test_continuous_integration_runs_what_the_page_says_of_the_test_cluster() -> None:
    run = recipe(*re.findall(r"^ *(?:trap ')?make ([a-z-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    found = [command for command in commands() if is_of_the_test_cluster(command)]
    assert len(found) >= 4
    for command in found:
        program, *targets = command.split()
        wanted = recipe(*targets) if program == "make" else {command}
        assert wanted <= run, command


@pytest.mark.slow
def test_every_command_of_the_page_works(clone: Clone) -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    for name, content in re.findall(r"```yaml\n# (configs/\S+)\n(.*?)```", page, re.DOTALL):
        fewer = content.replace(
            "10000", "100"
        )  # a dry run of so many jobs takes a minute (`test_scale` has its growth)
        (clone.folder / name).write_text(fewer)
    # As on a cluster that asks for all that the profile has in comments.
    profile = clone.folder / "profiles/slurm/profile.yaml"
    profile.write_text(re.sub(r"^( *)# (?=( +)?[\w-]+:)", r"\1", profile.read_text(), flags=re.MULTILINE))
    vpae = clone.folder / "bin/vpae"
    real = Path(sys.executable).with_name("vpae")
    vpae.write_text(
        vpae.read_text().replace("#!/bin/sh\n", f'#!/bin/sh\ncase $1 in config | plan) exec {real} "$@" ;; esac\n')
    )
    (clone.folder / "bin/snakemake").symlink_to(Path(sys.executable).with_name("snakemake"))
    for command in (line for line in commands() if line not in BEFORE and not is_of_the_test_cluster(line)):
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=clone.folder,
            env=clone.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    submitted = [" ".join(words) for words in json.loads((clone.folder / "bin/jobs.json").read_text())]
    assert all(" -A project " in job and " -C h100 " in job for job in submitted)
    for job in submitted:
        assert (" -p cpu " if "--comment rule_clips" in job else " -p gpu ") in job
