"""VBench-I2V: nine dimensions of image-to-video generation, their totals, and what runs them over a suite or a folder.

It stands alone: `vbench-i2v score | run | weights` (or `python -m vbench_i2v`), and `score_folder` from Python. Other
networks than the benchmark's own are handed in as `base.Backbones`.
"""

__version__ = "1.0.0"
