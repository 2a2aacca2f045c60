"""`vpae plan`: parse, delegate, print."""

import argparse
import json
import re

from vpae.arguments import experiment_arguments
from vpae.experiment import ConfigError, load

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
PART_NAMES = {
    "weights": "weights of all networks",
    "optimizer": "averages of the optimisers",
    "ema": "EMA",
    "step": "activations, gradients, gathered weights",
    "overhead": "driver, libraries, fragmentation",
    "total": "total",
}


def add_plan(commands: argparse._SubParsersAction) -> None:
    """The arguments of `vpae plan`."""
    plan = commands.add_parser("plan", help="what an experiment needs: parameters, FLOPs, memory, GPU-hours, disk")
    experiment_arguments(plan)
    plan.add_argument("--gpus", type=int, help="GPUs of a phase's whole job; default: what `cluster` asks for")
    plan.add_argument("--gpu-memory", default="80GB", help="memory of each, as 80GB or 141GiB")
    plan.add_argument("--interconnect", type=float, metavar="GB/S", help="of each GPU; else traffic takes no time")
    plan.add_argument("--peak-tflops", type=float, default=989.0, help="of each GPU, dense bf16 (989: H100, H200 SXM)")
    plan.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="share of the peak that a step reaches, recomputed operations included [assumption]",
    )
    plan.add_argument("--overhead", default="4GB", help="memory for driver, libraries, fragmentation [assumption]")
    plan.add_argument("--json", action="store_true", help="print all figures as JSON")
    plan.set_defaults(run=_plan)


def parse_bytes(text: str, option: str, least: float = 1e6) -> float:
    """Bytes of `80GB`, `75 GiB` or `8e10`; a number below `least` is one whose unit was forgotten.

    Raises:
        ConfigError: naming the option.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    try:
        size = float(found[1]) * UNITS[found[2]]
        if not size >= least:
            raise ValueError("no memory is as small")
        return size
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{option} {text}: write a number with a unit, for instance 80GB") from error


def _plan(arguments: argparse.Namespace) -> None:
    from vpae.planning.plan import Cluster, make_plan

    if arguments.gpus is not None and arguments.gpus < 1:
        raise ConfigError(f"--gpus {arguments.gpus}: at least one")
    if not 0 < arguments.utilisation <= 1:
        raise ConfigError(f"--utilisation {arguments.utilisation:g}: a share of the peak, above 0 and at most 1")
    for option, value in (("--interconnect", arguments.interconnect), ("--peak-tflops", arguments.peak_tflops)):
        if value is not None and not value > 0:
            raise ConfigError(f"{option} {value:g}: must be positive")
    cluster = Cluster(
        arguments.gpus,
        parse_bytes(arguments.gpu_memory, "--gpu-memory"),
        arguments.interconnect * 1e9 if arguments.interconnect else None,
        arguments.peak_tflops * 1e12,
        arguments.utilisation,
        parse_bytes(arguments.overhead, "--overhead", least=0),
    )
    plan = make_plan(load(arguments.config, arguments.set), cluster)
    print(json.dumps(plan, indent=2) if arguments.json else as_text(plan))


def as_text(plan: dict) -> str:
    """The plan for people; the stage that needs most memory comes first."""
    cluster = plan["cluster"]
    memory = cluster["gpu_memory_bytes"]
    lines = [f"{plan['experiment']} on GPUs of {_bytes(memory)}"]
    for name, roles in plan["parameters"].items():
        lines += ["", f"parameters: {name}", *(f"  {role:20} {_count(n):>10}" for role, n in roles.items())]
    text, image = plan["condition_tokens"]["text"], plan["condition_tokens"]["image"]
    lines += [
        "",
        f"tokens of a clip       {plan['tokens']:,} (and {text} of text, {image} of the image)",
        f"one network evaluation {_flops(plan['flops_per_nfe'])}",
    ]
    for name in sorted(plan["stages"], key=lambda name: name != plan["binding_stage"]):
        lines += ["", *_stage_lines(name, plan["stages"][name], memory)]
    lines += [
        "",
        f"GPU-hours in all: {plan['gpu_hours']:,.1f} (without the teacher's training, VBench, and writing videos)",
        "",
        "disk, at most",
        *(f"  {name.replace('_', ' '):20} {_bytes(n):>10}" for name, n in plan["disk_bytes"].items()),
        "",
        f"assumed: {plan['assumptions']['utilisation']:.0%} of {cluster['peak_flops'] / 1e12:,.0f} TFLOP/s per GPU, "
        f"{plan['assumptions']['float32_share']:.0%} in float32; "
        + (
            "traffic and computing fully overlap"
            if cluster["interconnect_bytes_per_second"]
            else "traffic takes no time (--interconnect)"
        ),
    ]
    if plan["missing"]:
        lines += ["", "not there yet", *(f"  {problem}" for problem in plan["missing"])]
    return "\n".join(lines)


def _stage_lines(name: str, stage: dict, memory: float) -> list[str]:
    verdict = "fits" if stage["fits"] else f"does NOT fit in {_bytes(memory)}"
    number = f"{stage['gpus']} GPUs" if stage["gpus"] > 1 else "one GPU a job"
    lines = [f"{name}, {number}: {verdict}; bytes per GPU"]
    parts = {part: n for part, n in stage["bytes_per_gpu"].items() if n}
    lines += [f"  {PART_NAMES[part]:40} {_bytes(n):>10}" for part, n in parts.items()]
    for remedy in stage["remedies"]:
        number = [f"--gpus {remedy['gpus']}"] if "gpus" in remedy else []
        change = " ".join([*number, *(f"--set '{text}'" for text in remedy["set"])])
        lines.append(f"  would fit with {change}: {_bytes(remedy['total'])}")
    if not stage["fits"] and not stage["remedies"]:
        lines.append("  no switch makes it fit: larger GPUs, fewer frames, or a smaller model")
    lines += [f"  {complaint}" for complaint in stage["complaints"]]
    if "steps" not in stage:
        return [*lines, f"  {stage['gpu_hours']:,.1f} GPU-hours; memory of a node {_bytes(stage['host_bytes'])}"]
    lines += [
        f"  {turn:12} {row['per_step']:g} a step, {_flops(row['model_flops'])}, "
        f"{_flops(row['flops'] - row['model_flops'])} recomputed, {_bytes(row['peak_bytes'])}"
        for turn, row in stage["turns"].items()
    ]
    moved = stage["traffic_bytes_per_gpu_and_step"]
    return [
        *lines,
        f"  {stage['steps']:,} steps of {stage['clips_per_step']} clips, {_flops(stage['flops_per_step'])} each",
        f"  {stage['seconds_per_step']:,.1f} s a step, {stage['gpu_hours']:,.1f} GPU-hours; memory of a node "
        f"{_bytes(stage['host_bytes'])}" + (f"; {_bytes(moved)} to each GPU a step" if moved else ""),
        f"  a state of {_bytes(stage['state_bytes'])} every {stage['checkpoint_every']} steps: a crash loses at most "
        f"{stage['checkpoint_every'] * stage['seconds_per_step'] / 3600:,.1f} hours of its {stage['gpus']} GPUs",
    ]


def _bytes(n: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if abs(n) >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n / 1e3:,.1f} kB"


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:,.3f} {unit}"
    return str(n)


def _flops(n: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n / 1e9:,.2f} GFLOP"
