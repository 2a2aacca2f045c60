# ruff: noqa: F401
"""Every setting of an experiment: one tree of validated sections.

The tree is the source of the JSON schema in `configs/schema.json`. How a YAML file becomes a tree (`extends:`,
`--set`, environment) is in `experiment.py`. Paper numbers are the defaults where the paper gives them; what it leaves
open is marked [choice]. The section of a method stands in the method's own file, `distill/NAME.py`; the tree has one
for every row of `distill.METHODS`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vpae.config.clips import PATCH, VAE_STRIDE, Clips, Geometry
from vpae.config.discriminator import R1, Head
from vpae.config.section import Section
from vpae.config.stages import Evaluation, Latents, Report, Sampler, Samples, VBench, VBenchFolder, VBenchRows
from vpae.config.teacher import Teacher, TinyEncoders, TinyTransformer, TinyVae
from vpae.config.training import Lora, Optimizer, Sharding, Times, Training

if TYPE_CHECKING:
    from vpae.config.experiment import Experiment, Needs


def __getattr__(name: str) -> Any:
    """Made of the methods' sections, which are themselves made of sections of this package: imported after it."""
    if name not in ("Experiment", "Needs"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.experiment"), name)
