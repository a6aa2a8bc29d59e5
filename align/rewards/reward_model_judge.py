"""The judge that is a reward model: attributes and one reward for each response of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.models.loading.config import max_positions
from align.models.loading.pretrained import default_device, silence_transformers
from align.models.probe import choose_forward, tree_unsupported_reason
from align.models.reward_model import load_rating, load_reward_model
from align.models.reward_scoring import score_groups
from align.models.settings import PolicySettings
from align.records import Comparison, Response
from align.rewards.builtin_judges import RewardModelSettings
from align.rewards.verdicts import GROUPS_AT_ONCE, Group, Verdict

TOO_LONG, EMPTY = "too long", "the response is empty"  # first words of `why` where it abstains


class RewardModelJudge:
    """Rates the responses of a group by a reward model; it abstains where one of them is too long for the model.

    Each group is a micro-batch of its own: with others in it, the last bits of a reward would depend on them, and so on
    where a killed run resumed.
    """

    def __init__(self, settings: RewardModelSettings) -> None:
        silence_transformers()
        rating = load_rating(settings.path)
        if rating is None:
            raise InputError(
                f"{settings.path} is not a reward model (a sequence classifier); the stage reward_model trains one"
            )
        self.rating, self.precision = rating, settings.precision
        self.model, self.tokenizer = load_reward_model(PolicySettings(path=settings.path))
        apply_template(self.tokenizer)
        self.model.to(default_device())
        self.limit = max_positions(self.model.base.config)
        self.encoder = ChatEncoder(self.tokenizer)  # without the limit, so that a judgement can say by how much
        self.forwards: dict[bool, Literal["tree", "plain"]] = {}  # by whether a group is too long for the tree forward

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Yield the verdicts of each group; no reward for empty responses, and for groups with one that is too long."""
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            yield from self._verdicts(groups[start : start + GROUPS_AT_ONCE])

    def _verdicts(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        comparisons = [
            (index, Comparison(prompt.messages, tuple(Response(text) for text in texts if text.strip())))
            for index, (prompt, texts) in enumerate(groups)
            if any(map(str.strip, texts))
        ]
        token_groups = self.encoder.encode_all([comparison for _, comparison in comparisons])
        encoded = {comparisons[group.row][0]: group for group in token_groups}
        lengths = {index: max(len(sequence.ids) for sequence in group.sequences) for index, group in encoded.items()}
        for index, (_, texts) in enumerate(groups):
            longest = lengths.get(index, 0)
            if longest and (self.limit is None or longest <= self.limit):
                rated = iter(self._rate(self._scores(encoded[index])))
                yield tuple(next(rated) if text.strip() else Verdict(None, why=EMPTY) for text in texts)
            else:
                yield (Verdict(None, why=self._why_not(texts, longest)),) * len(texts)

    def _why_not(self, texts: Sequence[str], longest: int) -> str:
        """Return why responses are not rated; `longest` is their number of tokens, 0 where none was tokenized."""
        if longest:
            return f"{TOO_LONG}: {longest} tokens, more than the model's {self.limit}"
        return f"{TOO_LONG}: more characters than are tokenized" if any(map(str.strip, texts)) else EMPTY

    def _rate(self, scores_KA: torch.Tensor) -> list[Verdict]:
        columns = zip(self.rating.rewards(scores_KA), scores_KA.tolist(), strict=True)
        return [Verdict(reward, dict(zip(self.rating.names, values, strict=True))) for reward, values in columns]

    def _scores(self, group: TokenGroup) -> torch.Tensor:
        """Return the attributes [K, A] of the responses, by the tree forward where the model supports their length."""
        sequences = group.sequences
        longest = max(len(sequence.ids) for sequence in sequences)
        unsupported = tree_unsupported_reason(self.model, longest) is not None
        if unsupported not in self.forwards:
            self.forwards[unsupported] = choose_forward(self.model, [sequences], "auto", precision=self.precision).name
        self.model.use_forward(self.forwards[unsupported])
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return score_groups(self.model, [group])[0]
