"""Settings of the stage `synthesize`, and the files that it writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import Settings
from align.inference.settings import EngineSettings, PriceSettings, SamplingSettings
from align.rewards.settings import Combination
from align.rewards.thoughts import THINK, ThoughtSettings
from align.stages.responses.settings import Judges
from align.synth.families.table import AnyFamily
from align.synth.order import written
from align.synth.splits import SplitShares

# NVIDIA's tutorial samples with temperature 0.2, top-p 0.7 and 1,024 tokens; the report does not say. A higher
# temperature is our choice: it repeats less.
SAMPLING = SamplingSettings(temperature=0.7, top_p=0.95, max_new_tokens=1024)


class SynthesisSettings(Settings):
    """What a `synthesize` step makes, by which models, and how it is split."""

    policies: list[str] = Field(
        default_factory=list[str],
        description="Steps whose policies are asked; the last policy before this step if `models` is empty, too.",
    )
    models: list[str] = Field(
        default_factory=list[str],
        description="Further models that are asked: hub ids, folders, gguf:FILE, or a server's model names.",
    )
    engine: EngineSettings = Field(default=EngineSettings(), description="What runs the models.")
    sampling: SamplingSettings = Field(default=SAMPLING, description="How answers are drawn; a family may change it.")
    families: dict[str, AnyFamily] = Field(min_length=1, description="What is made, by name; entries may read others.")
    judges: Judges = Field(default=[], description="Judges of the families that filter by a reward.")
    combine: Combination = Field(
        default="precedence", description="Several judges: the first that knows the prompt, or a weighted sum."
    )
    thoughts: ThoughtSettings = Field(default=THINK, description="Thoughts of the responses, which judges do not see.")
    splits: SplitShares = Field(default=SplitShares(), description="Shares of the seed prompts in each split.")
    language: str | None = Field(
        default=None,
        pattern="^[a-z]{2,3}$",
        examples=["en"],
        description="ISO code, such as en, of the language of prompts and user turns; others are dropped.",
    )
    embeddings: Literal["words", "policy"] = Field(
        default="words",
        description="What distances and the map of the report compare: hashed words, or mean hidden states of the "
        "first policy that is asked, which runs in this process.",
    )
    difficulty: bool = Field(
        default=False,
        description="Report the instruction-following difficulty (IFD) of demonstrations, computed in this process "
        "with the first policy of the step.",
    )
    price: PriceSettings | None = Field(default=None, description="What a server charges, for the estimate.")

    @property
    def sources(self) -> list[str]:
        """Names of the sources that entries read."""
        names = [name for family in self.families.values() for name in family.parents]
        return list(dict.fromkeys(name for name in names if name not in self.families))

    def row_files(self) -> list[str]:
        """Return the names of the files of rows, one for each split and kind."""
        kinds = dict.fromkeys(self.families[name].makes for name in written(self.families))
        return [rows_file(split, kind) for split in self.splits.used for kind in kinds]


def rows_file(split: str, kind: str) -> str:
    """Return the name of the file with the rows of a kind in a split.

    >>> rows_file("sft", "demonstration")
    'sft-demonstrations.jsonl'
    """
    return f"{split}-{kind}s.jsonl"
