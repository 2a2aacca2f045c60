rule clips:
    input:
        folders_read_by("clips"),
        parts_of("clips"),
        videos,
    output:
        update(directory("results/{experiment}/clips")),
    log:
        "results/{experiment}/logs/clips.log",
    benchmark:
        "results/{experiment}/logs/clips.benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: cpus("clips")
    resources:
        **needs("clips"),
    params:
        settings=settings_of("clips"),
        part="",
    shell:
        "vpae clips --config configs/{wildcards.experiment}.yaml {params.part} 2>&1 | tee {log}"


# A share of the stage's work, as large as the experiment's `jobs` say; the stage itself then only gathers.
use rule clips as clips_part with:
    input:
        folders_read_by("clips"),
        videos,
    output:
        temp(touch("results/{experiment}/.parts/clips/{part}-of-{parts}")),
    log:
        "results/{experiment}/logs/clips/{part}-of-{parts}.log",
    benchmark:
        "results/{experiment}/logs/clips/{part}-of-{parts}.benchmark.tsv"
    params:
        part="--part {part}/{parts}",
