rule latents:
    input:
        folders_read_by("latents"),
        parts_of("latents"),
    output:
        update(directory("results/{experiment}/latents")),
    log:
        "results/{experiment}/logs/latents.log",
    benchmark:
        "results/{experiment}/logs/latents.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: cpus("latents")
    resources:
        **needs("latents"),
    params:
        settings=settings_of("latents"),
        part="",
    shell:
        "vpae latents --config configs/{wildcards.experiment}.yaml {params.part} 2>&1 | tee {log}"


# A share of the stage's work, as large as the experiment's `jobs` say; the stage itself then only gathers.
use rule latents as latents_part with:
    input:
        folders_read_by("latents"),
    output:
        temp(touch("results/{experiment}/.parts/latents/{part}-of-{parts}")),
    log:
        "results/{experiment}/logs/latents/{part}-of-{parts}.log",
    benchmark:
        "results/{experiment}/logs/latents/{part}-of-{parts}.benchmark.tsv"
    params:
        part="--part {part}/{parts}",
