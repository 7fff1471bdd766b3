"""Installs nli_ft: names and version from settings.ini, dependencies from requirements.txt."""

import configparser, re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
cfg = configparser.ConfigParser()
cfg.read(here / "settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]

# a pin ends where the comment with its reason begins. A comment that begins with [name] makes the pin an extra
pins, extras = [], {}
for line in (here / "requirements.txt").read_text(encoding="utf-8").splitlines():
    pin, _, why = (part.strip() for part in line.partition("#"))
    name = re.match(r"\[(\w+)\]", why)
    if pin:
        (extras.setdefault(name[1], []) if name else pins).append(pin)
# Not among the pins, because CI and machines without a GPU install requirements.txt too. This vLLM is built for the
# torch pinned there and takes no other. A plugin of its own reads 4-bit bitsandbytes weights.
extras["vllm"] = ["vllm==0.30.0", "vllm-bnb-plugin==0.0.3"]
readme = here / "README.md"

commands = dict(
    nli_train="train_sft:train_cli",
    nli_run="launch:run_cli",
    nli_runs="commands:runs_cli",
    nli_compare="compare:compare_cli",
    nli_bench="bench:bench_cli",
    nli_data="commands:data_cli",
    nli_corpus="corpus:corpus_cli",
    nli_think="teacher:think_cli",
    nli_reflect="teacher:reflect_cli",
    nli_evaluate="ask:evaluate_cli",
    nli_predict="ask:predict_cli",
    nli_merge="train_sft:merge_cli",
    nli_baseline="encoder:baseline_cli",
)

setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    keywords=s["keywords"],
    author=s["author"],
    author_email=s["author_email"],
    url=s["git_url"],
    license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=[s["lib_name"], s["lib_name"] + ".*"]),
    package_data={
        s["lib_name"]: ["configs/*.py", "configs/accelerate/*.yaml", "harness/*.yaml", "harness/*.yml"]
    },  # read as files, not imported
    python_requires=">=" + s["min_python"],
    install_requires=pins,
    extras_require=extras,
    entry_points={"console_scripts": [f"{name}=nli_ft.{target}" for name, target in commands.items()]},
    classifiers=["Intended Audience :: Science/Research", "Programming Language :: Python :: 3.11"],
    zip_safe=False,
)
