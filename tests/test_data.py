"""Rows across files and processes: bad input of every kind, the real sample, splits, checks, the commands."""

import gzip, json, os, subprocess, sys

import pytest

from nli_ft.process import DataError, project_root
from nli_ft.public_sets import SOURCES, download
from nli_ft.rows import BadRows, data_hash, prompt_messages, read_rows, sft_row, template_of, text_to_sft
from nli_ft.check import check_files, plot_stats, render_report
from nli_ft.commands import data_cli
from nli_ft.duplicates import norm_text
from nli_ft.sft_rows import write_sft
from nli_ft.files import write_jsonl

SHARED = project_root().parent / "shared" / "data"
SAMPLE, ESNLI = SHARED / "mistral_nli_sample", SHARED / "esnli" / "dev.jsonl"
needs_sample = pytest.mark.skipif(not SAMPLE.exists(), reason="the real sample is not here")
needs_esnli = pytest.mark.skipif(not ESNLI.exists(), reason="e-SNLI is not here")
PAIR = dict(id=0, premise="A dog sleeps.", hypothesis="An animal sleeps.", label=1)


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def why(path, **kw):
    with pytest.raises(DataError) as e:
        read_rows(path, **kw)
    return str(e.value)


def run(*args, **kw):
    return subprocess.run(
        [sys.executable, "-m", "nli_ft.commands", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=project_root(),
        **kw,
    )


# ---- bad input


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    assert read_rows(put(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines(PAIR)))[0] == PAIR
    row = read_rows(put(tmp_path / "a.csv", "\ufeffpremise,hypothesis,label\nP,H,1\n"))[0]
    assert row == dict(id=0, premise="P", hypothesis="H", label=1)


def test_windows_line_ends_are_read_and_the_line_numbers_stay_right(tmp_path):
    rows = read_rows(put(tmp_path / "a.jsonl", lines(PAIR, PAIR | dict(id=1)).replace(b"\n", b"\r\n")))
    assert [r["id"] for r in rows] == [0, 1]
    assert "a.csv:3: label '7'" in why(
        put(tmp_path / "a.csv", "premise,hypothesis,label\r\nP,H,1\r\nP,H,7\r\n")
    )


def test_a_quoted_newline_in_csv_stays_in_the_text_and_later_lines_are_still_named(tmp_path):
    f = put(tmp_path / "a.csv", 'premise,hypothesis,label\n"two\nlines, one premise","say ""hi""",0\nP,H,9\n')
    rows = read_rows(f, max_bad=0.5)
    assert rows[0]["premise"] == "two\nlines, one premise" and rows[0]["hypothesis"] == 'say "hi"'
    assert rows.bad == [(4, "label '9' is not 0 or 1")]


def test_an_unclosed_quote_in_csv_is_named_by_the_line_it_opens_on(tmp_path):
    assert "a.csv:3: not CSV" in why(
        put(tmp_path / "a.csv", 'premise,hypothesis,label\nP,H,1\n"open,H,1\nP,H,0\n')
    )


def test_a_missing_column_is_named_with_the_columns_that_were_found(tmp_path):
    msg = why(put(tmp_path / "a.csv", "premise,conclusion,label\nP,H,1\n"))
    assert (
        "missing column hypothesis (for pair rows)" in msg
        and "The file has: premise, conclusion, label" in msg
    )
    msg = why(put(tmp_path / "a.jsonl", lines(dict(premise="P", hypothesis="H"))))
    assert "missing column label" in msg


def test_a_row_that_lacks_a_key_is_bad_and_its_file_is_not(tmp_path):
    f = put(tmp_path / "a.jsonl", lines(PAIR, dict(id=1, premise="P", label=0), PAIR | dict(id=2)))
    assert read_rows(f, max_bad=0.4).bad == [(2, "missing hypothesis")]


def test_the_second_row_of_an_id_is_bad_and_names_the_first(tmp_path):
    assert "a.jsonl:2: id 0 was used on line 1 already" in why(put(tmp_path / "a.jsonl", lines(PAIR, PAIR)))


@pytest.mark.parametrize("label,want", [(0, 0), (1, 1), (0.0, 0), (1.0, 1), ("0", 0), ("1", 1), ("1.0", 1)])
def test_labels_are_taken_as_integers_floats_or_text(tmp_path, label, want):
    row = read_rows(put(tmp_path / "a.jsonl", lines(PAIR | dict(label=label))))[0]
    assert row["label"] == want and type(row["label"]) is int


@pytest.mark.parametrize(
    "label,what",
    [
        ("entailment", "name a contract"),
        (-1, "no gold label"),
        ("-", "no gold label"),
        (2, "not 0 or 1"),
        (0.5, "not 0 or 1"),
        (True, "not 0 or 1"),
        (None, "empty"),
        ("", "empty"),
        ([1], "not 0 or 1"),
    ],
)
def test_other_labels_are_refused_by_name(tmp_path, label, what):
    assert what in why(put(tmp_path / "a.jsonl", lines(PAIR | dict(label=label))))


@pytest.mark.parametrize(
    "text,what",
    [
        ("", "premise is empty"),
        (" \n", "premise is empty"),
        (None, "missing premise"),
        (5, "premise is of type int"),
        ("a\0b", "NUL bytes"),
        ("broken \ud800", "invalid UTF-8"),
    ],
)
def test_a_premise_that_is_no_text_is_named(tmp_path, text, what):
    assert what in why(put(tmp_path / "a.jsonl", lines(PAIR | dict(premise=text))))


def test_a_premise_of_100_kB_is_long_but_not_broken(tmp_path):
    long = "word " * 40_000
    assert read_rows(put(tmp_path / "a.jsonl", lines(PAIR | dict(premise=long))))[0]["premise"] == long
    assert read_rows(put(tmp_path / "a.csv", f"premise,hypothesis,label\n{long},H,1\n"))[0]["premise"] == long
    rep = check_files([tmp_path / "a.jsonl"])
    assert next(f["n"] for f in rep["files"][0]["findings"] if f["check"] == "rows over the token limit") == 1


def test_invalid_utf8_spoils_its_own_row_only(tmp_path):
    f = put(
        tmp_path / "a.jsonl",
        lines(PAIR) + b'{"id": 1, "premise": "caf\xe9", "hypothesis": "H", "label": 0}\n',
    )
    assert read_rows(f, max_bad=0.5).bad == [(2, "invalid UTF-8 at byte 26 of the line")]
    rows = read_rows(put(tmp_path / "a.csv", b"premise,hypothesis,label\ncaf\xe9,H,1\nP,H,0\n"), max_bad=0.5)
    assert len(rows) == 1 and rows.bad == [(2, "premise holds invalid UTF-8 at character 4")]


def test_utf16_is_recognised_and_the_conversion_named(tmp_path):
    assert "iconv -f UTF-16" in why(
        put(tmp_path / "a.csv", "premise,hypothesis,label\nP,H,1\n".encode("utf-16"))
    )


def test_a_json_array_where_lines_were_expected_is_told_how_to_become_lines(tmp_path):
    assert "jq -c '.[]' a.json" in why(put(tmp_path / "a.json", json.dumps([PAIR], indent=1)))


def test_an_empty_file_a_blank_file_and_a_header_alone_are_refused(tmp_path):
    for name, data in (
        ("a.jsonl", ""),
        ("b.jsonl", "\n \n\n"),
        ("c.csv", "premise,hypothesis,label\n"),
        ("d.csv", ""),
    ):
        assert "holds no rows" in why(put(tmp_path / name, data))


def test_a_directory_and_a_missing_file_are_named_as_such(tmp_path):
    assert "is a directory" in why(tmp_path)
    assert "no such file" in why(tmp_path / "nope.jsonl")


def test_gzip_is_known_by_its_bytes_and_damage_to_it_is_named(tmp_path):
    packed = gzip.compress(lines(PAIR, PAIR | dict(id=1)))
    for name in ("a.jsonl.gz", "a.jsonl"):
        assert len(read_rows(put(tmp_path / name, packed))) == 2
    assert "damaged gzip" in why(put(tmp_path / "cut.jsonl.gz", packed[:-12]))


def test_raw_nul_bytes_are_named(tmp_path):
    assert "NUL" in why(
        put(tmp_path / "a.jsonl", b'{"id": 1, "premise": "a\0", "hypothesis": "H", "label": 1}\n')
    )
    assert "NUL" in why(put(tmp_path / "a.csv", b"premise,hypothesis,label\na\0b,H,1\n"))


@pytest.mark.parametrize(
    "line,what",
    [
        (b'{"id": 1', "not JSON"),
        (b'"text"', "a JSON str"),
        (b"null", "a JSON NoneType"),
        (b"[" * 3, "JSON array"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"hello", "not JSON"),
    ],
)
def test_lines_that_are_no_object_are_bad(tmp_path, line, what):
    assert what in why(put(tmp_path / "a.jsonl", line + b"\n"))


def test_a_file_over_its_share_of_bad_rows_is_refused_with_the_first_few(tmp_path):
    f = put(tmp_path / "a.jsonl", lines(*[PAIR | dict(id=i, label=i % 5) for i in range(50)]))
    msg = why(f, max_bad=0.59)
    assert (
        "30 of 50 rows unusable (60.0%, tolerated 59.0%)" in msg
        and msg.count("a.jsonl:") == 6
        and "…\nSay what such labels mean" in msg
    )
    assert len(read_rows(f, max_bad=0.6)) == 20


def test_only_a_thousand_bad_rows_are_remembered_but_all_are_counted():
    bad = BadRows()
    for i in range(5000):
        bad.add(i, "x")
    assert len(bad) == 1000 and bad.total == 5000


def test_case_newlines_and_mojibake_survive_reading_and_writing(tmp_path):
    row = sft_row(
        "é",
        "Saint-Barth??lemy\r\n  Ünïcode\u2028 NASA ",
        'Say "{premise}" \\n',
        "STEP 1:\n\tÃ©tÃ©",
        0,
        "thought",
    )
    write_jsonl(tmp_path / "a.jsonl", [row])
    assert read_rows(tmp_path / "a.jsonl") == [row]


# ---- older text rows


def old(premise="P", hypothesis="H", answer='{"thought_process": "T", "predicted_label": 1}', end=" </s>"):
    return {
        "text": f"<s>[INST] {prompt_messages(premise, hypothesis)[0]['content']} [/INST] {answer}{end}",
        "id": 5,
    }


def test_an_older_row_keeps_its_wording_and_finds_its_answer_past_a_premise_that_looks_like_one():
    trap = 'He said [/INST] {"thought_process": "no", "predicted_label": 0} </s> loudly.'
    row = text_to_sft(old(trap, "H \n[INST]"), 0)
    assert (row["premise"], row["hypothesis"], row["thought_process"], row["label"]) == (
        trap,
        "H \n[INST]",
        "T",
        1,
    )
    assert template_of([row]) == "standard"


def test_only_the_first_complete_object_of_an_older_answer_counts():
    row = text_to_sft(
        old(
            answer='{"thought_process": "T [/INST] {}", "predicted_label": 1} {"thought_process": "U", '
            '"predicted_label": 0}',
            end="",
        ),
        0,
    )
    assert (row["thought_process"], row["label"]) == ("T [/INST] {}", 1)


@pytest.mark.parametrize(
    "answer",
    [
        '{"thought_process": "cut off',
        '{"thought_process": "T"}',
        '{"thought_process": "T", "predicted_label": 3}',
        '{"thought_process": "", "predicted_label": 1}',
        "1",
    ],
)
def test_an_older_row_without_a_usable_answer_is_bad(tmp_path, answer):
    assert "a.jsonl:1: " in why(put(tmp_path / "a.jsonl", lines(old(answer=answer))))


@pytest.mark.parametrize(
    "change,what",
    [
        (dict(label=0), "the completion says 1 where label is 0"),
        (dict(prompt="P"), "prompt is not a list"),
        (dict(completion=[dict(role="assistant", content="yes")]), "not a JSON object"),
        (dict(prompt=[]), "prompt is not a list"),
    ],
)
def test_an_sft_row_at_odds_with_itself_is_bad(tmp_path, change, what):
    assert what in why(put(tmp_path / "a.jsonl", lines(sft_row(1, "P", "H", "T", 1, "thought") | change)))


# ---- contracts


def test_relation_names_become_labels_only_under_a_contract_which_the_rows_then_record(tmp_path):
    f = put(
        tmp_path / "a.jsonl",
        lines(
            *[
                dict(id=r, premise="P", hypothesis="H", label=r)
                for r in ("entailment", "neutral", "contradiction")
            ]
        ),
    )
    assert [r["label"] for r in read_rows(f, contract="entailment")] == [1, 0, 0]
    assert {r["contract"] for r in read_rows(f, contract="entailment")} == {"entailment"}
    assert "--contract" not in why(f) and "name a contract" in why(f)
    assert "no label contract 'mine'" in why(f, contract="mine")


def test_the_course_contract_depends_on_the_data_set(tmp_path):
    rows = [
        dict(id=f"{d}{r}", premise="P", hypothesis="H", label=r, dataset=d)
        for d in ("snli", "multi_nli")
        for r in ("entailment", "neutral", "contradiction")
    ]
    got = read_rows(put(tmp_path / "a.jsonl", lines(*rows)), contract="course", max_bad=0.5)
    assert {r["id"]: r["label"] for r in got} == {
        "snlientailment": 1,
        "snlicontradiction": 0,
        "multi_nlineutral": 1,
        "multi_nlicontradiction": 0,
    }


def test_a_label_that_its_own_contract_does_not_give_is_bad(tmp_path):
    row = PAIR | dict(relation="neutral", contract="entailment")
    assert "not what contract 'entailment' makes of 'neutral'" in why(put(tmp_path / "a.jsonl", lines(row)))
    assert "where 'binary' was declared" in why(
        put(tmp_path / "a.jsonl", lines(PAIR | dict(contract="course"))), contract="binary"
    )


# ---- prepare


def thought(i, pred, gold, **kw):
    return dict(
        id=i,
        premise=f"Premise {i}",
        hypothesis=f"H{i}",
        thought_process=f"T{i}",
        predicted_label=pred,
        true_label=gold,
        **kw,
    )


@pytest.fixture
def stages(tmp_path):
    "60 thoughts, every third wrong, and reflections on those."
    t, r = tmp_path / "t.jsonl", tmp_path / "r.jsonl"
    write_jsonl(t, [thought(i, i % 2 ^ (i % 3 == 0), i % 2) for i in range(60)])
    write_jsonl(
        r,
        [
            thought(i, i % 2, i % 2, error_analysis="E", improved_thought_process=f"I{i}")
            for i in range(0, 60, 3)
        ],
    )
    return t, r


@needs_sample
def test_the_real_sample_gives_the_published_100_rows(tmp_path):
    counts = write_sft(
        SAMPLE / "sample_thoughts.json", SAMPLE / "sample_reflections.json", tmp_path / "ft.jsonl"
    )
    ours, theirs = (
        {r["id"]: r for r in read_rows(f)} for f in (tmp_path / "ft.jsonl", SAMPLE / "sample_ft.jsonl")
    )
    improved = {r["id"]: r["improved_thought_process"] for r in read_rows(SAMPLE / "sample_reflections.json")}
    assert len(ours) == 100 and ours.keys() == theirs.keys()
    for i in ours:
        for k in ("prompt", "premise", "hypothesis", "label"):
            assert ours[i][k] == theirs[i][k]
        # The published thoughts of the 33 reflected rows stand in neither input file (they come from
        # another reflection run):
        # ours are the improved thoughts of the reflections that were given.
        assert ours[i]["thought_process"] == improved.get(i, theirs[i]["thought_process"])
    raw = (SAMPLE / "sample_thoughts.json").read_text("utf8") + (
        SAMPLE / "sample_reflections.json"
    ).read_text("utf8")
    assert len(improved) == 33 and not any(
        json.dumps(theirs[i]["thought_process"])[1:-1] in raw for i in improved
    )
    assert (
        counts["thoughts right"] == 67
        and counts["reflections used"] == 33
        and counts["reflections whose own label is not gold"] == 1
    )


@needs_sample
def test_a_reflection_that_did_not_reach_gold_can_be_left_out(tmp_path):
    counts = write_sft(
        SAMPLE / "sample_thoughts.json",
        SAMPLE / "sample_reflections.json",
        tmp_path / "ft.jsonl",
        drop_wrong=True,
    )
    assert counts["written"] == {str(tmp_path / "ft.jsonl"): 99}
    assert 90 not in {r["id"] for r in read_rows(tmp_path / "ft.jsonl")}


@pytest.mark.parametrize(
    "strategy,n,first",
    [
        ("reflected", 60, '{"thought_process": "T1", "predicted_label": 1}'),
        ("correct_only", 40, '{"thought_process": "T1", "predicted_label": 1}'),
        ("label_only", 60, '{"predicted_label": 1}'),
        ("label_first", 60, '{"predicted_label": 1, "thought_process": "T1"}'),
    ],
)
def test_each_strategy_changes_one_thing(stages, tmp_path, strategy, n, first):
    t, r = stages
    write_sft(t, r, tmp_path / "o.jsonl", strategy)
    rows = read_rows(tmp_path / "o.jsonl")
    assert len(rows) == n and rows[0]["completion"][0]["content"] == first


def test_shuffled_thoughts_change_rows_but_not_labels(stages, tmp_path):
    t, r = stages
    (
        write_sft(t, r, tmp_path / "a.jsonl"),
        write_sft(t, r, tmp_path / "b.jsonl", "shuffled"),
        write_sft(t, r, tmp_path / "c.jsonl", "shuffled"),
    )
    a, b = read_rows(tmp_path / "a.jsonl"), read_rows(tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert [(x["id"], x["label"], x["prompt"]) for x in a] == [(x["id"], x["label"], x["prompt"]) for x in b]
    assert all(x["thought_process"] != y["thought_process"] for x, y in zip(a, b))
    label = {x["thought_process"]: x["label"] for x in a}
    assert all(label[y["thought_process"]] == y["label"] for y in b)


def test_splits_share_no_premise_and_lose_no_row(tmp_path):
    rows = [
        thought(i, 1, 1) | dict(premise=f"{'THE' if i % 3 else 'the'}  premise {i // 3}") for i in range(900)
    ]
    write_jsonl(tmp_path / "t.jsonl", rows)
    write_sft(tmp_path / "t.jsonl", None, tmp_path / "train_ft.jsonl", "correct_only", [0.8, 0.1, 0.1])
    got = {s: read_rows(tmp_path / f"{s}_ft.jsonl") for s in ("train", "dev", "test")}
    premises = {s: {norm_text(r["premise"]) for r in got[s]} for s in got}
    assert (
        sum(map(len, got.values())) == 900
        and not premises["train"] & premises["dev"]
        and not (premises["train"] | premises["dev"]) & premises["test"]
    )
    assert 660 < len(got["train"]) < 780 and len(got["dev"]) > 40 and len(got["test"]) > 40


def test_a_failed_prepare_leaves_nothing_and_replaces_nothing(stages, tmp_path):
    t, r = stages
    out = put(tmp_path / "train_ft.jsonl", "mine\n")
    with pytest.raises(DataError, match="--overwrite"):
        write_sft(t, r, out)
    write_jsonl(tmp_path / "bad.jsonl", [thought(i, 1, 1 if i else 9) for i in range(5)])
    with pytest.raises(DataError, match="bad.jsonl:1: true_label 9"):
        write_sft(tmp_path / "bad.jsonl", None, out, "correct_only", overwrite=True)
    with pytest.raises(DataError, match="no rows for"):
        write_sft(t, r, out, splits=[0.9999999, 0.0000001], overwrite=True)
    assert out.read_text() == "mine\n" and not list(tmp_path.glob("*.part"))
    write_sft(t, r, out, overwrite=True)
    assert len(read_rows(out)) == 60


def test_a_reflection_must_belong_to_a_wrong_thought_of_the_same_pair_and_gold(stages, tmp_path):
    t, _ = stages
    for change, what in (
        (dict(id=1), "no thought has this id"),
        (dict(premise="other"), "no thought"),
        (dict(true_label=1), "no thought"),
        (dict(id=1, premise="Premise 1", hypothesis="H1", true_label=1), "right already"),
    ):
        write_jsonl(
            tmp_path / "r2.jsonl", [thought(0, 0, 0, improved_thought_process="I") | change], overwrite=True
        )
        with pytest.raises(DataError, match=what):
            write_sft(t, tmp_path / "r2.jsonl", tmp_path / "o.jsonl")


def test_rows_of_two_contracts_are_mixed_only_when_told(tmp_path):
    write_jsonl(
        tmp_path / "t.jsonl",
        [thought(0, 1, 1, contract="entailment"), thought(1, 0, 1, contract="entailment")],
    )
    write_jsonl(tmp_path / "r.jsonl", [thought(1, 1, 1, improved_thought_process="I", contract="course")])
    with pytest.raises(DataError, match="course and entailment meet"):
        write_sft(tmp_path / "t.jsonl", tmp_path / "r.jsonl", tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()
    write_sft(tmp_path / "t.jsonl", tmp_path / "r.jsonl", tmp_path / "o.jsonl", mix=True)
    assert [r["contract"] for r in read_rows(tmp_path / "o.jsonl")] == ["entailment", "course"]


def test_a_declared_contract_is_recorded_in_every_row(stages, tmp_path):
    t, r = stages
    write_sft(t, r, tmp_path / "o.jsonl", contract="course")
    assert {x["contract"] for x in read_rows(tmp_path / "o.jsonl")} == {"course"}


# ---- check


def finding(rep, name, file=-1):
    return next(f for f in rep["files"][file]["findings"] if f["check"] == name)


@needs_sample
def test_check_on_the_real_sample_finds_what_is_in_it(tmp_path):
    rep = check_files([SAMPLE / "sample_ft.jsonl"])
    assert rep["verdict"] == "WARN" and finding(rep, "mojibake")["examples"] == ["id 1"]
    assert (
        finding(rep, "thoughts against their label")["n"] == 0
        and finding(rep, "thoughts against their label")["of"] >= 80
    )
    write_sft(SAMPLE / "sample_thoughts.json", SAMPLE / "sample_reflections.json", tmp_path / "ft.jsonl")
    rep = check_files([tmp_path / "ft.jsonl"])
    assert finding(rep, "thoughts against their label")["examples"] == [
        "id 90"
    ]  # the reflection that kept the wrong label
    assert finding(rep, "thoughts that show gold was given")["examples"] == ["id 94 ('true label')"]


@needs_esnli
def test_hypothesis_only_beats_the_majority_on_esnli(tmp_path):
    counts = download(tmp_path / "e.jsonl", "esnli", "dev", ESNLI)
    assert counts == {"rows": 9842, "label 0": 6513, "label 1": 3329, "bad rows": 0}
    rep = check_files([tmp_path / "e.jsonl"], baseline_rows=1500, near_rows=2000)
    assert finding(rep, "hypothesis-only baseline")["of"] == 1500
    b = rep["files"][0]["baselines"]
    assert b["overlap"]["accuracy"] > b["majority"]["accuracy"]


def test_check_counts_leakage_in_the_later_file_and_fails(tmp_path):
    a = [
        sft_row(i, f"Premise {i % 10}.", f"Hypothesis {i}.", "T", i % 2, "thought", contract="binary")
        for i in range(20)
    ]
    b = [
        a[3] | dict(premise="PREMISE  3."),
        sft_row(100, "Premise 4.", "Another hypothesis.", "T", 0, "thought", contract="binary"),
        sft_row(101, "New.", "New.", "T", 1, "thought", contract="binary"),
    ]
    write_jsonl(tmp_path / "a.jsonl", a), write_jsonl(tmp_path / "b.jsonl", b)
    rep = check_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert (
        finding(rep, "pairs in an earlier file")["n"],
        finding(rep, "premises in an earlier file")["n"],
        rep["verdict"],
    ) == (1, 2, "FAIL")
    assert finding(rep, "pairs in an earlier file", 0)["n"] == 0
    assert (
        finding(rep, "premises in an earlier file", 0)["n"] == 0
    )  # a premise may occur twice within its own file
    assert check_files([tmp_path / "a.jsonl"])["verdict"] == "OK"


def test_check_tells_repeated_pairs_from_contradicting_ones_and_from_near_duplicates(tmp_path):
    long = "The committee of nine members met in the old town hall on Tuesday evening to talk about the new bridge"
    pairs = [
        ("P one", "H one", 1),
        ("p  ONE", "h one", 1),
        ("P one", "H one", 0),
        ("P one", "H one ", 1),
        (long, "They met.", 1),
        (long + " again", "They met!", 1),
        (long, "They did not meet.", 1),
        ("Now " + long, "They met", 0),
    ]
    write_jsonl(
        tmp_path / "a.jsonl",
        [dict(id=i, premise=p, hypothesis=h, label=l) for i, (p, h, l) in enumerate(pairs)],
    )
    rep = check_files([tmp_path / "a.jsonl"])
    assert [
        finding(rep, n)["n"] for n in ("repeated pairs", "pairs with both labels", "near-duplicates")
    ] == [3, 1, 1]  # the last row differs from its near-duplicates in its label
    assert "id 5 ~" in finding(rep, "near-duplicates")["examples"][0]


def test_check_names_bad_rows_and_goes_on(tmp_path):
    put(tmp_path / "a.jsonl", lines(PAIR) + b"oops\n" + lines(PAIR | dict(id=1, label=0)))
    rep = check_files([tmp_path / "a.jsonl"])
    assert (
        finding(rep, "bad rows")["n"] == 1
        and "line 2: not JSON" in finding(rep, "bad rows")["examples"][0]
        and rep["files"][0]["rows"] == 2
        and rep["verdict"] == "FAIL"
    )
    rows = [
        dict(id=i, premise="P", hypothesis=f"H{i}", label=r) for i, r in enumerate(("neutral", "entailment"))
    ]
    write_jsonl(tmp_path / "three.jsonl", rows)
    assert finding(check_files([tmp_path / "three.jsonl"]), "bad rows")["n"] == 2
    assert check_files([tmp_path / "three.jsonl"], contract="entailment")["verdict"] == "OK"
    put(tmp_path / "empty.jsonl", "")
    rep = check_files([tmp_path / "empty.jsonl"])
    assert rep["verdict"] == "FAIL" and "holds no rows" in render_report(rep)


def test_token_counts_come_from_the_tokenizer_that_is_given(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [sft_row(i, "P", f"H{i}", "T", i % 2, "thought") for i in range(4)])
    rep = check_files([tmp_path / "a.jsonl"], tokens=lambda texts: [700] * len(texts))
    assert (
        finding(rep, "rows over the token limit")["n"] == 4
        and rep["verdict"] == "FAIL"
        and rep["tokens"] == "counted"
    )


# ---- the commands


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, nli_ft.commands; sys.exit(', "
        "'.join({'torch','datasets','matplotlib','pandas','numpy','sklearn','transformers'} & "
        "set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project_root())
    assert out.stderr.strip() == "", out.stderr
    for cmd in ([], ["prepare"], ["check"], ["stats"], ["download"]):
        out = run(*cmd, "--help", timeout=10)
        assert out.returncode == 0 and "usage: nli_data" in out.stdout


def test_the_commands_end_with_the_right_exit_code(stages, tmp_path):
    t, r = stages
    args = [
        "prepare",
        "--thoughts",
        t,
        "--reflections",
        r,
        "--output",
        tmp_path / "train_ft.jsonl",
        "--contract",
        "binary",
        "--splits",
        "0.5,0.5",
    ]
    out = run(*args)
    assert out.returncode == 0 and "rows written to" in out.stdout, out.stderr
    out = run(*args)
    assert (
        out.returncode == 2
        and out.stderr.startswith("error: ")
        and "--overwrite" in out.stderr
        and "Traceback" not in out.stderr
    )
    assert run(*args, "--overwrite").returncode == 0
    out = run("check", tmp_path / "train_ft.jsonl", tmp_path / "dev_ft.jsonl", "--json")
    assert out.returncode == 0 and json.loads(out.stdout)["verdict"] == "OK", out.stdout
    out = run("check", tmp_path / "train_ft.jsonl", tmp_path / "train_ft.jsonl")
    assert out.returncode == 2 and "verdict: FAIL" in out.stdout
    assert run("check", tmp_path / "nope.jsonl").returncode == 2
    assert run("prepare", "--thoughts", t).returncode == 2
    out = run("check", tmp_path / "train_ft.jsonl", "--tokenizer", tmp_path)
    assert out.returncode == 2 and "cannot be loaded" in out.stderr


def test_stats_draws_and_does_not_overwrite(stages, tmp_path):
    t, _ = stages
    assert data_cli(["stats", str(t), "--out", str(tmp_path / "s.html")]) == 0
    assert "<img" in (tmp_path / "s.html").read_text()
    with pytest.raises(SystemExit) as e:
        data_cli(["stats", str(t), "--out", str(tmp_path / "s.html")])
    assert e.value.code == 2
    assert data_cli(["stats", str(t), str(t), "--out", str(tmp_path / "s.png")]) == 0
    assert len(plot_stats(read_rows(t)).axes) == 5


# ---- public sets in their own columns

LAYOUTS = dict(
    snli=[dict(premise="P", hypothesis="H", label=l) for l in (0, 1, 2, -1)],
    multi_nli=[
        dict(
            promptID=1,
            pairID=f"{l}n",
            premise="P",
            premise_binary_parse="( P )",
            premise_parse="(X)",
            hypothesis="H",
            hypothesis_binary_parse="",
            hypothesis_parse="",
            genre="fiction",
            label=l,
        )
        for l in (0, 1, 2, -1)
    ],
    esnli=[
        dict(
            premise="P", hypothesis="H", label=l, explanation_1="because", explanation_2="", explanation_3=""
        )
        for l in (0, 1, 2, -1)
    ],
    anli=[dict(uid=f"u{l}", premise="P", hypothesis="H", label=l, reason="so") for l in (0, 1, 2, -1)],
    hans=[
        dict(
            premise="P",
            hypothesis="H",
            label=l,
            parse_premise="",
            parse_hypothesis="",
            binary_parse_premise="",
            binary_parse_hypothesis="",
            heuristic="subsequence",
            subcase="sn",
            template="temp1",
        )
        for l in (0, 1, 1, -1)
    ],
)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ext", ["jsonl", "parquet"])
def test_each_public_layout_becomes_pairs_with_its_contract(tmp_path, name, ext):
    src = tmp_path / f"src.{ext}"
    if ext == "jsonl":
        put(src, lines(*LAYOUTS[name]))
    else:
        import pyarrow as pa, pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(LAYOUTS[name]), src)
    counts = download(tmp_path / "o.jsonl", name, "validation", src)
    rows = read_rows(tmp_path / "o.jsonl")
    assert [r["label"] for r in rows] == [1, 0, 0] and counts["no gold label (left out)"] == 1
    assert (
        {r["contract"] for r in rows} == {SOURCES[name]["contract"]}
        and rows[0]["relation"] == "entailment"
        and rows[0]["dataset"] == name
        and rows[0]["split"] == "validation"
    )


def test_the_original_snli_columns_are_known_too(tmp_path):
    src = put(
        tmp_path / "snli_1.0_dev.txt",
        "gold_label\tsentence1\tsentence2\nneutral\tP\tH\n-\tP\tH\nentailment\tP\tH\n",
    )
    assert download(tmp_path / "o.jsonl", "snli", "dev", src)["no gold label (left out)"] == 1
    assert [(r["label"], r["relation"]) for r in read_rows(tmp_path / "o.jsonl")] == [
        (0, "neutral"),
        (1, "entailment"),
    ]


def test_another_contract_can_be_asked_for_and_a_hub_id_needs_one(tmp_path):
    src = put(tmp_path / "m.jsonl", lines(*LAYOUTS["multi_nli"][1:3]))
    download(tmp_path / "o.jsonl", "multi_nli", "dev", src, contract="course")
    assert [(r["relation"], r["label"]) for r in read_rows(tmp_path / "o.jsonl")] == [
        ("neutral", 1),
        ("contradiction", 0),
    ]
    with pytest.raises(DataError, match="--contract"):
        download(tmp_path / "p.jsonl", "me/mine", "dev", src)
    with pytest.raises(DataError, match="--names"):
        download(tmp_path / "p.jsonl", "me/mine", "dev", src, contract="entailment")
    download(
        tmp_path / "p.jsonl",
        "me/mine",
        "dev",
        src,
        contract="entailment",
        names=("contradiction", "entailment", "neutral"),
    )
    assert [r["relation"] for r in read_rows(tmp_path / "p.jsonl")] == ["entailment", "neutral"]


def test_a_wrong_layout_names_the_column_and_leaves_nothing(tmp_path):
    src = put(tmp_path / "x.jsonl", lines(dict(question="P", answer="H", label=0)))
    with pytest.raises(
        DataError, match="missing column premise or sentence1. The file has: question, answer, label"
    ):
        download(tmp_path / "o.jsonl", "snli", "dev", src)
    assert not (tmp_path / "o.jsonl").exists() and not list(tmp_path.glob("*.part"))


@needs_sample
def test_the_published_rows_are_converted_by_the_same_path(tmp_path):
    assert download(tmp_path / "o.jsonl", from_file=SAMPLE / "sample_ft.jsonl", published=True)["rows"] == 100
    rows = read_rows(tmp_path / "o.jsonl")
    assert rows.kind == "sft" and {r["contract"] for r in rows} == {"course"}


def test_offline_the_download_says_what_it_needed_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    for k in list(os.environ):
        if k.lower().endswith("_proxy"):
            monkeypatch.delenv(k)
    with pytest.raises(
        DataError,
        match="stanfordnlp/snli .split train. could not be loaded: no network\n  it needs a network",
    ):
        download(tmp_path / "o.jsonl", "snli")
    assert not list(tmp_path.iterdir())


# ---- streaming


def test_reading_streams_and_its_memory_does_not_hold_the_rows(tmp_path):
    f = tmp_path / "big.jsonl"
    write_jsonl(
        f,
        (
            dict(id=i, premise=f"Premise {i} " + "x" * 1000, hypothesis="H", label=i % 2)
            for i in range(40_000)
        ),
    )
    code = (
        f"import resource, nli_ft.rows as d; base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"print(sum(1 for _ in d.iter_rows({str(f)!r})), "
        "(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-base)//1024)"
    )
    n, mib = map(
        int,
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=project_root(), check=True
        ).stdout.split(),
    )
    assert n == 40_000 and mib < 12, f"{mib} MiB for a file of {f.stat().st_size >> 20} MiB"


def test_a_hash_is_that_of_the_bytes_on_disk(tmp_path):
    import hashlib

    f = put(tmp_path / "a.jsonl", lines(PAIR))
    assert data_hash(f) == read_rows(f).sha256 == hashlib.sha256(lines(PAIR)).hexdigest()
