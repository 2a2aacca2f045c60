"""Snakemake makes results, DVC versions them: what makes the two agree on what is up to date."""
