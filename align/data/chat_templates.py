"""Chat templates: the built-in ones, and setting the template of a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from align.errors import InputError, one_line
from align.registry import suggest


class BuiltIn(NamedTuple):
    """A chat template. Its source writes the variable `end_of_turn`: this token, or EOS if the vocabulary lacks it."""

    end_of_turn: str | None
    source: str


def apply_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    """Set the chat template of a tokenizer and return its source.

    `name` is one of the tokenizer's own named templates, a key of `TEMPLATES`, or a path that ends in .jinja; None
    keeps the tokenizer's only or default template. Raise `InputError` for an unknown name, a file that cannot be read,
    or a tokenizer without a template, or with several and no default.
    """
    own = _named(tokenizer)
    if name is None:
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer has no chat template: set chat_template to {', '.join(TEMPLATES)} or a .jinja file"
            )
        if own and "default" not in own:
            raise InputError(
                f"the tokenizer has several chat templates and no default: set chat_template to one of {', '.join(own)}"
            )
        return tokenizer.get_chat_template()
    if name in own:
        tokenizer.chat_template = {**own, "default": own[name]}  # saved with the others
        return own[name]
    source = _read(Path(name)) if name.endswith(".jinja") else _built_in(tokenizer, name)
    tokenizer.chat_template = source
    return source


def _named(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the named templates of a tokenizer that has several."""
    templates: Any = tokenizer.chat_template
    return templates if isinstance(templates, dict) else {}


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts a BOS token before plain text."""
    ids: Any = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat template {path} cannot be read: {one_line(error)}") from error


def _built_in(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if name not in TEMPLATES:
        known = {**_named(tokenizer), **TEMPLATES}
        raise InputError(f"unknown chat template {name!r}; {suggest(name, known)}, or a path to a .jinja file")
    token, source = TEMPLATES[name]
    # A token that the vocabulary lacks would need a new, untrained embedding; EOS has one.
    is_known = token in {added.content for added in tokenizer.added_tokens_decoder.values()}
    if not is_known and tokenizer.eos_token is None:
        raise InputError(f"chat template {name!r} ends a turn with EOS, and the tokenizer has no eos_token")
    bos = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    return f"{{% set end_of_turn = {repr(token) if is_known else 'eos_token'} %}}{bos}{source}"


TEMPLATES = {
    "chatml": BuiltIn(
        end_of_turn="<|im_end|>",
        source="{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + end_of_turn + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    # For base models: the contents without markup, and EOS after a response.
    "plain": BuiltIn(
        end_of_turn=None,
        source="{% for message in messages %}"
        "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ end_of_turn }}{% endif %}"
        "{% endfor %}",
    ),
    # The format of Nemotron-4-340B-Instruct: a response ends where the next turn's header starts.
    "steerlm": BuiltIn(
        end_of_turn="<extra_id_1>",
        source="{{ '<extra_id_0>System\n' }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
        "{{ '\n<extra_id_1>' }}"
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'] | capitalize + '\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' and end_of_turn != '<extra_id_1>' %}{{ end_of_turn }}{% endif %}"
        "{{ '\n<extra_id_1>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant\n' }}{% endif %}",
    ),
}
