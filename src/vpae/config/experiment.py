"""One experiment: the tree of all sections, one of them for each method; and how it is spread over a cluster."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from vpae.config.clips import Clips, Geometry
from vpae.config.section import Positive, Section, fill_defaults, without_nulls
from vpae.config.stages import Evaluation, Latents, Report, Sampler, Samples
from vpae.config.teacher import Teacher
from vpae.distill import CHAIN, METHODS
from vpae.distill.method import TEACHER

LEAST_VIDEOS = 3  # of which a distance between distributions, leaving out one, still has the two that it needs


def chained(names: list[str]) -> dict[str, str]:
    """Methods each of which starts from the one before it, the first from the teacher.

    Raises:
        ValueError: one is no name.
    """
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(
            f"methods: {wrong[0]!r} is no name; a list holds names, and a mapping METHOD: WHAT IT STARTS FROM"
        )
    return dict(zip(names, [TEACHER, *names], strict=False))


def _as_mapping(given: Any) -> Any:
    return chained(list(given)) if isinstance(given, list | tuple) else without_nulls(given)


DEFAULT_METHODS = chained([method.name for method in CHAIN])
TEACHER_ROWS = {
    "teacher-100nfe": Sampler(model=TEACHER, steps=50, guidance_scale=5.0),
    "teacher-1nfe": Sampler(model=TEACHER, steps=1),
}


def rows_of(methods: dict[str, str]) -> dict[str, Sampler]:
    """The rows of an experiment that names none: the teacher's, and those of each method."""
    students = {
        f"{METHODS[name].row or name}-{steps}nfe": Sampler(model=name, steps=steps)
        for name in methods
        if name in METHODS
        for steps in METHODS[name].steps
    }
    return TEACHER_ROWS | students


class Jobs(Section):
    """How many jobs a stage is cut into, where it can be. No result depends on it: a change runs nothing again."""

    clips: Positive = Field(1, description="Jobs that check or render clips; 1: the stage's own job does it all.")
    latents: Positive = Field(
        1, description="Jobs that encode shards; best several shards and some hours of work for each."
    )
    samples: Positive = Field(1, description="Jobs that draw and decode batches of videos, of all rows together.")
    evaluation: Positive = Field(1, description="Jobs that measure videos by VBench-I2V, of all rows together.")


class Needs(Section):
    """What one job of a stage asks a cluster for: a change runs nothing again.

    For a method, nodes and gpus say how many processes there are; each brings its own clips to a step.
    """

    nodes: Positive = Field(1, description="Nodes; only methods of distillation can use several.")
    gpus: int = Field(0, ge=0, description="GPUs per node; methods start one process for each, others use one.")
    cpus: Positive = Field(2, description="CPU cores per node; the stage clips takes clips.workers instead.")
    memory_gb: Positive = Field(4, description="GB of memory per node.")
    minutes: Positive = Field(
        120, description="Time limit of a job; training saves its state before that, is queued again and goes on."
    )
    warning_seconds: Positive = Field(
        300,
        description="How long before its time limit a job is told to end. Training then finishes an update and saves: "
        "`vpae plan` says whether this is enough.",
    )

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> "Needs":
        if 60 * self.minutes <= self.warning_seconds:
            raise ValueError(
                f"minutes = {self.minutes}, and warning_seconds = {self.warning_seconds} before that a job is told to "
                "end: as soon as it begins; raise minutes, or lower warning_seconds"
            )
        return self


class _ClusterBefore(Section):
    clips: Needs = Field(Needs(minutes=60), description="Each job of the stage `clips`.")
    teacher: Needs = Field(Needs(memory_gb=8, minutes=480), description="The job of the stage `teacher`.")
    latents: Needs = Field(Needs(minutes=60), description="Each job of the stage `latents`.")


_needs = {name: (Needs, Field(Needs(), description=f"The job of the method {name}.")) for name in METHODS}
_ClusterMethods = create_model("_ClusterMethods", __base__=_ClusterBefore, **_needs)


class Cluster(_ClusterMethods):
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


class _Before(BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="VPAE_", env_nested_delimiter="__", env_file=None
    )

    extends: str | tuple[str, ...] = Field(
        "", description="Name of the experiment beside this file whose keys this one overlays; or several names."
    )
    seed: int = Field(0, ge=0, description="Every random number follows from it.")
    geometry: Geometry = Field(Geometry(), description="The shape of every clip.")
    clips: Clips = Field(description="Which videos there are.")
    teacher: Teacher = Field(description="The model to distil.")
    latents: Latents = Field(Latents(), description="How clips are encoded and stored.")
    methods: Annotated[
        dict[str, str],
        BeforeValidator(_as_mapping, json_schema_input_type=dict[str, str | None] | list[str]),
    ] = Field(
        DEFAULT_METHODS,
        description="Method -> what it starts from: teacher, or another method's student. In an overlay a mapping adds "
        "to the base's methods, and null takes one away. A list replaces them by a chain: the first starts from the "
        "teacher, each other one from the one before it.",
    )
    students: Annotated[
        dict[str, str], BeforeValidator(without_nulls, json_schema_input_type=dict[str, str | None])
    ] = Field(
        {},
        description="Students that were trained before, for `samples.rows.ROW.model`: a name -> the finished folder of "
        "their method's stage. With `methods: []` nothing is trained.",
    )


_sections = {
    name: (method.Settings, Field(method.Settings(), description=f"{method.title}."))
    for name, method in METHODS.items()
}
_Methods = create_model("_Methods", __base__=_Before, **_sections)


class Experiment(_Methods):
    """One experiment: everything that determines its results."""

    samples: Samples = Field(Samples(), description="Whose videos are made, and how many.")
    evaluation: Evaluation = Field(Evaluation(), description="How videos are measured.")
    report: Report = Field(Report(), description="What the report shows.")
    jobs: Jobs = Field(Jobs(), description="How stages are spread over a cluster.")
    cluster: Cluster = Field(Cluster(), description="What each stage's jobs ask a cluster for.")

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, values: Any) -> Any:
        values = fill_defaults(cls, values)
        samples = values.get("samples", {})
        methods = _as_mapping(values.get("methods", DEFAULT_METHODS))
        rows = (samples.get("rows") or {}) if isinstance(samples, dict) else None
        if isinstance(rows, dict) and isinstance(methods, dict) and all(row is None for row in rows.values()):
            values["samples"] = {**samples, "rows": rows_of(methods) | rows}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.samples.count > self.clips.held_out:
            raise ValueError(
                f"samples.count = {self.samples.count} is more than clips.held_out = {self.clips.held_out}; "
                "keep more clips or animate fewer"
            )
        if self.samples.count < LEAST_VIDEOS:
            raise ValueError(
                f"samples.count = {self.samples.count}: evaluation needs {LEAST_VIDEOS}, because its "
                "distances leave some out in turn; animate more"
            )
        for name, start in self.methods.items():
            self._require_possible(name, start)
        for name in self.students:
            if name in type(self).model_fields:  # methods and all other stages are sections
                raise ValueError(f"students.{name}: a section of the experiment has this name; choose another")
        least, why = self.training_clips_needed()
        if least > self.clips.train:
            raise ValueError(f"{why} is more than clips.train = {self.clips.train}")
        if not self.samples.rows:
            raise ValueError("samples.rows: none is left; keep one, or name one of your own")
        for row, sampler in self.samples.rows.items():
            if sampler.model not in (models := [TEACHER, *self.methods, *self.students]):
                raise ValueError(
                    f"samples.rows.{row}.model = {sampler.model} is not trained here; take one of {', '.join(models)}, "
                    f"add it to methods or students, or take the row away ({row}: null)"
                )
        return self

    def _require_possible(self, name: str, start: str) -> None:
        if name not in METHODS:
            raise ValueError(f"methods: there is no method {name}; there are {', '.join(METHODS)}")
        if start != TEACHER and start not in self.methods:
            raise ValueError(
                f"methods: {name} starts from {start}, which is not among the methods; add {start}, or let {name} "
                "start from teacher"
            )
        self.chain(name)
        section, needs = getattr(self, name), getattr(self.cluster, name)
        processes, shared = needs.nodes * max(1, needs.gpus), section.training.sharding.context_parallel
        if processes > 1 and processes % shared:
            raise ValueError(
                f"{name}.training.sharding.context_parallel = {shared} does not divide the {processes} processes that "
                f"cluster.{name} asks for; choose other nodes or gpus"
            )
        if start != TEACHER and section.student_lora != getattr(self, start).student_lora:
            raise ValueError(
                f"{name}.student_lora is not {start}.student_lora: the adapter that {start} trains is the one that "
                "goes on learning; set both alike, or leave both empty"
            )
        if section.few_step_shift is None and start != TEACHER and (found := getattr(self, start).few_step_shift):
            raise ValueError(
                f"{name}.few_step_shift is empty, and {start}, which it starts from, has {found:g}: its student would "
                f"be sampled at other times than {start} was trained for; set {name}.few_step_shift too"
            )

    def training_clips_needed(self) -> tuple[int, str]:
        """How many clips to train on the later stages need, and the setting or stage that needs them."""
        sizes = ((name, getattr(self, name).training.batch_size) for name in self.methods)
        needs = [(size, f"{name}.training.batch_size = {size}") for name, size in sizes]
        return max([*needs, (LEAST_VIDEOS, f"the {LEAST_VIDEOS} that evaluation compares with")])

    def chain(self, name: str) -> list[str]:
        """The methods that lead to the student of one, in order; it is the last of them."""
        found = [name]
        while (start := self.methods.get(found[0], TEACHER)) != TEACHER:
            if start in found:
                raise ValueError(f"methods: {' -> '.join([start, *found])} go in a circle; let one start from teacher")
            found.insert(0, start)
        return found

    @property
    def student(self) -> str:
        """The method whose student is the experiment's result: where the chain that is named first ends; "" for none.

        Methods that an overlay adds are shown beside it.
        """
        found = next(iter(self.methods), "")
        while following := next((name for name, start in self.methods.items() if found and start == found), ""):
            found = following
        return found
