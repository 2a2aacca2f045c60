"""A finished result is never removed before its successor stands, and dates do not make it unfinished.

Commands, provenance and workflow are the repository's own; only the stages' bodies are toys (see `test_dvc`).
"""

import errno
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import vpae
from conftest import STAGES, build_priming
from test_dvc import ROOT, TOY, Clone
from vpae import artifacts, locks, stages
from vpae.artifacts import (
    PROVENANCE,
    ArtifactError,
    building,
    code_version,
    damaged,
    identity,
    locked,
    read_provenance,
    recover,
    write_json,
)
from vpae.data.index import INDEX, Entry, write_index
from vpae.data.manifest import Clip, write_manifest
from vpae.experiment import ConfigError, Source, load
from vpae.graph import fingerprint, owner, stage_settings, stages_of, that_matter
from vpae.stages import run_stage
from vpae.standing import require_true
from vpae.teacher import folder
from vpae.training import checkpoint
from vpae.training.phase import Collapse
from vpae.versioning.record import _require_inside

MICRO = ("--cores", "2", "--config", "experiment=micro", "--", "all")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A project in which the experiment `micro` has been run."""
    clone = Clone(tmp_path_factory.mktemp("finished") / "project")
    clone("snakemake", *MICRO)
    return clone


@pytest.fixture
def project(finished: Clone, tmp_path: Path) -> Clone:
    return finished.copy(tmp_path / "project")


def whole(project: Clone) -> dict[str, bytes]:
    """Every file of the results with its bytes, provenance and all."""
    folders = [project.folder / "results/micro" / stage for stage in STAGES]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {p.relative_to(project.folder).as_posix(): p.read_bytes() for p in files}


def new_dates(folder: Path) -> None:
    """Give everything another date, in no order that says what was made from what."""
    dates = random.Random(0)
    for path in folder.rglob("*"):
        os.utime(path, (when := 1.7e9 + dates.randrange(10**7), when), follow_symlinks=False)


def cloned(project: Clone) -> None:
    new_dates(project.folder)
    shutil.rmtree(project.folder / ".snakemake")  # which git does not carry


def rerun_everything(project: Clone) -> None:
    for file in (project.folder / "results/micro/logs").glob("*"):
        file.unlink()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b'{"settings": {}, "inputs": {}, "outputs": 1}', b"\xff\xfe"]
)
def test_a_provenance_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{PROVENANCE} is damaged .* run its stage again"):
        identity(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moved", [cloned, rerun_everything])
def test_what_is_finished_has_nothing_to_do_whatever_its_dates(project: Clone, moved: Callable) -> None:
    before = whole(project)
    moved(project)
    assert "Nothing to be done" in project("snakemake", "--dry-run", *MICRO)
    project("snakemake", *MICRO)
    assert whole(project) == before


@pytest.mark.slow
def test_a_forced_run_finds_finished_results_up_to_date_and_leaves_them(project: Clone) -> None:
    before = whole(project)
    new_dates(project.folder)
    printed = project("snakemake", "--forceall", *MICRO)
    assert "priming is up to date" in printed
    assert whole(project) == before


@pytest.mark.slow
def test_a_rule_that_was_edited_does_not_cost_the_results(project: Clone) -> None:
    before = whole(project)
    for rules in (project.folder / "workflow/rules").glob("*.smk"):
        rules.write_text(rules.read_text().replace("2>&1 | tee", "2>&1 |  tee"))
    project("snakemake", *MICRO)
    assert whole(project) == before


@pytest.mark.slow
def test_finished_clips_do_not_ask_for_their_videos(project: Clone) -> None:
    """As where results were restored and the videos are not."""
    videos = project.folder / "videos"
    videos.mkdir()
    (videos / "1.mp4").touch()
    for key, value in {"source": "folder", "path": "videos"}.items():
        project.set(f"clips.{key}", value)
    project("snakemake", *MICRO)
    shutil.rmtree(videos)
    assert "Nothing to be done" in project("snakemake", "--dry-run", *MICRO)
    shutil.rmtree(project.folder / "results/micro/clips")
    code, printed = project.run("snakemake", "--dry-run", *MICRO)
    assert code != 0 and "clips.path: videos does not exist" in printed


def test_a_file_of_the_user_s_in_a_result_is_named_with_its_remedy_and_hidden_ones_do_no_harm(tmp_path: Path) -> None:
    source = load(ROOT / "configs/micro.yaml", environment=False)
    folder = tmp_path / "micro/clips"
    with building(folder, stage_settings(source.settings, "clips"), {}):
        pass
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "clips-checkpoint.json").write_text("{}")
    require_true(source, ["clips"], tmp_path)
    for name in ("1.txt", "2.txt", "notes.txt"):
        (folder / name).write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt: not of this result: delete it, or move it [a-z ]+$"):
        require_true(source, ["clips"], tmp_path)


def test_damage_is_said_beside_foreign_files_and_files_that_older_results_recorded_count(tmp_path: Path) -> None:
    source = load(ROOT / "configs/micro.yaml", environment=False)
    folder = tmp_path / "micro/clips"
    with building(folder, stage_settings(source.settings, "clips"), {}) as (out, _):
        (out / "z").write_text("whole")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("of the hub")
    provenance = read_provenance(folder)
    outputs = {**provenance["outputs"], ".cache/x": artifacts.sha256(folder / ".cache/x")}
    artifacts.write_json(folder / PROVENANCE, {**provenance, "outputs": outputs})
    require_true(source, ["clips"], tmp_path)
    for name in "abcd":
        (folder / name).touch()
    (folder / "z").write_text("changed")
    with pytest.raises(ArtifactError, match=r"/z: damaged\n[^$]*/a: not of this result[^$]*run `snakemake all"):
        require_true(source, ["clips"], tmp_path)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with building(tmp_path / "x", {}, {}):
        pass

    def refuse(path: Path, *_args, **_options) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PermissionError, match=PROVENANCE):
        read_provenance(tmp_path / "x")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        artifacts.file_hashes(tmp_path / "x")


def test_results_behind_a_link_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project/results").symlink_to(tmp_path / "scratch")
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(ArtifactError, match=r"results/micro/clips is a link.* outside of the repository"):
        _require_inside(load(ROOT / "configs/micro.yaml", environment=False))


def write_latents(folder: Path, train: str, held_out: str) -> Path:
    """A finished latents folder whose clips have these letters for hashes."""
    entries = [
        Entry(f"{split}-{one}", split, "a disc", one, "0.tar", 0, 1, "")
        for split, ones in (("train", train), ("held_out", held_out))
        for one in ones
    ]
    with building(folder, {}, {}) as (out, _):
        write_index(out / INDEX, {"dtype": "float32"}, entries)
    return folder


def test_a_student_is_not_scored_on_clips_that_it_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = tmp_path / "results"
    theirs = write_latents(results / "theirs/latents", train="cdef", held_out="ab")
    student = results / "theirs/equilibrium"
    with building(student, {}, {"latents": identity(theirs)}):
        pass
    tree = f"students: {{found: {student}}}\nclips: {{source: folder, path: videos}}\n"
    (tmp_path / "micro.yaml").write_text((ROOT / "configs/micro.yaml").read_text())
    (tmp_path / "ours.yaml").write_text(f"extends: micro\n{tree}")
    source = load(tmp_path / "ours.yaml", environment=False)
    ours = write_latents(results / "ours/latents", train="ef", held_out="abcd")
    (results / "another/latents").mkdir(parents=True)
    (results / "another/latents" / PROVENANCE).write_text("{")  # an experiment's that has nothing to do with it
    with pytest.raises(ConfigError, match=r"students\.found: 2 of the 4 held-out clips are .* trained on"):
        stages._require_unseen(source, stages._hashes(ours, "held_out"), results)
    stages._require_unseen(source, {"a", "b"}, results)
    assert not capsys.readouterr().err
    shutil.rmtree(theirs)
    stages._require_unseen(source, {"a", "b", "c", "d"}, results)
    assert "students.found: the latents that " in capsys.readouterr().err


def test_a_student_that_knows_held_out_clips_is_refused_before_they_are_encoded(tmp_path: Path) -> None:
    results, student = tmp_path / "results", tmp_path / "results/theirs/equilibrium"
    theirs = write_latents(results / "theirs/latents", train="cd", held_out="")
    with building(student, {}, {"latents": identity(theirs)}) as (out, _):
        (out / "student").mkdir()
        write_json(out / "student/model_index.json", {})
    keys = [f"students.found={student}", "clips.source=folder", "clips.path=videos"]
    source = load(ROOT / "configs/micro.yaml", keys, environment=False)
    clips = results / "micro/clips"
    with building(clips, stage_settings(source.settings, "clips"), {}) as (out, _):
        write_manifest(out, [Clip(one, f"{one}.mp4", "held_out", "a disc", 64, 64, 8.0, one) for one in "bc"])
    made = {"clips": identity(clips)}
    with building(results / "micro/teacher", stage_settings(source.settings, "teacher"), made):
        pass
    with pytest.raises(ConfigError, match=r"students\.found: 1 of the 2 held-out clips"):
        stages._task(source, "latents", results)


def task_of(source: Source, stage: str, results: Path) -> stages._Task:
    folder, settings = results / source.name / stage, stage_settings(source.settings, stage)
    return stages._Task(None, None, folder, settings, {}, {})


def test_other_numbers_of_clips_go_on_with_those_that_are_checked(tmp_path: Path) -> None:
    own = ["clips.source=folder", "clips.path=videos"]
    one, other, wider = (
        task_of(load(ROOT / "configs/micro.yaml", [*own, *keys], environment=False), "clips", tmp_path).state
        for keys in ([], ["clips.held_out=9", "clips.train=9"], ["geometry.width=96"])
    )
    assert one == other != wider


@pytest.mark.parametrize(("key", "stays"), [("checkpoint_every", True), ("log_every", True), ("accumulate", False)])
def test_a_teacher_s_training_goes_on_when_it_is_only_saved_otherwise(key: str, stays: bool, tmp_path: Path) -> None:
    keys = [], [f"teacher.transformer.training.{key}=7"]
    one, other = (task_of(load(ROOT / "configs/micro.yaml", k, environment=False), "teacher", tmp_path) for k in keys)
    assert (one.state == other.state) == stays


@pytest.mark.parametrize(("stage", "kept"), [("teacher", True), ("priming", True), ("latents", False)])
def test_an_unfinished_training_under_other_settings_is_kept_and_named(
    stage: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = load(ROOT / "configs/micro.yaml", environment=False)
    task = replace(task_of(source, stage, tmp_path), run=lambda *_: {})
    monkeypatch.setattr(stages, "_task", lambda *_: task)
    other = task.state.with_name(f"{stage}-000000000000")
    other.mkdir(parents=True)
    run_stage(source, stage, tmp_path)
    assert other.is_dir() == kept == (f"{other}: an unfinished run under other settings" in capsys.readouterr().err)


FAILING = TOY.replace("settings, inputs, out, state = given", "1 / 0  # given")


@pytest.mark.slow
def test_a_stage_that_fails_leaves_its_older_result(project: Clone) -> None:
    before = whole(project)
    project.set("priming.guidance_scale", 2.0)
    program = project.folder / ".venv/bin/vpae"
    program.write_text(FAILING)
    code, printed = project.run("snakemake", *MICRO)
    assert code != 0 and "ZeroDivisionError" in printed
    assert whole(project) == before
    program.write_text(TOY)
    project("snakemake", *MICRO)
    after = whole(project)
    later = STAGES[STAGES.index("priming") :]
    assert {name.split("/")[2] for name in after if after[name] != before[name]} == set(later)


@pytest.mark.slow
def test_a_flipped_byte_is_named_and_only_that_stage_is_made_anew(project: Clone) -> None:
    before = whole(project)
    victim = project.folder / "results/micro/priming/weights/model.bin"
    victim.write_bytes(victim.read_bytes()[:-1] + b"#")
    printed = project("snakemake", "--forcerun", "priming", *MICRO)
    assert "results/micro/priming/weights/model.bin is damaged" in printed
    changed = {name for name, content in whole(project).items() if content != before[name]}
    assert changed == {f"results/micro/priming/{PROVENANCE}"}


MODELS = ("priming", "equilibrium")
DECIDES = {
    "seed=1": STAGES,
    "geometry.fps=4": ("clips", "teacher", "latents", "samples"),
    "teacher.shift=7": ("teacher", *MODELS, "samples", "evaluation"),
    "clips.train=12": ("clips",),
    "clips.workers=2": (),
    "latents.dtype=bfloat16": ("latents",),
    "priming.training.ema_decay=0.75": ("priming",),
    "priming.training.schedule_steps=9": ("priming",),
    "priming.training.log_every=3": (),
    "equilibrium.csds_weight=9": ("equilibrium",),
    "samples.count=7": ("samples",),
    "evaluation.bootstrap=21": ("evaluation",),
    "report.clips=3": ("report",),
}


@pytest.mark.parametrize(("override", "stages"), DECIDES.items(), ids=DECIDES)
def test_each_setting_decides_about_the_stages_that_heed_it(override: str, stages: tuple[str, ...]) -> None:
    path = ROOT / "configs" / "micro.yaml"
    before, now = (load(path, overrides, environment=False).settings for overrides in ([], [override]))
    changed = [s for s in STAGES if that_matter(stage_settings(before, s)) != that_matter(stage_settings(now, s))]
    assert changed == list(stages)


def test_stages_of_another_given_student_are_other_ones() -> None:
    def prints(folder: str) -> dict[str, str]:
        path, given = ROOT / "configs" / "tiny-shipped.yaml", f"students.shipped={folder}"
        settings = load(path, [given], environment=False).settings
        return {stage: fingerprint(settings, stage) for stage in stages_of(settings)}

    one, other = prints("data/a"), prints("data/b")
    assert [s for s in one if one[s] != other[s]] == ["samples", "evaluation", "report"] and one == prints("data/a")


def test_a_result_stands_with_the_furthest_base_that_has_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs" / "micro.yaml", tmp_path)
    (tmp_path / "one.yaml").write_text("extends: micro\nsamples: {count: 7}\n")
    (tmp_path / "two.yaml").write_text("extends: one\nreport: {clips: 3}\n")
    source = load(tmp_path / "two.yaml", environment=False)
    names = [owner(source, stage).name for stage in STAGES]
    assert names == ["micro"] * 5 + ["one"] * 2 + ["two"]


def test_an_exchange_that_was_cut_short_is_ended(tmp_path: Path) -> None:
    """Killed between the two renames, there are an old result and a whole new one, but none by the right name."""
    folder = tmp_path / "stage"
    for text in ("old", "new"):
        with building(folder, {"is": text}, {}) as (out, _):
            (out / "file").write_text(text)
        if text == "old":
            shutil.copytree(folder, tmp_path / "copy")
    folder.rename(tmp_path / ".stage.tmp")
    (tmp_path / "copy").rename(tmp_path / ".stage.old")
    recover(folder)
    assert read_provenance(folder)["settings"] == {"is": "new"} and not damaged(folder)
    folder.rename(tmp_path / "elsewhere")  # killed before the new one was whole
    recover(folder)
    assert read_provenance(folder)["settings"] == {"is": "old"}


def test_a_result_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(artifacts, "flush_entry", lambda path: flushed.append((path.name, (tmp_path / "x").exists())))
    with building(tmp_path / "x", {}, {}) as (out, _):
        (out / "inner").mkdir()
        (out / "inner" / "weights").touch()
    before = {name for name, stood in flushed if not stood}
    assert before >= {".x.tmp", "inner", "weights"} and any(name.endswith(PROVENANCE) for name in before)
    assert flushed[-1] == (tmp_path.name, True)  # and then the name itself


def test_a_file_is_on_the_disk_before_it_has_its_name_and_half_of_one_is_nowhere(tmp_path: Path, monkeypatch) -> None:
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        artifacts, "flush_entry", lambda path: flushed.append((path.read_text(), (tmp_path / "x").exists()))
    )
    with artifacts.written(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert flushed == [("new", False)]
    with pytest.raises(KeyboardInterrupt), artifacts.written(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_provenance_says_how_much_memory_the_process_took_in_bytes(tmp_path: Path) -> None:
    with building(tmp_path / "x", {}, {}):
        pass
    taken = read_provenance(tmp_path / "x")["peak_memory_bytes"]
    assert 50 << 20 < taken < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_state_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    flushed, original = [], checkpoint.flush_entry

    def watched(path: Path) -> None:
        flushed.append((path.name, (tmp_path / "step-00000003").exists()))
        original(path)

    monkeypatch.setattr(checkpoint, "flush_entry", watched)
    checkpoint.save(tmp_path, build_priming(), {"step": 3})
    files = {path.name for path in (tmp_path / "step-00000003").iterdir()} - {checkpoint.POSITION}
    assert files and {name for name, stood in flushed if not stood} == {*files, ".step-00000003.tmp"}
    assert flushed[-1] == (tmp_path.name, True)


def test_a_half_made_successor_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / ".stage.tmp").mkdir()
    (tmp_path / ".stage.tmp/file").write_text("half")
    recover(tmp_path / "stage")
    with pytest.raises(ArtifactError, match="missing or unfinished"):
        identity(tmp_path / "stage")


def test_a_folder_that_is_being_built_is_left_alone_by_recovery(tmp_path: Path) -> None:
    with locked(tmp_path / "stage"):
        recover(tmp_path / "stage")
    assert not (tmp_path / "stage").exists()


def test_a_teacher_from_elsewhere_is_known_by_its_content(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "LARGE", 10_000)  # some of its files are remembered, some are not
    monkeypatch.setattr(folder, "KNOWN", tmp_path / "hashes.json")
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    settings = load(ROOT / "configs/micro.yaml", ["teacher.source=folder", f"teacher.path={copy}"]).settings
    before = folder.external_inputs(settings)
    new_dates(copy)
    assert folder.external_inputs(settings) == before
    weights, index = copy / "transformer/diffusion_pytorch_model.safetensors", copy / "model_index.json"
    for file, harm in ((weights, lambda c: c[:-2] + bytes([c[-2] ^ 1]) + c[-1:]), (index, lambda c: c + b" ")):
        original = file.read_bytes()
        file.write_bytes(harm(original))
        assert folder.external_inputs(settings) != before
        file.write_bytes(original)
    assert folder.external_inputs(settings) == before


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)


def test_without_flock_one_builder_is_alone_and_parts_share(tmp_path: Path, no_flock: None) -> None:
    folder = tmp_path / "stage"
    with locked(folder), pytest.raises(ArtifactError, match=r"another process.*delete"), locked(folder):
        pass
    with locked(folder), pytest.raises(ArtifactError, match="another process"), locked(folder, shared=True):
        pass
    both = locked(folder, shared=True), locked(folder, shared=True)
    with both[0], both[1], pytest.raises(ArtifactError, match="another process"), locked(folder):
        pass
    with building(folder, {}, {}):
        pass
    assert read_provenance(folder)["settings"] == {}


def test_without_flock_a_dead_process_keeps_nothing(tmp_path: Path, no_flock: None) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    holders = tmp_path / ".stage.lock.holders"
    holders.mkdir()
    names = [
        f"alone {socket.gethostname()} {pid} 1 a" for pid in (int(dead.stdout), os.getpid())
    ]  # one number is in use
    for name in names:
        (holders / name).touch()
    with locked(tmp_path / "stage"):
        assert not any((holders / name).exists() for name in names)
    (holders / "alone elsewhere 1 1 a").touch()  # of other machines nobody can tell
    with pytest.raises(ArtifactError, match=r"process 1 on elsewhere has it.*delete"), locked(tmp_path / "stage"):
        pass
    assert [p.name for p in holders.iterdir()] == ["alone elsewhere 1 1 a"]


def test_a_dead_process_keeps_no_lock(tmp_path: Path) -> None:
    hold = "import sys; from pathlib import Path; from vpae.artifacts import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "stage")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match="another process"), locked(tmp_path / "stage"):
            pass
        process.kill()
    with locked(tmp_path / "stage"):
        pass


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [truncated, flipped, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "position.json"])
def test_after_a_damaged_state_the_one_before_is_taken_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture, harm: Callable, name: str
) -> None:
    phase = build_priming()
    weights = phase.roles[phase.main].parameters()[0]
    for step in (1, 2):
        weights.data.fill_(float(step))
        checkpoint.save(tmp_path, phase, {"step": step})
    weights.data.zero_()
    harm(tmp_path / "step-00000002" / name)
    assert checkpoint.load_latest(tmp_path, phase)["step"] == 1
    assert (phase.roles[phase.main].parameters()[0] == 1).all()
    assert f"step-00000002/{name} is damaged" in capsys.readouterr().err
    harm(tmp_path / "step-00000001" / name)
    with pytest.raises(ArtifactError, match="no state in it is whole; delete"):
        checkpoint.load_latest(tmp_path, phase)


def test_a_folder_that_was_moved_and_linked_back_is_replaced_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    place, scratch = tmp_path / "results" / "latents", tmp_path / "scratch"
    with building(place, {"n": 0}, {}) as (out, _):
        (out / "x").write_text("0")
    place.rename(scratch)
    place.symlink_to(scratch)
    for n in (1, 2, 3):
        with building(place, {"n": n}, {}) as (out, _):
            (out / "x").write_text(str(n))
        assert (place / "x").read_text() == str(n) and not place.is_symlink()
    assert (scratch / "x").read_text() == "0"
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"latents", ".latents.lock"}


@pytest.mark.parametrize(("name", "file"), [("teacher", "weights.bin"), ("latents", "index.json")])
def test_a_changed_byte_of_an_input_is_named_before_the_stage_begins(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of latents all but the shards, which may be terabytes."""
    begun, folders = [], {stage: tmp_path / stage for stage in ("teacher", "latents")}
    for place in folders.values():
        with building(place, {}, {}) as (out, _):
            for written in ("weights.bin", "index.json", "train-00000.tar"):
                (out / written).write_bytes(b"as it was made")
    task = stages._Task(None, lambda *_: begun.append(1), tmp_path / "priming", {}, folders, {})
    monkeypatch.setattr(stages, "_task", lambda *_: task)
    flipped(folders["latents"] / "train-00000.tar")
    flipped(folders[name] / file)
    with pytest.raises(ArtifactError, match=f"{name}/{file} is damaged; run its stage again: `vpae {name}`"):
        stages.run_stage(load(ROOT / "configs/micro.yaml"), "priming", tmp_path)
    assert not begun
    flipped(folders[name] / file)  # back
    stages.run_stage(load(ROOT / "configs/micro.yaml"), "priming", tmp_path)
    assert begun


def test_one_of_several_processes_does_no_stage_that_runs_in_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = stages._Task(None, lambda *_: pytest.fail("it ran"), tmp_path / "clips", {}, {}, {})
    monkeypatch.setattr(stages, "_task", lambda *_: task)
    monkeypatch.setenv("RANK", "1")
    for stage, processes in (("clips", "1"), ("clips", "2"), ("priming", "1")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(ConfigError, match=rf"RANK = 1 is set, .* {stage} runs in one process: unset RANK"):
            stages.run_stage(None, stage, tmp_path)


def test_a_trial_under_other_settings_leaves_an_unfinished_training_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    unfinished = tmp_path / ".state" / "priming-0123456789ab"
    unfinished.mkdir(parents=True)
    task = stages._Task(None, lambda settings, folders, out, state: {}, tmp_path / "priming", {}, {}, {})
    monkeypatch.setattr(stages, "_task", lambda *_: task)
    source = load(ROOT / "configs/micro.yaml", environment=False)
    stages.run_stage(source, "priming", tmp_path)
    assert unfinished.is_dir() and f"{unfinished}: an unfinished run" in capsys.readouterr().err


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """safetensors makes files of mode 0600."""
    (tmp_path / "theirs").touch(mode=0o600)
    before = os.umask(0o022)
    try:
        with building(tmp_path / "x", {}, {}) as (out, _):
            (out / "own").touch(mode=0o600)
            (out / "secret").touch(mode=0o400)
            os.link(tmp_path / "theirs", out / "linked")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()}
    assert modes["own"] == 0o644 and modes["linked"] == 0o600 and modes["secret"] == 0o400


def test_a_node_without_git_and_an_environment_in_another_repository_name_no_commit(
    tmp_path: Path, monkeypatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(vpae, "__file__", str(tmp_path / "venv" / "lib" / "vpae" / "__init__.py"))
    (tmp_path / "venv" / "lib" / "vpae").mkdir(parents=True)
    assert code_version() == {"version": vpae.__version__, "commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version()["commit"] is None


def test_a_commit_with_changes_that_are_not_in_it_is_marked(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "src" / "vpae" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    monkeypatch.setattr(vpae, "__file__", str(package))
    git = ("git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "x")):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "notes").touch()  # which git does not know
    assert code_version()["commit"] and code_version()["dirty"] is False
    package.write_text("changed")
    assert code_version()["dirty"] is True


def test_a_training_may_meet_the_same_end_twice_and_not_a_third_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, settings = load(ROOT / "configs/micro.yaml", environment=False), {"monitor": {"stop": True}}
    ends: list[Exception | None] = []

    def train(*_: object) -> dict:
        if end := ends.pop(0):
            raise end
        return {}

    def task(*_: object) -> stages._Task:
        return stages._Task(stages, train, tmp_path / "priming", {"priming": {"training": settings}}, {}, {})

    def runs(*planned: Exception | None) -> None:
        ends[:] = planned
        for end in planned:
            if end is None:
                assert run_stage(source, "priming") == tmp_path / "priming"
                continue
            with pytest.raises(type(end), match=str(end)):
                run_stage(source, "priming")

    monkeypatch.setattr(stages, "_task", task)
    nan, other, still = (
        FloatingPointError("step 300: nan"),
        FloatingPointError("step 301: nan"),
        Collapse("it is still"),
    )
    runs(nan, other, nan, still, still)  # a GPU at fault does not fail in the same way twice
    [mark] = tmp_path.glob(".state/priming-*/dead_end.json")
    with pytest.raises(ArtifactError, match=f"(?s)it is still.*ended twice.*{mark}"):
        run_stage(source, "priming")
    monkeypatch.setattr(stages, "device_name", lambda: "another device")
    runs(still, still)
    mark.unlink()
    runs(still, still)
    settings["monitor"] = {"stop": False}  # which changes no run, and so not where its state stands
    runs(None)
    assert not mark.exists()


def test_a_build_that_fails_leaves_nothing_on_a_disk_that_may_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), building(tmp_path / "stage", {}, {}) as (out, _):
            (out / "half").write_bytes(b"a" * 100)
            raise error
        assert not out.exists() and not (tmp_path / "stage").exists()

    def full(_folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts, "flush", full)
    with pytest.raises(OSError, match="No space left"), building(tmp_path / "stage", {}, {}) as (out, _):
        (out / "whole").write_bytes(b"a" * 100)
    assert not out.exists() and not (tmp_path / "stage").exists()


def test_a_file_of_several_names_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr("vbench_i2v.files._HASHES", {})
    monkeypatch.setattr("vbench_i2v.files.sha256", lambda path: hashed.append(path) or "a hash")
    (tmp_path / "one").write_text("weights")
    os.link(tmp_path / "one", tmp_path / "two")
    for name in ("one", "two", "one"):
        assert artifacts.content(tmp_path / name) == "a hash"
    assert len(hashed) == 1
    os.utime(tmp_path / "two", (1, 1))
    artifacts.content(tmp_path / "one")
    assert len(hashed) == 2


@pytest.mark.parametrize(
    ("stage", "name", "file", "left_out"),
    [
        ("latents", "teacher", "transformer/model.safetensors", True),
        ("latents", "teacher", "vae/model.safetensors", False),
        ("priming", "teacher", "transformer/model.safetensors", False),
        ("priming", "latents", "train-00000.tar", True),
        ("priming", "latents", "index.json", False),
        ("equilibrium", "priming", "generator.safetensors", False),
        ("samples", "priming", "generator.safetensors", True),
        ("samples", "priming", "student/transformer/model.safetensors", False),
        ("samples", "given", "metrics.jsonl", True),
        ("evaluation", "samples", "real/latents.safetensors", False),
        ("evaluation", "teacher", "text_encoder/model.safetensors", False),
        ("report", "equilibrium", "student/transformer/model.safetensors", True),
        ("report", "equilibrium", "looks/00000020.safetensors", False),
        ("report", "equilibrium", "metrics.jsonl", False),
        ("report", "samples", "real/a clip.mp4", False),
    ],
)
def test_a_stage_hashes_beforehand_what_it_opens(stage: str, name: str, file: str, left_out: bool) -> None:
    assert stages._is_left_out(stage, name, file) == left_out
