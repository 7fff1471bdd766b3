"""The synthetic corpus with three labels: balance, labels that model enumeration confirms, thoughts that conclude the
relation, and a gate. The corpus with two labels keeps its bytes."""

import re
from collections import Counter, defaultdict
from functools import lru_cache

import pytest

from nli_ft.corpus import LIMITS_OF_SHORTCUTS, Lookup, check_shortcuts, corpus_cli, outdated, write_corpus
from nli_ft.labels import RELATIONS, THREE_WAY
from nli_ft.meanings import as_meaning, model_relation
from nli_ft.process import ConfigError, DataError
from nli_ft.quadruples import CATEGORIES, GRID_OF, HARDER, NOT_JUDGED, VARIANT_CATEGORIES, generate
from nli_ft.reading import concluded_relation
from nli_ft.rows import data_hash, prompt_messages, read_rows

BINARY_DEMO = dict(  # sha256 of the binary demo corpus, as it was before there were three labels
    train="ce0221f991bf16d1c4ae7248a466fc43285a43ef4545f90cfd5952b356970b52",
    dev="2931c1306b4911ef30422117dbb57013ba876ad6d908ed9fdfc15306f81f275a",
    test="268028779f0c8d18373e9729732e212460110e34dad8e29565328ecae4def74b",
)


@lru_cache(None)
def made():
    return generate("tiny", label_set="three_way")


def all_rows():
    return [r for rows in made().values() for r in rows]


@lru_cache(None)
def enumerated(category, premise, hypothesis):
    return model_relation(premise, hypothesis, CATEGORIES[category].models())


def wrong_labels(rows):
    "Ids whose label is not what enumerating models finds. A premise that no model satisfies raises ValueError."
    return [r["id"] for r in rows if enumerated(r["category"], *as_meaning(r["meaning"])) != r["label"]]


def groups(rows):
    out = defaultdict(list)
    for r in rows:
        out[r["group_id"]].append(r)
    return out


@pytest.mark.every
def test_each_label_has_a_third_of_every_file_and_of_every_category():
    for split, rows in made().items():
        judged = set(VARIANT_CATEGORIES[HARDER.get(split, "plain")]) - set(NOT_JUDGED.get(split, ()))
        assert {r["category"] for r in rows} == judged
        for category in judged:
            count = Counter(r["label"] for r in rows if r["category"] == category)
            assert set(count) == set(RELATIONS) and len(set(count.values())) == 1, (split, category, count)


def test_every_three_rows_in_order_have_three_labels():
    for rows in made().values():
        for i in range(0, len(rows), 3):
            assert {r["label"] for r in rows[i : i + 3]} == set(RELATIONS)


def test_every_hypothesis_of_a_group_has_each_label_once_and_so_has_every_premise_but_in_a_fan():
    for rows in made().values():
        for found in groups(rows).values():
            sides = ["hypothesis"] if GRID_OF[found[0]["category"]] == "fan" else ["premise", "hypothesis"]
            for side in sides:
                counts = Counter((r[side], r["label"]) for r in found)
                assert set(counts.values()) == {1}, found[0]["group_id"]
                assert len(counts) == len(found)


def test_every_label_is_what_enumerating_models_finds_and_a_broken_row_is_seen():
    rows = all_rows()
    assert wrong_labels(rows) == []
    for label in RELATIONS:
        broken = next(r for r in rows if r["label"] != label) | dict(label=label)
        assert wrong_labels([broken]) == [broken["id"]]
    with pytest.raises(ValueError, match="has no model"):
        nothing = ("and", ("true", "b"), ("not", ("true", "b")))
        enumerated("connectives", nothing, ("true", "b"))


def test_the_last_sentence_of_a_thought_concludes_the_label():
    ends = dict(entailment="it must hold", neutral="it may hold or may fail", contradiction="it must fail")
    for r in all_rows():
        last = re.split(r"\. ", r["thought_process"])[-1]
        assert last.endswith(f"{ends[r['label']]}."), r["thought_process"]
        assert concluded_relation(r["thought_process"]) == r["label"], r["thought_process"]


def test_rows_hold_the_word_in_label_relation_and_completion_and_ask_for_three_labels():
    for r in all_rows():
        assert r["label"] == r["relation"] and r["completion"][0]["content"].endswith(f'"{r["label"]}"}}')
        assert r["prompt"] == prompt_messages(r["premise"], r["hypothesis"], "brief", THREE_WAY)


def test_no_pair_comes_twice_and_no_pair_of_wordings_of_train_is_judged():
    pairs = Counter((r["premise"], r["hypothesis"]) for r in all_rows())
    assert [pair for pair, n in pairs.items() if n > 1] == []
    lookup = Lookup().fit(made()["train"])
    for split, rows in made().items():
        assert split == "train" or not any(map(lookup.knows, rows)), split


def test_the_gate_passes_the_corpus_and_states_what_parity_reaches():
    table = check_shortcuts(made())
    limit = LIMITS_OF_SHORTCUTS["three_way"]
    for categories in table.values():
        for category, shares in categories.items():
            assert shares["lookup"] == pytest.approx(1 / 3)
            readers = {name: share for name, share in shares.items() if name not in ("n", "boosted_tree")}
            assert max(readers.values()) <= limit, (category, readers)
            if CATEGORIES[category].turns:
                assert shares["strip_meaning"] == pytest.approx(2 / 3)


def test_the_gate_refuses_labels_that_follow_without_modifiers():
    from nli_ft.corpus import _relation_bared

    rows = [r for r in made()["test"] if r["category"] == "scope"]
    easy = [r | dict(label=_relation_bared("scope", r["meaning"])) for r in rows]
    with pytest.raises(DataError, match="more than 0.67 of a category(.|\n)*strip_meaning is right on 1.000"):
        check_shortcuts(dict(train=made()["train"], test=easy))


def test_the_command_writes_files_that_name_their_label_set_and_that_the_package_reads(tmp_path, capsys):
    corpus_cli(["--size", "demo", "--label_set", "three_way", "--out", str(tmp_path / "c")])
    assert re.findall(r"(\d+) rows", capsys.readouterr().out) == ["648", "120", "240"]
    rows = read_rows(tmp_path / "c" / "train.jsonl", "sft")
    assert Counter(r["label"] for r in rows) == dict.fromkeys(RELATIONS, 216)
    assert outdated(tmp_path / "c", "demo", label_set="three_way") is None
    assert outdated(tmp_path / "c", "demo") == "its label_set is 'three_way', not 'binary'"


def test_a_corpus_with_two_labels_keeps_its_bytes(tmp_path):
    write_corpus(tmp_path, "demo")
    assert {split: data_hash(tmp_path / f"{split}.jsonl") for split in BINARY_DEMO} == BINARY_DEMO
    assert "label_set" not in (tmp_path / "manifest.json").read_text()


def test_an_unknown_label_set_is_a_config_error():
    with pytest.raises(ConfigError, match="unknown label set 'four': choose one of binary, three_way"):
        generate("demo", label_set="four")
