"""Hints for keys and stages that other projects call otherwise, and for keys in the wrong place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from pydantic import BaseModel

from align.build_errors import models_in
from align.errors import InputError, Location, MissingKey, UnknownKey, dotted_loc, joined
from align.losses.table import LOSSES
from align.stages.table import STAGES
from align.workflow.recipe.schema import WrittenRecipe

PROMPTS_PER_STEP = "the global batch size; gradient accumulation is automatic"
EVERY_STEP = "every optimizer step is logged to metrics.jsonl"
LAUNCH = "a config file of accelerate launch"
REFERENCE = "the reference is the policy that enters the step, and needs no key"
NO_PADDING = "the default forward pass does not pad, so that packing is not needed"
TILES = "logits are computed tile by tile, without Liger kernels"
WORKERS = "rows are encoded once, at the start of a step"
MAX_PLACES = 2  # where a key may belong, in a hint

# Keys of TRL, transformers, peft, Axolotl and LLaMA-Factory -> (key of a recipe or None, what else to know). NAME
# stands for the name of a source or a step.
FOREIGN_KEYS: dict[str, tuple[str | None, str]] = {
    **dict.fromkeys(
        ("batch_size", "per_device_train_batch_size", "train_batch_size", "global_batch_size", "total_batch_size"),
        ("steps.NAME.train.prompts_per_step", PROMPTS_PER_STEP),
    ),
    "gradient_accumulation_steps": ("steps.NAME.train.prompts_per_step", PROMPTS_PER_STEP),
    **dict.fromkeys(
        ("micro_batch_size", "auto_find_batch_size"),
        ("steps.NAME.train.tokens_per_micro_batch", "tokens of one forward pass, which decide memory and speed only"),
    ),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), ("steps.NAME.train.epochs", "")),
    **dict.fromkeys(("lr", "peak_lr"), ("steps.NAME.train.learning_rate", "")),
    **dict.fromkeys(
        ("lr_scheduler_type", "lr_scheduler", "scheduler"),
        ("steps.NAME.train.schedule", "constant, cosine or linear"),
    ),
    "warmup_ratio": ("steps.NAME.train.warmup_steps", "in optimizer steps"),
    **dict.fromkeys(("optim", "optimizer_name"), ("steps.NAME.train.optimizer", "")),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("steps.NAME.train.betas", "both as a list")),
    "adam_epsilon": ("steps.NAME.train.epsilon", ""),
    "gradient_clipping": ("steps.NAME.train.max_grad_norm", ""),
    **dict.fromkeys(
        ("bf16", "fp16", "dtype", "torch_dtype", "mixed_precision"),
        ("steps.NAME.train.precision", "fp32, bf16 or, on some CPUs, bf16-products"),
    ),
    "torch_compile": ("steps.NAME.train.compile", "none or pieces"),
    **dict.fromkeys(("eval_steps", "evals_per_epoch"), ("steps.NAME.train.evaluate_every", "in optimizer steps")),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"), ("steps.NAME.train.evaluate_every", "in optimizer steps")
    ),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model"), ("steps.NAME.train.keep", "last or best")),
    **dict.fromkeys(("save_steps", "saves_per_epoch"), ("steps.NAME.train.checkpoint_steps", "in optimizer steps")),
    **dict.fromkeys(
        ("save_strategy", "save_total_limit"),
        ("steps.NAME.train.checkpoint_minutes", "a step keeps its latest checkpoint, and none when it is finished"),
    ),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), ("policy.lora.rank", "")),
    "lora_alpha": ("policy.lora.alpha", ""),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target"), ("policy.lora.targets", "")),
    "lora_target_linear": ("policy.lora.targets", "all linear layers by default"),
    "lora_dropout": ("policy.lora.dropout", ""),
    **dict.fromkeys(("use_dora", "peft_use_dora"), ("policy.lora.dora", "")),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), ("policy.lora.rslora", "")),
    "lora_modules_to_save": ("policy.lora.modules_to_save", ""),
    **dict.fromkeys(("use_peft", "use_lora", "adapter", "peft_config", "finetuning_type"), ("policy.lora", "")),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "quantization_bit", "use_4bit"),
        ("policy.quantize", "nf4, with lora"),
    ),
    **dict.fromkeys(("model", "base_model", "model_name", "model_name_or_path", "model_id"), ("policy.path", "")),
    **dict.fromkeys(("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path"), ("policy.tokenizer", "")),
    "template": ("policy.chat_template", ""),
    **dict.fromkeys(
        (
            "dataset",
            "datasets",
            "dataset_name",
            "train_file",
            "data_path",
            "data_files",
            "dataset_dir",
            "train_dataset",
        ),
        ("data.NAME.path", "a step names it as data: NAME"),
    ),
    "dataset_config": ("data.NAME.path", "as owner/name:config"),
    "dataset_train_split": ("data.NAME.split", ""),
    "max_samples": ("data.NAME.limit", ""),
    **dict.fromkeys(
        ("eval_dataset", "val_size", "val_set_size", "test_size", "eval_split", "dataset_test_split"),
        ("data.NAME.held_out", "the share of the prompts that is kept for evaluation"),
    ),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length", "seq_length"),
        ("data.NAME.max_length", "in tokens"),
    ),
    **dict.fromkeys(("truncation_mode", "max_completion_length"), ("data.NAME.overlong", "")),
    **dict.fromkeys(
        ("beta", "label_smoothing", "gamma", "eta", "reference_free", "desirable_weight", "undesirable_weight"),
        ("steps.NAME.loss.settings.KEY", ""),
    ),
    **dict.fromkeys(("rl_beta", "dpo_beta", "kto_beta"), ("steps.NAME.loss.settings.beta", "")),
    "dpo_label_smoothing": ("steps.NAME.loss.settings.label_smoothing", ""),
    "use_weighting": ("steps.NAME.loss.settings.weighting", "wpo"),
    "kto_chosen_weight": ("steps.NAME.loss.settings.desirable_weight", ""),
    "kto_rejected_weight": ("steps.NAME.loss.settings.undesirable_weight", ""),
    "simpo_gamma": ("steps.NAME.loss.settings.gamma", ""),
    "pref_beta": ("steps.NAME.loss.settings.beta", ""),
    **dict.fromkeys(("loss_type", "pref_loss", "rl"), ("steps.NAME.loss.name", "")),
    **dict.fromkeys(("rpo_alpha", "pref_ftx"), ("steps.NAME.loss.sft_weight", "")),
    "output_dir": ("run", "the run is written to runs/RUN, and a step to runs/RUN/STEP"),
    "run_name": ("run", ""),
    **dict.fromkeys(("report_to", "use_wandb"), ("tracking.trackers", "a list of names, for all steps")),
    "wandb_project": ("tracking.project", "with wandb among tracking.trackers"),
    "wandb_entity": ("tracking.entity", "with wandb among tracking.trackers"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "ddp_find_unused_parameters"), ("steps.NAME.launch", LAUNCH)),
    **dict.fromkeys(("logging_steps", "logging_strategy", "logging_first_step"), (None, EVERY_STEP)),
    **dict.fromkeys(
        ("ref_model", "ref_model_name_or_path", "precompute_ref_log_probs", "sync_ref_model"), (None, REFERENCE)
    ),
    **dict.fromkeys(
        ("packing", "sample_packing", "neat_packing", "padding_free", "pad_to_sequence_len", "group_by_length"),
        (None, NO_PADDING),
    ),
    **dict.fromkeys(("use_liger_kernel", "enable_liger_kernel"), (None, TILES)),
    **dict.fromkeys(("dataset_num_proc", "dataloader_num_workers", "preprocessing_num_workers"), (None, WORKERS)),
    **dict.fromkeys(("do_train", "do_eval"), (None, "the recipe's steps are what is done")),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), (None, "align push RUN/STEP REPO uploads a finished model")),
    "plot_loss": (None, "report.html in the run's folder has the curves"),
    "remove_unused_columns": (None, "unused columns are never read, and reported"),
    **dict.fromkeys(
        ("resume_from_checkpoint", "overwrite_output_dir"),
        (None, "the same command resumes an interrupted step; --rerun-from STEP begins again"),
    ),
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss", "train_on_inputs", "train_on_prompt"),
        (None, "the loss is computed on responses only"),
    ),
    "per_device_eval_batch_size": (None, "steps.NAME.train.tokens_per_micro_batch is the limit here, too"),
    "dataset_text_field": (None, "the columns are detected; data.NAME.format names a format"),
}

# Names of methods and stages elsewhere -> (stage, what to write)
FOREIGN_STAGES: dict[str, tuple[str, str]] = {
    **{name: ("preference", f"stage: preference with loss: {{name: {name}}}") for name in LOSSES},
    **dict.fromkeys(("rpo", "reward_dpo"), ("preference", "stage: preference with loss: {name: rpo_bwd_kl}")),
    **dict.fromkeys(("rm", "reward", "rewardmodel", "reward-model"), ("reward_model", "stage: reward_model")),
    **dict.fromkeys(("pt", "pretrain", "finetune", "instruct"), ("sft", "stage: sft")),
    **dict.fromkeys(("eval", "evaluation", "test"), ("evaluate", "stage: evaluate")),
    **dict.fromkeys(("sample", "inference", "predict"), ("generate", "stage: generate")),
    **dict.fromkeys(("judge", "rate"), ("score", "stage: score")),
    **dict.fromkeys(
        ("grpo", "ppo", "rloo"),
        ("preference", "stage: preference with on_policy: true for preference optimization on samples of the policy"),
    ),
}


class Hint(NamedTuple):
    """Where a key belongs, if the recipe has such a key, and what to say of it."""

    place: Location | None
    text: str


def with_hints(error: InputError, steps: Mapping[str, str]) -> InputError:
    """Return the errors of a recipe with hints for unknown keys; `steps` are the stages of the steps by name.

    A key that is missing where another error says that it is in the wrong place is not reported twice.
    """
    hints = {id(part): _hint(part.loc, steps) for part in error.parts if isinstance(part, UnknownKey)}
    meant = [hint.place for hint in hints.values() if hint is not None and hint.place is not None]
    kept: list[InputError] = []
    for part in error.parts:
        hint = hints.get(id(part))
        if isinstance(part, MissingKey) and any(place[: len(part.loc)] == part.loc for place in meant):
            continue
        kept.append(part if hint is None else UnknownKey(hint.text, part.loc))
    return joined(kept)


def stage_hint(name: str) -> tuple[str, str] | None:
    """Return the stage that is meant by a name, and what to write; None for a name that is not known."""
    lower = name.lower()
    return (lower, f"stage: {lower}") if lower in STAGES else FOREIGN_STAGES.get(lower)


def _hint(loc: Location, steps: Mapping[str, str]) -> Hint | None:
    """Return the hint for an unknown key; None for one that no table has."""
    section, *names, key = map(str, loc if len(loc) > 1 else ("", *loc))
    name = names[0] if names else None
    stage = steps.get(name) if section == "steps" and name is not None else None
    places = [_filled(place, section, name) for place in keys_of(stage) if place.rpartition(".")[2] == key]
    if key in FOREIGN_KEYS:
        target, note = FOREIGN_KEYS[key]
        if target is None:
            return Hint(None, f"unknown key, and not needed: {note}")
        is_elsewhere = target.rpartition(".")[0] not in keys_of(stage)  # in another kind of stage
        if not (is_elsewhere and places):
            place = _filled(target.replace("KEY", key), section, name)
            return Hint(place, f"unknown key; write {dotted_loc(place)}{f' ({note})' if note else ''}")
    meant = _most_general(places)
    return Hint(meant[0], f"unknown key here; write {' or '.join(map(dotted_loc, meant))}") if meant else None


def _most_general(places: list[Location]) -> list[Location]:
    """Return up to two places; of more, those with the fewest parts, and none if these are more than two."""
    fewest = min(map(len, places), default=0)
    shown = places if len(places) <= MAX_PLACES else [place for place in places if len(place) == fewest]
    return shown if len(shown) <= MAX_PLACES else []


def _filled(target: str, section: str, name: str | None) -> Location:
    """Return a place with the name of the source or step that an error is about, where it is in the same section."""
    first, *rest = target.split(".")
    filled = name if first == section and name is not None else "NAME"
    return (first, *(filled if part == "NAME" else part for part in rest))


@cache
def keys_of(stage: str | None) -> list[str]:
    """Return the dotted keys of a recipe, with those of the steps of one stage; of every stage for None."""
    found = list(WrittenRecipe.model_fields)
    for name, field in WrittenRecipe.model_fields.items():
        for model in models_in(field.annotation) if name != "steps" else ():
            found += _below(f"{name}.NAME" if name in ("data", "search") else name, model)
    for name, kind in STAGES.items():
        if stage in (None, name):
            found += _below("steps.NAME", kind)
    return list(dict.fromkeys(found))


def _below(prefix: str, settings: type[BaseModel]) -> Iterator[str]:
    """Yield the dotted keys of settings and of the settings in them."""
    for name, field in settings.model_fields.items():
        yield f"{prefix}.{name}"
        for model in models_in(field.annotation):
            yield from _below(f"{prefix}.{name}", model)
