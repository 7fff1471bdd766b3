"""The endpoint client against a scripted server: every fault and every way to stop. Nothing is lost, and nothing
is paid for twice."""

import asyncio, json, os, random, re, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

from swap import swap
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_endpoint import FakeEndpoint, Reply
import nli_ft.sft_rows
import nli_ft.teacher_files
import nli_ft.teacher_session
from nli_ft.teacher_replies import REFLECT, THINK
from nli_ft.teacher_session import USELESS, Endpoint, Guards
from nli_ft.teacher import augment, failed_path
from nli_ft.process import ConfigError, DataError
from nli_ft.rows import iter_rows
from nli_ft.files import write_jsonl

THOUGHT = "Step 1: A Robin is a bird. Step 2: So it follows."
DENIAL = "Step 1: A Robin is a bird. Step 2: So it cannot be inferred."


def thought(label=1):
    return json.dumps(dict(thought_process=THOUGHT, predicted_label=label))


def reflection(label, text=None):
    "A reflection that argues for the label it gives."
    return json.dumps(
        dict(
            error_analysis="It missed the negation.",
            improved_thought_process=text or (DENIAL, THOUGHT)[label],
            predicted_label=label,
        )
    )


def good(call, n):
    return Reply(thought())


def row_of(call):
    return int(re.search(r"Premise: Row (\d+) ", call.user)[1])


def rows(path):
    return [json.loads(l) for l in open(path, encoding="utf-8")]


def pair(i, label=1, **kw):
    return dict(
        id=i, premise=f"Row {i} says that a Robin sang.", hypothesis="A bird sang.", label=label, **kw
    )


def wrong_thought(i, label=0, **kw):
    return dict(
        pair(i, label),
        thought_process="It just follows.",
        predicted_label=1 - label,
        true_label=label,
        correct=False,
        **kw,
    )


@pytest.fixture
def files(tmp_path):
    "Write an input and return the paths of input and output."

    def make(n_or_rows):
        rs = [pair(i) for i in range(n_or_rows)] if isinstance(n_or_rows, int) else n_or_rows
        write_jsonl(tmp_path / "in.jsonl", rs, overwrite=True)
        return tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    return make


def go(script, files, n=1, stage=THINK, model="m", workers=1, kw={}, **ep):
    "Run a stage against a script and return (result, calls, output rows, failed rows)."
    inp, out = files(n)
    with FakeEndpoint(script) as server:
        e = Endpoint(
            base_url=server.url,
            model=model,
            **{**dict(backoff=0.02, timeout=5, api_key_env="NLI_TEST_KEY"), **ep},
        )
        # the guards of reflections have their own tests at the end
        r = augment(
            stage, inp, out, e, workers=workers, progress=False, **dict(guards=Guards(blind=False)) | kw
        )
    return r, server.calls, rows(out), rows(failed_path(out)) if failed_path(out).exists() else []


# ---------------------------------------------------------------- stages are honest


def test_stage_one_sends_the_same_bytes_whatever_gold_is(files):
    carried = dict(
        true_label=0,
        predicted_label=1,
        correct=False,
        thought_process="GOLD is 0",
        provenance=dict(saw_gold=True),
        key="a-b",
    )
    bodies = []
    for row in (
        pair(7, 0, relation="contradiction", explanation="GOLD"),
        pair(7, 1),
        dict(pair(7, 0), **carried),
    ):
        _, calls, out, _ = go(good, files, [row])
        bodies.append(calls[0].body)
        assert out[0]["true_label"] == row["label"] and out[0]["correct"] == (row["label"] == 1)
        files(1)[1].unlink()
    assert bodies[0] == bodies[1] == bodies[2]
    assert "GOLD" not in json.dumps(bodies) and "label" not in bodies[0]["messages"][1]["content"].lower()


def test_gold_is_not_among_the_fields_that_stage_one_may_show():
    assert THINK.shows == ("premise", "hypothesis") and not THINK.saw_gold and REFLECT.saw_gold


def test_a_thought_row_carries_the_pair_its_answer_and_how_it_came_about(files):
    r, calls, (row,), _ = go(
        good, files, [pair(3, 0, relation="neutral")], params=dict(temperature=0, seed=5)
    )
    assert {
        k: row[k]
        for k in ("id", "label", "relation", "thought_process", "predicted_label", "true_label", "correct")
    } == dict(
        id=3,
        label=0,
        relation="neutral",
        thought_process=THOUGHT,
        predicted_label=1,
        true_label=0,
        correct=False,
    )
    p = row["provenance"]
    assert {
        k: p[k]
        for k in (
            "stage",
            "model_requested",
            "model_served",
            "params",
            "response_format",
            "saw_gold",
            "attempts",
            "reprompts",
            "finish_reason",
            "cost",
        )
    } == dict(
        stage="think",
        model_requested="m",
        model_served="m-served",
        params=dict(temperature=0, seed=5),
        response_format="json_schema",
        saw_gold=False,
        attempts=1,
        reprompts=[],
        finish_reason="stop",
        cost=None,
    )
    assert (
        p["usage"] == dict(prompt_tokens=100, completion_tokens=50, estimated=False)
        and len(p["template_hash"]) == 12
        and p["time"].endswith("+00:00")
    )
    assert r["exit_code"] == 0 and list(iter_rows(files([pair(3, 0)])[1], "thought"))[0]["id"] == 3


def test_only_fields_that_were_set_are_sent(files):
    _, calls, *_ = go(good, files, params=dict(temperature=0.5), response_format="plain")
    assert sorted(calls[0].body) == ["messages", "model", "temperature"]
    files(1)[1].unlink()
    _, calls, *_ = go(good, files, response_format="json_schema")
    schema = calls[0].body["response_format"]["json_schema"]
    assert sorted(calls[0].body) == ["messages", "model", "response_format"] and schema["schema"][
        "required"
    ] == ["thought_process", "predicted_label"]


def test_a_reflection_sees_gold_and_the_wrong_thought_and_says_so(files):
    r, calls, out, _ = go(
        lambda c, n: Reply(reflection(0)),
        files,
        [wrong_thought(1), dict(wrong_thought(2), predicted_label=0, correct=True)],
        REFLECT,
    )
    assert (
        len(out) == len(calls) == 1
        and "Correct label: 0" in calls[0].user
        and "It just follows." in calls[0].user
    )
    assert out[0]["provenance"]["saw_gold"] is True and out[0]["provenance"]["allow_eval_rows"] is False
    assert (out[0]["predicted_label"], out[0]["thought_predicted_label"], out[0]["true_label"]) == (0, 1, 0)
    assert next(iter_rows(files(1)[1]))["improved_thought_process"] == DENIAL


def test_a_reflection_with_the_wrong_label_is_retried_and_then_counted(files):
    r, calls, out, _ = go(lambda c, n: Reply(reflection(0 if n else 1)), files, [wrong_thought(1)], REFLECT)
    assert (
        len(out) == 1
        and r["wrong_label"] == 1
        and "the correct label is 0" in out[0]["provenance"]["reprompts"][0]["why"]
    )
    assert "the correct label is 0" in calls[1].body["messages"][-1]["content"] and calls[1].body["messages"][
        -2
    ]["content"] == reflection(1)
    files(1)[1].unlink()
    r, calls, out, failed = go(lambda c, n: Reply(reflection(1)), files, [wrong_thought(1)], REFLECT)
    assert (len(out), len(calls), r["wrong_label"], r["failed"], r["exit_code"]) == (0, 3, 3, 1, 1)
    assert "the correct label is 0" in failed[0]["why"] and failed[0]["reply"] == reflection(1)


@pytest.mark.parametrize("split", ["dev", "test", "validation_matched", "test_r3"])
def test_reflections_on_evaluation_rows_are_refused_before_anything_is_sent(files, split):
    marked = [wrong_thought(1, split="train"), wrong_thought(2, split=split)]
    inp, out = files(marked)
    with FakeEndpoint(good) as server:
        with pytest.raises(DataError, match="1 rows are marked dev or test .ids 2.*--allow_eval_rows"):
            augment(REFLECT, inp, out, Endpoint(base_url=server.url, model="m"), progress=False)
    assert not server.calls and not out.exists()
    _, _, out, _ = go(
        lambda c, n: Reply(reflection(0)), files, marked, REFLECT, kw=dict(allow_eval_rows=True)
    )
    assert len(out) == 2 and all(r["provenance"]["allow_eval_rows"] is True for r in out)


# ---------------------------------------------------------------- content faults


@pytest.mark.parametrize(
    "bad, why",
    [
        (Reply('{"thought_process": "It follows", predicted_label: 1}'), "not valid JSON"),
        (Reply("I would say 1."), "no JSON object"),
        (Reply(""), "empty"),
        (Reply('{"thought_process": "It does follow.", "predicted_label": "entailment"}'), "predicted_label"),
        (Reply('{"thought_process": "It does follow.", "predicted_label": true}'), "predicted_label"),
        (Reply('{"predicted_label": 1}'), "thought_process"),
        (Reply('{"thought_process": "Step 1: A Rob', finish="length"), "cut off by the length limit"),
    ],
)
def test_a_bad_reply_is_shown_to_the_model_and_kept_in_provenance(files, bad, why):
    r, calls, out, failed = go(lambda c, n: Reply(thought()) if n else bad, files)
    assert len(out) == 1 and len(calls) == 2 and not failed and r["reprompts"] == 1 and r["exit_code"] == 0
    kept = out[0]["provenance"]["reprompts"]
    assert (
        len(kept) == 1
        and why in kept[0]["why"]
        and kept[0]["reply"] == bad.text
        and kept[0]["finish_reason"] == bad.finish
    )
    assert (
        why in calls[1].body["messages"][-1]["content"]
        and out[0]["provenance"]["usage"]["prompt_tokens"] == 200
    )


def test_rows_that_stay_bad_are_listed_with_why_and_tried_again_on_the_next_start(files):
    r, calls, out, failed = go(lambda c, n: Reply("no" if row_of(c) == 1 else thought()), files, 3)
    assert (len(out), r["failed"], r["still_bad"], r["exit_code"]) == (2, 1, 1, 1)
    assert (
        failed[0]["id"] == 1
        and failed[0]["why"] == "it holds no JSON object"
        and failed[0]["tries"] == 1
        and len(calls) == 5
    )
    r, calls, out, failed = go(lambda c, n: Reply("still no"), files, 3)
    assert (
        len(calls) == 3
        and len(failed) == 1
        and failed[0]["tries"] == 2
        and failed[0]["reply"] == "still no"
        and r["exit_code"] == 1
    )
    r, calls, out, failed = go(good, files, 3)
    assert len(calls) == 1 and sorted(x["id"] for x in out) == [0, 1, 2] and r["exit_code"] == 0
    assert (
        not failed
        and not failed_path(files(3)[1]).exists()
        and out[-1]["provenance"]["earlier_failures"] == 2
    )


def test_a_complete_object_before_the_length_limit_is_used(files):
    _, calls, out, _ = go(lambda c, n: Reply(thought() + "\n" * 50, finish="length"), files)
    assert len(calls) == 1 and out[0]["provenance"]["finish_reason"] == "length"


def test_case_newlines_and_letters_of_a_thought_survive(files):
    text = "Step 1: Müller's DOG «sings».\nStep 2: 犬 is a dog — yes."
    _, _, out, _ = go(
        lambda c, n: Reply(json.dumps(dict(thought_process=text, predicted_label=0), ensure_ascii=False)),
        files,
    )
    assert out[0]["thought_process"] == text


# ---------------------------------------------------------------- response format


def test_the_response_format_is_probed_once_and_recorded(files):
    def picky(c, n):
        if (f := c.body.get("response_format", {}).get("type")) == "json_schema":
            return Reply(status=400, body=dict(error=dict(message=f"{f} is not supported")))
        return Reply(thought(), delay=0.02)

    r, calls, out, _ = go(picky, files, 12, workers=4)
    assert Counter(c.body["response_format"]["type"] for c in calls) == dict(json_schema=1, json_object=12)
    assert (
        all(x["provenance"]["response_format"] == "json_object" for x in out)
        and "not supported" in r["formats_refused"]["json_schema"]
    )


def test_a_server_that_knows_no_response_format_is_asked_plainly(files):
    r, calls, out, _ = go(
        lambda c, n: (
            Reply(status=422, body=dict(detail="extra fields not permitted"))
            if "response_format" in c.body
            else Reply(thought())
        ),
        files,
        3,
    )
    assert (
        len(calls) == 5
        and len(out) == 3
        and out[0]["provenance"]["response_format"] == "plain"
        and "response_format" not in calls[-1].body
    )


def test_a_stumbling_server_does_not_cost_the_better_format(files):
    r, calls, out, _ = go(lambda c, n: Reply(thought()) if n else Reply(status=500, body={}), files)
    assert out[0]["provenance"]["response_format"] == "json_schema"


# ---------------------------------------------------------------- transport faults


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=500, body={}),
        Reply(status=503, body=b"<html>busy</html>"),
        Reply(status=408, body={}),
        Reply(status=409, body={}),
        Reply(status=429, body=dict(error=dict(message="slow down"))),
        Reply(drop="reset"),
        Reply(thought(), drop="cut"),
        Reply(delay=20),
        Reply(body=b'{"id": "x", "cho'),
        Reply(body=b"<html>login</html>", headers={"Content-Type": "text/html"}),
        Reply(body=dict(error=dict(message="upstream failed"))),
    ],
    ids=[
        "500",
        "503 html",
        "408",
        "409",
        "429",
        "reset",
        "cut body",
        "hang",
        "half JSON",
        "html",
        "error as 200",
    ],
)
def test_a_passing_fault_is_retried(files, fault):
    r, calls, out, failed = go(lambda c, n: Reply(thought()) if n > 1 else fault, files, timeout=1.5)
    assert len(out) == 1 and len(calls) == 3 and r["retries"] == 2 and r["exit_code"] == 0 and not failed
    assert out[0]["provenance"]["attempts"] == 3 and out[0]["provenance"]["reprompts"] == []


def test_a_server_that_drips_bytes_is_bounded_as_a_whole(files):
    r, calls, *_ = go(
        lambda c, n: Reply(thought(), drip=0 if n else 0.1), files, timeout=1.0
    )  # each byte is in time, but the whole would take a minute
    assert calls[1].at - calls[0].at < 5 and r["retries"] == 1 and r["written"] == 1


def test_retry_after_holds_every_worker(files):
    def script(c, n):
        if n == 4:
            return Reply(status=429, headers={"Retry-After": "1"}, body=dict(error=dict(message="slow down")))
        return Reply(thought(), delay=0.05)

    r, calls, out, _ = go(script, files, 24, workers=4)
    limited = calls[4].at
    early = [
        c for c in calls[5:] if c.at - limited < 1.0
    ]  # when the 429 arrives, each other worker may have sent a call or two
    assert len(out) == 24 and len(early) <= 6 and len(calls) == 25


def test_back_off_grows_and_is_jittered():
    class Outcome:
        def exception(self):
            return TimeoutError()

    class State:
        outcome = Outcome()

    async def waits():
        s, st = nli_ft.teacher_session.TeacherSession(THINK, Endpoint(backoff=1.0, max_backoff=20.0)), State()
        out = []
        for st.attempt_number in range(1, 9):
            out.append([s.pause(st) for _ in range(20)])
        return out

    w = asyncio.run(waits())
    assert all(len(set(x)) > 10 for x in w[:4]) and max(map(max, w)) <= 20 and min(w[3]) >= 8 > max(w[1])


@pytest.mark.parametrize(
    "status, message", [(401, "Incorrect API key provided: SECRET-123"), (402, "pay"), (404, "no model m")]
)
def test_what_time_will_not_mend_stops_at_once_with_the_servers_words(
    files, capsys, monkeypatch, status, message
):
    monkeypatch.setenv("NLI_TEST_KEY", "SECRET-123")
    r, calls, out, failed = go(
        lambda c, n: Reply(status=status, body=dict(error=dict(message=message)), delay=0.02),
        files,
        30,
        workers=6,
        response_format="json_object",
    )
    assert len(calls) <= 6 and not out and r["exit_code"] == 1 and r["left"] == 30 and r["retries"] == 0
    assert f"HTTP {status}: {message.replace('SECRET-123', '[key]')}" in r["reason"]
    assert (
        calls[0].headers["authorization"] == "Bearer SECRET-123"
        and "SECRET" not in capsys.readouterr().err
        and not failed
    )


def test_a_stop_also_ends_the_waits_and_reprompts_of_other_workers(files):
    def script(c, n):
        return {
            0: Reply(status=503, body={}, headers={"Retry-After": "30"}),
            1: Reply("no JSON", delay=0.6),
        }.get(n) or Reply(status=401, body={}, delay=0.3)

    t = time.monotonic()
    r, calls, *_ = go(lambda c, n: script(c, row_of(c)), files, 30, workers=3, response_format="plain")
    assert len(calls) == 3 and time.monotonic() - t < 5 and r["left"] == 30 and "HTTP 401" in r["reason"]


def test_an_exhausted_quota_stops_although_it_is_a_429(files):
    body = dict(
        error=dict(
            message="You exceeded your current quota", type="insufficient_quota", code="insufficient_quota"
        )
    )
    r, calls, out, _ = go(
        lambda c, n: (
            Reply(thought()) if n < 5 else Reply(status=429, body=body, headers={"Retry-After": "1"})
        ),
        files,
        30,
    )
    assert (
        len(calls) == 6
        and len(out) == 5
        and r["left"] == 25
        and "You exceeded your current quota" in r["reason"]
        and r["exit_code"] == 1
    )
    r, calls, out, _ = go(good, files, 30)
    assert len(calls) == 25 and sorted(x["id"] for x in out) == list(range(30)) and r["exit_code"] == 0


def test_a_server_that_asks_for_an_hour_ends_the_run(files):
    r, calls, *_ = go(lambda c, n: Reply(status=429, body={}, headers={"Retry-After": "3600"}), files, 5)
    assert len(calls) == 1 and "asks to wait 3600 s" in r["reason"] and r["exit_code"] == 1


def test_a_dead_server_stops_the_run_instead_of_failing_every_row(files):
    inp, out = files(200)
    with FakeEndpoint(good) as server:
        url = server.url  # its port is closed again
    r = augment(
        THINK,
        inp,
        out,
        Endpoint(base_url=url, model="m", backoff=0.01, max_attempts=2),
        workers=4,
        progress=False,
    )
    assert (
        r["failed"] == 1 and r["left"] == 199 and "does not answer" in r["reason"] and r["exit_code"] == 1
    )  # one row while the format is unknown
    with FakeEndpoint(good) as server:
        r = augment(THINK, inp, out, Endpoint(base_url=server.url, model="m"), workers=4, progress=False)
    assert (
        r["exit_code"] == 0
        and sorted(x["id"] for x in rows(out)) == list(range(200))
        and not failed_path(out).exists()
    )


def test_a_server_that_dies_on_the_way_stops_the_run(files):
    r, calls, out, failed = go(
        lambda c, n: Reply(thought()) if n < 20 else Reply(status=503, body={}),
        files,
        200,
        workers=4,
        max_attempts=2,
        backoff=0.01,
    )
    assert (
        len(out) == 20
        and 4 <= r["failed"] <= 7
        and r["left"] >= 173
        and "does not answer" in r["reason"]
        and "HTTP 503" in failed[0]["why"]
    )


def test_one_row_that_cannot_be_delivered_does_not_stop_the_others(files):
    r, calls, out, failed = go(
        lambda c, n: Reply(drop="reset") if row_of(c) == 5 else Reply(thought()),
        files,
        20,
        workers=4,
        max_attempts=3,
        backoff=0.01,
    )
    assert (
        len(out) == 19
        and [f["id"] for f in failed] == [5]
        and "3 attempts" in failed[0]["why"]
        and r["left"] == 0
        and r["exit_code"] == 1
    )


# ---------------------------------------------------------------- the file


def test_a_finished_file_costs_no_call(files):
    go(good, files, 5)
    r, calls, out, _ = go(good, files, 7)
    assert sorted(row_of(c) for c in calls) == [5, 6] and len(out) == 7 and r["finished_before"] == 5
    r, calls, out, _ = go(good, files, 7)
    assert not calls and r["exit_code"] == 0 and len(out) == 7


def test_a_torn_last_line_is_cut_off_and_its_row_done_again(files, capsys):
    go(good, files, 5)
    out = files(5)[1]
    data = out.read_bytes()
    for cut in (1, 7, len(data.splitlines()[-1]) - 3):
        out.write_bytes(data[:-cut])
        r, calls, got, _ = go(good, files, 5)
        assert (
            len(calls) == 1
            and sorted(x["id"] for x in got) == list(range(5))
            and "unfinished last line" in capsys.readouterr().err
        )


def test_damage_elsewhere_and_foreign_files_are_refused(files):
    go(good, files, 3)
    inp, out = files(3)
    lines = out.read_text().splitlines(True)
    out.write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    with pytest.raises(DataError, match=r"out.jsonl:2: not JSON.*Name another --output"):
        augment(THINK, inp, out, Endpoint("http://127.0.0.1:1/v1", "m"), progress=False)
    write_jsonl(out, [pair(1)], overwrite=True)
    with pytest.raises(DataError, match=r"out.jsonl:1: not a row"):
        augment(THINK, inp, out, Endpoint("http://127.0.0.1:1/v1", "m"), progress=False)
    assert rows(out) == [pair(1)]


def test_rows_of_other_settings_are_refused_with_the_difference_unless_mixing_is_allowed(files):
    go(good, files, 3, params=dict(temperature=0))
    inp, out = files(5)
    before = out.read_bytes()
    with pytest.raises(
        DataError,
        match=r"(?s)model_requested: m there, big now.*params: \{'temperature': 0\} there, \{\} now.*--allow_mixed",
    ):
        augment(THINK, inp, out, Endpoint("http://127.0.0.1:1/v1", "big"), progress=False)
    assert out.read_bytes() == before
    r, calls, got, _ = go(good, files, 5, model="big", kw=dict(allow_mixed=True))
    assert len(calls) == 2 and sorted(x["id"] for x in got) == list(range(5))
    assert Counter(x["provenance"]["model_requested"] for x in got) == dict(m=3, big=2)


def test_a_changed_prompt_counts_as_other_settings(files):
    go(good, files, 2)
    inp, out = files(2)
    from dataclasses import replace

    with pytest.raises(DataError, match="template_hash"):
        augment(
            replace(THINK, system=THINK.system + " "),
            inp,
            out,
            Endpoint("http://127.0.0.1:1/v1", "m"),
            progress=False,
        )


def test_a_changed_row_is_done_again_and_the_old_one_is_named(files, capsys):
    go(good, files, 3)
    r, calls, out, _ = go(good, files, [pair(0), pair(1), pair(2, label=0)])
    assert len(calls) == 1 and "1 rows of the output are not in this input" in capsys.readouterr().err


def test_a_second_writer_is_refused(files):
    from filelock import FileLock

    inp, out = files(2)
    with FileLock(out.with_name(".out.jsonl.lock")):
        with pytest.raises(DataError, match="another run is writing"):
            augment(THINK, inp, out, Endpoint("http://127.0.0.1:1/v1", "m"), progress=False)


def test_rows_are_forced_to_disk_in_batches(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    j = nli_ft.teacher_files.Journal(tmp_path / "x", batch=4, every=60)
    for i in range(10):
        j.append(dict(i=i))
        assert (
            len(rows(tmp_path / "x")) == i + 1
        )  # the system has it at once, whatever happens to this process
    j.close()
    assert synced == [4 * 9, 8 * 9, 10 * 9]


def test_a_full_disk_ends_the_run_and_leaves_whole_lines(files, monkeypatch):
    real, written = os.write, []

    def write(fd, data):
        if len(data) < 100 or b'"key"' not in bytes(data):
            return real(fd, data)  # not ours
        written.append(1)
        if len(written) < 5:
            return real(fd, data)
        if len(written) == 5:
            return real(fd, bytes(data)[:50])  # room for half a line
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    r, calls, out, _ = go(good, files, 20, workers=3)
    assert "No space left on device" in r["reason"] and r["exit_code"] == 1 and len(out) == 4
    monkeypatch.undo()
    assert go(good, files, 20)[0]["exit_code"] == 0 and sorted(x["id"] for x in rows(files(20)[1])) == list(
        range(20)
    )


def test_no_more_rows_are_read_than_are_being_worked_on(files, monkeypatch):
    read, n = [0], 120
    real = nli_ft.teacher_files.wanted_rows

    def counting(*a, **k):
        for row in real(*a, **k):
            read[0] += 1
            yield row

    ahead = []

    def script(c, k):
        ahead.append(read[0] - n - k)  # rows taken in the second pass, minus the calls so far
        return Reply(thought())

    swap(monkeypatch, "nli_ft.teacher_files.wanted_rows", counting)
    go(script, files, n, workers=4)
    assert len(ahead) == n and max(ahead) <= 5


def test_bad_input_is_found_before_anything_is_sent(files):
    inp, out = files(3)
    with open(inp, "a") as f:
        f.write('{"id": 9, "premise": "", "hypothesis": "x", "label": 1}\n')
    with FakeEndpoint(good) as server:
        e = Endpoint(base_url=server.url, model="m")
        with pytest.raises(DataError, match="in.jsonl:4: premise is empty"):
            augment(THINK, inp, out, e, progress=False)
        assert not server.calls
        assert augment(THINK, inp, out, e, progress=False, max_bad=0.5)["written"] == 3


def test_it_runs_under_an_event_loop_as_in_a_notebook(files):
    inp, out = files(3)

    async def cell():
        return augment(THINK, inp, out, Endpoint(base_url=server.url, model="m"), progress=False)

    with FakeEndpoint(good) as server:
        assert asyncio.run(cell())["written"] == 3


# ---------------------------------------------------------------- money

PRICES = dict(input=1000.0, output=2000.0)  # a call of 100 + 50 tokens costs .2


def test_cost_is_booked_for_every_reply_also_the_useless_ones(files):
    r, calls, out, _ = go(
        lambda c, n: Reply(thought()) if n else Reply("no"), files, 2, kw=dict(prices=PRICES)
    )
    assert (
        len(calls) == 3
        and r["cost"] == pytest.approx(0.6)
        and sorted(x["provenance"]["cost"] for x in out) == [0.2, 0.4]
    )


def test_tokens_are_estimated_where_the_server_reports_none(files):
    r, _, out, _ = go(lambda c, n: Reply(thought(), usage=None), files, kw=dict(prices=PRICES))
    u = out[0]["provenance"]["usage"]
    assert u["estimated"] is True and u["completion_tokens"] == -(-len(thought()) // 4) and r["cost"] > 0


@pytest.mark.parametrize("workers", [1, 5])
def test_the_budget_is_never_exceeded_and_the_run_says_how_to_go_on(files, capsys, workers):
    r, calls, out, _ = go(
        lambda c, n: Reply(thought(), usage=(500, 250), delay=0.01),
        files,
        30,
        workers=workers,
        kw=dict(prices=PRICES, max_cost=10.0),
    )
    assert (
        r["exit_code"] == 1
        and 8.0 <= r["cost"] <= 10.0
        and len(out) == len(calls) == round(r["cost"])
        and "--max_cost 10" in r["reason"]
    )
    assert "the same command goes on from here" in capsys.readouterr().err
    r2, calls, *_ = go(
        good, files, 30, kw=dict(prices=PRICES, max_cost=10.0), workers=workers
    )  # the limit is for the file, not for each start
    assert not calls or r2["cost_of_file"] <= 10.0
    r3, *_ = go(good, files, 30, kw=dict(prices=PRICES, max_cost=100.0))
    assert r3["exit_code"] == 0


def test_money_spent_on_failures_counts_against_the_budget_of_later_starts(files):
    go(lambda c, n: Reply("no"), files, 2, kw=dict(prices=PRICES))
    for _ in range(2):
        r, _, _, failed = go(lambda c, n: Reply("no"), files, 2, kw=dict(prices=PRICES))
    assert r["cost_of_file"] == pytest.approx(3 * 2 * 3 * 0.2) and sum(
        f["provenance"]["cost"] for f in failed
    ) == pytest.approx(3.6)
    r, calls, *_ = go(good, files, 2, kw=dict(prices=PRICES, max_cost=3.5))
    assert not calls and "--max_cost" in r["reason"]


def test_a_dry_run_sends_nothing_and_writes_nothing(files, capsys):
    inp, out = files(10)
    r = augment(THINK, inp, out, Endpoint(model="m"), prices=PRICES, dry_run=True)
    per = nli_ft.teacher_session.estimate_tokens(THINK.messages(pair(0)))
    assert (
        r["todo"] == 10
        and r["prompt_tokens"] == 10 * per
        and r["completion_tokens"] == 2000
        and not list(out.parent.glob("*out*"))
    )
    assert "characters / 4" in (said := capsys.readouterr().out) and "nothing was sent" in said
    go(good, files, 10, kw=dict(limit=4))
    r = augment(THINK, inp, out, Endpoint(model="m"), prices=PRICES, dry_run=True)
    assert (r["todo"], r["completion_tokens"]) == (
        6,
        300,
    ) and "mean of 4 finished rows" in capsys.readouterr().out


def test_a_price_file_that_does_not_price_the_model_is_refused(tmp_path):
    for text in (
        '{"other": {"input": 1, "output": 1}}',
        '{"m": {"input": 1}}',
        '{"m": {"input": -1, "output": 1}}',
        "[]",
        "{",
    ):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ConfigError, match="p.json"):
            nli_ft.teacher_session.read_prices(tmp_path / "p.json", "m")
    with pytest.raises(ConfigError, match="needs --prices"):
        augment(THINK, "x", "y", Endpoint("http://x", "m"), max_cost=1.0)


# ---------------------------------------------------------------- keys


def test_the_key_is_written_nowhere(files, monkeypatch, capfd):
    monkeypatch.setenv("NLI_TEST_KEY", "SECRET-123")

    def script(c, n):
        return (
            Reply(status=500, body=dict(error=dict(message=f"token {c.headers['authorization']} is odd")))
            if n < 3
            else Reply("no")
        )

    inp, out = files(1)
    with FakeEndpoint(script) as server:
        url = server.url.replace("http://", "http://user:SECRET-pw@")
        augment(
            THINK,
            inp,
            out,
            Endpoint(url, "m", api_key_env="NLI_TEST_KEY", backoff=0.01, max_attempts=3),
            progress=False,
        )
        augment(THINK, inp, out, Endpoint(url, "m", api_key_env="NLI_TEST_KEY", backoff=0.01), progress=False)
    said = capfd.readouterr()
    written = "".join(p.read_text() for p in out.parent.iterdir())
    assert "SECRET" not in written + said.out + said.err and "is odd" not in written
    assert rows(failed_path(out))[0]["provenance"]["endpoint"].startswith("http://127.0.0.1")


# ---------------------------------------------------------------- the commands, in processes of their own

ENV = dict(os.environ, OMP_NUM_THREADS="1", NLI_TEST_KEY="k")


def command(inp, out, url, *more, stage="think", **kw):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nli_ft.teacher",
            stage,
            "--input",
            inp,
            "--output",
            out,
            "--base_url",
            url,
            "--model",
            "m",
            "--api_key_env",
            "NLI_TEST_KEY",
            *map(str, more),
        ],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


def finish(p, timeout=60):
    try:
        return (*p.communicate(timeout=timeout), p.returncode)
    finally:
        p.kill(), p.wait()


def test_help_loads_no_client_and_nothing_slow():
    code = (
        "import sys; import nli_ft.teacher as a\ntry: a.think_cli(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('openai', 'torch', 'transformers', 'pandas', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60
    ).stdout
    assert out.splitlines()[-1] == "[]" and "--max_cost" in out


def test_the_commands_end_with_the_promised_exit_codes(files):
    inp, out = files([wrong_thought(i) for i in range(3)])
    with FakeEndpoint(lambda c, n: Reply(reflection(0) if row_of(c) else "no")) as server:
        assert finish(command(inp, out, server.url, "--no_blind", stage="reflect"))[2] == 1
        assert finish(command(inp, out, "nonsense"))[2] == 2
        _, err, code = finish(
            command(inp, out, server.url, "--no_blind", "--temperature", 1, stage="reflect")
        )
        assert code == 2 and "made with other settings" in err and "Traceback" not in err
    with FakeEndpoint(lambda c, n: Reply(reflection(0))) as server:
        _, err, code = finish(command(inp, out, server.url, "--no_blind", stage="reflect"))
    assert code == 0 and len(rows(out)) == 3 and "reflect: 1 written" in err


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupt_keeps_what_arrived_and_says_how_to_go_on(files, sig, code):
    inp, out = files(40)
    with FakeEndpoint(lambda c, n: Reply(thought(), delay=60 if n >= 12 else 0)) as server:
        p = command(inp, out, server.url, "--workers", 4)
        wait_for(lambda: len(server.calls) == 16)
        sent = time.monotonic()
        p.send_signal(sig)
        _, err, rc = finish(p)
        assert rc == code and time.monotonic() - sent < 10 and "Traceback" not in err
        assert len(rows(out)) == 12 and "28 left" in err and "the same command goes on from here" in err
    with FakeEndpoint(good) as server:
        assert finish(command(inp, out, server.url))[2] == 0
    assert sorted(r["id"] for r in rows(out)) == list(range(40)) and len(server.calls) == 28


@pytest.mark.parametrize("kills, n", [(5, 120), pytest.param(20, 400, marks=pytest.mark.every)])
def test_kills_lose_nothing_and_repeat_only_what_was_in_flight(files, kills, n):
    workers, rng = 4, random.Random(1)
    inp, out = files(n)
    finished_then_called, killed = [], 0

    def script(c, k):
        return Reply(thought() if row_of(c) % 50 else "never JSON", delay=rng.uniform(0.001, 0.02))

    with FakeEndpoint(script) as server:
        for _ in range(kills):
            before, done = len(server.calls), {r["id"] for _, r in nli_ft.teacher_files.iter_written(out)}
            p = command(inp, out, server.url, "--workers", workers, "--max_reprompts", 0)
            enough = before + rng.randint(3, 15)
            wait_for(lambda: len(server.calls) >= enough or p.poll() is not None)
            time.sleep(rng.uniform(0, 0.01))
            p.kill()
            finish(p)
            time.sleep(0.03)  # calls that are on their way arrive
            killed += p.returncode == -signal.SIGKILL
            finished_then_called += [row_of(c) for c in server.calls[before:] if row_of(c) in done]
            for path in (out, failed_path(out)):  # what a power cut does to the last line
                if rng.random() < 0.3 and path.exists():
                    with open(path, "ab") as f:
                        f.write(b'{"key": "torn')
        _, err, code = finish(command(inp, out, server.url, "--workers", workers, "--max_reprompts", 0))
    ids = [r["id"] for r in rows(out)]
    bad = {i for i in range(n) if i % 50 == 0}
    assert len(ids) == len(set(ids)) and set(ids) == set(range(n)) - bad, "a row twice, or lost"
    assert {r["id"] for r in rows(failed_path(out))} == bad and code == 1 and f"{len(bad)} failed" in err
    assert killed == kills and not finished_then_called
    repeated = sum(k - 1 for i, k in Counter(row_of(c) for c in server.calls).items() if i not in bad)
    print(
        f"{kills} kills, {n} rows, {len(server.calls)} calls, {repeated} repeated (bound {kills * workers})"
    )
    assert repeated <= kills * workers


# ---------------------------------------------------------------- the user's own words


def test_a_users_prompt_is_sent_word_for_word_and_rows_of_another_prompt_are_refused(files, tmp_path):
    prompt = tmp_path / "prompt.toml"
    prompt.write_text('user = "Premise: {premise}\\nHypothesis: {hypothesis}"\nsystem = "Answer in JSON."\n')
    inp, out = files(2)
    with FakeEndpoint(good) as server:
        cmd = [
            sys.executable,
            "-m",
            "nli_ft.teacher",
            "think",
            "--input",
            inp,
            "--output",
            out,
            "--base_url",
            server.url,
            "--model",
            "m",
        ]

        def run(*more):
            return subprocess.run([*map(str, cmd), *map(str, more)], capture_output=True, text=True)

        assert run("--prompt", prompt).returncode == 0
        assert [m["content"] for m in server.calls[0].body["messages"]] == [
            "Answer in JSON.",
            f"Premise: {pair(0)['premise']}\nHypothesis: A bird sang.",
        ]
        n = len(server.calls)
        r = run()
        assert (
            r.returncode == 2
            and "template_hash" in r.stderr
            and len(server.calls) == n
            and len(rows(out)) == 2
        )


# ---------------------------------------------------------------- what one row or the whole server will not answer


def told(message):
    return dict(error=dict(message=message))


def message(**kw):
    return dict(
        choices=[dict(index=0, finish_reason=kw.pop("finish", "stop"), message=dict(role="assistant", **kw))],
        model="m",
        id="x",
        object="o",
        created=0,
    )


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_row_that_the_server_rejects_is_set_apart_and_the_run_goes_on(files, status):
    def script(c, n):
        return (
            Reply(status=status, body=told("maximum context length is 4096 tokens"))
            if row_of(c) == 0
            else Reply(thought())
        )

    r, calls, out, failed = go(script, files, 8)
    assert sorted(x["id"] for x in out) == list(range(1, 8)) and r["reason"] is None and r["exit_code"] == 1
    assert [x["id"] for x in failed] == [0] and f"HTTP {status}: maximum context length" in failed[0]["why"]


def test_a_server_that_rejects_the_first_rows_alike_ends_the_run_in_its_own_words(files):
    r, calls, out, failed = go(
        lambda c, n: Reply(status=403, body=told("your plan has no access")), files, 30
    )
    assert "rejected the first 5 rows" in r["reason"] and "your plan has no access" in r["reason"]
    assert len(failed) == 5 and r["left"] == 25 and r["exit_code"] == 1


@pytest.mark.parametrize(
    "words, cure",
    [
        ("System role not supported", "--prompt FILE"),
        ("response_format is not supported", "--response_format plain"),
    ],
)
def test_a_request_that_the_server_does_not_take_ends_with_what_to_do(files, words, cure):
    r, calls, out, failed = go(
        lambda c, n: Reply(status=400, body=told(words)), files, 30, response_format="json_object"
    )
    assert cure in r["reason"] and words in r["reason"] and not failed and r["left"] == 30


def test_content_in_parts_is_read_and_thinking_parts_are_no_answer(files):
    parts = [
        dict(type="thinking", thinking=[dict(type="text", text=thought(0))]),
        dict(type="text", text=thought(1)),
    ]
    r, calls, out, _ = go(lambda c, n: Reply(body=message(content=parts)), files, 2)
    assert [x["predicted_label"] for x in out] == [1, 1] and r["exit_code"] == 0


@pytest.mark.parametrize(
    "said, place",
    [
        (dict(content=None, reasoning_content="Well …"), "reasoning_content"),
        (dict(content=None, refusal="I cannot."), "refusal"),
        (dict(content="", finish="content_filter"), "content_filter"),
    ],
)
def test_twenty_useless_replies_and_no_good_one_stop_the_run_with_the_field_that_held_the_text(
    files, said, place
):
    r, calls, out, failed = go(lambda c, n: Reply(body=message(**dict(said))), files, 40)
    assert len(calls) == USELESS and place in r["reason"] and not out and r["exit_code"] == 1


def test_a_good_reply_among_useless_ones_keeps_the_run_going(files):
    r, calls, out, failed = go(lambda c, n: Reply(thought() if row_of(c) == 3 else "no JSON"), files, 30)
    assert r["reason"] is None and len(out) == 1 and len(failed) == 29


def test_entailment_as_a_label_is_asked_again_in_true_words(files):
    named = json.dumps(dict(thought_process=THOUGHT, predicted_label="entailment"))
    r, calls, out, _ = go(lambda c, n: Reply(thought() if n else named), files, 1)
    assert "1 for entailment, 0 otherwise" in calls[1].body["messages"][-1]["content"] and len(out) == 1


# ---------------------------------------------------------------- what guards reflections


def verdict(label):
    return json.dumps(dict(assessment="The steps hold as far as they go.", predicted_label=label))


def is_blind(call):
    return "examines the reasoning" in call.system


def test_the_blind_pass_sees_no_gold_and_its_doubt_sets_the_row_apart_for_good(files):
    def script(c, n):
        return Reply(verdict(1 if row_of(c) == 0 else 0) if is_blind(c) else reflection(0))

    three = [wrong_thought(i) for i in range(3)]
    r, calls, out, failed = go(script, files, three, REFLECT, kw=dict(guards=Guards()))
    doubted = rows(nli_ft.sft_rows.suspect_path(files(three)[1]))
    assert sorted(x["id"] for x in out) == [1, 2] and [x["id"] for x in doubted] == [0] and not failed
    assert "gold is 0" in doubted[0]["suspicion"][0] and (r["suspects"], r["written"], r["exit_code"]) == (
        1,
        2,
        0,
    )
    blind = [c for c in calls if is_blind(c)]
    assert len(blind) == 3 and all(
        "Correct label" not in m["content"] for c in blind for m in c.body["messages"]
    )
    again, calls, *_ = go(script, files, three, REFLECT, kw=dict(guards=Guards()))
    assert not calls and again["exit_code"] == 0


@pytest.mark.parametrize(
    "text, why",
    [
        (DENIAL, "concludes 0"),
        ("The true label says so. It follows from the premise.", "only you were shown"),
        ("There is no information to suggest otherwise, so it follows from the premise.", "argues with"),
    ],
)
def test_a_reflection_without_a_reason_is_asked_again_and_then_set_apart(files, text, why):
    row = [wrong_thought(1, label=1)]
    r, calls, out, failed = go(lambda c, n: Reply(reflection(1, text)), files, row, REFLECT)
    doubted = rows(nli_ft.sft_rows.suspect_path(files(row)[1]))
    assert len(calls) == 3 and why in calls[1].body["messages"][-1]["content"]
    assert (len(out), len(failed), r["suspects"], r["not_argued"]) == (0, 0, 1, 3) and why in doubted[0][
        "suspicion"
    ][0]


def test_samples_without_gold_set_apart_what_they_outvote(files):
    def script(c, n):
        return Reply(thought(1) if "Correct label" not in c.user else reflection(0))

    row = [wrong_thought(1)]
    r, calls, out, _ = go(script, files, row, REFLECT, kw=dict(guards=Guards(blind=False, samples=3)))
    assert (
        r["suspects"] == 1
        and len(calls) == 4
        and "0 of 3 answers without gold"
        in rows(nli_ft.sft_rows.suspect_path(files(row)[1]))[0]["suspicion"][0]
    )


def test_of_simulated_reflections_fewer_teach_a_wrong_label_when_gold_is_doubted(files):
    "A synthetic teacher on rows of which 5 % have a wrong gold label. It is right in 90 %, also without gold."
    rng = random.Random(0)
    truth = {i: rng.randint(0, 1) for i in range(1500)}
    gold = {i: 1 - y if rng.random() < 0.05 else y for i, y in truth.items()}
    first = {i: y if rng.random() < 0.9 else 1 - y for i, y in truth.items()}
    blind = {i: y if rng.random() < 0.9 else 1 - y for i, y in truth.items()}
    wrong = [wrong_thought(i, label=gold[i]) for i in truth if first[i] != gold[i]]

    def script(c, n):
        return Reply(verdict(blind[row_of(c)]) if is_blind(c) else reflection(gold[row_of(c)]))

    r, calls, out, _ = go(script, files, wrong, REFLECT, workers=8, kw=dict(guards=Guards()))

    def share(found):
        return sum(gold[x["id"]] != truth[x["id"]] for x in found) / len(found)

    assert 0.25 < share(wrong) < 0.40 and share(out) < 0.10


def test_a_dry_run_counts_the_calls_of_the_guards(files, capsys):
    inp, out = files([wrong_thought(i) for i in range(4)])
    base = augment(REFLECT, inp, out, Endpoint(model="m"), dry_run=True, guards=Guards(blind=False))
    both = augment(REFLECT, inp, out, Endpoint(model="m"), dry_run=True, guards=Guards(samples=2))
    assert both["prompt_tokens"] == 4 * base["prompt_tokens"] and "4 a row" in capsys.readouterr().out
