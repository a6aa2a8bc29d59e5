"""Keys of TRL, transformers, peft, Axolotl and LLaMA-Factory, and what they are called here."""

from __future__ import annotations

PROMPTS_PER_STEP = "the global batch size; gradient accumulation is automatic"
EVERY_STEP = "every optimizer step is logged to metrics.jsonl"
LAUNCH = "a config file of accelerate launch"
REFERENCE = "the reference is the policy that enters the step, and needs no key"
NO_PADDING = "the default forward pass does not pad, so that packing is not needed"
TILES = "logits are computed tile by tile, without Liger kernels"
WORKERS = "rows are encoded once, at the start of a step"

# Key elsewhere -> (key of a recipe or None, what else to know); NAME stands for the name of a source or a step
FOREIGN_KEYS: dict[str, tuple[str | None, str]] = {
    **dict.fromkeys(
        (
            "batch_size",
            "per_device_train_batch_size",
            "train_batch_size",
            "global_batch_size",
            "total_batch_size",
            "gradient_accumulation_steps",
        ),
        ("steps.NAME.train.prompts_per_step", PROMPTS_PER_STEP),
    ),
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
    **dict.fromkeys(
        ("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy"),
        ("steps.NAME.train.evaluate_every", "in optimizer steps"),
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
