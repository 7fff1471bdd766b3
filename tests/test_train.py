"""Training: the mathematics against plain references, the entrances (kernel, script, several processes), and what
stops a run before it starts."""

import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

from swap import swap
import pytest
import torch

from nli_ft.process import DataError, project_root
from nli_ft.config_loader import load_config
from nli_ft.files import write_jsonl
from nli_ft.cpu_speed import dequantised_once
from nli_ft.model import load_base, seeded_lora
from nli_ft.trainer import _for_scoring, fused_log_probs, is_exact, make_trainer_class
from nli_ft.ready import check_ready
from nli_ft.fit import fit, resume_facts, to_dataset, training_args
from nli_ft.prompt import loss_tokens, sequences
from nli_ft.preflight import preflight, preflight_text, prepare, proofs, refuse_failed_proofs, step_counts

root = project_root()
# fp32 and no dropout: what is compared here is arithmetic
TINY = dict(
    model_id="tiny-mistral",
    device="cpu",
    compute_dtype="fp32",
    lora_dropout=0.0,
    learning_rate=1e-2,
    logging_steps=1,
)


def tiny(tmp_path, **kw):
    cfg = load_config(
        "minimal_test", TINY | dict(output_dir=str(tmp_path / "models"), runs_dir=str(tmp_path / "runs")) | kw
    )
    check_ready(cfg)
    return cfg


def trained(cfg, out):
    logs, model = [], seeded_lora(load_base(cfg), cfg)
    result = fit(prepare(cfg), model, out, on_log=logs.append)
    return logs, model, result


def adapter(model):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if p.requires_grad])


# -- mathematics

# Losses of the first four steps, recorded on an x86-64 CPU in fp32. On one machine they repeat to the last
# bit. Between CPUs the order of sums differs, and 1e-3 is the tolerance for that.
GOLDEN = [10.384272, 10.385620, 10.327404, 10.241380]


def golden_rows(path):
    "Rows of the test's own, so that a change of the corpus does not move the golden losses."
    from nli_ft.rows import sft_row

    words = "red green blue black white grey brown pink".split()
    write_jsonl(
        path,
        [
            sft_row(
                i,
                f"The {a} box holds a {b} ball.",
                f"The {b if i % 2 else a} ball is in the {a} box.",
                f"The {a} box holds the {b} ball.",
                i % 2,
                "test",
                "brief",
            )
            for i, (a, b) in enumerate(zip(words * 2, words[3:] * 4))
        ],
    )
    return str(path)


def test_golden_losses_for_a_fixed_seed(tmp_path):
    rows = golden_rows(tmp_path / "rows.jsonl")

    def trained(cfg, out, real=globals()["trained"]):
        return real(cfg.replace(train_data=rows, eval_data=rows), out)

    logs, model, _ = trained(tiny(tmp_path, max_steps=4), tmp_path / "a")
    assert [l["loss"] for l in logs if "loss" in l] == pytest.approx(GOLDEN, rel=1e-3)
    again, other, _ = trained(tiny(tmp_path, max_steps=4), tmp_path / "b")
    assert [l["loss"] for l in again if "loss" in l] == [l["loss"] for l in logs if "loss" in l]
    assert torch.equal(adapter(model), adapter(other))


def test_loss_and_gradients_equal_the_models_own_completion_only_loss(tmp_path):
    cfg = tiny(tmp_path)
    prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05)
    trainer = make_trainer_class()(
        model=model,
        args=training_args(cfg, tmp_path, False),
        train_dataset=to_dataset(prep.train[:8], cfg),
        processing_class=prep.tok,
    )
    batch = trainer.data_collator(
        [dict(input_ids=e.input_ids, labels=e.labels, kind=e.kind) for e in prep.train[:8]]
    )
    plain = dict(batch)
    plain.pop("kind")

    def grads(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    want = model(**plain).loss  # in eval mode: transformers' own attention, mask and head
    want_grad = grads(want)
    model.train()
    with dequantised_once(model):
        got = trainer.compute_loss(model, dict(batch))
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert torch.allclose(grads(got), want_grad, rtol=1e-4, atol=1e-6 * want_grad.abs().max().item())


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(target_modules="all-linear"),
        dict(lora_dropout=0.05),
        dict(target_modules=["q_proj", "v_proj"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_memory_estimate_counts_what_a_block_keeps_for_its_backward_pass(tmp_path, dtype, change):
    from nli_ft.bases import autocast, compute_dtype
    from nli_ft.cpu_speed import bf16_between_products
    from nli_ft.preflight import _activations, linear_shapes

    cfg = tiny(tmp_path, compute_dtype=dtype, gradient_checkpointing=False, **change)
    model, kept = seeded_lora(load_base(cfg), cfg).train(), {}
    ids = torch.randint(3, 1000, (4, 96))

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    block = model.get_base_model().model.layers[1]  # nothing before the first one needs a gradient
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    given = set()

    def begin(m, args, kw):
        given.update(
            t.untyped_storage().data_ptr()
            for t in (kw.get("attention_mask"), *kw["position_embeddings"])
            if t is not None
        )  # of all blocks
        hooks.__enter__()

    block.register_forward_pre_hook(begin, with_kwargs=True)
    block.register_forward_hook(lambda m, args, out: hooks.__exit__(None, None, None))
    with autocast(cfg), bf16_between_products(model) if dtype == "bf16" else torch.enable_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    given.update(p.untyped_storage().data_ptr() for p in model.parameters())
    measured = (
        sum(
            t.untyped_storage().nbytes()
            for at, t in kept.items()
            if at not in given and t.numel() >= ids.numel()
        )
        / ids.numel()
    )
    linear, _, conf = linear_shapes(cfg)

    def hit(n):
        return cfg.target_modules == "all-linear" or n.rpartition(".")[2] in cfg.target_modules

    assert _activations(cfg, linear, conf, hit, compute_dtype(cfg), True) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("computing", [pytest.param("fp32", marks=pytest.mark.every), "bf16"])
def test_a_merged_run_is_checked_against_its_adapter_and_what_differs_ends_with_1(
    tmp_path, monkeypatch, capsys, computing
):
    import nli_ft.config_loader
    import nli_ft.cpu_speed
    import nli_ft.generate
    import nli_ft.model
    import nli_ft.records
    from nli_ft.train_sft import merge_cli, run_training

    run = run_training(
        tiny(tmp_path, max_steps=3, compute_dtype=computing, eval_before=False, max_eval_samples=8)
    )
    merges = iter(range(9))

    def merge(dtype="fp32", check="8"):
        try:
            code = merge_cli(
                [
                    "--run",
                    str(run),
                    "--out",
                    str(tmp_path / f"merged{next(merges)}"),
                    "--dtype",
                    dtype,
                    "--check",
                    check,
                ]
            )
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().out

    def furthest(said):
        return float(said.split("on average, ")[1].split()[0])

    code, said = merge()
    assert code == 1 and "8 rows, 0.0% answered" in said, (
        "a random model answers nothing, and that is no agreement"
    )
    assert furthest(said) < 1e-6, "a merge into fp32 is compared in fp32"

    def told(*last):
        return iter(
            [
                [dict(text='{"thought_process": "x", "predicted_label": 1}')] * 8,
                [dict(text='{"thought_process": "x", "predicted_label": 1}')] * 7 + [*last],
            ]
        )

    for last, want in ((1, 0), (0, 1)):
        texts = told(dict(text=f'{{"thought_process": "x", "predicted_label": {last}}}'))
        with monkeypatch.context() as m:
            swap(m, "nli_ft.generate.generate_completions", lambda *a, **k: next(texts))
            code, said = merge()
            assert (code, f"{1 - want / 8:.1%} of the greedy labels" in said) == (want, True)
    with monkeypatch.context() as m:
        real = nli_ft.model.merge_adapter

        def spoiled(*a):
            model = real(*a)
            model.model.layers[0].mlp.down_proj.weight.data.add_(0.05)
            return model

        swap(m, "nli_ft.model.merge_adapter", spoiled)
        assert furthest(merge()[1]) > 1e-2
    assert merge(check="-1")[0] == 2 and not (tmp_path / f"merged{next(merges) - 1}").exists()


def test_accumulation_is_per_token_and_not_a_mean_of_means(tmp_path):
    "8 x 1 rows and 1 x 8 rows of very different lengths make the same step."
    finals, losses = [], []
    for name, kw in (
        ("one", dict(batch_size=8, grad_accumulation_steps=1)),
        ("eight", dict(batch_size=1, grad_accumulation_steps=8)),
    ):
        cfg = tiny(
            tmp_path,
            max_steps=1,
            group_by_length=False,
            max_train_samples=8,
            lr_scheduler="constant",
            warmup_ratio=0.0,
            optim="sgd",
            max_grad_norm=None,
            **kw,
        )
        logs, model, _ = trained(cfg, tmp_path / name)
        losses.append(logs[0]["loss"])
        finals.append(adapter(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    start = adapter(seeded_lora(load_base(cfg), cfg))
    assert (finals[0] - start).norm() > 0
    assert (finals[0] - finals[1]).norm() <= 1e-4 * (finals[0] - start).norm()


def test_the_split_loss_adds_up_to_the_loss(tmp_path):
    cfg = tiny(tmp_path, max_steps=2)
    prep = prepare(cfg)
    logs, _, _ = trained(cfg, tmp_path / "m")
    ev = next(l for l in logs if "eval_loss" in l)
    n_label, n_thought = (sum(k == kind for e in prep.eval for k in e.kind) for kind in (2, 1))
    assert n_label == len(prep.eval)
    assert ev["eval_loss"] == pytest.approx(
        (ev["eval_loss_thought"] * n_thought + ev["eval_loss_label"] * n_label) / (n_thought + n_label),
        rel=1e-6,
    )


def test_every_trained_token_is_counted_whatever_the_logging_interval(tmp_path):
    "After the last logged step, more steps and an evaluation follow. Tokens per second is published, so all count."
    cfg = tiny(tmp_path, max_steps=None, num_epochs=1.0, max_train_samples=24, batch_size=4, logging_steps=4)
    _, _, result = trained(cfg, tmp_path / "m")
    assert result["steps"] == 6 and result["train_tokens"] == sum(map(len, prepare(cfg).train))


def test_a_quantised_models_adapter_is_trained_in_fp32(tmp_path):
    _, model, _ = trained(tiny(tmp_path, max_steps=1), tmp_path / "m")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def with_frozen_head(model):
    from nli_ft.cpu_speed import give_frozen_head
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model())
    assert give_frozen_head(model.get_base_model(), is_exact)


def test_the_head_is_applied_to_trained_positions_only(tmp_path, monkeypatch):
    "This makes it fast: it scores as many positions as there are labels, not as there are tokens."
    import nli_ft.config_loader
    import nli_ft.cpu_speed
    import nli_ft.generate
    import nli_ft.model
    import nli_ft.records

    cfg = tiny(tmp_path)
    prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg)
    seen, real = [], nli_ft.cpu_speed.target_log_probs
    swap(
        monkeypatch,
        "nli_ft.cpu_speed.target_log_probs",
        lambda hidden, *a: (seen.append(len(hidden)), real(hidden, *a))[1],
    )
    with_frozen_head(model)
    seen.clear()  # of the trial
    e = prep.train[0]
    fused_log_probs(model, dict(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])))
    assert seen == [sum(y != -100 for y in e.labels)]


def read_positions(model, batch):
    "Positions that the blocks compute for a batch, its loss and the gradients of the adapter."
    seen = []
    layers = model.get_base_model().base_model.layers
    hook = layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2].numel()))
    model.zero_grad()
    loss = -fused_log_probs(model, batch).mean()
    loss.backward()
    hook.remove()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return sum(seen), loss.item(), torch.cat(grads)


def sharing_batch(cfg):
    "A model that is trained, and 16 rows that begin with the same instruction."
    cfg = cfg.replace(lora_dropout=0.0)
    prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    with_frozen_head(model)
    rows = prep.train[:16]
    width = max(map(len, rows))
    ids = torch.tensor([row.input_ids + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row)) for row in rows])
    return model, dict(input_ids=ids, labels=labels)


@pytest.mark.parametrize("is_prompt_trained", [False, True])
def test_a_start_that_all_rows_share_is_read_once_with_the_same_gradients(tmp_path, is_prompt_trained):
    from nli_ft.cpu_speed import PARTS, only, shared_tokens

    model, batch = sharing_batch(tiny(tmp_path, compute_dtype="fp32"))
    if is_prompt_trained:
        batch["labels"] = batch["input_ids"]
    rows, width = batch["input_ids"].shape
    n = shared_tokens(batch["input_ids"])
    assert rows == 16 and n >= 10, "too few rows, or no instruction: nothing is tested"
    positions, loss, grads = read_positions(model, batch)
    with only(PARTS - {"shared_start"}):
        all_positions, want, want_grads = read_positions(model, batch)
    assert (positions, all_positions) == (n + rows * (width - n), rows * width)
    assert loss == pytest.approx(want, rel=1e-5)
    assert (grads - want_grads).norm() < 1e-4 * want_grads.norm()


def with_dropout(model, batch):
    layer = next(m for m in model.modules() if hasattr(m, "lora_dropout"))
    layer.lora_dropout["default"] = torch.nn.Dropout(0.05)


def with_checkpointing(model, batch):
    model.get_base_model().activation_checkpointing_enable(dict(use_reentrant=False))


def with_left_padding(model, batch):
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 0] = 0


def with_positions(model, batch):
    rows, width = batch["input_ids"].shape
    batch["position_ids"] = torch.arange(width)[None].repeat(rows, 1)


@pytest.mark.parametrize(
    "condition",
    [with_dropout, with_checkpointing, with_left_padding, with_positions],
    ids=lambda f: f.__name__,
)
def test_rows_are_read_whole_where_their_starts_are_not_the_same(tmp_path, condition):
    model, batch = sharing_batch(tiny(tmp_path, compute_dtype="fp32"))
    condition(model, batch)
    assert read_positions(model, batch)[0] >= batch["input_ids"].numel()


def test_padding_on_either_side_leaves_log_probabilities_as_they_are(tmp_path):
    "Padding needs no mask behind the real tokens, but needs one before them."
    cfg = tiny(tmp_path)
    prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg).train()
    with_frozen_head(model)
    short, long = (f(prep.train, key=len) for f in (min, max))
    gap = len(long) - len(short)
    assert gap > 3

    def scored(pad):  # to the right or to the left of the short row
        ids, labels, real = (
            torch.tensor([pad(x, fill), y])
            for x, y, fill in (
                (short.input_ids, long.input_ids, 5),
                (short.labels, long.labels, -100),
                ([1] * len(short), [1] * len(long), 0),
            )
        )
        batch = dict(input_ids=ids, labels=labels, attention_mask=real)
        return fused_log_probs(model, _for_scoring(model.config, batch))

    alone = torch.cat(
        [
            fused_log_probs(
                model, dict(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels]))
            )
            for e in (short, long)
        ]
    )
    for pad in (lambda x, fill: x + [fill] * gap, lambda x, fill: [fill] * gap + x):
        assert torch.allclose(scored(pad), alone, atol=1e-5)


def test_early_stopping_keeps_the_best_checkpoint(tmp_path):
    cfg = tiny(
        tmp_path,
        max_steps=12,
        eval_steps=2,
        save_steps=2,
        early_stopping_patience=1,
        learning_rate=1.0,
        max_grad_norm=None,
        lr_scheduler="constant",
        warmup_ratio=0.0,
    )
    own = golden_rows(tmp_path / "rows.jsonl")
    cfg = cfg.replace(train_data=own, eval_data=own)
    logs, model, result = trained(cfg, tmp_path / "m")
    evals = [l["eval_loss"] for l in logs if "eval_loss" in l]
    assert len(evals) < 6 and result["steps"] < 12, "a learning rate of 1 must get worse"
    best = tmp_path / "m" / f"checkpoint-{2 * (evals.index(min(evals)) + 1)}"
    from safetensors.torch import load_file

    kept, saved = (
        load_file(tmp_path / "m" / "adapter" / "adapter_model.safetensors"),
        load_file(best / "adapter_model.safetensors"),
    )
    assert saved and all(torch.equal(kept[k], saved[k]) for k in saved)


# -- rows


def test_older_text_rows_train_and_keep_their_own_wording(tmp_path):
    rows = [
        dict(
            id=i,
            text=f"<s>[INST] Premise: Dog {i} barked.\nHypothesis: A dog barked.\n\n"
            "Use chain of thought reasoning to determine if the hypothesis is entailed by the premise. "
            "Provide your reasoning and the final label (0 or 1) in JSON format: "
            '{"thought_process": "...", "predicted_label": ...} [/INST] '
            f'{{"thought_process": "dog {i} is a dog.", "predicted_label": {i % 2}}} </s>',
        )
        for i in range(8)
    ]
    write_jsonl(tmp_path / "t.jsonl", rows)
    prep = prepare(tiny(tmp_path, train_data=str(tmp_path / "t.jsonl"), eval_data=str(tmp_path / "t.jsonl")))
    assert prep.template == "standard" and len(prep.train) == 8
    assert preflight(prep)["ok"] and preflight(prep)["pairs_in_both"] == 8


def test_training_and_evaluation_rows_worded_differently_are_refused(tmp_path):
    from nli_ft.rows import sft_row

    for name, template in (("a", "standard"), ("b", "brief")):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [sft_row(i, f"p{i}", "h", "t", i % 2, "test", template) for i in range(4)],
        )
    cfg = tiny(tmp_path, train_data=str(tmp_path / "a.jsonl"), eval_data=str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="prompt_template"):
        prepare(cfg)
    assert prepare(cfg.replace(prompt_template="brief")).template == "brief"


@pytest.mark.parametrize("strategy, kept", [("all", 6), ("correct_only", 3), ("shuffled", 6)])
def test_data_strategies_choose_the_rows_they_name(tmp_path, strategy, kept):
    from nli_ft.rows import sft_row

    rows = [
        sft_row(i, f"p{i}", "h", f"thought {i}", i % 2, "thought" if i < 3 else "reflection", "brief")
        for i in range(6)
    ]
    write_jsonl(tmp_path / "t.jsonl", rows)
    prep = prepare(
        tiny(
            tmp_path,
            train_data=str(tmp_path / "t.jsonl"),
            eval_data=str(tmp_path / "t.jsonl"),
            data_strategy=strategy,
        )
    )
    assert len(prep.train) == kept
    moved = [r["id"] for r in prep.train_rows if r["thought_process"] != f"thought {r['id']}"]
    assert len(moved) == (6 if strategy == "shuffled" else 0)


def test_preflight_refuses_rows_whose_proofs_fail(tmp_path):
    prep = prepare(tiny(tmp_path))
    e = prep.train[3]
    broken = replace(
        prep, train=[*prep.train[:3], replace(e, labels=[*e.labels[:-1], -100]), *prep.train[4:]]
    )
    assert not proofs(broken)["the end of turn is learned"][0]
    with pytest.raises(DataError, match=str(prep.train_rows[3]["id"])):
        refuse_failed_proofs(preflight(broken))


def rows_of(path, words, spelled=str):
    "Rows about boxes. `spelled` changes how premise and hypothesis are written."
    from nli_ft.rows import sft_row

    write_jsonl(
        path,
        [
            sft_row(
                i,
                spelled(f"The {w} box is here."),
                spelled(f"A {w} box is here."),
                "so",
                i % 2,
                "test",
                "brief",
            )
            for i, w in enumerate(words)
        ],
    )
    return str(path)


@pytest.mark.parametrize("command", ["run", "preflight"])
@pytest.mark.parametrize(
    "how, said",
    [
        ("path", "the same file"),
        ("link", "the same file"),
        ("bytes", "files of the same bytes"),
        ("pairs", "all 4 evaluation pairs"),
    ],
)
def test_a_run_that_would_be_judged_on_its_training_rows_is_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, command, how, said
):
    from nli_ft.train_sft import train_cli

    train, judged = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows_of(train, "red green blue black".split())
    if how == "path":
        judged = train
    if how == "link":
        judged.symlink_to(train)
    if how == "bytes":
        judged.write_bytes(train.read_bytes())
    if how == "pairs":
        rows_of(judged, "red green blue black".split(), lambda t: t.upper().replace(".", " ."))

    def never(*a, **k):
        raise AssertionError("a model was loaded")

    swap(monkeypatch, "nli_ft.model.load_base", never)
    cfg = tiny(tmp_path).replace(train_data=str(train), eval_data=str(judged))
    with pytest.raises(SystemExit) as e:
        train_cli([*cfg.to_args(), *(["--preflight"] if command == "preflight" else [])])
    assert e.value.code == 2 and said in capsys.readouterr().err


def test_leakage_is_counted_before_training_and_written_into_the_record(tmp_path):
    from nli_ft.records import read_run, start_run
    from nli_ft.train_sft import Session
    from nli_ft.preflight import preflight_text

    cfg = tiny(
        tmp_path,
        train_data=rows_of(tmp_path / "a.jsonl", "red green blue black".split()),
        eval_data=rows_of(
            tmp_path / "b.jsonl", "white red grey green".split(), lambda t: t.lower().replace(".", " .")
        ),
    )
    ses = Session(cfg, start_run(cfg, command="x"))
    assert {k: ses.prep.leakage[k] for k in ("judged", "pairs", "premises")} == dict(
        judged=4, pairs=2, premises=2
    )
    summary = read_run(ses.run).summary
    assert (
        summary["leakage"] == ses.prep.leakage
        and summary["rows"] == dict(train=4, judged=4, dropped=0)
        and summary["compute_dtype"] == "float32"
    )
    assert "2 of 4 evaluation pairs are among the training rows" in preflight_text(preflight(ses.prep))


@pytest.mark.parametrize(
    "change, steps, rows",
    [
        pytest.param(dict(max_steps=2), 2, 8, marks=pytest.mark.every),
        (dict(max_steps=4), 4, 14),
        (dict(num_epochs=2), 6, 20),
        (dict(num_epochs=1, grad_accumulation_steps=2), 2, 10),
    ],
)
def test_rows_trained_are_those_that_went_through_the_model(tmp_path, monkeypatch, change, steps, rows):
    cfg = tiny(
        tmp_path,
        train_data=rows_of(tmp_path / "a.jsonl", [f"w{i}" for i in range(10)]),
        batch_size=4,
        **dict(grad_accumulation_steps=1, max_steps=None) | change,
    )
    seen, real = [], make_trainer_class

    def counting():
        cls = real()

        def compute_loss(self, model, inputs, *a, _real=cls.compute_loss, **k):
            if model.training:
                seen.append((len(inputs["input_ids"]), int(inputs["attention_mask"].sum())))
            return _real(self, model, inputs, *a, **k)

        cls.compute_loss = compute_loss
        return cls

    swap(monkeypatch, "nli_ft.trainer.make_trainer_class", counting)
    result = trained(cfg, tmp_path / "out")[2]
    assert (result["steps"], result["rows_trained"]) == (steps, rows)
    assert sum(n for n, _ in seen) == rows and sum(t for _, t in seen) == result["tokens_trained"]


def test_a_label_only_twin_stops_at_the_loss_tokens_that_it_is_given(tmp_path):
    rows = rows_of(tmp_path / "a.jsonl", [f"w{i}" for i in range(10)])
    cfg = tiny(
        tmp_path,
        train_data=rows,
        completion="label_only",
        max_steps=None,
        num_epochs=1,
        max_loss_tokens=330,
        batch_size=4,
        grad_accumulation_steps=1,
    )
    prep = prepare(cfg)
    assert loss_tokens(prep.train) == 100  # ten a row
    flight = preflight(prep)
    assert flight["steps"]["steps"] == resume_facts(prep)["steps"] == 10
    assert flight["tokens"]["trained_in_all"] == 340  # nine steps would be 300
    assert "10 of 4 rows, 3 an epoch; with loss about 340 tokens in all, 34 a step" in preflight_text(flight)
    result = trained(cfg, tmp_path / "out")[2]
    assert (result["steps"], result["rows_trained"], result["loss_tokens_trained"]) == (10, 34, 340)


def one_step(tmp_path, **kw):
    "A config whose only step holds six rows. The optimizer is such that the step is the gradient."
    from nli_ft.rows import sft_row

    thoughts = ["red", "It is green and blue.", "b " * 9, 'It says "no".', "x y", "z"]
    rows = [sft_row(i, f"p{i}", f"h{i}", t, i % 2, "test", "brief") for i, t in enumerate(thoughts)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    how = dict(train_data=str(tmp_path / "a.jsonl"), batch_size=6, grad_accumulation_steps=1, max_steps=1)
    how |= dict(optim="sgd", learning_rate=1, lr_scheduler="constant", warmup_ratio=0)
    return tiny(tmp_path, **how | dict(weight_decay=0, max_grad_norm=None) | kw)


def with_an_effect(cfg):
    "A model whose adapter does something, so that all its matrices have a gradient."
    model = seeded_lora(load_base(cfg), cfg)
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05)
    return model


def token_losses_by_hand(model, e):
    logits = model(input_ids=torch.tensor([e.input_ids])).logits[0, :-1]
    return -logits.log_softmax(-1)[range(len(e) - 1), e.input_ids[1:]]


def gradients(loss, prep, model, out):
    "The gradient of a loss by hand, that of the trainer's step, the first log, and what `fit` returns."
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    before, logs = adapter(model), []
    result = fit(prep, model, out, on_log=logs.append)
    return wanted, before - adapter(model), logs[0], result


@pytest.mark.parametrize(
    "weight, accumulation", [pytest.param(0.25, 1, marks=pytest.mark.every), (0.25, 2), (0, 1)]
)
def test_a_step_with_a_thought_weight_has_the_gradient_of_a_weighted_loss_by_hand(
    tmp_path, weight, accumulation
):
    sizes = dict(batch_size=6 // accumulation, grad_accumulation_steps=accumulation)
    cfg = one_step(tmp_path, thought_weight=weight, **sizes)
    prep, model = prepare(cfg), with_an_effect(cfg)
    total = weights = 0
    for row, e in zip(prep.train_rows, prep.train):
        is_text = [w == weight and y != -100 for w, y in zip(e.weights, e.labels)]
        text = json.dumps(row["thought_process"])
        assert prep.tok.decode([i for i, t in zip(e.input_ids, is_text) if t]).strip() in text and any(
            is_text
        )
        w = torch.tensor([weight if t else float(y != -100) for t, y in zip(is_text, e.labels)])[1:]
        total, weights = total + (w * token_losses_by_hand(model, e)).sum(), weights + w.sum()
    loss = total / weights
    wanted, gradient, log, _ = gradients(loss, prep, model, tmp_path / "out")
    assert torch.allclose(gradient, wanted, atol=1e-6) and wanted.abs().max() > 1e-3
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("share", [0.3, pytest.param(1, marks=pytest.mark.every)])
def test_a_step_of_two_tasks_has_the_gradient_of_the_weighted_sum_of_their_means(tmp_path, share):
    cfg = one_step(tmp_path, completion="auxiliary", label_task_weight=share)
    prep, model = prepare(cfg), with_an_effect(cfg)
    means = []
    for encs in (prep.train, [e.rationale for e in prep.train]):
        losses = [token_losses_by_hand(model, e)[e.n_prompt - 1 :] for e in encs]
        means.append(torch.cat(losses).mean())
    loss = share * means[0] + (1 - share) * means[1]  # the step holds all rows, so the weights are exact
    wanted, gradient, log, result = gradients(loss, prep, model, tmp_path / "out")
    assert torch.allclose(gradient, wanted, atol=1e-6) and wanted.abs().max() > 1e-3
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["loss_tokens"] == result["loss_tokens_trained"] == loss_tokens(prep.train)
    assert result["rows_trained"] == 6 and log["tokens"] == sum(map(len, sequences(prep.train)))


def test_pairs_without_thoughts_can_be_judged_but_not_trained_on(tmp_path):
    write_jsonl(
        tmp_path / "p.jsonl", [dict(id=i, premise=f"p{i}", hypothesis="h", label=i % 2) for i in range(4)]
    )
    with pytest.raises(DataError, match="nli_data prepare"):
        prepare(tiny(tmp_path, train_data=str(tmp_path / "p.jsonl")))
    prep = prepare(tiny(tmp_path, eval_data=str(tmp_path / "p.jsonl")))
    assert len(prep.eval_rows) == 4 and prep.eval == [] and prep.eval_rows[0]["prompt"][0]["role"] == "system"


# -- what stops a run before it starts


def script(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "nli_ft.train_sft", *args],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | env,
    )


def test_print_config_is_json_and_imports_no_torch():
    r = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "nli_ft.train_sft",
            "--config",
            "ablation2",
            "--learning_rate",
            "1e-4",
            "--print_config",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    out = json.loads(r.stdout)
    assert out["config"]["learning_rate"] == 1e-4 and out["changed_from_default"]["lora_r"]["value"] == 32
    heavy = {"torch", "transformers", "trl", "datasets", "matplotlib", "pandas"} & {
        l.rpartition("|")[2].strip() for l in r.stderr.splitlines()
    }
    assert not heavy


def test_everything_missing_is_said_at_once_with_the_command_that_gets_it():
    r = script("--config", "default")
    assert r.returncode == 2 and "Traceback" not in r.stderr
    for said in (
        "mistralai/Mistral-7B-v0.3",
        "CUDA",
        "hf download",
        "train_data",
        "eval_data",
        "nli_data",
        "cpu_demo",
        "minimal_test",
    ):
        assert said in r.stderr


def test_a_mistake_in_the_arguments_starts_nothing(tmp_path):
    for args, said in (
        (["--config", "ablaton2"], "ablation2"),
        (["--learning_rat", "1"], "learning_rate"),
        (["--config", "minimal_test", "--lora_r", "0"], "lora_r"),
    ):
        r = script(*args, "--runs_dir", str(tmp_path / "runs"))
        assert r.returncode == 2 and said in r.stderr and not (tmp_path / "runs").exists()


def test_preflight_prints_the_proofs_and_leaves_no_record(tmp_path):
    r = script(
        "--config",
        "minimal_test",
        "--model_id",
        "tiny-mistral",
        "--device",
        "cpu",
        "--preflight",
        "--runs_dir",
        str(tmp_path / "runs"),
    )
    assert r.returncode == 0, r.stderr
    for said in (
        "exactly one BOS",
        "end of turn",
        "inference prompt ids",
        "GiB",
        "mistral-common",
        "lengths",
        "█",
        "·",
        ">",
    ):
        assert said in r.stdout
    assert not (tmp_path / "runs").exists()


def test_step_counts_are_those_of_the_trainer(tmp_path):
    cfg = tiny(
        tmp_path,
        max_steps=None,
        num_epochs=1.0,
        max_train_samples=21,
        batch_size=4,
        grad_accumulation_steps=2,
    )
    _, _, result = trained(cfg, tmp_path / "m")
    assert result["steps"] == step_counts(cfg, 21)["steps"] == 3


# -- the doors


def records(tmp_path):
    return sorted((tmp_path / "runs").glob("*/*/summary.json"))


def door_args(tmp_path, *more):
    return [
        "--config",
        "minimal_test",
        "--model_id",
        "tiny-mistral",
        "--device",
        "cpu",
        "--compute_dtype",
        "fp32",
        "--lora_dropout",
        "0",
        "--max_new_tokens",
        "8",
        "--runs_dir",
        str(tmp_path / "runs"),
        "--output_dir",
        str(tmp_path / "models"),
        *more,
    ]


def check_record(summary_path, steps):
    run, s = summary_path.parent, json.loads(summary_path.read_text())
    assert s["status"] == "done" and s["steps"] == steps and s["after"]["n"] == 8 and s["before"]["n"] == 8
    metrics = [json.loads(l) for l in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, steps + 1))
    ids = [json.loads(l)["id"] for l in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 8
    assert (root / s["adapter"] / "adapter_model.safetensors").exists()
    return [m["loss"] for m in metrics if "loss" in m]


@pytest.mark.every
def test_module_file_and_two_processes_leave_one_record_each_and_the_same_losses(tmp_path):
    launch = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--cpu",
        "--mixed_precision",
        "no",
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    same = [
        "--group_by_length",
        "false",
        "--compute_dtype",
        "fp32",
        "--eval_metric",
        "accuracy",  # each process answers its share, and the log has the score of all rows
    ]  # grouping by length depends on the batch size of one process
    ways = {
        "module": [
            *launch,
            "--num_processes",
            "1",
            "-m",
            "nli_ft.train_sft",
            *door_args(tmp_path / "module", *same),
        ],
        "file": [
            *launch,
            "--num_processes",
            "1",
            "nli_ft/train_sft.py",
            *door_args(tmp_path / "file", *same),
        ],
        "two": [
            *launch,
            "--num_processes",
            "2",
            "-m",
            "nli_ft.train_sft",
            *door_args(tmp_path / "two", *same, "--batch_size", "2"),
        ],
    }
    losses = {}
    for name, cmd in ways.items():
        r = subprocess.run(
            cmd,
            cwd=root,
            capture_output=True,
            text=True,
            timeout=420,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert r.returncode == 0, f"{name}: {r.stdout[-2000:]}{r.stderr[-3000:]}"
        found = records(tmp_path / name)
        assert len(found) == 1, f"{name} left {len(found)} records"
        losses[name] = check_record(found[0], 4)
        assert json.loads(found[0].read_text())["processes"] == (2 if name == "two" else 1)
        metrics = (found[0].parent / "metrics.jsonl").read_text()
        assert '"eval_accuracy": 0.0' in metrics and '"eval_answer_rows": 8' in metrics, name
    assert losses["module"] == losses["file"]
    # two processes of two rows make the steps of one process of four rows: the same loss curve
    assert losses["two"] == pytest.approx(losses["module"], rel=1e-5)


@pytest.mark.every
def test_the_notebook_is_the_door_for_several_processes_too(tmp_path):
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "nli_ft.launch",
            "--no_check",
            *door_args(
                tmp_path, "--distributed_training", "true", "--num_processes", "2", "--batch_size", "2"
            ),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=420,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-2000:]
    found = records(tmp_path)
    assert len(found) == 1
    check_record(found[0], 4)
    assert json.loads(found[0].read_text())["processes"] == 2
    assert (found[0].parent / "train.ipynb").exists()


# -- every key is read by a run


class Watched:
    "A Config that records which keys code outside the config loader reads."

    def __init__(self, cfg, seen):
        self.__dict__.update(_cfg=cfg, _seen=seen)

    def __getattr__(self, name):
        from nli_ft.config_loader import KEYS

        if name in KEYS:
            self._seen.add(name)
        return getattr(self._cfg, name)

    def path(self, key):
        self._seen.add(key)
        return self._cfg.path(key)

    def replace(self, **kw):
        return Watched(self._cfg.replace(**kw), self._seen)


def test_a_run_reads_every_key(tmp_path, monkeypatch):
    "No key is decoration: a tracked and saved run reads each of them."
    import nli_ft.config_loader
    import nli_ft.cpu_speed
    import nli_ft.generate
    import nli_ft.model  # noqa: F401 (the modules must be there before a function of theirs is swapped)
    from nli_ft.config_loader import KEYS, print_config
    from nli_ft.train_sft import run_training

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    swap(
        monkeypatch, "nli_ft.config_loader.print_config", lambda c: print_config(c._cfg)
    )  # printing the config would read all keys
    swap(monkeypatch, "nli_ft.config_loader.config_hash", lambda c: "-")
    swap(monkeypatch, "nli_ft.records.run_command", lambda c: "-")
    seen = set()
    cfg = Watched(
        tiny(
            tmp_path,
            max_steps=1,
            max_eval_samples=2,
            max_new_tokens=4,
            eval_metric="accuracy",
            use_wandb=True,
            wandb_run_id="abc123",
        ),
        seen,
    )
    swap(monkeypatch, "nli_ft.ready._gpu", None)  # a GPU is chosen once in a process
    run = run_training(cfg)
    assert json.loads((run / "summary.json").read_text())["status"] == "done"
    # only a run with several processes reads them
    from nli_ft.preflight import sets_summary, world_size

    world_size(Watched(tiny(tmp_path, distributed_training=True, num_processes=2), seen))
    # and only a run with two tasks reads how they weigh
    prepare(Watched(tiny(tmp_path, completion="auxiliary", max_train_samples=4), seen))
    # and only a run with a test reads when it is judged
    tested = tiny(tmp_path, max_train_samples=4, test_data=str(tiny(tmp_path).path("eval_data")))
    sets_summary(prepare(Watched(tested, seen)))
    # and only the method that samples reads how
    preflight(prepare(Watched(tiny(tmp_path, method="grpo", batch_size=8, use_packing=False), seen)))
    assert set(KEYS) - seen == set()
    assert any((run / "wandb").glob("offline-run-*"))
