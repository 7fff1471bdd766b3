"`nli_corpus --depths`: the number of stated facts that an answer needs is controlled."

import json, re, subprocess, sys
from collections import Counter
from functools import cache

import pytest

from nli_ft.corpus import check_shortcuts, corpus_cli
from nli_ft.corpus_depths import DEPTH_GENERATOR, generate_depths
from nli_ft.corpus_thoughts import split_steps, thought_steps, thought_validity, wrong_thought
from nli_ft.process import DataError
from nli_ft.quadruples import GENERATOR, generate


@cache
def made(size):
    return generate_depths((1, 2, 3), size)


def facts_in(text):
    "The comparisons of a premise as pairs of names. It knows nothing of meanings."
    return re.findall(r"(\w+) is \w+ than (\w+)", text)


def asked(text):
    "Who is more than whom in a hypothesis, in any of its four wordings."
    for pattern, order in (
        (r"It is (\w+) who is \w+ than (\w+)", (1, 2)),
        (r"(?:Compared with|Next to) (\w+), (\w+) is \w+", (2, 1)),
        (r"(\w+) is \w+ than (\w+)", (1, 2)),
    ):
        if m := re.fullmatch(pattern, text.rstrip(".")):
            return m[order[0]], m[order[1]]


def steps_down(facts, top, low):
    "How many comparisons lead from one person down to another. None: none do."
    at, n = {top}, 0
    while at and low not in at:
        at, n = {b for a, b in facts if a in at}, n + 1
    return n if at else None


def test_an_independent_reader_counts_the_facts_that_an_answer_needs():
    for rows in made("small").values():
        for r in rows:
            facts, (x, y) = facts_in(r["premise"]), asked(r["hypothesis"])
            assert len(facts) == 5 and len({name for fact in facts for name in fact}) == 6
            down, up = steps_down(facts, x, y), steps_down(facts, y, x)
            assert (down, up) == ((r["depth"], None) if r["label"] else (None, r["depth"])), r["id"]


def test_train_and_dev_mix_the_depths_evenly_and_each_test_file_has_its_own():
    count = {split: Counter(r["depth"] for r in rows) for split, rows in made("small").items()}
    assert count["train"] == {1: 856, 2: 856, 3: 856} and count["dev"] == {1: 40, 2: 40, 3: 40}
    assert [count[f"test_depth{k}"] for k in (1, 2, 3)] == [{1: 120}, {2: 120}, {3: 120}]
    for rows in made("small").values():
        assert all(sum(r["label"] for r in rows[i : i + 4]) == 2 for i in range(0, len(rows), 4))


def test_no_reader_of_the_gate_is_right_on_more_than_half_where_a_chain_is_needed():
    for split, found in check_shortcuts(made("small")).items():
        shares = found["comparatives"] | dict(n=0.5)
        tree = shares.pop("boosted_tree")
        assert set(shares.values()) == {0.5}
        assert tree == 0.5 or split in ("dev", "test_depth1")  # the tree reads what is stated


def in_a_row(facts):
    "The people of a premise from the top down. It fails where they form no single chain."
    (top,) = {a for a, _ in facts} - {b for _, b in facts}
    below, out = dict(facts), [top]
    while out[-1] in below:
        out.append(below[out[-1]])
    return out


def test_every_premise_is_one_chain_and_nobody_in_a_hypothesis_stands_at_its_ends():
    for rows in made("small").values():
        for r in rows:
            people = in_a_row(facts_in(r["premise"]))
            i, j = map(people.index, asked(r["hypothesis"]))
            assert len(people) == 6 and {i, j} <= {1, 2, 3, 4}
            assert abs(i - j) == r["depth"] and (i < j) == bool(r["label"])


def test_the_second_premise_of_a_group_has_the_two_people_exchanged():
    rows = made("small")["train"]
    for group in (rows[i : i + 4] for i in range(0, 400, 4)):
        one, other = {tuple(in_a_row(facts_in(r["premise"]))) for r in group}
        x, y = asked(group[0]["hypothesis"])
        assert other == tuple({x: y, y: x}.get(name, name) for name in one)


def left_of_than(facts, x, y):
    "Does the first person stand on the left more often than the second? It says no where both do so equally."
    lefts = [a for a, _ in facts]
    return lefts.count(x) > lefts.count(y)


def said_first(facts, x, y):
    names = [name for fact in facts for name in fact]
    return names.index(x) < names.index(y)


def left_when_first_said(facts, x, y):
    names = [name for fact in facts for name in fact]
    return names.index(x) % 2 == 0


def word_for_word(facts, x, y):
    return (x, y) in facts


@pytest.mark.parametrize("reader", [left_of_than, said_first, left_when_first_said, word_for_word])
def test_a_reader_that_follows_no_chain_is_right_on_half(reader):
    for k in (1, 2, 3):
        rows = made("small")[f"test_depth{k}"]
        answers = [reader(facts_in(r["premise"]), *asked(r["hypothesis"])) for r in rows]
        share = sum(answer == r["label"] for answer, r in zip(answers, rows)) / len(rows)
        assert share == (1 if k == 1 and reader is word_for_word else 0.5), k


def walked(people, premise):
    "The links between people, in the word of the premise."
    more = re.search(r"is (\w+) than", premise)[1]
    return ", ".join(f"{a} is {more} than {b}" for a, b in zip(people, people[1:]))


def test_a_thought_walks_down_to_the_end_and_each_of_its_steps_is_right():
    for k in (1, 2, 3):
        for r in made("tiny")[f"test_depth{k}"]:
            x, y = asked(r["hypothesis"])
            people = in_a_row(facts_in(r["premise"]))
            walk = walked([*people[people.index(x) :], "nobody"], r["premise"])
            end = "there, so it must hold" if r["label"] else "not there, so it must fail"
            assert r["thought_process"] == f"{walk}. {y} is {end}."
            assert {verdict for _, verdict in thought_steps(r, r["thought_process"])} == {"right"}


def walk_in(thought):
    "Who it begins with, whom it meets, whom it looks for, and how it ends."
    m = re.fullmatch(r"(.*)\. (\w+) is (there, so it must hold|not there, so it must fail)\.", thought)
    links = [re.fullmatch(r"(\w+) is \w+ than (\w+)", clause).groups() for clause in m[1].split(", ")]
    assert all(a[1] == b[0] for a, b in zip(links, links[1:])) and links[-1][1] == "nobody"
    return links[0][0], [low for _, low in links[:-1]], m[2], m[3]


def test_a_false_walk_is_false_only_in_its_names_and_they_say_nothing_about_the_label():
    meets, lengths, rows = Counter(), Counter(), made("small")["train"][:1200]
    for r in rows:
        text = wrong_thought(r, 0)
        (x, names, y, end), (x1, names1, y1, end1) = walk_in(text), walk_in(r["thought_process"])
        assert (x, y, end) == (x1, y1, end1) and names != names1 and x not in names
        assert len(set(names)) == len(names) and abs(len(names) - len(names1)) <= 2
        assert set(names) <= {name for fact in facts_in(r["premise"]) for name in fact}
        meets[y in names, r["label"]] += 1
        lengths[len(names), r["label"]] += 1
    for r in rows[::10]:
        assert [verdict for _, verdict in thought_steps(r, wrong_thought(r, 0))] == [
            "wrong",
            "right",
            "right",
        ]
    for count in (meets, lengths):
        shares = [n / sum(v for (_, y), v in count.items() if y == label) for (_, label), n in count.items()]
        assert len(shares) == 4 and all(abs(share - 0.5) < 0.07 for share in shares), count


def test_a_walk_is_judged_by_the_row_name_by_name():
    r = next(r for r in made("tiny")["test_depth2"] if len(walk_in(r["thought_process"])[1]) == 3)
    x, (a, b, c), y, end = walk_in(r["thought_process"])
    top, *_, last = in_a_row(facts_in(r["premise"]))

    def verdict(step):
        ((_, found),) = thought_steps(r, step)
        return found

    def walk(*people):
        return verdict(walked(people, r["premise"]))

    for names in ([b, a, c], [a, b], [a, b, c, top], [top, b, c], [a, b, b, c], [a, b, "Nemo"], []):
        assert walk(x, *names, "nobody") == "wrong", names
    assert walk(x, a, b, c, "nobody") == "right"
    assert verdict(walked([x, a, b, c, "nobody"], r["premise"]).lower()) == "right"
    # true, and of another person, or with a fact left out, or without the end
    assert walk(a, b, c, "nobody") == walk(last, "nobody") == walk(x, a, c, "nobody") == "unknown"
    assert walk(x, a, b, c) == "unknown"
    assert walk(a, c, b, "nobody") == walk("Nemo", a, "nobody") == "wrong"
    is_there, is_not = ("right", "wrong") if r["label"] else ("wrong", "right")
    assert (verdict(f"{y} is there."), verdict(f"{y} is not there.")) == (is_there, is_not)
    assert (verdict(f"{c} is there."), verdict(f"{top} is there."), verdict("Nemo is there.")) == (
        "unknown",
        "wrong",
        "wrong",
    )
    for text in (f"Through {a} comes {b}.", f"Below {x}: {a} and {b}.", f"{y} is here."):
        assert verdict(text) == "unknown"


def test_a_thought_is_right_only_if_its_walk_comes_before_what_it_finds():
    for r in made("tiny")["dev"][:12]:
        walk, found, verdict = split_steps(r["thought_process"])
        assert thought_validity(r, r["thought_process"]) == "right"
        assert thought_validity(r, wrong_thought(r, 1)) == "wrong"
        for steps in ((found, walk), (walk,), (found,)):
            assert thought_validity(r, f"{'. '.join(steps)}, {verdict}.") == "unknown", steps


@pytest.mark.parametrize("broken", ["a fork", "a circle", "an end"])
def test_a_row_that_is_no_chain_of_six_is_refused(broken):
    r = made("tiny")["dev"][0]
    (_, *facts), (_, x, y) = json.loads(r["meaning"])
    below = {a: b for _, a, b in facts}
    (last,) = set(below.values()) - set(below)
    (top,) = set(below) - set(below.values())
    if broken == "a fork":
        facts = [["more", top if b == last else a, b] for _, a, b in facts]
    if broken == "a circle":
        facts = [["more", a, top if b == last else b] for _, a, b in facts]
    h = ["more", x, last] if broken == "an end" else ["more", x, y]
    with pytest.raises(DataError, match="comparatives has no meaning"):
        wrong_thought(r | dict(meaning=json.dumps([["and", *facts], h])), 0)


def test_a_manifest_of_depths_has_a_generator_of_its_own(tmp_path):
    assert corpus_cli(["--out", str(tmp_path), "--depths", "1,2,3"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["generator"] == DEPTH_GENERATOR != GENERATOR and manifest["depths"] == [1, 2, 3]


def test_the_same_seed_gives_the_same_rows_in_a_fresh_process():
    "This process has another hash seed, so no order may come from a set."
    code = "import json, nli_ft.corpus_depths as c; print(json.dumps(c.generate_depths((1, 2, 3), 'tiny')))"
    env = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""}
    p = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    assert json.loads(p.stdout) == made("tiny")


@pytest.mark.parametrize(
    "options,message",
    [
        (["--depths", "4"], "give some of 1,2,3"),
        (["--depths", "deep"], "give some of 1,2,3"),
        (["--depths", "1", "--size", "demo"], "choose one of tiny, small, full"),
        (["--depths", "1", "--label_set", "three_way"], "nothing is neutral"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as e:
        sys.exit(corpus_cli(["--out", str(tmp_path / "c"), *options]))
    assert e.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_an_ordinary_corpus_has_no_depth():
    assert not any("depth" in r for rows in generate("demo").values() for r in rows)
    with pytest.raises(DataError, match="no row of the corpus"):
        wrong_thought(made("tiny")["dev"][0] | dict(hypothesis="Nobody is tall."), 0)
