"""Training from Python: a policy, rows and a loss, with the loop, checkpoints and metrics of the recipe stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.artifacts import atomic_folder
from align.data.chat_clock import began_at, pinned_time
from align.data.chat_encoder import ChatEncoder
from align.data.reading import stream
from align.data.rejections import Rejections
from align.data.store import TokenStore
from align.data.token_groups import TokenGroup
from align.distributed.progress import Progress, SilentProgress
from align.errors import InputError, RunError
from align.losses.table import Loss as PreferenceLosses
from align.losses.unpaired import UnpairedLoss
from align.models.loading.config import max_positions
from align.models.policy import Policy, load_policy, save_policy
from align.models.reward_model import RewardModel, load_reward_model, save_reward_model, set_pad_token
from align.models.saving.comparison import ModelOutputs, compare_saved
from align.models.settings import PolicySettings
from align.records import Comparison, Demonstration, Located, Record
from align.train.filters import comparable, distinct, labelled, of_kind, with_labels, with_pairs
from align.train.indexed_groups import end_of_turn
from align.train.loop import Loop
from align.train.objectives.base import Objective
from align.train.objectives.preference import PreferenceObjective
from align.train.objectives.reward import BradleyTerryObjective, RegressionObjective
from align.train.objectives.settings import PreferenceSettings
from align.train.objectives.supervised import SupervisedObjective
from align.train.settings import RewardLoss, TrainSettings
from align.train.training_run import TrainingResult, TrainingRun

Row = Demonstration | Comparison | TokenGroup | Mapping[str, Any]
LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Loss = str | PreferenceSettings | PreferenceLosses | LossFunction | Objective


class Trainer:
    """Trains a policy or a reward model on rows.

    `rows` are records; dicts with the columns of any format, such as a `datasets.Dataset`; or token groups that are
    encoded already. The others are encoded with the tokenizer's chat template, and dropped if longer than the model's
    maximum length. `counts` holds the number of rows by what became of them.

    `loss` is `"sft"`; the name of a preference loss or a user's `module:name`; `PreferenceSettings`, for other settings
    or an SFT term; a loss made by `preference_loss`; a function of (policy_logps_BK, reference_logps_BK, rewards_BK,
    lengths_BK, mask_BK) that returns the loss of each group, shape [B]; or an objective, such as `RegressionObjective`.

    `folder` receives metrics.jsonl, checkpoints and the reference cache. A new `Trainer` with the same arguments
    resumes from its latest checkpoint, the last of which holds the trained weights; the policy must have its first
    weights, so load it again. Under `accelerate launch` all processes make the same calls.

    Raises `InputError` for an unknown loss, for a policy or rows of the wrong kind, or if no row is left to train on.

    >>> from tempfile import TemporaryDirectory
    >>> from align.testing.tiny import tiny_policy, tiny_preferences
    >>> settings = TrainSettings(learning_rate=5e-3, prompts_per_step=8, epochs=3)
    >>> with TemporaryDirectory() as folder:
    ...     policy, tokenizer = tiny_policy()
    ...     trainer = Trainer(policy, tokenizer, tiny_preferences(), loss="dpo", settings=settings, folder=folder)
    ...     result = trainer.train()
    ...     trainer.save(f"{folder}/policy")
    >>> result.num_steps
    12
    >>> result.last_metrics["loss"] < result.first_metrics["loss"]
    True
    """

    def __init__(
        self,
        policy: Policy | RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Iterable[Row],
        *,
        loss: Loss,
        settings: TrainSettings,
        folder: str | Path,
        held_out: Iterable[Row] = (),
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(cast(object, policy), Policy | RewardModel):
            raise InputError(f"policy is of type {type(policy).__name__}; align.load_policy returns a Policy")
        self.policy, self.tokenizer = policy, tokenizer
        if not isinstance(cast(object, settings), TrainSettings):
            raise InputError(f"settings is of type {type(settings).__name__}; TrainSettings are needed")
        self.objective = make_objective(loss)
        self.counts = Counter[str]()
        self._is_stopped = False
        with pinned_time(began_at(Path(folder))):
            train, evaluated = self._encode(rows, "rows"), self._encode(held_out, "held_out")
        self.training_run = TrainingRun(
            objective=self.objective,
            train=train,
            held_out=evaluated,
            settings=settings,
            folder=Path(folder),
            references=Path(folder) / "references",
        )
        if not self.training_run.train:
            reasons = ", ".join(f"{name} {number}" for name, number in sorted(self.counts.items()))
            raise InputError(f"no row is left to train on ({reasons or 'no rows'})")
        self.loop = Loop(policy, self.training_run, progress or SilentProgress())
        if self.loop.sharding.gathers_per_layer:
            raise InputError("Trainer cannot save weights that ZeRO-3 or FSDP2 shards; use a recipe, or ZeRO-2")

    def train(self) -> TrainingResult:
        """Train to the last step, from the latest checkpoint if there is one, and return the metrics of all steps.

        Afterwards the policy has the last weights, with `average` a mean of them, or with `keep: best` those with the
        lowest held-out loss.
        """
        if self._is_stopped:
            raise RunError("the training was stopped; to resume it, load the policy again and make a new Trainer")
        self._is_stopped = True  # until it has ended: the policy has weights of the middle of the training
        result = self.loop.run()
        self._is_stopped = False
        self.loop.checkpointer.save_trained(result.metrics)
        self.loop.sharding.finish()
        self.policy.use_forward("plain")  # so that generation with transformers works
        return result

    def save(self, folder: str | Path) -> None:
        """Write the model and the tokenizer as a Hugging Face folder that `from_pretrained` loads.

        Adapters are merged in place, so the policy must not be trained afterwards. Raises `InputError` if the folder
        exists, and `RunError` if the model that is loaded back from it differs from the trained one.
        """
        if Path(folder).exists():
            raise InputError(f"{folder}: already exists; choose a new folder")
        expected = self.loop.outputs()
        self.loop.processes.run_on_main(lambda: self._write(Path(folder), expected), "saving the model")

    def _write(self, target: Path, expected: ModelOutputs) -> None:
        with atomic_folder(target) as partial:
            settings = PolicySettings(path=str(partial))
            groups = self.training_run.train
            if isinstance(self.policy, RewardModel):
                set_pad_token(self.policy, self.tokenizer, _last_tokens(groups))
                written = save_reward_model(self.policy, self.tokenizer, partial)
                saved = load_reward_model(settings)[0]
            else:
                written = save_policy(self.policy, self.tokenizer, partial, end_of_turn=end_of_turn(groups))
                saved = load_policy(settings)[0]
            compare_saved(saved, expected, written=written, folder=target)

    def _encode(self, rows: Iterable[Row], name: str) -> Sequence[TokenGroup]:
        """Return the rows as token groups that contribute to the loss; `counts` receives the others."""
        if isinstance(rows, TokenStore):
            return rows
        located = _located(rows, name)
        groups = [each for each in located if isinstance(each.record, TokenGroup)]
        if groups and len(groups) < len(located):
            raise InputError(f"{name}: token groups and records are mixed; encode all rows or none")
        if not groups and located:
            kind = Demonstration if isinstance(self.objective, SupervisedObjective) else Comparison
            limit = max_positions(self.policy.base.config)
            has_reward = isinstance(self.policy, RewardModel)
            encoder = ChatEncoder(self.tokenizer, max_length=limit, closes_cut=has_reward)
            records = cast("list[Located[Demonstration | Comparison]]", located)
            groups = list(encoder.encode_located(of_kind(records, kind, Rejections(counts=self.counts))))
            self.counts += encoder.counts
        return [each.record for each in self._filter(cast("list[Located[TokenGroup]]", groups), name)]

    def _filter(self, groups: list[Located[TokenGroup]], name: str) -> Iterable[Located[TokenGroup]]:
        objective = self.objective
        rejections = Rejections(counts=self.counts)
        if isinstance(objective, PreferenceObjective):
            different = distinct(groups, self.counts)
            if isinstance(objective.loss, UnpairedLoss):
                return with_labels(different, rejections, loss=objective.name)
            reward_loss = objective.name if objective.loss.uses_rewards else None
            return comparable(different, rejections, reward_loss=reward_loss, min_chosen=None)
        if isinstance(objective, RegressionObjective) and groups:
            return labelled(groups, self.counts, attributes=objective.names, path=name)
        if isinstance(objective, BradleyTerryObjective):
            return with_pairs(distinct(groups, self.counts), rejections, loss=cast(RewardLoss, objective.name))
        return groups


def _located(rows: Iterable[Row], name: str) -> list[Located[Any]]:
    """Return records or token groups with their places; dicts are read as records, by their columns."""
    needed = "records are needed, as in align.read(FILE).records, or dicts"
    if not isinstance(cast(object, rows), Iterable):
        raise InputError(f"{name} is of type {type(rows).__name__}; {needed}")
    given: list[Any] = list(rows)
    if given and isinstance(given[0], Mapping):
        return list(stream(name, in_memory=given).records)
    located = [Located(row, f"{name}: row {index + 1}", index) for index, row in enumerate(given)]
    for each in located:
        if not isinstance(each.record, Record | TokenGroup):
            raise InputError(f"{each.place}: is of type {type(each.record).__name__}; {needed}")
    return located


def make_objective(loss: Loss) -> Objective:
    """Return the objective for a loss given by name, by settings, or as an object."""
    if loss == "sft":
        return SupervisedObjective()
    if isinstance(loss, str):
        return PreferenceObjective(PreferenceSettings(name=loss))
    if isinstance(loss, PreferenceSettings):
        return PreferenceObjective(loss)
    if isinstance(loss, PreferenceLosses) or not hasattr(loss, "denominator"):
        return PreferenceObjective(PreferenceSettings(), cast(PreferenceLosses | LossFunction, loss))
    return cast(Objective, loss)


def _last_tokens(groups: Sequence[TokenGroup]) -> set[int]:
    return {int(sequence.ids[-1]) for group in groups for sequence in group.sequences}
