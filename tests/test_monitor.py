"""The collapse monitor finds each way in which a student collapses, and keeps silent on a healthy one."""

import pytest
import torch

from vpae.config.training import Monitor
from vpae.training.monitor import BOUNDS, Collapse, Watch, outside, signs

SEED = 3  # of all random inputs here
N, SHAPE = 16, (4, 5, 6, 6)


def world() -> dict[str, torch.Tensor]:
    """Real clips that move, and a student whose two draws of noise differ as much as two futures do."""
    rng = torch.Generator().manual_seed(SEED)
    still = torch.randn(N, SHAPE[0], 1, *SHAPE[2:], generator=rng)
    future = lambda: 0.4 * torch.randn(N, *SHAPE, generator=rng)  # noqa: E731
    return {"x": still + future(), "start": still + future(), "other_start": still + future()}


def now(change) -> dict[str, float]:
    """The signs after a change of the student's videos."""
    w = world()
    return signs(change(w["start"]), change(w["other_start"]), w["start"], w["other_start"], w["x"])


def healthy(x: torch.Tensor) -> torch.Tensor:
    """Every video changes a little, each in its own way."""
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED + 1))


COLLAPSES = {
    "motion": lambda x: x.mean(dim=2, keepdim=True) + 0.1 * (x - x.mean(dim=2, keepdim=True)),
    "deviation": lambda x: 2.0 * x,
    "colour_drift": lambda x: x + 0.5,
    "common_pattern": lambda x: x + 0.2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)),
    "diversity": lambda x: world()["x"],  # whatever the noise
}


def test_every_sign_has_a_collapse_here():
    assert COLLAPSES.keys() == BOUNDS.keys()


def test_a_healthy_student_raises_nothing():
    assert outside(now(healthy), 0) == []


@pytest.mark.parametrize("sign", COLLAPSES)
def test_each_collapse_is_found_by_its_sign(sign):
    assert any(text.startswith(f"{sign} =") for text in outside(now(COLLAPSES[sign]), 1))


def test_not_a_number_is_a_collapse():
    assert outside(now(lambda x: x * float("nan")), 1)


def test_the_common_pattern_is_measured_in_its_own_size():
    w, size = world(), 0.05
    pattern = size * torch.sign(torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)))
    found = signs(healthy(w["start"]) + pattern, w["other_start"], w["start"], w["other_start"], w["x"])
    assert found["common_pattern"] == pytest.approx(size / float(w["x"].std()), rel=0.2)


def test_a_collapse_stops_the_run_unless_told_otherwise(capsys):
    w = world()
    watch = Watch(
        Monitor(every=1), lambda seed: COLLAPSES["motion"](w["start"]), w["x"], (w["start"], w["other_start"])
    )
    with pytest.raises(Collapse, match=r"equilibrium collapses at step 7: motion.*training\.monitor\.stop=false"):
        watch.look(7, "equilibrium")
    watch.config = Monitor(every=1, stop=False)
    assert watch.look(7, "equilibrium")["motion"] < 0.5
    assert "collapses at step 7" in capsys.readouterr().err
