"""MagicDistillation (arXiv 2503.13319): score distillation from a teacher weakened towards the fake model.

A share of the fake model's adapter is added to the teacher, so that the two distributions overlap. The paper's
supervision by real clips is not part of the rival that V-PAE's paper compares with, nor of this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vpae.config.section import Share
from vpae.distill import score
from vpae.lazy import lazy

if TYPE_CHECKING:
    from torch import nn

    from vpae.config import Experiment
    from vpae.models.adapters import SharedBase

adapters = lazy("vpae.models.adapters")


class Settings(score.Settings):
    """Stage `magic`: variational score distillation from a weak-to-strong teacher."""

    fake_form: Literal["lora"] = Field("lora", description="The fake model: its adapter is what weakens the teacher.")
    alpha_weak: Share = Field(0.25, description="Share of the fake model's adapter in the teacher (paper: 0.25).")


class Magic(score.ScoreDistillation):
    """Roles: as of `ScoreDistillation`; the teacher is the base with a share of the fake model's adapter."""

    name = "magic"
    title = "MagicDistillation"
    label = "MagicDistillation"
    about = "variational score distillation from a weak-to-strong teacher"
    Settings = Settings

    @classmethod
    def as_published(cls, settings: Experiment) -> bool:
        """As `Method`: with a teacher that is not weakened it is plain score distillation."""
        return getattr(settings, cls.name).alpha_weak > 0

    @classmethod
    def teacher_on(cls, shared: SharedBase, config: Settings) -> nn.Module:
        """The weak-to-strong teacher: it follows the fake model's adapter, which is not copied."""
        return shared.network(adapters.FAKE, config.alpha_weak)
