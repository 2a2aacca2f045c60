# The workflow. `snakemake all` builds the experiment `tiny`; `--config experiment=NAME[,NAME]` builds others, one
# configs/NAME.yaml each. Where the jobs run is the profile's affair: `snakemake --profile slurm all`.
from snakemake.utils import min_version

min_version("9.27")


include: "workflow/rules/common.smk"
include: "workflow/rules/stages.smk"
include: "workflow/rules/vbench.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        all_folders,
