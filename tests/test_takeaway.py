"""What a person takes away from a record: tables and figures for a paper, a page, notes, and a tidy disk."""

import json, re, shutil, subprocess, sys

import pandas as pd
import pytest

import nli_ft.commands
import nli_ft.records
from nli_ft.compare import compare_cli
from nli_ft.config_loader import load_config
from nli_ft.keeping import weights_folder
from nli_ft.records import list_runs, looks, read_notes
from conftest import ROOT
from test_verdicts import record

SHA = "ab" * 32  # of a file of rows that a record judged


def nli_runs(capsys, *argv, code=0):
    "What `nli_runs` prints: stdout where it is done, stderr where it ends with another code."
    try:
        ended = nli_ft.commands.runs_cli([*map(str, argv)])
    except SystemExit as e:
        ended = e.code
    out, err = capsys.readouterr()
    assert ended == code, err
    return err if code else out


def with_weights(run, content=b"an adapter"):
    "The folder of weights of a record, with an adapter in it."
    summary = json.loads((run / "summary.json").read_text())
    adapter = load_config("minimal_test").path("output_dir") / "minimal_test" / run.name / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    (run / "summary.json").write_text(
        json.dumps(summary | dict(adapter=f"models/minimal_test/{run.name}/adapter"))
    )
    return adapter.parent


def test_one_comparison_goes_into_every_format_and_nothing_is_overwritten(project, capsys):
    runs = [
        record(lambda i: (i + s + r) % 5 > 0, overrides=f"lora_r={r}", seed=s) for s in (1, 2) for r in (2, 4)
    ]
    names = [f"paper/t.{e}" for e in ("tex", "md", "csv", "pdf", "svg")]
    (project / "paper").mkdir()
    (project / "paper/t-losses.svg").write_text("mine")
    out = [word for name in names for word in ("--out", name)]
    with pytest.raises(SystemExit) as e:
        compare_cli([*map(str, runs), *out])
    assert e.value.code == 2 and "paper/t-losses.svg exists already" in capsys.readouterr().err
    assert [p.name for p in (project / "paper").iterdir()] == ["t-losses.svg"]
    (project / "paper/t-losses.svg").unlink()
    assert compare_cli([*map(str, runs), *out]) == 0
    written = capsys.readouterr().out.rpartition("written: ")[2].split()
    assert len(written) == 3 + 2 * 3 and all((project / name.strip(",")).is_file() for name in written)
    latex, page = ((project / name).read_text() for name in names[:2])
    for text in (latex, page):
        assert "60 items in 30 clusters" in text and "Satterthwaite" in text and "sign flips" in text
    assert latex.count(r"\begin{table") == latex.count(r"\end{table") == 2 == latex.count(r"\caption{")
    assert r"minimal\_test [lora\_r=4] s1" in latex
    numbers = pd.read_csv(project / "paper/t.csv")
    assert all(
        pd.api.types.is_numeric_dtype(numbers[c]) for c in ("accuracy", "accuracy_low", "p_holm", "sd")
    )
    svg = (project / "paper/t.svg").read_text()
    assert float(re.search(r'width="([\d.]+)pt"', svg)[1]) <= 219  # a column of a paper
    assert "minimal_test [lora_r=4]" in svg  # text stays text


def test_a_misspelt_ending_costs_nothing(project, capsys):
    with pytest.raises(SystemExit) as e:
        compare_cli(["a", "b", "--out", "table.docx"])
    assert e.value.code == 2 and "--out table.docx: the ending says the format" in capsys.readouterr().err


def test_a_record_is_a_page_and_json_on_request(project, capsys):
    run = record(seed=3)
    page = nli_runs(capsys, run)
    for part in (
        "minimal_test/",
        "nli_run --config minimal_test",
        "n = 60 in 30 clusters",
        "differs from default",
    ):
        assert part in page, part
    assert nli_runs(capsys, f"minimal_test/{run.name}") == page
    assert json.loads(nli_runs(capsys, run, "--json"))["status"] == "done"


def test_records_are_filtered_tagged_and_archived_and_the_record_stays_as_it_was(project, capsys):
    one = record(seed=1)
    record(config="cpu_demo", seed=2)
    before = {p.name: p.read_bytes() for p in one.iterdir()}
    page = nli_runs(capsys, one, "--tag", "paper", "v2", "--note", "a slip of the pen")
    assert "tags: paper, v2" in page and "a slip of the pen" in page
    assert {p.name: p.read_bytes() for p in one.iterdir() if p.name != "notes.json"} == before
    for words, seeds in {
        "--tag paper": [1],
        "--config cpu_demo": [2],
        "--status failed": [],
        "--config nothing_like_it": [],
        "--since 1h": [1, 2],
        "--since 2999-01-01": [],
    }.items():
        assert [r["seed"] for r in json.loads(nli_runs(capsys, "--json", *words.split()))] == seeds, words
    assert nli_runs(capsys, "--config", "cpu_dmo") == (
        "no record fits, and none is of cpu_dmo. Did you mean cpu_demo? There are records of cpu_demo, minimal_test\n"
    )
    nli_runs(capsys, one, "--archive", "--untag", "v2")
    assert (
        one.name not in (listed := nli_runs(capsys)) and "1 in the archive (--archived lists them)" in listed
    )
    assert "paper" in nli_runs(capsys, "--archived", "--disk")
    with pytest.raises(SystemExit):
        compare_cli(["--all", "minimal_test"])
    assert "no finished run of minimal_test" in capsys.readouterr().err
    nli_runs(capsys, one, "--unarchive")
    assert len(list_runs()) == 2 and read_notes(one)["tags"] == ["paper"]
    assert "--disk is about the list" in nli_runs(capsys, one, "--disk", code=2)
    assert "--note: name the record's folder" in nli_runs(capsys, "--note", "x", code=2)
    assert "--since soon: write a date" in nli_runs(capsys, "--since", "soon", code=2)


def test_the_last_copy_is_never_deleted_without_being_named(project, capsys):
    run = record(seed=1)
    weights = with_weights(run)
    assert weights_folder(run) == weights
    assert "THE LAST COPY" in nli_runs(capsys, run, "--delete", "weights", "--yes", code=2)
    assert weights.is_dir()
    copy = with_weights(record(seed=2))  # another run has the same adapter
    assert "Nobody can be asked here" in nli_runs(capsys, run, "--delete", "weights", code=2)
    assert "deleted weights of minimal_test/" in nli_runs(capsys, run, "--delete", "weights", "--yes")
    assert not weights.exists() and copy.is_dir() and (run / "predictions.jsonl").is_file()
    assert "(deleted on 20" in nli_runs(capsys, run)


def test_a_deleted_record_still_counts_as_a_look_at_the_test(project, capsys):
    run = record(seed=1)
    environment = json.loads((run / "environment.json").read_text())
    environment["data"]["eval"] = dict(path="test.jsonl", sha256=SHA)
    (run / "environment.json").write_text(json.dumps(environment))
    assert looks(SHA, run.parents[1]) == dict(minimal_test=1)
    nli_runs(capsys, run, "--delete", "all", "--yes", "--last_copy")
    assert not run.exists() and looks(SHA, run.parents[1]) == dict(minimal_test=1)
    assert list_runs() == []


def test_a_run_that_is_going_is_not_deleted(project, capsys):
    run = nli_ft.records.start_run(load_config("minimal_test"))
    assert "is still going" in nli_runs(capsys, run, "--delete", "all", "--yes", "--last_copy", code=2)
    assert run.is_dir()


def test_what_nli_evaluate_and_a_study_show_has_captions_and_numbers(tmp_path):
    from nli_ft.paper import write_out
    from nli_ft.predictions import read_predictions
    from nli_ft.process import project_root
    from nli_ft.report import report, report_figures, report_tables
    from nli_ft.study_report import study_figures, study_findings, study_tables
    from studies import synthetic_study

    run = project_root() / "runs/cpu_demo/20261126-095322-s42-e8b84932"
    preds = read_predictions(run / "predictions.jsonl")
    before = read_predictions(run / "predictions_before.jsonl")
    tables = report_tables(report(preds, before=before), "cpu_demo, seed 42")
    figures = [f for f in report_figures(preds) if f["name"] in ("confusion", "reliability")]
    written = write_out([tmp_path / "e.csv", tmp_path / "e.tex", tmp_path / "e.svg"], tables, figures)
    assert [
        p.name for p in written
    ] == "e.csv e-baselines.csv e-slices.csv e.tex e.svg e-reliability.svg".split()
    assert pd.read_csv(tmp_path / "e.csv").set_index("name")["value"]["accuracy"] == pytest.approx(74 / 120)
    assert (tmp_path / "e.tex").read_text().count("cpu\\_demo, seed 42: 120 items in 30 clusters") == 3
    found = study_findings(synthetic_study(tmp_path / "s"))
    assert all(t["caption"] and len(t["cells"]) for t in study_tables(found))
    assert study_tables(found)[0]["caption"].startswith("Set test: 400 items in ")
    assert [f["name"] for f in study_figures(found)][:2] == ["forest-test", "curves-test"]


# -- what a paper does with the files


def findings_of_everything(folder):
    "(tables, figures) of a comparison with long names, of an evaluation, and of a study."
    from nli_ft.compare import compare_figures, compare_selected, compare_tables
    from nli_ft.predictions import read_predictions
    from nli_ft.records import read_metrics
    from nli_ft.report import report, report_figures, report_tables
    from nli_ft.study_report import study_figures, study_findings, study_tables
    from studies import synthetic_study

    long = "lora_r=32 learning_rate=5e-4"
    runs = [
        record(lambda i: (i + s + len(o)) % 5 > 0, overrides=o, seed=s) for s in (1, 2) for o in ("", long)
    ]
    rows, by, _ = compare_selected(list(map(str, runs)))
    example = ROOT / "runs/cpu_demo/20261126-095322-s42-e8b84932"
    preds = read_predictions(example / "predictions.jsonl")
    before = read_predictions(example / "predictions_before.jsonl")
    found = study_findings(synthetic_study(folder / "study"))
    tables = dict(
        comparison=compare_tables(rows, by),
        evaluation=report_tables(report(preds, before=before), "cpu_demo, seed 42"),
        study=study_tables(found),
    )
    figures = compare_figures(rows, by)
    figures += report_figures(preds, "cpu_demo, seed 42", read_metrics(example)) + study_figures(found)
    return tables, figures


TWO_COLUMNS = r"""\documentclass[10pt,twocolumn]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[a4paper,margin=25mm,columnsep=6mm]{geometry}
\usepackage{booktabs}
\begin{document}
%s
\end{document}
"""


def test_every_table_compiles_into_an_article_of_two_columns_without_an_overfull_box(project):
    from nli_ft.paper import write_out

    if shutil.which("pdflatex") is None:
        pytest.skip("LaTeX is not installed here")
    tables, _ = findings_of_everything(project)
    for name, some in tables.items():
        write_out([project / f"{name}.tex"], some, notes=["a note"])
    lines = "\n".join(rf"\input{{{name}}}\clearpage" for name in tables)
    (project / "article.tex").write_text(TWO_COLUMNS % lines)
    for _ in range(2):  # the second time labels are known
        r = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "article.tex"],
            cwd=project,
            capture_output=True,
            encoding="latin-1",
        )
    assert r.returncode == 0, r.stdout[-2000:]
    assert "Overfull" not in r.stdout and "multiply" not in r.stdout, r.stdout[-2000:]


def test_tables_say_n_seeds_and_intervals_and_words_have_the_width_that_is_left(project):
    from nli_ft.paper import latex_table

    tables, figures = findings_of_everything(project)
    for table in (t for some in tables.values() for t in some):
        said = table["caption"]
        assert " items in " in said and " clusters" in said and "seed" in said, said
        assert "ntervals" in said, said
        assert "−" not in latex_table(table) and " -0." not in latex_table(table).partition(r"\toprule")[2]
    for figure in figures:
        assert "seed" in figure["caption"], figure
    [claims] = [t for t in tables["study"] if t["name"] == "claims"]
    assert r"\parbox[t]{" in latex_table(claims)
    for column in ("level", "difference", "difference_low", "difference_high", "n_clusters"):
        assert pd.api.types.is_numeric_dtype(claims["frame"][column]), column
    arms = tables["study"][0]["frame"]
    assert pd.api.types.is_integer_dtype(arms["seeds"])


def shown_texts(fig):
    "The texts that a reader sees. Tick labels outside of the axes are not drawn."
    texts = [text for legend in fig.legends for text in legend.get_texts()]
    for ax in fig.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
        for axis, place in ((ax.xaxis, 0), (ax.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            texts += [t for t in axis.get_ticklabels() if low <= t.get_position()[place] <= high]
    return [text for text in texts if text.get_text().strip()]


def test_nothing_in_a_figure_is_cut_off_and_no_legend_hides_a_curve(project):
    from nli_ft.paper import fit_figure

    _, figures = findings_of_everything(project)
    for figure in figures:
        fig = figure["draw"]()
        fit_figure(fig)
        fig.draw_without_rendering()
        for text in shown_texts(fig):
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= fig.bbox.x1 + 1, (figure["name"], text.get_text())
            assert box.y0 >= -1 and box.y1 <= fig.bbox.y1 + 1, (figure["name"], text.get_text())
        for legend in [ax.get_legend() for ax in fig.axes if ax.get_legend()] + fig.legends:
            room, taken = (legend.axes or fig.axes[0]).get_window_extent(), legend.get_window_extent()
            assert taken.width < 0.62 * room.width or taken.y1 <= room.y0, figure["name"]
        for ax in fig.axes:
            assert ax.get_window_extent().width > 0.3 * fig.bbox.width / len(fig.axes), figure["name"]


def test_runs_that_differ_only_in_their_seed_have_one_name_in_the_legend(project):
    from nli_ft.compare import plot_losses
    from nli_ft.records import read_run

    runs = [record(overrides=o, seed=s) for s in (1, 2, 3) for o in ("", "lora_r=4")]
    ax = plot_losses(list(map(read_run, runs))).axes[0]
    assert len(ax.lines) == 6 and len({line.get_color() for line in ax.lines}) == 2
    assert ax.get_legend_handles_labels()[1] == ["minimal_test, 3 runs", "minimal_test [lora_r=4], 3 runs"]


def test_a_caption_says_which_setting_and_mode_was_asked(project):
    from nli_ft.ask import _about

    run = record(overrides="lora_r=4", seed=3)
    asked = _about(run, None, dict(mode="forced", untuned=True), run)
    assert asked == "minimal_test [lora_r=4] before training, seed 3, mode forced"
    assert (
        _about(run, "x/hans.jsonl", dict(mode="cot"), run) == "minimal_test [lora_r=4], seed 3, rows of hans"
    )


def test_runs_on_other_rows_are_left_out_of_all_and_named(project, capsys):
    other = record(n=40)
    for path in (other / "predictions.jsonl", other / "predictions_before.jsonl"):
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [r | dict(id=f"x{r['id']}", premise=f"other {r['premise']}") for r in rows]
            path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(
        json.dumps(
            {k: v for k, v in summary.items() if k != "predictions"} | dict(started="2020-01-01T00:00:00Z")
        )
    )
    record(seed=1), record(lambda i: i % 3 > 0, seed=2)
    assert compare_cli(["--all", "minimal_test"]) == 0
    said = capsys.readouterr().out
    assert f"left out: minimal_test/{other.name} judged other rows" in said and "s1" in said and "s2" in said


def test_two_files_of_one_name_are_refused_before_anything_is_written(project, capsys):
    runs = [record(lambda i: (i + s) % 5 > 0, seed=s) for s in (1, 2)]
    with pytest.raises(SystemExit) as e:
        compare_cli([*map(str, runs), "--out", "t.svg", "--out", "t-losses.svg"])
    assert e.value.code == 2 and "both write t-losses.svg" in capsys.readouterr().err
    assert not list(project.glob("*.svg"))


# -- keeping, under stress


def test_wrong_filters_are_named(project, capsys):
    record(seed=1)
    for since in ("", "2026-13-01", "99999999999d", "yesterday"):
        assert "write a date such as" in nli_runs(capsys, f"--since={since}", code=2)
    assert "finished" in nli_runs(capsys, "--status", "finished", code=2)
    assert "There are records of minimal_test" in nli_runs(capsys, "--config", "cpu_dmo")


def test_a_note_may_hold_quotes_lines_and_emoji_but_moves_no_cursor(project, capsys):
    run = record(seed=1)
    note = 'it\'s "so" \\ $HOME 👩‍🔬\nsecond line \x1b[2J'
    page = nli_runs(capsys, run, "--note", note)
    assert 'it\'s "so" \\ $HOME 👩‍🔬\n  second line [2J' in page and "\x1b" not in page
    assert json.loads(nli_runs(capsys, run, "--json"))["name"] and read_notes(run)["notes"][0]["text"] == note
    assert "no UTF-8" in nli_runs(capsys, run, "--note", "\udcff", code=2)
    assert "the note is empty" in nli_runs(capsys, run, "--note", " \n", code=2)
    assert len(read_notes(run)["notes"]) == 1 and not (run / ".notes.lock").exists()


def test_notes_that_are_written_at_once_are_all_kept(project):
    run = record(seed=1)
    write = f"from nli_ft.keeping import annotate\nfor i in range(20): annotate({str(run)!r}, 'note')"
    both = [subprocess.Popen([sys.executable, "-c", write], cwd=project) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert len(read_notes(run)["notes"]) == 40


def test_a_name_that_two_records_have_is_refused(project, capsys):
    one = record(seed=1)
    shutil.copytree(one, one.parents[1] / "other" / one.name)
    said = nli_runs(capsys, one.name, "--delete", "all", "--yes", code=2)
    assert f"can be minimal_test/{one.name} or other/{one.name}" in said and one.is_dir()


def test_a_copy_that_lost_a_file_is_no_copy(project, capsys):
    one = record(seed=1)
    other = one.parents[1] / "other" / one.name
    shutil.copytree(one, other)
    (other / "predictions.jsonl").unlink()
    assert "THE LAST COPY" in nli_runs(capsys, one, "--delete", "all", "--yes", code=2)
    shutil.copy(one / "predictions.jsonl", other)
    assert "deleted all of" in nli_runs(capsys, one, "--delete", "all", "--yes")
    assert other.is_dir() and not one.exists()


def test_a_link_into_the_weights_is_no_copy_of_them(project, capsys):
    run = record(seed=1)
    weights = with_weights(run)
    (weights.parent / "link").mkdir()
    (weights.parent / "link/adapter_model.safetensors").symlink_to(
        weights / "adapter/adapter_model.safetensors"
    )
    assert "THE LAST COPY" in nli_runs(capsys, run, "--delete", "weights", "--yes", code=2)


def test_an_interrupted_deletion_leaves_no_half_and_the_next_one_ends_it(project, capsys, monkeypatch):
    run, other = record(seed=1), record(seed=2)
    weights, kept = with_weights(run), with_weights(other, b"another")
    environment = json.loads((run / "environment.json").read_text())
    environment["data"]["eval"] = dict(path="test.jsonl", sha256=SHA)
    (run / "environment.json").write_text(json.dumps(environment))
    real, dies_in = shutil.rmtree, ""

    def rmtree(folder, *args, **kw):
        if folder.parents[1].name != dies_in:
            return real(folder, *args, **kw)
        next(p for p in folder.rglob("*") if p.is_file()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for what, dies_in in (("weights", "models"), ("all", "runs")):
        with pytest.raises(SystemExit) as e:
            nli_ft.commands.runs_cli([str(run), "--delete", what, "--yes", "--last_copy"])
        assert e.value.code == 130 and not weights.exists()
        assert run.is_dir() == (what == "weights")  # whole until its own deletion began, and then gone
    monkeypatch.setattr(shutil, "rmtree", real)
    capsys.readouterr()
    assert [r["run_id"] for r in list_runs()] == [other.name]
    assert looks(SHA, run.parents[1]) == dict(minimal_test=1)
    assert "an interrupted deletion left" in nli_runs(capsys, "--disk")
    nli_runs(capsys, other, "--delete", "weights", "--yes", "--last_copy")
    assert not kept.exists() and "an interrupted deletion" not in nli_runs(capsys, "--disk")
    assert not [p for p in project.rglob(".*.deleted")]


def test_a_run_that_goes_on_elsewhere_is_deleted_only_by_its_name(project, capsys):
    run = nli_ft.records.start_run(load_config("minimal_test"))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | dict(boot="another", machine="another")))
    assert "and still going" in nli_runs(capsys, run)
    assert "STILL GOING" in nli_runs(capsys, run, "--delete", "all", "--yes", code=2)
    assert "deleted all" in nli_runs(capsys, run, "--delete", "all", "--yes", "--last_copy")
