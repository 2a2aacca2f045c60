"""The report: one self-contained HTML page, and a picture for the README."""
