"""What an experiment will need, before anyone submits it: parameters, FLOPs, memory, GPU-hours."""
