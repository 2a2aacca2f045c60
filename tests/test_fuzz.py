"""Every reader of a user's or a stage's file: whatever the bytes, it returns, or raises the project's error that names
the file. Never another exception, which a user would see as a traceback."""

import argparse
import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from test_latents import Workplace
from vbench_i2v.command import _account_beside, folder_settings
from vbench_i2v.errors import VBenchError
from vbench_i2v.runner import read_records
from vbench_i2v.scores import read_results
from vbench_i2v.suite import read_suite
from vpae.artifacts import ArtifactError, read_provenance
from vpae.config.clips import Clips
from vpae.data.catalog import read_truth
from vpae.data.corpus import candidates
from vpae.data.latents import LatentDataset
from vpae.data.manifest import read_manifest
from vpae.experiment import ConfigError, load
from vpae.models.loras import read_loras
from vpae.teacher.folder import faults

MICRO = Path(__file__).parents[1] / "configs" / "micro.yaml"
EXAMPLES = "FUZZ_EXAMPLES"  # variable: how many, and others each time
QUICK = settings(
    max_examples=int(os.environ.get(EXAMPLES, 20)),
    derandomize=EXAMPLES not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
DEEP = 3_000  # brackets; a parser that recurses gives up long before


@dataclass(repr=False)
class Reader:
    """A file, what reads it, and which error that may raise."""

    path: Path
    read: Callable[[], Any]
    error: type[Exception] = ArtifactError
    named: str = ""  # what the message has to name, if not the file

    def __post_init__(self) -> None:
        self.whole = self.path.read_bytes()
        self.read()

    def outcome(self, content: bytes) -> str:
        """What is said of this content; empty if it can be read."""
        self.path.write_bytes(content)
        try:
            self.read()
            return ""
        except self.error as error:
            assert (self.named or self.path.name) in str(error)
            return str(error)
        finally:
            self.path.write_bytes(self.whole)


@pytest.fixture
def reader(name: str, readers: dict[str, Reader]) -> Reader:
    return readers[name]


def table(path: Path, **more: object) -> Callable[[], object]:
    """Reads a table of clips whose columns and filters say all that they can."""
    section = Clips(source="table", path=str(path), **more)
    return lambda: list(candidates(section))


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> dict[str, Reader]:
    place = Workplace(tmp_path_factory.mktemp("fuzz"), teacher)
    latents, tables = place.run(world=True), place.folder
    clips, finished, model = place.results / "own/clips", place.results / "own/teacher", place.teacher
    for folder in (clips, latents):
        (folder / "provenance.json").unlink()  # so that no hash finds the change before the reader meets it
    rows = [{"path": f"{i}.mp4", "caption": "a disc", "span": ["0:00:01.5", "2"], "score": 5.0} for i in range(3)]
    with (tables / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    (tables / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tables / "clips.parquet")
    asked = {"columns": {"span": "span"}, "filters": {"at_least": {"score": 4}, "min_seconds": 0.1}}
    suite = [
        {
            "prompt_en": f"{t}, camera static",
            "dimension": ["camera_motion"],
            "image_type": "x",
            "image_name": f"{t}.jpg",
        }
        for t in "ab"
    ]
    (tables / "suite.json").write_text(json.dumps(suite))
    shutil.copy(MICRO, tables / "micro.yaml")
    lora = {f"base_model.model.blocks.0.attn1.to_q.lora_{k}.weight": torch.ones(24, 24) for k in "AB"}
    save_file(lora, tables / "lora.safetensors")
    (tables / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4, "alpha_pattern": {"to_k": 3}}))

    def everything() -> None:
        dataset = LatentDataset(latents, "held_out")
        for number in range(len(dataset)):
            dataset.batch([number])
            dataset.first_frame(number)

    def model_or_its_faults() -> None:
        if found := faults(model):
            raise ArtifactError("\n".join(found))

    score = {"i2v_subject": [0.5, [{"video_path": "a-0.mp4", "video_results": 0.5}]], "camera_motion": [0.25, []]}
    account = {"dimensions": {"i2v_subject": {"expected": 5}, "camera_motion": {"expected": 5, "reason": "none"}}}
    (tables / "x_eval_results.json").write_text(json.dumps(score))
    (tables / "x_scores.json").write_text(json.dumps({**account, "backbones": "official"}))
    (tables / "folder.yaml").write_text("videos: a\nimages: b\nout: c\nname: d\nsampling: {steps: 1}\n")
    (tables / "records").mkdir()
    (tables / "records/a.jsonl").write_text('{"key": "a", "value": 1.0}\n{"key": "b", "value": 2.0}\n')
    asked_of_vbench = argparse.Namespace(folder_config=tables / "folder.yaml")

    some_shard = sorted(latents.glob("held_out-*.tar"))[0]
    loras = lambda: read_loras([str(tables / "lora.safetensors")], model)  # noqa: E731
    return {
        "configuration": Reader(tables / "micro.yaml", lambda: load(tables / "micro.yaml"), ConfigError),
        "csv": Reader(tables / "clips.csv", table(tables / "clips.csv")),
        "jsonl": Reader(tables / "clips.jsonl", table(tables / "clips.jsonl", **asked)),
        "parquet": Reader(tables / "clips.parquet", table(tables / "clips.parquet", **asked)),
        "manifest": Reader(clips / "manifest.parquet", lambda: read_manifest(clips)),
        "truth": Reader(clips / "truth.jsonl", lambda: read_truth(clips)),
        "index": Reader(latents / "index.json", everything),
        "shard": Reader(some_shard, everything),
        "negative": Reader(latents / "negative.safetensors", everything),
        "provenance": Reader(finished / "provenance.json", lambda: read_provenance(finished)),
        "suite": Reader(tables / "suite.json", lambda: read_suite(tables / "suite.json"), VBenchError),
        "scores": Reader(
            tables / "x_eval_results.json", lambda: read_results([tables / "x_eval_results.json"]), VBenchError
        ),
        "account": Reader(
            tables / "x_scores.json", lambda: _account_beside(tables / "x_eval_results.json"), VBenchError
        ),
        "records": Reader(tables / "records/a.jsonl", lambda: read_records(tables / "records"), VBenchError),
        "folder": Reader(tables / "folder.yaml", lambda: folder_settings(asked_of_vbench), VBenchError),
        "lora": Reader(tables / "lora.safetensors", loras),
        "adapter's settings": Reader(tables / "adapter_config.json", loras, named="lora.safetensors"),
        "model's index": Reader(model / "model_index.json", model_or_its_faults, named=str(model)),
        "transformer's settings": Reader(model / "transformer/config.json", model_or_its_faults, named=str(model)),
        "transformer's weights": Reader(model / "transformer/diffusion_pytorch_model.safetensors", model_or_its_faults),
    }


ALL = (
    *("configuration", "csv", "jsonl", "parquet", "manifest", "truth", "index", "shard", "negative", "provenance"),
    *("suite", "scores", "account", "records", "folder", "lora", "adapter's settings"),
    *("model's index", "transformer's settings", "transformer's weights"),
)
# Those that people write, and how they are parsed and written.
TREES = {
    "configuration": (yaml.safe_load, lambda tree: yaml.safe_dump(tree).encode()),
    "folder": (yaml.safe_load, lambda tree: yaml.safe_dump(tree).encode()),
    "records": (lambda data: [json.loads(line) for line in data.splitlines()], lambda tree: lines(tree) + b"\n"),
    "jsonl": (lambda data: [json.loads(line) for line in data.splitlines()], lambda tree: lines(tree)),
    "truth": (lambda data: [json.loads(line) for line in data.splitlines()], lambda tree: lines(tree)),
} | {
    name: (json.loads, lambda tree: json.dumps(tree).encode())
    for name in (
        "provenance",
        "suite",
        "scores",
        "account",
        "adapter's settings",
        "model's index",
        "transformer's settings",
    )
}


def lines(tree: object) -> bytes:
    """JSON lines, if it is still a list."""
    return "\n".join(json.dumps(row) for row in (tree if isinstance(tree, list) else [tree])).encode()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@QUICK
@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=b"\xef\xbb\xbf")
@example(content=b"[" * DEEP)
@example(content=b"null")
@example(content=b'{"a": ' * DEEP)
@example(content=(10**4).to_bytes(8, "little") + b"[" * 10**4)
@example(content=b"9" * 5000)
@example(content=b"\x00" * 512)
def test_a_file_of_any_bytes_is_read_or_refused_by_name(name: str, content: bytes, reader: Reader) -> None:
    reader.outcome(content)


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[float, int, bytes]]:
    """Where in a file (of 1), how many bytes go, and what comes instead."""
    return draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=4))


@pytest.mark.parametrize("name", ALL)
@QUICK
@given(changes=changes(), end=st.floats(0, 4))
def test_a_file_with_some_bytes_changed_is_read_or_refused_by_name(
    name: str, changes: list[tuple[float, int, bytes]], end: float, reader: Reader
) -> None:
    data = bytearray(reader.whole)
    for share, count, instead in changes:
        at = int(share * len(data))
        data[at : at + count] = instead
    reader.outcome(bytes(data[: int(end * len(data))]))


def places(tree: object, above: tuple = ()) -> list[tuple]:
    """The keys that lead to each value of a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [above, *(place for key, value in inner for place in places(value, (*above, key)))]


def put(tree: Any, place: tuple, value: object) -> object:
    """The tree with one value replaced."""
    if not place:
        return value
    copy = tree.copy()
    copy[place[0]] = put(tree[place[0]], place[1:], value)
    return copy


odd = st.sampled_from(
    [None, True, 0, -1, 10**40, 1e300, float("nan"), "", "\0", "..", "x" * 5000, [], {}, [[]], {"": 0}]
)
values = st.recursive(odd | st.integers() | st.text(max_size=9), lambda v: st.lists(v, max_size=3), max_leaves=4)


@pytest.mark.parametrize("name", TREES)
@QUICK
@given(where=st.floats(0, 1, exclude_max=True), value=values)
def test_a_file_with_an_odd_value_anywhere_is_read_or_refused_by_name(
    name: str, where: float, value: object, reader: Reader
) -> None:
    parse, write = TREES[name]
    tree = parse(reader.whole)
    found = places(tree)
    reader.outcome(write(put(tree, found[int(where * len(found))], value)))
