#!/usr/bin/env bash
# Measures one GPU within ten minutes, most valuable first:
#
#     workflow/device.sh FOLDER [CONFIG [OPTIONS...]]      options of `python -m vpae.bench.device`
#
# Each part is a process of its own with a time limit; its rows go to FOLDER/rows.jsonl as soon as they are known.
# Turns of training are measured on 5 of the network's layers: seconds are in proportion, utilisation is the same.
set -uo pipefail

out=$1 config=${2:-configs/wan2.1-i2v-14b-480p-lora.yaml}
layers=${LAYERS-5}
mkdir -p "$out"

part() {
    local limit=$1
    shift
    timeout --kill-after=5 "$limit" \
        "${PYTHON:-python3}" -W ignore -m vpae.bench.device --config "$config" --out "$out/rows.jsonl" "$@" ||
        echo "{\"part\": \"$2\", \"name\": \"ended early\", \"code\": $?}" | tee -a "$out/rows.jsonl"
}

part 50 --part video "${@:3}"
part 85 --part sampling "${@:3}"
part 200 --part equilibrium --layers "$layers" --set "equilibrium.head.taps=[]" "${@:3}"
part 150 --part priming --layers "$layers" "${@:3}"
# Checkpoints that keep attention's outputs; compiled blocks would hide it from them.
for phase in equilibrium priming; do
    part 60 --part "$phase" --layers "$layers" --eager --set "equilibrium.head.taps=[]" \
        --set "$phase.training.sharding.activation_checkpointing=attention" "${@:3}"
done
exit 0
