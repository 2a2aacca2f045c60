"""The three descriptions of the environment agree: pyproject.toml, constraints.txt and environment.yml."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import vpae

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
PIP = next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))


def pins(lines: list[str]) -> dict[str, Version]:
    """Name -> version; each line has to be exactly `name==version`, with or without a marker."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        [specifier] = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"{line} is no exact pin"
        assert requirement.url is None and not requirement.extras, f"{line} is more than a pin"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = Version(specifier.version)
    return found


CONSTRAINTS = pins([line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")])


@pytest.mark.parametrize("requirement", RUNTIME + EXTRAS, ids=str)
def test_every_direct_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    version = CONSTRAINTS.get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert version in requirement.specifier


def test_no_pin_names_a_local_build() -> None:
    assert [name for name, version in CONSTRAINTS.items() if version.local] == []


def test_environment_pins_the_runtime_dependencies_as_the_constraints_do() -> None:
    environment = pins([line for line in PIP if not line.startswith("-")])
    assert environment == {name: CONSTRAINTS[name] for name in (canonicalize_name(r.name) for r in RUNTIME)}


def test_environment_repeats_the_markers() -> None:
    markers = {canonicalize_name(r.name): r.marker for r in map(Requirement, PIP[1:-1])}
    assert markers == {canonicalize_name(r.name): r.marker for r in RUNTIME}


def test_environment_installs_this_package_under_the_constraints() -> None:
    assert PIP[0] == "-c constraints.txt"
    [extras] = re.findall(r"^-e \.\[(.+)\]$", PIP[-1])
    # Not everybody may use what `vbench` installs, so nobody gets it unasked.
    assert set(extras.split(",")) == set(PROJECT["optional-dependencies"]) - {"vbench"}


def test_environment_takes_a_python_that_the_project_allows() -> None:
    [python] = [entry.removeprefix("python=") for entry in CONDA if entry.startswith("python=")]
    assert f"{python}.0" in SpecifierSet(PROJECT["requires-python"])
    assert "pip" in CONDA, "conda warns about a pip section without pip"


def imported(tree: ast.AST) -> Iterator[str]:
    """The top-level names of all absolute imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_every_import_is_declared() -> None:
    """What another package happens to bring may go away with it; optional packages that are not installed may lack."""
    declared = {canonicalize_name(r.name) for r in RUNTIME} | {"vpae"}
    owners = packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "src").rglob("*.py")
        for name in imported(ast.parse(path.read_text()))
        if name not in sys.stdlib_module_names and name in owners
        if not declared & {canonicalize_name(owner) for owner in owners[name]}
    }
    assert undeclared == set()


def test_citation_has_the_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == vpae.__version__


def test_changelog_has_the_version() -> None:
    assert f"\n## [{vpae.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
