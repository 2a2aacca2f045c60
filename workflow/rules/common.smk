# What the rules share: experiments by name, what a stage reads, the settings it depends on, what it needs.
import json
import re
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from vpae.artifacts import ArtifactError
from vpae.config.teacher import file_and_strength
from vpae.experiment import ConfigError, load
from vpae.graph import STAGES, owner, stage_folder, stage_settings, stages_of, upstream
from vpae.planning.presence import missing_teacher
from vpae.report.alike import is_of, require_alike
from vpae.stages import missing_students
from vpae.standing import standing

DIVISIBLE = [name for name, stage in STAGES.items() if stage.divisible]

# A stage that is told to end (TERM, USR1) saves its state first; shell and tee must live on until it has.
shell.prefix("set -euo pipefail; trap : TERM USR1; tee() {{ trap '' INT TERM USR1; command tee \"$@\"; }}; ")

# A stage replaces its result itself, and only by a finished successor. `update` keeps Snakemake from removing the result
# beforehand; what it does instead, copying all of it in case the job fails, is not needed either.
with suppress(ImportError):
    from snakemake.persistence import FileBackupMixin

    FileBackupMixin.backup_output = lambda self, path: None
    FileBackupMixin.restore_output = lambda self, path: path.exists()
    FileBackupMixin.cleanup_backup = lambda self, path: None


# Newer than any result: what is stale reads it, because Snakemake has not always notes of what a result was made of.
NOW = ".snakemake/now"
Path(NOW).parent.mkdir(exist_ok=True)
with suppress(PermissionError):  # another user's, who may look at what there is to do
    Path(NOW).write_text(str(time.time_ns()))  # Snakemake compares the content of small files, too


wildcard_constraints:
    experiment="[^/]+",
    part="[0-9]+",
    parts="[0-9]+",


def stop(message):
    """End with a message for people: an exception of Snakemake's would surround it with the lines that raised it."""
    sys.exit(f"vpae: {message}")


@cache
def experiment(name):
    """The experiment in configs/NAME.yaml."""
    try:
        return load(Path("configs") / f"{name}.yaml")
    except ConfigError as error:
        stop(error)


if unknown := config.keys() - {"experiment", "seeds"}:
    stop(f"--config {', '.join(sorted(unknown))}: the workflow knows experiment=NAME[,NAME] and seeds=N[,N] alone")

# Snakemake makes numbers of 007 and 1e5, whatever quotes are around them: then it would be another experiment's name.
GIVEN = config.get("experiment", "tiny")
NAMES = GIVEN if isinstance(GIVEN, list) else str(GIVEN).split(",")
if not isinstance(GIVEN, (str, list)) or not all(isinstance(name, str) for name in NAMES):
    stop(
        f"--config experiment: Snakemake reads {GIVEN} there, which is no name; write the name in brackets, --config "
        "'experiment=[NAME]', or rename its file in configs/ such that it is no number, True or False"
    )


def all_folders(wildcards):
    """Input function: every stage of the experiments asked for; what an overlay leaves alone is its base's."""
    if "seeds" in config:
        stop(f"--config seeds: of `rivals` and `ablations`; here name each, for instance experiment={NAMES[0]}@1")
    wanted = [(experiment(name), stage) for name in NAMES for stage in stages_of(experiment(name).settings)]
    return sorted({str(stage_folder(source, stage)) for source, stage in wanted})


def of_stage(function):
    """Make of function(stage, name) what the rules' loops need: of a stage, a function of the wildcards."""
    return lambda stage: lambda wildcards: function(stage, wildcards.experiment)


@of_stage
def folders_read_by(stage, name):
    """Input function: the results that a stage reads."""
    read = undated(upstream_folders(name, stage), name, stage)
    return read if stands(name).get(stage, True) else [*read, NOW]


@cache
def stands(name):
    """Stage -> whether its result is up to date by its content, for the stages of the experiment NAME."""
    try:
        return standing(experiment(name))
    except (ArtifactError, PermissionError) as error:
        stop(error)


def undated(files, name, stage):
    """Files that a stage reads. Content, and not their dates, says whether its result is up to date."""
    return [ancient(file) for file in files] if stands(name).get(stage) else files


@cache
def upstream_folders(name, stage):
    """The results that a stage of the experiment NAME reads."""
    source = experiment(name)
    if source.name != name:
        stop(f"{name} is {source.name}, whose own seed it names; ask for {stage_folder(source, stage)}")
    if owner(source, stage) is not source:
        stop(f"{source.path} leaves {stage} as it is in its base; ask for {stage_folder(source, stage)}")
    if problems := missing_students(source):
        stop("\n".join(problems))
    return [str(stage_folder(source, above)) for above in upstream(source.settings, stage)]


@of_stage
def parts_of(stage, name):
    """Input function: the marks of the jobs that share a stage's work; none where its own job does it all."""
    jobs = getattr(experiment(name).settings.jobs, stage) if stage in DIVISIBLE else 1
    return [f"results/{name}/.parts/{stage}/{number}-of-{jobs}" for number in range(1, jobs + 1)] if jobs > 1 else []


@of_stage
def files_read_by(stage, name):
    """Input function: what a stage reads beside the results of others."""
    return FILES_READ[stage](name) if stage in FILES_READ else []


def videos(name):
    """The folder or table of videos; nothing for the procedural world."""
    source = experiment(name)
    clips = source.settings.clips
    if clips.source == "world":
        return []
    if not Path(clips.path).exists() and stands(name).get("clips"):
        return []  # as after a restore: nothing reads them again
    return undated([existing(clips.path, source, "clips.path")], name, "clips")


def teacher_files(name):
    """Index and weights of a teacher taken from a folder, and the LoRAs merged into one."""
    source = experiment(name)
    teacher = source.settings.teacher
    if teacher.source == "folder":
        index = existing(Path(teacher.path) / "model_index.json", source, "teacher.path")
    if problems := missing_teacher(source):
        stop("\n".join(problems))
    files = [str(file_and_strength(named)[0]) for named in teacher.loras]
    if teacher.source == "folder":
        files += [index, *map(str, sorted(Path(teacher.path).glob("*/*.safetensors")))]
    return undated(files, name, "teacher")


def decoder_file(name):
    """The file of a small decoder, if one is named."""
    source = experiment(name)
    file = source.settings.samples.decoder
    return undated([existing(file, source, "samples.decoder")] if file else [], name, "samples")


FILES_READ = {"clips": videos, "teacher": teacher_files, "samples": decoder_file}


def existing(path, source, key):
    """The path, if there is something."""
    if not Path(path).exists():
        stop(f"{source.path}: {key}: {path} does not exist; correct the key, or `dvc pull` what DVC versions")
    return str(path)


@of_stage
def settings_of(stage, name):
    """Params function: just the settings a stage depends on, so that a change re-runs what it concerns and no more.

    What it reads stands among them, because the default profile tells Snakemake not to compare sets of input files: the
    marks of a stage's parts would count, and another number of jobs would run it again.
    As text with sorted keys, because Snakemake, unlike vpae, would take another order for another value.
    """
    found = dependencies(name, stage)
    if stage == "clips":  # whether the videos are there or not
        clips = experiment(name).settings.clips
        return f"{found} {[] if clips.source == 'world' else [clips.path]}"
    # A decoder stands among the settings of `samples` already.
    return f"{found} {teacher_files(name)}" if stage == "teacher" else found


@cache
def dependencies(name, stage):
    """The settings and folders on which a stage of the experiment NAME depends, as text."""
    reads = upstream_folders(name, stage)
    return json.dumps(stage_settings(experiment(name).settings, stage) | {"reads": reads}, sort_keys=True)


def needs(stage):
    """Resources of a stage's jobs, from the experiment's section `cluster`, in the words of Snakemake's SLURM plugin.

    Those that do not apply are None, which Snakemake takes for absent. GPUs are asked for per node (gres), not in all
    (gpu), which SLURM could spread over nodes as it likes.
    """

    def resource(value):
        def of(wildcards):
            settings = experiment(wildcards.experiment).settings
            return value(getattr(settings.cluster, stage), settings)

        return of

    return {
        "nodes": resource(lambda job, _: job.nodes),
        "gpus_per_node": resource(lambda job, _: job.gpus),
        "gres": resource(lambda job, _: f"gpu:{job.gpus}" if job.gpus else None),
        "cpus_per_task": resource(lambda job, settings: settings.clips.workers if stage == "clips" else job.cpus),
        "mem_mb": resource(lambda job, _: 1000 * job.memory_gb),
        "runtime": resource(lambda job, _: job.minutes),
        "warning_seconds": resource(lambda job, _: job.warning_seconds),
        # With several nodes the job itself calls srun, once per node; the plugin calls that mpi.
        "mpi": resource(lambda job, _: "srun" if job.nodes > 1 else None),
        "tasks": resource(lambda job, _: job.nodes if job.nodes > 1 else None),
        "tasks_per_gpu": resource(lambda job, _: 0 if job.nodes > 1 else None),
    }


def compared(kind, table):
    """Input function: evaluations of the experiment and of what it is compared with, over all seeds.

    Content, and not their dates, says whether the table is up to date.
    """

    def read(wildcards):
        names = names_compared(kind)
        sources = [experiment(name) for name in names]
        folders = [str(stage_folder(source, "evaluation")) for source in sources]
        stand = all(stands(name).get("evaluation") for name in names)
        if not stand:
            return folders
        return [*map(ancient, folders)] if is_of(Path(f"results/{table}.json"), sources) else [*folders, NOW]

    return read


def words_compared(kind):
    """Params function: the names of these experiments, in one line."""
    return lambda wildcards: " ".join(names_compared(kind))


@cache
def names_compared(kind):
    """Names of the experiments, NAME@SEED where the seed is not the file's own; they measure alike."""
    base = ",".join(NAMES)
    if not re.fullmatch("[^,@[]+", base):
        stop(f"--config experiment={base}: `{kind}` takes the name of one experiment; seeds=N[,N] says which seeds")
    if kind == "rivals":
        names = [f"{base}-consistency", f"{base}-rivals"]
    else:
        found = Path("configs").glob(f"{base}-*.yaml")
        names = [base, *sorted(file.stem for file in found if file.stem.startswith((f"{base}-no-", f"{base}-with-")))]
        if len(names) == 1:
            stop(
                f"--config experiment={base}: there is no configs/{base}-no-*.yaml or {base}-with-*.yaml to compare; "
                f"write one, with `extends: {base}` and the keys that differ"
            )
    given = config.get("seeds", "0,1,2" if kind == "rivals" else experiment(base).settings.seed)
    seeds = [str(seed).strip() for seed in (given if isinstance(given, list) else str(given).split(","))]
    if not all(seed.isdigit() for seed in seeds):
        stop(f"--config seeds={given}: write whole numbers separated by commas, for instance seeds=0,1,2")
    sources = [experiment(f"{name}@{seed}") for seed in seeds for name in names]
    try:
        require_alike(sources)
    except ConfigError as error:
        stop(error)
    return [source.name for source in sources]
