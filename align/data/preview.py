"""A token group as coloured text, for people: what is trained, shared and cut, token by token."""

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

Token = tuple[int, str]  # its id and a key of STYLES


def preview(group: TokenGroup, tokenizer: PreTrainedTokenizerBase, *, uncut: TokenGroup | None = None) -> Text:
    """The group's tokens under a legend: the prompt once, then each response with its counts.

    `uncut` is the same row encoded without limits: what it has and the group lacks is shown as cut.
    """
    asked = min(int(sequence.loss_mask.argmax()) for sequence in group.sequences)
    text = Text(f"{NEWLINE} newline  {BORDER} end of a token  ")
    for kind, style in STYLES.items():
        text.append(f"[{kind}] ", style=style)
    text.append(f"\nrow {group.row + 1}: {asked} prompt tokens\n", style="bold")
    for index, sequence in enumerate(group.sequences):
        shared = _num_shared(group, index)
        tokens = [*zip(sequence.ids.tolist(), _kinds(sequence, shared), strict=True)]
        num_asked = asked
        if uncut is not None:
            place, lost = _lost(sequence.ids, uncut.sequences[index].ids)
            tokens[place:place] = [(token, CUT) for token in lost.tolist()]
            num_asked += len(lost) if place < asked else 0
        if index == 0:
            _append(text, tokens[:num_asked], tokenizer)
        text.append(_title(group, index, shared=max(0, shared - asked)), style="bold")
        _append(text, tokens[num_asked:], tokenizer)
    return text


def _num_shared(group: TokenGroup, index: int) -> int:
    """How many of a sequence's first tokens another sequence of the group begins with."""
    ids = group.sequences[index].ids
    others = (other.ids for place, other in enumerate(group.sequences) if place != index)
    return max((common_prefix(ids, other) for other in others), default=0)


def _kinds(sequence: TokenSequence, num_shared: int) -> list[str]:
    """What becomes of each token."""
    marks = enumerate(sequence.loss_mask.tolist())
    return [(SHARED if place < num_shared else TRAINED) if trained else PROMPT for place, trained in marks]


def _lost(ids: Ids, uncut: Ids) -> tuple[int, Ids]:
    """Where tokens were taken out of `uncut` in one piece to make `ids`, and which."""
    place = common_prefix(ids, uncut)
    return place, uncut[place : place + len(uncut) - len(ids)]


def _title(group: TokenGroup, index: int, *, shared: int) -> str:
    label = ", chosen" if group.chosen == index else ""
    reward = "" if group.rewards is None else f", reward {group.rewards[index]:g}"
    total = len(group.sequences[index].ids)
    counts = f"{total} tokens, {group.response_lengths[index]} trained, {shared} of them shared"
    return f"\nsequence {index + 1} of {len(group.sequences)}{label}{reward}: {counts}\n"


def _append(text: Text, tokens: Sequence[Token], tokenizer: PreTrainedTokenizerBase) -> None:
    for token, kind in tokens:
        text.append(_shown(token, tokenizer), style=STYLES[kind])
        text.append(BORDER, style=STYLES[PROMPT])


def _shown(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token's text, harmless to a terminal: a control character is written as its escape."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not text.startswith(" "):
        text = " " + text  # SentencePiece decoders drop the space of a first word
    return "".join(map(_visible, text))


def _visible(mark: str) -> str:
    if mark == "\n":
        return f"{NEWLINE}\n"
    return mark if mark.isprintable() else mark.encode("unicode_escape").decode()
