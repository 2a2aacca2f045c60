"""Phase I, stability priming: score distillation before any adversary sees the videos."""

from vpae.distill import score


class Settings(score.Settings):
    """Stage `priming`: phase I, stability priming by variational score distillation."""


class Priming(score.ScoreDistillation):
    """Score distillation from real latents noised at a low SNR (`generator_times`)."""

    name = "priming"
    title = "Phase I: stability priming"
    label = "student after phase I"
    about = "stability priming by variational score distillation"
    compared = ("fake", "fake_form", ("lora", "copy"))
    Settings = Settings
