"""What stands around a measurement (device, versions, command), and its tables for people."""

import os
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial

import torch

from vpae.artifacts import code_version, device_name, package_versions
from vpae.bench import COMPARISONS
from vpae.bench.run import Options
from vpae.distill import METHODS
from vpae.experiment import Source


def surroundings(source: Source, options: Options) -> dict:
    """Where and how a measurement was made."""
    device = options.place
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "experiment": source.name,
        "command": " ".join(["vpae", *sys.argv[1:]]),
        "options": {**asdict(options), "results": str(options.results)},
        "settings": source.settings.model_dump(mode="json", include={"seed", "geometry", *source.settings.methods}),
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else device_name(),
            "memory_bytes": memory,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        },
        "code": code_version(),
        "packages": package_versions(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def as_text(found: dict) -> str:
    """Readable tables."""
    network = found["network"]
    lines = [
        f"{found['experiment']} on {found['device']['name']}: {network['parameters'] / 1e9:.4g}B parameters, "
        f"{network['tokens']:,} tokens, {network['dtype'].removeprefix('torch.')}",
        f"matrix products: {found['matmul_flops_per_second'] / 1e12:.4g} TFLOP/s",
    ]
    tables = {
        "sampling": _sampling,
        "vae": _vae,
        **{name: partial(_phase, name) for name in METHODS},
        **dict.fromkeys(COMPARISONS, _comparison),
        "data": _data,
    }
    for name, table in tables.items():
        if name in found:
            lines += ["", *table(found[name])]
    return "\n".join(lines)


def _data(data: dict) -> list[str]:
    encoding, training = data["encoding"], data["training"]
    stage, bare = encoding["stage_clips_per_second"], encoding["encoders_clips_per_second"]
    return [
        f"encoding of {encoding['clips']} clips: {stage:.4g} a second, the encoders alone {bare:.4g}; "
        f"{encoding['share']:.1%} of their speed ({encoding['cpu_share']:.1%} by CPU-seconds)",
        f"{training['method']}: {training['seconds_per_step']:.4g} s a step, "
        f"{training['waiting_for_data']:.2%} of it waiting for data",
    ]


def _sampling(sampling: dict) -> list[str]:
    lines = ["one network evaluation", f"  {'attention':16} {'mode':9} {'batch':>5} {'seconds':>10} {'of peak':>8}"]
    for row in sampling["evaluations"]:
        start = f"  {row['attention']:16} {row['mode']:9} {row['batch']:5}"
        if "skipped" in row:
            lines.append(f"{start} skipped: {row['skipped']}")
        else:
            lines.append(f"{start} {row['seconds']:10.4g} {row['share_of_peak']:8.1%}")
    lines += _videos(sampling["videos"])
    if r := sampling["ratios"]:
        lines.append(
            f"  {r['nfe']:.0f} times the evaluations take {r['diffusion']:.4g} times the diffusion's time, "
            f"{r['end_to_end']:.4g} times all of it"
        )
    return lines


def _videos(rows: list[dict]) -> list[str]:
    parts = next((list(row["seconds"]) for row in rows if "seconds" in row), [])
    lines = [
        f"one video ({rows[0]['attention']}, {rows[0]['mode']}), seconds",
        "  " + " ".join(f"{name:>10}" for name in ("NFE", *parts, "total")),
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"  {row['nfe']:10} skipped: {row['skipped']}")
            continue
        cells = [f"{row['nfe']:10}", *(f"{row['seconds'][p]:10.4g}" for p in parts), f"{row['total_seconds']:10.4g}"]
        lines.append("  " + " ".join(cells))
    return lines


def _vae(vae: dict) -> list[str]:
    if "skipped" in vae:
        return [f"VAE: skipped, {vae['skipped']}"]
    rows = {name: row for name, row in vae.items() if isinstance(row, dict)}
    return [
        "VAE, frames per second",
        *(f"  {name:25} {row['frames_per_second']:10.4g}" for name, row in rows.items()),
        f"  the condition differs from diffusers' by {vae['condition_error']:.2g} at most",
    ]


def _phase(name: str, phase: dict) -> list[str]:
    if "skipped" in phase:
        return [f"{name}: skipped, {phase['skipped']}"]
    lines = [
        f"{name}, batch {phase['batch_size']}",
        f"  {'turn':12} {'a step':>6} {'seconds':>10} {'of peak':>8} {'memory':>10}",
    ]
    for role, row in phase["turns"].items():
        share, memory = row["utilisation"], _memory(row["peak_bytes"])
        lines.append(f"  {role:12} {row['per_step']:6} {row['seconds']:10.4g} {share:8.1%} {memory:>10}")
    memory, planned = _memory(phase["peak_bytes"]), _memory(phase["planned_bytes"])
    return [
        *lines,
        f"  step: {phase['seconds_per_step']:.4g} s, {phase['tokens_per_second']:.4g} tokens/s, "
        f"{phase['utilisation']:.1%} of peak, {memory} (planned {planned})",
    ]


def _comparison(found: dict) -> list[str]:
    variants = [key for key in found if key not in ("setting", "ratio")]
    lines = [f"{found['setting']}"]
    for value in variants:
        row = found[value]
        if "skipped" in row:
            lines.append(f"  {value:6} skipped, {row['skipped']}")
        else:
            lines.append(f"  {value:6} {row['seconds_per_step']:10.4g} s a step, {_memory(row['peak_bytes'])}")
    if "ratio" in found:
        r = found["ratio"]
        lines.append(
            f"  {variants[1]} / {variants[0]}: {r['seconds_per_step']:.3g} times the time, "
            f"{r['held_bytes']:.3g} times the weights and states, {r['peak_bytes']:.3g} times the memory"
        )
    return lines


def _memory(n: float) -> str:
    return f"{n / 1e9:.4g} GB" if n >= 1e9 else f"{n / 1e6:.4g} MB"
