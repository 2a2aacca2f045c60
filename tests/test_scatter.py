"""Stages cut into parts: any number of jobs, in any order, killed or not, ends in the bytes that one job gives."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import STAGES
from vpae.artifacts import PROVENANCE, ArtifactError, file_hashes, link_tree, locked, sha256
from vpae.cli import main
from vpae.data import catalog, latents
from vpae.data.video import write_video
from vpae.experiment import Source, load
from vpae.graph import STAGES as TABLE
from vpae.graph import stage_folder, stage_settings
from vpae.parts import Part
from vpae.preemption import Interruption
from vpae.sampling import stage as sampling
from vpae.stages import run_part, run_stage

STAGES_IN_ORDER = ("clips", "teacher", "latents", "samples")
# What makes one unit of a stage's work, and how many units of it the experiment has.
MAKERS = {"clips": (catalog, "write_video"), "latents": (latents, "encode_shard"), "samples": (sampling, "_keep")}


def experiment(folder: Path, teacher: Path, **changes: object) -> Source:
    tree = {
        "geometry": {"frames": 5, "height": 32, "width": 32, "fps": 8},
        "clips": {"source": "world", "train": 4, "held_out": 5, "workers": 1},
        "teacher": {"source": "folder", "path": str(teacher)},
        "latents": {"shard_size": 2, "batch_size": 2},
        "samples": {
            "rows": {"a": {"model": "teacher", "steps": 3}, "b": {"model": "teacher", "steps": 1}},
            "count": 5,
            "decode": 3,
            "batch_size": 2,
        },
        **changes,
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """The results of all stages, one job each; only to be read."""
    folder = tmp_path_factory.mktemp("whole")
    source = experiment(folder, teacher)
    for stage in STAGES_IN_ORDER:
        run_stage(source, stage, folder / "results")
    return folder / "results" / "own"


class Place:
    """The same experiment elsewhere, with all that comes before one stage finished."""

    def __init__(self, folder: Path, teacher: Path, whole: Path, stage: str):
        self.results, self.stage, self.teacher = folder / "results", stage, teacher
        self.source = experiment(folder, teacher)
        (self.results / "own").mkdir(parents=True)
        for before in STAGES_IN_ORDER[: STAGES_IN_ORDER.index(stage)]:
            (self.results / "own" / before).symlink_to(whole / before)

    def part(self, number: int, of: int) -> None:
        run_part(self.source, self.stage, Part(number, of), self.results)

    def run(self) -> Path:
        return run_stage(self.source, self.stage, self.results)

    @property
    def states(self) -> list[Path]:
        return list((self.results / "own" / ".state").glob(f"{self.stage}-*"))


def test_every_stage_that_can_be_cut_is_tried() -> None:
    assert {name for name, stage in TABLE.items() if stage.divisible} == {*MAKERS, "evaluation"}


def test_parts_of_the_evaluation_measure_and_the_rest_finds_it_done(tmp_path: Path, teacher: Path, whole: Path) -> None:
    """Of all rows' videos, whoever measures them; another job, and the stage, have nothing left to measure."""
    source = experiment(tmp_path, teacher, evaluation={"vbench": {"backbones": "tiny", "dimensions": ["i2v_subject"]}})
    (tmp_path / "results" / "own").mkdir(parents=True)
    for before in STAGES_IN_ORDER:
        (tmp_path / "results" / "own" / before).symlink_to(whole / before)
    counts = []
    for number, of in ((2, 2), (1, 2), (1, 1)):
        run_part(source, "evaluation", Part(number, of), tmp_path / "results")
        files = (tmp_path / "results").rglob("*.jsonl")
        counts.append(sum(len(path.read_bytes().splitlines()) for path in files if path.parent.name == "records"))
    assert counts == [4, 9, 9]  # of three rows with three videos


def test_a_model_that_gives_no_numbers_is_named_and_nothing_is_finished(
    tmp_path: Path, teacher: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, draw = Place(tmp_path, teacher, whole, "samples"), sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda model, row, *rest: draw(model, row, *rest) / (row.steps - 1))
    with pytest.raises(ArtifactError, match=r"samples\.rows\.b: .*teacher gave no finite numbers: its training"):
        place.run()
    assert not (place.results / "own" / "samples").exists()


@pytest.fixture(params=list(MAKERS))
def place(request: pytest.FixtureRequest, tmp_path: Path, teacher: Path, whole: Path) -> Place:
    return Place(tmp_path, teacher, whole, request.param)


@pytest.fixture
def latents_place(tmp_path: Path, teacher: Path, whole: Path) -> Place:
    return Place(tmp_path, teacher, whole, "latents")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, place: Place) -> list[int]:
    """One entry for each unit of work that the stage makes."""
    calls: list[int] = []
    after_each_call(monkeypatch, place.stage, lambda: calls.append(1))
    return calls


def after_each_call(patch: pytest.MonkeyPatch, stage: str, action: Callable[[], object]) -> None:
    """Have something done whenever a unit of the stage's work is made."""
    module, name = MAKERS[stage]
    original = getattr(module, name)

    def wrapped(*arguments: object, **keywords: object) -> object:
        result = original(*arguments, **keywords)
        action()
        return result

    patch.setattr(module, name, wrapped)


def units(stage: str, whole: Path) -> int:
    """Videos; shards; batches of the clips themselves and of two rows."""
    return {"clips": 9, "latents": len(list((whole / "latents").glob("*.tar"))), "samples": 9}[stage]


class Kill(BaseException):
    """Stands for whatever ends a process in the middle."""


def kill() -> None:
    raise Kill


# The bytes of one job


@pytest.mark.parametrize("order", [(2, 3, 1), (3, 1, 2)])
def test_parts_in_any_order_and_with_a_kill_in_between_give_the_bytes_of_one_job(
    order: tuple[int, ...], place: Place, whole: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in order:
        if number == 3:
            with monkeypatch.context() as patch, pytest.raises(Kill):
                after_each_call(patch, place.stage, kill)
                place.part(number, 3)
        place.part(number, 3)
    assert 0 <= len(made) - units(place.stage, whole) <= 1, "only what was being made when it was killed is made twice"
    made.clear()
    folder = place.run()
    assert made == [], "the stage itself only gathers"
    assert file_hashes(folder) == file_hashes(whole / place.stage)
    assert place.states == []


def test_a_changed_byte_in_what_a_part_left_is_named_and_that_piece_is_made_again(
    place: Place, whole: Path, made: list[int], capsys: pytest.CaptureFixture
) -> None:
    place.part(1, 1)
    [state] = place.states
    files = sorted(path for path in state.rglob("*") if path.is_file() and not path.name.startswith("."))
    kinds = {path.suffix: path for path in files}  # one of each kind
    for path in kinds.values():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        path.write_bytes(data)
    made.clear()
    assert file_hashes(place.run()) == file_hashes(whole / place.stage)
    printed = capsys.readouterr().err
    assert all(f"{path} is damaged; it is made again" in printed for path in kinds.values())
    assert 0 < len(made) <= len(kinds)


def test_what_parts_left_undone_the_stage_does_itself(place: Place, whole: Path, made: list[int]) -> None:
    place.part(1, 2)
    first = len(made)
    assert 0 < first < units(place.stage, whole)
    assert file_hashes(place.run()) == file_hashes(whole / place.stage)
    assert len(made) == units(place.stage, whole)


def test_more_parts_than_work_and_parts_done_twice_do_no_harm(place: Place, whole: Path, made: list[int]) -> None:
    for number in (*range(1, 41), 7, 20, 33):
        place.part(number, 40)
    assert len(made) == units(place.stage, whole)
    assert file_hashes(place.run()) == file_hashes(whole / place.stage)


def test_a_part_told_to_end_keeps_what_is_finished_and_goes_on_from_there(
    place: Place, whole: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        after_each_call(patch, place.stage, lambda: os.kill(os.getpid(), signal.SIGTERM))
        place.part(1, 1)
    assert 1 <= len(made) <= 2
    place.part(1, 1)
    assert 0 <= len(made) - units(place.stage, whole) <= 1
    assert file_hashes(place.run()) == file_hashes(whole / place.stage)


def test_an_interrupted_stage_goes_on_where_it_was(
    place: Place, whole: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Kill):
        after_each_call(patch, place.stage, lambda: kill() if len(made) == 3 else None)
        place.run()
    assert not (place.results / "own" / place.stage).exists()
    assert file_hashes(place.run()) == file_hashes(whole / place.stage)
    assert 0 <= len(made) - units(place.stage, whole) <= 1


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Seven files: five usable videos, a copy of one of them, and one that is no video."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(6):
        rng = np.random.default_rng(number)
        frames = np.kron(rng.integers(0, 256, (6, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
        write_video(folder / f"{number}.mp4", frames, 8, crf=10)
    (folder / "6.mp4").write_bytes((folder / "0.mp4").read_bytes())
    (folder / "7.mp4").write_text("no video")
    return folder


def test_videos_of_ones_own_are_checked_once_each_by_parts_too(
    videos: Path, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = {"source": "folder", "path": str(videos), "train": 9, "held_out": 3, "workers": 1}
    source = experiment(tmp_path, teacher, clips=clips, samples={"count": 3, "decode": 1})
    one_job = file_hashes(run_stage(source, "clips", tmp_path / "one"))
    checked: list[Path] = []
    original = catalog.read_clip

    def read_clip(path: Path, *arguments: object) -> np.ndarray:
        checked.append(path)
        return original(path, *arguments)

    monkeypatch.setattr(catalog, "read_clip", read_clip)
    monkeypatch.setattr(catalog, "STRETCH", 2)
    run_part(source, "clips", Part(2, 2), tmp_path / "several")
    assert [path.name for path in checked] == ["4.mp4", "5.mp4", "6.mp4"], "the last one cannot even be opened"
    assert file_hashes(run_stage(source, "clips", tmp_path / "several")) == one_job
    assert sorted(path.name for path in checked) == [f"{n}.mp4" for n in range(7)]


# What does not count


@pytest.mark.parametrize("jobs", [{"latents": 7}, {"clips": 2, "latents": 100, "samples": 3}])
def test_the_number_of_jobs_changes_no_stage(jobs: dict, tmp_path: Path, teacher: Path) -> None:
    one = experiment(tmp_path, teacher)
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump({"extends": "own", "jobs": jobs}))
    cut = load(tmp_path / "cut.yaml")
    assert cut.settings.jobs.latents == jobs["latents"]
    for stage in STAGES:
        assert stage_settings(cut.settings, stage) == stage_settings(one.settings, stage)
        assert stage_folder(cut, stage) == stage_folder(one, stage), "an overlay's stages are its base's"


def test_parts_made_from_something_else_are_not_taken_up(place: Place, whole: Path, made: list[int]) -> None:
    """The settings of the stage itself count, all of them."""
    changes = {
        "clips": {"clips": {"source": "world", "train": 4, "held_out": 5, "workers": 1, "world": {"crf": 20}}},
        "latents": {"latents": {"shard_size": 2, "batch_size": 1}},
        "samples": {"samples": {**place.source.settings.samples.model_dump(mode="json"), "crf": 20}},
    }
    other = experiment(place.results.parent, place.teacher, **changes[place.stage])
    for number in (1, 2):
        run_part(other, place.stage, Part(number, 2), place.results)
    made.clear()
    place.source = experiment(place.results.parent, place.teacher)
    assert file_hashes(place.run()) == file_hashes(whole / place.stage)
    # A shard's bytes do not depend on the batch, but it is not looked for under other settings.
    assert len(made) == units(place.stage, whole)
    assert place.states == [], "nor does it stay"


def test_marks_alone_are_not_believed(place: Place, whole: Path, made: list[int]) -> None:
    for number in (1, 2):
        mark = place.results / "own" / ".parts" / place.stage / f"{number}-of-2"
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    assert file_hashes(place.run()) == file_hashes(whole / place.stage)
    assert len(made) == units(place.stage, whole)


def test_a_part_of_a_finished_stage_does_nothing(place: Place, made: list[int]) -> None:
    folder = place.run()
    before = (folder / PROVENANCE).stat().st_mtime_ns
    made.clear()
    place.part(1, 2)
    assert made == [] and place.states == []
    assert (folder / PROVENANCE).stat().st_mtime_ns == before


def test_parts_may_meet_but_not_a_run_of_the_whole_stage(latents_place: Place) -> None:
    folder = latents_place.results / "own" / "latents"
    with locked(folder, shared=True):
        latents_place.part(1, 2)
        with pytest.raises(ArtifactError, match="another process"):
            latents_place.run()
    with locked(folder), pytest.raises(ArtifactError, match="another process"):
        latents_place.part(2, 2)
    latents_place.run()


def test_a_part_takes_over_the_shards_of_an_earlier_result(
    latents_place: Place, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (latents_place.results / "own" / "latents").symlink_to(whole / "latents")
    changed = {"shard_size": 2, "batch_size": 2, "negative_prompt": "blurred"}
    latents_place.source = experiment(latents_place.results.parent, latents_place.teacher, latents=changed)
    after_each_call(monkeypatch, "latents", kill)
    latents_place.part(1, 1)
    assert len(list(latents_place.states[0].glob("*.tar"))) == units("latents", whole)


# How work is shared out

costs = st.lists(st.integers(1, 100), max_size=60)


@given(costs, st.integers(1, 80))
def test_shares_hold_each_piece_once_and_differ_by_one_at_most(work: list[int], of: int) -> None:
    numbered = list(enumerate(work))
    shares = [Part(number, of).share(numbered) for number in range(1, of + 1)]
    assert sorted(piece for share in shares for piece in share) == numbered
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(costs, st.integers(1, 80))
def test_stretches_are_the_work_in_its_order_and_cost_the_same_but_for_one_piece(work: list[int], of: int) -> None:
    numbered = list(enumerate(work))
    stretches = [Part(number, of).stretch(numbered, work) for number in range(1, of + 1)]
    assert [piece for stretch in stretches for piece in stretch] == numbered
    for stretch in stretches:
        assert sum(cost for _, cost in stretch) <= sum(work) / of + max(work, default=0) + 1e-9


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "/", "a/b", "-1/4", "1/4/2", ""])
def test_a_part_that_there_is_not_is_an_error_that_says_what_to_write(
    text: str, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture
) -> None:
    path = experiment(tmp_path, teacher).path
    assert main(["latents", "--config", str(path), "--results", str(tmp_path), f"--part={text}"]) == 2
    assert f"--part: {text!r} is no part; write number/of" in capsys.readouterr().err


def test_a_stage_that_cannot_be_cut_has_no_parts(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["priming", "--part", "1/2"])
    assert "--part" in capsys.readouterr().err


# A teacher that is somebody's


def test_editing_ones_teacher_in_place_changes_no_finished_result(tmp_path: Path, teacher: Path) -> None:
    own = tmp_path / "teacher"
    link_tree(teacher, own, foreign=True)
    weights = own / "transformer" / "diffusion_pytorch_model.safetensors"
    fixed = own / "vae" / "diffusion_pytorch_model.safetensors"
    fixed.chmod(0o444)
    folder = run_stage(experiment(tmp_path, own), "teacher", tmp_path / "results")
    before = file_hashes(folder)
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    assert sha256(weights) != before["transformer/diffusion_pytorch_model.safetensors"]
    assert file_hashes(folder) == before
    assert (folder / "vae" / fixed.name).samefile(fixed), "what nobody can write to is not copied"


def test_a_copied_teacher_is_the_same_model(tmp_path: Path, teacher: Path) -> None:
    folder = run_stage(experiment(tmp_path, teacher), "teacher", tmp_path / "results")
    ours, theirs = file_hashes(folder), file_hashes(teacher)
    assert {name: hashed for name, hashed in ours.items() if name in theirs} == theirs
