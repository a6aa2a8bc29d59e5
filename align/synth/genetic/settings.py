"""Settings of Genetic-Instruct. Those without a source are not published, and are our choice. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import Settings
from align.errors import InputError
from align.procedural import code_prompting

# One of them is drawn for each parent: the five of WizardCoder (Luo et al. 2023, sec. 3.1), in our own words
HEURISTICS = {
    "constraint": "Make it harder by one more requirement that the solution has to meet; state it in a dozen words.",
    "rarer": "Make it harder by putting a rare and specific requirement in the place of a common one.",
    "steps": "Make it harder by demanding more steps of reasoning where a few would have been enough.",
    "misdirection": "Make it harder by quoting plausible code that is wrong, without saying what its fault is.",
    "bounds": "Make it harder by a stricter limit on running time or memory, where such a limit makes sense.",
}
Part = Literal["mutation", "crossover", "solution", "tests", "judgement"]
PLACEHOLDERS: dict[Part, tuple[str, ...]] = {
    "mutation": ("heuristic", "prompt"),
    "crossover": ("number", "examples"),
    "solution": ("prompt",),
    "tests": ("prompt",),
    "judgement": ("prompt", "answer"),
}


class GeneticSettings(Settings):
    """Sizes, probabilities and models of Genetic-Instruct; defaults of arXiv 2407.21077 where it gives them."""

    task: Literal["code"] | None = Field(
        default=None,
        description="Keep only instructions of this built-in task that are not in its test split. Requests have the "
        "wording of tasks:code_prompting, on which the model must be trained; execution runs the examples of the "
        "instruction with the judge verifier.",
    )
    number: int = Field(default=1000, ge=1, description="Pairs of a task and its solution to make, at most.")
    generations: int = Field(
        default=3, ge=1, description="Generations; the colonies are merged after each. Our choice; not published."
    )
    colonies: int = Field(default=20, ge=1, description="Populations that grow in parallel (arXiv 2407.21077: 20).")
    mutation_probability: float = Field(
        default=0.5, ge=0, le=1, description="Probability that a batch mutates; it crosses otherwise (paper: 0.5)."
    )
    mutation_batch: int = Field(default=100, ge=1, description="Tasks that are mutated in a batch (paper: 100).")
    crossover_batch: int = Field(default=10, ge=1, description="Requests of a batch of crossover (paper: 10).")
    crossover_parents: int = Field(
        default=3, ge=2, description="Tasks shown in a request of crossover. Our choice; not published."
    )
    crossover_children: int = Field(
        default=5, ge=1, description="New tasks asked for in a request of crossover. Our choice; not published."
    )
    heuristics: dict[str, str] = Field(
        default=HEURISTICS,
        min_length=1,
        description="Mutation prompts, by name. Default: those of `task`, or five that are modelled on WizardCoder's.",
    )
    instructor_temperature: float = Field(
        default=1.2, ge=0, description="Temperature of the model that mutates and crosses, which is `by` (paper: 1.2)."
    )
    coder_by: str | None = Field(
        default=None, description="Model that solves the tasks and writes tests; the one of `by` if left out."
    )
    judge_by: str | None = Field(default=None, description="Model that judges solutions; the one of `by` if left out.")
    judge_temperature: float = Field(default=1.0, ge=0, description="Temperature of the judge (paper: 1.0).")
    fitness: Literal["judge", "execution", "both", "none"] = Field(
        default="judge",
        description="What a solution that compiles must pass: a model's judgement (paper), tests that the coder wrote "
        "before and that the step's `judges` run (executed_tests), both, or nothing.",
    )
    min_reward: float = Field(
        default=1.0, description="Reward of the step's judges from which a solution passes execution."
    )
    near_duplicate: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Jaccard similarity of two tasks' shingles of three words from which one is dropped. Our choice.",
    )
    max_asked: float = Field(
        default=4.0, ge=1, description="Tasks asked for, per pair that is wanted, after which a generation ends."
    )
    templates: dict[Part, str] = Field(default_factory=dict[Part, str], description="Files with your own wordings.")

    @property
    def mutations(self) -> dict[str, str]:
        """How to mutate, by name: the heuristics that are set, or those of the task."""
        is_set = self.task is None or "heuristics" in self.model_fields_set
        return self.heuristics if is_set else code_prompting.HEURISTICS

    @property
    def judges_by_model(self) -> bool:
        """Whether a model judges the solutions."""
        return self.fitness in ("judge", "both")

    @property
    def executes(self) -> bool:
        """Whether tests are written and run."""
        return self.fitness in ("execution", "both")

    def check_used(self) -> None:
        """Raise for a setting that has no effect."""
        if self.task is not None and self.judges_by_model:
            raise InputError("solutions of a built-in task are run: set execution, or none", ("fitness",))
        crossover = ("crossover_batch", "crossover_parents", "crossover_children")
        unused = {
            **dict.fromkeys(
                () if self.judges_by_model else ("judge_by", "judge_temperature"), f"fitness: {self.fitness}"
            ),
            **dict.fromkeys(() if self.executes else ("min_reward",), f"fitness: {self.fitness}"),
            **dict.fromkeys(() if self.mutation_probability < 1 else crossover, "mutation_probability: 1"),
            **dict.fromkeys(
                () if self.mutation_probability > 0 else ("mutation_batch", "heuristics"), "mutation_probability: 0"
            ),
        }
        for name in sorted(unused.keys() & self.model_fields_set):
            raise InputError(f"has no effect with {unused[name]}; remove it", (name,))
        for part in sorted(self.templates.keys() - set(self.parts)):
            raise InputError("is never asked for with these settings; remove it", ("templates", part))

    @property
    def parts(self) -> list[Part]:
        """The kinds of requests that are made."""
        used = {
            "mutation": self.mutation_probability > 0,
            "crossover": self.mutation_probability < 1,
            "tests": self.executes and self.task is None,
            "judgement": self.judges_by_model,
        }
        return [part for part in PLACEHOLDERS if used.get(part, True)]
