rule latents:
    input:
        folders_read_by("latents"),
    output:
        directory("results/{experiment}/latents"),
    log:
        "results/{experiment}/logs/latents.log",
    benchmark:
        "results/{experiment}/logs/latents.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: scaled(2, 8)
    resources:
        gpu=scaled(0, 1),
        mem_mb=scaled(4000, 128000),
        runtime=scaled(60, 1440),
    params:
        settings=settings_of("latents"),
    shell:
        "vpae latents --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"
