"""Teacher folders, and weights beside them, from elsewhere: whether they can be loaded, and digests. Needs no torch."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from vbench_i2v.files import tree
from vpae.artifacts import PROVENANCE, ArtifactError, digest, read_provenance, reading, sha256, write_json
from vpae.config import Experiment
from vpae.config.teacher import file_and_strength
from vpae.graph import RESULTS, STAGES

NETWORKS = ("transformer", "vae", "text_encoder", "image_encoder")
COMPONENTS = (*NETWORKS, "tokenizer", "image_processor", "scheduler")
TOKENIZERS = ("tokenizer.json", "spiece.model")
KNOWN = RESULTS / ".hashes.json"  # of large files, by size, date and inode
_KNOWN_HERE: dict[str, str] = {}  # the same, of this process
LARGE = 100_000_000
STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' and of transformers' weights
SQUARE, ADDED = ("to_q", "to_k", "to_v", "to_out.0"), ("add_k_proj", "add_v_proj")


def external_inputs(settings: Experiment) -> dict[str, str]:
    """Name -> digest of the content of the teacher's folder and LoRAs that come from elsewhere; empty without any.

    Raises:
        ArtifactError: it is no pipeline folder, or a LoRA's file is not whole.
    """
    found = {str(file): _lora_identity(file) for file, _ in map(file_and_strength, settings.teacher.loras)}
    name = settings.teacher.path if settings.teacher.source == "folder" else settings.teacher.start
    if not name:
        return found
    folder = checked(Path(name))
    files = [p for p in tree(folder, hidden_folders=True) if p.is_file()]
    hashes = zip(files, _hashes(files), strict=True)
    return found | {name: digest({p.relative_to(folder).as_posix(): h for p, h in hashes})}


def decoder_inputs(settings: Experiment) -> dict[str, str]:
    """Name -> digest of the file of a small decoder; empty without one.

    Raises:
        ArtifactError: there is no such file.
    """
    if not (name := settings.samples.decoder):
        return {}
    if not Path(name).is_file():
        raise ArtifactError(f"samples.decoder: {name} does not exist; correct the key, or bring the file")
    return {name: sha256(Path(name))}


def _lora_identity(file: Path) -> str:
    """Of a LoRA's file, and of what is said beside it of its scale."""
    header(file)  # refuses what is not whole
    files = [path for path in (file, file.with_name("adapter_config.json")) if path.is_file()]
    return digest(_hashes(files))


def _hashes(files: list[Path]) -> list[str]:
    """The sha256 of each file; large ones are not read again while size, date and inode stay."""
    before: dict[str, str] = {}
    with suppress(OSError, ValueError):  # nothing is known yet, or nothing any more
        before = json.loads(KNOWN.read_text())
    known = before | _KNOWN_HERE

    def hash_of(path: Path) -> str:
        stat = path.stat()
        if stat.st_size < LARGE:
            return sha256(path)
        state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        if state not in known:
            known[state] = sha256(path)
        return known[state]

    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_of, files))
    _KNOWN_HERE.update(known)
    if known != before and KNOWN.parent.is_dir():  # elsewhere there is nothing to speed up
        with suppress(OSError):
            write_json(KNOWN, known)
    return hashes


def require_whole(path: Path) -> None:
    """Refuse a model's folder, or a file, of a finished stage if its weights or settings are not what the stage wrote.

    Raises:
        ArtifactError: naming the first such file. What is no stage's has nothing to be compared with.
    """
    stage = next((folder for folder in (path, *path.parents[:2]) if (folder / PROVENANCE).is_file()), None)
    if stage is None:
        return
    recorded = {stage / name: value for name, value in read_provenance(stage)["outputs"].items()}
    mine = [file for file in recorded if file.is_relative_to(path) and file.suffix in (".safetensors", ".json")]
    missing = [file for file in mine if not file.is_file()]
    wrong = missing or [f for f, found in zip(mine, _hashes(mine), strict=True) if found != recorded[f]]
    if wrong:
        again = f"run `vpae {stage.name}`, which makes it anew" if stage.name in STAGES else "bring it once more"
        raise ArtifactError(
            f"{wrong[0]} is damaged or was changed; {again}. To use a model that you have changed, copy it out of "
            f"{stage.parent}"
        )


def checked(folder: Path) -> Path:
    """The folder, if it is an image-to-video pipeline that can be loaded.

    Raises:
        ArtifactError: naming what it lacks, or why it cannot be taken.
    """
    if found := faults(folder):
        raise ArtifactError("\n".join(found))
    return folder


def faults(folder: Path) -> list[str]:
    """Why a pipeline folder cannot be loaded, from its configuration and the headers of its weights."""
    if found := unsupported(folder):
        return found
    missing = [name for name in ("model_index.json", *COMPONENTS) if not (folder / name).exists()]
    if missing:
        return [
            f"{folder} is not a WanImageToVideoPipeline folder: it lacks {', '.join(missing)}; download the model in "
            "diffusers format, or run `dvc pull` if DVC versions it"
        ]
    for network in NETWORKS:
        try:
            there, config = headers(folder / network), read_table(folder / network / "config.json")
            if network == "transformer":
                with reading(folder / network / "config.json", "download it again"):
                    found += _other_than(config, there)
        except ArtifactError as error:
            found.append(str(error))
    # Half a download may leave these small ones out, or cut off.
    files = [folder / "scheduler" / "scheduler_config.json"]
    files += (file for part in ("tokenizer", "image_processor") for file in sorted((folder / part).glob("*.json")))
    for file in files:
        try:
            read_table(file)
        except ArtifactError as error:
            found.append(str(error))
    if not any((folder / "tokenizer" / name).is_file() for name in TOKENIZERS):
        found.append(f"{folder}/tokenizer: holds neither {' nor '.join(TOKENIZERS)}; download it again")
    return [line if line.startswith(str(folder)) else f"{folder}/transformer: {line}" for line in found]


def unsupported(folder: Path) -> list[str]:
    """Why a folder's model is of another kind than this project distils, by what is there: its parts are others."""
    try:
        files = folder / "model_index.json", folder / "transformer" / "config.json"
        kind = _unsupported(*(read_table(file) if file.exists() else None for file in files))
    except ArtifactError as error:
        return [str(error)]
    if kind:
        return [f"{folder}: {kind}; name a Wan2.1 image-to-video model, e.g. Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"]
    return []


def read_table(path: Path) -> dict:
    """A file of a pipeline's folder that holds a JSON object.

    Raises:
        ArtifactError: it is missing, or holds something else.
    """
    with reading(path, "not of a pipeline in diffusers format: download it again"):
        if isinstance(found := json.loads(path.read_text()), dict):
            return found
        raise TypeError(f"a {type(found).__name__}")


def _unsupported(pipeline: dict | None, transformer: dict | None) -> str:
    """The kind of a model that is not the one this project distils; empty for Wan2.1's image-to-video models."""
    index, config = pipeline or {}, transformer or {}
    if index.get("transformer_2") not in (None, [None, None]):
        return "it has two experts (transformer_2, as Wan2.2-A14B), of which the second would be ignored"
    if index.get("expand_timesteps"):
        return "it gives each token a time of its own (expand_timesteps, as Wan2.2-TI2V-5B)"
    if config.get("pos_embed_seq_len") is not None:
        return "it takes a last frame as well (FLF2V: transformer pos_embed_seq_len)"
    if config.get("in_channels") == 52:
        return "it takes a control video (Fun-Control: transformer in_channels = 52)"
    if config.get("in_channels") == 16:
        return "it takes no first frame (text-to-video: transformer in_channels = 16)"
    channels = config.get("in_channels"), config.get("out_channels")
    if transformer is not None and channels != (36, 16):
        return f"its transformer has in_channels and out_channels = {channels}, not (36, 16)"
    if transformer is not None and None in (config.get("image_dim"), config.get("added_kv_proj_dim")):
        return "its transformer does not look at the image's embedding (image_dim, as in Wan2.2)"
    known = ("WanImageToVideoPipeline", "WanI2VDMD2Pipeline")  # the second in what is exported for vLLM-Omni
    if pipeline is not None and (kind := index.get("_class_name")) not in known:
        return f"it is a {kind}, not a WanImageToVideoPipeline"
    return ""


def _other_than(config: dict, found: dict[str, tuple[int, ...]]) -> list[str]:
    """How a transformer's weights, by name and shape, differ from what its configuration makes."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = range(min(config["num_layers"], len(found)))  # so that a wrong number costs no memory
    wanted: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, config["in_channels"], *config["patch_size"]),
        "proj_out.weight": (config["out_channels"] * math.prod(config["patch_size"]), dim),
        "condition_embedder.text_embedder.linear_1.weight": (dim, config["text_dim"]),
        "condition_embedder.time_proj.weight": (6 * dim, dim),
        "condition_embedder.image_embedder.ff.net.2.weight": (dim, config["image_dim"]),
    }
    for n in blocks:
        wanted |= {f"blocks.{n}.{a}.{w}.weight": (dim, dim) for a in ("attn1", "attn2") for w in SQUARE}
        wanted |= {f"blocks.{n}.attn2.{w}.weight": (dim, config["added_kv_proj_dim"]) for w in ADDED}
        wanted[f"blocks.{n}.ffn.net.0.proj.weight"] = (config["ffn_dim"], dim)
        wanted[f"blocks.{n}.ffn.net.2.weight"] = (dim, config["ffn_dim"])
    other = [name for name, shape in wanted.items() if found.get(name) != shape]
    wrong = [f"{name} is {found.get(name, 'missing')}, its config.json makes {wanted[name]}" for name in other]
    more = {name.split(".")[1] for name in found if name.startswith("blocks.")} - {str(n) for n in blocks}
    wrong += [f"blocks {', '.join(sorted(more))} are more than config.json's num_layers"] if more else []
    shown = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return [f"{shown}; download it again"] if wrong else []


def shift_of(folder: Path) -> float | None:
    """The timestep shift of a pipeline's scheduler, whatever its class; None if it says none."""
    config = read_table(folder / "scheduler" / "scheduler_config.json")
    found = config.get("flow_shift", config.get("shift"))
    return found if isinstance(found, int | float) else None


def variant_of(folder: Path, networks: tuple[str, ...] = NETWORKS) -> str | None:
    """The variant (fp16, bf16 ...) that diffusers has to be told, because one of the networks is in no other form.

    Raises:
        ArtifactError: there are several, and no plain one.
    """
    bare = [path for path in (folder / name for name in networks) if not any(_listed(path, s, "") for s in STEMS)]
    found = {variant for network in bare for variant in _variants(network)}
    if len(found) > 1:
        raise ArtifactError(f"{folder}: it is there in several variants ({', '.join(sorted(found))}); keep one of them")
    return found.pop() if found else None


def _variants(network: Path) -> set[str]:
    names = (p.name.split(".") for p in network.glob("*.safetensors*") if not p.name.startswith("."))
    # stem.VARIANT.safetensors, stem.VARIANT-00001-of-00002.safetensors, stem.safetensors.index.VARIANT.json
    return {parts[1].partition("-")[0] for parts in names if len(parts) > 2 and parts[1] != "safetensors"}


def _listed(network: Path, stem: str, variant: str) -> list[Path]:
    """The files of a network's weights in this form: those that its index names, or the one file."""
    dotted = f".{variant}" if variant else ""
    index = network / f"{stem}.safetensors.index{dotted}.json"
    if index.is_file():
        with reading(index, "download it again"):
            return [network / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = network / f"{stem}{dotted}.safetensors"
    return [single] if single.is_file() else []


def weight_files(network: Path) -> list[Path]:
    """The files that diffusers would load for a network.

    Raises:
        ArtifactError: there are none, or only such as are not read here.
    """
    for stem in STEMS:
        for variant in ("", *sorted(_variants(network))):
            if files := _listed(network, stem, variant):
                return files
    if others := [path for path in sorted(network.glob("*.safetensors")) if not path.name.startswith(".")]:
        raise ArtifactError(f"{others[0]}: diffusers loads {' or '.join(f'{s}.safetensors' for s in STEMS)}; rename it")
    if pickled := sorted([*network.glob("*.bin"), *network.glob("*.pt*")]):
        raise ArtifactError(
            f"{pickled[0]}: pickled weights can run any code and are not read; convert them on a machine where that "
            "does no harm: load the pipeline in diffusers and `save_pretrained(FOLDER, safe_serialization=True)`"
        )
    raise ArtifactError(f"{network}: no weights (*.safetensors); download the model, or `dvc pull` it")


def headers(network: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all weights of a network, from the headers of its files, which have to be whole.

    Raises:
        ArtifactError: naming the file and what is wrong with it.
    """
    return {name: shape for path in weight_files(network) for name, shape in header(path).items()}


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights in one safetensors file, which has to be whole; no weight is read.

    Raises:
        ArtifactError: it is missing, a folder, a Git LFS pointer, cut off, or no safetensors file.
    """
    if path.is_dir():
        inside = min(path.glob("*.safetensors"), default=path / "adapter_model.safetensors")
        raise ArtifactError(f"{path}: is a folder; name the file in it, e.g. {inside.name}")
    if not path.is_file():
        strength = ". Only a number after the last colon is a LoRA's strength" if ":" in path.name else ""
        raise ArtifactError(f"{path}: missing; download it again, or `dvc pull` what DVC versions{strength}")
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ArtifactError(f"{path}: a Git LFS pointer, not the file; run `git lfs pull` where it came from")
        length, size = int.from_bytes(start, "little"), path.stat().st_size
        try:
            if not 0 < length <= size - 8:
                raise ValueError(f"it has {size} bytes, and a header of {length}")
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
            if any(n < 0 for shape in shapes.values() for n in shape):
                raise ValueError("a shape below zero")
            end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        except Exception as error:
            raise ArtifactError(f"{path}: no whole safetensors file ({error}); download it again") from error
    if size != 8 + length + end:
        raise ArtifactError(f"{path}: cut off or damaged, {size} of {8 + length + end} bytes; download it again")
    return shapes
