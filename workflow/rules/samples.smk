rule samples:
    input:
        folders_read_by("samples"),
        parts_of("samples"),
    output:
        update(directory("results/{experiment}/samples")),
    log:
        "results/{experiment}/logs/samples.log",
    benchmark:
        "results/{experiment}/logs/samples.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: cpus("samples")
    resources:
        **needs("samples"),
    params:
        settings=settings_of("samples"),
        part="",
    shell:
        "vpae samples --config configs/{wildcards.experiment}.yaml {params.part} 2>&1 | tee {log}"


# A share of the stage's work, as large as the experiment's `jobs` say; the stage itself then only gathers.
use rule samples as samples_part with:
    input:
        folders_read_by("samples"),
    output:
        temp(touch("results/{experiment}/.parts/samples/{part}-of-{parts}")),
    log:
        "results/{experiment}/logs/samples/{part}-of-{parts}.log",
    benchmark:
        "results/{experiment}/logs/samples/{part}-of-{parts}.benchmark.tsv"
    params:
        part="--part {part}/{parts}",
