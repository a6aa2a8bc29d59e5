"""Settings of exports and compressed copies. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import Settings

# Bits of a weight, with the scales of its block of 32
GGUF_BITS = {"Q8_0": 8.5, "Q5_1": 6.0, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_0": 4.5, "F16": 16.0, "BF16": 16.0}
GgufType = Literal["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16", "BF16"]


class GgufSettings(Settings):
    """How a policy is written as a GGUF file."""

    gguf: GgufType = Field(
        default="Q8_0",
        description="llama.cpp type of the matrices in the GGUF file; vectors are stored in fp32.",
    )
    embeddings: GgufType | None = Field(
        default=None, description="Type of the embeddings and the LM head; that of `gguf` by default."
    )
    pre_tokenizer: str | None = Field(
        default=None,
        description="llama.cpp's name of the pre-tokenizer (tokenizer.ggml.pre); detected by default.",
    )
