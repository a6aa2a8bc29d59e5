"""The stages that make groups of responses with rewards: fresh ones of a policy, or given ones judged anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.accounting.formulas import Work
from align.distributed.processes import Processes, init_processes
from align.errors import InputError
from align.inference.samples import Sample, Speed, prompt_key
from align.inference.settings import LocalSettings
from align.models.loading.config import load_config
from align.models.loading.pretrained import default_device, silence_transformers
from align.records import Comparison, Prompt, Record
from align.rewards.judges import make_judge
from align.stages.contents import content_of
from align.stages.costs import NOTHING, Done, dimensions
from align.stages.generating import beside, opened, sampled, write_judged
from align.stages.recipe import GROUPS_FILE, Recipe
from align.stages.sources import prompts, streamed
from align.stages.steps import GenerateStep, ScoreStep, with_folders
from align.stages.training import Context, about
from align.synth.scored_groups import Account, prompt_of

GIVEN = "given"  # whom responses are from that were there already


def generate_groups(context: Context) -> dict[str, Any]:
    """Sample, judge, and write what can be compared; both go on where a kill came."""
    step, recipe = context.recipe.steps[context.name], context.recipe
    assert isinstance(step, GenerateStep)
    silence_transformers()
    processes = init_processes()
    account = Account()
    asked = asked_prompts(recipe, step, account.counts)
    policies = {name: str(context.inputs[name]) for name in recipe.policies_of(context.name)}
    policies |= {model: model for model in step.models}
    path = beside(context.working / GROUPS_FILE, "samples")
    made_with = {"sampling": step.sampling.model_dump(), "models": [content_of(model) for model in step.models]}
    with opened(path, made_with, processes) as journal:
        samples, speeds = sampled(policies, asked, step, journal=journal, processes=processes, report=context.report)
    _judge(context, step, asked, samples, account, processes)
    told = {name: speed.tokens_per_s for name, speed in speeds.items() if speed.seconds}
    done = replace(_done(context, speeds), devices=processes.world_size)
    return {**about(context), "report": account.report(), "tokens_per_s": told, "done": done}


def asked_prompts(recipe: Recipe, step: GenerateStep, counts: Counter[str] | None = None) -> list[Prompt]:
    """The prompts of the step's round, of all its sources; `counts` is told which rows were left out on the way."""
    found: list[Prompt] = []
    for name in [step.data] if isinstance(step.data, str) else step.data:
        source, number = recipe.source(name), (step.prompts or {}).get(name)
        if number is None:
            found += prompts(source, seed=recipe.seed, counts=counts)
            continue
        first, last = step.round * number, (step.round + 1) * number
        if source.limit is None and source.constraints is None:
            source = source.model_copy(update={"limit": last})
        there = prompts(source, seed=recipe.seed, counts=counts)
        if len(there) < last:
            raise InputError(
                f"data.{name}: round {step.round + 1} takes prompts {first + 1} to {last}, and there are {len(there)}"
            )
        found += there[first:last]
    return found


def score_groups(context: Context) -> dict[str, Any]:
    """The given responses with the judge's rewards in place of their own."""
    step, recipe = context.recipe.steps[context.name], context.recipe
    assert isinstance(step, ScoreStep)
    silence_transformers()
    processes = init_processes()
    reading, account = streamed(recipe.source(step.data), kind=Comparison, seed=recipe.seed), Account()
    asked: list[Prompt] = []
    samples: list[Sample] = []
    for number, located in enumerate(reading.records):
        prompt, texts = _answered(located.record, located.place)
        key = prompt_key(prompt)
        asked.append(prompt)
        samples += [Sample(key, place, f"{GIVEN} {number}", text, None, GIVEN, 0) for place, text in enumerate(texts)]
    account.counts.update({f"rows:dropped {reason}": number for reason, number in reading.statistics.dropped.items()})
    _judge(context, step, asked, samples, account, processes)
    return {**about(context), "report": account.report(), "done": Done(devices=processes.world_size)}


def _answered(record: Record, place: str) -> tuple[Prompt, list[str]]:
    """The prompt and what is answered to it; of a demonstration the last assistant message."""
    if isinstance(record, Prompt):
        raise InputError(f"{place}: is a prompt without a response, and there is nothing to score")
    try:
        prompt = prompt_of(record)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if isinstance(record, Comparison):
        return prompt, [response.content for response in record.responses]
    return prompt, [[message.content for message in record.messages if message.role == "assistant"][-1]]


def _judge(
    context: Context,
    step: GenerateStep | ScoreStep,
    asked: Sequence[Prompt],
    samples: Sequence[Sample],
    account: Account,
    processes: Processes,
) -> None:
    """Write the groups, and say what became of everything; the account of it is whole on the first process."""
    out, judges, report = context.working / GROUPS_FILE, with_folders(step.judges, context.inputs), context.report
    settled = step.model_copy(update={"judges": judges})
    judge = make_judge(judges, how=step.combine)
    write_judged(out, asked, samples, judge, settled, account=account, processes=processes, report=report)
    told = sorted(account.counts.items())
    report.note("; ".join(f"{number:,} {name.replace(':', ' ')}" for name, number in told if number))


def _done(context: Context, speeds: dict[str, Speed]) -> Done:
    """What sampling has computed, where it was done in this process."""
    step = context.recipe.steps[context.name]
    assert isinstance(step, GenerateStep)
    of = [folder for name, folder in context.inputs.items() if name in context.recipe.policies_of(context.name)]
    engine = step.engine.chosen
    if not isinstance(engine, LocalSettings) or step.models or not of:
        return Done(dimensions="responses of models whose dimensions are not looked up, or of a server")
    return sampling_done(of[0], list(speeds.values()), engine.precision)


def sampling_done(folder: Path, speeds: Sequence[Speed], precision: str, more: Work = NOTHING) -> Done:
    """What drawing samples from a policy took, and a forward pass over more."""
    tokens = sum(speed.computed for speed in speeds) + more.tokens
    pairs = sum(speed.pairs_attended for speed in speeds) + more.attended_pairs
    targets = sum(speed.drawn for speed in speeds) + more.targets
    size = dimensions(load_config(str(folder)))
    return Done(
        dimensions=size,
        weights=None if isinstance(size, str) else size.num_weights,
        observed=Work(tokens, pairs, targets),
        precision=precision,
        device=default_device(),
    )
