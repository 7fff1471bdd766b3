"""Installs nli_ft: names and version from settings.ini. What it needs stands below, as ranges."""

import configparser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
cfg = configparser.ConfigParser()
cfg.read(here / "settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]

# What may be installed beside this package. The lower end is the release that its tests run with, or just below. The
# upper end is the next one that may break, by that package's own rules. requirements.txt holds one exact set inside
# these ranges (the lock): the set that the scripts, CI and every committed record use.
install = [
    # training: these belong together
    "torch>=2.13,<3",
    "transformers>=5.23,<6",
    "tokenizers>=0.23,<0.24",
    "huggingface_hub>=2.4,<3",
    "trl>=1.16,<1.17",  # SFTTrainer's arguments and its row formats change between minor versions
    "peft>=0.21,<1",
    "bitsandbytes>=0.50,<1",
    "datasets>=5.2,<6",
    "accelerate>=1.15,<2",
    "safetensors>=0.8,<1",
    "numpy>=2.3,<3",
    # tokenizers and weights
    "gguf>=0.19,<1",
    "mistral-common>=1.13,<2",
    "sentencepiece>=0.2.3,<1",
    # data, metrics, plots, records
    "matplotlib>=3.11,<4",
    "scipy>=1.17,<2",
    "scikit-learn>=1.9,<2",
    "statsmodels>=0.15,<1",
    "pandas>=3.1,<4",
    "pyarrow>=26",
    "pillow>=12.3",  # gradio takes nothing newer than 12 yet
    "jinja2>=3.1,<4",
    "ftfy>=6.3,<7",
    "datasketch>=2,<3",
    "psutil>=7.2,<8",
    "tqdm>=4.70,<5",
    "pydantic>=2.14,<3",
    "filelock>=4.2,<5",
    "fastcore>=1.14,<2",
    "pyyaml>=6,<7",
]
extras = {
    # JupyterLab, and what nli_run executes a notebook with. Without it `nli_train` trains the same run as a script
    "notebook": [
        "papermill>=2.7,<3",
        "nbformat>=5.11,<6",
        "jupyter_client>=8.10,<9",
        "pyzmq>=27.3",
        "ipython>=9.18,<10",
        "ipykernel>=7.4,<8",
        "ipywidgets>=8.1,<9",
        "jupyterlab>=4.6,<5",
    ],
    "teacher": ["openai>=3.54,<4", "httpx2>=2.16,<3", "tenacity>=9.2,<10"],  # nli_think, nli_reflect
    "wandb": ["wandb>=0.31,<1"],  # use_wandb=true
    "tensorboard": ["tensorboardX>=2.6,<3"],  # report_to=tensorboard
    "slurm": ["submitit>=1.5,<2"],  # nli_run --engine submitit
    "demo": ["gradio>=6.31,<7"],  # nli_demo
    "completion": ["argcomplete>=3.7,<4"],  # nli completion
    "docs": [
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.8,<10",
        "mkdocstrings>=1.0,<2",
        "mkdocstrings-python>=2.0,<3",
        "mkdocs-jupyter>=0.26,<1",
        "griffelib>=2.4,<3",
    ],
}
# all that the tests and the site need
extras["dev"] = sum(extras.values(), []) + [
    "nbdev>=2.4.14,<3",  # the last major that reads settings.ini. It sets no upper limit for the next four,
    "fastcore>=1.14,<1.15",  # and does not import with newer ones
    "execnb>=0.1.18,<0.2",
    "ghapi>=1.1,<2",
    "fastgit>=0.1,<0.2",
    "nbclient>=0.11,<1",
    "jsonschema>=4.18,<4.25",  # nbformat imports it. Newer ones compile a grammar then
    "packaging>=26",
    "pytest>=9.2,<10",
    "pytest-xdist>=3.8,<4",
    "hypothesis>=6.170,<7",
    "ruff>=0.17.6,<0.18",  # formats change between minor versions
    "setuptools>=77.0.3",
]
# Exact, because this vLLM is built for the torch of requirements.txt and takes no other. A plugin of its own reads
# 4-bit bitsandbytes weights. No part of `dev`: CI and machines without a GPU cannot use it.
extras["vllm"] = ["vllm==0.30.0", "vllm-bnb-plugin==0.0.3"]
readme = here / "README.md"

commands = dict(
    nli="umbrella:nli_cli",
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
    nli_demo="demo:demo_cli",
    nli_merge="train_sft:merge_cli",
    nli_baseline="encoder:baseline_cli",
    nli_study="study_commands:study_cli",
    nli_push="share:push_cli",
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
    install_requires=install,
    extras_require=extras,
    entry_points={"console_scripts": [f"{name}=nli_ft.{target}" for name, target in commands.items()]},
    classifiers=["Intended Audience :: Science/Research", "Programming Language :: Python :: 3.11"],
    zip_safe=False,
)
