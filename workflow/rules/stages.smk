# A rule for each stage, and for each method of `vpae.distill.METHODS`; what they differ in stands in `vpae.graph.STAGES`.
for stage in STAGES:

    rule:
        name:
            stage
        input:
            folders_read_by(stage),
            files_read_by(stage),
            parts_of(stage),
        output:
            update(directory(f"results/{{experiment}}/{stage}")),
        log:
            f"results/{{experiment}}/logs/{stage}.log",
        benchmark:
            f"results/{{experiment}}/logs/{stage}.benchmark.tsv"
        conda:
            "../../environment.yml"
        threads: needs(stage)["cpus_per_task"]
        resources:
            **needs(stage),
        params:
            settings=settings_of(stage),
            stage=stage,
        shell:
            "workflow/launch.sh {resources.nodes} {resources.gpus_per_node} {resources.cpus_per_task}"
            " vpae {params.stage} --config configs/{wildcards.experiment}.yaml 2>&1 | tee {log}"


# A share of a stage's work, as large as the experiment's `jobs` say; the stage itself then only gathers.
for stage in DIVISIBLE:

    rule:
        name:
            f"{stage}_part"
        input:
            folders_read_by(stage),
            files_read_by(stage),
        output:
            temp(touch(f"results/{{experiment}}/.parts/{stage}/{{part}}-of-{{parts}}")),
        log:
            f"results/{{experiment}}/logs/{stage}/{{part}}-of-{{parts}}.log",
        benchmark:
            f"results/{{experiment}}/logs/{stage}/{{part}}-of-{{parts}}.benchmark.tsv"
        conda:
            "../../environment.yml"
        threads: needs(stage)["cpus_per_task"]
        resources:
            **needs(stage),
        params:
            settings=settings_of(stage),
            stage=stage,
        shell:
            "workflow/launch.sh {resources.nodes} {resources.gpus_per_node} {resources.cpus_per_task}"
            " vpae {params.stage} --config configs/{wildcards.experiment}.yaml --part {wildcards.part}/{wildcards.parts}"
            " 2>&1 | tee {log}"
