"""One run judges several named sets, each in a report of its own, and a test once. What selected is told apart from
what is reported."""

import json

import pytest
from tiny_models import box_rows, save_model

from nli_ft.ask import evaluate_cli, evaluate_run, evaluation_rows
from nli_ft.config_loader import config_from_json, load_config, print_config
from nli_ft.files import write_jsonl
from nli_ft.process import ConfigError, DataError
from nli_ft.records import environment, overrides_text, read_run
from nli_ft.train_sft import run_training, train_cli

KEYS = dict(
    device="cpu",
    compute_dtype="fp32",
    target_modules="all-linear",
    lora_r=2,
    lora_alpha=4,
    batch_size=8,
    max_steps=2,
    max_train_samples=24,
    max_eval_samples=None,
    max_new_tokens=4,
    eval_batch_size=16,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a tiny model and rows for training, dev, hans and test. Two rows of the test are in dev."
    folder, rows = tmp_path_factory.mktemp("sets"), box_rows(56, "brief")
    save_model("qwen2", folder / "base")
    hans = [dict(r, heuristic=("subsequence", "constituent")[r["id"] % 4 // 2]) for r in rows[32:44]]
    parts = dict(train=rows[:24], dev=rows[24:32], hans=hans, test=rows[30:32] + rows[44:])
    for name, part in parts.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    return folder


def config(place, **changes):
    sets = dict(dev=str(place / "dev.jsonl"), hans=str(place / "hans.jsonl"))
    files = dict(train_data=str(place / "train.jsonl"), eval_data=sets, test_data=str(place / "test.jsonl"))
    files |= dict(model_id=str(place / "base"), output_dir=str(place / "m"), runs_dir=str(place / "runs"))
    return load_config("minimal_test", KEYS | files | changes)


@pytest.fixture(scope="module")
def run(place):
    return run_training(config(place))


def exit_code(command, *argv):
    try:
        return command([str(word) for word in argv])
    except SystemExit as e:
        return e.code


def report_of(run, name):
    return json.loads((run / "evaluations" / name / "report.json").read_text())


# -- how sets are written


def test_a_config_file_and_the_command_line_name_the_same_sets(tmp_path):
    (tmp_path / "mine.py").write_text('eval_data = dict(dev="data/d.jsonl", hans="data/h.jsonl")\n')
    from_file = load_config(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text("")
    folder = from_file.root / "data"
    typed = f"dev={folder}/d.jsonl,hans={folder}/h.jsonl"
    assert load_config(tmp_path / "mine.py", dict(eval_data=typed)) == from_file
    assert overrides_text(load_config(tmp_path / "mine.py", dict(eval_data=typed))) == (
        "eval_data=dev=data/d.jsonl,hans=data/h.jsonl"
    )


def test_another_order_of_the_sets_reaches_a_child_process():
    one = load_config("minimal_test", dict(eval_data=dict(a="/x/a.jsonl", b="/x/b.jsonl")))
    two = one.replace(eval_data=dict(b="/x/b.jsonl", a="/x/a.jsonl"))
    words = dict(word.removeprefix("--").split("=", 1) for word in two.to_args()[2:])
    assert list(load_config("minimal_test", words).eval_data) == ["b", "a"]
    assert list(config_from_json(print_config(two)).eval_data) == ["b", "a"]


@pytest.mark.parametrize(
    "value, said",
    [
        ("dev=a.jsonl,dev=b.jsonl", "each name once"),
        ("train=a.jsonl,dev=b.jsonl", "none of train and eval"),
        ("dev=", "expected a path, or several"),
        ("{}", "expected a path, or several"),
    ],
)
def test_names_that_cannot_be_sets_are_refused_with_the_form_that_can(value, said, capsys):
    assert exit_code(train_cli, "--config", "minimal_test", "--eval_data", value, "--print_config") == 2
    err = capsys.readouterr().err
    assert "command line: eval_data" in err and said in err


def test_a_missing_file_of_several_is_named_with_its_set(capsys):
    assert exit_code(train_cli, "--config", "minimal_test", "--eval_data", "dev=a.jsonl,hans=b.jsonl") == 2
    err = capsys.readouterr().err
    assert "eval_data = dev=" in err and "eval_data = hans=" in err


def test_the_record_of_a_single_file_names_no_sets(place):
    plain = config(place, eval_data=str(place / "dev.jsonl"), test_data=None)
    assert list(environment(plain)["data"]) == ["train", "eval"]
    assert "role" not in environment(plain)["data"]["eval"]
    assert [(k, d["role"]) for k, d in list(environment(config(place))["data"].items())[1:]] == [
        ("eval", "selected"),
        ("hans", "reported"),
        ("test", "test"),
    ]


# -- one run


def test_each_set_has_a_report_that_says_what_it_is_for(run):
    hans, test = report_of(run, "hans"), report_of(run, "test")
    assert (hans["role"], test["role"]) == ("reported", "test")
    assert (hans["data"]["rows"], test["data"]["rows"]) == (12, 14)
    assert hans["selected"]["name"] == "dev" and hans["data"]["path"].endswith("hans.jsonl")
    assert len(hans["slices"]["hans"]) == 4 and "looks" not in hans
    for name in ("hans", "test"):
        assert (run / "evaluations" / name / "confusion.png").is_file()
    record = read_run(run)
    assert list(record.summary["evaluations"]) == ["hans", "test"]
    assert record.summary["evaluations"]["hans"]["n"] == 12
    assert len(record.predictions()) == 8  # those of dev
    assert record.summary["rows"]["judged"] == 8


def test_rows_of_the_test_that_selected_are_told_in_the_report_the_record_and_on_the_card(run):
    warning = "2 of 14 pairs of test are in dev. It selected, so the score of test flatters the model."
    assert report_of(run, "test")["warnings"] == [warning]
    assert read_run(run).summary["sets"]["test"]["warnings"] == [warning]
    card = (run / "MODEL_CARD.md").read_text()
    assert warning in card and "hans (reported)" in card and "looked at 1 time by config minimal_test" in card


def test_looks_at_a_test_are_counted_over_all_records(run, place, capsys):
    assert report_of(run, "test")["looks"] == 1
    report, folder, _ = evaluate_run(run, mode="forced", data="test")
    assert (report["role"], report["looks"]) == ("test", 2)
    assert exit_code(evaluate_cli, "--run", str(run), "--data", "test") == 0  # the same folder: no other look
    assert "looked at 2 times by config minimal_test" in capsys.readouterr().out
    other, _, _ = evaluate_run(run, mode="forced", data=place / "hans.jsonl")
    assert other["role"] == "reported" and "looks" not in other


def test_an_interrupted_run_goes_on_in_the_set_it_was_in(run, capsys):
    folder = run / "evaluations" / "hans"
    whole = (folder / "predictions.jsonl").read_text()
    (folder / "predictions.jsonl").write_text("".join(whole.splitlines(keepends=True)[:5]))
    (folder / "report.json").unlink()
    assert exit_code(evaluate_cli, "--run", str(run)) == 0
    out = capsys.readouterr().out
    assert "set dev (selected)" in out and "set hans (reported" in out and "set test" not in out
    now = (folder / "predictions.jsonl").read_text()
    assert now.splitlines()[:5] == whole.splitlines()[:5] and len(now.splitlines()) == 12
    assert report_of(run, "hans")["role"] == "reported"


def test_a_name_that_is_also_a_file_is_not_guessed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hans").write_text("")
    with pytest.raises(ConfigError, match="Write ./hans for the file"):
        evaluate_run(run, data="hans")


# -- refused before anything is trained


def test_a_set_that_cannot_be_judged_is_refused_before_training(place, tmp_path):
    long = dict(box_rows(1, "brief")[0], id="long", premise="word " * 600)
    long.pop("prompt"), long.pop("completion")
    files = {
        "bad.jsonl": ([dict(premise="A dog runs.")], "set bad: "),
        "long.jsonl": ([long], "row 'long': its prompt has"),
    }
    for name, (rows, said) in files.items():
        write_jsonl(tmp_path / name, rows)
        sets = dict(dev=str(place / "dev.jsonl"), hans=str(place / "hans.jsonl"), bad=str(tmp_path / name))
        with pytest.raises(DataError, match=said):
            run_training(
                config(place, eval_data=sets, runs_dir=str(tmp_path), output_dir=str(tmp_path / "m"))
            )
    assert not (tmp_path / "m").exists()


def test_the_training_file_is_no_test(place, tmp_path):
    (tmp_path / "copy.jsonl").write_bytes((place / "train.jsonl").read_bytes())
    with pytest.raises(DataError, match="test_data .*copy.jsonl are files of the same bytes"):
        run_training(config(place, test_data=str(tmp_path / "copy.jsonl"), runs_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_three_way_run_takes_a_two_way_set_that_says_so_and_scores_it_two_way(tmp_path):
    pair = dict(premise="A dog runs.", contract="binary", heuristic="subsequence")
    rows = [
        dict(
            pair,
            id=i,
            hypothesis=f"It ran {i} miles.",
            label=i % 2,
            relation=("non-entailment", "entailment")[i % 2],
        )
        for i in range(4)
    ]
    write_jsonl(tmp_path / "hans.jsonl", rows)
    three = load_config("minimal_test", dict(label_set="three_way"))
    asked = evaluation_rows(tmp_path / "hans.jsonl", three, "brief")
    assert [r["label"] for r in asked] == [0, 1, 0, 1] and "neutral" in str(asked[0]["prompt"])
    write_jsonl(tmp_path / "mixed.jsonl", [rows[0], rows[1] | dict(contract="entailment")])
    with pytest.raises(DataError, match="records the label contract 'binary'"):
        evaluation_rows(tmp_path / "mixed.jsonl", three, "brief")
