"""`nli_bench gpu`: the list for a new card, tried out with tiny shapes. What dies is written down, and the next item
starts."""

import json
import os
import time

import pytest

from nli_ft import bench_gpu
from nli_ft.bench_gpu import GPU_PARTS, Part, GpuSetting, measure_gpu, run_part
from nli_ft.process import ConfigError

TINY = GpuSetting("cpu", tiny=True)


@pytest.mark.slow
def test_the_whole_list_runs_with_tiny_shapes_on_a_cpu(tmp_path):
    measured, page = measure_gpu("cpu", tiny=True, out=tmp_path / "bench", minutes=20)
    parts = measured["parts"]
    assert measured["summary"] == dict(ok=True, died=0), page
    assert {p.name: set(p.items) for p in GPU_PARTS} == {name: set(items) for name, items in parts.items()}
    without = {
        f"{name}: {item}" for name, items in parts.items() for item, r in items.items() if "skipped" in r
    }
    assert without <= {"answer: vllm merged", "answer: vllm nf4"}, page
    assert [check["same"] for check in measured["losses"].values()] == [True] * 3
    assert parts["device"]["nf4 values"]["max_difference"] == 0
    stop = parts["life"]["stop"]
    assert (stop["status"], stop["exit_code"]) == ("interrupted", 143), stop
    assert parts["life"]["resume"] == parts["life"]["resume"] | dict(status="done", steps=40)
    assert json.loads((tmp_path / "bench/gpu.json").read_text())["parts"] == parts
    assert "These numbers say nothing of a card" in page


ITEMS = """
import os, signal, time
from nli_ft import bench_gpu

bench_gpu.ITEMS["test", "good"] = lambda setting, item: dict(figure=1)
bench_gpu.ITEMS["test", "fails"] = lambda setting, item: 1 / 0
bench_gpu.ITEMS["test", "killed"] = lambda setting, item: os.kill(os.getpid(), signal.SIGKILL)
bench_gpu.ITEMS["test", "hangs"] = lambda setting, item: time.sleep(600)
bench_gpu.ITEMS["test", "last"] = lambda setting, item: dict(figure=2)
"""


@pytest.fixture
def with_bad_items(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(ITEMS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_an_item_that_dies_is_named_with_its_cause_and_the_next_one_starts(with_bad_items):
    lines = []
    part = Part("test", 60, ("good", "fails", "killed", "last"))
    results = run_part(part, TINY, with_bad_items, 300, lines.append)
    assert list(results) == ["good", "fails", "killed", "last"]
    assert results["fails"]["died"] == "ZeroDivisionError: division by zero"
    assert "SIGKILL" in results["killed"]["died"]
    assert (results["good"]["figure"], results["last"]["figure"]) == (1, 2)
    assert [line.split(":")[1].strip() for line in lines] == list(results)


@pytest.mark.every
def test_a_part_ends_with_its_time_and_keeps_what_it_has_measured(with_bad_items):
    start = time.monotonic()
    part = Part("test", 20, ("good", "hangs", "last"))
    results = run_part(part, TINY, with_bad_items, 40, lambda line: None)
    assert time.monotonic() - start < 120
    assert results["good"]["figure"] == 1
    assert (
        "the time of this part" in results["hangs"]["died"] and "no time was left" in results["last"]["died"]
    )


def test_nothing_is_overwritten_and_a_machine_without_a_card_is_told(tmp_path):
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty, and nothing in it is overwritten"):
        measure_gpu("cpu", tiny=True, out=tmp_path)
    with pytest.raises(ConfigError, match="torch sees no CUDA device.*--device cpu --tiny"):
        measure_gpu(out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_losses_of_ours_are_no_success():
    plain = dict(losses=[2.0, 1.0], dtype="float32")
    trained = {"plain 70": plain, "ours 70": plain | dict(losses=[2.0, 1.001])}
    assert bench_gpu.loss_check(trained)["70"]["same"] is False
