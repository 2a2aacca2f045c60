rule evaluation:
    input:
        folders_read_by("evaluation"),
    output:
        directory("results/{experiment}/evaluation"),
    log:
        "results/{experiment}/logs/evaluation.log",
    benchmark:
        "results/{experiment}/logs/evaluation.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: scaled(2, 8)
    resources:
        gpu=scaled(0, 1),
        mem_mb=scaled(4000, 64000),
        runtime=scaled(60, 480),
    params:
        settings=settings_of("evaluation"),
    shell:
        "vpae evaluation --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
