"""A tiny random model of each family is trained for two steps. Its loss is the model's own. Its answers are the
same in the run, from the saved adapter, for each row alone, and merged in plain transformers. What cannot be
trained is refused by name."""

import json
import shutil

from swap import swap
import pytest
import torch

from nli_ft.process import ConfigError
from nli_ft.config_loader import load_config
from nli_ft.rows import read_rows, sft_row
from nli_ft.files import write_jsonl
from nli_ft.predict import forced_ids, partial_thought, predict_rows
from nli_ft.generate import for_inference, recurrent, stop_rule
from nli_ft.bases import embedded_model, load_tokenizer
from nli_ft.model import load_base, load_for_inference, lora_targets, merge_adapter, seeded_lora
from nli_ft.prompt import encode_prompt, mistral_v3_tokenizer
from nli_ft.ready import check_ready
from nli_ft.fit import fit, to_dataset, training_args
from nli_ft.trainer import make_trainer_class, packed_losses
from nli_ft.preflight import prepare, preflight, proofs

# -- tiny models

TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
OTHER = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8)
EXPERTS = dict(
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
)
SEVERAL = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MIXED = dict(layer_types=["linear_attention", "full_attention"])
GRIFFIN = dict(num_hidden_layers=3, num_key_value_heads=1, lru_width=64, attention_window_size=64)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16
)
GEMMA = SMALL | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=32)

# name -> (configuration class, values, how to get its log-probabilities)
MODELS = dict(
    llama=("LlamaConfig", SMALL, "frozen"),
    gemma2=("Gemma2Config", GEMMA, "trl"),  # soft caps, no SDPA, windows, no system turn
    granite=("GraniteConfig", SMALL | dict(logits_scaling=8.0), "trl"),
    cohere=("CohereConfig", SMALL, "trl"),
    qwen3moe=("Qwen3MoeConfig", SMALL | SEVERAL, "frozen"),
    gpt2=("GPT2Config", dict(n_embd=64, n_layer=2, n_head=4, n_positions=512), "frozen"),
    neox=("GPTNeoXConfig", OTHER | dict(intermediate_size=96, max_position_embeddings=512), "frozen"),
    lfm2=("Lfm2Config", SMALL | dict(layer_types=["conv", "full_attention"]), "frozen"),
    # padding changes its answers, and its cap of the logits is one that TRL does not know
    recurrent_gemma=("RecurrentGemmaConfig", SMALL | GRIFFIN, "own"),
    llama_tied=("LlamaConfig", SMALL | dict(tie_word_embeddings=True), "frozen"),
    qwen2=("Qwen2Config", SMALL | dict(tie_word_embeddings=True), "frozen"),
    qwen3=("Qwen3Config", SMALL | dict(head_dim=16), "frozen"),
    gemma=("GemmaConfig", SMALL | dict(head_dim=16), "frozen"),
    gemma3=("Gemma3TextConfig", GEMMA | dict(layer_types=["sliding_attention", "full_attention"]), "frozen"),
    mistral_window=("MistralConfig", SMALL | dict(sliding_window=32), "frozen"),
    phi=("PhiConfig", SMALL, "frozen"),
    phi3=("Phi3Config", SMALL, "frozen"),
    mixtral=("MixtralConfig", SMALL | dict(num_local_experts=4), "frozen"),
    opt=("OPTConfig", OTHER | dict(ffn_dim=96, max_position_embeddings=512, word_embed_proj_dim=64), "own"),
    bloom=("BloomConfig", dict(hidden_size=64, n_layer=2, n_head=4), "frozen"),
    falcon=("FalconConfig", OTHER, "frozen"),
    stablelm=("StableLmConfig", SMALL, "frozen"),
    olmo2=("Olmo2Config", SMALL, "frozen"),
    smollm3=("SmolLM3Config", SMALL, "frozen"),
    gptoss=("GptOssConfig", GEMMA | dict(num_local_experts=4, num_experts_per_tok=2), "frozen"),
    nanochat=("NanoChatConfig", SMALL, "trl"),
    deepseek3=("DeepseekV3Config", SMALL | LATENT | EXPERTS | dict(num_key_value_heads=4), "frozen"),
    glm4=("Glm4Config", SMALL | dict(head_dim=16), "frozen"),
    qwen35=("Qwen3_5TextConfig", SMALL | LINEAR | MIXED | dict(head_dim=16), "frozen"),
    mamba=("MambaConfig", dict(hidden_size=64, num_hidden_layers=2, state_size=8), "frozen"),
)
# each of these stands for a kind. The others are tried by `pytest -m every`
OFTEN = ("llama", "gemma2", "gpt2", "qwen3moe", "recurrent_gemma")
UNQUANTISED = ("falcon",)  # bitsandbytes finds nothing to quantise in it


def tokenizer(template=TURNS):
    tok = mistral_v3_tokenizer()
    tok.chat_template = template
    return tok


def make(folder, name, tok=None, **changes):
    "Write a random model whose norms and biases are not trivial."
    import transformers

    kind, values, _ = MODELS[name]
    if name == "qwen2":  # transformers reads the pieces of its tokenizers as bytes
        tok = transformers.AutoTokenizer.from_pretrained(embedded_model("smollm2-135m"))
    tok = tok or tokenizer(NO_SYSTEM + TURNS if "gemma" in name else TURNS)
    ids = {k: getattr(tok, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")} | dict(
        vocab_size=len(tok)
    )
    conf = getattr(transformers, kind)(**ids | values | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(conf)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif p.ndim == 2:
                p.mul_(3)
    model.generation_config.pad_token_id = tok.pad_token_id
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def rows(path):
    words = "red green blue black white grey brown pink".split()
    pairs = list(zip(words, words[3:] + words[:3]))
    made = []
    for i, (a, b) in enumerate(pairs):
        premise = f"The {a} box{' by the door' * (i % 3)} holds a {b} ball."
        made.append(
            sft_row(
                i,
                premise,
                f"The {b} ball is in the {a} box.",
                f"The {a} box holds it.",
                i % 2,
                "test",
                "brief",
            )
        )
    write_jsonl(path, made)
    return str(path)


def config(tmp_path, folder, **changes):
    data = (
        str(tmp_path / "rows.jsonl") if (tmp_path / "rows.jsonl").exists() else rows(tmp_path / "rows.jsonl")
    )
    values = dict(
        model_id=str(folder),
        device="cpu",
        compute_dtype="fp32",
        train_data=data,
        eval_data=data,
        target_modules="all-linear",
        lora_dropout=0.0,
        learning_rate=1e-2,
        max_steps=2,
        max_new_tokens=4,
        eval_batch_size=4,
        output_dir=str(tmp_path / "models"),
        runs_dir=str(tmp_path / "runs"),
    )
    return load_config("minimal_test", values | changes)


# -- what works


def trainer_of(model, prep, encs, out):
    return make_trainer_class()(
        model=model,
        args=training_args(prep.cfg, out, False),
        train_dataset=to_dataset(encs, prep.cfg),
        processing_class=prep.tok,
    )


def without_dropout(model):
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        if isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0


def own_loss_agrees(model, prep, out):
    "Compare loss and gradients of a batch with the model's own forward with labels. Return the head that gave them."
    without_dropout(model)
    trainer = trainer_of(model, prep, prep.train[:3], out)
    batch = trainer.data_collator(
        [dict(input_ids=e.input_ids, labels=e.labels, kind=e.kind) for e in prep.train[:3]]
    )
    plain = {k: v for k, v in batch.items() if k != "kind"}

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
        )

    want = model.eval()(**plain, use_cache=False).loss
    want_grad = gradients(want)
    got = trainer.compute_loss(model.train(), dict(batch))
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(gradients(got), want_grad, rtol=1e-3, atol=1e-5 * want_grad.abs().max().item())
    return trainer.head


def by_full_forwards(model, tok, asked, new):
    "(text, p_entail) of every row: greedy, without cache, batch or padding."
    answers = []
    for row in asked:
        ids = encode_prompt(tok, row["prompt"])
        start, stop = len(ids), stop_rule(tok, {tok.eos_token_id})
        with for_inference(model) as inner:

            def last(ids):
                return inner(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()

            while len(ids) < start + new and not (len(ids) > start and stop(ids[start:])):
                ids.append(last(ids).argmax().item())
            text = tok.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            before, ((zero,), (one,)) = forced_ids(tok, row["prompt"], partial_thought(text))
            logits = last(before)
        answers.append((text, (logits[one] - logits[zero]).sigmoid().item()))
    return answers


def same(a, b):
    assert [text for text, _ in a] == [text for text, _ in b]
    assert [p for _, p in a] == pytest.approx([p for _, p in b], abs=1e-4)


def asked(model, tok, rows, cfg):
    made = predict_rows(model, tok, rows, cfg, progress=False, mode="forced")
    return [(p["completion"], p["p_entail"]) for p in made]


def families(often):
    "The parameters of a test: those of `often` are tried in CI."
    return [n if n in often else pytest.param(n, marks=pytest.mark.every) for n in MODELS]


@pytest.mark.parametrize("name", families(OFTEN))
def test_a_family_scores_the_same_in_the_run_saved_alone_and_merged(tmp_path, name):
    from transformers import AutoModelForCausalLM

    cfg = config(tmp_path, make(tmp_path / name, name), quantization="none" if name in UNQUANTISED else "nf4")
    check_ready(cfg)
    prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg)
    assert preflight(prep)["memory_gib"]["total"] > 0
    assert [k for k, (ok, _) in proofs(prep).items() if not ok] == []
    fit(prep, model, tmp_path / "out", on_log=lambda logs: None)
    judged = prep.eval_rows[:4]
    assert len({len(encode_prompt(prep.tok, r["prompt"])) for r in judged}) > 1, (
        "rows of one length need no padding"
    )
    in_run = asked(model, prep.tok, judged, cfg)
    saved = load_for_inference(cfg, tmp_path / "out" / "adapter")
    again = asked(saved, prep.tok, judged, cfg)
    same(in_run, again)
    same(again, [asked(saved, prep.tok, [r], cfg)[0] for r in judged])
    same(again, by_full_forwards(saved, prep.tok, judged, cfg.max_new_tokens))
    merge_adapter(cfg, tmp_path / "out" / "adapter", torch.float32).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    same(again, by_full_forwards(merged, prep.tok, judged, cfg.max_new_tokens))
    untrained = by_full_forwards(load_base(cfg, train=False), prep.tok, judged, cfg.max_new_tokens)
    assert max(abs(p - q) for (_, p), (_, q) in zip(again, untrained)) > 1e-3, "the adapter changed nothing"
    assert own_loss_agrees(model, prep, tmp_path / "x") == MODELS[name][2]


# A state goes from row to row, or the model's own mask knows nothing of packed rows
MIXING = ("recurrent_gemma", "mamba", "lfm2", "qwen35", "opt", "bloom", "falcon", "gptoss")


@pytest.mark.parametrize("name", families(("llama", "gemma2", "recurrent_gemma", "lfm2", "opt", "gptoss")))
def test_packed_rows_of_a_family_cost_what_they_cost_alone_or_are_refused(tmp_path, name):
    quantization = "none" if name in UNQUANTISED else "nf4"
    cfg = config(
        tmp_path, make(tmp_path / name, name), quantization=quantization, use_packing=True, max_seq_length=160
    )
    prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg)
    if name in MIXING:
        with pytest.raises(ConfigError, match="see each other.* Set use_packing=false"):
            trainer_of(model, prep, prep.train, tmp_path / "x")
        return
    trainer = trainer_of(model, prep, prep.train, tmp_path / "x")
    assert len(trainer.train_dataset) < len(prep.train)
    rows = [e.input_ids for e in prep.train[:3]]

    def losses(*together):
        with torch.no_grad():
            return packed_losses(model, trainer.data_collator, list(together), trainer.head)

    without_dropout(model)
    for training in (False, True):  # on a CPU a training has an attention of its own
        model.train(training)
        alone = [losses(row)[0] for row in rows]
        for packed, single in zip(losses(*rows), alone, strict=True):
            assert torch.allclose(packed, single, atol=2e-4, rtol=0)


def test_a_training_on_packed_rows_starts_and_evaluates_with_the_loss_of_the_same_rows_alone(tmp_path, llama):
    logs = {}
    for packs in (False, True):
        how = dict(use_packing=packs, max_seq_length=160, batch_size=8, grad_accumulation_steps=1)
        cfg = config(tmp_path, llama, **how).replace(max_steps=1, eval_steps=1)
        prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg)
        logs[packs] = []
        fit(prep, model, tmp_path / f"out-{packs}", on_log=logs[packs].append)
    for alone, packed in zip(logs[False], logs[True], strict=True):
        assert packed.keys() == alone.keys()
        for key in ("loss", "loss_label", "tokens", "loss_tokens", "eval_loss", "eval_loss_thought"):
            if key in alone:
                assert packed[key] == pytest.approx(alone[key], rel=1e-4), key
    assert any("eval_loss" in log for log in logs[True])


def test_prompts_of_several_lengths_are_never_padded_for_a_recurrent_model(tmp_path, monkeypatch):
    import nli_ft.generate
    import nli_ft.preflight
    import nli_ft.train_sft

    widths, real = [], nli_ft.generate.left_pad

    def watch(prompts, *args):
        widths.append({len(p) for p in prompts})
        return real(prompts, *args)

    swap(monkeypatch, "nli_ft.generate.left_pad", watch)
    cfg = config(tmp_path, make(tmp_path / "lfm2", "lfm2"))
    model, tok = load_base(cfg, train=False), load_tokenizer(cfg)
    assert recurrent(model)
    ids = [[1, 5, 9, 11], [1, 5], [1, 7, 8, 9]]
    made = nli_ft.generate.generate_batch(model, tok, ids, 3)
    assert widths == [{4}, {2}]
    assert [m["text"] for m in made] == [
        nli_ft.generate.generate_batch(model, tok, [p], 3)[0]["text"] for p in ids
    ]


@pytest.mark.parametrize(
    "name, has_states",
    [
        ("llama", False),
        ("gemma3", False),
        ("lfm2", True),
        ("qwen35", True),
        ("mamba", True),
        ("recurrent_gemma", True),
    ],
)
def test_recurrent_families_are_known_by_their_config(name, has_states):
    import transformers
    from nli_ft.bases import empty_model

    kind, values, _ = MODELS[name]
    assert recurrent(empty_model(getattr(transformers, kind)(**values))) is has_states


def test_the_loss_of_a_mixture_of_experts_has_no_term_for_the_router(tmp_path):
    folder = make(tmp_path / "moe", "qwen3moe", output_router_logits=True, router_aux_loss_coef=0.5)
    cfg = config(tmp_path, folder, max_steps=1)
    prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg)
    e = prep.train[0]
    batch = dict(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels]))
    logits = model(**batch).logits[:, :-1].float()
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert model(**batch).loss > want + 0.01, "the model's own loss has one"
    trainer = trainer_of(model, prep, [e], tmp_path)
    for frozen in (True, False):  # our head, and TRL's
        model.get_output_embeddings().weight.requires_grad_(not frozen)
        got = trainer.compute_loss(model, dict(batch, kind=torch.tensor([e.kind])))
        assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_experts_and_routers_get_no_adapter(tmp_path):
    cfg = config(tmp_path, make(tmp_path / "moe", "qwen3moe"))
    model = seeded_lora(load_base(cfg), cfg)
    adapted = {
        n.split(".lora_")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    # its first layer has a plain one
    named = config(tmp_path, make(tmp_path / "deepseek", "deepseek3"), target_modules=["down_proj"])
    with pytest.raises(ConfigError, match="belong to the experts"):
        lora_targets(load_base(named), named)


# -- what is refused, before anything starts


def refused(cfg, *said):
    with pytest.raises(ConfigError) as e:
        check_ready(cfg)
    for text in ("cannot start here", cfg.model_id, *said):
        assert text in str(e.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture
def copied(tmp_path, llama):
    "A copy of a model's folder to spoil, and its config."
    shutil.copytree(llama, tmp_path / "m")
    return tmp_path / "m", config(tmp_path, tmp_path / "m")


def test_a_sound_folder_is_not_refused(copied):
    check_ready(copied[1])


def test_an_adapters_folder_is_no_model(copied):
    (copied[0] / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path="some/base")))
    refused(copied[1], "holds an adapter", "Give some/base as model_id")


@pytest.mark.parametrize(
    "name, said",
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "it has no weights"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_a_folder_without_one_of_its_parts(copied, name, said):
    (copied[0] / name).unlink()
    refused(copied[1], said)


def test_weights_of_other_kinds(copied):
    folder, cfg = copied
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(cfg, "pickled (.bin)")
    (folder / "config.json").unlink()
    (folder / "m.gguf").write_text("GGUF")
    refused(cfg, "GGUF file")


def test_weights_that_are_not_whole(copied):
    folder, cfg = copied
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    refused(cfg, "no whole safetensors file")
    (folder / "model.safetensors").unlink()
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=dict(a=first, b=second))))
    (folder / first).write_bytes(whole)
    refused(cfg, "1 of its 2 files of weights are missing, among them model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(model_type="own", auto_map=dict(AutoModelForCausalLM="modeling_own.Own")), "trust_remote_code"),
        (dict(model_type="unheard_of"), "cannot read its config.json"),
        (dict(model_type="t5", architectures=["T5ForConditionalGeneration"]), "an encoder with a decoder"),
        (
            dict(model_type="bert", architectures=["BertForMaskedLM"]),
            "an encoder, which sees what it should predict",
        ),
        (
            dict(model_type="xlnet", architectures=["XLNetLMHeadModel"]),
            "does not read text from left to right",
        ),
        (dict(model_type="vit", architectures=["ViTModel"]), "no causal language model"),
        (dict(model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"]), "reads more than text"),
        (dict(model_type="xlstm", architectures=["xLSTMForCausalLM"]), "cache of another shape"),
        (dict(model_type="rwkv", architectures=["RwkvForCausalLM"]), "mixes the states of a batch"),
        (dict(quantization_config=dict(quant_method="gptq", bits=4)), "quantised already (gptq)"),
        (
            dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)),
            "already (bitsandbytes)",
        ),
        (dict(num_attention_heads=0), "transformers cannot"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_models_of_other_kinds(copied, changes, said):
    folder, cfg = copied
    conf = json.loads((folder / "config.json").read_text())
    if changes.get("model_type") not in (None, "own"):
        conf = dict(vocab_size=conf["vocab_size"])
    (folder / "config.json").write_text(json.dumps(conf | changes))
    refused(cfg, said)


@pytest.mark.parametrize(
    "tok, said",
    [
        (dict(chat_template=None, additional_special_tokens=[]), "no chat template"),
        (dict(eos_token=None), "no EOS token"),
        (
            dict(chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}"),
            "no special token after the assistant's turn",
        ),
    ],
    ids=["no template", "no eos", "no end of turn"],
)
def test_tokenizers_that_cannot_teach(copied, tok, said):
    from transformers import AutoTokenizer

    folder, cfg = copied
    made = AutoTokenizer.from_pretrained(folder)
    for key, value in tok.items():
        setattr(made, key, value)
    if made.chat_template is None:
        (folder / "chat_template.jinja").unlink()
        import tokenizers

        pieces = tokenizers.models.BPE(vocab={"a": 0, "</s>": 1}, merges=[])
        made = type(made)(tokenizer_object=tokenizers.Tokenizer(pieces), eos_token="</s>")
    made.save_pretrained(folder)
    refused(cfg, said)


def test_target_modules_that_a_family_does_not_have_are_named_with_those_it_has(tmp_path):
    cfg = config(tmp_path, make(tmp_path / "neox", "neox"), target_modules=["q_proj", "v_proj"])
    refused(cfg, "['q_proj', 'v_proj'] match no linear layer", "'query_key_value'", "say all-linear")


def test_a_family_of_which_nothing_can_be_quantised(tmp_path):
    cfg = config(tmp_path, make(tmp_path / "falcon", "falcon"))
    refused(cfg, "no layer of FalconForCausalLM that it could quantise", "quantization=none")
    check_ready(cfg.replace(quantization="none"))


def test_an_attention_that_a_family_does_not_have(tmp_path):
    cfg = config(tmp_path, make(tmp_path / "gemma2", "gemma2"), attn_implementation="sdpa")
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM has no sdpa attention"):
        check_ready(cfg)


def test_activations_that_a_family_cannot_recompute(tmp_path):
    cfg = config(tmp_path, make(tmp_path / "m", "llama"), gradient_checkpointing=True)
    from unittest import mock
    from transformers import LlamaForCausalLM

    with mock.patch.object(LlamaForCausalLM, "supports_gradient_checkpointing", False):
        refused(cfg, "cannot recompute activations")


def test_a_token_without_a_row_in_the_embedding_ends_a_run_with_2_before_anything_is_judged(
    copied, capsys, monkeypatch
):
    import nli_ft.generate
    import nli_ft.preflight
    import nli_ft.train_sft

    folder, cfg = copied
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    used = max(max(e.input_ids) for e in prepare(cfg).train)
    model.resize_token_embeddings(used)
    model.save_pretrained(folder)
    swap(monkeypatch, "nli_ft.train_sft.judge_model", lambda *a, **kw: pytest.fail("it was judged"))
    assert not proofs(prepare(cfg))["every token has a row in the model's embedding"][0]
    # a run refuses evaluation rows that it trains on, so it gets other rows
    other = [r | dict(premise=r["premise"].replace("box", "bag")) for r in read_rows(cfg.train_data)]
    write_jsonl(folder.parent / "other.jsonl", other)
    cfg = cfg.replace(eval_data=str(folder.parent / "other.jsonl"), prompt_template="brief")
    with pytest.raises(SystemExit) as e:
        raise SystemExit(nli_ft.train_sft.train_cli(cfg.to_args()))
    assert e.value.code == 2
    assert "every token has a row in the model's embedding" in capsys.readouterr().err


def test_rows_longer_than_the_models_positions_are_a_failed_proof(tmp_path):
    cfg = config(tmp_path, make(tmp_path / "gpt2", "gpt2", n_positions=64))
    assert not proofs(prepare(cfg))["no row is longer than the model has positions"][0]


def test_an_estimate_that_cannot_be_made_is_said_and_no_reason_to_stop(tmp_path, llama, monkeypatch):
    import nli_ft.generate
    import nli_ft.preflight
    import nli_ft.train_sft

    prep = prepare(config(tmp_path, llama))

    def unknown(*a):
        raise AttributeError("no such attribute")

    swap(monkeypatch, "nli_ft.preflight._memory_parts", unknown)
    p = preflight(prep)
    assert p["memory_gib"] == {"total": None} and p["ok"]
    assert "no estimate" in nli_ft.preflight.preflight_text(p)
    assert "is not known" in nli_ft.train_sft.memory_advice(prep, 8.0)


def test_a_prompt_without_bos_is_right_where_the_template_writes_none(tmp_path):
    cfg = config(tmp_path, make(tmp_path / "m", "llama", tokenizer(TURNS.removeprefix("{{ bos_token }}"))))
    found = proofs(prepare(cfg))
    assert all(ok for ok, _ in found.values())
    assert "the prompt starts without BOS, as its form has it" in found
