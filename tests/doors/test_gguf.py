"""llama.cpp, for real: a trained model as a GGUF file answers rows as transformers does.

    python -m pytest -m doors tests/doors/test_gguf.py

The converter comes with the sources of llama-cpp-python, and a built llama.cpp with xllamacpp, both from PyPI, in an
environment of their own. `NLI_DOORS` (or /var/tmp/nli_ft_doors) holds them afterwards. `NLI_DOORS_RUN` names a run to
convert. Without it `cpu_demo` is trained first. It takes about half an hour, a few minutes of it with a run."""

import json, os, sys, tarfile
from pathlib import Path

import pytest

from nli_ft.answers import parse_completion
from nli_ft.ask import open_run
from nli_ft.config_loader import answer_style
from nli_ft.labels import LABEL_SETS
from nli_ft.prompt import encode_prompt

from trained import DOORS, ROOT, say, trained_run

ROWS = 60
ASK = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx = 4, 4 * 1024
params.warmup = False
server = xllamacpp.Server(params)

def ask(row):
    words = dict(prompt=row["ids"], n_predict=row["n"], temperature=0.0, top_k=1, cache_prompt=False)
    answer = server.handle_completions(words)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    return dict(text=answer["choices"][0]["text"], tokens=answer["usage"]["completion_tokens"])

with ThreadPoolExecutor(4) as pool:
    answers = list(pool.map(ask, json.load(open(sys.argv[2]))))
json.dump(answers, open(sys.argv[3], "w"))
"""

pytestmark = pytest.mark.doors


@pytest.fixture(scope="module")
def llama():
    "Python of an environment with llama.cpp, and the folder with its converter."
    home = DOORS / "gguf"
    home.mkdir(parents=True, exist_ok=True)
    python = home / "venv/bin/python"
    if not (home / "done").exists():
        say(sys.executable, "-m", "venv", "--clear", home / "venv")
        say(python, "-m", "pip", "install", "-q", "xllamacpp", "scikit-build-core", "flit_core")
        what = "--no-deps --no-binary :all: --no-build-isolation llama-cpp-python".split()
        say(python, "-m", "pip", "download", "-q", *what, "-d", home)
        [archive] = home.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(home, filter="data")
        (home / "done").touch()
    [converter] = home.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py")
    return python, converter.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def asked(run, tmp_path_factory):
    "The folder in which transformers has answered, its predictions, and the prompts for llama.cpp."
    from nli_ft.bases import load_tokenizer
    from nli_ft.cpu_speed import fast_weights
    from nli_ft.model import load_for_inference
    from nli_ft.predict import predict_rows

    there = tmp_path_factory.mktemp("asked")
    _, cfg, adapter, _ = open_run(run, compute_dtype="fp32", device="cpu")
    lines = (ROOT / "data/embedded/dev.jsonl").read_text(encoding="utf-8").splitlines()
    rows, tok = [json.loads(line) for line in lines[:ROWS]], load_tokenizer(cfg)
    prompts = [dict(ids=list(encode_prompt(tok, row["prompt"])), n=cfg.max_new_tokens) for row in rows]
    (there / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    model = load_for_inference(cfg, adapter)
    with fast_weights(model, cfg):
        return there, cfg, predict_rows(model, tok, rows, cfg, progress=False)


@pytest.mark.parametrize("dtype, texts", [("fp32", 0.95), ("bf16", 0.5)])
def test_a_gguf_file_answers_as_transformers_does(llama, run, asked, dtype, texts):
    python, converter = llama
    there, cfg, ours = asked
    out, answers = there / dtype, there / f"{dtype}.json"
    env = os.environ | dict(LLAMA_CPP=str(converter))
    merge = Path(sys.executable).with_name("nli_merge")
    say(merge, "--run", run, "--out", out, "--dtype", dtype, "--gguf", env=env)
    say(python, "-c", ASK, out / "model.gguf", there / "prompts.json", answers)
    theirs = json.loads(answers.read_text(encoding="utf-8"))
    style, labels = answer_style(cfg.completion), LABEL_SETS[cfg.label_set]
    same = [
        parse_completion(t["text"], style, labels).label == o["predicted_label"] for t, o in zip(theirs, ours)
    ]
    alike = [t["text"].strip() == o["completion"].strip() for t, o in zip(theirs, ours)]
    # llama.cpp counts the end of the turn as a token
    counts = [t["tokens"] == o["n_tokens"] + 1 for t, o in zip(theirs, ours)]
    print(
        f"{dtype}: of {len(ours)} rows {sum(same)} labels, {sum(alike)} texts, {sum(counts)} token counts are equal"
    )
    assert len(ours) == ROWS and {o["predicted_label"] for o in ours} >= {0, 1}
    assert sum(same) >= 0.95 * ROWS and sum(alike) >= texts * ROWS and sum(counts) >= texts * ROWS
