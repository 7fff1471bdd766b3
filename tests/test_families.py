"""A tiny random model of each family, trained for two steps: its loss is the model's own, and its answers are the same in the run, from the
saved adapter, each row alone, and merged in plain transformers. What cannot be trained is refused by name before anything starts."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from nli_ft.config_loader import ConfigError, DataError, load_config
from nli_ft.data import sft_row, write_jsonl
from nli_ft.evaluate import forced_ids, for_inference, partial_thought, predict_rows, recurrent, stop_rule
from nli_ft.model import load_base, load_for_inference, load_tokenizer, lora_targets, merge_adapter, seeded_lora
from nli_ft.prompt import encode_prompt, mistral_v3_tokenizer
from nli_ft.train_sft import (check_ready, estimate_memory, fit, make_trainer_class, prepare, preflight, proofs, scoring, to_dataset,
                              training_args)

# -- tiny models

TURNS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
OTHER = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8)
EXPERTS = dict(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, moe_intermediate_size=32)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
GEMMA = SMALL | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=32)

# name -> (configuration class, values, how its log-probabilities are had); the first ones stand for the kinds
FAST = dict(
    llama=("LlamaConfig", SMALL, "plain"),
    gemma2=("Gemma2Config", GEMMA, "trl"),                                          # soft caps, no SDPA, windows, no system turn
    granite=("GraniteConfig", SMALL | dict(logits_scaling=8.0), "trl"),
    cohere=("CohereConfig", SMALL, "trl"),
    qwen3moe=("Qwen3MoeConfig", SMALL | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), "plain"),
    gpt2=("GPT2Config", dict(n_embd=64, n_layer=2, n_head=4, n_positions=512), "plain"),
    neox=("GPTNeoXConfig", OTHER | dict(intermediate_size=96, max_position_embeddings=512), "plain"),
    lfm2=("Lfm2Config", SMALL | dict(layer_types=["conv", "full_attention"]), "plain"),
    rwkv=("RwkvConfig", dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96), "plain"),  # padding changes its answers
)
LONG = dict(
    llama_tied=("LlamaConfig", SMALL | dict(tie_word_embeddings=True), "plain"),
    qwen2=("Qwen2Config", SMALL | dict(tie_word_embeddings=True), "plain"),
    qwen3=("Qwen3Config", SMALL | dict(head_dim=16), "plain"),
    gemma=("GemmaConfig", SMALL | dict(head_dim=16), "plain"),
    gemma3=("Gemma3TextConfig", GEMMA | dict(layer_types=["sliding_attention", "full_attention"]), "plain"),
    mistral_window=("MistralConfig", SMALL | dict(sliding_window=32), "plain"),
    phi=("PhiConfig", SMALL, "plain"),
    phi3=("Phi3Config", SMALL, "plain"),
    mixtral=("MixtralConfig", SMALL | dict(num_local_experts=4), "plain"),
    opt=("OPTConfig", OTHER | dict(ffn_dim=96, max_position_embeddings=512, word_embed_proj_dim=64), "own"),
    bloom=("BloomConfig", dict(hidden_size=64, n_layer=2, n_head=4), "plain"),
    falcon=("FalconConfig", OTHER, "plain"),
    stablelm=("StableLmConfig", SMALL, "plain"),
    olmo2=("Olmo2Config", SMALL, "plain"),
    smollm3=("SmolLM3Config", SMALL, "plain"),
    gptoss=("GptOssConfig", SMALL | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32), "plain"),
    nanochat=("NanoChatConfig", SMALL, "trl"),
    deepseek3=("DeepseekV3Config", SMALL | LATENT | EXPERTS | dict(num_key_value_heads=4), "plain"),
    glm4=("Glm4Config", SMALL | dict(head_dim=16), "plain"),
    qwen35=("Qwen3_5TextConfig", SMALL | LINEAR | dict(head_dim=16, layer_types=["linear_attention", "full_attention"]), "plain"),
    mamba=("MambaConfig", dict(hidden_size=64, num_hidden_layers=2, state_size=8), "plain"),
    recurrent_gemma=("RecurrentGemmaConfig", SMALL | dict(num_hidden_layers=3, num_key_value_heads=1, lru_width=64, attention_window_size=64), "own"),
)
UNQUANTISED = ("falcon", "rwkv") # bitsandbytes finds nothing to quantise in the one, and transformers rescales the weights of the other

def tokenizer(template=TURNS):
    tok = mistral_v3_tokenizer()
    tok.chat_template = template
    return tok

def make(folder, name, tok=None, **changes):
    "Write a random model, with norms and biases that are not trivial."
    import transformers
    kind, values, _ = (FAST | LONG)[name]
    tok = tok or tokenizer(NO_SYSTEM + TURNS if "gemma" in name else TURNS)
    ids = dict(vocab_size=len(tok), bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    conf = getattr(transformers, kind)(**ids | values | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(conf)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1: p.add_(.1*torch.randn_like(p))
            elif p.ndim == 2: p.mul_(3)
    model.generation_config.pad_token_id = tok.pad_token_id
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder

def rows(path):
    words = "red green blue black white grey brown pink".split()
    pairs = list(zip(words, words[3:] + words[:3]))
    made = [sft_row(i, f"The {a} box{' by the door' * (i % 3)} holds a {b} ball.", f"The {b} ball is in the {a} box.", f"The {a} box holds it.", i % 2, "test", "brief")
            for i, (a, b) in enumerate(pairs)]
    write_jsonl(path, made)
    return str(path)

def config(tmp_path, folder, **changes):
    data = rows(tmp_path/"rows.jsonl")
    values = dict(model_id=str(folder), device="cpu", compute_dtype="fp32", train_data=data, eval_data=data, target_modules="all-linear", lora_dropout=0.0,
                  learning_rate=1e-2, max_steps=2, max_new_tokens=4, eval_batch_size=4, output_dir=str(tmp_path/"models"), runs_dir=str(tmp_path/"runs"))
    return load_config("minimal_test", values | changes)

# -- what works

def own_loss_agrees(model, prep, out):
    "Loss and gradients of a batch against the model's own forward with labels."
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.0
        if isinstance(getattr(m, "dropout", None), float): m.dropout = 0.0
    trainer = make_trainer_class()(model=model, args=training_args(prep.cfg, out, False), train_dataset=to_dataset(prep.train[:3], prep.cfg), processing_class=prep.tok)
    batch = trainer.data_collator([dict(input_ids=e.input_ids, labels=e.labels, kind=e.kind) for e in prep.train[:3]])
    plain = {k: v for k, v in batch.items() if k != "kind"}
    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
    want = model.eval()(**plain, use_cache=False).loss
    want_grad = gradients(want)
    got = trainer.compute_loss(model.train(), dict(batch))
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(gradients(got), want_grad, rtol=1e-3, atol=1e-5*want_grad.abs().max().item())

def by_full_forwards(model, tok, asked, new):
    "(text, p_entail) of every row: greedy, without cache, batch or padding."
    answers = []
    for row in asked:
        ids = encode_prompt(tok, row["prompt"])
        start, stop = len(ids), stop_rule(tok, {tok.eos_token_id})
        with for_inference(model) as inner:
            def last(ids): return inner(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            while len(ids) < start + new and not (len(ids) > start and stop(ids[start:])): ids.append(last(ids).argmax().item())
            text = tok.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            before, (zero, one) = forced_ids(tok, row["prompt"], partial_thought(text))
            logits = last(before)
        answers.append((text, (logits[one] - logits[zero]).sigmoid().item()))
    return answers

def same(a, b):
    assert [text for text, _ in a] == [text for text, _ in b]
    assert [p for _, p in a] == pytest.approx([p for _, p in b], abs=1e-4)

def asked(model, tok, rows, cfg): return [(p["completion"], p["p_entail"]) for p in predict_rows(model, tok, rows, cfg, progress=False, mode="forced")]

@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in LONG)])
def test_a_family_scores_the_same_in_the_run_saved_alone_and_merged(tmp_path, name):
    from transformers import AutoModelForCausalLM
    cfg = config(tmp_path, make(tmp_path/name, name), quantization="none" if name in UNQUANTISED else "nf4")
    check_ready(cfg)
    prep, model = prepare(cfg), seeded_lora(load_base(cfg), cfg)
    assert preflight(prep)["memory_gib"]["total"] > 0
    assert [k for k, (ok, _) in proofs(prep).items() if not ok] == []
    fit(prep, model, tmp_path/"out", on_log=lambda logs: None)
    judged = prep.eval_rows[:4]
    assert len({len(encode_prompt(prep.tok, r["prompt"])) for r in judged}) > 1, "rows of one length need no padding"
    in_run = asked(model, prep.tok, judged, cfg)
    saved = load_for_inference(cfg, tmp_path/"out"/"adapter")
    again = asked(saved, prep.tok, judged, cfg)
    same(in_run, again)
    same(again, [asked(saved, prep.tok, [r], cfg)[0] for r in judged])
    same(again, by_full_forwards(saved, prep.tok, judged, cfg.max_new_tokens))
    merge_adapter(cfg, tmp_path/"out"/"adapter", torch.float32).save_pretrained(tmp_path/"merged")
    same(again, by_full_forwards(AutoModelForCausalLM.from_pretrained(tmp_path/"merged").eval(), prep.tok, judged, cfg.max_new_tokens))
    untrained = by_full_forwards(load_base(cfg, train=False), prep.tok, judged, cfg.max_new_tokens)
    assert max(abs(p - q) for (_, p), (_, q) in zip(again, untrained)) > 1e-3, "the adapter changed nothing"
    own_loss_agrees(model, prep, tmp_path/"x")
    assert scoring(model.get_base_model()) == (FAST | LONG)[name][2]
