"""Two hosts, for real: two network namespaces with a cable between them, each with a host name of its own, train one
run on CPUs by `accelerate launch --num_machines 2`.

    python -m pytest -m doors tests/doors/test_two_hosts.py

As root on Linux, with the packages iproute2 and util-linux. The hosts share this machine's disk, as the nodes of a
cluster do. As on Debian, each knows its own name as 127.0.1.1. It takes about fifteen minutes, most of
them waiting."""

import contextlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("ip", "unshare", "mount", "hostname")
ADDRESS = ("192.168.77.1", "192.168.77.2")  # above 127: gloo lets the lower of two addresses listen
TINY = (
    "--config minimal_test --model_id tiny-mistral --device cpu --compute_dtype fp32 --target_modules q_proj,v_proj "
    "--logging_steps 1 --max_eval_samples 4 --max_new_tokens 4 --eval_before false"
)

pytestmark = [
    pytest.mark.doors,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces, which needs root"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]


def say(command):
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def cable():
    "Two network namespaces, host0 and host1, with an interface `wire` each."
    for name in ("host0", "host1"):
        say(f"ip netns add {name}")
    say("ip link add wire netns host0 type veth peer name wire netns host1")
    for name, address in zip(("host0", "host1"), ADDRESS):
        say(f"ip -n {name} address add {address}/24 dev wire")
        for interface in ("lo", "wire"):
            say(f"ip -n {name} link set {interface} up")
    yield
    for name in ("host0", "host1"):
        say(f"ip netns delete {name}")


def start(rank, tmp_path, *, at=ADDRESS[0], more="", **variables):
    "What a person types on a host. Its output goes to tmp_path/host<rank>.log."
    names = tmp_path / f"hosts{rank}"
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 host{rank}\n{ADDRESS[1 - rank]} host{1 - rank}\n")
    train = (
        f"{sys.executable} -m accelerate.commands.launch --cpu --num_machines 2 --num_processes 2 "
        f"--machine_rank {rank} --main_process_ip {at} --main_process_port 29777 --mixed_precision no "
        f"--dynamo_backend no -m nli_ft.train_sft {TINY} --output_dir {tmp_path}/models "
        f"--runs_dir {tmp_path}/runs {more}"
    )
    own = f"hostname host{rank} && mount --bind {names} /etc/hosts && exec {train}"
    env = {k: v for k, v in os.environ.items() if k not in ("GLOO_SOCKET_IFNAME", "WORLD_SIZE")}
    with open(tmp_path / f"host{rank}.log", "w") as log:
        host = subprocess.Popen(
            ["ip", "netns", "exec", f"host{rank}", "unshare", "--mount", "--uts", "bash", "-c", own],
            cwd=ROOT,
            env=env | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1") | variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    host.netns = f"host{rank}"
    return host


@contextlib.contextmanager
def both(tmp_path, **kw):
    "Both hosts have started. Whatever is left of them is ended."
    hosts = [start(rank, tmp_path, **kw) for rank in (0, 1)]
    try:
        yield hosts
    finally:
        for host in hosts:
            kill(host)


def kill(host):
    "The power of a host fails: all its processes end at once."
    with contextlib.suppress(ProcessLookupError):
        os.killpg(host.pid, signal.SIGKILL)
    pids = subprocess.run(["ip", "netns", "pids", host.netns], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    host.wait(60)


def log(tmp_path, rank):
    return (tmp_path / f"host{rank}.log").read_text()


def logs(tmp_path):
    return "\n".join(f"--- host{rank}\n{log(tmp_path, rank)[-3000:]}" for rank in (0, 1))


def summary(tmp_path):
    "What the one record says."
    [path] = tmp_path.glob("runs/*/*/summary.json")
    return json.loads(path.read_text())


def wait_for(tmp_path, rank, text, seconds=300):
    for _ in range(seconds):
        if text in log(tmp_path, rank):
            return
        time.sleep(1)
    raise AssertionError(f"host{rank} never said {text!r}\n{logs(tmp_path)}")


def test_two_hosts_make_one_record_though_their_own_names_lead_to_themselves(tmp_path):
    with both(tmp_path) as hosts:
        codes = [host.wait(400) for host in hosts]
    assert codes == [0, 0], logs(tmp_path)
    end = summary(tmp_path)
    assert (end["status"], end["processes"], end["after"]["n"]) == ("done", 2, 4)
    assert "record:" in log(tmp_path, 0) and "record:" not in log(tmp_path, 1)


def test_the_first_host_may_be_told_by_its_name_which_leads_it_to_its_loopback(tmp_path):
    with both(tmp_path, at="host0") as hosts:
        codes = [host.wait(400) for host in hosts]
    assert codes == [0, 0], logs(tmp_path)


def test_hosts_that_cannot_reach_each_other_both_end_and_say_what_to_look_at(tmp_path):
    "The second host is told to give the address of its loopback. That is what the first one then connects to."
    hosts = [start(0, tmp_path), start(1, tmp_path, GLOO_SOCKET_IFNAME="lo")]
    try:
        codes = [host.wait(420) for host in hosts]
    finally:
        for host in hosts:
            kill(host)
    assert 0 not in codes, logs(tmp_path)
    for rank in (0, 1):
        assert "did not find each other within 5 minutes" in log(tmp_path, rank), logs(tmp_path)
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_host_that_never_comes_does_not_keep_the_other_for_a_day(tmp_path):
    first = start(0, tmp_path)
    try:
        code = first.wait(420)
    finally:
        kill(first)
    assert code != 0 and "timed out" in log(tmp_path, 0).lower(), log(tmp_path, 0)[-3000:]


def test_a_killed_host_ends_the_other_which_says_so(tmp_path):
    with both(tmp_path, more="--max_steps 4000 --save_steps 2") as (first, second):
        wait_for(tmp_path, 0, "step     3/")
        kill(second)
        began = time.monotonic()
        code = first.wait(180)
        took = time.monotonic() - began
    end = summary(tmp_path)
    assert code != 0 and took < 120, (code, took)
    assert end["status"] == "failed" and "another process of this run ended" in end["error"], end
    assert "another process of this run ended" in log(tmp_path, 0), log(tmp_path, 0)[-3000:]
    assert list(tmp_path.glob("models/*/*/checkpoint-*")), "the last checkpoint is there"
