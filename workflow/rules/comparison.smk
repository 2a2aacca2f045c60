# Finished experiments in one table. `snakemake rivals` compares an experiment with its rivals, `snakemake ablations` with
# its overlays NAME-no-... and NAME-with-...; `--config experiment=NAME seeds=0,1,2` says which, and over which seeds.
for kind, table in {"rivals": "comparison", "ablations": "ablations"}.items():

    rule:
        name:
            kind
        input:
            compared(kind, table),
        output:
            multiext(f"results/{table}", ".json", ".csv", ".md"),
        log:
            f"results/logs/{table}.log",
        conda:
            "../../environment.yml"
        params:
            names=words_compared(kind),
            table=table,
        shell:
            "vpae compare {params.names} --out results/{params.table} 2>&1 | tee {log}"
