"""Asking a run by hand: by which name it is found, what a person sees while a model writes, and where nobody is there
to read it."""

import ast, contextlib, csv, html, io, json, re, sys, time, warnings

import nbformat, pytest
import test_records
from test_records import ROOT, finished
from tiny_models import box_rows, save_model

import nli_ft.ask, nli_ft.model, nli_ft.talk
from nli_ft.ask import PairAnswer, RunModel, open_run, predict_cli, run_model
from nli_ft.bases import load_tokenizer
from nli_ft.commands import show_run
from nli_ft.compare import compare_cli
from nli_ft.config_loader import load_config
from nli_ft.files import write_jsonl
from nli_ft.model import add_lora, load_base, save_adapter
from nli_ft.predict import predict_rows
from nli_ft.process import ConfigError, RecordError
from nli_ft.records import find_run, finish_run, new_run_dir, read_run, start_run

project = test_records.project  # a fixture: a project of its own, without runs
PAIR = ("The red box holds a blue ball.", "The blue ball is in the red box.")
TYPED = ["--premise", PAIR[0], "--hypothesis", PAIR[1]]


# ---------------------------------------------------------------- names of runs


def test_a_run_is_found_by_folder_id_config_or_latest_from_every_folder(project, monkeypatch):
    old = finished(facts=dict(started="2026-01-01T00:00:00Z"))
    other = finished(config="ablation1", facts=dict(started="2026-01-02T00:00:00Z"))
    new = finished(seed=7, facts=dict(started="2026-01-03T00:00:00Z"))
    finish_run(
        start_run(load_config("minimal_test")), "failed"
    )  # is newer than all, and no answer to any name
    new_run_dir(load_config("ablation1"))
    names = dict(latest=new, minimal_test=new, ablation1=other)
    for run in (old, other, new):
        names |= {run.name: run, f"{run.parent.name}/{run.name}": run, str(run): run}
        names |= {f"runs/{run.parent.name}/{run.name}": run}
    (project / "nbs").mkdir(exist_ok=True)
    (project / "nbs" / "minimal_test").mkdir()  # a folder of this name is no record
    for folder in (project, project / "nbs", project / "runs"):
        monkeypatch.chdir(folder)
        assert {name: find_run(name).resolve() for name in names} == {
            k: v.resolve() for k, v in names.items()
        }
        assert read_run("ablation1").name == f"ablation1/{other.name}"


def test_a_name_that_fits_no_finished_run_says_what_would(project):
    for name, says in {
        "latest": "`nli_run --config cpu_demo` makes one",
        "ablation2": "no finished run of ablation2",
        "runs/no/where": "is no folder. `nli_runs` lists",
        "ablaton2": "A config's name means its newest finished run",
    }.items():
        with pytest.raises(RecordError, match=says):
            find_run(name)
    (project / "empty").mkdir()
    with pytest.raises(RecordError, match="config.json is missing"):
        open_run("empty")


def test_every_command_that_reads_a_run_takes_these_names(project, monkeypatch, capsys):
    one, two = finished(right=lambda i: i > 9), finished(config="ablation1", right=lambda i: i > 2)
    monkeypatch.chdir(project / "runs")
    assert json.loads(show_run("minimal_test", json=True))["name"] == f"minimal_test/{one.name}"
    assert compare_cli(["minimal_test", f"runs/ablation1/{two.name}", "--baseline", "ablation1"]) == 0
    shown = capsys.readouterr().out
    assert f"ablation1/{two.name}" in shown and f"minimal_test/{one.name}" in shown
    for name in ("open_run", "RunModel"):  # nli_evaluate, nli_merge and nli_bench; nli_predict and nli_demo
        with pytest.raises(RecordError, match="no adapter"):
            getattr(nli_ft.ask, name)("latest")


# ---------------------------------------------------------------- one model, many questions


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run record whose model is random: a base with an untrained adapter."
    folder = tmp_path_factory.mktemp("asked")
    save_model("mistral", folder / "base")
    write_jsonl(folder / "train.jsonl", box_rows(8))
    write_jsonl(folder / "dev.jsonl", box_rows(12)[8:])
    places = dict(model_id=folder / "base", train_data=folder / "train.jsonl", eval_data=folder / "dev.jsonl")
    small = dict(device="cpu", compute_dtype="fp32", quantization="none", max_new_tokens=12)
    small |= dict(runs_dir=folder / "runs", output_dir=folder / "models", target_modules="q_proj,v_proj")
    changes = {k: str(v) for k, v in (places | small).items()}
    cfg = load_config("minimal_test", changes, check=False)
    run = start_run(cfg)
    save_adapter(add_lora(load_base(cfg), cfg), load_tokenizer(cfg), cfg, folder / "adapter")
    finish_run(run, adapter=str(folder / "adapter"))
    return run


def files(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_told_while_it_is_written_is_what_is_scored(made):
    model = RunModel(made)
    said = []
    answer = model.ask(*PAIR, say=said.append)
    row = dict(id=1, premise=PAIR[0], hypothesis=PAIR[1])
    weights, tok = model.load()
    [alone] = predict_rows(weights, tok, [nli_ft.ask.question(row, "brief")], model.cfg, progress=False)
    assert answer["completion"] == alone["completion"] == said[-1]
    assert answer["outcome"] == alone["outcome"] and answer["p_entail"] == alone["p_entail"]
    with pytest.raises(ValueError, match="say tells one completion"):
        rows = [nli_ft.ask.question(dict(row, id=i), "brief") for i in range(2)]
        predict_rows(weights, tok, rows, model.cfg, progress=False, say=said.append)


def test_the_stop_rule_and_the_probability_are_those_of_the_batch(made, monkeypatch):
    "A model that writes an answer and more: it ends at the brace, and has a probability."
    import torch

    model = RunModel(made)
    weights, tok = model.load()
    told = '{"thought_process": "so", "predicted_label": 1} and more'
    ids = iter(tok.encode(told, add_special_tokens=False) * 2)
    inner = weights.get_base_model()
    real = inner.forward

    def forward(*args, **kw):
        out = real(*args, **kw)
        out.logits[:] = 0.0
        out.logits[:, -1, next(ids)] = 9.0
        return out

    monkeypatch.setattr(inner, "forward", forward)
    monkeypatch.setattr(nli_ft.generate, "takes", lambda model, name: False)
    cfg = model.cfg.replace(max_new_tokens=200)
    with torch.inference_mode():
        said = []
        answer = nli_ft.ask.ask_model(weights, tok, cfg, "brief", *PAIR, say=said.append)
    assert answer["predicted_label"] == 1 and answer["thought_process"] == "so" and answer["p_entail"] > 0.9
    assert said[-1] == answer["completion"] and "more" not in said[-1]
    assert len(said) > 10 and all(later.startswith(sooner) for sooner, later in zip(said, said[1:]))


def test_a_person_at_a_terminal_asks_twice_and_the_weights_are_loaded_once(made, monkeypatch, capsys):
    loads, real = [], nli_ft.model.load_for_inference

    def load(cfg, adapter=None, **how):
        loads.append(adapter)
        return real(cfg, adapter, **how)

    lines = iter([PAIR[0], PAIR[1], "", "", PAIR[0], "It is red."])

    def typing(prompt):
        print(prompt)
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(nli_ft.model, "load_for_inference", load)
    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), dict(isatty=lambda self: True))())
    assert predict_cli(["--run", str(made), f"{made}:before"]) == 0
    shown = capsys.readouterr().out
    assert len(loads) == 2 and None in loads, "the trained model and the untrained one, once each"
    assert shown.count(f"\nminimal_test/{made.name}\n") == 3 == shown.count(f"{made.name}:before\n") - 1
    assert "premise [the same]: " in shown and "the hypothesis is empty" in shown
    assert shown.count("no answer (") == 6 and "It wrote:" not in shown, "it was read while it was written"


def test_without_sentences_and_terminal_the_error_says_what_to_give(made, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("A dog runs.\nAn animal runs.\n"))
    for args, says in (
        ([], "give --premise and --hypothesis, or --csv and --output"),
        (["--json"], "--json needs --premise and --hypothesis"),
        (TYPED[:2], "give --premise and --hypothesis, or --csv and --output"),
        ([str(made), "--csv", "x.csv", "--output", "y.csv"], "goes with one --run"),
    ):
        with pytest.raises(SystemExit) as e:
            predict_cli(["--run", str(made), *args])
        assert e.value.code == 2 and says in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)  # it was closed before the start
    with pytest.raises(SystemExit) as e:
        predict_cli(["--run", str(made)])
    assert e.value.code == 2


def test_two_runs_answer_the_same_pair(made, capsys):
    argv = ["--run", str(made), f"{made}:before", *TYPED, "--mode", "forced"]
    assert predict_cli(argv) == 0
    shown = capsys.readouterr().out
    assert shown.index(made.name) < shown.index(f"{made.name}:before") and shown.count("label: ") == 2
    assert predict_cli([*argv, "--json"]) == 0
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [r["run"].endswith(":before") for r in rows] == [False, True]
    with pytest.raises(SystemExit) as e:  # nothing is loaded before all runs are there
        predict_cli(["--run", str(made), "no_such_run", *TYPED])
    said = capsys.readouterr()
    assert e.value.code == 2 and "no_such_run is no folder" in said.err and not said.out


def test_what_was_written_is_shown_where_it_holds_no_label(made, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        predict_cli(["--run", str(made), *TYPED])
    assert e.value.code == 1
    shown = capsys.readouterr().out
    wrote = run_model(made).ask(*PAIR, say=lambda text: None)["completion"]
    assert "no answer (" in shown and wrote.strip() and nli_ft.ask._visible(wrote) in shown
    with open(tmp_path / "in.csv", "w", newline="") as f:
        csv.writer(f).writerows([["premise", "hypothesis"], PAIR, ["", "x"]])
    out = tmp_path / "out.csv"
    assert predict_cli(["--run", str(made), "--csv", str(tmp_path / "in.csv"), "--output", str(out)]) == 0
    rows = list(csv.DictReader(open(out, newline="")))
    assert wrote in rows[0]["problem"] and rows[1]["problem"] == "the premise is empty"


def test_a_three_way_answer_shows_three_probabilities():
    shares = dict(entailment=0.7, neutral=0.2, contradiction=0.1)
    text = repr(PairAnswer(predicted_label="entailment", p_entail=0.7, probabilities=shares))
    assert text == "label: entailment\np(entailment): 0.700, p(neutral): 0.200, p(contradiction): 0.100"


def test_a_lost_adapter_is_named_before_anything_is_loaded(made):
    adapter = open_run(made)[2]
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "elsewhere")
    try:
        with pytest.raises(RecordError, match="adapter_model.safetensors is missing, so .* trains one"):
            RunModel(made)
        assert RunModel(f"{made}:before").adapter is None, "the untrained model needs none"
    finally:
        (adapter / "elsewhere").rename(weights)


# ---------------------------------------------------------------- in a notebook


def test_the_session_answers_and_records_nothing(made, capsys):
    from nli_ft.train_sft import Session

    cfg = open_run(made)[1]
    session = Session(cfg, start_run(cfg))
    before = files(session.run)
    answer = session.ask(*PAIR)
    assert (
        capsys.readouterr().out.endswith(nli_ft.ask._visible(answer["completion"]) + "\n")
        and answer["premise"] == PAIR[0]
    )
    assert files(session.run) == before


def last_cell():
    cells = nbformat.read(ROOT / "nbs" / "train.ipynb", 4).cells
    return next(c.source for c in reversed(cells) if c.cell_type == "code")


@pytest.mark.parametrize("person", [True, False])
def test_the_end_of_the_training_notebook_asks_only_where_a_person_reads(person, capsys):
    asked = []

    class Session:
        def ask(self, *pair):
            asked.append(pair)

    class Config:
        runs_dir, name = "runs", "minimal_test"

    names = dict(session=Session(), cfg=Config(), run=ROOT / "20261127", display=lambda o: None)
    exec(last_cell(), names | dict(somebody_types=lambda: person))
    assert asked == [("A dog runs.", "An animal runs.")] * person
    assert capsys.readouterr().out == "later: nli_predict --run runs/minimal_test/20261127\n"
    assert "finish_run(" not in last_cell() and ast.parse(last_cell())


def test_nobody_types_to_papermill_and_its_relatives(tmp_path):
    "The kernel knows whether its front end would answer."
    from nbclient import NotebookClient

    code = "from nli_ft.talk import somebody_types\nsomebody_types()"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(nb, kernel_name="python3")
    with client.setup_kernel():
        client.execute_cell(nb.cells[0], 0)
        assert nb.cells[0].outputs[0].data["text/plain"] == "False"
        client.kc.allow_stdin = True  # as JupyterLab's is
        client.execute_cell(nb.cells[0], 0)
        assert nb.cells[0].outputs[0].data["text/plain"] == "True"


def test_a_box_asks_the_kept_model_and_without_widgets_and_person_it_says_what_to_do(made, monkeypatch):
    with pytest.raises(ConfigError, match="nobody who types. Use run_model"):
        nli_ft.talk.ask(made)
    monkeypatch.setattr(nli_ft.talk, "_kernel", lambda: type("Kernel", (), dict(_allow_stdin=False)))
    box = nli_ft.talk.ask(made, f"{made}:before")
    box.children[0].value, box.children[1].value = PAIR
    box.children[2].click()
    wrote = run_model(made).ask(*PAIR, say=lambda text: None)["completion"]
    assert "no answer (" in box.children[4].value and box.children[3].value.count(html.escape(wrote)) == 1
    assert run_model(made).loaded is run_model(str(made)).loaded is not None
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ConfigError, match="there is no box here"):
        nli_ft.talk.ask(made)


def test_the_box_counts_seconds_until_the_model_writes(monkeypatch):
    class Slow(Parrot):
        def load(self, show=True):
            assert not show, "a bar has no place where a button works"
            time.sleep(1.3)
            super().load()

        def ask(self, *pair):
            time.sleep(1.3)
            return super().ask(*pair)

    class Place:
        values = []
        value = property(fset=lambda self, value: self.values.append(value))

    nli_ft.talk._show_answer(Slow(), *PAIR, "cot", Place())
    seen = [i for i, value in enumerate(Place.values) if re.search(r"loading the weights: \d s", value)]
    read = [i for i, value in enumerate(Place.values) if re.search(r"reading: \d s", value)]
    wrote = [i for i, value in enumerate(Place.values) if "It says" in value]
    assert seen and read and max(seen) < min(read) <= max(read) < min(wrote)
    assert "label: 1" in Place.values[-1]


def test_the_box_asks_nothing_before_both_sentences_are_there():
    asked = []

    class Model(Parrot):
        def ask(self, *pair):
            asked.append([place.value.count("It says") for place in box.children[3:]])
            return super().ask(*pair)

    box = nli_ft.talk._box([Model(), Model()], "cot")
    for premise, hypothesis, lacks in (("", "A", "premise"), ("A", " ", "hypothesis")):
        box.children[0].value, box.children[1].value = premise, hypothesis
        box.children[2].click()
        assert f"the {lacks} is empty" in box.children[3].value and not asked
    for _ in range(2):
        box.children[0].value, box.children[1].value = PAIR
        box.children[2].click()
    assert asked == [[0, 0], [1, 0]] * 2, "the older answers are gone"


def test_weights_are_read_without_a_warning_that_nobody_can_act_on(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert RunModel(made).load()


def test_a_run_that_is_asked_shows_that_its_weights_are_read(made, monkeypatch):
    waited = []

    @contextlib.contextmanager
    def alive(what, show=True):
        waited.append((what, show))
        yield

    monkeypatch.setattr(nli_ft.ask, "alive", alive)
    model = RunModel(made)
    model._read = lambda: ("weights", "tokenizer")
    assert model.load() == model.load() == ("weights", "tokenizer")
    assert waited == [(f"loading {model.cfg.model_id}", True)]


# ---------------------------------------------------------------- in a browser


class Parrot:
    "A stand-in for a `RunModel`."

    name, loaded = "parrot/1", None

    def load(self, show=True):
        self.loaded = "weights"

    def ask(self, premise, hypothesis, mode="cot", say=None):
        whole = json.dumps(dict(thought_process=f"It says {hypothesis}", predicted_label=1))
        for n in range(20, len(whole), 9):
            say(whole[:n])
        keys = dict(predicted_label=1, p_entail=0.9, outcome="strict", problem=None)
        return PairAnswer(keys | dict(completion=whole, thought_process=None))


def test_the_page_of_the_demo_streams_the_reasoning_and_ends_with_the_label():
    pytest.importorskip("gradio")
    Client = pytest.importorskip("gradio_client").Client
    from nli_ft.demo import demo_page

    page = demo_page([Parrot(), Parrot()])
    try:
        _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, share=False)
        with contextlib.redirect_stdout(io.StringIO()):
            job = Client(url, verbose=False).submit("A dog runs.", "A dog moves.", api_name="/ask")
            last = job.result(timeout=60)
    finally:
        page.close()
    assert last == ("It says A dog moves.\n\nlabel: 1 (entailment)\np(entailment): 0.900",) * 2
    seen = [texts[0] for texts in job.outputs()]
    assert len(seen) > 3 and any(text and "label" not in text for text in seen), "it grew"


def test_without_gradio_the_demo_names_its_extra(made, monkeypatch, capsys):
    from nli_ft.demo import demo_cli

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as e:
        demo_cli(["--run", str(made)])
    assert e.value.code == 2 and 'pip install -e ".[demo]"' in capsys.readouterr().err
