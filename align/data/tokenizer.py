"""A small byte-level BPE tokenizer, trained on given texts, for models that are trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.errors import InputError

TURN_START, TURN_END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = [TURN_START, TURN_END, PAD]
MIN_VOCAB_SIZE = len(SPECIAL) + 256  # one token per byte


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, chat_template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most `vocab_size` tokens that can encode any text. Its EOS token ends a turn.

    Raise `InputError` for a `vocab_size` below 259: 256 bytes and three special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(f"vocab_size is {vocab_size}; 256 bytes and the special tokens need at least {MIN_VOCAB_SIZE}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
