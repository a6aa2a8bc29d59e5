"""The judge that is a reward model: attributes and one reward for each response of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch

from align.accounting.process_usage import PROCESS_USAGE
from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.token_groups import TokenGroup
from align.errors import InputError, LimitExceeded
from align.inference.managed.engine import StartedServer
from align.inference.managed.settings import Precision
from align.inference.requests.classifier import ClassifierClient
from align.models.loading.config import dimensions, load_config, max_positions
from align.models.loading.pretrained import default_device, silence_transformers
from align.models.loading.tokenizer import load_tokenizer
from align.models.probe import choose_forward, tree_unsupported_reason
from align.models.reward_model import load_rating, load_reward_model
from align.models.reward_scoring import score_groups
from align.models.settings import PolicySettings
from align.models.tree.batch import TokenBatch
from align.records import Comparison, Response
from align.rewards.builtin_judges import RewardModelSettings
from align.rewards.thoughts import ResponseText
from align.rewards.verdicts import GROUPS_AT_ONCE, Group, Verdict

# First words of `why` where it abstains
TOO_LONG, EMPTY, REFUSED = "too long", "the response is empty", "the reward model's chat template refuses the row"


class Scorer(Protocol):
    """Scores groups of token sequences."""

    def __call__(self, groups: Sequence[TokenGroup]) -> Iterator[torch.Tensor | None]:
        """Yield the attributes [K, A] of each group, in order; None if a response is too long."""
        ...


class RewardModelJudge:
    """Rates the responses of a group by a reward model; it abstains where one of them is too long for the model."""

    def __init__(self, settings: RewardModelSettings) -> None:
        silence_transformers()
        rating = load_rating(settings.path)
        if rating is None:
            raise InputError(
                f"{settings.path} is not a reward model (a sequence classifier); the stage reward_model trains one"
            )
        self.rating = rating
        self.limit = max_positions(load_config(settings.path))
        self.tokenizer = load_tokenizer(PolicySettings(path=settings.path))
        apply_template(self.tokenizer)
        self.encoder = ChatEncoder(self.tokenizer)  # without the limit, so that a judgement can say by how much
        is_local = settings.engine.kind == "local"
        self.scorer: Scorer = _LocalScorer(settings) if is_local else _ServedScorer(settings, len(rating.names))

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Yield the verdicts of each group; no reward for empty responses, and for groups with one that is too long."""
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            yield from self._verdicts(groups[start : start + GROUPS_AT_ONCE])

    def _verdicts(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        comparisons = [
            (index, Comparison(prompt.messages, tuple(_responses(texts)), tools=prompt.tools))
            for index, (prompt, texts) in enumerate(groups)
            if any(map(str.strip, texts))
        ]
        encoded, refused = self._encoded(comparisons)
        lengths = {index: max(len(sequence.ids) for sequence in group.sequences) for index, group in encoded.items()}
        short = [group for index, group in encoded.items() if self.limit is None or lengths[index] <= self.limit]
        scores = self.scorer(short)
        for index, (_, texts) in enumerate(groups):
            longest = lengths.get(index, 0)
            if index in refused:
                yield (Verdict(None, why=f"{REFUSED}: {refused[index]}", refused=True),) * len(texts)
            elif not longest or (self.limit is not None and longest > self.limit):
                yield (Verdict(None, why=self._why_not(texts, longest)),) * len(texts)
            elif (scores_KA := next(scores)) is None:
                yield (Verdict(None, why=f"{TOO_LONG}: {longest} tokens, more than the server takes"),) * len(texts)
            else:
                rated = iter(self._rate(scores_KA))
                yield tuple(next(rated) if text.strip() else Verdict(None, why=EMPTY) for text in texts)

    def _encoded(self, comparisons: Sequence[tuple[int, Comparison]]) -> tuple[dict[int, TokenGroup], dict[int, str]]:
        """Return the token groups of the comparisons, and why the chat template refuses others, by their index."""
        try:
            groups = list(self.encoder.encode_all([comparison for _, comparison in comparisons]))
            return {comparisons[group.row][0]: group for group in groups}, {}
        except LimitExceeded:
            raise
        except InputError as error:
            if len(comparisons) == 1:
                return {}, {comparisons[0][0]: error.message.removeprefix("row 1: ")}
        each = [self._encoded([one]) for one in comparisons]  # to find the rows that it refuses
        encoded = {index: group for found, _ in each for index, group in found.items()}
        return encoded, {index: why for _, refused in each for index, why in refused.items()}

    def _why_not(self, texts: Sequence[str], longest: int) -> str:
        """Return why responses are not rated; `longest` is their number of tokens, 0 where none was tokenized."""
        if longest:
            return f"{TOO_LONG}: {longest} tokens, more than the model's {self.limit}"
        return f"{TOO_LONG}: more characters than are tokenized" if any(map(str.strip, texts)) else EMPTY

    def _rate(self, scores_KA: torch.Tensor) -> list[Verdict]:
        columns = zip(self.rating.rewards(scores_KA), scores_KA.tolist(), strict=True)
        return [Verdict(reward, dict(zip(self.rating.names, values, strict=True))) for reward, values in columns]


class _LocalScorer:
    """The model in this process.

    Each group is a micro-batch of its own: with others in it, the last bits of a reward would depend on them, and so on
    where a killed run resumed.
    """

    def __init__(self, settings: RewardModelSettings) -> None:
        self.precision: Precision = settings.precision
        self.model, _ = load_reward_model(PolicySettings(path=settings.path))
        self.model.to(default_device())
        self.dimensions = dimensions(self.model.base.config)
        self.forwards: dict[bool, Literal["tree", "plain"]] = {}  # by whether a group is too long for the tree forward

    def __call__(self, groups: Sequence[TokenGroup]) -> Iterator[torch.Tensor]:
        """Yield the attributes [K, A] of each group, by the tree forward where the model supports its length."""
        return map(self._scores, groups)

    def _scores(self, group: TokenGroup) -> torch.Tensor:
        sequences = group.sequences
        longest = max(len(sequence.ids) for sequence in sequences)
        unsupported = tree_unsupported_reason(self.model, longest) is not None
        if unsupported not in self.forwards:
            self.forwards[unsupported] = choose_forward(self.model, [sequences], "auto", precision=self.precision).name
        self.model.use_forward(self.forwards[unsupported])
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            (scores,) = score_groups(self.model, [group], observe=self._count)
        return scores

    def _count(self, batch: TokenBatch) -> None:
        PROCESS_USAGE.add_judging(self.dimensions, batch.work()._replace(targets=0))  # no LM head


class _ServedScorer:
    """The model on a server of vLLM; a managed engine starts it, and it runs until the end of this process."""

    def __init__(self, settings: RewardModelSettings, num_labels: int) -> None:
        path, managed, server = settings.path, settings.engine.managed, settings.engine.server
        if managed is not None:
            self.started = StartedServer(path, managed, name=path, rates=settings.precision)  # ends with this object
            server = self.started.settings
        assert server is not None
        self.client = ClassifierClient(path, server, name=path, num_labels=num_labels)

    def __call__(self, groups: Sequence[TokenGroup]) -> Iterator[torch.Tensor | None]:
        """Yield the attributes [K, A] of each group, in order; the server is asked about all of them at a time."""
        ids = [[sequence.ids.tolist() for sequence in group.sequences] for group in groups]
        PROCESS_USAGE.add_served_answers(sum(map(len, ids)))
        return (None if scores is None else torch.tensor(scores) for scores in self.client.scores(ids))


def _responses(texts: Sequence[str]) -> Iterator[Response]:
    """Yield the texts that are not empty as responses, with their tool calls."""
    for text in texts:
        if text.strip():
            known = text if isinstance(text, ResponseText) else ResponseText(text)
            yield Response(known.content, tool_calls=known.tool_calls)
