"""Teacher folders from elsewhere: whether one is what the stages can load, and its digest. Needs no torch."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vpae.artifacts import ArtifactError, digest, sha256, write_json
from vpae.config import Experiment
from vpae.graph import RESULTS

NETWORKS = ("transformer", "vae", "text_encoder", "image_encoder")
COMPONENTS = (*NETWORKS, "tokenizer", "image_processor", "scheduler")
KNOWN = RESULTS / ".hashes.json"  # of large files, by size, date and inode
LARGE = 100_000_000


def external_inputs(settings: Experiment) -> dict[str, str]:
    """Name -> digest of the content of a teacher folder that comes from elsewhere; empty where there is none.

    Raises:
        ArtifactError: it is no pipeline folder.
    """
    name = settings.teacher.path if settings.teacher.source == "folder" else settings.teacher.start
    if not name:
        return {}
    folder = checked(Path(name))
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {name: digest({p.relative_to(folder).as_posix(): h for p, h in zip(files, _hashes(files), strict=True)})}


def _hashes(files: list[Path]) -> list[str]:
    """The sha256 of each file; large ones are not read again while size, date and inode stay."""
    known = json.loads(KNOWN.read_text()) if KNOWN.is_file() else {}
    learnt: dict[str, str] = {}

    def hash_of(path: Path) -> str:
        stat = path.stat()
        if stat.st_size < LARGE:
            return sha256(path)
        state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        if state not in known:
            learnt[state] = sha256(path)
        return known.get(state) or learnt[state]

    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_of, files))
    if learnt:
        KNOWN.parent.mkdir(exist_ok=True)
        write_json(KNOWN, known | learnt)
    return hashes


def checked(folder: Path) -> Path:
    """The folder, if it is a pipeline's.

    Raises:
        ArtifactError: naming what it lacks.
    """
    missing = [name for name in ("model_index.json", *COMPONENTS) if not (folder / name).exists()]
    if missing:
        raise ArtifactError(
            f"{folder}, named by teacher.path or teacher.start, is not a WanImageToVideoPipeline folder: it lacks "
            f"{', '.join(missing)}; download the model in diffusers format, or run `dvc pull` if DVC versions it"
        )
    return folder
