"""Scores over three labels: a table counted by hand, scikit-learn, two labels beside three, and what is undefined."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, classification_report, log_loss, matthews_corrcoef

from nli_ft.process import DataError, RecordError
from nli_ft.files import write_jsonl
from nli_ft.labels import RELATIONS
from nli_ft.rows import sft_row
from nli_ft.check import check_files, render_report
from nli_ft.predictions import counted
from nli_ft.evaluate import accuracy, calibration, merged_rows, score, slices
from nli_ft.reasoning import reasoning
from nli_ft.report import predictions_frame, report, report_text, save_report, side_by_side

E, N, C = RELATIONS
# gold -> how often each label was answered, and how often none
TABLE = {E: {E: 5, N: 2, C: 1, None: 2}, N: {E: 1, N: 4, C: 3, None: 0}, C: {E: 0, N: 2, C: 3, None: 1}}
ORDER = (*RELATIONS, None)


def row(i, gold, answer, probabilities=None, **more):
    "A prediction row of three labels."
    pair = dict(premise=f"Ship {i} is late.", hypothesis=f"A ship is late, number {i}.")
    thought = dict(thought_process=f"It is {gold}.", outcome="truncated" if answer is None else "strict")
    facts = dict(completion="…", n_tokens=9, seconds=0.1, mode="cot")
    if probabilities is not None:
        shares = dict(zip(RELATIONS, map(float, probabilities)))
        facts |= dict(p_entail=shares[E], probabilities=shares)
    return dict(id=i, **pair, label=gold, predicted_label=answer, **thought, **facts, **more)


def rows_of(table):
    "Rows with these counts. The probabilities agree with the answers."
    rng, rows = np.random.default_rng(0), []
    cells = [(gold, answer) for gold in table for answer in ORDER for _ in range(table[gold][answer])]
    for i, (gold, answer) in enumerate(cells):
        shares = sorted(rng.dirichlet([1, 1, 1]))
        at = 0 if answer is None else RELATIONS.index(answer)
        shares = np.roll(shares, at + 1)  # the largest is last: roll it to the place of the answer
        rows.append(row(i, gold, answer, None if answer is None else shares))
    return rows


@pytest.fixture(scope="module")
def rows():
    return rows_of(TABLE)


def test_the_scores_of_a_table_are_those_counted_by_hand(rows):
    s = score(rows)
    assert s["confusion"] == [[5, 2, 1, 2], [1, 4, 3, 0], [0, 2, 3, 1]]
    assert (s["n"], s["right"], s["coverage"]) == (24, 12, 21 / 24)
    assert s["per_class"][E] == dict(precision=5 / 6, recall=5 / 10, f1=10 / 16, n=10)
    assert s["per_class"][N] == dict(precision=4 / 8, recall=4 / 8, f1=8 / 16, n=8)
    assert s["per_class"][C] == dict(precision=3 / 7, recall=3 / 6, f1=6 / 13, n=6)
    assert s["macro_f1"] == pytest.approx((10 / 16 + 8 / 16 + 6 / 13) / 3)
    assert s["balanced_accuracy"] == pytest.approx((5 / 10 + 4 / 8 + 3 / 6) / 3)
    # Gorodkin's coefficient, with no answer as an answer that is never right
    both = 12 * 24 - (10 * 6 + 8 * 8 + 6 * 7)
    spread = math.sqrt(24**2 - (6**2 + 8**2 + 7**2 + 3**2)) * math.sqrt(24**2 - (10**2 + 8**2 + 6**2))
    assert s["mcc"] == pytest.approx(both / spread)
    assert {k: s[k] for k in counted(rows)} == counted(rows)


def test_scores_and_calibration_are_those_of_scikit_learn(rows):
    has = [p for p in rows if p["predicted_label"]]
    gold, answers = [p["label"] for p in has], [p["predicted_label"] for p in has]
    s, c = score(has), calibration(has)
    theirs = classification_report(gold, answers, labels=RELATIONS, output_dict=True)
    for name in RELATIONS:
        assert s["per_class"][name]["f1"] == pytest.approx(theirs[name]["f1-score"])
    assert s["macro_precision"] == pytest.approx(theirs["macro avg"]["precision"])
    assert s["mcc"] == pytest.approx(matthews_corrcoef(gold, answers))
    in_order = sorted(RELATIONS)  # scikit-learn wants columns in the order of the alphabet
    columns = np.array([[p["probabilities"][name] for name in in_order] for p in has])
    assert c["brier"] == pytest.approx(brier_score_loss(gold, columns, labels=in_order))
    assert c["nll"] == pytest.approx(log_loss(gold, columns, labels=in_order))
    assert calibration(rows)["n"] == len(has) and calibration(rows)["brier"] == c["brier"]


def test_the_brier_score_of_three_labels_reaches_two():
    assert calibration([row(1, E, N, (0, 1, 0))])["brier"] == 2
    assert calibration([row(1, E, E, (1, 0, 0))])["brier"] == 0


def test_two_way_scores_merge_the_answers_and_stand_beside(rows):
    r = report(rows)
    assert r["two_way"] == score(merged_rows(rows))
    assert r["two_way"]["confusion"] == [[12, 1, 1], [3, 5, 2]]
    assert r["two_way"]["accuracy"] == 17 / 24
    (line,) = [x for x in report_text(r).splitlines() if x.startswith("as two labels")]
    assert "accuracy 0.708" in line
    two = report(merged_rows(rows))
    assert "two_way" not in two and "as two labels" not in report_text(two)


def test_the_answer_is_kept_and_then_merged():
    unsure = row(1, N, E, (0.4, 0.3, 0.3))
    (merged,) = merged_rows([unsure])
    assert (merged["label"], merged["predicted_label"], merged["answered"]) == (0, 1, E)
    assert calibration([merged])["brier"] == pytest.approx(0.4**2)
    assert merged_rows([merged]) == [merged]


@pytest.mark.parametrize("gold", RELATIONS)
def test_gold_of_one_class_leaves_averages_undefined(gold):
    rows = [row(i, gold, answer) for i, answer in enumerate(ORDER)]
    s = score(rows)
    assert (s["accuracy"], s["macro_f1"], s["balanced_accuracy"], s["mcc"]) == (0.25, None, None, None)
    assert "undefined (one class)" in report_text(report(rows))


def test_a_report_of_three_labels_is_written_whole(rows, tmp_path):
    contents = save_report(tmp_path / "r", rows, extra=dict(mode="cot"))
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == contents
    assert {p.suffix for p in (tmp_path / "r").iterdir()} == {".json", ".png"}


def test_gold_without_one_of_three_labels_has_an_mcc_but_no_averages():
    s = report([p for p in rows_of(TABLE) if p["label"] != N])
    assert s["scores"]["macro_f1"] is None and s["scores"]["mcc"] > 0
    assert s["scores"]["per_class"][N]["recall"] is None
    assert "macro-F1 undefined (no neutral in gold)" in report_text(s)


def test_a_label_that_is_never_answered_has_no_precision():
    s = score([row(i, gold, E) for i, gold in enumerate(RELATIONS)])
    assert s["per_class"][C] == dict(precision=None, recall=0.0, f1=0.0, n=1)
    assert s["mcc"] == 0 and s["macro_precision"] is None


def test_rows_without_probabilities_have_no_calibration():
    c = calibration([row(1, E, E), row(2, N, None)])
    assert c["n"] == 0 and c["brier"] is None
    assert predictions_frame([row(1, E, E)])["confidence"].isna().all()


def test_an_encoder_of_three_labels_is_reported(rows):
    forced = [dict(p, outcome="forced", thought_process=None) for p in rows if p["predicted_label"]]
    text = report_text(report(forced) | dict(mode="encoder"))
    assert "a classifier gives every item a label" in text and "label: contradiction" in text


def test_labels_of_two_sets_are_not_mixed(rows):
    with pytest.raises(DataError, match="all rows need labels of one label set"):
        accuracy([rows[0], dict(rows[1], label=1)])
    with pytest.raises(RecordError, match="merge the three-way rows first"):
        side_by_side(rows, merged_rows(rows))


def test_a_thought_is_held_against_the_word_that_was_answered(rows):
    assert reasoning([row(1, E, E), row(2, N, N), row(3, C, N)])["agreement"] == 2 / 3
    hans = dict(row(4, 0, 0), thought_process="So it must fail.", answered=C)
    assert reasoning([hans])["agreement"] == 1
    assert reasoning([dict(hans, answered=N)])["agreement"] == 0
    assert slices([dict(hans, heuristic="constituent")])["hans"]["constituent, non-entailment"]["n"] == 1


def test_a_file_of_three_labels_is_checked(tmp_path):
    rows = []
    for i in range(30):
        gold = RELATIONS[i % 3]
        rows.append(sft_row(i, f"Ship {i} is late.", f"Is {i}?", f"It is {gold}.", gold, "test", "brief"))
    path = tmp_path / "three.jsonl"
    write_jsonl(path, rows)
    text = render_report(check_files([path], contract="entailment"))
    assert "labels {'entailment': 10, 'neutral': 10, 'contradiction': 10}" in text
    assert "rarest of three labels" in text and "minority label" not in text
