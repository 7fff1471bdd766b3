"""The notebook for Colab and Kaggle. Nobody can execute it here, because it needs a network. So its commands are
parsed, and what it says of a T4 is computed."""

import ast, re, shlex
from pathlib import Path
from unittest import mock

import nbformat
import torch
import yaml

from test_docs import ROOT, parse, program
from nli_ft.config_loader import load_config
from nli_ft.preflight import Prepared, estimate_memory
from nli_ft.prompt import Encoded

CELLS = nbformat.read(ROOT / "nbs" / "colab.ipynb", 4).cells
CODE = [c.source for c in CELLS if c.cell_type == "code"]


def shell_lines():
    text = "\n".join(CODE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [" ".join(line[1:].split()) for line in lines if line.startswith("!")]


def test_every_command_of_the_notebook_is_accepted_by_its_own_parser():
    known = [line for line in shell_lines() if program(shlex.split(line)).startswith(("nli_", "./run_"))]
    assert len(known) == 6
    for line in known:
        parse(shlex.split(line.replace("{latest}", "runs/cpu_demo/RUN_ID")))


def test_no_cell_runs_in_the_tests_and_all_are_python_beside_their_shell_lines():
    for source in CODE:
        assert source.startswith("#| eval: false"), source
        ast.parse(re.sub(r"^( *)[!%].*$", r"\1pass", source.replace("\\\n", " "), flags=re.M))


def test_ablation0_fits_a_t4_by_the_estimate_and_would_not_as_it_stands(tmp_path):
    from transformers import MistralConfig

    (line,) = [line for line in shell_lines() if "ablation0" in line and line.startswith("./run_training.sh")]
    words = shlex.split(line)
    changes = {
        k.removeprefix("--"): v
        for k, v in zip(words, words[1:])
        if k in ("--compute_dtype", "--gradient_checkpointing")
    }
    shapes = dict(
        vocab_size=32768, num_key_value_heads=8, rope_theta=1e6, sliding_window=None
    )  # the rest is Mistral-7B
    MistralConfig(**shapes).save_pretrained(tmp_path)

    def gib(**keys):
        cfg = load_config("ablation0", keys | dict(model_id=str(tmp_path), compute_dtype="fp16"))
        n = cfg.max_seq_length
        row = Encoded([1] * n, [-100] * (n // 2) + [1] * (n // 2), [0] * (n // 2) + [1] * (n // 2), n // 2)
        with mock.patch("nli_ft.bases.device", lambda cfg=None: torch.device("cuda")):
            return estimate_memory(Prepared(cfg, None, [], [row] * 16, [], []))["total"]

    assert changes["compute_dtype"] == "fp16" and gib(**changes) < 9 < 15 < gib()


def test_the_badges_open_this_notebook_and_the_citation_agrees_with_the_settings():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\)\]\((https://(?:colab|kaggle)[^)]+)\)", readme)
    assert len(links) == 2 and all(link.endswith("nli-ft/nli_ft/blob/main/nbs/colab.ipynb") for link in links)
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    # what the schema of CFF 1.2.0 requires. An entity has a name, and a person would have given and family names
    assert said["cff-version"] == "1.2.0" and said["message"] and said["title"] == "nli_ft"
    assert said["authors"] == [dict(name=re.search(r"^author = (.+)$", settings, re.M)[1])]
    assert said["version"] == re.search(r"^version = (.+)$", settings, re.M)[1]
    assert said["license"] == "Apache-2.0" and Path(ROOT / "LICENSE").is_file()
