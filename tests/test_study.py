"""A study from its declaration to its results. Most runs here are made up: they leave the record and the predictions of
a run, written by the functions that real runs use, and no model is trained."""

import functools, gzip, json, os, re, shlex, shutil, subprocess, sys, types
from pathlib import Path

import pytest

import nli_ft.study_plan
import nli_ft.study_run
from nli_ft.ask import evaluation_rows
from nli_ft.claims import parse_checks
from nli_ft.config_loader import answer_style, config_hash, judged_files, load_config
from nli_ft.files import write_jsonl
from nli_ft.fit import weights_of
from nli_ft.labels import LABEL_SETS, RELATIONS
from nli_ft.launch import RunFailed
from nli_ft.predict import _answer_in_batches, prediction_row
from nli_ft.predictions import counted, read_predictions, resume_predictions
from nli_ft.process import ConfigError, RecordError, project_root
from nli_ft.records import append_metrics, finish_run, new_run_dir, read_run, start_run
from nli_ft.rows import data_hash, render_completion, seal, sft_row
from nli_ft.study import PlannedRun, Study, read_study_file
from nli_ft.study_plan import (
    TRIAL_STEPS,
    cell_work,
    plan_sha256,
    plan_study,
    plan_text,
    plan_warnings,
    read_plan,
)
from nli_ft.study_report import deviations
from nli_ft.study_run import Progress, read_lines, read_results, results_frame, run_study

DECLARED = """question = "Does a thought help?"
prediction = "It does."
checks = ["cot > label_only"]
base = "minimal_test"
settings = dict(
    model_id="tiny-mistral", device="cpu", eval_before=False, max_train_samples=None, max_eval_samples=None,
    train_data="FOLDER/train.jsonl", eval_data=dict(dev="FOLDER/dev.jsonl"), test_data=dict(test="FOLDER/test.jsonl"),
)
arms = dict(label_only=dict(completion="label_only"), cot=dict())
seeds = [1, 2]
contrast = ["label_only", "cot"]
tokens_per_s = 100.0
"""
GRID = "grid = dict(learning_rate=[1e-3, 2e-3])\n"
CONDITIONS = "conditions = dict(short=dict(max_steps=1), long=dict(max_steps=2))\n"


def made_up_rows(name, n, three_way=False):
    "Rows of one file, two of them in a cluster."
    labels = RELATIONS if three_way else (0, 1)
    rows = []
    for i in range(n):
        premise, hypothesis = f"The {name} box {i // 2} is red.", f"Box {i} of {name} is not blue."
        label = labels[i % len(labels)]
        rows.append(
            sft_row(f"{name}{i}", premise, hypothesis, f"Red is no blue {i}.", label, "test", "brief")
        )
    return rows


def declare(folder, more="", replace=None, three_way=False, sizes=(("train", 8), ("dev", 6), ("test", 6))):
    "A study file with its data. `replace` is (old, new) text."
    for name, n in sizes:
        write_jsonl(folder / f"{name}.jsonl", made_up_rows(name, n, three_way), overwrite=True)
    text = DECLARED.replace(*replace) if replace else DECLARED
    if three_way:
        text = text.replace("settings = dict(", 'settings = dict(\n    label_set="three_way",')
    file = folder / "little.py"
    file.write_text(text.replace("FOLDER", str(folder)) + more)
    return Study(file)


# --- declaration


def mistakes_in(folder, more="", replace=None):
    with pytest.raises(ConfigError) as e:
        declare(folder, more, replace)
    return str(e.value)


def test_all_mistakes_of_values_are_told_at_once_each_with_its_line(tmp_path):
    said = mistakes_in(tmp_path, "alpha = 2\nmetrik = 1\nseeds = [3]\nimport os\nchecks2 = f(3)\n")
    assert said.startswith("5 mistakes:")
    for part in (
        "little.py line 13: alpha = '2': expected a number above 0 and below 1",
        "line 14: a study has no field metrik. Did you mean metric?",
        "line 15: seeds is already set on line 10. Keep one of the two",
        "line 16: expected a plain assignment",
        "line 17: a study has no field checks2. Did you mean checks?",
    ):
        assert part in said, said


WRONG = {
    "checks2 = [1]": "a study has no field checks2",
    "tokens_per_s = 0": "tokens_per_s is already set on line 12",
    "only = dict(cot='short')": "expected dict(arm=[condition, …])",
    "only = dict(cot=[])": "cot = []: expected at least one condition",
    "only = dict(cot=['short'])\nat = 'long'": "cot does not run in condition 'long'",
    "only = dict(cot=['lang'])": "only names 'lang', which is no condition (short, long). Did you mean long?",
    "more_seeds = dict(cot=[2, 3])": "cot: expected new whole numbers beside seeds = [1, 2]",
    "guess = dict(accuracy=70)": "accuracy = 70: expected a number above 0 and below 1",
    "guess = dict(sd=0.1)": "guess names 'sd', which is no guess",
    "pools = dict(all=['dev', 'dev'])": "expected at least two sets, each once",
    "pools = dict(all=['dev', 'tst'])": "pool all names 'tst', and the sets are dev, test",
    "pools = dict(dev=['dev', 'test'])": "the pool dev has the name of a set",
    "on = 'hans'": "on names 'hans', and the sets are dev, test",
    "grid = dict(learning_rate=1e-3)": "expected a list of numbers or texts to choose from, each once",
    "grid = dict(learning_rate=[1e-3, 0.001])": "each once",
    "grid = dict(seed=[1, 2])": "seed belongs to the study",
    "grid_at = 'lnog'": "grid_at names 'lnog', which is no condition (short, long). Did you mean long?",
    "metric = 'acc'": "metric names 'acc', which is no score of an item",
    "more_seeds = dict(cot=[4294967296])": "beside seeds = [1, 2], up to 4,294,967,295",
    "grid = dict(max_steps=[3, 4])": "max_steps is searched, and condition short sets it (",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_field_is_refused_with_its_place(tmp_path, line):
    said = mistakes_in(tmp_path, CONDITIONS + line)
    assert WRONG[line] in said and re.search(r"little.py line 1\d", said), said


def test_a_contrast_of_something_else_than_two_arms_is_refused(tmp_path):
    for wrong, why in (
        ('["cot", "cot"]', "expected [baseline arm, other arm]"),
        ('["cot"]', "expected [baseline arm, other arm]"),
        ('[["cot"], "label_only"]', "expected [baseline arm, other arm]"),
        (
            '["cto", "label_only"]',
            "contrast names 'cto', which is no arm (label_only, cot). Did you mean cot?",
        ),
    ):
        assert why in mistakes_in(tmp_path, replace=('["label_only", "cot"]', wrong))


def test_a_mistake_that_all_runs_share_is_told_once_with_the_line_of_its_field(tmp_path):
    said = mistakes_in(tmp_path, CONDITIONS + GRID, ("eval_before", "eval_befor"))
    assert said.count("there is no key eval_befor. Did you mean eval_before?") == 1
    assert "little.py line 5 (label_only@short learning_rate=0.001 and 7 more)" in said
    said = mistakes_in(
        tmp_path, "grid = dict(learning_rate=[-1.0, 2.0, 1e-3])", ("cot=dict()", "cot=dict(lora=3)")
    )
    assert "line 9 (cot learning_rate=-1.0 and 2 more): there is no key lora. Did you mean" in said
    assert (
        said.count("line 13 (label_only learning_rate=-1.0 and 1 more): learning_rate = -1.0: expected") == 1
    )


def test_a_study_is_the_same_from_every_folder(tmp_path, monkeypatch):
    study = declare(tmp_path, replace=("FOLDER/train.jsonl", "data/embedded/train.jsonl"))
    run = study.first_runs()[0]
    here = study.hash(), study.config(run).train_data
    monkeypatch.chdir(project_root() / "nbs")
    there = Study(study.path)
    assert (there.hash(), there.config(run).train_data) == here == (here[0], "data/embedded/train.jsonl")


def test_a_field_at_its_default_and_a_comment_leave_the_hash_as_it_is(tmp_path):
    usual = declare(tmp_path).hash()
    assert declare(tmp_path, "grid = dict()\nalpha = 0.05\non = ''\npools = dict()  # none\n").hash() == usual
    assert declare(tmp_path, replace=("seeds = [1, 2]", "seeds = [\n    1, 2\n]")).hash() == usual
    assert set(declare(tmp_path).facts()["declaration"]) == set(read_study_file(tmp_path / "little.py"))
    assert declare(tmp_path, "alpha = 0.01\n").hash() != usual
    assert declare(tmp_path, replace=("eval_before=False", "eval_before=False, lora_r=9")).hash() != usual


def labels_of(study, chosen=()):
    runs = study.first_runs() + study.later_runs(dict.fromkeys(study.cells(), chosen))
    return [run.label for run in runs]


def test_every_arm_is_seen_once_before_the_second_seed_and_further_seeds_come_last(tmp_path):
    assert labels_of(declare(tmp_path, "more_seeds = dict(cot=[5, 4])\n")) == [
        "label_only seed 1",
        "cot seed 1",
        "label_only seed 2",
        "cot seed 2",
        "cot seed 4",
        "cot seed 5",
    ]
    labels = labels_of(declare(tmp_path, CONDITIONS + "only = dict(label_only=['short'])\n"))
    assert labels[:3] == ["label_only@short seed 1", "cot@short seed 1", "cot@long seed 1"]
    assert len(labels) == 6


def test_a_grid_is_searched_with_the_first_seed_where_grid_at_says_so(tmp_path):
    study = declare(tmp_path, CONDITIONS + GRID + "grid_at = 'short'\n")
    chosen = (("learning_rate", 2e-3),)
    labels = labels_of(study, chosen)
    assert labels[:4] == [
        "label_only@short learning_rate=0.001 seed 1",
        "label_only@short learning_rate=0.002 seed 1",
        "cot@short learning_rate=0.001 seed 1",
        "cot@short learning_rate=0.002 seed 1",
    ]
    assert labels[4:6] == [
        "label_only@long learning_rate=0.002 seed 1",
        "cot@long learning_rate=0.002 seed 1",
    ]
    assert len(labels) == 4 + 2 + 4
    everywhere = declare(tmp_path, CONDITIONS + GRID)
    assert len(everywhere.first_runs()) == 8 and len(labels_of(everywhere)) == 12
    own = declare(tmp_path, GRID, ("cot=dict()", "cot=dict(learning_rate=5e-3)"))
    assert [own.grid_of(arm) for arm in own.arms] == [[(("learning_rate", 1e-3),), chosen], [()]]
    assert own.config(own.first_runs()[2]).learning_rate == 5e-3


def test_different_keys_count_what_two_arms_differ_in(tmp_path):
    arms = "cot=dict(), more=dict(max_steps=9), wider=dict(lora_r=4, max_steps=9), "
    arms += 'shuffled=dict(data_strategy="shuffled"), '
    arms += 'right_rows=dict(completion="label_only", data_strategy="correct_only")'
    study = declare(tmp_path, GRID, ("cot=dict()", arms))

    def different(arm, other):
        return study.different_keys((arm, ""), other)

    assert different("cot", None) == ["completion"]
    assert different("shuffled", "cot") == ["data_strategy"]
    assert different("shuffled", "label_only") == ["completion"]
    assert different("right_rows", "label_only") == ["data_strategy"], "it has fewer rows"
    assert different("wider", "more") == ["lora_r"] and set(different("wider", "cot")) == {
        "lora_r",
        "max_steps",
    }


def test_a_key_that_one_arm_sets_and_the_other_searches_is_a_difference(tmp_path):
    arms = "cot=dict(), fast=dict(learning_rate=5e-3), fixed=dict(learning_rate=7e-3)"
    study = declare(tmp_path, GRID, ("cot=dict()", arms))
    usual = study.config(study.first_runs()[0]).learning_rate
    for arm, other in (("cot", "fast"), ("fast", "cot"), ("fast", "fixed")):
        assert study.different_keys((arm, ""), other) == ["learning_rate"]
    same = declare(tmp_path, GRID, ("cot=dict()", f"cot=dict(), fast=dict(learning_rate={usual / 2})"))
    assert same.different_keys(("fast", ""), "cot") == ["learning_rate"]


def test_one_run_does_not_count_as_two(tmp_path):
    said = mistakes_in(tmp_path, replace=("cot=dict()", "cot=dict(), twin=dict()"))
    assert re.search(r"little.py line 9: cot and twin are one and the same run. Drop one of the arms", said)
    said = mistakes_in(tmp_path, CONDITIONS, ("cot=dict()", "cot=dict(max_steps=3)"))
    assert "line 9 and " in said and "line 13: cot@short and cot@long are one and the same run" in said
    assert "The arm sets what the conditions set. Take it out of cot, or name one condition" in said
    found = "cot learning_rate=0.002 and fast are one and the same run"
    assert found in mistakes_in(tmp_path, GRID, ("cot=dict()", "cot=dict(), fast=dict(learning_rate=2e-3)"))
    only = CONDITIONS + "only = dict(cot=['short'])\n"
    assert len(declare(tmp_path, only, ("cot=dict()", "cot=dict(max_steps=3)")).cells()) == 3


def test_a_test_file_that_is_judged_under_another_name_is_refused(tmp_path, few_simulations):
    for old, new in (
        ('dev="FOLDER/dev.jsonl"', 'dev="FOLDER/dev.jsonl", peek="FOLDER/x/../test.jsonl"'),
        ('dev="FOLDER/dev.jsonl"', 'test_of_dev="FOLDER/test.jsonl"'),
        ('test="FOLDER/test.jsonl"', 'test="FOLDER/test.jsonl", again="FOLDER/test.jsonl"'),
    ):
        said = mistakes_in(tmp_path, replace=(old, new))
        assert re.search(r"line 5 \(label_only and 1 more\): the sets \w+ and \w+ are one file", said), said
    study = declare(tmp_path, replace=('dev="FOLDER/dev.jsonl"', 'dev="FOLDER/copy.jsonl"'))
    shutil.copy(tmp_path / "test.jsonl", tmp_path / "copy.jsonl")
    with pytest.raises(ConfigError, match=r"the sets dev \(.*copy.jsonl\) and test .* have the same content"):
        plan_study(study, say=quiet)
    assert read_plan(study) is None


def test_a_pool_counts_no_item_twice(tmp_path, few_simulations):
    two = ('dev="FOLDER/dev.jsonl"', 'dev="FOLDER/dev.jsonl", more="FOLDER/dev.jsonl"')
    said = mistakes_in(tmp_path, "pools = dict(all=['dev', 'more'])", two)
    assert "line 13 (label_only and 1 more): pool all holds one file twice" in said
    rows = made_up_rows("dev", 8)[4:6] + made_up_rows("other", 4)
    write_jsonl(tmp_path / "more.jsonl", rows, overwrite=True)
    other = two[1].replace('more="FOLDER/dev.jsonl"', 'more="FOLDER/more.jsonl"')
    study = declare(tmp_path, "pools = dict(all=['dev', 'more'])", (two[0], other))
    with pytest.raises(
        ConfigError, match="line 13: pool all: the sets dev and more share 1 groups of items, such as"
    ):
        plan_study(study, say=quiet)
    assert read_plan(study) is None


def test_a_study_file_that_is_not_utf8_is_named_with_line_and_byte(tmp_path):
    path = declare(tmp_path).path
    path.write_bytes(path.read_bytes().replace(b"It does.", "Schön.".encode("latin-1")))
    with pytest.raises(ConfigError) as e:
        Study(path)
    assert str(e.value).endswith("little.py line 2: the byte 0xF6 is not UTF-8. Save the file as UTF-8.")


def test_numbers_that_no_run_can_use_are_refused(tmp_path):
    said = mistakes_in(tmp_path, replace=("tokens_per_s = 100.0", "tokens_per_s = 1e999"))
    assert "line 12: tokens_per_s = 'inf': expected a number above 0, or None" in said
    said = mistakes_in(tmp_path, replace=("seeds = [1, 2]", "seeds = [1, 4294967296]"))
    assert "line 10: seeds = '[1, 4294967296]': expected a list of whole numbers up to 4,294,967,295" in said
    assert declare(tmp_path, replace=("seeds = [1, 2]", "seeds = [1, 4294967295]")).seeds[1] == 2**32 - 1


def test_mistakes_of_checks_are_told_together_with_file_and_line(tmp_path):
    checks = '["cot > lable_only", "cot > 70", "abs(cot - label_only) < 5"]'
    study = declare(tmp_path, replace=('["cot > label_only"]', checks))
    with pytest.raises(ConfigError) as e:
        parse_checks(study)
    said = str(e.value)
    assert said.startswith("3 mistakes:") and said.count("little.py line 3: check '") == 3
    assert "check 'cot > 70', character 1: scores lie from 0 to 1, so this sum lies from 0 to 1" in said
    assert "5 points are 0.05" in said


def test_two_checks_that_say_the_same_are_refused(tmp_path):
    for one, other in (
        ("cot > label_only", "label_only < cot"),
        ("cot > label_only", "2 * cot - 2 * label_only > 0"),
        ("abs(cot - label_only) < 0.1", "0.1 > abs(label_only - cot)"),
        ("cot > label_only", "cot > label_only on test"),
    ):
        study = declare(tmp_path, replace=('["cot > label_only"]', f'["{one}", "{other}"]'))
        with pytest.raises(ConfigError) as e:
            parse_checks(study)
        assert f"line 3: the checks {one!r} and {other!r} say the same. Keep one of the two" in str(e.value)
    for other in ("cot < label_only", "cot - label_only > 0.1", "cot > label_only on dev", "cot > 0.5"):
        study = declare(tmp_path, replace=('["cot > label_only"]', f'["cot > label_only", "{other}"]'))
        assert len(parse_checks(study)) == 2


# --- plan


@functools.cache
def tokenizer():
    from nli_ft.bases import load_tokenizer
    from nli_ft.config_loader import load_config

    return load_tokenizer(load_config("minimal_test", dict(model_id="tiny-mistral")))


@pytest.fixture
def few_simulations(monkeypatch):
    "The power is simulated a few times only: its value is not what is tested here. The tokenizer is loaded once."
    once = tokenizer()
    monkeypatch.setattr("nli_ft.bases.load_tokenizer", lambda cfg: once)
    few = functools.partial(nli_ft.study_plan.simulated_power, n_sim=4)
    monkeypatch.setattr("nli_ft.study_plan.simulated_power", few)


def keep_plan(study, plan):
    "Another plan in the place of the sealed one, with the hash that belongs to it."
    (study.folder / "plan.json").write_text(json.dumps(plan | dict(sha256=plan_sha256(plan))))


def quiet(line):
    "Takes a line of progress."


@pytest.fixture
def planned(tmp_path, few_simulations, monkeypatch):
    def refuse(study):
        raise AssertionError("the speed is stated")

    monkeypatch.setattr("nli_ft.study_plan.measure_speed", refuse)

    def make(more="", replace=None, **how):
        study = declare(tmp_path, more, replace, **how)
        return study, plan_study(study, say=quiet)

    return make


def test_a_plan_counts_rows_steps_and_runs_and_measures_nothing_where_the_speed_is_stated(planned):
    study, plan = planned(CONDITIONS + GRID + "grid_at = 'short'\nmore_seeds = dict(cot=[3])\n")
    cells = {(c["arm"], c["condition"]): c for c in plan["cells"]}
    runs = [c["runs"] for c in cells.values()]
    # the third seed belongs to the condition of the primary contrast
    assert runs == [3, 4, 2, 2] and plan["runs"] == sum(runs) == len(labels_of(study))
    assert [c["steps"] for c in cells.values()] == [1, 1, 2, 2]
    long = cells["cot", "long"]
    assert (
        long["rows"] == 8
        and long["tokens"] > long["loss_tokens"] > cells["label_only", "long"]["loss_tokens"]
    )
    assert long["minutes_a_run"] == pytest.approx(long["tokens"] / 100 / 60, abs=0.006)
    assert plan["sets"] == {"dev": dict(rows=6, clusters=3), "test": dict(rows=6, clusters=3)}
    text = plan_text(plan)
    assert "11 runs" in text and "answering and loading are not counted" in text
    assert "sealed" in text and plan["hash"][:16] in text


def test_a_plan_warns_where_the_length_of_a_thought_decides_which_rows_make_a_step(planned):
    study, plan = planned()
    work = {cell: w | dict(one_label=0.6 * (cell[0] == "cot")) for cell, w in cell_work(study, str).items()}
    [told] = [s for s in plan_warnings(study, work, plan["power"]) if "of one label only" in s]
    assert told.startswith("cot has rows of one label only in 60% of its steps, and label_only in 0%")
    assert "group_by_length=False" in told


def test_a_plan_warns_as_a_reviewer_would(planned):
    arms = "cot=dict(), other=dict(lora_r=4, lora_alpha=9, lora_dropout=0.5)"
    _, plan = planned(replace=("cot=dict()", arms))
    said = "\n".join(plan["warnings"])
    assert "other differs from every other arm in several settings, least from cot: lora_r" in said
    assert re.search(r"cot has [\d.]+ times the loss tokens of label_only", said)
    assert "set test has 3 clusters of items. A verdict needs at least" in said
    assert "one seed" not in said and "of one label only" not in said
    assert "the power of the primary contrast" in said


def test_a_plan_with_one_seed_or_other_steps_says_so(planned):
    _, plan = planned(replace=("cot=dict()", "cot=dict(max_steps=2)"))
    assert "cot trains 2 steps and label_only 4" in plan["warnings"]


def test_one_seed_is_warned_of(planned):
    _, plan = planned(replace=("[1, 2]", "[1]"))
    assert any(w.startswith("one seed: no verdict on an arm is possible") for w in plan["warnings"])


def test_a_sealed_plan_stays_and_a_change_needs_a_reason(planned, monkeypatch):
    study, plan = planned()
    file = study.folder / "plan.json"
    before = file.read_bytes()
    monkeypatch.setattr("nli_ft.study_plan.cell_work", None)
    assert plan_study(study) == plan and file.read_bytes() == before
    with pytest.raises(ConfigError, match="there is nothing to amend"):
        plan_study(study, amend="why not")
    monkeypatch.undo()
    changed = declare(study.path.parent, "alpha = 0.01\n")
    with pytest.raises(ConfigError, match=r"is not what was sealed on .*: alpha changed. .*--amend"):
        plan_study(changed)
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match="alpha changed"):
        run_study(changed)


def test_an_amendment_keeps_the_first_date_and_says_what_changed_and_why(planned):
    study, first = planned()
    first["sealed"] = "2026-01-01T00:00:00Z"
    keep_plan(study, first)
    changed = declare(study.path.parent, "alpha = 0.01\n", ("seeds = [1, 2]", "seeds = [1, 2, 3]"))
    plan = plan_study(changed, amend="reviewers asked for it", say=quiet)
    (change,) = plan["amendments"]
    assert change["changed"] == dict(seeds=[[1, 2], [1, 2, 3]], alpha=[None, 0.01])
    assert change["reason"] == "reviewers asked for it" and change["hash_before"] == first["hash"]
    assert plan["sealed"] == first["sealed"] and plan["hash"] == changed.hash() != first["hash"]
    assert "reviewers asked for it (seeds, alpha)" in plan_text(plan)
    assert plan_study(changed) == plan


def test_an_amendment_keeps_what_was_done_before_it_and_the_values_before_and_after(tmp_path, fake):
    study = sealed(tmp_path)
    finish(study)
    changed = declare(tmp_path, "alpha = 0.01\n", ("cot > label_only", "cot > label_only on dev"))
    for blank in ("", "  "):
        with pytest.raises(ConfigError, match="--amend is blank. Say why"):
            plan_study(changed, amend=blank, say=quiet)
    plan = plan_study(changed, amend="a typo", say=quiet)
    (change,) = plan["amendments"]
    assert (change["runs"], change["looks"]) == (4, 1)
    assert change["before"] == dict(alpha=0.05, checks=["cot > label_only"])
    assert change["after"] == dict(alpha=0.01, checks=["cot > label_only on dev"])
    assert "after 4 runs and 1 look at the test: a typo (checks, alpha)" in plan_text(plan)
    early = plan | dict(amendments=[{k: v for k, v in change.items() if k not in ("runs", "looks")}])
    assert f"deviation of {change['date']}: a typo" in plan_text(early)


DAMAGES = {
    "its cells": (lambda plan: plan.pop("cells"), "plan.json has no cells, so it is no whole plan"),
    "a check": (
        lambda plan: plan["facts"]["declaration"].update(checks=["cot < label_only"]),
        r"the declaration in it \(facts\) is not what was sealed",
    ),
    "its date": (lambda plan: plan.update(sealed="2020-01-01"), "is not what was written when it was sealed"),
    "a warning": (lambda plan: plan["warnings"].clear(), "is not what was written when it was sealed"),
    "its power": (lambda plan: plan["power"].update(power=1.0), "is not what was written when it was sealed"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_plan_that_was_changed_by_hand_is_refused(tmp_path, fake, what):
    study = sealed(tmp_path)
    change, why = DAMAGES[what]
    path = study.folder / "plan.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    for use in (plan_study, read_results, finish):
        with pytest.raises(RecordError, match=why):
            use(study)


def test_a_plan_of_an_early_version_has_no_hash_of_the_whole_and_stays_readable(tmp_path, fake):
    study = sealed(tmp_path)
    path = study.folder / "plan.json"
    plan = json.loads(path.read_text())
    for key in ("sha256", "claims"):
        del plan[key]
    del plan["power"]["shares"]
    path.write_text(json.dumps(plan))
    assert plan_study(study) == plan and "accuracy 0.70 of the baseline" in plan_text(plan)
    assert finish(study)[0] == 0


def test_the_sealed_plans_of_this_project_stay_readable():
    for path in sorted((project_root() / "studies").glob("*/plan.json")):
        stand_in = types.SimpleNamespace(folder=path.parent)
        assert read_plan(stand_in)["hash"] and "sealed 20" in plan_text(read_plan(stand_in))


def test_a_file_in_the_place_of_the_folder_of_a_study_is_refused_before_anything_is_measured(tmp_path, fake):
    study = declare(tmp_path)
    study.folder.write_text("mine")
    with pytest.raises(ConfigError, match="little is a file, and the study keeps its plan and results there"):
        plan_study(study, say=quiet)
    assert study.folder.read_text() == "mine"


def test_data_that_changed_are_no_amendment_and_are_named(tmp_path, fake):
    study = sealed(tmp_path)
    path = tmp_path / "test.jsonl"
    path.write_text(path.read_text().replace("Red is no", "Red is not"))
    with pytest.raises(
        ConfigError, match="nothing to amend. Its data have changed, or are gone: .*test.jsonl. Restore"
    ):
        plan_study(study, amend="new rows")
    path.unlink()
    with pytest.raises(ConfigError, match="are gone: .*test.jsonl"):
        plan_study(study, amend="new rows")


def test_a_plan_says_how_often_a_true_claim_would_be_held_and_what_that_rests_on(planned):
    sizes = (("train", 8), ("dev", 6), ("test", 60))
    checks = '["cot > label_only", "abs(cot - label_only) < 0.1", "cot > 0.9 on dev"]'
    more = "smallest_effect = 0.45\nguess = dict(accuracy=0.4, seed_sd=0.001)\n"
    more += "more_seeds = dict(cot=[3, 4], label_only=[3])\n"
    _, plan = planned(more, ('["cot > label_only"]', checks), sizes=sizes)
    better, equal, dev = plan["claims"]
    assert better["seeds"] == equal["seeds"] == [4, 3] and better["level"] == pytest.approx(0.05 / 3)
    assert (
        better["truth"] == pytest.approx(0.45) and equal["truth"] == 0 and dev["truth"] == pytest.approx(0.95)
    )
    assert better["chance"] > 0.5 > equal["chance"] and dev["chance"] == 0.0, "dev has three clusters"
    text = plan_text(plan)
    assert "accuracy 0.40 of the baseline; shares of the hidden variance: run 0.35, arm 0.20" in text
    assert re.search(r"abs\(cot - label_only\) < 0.1 +test +4, 3 +0.0 points +0.\d\d", text)
    (said,) = (w for w in plan["warnings"] if "claims would often stay open" in w)
    assert (
        f"`abs(cot - label_only) < 0.1` {equal['chance']:.2f}" in said and "`cot > 0.9 on dev` 0.00" in said
    )


def test_right_thoughts_are_counted_only_where_a_rule_can_check_them(planned, monkeypatch):
    for more, replace, why in (
        ('metric = "valid"\n', None, "line 13: the primary contrast counts right thoughts on set test"),
        (
            "",
            ("cot > label_only", "cot > label_only by valid on dev"),
            "line 3: cot > .* thoughts on set dev",
        ),
    ):
        with pytest.raises(ConfigError, match=why):
            planned(more, replace)
    one = nli_ft.study_plan.cell_work

    def with_meanings(study, say):
        return {cell: w | dict(meanings=dict(dev=True, test=True)) for cell, w in one(study, say).items()}

    monkeypatch.setattr("nli_ft.study_plan.cell_work", with_meanings)
    _, plan = planned('metric = "valid"\n')
    alone = [w for w in plan["warnings"] if "writes no thought" in w]
    assert alone == [
        "label_only writes no thought, so it always scores 0 in cot > label_only",
        "label_only writes no thought, so it always scores 0 in the primary contrast",
    ]


def test_a_check_that_cannot_be_read_is_refused_before_anything_is_sealed(tmp_path, few_simulations):
    study = declare(tmp_path, replace=("cot > label_only", "cot > lable_only"))
    with pytest.raises(ConfigError, match="there is no arm lable_only. Did you mean label_only?"):
        plan_study(study, say=quiet)
    assert read_plan(study) is None


def test_arms_that_would_answer_other_rows_are_refused(tmp_path, few_simulations):
    study = declare(tmp_path, replace=("cot=dict()", "cot=dict(max_eval_samples=4)"))
    with pytest.raises(
        ConfigError, match="set dev of cot does not hold the rows and labels that label_only answers"
    ):
        plan_study(study, say=quiet)
    assert read_plan(study) is None


def test_seeds_of_earlier_records_say_how_much_seeds_differ(tmp_path, monkeypatch):
    study, runs = declare(tmp_path), FakeRuns(dict(cot=[1, 3, 5, 5], label_only=[2]))
    assert nli_ft.study_plan.recorded_sd(study) == (None, 0)
    for arm, seed in (("label_only", 1), ("cot", 1), ("cot", 2), ("cot", 3)):
        runs(study.config(PlannedRun(arm, "", seed)))
    sd, n = nli_ft.study_plan.recorded_sd(study)
    assert n == 3 and sd == pytest.approx(2 / 6)


def trial_of(monkeypatch, script):
    "A shell script in the place of the trial's training. Returns the list of its processes."
    started, start = [], subprocess.Popen

    def popen(argv, **how):
        started.append(start(["sh", "-c", script], **how))
        return started[-1]

    monkeypatch.setattr("nli_ft.study_plan.subprocess.Popen", popen)
    return started


def test_a_trial_that_fails_is_told_with_its_last_line(tmp_path, monkeypatch):
    trial_of(monkeypatch, "echo loading; echo error: no such model; exit 2")
    with pytest.raises(RecordError, match="the trial run failed: error: no such model"):
        nli_ft.study_plan.measure_speed(declare(tmp_path))


def test_an_interrupted_plan_leaves_no_trial_behind(tmp_path, monkeypatch):
    def interrupt(pid, options):
        raise KeyboardInterrupt

    study, started = declare(tmp_path), trial_of(monkeypatch, "exec sleep 60")
    monkeypatch.setattr("nli_ft.study_plan.os.wait4", interrupt)
    with pytest.raises(KeyboardInterrupt):
        nli_ft.study_plan.measure_speed(study)
    monkeypatch.undo()
    assert started[0].poll() is not None


# --- run


class FakeRuns:
    "In the place of `run_notebook`: a record without training. An arm's right answers are given seed by seed."

    def __init__(self, right=None, ends=()):
        self.right, self.ends, self.cfgs = right or {}, list(ends), []

    @property
    def done(self):
        return [f"{'cot' if c.completion == 'cot' else 'label_only'} seed {c.seed}" for c in self.cfgs]

    def __call__(self, cfg, *ignored):
        self.cfgs.append(cfg)
        run = new_run_dir(cfg)
        start_run(cfg, os.path.relpath(run, project_root()))
        end = self.ends.pop(0) if self.ends else 0
        if end:
            return self.fail(cfg, run, end)
        append_metrics(run, dict(step=1, loss=1.0))
        right = self.right.get(cfg.completion, [3])
        answer_file(cfg, judged_files(cfg)[0], run, right[(cfg.seed - 1) % len(right)])
        adapter = weights_of(cfg, run) / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").touch()
        after = counted(predictions_of(run))
        facts = dict(steps=4, tokens_trained=9, loss_tokens_trained=5, train_s=1.0, adapter_sha256="ab")
        finish_run(run, after=after, adapter=os.path.relpath(adapter, project_root()), **facts)
        return run

    def fail(self, cfg, run, end):
        if end != 2:
            append_metrics(run, dict(step=1, loss=1.0))
        status = "interrupted" if end > 128 else "failed"
        finish_run(run, status, error=f"it ended in {end}")
        raise RunFailed(f"it ended in {end}", run, end)


def predictions_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def answer_file(cfg, file, folder, right):
    "Answer the first rows of a file rightly, and the others wrongly or, where there are three labels, not at all."
    labels, preds = LABEL_SETS[cfg.label_set], []
    for i, row in enumerate(evaluation_rows(file.path, cfg, "auto")):
        label = row["label"] if i < right else labels.labels[labels.labels.index(row["label"]) - 1]
        style = answer_style(cfg.completion)
        text = render_completion("Red.", label, style) if i < right or len(labels.labels) == 2 else "no idea"
        output = dict(text=text, n_tokens=7, finish="stop", seconds=0.1)
        preds.append(prediction_row(row, output, style, "cot", labels))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in preds))


@pytest.fixture
def fake(monkeypatch):
    "No process is started and no weights are loaded. Tests set `ends`: the exit codes of the next runs."
    runs = FakeRuns()
    runs.tested, runs.reported = [], []

    def work(study, say):
        size = dict(rows=6, clusters=3)
        groups = {name: [0, 0, 1, 1, 2, 2] for name in ("dev", "test")}
        one = dict(
            steps=4,
            rows=8,
            tokens=6000,
            loss_tokens=100,
            answer_tokens=5.0,
            memory_gib=None,
            warnings=[],
            one_label=0.0,
        )
        one |= dict(sets=dict(dev=size, test=size), groups=groups, meanings=dict(dev=False, test=False))
        return {cell: nli_ft.study_plan.with_pools(one, study.pools) for cell in study.cells()}

    def predict_set(prep, model, judged, out):
        runs.tested.append(out.parent.parent.name)
        answer_file(prep.cfg, judged.file, out.parent, 4)
        answers = out.parent / "predictions.jsonl"
        out.write_bytes(gzip.compress(answers.read_bytes()))
        answers.unlink()
        return read_predictions(out)

    def prepare(cfg):
        files = judged_files(cfg)[1:]
        sets = [types.SimpleNamespace(file=f, rows=evaluation_rows(f.path, cfg, "auto")) for f in files]
        return types.SimpleNamespace(cfg=cfg, sets=sets)

    def report_set(run, prep, judged, preds):
        runs.reported.append((run.name, judged.file.name))

    no_model = types.SimpleNamespace(load_for_inference=lambda cfg, adapter: None)
    monkeypatch.setitem(sys.modules, "nli_ft.model", no_model)
    power = dict(power=0.9, power_ci=[0.8, 1.0], shares=dict(run=0.35))
    monkeypatch.setattr("nli_ft.study_plan.simulated_power", lambda **how: power)
    monkeypatch.setattr("nli_ft.study_plan.cell_work", work)
    monkeypatch.setattr("nli_ft.study_run.run_notebook", runs)
    monkeypatch.setattr("nli_ft.study_run.predict_set", predict_set)
    monkeypatch.setattr("nli_ft.study_run.report_set", report_set)
    monkeypatch.setattr("nli_ft.study_run.prepare", prepare)
    monkeypatch.setattr("nli_ft.records._versions", dict)
    monkeypatch.setattr("nli_ft.study_run.check_recorded_base", lambda record, cfg: None)
    return runs


def sealed(folder, *args, **how):
    study = declare(folder, *args, **how)
    plan_study(study, say=quiet)
    return study


def lines_of(study, what):
    return [line for line in read_lines(study) if line["what"] == what]


def finish(study, **how):
    "Run a study. Returns (exit code, what it said)."
    said = []
    code = run_study(study, say=said.append, **how)
    return code, "\n".join(said)


def test_a_study_runs_seed_by_seed_judges_the_test_once_and_does_nothing_twice(tmp_path, fake):
    study = sealed(tmp_path)
    code, said = finish(study)
    assert code == 0 and "study little is done" in said
    assert "[1/4] label_only seed 1: about 1 min, 4 min left for all" in said
    assert fake.done == ["label_only seed 1", "cot seed 1", "label_only seed 2", "cot seed 2"]
    assert len(fake.tested) == 4 and all(not cfg.judge_test for cfg in fake.cfgs)
    whats = [line["what"] for line in read_lines(study)]
    assert whats == ["judged", "run", "sealed"] * 4 + ["look"] + ["judged"] * 4
    assert {line["look"] for line in lines_of(study, "judged") if line["set"] == "test"} == {1}
    results = (study.folder / "results.jsonl").read_bytes()
    code, said = finish(study)
    assert code == 0 and len(fake.cfgs) == 4 and len(fake.tested) == 4
    assert (study.folder / "results.jsonl").read_bytes() == results
    frame = results_frame(study)
    assert len(frame) == 8 and set(frame["set"]) == {"dev", "test"}
    assert list(frame[frame["set"] == "test"]["accuracy"]) == [4 / 6] * 4


def test_results_hold_no_premise_and_no_hypothesis(tmp_path, fake):
    study = sealed(tmp_path)
    finish(study)
    kept = "".join(f.read_text() for f in study.folder.iterdir() if f.is_file())
    assert "dev3" in kept and "is not blue" not in kept and "is red" not in kept


def test_a_record_that_was_done_before_its_line_was_written_is_adopted(tmp_path, fake):
    study = sealed(tmp_path)
    record = fake(study.config(study.first_runs()[0]))  # the crash came here
    code, said = finish(study)
    assert code == 0 and "1 records that were done already are kept as results" in said
    assert fake.done.count("label_only seed 1") == 1
    assert lines_of(study, "run")[0]["run"] == record.name


def test_a_torn_last_line_of_the_results_is_cut_and_its_run_is_adopted(tmp_path, fake):
    study = sealed(tmp_path)
    finish(study)
    path = study.folder / "results.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:7]) + whole[7][:40])
    assert whole[7].startswith('{"what": "run"')
    code, said = finish(study)
    assert code == 0 and len(fake.cfgs) == 4 and len(lines_of(study, "run")) == 4
    assert "2 records" in said and len(fake.tested) == 6, "the last two runs had not answered the test yet"


def test_a_record_that_was_killed_while_it_opened_counts_for_nothing(tmp_path, fake):
    study = sealed(tmp_path)
    cfg = study.config(study.first_runs()[0])
    empty, begun = new_run_dir(cfg), fake(cfg)
    (empty / "config.json").touch()
    (begun / "environment.json").unlink()
    code, _ = finish(study)
    assert code == 0 and len(lines_of(study, "run")) == 4


def test_a_failed_run_is_tried_once_more_at_the_end_and_then_named(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 1, 0, 0, 1]
    code, said = finish(study)
    assert code == 1 and fake.done[1] == fake.done[4] == "cot seed 1" and len(fake.done) == 5
    assert "cot seed 1 is tried once more after the others" in said
    assert "failed: cot seed 1: it ended in 1" in said and not lines_of(study, "look")
    failed = lines_of(study, "failed")
    assert [(f["arm"], f["seed"], f["why"]) for f in failed] == [("cot", 1, "it ended in 1")] * 2
    assert (tmp_path / "little/runs/minimal_test" / failed[0]["run"]).is_dir() and not lines_of(study, "look")
    code, said = finish(study)
    assert code == 0 and len(fake.done) == 6 and len(fake.tested) == 4


def test_an_arm_that_fails_always_is_told_with_its_last_reason(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 1, 0, 1, 1, 1]
    code, said = finish(study)
    assert code == 1 and fake.done[3:] == ["cot seed 2", "cot seed 1", "cot seed 2"]
    assert "failed: cot seed 2: it ended in 1" in said and "not tried" not in said


def test_of_what_a_run_prints_a_study_shows_progress_and_warnings(tmp_path, fake, capsys):
    study = sealed(tmp_path)

    def run(cfg, make=fake.__call__):
        print(
            "  lora_dropout   0.0\nwarning    few rows\n           to judge\nstep  1/4   loss 1.0\naccuracy 0.5"
        )
        return make(cfg)

    nli_ft.study_run.run_notebook = run
    assert run_study(study, say=print) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("[1/4] label_only seed 1: about 1 min, 4 min left for all")
    assert lines[start + 1 : start + 4] == [
        "warning    few rows",
        "           to judge",
        "step  1/4   loss 1.0",
    ]
    assert lines.count("step  1/4   loss 1.0") == 4 and not {"accuracy 0.5", "  lora_dropout   0.0"} & set(
        lines
    )


def test_a_refused_run_is_not_tried_again(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [2]
    code, said = finish(study)
    assert code == 1 and len(fake.done) == 4 and "tried once more" not in said and len(fake.tested) == 3
    assert not lines_of(study, "look") and read_results(study).sets == ["dev"]


def test_a_signal_ends_the_study_with_its_exit_code_and_names_no_failure(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 143]
    code, said = finish(study)
    assert code == 143 and len(fake.done) == 2 and not lines_of(study, "failed")


def leave_checkpoint(cfg, record):
    "A whole checkpoint below the weights of a record."
    folder = weights_of(cfg, record) / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "resume.json").write_text(
        json.dumps(dict(step=2, saved=1.0, facts=dict(config=dict(seed=cfg.seed))))
    )
    seal(folder)
    return folder


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [130]
    assert finish(study)[0] == 130
    (record,) = (tmp_path / "little/runs/minimal_test").iterdir()
    folder = leave_checkpoint(fake.cfgs[0], record)
    code, said = finish(study)
    assert code == 0 and f"going on from {os.path.relpath(folder)}" in said
    assert fake.cfgs[1].path("resume_from_checkpoint") == folder
    assert all(cfg.resume_from_checkpoint is None for cfg in fake.cfgs[2:])
    (line,) = (line for line in lines_of(study, "run") if line["arm"] == "label_only" and line["seed"] == 1)
    assert line["hash"] == config_hash(study.config(study.first_runs()[0]))


def test_a_run_that_another_process_is_doing_is_not_done_here(tmp_path, fake):
    study = sealed(tmp_path)
    record = start_run(study.config(study.first_runs()[0]))
    with pytest.raises(RecordError, match=rf"{record.name} is still going \(process {os.getpid()}\)"):
        finish(study)
    path = record / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(boot="elsewhere", machine="elsewhere")))
    code, said = finish(study)
    assert code == 0 and f"{record.name} says running, on another machine" in said


def test_two_processes_do_not_run_one_study_at_once(tmp_path, fake):
    study = sealed(tmp_path)
    with nli_ft.study_run._only_one(study):
        with pytest.raises(RecordError, match="study little is being run already"):
            finish(study)
    assert not fake.cfgs and finish(study)[0] == 0


def test_the_budget_stops_before_a_run_that_would_not_fit(tmp_path, fake):
    study = sealed(tmp_path)
    code, said = finish(study, budget="30s")
    assert code == 0 and not fake.cfgs and "0 of 4 runs are done" in said
    assert "stopped: label_only seed 1 takes about 1 min" in said and "goes on" in said
    code, said = finish(study, budget="1h")
    assert code == 0 and len(fake.cfgs) == 4 and len(fake.tested) == 4
    for wrong in ("soon", "0min"):
        with pytest.raises(ConfigError, match="expected a time above 0 such as 170min"):
            finish(study, budget=wrong)


def without_lines(study, *whats, run=None):
    "Take lines out of the results: those of the given kinds, of one run or of all."
    lines = read_lines(study)
    kept = [line for line in lines if line["what"] not in whats or (run and line["run"] != run)]
    path = study.folder / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def flipped(answers):
    return answers.translate(str.maketrans("01", "10"))


# what is done to one line of the results (None: it is taken out), and what is said of it
LOSSES = {
    "dev is gone": ("judged", "dev", None, "has a line `run` .*, and none `judged` of dev"),
    "no answers": ("judged", "dev", dict(answers=...), r"results.jsonl:\d+: a line `judged` without answers"),
    "too short": ("judged", "dev", dict(answers="01"), "answers: 2 characters, expected one .* of 6 items"),
    "three": ("judged", "test", dict(answers="012222"), "answers: the character '2', expected only 01."),
    "flipped": ("judged", "test", dict(answers=flipped), "keeps of it: the answers have changed"),
    "hash": ("judged", "test", dict(predictions_sha256="ab"), "keeps of it: the file has changed"),
    "look": ("look", None, None, r"test in look number 1, and there is no line `look` with this number"),
    "number": ("look", None, dict(number=3), "the looks at the test have the numbers 3"),
    "kind": ("look", None, dict(what="glance"), r"results.jsonl:\d+: what = 'glance': expected run, judged"),
}


def damaged(line, change):
    "A line of the results with other values. `...` takes a key out, and a function is applied to the value."
    changed = {key: value(line[key]) if callable(value) else value for key, value in change.items()}
    return {key: value for key, value in (line | changed).items() if value is not ...}


def test_results_that_were_changed_or_lost_are_refused_by_run_and_report(tmp_path, fake):
    study = sealed(tmp_path)
    finish(study)
    path, lines = study.folder / "results.jsonl", read_lines(study)
    for what, name, change, why in LOSSES.values():
        i = next(i for i, x in enumerate(lines) if x["what"] == what and x.get("set") == name)
        changed = [] if change is None else [damaged(lines[i], change)]
        write_jsonl(path, lines[:i] + changed + lines[i + 1 :], overwrite=True)
        for read in (finish, read_results):
            with pytest.raises(RecordError, match=why):
                read(study)
    write_jsonl(path, [*lines, damaged(lines[0], dict(answers=flipped))], overwrite=True)
    with pytest.raises(RecordError, match="answers dev twice, and in two ways"):
        read_results(study)
    write_jsonl(path, lines, overwrite=True)
    items = study.folder / "items.json"
    kept = items.read_text()
    items.write_text(kept.replace('"binary"', '"five"'))
    with pytest.raises(RecordError, match="items.json: set dev: expected the name of a label set"):
        read_results(study)
    items.unlink()
    for read in (finish, read_results):
        with pytest.raises(RecordError, match=r"results.jsonl:1: items.json has no set dev"):
            read(study)
    items.write_text(kept)
    assert finish(study)[0] == 0 and len(fake.cfgs) == 4 and read_results(study).sets == ["dev", "test"]


def test_a_grid_whose_dev_answers_are_lost_is_not_searched_further(tmp_path, fake):
    study = sealed(tmp_path, GRID)
    fake.ends = [0, 0, 143]
    finish(study)
    without_lines(study, "judged", run=lines_of(study, "run")[0]["run"])
    for read in (finish, read_results):
        with pytest.raises(RecordError, match="label_only learning_rate=0.001 seed 1 has a line `run`"):
            read(study)


def test_results_that_begin_again_count_the_look_that_the_records_show(tmp_path, fake):
    study = sealed(tmp_path)
    finish(study)
    (study.folder / "results.jsonl").unlink()
    code, said = finish(study)
    assert code == 0 and len(fake.cfgs) == 4 and "4 records that were done already" in said
    assert "warning: 4 records hold answers to the test already, so this is the second look at it" in said
    (look,) = lines_of(study, "look")
    assert look["number"] == 2 and look["unlisted"] == 4
    (told,) = deviations(read_results(study))
    assert told["reason"] == "4 records held answers to the test before the first look that is listed"
    assert finish(study)[0] == 0 and len(lines_of(study, "look")) == 1


def test_the_time_of_a_run_includes_its_test(tmp_path, fake):
    study = sealed(tmp_path)
    plan = read_plan(study)
    for cell in plan["cells"]:
        cell["minutes"] += 500
    keep_plan(study, plan)
    code, said = finish(study, budget="1h")
    assert code == 0 and not fake.cfgs and "label_only seed 1 takes about 4.2 h" in said
    assert finish(study)[0] == 0
    for what in ("sealed", "look"):
        without_lines(study, what)
    tested = [line["run"] for line in lines_of(study, "judged") if line["set"] == "test"]
    path = study.folder / "results.jsonl"
    kept = [line for line in read_lines(study) if line.get("set") != "test"]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    code, said = finish(study, budget="1h")
    assert code == 0 and len(fake.tested) == 4 and "stopped: 4 runs have not answered the test" in said
    assert finish(study)[0] == 0 and fake.tested == tested * 2 and len(lines_of(study, "look")) == 1


def test_the_time_that_is_left_counts_the_runs_behind_the_grid_too(tmp_path, fake):
    study = sealed(tmp_path, GRID)
    _, said = finish(study)
    assert "[1/6] label_only learning_rate=0.001 seed 1: about 1 min, 6 min left for all" in said
    assert re.search(r"\[6/6\] cot learning_rate=0.001 seed 2", said)


def test_once_a_run_has_answered_its_record_and_weights_may_go(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 0, 0, 143]
    finish(study)
    first, second, _ = lines_of(study, "run")
    assert len(lines_of(study, "sealed")) == 3 and not fake.reported
    shutil.rmtree(project_root() / first["record"])
    shutil.rmtree(weights_of(fake.cfgs[0], first["run"]))
    assert finish(study)[0] == 0 and fake.done[4:] == ["cot seed 2"]
    assert read_results(study).sets == ["dev", "test"]
    assert first["run"] not in dict(fake.reported) and dict(fake.reported)[second["run"]] == "test"
    texts = project_root() / second["record"] / "evaluations/test/predictions.jsonl"
    line = next(x for x in lines_of(study, "judged") if x["run"] == second["run"] and x["set"] == "test")
    assert data_hash(texts) == line["predictions_sha256"]


def test_nothing_scores_or_shows_a_test_while_a_run_is_missing(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 0, 0, 143]
    finish(study)
    results = read_results(study)
    assert results.sets == ["dev"] and set(results_frame(study)["set"]) == {"dev"}
    assert not any(line["what"] == "judged" and line["set"] == "test" for line in read_lines(study))
    kept = (study.folder / "results.jsonl").read_text()
    assert kept.count('"answers"') == 3, "only those to the development rows can be read"
    records = [p for p in (tmp_path / "little/runs").rglob("*") if p.is_file()]
    assert not any("evaluations" in p.parts for p in records)
    assert len([p for p in records if p.name == "test.jsonl.gz"]) == 3


def test_a_crash_in_the_middle_of_a_test_leaves_no_answer_that_can_be_read_and_loses_none(
    tmp_path, fake, monkeypatch
):
    asked, crash = [], True

    def predict_set(prep, model, judged, out):
        done = resume_predictions(out, judged.rows)

        def answer(rows, prompts):
            if crash and asked:
                raise KeyboardInterrupt
            asked.extend(r["id"] for r in rows)
            output = dict(text=render_completion("Red.", 1, "cot"), n_tokens=7, finish="stop")
            return [prediction_row(r, output, "cot", "cot") for r in rows]

        return _answer_in_batches(answer, judged.rows, [[0]] * 6, done, 4, False, out)

    monkeypatch.setattr("nli_ft.study_run.predict_set", predict_set)
    study = sealed(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        finish(study)
    left = list((tmp_path / "little/runs").glob("*/*/sealed/*"))
    assert [p.name for p in left] == ["test.jsonl.gz"] and len(read_predictions(left[0])) == 4 == len(asked)
    raw = left[0].read_bytes()
    assert not any(word in raw for word in (b"predicted_label", b"outcome", b"Red", b"box"))
    crash = False
    assert finish(study)[0] == 0 and asked.count("test0") == 4, "no row was asked again"
    texts = list((tmp_path / "little/runs").glob("*/*/evaluations/test/predictions.jsonl"))
    line = next(x for x in lines_of(study, "judged") if x["run"] == texts[0].parts[-4] and x["set"] == "test")
    assert len(texts) == 4 and data_hash(texts[0]) == line["predictions_sha256"]
    assert not list((tmp_path / "little/runs").glob("*/*/sealed/*"))


def test_sealed_answers_that_were_changed_are_named_and_can_be_given_again(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 0, 0, 143]
    finish(study)
    line = lines_of(study, "sealed")[1]
    path = study.folder / "results.jsonl"
    path.write_text(path.read_text().replace(line["text"], line["text"][:-9]))
    with pytest.raises(RecordError, match=f"the sealed answers of {line['run']} to test are damaged"):
        finish(study)
    assert not lines_of(study, "look")
    without_lines(study, "sealed", run=line["run"])
    assert finish(study)[0] == 0 and fake.tested.count(line["run"]) == 2


def test_a_run_whose_weights_are_gone_before_it_answered_is_made_again(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 0, 0, 143]
    finish(study)
    first = lines_of(study, "run")[0]
    without_lines(study, "sealed", run=first["run"])
    leave_checkpoint(fake.cfgs[0], Path(first["run"]))
    (weights_of(fake.cfgs[0], first["run"]) / "adapter/adapter_model.safetensors").unlink()
    code, said = finish(study)
    assert code == 0 and fake.done[4:] == ["cot seed 2", "label_only seed 1"]
    assert fake.cfgs[5].resume_from_checkpoint is None, "a run that was done starts afresh"
    assert len(fake.tested) == 5 and fake.tested.count(first["run"]) == 1
    results = read_results(study)
    assert first["run"] not in [line["run"] for _, line in results.runs] and results.sets == ["dev", "test"]
    (again,) = deviations(results)
    assert again["reason"].startswith("label_only seed 1 was made again") and first["run"] in again["reason"]


def test_a_run_that_was_made_again_and_has_no_line_yet_is_adopted(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 0, 0, 143]
    finish(study)
    first = lines_of(study, "run")[0]
    without_lines(study, "sealed", run=first["run"])
    (weights_of(fake.cfgs[0], first["run"]) / "adapter/adapter_model.safetensors").unlink()
    again = fake(fake.cfgs[0])
    code, _ = finish(study)
    assert code == 0 and again.name in fake.tested and len(fake.cfgs) == 6


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_data_that_changed_since_the_plan_are_refused(tmp_path, fake, name):
    study = sealed(tmp_path)
    path = tmp_path / f"{name}.jsonl"
    text = path.read_text()
    path.write_text(text.replace("Red is no", "Red is not"))
    with pytest.raises(
        RecordError, match=rf"{name}.jsonl is not the file that study little was planned with"
    ):
        finish(study)
    path.unlink()
    with pytest.raises(RecordError, match=rf"{name}.jsonl is not there"):
        finish(study)
    path.write_text(text)
    assert finish(study)[0] == 0


@pytest.mark.parametrize("name", ["train", "dev"])
def test_a_record_of_other_data_is_not_adopted(tmp_path, fake, name):
    study = sealed(tmp_path)
    path = tmp_path / f"{name}.jsonl"
    text = path.read_text()
    path.write_text(text.replace("Red is no", "Red is not"))
    record = fake(study.config(study.first_runs()[0]))
    path.write_text(text)
    code, _ = finish(study)
    assert code == 0 and record.name not in [line["run"] for line in lines_of(study, "run")]


def test_items_that_are_not_those_of_earlier_runs_are_refused(tmp_path, fake):
    study = sealed(tmp_path)
    fake.ends = [0, 143]
    finish(study)
    path = study.folder / "items.json"
    items = json.loads(path.read_text())
    items["dev"]["ids"][0] = "another"
    path.write_text(json.dumps(items))
    with pytest.raises(RecordError, match="set dev of study little has other items than in earlier runs"):
        finish(study)


def test_an_amendment_with_further_seeds_is_a_second_look_at_the_test(tmp_path, fake):
    study = sealed(tmp_path)
    finish(study)
    changed = declare(tmp_path, "more_seeds = dict(cot=[3])\n")
    with pytest.raises(ConfigError, match="more_seeds changed"):
        finish(changed)
    plan_study(changed, amend="one more", say=quiet)
    assert finish(changed)[0] == 0
    assert fake.done[4:] == ["cot seed 3"] and len(fake.tested) == 5
    looks = lines_of(changed, "look")
    assert [(look["number"], look["runs"]) for look in looks] == [(1, 4), (2, 1)]
    assert looks[1]["plan"] == changed.hash() and read_lines(changed)[-1]["look"] == 2
    finish(changed)
    assert len(lines_of(changed, "look")) == 2


def test_a_prediction_that_was_changed_after_the_results_is_not_reported(tmp_path, fake):
    study = sealed(tmp_path)
    finish(study)
    changed = declare(tmp_path, replace=("cot > label_only", "cot < label_only"))
    with pytest.raises(ConfigError, match="is not what was sealed on .*: checks changed"):
        read_results(changed)
    assert len(results_frame(study)) == 8


def test_development_rows_choose_of_the_grid_and_what_they_did_not_choose_never_sees_the_test(tmp_path, fake):
    study = sealed(tmp_path, GRID)
    rates = []

    def run(cfg, make=fake.__call__):
        fake.right = dict(label_only=[3], cot=[5 if cfg.learning_rate == 2e-3 else 2])
        rates.append(cfg.learning_rate)
        return make(cfg)

    nli_ft.study_run.run_notebook = run
    assert finish(study)[0] == 0
    progress = Progress(study, read_plan(study))
    assert {cell[0]: dict(grid)["learning_rate"] for cell, grid in progress.chosen().items()} == dict(
        label_only=1e-3, cot=2e-3
    ), "of equal accuracies the value that stands first"
    assert rates == [1e-3, 2e-3, 1e-3, 2e-3, 1e-3, 2e-3]
    dropped = {line["run"] for line in lines_of(study, "run")} - set(fake.tested)
    assert len(fake.tested) == 4 and len(dropped) == 2
    assert {line["grid"]["learning_rate"] for _, line in read_results(study).runs} == {1e-3, 2e-3}
    assert not any(line["run"] in dropped for line in read_lines(study) if line.get("set") == "test")


def test_a_grid_that_cannot_be_searched_in_one_arm_does_not_hold_up_the_others(tmp_path, fake):
    study = sealed(tmp_path, GRID, ("cot=dict()", "cot=dict(learning_rate=5e-3)"))
    fake.ends = [2]
    code, said = finish(study)
    assert code == 1 and fake.done == ["label_only seed 1"] * 2 + ["cot seed 1", "cot seed 2"]
    assert "failed: label_only learning_rate=0.001 seed 1: it ended in 2" in said
    assert len(fake.tested) == 2 and not lines_of(study, "look")


def test_a_config_that_changes_while_a_study_runs_changes_nothing_of_it(tmp_path, fake):
    base = tmp_path / "mine.py"
    base.write_text((project_root() / "nli_ft/configs/minimal_test.py").read_text())
    study = sealed(tmp_path, replace=('base = "minimal_test"', f'base = "{base}"'))

    def run(cfg, make=fake.__call__):
        base.write_text(base.read_text().replace("lora_r = 8", "lora_r = 4"))
        return make(cfg)

    nli_ft.study_run.run_notebook = run
    assert finish(study)[0] == 0 and {cfg.lora_r for cfg in fake.cfgs} == {8}
    with pytest.raises(ConfigError, match="is not what was sealed on .*: configs changed"):
        finish(Study(study.path))


def test_three_labels_and_no_answer_come_back_from_the_results(tmp_path, fake):
    fake.right = dict(cot=[4, 2], label_only=[3])
    study = sealed(tmp_path, three_way=True)
    assert finish(study)[0] == 0
    results = read_results(study)
    cell = results.cells("dev")["cot", ""]
    assert cell["seeds"] == [1, 2] and list(cell["gold"]) == [0, 1, 2, 0, 1, 2]
    assert cell["answers"].tolist() == [[0, 1, 2, 0, 3, 3], [0, 1, 3, 3, 3, 3]]
    assert cell["right"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert cell["two_way"].tolist() == cell["right"].tolist(), (
        "no answer is wrong also where two labels count"
    )
    assert cell["valid"] is None and list(cell["labels"].labels) == list(RELATIONS)


def test_cells_of_a_set_and_of_a_pool_have_a_row_a_seed_and_a_column_an_item(tmp_path, fake):
    study = sealed(tmp_path, "pools = dict(both=['dev', 'test'])\nmore_seeds = dict(cot=[3])\n")
    finish(study)
    results = read_results(study)
    assert results.sets == ["dev", "test", "both"]
    assert results.groups("both") == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    dev, test, both = (results.cells(name) for name in results.sets)
    assert {cell: found["right"].shape for cell, found in both.items()} == {
        ("label_only", ""): (2, 12),
        ("cot", ""): (3, 12),
    }
    for cell in both:
        assert both[cell]["right"][:, :6].tolist() == dev[cell]["right"].tolist()
        assert both[cell]["right"][:, 6:].tolist() == test[cell]["right"].tolist()
    assert dev["cot", ""]["right"].tolist() == [[1, 1, 1, 0, 0, 0]] * 3
    with pytest.raises(RecordError, match="a pool mixes sets with two and with three labels"):
        nli_ft.study_run.pooled_items([dict(label_set="binary"), dict(label_set="three_way")])


def test_a_study_without_a_plan_does_not_start(tmp_path, fake):
    study = declare(tmp_path)
    with pytest.raises(
        ConfigError, match=r"has no plan yet. `nli_study plan .*little.py` makes and seals it"
    ):
        finish(study)
    assert not fake.cfgs


def test_jobs_are_kept_as_results_and_what_failed_is_submitted_once_more(tmp_path, fake, monkeypatch):
    study, submitted = sealed(tmp_path), []

    def submit(cfgs, executor):
        submitted.append([f"{cfg.completion} {cfg.seed}" for cfg in cfgs])
        found = []
        for cfg in cfgs:
            try:
                found.append(fake(cfg))
            except RunFailed as e:
                found.append(e.run_dir)
        return found, 0

    monkeypatch.setattr("nli_ft.study_run._executor", lambda args, folder: None)
    monkeypatch.setattr("nli_ft.study_run._submit_all", submit)
    fake.ends = [0, 1, 2, 0, 1]
    code, said = finish(study, engine="submitit", engine_args="timeout_min=5")
    assert submitted == [["label_only 1", "cot 1", "label_only 2", "cot 2"], ["cot 1"]] and code == 1
    assert [(f["arm"], f["seed"], f["why"]) for f in lines_of(study, "failed")] == [
        ("cot", 1, "it ended in 1"),
        ("label_only", 2, "it ended in 2"),
        ("cot", 1, "it ended in 1"),
    ]
    assert "failed: label_only seed 2: it ended in 2" in said and not fake.tested
    code, said = finish(study, engine="submitit", engine_args="timeout_min=5")
    assert code == 0 and len(fake.tested) == 4 and "submitting 2 runs. 2 of 4 are done" in said


def test_options_of_another_engine_are_refused(tmp_path, fake):
    study = sealed(tmp_path)
    with pytest.raises(ConfigError, match="--engine_args are for --engine submitit"):
        finish(study, engine_args="timeout_min=5")
    with pytest.raises(ConfigError, match="--budget is for runs on this machine"):
        finish(study, budget="1h", engine="submitit", engine_args="timeout_min=5")
    with pytest.raises(ConfigError, match="timeout_min is missing"):
        finish(study, engine="submitit")


# --- real runs


def nli_study(*args):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
    return subprocess.run(
        [sys.executable, "-m", "nli_ft.study_commands", *map(str, args)],
        cwd=project_root(),
        capture_output=True,
        text=True,
        timeout=1200,
        env=env,
    )


SHORT = ("eval_before=False", "eval_before=False, max_steps=2, max_new_tokens=8")


def assert_as_planned(study, seeds):
    plan, lines = read_plan(study), lines_of(study, "run")
    cells = {c["arm"]: c for c in plan["cells"]}
    assert [line["seed"] for line in lines] == seeds
    for line in lines:
        cell = cells[line["arm"]]
        said = line["steps"], line["rows_trained"], line["tokens_trained"], line["loss_tokens_trained"]
        assert said == (cell["steps"], cell["rows"], cell["tokens"], cell["loss_tokens"])
        assert read_run(project_root() / line["record"]).status == "done"
        assert shlex.split(line["command"])[0] == "nli_run"


@pytest.mark.slow
def test_two_arms_train_and_are_what_was_planned(tmp_path):
    file = declare(tmp_path, "", SHORT).path
    file.write_text(file.read_text().replace("[1, 2]", "[1]"))
    for args in (["plan", file], ["run", file], ["report", file]):
        r = nli_study(*args)
        assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    assert_as_planned(Study(file), [1, 1])


@pytest.mark.every
def test_two_arms_train_as_jobs_and_with_another_seed_here_and_are_what_was_planned(tmp_path):
    pytest.importorskip("submitit")
    file = declare(tmp_path, "", SHORT).path
    two_seeds = file.read_text()
    file.write_text(two_seeds.replace("[1, 2]", "[1]"))
    jobs = ["--engine", "submitit", "--engine_args", "cluster=local timeout_min=9"]
    for args in (["plan", file], ["run", file, *jobs]):
        r = nli_study(*args)
        assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    file.write_text(two_seeds)
    r = nli_study("run", file)
    assert r.returncode == 2 and "seeds changed" in r.stderr
    for args in (["plan", file, "--amend", "a second seed"], ["run", file], ["run", file], ["report", file]):
        r = nli_study(*args)
        assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    study = Study(file)
    assert_as_planned(study, [1, 1, 2, 2])
    assert read_results(study).sets == ["dev", "test"]
    assert [(look["number"], look["runs"]) for look in lines_of(study, "look")] == [(1, 2), (2, 2)]
    assert (study.folder / "report.ipynb").is_file()


def test_a_trial_ends_after_its_own_steps_whatever_else_would_end_the_run(tmp_path):
    from nli_ft.study_plan import trial_config

    cfg = load_config("label_only_matched", dict(early_stopping_patience=2, eval_steps=50, save_steps=50))
    few = trial_config(cfg, tmp_path)
    assert (
        few.max_steps == TRIAL_STEPS and few.max_loss_tokens is None and few.early_stopping_patience is None
    )


def test_a_speed_counts_only_where_it_was_measured():
    from nli_ft.records import _device
    from nli_ft.study_plan import _known_speed

    here, measured = _device(look=False), dict(tokens_per_s=500.0, device="x86_64 CPU")
    assert _known_speed(None) is None
    assert _known_speed(dict(machine=here, speed=measured)) == measured
    assert _known_speed(dict(machine=here | dict(cpus=here["cpus"] + 1), speed=measured)) is None
    assert _known_speed(dict(machine=here, speed=dict(tokens_per_s=9.0, device=None))) is None


def test_a_dict_in_a_study_file_spells_its_names(tmp_path):
    path = tmp_path / "spread.py"
    path.write_text("arms = {**dict(a=dict(x=1)), 'b': dict()}\n")
    with pytest.raises(ConfigError, match="arms: expected a number"):
        read_study_file(path)


def test_the_example_of_the_documents_is_a_study(tmp_path):
    text = (project_root() / "studies/README.md").read_text()
    block = text.split("## How to declare one")[1].split("```")[1]
    path = tmp_path / "example.py"
    path.write_text(block)
    assert len(parse_checks(Study(path))) == 2
