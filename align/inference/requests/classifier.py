"""Scores of token sequences by a sequence classifier that a server of vLLM offers.

Shape legend: K sequences of a group, A labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from pydantic import BaseModel, TypeAdapter

from align.errors import RunError
from align.inference.requests.server_client import Sender, ServerClient
from align.inference.settings import ServerSettings

Scores = list[list[float]]  # [K, A]
# Of vLLM 0.33, entrypoints/pooling/classify: the labels' values as the head gives them, and no second BOS token
REQUEST = {"use_activation": False, "add_special_tokens": False}


class _Classification(BaseModel):
    probs: list[float]


class _Classifications(BaseModel):
    data: list[_Classification]


ANSWER = TypeAdapter(_Classifications)


class ClassifierClient:
    """Asks for the values of the labels, before any activation, with one request for each group of sequences.

    `model`, `settings` and `name` are those of `ServerClient`.
    """

    def __init__(self, model: str, settings: ServerSettings, *, name: str, num_labels: int) -> None:
        self._client = ServerClient(model, settings, name=name)
        self._url = f"{self._client.url.removesuffix('/v1')}/classify"
        self._num_labels = num_labels

    def scores(self, groups: Sequence[Sequence[Sequence[int]]]) -> Iterator[Scores | None]:
        """Yield the scores of each group of token sequences, in order; None if one is too long for the server.

        Raises `RunError` for an answer of another shape, and where the server fails.
        """
        found: dict[int, Scores | None] = {}
        with closing(
            self._client.ask_all(range(len(groups)), lambda sender, at: (at, self._ask(sender, groups[at])))
        ) as answers:
            for index in range(len(groups)):
                while index not in found:
                    place, scores = next(answers)
                    found[place] = scores
                yield found.pop(index)

    def _ask(self, sender: Sender, sequences: Sequence[Sequence[int]]) -> Scores | None:
        request = {**self._client.settings.body, **REQUEST, "model": self._client.model, "input": sequences}
        answer = sender.post(self._url, request, ANSWER)
        if answer is None:
            return None
        scores = [each.probs for each in answer.data]
        shape = [len(each) for each in scores]
        expected = [self._num_labels] * len(sequences)
        if shape != expected:
            raise RunError(
                f"{self._url} returns {shape} scores for {len(sequences)} responses, not {self._num_labels} for each: "
                "it runs another model, or not as a classifier"
            )
        return scores
