"The config loader from outside: files, processes, working directories, every kind of mistake."

import json, os, pickle, re, shlex, subprocess, sys, textwrap

from swap import swap
import pytest
from hypothesis import given, settings, strategies as st

from nli_ft.config_loader import (
    KEYS,
    Config,
    add_config_args,
    config_from_args,
    config_from_json,
    config_hash,
    config_names,
    load_config,
    one_factor,
    print_config,
    read_config_file,
)
from nli_ft.process import CommandParser, ConfigError, project_root

ROOT = project_root()
CONFIGS = ROOT / "nli_ft" / "configs"
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def config_file(tmp_path):
    "Write a config file and return its path."

    def write(text, name="mine.py"):
        p = tmp_path / name
        p.write_text(textwrap.dedent(text))
        return str(p)

    return write


def typed(*args):
    "The config of a command line."
    p = CommandParser(prog="nli_train")
    add_config_args(p)
    return config_from_args(p.parse_args(args))


def run(*args, cwd=ROOT):
    "The loader's own command in a process of its own."
    return subprocess.run(
        [sys.executable, "-m", "nli_ft.config_loader", *args], cwd=cwd, capture_output=True, text=True
    )


# ---- the configs that come with the package

# the design's table: every cell of it
TABLE = dict(
    default=dict(
        model_id="mistralai/Mistral-7B-v0.3",
        quantization="nf4",
        batch_size=16,
        grad_accumulation_steps=2,
        learning_rate=2e-4,
        num_epochs=2,
        lora_r=16,
        lora_alpha=32,
        warmup_ratio=0.03,
        max_grad_norm=None,
        lr_scheduler="cosine",
        lora_dropout=0.05,
        max_seq_length=512,
        optim="auto",
        weight_decay=0.01,
        seed=42,
        gradient_checkpointing=True,
        target_modules=QKVO,
        data_strategy="all",
        completion="cot",
        distributed_training=False,
    ),
    ablation0=dict(
        batch_size=8,
        grad_accumulation_steps=2,
        learning_rate=2e-4,
        num_epochs=1,
        lora_r=16,
        lora_alpha=32,
        warmup_ratio=0.03,
        max_grad_norm=None,
        gradient_checkpointing=False,
    ),
    ablation0_best=dict(
        batch_size=8,
        grad_accumulation_steps=2,
        learning_rate=2e-4,
        num_epochs=2,
        lora_r=16,
        lora_alpha=32,
        warmup_ratio=0.03,
        max_grad_norm=None,
        gradient_checkpointing=False,
    ),
    ablation1=dict(
        batch_size=16,
        grad_accumulation_steps=2,
        learning_rate=2e-4,
        num_epochs=2,
        lora_r=16,
        lora_alpha=32,
        warmup_ratio=0.05,
        max_grad_norm=None,
        gradient_checkpointing=False,
    ),
    ablation1_best=dict(
        batch_size=16,
        grad_accumulation_steps=2,
        learning_rate=2e-4,
        num_epochs=2,
        lora_r=16,
        lora_alpha=32,
        warmup_ratio=0.03,
        max_grad_norm=None,
        gradient_checkpointing=True,
    ),
    ablation2=dict(
        batch_size=16,
        grad_accumulation_steps=4,
        learning_rate=1e-4,
        num_epochs=3,
        lora_r=32,
        lora_alpha=64,
        warmup_ratio=0.10,
        max_grad_norm=1.0,
        data_strategy="all",
    ),
    ablation2_best=dict(
        batch_size=16,
        grad_accumulation_steps=4,
        learning_rate=5e-5,
        num_epochs=5,
        lora_r=32,
        lora_alpha=64,
        warmup_ratio=0.05,
        max_grad_norm=1.0,
        data_strategy="all",
    ),
    minimal_test=dict(
        model_id="smollm2-135m",
        train_data="data/embedded/train.jsonl",
        eval_data="data/embedded/dev.jsonl",
        lora_r=8,
        lora_alpha=16,
        max_grad_norm=1.0,
        max_steps=4,
        batch_size=4,
        grad_accumulation_steps=1,
        max_train_samples=32,
        max_eval_samples=8,
        max_new_tokens=64,
        gradient_checkpointing=False,
        max_seq_length=512,
        logging_steps=1,
        quantization="nf4",
    ),
    cpu_demo=dict(
        model_id="smollm2-135m",
        train_data="data/embedded/train.jsonl",
        eval_data="data/embedded/dev.jsonl",
        batch_size=16,
        grad_accumulation_steps=1,
        learning_rate=1e-3,
        num_epochs=1,
        lora_r=16,
        lora_alpha=32,
        target_modules="all-linear",
        max_grad_norm=1.0,
        lora_dropout=0.0,
        max_seq_length=192,
        quantization="nf4",
        gradient_checkpointing=False,
        max_train_samples=640,
        max_eval_samples=120,
        max_new_tokens=96,
        logging_steps=5,
        prompt_template="auto",
    ),
    three_way_demo=dict(
        model_id="smollm2-135m",
        label_set="three_way",
        train_data="data/embedded_three_way/train.jsonl",
        eval_data="data/embedded_three_way/dev.jsonl",
        batch_size=16,
        grad_accumulation_steps=1,
        learning_rate=1e-3,
        num_epochs=1,
        target_modules="all-linear",
        lora_dropout=0.0,
        max_grad_norm=1.0,
        max_seq_length=192,
        gradient_checkpointing=False,
        max_train_samples=640,
        max_eval_samples=120,
        max_new_tokens=96,
        logging_steps=5,
    ),
    dpo_demo=dict(
        model_id="smollm2-135m",
        method="dpo",
        start_from="cpu_demo",
        train_data="data/finetune/preferences.jsonl",
        batch_size=8,
        learning_rate=1e-4,
        beta=None,
    ),
    grpo_demo=dict(
        model_id="smollm2-135m",
        method="grpo",
        start_from="cpu_demo",
        train_data="data/embedded/train.jsonl",
        max_steps=40,
        learning_rate=1e-4,
        group_size=8,
        reward="label",
        format_reward=0,
        length_penalty=0,
    ),
    distributed=dict(
        batch_size=8,
        grad_accumulation_steps=2,
        learning_rate=2e-4,
        num_epochs=3,
        lora_r=16,
        lora_alpha=32,
        warmup_ratio=0.03,
        max_grad_norm=None,
        gradient_checkpointing=True,
        distributed_training=True,
    ),
    ablation0_dist=dict(
        batch_size=8,
        grad_accumulation_steps=2,
        learning_rate=2e-4,
        num_epochs=1,
        lora_r=16,
        lora_alpha=32,
        warmup_ratio=0.03,
        max_grad_norm=None,
        gradient_checkpointing=False,
        distributed_training=True,
    ),
)
ARMS = dict(
    correct_only=("data_strategy", "correct_only"),
    label_only=("completion", "label_only"),
    label_first=("completion", "label_first"),
    reflected_shuffled=("data_strategy", "shuffled"),
    thought_weight=("thought_weight", 0.1),
    auxiliary=("completion", "auxiliary"),
    shuffled_any=("data_strategy", "shuffled_any"),
    permuted=("data_strategy", "permuted"),
    filler=("data_strategy", "filler"),
    star=("data_strategy", "correct_only"),
)
ARMS_OF_OTHERS = dict(
    label_first_permuted=("label_first", "data_strategy", "permuted"),
    label_only_matched=("label_only", "max_loss_tokens", load_config("label_only_matched").max_loss_tokens),
    wrong_rule=("cpu_demo", "data_strategy", "wrong_rule"),
    grpo_label_only=("grpo_demo", "completion", "label_only"),
    grpo_random=("grpo_demo", "reward", "random"),
)


def test_the_package_holds_exactly_the_configs_of_the_design():
    assert set(config_names()) == set(TABLE) | set(ARMS) | set(ARMS_OF_OTHERS)


@pytest.mark.parametrize("name", TABLE)
def test_a_config_has_the_numbers_of_the_table(name):
    c = load_config(name).to_dict()
    assert {k: c[k] for k in TABLE[name]} == TABLE[name]


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_one_factor_of_ablation2(name):
    key, value = ARMS[name]
    assert one_factor([load_config("ablation2"), load_config(name)]) == [key]
    assert getattr(load_config(name), key) == value


@pytest.mark.parametrize("name", ARMS_OF_OTHERS)
def test_an_arm_of_another_base_changes_one_factor_of_it(name):
    base, key, value = ARMS_OF_OTHERS[name]
    assert one_factor([load_config(base), load_config(name)]) == [key]
    assert getattr(load_config(name), key) == value


def values_of(path):
    return {k: s.value for k, s in read_config_file(path).items()}


@pytest.mark.parametrize("name", sorted(set(TABLE) | set(ARMS)))
def test_a_config_says_only_what_differs_from_its_base(name):
    own = values_of(CONFIGS / f"{name}.py")
    if name == "default":
        return
    base = load_config(own.pop("base", "default")).to_dict()
    assert own, "an empty config is another name for its base"
    assert [k for k, v in own.items() if base[k] == v] == []


@pytest.mark.parametrize("name", sorted(set(TABLE) | set(ARMS)))
def test_a_config_says_what_it_asks_what_it_assumes_and_how_to_run_it(name):
    text = (CONFIGS / f"{name}.py").read_text()
    expect = r"(?:Expect: .+\n(?: {9}\S.*\n)*)?"
    assert re.match(
        r'"""\S.*\n\nAssumes: .+\n'
        + expect
        + r"Run: .*(?:/run_training\.sh|nli_run) .*--config "
        + name
        + r"\b",
        text,
    )


def test_the_arithmetic_in_the_comments_is_right():
    told = 0
    for name in config_names():
        c = load_config(name)
        for rows, acc, gpus, total in re.findall(
            r"(\d+) rows x (\d+) accumulation(?: x (\d+) GPUs)? = (\d+) rows",
            (CONFIGS / f"{name}.py").read_text(),
        ):
            assert (int(rows), int(acc), int(rows) * int(acc) * int(gpus or 1)) == (
                c.batch_size,
                c.grad_accumulation_steps,
                int(total),
            ), name
            told += 1
    assert told >= 8


def test_default_gives_every_key_and_every_key_is_documented():
    assert list(values_of(CONFIGS / "default.py").keys() ^ KEYS.keys()) == []
    for k, f in KEYS.items():
        assert len(f.metadata["doc"]) > 8, k


def test_help_shows_every_key_with_its_meaning_and_default():
    help = " ".join(run("--help").stdout.split())
    for k, f in KEYS.items():
        assert f"--{k} " in help
        assert f.metadata["doc"][:20] in help.replace("- ", "-"), k
    assert "[a number, at least 0, below 1; default 0.03]" in help


# ---- precedence and provenance


def test_overrides_beat_the_file_which_beats_its_base_which_beats_default(config_file):
    top = config_file('base = "ablation2"\nlora_r = 48\nseed = 3\n')
    c = load_config(top, "seed=7")
    assert (c.seed, c.lora_r, c.lora_alpha, c.batch_size) == (7, 48, 64, 16)
    assert [c.sources[k].split("/")[-1] for k in ("seed", "lora_r", "lora_alpha", "batch_size")] == [
        "command line",
        "mine.py",
        "ablation2.py",
        "default.py",
    ]
    assert c.name == "mine"


def test_a_base_can_be_a_path_relative_to_the_root_and_chains_on(config_file, tmp_path):
    middle = config_file('base = "ablation2"\nlora_r = 48\n', "middle.py")
    top = config_file(f'base = "{os.path.relpath(middle, ROOT)}"\nseed = 3\n')
    assert (load_config(top).lora_r, load_config(top).lora_alpha, load_config(top).seed) == (48, 64, 3)


def test_sources_name_every_key_once():
    assert set(load_config("label_only").sources) == set(KEYS)


def test_print_config_marks_what_differs_and_can_be_loaded_again():
    c = load_config("ablation2", "learning_rate=3e-4")
    d = json.loads(print_config(c))
    assert d["name"] == "ablation2" and set(d["config"]) == set(KEYS)
    assert d["changed_from_default"]["learning_rate"] == {
        "default": 2e-4,
        "value": 3e-4,
        "from": "command line",
    }
    assert d["changed_from_default"]["lora_r"] == {"default": 16, "value": 32, "from": "ablation2.py"}
    assert "seed" not in d["changed_from_default"]
    assert config_from_json(print_config(c)) == c


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "a", "config": 3, "changed_from_default": {}}'])
def test_a_record_that_holds_no_config_is_refused(text):
    with pytest.raises(ConfigError, match="config.json: is no recorded config"):
        config_from_json(text)


def test_a_record_is_never_completed_from_the_defaults_of_today():
    d = json.loads(print_config(load_config()))
    del d["config"]["seed"]
    with pytest.raises(ConfigError, match="runs/a/config.json: seed missing"):
        config_from_json(json.dumps(d), "runs/a/config.json")
    d["config"]["sed"] = 1
    with pytest.raises(ConfigError, match="there is no key sed. Did you mean seed"):
        config_from_json(json.dumps(d))
    d["config"].update(seed="42")
    del d["config"]["sed"]
    with pytest.raises(ConfigError, match="config.json: seed = '42'"):
        config_from_json(json.dumps(d))


def test_a_value_set_back_to_the_default_is_not_marked():
    assert "lora_r" not in load_config("ablation2", "lora_r=16").diff()


# ---- the command line


@pytest.mark.parametrize("key", [k for k in KEYS if KEYS[k].type is bool])
def test_a_boolean_that_is_not_given_never_overrides_the_file(key, config_file):
    default = getattr(load_config(), key)
    mine = config_file(f"{key} = {not default}\n")
    assert getattr(
        typed("--config", mine, "--num_processes", "2" if key == "distributed_training" else "none"), key
    ) is (not default)
    off, on = (
        typed("--config", mine, "--num_processes", "none", f"--no-{key}"),
        typed("--config", mine, f"--{key}"),
    )
    assert (getattr(off, key), getattr(on, key)) == (False, True)
    assert (getattr(typed(f"--{key}", "false"), key), getattr(typed(f"--{key}=True"), key)) == (False, True)


def test_none_can_be_typed_where_none_is_possible_and_only_there():
    assert typed("--config", "ablation2", "--max_grad_norm", "none").max_grad_norm is None
    assert typed("--quantization", "none").quantization == "none"
    with pytest.raises(ConfigError, match="command line: seed = 'none': expected a whole number"):
        typed("--seed", "none")


@pytest.mark.parametrize(
    "args,says",
    [
        (["--learnin_rate", "1"], "Did you mean --learning_rate?"),
        (["--learnin-rate", "1"], "Did you mean --learning_rate?"),
        (["--eval", "x"], "unrecognized arguments: --eval"),
        (["--learning_rat=1e-4"], "Did you mean --learning_rate?"),
        (["--seed"], "expected one argument"),
        (["ablation2"], "unrecognized arguments: ablation2"),
        (["--seed", "1.5"], "command line: seed = '1.5': expected a whole number"),
        (["--use_packing", "maybe"], "use_packing = 'maybe': expected true or false"),
        (["--config", "ablaton2"], "Did you mean ablation2?"),
        (["--config", "ablation2.py"], "Did you mean ablation2?"),
        (["--config", "configs/cpu_dmo"], "Did you mean cpu_demo?"),
    ],
)
def test_a_wrong_command_line_gives_exit_code_2_and_one_message(args, says):
    p = run(*args)
    assert p.returncode == 2 and p.stdout == ""
    assert p.stderr.startswith("error: ") and says in p.stderr and p.stderr.count("\n") == 1


def test_the_resolved_config_is_printed_without_heavy_imports():
    code = "import sys; from nli_ft.config_loader import config_cli; config_cli(sys.argv[1:]); "
    code += "print(sorted({m.split('.')[0] for m in sys.modules} "
    code += "& {'torch','numpy','fastcore','transformers','pandas'}), file=sys.stderr)"
    p = subprocess.run(
        [sys.executable, "-c", code, "--config", "ablation2", "--learning_rate", "1e-4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert json.loads(p.stdout)["config"]["learning_rate"] == 1e-4
    assert p.stderr == "[]\n"


def test_importing_the_module_imports_nothing_heavy():
    "Help and refusals should not wait for packages that only a run needs."
    heavy = {"torch", "transformers", "numpy", "pandas", "pydantic", "fastcore", "datasets", "trl", "peft"}
    code = f"import sys, nli_ft.config_loader; print(sorted({heavy} & set(sys.modules)))"
    p = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert p.stdout.strip() == "[]"


def test_arguments_for_a_child_give_the_same_config_from_another_folder(tmp_path, monkeypatch, config_file):
    mine = config_file('base = "ablation2"\nmodel_id = "./models/base"\n')
    monkeypatch.chdir(ROOT / "nbs")
    c = load_config(
        mine,
        {
            "train_data": "../data/x y.jsonl",
            "wandb_run_name": "--odd",
            "max_grad_norm": None,
            "use_packing": True,
            "target_modules": ["q_proj"],
            "model_id": "./m",
        },
    )
    monkeypatch.chdir(ROOT / "tests")
    again = typed(*c.to_args())
    assert again == c and again.name == c.name
    assert again.train_data == "data/x y.jsonl" and again.model_id == "./nbs/m"


@pytest.mark.parametrize(
    "body,code,stderr",
    [
        ("return 0", 0, ""),
        ("return None", 0, ""),
        ("return 1", 1, ""),
        ("raise cl.DataError('a.csv line 3: no label')", 2, "error: a.csv line 3: no label\n"),
        ("raise cl.RecordError('taken')", 2, "error: taken\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_a_command_ends_with_its_exit_code_even_where_nobody_calls_sys_exit(body, code, stderr):
    p = subprocess.run(
        [sys.executable, "-c", f"import nli_ft.process as cl\n@cl.command\ndef f(argv): {body}\nf()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (p.returncode, p.stderr) == (code, stderr)


# ---- paths


def test_a_path_in_a_file_starts_at_the_root_and_a_typed_path_where_one_stands(monkeypatch):
    for folder, to_root in ((ROOT, ""), (ROOT / "nbs", "../")):
        monkeypatch.chdir(folder)
        assert load_config("cpu_demo").path("train_data") == ROOT / "data/embedded/train.jsonl"
        c = load_config(
            "cpu_demo",
            {"train_data": f"{to_root}data/mine.jsonl", "eval_data": str(ROOT / "data/mine.jsonl")},
        )
        assert (c.train_data, c.eval_data) == ("data/mine.jsonl",) * 2
        assert c.path("train_data") == ROOT / "data/mine.jsonl"


def test_a_typed_path_is_not_taken_for_one_relative_to_the_root(monkeypatch):
    monkeypatch.chdir(ROOT / "nbs")
    assert load_config("cpu_demo", {"train_data": "data/mine.jsonl"}).train_data == "nbs/data/mine.jsonl"


def test_a_config_keeps_its_root_when_the_working_directory_moves(monkeypatch, tmp_path):
    c = load_config("cpu_demo")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = nli_ft\n")
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path.resolve() and c.path("runs_dir") == ROOT / "runs"


def test_a_model_is_a_folder_only_where_it_is_written_as_a_path(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_config(overrides="model_id=models/mine").model_id == "models/mine"  # a hub name
    c = load_config(overrides="model_id=./models/mine")
    assert c.model_id == "./models/mine" and c.path("model_id") == ROOT / "models/mine"
    with pytest.raises(ConfigError, match="names no file"):
        load_config().path("model_id")


# ---- every kind of mistake

FILES = [  # what the file says, what the message must say
    ("lerning_rate = 1e-4", "mine.py line 1: there is no key lerning_rate. Did you mean learning_rate?"),
    ("\nzzz = 1", "mine.py line 2: there is no key zzz. Correct or remove it; --help lists every key."),
    ("seed = '42'", "mine.py line 1: seed = '42': expected a whole number, at least 0"),
    ("num_epochs = None", "num_epochs = None: expected a number, at most 10000, above 0"),
    ("lora_dropout = 1.0", "expected a number, at least 0, below 1"),
    ("use_packing = 1", "use_packing = 1: expected true or false"),
    ("quantization = 'nf8'", "expected one of nf4, none. Did you mean nf4?"),
    ("target_modules = 'q_proj'", "expected all-linear or a list of layer names"),
    ("learning_rate = 1e999", "learning_rate = inf: expected"),
    ("seed = 1\nseed = 2", "mine.py line 2: seed = 2: already set on line 1 (to 1). Keep one of the two."),
    ("import os", "mine.py line 1: `import os`: expected a plain assignment"),
    ("seed = __import__('os').getpid()", "line 1: `seed = __import__('os').getpid()`: expected a number"),
    ("seed = (", "mine.py line 1: '(' was never closed"),
    ("seed = 1/0", "mine.py line 1: `seed = 1/0`"),
    ("seed = 1" + "+1" * 1200, "mine.py line 1: `seed = 1+1"),
    ("seed = 1" + "+1" * 100_000, "mine.py: cannot be read as a config file"),
    ("base = 'ablaton2'", "mine.py line 1, base: there is no config ablaton2. Did you mean ablation2?"),
    ("base = 3", "mine.py line 1, base: config = 3: expected the name of a config"),
    ("base = 'none/such.py'", "there is no config file none/such.py"),
]


@pytest.mark.parametrize("text,says", FILES, ids=[t[:25] for t, _ in FILES])
def test_a_mistake_in_a_file_is_told_with_file_line_and_remedy(text, says, config_file):
    with pytest.raises(ConfigError) as e:
        load_config(config_file(text))
    assert says in str(e.value) and "mine.py" in str(e.value)
    assert "\n" not in str(e.value)


LIMITS = [
    ("lora_r", 0),
    ("lora_alpha", 0),
    ("warmup_ratio", 1),
    ("warmup_ratio", -0.1),
    ("learning_rate", 0),
    ("learning_rate", 2),
    ("learning_rate", float("nan")),
    ("lora_dropout", 1),
    ("lora_dropout", -0.1),
    ("eval_steps", 0),
    ("save_steps", 0),
    ("max_seq_length", 31),
    ("batch_size", 0),
    ("grad_accumulation_steps", 0),
    ("seed", -1),
    ("seed", 2**32),
    ("num_epochs", 0),
    ("num_epochs", float("inf")),
    ("max_steps", 0),
    ("weight_decay", -1),
    ("max_grad_norm", 0),
    ("max_bad_rows", 1),
    ("max_train_samples", 0),
    ("max_eval_samples", 0),
    ("eval_batch_size", 0),
    ("max_new_tokens", 0),
    ("logging_steps", 0),
    ("save_total_limit", 0),
    ("early_stopping_patience", 0),
    ("gpu_id", -1),
    ("num_processes", 0),
    ("batch_size", 2.0),
    ("batch_size", True),
    ("seed", 10**5000),
    ("lora_r", 2**70),
    ("max_grad_norm", float("inf")),
    ("max_grad_norm", float("nan")),
    ("optim", "adam"),
    ("lr_scheduler", "cos"),
    ("train_data", ""),
    ("runs_dir", "a\nb"),
    ("model_id", " "),
    ("target_modules", []),
    ("completion", None),
    ("compute_dtype", "float16"),
    ("attn_implementation", "flash"),
    ("too_long", "cut"),
    ("prompt_template", "long"),
    ("data_strategy", "shuffle"),
]


@pytest.mark.parametrize("key,value", LIMITS, ids=[f"{k}-{i}" for i, (k, _) in enumerate(LIMITS)])
def test_an_impossible_value_is_refused(key, value):
    with pytest.raises(ConfigError, match=rf"^command line: {key} = .*expected .*leave {key} out"):
        load_config(overrides={key: value})


def test_every_limit_lets_its_last_possible_value_through():
    for k, v in dict(
        lora_r=1,
        warmup_ratio=0,
        lora_dropout=0,
        max_seq_length=32,
        seed=2**32 - 1,
        learning_rate=1,
        eval_steps=1,
        max_bad_rows=0.99,
    ).items():
        assert getattr(load_config(overrides={k: v}), k) == v


CONTRADICTIONS = [
    (
        "early_stopping_patience=2 eval_steps=10",
        [
            "early_stopping_patience = 2 (command line)",
            "eval_steps = 10",
            "save_steps = None (default.py line",
            "multiple of eval_steps",
        ],
    ),
    ("early_stopping_patience=2 save_steps=10", ["save_steps = 10", "eval_steps = None"]),
    ("early_stopping_patience=2 eval_steps=10 save_steps=25", ["save_steps = 25", "multiple of eval_steps"]),
    (
        "early_stopping_patience=2 eval_steps=10 save_steps=10 max_steps=5",
        ["max_steps = 5", "before its first evaluation"],
    ),
    (
        "max_loss_tokens=900 max_steps=5",
        ["max_loss_tokens = 900", "max_steps = 5", "Set one of the two to none"],
    ),
    ("max_loss_tokens=900 use_packing=true", ["use_packing = True", "before the packing"]),
    ("completion=label_only thought_weight=0.5", ["thought_weight = 0.5", "no thoughts to weigh"]),
    ("completion=auxiliary thought_weight=0.5", ["thought_weight = 0.5", "weigh by label_task_weight"]),
    ("completion=auxiliary use_packing=true", ["use_packing = True", "must stay in one step"]),
    ("label_task_weight=0.3", ["label_task_weight = 0.3", "completion = 'cot'", "two tasks to weigh"]),
    ("completion=label_only data_strategy=shuffled", ["completion = 'label_only'", "have no thoughts"]),
    (
        "completion=label_only data_strategy=filler",
        ["data_strategy = 'filler'", "completion cot or label_first"],
    ),
    ("attn_implementation=flash_attention_2 compute_dtype=fp32", ["16 bits"]),
    ("distributed_training=true num_processes=1", ["num_processes = 1", "Set num_processes to 2"]),
    (
        "num_processes=2",
        ["distributed_training = False (default.py line", "Set distributed_training to true"],
    ),
    ("distributed_training=true gpu_id=0", ["gpu_id = 0", "Set gpu_id to none"]),
    ("wandb_run_id=abc", ["wandb_run_id = 'abc'", "Set use_wandb to true"]),
    ("report_to=tensorboard,wandb", ["report_to = 'tensorboard,wandb'", "Set use_wandb to true"]),
    ("lr_scheduler=constant", ["warmup_ratio = 0.03", "constant_with_warmup"]),
]


@pytest.mark.parametrize("overrides,says", CONTRADICTIONS, ids=[o for o, _ in CONTRADICTIONS])
def test_a_contradiction_names_both_keys_their_places_and_the_remedy(overrides, says):
    with pytest.raises(ConfigError) as e:
        load_config(overrides=overrides)
    assert [s for s in says if s not in str(e.value)] == []
    load_config(overrides=overrides, check=False)  # one value at a time, each is possible


@pytest.mark.parametrize(
    "overrides",
    [
        "early_stopping_patience=2",
        "early_stopping_patience=2 eval_steps=10 save_steps=20",
        "use_packing=true",
        "use_packing=true attn_implementation=flash_attention_2",
        "use_packing=true attn_implementation=sdpa",
        "eval_steps=10",
        "completion=label_only data_strategy=correct_only",
        "completion=label_first data_strategy=shuffled",
        "distributed_training=true num_processes=2",
        "distributed_training=true",
        "num_processes=1",
        "gpu_id=0",
        "wandb_run_id=abc use_wandb=true",
        "lr_scheduler=constant warmup_ratio=0",
        "use_dora=true",
        "max_steps=4 num_epochs=3",
        "train_data=a.jsonl eval_data=a.jsonl",
    ],
)
def test_what_only_looks_like_a_contradiction_is_allowed(overrides):
    load_config(overrides=overrides)


def test_a_circle_of_bases_is_named(config_file, tmp_path):
    b = tmp_path / "b.py"
    a = config_file(f'base = "{b}"\n', "a.py")
    b.write_text(f'base = "{a}"\n')
    with pytest.raises(
        ConfigError, match=r"b.py line 1: the bases go round in a circle: a.py <- b.py <- a.py. Remove"
    ):
        load_config(a)
    a = config_file(f'base = "{tmp_path}/a.py"\n', "a.py")
    with pytest.raises(ConfigError, match="in a circle: a.py <- a.py"):
        load_config(a)


def test_a_missing_config_lists_those_there_are_and_the_one_probably_meant(config_file):
    with pytest.raises(
        ConfigError, match="Did you mean label_only.*The configs are .*ablation2_best, .*reflected_shuffled"
    ):
        load_config("labelonly")
    mine = config_file("seed = 1\n")
    with pytest.raises(ConfigError, match=f"Did you mean {mine}"):
        load_config(mine.replace("mine", "mien")[:-3] + ".py")
    for bad in (None, "", 3, "a\0b", "__init__", "default/"):
        with pytest.raises(ConfigError, match="The configs are"):
            load_config(bad)


def test_a_name_never_means_a_file_that_lies_nearby(tmp_path, monkeypatch):
    (tmp_path / "ablation2.py").write_text("seed = 1\n")
    (tmp_path / "mine.py").write_text("seed = 1\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("ablation2").seed == 42
    assert load_config("ablation2.py").seed == load_config("./mine.py").seed == 1
    with pytest.raises(ConfigError):
        load_config("mine")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    for i, raw in enumerate([b"\xff\xfe\x00", b"seed = 1\0", b"seed = '\xe9'"]):
        p = tmp_path / f"c{i}.py"
        p.write_bytes(raw)
        with pytest.raises(ConfigError, match=f"c{i}.py"):
            load_config(str(p))
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config(str(tmp_path))


def test_a_file_whose_name_cannot_be_a_run_folder_is_refused(config_file):
    with pytest.raises(ConfigError, match="Rename the file"):
        load_config(config_file("seed = 1\n", "my exp.py"))


def test_a_config_file_is_never_executed(config_file, tmp_path):
    with pytest.raises(ConfigError):
        load_config(config_file(f"seed = open({str(tmp_path / 'x')!r}, 'w')\n"))
    assert not (tmp_path / "x").exists()


def test_a_key_missing_from_default_is_an_error_not_a_hidden_default(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    text = (CONFIGS / "default.py").read_text()
    (tmp_path / "configs" / "default.py").write_text(re.sub(r"(?m)^seed = .*\n", "", text))
    swap(monkeypatch, "nli_ft.process._package_dir", lambda: tmp_path)
    with pytest.raises(ConfigError, match="default.py: seed missing"):
        load_config()
    with pytest.raises(ConfigError, match="default.py: seed missing"):
        typed("--help")
    (tmp_path / "configs" / "default.py").write_text(text + 'base = "default"\n')
    with pytest.raises(ConfigError, match=r"default.py line \d+: base = 'default'.*can have no base"):
        load_config()


def test_a_bad_override_never_hides_behind_a_good_one(config_file):
    with pytest.raises(ConfigError, match="mine.py line 1: lora_r = 0"):
        load_config(config_file("lora_r = 0\n"), "lora_r=8")


# ---- all mistakes at once


def mistakes(name="default", overrides=None):
    "What the loader says, one mistake a line, without the count above them."
    with pytest.raises(ConfigError) as e:
        load_config(name, overrides)
    first, *rest = str(e.value).splitlines()
    if not rest:
        return [first]
    assert first == f"{len(rest)} mistakes:"
    return [m.strip() for m in rest]


def test_two_impossible_values_are_both_named():
    got = mistakes(overrides="lora_r=0 lr_scheduler=cosin")
    assert [m.split(": expected")[0] for m in got] == [
        "command line: lora_r = 0",
        "command line: lr_scheduler = 'cosin'",
    ]
    assert "at least 1" in got[0] and "leave lora_r out" in got[0]
    assert "Did you mean cosine?" in got[1] and "leave lr_scheduler out" in got[1]


def test_the_mistakes_of_a_file_its_base_and_the_command_line_come_together(config_file):
    base = config_file("lora_r = 0\nzzz = 1\nseed = open('x')\n", "base.py")
    mine = config_file(f"base = {base!r}\n\nuse_packing = 1\nimport os\nuse_dora = True\nuse_dora = False\n")
    got = "\n".join(mistakes(mine, "sed=1 max_steps oops=2 warmup_ratio=7 warmup_ratio=8"))
    for says in (
        "base.py line 1: lora_r = 0: expected",
        "base.py line 2: there is no key zzz.",
        "base.py line 3: `seed = open('x')`: expected a number",
        "mine.py line 3: use_packing = 1: expected true or false",
        "mine.py line 4: `import os`: expected a plain assignment",
        "mine.py line 6: use_dora = False: already set on line 5",
        "command line: there is no key sed. Did you mean seed?",
        "command line: override 'max_steps': expected key=value",
        "command line: there is no key oops.",
        "command line: warmup_ratio = 8.0: already set to 7.0",
        "command line: warmup_ratio = 7.0: expected a number, at least 0, below 1",
    ):
        assert says in got
    assert got.count("\n") == 10


def test_every_value_can_be_wrong_at_once():
    got = mistakes(overrides={k: object for k in KEYS})
    assert [m.split(" = ")[0] for m in got] == [f"command line: {k}" for k in KEYS]


def test_a_config_that_is_not_there_hides_no_wrong_override():
    got = mistakes("ablaton2", "lora_r=0 sed=1")
    assert len(got) == 3
    assert "Did you mean ablation2?" in got[0] and "Did you mean seed?" in got[1] and "lora_r = 0" in got[2]


def test_a_file_that_python_cannot_parse_hides_no_wrong_override(config_file):
    got = mistakes(config_file("seed = ("), "lora_r=0")
    assert len(got) == 2 and "mine.py line 1: '(' was never closed" in got[0] and "lora_r = 0" in got[1]


def test_contradictions_are_told_together_and_beside_impossible_values():
    got = mistakes(overrides="lora_r=0 lr_scheduler=constant distributed_training=true gpu_id=0")
    assert ["lora_r = 0" in got[0], "gpu_id = 0" in got[1], "no warm-up" in got[2]] == [True] * 3


def test_no_contradiction_is_told_that_a_corrected_value_or_key_would_resolve():
    wrong_value = mistakes(overrides="early_stopping_patience=2 eval_steps=10 save_steps=0")
    assert len(wrong_value) == 1 and "save_steps = 0" in wrong_value[0]
    misspelt = mistakes(overrides="early_stopping_patience=2 eval_steps=10 sav_steps=10")
    assert len(misspelt) == 1 and "there is no key sav_steps" in misspelt[0]


def test_one_mistake_is_told_once_although_two_layers_make_it():
    assert len(mistakes(overrides=["sed=1", "sed=2"])) == 1


def test_a_changed_copy_tells_all_its_mistakes():
    with pytest.raises(
        ConfigError, match="2 mistakes:\n  command line: lora_r = 0.*\n  command line: seed = -1"
    ):
        load_config().replace(lora_r=0, seed=-1)


def test_a_record_tells_all_its_mistakes():
    d = json.loads(print_config(load_config()))
    del d["config"]["seed"]
    d["config"].update(sed=1, lora_r=0)
    with pytest.raises(ConfigError) as e:
        config_from_json(json.dumps(d), "runs/a/config.json")
    for says in ("there is no key sed", "seed missing", "lora_r = 0: expected"):
        assert f"\n  runs/a/config.json: {says}" in str(e.value)


def test_a_command_line_with_two_mistakes_gives_exit_code_2_and_a_line_for_each():
    p = run("--config", "ablation2", "--lora_r", "0", "--lr_scheduler", "cosin")
    assert (p.returncode, p.stdout) == (2, "")
    lines = p.stderr.splitlines()
    assert lines[0] == "error: 2 mistakes:" and len(lines) == 3
    assert lines[1].startswith("  command line: lora_r = 0: expected")
    assert lines[2].startswith("  command line: lr_scheduler = 'cosin': expected")
    p = run("--lora_rr", "0", "--lr_schedulr", "x")
    assert p.returncode == 2
    assert "Did you mean --lora_r?" in p.stderr and "Did you mean --lr_scheduler?" in p.stderr


# ---- what is made of a config


def test_a_config_cannot_be_changed_after_the_check_and_travels_between_processes():
    c = load_config("ablation2", "seed=3")
    with pytest.raises(AttributeError):
        c.seed = 4
    again = pickle.loads(pickle.dumps(c))
    assert again == c and again.name == "ablation2" and again.sources["seed"] == "command line"


def test_the_hash_counts_what_changes_the_result_and_nothing_else():
    c = load_config("ablation2")
    other = dict(
        gpu_id=3,
        use_wandb=True,
        wandb_project="x",
        wandb_run_name="y",
        output_dir="o",
        runs_dir="r",
        logging_steps=3,
        resume_from_checkpoint="latest",
        save_total_limit=5,
        eval_before=False,
        eval_batch_size=3,
        judge_test=False,
        allow_changed=True,
        report_to="tensorboard",
        cpu_speed=False,
    )
    assert config_hash(c.replace(**other, wandb_run_id="z")) == config_hash(c)
    assert set(other) | {"wandb_run_id"} == {k for k, f in KEYS.items() if not f.metadata["result"]}
    seen = {config_hash(c)}
    for k, v in dict(
        seed=1,
        lora_r=4,
        num_epochs=1,
        completion="label_only",
        train_data="x.jsonl",
        model_id="tiny-mistral",
        max_grad_norm=None,
        early_stopping_patience=1,
    ).items():
        seen.add(config_hash(c.replace(**{k: v})))
    assert len(seen) == 9


def test_the_hash_does_not_depend_on_the_order_of_keys_or_on_where_values_came_from(config_file):
    a, b = config_file("seed = 1\nlora_r = 8\n", "a.py"), config_file("lora_r = 4 * 2\nseed = 1\n", "b.py")
    assert (
        config_hash(load_config(a))
        == config_hash(load_config(b))
        == config_hash(load_config("default", "lora_r=8 seed=1"))
    )


def test_the_hash_does_not_depend_on_where_a_key_is_declared(monkeypatch):
    c = load_config("ablation2")
    before = config_hash(c)
    swap(monkeypatch, "nli_ft.config_loader.KEYS", dict(reversed(KEYS.items())))
    assert list(c.to_dict())[0] == list(KEYS)[-1] and config_hash(c) == before


def test_how_often_a_checkpoint_is_kept_counts_only_with_early_stopping():
    c, early = load_config(), load_config(overrides="early_stopping_patience=1")
    assert config_hash(c) == config_hash(c.replace(save_steps=5, eval_steps=5))
    assert config_hash(early) != config_hash(early.replace(save_steps=5, eval_steps=5))
    assert one_factor([c, early]) == ["early_stopping_patience"]


def test_one_factor_lists_every_key_that_differs_between_any_two():
    cs = [load_config("ablation2"), load_config("ablation2", "seed=1"), load_config("label_only", "gpu_id=1")]
    assert one_factor(cs) == ["completion", "seed"]
    assert one_factor(cs, ignore=("seed",)) == ["completion"]


# ---- nothing but a ConfigError or a valid config ever comes out

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.text(max_size=5), max_size=3),
    st.binary(max_size=3),
    st.just(10**400),
    st.sampled_from(
        ["none", "true", "0.5", "1e-4", "[q_proj,v_proj]", "all-linear", "latest", "nf4", "cot", "~", "./m"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["default", "ablation2", "cpu_demo"]),
    overrides=st.dictionaries(
        st.one_of(st.sampled_from(sorted(KEYS)), st.text(max_size=8)), VALUES, max_size=4
    ),
)
def test_random_overrides_give_a_config_error_or_a_valid_config(name, overrides):
    try:
        c = load_config(name, overrides)
    except ConfigError as e:
        assert str(e)
        return
    assert config_from_json(print_config(c)) == c
    assert typed(*c.to_args()) == c


@settings(max_examples=300, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.lists(st.tuples(st.sampled_from(sorted(KEYS) + ["base"]), VALUES), max_size=3).map(
            lambda kvs: " ".join(f"{k}={v}" for k, v in kvs)
        ),
    )
)
def test_random_override_text_gives_a_config_error_or_a_valid_config(text):
    try:
        assert isinstance(load_config("default", text), Config)
    except ConfigError as e:
        assert str(e)


@settings(max_examples=200, deadline=None)
@given(
    raw=st.one_of(
        st.binary(max_size=60),
        st.lists(
            st.tuples(st.sampled_from(["seed", "lora_r", "base", "target_modules", "x"]), VALUES), max_size=3
        ).map(lambda kvs: "\n".join(f"{k} = {v!r}" for k, v in kvs).encode("utf-8", "replace")),
    )
)
def test_random_config_files_give_a_config_error_or_a_valid_config(raw, tmp_path_factory):
    p = tmp_path_factory.mktemp("fuzz") / "mine.py"
    p.write_bytes(raw)
    try:
        assert isinstance(load_config(str(p)), Config)
    except ConfigError as e:
        assert "mine.py" in str(e)


# ---- a reader that leaves


READER_GONE = [
    "nli_train --config cpu_demo --print_config",
    "nli_train --help",
    "nli_run --config cpu_demo --dry_run",
    "nli_runs",
    "nli_data --help",
    "nli_compare --help",
    "nli_corpus --help",
    "python -m nli_ft.config_loader --config ablation2",
    "nli_bench --help",
]


@pytest.mark.parametrize("line", READER_GONE)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_command_whose_reader_is_gone_ends_quietly(line, unbuffered):
    name, *args = line.split()
    reader, writer = os.pipe()
    os.close(reader)
    try:
        p = subprocess.run(
            [os.path.join(os.path.dirname(sys.executable), name), *args],
            stdout=writer,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writer)
    assert p.returncode in (0, 141) and p.stderr == b""


def test_a_command_may_be_cut_by_head():
    line = f"{shlex.quote(sys.executable)} -m nli_ft.train_sft --config cpu_demo --print_config"
    script = f"{line} | head -3; echo ${{PIPESTATUS[0]}}"
    p = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    *shown, code = p.stdout.splitlines()
    assert len(shown) == 3 and code in ("0", "141") and p.stderr == ""


def test_a_command_that_fails_after_its_reader_left_still_says_why():
    body = "print('half'); raise p.DataError('a.csv line 3: no label')"
    code = f"import nli_ft.process as p\n@p.command\ndef f(argv): {body}\nf([])"
    script = f"sleep .2; {shlex.quote(sys.executable)} -c {shlex.quote(code)}; echo $? >&2"
    env = {
        k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"
    }  # without a buffer, print itself fails
    p = subprocess.run(
        ["bash", "-c", f"{{ {script}; }} | true"], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert p.stderr == "error: a.csv line 3: no label\n2\n"
