"""The errors for input that cannot be used."""


class VBenchError(RuntimeError):
    """A file or setting that is missing or is not what it says; the message names it and the remedy."""


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, in brief."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class NotComputed(RuntimeError):
    """A dimension whose backbone or weights are absent or damaged; the message says what is missing and how to install
    or fetch it. Never a score of 0."""
