"""From the results of a study to its findings. All results here are synthetic: right and wrong answers of a simulation,
written as the files that a study leaves."""

import html, json, re

import numpy as np
import pandas as pd
import pytest

import nli_ft.claims
import nli_ft.paired
import nli_ft.seeds
import nli_ft.study_report
from nli_ft.labels import BINARY
from nli_ft.power import cluster_ids, right_answers
from nli_ft.process import ConfigError, RecordError, project_root
from nli_ft.study_run import read_results
from studies import DECLARED, synthetic_study


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    "statsmodels' multipletests collects garbage at every call."
    monkeypatch.setattr("gc.collect", lambda *args: 0)


def shown(notebook):
    "Everything that an executed notebook shows as text."
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        for out in cell.get("outputs", []):
            parts.append("".join(out.get("text", [])))
            parts += ["".join(out["data"].get(k, [])) for k in ("text/markdown",) if "data" in out]
    return html.unescape("\n".join(parts))


def test_a_report_shows_what_was_asked_what_came_out_and_what_changed(tmp_path):
    study = synthetic_study(tmp_path)
    (study.folder / "report.ipynb").write_text("an older report")
    path = nli_ft.study_report.report_study(study)
    text, raw = shown(path), path.read_text()
    for part in (
        "question: Does a synthetic thought help?",
        "sealed 2026-11-25T01:00:00Z at commit cdcdcd",
        "all 18 runs of the plan are done",
        "accuracy on test in condition short: cot@short - label_only@short = +",
        "| cot > label_only [short] | test | accuracy | 99.38 % | held |",
        "| label_only@long > cot@short on dev | dev | accuracy | 99.38 % | not resolvable at this n |",
        "alpha 0.05: the primary contrast has intervals of 95 %, and each of 8 claims has one of 99.38 %",
        "**Set test** (test)",
        "majority label (0)",
        "2026-11-26T01:00:00Z, commit none, after 0 runs and 0 looks at the test: a third seed (seeds: [1, 2] -> 3)",
        "the plan warned: low_rank is small",
        "measured: 18 runs in 18 minutes",
        "nli_study report ",
    ):
        assert part in text, part
    # a forest and a curve for each set and for the pool, and the pool over its sets in two conditions
    assert raw.count("image/png") == 8
    assert str(project_root()) not in raw and '"start_time"' not in raw
    table = pd.read_csv(study.folder / "table.csv")
    assert list(table["set"].unique()) == ["test", "dev", "all"] and len(table) == 3 * 7
    assert "cot > label_only [short]: held" in html.unescape((study.folder / "table.md").read_text())
    assert "\\toprule" in (study.folder / "table.tex").read_text()


def test_the_table_says_what_the_comparison_of_configs_over_seeds_says(tmp_path):
    results = read_results(synthetic_study(tmp_path))
    cells, groups = results.cells("test"), results.groups("test")
    one = {cell: value for cell, value in cells.items() if cell[1] == "short"}
    rows = nli_ft.study_report.arm_rows(one, groups, "label_only")
    arms = [one[arm, "short"]["right"] for arm in ("label_only", "low_rank", "cot")]
    for row, said in zip(rows[1:], nli_ft.seeds.over_seeds(arms, groups)):
        assert {k: row[k] for k in said} == said
    assert rows[2]["score_ci"] == nli_ft.paired.seed_share(arms[2], groups)["accuracy_ci"]


def test_claims_share_alpha_and_a_pool_holds_the_items_of_its_sets(tmp_path):
    study = synthetic_study(tmp_path)
    for which in ("dev", "test"):
        preds = [dict(id=i, label=i % 2, predicted_label=1) for i in range(400)]
        nli_ft.study_report.keep_rival(study, which, "always 1", preds)
    found = nli_ft.study_report.study_findings(study)
    assert [v["ci_level"] for v in found.verdicts] == [1 - 0.05 / 8] * 8
    pooled = found.verdicts[6]
    assert str(pooled["claim"]) == "cot > low_rank on all [short]" and pooled["outcome"] == nli_ft.claims.HELD
    rows, rivals = found.sets["all"]
    alone = [found.sets[name][0][2]["score"] for name in ("dev", "test")]
    assert rows[2]["n"] == 800 and rows[2]["score"] == pytest.approx(sum(alone) / 2)
    assert [r["n"] for r in rivals] == [800, 800] and found.role("all") == "dev and test"
    with pytest.raises(RecordError, match="no results of a set all yet"):
        nli_ft.study_report.keep_rival(study, "all", "always 1", preds)


def test_an_unfinished_study_says_what_is_missing_and_judges_nothing(tmp_path):
    some = synthetic_study(tmp_path, sets=("dev",), seeds=(1, 2))
    found = nli_ft.study_report.study_findings(some)
    assert found.state().startswith(
        "warning: 12 of 18 runs of the plan are done, and set test is not judged yet"
    )
    assert list(found.sets) == ["dev"] and "set test is not judged yet" in found.primary["why"]
    reasons = [v["reason"] for v in found.verdicts]
    assert reasons[:5] == ["set test is not judged yet"] * 5 and not reasons[5]
    assert reasons[6:] == ["set all is not judged yet"] * 2
    assert {v["outcome"] for v in found.verdicts if v["reason"]} == {nli_ft.claims.OPEN}


def test_a_study_without_results_or_without_a_plan_gives_no_findings(tmp_path):
    study = synthetic_study(tmp_path, sets=("dev",), seeds=())
    found = nli_ft.study_report.study_findings(study)
    assert not found.sets and "0 of 18 runs" in found.state()
    (study.folder / "plan.json").unlink()
    with pytest.raises(RecordError, match="has no plan yet"):
        nli_ft.study_report.report_study(study)
    assert not (study.folder / "report.ipynb").exists()


def test_one_seed_of_an_arm_leaves_its_claims_open(tmp_path):
    found = nli_ft.study_report.study_findings(synthetic_study(tmp_path, seeds=(1,)))
    assert all("one seed of" in v["reason"] for v in found.verdicts)
    assert "one seed" in found.primary["why"]
    assert {r["verdict"] for r in found.sets["test"][0]} == {
        "baseline",
        "one seed: label_only and low_rank",
        "one seed: label_only and cot",
    }


def test_a_check_that_is_no_claim_is_refused_with_its_place(tmp_path):
    mistakes = (
        ("cot > lable_only", "character 7: there is no arm lable_only. Did you mean label_only?"),
        ("cot > label_only on hans", "character 21: there is no evaluation set hans"),
        ("__import__('os').getcwd() > cot", "has no meaning here"),
    )
    for i, (wrong, why) in enumerate(mistakes):
        declared = DECLARED.replace("cot > label_only", wrong, 1)
        study = synthetic_study(tmp_path / str(i), declared=declared)
        with pytest.raises(ConfigError) as e:
            nli_ft.claims.parse_checks(study)
        assert why in str(e.value)


def test_rivals_stand_in_the_table_and_must_have_answered_the_same_items(tmp_path):
    study = synthetic_study(tmp_path)
    preds = [dict(id=i, label=i % 2, predicted_label=1) for i in range(400)]
    keep = nli_ft.study_report.keep_rival
    keep(study, "test", "always 1", preds[::-1])
    rivals = nli_ft.study_report.study_findings(study).sets["test"][1]
    assert [(r["arm"], r["accuracy"]) for r in rivals] == [("majority label (0)", 0.5), ("always 1", 0.5)]
    with pytest.raises(RecordError, match="has no answer to item 399"):
        keep(study, "test", "few", preds[:-1])
    with pytest.raises(RecordError, match="other gold labels"):
        keep(study, "test", "turned", [dict(p, label=1 - p["label"]) for p in preds])
    with pytest.raises(RecordError, match="no results of a set hans yet"):
        keep(study, "hans", "always 1", preds)


def amended(study, **amendment):
    "Write another amendment into the plan of a study."
    path = study.folder / "plan.json"
    plan = json.loads(path.read_text())
    plan["amendments"].append(dict(date="2026-11-28T01:00:00Z", commit=None, reason=" ") | amendment)
    path.write_text(json.dumps(plan))


def test_what_was_changed_after_the_first_look_is_no_prediction_any_more(tmp_path):
    study = synthetic_study(tmp_path)
    now, mark = study.checks, "(changed after the test was seen)"
    before = [check.replace("cot > label_only", "cot < label_only") for check in now]
    amended(study, changed=["checks"], before=dict(checks=before), after=dict(checks=now), looks=1, runs=18)
    found = nli_ft.study_report.study_findings(study)
    table = nli_ft.study_report.claims_table(found.verdicts)[1]
    assert [row[4] for row in table if mark in row[4]] == [f"held {mark}", f"not resolvable at this n {mark}"]
    assert {row[0] for row in table if mark in row[4]} == {
        "cot > label_only [short]",
        "cot > label_only [long]",
    }
    assert not found.primary["late"]
    first, late = nli_ft.study_report.deviations(found.results)
    assert late["known"] == "after 18 runs and 1 look at the test" and late["reason"] == "no reason was given"
    assert late["changed"] == "checks: without `cot < label_only`, with `cot > label_only`"
    assert late["late"] and not first["late"]


def test_an_older_amendment_is_dated_by_the_looks_in_the_results(tmp_path):
    study = synthetic_study(tmp_path)
    amended(study, date="2026-11-26T02:00:00Z", reason="early", changed=dict(alpha=[0.1, None]))
    assert not nli_ft.study_report.study_findings(study).late
    amended(study, reason="typo", changed=dict(alpha=[0.01, None]), looks=0)
    found = nli_ft.study_report.study_findings(study)
    assert found.late == dict(alpha=(0.01, None)) and all(v["late"] for v in found.verdicts)
    said = nli_ft.study_report.primary_text(found.primary)
    assert said.endswith("It was changed after the test was seen")
    assert nli_ft.study_report.deviations(found.results)[-1]["changed"] == "alpha: 0.01 -> not set"


def test_the_level_of_a_study_stands_beside_every_interval(tmp_path):
    study = synthetic_study(tmp_path, declared=DECLARED + "alpha = 0.2\n")
    found = nli_ft.study_report.study_findings(study)
    files = nli_ft.study_report.table_files(found.sets, tmp_path, alpha=study.alpha)
    markdown, latex = [file.read_text() for file in files[:2]]
    assert "difference [80 %, Holm]" in markdown and "[95 %, Holm]" not in markdown
    assert re.search(r"difference( \\\\)? \[80~\\%,( \\\\)? Holm\]", latex), "a head may have several lines"
    assert "] at 80 %, p = " in nli_ft.study_report.primary_text(found.primary)
    assert {row[3] for row in nli_ft.study_report.claims_table(found.verdicts)[1]} == {"97.5 %"}
    assert found.levels().startswith(
        "alpha 0.2: the primary contrast has intervals of 80 %, and each of 8 claims"
    )


# --- how often is a verdict false?


def outcomes(check, accuracies, seeds, groups, seed_sd, shares, n, level=0.05):
    "How often a claim is held and how often it is refuted, in simulated studies of which this is the truth."
    (claim,) = nli_ft.claims.claims_of(check, [(arm, "") for arm in accuracies])
    rng, arm_of = np.random.default_rng(21), np.repeat(range(len(accuracies)), seeds)
    means = np.repeat(list(accuracies.values()), seeds)
    found = []
    for _ in range(n):
        of_runs = np.clip(means + seed_sd * rng.standard_normal(len(means)), 0.02, 0.98)
        right = right_answers(rng, of_runs, groups, **shares, arm_of=arm_of)
        of_arm = {arm: right[arm_of == i] for i, arm in enumerate(accuracies)}
        test = nli_ft.paired.contrast_test([(w, of_arm[arm]) for (arm, _), w in claim.terms.items()], groups)
        found.append(nli_ft.claims.judge_claim(claim, test, level)["outcome"])
    return found.count(nli_ft.claims.HELD) / n, found.count(nli_ft.claims.REFUTED) / n


BOUNDARIES = {
    "a > b": dict(a=0.7, b=0.7),
    "a - b > 0.05": dict(a=0.75, b=0.7),
    "abs(a - b) < 0.1": dict(a=0.8, b=0.7),
    "a - b > c - d": dict(a=0.8, b=0.7, c=0.7, d=0.6),
}


@pytest.mark.parametrize("check", BOUNDARIES)
def test_at_the_boundary_a_claim_is_rarely_held_and_rarely_refuted(check):
    shares = dict(item=0.2, cluster=0.2, run=0.1, arm=0.1)
    held, refuted = outcomes(check, BOUNDARIES[check], 3, cluster_ids(200, 4), 0.02, shares, n=120)
    assert max(held, refuted) <= 0.05 + 2 * (0.05 * 0.95 / 120) ** 0.5


def test_a_true_claim_of_equality_is_held_where_items_and_seeds_are_many():
    held, refuted = outcomes(
        "abs(a - b) < 0.1", dict(a=0.7, b=0.7), 6, cluster_ids(800, 4), 0.02, dict(run=0.2), n=60
    )
    assert held > 0.9 and not refuted


@pytest.mark.simulation
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("arm", [0.0, 0.3])
@pytest.mark.parametrize("check", BOUNDARIES)
def test_share_of_false_verdicts_at_the_boundary(check, arm, seed_sd, seeds):
    shares = dict(run=0.2, arm=arm)
    held, refuted = outcomes(check, BOUNDARIES[check], seeds, cluster_ids(400, 4), seed_sd, shares, n=1000)
    print(f"{check}, {seeds} seeds, sd {seed_sd}, arm {arm}: held {held:.3f}, refuted {refuted:.3f}")
    assert max(held, refuted) <= 0.05


def test_arms_that_give_every_item_one_label_are_equal_only_at_the_floor():
    gold = np.resize([0, 1], 120)
    constant = np.zeros((3, 120), int)
    cell = dict(
        seeds=[1, 2, 3], answers=constant, right=(constant == gold).astype(int), gold=gold, labels=BINARY
    )
    groups = list(np.repeat(range(30), 4))
    (claim,) = nli_ft.claims.claims_of("abs(cot - label_only) < 0.1", [("cot", ""), ("label_only", "")])
    cells = {("label_only", ""): cell, ("cot", ""): cell}
    (verdict,) = nli_ft.study_report.judge_checks([claim], {"eval": (cells, groups)})
    assert verdict["outcome"] == "held" and "nothing was learnt that could differ" in verdict["text"]
    assert all(
        "At the floor" in row["verdict"] for row in nli_ft.study_report.arm_rows(cells, groups, "label_only")
    )
    silent = dict(cell, answers=np.full((3, 120), 2), right=0 * constant)
    (row, _) = nli_ft.study_report.arm_rows(dict.fromkeys(cells, silent), groups, "label_only")
    assert row["verdict"].endswith("At the floor: it gives nearly every item the same label, or no label")
    rng = np.random.default_rng(1)
    guessed = rng.integers(0, 2, (3, 120))
    cells[("cot", "")] = dict(cell, answers=guessed, right=(guessed == gold).astype(int))
    (verdict,) = nli_ft.study_report.judge_checks([claim], {"eval": (cells, groups)})
    assert "none of these arms is shown to beat the majority label" in verdict["text"]
    right = np.resize(gold, (3, 120))
    right[:, :4] = 1 - right[:, :4]
    cells[("cot", "")] = dict(cell, answers=right, right=(right == gold).astype(int))
    (verdict,) = nli_ft.study_report.judge_checks([claim], {"eval": (cells, groups)})
    assert "learnt" not in verdict["text"]
