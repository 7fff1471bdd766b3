"A model as its own teacher, and pairs of answers: what is kept, what goes on, and what is refused."

import json, random, shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from conftest import ROOT
from nli_ft.commands import data_cli, prepare_rows
from nli_ft.config_loader import load_config
from nli_ft.files import write_jsonl
from nli_ft.labels import LABEL_SETS
from nli_ft.launch import RunFailed, run_cli
from nli_ft.preflight import training_rows
from nli_ft.process import ConfigError, RecordError, DataError
from nli_ft.records import environment, finish_run, read_run, recipe_hashes, start_run
from nli_ft.rows import prompt_messages, read_rows, render_completion, spread
from nli_ft.self_taught import LocalTeacher, Sampling, counts_path, local_teacher, samples_path, teach
from nli_ft.sft_rows import suspect_path
from nli_ft.star_rounds import (
    Series,
    asked_in,
    first_parent,
    round_lines,
    rounds_by_options,
    run_rounds,
    sample_round,
)
from nli_ft.teacher import think_cli

FOLLOWS = "A robin is a bird, and it sang. So the hypothesis follows."
OPEN = "A bird need not be a robin. So it cannot be inferred."
YES, NO = render_completion(FOLLOWS, 1), render_completion(OPEN, 0)


def pair(i, label=1, **more):
    return dict(
        id=i, premise=f"Row {i}: a robin sang.", hypothesis="A bird sang.", label=label, contract="binary"
    ) | dict(more)


class Scripted(LocalTeacher):
    "It draws from a list by the seed of each sample, and notes what it was asked."

    labels, style, template, name = LABEL_SETS["binary"], "cot", "standard", "scripted@0123"
    asked = type("Nobody", (), dict(run=None))

    def __init__(self, answers, batch=4, stop_after=None):
        self.answers, self.stop_after, self.prompts = answers, stop_after, []
        self.cfg = load_config("default", dict(eval_batch_size=batch))

    @contextmanager
    def session(self, rows):
        def answer(prompts, seeds, temperature, shared=True):
            if self.stop_after is not None and len(self.prompts) >= self.stop_after:
                raise KeyboardInterrupt
            self.prompts += prompts
            texts = [random.Random(seed).choice(self.answers) for seed in seeds]
            return [dict(text=text, n_tokens=9, finish="stop") for text in texts]

        yield answer


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [pair(i, i % 2) for i in range(10)])
    return tmp_path / "pairs.jsonl", tmp_path / "taught.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("taught.jsonl*")}


def test_what_is_kept_is_right_and_becomes_training_rows(files):
    total = teach(Scripted([YES, NO, "hm"]), *files, Sampling(keep=1), progress=False)
    rows = read_rows(files[1])
    assert rows.kind == "sft" and total["kept"] == len(rows) > 0
    gold = {r["id"]: r["label"] for r in lines(files[0])}
    for row in rows:
        answer = json.loads(row["completion"][0]["content"])
        assert answer["predicted_label"] == row["label"] == gold[row["id"]]
        assert row["source"] == "self_taught" and row["teacher"] == "scripted@0123"
        assert row["prompt"] == prompt_messages(row["premise"], row["hypothesis"])


def test_gold_is_never_shown(files):
    teacher = Scripted([YES, NO])
    teach(teacher, *files, progress=False)
    plain = [prompt_messages(r["premise"], r["hypothesis"]) for r in lines(files[0])]
    assert all(prompt in plain for prompt in teacher.prompts) and len(teacher.prompts) == 40


def test_counts_add_up(files):
    teach(Scripted([YES, NO, "hm"]), *files, progress=False)
    counts = lines(counts_path(files[1]))
    assert [c["id"] for c in counts] == list(range(10))
    for c in counts:
        assert c["right"] + c["wrong"] + c["unparsable"] == c["samples"] == 4
        assert c["difficulty"] == c["right"] / 4


@pytest.mark.parametrize("stop_after", [0, 4, 8, 16, 36])
def test_an_interrupted_command_goes_on_to_the_same_bytes(files, tmp_path, stop_after):
    answers = [YES, NO, "hm"]
    teach(Scripted(answers), *files, progress=False)
    whole = contents(tmp_path)
    for path in tmp_path.glob("taught.jsonl*"):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        teach(Scripted(answers, stop_after=stop_after), *files, progress=False)
    with open(samples_path(files[1]), "ab") as f:
        f.write(b'{"id": 9, "torn')
    again = Scripted(answers)
    teach(again, *files, progress=False)
    assert contents(tmp_path) == whole
    assert len(again.prompts) == 40 - stop_after


def test_a_file_that_was_cut_behind_the_journal_is_mended_and_a_changed_one_refused(files, tmp_path):
    teach(Scripted([YES, NO]), *files, progress=False)
    whole = contents(tmp_path)
    files[1].write_bytes(files[1].read_bytes()[:-20])
    teach(Scripted([YES, NO]), *files, progress=False)
    assert contents(tmp_path) == whole
    files[1].write_bytes(b'{"mine": 1}\n')
    with pytest.raises(DataError, match="taught.jsonl:1 is not what"):
        teach(Scripted([YES, NO]), *files, progress=False)
    assert files[1].read_bytes() == b'{"mine": 1}\n'


def test_samples_do_not_depend_on_the_batch(files, tmp_path):
    teach(Scripted([YES, NO, "hm"], batch=1), *files, progress=False)
    one = contents(tmp_path)
    for path in tmp_path.glob("taught.jsonl*"):
        path.unlink()
    teach(Scripted([YES, NO, "hm"], batch=64), *files, progress=False)
    assert contents(tmp_path) == one


def test_other_settings_and_other_rows_are_refused(files):
    teach(Scripted([YES, NO]), *files, progress=False)
    with pytest.raises(DataError, match="temperature: 0.8 there, 0.5 now"):
        teach(Scripted([YES, NO]), *files, Sampling(temperature=0.5), progress=False)
    write_jsonl(files[0], [pair(i, i % 2) for i in reversed(range(10))], overwrite=True)
    with pytest.raises(DataError, match="changed or reordered"):
        teach(Scripted([YES, NO]), *files, progress=False)


def test_rows_that_were_added_behind_are_sampled_and_no_other(files):
    teach(Scripted([YES, NO]), *files, progress=False)
    before = files[1].read_bytes()
    write_jsonl(files[0], [pair(i, i % 2) for i in range(12)], overwrite=True)
    again = Scripted([YES, NO])
    teach(again, *files, progress=False)
    assert len(again.prompts) == 8 and files[1].read_bytes().startswith(before)


def test_a_label_that_nearly_all_samples_contradict_is_listed(files):
    teach(Scripted([YES]), *files, progress=False)
    doubted = lines(suspect_path(files[1]))
    assert [r["id"] for r in doubted] == [0, 2, 4, 6, 8]
    assert doubted[0]["suspicion"] == ["4 of 4 samples say 1, and gold is 0"]


def test_a_lucky_label_is_refused_and_readers_can_be_left_out(files, tmp_path):
    lucky = Scripted([render_completion(OPEN, 1), NO])
    teach(lucky, *files, progress=False)
    assert {r["label"] for r in read_rows(files[1])} == {0}
    teach(lucky, files[0], tmp_path / "all.jsonl", Sampling(readers=False), progress=False)
    assert {r["label"] for r in read_rows(tmp_path / "all.jsonl")} == {0, 1}


def test_rationalised_rows_have_a_source_of_their_own_and_a_plain_prompt(files):
    class Led(Scripted):
        "It says yes, and only where gold is shown to be 0 no."

        @contextmanager
        def session(self, rows):
            def answer(prompts, seeds, temperature, shared=True):
                shown = ["label is 0" in prompt[-1]["content"] for prompt in prompts]
                return [dict(text=NO if s else YES, n_tokens=9, finish="stop") for s in shown]

            yield answer

    total = teach(Led([]), *files, Sampling(samples=2, rationalise=True), progress=False)
    assert (total["kept"], total["rationalised"]) == (5, 5)
    rows = read_rows(files[1])
    assert {r["source"]: r["label"] for r in rows} == dict(self_taught=1, rationalised=0)
    assert not any("right label" in r["prompt"][-1]["content"] for r in rows)


def test_rationalisation_refuses_rows_that_judge(files, tmp_path):
    write_jsonl(tmp_path / "dev.jsonl", [pair(1, split="dev"), pair(2, 0)])
    how = Sampling(rationalise=True)
    with pytest.raises(DataError, match="1 rows are marked dev or test"):
        teach(Scripted([YES]), tmp_path / "dev.jsonl", files[1], how, progress=False)
    teach(Scripted([YES]), tmp_path / "dev.jsonl", files[1], how, allow_eval_rows=True, progress=False)


def test_without_a_right_sample_there_is_one_message(files):
    with pytest.raises(DataError, match="no sample can be kept"):
        teach(Scripted(["hm"]), *files, progress=False)
    assert not files[1].exists()


def test_the_rows_go_through_prepare_and_name_their_teacher_in_a_record(files, tmp_path):
    teach(Scripted([YES, NO]), *files, progress=False)
    counts = prepare_rows(thoughts=str(files[1]), output=tmp_path / "sft.jsonl", strategy="correct_only")
    rows = read_rows(tmp_path / "sft.jsonl")
    assert len(rows) == counts["thoughts right"] and {r["source"] for r in rows} == {"self_taught"}
    cfg = load_config("default", dict(train_data=str(files[1]), eval_data=str(files[0])))
    assert environment(cfg)["data"]["train"]["teachers"] == {"scripted@0123": len(read_rows(files[1]))}


def say(command, *words):
    "The exit code of a command, which is left by SystemExit unless it is 0."
    try:
        return command([str(w) for w in words])
    except SystemExit as e:
        return e.code


def test_bad_input_is_one_message(files, tmp_path, capsys):
    base = ("--input", files[0], "--output", files[1])
    (tmp_path / "none.csv").write_text("id,premise,hypothesis\n1,A.,B.\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    tiny = ("--model", "tiny-mistral", "--quantization", "none", "--device", "cpu", "--samples", "2")
    wrong = {
        "--samples must be at least 1, not 0": (*base, "--samples", "0", "--model", "tiny-mistral"),
        "must be above 0, not 0.0": (*base, *tiny, "--temperature", "0"),
        "say who is asked": (*base, "--samples", "2"),
        "nobody is no folder": (*base, "--run", "nobody"),
        "--prices is for an endpoint": (*base, "--run", "nobody", "--prices", "x.json"),
        "--keep is for a model of this machine": (*base, "--keep", "2", "--model", "m"),
        "missing column label": ("--input", tmp_path / "none.csv", *base[2:], *tiny),
        "holds no rows": ("--input", tmp_path / "empty.jsonl", *base[2:], *tiny),
    }
    for message, words in wrong.items():
        assert say(think_cli, *words) == 2
        assert message in (said := capsys.readouterr().err) and said.count("error:") == 1, said


def test_a_random_model_is_asked_and_found_to_know_nothing(files, capsys):
    tiny = ("--model", "tiny-mistral", "--quantization", "none", "--device", "cpu", "--max_tokens", "8")
    words = ("--input", files[0], "--output", files[1], *tiny, "--samples", "2", "--limit", "3")
    assert say(think_cli, *words) == 2
    assert "no sample can be kept" in capsys.readouterr().err
    before = samples_path(files[1]).read_bytes()
    assert len(before.splitlines()) == 3
    samples_path(files[1]).write_bytes(b"".join(before.splitlines(keepends=True)[:1]))
    counts_path(files[1]).unlink()
    assert say(think_cli, *words, "--eval_batch_size", "3") == 2
    assert [r["samples"] for r in lines(samples_path(files[1]))] == [
        r["samples"] for r in map(json.loads, before.splitlines())
    ]


def test_a_run_that_answers_with_the_label_only_has_nothing_to_teach():
    asked = type("Run", (), dict(cfg=load_config("label_only"), template="standard", name="label_only/1"))
    with pytest.raises(ConfigError, match="no thoughts to teach"):
        LocalTeacher(asked)
    with pytest.raises(ConfigError, match="--quantization is for a base"):
        local_teacher("latest", quantization="none")


# pairs of answers


def reflection(i, label=1, **more):
    texts = dict(thought_process=(FOLLOWS, OPEN)[label], improved_thought_process=(OPEN, FOLLOWS)[label])
    return pair(i, label, true_label=label, **texts, **more)


@pytest.fixture
def reflected(tmp_path):
    rows = [reflection(i, i % 2, predicted_label=i % 2, thought_predicted_label=1 - i % 2) for i in range(20)]
    write_jsonl(tmp_path / "reflections.jsonl", rows)
    return tmp_path / "reflections.jsonl"


def answer(messages):
    return json.loads(messages[0]["content"])


def test_pairs_of_reflections_and_samples(reflected, files, tmp_path):
    teach(Scripted([YES, NO]), *files, progress=False)
    out = tmp_path / "pairs_of_answers.jsonl"
    prepare_rows(preferences=[str(reflected), str(samples_path(files[1]))], output=out)
    rows = read_rows(out)
    assert rows.kind == "preference" and len({r["id"] for r in rows}) == len(rows) > 20
    for row in rows:
        assert answer(row["chosen"])["predicted_label"] == row["label"]
        assert answer(row["rejected"])["predicted_label"] == row["rejected_label"] == 1 - row["label"]
        assert row["prompt"] == prompt_messages(row["premise"], row["hypothesis"])
        assert row["prompt_template"] == "standard"
    sources = {(r["chosen_source"], r["rejected_source"]) for r in rows}
    assert sources == {("reflection", "thought"), ("self_taught", "self_taught")}


def test_the_training_rows_stand_for_their_samples(files, tmp_path):
    teach(Scripted([YES, NO]), *files, progress=False)
    for name in (files[1], samples_path(files[1])):
        prepare_rows(preferences=[str(name)], output=tmp_path / "o.jsonl", overwrite=True)
        assert {r["chosen_source"] for r in read_rows(tmp_path / "o.jsonl")} == {"self_taught"}


def test_splits_share_no_premise(reflected, tmp_path):
    out = tmp_path / "train.jsonl"
    assert say(data_cli, "prepare", "--preferences", reflected, "--output", out, "--splits", "0.7,0.3") == 0
    premises = [{r["premise"] for r in read_rows(tmp_path / f"{s}.jsonl")} for s in ("train", "dev")]
    assert all(premises) and not premises[0] & premises[1]


def test_lengths_are_printed_and_can_be_evened(tmp_path, capsys):
    rows = [
        reflection(i, predicted_label=1, thought_predicted_label=0)
        | dict(improved_thought_process="word " * (30 if i < 7 else 3))
        for i in range(10)
    ]
    write_jsonl(tmp_path / "r.jsonl", rows)
    words = ("prepare", "--preferences", tmp_path / "r.jsonl", "--output")
    say(data_cli, *words, tmp_path / "all.jsonl")
    assert "70.0 % of pairs whose chosen answer is longer" in capsys.readouterr().out
    say(data_cli, *words, tmp_path / "even.jsonl", "--balance_lengths")
    said = capsys.readouterr().out
    assert "50.0 % of pairs whose chosen answer is longer" in said
    assert "4 pairs dropped to even the lengths" in said
    assert len(read_rows(tmp_path / "even.jsonl")) == 6


def test_pairs_that_are_none_are_refused_or_counted(reflected, files, tmp_path, capsys):
    stubborn = [reflection(i, predicted_label=0, thought_predicted_label=0) for i in range(3)]
    write_jsonl(tmp_path / "stubborn.jsonl", stubborn)
    out = ("--output", tmp_path / "o.jsonl")
    prepare_rows(preferences=[str(reflected)], output=tmp_path / "good.jsonl")
    equal = [dict(r, rejected=r["chosen"]) for r in read_rows(tmp_path / "good.jsonl")]
    write_jsonl(tmp_path / "equal.jsonl", equal)
    with pytest.raises(DataError, match="chosen and rejected have the same label"):
        read_rows(tmp_path / "equal.jsonl")
    teach(Scripted([YES, NO]), *files, progress=False)
    damaged = json.loads(samples_path(files[1]).read_text().splitlines()[0])
    del damaged["samples"][1]["thought_process"]
    write_jsonl(tmp_path / "damaged.jsonl", [damaged])
    wrong = {
        "damaged.jsonl:1: not a row of samples": ("--preferences", tmp_path / "damaged.jsonl"),
        "3 reflections whose own label is not gold": ("--preferences", tmp_path / "stubborn.jsonl"),
        "holds pair rows": ("--preferences", files[0]),
        "--pairs_a_row must be at least 1, not 0": ("--preferences", reflected, "--pairs_a_row", 0),
        "--balance_lengths go with --preferences": ("--pairs", files[0], "--balance_lengths"),
        "--strategy does not go with --preferences": ("--preferences", reflected, "--strategy", "shuffled"),
        "name one file": ("--preferences", reflected, "--pairs", files[0]),
        "leaves no pair": ("--preferences", reflected, "--balance_lengths"),
    }
    short = dict(predicted_label=1, thought_predicted_label=0)
    rows = [reflection(i, **short) | dict(thought_process="It is open.") for i in range(4)]
    write_jsonl(reflected, rows, overwrite=True)
    for message, words in wrong.items():
        assert say(data_cli, "prepare", *words, *out) == 2
        assert message in (said := capsys.readouterr().err) and said.count("error:") == 1, said
    assert not (tmp_path / "o.jsonl").exists()


def test_supervised_training_refuses_pairs_of_answers(reflected, tmp_path):
    prepare_rows(preferences=[str(reflected)], output=tmp_path / "p.jsonl")
    cfg = load_config("default", dict(train_data=str(tmp_path / "p.jsonl")))
    with pytest.raises(DataError, match="Set method=dpo"):
        training_rows(cfg)
    with pytest.raises(DataError, match="pairs of answers"):
        prepare_rows(pairs=str(tmp_path / "p.jsonl"), output=tmp_path / "o.jsonl")


def test_check_reads_pairs_of_answers(reflected, tmp_path, capsys):
    prepare_rows(preferences=[str(reflected)], output=tmp_path / "p.jsonl")
    say(data_cli, "check", tmp_path / "p.jsonl")
    assert "20 preference rows" in capsys.readouterr().out


# rounds


@pytest.fixture
def star(project, tmp_path):
    "A series whose sampler and trainer are scripted, and what they were asked."
    write_jsonl(tmp_path / "pairs.jsonl", [pair(i, i % 2) for i in range(8)])
    cfg = load_config(
        "minimal_test",
        dict(train_data="pairs.jsonl", eval_data="pairs.jsonl", runs_dir="runs", output_dir="models"),
    )
    asked = []

    def sample(series, n, parent):
        asked.append(("sample", n, parent and parent.name))
        teach(Scripted([YES, NO]), "pairs.jsonl", series.data(n), series.how, progress=False)
        return 0

    def train(cfg):
        run = start_run(cfg)
        asked.append(("train", cfg.path("train_data").name, run.name))
        finish_run(run, adapter=f"models/{run.name}", adapter_sha256=f"sha of {run.name}")
        return run

    return Series(cfg, 3, None, Sampling(keep=1)), sample, train, asked


def parents(runs):
    return [read_run(run).summary["sampled_from"] for run in runs]


def test_each_round_is_a_record_that_names_its_parent(star):
    series, sample, train, asked = star
    runs, code = run_rounds(series, sample, train)
    assert code == 0 and len(runs) == 3
    assert [a[0] for a in asked] == ["sample", "train"] * 3
    one, two, three = parents(runs)
    assert (one["round"], one["run"], one["base"]) == (1, None, series.cfg.model_id)
    assert two["run"] == f"minimal_test/{runs[0].name}" and two["adapter_sha256"] == f"sha of {runs[0].name}"
    assert three["run"] == f"minimal_test/{runs[1].name}"
    for n, run in enumerate(runs, 1):
        record = read_run(run)
        assert record.summary["sampled_from"]["data_sha256"] == record.environment["data"]["train"]["sha256"]
        assert record.environment["data"]["train"]["teachers"]
        assert record.cfg.path("train_data") == series.data(n)
        asked = map(json.loads, open(samples_path(series.data(n)), encoding="utf-8"))
        assert (
            record.summary["generated_tokens"]
            == sum(s["n_tokens"] for row in asked for s in row["samples"])
            > 0
        )


def test_an_interrupted_series_goes_on_at_the_right_place(star):
    series, sample, train, asked = star

    def killed(cfg):
        if cfg.path("train_data").name == "round2.jsonl":
            run = start_run(cfg)
            finish_run(run, "interrupted")
            raise RunFailed("stopped", run, 130)
        return train(cfg)

    runs, code = run_rounds(series, sample, killed)
    assert code == 130 and [read_run(r).status for r in runs] == ["done", "interrupted"]
    assert parents(runs)[1]["round"] == 2
    done = len(asked)
    again, code = run_rounds(series, sample, train)
    assert code == 0 and again[0] == runs[0] and len(again) == 3
    assert [a[:2] for a in asked[done:]] == [
        ("sample", 2),
        ("train", "round2.jsonl"),
        ("sample", 3),
        ("train", "round3.jsonl"),
    ]
    done = len(asked)
    assert run_rounds(series, sample, train) == (again, 0) and len(asked) == done


def test_rounds_show_no_gold_of_rows_that_judge(star, tmp_path):
    series, *_ = star
    write_jsonl(tmp_path / "judging.jsonl", [pair(1, split="dev"), pair(2, 0)])
    cfg = series.cfg.replace(
        train_data="judging.jsonl", model_id="tiny-mistral", quantization="none", device="cpu"
    )
    with pytest.raises(DataError, match="1 rows are marked dev or test"):
        sample_round(cfg, None, tmp_path / "o.jsonl", Sampling(rationalise=True))


def test_a_dry_run_tells_the_rounds_and_which_are_done(star):
    series, sample, train, asked = star
    first, _ = run_rounds(replace(series, rounds=1), sample, train)
    one, two, three = round_lines(series)
    assert "the base smollm2-135m answers pairs.jsonl, done before: runs/minimal_test/" in one
    assert f"round 2 of 3: {first[0].name} answers" in two and "round2.jsonl" in two
    assert "the run of round 2 answers" in three and len(asked) == 2


def test_more_rounds_of_the_same_series_go_on_behind_the_last(star):
    series, sample, train, asked = star
    first, _ = run_rounds(replace(series, rounds=1), sample, train)
    more, _ = run_rounds(replace(series, rounds=2), sample, train)
    assert more[0] == first[0] and [a[0] for a in asked] == ["sample", "train"] * 2


def test_a_round_without_rows_ends_the_series_with_2(project, tmp_path, capfd):
    write_jsonl(tmp_path / "pairs.jsonl", [pair(i, i % 2) for i in range(2)])
    words = "train_data=pairs.jsonl eval_data=pairs.jsonl model_id=tiny-mistral quantization=none max_new_tokens=8"
    cfg = load_config("minimal_test", f"{words} device=cpu runs_dir=runs")
    runs, code = run_rounds(Series(cfg, 2, None, Sampling(samples=2, keep=1)))
    said = capfd.readouterr().err
    assert (runs, code) == ([], 2)
    assert "no sample can be kept" in said and "round 1 of 2 stopped" in said


def test_a_parent_of_another_base_or_wording_is_refused(star, monkeypatch):
    series, sample, train, asked = star

    def without_weights(run):
        cfg = read_run(run).cfg
        return SimpleNamespace(cfg=cfg, template=cfg.prompt_template)

    monkeypatch.setattr("nli_ft.star_rounds.RunModel", without_weights)
    wrong = {
        "has model_id=tiny-mistral, and the config minimal_test has": dict(model_id="tiny-mistral"),
        "was trained in the wording .brief., and": dict(prompt_template="brief"),
    }
    for message, changes in wrong.items():
        parent = train(series.cfg.replace(**changes))
        with pytest.raises(ConfigError, match=message):
            run_rounds(replace(series, parent=parent), sample, train)
    assert {a[0] for a in asked} == {"train"}


def test_each_seed_of_a_series_has_a_parent_of_its_own(star, tmp_path):
    series, _, train, _ = star
    of_seed = {seed: train(series.cfg.replace(seed=seed)).name for seed in (1, 2)}
    two = [series.cfg.replace(seed=seed) for seed in (2, 1)]
    assert [first_parent(cfg, "minimal_test").name for cfg in two] == [of_seed[2], of_seed[1]]
    one = str(tmp_path / "runs/minimal_test" / of_seed[1])
    assert {first_parent(cfg, one).name for cfg in two} == {of_seed[1]}
    assert {first_parent(cfg, f"minimal_test/{of_seed[1]}").name for cfg in two} == {of_seed[1]}
    with pytest.raises(RecordError, match="minimal_test has no finished run with seed 3"):
        first_parent(series.cfg.replace(seed=3), "minimal_test")
    assert first_parent(series.cfg, None) is None


def test_a_name_that_has_come_to_mean_a_round_is_the_run_with_which_the_series_began(star, monkeypatch):
    series, sample, train, _ = star
    monkeypatch.setattr(
        "nli_ft.star_rounds.check_series", lambda series: None
    )  # scripted runs have no weights
    began = train(series.cfg)
    for named in ("minimal_test", "latest"):
        assert first_parent(series.cfg, named) == began
        rounds, _ = run_rounds(replace(series, parent=began, rounds=2), sample, train)
        assert first_parent(series.cfg, named) == began
    assert first_parent(series.cfg, f"minimal_test/{rounds[0].name}") == rounds[0]


def test_a_round_of_the_base_is_no_parent_by_name(star):
    series, sample, train, _ = star
    run_rounds(replace(series, rounds=1), sample, train)
    with pytest.raises(RecordError, match="a series that began with the base"):
        first_parent(series.cfg, "minimal_test")


def test_a_finished_round_keeps_its_facts_and_other_pairs_are_refused(star, tmp_path):
    series, sample, train, asked = star
    one = replace(series, rounds=1)
    [run], _ = run_rounds(one, sample, train)
    facts = parents([run])
    write_jsonl(tmp_path / "pairs.jsonl", [pair(i, i % 2) for i in range(5)], overwrite=True)
    with pytest.raises(RecordError, match="pairs.jsonl has changed since"):
        run_rounds(one, sample, train)
    assert parents([run]) == facts
    series.folder.rename(tmp_path / "away")
    [again], code = run_rounds(one, sample, train)
    assert code == 0 and again != run and parents([again])[0]["pairs_sha256"] != facts[0]["pairs_sha256"]


def test_rounds_of_two_seeds_have_one_recipe_and_of_other_pairs_or_samples_another(star, tmp_path):
    series, sample, train, _ = star

    def recipes(series):
        runs, _ = run_rounds(series, sample, train)
        return [recipe_hashes(read_run(run))[0] for run in runs]

    one, two = [replace(series, cfg=series.cfg.replace(seed=seed), rounds=2) for seed in (1, 2)]
    assert recipes(one) == recipes(two) and len(set(recipes(one))) == 2
    more = replace(one, how=replace(one.how, samples=2))
    write_jsonl(tmp_path / "fewer.jsonl", [pair(i, i % 2) for i in range(6)])
    fewer = replace(one, cfg=one.cfg.replace(train_data="fewer.jsonl"))
    assert not set(recipes(more) + recipes(fewer)) & set(recipes(one))


def test_a_round_samples_the_rows_that_a_training_would_take(star, monkeypatch, tmp_path):
    cfg = star[0].cfg.replace(max_train_samples=8)
    write_jsonl(tmp_path / "pairs.jsonl", [pair(i, i % 2) for i in range(40)], overwrite=True)
    monkeypatch.setattr("nli_ft.star_rounds.PlainModel", lambda *a: SimpleNamespace(cfg=cfg))
    monkeypatch.setattr("nli_ft.star_rounds.LocalTeacher", lambda asked: Scripted([YES, NO]))
    monkeypatch.setattr("nli_ft.bases.load_tokenizer", lambda cfg: None)
    out = tmp_path / "sampled.jsonl"
    sample_round(cfg, None, out, Sampling(samples=8))
    ids = {row["id"] for row in read_rows(out)}
    taken = {row["id"] for row in spread(read_rows(tmp_path / "pairs.jsonl"), 8)}
    assert ids == taken != set(range(8))


def test_pairs_in_words_are_asked_in_a_three_way_series(star, tmp_path):
    words = "entailment neutral contradiction".split()
    rows = [dict(pair(i), label=words[i % 3]) for i in range(6)]
    for row in rows:
        del row["contract"]
    write_jsonl(tmp_path / "words.jsonl", rows)
    assert asked_in(star[0].cfg.replace(train_data="words.jsonl", label_set="three_way")) == "standard"


def test_every_series_is_checked_before_the_first_begins(star, monkeypatch):
    cfg, begun = star[0].cfg, []
    monkeypatch.setattr("nli_ft.star_rounds.run_rounds", lambda series: begun.append(series) or ([], 0))
    options = SimpleNamespace(
        rounds=1, parent=None, round_samples=1, round_temperature=1.0, round_rationalise=False, dry_run=False
    )
    with pytest.raises(ConfigError, match="completion=label_only"):
        rounds_by_options([cfg, cfg.replace(seed=2, completion="label_only")], options)
    assert begun == []
    rounds_by_options([cfg, cfg.replace(seed=2)], options)
    assert len(begun) == 2


def test_rounds_refuse_what_cannot_be(star, capsys):
    base = ("--config", "minimal_test", "--no_check")
    wrong = {
        "--parent goes with --rounds N": (*base, "--parent", "latest"),
        "--rounds must be at least 1, not 0": (*base, "--rounds", "0"),
        "--rounds runs here": (*base, "--rounds", "1", "--engine", "submitit"),
        "--round_samples must be at least 1, not 0": (*base, "--rounds", "1", "--round_samples", "0"),
        "--round_temperature must be above 0": (*base, "--rounds", "1", "--round_temperature", "-1"),
        "has method=dpo. Use method=sft": (*base, "--rounds", "1", "--method", "dpo"),
        "has completion=label_only. Use cot": (*base, "--rounds", "1", "--completion", "label_only"),
        "nobody is no folder": (*base, "--rounds", "1", "--parent", "nobody"),
    }
    shutil.copy(ROOT / "nbs/train.ipynb", "nbs")
    for message, words in wrong.items():
        assert say(run_cli, *words) == 2
        assert message in (said := capsys.readouterr().err), said
