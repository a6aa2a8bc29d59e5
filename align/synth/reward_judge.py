"""The judge that is a reward model: attributes and one reward for each response, which share their prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from align.config import InputError, nearest, stable_hash
from align.data.chat import ChatEncoder, TokenGroup
from align.data.templates import apply_template
from align.models.backbone import fingerprint
from align.models.loading import PolicySettings, default_device, length_limit, quiet_transformers
from align.models.probe import choose_forward, refusal
from align.models.reward import load_reward_model, saved_rating, score_groups
from align.records import Comparison, Response
from align.synth.verdicts import GROUPS_AT_ONCE, Group, Verdict

PRECISIONS = ("fp32", "bf16")
TOO_LONG, EMPTY = "too long", "the response is empty"  # how reasons begin


def reward_model_judge(path: str, *, token_budget: int = 4096, precision: str = "fp32") -> RewardModelJudge:
    """The judge that the reward model at `path`, a folder or hub id, is; in bf16 its matrix products are."""
    if precision not in PRECISIONS:
        raise InputError(f"judge reward_model: no precision is called {precision!r}; {nearest(precision, PRECISIONS)}")
    return RewardModelJudge(path, token_budget=token_budget, precision=precision)


class RewardModelJudge:
    """A reward model as a judge. It rates a group whole, or says that it is too long for the model and cuts nothing."""

    def __init__(self, path: str, *, token_budget: int, precision: str = "fp32") -> None:
        quiet_transformers()
        saved = saved_rating(path)
        if saved is None:
            raise InputError(f"{path}: not a reward model (a sequence classifier); the stage reward_model makes one")
        self.rating, self.token_budget, self.precision = saved, token_budget, precision
        self.model, self.tokenizer = load_reward_model(PolicySettings(path=path))
        template = apply_template(self.tokenizer)
        self.model.to(default_device())
        self.encoder = ChatEncoder(self.tokenizer)
        self.limit = length_limit(self.model.base.config)
        self.identity = stable_hash([fingerprint(self.model), template, saved, precision])  # of what decides a verdict
        self.is_exact_as_tree: bool | None = None  # unknown before the first groups

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """A verdict for each response; an empty one gets none, and neither do those of a group that is too long."""
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            yield from self._verdicts(groups[start : start + GROUPS_AT_ONCE])

    def _verdicts(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        asked = [
            (index, Comparison(prompt.messages, tuple(Response(text) for text in texts if text.strip())))
            for index, (prompt, texts) in enumerate(groups)
            if any(map(str.strip, texts))
        ]
        encoded = {asked[group.row][0]: group for group in self.encoder.encode_all([each for _, each in asked])}
        lengths = {index: max(len(each.ids) for each in group.sequences) for index, group in encoded.items()}
        fitting = [index for index, length in lengths.items() if self.limit is None or length <= self.limit]
        scores = dict(zip(fitting, self._scores([encoded[index] for index in fitting]), strict=True))
        for index, (_, texts) in enumerate(groups):
            if index in scores:
                rated = iter(self._rated(scores[index]))
                yield tuple(next(rated) if text.strip() else Verdict(None, why=EMPTY) for text in texts)
            else:
                longest = lengths.get(index)
                why = EMPTY if longest is None else f"{TOO_LONG}: {longest} tokens, and the model takes {self.limit}"
                yield (Verdict(None, why=why),) * len(texts)

    def _rated(self, scores_KA: torch.Tensor) -> list[Verdict]:
        columns = zip(self.rating.rewards(scores_KA), scores_KA.tolist(), strict=True)
        return [Verdict(reward, dict(zip(self.rating.names, values, strict=True))) for reward, values in columns]

    def _scores(self, groups: list[TokenGroup]) -> list[torch.Tensor]:
        if not groups:
            return []
        sequences = [group.sequences for group in groups]
        if self.is_exact_as_tree is None:
            found = choose_forward(self.model, sequences, "auto", precision=self.precision)
            self.is_exact_as_tree = found.name == "tree"
        longest = max(len(each.ids) for group in sequences for each in group)
        can = self.is_exact_as_tree and refusal(self.model, longest) is None
        self.model.use_forward("tree" if can else "plain")
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return score_groups(self.model, groups, token_budget=self.token_budget)
