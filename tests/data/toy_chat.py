"""Tiny tokenizers, chat templates of common kinds, and records to encode."""

from itertools import pairwise

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.records import Comparison, Message, Response

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same text with generation blocks; like TRL's training templates, they include the newline.
CHATML_BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Generation blocks that end before the end-of-turn token, which must be trained anyway
CHATML_SHORT_BLOCKS = CHATML_BLOCKS.replace(
    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
LLAMA3_BLOCKS = LLAMA3.replace(
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}",
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim + '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<|eot|>' }}{% endif %}",
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Like Qwen3's template: thinking is kept in the last message only, and inserted there if it is missing.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<s>",
    "</s>",
    "<extra_id_0>",
    "<extra_id_1>",
)

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


TRAINERS = {byte_level: trainers.BpeTrainer, metaspace: trainers.BpeTrainer, words: trainers.WordLevelTrainer}
CORPUS = [
    "the moon is round and the sun is far away",
    "user assistant system",
    "yes, no\nmaybe 1 2 3 100",
    "a moonlit sundown",
]


def tokenizer_of(template=None, kind=byte_level, special=SPECIAL, **settings) -> PreTrainedTokenizerFast:
    """Return a tiny tokenizer with these special tokens, and `<think>` as an ordinary added token."""
    tokenizer = kind()
    alphabet = {} if kind is words else {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = TRAINERS[kind](vocab_size=400, special_tokens=["<unk>"], show_progress=False, **alphabet)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    known = {"bos_token": "<s>", "eos_token": "</s>"} if "</s>" in special else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **{**known, **settings})


def dialogue(*contents, system=None):
    first = () if system is None else (Message(SYSTEM, system),)
    return first + tuple(Message((USER, ASSISTANT)[i % 2], content) for i, content in enumerate(contents))


def pair(prompt="Is the moon far?", chosen="yes, far away", rejected="no"):
    return Comparison(dialogue(prompt), (Response(chosen), Response(rejected)), chosen=0)


def trained_runs(sequence, tokenizer):
    """Return the text of each maximal run of tokens in the loss."""
    borders = np.flatnonzero(np.diff(sequence.loss_mask.astype(int), prepend=0, append=0)).tolist()
    return [tokenizer.decode(sequence.ids[start:end]) for start, end in list(pairwise(borders))[::2]]


def flat(group):
    return [(one.ids.tolist(), one.loss_mask.tolist()) for one in group.sequences]


TEXTS = {  # template -> source, text of a prompt Q, trained text of a response A
    "CHATML": (CHATML, "<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n", "{A}<|im_end|>"),
    "LLAMA3": (LLAMA3, "<s><|head|>user<|/head|>\n\n{Q}<|eot|><|head|>assistant<|/head|>\n\n", "{A}<|eot|>"),
    "GEMMA": (GEMMA, "<s><start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n", "{A}<end_of_turn>"),
    "QWEN3": (
        QWEN3,
        "<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n{A}<|im_end|>",
    ),
    "LLAMA2": (LLAMA2, "<s>[INST] {Q} [/INST]", " {A} </s>"),
    "ENDLESS": (ENDLESS, "user: {Q}\nassistant:", " {A}</s>"),
    "chatml": (None, "<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n", "{A}<|im_end|>"),
    "plain": (None, "{Q}", "{A}</s>"),
    "steerlm": (
        None,
        "<extra_id_0>System\n\n<extra_id_1>User\n{Q}\n<extra_id_1>Assistant\n",
        "{A}\n<extra_id_1>",
    ),
}


def random_text(dice):
    pieces = ["moon", "sun", " ", "\n", "\n\n", "é", "月", "🎉", "the", " is", "1", ",", "  ", "<think>", "x"]
    return "a" + "".join(dice.choice(pieces) for _ in range(dice.randint(1, 12)))


def adding_bos(template):
    tokenizer = tokenizer_of(template)
    tokenizer.add_bos_token = True
    assert tokenizer.encode("the moon")[0] == tokenizer.bos_token_id
    return tokenizer
