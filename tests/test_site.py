"""The site: what it says about functions, and that no broken link gets through. run_tests.sh builds the whole of it."""

import importlib.util, inspect, json, re

import griffe
import pytest
from mkdocs.exceptions import PluginError

from nli_ft.process import project_root

root = project_root()


def loaded(name):
    "A module of docs/, which is no package."
    spec = importlib.util.spec_from_file_location(f"docs_{name}", root / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docments, site = loaded("docments"), loaded("site")


def described(source, tmp_path):
    "A module of this source, as the reference sees it."
    (tmp_path / "room.py").write_text(source)
    extensions = griffe.Extensions(docments.Docments())
    return griffe.load("room", search_paths=[tmp_path], extensions=extensions, docstring_parser="google")


def rows_of(obj):
    "(kind, name, text) for all that the docstring of an object says in tables."
    told = []
    for section in obj.docstring.parsed:
        if section.kind.value in ("parameters", "returns"):
            told += [
                (section.kind.value, getattr(part, "name", ""), part.description) for part in section.value
            ]
    return told


SOURCE = '''
from dataclasses import dataclass
from fastcore.basics import patch


@dataclass
class Kept:
    "What is kept."

    name: str  # of the set, "dev" or "test"
    bare: int


@patch
def add(
    self: Kept,
    *rows: dict,  # each a pair
    # of random, numpy
    # and torch
    seed: int = 42,
    bare: bool = False,
) -> list:  # (n, 2), in rows
    """Adds rows.

    Raises `DataError` for none."""
'''


def test_comments_behind_parameters_fields_and_results_reach_the_reference_and_patched_methods_their_class(
    tmp_path,
):
    room = described(SOURCE, tmp_path)
    kept = room["Kept"]
    assert "add" not in room.functions and kept["name"].docstring.value == 'of the set, "dev" or "test"'
    assert not kept["bare"].docstring
    told = rows_of(kept["add"])
    assert [(kind, name.lstrip("*"), text) for kind, name, text in told] == [
        ("parameters", "rows", "each a pair"),
        ("parameters", "seed", "of random, numpy and torch"),
        ("returns", "", "(n, 2), in rows"),
    ]
    assert "Raises `DataError` for none." in kept["add"].docstring.parsed[0].value


def test_the_reference_of_a_room_shows_every_docment_of_it():
    extensions = griffe.Extensions(docments.Docments())
    room = griffe.load(
        "nli_ft.config_loader", search_paths=[root], extensions=extensions, docstring_parser="google"
    )
    told = dict((name, text) for _, name, text in rows_of(room["load_config"]))
    assert told["check"] == "refuse contradictions too; single values are always checked"
    assert told["name"].startswith("a name such as")


def test_the_reference_and_help_read_the_same_comments():
    "fastcore reads the function that was imported, and the site its source."
    from fastcore.docments import docments as by_fastcore
    from nli_ft import config_loader, evaluate, paired

    for room in (config_loader, evaluate, paired):
        for function in [
            f for f in vars(room).values() if inspect.isfunction(f) and f.__module__ == room.__name__
        ]:
            if not hasattr(function, "__wrapped__"):
                notes = docments._notes(inspect.getsource(function))
                told = {
                    name: " ".join((note or "").split())
                    for name, note in by_fastcore(function, args_kwargs=True).items()
                }
                assert {n: t for n, t in told.items() if t} == {n: t for n, t in notes.items() if t}, function


def test_a_broken_link_a_missing_anchor_and_what_a_network_would_load_are_named(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/index.html").write_text('<h1 id="top">A</h1><a href="../a.html#here">back</a>')
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="sub/#top">fine</a><a href="https://example.org">elsewhere</a><a href="#here">up</a>'
        '<a href="sub/#gone">x</a><a href="no.html">x</a><img src="no.png"><script src="https://x.org/a.js"></script>'
    )
    assert site.faults(tmp_path) == [
        "a.html: sub/#gone names an anchor that is not there",
        "a.html: nothing is at no.html",
        "a.html: nothing is at no.png",
        "a.html: loads https://x.org/a.js from a network",
    ]


def test_links_to_pages_stay_links_to_other_files_lead_to_their_source_and_links_to_nothing_are_refused():
    made = site.Site(None)
    made.pages = {"DATA.md", "studies/README.md", "nbs/05_rows.ipynb"}
    markdown, notebook = made.resolve("studies/README.md"), made.resolve("nbs/20_predict.ipynb", ".html")
    assert site.LINK.sub(markdown, "[a](../DATA.md#rows)") == "[a](../DATA.md#rows)"
    assert site.LINK.sub(markdown, "[a](../setup.py)") == "[a](../source/setup.py.md)"
    assert site.LINK.sub(notebook, "[a](05_rows.ipynb) [b](../nli_ft/configs)") == (
        "[a](05_rows.html) [b](../source/nli_ft/configs/index.html)"
    )
    assert site.LINK.sub(notebook, "[a](../studies/README.md)") == "[a](../studies/index.html)"
    assert set(made.extra) == {"setup.py", "nli_ft/configs"}
    with pytest.raises(PluginError, match="leads to no file of this project"):
        site.LINK.sub(markdown, "[a](../gone.md)")


def test_every_notebook_and_every_room_has_a_page_and_hidden_cells_have_none():
    numbered = {p.stem for p in (root / "nbs").glob("[0-9][0-9]_*.ipynb")}
    assert {room for _, rooms in site.rooms() for room in rooms} == numbered
    assert all(site.first_words(root / "nbs" / f"{room}.ipynb") for room in numbered)
    text = site.readable(root / "nbs" / "22_evaluate.ipynb", lambda match: match[0])
    sources = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    assert not any(re.search(r"^#\|", s, re.M) for s in sources) and "def accuracy" in "".join(sources)
