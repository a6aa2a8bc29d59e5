"""The models of a curate step: encoders, the judge of similar test prompts, and the policy of a rank."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from align.accounting.flops import Decoder, Work, sum_work
from align.content_hash import STEP
from align.curate.embeddings.settings import EncoderSettings
from align.curate.settings import CurationSettings
from align.errors import InputError, Location, within
from align.records import Comparison, Demonstration, Record
from align.rewards.settings import JudgeSettings
from align.stages.base import EMBEDDINGS, POLICY, Input, UsedEngine
from align.stages.inputs.context import RunContext, StepInputs, policy_key
from align.stages.responses.settings import (
    judge_engines,
    judge_inputs,
    judge_key,
    judge_models,
    with_folders,
)

if TYPE_CHECKING:
    from align.curate.curation import Encode, Models, Ranking
    from align.curate.semantic import Vectors
    from align.rewards.verdicts import Judge

ModelWork = tuple[Decoder | str, Work]  # dimensions, or why they are unknown, and forward passes

NEIGHBOURS = ("decontamination", "neighbours")


def encoders(step: CurationSettings) -> list[tuple[EncoderSettings, Location]]:
    """Return the encoders of a step, with the settings that hold them."""
    found: list[tuple[EncoderSettings, Location]] = []
    if step.semantic_duplicates is not None:
        found.append((step.semantic_duplicates.encoder, ("semantic_duplicates", "encoder")))
    if step.neighbours is not None:
        found.append((step.neighbours.encoder, (*NEIGHBOURS, "encoder")))
    if step.rank is not None and step.rank.by == "rds":
        found.append((step.rank.encoder, ("rank", "encoder")))
    return found


def uses_own_policy(step: CurationSettings) -> bool:
    """Return whether the step runs the recipe's own policy."""
    by_likelihood = step.rank is not None and step.rank.by == "ifd" and step.rank.policy is None
    return by_likelihood or any(encoder.model is None for encoder, _ in encoders(step))


def judges(step: CurationSettings) -> list[JudgeSettings]:
    """Return the judge of similar test prompts, if there is one."""
    if step.neighbours is None or step.neighbours.judge is None:
        return []
    return [JudgeSettings.model_validate({"name": "llm", "settings": step.neighbours.judge.model_dump()})]


def model_inputs(step: CurationSettings) -> list[Input]:
    """Return the steps whose models the step runs."""
    steps = [(encoder.model or "", (*loc, "model")) for encoder, loc in encoders(step)]
    found = [Input(name.removeprefix(STEP), (POLICY,), loc) for name, loc in steps if name.startswith(STEP)]
    if step.rank is not None and step.rank.policy is not None:
        found.append(Input(step.rank.policy, (POLICY,), ("rank", "policy")))
    return [*found, *(each._replace(loc=(*NEIGHBOURS, "judge", "model")) for each in judge_inputs(judges(step)))]


def loaded_models(step: CurationSettings) -> list[tuple[str, Location]]:
    """Return the models that the step loads, with the settings that name them."""
    named = [(encoder.model, (*loc, "model")) for encoder, loc in encoders(step)]
    own = [(model, loc) for model, loc in named if model is not None and not model.startswith(STEP)]
    return [*own, *((path, (*NEIGHBOURS, "judge", "model")) for path, _ in judge_models(judges(step)))]


def used_engines(step: CurationSettings) -> list[UsedEngine]:
    """Return the engine of the judge."""
    return [each._replace(loc=(*NEIGHBOURS, "judge", "engine")) for each in judge_engines(judges(step))]


def models_key(step: CurationSettings, inputs: StepInputs) -> list[Any]:
    """Return the content of the models, and how the recipe's own policy runs where it is one of them."""
    own = policy_key(inputs) if uses_own_policy(step) else []
    return [*own, *(inputs.content(model) for model, _ in loaded_models(step)), *judge_key(judges(step), inputs)]


@contextmanager
def curation_models(step: CurationSettings, context: RunContext, ran: list[ModelWork]) -> Generator[Models]:
    """Yield what the step asks models for; `ran` receives what they compute. A judge's server runs during the block."""
    from align.curate.curation import Models  # noqa: PLC0415 - imports numpy
    from align.curate.neighbours import same_features  # noqa: PLC0415
    from align.stages.responses.judging import serving_judges  # noqa: PLC0415 - imports torch

    encode = {loc[:-1]: partial(_encode, encoder, loc, context, ran) for encoder, loc in encoders(step)}
    with serving_judges(with_folders(judges(step), context.inputs), context) as served:
        confirm = partial(_same_by_judge, served[0].make()) if served else same_features
        yield Models(
            encode=encode.get(("semantic_duplicates",)),
            encode_tests=encode.get(NEIGHBOURS),
            confirm=confirm,
            rank=_rank(step, context, encode.get(("rank",)), ran),
        )


def _same_by_judge(judge: Judge, pairs: Sequence[tuple[str, str]]) -> Sequence[bool | None]:
    from align.curate.neighbours import same_by_judge  # noqa: PLC0415 - imports numpy
    from align.rewards.llm_judge import LlmJudge  # noqa: PLC0415 - imports torch

    assert isinstance(judge, LlmJudge)
    return same_by_judge(judge, pairs)


def _encode(
    settings: EncoderSettings, loc: Location, context: RunContext, ran: list[ModelWork], texts: Sequence[str]
) -> Vectors:
    """Return the vectors of texts, which a whitening is fitted on."""
    from align.curate.embeddings.encoder import make_encoder  # noqa: PLC0415 - imports torch

    inputs = context.inputs
    if settings.model is not None:
        settings = settings.model_copy(update={"model": inputs.path_of(settings.model)})
    with within(*loc):
        encoder = make_encoder(
            settings, policy=inputs.policy, texts=texts, cache=inputs.run / EMBEDDINGS, content=inputs.content
        )
    context.progress.note(f"embedding {len(texts):,} texts: {encoder.name}")
    vectors = encoder.encode(texts)
    size, work = encoder.computed
    if work.tokens:
        ran.append((size, work))
    return vectors


def _rank(step: CurationSettings, context: RunContext, encode: Encode | None, ran: list[ModelWork]) -> Any:  # noqa: ANN401 - a function, or None
    """Return what ranks records; None without a rank."""
    if step.rank is None:
        return None
    if step.rank.by == "ifd":
        return partial(_by_difficulty, step.rank.policy, context, ran)
    assert encode is not None and step.rank.targets is not None
    return partial(_by_similarity, step.rank.targets, context, encode)


def _by_similarity(targets: str, context: RunContext, encode: Encode, records: Sequence[Record]) -> Ranking:
    from align.curate.curation import Ranking  # noqa: PLC0415 - imports numpy
    from align.curate.output import whole_text  # noqa: PLC0415
    from align.curate.ranking import nearest_target  # noqa: PLC0415
    from align.stages.inputs.sources import rows_of, streamed  # noqa: PLC0415 - imports pyarrow

    source = context.inputs.sources[targets]
    with rows_of(targets):
        read = streamed(source, kind=Demonstration, seed=context.inputs.seed).records
        examples = [whole_text(located.record) for located in read]
    context.inputs.check_unchanged(source)
    if not examples:
        raise InputError(f"{targets} has no rows to compare with", ("rank", "targets"))
    vectors = encode([*examples, *map(whole_text, records)])
    return Ranking(*nearest_target(vectors[len(examples) :], vectors[: len(examples)]))


def _by_difficulty(step: str | None, context: RunContext, ran: list[ModelWork], records: Sequence[Record]) -> Ranking:
    from align.curate.curation import Ranking  # noqa: PLC0415 - imports numpy
    from align.curate.ranking import most_difficult  # noqa: PLC0415
    from align.data.chat_encoder import ChatEncoder  # noqa: PLC0415
    from align.data.chat_templates import apply_template  # noqa: PLC0415
    from align.evaluation.likelihood import likelihoods  # noqa: PLC0415 - imports torch
    from align.models.loading.config import dimensions, max_positions  # noqa: PLC0415
    from align.models.loading.pretrained import default_device  # noqa: PLC0415
    from align.models.policy import load_policy  # noqa: PLC0415
    from align.train.instruction_difficulty import instruction_difficulty  # noqa: PLC0415

    settings = context.inputs.policy_from(step)
    policy, tokenizer = load_policy(settings)
    apply_template(tokenizer)
    policy = policy.to(default_device()).eval()
    encoder = ChatEncoder(tokenizer, max_length=max_positions(policy.base.config))
    works: list[Work] = []
    score = partial(likelihoods, policy, works=works)
    scores = instruction_difficulty([_best_answer(record) for record in records], encoder, score)
    ran.append((dimensions(policy.base.config), sum_work(works)))
    if unknown := sum(score is None for score in scores):
        context.progress.note(f"rank: {unknown:,} rows have no difficulty: {dict(encoder.counts)}")
    return Ranking(scores, most_difficult(scores))


def _best_answer(record: Record) -> Demonstration:
    """Return a dialogue with the answer that is labelled as preferred, or else has the highest reward."""
    if isinstance(record, Demonstration):
        return record
    if not isinstance(record, Comparison):
        raise InputError("a prompt without an answer has no difficulty; rank demonstrations or groups", ("rank", "by"))
    best = record.chosen
    if best is None:
        best = max(range(len(record.responses)), key=lambda index: record.responses[index].reward or 0.0)
    return Demonstration((*record.prompt, record.responses[best].message), record.metadata, tools=record.tools)
