"""What `vpae plan` says is held against what torch counts: parameters, operations, bytes; and scripts that run."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vpae.planning.counting import Sequence, adapter_flops, transformer_flops
from vpae.planning.footprint import footprint, parameters_of
from vpae.planning.memory import FP32, Precision, transformer_activations
from vpae.planning.workload import turn_flops, turns_of

from planned import RANK, ROOT, SMALL, TOKENS, at_tiny_size, on_larger_clips, variant
from test_workflow import Clone
from vpae.bench.live_bytes import LiveBytes
from vpae.bench.training import Workbench, build_phase, held_by
from vpae.cli import main
from vpae.config import Lora
from vpae.experiment import ConfigError, Source, load, shipped
from vpae.models.adapters import TARGETS, SharedBase
from vpae.planning.command import as_text, parse_bytes
from vpae.planning.launch import Job, render
from vpae.planning.network import Network, adapter_parameters, pipeline_of
from vpae.planning.plan import Cluster, make_plan, tokens_of
from vpae.planning.presence import incomplete, missing_teacher

FULL_SCALE = [path for path in shipped(ROOT / "configs") if path.stem.startswith("wan")]
CONFIG = ROOT / "configs" / "wan2.1-i2v-14b-480p.yaml"
I2V_14B = Network()


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def inputs_of(network: Network, latents: tuple[int, int, int], device: str, gradient: bool = False) -> dict:
    """What a transformer is called with."""
    return {
        "hidden_states": torch.randn(1, network.in_channels, *latents, device=device, requires_grad=gradient),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, 512, network.text_dim, device=device),
        "encoder_hidden_states_image": torch.randn(1, 257, network.image_dim, device=device),
        "return_dict": False,
    }


def adapted(network: Network, device: str) -> tuple[SharedBase, torch.nn.Module]:
    with torch.device(device):
        base = SharedBase(network.build(device))
        return base, base.add("student", Lora(rank=RANK, alpha=RANK))


# Parameters and tokens


def test_the_plan_of_the_full_experiment_has_the_known_numbers(capsys: pytest.CaptureFixture) -> None:
    arguments = ["plan", "--config", str(CONFIG), "--gpus", "16", "--gpu-memory", "80GB", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["generator"] == plan["parameters"]["teacher"] == plan["parameters"]["ema"]
    assert plan["parameters"]["teacher"] == 16_394_878_784
    assert plan["parameters"]["fake_lora"] == pytest.approx(359.1e6, rel=1e-3)
    assert plan["parameters"]["text_encoder"] == pytest.approx(5.68e9, rel=1e-2)
    assert plan["parameters"]["vae"] == pytest.approx(127e6, rel=1e-2)
    assert plan["parameters"]["image_encoder"] == pytest.approx(631e6, rel=1e-2)
    assert plan["parameters"]["head"] > 0
    assert plan["tokens"] == 32_760
    assert plan["flops_per_nfe"] == pytest.approx(1.7e15, rel=0.02)
    assert plan["gpu_hours"] > 100
    for stage in plan["stages"].values():
        parts = dict(stage["bytes_per_gpu"])
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
        assert min(parts[name] for name in ("weights", "gradients", "optimizer", "ema", "activations")) > 0
    totals = {name: stage["bytes_per_gpu"]["total"] for name, stage in plan["stages"].items()}
    assert plan["bytes_per_gpu"]["total"] == max(totals.values()) == totals[plan["binding_stage"]]
    assert "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers" in plan["missing"][-1]


@pytest.mark.parametrize(("name", "tokens"), [("wan2.1-i2v-14b-480p", 32_760), ("wan2.1-i2v-14b-720p", 75_600)])
def test_tokens_are_those_of_wan(name: str, tokens: int) -> None:
    source = load(ROOT / "configs" / f"{name}.yaml", environment=False)
    assert tokens_of(source.settings, pipeline_of(source)) == Sequence(tokens, 512, 257)


def test_adapters_of_known_ranks_have_the_known_sizes() -> None:
    # r (in + out) over every adapted layer of a block: six of D x D on the video, four on text and image, two of F.
    d, f = I2V_14B.width, I2V_14B.ffn
    expected = 40 * 64 * (10 * 2 * d + 2 * (d + f))
    assert len(TARGETS) == 8  # of which q, k, v, out are there twice: self- and cross-attention
    assert adapter_parameters(I2V_14B, Lora(rank=64)) == expected
    assert adapter_parameters(I2V_14B, Lora(rank=128)) == 2 * expected


@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
@pytest.mark.parametrize("name", ["wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-480p-lora"])
def test_all_roles_of_the_14b_phases_are_built_on_the_meta_device(name: str, phase: str) -> None:
    settings = load(ROOT / "configs" / f"{name}.yaml", environment=False).settings
    with torch.device("meta"):  # for the adapters
        built = build_phase(settings, phase, I2V_14B, torch.device("meta"))
    roles = {"generator": built.generator, "ema": built.ema}
    roles |= {"fake": built.shared.fake} if phase == "priming" else {"head": built.head}
    parts = [*roles.values(), *built.networks.values()]
    assert all(p.is_meta for part in parts for p in part.parameters())
    planned = parameters_of(settings, phase, I2V_14B)
    assert {role: sum(p.numel() for p in part.parameters()) for role, part in roles.items()} == {
        role: planned.held[role] for role in roles
    }
    adapters = sum(planned.held[r] for r in ("generator", "ema") if settings.priming.student_lora)
    adapters += planned.held.get("fake", 0)
    whole = sum(p.numel() for network in built.networks.values() for p in network.parameters())
    assert whole == (1 if settings.priming.student_lora else 3) * 16_394_878_784 + adapters


# Operations


@pytest.mark.parametrize(
    ("network", "latents"), [(SMALL, (5, 32, 32)), (I2V_14B, (21, 60, 104))], ids=["small", "14B at 480p"]
)
def test_operations_of_a_network_evaluation_are_what_torch_counts(network: Network, latents: tuple) -> None:
    model = network.build("meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs_of(network, latents, "meta"))
    tokens = Sequence(latents[0] * latents[1] * latents[2] // 4, 512, 257)
    assert transformer_flops(network, tokens).forward == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("gradient", ["weights", "adapter", "input"])
def test_operations_of_a_backward_pass_are_what_torch_counts(gradient: str) -> None:
    latents, tokens = (5, 64, 64), Sequence(5 * 32 * 32, 512, 257)
    if gradient == "adapter":
        base, model = adapted(SMALL, "meta")
        assert base.transformer is model.base
    else:
        model = SMALL.build("meta").requires_grad_(gradient == "weights")
    with sdpa_kernel(SDPBackend.MATH):
        output = model(**inputs_of(SMALL, latents, "meta", gradient == "input"))[0]
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
    expected = transformer_flops(SMALL, tokens).backward(gradient)
    if gradient == "adapter":
        expected += adapter_flops(SMALL, tokens, Lora(rank=RANK)).backward("weights")
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("name", ["micro", "lora", "copies"])
@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_a_step_are_what_the_phases_do(name: str, phase: str, checkpointing: bool) -> None:
    settings = variant(name, phase, activation_checkpointing=checkpointing)
    tokens = Sequence(5 * 4 * 4, 32, 5)
    bench = Workbench(
        settings, build_phase(settings, phase, SMALL, torch.device("cpu")), SMALL, tokens, torch.device("cpu")
    )
    for turn in turns_of(settings, phase):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            bench.update(turn.role)
        planned = turn_flops(settings, phase, turn, SMALL, tokens)
        assert (planned.recomputed > 0) == checkpointing or turn.role == "head"
        assert planned.executed == pytest.approx(counter.get_total_flops(), rel=0.08), turn.role


# Memory


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("gradient", ["weights", "adapter", "input"])
def test_activations_are_what_is_alive(gradient: str, checkpointing: bool) -> None:
    latents, tokens = (5, 32, 32), Sequence(5 * 16 * 16, 512, 257)
    if gradient == "adapter":
        base, model = adapted(SMALL, "cpu")
        assert base.transformer is model.base
    else:
        model = SMALL.build("cpu").requires_grad_(gradient == "weights")
    if checkpointing:
        getattr(model, "base", model).enable_gradient_checkpointing()
    inputs = inputs_of(SMALL, latents, "cpu", gradient == "input")
    with LiveBytes() as live:
        model(**inputs)[0].square().sum().backward()
    needed = transformer_activations(SMALL, tokens, gradient, Precision(FP32, False), checkpointing, RANK)
    assert max(needed.held + needed.working, needed.transient) == pytest.approx(live.peak, rel=0.15)


def test_what_a_pass_without_gradients_needs_is_what_is_alive() -> None:
    model = SMALL.build("cpu")
    inputs = inputs_of(SMALL, (5, 32, 32), "cpu")
    with torch.no_grad(), LiveBytes() as live:
        model(**inputs)
    needed = transformer_activations(SMALL, Sequence(5 * 16 * 16, 512, 257), "none", Precision(FP32, False), False)
    assert needed.transient == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("name", ["micro", "lora", "copies"])
@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_memory_of_a_phase_is_what_the_phase_takes(name: str, phase: str, checkpointing: bool) -> None:
    settings = on_larger_clips(variant(name, phase, activation_checkpointing=checkpointing))
    device = torch.device("cpu")
    bench = Workbench(settings, build_phase(settings, phase, SMALL, device), SMALL, TOKENS, device)
    peaks = []
    for turn in turns_of(settings, phase):
        bench.update(turn.role)
    for turn in turns_of(settings, phase):
        with LiveBytes() as live:
            bench.update(turn.role)
        peaks.append(held_by(bench.phase) + live.peak)
    planned = footprint(settings, phase, SMALL, TOKENS, 1, fused_norm=False)
    assert planned.total == pytest.approx(max(peaks), rel=0.15)


# Advice


def plan_of(gpus: int, *overrides: str, memory: float = 80e9, config: Path = CONFIG) -> dict:
    return make_plan(load(config, overrides, environment=False), Cluster(gpus, memory))


def test_what_would_make_it_fit_makes_it_fit() -> None:
    nothing = "training.sharding={strategy: none, reduce_every_micro_batch: false}"
    whole = [f"{phase}.{nothing}" for phase in ("priming", "equilibrium")]
    plan = plan_of(8, *whole)
    assert not plan["fits"]
    for phase, stage in plan["stages"].items():
        assert stage["remedies"]
        for remedy in stage["remedies"]:
            again = plan_of(remedy.get("gpus", 8), *whole, *remedy.get("set", []))["stages"][phase]
            assert again["fits"]
            assert again["bytes_per_gpu"]["total"] == pytest.approx(remedy["total"])


def test_more_gpus_take_less_memory_each_and_the_same_hours_for_the_same_clips() -> None:
    # Twice the GPUs see twice the clips a step; half the accumulation brings that back.
    few, many = plan_of(16), plan_of(32, "priming.training.accumulate=4", "equilibrium.training.accumulate=4")
    assert many["bytes_per_gpu"]["total"] < few["bytes_per_gpu"]["total"]
    assert many["flops_per_step"] == few["flops_per_step"]
    assert many["gpu_hours"] == pytest.approx(few["gpu_hours"])


def test_a_slow_interconnect_takes_time() -> None:
    source = load(CONFIG, environment=False)
    seconds = [
        make_plan(source, Cluster(16, 80e9, interconnect))["stages"]["priming"]["seconds_per_step"]
        for interconnect in (None, 1e12, 1e9)
    ]
    assert seconds[0] == seconds[1] < seconds[2]


def test_the_shipped_experiments_fit_the_clusters_their_comments_name() -> None:
    for name, gpus in (("i2v-14b-480p", 16), ("i2v-14b-720p", 32), ("i2v-14b-480p-lora", 8), ("fun-1.3b-480p", 8)):
        plan = plan_of(gpus, config=ROOT / "configs" / f"wan2.1-{name}.yaml")
        assert plan["fits"], (name, plan["bytes_per_gpu"])
        assert {stage["clips_per_step"] for stage in plan["stages"].values()} == {64}


@pytest.mark.parametrize("path", FULL_SCALE, ids=lambda path: path.stem)
def test_gradients_are_reduced_in_every_micro_batch_only_where_whole_ones_do_not_fit(path: Path) -> None:
    gpus = 8 if "lora" in path.stem or "1.3b" in path.stem else 32 if "720p" in path.stem else 16
    for phase in ("priming", "equilibrium"):
        config = getattr(load(path, environment=False).settings, phase).training
        plan = plan_of(gpus, f"{phase}.training.sharding.reduce_every_micro_batch=false", config=path)
        assert config.sharding.reduce_every_micro_batch != plan["stages"][phase]["fits"]


def test_what_no_switch_makes_fit_is_said() -> None:
    plan = plan_of(1, "priming.training.sharding.context_parallel=1", memory=1e9)
    assert not plan["fits"]
    for stage in plan["stages"].values():
        assert all("gpus" in remedy for remedy in stage["remedies"])
    text = as_text(plan_of(1, memory=1e8))
    assert "does NOT fit in 100.0 MB" in text and "no switch makes it fit" in text


@pytest.mark.parametrize("path", list(shipped(ROOT / "configs")), ids=lambda path: path.stem)
def test_every_shipped_experiment_can_be_planned(path: Path, capsys: pytest.CaptureFixture) -> None:
    teacher = load(path, environment=False).settings.teacher
    known = teacher.source != "folder" or teacher.architecture or (ROOT / teacher.path / "model_index.json").is_file()
    assert main(["plan", "--config", str(path), "--gpus", "8"]) == (0 if known else 2)
    printed = capsys.readouterr()
    assert ("GPU-hours in all" in printed.out) if known else ("its shape is unknown" in printed.err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu-memory", "much"], "--gpu-memory much"),
        (["--gpus", "0"], "--gpus 0"),
        (["--set", "priming.training.sharding.context_parallel=3"], "does not divide the 8 GPUs"),
        (["--set", "teacher.architecture=", "--set", "teacher.path=someone/else"], "teacher.architecture"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", str(CONFIG), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("141 GiB", 141 * 2**30), ("8e10", 8e10), ("40g", 40e9)])
def test_sizes_are_read_with_their_units(text: str, size: float) -> None:
    assert parse_bytes(text, "--gpu-memory") == size


# What has to be there


def test_missing_weights_are_named_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "check", "--strict", str(CONFIG)]) == 2
    message = capsys.readouterr().err
    assert (
        "hf download Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --revision b184e23a8a16b20f108f727c902e769e873ffc73"
        in message
    )
    assert "clips.path: data/clips/train.csv does not exist" in message


def test_a_folder_that_lacks_a_shard_is_incomplete(teacher: Path, tmp_path: Path) -> None:
    assert incomplete(teacher) == []
    assert "transformer" in incomplete(tmp_path)
    copy = tmp_path / "copy"
    for part in teacher.iterdir():
        (copy / part.name).parent.mkdir(exist_ok=True)
        os.symlink(part, copy / part.name)
    (copy / "transformer").unlink()
    (copy / "transformer").mkdir()
    (copy / "transformer" / "config.json").write_text((teacher / "transformer" / "config.json").read_text())
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "transformer" / "model-00001-of-00002.safetensors").touch()
    assert incomplete(copy) == ["transformer/model-00002-of-00002.safetensors"]


def test_a_finished_teacher_needs_no_hub(tmp_path: Path) -> None:
    source = load(CONFIG, environment=False)
    assert missing_teacher(source, tmp_path)
    folder = tmp_path / source.name / "teacher"
    folder.mkdir(parents=True)
    (folder / "provenance.json").touch()
    assert missing_teacher(source, tmp_path) == []


def test_a_teacher_of_another_shape_than_planned_is_refused(teacher: Path) -> None:
    settings = load(CONFIG, environment=False).settings
    wrong = settings.teacher.model_copy(
        update={"source": "folder", "path": str(teacher), "architecture": "wan2.1-i2v-14b"}
    )
    source = Source("x", CONFIG, settings.model_copy(update={"teacher": wrong}), None)
    with pytest.raises(ConfigError, match=r"has 4 layers of width 24"):
        pipeline_of(source)


def test_no_job_is_planned_before_the_weights_are_there(tmp_path: Path) -> None:
    clone, name = Clone(tmp_path), CONFIG.stem
    (tmp_path / "data" / "clips").mkdir(parents=True)
    (tmp_path / "data" / "clips" / "train.csv").touch()
    arguments = ("--dry-run", "--config", f"experiment={name}", "--", f"results/{name}/equilibrium")
    code, printed = clone.snakemake(*arguments)
    assert code != 0
    assert "hf download Wan-AI/Wan2.1-I2V-14B-480P-Diffusers" in printed
    (tmp_path / "results" / name / "teacher").mkdir(parents=True)
    (tmp_path / "results" / name / "teacher" / "provenance.json").touch()
    code, printed = clone.snakemake(*arguments)
    assert code == 0, printed
    assert f"results/{name}/priming" in printed


# Full-scale settings at tiny size


@pytest.mark.parametrize("path", FULL_SCALE, ids=lambda path: path.stem)
@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
def test_the_settings_of_full_scale_train_at_tiny_width(path: Path, phase: str) -> None:
    """As many blocks as the real one, checkpointed, in bf16, with its adapters: one update of every role."""
    source = load(path, environment=False)
    layers = pipeline_of(source).transformer.layers
    network = Network(layers=layers, heads=2, head_dim=12, ffn=32, text_dim=16, image_dim=16, freq_dim=16)
    settings, device = at_tiny_size(source.settings, phase), torch.device("cpu")
    bench = Workbench(settings, build_phase(settings, phase, network, device), network, Sequence(80, 512, 5), device)
    before = {name: [p.clone() for p in role.parameters()] for name, role in bench.phase.roles.items()}
    for turn in turns_of(settings, phase):
        bench.update(turn.role)
    for name, role in bench.phase.roles.items():
        assert all(torch.isfinite(p).all() for p in role.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(role.parameters(), before[name], strict=True)), name


# Launching

STAND_INS = {
    # Thousands of nodes: what it prints does not fit into a pipe that nobody reads to its end.
    "scontrol": 'if [ "$1" = show ]; then printf "node%s\\n" {1..20000}; else echo "scontrol $*" >> calls; fi',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"',
    "torchrun": 'echo "torchrun $*" >> calls; exit "${STATUS:-0}"',
    "accelerate": 'echo "accelerate $*" >> calls',
}


def launched(script: str, folder: Path, **variables: str) -> tuple[int, list[str]]:
    """Run a script with stand-ins for SLURM and the launchers; returns the exit code and what was called."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NODEID": "1",
        **variables,
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    return done.returncode, (folder / "calls").read_text().splitlines()


def job(**changes) -> Job:
    return Job(**{"nodes": 2, "gpus_per_node": 8, "cpus_per_node": 64, **changes})


def test_a_launch_brings_the_processes_of_all_nodes_together(tmp_path: Path) -> None:
    script = render(load(CONFIG, environment=False), "priming", job(interface="ib0", partition="gpu"))
    assert "export SRUN_CPUS_PER_TASK=64  #" in script  # else each node's eight processes share one core
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--partition=gpu", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "export NCCL_SOCKET_IFNAME=ib0\n" in script
    assert "64 clips a step" in script
    code, calls = launched(script, tmp_path)
    assert code == 0
    assert calls == [
        "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=0 --rdzv-id=7-0 --rdzv-backend=c10d "
        f"--rdzv-endpoint=node1:29500 --no-python vpae priming --config {CONFIG}"
    ]


def test_accelerate_gets_the_same_job(tmp_path: Path) -> None:
    script = render(load(CONFIG, environment=False), "equilibrium", job(launcher="accelerate"))
    code, calls = launched(script, tmp_path)
    assert code == 0
    assert "--num_machines=2 --num_processes=16 --machine_rank=1 --main_process_ip=node1" in calls[0]
    assert calls[0].endswith(f"vpae equilibrium --config {CONFIG}")


def test_without_gpus_the_processes_meet_over_gloo(tmp_path: Path) -> None:
    script = render(load(CONFIG, environment=False), "priming", job(gpus_per_node=0, interface="eth0"))
    assert "--gpus-per-node" not in script
    assert "NCCL" not in script
    assert "export ACCELERATE_USE_CPU=true\n" in script
    assert "export GLOO_SOCKET_IFNAME=eth0\n" in script
    _, calls = launched(script, tmp_path)
    assert "--nnodes=2 --nproc-per-node=2" in calls[0]


def test_a_job_that_fails_early_is_not_queued_again(tmp_path: Path) -> None:
    code, calls = launched(render(load(CONFIG, environment=False), "priming", job()), tmp_path, STATUS="1")
    assert code == 1
    assert not any(call.startswith("scontrol requeue") for call in calls)


def test_a_job_whose_time_is_up_is_queued_again(tmp_path: Path) -> None:
    script = render(load(CONFIG, environment=False), "priming", job(hours=1)).replace(
        "set -euo", "SECONDS=3400; set -euo"
    )
    code, calls = launched(script, tmp_path, STATUS="1")
    assert code == 0
    assert calls[-1] == "scontrol requeue 7"


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"nodes": 1, "gpus_per_node": 3}, ("priming.training.sharding.context_parallel=2",), "does not divide 3"),
        ({"gpus_per_node": 0, "launcher": "accelerate"}, (), "needs GPUs"),
        ({"nodes": 0}, (), "--nodes"),
    ],
)
def test_impossible_launches_are_refused(changes: dict, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        render(load(CONFIG, overrides, environment=False), "priming", job(**changes))


def test_launch_prints_what_sbatch_takes(capsys: pytest.CaptureFixture) -> None:
    assert main(["launch", "priming", "--config", str(CONFIG), "--nodes", "4", "--gpus-per-node", "8"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=4\n" in printed.out
    assert f"`vpae latents --config {CONFIG}` first" in printed.err
