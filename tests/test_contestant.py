"""A model that is no run: it is asked as a run's model is, and leaves a record that says what it is. Adapters go onto
their own base only. Examples in a prompt come from rows that nobody asks."""

import json, os

import pytest
import torch
from tiny_models import FAMILIES, box_rows, save_model

import nli_ft.contestant
import nli_ft.model
from nli_ft.ask import evaluate_cli
from nli_ft.bases import load_tokenizer
from nli_ft.commands import runs_cli
from nli_ft.contestant import adapter_folder, contestant, evaluate_model, shot_turns, usable_shots
from nli_ft.duplicates import norm_text
from nli_ft.files import write_jsonl
from nli_ft.generate import shared_start
from nli_ft.labels import THREE_WAY
from nli_ft.predictions import prompt_hash, read_predictions
from nli_ft.process import ConfigError, DataError, NliError, RecordError
from nli_ft.prompt import encode_prompt, mistral_reference, mistral_v3_tokenizer
from nli_ft.records import list_evaluations, list_runs, read_evaluation
from nli_ft.rows import prompt_messages

KEYS = """kind name model model_revision adapter shots shots_from seed mode data label_set contracts completion
prompt_template created packages device base""".split()
ROWS = box_rows(40)
HOW = "--completion label_only --prompt_template brief --quantization none --compute_dtype fp32 --device cpu"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: save_model(family, folder / family) for family in FAMILIES}


@pytest.fixture
def desk(tmp_path, models, monkeypatch):
    "Rows to ask, and training rows of which the first four are asked as well."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = nli_ft\n")  # a project of its own
    write_jsonl("dev.jsonl", ROWS[:8])
    write_jsonl("train.jsonl", ROWS[4:])
    return tmp_path


def test_an_adapter_is_found_by_its_path_from_the_projects_root_wherever_one_stands(desk, monkeypatch):
    "So a notebook prints it."
    folder = desk / "models" / "theirs"
    (desk / "nbs").mkdir()
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()
    monkeypatch.chdir("nbs")
    assert adapter_folder("models/theirs").samefile(folder) and adapter_folder("../models/theirs").samefile(
        folder
    )
    with pytest.raises(ConfigError, match="no such folder"):
        adapter_folder("models/others")


def ask(model, *more):
    "Run the command on CPU and return the folder of the newest record."
    words = ["--model", str(model), "--data", "dev.jsonl", "--mode", "forced", "--runs_dir", "runs"]
    assert evaluate_cli([*words, *HOW.split(), *map(str, more)]) == 0
    # two records of one second have no order in the list
    return max(
        (r["path"] for r in list_evaluations("runs")), key=lambda p: os.stat(f"{p}/report.json").st_mtime_ns
    )


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        evaluate_cli([*map(str, argv)])
    assert e.value.code == 2
    return capsys.readouterr().err


def asked_of(model, **more):
    how = dict(completion="label_only", prompt_template="brief", quantization="none", compute_dtype="fp32")
    return contestant(str(model), runs_dir="runs", **how | more)


def make_adapter(model, out, base=None, weight=0.5):
    "An adapter of peft, as another project would save it."
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, trust_remote_code=False)
    torch.manual_seed(1)
    tuned = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=weight)
    tuned.save_pretrained(out)
    change_config(out, base_model_name_or_path=str(base or model))
    return out


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- the record


def test_a_plain_model_leaves_a_record_that_is_no_run(desk, models, capsys):
    folder = ask(models["qwen2"])
    facts = read_evaluation(folder)
    assert [k for k in KEYS if k not in facts] == [] and not {"training", "config", "adapter_path"} & {*facts}
    assert (facts["kind"], facts["adapter"], facts["shots"], facts["shots_from"]) == (
        "evaluation",
        None,
        0,
        None,
    )
    assert facts["data"]["rows"] == 8 and facts["device"]["type"] == "cpu"
    assert set(facts["base"]["files"]) >= {"config.json", "model.safetensors"}
    assert str(desk) not in json.dumps(facts)
    assert list_runs("runs") == []
    capsys.readouterr()
    assert runs_cli(["--runs_dir", "runs"]) == 0
    shown = capsys.readouterr().out
    assert "models that are no runs:" in shown and "qwen2-0shot" in shown
    assert runs_cli(["--runs_dir", "runs", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["kind"], row["status"], row["n"]) == ("evaluation", "done", 8)
    assert runs_cli([folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checked"].startswith("SHA-256 as recorded, 8 rows read again")


def test_the_answers_are_those_of_the_same_model_in_transformers(desk, models):
    preds = read_predictions(f"{ask(models['qwen2'])}/predictions.jsonl")
    who = asked_of(models["qwen2"])
    tok, model = load_tokenizer(who.cfg), nli_ft.model.load_base(who.cfg.replace(device="cpu"), train=False)
    for p in preds[:3]:
        prompt = encode_prompt(tok, prompt_messages(p["premise"], p["hypothesis"], "brief"))
        ids = prompt + tok('{"predicted_label": ', add_special_tokens=False)["input_ids"]
        zero, one = (tok.encode(f'"predicted_label": {d}', add_special_tokens=False)[-1] for d in "01")
        with torch.no_grad():
            last = model(torch.tensor([ids])).logits[0, -1]
        assert p["p_entail"] == pytest.approx(float((last[one] - last[zero]).sigmoid()), abs=1e-4)


def test_an_edited_answer_is_noticed(desk, models, capsys):
    folder = ask(models["qwen2"])
    path = desk / folder / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path.with_name("new"), [rows[0] | dict(p_entail=0.999, predicted_label=1), *rows[1:]])
    path.with_name("new").replace(path)
    with pytest.raises(RecordError, match="changed after it was written"):
        read_predictions(path)
    with pytest.raises(SystemExit):
        ask(models["qwen2"])
    assert "changed after it was written" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on_and_a_finished_one_loads_nothing(desk, models, monkeypatch):
    folder = ask(models["qwen2"])
    path = desk / folder / "predictions.jsonl"
    whole = path.read_bytes()
    kept = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:3]) + kept[3][:40])
    (desk / folder / "report.json").unlink()
    assert list_evaluations("runs")[0]["status"] == "unfinished"
    answered, real = [], nli_ft.contestant.predict_rows
    monkeypatch.setattr(
        nli_ft.contestant, "predict_rows", lambda *a: answered.append(real(*a)) or answered[0]
    )
    assert ask(models["qwen2"], "--eval_batch_size", 4) == folder and len(answered) == 1
    now = read_predictions(path)
    assert [json.loads(line) for line in kept[:3]] == now[:3] and len(now) == 8
    monkeypatch.setattr(nli_ft.model, "load_for_inference", None)
    assert ask(models["qwen2"]) == folder
    assert len(list_evaluations("runs")) == 1


def test_two_processes_do_not_answer_into_one_record(desk, models):
    from filelock import FileLock

    folder = ask(models["qwen2"])
    with FileLock(f"{folder}/.lock"), pytest.raises(RecordError, match="another process is answering"):
        evaluate_model(asked_of(models["qwen2"]), "dev.jsonl", "forced", device="cpu")


# -- adapters


def test_an_adapter_of_another_project_answers_on_its_base(desk, models):
    adapter = make_adapter(models["qwen2"], desk / "theirs")
    plain = read_predictions(f"{ask(models['qwen2'])}/predictions.jsonl")
    folder = ask(models["qwen2"], "--adapter", adapter)
    facts, tuned = read_evaluation(folder), read_predictions(f"{folder}/predictions.jsonl")
    assert len(facts["adapter_sha256"]) == 64 and facts["name"] == "qwen2-with-theirs-0shot"
    assert [p["p_entail"] for p in tuned] != [p["p_entail"] for p in plain]


def test_an_adapter_of_another_base_is_refused_by_both_names(desk, models, capsys):
    adapter = make_adapter(models["qwen2"], desk / "theirs", base="OWNER/Other-7B")
    words = ["--model", models["qwen2"], "--data", "dev.jsonl", "--adapter", adapter, *HOW.split()]
    err = refused(capsys, *words)
    assert "'OWNER/Other-7B'" in err and "qwen2" in err and "--model_alias OWNER/Other-7B" in err
    err = refused(capsys, *words, "--model_alias", "OWNER/Another")
    assert "'OWNER/Other-7B'" in err
    assert ask(models["qwen2"], "--adapter", adapter, "--model_alias", "OWNER/Other-7B")


def test_an_adapter_with_other_matrices_than_its_base_is_refused_before_any_weights(
    desk, models, capsys, monkeypatch
):
    monkeypatch.setattr(nli_ft.model, "load_base", None)
    adapter = make_adapter(models["qwen2"], desk / "theirs", base="Base")
    named = ["--data", "dev.jsonl", "--adapter", adapter, "--model_alias", "Base", *HOW.split()]
    err = refused(capsys, "--model", models["mistral"], *named)
    assert "does not load on" in err and "v_proj" in err
    change_config(
        adapter, target_modules=["q_proj", "k_proj", "v_proj"]
    )  # the file lacks the matrices of k_proj
    assert "k_proj" in refused(capsys, "--model", models["qwen2"], *named)
    change_config(adapter, target_modules=["no_such_layer"])
    assert "no_such_layer" in refused(capsys, "--model", models["qwen2"], *named)


def test_only_plain_lora_in_safetensors_is_an_adapter(desk, models, capsys):
    adapter = make_adapter(models["qwen2"], desk / "theirs", base="Base")
    words = ["--model", models["qwen2"], "--data", "dev.jsonl", "--adapter", adapter, *HOW.split()]
    words += ["--model_alias", "Base"]
    change_config(adapter, modules_to_save=["lm_head"])
    assert "replaces whole layers (lm_head)" in refused(capsys, *words)
    change_config(adapter, modules_to_save=None, peft_type="IA3")
    assert "its type is IA3" in refused(capsys, *words)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "a pickle (adapter_model.bin), which is never loaded" in refused(capsys, *words)


# -- examples


def test_no_example_shares_its_premise_with_an_evaluated_row(desk, models):
    folder = ask(models["mistral"], "--shots", 2, "--shots_from", "train.jsonl", "--max_eval_samples", 4)
    drawn = read_evaluation(folder)["shots_from"]
    asked = {norm_text(r["premise"]) for r in ROWS[:8]}
    shown = [r for r in ROWS if r["id"] in drawn["ids"]]
    assert len(shown) == 2 and not asked & {norm_text(r["premise"]) for r in shown}
    write_jsonl("spelled.jsonl", [r | dict(premise=r["premise"].upper() + " ") for r in ROWS[:8]])
    with pytest.raises(DataError, match="8: premise is among the evaluated rows"):
        evaluate_model(
            asked_of(models["mistral"], shots=2, shots_from="spelled.jsonl"), "dev.jsonl", device="cpu"
        )


def test_a_seed_draws_the_same_examples_in_the_same_order(desk, models):
    def ids(seed, k=4):
        who = asked_of(models["mistral"], shots=k, shots_from="train.jsonl", seed=seed)
        shots, facts, _ = nli_ft.contestant._shots_of(who, ROWS[:8], None)
        assert sorted(s["label"] for s in shots) == [0] * (k // 2) + [1] * (k // 2)
        return facts["ids"]

    assert ids(1) == ids(1) and len({tuple(ids(seed)) for seed in range(5)}) == 5


def test_the_examples_are_part_of_the_question(desk, models):
    folder = ask(models["mistral"], "--shots", 2, "--shots_from", "train.jsonl")
    drawn, by_id = read_evaluation(folder)["shots_from"]["ids"], {r["id"]: r for r in ROWS}
    preds = read_predictions(f"{folder}/predictions.jsonl")
    system, user = prompt_messages(preds[0]["premise"], preds[0]["hypothesis"], "brief")
    turns = shot_turns([by_id[i] for i in drawn], "brief", "label_only")
    assert [t["role"] for t in turns] == ["user", "assistant"] * 2
    assert turns[1]["content"] == json.dumps(dict(predicted_label=by_id[drawn[0]]["label"]))
    assert preds[0]["prompt_hash"] == prompt_hash([system, *turns, user])
    assert preds[0]["prompt_hash"] != prompt_hash([system, user])


@pytest.mark.parametrize("template", ["standard", "brief"])
def test_examples_in_mistrals_form_are_those_of_mistral_common(template):
    tok, rows = mistral_v3_tokenizer(), [r for r in box_rows(12, template)]
    for style in ("cot", "label_only", "label_first"):
        turns = shot_turns(rows[:4], template, style)
        prompts = [nli_ft.contestant.after_shots(r["prompt"], turns) for r in rows[4:]]
        assert all(encode_prompt(tok, p) == mistral_reference(p) for p in prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_examples_are_computed_once_for_all_rows(family, desk, models):
    who = asked_of(models[family])
    tok, model = load_tokenizer(who.cfg), nli_ft.model.load_base(who.cfg.replace(device="cpu"), train=False)
    turns = shot_turns(ROWS[8:12], "brief", "label_only")
    prompts = [encode_prompt(tok, nli_ft.contestant.after_shots(r["prompt"], turns)) for r in ROWS[:4]]
    alone = [encode_prompt(tok, r["prompt"]) for r in ROWS[:4]]
    gained = shared_start(model, prompts).length - len(alone[0])
    assert gained > 0.6 * (len(prompts[0]) - len(alone[0]))


def test_examples_that_cannot_be_shown_are_refused_with_the_remedy(desk, models, capsys):
    write_jsonl("bare.jsonl", [{k: r[k] for k in ("id", "premise", "hypothesis", "label")} for r in ROWS[8:]])
    words = [
        "--model",
        models["mistral"],
        "--data",
        "dev.jsonl",
        "--device",
        "cpu",
        "--shots",
        4,
        "--shots_from",
    ]
    assert "--completion label_only" in refused(capsys, *words, "bare.jsonl")
    one = [r for r in ROWS[8:] if r["label"] == 1]
    write_jsonl("one.jsonl", one)
    assert "4 examples need 2 with label 0, and 0 can be used" in refused(capsys, *words, "one.jsonl")
    marked = [r | dict(contract="course") for r in ROWS[8:]]
    write_jsonl("course.jsonl", marked)
    write_jsonl("two_way.jsonl", [r | dict(contract="binary") for r in ROWS[:8]])
    words[3] = "two_way.jsonl"
    assert "contract course" in refused(capsys, *words, "course.jsonl")


def test_a_thought_that_led_to_a_wrong_label_is_no_example():
    rows = [r | dict(correct=r["id"] % 3 > 0) for r in ROWS[8:]]
    usable, left_out = usable_shots(rows, ROWS[:8], "cot")
    assert all(r["correct"] for r in usable) and left_out["the thought led to a wrong label"] > 5
    assert len(usable_shots(rows, ROWS[:8], "label_only")[0]) > len(usable)


def test_three_labels_are_shown_as_words_and_rows_without_a_relation_are_refused(desk, models):
    words = ("contradiction", "entailment", "neutral", "entailment")
    rows = [{k: r[k] for k in ("id", "premise", "hypothesis")} | dict(label=words[r["id"] % 4]) for r in ROWS]
    write_jsonl("words.jsonl", rows[8:])
    who = asked_of(models["mistral"], shots=3, shots_from="words.jsonl", label_set="three_way")
    shots, _, _ = nli_ft.contestant._shots_of(who, rows[:8], None)
    assert {s["label"] for s in shots} == {*words}
    turns = shot_turns(shots, "brief", "label_only", THREE_WAY)
    assert [t["content"] for t in turns[1::2]] == [f'{{"predicted_label": "{s["label"]}"}}' for s in shots]
    bare = asked_of(models["mistral"], shots=3, shots_from="train.jsonl", label_set="three_way")
    with pytest.raises(DataError, match="train.jsonl: row 8 has label 0 and no relation"):
        nli_ft.contestant._shots_of(bare, ROWS[:8], None)


# -- the command


def test_what_belongs_to_a_run_and_to_a_model_is_not_mixed(desk, models, capsys):
    def err(*words):
        return refused(capsys, *words)

    assert "--run RUN for a run, --adapter ID|FOLDER for one that was shared, or --model" in err()
    assert "--shots is for a model that is no run" in err("--run", "runs/x", "--shots", 3)
    assert "--model is for a model that is no run" in err("--run", "runs/x", "--model", "smollm2-135m")
    assert "--model needs --data" in err("--model", "smollm2-135m")
    for option in (["--untuned"], ["--probe", 5], ["--engine", "vllm"]):
        assert f"{option[0]} needs the record" in err(
            "--model", "smollm2-135m", "--data", "dev.jsonl", *option
        )
    base = ["--model", models["qwen2"], "--data", "dev.jsonl"]
    assert "--device cpu forces" in err(*base) or torch.cuda.is_available()
    assert "no such folder" in err("--model", "./nowhere", "--data", "dev.jsonl", "--device", "cpu")
    assert "hf download OWNER/NAME" in err("--model", "OWNER/NAME", "--data", "dev.jsonl", "--device", "cpu")
    assert not (desk / "runs").exists()


def test_the_help_has_examples(capsys):
    with pytest.raises(SystemExit) as e:
        evaluate_cli(["--help"])
    shown = capsys.readouterr().out
    assert e.value.code == 0 and "SUPPRESS" not in shown
    assert "nli_evaluate --model smollm2-135m --shots 4 --shots_from train.jsonl" in shown


def test_a_name_and_a_damaged_record_stop_no_list(desk, models):
    with pytest.raises(ConfigError, match="cannot be a folder name"):
        contestant("smollm2-135m", name="a/b")
    folder = ask(models["qwen2"], "--name", "theirs")
    (desk / folder / "evaluation.json").write_text("{")
    (row,) = list_evaluations("runs")
    assert row["status"] == "unreadable" and "cannot be read" in row["why"]
    with pytest.raises(NliError):
        read_evaluation(folder)
    assert ask(models["qwen2"], "--name", "theirs") and len(list_evaluations("runs")) == 2
