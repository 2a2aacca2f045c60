# Finished experiments in one table. `snakemake rivals` compares an experiment with its rivals, `snakemake ablations` with
# its overlays NAME-no-... and NAME-with-...; `--config experiment=NAME seeds=0,1,2` says which, and over which seeds.
rule rivals:
    input:
        compared("rivals"),
    output:
        multiext("results/comparison", ".json", ".csv", ".md"),
    log:
        "results/logs/comparison.log",
    conda:
        "../../environment.yml"
    params:
        names=lambda wildcards: " ".join(names_compared("rivals")),
    shell:
        "vpae compare {params.names} --out results/comparison 2>&1 | tee {log}"


rule ablations:
    input:
        compared("ablations"),
    output:
        multiext("results/ablations", ".json", ".csv", ".md"),
    log:
        "results/logs/ablations.log",
    conda:
        "../../environment.yml"
    params:
        names=lambda wildcards: " ".join(names_compared("ablations")),
    shell:
        "vpae compare {params.names} --out results/ablations 2>&1 | tee {log}"
