"""Three labels from the file to the record: rows, mask, training, answers, probabilities, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nli_ft.process import DataError, RecordError
from nli_ft.config_loader import load_config
from nli_ft.files import write_jsonl
from nli_ft.labels import BINARY, RELATIONS, THREE_WAY
from nli_ft.rows import in_label_set, sft_row, template_of
from nli_ft.prompt import LABEL
from nli_ft.preflight import prepare, preflight, preflight_text, proofs
from nli_ft.predictions import check_predictions, read_predictions
from nli_ft.public_sets import unfold_pair
from nli_ft.fit import changed_facts
from nli_ft.ask import evaluate_run, evaluation_rows
from nli_ft.records import looks, read_run
from nli_ft.train_sft import run_training

PLACES = "garden harbour kitchen library market museum".split()
ENDINGS = dict(
    entailment="Somebody is in the {}.", neutral="A child is in the {}.", contradiction="Nobody is in the {}."
)


def pairs(two_way=False):
    "Pairs with their relation. Two-way sets know no more than `non-entailment`."
    rows = []
    for i, place in enumerate(PLACES * 3):
        relation = RELATIONS[i // len(PLACES)]
        label = int(relation == "entailment")
        if two_way and not label:
            relation = "non-entailment"
        hypothesis = ENDINGS[RELATIONS[i // len(PLACES)]].format(place)
        pair = dict(premise=f"A person is in the {place} number {i}.", hypothesis=hypothesis)
        contract = "binary" if two_way else "entailment"
        rows.append(dict(id=f"p{i}", **pair, label=label, relation=relation, contract=contract))
    return rows


def training_file(path, label_set=BINARY):
    "SFT rows on disk, in either label set."
    rows = []
    for r in pairs():
        row = sft_row(
            r["id"], "Once, " + r["premise"], r["hypothesis"], "I think.", r["label"], "test", "brief",
            relation=r["relation"], contract="entailment",
        )  # fmt: skip
        rows.append(in_label_set(row, label_set))
    write_jsonl(path, rows)
    return str(path)


def config(tmp_path, **kw):
    rows, train = tmp_path / "pairs.jsonl", tmp_path / "train.jsonl"
    if not rows.exists():
        write_jsonl(rows, pairs())
        training_file(train)
    tiny = dict(
        model_id="tiny-mistral", device="cpu", compute_dtype="fp32", lora_dropout=0.0, max_steps=2,
        label_set="three_way", completion="label_only", max_new_tokens=8, eval_before=False, max_eval_samples=18,
        train_data=str(train), eval_data=str(rows),
        output_dir=str(tmp_path / "models"), runs_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    return load_config("minimal_test", tiny | kw)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Path(run_training(config(tmp_path_factory.mktemp("three"))))


# -- rows and masks


@pytest.mark.parametrize("on_disk", [BINARY, THREE_WAY])
@pytest.mark.parametrize("asked", [BINARY, THREE_WAY])
def test_rows_of_either_label_set_are_trained_in_the_set_of_the_config(tmp_path, on_disk, asked):
    train = training_file(tmp_path / "t.jsonl", on_disk)
    prep = prepare(config(tmp_path, train_data=train, label_set=asked.name))
    assert all(asked.holds(r["label"]) for r in prep.train_rows + prep.eval_rows)
    assert template_of(prep.train_rows) == template_of(prep.eval_rows) == "brief"
    answers = [json.loads(r["completion"][0]["content"])["predicted_label"] for r in prep.train_rows]
    assert answers == [r["label"] for r in prep.train_rows]
    words = {r["prompt"][0]["content"] for r in prep.train_rows}
    assert len(words) == 1 and ("neutral" in words.pop()) == (asked is THREE_WAY)


def test_every_token_of_the_word_counts_as_label_and_the_proofs_hold(tmp_path):
    prep = prepare(config(tmp_path))
    for row, enc in zip(prep.train_rows, prep.train):
        ids = [i for i, k in zip(enc.input_ids, enc.kind) if k == LABEL]
        assert prep.tok.decode(ids).strip(' ",}') == row["label"]
    flight = preflight(prep)
    assert flight["ok"] and flight["labels"] == dict.fromkeys(RELATIONS, 6)
    assert "6 entailment, 6 neutral, 6 contradiction" in preflight_text(flight)


def test_a_row_without_its_relation_is_refused_by_name(tmp_path):
    rows = [{k: v for k, v in r.items() if k != "relation"} for r in pairs()]
    write_jsonl(tmp_path / "bare.jsonl", rows)
    with pytest.raises(DataError, match="row 'p0' has label 1 and no relation: label_set=three_way needs"):
        prepare(config(tmp_path, eval_data=str(tmp_path / "bare.jsonl")))


def test_words_need_no_contract_where_three_labels_are_asked_for(tmp_path):
    rows = [dict(premise=r["premise"], hypothesis=r["hypothesis"], label=r["relation"]) for r in pairs()]
    write_jsonl(tmp_path / "words.jsonl", rows)
    words = str(tmp_path / "words.jsonl")
    assert {r["label"] for r in prepare(config(tmp_path, eval_data=words)).eval_rows} == set(RELATIONS)
    with pytest.raises(DataError, match="name a contract"):
        prepare(config(tmp_path, eval_data=words, label_set="binary"))
    two = config(tmp_path, eval_data=words, label_set="binary", contract="entailment")
    assert {r["label"] for r in prepare(two).eval_rows} == {0, 1}


# -- a run


def test_a_three_way_run_leaves_a_whole_record(run):
    record = read_run(run)
    preds = record.predictions()
    assert record.status == "done" and record.cfg.label_set == "three_way"
    assert {p["label"] for p in preds} <= set(RELATIONS)
    assert record.summary["after"]["n"] == len(preds)
    assert set(record.summary["after"]["per_class"]) == set(RELATIONS)
    assert len(record.summary["after"]["confusion"]) == 3
    assert record.checks()


def test_forced_answers_have_three_probabilities_that_sum_to_one(run):
    evaluate_run(run, mode="forced")
    (folder,) = (run / "evaluations").glob("pairs-*-forced")
    preds = [json.loads(line) for line in open(folder / "predictions.jsonl")]
    for p in preds:
        assert sum(p["probabilities"].values()) == pytest.approx(1)
        assert p["predicted_label"] == max(RELATIONS, key=p["probabilities"].get)
        assert p["p_entail"] == p["probabilities"]["entailment"]
    path = folder / "predictions.jsonl"
    preds[0]["predicted_label"] = next(r for r in RELATIONS if r != preds[0]["predicted_label"])
    path.write_text("".join(json.dumps(p) + "\n" for p in preds))
    with pytest.raises(RecordError, match="is not what"):
        evaluate_run(run, mode="forced")


def test_a_set_with_two_way_gold_is_answered_three_way_and_scored_two_way(run, tmp_path):
    write_jsonl(tmp_path / "hans.jsonl", [dict(r, heuristic="lexical_overlap") for r in pairs(two_way=True)])
    report, folder, _ = evaluate_run(run, mode="forced", data=tmp_path / "hans.jsonl")
    preds = [json.loads(line) for line in open(folder / "predictions.jsonl")]
    assert {p["label"] for p in preds} == {0, 1}
    for p in preds:
        assert p["answered"] in RELATIONS
        assert p["predicted_label"] == int(p["answered"] == "entailment")
    assert set(report["scores"]["per_class"]) == {"0", "1"}
    assert "lexical_overlap, non-entailment" in report["slices"]["hans"]


def test_three_way_votes_keep_their_shares(run):
    _, folder, _ = evaluate_run(run, mode="vote:2", max_eval_samples=3)
    for line in open(folder / "predictions.jsonl"):
        p = json.loads(line)
        assert len(p["votes"]) == 2 and set(p["votes"]) <= {*RELATIONS, None}


# -- what a reader of the whole change found


def test_votes_of_another_label_set_are_refused():
    row = dict(id=1, label=1, predicted_label=1, outcome="strict", mode="vote:2")
    assert check_predictions([dict(row, votes=[1, None])])
    for votes in (["entailment"], [5], [[1]], "1"):
        with pytest.raises(RecordError, match="has votes"):
            check_predictions([dict(row, votes=votes)])


def test_a_two_way_file_is_recognised_by_all_its_rows_and_not_by_a_sample(tmp_path):
    write_jsonl(tmp_path / "hans.jsonl", pairs(two_way=True))  # the entailed rows come first
    for n in (3, 18):
        cfg = config(tmp_path, max_eval_samples=n)
        rows = evaluation_rows(tmp_path / "hans.jsonl", cfg, "brief")
        assert {type(r["label"]) for r in rows} == {int} and len(rows) == n


def test_a_resumed_run_is_told_of_a_young_key_that_went_back_to_its_default():
    old, young = dict(config={}), dict(config=dict(eval_metric_rows=100, contract="course"))
    assert changed_facts(old, old) == []
    assert "eval_metric_rows: 200 in the checkpoint, 100 now" in changed_facts(old, young)
    assert 'contract: "course" in the checkpoint, null now' in changed_facts(young, old)


def test_a_text_with_several_pairs_is_no_pair():
    columns = dict(pair="input", label="output")
    text = "Premise: A dog runs.\nHypothesis: An animal runs."
    assert unfold_pair(dict(input=text, output="entailment"), columns)["premise"] == "A dog runs."
    with pytest.raises(ValueError, match="2 pairs of lines"):
        unfold_pair(dict(input=f"{text}\n{text}", output="entailment"), columns)


def test_evaluations_of_other_models_count_as_looks_at_a_file(tmp_path):
    folder = tmp_path / "evaluations" / "theirs" / "20261126-095322-s42-aaaaaaaa"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(dict(data=dict(sha256="ab" * 32))))
    assert looks("ab" * 32, tmp_path) == {}
    (folder / "predictions.jsonl").write_text("")
    assert looks("ab" * 32, tmp_path) == {"evaluations/theirs": 1}


# -- two tasks in a row


@pytest.mark.parametrize("label_set", ["binary", "three_way"])
def test_an_auxiliary_run_is_proved_for_both_tasks_and_judged_as_label_only(tmp_path, label_set):
    cfg = config(tmp_path, label_set=label_set, completion="auxiliary", eval_before=True, max_eval_samples=4)
    prep, twin = prepare(cfg), prepare(cfg.replace(completion="label_only"))
    assert prep.eval == twin.eval and prep.eval_rows == twin.eval_rows
    flight = preflight(prep)
    assert flight["ok"] and all("both tasks" in p["detail"] for p in flight["proofs"].values())
    assert "the label task has 0.5 of the loss" in preflight_text(flight)

    run = Path(run_training(cfg))
    record, names = read_run(run), ("predictions", "predictions_before", "predictions_before_forced")
    assert record.status == "done" and "label_only completions" in (run / "MODEL_CARD.md").read_text()
    for name in names:
        preds = read_predictions(run / f"{name}.jsonl")  # reads each completion again
        assert len(preds) == 4 and not any(p["thought_process"] for p in preds)
    assert {p["outcome"] for p in preds} == {"forced"}


def test_a_mistake_in_the_rationale_task_fails_its_proofs(tmp_path):
    prep = prepare(config(tmp_path, completion="auxiliary"))
    rationale = prep.train[1].rationale
    prep.train[1] = replace(
        prep.train[1], rationale=replace(rationale, labels=[*rationale.labels[:-1], -100])
    )
    other = prep.train[3].rationale  # of another row, and a token is missing
    other = replace(other, input_ids=other.input_ids[:-2] + other.input_ids[-1:])
    prep.train[2] = replace(prep.train[2], rationale=other)
    told = {name: detail for name, (holds, detail) in proofs(prep).items() if not holds}
    ends, spells, asks = "the end of turn is learned", "trained tokens spell", "training prompt ids"
    assert [any(name.startswith(start) for name in told) for start in (ends, spells, asks)] == [True] * 3
    assert told[ends] == "1 of 18 rows, first: row 'p1'"


def test_a_row_without_a_thought_has_no_rationale_task(tmp_path):
    cfg = config(tmp_path, completion="auxiliary", too_long="refuse")
    rows = [json.loads(line) for line in cfg.path("train_data").read_text().splitlines()]
    del rows[4]["thought_process"]
    rows[4]["completion"][0]["content"] = json.dumps(dict(predicted_label=rows[4]["label"]))
    write_jsonl(cfg.path("train_data"), rows, overwrite=True)
    with pytest.raises(DataError, match="row 'p4': the row has no thought_process"):
        prepare(cfg)
