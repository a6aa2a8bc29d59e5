"""The interface of an evaluation task: what it reads, which options it uses, what it reports and how it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from align.accounting.flops import Work
from align.errors import InputError
from align.evaluation.statistics import Score
from align.records import Message, Prompt
from align.rewards.thoughts import ThoughtSettings

if TYPE_CHECKING:  # these modules import torch, which validating a recipe does not need
    import numpy as np
    from numpy.typing import NDArray

    from align.data.token_groups import TokenGroup
    from align.distributed.processes import Processes
    from align.distributed.progress import Progress
    from align.models.policy import Policy
    from align.models.reward_model import RewardModel
    from align.rewards.verdicts import Judge

T = TypeVar("T")
R = TypeVar("R")

Row = Mapping[str, Any]
Parts = Mapping[str, tuple[float, float]]  # metric -> (sum, count), of one response or one row
# The options that decide how rows are read
ROW_OPTIONS = frozenset({"limit", "rows.format", "rows.columns", "rows.split", "rows.on_error", "rows.seed"})


# next_turn(row, responses so far): the dialogue that the policy continues next; None after the last turn
NextTurn = Callable[[Row, Sequence[str]], Sequence[Message] | None]


class Answer(NamedTuple):
    """A response to a row."""

    row: int  # index
    response: str  # to the last turn
    earlier: tuple[str, ...] = ()  # responses to the turns before it
    finish: str | None = None  # why the last response ended, if known: `stop`, `length`, …


class TaskSize(NamedTuple):
    """How much a task computes, for an estimate."""

    rows: int
    tokens: int  # of the prompts, or of the rows whose likelihood is measured
    max_sampled_tokens: int


class StartKL(NamedTuple):
    """KL(policy || the policy that its training started from), along the policy's own answers."""

    lacking: str = ""  # why it is unknown
    start: str = ""  # name of the policy that the training started from
    kl: Sequence[tuple[float, float] | None] = ()  # (nats, tokens) of each answer; None for one without text
    work: Work = Work(0, 0, 0)  # forward passes of both policies


class Sampled(NamedTuple):
    """Answers to the rows of a task."""

    rows: Sequence[Row]
    answers: Sequence[Answer]
    next_turn: NextTurn


class PairedResponses(NamedTuple):
    """Responses of a policy and a baseline to the same prompts."""

    pairs: Sequence[tuple[Prompt, tuple[str, str]]]  # (prompt, (the policy's response, the baseline's))
    unanswered: int  # prompts without a response from both


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The outcome of a task for one policy."""

    scores: Mapping[str, Score]
    measures: Mapping[str, Score] = field(default_factory=dict[str, Score])  # beside the scores; in a table on request
    unknown: Mapping[str, str] = field(default_factory=dict[str, str])  # measures without a value, and why
    lines: Sequence[Mapping[str, Any]] = ()  # one per response or row, with its `parts`, for paired comparisons
    verdicts: Sequence[Mapping[str, Any]] = ()  # one per response, in the task's published form
    sampled: Sampled | None = None  # what was graded, with a line for each answer, or for each row
    counts: Mapping[str, object] = field(default_factory=dict[str, object])  # rows, responses, …
    work: Work = Work(0, 0, 0)  # forward passes of the task itself; engines count their own


class EstimateInputs(Protocol):
    """What a task needs to estimate its size."""

    @property
    def max_new_tokens(self) -> int:
        """Limit of each sampled response, in tokens."""
        ...

    def rows(self, task: Task) -> Sequence[Row]:
        """Return the rows of the task's data, after `Task.check_rows`."""
        ...

    def token_groups(self, *, preferred_only: bool, compares: bool = False) -> Sequence[TokenGroup]:
        """Return the encoded rows: the best response of each if `preferred_only`, several generated if `compares`."""
        ...

    def num_prompt_tokens(self, prompts: Sequence[Prompt]) -> int:
        """Return the total number of tokens of the prompts."""
        ...


class TaskInputs(Protocol):
    """What the step that runs a task provides. A task uses what its kind of work needs."""

    @property
    def processes(self) -> Processes:
        """The processes of the launch."""
        ...

    @property
    def progress(self) -> Progress:
        """Receiver of notes and progress."""
        ...

    @property
    def precision(self) -> str:
        """Precision of forward passes: `fp32` or `bf16`."""
        ...

    @property
    def thoughts(self) -> ThoughtSettings:
        """Which part of a response is not graded."""
        ...

    @property
    def limit(self) -> int | None:
        """Number of rows of a task without a source that are evaluated; all if None."""
        ...

    @property
    def policy_path(self) -> str:
        """Folder or hub id of the policy."""
        ...

    @property
    def tasks_folder(self) -> str | None:
        """Folder with task files of lm-evaluation-harness."""
        ...

    @property
    def chat_template(self) -> bool | None:
        """Whether lm-evaluation-harness renders prompts by the policy's chat template; where it has one if None."""
        ...

    @property
    def metrics(self) -> Sequence[str] | None:
        """The metrics that are asked for; all if None."""
        ...

    @property
    def measures_likelihood(self) -> bool:
        """Whether there is a policy that runs in this process, so that likelihoods can be measured beside answers."""
        ...

    @property
    def response_files(self) -> Sequence[str]:
        """Files of responses, as given."""
        ...

    @property
    def reference_answers(self) -> str | None:
        """File of reference answers."""
        ...

    @property
    def judge_name(self) -> str:
        """Names of the judges, with their models."""
        ...

    def policy(self) -> Policy:
        """Return the loaded policy."""
        ...

    def reward_model(self) -> RewardModel:
        """Return the loaded reward model, where the step evaluates one in place of a policy."""
        ...

    def choice_logps(
        self, prompts: Sequence[str] | Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Return the log-probability of each answer to each prompt, in nats.

        A prompt that is a text is continued as it is; one that is messages is answered by the chat template.
        """
        ...

    def rows(self, task: Task) -> Sequence[Row]:
        """Return the rows of the task's data, after `Task.check_rows`."""
        ...

    def token_groups(self, *, preferred_only: bool, compares: bool = False) -> Sequence[TokenGroup]:
        """Return the encoded rows: the best response of each if `preferred_only`, several generated if `compares`."""
        ...

    def reference(self, *, own_answers: bool) -> tuple[Policy, Sequence[TokenGroup]]:
        """Return the reference policy, and the prompts with greedy answers: the policy's own, or the reference's."""
        ...

    def answers(
        self, rows: Sequence[Row], next_turn: NextTurn, *, temperature: float | None = None
    ) -> Sequence[Answer]:
        """Return the responses to the rows, sampled from the policy or read from a file, ordered by row.

        A task that has its own temperatures gives that of these rows; calls with different ones are independent.
        """
        ...

    def paired_responses(self) -> PairedResponses:
        """Return the responses of the policy and of the baseline."""
        ...

    @property
    def has_judge(self) -> bool:
        """Whether the settings describe a judge."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector of unit length for each text from the policy, as the settings say, [N, D]."""
        ...

    def judge(self) -> Judge:
        """Return the judge that the settings describe."""
        ...

    def split(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]], *, activity: str) -> list[R]:
        """Return the result of `work` for each item, in order; each process computes its share of the items."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(ABC):
    """One evaluation.

    Subclasses define the kind of work: `SampledTask` grades responses with a program, `LikelihoodTask` measures rows
    under the policy. Options are named as in the settings: `data`, `policy`, `sampling`, `rows.split`.
    """

    name: str
    metrics: tuple[str, ...] = ()  # reported for one response per prompt; empty if known only after the run
    measures: tuple[str, ...] = ()  # reported beside the metrics: a column of the results only if asked for
    columns: tuple[str, ...] = ()  # that each row must have
    options: frozenset[str] = frozenset()  # that have an effect; any other option is rejected
    required: tuple[str, ...] = ()  # options without which the task cannot run
    # Id of the item that a row is a part of, None for a row by itself; `limit` and `skip` count items and cut none
    item: Callable[[Row], str | None] | None = None

    @abstractmethod
    def run(self, inputs: TaskInputs) -> TaskResult:
        """Evaluate and return the scores."""

    @abstractmethod
    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return how much the task computes."""

    def used_with(self, given: Collection[str]) -> frozenset[str]:
        """Return the options that have an effect when the options in `given` are set."""
        return self.options

    def metrics_of(self, num_responses: int) -> tuple[str, ...]:
        """Return the metrics reported for so many responses per prompt; empty if known only after the run."""
        return self.metrics

    def selected(self, asked: Sequence[str] | None, num_responses: int) -> list[str]:
        """Return the metrics and measures that become columns: those asked for, or all metrics."""
        known = self.metrics_of(num_responses)
        return [each for each in (*known, *self.measures) if each in (known if asked is None else asked)]

    def samples(self, metrics: Sequence[str] | None) -> bool:
        """Return whether answers are sampled where these metrics are asked for; None asks for all."""
        return bool(self.measures)

    def part(self, metric: str) -> str:
        """Return the entry of a line's `parts` or `measures` that the metric aggregates."""
        return metric

    def column(self, name: str, metric: str, *, is_only: bool) -> str:
        """Return the column title of a metric in the result table, for an evaluation called `name`."""
        return name if is_only else f"{name} {metric}"

    def check_rows(self, rows: Sequence[Row], path: str, *, skipped: int = 0) -> None:
        """Raise `InputError` for the first row that lacks a column; `skipped` rows of the file precede these."""
        for number, row in enumerate(rows, start=skipped + 1):
            if missing := [name for name in self.columns if row.get(name) is None]:
                raise InputError(
                    f"{path}: row {number} has no {missing[0]}; {self.name} rows have {', '.join(self.columns)}"
                )
