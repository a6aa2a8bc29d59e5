"""The judge that is a chat model: it compares two responses in both orders, or rates each from 1 to 10.

Models prefer the first or the second position (Zheng et al. 2023, MT-Bench, sec. 3.4). A comparison therefore counts
only where both orders give the same result.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import combinations, count, islice
from typing import NamedTuple

from align.accounting.flops import Decoder, Work
from align.accounting.process_usage import PROCESS_USAGE
from align.errors import RowOrigin
from align.inference.engines import load_engine
from align.inference.samples import REFUSED, Engine, Sample, respond
from align.inference.settings import SamplingSettings
from align.models.loading.config import dimensions, load_config
from align.records import Message, Prompt
from align.rewards.builtin_judges import LlmSettings
from align.rewards.judge_prompts.files import questions_of
from align.rewards.judge_prompts.parsing import Decision, Question
from align.rewards.thoughts import response_text, visible_text
from align.rewards.verdicts import REQUEST_FAILED, Game, Group, Verdict, why_void

GROUPS_AT_ONCE = 16  # groups per batch of questions; a killed run loses at most their verdicts
RETRY = "That did not end as asked. Say nothing but {form}."


class Answer(NamedTuple):
    """An answer of the model."""

    decision: Decision | None
    text: str
    void: str = ""  # why there is no decision
    refused: str = ""  # why a server refuses the question


class LlmJudge:
    """Compares or rates responses by a chat model.

    `pairs`: every two responses of a group are compared in both orders. A win counts 1, a tie 0.5, a loss 0. The reward
    of a response is their mean over the pairs where both orders agree; a response without such a pair gets none.
    `rating`: each response is rated from 1 to 10 separately. A question whose answer cannot be parsed is repeated, for
    `attempts` requests in total.
    """

    def __init__(self, engine: Engine, settings: LlmSettings) -> None:
        self.engine = engine
        self.model = settings.model
        self.mode = settings.mode
        self.attempts = settings.attempts
        self.thoughts = settings.thoughts
        self.is_local = settings.engine.kind == "local"
        self.questions = questions_of(settings.prompts, settings.mode)
        self.sampling = SamplingSettings(
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=settings.seed
        )

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Yield the verdicts of each group; without a reward where no answer could be parsed."""
        judge = self._compare if self.mode == "pairs" else self._rate
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            yield from judge(groups[start : start + GROUPS_AT_ONCE])

    def _compare(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        questions: list[Question] = []
        for prompt, responses in groups:
            for one, other in combinations(map(visible_text, responses), 2):
                questions += [self.questions.comparison(prompt, *shown) for shown in ((one, other), (other, one))]
        answers = iter(self.ask(questions))
        for _, responses in groups:
            pairs = list(combinations(range(len(responses)), 2))
            found = {pair: (next(answers), next(answers)) for pair in pairs}
            yield tuple(_from_pairs(index, found) for index in range(len(responses)))

    def _rate(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        questions = [
            self.questions.rating(prompt, visible_text(response))
            for prompt, responses in groups
            for response in responses
        ]
        answers = iter(self.ask(questions))
        for _, responses in groups:
            yield tuple(
                Verdict(
                    None if each.decision is None else each.decision.value,
                    why=self._why(each),
                    raw=each.text,
                    refused=bool(each.refused),
                )
                for each in islice(answers, len(responses))
            )

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answer to each question; one that cannot be read is asked for again."""
        found: dict[int, Answer] = {}
        dialogues = [question.messages for question in questions]
        for attempt in count(1):
            open_questions = [
                index
                for index in range(len(questions))
                if index not in found or (found[index].decision is None and not found[index].refused)
            ]
            if not open_questions or attempt > self.attempts:
                break
            asked = [Prompt(dialogues[index], origin=RowOrigin("a question", skips=True)) for index in open_questions]
            with self._counted():
                samples = list(respond(self.engine, asked, self.sampling))
            if not self.is_local:
                PROCESS_USAGE.add_served_answers(len(samples))
            for index, sample in zip(open_questions, samples, strict=True):
                found[index] = self._read(sample, questions[index])
                retry = Message("user", RETRY.format(form=questions[index].form))
                dialogues[index] = (*questions[index].messages, Message("assistant", sample.text), retry)
        return [found[index] for index in range(len(questions))]

    @contextmanager
    def _counted(self) -> Generator[None]:
        """Count the forward passes that the model takes in this block, if it runs in this process."""
        before = self.engine.throughput.work
        yield
        after = self.engine.throughput.work
        if after.tokens > before.tokens:
            work = Work(*(late - early for early, late in zip(before, after, strict=True)))
            PROCESS_USAGE.add_judging(self._dimensions, work)

    @cached_property
    def _dimensions(self) -> Decoder | str:
        return dimensions(load_config(self.model))

    def _read(self, sample: Sample, question: Question) -> Answer:
        if sample.finish.startswith(REFUSED):
            return Answer(None, "", REQUEST_FAILED, sample.finish)
        visible = visible_text(response_text(sample.text, sample.finish), self.thoughts)
        decision = question.parse(visible)
        void = "" if decision is not None else why_void(visible, sample.finish)
        return Answer(decision, sample.text, void)

    def _why(self, answer: Answer) -> str:
        if answer.refused or answer.decision is not None:
            return answer.refused
        return f"none of {self.attempts} answers could be parsed: {answer.void}"


def llm_judge(settings: LlmSettings) -> LlmJudge:
    """Return the chat model of the settings as a judge."""
    return LlmJudge(load_engine(settings.model, settings.engine), settings)


def _from_pairs(index: int, found: Mapping[tuple[int, int], tuple[Answer, Answer]]) -> Verdict:
    """Return the verdict on a response: its mean over the pairs where both orders agree. `raw` has all answers."""
    results: list[float] = []
    reasons: list[str] = []
    raw: dict[str, list[str]] = {}
    games: list[Game] = []
    for pair, answers in found.items():
        if index not in pair:
            continue
        raw[f"{pair[0]} and {pair[1]}"] = [answer.text for answer in answers]
        # An answer is about the response shown first: the pair's first one, then its second one.
        shown_first, shown_second = answers if index == pair[0] else reversed(answers)
        both = [_game(shown_first, is_first=True), _game(shown_second, is_first=False)]
        games += both
        if refused := "".join(dict.fromkeys(answer.refused for answer in answers)):
            return Verdict(None, why=refused, refused=True, games=games)
        if both[0].win is None or both[1].win is None:
            reasons.append("no answer could be parsed")
        elif both[0].win != both[1].win:
            reasons.append("the two orders disagree")
        else:
            results.append(both[0].win)
    if not results:
        why = ", ".join(f"{reason} ({reasons.count(reason)})" for reason in dict.fromkeys(reasons))
        return Verdict(
            None, why=f"no pair is decided: {why}" if why else "no other response to compare with", raw=raw, games=games
        )
    return Verdict(sum(results) / len(results), why=f"{len(results)} of {len(raw)} pairs decided", raw=raw, games=games)


def _game(answer: Answer, *, is_first: bool) -> Game:
    """Return the game for the response that was shown first, or for the other one."""
    if answer.decision is None:
        return Game(None, answer.text, answer.void)
    value, is_clear = answer.decision
    return Game(value if is_first else 1 - value, answer.text, is_clear=is_clear)
