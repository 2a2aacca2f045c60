"""Stages cut into parts, in the workflow: what is planned, what is not planned again, and what planning costs."""

import os
from pathlib import Path

import pytest
import yaml

from conftest import STAGES
from test_workflow import Clone, folders

# A part leaves its mark for a test to see, and the stage tells which marks it found.
STAND_IN = """#!/bin/sh
experiment=results/$(basename "$3" .yaml)
mkdir -p "$experiment/$1-parts"
if [ "$4" = --part ]; then echo "$5" > "$experiment/$1-parts/$(basename "$5")-$(dirname "$5")"; exit; fi
mkdir -p "$experiment/$1" && ls "$experiment/$1-parts" | wc -l > "$experiment/$1/made_by"
"""
CUT = ("--config", "experiment=cut")


def cut(clone: Clone, **jobs: int) -> None:
    """An experiment of its own, cut into so many jobs."""
    micro = yaml.safe_load((clone.folder / "configs" / "micro.yaml").read_text())
    clone.edit("cut", lambda tree: tree.update(micro, seed=1, jobs=jobs))


def parts(stage: str, of: int) -> list[str]:
    return [f"results/cut/.parts/{stage}/{number}-of-{of}" for number in range(1, of + 1)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which three stages have been run in parts."""
    clone = Clone(tmp_path_factory.mktemp("cut"), vpae=STAND_IN)
    cut(clone, clips=2, latents=3, samples=2)
    made = sorted([*folders("cut", *STAGES), *parts("clips", 2), *parts("latents", 3), *parts("samples", 2)])
    assert clone.planned(*CUT) == made
    code, printed = clone.snakemake(*CUT)
    assert code == 0, printed
    return clone


def test_the_stage_comes_after_all_its_parts_and_their_marks_are_gone(clone: Clone) -> None:
    results = clone.folder / "results" / "cut"
    for stage, number in (("clips", 2), ("latents", 3), ("samples", 2), ("priming", 0)):
        assert int((results / stage / "made_by").read_text()) == number
    assert not [path for path in results.glob(".parts/*/*") if path.is_file()]
    assert {path.name for path in (results / "logs" / "latents").glob("*.log")} == {f"{n}-of-3.log" for n in (1, 2, 3)}


@pytest.mark.parametrize(
    "jobs", [{"clips": 2, "latents": 3, "samples": 2}, {}, {"latents": 100, "samples": 5}], ids=str
)
def test_another_number_of_jobs_runs_nothing_again(jobs: dict, clone: Clone) -> None:
    cut(clone, **jobs)
    assert clone.planned(*CUT) == []


@pytest.mark.slow
def test_a_mark_made_under_other_settings_is_made_again(tmp_path: Path) -> None:
    clone = Clone(tmp_path, vpae=STAND_IN)
    cut(clone, latents=2)
    code, printed = clone.snakemake("--notemp", *CUT, "--", *parts("latents", 2))
    assert code == 0, printed
    rest = sorted(set(folders("cut", *STAGES)) - set(folders("cut", "clips", "teacher")))
    assert clone.planned(*CUT) == rest
    clone.edit("cut", lambda tree: tree["latents"].update(dtype="bfloat16"))
    assert clone.planned(*CUT) == sorted([*rest, *parts("latents", 2)])


def cost(clone: Clone, *arguments: str) -> tuple[float, int, str]:
    """CPU seconds and peak memory (bytes) of a run of Snakemake, and what it printed."""
    process = clone.start(*arguments, *CUT)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, printed
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, printed


def planning(clone: Clone, jobs: int) -> tuple[float, int]:
    """CPU seconds and peak memory (bytes) of a dry run with so many jobs of a stage: the less of two measurements."""
    cut(clone, latents=jobs)
    runs = [cost(clone, "--dry-run", "--forcerun", "latents", "--quiet", "all") for _ in range(2)]
    return min(seconds for seconds, _, _ in runs), min(memory for _, memory, _ in runs)


def test_planning_costs_in_proportion_to_the_number_of_jobs(clone: Clone) -> None:
    """Not of shards at all: a job encodes as many of them as there are."""
    (none, _), (few, small), (many, large) = (planning(clone, jobs) for jobs in (1, 400, 1600))
    assert many - none <= 2 * 4 * max(few - none, 0.1), "four times the jobs; with squares, it would be sixteen times"
    jobs = 10_000  # by the straight line through what was measured
    assert none + (many - none) / 1599 * jobs <= 60
    assert small + (large - small) / 1200 * jobs <= 4 * 2**30


def test_a_finished_experiment_is_found_finished_at_once(clone: Clone) -> None:
    cut(clone, clips=2, latents=3, samples=2)
    starting, _, _ = cost(clone, "--version")
    seconds, _, printed = cost(clone)
    assert "Nothing to be done" in printed
    assert seconds <= 6 * starting, (seconds, starting)
