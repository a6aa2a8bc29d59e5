"""Splits of synthetic rows that share no seed prompt: SFT, preference data and test.

The split of a seed prompt depends on its words only, and everything made from it belongs to the same split. Prompts
that are marked as unsafe leave the SFT split and stay in the preference data (Adler et al. 2024, sec. 3.2.1).
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal, Self

from pydantic import Field, model_validator

from align.config import Settings

SplitName = Literal["sft", "preference", "test"]
SPLITS: tuple[SplitName, ...] = ("sft", "preference", "test")
FLAGGED = "flagged as unsafe"  # reason why a row is in no split
SEVERAL = "seeds in several splits"
DIGEST_BITS = 64
ROUNDING = 1e-9  # of the sum of the shares


def seed_words(prompt: str) -> str:
    """Return what decides the split of a seed prompt: its words, whatever their case, punctuation and order."""
    return " ".join(sorted(re.findall(r"\w+", prompt.lower())))


class SplitShares(Settings):
    """Shares of the seed prompts in each split."""

    sft: float = Field(default=0.5, ge=0, le=1, description="Share for demonstrations.")
    preference: float = Field(default=0.4, ge=0, le=1, description="Share for preference data.")
    test: float = Field(default=0.1, ge=0, le=1, description="Share for evaluation.")

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        total = self.sft + self.preference + self.test
        if abs(total - 1) > ROUNDING:
            raise ValueError(f"the shares of sft, preference and test sum to {total:g}, not to 1")
        return self

    @property
    def used(self) -> list[SplitName]:
        """The splits that rows can belong to."""
        return [name for name in SPLITS if getattr(self, name) > 0]

    def split_of(self, prompt: str, *, flagged: bool = False) -> SplitName | None:
        """Return the split of a seed prompt; case, punctuation and order of its words do not matter.

        A flagged one in the SFT split goes to the preference data, and to none where there is no such split.
        """
        digest = hashlib.sha256(f"split of a seed prompt: {seed_words(prompt)}".encode()).digest()
        place = int.from_bytes(digest[: DIGEST_BITS // 8]) / 2**DIGEST_BITS
        chosen: SplitName = self.used[-1]
        for name in self.used:
            place -= getattr(self, name)
            if place < 0:
                chosen = name
                break
        if flagged and chosen == "sft":
            return "preference" if self.preference > 0 else None
        return chosen
