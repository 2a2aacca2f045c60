"""Resumable states of a phase, by torch.distributed.checkpoint: whole or absent, sharded or not.

A state is on the disk before it gets its name. It names the hash of each of its files, which is checked before the
state is used; in place of a damaged state the one before it is used.

A state holds, for every role, the trained parameters and the optimiser's moments, and the EMA. Frozen weights (the
teacher's) are not in it: they are an input. It can be taken up by another number of processes.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vpae.artifacts import ArtifactError, digest, flush_entry, sha256, write_json
from vpae.training.phase import Phase

KEEP = 2
POSITION = "position.json"
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(folder: Path, phase: Phase, position: dict) -> None:
    """Write `step-N` beside the older states and delete all but the newest two; every process calls this.

    A state in the middle of a step, whose position says what is `begun`, is `step-N-K`: N steps and K updates.

    Raises:
        ArtifactError: the disk does not take it; the older states stand.
    """
    begun = f"-{position['begun']['turns']:04d}" if "begun" in position else ""
    final = folder / f"step-{position['step']:08d}{begun}"
    temporary = folder / f".{final.name}.tmp"
    try:
        _save(temporary, final, phase, position)
    except (Exception, CheckpointException) as error:
        if _place()[0] == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # half a state fills the disk for others
        if any(isinstance(failure, KeyboardInterrupt) for failure, _ in getattr(error, "failures", {}).values()):
            raise KeyboardInterrupt from error  # pressed twice, while torch wrote
        if (reason := _of_the_disk(error)) is None:
            raise
        older = max((p.name for p in folder.glob("step-*")), default="none")
        said = getattr(reason, "strerror", None) or reason
        raise ArtifactError(
            f"the state of step {position['step']} could not be saved in {folder} ({said}): make "
            f"room there and run the same command again. The newest whole state: {older}"
        ) from error


def _of_the_disk(error: BaseException) -> BaseException | None:
    """What the disk said, behind what torch's writers make of it; its zip files only find that they came up short."""
    if isinstance(error, CheckpointException):
        return next(filter(None, (_of_the_disk(failure) for failure, _ in error.failures.values())), None)
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    short = [e for e in chain if isinstance(e, OSError)] or [e for e in chain if "unexpected pos" in str(e)]
    return short[0] if short else None


def _save(temporary: Path, final: Path, phase: Phase, position: dict) -> None:
    folder, (rank, ranks) = final.parent, _place()
    if rank == 0:
        for unfinished in folder.glob(".step-*.tmp"):  # of saves that were cut off, too
            shutil.rmtree(unfinished, ignore_errors=True)
    _wait_for_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(_state(phase), checkpoint_id=temporary)  # returns in the first process when all have written
    written = sorted(p for p in temporary.iterdir() if p.is_file())
    hashes = {}
    for path in written[rank::ranks]:
        flush_entry(path)
        hashes[path.name] = sha256(path)
    files = {name: value for part in _gathered(hashes) for name, value in part.items()}
    if rank == 0:
        position = {**position, "files": files}
        write_json(temporary / POSITION, {**position, "digest": digest(position)})
        flush_entry(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        flush_entry(folder)
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    _wait_for_all()


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gathered(value: Any) -> list:
    """The values of all processes, in every one of them."""
    found = [value] * _place()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def load_latest(folder: Path, phase: Phase) -> dict | None:
    """Restore the newest state into the phase's modules and optimisers.

    Returns:
        the position it was saved with; None where there is no state.

    Raises:
        ArtifactError: there are states, but all of them are damaged.
    """
    states = sorted(folder.glob("step-*"), reverse=True)
    if not states:
        return None
    for newest in states:
        if not (wrong := _damaged(newest)):
            break
        if _place()[0] == 0:
            print(f"vpae: {wrong} is damaged; the state before it is taken, if there is one", file=sys.stderr)
    else:
        raise ArtifactError(f"{folder}: no state in it is whole; delete the folder to begin anew")
    state = _state(phase, whole=True)
    saved = dcp.FileSystemReader(newest).read_metadata().state_dict_metadata
    for name in phase.roles:
        # Weights that had got no gradient had no moments to save, but the template above has moments for all.
        place, moments = f"{name}.moments", state[f"{name}.moments"]
        state[place] = {
            weight: slots for weight, slots in moments.items() if any(f"{place}.{weight}.{s}" in saved for s in slots)
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=newest)
    for name, role in phase.roles.items():
        set_model_state_dict(role.module, state[f"{name}.model"], options=_TRAINED)
        if not state[f"{name}.moments"]:
            role.optimizer.state.clear()  # of the template: this role was not updated yet
            continue
        # The rest of an optimiser's state is settings, grouped by where its weights are.
        groups = get_optimizer_state_dict(role.module, role.optimizer, options=_TRAINED)["param_groups"]
        optimizer = {"state": state[f"{name}.moments"], "param_groups": groups}
        set_optimizer_state_dict(role.module, role.optimizer, optimizer, options=_TRAINED)
    set_model_state_dict(phase.ema, state["ema"])
    return _read_position(newest)


def _damaged(state: Path) -> Path | None:
    """A file of a state that is not as it was written; each process looks at its share, and all come to know it."""
    try:
        position = _read_position(state)
    except (OSError, ValueError):
        return state / POSITION
    rank, ranks = _place()
    mine = sorted(position["files"].items())[rank::ranks]
    wrong = [name for name, value in mine if not (state / name).is_file() or sha256(state / name) != value]
    found = next((name for part in _gathered(wrong) for name in part), None)
    return state / found if found else None


def _read_position(state: Path) -> dict:
    position = json.loads((state / POSITION).read_text())
    if not isinstance(position, dict) or position.pop("digest", None) != digest(position):
        raise ValueError(f"{state / POSITION} is not as it was written")
    return position


def _state(phase: Phase, whole: bool = False) -> dict:
    """All that is saved; `whole`: with moments of roles that have none yet, to be loaded into.

    torch makes moments by a step without gradients, which counts as one: a run that goes on must not have it.
    """
    state = {}
    for name, role in phase.roles.items():
        state[f"{name}.model"] = get_model_state_dict(role.module, options=_TRAINED)
        known = whole or role.optimizer.state
        found = get_optimizer_state_dict(role.module, role.optimizer, options=_TRAINED)["state"] if known else {}
        state[f"{name}.moments"] = found
    return state | {"ema": get_model_state_dict(phase.ema)}
