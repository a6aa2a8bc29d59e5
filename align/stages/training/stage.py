"""The contract of the stages that train: `sft`, `preference` and `reward_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from align.content_hash import code_of
from align.data.mixing import Mixture
from align.data.rejections import Rejections
from align.distributed.launch import is_launched
from align.distributed.launch_files import (
    SEQUENCE_PARALLEL,
    check_process_groups,
    check_training_launch,
    launch_kind,
    num_processes,
)
from align.errors import ErrorList, InputError, within
from align.models.settings import GGUF, kept_adapters_error
from align.records import Comparison, Demonstration, Record
from align.registry import import_dotted, pick
from align.stages.base import GROUPS, POLICY, SOURCE, Input, Placed, Stage, latest_policy
from align.stages.costs.estimates import Estimate, Planning, model_disk
from align.stages.inputs.context import ModelSpec, StepInputs, policy_key
from align.stages.inputs.opening import FIRST_ROWS, SEARCHED_ROWS, first_records, lack_of_kind
from align.stages.inputs.sources import SourceSettings, check_without_constraints
from align.stages.training.contract import Groups
from align.stages.training.uniform import check_selection, reference_names, uniform_names, with_uniform
from align.train.selection.settings import SelectionSettings
from align.train.settings import ENDS, PRODUCTS, TrainSettings
from align.train.sharding.optimizer_names import check_optimizer
from align.train.sharding.snapshots import ADAPTERS
from align.train.tracking import check_trackers

if TYPE_CHECKING:
    from align.data.token_groups import TokenGroup


def different_settings(step: TrainingStage, earlier: Stage) -> list[str]:
    """Return the first keys of the settings that keep one step from resuming the training of the other."""

    def keys(stage: Stage) -> dict[str, Any]:
        train = stage.decisive().get("train", {}).items()
        found = {**stage.decisive(), **{f"train.{name}": value for name, value in train if name not in ENDS}}
        return {name: found[name] for name in found if name not in ("train", "resume")}

    own, others = keys(step), keys(earlier)
    return [name for name in {**own, **others} if own.get(name) != others.get(name)]


class TrainingStage(Stage):
    """A step that trains a model on rows."""

    policy: str | None = Field(
        default=None,
        description="Step whose model this one starts from; by default the last policy before it, else the recipe's.",
    )
    train: TrainSettings = Field(description="Optimizer, schedule, batch and checkpoints.")
    selection: SelectionSettings | None = Field(
        default=None,
        description="Choose the rows of each optimizer step from a larger batch, or tokens of each row; null trains on "
        "all.",
    )

    resume: str | None = Field(
        default=None,
        description="Earlier step whose training this one continues; it has the same settings and `train.until_step`.",
    )

    renders_rows: ClassVar[bool] = True
    can_choose_tokens: ClassVar[bool] = False
    can_split_rows: ClassVar[bool] = False

    def made(self, name: str) -> list[str]:
        """Return the names of the step's cross-fitted references, of its uniform baseline, and of the step itself."""
        return [*reference_names(self, name), *uniform_names(self, name), name]

    def expand(self, name: str, before: Mapping[str, Stage], policies: Sequence[str]) -> list[Placed]:
        """Return the step's cross-fitted references, its uniform baseline, and the step itself."""
        step = self.resolve(before)
        step.check_resumed(before)
        return with_uniform(name, step, before)

    def resolve(self, before: Mapping[str, Stage]) -> Self:
        """Return the step with the policy that it starts from: that of the step that it resumes, else the last one."""
        if self.policy is not None:
            return self
        with within("resume"):
            last = latest_policy(before) if self.resume is None else pick(before, self.resume, "earlier step").start
        return self.model_copy(update={"policy": last})

    def check_resumed(self, before: Mapping[str, Stage]) -> None:
        """Raise unless the step that this one resumes has the same settings and keeps a checkpoint."""
        if self.resume is None:
            return
        with within("resume"):
            earlier = pick(before, self.resume, "earlier step")
            if different := different_settings(self, earlier):
                raise InputError(f"step {self.resume!r} has another {', '.join(different)}; it has to be the same")
            if not isinstance(earlier, TrainingStage) or earlier.train.until_step is None:
                raise InputError(f"step {self.resume!r} keeps no checkpoint: set its train.until_step")
            if self.train.until_step is not None and self.train.until_step < earlier.train.until_step:
                raise InputError(f"step {self.resume!r} has a later train.until_step, {earlier.train.until_step}")

    @property
    def start(self) -> str | None:
        """The step whose model this one starts from."""
        return self.policy

    @property
    def training_precision(self) -> str:
        """The precision in which the step's optimizer steps compute."""
        return self.train.precision

    @property
    def start_kinds(self) -> tuple[str, ...]:
        """What the step can start from."""
        return (POLICY,)

    def needs_policy(self) -> bool:
        """Return whether the step starts from the recipe's own policy."""
        return self.policy is None

    def data_loc(self, source: str) -> tuple[str, ...]:
        """Return the location of the setting that names a source."""
        return ("data",)

    def inputs(self) -> list[Input]:
        """Return the policy that the step starts from, and its rows."""
        start = [Input(self.policy, self.start_kinds, ("policy",))] if self.policy is not None else []
        for key, names in self.selection.fixed_steps.items() if self.selection is not None else ():
            start += [Input(name, (self.makes,), ("selection", key)) for name in names]
        if self.resume is not None:
            start.append(Input(self.resume, (self.makes,), ("resume",)))
        return [*start, *(Input(name, (SOURCE, GROUPS), self.data_loc(name)) for name in self.shares())]

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the trained weights."""
        found = {**super().decisive(), "train": self.train.cache_key()}
        # So that steps finished before there were these settings stay finished
        found = {name: found[name] for name in found if name not in ("selection", "resume") or found[name] is not None}
        return found if self.selection is None else {**found, "selection": self.selection.cache_key()}

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the trained model: settings, rows, and the model that it starts from."""
        path = inputs.policy.path if self.policy is None else None
        score = [] if self.selection is None else [self.selection.score]
        own = [code_of(name) for name in (self.train.optimizer, *self.train.callbacks, *score) if ":" in name]
        return [*super().cache_key(inputs), *policy_key(inputs), *([inputs.content(path)] if path else []), *own]

    def validate_settings(self) -> None:
        """Raise for trackers, optimizers and callbacks that are not installed."""
        for name in self.train.callbacks:
            with within("train", "callbacks"):
                import_dotted(name, "callback")
        check_optimizer(self.train.optimizer)
        if self.selection is not None:
            check_selection(self.selection, self.train, needs_kl=self.needs_kl, needs_reference=self.needs_reference)
            if self.selection.tokens is not None and not self.can_choose_tokens:
                raise InputError(f"is for sft; {self.stage} can choose rows", ("selection", "tokens"))
            if self.resume is not None or self.train.until_step is not None:
                raise InputError(
                    "a step that chooses its rows or tokens cannot be resumed by another step", ("selection",)
                )
        if self.train.sequence_parallel > 1 and (self.selection is not None or not self.can_split_rows):
            raise InputError("is for sft and preference without selection; leave it out", SEQUENCE_PARALLEL)
        check_trackers(self.train.trackers)

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise if a setting needs held-out rows and there are none, or if rows cannot be trained on."""
        held_out = {
            ("train", "keep"): self.train.keep == "best",
            ("train", "evaluate_every"): self.train.evaluate_every,
            ("train", "early_stopping"): self.train.early_stopping,
            ("selection", "compare"): self.selection is not None and self.selection.compare,
        }
        errors = ErrorList()
        lora = inputs.policy.lora
        path = inputs.policy.path or ""
        if self.policy is None and lora is not None and not lora.merge and path.startswith(GGUF):
            errors.found.append(kept_adapters_error(lora))
        if self.train.average is not None and lora is not None:
            errors.found.append(InputError(ADAPTERS, ("train", "average")))
        if not any(source.held_out for source in inputs.sources.values()):
            names = " or ".join(inputs.sources)
            message = f"needs held-out rows, and no row is held out: set held_out of {names}"
            wanted = {**held_out, **self.needs_held_out()}.items()
            errors.found += [InputError(message, loc) for loc, is_set in wanted if is_set]
        if self.launch is not None:
            with errors.collect():
                check_training_launch(
                    self.launch, precision=self.train.precision, max_grad_norm=self.train.max_grad_norm
                )
            with errors.collect():
                self.train.check_kind(launch_kind(self.launch))
                if self.selection is not None:
                    self.selection.check_kind(launch_kind(self.launch))
        # Within a launch, this process may be of another one than the step's, or of more processes
        if self.train.sequence_parallel > 1 and not is_launched():
            with errors.collect():
                check_process_groups(self.train.sequence_parallel, num_processes(self.launch))
        if self.train.sequence_parallel > 1 and inputs.policy.forward == "plain":
            errors.found.append(
                InputError("a padded forward cannot be split; use policy.forward: tree", SEQUENCE_PARALLEL)
            )
        for name, source in inputs.sources.items():
            with errors.collect():
                check_without_constraints(name, source.constraints is not None, self.data_loc(name))
        errors.raise_found()

    def check_machine(self) -> None:
        """Raise for a precision that the device of the step does not have, if the step runs on this machine."""
        if self.train.precision == PRODUCTS and self.slurm is None:
            from align.stages.training.planning import planned_device  # noqa: PLC0415 - imports torch
            from align.train.sharding.products import check_products  # noqa: PLC0415 - imports torch

            check_products(planned_device(self))

    def open_rows(self, name: str, source: SourceSettings) -> None:
        """Raise if the first rows are of the wrong kind, or if none of many can be trained on."""
        lacks: list[str | None] = []
        for located in first_records(source, SEARCHED_ROWS):
            if len(lacks) >= FIRST_ROWS and None in lacks:
                return
            other_kind = lack_of_kind(located, self.record_kind, self.stage, skips=source.on_error == "skip")
            lacks.append(other_kind or self.lack(located.record))
        if lacks and None not in lacks:
            message = f"none of the first {len(lacks)} rows can be trained on: {lacks[0]}"
            raise InputError(f"{source.path}: {message}")

    def lack(self, record: Record) -> str | None:
        """Return why the step cannot train on a record of its kind; None if it can."""
        return None

    def needs_held_out(self) -> dict[tuple[str, ...], Any]:
        """Return further settings, by location, that need held-out rows where they are true."""
        return {}

    @property
    def record_kind(self) -> type[Demonstration | Comparison]:
        """The kind of record that the step trains on."""
        return Comparison

    @property
    def has_lm_head(self) -> bool:
        """Whether the trained model predicts tokens."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs reference log-probabilities."""
        return False

    @property
    def needs_kl(self) -> bool:
        """Whether the loss needs an estimate of the KL divergence from the reference before every step."""
        return False

    def mixture(self, sizes: tuple[int, ...], seed: int) -> Mixture:
        """Return which rows of several sources of these sizes an epoch takes."""
        return Mixture(sizes, tuple(self.shares().values()), seed=seed)

    def attributes(self, spec: ModelSpec) -> tuple[str, ...]:
        """Return the attributes that the model rates, given the model that the step starts from."""
        return ()

    def filter_groups(
        self, groups: Groups, rejections: Rejections, *, attributes: Sequence[str], source: SourceSettings
    ) -> Groups:
        """Return the groups that contribute to the loss; the others are counted by reason."""
        return groups

    def estimate(self, planning: Planning) -> Estimate:
        """Return rows, tokens, memory and time; an upper bound where an earlier step makes the rows."""
        from align.stages.training.planning import estimate_bound, estimate_training  # noqa: PLC0415 - imports torch

        if self.train.sequence_parallel > 1:
            from align.models.probe import split_unsupported_reason  # noqa: PLC0415 - imports torch

            if reason := split_unsupported_reason(planning.config, self.train.sequence_parallel):
                raise InputError(reason, SEQUENCE_PARALLEL)
        made_by = next((name for name in self.shares() if name in planning.made), None)
        if made_by is not None:
            return estimate_bound(self, planning, planning.made[made_by])
        return estimate_training(self, planning)

    def disk(self, model_bytes: int) -> tuple[int, int]:
        """Return the bytes of the trained model, and of its checkpoints."""
        stays, spare = model_disk(model_bytes, self.train)
        return (stays, spare) if self.train.until_step is None else (stays + spare // 2, spare)  # the checkpoint stays

    def preview(self, planning: Planning, number: int) -> list[tuple[TokenGroup, TokenGroup]] | None:
        """Return the first rows as they are trained on and as they are uncut."""
        from align.stages.training.planning import preview_groups  # noqa: PLC0415 - imports torch

        return preview_groups(self, planning, number)
