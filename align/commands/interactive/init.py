"""`align init`: write a commented recipe for the user's rows and model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.artifacts import atomic_file
from align.commands.interactive.suggestion import DPO, KINDS, KTO, RATE, RPO, SAMPLES, SFT, Rows, look_at
from align.content_hash import GGUF
from align.errors import InputError
from align.stages.inputs.opening import open_model
from align.workflow.recipe.inputs import open_inputs
from align.workflow.recipe.load import load_recipe

LEARNING_RATES = {  # of adapters, and of all weights
    SFT: ("2.0e-4", "1.0e-5"),
    RATE: ("2.0e-4", "1.0e-5"),
    DPO: ("2.0e-5", "1.0e-6"),
    KTO: ("2.0e-5", "1.0e-6"),
    RPO: ("2.0e-5", "1.0e-6"),
}
REWARD_MODEL = "[{name: reward_model, settings: {path: FOLDER}}]"
STAGES = {SFT: "sft", RATE: "reward_model", DPO: "preference", KTO: "preference", RPO: "preference"}  # that train
LOSSES = {
    DPO: "{name: dpo, settings: {beta: 0.1}}  # sft_weight adds an SFT term",
    KTO: "{name: kto, settings: {beta: 0.1}}  # desirable_weight and undesirable_weight balance the labels",
    RPO: "{name: rpo_bwd_kl, settings: {beta: 0.2, eta: 1.0}}  # eta scales the rewards",
}
DESCRIPTIONS = {
    SFT: "supervised fine-tuning: the responses are imitated",
    RATE: "a reward model, which learns to rate responses; it starts from the policy before it",
    DPO: "preference optimization: the chosen response becomes more likely than the rejected one",
    KTO: "preference optimization from labels: good responses become more likely, the others less",
    RPO: "reward-aware preference optimization: how much better a response is counts, too",
    SAMPLES: "responses of the policy to the prompts; judges would rate them (align keys generate)",
}


def init(
    data: Sequence[str], policy: str, out: Path, *, lora: bool, reading: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write a recipe with a step for each source of rows, after looking at them; print what comes next.

    `reading` are settings of every source, such as `split`.
    """
    if out.exists():
        raise InputError(f"{out}: exists; name another file with --out, or move it away")
    open_model(policy)
    found: list[Rows] = []
    for path in data:
        found.append(look_at(path, [rows.name for rows in found], reading))
    with atomic_file(out) as partial:
        partial.write_text(recipe_text(found, policy, lora=lora), "utf-8")
        open_inputs(load_recipe(partial))
    for rows in found:
        print(f"{rows.path}: {_number(rows)} read as {rows.format}: {rows.about}{_dropped(rows)}")
    print(f"Written to {out}. Next:\n  align check {out}\n  align run {out}")


def recipe_text(found: Sequence[Rows], policy: str, *, lora: bool) -> str:
    """Return a recipe with comments."""
    ordered = sorted(found, key=lambda rows: KINDS.index(rows.kind))
    lines = [
        "# Every key with its default and meaning: align keys. Values can be set on the command line, too:",
        "#   align run RECIPE steps.STEP.train.epochs=2",
        f"run: {_run_name(policy)}  # results go to runs/{_run_name(policy)}",
        "",
        "policy:",
        f"  path: {json.dumps(policy)}",
        *_policy_lines(policy, lora=lora, rates=any(rows.kind == RATE for rows in found)),
        "",
        "data:",
    ]
    for rows in ordered:
        lines += _data_lines(rows)
    lines += ["", "steps:"]
    names: list[str] = []
    for rows in ordered:
        number = sum(name.partition("-")[0] == rows.kind for name in names) + 1
        names.append(rows.kind if number == 1 else f"{rows.kind}-{number}")
        lines += _step_lines(names[-1], rows, policy, lora=lora, is_first=len(names) == 1)
    return "\n".join(lines) + "\n"


def _run_name(policy: str) -> str:
    name = policy.removeprefix(GGUF).removesuffix(".gguf").rstrip("/").rpartition("/")[2].partition(":")[0]
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)
    return f"my-{kept.strip('.-_') or 'model'}"


def _policy_lines(policy: str, *, lora: bool, rates: bool) -> list[str]:
    lines: list[str] = []
    has_template = _has_template(policy)
    if has_template is False:
        lines.append("  chat_template: chatml  # the tokenizer has none of its own")
    elif has_template is None:
        lines.append("  # chat_template: chatml  # if the tokenizer has none")
    if lora:
        kept = "" if rates else "; adapters: continued saves adapters only"
        lines.append(f"  lora: {{rank: 16, alpha: 32}}  # on all linear layers{kept}; without this line, all weights")
    return [*lines, "  # gradient_checkpointing: true  # less memory, slower"]


def _has_template(policy: str) -> bool | None:
    """Return whether a model's folder has a chat template; None if that is not known without loading it."""
    folder = Path(policy)
    if policy.startswith(GGUF) or not folder.is_dir():
        return None
    if (folder / "chat_template.jinja").is_file():
        return True
    with suppress(OSError, ValueError):
        return bool(json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template"))
    return None


def _number(rows: Rows) -> str:
    return f"{rows.num_rows:,} rows" if rows.is_all else f"the first {rows.num_rows:,} rows"


def _dropped(rows: Rows) -> str:
    reasons = ", ".join(f"{reason} {number}" for reason, number in rows.dropped.items())
    return f"; dropped: {reasons}" if reasons else ""


def _data_lines(rows: Rows) -> list[str]:
    lines = [f"  {rows.name}:  # {_number(rows)}: {rows.about} ({rows.format})", f"    path: {json.dumps(rows.path)}"]
    lines += [f"    {name}: {json.dumps(value)}" for name, value in rows.reading.items()]
    if rows.is_held_out:
        lines.append("    held_out: 0.1  # share of the prompts that is evaluated and not trained")
    if rows.kind != SAMPLES:
        lines.append("    # max_length: 1024  # tokens of a row; longer rows are dropped and counted")
    return lines


def _step_lines(name: str, rows: Rows, policy: str, *, lora: bool, is_first: bool) -> list[str]:
    head = f"  {name}:  # {DESCRIPTIONS[rows.kind]}"
    if rows.kind == SAMPLES:
        return [
            head,
            "    stage: generate",
            *([f"    models: [{json.dumps(policy)}]"] if is_first else []),
            f"    data: {rows.name}",
            f"    judges: {_judges(rows)}",
            "    sampling: {num_responses: 4, max_new_tokens: 256}",
        ]
    lines = [
        head,
        f"    # policy: NAME  # by default it starts from {'the policy above' if is_first else 'the last policy'}",
        f"    stage: {STAGES[rows.kind]}",
        f"    data: {rows.name}",
    ]
    if rows.kind == RATE:
        lines.append(f"    head: {{attributes: [{', '.join(rows.attributes)}]}}")
    elif rows.kind in LOSSES:
        lines.append(f"    loss: {LOSSES[rows.kind]}")
    with_lora, without = LEARNING_RATES[rows.kind]
    return [*lines, *_train_lines(rows, with_lora if lora else without)]


def _judges(rows: Rows) -> str:
    named = ", ".join(f"{{name: {name}}}" for name in rows.judges)
    return f"[{named}]  # by what the rows know" if named else f"[]  # for example {REWARD_MODEL}"


def _train_lines(rows: Rows, learning_rate: str) -> list[str]:
    return [
        "    train:",
        f"      learning_rate: {learning_rate}",
        "      schedule: cosine",
        "      epochs: 1",
        f"      prompts_per_step: {rows.prompts_per_step}  # rows of an optimizer step, over all processes",
        "      # tokens_per_micro_batch: 2048  # affects memory and speed only",
        "      # precision: bf16  # on GPUs",
    ]
