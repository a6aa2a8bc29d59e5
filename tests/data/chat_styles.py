"""Chat templates in the styles of many model families, and small tokenizers of every kind."""

import random
from pathlib import Path

import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEMPLATES = yaml.safe_load((Path(__file__).parent / "chat_styles.yaml").read_text("utf-8"))
STYLES, OPEN_THOUGHT_STYLES = (  # name -> source, and the end of turn that it writes or None where the encoder adds EOS
    {name: (one["source"], one["end_of_turn"]) for name, one in _TEMPLATES[kind].items()}
    for kind in ("closed", "open_thought")
)

STRIPPING = (
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)  # as in Phi-3, they swallow the whitespace after them
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|head|>", "<|/head|>", "<|eot|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|START_OF_TURN|>", "<|END_OF_TURN|>", "<|USER|>", "<|CHATBOT|>", "<|SYSTEM|>"),
    *("<extra_id_0>", "[gMASK]", "<sop>", "<unk>", "<s>", "</s>"),
)  # fmt: skip
CORPUS = [
    "the moon is round and the sun is far away: yes, no\n\nmaybe 1 2 3 100. user assistant system\n",
    "USER: a moonlit sundown\nASSISTANT: onward, on and on\n\n### Response:\n def f():\n    return 1\n",
]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gpt2_like():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )


def llama3_like():
    tokenizer, trainer = gpt2_like()
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer, trainer


def roberta_like():
    tokenizer, trainer = gpt2_like()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer, trainer


def sentencepiece_like(scheme="first"):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)


def legacy_llama_like():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)


KINDS = {
    "gpt2": gpt2_like,
    "llama3": llama3_like,
    "roberta": roberta_like,
    "sentencepiece": sentencepiece_like,
    "legacy": legacy_llama_like,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def make_tokenizer(kind, source, *, adds_bos):
    """Return a tokenizer with this chat template; `adds_bos` puts BOS before plain text."""
    tokenizer, trainer = KINDS[kind]()
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=True) for token in STRIPPING]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    if adds_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=source, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


PIECES = ("moon", "on", "sun", " ", "\n", "\n\n", "é", "月", "🎉", "the", " is", "1", "00", ",", ":", "  ", "x", "\t")


def random_text(dice):
    """Return a text that may begin and end with whitespace, or in the middle of a word."""
    while not (text := "".join(dice.choice(PIECES) for _ in range(dice.randint(1, 9)))).strip():
        pass
    return text


def random_chat(seed, *, rounds):
    """Return a chat of these many rounds, and a user message after them."""
    dice = random.Random(seed)
    return [{"role": ("user", "assistant")[i % 2], "content": random_text(dice)} for i in range(2 * rounds + 1)]
