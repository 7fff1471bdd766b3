"""Evaluation by task during the training: the rows are answered as after it, the training does not notice, and the
best checkpoint is the one with the best answers."""

import json
from contextlib import nullcontext
from dataclasses import replace

from swap import swap
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import box_rows, save_model

from nli_ft.process import ConfigError, DataError
from nli_ft.config_loader import config_from_json, config_hash, load_config, print_config
from nli_ft.files import write_jsonl
from nli_ft.labels import RELATIONS
from nli_ft.rows import sft_row
from nli_ft.fit import fit, resume_point
from nli_ft.model import load_base, seeded_lora
from nli_ft.predict import predict_rows
from nli_ft.preflight import metric_rows, preflight, preflight_text, prepare
from nli_ft.ready import _missing_for_fsdp


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A base, training rows, rows with thoughts and rows without to be judged."
    folder = tmp_path_factory.mktemp("made")
    save_model("qwen2", folder / "base")
    rows = box_rows(36)
    write_jsonl(folder / "train.jsonl", rows[:24])
    write_jsonl(folder / "thoughts.jsonl", rows[24:])
    write_jsonl(
        folder / "pairs.jsonl",
        [{k: r[k] for k in ("id", "premise", "hypothesis", "label")} for r in rows[24:]],
    )
    return folder


def config(folder, **changes):
    small = dict(model_id=str(folder / "base"), device="cpu", compute_dtype="fp32", max_train_samples=24)
    pace = dict(max_steps=6, eval_steps=2, save_steps=2, save_total_limit=9, max_eval_samples=None)
    asked = dict(eval_metric="accuracy", max_new_tokens=8, eval_batch_size=8, lora_dropout=0.1)
    places = dict(train_data=str(folder / "train.jsonl"), eval_data=str(folder / "thoughts.jsonl"))
    return load_config("minimal_test", small | pace | asked | places | changes)


def trained(cfg, out, start=None):
    logs, model, prep = [], seeded_lora(load_base(cfg), cfg), prepare(cfg)
    result = fit(prep, model, out, on_log=logs.append, start=start)
    return [l for l in logs if "eval_answered" in l or "eval_loss" in l], model, result, prep


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    assert one.keys() == other.keys() and one
    return all(torch.equal(one[k], other[k]) for k in one)


def answering(monkeypatch, shares):
    "The n-th evaluation gives this share of right answers, whatever the model would say."
    left = iter(shares)

    def answers(model, tok, rows, cfg, progress):
        right, preds = next(left), predict_rows(model, tok, rows, cfg, progress=progress)
        for i, p in enumerate(preds):
            p["predicted_label"] = p["label"] if i < right * len(preds) else 1 - p["label"]
            p["outcome"] = "strict"
        return preds

    swap(monkeypatch, "nli_ft.fit.predict_rows", answers)


# -- the training does not notice


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(compute_dtype="bf16", gradient_checkpointing=True, quantization="none"),
        dict(eval_data="pairs.jsonl"),
    ],
    ids=["nf4", "bf16, checkpointing", "rows without thoughts"],
)
def test_a_training_with_answers_ends_with_the_weights_of_one_without_to_the_last_bit(made, tmp_path, change):
    if "eval_data" in change:
        change = dict(eval_data=str(made / change["eval_data"]))
    plain = trained(config(made, eval_metric="loss", **change), tmp_path / "plain")
    asked, model, result, prep = trained(config(made, **change), tmp_path / "asked")
    assert same(weights(tmp_path / "plain/adapter"), weights(tmp_path / "asked/adapter"))
    assert [l["step"] for l in asked] == [2, 4, 6] and "best" not in result
    losses = [[l.get("eval_loss") for l in logs] for logs in (plain[0], asked)]
    assert losses[0] == losses[1] or (plain[0] == [] and losses[1] == [None] * 3)


@pytest.mark.parametrize("dtype, as_on_a_gpu", [("fp32", False), ("bf16", False), ("bf16", True)])
def test_the_last_evaluation_gives_the_answers_of_the_judging_after_the_training(
    made, tmp_path, monkeypatch, dtype, as_on_a_gpu
):
    if as_on_a_gpu:  # 4-bit products with the adapter beside them
        swap(monkeypatch, "nli_ft.cpu_speed.merged", lambda model, dtype: nullcontext())
    seen = []

    def watched(*a, **kw):
        seen.append(predict_rows(*a, **kw))
        return seen[-1]

    swap(monkeypatch, "nli_ft.fit.predict_rows", watched)
    # at this rate every kind of CPU learns it. At 1e-2 without decay, AVX2 in fp32 wrote no label at the end
    learns = dict(learning_rate=5e-3, lr_scheduler="linear", warmup_ratio=0.0, batch_size=8, max_steps=60)
    wide = dict(target_modules="all-linear", lora_r=32, lora_alpha=64, lora_dropout=0.0, max_new_tokens=24)
    cfg = config(
        made, compute_dtype=dtype, completion="label_only", eval_steps=30, save_steps=60, **learns, **wide
    )
    logs, model, _, prep = trained(cfg, tmp_path / "run")
    after = predict_rows(model, prep.tok, prep.eval_rows, cfg, progress=False)

    def said(preds):
        return [(p["id"], p["completion"], p["p_entail"], p["n_tokens"]) for p in preds]

    assert len(seen) == 2 and said(seen[1]) == said(after) and said(seen[0]) != said(after)
    assert logs[1]["eval_answer_rows"] == len(after) == 12
    right = sum(p["predicted_label"] == p["label"] for p in after)
    assert logs[1]["eval_accuracy"] == right / 12 and logs[1]["eval_answered"] > 0
    assert logs[1]["eval_accuracy_low"] < logs[1]["eval_accuracy"] <= logs[1]["eval_accuracy_high"] + 1e-9


# -- the best checkpoint

EARLY = dict(
    early_stopping_patience=9, learning_rate=0.03, lr_scheduler="constant", warmup_ratio=0.0, max_steps=8
)


def best_of(logs, key, better):
    values = [l[key] for l in logs]
    return logs[values.index(better(values))]["step"]


def test_the_checkpoint_with_the_best_answers_is_kept_where_another_has_the_lowest_loss(
    made, tmp_path, monkeypatch
):
    answering(monkeypatch, [0.25, 0.75, 0.5, 0.75])
    logs, model, result, _ = trained(config(made, **EARLY), tmp_path / "m")
    assert [l["eval_accuracy"] for l in logs] == [0.25, 0.75, 0.5, 0.75]
    assert best_of(logs, "eval_loss", min) == 8 and result["steps"] == 8, "the loss falls to the end"
    assert result["best"] == dict(step=4, accuracy=0.75), "a tie keeps the earlier one"
    assert same(weights(tmp_path / "m/adapter"), weights(tmp_path / "m/checkpoint-4"))
    assert not same(weights(tmp_path / "m/adapter"), weights(tmp_path / "m/checkpoint-8"))


def test_macro_f1_stops_early_and_keeps_its_own_best_checkpoint_and_a_resumed_run_does_the_same(
    made, tmp_path, monkeypatch
):
    cfg, shares = (
        config(made, **EARLY | dict(early_stopping_patience=2, eval_metric="macro_f1")),
        [0.9, 0.5, 0.6],
    )
    answering(monkeypatch, shares + [1.0])
    logs, _, result, _ = trained(cfg, tmp_path / "whole")
    assert result["steps"] == 6 and len(logs) == 3, "two evaluations without progress, and two are allowed"
    assert result["best"] == dict(step=2, macro_f1=logs[0]["eval_macro_f1"])
    assert same(weights(tmp_path / "whole/adapter"), weights(tmp_path / "whole/checkpoint-2"))

    monkeypatch.undo()
    answering(monkeypatch, shares[2:] + [1.0])
    again = cfg.replace(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    _, _, resumed, prep = trained(again, tmp_path / "cut")
    assert resumed["best"] == result["best"] and resumed["steps"] == 6, "half of the patience was used up"
    assert same(weights(tmp_path / "cut/adapter"), weights(tmp_path / "whole/adapter"))

    for changes in (dict(eval_metric="accuracy"), dict(eval_metric="accuracy", allow_changed=True)):
        with pytest.raises(ConfigError, match="eval_metric"):
            resume_point(replace(prep, cfg=again.replace(**changes)))


# -- which rows, and what is refused


def test_more_rows_than_the_file_has_are_all_of_them_and_fewer_are_spread(made):
    cfg = config(made)
    prep = prepare(cfg)
    assert metric_rows(cfg, prep.eval_rows) == prep.eval_rows and len(prep.eval_rows) == 12
    some = [r["id"] for r in metric_rows(cfg.replace(eval_metric_rows=5), prep.eval_rows * 4)]
    assert some == [24, 25, 26, 27, 24], "a block from the start, and one from the middle"
    flight = preflight(prep)
    assert flight["metric"] == dict(name="accuracy", rows=12, evaluations=3, max_new_tokens=8, chooses=False)
    said = preflight_text(preflight(replace(prep, cfg=cfg.replace(early_stopping_patience=1))))
    assert "too high" in said and "too high" not in preflight_text(flight)
    assert "accuracy of 12 generated answers at each of 3 evaluations: 36 answers" in preflight_text(flight)
    assert "metric" not in preflight(prepare(cfg.replace(eval_metric="loss")))


def test_rows_without_thoughts_allow_early_stopping_by_answers_and_rows_of_one_label_no_macro_f1(
    made, tmp_path
):
    pairs = dict(eval_data=str(made / "pairs.jsonl"), early_stopping_patience=1)
    with pytest.raises(DataError, match="take eval_metric=accuracy"):
        prepare(config(made, eval_metric="loss", **pairs))
    assert prepare(config(made, **pairs)).eval == []
    write_jsonl(tmp_path / "ones.jsonl", [r for r in box_rows(36)[24:] if r["label"] == 1])
    ones = dict(eval_data=str(tmp_path / "ones.jsonl"))
    prepare(config(made, **ones))
    with pytest.raises(DataError, match="none of them has the label 0: macro F1 is undefined"):
        prepare(config(made, eval_metric="macro_f1", **ones))


def test_a_model_in_pieces_is_refused_before_anything_starts(made, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = [l for l in _missing_for_fsdp(config(made)) if "eval_metric" in l]
    assert len(said) == 1 and "Use eval_metric=loss" in said[0]
    assert not any("eval_metric" in l for l in _missing_for_fsdp(config(made, eval_metric="loss")))


def test_the_metric_counts_as_a_result_where_it_chooses_the_checkpoint(made):
    free, early = config(made), config(made, early_stopping_patience=1)
    assert config_hash(free) == config_hash(free.replace(eval_metric="loss", eval_metric_rows=7))
    assert config_hash(early) != config_hash(early.replace(eval_metric="loss"))
    assert config_hash(early) != config_hash(early.replace(eval_metric_rows=7))
    old = json.loads(print_config(free))
    for key in ("eval_metric", "eval_metric_rows"):
        del old["config"][key]
        old["changed_from_default"].pop(key, None)
    assert config_from_json(json.dumps(old)).eval_metric == "loss"


# -- three labels


def test_three_labels_are_answered_and_scored_during_the_training_too(made, tmp_path, monkeypatch):
    rows = []
    for i, row in enumerate(box_rows(24)):
        relation = RELATIONS[i % 3]
        premise, hypothesis = f"{row['premise']} It is number {i}.", f"{row['hypothesis']} {relation[0]}"
        pair = dict(id=i, premise=premise, hypothesis=hypothesis, relation=relation, contract="entailment")
        rows.append(pair | dict(label=int(relation == "entailment")))
    sft = [
        sft_row(
            r["id"], r["premise"], r["hypothesis"], "I think.", r["relation"], "test", "brief",
            relation=r["relation"], contract="entailment",
        )
        for r in rows[:12]
    ]  # fmt: skip
    write_jsonl(tmp_path / "train.jsonl", sft)
    write_jsonl(tmp_path / "eval.jsonl", rows[12:])
    files = dict(train_data=str(tmp_path / "train.jsonl"), eval_data=str(tmp_path / "eval.jsonl"))
    three = dict(label_set="three_way", completion="label_only", eval_metric="macro_f1", max_new_tokens=24)
    cfg = config(made, max_steps=2, early_stopping_patience=1, **three, **files)
    logs, model, result, prep = trained(cfg, tmp_path / "m")
    assert {r["label"] for r in metric_rows(cfg, prep.eval_rows)} == set(RELATIONS)
    assert logs[0]["eval_answer_rows"] == 12 and 0 <= logs[0]["eval_macro_f1"] <= 1
    assert result["best"] == dict(step=2, macro_f1=logs[0]["eval_macro_f1"])
