"""Resumable states of a phase, by torch.distributed.checkpoint: whole or absent, sharded or not.

A state holds, for every role, the trained parameters and the optimiser's moments, and the EMA. Frozen weights (the
teacher's) are not in it: they are an input. It can be taken up by another number of processes.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vpae.training.phase import Phase

KEEP = 2
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(folder: Path, phase: Phase, position: dict) -> None:
    """Write `step-N` beside the older states and delete all but the newest two; every process calls this."""
    final = folder / f"step-{position['step']:08d}"
    temporary = folder / f".{final.name}.tmp"
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
    _wait_for_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(_state(phase), checkpoint_id=temporary)  # returns in the first process when all have written
    if first:
        (temporary / "position.json").write_text(json.dumps(position))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    _wait_for_all()


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def load_latest(folder: Path, phase: Phase) -> dict | None:
    """Restore the newest state into the phase's modules and optimisers.

    Returns:
        the position it was saved with; None where there is no state.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    state = _state(phase)
    saved = dcp.FileSystemReader(found[-1]).read_metadata().state_dict_metadata
    for name in phase.roles:
        # Weights that had got no gradient had no moments to save, but the template above has moments for all.
        place, moments = f"{name}.moments", state[f"{name}.moments"]
        state[place] = {
            weight: slots for weight, slots in moments.items() if any(f"{place}.{weight}.{s}" in saved for s in slots)
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=found[-1])
    for name, role in phase.roles.items():
        set_model_state_dict(role.module, state[f"{name}.model"], options=_TRAINED)
        # The rest of an optimiser's state is settings, grouped by where its weights are.
        groups = get_optimizer_state_dict(role.module, role.optimizer, options=_TRAINED)["param_groups"]
        optimizer = {"state": state[f"{name}.moments"], "param_groups": groups}
        set_optimizer_state_dict(role.module, role.optimizer, optimizer, options=_TRAINED)
    if phase.ema is not None:
        set_model_state_dict(phase.ema, state["ema"])
    return json.loads((found[-1] / "position.json").read_text())


def _state(phase: Phase) -> dict:
    state = {}
    for name, role in phase.roles.items():
        state[f"{name}.model"] = get_model_state_dict(role.module, options=_TRAINED)
        state[f"{name}.moments"] = get_optimizer_state_dict(role.module, role.optimizer, options=_TRAINED)["state"]
    if phase.ema is not None:
        state["ema"] = get_model_state_dict(phase.ema)
    return state
