"""The losses, one small file each, and the phases that compose them."""
