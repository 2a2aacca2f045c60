"""Measurements: sampling latency, training steps, encoding throughput, and the memory they take."""
