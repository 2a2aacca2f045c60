rule equilibrium:
    input:
        folders_read_by("equilibrium"),
    output:
        directory("results/{experiment}/equilibrium"),
    log:
        "results/{experiment}/logs/equilibrium.log",
    benchmark:
        "results/{experiment}/logs/equilibrium.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: scaled(2, 8)
    resources:
        gpu=scaled(0, 1),
        mem_mb=scaled(4000, 256000),
        runtime=scaled(120, 1440),
    params:
        settings=settings_of("equilibrium"),
    shell:
        "vpae equilibrium --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
