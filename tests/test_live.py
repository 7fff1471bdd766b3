"""What a person sees while something works: bars on a terminal, lines in a file, a plot that grows, runs that are
watched, and the notebook that stays in the record."""

import contextlib, io, json, os, pty, re, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from nli_ft import fit, live, process, records, train_sft
from nli_ft.commands import runs_cli
from nli_ft.config_loader import load_config, purpose
from nli_ft.launch import scratch_text
from nli_ft.report import plot_loss
from nli_ft.process import ProgressBar, RecordError, alive, show_count, fitted, project_root
from nli_ft.records import (
    NotebookFollower,
    append_metrics,
    finish_run,
    keep_notebook,
    new_run_dir,
    read_run,
    start_run,
)

root = project_root()


def on_a_terminal(code):
    "What a Python program shows on a terminal of 80 columns."
    master, slave = pty.openpty()
    process_ = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, cwd=root
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal without a writer with EIO
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert process_.wait() == 0, shown.decode()
    return shown.decode()


def test_a_bar_on_a_terminal_moves_while_nothing_is_done_and_lines_stand_above_it():
    shown = on_a_terminal(
        "import time\nfrom nli_ft.process import ProgressBar, alive, print_line\n"
        "with ProgressBar('answers', 4) as bar:\n    time.sleep(2.3)\n    bar.update(4)\n    print_line('a log')\n"
        "with alive('loading it'): time.sleep(2.3)\nwith alive('quick'): pass"
    )
    drawn = shown.split("\r")
    assert sum("answers:   0%" in s for s in drawn) >= 3, "the clock goes on without an answer"
    assert any("4/4" in s and "row/s" in s for s in drawn)
    assert any("loading it: 00:0" in s for s in drawn) and "quick" not in shown
    line = next(s for s in drawn if "a log" in s)
    assert line.strip() == "a log", "the bar was cleared before the line"


def test_a_file_gets_a_last_line_and_no_redrawing(capfd):
    with ProgressBar("answers", 4) as bar, alive("loading"):
        bar.update(4)
    assert list(show_count(range(3), "reading")) == [0, 1, 2]
    out, err = capfd.readouterr()
    assert re.fullmatch(r"row +4/4   \S+ rows/s\n", err) and out == ""


def test_lines_say_what_is_waited_for_and_become_rarer(monkeypatch):
    now, said = [0.0], io.StringIO()
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", said)
    lines = process._Lines("answers", 8, 0, "row", True)
    for second in range(1, 71):
        now[0] = second
        lines.tick()
    shown = said.getvalue().splitlines()
    assert shown == [f"row      0/8   answers: {s} s so far" for s in (10, 30, 70)]


def test_a_bar_that_cannot_be_drawn_does_not_end_the_work(monkeypatch):
    class Broken:
        def __init__(self, *look):
            pass

        def update(self, n):
            raise OSError("the terminal is gone")

        close = tick = tell = update

    monkeypatch.setattr(process, "bar_places", lambda: ["terminal"])
    monkeypatch.setitem(process._KINDS_OF_BAR, "terminal", Broken)
    with ProgressBar("answers", 3) as bar:
        bar.update()
        bar.tell("so far")
    assert bar.count == 1 and bar.drawn == []


def test_a_kernel_draws_on_its_launchers_terminal_and_in_no_widget_unless_somebody_has_it_open(monkeypatch):
    class Shell:
        kernel, user_ns = object(), {}

    monkeypatch.setattr(process.builtins, "get_ipython", Shell, raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delenv(process.TERMINAL, raising=False)
    assert process.bar_places() == ["lines"]
    monkeypatch.setenv(process.TERMINAL, "/dev/pts/0")
    assert process.bar_places() == ["lines", "terminal"]
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/train.ipynb")
    assert process.bar_places() == ["widget"]
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: None)
    assert process.bar_places() == ["lines", "terminal"], "without widgets there are lines"


def test_loading_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr("nli_ft.model.load_base", lambda cfg: "base")
    monkeypatch.setattr("nli_ft.model.seeded_lora", lambda model, cfg: model)
    for places, lines in ((["widget"], 0), (["lines"], 1), (["lines", "terminal"], 1)):
        session = train_sft.Session.__new__(train_sft.Session)
        session.cfg, session.model = load_config("minimal_test"), None
        session.prep = SimpleNamespace(parent=None)
        monkeypatch.setattr(train_sft, "bar_places", lambda: places)
        assert session.load() == "base"
        assert capsys.readouterr().out.count("loading smollm2-135m") == lines, places


def test_opening_a_record_of_many_rows_shows_that_it_works(monkeypatch, tmp_path):
    begun = []

    @contextlib.contextmanager
    def alive_(what, **how):
        begun.append(what)
        yield

    monkeypatch.setattr(records, "alive", alive_)
    monkeypatch.setattr(records, "_data_files", lambda cfg: begun.append("hashes") or {})
    cfg = load_config("minimal_test")
    start_run(cfg, new_run_dir(cfg, tmp_path))
    assert begun == ["hashes of code and data", "hashes"]


def test_what_takes_a_widgets_place_tells_what_was_done_before(monkeypatch):
    from tqdm import tqdm

    shown = []
    bar = process._WidgetBar.__new__(process._WidgetBar)
    bar.bar = tqdm(desc="training", initial=3, total=5, unit="step", file=io.StringIO())
    bar.bar.container = SimpleNamespace(close=lambda: None)
    bar.handle = SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    bar.update(1)
    bar.close()
    assert re.fullmatch(r"training: 1 step in 00:0\d, and 3 before", shown[0])


def test_an_interrupt_in_a_notebook_says_what_to_do_there(monkeypatch, tmp_path):
    cfg = load_config("minimal_test")
    (tmp_path / "checkpoint-2").mkdir()
    monkeypatch.setattr(fit, "newest_checkpoint", lambda found, say: tmp_path / "checkpoint-2")
    for place, here in ((None, False), (tmp_path / "train.ipynb", True)):
        monkeypatch.setattr(fit, "notebook_in_front", lambda: place)
        said = fit.how_to_go_on(cfg, tmp_path)
        assert "nli_run --config minimal_test" in said
        assert ("Restart Kernel and Run All Cells" in said) == here


def test_an_interrupted_cell_shows_one_line_that_says_where(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    def stopped(*given):
        raise KeyboardInterrupt

    shell, shown = InteractiveShell(), []
    monkeypatch.setattr(process, "notebook_shell", lambda: shell)
    monkeypatch.setattr(shell, "_showtraceback", lambda kind, error, lines: shown.append(lines))
    process.short_interrupts()
    shell.user_ns["stop"] = stopped
    assert isinstance(shell.run_cell("stop(1)").error_in_exec, KeyboardInterrupt)
    shell.user_ns["load_config"] = load_config
    monkeypatch.setattr("nli_ft.config_loader._overrides", stopped)
    shell.run_cell("load_config('minimal_test')")
    shell.run_cell("1 / 0")
    shell.run_cell("from nli_ft.process import Interrupted\nraise Interrupted('go on with nli_run', 2)")
    assert shown[0] == ["KeyboardInterrupt: stopped by the user"]
    assert shown[1] == ["KeyboardInterrupt: stopped by the user in config_loader.load_config"]
    assert len(shown[2]) > 1, "a fault keeps its traceback"
    assert shown[3] == ["Interrupted: go on with nli_run"]


def test_long_lines_are_broken_between_words_and_tables_stay():
    table = "a" * 60 + "   " + "b" * 40
    assert fitted(table) == table
    broken = fitted("word " * 60).splitlines()
    assert len(broken) == 3 and max(map(len, broken)) <= 110 and broken[1].startswith("    word")


# -- the plot, the watching, the dashboard


def test_a_plot_that_fails_says_so_once_and_the_training_goes_on(monkeypatch, capsys):
    def fail(rows):
        raise ValueError("no fonts")

    monkeypatch.setattr(live, "notebook_shell", object)
    monkeypatch.setattr(live, "plot_loss", fail)
    with live.LivePlot(every=0.0, say=None) as plot:
        for step in range(3):
            plot(dict(step=step, loss=1.0))
    assert capsys.readouterr().out.count("no fonts") == 1 and len(plot.rows) == 3


def test_the_last_state_is_drawn_however_the_training_ends(monkeypatch):
    drawn = []
    monkeypatch.setattr(live, "notebook_shell", object)
    monkeypatch.setattr(live.LivePlot, "_show", lambda self, figure: drawn.append(len(self.rows)))
    with pytest.raises(KeyboardInterrupt), live.LivePlot(every=1e9, say=None) as plot:
        for step in (1, 2, 3):
            plot(dict(step=step, loss=1.0))
        raise KeyboardInterrupt
    assert drawn == [1, 3]


def test_the_number_of_trained_tokens_is_no_loss():
    figure = plot_loss([dict(step=s, loss=2 / s, loss_tokens=200) for s in (1, 2)])
    assert figure.axes[0].get_ylim()[1] < 3


def test_the_plot_stands_above_the_lines_of_the_logs(monkeypatch):
    shown = []

    class Place:
        def update(self, figure):
            shown.append("drawn there")

    def display(*objects, **how):
        shown.append("place")
        return Place()

    monkeypatch.setattr(live, "notebook_shell", object)
    monkeypatch.setattr("IPython.display.display", display)
    plot = live.LivePlot(every=0.0, say=lambda row: shown.append("line"))
    for step in (1, 2):
        plot(dict(step=step, loss=1.0))
    assert shown == ["place", "line", "drawn there", "line", "drawn there"]


def test_a_curve_keeps_its_colour_when_held_out_losses_come():
    rows = [dict(step=s, loss=2 / s, loss_thought=3 / s, loss_label=1 / s) for s in (1, 2)]
    later = [*rows, dict(step=2, eval_loss=1.1, eval_loss_thought=1.4, eval_loss_label=0.6)]
    before, after = (
        [{line.get_label(): line.get_color() for line in ax.lines} for ax in plot_loss(metrics).axes]
        for metrics in (rows, later)
    )
    for old, new in zip(before, after, strict=True):
        assert new | old == new, "the training's colours stay"
    assert after[0]["held-out loss"] == after[0]["training loss"]
    assert len(set(after[1].values())) == 2 and len(after[1]) == 4


def test_a_plot_takes_a_twentieth_of_the_time_at_most(monkeypatch):
    now, drawings = [0.0], []

    def draw(rows):
        drawings.append(now[0])
        now[0] += 0.5
        return "a figure"

    monkeypatch.setattr(live, "notebook_shell", object)
    monkeypatch.setattr(live, "plot_loss", draw)
    monkeypatch.setattr(live.LivePlot, "_show", lambda self, figure: None)
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    plot = live.LivePlot(say=None)
    for step in range(100):
        now[0] += 1
        plot(dict(step=step, loss=1.0))
    assert 6 <= len(drawings) <= 11, drawings


@pytest.fixture
def runs(tmp_path):
    "Three records: one that is going, one that is done, and one whose process is gone."
    cfg = load_config("minimal_test")
    going, done, died = (start_run(cfg, new_run_dir(cfg, tmp_path)) for _ in range(3))
    for run in (going, done):
        for step in (1, 2):
            append_metrics(run, dict(step=step, steps=4, loss=2 / step, eta_s=8.0))
    finish_run(done, after=dict(accuracy=0.75, valid_rate=1.0, n=8))
    summary = json.loads((died / "summary.json").read_text())
    (died / "summary.json").write_text(json.dumps(summary | dict(pid=2**22 + 1)))
    return going, done, died


def test_watching_shows_what_runs_where_and_how_far(runs, tmp_path, capsys):
    going, done, died = runs
    assert live.watch_runs(tmp_path, rounds=1, every=0) == 0
    shown = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "minimal_test" in line}
    assert re.search(r"training +2/4 +1\.0000 .*0:00:08 +here, process \d+", shown[going.name])
    assert "0.750" in shown[done.name] and "died" in shown[died.name]


def test_a_file_gets_the_watched_runs_only_when_something_changed(runs, tmp_path, capsys):
    live.watch_runs(tmp_path, rounds=3, every=0)
    assert capsys.readouterr().out.count("config ") == 1


def test_nli_runs_watches_one_run_and_ctrl_c_ends_it_well(runs, monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", interrupt)
    assert runs_cli([str(runs[0]), "--watch"]) == 0
    shown = capsys.readouterr().out
    assert runs[0].name in shown and runs[1].name not in shown
    with pytest.raises(SystemExit) as e:
        runs_cli(["--watch", "--json"])
    assert e.value.code == 2 and "does not go with --watch" in capsys.readouterr().err


def test_the_boards_table_breaks_no_run_id_and_counts_no_rows(runs, tmp_path):
    table = live._board_table(live.watched(tmp_path))
    page = table._repr_html_()
    assert page.count("<tr>") == 4 and page.count("<th ") == 10, "a heading, three runs, and no index"
    assert "white-space:nowrap" in page and runs[0].name in page and "1 going" in repr(table)
    assert "no runs yet" in live._board_table([])._repr_html_()


def test_a_name_that_no_run_has_is_refused(runs, tmp_path):
    with pytest.raises(RecordError, match="neither a config nor a run"):
        live.watched(tmp_path, ["minimal_tset"])


def test_the_dashboard_looks_once_under_papermill(runs, tmp_path):
    import papermill

    nb = papermill.execute_notebook(
        str(root / "nbs/dashboard.ipynb"),
        str(tmp_path / "out.ipynb"),
        dict(runs_dir=os.path.relpath(tmp_path, root)),
        cwd=str(root),
        progress_bar=False,
        start_timeout=180,
    )
    kinds = [set(o.get("data", {})) for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert any("text/html" in k for k in kinds) and any("image/png" in k for k in kinds)


# -- the first Run All, and what JupyterLab leaves


def test_the_first_run_all_runs_on_a_laptop_and_says_what_to_expect():
    cells = nbformat.read(root / "nbs/train.ipynb", 4).cells
    [given] = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert 'config = "cpu_demo"' in given
    assert any("purpose(cfg)" in c.source for c in cells)
    assert "Table of Contents" in cells[0].source, "Run All leaves a person at the last cell"
    assert "0.000 before and after" in purpose(load_config("minimal_test"))


def test_a_notebook_run_by_hand_stays_in_the_record_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a-planted-secret")
    cfg = load_config("minimal_test")
    run = start_run(cfg, new_run_dir(cfg, tmp_path))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('a-planted-secret')")])
    nbformat.write(nb, tmp_path / "mine.ipynb")
    monkeypatch.setattr(NotebookFollower, "cells_before", 1)
    follower = NotebookFollower(run, tmp_path / "mine.ipynb")
    executed = ["of_another_record", "print('a-planted-secret')", "scratch = 1"]
    follower.look(executed)
    assert not (run / "train.ipynb").exists(), "the record is open"
    finish_run(run, after=dict(accuracy=0.5, valid_rate=1.0, n=8))
    follower.look(executed)
    kept = nbformat.read(run / "train.ipynb", 4)
    assert kept.metadata.nli_ft.missing == ["scratch = 1"] and "planted" not in kept.cells[0].source
    nb.cells.append(nbformat.v4.new_code_cell("scratch = 1"))
    nbformat.write(nb, tmp_path / "mine.ipynb")
    os.utime(tmp_path / "mine.ipynb", (time.time() + 9, time.time() + 9))
    ends = time.monotonic() + 20
    while nbformat.read(run / "train.ipynb", 4).metadata.nli_ft.missing and time.monotonic() < ends:
        time.sleep(0.2)
    assert nbformat.read(run / "train.ipynb", 4).metadata.nli_ft.missing == [], "saved later, so copied again"
    assert read_run(run).status == "done"


def test_the_launchers_notebook_is_never_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "run" / "train.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "mine.ipynb")
    before = (tmp_path / "run" / "train.ipynb").read_bytes()
    assert keep_notebook(tmp_path / "run", tmp_path / "mine.ipynb", []) == {}
    assert (tmp_path / "run" / "train.ipynb").read_bytes() == before


@pytest.fixture
def checkout(tmp_path):
    "A repository with a committed nbs/train.ipynb."
    path = tmp_path / "nbs" / "train.ipynb"
    path.parent.mkdir()
    cells = [nbformat.v4.new_code_cell('config = "a"'), nbformat.v4.new_code_cell("run(config)")]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in ("init -q", "add .", "commit -qm x"):
        subprocess.run([*git, *words.split()], check=True)
    return path


def test_only_scratch_code_in_the_saved_notebook_is_named(checkout):
    nb = nbformat.read(checkout, 4)
    nb.metadata["language_info"] = dict(name="python", version="3.99")
    nb.cells[0].source = 'config = "b"'
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="done")]
    nbformat.write(nb, checkout)
    assert scratch_text(checkout) == "", "metadata, parameters and outputs are no code"
    nb.cells.append(nbformat.v4.new_code_cell("\nscratch = 1"))
    nbformat.write(nb, checkout)
    said = scratch_text(checkout)
    assert "1 code cells new or changed, 0 gone" in said and "scratch = 1" in said and "git checkout" in said


def test_without_git_nothing_is_said(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(), Path(tmp_path) / "train.ipynb")
    assert scratch_text(tmp_path / "train.ipynb") == ""
