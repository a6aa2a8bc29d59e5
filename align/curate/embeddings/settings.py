"""Settings of an encoder. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import Settings

PoolingName = Literal["cls", "mean", "max", "last", "weighted_mean", "first_last", "echo", "prompt_eol"]


class EncoderSettings(Settings):
    """What turns texts into vectors."""

    model: str | None = Field(
        default=None,
        description=(
            "A sentence-transformers or language model (Hub ID, folder, gguf:FILE, or step:NAME), or a text file of "
            "word vectors (.txt, .vec, .gz); the recipe's own policy by default."
        ),
    )
    pooling: PoolingName | None = Field(
        default=None,
        description=(
            "Pooling of a language model's hidden states. echo: the input is the text twice, mean over the second copy "
            "(Springer et al. 2024); prompt_eol: last token of a prompt that asks for one word (Jiang et al. 2023). "
            "Default: first_last, the mean over the first and last layer. Sentence-transformers models have their own."
        ),
    )
    whiten: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Whiten the vectors and keep this many dimensions, such as 128 (Su et al. 2021); fitted on the texts. "
            "Improves models that were not trained on sentence pairs, and degrades those that were."
        ),
    )
    max_tokens: int = Field(default=512, ge=1, description="Maximum tokens of a text; longer texts are truncated.")


ObjectiveName = Literal["classification", "cosine", "triplet", "simcse", "sigmoid"]
# Columns that an objective reads, in order; simcse reads the first set that the rows have
OBJECTIVE_COLUMNS: dict[ObjectiveName, tuple[tuple[str, ...], ...]] = {
    "classification": (("sentence1", "sentence2", "label"),),
    "cosine": (("sentence1", "sentence2", "score"),),
    "triplet": (("anchor", "positive", "negative"),),
    "simcse": (("anchor", "positive", "negative"), ("anchor", "positive"), ("text",)),
    "sigmoid": (("anchor", "positive"),),
}
TEXT_COLUMNS = ("text", "sentence1", "sentence2", "anchor", "positive", "negative")


class JestSettings(Settings):
    """Joint example selection (JEST, Evans et al. 2024): train on a jointly chosen subset of each batch."""

    filter: float = Field(default=0.5, ge=0, lt=1, description="Share of a batch that is not trained on.")
    chunks: int = Field(
        default=16,
        ge=1,
        description="Number of draws in which rows are chosen; each depends on the rows chosen before.",
    )
    gain: float = Field(
        default=1.0,
        gt=0,
        description="Inverse temperature of the scores; larger values choose closer to the highest scores.",
    )
    reference: str | None = Field(
        default=None,
        description=(
            "Encoder trained on curated rows: step:NAME of a step `embedder`, or a folder. Scores are the loss minus "
            "the reference's loss (learnability). Without it, scores are the loss, which prefers noisy rows."
        ),
    )


class TrainingSettings(Settings):
    """How an encoder is trained."""

    objective: ObjectiveName = Field(
        description=(
            "classification, cosine, triplet: SBERT (Reimers and Gurevych 2019); simcse: SimCSE (Gao et al. 2021), "
            "unsupervised for rows with `text`; sigmoid: SigLIP (Zhai et al. 2023)."
        )
    )
    epochs: float = Field(default=1.0, gt=0, description="Passes over the rows.")
    batch_size: int = Field(
        default=64, ge=2, description="Rows per optimizer step; simcse and sigmoid use the other rows as negatives."
    )
    learning_rate: float = Field(default=3e-5, gt=0, description="Peak learning rate of AdamW.")
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1, description="Share of the optimizer steps for linear warmup.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay.")
    temperature: float = Field(default=0.05, gt=0, description="Temperature of simcse (0.05 in the paper).")
    margin: float = Field(default=1.0, gt=0, description="Margin of triplet (1 in the SBERT paper).")
    dropout: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Dropout of unsupervised simcse; the two views of a text differ only by the dropout mask.",
    )
    max_score: float = Field(default=1.0, gt=0, description="Maximum score in the rows of cosine; 5 for STS.")
    jest: JestSettings | None = Field(default=None, description="Joint example selection, for the objective sigmoid.")
    log_every: int = Field(
        default=10, ge=1, description="Optimizer steps between logged losses; they are in the manifest."
    )
    seed: int = Field(default=0, description="Seed of the row order, dropout and selection.")
