"""From a YAML file to an experiment.

Keys come, in rising order of precedence, from the defaults, the experiments named by `extends:` (one, or several in
order), the file itself, environment variables (`VPAE_SAMPLES__COUNT=64`) and `--set samples.count=64`.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import InitSettingsSource, SettingsError

from vbench_i2v.files import read_yaml
from vpae.config import Experiment
from vpae.config.experiment import DEFAULT_METHODS, chained


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the remedy."""


@dataclass(frozen=True, eq=False)
class Source:
    """A loaded experiment: its settings, its name (the file's stem), its file and what it extends."""

    name: str
    path: Path
    settings: Experiment
    bases: tuple["Source", ...] = ()

    def ancestors(self) -> Iterator["Source"]:
        """All that it extends, the furthest last."""
        for base in self.bases:
            yield base
            yield from base.ancestors()


def load(path: Path | str, overrides: Sequence[str] = (), environment: bool = True) -> Source:
    """Load and validate an experiment.

    Args:
        path: a YAML file; or NAME@SEED.yaml, which need not be there: NAME.yaml, and its bases, with that seed. With
            NAME's own seed it is NAME.
        overrides: `section.key=value` pairs; values are YAML.
        environment: whether VPAE_... variables count.

    Raises:
        ConfigError: naming the file, the key and the remedy.
    """
    path = Path(path)
    name, at, seed = path.stem.rpartition("@")
    another_seed = f"@{int(seed)}" if at and seed.isdecimal() else ""
    file = path.with_stem(name) if another_seed else path
    if another_seed and path.is_file():
        raise ConfigError(f"{path}: NAME@SEED stands for NAME with another seed and needs no file; rename this one")
    if not re.fullmatch(r"\w[\w.+-]*", file.stem):
        better = re.sub(r"[^a-zA-Z0-9_.+-]+", "-", file.stem).strip("-.+")
        raise ConfigError(
            f"{path}: an experiment's name becomes part of folders and commands, so it has only letters, digits, and "
            f". _ + -; rename the file, for instance to {better or 'mine'}.yaml"
        )
    layers = _read_chain(file, ())
    tree: dict = {"methods": dict(DEFAULT_METHODS)}
    for of, layer in layers.items():
        methods = layer.get("methods")
        if isinstance(methods, list) or (methods is not None and not layer.get("extends")):
            tree["methods"] = {}  # its own: nothing of a base's is left
        if isinstance(methods, list):
            try:
                layer = {**layer, "methods": chained(methods)}
            except ValueError as error:
                raise ConfigError(f"{of}: {error}") from error
        _merge(tree, layer)
    if another_seed:
        if int(seed) == tree.get("seed", Experiment.model_fields["seed"].default):
            return load(file, overrides, environment)
        path, tree["seed"] = file.with_stem(f"{name}{another_seed}"), int(seed)
    set_tree: dict = {}
    for override in overrides:
        _merge(set_tree, _parse_override(override))
    if environment:
        _refuse_unknown_variables()
    # A base stands by itself: overrides and environment are this experiment's, not its base's.
    bases = tuple(
        load(base.with_stem(f"{base.stem}{another_seed}"), environment=False) for base in _bases(file, layers[file])
    )
    return Source(path.stem, path, _validate(path, tree, set_tree, environment), bases)


def _validate(path: Path, tree: dict, overrides: dict, environment: bool) -> Experiment:
    class Loaded(Experiment):
        @classmethod
        def settings_customise_sources(cls, settings_cls, init_settings, env_settings, **_):
            file = InitSettingsSource(settings_cls, init_kwargs=tree)
            return (init_settings, env_settings, file) if environment else (init_settings, file)

    try:
        loaded = Loaded(**overrides)
    except ValidationError as error:
        lines = (f"{_origin(path, overrides, problem['loc'])}: {_explain(problem)}" for problem in error.errors())
        raise ConfigError("\n".join(lines)) from error
    except SettingsError as error:
        raise ConfigError(f"environment: {error}; write JSON, or VPAE_SECTION__KEY=value") from error
    return Experiment.model_construct(**{key: getattr(loaded, key) for key in Experiment.model_fields})


def _bases(path: Path, tree: dict) -> list[Path]:
    names = tree.get("extends", "")
    names = [name for name in [names] if name] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"{path}: extends: {tree['extends']!r} is neither a name nor a list of names; write names of experiments "
            "beside this file (a number in quotes), or take the key away"
        )
    return [path.parent / f"{name}.yaml" for name in names]


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[Path, dict]:
    """The file's tree preceded by those it extends, each file once."""
    if path in seen:
        raise ConfigError(f"{path}: extends itself by way of {' -> '.join(p.stem for p in seen)}; break the circle")
    if not path.is_file():
        near = ", ".join(sorted(p.stem for p in path.parent.glob("[!.]*.yaml")))
        near = near or "none; change to the project's root, where configs/ is"
        wanted_by = f"{seen[-1]}: extends: {path.stem}: " if seen else ""
        meant = Path("configs", path.name.removesuffix(".yaml").removesuffix(".yaml") + ".yaml")
        if not seen and meant != path and meant.is_file():
            raise ConfigError(f"{path} does not exist; did you mean {meant}? If a name is wanted: {meant.stem}")
        raise ConfigError(f"{wanted_by}{path} does not exist; experiments in {path.parent}: {near}")
    try:
        tree = _plain(read_yaml(path.read_text(encoding="utf-8")) or {})
    except Exception as error:  # a date that is none is a ValueError, deep nesting a RecursionError
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the file must hold sections (key: value), not a {type(tree).__name__}")
    # Pydantic takes Seed for seed, if no file has the right one; it would be ignored if one has.
    if unknown := [key for key in tree if key not in Experiment.model_fields]:
        lines = (_explain({"type": "extra_forbidden", "loc": (key,), "msg": "", "input": {}}) for key in unknown)
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines))
    found: dict[Path, dict] = {}
    for base in _bases(path, tree):
        found |= _read_chain(base, (*seen, path))
    return found | {path: tree}


def _plain(tree: Any) -> Any:
    """A copy whose keys are all text; YAML also has numbers and dates there."""
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    return tree


def _merge(target: dict, layer: dict) -> None:
    for key, value in layer.items():
        # The rows of `samples` are merged like sections: an overlay adds or changes one row.
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _parse_override(text: str) -> dict:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: write section.key=value, for instance samples.count=64")
    if key == "extends":
        raise ConfigError(f"--set {text}: extends can only stand in the file")
    try:
        tree: Any = _plain(yaml.safe_load(value))
    except Exception as error:
        raise ConfigError(f"--set {text}: the value is not YAML: {error}") from error
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _origin(path: Path, overrides: dict, location: Sequence) -> str:
    """Where a wrong value comes from: --set, the environment, or the file."""
    found: Any = overrides
    for part in location:
        found = found.get(part) if isinstance(found, dict) else None
    if found not in (None, {}):
        return f"{path} with --set"
    wanted = "__".join(["VPAE", *(str(part) for part in location)]).upper().replace("VPAE__", "VPAE_", 1)
    names = [name for name in os.environ if location and f"{name.upper()}__".startswith(f"{wanted}__")]
    return f"{path} with {' and '.join(names)} from the environment" if names else str(path)


def _explain(problem: dict) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "(the experiment)"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]).lower(), _keys_at(problem["loc"][:-1]), n=1)
        message = f"unknown key; did you mean {near[0]}?" if near else "unknown key; see `vpae config schema`"
    elif problem["type"] == "missing":
        message = "is required; add it, or `extends:` an experiment that has it"
    elif problem["input"] is None:
        message = "has no value; give it one, or take the key away"
    else:
        message += f" (got {problem['input']!r})" if not isinstance(problem["input"], dict) else ""
    return f"{key}: {message}"


FREE: list[str] = []  # what the keys of a mapping such as samples.rows may be: anything


def _keys_at(location: Sequence) -> list[str]:
    model: Any = Experiment
    free = False  # inside a mapping such as samples.rows, whose keys are names
    for part in location:
        if free:
            free = False
            continue
        if (found := model.model_fields.get(part)) is None:
            return []
        kinds = [found.annotation, *get_args(found.annotation)]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        free = get_origin(found.annotation) is dict
        if model is None:
            return FREE if free else []
    return FREE if free else list(model.model_fields)


def _refuse_unknown_variables() -> None:
    """A misspelt VPAE_ variable must not be ignored."""
    for name in os.environ:
        if not name.upper().startswith("VPAE_"):
            continue
        parts = name[len("VPAE_") :].lower().split("__")
        if parts == ["extends"]:
            raise ConfigError(f"environment: {name}: extends can only stand in the file")
        for depth, part in enumerate(parts):
            known = _keys_at(parts[:depth])
            if known is FREE:
                break
            if part not in known:
                near = difflib.get_close_matches(part, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"environment: {name}: unknown key {'.'.join(parts)}{hint}")


def schema() -> dict:
    """The JSON schema of an experiment's file (nothing required: a file may be an overlay)."""
    generated = Experiment.model_json_schema()
    for section in (generated, *generated["$defs"].values()):
        section.pop("required", None)
    return generated


def shipped(folder: Path = Path("configs")) -> Iterator[Path]:
    """Every experiment in a folder."""
    yield from sorted(folder.glob("*.yaml"))
