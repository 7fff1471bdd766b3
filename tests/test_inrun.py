"""A run writes what its saved adapter answers when it is asked again, for a row alone or among others. Nothing that
training leaves on a model may change its answers."""

from contextlib import nullcontext
from types import SimpleNamespace

from swap import swap
import pytest
from tiny_models import FAMILIES, box_rows, save_model

from nli_ft.config_loader import load_config
from nli_ft.rows import PROMPTS, STYLES
from nli_ft.files import write_jsonl
from nli_ft.generate import generate_batch, shared_start
from nli_ft.predict import _digit_batch, predict_rows
from nli_ft.model import load_for_inference
from nli_ft.bases import load_tokenizer
from nli_ft.prompt import encode_prompt
from nli_ft.records import start_run
from nli_ft.train_sft import Session
from nli_ft.ready import check_ready

STEPS = 60  # after these steps most answers are JSON


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_model(family, folder / family) for family in FAMILIES}


def config(base, tmp_path, **changes):
    write_jsonl(tmp_path / "train.jsonl", box_rows(24, None))
    write_jsonl(tmp_path / "eval.jsonl", box_rows(36, None)[24:])
    small = dict(
        model_id=str(base),
        device="cpu",
        compute_dtype="fp32",
        target_modules="all-linear",
        lora_r=32,
        lora_alpha=64,
    )
    pace = dict(
        learning_rate=1e-2,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        batch_size=8,
        max_steps=STEPS,
        eval_steps=10_000,
        save_steps=10_000,
    )
    judged = dict(
        max_train_samples=24, max_eval_samples=12, max_new_tokens=48, eval_batch_size=8, logging_steps=20
    )
    places = dict(
        train_data=str(tmp_path / "train.jsonl"),
        eval_data=str(tmp_path / "eval.jsonl"),
        output_dir=str(tmp_path / "models"),
    )
    cfg = load_config("minimal_test", small | pace | judged | places | changes)
    check_ready(cfg)
    return cfg


def trained_session(cfg, tmp_path):
    "A session that has judged before training, has trained, and still holds its model."
    session = Session(cfg, start_run(cfg, tmp_path / "run"))
    session.judge("before", progress=False)
    session.train(on_log=lambda row: None)
    return session


KINDS = [(f, s) for f in FAMILIES for s in STYLES]
OFTEN = ("mistral", "cot"), ("qwen2", "label_first")  # the others: `pytest -m every`


@pytest.fixture(
    scope="module",
    params=[k if k in OFTEN else pytest.param(k, marks=pytest.mark.every) for k in KINDS],
    ids="-".join,
)
def run(request, bases, tmp_path_factory):
    family, style = request.param
    tmp_path = tmp_path_factory.mktemp(f"{family}-{style}")
    session = trained_session(config(bases[family], tmp_path, completion=style), tmp_path)
    again = load_for_inference(session.cfg, session.weights / "adapter")
    return SimpleNamespace(
        session=session, again=again, cfg=session.cfg, tok=session.prep.tok, rows=session.prep.eval_rows
    )


def answers(model, tok, groups, cfg, mode):
    "Row id -> its answer, with each group of rows asked by itself."
    made = [p for rows in groups for p in predict_rows(model, tok, rows, cfg, progress=False, mode=mode)]
    return {p["id"]: (p["completion"], p["predicted_label"], p["p_entail"]) for p in made}


def assert_same(these, those, within):
    assert these.keys() == those.keys()
    for key, (text, label, p) in these.items():
        assert (key, text, label) == (key, *those[key][:2])
        assert p == (None if those[key][2] is None else pytest.approx(those[key][2], abs=within))


@pytest.mark.parametrize("mode", ["cot", "forced"])
def test_a_trained_model_answers_as_its_saved_adapter_together_by_wording_and_alone(run, mode):
    ask = {
        "together": [run.rows],
        "alone": [[r] for r in run.rows],
        "by wording": [
            [r for r in run.rows if len(r["prompt"]) == len(messages)] for messages in PROMPTS.values()
        ],
    }
    saved_tok = load_tokenizer(run.cfg)
    want = answers(run.again, saved_tok, ask["together"], run.cfg, mode)
    for name, groups in ask.items():
        assert_same(answers(run.session.model, run.tok, groups, run.cfg, mode), want, 1e-4)
        assert_same(answers(run.again, saved_tok, groups, run.cfg, mode), want, 1e-4)
    if mode == "cot":
        assert (
            len({text for text, *_ in want.values()}) > 1
            and sum(label is not None for _, label, _ in want.values()) >= 6
        )
        written = run.session.judge("after", progress=False)
        assert_same(
            {p["id"]: (p["completion"], p["predicted_label"], p["p_entail"]) for p in written}, want, 1e-4
        )


def test_the_rows_of_one_wording_have_a_common_start_and_those_of_all_have_none_worth_it(run):
    prompts = [encode_prompt(run.tok, r["prompt"]) for r in run.rows]
    brief = [p for p, r in zip(prompts, run.rows) if len(r["prompt"]) == 2]
    assert shared_start(run.session.model, brief).length >= 8 and len(set(map(len, brief))) > 2
    assert shared_start(run.session.model, prompts) is None


def test_a_model_whose_cache_is_called_cache_is_not_given_the_old_name(run, monkeypatch):
    "transformers renamed the argument in 5.24. The old name only warns, until 5.40."
    model = run.session.model
    inner, brief = model.get_base_model(), [r["prompt"] for r in run.rows if len(r["prompt"]) == 2]
    asked = [(encode_prompt(run.tok, prompt), [[5], [6]]) for prompt in brief]
    prompts, old = [ids for ids, _ in asked], inner.forward
    want = _digit_batch(model, asked, 0, shared_start(model, prompts))

    def forward(
        input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None, logits_to_keep=0
    ):
        how = dict(position_ids=position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
        out = old(input_ids, attention_mask, past_key_values=cache, **how)
        return SimpleNamespace(logits=out.logits, cache=out.past_key_values)

    monkeypatch.setattr(inner, "forward", forward)
    start = shared_start(model, prompts)
    assert start.length >= 8 and _digit_batch(model, asked, 0, start) == want


@pytest.mark.parametrize("shared", [False, True], ids=["whole prompts", "common start"])
def test_generation_after_training_gives_each_row_its_positions_and_computes_one_logit_a_row(run, shared):
    model, tok = run.session.model, run.tok
    prompts = [encode_prompt(tok, r["prompt"]) for r in run.rows if len(r["prompt"]) == 2]
    start, calls = shared_start(model, prompts) if shared else None, []
    known, inner = start.length if shared else 0, model.get_base_model()

    def see(module, args, kw):
        calls.append((kw["position_ids"], kw["input_ids"]))

    def see_head(module, args, out):
        heads.append(tuple(out.shape))

    heads = []
    hooks = [
        inner.model.register_forward_pre_hook(see, with_kwargs=True),
        inner.get_output_embeddings().register_forward_hook(see_head),
    ]
    try:
        generate_batch(model, tok, prompts, 3, start=start)
    finally:
        for hook in hooks:
            hook.remove()
    for at, (positions, ids) in enumerate(calls):
        for row, prompt in zip(positions.expand(len(prompts), -1), prompts):
            own = list(range(known, len(prompt))) if at == 0 else [len(prompt) + at - 1]
            assert row[-len(own) :].tolist() == own, f"step {at}"
    assert set(heads) == {(len(prompts), 1, len(tok))}


# --- bf16: the norms and embeddings of a model that trains are in fp32, those of a loaded one are not

EVERY = pytest.mark.every
LEAVES_MORE = [
    dict(),
    dict(use_dora=True),
    pytest.param(dict(gradient_checkpointing=True, lora_dropout=0.1), marks=EVERY),
    pytest.param(dict(quantization="none", gradient_checkpointing=True), marks=EVERY),
    pytest.param(dict(early_stopping_patience=1, eval_steps=2, save_steps=2), marks=EVERY),
]


@pytest.mark.parametrize("as_on_a_gpu", [False, True], ids=["plain weights", "4-bit products"])
@pytest.mark.parametrize("change", LEAVES_MORE, ids=str)
def test_in_bf16_a_run_writes_what_its_saved_adapter_answers_to_the_last_digit(
    bases, tmp_path, monkeypatch, change, as_on_a_gpu
):
    cfg = config(bases["qwen2"], tmp_path, compute_dtype="bf16", max_steps=6, max_new_tokens=12, **change)
    session = trained_session(cfg, tmp_path)
    again = load_for_inference(cfg, session.weights / "adapter")
    if as_on_a_gpu:
        swap(monkeypatch, "nli_ft.cpu_speed.merged", lambda model, dtype: nullcontext())
    kept = {name: p.dtype for name, p in session.model.named_parameters()}
    for mode in ("cot", "forced"):
        assert_same(
            *(
                answers(m, session.prep.tok, [session.prep.eval_rows], cfg, mode)
                for m in (session.model, again)
            ),
            0,
        )
    assert {name: p.dtype for name, p in session.model.named_parameters()} == kept


def test_in_bf16_the_untrained_model_of_a_run_answers_as_the_base_alone(bases, tmp_path):
    cfg = config(bases["mistral"], tmp_path, compute_dtype="bf16", max_new_tokens=12)
    session = Session(cfg, start_run(cfg, tmp_path / "run"))
    written = session.judge("before", progress=False)
    want = answers(load_for_inference(cfg), session.prep.tok, [session.prep.eval_rows], cfg, "cot")
    assert_same({p["id"]: (p["completion"], p["predicted_label"], p["p_entail"]) for p in written}, want, 0)
