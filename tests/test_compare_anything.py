"`nli_compare` takes runs, evaluations, encoders, files and the harness's samples, and says what it cannot compare."

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from nli_ft.compare import compare_cli, compare_frame, compare_selected
from nli_ft.config_loader import load_config
from nli_ft.differences import load_matched
from nli_ft.evaluate import score
from nli_ft.labels import RELATIONS
from nli_ft.process import RecordError
from nli_ft.records import finish_run, start_run

ROOT = Path(__file__).resolve().parents[1]
N = 40


def row(i, gold, said, **other):
    own = dict(
        id=i, premise=f"Premise {i // 2}.", hypothesis=f"Hypothesis {i}.", label=gold, predicted_label=said
    )
    return own | dict(outcome="strict", mode="cot", prompt_hash="x", p_entail=None, group_id=i // 2) | other


def said(right, gold=lambda i: i % 2, answers=(0, 1)):
    "Prediction rows whose item i is answered right where `right(i)`."
    golds = [gold(i) for i in range(N)]
    return [row(i, y, y if right(i) else next(a for a in answers if a != y)) for i, y in enumerate(golds)]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def record(right=lambda i: i % 4 > 0, seed=42, contracts=("entailment",)):
    "A finished run."
    run = start_run(load_config("minimal_test").replace(seed=seed))
    rows = said(right)
    jsonl(run / "predictions.jsonl", rows)
    environment = json.loads((run / "environment.json").read_text())
    environment["data"]["eval"] = dict(path="e.jsonl", sha256="ab" * 32, contracts={c: N for c in contracts})
    (run / "environment.json").write_text(json.dumps(environment))
    finish_run(run, after=score(rows))
    return run


def evaluation(folder, rows, report=None, **facts):
    "A record of a model that is no run."
    jsonl(folder / "predictions.jsonl", rows)
    own = dict(
        kind="evaluation", name=folder.name, model="some/model", adapter=None, shots=0, seed=42, mode="cot"
    )
    own |= dict(data={}, label_set="binary", contracts={"entailment": N}, created="2026-01-02", packages={})
    (folder / "evaluation.json").write_text(json.dumps(own | facts))
    (folder / "report.json").write_text(json.dumps(report or {}))
    return folder


def table(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_of(*refs, **how):
    return compare_selected(list(map(str, refs)), **how)


# -- each kind of entry


def test_every_kind_of_entry_stands_in_one_table(project, capsys):
    run = record()
    jsonl(
        run / "evaluations/pairs-abababab-forced/predictions.jsonl",
        [r | dict(mode="forced") for r in said(bool)],
    )
    (run / "evaluations/pairs-abababab-forced/report.json").write_text("{}")
    zero = evaluation(project / "zero-shot", said(lambda i: i % 3 > 0))
    settings = dict(epochs=3, learning_rate=5e-5)
    rival = evaluation(project / "rival", said(lambda i: i % 5 > 0), mode="encoder", settings=settings)
    rows = [dict(id=r["id"], prediction=r["predicted_label"]) for r in said(lambda i: i % 7 > 0)]
    given = jsonl(project / "given.jsonl", rows)
    assert compare_cli([*map(str, (run, f"{run}@pairs", zero, rival, given)), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    by_name = {r["run"].rpartition("/")[2]: r for r in out["runs"]}
    assert len(by_name) == 5 and all(r["n"] == N for r in out["runs"])
    below = next(r for name, r in by_name.items() if "@pairs-abababab-forced" in name)
    assert below["differs"][0] == "decoding mode cot → forced"
    assert "kind run → evaluation" in by_name["zero-shot"]["differs"]
    assert any(d.startswith("model ") and d.endswith("some/model") for d in by_name["zero-shot"]["differs"])
    assert "kind run → encoder" in by_name["rival"]["differs"]
    assert by_name["given.jsonl"]["differs"] == [
        "kind run → file", "not recorded: model, decoding mode, package versions"
    ]  # fmt: skip
    assert by_name["given.jsonl"]["valid_rate"] is None
    assert any(f"given.jsonl: its gold labels are those of {run.parent.name}/" in s for s in out["remarks"])
    # its clusters are those of the run: two items of one group count as one
    assert by_name["given.jsonl"]["n_clusters"] == N // 2


def test_a_table_of_another_tool_is_read_by_its_columns(project):
    run = record()
    words = [
        "pairID;label_predicted;gold",
        *(f"{i};{'entailment' if i % 2 else 'not_entailment'};{i % 2}" for i in range(N)),
    ]
    given = table(project / "other.csv", words)
    rows, _, said_beside = rows_of(run, given)
    assert rows[1]["accuracy"] == 1 and not any("gold labels are those" in s for s in said_beside)


@pytest.mark.parametrize(
    "lines, why",
    [
        (["id,text", "1,hello"], "missing column prediction"),
        (["prediction,label", "1,1"], "missing column id"),
        (["id,prediction,pred", "1,1,1"], "columns prediction and pred can both be predictions"),
        (["id,prediction", "1,2"], ":2: label '2' is none of 0, 1"),
        (["id,prediction", "1,1", "1,0"], "occurs more than once"),
        (["id,prediction", "1,neutral", "2,non-entailment"], "labels of one set"),
        (["id,prediction"], "holds no rows"),
        (["id,prediction,", "1,1"], "empty or repeated column names"),
    ],
)
def test_a_file_that_says_too_little_is_refused_with_what_it_lacks(project, lines, why):
    with pytest.raises(RecordError, match=re.escape(why)):
        load_matched([table(project / "bad.csv", lines)])


def test_an_evaluation_below_a_run_is_found_by_its_name_and_a_doubtful_name_is_refused(project):
    run = record()
    for name in ("hans-0123abcd-cot", "hans-0123abcd-forced", "dev-00000000-cot"):
        jsonl(run / f"evaluations/{name}/predictions.jsonl", said(lambda i: i % 3 > 0))
    (run / "evaluations/dev-00000000-cot/report.json").write_text("{}")
    assert load_matched([f"{run}@dev"])[0][0][2].endswith("@dev-00000000-cot")
    with pytest.raises(
        RecordError, match="can be hans-0123abcd-cot or hans-0123abcd-forced. Write the whole name"
    ):
        load_matched([f"{run}@hans"])
    with pytest.raises(RecordError, match="no evaluation 'mnli'. Its evaluations: dev-00000000-cot, hans"):
        load_matched([f"{run}@mnli"])
    with pytest.raises(RecordError, match="report.json is missing, so the evaluation is not finished"):
        load_matched([f"{run}@hans-0123abcd-cot"])


def test_a_file_or_folder_that_is_not_there_or_is_no_evaluation_is_named(project):
    with pytest.raises(RecordError, match="nothing.csv: no such file"):
        load_matched(["nothing.csv"])
    folder = evaluation(project / "odd", said(bool), kind="training")
    with pytest.raises(RecordError, match="is no evaluation: its kind is another"):
        load_matched([folder])


# -- lm-evaluation-harness


def sample(i, likelihoods, target, texts=("True", "Neither", "False"), **doc):
    "A line of a samples file, as the harness writes it."
    doc = doc or dict(premise=f"premise {i // 2}", hypothesis=f"Hypothesis {i}", label=0)
    asked = {f"gen_args_{k}": dict(arg_0="…", arg_1=f" {t}") for k, t in enumerate(texts)}
    scores = [[str(v), "False"] for v in likelihoods]
    return dict(
        doc_id=i, doc=doc, target=target, arguments=asked, resps=[], filtered_resps=scores, filter="none"
    )


def test_samples_of_the_harness_are_matched_by_text_and_answered_by_the_likeliest_choice(project):
    gold = [RELATIONS[i % 3] for i in range(N)]
    mine = evaluation(
        project / "mine", said(lambda i: i % 4 > 0, gold.__getitem__, RELATIONS), label_set="three_way"
    )
    words = dict(zip(RELATIONS, ("True", "Neither", "False")))
    lines = [sample(i, [-1.0 - abs(k - i % 3) for k in range(3)], words[gold[i]]) for i in range(N)]
    lines = [line | dict(doc_id=N - i) for i, line in enumerate(lines)]
    samples = jsonl(project / "samples_anli_r1_2026-01-02T03-04-05.000000.jsonl", lines)
    entries, said_beside = load_matched([mine, samples])
    assert [p["predicted_label"] for p in entries[1][1]] == gold
    assert any("True = entailment, Neither = neutral, False = contradiction" in s for s in said_beside)
    assert any("40 items were matched with those of mine by premise and hypothesis" in s for s in said_beside)


def test_samples_of_another_task_are_refused_by_what_they_have(project):
    piqa = jsonl(project / "samples_piqa_x.jsonl", [sample(0, (-1, -2), "0", ("a", "b"), goal="g", sol1="a")])
    with pytest.raises(
        RecordError, match="task piqa_x, whose documents have no premise and hypothesis. They have: goal"
    ):
        load_matched([piqa])
    odd = jsonl(project / "samples_odd.jsonl", [sample(0, (-1, -2), "0", ("A", "B"))])
    with pytest.raises(RecordError, match="nothing says which label its choices stand for \\('A', 'B'\\)"):
        load_matched([odd])
    written = sample(0, (), "0", (" ",)) | dict(filtered_resps=["yes"])
    with pytest.raises(RecordError, match="generates text, and only choices are read"):
        load_matched([jsonl(project / "samples_free.jsonl", [written])])


def test_our_own_tasks_of_the_harness_are_read_in_the_order_of_the_label_set(project):
    run = record()
    texts = ('{"predicted_label": 0', '{"predicted_label": 1')
    lines = [
        sample(i, (-2.0, -1.0), texts[i % 2], texts, id=str(i), text="…", choices=texts, label=str(i % 2))
        for i in range(N)
    ]
    rows, _, _ = rows_of(run, jsonl(project / "samples_nli_ft_pairs.jsonl", lines))
    assert rows[1]["accuracy"] == 0.5 and rows[1]["n"] == N


# -- which item is which


def test_other_items_are_refused_with_their_number_and_common_compares_the_shared_ones(project):
    run = record()
    given = jsonl(project / "part.jsonl", said(bool)[:30])
    with pytest.raises(RecordError, match="30 and 40 items; 10 of them.*--common compares the 30 items"):
        rows_of(run, given)
    rows, _, said_beside = rows_of(run, given, common=True)
    assert [r["n"] for r in rows] == [30, 30]
    assert any("30 items are compared. 10 of minimal_test/" in s for s in said_beside)


def test_pairs_that_occur_twice_with_other_gold_are_not_matched_by_text(project):
    twice = [
        r | dict(id=f"x{r['id']}", premise="P", hypothesis=f"H{i // 2}") for i, r in enumerate(said(bool))
    ]
    other = [r | dict(id=f"y{r['id']}") for r in twice]
    with pytest.raises(RecordError, match="occurs twice, with the gold labels 0 and 1"):
        load_matched([jsonl(project / "a.jsonl", twice), jsonl(project / "b.jsonl", other)])


def test_gold_that_nobody_has_or_that_differs_is_refused(project):
    bare = jsonl(
        project / "bare.jsonl", [dict(id=r["id"], prediction=r["predicted_label"]) for r in said(bool)]
    )
    with pytest.raises(RecordError, match="without a gold label, and no other entry has them all"):
        load_matched(
            [
                bare,
                jsonl(
                    project / "more.jsonl", json.loads(f"[{','.join(bare.read_text().split(chr(10))[:-1])}]")
                ),
            ]
        )
    turned = jsonl(project / "turned.jsonl", said(bool, lambda i: 1 - i % 2))
    with pytest.raises(RecordError, match="not evaluated on the labels of"):
        load_matched([record(), turned])


# -- label sets and contracts


def test_three_labels_meet_two_only_when_they_are_merged(project):
    run = record()
    gold = ["entailment" if i % 2 else ("neutral", "contradiction")[i // 2 % 2] for i in range(N)]
    three = evaluation(
        project / "three", said(lambda i: False, gold.__getitem__, RELATIONS[1:]), label_set="three_way"
    )
    with pytest.raises(
        RecordError, match="has binary labels and three has three_way labels. --two_way merges"
    ):
        rows_of(run, three)
    rows, _, _ = rows_of(run, three, two_way=True)
    # neutral for contradiction is right once both are "not entailment"
    merged = [
        int("entailment" == y) == int(a["predicted_label"] == "entailment")
        for y, a in zip(gold, said(lambda i: False, gold.__getitem__, RELATIONS[1:]))
    ]
    assert rows[1]["accuracy"] == sum(merged) / N == 0.5


def test_labels_of_two_contracts_are_not_compared(project):
    run, course = record(), evaluation(project / "course", said(bool), contracts={"course": N})
    with pytest.raises(
        RecordError, match="contract course, and those of .* entailment, so a 1 does not mean the same"
    ):
        rows_of(run, course)
    rows_of(run, evaluation(project / "same", said(bool), contracts={"binary": N}))


# -- what comes out


def test_the_latex_table_is_balanced_and_escaped_and_the_frame_holds_numbers(project, capsys):
    run = record()
    given = jsonl(project / "50%_of_all&more.jsonl", said(lambda i: i % 9 > 0))
    assert compare_cli([str(run), str(given), "--out", "table.tex"]) == 0
    text = (project / "table.tex").read_text()
    lines = [s for s in text.splitlines() if s.endswith(r"\\")]
    assert len(lines) == 4  # head, two entries, majority label
    assert {len(re.findall(r"(?<!\\)&", s)) for s in lines} == {5}
    assert r"\caption{Single runs on " in text and text.count("{table*}") == 2
    assert r"50\%\_of\_all\&more.jsonl" in text and r"\toprule" in text and r"\end{tabular}" in text
    assert all(s.startswith("%") for s in text.split(r"\end{table*}")[1].strip().splitlines())
    frame = compare_frame([str(run), str(given)])
    numbers = "n accuracy accuracy_low accuracy_high macro_f1 difference difference_low p p_holm".split()
    assert all(pd.api.types.is_numeric_dtype(frame[c]) for c in numbers)
    assert frame["accuracy"].tolist() == [0.75, score(said(lambda i: i % 9 > 0))["accuracy"]]
    capsys.readouterr()


def test_encoders_of_several_seeds_are_repetitions_and_a_file_has_no_config(project):
    settings = dict(epochs=3)
    one, two = (
        evaluation(
            project / f"e{s}",
            said(lambda i: (i + s) % 5 > 0),
            name="e",
            mode="encoder",
            seed=s,
            settings=settings,
        )
        for s in (1, 2)
    )
    runs = [record(lambda i: i % 4 > 0, 1), record(lambda i: (i + 1) % 4 > 0, 2)]
    given = jsonl(project / "given.jsonl", said(bool))
    _, by_config, said_beside = rows_of(*runs, one, two, given)
    assert [(r["config"], r["seeds"]) for r in by_config] == [("minimal_test", [1, 2]), ("e", [1, 2])]
    assert not any(s.startswith("config given") for s in said_beside)


def test_two_runs_under_contracts_that_disagree_are_refused(tmp_path):
    example, runs = ROOT / "runs/cpu_demo/20261126-095322-s42-e8b84932", []
    for name, contract in dict(a="entailment", b="course").items():
        runs.append(tmp_path / f"20261126-095322-s42-{name * 8}")
        shutil.copytree(example, runs[-1])
        env = json.loads((runs[-1] / "environment.json").read_text())
        env["data"]["eval"]["contracts"] = {contract: 120}
        (runs[-1] / "environment.json").write_text(json.dumps(env))
        summary = json.loads((runs[-1] / "summary.json").read_text())
        (runs[-1] / "summary.json").write_text(json.dumps(summary | dict(run_id=f"run-{name}")))
    with pytest.raises(RecordError, match="have the contract course, and those of"):
        load_matched(runs)
