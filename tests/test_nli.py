"""The face of the package: `nli` and what every command shares, and `from nli_ft import …`."""

import argparse, ast, contextlib, importlib, inspect, io, json, os
import pickle, platform, pty, re, runpy, subprocess, sys, time, warnings
from pathlib import Path

import pytest

import nli_ft
from nli_ft import about, process, umbrella
from nli_ft.process import CommandParser, command, project_root

ROOT = project_root()
BIN = Path(sys.executable).parent
HERE = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="100")


def parser_of(name):
    "The parser that a command builds."
    found = []

    def stop(self, *args, **options):
        found.append(self)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(CommandParser, "parse_args", stop)
        with pytest.raises(SystemExit):
            umbrella._function(name)([])
    return found[0]


def leaves(parser):
    "The parser and those of its subcommands."
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from leaves(sub)


def said(*words, by=umbrella.nli_cli):
    "(exit code, standard output, standard error) of `nli`, or of another command, in this process."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = by(list(words))
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


EVERY = [*umbrella.COMMANDS, "env", "completion"]

# ---- nli


def test_nli_has_every_command_that_setup_installs(monkeypatch):
    import setuptools

    got = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: got.update(options))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    scripts = dict(entry.split("=nli_ft.") for entry in got["entry_points"]["console_scripts"])
    assert scripts.pop("nli") == "umbrella:nli_cli"
    assert scripts == {f"nli_{name}": target for name, (target, _) in umbrella.COMMANDS.items()}


def test_nli_alone_lists_its_commands_and_loads_nothing():
    code = (
        "import sys; from nli_ft.umbrella import nli_cli\ntry: nli_cli([])\nexcept SystemExit: pass\n"
        "print({'torch', 'pandas', 'transformers', 'matplotlib', 'papermill'} & {*sys.modules})"
    )
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=HERE, cwd=ROOT)
    assert p.stdout.endswith("set()\n"), p.stdout[-200:] + p.stderr
    for name in EVERY:
        assert re.search(rf"^    {name}\b", p.stdout, re.M), name


def test_both_names_of_a_command_do_the_same():
    words = ["--config", "cpu_demo", "--learning_rate", "3e-4", "--print_config"]
    p = subprocess.run([BIN / "nli_train", *words], capture_output=True, text=True, env=HERE, cwd=ROOT)
    assert json.loads(p.stdout)["config"]["learning_rate"] == 3e-4
    assert said("train", *words) == said("train", *[w.replace("_", "-") if w[0] == "-" else w for w in words])
    assert said("train", *words) == (0, p.stdout, "")


def test_the_version_is_that_of_the_package():
    assert said("--version")[:2] == (0, f"nli_ft {nli_ft.__version__}\n")


@pytest.mark.parametrize(
    "words, meant",
    [
        (["trian"], "train"),
        (["data", "chek", "f.jsonl"], "check"),
        (["study", "repot"], "report"),
        (["compare", "--latest", "cpu_dmo"], "cpu_demo"),
        (["evaluate", "--run", "x", "--engine", "vlm"], "vllm"),
        (["predict", "--rn", "x"], "--run"),  # before the flag that is missing
        (["run", "-config", "cpu_demo"], "--config"),
    ],
)
def test_a_misspelt_word_gives_exit_code_2_one_line_and_the_right_word(words, meant):
    code, out, err = said(*words)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"Did you mean {meant}?" in err


@pytest.mark.parametrize("name", umbrella.COMMANDS)
def test_a_help_and_a_wrong_command_line_name_the_command_as_it_was_typed(name):
    room, function = umbrella.COMMANDS[name][0].split(":")
    own = getattr(importlib.import_module(f"nli_ft.{room}"), function)
    other_name = re.compile(rf"\bnli_({'|'.join(umbrella.COMMANDS)})\b")
    with_blank, with_bar = said(name, "--help")[1], said("--help", by=own)[1]
    assert with_blank.startswith(f"usage: nli {name} ") and not other_name.search(with_blank)
    assert with_bar.startswith(f"usage: nli_{name} ") and not re.search(r"\bnli ", with_bar)
    assert f"nli {name} --help lists all" in said(name, "--no_such_flag")[2]
    assert f"nli_{name} --help lists all" in said("--no_such_flag", by=own)[2]


def test_the_help_of_a_subcommand_names_it_as_it_was_typed_and_has_its_examples():
    text = said("data", "check", "--help")[1]
    assert text.startswith("usage: nli data check ") and "\n  nli data check data/" in text


def test_an_error_about_a_config_lists_the_configs():
    assert "The configs are" in said("train", "--config", "nothing_like_it")[2]
    assert "Configs with finished runs: cpu_demo" in said("compare", "--latest", "nothing_like_it")[2]
    bench = [parser for parser in leaves(parser_of("bench")) if "--config" in parser._option_string_actions]
    assert bench
    for parser in (*map(parser_of, ("train", "run", "compare")), *bench):
        text = " ".join(parser.format_help().split())
        assert "ablation2_best, auxiliary, correct_only, cpu_demo" in text, parser.prog


# ---- what every parser does


@pytest.mark.parametrize("name", EVERY)
def test_every_help_ends_with_the_exit_codes_and_every_flag_takes_hyphens_and_has_a_suggestion(name):
    for parser in leaves(parser_of(name)):
        assert isinstance(parser, CommandParser)
        text = parser.format_help()
        assert re.search(r"\n\nexit codes: 0 [^\n]+(\n\S[^\n]*)*\n\Z", text), parser.prog
        assert " ".join(text.split()).endswith("130 stopped by ctrl-c"), parser.prog
        if parser._subparsers is not None:
            continue
        shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]
        for flag in (o for a in shown for o in a.option_strings if o.startswith("--")):
            for form in (flag.replace("_", "-"), f"--{flag[2:].replace('-', '_')}"):
                assert parser._spelled([form, f"{form}=a-b_c"]) == [flag, f"{flag}=a-b_c"]
            err = io.StringIO()
            with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as e:
                parser.parse_args([f"{flag}q", "1"])
            assert e.value.code == 2 and f"Did you mean {flag}?" in err.getvalue()


def test_what_stands_behind_two_dashes_or_in_a_value_is_no_flag():
    parser = CommandParser("x")
    parser.add_argument("--max_steps")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--max-steps"]).words == ["--max-steps"]
    assert parser.parse_args(["--max-steps=--a-b"]).max_steps == "--a-b"


def test_prose_of_a_help_is_filled_and_examples_are_not():
    long = "  nli_x " + "--option value " * 12
    parser = CommandParser("nli_x", description="A sentence.\n" + "word " * 40, epilog=f"examples:\n{long}")
    lines = parser.format_help().splitlines()
    assert long in [f"{line} " for line in lines] and max(len(li) for li in lines if "word" in li) < 100


def test_a_future_warning_stays_away_and_others_do_not():
    @command
    def warns(argv):
        warnings.warn("in the next version of something", FutureWarning, stacklevel=1)
        warnings.warn("look at this", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warns([])
    assert [str(w.message) for w in seen] == ["look at this"]


def test_a_verdict_is_coloured_on_a_terminal_only(monkeypatch, capsys, tmp_path):
    rows = tmp_path / "pairs.csv"
    rows.write_text("premise,hypothesis,label\n" + "A dog runs.,An animal runs.,entailment\n" * 2)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    seen = {}
    for kind in ("pipe", "terminal", "NO_COLOR"):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sys.stdout, "isatty", lambda kind=kind: kind != "pipe")
            m.setenv("NO_COLOR", "1" if kind == "NO_COLOR" else "")
            with contextlib.suppress(SystemExit):
                umbrella.nli_cli(["data", "check", str(rows)])
        seen[kind] = capsys.readouterr().out
    assert "\033[" in seen["terminal"] and "\033[" not in seen["pipe"] + seen["NO_COLOR"]
    assert re.sub(r"\033\[\d+m", "", seen["terminal"]) == seen["pipe"]


@pytest.mark.every
def test_a_clock_moves_on_a_terminal_while_a_heavy_package_is_loaded(tmp_path):
    import pty

    (tmp_path / "torch.py").write_text("import time, pandas\ntime.sleep(2.4)\n")
    (tmp_path / "pandas.py").write_text("import time\ntime.sleep(1.2)\n")
    (tmp_path / "sklearn.py").write_text("import time\ntime.sleep(2.4)\n")
    code = (
        "import importlib.util, sys, time; from nli_ft.process import alive, command\n@command\ndef go(argv):\n"
        "    importlib.util.find_spec('torch'), time.sleep(1.2), print('asked')\n    import torch\n"
        "    with alive('the rows'): import sklearn\n"
        "    print('loaded', 'exec_module' in vars(torch.__spec__.loader))\ngo([])"
    )
    seen = {}
    for kind in ("terminal", "file"):
        master, slave = pty.openpty()
        err = slave if kind == "terminal" else subprocess.DEVNULL
        env = HERE | dict(PYTHONPATH=f"{tmp_path}:{ROOT}")
        p = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=err, env=env, cwd=ROOT)
        os.close(slave)
        seen[kind] = b""
        with contextlib.suppress(OSError):  # Linux ends a terminal without a writer with EIO
            while chunk := os.read(master, 1024):
                seen[kind] += chunk
        assert p.wait() == 0, seen[kind]
        os.close(master)
    before, _, after = seen["terminal"].partition(b"asked")
    assert b"loading" not in before, "whoever asks for a package does not load it"
    assert after.count(b"loading torch: 00:0") >= 2 and b"loading pandas" not in after
    assert b"the rows: 00:0" in after and b"loading sklearn" not in after, "one clock at a time"
    assert after.endswith(b"loaded False\r\n") and seen["file"] == b"asked\r\nloaded False\r\n"


# command -> its words, and how a sign of life begins: the first one that takes long enough on this machine
WAITING = {
    "corpus": ("--out {} --size small", [b"making the corpus"]),
    "bench": ("train --model tiny-mistral --pairs 1", [b"plan"]),
    "think": (
        "--input {} --output {}.made --model m --base_url http://localhost:1/v1",
        [b"loading openai", b"think:"],
    ),
    "data": ("check {}", [b"checking"]),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_terminal_shows_what_a_command_waits_for_before_it_has_a_result(name, tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = '{"id": "%d", "premise": "A dog runs.", "hypothesis": "An animal runs.", "label": 1}\n'
    # a few rows are checked before anyone has waited
    rows.write_text("".join(row % i for i in range(30_000)))
    words, signs = WAITING[name]
    words = words.replace("{}", str(tmp_path / "new" if name == "corpus" else rows)).split()
    master, slave = pty.openpty()
    p = subprocess.Popen([BIN / "nli", name, *words], stdout=slave, stderr=slave, env=HERE, cwd=ROOT)
    os.close(slave)
    seen = os.read(master, 1024)
    while len(seen) < max(map(len, signs)) + 1:
        seen += os.read(master, 1024)
    p.kill(), p.wait(), os.close(master)
    assert seen.lstrip(b"\r").startswith(tuple(signs))


def test_a_command_that_has_just_begun_gives_its_first_sign_of_life_within_its_first_second(monkeypatch):
    for age, delay in {0.0: 0.7, 0.4: 0.3, 5.0: 1.0}.items():
        monkeypatch.setattr(process, "_born", time.monotonic() - age)
        assert process.alive("working", show=False).delay == pytest.approx(delay, abs=0.05)


# ---- nli_run


def test_nli_run_checks_the_modules_of_the_adapter_before_it_makes_a_record(tmp_path):
    words = f"--config minimal_test --model_id tiny-mistral --seeds 1,2 --runs_dir {tmp_path / 'runs'}"
    p = subprocess.run(
        [BIN / "nli", "run", *words.split(), "--target-modules", "q_proj,foo"],
        capture_output=True,
        text=True,
        env=HERE,
        cwd=ROOT,
    )
    assert p.returncode == 2 and not (tmp_path / "runs").exists(), p.stdout + p.stderr
    assert p.stderr.count("target_modules ['foo'] match no linear layer of tiny-mistral") == 1
    assert "It has ['down_proj', 'gate_proj', 'k_proj'" in p.stderr


# ---- nli env


def test_nli_env_holds_no_secret_no_host_and_no_absolute_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    code, text, _ = said("env", "--quick")
    for facts in (text, said("env", "--quick", "--json")[1]):
        for secret in ("hf_abcdefghijkl", "0123456789abcdef", str(tmp_path), str(Path.home()), str(ROOT)):
            assert secret not in facts
        assert not re.search(rf"\b{re.escape(platform.node())}\b", facts)
    assert code == 0 and "HF_TOKEN=set" in text and "set by HF_HOME" in text and nli_ft.__version__ in text


def test_nli_env_tries_packages_and_a_broken_one_gives_exit_code_1(monkeypatch):
    tried = about.package_fault
    monkeypatch.setattr(
        about,
        "package_fault",
        lambda name: (
            "ImportError: no such symbol" if name == "trl" else tried(name) if name == "torch" else None
        ),
    )
    code, text, _ = said("env")
    assert code == 1 and re.search(r"^FAIL  trl \S+  ImportError: no such symbol$", text, re.M)
    assert re.search(r"^OK    torch", text, re.M) and re.search(r"compute_dtype (bfloat16|float32)", text)
    assert tried("bitsandbytes") is None


def test_only_what_every_installation_needs_is_missed_by_nli_env(monkeypatch):
    got = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: got.update(options))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    always = {re.split("[^\\w-]", need)[0] for need in got["install_requires"]}
    extra = {re.split("[^\\w-]", need)[0] for needs in got["extras_require"].values() for need in needs}
    assert set(about._NEEDED) <= always and set(about._OPTIONAL) - {"flash_attn"} <= extra - always
    monkeypatch.setattr(about, "_versions", lambda: dict.fromkeys(about._NEEDED, "1.0"))
    assert said("env", "--quick")[0] == 0


def test_another_version_than_the_pinned_one_is_said(monkeypatch):
    monkeypatch.setattr(about, "_versions", lambda: dict(trl="0.0.1", torch="2.13.0+cpu"))
    monkeypatch.setattr(about, "_pins", lambda: dict(trl="1.16.0", torch="2.13.0"))
    facts = about.about_here(quick=True)
    assert facts["other_versions"] == dict(trl=["0.0.1", "1.16.0"])
    assert facts["faults"]["peft"] == "not installed"


# ---- completion


def completed(line, folder):
    "What a shell that loaded `nli completion` would offer at the end of a line."
    pytest.importorskip("argcomplete")
    answer = folder / "answer"
    env = HERE | dict(_ARGCOMPLETE="1", COMP_LINE=line, COMP_POINT=str(len(line)), COMP_TYPE="9", IFS="\013")
    env |= dict(_ARGCOMPLETE_STDOUT_FILENAME=str(answer), _ARGCOMPLETE_SHELL="bash")
    subprocess.run([BIN / line.split()[0]], env=env, cwd=ROOT, capture_output=True, check=True)
    return [word.strip() for word in answer.read_text().split("\013")]


@pytest.mark.parametrize(
    "line, offered",
    [
        ("nli tra", ["train"]),
        ("nli train --learning", ["--learning_rate"]),
        ("nli_train --config minim", ["minimal_test"]),
        ("nli study plan rationales_", ["rationales_natural"]),
        ("nli compare runs/cpu_demo/2026", ["runs/cpu_demo/20261126-095322-s42-e8b84932"]),
        ("nli_runs cpu_demo/", ["cpu_demo/20261126-095322-s42-e8b84932"]),
        ("nli predict --run lat", ["latest"]),
        ("nli_evaluate --run cpu", ["cpu_demo", "cpu_demo/20261126-095322-s42-e8b84932"]),
    ],
)
def test_a_shell_completes_commands_flags_configs_studies_and_runs(line, offered, tmp_path):
    found = completed(line, tmp_path)
    assert set(offered) <= set(found) and len(found) <= 2


def test_completion_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    code, out, err = said("completion")
    assert (code, out) == (2, "") and 'pip install -e ".[completion]"' in err


# ---- from nli_ft import …

ASKED = "load_config read_rows prepare fit evaluate compare Study".split()


def test_importing_the_package_loads_only_itself_and_each_name_only_what_it_needs():
    code = (
        "import sys; old = {*sys.modules}; import nli_ft; print({*sys.modules} - old)\n"
        f"from nli_ft import {', '.join(ASKED)}\n"
        f"print([callable(x) for x in ({', '.join(ASKED)})], {{'torch', 'pandas', 'matplotlib'}} & {{*sys.modules}})"
    )
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=HERE, cwd=ROOT)
    assert p.stdout == f"{{'nli_ft'}}\n{[True] * len(ASKED)} set()\n", p.stdout + p.stderr


def test_a_name_means_the_same_before_and_after_its_room_was_imported():
    code = (
        "import nli_ft.evaluate, nli_ft.fit, nli_ft.compare as room\n"
        "from nli_ft import evaluate, fit, compare\n"
        "import inspect\n"
        "from nli_ft.ask import evaluate_run\n"
        "print(callable(evaluate), evaluate.score.__name__, compare is room, fit.fit.__name__,"
        " inspect.signature(evaluate) == inspect.signature(evaluate_run))"
    )
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=HERE, cwd=ROOT)
    assert p.stdout == "True score True fit True\n", p.stderr


def test_an_editor_which_runs_nothing_finds_every_name_of_the_package():
    tree = ast.parse(Path(nli_ft.__file__).read_text(encoding="utf-8"))
    (for_editors,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {}
    for node in for_editors.body:
        told |= {name.asname or name.name: f"{node.module}:{name.name}" for name in node.names}
    assert told == nli_ft._FACE


def test_a_pool_of_processes_can_be_given_a_room_that_is_called():
    assert pickle.loads(pickle.dumps(nli_ft.evaluate)) is nli_ft.evaluate
    code = "import pickle, sys; print(type(pickle.load(sys.stdin.buffer)).__name__)"
    told = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(nli_ft.fit), capture_output=True, env=HERE, cwd=ROOT
    )
    assert told.stdout == b"_CalledRoom\n", told.stderr


def test_the_call_of_a_room_is_the_call_of_its_function():
    from nli_ft import compare, list_runs
    from nli_ft.compare import compare_frame

    run = next(r["path"] for r in list_runs(ROOT / "runs") if r["config"] == "cpu_demo")
    assert compare([run, f"{run}:before"]).equals(compare_frame([run, f"{run}:before"]))


@pytest.mark.parametrize("name", nli_ft._FACE)
def test_every_public_name_is_listed_and_its_docstring_says_what_comes_out_and_what_is_raised(name):
    assert name in dir(nli_ft) and name in nli_ft.__all__ and re.search(rf"\b{name}\b", nli_ft.__doc__)
    text = inspect.getdoc(getattr(nli_ft, name))
    if name.endswith("Error") or name in ("config_names", "list_runs", "preflight"):
        assert text
    else:
        assert "Raises" in text, f"{name}: {text}"


def test_help_of_the_package_and_of_a_room_that_is_called_can_be_read():
    import pydoc

    text = pydoc.render_doc(nli_ft, renderer=pydoc.plaintext)
    assert text.index("load_config(name, overrides)") < text.index("PACKAGE CONTENTS")
    text = pydoc.render_doc(nli_ft.fit, renderer=pydoc.plaintext)
    assert "Call it as fit(prep: " in text and "Dettmers" in text


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        nli_ft.evaluat  # noqa: B018
    with pytest.raises(ImportError):
        exec("from nli_ft import no_such_name")


def test_nbdev_changes_nothing_but_the_version(tmp_path):
    from nbdev.config import update_version

    text = (ROOT / "nli_ft/__init__.py").read_text()
    (tmp_path / "__init__.py").write_text(text.replace('__version__ = "', '__version__ = "9.'))
    update_version(tmp_path)
    assert (tmp_path / "__init__.py").read_text() == text


@pytest.mark.slow
def test_a_real_bash_completes_commands_configs_keys_and_runs():
    pexpect = pytest.importorskip("pexpect")
    pytest.importorskip("argcomplete")
    env = HERE | dict(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", PS1="$ ", HISTFILE="")
    shell = pexpect.spawn("bash", ["--norc", "-i"], cwd=str(ROOT), env=env, timeout=60, encoding="utf-8")
    try:
        shell.sendline('eval "$(nli completion)"; echo now it is re""ady')
        shell.expect_exact("now it is ready")
        for typed, offered in (
            ("nli ev", "nli evaluate"),
            ("nli_run --config ablation0_d", "ablation0_dist"),
            ("nli train --learning", "--learning_rate"),
            ("nli_evaluate --run lat", "latest"),
        ):
            shell.send(f"{typed}\t")
            shell.expect_exact(offered)
            shell.sendcontrol("c")
    finally:
        shell.close(force=True)
