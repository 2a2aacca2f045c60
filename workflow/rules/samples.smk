rule samples:
    input:
        folders_read_by("samples"),
    output:
        directory("results/{experiment}/samples"),
    log:
        "results/{experiment}/logs/samples.log",
    benchmark:
        "results/{experiment}/logs/samples.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: scaled(2, 8)
    resources:
        gpu=scaled(0, 1),
        mem_mb=scaled(4000, 128000),
        runtime=scaled(120, 1440),
    params:
        settings=settings_of("samples"),
    shell:
        "vpae samples --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
