"""What an export consists of: a diffusers folder, a file with Wan's own key names, a LoRA file. Each writes into a
place that does not exist yet; the command makes it appear."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vpae.artifacts import PROVENANCE, write_json
from vpae.export.card import CARD, FACTS
from vpae.export.keys import to_original
from vpae.export.lora import PREFIXES, read_adapter
from vpae.flow import schedule
from vpae.models.formats import stored_dtype, stored_weights
from vpae.models.loras import require_fit
from vpae.models.wan import TEXT_TOKENS, forget_origin, load_transformer

WRITTEN_ANEW = ("transformer", CARD, FACTS, PROVENANCE)
SERVED = "dmd2_config"  # in the index of a folder for vLLM-Omni: how it samples


def write_pipeline(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Copy a pipeline folder, with its transformer in another number format if one is given.

    Norms, modulation and the time embedding stay float32, as diffusers keeps them when it loads a model. The index is
    diffusers' own, also where the model was written for vLLM-Omni.
    """
    out.mkdir()
    for path in sorted(model.iterdir()):
        if path.name in WRITTEN_ANEW or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copy2(path, out / path.name)
    index = json.loads((out / "model_index.json").read_text())
    plain = {key: value for key, value in index.items() if key != SERVED} | {"_class_name": "WanImageToVideoPipeline"}
    if plain != index:
        write_json(out / "model_index.json", plain)
    if dtype in (None, stored_dtype(stored_weights(model / "transformer"))):
        shutil.copytree(model / "transformer", out / "transformer")
    else:
        load_transformer(model, dtype).save_pretrained(out / "transformer")
        forget_origin(out / "transformer")


def write_served_index(folder: Path, steps: int) -> None:
    """Tell vLLM-Omni how a pipeline folder samples: its pipeline for distilled Wan models, and the times of all steps.

    Its times are whole numbers of 1,000, after the shift; between them it adds noise again (`sde`), as our scheduler.
    Source: vllm-project/vllm-omni, pull request 2974 (`DMD2Config`).
    """
    index = json.loads((folder / "model_index.json").read_text())
    shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"]
    times = [round(1000 * t) for t in schedule(steps, shift)[:-1].tolist()]
    sampling = {"num_inference_steps": steps, "denoising_timesteps": times, "solver": "sde", "guidance_scale": 1.0}
    write_json(folder / "model_index.json", {**index, "_class_name": "WanI2VDMD2Pipeline", SERVED: sampling})


def write_original(model: Path, out: Path, dtype: torch.dtype | None, facts: Mapping[str, Any]) -> None:
    """Write the transformer's weights under the names of Wan's own repository, all in one file."""
    transformer = load_transformer(model, dtype or stored_dtype(stored_weights(model / "transformer")))
    tensors = {to_original(key): tensor.contiguous() for key, tensor in transformer.state_dict().items()}
    save_file(tensors, out, metadata=_metadata(facts))


def write_original_config(model: Path, out: Path) -> None:
    """Write the config.json with which Wan2.1's own `WanModel` and LightX2V build the network."""
    config = json.loads((model / "transformer" / "config.json").read_text())
    original = {
        "_class_name": "WanModel",
        "_diffusers_version": config["_diffusers_version"],
        "model_type": "i2v" if config["image_dim"] else "t2v",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "text_dim": config["text_dim"],
        "text_len": TEXT_TOKENS,
        "eps": config["eps"],
    }
    write_json(out, original)


def write_lora(
    adapter: Path, model: Path, out: Path, form: str, dtype: torch.dtype | None, facts: Mapping[str, Any]
) -> None:
    """Write a model's adapter, its scale multiplied in, under the names that the readers of a form expect.

    "lora": diffusers (`pipeline.load_lora_weights`); "lora-wan": ComfyUI and LightX2V, and diffusers as well.
    """
    factors = read_adapter(adapter)
    require_fit(adapter, model, factors)
    named = {PREFIXES[form] + (to_original(key) if form == "lora-wan" else key): t for key, t in factors.items()}
    save_file({key: t.to(dtype) if dtype else t for key, t in named.items()}, out, _metadata(facts))


def _metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Where the weights come from, inside the file, which may travel alone."""
    known = {key: facts[key] for key in ("licence", "provenance", "settings") if key in facts}
    return {"format": "pt", "vpae": json.dumps(known)}
