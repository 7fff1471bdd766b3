"""The commands of the README, as a person types them: papermill, run_training.sh, and the message when a GPU is
missing."""

import json, os, re, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest

from nli_ft.process import project_root

root = project_root()
papermill = str(Path(sys.executable).with_name("papermill"))
sample = root.parent / "shared" / "data" / "mistral_nli_sample" / "sample_ft.jsonl"
TINY = "model_id=tiny-mistral device=cpu compute_dtype=fp32 max_steps=2 max_eval_samples=4 max_new_tokens=8"


def run(*cmd, cwd=root, timeout=600, **env):
    start = time.time()
    # the kernel of a notebook must be this interpreter's, as in an activated .venv
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    r = subprocess.run(
        list(map(str, cmd)),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""} | env,
    )
    r.seconds, r.all = time.time() - start, r.stdout + r.stderr
    return r


def only_record(runs):
    found = list(Path(runs).glob("*/*/summary.json"))
    assert len(found) == 1, found
    return found[0].parent, json.loads(found[0].read_text())


@pytest.mark.parametrize(
    "cwd, notebook",
    [(root, "nbs/train.ipynb"), pytest.param(root / "nbs", "train.ipynb", marks=pytest.mark.every)],
    ids=["from the root", "from nbs"],
)
def test_papermill_without_a_gpu_stops_at_once_and_says_what_the_config_needs(tmp_path, cwd, notebook):
    r = run(
        papermill,
        notebook,
        tmp_path / "mine.ipynb",
        "-p",
        "config",
        "ablation2",
        "-p",
        "overrides",
        f"runs_dir={tmp_path}/runs",
        cwd=cwd,
        timeout=120,
    )
    assert r.returncode != 0
    for said in ("CUDA", "mistralai/Mistral-7B-v0.3", "cpu_demo", "minimal_test", "train_data"):
        assert said in r.all
    assert not (tmp_path / "runs").exists(), "nothing was started, so there is no record"
    assert "output_type: error" in r.all or "ConfigError" in (tmp_path / "mine.ipynb").read_text()


def assert_reads_well(path):
    """An executed train.ipynb is for people. Every plot is drawn. No widget needs a kernel. Loading bars do not fill
    lines. The file is small enough to look at anywhere."""
    nb = nbformat.read(path, 4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert "widgets" not in nb.metadata and not any(
        "widget" in mime for o in outputs for mime in o.get("data", {})
    )
    plots = [o.data for o in outputs if o.get("data", {}).get("text/plain", "").startswith("<Figure")]
    # lengths and losses: a random model answers no row, and then there is nothing more to plot
    assert len(plots) == 2 and all("image/png" in p for p in plots), [list(p) for p in plots]
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "No row was answered, so there is nothing to plot" in said
    lines = [line for line in said.splitlines() if path.parent.name not in line]
    assert max(map(len, lines)) <= 110, "longer lines do not fit a cell of 1,000 pixels"
    assert "IProgress" not in said and "Loading weights" not in said
    assert "\r" not in said and not [o.text for o in outputs if o.get("name") == "stderr"]
    assert path.stat().st_size < 500_000


SECRET = "hf_plantedSecretValue123456"


@pytest.fixture(
    scope="module",
    params=[(root, "nbs/train.ipynb"), pytest.param((root / "nbs", "train.ipynb"), marks=pytest.mark.every)],
    ids=["from the root", "from nbs"],
)
def trained(request, tmp_path_factory):
    "The folder of a training by plain papermill, and what was printed. Its environment holds a secret."
    cwd, notebook = request.param
    folder = tmp_path_factory.mktemp("trained")
    r = run(
        papermill,
        notebook,
        folder / "mine.ipynb",
        "-p",
        "config",
        "minimal_test",
        "-p",
        "overrides",
        f"{TINY} learning_rate=1e-4 runs_dir={folder}/runs output_dir={folder}/models",
        cwd=cwd,
        HF_TOKEN=SECRET,
        MY_PASSWORD=SECRET,
    )
    assert r.returncode == 0, r.all[-3000:]
    return folder, r.all


def test_plain_papermill_trains_and_leaves_a_whole_record(trained):
    folder, said = trained
    record, s = only_record(folder / "runs")
    assert s["status"] == "done" and s["steps"] == 2 and s["before"]["n"] == s["after"]["n"] == 4
    for name in (
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "predictions.jsonl",
        "predictions_before.jsonl",
        "report.json",
        "confusion.png",
    ):
        assert (record / name).is_file(), name
    resolved = json.loads((record / "config.json").read_text())
    assert (
        resolved["config"]["learning_rate"] == 1e-4
        and resolved["changed_from_default"]["learning_rate"]["from"]
    )
    metrics = [json.loads(l) for l in (record / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2] and all(
        "loss_thought" in m and "loss_label" in m for m in metrics if "loss" in m
    )
    assert "Unable to parse" not in said and "unknown parameter" not in said, (
        "papermill could not read the parameters cell"
    )
    assert_reads_well(folder / "mine.ipynb")


def test_no_environment_value_is_in_any_file_of_a_run(trained):
    folder, _ = trained
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert len(files) > 10
    for f in files:
        assert SECRET.encode() not in f.read_bytes(), f


def test_whoever_may_read_a_record_may_read_its_weights(trained):
    folder, _ = trained
    files = [f for f in (folder / "models").rglob("*") if f.is_file()]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {f.name for f in files}
    assert len({f.stat().st_mode for f in files}) == 1, [(f.name, oct(f.stat().st_mode)) for f in files]


def test_a_cell_that_fails_under_plain_papermill_marks_the_record_as_failed(tmp_path):
    nb = nbformat.read(root / "nbs" / "train.ipynb", 4)
    at = next(i for i, c in enumerate(nb.cells) if "session.train(" in c.source)
    nb.cells[at].source = "raise RuntimeError('the disk is on fire')"
    nbformat.write(nb, tmp_path / "train.ipynb")
    r = run(
        papermill,
        tmp_path / "train.ipynb",
        tmp_path / "out.ipynb",
        "-p",
        "config",
        "minimal_test",
        "-p",
        "overrides",
        f"{TINY} eval_before=false runs_dir={tmp_path}/runs output_dir={tmp_path}/models",
    )
    assert r.returncode != 0
    _, s = only_record(tmp_path / "runs")
    assert s["status"] == "failed" and "the disk is on fire" in s["error"]


def test_run_training_with_no_arguments_says_what_default_needs(tmp_path):
    r = run(root / "run_training.sh", "--local", "--runs_dir", tmp_path / "runs")
    assert r.returncode == 2, r.all
    for said in ("default", "CUDA", "hf download", "train_data", "eval_data", "nli_data"):
        assert said in r.all


def test_the_training_notebook_reports_the_thoughts_of_its_own_rows_as_those_of_further_sets():
    "The rows of the corpus say what a thought is worth, so the report needs them beside the predictions."
    nb = nbformat.read(root / "nbs/train.ipynb", 4)
    [cell] = [c.source for c in nb.cells if "save_report(" in c.source and c.cell_type == "code"]
    assert "rows=session.prep.eval_rows" in cell and "**known" in cell


@pytest.mark.slow
def test_smollm2_trains_through_run_training_local_on_the_embedded_rows(tmp_path):
    r = run(
        root / "run_training.sh",
        "--local",
        "--config",
        "minimal_test",
        "--runs_dir",
        tmp_path / "runs",
        "--output_dir",
        tmp_path / "models",
    )
    assert r.returncode == 0, r.all[-3000:]
    record, s = only_record(tmp_path / "runs")
    assert s["status"] == "done" and s["after"]["n"] == 8 and (record / "train.ipynb").is_file()
    assert re.search(r"accuracy \S+ .*→ \S+ +valid JSON", r.stdout) and record.name in r.stdout


@pytest.mark.every
@pytest.mark.skipif(not sample.exists(), reason="the real NLI sample is not here")
def test_smollm2_learns_from_older_text_rows_of_a_real_set(tmp_path):
    lines = sample.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text("".join(lines[60:]), encoding="utf-8")
    data = "--train_data", tmp_path / "train.jsonl", "--eval_data", tmp_path / "eval.jsonl"
    r = run(
        root / "run_training.sh",
        "--local",
        "--config",
        "minimal_test",
        *data,
        "--max_steps",
        "8",
        "--eval_before",
        "false",
        "--max_eval_samples",
        "2",
        "--max_new_tokens",
        "16",
        "--runs_dir",
        tmp_path / "runs",
        "--output_dir",
        tmp_path / "models",
    )
    assert r.returncode == 0, r.all[-3000:]
    record, _ = only_record(tmp_path / "runs")
    losses = [
        m["loss"] for m in map(json.loads, (record / "metrics.jsonl").read_text().splitlines()) if "loss" in m
    ]
    assert len(losses) == 8 and sum(losses[-3:]) < sum(losses[:3]), losses
