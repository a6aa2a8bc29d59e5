"""IFD against the policy's own logits, and its order for true and shuffled answers."""

from functools import partial

import pytest
import torch

from align import ChatEncoder, Trainer, TrainSettings
from align.evaluation.likelihood import likelihoods
from align.records import Demonstration, Message, ToolCall
from align.testing import tiny_policy
from align.testing.tiny import ANIMALS, COLORS, tiny_demonstrations
from align.train.instruction_difficulty import instruction_difficulty


def mean_loss(policy, tokenizer, messages):
    """The mean negative log-likelihood of the last message and its end of turn, from transformers' own logits."""
    chat = [{"role": message.role, "content": message.content} for message in messages]
    before = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
    whole = before + chat[-1]["content"] + "<|im_end|>"
    start = len(tokenizer(before)["input_ids"])
    ids = torch.tensor([tokenizer(whole)["input_ids"]])
    with torch.no_grad():
        logps = policy.hf(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
    return -logps.gather(1, ids[0, 1:, None])[start - 1 :].mean().item()


def test_ifd_is_the_ratio_of_mean_losses_with_and_without_the_dialogue_before():
    policy, tokenizer = tiny_policy()
    plain, _ = tiny_policy()
    turns = ("user", "assistant", "user", "assistant")
    texts = ("What color is the dog?", "No, the dog is red.", "And the cat?", "The cat is blue.")
    long = Demonstration(tuple(map(Message, turns, texts)))
    rows = [*tiny_demonstrations(num_rows=3), long]
    found = instruction_difficulty(rows, ChatEncoder(tokenizer), partial(likelihoods, policy))
    for row, value in zip(rows, found, strict=True):
        alone = (Message("user", ""), row.messages[-1])
        expected = mean_loss(plain, tokenizer, row.messages) / mean_loss(plain, tokenizer, alone)
        assert value == pytest.approx(expected, rel=1e-4)


def test_answers_of_other_questions_are_more_difficult_than_the_true_ones(tmp_path):
    policy, tokenizer = tiny_policy()
    facts = zip(ANIMALS, COLORS, strict=True)
    rows = [
        Demonstration((Message("user", f"Which animal is {color}?"), Message("assistant", f"It is the {animal}.")))
        for animal, color in facts
    ]
    settings = TrainSettings(learning_rate=1e-2, prompts_per_step=6, epochs=60)
    Trainer(policy, tokenizer, rows, loss="sft", settings=settings, folder=tmp_path).train()
    answers = [row.messages[1] for row in rows]
    others = zip(rows, answers[1:] + answers[:1], strict=True)
    shuffled = [Demonstration((row.messages[0], answer)) for row, answer in others]
    encoder = ChatEncoder(tokenizer)
    true, false = (instruction_difficulty(each, encoder, partial(likelihoods, policy)) for each in (rows, shuffled))
    assert max(true) < 0.5 < min(false)


def test_a_row_that_does_not_fit_has_no_difficulty_and_is_counted():
    policy, tokenizer = tiny_policy()
    encoder = ChatEncoder(tokenizer, max_length=60)
    long = Demonstration((Message("user", "How? " * 50), Message("assistant", "So.")))
    found = instruction_difficulty([*tiny_demonstrations(num_rows=1), long], encoder, partial(likelihoods, policy))
    assert found[0] is not None and found[1] is None
    assert encoder.counts["dropped:overlong"] == 1
    assert instruction_difficulty([long], encoder, partial(likelihoods, policy)) == [None]


def test_a_row_without_a_prompt_has_no_difficulty():
    policy, tokenizer = tiny_policy()
    answer = Message("assistant", "So.")
    empty = [Demonstration((answer,)), Demonstration((Message("user", " "), answer))]
    rows = [*empty, *tiny_demonstrations(num_rows=1)]
    found = instruction_difficulty(rows, ChatEncoder(tokenizer), partial(likelihoods, policy))
    assert found[:2] == [None, None] and found[2] is not None


def test_the_dialogue_is_given_with_its_tools_and_the_answer_with_its_calls():
    tools, seen = ({"type": "function", "function": {"name": "weather"}},), []

    class Recorder:
        def encode(self, record, index):
            seen.append(record)

    answer = Message("assistant", "", (ToolCall("weather", '{"city": "Oslo"}'),))
    row = Demonstration((Message("user", "How is Oslo?"), answer), tools=tools)
    assert instruction_difficulty([row], Recorder(), None) == [None]
    assert seen[0].tools == tools and seen[0].responses[0].message == answer
    assert seen[1].messages == (Message("user", ""), answer)
