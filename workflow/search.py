"""Train variants of methods over several seeds on one GPU in minutes, and judge their single steps.

    python workflow/search.py run docs/search/order.yaml --teacher data/teachers/tiny --out docs/search/order.jsonl
    python workflow/search.py table docs/search/order.jsonl
    python workflow/search.py means docs/search/order.jsonl --pair convolutions-weak more-score

The methods' own losses are trained, on clips of the procedural world that are made and encoded on the machine (frames
are not stored as H.264 in between). On a GPU each turn is captured as a CUDA graph, since Python needs longer to start
a small network's kernels than they run; the variants of a seed run side by side in streams, the seeds in processes, and
other processes judge what is trained while the next variants are. Matrix products are TF32 there.

Every line of the result has C2ST (0.5 is the goal), Frechet distance, motion and the truth metrics of one student, what
its training took in network evaluations (a backward pass counts as two), and the pull of each loss. No student is
judged on clips that it or its classifier learned from: the three sets have seeds of their own. All variants are
judged, and so compared and chosen, on the same test clips.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing
import yaml
from scipy import stats
from torch import Tensor, nn

from vpae.artifacts import digest, sha256, written
from vpae.config import Experiment, Sampler
from vpae.data.encoding import Encoders, pad_text
from vpae.data.world import Truth, draw_truth, render
from vpae.distill import METHODS
from vpae.distill.method import TEACHER, Method
from vpae.evaluation import c2st
from vpae.evaluation.frechet import RandomFeatures, frechet
from vpae.evaluation.truth import measure
from vpae.experiment import load
from vpae.models.adapters import FAKE, lora_names
from vpae.models.wan import (
    SHORT_TEXT_TOKENS,
    Condition,
    decode_latents,
    first_frame_mask,
    load_pipeline,
    load_transformer,
)
from vpae.sampling import euler, few_step
from vpae.training.ema import update_ema
from vpae.training.loop import learning_rate
from vpae.training.sharding import clip_gradients

SEEDS = {"train": 101, "fit": 107, "test": 109}  # of the world's clips
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AT_ONCE = 256


def draw_clip(key: tuple[int, ...], frames: int, size: int) -> tuple[np.ndarray, dict]:
    """One clip of the world: uint8 frames (T, H, W, 3) and its truth."""
    truth = draw_truth(key, frames, 1.0, hidden_direction=0.4, bystander_share=0.25)
    return render(truth, size, size), asdict(truth)


def make_data(counts: dict[str, int], teacher: Path, workers: int, frames: int, size: int) -> dict:
    """Encoded clips of each set: x0, the condition's latents, image and text embeddings, and their truth."""
    keys = [(SEEDS[name], 0, i) for name, count in counts.items() for i in range(count)]
    n = len(keys)
    with ProcessPoolExecutor(workers) as pool:
        made = list(pool.map(draw_clip, keys, [frames] * n, [size] * n, chunksize=32))
    encoders = Encoders(load_pipeline(teacher, transformer=None).to(DEVICE))
    captions = sorted({truth["caption"] for _, truth in made})
    texts = dict(zip(captions, encoders.texts(captions), strict=True))
    data: dict = {"empty": pad_text(encoders.texts([""])[0], SHORT_TEXT_TOKENS)}
    for name, count in counts.items():
        mine, made = made[:count], made[count:]
        parts: dict[str, list[Tensor]] = {"x0": [], "condition": [], "image": []}
        for start in range(0, count, 64):
            clips = np.stack([clip for clip, _ in mine[start : start + 64]])
            first = list(clips[:, 0])
            parts["x0"].append(encoders.videos(clips))
            parts["condition"].append(encoders.conditions(first, frames))
            parts["image"].append(encoders.images(first).cpu())
        text = torch.stack([pad_text(texts[truth["caption"]], SHORT_TEXT_TOKENS) for _, truth in mine])
        data[name] = {k: torch.cat(v) for k, v in parts.items()} | {"text": text, "truth": [t for _, t in mine]}
    return data


class Clips:
    """One set on the device."""

    def __init__(self, data: dict, name: str):
        self.x0, self.condition, self.image, self.text = (
            data[name][key].float().to(DEVICE) for key in ("x0", "condition", "image", "text")
        )
        self.empty, self.truth = data["empty"].float().to(DEVICE), data[name]["truth"]
        self.mask = first_frame_mask(1, *self.x0.shape[2:]).to(DEVICE)

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, i: Tensor) -> tuple[Tensor, Condition]:
        """Latents and condition of the clips i."""
        frame = torch.cat([self.mask.expand(len(i), -1, -1, -1, -1), self.condition[i]], dim=1)
        return self.x0[i], Condition(frame, self.image[i], self.text[i], self.empty)


class InMemory:
    """Networks by model, see `vpae.distill.networks.Networks`: the teacher's folder, and students made here."""

    device = DEVICE

    def __init__(self, teacher: Path):
        self.loaded = load_transformer(teacher, torch.float32).to(DEVICE)
        self.students: dict[str, Method] = {}
        self.start = ""  # the variant whose student stands for the method that the next one starts from

    def transformer(self, model: str, trained: bool) -> nn.Module:
        """A new copy; a student's has its EMA weights."""
        network = copy.deepcopy(self.loaded)
        if model != TEACHER:
            network.load_state_dict(self.students[self.start].ema.state_dict())
        return network

    def adapter(self, model: str, name: str) -> dict[str, Tensor]:
        """The fake model's, as the start left it."""
        assert name == FAKE, "students are trained whole here"
        return lora_names(self.students[self.start].fake.state_dict())


class Run:
    """One variant: its phase, and each of its turns as something that can be called again and again."""

    def __init__(self, name: str, phase: Method, clips: Clips, seed: int):
        self.name, self.phase, self.clips = name, phase, clips
        self.training = phase.config.training
        self.stream = torch.cuda.Stream() if DEVICE.type == "cuda" else None
        self.rng = torch.Generator(DEVICE).manual_seed(seed)
        self.step = torch.zeros((), device=DEVICE, dtype=torch.float64)
        self.evaluations, self.logs = 0.0, {}
        for role in phase.roles.values():
            for group in role.optimizer.param_groups:
                group["lr"] = torch.tensor(role.settings.learning_rate, device=DEVICE)
                group["capturable"] = DEVICE.type == "cuda"
        self.cost: dict[str, float] = {}
        self.turns = {turn: self._ready(turn) for turn in phase.roles}

    def _turn(self, turn: str) -> dict[str, Tensor]:
        role = self.phase.roles[turn]
        for name, other in self.phase.roles.items():
            other.require_gradients(name == turn)
        i = torch.randint(len(self.clips), (self.training.batch_size,), generator=self.rng, device=DEVICE)
        loss, logs = self.phase.loss(turn, self.clips.batch(i), self.rng, self.step)
        loss.backward()
        clip_gradients(role.parameters(), role.settings.max_grad_norm)
        role.optimizer.step()
        for other in self.phase.roles.values():
            other.optimizer.zero_grad(set_to_none=True)
            other.require_gradients(True)
        if turn == self.phase.main:
            update_ema(self.phase.ema, role.module, self.training.ema_decay)
        return {f"{turn}_loss": loss.detach(), **{k: v.detach() for k, v in logs.items()}}

    def _ready(self, turn: str) -> Callable[[], dict[str, Tensor]]:
        """The turn as a CUDA graph; on a CPU as it is. Weights and averages are left as they were."""
        modules = {id(m): m for m in (*self.phase.networks.values(), *(r.module for r in self.phase.roles.values()))}
        tensors = [t for m in modules.values() for t in itertools.chain(m.parameters(), m.buffers())]
        tensors += list(self.phase.ema.parameters())
        before = [t.detach().clone() for t in tensors]
        self.cost[turn] = evaluations(self.phase, lambda: self._on_stream(lambda: self._turn(turn)))
        graph = None
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.rng)
            with torch.cuda.graph(graph, stream=self.stream):
                logs = self._turn(turn)
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
            for role in self.phase.roles.values():
                for state in role.optimizer.state.values():
                    for value in state.values():
                        value.zero_()
        if graph is None:
            return lambda: self._turn(turn)
        torch.cuda.synchronize()

        def replay() -> dict[str, Tensor]:
            with torch.cuda.stream(self.stream):
                graph.replay()
            return logs

        return replay

    def _on_stream(self, work: Callable[[], object]) -> None:
        if self.stream is None:
            work()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()

    def take_step(self, step: int) -> None:
        """All turns of one step, as the training loop does them."""

        def set_numbers() -> None:
            self.step.fill_(step)
            for role in self.phase.roles.values():
                rate = learning_rate(role.settings, step, self.training.schedule_steps or self.training.steps)
                for group in role.optimizer.param_groups:
                    group["lr"].fill_(rate)

        self._on_stream(set_numbers)
        for turn in self.phase.turns(step):
            self.logs |= self.turns[turn]()
            self.evaluations += self.cost[turn]


def evaluations(phase: Method, work: Callable[[], object]) -> float:
    """Network evaluations of one turn: each clip of a pass counts 1, with a backward pass 3."""
    clips: list[int] = []
    note = lambda _network, _inputs, x: clips.append(len(x[0]) * (3 if x[0].requires_grad else 1))  # noqa: E731
    hooks = [network.register_forward_hook(note) for network in phase.networks.values()]
    work()
    for hook in hooks:
        hook.remove()
    return float(sum(clips))


def train_together(runs: list[Run]) -> None:
    """Train variants side by side."""
    for step in range(max(run.training.steps for run in runs)):
        for run in runs:
            if step < run.training.steps:
                run.take_step(step)
        if DEVICE.type == "cuda" and step % 10 == 9:
            torch.cuda.synchronize()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def videos_of(model: nn.Module, clips: Clips, row: Sampler, shift: float, seed: int) -> Tensor:
    """Latents of all clips of a set."""
    rng, made = torch.Generator(DEVICE).manual_seed(seed), []
    for i in torch.arange(len(clips), device=DEVICE).split(AT_ONCE):
        x, c = clips.batch(i)
        noise = torch.randn(x.shape, generator=rng, device=DEVICE)
        if row.model == TEACHER:
            made.append(euler(model, noise, c, row.steps, shift, row.guidance_scale))
        else:
            rngs = [torch.Generator().manual_seed(10_000 * seed + int(number)) for number in i]
            made.append(few_step(model, noise, c, row.steps, shift, rngs))
    return torch.cat(made)


class Judge:
    """What a process needs to judge students: clips to fit and to test classifiers on, and the decoder."""

    def __init__(self, data_file: Path, teacher: Path, plan: dict):
        use_one_core()
        data = torch.load(data_file, weights_only=True, mmap=True)
        self.sets = {name: Clips(data, name) for name in ("fit", "test")}
        self.judging = plan["judge"]
        self.network = load_transformer(teacher, torch.float32).to(DEVICE)
        self.vae = load_pipeline(teacher, transformer=None, text_encoder=None, image_encoder=None).vae.to(DEVICE)
        self.features = RandomFeatures().to(DEVICE)

    def __call__(self, weights: dict[str, Tensor] | None, row: Sampler, shift: float) -> dict:
        """C2ST over several classifier seeds, Frechet distance, motion, and the truth metrics, of one network."""
        if weights is not None:
            self.network.load_state_dict(weights)
        sets, judging = self.sets, self.judging
        fit, test = (videos_of(self.network, sets[name], row, shift, seed) for name, seed in (("fit", 1), ("test", 2)))
        pairs = [c2st.Pairs(sets[n].x0, x, sets[n].condition) for n, x in (("fit", fit), ("test", test))]
        found = [c2st.accuracy(*pairs, judging["steps"], seed) for seed in range(judging["seeds"])]
        more = judging.get("few_steps", []) if row.model != TEACHER else []
        rows = {steps: Sampler(model="student", steps=steps) for steps in more}
        few = {n: videos_of(self.network, sets["test"], other, shift, 2) for n, other in rows.items()}
        return {
            "c2st": float(np.mean(found)),
            "c2st_by_seed": found,
            **self.measures(test),
            **{f"{key}_{n}nfe": value for n, x in few.items() for key, value in self.measures(x).items()},
        }

    def measures(self, x: Tensor) -> dict:
        """Frechet distance, motion, and the truth metrics with their standard errors, of videos of the test clips."""
        clips, count = self.sets["test"], self.judging["truth"]
        real, made = (torch.cat([self.features(part) for part in v.split(AT_ONCE)]) for v in (clips.x0, x))
        moves, real_moves = (v.diff(dim=2).abs().mean() for v in (x, clips.x0))
        with torch.no_grad():
            frames = [decode_latents(self.vae, part).cpu().numpy() for part in x[:count].split(32)]
        truths = [Truth.from_json(t) for t in clips.truth[:count]]
        rows = [measure(clip, truth) for clip, truth in zip(np.concatenate(frames), truths, strict=True)]
        error = {key: np.std([r[key] for r in rows]) / len(rows) ** 0.5 for key in rows[0]}
        return {
            "frechet": frechet(made.cpu().numpy(), real.cpu().numpy()),
            "motion": float(moves / real_moves),
            **{key: float(np.mean([r[key] for r in rows])) for key in rows[0]},
            **{f"{key}_standard_error": float(value) for key, value in error.items()},
        }


at_hand: list[Judge] = []  # of this process


def become_judge(*arguments) -> None:
    """What a process of the pool does first."""
    at_hand.append(Judge(*arguments))


def judge(weights: Path | None, row: Sampler, shift: float, out: Path, begun: float, values: dict) -> None:
    """Judge the weights of a file, or the teacher itself, in a process of the pool: a line more, a file less."""
    loaded = torch.load(weights, map_location=DEVICE, weights_only=True)["weights"] if weights else None
    found = at_hand[0](loaded, row, shift)
    name = {key: values[key] for key in ("variant", "seed")}
    line = {**name, "seconds": round(time.monotonic() - begun, 1), **found, **values}
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({k: v for k, v in line.items() if not k.endswith(("error", "by_seed"))}), flush=True)
    if weights:
        weights.unlink()


def weights_of(out: Path) -> Path:
    """Where students stand until they are judged: a rented GPU may be gone before."""
    return out.with_suffix(".weights")


def made_of(plan: dict) -> dict[str, str]:
    """Variant -> digest of what makes and judges it, but for its seed: a line with another one is none of it."""
    found: dict[str, str] = {}
    for name, variant in variants_of(plan).items():
        include = {"teacher": {"shift"}, variant["method"]: True}
        settings = settings_of(variant, plan, 0).model_dump(mode="json", include=include)
        found[name] = digest([settings, plan["of"], plan["judge"], found.get(variant.get("start", ""), "")])
    return found


def variants_of(plan: dict) -> dict[str, dict]:
    """All of a plan's, in the order in which they are trained."""
    return {name: variant for group in plan["variants"] for name, variant in group.items()}


def settings_of(variant: dict, plan: dict, seed: int) -> Experiment:
    """A variant's settings."""
    overrides = [f"{variant['method']}.{key}={json.dumps(v)}" for key, v in variant.get("set", {}).items()]
    config = variant.get("config", plan["config"])
    return load(config, [*plan.get("set", []), *overrides, f"seed={seed}"]).settings


def needed(plan: dict, missing: set[str]) -> set[str]:
    """The variants that have to be trained: those that are missing, and those that they start from."""
    starts = {name: variant.get("start", "") for name, variant in variants_of(plan).items()}
    found = set(missing)
    while more := {starts[name] for name in found} - found - {""}:
        found |= more
    return found


def use_one_core() -> None:
    """There are as many processes as cores."""
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")


def work(seed: int, plan: dict, data_file: Path, teacher: Path, out: Path, workers: int) -> None:
    """All variants of one seed, in the order of the plan; those of one entry are trained together."""
    use_one_core()
    begun, spawn = time.monotonic(), torch.multiprocessing.get_context("spawn")
    left, digests = weights_of(out), made_of(plan)
    with ProcessPoolExecutor(workers, spawn, become_judge, (data_file, teacher, plan)) as pool:
        pending = []
        done = {row.get("made_of") for row in map(json.loads, out.read_text().splitlines()) if row["seed"] == seed}

        def have_judged(name: str, weights: Path | None, row: Sampler, shift: float, **values) -> None:
            values |= {"variant": name, "seed": seed}
            pending.append(pool.submit(judge, weights, row, shift, out, begun, values))

        networks, clips = InMemory(teacher), Clips(torch.load(data_file, weights_only=True, mmap=True), "train")
        settings = load(plan["config"], plan.get("set", [])).settings
        row, shift = settings.samples.rows.get("teacher-100nfe"), settings.teacher.shift
        if seed == plan["seeds"][0] and plan.get("teacher", True):
            judged_as = digest([row.model_dump(), shift, plan["of"], plan["judge"]])
            if judged_as not in done:  # on a CPU its 100 NFE take longer than all else
                have_judged("teacher-100nfe", None, row, shift, made_of=judged_as)
        for file in sorted(left.glob(f"[!.]*@{seed}.*.pt")):  # of a call that was ended before it had judged them
            known = json.loads(torch.load(file, weights_only=True)["as"])
            have_judged(weights=file, row=Sampler(model="student", steps=1), **known)
            done.add(known["made_of"])
        missing = {name for name, made in digests.items() if made not in done}
        wanted = needed(plan, missing)
        starts = {variants_of(plan)[name].get("start") for name in wanted}
        for group in plan["variants"]:
            runs = [
                start_of(name, variant, plan, seed, networks, clips, i)
                for i, (name, variant) in enumerate(group.items())
                if name in wanted
            ]
            if not runs:
                continue
            ready = time.monotonic() - begun
            train_together(runs)
            print(
                f"seed {seed}, {', '.join(group)}: ready at {ready:.0f} s, trained at {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            for run in runs:
                if run.name in starts:
                    networks.students[run.name] = run.phase
                if run.name not in missing:
                    continue
                known = {
                    "name": run.name,
                    "made_of": digests[run.name],
                    "start": group[run.name].get("start", ""),
                    "shift": run.phase.config.later_shift(run.phase.shift),
                    "evaluations": run.evaluations,
                    "logs": {key: float(value) for key, value in run.logs.items()},
                }
                weights = left / f"{run.name}@{seed}.{known['made_of'][:12]}.pt"
                with written(weights) as temporary:
                    torch.save({"weights": run.phase.ema.state_dict(), "as": json.dumps(known)}, temporary)
                have_judged(weights=weights, row=Sampler(model="student", steps=1), **known)
            del runs
        for judged in pending:
            judged.result()


def start_of(name: str, variant: dict, plan: dict, seed: int, networks: InMemory, clips: Clips, place: int) -> Run:
    """A variant at its start."""
    settings = settings_of(variant, plan, seed)
    training = getattr(settings, variant["method"]).training
    if training.accumulate > 1 or training.mixed_precision != "no" or training.compile:
        raise SystemExit(f"{name}: the search knows neither accumulate, mixed_precision nor compile; leave them out")
    networks.start = variant.get("start", "")
    settings.methods[variant["method"]] = networks.students[networks.start].name if networks.start else TEACHER
    return Run(name, METHODS[variant["method"]].build(settings, networks), clips, 1000 * seed + place)


def run(plan: Path, teacher: Path, out: Path, data: Path, workers: int) -> None:
    """Make the data, and start a process for each seed.

    Raises:
        SystemExit: a seed failed.
    """
    variants = yaml.safe_load(plan.read_text())
    geometry = load(variants["config"], variants.get("set", [])).settings.geometry
    weights = sorted(teacher.rglob("*.safetensors"))
    of = {"clips": variants["clips"], "geometry": geometry.model_dump(), "teacher": [sha256(file) for file in weights]}
    if not data.exists():
        made = make_data(variants["clips"], teacher, 4 * workers, geometry.frames, geometry.height)
        torch.save(made | {"of": json.dumps(of)}, data)
    elif json.loads(torch.load(data, weights_only=True, mmap=True).get("of", "{}")) != of:
        raise SystemExit(
            f"{data}: encoded for another plan's clips or geometry, or by another teacher; name another --data"
        )
    weights_of(out).mkdir(parents=True, exist_ok=True)
    out.open("a").close()
    variants["of"] = of
    context, common = torch.multiprocessing.get_context("spawn"), (variants, data, teacher, out, workers)
    processes = [context.Process(target=work, args=(seed, *common)) for seed in variants["seeds"]]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(
            f"a seed failed, see above; {weights_of(out)} keeps what is trained for the same command again"
        )
    if not any(weights_of(out).iterdir()):
        weights_of(out).rmdir()


COLUMNS = ("c2st", "c2st_strong", "frechet", "motion", "single_sprite", "caption_following", "identity")


def table(file: Path) -> str:
    """Markdown: a line for each variant and seed, the best C2ST first."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    columns = [key for key in COLUMNS if any(key in row for row in rows)]
    values = [
        [row["variant"], row["seed"], row.get("start", ""), *(f"{row[k]:.4f}" if k in row else "" for k in columns)]
        for row in sorted(rows, key=lambda row: row["c2st"])
    ]
    return markdown(["variant", "seed", "from", *columns], values)


def markdown(head: list[str], rows: list[list]) -> str:
    """A table."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def over_seeds(
    files: list[Path], pairs: list[list[str]], only: list[str] | None = None, columns: Sequence[str] | None = None
) -> str:
    """Markdown: each variant's mean over its seeds, then the differences of pairs of variants from the same seeds.

    A variant and seed that is in several files counts as the last of them has it. `only` names the variants to print.

    Behind ± stands half of Student's 95% interval over the seeds, which a single seed does not have.
    """
    found: dict[str, dict[int, dict]] = {}
    for row in map(json.loads, "".join(file.read_text() for file in files).splitlines()):
        found.setdefault(row["variant"], {})[row["seed"]] = row
    known = {key for rows in found.values() for row in rows.values() for key in row}
    if unknown := [key for key in columns or () if key not in known]:
        raise SystemExit(f"{', '.join(map(str, files))}: no column {', '.join(unknown)}")
    columns = columns or COLUMNS
    shown = [key for key in dict.fromkeys((*columns, "evaluations")) if key in known]
    if unknown := {*(only or ()), *itertools.chain(*pairs)} - found.keys():
        where = ", ".join(map(str, files))
        raise SystemExit(f"{where}: no variant {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    lines = [(name, list(found[name].values())) for name in only or found]
    for one, other in pairs:
        both = found[one].keys() & found[other].keys()
        if not both:
            raise SystemExit(f"--pair {one} {other}: they have no seed in common")
        pair = [(found[one][seed], found[other][seed]) for seed in sorted(both)]
        lines.append((f"{one} - {other}", [{k: a[k] - b[k] for k in columns if k in a and k in b} for a, b in pair]))

    def cell(values: list[dict], key: str) -> str:
        return interval([value[key] for value in values]) if all(key in value for value in values) else ""

    rows = [[name, len(values), *(cell(values, key) for key in shown)] for name, values in lines]
    return markdown(["variant", "seeds", *shown], rows)


def interval(values: list[float]) -> str:
    """Mean and half of Student's 95% interval."""
    mean, digits = np.mean(values), 0 if abs(values[0]) > 1000 else 4
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def main() -> None:
    """`run` trains and judges, `table` and `means` print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True)
    runs = actions.add_parser("run", help="train and judge the variants of a plan")
    runs.add_argument("plan", type=Path)
    runs.add_argument("--teacher", type=Path, required=True)
    runs.add_argument("--out", type=Path, required=True, help="JSON lines; more are appended")
    runs.add_argument("--data", type=Path, default=Path("search-data.pt"), help="encoded clips, for the next call too")
    runs.add_argument("--workers", type=int, default=4, help="processes that measure, for each seed")
    runs.set_defaults(run=lambda a: run(a.plan, a.teacher, a.out, a.data, a.workers))
    tables = actions.add_parser("table", help="print what a run found")
    tables.add_argument("file", type=Path)
    tables.set_defaults(run=lambda a: print(table(a.file)))
    means = actions.add_parser("means", help="means over seeds, and differences of pairs of variants")
    means.add_argument("files", type=Path, nargs="+")
    means.add_argument("--pair", nargs=2, action="append", default=[], metavar=("ONE", "OTHER"))
    means.add_argument("--only", nargs="+", metavar="VARIANT", help="the variants to print; all without it")
    means.add_argument("--columns", nargs="+", help="beside the evaluations; frechet_2nfe and so on, too")
    means.set_defaults(run=lambda a: print(over_seeds(a.files, a.pair, a.only, a.columns)))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
