"""The device script at micro size: each part by itself, and what it has written stays when it is stopped."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from vpae.bench import device
from vpae.bench.device import PARTS, Rows

ROOT = Path(__file__).parents[1]
LORA = [f"{phase}.student_lora={{rank: 2, alpha: 2}}" for phase in ("priming", "equilibrium")]


def measure(part: str, out: Path, *options: str) -> dict[str, dict]:
    arguments = ["--config", str(ROOT / "configs/micro.yaml"), "--part", part, "--out", str(out), "--layers", "2"]
    arguments += options
    for override in LORA:
        arguments += ["--set", override]
    assert device.main([*arguments, "--backend", "eager", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["part"] == part for row in rows) and rows[-1]["name"] == "end"
    return {row["name"]: row for row in rows}


@pytest.mark.slow
def test_all_that_is_around_the_transformer(tmp_path):
    rows = measure("video", tmp_path / "rows.jsonl")
    for name in ("text", "image", "condition", "condition, frame by frame", "mp4, all threads", "mp4, reproducible"):
        assert rows[name]["seconds"] > 0
    for dtype in ("float32", "bfloat16"):
        assert rows[f"decode {dtype}"]["seconds"] > 0 and rows[f"decode {dtype} channels-last"]["seconds"] > 0
    assert rows["condition error"]["largest"] <= 1e-5


def test_one_network_evaluation_and_what_the_device_lacks(tmp_path):
    rows = measure("sampling", tmp_path / "rows.jsonl")
    assert rows["eager"]["share_of_peak"] > 0 and rows["compiled"]["seconds"] > 0
    assert "fp8-compute needs" in rows["fp8 compiled"]["skipped"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "other", "options"), [("priming", "fake", ()), ("equilibrium", "head", ("--eager",))]
)
def test_turns_with_and_without_compiled_blocks(tmp_path, phase, other, options):
    rows = measure(phase, tmp_path / "rows.jsonl", *options)
    for turn in ("generator", other):
        assert rows[f"{turn}, eager"]["share_of_peak"] > 0
        assert options or rows[f"{turn}, compiled"]["seconds"] > 0


def test_rows_stay_when_a_part_is_stopped_and_errors_become_rows(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", "video", torch.device("cpu"))

    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows.time("first", lambda: None)
    rows.time("second", too_much)
    with pytest.raises(KeyboardInterrupt):
        rows.time("third", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in found] == ["first", "second"] and "out of memory" in found[1]["skipped"]


def test_the_script_names_all_parts():
    script = ROOT / "workflow/device.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert all(f"--part {part}" in script.read_text() for part in PARTS)
