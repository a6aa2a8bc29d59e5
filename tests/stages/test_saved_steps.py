"""The folder of a step is compared with what was trained, and a failed save does not cost the training."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_runs import RECIPE, metrics, run
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.errors import InputError, RunError
from align.models.adapters import merging

BASE = RECIPE.partition("  sft: ")[0]
SFT = RECIPE.partition("  dpo: ")[0]
RATED = (
    BASE
    + """  rate: {{stage: reward_model, policy: base, data: pairs, loss: bt, head: {{attributes: [good]}},
         train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
"""
)
TIED = RECIPE.replace("initializer_range: 0.05", "initializer_range: 0.05, tie_word_embeddings: true")
EMBEDDINGS = ("policy.lora.rank=2", "policy.lora.targets=[embed_tokens, q_proj]")
RATES = tuple(f"steps.{step}.train.learning_rate=1.0e-2" for step in ("sft", "dpo"))


def test_adapters_on_tied_embeddings_leave_the_policy_that_was_trained(tmp_path):
    made, _ = run(tmp_path, *EMBEDDINGS, *RATES, text=TIED)
    for step in ("sft", "dpo"):
        assert 0 <= made[step]["saved"]["max_difference"] < 1e-4
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / "runs/small" / name) for name in ("base", "sft"))
    assert before.config.tie_word_embeddings and not after.config.tie_word_embeddings
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert (before.model.embed_tokens.weight - after.model.embed_tokens.weight).abs().max() > 1e-3
    # The reference of the second step is the policy that the first one saved, so its first loss is that of no change
    assert metrics(tmp_path, "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_a_saved_policy_that_differs_ends_the_step_and_keeps_the_training(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # As peft merges them, which changes the tied head, too
        patch.setattr(merging, "merge_and_untie", lambda model: model.merge_and_unload())
        with pytest.raises(RunError, match=r"sft\.partial: the saved model differs from .* nats"):
            run(tmp_path, *EMBEDDINGS, *RATES, text=TIED)
    assert not (tmp_path / "runs/small/sft").exists()
    made, told = run(tmp_path, *EMBEDDINGS, *RATES, text=TIED)
    assert "resumed after step 6 of 6" in told.notes
    assert {line["step"] for line in told.steps} == {1, 2, 3}, "the steps of dpo"
    assert made["sft"]["saved"]["max_difference"] < 1e-4


def full_disk(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_tokenizer(*arguments, **named):
    raise RuntimeError("the tokenizer has a bad day")


WAYS = {
    "all weights": (SFT, ()),
    "merged adapters": (SFT, ("policy.lora.rank=2",)),
    "adapters": (SFT, ("policy.lora.rank=2", "policy.lora.adapters=continued")),
    "a reward model": (RATED, ()),
    "the best weights": (
        SFT,
        ("data.shown.held_out=0.2", "steps.sft.train.keep=best", "steps.sft.train.evaluate_every=1", RATES[0]),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["weights", "tokenizer"])
def test_a_failed_save_keeps_the_trained_weights_for_the_next_call(tmp_path, monkeypatch, way, where):
    text, overrides = WAYS[way]
    never, failed = tmp_path / "never", tmp_path / "failed"
    run(never, *overrides, text=text)
    run(failed, *overrides, text=text, until="base")
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(PreTrainedModel, "save_pretrained", full_disk)
            patch.setattr("align.models.adapters.files.save_file", full_disk)
        else:
            for module in ("policy", "reward_model"):
                patch.setattr(f"align.models.{module}.write_tokenizer", no_tokenizer)
        with pytest.raises(RuntimeError, match="no space left|a bad day"):
            run(failed, *overrides, text=text)
    _, told = run(failed, *overrides, text=text)
    assert not told.steps, "no optimizer step is repeated"
    step = told.states[-1][0]
    folders = [folder / "runs/small" / step for folder in (never, failed)]
    assert {file.name for file in folders[0].iterdir()} == {file.name for file in folders[1].iterdir()}
    (name,) = (file.name for file in folders[0].glob("*model.safetensors"))
    one, other = (load_file(folder / name) for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def from_path(path):
    """Return the recipe of a single step that starts from the model at `path`."""
    data, steps = SFT.partition("data:")[2].split("steps:")
    sft = steps.partition("vocab_size: 300}}\n")[2]
    return f"run: small\nruns: {{runs}}\npolicy:\n  path: {path}\ndata:{data}steps:\n{sft}"


def test_what_a_save_would_refuse_is_refused_before_the_first_step(tmp_path):
    run(tmp_path, text=BASE)
    base = tmp_path / "model"
    shutil.copytree(tmp_path / "runs/small/base", base, ignore=shutil.ignore_patterns("manifest.json"))
    text = from_path(base)
    written = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(written | {"max_new_tokens": -1}))
    with pytest.raises(InputError, match="could not be saved after training|cannot load a generation"):
        run(tmp_path / "refused", text=text)
    assert not list((tmp_path / "refused").rglob("metrics.jsonl"))
    (base / "generation_config.json").write_text(json.dumps(written | {"do_sample": False, "temperature": 0.7}))
    made, told = run(tmp_path / "trained", text=text)
    assert any("the saved model will lack temperature" in note for note in told.notes)
    assert made["sft"]["optimizer_steps"] == 6


@pytest.mark.parametrize("adapters", ["continued", "stacked"])
def test_adapters_are_not_kept_on_a_gguf_file(tmp_path, adapters):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"lora\.adapters: .* import the randomly initialized model or GGUF file"):
        run(tmp_path, f"policy.lora.adapters={adapters}", text=from_path(f"gguf:{tmp_path}/model.gguf"))
