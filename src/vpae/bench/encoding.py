"""How fast clips become latents: what the stage `latents` does for each of them."""

import torch

from vpae.bench.measure import timed
from vpae.bench.networks import Components
from vpae.config import Experiment
from vpae.models.small_decoder import SmallDecoder
from vpae.models.wan import decode_latents, encode_condition, encode_video


@torch.no_grad()
def measure_vae(settings: Experiment, parts: Components, device: torch.device, batch: int, repeats: int) -> dict:
    """Encoding of videos and of their conditions, and decoding, in frames per second.

    Conditions also as diffusers encodes them; `condition_error` is the largest difference between the two.
    """
    g = settings.geometry
    video_B3THW = torch.rand(batch, 3, g.frames, g.height, g.width, device=device) * 2 - 1
    first_then_grey = torch.cat([video_B3THW[:, :, :1], torch.zeros_like(video_B3THW[:, :, 1:])], dim=2)
    latents = encode_video(parts.vae, video_B3THW)
    small = SmallDecoder().to(device, parts.vae.dtype)  # of any weights: they change no time
    work = {
        "encode": lambda: encode_video(parts.vae, video_B3THW),
        "condition": lambda: encode_condition(parts.vae, video_B3THW[:, :, 0], g.frames),
        "condition, frame by frame": lambda: encode_video(parts.vae, first_then_grey),
        "decode": lambda: decode_latents(parts.vae, latents),
        "decode, small decoder": lambda: decode_latents(small, latents),
    }
    found = {name: timed(run, device, repeats) for name, run in work.items()}
    for row in found.values():
        row["frames_per_second"] = batch * g.frames / row["seconds"]
    ours, theirs = work["condition"](), work["condition, frame by frame"]()
    return {"batch": batch, "condition_error": (ours - theirs).abs().max().item(), **found}
