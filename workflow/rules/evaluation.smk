rule evaluation:
    input:
        folders_read_by("evaluation"),
        vbench_parts,
    output:
        update(directory("results/{experiment}/evaluation")),
    log:
        "results/{experiment}/logs/evaluation.log",
    benchmark:
        "results/{experiment}/logs/evaluation.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: cpus("evaluation")
    resources:
        **needs("evaluation"),
    params:
        settings=settings_of("evaluation"),
    shell:
        "vpae evaluation --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
