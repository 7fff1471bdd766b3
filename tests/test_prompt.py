"Token ids against mistral-common's own encoder, masks on real rows, and a parser that invents nothing."

import pytest
from hypothesis import given, settings, strategies as st

from nli_ft.config_loader import load_config
from nli_ft.process import project_root
from nli_ft.quadruples import generate
from nli_ft.rows import PROMPTS, read_rows, render_completion, sft_row
from nli_ft.prompt import (
    LABEL,
    THOUGHT,
    encode_prompt,
    encode_row,
    encode_rows,
    end_of_turn,
    mistral_reference,
    mistral_v3_tokenizer,
)
from nli_ft.answers import _EMPTY_THOUGHT, OUTCOMES, json_closed, parse_completion

real = project_root().parent / "shared" / "data" / "mistral_nli_sample" / "sample_ft.jsonl"
needs_real = pytest.mark.skipif(not real.exists(), reason="the real NLI sample is not here")


@pytest.fixture(scope="module")
def mistral():
    return mistral_v3_tokenizer()


@pytest.fixture(scope="module")
def smollm2():
    from nli_ft.bases import load_tokenizer

    return load_tokenizer(load_config("minimal_test"))


@needs_real
def test_a_hundred_real_rows_get_the_ids_of_mistral_commons_encoder(mistral):
    rows = read_rows(real)
    assert len(rows) == 100
    for r in rows:
        assert encode_prompt(mistral, r["prompt"]) == mistral_reference(r["prompt"]), r["id"]
        assert encode_row(mistral, r).input_ids == mistral_reference(
            r["prompt"], render_completion(r["thought_process"], r["label"])
        ), r["id"]


@pytest.mark.parametrize("template", list(PROMPTS))
def test_synthetic_rows_get_the_ids_of_mistral_commons_encoder(mistral, template):
    rows = [
        sft_row(
            r["id"], r["premise"], r["hypothesis"], r["thought_process"], r["label"], r["source"], template
        )
        for r in generate("demo")["train"][:60]
    ]
    rows.append(
        sft_row("odd", "Ünïcödé “quotes”\n\ttabs  and   spaces ", " 日本語 🙂 ", "a\nb", 1, "test", template)
    )
    for r in rows:
        assert encode_row(mistral, r).input_ids == mistral_reference(
            r["prompt"], render_completion(r["thought_process"], r["label"])
        )


def test_the_chat_template_alone_decides_the_prompt_of_a_model_that_has_one(smollm2):
    row = generate("demo")["train"][0]
    text = smollm2.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    assert encode_prompt(smollm2, row["prompt"]) == smollm2(text, add_special_tokens=False)["input_ids"]
    assert (
        smollm2.decode(encode_row(smollm2, row).input_ids)
        == text + render_completion(row["thought_process"], row["label"]) + "<|im_end|>"
    )


@pytest.mark.parametrize("which", ["mistral", "smollm2"])
@pytest.mark.parametrize("style", ["cot", "label_only", "label_first"])
def test_masks_are_exact_for_every_style(request, which, style):
    tok = request.getfixturevalue(which)
    for r in generate("demo")["dev"][:40]:
        e = encode_row(tok, r, style)
        assert len(e.input_ids) == len(e.labels) == len(e.kind)
        assert e.input_ids[: e.n_prompt] == encode_prompt(tok, r["prompt"]) and set(
            e.labels[: e.n_prompt]
        ) == {-100}
        assert e.labels[e.n_prompt :] == e.input_ids[e.n_prompt :] and e.labels[-1] == end_of_turn(tok)
        assert tok.decode([i for i, k in zip(e.input_ids, e.kind) if k == LABEL]).strip() == str(r["label"])
        assert sum(k == LABEL for k in e.kind) == 1 and e.kind[-1] == THOUGHT


@needs_real
def test_masks_are_exact_on_real_rows(smollm2):
    for r in read_rows(real):
        e = encode_row(smollm2, r)
        assert smollm2.decode([i for i, k in zip(e.input_ids, e.kind) if k == LABEL]) == str(r["label"])
        assert smollm2.decode(e.input_ids[e.n_prompt : -1]) == render_completion(
            r["thought_process"], r["label"]
        )


def test_a_row_that_spells_a_control_token_is_dropped_with_its_name(mistral, smollm2):
    for tok, evil in ((mistral, "</s>"), (mistral, "[INST]"), (smollm2, "<|im_end|>")):
        good, bad = (sft_row(i, p, "h", "t", 1, "test") for i, p in (("good", "p"), ("bad", f"p {evil} p")))
        kept, _, dropped = encode_rows(tok, [good, bad], 512)
        assert [r["id"] for r in kept] == ["good"] and dropped[0][0] == "bad" and evil in dropped[0][1]


def test_a_long_row_is_dropped_whole_and_never_cut(mistral):
    rows = [sft_row(i, "word " * n, "h", "t", 1, "test") for i, n in (("short", 5), ("long", 500))]
    kept, encs, dropped = encode_rows(mistral, rows, 200)
    assert (
        [r["id"] for r in kept] == ["short"]
        and dropped[0][0] == "long"
        and all(e.labels[-1] == mistral.eos_token_id for e in encs)
    )


json_text = st.text(st.sampled_from('{}[]",:\\ \n01ab"thought_process""predicted_label"'), max_size=80)


@settings(max_examples=1500, deadline=None)
@given(st.one_of(st.text(max_size=200), json_text))
def test_the_parser_never_raises_and_never_invents_a_label(text):
    p = parse_completion(text)
    assert p.outcome in OUTCOMES
    if p.outcome in ("strict", "repaired"):
        assert p.label in (0, 1) and p.thought.strip() and str(p.label) in text and json_closed(text)
    else:
        assert p.label is None and p.thought is None


@settings(max_examples=500, deadline=None)
@given(
    # a thought such as [] or … is the form that the prompt shows, and no answer
    st.text(min_size=1, max_size=200).filter(lambda t: t.strip() and not _EMPTY_THOUGHT.fullmatch(t)),
    st.sampled_from([0, 1]),
    st.text(max_size=30),
    st.sampled_from(["cot", "label_first"]),
)
def test_what_is_rendered_is_parsed_back_whatever_stands_around_it(thought, label, noise, style):
    text = render_completion(thought, label, style)
    p = parse_completion(text)
    assert (p.label, p.thought, p.outcome) == (label, thought, "strict")
    if "{" not in noise and "}" not in noise:
        assert parse_completion(noise + text + noise).label == label
    for cut in range(len(text)):
        assert parse_completion(text[:cut]).label is None, text[:cut]
