"""From settings to networks, and a folder of videos to results."""

from collections.abc import Callable, Iterable

import torch

from vbench_i2v import results, runner, weights
from vbench_i2v.backbones import Official
from vbench_i2v.base import OFFICIAL
from vbench_i2v.errors import VBenchError
from vbench_i2v.files import read_json, sha256, user_path
from vbench_i2v.parts import Part
from vbench_i2v.settings import Folder, Measure
from vbench_i2v.suite import SAMPLES, Plan, plan_folder, plan_suite, read_suite, some

SAMPLING = "sampling.json"  # beside the videos: how they were made
CLIP_DIMENSIONS = ("background_consistency", "aesthetic_quality")
_CHOICE = "Or leave them out: name others with --dimensions, or allow n of N with --allow-incomplete"


def score_folder(
    settings: Folder,
    networks: runner.Networks | None = None,
    part: Part | None = None,
    track: Callable[[list], Iterable] = iter,
) -> str:
    """Measure what has no record yet, and, unless it is one part of many, write the results.

    Args:
        settings: the videos, and what is wanted of them.
        networks: other than the benchmark's own; what they lack is no gap that could be filled.
        part: which of the videos; None: all.
        track: see `runner.run`.

    Returns:
        what there is to say, for people.

    Raises:
        FileNotFoundError: videos, images or folders are missing.
        VBenchError: a file cannot be used.
    """
    plan, sampling = make_plan(settings), _sampling(settings)
    out, tolerant = user_path(settings.out), settings.allow_incomplete
    absent = tolerant or networks is not None
    networks = networks or official_networks(settings, tolerant)
    records = out / "records"
    outcome = runner.run(plan.clips, networks, records, part, tolerant, absent, track=track)
    names = list(outcome.damaged_of(plan.clips))
    damaged = [f"videos damaged: {some(names)}"] if names else []
    if part:
        absent = [f"{name} is not computed: {reason}" for name, reason in outcome.not_computed.items()]
        done = f"{records}: {outcome.computed} new records; when all parts are done, run this without --part"
        return "\n".join([*absent, *damaged, done])
    found = results.score(plan, runner.gather(plan.clips, networks, records), outcome.not_computed, tolerant)
    name = networks.backbones.name
    accounted = found.account(
        name,
        outcome.damaged_of(plan.clips),
        comparable=name == OFFICIAL and _as_published(settings),
        settings=settings.model_dump(mode="json", exclude={"sampling", "videos", "out", "weights"}),
        suite_sha256=sha256(user_path(settings.suite)) if settings.suite else None,
        sampling=sampling,
    )
    written = found.write(out, settings.name, accounted)
    return "\n".join([found.table(), "", *plan.notes(), *damaged, f"networks: {name}", str(written)])


def make_plan(settings: Folder) -> Plan:
    """The videos to score, of a suite or of a folder."""
    videos, images = user_path(settings.videos), user_path(settings.images) if settings.images else None
    if not settings.suite:
        if settings.ratio not in ("auto", "none"):
            raise VBenchError(f"--ratio {settings.ratio}: only a suite's crops have one; add --suite or leave it out")
        return plan_folder(videos, images, settings.wanted(), settings.allow_incomplete)
    return plan_suite(
        read_suite(user_path(settings.suite)),
        videos,
        images,
        settings.wanted(),
        settings.ratio,
        settings.samples_per_prompt,
        settings.allow_incomplete,
    )


def _as_published(settings: Folder) -> bool:
    """Whether these are the suite, the number of videos and CLIP's number format of the leaderboard."""
    if settings.samples_per_prompt != SAMPLES or settings.clip_dtype != "float16" or not settings.suite:
        return False
    official = next(weight for weight in weights.manifest() if not weight.dimensions)
    return sha256(user_path(settings.suite)) == official.sha256


def _sampling(settings: Folder) -> dict:
    """How the videos were made: what was noted beside them, and what the settings add."""
    noted = user_path(settings.videos) / SAMPLING
    found = read_json(noted, "correct or remove it") if noted.is_file() else {}
    if not isinstance(found, dict):
        raise VBenchError(f"{noted}: no JSON object; correct or remove it")
    return found | settings.sampling


def official_networks(settings: Measure, allow_incomplete: bool) -> runner.Networks:
    """The benchmark's own networks; none is loaded yet. Lacking are those whose weight files are missing or wrong.

    Raises:
        VBenchError: weight files are missing or wrong, and all or nothing was asked for.
    """
    root, dimensions = user_path(settings.weights), settings.wanted()
    why = weights.absent(root, dimensions)
    if why and not allow_incomplete:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in why.items())
        raise VBenchError(f"{len(why)} of {len(dimensions)} dimensions cannot be computed:\n{listed}\n{_CHOICE}")
    files = weights.identities(root, [name for name in dimensions if name not in why])
    identity: dict[str, object] = {
        name: {"weights": found}
        | ({"clip_dtype": settings.clip_dtype} if name in CLIP_DIMENSIONS else {})
        | ({"packages": used} if (used := weights.package_versions(name)) else {})
        for name, found in files.items()
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return runner.Networks(Official(root, device, settings.clip_dtype), identity, why)
