"""What is shared: the folder that would be pushed, the card that is checked, and the code in it, which a colleague runs
without this package."""

import contextlib, json, os, re, shutil, subprocess, sys
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import FakeHub
from huggingface_hub import DatasetCard, ModelCard
from tiny_models import box_rows

import nli_ft.share
from nli_ft.process import ConfigError, DataError, RecordError
from nli_ft.ask import evaluate_cli, predict_cli
from nli_ft.bases import base_config, embedded_model, load_tokenizer
from nli_ft.commands import data_cli, runs_cli
from nli_ft.config_loader import load_config
from nli_ft.contestant import adapter_options, check_contestant, contestant
from nli_ft.files import write_jsonl
from nli_ft.generate import generate_completions
from nli_ft.model import check_adapter, load_for_inference, save_adapter
from nli_ft.predictions import read_predictions
from nli_ft.prompt import encode_prompt
from nli_ft.rows import prompt_messages
from nli_ft.share import check_card, push_cli, push_run, upload
from nli_ft.train_sft import merge_run, run_training


def put_on_hub(hub, name, folder):
    "A folder as the hub's local cache holds it, after somebody asked for a config.json that is not there."
    place, commit = hub / f"models--{name.replace('/', '--')}", "0123456789" * 4
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    (place / "snapshots" / commit).symlink_to(folder)
    if not (folder / "config.json").is_file():
        (place / ".no_exist" / commit).mkdir(parents=True)
        (place / ".no_exist" / commit / "config.json").touch()


def python(code, *args, cwd, hub):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= dict(HF_HUB_CACHE=str(hub), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONUTF8="1")
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def standing_in(desk):
    "In a project whose hub lies on this disk, as `hf download` leaves one."
    with pytest.MonkeyPatch.context() as m, contextlib.chdir(desk):
        m.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(desk / "hub"))
        yield desk


def own_answer(cfg, adapter):
    "What this package answers to the question of a card."
    tok = load_tokenizer(cfg)
    prompt = encode_prompt(tok, prompt_messages("A dog runs.", "An animal runs.", "brief"))
    (answer,) = generate_completions(load_for_inference(cfg, adapter), tok, [prompt], cfg.max_new_tokens, 1)
    return answer["text"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A project with one finished run of a Mistral without a chat template, merged, and with the folder of a dry run."
    desk = tmp_path_factory.mktemp("share")
    (desk / "settings.ini").write_text("[DEFAULT]\nlib_name = nli_ft\n")
    put_on_hub(desk / "hub", "OWNER/tiny", embedded_model("tiny-mistral"))
    write_jsonl(desk / "train.jsonl", box_rows(16))
    write_jsonl(
        desk / "dev.jsonl", [r | dict(contract="entailment", dataset="snli") for r in box_rows(22)[16:]]
    )
    small = dict(model_id="OWNER/tiny", device="cpu", compute_dtype="fp32", quantization="nf4", max_steps=2)
    small |= dict(
        max_new_tokens=8, eval_before=False, learning_rate=0.02, runs_dir="runs", output_dir="models"
    )
    with standing_in(desk):
        cfg = load_config("minimal_test", small | dict(train_data="train.jsonl", eval_data="dev.jsonl"))
        run = run_training(cfg)
        merge_run(run, "merged", dtype="fp32")
        push_run(run, "OWNER/NAME", dry_run=True, license="mit", datasets=["OWNER/boxes"])
        (adapter,) = Path("models").glob("*/*/adapter")
        Path("answer.json").write_text(json.dumps(own_answer(cfg, adapter)))
    put_on_hub(desk / "hub", "OWNER/NAME", desk / "pushed/OWNER/NAME")
    return desk


@pytest.fixture
def desk(made):
    with standing_in(made):
        yield made


@pytest.fixture
def run(desk):
    (run,) = desk.glob("runs/*/*")
    return run


@pytest.mark.parametrize(
    "front",
    [
        "a: b: c",
        "- a list",
        "1: a key that is a number",
        "date: 2026-99-99",
        "model-index: {name: m}",
        "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: [], source: x}]}]",
    ],
)
def test_a_card_that_the_hub_could_not_read_is_refused(front):
    with pytest.raises(ConfigError, match="cannot be read as the hub reads it"):
        check_card(f"---\n{front}\n---\n# m\n")


def test_a_fault_of_the_program_in_the_check_of_a_card_is_not_called_a_bad_card(monkeypatch):
    def broken(text):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(huggingface_hub, "ModelCard", broken)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        check_card("---\nlicense: mit\n---\n")


def blocks(card):
    return re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)


def refused(capsys, command, *words):
    with pytest.raises(SystemExit) as e:
        command([str(w) for w in words])
    return e.value.code, capsys.readouterr().err


# -- what travels


def test_the_code_of_a_card_loads_and_asks_adapter_and_merged_model_without_this_package(desk):
    alone = 'import sys; sys.modules["nli_ft"] = None\n'
    expected = json.loads((desk / "answer.json").read_text())
    card = (desk / "pushed/OWNER/NAME/README.md").read_text()
    load, merged, ask = blocks(card)
    assert 'name = "OWNER/NAME"' in load and "AutoPeftModelForCausalLM" in load
    assert "`hf download OWNER/NAME` beforehand, and its folder as `name`" in card
    offline = load.replace('"OWNER/NAME"', json.dumps(str(desk / "pushed/OWNER/NAME")))
    beside, same = blocks((desk / "merged/README.md").read_text())
    assert beside.partition("name = ")[0] == merged.partition("name = ")[0] and same == ask
    said = python("\n".join([alone, load, ask, offline, ask, merged, ask]), cwd=desk, hub=desk / "hub")
    assert expected and said.splitlines() == [*expected.splitlines()] * 3


def test_the_dry_run_holds_all_that_is_pushed_and_no_path_of_this_machine(desk, run):
    folder = desk / "pushed/OWNER/NAME"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "chat_template.jinja" in names and not {"sha256.json", "training_args.bin"} & names
    conf = json.loads((folder / "adapter_config.json").read_text())
    assert conf["base_model_name_or_path"] == "OWNER/tiny" and conf["revision"] == "0123456789" * 4
    for path in folder.iterdir():
        assert str(desk).encode() not in path.read_bytes(), path.name
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["OWNER/boxes"])
    assert (data.base_model, data.library_name) == ("OWNER/tiny", "peft")
    scores = json.loads((run / "summary.json").read_text())["after"]
    (accuracy,) = [r for r in data.eval_results if r.metric_type == "accuracy"]
    assert accuracy.metric_value == round(scores["accuracy"], 3)
    assert accuracy.metric_args["interval"] == [round(x, 3) for x in scores["accuracy_ci"]]


def test_a_card_stands_beside_the_weights_and_one_that_somebody_edited_stays(run, desk, capsys):
    (beside,) = desk.glob("models/*/*/adapter/README.md")
    text = beside.read_text()
    assert text == (run / "MODEL_CARD.md").read_text() and "## How to use it" in text
    beside.write_text(text + "My own words.\n")
    assert runs_cli([str(run), "--card"]) == 0 and "My own words." in beside.read_text()
    beside.unlink()
    assert runs_cli([str(run), "--card"]) == 0 and beside.read_text() == text


def test_what_was_pushed_is_judged_and_asked_by_its_name_alone_in_its_own_wording(desk, run, capsys):
    words = ["--adapter", "OWNER/NAME", "--data", "dev.jsonl", "--device", "cpu", "--compute_dtype", "fp32"]
    assert evaluate_cli([*words, "--runs_dir", "shared"]) == 0
    (folder,) = desk.glob("shared/evaluations/*/*")
    ours, theirs = (read_predictions(d / "predictions.jsonl") for d in (run, folder))
    keys = "id prompt_hash completion predicted_label".split()
    assert [[p[k] for k in keys] for p in theirs] == [[p[k] for k in keys] for p in ours]
    capsys.readouterr()
    pair = ["--premise", "The red box holds a blue ball.", "--hypothesis", "The blue ball is in the red box."]
    code = predict_cli(
        ["--adapter", "pushed/OWNER/NAME", *pair, "--mode", "forced", "--device", "cpu", "--json"]
    )
    assert code == 0 and json.loads(capsys.readouterr().out)["predicted_label"] in (0, 1)
    code, said = refused(capsys, predict_cli, *pair)
    assert code == 2 and "--adapter ID|FOLDER" in said
    assert "--adapter" in refused(capsys, predict_cli, "--run", run, "--adapter", "x", *pair)[1]


def test_an_adapter_of_the_embedded_model_loads_in_plain_peft_and_an_older_one_is_still_taken(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    cfg = load_config("minimal_test", "device=cpu")
    conf = base_config(cfg)
    conf.num_hidden_layers, conf.layer_types = 1, None  # the adapter of the first layer alone
    lora = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(conf), lora)
    save_adapter(model, load_tokenizer(cfg), cfg, tmp_path / "adapter", template="brief")
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    put_on_hub(tmp_path / "hub", said["base_model_name_or_path"], embedded_model("smollm2-135m"))
    code = "from peft import AutoPeftModelForCausalLM as A; print(A.from_pretrained('adapter', dtype='auto').peft_type)"
    assert "LORA" in python(code, cwd=tmp_path, hub=tmp_path / "hub")
    # as runs before wrote it: the alias, and no note of how it is asked
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps(said | dict(base_model_name_or_path="smollm2-135m"))
    )
    note = json.loads((tmp_path / "adapter/nli_ft.json").read_text())
    assert note.pop("asked")["prompt_template"] == "brief"
    (tmp_path / "adapter/nli_ft.json").write_text(json.dumps(note))
    assert check_adapter(cfg, tmp_path / "adapter")["base_model_name_or_path"] == "smollm2-135m"
    assert adapter_options(str(tmp_path / "adapter"))[0]["model"] == "smollm2-135m"
    (tmp_path / "adapter/nli_ft.json").unlink()  # and one that somebody else made with peft
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(said))
    assert check_adapter(cfg, tmp_path / "adapter")
    theirs = dict(adapter=str(tmp_path / "adapter"), model_alias=said["base_model_name_or_path"])
    assert check_contestant(contestant("smollm2-135m", adapter=theirs["adapter"])) == tmp_path / "adapter"
    with pytest.raises(RecordError, match="does not load on tiny-mistral"):
        check_contestant(contestant("tiny-mistral", **theirs))


# -- what is refused


def test_nothing_is_pushed_without_licence_base_or_whole_weights(desk, run, tmp_path, capsys):
    def push(*words):
        return refused(capsys, push_cli, "--run", run, "--dry_run", "--out", tmp_path / "out", *words)

    code, said = push("--repo", "OWNER/NAME")
    assert code == 2 and "the licence of OWNER/tiny is not known here" in said
    assert "--license CC BY" in push("--repo", "OWNER/NAME", "--license", "CC BY")[1]
    assert "say whose it is" in push("--repo", "NAME", "--license", "mit")[1]
    assert not (tmp_path / "out").exists()
    (weights,) = desk.glob("models/*/*/adapter/adapter_model.safetensors")
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + b"?")
        assert "is not what training saved" in push("--repo", "OWNER/NAME", "--license", "mit")[1]
    finally:
        weights.write_bytes(kept)
    assert not (tmp_path / "out").exists()


def test_an_older_adapter_gets_template_base_and_wording_in_the_copy_alone(desk, run, tmp_path):
    (adapter,) = desk.glob("models/*/*/adapter")
    shutil.copytree(adapter, tmp_path / "kept")
    try:
        for name in ("chat_template.jinja", "sha256.json", "README.md"):
            (adapter / name).unlink()
        conf = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(conf | dict(base_model_name_or_path="alias")))
        note = json.loads((adapter / "nli_ft.json").read_text())
        asked = note.pop("asked")
        (adapter / "nli_ft.json").write_text(json.dumps(note))
        push_run(run, "OWNER/NAME", dry_run=True, license="mit", out=tmp_path / "out")
        assert not (adapter / "chat_template.jinja").exists()
        assert (tmp_path / "out/chat_template.jinja").read_text() == (
            tmp_path / "kept/chat_template.jinja"
        ).read_text()
        pushed = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert pushed["base_model_name_or_path"] == "OWNER/tiny"
        assert json.loads((tmp_path / "out/nli_ft.json").read_text())["asked"] == asked
    finally:
        shutil.rmtree(adapter)
        shutil.copytree(tmp_path / "kept", adapter)


# -- the upload, with a stand-in for the hub


class Hub:
    "What `HfApi` is asked for. `exists` and `broken` are the two ways in which it fails."

    exists = broken = False
    calls = []

    def create_repo(self, repo, **how):
        if self.exists and not how["exist_ok"]:
            error = huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
            error.response = type("Response", (), dict(status_code=409))()
            raise error
        self.calls.append((repo, how))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **how):
        if self.broken:
            raise ConnectionError("the line went dead")
        folder = Path(how.pop("folder_path"))
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        self.calls.append((how, names))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(ModelCard, "validate", lambda self: Hub.calls.append("validated"))
    monkeypatch.setattr(DatasetCard, "validate", lambda self: Hub.calls.append("validated"))
    return Hub


def test_a_push_sends_the_folder_of_the_dry_run_once_after_the_card_was_checked(desk, run, hub, capsys):
    words = ["--run", str(run), "--repo", "OWNER/NAME", "--license", "mit", "--private"]
    assert push_cli(words) == 0 and "https://huggingface.co/OWNER/NAME" in capsys.readouterr().out
    checked, made, (how, names) = hub.calls
    assert checked == "validated"
    assert made == ("OWNER/NAME", dict(repo_type="model", private=True, exist_ok=False))
    assert how["repo_id"] == "OWNER/NAME" and how["repo_type"] == "model"
    assert names == sorted(p.name for p in (desk / "pushed/OWNER/NAME").iterdir())


def test_a_repository_that_exists_is_left_alone_until_update_is_said(desk, run, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "exists", True)
    words = ["--run", str(run), "--repo", "OWNER/NAME", "--license", "mit"]
    code, said = refused(capsys, push_cli, *words)
    assert code == 2 and "--update" in said and hub.calls == ["validated"]
    assert push_cli([*words, "--update"]) == 0 and len(hub.calls) == 4


def test_an_upload_that_breaks_off_says_what_is_on_the_hub(desk, run, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "broken", True)
    code, said = refused(capsys, push_cli, "--run", run, "--repo", "OWNER/NAME", "--license", "mit")
    assert code == 1 and "OWNER/NAME was made" in said and "--update" in said


def test_without_a_network_nothing_is_sent_and_the_way_out_is_named(desk, monkeypatch):
    def offline(self):
        raise ConnectionError("no route")

    monkeypatch.setattr(ModelCard, "validate", offline)
    with pytest.raises(ConfigError, match="Nothing was sent. --dry_run needs neither"):
        upload(desk / "pushed/OWNER/NAME", "OWNER/NAME")


def test_a_push_over_http_arrives_whole_and_comes_back_as_the_folder_of_the_dry_run(desk, run, tmp_path):
    with FakeHub() as there:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= dict(
            HF_ENDPOINT=there.url, HF_TOKEN="hf_test", HF_HUB_CACHE=str(tmp_path), NO_PROXY="127.0.0.1"
        )

        def ask(*words):
            done = subprocess.run(
                [sys.executable, *words], env=env, capture_output=True, text=True, timeout=900
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        words = ["--repo", "OWNER/NAME", "--license", "mit", "--datasets", "OWNER/boxes", "--private"]
        assert f"{there.url}/OWNER/NAME: " in ask("-m", "nli_ft.share", "--run", str(run), *words)
        assert there.repos["model", "OWNER/NAME"]["visibility"] == "private"
        assert there.seen[0] == "POST /api/validate-yaml"  # before anything is made there
        code = "from huggingface_hub import snapshot_download; print(snapshot_download('OWNER/NAME'))"
        back = Path(ask("-c", code).strip())
    sent = desk / "pushed/OWNER/NAME"
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in sent.iterdir())
    for path in sent.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name


# -- data sets


def test_a_data_set_is_pushed_with_contract_sources_licences_and_sizes(desk, hub, tmp_path, capsys):
    rows = [r | dict(contract="entailment", dataset="snli") for r in box_rows(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    words = ["push", str(tmp_path / "train.jsonl"), "dev.jsonl", "--repo", "OWNER/boxes", "--license", "mit"]
    assert data_cli([*words, "--dry_run", "--out", str(tmp_path / "out")]) == 0
    assert "WARNING: rows of snli are under cc-by-sa-4.0" in capsys.readouterr().err
    card = DatasetCard.load(tmp_path / "out/README.md")
    assert card.data.configs[0]["data_files"] == [
        dict(split="train", path="data/train.jsonl"),
        dict(split="validation", path="data/dev.jsonl"),
    ]
    assert (card.data.license, card.data.size_categories) == ("mit", ["n<1K"])
    for said in ("entailment is 1", "cc-by-sa-4.0", "stanfordnlp/snli", "12 rows", "test (6)"):
        assert said in card.text, said
    assert hub.calls == []
    assert data_cli(words) == 0
    assert hub.calls[1] == ("OWNER/boxes", dict(repo_type="dataset", private=False, exist_ok=False))
    assert hub.calls[2][1] == ["README.md", "data/dev.jsonl", "data/train.jsonl"]


@pytest.mark.parametrize("notes", ["in no file", "in one file"])
def test_the_code_of_a_data_card_reads_the_files_also_where_their_columns_differ(
    notes, tmp_path, monkeypatch
):
    rows = [r | dict(contract="entailment") for r in box_rows(4)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(
        tmp_path / "dev.jsonl", [r | dict(note="x") for r in rows] if notes == "in one file" else rows
    )
    files = [tmp_path / "train.jsonl", tmp_path / "dev.jsonl"]
    nli_ft.share.push_data(files, "OWNER/boxes", "mit", dry_run=True, out=tmp_path / "OWNER/boxes")
    (code,) = blocks((tmp_path / "OWNER/boxes/README.md").read_text())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = {}
    with contextlib.chdir(tmp_path):  # the folder stands for the repository
        exec(code, found)
    sets = found["data"] if notes == "in no file" else found
    assert [len(sets[split]) for split in ("train", "validation")] == [4, 4]


def test_rows_without_a_meaning_and_two_files_of_one_split_are_refused(desk, tmp_path):
    bare = [{k: r[k] for k in ("id", "premise", "hypothesis", "label")} for r in box_rows(4)]
    for name in ("train.jsonl", "more_train.jsonl"):
        write_jsonl(tmp_path / name, bare)
    how = dict(repo="OWNER/boxes", license="mit", dry_run=True, out=tmp_path / "out")
    with pytest.raises(DataError, match="nothing says what it means. Name it with --contract"):
        nli_ft.share.push_data([tmp_path / "train.jsonl"], **how)
    two = [tmp_path / "train.jsonl", tmp_path / "more_train.jsonl"]
    with pytest.raises(DataError, match="two files have the split 'train'"):
        nli_ft.share.push_data(two, contract="binary", **how)
    assert not (tmp_path / "out").exists()


def test_a_run_that_never_finished_is_not_pushed(desk, tmp_path):
    with pytest.raises(RecordError, match="is no folder"):
        push_run(tmp_path / "none", "OWNER/NAME", dry_run=True, out=tmp_path / "out")
