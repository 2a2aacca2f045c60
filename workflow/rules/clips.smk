rule clips:
    input:
        folders_read_by("clips"),
        videos,
    output:
        directory("results/{experiment}/clips"),
    log:
        "results/{experiment}/logs/clips.log",
    benchmark:
        "results/{experiment}/logs/clips.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: lambda wildcards: experiment(wildcards.experiment).settings.clips.workers
    resources:
        gpu=0,
        mem_mb=scaled(4000, 64000),
        runtime=scaled(60, 1440),
    params:
        settings=settings_of("clips"),
    shell:
        "vpae clips --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
