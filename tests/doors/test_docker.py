"""Docker's door, opened for real: run_training.sh, the Dockerfile and an engine of its own.

    python -m pytest -m doors tests/doors/test_docker.py

As root on Debian, with the packages docker.io, debootstrap and iptables. The base is a small Debian with the CPU build
of PyTorch. The tests run in the order in which they stand here, on one image. It takes about ten minutes, and 8 GB.
`NLI_DOORS` (or /var/tmp/nli_ft_doors) holds the base afterwards."""

import contextlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOORS = Path(os.environ.get("NLI_DOORS", "/var/tmp/nli_ft_doors"))
CALLER = 12345  # a user with no name and no home, as on a cluster
SECRETS = dict(HF_TOKEN="hf_never_in_an_image", WANDB_API_KEY="f" * 40, WANDB_MODE="disabled")
TOOLS = ("dockerd", "docker", "debootstrap", "iptables", "setpriv")

pytestmark = [
    pytest.mark.doors,
    pytest.mark.skipif(os.geteuid() != 0, reason="starts an engine, which needs root"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]


def say(*command, **kw):
    "Run a command that must succeed. Returns what it printed."
    return subprocess.run(command, check=True, capture_output=True, text=True, **kw).stdout


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    "An engine with its own data and socket, stopped afterwards with everything it started."
    home = Path(tmp_path_factory.mktemp("engine"))
    home.chmod(0o755)
    os.environ["DOCKER_HOST"] = host = f"unix://{home}/docker.sock"
    words = f"--data-root {home}/data --exec-root {home}/exec --pidfile {home}/pid --host {host}".split()
    with open(home / "log", "w") as log:
        daemon = subprocess.Popen(["dockerd", *words], stdout=log, stderr=log)
    for _ in range(60):
        if subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
            break
        assert daemon.poll() is None, (home / "log").read_text()[-2000:]
        time.sleep(1)
    (home / "docker.sock").chmod(0o666)  # the folder is this test's own
    yield home
    daemon.terminate()
    daemon.wait(60)
    del os.environ["DOCKER_HOST"]
    shutil.rmtree(home, ignore_errors=True)


def pip_settings():
    "How pip reaches its index here, as options of `docker import`. A container has this machine's network."
    found = {k: v for k, v in os.environ.items() if k.startswith("PIP_INDEX") or "proxy" in k.lower()}
    found |= dict(PIP_CERT="/etc/ssl/certs/ca-certificates.crt")
    return [word for k, v in found.items() for word in ("--change", f"ENV {k}={v}")]


@pytest.fixture(scope="module")
def base(engine):
    "An image with Debian's Python and the pinned PyTorch, in the place of the CUDA image."
    rootfs = DOORS / "base"
    if not (DOORS / "base.done").exists():
        shutil.rmtree(rootfs, ignore_errors=True)
        DOORS.mkdir(parents=True, exist_ok=True)
        wanted = "python3,python3-venv,python3-pip,git,ca-certificates"
        say("debootstrap", "--variant=minbase", f"--include={wanted}", "bookworm", str(rootfs))
        (DOORS / "base.done").touch()
    packages = rootfs / "usr/local/lib/python3.11/dist-packages"
    torch = next(l for l in (ROOT / "requirements.txt").read_text().split() if l.startswith("torch=="))
    if not (packages / "torch").exists():
        assert sys.version_info[:2] == (3, 11), (
            "PyTorch is put into the base by this Python, so it must be 3.11"
        )
        say(sys.executable, "-m", "pip", "install", "-q", "--target", str(packages), torch)
    for file in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"):
        shutil.copy("/" + file, rootfs / file)
    packed = subprocess.Popen(["tar", "-C", str(rootfs), "-c", "."], stdout=subprocess.PIPE)
    say("docker", "import", *pip_settings(), "-", "nli_ft_base:test", stdin=packed.stdout)
    return "nli_ft_base:test"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A clone that belongs to the caller."
    home = Path(tmp_path_factory.mktemp("caller"))
    say("git", "clone", "-q", str(ROOT), str(home / "nli_ft"))
    for name in ("run_training.sh", "Dockerfile"):
        shutil.copy2(ROOT / name, home / "nli_ft" / name)
    for one in (home, *home.parents):
        if one.is_relative_to("/tmp") and one != Path("/tmp"):
            one.chmod(0o755)
    say("chown", "-R", f"{CALLER}:{CALLER}", str(home))
    return home / "nli_ft"


def started(project, *args, cwd=None, base="", **environment):
    "run_training.sh as the caller, in a group of its own, as a terminal starts it."
    env = dict(PATH=os.environ["PATH"], HOME=str(project.parent), DOCKER_HOST=os.environ["DOCKER_HOST"])
    env |= dict(NLI_DOCKER_BASE=base, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2") | SECRETS | environment
    caller = ["setpriv", "--reuid", str(CALLER), "--regid", str(CALLER), "--clear-groups"]
    return subprocess.Popen(
        [*caller, str(project / "run_training.sh"), *args],
        cwd=cwd or project,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(project, *args, **kw):
    "`(exit code, output)` of run_training.sh."
    p = started(project, *args, **kw)
    said = p.communicate(timeout=1500)[0]
    return p.returncode, said


def record(project, config):
    "The newest record of a config, and its summary."
    newest = max((project / "runs" / config).iterdir())
    return newest, json.loads((newest / "summary.json").read_text())


def begins_to_train(project, config, p, before):
    "The record of a run, once it has done a step. `before` are the records that were there."
    for _ in range(240):
        new = set((project / "runs" / config).iterdir()) - before
        with contextlib.suppress(FileNotFoundError, KeyError):
            folder = new.pop()
            if (folder / "metrics.jsonl").read_text():
                return folder
        assert p.poll() is None, p.communicate()[0]
        time.sleep(0.5)
    raise AssertionError("no step in two minutes")


def test_without_an_engine_the_run_is_refused(project, engine):
    code, said = run(project, "--config", "minimal_test", DOCKER_HOST="unix:///nowhere.sock")
    assert code == 2 and "engine does not answer" in said and "--local --config minimal_test" in said


def test_a_build_that_fails_ends_the_command_and_leaves_no_record(project, engine):
    code, said = run(project, "--config", "minimal_test", base="nli_ft_no_such_image:none")
    assert code == 1 and "docker build failed" in said
    assert not (project / "runs/minimal_test").exists()


def test_a_run_ends_in_a_record_whose_files_belong_to_the_caller(project, base):
    code, said = run(project, "--config", "minimal_test", base=base)
    assert code == 0, said[-3000:]
    folder, summary = record(project, "minimal_test")
    assert summary["status"] == "done" and (folder / "train.ipynb").is_file()
    made = [f for f in project.rglob("*") if f.lstat().st_uid != CALLER]
    assert not made, made[:5]
    assert (folder / "summary.json").stat().st_mode & 0o777 == 0o644


def test_a_second_run_builds_nothing_and_reads_rows_outside_the_project(project, base):
    away = project.parent / "rows outside"
    away.mkdir()
    shutil.copy(project / "data/embedded/train.jsonl", away / "mine.jsonl")
    os.chown(away / "mine.jsonl", 0, 0)
    before = (away / "mine.jsonl").read_bytes()
    words = ["--config", "minimal_test", "--train_data", "mine.jsonl", "--max_steps", "1", "--seed", "2"]
    code, said = run(project, *words, cwd=away, base=base)
    assert code == 0 and "Building the image" not in said, said[-3000:]
    assert (away / "mine.jsonl").read_bytes() == before and sorted(p.name for p in away.iterdir()) == [
        "mine.jsonl"
    ]
    assert "mine.jsonl" in (record(project, "minimal_test")[0] / "config.json").read_text()


def test_no_secret_is_in_the_image_or_its_history(project, base):
    (image,) = {line for line in say("docker", "images", "-q", "nli_ft").split()}
    history = say("docker", "history", "--no-trunc", image) + say("docker", "image", "inspect", image)
    files = subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE)
    found = subprocess.run(
        ["grep", "-c", "-a", SECRETS["HF_TOKEN"]], stdin=files.stdout, capture_output=True, text=True
    )
    assert found.stdout.strip() == "0", "a layer holds the token"
    assert not [v for v in (SECRETS["HF_TOKEN"], SECRETS["WANDB_API_KEY"]) if v in history]
    told = [
        f
        for f in (project / "runs").rglob("*")
        if f.is_file() and SECRETS["HF_TOKEN"].encode() in f.read_bytes()
    ]
    assert not told, told


@pytest.mark.parametrize("how", ["ctrl-c", "docker stop"])
def test_a_run_that_is_stopped_leaves_a_checkpoint_and_says_interrupted(project, base, how):
    seed = {"ctrl-c": "3", "docker stop": "4"}[how]
    before = set((project / "runs/cpu_demo").iterdir())
    p = started(project, "--config", "cpu_demo", "--eval_before", "false", "--seed", seed, base=base)
    folder = begins_to_train(project, "cpu_demo", p, before)
    if how == "ctrl-c":
        os.killpg(p.pid, signal.SIGINT)
    else:
        (container,) = say("docker", "ps", "-q").split()
        say("docker", "stop", container)
    said = p.communicate(timeout=180)[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted", said[-2000:]
    assert p.returncode in (130, 143), said[-2000:]
    assert list(project.glob(f"models/**/{folder.name}/checkpoint-*")), said[-2000:]


def test_a_run_whose_container_was_killed_is_seen_to_be_dead_from_outside(project, base):
    from nli_ft.records import read_run

    before = set((project / "runs/cpu_demo").iterdir())
    p = started(project, "--config", "cpu_demo", "--eval_before", "false", "--seed", "5", base=base)
    folder = begins_to_train(project, "cpu_demo", p, before)
    assert read_run(folder).status == "running"
    (container,) = say("docker", "ps", "-q").split()
    say("docker", "kill", container)
    said = p.communicate(timeout=60)[0]
    assert p.returncode == 137, said[-2000:]
    assert read_run(folder).status == "died"
