"""Students for other tools: a diffusers folder, Wan's original key names, LoRA files; and their model card."""
