"""What the documents name must exist: commands, options, files, settings, functions."""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from vpae.cli import _parser
from vpae.config import Experiment
from vpae.distill import METHODS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def shell_lines() -> list[tuple[str, str]]:
    """Every `vpae ...` line of the documents' shell blocks, continuation lines joined."""
    found = []
    for name in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(name, line.split("#")[0].strip()) for line in lines if line.startswith("vpae ")]
    return found


@pytest.mark.parametrize(("document", "line"), shell_lines())
def test_every_command_is_one_that_vpae_understands(document, line):
    _parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"^make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE):
        assert target in targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_is_named_exists(document):
    known = {name for file in (ROOT / "tests").rglob("test_*.py") for name in (file.stem, *names_in(file))}
    named = set(re.findall(r"\btest_\w+", (ROOT / document).read_text()))
    assert named <= known, named - known


def names_in(file):
    return re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)


def test_each_kind_of_input_names_the_test_that_holds_it():
    rows = re.findall(r"^\| ([A-Z]) \|.*\| (.*) \|$", (ROOT / "docs/inputs.md").read_text(), re.MULTILINE)
    assert [kind for kind, _ in rows] == list("ABCDEFGHIJKLMNOP")
    assert all(re.search(r"`test_\w+`", tests) for _, tests in rows)


def test_the_method_map_names_functions_and_settings_that_exist():
    for line in (ROOT / "docs/method.md").read_text().splitlines():
        if not line.startswith("|"):
            continue
        for name in re.findall(r"`((?:flow|models|distill|training|sampling)\.[\w.]+)`", line):
            pkgutil.resolve_name(f"vpae.{name}")
        for name in re.findall(rf"`((?:{'|'.join(METHODS)}|teacher|samples)\.[\w.]+)`", line):
            model = Experiment
            for part in name.split("."):
                assert part in model.model_fields, name
                model = model.model_fields[part].annotation
