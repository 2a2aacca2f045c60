"""Every setting of an experiment: one tree of validated sections, one file a section.

The tree is the source of the JSON schema in `configs/schema.json`. How a YAML file becomes a tree (`extends:`,
`--set`, environment) is in `experiment.py`. Paper numbers are the defaults where the paper gives them; what it leaves
open is marked [choice]. The section of a method stands in the method's own file, `distill/NAME.py`; the tree has one
for every row of `distill.METHODS`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vpae.config.clips import Clips, World
from vpae.config.discriminator import R1, Head
from vpae.config.evaluation import Evaluation
from vpae.config.geometry import PATCH, VAE_STRIDE, Geometry
from vpae.config.latents import Latents
from vpae.config.report import Report
from vpae.config.samples import Sampler, Samples
from vpae.config.section import NonNegative, Positive, Section, Share, fill_defaults
from vpae.config.teacher import Teacher, TinyEncoders, TinyTransformer, TinyVae
from vpae.config.training import Lora, Optimizer, Sharding, Times, Training
from vpae.config.vbench import VBench, VBenchDimension, VBenchFolder, VBenchRows

if TYPE_CHECKING:
    from vpae.config.cluster import Cluster, Jobs, Needs
    from vpae.config.experiment import Experiment

# Made of the methods' sections, which are themselves made of sections of this package: imported after it.
_LATER = {"Cluster": "cluster", "Jobs": "cluster", "Needs": "cluster", "Experiment": "experiment"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


__all__ = [
    "PATCH",
    "R1",
    "VAE_STRIDE",
    "Clips",
    "Cluster",
    "Evaluation",
    "Experiment",
    "Geometry",
    "Head",
    "Jobs",
    "Latents",
    "Lora",
    "Needs",
    "NonNegative",
    "Optimizer",
    "Positive",
    "Report",
    "Sampler",
    "Samples",
    "Section",
    "Sharding",
    "Share",
    "Teacher",
    "Times",
    "TinyEncoders",
    "TinyTransformer",
    "TinyVae",
    "Training",
    "VBench",
    "VBenchDimension",
    "VBenchFolder",
    "VBenchRows",
    "World",
    "fill_defaults",
]
