"""Clips, their decoding, their encoding into latents, and the procedural world that stands in for a corpus."""
