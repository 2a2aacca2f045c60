#!/usr/bin/env bash
# Brings one result up to date, for DVC:
#
#     workflow/stage.sh STAGE EXPERIMENT
#
# Snakemake decides and runs that one rule, and the jobs it is shared out to. Where Snakemake has no notes on a result
# (it was pulled, say), it cannot see that settings have changed; so the content has the last word.
set -euo pipefail

stage=$1 experiment=$2

make_it() { # [--forcerun STAGE]
    snakemake "$@" --allowed-rules "$stage" "${stage}_part" -- "results/$experiment/$stage"
}
is_true() {
    vpae verify "$stage" --config "configs/$experiment.yaml"
}

make_it
is_true || { make_it --forcerun "$stage" && is_true; }
