"""Stage `latents`: shards that are repeatable, resumable, readable by others, and re-encoded only where needed."""

import hashlib
import io
import json
import shutil
import tarfile
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import yaml
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file

from vpae.artifacts import PROVENANCE, ArtifactError, file_hashes, read_provenance, sha256
from vpae.data import latents, manifest
from vpae.data.encoding import Encoders
from vpae.data.latents import INDEX, LatentDataset, _cut
from vpae.data.manifest import Clip, read_manifest
from vpae.data.video import write_video
from vpae.experiment import Source, load
from vpae.models.wan import TEXT_TOKENS, load_pipeline, text_tokens_for
from vpae.parts import Part
from vpae.preemption import Request
from vpae.stages import run_part, run_stage

STAGES = ("clips", "teacher", "latents")


class Workplace:
    """One experiment's folder: a copy of the teacher, videos of its own, and results."""

    def __init__(self, folder: Path, teacher: Path):
        self.folder, self.results = folder, folder / "results"
        self.teacher, self.videos = folder / "teacher", folder / "videos"
        shutil.copytree(teacher, self.teacher)
        self.videos.mkdir()

    def source(self, world: bool = False, seed: int = 0, **latents: object) -> Source:
        clips = {"source": "world"} if world else {"source": "folder", "path": str(self.videos)}
        tree = {
            "seed": seed,
            "geometry": {"frames": 5, "height": 32, "width": 32, "fps": 8},
            "clips": {"train": 6 if world else 100, "held_out": 3, "workers": 1, **clips},
            "teacher": {"source": "folder", "path": str(self.teacher)},
            "latents": {"shard_size": 2, "batch_size": 2, **latents},
            "samples": {"count": 3, "decode": 1},
        }
        path = self.folder / "own.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load(path)

    def run(self, world: bool = False, seed: int = 0, **latents: object) -> Path:
        source = self.source(world, seed, **latents)
        return [run_stage(source, stage, self.results) for stage in STAGES][-1]

    def copy(self, *finished: Path) -> "Workplace":
        """Another place with the same teacher, videos and finished stages, and none of the rest."""
        (self.folder / "copy").mkdir()
        other = Workplace(self.folder / "copy", self.teacher)
        for path in self.videos.iterdir():
            shutil.copy2(path, other.videos)
        for folder in finished:
            shutil.copytree(folder, other.results / "own" / folder.name)
        return other

    def write_video(self, number: int, caption: str = "") -> Path:
        rng = np.random.default_rng(number)
        frames = np.kron(rng.integers(0, 256, (6, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
        path = self.videos / f"clip-{number}.mp4"
        write_video(path, frames, 8, crf=10)
        if caption:
            path.with_suffix(".txt").write_text(caption)
        return path

    def change_weights(self, part: str) -> None:
        """Add a little to every weight of one network."""
        [path] = (self.teacher / part).glob("*.safetensors")
        changed = {name: tensor + 0.01 for name, tensor in load_file(path).items()}
        path.unlink()  # finished stages may hold a link to it
        save_file(changed, path, metadata={"format": "pt"})


@pytest.fixture
def place(tmp_path: Path, teacher: Path) -> Workplace:
    return Workplace(tmp_path, teacher)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> tuple[Workplace, Path]:
    """The procedural world's latents; only to be read."""
    place = Workplace(tmp_path_factory.mktemp("finished"), teacher)
    return place, place.run(world=True)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of clips that went through the VAE together, call by call."""
    calls: list[int] = []
    original = Encoders.videos

    def counting(self: Encoders, frames_BTHW3: np.ndarray) -> torch.Tensor:
        calls.append(len(frames_BTHW3))
        return original(self, frames_BTHW3)

    monkeypatch.setattr(Encoders, "videos", counting)
    return calls


def counts(folder: Path) -> dict:
    return read_provenance(folder)["counts"]


def index(folder: Path) -> list[dict]:
    return json.loads((folder / INDEX).read_text())["entries"]


def shard_keys(folder: Path) -> dict[str, tuple[str, ...]]:
    """Shard -> keys of its clips."""
    found: dict[str, tuple[str, ...]] = {}
    for entry in index(folder):
        found[entry["shard"]] = (*found.get(entry["shard"], ()), entry["key"])
    return found


def all_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    datasets = [LatentDataset(folder, split) for split in ("train", "held_out")]
    return {entry.key: data.tensors(n) for data in datasets for n, entry in enumerate(data.entries)}


# What is in a shard


def test_a_second_run_elsewhere_gives_the_same_bytes(finished: tuple[Workplace, Path], place: Workplace) -> None:
    assert file_hashes(place.run(world=True)) == file_hashes(finished[1])


def test_the_index_names_every_clip_once_in_the_manifests_order(finished: tuple[Workplace, Path]) -> None:
    place, folder = finished
    clips = read_manifest(place.results / "own" / "clips")
    entries = index(folder)
    for split in ("train", "held_out"):
        wanted = [(c.key, c.caption, c.sha256) for c in clips if c.split == split]
        assert [(e["key"], e["caption"], e["clip_sha256"]) for e in entries if e["split"] == split] == wanted
    shards = shard_keys(folder)
    assert set(shards) == {path.name for path in folder.glob("*.tar")}
    assert all(len(keys) <= 2 for keys in shards.values())
    assert all(key.startswith(shard.rsplit("-", 1)[0]) for shard, keys in shards.items() for key in keys), "no mixture"
    assert counts(folder) == {"clips": 9, "shards": len(shards), "shards_taken_over": 0}


def test_reading_back_equals_encoding_directly(
    finished: tuple[Workplace, Path], pipeline: WanImageToVideoPipeline
) -> None:
    place, folder = finished
    settings, clips_folder = place.source(world=True).settings, place.results / "own" / "clips"
    encoders, clips = Encoders(pipeline), {c.key: c for c in read_manifest(clips_folder)}
    shapes = {"x0": (16, 2, 4, 4), "condition": (16, 2, 4, 4), "image": (5, 16)}
    for keys in shard_keys(folder).values():
        frames = np.stack([clips[key].frames(settings.geometry, clips_folder) for key in keys])
        direct = {
            "x0": encoders.videos(frames),
            "condition": encoders.conditions(list(frames[:, 0]), 5),
            "image": encoders.images(list(frames[:, 0])),
            "text": encoders.texts([clips[key].caption for key in keys]),
        }
        stored = all_tensors(folder)
        for number, key in enumerate(keys):
            assert set(stored[key]) == set(direct)
            assert {name: tuple(stored[key][name].shape) for name in shapes} == shapes
            for name, value in direct.items():
                assert torch.equal(stored[key][name], value[number]), (key, name)
    assert len({tensors["x0"].sum().item() for tensors in stored.values()}) == 9


def test_a_clips_encoding_does_not_depend_on_its_batch(
    finished: tuple[Workplace, Path], pipeline: WanImageToVideoPipeline
) -> None:
    place, folder = finished
    clips_folder, encoders = place.results / "own" / "clips", Encoders(pipeline)
    dataset = LatentDataset(folder, "train")
    clips = {c.key: c for c in read_manifest(clips_folder)}
    for number, entry in enumerate(dataset.entries):
        clip, stored = clips[entry.key], dataset.tensors(number)
        frames = clip.frames(place.source(world=True).settings.geometry, clips_folder)[None]
        torch.testing.assert_close(stored["x0"], encoders.videos(frames)[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(stored["text"], encoders.texts([clip.caption])[0], atol=1e-4, rtol=1e-4)


def test_a_batch_is_what_the_network_expects(
    finished: tuple[Workplace, Path], pipeline: WanImageToVideoPipeline
) -> None:
    dataset = LatentDataset(finished[1], "train")
    x0, condition = dataset.batch([4, 0, 4])
    assert torch.equal(x0[0], dataset.tensors(4)["x0"]) and torch.equal(x0[0], x0[2])
    assert condition.frame_BCFHW.shape == (3, 20, 2, 4, 4)
    assert (condition.frame_BCFHW[:, :4, 0] == 1).all() and (condition.frame_BCFHW[:, :4, 1:] == 0).all()
    assert torch.equal(condition.frame_BCFHW[1, 4:], dataset.tensors(0)["condition"])
    longest = max(len(stored["text"]) for stored in all_tensors(finished[1]).values())
    assert condition.text_BLD.shape == (3, text_tokens_for(longest), 16)
    text = dataset.tensors(0)["text"]
    assert torch.equal(condition.text_BLD[1, : len(text)], text) and (condition.text_BLD[1, len(text) :] == 0).all()
    empty = Encoders(pipeline).texts([""])[0]
    assert (
        torch.equal(condition.empty_text_LD[: len(empty)], empty) and (condition.empty_text_LD[len(empty) :] == 0).all()
    )


def test_first_frames_are_kept_without_loss(finished: tuple[Workplace, Path]) -> None:
    place, folder = finished
    clips_folder = place.results / "own" / "clips"
    clips, dataset = read_manifest(clips_folder, "held_out"), LatentDataset(folder, "held_out")
    assert len(dataset) == len(clips) == 3
    for number, clip in enumerate(clips):
        frames = clip.frames(place.source(world=True).settings.geometry, clips_folder)
        assert np.array_equal(np.asarray(dataset.first_frame(number)), frames[0])


def test_webdataset_itself_reads_the_shards(finished: tuple[Workplace, Path]) -> None:
    folder, stored = finished[1], all_tensors(finished[1])
    captions = {e["key"]: e["caption"] for e in index(folder)}
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert {s["__key__"] for s in samples} == set(stored) and len(samples) == len(stored)
    for sample in samples:
        key = sample["__key__"]
        tensors = load_tensors(sample["safetensors"])
        assert all(torch.equal(tensors[name], value) for name, value in stored[key].items())
        stored_again = hashlib.sha256(sample["safetensors"]).hexdigest()
        assert sample["json"] == {"caption": captions[key], "sha256": stored_again}
        assert sample["png"].shape == (32, 32, 3) and sample["png"].dtype == np.uint8


def test_bfloat16_halves_the_latents_and_keeps_them_to_a_percent(
    finished: tuple[Workplace, Path], place: Workplace
) -> None:
    folder = place.run(world=True, dtype="bfloat16")
    single, half = all_tensors(finished[1]), all_tensors(folder)
    assert set(half) == set(single)
    for key, tensors in half.items():
        for name, value in tensors.items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, single[key][name].bfloat16())
    sizes = [sum(e["size"] for e in index(f)) for f in (folder, finished[1])]
    assert sizes[0] < 0.6 * sizes[1]
    x0, condition = LatentDataset(folder, "train").batch([0])
    assert {x0.dtype, condition.frame_BCFHW.dtype, condition.text_BLD.dtype, condition.image_BND.dtype} == {
        torch.float32
    }


def test_a_caption_of_any_length_fits_the_text_tokens(place: Workplace) -> None:
    for number in range(6):
        place.write_video(number, caption="word " * 1000 if number % 2 else "x")
    lengths = sorted({len(t["text"]) for t in all_tensors(place.run()).values()})
    assert lengths[-1] == TEXT_TOKENS and lengths[0] < 5


def test_a_negative_prompt_that_is_longer_than_all_captions_fits_too(place: Workplace) -> None:
    for number in range(6):
        place.write_video(number, caption="x")
    assert LatentDataset(place.run(), "train").text_tokens < TEXT_TOKENS
    found = LatentDataset(place.run(negative_prompt="word " * 40), "train")
    words = load_file(found.folder / "negative.safetensors")["text"]
    assert found.text_tokens == TEXT_TOKENS and found.empty_text_LD[: len(words)].equal(words.float())


# Memory


class StandIn:
    """Encodes nothing; knows how long a text is."""

    def texts(self, captions: Sequence[str]) -> list[torch.Tensor]:
        return [torch.zeros(1, 4) for _ in captions]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [*map(len, captions)]


def peak_of_python(work: Callable[[], object]) -> int:
    """Most bytes of Python objects alive at once, over those before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


TOLD = json.dumps({"sha256": ""}).encode()


@pytest.mark.slow
def test_the_stages_memory_does_not_grow_with_the_number_of_clips(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the whole stage nor of a part: alive are a row group of the manifest and a few shards' clips."""

    def write_shard(clips: Sequence[Clip], *others: object) -> bool:
        with tarfile.open(others[3], "w") as tar:
            for clip in clips:
                tar.addfile(tarfile.TarInfo(f"{clip.key}.safetensors"))
                told = tarfile.TarInfo(f"{clip.key}.json")
                told.size = len(TOLD)
                tar.addfile(told, io.BytesIO(TOLD))
        return True

    monkeypatch.setattr(latents, "encode_shard", write_shard)
    monkeypatch.setattr(latents, "_encoders", lambda _: StandIn)
    monkeypatch.setattr(latents, "file_hashes", lambda _: {})
    settings = place.source(world=True, shard_size=64).settings
    peaks = {}
    for number in (1500, 6000):
        inputs = {"clips": place.folder / f"clips-{number}", "teacher": place.teacher}
        inputs["clips"].mkdir()
        rows = ((f"{i:040d}", "train" if i >= 64 else "held_out") for i in range(number))
        long = "a caption of some length, " * 8
        manifest.write_manifest(
            inputs["clips"], (Clip(key, f"{key}.mp4", split, f"{key} {long}", 8, 8, 8.0, key) for key, split in rows)
        )
        out, state = place.folder / f"out-{number}", place.results / f"own-{number}" / ".state" / "latents"
        out.mkdir()
        part = peak_of_python(lambda i=inputs, s=state: latents.part(settings, i, s, Part(2, 8)))
        whole = peak_of_python(lambda i=inputs, o=out, s=state: latents.run(settings, i, o, s))
        assert len(index(out)) == number and len({entry["key"] for entry in index(out)}) == number
        peaks[number] = part, whole
    for few, many in zip(*peaks.values(), strict=True):
        assert many < few + 1_000_000, (peaks, "4,500 more clips held would be more than 3 MB")


# Time


def test_the_next_batch_is_decoded_while_one_is_encoded(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, lock, waited = [], threading.Condition(), []
    frames, videos = Clip.frames, Encoders.videos

    def noted_frames(self: Clip, *others: object) -> np.ndarray:
        found = frames(self, *others)
        with lock:
            decoded.append(self.key)
            lock.notify_all()
        return found

    def patient_videos(self: Encoders, frames_BTHW3: np.ndarray) -> torch.Tensor:
        number = len(waited) + 1
        with lock:
            waited.append(lock.wait_for(lambda: len(decoded) >= min(2 * number + 2, 6), timeout=10))
        return videos(self, frames_BTHW3)

    monkeypatch.setattr(Clip, "frames", noted_frames)
    monkeypatch.setattr(Encoders, "videos", patient_videos)
    for number in range(6):
        place.write_video(number)
    source = place.source(shard_size=100)
    clips = run_stage(source, "clips", place.results)
    teacher = run_stage(source, "teacher", place.results)
    rows = [*manifest.iterate_manifest(clips)]
    encoders = Encoders(load_pipeline(teacher, transformer=None))
    assert latents.encode_shard(rows, source.settings, clips, encoders, place.folder / "a.tar", Request())
    assert waited == [True, True, True] and decoded == [clip.key for clip in rows]


# What is encoded again


def test_a_finished_stage_does_nothing(finished: tuple[Workplace, Path], encoded: list[int]) -> None:
    place, folder = finished
    before = (file_hashes(folder), (folder / PROVENANCE).stat().st_mtime_ns)
    assert place.run(world=True) == folder
    assert (file_hashes(folder), (folder / PROVENANCE).stat().st_mtime_ns) == before
    assert encoded == []


def change_a_video(place: Workplace) -> None:
    place.write_video(100).replace(place.videos / "clip-3.mp4")


def add_a_video(place: Workplace) -> None:
    place.write_video(101)


def change_a_caption(place: Workplace) -> None:
    (place.videos / "clip-3.txt").write_text("something else")


@pytest.mark.slow
@pytest.mark.parametrize("change", [change_a_video, add_a_video, change_a_caption])
def test_only_shards_whose_clips_changed_are_encoded_again(
    change: Callable[[Workplace], None], place: Workplace, encoded: list[int]
) -> None:
    for number in range(16):
        place.write_video(number)
    folder = place.run(shard_size=3)
    clips = {c.key: (c.sha256, c.caption) for c in read_manifest(place.results / "own" / "clips")}
    old, bytes_before = shard_keys(folder), {sha256(p) for p in folder.glob("*.tar")}
    assert sum(encoded) == 16
    encoded.clear()
    change(place)
    place.run(shard_size=3)
    clips_now = {c.key: (c.sha256, c.caption) for c in read_manifest(place.results / "own" / "clips")}
    same = {keys for keys in old.values() if all(clips_now.get(key) == clips[key] for key in keys)}
    new = shard_keys(folder)
    kept = [shard for shard, keys in new.items() if keys in same]
    assert sum(encoded) == sum(len(keys) for shard, keys in new.items() if shard not in kept)
    assert 0 < sum(encoded) <= 8
    assert counts(folder) == {"clips": len(clips_now), "shards": len(new), "shards_taken_over": len(kept)}
    assert {sha256(folder / shard) for shard in kept} <= bytes_before
    assert file_hashes(place.copy().run(shard_size=3)) == file_hashes(folder), "as if everything had been encoded"


def synthetic(keys: Sequence[int]) -> list[Clip]:
    names = sorted(f"train-{np.random.default_rng(k).bytes(8).hex()}" for k in keys)
    return [Clip(name, "", "train", "", 1, 1, 1.0, "") for name in names]


@pytest.mark.parametrize("size", [1, 4, 32])
def test_cuts_between_shards_fall_where_they_fell_before(size: int) -> None:
    """One clip replaced, one added and one removed in a thousand: few shards differ."""

    def parts(keys: Sequence[int]) -> set[tuple[str, ...]]:
        return {tuple(c.key for c in part) for part in _cut(synthetic(keys), size)}

    before = parts(range(1000))
    assert sum(map(len, before)) == 1000 and max(map(len, before)) <= size
    assert 1000 / size <= len(before) <= 2.2 * 1000 / size
    for seed in range(10):
        keys = list(range(1000))
        keys[seed * 97] = 5000 + seed
        assert len(parts(keys) - before) <= 12
        assert len(parts([*range(1000), 6000 + seed]) - before) <= 8
        assert len(parts([k for k in range(1000) if k != seed * 89]) - before) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder"])
def test_a_changed_encoder_encodes_everything_again(part: str, place: Workplace, encoded: list[int]) -> None:
    folder = place.run(world=True)
    before = all_tensors(folder)
    place.change_weights(part)
    encoded.clear()
    place.run(world=True)
    assert sum(encoded) == 9 and counts(folder)["shards_taken_over"] == 0
    names = {"vae": {"x0", "condition"}, "text_encoder": {"text"}, "image_encoder": {"image"}}[part]
    for key, tensors in all_tensors(folder).items():
        assert {name for name, value in tensors.items() if not torch.equal(value, before[key][name])} == names


def test_a_changed_transformer_or_scheduler_encodes_nothing_again(place: Workplace, encoded: list[int]) -> None:
    folder = place.run(world=True)
    encoded.clear()
    place.change_weights("transformer")
    scheduler = place.teacher / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.unlink()
    scheduler.write_text(json.dumps({**config, "shift": 5.0}))
    before, date = file_hashes(folder), (folder / PROVENANCE).stat().st_mtime_ns
    place.run(world=True)
    assert (folder / PROVENANCE).stat().st_mtime_ns != date, "the stage ran, because its input changed"
    assert encoded == [] and file_hashes(folder) == before


@pytest.mark.parametrize(
    ("change", "again"),
    [({"negative_prompt": "blurred"}, 0), ({"batch_size": 1}, 0), ({"dtype": "bfloat16"}, 9)],
    ids=str,
)
def test_settings_encode_again_only_what_they_touch(
    change: dict, again: int, place: Workplace, encoded: list[int]
) -> None:
    folder = place.run(world=True)
    negative = load_file(folder / "negative.safetensors")["text"]
    encoded.clear()
    place.run(world=True, **change)
    assert sum(encoded) == again
    same = load_file(folder / "negative.safetensors")["text"].shape == negative.shape
    assert same == ("negative_prompt" not in change)


# Damage


def flip(path: Path, place: int) -> None:
    """Change one bit of one byte; other links to the file keep its old content."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["header", "tensors", "end"])
def test_a_changed_byte_of_a_clip_is_found_by_whoever_reads_it_and_by_no_other(
    share: float, finished: tuple[Workplace, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[1], tmp_path / "latents")
    dataset = LatentDataset(folder, "train")
    (largest, _), *_ = Counter(entry.shard for entry in dataset.entries).most_common()
    bad, other, *_ = (number for number, entry in enumerate(dataset.entries) if entry.shard == largest)
    entry = dataset.entries[bad]
    shard = folder / entry.shard
    flip(shard, entry.offset + int(share * (entry.size - 1)))
    dataset.batch([other])
    for read in (dataset.tensors, lambda number: dataset.batch([other, number])):
        with pytest.raises(ArtifactError, match=f"{shard.name} is damaged: .* {entry.key}; run its stage again"):
            read(bad)
    with pytest.raises(ArtifactError, match=f"{shard.name} is damaged; run its stage again: `vpae latents`"):
        dataset.first_frame(other)  # which has no hash of its own
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"{shard.name}.*run its stage again: `vpae latents`"):
        dataset.tensors(other)


def test_latents_that_were_made_before_clips_had_hashes_are_read_and_their_shards_checked(
    finished: tuple[Workplace, Path], tmp_path: Path
) -> None:
    """Encoding them again would take days at 14B."""
    folder = shutil.copytree(finished[1], tmp_path / "latents")
    older = json.loads((folder / INDEX).read_text())
    for entry in older["entries"]:
        del entry["sha256"]
    (folder / INDEX).write_text(json.dumps(older, indent=2))
    dataset, now = LatentDataset(folder, "train"), LatentDataset(finished[1], "train")
    assert all(torch.equal(value, now.tensors(0)[name]) for name, value in dataset.tensors(0).items())
    shard = folder / dataset.entries[0].shard
    flip(shard, dataset.entries[0].offset)
    with pytest.raises(ArtifactError, match=f"{shard.name} is damaged; run its stage again: `vpae latents`"):
        LatentDataset(folder, "train").tensors(0)


def test_a_clip_is_read_without_the_rest_of_its_shard(
    finished: tuple[Workplace, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of 14B has a gigabyte, a clip of it 28 megabytes, and a batch has any clips."""
    hashed: list[str] = []
    monkeypatch.setattr("vbench_i2v.files._HASHES", {})
    monkeypatch.setattr("vbench_i2v.files.sha256", lambda path: hashed.append(path.name) or sha256(path))
    dataset = LatentDataset(finished[1], "train")
    dataset.batch([*range(len(dataset))])
    assert hashed == []
    for _ in range(2):
        dataset.first_frame(0)
    assert hashed == [dataset.entries[0].shard]


def test_a_changed_byte_in_a_shard_stops_the_training_by_name_and_is_not_taken_over(
    place: Workplace, encoded: list[int], capsys: pytest.CaptureFixture
) -> None:
    folder = place.run(world=True)
    before = file_hashes(folder)
    shard = sorted(folder.glob("train-*.tar"))[0]
    flip(shard, shard.stat().st_size // 2)
    training = load(place.source(world=True).path, ["priming.training={steps: 3, batch_size: 6}"])
    with pytest.raises(ArtifactError, match=f"{shard.name} is damaged: .*; run its stage again: `vpae latents`"):
        run_stage(training, "priming", place.results)
    assert not (place.results / "own" / "priming").exists()
    encoded.clear()
    place.run(world=True)
    assert file_hashes(folder) == before and sum(encoded) == len(shard_keys(folder)[shard.name])
    assert f"{shard} is damaged; its clips are encoded again" in capsys.readouterr().err


def test_a_changed_byte_in_a_clip_stops_its_encoding_by_name(place: Workplace) -> None:
    source = place.source(world=True)
    clips, _ = (run_stage(source, stage, place.results) for stage in STAGES[:2])
    video = sorted((clips / "videos").iterdir())[-1]
    flip(video, video.stat().st_size // 2)
    with pytest.raises(ArtifactError, match=rf"{video.name} is missing or has changed since .*; run the clips stage"):
        run_stage(source, "latents", place.results)
    assert not (place.results / "own" / "latents").exists()


@pytest.mark.parametrize("stage", ["clips", "teacher"])
def test_a_part_refuses_a_changed_byte_too(stage: str, place: Workplace) -> None:
    source = place.source(world=True)
    folders = {name: run_stage(source, name, place.results) for name in STAGES[:2]}
    name = {"clips": "manifest.parquet", "teacher": "vae/config.json"}[stage]
    flip(folders[stage] / name, 10)
    with pytest.raises(ArtifactError, match=f"{stage}/{name} is damaged; run its stage again"):
        run_part(source, "latents", Part(1, 2), place.results)


# Interruption


class Stop(BaseException):
    """Stands for whatever ends a process in the middle."""


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_killed_run_is_taken_up_after_its_last_finished_shard(
    calls: int, finished: tuple[Workplace, Path], place: Workplace, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder stops in the call after so many; each call here is one clip, each shard up to two."""
    counting = Encoders.videos

    def stopping(self: Encoders, frames_BTHW3: np.ndarray) -> torch.Tensor:
        if len(encoded) == calls:
            raise Stop
        return counting(self, frames_BTHW3)

    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "videos", stopping)
        with pytest.raises(Stop):
            place.run(world=True, batch_size=1)
    folder = place.results / "own" / "latents"
    assert not folder.exists()
    encoded.clear()
    assert place.run(world=True, batch_size=1) == folder
    sizes = [len(keys) for keys in shard_keys(folder).values()]
    done = sum(np.cumsum(sizes) <= calls)
    assert counts(folder)["shards_taken_over"] == done
    assert sum(encoded) == 9 - sum(sizes[:done])
    uninterrupted = place.copy(place.results / "own" / "clips").run(world=True, batch_size=1)
    assert file_hashes(folder) == file_hashes(uninterrupted)
    assert list((place.results / "own" / ".state").glob("latents-*")) == [], "nothing is left to resume from"


def test_an_interruption_leaves_the_old_latents_intact(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place.run(world=True)
    before = (file_hashes(folder), (folder / PROVENANCE).read_bytes())

    def stop(*_: object) -> None:
        raise Stop

    place.change_weights("vae")
    monkeypatch.setattr(Encoders, "videos", stop)
    with pytest.raises(Stop):
        place.run(world=True)
    assert (file_hashes(folder), (folder / PROVENANCE).read_bytes()) == before


def test_a_video_that_changed_since_it_was_catalogued_stops_the_stage_and_is_named(place: Workplace) -> None:
    for number in range(6):
        place.write_video(number)
    source = place.source()
    for stage in STAGES[:2]:
        run_stage(source, stage, place.results)
    place.write_video(100).replace(place.videos / "clip-3.mp4")
    with pytest.raises(ArtifactError, match=r"clip-3\.mp4 is missing or has changed"):
        run_stage(source, "latents", place.results)
    assert not (place.results / "own" / "latents").exists()


def test_without_clips_the_stage_says_which_one_to_run(place: Workplace) -> None:
    with pytest.raises(ArtifactError, match=r"own/clips is missing or unfinished; run its stage \(clips\) first"):
        run_stage(place.source(world=True), "latents", place.results)
