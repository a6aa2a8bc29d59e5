"""MT-Bench: two turns on 80 questions, each rated from 1 to 10 by a judge (Zheng et al. 2023, sec. 2.2).

Rows are FastChat's question.jsonl: {question_id, category, turns: [first, second]}. Their `reference` is not used, as
in FastChat: the judge is shown the answers of the file `reference_answers` (reference_answer/JUDGE.jsonl) for questions
of mathematics, reasoning and coding. 13 of the 30 published ones are wrong; corrected ones are a file too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import InputError
from align.evaluation.measures.response_measures import KL_FROM_START, MEASURES, measure_parts
from align.evaluation.pairs.answers import read_answers
from align.evaluation.sampled_task import OF_SAMPLING, mean_parts
from align.evaluation.statistics import Score, score
from align.evaluation.task import (
    ROW_OPTIONS,
    Answer,
    EstimateInputs,
    Parts,
    Row,
    Sampled,
    Task,
    TaskInputs,
    TaskResult,
    TaskSize,
)
from align.records import Message, Prompt, is_cut_off
from align.rewards.judge_prompts.files import REFERENCE
from align.rewards.judge_prompts.parsing import MAX_RATING, MIN_RATING, RATING_MARKS
from align.rewards.thoughts import visible_text
from align.rewards.verdicts import Group, Verdict

# FastChat's temperature_config
TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
NUM_TURNS = 2
UNPARSED = -1  # FastChat's score of a judgment without a rating


class _Rated(NamedTuple):
    """A turn of an answer with the judge's verdict."""

    row: Row
    turn: int
    group: Group
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class MtBenchTask(Task):
    """The answers of a policy, or of a file, rated by a judge."""

    measures: tuple[str, ...] = MEASURES
    options: frozenset[str] = (
        OF_SAMPLING | ROW_OPTIONS | {"data", "responses", "judges", "combine", "thoughts", "reference_answers", "out"}
    )
    required: tuple[str, ...] = ("data",)

    def used_with(self, given: Collection[str]) -> frozenset[str]:
        """Return the options used to sample from a policy if one is given, else those used to read responses."""
        return self.options - ({"responses"} if "policy" in given else OF_SAMPLING)

    def column(self, name: str, metric: str, *, is_only: bool) -> str:
        """Return `name`, and the metric if it is one of several or in nats, which are not taken for a rating."""
        return name if is_only and metric != KL_FROM_START else f"{name} {metric}"

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return the size of the first turns."""
        prompts = [Prompt(tuple(next_turn(row, ()) or ())) for row in inputs.rows(self)]
        tokens = NUM_TURNS * len(prompts) * inputs.max_new_tokens
        return TaskSize(len(prompts), inputs.num_prompt_tokens(prompts), tokens)

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Ask the policy, or read its responses, and have both turns rated."""
        rows = [_checked(row, number) for number, row in enumerate(inputs.rows(self), start=1)]
        references = _references(rows, inputs.reference_answers)
        answers = _answers(rows, inputs)
        items = [item for answer in answers for item in _groups(rows[answer.row], answer, references, inputs)]
        verdicts = inputs.split([group for _, _, group in items], inputs.judge(), activity="judging")
        rated = [_Rated(*item, verdict) for item, (verdict,) in zip(items, verdicts, strict=True)]
        measured = [measure_parts([*answer.earlier, answer.response], inputs.thoughts) for answer in answers]
        lines = _lines(answers, rated, measured)
        return TaskResult(
            scores=_scores(lines),
            measures=mean_parts(answers, measured),
            lines=lines,
            verdicts=[_judgment(each, inputs) for each in rated],
            counts={
                "rows": len(rows),
                "unanswered": len(rows) - len({answer.row for answer in answers}),
                "cut_off": sum(is_cut_off(answer.finish) for answer in answers),
                **_judge_counts([each.verdict for each in rated]),
            },
            sampled=Sampled(rows, answers, next_turn),
        )


def next_turn(row: Row, responses: Sequence[str]) -> Sequence[Message] | None:
    """Return the dialogue up to the question of the next turn, None after the second."""
    questions: Sequence[str] = row["turns"]
    if len(responses) == len(questions):
        return None
    earlier = [
        message
        for question, response in zip(questions, responses, strict=False)
        for message in (Message("user", question), Message("assistant", response))
    ]
    return (*earlier, Message("user", questions[len(responses)]))


def _checked(row: Row, number: int) -> Row:
    turns = row["turns"]
    if not isinstance(turns, list) or len(turns) != NUM_TURNS or not all(isinstance(turn, str) for turn in turns):
        raise InputError(f"mt_bench: row {number} has turns {turns!r:.60}; a question has two texts")
    if not isinstance(row["category"], str) or row["category"] not in TEMPERATURES:
        raise InputError(f"mt_bench: row {number} has category {row['category']!r}, not {', '.join(TEMPERATURES)}")
    return row


def _references(rows: Sequence[Row], path: str | None) -> dict[str, tuple[str, ...]]:
    """Return the reference answers by question. Raises `InputError` if a question that needs them has none."""
    needing = [str(row["question_id"]) for row in rows if row["category"] in WITH_REFERENCE]
    if not needing:
        return {}
    if path is None:
        raise InputError(
            f"mt_bench: questions of {', '.join(WITH_REFERENCE)} are judged with reference answers: name their file, "
            "FastChat's reference_answer/JUDGE.jsonl",
            ("reference_answers",),
        )
    found = {name: answer.turns for name, answer in read_answers(path).items()}
    if missing := [name for name in needing if len(found.get(name, ())) < NUM_TURNS]:
        raise InputError(
            f"{path}: has no reference answers for both turns of question {missing[0]}", ("reference_answers",)
        )
    return {name: found[name] for name in needing}


def _answers(rows: Sequence[Row], inputs: TaskInputs) -> list[Answer]:
    """Return the answers, in the order of the rows; each category is sampled at its own temperature."""
    if inputs.response_files:
        found = list(inputs.answers(rows, next_turn))
    else:
        found = list[Answer]()
        for temperature in sorted(set(TEMPERATURES.values())):
            places = [index for index, row in enumerate(rows) if TEMPERATURES[row["category"]] == temperature]
            own = (
                inputs.answers([rows[place] for place in places], next_turn, temperature=temperature) if places else ()
            )
            found += [answer._replace(row=places[answer.row]) for answer in own]
    if short := [answer for answer in found if len(answer.earlier) != NUM_TURNS - 1]:
        name = rows[short[0].row]["question_id"]
        raise InputError(f"mt_bench: question {name} is answered in {1 + len(short[0].earlier)} turns; it has two")
    return sorted(found, key=lambda answer: answer.row)


def _groups(
    row: Row, answer: Answer, references: Mapping[str, tuple[str, ...]], inputs: TaskInputs
) -> list[tuple[Row, int, Group]]:
    """Return both turns as groups for the judge, with the row and the turn."""
    known: dict[str, Any] = {"question_id": row["question_id"], "category": row["category"]}
    if reference := references.get(str(row["question_id"])):
        known[REFERENCE] = list(reference)
    first = visible_text(answer.earlier[0], inputs.thoughts)
    dialogues = [next_turn(row, responses) or () for responses in ((), (first,))]
    texts = (answer.earlier[0], answer.response)
    both = zip(dialogues, texts, strict=True)
    return [(row, turn, (Prompt(tuple(each), known), (text,))) for turn, (each, text) in enumerate(both, start=1)]


def _lines(answers: Sequence[Answer], rated: Sequence[_Rated], measured: Sequence[Parts]) -> list[dict[str, Any]]:
    """Return one line per question, with its parts: (sum of scores, number of scores) of each metric.

    `rated` has the turns of each answer, `measured` its measures. Of several answers to a question the last is shown,
    and all count.
    """
    by_row: dict[int, list[_Rated]] = {}
    for number, each in enumerate(rated):
        by_row.setdefault(answers[number // NUM_TURNS].row, []).append(each)
    shown = {answer.row: (answer, parts) for answer, parts in zip(answers, measured, strict=True)}
    lines: list[dict[str, Any]] = []
    for number, turns in by_row.items():
        row = turns[0].row
        parts: dict[str, tuple[float, int]] = {}
        for metric, wanted in (("score", (1, 2)), ("turn_1", (1,)), ("turn_2", (2,)), (row["category"], (1, 2))):
            values = [each.verdict.reward for each in turns if each.turn in wanted and each.verdict.reward is not None]
            if values:
                parts[metric] = (sum(values), len(values))
        *earlier, last = (each.group[1][0] for each in turns[-NUM_TURNS:])
        line = {"prompt": row["turns"][0], "question_id": row["question_id"], "response": last}
        answer, measures = shown[number]
        finish = {} if answer.finish is None else {"finish": answer.finish}
        lines.append({**line, "earlier_responses": earlier, **finish, "parts": parts, "measures": measures})
    return lines


def _scores(lines: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Return each metric with its interval over questions, whose turns are dependent."""
    found: dict[str, Score] = {}
    for metric in METRICS:
        parts = [line["parts"][metric] for line in lines if metric in line["parts"]]
        if parts:
            found[metric] = score([total for total, _ in parts], [count for _, count in parts])
    if not found:
        raise InputError("mt_bench: the judge rates none of the answers")
    return found


def _judge_counts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return how many judgments have no rating, and the bounds of the score if these were 1, or 10."""
    known = [verdict.reward for verdict in verdicts if verdict.reward is not None]
    unparsed = len(verdicts) - len(known)
    bounds = tuple((sum(known) + unparsed * rating) / len(verdicts) for rating in (MIN_RATING, MAX_RATING))
    return {
        "judgments": len(verdicts),
        "unparsed": unparsed,
        "void": dict(Counter(verdict.why for verdict in verdicts if verdict.reward is None)),
        "score_bounds": bounds,
        "single_brackets": sum(_is_fallback(verdict) for verdict in verdicts),
        "out_of_range": sum(not MIN_RATING <= rating <= MAX_RATING for rating in known),
    }


def _is_fallback(verdict: Verdict) -> bool:
    """Return whether a rating was read from single brackets, which may be those of a citation."""
    return verdict.reward is not None and isinstance(verdict.raw, str) and not RATING_MARKS[0].search(verdict.raw)


def _judgment(each: _Rated, inputs: TaskInputs) -> dict[str, Any]:
    """Return a judgment in the form of FastChat's JUDGE_single.jsonl."""
    files = inputs.response_files
    return {
        "question_id": each.row["question_id"],
        "model": Path(files[0]).stem if files else inputs.policy_path,
        "judge": [inputs.judge_name, "single"],
        "judgment": each.verdict.raw,
        "score": UNPARSED if each.verdict.reward is None else each.verdict.reward,
        "turn": each.turn,
    }


METRICS = ("score", "turn_1", "turn_2", *TEMPERATURES)
TASK = MtBenchTask(name="mt_bench", metrics=METRICS, columns=("question_id", "category", "turns"))
