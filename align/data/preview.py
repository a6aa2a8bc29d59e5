"""A token group as coloured text: which tokens are trained, shared by several responses, or cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.data.token_groups import Ids, TokenGroup, TokenSequence, common_prefix

BORDER, NEWLINE = "╎", "⏎"

STYLES = {
    "prompt": "dim",
    "trained": "green",
    "trained, shared by several responses": "cyan",
    "cut": "red strike",
}
PROMPT, TRAINED, SHARED, CUT = STYLES

StyledToken = tuple[int, str]  # token id, key of STYLES


def preview(group: TokenGroup, tokenizer: PreTrainedTokenizerBase, *, uncut: TokenGroup | None = None) -> Text:
    """Return the tokens of a group below a legend: the prompt once, then each response with its counts.

    `uncut` is the same row encoded without limits; its tokens that `group` lacks are shown as cut.
    """
    text = Text(f"{NEWLINE} newline  {BORDER} end of a token  ")
    for kind, style in STYLES.items():
        text.append(f"[{kind}] ", style=style)
    prompt_length = group.prompt_length
    text.append(f"\nrow {group.row + 1}: {prompt_length} prompt tokens\n", style="bold")
    for index, sequence in enumerate(group.sequences):
        num_shared = _num_shared(group, index)
        tokens = [*zip(sequence.ids.tolist(), _kinds(sequence, num_shared), strict=True)]
        num_shown = prompt_length
        if uncut is not None:
            place, removed = _removed(sequence.ids, uncut.sequences[index].ids)
            tokens[place:place] = [(token, CUT) for token in removed.tolist()]
            num_shown += len(removed) if place < prompt_length else 0
        if index == 0:
            _append(text, tokens[:num_shown], tokenizer)
        text.append(_title(group, index, num_shared=max(0, num_shared - prompt_length)), style="bold")
        _append(text, tokens[num_shown:], tokenizer)
    return text


def _num_shared(group: TokenGroup, index: int) -> int:
    """Return how many leading tokens of a sequence another sequence of the group has, too."""
    ids = group.sequences[index].ids
    others = (other.ids for place, other in enumerate(group.sequences) if place != index)
    return max((common_prefix(ids, other) for other in others), default=0)


def _kinds(sequence: TokenSequence, num_shared: int) -> list[str]:
    """Return the kind of each token, a key of STYLES."""
    return [
        (SHARED if place < num_shared else TRAINED) if in_loss else PROMPT
        for place, in_loss in enumerate(sequence.loss_mask.tolist())
    ]


def _removed(ids: Ids, uncut: Ids) -> tuple[int, Ids]:
    """Return the place and the tokens that were removed from `uncut`, in one piece, to get `ids`."""
    place = common_prefix(ids, uncut)
    return place, uncut[place : place + len(uncut) - len(ids)]


def _title(group: TokenGroup, index: int, *, num_shared: int) -> str:
    label = ", chosen" if group.chosen == index else ""
    reward = "" if group.rewards is None else f", reward {group.rewards[index]:g}"
    total = len(group.sequences[index].ids)
    counts = f"{total} tokens, {group.response_lengths[index]} trained, {num_shared} of them shared"
    return f"\nsequence {index + 1} of {len(group.sequences)}{label}{reward}: {counts}\n"


def _append(text: Text, tokens: Sequence[StyledToken], tokenizer: PreTrainedTokenizerBase) -> None:
    for token, kind in tokens:
        text.append(_printable(token, tokenizer), style=STYLES[kind])
        text.append(BORDER, style=STYLES[PROMPT])


def _printable(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token's text, with control characters escaped."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not text.startswith(" "):
        text = " " + text  # SentencePiece decoders drop the space of the first word
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character == "\n":
        return f"{NEWLINE}\n"
    return character if character.isprintable() else character.encode("unicode_escape").decode()
