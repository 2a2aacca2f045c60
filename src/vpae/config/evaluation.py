"""Stage `evaluation`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from vpae.config.section import Positive, Section
from vpae.config.vbench import VBenchRows


def _two_halves(clips: int) -> int:
    if clips == 1:
        raise ValueError("a classifier learns from pairs of clips: take 2 or more, or 0 for no such test")
    return clips


class C2st(Section):
    """The classifier two-sample test: can a small network tell a row's latents from real ones?"""

    clips: Annotated[int, AfterValidator(_two_halves)] = Field(
        0, ge=0, description="Training clips that it learns from, which every row draws anew; 0: no such test."
    )
    steps: Positive = Field(400, description="Its training steps.")
    seeds: Positive = Field(3, description="Classifiers, each with a seed of its own; their mean counts.")
    most_nfe: Positive = Field(8, description="Rows with more network evaluations a video are left out.")


class Evaluation(Section):
    """Stage `evaluation`: truth metrics, Frechet distance, motion, C2ST, VBench-I2V, latency."""

    c2st: C2st = Field(C2st(), description="The classifier two-sample test of latents.")
    vbench: VBenchRows = Field(VBenchRows(), description="VBench-I2V on the decoded videos.")
    bootstrap: Positive = Field(500, description="Resamples for the 95% confidence intervals.")
    latency_repeats: Positive = Field(2, description="Timed runs per row in each of three passes; the median counts.")
    latency_warmup: int = Field(1, ge=0, description="Untimed runs before them.")
