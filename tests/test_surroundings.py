"""Where commands start: locales that are not UTF-8, no home folder, a user id without a name, disks that nobody can
write to."""

import ast, json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

from nli_ft.process import project_root

root = project_root()
bin = Path(sys.executable).parent
COMMANDS = "train run runs compare bench data corpus think reflect evaluate predict merge push".split()
SET_HERE = ("LC_", "LANG", "PYTHONUTF8", "PYTHONIOENCODING", "NLI_FT_CACHE", "HF_HOME")
ALONE = {k: v for k, v in os.environ.items() if not k.startswith(SET_HERE)}
ALONE |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
TINY = [
    "--config",
    "minimal_test",
    "--model_id",
    "tiny-mistral",
    "--max_steps",
    "2",
    "--max_train_samples",
    "8",
    "--max_eval_samples",
    "2",
    "--max_new_tokens",
    "4",
    "--eval_before",
    "false",
]
PAIR = dict(premise="一只狗在跑。→ café", hypothesis="Ein Hund läuft – schnell.")


@pytest.fixture(scope="session")
def latin(tmp_path_factory):
    "Variables for a Latin-1 locale. It is compiled here, because no machine has it."
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")],
        capture_output=True,
    )
    if not (folder / "en_US.ISO-8859-1").is_dir():
        pytest.skip(f"localedef: {made.stderr[:80]}")
    return dict(LOCPATH=str(folder), LC_ALL="en_US.ISO-8859-1")


@pytest.fixture(
    params=[
        "latin-1",
        "ascii streams",
        pytest.param("ascii", marks=pytest.mark.every),
        pytest.param("latin-1 streams", marks=pytest.mark.every),
    ]
)
def locale(request):
    "Variables that leave Python without UTF-8: by the locale, or for its streams alone."
    if request.param == "ascii":
        return ASCII
    if request.param == "latin-1":
        return request.getfixturevalue("latin")
    return dict(PYTHONIOENCODING=request.param.split()[0])


def nli(command, *args, cwd=root, **env):
    "(exit code, standard output as bytes, standard error as text)"
    r = subprocess.run(
        [bin / f"nli_{command}", *args], cwd=cwd, env=ALONE | env, capture_output=True, timeout=300
    )
    return r.returncode, r.stdout, r.stderr.decode("utf-8", "replace")


def read(output, env):
    "Text as a terminal with these variables would show it. Escapes stand for what an encoding lacks."
    return output.decode(env.get("PYTHONIOENCODING", "utf-8"))


# -- locales


def test_every_command_shows_its_help_in_every_locale(locale):
    for command in COMMANDS:
        code, out, err = nli(command, "--help", **locale)
        assert (code, err) == (0, ""), (command, err)
        assert b"example" in out, command


SUBCOMMANDS = [("data", s) for s in "prepare check stats download push".split()] + [
    ("bench", s) for s in "train generate growth".split()
]


def test_every_subcommand_shows_an_example_of_itself():
    for command, sub in SUBCOMMANDS:
        code, out, err = nli(command, sub, "--help")
        assert code == 0 and f"  nli_{command} {sub} " in out.decode().partition("example")[2], (command, sub)


def test_light_commands_read_and_write_any_text_in_every_locale(tmp_path, locale):
    there = tmp_path / "données 狗"
    there.mkdir()
    rows = [dict(PAIR, id=str(i), label=i % 2) for i in range(4)]
    (there / "paare.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    record = next((root / "runs" / "cpu_demo").glob("*/summary.json")).parent
    # a user's own config is text too
    (there / "mine.py").write_text(
        f'"""Größer."""\nbase = "minimal_test"\nwandb_run_name = "{PAIR["premise"]}"\n', encoding="utf-8"
    )
    code, out, err = nli("train", "--config", there / "mine.py", "--print_config", **locale)
    assert code == 0 and json.loads(read(out, locale))["config"]["wandb_run_name"] == PAIR["premise"], err
    code, out, err = nli(
        "think",
        "--input",
        there / "paare.jsonl",
        "--output",
        there / "gedanken.jsonl",
        "--model",
        "m",
        "--dry_run",
        **locale,
    )
    assert code == 0 and "4 to do" in read(out, locale), err
    code, out, err = nli("compare", record, f"{record}:before", "--out", there / "vergleich.md", **locale)
    assert code == 0 and "no difference" in read(out, locale) or "points" in read(out, locale), err
    assert (there / "vergleich.md").read_text(encoding="utf-8")
    code, out, err = nli("runs", "--json", **locale)
    assert code == 0 and json.loads(read(out, locale)), err
    assert nli("data", "check", there / "fehlt 狗.jsonl", **locale)[0] == 2


@pytest.mark.every
def test_a_model_is_trained_evaluated_and_asked_in_a_latin_and_an_ascii_locale(tmp_path, latin):
    there = tmp_path / "données 狗"
    places = ["--runs_dir", there / "r", "--output_dir", there / "m"]
    code, out, err = nli("train", *TINY, *places, **latin)
    assert code == 0, err
    run = next(there.glob("r/*/*"))
    assert nli("evaluate", "--run", run, "--mode", "forced", **ASCII)[0] == 0
    asked = [
        bin / "nli_predict",
        "--run",
        run,
        "--mode",
        "forced",
        "--json",
        "--premise",
        PAIR["premise"],
        "--hypothesis",
        PAIR["hypothesis"],
    ]
    answer = subprocess.run(asked, env=ALONE | ASCII, cwd=root, capture_output=True)
    assert answer.returncode == 0 and json.loads(answer.stdout)["predicted_label"] in (0, 1)


@pytest.mark.every
def test_a_notebook_runs_and_shows_its_output_in_a_latin_locale(tmp_path, latin):
    code, out, err = nli(
        "run", *TINY, "--runs_dir", tmp_path / "狗 r", "--output_dir", tmp_path / "m", **latin
    )
    assert code == 0 and "accuracy – → " in out.decode("utf-8"), err
    assert "████" in (next(tmp_path.glob("狗 r/*/*/train.ipynb"))).read_text(encoding="utf-8")


def test_bytes_that_are_no_text_are_refused_as_a_premise(tmp_path):
    code, _, err = nli("predict", "--run", "x", "--premise", b"caf\xe9", "--hypothesis", "b")
    assert code == 2 and "--premise cannot be read as text in UTF-8" in err


def test_a_latin_argument_is_read_in_a_latin_locale(latin):
    say = "import sys; from nli_ft.process import typed_text; print(ascii(typed_text(sys.argv[1], '--premise')))"
    r = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", say, b"caf\xe9"],
        cwd=root,
        env=ALONE | latin,
        capture_output=True,
        text=True,
    )
    assert r.stdout == "'caf\\xe9'\n", r.stderr


def in_the_locales_encoding(call):
    "Does this call read or write text without saying its encoding?"
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text") or given.get("text") is True:
        return True
    if not (isinstance(call.func, ast.Name) and name == "open"):
        return False
    mode = given.get("mode") or getattr(call.args[1], "value", None) if len(call.args) > 1 else "r"
    return "b" not in mode


def test_no_file_of_the_package_is_read_or_written_in_the_locales_encoding():
    found = []
    for path in (root / "nli_ft").glob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        found += [
            f"{path.name}:{c.lineno}: {ast.unparse(c)[:90]}" for c in calls if in_the_locales_encoding(c)
        ]
    assert found == []


# -- homes and users


@pytest.mark.every
def test_a_run_without_a_home_keeps_its_caches_in_a_folder_of_its_own(tmp_path):
    (tmp_path / "t").mkdir()
    env = dict(HOME="/dev/null/home", TMPDIR=str(tmp_path / "t"))
    code, out, err = nli("run", *TINY, "--runs_dir", tmp_path / "r", "--output_dir", tmp_path / "m", **env)
    assert code == 0, err
    own = tmp_path / "t" / f"nli_ft-{os.getuid()}"
    assert err.count("note: there is no home folder") == 1 and str(own) in err
    assert (own / "nli_ft_cache" / "tiny-mistral").is_dir() and own.stat().st_mode & 0o777 == 0o700


def test_a_command_without_a_home_says_once_where_its_caches_go(tmp_path):
    code, out, err = nli("runs", HOME="/dev/null/home", TMPDIR=str(tmp_path))
    assert (
        code == 0
        and out
        and err.startswith("note: there is no home folder, so caches go to")
        and err.count("\n") == 1
    )


def settled(code, **env):
    "What a new process prints after `settle`. It runs `code` first."
    text = (
        f"import getpass, os, pwd, tempfile, json\n{code}\nfrom nli_ft.process import settle\nsettle()\n"
        "print(json.dumps(dict(os.environ) | dict(user=getpass.getuser())))"
    )
    keep = {
        k: v
        for k, v in ALONE.items()
        if k not in ("USER", "LOGNAME", "NLI_FT_CACHE", "HF_HOME", "MPLCONFIGDIR")
    }
    r = subprocess.run([sys.executable, "-c", text], cwd=root, env=keep | env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout), r.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_id_without_a_name_gets_one():
    env, said = settled("from nli_ft import config_loader\nos.setgid(12345); os.setuid(12345)", HOME="/")
    assert env["user"] == env["USER"] == "uid12345" and env["NLI_FT_CACHE"].startswith(
        env["MPLCONFIGDIR"].rpartition("/")[0]
    )


def test_a_home_that_can_be_written_is_left_alone(tmp_path):
    env, said = settled("", HOME=str(tmp_path), USER="me")
    assert env["HOME"] == str(tmp_path) and "NLI_FT_CACHE" not in env and said == ""


def test_only_what_was_not_set_is_moved(tmp_path):
    env, said = settled(
        "", HOME="/dev/null/home", NLI_FT_CACHE=str(tmp_path), TMPDIR=str(tmp_path), USER="me"
    )
    assert env["NLI_FT_CACHE"] == str(tmp_path) and env["HOME"].startswith(str(tmp_path)) and said == ""


def test_a_folder_that_another_user_could_have_made_is_not_used(tmp_path):
    (tmp_path / f"nli_ft-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"nli_ft-{os.getuid()}").chmod(0o777)
    env, _ = settled("", HOME="/dev/null/home", TMPDIR=str(tmp_path), USER="me")
    assert (
        env["HOME"] != str(tmp_path / f"nli_ft-{os.getuid()}")
        and Path(env["HOME"]).stat().st_mode & 0o777 == 0o700
    )


# -- disks


def can_mount():
    if os.getuid() != 0 or shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
        ).returncode
        == 0
    )


mounts = pytest.mark.skipif(not can_mount(), reason="needs the right to mount")


def on(mount, command, cwd):
    "Run a command in a mount namespace of its own, after `mount` (shell text)."
    return subprocess.run(
        [
            "unshare",
            "-m",
            "bash",
            "-c",
            f'{mount} && cd "$1" && exec "${{@:2}}"',
            "sh",
            str(cwd),
            *map(str, command),
        ],
        env=ALONE | dict(PATH=f"{bin}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=200,
    )


def read_only(folder):
    return f"mount --bind '{folder}' '{folder}' && mount -o remount,ro,bind '{folder}'"


@pytest.fixture
def project(tmp_path):
    "A copy of the project without an environment."
    for name in ("nbs", "nli_ft", "scripts"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in (
        "settings.ini",
        "setup.py",
        "requirements.txt",
        "requirements-model.txt",
        "run_training.sh",
        "run_tests.sh",
    ):
        shutil.copy(root / name, tmp_path)
    return tmp_path


@mounts
@pytest.mark.parametrize(
    "command, said",
    [
        (
            ["bash", "run_training.sh", "--local", "--config", "minimal_test"],
            "copy the project to a folder of your own",
        ),
        (["bash", "run_tests.sh"], "copy it to a folder of your own"),
        (["nli_run", *TINY], "Choose another runs_dir"),
        (["nli_corpus", "--size", "demo", "--out", "corpus"], "name another folder"),
        (["nli_compare", "RECORD", "RECORD:before", "--out", "c.md"], "c.md: cannot be written"),
    ],
)
def test_a_read_only_project_is_one_message_and_exit_code_2(project, command, said):
    record = str(next((root / "runs" / "cpu_demo").glob("*/summary.json")).parent)
    r = on(read_only(project), [c.replace("RECORD", record) for c in command], project)
    errors = [l for l in r.stderr.splitlines() if l.startswith("error: ")]
    assert r.returncode == 2 and len(errors) == 1 and said in r.stderr and "Traceback" not in r.stderr, (
        r.stderr
    )


@mounts
def test_a_full_disk_is_one_message(project):
    full = (
        f"mkdir -p '{project}/runs' && mount -t tmpfs -o size=4k none '{project}/runs' && (yes "
        f">'{project}/runs/full' 2>/dev/null || true)"
    )
    r = on(full, ["nli_run", *TINY], project)
    assert (
        r.returncode == 2
        and "No space left" in r.stderr
        and "Make room" in r.stderr
        and "Traceback" not in r.stderr
    ), r.stderr


def test_output_that_cannot_be_written_is_one_message_and_a_reader_that_leaves_is_none():
    with open("/dev/full", "w") as full:
        r = subprocess.run(
            [bin / "nli_runs"], cwd=root, env=ALONE, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (
        r.returncode == 1
        and r.stderr.startswith("error: what it writes: No space left on device")
        and r.stderr.count("\n") == 1
    )
    gone, kept = os.pipe()
    os.close(gone)
    r = subprocess.run(
        [bin / "nli_runs"], cwd=root, env=ALONE, stdout=kept, stderr=subprocess.PIPE, text=True
    )
    os.close(kept)
    assert (r.returncode, r.stderr) == (141, "")


def test_help_that_cannot_be_written_is_said_too():
    env = {
        k: v for k, v in ALONE.items() if k != "PYTHONUNBUFFERED"
    }  # without a buffer, argparse swallows the error
    with open("/dev/full", "w") as full:
        r = subprocess.run(
            [bin / "nli_runs", "--help"], cwd=root, env=env, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert r.returncode == 1 and r.stderr.startswith("error: what it writes: No space left on device")


BUSY = """
import os
import nli_ft.process
from nli_ft.process import busy_note, command
nli_ft.process._others_at_work = lambda: LOAD
os.sched_getaffinity = lambda pid: {0, 1}
@command
def main(argv=None):
    print(os.environ.get("OMP_WAIT_POLICY"), busy_note())
main([])
"""


@pytest.mark.parametrize(
    "load, set_here, said",
    [
        ((1.1, 1), {}, "passive note: this machine has other work (load 1.1 on 2 cores)"),
        ((0.4, 1), {}, "None \n"),
        ((2.0, 0), {}, "None \n"),  # of the command before this one
        ((9.0, 9), dict(OMP_NUM_THREADS="1"), "None \n"),  # nobody waits for anybody
        ((9.0, 9), dict(OMP_WAIT_POLICY="active"), "active \n"),  # the user has decided
    ],
)
def test_on_a_busy_machine_threads_wait_without_spinning_unless_the_user_says_otherwise(load, set_here, said):
    env = {k: v for k, v in ALONE.items() if not k.startswith("OMP_")} | set_here
    code = BUSY.replace("LOAD", str(load))
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert r.returncode == 0 and r.stdout.startswith(said), r.stdout + r.stderr
