"""What the doors of llama.cpp and vLLM share: a place for environments, commands that must succeed, a trained run."""

import os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOORS = Path(os.environ.get("NLI_DOORS", "/var/tmp/nli_ft_doors"))


def say(*command, **kw):
    "Run a command that must succeed. Returns what it printed."
    r = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", cwd=ROOT, **kw)
    assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
    return r.stdout


def trained_run(there: Path) -> Path:
    "The record of the run that `NLI_DOORS_RUN` names. Without it `cpu_demo` is trained in the folder `there`."
    if given := os.environ.get("NLI_DOORS_RUN"):
        return Path(given)
    places = ["--output_dir", there / "models", "--runs_dir", there / "runs", "--eval_before", "false"]
    say(sys.executable, "-m", "nli_ft.train_sft", "--config", "cpu_demo", *places)
    [record] = there.glob("runs/*/*/summary.json")
    return record.parent
