"""The benchmark. Its contestants compute the same, and it notices if they do not. If one dies, the others go on."""

import json, os, signal, subprocess, sys, time

from swap import swap
import pytest
import torch

import nli_ft.bench
import nli_ft.bench_parts
import nli_ft.bench_train
import nli_ft.cpu_speed
from nli_ft.bench_parts import (
    VARIANTS,
    bench_config,
    same_mathematics,
    shapes_model,
    step_order,
    variant_config,
    with_weights,
)
from nli_ft.bench import bench_cli, bench_growth, growth_text
from nli_ft.bench_train import build_trainer, load_model, train_once
from nli_ft.process import ConfigError, project_root
from nli_ft.rows import sft_row
from nli_ft.files import write_jsonl
from nli_ft.preflight import prepare

root = project_root()


@pytest.fixture
def cfg(tmp_path):
    "fp32 and 12 rows of very different lengths: a mean of means, a shifted mask or another order would show."
    words = "red green blue black white grey brown pink".split()
    rows = [
        sft_row(
            i,
            "The box is " + " and ".join(words * (1 + i % 4)) + ".",
            f"The box is {words[i % 8]}.",
            " ".join(words[: 1 + i * 5 % 8]),
            i % 2,
            "test",
            "brief",
        )
        for i in range(12)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return bench_config(
        model="tiny-mistral",
        data=tmp_path / "rows.jsonl",
        device="cpu",
        compute_dtype="fp32",
        learning_rate=1e-2,
    )


def losses(cfg, name):
    return train_once(cfg, name, steps=3, rows_per_step=6, micro_batch=2, started=time.time())["losses"]


# -- the same mathematics


@pytest.mark.every
def test_every_variant_of_the_same_mathematics_has_the_same_losses_and_runs_what_its_name_says(
    cfg, monkeypatch
):
    import trl.kernels.chunked_logprob as kernel
    import nli_ft.bench_parts
    import nli_ft.bench_train
    import nli_ft.cpu_speed

    seen = []
    for head in (kernel.ChunkedLogProbFunction, nli_ft.cpu_speed._FrozenHead):
        monkeypatch.setattr(
            head,
            "forward",
            staticmethod(
                lambda ctx, hidden, *a, real=head.forward: (seen.append(len(hidden)), real(ctx, hidden, *a))[
                    1
                ]
            ),
        )
    swap(
        monkeypatch, "nli_ft.trainer.is_exact", lambda model: True
    )  # its trial scores seven tokens that belong to no row
    swap(monkeypatch, "nli_ft.cpu_speed.FEWEST", 1)  # the rows are few
    read, embed = [], torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: (read.append(ids.numel()), embed(self, ids))[1]
    )
    plain, computed = None, {}
    for name in filter(same_mathematics, VARIANTS):
        seen.clear()
        read.clear()
        made = train_once(cfg, name, steps=3, rows_per_step=6, micro_batch=2, started=time.time())
        plain = plain or made["losses"]
        assert made["losses"] == pytest.approx(plain, rel=1e-5), name
        assert sum(seen) == sum(s["scored"] for s in made["steps"]), (
            f"{name}: the head was not computed where the table says"
        )
        assert sum(read) == sum(s["padded"] for s in made["steps"]), (
            f"{name}: the blocks did not compute as many positions as the table says"
        )
        computed[name] = sum(read)
        assert len(seen) == 3 * (3 if VARIANTS[name]["micro_batches"] else 1), (
            f"{name}: not the micro-batches it should have"
        )
    assert computed["ours"] < computed["ours-whole-rows"], "no start was shared"
    assert len(plain) == 3 and abs(plain[2] / plain[0] - 1) > 1e-3, (
        "too little was learnt for the comparison to mean anything"
    )


def test_without_cpu_speed_nothing_of_it_is_called_and_the_losses_are_the_same(cfg, monkeypatch):
    import nli_ft.bench_train
    import nli_ft.cpu_speed
    import nli_ft.model

    called = set()
    for name in ("keep_freed_memory", "blocked_attention", "target_log_probs", "dequantised_once", "product"):
        real = getattr(nli_ft.cpu_speed, name)
        swap(
            monkeypatch,
            f"nli_ft.cpu_speed.{name}",
            lambda *a, name=name, real=real, **kw: (called.add(name), real(*a, **kw))[1],
        )
    slow = losses(cfg.replace(cpu_speed=False), "ours")
    assert called == set()
    assert losses(cfg, "ours") == pytest.approx(slow, rel=1e-5)
    assert len(called) == 5


def first_gradients(cfg, name, out):
    "Gradients of the adapter at the first step. B is not zero here, or A would have none."
    from transformers import TrainerCallback

    mine = variant_config(cfg, name, 6, 2)
    prep, model, seen = prepare(mine), load_model(mine, name), {}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05)

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    order = step_order([len(e) for e in prep.train], 1, 6, VARIANTS[name]["by_length"])
    trainer = build_trainer(mine, name, model, prep.tok, [prep.train[i] for i in order[0]], out, 1)
    trainer.add_callback(Look())
    trainer.train()
    return seen


def test_plain_and_ours_have_the_same_gradients_at_the_first_step(cfg, tmp_path):
    plain, ours = (first_gradients(cfg, n, tmp_path / n) for n in ("plain", "ours"))
    assert plain.keys() == ours.keys() and {n.split(".lora_")[1][0] for n in plain} == {"A", "B"}
    largest = max(g.abs().max() for g in plain.values())
    assert largest > 0 and all(g.abs().max() > 0 for g in plain.values())
    assert max((plain[n] - ours[n]).abs().max() for n in plain) <= 1e-5 * largest


def test_plain_is_trls_own_trainer_and_ours_is_the_one_that_nli_train_uses(cfg, tmp_path):
    from trl import SFTTrainer

    kinds = {}
    for name in ("plain", "ours", "ours-checkpointing"):
        mine = variant_config(cfg, name, 6, 2)
        prep = prepare(mine)
        trainer = build_trainer(mine, name, load_model(mine, name), prep.tok, prep.train[:6], tmp_path, 1)
        kinds[name] = type(trainer)
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        assert (
            any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
            == VARIANTS[name]["checkpointing"]
        ), name
    assert kinds["plain"] is SFTTrainer and kinds["ours"].__name__ == "NliTrainer"


def test_random_weights_of_a_models_shapes_train_like_any_other_model(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("NLI_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        nli_ft.bench_parts.SHAPES,
        "tiny-shapes",
        dict(
            nli_ft.bench_parts.SHAPES["mistral-7b-shapes"],
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        ),
    )
    shapes = cfg.replace(model_id="tiny-shapes")
    assert losses(shapes, "ours") == pytest.approx(losses(shapes, "plain"), rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["tiny-shapes", "tiny-shapes.lock"]
    again = with_weights(shapes)
    assert again.path("model_id") == shapes_model("tiny-shapes")
    names = {type(m).__name__ for m in load_model(variant_config(again, "ours", 6, 2)).modules()}
    assert "Linear4bit" in names
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("Usage", (), dict(free=10**9)))
    with pytest.raises(ConfigError, match=r"14\.5 GB"):
        shapes_model("mistral-7b-shapes")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cpu"):
        with_weights(cfg.replace(model_id="mistral-7b-shapes", device="auto"))


# -- children and exit codes. Real processes, which write what a run would have left instead of training.

CANNED = dict(
    plan=dict(
        rows=8,
        dropped=0,
        mean_tokens=20.0,
        linear=1000,
        head=100,
        dtype="float32",
        device="a CPU",
        threads=1,
        torch="-",
        cuda=False,
    ),
    matmul=dict(flops_per_s=1e9, ours=1e9),
    train=dict(
        losses=[2.0, 1.5, 1.0],
        stamps=[3.0, 4.0, 5.0],
        steps=[dict(tokens=100, trained=40, padded=120, scored=40)] * 3,
        checkpointing=False,
        head_twice=False,
        peak_gib=1.0,
        loaded_gib=0.5,
        dtype="float32",
        estimate_gib=1.1,
    ),
    plan_generate=dict(rows=3, dtype="float32", device="a CPU", threads=1, torch="-", cuda=False),
    generate=dict(seconds=2.0, labels=[1, 0, None], tokens=30, peak_gib=1.0),
)


@pytest.fixture
def pretend(monkeypatch):
    "pretend(ours=dict(losses=…)) or pretend(plain=SIGKILL): what a contestant leaves, or how it ends."

    def start(**special):
        def argv(job, arguments, orders, result):
            what = special.get(arguments.get("name"), {})
            if isinstance(what, int):
                return [sys.executable, "-c", f"import os; os.kill(os.getpid(), {what})"]
            if isinstance(what, str):
                return [sys.executable, "-c", f"raise RuntimeError({what!r})"]
            made = json.dumps(CANNED[job] | what)
            return [
                sys.executable,
                "-c",
                "import sys; open(sys.argv[1], 'w').write(sys.argv[2])",
                str(result),
                made,
            ]

        swap(monkeypatch, "nli_ft.bench_train.child_command", argv)

    return start


def run(capsys, *args):
    try:
        code = bench_cli([*args, "--model", "tiny-mistral"])
    except SystemExit as e:
        code = e.code
    got = capsys.readouterr()
    return code, got.out, got.err


def test_equal_losses_end_with_0_and_a_table(pretend, capsys):
    pretend()
    code, out, err = run(capsys, "train", "--steps", "3", "--pairs", "3")
    assert code == 0 and "same losses" in out and "4N a token" in out
    assert [l.split()[2].rstrip(":") for l in err.splitlines()] == [
        "plain",
        "ours",
        "ours",
        "plain",
        "plain",
        "ours",
    ]


@pytest.mark.parametrize(
    "tampered", [[2.0, 1.5, 1.0002], [2.001, 1.5, 1.0], [2.0, 1.5, float("nan")], [2.0, 1.5]]
)
def test_a_tampered_loss_ends_with_1_and_is_named(pretend, capsys, tampered):
    pretend(ours=dict(losses=tampered))
    code, out, _ = run(capsys, "train", "--steps", "3", "--pairs", "1")
    assert code == 1 and "LOSSES DIFFER: ours" in out and "same losses" not in out


def test_a_loss_that_differs_in_a_later_pair_only_is_noticed(pretend, capsys, monkeypatch):
    pretend()
    real, n = nli_ft.bench_train.run_child, []

    def third(job, cfg, **kw):
        made = real(job, cfg, **kw)
        if kw.get("name") == "ours" and (n.append(1) or len(n) == 2):
            made["losses"][1] *= 1.01
        return made

    swap(monkeypatch, "nli_ft.bench_train.run_child", third)
    code, out, _ = run(capsys, "train", "--steps", "3", "--pairs", "3")
    assert code == 1 and "LOSSES DIFFER: ours" in out


def test_another_number_format_is_shown_and_not_judged(pretend, capsys):
    pretend(**{"plain-bf16-adapter": dict(losses=[2.0, 1.4, 0.9])})
    code, out, _ = run(
        capsys, "train", "--steps", "3", "--pairs", "1", "--variants", "plain,plain-bf16-adapter,ours"
    )
    assert code == 0 and "1.0e-01*" in out and "not judged" in out


@pytest.mark.parametrize(
    "end, said",
    [
        (int(signal.SIGKILL), "memory runs out"),
        (int(signal.SIGSEGV), "SIGSEGV"),
        ("CUDA out of memory. Tried to allocate", "out of memory"),
        ("odd", "RuntimeError: odd"),
    ],
)
def test_a_contestant_that_dies_is_reported_and_the_rest_stands(pretend, capsys, end, said):
    pretend(plain=end)
    code, out, err = run(
        capsys, "train", "--steps", "3", "--pairs", "2", "--variants", "plain,ours,ours-one-batch"
    )
    row = {l.split()[0]: l for l in out.splitlines() if l.strip()}
    assert code == 1 and "plain died" in out and said in out
    assert "100.0" in row["ours"] and "100.0" in row["ours-one-batch"]
    assert err.count("plain:") == 1, "one that died is not tried again"


def test_labels_that_differ_end_with_1(pretend, capsys):
    pretend()
    assert run(capsys, "generate", "--pairs", "1")[0] == 0
    pretend(ours=dict(labels=[1, 1, None]))
    code, out, _ = run(capsys, "generate", "--pairs", "1")
    assert code == 1 and "LABELS DIFFER: ours" in out and "66.7%" in out
    pretend(**{"label-only": dict(labels=[0, 1, 1])})
    assert run(capsys, "generate", "--pairs", "1")[0] == 0, "another question may have other answers"


def test_json_and_output_hold_everything_and_nothing_is_overwritten(pretend, capsys, tmp_path):
    pretend()
    _, out, _ = run(
        capsys, "train", "--steps", "3", "--pairs", "1", "--json", "--output", str(tmp_path / "b.json")
    )
    made = json.loads(out)
    assert made == json.loads((tmp_path / "b.json").read_text())
    assert [r["name"] for r in made["runs"]] == ["plain", "ours"] and made["settings"]["config"]["config"][
        "lora_dropout"
    ] == 0
    # 2 timed steps of 100 tokens in 2 s, with 4*1000*100 + 4*100*40 FLOPs a step
    ours = made["summary"]["contestants"]["ours"]
    assert (
        ours["tokens_per_s"] == [100.0]
        and ours["flops_per_s"] == 416_000
        and ours["estimate_error"] == pytest.approx(0.1)
    )
    code, _, err = run(capsys, "train", "--output", str(tmp_path / "b.json"))
    assert code == 2 and "not overwritten" in err


@pytest.mark.parametrize(
    "args, said",
    [
        (["train", "--variants", "plain,our"], "our"),
        (["train", "--steps", "1"], "--steps"),
        (["train", "--micro_batch", "5"], "does not divide"),
        (["generate", "--run", "x"], "--model"),
        (["growth", "--length", "a"], "--length"),
        (["train", "--config", "ablaton2"], "ablation2"),
    ],
)
def test_mistakes_in_the_arguments_start_nothing(pretend, capsys, args, said, monkeypatch):
    swap(monkeypatch, "nli_ft.bench_train.run_child", lambda *a, **k: pytest.fail("a child was started"))
    code, _, err = run(capsys, *args)
    assert code == 2 and said in err


def test_what_is_missing_is_said_in_full_by_the_child_that_looks(capsys, tmp_path):
    made = nli_ft.bench_train.run_child(
        "plan", bench_config(model="tiny-mistral", data=tmp_path / "nowhere.jsonl", device="cpu")
    )
    assert made["refused"] and "train_data" in made["died"] and "eval_data" in made["died"]


@pytest.mark.every
def test_growth_measures_every_axis(cfg, monkeypatch):
    swap(
        monkeypatch,
        "nli_ft.bench_train.run_child",
        lambda job, cfg, **kw: nli_ft.bench_train.JOBS[job](cfg, **kw),
    )
    made = bench_growth(cfg, dict(rows=[8, 16], length=[16, 32], batch=[1, 2], rank=[2, 4]), steps=2)
    assert {
        k: (len(a["seconds"]), all(t > 0 for t in a["seconds"])) for k, a in made["axes"].items()
    } == dict.fromkeys(["rows", "length", "batch", "rank"], (2, True))
    assert all(word in growth_text(made) for word in ("exponent", "expected", "rank"))


def test_help_needs_no_torch():
    for sub in ([], ["train"], ["generate"], ["growth"]):
        r = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "nli_ft.bench", *sub, "--help"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert r.returncode == 0 and "usage: nli_bench" in r.stdout
        assert not {"torch", "transformers", "trl", "datasets", "pandas", "scipy"} & {
            l.rpartition("|")[2].strip() for l in r.stderr.splitlines()
        }


@pytest.mark.every
def test_the_whole_command_with_real_contestants():
    small = ["--model", "tiny-mistral", "--device", "cpu", "--dtype", "fp32", "--pairs", "1", "--json"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(*args):
        r = subprocess.run(
            [sys.executable, "-m", "nli_ft.bench", *args, *small],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=1200,
            env=env,
        )
        assert r.returncode == 0, r.stderr[-2000:]
        return json.loads(r.stdout)

    made = command("train", "--rows_per_step", "4", "--micro_batch", "2", "--steps", "2")
    assert all(
        0.2 < c["peak_gib"] < 6 and c["max_loss_difference"] <= 1e-5
        for c in made["summary"]["contestants"].values()
    )
    made = command("generate", "--rows", "4", "--max_new_tokens", "8")
    assert (
        list(made["summary"]["contestants"]) == ["plain", "plain-to-limit", "ours", "label-only"]
        and made["summary"]["contestants"]["ours"]["same_labels"] == 1
    )
