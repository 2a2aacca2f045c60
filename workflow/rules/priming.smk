rule priming:
    input:
        folders_read_by("priming"),
    output:
        update(directory("results/{experiment}/priming")),
    log:
        "results/{experiment}/logs/priming.log",
    benchmark:
        "results/{experiment}/logs/priming.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: cpus("priming")
    resources:
        **needs("priming"),
    params:
        settings=settings_of("priming"),
    shell:
        "workflow/launch.sh {resources.nodes} {resources.gpus_per_node} {resources.cpus_per_task}"
        " vpae priming --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
