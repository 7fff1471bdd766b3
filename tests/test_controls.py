"""Controls: the same pairs, prompts and labels with other thoughts. What each changes, what it leaves alone, and the
rows that it refuses."""

import importlib.util, json, sys, types

import pytest

from nli_ft.process import ConfigError, DataError
from nli_ft.bases import embedded_model, load_tokenizer
from nli_ft.commands import data_cli
from nli_ft.config_loader import load_config
from nli_ft.files import write_jsonl
from nli_ft.preflight import (
    completion_tokens,
    filler_thought,
    prepare,
    preflight,
    preflight_text,
    training_rows,
)
from nli_ft.prompt import mistral_v3_tokenizer
from nli_ft.ready import make_embedded_data
from nli_ft.rows import read_rows, render_completion, sft_row
from nli_ft.sft_rows import shuffle_thoughts

LABELS = dict(binary=(0, 1), three_way=("entailment", "neutral", "contradiction"))
CHANGED = ("prompt", "completion", "thought_process", "thought_of", "own_thought")
COLOURS = "red green blue black white grey brown pink".split()


def box_row(i, labels, **extra):
    label = LABELS[labels][i % len(LABELS[labels])]
    colour = COLOURS[i % 8]
    thought = f"Box {i} is {colour}, and the ball in it is not, so the answer is {label}."
    return sft_row(
        f"r{i}", f"Box {i} is {colour}.", f"Ball {i} is {colour}.", thought, label, "test", "brief", **extra
    )


def false_of(row, seed):
    "Stands in for the generator of the corpus."
    return f"False {seed}: {row['category']} {row['meaning']}, so {row['label']}."


@pytest.fixture
def generator(monkeypatch):
    room = types.ModuleType("nli_ft.corpus_thoughts")
    room.wrong_thought = false_of
    monkeypatch.setitem(sys.modules, "nli_ft.corpus_thoughts", room)


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(load_config("minimal_test", "model_id=tiny-mistral device=cpu"))


@pytest.fixture
def config(tmp_path):
    "A config of 24 training rows and 6 evaluation rows about other boxes."

    def make(labels="binary", strategy="all", rows=None, **more):
        rows = rows or [box_row(i, labels, category="boxes", meaning=f"[{i}]") for i in range(24)]
        write_jsonl(tmp_path / "train.jsonl", rows, overwrite=True)
        write_jsonl(tmp_path / "dev.jsonl", [box_row(i, labels) for i in range(90, 96)], overwrite=True)
        files = dict(train_data=str(tmp_path / "train.jsonl"), eval_data=str(tmp_path / "dev.jsonl"))
        base = dict(model_id="tiny-mistral", device="cpu", compute_dtype="fp32", max_train_samples=None)
        return load_config(
            "minimal_test", base | files | dict(label_set=labels, data_strategy=strategy) | more
        )

    return make


CONTROLS = ("shuffled", "shuffled_any", "permuted", "filler", "wrong_rule")
both_label_sets = pytest.mark.parametrize("labels", LABELS)
every_control = pytest.mark.parametrize("strategy", CONTROLS)


def thoughts(rows):
    return [r["thought_process"] for r in rows]


@both_label_sets
@every_control
def test_a_control_changes_every_thought_and_nothing_else(config, generator, tok, labels, strategy):
    plain, _ = training_rows(config(labels), tok)
    rows, _ = training_rows(config(labels, strategy), tok)
    for old, new in zip(plain, rows, strict=True):
        assert {k: v for k, v in old.items() if k not in CHANGED[1:]} == {
            k: v for k, v in new.items() if k not in CHANGED[1:]
        }
        assert new["thought_process"] != old["thought_process"]
        answer = json.loads(new["completion"][0]["content"])
        assert answer == dict(thought_process=new["thought_process"], predicted_label=old["label"])
        assert new.get("own_thought", old["thought_process"]) == old["thought_process"]


@both_label_sets
@every_control
def test_a_seed_repeats_its_thoughts(config, generator, tok, labels, strategy):
    first, again, other = (
        thoughts(training_rows(config(labels, strategy, seed=seed), tok)[0]) for seed in (1, 1, 2)
    )
    assert first == again
    assert (first == other) == (strategy == "filler"), "dots know no seed"


@both_label_sets
def test_thoughts_of_any_row_come_from_other_rows_and_from_other_labels(config, labels):
    plain, _ = training_rows(config(labels))
    rows, _ = training_rows(config(labels, "shuffled_any"))
    donors = {r["id"]: r for r in plain}
    assert sorted(r["thought_of"] for r in rows) == sorted(donors), "every thought is used once"
    assert all(r["thought_of"] != r["id"] for r in rows)
    assert thoughts(rows) == [donors[r["thought_of"]]["thought_process"] for r in rows]
    crossed = sum(donors[r["thought_of"]]["label"] != r["label"] for r in rows)
    assert crossed > 24 / 4, "by chance about half of the rows, or two thirds"
    within, _ = training_rows(config(labels, "shuffled"))
    assert all(donors[r["thought_of"]]["label"] == r["label"] for r in within)


def test_shuffled_draws_the_donors_that_earlier_versions_drew():
    rows = [box_row(i, "binary") | dict(id=i) for i in range(12)]
    assert [r["thought_of"] for r in shuffle_thoughts(rows)] == [6, 9, 8, 7, 2, 1, 4, 5, 10, 11, 0, 3]
    rows = [box_row(i, "three_way") | dict(id=i) for i in range(12)]
    assert [r["thought_of"] for r in shuffle_thoughts(rows)] == [3, 10, 5, 9, 1, 8, 0, 4, 11, 6, 7, 2]


def test_permuted_words_depend_on_the_row_and_not_on_its_neighbours(config):
    rows, _ = training_rows(config(strategy="permuted"))
    fewer, _ = training_rows(config(strategy="permuted", max_train_samples=8))
    order = {r["id"]: r["thought_process"] for r in rows}
    assert len(fewer) == 8 and all(order[r["id"]] == r["thought_process"] for r in fewer)
    for r in rows:
        assert sorted(r["thought_process"].split()) == sorted(r["own_thought"].split())


def test_two_words_always_change_places_and_a_single_one_is_counted(config, tok):
    def words(*thoughts):
        return [
            sft_row(i, f"Box {i} is shut.", "It is.", t, i % 2, "test", "brief")
            for i, t in enumerate(thoughts)
        ]

    alike = thoughts(training_rows(config(strategy="permuted", rows=words(*["one two three"] * 20)))[0])
    assert len(set(alike)) == 5, "each row draws its own order, and never that of the author"
    cfg = config(strategy="permuted", rows=words("so not", "not so", "so"))
    flight = preflight(prepare(cfg, tok))
    assert flight["thoughts"] == dict(strategy="permuted", odd=1, id=0, thought="not so")
    assert "without two different words, and so as they were: 1" in preflight_text(flight)
    with pytest.raises(DataError, match="none of the 2 rows has two different words"):
        training_rows(config(strategy="permuted", rows=words("so", "so  so")))


STRANGE = [
    "",
    "a",
    "so",
    "Because.",
    "!?",
    '"It is so", he\nsaid',
    "ünïcödé 😀 日本",
    "1 000.5",
    "…",
    " . ",
    "word " * 90,
]


@pytest.mark.parametrize("model", ["mistral v3", "smollm2-135m"])
@pytest.mark.parametrize("style", ["cot", "label_first"])
@both_label_sets
def test_dots_are_exactly_as_many_tokens_as_the_thought(model, style, labels):
    if model == "mistral v3":
        tok = mistral_v3_tokenizer()
    else:
        import transformers

        tok = transformers.AutoTokenizer.from_pretrained(embedded_model(model))
    for thought in STRANGE + thoughts(box_row(i, labels) for i in range(12)):
        for label in LABELS[labels]:
            dots = filler_thought(tok, dict(thought_process=thought, label=label), style)
            assert set(dots) <= set(". ")
            sizes = [completion_tokens(tok, t, label, style) for t in (thought, dots)]
            assert sizes[0] == sizes[1], thought


def test_a_tokenizer_whose_dots_do_not_fit_takes_the_nearest_length():
    "Here a letter is one token, and a dot with its blank three."

    def tok(text, add_special_tokens):
        return dict(input_ids=text.replace(" .", "###").replace('".', '"##'))

    for size in range(0, 40):
        row = dict(thought_process="x" * size, label=1)
        dots = filler_thought(tok, row)
        off = completion_tokens(tok, dots, 1, "cot") - completion_tokens(
            tok, row["thought_process"], 1, "cot"
        )
        assert abs(off) <= 1, (size, off)


def test_dots_are_counted_with_the_tokenizer_of_the_run(config, tok):
    def letters(text, add_special_tokens):
        return dict(input_ids=text)

    rows, _ = training_rows(config(strategy="filler"), letters)
    assert all(abs(len(r["thought_process"]) - len(r["own_thought"])) <= 1 for r in rows)
    assert rows != training_rows(config(strategy="filler"), tok)[0]
    assert training_rows(config(strategy="filler")) == training_rows(config(strategy="filler"), tok)


def test_the_preflight_counts_dots_that_do_not_fit(config, tok):
    prep = prepare(config(strategy="filler"), tok)
    assert "longer or shorter" not in preflight_text(preflight(prep))
    prep.train_rows[5]["thought_process"] += " ."
    assert "filler; completions longer or shorter" in preflight_text(preflight(prep))


@both_label_sets
@every_control
def test_evaluation_rows_and_what_is_known_of_them_stay(config, generator, tok, labels, strategy):
    plain, prep = (prepare(config(labels, how), tok) for how in ("all", strategy))
    assert prep.eval_rows == plain.eval_rows and prep.eval == plain.eval
    assert prep.leakage == plain.leakage and prep.dropped == plain.dropped == []
    before, flight = preflight(plain), preflight(prep)
    assert flight["ok"], flight["proofs"]
    assert flight["labels"] == before["labels"] and flight["rows"] == before["rows"]
    assert flight["tokens"] == before["tokens"] or strategy != "filler"
    assert "thoughts" not in before
    if strategy != "shuffled":  # its reports are older than this line
        assert "".join(prep.train_rows[0]["thought_process"].split())[:40] in "".join(
            preflight_text(flight).split()
        )
    assert prep.train_rows[0]["thought_process"] in prep.tok.decode(prep.train[0].input_ids)


def test_dots_leave_every_row_its_length_whatever_comes_first(config, tok):
    for style in ("cot", "label_first"):
        plain, prep = (prepare(config(strategy=s, completion=style), tok) for s in ("all", "filler"))
        assert [len(e) for e in prep.train] == [len(e) for e in plain.train]
        assert preflight(prep)["ok"]
        answer = json.loads(tok.decode(prep.train[0].input_ids[prep.train[0].n_prompt : -1]))
        assert list(answer)[0] == ("thought_process" if style == "cot" else "predicted_label")


@both_label_sets
def test_false_thoughts_come_from_the_generator_with_the_seed_of_the_run(config, generator, labels):
    rows, _ = training_rows(config(labels, "wrong_rule", seed=7))
    assert rows[1]["thought_process"] == f"False 7: boxes [1], so {LABELS[labels][1]}."


def test_false_thoughts_are_refused_for_a_row_that_has_no_meaning(config, generator, monkeypatch):
    rows = [box_row(i, "binary", category="boxes", meaning="[]") for i in range(8)]
    del rows[5]["meaning"]
    with pytest.raises(DataError, match="wrong_rule: row 'r5' has no meaning.*data/embedded/"):
        training_rows(config(strategy="wrong_rule", rows=rows))
    rows[5]["meaning"] = "[]"
    del rows[6]["category"]
    with pytest.raises(DataError, match="row 'r6' has no category"):
        training_rows(config(strategy="wrong_rule", rows=rows))
    rows[6]["category"] = "boxes"
    own = thoughts(rows)[0]
    monkeypatch.setattr(sys.modules["nli_ft.corpus_thoughts"], "wrong_thought", lambda row, seed: own)
    with pytest.raises(DataError, match="the false thought of row 'r0' is its own"):
        training_rows(config(strategy="wrong_rule", rows=rows))


@every_control
def test_a_row_without_a_thought_is_refused_by_its_name(config, generator, tok, strategy):
    rows = [box_row(i, "binary", category="boxes", meaning="[]") for i in range(8)]
    rows[4]["completion"][0]["content"] = render_completion(None, rows[4]["label"], "label_only")
    del rows[4]["thought_process"]
    with pytest.raises(DataError, match="thoughts cannot be .*: row 'r4' has none"):
        training_rows(config(strategy=strategy, rows=rows), tok)


@every_control
def test_pairs_without_thoughts_have_their_own_message(config, generator, tok, tmp_path, strategy):
    cfg = config(strategy=strategy, contract="entailment")
    pairs = [dict(premise=f"p{i}", hypothesis="h", label="entailment") for i in range(4)]
    write_jsonl(tmp_path / "train.jsonl", pairs, overwrite=True)
    with pytest.raises(DataError, match="holds pairs without thoughts"):
        training_rows(cfg, tok)


def test_a_pair_of_ones_own_is_no_row_of_the_corpus(config, generator, tmp_path):
    pairs = [dict(id=i, premise=f"p{i}", hypothesis="h", label=i % 2, explanation="e") for i in range(4)]
    cfg = config(strategy="wrong_rule", contract="binary")
    write_jsonl(tmp_path / "train.jsonl", pairs, overwrite=True)
    with pytest.raises(DataError, match="row 0 has no meaning"):
        training_rows(cfg)


@every_control
def test_a_control_of_thoughts_contradicts_label_only(strategy):
    for name in ("label_only", "ablation2"):
        with pytest.raises(ConfigError, match="label-only rows have no thoughts.*label_first"):
            load_config(name, f"data_strategy={strategy} completion=label_only")
    load_config("label_first", f"data_strategy={strategy}")


def thought_file(tmp_path):
    rows = [
        dict(id=i, premise=f"p{i}", hypothesis="h", thought_process=f"Number {i} is so.")
        | dict(predicted_label=i % 2, true_label=i % 2)
        for i in range(40)
    ]
    write_jsonl(tmp_path / "t.jsonl", rows, overwrite=True)
    return ["--thoughts", str(tmp_path / "t.jsonl")]


def pair_file(tmp_path):
    rows = [
        dict(id=i, premise=f"p{i}", hypothesis="h", why=f"Number {i} is so.", label=i % 2) for i in range(40)
    ]
    write_jsonl(tmp_path / "p.jsonl", rows, overwrite=True)
    return ["--pairs", str(tmp_path / "p.jsonl"), "--thought_column", "why", "--contract", "binary"]


@pytest.mark.parametrize("source", [thought_file, pair_file])
@pytest.mark.parametrize("strategy", ["shuffled_any", "permuted"])
def test_prepare_writes_these_controls_for_files(tmp_path, capsys, source, strategy):
    def written(strategy, name):
        out = tmp_path / name
        options = ["--strategy", strategy, "--splits", "0.7,0.3", "--output", str(out)]
        assert not data_cli(["prepare", *source(tmp_path), *options])
        return read_rows(out), read_rows(tmp_path / name.replace("train", "dev"))

    for plain, rows in zip(written("reflected", "train_a.jsonl"), written(strategy, "train_b.jsonl")):
        assert [r["id"] for r in plain] == [r["id"] for r in rows], "the split is the same"
        assert all(a["thought_process"] != b["thought_process"] for a, b in zip(plain, rows))
        if strategy == "shuffled_any":
            assert any(r["thought_of"] % 2 != r["label"] for r in rows), "from another label"
            assert sorted(r["thought_of"] for r in rows) == [r["id"] for r in plain]
    written(strategy, "train_c.jsonl")
    assert (tmp_path / "train_b.jsonl").read_bytes() == (tmp_path / "train_c.jsonl").read_bytes()
    assert ("kept as they are" in capsys.readouterr().out) == (strategy == "permuted")


@pytest.mark.parametrize("source", [thought_file, pair_file])
@pytest.mark.parametrize("strategy", ["filler", "wrong_rule", "upside_down"])
def test_prepare_says_which_controls_only_a_run_can_make(tmp_path, capsys, source, strategy):
    out = tmp_path / "train.jsonl"
    with pytest.raises(SystemExit) as e:
        data_cli(["prepare", *source(tmp_path), "--strategy", strategy, "--output", str(out)])
    assert e.value.code == 2 and not out.exists()
    says = (
        f"train with --data_strategy {strategy}"
        if strategy != "upside_down"
        else "The strategies are: reflected"
    )
    assert says in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("nli_ft.corpus_thoughts") is None, reason="needs the generator of the corpus"
)
@pytest.mark.parametrize("name", ["wrong_rule", "three_way_demo"])
def test_the_corpus_has_false_thoughts_for_its_rows(name):
    cfg = load_config(name, "data_strategy=wrong_rule")
    make_embedded_data(cfg)
    rows, _ = training_rows(cfg)
    assert len(rows) == 640 and all(r["thought_process"] != r["own_thought"] for r in rows)
