# The workflow. `snakemake all` builds the experiment `tiny`; `--config experiment=NAME[,NAME]` builds others, one
# configs/NAME.yaml each, and NAME@SEED is NAME with another seed. `snakemake rivals` and `snakemake ablations` compare an
# experiment with others in one table. Where the jobs run is the profile's affair: `snakemake --profile slurm all`.
from snakemake.utils import min_version

min_version("9.27")


include: "workflow/rules/common.smk"
include: "workflow/rules/stages.smk"
include: "workflow/rules/comparison.smk"


localrules:
    all,
    rivals,
    ablations,


rule all:
    default_target: True
    input:
        all_folders,
