"""What `nli_compare`, tables, plots and model cards say about runs and configs. The records are in a project of their
own, and the commands run in this process."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import nli_ft.card
import nli_ft.compare
import nli_ft.differences
import nli_ft.evaluate
import nli_ft.records
import nli_ft.report
import nli_ft.seeds
from nli_ft.config_loader import load_config

ROOT = Path(__file__).resolve().parents[1]


def row(i, label, said, group):
    completion = json.dumps(dict(thought_process="so", predicted_label=said))
    return dict(
        id=i,
        premise=f"p {group}",
        hypothesis=f"h {i}",
        label=label,
        predicted_label=said,
        outcome="strict",
        repairs=[],
        completion=completion,
        thought_process="so",
        p_entail=0.5,
        n_tokens=9,
        finish="stop",
        seconds=0.1,
        mode="cot",
        prompt_hash="x",
        group_id=group,
    )


def record(
    right=lambda i: i % 4 > 0,
    config="minimal_test",
    overrides="",
    seed=42,
    n=60,
    size=2,
    label=lambda i: i % 2,
):
    "A finished record. Item i has this label and is answered right or wrong. `size` items form a group."
    run = nli_ft.records.start_run(load_config(config, overrides).replace(seed=seed))
    gold = [label(i) for i in range(n)]
    rows = [row(i, y, y if right(i) else 1 - y, i // size) for i, y in enumerate(gold)]
    (run / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    nli_ft.records.append_metrics(run, {"step": 1, "loss": 1.0})
    nli_ft.records.finish_run(run, after=nli_ft.evaluate.score(rows))
    return run


def compare(capsys, *args):
    "What `nli_compare` prints. It must end with exit code 0."
    assert nli_ft.compare.compare_cli([str(a) for a in args]) == 0
    return capsys.readouterr().out


def test_mcnemars_p_is_printed_and_the_clusters_decide(project):
    for size, told in (
        (2, True),
        (6, True),
        (10, None),
        (60, None),
    ):  # 30, 10, 6 and 1 clusters of the same 60 items
        _, r = nli_ft.differences.compare_runs(
            [record(lambda i: i % 2 == 0, size=size), record(lambda i: True, size=size, seed=1)]
        )
        assert r["p_mcnemar"] == pytest.approx(2 / 2**30) and r["n_clusters"] == 60 / size
        assert r["p"] == pytest.approx(2 / 2 ** (60 / size)) and r["told"] is told
        if told is None:
            assert (
                r["verdict"].startswith("+50.0 points: no verdict at n=60 (")
                and "at least 10 such clusters" in r["verdict"]
            )


def test_a_single_run_is_never_worded_as_a_config(project, capsys):
    a, b = record(), record(lambda i: True, "cpu_demo")
    out = compare(capsys, a, b)
    assert (
        f"run {nli_ft.records.read_run(b).name} against run {nli_ft.records.read_run(a).name}, on "
        "these items: +25.0 points: can be told from noise at n=60 (30 clusters)" in out
    )
    said = next(
        line for line in out.splitlines() if line.startswith("config cpu_demo against config minimal_test")
    )
    assert "no verdict on the config" in said and "can be told" not in said
    assert "minimal_test and cpu_demo have one seed, and at least 2 are needed in each trained arm" in said
    assert "`nli_run --config minimal_test --seeds 1,2` and `nli_run --config cpu_demo --seeds 1,2`" in said


def test_a_config_file_of_ones_own_with_one_seed_is_compared_and_named_by_its_path(project, capsys):
    Path("mine.py").write_text('base = "minimal_test"\nlora_r = 4\n')
    out = compare(capsys, record(), record(lambda i: True, "./mine.py"))
    assert "config mine against config minimal_test" in out and "no verdict on the config" in out
    assert "`nli_run --config minimal_test --seeds 1,2` and `nli_run --config mine.py --seeds 1,2`" in out


def test_three_seeds_against_one_give_no_verdict_on_the_config(project, capsys):
    three = [record(lambda i: i % 5 > s % 3, seed=s) for s in (1, 2, 3)]
    one = record(lambda i: True, overrides="lora_r=4", seed=1)
    first, r = nli_ft.seeds.compare_configs([*three, one])
    assert r["told"] is None is r["ci"] is r["accuracy_ci"] and first["accuracy_ci"]
    assert (
        "minimal_test has one seed" in r["verdict"]
        and "`nli_run --config minimal_test --lora_r=4 --seeds 2,3`" in r["verdict"]
    )
    assert "no verdict on the config" in compare(capsys, *three, one)


def test_three_seeds_against_the_untrained_model_give_one(project):
    three = [record(lambda i: i % 5 > 0 or i % 3 == s, seed=s) for s in (0, 1, 2)]
    for run in three:
        shutil.copy(
            record(lambda i: i % 3 == 1, seed=9) / "predictions.jsonl", run / "predictions_before.jsonl"
        )
    _, r = nli_ft.seeds.compare_configs([f"{three[0]}:before", *three])
    assert r["told"] and "over 1 and 3 seeds" in r["verdict"]


def test_the_majority_line_stands_in_every_comparison_and_format(project, capsys):
    runs = [
        record(lambda i: (i + s) % 5 > 0, overrides=f"lora_r={r}", seed=s) for s in (1, 2) for r in (2, 4)
    ]
    assert compare(capsys, *runs, "--out", "t.md").count("majority label (0)") == 2  # by config and by run
    assert (project / "t.md").read_text().count("| majority label (0) |") == 2
    compare(capsys, *runs, "--out", "t.csv")
    numbers = pd.read_csv(project / "t.csv").set_index(["table", "name"])
    for table in ("configs", "runs"):
        assert numbers.loc[(table, "majority label (0)"), "accuracy"] == 0.5
    arms = ["minimal_test [lora_r=2]", "minimal_test [lora_r=4]"]  # and not the config's name twice
    assert list(numbers.loc["configs"].index[:2]) == arms
    assert sorted(numbers.loc["runs"].index[:4]) == [f"{arm} s{seed}" for arm in arms for seed in (1, 2)]
    said = json.loads(compare(capsys, *runs, "--json"))
    assert said["runs"][0]["majority"]["accuracy"] == 0.5 == said["configs"][0]["majority"]["accuracy"]


def test_a_gain_in_accuracy_that_is_a_loss_on_the_rare_class_is_said(project):
    def rare(i):
        return int(i >= 50)  # 10 items of 60

    def fair(i):
        return i >= 50 or i % 4 > 0

    for seeds in ((1,), (1, 2)):
        arms = [
            record(right, overrides=f"lora_r={r}", seed=s, label=rare)
            for r, right in ((2, fair), (4, lambda i: i < 50))
            for s in seeds
        ]
        _, r = nli_ft.differences.compare_runs([arms[0], arms[-1]])
        assert (
            r["difference"] > 0
            and "; but the other way by macro-F1 -" in r["verdict"]
            and " and MCC -" in r["verdict"]
        )
    row = nli_ft.seeds._config_row(
        [(nli_ft.records.read_run(a), nli_ft.records.read_run(a).predictions(), "x") for a in arms[:2]]
    )
    assert row["macro_f1"] == pytest.approx(
        nli_ft.evaluate.score(nli_ft.records.read_run(arms[0]).predictions())["macro_f1"]
    )


def test_a_verdict_on_configs_says_the_other_way_too(project):
    def rare(i):
        return int(i >= 50)

    fair = [record(lambda i: i >= 50 or i % 4 != s, overrides="lora_r=2", seed=s, label=rare) for s in (0, 1)]
    lazy = [record(lambda i: i < 50 - s, overrides="lora_r=4", seed=s, label=rare) for s in (0, 1)]
    _, r = nli_ft.seeds.compare_configs([*fair, *lazy])
    assert r["difference"] > 0 and "but the other way by macro-F1 -" in r["verdict"]


def test_gold_of_one_class_breaks_no_table_card_or_plot(project, capsys):
    runs = [
        record(lambda i: i != s, overrides=f"lora_r={r}", seed=s, label=lambda i: 0)
        for s in (1, 2)
        for r in (2, 4)
    ]
    assert "undefined" in compare(capsys, *runs, "--out", "t.md")
    for form in ("json", "csv"):
        compare(capsys, *runs, "--out", f"t.{form}")
    assert "| MCC | undefined (one class) |" in nli_ft.card.model_card(runs[0])
    rows, by, _ = nli_ft.compare.full_comparison(runs)
    for shown in (rows, by):
        nli_ft.compare.plot_differences(shown).canvas.draw()
    assert rows[0]["mcc"] is None is by[0]["macro_f1"]
    nli_ft.report.save_report(project / "report", nli_ft.records.read_run(runs[0]).predictions())
    assert json.loads((project / "report/report.json").read_text())["scores"]["macro_f1"] is None


def test_the_plot_is_blue_where_told_and_hollow_where_there_is_no_verdict(project):
    for size, colors in ((2, [False, True]), (20, [False, False])):
        rows = nli_ft.differences.compare_runs(
            [
                record(size=size),
                record(lambda i: True, seed=1, size=size),
                record(lambda i: (i + 1) % 4 > 0, seed=2, size=size),
            ]
        )
        points = [
            line for line in nli_ft.compare.plot_differences(rows).axes[0].lines if line.get_marker() == "o"
        ]
        assert [line.get_color() == nli_ft.report.BLUE for line in points] == colors
        assert [line.get_markerfacecolor() == "white" for line in points] == [size == 20] * 2


def test_the_committed_record_opens_and_compares(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = min((ROOT / "runs/cpu_demo").iterdir())
    out = compare(capsys, f"{run}:before", run)
    assert " clusters)" in out and "majority label (" in out
