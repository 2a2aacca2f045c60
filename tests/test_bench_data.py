"""`vpae bench --parts data`: a slow decoder and slow batches show in the two shares, and what is missing is named."""

import json
import time
from pathlib import Path

import pytest

from test_latents import Workplace
from vpae.cli import main
from vpae.data.latents import LatentDataset
from vpae.data.manifest import Clip

SLOW = 4  # times what encoding a clip, or a step of training, takes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("data"), teacher)
    place.run(world=True)
    return place


def measured(place: Workplace) -> dict:
    out = place.folder / "found.json"
    arguments = ["bench", "--config", str(place.folder / "own.yaml"), "--parts", "data", "--device", "cpu"]
    small = ["priming.fake_lora={rank: 2}", "priming.fake_steps_per_generator_step=1", "priming.training.batch_size=2"]
    for one in small:
        arguments += ["--set", one]
    assert main([*arguments, "--repeats", "2", "--results", str(place.results), "--out", str(out)]) == 0
    return json.loads(out.read_text())["data"]


@pytest.fixture(scope="module")
def undisturbed(place: Workplace) -> dict:
    return measured(place)


def test_it_measures_what_the_stages_run(place: Workplace, capsys: pytest.CaptureFixture) -> None:
    found = measured(place)
    assert found["encoding"]["clips"] == 4 and found["encoding"]["share"] > 0.2
    assert found["training"]["method"] == "priming" and found["training"]["waiting_for_data"] < 0.5
    printed = capsys.readouterr().out
    assert "encoding of 4 clips" in printed and "waiting for data" in printed


def test_a_slow_decoder_shows(place: Workplace, undisturbed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, seconds = Clip.frames, SLOW / undisturbed["encoding"]["encoders_clips_per_second"]
    monkeypatch.setattr(Clip, "frames", lambda *of: time.sleep(seconds) or frames(*of))
    found = measured(place)["encoding"]
    assert found["share"] < 0.5 and found["stage_clips_per_second"] < 1 / seconds
    assert found["encoders_clips_per_second"] > 1 / seconds


def test_slow_batches_show(place: Workplace, undisturbed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seconds = LatentDataset.batch, SLOW * undisturbed["training"]["seconds_per_step"]
    monkeypatch.setattr(LatentDataset, "batch", lambda *of: time.sleep(seconds) or batch(*of))
    assert measured(place)["training"]["waiting_for_data"] > 0.5


def test_a_stage_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = Path(__file__).parents[1] / "configs" / "micro.yaml"
    arguments = ["bench", "--config", str(config), "--parts", "data", "--results", str(tmp_path)]
    assert main(arguments) == 2
    assert "vpae clips --config" in capsys.readouterr().err
