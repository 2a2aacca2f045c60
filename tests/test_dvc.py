"""Snakemake and DVC are of one mind, and neither takes anything stale or damaged for good. Both are the real ones.

In most tests only the stages' bodies are toys, which write a few bytes that follow from settings and inputs: commands,
provenance, workflow and pipeline are the repository's own. Among them these tests run every command of docs/data.md.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from conftest import STAGES
from vpae import cli
from vpae.artifacts import PROVENANCE, ArtifactError, read_provenance
from vpae.experiment import load
from vpae.graph import owner, stage_folder, upstream
from vpae.versioning import record
from vpae.versioning.pipeline import _files, _read, pipeline, write_metrics

ROOT = Path(__file__).parents[1]
TOY = f"""#!{sys.executable}
import json, sys, types
from dataclasses import replace
import vpae.artifacts, vpae.stages
from vpae.cli import main
from vpae.graph import stage_settings

def body(stage):
    def run(*given):  # a method's has the method's name first
        settings, inputs, out, state = given[-4:]
        made_of = [stage, stage_settings(settings, stage), {{n: vpae.artifacts.identity(f) for n, f in inputs.items()}}]
        digest = vpae.artifacts.digest(made_of)
        (out / "weights").mkdir()
        (out / "weights" / "model.bin").write_text(digest)
        number = int(digest[:6], 16) / 16**6
        scores = {{"rows": {{"vpae-1nfe": {{"frechet": {{"mean": number, "low": 0.0, "high": 1.0}}}}}}}}
        (out / "scores.json").write_text(json.dumps(scores))
        lines = [json.dumps({{"step": s, "generator_loss": number / s}}) + "\\n" for s in (1, 2)]
        (out / "metrics.jsonl").write_text("".join(lines))
    sys.modules[f"toy_{{stage}}"] = types.SimpleNamespace(run=run)
    return f"toy_{{stage}}"

vpae.stages.STAGES = {{name: replace(stage, module=body(name)) for name, stage in vpae.stages.STAGES.items()}}
vpae.artifacts.device_name = lambda: "none"  # finding out takes torch, which takes seconds
sys.exit(main())
"""
REAL = f"#!{sys.executable}\nimport sys\nfrom vpae.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
VERSIONING = ("dvc.yaml", ".dvcignore", ".gitignore")


def pages() -> dict[str, list[str]]:
    """Heading -> the shell's blocks below it in docs/data.md."""
    sections = (ROOT / "docs/data.md").read_text().split("\n## ")
    blocks = {part.partition("\n")[0]: re.findall(r"```sh\n(.*?)```", part, re.DOTALL) for part in sections}
    return {heading: found for heading, found in blocks.items() if found}


def commands(*blocks: str) -> list[str]:
    """The commands in them."""
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class Clone:
    """A copy of the project with a repository of its own, in which commands are run as a user would."""

    def __init__(self, folder: Path, vpae: str = TOY):
        self.folder = folder
        for name in ("workflow", "configs", "profiles", "metrics"):
            if (ROOT / name).exists():
                shutil.copytree(ROOT / name, folder / name)
        for name in ("Snakefile", "Makefile", "pyproject.toml", "constraints.txt", "environment.yml", *VERSIONING):
            shutil.copy(ROOT / name, folder / name)
        (folder / ".dvc").mkdir()
        for name in ("config", ".gitignore"):
            shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
        self._prepare(vpae)
        self("git", "init", "--quiet")
        self.commit("begin")

    def _prepare(self, vpae: str) -> None:
        programs = self.folder / ".venv" / "bin"  # which git does not see
        programs.mkdir(parents=True)
        for name, text in {
            "vpae": vpae,
            "snakemake": f'#!/bin/sh\nexec {sys.executable} -m snakemake "$@"\n',
            "dvc": f'#!/bin/sh\nexec {sys.executable} -m dvc "$@"\n',
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (programs.parent / ".installed").touch()  # for make
        dropped = ("VPAE_", "SNAKEMAKE_", "DVC_", "GIT_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder / ".venv"),
            "DVC_SITE_CACHE_DIR": str(self.folder / ".venv" / "dvc"),
            **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }

    def clone(self, folder: Path, vpae: str = TOY) -> "Clone":
        """A fresh clone of the committed state, with no results and an empty cache."""
        self("git", "clone", "--quiet", str(self.folder), str(folder))
        fresh = Clone.__new__(Clone)
        fresh.folder = folder
        fresh._prepare(vpae)
        return fresh

    def run(self, *command: str) -> tuple[int, str]:
        """Exit code and all that was printed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def json(self, *command: str) -> dict:
        """What a command prints as JSON; warnings go elsewhere."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    def __call__(self, *command: str) -> str:
        """Run what has to succeed; returns what it printed."""
        code, printed = self.run(*command)
        assert code == 0, f"{command}\n{printed}"
        return printed

    def follow(self, lines: list[str]) -> None:
        """Type the commands of a page."""
        for line in lines:
            self("bash", "-ec", line)

    def commit(self, message: str) -> None:
        self("git", "add", ".")
        self("git", "commit", "--quiet", "--message", message)

    def snakemake_plan(self, experiment: str = "micro") -> set[str]:
        """The stages that Snakemake would run; it must not lack notes on any result."""
        printed = self("snakemake", "--dry-run", "--quiet", "host", "--config", f"experiment={experiment}", "--", "all")
        assert "missing provenance" not in printed, printed
        plan = set(re.findall(r"^ +output: results/\w[\w-]*/(\w+) \(update\)$", printed, re.MULTILINE))
        assert plan or "Nothing to be done" in printed, printed
        return plan

    def set(self, key: str, value: object, experiment: str = "micro") -> None:
        """Change one key of an experiment's file."""
        path = self.folder / "configs" / f"{experiment}.yaml"
        tree = yaml.safe_load(path.read_text())
        section = tree
        *outer, last = key.split(".")
        for part in outer:
            section = section.setdefault(part, {})
        section[last] = value
        path.write_text(yaml.safe_dump(tree, sort_keys=False))

    def made(self, experiment: str = "micro") -> dict[str, str]:
        """Stage -> a word that changes whenever it is run: its provenance, which has date and duration."""
        return {s: (self.folder / f"results/{experiment}/{s}/{PROVENANCE}").read_text() for s in STAGES}

    def contents(self, experiment: str = "micro") -> dict[str, dict[str, str]]:
        """Stage -> hashes of what was made."""
        return {stage: read_provenance(self.folder / f"results/{experiment}/{stage}")["outputs"] for stage in STAGES}

    def copy(self, folder: Path) -> "Clone":
        """The same with all results, caches and notes, in another place."""
        shutil.copytree(self.folder, folder, symlinks=True)
        shutil.rmtree(folder / ".venv")
        other = Clone.__new__(Clone)
        other.folder = folder
        other._prepare((self.folder / ".venv/bin/vpae").read_text())
        return other


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone whose experiment `micro` was made by Snakemake, recorded, committed and pushed to `store/`."""
    clone = Clone(tmp_path_factory.mktemp("recorded") / "project")
    clone("snakemake", "--cores", "2", "--config", "experiment=micro", "--", "all")
    clone("vpae", "record", "--config", "configs/micro.yaml")
    clone("dvc", "push")
    clone.commit("record")
    return clone


@pytest.fixture
def project(recorded: Clone, tmp_path: Path) -> Clone:
    """A copy of the recorded project, to do with as one likes."""
    return recorded.copy(tmp_path / "project")


MICRO = [f"{stage}@micro" for stage in ("settings", *STAGES, "metrics")]
LAST = ("report@micro", "metrics@micro")
AFTER_EQUILIBRIUM = {"equilibrium", "samples", "evaluation", "report"}


def is_clean(clone: Clone) -> bool:
    """Whether DVC finds the experiment as it was recorded."""
    return clone.run("dvc", "status", "--quiet", *MICRO)[0] == 0


def ran(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in after if before[stage] != after[stage]}


def test_dvc_has_the_stages_of_snakemake_reading_the_same_folders(tmp_path: Path) -> None:
    from dvc.repo import Repo

    # Also shipped experiments whose results do not fit into store/.
    clone = Clone(tmp_path / "project")
    names = ("micro", "tiny", "tiny-no-adversary", "tiny-reference")
    shown = [load(ROOT / "configs" / f"{name}.yaml", environment=False) for name in names]
    (clone.folder / "dvc.yaml").write_text(
        pipeline([replace(one, path=Path(f"configs/{one.name}.yaml")) for one in shown])
    )
    with Repo(str(clone.folder)) as repo:
        stages = {stage.name: stage for stage in repo.index.stages if getattr(stage, "name", None)}
        repo.index.check_graph()
    experiments = {name.partition("@")[2] for name in stages}
    assert experiments == {"micro", "tiny", "tiny-no-adversary", "tiny-reference"}
    expected = {f"{name}@{experiment}" for experiment in experiments for name in ("settings", "metrics")}
    for experiment in sorted(experiments):
        source = load(ROOT / "configs" / f"{experiment}.yaml", environment=False)
        for stage in (s for s in STAGES if owner(source, s) is source):
            expected.add(f"{stage}@{experiment}")
            found = stages[f"{stage}@{experiment}"]
            folder = f"results/{experiment}/{stage}"
            assert found.cmd == f"workflow/stage.sh {stage} {experiment}"
            [out] = found.outs
            assert out.def_path == folder and out.persist
            read = {f"results/{owner(source, n).name}/{n}" for n in upstream(source.settings, stage)}
            if stage == "teacher" and source.settings.teacher.source == "folder":
                read.add(source.settings.teacher.path)
            assert {dep.def_path for dep in found.deps if dep not in found.params} == read
            [params] = found.params
            assert params.def_path == f"results/{experiment}/settings.json"
            assert params.params == [stage]
    assert set(stages) == expected


def test_a_teacher_from_the_hub_can_stand_beside_one_that_is_trained(tmp_path: Path) -> None:
    from dvc.repo import Repo

    clone = Clone(tmp_path / "project")
    names = ("micro", "wan2.1-i2v-14b-480p")
    shown = [load(ROOT / "configs" / f"{name}.yaml", environment=False) for name in names]
    (clone.folder / "dvc.yaml").write_text(
        pipeline([replace(one, path=Path(f"configs/{one.name}.yaml")) for one in shown])
    )
    with Repo(str(clone.folder)) as repo:
        stages = {stage.name: stage for stage in repo.index.stages if getattr(stage, "name", None)}
    [hub] = [d.def_path for d in stages[f"teacher@{names[1]}"].deps if d not in stages[f"teacher@{names[1]}"].params]
    assert hub == f"configs/{names[1]}.yaml"
    assert {f"teacher@{name}" for name in names} <= stages.keys()


def test_a_mistyped_name_leaves_dvc_yaml_and_an_empty_one_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "dvc.yaml"
    assert cli.main(["dvc", "micro", "--out", str(out)]) == 0
    written = out.read_text()
    assert cli.main(["dvc", "mcro", "micro", "--out", str(out)]) == 2
    assert out.read_text() == written == (ROOT / "dvc.yaml").read_text()
    tiny = load(ROOT / "configs/tiny.yaml", environment=False)
    with pytest.raises(
        ArtifactError, match=r"there is no tiny; write it anew with `vpae dvc micro tiny --out dvc.yaml`"
    ):
        record._targets(tiny)
    monkeypatch.chdir(tmp_path)
    out.write_text("")
    with pytest.raises(ArtifactError, match=r"dvc.yaml.*git checkout dvc.yaml"):
        record._targets(tiny)


def test_only_the_stages_that_are_named_are_committed() -> None:
    named = ["report@micro", "settings@micro", "metrics@micro"]
    assert record._targets(load(ROOT / "configs/micro.yaml", environment=False), ["report"]) == named


def test_a_given_student_is_pulled_like_the_teacher_and_its_empty_losses_are_kept(tmp_path: Path, monkeypatch) -> None:
    source = load(ROOT / "configs/tiny-shipped.yaml", environment=False)
    monkeypatch.chdir(ROOT)
    assert record._given_files(source) == ["data/students/tiny.dvc", "data/teachers/tiny.dvc"]
    assert not source.settings.methods
    evaluation = stage_folder(source, "evaluation", tmp_path / "results")
    evaluation.mkdir(parents=True)
    scores = {"rows": {"real": {"motion": {"mean": 1.5, "low": 1.25, "high": 2.0}}}}
    (evaluation / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "metrics" / "losses").mkdir(parents=True)
    (tmp_path / "metrics" / "losses" / "priming.csv").touch()  # of a method that the experiment had before
    write_metrics(source, tmp_path / "metrics", tmp_path / "results")
    assert [path.name for path in (tmp_path / "metrics" / "losses").iterdir()] == [".gitkeep"]
    assert json.loads((tmp_path / "metrics" / "scores.json").read_text()) == {"real": {"motion": 1.5}}


def test_dvc_sees_every_file_that_a_result_comes_from() -> None:
    source = load(ROOT / "configs/tiny-reference.yaml", environment=False)
    assert _files(source) == [str(ROOT / f"configs/{name}.yaml") for name in ("tiny", "tiny-reference")]
    teacher = source.settings.teacher.model_copy(update={"loras": ("style.safetensors:0.5",)})
    samples = source.settings.samples.model_copy(update={"decoder": "small.safetensors"})
    settings = source.settings.model_copy(update={"teacher": teacher, "samples": samples})
    source = replace(source, settings=settings, bases=())
    assert "style.safetensors" in _read(source, "teacher") and "small.safetensors" in _read(source, "samples")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("micro@0", "this is micro, whose own seed it names; name micro"),
        ("micro@1", "`seed: 1`, and name micro-1; to keep what is finished: `mv results/micro@1 results/micro-1`"),
        ("micro-dmd2@1", "and name micro-dmd2-1\n"),  # its clips stand with micro@1
    ],
)
def test_another_seed_is_versioned_by_a_file_of_its_own(name: str, words: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["dvc", "micro", name]) == 2
    assert words in capsys.readouterr().err


def test_the_tools_are_asked_without_settings_of_somebody_s_environment(monkeypatch) -> None:
    asked: dict[str, str] = {}
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "slurm")
    monkeypatch.setenv("VPAE_SEED", "7")
    run = lambda command, env, **_: asked.update(env) or subprocess.CompletedProcess(command, 0, "")  # noqa: E731
    monkeypatch.setattr(subprocess, "run", run)
    record._run("dvc", "status")
    assert "PATH" in asked and not {"SNAKEMAKE_PROFILE", "VPAE_SEED"} & asked.keys()


def test_the_shipped_dvc_yaml_is_what_the_command_prints() -> None:
    micro = replace(load(ROOT / "configs/micro.yaml", environment=False), path=Path("configs/micro.yaml"))
    assert (ROOT / "dvc.yaml").read_text() == pipeline([micro])


def test_what_is_recorded_is_up_to_date_for_both(recorded: Clone) -> None:
    assert is_clean(recorded)
    assert recorded.snakemake_plan() == set()
    assert set(yaml.safe_load((recorded.folder / "dvc.lock").read_text())["stages"]) == set(MICRO)


# Not with the real stages: their sampled mp4 files and latencies differ from run to run.
@pytest.mark.slow
def test_both_engines_run_the_same_and_nothing_else_in_either_order(recorded: Clone, tmp_path: Path) -> None:
    original = recorded
    left, right = original.copy(tmp_path / "left"), original.copy(tmp_path / "right")
    ablation = "equilibrium.adversarial_weight"
    value = load(ROOT / "configs/micro.yaml", environment=False).settings.equilibrium.adversarial_weight
    at_first = original.made()

    # An ablation, by Snakemake on the left and DVC on the right.
    left.set(ablation, 0.0)
    left.set("clips.workers", 2)  # changes no result
    assert left.snakemake_plan() == AFTER_EQUILIBRIUM
    left("snakemake", "--cores", "2", "--config", "experiment=micro", "--", "all")
    right("dvc", "exp", "run", "--set-param", f"configs/micro.yaml:++{ablation}=0.0", *LAST)
    made = left.made(), right.made()
    assert ran(at_first, made[0]) == ran(at_first, made[1]) == AFTER_EQUILIBRIUM
    assert comparable(left) == comparable(right) != comparable(original)

    # Each takes over what the other one made.
    left("dvc", "repro", *LAST)
    assert left.made() == made[0]
    assert is_clean(left) and is_clean(right)
    assert left.snakemake_plan() == right.snakemake_plan() == set()

    # Back again, the other way round: DVC, too, runs it and does not take the old result out of its run cache, of
    # which Snakemake would know nothing.
    for clone in (left, right):
        clone.set(ablation, value)
    left("dvc", "repro", *LAST)
    right("snakemake", "--cores", "2", "--config", "experiment=micro", "--", "all")
    right("vpae", "record", "--config", "configs/micro.yaml")
    assert ran(made[0], left.made()) == ran(made[1], right.made()) == AFTER_EQUILIBRIUM
    assert comparable(left) == comparable(right) == comparable(original)
    assert is_clean(left) and is_clean(right)


def comparable(clone: Clone) -> dict[str, dict[str, str]]:
    """The hashes that follow from settings alone: all but those of measured latencies."""
    contents = clone.contents()
    del contents["report"]
    contents["evaluation"] = {n: h for n, h in contents["evaluation"].items() if n not in ("scores.json", "table.md")}
    return contents


def test_a_fresh_clone_is_restored_and_then_sees_changes(recorded: Clone, tmp_path: Path) -> None:
    fresh = recorded.clone(tmp_path / "fresh")
    shutil.copytree(recorded.folder / "store", fresh.folder / "store", dirs_exist_ok=True)
    assert (fresh.folder / "metrics/micro/scores.json").is_file()
    # Teacher and student of `tiny`, which the repository brings.
    shutil.copytree(ROOT / "store", fresh.folder / "store", dirs_exist_ok=True)
    brought = [fresh.folder / "data/teachers", fresh.folder / "data/students"]
    for folder in brought:
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "data" / folder.name / "tiny.dvc", folder / "tiny.dvc")
    fresh("dvc", "pull")
    fresh("dvc", "status", "--quiet")
    for folder in brought:
        shutil.rmtree(folder / "tiny")
    fresh.follow(commands(*pages()["Get what others have made"]))
    assert (fresh.folder / "data/teachers/tiny/model_index.json").is_file()
    assert (fresh.folder / "data/students/tiny/student/model_index.json").is_file()
    assert is_clean(fresh)
    assert fresh.snakemake_plan() == set()
    assert fresh.contents() == recorded.contents()
    fresh.set("priming.guidance_scale", 2.5)
    assert fresh.snakemake_plan() == {"priming"} | AFTER_EQUILIBRIUM


def test_the_page_leads_from_a_change_to_what_others_can_pull(project: Clone, tmp_path: Path) -> None:
    project.set("report.clips", 1)
    project.commit("one clip")
    project.follow(commands(*pages()["Run and record"]))
    assert project("git", "log", "--format=%s").splitlines()[0] == "micro: results"
    fresh = project.clone(tmp_path / "fresh")
    shutil.copytree(project.folder / "store", fresh.folder / "store", dirs_exist_ok=True)
    make_record, make_restore = commands(*pages()["# Data and checkpoints"])
    fresh.follow([make_restore])
    assert fresh.contents() == project.contents()
    fresh.follow([make_record])
    assert fresh("git", "status", "--porcelain", "--untracked-files=no") == ""
    # Deleted, a result is made again although nothing has changed.
    forced = "rm -r results/micro/priming"
    assert forced in re.sub(r"\s+", " ", (ROOT / "docs/data.md").read_text())
    before = fresh.made()["priming"]
    fresh("bash", "-ec", forced)
    fresh("snakemake", "--", "results/micro/priming")
    assert fresh.made()["priming"] != before


def test_every_command_of_the_page_stands_where_a_test_follows_it() -> None:
    followed = {"# Data and checkpoints", "Get what others have made", "Run and record", "Compare", "Remotes"}
    measured = {"Throughput"}  # by tests/test_bench_data.py
    assert set(pages()) == followed | measured


def test_stale_results_cannot_be_recorded(project: Clone) -> None:
    lock, before = (project.folder / "dvc.lock").read_text(), project.made()
    project.set("priming.guidance_scale", 2.5)
    # As after a pull, or a stage run by hand: Snakemake has no notes of these results.
    project("snakemake", "--touch", "--forceall", "--cores", "1", "--config", "experiment=micro", "--", "all")
    shutil.rmtree(project.folder / ".snakemake")
    assert "Nothing to be done" not in project("snakemake", "--dry-run", "--config", "experiment=micro", "--", "all")
    stale = r"results/micro/priming: made with priming\.guidance_scale = [\d.]+, but the configuration says 2\.5"
    code, printed = project.run("vpae", "record", "--config", "configs/micro.yaml")
    assert code == 2 and re.search(stale, printed)
    assert (project.folder / "dvc.lock").read_text() == lock
    # Whoever forces DVC is found out by the next one who restores.
    project("vpae", "settings", "--config", "configs/micro.yaml")
    project("dvc", "commit", "--force", *MICRO)
    assert is_clean(project)
    code, printed = project.run("vpae", "restore", "--no-pull", "--config", "configs/micro.yaml")
    assert code == 2 and re.search(stale, printed)
    # DVC's own way does not believe Snakemake either, and makes them anew.
    (project.folder / "dvc.lock").write_text(lock)
    project("dvc", "repro", *LAST)
    assert ran(before, project.made()) == {"priming"} | AFTER_EQUILIBRIUM
    assert is_clean(project)


def test_results_of_unknown_origin_are_checked_before_they_are_recorded(project: Clone) -> None:
    shutil.rmtree(project.folder / ".snakemake" / "metadata")
    code, printed = project.run("vpae", "record", "--config", "configs/micro.yaml")
    assert code == 2 and "vpae restore --no-pull" in printed
    weights = project.folder / "results/micro/equilibrium/weights/model.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[::-1])
    code, printed = project.run("vpae", "restore", "--no-pull", "--config", "configs/micro.yaml")
    assert code == 2 and "results/micro/equilibrium/weights/model.bin: damaged" in printed
    weights.write_bytes(content)
    project("vpae", "restore", "--no-pull", "--config", "configs/micro.yaml")
    project("vpae", "record", "--config", "configs/micro.yaml")
    project.set("jobs", {"latents": 2})  # marks of its parts are temporary, and nobody knows of them
    project("vpae", "record", "--config", "configs/micro.yaml")


def test_metrics_parameters_and_plots_can_be_compared(project: Clone) -> None:
    before = json.loads((project.folder / "metrics/micro/scores.json").read_text())
    project.follow(commands(*pages()["Compare"]))
    after = json.loads((project.folder / "metrics/micro/scores.json").read_text())
    scores = "metrics/micro/scores.json"
    diff = project.json("dvc", "metrics", "diff", "--json", "--targets", scores)[scores]
    assert diff["vpae-1nfe.frechet"]["old"] == before["vpae-1nfe"]["frechet"]
    assert diff["vpae-1nfe.frechet"]["new"] == after["vpae-1nfe"]["frechet"] != before["vpae-1nfe"]["frechet"]
    params = project.json("dvc", "params", "diff", "--json")
    assert params["results/micro/settings.json"]["equilibrium.equilibrium.adversarial_weight"]["new"] == 0
    assert "micro__equilibrium" in (project.folder / "dvc_plots/index.html").read_text()


def s3_client(address: str):
    """Botocore's client of the S3 server."""
    import botocore.session

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    return botocore.session.get_session().create_client("s3", endpoint_url=address, **keys)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with an empty bucket `vpae`."""
    pytest.importorskip("dvc_s3", reason="the extra `remotes` is not installed")
    server = pytest.importorskip("moto.server", reason="moto[s3] and flask are not installed")
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    address = "http://{}:{}".format(*running.get_host_and_port())
    s3_client(address).create_bucket(Bucket="vpae")
    yield address
    running.stop()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of an SSH server for this user on the loopback interface, and the folder with its keys."""
    pytest.importorskip("dvc_ssh", reason="the extra `remotes` is not installed")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
    server = shutil.which("sshd", path=path)
    if server is None or not shutil.which("ssh"):
        pytest.skip("there is no sshd; Debian's package is openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "other", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "PidFile": folder / "pid",
        "AuthorizedKeysFile": folder / "authorized",
        "StrictModes": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([server, "-D", "-e", "-f", folder / "config"], stderr=(folder / "log").open("w"))
    deadline = time.monotonic() + 60
    while "listening" not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    yield port, folder
    process.terminate()
    process.wait()


def trust(clone: Clone, port: int, keys: Path, host_key: str) -> None:
    """What docs/data.md says of ~/.ssh/config: OpenSSH makes the connection, and knows one host key."""
    known = clone.folder / ".venv/known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(keys / f'{host_key}.pub').read_text()}")
    options = f"-F none -p {port} -i {keys / 'user'} -o UserKnownHostsFile={known} -o BatchMode=yes"
    options += " -o LogLevel=ERROR -o StrictHostKeyChecking=yes"
    (clone.folder / ".venv/.ssh").mkdir(exist_ok=True)
    (clone.folder / ".venv/.ssh/config").write_text(
        f"Host store\n    ProxyCommand ssh {options} -W localhost:{port} 127.0.0.1\n"
    )


def add_remote(clone: Clone, kind: str, request: pytest.FixtureRequest) -> None:
    """Give a clone the remote that docs/data.md sets up, and push to it as the page says."""
    setup, push = pages()["Remotes"]
    folder, s3, ssh = setup.split("\n\n")
    if kind == "folder":
        block, real = folder, {"/shared/vpae": str(clone.folder.parent / "remote")}
    elif kind == "s3":
        clone.environment["AWS_DEFAULT_REGION"] = "us-east-1"
        block, real = s3, {"bucket/": "vpae/", "https://s3.example.org": request.getfixturevalue("s3"), "...": "test"}
    else:
        port, keys = request.getfixturevalue("sshd")
        trust(clone, port, keys, "host")
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        real = {"/srv/vpae": str(clone.folder.parent / "remote"), " me": f" {user}"}
        block, real = ssh, real | {"~/.ssh/id_ed25519": str(keys / "user")}
    for placeholder, value in real.items():
        assert placeholder in block
        block = block.replace(placeholder, value)
    clone.follow(commands(block, push))


def tamper(project: Clone, kind: str, content: bytes, request: pytest.FixtureRequest) -> None:
    """Turn the object with this content around, in the remote."""
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    name = f"files/md5/{digest[:2]}/{digest[2:]}"
    if kind == "s3":
        bucket, key = s3_client(request.getfixturevalue("s3")), {"Bucket": "vpae", "Key": f"vpae/{name}"}
        assert bucket.get_object(**key)["Body"].read() == content
        bucket.put_object(**key, Body=content[::-1])
        return
    stored = project.folder.parent / "remote" / name
    assert stored.read_bytes() == content
    stored.chmod(0o644)
    stored.write_bytes(content[::-1])


def wipe(clone: Clone) -> None:
    shutil.rmtree(clone.folder / "results/micro")
    shutil.rmtree(clone.folder / ".dvc/cache")


@pytest.mark.parametrize("kind", ["folder", "s3", "ssh"])
def test_push_wipe_pull_and_a_tampered_object_is_refused_by_name(
    kind: str, project: Clone, request: pytest.FixtureRequest
) -> None:
    contents = project.contents()
    add_remote(project, kind, request)
    wipe(project)
    project("dvc", "pull", *MICRO)
    assert is_clean(project)
    assert project.contents() == contents

    weights = project.folder / "results/micro/priming/weights/model.bin"
    content = weights.read_bytes()
    tamper(project, kind, content, request)
    wipe(project)
    code, printed = project.run("vpae", "restore", "--config", "configs/micro.yaml")
    assert code == 2
    assert "results/micro/priming/weights/model.bin" in printed, printed
    assert not weights.exists() or weights.read_bytes() == content


def test_an_ssh_server_with_another_key_is_refused(project: Clone, request: pytest.FixtureRequest) -> None:
    add_remote(project, "ssh", request)
    port, keys = request.getfixturevalue("sshd")
    trust(project, port, keys, "other")
    shutil.rmtree(project.folder.parent / "remote")
    code, _ = project.run("dvc", "push", "settings@micro")
    assert code != 0
    assert not (project.folder.parent / "remote").exists()
    trust(project, port, keys, "host")  # it was the key, and nothing else
    project("dvc", "push", "settings@micro")
    assert (project.folder.parent / "remote").is_dir()
