"""V-PAE: image-to-video diffusion models distilled to one step, in two phases."""

__version__ = "0.1.0"
