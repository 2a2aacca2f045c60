"""How an experiment is spread over a cluster: no change of it runs anything again."""

from pydantic import Field, create_model, model_validator

from vpae.config.section import Positive, Section
from vpae.distill import METHODS


class Jobs(Section):
    """Into how many jobs a stage is cut that can be. No result depends on it: a change runs nothing again."""

    clips: Positive = Field(1, description="Jobs that check or render clips; 1: the stage's own job does it all.")
    latents: Positive = Field(1, description="Jobs that encode shards; several shards a job, best some hours' work.")
    samples: Positive = Field(1, description="Jobs that draw and decode batches of videos, of all rows together.")
    evaluation: Positive = Field(1, description="Jobs that measure videos by VBench-I2V, of all rows together.")


class Needs(Section):
    """What one job of a stage asks a cluster for: a change runs nothing again.

    Of a method, nodes and gpus say how many processes there are, each of which brings its own clips to a step.
    """

    nodes: Positive = Field(1, description="Nodes; only methods of distillation can use several.")
    gpus: int = Field(0, ge=0, description="GPUs per node; methods start one process for each, others use one.")
    cpus: Positive = Field(2, description="CPU cores per node; the stage clips takes clips.workers instead.")
    memory_gb: Positive = Field(4, description="GB of memory per node.")
    minutes: Positive = Field(
        120, description="Time limit; training saves its state before it, queues again and goes on."
    )


class _Before(Section):
    clips: Needs = Field(Needs(minutes=60), description="Each job of the stage `clips`.")
    teacher: Needs = Field(Needs(memory_gb=8, minutes=480), description="The job of the stage `teacher`.")
    latents: Needs = Field(Needs(minutes=60), description="Each job of the stage `latents`.")


_needs = {name: (Needs, Field(Needs(), description=f"The job of the method {name}.")) for name in METHODS}
_Methods = create_model("_Methods", __base__=_Before, **_needs)


class Cluster(_Methods):
    """What each stage asks a cluster for; names of accounts and partitions stand in profiles/slurm."""

    samples: Needs = Field(Needs(), description="Each job of the stage `samples`.")
    evaluation: Needs = Field(Needs(minutes=60), description="Each job of the stage `evaluation`, VBench's too.")
    report: Needs = Field(Needs(cpus=1, minutes=15), description="The job of the stage `report`.")

    @model_validator(mode="after")
    def _only_methods_are_spread(self) -> "Cluster":
        for name in type(self).model_fields:
            needs: Needs = getattr(self, name)
            if name not in METHODS and (needs.nodes > 1 or needs.gpus > 1):
                raise ValueError(
                    f"{name} asks for {needs.nodes} nodes and {needs.gpus} GPUs on each, but only the methods "
                    f"({', '.join(METHODS)}) run in several processes; the others may have one node and one GPU a job"
                )
        return self
