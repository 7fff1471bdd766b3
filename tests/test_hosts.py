"""Processes on several hosts: how they are started, find each other, and give up. Two hosts with a cable between them
are tests/doors/test_two_hosts.py."""

import json, os, socket, subprocess, sys

import pytest

from nli_ft import hosts
from nli_ft.process import ConfigError, project_root

ROOT = project_root()
TINY = (
    "--config minimal_test --model_id tiny-mistral --device cpu --compute_dtype fp32 --target_modules q_proj "
    "--max_steps 2 --logging_steps 1 --max_eval_samples 4 --max_new_tokens 4 --eval_before false"
).split()


@pytest.fixture
def second_of_two(monkeypatch):
    "The environment of a process on the second of two hosts."
    variables = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", RANK="1", MASTER_ADDR="first", MASTER_PORT="29500")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_gloo_is_told_the_interface_by_which_the_first_host_is_reached(second_of_two, monkeypatch):
    monkeypatch.setattr(hosts, "interface_to", lambda address: ("eth7", "10.0.0.2"))
    hosts.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_an_interface_that_the_user_named_stays(second_of_two, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setattr(hosts, "interface_to", lambda address: pytest.fail("nothing is to be chosen"))
    hosts.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_processes_on_one_host_need_no_interface(second_of_two, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(hosts, "interface_to", lambda address: pytest.fail("nothing is to be chosen"))
    hosts.choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("out, chosen", [(["eth0"], "eth0"), (["eth0", "ib0"], None), ([], None)])
def test_a_first_host_that_knows_itself_as_its_loopback_takes_the_only_way_out(
    second_of_two, monkeypatch, capsys, out, chosen
):
    monkeypatch.setattr(hosts, "interface_to", lambda address: ("lo", "127.0.1.1"))
    monkeypatch.setattr(hosts, "outward", lambda: out)
    hosts.choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
    said = capsys.readouterr().out
    assert ("first stands for 127.0.1.1" in said and "one of eth0, ib0" in said) == (len(out) > 1)


def test_the_loopback_is_no_way_out():
    assert "lo" not in hosts.outward()


def test_an_address_that_leads_nowhere_is_named(second_of_two, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(
        ConfigError, match="--main_process_ip no-such-host.invalid: this host cannot reach it"
    ):
        hosts.choose_interface()


def test_a_process_whose_others_do_not_come_gives_up_and_says_where_it_waited():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    code = "import nli_ft.hosts as h; h.MEETING = 0.05; h.meet(cpu=True)"
    r = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | env | dict(MASTER_PORT=str(port)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert r.returncode == 1
    assert "TrainingStopped: the 2 processes of this run did not find each other" in r.stderr, r.stderr[
        -2000:
    ]
    assert f"at 127.0.0.1:{port}" in r.stderr


def test_an_error_of_a_process_that_is_alone_is_not_taken_for_others_that_do_not_come(monkeypatch):
    import accelerate.state

    def broken(**options):
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(accelerate.state, "PartialState", broken)
    with pytest.raises(RuntimeError, match="^CUDA driver"):
        hosts.meet(cpu=False)


def test_processes_that_have_met_may_wait_for_each_other_for_a_day(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist, nli_ft.hosts as h\n"
        "state = h.meet(cpu=True)\n"
        "gloo = dist.group.WORLD._get_backend(torch.device('cpu'))\n"
        "open(f'{sys.argv[1]}/{state.process_index}', 'w').write(str(gloo.options._timeout))\n"
        "state.destroy_process_group()\n"
    )
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        tmp_path,
    ]
    r = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stderr[-2000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1 day, 0:00:00"] * 2


@pytest.mark.every
def test_accelerate_on_two_machine_ranks_of_a_cpu_is_one_run_of_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in (0, 1):
        words = (
            f"-m accelerate.commands.launch --cpu --num_machines 2 --num_processes 2 --machine_rank {rank} "
            f"--main_process_ip 127.0.0.1 --main_process_port {port} --mixed_precision no --dynamo_backend no "
            f"-m nli_ft.train_sft --output_dir {tmp_path}/models --runs_dir {tmp_path}/runs"
        ).split()
        env = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
        started.append(
            subprocess.Popen(
                [sys.executable, *words, *TINY],
                cwd=ROOT,
                env=env | dict(OMP_NUM_THREADS="1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [p.communicate(timeout=400)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], "\n".join(said)[-4000:]
    [path] = tmp_path.glob("runs/*/*/summary.json")
    assert json.loads(path.read_text())["processes"] == 2
