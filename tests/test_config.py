"""Settings: what is refused and how it is said, what overrides what, and which stages an overlay shares."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from conftest import STAGES
from vpae.cli import main
from vpae.config import Experiment, Geometry, Teacher, TinyVae
from vpae.distill import METHODS
from vpae.experiment import ConfigError, Source, load, shipped
from vpae.graph import fingerprint, owner, stage_folder, stage_settings, that_matter
from vpae.planning.presence import missing

ROOT = Path(__file__).parents[1]
SHIPPED = list(shipped(ROOT / "configs"))
BASE = {
    "clips": {"source": "world", "train": 16, "held_out": 8},
    "teacher": {"source": "train"},
    "samples": {"count": 8, "decode": 4},
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("VPAE_"):
            monkeypatch.delenv(name)


def test_results_from_before_a_key_stay_what_they_are_while_it_is_off() -> None:
    newer = (
        ("teacher", "loras"),
        ("equilibrium", "logits_at_once"),
        ("equilibrium", "few_step"),
        ("equilibrium", "few_step_shift"),
        ("equilibrium", "relativistic"),
        ("samples", "decoder"),
    )
    for stage, key in newer:
        source = load(ROOT / "configs/micro.yaml", environment=False)
        assert key not in stage_settings(source.settings, stage)[stage]
    for stage in ("teacher", "priming"):  # of the teacher, four networks are trained
        assert '"stop"' in (text := json.dumps(stage_settings(source.settings, stage))) and '"videos"' not in text
    changed = load(
        ROOT / "configs/micro.yaml", ["priming.training.monitor={every: 1, videos: 2}"], environment=False
    ).settings
    assert stage_settings(changed, "priming")["priming"]["training"]["monitor"]["videos"] == 2
    assert fingerprint(changed, "priming") != fingerprint(source.settings, "priming")
    changed = load(ROOT / "configs/micro.yaml", ["equilibrium.logits_at_once=true"], environment=False)
    assert stage_settings(changed.settings, "equilibrium")["equilibrium"]["logits_at_once"] is True
    assert fingerprint(changed.settings, "equilibrium") != fingerprint(source.settings, "equilibrium")


@pytest.mark.parametrize("value", [True, None])
def test_a_value_in_place_of_a_section_is_refused_by_name(value: object, base: Path) -> None:
    with pytest.raises(ConfigError, match="samples: "):
        load(overlay(base, {"samples": value}))


def test_a_key_that_stands_twice_is_refused(base: Path) -> None:
    twice = write(base.parent, "twice", yaml.safe_dump(BASE) + "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml: not valid YAML: the key seed stands twice, from line 1 on"):
        load(twice)


def test_anchors_and_merged_keys_are_no_keys_that_stand_twice(base: Path) -> None:
    text = """
priming: {generator: &g {learning_rate: 1.0e-4, warmup_steps: 3}}
equilibrium: {score: {fake: &f {<<: *g, learning_rate: 1.0e-3}}}
dmd2: {fake: {<<: *f, warmup_steps: 2}}
"""
    settings = load(write(base.parent, "merged", yaml.safe_dump(BASE) + text)).settings
    assert (settings.dmd2.fake.learning_rate, settings.dmd2.fake.warmup_steps) == (1e-3, 2)


def test_taking_away_one_of_the_default_rows_leaves_the_others(base: Path) -> None:
    every = load(base).settings.samples.rows
    fewer = load(base, ["samples.rows.teacher-1nfe=null"]).settings.samples.rows
    assert fewer == {name: row for name, row in every.items() if name != "teacher-1nfe"}
    with pytest.raises(ConfigError, match=r"samples\.rows: none is left"):
        load(base, [f"samples.rows.{name}=null" for name in every])


def test_a_file_named_like_another_seed_is_refused(base: Path) -> None:
    write(base.parent, "base@1", "extends: base\npriming: {guidance_scale: 9.5}\n")
    with pytest.raises(ConfigError, match=r"base@1\.yaml: NAME@SEED stands for NAME with another seed"):
        load(base.parent / "base@1.yaml")


@pytest.mark.parametrize(("taps", "words"), [([-1], "counted from 0"), ([2, 2], "each is named once")])
def test_taps_that_no_network_has_are_refused(taps: list, words: str, base: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load(overlay(base, {"equilibrium": {"head": {"taps": taps}}}))


def test_taps_beyond_the_teacher_s_blocks_are_refused_before_any_job(base: Path) -> None:
    micro = ROOT / "configs/micro.yaml"
    blocks = load(micro, environment=False).settings.teacher.transformer.layers
    assert missing(load(micro, [f"equilibrium.head.taps=[{blocks - 1}]"], environment=False)) == []
    (said,) = missing(load(micro, [f"equilibrium.head.taps=[{blocks}]"], environment=False))
    assert f"equilibrium.head.taps = [{blocks}]: the teacher has {blocks} blocks" in said


def test_what_only_saves_or_watches_a_training_otherwise_is_no_other_result(base: Path) -> None:
    watching = ("checkpoint_every=7", "stop_after_skipped=9", "log_every=3", "monitor.every=2", "monitor.videos=1")
    plain, saved = (
        stage_settings(load(base, keys).settings, "priming")
        for keys in ([], [f"priming.training.{key}" for key in watching])
    )
    assert plain != saved and that_matter(plain) == that_matter(saved)
    other = stage_settings(load(base, ["priming.training.steps=7"]).settings, "priming")
    assert that_matter(other) != that_matter(plain)


@pytest.mark.parametrize("run", ["vae.training", "vae.decoder_training", "encoders.training", "transformer.training"])
def test_what_only_saves_a_teacher_s_training_otherwise_is_no_other_teacher(run: str, base: Path) -> None:
    plain, saved, other = (
        stage_settings(load(base, ["teacher.source=train", *keys]).settings, "teacher")
        for keys in (
            [],
            [f"teacher.{run}.checkpoint_every=7", f"teacher.{run}.log_every=7"],
            [f"teacher.{run}.steps=7"],
        )
    )
    assert plain != saved and that_matter(plain) == that_matter(saved) != that_matter(other)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, "base", BASE)


def write(folder: Path, name: str, tree: object) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def overlay(base: Path, tree: dict, name: str = "overlay") -> Path:
    return write(base.parent, name, {"extends": base.stem, **tree})


def nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def at(settings: BaseModel, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def refused(path: Path, *words: str, overrides: tuple[str, ...] = ()) -> None:
    """Loading fails with a message that holds all the words, the file's name among them."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    for word in (path.name, *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def sections(model: type[BaseModel] = Experiment, key: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the tree with its dotted key."""
    yield key, model
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind, f"{key}.{name}".lstrip("."))


# What a field is


@pytest.mark.parametrize(("key", "model"), sections(), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_every_field_of_every_section_has_a_description(key: str, model: type[BaseModel]) -> None:
    assert model.__doc__
    assert [name for name, field in model.model_fields.items() if not (field.description or "").strip()] == []


def test_the_walk_sees_the_whole_tree() -> None:
    keys = [key for key, _ in sections()]
    assert {"clips.world", "teacher.transformer.times", "equilibrium.head", "samples.rows"} <= set(keys)


# Off by default, and a method cannot have it without what it starts from.
STUDENT_LORA = tuple(f"{name}.student_lora" for name in METHODS)


SECTIONS = [(key, model) for key, model in sections() if key not in ("", "samples.rows", *STUDENT_LORA)]


@pytest.mark.parametrize(("key", "model"), SECTIONS, ids=[key for key, _ in SECTIONS])
def test_a_part_of_a_section_keeps_the_other_defaults_of_that_section(
    key: str, model: type[BaseModel], base: Path
) -> None:
    """Setting `fake.weight_decay` must not bring the learning rate back to that of any optimiser."""
    before = at(load(base).settings, key) or model()  # a section that is off by default has its own defaults
    for name, value in before:
        if isinstance(value, float | int | str) and not isinstance(value, bool):
            assert at(load(overlay(base, nested(f"{key}.{name}", value))).settings, key) == before


def test_models_built_in_python_keep_their_sections_defaults_too() -> None:
    assert METHODS["priming"].Settings(fake={"weight_decay": 0.1}).fake.learning_rate == 1e-5
    assert TinyVae(training={"steps": 3}).training.batch_size == TinyVae().training.batch_size


# What is refused


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("gemoetry", "did you mean geometry?"),
        ("priming.trainign", "did you mean training?"),
        ("priming.training.step", "did you mean steps?"),
        ("equilibrium.head.query", "did you mean queries?"),
        ("teacher.transformer.times.lower", "did you mean low?"),
        ("samples.rows.vpae-1nfe.model_name", "did you mean model?"),
        ("zzz", "vpae config schema"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, hint: str, base: Path) -> None:
    refused(overlay(base, nested(key, 1)), f"{key}: unknown key", hint)


@pytest.mark.parametrize("key", ["Seed", "EQUILIBRIUM", "Methods"])
def test_a_key_in_other_letters_is_refused_whether_a_base_has_it_or_not(key: str, base: Path) -> None:
    refused(overlay(base, {key: 1}), f"{key}: unknown key; did you mean {key.lower()}?")
    with pytest.raises(ConfigError, match=rf"alone\.yaml: {key}: unknown key; did you mean {key.lower()}\?"):
        load(write(base.parent, "alone", {key: 1}))


def test_an_experiment_may_say_that_it_extends_none(base: Path) -> None:
    """As `vpae config show` writes it."""
    assert load(write(base.parent, "mine", {**BASE, "extends": ""})).bases == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"extends": 1}, "extends: 1 is neither a name nor a list of names"),
        ({"extends": None}, "extends: None is neither"),
        ({"extends": [True]}, "extends: [True] is neither"),
        ({"methods": [{"priming": "teacher"}]}, "methods: {'priming': 'teacher'} is no name; a list holds names"),
        ({"methods": [["priming"]]}, "methods: ['priming'] is no name"),
        ({"equilibrium": None}, "equilibrium: has no value; give it one, or take the key away"),
        (
            {"cluster": {"priming": {"minutes": 5}}},
            "cluster.priming: minutes = 5, and warning_seconds = 300",
        ),
        ({"priming": {"training": None}}, "priming.training: has no value"),
        (
            {"samples": {"rows": {"r" * 201: {"model": "teacher", "steps": 1}}}},
            "has 201 letters; a folder's name may have 200",
        ),
        (
            {"samples": {"rows": {"Real": {"model": "teacher", "steps": 1}}}},
            "row Real: the clips themselves have this name",
        ),
    ],
)
def test_what_has_another_form_is_refused_with_its_key_and_the_remedy(wrong: dict, said: str, base: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load(write(base.parent, "mine", {"extends": base.stem, **wrong}))
    assert "mine.yaml" in str(caught.value)


def test_an_unknown_key_in_the_base_is_laid_to_the_base(base: Path) -> None:
    write(base.parent, "wrong", {**BASE, "sed": 1})
    with pytest.raises(ConfigError, match=r"wrong\.yaml: sed: unknown key; did you mean seed\?") as caught:
        load(write(base.parent, "overlay", {"extends": "wrong"}))
    assert "overlay.yaml" not in str(caught.value)


@pytest.mark.parametrize(
    ("geometry", "remedy"),
    [
        ({"frames": 16}, "the nearest are 13 and 17"),
        ({"frames": 4}, "the nearest are 5 and 9"),
        ({"frames": 1}, "the fewest are 5"),
        ({"height": 72}, "the nearest are 64 and 80"),
        ({"width": 840}, "the nearest are 832 and 848"),
        ({"frames": 0}, "greater than 0"),
        ({"frames": 5.5}, "valid integer"),
        ({"height": -16}, "greater than 0"),
        ({"fps": 0}, "greater than 0"),
        ({"fps": "fast"}, "valid number"),
    ],
    ids=str,
)
def test_impossible_geometry_is_refused(geometry: dict, remedy: str, base: Path) -> None:
    refused(overlay(base, {"geometry": geometry}), "geometry", next(iter(geometry)), remedy)


@given(frames=st.integers(1, 400), height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_geometry_is_accepted_exactly_where_the_latents_are_whole(frames: int, height: int, width: int) -> None:
    possible = frames > 1 and (frames - 1) % 4 == 0 and height % 16 == 0 and width % 16 == 0
    try:
        shape = Geometry(frames=frames, height=height, width=width).latent_shape
    except ValidationError:
        assert not possible
    else:
        assert possible
        assert shape == ((frames + 3) / 4, height / 8, width / 8)


@pytest.mark.parametrize(
    "section", ["priming.generator_times", "priming.score_times", "equilibrium.csds_times", "teacher.transformer.times"]
)
@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({"low": -0.1}, ("low", "greater than or equal to 0")),
        ({"high": 1.1}, ("high", "less than or equal to 1")),
        ({"last_high": 2}, ("last_high", "less than or equal to 1")),
        ({"low": 0.9, "high": 0.1}, ("interval [0.9, 0.1] is empty",)),
        ({"last_low": 1.0, "last_high": 0.5}, ("interval [1.0, 0.5] is empty",)),
        ({"t_space": "noise"}, ("t_space", "pre_shift")),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_intervals_are_refused(section: str, times: dict, words: tuple[str, ...], base: Path) -> None:
    refused(overlay(base, nested(section, times)), section, *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("equilibrium.head", {"dim": 30, "heads": 4}, "dim = 30 is not a multiple of heads = 4"),
        ("teacher.vae.crop", 30, "multiple of 8"),
        ("teacher.vae.crop_frames", 6, "crop_frames = 6 is not 4k + 1"),
        ("teacher.encoders.text_dim", 18, "multiple of 4"),
        ("teacher.encoders.image_dim", 18, "multiple of 4"),
        ("teacher.transformer.head_dim", 13, "multiple of 2"),
    ],
)
def test_what_does_not_divide_is_refused(key: str, value: object, words: str, base: Path) -> None:
    refused(overlay(base, nested(key, value)), key.rsplit(".", 1)[0], words)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"samples": {"count": 9}}, "samples.count = 9 is more than clips.held_out = 8; keep more clips"),
        ({"samples": {"decode": 9}}, "decode = 9 is more than count = 8"),
        ({"priming": {"training": {"batch_size": 17}}}, "priming.training.batch_size = 17 is more than clips.train"),
        ({"equilibrium": {"training": {"batch_size": 17}}}, "equilibrium.training.batch_size = 17 is more than"),
        ({"clips": {"source": "folder"}}, "source = folder needs path"),
        ({"clips": {"source": "table"}}, "source = table needs path"),
        ({"clips": {"world": {"hidden_direction": 1.5}}}, "clips.world.hidden_direction"),
        ({"clips": {"world": {"grows_share": 0.6, "spins_share": 0.5}}}, "clips.world"),
        ({"clips": None}, "clips"),
        ({"teacher": {"source": "folder"}}, "source = folder needs path"),
        ({"teacher": {"source": "folder", "path": "a", "start": "b"}}, "start works with source = train only"),
        ({"teacher": {"source": "train", "start": "b", "further": ["text_encoder"]}}, "further lacks transformer"),
        ({"teacher": {"transformer": {"training": {"mixed_precision": "bf16"}}}}, "the same mixed_precision"),
        ({"teacher": {"source": "hub", "path": "a/b"}}, "40 hex digits"),
        ({"teacher": {"source": "hub", "path": "a/b", "revision": "main"}}, "40 hex digits"),
        ({"latents": {"dtype": "float16"}}, "latents.dtype"),
        ({"priming": {"training": {"ema_decay": 1}}}, "priming.training.ema_decay"),
        ({"priming": {"training": {"steps": 0}}}, "priming.training.steps"),
        ({"priming": {"training": {"steps": 9, "schedule_steps": 8}}}, "rate would rise again"),
        ({"equilibrium": {"discriminator_warmup_steps": 9, "discriminator": {"warmup_steps": 5}}}, "one of them to 0"),
        ({"equilibrium": {"r1": {"probes": []}}}, "weigh nothing where probes is empty"),
        ({"equilibrium": {"r1": {"probes": ["plain", "plain"]}}}, "names one twice"),
        ({"teacher": {"transformer": {"training": {"compile": True}}}}, "transformer.training.compile has no effect"),
        ({"teacher": {"vae": {"whole_training": {"monitor": {"every": 1}}}}}, "vae.whole_training.monitor has"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_contradictions_are_refused_with_the_key(tree: dict, words: str, base: Path) -> None:
    refused(overlay(base, tree), words)


def test_a_hub_teacher_at_a_commit_is_accepted(base: Path) -> None:
    teacher = {"source": "hub", "path": "a/b", "revision": "0123456789abcdef0123456789abcdef01234567"}
    assert load(overlay(base, {"teacher": teacher})).settings.teacher == Teacher(**teacher)


@pytest.mark.parametrize(
    ("row", "name", "right"),
    [
        ({"model": "teacher", "steps": 50, "guidance_scale": 5.0}, "teacher-50nfe", "teacher-100nfe"),
        ({"model": "equilibrium", "steps": 2}, "vpae-1nfe", "vpae-2nfe"),
        ({"model": "equilibrium", "steps": 1}, "vpae-11nfe", "vpae-1nfe"),
    ],
)
def test_a_row_whose_name_lies_about_its_network_evaluations_is_refused(
    row: dict, name: str, right: str, base: Path
) -> None:
    refused(overlay(base, {"samples": {"rows": {name: row}}}), "samples", name, f"name it {right}")
    rows = load(overlay(base, {"samples": {"rows": {right: row}}})).settings.samples.rows
    assert right.endswith(f"-{rows[right].nfe}nfe")


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", ".hidden"])
def test_a_row_that_cannot_name_a_folder_is_refused(name: str, base: Path) -> None:
    refused(overlay(base, {"samples": {"rows": {name: {"model": "teacher", "steps": 1}}}}), "samples", "letters")


def test_required_sections_are_asked_for(tmp_path: Path) -> None:
    refused(write(tmp_path, "empty", ""), "clips: is required", "teacher: is required", "extends")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must hold sections"),
        ("just words", "must hold sections"),
        ("1: x", "1: unknown key"),
        ("teacher: {2020-01-01: 1, source: train}", "teacher.2020-01-01: unknown key"),
    ],
)
def test_a_file_that_is_no_tree_of_sections_is_refused(text: str, words: str, tmp_path: Path) -> None:
    refused(write(tmp_path, "odd", text), words)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "odd", "a: x")
    path.write_bytes(b"a: \xff")
    refused(path, "not valid YAML", "0xff")


def test_a_missing_base_is_refused_with_the_experiments_there_are(base: Path) -> None:
    refused(write(base.parent, "lost", {"extends": "bsae"}), "extends: bsae", "bsae.yaml does not exist", "base, lost")


def test_a_missing_file_is_refused_with_the_experiments_there_are(base: Path) -> None:
    refused(base.parent / "bsae.yaml", "does not exist", "base")


def test_experiments_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", {"extends": "b"})
    write(tmp_path, "b", {"extends": "c"})
    refused(write(tmp_path, "c", {"extends": "a"}), "c -> a -> b", "break the circle")
    refused(write(tmp_path, "self", {"extends": "self"}), "break the circle")


# What overrides what


def test_precedence_rises_from_defaults_over_base_file_and_environment_to_set(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"priming.training.{k}" for k in ("log_every", "accumulate", "checkpoint_every", "batch_size", "steps")]

    def tree(layer: int, value: int) -> dict:
        return {"priming": {"training": {key.rsplit(".", 1)[1]: value for key in keys[layer:]}}}

    write(base.parent, "base", {**BASE, **tree(1, 2)})
    file = overlay(base, tree(2, 3))
    for key in keys[3:]:
        monkeypatch.setenv("VPAE_" + key.upper().replace(".", "__"), "4")
    settings = load(file, [f"{keys[4]}=5"]).settings
    assert [at(settings, key) for key in keys] == [1, 2, 3, 4, 5]


def test_overlays_chain(base: Path) -> None:
    middle = overlay(base, {"seed": 1, "priming": {"training": {"steps": 7}}}, "middle")
    source = load(overlay(middle, {"seed": 2}, "top"))
    assert (source.settings.seed, source.settings.priming.training.steps) == (2, 7)
    assert [source.name, *(base.name for base in source.ancestors())] == ["top", "middle", "base"]


def test_a_name_with_a_seed_is_the_experiment_with_that_seed_and_shares_stages_with_its_base_s_of_that_seed(
    base: Path,
) -> None:
    overlay(base, {"equilibrium": {"csds_weight": 0.0}}, "other")
    source = load(base.with_name("other@7.yaml"))
    [above] = source.bases
    assert (source.name, source.settings.seed, above.name, above.settings.seed) == ("other@7", 7, "base@7", 7)
    changed = ("equilibrium", "samples", "evaluation", "report")
    assert owners(source) == {stage: "other@7" if stage in changed else "base@7" for stage in owners(source)}
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        load(base.with_name("absent@7.yaml"))


def test_an_overlay_changes_one_row_and_leaves_the_others(base: Path) -> None:
    rows = {"teacher-1nfe": {"model": "teacher", "steps": 1}, "long": {"model": "teacher", "steps": 8}}
    write(base.parent, "base", {**BASE, "samples": {**BASE["samples"], "rows": rows}})
    changed = load(overlay(base, {"samples": {"rows": {"long": {"steps": 9}}}})).settings.samples.rows
    assert {name: row.steps for name, row in changed.items()} == {"teacher-1nfe": 1, "long": 9}


def test_overrides_are_yaml(base: Path) -> None:
    overrides = ["equilibrium.head.taps=[1, 2]", "equilibrium.head.semantics=false", "latents.negative_prompt='a: b'"]
    settings = load(base, [*overrides, "priming.generator={learning_rate: 1e-3}"]).settings
    assert settings.equilibrium.head.taps == (1, 2) and settings.equilibrium.head.semantics is False
    assert settings.latents.negative_prompt == "a: b"
    assert settings.priming.generator.learning_rate == 1e-3


@pytest.mark.parametrize("text", ["seed", "=1", "seed=[1", "extends=base"])
def test_a_malformed_override_is_refused(text: str, base: Path) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(base, [text])


def test_a_wrong_override_is_laid_to_set_and_not_to_the_file(base: Path) -> None:
    refused(base, "with --set: geometry", "frames = 6", overrides=("geometry.frames=6",))
    refused(base, "with --set: geometri: unknown key", overrides=("geometri.frames=5",))


def test_a_wrong_variable_is_laid_to_the_environment_and_not_to_the_file(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPAE_GEOMETRY__FRAMES", "6")
    refused(base, "VPAE_GEOMETRY__FRAMES from the environment", "frames = 6")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("VPAE_SED", "did you mean seed?"),
        ("VPAE_PRIMING__TRAINING__STEP", "did you mean steps?"),
        ("vpae_prming__training__steps", "did you mean priming?"),
        ("VPAE_SEED__X", "unknown key seed.x"),
        ("VPAE_PRIMING_TRAINING_STEPS", "unknown key"),
        ("VPAE_EXTENDS", "can only stand in the file"),
    ],
)
def test_a_misspelt_variable_is_refused(name: str, hint: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3")
    with pytest.raises(ConfigError, match="environment") as caught:
        load(base)
    assert name in str(caught.value) and hint in str(caught.value)


def test_a_variable_that_is_no_json_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPAE_PRIMING", "fast")
    with pytest.raises(ConfigError, match=r'environment: .*"priming".*VPAE_SECTION__KEY'):
        load(base)


def test_variables_reach_a_whole_section_and_a_row(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPAE_PRIMING", '{"training": {"steps": 9}}')
    monkeypatch.setenv("VPAE_SAMPLES__ROWS", '{"mine": {"model": "teacher", "steps": 3}}')
    settings = load(base).settings
    assert settings.priming.training.steps == 9
    assert settings.samples.rows["mine"].steps == 3


def test_variables_name_what_a_mapping_s_keys_are_free_to_be(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPAE_STUDENTS__OLD", "data/old")
    monkeypatch.setenv("VPAE_CLIPS__FILTERS__AT_LEAST__SCORE", "5")
    monkeypatch.setenv("VPAE_CLIPS__SOURCE", "table")
    monkeypatch.setenv("VPAE_CLIPS__PATH", "t.csv")
    monkeypatch.setenv("VPAE_METHODS__EQUILIBRIUM", "null")
    monkeypatch.setenv("VPAE_SAMPLES__ROWS", '{"old-1nfe": {"model": "old", "steps": 1}}')
    settings = load(base).settings
    assert settings.students == {"old": "data/old"} and settings.clips.filters.at_least == {"score": 5.0}
    assert settings.methods == {"priming": "teacher"}


def test_variables_and_overrides_are_not_the_bases(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPAE_SEED", "4")
    source = load(overlay(base, {}), ["priming.training.steps=3"])
    assert (source.settings.seed, source.bases[0].settings.seed) == (4, 0)
    assert source.bases[0].settings.priming.training.steps == 500
    assert load(base, environment=False).settings.seed == 0


def test_a_bare_no_is_a_word_in_mixed_precision(base: Path) -> None:
    file = write(base.parent, "base", yaml.safe_dump(BASE) + "priming: {training: {mixed_precision: no}}\n")
    assert load(file).settings.priming.training.mixed_precision == "no"
    file = write(base.parent, "base", yaml.safe_dump(BASE) + "evaluation: {vbench: {backbones: off}}\n")
    assert load(file).settings.evaluation.vbench.backbones == "off"


def test_numbers_may_be_written_as_in_papers(base: Path) -> None:
    """YAML 1.1 reads 1e-6 as text; pydantic makes a number of it."""
    file = write(base.parent, "base", yaml.safe_dump(BASE) + "priming: {generator: {learning_rate: 1e-6}}\n")
    assert load(file).settings.priming.generator.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["suite.jsonl"], "row suite.jsonl: the stage's own files have such names"),
        (["x.png"], "row x.png: the stage's own files have such names"),
        (["Mine", "mine"], "rows Mine and mine differ in case alone"),
    ],
)
def test_rows_that_files_of_the_stage_would_meet_are_refused(names: list[str], words: str, base: Path) -> None:
    rows = {name: {"model": "teacher", "steps": 1} for name in names}
    with pytest.raises(ConfigError, match=words):
        load(overlay(base, {"samples": {"rows": rows}}))


def test_settings_cannot_be_changed_afterwards(base: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(base).settings.priming.training.steps = 3


# Which stages an overlay shares


def owners(source: Source) -> dict[str, str]:
    return {stage: owner(source, stage).name for stage in STAGES}


@pytest.mark.parametrize(
    ("tree", "first"),
    [
        ({}, None),
        ({"report": {"clips": 1}}, "report"),
        ({"evaluation": {"bootstrap": 77}}, "evaluation"),
        ({"samples": {"crf": 11}}, "samples"),
        ({"equilibrium": {"csds_weight": 0.0}}, "equilibrium"),
        ({"equilibrium": {"head": {"semantics": False}}}, "equilibrium"),
        ({"priming": {"guidance_scale": 1.0}}, "priming"),
        ({"latents": {"dtype": "bfloat16"}}, "latents"),
        ({"seed": 1}, "clips"),
        ({"geometry": {"frames": 5}}, "clips"),
        ({"clips": {"workers": 7}}, None),
        ({"teacher": {"vae": {"crop": 16}}}, "teacher"),
    ],
    ids=str,
)
def test_an_overlay_owns_the_first_stage_it_changes_and_all_that_follow_from_it(
    tree: dict, first: str | None, base: Path
) -> None:
    source = load(overlay(base, tree))
    changed = STAGES[STAGES.index(first) :] if first else ()
    if first == "latents":
        assert "teacher" not in changed
    assert owners(source) == {stage: "overlay" if stage in changed else "base" for stage in STAGES}
    for stage in STAGES:
        folder = stage_folder(source, stage, Path("r"))
        assert folder == Path("r") / ("overlay" if stage in changed else "base") / stage


def test_a_stage_belongs_to_the_furthest_base_with_the_same_settings(base: Path) -> None:
    middle = overlay(base, {"equilibrium": {"csds_weight": 0.0}}, "middle")
    top = load(overlay(middle, {"report": {"clips": 1}}, "top"))
    assert owners(top) == {**dict.fromkeys(STAGES[:4], "base"), **dict.fromkeys(STAGES[4:7], "middle"), "report": "top"}
    undone = load(overlay(middle, {"equilibrium": {"csds_weight": 10.0}}, "undone"))
    assert set(owners(undone).values()) == {"base"}


@pytest.mark.parametrize("order", [["ben", "ana"], ["ana", "ben"]])
def test_of_two_bases_a_result_is_taken_with_what_it_was_made_from(order: list[str], base: Path) -> None:
    """Both train the same priming, which ends in other bits on another machine."""
    primed = {"priming": {"guidance_scale": 2.5}}
    overlay(base, primed, "ana")
    overlay(base, {**primed, "equilibrium": {"csds_weight": 0.5}}, "ben")
    tree = {"extends": order, "equilibrium": {"csds_weight": 0.5}, "samples": {"crf": 11}}
    found = owners(load(write(base.parent, "both", tree)))
    assert found == {
        **dict.fromkeys(STAGES[:3], "base"),
        **dict.fromkeys(STAGES[3:5], "ben"),
        **dict.fromkeys(STAGES[5:], "both"),
    }


def test_a_name_with_its_own_seed_is_the_name(base: Path) -> None:
    assert [load(base.with_stem(f"base@{seed}")).name for seed in ("0", "00", "1", "01")] == ["base"] * 2 + [
        "base@1"
    ] * 2


def test_clips_do_not_matter_to_a_teacher_that_is_not_trained_on_them(base: Path) -> None:
    write(base.parent, "base", {**BASE, "teacher": {"source": "folder", "path": "x"}})
    found = owners(load(overlay(base, {"clips": {"train": 99}})))
    assert found["teacher"] == "base" and found["clips"] == found["latents"] == "overlay"
    assert set(owners(load(overlay(base, {"teacher": {"vae": {"crop": 16}}}))).values()) == {"base"}


def test_overrides_of_an_overlay_do_not_land_in_its_bases_folder(base: Path) -> None:
    source = load(overlay(base, {}), ["clips.train=99"])
    assert set(owners(source).values()) == {"overlay"}


def test_fingerprints_do_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    first = load(write(tmp_path, "a", json.dumps(BASE)))
    second = load(write(tmp_path, "b", json.dumps({k: dict(reversed(BASE[k].items())) for k in reversed(BASE)})))
    assert [fingerprint(first.settings, s) for s in STAGES] == [fingerprint(second.settings, s) for s in STAGES]


# What is shipped, and the command line


def test_experiments_are_shipped() -> None:
    assert {"tiny", "micro"} <= {path.stem for path in SHIPPED}


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_experiment_runs_through_every_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(
        "vpae.stages.run_stage", lambda source, stage, results: asked.append((source.name, stage, results))
    )
    assert main(["config", "check", str(path)]) == 0
    stages = STAGES if path.stem == "micro" else STAGES[-1:]  # which stage it is makes no difference to a file
    for stage in stages:
        assert main([stage, "--config", str(path), "--results", str(tmp_path)]) == 0
    assert asked == [(path.stem, stage, tmp_path) for stage in stages]
    capsys.readouterr()
    assert main(["config", "show", "--config", str(path)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    again = load(write(tmp_path, "shown", {**shown, "extends": ""}), environment=False).settings
    assert again.model_dump(exclude={"extends"}) == load(path, environment=False).settings.model_dump(
        exclude={"extends"}
    )


def test_every_shipped_experiment_names_the_schema_and_follows_it() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((ROOT / "configs" / "schema.json").read_text())
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    validator = kind(schema)
    for path in SHIPPED:
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), path
        validator.validate(yaml.safe_load(path.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"priming": {"trainign": {}}})


def test_the_shipped_schema_has_not_drifted(capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "schema"]) == 0
    message = "configs/schema.json has drifted: vpae config schema > configs/schema.json"
    assert (ROOT / "configs" / "schema.json").read_text() == capsys.readouterr().out, message


def test_check_without_files_checks_all_shipped_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["config", "check"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"configs/{path.name}: ok" for path in SHIPPED]


def test_check_where_there_is_nothing_to_check_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", "check"]) == 2
    assert "no experiments here" in capsys.readouterr().err


def test_check_goes_on_after_a_wrong_file(base: Path, capsys: pytest.CaptureFixture) -> None:
    wrong = write(base.parent, "wrong", {**BASE, "sed": 1})
    assert main(["config", "check", str(wrong), str(base)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{base}: ok\n"
    assert err == f"vpae: {wrong}: sed: unknown key; did you mean seed?\n"


def test_a_file_is_named_with_or_without_the_option(base: Path, capsys: pytest.CaptureFixture) -> None:
    said = []
    for file in ([str(base)], ["--config", str(base)]):
        for command in ("check", "show"):
            assert main(["config", command, *file]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith(f"{base}: ok\n")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_a_wrong_experiment_is_an_error_and_no_traceback(
    stage: str, base: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([stage, "--config", str(base), "--set", "geometry.frames=6"]) == 2
    assert capsys.readouterr().err.startswith("vpae: ")


def test_show_shows_overrides(base: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "show", "--config", str(base), "--set", "seed=7", "--set", "geometry.frames=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["geometry"]["frames"]) == (7, 5)
