rule report:
    input:
        folders_read_by("report"),
    output:
        update(directory("results/{experiment}/report")),
    log:
        "results/{experiment}/logs/report.log",
    benchmark:
        "results/{experiment}/logs/report.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: cpus("report")
    resources:
        **needs("report"),
    params:
        settings=settings_of("report"),
    shell:
        "vpae report --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
