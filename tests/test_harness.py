"""lm-evaluation-harness asks our questions and gives our numbers, item by item.

pip install -c requirements.txt -r requirements-harness.txt
python -m pytest tests/test_harness.py"""

import json, os, subprocess, sys

import pytest
import torch
from tiny_models import box_rows, save_model

from nli_ft.ask import evaluation_rows
from nli_ft.config_loader import load_config
from nli_ft.files import write_jsonl
from nli_ft.interop import task_folder
from nli_ft.predict import predict_rows
from nli_ft.process import DataError, project_root
from nli_ft.rows import prompt_messages

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not here")
root = project_root()
RELATION = ("neutral", "entailment", "contradiction")
BOS_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Pairs of our own, and two public sets in their own columns."
    folder = tmp_path_factory.mktemp("files")
    pairs = [
        dict(id=i, premise=r["premise"], hypothesis=r["hypothesis"], label=RELATION[i % 3])
        for i, r in enumerate(box_rows(12))
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    snli = [
        dict(gold_label=p["label"], sentence1=p["premise"], sentence2=p["hypothesis"], pairID=str(p["id"]))
        for p in pairs
    ]
    snli[4]["gold_label"] = "-"
    write_jsonl(folder / "snli.jsonl", snli)
    hans = [
        dict(premise=p["premise"], hypothesis=p["hypothesis"], label=i % 2, heuristic="overlap", subcase="x")
        for i, p in enumerate(pairs)
    ]
    write_jsonl(folder / "hans.jsonl", hans)
    return {p.stem: str(p) for p in folder.iterdir()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A model whose template writes no BOS. Another with BOS, whose template refuses a system turn."
    folder = tmp_path_factory.mktemp("models")
    plain, other = (save_model("qwen2", folder / name) for name in ("plain", "bos"))
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(other)
    tok.bos_token, tok.chat_template = "<|endoftext|>", BOS_CHAT
    tok.save_pretrained(other)
    return dict(plain=str(plain), bos=str(other))


def by_harness(task, model, metadata):
    "(accuracy, id -> (right?, label with the greatest sum)) of a task."
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    args = dict(pretrained=model, dtype="float32", add_bos_token=False)
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False, metadata=args | metadata)
    found = simple_evaluate(
        "hf",
        model_args=args,
        tasks=[task],
        task_manager=manager,
        apply_chat_template=True,
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )
    items = {}
    for s in found["samples"][task]:
        logs = [log for log, _ in s["filtered_resps"]]
        items[s["doc"]["id"]] = s["acc"], logs
    return found["results"][task]["acc,none"], items


def by_us(model, label_set, path, template, **layout):
    "Prediction rows of mode forced."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(model)
    wanted = dict(label_set=label_set, prompt_template=template, completion="label_only", device="cpu")
    cfg = load_config("default", wanted | dict(compute_dtype="fp32", quantization="none"), check=False)
    contract = "binary" if layout.get("dataset") == "hans" else "entailment"
    rows = evaluation_rows(path, cfg, template, contract, layout or None)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()
    return predict_rows(lm, tok, rows, cfg, progress=False, mode="forced")


def assert_same(made, preds):
    acc, items = made
    assert list(items) == [str(p["id"]) for p in preds]
    rights = [float(p["predicted_label"] == p["label"]) for p in preds]
    assert [right for right, _ in items.values()] == rights
    assert acc == pytest.approx(sum(rights) / len(rights))
    for (_, logs), p in zip(items.values(), preds):
        probabilities = torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()
        ours = p.get("probabilities")
        ours = [1 - p["p_entail"], p["p_entail"]] if ours is None else list(ours.values())
        assert probabilities == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("template", ["standard", "brief"])
@pytest.mark.parametrize("label_set", ["binary", "three_way"])
@pytest.mark.parametrize("model", ["plain", "bos"])
def test_items_and_accuracy_are_those_of_forced(files, models, model, label_set, template):
    task = "nli_ft_pairs" if label_set == "binary" else "nli_ft_pairs_three_way"
    made = by_harness(
        task, models[model], dict(template=template, pairs=files["pairs"], contract="entailment")
    )
    preds = by_us(models[model], label_set, files["pairs"], template)
    assert_same(made, preds)
    assert len({round(p["p_entail"], 4) for p in preds}) > 6, "equal answers would show little"


@pytest.mark.parametrize("task", ["nli_ft_snli_three_way", "nli_ft_hans_three_way", "nli_ft_hans"])
def test_public_sets_are_read_as_nli_evaluate_reads_them(files, models, task):
    dataset, label_set = task.split("_")[2], "three_way" if "three" in task else "binary"
    made = by_harness(task, models["plain"], {dataset: files[dataset]})
    preds = by_us(models["plain"], label_set, files[dataset], "standard", dataset=dataset)
    assert_same(made, preds)
    assert len(preds) == (11 if dataset == "snli" else 12)


def test_the_documented_command_prints_the_accuracy(files, models, tmp_path):
    metadata = json.dumps(dict(pairs=files["pairs"], contract="entailment"))
    where = "import nli_ft.interop as i; print(i.task_folder())"
    folder = subprocess.run(
        [sys.executable, "-c", where], capture_output=True, text=True, cwd=root
    ).stdout.strip()
    r = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
        + [f"pretrained={models['plain']},dtype=float32,add_bos_token=False", "--include_path", folder]
        + ["--tasks", "nli_ft_pairs", "--metadata", metadata, "--apply_chat_template", "--device", "cpu"]
        + ["--output_path", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert r.returncode == 0, r.stderr[-3000:]
    [path] = tmp_path.rglob("results_*.json")
    acc = json.loads(path.read_text())["results"]["nli_ft_pairs"]["acc,none"]
    preds = by_us(models["plain"], "binary", files["pairs"], "standard")
    assert acc == pytest.approx(sum(p["predicted_label"] == p["label"] for p in preds) / 12)


def test_a_model_without_a_chat_template_is_refused(files, tmp_path):
    metadata = dict(pairs=files["pairs"], contract="entailment")
    with pytest.raises(DataError, match="no chat template"):
        by_harness("nli_ft_pairs", str(save_model("mistral", tmp_path / "m")), metadata)


def test_a_row_with_a_wording_of_its_own_gets_that_of_the_task(tmp_path, models):
    row = box_rows(1, "brief")[0]
    write_jsonl(tmp_path / "rows.jsonl", [row])
    from nli_ft.interop import task_docs

    [doc] = task_docs("pairs", pretrained=models["plain"], pairs=str(tmp_path / "rows.jsonl"))["test"]
    [standard] = prompt_messages(row["premise"], row["hypothesis"], "standard")
    assert doc["text"] == standard["content"] and doc["system"] == ""
