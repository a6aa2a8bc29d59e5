"""Model cards: a README.md with Hub front matter for a folder of a policy or reward model. Uses no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError, safe_dump

from align.artifacts import write_text
from align.models.settings import exported_gguf, is_adapter

README = "README.md"
LICENSE_KEYS = ("license", "license_name", "license_link")
PIPELINES = {"policy": "text-generation", "reward_model": "text-classification"}
FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".gz", ".zst", ".arrow", ".gguf")  # of data and model files
TAG = "align"  # marks the cards that this module writes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """One training stage of a model."""

    name: str
    kind: str  # such as sft, preference or reward_model
    loss: str | None = None
    data: Sequence[str] = ()  # names, Hub IDs or files of the data
    rows: int | None = None  # number of training rows
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # plain values


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSummary:
    """One evaluation metric of a model, with its confidence interval if there is one."""

    task: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    rows: int | None = None  # number of rows or prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class CardContent:
    """The content of a model card as plain data."""

    title: str
    kind: Literal["policy", "reward_model"]
    base: str | None = None  # Hub ID or folder of the base model; None if it was initialized randomly
    datasets: Sequence[str] = ()  # names, Hub IDs or files of all training data
    stages: Sequence[StageSummary] = ()  # in order
    metrics: Sequence[MetricSummary] = ()
    attributes: Mapping[str, float] = field(default_factory=dict[str, float])  # weight of each reward attribute


def write_model_card(folder: Path, card: CardContent) -> Path:
    """Write the README.md of a model's folder and return its path; an existing one is replaced.

    The front matter has the base model and the datasets that are Hub IDs, the library, tags and the pipeline tag. It
    has the license of the base if the base is a folder whose README.md states one. Absolute paths are shortened to
    their last part.
    """
    form = "adapters" if is_adapter(str(folder)) else "gguf" if exported_gguf(str(folder)) else card.kind
    front_matter = _front_matter(card, form)
    body = "\n".join(_body(card, form, license_of_base=front_matter.license))
    content = f"---\n{front_matter.to_yaml()}\n---\n\n{body}"
    write_text(folder / README, str(ModelCard(content)))  # parsed once, so that what is written can be read
    return folder / README


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Return the front matter of a folder's README.md; empty if there is none or it is not valid."""
    try:
        return metadata_load(folder / README) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def hub_id(name: str | None) -> str | None:
    """Return the name if it is a Hub ID `owner/name` and not a local path; otherwise None.

    >>> hub_id("HuggingFaceTB/SmolLM2-135M"), hub_id("data/rows.jsonl"), hub_id("/models/base")
    ('HuggingFaceTB/SmolLM2-135M', None, None)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    if name is None or "/" not in name or Path(name).suffix in FILE_SUFFIXES or Path(name).exists():
        return None
    return name


def _front_matter(card: CardContent, form: str) -> ModelCardData:
    base: dict[str, Any] = read_front_matter(Path(card.base)) if card.base is not None else {}
    # The README of any other folder names the model that the folder's own model was trained from
    inherited = base.get("base_model") if TAG in (base.get("tags") or ()) else None
    losses = [stage.loss for stage in card.stages if stage.loss and ":" not in stage.loss]
    kinds = [stage.kind for stage in card.stages]
    return ModelCardData(
        base_model=hub_id(card.base) or inherited,
        datasets=_distinct(name for name in card.datasets if hub_id(name)) or None,
        library_name="peft" if form == "adapters" else "transformers",
        pipeline_tag=PIPELINES[card.kind],
        tags=_distinct([TAG, *kinds, *losses, *(["gguf"] if form == "gguf" else [])]),
        **{key: base[key] for key in LICENSE_KEYS if isinstance(base.get(key), str)},
    )


def _body(card: CardContent, form: str, *, license_of_base: str | None) -> list[str]:
    what = "reward model" if card.kind == "reward_model" else "policy"
    base = f"trained from {_code(_label(card.base))}" if card.base is not None else "trained from random weights"
    lines = [f"# {_escape(card.title)}", "", f"A {what} {base} with `align`.", ""]
    lines += ["## How to load", "", *_fence(USAGE[form], "python"), ""]
    if card.attributes:
        lines += ["## Reward", "", "The reward is the weighted sum of the attribute scores.", ""]
        lines += [*_table(("attribute", "weight"), ((_code(k), f"{v:g}") for k, v in card.attributes.items())), ""]
    if card.stages:
        lines += ["## Training", "", *_stage_table(card.stages), ""]
        for stage in card.stages:
            if stage.settings:
                text = safe_dump(dict(stage.settings), sort_keys=False, allow_unicode=True).strip()
                lines += [f"Settings of {_code(stage.name)}:", "", *_fence(text, "yaml"), ""]
    if card.datasets:
        lines += ["## Data", "", *(f"- {_code(_label(name))}" for name in _distinct(card.datasets)), ""]
    if card.metrics:
        lines += ["## Evaluation", "", *_metric_table(card.metrics), ""]
    known = f"The license of the base model is {_code(license_of_base)}." if license_of_base else UNKNOWN_LICENSE
    return [*lines, "## License", "", known if card.base is not None else NO_BASE, ""]


def _stage_table(stages: Sequence[StageSummary]) -> list[str]:
    rows = (
        (
            _code(stage.name),
            _code(stage.kind),
            _code(stage.loss),
            "" if stage.rows is None else f"{stage.rows:,}",
            ", ".join(_code(_label(name)) for name in stage.data),
        )
        for stage in stages
    )
    return _table(("step", "stage", "loss", "rows", "data"), rows)


def _metric_table(metrics: Sequence[MetricSummary]) -> list[str]:
    rows = (
        (
            _code(each.task),
            _code(each.name),
            f"{each.value:.4g}",
            "" if each.low is None or each.high is None else f"{each.low:.4g} to {each.high:.4g}",
            "" if each.rows is None else f"{each.rows:,}",
        )
        for each in metrics
    )
    return _table(("task", "metric", "value", "95% interval", "rows"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; a `|` inside a cell is escaped."""
    cells = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _label(name: str) -> str:
    """Return the last part of an absolute path, and any other name unchanged."""
    return Path(name).name if Path(name).is_absolute() else name


def _code(text: str | None) -> str:
    """Return text as an inline code span on one line, in which Markdown and HTML have no effect."""
    text = " ".join((text or "").split())
    if not text:
        return ""
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if len(ticks) > 1 else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _escape(text: str) -> str:
    """Return text on one line with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", " ".join(text.split()))


def _fence(text: str, language: str) -> list[str]:
    """Return the lines of a fenced code block that the text cannot close."""
    ticks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return [f"{ticks}{language}", *text.splitlines(), ticks]


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


UNKNOWN_LICENSE = "The license of the base model is not recorded here. Check it before you redistribute this model."
NO_BASE = "This model was initialized randomly, so no base model's license applies."

_GENERATE = """
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

USAGE = {
    "policy": f"""from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its repository on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
{_GENERATE}""",
    "adapters": f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

path = "."  # this folder, or its repository on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoPeftModelForCausalLM.from_pretrained(path)  # also loads the base model
{_GENERATE}""",
    "gguf": f"""from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder; llama.cpp: llama-cli -m FILE.gguf
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, gguf_file=next(Path(path).glob("*.gguf")).name)
{_GENERATE}""",
    "reward_model": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "."  # this folder, or its repository on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path)

messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()  # the head reads the end-of-turn token
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
scores = dict(zip(model.config.id2label.values(), model(**inputs).logits[0].tolist()))
reward = sum(model.config.aggregate[name] * score for name, score in scores.items())
print(reward, scores)
""",
}
