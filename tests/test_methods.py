"""A method is one file, one row and one YAML; which ones are trained, and from what, is an experiment's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vpae.distill import METHODS
from vpae.experiment import ConfigError, Source, load
from vpae.graph import STAGES, owner, stages_of, upstream

ROOT = Path(__file__).parents[1]
BASE = {
    "clips": {"source": "world", "train": 64, "held_out": 16},
    "teacher": {"source": "train"},
    "samples": {"count": 8, "decode": 4},
}
TOY = '''"""A toy: regression on the clips."""

from __future__ import annotations

from pydantic import Field

from vpae.config.training import Optimizer, Training
from vpae.distill.method import Method, MethodSettings, motion_monitors
from vpae.lazy import lazy
from vpae.training.phase import Role

wan = lazy("vpae.models.wan")


class Settings(MethodSettings):
    """Stage `toy`."""

    training: Training = Field(Training(steps=2, batch_size=2, ema_decay=0.5), description="Its run.")


class Toy(Method):
    """Roles: the generator."""

    name = "toy"
    title = "A toy that regresses"
    label = "toy student"
    about = "plain regression"
    Settings = Settings

    def __init__(self, config, shift, generator):
        super().__init__(config, shift, generator)
        self.hold()
        self.roles = {"generator": Role(generator, config.generator)}

    @classmethod
    def build(cls, settings, networks):
        return cls(settings.toy, settings.teacher.shift, cls.generator_at_start(settings, networks, None))

    def generator_loss(self, clips):
        xh = wan.predict_x0(self.generator, clips.noise(), clips.ones(), clips.c)
        return (xh - clips.x).square().mean(), motion_monitors(xh, clips.x)
'''


def write(folder: Path, name: str, tree: dict) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, "base", BASE)


def methods(folder: Path, tree: dict) -> dict[str, str]:
    return load(write(folder, "own", {"extends": "base", **tree})).settings.methods


def owners(source: Source) -> dict[str, str]:
    return {stage: owner(source, stage).name for stage in stages_of(source.settings)}


# Chains.


def test_an_experiment_trains_the_papers_two_phases_unless_it_says_otherwise(base: Path) -> None:
    settings = load(base).settings
    assert settings.methods == {"priming": "teacher", "equilibrium": "priming"} and settings.student == "equilibrium"
    assert settings.chain("equilibrium") == ["priming", "equilibrium"]
    assert upstream(settings, "equilibrium") == ("latents", "teacher", "priming")
    assert upstream(settings, "priming") == ("latents", "teacher")


def test_a_list_is_a_chain_of_its_own_a_mapping_adds_and_null_takes_away(base: Path) -> None:
    folder = base.parent
    rows = {"samples": {"rows": {"teacher-1nfe": {"model": "teacher", "steps": 1}}}}
    assert methods(folder, {"methods": ["equilibrium"]} | rows) == {"equilibrium": "teacher"}
    assert methods(folder, {"methods": {"equilibrium": "teacher"}}) == {"priming": "teacher", "equilibrium": "teacher"}
    assert methods(folder, {"methods": {"equilibrium": None}}) == {"priming": "teacher"}
    write(folder, "alone", {**BASE, "methods": ["equilibrium"]})
    top = load(write(folder, "top", {"extends": "alone", "methods": {"priming": "equilibrium"}})).settings
    assert top.methods == {"equilibrium": "teacher", "priming": "equilibrium"}
    assert top.student == "priming" and stages_of(top)[3:5] == ("equilibrium", "priming")


def test_rows_follow_the_methods(base: Path) -> None:
    rows = load(write(base.parent, "own", {"extends": "base", "methods": ["equilibrium"]})).settings.samples.rows
    assert list(rows) == ["teacher-100nfe", "teacher-1nfe", "vpae-1nfe", "vpae-2nfe", "vpae-4nfe"]


def test_an_overlay_takes_a_row_away(base: Path) -> None:
    given = {name: {"model": "teacher", "steps": 1} for name in ("a", "b")}
    write(base.parent, "base", {**BASE, "samples": {**BASE["samples"], "rows": given}})
    rows = load(write(base.parent, "own", {"extends": "base", "samples": {"rows": {"a": None}}})).settings.samples.rows
    assert list(rows) == ["b"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"methods": ["unheard"]}, "there is no method unheard; there are priming, equilibrium"),
        ({"methods": {"priming": None}}, "equilibrium starts from priming, which is not among the methods"),
        ({"methods": {"priming": "equilibrium"}}, "go in a circle"),
        (
            {"methods": ["priming"], "samples": {"rows": {"x": {"model": "equilibrium", "steps": 1}}}},
            "samples.rows.x.model = equilibrium is not trained here; take one of teacher, priming",
        ),
        (
            {"priming": {"student_lora": {"rank": 4}}},
            "equilibrium.student_lora is not priming.student_lora",
        ),
    ],
    ids=str,
)
def test_impossible_chains_are_refused(tree: dict, message: str, base: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(write(base.parent, "own", {"extends": "base", **tree}))


def test_a_student_is_not_sampled_at_other_times_than_its_start_was_trained_for(base: Path) -> None:
    path = write(base.parent, "own", {"extends": "base", "priming": {"few_step_shift": 0.3}})
    with pytest.raises(ConfigError, match=r"equilibrium.few_step_shift is empty, and priming, .* has 0.3: .*too"):
        load(path)
    assert load(path, ["equilibrium.few_step_shift=0.3"]).settings.equilibrium.later_shift(5.0) == 0.3


def test_a_method_that_the_experiment_does_not_train_is_no_stage_of_it(base: Path, tmp_path: Path) -> None:
    from vpae.stages import run_stage

    source = load(write(base.parent, "own", {"extends": "base", "methods": ["priming"]}))
    with pytest.raises(ConfigError, match=r"own.yaml: methods: equilibrium is not among priming; .*--set methods"):
        run_stage(source, "equilibrium", tmp_path)


# Several overlays in one report.


def test_a_method_that_starts_elsewhere_belongs_to_the_overlay_and_the_rest_to_the_base(base: Path) -> None:
    source = load(write(base.parent, "own", {"extends": "base", "methods": {"equilibrium": "teacher"}}))
    own = {"equilibrium", "samples", "evaluation", "report"}
    assert owners(source) == {stage: "own" if stage in own else "base" for stage in stages_of(source.settings)}


def test_an_experiment_that_extends_several_shows_what_each_of_them_trains(base: Path) -> None:
    folder = base.parent
    write(folder, "left", {"extends": "base", "priming": {"guidance_scale": 2.0}})
    write(folder, "right", {"extends": "base", "methods": {"equilibrium": "teacher"}})
    both = load(write(folder, "both", {"extends": ["left", "right"]}))
    # What `left` changes is not undone by the base that `right` extends too.
    assert both.settings.priming.guidance_scale == 2.0
    assert both.settings.methods == {"priming": "teacher", "equilibrium": "teacher"}
    found = owners(both)
    assert (found["clips"], found["teacher"], found["latents"]) == ("base", "base", "base")
    assert (found["priming"], found["equilibrium"], found["report"]) == ("left", "right", "both")


# The table.


def test_every_method_is_documented_for_report_and_card() -> None:
    for name, method in METHODS.items():
        assert method.name == name and method.title and method.label and method.about and method.Settings.__doc__
        assert name in STAGES and STAGES[name].sections == (name,)


def test_no_file_names_the_papers_phases_but_their_own_and_the_table() -> None:
    source = ROOT / "src"
    files = [path for path in source.rglob("*") if path.suffix in (".py", ".j2", ".html", ".yaml", ".json")]
    texts = {
        path: path.read_text().replace("One-Step Adversarial Equilibrium", "") for path in files
    }  # the paper's title
    naming = {path for path, text in texts.items() if re.search("priming|equilibrium", text, re.IGNORECASE)}
    assert {path.relative_to(source / "vpae/distill").as_posix() for path in naming} == {
        "priming.py",
        "equilibrium.py",
        "__init__.py",
    }


def test_the_workflow_reads_settings_and_looks_for_a_teacher_without_torch() -> None:
    """Each of its processes does, and torch takes seconds to import."""
    code = """if True:
        import sys
        from pathlib import Path
        import vpae.distill, vpae.graph
        from vpae.experiment import load
        from vpae.planning.presence import missing_teacher
        print(missing_teacher(load(Path(sys.argv[1]))), *("torch" in sys.modules, "diffusers" in sys.modules))
    """
    arguments = [sys.executable, "-c", code, str(ROOT / "configs/micro.yaml")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False", "False"]


# A method of somebody else's.


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A project with a toy method: one file, one row (an entry point) and one YAML; and the environment that has it."""
    project, package = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("package")
    for name in ("workflow", "profiles", "configs"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(ROOT / name, project / name)
    (project / "bin").mkdir()
    (project / "bin/vpae").write_text(f"#!{sys.executable}\nimport sys\nfrom vpae.cli import main\nsys.exit(main())\n")
    (project / "bin/vpae").chmod(0o755)
    (package / "toy.py").write_text(TOY)
    (package / "toy-1.0.dist-info").mkdir()
    (package / "toy-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (package / "toy-1.0.dist-info/entry_points.txt").write_text("[vpae.methods]\ntoy = toy:Toy\n")
    rows = {f"toy-{n}nfe": {"model": "toy", "steps": n} for n in (1, 2)}
    rows |= dict.fromkeys(["teacher-100nfe", "vpae-2nfe", "vpae-4nfe"])
    quick = {"latency_warmup": 0, "latency_repeats": 1, "bootstrap": 20, "vbench": {"backbones": "off"}}
    tree = {"methods": {"toy": "teacher"}, "samples": {"rows": rows}, "evaluation": quick}
    tree["toy"] = {"few_step_shift": 0.5}
    write(project / "configs", "toyed", {"extends": "micro", **tree})
    path = os.pathsep.join([str(package), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VPAE_", "SNAKEMAKE_"))}
    return project, kept | {"PYTHONPATH": path, "PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def asked(toy: tuple[Path, dict], *command: str) -> str:
    """What a command prints in that project; it has to succeed."""
    project, environment = toy
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_method_of_another_package_is_planned_beside_the_others(toy: tuple[Path, dict]) -> None:
    plan = asked(toy, sys.executable, "-m", "snakemake", "-n", "--quiet", "host", "--config", "experiment=toyed")
    made = re.findall(r"^ +output: results/(\S+)", plan, re.MULTILINE)
    own = [f"toyed/{stage}" for stage in ("toy", "samples", "evaluation", "report")]
    shared = [f"micro/{stage}" for stage in ("clips", "teacher", "latents", "priming", "equilibrium")]
    assert sorted(made) == sorted(own + shared)
    assert "toy" in asked(toy, "vpae", "config", "schema")


@pytest.mark.slow
def test_a_method_of_another_package_goes_all_the_way_to_the_report(
    toy: tuple[Path, dict], finished_micro: Path
) -> None:
    project, _ = toy
    shutil.copytree(finished_micro / "micro", project / "results/micro")
    asked(toy, sys.executable, "-m", "snakemake", "all", "--cores", "2", "--config", "experiment=toyed")
    assert {path.name for path in (project / "results/micro/logs").glob("*.log")} == set()  # nothing ran twice
    page = (project / "results/toyed/report/index.html").read_text()
    assert "A toy that regresses" in page and "toy student, 1 step" in page and "V-PAE, 1 step" in page
    student = project / "results/toyed/toy/student"
    assert json.loads((student / "scheduler/scheduler_config.json").read_text())["shift"] == 0.5
    card = (student / "README.md").read_text()
    assert "distilled by plain regression" in card
    again = asked(toy, sys.executable, "-m", "snakemake", "all", "--cores", "2", "--config", "experiment=toyed")
    assert "Nothing to be done" in again

    asked(toy, "git", "init", "--quiet")
    asked(toy, "dvc", "init", "--quiet")
    (project / "dvc.yaml").write_text(
        subprocess.check_output(["vpae", "dvc", "toyed"], cwd=project, env=toy[1], text=True)
    )
    printed = asked(toy, "dvc", "repro", "toy@toyed")
    assert "toy@toyed" in printed and "Nothing to be done" in printed
    assert "equilibrium@micro" in asked(toy, "dvc", "stage", "list", "--name-only").split()
    assert "toy@toyed" in (project / "dvc.lock").read_text()


@pytest.mark.slow
def test_a_method_of_another_package_is_planned_and_timed(toy: tuple[Path, dict]) -> None:
    plan = asked(toy, "vpae", "plan", "--config", "configs/toyed.yaml", "--gpus", "1")
    assert re.search(r"^toy, .*fits", plan, re.MULTILINE)
    asked(toy, "vpae", "bench", "--config", "configs/toyed.yaml", "--device", "cpu", "--parts", "toy", "--repeats", "1")
    turns = json.loads((toy[0] / "results/bench/toyed.json").read_text())["toy"]["turns"]
    assert list(turns) == ["generator"] and turns["generator"]["seconds"] > 0
