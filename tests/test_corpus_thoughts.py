"False thoughts for rows of the corpus, and the check of every step of a written one."

import json, re
from collections import Counter
from functools import cache
from random import Random

import pytest

from nli_ft.ask import evaluation_rows
from nli_ft.config_loader import load_config
from nli_ft.corpus_thoughts import (
    count_validity,
    split_steps,
    supports,
    thought_steps,
    thought_validity,
    wrong_thought,
)
from nli_ft.files import write_jsonl
from nli_ft.labels import BINARY, THREE_WAY
from nli_ft.lexicon import draw
from nli_ft.meanings import normal
from nli_ft.process import DataError, project_root
from nli_ft.quadruples import (
    CATEGORIES,
    VARIANT_CATEGORIES,
    Quad,
    explained,
    generate,
    quad_rows,
    three_way_thought,
)
from nli_ft.report import report, report_text

VERDICT = re.compile(r", so .*?(must hold|may hold or may fail|may fail|must fail)\.$")


@cache
def demo():
    return [r for rows in generate("demo").values() for r in rows]


def made(category, variant, labels, n=12):
    "Rows of random pairs of sentences. A whole corpus would take half a minute to make."
    rng, rows = Random(f"{category}/{variant}"), []
    premises, hypotheses = CATEGORIES[category].says(variant)
    while len(rows) < n:
        p, h = rng.choice(premises), rng.choice(hypotheses)
        relation = CATEGORIES[category].rule(normal(p.form), normal(h.form))
        if thought := explained(category, (p, h), relation, variant):
            thought = three_way_thought(thought, relation) if labels is THREE_WAY else thought
            group = Quad(((p, h, relation, thought),), ())
            head = dict(category=category, group_id=f"{variant}-{category}-{len(rows)}")
            rows += quad_rows(group, draw(category, "test", rng), head, "brief", labels)
    return rows


@cache
def rows_of(labels):
    "Some rows of every category in every variant of its wordings."
    out = []
    for variant, categories in VARIANT_CATEGORIES.items():
        for category in categories:
            if variant not in ("ranks", "direction"):  # these have the wordings of `plain`
                out += made(category, variant, labels)
    return out


@pytest.mark.parametrize("labels", [BINARY, THREE_WAY], ids=lambda labels: labels.name)
def test_a_false_thought_is_false_fluent_and_closes_with_the_verdict_of_its_row(labels):
    for r in rows_of(labels):
        text, true = wrong_thought(r, 0), r["thought_process"]
        *body, last = thought_steps(r, text)
        assert "wrong" in {verdict for _, verdict in body} and last[1] == "right", (r["id"], text)
        assert VERDICT.search(text)[0] == VERDICT.search(true)[0], (r["id"], text)
        assert len(split_steps(text)) == len(split_steps(true)), (r["id"], text)
        assert abs(len(text.split()) - len(true.split())) <= 4, (r["id"], true, text)
        assert text[0].isupper() and text.endswith(".") and not re.search(r"[{}]|\ba [aeiou]", text), text


def clauses(thought):
    "Who is more than whom, or did it to whom, in premise and hypothesis. It reads the demo and nothing else."
    found = re.findall(r"says (\w+) (is \w+ than|\w+) (\w+)", thought)
    return [(one, other) for one, _, other in found]


def test_an_independent_reader_finds_the_false_clause_of_a_demo_thought():
    for r in demo():
        true, false = clauses(r["thought_process"]), clauses(wrong_thought(r, 3))
        assert len(true) == len(false) == 2 and true != false
        assert {*true[0]} == {*false[0]}  # the same two people


def test_what_a_false_demo_thought_argues_for_says_nothing_about_the_label():
    for category in ("role_swap", "comparatives"):
        count = Counter()
        for r in demo():
            if r["category"] == category:
                count[": same" in wrong_thought(r, 0), r["label"]] += 1
        assert all(abs(count[True, y] / (count[True, y] + count[False, y]) - 0.5) < 0.1 for y in (0, 1)), (
            count
        )


def test_the_id_of_a_row_and_the_seed_decide_which_false_thought_it_gets():
    rows = rows_of(BINARY)[:60]
    assert [wrong_thought(r, 1) for r in rows] == [wrong_thought(dict(r), 1) for r in rows[::-1]][::-1]
    changed = sum(wrong_thought(r, 1) != wrong_thought(r, 2) for r in rows)
    assert changed > len(rows) / 2


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(category=None), "its category is None"),
        (dict(category="riddles"), "its category is 'riddles'"),
        (dict(meaning=None), r"\w+ has no meaning None"),
        (dict(meaning='[["did", "a", "b"]]'), r"\w+ has no meaning"),
        (dict(premise="Nobody came."), "its sentences do not say what its meaning is"),
        (dict(label=7), "its label is 7, and its meanings say"),
        (dict(thought_process="It follows."), "its thought is not the one that the rule writes"),
    ],
)
def test_a_row_that_is_none_of_the_corpus_is_refused_by_name(change, message):
    row = demo()[0]
    with pytest.raises(DataError, match=f"row '{row['id']}' is no row of the corpus: {message}"):
        wrong_thought(row | change, 0)


def test_the_enumerator_decides_what_a_clause_that_nobody_cited_is_worth():
    chain = ("and", ("more", "a", "b"), ("more", "b", "c"))
    assert supports("comparatives", chain, ("more", "a", "c"))
    assert not supports("comparatives", chain, ("more", "c", "a"))


@pytest.mark.parametrize("labels", [BINARY, THREE_WAY], ids=lambda labels: labels.name)
def test_only_the_thought_of_its_own_row_is_right(labels):
    rng, rows = Random(0), rows_of(labels)
    for r, other in zip(rows, rows[1:]):
        own = r["thought_process"]
        assert thought_validity(r, own) == "right", (r["id"], thought_steps(r, own))
        assert thought_validity(r, own.lower()) == "right"
        assert thought_validity(r, wrong_thought(r, 5)) == "wrong"
        words = own.split()
        permuted = " ".join(rng.sample(words, len(words)))
        assert permuted == own or thought_validity(r, permuted) != "right", permuted
        theirs = other["thought_process"]
        says_the_same = split_steps(theirs.lower()) == split_steps(own.lower())
        assert says_the_same or r["label"] != other["label"] or thought_validity(r, theirs) != "right"
        assert thought_validity(r, own.rpartition(", so ")[0] + ".") == "unknown"  # no verdict


@pytest.mark.parametrize("relation,right", [("entailment", 1), ("neutral", 2), ("contradiction", 1)])
def test_a_verdict_has_to_say_what_the_relation_is(relation, right):
    row = next(r for r in rows_of(BINARY) if r["relation"] == relation)
    closes = ["must hold", "may fail", "may hold or may fail", "must fail"]
    verdicts = {close: thought_steps(row, f"so it {close}.")[0][1] for close in closes}
    assert Counter(verdicts.values())["right"] == right, verdicts
    assert (
        verdicts["may fail"] == dict(entailment="wrong", neutral="right", contradiction="unknown")[relation]
    )


def record_and_rows():
    "The predictions of the committed run, and the rows that were asked."
    folder = project_root() / "runs" / "cpu_demo" / "20261126-095322-s42-e8b84932"
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], generate("demo")["dev"]


def test_a_report_says_what_thoughts_are_worth_and_nothing_else_of_it_changes():
    preds, rows = record_and_rows()
    bare, full = report(preds), report(preds, rows=rows)
    validity = full.pop("thought_validity")
    assert json.dumps(full) == json.dumps(bare) and list(full) == list(bare)
    assert validity["n"] == len(preds) and validity["unchecked"] == 0
    cells = [n for side in validity["counts"].values() for n in side.values()]
    assert sum(cells) == len(preds)
    text = report_text(full | dict(thought_validity=validity))
    assert "right label by a right thought" in text and "thought right" in text
    assert "thought right" not in report_text(bare)


def test_rows_without_a_meaning_get_no_such_key_and_one_that_cannot_be_read_is_counted():
    preds, rows = record_and_rows()
    others = [{k: v for k, v in r.items() if k != "meaning"} for r in rows]
    assert "thought_validity" not in report(preds, rows=others)
    assert count_validity([p | dict(thought_process=None) for p in preds], rows) is None
    broken = [rows[0] | dict(premise="Nobody came."), *rows[1:]]
    assert count_validity(preds, broken)["unchecked"] == sum(p["id"] == rows[0]["id"] for p in preds)


def test_the_rows_of_an_evaluation_keep_their_meanings(tmp_path):
    write_jsonl(tmp_path / "dev.jsonl", generate("demo")["dev"][:8])
    rows = evaluation_rows(tmp_path / "dev.jsonl", load_config("cpu_demo"), "brief")
    assert [thought_validity(r, r["thought_process"]) for r in rows] == ["right"] * 8
