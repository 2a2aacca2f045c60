#!/usr/bin/env bash
# Ends the cluster that up.sh started, with its jobs and all that in.sh runs there, and removes its folder.
#
# Whatever has the cluster's mount namespace belongs to it, also what SLURM has lost sight of; the namespace ends with
# its last process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cluster=$PWD/.cluster
[[ -d $cluster ]] || exit 0

members() { # A number that once was this namespace's could be another's now, but that would not have this /etc/slurm.
    find /proc/[0-9]*/ns/mnt -maxdepth 0 -lname "mnt:?$(<"$cluster/namespace")?" | sed 's|ns/mnt|mountinfo|' |
        xargs -r grep -l '/\.cluster/etc/slurm[^ ]* /etc/slurm ' | cut -d / -f 3
} 2>/dev/null # processes that have just ended

pids=()
if [[ -s $cluster/namespace ]]; then
    for signal in TERM KILL; do
        for _ in {1..20}; do
            mapfile -t pids < <(members)
            ((${#pids[@]})) || break 2
            kill -s $signal "${pids[@]}" 2>/dev/null || true
            sleep 0.5
        done
    done
fi
if ((${#pids[@]})); then
    echo "down.sh: these processes of the cluster do not end: ${pids[*]}" >&2
    exit 1
fi
rm -rf "$cluster"
