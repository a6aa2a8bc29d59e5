"""A recipe as frozen settings: the policy it starts from, its sources of rows, its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from align.accounting.settings import AccountingSettings
from align.config import Settings, build, located, read_recipe, stable_hash
from align.data.mixing import shares_of
from align.distributed.launch import check_launch
from align.errors import InputError
from align.models.settings import PolicySettings
from align.pipeline import Step, order
from align.registry import pick
from align.stages.checks import Given, check_columns, check_settings, check_source, place_in_message, placed, within
from align.stages.contents import code_of, content_of, contents_of
from align.stages.expanding import expand
from align.stages.steps import (
    GROUPS,
    MAKES,
    POLICY,
    PROCEDURAL,
    REWARD_MODEL,
    AnyStep,
    EvaluateStep,
    GenerateStep,
    ImportStep,
    Need,
    PreferenceStep,
    RewardStep,
    ScoreStep,
    SourceSettings,
    TrainStep,
    judge_steps,
    key_of,
)

T = TypeVar("T")
TASKS = PROCEDURAL
GROUPS_FILE = "groups.jsonl"  # in the folder of a step that makes groups of responses


class Recipe(Settings):
    """A whole recipe, checked."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # its folder under `runs`
    runs: str = "runs"
    seed: int = 0
    accounting: AccountingSettings = AccountingSettings()
    policy: PolicySettings
    data: dict[str, SourceSettings] = Field(default_factory=dict[str, SourceSettings])
    steps: dict[str, AnyStep] = Field(default_factory=dict[str, AnyStep])  # as they are run: rounds one by one
    origins: dict[str, str] = Field(default_factory=dict[str, str])  # the name under which each was written

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return Path(self.runs) / self.run

    def written_as(self, name: str) -> list[str]:
        """The steps that `name` stands for: itself, or all that the recipe's step of this name has become."""
        if name in self.steps:
            return [name]
        names = {origin: origin for origin in self.origins.values()}
        pick({**names, **{each: each for each in self.steps}}, name, "step")
        return [step for step, origin in self.origins.items() if origin == name]

    def inputs(self, name: str) -> tuple[str, ...]:
        """Steps whose folders the step reads."""
        return tuple(dict.fromkeys(need.step for need in self.needs(name)))

    def needs(self, name: str) -> list[Need]:
        """Everything that the step reads of others."""
        step = self.steps[name]
        policies, data, judges = [policy] if (policy := self.policy_of(name)) else [], list[str](), list[str]()
        if isinstance(step, EvaluateStep | GenerateStep):
            policies = self.policies_of(name)
        if isinstance(step, TrainStep | PreferenceStep | RewardStep | ScoreStep):
            data = [source for source in self.sources_of(name) if source in self.steps]
        if isinstance(step, GenerateStep | ScoreStep):
            judges = judge_steps(step.judges)
        models = (POLICY, REWARD_MODEL)
        several = isinstance(step, EvaluateStep) or (isinstance(step, GenerateStep) and not self.is_of_round(name))
        key, trained = "policies" if several else "policy", models if isinstance(step, RewardStep) else (POLICY,)
        return [
            *(Need(each, trained, key) for each in policies),
            *(Need(each, (GROUPS,), "data") for each in data),
            *(Need(each, models, "judges") for each in judges),
        ]

    def is_of_round(self, name: str) -> bool:
        """Whether the step draws the samples of a preference step's round, which stand in the settings of that step."""
        return isinstance(self.steps[name], GenerateStep) and self.origins[name] != name

    def policy_of(self, name: str) -> str | None:
        """The step whose policy the step trains; None where it starts from the recipe's own, or trains none."""
        step = self.steps[name]
        if not isinstance(step, TrainStep | PreferenceStep | RewardStep):
            return None
        return step.policy if step.policy is not None else self._latest(name)

    def policies_of(self, name: str) -> list[str]:
        """The steps whose policies the step asks."""
        step = self.steps[name]
        assert isinstance(step, EvaluateStep | GenerateStep)
        if isinstance(step, EvaluateStep):
            return list(step.policies)
        latest = self._latest(name)
        return [latest] if not step.policies and not step.models and latest else step.policies

    def lineage(self, name: str) -> Iterator[str]:
        """The step and those whose models it comes from or asks, the earliest last."""
        step: str | None = name
        while step is not None:
            yield step
            asks = self.policies_of(step)[:1] if isinstance(self.steps[step], EvaluateStep | GenerateStep) else []
            step = asks[0] if asks else self.policy_of(step)

    def _latest(self, name: str) -> str | None:
        names = list(self.steps)
        before = [other for other in names[: names.index(name)] if MAKES[self.steps[other].stage] == POLICY]
        return before[-1] if before else None

    def sources_of(self, name: str) -> dict[str, float]:
        """Names of the rows that the step reads, sources or steps, with the share of each in an epoch."""
        step = self.steps[name]
        if isinstance(step, ImportStep):
            return {}
        if isinstance(step, EvaluateStep):
            return {task.data: 1.0 for task in step.tasks.values()}
        weights = {name: 1.0 for name in ([step.data] if isinstance(step.data, str) else list(step.data))}
        if not isinstance(step, TrainStep):
            return weights
        own = step.data if isinstance(step.data, dict) else weights
        share, replayed = (step.replay.share, self.replayed(name)) if step.replay else (0.0, {})
        return shares_of(own, replayed, share)

    def replayed(self, name: str) -> dict[str, float]:
        """The data of the earlier supervised step that the step replays, with their weights there."""
        step = self.steps[name]
        assert isinstance(step, TrainStep) and step.replay is not None
        names = list(self.steps)
        before = [other for other in names[: names.index(name)] if isinstance(self.steps[other], TrainStep)]
        if step.replay.step is None and not before:
            raise InputError(f"steps.{name}.replay: no supervised step comes before this one")
        earlier = step.replay.step or before[-1]
        known = {other: self.steps[other] for other in before}
        found = _known(known, earlier, "earlier supervised step", f"steps.{name}.replay.step")
        assert isinstance(found, TrainStep)
        return {found.data: 1.0} if isinstance(found.data, str) else found.data

    def source(self, name: str) -> SourceSettings:
        """The rows called `name`: a source, or the groups that a step makes."""
        step = self.steps.get(name)
        if isinstance(step, GenerateStep | ScoreStep):
            made = self.root / name / GROUPS_FILE
            return SourceSettings(path=str(made), format="native", held_out=step.held_out, max_length=step.max_length)
        return pick(self.data, name, "source of data")

    def pipeline(self) -> list[Step]:
        """The steps for the pipeline, each with the hash of everything that decides its content."""
        once = cache(content_of)  # a file that several steps read is read through once
        return [Step(name, self.inputs(name), stable_hash(self._content(name, once))) for name in self.steps]

    def _content(self, name: str, content_of: Callable[[str], str]) -> list[Any]:
        step = self.steps[name]
        settings = step.model_dump(mode="json", exclude={"launch"})
        if isinstance(step, TrainStep | PreferenceStep | RewardStep):
            settings["train"] = step.train.cache_key()  # without what decides only how it is computed
        content: list[Any] = [self.seed, settings]
        if MAKES[step.stage] in (POLICY, REWARD_MODEL):
            content.append(self.policy.model_dump(mode="json", exclude={"gradient_checkpointing"}))
            content += [content_of(name) for name in (self.policy.tokenizer, self.policy.chat_template) if name]
            begins = step.path or self.policy.path if isinstance(step, ImportStep) else self.policy.path
            if begins is not None and self.policy_of(name) is None:
                content.append(content_of(begins))
        for source, share in self.sources_of(name).items():
            if source not in self.steps:
                found = self.source(source)
                content += [share, found.model_dump(mode="json"), content_of(found.path), code_of(found.format)]
        if isinstance(step, GenerateStep):
            settings["engine"] = step.engine.cache_key()
            content += [content_of(model) for model in step.models]
            content += [code_of(step.engine.custom.name)] if step.engine.custom else []
        if isinstance(step, GenerateStep | ScoreStep):
            settings["judges"] = [judge.cache_key() for judge in step.judges]
            content += [told for judge in step.judges for told in contents_of(judge, content_of)]
        if isinstance(step, EvaluateStep):
            content += [code_of(task.task) for task in step.tasks.values() if task.task and ":" in task.task]
        if isinstance(step, PreferenceStep):
            content.append(code_of(step.loss.name))
        return content


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, checked: every key known, every source and step that is named there, and of the right kind.

    An error begins with the line in the file, or with the override, that is to be changed.
    """
    values = read_recipe(path, overrides)
    with located(path, overrides), placed():
        given = values.get("steps")
        if not isinstance(given, Mapping) or not given:
            raise InputError(f"steps: a mapping from a step's name to its settings is needed, not {given!r}")
        if "origins" in values:
            raise InputError("origins: unknown key")
        expanded = expand(given)
        recipe = build(Recipe, {**values, "steps": {}})
        recipe = recipe.model_copy(update={"steps": expanded.steps, "origins": expanded.origins})
        _check_recipe(recipe)
        try:
            order([Step(name, recipe.inputs(name), key="") for name in recipe.steps])
        except InputError as error:
            place_in_message(error)
            error.loc = ("steps", recipe.origins[str(error.loc[1])])
            raise
    return recipe


def _check_recipe(recipe: Recipe) -> None:
    """Everything that the recipe names is there and of the right kind, and its settings agree with each other."""
    _check_policy(recipe)
    for name, source in recipe.data.items():
        with within(f"data.{name}"):
            check_source(source)
    for name in recipe.steps:
        _check_step(recipe, name)
    steps = [(recipe.origins[name], step) for name, step in recipe.steps.items() if isinstance(step, EvaluateStep)]
    sources = {task.data: recipe.source(task.data) for _, step in steps for task in step.tasks.values()}
    check_columns(dict(steps), sources)


def _check_policy(recipe: Recipe) -> None:
    """The recipe says which policy it starts from, in one way, if any of its steps does."""
    if recipe.policy.path is not None and recipe.policy.from_config is not None:
        raise InputError(
            "policy: give either path (hub id, folder or gguf:FILE) or from_config (a configuration), not both"
        )
    if recipe.policy.path is not None or recipe.policy.from_config is not None:
        return
    for name, step in recipe.steps.items():
        elsewhere = isinstance(step, ImportStep) and step.path is not None
        if MAKES[step.stage] in (POLICY, REWARD_MODEL) and recipe.policy_of(name) is None and not elsewhere:
            raise InputError(
                f"policy: step {recipe.origins[name]!r} starts from it: give path (hub id, folder or gguf:FILE) or "
                "from_config (a configuration)"
            )


def _check_step(recipe: Recipe, name: str) -> None:
    step = recipe.steps[name]
    try:
        _check_names(recipe, name)
        sources = {source: recipe.source(source) for source in recipe.sources_of(name)}
        policies = recipe.policies_of(name) if isinstance(step, GenerateStep) else ()
        check_settings(Given(step, recipe.policy, sources, policies))
    except InputError as error:
        place_in_message(error)
        if error.loc[:1] in (("steps",), ("policy",)) and len(error.loc) > 1:
            raise
        inner = ("generate",) if recipe.is_of_round(name) and error.loc[:1] not in (("data",), ("policy",)) else ()
        error.loc = ("steps", recipe.origins[name], *inner, *error.loc)
        raise


def _check_names(recipe: Recipe, name: str) -> None:
    step = recipe.steps[name]
    if step.launch is not None and isinstance(step, ImportStep):
        raise InputError(f"launch: a step of the stage {step.stage} runs in one process; leave it out")
    if isinstance(step, GenerateStep | ScoreStep | EvaluateStep):
        check_launch(step.launch)
    for source in recipe.sources_of(name):
        key = key_of(step, source)
        if source in recipe.steps and source in recipe.data:
            raise InputError(f"{key}: {source!r} is both a step and a source of data; call one of them something else")
        if source not in recipe.steps or isinstance(step, GenerateStep | EvaluateStep):
            _known(recipe.data, source, "source of data", key)
    for need in recipe.needs(name):
        found = MAKES[_known(recipe.steps, need.step, "step", need.key).stage]
        if found not in need.kinds:
            raise InputError(f"{need.key}: step {need.step!r} makes {found}, not {' or '.join(need.kinds)}")


def _known(table: Mapping[str, T], name: str, kind: str, key: str) -> T:
    try:
        return pick(table, name, kind)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
