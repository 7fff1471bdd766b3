"""Generated input. Whatever is in a file, a config, a command line or a completion, only the documented errors come
out. No row is lost without a message. No label comes out that was not written.

`NLI_FT_FUZZ=50` tries 50 times as many inputs, with other inputs at every start. At the end it prints for each
area how many it tried."""

import ast, csv, gzip, io, json, os, re, shlex, shutil, tempfile
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import TypeAdapter

from nli_ft.answers import _EMPTY_THOUGHT
from nli_ft.process import project_root
import nli_ft.ask
import nli_ft.evaluate
import nli_ft.predict
import nli_ft.predictions
import nli_ft.records
import nli_ft.teacher
import nli_ft.teacher_files
import nli_ft.teacher_replies
import nli_ft.teacher_session
from nli_ft.config_loader import (
    KEYS,
    Config,
    add_config_args,
    config_from_args,
    config_from_json,
    load_config,
    print_config,
)
from nli_ft.process import CommandParser, ConfigError, DataError, NliError, RecordError
from nli_ft.labels import CONTRACTS
from nli_ft.rows import PROMPTS, STYLES, prompt_messages, read_rows, render_completion, sft_row
from nli_ft.public_sets import download
from nli_ft.files import json_line
from nli_ft.sft_rows import parse_splits
from nli_ft.answers import OUTCOMES, json_closed, parse_completion
from nli_ft.prompt import encode_prompt, encode_row, encode_rows, mistral_reference, mistral_v3_tokenizer

from_json = TypeAdapter(
    object
).validate_json  # a JSON reader (in Rust) that shares no code with the one under test
MANY = float(os.environ.get("NLI_FT_FUZZ", 0))
tried = Counter()


def fuzz(area, n, *args, **kw):
    "`given` with `n` inputs, the same at every start unless NLI_FT_FUZZ asks for more. It counts the inputs."

    def wrap(test):
        def counted(*a, **k):
            tried[area] += 1
            return test(*a, **k)

        counted.__name__, counted.__doc__, counted.__module__ = test.__name__, test.__doc__, test.__module__
        counted.__wrapped__ = test  # hypothesis and pytest read from its signature what to fill in
        how = settings(
            max_examples=int(n * max(MANY, 1)),
            deadline=None,
            database=None,
            derandomize=not MANY,
            suppress_health_check=list(HealthCheck),
        )
        return how(given(*args, **kw)(counted))

    return wrap


@pytest.fixture(scope="module", autouse=True)
def told(request):
    yield
    plugin = request.config.pluginmanager.getplugin
    with plugin("capturemanager").global_and_fixture_disabled():
        plugin("terminalreporter").write_line(
            "\ninputs tried: "
            + ", ".join(f"{k} {n:,}" for k, n in sorted(tried.items()))
            + f"; {tried.total():,} in all"
        )


@pytest.fixture(scope="module")
def folder():
    d = Path(tempfile.mkdtemp())
    yield d
    shutil.rmtree(d)


# -- what is generated

NASTY = [
    "",
    " ",
    "\0",
    "\ud83d",
    "\ude00",
    "\ud83d\ude00",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x1c",
    "a\nb",
    "a\r\nb",
    '"',
    "\\",
    '\\"',
    "'",
    "{",
    "}",
    "{premise}",
    "[INST]",
    "[/INST]",
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|im_start|>",
    "<unk>",
    "▁",
    "²",
    "١",
    "é",
    "👩‍👩‍👧",
    "ﬁ",
    "\u202e",
    "nan",
    "-1",
    "1e400",
    "None",
    "true",
    "0",
    "1",
    "$x^{$",
    "../../x",
    "/etc/passwd",
    "a|b",
    "<script>alert(1)</script>",
    '{"thought_process": "x", "predicted_label": 1}',
    '[/INST] {"predicted_label": 0}',
    "\nHypothesis: no",
    "=1+1",
    "a,b",
    "a\tb",
    "x" * 300,
]
any_text = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=12),
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.lists(st.sampled_from(NASTY), max_size=4).map("".join),
)


def writable(s):
    return not re.search("[\ud800-\udfff]", s)


good_text = any_text.filter(lambda s: s.strip() and "\0" not in s and writable(s))
number = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.sampled_from([2**63, -(2**63), 1e308, float("nan")]),
)
any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), number, any_text),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(any_text, x, max_size=3),
    max_leaves=6,
)
deep = st.sampled_from(
    ["[" * n + "]" * n for n in (50, 900, 5000, 100_000)]
    + ['{"a":' * n + "1" + "}" * n for n in (50, 900, 100_000)]
    + ["[" * 100_000]
)


def same(a, b):
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)  # NaN included


# -- rows


@st.composite
def good_row(draw, kind, i):
    "A row of a kind that must be kept, with keys of its own."
    p, h, t, label = draw(good_text), draw(good_text), draw(good_text), draw(st.sampled_from([0, 1]))
    extra = draw(
        st.dictionaries(
            st.sampled_from(["category", "group_id", "note", "split", "é"]),
            st.one_of(good_text, st.integers(), st.none(), st.lists(st.integers(), max_size=2)),
            max_size=2,
        )
    )
    spelled = draw(st.sampled_from([label, float(label), str(label), f" {label} ", f"{label}.0"]))
    if kind == "pair":
        row = dict(premise=p, hypothesis=h, label=spelled)
    if kind == "thought":
        row = dict(
            premise=p,
            hypothesis=h,
            thought_process=t,
            predicted_label=draw(st.sampled_from([0, 1, "0", "1"])),
            true_label=spelled,
        )
    if kind == "reflection":
        row = dict(premise=p, hypothesis=h, improved_thought_process=t, true_label=spelled)
    if kind == "sft":
        row = sft_row(
            0,
            p,
            h,
            t,
            label,
            draw(good_text),
            draw(st.sampled_from(list(PROMPTS))),
            draw(st.sampled_from(STYLES)),
        )
    if kind == "text":
        p, h = p.replace("\nHypothesis: ", " "), h.strip()  # the older form cannot distinguish these
        completion = render_completion(t, label, draw(st.sampled_from(["cot", "label_first"])))
        end = draw(st.sampled_from(["", "</s>", " "]))
        row = dict(text=f"<s>[INST] {prompt_messages(p, h)[0]['content']} [/INST] {completion}{end}")
        if not p.strip() or not h:
            row = dict(
                text=f"<s>[INST] {prompt_messages('P', 'H')[0]['content']} [/INST] {render_completion(t, label)}</s>"
            )
            p, h = "P", "H"
    row = {**row, **extra, "id": f"row {i}"}
    return row, dict(premise=p, hypothesis=h, label=label, thought=t)


@st.composite
def bad_line(draw, row):
    "A line that may hold a row or not: a row with a fault, any JSON, torn or random bytes."
    how = draw(
        st.sampled_from(["value", "value", "lost", "json", "torn", "bytes", "twice", "deep", "utf8", "big"])
    )
    keys = sorted(
        set(row)
        | {
            "contract",
            "relation",
            "dataset",
            "source",
            "thought_process",
            "prompt",
            "completion",
            "label",
            "id",
        }
    )
    row = dict(row, id=draw(any_json))
    if how == "value":
        row[draw(st.sampled_from(keys))] = draw(any_json)
    if how == "lost":
        row.pop(draw(st.sampled_from(sorted(row))))
    raw = json.dumps(draw(any_json) if how == "json" else row, ensure_ascii=True)
    if how == "twice":
        raw = raw[:-1] + ', "label": 0, "label": 1, "id": "x"}'
    if how == "deep":
        raw = raw[:-1] + ', "x": ' + draw(deep) + "}"
    if how == "big":
        raw = raw[:-1] + ', "label": ' + "1" * 5000 + "}"
    if how == "torn":
        raw = raw[: draw(st.integers(0, len(raw)))]
    raw = raw.encode()
    if how == "utf8":
        raw = raw.replace(b":", b': "\xff\xfe\x80", "y":', 1)
    if how == "bytes":
        raw = draw(st.binary(max_size=60))
    return raw.replace(b"\n", b" ")


@st.composite
def data_file(draw, kind):
    "(bytes, rows that must be kept as {id: (the row as written, its meaning)}, lines that are not blank)."
    lines, good = [], {}
    for i in range(draw(st.integers(1, 5))):
        row, says = draw(good_row(kind, i))
        if draw(st.integers(0, 2)):
            good[row["id"]] = row, says
            lines.append(json.dumps(row, ensure_ascii=draw(st.booleans())).encode())
        else:
            lines.append(draw(bad_line(row)))
        if not draw(st.integers(0, 4)):
            lines.append(draw(st.sampled_from([b"", b"  ", b"\t", b"\r"])))
    raw = (
        draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
        + draw(st.sampled_from([b"\n", b"\r\n"])).join(lines)
        + draw(st.sampled_from([b"", b"\n"]))
    )
    return raw, good, sum(bool(l.strip()) for l in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


def read_or_refuse(path, **kw):
    "Rows, or None where the file was refused by name."
    try:
        return read_rows(path, max_bad=0.999, **kw)
    except DataError as e:
        assert path.name in str(e)
        return None


def check_kept(row, raw):
    "A row that was read says what was written, and can be written again."
    for k, v in raw.items():
        if k in ("label", "true_label", "predicted_label"):
            assert type(row[k]) is int or row[k] is None, (k, v, row[k])
        elif k != "text" and k != "correct":
            assert same(row[k], v), k
    assert row["label"] in (0, 1) and type(row["id"]) in (int, str)
    json_line(row).encode()


KINDS = ["pair", "thought", "reflection", "sft", "text"]


@fuzz(
    "row files",
    400,
    st.sampled_from(KINDS).flatmap(lambda k: st.tuples(st.just(k), data_file(k))),
    st.sampled_from([None, *CONTRACTS]),
    st.booleans(),
)
def test_every_line_of_a_file_is_a_row_or_named_as_bad_and_rows_say_what_was_written(
    folder, kind_file, contract, packed
):
    kind, (raw, good, n) = kind_file
    path = folder / "rows.jsonl"
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    rows = read_or_refuse(path, kind=kind, contract=contract)
    if rows is None:
        assert (
            not good
            or raw.lstrip().removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            or raw.lstrip().removeprefix(b"\xef\xbb\xbf").lstrip()[:5] == b"<?xml"
            or raw[:2] in (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b")
        ), "a file with a good row was refused"
        return
    assert len(rows) + rows.bad.total == n and all(type(line) is int and why for line, why in rows.bad)
    assert set(good) <= {r["id"] for r in rows}, "a good row was lost"
    for r in rows:
        check_kept(r, good[r["id"]][0] if r["id"] in good else {})
        if r["id"] not in good:
            continue
        says = good[r["id"]][1]
        assert (r["premise"], r["hypothesis"], r["label"]) == (
            says["premise"],
            says["hypothesis"],
            says["label"],
        )
        if kind == "text":
            assert (
                r["thought_process"] == says["thought"]
                and json.loads(r["completion"][0]["content"])["predicted_label"] == says["label"]
            )


@fuzz("row files", 150, st.sampled_from(KINDS).flatmap(data_file))
def test_the_kind_of_a_file_is_found_or_the_file_refused_and_no_line_is_lost(folder, file):
    raw, good, n = file
    path = folder / "rows.jsonl"
    path.write_bytes(raw)
    rows = read_or_refuse(path)
    if rows is not None:
        assert len(rows) + rows.bad.total == n
    for r in rows or []:
        json_line(r).encode()


@fuzz(
    "row files",
    200,
    st.lists(st.tuples(good_text, good_text, st.sampled_from("01"), good_text), min_size=1, max_size=4),
    st.sampled_from(["csv", "tsv"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.one_of(st.none(), any_text, st.binary(max_size=8)),
)
def test_a_table_gives_its_cells_back_and_loses_no_record(folder, cells, ending, newline, bom, junk):
    text, path = io.StringIO(newline=""), folder / f"rows.{ending}"
    table = csv.writer(
        text, delimiter="\t" if ending == "tsv" else ",", lineterminator=newline, quoting=csv.QUOTE_ALL
    )
    table.writerows([("premise", "hypothesis", "label", "note"), *cells])
    raw, extra = text.getvalue().encode("utf-8-sig" if bom else "utf-8"), 0
    if junk is not None:  # a last record that may be spoilt in any way
        raw += (
            b'"p","h",1,"'.replace(b",", b"\t" if ending == "tsv" else b",")
            + (junk if isinstance(junk, bytes) else junk.encode("utf-8", "surrogatepass")).replace(b'"', b"")
            + b'"'
        )
        extra = 1
    path.write_bytes(raw)
    rows = read_or_refuse(path, kind="pair")
    assert len(rows) + rows.bad.total == len(cells) + extra
    assert [(r["premise"], r["hypothesis"], str(r["label"]), r["note"]) for r in rows][: len(cells)] == cells
    for r in rows:
        json_line(r).encode()


@fuzz(
    "row files",
    250,
    st.sampled_from(["rows.jsonl", "rows.csv", "rows.tsv", "rows.csv.gz"]),
    st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=40).map(lambda b: b"\x1f\x8b" + b),
        st.binary(max_size=80).map(gzip.compress),
        st.lists(any_json, max_size=3).map(lambda v: "\n".join(map(json.dumps, v)).encode()),
        any_text.map(lambda s: s.encode("utf-8", "surrogatepass")),
    ),
)
def test_wild_bytes_are_rows_or_a_refusal(folder, name, raw):
    (folder / name).write_bytes(raw)
    read_or_refuse(folder / name)


WORDS = [
    b"premise",
    b"hypothesis",
    b"label",
    b"gold_label",
    b"Sentence1",
    b"sentence2",
    b",",
    b";",
    b"\t",
    b"|",
    b"\n",
    b"\r",
    b"\r\n",
    b'"',
    b'""',
    b" ",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xe9",
    b"\0",
    b"sep=;\n",
    b"entailment",
    b"neutral",
    b"-",
    b"-1",
    b"1.0",
    b"nan",
    b"A dog",
    b'{"premise": "P", "hypothesis": "H", "label": ',
    b"2",
    b"NaN",
    b"1e999",
    b"}",
    b"[",
    b"{",
    b"\x1f\x8b",
    b"PAR1",
]


@fuzz(
    "row files",
    300,
    st.sampled_from(["a.csv", "a.tsv", "a.txt", "a.json", "a.jsonl", "a", "a.csv.gz", "a.parquet"]),
    st.lists(st.sampled_from(WORDS), max_size=25).map(b"".join),
    st.sampled_from(["snli", "scitail", "xnli", "rte"]),
    st.booleans(),
)
def test_whatever_bytes_a_file_has_every_reader_gives_rows_or_a_refusal(folder, name, raw, dataset, header):
    path, out = folder / name, folder / "out.jsonl"
    path.write_bytes(
        (b"premise\thypothesis\tlabel\n" if name == "a.tsv" else b"premise,hypothesis,label\n") * header + raw
    )
    read_or_refuse(path)
    try:
        download(out, dataset, from_file=path, overwrite=True, max_bad=0.999)
    except DataError as e:
        assert path.name in str(e)
    else:
        assert {json.loads(line)["label"] for line in out.open(encoding="utf-8")} <= {0, 1}
    try:
        names, rows = nli_ft.ask.read_pairs(path)
    except DataError as e:
        assert path.name in str(e)
    else:
        json.dumps(rows, ensure_ascii=False).encode()


@fuzz("row files", 60, any_text)
def test_any_name_of_a_file_is_read_or_refused(name):
    try:
        read_rows(name)
    except DataError as e:
        assert name in str(e) or not name
    try:
        parse_splits(name)
    except DataError:
        pass


# -- completions

SNIPPETS = [
    '"predicted_label": 1',
    '"predicted_label": 0',
    '"predicted_label": "1"',
    '"predicted_label": ١',
    '"predicted_label": 1.0',
    '"predicted_label": -0',
    '"predicted_label": true',
    '"predicted_label": 10',
    '"predicted_label": "\\u0031"',
    '"\\u0070redicted_label": 0',
    '"thought_process": "',
    '\\"predicted_label\\": 0',
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    ",",
    ":",
    "\n",
    "\\ud83d",
    "\\u0000",
    "0",
    "1",
    "label 1",
    '{"thought_process": "b", "predicted_label": 0}',
    '{"a": {"predicted_label": 1}}',
    "NaN",
    "null",
    "```json",
    "1}",
    "９",
    " ",
    "[/INST]",
]

ODD_LABELS = [
    "raw" + s
    for s in (
        "-0",
        '"\\u0031"',
        '"\\u0030"',
        "1.0",
        "1e0",
        "0.0",
        "01",
        "١",
        '"١"',
        "true",
        '" 1"',
        "10",
        "[1]",
        "1 ",
        '"1 "',
        "+1",
        "0x1",
        "'1'",
        "",
    )
]


@st.composite
def completion(draw):
    "A completion as a model may write it: a right one with noise, cuts, repetitions and insertions."
    if not draw(st.integers(0, 9)):
        return draw(any_text)
    obj = {
        "thought_process": draw(any_text),
        "predicted_label": draw(
            st.one_of(st.sampled_from([0, 1, "0", "1"]), st.sampled_from(ODD_LABELS), any_json)
        ),
    } | draw(st.dictionaries(any_text, any_json, max_size=1))
    pairs = draw(st.permutations([*obj.items()]))
    if not draw(st.integers(0, 5)):
        pairs.append(("predicted_label", draw(st.sampled_from([0, 1, "1"]))))  # given twice
    ascii, gap = draw(st.booleans()), draw(st.sampled_from(["", " ", " ", "\n"]))

    def spell(v):
        return v[3:] if isinstance(v, str) and v.startswith("raw") else json.dumps(v, ensure_ascii=ascii)

    s = (
        "{"
        + f",{gap}".join(f"{json.dumps(k, ensure_ascii=ascii)}:{gap}{spell(v)}" for k, v in pairs)
        + gap
        + "}"
    )
    for _ in range(draw(st.integers(0, 3))):
        a, b = sorted((draw(st.integers(0, len(s))), draw(st.integers(0, len(s)))))
        how = draw(st.sampled_from(["cut", "insert", "insert", "again", "tail", "wrap"]))
        if how == "cut":
            s = s[:a] + s[min(b, a + 8) :]
        if how == "insert":
            s = s[:a] + draw(st.sampled_from(SNIPPETS)) + s[a:]
        if how == "again":
            s = s[:b] + s[a:]
        if how == "tail":
            s = s[:b]
        if how == "wrap":
            s = draw(st.sampled_from(SNIPPETS)) + s + draw(st.sampled_from(SNIPPETS))
    return s


def first_objects(text):
    "Balanced {…} at the top, found by tokens: quotes count only inside of them."
    at = text.find("{")
    while at >= 0:
        depth, end = 0, -1
        for m in re.finditer(r'"(?:[^"\\]|\\.)*"|.', text[at:], re.S):
            depth += (m[0] == "{") - (m[0] == "}")
            if not depth:
                end = at + m.end()
                yield text[at:end]
                break
        at = text.find("{", end) if end > 0 else -1


def own_keys(obj):
    "The literal (key, what stands after it) of an object's own level, by tokens."
    depth, found, tokens = (
        0,
        [],
        [m[0] for m in re.finditer(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+', obj, re.S)],
    )
    for i, t in enumerate(tokens):
        depth += (t in "{[") - (t in "}]")
        if t == ":" and depth == 1 and 0 < i < len(tokens) - 1:
            found.append((tokens[i - 1], tokens[i + 1]))
    return found


def written_label(text):
    "What an independent reader sees: (label or None, the object), or (None, None) if it sees no object."
    for obj in first_objects(text):
        try:
            value = from_json(obj)
        except ValueError:
            if re.search(r"[\x00-\x1f]|\\u[dD]", obj):
                return (
                    None,
                    None,
                )  # line breaks and half surrogates in a string: our reader mends them, the other refuses them
            continue
        labels = [v for k, v in own_keys(obj) if k == '"predicted_label"']
        return (
            int(labels[0].strip('"')) if len(labels) == 1 and labels[0] in ("0", "1", '"0"', '"1"') else None
        ), value
    return None, None


def has_label(p, text):
    "Check what must hold for every label that was read."
    if p.label is None:
        return False
    assert type(p.label) is int and re.search(rf'"predicted_label"\s*:\s*("?){p.label}\1\s*[,}}]', text), (
        "invented"
    )
    return True


@fuzz("completions", 2500, completion(), st.sampled_from(STYLES))
def test_no_completion_breaks_the_parser_and_no_label_is_invented(text, style):
    p = parse_completion(text, style)
    assert p.outcome in OUTCOMES and (p.label is not None) == (p.outcome in ("strict", "repaired"))
    if has_label(p, text):
        assert json_closed(text) and (style == "label_only" or p.thought.strip())
    else:
        assert p.thought is None
    assert (
        json.loads(json_line(dict(thought=p.thought, repairs=p.repairs)).encode())["thought"] == p.thought
    )  # a line of predictions.jsonl
    cut = len(text) // 2
    has_label(parse_completion(text[:cut], style), text[:cut])


@fuzz("completions", 2500, completion().filter(writable), st.sampled_from(["cot", "label_only"]))
def test_a_label_is_the_one_that_another_reader_of_json_sees(text, style):
    p = parse_completion(text, style)
    label, value = written_label(text)
    if value is None:
        return
    if p.label is not None:
        assert p.label == label
    thought = value.get("thought_process")
    if (
        label is not None
        and style == "label_only"
        and p.outcome != "echo"  # a thought such as "[...]" is the form
        and len(set(own_keys(text))) == len(own_keys(text))
        and text.count('"predicted_label"') == 1
        and text.count("{") == 1
    ):
        keys = [k for k, _ in own_keys(next(first_objects(text)))]
        if len(keys) == len(value):
            assert p.label == label, "a label that is there was not read"
    if p.label is not None and isinstance(thought, str):
        assert p.thought == thought


@fuzz(
    "completions",
    700,
    any_text.filter(str.strip),
    st.sampled_from([0, 1]),
    st.sampled_from(["cot", "label_first"]),
    st.sampled_from([0, 1]),
    any_text.filter(str.strip),
)
def test_two_answers_are_read_where_they_agree_and_one_inside_a_thought_is_none(
    thought, label, style, other, second
):
    one, two = render_completion(thought, label, style), render_completion(second, other, style)
    read = parse_completion(one + two, style).label
    # an object with a placeholder as its thought is the form. It is no answer, so it cannot disagree
    if thought.isalpha() and second.isalpha():
        assert read == (label if other == label else None)
    else:
        assert read in (None, label, other)
    inside = render_completion(two, label, style)
    p = parse_completion(inside, style)
    assert p.label == label and (not writable(two) or p.thought == two)
    assert parse_completion(f'{{"answer": {one}}}', style).label is None


@fuzz(
    "replies of endpoints",
    800,
    completion(),
    st.sampled_from([nli_ft.teacher_replies.Thought, nli_ft.teacher_replies.Reflection]),
)
def test_any_reply_of_an_endpoint_is_an_answer_or_refused(text, schema):
    try:
        answer, repairs = nli_ft.teacher_replies.read_reply(text, schema)
    except nli_ft.teacher_replies.ContentError as e:
        assert str(e)
        return
    assert (
        set(answer) == set(schema.model_fields)
        and answer["predicted_label"] in (0, 1)
        and re.search(r"[01]", text)
    )
    json_line(answer).encode()


# -- configs

values = st.one_of(
    any_json,
    st.sampled_from(
        [
            "auto",
            "none",
            "true",
            "cot",
            "nf4",
            "bf16",
            "all-linear",
            "latest",
            "smollm2-135m",
            ["q_proj"],
            0.5,
            1e-4,
            "./m",
            "a.jsonl",
            1,
            2,
            True,
            False,
            None,
        ]
    ),
)


def is_declared(key, v):
    "Is `v` of the type that the key's annotation declares? This is written out, so that it does not use the loader."
    kinds = str(
        KEYS[key].type
        if isinstance(KEYS[key].type, str)
        else getattr(KEYS[key].type, "__name__", KEYS[key].type)
    )
    if v is None:
        return "None" in kinds
    return type(v).__name__ in re.findall(r"\w+", kinds)


@fuzz("config values", 800, st.sampled_from(sorted(KEYS)), values)
def test_a_value_is_taken_as_it_is_or_refused_by_name(key, value):
    try:
        c = load_config("ablation2", {key: value}, check=False)
    except ConfigError as e:
        assert key in str(e)
        return
    got = getattr(c, key)
    assert is_declared(key, got), (key, got)
    if not isinstance(value, str):
        assert (list(value) if isinstance(value, (list, tuple)) else value) == got and isinstance(
            value, bool
        ) == isinstance(got, bool)
    before = load_config("ablation2").to_dict()
    assert {k: v for k, v in c.to_dict().items() if k != key} == {
        k: v for k, v in before.items() if k != key
    }, "another key changed"
    assert config_from_json(print_config(c)) == c


def meaning(key, text):
    "The values that a text may stand for: the text itself, and what Python reads in it."
    t = text.strip()
    yield t
    for read in (int, float):
        try:
            yield read(t)
        except ValueError:
            pass
    low = t.lower()
    if low in ("true", "yes", "on", "1"):
        yield True
    if low in ("false", "no", "off", "0"):
        yield False
    if low in ("none", "null"):
        yield None
    yield [x.strip().strip("'\"") for x in t.strip("[]()").split(",")]
    yield os.path.normpath(os.path.join(os.getcwd(), os.path.expanduser(t)))


def typed(argv):
    "(Config or None, the message)."
    p, said = CommandParser(prog="x"), io.StringIO()
    add_config_args(p)
    try:
        with redirect_stderr(said):
            return config_from_args(p.parse_args(argv)), ""
    except ConfigError as e:
        return None, str(e)
    except SystemExit as e:
        assert e.code == 2
        return None, said.getvalue()


@fuzz(
    "command lines",
    500,
    st.sampled_from(sorted(KEYS)),
    st.one_of(
        any_text,
        st.sampled_from(["1", "0", "true", "none", "1e-4", "0.5", "auto", "[q_proj, v_proj]", "all-linear"]),
        number.map(lambda x: "9" * 5000 if x == 10**400 else str(x)),
    ),
    st.booleans(),
)
def test_every_key_takes_any_typed_text_or_refuses_it_in_one_message(key, text, joined):
    c, said = typed([f"--{key}={text}"] if joined else [f"--{key}", text])
    if c is None:
        assert said and said.strip("\n").count("\n") == 0 and "Traceback" not in said
        return
    got = getattr(c, key)
    if not joined and got == getattr(load_config("default"), key) and text.startswith("-"):
        return
    got = str(c.path(key)) if isinstance(got, str) and got not in ("latest", text.strip()) else got
    assert any(type(m) is type(got) and m == got for m in meaning(key, text)), (key, text, got)


@fuzz(
    "command lines",
    500,
    st.one_of(
        st.lists(
            st.tuples(
                st.one_of(st.sampled_from(sorted(KEYS)), any_text),
                st.one_of(any_text, number.map(lambda x: "9" * 5000 if x == 10**400 else str(x))),
            ),
            max_size=3,
        ).map(lambda kv: " ".join(f"{k}={v}" for k, v in kv)),
        any_text,
        number.map(lambda x: "9" * 4000 if x == 10**400 else str(x)),
        st.sampled_from(["True", "None", "False", "5", "1.5", "[1]"]),
    ),
)
def test_papermills_overrides_are_a_config_or_a_config_error(text):
    from papermill.cli import _resolve_type  # what `-p overrides TEXT` becomes before the notebook sees it

    try:
        assert isinstance(load_config("default", _resolve_type(text)), Config)
    except ConfigError as e:
        assert "command line" in str(e)


@fuzz("command lines", 400, st.dictionaries(st.sampled_from(sorted(KEYS)), values, max_size=4))
def test_what_papermill_is_passed_gives_the_same_config_back(given_values):
    from papermill.cli import _resolve_type

    try:
        c = load_config("ablation2", given_values)
    except ConfigError:
        return
    text = nli_ft.records.overrides_text(c)
    here = os.getcwd()
    try:
        os.chdir(c.root)  # where the notebook runs
        assert load_config("ablation2", _resolve_type(text)) == c
        assert typed(shlex.split(nli_ft.records.run_command(c))[1:])[0] == c
    finally:
        os.chdir(here)


FORBIDDEN = [
    "import os",
    "from os import path",
    "open({canary!r}, 'w')",
    "x = open({canary!r}, 'w')",
    "seed = open({canary!r}, 'w').write('a')",
    "__import__('pathlib').Path({canary!r}).touch()",
    "seed = __import__('pathlib').Path({canary!r}).touch()",
    "seed = (lambda: 1)()",
    "seed = seed",
    "seed += 1",
    "seed: int = 1",
    "seed = lora_r = 1",
    "seed, lora_r = 1, 2",
    "seed = [x for x in [1]]",
    "seed = f'{{1}}'",
    "seed = 1 if True else 2",
    "seed = {{1: 2}}",
    "seed = {{1}}",
    "seed = b'1'",
    "seed = 1j",
    "seed = ...",
    "seed = 2 ** 9999999",
    "seed = 'a' * 999999999",
    "seed = 'a' + 'b'",
    "seed = not 1",
    "seed = ~1",
    "seed = 1 < 2",
    "seed = True + 1",
    "seed = 1 // 0",
    "seed = 1e308 * 10",
    "seed = [*[1]]",
    "seed = (yield)",
    "del seed",
    "if True: seed = 1",
    "def f(): pass",
    "class A: pass",
    "pass",
    "seed",
    "'text'; import os",
    "assert True",
    "seed = 1; import os",
    "seed = (a := 1)",
    "seed[0] = 1",
    "seed.x = 1",
    "global seed",
    "@a\ndef f(): pass",
    "match 1:\n  case 1: pass",
    "async def f(): pass",
    "raise ValueError",
    "exec('1')",
    "__builtins__ = 1",
    "__class__ = 1",
]
PLAIN = {
    "seed": st.integers(0, 2**32 - 1),
    "lora_r": st.integers(1, 2**40),
    "learning_rate": st.floats(1e-300, 1),
    "use_dora": st.booleans(),
    "max_steps": st.one_of(st.none(), st.integers(1, 99)),
    "target_modules": st.lists(st.sampled_from(["q_proj", "v_proj", "k_proj"]), min_size=1, unique=True),
    "wandb_project": st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1),
    "data_strategy": st.sampled_from(["all", "correct_only"]),
    "completion": st.sampled_from(["cot"]),
}


@fuzz(
    "config files",
    500,
    st.lists(st.sampled_from(sorted(PLAIN)), unique=True, max_size=4).flatmap(
        lambda ks: st.tuples(*[st.tuples(st.just(k), PLAIN[k]) for k in ks])
    ),
    st.one_of(st.none(), st.sampled_from(FORBIDDEN)),
    st.integers(0, 4),
    st.sampled_from(["", "'''About.'''\n", "# comment\n", "\ufeff", "\n\n"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_a_file_of_plain_assignments_is_read_and_any_other_statement_is_refused_and_never_executed(
    folder, pairs, forbidden, at, head, newline
):
    path, canary = folder / "mine.py", folder / "canary"
    lines = [f"{k} = {v!r}" for k, v in pairs]
    if forbidden:
        lines.insert(min(at, len(lines)), forbidden.format(canary=str(canary)))
    path.write_bytes((head + newline.join(lines) + newline).encode())
    try:
        c = load_config(str(path))
    except ConfigError as e:
        assert forbidden and "mine.py" in str(e), e
        return
    finally:
        assert not canary.exists(), "executed"
    assert not forbidden
    for k, v in pairs:
        assert getattr(c, k) == v and type(getattr(c, k)) is type(v)
    assert {k: v for k, v in c.to_dict().items() if k not in dict(pairs)} == {
        k: v for k, v in load_config("default").to_dict().items() if k not in dict(pairs)
    }


SHIPPED = {
    p.stem: p.read_text(encoding="utf-8")
    for p in (project_root() / "nli_ft" / "configs").glob("*.py")
    if p.stem != "__init__"
}


@fuzz(
    "config files",
    300,
    st.sampled_from(sorted(SHIPPED)),
    st.lists(
        st.tuples(
            st.floats(0, 1),
            st.integers(0, 12),
            st.one_of(
                any_text,
                st.sampled_from(["=", "\n", "(", "**", " = ", "# ", "seed = 1\n", "base = 'mine.py'\n", "'"]),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_a_shipped_config_with_typing_errors_is_a_config_or_a_config_error_with_its_name(folder, name, edits):
    text = SHIPPED[name]
    for where, cut, new in edits:
        at = int(where * len(text))
        text = text[:at] + new + text[at + cut :]
    path = folder / "mine.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        c = load_config(str(path))
    except ConfigError as e:
        assert "mine.py" in str(e) or any(
            n + ".py" in str(e) for n in SHIPPED
        )  # a value may contradict a value of a base
        return
    keys = {n.targets[0].id for n in ast.parse(path.read_bytes()).body if isinstance(n, ast.Assign)}
    assert keys <= {*KEYS, "base"} and set(c.sources) == set(KEYS)


@fuzz(
    "config files",
    200,
    st.one_of(any_text, st.tuples(any_text, any_text).map("/".join), any_text.map(lambda s: s + ".py")),
)
def test_any_name_of_a_config_is_found_or_refused(name):
    try:
        load_config(name)
    except ConfigError as e:
        assert str(e)


# -- records and files of earlier starts


@st.composite
def mended(draw, obj):
    "JSON text: the object with up to two values replaced, any JSON, or something torn."
    obj = json.loads(json.dumps(obj))
    if not draw(st.integers(0, 5)):
        return draw(
            st.one_of(
                any_json.map(json.dumps), deep, any_text.map(lambda s: s.encode("utf-8", "replace").decode())
            )
        )
    for _ in range(draw(st.integers(0, 2))):
        at = obj
        while True:
            k = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if isinstance(at[k], (dict, list)) and at[k] and draw(st.booleans()):
                at = at[k]
                continue
            at[k] = draw(any_json)
            break
    return json.dumps(obj)


CONFIG = json.loads(print_config(load_config("ablation2", "seed=3")))


@fuzz("records", 500, mended(CONFIG))
def test_a_recorded_config_is_read_or_refused(text):
    try:
        c = config_from_json(text)
    except ConfigError as e:
        assert "config.json" in str(e)
    else:
        assert all(is_declared(k, v) for k, v in c.to_dict().items()) and re.fullmatch(r"[\w.-]+", c.name)
        print_config(c).encode()


PREDICTION = dict(
    id=1,
    premise="p",
    hypothesis="h",
    label=1,
    completion="{}",
    predicted_label=1,
    outcome="strict",
    repairs=[],
    thought_process="so",
    p_entail=0.5,
    n_tokens=9,
    finish="stop",
    seconds=0.1,
    mode="cot",
    prompt_hash="x",
)
SUMMARY = dict(
    config="c",
    seed=1,
    status="done",
    started="2026-01-01T00:00:00Z",
    run_id="r",
    ended="2026-01-01T00:00:01Z",
    wall_s=1.0,
    before=dict(accuracy=0.5, n=4),
    after=dict(accuracy=0.5, valid_rate=1.0, n=4),
    adapter="models/x",
    error="no",
    pid=1,
    pid_start=2,
    boot="b",
)


@fuzz(
    "records",
    400,
    mended(SUMMARY),
    mended(dict(data=dict(train={}, eval={}), prompt=dict(template="auto"))),
    mended(dict(CONFIG, provenance="x")),
    mended(dict(step=1, loss=1.0)),
)
def test_one_odd_record_hides_no_other_and_is_read_or_refused_by_name(folder, summary, env, config, metrics):
    runs = folder / "runs"
    for name, parts in (
        ("odd", (summary, env, config, metrics)),
        ("fine", map(json.dumps, (SUMMARY, {}, CONFIG, {}))),
    ):
        run = runs / "c" / name
        run.mkdir(parents=True, exist_ok=True)
        for file, text in zip(("summary.json", "environment.json", "config.json", "metrics.jsonl"), parts):
            (run / file).write_text(text + "\n", encoding="utf-8")
    shown = nli_ft.records.show_runs(nli_ft.records.list_runs(runs))
    assert "odd" in shown and "fine" in shown
    for read in (nli_ft.records.read_run, nli_ft.ask.open_run):
        try:
            read(runs / "c" / "odd")
        except NliError as e:
            assert str(e)


@fuzz("records", 500, st.lists(mended(PREDICTION), min_size=1, max_size=3))
def test_odd_predictions_are_scored_or_refused_by_name(folder, lines):
    path = folder / "predictions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    try:
        s = nli_ft.evaluate.score(nli_ft.predictions.read_predictions(path))
    except (RecordError, DataError) as e:
        assert str(e)
    else:
        assert 0 <= s["accuracy"] <= 1 and s["n"] == sum(
            bool(l.strip()) for l in path.read_bytes().split(b"\n")
        )


WRITTEN = dict(
    id=1,
    premise="p",
    hypothesis="h",
    key="aa-bb",
    tries=1,
    why="no",
    provenance=dict(
        stage="think", cost=0.1, usage=dict(prompt_tokens=1, completion_tokens=2, estimated=False)
    ),
)


@fuzz("records", 400, st.lists(mended(WRITTEN), min_size=1, max_size=3))
def test_an_output_file_of_an_earlier_start_is_read_or_refused(folder, lines):
    out, failed, none = folder / "o.jsonl", folder / "f.jsonl", folder / "none"
    for path in (out, failed):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    for pair in ((out, none), (none, failed)):
        try:
            b = nli_ft.teacher_files.read_before(
                *pair,
                nli_ft.teacher_files.settings(
                    nli_ft.teacher_replies.THINK, nli_ft.teacher_session.Endpoint("http://x", "m")
                ),
                allow_mixed=True,
            )
        except DataError as e:
            assert ".jsonl:" in str(e)
        else:
            assert b.cost == b.cost


@fuzz(
    "records", 200, mended({"m": {"input": 1.5, "output": 2}, "n": {}}), st.sampled_from(["p.json", "p.toml"])
)
def test_price_and_prompt_files_are_read_or_refused(folder, text, name):
    (folder / name).write_text(text, encoding="utf-8")
    for read in (
        lambda: nli_ft.teacher_session.read_prices(folder / name, "m"),
        lambda: nli_ft.teacher_replies.read_prompt(folder / name, nli_ft.teacher_replies.THINK),
    ):
        try:
            read()
        except ConfigError as e:
            assert name in str(e)
    try:
        nli_ft.teacher.sampling_params(
            type("ns", (), dict(temperature=None, top_p=None, max_tokens=None, seed=None, extra_body=text))
        )
    except ConfigError as e:
        assert "--extra_body" in str(e)


@fuzz("records", 100, any_text.map("vote:".__add__) | any_text)
def test_any_decoding_mode_is_known_or_refused(mode):
    try:
        name, k = nli_ft.predict.parse_mode(mode)
    except DataError:
        return
    assert name in ("cot", "forced", "vote") and (k >= 2) == (name == "vote")


# -- rows to tokens and back


@pytest.fixture(scope="module", params=["mistral v3", "smollm2-135m"])
def tok(request):
    if request.param == "mistral v3":
        return mistral_v3_tokenizer()
    from nli_ft.bases import load_tokenizer

    return load_tokenizer(load_config("cpu_demo"))


# bytes that SmolLM2's vocabulary has no token for: unassigned planes and control characters
LACKING = b"\xf1\xf2\x04\x06\x13\x14\x16\x1d"

plain_text = st.one_of(good_text, st.text(max_size=60).filter(lambda s: s.strip() and "\0" not in s))


@fuzz(
    "token round trips",
    250,
    plain_text,
    plain_text,
    any_text,
    st.sampled_from([0, 1]),
    st.sampled_from(STYLES),
    st.sampled_from(list(PROMPTS)),
)
def test_a_row_comes_back_from_its_tokens_or_is_refused(
    tok, premise, hypothesis, thought, label, style, template
):
    row = sft_row(1, premise, hypothesis, thought, label, "x", template, style)
    text = render_completion(thought, label, style)
    spelled = "\n".join([premise, hypothesis, text])
    unfit = not writable(spelled) or any(
        str(t) in spelled
        for t in [*tok.all_special_tokens, *(t.content for t in tok.added_tokens_decoder.values())]
    )
    try:
        e = encode_row(tok, row, style)
    except DataError:
        assert unfit, "refused without a reason"
        return
    assert not unfit, "a control token or half a character got through"
    mistral = not tok.chat_template
    if not mistral and any(b in LACKING for b in text.encode()):
        return  # caught by `proofs`, which decode every row before training
    said = tok.decode([i for i, y in zip(e.input_ids, e.labels) if y != -100][:-1])
    assert said == (
        text.replace("▁", " ") if mistral else text
    )  # SentencePiece writes a blank as ▁, so it cannot distinguish the two
    p = parse_completion(said, style)
    if p.outcome == "echo":
        assert style != "label_only" and _EMPTY_THOUGHT.fullmatch(thought), "only a placeholder is no thought"
        return
    assert (
        p.label == label
        if json.loads(said).get("thought_process", "").strip() or style == "label_only"
        else p.label is None
    )
    assert (
        e.labels[: e.n_prompt] == [-100] * e.n_prompt and e.labels[-1] == e.input_ids[-1] == tok.eos_token_id
        if mistral
        else tok.decode(e.labels[-1:]) == "<|im_end|>"
    )
    assert e.input_ids[0] == tok.bos_token_id and (not mistral or e.input_ids.count(tok.bos_token_id) == 1)
    # a chat template may open every turn with BOS: as many as it has turns, and none from the text of a row
    if not mistral:
        assert e.input_ids.count(tok.bos_token_id) == encode_prompt(
            tok, prompt_messages("p", "h", template)
        ).count(tok.bos_token_id)
    if mistral:
        assert e.input_ids[: e.n_prompt] == mistral_reference(row["prompt"])


@fuzz(
    "token round trips",
    150,
    any_json,
    any_json,
    any_json,
    st.sampled_from(STYLES),
    st.lists(
        st.fixed_dictionaries(
            {},
            optional=dict(role=any_json | st.sampled_from(["user", "system", "assistant"]), content=any_json),
        ),
        max_size=3,
    )
    | any_json,
)
def test_rows_of_any_make_are_encoded_or_dropped_with_the_reason(tok, thought, premise, id, style, prompt):
    rows = [
        dict(sft_row("fine", "p", "h", "t", 1, "x")),
        dict(id=id, prompt=prompt, thought_process=thought, label=1),
        dict(id="bare", prompt=prompt_messages("p", "h"), label=0),
    ]
    kept, encs, dropped = encode_rows(tok, rows, 4096, completion=style)
    assert (
        len(kept) == len(encs)
        and len(kept) + len(dropped) == 3
        and kept[0]["id"] == "fine"
        and all(why for _, why in dropped)
    )
    bos = tok.bos_token_id
    if not tok.chat_template:
        assert all(e.input_ids.count(bos) == 1 for e in encs)
