"""The shortest way of a newcomer, from a clone and a table of pairs to a table for a paper: the commands of README, as
they stand there, in a fresh copy of the project. Only the configs are smaller."""

import json, os, re, shutil, site, subprocess, venv

import pytest

from test_docs import CLI, FENCE, ROOT, text_of, uncommented
from test_own_csv import table

HEADING = "## From your own table to a table for a paper"
TINY = """
train_data = "data/embedded/train.jsonl"
eval_data = "data/embedded/dev.jsonl"
model_id = "tiny-mistral"
device = "cpu"
compute_dtype = "fp32"
max_train_samples = None
max_steps = 2
max_eval_samples = 8
max_new_tokens = 8
eval_before = False
learning_rate = 0.05
warmup_ratio = 0.0
max_grad_norm = None
"""


def readme_commands():
    "The commands of the section, in order."
    section = text_of("README.md").partition(HEADING)[2].partition("\n## ")[0]
    [(_, block)] = FENCE.findall(section)
    return [line for line in map(uncommented, block.splitlines()) if line]


def fresh_copy(folder):
    "What a clone holds, with smaller configs."
    left_out = shutil.ignore_patterns(".*", "_docs", "models", "runs", "*.egg-info", "__pycache__", "studies")
    shutil.copytree(ROOT, folder, ignore=left_out)
    for path in (folder / "data").iterdir():
        if path.name not in ("README.md", "embedded"):  # those of the person who runs the tests
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    [example] = (ROOT / "runs").glob("cpu_demo/*-e8b84932")
    shutil.copytree(example, folder / "runs/cpu_demo" / example.name)
    for name in ("minimal_test", "cpu_demo"):
        (folder / f"nli_ft/configs/{name}.py").write_text(
            f'"""{name}, made smaller."""{TINY}', encoding="utf-8"
        )
    return folder


def install(folder):
    """A .venv as run_training.sh would have made it, without a network: the packages of this Python, and the project
    of the copy before them."""
    venv.EnvBuilder(symlinks=True).create(folder / ".venv")
    [packages] = (folder / ".venv/lib").glob("python3*/site-packages")
    (packages / "here.pth").write_text("\n".join([str(folder), *site.getsitepackages()]))
    for name, (module, function) in CLI.items():
        script = folder / ".venv/bin" / name
        script.write_text(
            f"#!{folder}/.venv/bin/python\nimport sys\nfrom nli_ft.{module} import {function}\nsys.exit({function}())\n"
        )
        script.chmod(0o755)
    mark = 'source scripts/env.sh; pins_hash "$PWD" >.venv/nli_ft_pins'
    subprocess.run(["bash", "-c", mark], cwd=folder, check=True)


def test_the_way_has_at_most_six_commands():
    assert 4 <= len(readme_commands()) <= 6


@pytest.mark.every
def test_the_commands_of_readme_lead_from_a_clone_and_a_csv_file_to_a_table(tmp_path):
    here = fresh_copy(tmp_path / "nli_ft")
    install(here)
    table(here / "my.csv", n=60)
    alone = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    alone |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    said = ""
    for command in readme_commands():
        r = subprocess.run(
            ["bash", "-c", command], cwd=here, env=alone, capture_output=True, text=True, timeout=1800
        )
        assert r.returncode == 0, f"{command}\n{r.stdout[-2000:]}\n{r.stderr[-2000:]}"
        said = r.stdout
    made = [p for p in here.glob("runs/cpu_demo/*/summary.json") if not p.parent.name.endswith("-e8b84932")]
    assert sorted(json.loads(p.read_text())["seed"] for p in made) == [1, 1, 2, 2]
    assert "left out: cpu_demo/20261126-095322-s42-e8b84932 judged other rows" in said
    latex = (here / "paper/table.tex").read_text(encoding="utf-8")
    latex = latex.replace(r"\allowbreak{}", "")  # where a long name may break
    # cot is what the config says, so it is no setting that tells the runs apart
    assert r"cpu\_demo [completion=label\_only] s2 &" in latex and r"cpu\_demo s2 &" in latex
    assert "8 items in" in latex and re.search(r"seeds? 1, 2 of each", latex)
    written = {p.name for p in (here / "paper").iterdir()}
    assert {"table.tex", "table.pdf", "scores.tex", "scores.pdf"} <= written
