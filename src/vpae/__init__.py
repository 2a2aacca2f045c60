"""V-PAE: phased one-step adversarial equilibrium for video diffusion models."""

__version__ = "0.1.0"
