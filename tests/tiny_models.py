"""Random models of a few thousand weights in two families, each with a tokenizer of its own: small enough to
learn a form within seconds."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nli_ft.rows import sft_row

COLOURS = "red green blue black white grey brown pink".split()
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def box_rows(n, template="brief"):
    """Rows of different lengths. Their text shows the rule of their label. If `template` is None, the two wordings take
    turns, two rows each."""
    rows = []
    for i in range(n):
        box, ball = COLOURS[i % 8], COLOURS[(i * 3 + 1 + i // 8) % 8]
        said = ball if i % 2 else box
        premise = f"The {box} box holds a {ball} ball" + " today" * (i % 5) + "."
        wording = template or ("brief" if i % 4 < 2 else "standard")
        rows.append(
            sft_row(
                i, premise, f"The {said} ball is in the {box} box.", f"It is {said}.", i % 2, "test", wording
            )
        )
    return rows


def _tokenizer(size, special, **named):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rows = box_rows(24, None)
    texts = [m["content"] for r in rows for m in r["prompt"] + r["completion"]]
    core.train_from_iterator(texts, how)
    more = [s for s in special if s not in named.values()]
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=more, **named)


def _shape(tok):
    ids = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    sizes = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    return dict(vocab_size=len(tok), **sizes, **ids)


def mistral():
    "Prompts with [INST] and without a chat template. It has two key heads."
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tok = _tokenizer(420, special, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>")
    return tok, MistralForCausalLM(MistralConfig(sliding_window=None, num_key_value_heads=2, **_shape(tok)))


def qwen2():
    "A chat template, no BOS, biases in the attention, one key head, the head tied to the embeddings."
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = _tokenizer(360, special, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tok.chat_template = CHAT
    return tok, Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, tie_word_embeddings=True, **_shape(tok)))


FAMILIES = dict(mistral=mistral, qwen2=qwen2)


def save_model(family, folder, **how):
    "Make a family's model and save it with its tokenizer. `how` goes to `save_pretrained`."
    torch.manual_seed(0)
    tok, model = FAMILIES[family]()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5)
            else:
                p.add_(0.1 * torch.randn_like(p))  # norms and biases that are not trivial
    model.save_pretrained(folder, **how)
    tok.save_pretrained(folder)
    return folder
