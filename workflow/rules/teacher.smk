rule teacher:
    input:
        folders_read_by("teacher"),
        teacher_files,
    output:
        update(directory("results/{experiment}/teacher")),
    log:
        "results/{experiment}/logs/teacher.log",
    benchmark:
        "results/{experiment}/logs/teacher.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: cpus("teacher")
    resources:
        **needs("teacher"),
    params:
        settings=settings_of("teacher"),
    shell:
        "workflow/launch.sh {resources.nodes} {resources.gpus_per_node} {resources.cpus_per_task}"
        " vpae teacher --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
