"""The search of variants runs the methods' own losses, and its table shows what it found."""

import json
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))
import search  # noqa: E402 - not a package


@pytest.mark.slow
def test_variants_are_trained_from_each_other_and_judged(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    short = {"training": {"steps": 1, "batch_size": 2}}
    plan = {
        "config": "configs/micro.yaml",
        "set": ["priming.training.steps=1"],
        "seeds": [0],
        "clips": {"train": 4, "fit": 4, "test": 4},
        "judge": {"steps": 1, "seeds": 1, "truth": 2, "few_steps": [2]},
        "variants": [
            {
                "primed": {"method": "priming"},
                "rival": {"config": "configs/micro-magic.yaml", "method": "magic", "set": short},
            },
            {"joint": {"method": "equilibrium", "start": "primed", "set": {**short, "score": {"weight": 1.0}}}},
        ],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    data, out = tmp_path / "data.pt", tmp_path / "rows.jsonl"
    geometry = search.load("configs/micro.yaml").settings.geometry
    search.torch.save(search.make_data(plan["clips"], teacher, 1, geometry.frames, geometry.height), data)
    search.weights_of(out).mkdir()
    out.touch()
    judge = search.judge
    monkeypatch.setattr(search, "judge", lambda weights, *rest: None)  # as if time were up before
    monkeypatch.setattr(search, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    plan["of"] = {}
    search.work(0, {**plan, "teacher": False}, data, teacher, out, 1)
    assert not out.read_text()
    kept = {file.name.rpartition("@")[0] for file in search.weights_of(out).iterdir()}
    assert kept == {"primed", "rival", "joint"}
    monkeypatch.setattr(search, "judge", judge)
    monkeypatch.setattr(search, "ProcessPoolExecutor", ProcessPoolExecutor)
    trained = []
    train = search.train_together
    monkeypatch.setattr(search, "train_together", lambda runs: trained.extend(r.name for r in runs) or train(runs))
    search.work(0, plan, data, teacher, out, 1)
    assert not trained and not list(search.weights_of(out).iterdir())
    rows = {row["variant"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows.keys() == {"teacher-100nfe", "primed", "rival", "joint"}
    plan["variants"][1]["joint"]["set"]["csds_weight"] = 0.5
    search.work(0, plan, data, teacher, out, 1)
    assert trained == ["primed", "joint"]  # what it starts from is needed again; nothing else is
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["variant"] for line in lines[4:]] == ["joint"] and lines[4]["made_of"] != rows["joint"]["made_of"]
    other = {**plan, "judge": {**plan["judge"], "steps": 2}}
    assert not {*search.made_of(other).values()} & {*search.made_of(plan).values()}
    assert rows["joint"]["logs"]["pull_score"] > 0 and rows["joint"]["evaluations"] > 0
    assert rows["joint"]["motion_2nfe"] != rows["joint"]["motion"]
    assert "| joint | 0 | primed |" in search.table(out)


def test_clips_that_were_encoded_for_another_plan_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = {"config": "configs/micro.yaml", "seeds": [], "clips": {"train": 4, "fit": 4, "test": 4}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr(search, "make_data", lambda *_: {"x": search.torch.zeros(1)})
    arguments = (tmp_path / "plan.yaml", tmp_path, tmp_path / "rows.jsonl", tmp_path / "data.pt", 1)
    search.run(*arguments)
    search.run(*arguments)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**plan, "clips": {"train": 8, "fit": 4, "test": 4}}))
    with pytest.raises(SystemExit, match="encoded for another plan's clips"):
        search.run(*arguments)


def test_the_table_is_that_of_the_page():
    printed = search.table(ROOT / "docs" / "search" / "phase2-forerunner.jsonl").splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line for line in printed}
    assert "0.6973 | 0.7188 | 0.0038 | 0.9606" in found["v0"]
    assert len(printed) == 2 + 64


def test_means_and_differences_are_over_the_same_seeds(tmp_path):
    values = {("a", 0): 1.0, ("a", 1): 2.0, ("a", 2): 3.0, ("b", 0): 0.5, ("b", 1): 1.5, ("c", 0): 7.0}
    rows = [
        {"variant": v, "seed": s, "c2st": x, "motion_2nfe": x + 1, "evaluations": 2000} for (v, s), x in values.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = search.over_seeds([tmp_path / "rows.jsonl"], [["a", "b"]]).splitlines()
    assert printed[2] == "| a | 3 | 2.0000 ± 2.4841 | 2000 ± 0 |"  # 4.3027 x 1 / sqrt(3)
    assert printed[4] == "| c | 1 | 7.0000 | 2000 |"
    assert printed[5] == "| a - b | 2 | 0.5000 ± 0.0000 |  |"
    assert search.over_seeds([tmp_path / "rows.jsonl"], [], ["c"]).splitlines()[2:] == [printed[4]]
    [row] = search.over_seeds([tmp_path / "rows.jsonl"], [], ["c"], ["motion_2nfe"]).splitlines()[2:]
    assert row == "| c | 1 | 8.0000 | 2000 |"
    with pytest.raises(SystemExit, match="no column motion_3nfe"):
        search.over_seeds([tmp_path / "rows.jsonl"], [], ["c"], ["motion_3nfe"])
    with pytest.raises(SystemExit, match="a c: they have no seed in common"):
        rows = [row for row in rows if row["variant"] != "a" or row["seed"]]
        (tmp_path / "fewer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        search.over_seeds([tmp_path / "fewer.jsonl"], [["a", "c"]])
    with pytest.raises(SystemExit, match="no variant d; there are a, b, c"):
        search.over_seeds([tmp_path / "rows.jsonl"], [["a", "d"]])


def test_an_evaluation_is_one_clip_and_a_backward_pass_two_more():
    class Network(search.nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    phase = SimpleNamespace(networks={"one": (network := Network(1, 1))})
    together, apart = (lambda: network(search.torch.ones(4, 1))), (lambda: [network(search.torch.ones(2, 1))] * 2)
    assert search.evaluations(phase, together) == 12
    with search.torch.no_grad():
        assert search.evaluations(phase, together) == 4
        assert search.evaluations(phase, apart) == 2  # one pass, of which the result is taken twice
