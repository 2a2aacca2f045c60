"""Losses as pure functions of tensors, one small file each, with their equations."""
