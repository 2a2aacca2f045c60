"""Snakemake makes results, DVC versions them: what keeps the two of one mind about what is up to date."""
