"""The base under an adapter, the wording of a run, and the fair score of the untrained model: later commands use
what the record says of them."""

import json, shutil

import pytest
from tiny_models import box_rows, save_model

from nli_ft.process import ConfigError, DataError, RecordError, project_root
from nli_ft.config_loader import load_config
from nli_ft.rows import seal
from nli_ft.files import write_jsonl
from nli_ft.ask import evaluate_cli, open_run, predict_cli
from nli_ft.predict import predict_rows
from nli_ft.predictions import read_predictions
from nli_ft.bases import base_facts, load_tokenizer
from nli_ft.model import load_base, load_for_inference, save_adapter, seeded_lora
from nli_ft.records import list_runs, read_run, show_runs, start_run
from nli_ft.card import model_card
from nli_ft.train_sft import Session, merge_cli, run_training
from nli_ft.fit import changed_facts
from nli_ft.preflight import prepare

PAIR = ["--premise", "The red box holds a blue ball.", "--hypothesis", "The blue ball is in the red box."]


def pairs(rows):
    return [{k: r[k] for k in ("id", "premise", "hypothesis", "label")} for r in rows]


def config(folder, **changes):
    small = dict(
        model_id=str(folder / "base"),
        device="cpu",
        compute_dtype="fp32",
        max_steps=2,
        max_new_tokens=8,
        save_steps=1,
    )
    places = dict(
        train_data=str(folder / "train.jsonl"),
        eval_data=str(folder / "pairs.jsonl"),
        output_dir=str(folder / "models"),
        runs_dir=str(folder / "runs"),
    )
    return load_config("minimal_test", small | places | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with a base, training rows, labelled pairs to be judged, and one finished run."
    folder = tmp_path_factory.mktemp("made")
    save_model("qwen2", folder / "base", max_shard_size="60KB")
    write_jsonl(folder / "train.jsonl", box_rows(16))
    write_jsonl(folder / "pairs.jsonl", pairs(box_rows(22)[16:]))
    write_jsonl(folder / "others.jsonl", pairs(box_rows(20)[16:]))
    run_training(config(folder))
    return folder


@pytest.fixture
def project(made, tmp_path):
    "(folder, run, adapter) that a test may damage. All is restored after the test."
    shutil.copytree(made, tmp_path / "kept")
    (run,) = (made / "runs").glob("*/*")
    (adapter,) = (made / "models").glob("*/*/adapter")
    (adapter / "sha256.json").unlink()  # an adapter without hashes is used as it is
    yield made, run, adapter
    shutil.rmtree(made)
    shutil.copytree(tmp_path / "kept", made)


def outcome(command, *args, capsys):
    "(exit code, everything printed)."
    try:
        code = command([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return code, said.out + said.err


# --- the wording


def test_a_run_judged_on_labelled_pairs_knows_its_wording_and_is_asked_again(project, capsys):
    folder, run, _ = project
    assert json.loads((run / "environment.json").read_text())["prompt"]["template"] == "brief"
    assert outcome(predict_cli, "--run", run, *PAIR, "--mode", "forced", capsys=capsys)[0] == 0
    assert outcome(evaluate_cli, "--run", run, "--data", folder / "others.jsonl", capsys=capsys)[0] == 0
    asked = read_predictions(next((run / "evaluations").glob("others*")) / "predictions.jsonl")
    assert [p["prompt_hash"] for p in asked] == [
        p["prompt_hash"] for p in read_predictions(run / "predictions.jsonl")[:4]
    ]


def test_an_older_record_without_a_wording_is_asked_in_that_of_its_predictions_or_of_its_training_rows(
    project, capsys
):
    folder, run, _ = project
    env = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(env | dict(prompt=dict(template="auto", sha256=None))))
    kept = (folder / "train.jsonl").rename(folder / "away.jsonl")
    assert open_run(run)[3] == "brief", "by the hash of what was asked"
    (run / "predictions.jsonl").unlink()
    assert open_run(run)[3] == "auto"
    code, said = outcome(predict_cli, "--run", run, *PAIR, capsys=capsys)
    assert code == 2 and "wording that has no name" in said and "standard, brief" in said
    kept.rename(folder / "train.jsonl")
    assert open_run(run)[3] == "brief", "by the rows it was trained on"


@pytest.mark.parametrize("style, refused", [("cot", True), ("label_first", True), ("label_only", False)])
def test_early_stopping_without_an_evaluation_loss_is_refused_before_anything_is_loaded(made, style, refused):
    cfg = config(made, completion=style, early_stopping_patience=1, eval_steps=1)
    if not refused:
        assert len(prepare(cfg).eval) == 6, "a label alone needs no thought"
        return
    with pytest.raises(DataError, match="no row of .*pairs.jsonl has a thought_process.*nli_data prepare"):
        prepare(cfg)
    assert len(prepare(cfg.replace(early_stopping_patience=None)).eval) == 0


# --- the base


def spoil(path):
    "Another number in a file, of the same length."
    if path.suffix == ".json":
        path.write_text(path.read_text().replace("64", "65", 1))
        return
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def shard(base):
    return sorted(base.glob("model-*.safetensors"))[-1].name


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-*.safetensors", "generation_config.json"]
)
def test_another_base_under_an_adapter_is_refused_by_every_command(project, capsys, name):
    folder, run, adapter = project
    path = folder / "base" / (shard(folder / "base") if "*" in name else name)
    if name == "generation_config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(eos_token_id=3)))
    else:
        spoil(path)
    old = json.loads((run / "summary.json").read_text())["base"]["files"][path.name]
    new = base_facts(config(folder))["files"][path.name]
    asks = [
        (predict_cli, *PAIR),
        (evaluate_cli, "--data", folder / "others.jsonl"),
        (evaluate_cli, "--data", folder / "others.jsonl", "--untuned"),
        (evaluate_cli, "--data", folder / "others.jsonl", "--engine", "vllm"),
        (merge_cli, "--out", folder / "merged"),
    ]
    for command, *args in asks:
        code, said = outcome(command, "--run", run, *args, capsys=capsys)
        assert (
            code == 2
            and f"{path.name}: SHA-256 {old[:12]}… then, {new[:12]}… now" in said
            and "put the old files back" in said
        )
        assert "Traceback" not in said
    assert not (folder / "merged").exists()
    with pytest.raises(RecordError, match=path.name):
        load_for_inference(config(folder), adapter)


def test_each_of_record_and_adapter_notices_by_itself(project, capsys):
    folder, run, adapter = project
    spoil(folder / "base" / shard(folder / "base"))
    for path, key in ((adapter / "nli_ft.json", "base"), (run / "summary.json", "base")):
        kept = path.read_text()
        path.write_text(json.dumps({k: v for k, v in json.loads(kept).items() if k != key}))
        assert outcome(predict_cli, "--run", run, *PAIR, capsys=capsys)[0] == 2
        path.write_text(kept)


def test_a_base_that_another_version_of_transformers_saved_or_that_was_copied_is_the_same(project, capsys):
    folder, run, _ = project
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(transformers_version="99")))
    (folder / "base" / "README.md").write_text("more about it")
    assert outcome(predict_cli, "--run", run, *PAIR, "--mode", "forced", capsys=capsys)[0] == 0


def test_an_older_adapter_and_record_are_taken_as_they_are_and_it_is_said_once(project, capsys):
    folder, run, adapter = project
    for path in (adapter / "nli_ft.json", run / "summary.json"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "base"}))
    code, said = outcome(predict_cli, "--run", run, *PAIR, "--mode", "forced", capsys=capsys)
    assert code == 0 and said.count("does not say which weights") == 1
    assert (
        "does not say" not in outcome(predict_cli, "--run", run, *PAIR, "--mode", "forced", capsys=capsys)[1]
    )


def test_a_note_of_the_base_that_no_run_writes_is_refused(project, capsys):
    _, run, _ = project
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | dict(base=["x"])))
    code, said = outcome(predict_cli, "--run", run, *PAIR, capsys=capsys)
    assert code == 2 and "which no run writes" in said and "Traceback" not in said


def test_a_checkpoint_of_another_base_is_not_gone_on_from(project, tmp_path, capsys):
    folder, _, adapter = project
    checkpoint = adapter.parent / "checkpoint-1"
    info = json.loads((checkpoint / "resume.json").read_text())
    on = config(folder, resume_from_checkpoint=str(checkpoint))
    opened = start_run(on, tmp_path / "run")
    Session(on, opened)
    assert "note:" not in capsys.readouterr().out
    spoil(folder / "base" / shard(folder / "base"))
    with pytest.raises(ConfigError, match="base, model-.*safetensors: SHA-256"):
        Session(on, opened)
    del info["facts"]["base"]
    (checkpoint / "resume.json").write_text(json.dumps(info))
    seal(checkpoint)
    Session(on, opened)
    assert capsys.readouterr().out.count("does not say which weights") == 1


def test_a_resumed_run_may_name_the_commit_that_its_branch_meant():
    then = dict(config=dict(model_revision=None, seed=1), base=dict(commit="a" * 40))
    now = dict(config=dict(model_revision="a" * 40, seed=1), base=dict(commit="a" * 40))
    assert changed_facts(then, now) == []
    moved = changed_facts(then, dict(then, base=dict(commit="b" * 40)))
    assert moved == [f"base, commit {'a' * 12}… then, {'b' * 12}… now"]
    assert len(changed_facts(dict(then, base={}), now)) == 1, (
        "without commits, only the names can be compared"
    )


def test_a_model_of_the_hub_is_known_by_its_commit_and_the_old_one_stays_askable(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub, (old, new) = tmp_path / "hub" / "models--some--model", ("a" * 40, "b" * 40)
    for commit in (old, new):
        save_model("mistral", hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(old)
    cfg = load_config("minimal_test", dict(model_id="some/model", device="cpu", compute_dtype="fp32"))
    assert base_facts(cfg) == dict(commit=old)
    save_adapter(seeded_lora(load_base(cfg), cfg), load_tokenizer(cfg), cfg, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "nli_ft.json").read_text())["base"] == dict(commit=old)
    load_for_inference(cfg, tmp_path / "adapter")
    (hub / "refs" / "main").write_text(new)
    with pytest.raises(
        RecordError, match=f"commit a{{12}}… then, b{{12}}… now\\nTo ask this model, set model_revision={old}"
    ):
        load_for_inference(cfg, tmp_path / "adapter")
    load_for_inference(cfg.replace(model_revision=old), tmp_path / "adapter")


def test_a_record_that_names_its_commit_is_asked_at_that_commit(project):
    _, run, _ = project
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | dict(base=dict(commit="a" * 40))))
    assert open_run(run)[1].model_revision == "a" * 40
    assert open_run(run, eval_batch_size=3)[1].eval_batch_size == 3


# --- the fair score before training


def test_a_record_holds_the_untrained_models_forced_answers_beside_those_it_wrote(made):
    (run,) = (made / "runs").glob("*/*")
    summary = json.loads((run / "summary.json").read_text())
    written, forced = (
        read_predictions(run / f"{name}.jsonl")
        for name in ("predictions_before", "predictions_before_forced")
    )
    assert (
        summary["before"]["coverage"] == 0
        and summary["before_forced"]["coverage"] == 1
        and summary["before_forced"]["n"] == 6
    )
    assert [p["completion"] for p in forced] == [p["completion"] for p in written] and {
        p["mode"] for p in forced
    } == {"forced"}
    cfg = config(made)
    untrained = seeded_lora(load_base(cfg), cfg)
    rows = prepare(cfg).eval_rows
    want = predict_rows(untrained, load_tokenizer(cfg), rows, cfg, progress=False, mode="forced")
    assert [p["p_entail"] for p in forced] == pytest.approx([p["p_entail"] for p in want], abs=1e-5)


def test_no_score_before_training_stands_without_what_it_means(made, capsys):
    (run,) = (made / "runs").glob("*/*")
    fair = read_run(run).summary["before_forced"]["accuracy"]
    said = f"0.000 (no JSON; forced {fair:.3f})"
    assert said in show_runs(list_runs(made / "runs")) and said in model_card(run)
    assert evaluate_cli(["--run", str(run)]) == 0
    shown = capsys.readouterr().out
    line = next(l for l in shown.splitlines() if l.startswith("untuned, label forced"))
    assert float(line.split()[3]) == pytest.approx(fair, abs=1e-3)


def test_the_committed_record_of_before_has_no_forced_answers_and_reads_as_it_did():
    (run,) = (project_root() / "runs" / "cpu_demo").glob("*-s42-*")
    if (run / "predictions_before_forced.jsonl").exists():
        pytest.skip("the committed record has them")
    (row,) = list_runs(project_root() / "runs")
    assert row["before"] == 0.0 and row["before_text"] == "0.000 (no JSON)"
