rule equilibrium:
    input:
        folders_read_by("equilibrium"),
    output:
        update(directory("results/{experiment}/equilibrium")),
    log:
        "results/{experiment}/logs/equilibrium.log",
    benchmark:
        "results/{experiment}/logs/equilibrium.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: cpus("equilibrium")
    resources:
        **needs("equilibrium"),
    params:
        settings=settings_of("equilibrium"),
    shell:
        "workflow/launch.sh {resources.nodes} {resources.gpus_per_node} {resources.cpus_per_task}"
        " vpae equilibrium --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
