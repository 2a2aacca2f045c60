"""Stage `latents`: every clip encoded once, in WebDataset shards.

One `KEY.safetensors` per clip holds `x0` (16, F, H, W), `condition` (16, F, H, W), `image` (N, D) and `text` (L, D, up
to the caption's end); `KEY.png` is its first frame, `KEY.json` its caption and the safetensors' sha256. `index.json`
says where each clip's bytes lie and what they hash to, so that clips can also be read one by one, what captions are
padded to, and the hashes of clips and encoders. `negative.safetensors` is the empty caption, for guidance.

A shard whose clips and encoders are unchanged is taken over from the last run, finished or not. Whoever reads a clip
compares its bytes with the index. The stage itself holds the clips of a few shards at a time, however many there are.
"""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from webdataset import TarWriter

from vpae.ahead import Ahead
from vpae.artifacts import ArtifactError, content, digest, file_hashes, is_kept, kept, link, read_provenance, reading
from vpae.config import Experiment
from vpae.data.catalog import SPLITS
from vpae.data.encoding import Encoders, pad_text
from vpae.data.index import INDEX, Entry, read_index, write_index
from vpae.data.manifest import Clip, count_clips, iterate_manifest
from vpae.models.wan import Condition, first_frame_mask, load_pipeline, text_tokens_for
from vpae.parts import Part
from vpae.preemption import Interruption, Request
from vpae.progress import Progress

SHARDS_AT_ONCE = 8  # that are hashed beside each other
AGAIN = "run its stage again: `vpae latents` makes it anew"
ENCODERS = ("vae/", "text_encoder/", "tokenizer/", "image_encoder/", "image_processor/")


@dataclass(frozen=True)
class Shard:
    """Clips of one split that are stored in one file, and a digest of everything that determines its bytes."""

    name: str
    clips: list[Clip]
    recipe: str


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Encode all clips; returns counts of clips and shards, and of shards taken over."""
    clips, encoders = count_clips(inputs["clips"]), _encoders(inputs)
    encoded = _complete(_shards(settings, inputs), clips, settings, inputs, state, encoders, "latents")
    negative, shards = settings.latents.negative_prompt, 0
    save_file({"text": encoders().texts([negative])[0]}, out / "negative.safetensors")
    longest = max(encoders().lengths([negative]))
    for shard in _shards(settings, inputs):
        link(_in_state(state, shard), out / shard.name)
        (out / f"{shard.name}.recipe").write_text(shard.recipe)
        longest = max(longest, *encoders().lengths([*{clip.caption for clip in shard.clips}]))
        shards += 1
    head = {"encoders": _encoder_hash(inputs["teacher"]), "text_tokens": text_tokens_for(longest)}
    shards_again = _shards(settings, inputs)
    write_index(out / INDEX, head, (e for shard in shards_again for e in _entries(out / shard.name, shard.clips)))
    return {"clips": clips, "shards": shards, "shards_taken_over": shards - encoded}


def part(settings: Experiment, inputs: dict[str, Path], state: Path, part: Part) -> None:
    """Encode one part's share of the shards into the state folder."""
    mine = islice(_shards(settings, inputs), part.number - 1, None, part.of)
    about = count_clips(inputs["clips"]) // part.of
    _complete(mine, about, settings, inputs, state, _encoders(inputs), f"latents {part}")


def _shards(settings: Experiment, inputs: dict[str, Path]) -> Iterator[Shard]:
    """The shards that all clips are to be stored in."""
    number = count()
    made_with = [_encoder_hash(inputs["teacher"]), settings.latents.dtype, settings.geometry.model_dump()]
    for split in SPLITS:
        for members in _cut(iterate_manifest(inputs["clips"], split), settings.latents.shard_size):
            made_of = [(clip.key, clip.sha256, clip.caption) for clip in members]
            yield Shard(f"{split}-{next(number):05d}.tar", members, digest([*made_with, made_of]))


def _complete(
    shards: Iterable[Shard],
    clips: int,
    settings: Experiment,
    inputs: dict[str, Path],
    state: Path,
    encoders: Callable[[], Encoders],
    label: str,
) -> int:
    """See that each shard, of about so many clips in all, is in the state folder; returns how many had to be encoded.

    Raises:
        Interruption: asked to end; finished shards are kept.
    """
    state.mkdir(parents=True, exist_ok=True)
    previous = _recipes(state.parents[1] / "latents")
    progress, encoded = Progress(clips, label), 0
    shards = iter(shards)

    def kept_ones(pool: ThreadPoolExecutor) -> Iterator[tuple[Shard, bool]]:
        while some := list(islice(shards, SHARDS_AT_ONCE)):
            yield from zip(some, pool.map(lambda shard: is_kept(_in_state(state, shard)), some), strict=True)

    with Interruption.watch() as request, ThreadPoolExecutor() as pool:
        for shard, there in kept_ones(pool):
            path = _in_state(state, shard)
            if request.requested:
                raise Interruption(f"{label}: {encoded} more shards are in {state}")
            if there:
                pass
            elif shard.recipe in previous and _is_whole(*previous[shard.recipe]):
                with kept(path) as temporary:
                    link(previous[shard.recipe][0], temporary)
            else:
                with kept(path) as temporary:
                    if not encode_shard(shard.clips, settings, inputs["clips"], encoders(), temporary, request):
                        raise Interruption(f"{label}: {encoded} more shards are in {state}")
                encoded += 1
            progress.update(len(shard.clips))
    progress.close()
    return encoded


def _in_state(state: Path, shard: Shard) -> Path:
    return state / f"{shard.recipe}.tar"


def _encoders(inputs: dict[str, Path]) -> Callable[[], Encoders]:
    """The teacher's encoders, loaded at the first call: not at all where everything is encoded."""

    @cache
    def load_them() -> Encoders:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Encoders(load_pipeline(inputs["teacher"], transformer=None).to(device))

    return load_them


def _encoder_hash(teacher: Path) -> str:
    """Digest of the parts of the teacher's folder that encode."""
    provenance = read_provenance(teacher)
    hashes = provenance["outputs"] if provenance else file_hashes(teacher)
    return digest({name: value for name, value in hashes.items() if name.startswith(ENCODERS)})


def _cut(clips: Iterable[Clip], size: int) -> Iterator[list[Clip]]:
    """Cut one split into shards of at most `size` clips.

    About one clip in `size` starts a shard because of its key: after a clip that came or went, the cuts soon fall where
    they fell before, and all later shards stay as they are.
    """
    members: list[Clip] = []
    for clip in clips:
        starts = int(digest(clip.key)[:8], 16) % size == 0
        if members and (starts or len(members) == size):
            yield members
            members = []
        members.append(clip)
    if members:
        yield members


def _recipes(folder: Path) -> dict[str, tuple[Path, str]]:
    """Recipe -> shard of an earlier result, and the hash that it was finished with."""
    recorded = (read_provenance(folder) or {"outputs": {}})["outputs"]
    found = {}
    for name, wanted in recorded.items():
        path = folder / name
        if path.suffix == ".recipe" and path.is_file() and content(path) == wanted:
            found[path.read_text()] = (path.with_suffix(""), recorded.get(name.removesuffix(".recipe"), ""))
    return found


def _is_whole(shard: Path, wanted: str) -> bool:
    """Whether a shard's bytes are those that it was finished with; says so where they are not."""
    if shard.is_file() and content(shard) == wanted:
        return True
    print(f"vpae: {shard} is damaged; its clips are encoded again", file=sys.stderr)
    return False


def encode_shard(
    clips: list[Clip], settings: Experiment, folder: Path, encoders: Encoders, path: Path, request: Request
) -> bool:
    """Write a shard, decoding one batch while another is encoded; returns whether it is whole.

    It is not after a request to end.
    """
    dtype, geometry, step = getattr(torch, settings.latents.dtype), settings.geometry, settings.latents.batch_size
    batches = [clips[start : start + step] for start in range(0, len(clips), step)]
    decoded = Ahead(lambda number: np.stack([clip.frames(geometry, folder) for clip in batches[number]]), len(batches))
    with TarWriter(str(path), mtime=0, user="vpae", group="vpae") as tar:
        for number, batch in enumerate(batches):
            if request.requested:
                return False
            frames_BTHW3 = decoded(number)
            encoded = encoders.clips(frames_BTHW3, [clip.caption for clip in batch])
            for i, clip in enumerate(batch):
                png = io.BytesIO()
                Image.fromarray(frames_BTHW3[i, 0]).save(png, format="PNG")
                stored = save({k: v[i].to(dtype).contiguous() for k, v in encoded.items()})
                told = {"caption": clip.caption, "sha256": hashlib.sha256(stored).hexdigest()}
                files = {"safetensors": stored, "png": png.getvalue(), "json": json.dumps(told).encode()}
                tar.write({"__key__": clip.key, **files})
    return True


def _entries(shard: Path, clips: list[Clip]) -> Iterator[Entry]:
    with tarfile.open(shard) as tar:
        members = {m.name: m for m in tar.getmembers()}
        for clip in clips:
            member, told = members[f"{clip.key}.safetensors"], json.load(tar.extractfile(members[f"{clip.key}.json"]))
            place = shard.name, member.offset_data, member.size
            yield Entry(clip.key, clip.split, clip.caption, clip.sha256, *place, told.get("sha256", ""))


class LatentDataset:
    """Random access to one split of a latents folder.

    All that read raise ArtifactError, naming the shard, where it is missing or what is read of it has changed since its
    stage finished. For what has no hash of its own, as first frames, the whole shard is hashed, once.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.whole = folder, set[str]()
        self.recorded = (read_provenance(folder) or {"outputs": {}})["outputs"]
        with reading(folder / INDEX, AGAIN):
            head, self.entries = read_index(folder / INDEX, split)
            self.text_tokens = head["text_tokens"]
        with reading(folder / "negative.safetensors", AGAIN):
            self.empty_text_LD = pad_text(load_file(folder / "negative.safetensors")["text"].float(), self.text_tokens)

    def __len__(self) -> int:
        return len(self.entries)

    def _whole(self, shard: str) -> Path:
        """Where an undamaged shard is; without a provenance there is nothing to compare it with."""
        path = self.folder / shard
        if shard not in self.whole:
            if not path.is_file() or self.recorded.get(shard) not in (None, content(path)):
                raise ArtifactError(f"{path} is damaged; {AGAIN}")
            self.whole.add(shard)
        return path

    def tensors(self, number: int) -> dict[str, Tensor]:
        """x0, condition, image and text of one clip, as stored."""
        entry = self.entries[number]
        path = self.folder / entry.shard if entry.sha256 else self._whole(entry.shard)
        with reading(path, AGAIN), path.open("rb") as file:
            file.seek(entry.offset)
            stored = file.read(entry.size)
        if entry.sha256 and hashlib.sha256(stored).hexdigest() != entry.sha256:
            raise ArtifactError(f"{path} is damaged: other bytes than were encoded stand for {entry.key}; {AGAIN}")
        return load(stored)

    def first_frame(self, number: int) -> Image.Image:
        """The first frame, as it went into the image encoder."""
        entry = self.entries[number]
        path = self._whole(entry.shard)
        with reading(path, AGAIN), tarfile.open(path) as tar:
            return Image.open(io.BytesIO(tar.extractfile(f"{entry.key}.png").read())).convert("RGB")

    def batch(self, numbers: list[int], device: torch.device | str = "cpu") -> tuple[Tensor, Condition]:
        """Latents x0 (B, 16, F, H, W) and the condition of several clips, float32."""
        clips = [self.tensors(n) for n in numbers]
        x0 = torch.stack([c["x0"] for c in clips]).float()
        frame = torch.stack([c["condition"] for c in clips]).float()
        condition = Condition(
            frame_BCFHW=torch.cat([first_frame_mask(len(clips), *x0.shape[2:]), frame], dim=1).to(device),
            image_BND=torch.stack([c["image"] for c in clips]).float().to(device),
            text_BLD=torch.stack([pad_text(c["text"].float(), self.text_tokens) for c in clips]).to(device),
            empty_text_LD=self.empty_text_LD.to(device),
        )
        return x0.to(device), condition
