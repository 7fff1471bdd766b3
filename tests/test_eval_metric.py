"""Evaluation by task during the training: the rows are answered as after it, the training does not notice, and the
best checkpoint is the one with the best answers."""

import json
from dataclasses import replace

from swap import swap
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import box_rows, save_model

from nli_ft.process import ConfigError, DataError
from nli_ft.config_loader import config_from_json, config_hash, load_config, print_config
from nli_ft.files import write_jsonl
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
        folder / "pairs.jsonl", [{k: r[k] for k in ("id", "premise", "hypothesis", "label")} for r in rows[24:]]
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_last_evaluation_gives_the_answers_of_the_judging_after_the_training(made, tmp_path, monkeypatch, dtype):
    seen = []

    def watched(*a, **kw):
        seen.append(predict_rows(*a, **kw))
        return seen[-1]

    swap(monkeypatch, "nli_ft.fit.predict_rows", watched)
    cfg = config(made, compute_dtype=dtype, completion="label_only", learning_rate=3e-2, max_steps=12, eval_steps=6)
    logs, model, _, prep = trained(cfg, tmp_path / "run")
    after = predict_rows(model, prep.tok, prep.eval_rows, cfg, progress=False)

    def said(preds):
        return [(p["id"], p["completion"], p["p_entail"], p["n_tokens"]) for p in preds]

    assert len(seen) == 2 and said(seen[1]) == said(after) and said(seen[0]) != said(after)
    assert logs[1]["eval_answer_rows"] == len(after) == 12
    right = sum(p["predicted_label"] == p["label"] for p in after)
    assert logs[1]["eval_accuracy"] == right / 12 and logs[1]["eval_answered"] > 0
    assert logs[1]["eval_accuracy_low"] <= logs[1]["eval_accuracy"] <= logs[1]["eval_accuracy_high"]
