#!/usr/bin/env bash
# Runs a training stage as its experiment asks:
#
#     workflow/launch.sh NODES GPUS CPUS COMMAND...        GPUS and CPUS of each node
#
# `snakemake --profile slurm` calls it. Without Snakemake it goes to sbatch itself for several nodes, from the
# repository's root (on one node sbatch would warn only what srun has started: put `srun` before it, in a --wrap):
#
#     sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96 --mem=0 --time=24:00:00 --requeue \
#         --signal=TERM@900 --open-mode=append workflow/launch.sh 2 8 96 vpae priming --config FILE
#
# One node with at most one GPU runs the command as it is. Otherwise there is a process for each GPU, or for each node
# where there are none, started by torchrun, which srun starts on each node.
#
# Without SLURM, jobs that run at the same time share the machine's GPUs out: each waits until as many are free as it asks
# for, and sees only those. Whoever sets CUDA_VISIBLE_DEVICES names those that there are.
#
# Under SLURM, a command that was told to end and saved its state (exit 3) puts its job back into the queue, where it
# keeps its number: the workflow goes on waiting for it, and none of its retries is spent. That is meant for a time
# limit, or for notice of preemption. Of a job that is cancelled, or that SLURM is requeueing already, the state is
# saved just the same, and the rest is left to whoever did it.
set -uo pipefail

nodes=$1 gpus=$2 cpus=$3
shift 3
processes=$((gpus > 1 ? gpus : 1)) # on each node
saved=3

torchrun_here() { # RENDEZVOUS... COMMAND...
    ((gpus)) || export ACCELERATE_USE_CPU=true # or accelerate would not see that there are several processes
    ((gpus == 0)) || export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
    local share=$((cpus > processes ? cpus / processes : 1)) # Snakemake says the number of all CPUs, for one process
    export OMP_NUM_THREADS=$((${OMP_NUM_THREADS:-share} < share ? OMP_NUM_THREADS : share))
    # SLURM signals all processes. torchrun would pass it on, and kill after 30 seconds what is still saving.
    trap '' TERM USR1
    torchrun --signals-to-handle=SIGINT --nproc-per-node="$processes" --max-restarts=0 --no-python "$@"
}

train_on_nodes() {
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        echo "launch.sh: this stage asks for $nodes nodes; run it with \`snakemake --profile slurm\`, or set its nodes" \
            "to 1 in the section cluster of the configuration" >&2
        return 2
    fi
    export -f torchrun_here
    export processes gpus cpus
    export port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
    # shellcheck disable=SC2016 # SLURM sets these variables on each node
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1 bash -c '
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        torchrun_here --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
            --master-addr="$first" --master-port="$port" "$@"' bash "${marked[@]}"
}

take_gpus() { # locks end with the process that has them open: this script, and what it starts
    local number name asked=",${CUDA_VISIBLE_DEVICES-all}," all=() taken=() lock turn said=
    while IFS=', ' read -r number name; do
        [[ $asked != ,all, && $asked != *",$number,"* && $asked != *",$name,"* ]] || all+=("$name")
    done < <(nvidia-smi --query-gpu=index,uuid --format=csv,noheader 2>/dev/null)
    ((${#all[@]} >= gpus)) || return 0 # the command says what it lacks
    mkdir -p "$locks" && : >"$locks/turn" || return 0 # no room for locks: as if nobody else were there
    exec {turn}>"$locks/turn"
    flock "$turn" # one after the other, so that no two wait for what the other has
    while ((${#taken[@]} < gpus)); do
        for name in "${all[@]}"; do
            ((${#taken[@]} < gpus)) || break
            [[ " ${taken[*]-} " != *" $name "* ]] || continue
            exec {lock}>"$locks/$name"
            if flock -n "$lock"; then taken+=("$name"); else exec {lock}>&-; fi
        done
        ((${#taken[@]} == gpus)) && break
        [[ $said ]] || echo "launch.sh: waits until $gpus of ${#all[@]} GPUs are free" >&2
        said=yes
        sleep 1
    done
    exec {turn}>&-
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${taken[*]}")
    export CUDA_VISIBLE_DEVICES
}

locks=${TMPDIR:-/tmp}/vpae-gpus.$UID
if ((gpus)) && [[ -z ${SLURM_JOB_ID:-} ]] && command -v flock >/dev/null; then take_gpus; fi
trap : TERM USR1 # from here on: live on until the command has saved

if ((nodes * processes == 1)); then
    "$@"
    code=$?
else
    # torchrun turns every exit code into 1, so the command leaves a mark where all nodes see it.
    mark=$PWD/.snakemake/saved.$$.${SLURM_JOB_ID:-local}
    mkdir -p .snakemake && rm -f "$mark"
    # shellcheck disable=SC2016 # for the inner shell
    marked=(bash -c 'trap : TERM USR1; mark=$0; "$@"; code=$?; if ((code == 3)); then touch "$mark"; fi; exit "$code"'
        "$mark" "$@")
    if ((nodes == 1)); then (torchrun_here --standalone "${marked[@]}"); else train_on_nodes; fi
    code=$?
    [[ ! -e $mark ]] || code=$saved
    rm -f "$mark"
fi

if ((code == saved)) && [[ -n ${SLURM_JOB_ID:-} && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "launch.sh: the state is saved; job $SLURM_JOB_ID goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID" && sleep 300 # SLURM ends the job while it sleeps
fi
exit "$code"
