# Finished experiments in one table. `snakemake rivals` compares an experiment with its rivals, `snakemake ablations` with
# its overlays NAME-no-... and NAME-with-...; `--config experiment=NAME seeds=0,1,2` says which, and over which seeds.
def compared(kind):
    """Input function: evaluations of the experiment and of what it is compared with, over all seeds."""

    def folders(wildcards):
        return [str(stage_folder(experiment(name), "evaluation")) for name in names_compared(kind)]

    return folders


@cache
def names_compared(kind):
    """Names of the experiments, NAME@SEED where the seed is not the file's own."""
    base = config.get("experiment", "tiny")
    if kind == "rivals":
        names = [f"{base}-consistency", f"{base}-rivals"]
    else:
        found = Path("configs").glob(f"{base}-*.yaml")
        names = [base, *sorted(file.stem for file in found if file.stem.startswith((f"{base}-no-", f"{base}-with-")))]
    seeds = str(config.get("seeds", "0,1,2" if kind == "rivals" else "0")).split(",")
    return [
        name if int(seed) == experiment(name).settings.seed else f"{name}@{seed}" for seed in seeds for name in names
    ]


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
