"""Wan as diffusers ships it, seen through this project's eyes; the discriminator's head; adapters."""
