"""Some module reads every key of the config. A key that nobody reads would be a setting that is silently ignored.

These tests look at the source only. Other tests show that a key changes the outcome."""

import ast
from pathlib import Path

import nli_ft
from nli_ft.config_loader import KEYS

NAMES = {"cfg", "config"}  # what a Config is called, alone or as an attribute: cfg.seed, self.cfg.seed


def is_config(node):
    return (isinstance(node, ast.Name) and node.id in NAMES) or (
        isinstance(node, ast.Attribute) and node.attr in NAMES
    )


def keys_read(source):
    'The names read from a Config in a module: `cfg.seed`, `self.cfg.seed`, `cfg.path("train_data")`.'
    found = set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and is_config(n.value):
            found.add(n.attr)
        if (
            isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and n.func.attr == "path"
            and is_config(n.func.value)
        ):
            found |= {a.value for a in n.args if isinstance(a, ast.Constant)}
    return found


def test_the_search_finds_what_is_read_and_only_that():
    assert keys_read("def f(cfg): return cfg.seed + self.cfg.lora_r") == {"seed", "lora_r"}
    assert "train_data" in keys_read("open(cfg.path('train_data'))")
    assert keys_read("cfg.seed = 3") == set()
    assert keys_read("args.seed; 'cfg.seed'  # cfg.seed") == set()


def test_every_key_is_read_outside_the_loader():
    files = [
        p
        for p in Path(nli_ft.__file__).parent.glob("*.py")
        if p.name not in ("config_loader.py", "_modidx.py")
    ]
    texts = [p.read_text() for p in files]
    read = set().union(*map(keys_read, texts))
    # the loader's `judged_files` gives the rooms the files of both keys
    read |= {"eval_data", "test_data"} if any("judged_files(cfg)" in t for t in texts) else set()
    assert sorted(set(KEYS) - read) == []
