rule teacher:
    input:
        folders_read_by("teacher"),
        teacher_files,
    output:
        directory("results/{experiment}/teacher"),
    log:
        "results/{experiment}/logs/teacher.log",
    benchmark:
        "results/{experiment}/logs/teacher.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: scaled(2, 8)
    resources:
        gpu=0,
        mem_mb=scaled(8000, 64000),
        runtime=480,
    params:
        settings=settings_of("teacher"),
    shell:
        "vpae teacher --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
