"""A script that runs a phase on several nodes: SLURM's part, the rendezvous, and what NCCL or gloo should know.

`sbatch` takes what `vpae launch` prints. SLURM starts one launcher per node (torchrun, or accelerate's), and each
starts one process per GPU; the first node is where they meet. Five minutes before the time is up each process gets
SIGUSR1 and saves its state; the job is then queued again and goes on from there.
"""

from dataclasses import dataclass

from vpae.experiment import ConfigError, Source

WARNING_SECONDS = 300
CPU_PROCESSES = 2


@dataclass(frozen=True)
class Job:
    """What to ask SLURM for, and how processes find each other.

    Attributes:
        nodes, gpus_per_node: no GPUs means two processes a node on its CPUs, over gloo.
        cpus_per_node: shared by the processes of a node.
        hours: time limit.
        partition, account: SLURM's, if the cluster asks for them.
        interface: network interface over which processes first meet; empty: they choose.
        port: of the rendezvous on the first node.
        launcher: torchrun or accelerate.
    """

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    hours: int = 24
    partition: str = ""
    account: str = ""
    interface: str = ""
    port: int = 29500
    launcher: str = "torchrun"

    @property
    def processes_per_node(self) -> int:
        """One for each GPU."""
        return self.gpus_per_node or CPU_PROCESSES

    @property
    def processes(self) -> int:
        """Of the whole job."""
        return self.nodes * self.processes_per_node


def render(source: Source, stage: str, job: Job) -> str:
    """The script.

    Args:
        source: the experiment.
        stage: a method.
        job: nodes, GPUs and how they meet.

    Raises:
        ConfigError: the experiment cannot run on so many processes.
    """
    _check(source, stage, job)
    return "\n".join([*_header(source, stage, job), "", *_environment(job), "", *_run(source, stage, job)]) + "\n"


def _check(source: Source, stage: str, job: Job) -> None:
    if job.nodes < 1 or job.gpus_per_node < 0 or job.hours < 1:
        raise ConfigError("vpae launch: --nodes and --hours are at least 1, --gpus-per-node is not negative")
    if job.launcher == "accelerate" and not job.gpus_per_node:
        raise ConfigError("vpae launch: --launcher accelerate needs GPUs; take torchrun on CPUs")
    sharding = getattr(source.settings, stage).training.sharding
    if job.processes % sharding.context_parallel:
        raise ConfigError(
            f"{source.path}: {stage}.training.sharding.context_parallel = {sharding.context_parallel} does not divide "
            f"{job.processes} processes; choose other numbers of nodes or GPUs"
        )


def _header(source: Source, stage: str, job: Job) -> list[str]:
    training = getattr(source.settings, stage).training
    clips = training.batch_size * training.accumulate * job.processes // training.sharding.context_parallel
    options = {
        "job-name": f"vpae-{stage}-{source.name}",
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_node,
        "mem": 0 if job.gpus_per_node else None,
        "time": f"{job.hours}:00:00",
        "partition": job.partition or None,
        "account": job.account or None,
        "signal": f"USR1@{WARNING_SECONDS}",
        "requeue": "",
        "open-mode": "append",
        "output": f"results/{source.name}/logs/{stage}-%j.log",
    }
    given = {name: value for name, value in options.items() if value is not None}
    lines = [f"#SBATCH --{name}={value}" if value != "" else f"#SBATCH --{name}" for name, value in given.items()]
    return [
        "#!/bin/bash",
        f"# {stage} of {source.path}: {job.nodes} nodes x {job.processes_per_node} processes, {clips} clips a step.",
        f"# Submit it from the repository's root, after: mkdir -p results/{source.name}/logs",
        *lines,
    ]


def _environment(job: Job) -> list[str]:
    threads = max(1, job.cpus_per_node // job.processes_per_node)
    lines = [
        "set -euo pipefail",
        'export PATH="$PWD/.venv/bin:$PATH"',
        # No `| head -n 1`: under pipefail a scontrol that still writes when head has gone would end the job.
        'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "export first=${hosts%%$'\\n'*}",
        f"export OMP_NUM_THREADS={threads}",
        f"export SRUN_CPUS_PER_TASK={job.cpus_per_node}  # since 22.05 srun does not take it from the job",
        "export HF_HUB_OFFLINE=1  # compute nodes often have no network, and all that a phase reads is on disk",
    ]
    if job.gpus_per_node:
        lines += [
            "export NCCL_DEBUG=WARN",
            "export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a lost node ends the job instead of stopping it",
            "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        ]
    else:
        lines.append("export ACCELERATE_USE_CPU=true")
    if job.interface:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if job.gpus_per_node else ("GLOO_SOCKET_IFNAME",)
        lines += [f"export {name}={job.interface}" for name in names]
    return lines


def _run(source: Source, stage: str, job: Job) -> list[str]:
    command = f"vpae {stage} --config {source.path}"
    if job.launcher == "torchrun":
        launcher = [
            f"torchrun --nnodes={job.nodes} --nproc-per-node={job.processes_per_node} --max-restarts=0",
            '--rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
            f'--rdzv-backend=c10d --rdzv-endpoint="$first:{job.port}"',
            f"--no-python {command}",
        ]
    else:
        launcher = [
            f"accelerate launch --multi_gpu --num_machines={job.nodes} --num_processes={job.processes}",
            f'--machine_rank="$SLURM_NODEID" --main_process_ip="$first" --main_process_port={job.port}',
            f"--rdzv_backend=static --mixed_precision=no --dynamo_backend=no --no_python {command}",
        ]
    return [
        "# SIGUSR1 reaches every process: ignored by the launcher, which it would kill, and heeded by its workers.",
        "if srun --kill-on-bad-exit=1 bash -c '",
        '    trap "" USR1',
        "    exec " + " \\\n        ".join(launcher),
        "'; then exit 0; fi",
        "# Ended by the warning: the state is saved, so queue the job again. Ended before: something is wrong.",
        f"if (( SECONDS > {job.hours * 3600 - 2 * WARNING_SECONDS} )); then",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "    exit 0",
        "fi",
        "exit 1",
    ]
