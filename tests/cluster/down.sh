#!/usr/bin/env bash
# Ends the cluster that up.sh started, with its jobs, and removes its folder. The namespace ends with its last process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cluster=$PWD/.cluster
[[ -d $cluster ]] || exit 0

if tests/cluster/in.sh scancel --quiet --user=root 2>/dev/null; then
    for _ in {1..60}; do
        [[ -n $(tests/cluster/in.sh squeue --noheader) ]] || break
        sleep 0.5
    done
fi
for file in "$cluster"/run/slurmd.*.pid "$cluster"/run/slurmctld.pid "$cluster"/run/munge/munged.pid; do
    [[ ! -e $file ]] || kill "$(<"$file")" 2>/dev/null || true
done
for _ in {1..60}; do
    compgen -G "$cluster/run/slurm*.pid" >/dev/null || break
    sleep 0.5
done
rm -rf "$cluster"
