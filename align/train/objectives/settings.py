"""Settings of a preference loss and its SFT term; no torch."""

from __future__ import annotations

from typing import cast

from pydantic import Field, model_validator

from align.config import Settings

# Losses whose papers add the negative log-likelihood of the better response -> (weight, whether per token)
SFT_TERMS = {
    "cpo": (1.0, True),  # Xu et al. 2024, arXiv:2401.08417, eq. 4; per token as in TRL
    "orpo": (1.0, True),  # Hong et al. 2024, arXiv:2403.07691, eq. 6
}

NO_SFT_TERM = "a loss on labels has no SFT term; leave it out"
# Prompts of an optimizer step that the KL estimate of kto takes: each with the responses to another one
MIN_KL_PROMPTS = 2
TOO_FEW_PROMPTS = (
    f"kto estimates its reference point from the other prompts of a step: use at least {MIN_KL_PROMPTS}, or the loss "
    "apo_zero_unpaired"
)


class PreferenceSettings(Settings):
    """The preference loss and the weight of the SFT term."""

    name: str = Field(
        default="rpo_bwd_kl", description="Name of a built-in preference loss, or of your own as `module:name`."
    )
    settings: dict[str, float | bool | str] = Field(
        default_factory=dict[str, float | bool | str],
        description="Settings of the loss that differ from its defaults, such as beta and eta.",
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the negative log-likelihood of the best response, added to the loss; "
        "1.0 by default for `orpo` and `cpo`; losses on labels (`kto`) have none.",
    )
    sft_per_token: bool = Field(
        default=False,
        description="Average the SFT term over the tokens of the response; the published weights are for a sum. "
        "True by default for `orpo` and `cpo`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _add_sft_term(cls, values: object) -> object:
        """Add the SFT term of a loss that has one in its paper, unless the settings give their own."""
        if not isinstance(values, dict):
            return values
        given = cast(dict[str, object], values)
        weight, per_token = SFT_TERMS.get(str(given.get("name")), (0.0, False))
        return {"sft_weight": weight, "sft_per_token": per_token, **given}
