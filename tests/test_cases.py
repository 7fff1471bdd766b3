"""Files as the public sets distribute them, and as people's programs write them. Each line is a file with its
right outcome.

The sentences are our own, and the layouts are those of the sets. Digits in an outcome are the labels of the
rows that are read. Words in an outcome are part of the message that refuses the file."""

import csv, gzip, json, shlex
from pathlib import Path

from swap import swap
import pytest

import nli_ft.ask
from nli_ft.process import DataError
from nli_ft.config_loader import load_config
from nli_ft.public_sets import SOURCES, download
from nli_ft.commands import data_cli
from nli_ft.rows import read_rows

CASES = Path(__file__).parent / "cases"

DOWNLOAD = """
mnli_quotes_swallow.tsv          | --dataset multi_nli | 110010
mnli_balanced_quotes.tsv         | --dataset multi_nli | 110
mnli_one_quote.tsv               | --dataset multi_nli | 110
mnli_glue_train.tsv              | --dataset multi_nli | 100100101100010
mnli_glue_test_matched.tsv       | --dataset multi_nli | 15 rows, none with a gold label (there is no column of labels
mnli_none.tsv                    | --dataset multi_nli | 00001
mnli_hub_test.jsonl              | --dataset multi_nli | 5 rows, none with a gold label
mnli_other_order.jsonl           | --dataset multi_nli --names contradiction,neutral,entailment | 10010
mnli_other_order.jsonl           | --dataset multi_nli | 00100
mnli_none.tsv                    | --dataset multi_nli --names contradiction,neutral,entailment | no label here is a number. Leave it out
ok/multinli_1.0_dev_matched.jsonl | --dataset multi_nli | 100100
ok/dup_pair_ids.jsonl            | --dataset multi_nli | 11
snli_glue_train_all_wide.tsv     | --dataset snli | all_wide.tsv:2: 15 fields where the header has 11
snli_glue_train_first_narrow.tsv | --dataset snli | first_narrow.tsv:3: 15 fields where the header has 11
snli_float_en.jsonl              | --dataset snli | 1010
snli_float_labels.jsonl          | --dataset snli | 10010
two_gold_columns.jsonl           | --dataset snli | 1
two_gold_columns.jsonl           | --contract entailment | 1
two_gold_columns.jsonl           | --contract entailment --columns label=label | 0
ok/snli_1.0_dev.jsonl            | --dataset snli | 100100
ok/snli_1.0_dev.txt              | --dataset snli | 100100
ok/snli_case.jsonl               | --dataset snli | 1100
ok/snli_mixed_types.jsonl        | --dataset snli | 10
ok/blank_hyp.jsonl               | --dataset snli | blank_hyp.jsonl:1: hypothesis is empty
ok/pairs_json_array.json         | --dataset snli | 0
ok/pairs_pretty.json             | --dataset snli | 0
ok/noext                         | --dataset snli | 1
ok/upper.TSV                     | --dataset snli | 1
hans_float_labels.jsonl          | --dataset hans | 01
ok/hans_ids.txt                  | --dataset hans | 01
ok/heuristics_evaluation_set.txt | --dataset hans | 01
ok/heuristics_evaluation_set.jsonl | --dataset hans | 0
ok/hans_pairs.jsonl              | --dataset hans | 010
ok/hans_pairs.jsonl              | --dataset snli | records the label contract 'binary' where 'entailment' holds for snli
rte_hub_ints.jsonl               | --dataset glue/rte --contract binary | nothing says which relation this number is. Give --names
rte_hub_ints.jsonl               | --dataset glue/rte --contract binary --names entailment,not_entailment | 10010
rte_hub_ints.jsonl               | --dataset glue/rte --contract binary --names not_entailment,entailment | 01101
rte_hub_ints.jsonl               | --dataset glue/rte --contract binary --names yes,no | 'yes' is no relation
rte_hub_ints.jsonl               | --dataset glue/rte --contract binary --map 0=entailment,1=not_entailment | 10010
rte_hub_ints.jsonl               | --dataset rte | 10010
ok/RTE_dev.tsv                   | --dataset rte | 100100
ok/RTE_dev.tsv                   | --dataset glue/rte --contract binary | 100100
ok/RTE_dev.tsv                   | --dataset glue/rte --contract entailment | maps only entailment, neutral, contradiction. For this label choose binary
ok/WNLI_dev.tsv                  | --dataset wnli | 100100
ok/WNLI_dev.tsv                  | --dataset glue/wnli --contract binary --names not_entailment,entailment | 100100
QNLI_dev.tsv                     | --dataset qnli | 100100
QNLI_dev.tsv                     | --contract binary --columns premise=sentence,hypothesis=question | 100100
QNLI_dev.tsv                     | --dataset glue/qnli --contract binary | The file has: index, question, sentence, label. Say which are which with --columns
esnli_train_1.csv                | --dataset esnli | 100100
esnli_dev.csv                    | --dataset esnli | 100100
anli_R1_dev.jsonl                | --dataset anli | 100100
anli_R2_train.jsonl              | --dataset anli | 100100
wanli_train.jsonl                | --dataset wanli | 100100
wanli_train.jsonl                | --dataset a/wanli --contract entailment | 100100
SICK.txt                         | --dataset sick | 100100
SICK_train.txt                   | --dataset sick | 100100
SICK.txt                         | --contract entailment --columns premise=sentence_A,hypothesis=sentence_B,label=entailment_label | 100100
SICK.txt                         | --contract entailment --columns premise=sentence_A,hypothesis=sentence_C | missing column sentence_C. The file has: pair_ID
scitail_predictor_dev.jsonl      | --dataset scitail | 100100
scitail_predictor_dev.jsonl      | --contract entailment --map entails=entailment | 100100
scitail_predictor_dev.jsonl      | --contract entailment | label 'entails' is no relation
scitail_predictor_dev.jsonl      | --contract entailment --map entailed=entailment | Say which with --map entails=
scitail_predictor_dev.jsonl      | --contract entailment --map entails=yes | 'yes' is no relation
scitail_predictor_dev.jsonl      | --map entails=entailment | Name a contract with --contract
ok/scitail_1.0_dev.jsonl         | --dataset scitail | 100100
xnli_multinli.train.en.tsv       | --dataset xnli | 10010
ok/xnli.dev.tsv                  | --dataset xnli | 100100
lingnli_val.jsonl                | --dataset lingnli | 100100
lingnli_val.jsonl                | --dataset lingnli --map entails=entailment | --map explains labels that do not occur (entails). The labels are: contradiction
pairs_header_case.csv            | --contract binary --names not_entailment,entailment | 10
fracas.xml                       | --dataset fracas | 100
fracas.xml                       | --contract entailment --columns label=fracas_answer --map yes=entailment,no=contradiction,unknown=neutral,undef=- | 100
rte_dev.xml                      | --dataset rte | 10
sick_hub.jsonl                   | --dataset sick | 100
mnli_glue_hub.jsonl              | --dataset multi_nli | 100
"""  # noqa: E501

READ = """
excel_cp1252.csv         | |                    iconv -f CP1252 -t UTF-8 excel_cp1252.csv
excel_semicolon.csv      | |                    10
pairs_header_case.csv    | |                    10
rte_pairs.csv            | |                    'not_entailment' is a relation, not 0 or 1: name a contract (binary)
rte_pairs.csv            | binary |             10
pairs_index_col.csv      | |                    name it id, or write the table with index=False. The columns are: , premise, hypothesis, label
trailing_comma.csv       | entailment |         the line ends in a delimiter. Remove it
pairs_nan.jsonl          | |                    label is NaN, a gap in a table: fill it in
pairs_none.csv           | |                    0001
pairs_one_class.jsonl    | |                    0000
pairs_one_class.jsonl    | course |             records the label contract 'binary' where 'course' was declared
pairs_tab_quotes.tsv     | |                    11010
lingnli_val.jsonl        | |                    name a contract
lingnli_val.jsonl        | entailment |         100100
two_gold_columns.jsonl   | entailment |         premise=sentence1,hypothesis=sentence2,label=gold_label
ok/RTE_dev.tsv           | |                    premise=sentence1,hypothesis=sentence2,label=label
ok/excel_bom.csv         | |                    10
ok/extra_first_col.csv   | entailment |         extra_first_col.csv:2: 4 fields where the header has 3: the first looks like a row number
ok/hans_pairs.jsonl      | |                    010
ok/noext                 | entailment |         1
ok/oldmac_cr.csv         | |                    10
ok/pairs_extra_comma.csv | |                    pairs_extra_comma.csv:2: 4 fields where the header has 3
ok/pairs_ids_mixed.csv   | |                    id '1' was used on line 2 already
ok/pairs_json_array.json | |                    jq -c '.[]' pairs_json_array.json
ok/pairs_pretty.json     | |                    jq -c . pairs_pretty.json
ok/pairs_smart.jsonl     | |                    10
ok/pairs_tab_in_text.tsv | |                    pairs_tab_in_text.tsv:2: 4 fields where the header has 3
ok/predict_blank_lines.csv | |                  missing column label (for pair rows). The file has: premise, hypothesis
ok/snli_case.jsonl       | entailment |         1100
ok/snli_mixed_types.jsonl | entailment |        label 'neutral' is a relation, unlike that of line 1
ok/upper.TSV             | entailment |         1
"""  # noqa: E501
PREDICT = """
predict_header_space.csv   | A dog moves.
predict_tab.tsv            | A dog moves.
predict_semicolon.csv      | A dog moves.
predict_s1s2.csv           | A dog moves.
predict_ragged.csv         | ! | A cat runs.
ok/predict_blank_lines.csv | A dog moves.
pairs_index_col.csv        | A dog moves. | A cat runs.
pairs_header_case.csv      | A dog moves. | A cat runs.
pairs_none.csv             | None | n/a | null | A dog moves.
trailing_comma.csv         | ! | !
"""


def table(text):
    return [tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines()]


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def labels(rows):
    return "".join(str(row["label"]) for row in rows)


@pytest.mark.parametrize("name,args,outcome", table(DOWNLOAD))
def test_a_set_in_its_own_layout_becomes_pairs_in_one_command(tmp_path, capsys, name, args, outcome):
    out = tmp_path / "out.jsonl"
    argv = ["download", "--from_file", str(CASES / name), "--output", str(out), *shlex.split(args)]
    if outcome.isdigit():
        assert data_cli(argv) == 0
        assert labels(written(out)) == outcome and labels(read_rows(out)) == outcome
        return
    with pytest.raises(SystemExit) as e:
        data_cli(argv)
    assert e.value.code == 2 and outcome in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("name,contract,outcome", table(READ))
def test_a_file_of_pairs_is_read_or_refused_with_the_cure(name, contract, outcome):
    if outcome.isdigit():
        assert labels(read_rows(CASES / name, contract=contract or None)) == outcome
    else:
        with pytest.raises(DataError) as e:
            read_rows(CASES / name, contract=contract or None)
        assert outcome in str(e.value)


@pytest.mark.parametrize("name,hypotheses", [(name, rest) for name, *rest in table(PREDICT)])
def test_nli_predict_reads_what_nli_data_reads_and_a_ragged_row_is_one_bad_row(name, hypotheses):
    names, rows = nli_ft.ask.read_pairs(CASES / name)
    assert ["!" if "problem" in row else row["hypothesis"] for row in rows] == hypotheses
    assert all(
        "fields where the header has" in row.get("problem", "fields where the header has") for row in rows
    )


def test_every_case_has_a_line_here():
    told = {name for text in (DOWNLOAD, READ, PREDICT) for name, *_ in table(text)}
    assert {p.relative_to(CASES).as_posix() for p in CASES.rglob("*") if p.is_file()} == told


def test_quotes_between_tabs_belong_to_the_text(tmp_path):
    download(tmp_path / "o.jsonl", "multi_nli", from_file=CASES / "mnli_balanced_quotes.tsv")
    assert [r["premise"] for r in written(tmp_path / "o.jsonl")] == [
        '"Yes," he said, "it is late."',
        'He said "no" twice.',
        '"Exactly."',
    ]


def test_a_gold_column_beats_a_label_column_and_that_is_said(tmp_path):
    counts = download(tmp_path / "o.jsonl", "snli", from_file=CASES / "two_gold_columns.jsonl")
    assert (
        counts["gold taken from gold_label, not from label"] == counts["of these, label says otherwise"] == 1
    )


def test_a_gold_column_that_comes_late_in_a_file_is_not_passed_over(tmp_path):
    pair = dict(premise="P", hypothesis="H", label="neutral")
    (tmp_path / "a.jsonl").write_text(
        "\n".join(map(json.dumps, [pair] * 60 + [pair | dict(gold_label="entailment")]))
    )
    with pytest.raises(DataError, match="a.jsonl:61: has a column gold_label"):
        download(tmp_path / "o.jsonl", "snli", from_file=tmp_path / "a.jsonl")


def test_class_names_of_the_hub_and_of_the_command_line_must_agree(tmp_path, monkeypatch):
    class Hub(list):
        features = dict(label=type("ClassLabel", (), dict(names=["entailment", "not_entailment"])))

    hub = Hub([dict(sentence1="P", sentence2="H", label=0)])
    swap(monkeypatch, "nli_ft.public_sets.load_records", lambda *args: hub)
    assert download(tmp_path / "o.jsonl", "glue/rte", contract="binary")["label 1"] == 1
    with pytest.raises(DataError, match="but --names says non-entailment, entailment"):
        download(tmp_path / "p.jsonl", "glue/rte", contract="binary", names=("not_entailment", "entailment"))
    with pytest.raises(DataError, match="read from its own files"):
        download(tmp_path / "p.jsonl", "sick")


def test_own_ids_are_kept_where_they_are_unique(tmp_path):
    counts = download(tmp_path / "o.jsonl", "multi_nli", "dev", CASES / "ok" / "dup_pair_ids.jsonl")
    assert [r["id"] for r in written(tmp_path / "o.jsonl")] == ["700e", "multi_nli-dev-1"]
    assert counts["own id used before (numbered instead)"] == 1


def test_what_a_set_says_of_a_pair_is_kept(tmp_path):
    for name, dataset, ids, relations in (
        ("fracas.xml", "fracas", ["001", "002", "003"], "entailment contradiction neutral"),
        ("rte_dev.xml", "rte", ["13", "14"], "entailment non-entailment"),
        ("sick_hub.jsonl", "sick", ["1", "2", "3"], "entailment neutral contradiction"),
        ("mnli_glue_hub.jsonl", "multi_nli", [7, 8, 9], "entailment neutral contradiction"),
    ):
        counts = download(tmp_path / "o.jsonl", dataset, from_file=CASES / name, overwrite=True)
        rows = written(tmp_path / "o.jsonl")
        assert [r["id"] for r in rows] == ids and [r["relation"] for r in rows] == relations.split()
        if dataset == "fracas":
            assert (
                rows[0]["premise"] == "Every guest came. Kim is a guest." and rows[0]["why"] == "Kim is one."
            )
            assert counts["no gold label (left out)"] == 1


def test_a_split_is_what_the_name_of_the_file_says_or_is_not_said(tmp_path):
    for name, split in (
        ("esnli_dev.csv", "dev"),
        ("esnli_train_1.csv", "train"),
        ("latest.csv", None),
        ("train_test.csv", None),
    ):
        (tmp_path / name).write_bytes((CASES / "esnli_dev.csv").read_bytes())
        download(tmp_path / "o.jsonl", "esnli", from_file=tmp_path / name, overwrite=True)
        assert written(tmp_path / "o.jsonl")[0].get("split") == split


@pytest.mark.parametrize(
    "first,last",
    [('"label": 0, "reason": null', '"label": 1, "reason": "because"'), ('"label": 0', '"label": "neutral"')],
)
def test_a_column_that_changes_its_type_far_down_is_read(tmp_path, first, last):
    pair = (
        '{"premise": "' + "a long premise " * 20 + '", "hypothesis": "H", '
    )  # other readers guess a column's type block by block
    (tmp_path / "a.jsonl").write_text((pair + first + "}\n") * 60_000 + pair + last + "}\n")
    counts = download(tmp_path / "o.jsonl", "anli", from_file=tmp_path / "a.jsonl")
    assert (counts["label 1"], counts["label 0"]) == (60_000, 1)


def test_scitails_table_without_a_header_is_read(tmp_path):
    (tmp_path / "dev.tsv").write_text(
        "A dog runs.\tA dog moves.\tentails\nA dog runs.\tA cat runs.\tneutral\n"
    )
    assert download(tmp_path / "o.jsonl", "scitail", from_file=tmp_path / "dev.tsv")["label 1"] == 1
    assert [r["hypothesis"] for r in written(tmp_path / "o.jsonl")] == ["A dog moves.", "A cat runs."]


def test_the_class_names_of_a_parquet_file_are_used_and_contradicting_ones_refused(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq

    declared = dict(
        info=dict(features=dict(label=dict(names=["not_entailment", "entailment"], _type="ClassLabel")))
    )
    rows = pa.Table.from_pylist(
        [dict(sentence1="P", sentence2="H", label=1), dict(sentence1="P", sentence2="None", label=0)]
    )
    pq.write_table(
        rows.replace_schema_metadata({b"huggingface": json.dumps(declared).encode()}), tmp_path / "a.parquet"
    )
    download(tmp_path / "o.jsonl", contract="binary", from_file=tmp_path / "a.parquet")
    assert labels(written(tmp_path / "o.jsonl")) == "10"
    with pytest.raises(DataError, match="declares the classes non-entailment, entailment"):
        download(
            tmp_path / "p.jsonl",
            contract="binary",
            from_file=tmp_path / "a.parquet",
            names=("entailment", "not_entailment"),
        )
    pq.write_table(rows, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="Give --names"):
        download(tmp_path / "p.jsonl", contract="binary", from_file=tmp_path / "b.parquet")


def test_no_reader_of_another_package_sees_a_local_file(tmp_path, monkeypatch):
    import datasets
    from pyarrow import csv, json as arrow_json

    readers = (datasets, "load_dataset"), (csv, "read_csv"), (arrow_json, "read_json")
    for module, name in readers:
        monkeypatch.setattr(module, name, None)
    for name in ("esnli_dev.csv", "anli_R1_dev.jsonl", "mnli_none.tsv"):
        download(tmp_path / name, "anli" if "anli" in name else "esnli", from_file=CASES / name)


BROKEN = dict(
    empty=(b"", "holds no rows"),
    blank=(b"\n \n", "holds no rows"),
    header=(b"premise,hypothesis,label\n", "holds no rows"),
    binary=(bytes(range(256)), "no text"),
    zip=(b"PK\x03\x04\0\0", "save the sheet as CSV"),
    cut_gz=(gzip.compress(b"premise,hypothesis\n" * 500)[:40], "gzip"),
    utf16=("premise,hypothesis\na,b\n".encode("utf-16"), "iconv -f UTF-16"),
    bare_utf16=("premise,hypothesis\na,b\n".encode("utf-16-le"), "iconv -f UTF-16LE"),
    html=(b"<!DOCTYPE html><p>Sign in", "a web page"),
    lfs=(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    cp1252=(b"premise,hypothesis,label\ncaf\xe9,H,1\n", "iconv -f CP1252"),
    cp1252_header=(b"pr\xe9mise,hypothesis,label\nP,H,1\n", "CP1252"),
    damaged=("premise,hypothesis,label\né,H,1\n".encode() + b"\xe9,H,1\n", "some rows are damaged"),
    array=(b"[1, 2]", "JSON array"),
    torn_array=(b'[{"premise": "P"', "JSON array"),
    deep=(b"[" * 100_000, "JSON array"),
    deep_object=(b'{"a":' * 100_000, "nested too deeply"),
    big=(b'{"premise": "P", "hypothesis": "H", "label": ' + b"1" * 5000 + b"}", ""),
    nan=(b'{"premise": "P", "hypothesis": "H", "label": NaN}', "NaN"),
    infinite=(b'{"premise": "P", "hypothesis": "H", "label": 1e999}', ""),
    parquet=(b"PAR1 and no more", "arquet"),
    open_quote=(b'"premise,hypothesis,label\nP,H,1\n', ""),
    swallowed=(b'premise,hypothesis,label\n"P,H,1\nP",H,0\n', "swallows whole rows"),
)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt", ".json", ".jsonl", ".jsonl.gz", ".parquet", ""])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_words_by_every_door(tmp_path, name, ending):
    raw, words = BROKEN[name]
    path = tmp_path / f"broken{ending}"
    path.write_bytes(raw)
    for read in (lambda: read_rows(path), lambda: download(tmp_path / "o.jsonl", "snli", from_file=path)):
        with pytest.raises(DataError) as e:
            read()
        assert path.name in str(e.value)
    try:
        nli_ft.ask.read_pairs(path)
    except DataError:
        pass
    own = ".jsonl" if raw[:1] in (b"{", b"[") else ".csv"
    if ending == own:
        with pytest.raises(DataError) as e:
            read_rows(path)
        assert words in str(e.value)


def test_a_table_under_the_name_of_json_and_json_under_the_name_of_a_table(tmp_path):
    (tmp_path / "a.jsonl").write_text("premise,hypothesis,label\nP,H,1\n")
    with pytest.raises(DataError, match="Rename it to .csv or .tsv"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text('{"premise": "P", "hypothesis": "H", "label": 1}\n')
    assert labels(read_rows(tmp_path / "a.csv")) == "1"


@pytest.mark.parametrize(
    "text",
    [
        "premise;hypothesis;label\r\nP;H;1\r\n",
        "sep=;\npremise;hypothesis;label\nP;H;1\n",
        "premise, hypothesis, label\nP, H, 1\n",
        "premise|hypothesis|label\nP|H|1",
        "\ufeff\n\npremise,hypothesis,label\n\n\nP,H,1",
        '"premise","hypothesis","label"\n"P","H","1"\n',
        "Premise,HYPOTHESIS, Label \nP,H,1.0\n",
    ],
)
def test_every_dialect_of_csv_gives_the_same_row(tmp_path, text):
    (tmp_path / "a.csv").write_text(text, newline="")
    (row,) = read_rows(tmp_path / "a.csv")
    assert (row["premise"], row["hypothesis"], row["label"]) == ("P", "H", 1)
    assert [(r["premise"], r["hypothesis"]) for r in nli_ft.ask.read_pairs(tmp_path / "a.csv")[1]] == [
        ("P", "H")
    ]


def test_a_table_that_pandas_wrote_with_tabs_is_not_taken_for_one_without_quotes(tmp_path):
    text = 'premise\thypothesis\tlabel\n"He said ""no""."\tHe spoke.\t1\n'
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(DataError, match="ends in .csv"):
        read_rows(tmp_path / "a.tsv")
    (tmp_path / "a.csv").write_text(text)
    assert read_rows(tmp_path / "a.csv")[0]["premise"] == 'He said "no".'


def test_gold_and_label_that_differ_make_a_bad_row(tmp_path):
    for gold, contract, ok in (
        ("neutral", "entailment", False),
        ("entailment", "entailment", True),
        (1, None, True),
        (0, None, False),
        ("neutral", None, False),
        ("-", None, False),
    ):
        (tmp_path / "a.jsonl").write_text(
            json.dumps(dict(premise="P", hypothesis="H", label=1, gold_label=gold))
        )
        if ok:
            assert labels(read_rows(tmp_path / "a.jsonl", contract=contract)) == "1"
        else:
            with pytest.raises(DataError, match="gold"):
                read_rows(tmp_path / "a.jsonl", contract=contract)


def test_evaluation_rows_are_read_under_a_contract_and_from_a_sets_own_columns():
    cfg = load_config("cpu_demo", check=False)

    def read(name, **kw):
        return labels(nli_ft.ask.evaluation_rows(CASES / name, cfg, "brief", **kw))

    assert read("lingnli_val.jsonl", contract="entailment") == "100100"
    assert read("SICK.txt", layout=dict(dataset="sick")) == "100100"
    assert (
        read("rte_hub_ints.jsonl", contract="binary", layout=dict(names=("entailment", "not_entailment")))
        == "10010"
    )
    with pytest.raises(DataError, match="Give --names"):
        read("rte_hub_ints.jsonl", contract="binary", layout=dict(columns=dict(premise="sentence1")))
    with pytest.raises(DataError, match="where 'course' was declared"):
        read("pairs_one_class.jsonl", contract="course")


def test_answers_come_back_with_every_row_and_column_as_they_were(tmp_path):
    names, rows = nli_ft.ask.read_pairs(CASES / "predict_ragged.csv")
    answers = [
        dict.fromkeys([*nli_ft.ask.ANSWER_COLUMNS, "completion"]) | dict(problem=row.get("problem"))
        for row in rows
    ]
    nli_ft.ask._write_answers(tmp_path / "o.csv", names, rows, answers)
    got = list(csv.DictReader(open(tmp_path / "o.csv", newline="", encoding="utf-8")))
    assert (
        list(got[0]) == ["premise", "hypothesis", *nli_ft.ask.ANSWER_COLUMNS]
        and got[1]["hypothesis"] == "A cat runs."
    )
    assert "A dog moves." in got[0]["problem"]


def test_every_set_of_the_table_says_what_it_needs():
    for name, src in SOURCES.items():
        assert {"premise", "hypothesis", "label", "id", "names", "contract", "words"} <= set(src), name
