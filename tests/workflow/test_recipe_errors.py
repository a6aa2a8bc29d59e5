"""All errors of a recipe are reported at once, with the names that other projects use, before torch is imported."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import DPOConfig

from align.config import build
from align.errors import ErrorList, InputError, InputErrors, within
from align.stages.table import STAGES
from align.workflow.recipe.hints import FOREIGN_KEYS, FOREIGN_STAGES, keys_of
from align.workflow.recipe.load import load_recipe
from align.workflow.recipe.schema import WrittenRecipe

HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "trl", "numpy", "pyarrow", "scipy"}


def lines_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Return the errors of a recipe, without its path."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


TRL_STYLE = """\
run: mine
policy: {path: m, lora_alpha: 32}
data:
  pairs: {path: pairs.jsonl, batch_size: 8}
steps:
  dpo:
    stage: dpo
    data: pairs
    loss: {name: dpo, beta: 0.1}
    train: {learning_rate: 1.0e-6, per_device_train_batch_size: 4, num_train_epochs: 3}
"""


def test_a_recipe_in_the_words_of_trl_is_answered_with_the_words_of_a_recipe(tmp_path):
    wanted = [
        ("2: policy.lora_alpha: ", "policy.lora.alpha"),
        ("4: data.pairs.batch_size: ", "steps.NAME.train.prompts_per_step"),
        ("7: steps.dpo.stage: ", "stage: preference with loss: {name: dpo}"),
        ("9: steps.dpo.loss.beta: ", "steps.dpo.loss.settings.beta"),
        ("10: steps.dpo.train.per_device_train_batch_size: ", "steps.dpo.train.prompts_per_step"),
        ("10: steps.dpo.train.num_train_epochs: ", "steps.dpo.train.epochs"),
    ]
    lines = lines_of(tmp_path, TRL_STYLE)
    assert len(lines) == len(wanted), lines
    for line, (place, name) in zip(lines, wanted, strict=True):
        assert line.startswith(place) and name in line, line


MEANT = {  # key where someone may write it -> where it belongs
    "steps.dpo.train.gradient_accumulation_steps": "steps.dpo.train.prompts_per_step",
    "steps.dpo.train.lr_scheduler_type": "steps.dpo.train.schedule",
    "steps.dpo.train.warmup_ratio": "steps.dpo.train.warmup_steps",
    "steps.dpo.train.bf16": "steps.dpo.train.precision",
    "steps.dpo.train.report_to": "tracking.trackers",
    "steps.dpo.train.wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "report_to": "tracking.trackers",
    "steps.dpo.train.gradient_checkpointing": "policy.gradient_checkpointing",
    "steps.dpo.train.max_seq_length": "data.NAME.max_length",
    "steps.dpo.train.max_length": "data.NAME.max_length",
    "steps.dpo.train.output_dir": "run",
    "steps.dpo.train.seed": "seed",
    "steps.dpo.train.chat_template": "policy.chat_template",
    "steps.dpo.train.optim": "steps.dpo.train.optimizer",
    "steps.dpo.rl_beta": "steps.dpo.loss.settings.beta",
    "steps.dpo.learning_rate": "steps.dpo.train.learning_rate",
    "steps.dpo.beta": "steps.dpo.loss.settings.beta",
    "steps.dpo.loss.rpo_alpha": "steps.dpo.loss.sft_weight",
    "steps.dpo.loss_type": "steps.dpo.loss.name",
    "policy.lora_r": "policy.lora.rank",
    "policy.lora.r": "policy.lora.rank",
    "policy.lora.lora_alpha": "policy.lora.alpha",
    "policy.lora.target_modules": "policy.lora.targets",
    "policy.model_name_or_path": "policy.path",
    "policy.load_in_4bit": "policy.quantize",
    "data.pairs.dataset_name": "data.pairs.path",
    "data.pairs.test_size": "data.pairs.held_out",
    "model_name_or_path": "policy.path",
    "output_dir": "run",
    "learning_rate": "steps.NAME.train.learning_rate",
}
RIGHT = """\
run: mine
policy: {path: m, lora: {rank: 4}}
data: {pairs: {path: pairs.jsonl}}
steps:
  dpo: {stage: preference, data: pairs, loss: {name: dpo}, train: {learning_rate: 1.0e-6}}
"""


@pytest.mark.parametrize("key", MEANT)
def test_an_unknown_key_is_answered_with_its_place_in_a_recipe(tmp_path, key):
    (line,) = lines_of(tmp_path, RIGHT, f"{key}=1")
    assert f"{key}: unknown key" in line
    assert f"write {MEANT[key]}" in line.replace(")", " ")


def test_a_key_of_trl_that_needs_no_counterpart_is_answered_with_the_reason(tmp_path):
    (line,) = lines_of(tmp_path, RIGHT, "steps.dpo.train.logging_steps=10")
    assert "not needed" in line and "every optimizer step is logged" in line


def test_every_hint_names_a_key_that_recipes_have():
    known = set(keys_of(None)) | {"steps.NAME.loss.settings"}
    targets = [target for target, _ in FOREIGN_KEYS.values() if target is not None]
    wrong = [
        target for target in targets if target.removesuffix(".KEY") not in known and "loss.settings." not in target
    ]
    print(f"covered {len(targets)} hints")
    assert not wrong and len(targets) > 60
    assert {stage for stage, _ in FOREIGN_STAGES.values()} <= STAGES.keys()


def test_no_hint_is_for_a_key_that_is_right_everywhere():
    """A key of the recipe itself may still be in the wrong place; then the nearest place is worked out, not written."""
    own = {key.rpartition(".")[2] for key in keys_of(None)}
    both = own & FOREIGN_KEYS.keys()
    assert both <= {"batch_size", "beta", "model", "warmup_ratio"}, both  # of engine, distill, judge, embedder


def test_the_common_settings_of_trl_and_peft_have_a_hint_or_the_same_name():
    common = {
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "lr_scheduler_type"),
        *("warmup_ratio", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "weight_decay", "bf16", "fp16"),
        *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end"),
        *("logging_steps", "report_to", "run_name", "output_dir", "seed", "deepspeed", "fsdp", "learning_rate"),
        *("max_length", "beta", "loss_type", "label_smoothing", "precompute_ref_log_probs", "max_steps"),
        *("gradient_checkpointing", "resume_from_checkpoint", "per_device_eval_batch_size", "warmup_steps"),
        *("r", "lora_alpha", "target_modules", "lora_dropout", "use_dora", "use_rslora", "modules_to_save"),
    }
    theirs = {field.name for config in (DPOConfig, LoraConfig) for field in dataclasses.fields(config)}
    known = FOREIGN_KEYS.keys() | {key.rpartition(".")[2] for key in keys_of(None)}
    assert len(common & theirs) > 35
    assert not (common & theirs) - known


@pytest.mark.parametrize(
    ("name", "stage"), [("dpo", "preference"), ("DPO", "preference"), ("SFT", "sft"), ("rm", "reward_model")]
)
def test_a_method_in_place_of_a_stage_is_answered_with_the_stage(tmp_path, name, stage):
    (line,) = lines_of(
        tmp_path, RIGHT.replace("stage: preference", f"stage: {name}").replace("loss: {name: dpo},", "")
    )[:1]
    assert f"no stage is called '{name}'; write stage: {stage}" in line


ALL_WRONG = """\
run: a b
policy: {path: m, seed: x}
data:
  short: pairs.jsonl
  pairs: {path: pairs.jsonl, held_out: 2}
  tasks: {path: "tasks:genral", limit: 3}
  good: {path: good.jsonl}
steps:
  no stage: {data: good}
  sft: {stage: sft, data: godo, train: {learning_rate: 0}}
  dpo: {stage: preference, data: godo, loss: {name: dpoo}, train: {learning_rate: 1}}
  more: {stage: preference, data: pairs, policy: sft, loss: {name: ipoo}, train: {learning_rate: 1}}
  last: {stage: evaluate, policies: [dpoo], tasks: {t: {data: good}}}
"""


def test_all_errors_of_a_recipe_are_reported_in_the_order_of_the_file_and_none_that_another_causes(tmp_path):
    wanted = [
        "1: run: ",
        "2: policy.seed: ",
        "4: data.short: ",
        "5: data.pairs.held_out: ",
        "6: data.tasks.path: ",
        "9: steps.no stage: ",
        "10: steps.sft.train.learning_rate: ",
        "11: steps.dpo.loss: ",
        "11: steps.dpo.data: ",
        "12: steps.more.loss: ",
        "13: steps.last.policies: ",
    ]
    lines = lines_of(tmp_path, ALL_WRONG)
    assert [next((place for place in wanted if line.startswith(place)), line) for line in lines] == wanted


def test_settings_in_short_form_are_answered_with_the_whole_form(tmp_path):
    lines = lines_of(tmp_path, RIGHT.replace("policy: {path: m, lora: {rank: 4}}", "policy: org/model"))
    assert lines == ["2: policy: Input should be an object, as in {path: org/model} (got 'org/model')"]
    lines = lines_of(tmp_path, RIGHT, "data.pairs=p.jsonl", "steps.dpo.loss=dpo")
    assert [line.partition(" (got")[0].rpartition(", ")[2] for line in sorted(lines)] == [
        "as in {path: p.jsonl}",
        "as in {name: dpo}",
    ]


def test_a_key_under_a_wrong_name_is_not_reported_as_missing_too(tmp_path):
    assert len(lines_of(tmp_path, RIGHT.replace("policy:", "polcy:"))) == 1
    assert len(lines_of(tmp_path, RIGHT.replace("train:", "trian:"))) == 1
    assert len(lines_of(tmp_path, RIGHT.replace("train: {learning_rate: 1.0e-6}", "lr: 1.0e-6"))) == 1


def test_the_message_of_a_union_names_every_type(tmp_path):
    (line,) = lines_of(tmp_path, RIGHT, "steps.dpo.data=3")
    assert "should be a valid string or Input should be a valid array (got 3)" in line


def test_several_errors_survive_locations_and_other_processes():
    errors = ErrorList()
    for name in ("a", "b", "a"):
        with errors.collect():
            raise InputError("wrong", (name,))
    with pytest.raises(InputErrors) as caught, within("steps", "dpo"):
        errors.raise_found()
    assert str(caught.value) == "steps.dpo.a: wrong\nsteps.dpo.b: wrong"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_every_error_of_settings_is_raised(tmp_path):
    with pytest.raises(InputErrors) as caught:
        build(WrittenRecipe, {"run": 1, "policy": {"path": 2, "forward": "x"}, "steps": {}})
    assert [error.loc for error in caught.value.parts] == [("run",), ("policy", "path"), ("policy", "forward")]


@pytest.mark.parametrize("command", ["check", "run", "preview"])
def test_an_error_in_a_recipe_does_not_wait_for_torch(tmp_path, command):
    settings = "{learning_rate: 1.0e-6, optimizer: adafactor, trackers: [tensorboard]}"
    recipe = RIGHT.replace("{learning_rate: 1.0e-6}", settings)
    (tmp_path / "r.yaml").write_text(f"{recipe}tracking: {{trackers: [tensorboard]}}\n")
    code = (
        "import sys, atexit, json\n"
        f"sys.argv = ['align', {command!r}, 'r.yaml', *{['--step', 'dpo'] if command == 'preview' else []}, 'sede=1']\n"
        "from align.cli import main\n"
        "atexit.register(lambda: print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules}))))\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'seed'" in done.stderr
    loaded = set(json.loads(done.stdout))
    assert "pydantic" in loaded
    assert not HEAVY & loaded


def test_a_hint_names_the_place_that_the_stage_has(tmp_path):
    """`beta` is a setting of the loss of preferences, and one of distillation, at different places."""
    steps = "base: {stage: sft, data: a, train: {learning_rate: 1.0, prompts_per_step: 1}}\n"
    for stage, place in (("distill, teacher: base", "loss.beta"), ("preference", "loss.settings.beta")):
        own = f"  d: {{stage: {stage}, data: a, beta: 0.1, train: {{learning_rate: 1.0, prompts_per_step: 1}}}}\n"
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"run: x\npolicy: {{path: a/b}}\ndata: {{a: {{path: 'tasks:general'}}}}\nsteps:\n  {steps}{own}"
        )
        with pytest.raises(InputError, match=rf"steps\.d\.beta: unknown key.*; write steps\.d\.{place}"):
            load_recipe(path, ())
