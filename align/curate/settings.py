"""Settings of a `curate` step. Importing them imports no numpy."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from align.config import Settings
from align.curate.embeddings.settings import EncoderSettings
from align.errors import InputError
from align.rewards.builtin_judges import LlmSettings

READ, KEPT, MERGED = "rows", "kept", "merged"  # counts of rows; the others are reasons for which rows are dropped
MIN_RECALL = 0.999  # of pairs at the threshold, by the bands of MinHash


class Bands(NamedTuple):
    """How the permutations of MinHash are cut into bands: rows that agree in one band are compared."""

    number: int
    rows: int  # permutations of each


class NearDuplicateSettings(Settings):
    """Rows that share most of their n-grams of words; of two, the one of higher reward, then the longer, is kept."""

    threshold: float = Field(
        default=0.7, ge=0.3, le=1, description="Jaccard similarity of two sets of n-grams from which rows are dropped."
    )
    ngram: int = Field(default=5, ge=1, description="Words and punctuation marks of an n-gram.")
    permutations: int = Field(default=128, ge=16, le=1024, description="Permutations of MinHash, at most.")
    same_task: bool = Field(
        default=True,
        description="Keep rows whose prompts differ in numbers, operators, negations, quantifiers, verifiable "
        "instructions, quoted words or languages: they ask for another task.",
    )

    def bands(self) -> Bands:
        """Return the longest bands that find a pair at the threshold with a probability of at least 0.999.

        P(candidate) = 1 - (1 - s^r)^b for a pair of similarity s, b bands and r rows (Leskovec et al., "Mining of
        Massive Datasets", sec. 3.4.2).

        >>> NearDuplicateSettings(threshold=0.7).bands()
        Bands(number=26, rows=4)
        """
        best = Bands(1, 1)
        for rows in range(1, self.permutations + 1):
            agree = self.threshold**rows
            number = 1 if agree == 1 else math.ceil(math.log(1 - MIN_RECALL) / math.log1p(-agree))
            if number * rows > self.permutations:
                break
            best = Bands(number, rows)
        return best

    @model_validator(mode="after")
    def _check_num_permutations(self) -> Self:
        needed = 1 if self.threshold == 1 else math.ceil(math.log(1 - MIN_RECALL) / math.log1p(-self.threshold))
        if needed > self.permutations:
            raise ValueError(f"{self.permutations} permutations miss pairs at the threshold; {needed} are needed")
        return self


class SemanticSettings(Settings):
    """Rows whose prompts, or whole demonstrations, have similar embeddings and ask for the same task."""

    encoder: EncoderSettings = Field(default=EncoderSettings(), description="Encoder of the rows.")
    threshold: float = Field(
        default=0.9, ge=0, le=1, description="Minimum cosine of two embeddings for rows to be similar."
    )
    action: Literal["report", "remove"] = Field(
        default="report",
        description="report: list similar rows in similar.jsonl and keep them; remove: keep one of them. Similar rows "
        "that ask for another task (see near_duplicates.same_task) are always kept and listed.",
    )
    clusters: int | None = Field(
        default=None,
        ge=1,
        description="Number of k-means clusters; rows are compared within a cluster (SemDeDup, Abbas et al. 2023). "
        "Default: all pairs are compared for up to 200,000 texts, above that one cluster per 20,000 texts.",
    )
    seed: int = Field(default=0, description="Seed of k-means.")


class NeighbourSettings(Settings):
    """Rows that repeat a test prompt in other words."""

    encoder: EncoderSettings = Field(default=EncoderSettings(), description="Encoder of rows and test prompts.")
    nearest: int = Field(default=5, ge=1, description="Number of nearest prompts to check for each test prompt.")
    threshold: float = Field(default=0.8, ge=-1, le=1, description="Minimum cosine for a row to be checked.")
    judge: LlmSettings | None = Field(
        default=None,
        description="Chat model that decides whether a row repeats the test prompt (Yang et al. 2023, arXiv "
        "2311.04850); `mode` has no effect. Default: it does if they ask for one task (near_duplicates.same_task).",
    )


class DecontaminationSettings(Settings):
    """Rows that contain an item of a test set are dropped."""

    tests: list[str] | Literal["evaluate"] = Field(
        default="evaluate",
        description="Sources of test items; `evaluate` for those of all `evaluate` steps of the recipe.",
    )
    ngram: int = Field(default=8, ge=2, description="Words of an n-gram; punctuation and case are ignored.")
    threshold: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="A row is dropped if n-grams that it shares with a test item cover more than this share of the "
        "item's words.",
    )
    neighbours: NeighbourSettings | None = Field(
        default=None,
        description="Also drop rows that paraphrase a test prompt; null to search n-grams only.",
    )


class GroupChoiceSettings(Settings):
    """Which responses of a group with rewards are kept, after merging."""

    keep: Literal["all", "most_variance", "best_and_low"] = Field(
        default="all",
        description="all: all responses; most_variance: the responses whose rewards have the largest variance (PODS, "
        "arXiv 2504.13818); best_and_low: the best response, and the one whose reward is closest to two standard "
        "deviations below the mean (arXiv 2502.16825).",
    )
    responses: int | None = Field(default=None, ge=2, description="Number of responses that most_variance keeps.")
    drop_ties: bool = Field(
        default=True,
        description="Drop unlabelled groups of several responses whose rewards are all equal.",
    )

    @model_validator(mode="after")
    def _number(self) -> Self:
        if (self.keep == "most_variance") != (self.responses is not None):
            raise InputError("is the number of responses that keep: most_variance keeps", ("responses",))
        return self


class RankSettings(Settings):
    """A score of each row that is kept, written to its metadata; only the best rows are kept where `keep` is given."""

    by: Literal["rds", "ifd"] = Field(
        description="rds: largest cosine to one of the `targets`, with weighted-mean pooling (RDS+, arXiv 2503.01807); "
        "ifd: instruction-following difficulty (Li et al. 2024), the NLL of the answer given the prompt divided by its "
        "NLL alone."
    )
    targets: str | None = Field(default=None, description="Source of target examples, for rds.")
    encoder: EncoderSettings = Field(
        default=EncoderSettings(pooling="weighted_mean"), description="Encoder of rows and targets, for rds."
    )
    policy: str | None = Field(
        default=None,
        description="Step whose policy computes the likelihoods of ifd; the recipe's own policy by default.",
    )
    keep: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the rows to keep. rds: targets pick their nearest rows in turns; ifd: the highest scores "
        "below 1.",
    )

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if (self.by == "rds") != (self.targets is not None):
            raise InputError("is the source that `by: rds` compares rows with", ("targets",))
        for name in ("encoder", "policy"):
            if name in self.model_fields_set and (name == "encoder") != (self.by == "rds"):
                raise InputError(f"has no effect with by: {self.by}; remove it", (name,))
        return self


class CurationSettings(Settings):
    """What is removed from the rows."""

    exact_duplicates: bool = Field(
        default=True, description="Drop rows that are equal but for case, white space and Unicode form."
    )
    merge_prompts: bool = Field(
        default=True,
        description="Merge comparisons of equal prompts into one group with all distinct responses, where rewards and "
        "labels allow it.",
    )
    near_duplicates: NearDuplicateSettings | None = Field(
        default=NearDuplicateSettings(), description="Drop rows that nearly equal a kept one; null to keep them."
    )
    semantic_duplicates: SemanticSettings | None = Field(
        default=None, description="Report or drop rows that are paraphrases of others; null to skip this comparison."
    )
    decontamination: DecontaminationSettings | None = Field(
        default=DecontaminationSettings(), description="Drop rows that contain test items; null to keep them."
    )
    groups: GroupChoiceSettings | None = Field(
        default=None, description="Choose responses of groups with rewards; null to keep all groups unchanged."
    )
    rank: RankSettings | None = Field(default=None, description="Score the remaining rows; null to skip ranking.")

    @property
    def neighbours(self) -> NeighbourSettings | None:
        """The search for test prompts in other words, if there is one."""
        return self.decontamination.neighbours if self.decontamination is not None else None
