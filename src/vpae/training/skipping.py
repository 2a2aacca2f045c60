"""Updates that are not made because their gradient is not finite, and when that ends a run."""

import sys
from collections.abc import Callable, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


class Skipped:
    """How many updates a run has skipped, and how many each role in a row; part of a resumable state.

    Args:
        limit: so many in a row of one role end the run.
        keys: number of a micro-batch -> the keys of this process's clips in it.
        saved: what `state` gave.
    """

    def __init__(self, limit: int, keys: Callable[[int], Sequence[str]] | None, saved: dict | None = None):
        self.limit, self.keys = limit, keys
        self.total, self.in_a_row = (saved["total"], dict(saved["in_a_row"])) if saved else (0, {})

    @property
    def state(self) -> dict:
        """Plain values to go on from."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def made(self, turn: str) -> None:
        """An update of a role was made."""
        self.in_a_row[turn] = 0

    def note(self, where: str, turn: str, norm: Tensor, losses: dict[int, Tensor], accelerator: Accelerator) -> None:
        """An update of a role was skipped; every process calls this.

        Args:
            where: phase and step, for the message.
            turn: the role.
            norm: of its gradient.
            losses: number of each micro-batch of the update -> this process's loss.
            accelerator: its first process says so.

        Raises:
            FloatingPointError: it was one too many in a row.
        """
        self.total += 1
        self.in_a_row[turn] = count = self.in_a_row.get(turn, 0) + 1
        # Those micro-batches whose loss is not finite; a gradient can also overflow behind finite losses.
        finite = {number: bool(loss.isfinite()) for number, loss in losses.items()}
        clips = [(key, ok) for n, ok in finite.items() for key in (self.keys(n) if self.keys else [f"batch {n}"])]
        if accelerator.num_processes > 1:
            clips = gather_object(clips)
        wrong = list(dict.fromkeys(key for key, ok in clips if not ok) or dict.fromkeys(key for key, _ in clips))
        message = (
            f"{where}: the gradient of {turn} is {norm.item()}, so that its update is skipped, {count} in a row "
            f"({self.limit} end the run); clips: {', '.join(wrong)}"
        )
        if count >= self.limit:
            raise FloatingPointError(
                f"{message}. Look at these clips and at the last lines of metrics.jsonl; leave the clips out, or lower "
                "the learning_rate. The last state before is kept"
            )
        if accelerator.is_main_process:
            print(f"vpae: {message}", file=sys.stderr, flush=True)
