"""SLURM's door, opened for real: `nli_run --engine submitit` and scripts/slurm.sh on a cluster of two nodes.

    python -m pytest -m doors tests/doors/test_slurm.py

As root on Debian, with the packages slurm-wlm and munge. The cluster is this machine alone: one slurmctld and two
slurmd on loopback, each with a made-up GPU. There is no accounting, as on many small clusters. The runs train on the
CPU. It takes about fifteen minutes."""

import contextlib, json, os, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
BIN = Path(sys.executable).parent

pytestmark = [
    pytest.mark.doors,
    pytest.mark.skipif(os.geteuid() != 0, reason="starts a cluster, which needs root"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]

CONF = """
ClusterName=doors
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=60
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=4000 Gres=gpu:1
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=90 OverSubscribe=NO
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""


def free_ports(n):
    "Ports that nobody listens on, one after another."
    for first in range(21000, 30000, n):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + n):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return range(first, first + n)
    raise AssertionError("no free ports")


def say(*command, **kw):
    "Run a command that must succeed. Returns what it printed."
    p = subprocess.run(command, capture_output=True, text=True, **kw)
    assert p.returncode == 0, f"{command}: {p.stdout[-1000:]}{p.stderr[-2000:]}"
    return p.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "A cluster of two nodes, stopped afterwards with everything it started."
    home = Path(tmp_path_factory.mktemp("slurm"))
    for one in (home, *home.parents):
        if one.is_relative_to("/tmp") and one != Path("/tmp"):
            one.chmod(
                0o755
            )  # munge refuses folders that others may write, and its clients need to come through
    ports, host = free_ports(3), socket.gethostname()
    (home / "munge").mkdir()
    (home / "state").mkdir()
    (home / "munge/key").write_bytes(os.urandom(1024))
    (home / "munge/key").chmod(0o400)
    conf = CONF.format(home=home, host=host, port=ports[0], first=ports[1], last=ports[2])
    (home / "slurm.conf").write_text(conf)
    (home / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")  # a GPU is a file
    os.environ["SLURM_CONF"] = str(home / "slurm.conf")
    hosts = Path("/etc/hosts").read_text()
    Path("/etc/hosts").write_text(f"{hosts}\n127.0.0.1 n1 n2\n")  # launchers meet by the name of a node
    munge = [f"--{k}={home}/munge/{v}" for k, v in MUNGE.items()]
    daemons = [subprocess.Popen(["munged", "--foreground", "--force", *munge])]
    wait_for(lambda: (home / "munge/socket").exists(), 20, "munge has no socket")
    daemons.append(subprocess.Popen(["slurmctld", "-D", "-f", str(home / "slurm.conf")]))
    daemons += [
        subprocess.Popen(["slurmd", "-D", "-N", f"n{i}", "-f", str(home / "slurm.conf")]) for i in (1, 2)
    ]

    def idle():
        p = subprocess.run(["sinfo", "-h", "-p", "low", "-o", "%t %D"], capture_output=True, text=True)
        return p.stdout.split() == ["idle", "2"]

    try:
        wait_for(idle, 60, "the nodes do not become idle")
        yield home
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not subprocess.check_output(["squeue", "-h"]), 90, "jobs do not end")
        Path("/etc/hosts").write_text(hosts)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
        del os.environ["SLURM_CONF"]


MUNGE = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def wait_for(happens, seconds, what):
    "What `happens` returns, as soon as it is true."
    end = time.time() + seconds
    while time.time() < end:
        if found := happens():
            return found
        time.sleep(0.5)
    raise AssertionError(f"in {seconds} s: {what}")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A clone with the packages of this Python as its .venv."
    there = Path(tmp_path_factory.mktemp("project")) / "nli_ft"
    say("git", "clone", "-q", str(ROOT), str(there))
    shutil.copytree(ROOT / "nli_ft", there / "nli_ft", dirs_exist_ok=True)
    shutil.copy2(ROOT / "scripts/slurm.sh", there / "scripts/slurm.sh")
    (there / ".venv").symlink_to(BIN.parent)
    return there


# slow enough for a time limit to come first, and quick enough to end after it
LONG = ["--max_steps", "60", "--max_train_samples", "240", "--eval_before", "false", "--save_steps", "1000"]


def environment(project):
    env = os.environ | dict(PYTHONPATH=str(project), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return env | dict(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")


def started(project, *words, cwd=None):
    "A command that submits and waits, in a group of its own."
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen(words, cwd=cwd or project, env=environment(project), **how)


def submitit(project, seed, **args):
    "nli_run, which makes a run a job."
    words = dict(timeout_min=10, slurm_partition="low", cpus_per_task=1) | args
    shown = " ".join(f"{k}={v}" for k, v in words.items())
    command = ["nli_run", "--config", "minimal_test", "--seeds", seed, *LONG]
    return started(project, *command, "--engine", "submitit", "--engine_args", shown)


def records(project, seed):
    "Records of a seed, oldest first, each with its summary."
    folders = sorted((project / "runs/minimal_test").glob(f"*-s{seed}-*"))
    return [
        (f, json.loads((f / "summary.json").read_text())) for f in folders if (f / "summary.json").is_file()
    ]


def trains(project, seed, n=1):
    "Wait until the n-th record of a seed has done five steps."

    def far_enough():
        there = records(project, seed)
        logged = there[n - 1][0] / "metrics.jsonl" if len(there) >= n else None
        return logged and logged.is_file() and len(logged.read_text().splitlines()) >= 5

    wait_for(far_enough, 240, f"attempt {n} of seed {seed} does no steps: {records(project, seed)}")


def job_of(project, seed):
    "The job that makes a run, by its record."
    return wait_for(lambda: records(project, seed)[-1][1].get("job"), 60, "a record without its job")


def state_of(job):
    found = re.search(r"JobState=(\w+).*?ExitCode=(\d+):", say("scontrol", "show", "job", job), re.S)
    return found[1], int(found[2])


def ended(project, seed, attempts):
    "That a run ended well in some attempts, each from the checkpoint of the one before."
    there = records(project, seed)
    assert len(there) >= attempts, there
    assert {s["status"] for _, s in there[:-1]} == {"interrupted"}, [s for _, s in there]
    last = there[-1][1]
    assert last["status"] == "done" and last["resumed_from"], last
    # an attempt begins with the curve of the one before
    logged = [json.loads(line) for line in (there[-1][0] / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in logged if "loss" in row]
    assert steps == list(range(1, 61)), "each step once"


def test_a_job_whose_time_is_up_starts_again_and_goes_on_while_its_command_waits(cluster, project):
    p = submitit(project, "1", timeout_min=3, signal_delay_s=60)
    said = p.communicate(timeout=900)[0]
    assert p.returncode == 0, said[-3000:]
    ended(project, "1", attempts=2)
    first = records(project, "1")[0][1]
    assert "its time was up" in first["error"] and first["job"] in said


def test_a_job_that_makes_room_for_another_goes_on_when_there_is_room(cluster, project):
    p = submitit(project, "2", gpus_per_node=1)
    trains(project, "2")
    pushy = say(
        "sbatch", "-p", "high", "--nodes=2", "--gpus-per-node=1", "--output=/dev/null", "--wrap", "sleep 5"
    )
    said = p.communicate(timeout=900)[0]
    assert p.returncode == 0, said[-3000:]
    ended(project, "2", attempts=2)
    assert state_of(pushy.split()[-1]) == ("COMPLETED", 0)


def test_scancel_ends_a_job_with_a_checkpoint_and_its_command_with_the_reason(cluster, project):
    p = submitit(project, "3")
    trains(project, "3")
    job = job_of(project, "3")
    say("scancel", job)
    said = p.communicate(timeout=300)[0]
    ((folder, summary),) = records(project, "3")
    assert summary["status"] == "interrupted" and "scancel" in summary["error"], summary
    assert list(project.glob(f"models/minimal_test/{folder.name}/checkpoint-*")), said
    assert p.returncode != 0 and "interrupted" in said, said
    wait_for(lambda: state_of(job)[0] == "CANCELLED", 60, "the job is not cancelled")


def test_a_command_that_is_told_to_end_says_that_the_jobs_go_on(cluster, project):
    p = submitit(project, "4")
    trains(project, "4")
    job = job_of(project, "4")
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=60)[0]
    assert p.returncode == 143 and "The jobs go on" in said and job in said, said
    assert state_of(job)[0] == "RUNNING"
    say("scancel", job)
    wait_for(lambda: state_of(job)[0] == "CANCELLED", 120, "the job is not cancelled")


def test_a_run_that_fails_is_named_and_its_job_ends_with_its_code(cluster, project):
    p = submitit(project, "5", slurm_setup="'[\"export NLI_FT_CACHE=/proc/nowhere\"]'")
    said = p.communicate(timeout=300)[0]
    assert p.returncode in (1, 2) and "seed 5" in said and "/proc/nowhere" in said, said[-3000:]
    job = re.search(r"job (\S+):", said)[1]
    assert state_of(job) == ("FAILED", p.returncode)


def sbatch(project, where, *options, seed):
    "Submit scripts/slurm.sh from a folder. Returns the job's number."
    script = [str(project / "scripts/slurm.sh"), "--config", "minimal_test", "--seed", seed, *LONG]
    words = ["sbatch", "--parsable", "--cpus-per-task=1", "-p", "low", *options, *script]
    places = [f"--runs_dir={project}/runs", f"--output_dir={project}/models"]
    return say(*words, *places, cwd=where, env=environment(project)).strip()


def test_the_job_script_trains_on_one_gpu_from_any_folder_and_starts_again_when_its_time_is_up(
    cluster, project, tmp_path
):
    # SLURM may send the signal up to a minute early
    options = ["--gpus-per-node=1", "--time=3", "--signal=B:USR2@60", f"--output={tmp_path}/out"]
    job = sbatch(project, tmp_path, *options, seed="6")
    wait_for(lambda: state_of(job)[0] in ("COMPLETED", "FAILED", "TIMEOUT"), 900, "the job does not end")
    printed = (tmp_path / "out").read_text()
    assert state_of(job) == ("COMPLETED", 0), printed[-3000:]
    assert "starts again" in printed and f"job {job} was started again" in printed
    ended(project, "6", attempts=2)


def test_two_nodes_without_gpus_are_refused_with_a_reason(cluster, project, tmp_path):
    options = ["--nodes=2", "--gpus-per-node=1", f"--output={tmp_path}/out"]
    job = sbatch(project, project, *options, seed="7")
    wait_for(lambda: state_of(job)[0] in ("COMPLETED", "FAILED"), 300, "the job does not end")
    printed = (tmp_path / "out").read_text()
    assert state_of(job)[0] == "FAILED" and "Traceback" not in printed, printed[-3000:]
    assert "GPU" in printed, printed[-3000:]
