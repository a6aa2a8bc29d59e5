"""A judge for dialogues: the longer the last answer, the better."""

from align.rewards.verdicts import Verdict


def by_length():
    return lambda groups: [tuple(Verdict(float(len(text))) for text in responses) for _, responses in groups]
