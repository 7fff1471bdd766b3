"`nbs/explore.ipynb` as papermill executes it: on the committed record, on records of its own, on no record."

import json

import papermill, pytest

import test_records
from test_records import ROOT, finished

project = test_records.project  # a fixture: a project of its own, without runs
EXAMPLE = next((ROOT / "runs" / "cpu_demo").glob("*/predictions.jsonl")).parent


def explore(folder, out, **parameters):
    "The printed text and tables of the executed notebook, and whether it drew a plot."
    nb = papermill.execute_notebook(
        str(ROOT / "nbs" / "explore.ipynb"), str(out), parameters, cwd=str(folder), progress_bar=False
    )
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    text = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    return text, any("image/png" in o.get("data", {}) for o in outputs)


def test_the_committed_example_is_explored_and_left_as_it_is(tmp_path):
    before = {p.name: p.read_bytes() for p in EXAMPLE.iterdir()}
    text, drew = explore(
        ROOT, tmp_path / "out.ipynb", run=str(EXAMPLE.relative_to(ROOT)), premise="", hypothesis=""
    )
    summary = json.loads((EXAMPLE / "summary.json").read_text())["after"]
    assert f"{summary['right']} of {summary['n']} right" in text and drew
    assert f"{summary['n'] - summary['right']} of {summary['n']} answers are wrong" in text
    assert "the untrained model of this run is shown" in text and "[truncated] JSON" in text
    assert str(ROOT) not in text
    assert before == {p.name: p.read_bytes() for p in EXAMPLE.iterdir()}


def test_the_newest_run_is_taken_and_what_is_missing_is_one_line(project):
    finished(n=20, facts=dict(started="2026-01-01T00:00:00Z"))  # otherwise both begin in the same second
    finished(n=40, right=lambda i: i % 8 > 0, facts=dict(adapter="models/gone"))
    text, drew = explore(project, project / "out.ipynb")
    assert "35 of 40 right" in text and "5 of 40 answers are wrong" in text and drew
    assert "this one has no predictions_before.jsonl: nothing to compare" in text
    assert "not asked: models/gone/adapter_model.safetensors is missing" in text
    assert "`nli_run --config minimal_test` trains one" in text


def test_two_runs_are_read_side_by_side(project):
    one, two = finished(right=lambda i: i > 9), finished(right=lambda i: i > 2, seed=7)
    text, _ = explore(
        project,
        project / "out.ipynb",
        run=str(one.relative_to(project)),
        other=str(two.relative_to(project)),
        by="negation",
    )
    assert f"_a is minimal_test/{one.name}" in text and f"_b is minimal_test/{two.name}" in text
    assert "7 of 60 items are right in one of the two only" in text


def test_an_unknown_run_is_refused_by_name(project):
    finished()
    with pytest.raises(papermill.PapermillExecutionError) as e:
        explore(project, project / "out.ipynb", run="runs/cpu_demo/nothing-here")
    assert e.value.ename == "RecordError"
    assert "runs/cpu_demo/nothing-here is no folder. `nli_runs` lists" in e.value.evalue


def test_without_any_run_the_command_that_makes_one_is_named(project):
    with pytest.raises(papermill.PapermillExecutionError) as e:
        explore(project, project / "out.ipynb")
    assert e.value.ename == "RecordError" and "`nli_run --config cpu_demo` makes one" in e.value.evalue
