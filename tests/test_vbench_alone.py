"""`vbench_i2v` stands alone: it imports nothing of vpae, and does its work where there is no vpae."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vbench_i2v
from vpae.data.video import write_video

PACKAGE = Path(vbench_i2v.__file__).parent
# Imports everything, then does what the command line says, while every import of vpae fails.
ALONE = """
import importlib, pkgutil, sys
sys.modules["vpae"] = None
import vbench_i2v
for module in pkgutil.walk_packages(vbench_i2v.__path__, "vbench_i2v."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from vbench_i2v.command import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_names_vpae_in_no_import() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "vpae"], path


def alone(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_it_scores_where_there_is_no_vpae(tmp_path: Path) -> None:
    results = tmp_path / "r_eval_results.json"
    results.write_text(json.dumps({"dynamic_degree": [0.5], "imaging_quality": [0.7]}))
    done = alone("score", str(results), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["imaging_quality"] == 70.0
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a-0.mp4", frames, 8, 10)
    run = ["run", "--videos", str(tmp_path), "--out", str(tmp_path / "out"), "--dimensions", "dynamic_degree"]
    done = alone(*run, "--weights", str(tmp_path))
    assert done.returncode == 2 and "raft-things.pth (missing); run `vbench-i2v weights --fetch" in done.stderr
    done = alone(*run, "--weights", str(tmp_path), "--allow-incomplete")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "out/results_scores.json").read_text())["dimensions"]["dynamic_degree"]["value"] is None
    )
