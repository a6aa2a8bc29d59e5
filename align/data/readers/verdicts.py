"""Two responses to a prompt, and a verdict on which is better: the formats of human and LLM annotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from align.data.columns import Row
from align.data.readers.cells import as_list, as_number, as_object, metadata_of, shortened
from align.data.readers.prompts import PROMPT_COLUMNS, row_prompt, split_answer
from align.errors import InputError
from align.records import Comparison, Record, Response

FIRST, SECOND, TIE = 0, 1, None  # the better response; a tie has no chosen response
Verdict = Callable[[Row], int | None]
Rewards = Callable[[Row], tuple[float | None, float | None]]


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """Reader of rows with two responses, each in its own column, and a verdict.

    A tie becomes a comparison without a chosen response, which training drops and counts.
    """

    responses: tuple[str, str]  # columns
    verdict: Verdict
    judged_by: tuple[str, ...]  # columns of the verdict and of the rewards
    prompt: tuple[str, ...] = PROMPT_COLUMNS  # the first that a row has
    rewards: Rewards = lambda row: (None, None)

    def __call__(self, row: Row) -> Iterator[Record]:
        """Yield the two responses in the order of their columns."""
        prompt = row_prompt(row, self.prompt)
        (first_prompt, first), (second_prompt, second) = (
            split_answer(prompt.messages, row[name], name) for name in self.responses
        )
        if first_prompt != second_prompt:
            names = " and ".join(self.responses)
            raise InputError(f"{names} have different prompts; they may differ in their last message only")
        responses = tuple(map(Response.of, (first, second), self.rewards(row)))
        metadata = metadata_of(row, {*prompt.columns, *self.responses, *self.judged_by})
        yield Comparison(first_prompt, responses, self.verdict(row), metadata)


def by_value(column: str, values: Mapping[str, int | None]) -> Verdict:
    """Return a verdict by the value of a column, written as text; 1.0 and true are read as 1."""

    def verdict(row: Row) -> int | None:
        return _pick(row.get(column), column, values)

    return verdict


def by_scale(column: str) -> Verdict:
    """Return a verdict by a number from 1 (the first response is better) to 2 (the second); 0 and 1.5 are ties.

    AlpacaFarm writes 1 or 2. AlpacaEval writes 1 plus the probability that the second is better.
    """

    def verdict(row: Row) -> int | None:
        number = as_number(row[column], column)
        if number is None or (number != 0 and not FIRST + 1 <= number <= SECOND + 1):
            raise InputError(f"{column} is {shortened(row[column])}; a number from 1 to 2 is needed, or 0 for a tie")
        if number in (0, 1.5):
            return TIE
        return FIRST if number < 1.5 else SECOND  # noqa: PLR2004 - the middle of the scale

    return verdict


def by_sign(column: str) -> Verdict:
    """Return a verdict by a strength: negative if the first response is better, positive if the second is."""

    def verdict(row: Row) -> int | None:
        strength = _strength(row, column)
        if strength == 0:
            return TIE
        return FIRST if strength < 0 else SECOND

    return verdict


def margin_of(column: str) -> Rewards:
    """Return rewards that differ by the strength of the preference, as a margin: the worse response has 0."""

    def rewards(row: Row) -> tuple[float, float]:
        strength = _strength(row, column)
        return max(0.0, -strength), max(0.0, strength)

    return rewards


def scores_in(first: str, second: str) -> Rewards:
    """Return the rewards in two columns."""

    def rewards(row: Row) -> tuple[float | None, float | None]:
        return as_number(row.get(first), first), as_number(row.get(second), second)

    return rewards


def by_flags(first: str, second: str, tie: str) -> Verdict:
    """Return a verdict by three columns, of which exactly one is 1."""
    outcomes = {first: FIRST, second: SECOND, tie: TIE}

    def verdict(row: Row) -> int | None:
        marked = [name for name in outcomes if as_number(row.get(name), name) == 1]
        if len(marked) != 1:
            raise InputError(f"{len(marked)} of {', '.join(outcomes)} are 1; exactly one is needed")
        return outcomes[marked[0]]

    return verdict


def by_majority(columns: tuple[str, ...], values: Mapping[str, int | None]) -> Verdict:
    """Return the verdict of most annotators, each with a column of their own; a tie if none has a majority."""

    def verdict(row: Row) -> int | None:
        votes = [_pick(row[name], name, values) for name in columns if row.get(name) is not None]
        if not votes:
            raise InputError(f"no verdict in {', '.join(columns)}")
        leader = max((FIRST, SECOND, TIE), key=votes.count)
        return leader if votes.count(leader) * 2 > len(votes) else TIE

    return verdict


def by_aspects(row: Row) -> int | None:
    """Return the response that a judge prefers in more of just-eval's aspects."""
    aspects = as_object(row["parsed_result"], "parsed_result").values()
    verdicts = [as_object(aspect, "a verdict").get("preference") for aspect in aspects]
    wins = [verdicts.count(side) for side in ("A", "B")]
    if wins[0] == wins[1]:
        return TIE
    return FIRST if wins[0] > wins[1] else SECOND


def _pick(value: object, column: str, values: Mapping[str, int | None]) -> int | None:
    text = str(value).strip().lower().removesuffix(".0")
    text = {"true": "1", "false": "0"}.get(text, text)
    if text not in values:
        raise InputError(f"{column} is {shortened(value)}; one of {', '.join(values)} is needed")
    return values[text]


def _strength(row: Row, column: str) -> float:
    number = as_number(row[column], column)
    if number is None:
        raise InputError(f"{column} is {shortened(row[column])}; a number is needed")
    return number


ONE_OR_TWO = {"0": TIE, "1": FIRST, "2": SECOND}
WINNERS = {"model_a": FIRST, "model_b": SECOND, "tie": TIE, "tie (bothbad)": TIE, "both_bad": TIE}
FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")
ANNOTATORS = ("annotator1", "annotator2", "annotator3")

pku_saferlhf = JudgedPair(  # Ji et al. 2024; the safety label is another question, which is not read
    ("response_0", "response_1"), by_value("better_response_id", {"0": FIRST, "1": SECOND}), ("better_response_id",)
)
helpsteer2_preference = JudgedPair(  # Wang et al. 2024 (HelpSteer2-Preference)
    ("response_1", "response_2"),
    by_sign("preference_strength"),
    ("preference_strength",),
    rewards=margin_of("preference_strength"),
)
helpsteer3_preference = JudgedPair(  # Wang et al. 2025 (HelpSteer3-Preference)
    ("response1", "response2"),
    by_sign("overall_preference"),
    ("overall_preference",),
    rewards=margin_of("overall_preference"),
)
auto_j = JudgedPair(  # Li et al. 2023 (Auto-J)
    ("response 1", "response 2"), by_value("label", {"0": FIRST, "1": SECOND, "2": TIE}), ("label",)
)
llmbar = JudgedPair(  # Zeng et al. 2023 (LLMBar)
    ("output_1", "output_2"), by_value("label", {"1": FIRST, "2": SECOND}), ("label",)
)
alpaca_farm = JudgedPair(("output_1", "output_2"), by_scale("preference"), ("preference",))  # Dubois et al. 2023
pandalm = JudgedPair(  # Wang et al. 2023 (PandaLM)
    ("response1", "response2"), by_majority(ANNOTATORS, ONE_OR_TWO), ANNOTATORS
)
arena = JudgedPair(  # Zheng et al. 2023 (Chatbot Arena): dialogues with their own prompts
    ("conversation_a", "conversation_b"), by_value("winner", WINNERS), ("winner",), prompt=()
)
just_eval_pairs = JudgedPair(("output_A", "output_B"), by_aspects, (), prompt=("input",))


def shp(row: Row) -> Iterator[Record]:
    """Yield two answers to a post, with their votes as rewards; Ethayarajh et al. 2022 (SHP)."""
    read = JudgedPair(
        ("human_ref_A", "human_ref_B"),
        by_value("labels", {"1": FIRST, "0": SECOND}),
        ("labels", "score_A", "score_B"),
        prompt=("prompt",),
        rewards=scores_in("score_A", "score_B"),
    )
    others = {name: value for name, value in row.items() if name != "history"}  # elsewhere the turns before a prompt
    return read({**others, "prompt": row["history"]})


def arena_turns(row: Row) -> Iterator[Record]:
    """Yield two dialogues of one user, whose turns are lists in three columns."""
    read = JudgedPair(("response_a", "response_b"), by_flags(*FLAGS), FLAGS, prompt=())
    dialogues = {name: _dialogue(row, name) for name in read.responses}
    return read({**{name: value for name, value in row.items() if name != "prompt"}, **dialogues})


def _dialogue(row: Row, column: str) -> list[dict[str, object]]:
    """Return the turns of the user and of one model as a chat list."""
    asked, answered = as_list(row["prompt"], "prompt"), as_list(row[column], column)
    if len(asked) != len(answered):
        raise InputError(f"{column} has {len(answered)} turns, and prompt has {len(asked)}")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for turn in zip(asked, answered, strict=True)
        for role, text in zip(roles, turn, strict=True)
    ]
