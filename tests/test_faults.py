"""Faults: kills, signals, full disks, damaged files, numbers that are not finite. What the user made stays, and
the message says what to do.

Faults that records meet without a training run (two runs in one second, a dead kernel, unreadable records)
are in test_records.py."""

import contextlib, json, os, random, re, shutil, signal, subprocess, sys, time, zlib
from pathlib import Path

from swap import swap
import pytest

from nli_ft.process import ConfigError, RecordError, project_root
from nli_ft.config_loader import load_config
from nli_ft.rows import MANIFEST, damage, seal
from nli_ft.files import write_jsonl
from nli_ft.process import Interrupted
from nli_ft.records import TrainingStopped, list_runs, read_metrics, read_run
from nli_ft.trainer import EpochOrder
from nli_ft.train_sft import Session, memory_advice, run_training
from nli_ft.checkpoints import find_checkpoint
from nli_ft.fit import resume_point
from nli_ft.preflight import prepare

root = project_root()
# with dropout, two micro-batches a step and four epochs of three steps, all generators and counters matter
TINY = dict(
    model_id="tiny-mistral",
    device="cpu",
    compute_dtype="fp32",
    lora_dropout=0.1,
    learning_rate=1e-2,
    logging_steps=1,
    max_train_samples=12,
    batch_size=2,
    grad_accumulation_steps=2,
    max_steps=None,
    num_epochs=4,
    save_steps=1,
    eval_before=False,
    max_eval_samples=4,
    max_new_tokens=4,
)


def settings(tmp_path, **kw):
    return TINY | dict(output_dir=str(tmp_path / "models"), runs_dir=str(tmp_path / "runs")) | kw


def tiny(tmp_path, **kw):
    return load_config("minimal_test", settings(tmp_path, **kw))


def checkpoints(tmp_path):
    return sorted(tmp_path.glob("models/*/*/checkpoint-*"), key=lambda p: p.stat().st_mtime)


def summary(run):
    return json.loads((run / "summary.json").read_text())


def only_run(tmp_path):
    [run] = [p.parent for p in tmp_path.glob("runs/*/*/summary.json")]
    return run


def curve(run):
    "Everything that a run logged about learning, step by step."
    keys = (
        "step",
        "loss",
        "eval_loss",
        "loss_thought",
        "loss_label",
        "eval_loss_label",
        "learning_rate",
        "grad_norm",
        "epoch",
        "tokens",
    )
    return [{k: m[k] for k in keys if k in m} for m in read_metrics(run) if "loss" in m or "eval_loss" in m]


def adapter(run):
    return (root / summary(run)["adapter"] / "adapter_model.safetensors").read_bytes()


# -- the harness of the kill tests: this file run as a script. It imports once and forks, because an import
# costs more than a run.


def _attempt(cfg, trace, kill):
    """One run in a forked child. Every file operation, save and micro-batch is an event. SIGKILL comes at the event
    `kill` (or at a path)."""
    import safetensors.torch, torch, transformers

    torch.set_num_threads(1)
    here, count = (str(cfg.path("output_dir")), str(cfg.path("runs_dir"))), 0

    def event(path="", half=None):
        nonlocal count
        count += 1
        if count == kill or (isinstance(kill, str) and kill in path):
            if half is not None:
                os.truncate(half, os.path.getsize(half) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name, args):
        if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(args[0]).startswith(
            here
        ):
            event(str(args[0]))

    def torn(real):  # Python does not see these writes: the kill comes when half of the file is there
        def save(obj, path, *a, **kw):
            real(obj, path, *a, **kw)
            if str(path).startswith(here):
                event(str(path), half=path)

        return save

    torch.save = torn(torch.save)
    safetensors.torch.serialize_file = torn(safetensors.torch.serialize_file)
    step = transformers.Trainer.training_step

    def training_step(self, model, inputs, *a, **kw):
        event()
        with open(trace, "a") as f:
            f.write(f"{self.state.global_step} {zlib.crc32(inputs['input_ids'].numpy().tobytes())}\n")
        loss = step(self, model, inputs, *a, **kw)
        event()
        return loss

    transformers.Trainer.training_step = training_step
    sys.addaudithook(audit)
    run = run_training(cfg)
    Path(f"{trace}.events").write_text(str(count))
    return run


def _forked(overrides, trace, kill):
    "Exit status of an attempt in a child: 0 done, -9 killed."
    pid = os.fork()
    if pid == 0:
        try:
            cfg = load_config("minimal_test", overrides)
            _attempt(cfg, trace, kill)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _latest(overrides):
    try:
        return (
            "latest"
            if find_checkpoint(load_config("minimal_test", overrides | dict(resume_from_checkpoint="latest")))
            else None
        )
    except ConfigError:
        return None


def kill_often(tmp, kills, seed, overrides):
    "One run without a kill in `tmp`/whole. Then one in `tmp`/cut that is killed `kills` times and goes on each time."
    import safetensors.torch, transformers, trl, peft, bitsandbytes  # noqa: F401 — once, for all children
    from trl import SFTTrainer  # noqa: F401

    def there(name):
        return overrides | dict(output_dir=f"{tmp}/{name}/models", runs_dir=f"{tmp}/{name}/runs")

    assert _forked(there("whole"), f"{tmp}/whole.trace", None) == 0
    events, rng = int(Path(f"{tmp}/whole.trace.events").read_text()), random.Random(seed)
    for i in range(kills):
        kill = (
            rng.randrange(1, events // 8) if i < kills - 1 else "/adapter/"
        )  # the last one when all steps are done and the adapter is being written
        print(f"kill {i + 1} at event {kill} of {events}", flush=True)
        assert (
            _forked(
                there("cut") | dict(resume_from_checkpoint=_latest(there("cut"))), f"{tmp}/cut.trace", kill
            )
            == -9
        ), "it was to be killed"
    assert _forked(there("cut") | dict(resume_from_checkpoint="latest"), f"{tmp}/cut.trace", None) == 0


def trace(path):
    "Global step -> its micro-batches, for every time that the step began."
    seen = {}
    for line in path.read_text().splitlines():
        step, crc = line.split()
        seen.setdefault(int(step), []).append(crc)
    return seen


def harness(what, *args):
    return subprocess.run(
        [sys.executable, __file__, what, *map(str, args)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(root),
        },
    )


# -- kill and resume


SHUFFLED = dict(group_by_length=False, save_steps=2, logging_steps=3, save_total_limit=1)
STOPS_EARLY = dict(
    eval_steps=2,
    save_steps=2,
    early_stopping_patience=2,
    learning_rate=0.3,
    lr_scheduler="constant",
    warmup_ratio=0.0,
    max_grad_norm=None,
)


@pytest.mark.every
@pytest.mark.parametrize(
    "kills, seed, kw",
    [
        pytest.param(5, 1, {}, id="five kills"),
        pytest.param(
            3, 2, SHUFFLED, id="shuffled, logged between checkpoints, one kept", marks=pytest.mark.every
        ),
        pytest.param(3, 3, STOPS_EARLY, id="early stopping", marks=pytest.mark.every),
    ],
)
def test_a_run_killed_again_and_again_ends_as_if_it_had_never_been(tmp_path, kills, seed, kw):
    r = harness("kill_often", tmp_path, kills, seed, json.dumps(TINY | kw))
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    [whole] = [p.parent for p in tmp_path.glob("whole/runs/*/*/summary.json")]
    statuses = {row["status"]: row["path"] for row in list_runs(tmp_path / "cut" / "runs")}
    assert set(statuses) <= {
        "died",
        "done",
        "unreadable",
    }  # unreadable: killed between making its folder and the first file in it
    cut = Path(statuses["done"])
    assert curve(cut) == curve(whole), (
        "losses, learning rates and gradient norms are the same to the last bit"
    )
    assert adapter(cut) == adapter(whole)
    want, got = trace(tmp_path / "whole.trace"), trace(tmp_path / "cut.trace")
    for step, crcs in got.items():  # a step that was cut off and repeated had the same rows each time
        assert set(crcs) <= set(want[step]) and crcs[-len(want[step]) :] == want[step], f"step {step}"
    assert summary(cut)["train_loss"] == summary(whole)["train_loss"] and "resumed_from" in summary(cut)
    assert r.stdout.count("going on from") >= 1


@pytest.mark.parametrize(
    "kw, steps, total",
    [
        # the end of an epoch, whose evaluation belongs to it, and the middle of one
        pytest.param(dict(), (3, 5), 12, marks=pytest.mark.every),
        pytest.param(
            dict(group_by_length=False, save_steps=2, logging_steps=3), (4, 8), 12, marks=pytest.mark.every
        ),  # between two logs
        (
            dict(
                eval_steps=1,
                early_stopping_patience=3,
                learning_rate=1.0,
                max_grad_norm=None,
                lr_scheduler="constant",
                warmup_ratio=0.0,
            ),
            (-2, -3),
            None,
        ),
    ],  # patience half used up
    ids=["epochs", "between logs", "early stopping"],
)
def test_every_kind_of_checkpoint_leads_to_the_same_end(tmp_path, kw, steps, total):
    whole = run_training(tiny(tmp_path, save_total_limit=20, **kw))
    there = by_step(tmp_path)
    n = summary(whole)["steps"]
    assert n == total or (total is None and 3 < n < 12)
    for step in steps:
        run = run_training(
            tiny(
                tmp_path,
                save_total_limit=20,
                resume_from_checkpoint=str(there[step if step > 0 else n + step + 1]),
                **kw,
            )
        )
        assert summary(run)["steps"] == n and curve(run) == curve(whole) and adapter(run) == adapter(whole), (
            step
        )


# -- checkpoints: whole, damaged, of another run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of three steps with a checkpoint at each. Tests that damage it work on a copy."
    tmp = tmp_path_factory.mktemp("finished")
    return tmp, run_training(tiny(tmp, num_epochs=1, save_total_limit=3))


@pytest.fixture
def copied(finished, tmp_path):
    "(folder of a copy, its run, its config with `resume_from_checkpoint=latest`)"
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return (
        tmp_path,
        only_run(tmp_path),
        tiny(tmp_path, num_epochs=1, save_total_limit=3, resume_from_checkpoint="latest"),
    )


def by_step(tmp_path):
    return {int(p.name.rpartition("-")[2]): p for p in checkpoints(tmp_path)}


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda d: (d / MANIFEST).unlink(), "not saved to its end"),
        (lambda d: (d / MANIFEST).write_text("{"), "cannot be read"),
        (lambda d: os.truncate(d / "optimizer.pt", 100), "optimizer.pt has changed"),
        (lambda d: (d / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (
            lambda d: (d / "adapter_model.safetensors").write_bytes(
                bytes([(b := bytearray((d / "adapter_model.safetensors").read_bytes()))[0] ^ 1]) + b[1:]
            ),
            "adapter_model.safetensors has changed",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over_aloud_and_never_resumed_from(copied, spoil, why):
    tmp, _, cfg = copied
    found = by_step(tmp)
    spoil(found[3])
    said = []
    assert find_checkpoint(cfg, said.append) == found[2]
    assert len(said) == 1 and "checkpoint-3" in said[0] and why in said[0]
    with pytest.raises(ConfigError, match=why):
        find_checkpoint(cfg.replace(resume_from_checkpoint=str(found[3])))
    assert find_checkpoint(cfg.replace(resume_from_checkpoint=str(found[1]))) == found[1]


def test_with_no_whole_checkpoint_latest_is_refused_before_a_record_is_opened(copied):
    tmp, _, cfg = copied
    for p in checkpoints(tmp):
        (p / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="no whole checkpoint of config 'minimal_test' with seed 42"):
        run_training(cfg)
    assert only_run(tmp)


def save_time(checkpoint, seconds):
    "Change the time at which a checkpoint says it was saved."
    info = json.loads((checkpoint / "resume.json").read_text())
    (checkpoint / "resume.json").write_text(json.dumps(info | dict(saved=seconds)))
    seal(checkpoint)


def test_latest_is_of_this_config_and_seed_and_has_the_most_steps_whatever_the_clock_said(copied):
    tmp, _, cfg = copied
    found = by_step(tmp)
    os.utime(found[1])  # a copy or a backup changes the times of folders
    assert find_checkpoint(cfg) == found[3]
    save_time(found[1], time.time() + 1e6)  # a clock that was set back after it
    assert find_checkpoint(cfg) == found[3]
    ten = found[3].with_name("checkpoint-10")
    found[2].rename(ten)  # a number, not a word
    found[1].rename(found[1].with_name("checkpoint-11.bak"))  # somebody's copy
    assert find_checkpoint(cfg) == ten
    shutil.copytree(ten.parent, ten.parents[1] / "later")
    save_time(ten.parents[1] / "later" / "checkpoint-3", time.time() + 2e6)
    assert find_checkpoint(cfg) == ten.parents[1] / "later" / "checkpoint-10", (
        "of two runs the one that saved last"
    )
    with pytest.raises(ConfigError, match="seed 7"):
        find_checkpoint(cfg.replace(seed=7))
    with pytest.raises(ConfigError, match="no whole checkpoint of config 'cpu_demo'"):
        find_checkpoint(
            load_config("cpu_demo", dict(output_dir=str(tmp / "models"), resume_from_checkpoint="latest"))
        )


def test_a_checkpoint_with_a_planted_pickle_is_not_executed(copied):
    "This holds even if the manifest fits: tensors are read with weights_only."
    tmp, _, cfg = copied
    import pickle, torch

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp / "pwned"),))

    at = by_step(tmp)[2]
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        kept = (at / name).read_bytes()
        torch.save({"state": Bomb()}, at / name)
        seal(at)
        with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
            run_training(cfg.replace(resume_from_checkpoint=str(at)))
        assert not (tmp / "pwned").exists(), name
        (at / name).write_bytes(kept)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp / "pwned").exists(), "the bomb itself works"


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(num_epochs=2), "steps in all: 3 in the checkpoint, 6 now"),
        (dict(max_steps=8), "steps in all: 3 in the checkpoint, 8 now"),
        (dict(learning_rate=5e-3), "learning_rate: 0.01 in the checkpoint, 0.005 now"),
        (dict(max_train_samples=16, num_epochs=0.75), "training rows"),
        (dict(seed=7), "seed: 42 in the checkpoint, 7 now"),
        (dict(distributed_training=True, num_processes=2), "processes: 1 in the checkpoint, 2 now"),
    ],
)
def test_going_on_as_another_run_is_refused_with_the_difference_unless_it_is_meant(copied, change, said):
    tmp, _, cfg = copied
    other = cfg.replace(resume_from_checkpoint=str(by_step(tmp)[2]), **change)
    with pytest.raises(ConfigError, match=said) as e:
        resume_point(prepare(other))
    assert "--allow_changed" in str(e.value)
    told = []
    assert resume_point(prepare(other.replace(allow_changed=True)), told.append) == by_step(tmp)[2]
    assert said in told[-1]


def test_other_rows_under_the_same_name_are_noticed_and_the_same_rows_under_another_name_are_not(tmp_path):
    from nli_ft.rows import sft_row

    def rows(name, word):
        write_jsonl(
            tmp_path / name,
            [
                sft_row(i, f"Dog {i} {word}.", f"A dog {word}.", f"dog {i} is a dog", i % 2, "test", "brief")
                for i in range(12)
            ],
            overwrite=True,
        )

    rows("a.jsonl", "barked"), rows("b.jsonl", "ran")
    cfg = tiny(
        tmp_path, train_data=str(tmp_path / "a.jsonl"), eval_data=str(tmp_path / "b.jsonl"), num_epochs=1
    )
    run_training(cfg)
    (
        (tmp_path / "a.jsonl").rename(tmp_path / "moved.jsonl"),
        (tmp_path / "b.jsonl").rename(tmp_path / "moved_too.jsonl"),
    )
    moved = cfg.replace(
        train_data=str(tmp_path / "moved.jsonl"),
        eval_data=str(tmp_path / "moved_too.jsonl"),
        resume_from_checkpoint="latest",
    )
    assert resume_point(prepare(moved))
    rows("a.jsonl", "slept"), rows("b.jsonl", "sat")
    with pytest.raises(ConfigError, match="training rows .*\n.*evaluation rows"):
        resume_point(prepare(cfg.replace(resume_from_checkpoint="latest")))


def test_the_command_refuses_with_2_and_a_changed_run_records_that_it_was_allowed(copied, capsys):
    from nli_ft.train_sft import train_cli

    tmp, run, cfg = copied
    at = by_step(tmp)[2]
    args = [a for a in cfg.replace(resume_from_checkpoint=str(at)).to_args()] + ["--learning_rate=0.005"]
    args = [a for a in args if not a.startswith("--learning_rate=0.01")]
    with pytest.raises(SystemExit) as e:
        train_cli(args)
    assert e.value.code == 2 and "learning_rate: 0.01 in the checkpoint, 0.005 now" in capsys.readouterr().err
    assert train_cli([*args, "--allow_changed"]) == 0
    [new] = [
        Path(r["path"]) for r in list_runs(tmp / "runs") if r["status"] == "done" and Path(r["path"]) != run
    ]
    assert summary(new)["resumed_from"].endswith("checkpoint-2") and read_run(new).cfg.allow_changed
    assert "changed: learning_rate: 0.01 in the checkpoint, 0.005 now" in capsys.readouterr().out


def test_the_checkpoints_with_the_fewest_steps_are_deleted_and_the_best_one_stays_whatever_their_times(
    tmp_path, monkeypatch
):
    import nli_ft.cpu_speed
    import nli_ft.fit
    import nli_ft.predict
    import nli_ft.preflight
    import nli_ft.records
    import nli_ft.rows

    real = nli_ft.rows.seal

    def seal(folder):
        real(folder)
        name, _, step = Path(folder).name.partition("-")
        if name != "checkpoint":
            return
        os.utime(folder, (1e9 - int(step) * 1e6,) * 2)  # the newer, the older
        if step == "9":
            shutil.copytree(folder, Path(folder).with_name("checkpoint-1.mine"))

    swap(monkeypatch, "nli_ft.rows.seal", seal)
    run_training(tiny(tmp_path, save_total_limit=3))
    assert {p.name for p in checkpoints(tmp_path)} == {
        "checkpoint-10",
        "checkpoint-11",
        "checkpoint-12",
        "checkpoint-1.mine",
    }


@pytest.mark.parametrize("last_act", ["seal", "_save_optimizer_and_scheduler"])
def test_the_checkpoint_before_is_deleted_only_when_the_new_one_is_whole(tmp_path, monkeypatch, last_act):
    "A kill between the two, with only one checkpoint to be kept."
    import transformers
    import nli_ft.cpu_speed
    import nli_ft.fit
    import nli_ft.predict
    import nli_ft.preflight
    import nli_ft.records
    import nli_ft.rows

    owner = nli_ft.rows if last_act == "seal" else transformers.Trainer
    real, calls = getattr(owner, last_act), []

    def die(*a):
        calls.append(a)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a)

    if last_act == "seal":
        swap(monkeypatch, "nli_ft.rows.seal", die)
    else:
        monkeypatch.setattr(owner, last_act, die)
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny(tmp_path, save_total_limit=1))
    said = []
    assert (
        find_checkpoint(tiny(tmp_path, resume_from_checkpoint="latest"), said.append) == by_step(tmp_path)[2]
    )
    assert "checkpoint-3: it was not saved to its end" in said[0]


@pytest.mark.every
@pytest.mark.parametrize(
    "kw, steps",
    [
        (dict(max_steps=4), lambda n: n == 4),  # in the middle of the second epoch
        (
            dict(
                eval_steps=1,
                early_stopping_patience=1,
                learning_rate=1.0,
                max_grad_norm=None,
                lr_scheduler="constant",
                warmup_ratio=0.0,
            ),
            lambda n: n < 12,
        ),
    ],
    ids=["all steps", "stopped early"],
)
def test_finished_training_is_not_trained_one_step_more(tmp_path, kw, steps):
    "A kill after the last checkpoint, before the adapter is saved."
    run = run_training(tiny(tmp_path, **kw))
    again = run_training(tiny(tmp_path, resume_from_checkpoint="latest", **kw))
    assert steps(summary(run)["steps"]) and summary(again)["steps"] == summary(run)["steps"]
    assert adapter(again) == adapter(run) and curve(again) == curve(run)


def test_intervals_given_on_resuming_are_kept_to(copied):
    tmp, _, cfg = copied
    new = run_training(
        cfg.replace(resume_from_checkpoint=str(by_step(tmp)[1]), save_steps=3, logging_steps=3)
    )
    assert {p.name for p in (tmp / "models" / "minimal_test" / new.name).glob("checkpoint-*")} == {
        "checkpoint-3"
    }
    assert [m["step"] for m in read_metrics(new) if "loss" in m] == [1, 3]


def test_a_lost_best_checkpoint_is_said_before_training(tmp_path):
    cfg = tiny(
        tmp_path,
        eval_steps=1,
        early_stopping_patience=5,
        learning_rate=1.0,
        max_grad_norm=None,
        num_epochs=1,
        save_total_limit=3,
        lr_scheduler="constant",
        warmup_ratio=0.0,
    )
    run_training(cfg)
    last = by_step(tmp_path)[3]
    best = Path(json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best != last, "a learning rate of 1 must get worse"
    shutil.rmtree(best)
    with pytest.raises(ConfigError, match="needs the best checkpoint"):
        resume_point(prepare(cfg.replace(resume_from_checkpoint="latest")))


def test_the_order_of_an_epoch_is_the_same_in_every_process_whatever_was_drawn_before():
    import torch

    order = EpochOrder([i % 5 + 1 for i in range(40)], 42, 8)
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        order.set_epoch(3)
        seen.append(list(order))
    assert seen[0] == seen[1] and sorted(seen[0]) == list(range(40))


# -- signals


def started(tmp_path, *args, until=2, module="nli_ft.train_sft", ignores_hangup=False, **env):
    "A running command whose training has logged `until` steps."
    unchecked = ["--no_check"] if module == "nli_ft.launch" else []  # tests/test_nli.py has the check
    over = [
        f"--{k}={','.join(v) if isinstance(v, list) else str(v).lower() if not isinstance(v, str) else v}"
        for k, v in settings(tmp_path, num_epochs=400, save_steps=1000).items()
    ]
    p = subprocess.Popen(
        [sys.executable, "-m", module, "--config", "minimal_test", *over, *args, *unchecked],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignores_hangup else None,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | env,
    )
    for _ in range(1200):
        logged = [
            m
            for f in tmp_path.glob("runs/*/*/metrics.jsonl")
            for m in f.read_text().splitlines()
            if '"loss"' in m
        ]
        if len(logged) >= until:
            return p
        if p.poll() is not None:
            break
        time.sleep(0.1)
    p.kill()
    raise AssertionError("never started: " + "".join(p.communicate()))


@pytest.mark.parametrize(
    "sig, code",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.every),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.every),
    ],
)
def test_a_signal_ends_the_step_saves_closes_the_record_and_says_how_to_go_on(tmp_path, sig, code):
    p = started(tmp_path)
    p.send_signal(sig)
    out, err = p.communicate(timeout=120)
    assert p.returncode == code, err
    run = only_run(tmp_path)
    [at] = checkpoints(tmp_path)
    step = int(at.name.rpartition("-")[2])
    assert damage(at) is None and summary(run)["status"] == "interrupted"
    assert [m["step"] for m in read_metrics(run) if "loss" in m] == list(range(1, step + 1)), (
        "every step that was trained is logged"
    )
    for text in (err, summary(run)["error"]):
        assert (
            f"stopped after step {step} of 1200" in text
            and at.name in text
            and "--resume_from_checkpoint=latest" in text
        )
    assert "Traceback" not in err
    assert (
        resume_point(
            prepare(tiny(tmp_path, num_epochs=400, save_steps=1000, resume_from_checkpoint="latest"))
        )
        == at
    )


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """With a stop in the middle of an epoch, where transformers would evaluate, count it against the patience
    and delete the checkpoint."""
    import transformers

    kw = dict(early_stopping_patience=9, save_steps=None, save_total_limit=1)
    whole = run_training(tiny(tmp_path / "whole", **kw))
    step, real = {"n": 0}, transformers.Trainer.training_step

    def training_step(self, *a, **k):
        step["n"] += 1
        if step["n"] == 2 * 5:
            os.kill(os.getpid(), signal.SIGINT)  # in step 5: the second of epoch 2
        return real(self, *a, **k)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    with pytest.raises(Interrupted, match="stopped after step 5 of 12"):
        run_training(tiny(tmp_path / "cut", **kw))
    monkeypatch.undo()
    first = only_run(tmp_path / "cut")
    assert [m["epoch"] for m in read_metrics(first) if "eval_loss" in m] == [1.0]
    run = run_training(tiny(tmp_path / "cut", resume_from_checkpoint="latest", **kw))
    assert curve(run) == curve(whole) and adapter(run) == adapter(whole)


@pytest.mark.parametrize("sig, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_outside_of_training_closes_the_record_too_and_a_second_one_does_not_disturb_that(
    tmp_path, monkeypatch, sig, code
):
    import nli_ft.cpu_speed
    import nli_ft.fit
    import nli_ft.predict
    import nli_ft.preflight
    import nli_ft.records
    import nli_ft.rows

    real = nli_ft.records.close_failed

    def close_failed(*args, **kw):
        os.kill(os.getpid(), signal.SIGHUP)
        real(*args, **kw)

    swap(monkeypatch, "nli_ft.records.close_failed", close_failed)
    monkeypatch.setattr(Session, "judge", lambda self, when: os.kill(os.getpid(), sig) or time.sleep(5))
    before = signal.getsignal(sig)
    with pytest.raises(Interrupted) as e:
        run_training(tiny(tmp_path, eval_before=True))
    assert e.value.exit_code == code and signal.getsignal(sig) == before
    assert summary(only_run(tmp_path))["status"] == "interrupted"


def test_a_signal_while_the_record_of_a_failed_run_is_closed_does_not_leave_it_open(tmp_path, monkeypatch):
    import nli_ft.cpu_speed
    import nli_ft.fit
    import nli_ft.predict
    import nli_ft.preflight
    import nli_ft.records
    import nli_ft.rows

    real = nli_ft.records.close_failed

    def close_failed(*args, **kw):
        os.kill(os.getpid(), signal.SIGHUP)
        real(*args, **kw)

    def judge(self, when):
        raise RuntimeError("no such thing")

    swap(monkeypatch, "nli_ft.records.close_failed", close_failed)
    monkeypatch.setattr(Session, "judge", judge)
    with pytest.raises(RuntimeError):
        run_training(tiny(tmp_path, eval_before=True))
    assert summary(only_run(tmp_path))["status"] == "failed"


@pytest.mark.every
@pytest.mark.parametrize(
    "module", [pytest.param("nli_ft.train_sft", marks=pytest.mark.every), "nli_ft.launch"]
)
def test_a_reader_that_left_and_a_hangup_that_comes_with_sigterm_leave_one_whole_checkpoint(tmp_path, module):
    """This happens when a window with `nli_run … | tee log` is closed, or a session ends: both signals come, and
    nobody reads any more."""
    p = started(tmp_path, module=module)
    p.stdout.close(), p.stderr.close()
    for sig in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        p.send_signal(sig)
    assert p.wait(timeout=120) in (129, 143)  # if two signals wait, the system does not say which came first
    [at] = checkpoints(tmp_path)
    run = summary(only_run(tmp_path))
    assert damage(at) is None and run["status"] == "interrupted" and at.name in run["error"]


@pytest.mark.every
def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path):
    p = started(tmp_path, "--num_epochs=4", ignores_hangup=True)
    p.stdout.close()  # of the `tee` that was not started by nohup
    p.send_signal(signal.SIGHUP)
    assert p.wait(timeout=120) == 0 and summary(only_run(tmp_path))["status"] == "done"


@pytest.mark.every
def test_a_terminal_that_closes_ends_the_step_and_saves(tmp_path):
    import fcntl, pty, termios

    master, slave = pty.openpty()

    def lead():
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    code = [
        sys.executable,
        "-m",
        "nli_ft.train_sft",
        *tiny(tmp_path, num_epochs=400, save_steps=1000).to_args(),
    ]
    p = subprocess.Popen(
        code,
        cwd=root,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=lead,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    os.close(slave)
    seen = b""
    while b"step     2" not in seen:
        seen += os.read(master, 4096)
    os.close(master)
    assert p.wait(timeout=120) == 129
    [at] = checkpoints(tmp_path)
    assert damage(at) is None and summary(only_run(tmp_path))["status"] == "interrupted"


@pytest.mark.every
def test_ctrl_c_in_the_notebook_of_a_run_saves_and_says_how_to_go_on(tmp_path):
    p = started(tmp_path, module="nli_ft.launch")
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130, err
    run, [at] = only_run(tmp_path), checkpoints(tmp_path)
    assert summary(run)["status"] == "interrupted" and damage(at) is None
    for text in (err, summary(run)["error"]):
        assert at.name in text and "--resume_from_checkpoint=latest" in text


# -- numbers that are not finite


@pytest.fixture
def poisoned(monkeypatch):
    "Make the log-probabilities of a row NaN (or its gradient infinite) wherever it occurs. Return the row's id."
    import torch
    import nli_ft.cpu_speed
    import nli_ft.fit
    import nli_ft.predict
    import nli_ft.preflight
    import nli_ft.records
    import nli_ft.rows

    def poison(prep, value, row=7):
        target = torch.tensor([y for y in prep.train[row].labels if y != -100])
        real = nli_ft.cpu_speed.target_log_probs

        def log_probs(hidden, head, labels):
            out = real(hidden, head, labels)
            at = next(
                (
                    i
                    for i in range(len(labels) - len(target) + 1)
                    if torch.equal(labels[i : i + len(target)], target)
                ),
                None,
            )
            if at is None:
                return out
            if value != "gradient":
                return out * value
            out.register_hook(lambda g: g * float("inf"))
            return out

        swap(monkeypatch, "nli_ft.cpu_speed.target_log_probs", log_probs)
        return str(prep.train_rows[row]["id"])

    return poison


@pytest.mark.parametrize(
    "value, said",
    [
        (float("nan"), "the loss is nan"),
        (float("inf"), "the loss is inf"),
        ("gradient", "the gradient's norm is"),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run_before_the_weights_and_names_the_rows(
    tmp_path, poisoned, capsys, value, said
):
    from nli_ft.train_sft import train_cli

    cfg = tiny(tmp_path, save_total_limit=1, eval_steps=1000)
    bad = poisoned(prepare(cfg), value)
    with pytest.raises(SystemExit) as e:
        train_cli(cfg.to_args())
    assert e.value.code == 1
    run, err = only_run(tmp_path), capsys.readouterr().err
    s, steps = summary(run), [m["step"] for m in read_metrics(run) if "loss" in m]
    assert s["status"] == "failed" and f"step {len(steps) + 1}: {said}" in s["error"]
    named = re.search(r"Rows of the batch: (.*?)\. Look", s["error"])[1].split(", ")
    assert bad in named and len(named) == (2 if value != "gradient" else 4), (
        "the micro-batch of the row, or the step where only the gradient tells"
    )
    assert "learning_rate" in err and "Traceback" not in err
    if steps:
        [at] = checkpoints(tmp_path)
        from safetensors.torch import load_file

        assert at.name == f"checkpoint-{steps[-1]}" and damage(at) is None and at.name in s["error"]
        assert all(t.isfinite().all() for t in load_file(at / "adapter_model.safetensors").values())


def test_the_row_is_reached_only_after_a_good_checkpoint(tmp_path, poisoned):
    "Without this, the test above would say nothing about checkpoints."
    cfg = tiny(tmp_path)
    order = EpochOrder([len(e) for e in prepare(cfg).train], 42, 4)
    assert list(order).index(7) >= 4


# -- disks

DISK = """
import json, resource, sys, transformers
from nli_ft.train_sft import train_cli
step, real = [0], transformers.Trainer.training_step
def training_step(self, *a, **k):
    step[0] += 1
    if step[0] == 6: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    return real(self, *a, **k)
transformers.Trainer.training_step = training_step
train_cli(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "room, status",
    [
        pytest.param(100_000, "failed", id="no room for a checkpoint"),
        pytest.param(0, "died", id="no room for anything", marks=pytest.mark.every),
    ],
)
def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_says_so(tmp_path, room, status):
    r = subprocess.run(
        [sys.executable, "-c", DISK, str(room), *tiny(tmp_path).to_args()],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert r.returncode == 1, r.stderr
    assert (
        "checkpoint-2" in r.stderr
        and "Make room" in r.stderr
        and "--resume_from_checkpoint=latest" in r.stderr
        and "Traceback" not in r.stderr
    )
    assert by_step(tmp_path)[2].name == "checkpoint-2" and damage(by_step(tmp_path)[2]) is None
    [row] = list_runs(tmp_path / "runs")
    assert row["status"] == status
    if status == "died":
        assert "could not be closed" in r.stderr
    assert find_checkpoint(tiny(tmp_path, resume_from_checkpoint="latest")) == by_step(tmp_path)[2]
    run = run_training(tiny(tmp_path, resume_from_checkpoint="latest"))
    assert summary(run)["steps"] == 12


@pytest.mark.parametrize("key", ["output_dir", "runs_dir"])
@pytest.mark.parametrize(
    "folder", ["/proc/nothing", "{tmp}/file/below"], ids=["a file system that takes no files", "below a file"]
)
def test_folders_that_cannot_be_written_are_said_before_anything_starts(tmp_path, key, folder):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=f"{key} = .*cannot be written"):
        run_training(tiny(tmp_path, **{key: folder.format(tmp=tmp_path)}))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "models").exists()


def test_data_that_is_deleted_while_a_run_goes_on_does_not_disturb_it(tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(root / "data" / "embedded", data)

    swap(monkeypatch, "nli_ft.fit.print_log", lambda row: shutil.rmtree(data, ignore_errors=True))
    run = run_training(
        tiny(tmp_path, train_data=str(data / "train.jsonl"), eval_data=str(data / "dev.jsonl"), num_epochs=1)
    )
    assert not data.exists() and summary(run)["status"] == "done" and summary(run)["after"]["n"] == 4
    assert read_run(run).environment["data"]["train"]["sha256"]


# -- memory


def test_running_out_of_memory_says_what_to_change_and_what_would_fit(tmp_path, monkeypatch):
    import torch, transformers

    def full(self, *a, **k):
        if self.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, *a, **k)

    real = transformers.Trainer.training_step
    monkeypatch.setattr(transformers.Trainer, "training_step", full)
    with pytest.raises(TrainingStopped, match="out of memory") as e:
        run_training(tiny(tmp_path))
    for said in (
        "Tried to allocate 2.00 GiB",
        "GiB. The device has",
        "checkpoint-1",
        "--resume_from_checkpoint=latest",
    ):
        assert said in str(e.value)
    assert (
        summary(only_run(tmp_path))["status"] == "failed"
        and "out of memory" in summary(only_run(tmp_path))["error"]
    )


def test_the_advice_is_the_least_change_that_fits_and_keeps_the_rows_of_a_step(tmp_path, monkeypatch):

    prep = prepare(tiny(tmp_path, batch_size=8, grad_accumulation_steps=2))
    # 1 GiB and half a GiB a row, a fifth of that with checkpointing
    swap(
        monkeypatch,
        "nli_ft.preflight.estimate_memory",
        lambda p: {"total": 1 + p.cfg.batch_size * (0.1 if p.cfg.gradient_checkpointing else 0.5)},
    )
    assert "--gradient_checkpointing true." in memory_advice(
        prep, 4
    ) and "about 5.0 GiB. The device has 4.0 GiB" in memory_advice(prep, 4)
    assert "--gradient_checkpointing true --batch_size 2 --grad_accumulation_steps 8." in memory_advice(
        prep, 1.4
    )
    assert "nvidia-smi" in memory_advice(prep, 40) and "No batch size" in memory_advice(prep, 1)


def test_running_out_of_memory_while_judging_names_the_setting_for_it(tmp_path, monkeypatch):
    import torch

    def full(*a, **k):
        raise torch.OutOfMemoryError("CUDA out of memory")

    swap(monkeypatch, "nli_ft.predict.predict_rows", full)
    with pytest.raises(TrainingStopped, match="eval_batch_size lower"):
        run_training(tiny(tmp_path, eval_before=True))


# -- adapters


def test_an_adapter_with_one_changed_bit_is_refused_by_name_at_every_door(copied, capsys):
    from nli_ft.ask import evaluate_cli, open_run, predict_cli
    from nli_ft.model import load_for_inference
    from nli_ft.train_sft import merge_cli
    import hashlib

    tmp, run, _ = copied
    path = root / summary(run)["adapter"] / "adapter_model.safetensors"
    mine = tmp / path.relative_to(next(p for p in path.parents if p.name == "models").parent)
    assert hashlib.sha256(mine.read_bytes()).hexdigest() == summary(run)["adapter_sha256"]
    cfg = open_run(run)[1]
    load_for_inference(cfg, mine.parent)
    data = bytearray(mine.read_bytes())
    data[-3] ^= 1
    mine.write_bytes(data)
    with pytest.raises(RecordError, match="adapter_model.safetensors has changed"):
        load_for_inference(cfg, mine.parent)
    (run / "summary.json").write_text(json.dumps(summary(run) | dict(adapter=str(mine.parent))))
    for door, argv in (
        (merge_cli, ["--out", str(tmp / "merged")]),
        (evaluate_cli, ["--mode", "forced"]),
        (predict_cli, ["--premise", "A dog sleeps.", "--hypothesis", "A dog rests."]),
    ):
        with pytest.raises(SystemExit) as e:
            door(["--run", str(run), *argv])
        assert e.value.code == 2 and "adapter_model.safetensors has changed" in capsys.readouterr().err, door
    assert not (tmp / "merged").exists() and not list(run.rglob("evaluations/*/predictions.jsonl"))


# -- W&B


def tracked(tmp_path, **env):
    return subprocess.run(
        [sys.executable, "-m", "nli_ft.train_sft", *tiny(tmp_path, use_wandb=True, num_epochs=1).to_args()],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env={k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        | env,
    )


@pytest.mark.every
@pytest.mark.parametrize(
    "env",
    [
        dict(WANDB_MODE="offline"),
        dict(
            WANDB_API_KEY="0" * 40,
            WANDB_BASE_URL="http://127.0.0.1:9",
            WANDB_INIT_TIMEOUT="3",
            WANDB_FINISH_TIMEOUT="3",
        ),
    ],
    ids=["offline", "unreachable"],
)
def test_training_goes_on_where_wandb_cannot_be_reached_and_an_offline_run_is_kept(tmp_path, env):
    r = tracked(tmp_path, **env)
    assert r.returncode == 0, r.stderr
    run = only_run(tmp_path)
    assert summary(run)["status"] == "done" and len([m for m in read_metrics(run) if "loss" in m]) == 3
    kept = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert kept and kept[0].stat().st_size > 0
    assert ("W&B cannot be reached" in r.stdout) == ("WANDB_BASE_URL" in env)


WANDB_DIES = """
import json, psutil, sys
import nli_ft.train_sft as t
real = t.print_log
def print_log(row):
    real(row)
    if row.get("step") == 1 and "loss" in row:
        for p in psutil.Process().children(recursive=True): p.kill()
t.print_log = print_log
t.train_cli(sys.argv[1:])
"""


@pytest.mark.every
def test_training_goes_on_when_the_wandb_service_dies(tmp_path):
    r = subprocess.run(
        [sys.executable, "-c", WANDB_DIES, *tiny(tmp_path, use_wandb=True, num_epochs=1).to_args()],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
    )
    assert r.returncode == 0, r.stderr
    assert summary(only_run(tmp_path))["steps"] == 3 and "training goes on without it" in r.stdout


# -- several processes

TWO = ["--distributed_training=true", "--num_processes=2", "--batch_size=1"]


def ranks(p):
    "The training processes of a launcher, rank -> process."
    import psutil

    found = {}
    for c in psutil.Process(p.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RANK" in c.environ() and "nli_ft.train_sft" in " ".join(c.cmdline()):
                found.setdefault(int(c.environ()["RANK"]), c)
    return found


@pytest.mark.every
def test_a_killed_rank_ends_the_run_with_a_clear_message(tmp_path):
    p = started(tmp_path, *TWO, module="nli_ft.launch")
    ranks(p)[1].kill()
    out, err = p.communicate(timeout=180)
    assert p.returncode == 1, err
    run = only_run(tmp_path)
    assert summary(run)["status"] == "failed"
    for text in (err, summary(run)["error"]):
        assert (
            "training in 2 processes failed: one of them was ended by SIGKILL, and the run with it" in text
            and "No checkpoint was saved yet" in text
        )
    assert not ranks_left(tmp_path)


def ranks_left(tmp_path):
    import psutil

    return [
        c.pid
        for c in psutil.process_iter(["cmdline"])
        if any(str(tmp_path) in a for a in c.info["cmdline"] or [])
        and "nli_ft.train_sft" in " ".join(c.info["cmdline"])
    ]


@pytest.mark.every
def test_a_killed_rank_ends_a_run_that_has_no_launching_notebook_and_its_record(tmp_path):
    launch = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    over = [a for a in tiny(tmp_path, num_epochs=400, save_steps=1000, batch_size=1).to_args()]
    with open(tmp_path / "log", "w") as log:
        p = subprocess.Popen(
            [*launch, "-m", "nli_ft.train_sft", *over],
            cwd=root,
            stdout=log,
            stderr=log,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
    for _ in range(1200):
        if any('"loss"' in f.read_text() for f in tmp_path.glob("runs/*/*/metrics.jsonl")):
            break
        time.sleep(0.1)
    ranks(p)[1].kill()
    assert p.wait(timeout=180) != 0
    run = only_run(tmp_path)
    assert (
        summary(run)["status"] == "failed" and "another process of this run ended" in summary(run)["error"]
    ), (tmp_path / "log").read_text()[-3000:]
    assert not ranks_left(tmp_path)


@pytest.mark.every
def test_ctrl_c_stops_all_processes_at_one_step_with_one_whole_checkpoint(tmp_path):
    p = started(tmp_path, *TWO, module="nli_ft.launch")
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=180)
    assert p.returncode == 130, err
    run, [at] = only_run(tmp_path), checkpoints(tmp_path)
    assert (
        summary(run)["status"] == "interrupted"
        and damage(at) is None
        and {"rng_state_0.pth", "rng_state_1.pth"} <= {f.name for f in at.iterdir()}
    )
    assert at.name in summary(run)["error"] and "--resume_from_checkpoint=latest" in err
    assert not ranks_left(tmp_path)


@pytest.mark.every
def test_two_processes_go_on_from_the_middle_of_an_epoch_to_the_same_end(tmp_path):
    def go(*more):
        over = [
            f"--{k}={str(v).lower() if not isinstance(v, str) else v}"
            for k, v in settings(tmp_path, save_total_limit=20).items()
        ]
        r = subprocess.run(
            [
                sys.executable,
                "-m",
                "nli_ft.launch",
                "--config",
                "minimal_test",
                *over,
                *TWO,
                "--no_check",
                *more,
            ],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]

    go()
    whole = only_run(tmp_path)
    go(f"--resume_from_checkpoint={tmp_path}/models/minimal_test/{whole.name}/checkpoint-8")
    [run] = [Path(r["path"]) for r in list_runs(tmp_path / "runs") if Path(r["path"]) != whole]
    assert curve(run) == curve(whole) and adapter(run) == adapter(whole)


if __name__ == "__main__":
    what, tmp, *args = sys.argv[1:]
    if what == "kill_often":
        kill_often(tmp, int(args[0]), int(args[1]), json.loads(args[2]))
