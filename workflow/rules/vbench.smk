# VBench-I2V by its official networks: a job for each dimension and part of the samples. What they find is recognised by
# what it was found of, and the stage `evaluation` gathers it. The tiny networks need no such jobs: there the stage
# measures by itself.
rule vbench:
    input:
        folders_read_by("evaluation"),
    output:
        temp(touch("results/{experiment}/.parts/vbench/{dimension}/{part}-of-{parts}")),
    log:
        "results/{experiment}/logs/vbench/{dimension}/{part}-of-{parts}.log",
    benchmark:
        "results/{experiment}/logs/vbench/{dimension}/{part}-of-{parts}.benchmark.tsv"
    wildcard_constraints:
        dimension="[a-z0-9_]+",
    conda:
        "../../environment.yml"
    threads: cpus("evaluation")
    resources:
        **needs("evaluation"),
    params:
        settings=settings_of("evaluation"),
    shell:
        "vpae evaluation run --experiment configs/{wildcards.experiment}.yaml --dimensions {wildcards.dimension}"
        " --shard {wildcards.part}/{wildcards.parts} 2>&1 | tee {log}"
