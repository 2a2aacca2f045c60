rule priming:
    input:
        folders_read_by("priming"),
    output:
        directory("results/{experiment}/priming"),
    log:
        "results/{experiment}/logs/priming.log",
    benchmark:
        "results/{experiment}/logs/priming.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: scaled(2, 8)
    resources:
        gpu=scaled(0, 1),
        mem_mb=scaled(4000, 256000),
        runtime=scaled(120, 1440),
    params:
        settings=settings_of("priming"),
    shell:
        "vpae priming --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
