"""Run records across processes and faults: real kernels, tiny notebooks, a project of their own in a temporary
folder."""

import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pytest

from swap import swap
import nli_ft.card
import nli_ft.commands
import nli_ft.compare
import nli_ft.differences
import nli_ft.evaluate
import nli_ft.records
import nli_ft.seeds
from nli_ft.process import RecordError
from nli_ft.config_loader import load_config

ROOT = Path(__file__).resolve().parents[1]
OPEN = (
    "from nli_ft.config_loader import load_config\nfrom nli_ft.records import append_metrics,finish_run,start_run\n"
    "run = start_run(load_config(config, overrides), run_dir)"
)
STEP = "append_metrics(run, {'step':1, 'loss':2.0})"
CLOSE = (
    "finish_run(run, before={'accuracy':.125, 'valid_rate':.0, 'n':8}, after={'accuracy':.875, "
    "'valid_rate':1., 'n':8})"
)


@pytest.fixture
def project(project, monkeypatch):
    "The empty project. Commands that run in it use this checkout's package, with one thread."
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return project


def notebook(project, *cells, tag="parameters"):
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    )
    nb.cells = [
        nbformat.v4.new_code_cell(c) for c in ('config = "default"\noverrides = ""\nrun_dir = None', *cells)
    ]
    if tag:
        nb.cells[0].metadata["tags"] = [tag]
    nbformat.write(nb, project / "nbs" / "train.ipynb")


def nli_run(*args, cwd=None, **env):
    return subprocess.run(
        [sys.executable, "-m", "nli_ft.launch", "--no_check", *args],  # the notebooks here train nothing
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def runs(project):
    return nli_ft.records.list_runs(project / "runs")


def left_behind(project):
    "Processes other than this one that still live in `project`."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(p / "cwd").startswith(str(project)) and int(p.name) != os.getpid():
                found.append((p / "cmdline").read_text())
        except OSError:
            pass
    return found


# -- folders and files


def test_runs_started_in_the_same_second_by_many_processes_never_share_a_folder(project):
    code = (
        "from nli_ft.config_loader import load_config\nfrom nli_ft.records import new_run_dir\n"
        "c=load_config('minimal_test')\nfor _ in range(20): print(new_run_dir(c,'runs'))"
    )
    procs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    made = [line for p in procs for line in p.communicate(timeout=60)[0].split()]
    assert len(made) == 60 == len(set(made))


def test_of_several_runs_that_adopt_one_folder_only_the_first_gets_it(project):
    cfg = load_config("minimal_test")
    run = nli_ft.records.new_run_dir(cfg)
    assert nli_ft.records.start_run(cfg, run) == run
    before = (run / "config.json").read_text()
    with pytest.raises(RecordError, match="already holds a run"):
        nli_ft.records.start_run(cfg, run)
    assert (run / "config.json").read_text() == before


def test_a_folder_with_other_files_is_not_adopted(project):
    (project / "precious").mkdir()
    (project / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(RecordError, match="thesis.tex"):
        nli_ft.records.start_run(load_config("minimal_test"), "precious")
    assert os.listdir(project / "precious") == ["thesis.tex"]


def test_a_full_disk_leaves_the_old_summary_and_no_litter(project, monkeypatch):
    run = nli_ft.records.start_run(load_config("minimal_test"), command="x")
    before = (run / "summary.json").read_text()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        nli_ft.records.finish_run(run, after={"accuracy": 1.0})
    assert (run / "summary.json").read_text() == before and not list(run.glob(".*"))


def test_metrics_are_readable_after_every_cut(project):
    run = nli_ft.records.new_run_dir(load_config("minimal_test"), "runs")
    for i in range(3):
        nli_ft.records.append_metrics(run, {"step": i, "text": "é"})
    whole = (run / "metrics.jsonl").read_bytes()
    for cut in range(len(whole) + 1):
        (run / "metrics.jsonl").write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        nli_ft.records.append_metrics(run, {"step": 99})
        assert [r["step"] for r in nli_ft.records.read_metrics(run)] == [*range(kept), 99]


def test_a_run_whose_process_is_gone_is_listed_as_died_and_a_living_one_as_running(project):
    code = (
        "from nli_ft.config_loader import load_config\nfrom nli_ft.records import "
        "start_run\nstart_run(load_config('minimal_test'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    mine = nli_ft.records.start_run(load_config("minimal_test"))
    by_id = {r["run_id"]: r["status"] for r in runs(project)}
    assert by_id.pop(mine.name) == "running" and list(by_id.values()) == ["died"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"status":"done"}', '{"status":"done","started":"x","after":3}', "\x00\xff"],
)
def test_an_unreadable_record_is_listed_with_the_reason_and_hides_no_other(project, text):
    good = nli_ft.records.start_run(load_config("minimal_test"))
    nli_ft.records.finish_run(good, after={"accuracy": 0.5})
    bad = project / "runs" / "c" / "r"
    bad.mkdir(parents=True)
    (bad / "summary.json").write_bytes(text.encode("latin1"))
    rows = {r["run_id"]: r for r in runs(project)}
    assert (
        rows[good.name]["accuracy"] == 0.5
        and rows["r"]["status"] == "unreadable"
        and "summary.json" in rows["r"]["why"]
    )
    with pytest.raises(RecordError, match="config.json"):
        nli_ft.records.read_run(bad)


def test_environment_names_versions_and_hashes_but_no_value_host_or_path(project, monkeypatch):
    data = project / "data" / "finetune"
    data.mkdir(parents=True)
    (data / "dev_ft.jsonl").write_text('{"id":"1","premise":"p","hypothesis":"h","label":1}\n')
    monkeypatch.setenv("HF_TOKEN", "planted-secret-1")
    env = nli_ft.records.environment(load_config("default", "prompt_template=brief"))
    text = json.dumps(env)
    assert (
        env["env"]["HF_TOKEN"] is True
        and "planted" not in text
        and str(project) not in text
        and str(ROOT) not in text
    )
    assert (
        env["data"]["eval"]["rows"] == 1
        and len(env["data"]["eval"]["sha256"]) == 64
        and env["data"]["train"]["sha256"] is None
    )
    assert env["packages"]["nbdev"] and len(env["prompt"]["sha256"]) == 64


# -- the launcher


def test_a_run_is_recorded_by_this_python_and_its_scores_are_reported(project):
    decoy = project / "share" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(
        json.dumps(dict(argv=["/bin/false", "{connection_file}"], display_name="decoy", language="python"))
    )
    notebook(
        project,
        OPEN,
        "import sys,os\nappend_metrics(run, {'exe':sys.executable, "
        "'cwd':os.path.relpath(os.getcwd())})\nprint('step 1 of 1')",
        CLOSE,
    )
    (project / "elsewhere").mkdir()
    out = nli_run(
        "--config",
        "minimal_test",
        "--learning_rate",
        "1e-4",
        "--train_data",
        "mine.jsonl",
        cwd=project / "elsewhere",
        JUPYTER_PATH=str(project / "share"),
    )
    assert out.returncode == 0, out.stderr
    assert "step 1 of 1" in out.stdout and "0.125" in out.stdout and "0.875" in out.stdout
    [row] = runs(project)
    run = nli_ft.records.read_run(row["path"])
    assert run.metrics == [{"exe": sys.executable, "cwd": "."}]
    assert run.cfg.learning_rate == 1e-4 and run.cfg.train_data == "elsewhere/mine.jsonl"
    assert row["path"].removeprefix(str(project) + "/") in out.stdout and row["status"] == "done"
    executed = (run.path / "train.ipynb").read_text()
    assert str(project) not in executed and '"execution_count": null' not in executed


def test_configs_times_seeds_each_get_a_record(project):
    notebook(project, OPEN, CLOSE)
    out = nli_run("--config", "minimal_test", "cpu_demo", "--seeds", "1,2")
    assert out.returncode == 0, out.stderr
    assert sorted((r["config"], r["seed"]) for r in runs(project)) == [
        (c, s) for c in ("cpu_demo", "minimal_test") for s in (1, 2)
    ]


def test_a_failed_run_keeps_its_notebook_with_the_error_and_the_next_one_still_runs(project):
    notebook(
        project, OPEN, STEP, "if run.parent.name=='minimal_test': raise RuntimeError('loss is nan')", CLOSE
    )
    out = nli_run("--config", "minimal_test", "cpu_demo")
    assert out.returncode == 1 and "loss is nan" in out.stderr and "Traceback" not in out.stderr
    by = {r["config"]: r for r in runs(project)}
    assert (
        by["minimal_test"]["status"] == "failed"
        and by["minimal_test"]["why"] == "RuntimeError: loss is nan"
        and by["cpu_demo"]["status"] == "done"
    )
    assert "loss is nan" in (Path(by["minimal_test"]["path"]) / "train.ipynb").read_text()


def test_bad_data_found_by_the_notebook_is_exit_code_2(project):
    notebook(project, "from nli_ft.process import DataError\nraise DataError('no such rows: x.jsonl')")
    out = nli_run("--config", "minimal_test")
    assert out.returncode == 2 and "no such rows: x.jsonl" in out.stderr
    assert [(r["status"], r["why"]) for r in runs(project)] == [("failed", "no such rows: x.jsonl")]


def test_the_same_error_after_training_began_is_exit_code_1(project):
    notebook(project, OPEN, STEP, "from nli_ft.process import DataError\nraise DataError('rows went away')")
    assert nli_run("--config", "minimal_test").returncode == 1


@pytest.mark.parametrize("cells,why", [([STEP.replace("append", "#")], "start_run"), ([OPEN], "finish_run")])
def test_a_notebook_that_leaves_its_record_open_is_a_failed_run(project, cells, why):
    notebook(project, *cells)
    out = nli_run("--config", "minimal_test")
    assert out.returncode == 1 and why in out.stderr and [r["status"] for r in runs(project)] == ["failed"]


def test_a_killed_kernel_is_a_failed_run_and_takes_its_children_with_it(project):
    notebook(
        project,
        OPEN,
        "import subprocess,os,signal\nsubprocess.Popen(['sleep','61.2525'], "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\nos.kill(os.getpid(), signal.SIGKILL)",
    )
    out = nli_run("--config", "minimal_test")
    assert out.returncode == 1 and "kernel died" in out.stderr
    assert [r["status"] for r in runs(project)] == ["failed"] and not left_behind(project)


def _started(project, cells):
    "A running `nli_run` that has reached its training cell."
    notebook(project, *cells)
    p = subprocess.Popen(
        [sys.executable, "-m", "nli_ft.launch", "--no_check", "--config", "minimal_test"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if list(project.glob("runs/*/*/metrics.jsonl")):
            return p
        time.sleep(0.1)
    p.kill()
    raise AssertionError("never started")


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_kernel_which_closes_its_record(project, sig):
    p = _started(
        project,
        [
            OPEN,
            "import time\ntry:\n    " + STEP + "\n    time.sleep(62.5252)\nexcept KeyboardInterrupt:\n"
            "    finish_run(run, 'interrupted', saved_step=7); raise",
        ],
    )
    p.send_signal(sig)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 128 + sig, err
    [row] = runs(project)
    assert row["status"] == "interrupted" and nli_ft.records.read_run(row["path"]).summary["saved_step"] == 7
    assert "KeyboardInterrupt" in (Path(row["path"]) / "train.ipynb").read_text() and not left_behind(project)


def test_a_kernel_that_dies_of_the_schedulers_signal_is_an_interrupted_run(project):
    p = _started(
        project,
        [
            OPEN,
            STEP
            + (
                "\nimport os,signal,time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: "
                "os.kill(os.getpid(), signal.SIGTERM)"
            ),
        ],
    )
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=60)
    [row] = runs(project)
    assert p.returncode == 143 and row["status"] == "interrupted" and "stopped by SIGTERM" in row["why"], err


def test_a_second_signal_ends_a_kernel_that_does_not_listen(project):
    p = _started(
        project,
        [
            OPEN,
            "import time,signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            + STEP
            + "\nwhile True: time.sleep(.1)",
        ],
    )
    p.send_signal(signal.SIGINT)
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert (
        p.returncode == 130
        and [r["status"] for r in runs(project)] == ["interrupted"]
        and not left_behind(project)
    )


def test_a_lost_parameters_tag_is_refused_before_a_folder_is_made(project):
    notebook(project, OPEN, CLOSE, tag=None)
    out = nli_run("--config", "minimal_test")
    assert out.returncode == 2 and "train.ipynb" in out.stderr and "allowed_cell_metadata_keys" in out.stderr
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    "args",
    [
        ("minimal_test", "cpu_dem"),
        ("minimal_test", "--learning_rate", "-1"),
        ("minimal_test", "--seeds", "1,x"),
    ],
)
def test_one_bad_config_of_several_stops_all_before_the_first(project, args):
    notebook(project, OPEN, CLOSE)
    out = nli_run("--config", *args)
    assert out.returncode == 2 and "Traceback" not in out.stderr and not (project / "runs").exists()


def test_dry_run_prints_the_command_and_makes_nothing(project):
    notebook(project, OPEN, CLOSE)
    out = nli_run("--config", "minimal_test", "--max_steps", "3", "--seeds", "1,2", "--dry_run")
    assert (
        out.returncode == 0
        and out.stdout.count("papermill nbs/train.ipynb") == 2
        and "max_steps=3" in out.stdout
    )
    assert not (project / "runs").exists()


def test_no_planted_secret_reaches_any_file_of_a_record(project):
    planted = dict(
        HF_TOKEN="planted-hf-secret", WANDB_API_KEY='planted-wandb-"secret"', MY_PASSWORD="planted-pässword"
    )
    leak = (
        "import os\nprint(os.environ['HF_TOKEN'])\nappend_metrics(run, {'note':os.environ['MY_PASSWORD']})\n"
        "raise RuntimeError('401 for '+os.environ['WANDB_API_KEY'])"
    )
    notebook(project, OPEN, leak)
    out = nli_run("--config", "minimal_test", **planted)
    assert out.returncode == 1
    files = [f for f in (project / "runs").rglob("*") if f.is_file()]
    assert {f.name for f in files} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "train.ipynb",
    }
    for f in files:
        assert "planted-" not in f.read_text(), f.name
    assert "[HF_TOKEN removed]" in (files[0].parent / "train.ipynb").read_text()


# -- comparing what runs left


def answer(label, thought="so"):
    return json.dumps(dict(thought_process=thought, predicted_label=label))


def said_rows(right, n=60, seed=0, **changed):
    "Prediction rows as a run writes them. Their thoughts differ by the seed, as those of another training would."
    rows = []
    for i in range(n):
        label = i % 2 if right(i) else 1 - i % 2
        rows.append(
            dict(
                id=i,
                premise=f"p {i // 2}",
                hypothesis=f"h {i}",
                label=i % 2,
                predicted_label=label,
                outcome="strict",
                repairs=[],
                completion=answer(label, f"so {seed}"),
                thought_process=f"so {seed}",
                p_entail=0.5,
                n_tokens=9,
                finish="stop",
                seconds=0.1,
                mode="cot",
                prompt_hash="x",
                group_id=i // 2,
            )
            | changed
        )
    return rows


def put_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def get_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


DRAWS = iter(range(1000))


def finished(
    config="minimal_test",
    right=lambda i: i % 4 > 0,
    n=60,
    overrides="",
    seed=42,
    order=list,
    facts={},
    draw=None,
    **changed,
):
    """A finished record of the current project. `changed` replaces keys of every prediction row. `facts` go into its
    summary."""
    from nli_ft.predictions import counted

    run = nli_ft.records.start_run(load_config(config, overrides).replace(seed=seed))
    rows = order(said_rows(right, n, next(DRAWS) if draw is None else draw, **changed))
    put_rows(run / "predictions.jsonl", rows)
    nli_ft.records.append_metrics(run, {"step": 1, "loss": 1.0})
    nli_ft.records.finish_run(run, after=counted(rows), **facts)
    return run


def nli_compare(*args):
    code = "import sys; from nli_ft.compare import compare_cli; sys.exit(compare_cli(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "changed,why",
    [
        ({"label": 1, "predicted_label": 1}, "labels"),
        ({"prompt_hash": "y"}, "prompts"),
        ({"premise": "another"}, "items"),
        ({"hypothesis": "another"}, "items"),
    ],
)
def test_runs_on_another_task_are_not_compared(project, changed, why):
    if "label" in changed:
        changed = changed | dict(completion=answer(1), thought_process="so")
    with pytest.raises(RecordError, match=f": not evaluated on the {why} of minimal_test"):
        nli_ft.differences.compare_runs([finished(), finished(**changed)])


def test_runs_on_other_ids_are_not_compared_however_many_they_share(project):
    with pytest.raises(RecordError, match="59 and 60 items; 1 of them, such as '59'"):
        nli_ft.differences.compare_runs([finished(), finished(n=59)])


@pytest.mark.parametrize(
    "damage,why",
    [
        (lambda r: (r / "predictions.jsonl").unlink(), "predictions.jsonl is missing"),
        (lambda r: (r / "config.json").unlink(), "config.json is missing"),
        (lambda r: (r / "environment.json").write_text("{"), "environment.json cannot be read"),
        (
            lambda r: (r / "predictions.jsonl").write_text((r / "predictions.jsonl").read_text() * 2),
            "occurs more than once",
        ),
        (
            lambda r: (r / "predictions.jsonl").write_text(
                (r / "predictions.jsonl").read_text().replace("0.5", "NaN", 1)
            ),
            "not a probability",
        ),
        (
            lambda r: (r / "predictions.jsonl").write_text((r / "predictions.jsonl").read_text()[:-9]),
            "not JSON",
        ),
        (lambda r: shutil.rmtree(r), "no folder"),
        (
            lambda r: nli_ft.records._write_json(
                r / "summary.json",
                nli_ft.records._read_json(r / "summary.json") | nli_ft.records._running(load_config()),
            ),
            "still going",
        ),
    ],
)
def test_a_damaged_or_unfinished_record_is_refused_by_name(project, damage, why):
    good, bad = finished(), finished()
    damage(bad)
    out = nli_compare(good, bad)
    assert (
        out.returncode == 2 and why in out.stderr and bad.name in out.stderr and "Traceback" not in out.stderr
    )


def test_row_order_in_the_predictions_file_does_not_matter(project):
    a, b, c = (
        finished(),
        finished(right=lambda i: i * i % 7 > 1),
        finished(right=lambda i: i * i % 7 > 1, order=lambda rows: rows[1::2] + rows[::2]),
    )
    apart = ("run", "name", "path", "seconds")
    one, other = (
        {k: v for k, v in nli_ft.differences.compare_runs([a, x])[1].items() if k not in apart}
        for x in (b, c)
    )
    assert one == other


def test_the_comparison_equals_one_worked_out_by_hand(project):
    """Of 60 items 10 are right only in b, 2 only in a. So the difference is 8/60, and McNemar's p is that of two tails
    of twelve coin tosses."""
    import math

    only_b, only_a = range(0, 20, 2), (21, 23)
    a, b = (
        finished(right=lambda i: i not in only_b),
        finished(right=lambda i: i not in only_a, overrides="lora_r=4"),
    )
    c = finished(right=lambda i: i not in only_b, overrides="lora_r=2")
    _, rb, rc = nli_ft.differences.compare_runs([a, b, c])
    p = 2 * sum(math.comb(12, k) for k in range(3)) / 2**12
    assert (
        abs(rb["difference"] - 8 / 60) < 1e-12
        and abs(rb["p"] - p) < 1e-12
        and abs(rb["p_holm"] - 2 * p) < 1e-12
        and rb["ci"][0] < 8 / 60 < rb["ci"][1]
    )
    assert rc["difference"] == 0 and rc["p"] == 1 and rc["p_holm"] == 1 and "no difference" in rc["verdict"]


def test_a_comparison_that_differs_in_two_settings_warns_and_in_one_does_not(project):
    a, b, c = finished(), finished(overrides="lora_r=4"), finished(overrides="lora_r=4 learning_rate=5e-4")
    assert "warning" not in nli_compare(a, b).stdout
    out = nli_compare(a, c).stdout
    assert "warning" in out and "lora_r, learning_rate" in out


def test_a_training_file_that_changed_under_its_name_is_a_difference_and_a_moved_one_is_not(project):
    for name in ("a", "b"):
        (project / f"{name}.jsonl").write_text('{"id":1,"premise":"p","hypothesis":"h","label":1}\n')
    one, moved = finished(overrides="train_data=a.jsonl"), finished(overrides="train_data=b.jsonl")
    (project / "a.jsonl").write_text('{"id":1,"premise":"p","hypothesis":"h","label":0}\n')
    changed = finished(overrides="train_data=a.jsonl")
    assert [r["differs"] for r in nli_ft.differences.compare_runs([one, moved, changed])[1:]] == [
        [],
        ["train_data (same path, other content)"],
    ]


def test_all_seeds_of_configs_are_compared_config_by_config_and_written_once(project):
    for seed in (1, 2, 3):
        finished("minimal_test", seed=seed)
        finished("cpu_demo", right=lambda i: i != seed, seed=seed)
    out = nli_compare("--all", "minimal_test", "cpu_demo", "--out", "table.md")
    assert (
        out.returncode == 0
        and (
            "cpu_demo against config minimal_test: +23.3 points: can be told from noise over 3 and 3 "
            "seeds and 60 items (30 clusters)"
        )
        in out.stdout
    )
    assert (project / "table.md").read_text().count("| cpu_demo s") == 3
    again = nli_compare("--latest", "minimal_test", "cpu_demo", "--out", "table.md")
    assert again.returncode == 2 and "exists already" in again.stderr
    assert (
        json.loads(nli_compare("--latest", "minimal_test", "cpu_demo", "--json").stdout)["runs"][1]["config"]
        == "cpu_demo"
    )
    assert nli_compare("--latest", "minimal_test", "ablation2").returncode == 2


def test_runs_on_copies_of_the_same_data_are_repetitions_of_one_config(project):
    for name in ("a", "b", "c"):
        (project / f"{name}.jsonl").write_text(
            '{"id":1,"premise":"p","hypothesis":"h","label":%d}\n' % (name == "c")
        )
    runs = [finished(seed=s, overrides=f"train_data={f}.jsonl") for s, f in ((1, "a"), (2, "b"), (3, "c"))]
    assert [r["seeds"] for r in nli_ft.seeds.compare_configs(runs)] == [[1, 2], [3]]


def test_the_untrained_model_of_a_run_can_be_its_baseline(project):
    run = finished()
    put_rows(run / "predictions_before.jsonl", said_rows(lambda i: False))
    rows = nli_ft.differences.compare_runs([f"{run}:before", run])
    assert rows[0]["run"].endswith(":before") and rows[1]["differs"] == ["training"]


def test_a_model_card_says_only_what_the_record_says(project):
    def mended(r):
        return dict(
            r, outcome="repaired", repairs=["text before the object"], completion="So: " + r["completion"]
        )

    run = finished(order=lambda rows: [mended(r) for r in rows])
    card = nli_ft.card.model_card(run)
    for said in (
        "0.750 [0.625, 0.844]",
        "n=60",
        "60 items in 30 clusters",
        "accuracy of the majority label (0) | 0.500",
        "One seed (42)",
        "100.0% of the answers were no valid JSON",
        "not recorded",
        "lora_r",
    ):
        assert said in card
    assert (run / "MODEL_CARD.md").read_text() == card and str(project) not in card


def test_the_front_matter_of_a_card_is_read_back_without_a_network(project, monkeypatch):
    import socket
    from huggingface_hub import ModelCard

    def no_network(*a, **k):
        raise AssertionError("a model card needs no network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    run = finished()
    nli_ft.card.model_card(run)
    data = ModelCard.load(run / "MODEL_CARD.md").data
    record = nli_ft.records.read_run(run)
    scores = nli_ft.evaluate.score(record.predictions())
    assert record.cfg.model_id == "smollm2-135m" and data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.library_name, data.model_name) == ("peft", record.name)
    assert {r.metric_name: r.metric_value for r in data.eval_results} == {
        "accuracy (no answer is wrong)": round(scores["accuracy"], 3),
        "macro-F1": round(scores["macro_f1"], 3),
        "MCC": round(scores["mcc"], 3),
    }
    evaluated = record.environment["data"]["eval"]
    assert {(r.dataset_name, r.dataset_revision) for r in data.eval_results} == {
        (evaluated["path"], evaluated["sha256"])
    }


def test_the_model_card_is_a_command_too(project, capsys):
    run = finished()
    assert (
        nli_ft.commands.runs_cli([str(run), "--card"]) == 0
        and capsys.readouterr().out.strip() == (run / "MODEL_CARD.md").read_text().strip()
    )
    with pytest.raises(SystemExit) as e:
        nli_ft.commands.runs_cli(["--card"])
    assert e.value.code == 2 and "name the record's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make",
    [
        lambda: [],
        lambda: [finished()],
        lambda: [finished(), finished(n=20), finished(seed=7, right=lambda i: True)],
    ],
)
def test_the_comparison_notebook_runs_whatever_there_is(project, make):
    import papermill

    made = make()
    nb = papermill.execute_notebook(
        str(ROOT / "nbs" / "compare.ipynb"), str(project / "out.ipynb"), cwd=str(project), progress_bar=False
    )
    text = json.dumps(nb)
    assert ("image/png" in text) == (len(made) > 1)
    if len(made) > 1:
        assert f"left out: {nli_ft.records.read_run(made[1]).name}: not evaluated on the items of" in text
        assert "2 runs are compared" in text and "can be told from noise" in text


# -- what is no repetition


def seeds_of(*runs):
    return [r["seeds"] for r in nli_ft.seeds.compare_configs(list(map(str, runs)))]


def test_runs_of_one_seed_count_once_and_the_last_of_them(project):
    other = (
        finished("cpu_demo", right=lambda i: i % 3 > 0, seed=1),
        finished("cpu_demo", right=lambda i: i % 3 > 0, seed=2),
    )
    again = [finished(seed=1, right=lambda i, k=k: i % 5 != k) for k in range(3)]
    assert seeds_of(*again, *other) == [[1], [1, 2]]
    out = nli_compare("--all", "minimal_test", "cpu_demo")
    assert out.returncode == 0 and out.stdout.count("was run again as") == 2 and again[2].name in out.stdout
    assert "over 3 and 3 seeds" not in out.stdout and "3 and 2 seeds" not in out.stdout


def child_of(parent, seed, data="pairs", **facts):
    "A run that started from another one."
    run = nli_ft.records.read_run(parent)
    recipes = nli_ft.records.recipe_hashes(run)
    origin = dict(run=run.name, adapter_sha256=run.path.name, seed=run.seed, recipes=recipes)
    return finished(
        "dpo_demo", seed=seed, overrides=f"train_data={data}.jsonl", facts=dict(parent=origin) | facts
    )


def test_seeds_that_start_from_parents_of_their_own_seed_are_one_arm(project):
    (project / "pairs.jsonl").write_text("{}\n")
    (project / "other.jsonl").write_text("{} \n")
    parents = [finished("cpu_demo", seed=seed) for seed in (1, 2, 3)]
    children = [child_of(p, seed) for seed, p in zip((1, 2, 3), parents)]
    assert seeds_of(*parents, *children) == [[1, 2, 3], [1, 2, 3]]
    longer = finished("cpu_demo", seed=4, overrides="max_steps=7")
    others = child_of(longer, 4), child_of(parents[0], 5), child_of(parents[1], 6, data="other")
    assert seeds_of(*children, *others) == [[1, 2, 3], [4], [5], [6]]
    names = nli_ft.differences.arm_names(nli_ft.differences.load_compared(list(map(str, children))))
    assert set(names) == {"dpo_demo"}


def test_parents_before_their_children_were_trained_are_as_many_seeds(project):
    parents = [finished("cpu_demo", right=lambda i, s=s: (i + s) % 4 > 0, seed=s) for s in (1, 2, 3)]
    children = [child_of(p, seed) for seed, p in zip((1, 2, 3), parents)]
    for parent, child in zip(parents, children):
        shutil.copy(parent / "predictions.jsonl", child / "predictions_before.jsonl")
    before, after = nli_ft.seeds.compare_configs([*(f"{c}:before" for c in children), *children])
    assert before["seeds"] == after["seeds"] == [1, 2, 3] and before["sd"] is not None


def sampled_by(parent, seed, n=1, **changed):
    "A run that learnt what another one had sampled."
    run = nli_ft.records.read_run(parent)
    Path(f"round{n}-s{seed}.jsonl").write_text(json.dumps([n, seed]) + "\n")
    origin = dict(run=run.name, adapter_sha256=run.path.name, seed=run.seed, base="smollm2-135m", round=n)
    origin |= dict(recipes=nli_ft.records.recipe_hashes(run), pairs_sha256="…", how=dict(samples=4)) | changed
    facts = dict(sampled_from=origin, generated_tokens=1000 * seed, steps=10 + seed)
    return finished("cpu_demo", seed=seed, overrides=f"train_data=round{n}-s{seed}.jsonl", facts=facts)


def test_seeds_that_learn_what_runs_of_their_own_seed_have_sampled_are_one_arm(project):
    parents = [finished("cpu_demo", seed=seed) for seed in (1, 2)]
    first = [sampled_by(p, seed) for seed, p in zip((1, 2), parents)]
    second = [sampled_by(p, seed, n=2) for seed, p in zip((1, 2), first)]
    assert seeds_of(*parents, *first, *second) == [[1, 2]] * 3
    assert seeds_of(first[0], sampled_by(parents[1], 2, how=dict(samples=8))) == [[1], [2]]
    # all seeds may share one parent, also where one of them has its seed
    shared = [sampled_by(parents[0], seed, n=3) for seed in (1, 2, 3)]
    later = [sampled_by(run, seed, n=4) for seed, run in zip((1, 2, 3), shared)]
    assert seeds_of(*shared, *later) == [[1, 2, 3]] * 2
    # records without the hash of an adapter tell their parents by name
    other = finished("cpu_demo", seed=4, overrides="max_steps=7")
    unknown = [sampled_by(p, s, n=5, adapter_sha256=None) for p, s in ((parents[0], 2), (other, 3))]
    assert seeds_of(*unknown) == [[2], [3]]
    names = nli_ft.differences.arm_names(nli_ft.differences.load_compared(list(map(str, [*first, *second]))))
    assert names == ["cpu_demo [round=1]"] * 2 + ["cpu_demo [round=2]"] * 2


def test_a_copied_folder_is_no_run_whatever_its_name_and_seed(project):
    one, two = finished(seed=1), finished("cpu_demo", right=lambda i: i % 3 > 0, seed=1)
    copies = [one.with_name(name) for name in ("copy", "20261126-000000-s2-00000000")]
    for c in copies:
        shutil.copytree(one, c)
    with pytest.raises(RecordError, match="is a copy of"):
        nli_ft.differences.compare_runs([one, copies[0], two])
    out = nli_compare(one, *copies, two)
    assert out.returncode == 0 and out.stdout.count("is a copy of") == 2
    assert nli_ft.compare.distinct([one, *copies, two])[0] == [str(one), str(two)]
    out = nli_compare(one, copies[0])
    assert out.returncode == 2 and "fewer than two runs" in out.stderr and "is a copy of" in out.stderr


def test_another_seed_in_config_json_alone_is_refused(project):
    one = finished(seed=1)
    copy = one.with_name("copy")
    shutil.copytree(one, copy)
    config = json.loads((copy / "config.json").read_text())
    config["config"]["seed"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    out = nli_compare(one, copy)
    assert (
        out.returncode == 2 and "seed 2" in out.stderr and "seed 1" in out.stderr and "restore" in out.stderr
    )


def test_a_copy_with_another_seed_and_another_run_id_is_known_by_its_adapter_or_its_answers(project):
    facts = dict(adapter_sha256="a" * 64)
    one, same_adapter = (
        finished(seed=1, facts=facts),
        finished(seed=2, right=lambda i: i % 7 > 0, facts=facts),
    )
    kept, left = nli_ft.compare.distinct([one, same_adapter])
    assert kept == [str(one)] and "has the adapter of" in left[0][1]
    three = [finished("cpu_demo", seed=s, draw=9) for s in (1, 2, 3)]
    put_rows(three[1] / "predictions.jsonl", get_rows(three[1] / "predictions.jsonl"))
    kept, left = nli_ft.compare.distinct(three)
    assert kept == [str(three[0])] and all("exactly the answers" in why for _, why in left)
    assert seeds_of(*three, one) == [[1], [1]]


def test_answers_that_took_another_time_are_the_same_answers(project):
    runs = [finished(seed=s, draw=9, seconds=s / 10) for s in (1, 2)]
    assert nli_ft.compare.distinct(runs)[0] == [str(runs[0])]


def test_runs_made_again_are_compared_where_there_is_nothing_else(project):
    a, b = finished(seed=1), finished(seed=1, right=lambda i: i % 5 > 0)
    out = nli_compare(a, b)
    assert out.returncode == 0 and "nothing" in out.stdout and "left out" not in out.stdout


def test_both_doors_leave_out_the_same(project):
    import papermill

    one = finished(seed=1)
    finished(seed=2, right=lambda i: i % 5 > 0)
    copy = one.with_name("copy")
    shutil.copytree(one, copy)
    shown = [nli_compare("--all", "minimal_test").stdout]
    for how in (dict(configs="minimal_test"), {}):
        nb = papermill.execute_notebook(
            str(ROOT / "nbs" / "compare.ipynb"),
            str(project / "out.ipynb"),
            how,
            cwd=str(project),
            progress_bar=False,
        )
        shown.append("".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", [])))
    for text in shown:
        assert "left out:" in text and "is a copy of" in text


# -- what differs


def apart(a, b):
    "`differing` of two records whose rows are in one order."
    return nli_ft.differences.differing(*nli_ft.compare._entries([a, b]))


def rewrite(path, change):
    obj = json.loads(path.read_text())
    change(obj)
    path.write_text(json.dumps(obj))


def test_steps_rows_and_tokens_that_were_done_are_a_difference(project):
    facts = dict(
        steps=40,
        rows_trained=640,
        tokens_trained=56320,
        processes=1,
        device="x86_64 CPU",
        compute_dtype="float32",
    )
    a, b = (
        finished(seed=1, facts=facts),
        finished(seed=2, facts=facts | dict(steps=400, rows_trained=6400, tokens_trained=563200)),
    )
    assert apart(a, b) == ["steps 40 → 400 (rows 640 → 6,400, tokens 56,320 → 563,200)"]
    assert "seed only" not in nli_compare(a, b).stdout and "steps 40 → 400" in nli_compare(a, b).stdout
    assert seeds_of(a, b) == [[1], [2]]


def test_a_schedule_that_was_asked_for_and_its_steps_are_one_entry(project):
    a = finished(overrides="max_steps=40", facts=dict(steps=40))
    b = finished(overrides="max_steps=400", facts=dict(steps=400))
    assert nli_ft.differences.explains(apart(a, b)) == ["max_steps (steps 40 → 400)"]


def test_a_twin_matched_in_loss_tokens_is_one_entry(project):
    a = finished("ablation2", facts=dict(steps=4, loss_tokens_trained=100))
    facts = dict(steps=40, loss_tokens_trained=1000)
    b = finished("ablation2", overrides="max_loss_tokens=1000", facts=facts)
    said = "max_loss_tokens (steps 4 → 40 (loss tokens 100 → 1,000))"
    assert nli_ft.differences.explains(apart(a, b)) == [said]


def test_another_mask_is_one_entry_with_its_loss_tokens(project):
    a = finished(facts=dict(steps=4, loss_tokens_trained=100))
    b = finished(overrides="train_on_prompt=true", facts=dict(steps=4, loss_tokens_trained=1000))
    said = "train_on_prompt (loss tokens 100 → 1,000)"
    assert nli_ft.differences.explains(apart(a, b)) == [said]


def test_correct_only_is_said_to_have_trained_less(project):
    a, b = (
        finished("ablation2", facts=dict(steps=45, rows_trained=720)),
        finished("correct_only", facts=dict(steps=30, rows_trained=480)),
    )
    assert nli_ft.differences.explains(apart(a, b)) == ["data_strategy", "steps 45 → 30 (rows 720 → 480)"]
    assert "warning" in nli_compare(a, b).stdout


@pytest.mark.parametrize(
    "base, control",
    [
        ("ablation2", "reflected_shuffled"),
        ("ablation2", "shuffled_any"),
        ("ablation2", "permuted"),
        ("ablation2", "filler"),
        ("label_first", "label_first_permuted"),
        ("cpu_demo", "wrong_rule"),
    ],
)
def test_a_control_differs_from_its_base_in_the_thoughts_alone(project, base, control):
    steps = dict(steps=45, rows_trained=720)  # permuted words may be more tokens
    a = finished(base, facts=steps | dict(tokens_trained=56320))
    b = finished(control, facts=steps | dict(tokens_trained=57000))
    assert nli_ft.differences.explains(apart(a, b)) == ["data_strategy (tokens 56,320 → 57,000)"]


def test_steps_of_older_records_are_read_from_their_metrics(project):
    a, b = finished(), finished()
    nli_ft.records.append_metrics(b, {"step": 7, "loss": 0.5})
    assert "steps 1 → 7" in apart(a, b)
    (b / "metrics.jsonl").unlink()
    assert apart(a, b) == ["not recorded: steps"]


def test_a_few_tokens_are_no_difference_between_seeds_and_one_token_is_within_a_seed(project):
    def tokens(seed, n):
        return finished(
            seed=seed, facts=dict(steps=40, device="x86_64 CPU", compute_dtype="float32", tokens_trained=n)
        )

    a, b, c, d = tokens(1, 10000), tokens(2, 10100), tokens(1, 10001), tokens(2, 12000)
    assert (
        apart(a, b) == []
        and apart(a, c) == ["tokens 10,000 → 10,001"]
        and apart(a, d) == ["tokens 10,000 → 12,000"]
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda e: e["packages"].update(torch="9.9"), "packages (torch "),
        (lambda e: e["packages"].update(wandb="9.9"), None),
        (lambda e: e.pop("packages"), "not recorded: package versions"),
        (lambda e: e.update(git=dict(commit="a" * 40, dirty=False, changed=[])), "(same code)"),
        (lambda e: e.update(code_sha256="0" * 64), "code (uncommitted changes)"),
        (
            lambda e: e.update(
                git=dict(commit="a" * 40, dirty=True, changed=["nli_ft/model.py"]), code_sha256="0" * 64
            ),
            "code (commit none → aaaaaaa)",
        ),
        (lambda e: e.pop("code_sha256"), "not recorded: code"),
        (
            lambda e: e["device"].update(gpus=[dict(name="NVIDIA H100", memory_gib=79, capability="9.0")]),
            "device ",
        ),
        (lambda e: e["data"]["train"].update(sha256="1" * 64), "train_data (same path, other content)"),
        (lambda e: e["data"]["eval"].update(sha256="1" * 64), "eval_data (other content, same items)"),
        (
            lambda e: e["data"]["train"].update(contracts={"course": 4}),
            "label contract of train_data entailment → course",
        ),
    ],
)
def test_what_a_run_ran_in_is_a_difference(project, change, said, capsys):
    a, b = finished(overrides="device=auto"), finished(overrides="device=auto")
    for run in (a, b):
        rewrite(
            run / "environment.json",
            lambda e: (e["data"]["train"].update(contracts={"entailment": 4}), e["device"].update(gpus=[])),
        )
    rewrite(b / "environment.json", change)
    found = apart(a, b)
    assert found == [] if said is None else len(found) == 1 and said in found[0]
    nli_ft.compare.compare_cli([str(a), str(b)])
    shown = capsys.readouterr().out
    assert ("nothing" in shown) == (said is None), shown


def test_runs_of_other_code_are_not_pooled_and_a_commit_of_the_same_code_is(project):
    runs = [finished(seed=s) for s in (1, 2, 3)]
    rewrite(
        runs[1] / "environment.json", lambda e: e.update(git=dict(commit="a" * 40, dirty=False, changed=[]))
    )
    rewrite(runs[2] / "environment.json", lambda e: e.update(code_sha256="0" * 64))
    assert seeds_of(*runs) == [[1, 2], [3]]


def test_an_older_checkout_with_changes_is_not_taken_for_its_commit(project):
    def git(changed):
        return dict(commit="a" * 40, dirty=bool(changed), changed=changed)

    runs = [finished() for _ in range(3)]
    for run, changed in zip(runs, ([], ["runs/cpu_demo/x/", "notes.md"], ["nli_ft/model.py"])):
        rewrite(run / "environment.json", lambda e: (e.pop("code_sha256"), e.update(git=git(changed))))
    assert apart(runs[0], runs[1]) == [] and apart(runs[0], runs[2]) == ["not recorded: code"]


def test_mode_and_engine_of_every_row_count(project):
    def with_one(**changed):
        return finished(order=lambda rows: [*rows[:-1], dict(rows[-1], **changed)])

    a, engine, mode = (
        finished(),
        with_one(engine="vllm"),
        with_one(
            mode="vote:3",
            votes=[0, 0, 1],
            predicted_label=0,
            p_entail=1 / 3,
            completion=answer(0),
            thought_process="so",
        ),
    )
    assert [d for d in apart(a, engine) if "engine" in d] == [
        "engine transformers → transformers 59 + vllm 1"
    ]
    assert apart(a, mode) == ["decoding mode cot → cot 59 + vote:3 1"]


def test_untrained_models_do_not_differ_by_how_they_would_be_trained(project):
    runs = [
        finished(overrides=o, facts=dict(steps=n, device="x86_64 CPU", compute_dtype="float32"))
        for o, n in (("lora_r=4", 4), ("lora_r=8", 9))
    ]
    for run in runs:
        put_rows(run / "predictions_before.jsonl", said_rows(lambda i: False))
    a, b = runs
    assert apart(f"{a}:before", f"{b}:before") == [] and apart(f"{a}:before", b) == ["training"]


# -- records that were edited. Each of these changes a printed number, and each must be refused by every reader.


def flip(run):  # a wrong answer becomes a right one
    rows = get_rows(run / "predictions.jsonl")
    wrong = next(r for r in rows if r["label"] != r["predicted_label"])
    wrong["predicted_label"] = wrong["label"]
    put_rows(run / "predictions.jsonl", rows)


def drop(run):
    put_rows(
        run / "predictions.jsonl",
        [r for r in get_rows(run / "predictions.jsonl") if r["label"] == r["predicted_label"]],
    )


def regold(run):
    put_rows(
        run / "predictions.jsonl",
        [dict(r, label=r["predicted_label"]) for r in get_rows(run / "predictions.jsonl")],
    )


def blank(run):
    (run / "predictions.jsonl").write_text(
        (run / "predictions.jsonl").read_text().replace('"seconds": 0.1', '"seconds": 0.2', 1)
    )


def in_summary(**changed):
    return lambda run: rewrite(run / "summary.json", lambda s: s["after"].update(changed))


def unsealed(change):
    "The record looks as if it were older than the hash."

    def edit(run):
        change(run)
        rewrite(run / "summary.json", lambda s: s.pop("predictions"))

    return edit


def covered_up(run):
    "The record has the counts of the edited file and no hash. Only the completions show the edit."
    from nli_ft.predictions import counted

    flip(run)
    rewrite(
        run / "summary.json",
        lambda s: (s.pop("predictions"), s.update(after=counted(get_rows(run / "predictions.jsonl")))),
    )


def sealed_again(run):
    "The record has the counts and the hash of the edited file."
    from nli_ft.predictions import counted, predictions_seal

    flip(run)
    path = run / "predictions.jsonl"
    rewrite(
        run / "summary.json",
        lambda s: s.update(after=counted(get_rows(path)), predictions={path.name: predictions_seal(path)}),
    )


EDITS = dict(
    flip=(flip, "SHA-256"),
    drop=(drop, "rows, recorded are 60"),
    regold=(regold, "SHA-256"),
    blank=(blank, "SHA-256"),
    accuracy=(in_summary(accuracy=0.9), "accuracy of its rows is 0.75, recorded is 0.9"),
    n=(in_summary(n=600), "n of its rows is 60, recorded is 600"),
    valid=(in_summary(valid_rate=0.5), "valid_rate"),
    old_flip=(unsealed(flip), "accuracy of its rows"),
    old_drop=(unsealed(drop), "n of its rows"),
    old_regold=(unsealed(regold), "accuracy of its rows"),
    covered_up=(covered_up, "its completion says"),
    sealed_again=(sealed_again, "its completion says"),
)


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_record_is_refused_by_every_reader(project, name, capsys):
    edit, why = EDITS[name]
    good, bad = finished(seed=1), finished(seed=2)
    edit(bad)
    with pytest.raises(RecordError, match="is not what") as e:
        nli_ft.records.read_run(bad).predictions()
    assert why in str(e.value) and "predictions.jsonl" in str(e.value) and "Restore" in str(e.value)
    for argv in ([str(bad)], [str(bad), "--card"]):
        with pytest.raises(SystemExit) as e:
            nli_ft.commands.runs_cli(argv)
        assert e.value.code == 2 and why in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        nli_ft.compare.compare_cli([str(good), str(bad)])
    assert e.value.code == 2 and why in capsys.readouterr().err
    kept, left = nli_ft.compare.comparable([good, bad])
    assert [str(k) for k in kept] == [str(good)] and why in left[0][1]
    assert not (bad / "MODEL_CARD.md").exists()


def test_an_edited_file_of_the_untrained_model_is_refused(project, capsys):
    from nli_ft.predictions import counted

    run, rows = finished(), said_rows(lambda i: i % 2 > 0)
    put_rows(run / "predictions_before.jsonl", rows)
    nli_ft.records.finish_run(run, before=counted(rows))
    put_rows(run / "predictions_before.jsonl", said_rows(lambda i: False))
    for argv in ([str(run)], [str(run), "--card"]):
        with pytest.raises(SystemExit) as e:
            nli_ft.commands.runs_cli(argv)
        assert e.value.code == 2 and "predictions_before.jsonl is not what" in capsys.readouterr().err
    with pytest.raises(RecordError, match="predictions_before"):
        nli_ft.differences.load_compared([f"{run}:before"])


def test_counts_that_contradict_each_other_are_listed_as_unreadable_without_reading_predictions(project):
    run = finished()
    in_summary(accuracy=0.9)(run)
    (run / "predictions.jsonl").unlink()
    [row] = runs(project)
    assert row["status"] == "unreadable" and "says accuracy 0.9 and 45 right of 60" in row["why"]


def test_listing_runs_reads_no_predictions(project, monkeypatch):
    finished()

    def never(*a, **k):
        raise AssertionError("predictions were read")

    swap(monkeypatch, "nli_ft.predictions.read_predictions", never)
    swap(monkeypatch, "nli_ft.predictions.check_record", never)
    assert [r["accuracy"] for r in runs(project)] == [0.75]


def test_older_completions_that_todays_rules_read_otherwise_are_told_and_not_refused(project, capsys):
    "Earlier rules may have read text around the object otherwise. They cannot have read the object alone otherwise."
    loose = [
        dict(
            r,
            completion=f"First I thought {answer(1 - r['predicted_label'])} but no: {r['completion']}",
            outcome="repaired",
        )
        for r in said_rows(lambda i: True)
    ]
    from nli_ft.predictions import counted, read_predictions

    run = finished()
    put_rows(run / "predictions.jsonl", loose)
    rewrite(run / "summary.json", lambda s: (s.pop("predictions"), s.update(after=counted(loose))))
    assert len(read_predictions(run / "predictions.jsonl")) == 60
    said = capsys.readouterr().err
    assert "60 rows would be read otherwise" in said
    assert "its completion says" in said and "The recorded values are used" in said
    assert any("no hash" in n for n in nli_ft.compare.record_notes([run]))


def test_the_committed_record_opens_and_says_that_it_has_no_hash_or_has_it():
    for run in (ROOT / "runs" / "cpu_demo").iterdir():
        checks = nli_ft.records.read_run(run).checks()
        assert {"predictions.jsonl", "predictions_before.jsonl"} <= set(checks)
        assert all("120 rows read again" in c for c in checks.values())


def test_leakage_is_in_the_card_and_below_the_table(project):
    from nli_ft.check import leakage

    row = dict(id=0, premise="A dog 's tail .", hypothesis="It is a tail .", label=1, contract="course")
    found = leakage(
        [row],
        [
            dict(row, premise="a dog's tail", contract="entailment"),
            dict(row, premise="A cat.", contract="entailment"),
        ],
    )
    leaky, plain = finished(facts=dict(leakage=found)), finished(seed=7, right=lambda i: i % 5 > 0)
    card = nli_ft.card.model_card(leaky)
    for said in (
        "1 of 2 evaluation pairs are among the training rows",
        "Label contracts differ: course in training, entailment in evaluation",
    ):
        assert said in card
    assert "was not looked for" in nli_ft.card.model_card(plain)
    out = nli_compare(leaky, plain).stdout
    assert f"{leaky.parent.name}/{leaky.name}: 1 of 2 evaluation pairs" in out and "was not looked for" in out


# -- what counts as changed code


def git(project, *args):
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    return subprocess.run(
        ["git", *who, *args], cwd=project, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def clone(project):
    "The project with a notebook, all committed."
    notebook(project, "1 + 1", "print('x')")
    git(project, "init", "--quiet")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "first")
    return project


def recorded_git(run):
    return json.loads((run / "environment.json").read_text())["git"]


@pytest.mark.parametrize("overrides", ["", "runs_dir=results"])
def test_a_run_in_a_clean_clone_is_a_run_of_its_commit(clone, overrides):
    for _ in range(2):  # the second run finds the record of the first
        run = finished(overrides=overrides)
        assert recorded_git(run) == dict(
            commit=git(clone, "rev-parse", "HEAD").strip(), dirty=False, changed=[]
        )
        assert "repeated exactly" not in nli_ft.card.model_card(run)


def test_changed_code_is_named_and_the_card_says_that_the_run_cannot_be_repeated(clone):
    (clone / "new tool.py").write_text("x = 1\n")
    (clone / "settings.ini").write_text((clone / "settings.ini").read_text() + "# changed\n")
    run = finished()
    assert recorded_git(run)["dirty"] and recorded_git(run)["changed"] == ["settings.ini", "new tool.py"]
    assert "cannot be repeated exactly" in nli_ft.card.model_card(run)


@pytest.mark.parametrize(
    "change, dirty",
    [
        (lambda cells: cells[1].update(outputs=[nbformat.v4.new_output("stream", text="2")]), False),
        (lambda cells: cells[0].update(source='config = "cpu_demo"\noverrides = ""\nrun_dir = None'), False),
        (lambda cells: cells.append(nbformat.v4.new_markdown_cell("A note.")), False),
        (lambda cells: cells[1].update(source="1 + 2"), True),
        (lambda cells: cells[0]["metadata"].clear(), True),
    ],
    ids=["outputs", "parameters", "prose", "code", "the tag"],
)
def test_of_a_changed_notebook_only_the_code_counts(clone, change, dirty):
    path = clone / "nbs" / "train.ipynb"
    nb = nbformat.read(path, 4)
    change(nb.cells)
    nbformat.write(nb, path)
    assert recorded_git(finished())["dirty"] == dirty


def test_the_card_of_the_committed_record_does_not_take_its_own_folder_for_code(tmp_path):
    for run in (ROOT / "runs" / "cpu_demo").iterdir():
        copy = tmp_path / run.name
        shutil.copytree(run, copy)
        card = nli_ft.card.model_card(copy)
        changed = nli_ft.records.read_run(run).environment["git"]["changed"]
        assert all(path.startswith("runs/") for path in changed)
        assert "repeated exactly" not in card
        assert "repeated exactly" not in (run / "MODEL_CARD.md").read_text()


# -- the training notebook under plain papermill


def first_cells(project):
    "The real train.ipynb, cut off after the config is printed."
    nb = nbformat.read(ROOT / "nbs" / "train.ipynb", 4)
    end = next(i for i, c in enumerate(nb.cells) if "load_config(config" in c.source)
    nb.cells = [
        *nb.cells[: end + 1],
        nbformat.v4.new_code_cell("print('reached', cfg.learning_rate, cfg.seed)"),
    ]
    nbformat.write(nb, project / "nbs" / "train.ipynb")
    return project / "nbs" / "train.ipynb"


def printed(nb):
    return "".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", []))


def test_a_config_key_given_by_p_is_an_override(project):
    path, out = first_cells(project), project / "out.ipynb"
    subprocess.run(
        [sys.executable, "-m", "papermill", path, out, *"-p config ablation0 -p learning_rate 1e-9".split()]
        + ["-p", "overrides", "seed=7"],
        check=True,
        capture_output=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert "reached 1e-09 7" in printed(nbformat.read(out, 4))


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(config="ablation0", overides="seed=7"), "Did you mean overrides?"),
        (dict(confg="ablation0"), "Did you mean config?"),
        (dict(learning_rat=1e-9), "Did you mean learning_rate?"),
        (dict(learning_rate=1e-9, overrides="learning_rate=1e-4"), "Keep one of the two"),
    ],
)
def test_an_unknown_parameter_stops_the_notebook_at_its_first_cell(project, given, says):
    import papermill

    path, out = first_cells(project), project / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(str(path), str(out), given, cwd=str(project), progress_bar=False)
    assert e.value.ename == "ConfigError" and says in e.value.evalue
    cells = [c for c in nbformat.read(out, 4).cells if c.cell_type == "code" and c.execution_count]
    assert len(cells) == 3, "the parameters, what was injected, and the cell that stops"


@pytest.mark.parametrize("name, given, says", [("compare", "confgs", "configs"), ("explore", "ruhn", "run")])
def test_a_misspelt_parameter_stops_the_notebooks_that_read_runs(project, name, given, says):
    import papermill

    with pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(
            str(ROOT / f"nbs/{name}.ipynb"),
            str(project / "out.ipynb"),
            {given: "x"},
            cwd=str(project),
            progress_bar=False,
        )
    assert e.value.ename == "ConfigError" and f"Did you mean {says}?" in e.value.evalue


# -- progress bars


def test_a_command_draws_no_bar_into_a_log_file_and_no_kernel_misses_its_widgets(project):
    code = """
from nli_ft.process import command
from nli_ft.config_loader import load_config
@command
def load(argv):
    from nli_ft.model import load_base
    load_base(load_config("minimal_test", "model_id=tiny-mistral device=cpu"))
    print("loaded")
load([])
"""
    plain = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    p = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    assert (p.stdout, p.stderr) == ("loaded\n", "")
    notebook(project, "import nli_ft.process\nfrom tqdm.auto import tqdm\nprint('imported')")
    import papermill

    nb = papermill.execute_notebook(
        str(project / "nbs/train.ipynb"), str(project / "out.ipynb"), cwd=str(project), progress_bar=False
    )
    assert printed(nb) == "imported\n"


def test_overrides_that_somebody_saved_in_the_notebook_bring_no_warnings_of_papermill(project):
    notebook(project, "print(overrides)")
    path = project / "nbs/train.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells[0].source = nb.cells[0].source.replace('""', '"max_steps=2 eval_before=false"')
    nbformat.write(nb, path)
    p = nli_run("--config", "minimal_test", "--max_steps", "3")
    assert "max_steps=3" in p.stdout + p.stderr, p.stderr
    assert "unknown parameter" not in p.stderr and "Unable to parse" not in p.stderr
