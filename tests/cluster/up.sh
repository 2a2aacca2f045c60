#!/usr/bin/env bash
# Starts a SLURM cluster on this machine: munge, slurmctld, and two nodes with four CPUs and two fake GPUs each.
#
# All it writes is in .cluster/, and what it lays over the system's folders only its own processes see, because they
# live in a mount namespace of their own. `tests/cluster/in.sh COMMAND` runs a command among them; `down.sh` ends it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cluster=$PWD/.cluster
export PATH=$PATH:/usr/sbin:/sbin # where Debian has the daemons; not in everybody's PATH
install="apt-get install --no-install-recommends munge slurmctld slurmd slurm-client"

if [[ ${1:-} != inside ]]; then
    for program in munged slurmctld slurmd srun unshare nsenter; do
        command -v $program >/dev/null || { echo "up.sh: $program is not installed; on Debian: $install" >&2 && exit 1; }
    done
    ((EUID == 0)) || { echo "up.sh: needs root, to lay its own /etc/slurm over the system's in a namespace" >&2 && exit 1; }
    if [[ -e $cluster/run/slurmctld.pid ]] && kill -0 "$(<"$cluster/run/slurmctld.pid")" 2>/dev/null; then
        echo "up.sh: the cluster is up already"
        exit
    fi
    tests/cluster/down.sh # what is left of one that died
    exec unshare --mount --propagation private tests/cluster/up.sh inside
fi

mkdir -p "$cluster"/{run/munge,run/spool,etc/slurm,munge,log,state}
readlink /proc/self/ns/mnt | tr -dc 0-9 >"$cluster/namespace" # by which down.sh knows all processes of the cluster
trap '(($? == 0)) || tail -n 20 "$cluster"/log/*.log >&2' EXIT

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
ports=$((10000 + $(cksum <<<"$cluster" | cut -d ' ' -f 1) % 9000)) # so that copies of the project can have one each
until port_is_free $ports && port_is_free $((ports + 1)) && port_is_free $((ports + 2)); do ports=$((ports + 3)); done

cat >"$cluster/etc/slurm/slurm.conf" <<END
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=$ports
SlurmUser=root
# A job that was requeued waits until its old credential is certainly void: 121 seconds by default.
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
KillWait=120
ReturnToService=2
# The nodes have more CPUs than this machine. Their sockets are in the spool folder: its path has to be short.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=1,bf_interval=2
StateSaveLocation=$cluster/state
SlurmdSpoolDir=/run/spool/%n
SlurmctldPidFile=$cluster/run/slurmctld.pid
SlurmdPidFile=$cluster/run/slurmd.%n.pid
SlurmctldLogFile=$cluster/log/slurmctld.log
SlurmdLogFile=$cluster/log/slurmd.%n.log
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((ports + 1))-$((ports + 2))] CPUs=4 RealMemory=64000 Gres=gpu:2
PartitionName=main Nodes=node[1-2] Default=YES PriorityTier=1
PartitionName=noticed Nodes=node[1-2] PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=node[1-2] PriorityTier=2
END
cat >"$cluster/etc/slurm/gres.conf" <<END
NodeName=node[1-2] Name=gpu File=/dev/null
NodeName=node[1-2] Name=gpu File=/dev/zero
END
cat /etc/hosts - >"$cluster/etc/hosts" <<<"127.0.0.1 node1 node2"
head -c 1024 /dev/urandom >"$cluster/munge/key"
chmod 400 "$cluster/munge/key"

mkdir -p /etc/slurm # the packages bring it; without them nothing gets here
mount --bind "$cluster/etc/slurm" /etc/slurm
mount --bind "$cluster/etc/hosts" /etc/hosts
mount --bind "$cluster/run" /run

munged --force --key-file="$cluster/munge/key" --seed-file="$cluster/munge/seed" --log-file="$cluster/log/munged.log"
slurmctld -i
slurmd -N node1
slurmd -N node2
for _ in {1..120}; do
    if [[ $(sinfo --noheader --Node --format=%t | sort -u) == idle ]]; then
        echo "up.sh: two nodes are idle; tests/cluster/in.sh COMMAND runs a command among them"
        exit
    fi
    sleep 0.5
done
echo "up.sh: the nodes are not idle after a minute; the logs say:" >&2
exit 1
