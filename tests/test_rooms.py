"The shape of the house: which notebook makes which module, who may import whom, and what a notebook must have."

import ast, configparser, re, subprocess, sys

import nbformat
import pytest

from nli_ft.process import project_root

root = project_root()
numbered = sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb"))
runnable = [
    root / "nbs" / f"{n}.ipynb" for n in ("train", "compare", "tour", "explore", "study", "dashboard")
]
# people read and run them unchanged: papermill has nothing to fill in
WITHOUT_PARAMETERS = {"tour.ipynb"}
# the room that generates the embedded rows on first use, the one behind `nli_evaluate --model`, the one in which
# `nli_predict` asks for sentences, the one behind `nli_corpus --depths`, those behind `nli_data push` and `nli_merge
# --gguf`, the one that checks thoughts about corpus rows and writes false ones, and the one that starts several
# processes. Nothing else of the core needs them. `nli_runs --watch` shows what the room of the live plot knows. A
# study's methods stand in later rooms
ON_FIRST_USE = {
    ("ready", "corpus"),
    ("ask", "contestant"),
    ("ask", "talk"),
    ("report", "records"),
    ("corpus", "corpus_depths"),
    ("commands", "share"),
    ("train_sft", "gguf_file"),
    ("train_sft", "hosts"),
    ("commands", "live"),
    ("bench", "bench_gpu"),
    ("bench", "traced"),
}
ON_FIRST_USE |= {("report", "corpus_thoughts"), ("preflight", "corpus_thoughts")}
# `--out` of these commands writes files for a paper. Only who asks for a file needs it
ON_FIRST_USE |= {(room, "paper") for room in ("compare", "ask", "study_report")}
# `nli_runs` stands in the room of the commands, and what it does to a record in a later one
ON_FIRST_USE |= {("commands", "keeping")}
# a model of this machine that is its own teacher, and what is made of its samples, stand after the commands
ON_FIRST_USE |= {("teacher", "self_taught"), ("commands", "preference_rows"), ("launch", "star_rounds")}
ON_FIRST_USE |= {("study", room) for room in ("study_plan", "study_run", "study_report")}
# other methods than imitation stand in rooms of their own
ON_FIRST_USE |= {(room, "preferences") for room in ("preflight", "fit")}
ON_FIRST_USE |= {(room, "rewards") for room in ("preflight", "fit", "train_sft")}
order = {p.stem[3:]: int(p.stem[:2]) for p in numbered}


def cells(path):
    return nbformat.read(path, 4).cells


def imported(path):
    "Modules of this package that a notebook's code cells import."
    names = set()
    for c in cells(path):
        if c.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", c.source, flags=re.M))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nli_ft."):
                names.add(node.module.split(".")[1])
            if isinstance(node, ast.Import):
                names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nli_ft.")}
    return names


def test_every_module_has_its_notebook_and_every_numbered_notebook_its_module():
    modules = {p.stem for p in (root / "nli_ft").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(order)


def test_numbers_are_the_import_order():
    assert len(set(order.values())) == len(order)
    for p in numbered:
        assert not (
            late := {
                m for m in imported(p) if order[m] > order[p.stem[3:]] and (p.stem[3:], m) not in ON_FIRST_USE
            }
        ), f"{p.name} imports {late}, which come after it"


@pytest.mark.parametrize("path", numbered + runnable, ids=lambda p: p.name)
def test_notebooks_open_with_a_title_and_a_summary_and_carry_no_star_import(path):
    first = cells(path)[0]
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n\n> \S", first.source), first.source[:80]
    for c in cells(path):
        if c.cell_type == "code":
            assert not re.search(r"^from nli_ft\S* import \*", c.source, re.M)
    if path in numbered:
        assert sum("#| default_exp" in c.source for c in cells(path)) == 1


@pytest.mark.parametrize("path", runnable, ids=lambda p: p.name)
def test_runnable_notebooks_export_nothing_and_have_one_parameters_cell_if_papermill_runs_them(path):
    tagged = sum("parameters" in c.metadata.get("tags", []) for c in cells(path))
    assert tagged == (0 if path.name in WITHOUT_PARAMETERS else 1)
    assert not any(re.search(r"#\|\s*(export|default_exp)", c.source) for c in cells(path))


def test_nbdev_keeps_the_parameters_tag():
    ini = configparser.ConfigParser()
    ini.read(root / "settings.ini")
    assert "tags" in ini["DEFAULT"]["allowed_cell_metadata_keys"].split()


@pytest.mark.parametrize("path", numbered + runnable, ids=lambda p: p.name)
def test_kernels_are_named_with_their_language_and_outputs_stay_small(path):
    nb = nbformat.read(path, 4)
    assert nb.metadata.kernelspec.language == "python" and nb.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 300_000


def top_level_names(path):
    "Functions, classes and constants of a module. Methods that `@patch` adds to a class belong to the class."
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not any(isinstance(d, ast.Name) and d.id == "patch" for d in node.decorator_list):
                names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names - {"__all__"}


def test_one_top_level_name_stands_for_one_thing_in_the_whole_package():
    rooms_of = {}
    for path in sorted((root / "nli_ft").glob("*.py")):
        if path.stem != "_modidx":
            for name in top_level_names(path):
                rooms_of.setdefault(name, []).append(path.stem)
    assert not (twice := {name: rooms for name, rooms in rooms_of.items() if len(rooms) > 1}), twice


def test_one_hand_wrote_notebooks_and_tests():
    "`ruff format .` mends the format, and `ruff check . --fix` much of the rest."
    for what in (["format", "--check"], ["check"]):
        p = subprocess.run(
            [sys.executable, "-m", "ruff", *what, "."], cwd=root, capture_output=True, text=True
        )
        assert p.returncode == 0, p.stdout + p.stderr


COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


@pytest.mark.parametrize("path", sorted((root / "nli_ft").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_no_comprehension_holds_another_and_no_lambda_has_a_name(path):
    "What ruff has no rule for: a reader follows one loop at a time, and a function that has a name is a def."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, COMPREHENSIONS):
            inner = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS) and n is not node]
            assert not inner, f"{path.name}: {ast.unparse(node)}"
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            assert not isinstance(node.value, ast.Lambda), f"{path.name}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", numbered, ids=lambda p: p.stem)
def test_a_room_says_where_a_reader_comes_from_and_goes_to_and_shows_results(path):
    top = "\n".join(c.source for c in cells(path)[:3] if c.cell_type == "markdown")
    links = re.findall(r"\]\((\w+\.ipynb)\)", top)
    assert len(links) >= 2, f"{path.name}: links to the rooms before and after it belong at its top"
    assert all((path.parent / link).is_file() for link in links), links
    assert any(c.get("outputs") for c in cells(path)), f"{path.name}: no cell shows what it gives"
