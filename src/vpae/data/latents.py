"""Stage `latents`: every clip encoded once, in WebDataset shards.

One `KEY.safetensors` per clip holds `x0` (16, F, H, W), `condition` (16, F, H, W), `image` (N, D) and `text` (L, D, up
to the caption's end); `KEY.png` is its first frame, `KEY.json` its caption. `index.json` says where each clip's bytes
lie, so that clips can also be read one by one, what captions are padded to, and the hashes of clips and encoders.
`negative.safetensors` is the empty caption, for guidance.

A shard whose clips and encoders are unchanged is taken over from the last run, finished or not.
"""

import io
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from webdataset import TarWriter

from vpae.artifacts import digest, file_hashes, link, read_provenance, write_json
from vpae.config import Experiment
from vpae.data.catalog import SPLITS, Clip, read_manifest
from vpae.data.encoding import Encoders, pad_text
from vpae.models.wan import Condition, first_frame_mask, load_pipeline, text_tokens_for
from vpae.progress import Progress

INDEX = "index.json"
ENCODERS = ("vae/", "text_encoder/", "tokenizer/", "image_encoder/", "image_processor/")


@dataclass(frozen=True)
class Entry:
    """Where one clip's safetensors lie."""

    key: str
    split: str
    caption: str
    clip_sha256: str
    shard: str
    offset: int
    size: int


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Encode all clips; returns counts of clips and shards, and of shards taken over."""
    clips = read_manifest(inputs["clips"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(inputs["teacher"], transformer=None).to(device)
    encoders = Encoders(pipeline)
    encoder_hash = _encoder_hash(inputs["teacher"])
    state.mkdir(parents=True, exist_ok=True)
    previous = [state, out.parent / "latents"]
    progress, entries, reused = Progress(len(clips), "latents"), [], 0
    shards = [(split, part) for split in SPLITS for part in _parts(clips, split, settings.latents.shard_size)]
    for number, (split, part) in enumerate(shards):
        name = f"{split}-{number:05d}.tar"
        # Everything that determines the shard's bytes.
        made_of = [(clip.key, clip.sha256, clip.caption) for clip in part]
        recipe = digest([encoder_hash, settings.latents.dtype, settings.geometry.model_dump(), made_of])
        if _take_over(previous, recipe, out / name):
            reused += 1
        else:
            _encode_shard(part, settings, inputs["clips"], encoders, state / name)
            link(state / name, out / name)
            (state / f"{name}.recipe").write_text(recipe)
        (out / f"{name}.recipe").write_text(recipe)
        entries += _entries(out / name, split, part)
        progress.update(len(part))
    progress.close()
    negative = settings.latents.negative_prompt
    save_file({"text": encoders.texts([negative])[0]}, out / "negative.safetensors")
    tokens = text_tokens_for(encoders.longest_text([negative, *{clip.caption for clip in clips}]))
    write_json(out / INDEX, {"encoders": encoder_hash, "text_tokens": tokens, "entries": [asdict(e) for e in entries]})
    return {"clips": len(clips), "shards": len(shards), "shards_taken_over": reused}


def _encoder_hash(teacher: Path) -> str:
    """Digest of the parts of the teacher's folder that encode."""
    provenance = read_provenance(teacher)
    hashes = provenance["outputs"] if provenance else file_hashes(teacher)
    return digest({name: value for name, value in hashes.items() if name.startswith(ENCODERS)})


def _parts(clips: list[Clip], split: str, size: int) -> list[list[Clip]]:
    """Cut one split into shards of at most `size` clips.

    About one clip in `size` starts a shard because of its key: after a clip that came or went, the cuts soon fall where
    they fell before, and all later shards stay as they are.
    """
    parts: list[list[Clip]] = []
    for clip in (c for c in clips if c.split == split):
        starts = int(digest(clip.key)[:8], 16) % size == 0
        if not parts or starts or len(parts[-1]) == size:
            parts.append([])
        parts[-1].append(clip)
    return parts


def _take_over(folders: list[Path], recipe: str, target: Path) -> bool:
    """Link an existing shard with the same recipe."""
    for folder in folders:
        for path in folder.glob("*.recipe"):
            shard = path.with_suffix("")
            if path.read_text() == recipe and shard.is_file():
                link(shard, target)
                return True
    return False


def _encode_shard(part: list[Clip], settings: Experiment, folder: Path, encoders: Encoders, path: Path) -> None:
    dtype, geometry, step = getattr(torch, settings.latents.dtype), settings.geometry, settings.latents.batch_size
    temporary = path.with_suffix(".tmp")
    with TarWriter(str(temporary), mtime=0, user="vpae", group="vpae") as tar:
        for start in range(0, len(part), step):
            batch = part[start : start + step]
            frames_BTHW3 = np.stack([clip.frames(geometry, folder) for clip in batch])
            first = list(frames_BTHW3[:, 0])
            x0, condition = encoders.videos(frames_BTHW3), encoders.conditions(first, geometry.frames)
            image, text = encoders.images(first), encoders.texts([clip.caption for clip in batch])
            for i, clip in enumerate(batch):
                tensors = {"x0": x0[i], "condition": condition[i], "image": image[i], "text": text[i]}
                png = io.BytesIO()
                Image.fromarray(first[i]).save(png, format="PNG")
                tar.write(
                    {
                        "__key__": clip.key,
                        "safetensors": save({k: v.to(dtype).contiguous() for k, v in tensors.items()}),
                        "png": png.getvalue(),
                        "json": json.dumps({"caption": clip.caption}).encode(),
                    }
                )
    temporary.replace(path)


def _entries(shard: Path, split: str, part: list[Clip]) -> list[Entry]:
    with tarfile.open(shard) as tar:
        members = {m.name: m for m in tar.getmembers()}
    found = []
    for clip in part:
        member = members[f"{clip.key}.safetensors"]
        found.append(Entry(clip.key, split, clip.caption, clip.sha256, shard.name, member.offset_data, member.size))
    return found


class LatentDataset:
    """Random access to one split of a latents folder."""

    def __init__(self, folder: Path, split: str):
        index = json.loads((folder / INDEX).read_text())
        self.folder = folder
        self.entries = [Entry(**e) for e in index["entries"] if e["split"] == split]
        self.text_tokens = index["text_tokens"]
        self.empty_text_LD = pad_text(load_file(folder / "negative.safetensors")["text"].float(), self.text_tokens)

    def __len__(self) -> int:
        return len(self.entries)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """x0, condition, image and text of one clip, as stored."""
        entry = self.entries[number]
        with (self.folder / entry.shard).open("rb") as file:
            file.seek(entry.offset)
            return load(file.read(entry.size))

    def first_frame(self, number: int) -> Image.Image:
        """The first frame, as it went into the image encoder."""
        entry = self.entries[number]
        with tarfile.open(self.folder / entry.shard) as tar:
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
