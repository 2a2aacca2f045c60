"""The workflow plans what an experiment needs and no more. No stage runs: a stand-in `vpae` makes empty results."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import STAGES

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/bin/sh
folder=results/$(basename "$3" .yaml)/$1
mkdir -p "$folder" && echo "$@" > "$folder/made_by"
"""
# Saves when it is told to end, which takes it a moment.
STUBBORN = f"""#!{sys.executable}
import signal, sys, time
def save(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
print("at work", flush=True)
time.sleep(60)
"""


class Clone:
    """A copy of the repository's workflow, with `vpae` replaced."""

    def __init__(self, folder: Path, vpae: str = STAND_IN):
        self.folder = folder
        for name in ("workflow", "profiles", "configs"):
            shutil.copytree(ROOT / name, folder / name)
        for name in ("Snakefile", "slurm", "environment.yml"):
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
        program = folder / "bin" / "vpae"
        program.parent.mkdir()
        program.write_text(vpae)
        program.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("VPAE_", "SNAKEMAKE_"))}
        self.environment = kept | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """Begin a run of Snakemake; what it prints comes in one stream."""
        command = [sys.executable, "-m", "snakemake", "--quiet", "host", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **streams, **options)

    def snakemake(self, *arguments: str) -> tuple[int, str]:
        """Run Snakemake; returns the exit code and what it printed."""
        process = self.start(*arguments)
        printed, _ = process.communicate()
        return process.returncode, printed

    def planned(self, *arguments: str) -> list[str]:
        """The folders that a run would make, sorted."""
        code, printed = self.snakemake("--dry-run", *arguments)
        assert code == 0, printed
        return sorted(re.findall(r"^ +output: (.+?)(?: \(update\))?$", printed, re.MULTILINE))

    def edit(self, name: str, change: Callable[[dict], object]) -> None:
        """Change the keys of an experiment's file."""
        path = self.folder / "configs" / f"{name}.yaml"
        tree = yaml.safe_load(path.read_text()) if path.exists() else {}
        change(tree)
        path.write_text(yaml.safe_dump(tree))


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the experiment `micro` has been run."""
    clone = Clone(tmp_path_factory.mktemp("finished"))
    code, printed = clone.snakemake("--config", "experiment=micro")
    assert code == 0, printed
    return clone


def folders(experiment: str, *stages: str) -> list[str]:
    return [f"results/{experiment}/{stage}" for stage in stages]


def test_lint_finds_nothing(clone: Clone) -> None:
    code, printed = clone.snakemake("--lint")
    assert code == 0, printed
    assert "Congratulations" in printed


def test_an_experiment_is_its_eight_stages(clone: Clone) -> None:
    assert clone.planned("--config", "experiment=micro") == sorted(folders("micro", *STAGES))


@pytest.mark.slow
def test_an_overlay_shares_the_stages_it_leaves_alone(clone: Clone) -> None:
    clone.edit("ablation", lambda tree: tree.update(extends="micro", equilibrium={"backbone": "teacher"}))
    own = folders("ablation", "equilibrium", "samples", "evaluation", "report")
    shared = folders("micro", "clips", "teacher", "latents", "priming")
    assert clone.planned("--config", "experiment=ablation") == sorted(own + shared)
    code, printed = clone.snakemake("--dry-run", "--", "results/ablation/clips")
    assert code != 0
    assert "ask for results/micro/clips" in printed


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        # How fast, not what; writing the file anew also changes the order of its keys.
        (lambda tree: tree["clips"].update(workers=2), ()),
        (lambda tree: tree["report"].update(clips=1), ("report",)),
        (
            lambda tree: tree["priming"].update(guidance_scale=2.0),
            ("priming", "equilibrium", "samples", "evaluation", "report"),
        ),
    ],
    ids=["clips.workers", "report.clips", "priming.guidance_scale"],
)
def test_a_changed_key_runs_again_only_what_depends_on_it(finished: Clone, change: Callable, stages: tuple) -> None:
    before = (finished.folder / "configs" / "micro.yaml").read_text()
    try:
        finished.edit("micro", change)
        assert finished.planned("--config", "experiment=micro") == sorted(folders("micro", *stages))
    finally:
        (finished.folder / "configs" / "micro.yaml").write_text(before)


def test_what_a_stage_says_is_shown_and_kept(finished: Clone) -> None:
    assert {p.name for p in (finished.folder / "results/micro/logs").glob("*.log")} == {f"{s}.log" for s in STAGES}
    made_by = (finished.folder / "results/micro/priming/made_by").read_text()
    assert made_by == "priming --config configs/micro.yaml\n"


def test_a_misspelt_key_is_named_without_a_traceback(clone: Clone) -> None:
    clone.edit("micro", lambda tree: tree["priming"].update(trainig={"steps": 3}))
    code, printed = clone.snakemake("--config", "experiment=micro")
    assert code != 0
    assert "vpae: configs/micro.yaml: priming.trainig: unknown key; did you mean training?" in printed
    assert "Traceback" not in printed and 'File "' not in printed


def test_a_missing_teacher_is_named_with_the_remedy(clone: Clone) -> None:
    clone.edit("tiny", lambda tree: tree.update(teacher={"source": "folder", "path": "data/teachers/absent"}))
    code, printed = clone.snakemake("--dry-run")
    assert code != 0
    assert "configs/tiny.yaml: teacher.path: data/teachers/absent/model_index.json does not exist" in printed
    assert "dvc pull" in printed


def test_official_networks_are_shared_out_over_jobs(clone: Clone) -> None:
    vbench = {"backbones": "official", "dimensions": ["dynamic_degree", "imaging_quality"]}
    jobs = {"evaluation": 2}
    clone.edit("official", lambda tree: tree.update(extends="micro", evaluation={"vbench": vbench}, jobs=jobs))
    planned = clone.planned("--config", "experiment=official")
    own = folders("official", "evaluation", "report", *(f".parts/evaluation/{part}-of-2" for part in (1, 2)))
    assert planned == sorted(own + folders("micro", *STAGES[:-2]))


def test_a_stage_told_to_end_saves_and_says_so(tmp_path: Path) -> None:
    clone = Clone(tmp_path, vpae=STUBBORN)
    # A session of its own: SLURM, too, signals every process of a job.
    process = clone.start("--config", "experiment=micro", "--", "results/micro/clips", start_new_session=True)
    for line in process.stdout:
        if line == "at work\n":
            os.killpg(process.pid, signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() != 0
    assert "saved\n" in rest
    assert "exit status 3" in rest
    assert (tmp_path / "results/micro/logs/clips.log").read_text() == "at work\nsaved\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "given", "words"),
    [
        ("all", ("experiment=micro", "seeds=1"), "of `rivals` and `ablations`; here name each, .* experiment=micro@1"),
        ("rivals", ("experiment=micro", "seeds=a"), "write whole numbers separated by commas"),
        ("rivals", ("experiment=micro,tiny",), "takes the name of one experiment"),
        ("ablations", ("experiment=micro@1",), "takes the name of one experiment; seeds=N"),
        ("ablations", ("experiment=micro-magic",), "there is no configs/micro-magic-no-"),
    ],
)
def test_seeds_that_nobody_heeds_or_reads_are_refused(clone: Clone, target: str, given: tuple, words: str) -> None:
    code, printed = clone.snakemake("--dry-run", target, "--config", *given)
    assert code != 0 and re.search(words, printed) and "Traceback" not in printed


@pytest.mark.parametrize("given", ["007", "'007'", "1e5", "True"])
def test_a_name_of_which_snakemake_makes_a_number_is_refused(clone: Clone, given: str) -> None:
    for name in ("7", "100000.0", "True"):
        clone.edit(name, lambda tree: tree.update(extends="micro"))
    code, printed = clone.snakemake("--dry-run", "--config", f"experiment={given}")
    assert code != 0 and "which is no name; write the name in brackets" in printed and "Traceback" not in printed


def test_a_number_in_brackets_is_a_name(clone: Clone) -> None:
    shutil.copy(clone.folder / "configs/micro.yaml", clone.folder / "configs/007.yaml")
    assert clone.planned("--config", "experiment=[007]") == sorted(folders("007", *STAGES))


@pytest.mark.slow
def test_a_comparison_asks_for_every_method_once_a_seed(clone: Clone) -> None:
    made = clone.planned("rivals", "--config", "experiment=micro", "seeds='0,1'")
    assert "results/comparison.json, results/comparison.csv, results/comparison.md" in made
    for seed in ("", "@1"):
        for folder in ("micro{}/latents", "micro{}/priming", "micro-dmd2{}/dmd2", "micro-rivals{}/evaluation"):
            assert made.count(f"results/{folder.format(seed)}") == 1


def test_a_folder_of_a_name_with_its_own_seed_is_not_made(clone: Clone) -> None:
    code, printed = clone.snakemake("--dry-run", "--", "results/micro@0/clips")
    assert code != 0 and "micro@0 is micro, whose own seed it names; ask for results/micro/clips" in printed


@pytest.mark.slow
def test_ablations_have_the_seed_of_their_base(clone: Clone) -> None:
    clone.edit("mine", lambda tree: tree.update(extends="micro", seed=42))
    clone.edit("mine-no-csds", lambda tree: tree.update(extends="mine", equilibrium={"csds_weight": 0.0}))
    made = clone.planned("ablations", "--config", "experiment=mine")
    assert {"results/mine/evaluation", "results/mine-no-csds/evaluation"} <= {*made} and "@" not in " ".join(made)


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused_before_any_job(clone: Clone) -> None:
    clone.edit("micro-no-csds", lambda tree: tree.update(extends="micro", evaluation={"bootstrap": 30}))
    code, printed = clone.snakemake("--dry-run", "ablations", "--config", "experiment=micro")
    assert code != 0 and "evaluation.bootstrap is 20 in micro and 30 in micro-no-csds" in printed
    assert "Traceback" not in printed
