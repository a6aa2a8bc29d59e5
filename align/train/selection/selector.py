"""The choice of the groups of each optimizer step, with a journal from which a resumed run repeats it.

Scores are computed in fp64 and gathered in the order of the groups, so that a choice does not depend on micro-batches.
Another number of ranks rounds log-probabilities differently, which could change a choice between rows with nearly equal
scores; a resumed run therefore reads what was chosen and does not choose again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from align.distributed.journal import Journal, remove_journal
from align.distributed.processes import Processes
from align.errors import InputError, RunError
from align.models.backbone import Backbone
from align.registry import UserCode, import_dotted
from align.train.checkpoint import latest_checkpoint
from align.train.indexed_groups import GroupView
from align.train.references.cache import References
from align.train.references.compute import CUT_REFERENCE_WORK
from align.train.references.run_passes import RunPasses
from align.train.selection.cut_groups import CutGroups
from align.train.selection.features import HeadFeatures, mean_cosine, similarities
from align.train.selection.sampler import Floats, effective_sample_size, gumbel_noise, select
from align.train.selection.scorer import Losses, Scorer, fixed_outputs, scored_objective
from align.train.selection.selection import chosen_rows
from align.train.selection.settings import EASY, HARD, LEARNABILITY, SELECTION, UNIFORM
from align.train.training_run import TrainingRun

JOURNAL = "selection.jsonl"  # in the step's folder

Choice = tuple[list[int], dict[str, float]]  # groups of a step, and its metrics


class Selector:
    """Chooses the groups of each step; all ranks call it together, within its context."""

    def __init__(
        self,
        run: TrainingRun,
        scorer: Scorer,
        super_batch: Callable[[int], Sequence[int]],
        processes: Processes,
        *,
        settings_hash: str,
    ) -> None:
        assert run.selection is not None
        self._run = run
        self._selection = run.selection
        self._settings = run.selection.settings
        self._scorer, self._super_batch, self._processes = scorer, super_batch, processes
        self._path = run.folder / JOURNAL
        self._made_with = {"settings": settings_hash}
        self._stack = ExitStack()
        self._journal = cast("Journal | None", None)
        self._done: dict[str, list[Choice]] = {}  # first step of a scoring -> the choice of each of its steps
        self._num_selected = run.selection.num_selected(run.num_steps)
        with_score = {HARD: _hard, EASY: _easy, LEARNABILITY: _learnability}
        self._score = with_score.get(self._settings.score) or _own(self._settings.score)

    def __enter__(self) -> Self:
        """Open the journal; without a checkpoint it starts empty."""

        def opened() -> dict[str, Any]:
            if not latest_checkpoint(self._run.folder):
                remove_journal(self._path)
            self._journal = self._stack.enter_context(Journal(self._path, self._made_with))
            return self._journal.done

        self._done = dict(self._processes.run_on_main(opened, "reading the choices"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the journal."""
        self._stack.close()

    def choose(self, number: int) -> tuple[Sequence[int], Mapping[str, float]]:
        """Return the groups of optimizer step `number`, from 0, and what is logged of their choice."""
        if number >= self._num_selected:
            rows = self._super_batch(number)
            return rows[: self._size(rows)], {}
        start = number - number % self._settings.every
        if str(start) not in self._done:
            if start != number:
                raise RunError(f"{self._path}: the choice of step {number + 1} is missing; restart this training step")
            self._done[str(start)] = self._choose(range(start, min(start + self._settings.every, self._num_selected)))
        groups, metrics = self._done[str(start)][number - start]
        return groups, metrics

    def _choose(self, steps: range) -> list[Choice]:
        """Score the rows of several steps, choose those of each, and write them to the journal."""
        rows = [self._super_batch(step) for step in steps]
        found = self._scorer.losses(
            [group for each in rows for group in each], needs_policy=self._settings.needs_policy
        )

        def chosen() -> list[Choice]:
            scores = self._scores(found, steps[0])
            ends = list(accumulate(map(len, rows)))
            spans = [slice(end - len(each), end) for each, end in zip(rows, ends, strict=True)]
            features_BF = found.features_BF
            choices = [
                self._choice(
                    step, each, scores[span], None if features_BF is None else self._cosines(features_BF[span])
                )
                for step, each, span in zip(steps, rows, spans, strict=True)
            ]
            choices[0][1].update(found.metrics)
            assert self._journal is not None
            self._journal.add(str(steps[0]), choices)
            self._journal.sync()
            return choices

        return self._processes.run_on_main(chosen, "choosing rows")

    def _scores(self, losses: Losses, step: int) -> Floats:
        scores_B = np.asarray(self._score(losses.policy_B, losses.reference_B), np.float64)
        known = losses.policy_B if losses.policy_B is not None else losses.reference_B
        if known is not None and scores_B.shape != known.shape:
            raise InputError(
                f"the score {self._settings.score!r} returned the shape {list(scores_B.shape)} for {len(known)} rows; "
                "it must return one number for each row",
                ("selection", "score"),
            )
        if not np.isfinite(scores_B).all():
            raise RunError(f"step {step + 1}: the score of a row is {scores_B[~np.isfinite(scores_B)][0]}")
        return scores_B

    def _cosines(self, features_BF: Floats) -> Floats:
        return similarities(features_BF, centered=self._settings.coupling == "embedding")

    def _choice(self, step: int, rows: Sequence[int], scores_B: Floats, cosine_BB: Floats | None) -> Choice:
        """Return the chosen groups of a step, and its metrics."""
        settings = self._settings
        size = self._size(rows)
        chunks = min(settings.chunks, size)
        noise_NB = None if settings.gain is None else gumbel_noise(self._run.seed, step, rows, chunks)
        coupling_BB = None if cosine_BB is None else -settings.coupling_weight / size * cosine_BB
        chosen = select(scores_B, coupling_BB, size=size, chunks=chunks, gain=settings.gain, noise_NB=noise_NB).rows_b
        metrics = {
            "rows": float(len(rows)),
            "mean_score": float(scores_B.mean()),
            "mean_score_chosen": float(scores_B[chosen].mean()),
        }
        if settings.gain is not None:
            metrics["effective_sample_size"] = effective_sample_size(scores_B, settings.gain)
        if cosine_BB is not None:
            metrics["mean_cosine"] = mean_cosine(cosine_BB)
            metrics["mean_cosine_chosen"] = mean_cosine(cosine_BB[np.ix_(chosen, chosen)])
        groups = [int(rows[position]) for position in chosen]
        metrics |= self._selection.chosen_cost((self._run.train[row] for row in rows), chosen.tolist())._asdict()
        for name, shares in self._shares(rows, groups).items():
            metrics |= {f"share/{name}": shares[1], f"pool_share/{name}": shares[0]}
        return groups, {SELECTION + name: value for name, value in metrics.items()}

    def _size(self, rows: Sequence[int]) -> int:
        return chosen_rows(len(rows), self._run.settings.prompts_per_step, self._run.rows_per_step)

    def _shares(self, rows: Sequence[int], chosen: Sequence[int]) -> dict[str, tuple[float, float]]:
        """Return the share of each source among the rows and among the chosen ones, if there are several sources."""
        if len(self._selection.sources) < 2:  # noqa: PLR2004 - of one source all are
            return {}
        ends = np.cumsum(list(self._selection.sources.values()))
        of_each = [np.searchsorted(ends, each, side="right") for each in (rows, chosen)]
        counts = [np.bincount(each, minlength=len(ends)) for each in of_each]
        shares = zip(*(count / count.sum() for count in counts), strict=True)
        return dict(zip(self._selection.sources, shares, strict=True))


def make_selector(
    passes: RunPasses,
    groups: GroupView,
    references: References | None,
    *,
    super_batch: Callable[[int], Sequence[int]],
    settings_hash: str,
) -> Selector | None:
    """Return what chooses the groups of each step, with the losses of its reference; None to train on all groups.

    `references` are those of the preference loss. All processes call it together, before the first step.
    """
    run = passes.run
    if run.selection is None or run.selection.settings.score == UNIFORM or run.selection.settings.chooses_tokens:
        return None
    settings = run.selection.settings
    objective = scored_objective(run.objective)
    train = run.train
    if settings.score_tokens is not None:
        train = CutGroups(run.train, settings.score_tokens)
        groups = GroupView(train)
        if references is not None:
            references = passes.references(groups, CUT_REFERENCE_WORK, of=" of cut responses")
    features = None
    if settings.coupling != "none":
        model = cast(Backbone, passes.accelerator.unwrap_model(passes.model))
        features = HeadFeatures(model, objective, settings.coupling, seed=run.seed)
    batcher = passes.batcher(groups, references)
    scorer = Scorer(passes.model, objective, batcher, fixed_outputs(passes, train), features)
    return Selector(run, scorer, super_batch, passes.processes, settings_hash=settings_hash)


Score = Callable[[Floats | None, Floats | None], Any]


def _hard(policy_B: Floats | None, reference_B: Floats | None) -> Any:  # noqa: ANN401 - as a user's own
    return policy_B


def _easy(policy_B: Floats | None, reference_B: Floats | None) -> Any:  # noqa: ANN401 - as a user's own
    assert reference_B is not None
    return -reference_B


def _learnability(policy_B: Floats | None, reference_B: Floats | None) -> Any:  # noqa: ANN401 - as a user's own
    assert policy_B is not None and reference_B is not None
    return policy_B - reference_B


def _own(name: str) -> Score:
    function = import_dotted(name, "score")
    return UserCode("score", name).wrap(function)
