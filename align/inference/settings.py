"""Settings of sampling and of the engines that run a policy. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config import Settings
from align.errors import InputError
from align.inference.managed.settings import (
    ManagedSettings,
    SglangSettings,
    TransformersServeSettings,
    VllmSettings,
)
from align.models.loading.int8 import Int8Method, check_torchao
from align.registry import import_dotted

# Fields of a request that the sampling settings decide
REQUEST_FIELDS = {"model", "messages", "temperature", "top_p", "max_tokens", "stop", "seed", "n", "stream"}


class SamplingSettings(Settings):
    """How responses are sampled.

    >>> SamplingSettings(num_responses=4, temperature=0.7).max_new_tokens
    512
    """

    num_responses: int = Field(default=1, ge=1, description="Responses sampled for each prompt (K).")
    temperature: float = Field(default=1.0, ge=0, description="Softmax temperature; 0 decodes greedily.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample from the smallest set of most likely tokens whose probabilities sum to this (nucleus).",
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Maximum length of a response, in tokens.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="Strings that end a response; they are not part of it."
    )
    seed: int = Field(default=0, description="Seed of all samples.")

    @model_validator(mode="after")
    def _check_temperature(self) -> Self:
        if self.temperature == 0 and self.num_responses > 1:
            raise ValueError(
                f"{self.num_responses} responses at temperature 0 are one response {self.num_responses} times: "
                "raise temperature or set num_responses to 1"
            )
        return self


class LocalSettings(Settings):
    """A Hugging Face model in this process."""

    tokenizer: str | None = Field(
        default=None, description="Folder or Hub ID of the tokenizer; the model's own if left out."
    )
    chat_template: str | None = Field(
        default=None,
        description="Name of one of the tokenizer's templates, a built-in name, or a Jinja file; its own if left out.",
    )
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="Data type of the weights.")
    quantize: Int8Method | None = Field(
        default=None,
        description="Quantize the linear layers in memory, as the stage `quantize` does by `method`; needs torchao.",
    )
    batch_size: int = Field(default=64, ge=1, description="Responses decoded together; does not change the samples.")

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a sample, as JSON."""
        unset = {"quantize"} if self.quantize is None else set[str]()  # as before there was this setting
        return self.model_dump(mode="json", exclude={"batch_size", *unset})

    @field_validator("quantize")
    @classmethod
    def _check_torchao(cls, method: Int8Method | None) -> Int8Method | None:
        if method is not None:
            check_torchao()
        return method


class PriceSettings(Settings):
    """What a server's tokens cost, for a million of them."""

    prompt: float = Field(default=0.0, ge=0, description="Price of a million tokens of prompts.")
    response: float = Field(default=0.0, ge=0, description="Price of a million tokens of responses.")


class ServerSettings(Settings):
    """An OpenAI-compatible server, such as vLLM, SGLang or NIM, that runs already.

    A server of more than one policy needs `models` or `refresh`: nothing else says how it follows them.

    vLLM fills in unset sampling parameters from the model's generation config: start it with
    `--generation-config vllm`, or send {"top_k": -1, "repetition_penalty": 1.0} in `body`. `transformers serve` uses
    the temperature only if the model's generation config has do_sample: send
    {"generation_config": '{"do_sample": true}'}.
    """

    base_url: str = Field(description="URL of the server up to and including /v1.")
    api_key_env: str | None = Field(
        default=None, description="Name of the environment variable that holds the API key; no key if left out."
    )
    models: dict[str, str] = Field(
        default={}, description="The server's names of policies and models: {NAME_HERE: NAME_THERE}."
    )
    refresh: str | None = Field(
        default=None,
        description="Command that makes the server offer a policy, run before each one is sampled: {folder} in it is "
        "the policy's folder, {policy} its name.",
    )
    concurrency: int = Field(
        default=16,
        ge=1,
        description="Maximum number of simultaneous requests, of all processes of a launch together; halved where the "
        "server answers 429 or 503, and grown again after successes.",
    )
    timeout_s: float = Field(
        default=600.0, gt=0, description="Seconds after which a request without a complete answer is retried."
    )
    retries: int = Field(default=6, ge=0, description="Maximum number of retries of a request after transient errors.")
    body: dict[str, Any] = Field(default={}, description="Additional fields of every request.")
    price: PriceSettings | None = Field(
        default=None, description="Price of the tokens, in `accounting.currency`. Default: cost is unknown."
    )

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, base_url: str) -> str:
        """Refuse what would be written into manifests, without showing it."""
        _, _, rest = base_url.partition("://")
        if "@" in rest.partition("/")[0] or "?" in base_url or "#" in base_url:
            raise InputError(
                "a URL ends in /v1, without a user name, password or query; put a key into an environment variable and "
                "name the variable in api_key_env"
            )
        return base_url

    @field_validator("refresh")
    @classmethod
    def _check_refresh(cls, refresh: str | None) -> str | None:
        if refresh is not None and "{folder}" not in refresh:
            raise ValueError("{folder} is missing in the command: it stands for the policy that the server must offer")
        return refresh

    @model_validator(mode="after")
    def _check_body(self) -> Self:
        if taken := sorted(self.body.keys() & REQUEST_FIELDS):
            raise ValueError(f"body sets {taken[0]}, which the sampling settings set")
        return self

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a sample, as JSON; another address may offer the same model."""
        return self.model_dump(mode="json", include={"body", *(("models",) if self.models else ())})


class CustomEngineSettings(Settings):
    """A user's own engine."""

    name: str = Field(
        pattern=r"^[\w.]+:\w+$",
        examples=["my_engines:make"],
        description="module:function that returns an `align.inference.samples.Engine`, called with (policy, settings, "
        "name=...).",
    )
    settings: dict[str, Any] = Field(default={}, description="Settings passed to the function.")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        import_dotted(name, "engine")
        return name

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a sample, as JSON: all of them."""
        return self.model_dump(mode="json")


class EngineSettings(Settings):
    """The engine that runs a policy: one of the keys, `local` if none is given.

    >>> EngineSettings(server=ServerSettings(base_url="http://localhost:8000/v1")).kind
    'server'
    """

    local: LocalSettings | None = Field(default=None, description="Run the model in this process.")
    vllm: VllmSettings | None = Field(default=None, description="Start a server of vLLM for each policy.")
    sglang: SglangSettings | None = Field(default=None, description="Start a server of SGLang for each policy.")
    transformers_serve: TransformersServeSettings | None = Field(
        default=None, description="Start a server of `transformers serve` for each policy."
    )
    server: ServerSettings | None = Field(default=None, description="Send requests to an OpenAI-compatible server.")
    custom: CustomEngineSettings | None = Field(default=None, description="Use an engine of your own.")

    @model_validator(mode="after")
    def _check_one_engine(self) -> Self:
        if len(given := self._given()) > 1:
            raise InputError(f"give one engine, not {' and '.join(given)}")
        return self

    def _given(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def kind(self) -> str:
        """The engine's key in `align.inference.engines.ENGINES`."""
        return next(iter(self._given()), "local")

    @property
    def chosen(self) -> LocalSettings | ManagedSettings | ServerSettings | CustomEngineSettings:
        """The settings of the engine."""
        return self.local or self.managed or self.server or self.custom or LocalSettings()

    @property
    def managed(self) -> ManagedSettings | None:
        """The settings of an engine whose server is started for each policy; None for other engines."""
        return self.vllm or self.sglang or self.transformers_serve

    @property
    def loads_model(self) -> bool:
        """Whether a policy is a folder or a Hub ID that is loaded here: in this process, or by a managed server."""
        return self.managed is not None or isinstance(self.chosen, LocalSettings)

    @property
    def contents(self) -> list[str]:
        """What decides a sample by its content: user code as module:function, and a tokenizer and a chat template."""
        if self.custom:
            return [self.custom.name]
        local = self.local or LocalSettings()
        return [each for each in (local.tokenizer, local.chat_template) if each]

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a sample, as JSON, without those that only decide how it is computed."""
        return {self.kind: self.chosen.cache_key()}
