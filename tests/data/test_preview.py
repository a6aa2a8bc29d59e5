import io

import pytest
from rich.console import Console
from toy_chat import CHATML, dialogue, metaspace, pair, tokenizer_of

from align.data.chat_encoder import ChatEncoder
from align.data.preview import BORDER, CUT, NEWLINE, PROMPT, SHARED, STYLES, TRAINED, preview
from align.records import Comparison, Demonstration, Response

TOKENIZER = tokenizer_of(CHATML)


def shown(group, **settings):
    """Return the (kind, text) pairs after the legend, without borders."""
    text = preview(group, TOKENIZER, **settings)
    kinds = {style: kind for kind, style in STYLES.items()}
    start = text.plain.index("\n")
    tokens = [(kinds.get(span.style), text.plain[span.start : span.end]) for span in text.spans if span.start > start]
    return [(kind, piece) for kind, piece in tokens if kind and piece != BORDER]


def joined(tokens, kind):
    return "".join(piece for each, piece in tokens if each == kind).replace(NEWLINE, "")


def test_each_kind_of_token_has_its_style_and_the_prompt_is_shown_once():
    group = ChatEncoder(TOKENIZER).encode(pair("Is the moon far?", "yes, far away", "yes, round"), 3)
    tokens = shown(group)
    assert joined(tokens, PROMPT) == "<|im_start|>user\nIs the moon far?<|im_end|>\n<|im_start|>assistant\n"
    assert joined(tokens, SHARED) == "yes,yes,"
    assert joined(tokens, TRAINED) == " far away<|im_end|> round<|im_end|>"
    assert joined(tokens, CUT) == ""


def test_every_token_ends_in_a_border_and_every_newline_is_marked():
    group = ChatEncoder(TOKENIZER).encode(Demonstration(dialogue("1\n2", "yes")), 0)
    body = preview(group, TOKENIZER).plain.split("\n", 1)[1]
    assert body.count(BORDER) == len(group.sequences[0].ids)
    assert body.count(NEWLINE) == 4  # after user, between 1 and 2, after the end of turn, after assistant


def test_titles_show_the_token_counts():
    plain = preview(ChatEncoder(TOKENIZER).encode(pair("Is the moon far?", "yes, far", "no"), 12), TOKENIZER).plain
    lengths = [len(TOKENIZER.encode(text)) for text in ("yes, far<|im_end|>", "no<|im_end|>")]
    asked = len(TOKENIZER.encode("<|im_start|>user\nIs the moon far?<|im_end|>\n<|im_start|>assistant\n"))
    assert f"row 13: {asked} prompt tokens" in plain
    for title in (
        f"sequence 1 of 2, chosen, reward 1: {asked + lengths[0]} tokens, {lengths[0]} trained, 0 of them shared",
        f"sequence 2 of 2, reward 0: {asked + lengths[1]} tokens, {lengths[1]} trained, 0 of them shared",
    ):
        assert title in plain
    without = Comparison(dialogue("1"), (Response("yes"),))
    assert "sequence 1 of 1: " in preview(ChatEncoder(TOKENIZER).encode(without, 0), TOKENIZER).plain


@pytest.mark.parametrize(
    ("policy", "lost"), [("cut_prompt", "<|im_start|>user\none two"), ("cut_response", "moon is far away<|im_end|>")]
)
def test_cut_tokens_are_shown(policy, lost):
    record = Comparison(dialogue("one two three"), (Response("yes, the moon is far away"),))
    uncut = ChatEncoder(TOKENIZER).encode(record, 0)
    limit = len(uncut.sequences[0].ids) - len(TOKENIZER.encode(lost if policy == "cut_prompt" else " " + lost))
    group = ChatEncoder(TOKENIZER, max_length=limit, overlong=policy).encode(record, 0)
    tokens = shown(group, uncut=uncut)
    assert joined(tokens, CUT).strip() == lost
    assert "".join(piece for _, piece in tokens).replace(NEWLINE, "") == TOKENIZER.decode(uncut.sequences[0].ids)


def test_control_characters_and_markup_are_escaped():
    nasty = "[red]x[/red] [/] \x1b[31m \x07 \u202e \ud800".encode("utf-8", "replace").decode() + " \\n"
    group = ChatEncoder(TOKENIZER).encode(pair("1", nasty, "[/bold]"), 0)
    screen = io.StringIO()
    Console(file=screen, color_system=None, width=1000).print(preview(group, TOKENIZER))
    printed = screen.getvalue().replace(BORDER, "")
    assert all(mark.isprintable() or mark == "\n" for mark in printed)
    for kept in ("[red]x[/red] [/]", "\\x1b[31m", "\\x07", " \\n", "[/bold]"):
        assert kept in printed


def test_spaces_of_a_sentencepiece_tokenizer_are_shown():
    tokenizer = tokenizer_of(CHATML, metaspace)
    group = ChatEncoder(tokenizer).encode(pair("the moon", "the sun is", "no"), 0)
    assert "the sun is<|im_end|>" in preview(group, tokenizer).plain.replace(BORDER, "")
