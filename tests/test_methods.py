"""Pairs and rewards: the reference, what moves, what is counted, resuming, and what is refused."""

import json, math, os, signal, subprocess, sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from nli_ft.process import ConfigError, DataError, Interrupted, RecordError, project_root
from nli_ft.ask import RunModel, evaluate_run, started_from
from nli_ft.check import leakage_text
from nli_ft.config_loader import config_hash, load_config
from nli_ft.files import write_jsonl
from nli_ft.rows import damage, prompt_messages, render_completion, sft_row
from nli_ft.ready import check_ready, find_parent, named_run
from nli_ft.model import load_base, seeded_lora, started_lora
from nli_ft.preflight import prepare
from nli_ft.prompt import encode_prompt
from nli_ft.fit import changed_facts, fit, resume_facts
from nli_ft.preferences import CountedLoss
from nli_ft.records import finish_run, read_run, recipe_hashes, start_run
from nli_ft.rewards import SampledAnswers, reward_terms
from nli_ft.self_taught import LocalTeacher
from nli_ft.study import with_parent
from nli_ft.study_plan import trial_config
from nli_ft.train_sft import Session, run_training

root = project_root()
WORDS = "red green blue black white grey brown pink".split()
# fp32 and no dropout: what is compared here is arithmetic
TINY = dict(
    model_id="tiny-mistral",
    device="cpu",
    compute_dtype="fp32",
    lora_dropout=0.0,
    learning_rate=1e-2,
    logging_steps=1,
    eval_before=False,
    max_new_tokens=8,
    max_eval_samples=2,
    use_wandb=False,
)


def said(text):
    return [dict(role="assistant", content=text)]


def pair_row(i, a, b, **other):
    premise, hypothesis = f"The {a} box holds a {b} ball.", f"The {b} ball is in the {a} box."
    right = render_completion(f"The {a} box holds the {b} ball.", 1)
    wrong = render_completion(f"The {b} box holds the {a} ball, and no other.", 0)
    row = dict(id=i, premise=premise, hypothesis=hypothesis, label=1)
    row |= dict(
        prompt=prompt_messages(premise, hypothesis, "brief"), chosen=said(right), rejected=said(wrong)
    )
    return row | other


def imitated_rows(path, shift=2):
    "Rows of imitation. Another shift gives other pairs."
    words = zip(WORDS, WORDS[shift:] + WORDS[:shift])
    texts = [(f"A {a} cat saw a {b} dog.", f"A {b} dog was seen.") for a, b in words]
    write_jsonl(path, [sft_row(i, p, h, p, i % 2, "test", "brief") for i, (p, h) in enumerate(texts)], True)
    return str(path)


def tiny(tmp_path, **kw):
    pairs = tmp_path / "pairs.jsonl"
    if not pairs.exists():
        write_jsonl(pairs, [pair_row(i, a, b) for i, (a, b) in enumerate(zip(WORDS, WORDS[3:] + WORDS[:3]))])
    own = dict(output_dir=str(tmp_path / "models"), runs_dir=str(tmp_path / "runs"))
    own |= dict(train_data=str(pairs), eval_data=imitated_rows(tmp_path / "judged.jsonl"))
    return load_config("minimal_test", TINY | own | kw)


def dpo(tmp_path, **kw):
    return tiny(tmp_path, **dict(method="dpo", max_steps=4) | kw)


def grpo(tmp_path, **kw):
    rows = imitated_rows(tmp_path / "asked.jsonl", shift=3)
    return tiny(
        tmp_path, **dict(method="grpo", batch_size=8, group_size=4, max_steps=3, train_data=rows) | kw
    )


def trained(cfg, out, act=lambda row: None):
    "Logs, model and result of a training."
    logs, prep = [], prepare(cfg)

    def log(row):
        logs.append(row)
        act(row)

    base = load_base(cfg)
    model = started_lora(base, cfg, prep.parent.adapter) if prep.parent else seeded_lora(base, cfg)
    return logs, model, fit(prep, model, out, on_log=log)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}


def imitated(tmp_path, **kw):
    "A finished run of imitation."
    rows = imitated_rows(tmp_path / "imitated.jsonl", shift=3)
    return run_training(tiny(tmp_path, max_steps=2, train_data=rows, **kw))


# -- pairs


def test_the_first_loss_of_dpo_is_log_2_also_from_a_trained_adapter(tmp_path):
    run = imitated(tmp_path)
    cfg = dpo(tmp_path, start_from=str(run), max_steps=3)
    assert find_parent(cfg).name == f"minimal_test/{run.name}"
    logs, model, _ = trained(cfg, tmp_path / "out")
    first = next(row for row in logs if "rewards/chosen" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/chosen"], first["rewards/rejected"]) == (0, 0)
    # the reference is the parent's adapter, to the last bit
    parent = started_lora(load_base(cfg), cfg, find_parent(cfg).adapter)
    for name, p in weights(parent).items():
        assert torch.equal(model.get_parameter(name.replace(".default.", ".ref.")), p), name
    assert any(p.abs().max() > 0 for n, p in weights(parent).items() if "lora_B" in n)


def test_dpo_lifts_the_better_answers_above_the_worse_ones(tmp_path):
    logs, _, result = trained(dpo(tmp_path, max_steps=6), tmp_path / "out")
    last = [row for row in logs if "rewards/margins" in row][-1]
    assert last["rewards/accuracies"] == 1 and last["rewards/margins"] > 0.1
    assert result["loss_tokens_trained"] == sum(row["loss_tokens"] for row in logs if "loss_tokens" in row)
    assert damage(tmp_path / "out/adapter") is None and not (tmp_path / "out/adapter/ref").exists()


def test_rewards_are_logged_also_right_after_an_evaluation(tmp_path):
    often = dict(eval_metric="accuracy", eval_metric_rows=2, eval_steps=3, save_steps=3)
    logs, _, _ = trained(dpo(tmp_path, logging_steps=2, max_steps=3, **often), tmp_path / "out")
    steps = [row for row in logs if "loss" in row]
    assert len(steps) == 3 and all("rewards/margins" in row for row in steps)


def cut_off_and_resumed(cfg, folder):
    "A training through to its end, and the same one cut off after step 2: losses by step, weights."
    whole, model, _ = trained(cfg.replace(output_dir=str(folder / "a")), folder / "a/minimal_test/r")
    there = cfg.replace(output_dir=str(folder / "b"))

    def stop(row):
        if row.get("step") == 2 and "loss" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        trained(there, folder / "b/minimal_test/r", stop)
    rest, other, _ = trained(there.replace(resume_from_checkpoint="latest"), folder / "b/minimal_test/s")
    losses = [{row["step"]: row["loss"] for row in logs if "loss" in row} for logs in (whole, rest)]
    return losses, weights(model), weights(other)


@pytest.mark.parametrize("method, more", [(dpo, {}), (grpo, {}), (grpo, dict(beta=0.05))])
def test_a_resumed_training_ends_as_the_one_that_was_not_cut_off(tmp_path, method, more, monkeypatch):
    if method is grpo:
        reward_first_token(monkeypatch)
    cfg = method(tmp_path, max_steps=4, save_steps=1, **more)
    (whole, halves), ours, theirs = cut_off_and_resumed(cfg, tmp_path)
    assert whole == halves
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


@pytest.mark.parametrize("method", [dpo, grpo])
def test_an_evaluation_within_the_training_answers_rows_and_keeps_the_best(tmp_path, method, monkeypatch):
    if method is grpo:
        reward_first_token(monkeypatch)
    asked = dict(
        eval_metric="accuracy", eval_metric_rows=2, eval_steps=2, save_steps=2, early_stopping_patience=1
    )
    logs, _, result = trained(method(tmp_path, max_steps=4, **asked), tmp_path / "out")
    assert [row["eval_answered"] for row in logs if "eval_accuracy" in row][0] == 0  # it writes no JSON
    assert result["best"]["step"] == 2


def test_a_resumed_run_has_the_same_parent_whatever_it_is_called(tmp_path):
    run = imitated(tmp_path)
    other = run_training(tiny(tmp_path, max_steps=1, train_data=imitated_rows(tmp_path / "o.jsonl", 3)))
    names = (str(run), f"minimal_test/{run.name}", str(other))
    one, same, another = (resume_facts(prepare(dpo(tmp_path, start_from=name))) for name in names)
    assert changed_facts(one, same) == []
    [line] = changed_facts(one, another)
    assert line.startswith("adapter of start_from")


def noted_run(cfg):
    "A record that is done, of a run that nobody trained."
    run = start_run(cfg)
    finish_run(run)
    return run


def test_the_name_of_a_config_means_its_run_of_the_same_seed(tmp_path):
    runs = {seed: noted_run(tiny(tmp_path, seed=seed)) for seed in (1, 2)}
    for seed, run in runs.items():
        cfg = dpo(tmp_path, start_from="minimal_test", seed=seed)
        assert named_run(cfg, cfg.path("runs_dir")).name == run.name
    with pytest.raises(ConfigError, match=r"no finished run with seed 3 \(but with 1, 2\)"):
        find_parent(dpo(tmp_path, start_from="minimal_test", seed=3))
    cfg = dpo(tmp_path, start_from=str(runs[1]), seed=3)
    assert named_run(cfg).name == runs[1].name
    # a config of one's own, which only its records know
    mine = tmp_path / "runs/mine"
    (tmp_path / "runs/minimal_test").rename(mine)
    for record in mine.glob("*/config.json"):
        record.write_text(json.dumps(json.loads(record.read_text()) | dict(name="mine")))
    cfg = dpo(tmp_path, start_from="mine", seed=1)
    assert named_run(cfg, cfg.path("runs_dir")).name == runs[1].name


def test_an_arm_of_a_study_starts_from_a_run_outside_of_it(project, tmp_path):
    rows = imitated_rows(tmp_path / "asked.jsonl")
    mine = dict(train_data=rows, eval_data=rows, seed=5)
    run = noted_run(load_config("cpu_demo", mine))
    inside = noted_run(load_config("cpu_demo", mine | dict(runs_dir="studies/s/runs")))
    cfg = load_config("grpo_demo", mine | dict(runs_dir="studies/s/runs", max_new_tokens=8))
    pinned = with_parent(cfg)
    assert inside.name != run.name and pinned.start_from == f"runs/cpu_demo/{run.name}"
    assert named_run(trial_config(pinned, tmp_path)).resolve() == run.resolve()


def test_a_run_begins_with_the_weights_of_its_parent(tmp_path):
    cfg = tiny(
        tmp_path, start_from=str(imitated(tmp_path)), train_data=imitated_rows(tmp_path / "more.jsonl", 3)
    )
    session = Session(cfg, start_run(cfg))
    parent = started_lora(load_base(cfg), cfg, session.prep.parent.adapter)
    begun = weights(session.load())
    assert all(torch.equal(p, begun[name]) for name, p in weights(parent).items())


# -- rewards


def reward_first_token(monkeypatch):
    "Reward what the model does by chance: a first token with an even id. Returns the samples, as they come."
    samples = []

    def even(prompts, completions, completion_ids, log_metric, **kw):
        for name in ("right", "valid_json", "thought_tokens"):
            log_metric(name, 0.0)
        rewards = [float(ids[0] % 2 == 0) for ids in completion_ids]
        samples.extend(zip(prompts, completion_ids, rewards))
        return rewards

    monkeypatch.setattr("nli_ft.rewards.reward_functions", lambda cfg, tok: [even])
    return samples


@pytest.mark.parametrize(
    "terms", [dict(format_reward=f) for f in (0.05, 0.2, 0.3)] + [dict(length_penalty=0.07)]
)
def test_a_group_of_equal_rewards_has_no_signal_to_the_last_bit(tmp_path, terms):
    from trl.trainer.utils import nanstd

    total = sum(reward_terms(grpo(tmp_path, **terms), (1, True, 7), 1).values())
    for n in range(2, 33):
        assert nanstd(torch.full((1, n), total), dim=1) == 0, n


def test_an_answer_that_cannot_be_read_is_never_worth_more_than_one_that_can(tmp_path):
    cfg = grpo(tmp_path, length_penalty=0.5)
    lost, wrong, right = ((None, False, 0), (0, True, 8), (1, False, 8))
    lost, wrong, right = (sum(reward_terms(cfg, judged, 1).values()) for judged in (lost, wrong, right))
    assert lost <= wrong < right


def test_an_evaluation_between_two_logs_takes_nothing_away():
    class Logger:
        def log(self, logs, start_time=None):
            self.said = logs

    class Trainer(SampledAnswers, CountedLoss, Logger):
        _metrics = dict(train=dict(frac_reward_zero_std=[1.0, 0.0], reward=[0.5], clip=[1]))
        _counts = dict(tokens=4)
        model = torch.nn.Identity()

    trainer = Trainer()
    trainer.log(dict(eval_accuracy=0.5))
    trainer.log(dict(loss=0.1))
    assert trainer.said["no_signal"] == 0.5 and trainer.said["tokens"] == 4
    assert trainer._metrics["train"] == dict(reward=[0.5])


def log_probability(model, tok, prompt, answer):
    "Of an answer behind a prompt."
    start = encode_prompt(tok, prompt)
    ids = torch.tensor([start + answer])
    with torch.no_grad():
        logp = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    return sum(logp[len(start) - 1 + i, y].item() for i, y in enumerate(answer))


def test_a_step_of_grpo_makes_rewarded_answers_more_probable_than_the_others(tmp_path, monkeypatch):
    samples = reward_first_token(monkeypatch)
    still = dict(lr_scheduler="constant", warmup_ratio=0.0, max_steps=1, max_new_tokens=2)
    cfg = grpo(tmp_path, batch_size=16, group_size=8, **still)
    _, model, result = trained(cfg, tmp_path / "out")
    assert result["generated_tokens"] == sum(len(ids) for _, ids, _ in samples) == 2 * 16
    tok, before = prepare(cfg).tok, seeded_lora(load_base(cfg), cfg)
    gain = {0.0: [], 1.0: []}
    for prompt, ids, reward in samples:
        gain[reward].append(
            log_probability(model, tok, prompt, ids) - log_probability(before, tok, prompt, ids)
        )
    good, bad = (sum(gain[r]) / len(gain[r]) for r in (1.0, 0.0))
    assert good > 0 > bad


def test_rewards_and_advantages_of_known_answers_are_those_by_hand(tmp_path, monkeypatch):
    from nli_ft.rewards import reward_functions, reward_trainer
    from nli_ft.fit import shared_args

    cfg = grpo(tmp_path, format_reward=0.5)
    prep = prepare(cfg)
    trainer = reward_trainer(prep, seeded_lora(load_base(cfg), cfg), shared_args(cfg, tmp_path, False), [])
    gold = prep.train_rows[0]["label"]
    texts = [render_completion("So.", y) for y in (gold, 1 - gold)] + [
        f"Well: {render_completion('So.', gold)}",
        "?",
    ]
    ids = [[*prep.tok(t, add_special_tokens=False)["input_ids"], prep.tok.eos_token_id] for t in texts]
    monkeypatch.setattr(type(trainer), "_generate_single_turn", lambda self, *a, **k: (ids, None))
    trainer.model.train()
    row = dict(prompt=prep.train_rows[0]["prompt"], gold=gold, label=gold)
    out = trainer._generate_and_score_completions([dict(row) for _ in texts])
    rewards = torch.tensor([1.5, 0.5, 1.0, 0.0])
    by_hand = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert torch.allclose(out["advantages"], by_hand, atol=1e-5)
    assert out["prompt_ids"][0].tolist() == prep.train[0].input_ids
    names = [f.__name__ for f in reward_functions(cfg, prep.tok)]
    assert names == ["label", "format"]


@pytest.mark.parametrize("completion, texts", [("cot", '{"predicted_label": 1}'), ("label_only", "1")])
def test_an_answer_in_another_style_than_asked_earns_nothing(tmp_path, completion, texts):
    from nli_ft.rewards import reward_functions

    cfg = grpo(tmp_path, completion=completion)
    (label,) = reward_functions(cfg, prepare(cfg).tok)
    assert label(completions=[said(texts)], gold=[1], label=[1]) == [0.0]


def test_random_labels_have_the_same_shares_and_agree_with_gold_by_chance(tmp_path):
    from nli_ft.rewards import question_dataset, rewarded_labels

    cfg = grpo(tmp_path, reward="random")
    rows = [dict(label=int(i % 4 == 0)) for i in range(4000)]
    dealt, gold = rewarded_labels(cfg, rows), [row["label"] for row in rows]
    assert sum(dealt) == sum(gold) and dealt == rewarded_labels(cfg, rows)
    agree = sum(a == b for a, b in zip(dealt, gold)) / 4000
    assert agree == pytest.approx(0.25**2 + 0.75**2, abs=0.03)
    assert rewarded_labels(cfg.replace(seed=7), rows) != dealt
    data = question_dataset(prepare(cfg))
    assert sorted(data["gold"]) == sorted(data["label"])


def test_a_training_without_any_signal_stops_and_says_why(tmp_path, monkeypatch):
    from nli_ft.records import TrainingStopped

    monkeypatch.setattr("nli_ft.rewards.QUIET_STEPS", 2)
    with pytest.raises(TrainingStopped, match="no signal: in 2 steps"):
        trained(grpo(tmp_path, max_steps=5), tmp_path / "out")


def test_a_run_of_rewards_leaves_a_record_that_names_its_parent(tmp_path, monkeypatch):
    reward_first_token(monkeypatch)
    parent = imitated(tmp_path, eval_before=True)
    cfg = grpo(tmp_path, start_from=str(parent), beta=0.05, max_steps=2, eval_before=True)
    run = run_training(cfg)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done" and summary["after"]["n"] == 2
    assert summary["parent"]["run"] == f"minimal_test/{parent.name}"
    assert summary["parent"]["recipes"] == recipe_hashes(read_run(parent))
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in log if "no_signal" in row)
    assert {"reward", "kl", "valid_json", "thought_tokens", "generated_tokens", "right"} <= first.keys()
    assert first["kl"] == pytest.approx(0, abs=1e-6)

    from nli_ft.differences import differing, load_compared

    entries = load_compared([str(parent), str(run)])
    differs = differing(*entries)
    assert "method" in differs and any(d.startswith("parent none → minimal_test/") for d in differs)
    entries = load_compared([f"{parent}:before", f"{run}:before"])
    assert any(d.startswith("parent none → minimal_test/") for d in differing(*entries))
    assert (started_from(parent), started_from(run)) == (None, find_parent(cfg).adapter)
    assert LocalTeacher(RunModel(f"{run}:before")).name.endswith(summary["parent"]["adapter_sha256"][:16])
    weights_file = find_parent(cfg).adapter / "adapter_model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes() + b" ")
    with pytest.raises(RecordError, match="is not that one any more"):
        started_from(run)


# -- what is refused


@pytest.mark.parametrize(
    "settings, says",
    [
        ("beta=0.1", "imitation has no reference"),
        ("method=dpo beta=0", "the loss of a pair is constant"),
        ("method=dpo group_size=4", "only grpo samples answers"),
        ("method=dpo use_packing=true", "pairs and samples are not packed"),
        ("method=dpo thought_weight=0.5", "the loss counts whole answers"),
        ("method=dpo early_stopping_patience=2", "no evaluation loss"),
        ("method=grpo group_size=3", "no whole groups"),
        ("method=grpo group_size=1", "at least 2"),
        ("method=grpo batch_size=8 format_reward=1", "no more than a wrong one in better form"),
        (
            "method=grpo batch_size=8 length_penalty=0.4 format_reward=0.3 max_new_tokens=200",
            "no more than a wrong one in better form",
        ),
        ("method=grpo batch_size=8 completion=label_only length_penalty=0.1", "no thought whose length"),
        ("method=grpo batch_size=8 sampler=vllm", "vLLM holds the base in 16 bits"),
    ],
)
def test_a_combination_that_means_nothing_is_refused_by_the_name_of_its_keys(settings, says):
    with pytest.raises(ConfigError, match=says):
        load_config("minimal_test", settings)


def test_configs_of_before_keep_their_hash():
    cfg = load_config("cpu_demo")
    assert config_hash(cfg).startswith("e7b96ce6318c")
    assert config_hash(cfg.replace(method="grpo")) != config_hash(cfg)


@pytest.mark.parametrize(
    "row, says",
    [
        (dict(rejected=said(render_completion("So.", 1))), "chosen and rejected have the same label 1"),
        (dict(label=0), "chosen says 1 where label is 0"),
        (dict(chosen=said("")), "content is empty"),
        (dict(rejected=said("No.")), "rejected is not a JSON object with predicted_label"),
        (dict(chosen=[]), "chosen is not a list"),
    ],
)
def test_a_bad_pair_is_refused_with_its_line(tmp_path, row, says):
    write_jsonl(tmp_path / "pairs.jsonl", [pair_row(1, "red", "blue"), pair_row(2, "red", "pink", **row)])
    with pytest.raises(DataError, match=f"pairs.jsonl:2: {says}"):
        prepare(dpo(tmp_path))


def test_a_parent_on_a_base_that_has_changed_or_of_another_contract_is_refused(tmp_path, monkeypatch):
    run = imitated(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    contracts = dict(summary["contracts"], train=["entailment"])
    (run / "summary.json").write_text(json.dumps(summary | dict(contracts=contracts)))
    rows = [pair_row(i, "red", "blue", contract="course") for i in (1, 2)]
    write_jsonl(tmp_path / "pairs.jsonl", rows, True)
    with pytest.raises(DataError, match="A 1 does not mean the same"):
        prepare(dpo(tmp_path, start_from=str(run)))
    (run / "summary.json").write_text(json.dumps(summary | dict(base=dict(commit="old"))))
    monkeypatch.setattr("nli_ft.bases.base_facts", lambda cfg: dict(commit="new"))
    with pytest.raises(ConfigError, match="belongs to another base than tiny-mistral is now"):
        find_parent(dpo(tmp_path, start_from=str(run)))


def test_bad_lines_of_questions_are_counted_and_pairs_are_none(tmp_path):
    cfg = grpo(tmp_path, max_bad_rows=0.2)
    with open(cfg.path("train_data"), "a") as f:
        f.write("{}\n")
    assert [line for line, _ in prepare(cfg).bad["train"]] == [9]
    write_jsonl(tmp_path / "pairs.jsonl", [pair_row(i, "red", "blue") for i in (1, 2)], True)
    with pytest.raises(DataError, match="holds pairs of answers"):
        prepare(cfg.replace(train_data=str(tmp_path / "pairs.jsonl")))


def test_files_of_another_kind_name_the_remedy(tmp_path):
    cfg = dpo(tmp_path)
    with pytest.raises(DataError, match="--preferences"):
        prepare(cfg.replace(train_data=imitated_rows(tmp_path / "sft.jsonl")))
    with pytest.raises(DataError, match="Set method=dpo"):
        prepare(cfg.replace(method="sft"))


def test_a_parent_of_another_shape_is_refused_in_one_message_before_anything_is_loaded(tmp_path):
    run = imitated(tmp_path)
    cfg = dpo(tmp_path, start_from=str(run), lora_r=4, completion="label_only")
    with pytest.raises(ConfigError) as e:
        check_ready(cfg)
    assert "completion: cot there, label_only here" in str(e.value) and "lora_r: 8 there, 4 here" in str(
        e.value
    )
    args = [sys.executable, "-m", "nli_ft.train_sft", *cfg.to_args()]
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="")
    p = subprocess.run(args, cwd=root, capture_output=True, text=True, encoding="utf-8", env=env)
    assert p.returncode == 2 and "Traceback" not in p.stderr and "does not fit this config" in p.stderr
    with pytest.raises(ConfigError, match="start_from = nowhere"):
        check_ready(dpo(tmp_path, start_from="nowhere"))
    worded = dpo(tmp_path, start_from=str(run), prompt_template="standard")
    with pytest.raises(ConfigError, match="prompt_template: brief there, standard here"):
        prepare(worded)


# -- the control, on a model that can answer


@pytest.mark.every
def test_a_random_reward_does_not_raise_accuracy_beyond_its_interval(tmp_path):
    folders = dict(output_dir=str(tmp_path / "models"), runs_dir=str(tmp_path / "runs"))
    few = folders | dict(
        completion="label_only", max_eval_samples=80, max_new_tokens=16, use_wandb=False, device="cpu"
    )
    cfg = load_config("cpu_demo", few | dict(max_steps=16, eval_before=False))
    check_ready(cfg)
    parent = run_training(cfg)
    learnt = json.loads((parent / "summary.json").read_text())["after"]
    assert learnt["valid_rate"] > 0.9, "the parent must know the form, or the control teaches it"
    run = run_training(load_config("grpo_random", few | dict(start_from=str(parent), max_steps=12)))
    summary = json.loads((run / "summary.json").read_text())
    # the frozen policy: before the training it is the parent
    assert summary["before"]["accuracy"] == learnt["accuracy"]
    assert summary["after"]["accuracy"] <= learnt["accuracy_ci"][1]
    assert summary["generated_tokens"] > 0


def test_leakage_is_sought_among_the_rows_of_every_parent(tmp_path):
    first = imitated(tmp_path)
    second = run_training(
        tiny(tmp_path, start_from=str(first), train_data=imitated_rows(tmp_path / "second.jsonl", 4))
    )
    rows = imitated_rows(tmp_path / "third.jsonl", 5)
    # rows that the first run was trained on, and the third was not
    further = dict(also=str(tmp_path / "imitated.jsonl"), new=imitated_rows(tmp_path / "new.jsonl", 6))
    cfg = tiny(
        tmp_path, start_from=str(second), train_data=rows, eval_data=further, max_eval_samples=4, max_steps=1
    )
    alone = prepare(cfg.replace(start_from=None))
    prep = prepare(cfg)
    n = len(prep.eval_rows)
    assert (alone.leakage["pairs"], prep.leakage["pairs"]) == (0, n) and prep.sets[0].leakage["pairs"] == 0
    with pytest.raises(DataError, match=f"all {n} evaluation pairs .*third.jsonl or of a run it starts from"):
        run_training(cfg)
    # a set that shares some pairs: the record and a later evaluation say how many
    mixed = tmp_path / "mixed.jsonl"
    lines = [Path(path).read_text().splitlines()[:2] for path in further.values()]
    write_jsonl(mixed, [dict(json.loads(line), id=i) for i, line in enumerate(chain(*lines))])
    run = run_training(cfg.replace(eval_data=str(mixed)))
    assert read_run(run).summary["leakage"]["pairs"] == 2
    report, _, beside = evaluate_run(run, data=further["also"])
    assert report["leakage"]["pairs"] == n and any("among the training rows" in line for line in beside)
    # rows that are learnt again are sought once
    again = tiny(tmp_path, start_from=str(first), train_data=str(tmp_path / "imitated.jsonl"))
    assert prepare(again).learnt_before == ([], [])
    # what is gone is named, not passed over
    (tmp_path / "imitated.jsonl").unlink()
    leaks = prepare(cfg.replace(eval_data=further["new"])).leakage
    [sentence] = [s for s in leakage_text(leaks) if first.name in s]
    assert "imitated.jsonl is gone or has changed" in sentence
    # as is a record of another version
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(config | dict(config=config["config"] | dict(gone_key=1))))
    report, _, beside = evaluate_run(second, data=further["new"])
    assert any("gone_key" in line and "were not looked for" in line for line in beside)
    Path(read_run(second).cfg.path("train_data")).unlink()
    report, _, beside = evaluate_run(second, data=rows)
    assert report["leakage"] is None and any("That was not looked for" in line for line in beside)
