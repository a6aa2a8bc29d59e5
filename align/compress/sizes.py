"""How much smaller a compressed policy is."""

from __future__ import annotations

from typing import NamedTuple

from align.report.formatting import size


class Compression(NamedTuple):
    """Bytes of a policy's weights on disk, after and before."""

    bytes: int
    bytes_before: int
    weights: int  # shared ones once

    @property
    def ratio(self) -> float:
        """Bytes after / before: smaller is better."""
        return self.bytes / self.bytes_before

    def to_json(self) -> dict[str, float]:
        """Return the numbers for a manifest."""
        return {**self._asdict(), "ratio": self.ratio, "bits_per_weight": 8 * self.bytes / self.weights}

    def __str__(self) -> str:
        return (
            f"{size(self.bytes_before)} to {size(self.bytes)}: {self.ratio:.3f} of the bytes, "
            f"{8 * self.bytes / self.weights:.2f} bits per weight"
        )
