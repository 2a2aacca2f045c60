"""Several finished experiments in one table: what is one method, its interval over seeds, and what it cost."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from test_workflow import Clone
from vpae.artifacts import ArtifactError, digest, write_json
from vpae.distill import METHODS
from vpae.evaluation import truth
from vpae.experiment import ConfigError, Source, load
from vpae.graph import RESULTS, stage_folder, stage_settings, stages_of, upstream
from vpae.report import comparison
from vpae.report.alike import is_of, require_alike
from vpae.stages import run_stage

CONFIGS = Path(__file__).parents[1] / "configs"
EVALUATED = {"mean": 0.5, "low": 0.4, "high": 0.6}


def overlays(folder: Path, **files: str) -> Path:
    (folder / "micro.yaml").write_text((CONFIGS / "micro.yaml").read_text())
    for name, text in files.items():
        (folder / f"{name.replace('_', '-')}.yaml").write_text(f"extends: micro\n{text}")
    return folder


def finish(source: Source, results: Path, frechet: float = 0.1, score: float = 0.5, backbones: str = "tiny") -> None:
    """Write what the stages of a finished experiment leave behind, as far as the comparison reads it."""
    for stage in stages_of(source.settings)[:-1]:
        folder = stage_folder(source, stage, results)
        folder.mkdir(parents=True, exist_ok=True)
        memory = 5_000_000_000 if stage == "priming" else 3_000_000_000
        write_json(
            folder / "provenance.json",
            {
                "settings": stage_settings(source.settings, stage),
                "inputs": dict.fromkeys(upstream(source.settings, stage), digest({})),
                "outputs": {},
                "counts": {"trained_parameters": 300 if stage == "priming" else 100},
                "seconds": 7.0,
                "peak_memory_bytes": memory,
                "code": {"commit": f"{stage}1234567"},
            },
        )
    rows = source.settings.samples.rows
    write_json(folder / "scores.json", {"rows": {row: {"frechet": {**EVALUATED, "mean": frechet}} for row in rows}})
    records = [{"row": row, "key": "a", **dict.fromkeys(truth.METRICS, score)} for row in rows]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    vbench = {row: {"i2v_score": 90.0, "quality_score": 80.0, "imaging_quality": 70.0} for row in rows}
    write_json(folder / "vbench.json", {"backbones": backbones, "rows": vbench})


def compared(folder: Path, names: list[str], **finished: dict) -> dict[str, dict]:
    for name in names:
        finish(load(folder / f"{name}.yaml"), folder / "results", **finished.get(name.replace("-", "_"), {}))
    comparison.run(names, folder / "comparison", folder, folder / "results")
    return json.loads((folder / "comparison.json").read_text())["rows"]


def test_students_of_one_step_have_their_method_s_name_and_the_teacher_s_one_step_is_euler_s(tmp_path):
    rows = compared(overlays(tmp_path), ["micro"])
    assert list(rows) == ["teacher-100nfe", "euler", "priming", "vpae", "vpae-2nfe", "vpae-4nfe"]
    assert [row["nfe"] for row in rows.values()] == [100, 1, 1, 1, 2, 4]
    assert rows["vpae"]["frechet"] == 0.1 and rows["vpae"]["intervals"]["frechet"] == [0.4, 0.6]
    assert rows["vpae"]["mean_score"] == rows["vpae"]["low"] == rows["vpae"]["high"] == 0.5  # one video


def test_the_bare_name_and_the_paper_s_figure_are_the_base_s_whatever_comes_first(tmp_path):
    folder = overlays(tmp_path, ablation="equilibrium: {adversarial_weight: 0.0}\n")
    rows = compared(folder, ["ablation", "micro"], micro={"frechet": 1.0}, ablation={"frechet": 3.0})
    assert rows["vpae"]["frechet"] == 1.0 and rows["vpae (ablation)"]["frechet"] == 3.0
    assert "paper_score" in rows["vpae"] and "paper_score" not in rows["vpae (ablation)"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_trained_teacher_s_rows_are_not_compared_with_a_given_one_s(first, tmp_path):
    folder = overlays(tmp_path, other="teacher: {source: folder, path: data/teachers/tiny}\n")
    sources = [load(folder / f"{name}.yaml") for name in ("micro", "other")]
    with pytest.raises(ConfigError, match=r"teacher.source is .*evaluate both alike"):
        require_alike([sources[first], sources[1 - first]])


@pytest.mark.parametrize(
    "tree",
    [
        "{adversarial_weight: 0.0}",
        "{csds_weight: 0.0}",
        "{r1: {weight: 0.0}}",
        "{backbone: teacher}",
        "{backbone: copy}",
        "{head: {form: convolutions}}",
        "{head: {semantics: false}}",
    ],
)
def test_an_ablation_by_itself_has_not_the_paper_s_figure(tree, tmp_path):
    rows = compared(overlays(tmp_path, ablation=f"equilibrium: {tree}\n"), ["ablation"])
    assert "paper_score" not in rows["vpae"] and "paper_score" in rows["priming"]


@pytest.mark.parametrize(
    ("name", "tree", "there"),
    [
        ("dmd2", "{}", True),
        ("dmd2", "{real_share: 1.0}", False),
        ("dmd2", "{adversarial_weight: 0.0, head_weight: 0.0}", False),
        ("magic", "{}", True),
        ("magic", "{alpha_weak: 0.0}", False),
    ],
)
def test_a_rival_has_the_paper_s_figure_as_it_was_published_only(name, tree, there, tmp_path):
    settings = load(overlays(tmp_path, rival=f"methods: {{{name}: teacher}}\n{name}: {tree}\n") / "rival.yaml").settings
    assert METHODS[name].as_published(settings) == there


def test_phase_two_from_another_start_has_not_the_paper_s_figure(tmp_path):
    text = "methods: {consistency: teacher, equilibrium: consistency}\nsamples: {rows: {priming-1nfe: null}}\n"
    settings = load(overlays(tmp_path, start=text) / "start.yaml").settings
    assert not METHODS["equilibrium"].as_published(settings)


def test_without_priming_it_has_not_the_paper_s_figure_either(tmp_path):
    start = {"rows": dict.fromkeys(["priming-1nfe"])}
    text = f"methods: {{priming: null, equilibrium: teacher}}\nsamples: {json.dumps(start)}\n"
    assert "paper_score" not in compared(overlays(tmp_path, ablation=text), ["ablation"])["vpae"]


def test_where_vbench_s_own_networks_measured_no_sa_there_is_no_mean_score_and_the_table_says_so(tmp_path):
    folder = overlays(tmp_path)
    finish(source := load(folder / "micro.yaml"), folder / "results", backbones="official")
    file = stage_folder(source, "evaluation", folder / "results") / "vbench.json"
    content = json.loads(file.read_text())
    for row in content["rows"].values():
        row["i2v_score"] = None
    write_json(file, content)
    *_, table = comparison.run(["micro"], folder / "comparison", folder, folder / "results")
    found = json.loads((folder / "comparison.json").read_text())
    assert "VBench-I2V" in found["mean_score_of"] and not any("mean_score" in row for row in found["rows"].values())
    assert "No row has a mean score" in table.read_text() and "SA needs camera_motion" in table.read_text()


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ("teacher: {vae: {base_dim: 8}}\n", "teacher.vae"),
        ("clips: {train: 8}\nevaluation: {c2st: {clips: 16}}\n", "evaluation.c2st.clips"),
    ],
)
def test_rows_of_other_latents_or_another_classifier_s_clips_are_not_compared(tree, key, tmp_path):
    folder = overlays(tmp_path, one="evaluation: {c2st: {clips: 16}}\n", other=tree)
    with pytest.raises(ConfigError, match=f"{key}.* is .*evaluate both alike"):
        compared(folder, ["one" if "c2st" in key else "micro", "other"])


def test_a_resumed_training_s_seconds_are_those_of_all_its_steps(tmp_path):
    folder = overlays(tmp_path)
    finish(source := load(folder / "micro.yaml"), folder / "results")
    file = stage_folder(source, "priming", folder / "results") / "provenance.json"
    known = json.loads(file.read_text())
    for counts, seconds in (({"training_seconds": 90.0}, 90), ({"steps": 40, "seconds_per_step": 2.0}, 80)):
        write_json(file, known | {"counts": known["counts"] | counts})
        comparison.run(["micro"], folder / "comparison", folder, folder / "results")
        rows = json.loads((folder / "comparison.json").read_text())["rows"]
        assert rows["priming"]["cost"]["seconds"] == seconds and rows["vpae"]["cost"]["seconds"] == seconds + 7


def test_experiments_that_differ_in_the_seed_alone_are_one_line_with_student_s_interval(tmp_path):
    folder = overlays(tmp_path, other="seed: 1\n")
    rows = compared(folder, ["micro", "other"], micro={"frechet": 1.0}, other={"frechet": 3.0})
    assert list(rows) == ["teacher-100nfe", "euler", "priming", "vpae", "vpae-2nfe", "vpae-4nfe"]
    vpae = rows["vpae"]
    assert vpae["seeds"] == [0, 1] and vpae["frechet"] == 2.0
    assert vpae["intervals"]["frechet"] == pytest.approx([2 - 12.7062, 2 + 12.7062], rel=1e-4)  # t of one degree


def test_an_ablation_s_row_is_a_line_of_its_own_and_what_it_shares_with_its_base_is_not_there_twice(tmp_path):
    folder = overlays(tmp_path, ablation="equilibrium: {adversarial_weight: 0.0}\n")
    rows = compared(folder, ["micro", "ablation"], micro={"frechet": 1.0}, ablation={"frechet": 3.0})
    assert (rows["vpae"]["frechet"], rows["vpae (ablation)"]["frechet"]) == (1.0, 3.0)
    assert rows["vpae"]["seeds"] == rows["vpae (ablation)"]["seeds"] == [0]
    assert [name for name in rows if name.startswith("priming")] == ["priming"]


def test_the_cost_is_that_of_the_whole_chain(tmp_path):
    rows = compared(overlays(tmp_path), ["micro"])
    # Of two steps of two clips each: priming 2 (1 + 1) and 1 + 2 + 1, the equilibrium 5 and 3 evaluations a step.
    cost = {"network_evaluations": 64, "seconds": 14, "trained_parameters": 300, "peak_memory_bytes": 5e9}
    assert rows["vpae"]["cost"] == cost
    assert rows["priming"]["cost"]["network_evaluations"] == 32 and rows["teacher-100nfe"]["cost"] == {}
    assert rows["vpae"]["commits"] == ["equilibrium1234567"]


def test_the_mean_score_is_vbench_s_where_its_own_networks_measured_and_the_two_kinds_do_not_mix(tmp_path):
    folder = overlays(tmp_path, other="seed: 1\n")
    rows = compared(folder, ["micro"], micro={"backbones": "official"})
    assert rows["vpae"]["mean_score"] == 80
    assert json.loads((folder / "comparison.json").read_text())["mean_score_of"].startswith("SA, TC and FQ")
    with pytest.raises(ConfigError, match=r"in micro, and that of the truth metrics .* in other"):
        compared(folder, ["micro", "other"], micro={"backbones": "official"})


def test_csv_and_markdown_say_the_same_as_the_json(tmp_path):
    rows = compared(overlays(tmp_path), ["micro"])
    with (tmp_path / "comparison.csv").open() as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert list(lines) == list(rows) and lines["vpae"]["frechet_high"] == "0.6" and lines["vpae"]["seeds"] == "0"
    table = (tmp_path / "comparison.md").read_text()
    assert "| vpae | 1 | 1 | 0.5000 ± 0.0000 | 0.1000 ± 0.1000 | 64 | 14 | 0.00M | 5.00 | equilib | 79.92 |" in table
    assert lines["vpae"]["paper_score"] == "79.92" and lines["vpae-2nfe"]["paper_score"] == ""


def test_the_paper_s_score_stands_beside_ours_where_the_paper_has_one(tmp_path):
    rows = compared(overlays(tmp_path, ablation="equilibrium: {adversarial_weight: 0.0}\n"), ["micro", "ablation"])
    assert rows["teacher-100nfe"]["paper_score"] == pytest.approx((92.90 + 80.82 + 70.44) / 3, abs=0.005)
    assert rows["priming"]["paper_score"] == pytest.approx((84.92 + 72.34 + 59.75) / 3, abs=0.005)
    assert not {"euler", "vpae-2nfe", "vpae (ablation)"} & {name for name, row in rows.items() if "paper_score" in row}


@pytest.mark.parametrize(
    "change", ["samples: {count: 7}\n", "evaluation: {vbench: {videos_per_row: 2}}\n", "clips: {world: {crf: 20}}\n"]
)
def test_experiments_that_were_measured_differently_are_not_compared(change, tmp_path):
    folder = overlays(tmp_path, other=f"seed: 1\n{change}")
    with pytest.raises(ConfigError, match=r"micro and .*other.* so that their scores cannot be compared"):
        compared(folder, ["micro", "other"])


def test_a_table_is_of_the_evaluations_that_were_there(tmp_path, monkeypatch):
    monkeypatch.chdir(overlays(tmp_path))
    source, table = load("micro.yaml"), Path("comparison.json")
    finish(source, RESULTS)
    assert not is_of(table, [source])
    comparison.run(["micro"], table.with_suffix(""), configs=Path())
    assert is_of(table, [source])
    provenance = RESULTS / "micro/evaluation/provenance.json"
    write_json(provenance, {**json.loads(provenance.read_text()), "outputs": {"scores.json": "another run's"}})
    assert not is_of(table, [source])


@pytest.mark.slow
def test_the_workflow_makes_a_table_anew_when_other_results_came_with_old_dates(tmp_path):
    program = f"#!{sys.executable}\nimport sys\nfrom vpae.cli import main\nsys.exit(main())\n"
    clone, asked = Clone(tmp_path / "clone", program), ("--config", "experiment=micro", "--", "ablations")
    clone.edit("micro-no-csds", lambda tree: tree.update(extends="micro", equilibrium={"csds_weight": 0.0}))
    for name in ("micro", "micro-no-csds"):
        finish(load(clone.folder / f"configs/{name}.yaml"), clone.folder / RESULTS)
    table = [", ".join(f"results/ablations.{kind}" for kind in ("json", "csv", "md"))]
    assert clone.planned(*asked) == table
    code, printed = clone.snakemake(*asked)
    assert code == 0, printed
    assert clone.planned(*asked) == []
    provenance = clone.folder / RESULTS / "micro-no-csds/evaluation/provenance.json"
    write_json(provenance, {**json.loads(provenance.read_text()), "outputs": {"scores.json": "another run's"}})
    for path in (provenance, provenance.parent):
        os.utime(path, (1, 1))
    assert clone.planned(*asked) == table


def test_what_changes_the_training_alone_is_compared(tmp_path):
    changes = "clips: {train: 30}\nlatents: {batch_size: 1}\nteacher: {shift: 5.0}\n"
    rows = compared(overlays(tmp_path, other=changes), ["micro", "other"])
    assert {"vpae", "vpae (other)"} <= rows.keys()


def test_scores_of_an_older_student_are_refused(tmp_path):
    folder = overlays(tmp_path)
    source, results = load(folder / "micro.yaml"), folder / "results"
    finish(source, results)
    assert comparison.runs_of(source, results)
    for changed in (["priming.guidance_scale=2.5"], ["samples.rows.more={model: priming, steps: 2}"]):
        with pytest.raises(ArtifactError, match="was made with other settings or of other results"):
            comparison.runs_of(load(folder / "micro.yaml", changed), results)
    provenance = json.loads((results / "micro/priming/provenance.json").read_text())
    write_json(results / "micro/priming/provenance.json", {**provenance, "outputs": {"student": "trained again"}})
    with pytest.raises(ArtifactError, match="was made with other settings or of other results"):
        comparison.runs_of(source, results)


def test_a_stage_is_not_made_from_results_of_other_settings_and_says_which(tmp_path):
    folder = overlays(tmp_path)
    source, results = load(folder / "micro.yaml"), folder / "results"
    finish(source, results)
    changed = load(folder / "micro.yaml", ["priming.guidance_scale=2.5"])
    for stage in ("equilibrium", "samples", "evaluation", "report"):
        with pytest.raises(ArtifactError) as refused:
            run_stage(changed, stage, results)
        said = str(refused.value)
        assert (
            f"{results}/micro/priming: made with priming.guidance_scale = 5.0, but the configuration says 2.5" in said
        )
    provenance = json.loads((results / "micro/priming/provenance.json").read_text())
    write_json(results / "micro/priming/provenance.json", {**provenance, "outputs": {"student": "trained again"}})
    with pytest.raises(ArtifactError, match=r"micro/equilibrium: made from another .*micro/priming than the present"):
        run_stage(source, "samples", results)


def test_a_given_student_has_no_figure_of_the_paper_s_and_the_commit_that_it_was_trained_at(tmp_path):
    folder = overlays(
        tmp_path, given=f"students: {{mine: {tmp_path}/mine}}\nsamples: {{rows: {{vpae-1nfe: {{model: mine}}}}}}\n"
    )
    (tmp_path / "mine").mkdir()
    write_json(
        tmp_path / "mine/provenance.json", {"settings": {}, "inputs": {}, "outputs": {}, "code": {"commit": "abc"}}
    )
    rows = compared(folder, ["given"])
    assert "paper_score" not in rows["vpae"] and rows["vpae"]["commits"] == ["abc"]
    assert "paper_score" in rows["teacher-100nfe"]
    shutil.rmtree(tmp_path / "mine")  # as where its scores were pulled without it
    assert comparison.runs_of(load(folder / "given.yaml"), folder / "results")


def test_scores_that_were_pulled_with_the_students_alone_can_be_compared(tmp_path):
    folder = overlays(tmp_path)
    source, results = load(folder / "micro.yaml"), folder / "results"
    finish(source, results)
    whole = comparison.runs_of(source, results)
    for stage in ("clips", "latents", "samples"):
        shutil.rmtree(results / "micro" / stage)
    assert comparison.runs_of(source, results) == whole


def test_what_is_not_evaluated_or_was_with_other_settings_is_refused(tmp_path):
    folder = overlays(tmp_path)
    source, results = load(folder / "micro.yaml"), folder / "results"
    with pytest.raises(ArtifactError, match=r"evaluation is not there: run `snakemake all --config experiment=micro`"):
        comparison.runs_of(source, results)
    finish(source, results)
    assert comparison.runs_of(source, results)
    changed = load(folder / "micro.yaml", ["evaluation.bootstrap=21"])
    with pytest.raises(ArtifactError, match="was made with other settings"):
        comparison.runs_of(changed, results)
