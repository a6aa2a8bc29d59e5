"""Sampling and training see the same tokens, whatever the template and the tokenizer."""

import random

import numpy as np
import pytest
from chat_styles import KINDS, OPEN_THOUGHT_STYLES, STYLES, make_tokenizer, random_chat, random_text

from align.data.chat_encoder import ChatEncoder
from align.records import Comparison, Demonstration, Message, Response

ONE_TURN = ("qwen3_no_think",)  # writes an empty thought into the last turn only, so that longer dialogues are refused


def as_messages(chat):
    return tuple(Message(one["role"], one["content"]) for one in chat)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_row_starts_with_the_prompt_that_is_sampled_from(kind, adds_bos):
    """The prompt is also what transformers makes of it, without a BOS besides the template's own."""
    compared = 0
    for name, (source, _) in STYLES.items():
        tokenizer = make_tokenizer(kind, source, adds_bos=adds_bos)
        encoder, dice = ChatEncoder(tokenizer), random.Random(name)
        for seed in range(6):
            chat = random_chat(seed, rounds=0 if name in ONE_TURN else seed % 3)
            messages = as_messages(chat)
            expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            prompt = encoder.prompt_ids(messages, 0)
            assert prompt.tolist() == expected, name
            answers = [random_text(dice) for _ in range(2)]
            rows = [Comparison(messages, tuple(map(Response, answers)))]
            rows += [Demonstration((*messages, Message("assistant", answer))) for answer in answers]
            groups = [encoder.encode(row, 0) for row in rows]
            for sequence in (one for group in groups for one in group.sequences):
                assert sequence.ids[: len(prompt)].tolist() == expected, (name, messages, answers)
                assert sequence.loss_mask[len(prompt) :].all() and len(sequence.ids) > len(prompt)
                compared += 1
            together, alone = groups[0].sequences, [group.sequences[0] for group in groups[1:]]
            assert [one.ids.tolist() for one in together] == [one.ids.tolist() for one in alone]
    assert compared == len(STYLES) * 6 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_crosses_the_end_of_the_prompt(kind):
    """The rest of a row is the response's text, whose first characters would merge with the prompt's last ones."""
    tokenizer = make_tokenizer(kind, STYLES["base"][0], adds_bos=False)
    encoder = ChatEncoder(tokenizer)
    prompt = encoder.prompt_ids(as_messages([{"role": "user", "content": "the mo"}]), 0)
    group = encoder.encode(Comparison((Message("user", "the mo"),), (Response("on is round"), Response("on"))), 0)
    for sequence, text in zip(group.sequences, ("on is round", "on"), strict=True):
        assert sequence.ids[: len(prompt)].tolist() == prompt.tolist()
        said = tokenizer.decode(sequence.ids[sequence.loss_mask]).replace("</s>", "").strip()
        assert said == text
    assert encoder.counts["tokens merged across the prompt boundary"] == 2


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", OPEN_THOUGHT_STYLES)
@pytest.mark.parametrize(
    ("response", "trained"),
    [
        ("<think>\nfar\n</think>\n\nyes", "far\n</think>\n\nyes{end}"),
        ("<think>far</think>yes", "far</think>yes{end}"),
        ("far\n</think>\n\nyes", "far\n</think>\n\nyes{end}"),  # as it is sampled
    ],
)
def test_a_response_continues_the_thought_that_the_generation_prompt_opens(name, response, trained, adds_bos):
    source, end = OPEN_THOUGHT_STYLES[name]
    tokenizer = make_tokenizer("gpt2", source, adds_bos=adds_bos)
    chat = [{"role": "user", "content": "Is the moon far?"}]
    messages = as_messages(chat)
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    expected = tokenizer(asked + trained.format(end=end), add_special_tokens=False)["input_ids"]
    encoder = ChatEncoder(tokenizer)
    prompt = encoder.prompt_ids(messages, 0)
    rows = [
        Comparison(messages, (Response(response), Response(response + "!"))),
        Demonstration((*messages, Message("assistant", response))),
    ]
    for row in rows:
        sequence = encoder.encode(row, 0).sequences[0]
        assert sequence.ids.tolist() == expected
        assert np.flatnonzero(sequence.loss_mask).tolist() == list(range(len(prompt), len(expected)))


CUT = [name for name in STYLES if name not in ("qwen3", "qwen3_no_think", "smollm3")]


@pytest.mark.parametrize("finish", ["length", "content_filter", "stop", None])
@pytest.mark.parametrize("name", CUT)
def test_a_response_that_was_cut_off_has_no_end_of_turn(name, finish):
    source, end = STYLES[name]
    tokenizer = make_tokenizer("llama3", source, adds_bos=False)
    prompt = (Message("user", "Is the moon far?"),)
    said = "yes, far away"
    rows = [
        Comparison(prompt, (Response(said, 1.0, finish=finish), Response("no", 0.0, finish="stop"))),
        Demonstration((*prompt, Message("assistant", said)), finish=finish),
    ]
    is_cut = finish in ("length", "content_filter")
    for row in rows:
        group = ChatEncoder(tokenizer).encode(row, 0)
        text = tokenizer.decode(group.sequences[0].ids[group.sequences[0].loss_mask])
        assert text.strip().endswith("away" if is_cut else end or "</s>"), text
        assert [one.is_cut for one in group.sequences] == [is_cut, False][: len(group.sequences)]
        closed = ChatEncoder(tokenizer, closes_cut=True).encode(row, 0).sequences[0]
        assert tokenizer.decode(closed.ids).endswith(end or "</s>")  # where a reward is read


def test_a_cut_thought_is_trained_without_its_end():
    source, _ = OPEN_THOUGHT_STYLES["deepseek_r1"]
    tokenizer = make_tokenizer("gpt2", source, adds_bos=True)
    prompt = (Message("user", "Is the moon far?"),)
    cut = Comparison(prompt, (Response("so far, so", finish="length"), Response("far</think>yes", finish="stop")))
    first, second = ChatEncoder(tokenizer).encode(cut, 0).sequences
    assert tokenizer.decode(first.ids[first.loss_mask]) == "so far, so"
    assert tokenizer.decode(second.ids[second.loss_mask]) == "far</think>yes</s>"


@pytest.mark.parametrize(
    ("opened", "closed"), [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>")]
)
def test_special_marks_of_a_thought_stay_special_in_responses_only(opened, closed):
    tokenizer = make_tokenizer("llama3", STYLES["chatml"][0], adds_bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [opened, closed]})
    said = f"{opened}far{closed}yes<|im_end|>no"
    record = Comparison((Message("user", said),), (Response(said), Response("no")))
    sequence = ChatEncoder(tokenizer).encode(record, 0).sequences[0]
    for mark in (opened, closed):
        assert (sequence.ids[sequence.loss_mask] == tokenizer.convert_tokens_to_ids(mark)).sum() == 1
        assert (sequence.ids == tokenizer.convert_tokens_to_ids(mark)).sum() == 1
    assert (sequence.ids == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 2
    assert tokenizer.decode(sequence.ids[sequence.loss_mask]) == said + "<|im_end|>"
