"""What others' tools read of this repository: list of experiments, catalogue, CI, container, citation."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import vpae
from test_environment import CONSTRAINTS, PIP, PROJECT
from vpae.experiment import load, shipped

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
ZENODO = json.loads((ROOT / ".zenodo.json").read_text())


def links(page: Path) -> list[Path]:
    """The files that a page links to."""
    return [page.parent / target for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]


@pytest.mark.parametrize("page", ["configs/README.md", "containers/README.md"])
def test_every_link_of_a_folders_page_leads_to_a_file(page: str) -> None:
    assert links(ROOT / page) and all(target.exists() for target in links(ROOT / page))


def test_the_list_of_experiments_has_each_of_them_once_with_what_it_extends() -> None:
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\) \| (.*?) \| (.+) \|$", (ROOT / "configs/README.md").read_text(), re.M)
    there = {
        path.stem: [base.name for base in load(path, environment=False).bases] for path in shipped(ROOT / "configs")
    }
    assert {name: re.findall(r"`(\S+?)`", bases) for name, _, bases, _ in rows} == there
    assert len(rows) == len(there) and all(file == f"{name}.yaml" for name, file, *_ in rows)


def test_videos_in_data_stay_out_of_git_and_what_versions_them_does_not(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    ours = [
        "data/my-videos/a.mp4",
        "data/my-videos/deep/a.txt",
        "data/clips.csv",
        "data/teachers/mine/model_index.json",
    ]
    gits = ["data/README.md", "data/my-videos.dvc", "data/sets/x.dvc", "data/.gitignore", "data/teachers/.gitignore"]
    found = subprocess.run(["git", "check-ignore", *ours, *gits], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.split() == ours


# The catalogue of workflows


def test_the_catalogue_is_told_what_is_so() -> None:
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    ways = usage["software-stack-deployment"]
    assert ways.keys() == {"conda", "apptainer", "apptainer+conda", "report"}
    rules = [path.read_text() for path in (ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk"))]
    assert ways["apptainer"] == any(re.search(r"^ *container:", text, re.MULTILINE) for text in rules)
    assert ways["conda"] == (not any(re.match("-[ce] ", line) for line in PIP)), (
        "relative paths, which it would not find"
    )
    assert not ways["apptainer+conda"] and not ways["report"]
    name = re.fullmatch(r"--config experiment=(\S+)", usage["mandatory-flags"]["flags"])[1]
    assert (ROOT / f"configs/{name}.yaml").is_file()
    for path in re.findall(r"(?:profiles|configs)/[\w./]*\w|environment\.yml", usage["mandatory-flags"]["desc"]):
        assert (ROOT / path).exists(), path


# Continuous integration


def test_ci_runs_the_repositorys_own_script_with_pinned_actions_and_no_rights() -> None:
    tree = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert tree["permissions"] == {"contents": "read"}
    assert {"push", "pull_request"} <= tree[True].keys()  # YAML's `on`
    [job] = tree["jobs"].values()
    assert job["timeout-minutes"] <= 360 and "latest" not in job["runs-on"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == [".ci/run"] and os.access(ROOT / ".ci/run", os.X_OK)
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+\.\d+\.\d+|[0-9a-f]{40})", action) for action in used)
    [python] = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert f">={python}" == PROJECT["requires-python"]


# Citation


def test_the_citation_has_what_its_format_asks_for() -> None:
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    for work in (CITATION, CITATION["preferred-citation"]):
        assert all(person.keys() & {"name", "family-names"} for person in work["authors"])
    assert {"type", "title", "authors"} <= CITATION["preferred-citation"].keys()
    known = {"doi", "url", "swh", "other"}
    assert all(one["type"] in known and one["value"] for one in CITATION["preferred-citation"]["identifiers"])


def test_zenodo_is_told_what_the_citation_says() -> None:
    required = {"title", "upload_type", "description", "creators", "access_right", "license"}
    assert required <= ZENODO.keys() and (ZENODO["upload_type"], ZENODO["access_right"]) == ("software", "open")
    for ours, theirs in {
        "abstract": "description",
        **{k: k for k in ("title", "version", "license", "keywords")},
    }.items():
        assert ZENODO[theirs] == CITATION[ours], theirs
    assert ZENODO["version"] == vpae.__version__ and ZENODO["license"] == PROJECT["license"]
    assert ZENODO["creators"] == [{"name": person["name"]} for person in CITATION["authors"]]
    [paper] = ZENODO["related_identifiers"]
    assert paper["identifier"] == CITATION["preferred-citation"]["identifiers"][0]["value"]
    assert paper.keys() >= {"identifier", "relation"} and paper["scheme"] == "arxiv"


# The container's recipe

RECIPE = (ROOT / "containers/vpae.def").read_text()
KNOWN = {"arguments", "environment", "files", "help", "labels", "post", "runscript", "setup", "startscript", "test"}


def sections(recipe: str) -> dict[str, str]:
    """Header ("") and sections of an Apptainer definition file."""
    found = re.split(r"^%(\w+)[^\n]*\n", recipe, flags=re.MULTILINE)
    names = ["", *found[1::2]]
    assert len(names) == len(set(names)) and set(names) - {""} <= KNOWN, names
    return dict(zip(names, found[::2], strict=True))


PARTS = sections(RECIPE)
ARGUMENTS = dict(line.strip().split("=", 1) for line in PARTS["arguments"].splitlines() if line.strip())


def filled(text: str, **arguments: str) -> str:
    """The text as Apptainer fills it in."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: {**ARGUMENTS, **arguments}[match[1]], text)


def test_the_recipe_names_what_there_is() -> None:
    header = dict(line.split(": ", 1) for line in PARTS[""].splitlines() if ": " in line and not line.startswith("#"))
    assert header["Bootstrap"] == "docker" and re.fullmatch(r"python:3\.11\.\d+-slim-\w+", header["From"]), "pinned"
    assert set(re.findall(r"{{\s*(\w+)\s*}}", RECIPE)) == set(ARGUMENTS)
    for line in filter(str.strip, PARTS["files"].splitlines()):
        source, target = line.split()
        assert (ROOT / source).exists() and target.startswith("/opt/vpae"), line
    labels = dict(line.split() for line in PARTS["labels"].splitlines() if line.strip())
    assert labels == {"Version": vpae.__version__, "Licence": PROJECT["license"]}


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_each_of_the_recipes_scripts_is_one(name: str) -> None:
    done = subprocess.run(["sh", "-n"], input=filled(PARTS[name]), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def post(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs the recipe's installation with stand-ins that note how they were called; exit code, and the calls."""
    place, programs, calls = tmp_path / "vpae", tmp_path / "bin", tmp_path / "calls"
    place.mkdir()
    programs.mkdir()
    for program in ("apt-get", "git", "pip", "rm"):
        (programs / program).write_text(f'#!/bin/sh\necho "{program} $*" >> {calls}\n')
        (programs / program).chmod(0o755)
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, place)

    def run(device: str, **arguments: str) -> tuple[int, str]:
        script = filled(PARTS["post"], device=device, **arguments).replace("/opt/vpae", str(place))
        done = subprocess.run(["sh"], input=script, text=True, check=False, env={"PATH": f"{programs}:/usr/bin:/bin"})
        return done.returncode, calls.read_text()

    return run


@pytest.mark.parametrize("arguments", [{"device": "cuda"}, {"device": "cpu", "index": "https://index.invalid/cpu"}])
def test_the_recipe_installs_torch_for_the_device_and_then_the_tested_versions(
    arguments: dict[str, str], post: Callable[..., tuple[int, str]]
) -> None:
    code, calls = post(**arguments)
    assert code == 0 and "git reset --hard" in calls
    torch, project = [line for line in calls.splitlines() if line.startswith("pip ")]
    assert torch.endswith(" torch")
    assert ("--extra-index-url https://index.invalid/cpu" in torch) == (arguments["device"] == "cpu")
    assert all(" -c constraints.txt " in line for line in (torch, project)) and "torch" in CONSTRAINTS
    [extras] = re.findall(r"-e \.\[(.+)\]$", project)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("device", ["rocm", "cpu"])  # builds for CPUs are in an index of their own
def test_the_recipe_refuses_what_it_cannot_install(device: str, post: Callable[..., tuple[int, str]]) -> None:
    code, calls = post(device)
    assert code == 1 and "pip" not in calls


def test_what_the_recipe_runs_are_commands_of_the_project() -> None:
    for name in ("runscript", "test"):
        for program in re.findall(r"^ *(?:exec )?(\w+)", PARTS[name], re.M):
            assert program in (*PROJECT["scripts"], "python"), program
