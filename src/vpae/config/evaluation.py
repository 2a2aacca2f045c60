"""Stage `evaluation`."""

from pydantic import Field

from vpae.config.section import Positive, Section
from vpae.config.vbench import VBenchRows


class Evaluation(Section):
    """Stage `evaluation`: truth metrics, Frechet distance, VBench-I2V, latency."""

    vbench: VBenchRows = Field(VBenchRows(), description="VBench-I2V on the decoded videos.")
    bootstrap: Positive = Field(500, description="Resamples for the 95% confidence intervals.")
    latency_repeats: Positive = Field(2, description="Timed runs per row in each of three passes; the median counts.")
    latency_warmup: int = Field(1, ge=0, description="Untimed runs before them.")
