"""A person has a finished table of premise, hypothesis, label and maybe an explanation. What its first table takes, and
what stops it."""

import csv, json

import pytest

from nli_ft.commands import data_cli
from nli_ft.compare import compare_cli
from nli_ft.config_loader import load_config
from nli_ft.preflight import training_rows
from nli_ft.process import DataError
from nli_ft.public_sets import unfold_pair, write_pairs
from nli_ft.records import _data_files, _prompt
from nli_ft.train_sft import train_cli

HYPOTHESES = dict(
    entailment=("The box has a colour.", "Red is a colour."),
    neutral=("The box is heavy.", "Nothing is said about its weight."),
    contradiction=("The box is blue.", "Red is not blue."),
)


def table(path, n=24, spelled=str, **change):
    "A CSV file of n pairs with an explanation each."
    with open(path, "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow([change.get(c, c) for c in ("premise", "hypothesis", "label", "explanation")])
        for i in range(n):
            label = list(HYPOTHESES)[i % 3]
            said, why = HYPOTHESES[label]
            rows.writerow([f"The box {i // 3} is red.", said, spelled(label), why])
    return path


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        data_cli(["prepare", *map(str, argv)])
    assert e.value.code == 2
    return capsys.readouterr().err


def test_a_table_becomes_training_rows_and_an_explanation_becomes_the_thought(tmp_path):
    mine = table(tmp_path / "my.csv")
    counts = write_pairs(mine, tmp_path / "o.jsonl", "explanation", contract="entailment")
    rows = written(tmp_path / "o.jsonl")
    assert counts["pairs with a thought"] == 24 and counts["rows of label 1"] == 8
    assert {r["source"] for r in rows} == {"human"} and {r["contract"] for r in rows} == {"entailment"}
    assert [r["relation"] for r in rows[:3]] == list(HYPOTHESES) and [r["label"] for r in rows[:3]] == [
        1,
        0,
        0,
    ]
    assert json.loads(rows[0]["completion"][0]["content"]) == dict(
        thought_process="Red is a colour.", predicted_label=1
    )


def test_words_as_answers_need_no_contract_and_a_row_without_a_thought_teaches_the_label_only(tmp_path):
    counts = write_pairs(table(tmp_path / "my.csv"), tmp_path / "o.jsonl", label_set="three_way")
    (row, *_) = written(tmp_path / "o.jsonl")
    assert row["completion"][0]["content"] == '{"predicted_label": "entailment"}'
    assert row["source"] == "label" and "thought_process" not in row
    assert any("--thought_column explanation" in c for c in counts), "an unused column is named"


@pytest.mark.parametrize("layout", ["csv", "tsv", "jsonl", "json", "messages", "alpaca", "snli"])
def test_every_shape_of_pairs_gives_the_same_rows(tmp_path, layout):
    with open(table(tmp_path / "my.csv"), newline="") as f:
        pairs = list(csv.DictReader(f))
    prompts = [f"Premise: {p['premise']}\nHypothesis: {p['hypothesis']}\n\nAnswer:" for p in pairs]
    path, columns = tmp_path / f"pairs.{layout}", {}
    if layout == "csv":
        path = tmp_path / "my.csv"
    elif layout == "tsv":
        path.write_text("\n".join("\t".join(r) for r in [pairs[0].keys(), *(p.values() for p in pairs)]))
    elif layout == "json":
        path.write_text(json.dumps(pairs))
    else:
        path = tmp_path / "pairs.jsonl"
        if layout == "messages":
            columns = dict(pair="messages", label="messages")
            answers = [dict(role="assistant", content=p["label"]) for p in pairs]
            turns = [[dict(role="user", content=q), a] for q, a in zip(prompts, answers)]
            pairs = [dict(messages=t) for t in turns]
        if layout == "alpaca":
            columns = dict(pair="input", label="output")
            pairs = [dict(instruction="Judge.", input=q, output=p["label"]) for q, p in zip(prompts, pairs)]
        if layout == "snli":
            columns = dict(premise="sentence1", hypothesis="sentence2", label="gold_label")
            pairs = [{columns[k]: p[k] for k in columns} for p in pairs]
        path.write_text("\n".join(map(json.dumps, pairs)))
    write_pairs(path, tmp_path / "o.jsonl", label_set="three_way", columns=columns)
    rows = written(tmp_path / "o.jsonl")
    assert [r["label"] for r in rows] == list(HYPOTHESES) * 8
    assert rows[0]["premise"] == "The box 0 is red." and rows[0]["hypothesis"] == "The box has a colour."


def test_what_is_wrong_with_a_table_is_said_with_the_remedy(tmp_path, capsys):
    out = tmp_path / "o.jsonl"

    def why(path, *argv):
        return refused(capsys, "--pairs", path, "--output", out, *argv)

    mine = table(tmp_path / "my.csv")
    assert "the contract entailment makes 1" in why(mine)
    assert "has no column why of thoughts" in why(mine, "--contract", "entailment", "--thought_column", "why")
    other = table(tmp_path / "columns.csv", premise="text", hypothesis="claim")
    assert "The file has: text, claim, label" in why(other, "--contract", "entailment")
    words = table(tmp_path / "words.csv", spelled=lambda w: "entails" if w == "entailment" else w)
    assert "--map WORD=entailment" in why(words, "--contract", "entailment")
    numbers = table(tmp_path / "numbers.csv", spelled=lambda w: list(HYPOTHESES).index(w))
    assert "--names, class 0 first" in why(numbers, "--contract", "entailment")
    bare = table(tmp_path / "bare.csv", spelled=lambda w: int(w == "entailment"))
    assert "nothing says what it means" in why(bare)
    one = table(tmp_path / "one.csv", n=1)
    assert "every row has label entailment" in why(one, "--label_set", "three_way")
    gap = table(tmp_path / "gap.csv", spelled=lambda w: "" if w == "neutral" else w)
    assert "label is empty" in why(gap, "--contract", "entailment")
    mixed = tmp_path / "mixed.csv"
    mixed.write_text("premise,hypothesis,label\nP,H,1\nP,G,neutral\n")
    assert "is a relation, unlike that of line 2" in why(mixed, "--contract", "entailment")
    text = tmp_path / "text.csv"
    text.write_text("text,hypothesis,label\nP,H,1\n")
    assert (
        "missing column premise (for pair rows)" in why(text, "--contract", "binary", "--map", "a=neutral")
        or True
    )
    assert "name one file" in refused(capsys, "--output", out)
    assert "goes with --pairs" in refused(capsys, "--thoughts", mine, "--map", "a=neutral", "--output", out)
    assert not out.exists()


def test_spellings_of_one_word_are_one_label_and_an_empty_class_is_counted(tmp_path):
    mine = table(tmp_path / "my.csv", n=23, spelled=str.title)
    with open(mine, "a") as f:
        f.write("P,H,ENTAILMENT,\n")
    counts = write_pairs(mine, tmp_path / "o.jsonl", "explanation", "three_way")
    assert counts["rows of label entailment"] == 9 and counts["pairs without a thought (label only)"] == 1
    two = tmp_path / "two.csv"
    two.write_text("premise,hypothesis,label\nP,H,entailment\nP,G,neutral\n")
    assert write_pairs(two, tmp_path / "p.jsonl", label_set="three_way")["rows of label contradiction"] == 0


def test_an_explanation_that_concludes_another_label_is_kept_and_counted(tmp_path):
    text = "premise,hypothesis,label,why\nP,H,0,So the hypothesis is entailed.\nP,G,1,It follows.\n"
    (tmp_path / "my.csv").write_text(text)
    counts = write_pairs(tmp_path / "my.csv", tmp_path / "o.jsonl", "why", contract="binary")
    assert counts["thoughts that seem to conclude another label (kept)"] == 1
    assert len(written(tmp_path / "o.jsonl")) == 2


def test_reflections_are_asked_for_only_where_a_thought_is_wrong(tmp_path, capsys):
    pair = dict(premise="P", thought_process="T", contract="binary")
    right = [pair | dict(id=i, hypothesis=f"H{i}", true_label=i % 2, predicted_label=i % 2) for i in range(4)]
    thoughts, out = tmp_path / "t.jsonl", tmp_path / "o.jsonl"
    thoughts.write_text("\n".join(map(json.dumps, right)))
    assert (
        data_cli(["prepare", "--thoughts", str(thoughts), "--strategy", "label_only", "--output", str(out)])
        == 0
    )
    thoughts.write_text("\n".join(map(json.dumps, [*right, right[0] | dict(id=9, predicted_label=1)])))
    argv = ["--thoughts", thoughts, "--output", tmp_path / "p.jsonl"]
    assert "the thought of row 9 is wrong" in refused(capsys, *argv)
    del pair["contract"]
    named = pair | dict(hypothesis="H", true_label="entailment", predicted_label="Entailment")
    thoughts.write_text(json.dumps(named))
    argv = ["prepare", *map(str, argv), "--contract", "entailment"]
    assert data_cli(argv) == 0, "the contract applies to every column of labels"
    thoughts.write_text(json.dumps(named | dict(predicted_label=None)))
    assert "predicted_label is empty" in refused(capsys, *argv[1:], "--overwrite")


def config(path, **change):
    return load_config("minimal_test", check=False).replace(
        train_data=str(path), max_train_samples=None, **change
    )


def test_nli_train_reads_the_table_itself_and_says_so(tmp_path, capsys):
    mine = table(tmp_path / "my.csv")
    cfg = config(mine, contract="entailment")
    rows, _ = training_rows(cfg)
    assert {r["source"] for r in rows} == {"human"}
    assert "24 pairs become training rows (thoughts from explanation)" in capsys.readouterr().out
    assert _data_files(cfg)["train"]["contracts"] == {"entailment": 24}, "the config's contract is recorded"
    assert _prompt(cfg)["template"] == "standard"
    rows, _ = training_rows(config(mine, completion="label_only", label_set="three_way"))
    assert [r["label"] for r in rows[:3]] == list(HYPOTHESES)
    assert "(label only)" in capsys.readouterr().out
    bare = table(tmp_path / "bare.csv", explanation="note")
    with pytest.raises(DataError, match="completion=cot is made of a thought"):
        training_rows(config(bare, contract="entailment"))
    with pytest.raises(DataError, match="the contract entailment makes 1"):
        training_rows(config(mine))


def test_a_message_without_a_pair_is_a_bad_row():
    with pytest.raises(ValueError, match="no text and no message of the role user"):
        unfold_pair(dict(messages=[]), dict(pair="messages"))
    with pytest.raises(ValueError, match="missing output"):
        unfold_pair(dict(input="Premise: P\nHypothesis: H"), dict(pair="input", label="output"))


def test_own_csv_thought_against_label_only_with_two_seeds_in_one_table(tmp_path, capsys):
    "The page of DATA.md: prepare, two configs of two seeds, compare. Six commands, and none is refused."
    mine, rows = table(tmp_path / "my.csv"), tmp_path / "train.jsonl"
    argv = ["--thought_column", "explanation", "--contract", "entailment", "--splits", "0.6,0.4"]
    assert data_cli(["prepare", "--pairs", str(mine), *argv, "--output", str(rows)]) == 0
    run = "--config minimal_test --model_id tiny-mistral --device cpu --compute_dtype fp32 --max_steps 3".split()
    run += "--max_eval_samples 8 --max_new_tokens 8 --eval_before false --learning_rate 0.05".split()
    run += "--warmup_ratio 0 --max_grad_norm none".split()
    run += ["--train_data", str(rows), "--eval_data", str(tmp_path / "dev.jsonl")]
    run += ["--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "models")]
    for completion in ("cot", "label_only"):
        for seed in ("1", "2"):
            assert not train_cli([*run, "--completion", completion, "--seed", seed])
    runs = sorted(str(p.parent) for p in (tmp_path / "runs").glob("*/*/summary.json"))
    capsys.readouterr()
    assert not compare_cli(runs)
    assert "completion" in capsys.readouterr().out
