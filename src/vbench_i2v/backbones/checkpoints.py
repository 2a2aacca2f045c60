"""Weight files into networks."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vbench_i2v.errors import NotComputed, first_line


class _Inert(dict):
    """Stands for every object in a checkpoint that is no tensor; nothing of it is kept."""

    def __init__(self, *_args: object, **_named: object):
        super().__init__()

    def __setstate__(self, _state: object) -> None:
        pass


def require(path: Path) -> Path:
    """The path of a weight file.

    Raises:
        NotComputed: there is no such file.
    """
    if not path.exists():
        raise NotComputed(f"{path} is missing; `vbench-i2v weights --check` tells where it comes from, --fetch gets it")
    return path


def read_state(path: Path, with_others: bool = False) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, without running what else may be pickled in it.

    Args:
        path: the file.
        with_others: it holds other objects too, as AMT's trainer keeps the state of its optimiser, with NumPy's
            numbers. They become inert, and no code of theirs runs. Not for files from before PyTorch 1.6.

    Raises:
        NotComputed: the file is missing or damaged, or holds something else.
    """
    require(path)
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if with_others else []
        with torch.serialization.safe_globals([(_Inert, name) for name in others]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load names no error of its own
        raise NotComputed(f"{path} cannot be read ({first_line(error)}); fetch it again") from error


def fill(
    model: nn.Module,
    path: Path,
    device: torch.device,
    adapt: Callable[[dict], dict[str, Tensor]] = lambda state: state,
    with_others: bool = False,
) -> nn.Module:
    """A network with a file's tensors, ready for use.

    Args:
        model: the network.
        path: the file, read by `read_state`.
        device: where the network runs.
        adapt: what the file holds -> tensors under the network's own names.
        with_others: see `read_state`.

    Raises:
        NotComputed: the file cannot be read, or its names or shapes are not this network's.
    """
    state = read_state(path, with_others)
    try:
        model.load_state_dict(adapt(state))
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        said = f"{path} holds other weights than this network's ({first_line(error)})"
        raise NotComputed(f"{said}; fetch it again") from error
    return model.eval().requires_grad_(False).to(device)
