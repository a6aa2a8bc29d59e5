"""Tokenizers in GGUF files: byte-level BPE and SentencePiece's BPE, special tokens, and the chat template."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, cast

import gguf
from tokenizers import Tokenizer
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerBase

from align.errors import InputError

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # llama.cpp's names of the two kinds
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # SentencePiece's character for a space
UNMERGED_SCORE = -1e6  # of tokens that no merge makes: below that of every merge
# llama.cpp's names of pre-tokenizers, by the regular expression in tokenizer.json
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"]
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITS = {
    rf"{LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}": "smaug-bpe",
    rf"{LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}": "qwen2",
    rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}": "tekken",
    rf"{CASED[0]}{ENDING}|{CASED[1]}{ENDING}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}": "gpt-4o",
}
# The same split, for vocabularies whose whole words are taken before merges (`ignore_merges`)
WHOLE_WORDS = {"smaug-bpe": "llama-bpe"}
SPECIAL = ("bos", "eos", "unk", "pad")
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
PENALTY = "repetition_penalty"


class Vocabulary(NamedTuple):
    """A tokenizer in the form of a GGUF file."""

    model: str  # BYTE_LEVEL or SENTENCEPIECE
    pre: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    scores: list[float] | None  # of SentencePiece
    space_prefix: bool | None  # whether SentencePiece puts a space before the text


def vocabulary(tokenizer: PreTrainedTokenizerBase, *, size: int, pre: str | None = None) -> Vocabulary:
    """Return the vocabulary of a tokenizer, filled up to `size`, the number of embeddings.

    `pre` names the pre-tokenizer; by default it is recognized by the way the tokenizer splits text. Raises
    `InputError` for another kind of tokenizer, and for a split that llama.cpp has no name for.
    """
    parts = _parts(tokenizer)
    model = parts["model"]
    is_byte_level = any(step["type"] == "ByteLevel" for step in _steps(parts["pre_tokenizer"]))
    if model["type"] != "BPE" or not (is_byte_level or model.get("byte_fallback")):
        raise InputError(
            f"a tokenizer of the kind {model['type']} is not exported to GGUF; byte-level BPE and SentencePiece's BPE "
            "with byte fallback are",
            ("policy",),
        )
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(names) >= size:
        raise InputError(f"the tokenizer has token {max(names)}, and the model {size} embeddings", ("policy",))
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    added = tokenizer.added_tokens_decoder  # built anew at each access
    types = [_type(number, names, added, model) for number in range(size)]
    tokens = [
        token.replace(SPACE, " ") if kind == gguf.TokenType.USER_DEFINED and not is_byte_level else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if is_byte_level:
        return Vocabulary(BYTE_LEVEL, pre or _pre_tokenizer(parts), tokens, types, merges, None, None)
    return Vocabulary(
        SENTENCEPIECE, pre or "default", tokens, types, merges, _scores(tokens, merges), _has_space_prefix(parts)
    )


def add_vocabulary(writer: gguf.GGUFWriter, found: Vocabulary) -> None:
    """Add a vocabulary to a file."""
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    writer.add_token_merges(found.merges)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)


def add_special_tokens(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> list[str]:
    """Add special tokens, the chat template and the settings of generation; return notes on what a file cannot hold.

    A file has one EOS token and one token that ends a turn.
    """
    known: dict[str, Any] = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    for name, number in known.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    added, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    ids, text = cast("list[int]", added), cast("list[int]", plain)
    writer.add_add_bos_token(bool(ids) and ids[0] == known["bos"] and ids[:1] != text[:1])
    writer.add_add_eos_token(bool(ids) and ids[-1] == known["eos"] and ids[-1:] != text[-1:])
    template: Any = tokenizer.chat_template
    if template:
        writer.add_chat_template(template if isinstance(template, str) else _named(template))
    return [] if generation is None else _add_generation(writer, generation, known["eos"])


def _add_generation(writer: gguf.GGUFWriter, generation: GenerationConfig, eos: int | None) -> list[str]:
    ends: Any = generation.eos_token_id
    stops = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None and end != eos]
    if eos is None and stops:
        writer.add_eos_token_id(stops.pop(0))
    if stops:
        writer.add_eot_token_id(stops[0])
    if generation.do_sample:
        for name, key in SAMPLING.items():
            if (value := getattr(generation, name, None)) is not None:
                getattr(writer, f"add_sampling_{key}")(value)
    if (penalty := getattr(generation, PENALTY, None)) not in (None, 1.0):
        writer.add_sampling_penalty_repeat(penalty)
    return [f"generation also stops at the tokens {stops[1:]}, which a GGUF file has no key for"] if stops[1:] else []


def _named(templates: dict[str, str]) -> list[dict[str, str]]:
    """Return several named chat templates in the form of the writer."""
    return [{"name": name, "template": text} for name, text in templates.items()]


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of the tokenizer's tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(f"a {type(tokenizer).__name__} has no tokenizer.json, which GGUF export reads", ("policy",))
    return json.loads(backend.to_str())


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, of which a sequence has several."""
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def _pre_tokenizer(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer."""
    steps = _steps(parts["pre_tokenizer"])
    kinds = [step["type"] for step in steps]
    if steps[0].get("add_prefix_space"):
        pass  # none of the names has it
    elif kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    elif kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in SPLITS:
        name = SPLITS[steps[0]["pattern"]["Regex"]]
        return WHOLE_WORDS.get(name, name) if parts["model"].get("ignore_merges") else name
    raise InputError(
        f"llama.cpp has no name that `align` knows for the pre-tokenizer {json.dumps(parts['pre_tokenizer'])[:200]}; "
        "set pre_tokenizer to its name in llama.cpp (tokenizer.ggml.pre)",
        ("pre_tokenizer",),
    )


def _type(number: int, names: dict[int, str], added: dict[int, AddedToken], model: dict[str, Any]) -> gguf.TokenType:
    """Return the kind of a token."""
    if number not in names:
        return gguf.TokenType.UNUSED
    if names[number] == model.get("unk_token"):
        return gguf.TokenType.UNKNOWN
    if model.get("byte_fallback") and BYTE.fullmatch(names[number]):
        return gguf.TokenType.BYTE
    if number in added:
        return gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return a score for each token that orders merges as the tokenizer does: minus the rank of the first one to it."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    return [-float(ranks[token]) if token in ranks else UNMERGED_SCORE for token in tokens]


def _has_space_prefix(parts: dict[str, Any]) -> bool:
    steps = [*_steps(parts["normalizer"]), *_steps(parts["pre_tokenizer"])]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in steps
    )
