import dataclasses

import pytest

from align.errors import InputError
from align.records import Comparison, Demonstration, Message, Prompt, Response

ASK = Message("user", "Name a prime.")
SAY = Message("assistant", "Seven.")
GOOD, BAD = Response("Seven.", 1.0), Response("Eight.", 0.0)

REFUSED = {
    "an unknown role": (lambda: Message("narrator", "Once"), "'narrator'"),
    "a demonstration without an answer": (lambda: Demonstration((ASK,)), "needs an assistant message"),
    "an empty demonstration": (lambda: Demonstration(()), "needs an assistant message"),
    "a blank answer": (lambda: Demonstration((ASK, Message("assistant", " \n"))), "an assistant message is empty"),
    "one blank answer of two": (
        lambda: Demonstration((ASK, SAY, ASK, Message("assistant", ""))),
        "an assistant message is empty",
    ),
    "an unpaired surrogate of a turn": (
        lambda: Message("user", "\ud83d hi"),
        r"a text contains '\ud83d', an unpaired surrogate",
    ),
    "an unpaired surrogate of a response": (
        lambda: Response("hi \ude00"),
        r"a text contains '\ude00', an unpaired surrogate",
    ),
    "an empty response": (lambda: Response("\t"), "a response is empty"),
    "a reward that is not a number": (lambda: Response("x", float("nan")), "reward is nan"),
    "an infinite reward": (lambda: Response("x", float("-inf")), "reward is -inf"),
    "an attribute that is not a number": (
        lambda: Response("x", None, {"coherence": float("nan")}),
        "coherence is nan; a finite number is needed",
    ),
    "a comparison without a prompt": (lambda: Comparison((), (GOOD,)), "needs a prompt"),
    "a blank prompt": (lambda: Comparison((Message("user", "  "),), (GOOD,)), "needs a prompt"),
    "a comparison without responses": (lambda: Comparison((ASK,), ()), "at least one response"),
    "a group with some rewards missing": (
        lambda: Comparison((ASK,), (GOOD, Response("Eight."))),
        "some responses of a comparison have a reward and some have none",
    ),
    "chosen is out of range": (
        lambda: Comparison((ASK,), (GOOD, BAD), 2),
        "chosen is 2; it must be the index of a response, 0 to 1",
    ),
    "chosen is negative": (lambda: Comparison((ASK,), (GOOD, BAD), -1), "chosen is -1"),
    "a prompt with an answer": (lambda: Prompt((ASK, SAY)), "a prompt must end with a message"),
    "an empty prompt": (lambda: Prompt(()), "a prompt must end with a message"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED.keys())
def test_invalid_records_are_rejected_in_one_line(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_chosen_can_disagree_with_the_rewards():
    flipped = Comparison((ASK,), (BAD, GOOD), chosen=0)
    assert flipped.responses[flipped.chosen].reward < max(response.reward for response in flipped.responses)


def test_records_with_equal_content_are_equal_and_hashable():
    first = Comparison((ASK,), (GOOD, BAD), 0, {"source": "a"})
    again = Comparison(
        (Message("user", "Name a prime."),), (Response("Seven.", 1.0), Response("Eight.", 0.0)), 0, {"source": "a"}
    )
    assert first == again and len({first, again}) == 1


@pytest.mark.parametrize("record", [ASK, GOOD, Demonstration((ASK, SAY)), Comparison((ASK,), (GOOD,)), Prompt((ASK,))])
def test_a_record_cannot_be_changed(record):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, dataclasses.fields(record)[0].name, None)


def test_optional_fields_default_to_unknown():
    assert dict(Response("x").attributes) == {} and Response("x").reward is None
    assert dict(Comparison((ASK,), (GOOD,)).metadata) == {} and Comparison((ASK,), (GOOD,)).chosen is None
