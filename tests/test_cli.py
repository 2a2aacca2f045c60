"""How the command line ends: the exit code and the sentence for each kind of end."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vpae import stages
from vpae.artifacts import ArtifactError
from vpae.cli import main
from vpae.data import catalog
from vpae.experiment import ConfigError, load
from vpae.graph import stage_settings, without
from vpae.preemption import EXIT_CODE, Interruption
from vpae.training.phase import Collapse

MICRO = str(Path(__file__).parents[1] / "configs/micro.yaml")


class Silent(FileNotFoundError):
    """One whose message leaves out the path."""

    def __str__(self) -> str:
        return self.strerror


SAVED = Interruption("priming: stopped by a signal after step 3; the state is in results")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (SAVED, EXIT_CODE, "run the same command again to go on"),
        (ConfigError("micro.yaml: seed: no number"), 2, "micro.yaml: seed: no number"),
        (ArtifactError("latents: index.json: missing"), 2, "index.json: missing"),
        (Collapse("equilibrium: accuracy 1"), 2, "accuracy 1"),
        (FloatingPointError("fake_loss is nan"), 2, "fake_loss is nan"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "make room"),
        (RuntimeError("I/O error: File too large (os error 27)"), 2, "make room"),
        (FileNotFoundError("a.json: no such file"), 2, "vpae: a.json: no such file"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), 2, "vpae: [Errno 2] No such file: 'a.json'"),
        (Silent(errno.ENOENT, "No such file", "a.json"), 2, "vpae: a.json: No such file"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_foreseen_end_has_its_code_and_one_sentence(end, code, said, monkeypatch, capsys):
    def run_stage(*_):
        raise end

    monkeypatch.setattr(stages, "run_stage", run_stage)
    assert main(["priming", "--config", MICRO]) == code
    error = capsys.readouterr().err
    assert said in error and error.startswith("vpae: ") and "Traceback" not in error


def test_a_full_disk_is_looked_for_where_results_are(monkeypatch, capsys, tmp_path):
    def run_stage(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "run_stage", run_stage)
    assert main(["priming", "--config", MICRO, "--results", str(tmp_path)]) == 2
    assert f"make room in {tmp_path} or " in capsys.readouterr().err


@pytest.mark.parametrize("command", [["config", "schema"], ["config", "show", "--config", MICRO]])
def test_who_stops_reading_gets_no_traceback_and_no_success(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = [sys.executable, "-c", "import sys; from vpae.cli import main; sys.exit(main())", *command]
    done = subprocess.run(run, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_closed_output_is_no_failure() -> None:
    run = f"{sys.executable} -c 'import sys; from vpae.cli import main; sys.exit(main())' config check {MICRO} >&-"
    done = subprocess.run(["bash", "-c", run], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    def run_stage(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(stages, "run_stage", run_stage)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["priming", "--config", MICRO])


@pytest.mark.parametrize(
    ("stage", "error", "said"),
    [
        ("samples", torch.OutOfMemoryError("CUDA out of memory"), "samples.vae_tiles=true"),
        ("evaluation", RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), "the memory of the GPU. Set samples.vae_tiles=true"),
        ("latents", RuntimeError("DefaultCPUAllocator: not enough memory"), "this machine. Set latents.batch_size=1"),
        ("priming", torch.OutOfMemoryError("CUDA out of memory"), "what makes a method fit"),
        ("report", MemoryError(), "vpae plan --config"),
    ],
)
def test_a_stage_whose_memory_is_exhausted_names_the_settings_that_help(
    stage: str, error: Exception, said: str, monkeypatch, tmp_path, capsys
):
    def run(*_):
        raise error

    folder = tmp_path / "results" / stage
    task = stages._Task(SimpleNamespace(), run, folder, {}, {}, {})
    monkeypatch.setattr(stages, "_task", lambda *_: task)
    assert main([stage, "--config", MICRO]) == 2
    printed = capsys.readouterr().err
    assert said in printed and f"the stage {stage} ran out of the memory" in printed
    assert not folder.exists()


@pytest.mark.parametrize("key", ["monitor.stop=false", "monitor.every=1", "checkpoint_every=7", "log_every=3"])
def test_a_run_goes_on_where_it_was_when_it_is_watched_or_saved_otherwise(key: str):
    """Such as after a collapse, whose message says how to go on all the same."""
    one, other = (
        without(stage_settings(load(Path(MICRO), keys).settings, "priming"), stages.SHARES)
        for keys in ([], [f"priming.training.{key}"])
    )
    assert one == other


@pytest.mark.parametrize("stage", stages.SMALLER)
def test_such_a_stage_advises_what_can_be_set_and_is_not(stage: str):
    ways = stages.SMALLER[stage]
    assert not any(stages._is_set(load(Path(MICRO)).settings, way) for way in ways)
    assert all(stages._is_set(load(Path(MICRO), list(ways)).settings, way) for way in ways)


def test_a_signal_ends_a_stage_with_the_code_that_puts_a_job_back_into_the_queue(monkeypatch, tmp_path, capsys):
    """`workflow/launch.sh` requeues on this code and on no other."""
    in_processes = catalog._in_processes

    def with_a_signal(*arguments):
        for done in in_processes(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            yield done

    monkeypatch.setattr(catalog, "_in_processes", with_a_signal)
    assert main(["clips", "--config", MICRO, "--results", str(tmp_path)]) == EXIT_CODE
    assert "finished ones are kept" in capsys.readouterr().err


def test_help_says_defaults_once_and_none_where_there_is_none(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "of the noise; default: 0" in said and "the mp4 to write, or to write anew --lora" in said
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "an experiment's YAML file; default: configs/tiny.yaml" in " ".join(capsys.readouterr().out.split())


def test_a_name_in_place_of_a_file_is_answered_with_the_file(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    for given in ("micro", "micro.yaml", "configs/micro.yaml.yaml"):
        assert main(["config", "show", "--config", given]) == 2
        assert "did you mean configs/micro.yaml?" in capsys.readouterr().err


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is heeded, also where the tests run in the background and have inherited that it is ignored."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_ends_at_once_and_one_after_another_signal_does_not() -> None:
    with Interruption.watch() as request:
        signal.raise_signal(signal.SIGTERM)  # of a workflow that ends, beside the terminal's own
        signal.raise_signal(signal.SIGINT)
        assert request.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
