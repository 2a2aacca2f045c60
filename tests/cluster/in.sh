#!/usr/bin/env bash
# Runs a command among the cluster's processes, where its /etc/slurm is seen: tests/cluster/in.sh sinfo
set -euo pipefail
cluster=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../.cluster
[[ -e $cluster/run/slurmctld.pid ]] || { echo "in.sh: there is no cluster; start it: make cluster-up" >&2 && exit 1; }
exec nsenter --target "$(<"$cluster/run/slurmctld.pid")" --mount --wdns="$PWD" "$@"
