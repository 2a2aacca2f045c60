"""How good the videos are: truth metrics, Frechet distance, latency."""
