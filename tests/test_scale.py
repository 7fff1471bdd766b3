"""Several processes, several machines, several trackers: accelerate's files, SLURM, `nli_run --engine`,
sharding, and what leaves the machine."""

import json, os, re, shlex, shutil, signal, socket, subprocess, sys
from pathlib import Path

import pytest

from nli_ft.process import ConfigError, project_root
from nli_ft.config_loader import load_config

root = project_root()
YAML = sorted((root / "nli_ft" / "configs" / "accelerate").glob("*.yaml"))
TINY = dict(
    model_id="tiny-mistral",
    device="cpu",
    compute_dtype="fp32",
    lora_dropout=0.0,
    learning_rate=1e-2,
    logging_steps=1,
    max_new_tokens=4,
    max_eval_samples=4,
    eval_before=False,
    group_by_length=False,
)


def tiny(tmp_path, **kw):
    return load_config(
        "minimal_test", TINY | dict(output_dir=str(tmp_path / "models"), runs_dir=str(tmp_path / "runs")) | kw
    )


def records(tmp_path):
    return sorted(p.parent for p in tmp_path.glob("runs/*/*/summary.json"))


def only_run(tmp_path):
    [run] = records(tmp_path)
    return run


def summary(run):
    return json.loads((run / "summary.json").read_text())


def metrics(run):
    return [json.loads(l) for l in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [m["loss"] for m in metrics(run) if "loss" in m]


def saved(run):
    from safetensors.torch import load_file

    return load_file(root / summary(run)["adapter"] / "adapter_model.safetensors")


def apart(a, b):  # largest relative difference of two adapters' matrices
    assert a.keys() == b.keys() and a
    return max(((a[k].float() - b[k].float()).norm() / b[k].float().norm()).item() for k in b)


ALONE = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "ACCELERATE", "FSDP"))} | {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def python(*args, timeout=400, **env):
    r = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ALONE | {"PYTHONPATH": str(root)} | env,
    )
    r.all = r.stdout + r.stderr
    return r


# -- accelerate's files


def launch_args(*args):
    "What `accelerate launch` makes of a command line and the config file in it."
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    ns = launch_command_parser().parse_args([*map(str, args), "-m", "nli_ft.train_sft"])
    ns.nondefault = set()
    return _validate_launch_command(ns)[0]


def environment(args):
    "The environment that the launcher gives to its processes."
    from accelerate.utils.launch import prepare_multi_gpu_env

    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.stem)
def test_every_key_of_an_accelerate_file_is_known_and_explained(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    conf = load_config_from_file(str(path))  # it refuses unknown keys at the top, and accepts any below
    known = {a.dest for a in launch_command_parser()._actions}
    assert set(conf.fsdp_config) <= known
    assert set(re.findall(r"^(\w+):", path.read_text(), re.M)) - {
        "compute_environment",
        "distributed_type",
        "fsdp_config",
    } <= known | {"use_cpu"}
    for line in path.read_text().splitlines():
        assert "#" in line or line == "fsdp_config:", line


def test_an_unknown_key_is_noticed(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    (tmp_path / "c.yaml").write_text(YAML[0].read_text() + "num_procesess: 2\n")
    with pytest.raises(ValueError, match="num_procesess"):
        load_config_from_file(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.stem)
def test_the_number_of_processes_must_be_said_and_the_rest_follows(path, monkeypatch):
    for k in [k for k in os.environ if k.startswith(("ACCELERATE", "FSDP"))]:
        monkeypatch.delenv(k)
    two, sharded = path.stem.endswith("two_nodes"), path.stem.startswith("fsdp")
    more = (
        ["--main_process_ip", "10.0.0.1", "--main_process_port", "29511", "--machine_rank", "1"]
        if two
        else []
    )
    with pytest.raises(ValueError, match="num_processes"):
        launch_args("--config_file", path, *more)
    args = launch_args("--config_file", path, "--num_processes", "8", *more)
    assert (args.use_fsdp, args.multi_gpu, args.use_cpu, args.mixed_precision) == (
        sharded,
        not sharded,
        False,
        "no",
    )
    env = environment(args)
    if two:
        assert (args.nnodes, args.nproc_per_node, args.node_rank, args.rdzv_backend, args.rdzv_endpoint) == (
            "2",
            "4",
            1,
            "static",
            "10.0.0.1:29511",
        )
    else:
        assert args.nproc_per_node == "8" and int(args.master_port) > 1023
    assert ("ACCELERATE_USE_FSDP" in env) == sharded


@pytest.mark.parametrize("name", ["fsdp_qlora", "fsdp_qlora_two_nodes"])
def test_the_fsdp_files_ask_for_what_check_ready_wants_and_accelerate_builds_it(tmp_path, monkeypatch, name):
    import nli_ft.model
    from nli_ft.ready import _missing_for_fsdp

    env = environment(
        launch_args(
            "--config_file",
            root / f"nli_ft/configs/accelerate/{name}.yaml",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--main_process_port",
            "0",
        )
    )
    for k, v in env.items():
        if k.startswith(("ACCELERATE", "FSDP")):
            monkeypatch.setenv(k, v)
    monkeypatch.setenv("WORLD_SIZE", "2")
    from accelerate import FullyShardedDataParallelPlugin

    p = FullyShardedDataParallelPlugin()
    assert (
        p.fsdp_version,
        p.sharding_strategy.name,
        p.use_orig_params,
        p.state_dict_type.name,
        p.backward_prefetch.name,
    ) == (1, "FULL_SHARD", False, "FULL_STATE_DICT", "BACKWARD_PRE")
    assert (
        not (
            p.cpu_ram_efficient_loading
            or p.sync_module_states
            or p.cpu_offload.offload_params
            or p.activation_checkpointing
        )
        and p.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    )
    assert nli_ft.model.sharded() and [
        "FSDP needs CUDA GPUs" in l for l in _missing_for_fsdp(tiny(tmp_path))
    ] == [True]  # nothing else


@pytest.mark.parametrize(
    "env, said",
    [
        ({}, "FSDP needs CUDA GPUs"),
        (dict(FSDP_VERSION="2"), "Set fsdp_version to 1"),
        (dict(FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT"), "FULL_STATE_DICT"),
        (dict(FSDP_CPU_RAM_EFFICIENT_LOADING="true"), "Set it to false"),
    ],
)
def test_what_fsdp_lacks_is_said_before_anything_starts(tmp_path, monkeypatch, env, said):
    from nli_ft.ready import check_ready

    for k, v in (dict(ACCELERATE_USE_FSDP="true", WORLD_SIZE="2") | env).items():
        monkeypatch.setenv(k, v)
    with pytest.raises(ConfigError, match=said):
        check_ready(tiny(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_ready(tiny(tmp_path))  # one process has nothing to shard


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_all_gpus_means_a_process_for_each_that_torch_sees_and_one_trains_here(tmp_path, monkeypatch, gpus):
    "What run_training.sh --all-gpus passes on, --distributed_training true, on machines with one GPU and more."
    import torch
    from nli_ft.hosts import launch_command
    from nli_ft.preflight import step_counts, world_size

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cfg = load_config("distributed", dict(runs_dir=str(tmp_path)))
    assert world_size(cfg) == gpus and step_counts(cfg, 1000)["rows_per_step"] == 16 * gpus
    from accelerate.commands.launch import launch_command_parser

    cmd = launch_command(cfg, tmp_path / "run")
    ns = launch_command_parser().parse_args(cmd[3:])
    assert (ns.num_processes, ns.multi_gpu, ns.cpu, ns.num_machines, ns.main_process_port) == (
        gpus,
        gpus > 1,
        False,
        1,
        0,
    ) and cmd[-1] == "--only_train"


# -- sharded and not, in two processes

FSDP = dict(
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="1",
    FSDP_SHARDING_STRATEGY="FULL_SHARD",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    FSDP_USE_ORIG_PARAMS="false",
    FSDP_BACKWARD_PREFETCH="BACKWARD_PRE",
)


def two_processes(cfg, *, sharded, **env):
    "The script under torchrun. tests/fsdp_on_cpu.py shards the model."
    what = ["tests/fsdp_on_cpu.py"] if sharded else ["-m", "nli_ft.train_sft"]
    return python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *what,
        *cfg.to_args(),
        **(FSDP if sharded else {}),
        **env,
    )


def in_three_ways(tmp_path, dtype, quantization, names=("one", "ddp", "fsdp")):
    """Records of equal steps in one process, in two, and in two with shards. `names` says which of them.

    Measured in fp32: between one process and two, sharded or not, losses differ by 1e-7. Matrices of the adapter
    differ by 3e-5 after four steps. In bf16 the norms of a sharded base are in bf16 too. There losses differ by
    1e-5, matrices by 1e-2."""
    from nli_ft.bases import bf16_in_hardware
    import torch

    if dtype == "bf16" and not bf16_in_hardware(torch.device("cpu")):
        pytest.skip("this CPU emulates bf16")
    kw = dict(compute_dtype=dtype, quantization=quantization, save_steps=2)
    for name in names:
        cfg = tiny(tmp_path / name, batch_size=4 if name == "one" else 2, **kw)
        if name == "one":
            r = python("-m", "nli_ft.train_sft", *cfg.to_args())
        else:
            r = two_processes(cfg, sharded=name == "fsdp", SHARDS_TO=str(tmp_path / "shards"))
        assert r.returncode == 0, r.all[-4000:]
    one, *others = (only_run(tmp_path / name) for name in names)
    loss, matrix = (1e-6, 1e-3) if dtype == "fp32" else (1e-4, 0.1)
    for two in others:
        assert losses(two) == pytest.approx(losses(one), rel=loss) and len(losses(two)) == 4
        assert apart(saved(two), saved(one)) < matrix
        assert summary(two)["processes"] == 2 and summary(two)["after"]["n"] == 4
        ids = [json.loads(l)["id"] for l in (two / "predictions.jsonl").read_text().splitlines()]
        assert len(ids) == len(set(ids)) == 4, "judged once each, by one process"
    return one, *others


def assert_halves(tmp_path, fsdp, dtype):
    """Each process held half of every unit. The adapter and the rotary frequencies stayed in fp32, whatever the base
    is in."""
    halves = [json.loads((tmp_path / f"shards.{rank}").read_text()) for rank in (0, 1)]
    for h in halves:
        assert {d for _, d, trained, _ in h["units"] if trained} == {"torch.float32"}
        assert h["rotary"] == ["torch.float32"]
    base = {d for _, d, trained, _ in halves[0]["units"] if not trained}
    assert base == {f"torch.{'float32' if dtype == 'fp32' else 'bfloat16'}"}
    mine = sum(n for _, _, trained, n in halves[0]["units"] if trained)
    assert mine == sum(t.numel() for t in saved(fsdp).values()) / 2


@pytest.mark.every
def test_shards_of_two_processes_are_one_process_and_go_on_to_the_same_end(tmp_path):
    kw = dict(compute_dtype="fp32", quantization="nf4", save_steps=2)
    _, fsdp = in_three_ways(tmp_path, "fp32", "nf4", ("one", "fsdp"))
    assert summary(fsdp)["sharding"] == "fsdp"
    assert_halves(tmp_path, fsdp, "fp32")
    [at] = (tmp_path / "fsdp").glob("models/*/*/checkpoint-2")
    r = two_processes(tiny(tmp_path / "on", batch_size=2, resume_from_checkpoint=str(at), **kw), sharded=True)
    assert r.returncode == 0, r.all[-4000:]
    on = only_run(tmp_path / "on")
    assert losses(on) == losses(fsdp) and apart(saved(on), saved(fsdp)) == 0
    other = tiny(tmp_path / "other", batch_size=2, resume_from_checkpoint=str(at), **kw)
    r = python("-m", "nli_ft.train_sft", *other.to_args())
    assert r.returncode != 0 and 'sharding: "fsdp" in the checkpoint, null now' in r.all


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, quantization", [pytest.param("fp32", "none", marks=pytest.mark.every), ("bf16", "nf4")]
)
def test_shards_of_other_weights_are_one_process_too(tmp_path, dtype, quantization):
    "Without shards the kind of the weights makes no difference to two processes: each holds them whole."
    _, fsdp = in_three_ways(tmp_path, dtype, quantization, ("one", "fsdp"))
    assert_halves(tmp_path, fsdp, dtype)


@pytest.mark.every
@pytest.mark.parametrize("dtype, quantization", [("fp32", "nf4"), ("fp32", "none"), ("bf16", "nf4")])
def test_two_processes_without_shards_are_one(tmp_path, dtype, quantization):
    _, ddp = in_three_ways(tmp_path, dtype, quantization, ("one", "ddp"))
    assert "sharding" not in summary(ddp)


# -- SLURM

SRUN = """#!/usr/bin/env bash
# as many tasks as --ntasks says, each with its rank; options before the command
while [[ $1 == --* ]]; do case $1 in --ntasks) n=$2; shift 2 ;; --*=*) shift ;; *) shift 2 ;; esac; done
for ((i = 0; i < n; i++)); do SLURM_PROCID=$i "$@"; done
"""


@pytest.fixture
def cluster(tmp_path):
    """A project's folder on a cluster of stand-ins. `submit(nodes, gpus, *args)` returns the commands that its nodes
    would run."""
    project, bin = tmp_path / "my project", tmp_path / "bin"
    (project / "scripts").mkdir(parents=True), (project / ".venv/bin").mkdir(parents=True), bin.mkdir()
    shutil.copy(root / "settings.ini", project), shutil.copy(root / "scripts/slurm.sh", project / "scripts")

    def script(path, text):
        path.write_text(text), path.chmod(0o755)

    script(bin / "srun", SRUN)
    # as many names as a pipe does not hold: a reader that stops early breaks the pipe
    shows = f"echo '   Command={project}/scripts/slurm.sh --config x'"
    script(
        bin / "scontrol",
        f"#!/usr/bin/env bash\ncase $2 in job) {shows} ;; *) seq -f node%g 7 20000 ;; esac\n",
    )
    for command in ("accelerate", "python"):
        script(
            project / ".venv/bin" / command,
            f'#!/usr/bin/env bash\nprintf \'%s\\0\' "$PWD" "$@" >>{shlex.quote(str(tmp_path))}/calls; '
            f"echo >>{shlex.quote(str(tmp_path))}/calls\n",
        )

    def submit(nodes, gpus, *args, **env):
        r = subprocess.run(
            ["bash", str(project / "scripts/slurm.sh"), *args],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            env=dict(
                PATH=f"{bin}:/usr/bin:/bin",
                SLURM_JOB_ID="4711",
                SLURM_SUBMIT_DIR=str(project),
                SLURM_NNODES=str(nodes),
                SLURM_GPUS_ON_NODE=str(gpus),
                SLURM_JOB_NODELIST="node[7-9]",
            )
            | env,
        )
        calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        return r, [c.split("\0")[:-1] for c in calls.split("\n") if c]

    return project, submit


@pytest.mark.parametrize(
    "nodes, kind, file",
    [
        (1, "ddp", "ddp"),
        (1, "fsdp_qlora", "fsdp_qlora"),
        (2, "ddp", "ddp_two_nodes"),
        (3, "fsdp_qlora", "fsdp_qlora_two_nodes"),
    ],
)
def test_a_job_starts_one_launcher_a_node_which_accelerate_understands(cluster, nodes, kind, file):
    project, submit = cluster
    r, calls = submit(
        nodes, 4, "--config", "distributed", "--wandb_run_name", "two words", NLI_ACCELERATE=kind
    )
    assert r.returncode == 0 and len(calls) == nodes, r.stderr
    for rank, (cwd, *argv) in enumerate(calls):
        assert cwd == str(project) and argv[-6:] == [
            "-m",
            "nli_ft.train_sft",
            "--config",
            "distributed",
            "--wandb_run_name",
            "two words",
        ]
        assert argv[1:3] == ["--config_file", f"{project}/nli_ft/configs/accelerate/{file}.yaml"]
        from accelerate.commands.launch import launch_command_parser

        ns = launch_command_parser().parse_args(
            [a.replace(str(project), str(root)) if a.endswith(".yaml") else a for a in argv[1:]]
        )
        assert (ns.num_machines, ns.num_processes, ns.machine_rank, ns.main_process_ip) == (
            nodes,
            4 * nodes,
            rank,
            "node7" if nodes > 1 else None,
        )
        assert nodes == 1 or 1024 < ns.main_process_port < 65536


def test_two_jobs_on_one_node_meet_at_different_ports(cluster):
    ports = [cluster[1](2, 4, "--config", "distributed", SLURM_JOB_ID=i)[1][-1] for i in ("4711", "4712")]
    ports = [p[p.index("--main_process_port") + 1] for p in ports]
    assert ports[0] != ports[1]


@pytest.mark.parametrize(
    "nodes, gpus, env, said",
    [
        (1, 4, dict(SLURM_JOB_ID=""), "sbatch scripts/slurm.sh"),
        (1, 0, {}, "--gpus-per-node"),
        (1, 4, dict(NLI_ACCELERATE="ddpp"), "expected ddp or fsdp_qlora"),
    ],
)
def test_a_job_that_cannot_be_meant_is_refused(cluster, nodes, gpus, env, said):
    r, calls = cluster[1](nodes, gpus, "--config", "distributed", **env)
    assert r.returncode == 2 and said in r.stderr and not calls


def test_one_gpu_of_one_node_is_trained_on_without_a_launcher(cluster):
    r, calls = cluster[1](1, 1, "--config", "ablation2", "--seed", "2")
    assert r.returncode == 0, r.stderr
    assert calls == [[str(cluster[0]), "-m", "nli_ft.train_sft", "--config", "ablation2", "--seed", "2"]]


def test_a_job_may_be_submitted_from_any_folder_and_its_paths_mean_what_they_meant_there(cluster, tmp_path):
    project, submit = cluster
    r, [(cwd, *argv)] = submit(1, 4, "--train_data", "rows.jsonl", SLURM_SUBMIT_DIR=str(tmp_path))
    assert r.returncode == 0 and cwd == str(tmp_path) and argv[-1] == "rows.jsonl", r.stderr
    assert argv[2] == f"{project}/nli_ft/configs/accelerate/ddp.yaml"
    (project / "settings.ini").unlink()
    r, calls = submit(1, 4, SLURM_SUBMIT_DIR=str(tmp_path))
    assert r.returncode == 2 and "is the project's folder" in r.stderr and len(calls) == 1
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\nexit 1\n")  # a cluster that does not say
    r, _ = submit(1, 4, SLURM_SUBMIT_DIR=str(tmp_path))
    assert r.returncode == 2 and "is the project's folder" in r.stderr


def test_a_node_without_the_environment_says_so(cluster):
    shutil.rmtree(cluster[0] / ".venv")
    r, _ = cluster[1](1, 4)
    assert r.returncode == 2 and "no accelerate" in r.stderr


def test_the_job_script_is_sound_and_asks_for_a_warning_before_its_time_is_up():
    assert subprocess.run(["bash", "-n", str(root / "scripts/slurm.sh")]).returncode == 0
    text = (root / "scripts/slurm.sh").read_text()
    for line in (r"--signal=B:USR2@\d+", "--requeue", "--open-mode=append"):
        assert re.search(f"^#SBATCH {line}", text, re.M) and text.index("#SBATCH") < text.index("set -euo")


# A step that ends half a second after it is told to, and says how: a launcher that saves a checkpoint.
TOLD = """#!/usr/bin/env bash
trap 'sleep .5; echo told >>"$LOG"; exit 143' TERM
kill -"$SEND" $PPID; while :; do sleep .1; done
"""


@pytest.mark.parametrize(
    "sent, env, again",
    [
        ("USR2", {}, True),
        ("USR2", dict(SLURM_RESTART_COUNT="19"), True),
        ("USR2", dict(SLURM_RESTART_COUNT="20"), False),
        ("USR2", dict(NLI_RESTARTS="0"), False),
        ("TERM", {}, False),
    ],
)
def test_a_job_whose_time_is_up_ends_its_step_first_and_then_starts_again(
    cluster, tmp_path, sent, env, again
):
    log = tmp_path / "log"
    for name, text in dict(srun=TOLD, scontrol='#!/usr/bin/env bash\necho "$@" >>"$LOG"\n').items():
        (tmp_path / "bin" / name).write_text(text)
    r, _ = cluster[1](1, 1, "--config", "ablation2", LOG=str(log), SEND=sent, **env)
    assert r.returncode == 143, r.stderr
    assert log.read_text().splitlines() == ["told", *["requeue 4711"] * again]
    assert ("starts again" in r.stderr) == again


# -- nli_run --engine

OPEN = (
    "from nli_ft.config_loader import load_config\nfrom nli_ft.records import "
    "append_metrics,finish_run,start_run,watch_cells\nrun = start_run(load_config(config, overrides), "
    "run_dir)\nwatch_cells(run)"
)
CLOSE = "finish_run(run, after={'accuracy':.875, 'valid_rate':1., 'n':8})"


@pytest.fixture
def project(tmp_path):
    "An empty project whose train.ipynb is `cells`. Commands that run in it use this checkout's package."
    import nbformat

    shutil.copy(root / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()

    def make(*cells):
        nb = nbformat.v4.new_notebook(
            metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        )
        nb.cells = [
            nbformat.v4.new_code_cell(c)
            for c in ('config = "default"\noverrides = ""\nrun_dir = None', *cells)
        ]
        nb.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nb, tmp_path / "nbs" / "train.ipynb")
        return tmp_path

    return make


def nli_run(cwd, *args, **env):
    return subprocess.run(
        [sys.executable, "-m", "nli_ft.launch", "--no_check", *args],  # the notebooks here train nothing
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        env=ALONE | {"PYTHONPATH": str(root)} | env,
    )


HERE = ["--engine", "submitit", "--engine_args", "cluster=local timeout_min=9"]


def test_each_run_is_a_job_and_a_failed_one_is_told_beside_the_others(project):
    pytest.importorskip("submitit")
    there = project(
        OPEN,
        "if '7' in overrides: raise RuntimeError('the disk is on fire')",
        "import os\nif '8' in overrides: os.kill(os.getppid(), 9)",
        CLOSE,
    )
    (there / "deep").mkdir()
    r = nli_run(there / "deep", "--config", "minimal_test", "--seeds", "1,7,8", *HERE)
    assert r.returncode == 1, r.stdout + r.stderr
    assert r.stdout.count("] job ") == 3 and "nli_run --config minimal_test --seed=7" in r.stdout
    table = r.stdout[r.stdout.rindex("] job ") :].splitlines()[1:]
    found = {summary(p)["seed"]: p for p in records(there)}
    assert summary(found[1])["status"] == "done" and any(
        found[1].name in l and "done" in l and "0.875" in l for l in table
    )
    assert (
        summary(found[7])["status"] == "failed"
        and any(found[7].name in l and "failed" in l for l in table)
        and "RuntimeError: the disk is on fire" in r.stderr
    )
    assert any(
        "minimal_test seed 8   failed   job " in l and "ended without a result" in l and ".jobs" in l
        for l in table
    ), "killed from outside: no record can tell of it"
    from nli_ft.records import list_runs

    assert len(list_runs(there / "runs")) == 3, "submitit's own files are no records"


JOB = """
import nli_ft.launch as launch
def stopped(spec, overrides):
    raise launch.RunFailed("stopped by SIGTERM", launch.Path("runs/x/1"), 143)
launch.run_notebook = stopped
print(launch.run_as_job("minimal_test", "", "."))
"""


@pytest.mark.parametrize("where, code", [(dict(SUBMITIT_EXECUTOR="slurm"), 143), ({}, 0)])
def test_the_process_of_a_job_ends_with_the_code_of_its_run(where, code):
    r = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, env=os.environ | where)
    assert r.returncode == code and r.stdout == "('runs/x/1', 143, 'stopped by SIGTERM')\n", r.stderr


AGAIN = """
import sys, nli_ft.launch as launch
from nli_ft.process import Path
from nli_ft.rows import seal
saved = Path(sys.argv[2]) / "minimal_test/1/checkpoint-7"
if sys.argv[3] == "saved":
    saved.mkdir(parents=True)
    seal(saved)
def stopped(spec, overrides):
    raise launch.RunFailed("it was stopped", launch.Path("runs/x/1"), 128 + int(sys.argv[1]))
launch.run_notebook = stopped
print(launch.run_as_job("minimal_test", f"output_dir={sys.argv[2]}", "."))
"""
PREEMPTED = "JobState=RUNNING Requeue=1 PreemptTime=2026-11-28T00:00:00"


@pytest.mark.parametrize(
    "signum, saved, state, again",
    [
        (signal.SIGUSR2, "saved", "", True),
        (signal.SIGUSR2, "nothing", "", False),
        (signal.SIGTERM, "saved", PREEMPTED, True),
        (signal.SIGTERM, "saved", PREEMPTED.replace("Requeue=1", "Requeue=0"), False),
        (signal.SIGTERM, "saved", "JobState=CANCELLED Requeue=1 PreemptTime=None", False),
        (signal.SIGINT, "saved", PREEMPTED, False),
    ],
)
def test_a_job_that_the_cluster_starts_again_leaves_no_result(tmp_path, signum, saved, state, again):
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{bin}/asked\necho "{state}"\n')
    (bin / "scontrol").chmod(0o755)
    where = dict(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID="12", PATH=f"{bin}:{os.environ['PATH']}")
    words = [sys.executable, "-c", AGAIN, str(int(signum)), str(tmp_path / "models"), saved]
    r = subprocess.run(words, capture_output=True, text=True, env=os.environ | where)
    assert r.returncode == 128 + signum, r.stderr
    assert (r.stdout == "") == again, "who waits for a result goes on waiting"
    asked = (bin / "asked").read_text() if (bin / "asked").exists() else ""
    shown = "show job 12\n" * (signum == signal.SIGTERM)
    assert asked == shown + "requeue 12\n" * again


def test_a_job_that_was_started_again_goes_on_from_its_own_checkpoint_only(tmp_path, monkeypatch):
    from nli_ft.fit import resume_facts, resume_point
    from nli_ft.preflight import prepare
    from nli_ft.trainer import seal_checkpoint

    cfg = tiny(tmp_path)
    prep, told = prepare(cfg), []
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    saved = cfg.path("output_dir") / cfg.name / "first" / "checkpoint-3"
    saved.mkdir(parents=True)
    (saved / "trainer_state.json").write_text("{}")
    seal_checkpoint(saved, 3, resume_facts(prep))
    assert resume_point(prep) is None, "it was not started again"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resume_point(prep, told.append) == saved and told[0] == "job 12 was started again"
    other = cfg.replace(learning_rate=0.5)
    assert resume_point(prepare(other)) is None, "another run of the same job"
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert resume_point(prep) is None


def test_a_message_in_a_container_names_the_command_of_its_host(tmp_path, monkeypatch):
    from nli_ft.fit import how_to_go_on
    from nli_ft.rows import seal

    (tmp_path / "checkpoint-3").mkdir()
    seal(tmp_path / "checkpoint-3")
    monkeypatch.setenv("NLI_COMMAND", "./run_training.sh --gpu 1")
    said = how_to_go_on(load_config("minimal_test"), tmp_path)
    assert "`./run_training.sh --gpu 1 --config minimal_test --resume_from_checkpoint=latest`" in said


NAMESPACE = """
import time
from nli_ft.config_loader import load_config
from nli_ft.records import start_run
print(start_run(load_config("minimal_test", "runs_dir=FOLDER"), RUN_DIR), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("given", [False, True])  # the folder: that of a launcher, or a new one
def test_a_run_in_another_container_is_seen_to_live_and_to_have_died(tmp_path, given):
    from nli_ft.records import read_run

    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    code = NAMESPACE.replace("FOLDER", str(tmp_path))
    code = code.replace("RUN_DIR", repr(str(tmp_path / "minimal_test/mine")) if given else "None")
    p = subprocess.Popen([*apart, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    run = p.stdout.readline().strip()
    assert read_run(run).status == "running"
    p.kill()
    p.communicate(timeout=30)
    assert read_run(run).status == "died"


def test_a_job_that_is_told_to_end_interrupts_its_run_which_closes_its_record(project):
    "Before the time is up, SLURM sends SIGUSR2 to the job and perhaps to its children."
    there = project(
        OPEN,
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGUSR2)\n    "
        "os.kill(os.getppid(), signal.SIGUSR2)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    "
        "finish_run(run, 'interrupted', saved_step=7); raise",
    )
    r = nli_run(there, "--config", "minimal_test")
    assert r.returncode == 128 + signal.SIGUSR2, r.stderr
    assert [(summary(p)["status"], summary(p)["saved_step"]) for p in records(there)] == [("interrupted", 7)]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--engine", "submitit"], "timeout_min is missing"),
        (["--engine_args", "timeout_min=5"], "--engine submitit"),
        (["--engine", "submitit", "--engine_args", "timeout_min=5"], "cluster=local"),
        (["--engine", "submitit", "--engine_args", "cluster=local timeout_min=five"], "timeout_min"),
        (
            ["--engine", "submitit", "--engine_args", "cluster=local timeout_min=5 slurm_partitions=gpu"],
            "slurm_partitions",
        ),
        (["--engine", "submitit", "--engine_args", "cluster=local timeout_min"], "name=value"),
        (["--engine", "submitit", "--engine_args", "cluster=local timeout_min=5 nodes=2"], "slurm.sh"),
        (["--engine", "submitit", "--engine_args", "cluster=pbs timeout_min=5"], "pbs"),
    ],
)
def test_engine_arguments_that_cannot_be_meant_start_nothing(project, args, said):
    pytest.importorskip("submitit")
    there = project(OPEN, CLOSE)
    r = nli_run(there, "--config", "minimal_test", *args, PATH="/nowhere")
    assert r.returncode == 2 and r.stderr.startswith("error: ") and said in r.stderr and not records(there), (
        r.stderr
    )


def test_without_submitit_the_extra_is_named_and_runs_here_need_it_not(project, tmp_path):
    there = project(OPEN, CLOSE)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "submitit.py").write_text("raise ImportError('not installed')")
    env = dict(PYTHONPATH=f"{tmp_path / 'gone'}{os.pathsep}{root}")
    r = nli_run(there, "--config", "minimal_test", *HERE, **env)
    assert r.returncode == 2 and 'pip install -e ".[slurm]"' in r.stderr and not records(there)
    assert nli_run(there, "--config", "minimal_test", **env).returncode == 0


def test_partition_time_and_gpus_reach_sbatch(project, tmp_path):
    pytest.importorskip("submitit")
    there, bin = project(OPEN, CLOSE), tmp_path / "bin"
    bin.mkdir()
    for name, text in dict(
        srun="",
        sacct="",
        sbatch=f'cp "${{@: -1}}" {shlex.quote(str(tmp_path))}/job.sh; echo "sbatch: error: invalid partition '
        'specified: gpu" >&2; exit 1',
    ).items():
        (bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n"), (bin / name).chmod(0o755)
    r = nli_run(
        there,
        "--config",
        "minimal_test",
        "--seeds",
        "1,2",
        "--engine",
        "submitit",
        "--engine_args",
        "slurm_partition=gpu timeout_min=240 gpus_per_node=1 slurm_setup='[\"module load cuda\"]'",
        PATH=f"{bin}:/usr/bin:/bin",
    )
    assert (
        r.returncode == 2
        and "the cluster refused the jobs" in r.stderr
        and "invalid partition specified: gpu" in r.stderr
    ), r.stderr
    job = (tmp_path / "job.sh").read_text()
    for line in ("--partition=gpu", "--time=240", "--gpus-per-node=1", "--job-name=nli_ft", "--array=0-1%"):
        assert f"#SBATCH {line}" in job, line
    assert "module load cuda" in job


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    "What `_wait` says of a job that leaves no result, where `scontrol` prints a text."
    SlurmJob = pytest.importorskip("submitit").SlurmJob
    from nli_ft import launch

    class Job(SlurmJob):
        job_id, state = "7_0", "UNKNOWN"

        def __init__(self):
            "There is no cluster."

        def __del__(self):
            "Nothing was submitted."

        def done(self, looks=iter(range(5))):
            assert next(looks, None) is not None, "it is waited for without an end"
            return False

    def ask(text, code=0):
        script = tmp_path / "scontrol"
        script.write_text(f"#!/usr/bin/env bash\necho {shlex.quote(text)} >&{1 + bool(code)}; exit {code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(launch, "_LOOKS", 0)
        monkeypatch.setattr(launch, "_LATE", 0)
        return launch._wait(Job())

    return ask


def test_without_accounts_a_killed_job_is_not_waited_for_for_ever(waiting):
    assert waiting("JobId=7 ArrayTaskId=0 JobState=CANCELLED Reason=None Requeue=1") == "CANCELLED"
    assert waiting("slurm_load_jobs error: Invalid job id specified", code=1) == "forgotten"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_without_accounts_a_job_that_may_go_on_is_waited_for(waiting, monkeypatch, state):
    from nli_ft import launch

    looks = iter([None, None])

    def ended(job_id, real=launch._ended_as):
        assert next(looks, "enough") is None, "it went on waiting, as it should"
        return real(job_id)

    monkeypatch.setattr(launch, "_ended_as", ended)
    with pytest.raises(AssertionError, match="it went on waiting"):
        waiting(f"JobId=7 JobState={state} Reason=None")


def test_that_a_cluster_keeps_no_accounts_is_said_once():
    import logging
    from nli_ft.launch import _NoAccounts

    once, said = _NoAccounts(), []
    for call in (1, 2, 3):
        text = f"Call #{call} - Bypassing sacct error [Errno 2], status may be inaccurate."
        record = logging.LogRecord("submitit", logging.WARNING, "core.py", 1, text, (), None)
        if once.filter(record):
            said.append(record.getMessage())
    assert said == ["sacct fails: this cluster keeps no accounts. Its controller is asked instead"]


@pytest.mark.every
def test_a_real_run_as_a_job_leaves_the_record_that_it_leaves_here(tmp_path):
    pytest.importorskip("submitit")

    def args(where):
        return ["--seed", "2", *(a for a in tiny(tmp_path / where, max_steps=2).to_args())]

    for where, more in ("here", []), ("jobs", HERE):
        r = nli_run(root, *args(where), *more)
        assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    here, jobs = ({summary(p)["seed"]: p for p in records(tmp_path / w)} for w in ("here", "jobs"))
    assert set(here) == set(jobs) == {2}
    for seed in here:
        a, b = here[seed], jobs[seed]
        assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
        assert (
            losses(a) == losses(b)
            and summary(a)["adapter_sha256"] == summary(b)["adapter_sha256"]
            and summary(b)["status"] == "done"
        )
        assert (a / "config.json").read_text().replace("here", "jobs") == (b / "config.json").read_text()


# -- trackers


def test_a_tracker_that_transformers_does_not_know_or_that_is_not_installed_is_said_before_anything_starts(
    tmp_path,
):
    from nli_ft.ready import check_ready

    with pytest.raises(ConfigError, match="knows no tracker 'tensorbord'. It knows .*mlflow.*tensorboard"):
        check_ready(tiny(tmp_path, report_to="tensorbord"))
    with pytest.raises(ConfigError, match=r"clearml is not installed here \(`pip install clearml`\)"):
        check_ready(tiny(tmp_path, report_to="clearml"))
    with pytest.raises(ConfigError, match="Set use_wandb to true"):
        tiny(tmp_path, report_to="tensorboard,wandb")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    "The folder and the record of a run that W&B, offline, and TensorBoard watched."
    pytest.importorskip("tensorboardX")
    folder = tmp_path_factory.mktemp("tracked")
    kw = dict(max_steps=3, eval_steps=2, eval_metric="accuracy", eval_metric_rows=4, max_new_tokens=4)
    kw |= dict(report_to="tensorboard", use_wandb=True)
    r = python("-m", "nli_ft.train_sft", *tiny(folder, **kw).to_args(), WANDB_MODE="offline")
    assert r.returncode == 0, r.all[-3000:]
    return folder, only_run(folder)


def test_tensorboard_gets_the_curve_into_the_record_and_no_path_or_host_of_this_machine(tracked):
    folder, run = tracked
    [events] = (run / "tensorboard").iterdir()
    sent = events.read_bytes()
    assert b"train/loss" in sent and b"train/loss_label" in sent and b"eval/loss" in sent
    assert not found_in(sent, folder) and not found_in(events.name.encode(), folder)
    assert not list((root / "runs").glob("events*")) and not (root / "tensorboard").exists()


def tensorboard_numbers(path):
    "(step, name) -> number, from a file of events: length, checksum, event, checksum, and so on."
    from tensorboardX.proto.event_pb2 import Event

    found, raw = {}, path.read_bytes()
    while raw:
        size = int.from_bytes(raw[:8], "little")
        event = Event.FromString(raw[12 : 12 + size])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        raw = raw[16 + size :]
    return found


def wandb_records(path):
    "What `wandb sync` would send, from W&B's file: blocks of 32 KiB with parts of records, after a head of 7 bytes."
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:  # too short for the head of a part
            at += left
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        record += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(record)
            record = b""


def wandb_numbers(path):
    "(step, name) -> number of W&B's curves, and name -> number of its summary."
    curves, summary = {}, {}
    for record in wandb_records(path):
        row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        curves |= {(row.get("train/global_step"), name): value for name, value in row.items()}
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return curves, summary


OWN = ("step", "steps", "seconds", "eta_s")  # what the record adds to every log
ONCE = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def test_every_number_of_the_record_is_the_same_in_wandb_and_in_tensorboard(tracked):
    _, run = tracked
    recorded, once = {}, {}
    for row in metrics(run):
        for key, value in row.items():
            if key in ONCE:
                once[key] = value
            elif key not in OWN:
                kind, _, name = key.partition("_")
                shown = f"eval/{name}" if kind == "eval" else f"train/{key}"
                recorded[row["step"], shown] = value
    for name in (
        "train/loss_label",
        "train/loss_thought",
        "eval/loss_label",
        "eval/accuracy",
        "eval/macro_f1",
    ):
        assert name in {shown for _, shown in recorded}, name
    [events] = (run / "tensorboard").iterdir()
    board = tensorboard_numbers(events)
    [kept] = run.glob("wandb/offline-run-*/*.wandb")
    curves, summary = wandb_numbers(kept)
    for place, value in recorded.items():
        assert board[place] == pytest.approx(value, rel=1e-6, nan_ok=True), place  # TensorBoard has 32 bits
        assert curves[place] == value, place
    for key, value in once.items():
        assert summary[key] == value, key
    others = {name for step, name in board if (step, name) not in recorded}
    assert {name for name in others if not name.endswith("/text_summary")} <= {f"train/{k}" for k in ONCE}


def found_in(sent, tmp_path):
    "What reveals this machine. A path from the project's folder (../../tmp/…) does not count: the config has it."
    return [
        p
        for p in (
            str(tmp_path),
            str(root),
            str(Path.home()),
            *[h for h in [socket.gethostname()] if len(h) > 4],
        )
        if re.search(rb"(?<!\.\.)" + re.escape(p.encode()), sent)
    ]


@pytest.mark.parametrize(
    "report_to, wants",
    [
        ("mlflow", dict(MLFLOW_EXPERIMENT_NAME="minimal_test")),
        ("swanlab", dict(SWANLAB_MODE="local")),
        ("trackio,comet_ml", dict(COMET_START_ONLINE="0")),
    ],
)
def test_every_tracker_is_given_a_place_in_the_record_unless_the_user_has_one(
    tmp_path, monkeypatch, report_to, wants
):
    from nli_ft.train_sft import _in_the_record

    for k in list(os.environ):
        if k.startswith(("MLFLOW", "SWANLAB", "COMET", "TRACKIO")):
            monkeypatch.delenv(k)
    before = dict(os.environ)
    with _in_the_record(tiny(tmp_path, report_to=report_to), tmp_path / "run"):
        new = {k: v for k, v in os.environ.items() if k not in before}
        assert wants.items() <= new.items() and any(str(tmp_path / "run") in v for v in new.values())
    assert dict(os.environ) == before
    for k in new:
        monkeypatch.setenv(k, "mine")
    with _in_the_record(tiny(tmp_path, report_to=report_to), tmp_path / "run"):
        assert all(os.environ[k] == "mine" for k in new)


@pytest.mark.every
def test_wandb_is_sent_no_path_or_host_of_this_machine_and_goes_on_with_a_run(tmp_path):
    "Read from the bytes that `wandb sync` would send."
    kw = dict(use_wandb=True, wandb_run_id="abc123", max_steps=4, save_steps=2)
    r = python("-m", "nli_ft.train_sft", *tiny(tmp_path, **kw).to_args(), WANDB_MODE="offline")
    assert r.returncode == 0, r.all[-3000:]
    [at] = tmp_path.glob("models/*/*/checkpoint-2")
    r = python(
        "-m",
        "nli_ft.train_sft",
        *tiny(tmp_path, **kw, resume_from_checkpoint=str(at)).to_args(),
        WANDB_MODE="offline",
    )
    assert r.returncode == 0, r.all[-3000:]
    for run in records(tmp_path):
        [kept] = run.glob("wandb/offline-run-*-abc123/*.wandb")
        sent = kept.read_bytes()
        assert b"output_dir" in sent and b"train/loss" in sent and b"tiny-mistral" in sent
        assert not found_in(sent, tmp_path)
