"""Adapters across steps: merged, continued, or stacked on frozen ones."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import SEQUENCES, SMALL, learned, trained
from transformers import AutoModelForCausalLM

from align.errors import InputError
from align.models.adapters.attach import merge_adapters
from align.models.loading.config import load_config
from align.models.policy import load_policy, save_policy
from align.models.settings import LoraSettings, PolicySettings
from align.models.tree.batch import plain_batch, tree_batch
from align.models.weights import fingerprint

FRESH = SMALL | {"model_type": "llama", "vocab_size": 300}
IDS = torch.arange(3, 20)[None]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}  # sums in another order; the adapters move logits by more than 0.1


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    """Return a folder with a policy without adapters."""
    folder = tmp_path_factory.mktemp("run") / "base"
    save_policy(*load_policy(PolicySettings(from_config=FRESH, tokenizer=str(tokenizer_folder))), folder)
    return folder


def lora(adapters, **settings):
    return LoraSettings(adapters=adapters, **settings)


def load(path, adapters=None, *, seed=0, **settings):
    chosen = lora(adapters, **settings) if adapters else None
    return load_policy(PolicySettings(path=str(path), lora=chosen, seed=seed))


def step(path, folder, adapters, *, seed=1, **settings):
    """Train a step from `path` to `folder` and return the logits of its policy."""
    policy, tokenizer = load(path, adapters, seed=seed, **settings)
    expected = logits(learned(policy, seed).hf)
    save_policy(policy, tokenizer, folder, merge=False)
    return expected


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def values(policy, word):
    return {name: value.detach().clone() for name, value in policy.named_parameters() if word in name}


def test_continued_adapters_round_trip_bit_for_bit(base, tmp_path):
    expected = step(base, tmp_path / "sft", "continued", rank=4)
    assert not (tmp_path / "sft" / "model.safetensors").exists()
    again, _ = load(tmp_path / "sft", "continued", rank=4)
    assert torch.equal(logits(again.hf), expected)
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits(kind.from_pretrained(tmp_path / "sft")), expected)
    assert load_config(str(tmp_path / "sft")).hidden_size == 32
    assert trained(again) == {name for name, _ in again.named_parameters() if "lora_" in name}
    assert len(trained(again)) == 28  # two matrices on seven layers of two blocks


@pytest.mark.parametrize("adapters", ["continued", "stacked"])
def test_without_lora_a_folder_of_adapters_loads_merged_with_all_weights_trainable(base, tmp_path, adapters):
    step(base, tmp_path / "sft", adapters, rank=4)
    expected = step(tmp_path / "sft", tmp_path / "dpo", adapters, seed=2, rank=4)
    plain, tokenizer = load(tmp_path / "dpo")
    torch.testing.assert_close(logits(plain.hf), expected, **TOLERANCE)
    assert trained(plain) == {f"hf.{name}" for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    save_policy(plain, tokenizer, tmp_path / "whole")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), expected, **TOLERANCE)


def test_merged_mode_merges_earlier_adapters_before_adding_new_ones(base, tmp_path):
    expected = step(base, tmp_path / "sft", "continued", rank=4)
    policy, tokenizer = load(tmp_path / "sft", "merged", rank=2)
    torch.testing.assert_close(logits(policy.hf), expected, **TOLERANCE)
    assert {tuple(value.shape) for name, value in policy.named_parameters() if "lora_A" in name} == {(2, 32), (2, 48)}
    expected = logits(learned(policy, 2).hf)
    save_policy(policy, tokenizer, tmp_path / "dpo")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")), expected, **TOLERANCE)


def test_stacked_adapters_start_unchanged_and_stay_frozen(base, tmp_path):
    expected = step(base, tmp_path / "sft", "stacked", rank=4)
    policy, _ = load(tmp_path / "sft", "stacked", rank=2)
    assert torch.equal(logits(policy.hf), expected), "new adapters change nothing yet"
    assert trained(policy) == {name for name, _ in policy.named_parameters() if ".default." in name}
    assert len(trained(policy)) == 28
    for make, forward in ((plain_batch, "plain"), (tree_batch, "tree")):
        policy.use_forward(forward)
        policy.zero_grad()
        policy(make(SEQUENCES["many"])).sum().backward()
        moved = {name for name, value in policy.named_parameters() if value.grad is not None and value.grad.any()}
        assert moved == {name for name in trained(policy) if "lora_B" in name}, "A learns once B is not 0"


# Settings of the frozen adapters and of those on top
STACKS = {
    "equal ones": ({"rank": 4}, {"rank": 4}),
    "another rank and factor": ({"rank": 3, "alpha": 5}, {"rank": 8, "alpha": 32}),
    "more layers": ({"rank": 4, "targets": ["q_proj", "v_proj"]}, {"rank": 2}),
    "other layers": ({"rank": 4, "targets": ["down_proj"]}, {"rank": 2, "targets": r".*layers\.0\.mlp\.up_proj"}),
    "embeddings": ({"rank": 4, "targets": ["embed_tokens", "q_proj"]}, {"rank": 2, "targets": ["embed_tokens"]}),
}


@pytest.mark.parametrize("how", STACKS)
def test_stacked_adapters_are_saved_as_one_equivalent_adapter(base, tmp_path, how):
    below, above = STACKS[how]
    first = step(base, tmp_path / "sft", "stacked", **below)
    expected = step(tmp_path / "sft", tmp_path / "dpo", "stacked", seed=2, **above)
    assert (expected - first).abs().max() > 0.1
    torch.testing.assert_close(
        logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "dpo")), expected, **TOLERANCE
    )
    entering, _ = load(tmp_path / "dpo", "stacked", rank=1)
    torch.testing.assert_close(logits(entering.hf), expected, **TOLERANCE)
    info = json.loads((tmp_path / "dpo" / "made_of.json").read_text())
    assert info == {"base": str(base), "quantize": None, "rank": above["rank"], "rank_below": below["rank"]}
    config = json.loads((tmp_path / "dpo" / "adapter_config.json").read_text())
    assert config["r"] == below["rank"] + above["rank"]
    last = step(tmp_path / "dpo", tmp_path / "rpo", "stacked", seed=3, rank=2)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "rpo")), last, **TOLERANCE)


def test_rank_stabilized_scaling_of_frozen_adapters_is_kept(base, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 3},
        lora_dropout=0.5,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    foreign = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    shutil.copytree(base, tmp_path / "foreign", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    foreign.save_pretrained(tmp_path / "foreign")
    assert torch.equal(logits(load(tmp_path / "foreign", "stacked")[0].hf), logits(foreign)), "and no dropout is on"
    expected = step(tmp_path / "foreign", tmp_path / "sft", "stacked", rank=4)
    torch.testing.assert_close(
        logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft")), expected, **TOLERANCE
    )


def test_stacked_adapters_are_initialized_differently_from_the_frozen_ones(base, tmp_path):
    first, tokenizer = load(base, "stacked", rank=4, seed=5)
    save_policy(first, tokenizer, tmp_path / "sft", merge=False)
    second, tokenizer = load(tmp_path / "sft", "stacked", rank=4, seed=5)
    save_policy(second, tokenizer, tmp_path / "dpo", merge=False)
    third, _ = load(tmp_path / "dpo", "stacked", rank=4, seed=5)
    drawn = [values(policy, "lora_A.default") for policy in (first, second, third)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not any(torch.equal(drawn[one][name], drawn[other][name]) for name in drawn[one])
    again, _ = load(tmp_path / "dpo", "stacked", rank=4, seed=5)
    assert all(torch.equal(value, drawn[2][name]) for name, value in values(again, "lora_A.default").items())


def test_every_adapter_changes_the_fingerprint(base, tmp_path):
    step(base, tmp_path / "sft", "stacked", rank=2, targets=["q_proj"])
    policy = learned(load(tmp_path / "sft", "stacked", rank=2, targets=["q_proj"])[0], 1)
    seen = {fingerprint(policy)}
    adapters = values(policy, "lora_")
    for name, value in policy.named_parameters():
        if name in adapters:
            value.data.flatten()[-1] += 2**-10
            seen.add(fingerprint(policy))
    assert len(adapters) == 8 and len(seen) == 9


OTHERS = {"rank": {"rank": 8}, "alpha": {"alpha": 8}, "targets": {"targets": ["q_proj"]}}


@pytest.mark.parametrize("key", OTHERS)
def test_continued_adapters_reject_settings_that_differ(base, tmp_path, key):
    step(base, tmp_path / "sft", "continued", rank=4, alpha=16)
    with pytest.raises(InputError, match=rf"policy\.lora\.{key}: 'continued' trains the adapters in .*, whose"):
        load(tmp_path / "sft", "continued", **OTHERS[key])
    for same in ({}, {"rank": 4, "alpha": 16, "targets": "all-linear"}, {"targets": r".*_proj"}):
        policy, _ = load(tmp_path / "sft", "continued", **same)
        assert len(trained(policy)) == len(values(policy, "lora_")) == 28


@pytest.mark.parametrize("way", ["continued", "stacked"])
def test_unknown_target_modules_are_rejected_on_top_of_earlier_adapters(base, tmp_path, way):
    step(base, tmp_path / "sft", way, rank=2, targets=["q_proj"])
    with pytest.raises(
        InputError, match=r"^policy\.lora\.targets: the model has no module 'qproj'; did you mean 'q_proj'\?"
    ):
        load(tmp_path / "sft", way, targets=["q_proj", "qproj"])


def test_adapters_find_their_base_after_the_run_folder_was_moved(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    expected = step(
        "base", base.parent / "sft", "continued", rank=4
    )  # a relative path must be found from any directory
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load(base.parent / "sft", "continued")[0].hf), expected)
    (tmp_path / "run").mkdir()
    for name in ("base", "sft"):
        shutil.move(base.parent / name, tmp_path / "run" / name)
    assert torch.equal(logits(load(tmp_path / "run" / "sft", "continued")[0].hf), expected)
    shutil.move(tmp_path / "run" / "base", base)
    with pytest.raises(InputError, match="cannot load a model from"):
        shutil.move(tmp_path / "run" / "sft", base.parent / "gone")
        base.rename(base.parent / "other")
        try:
            load(base.parent / "gone", "continued")
        finally:
            (base.parent / "other").rename(base)


def test_stop_tokens_are_saved_with_the_adapters(base, tmp_path):
    policy, tokenizer = load(base, "continued")
    save_policy(policy, tokenizer, tmp_path / "sft", merge=False, end_of_turn=9)
    for adapters in (None, "continued", "stacked"):
        assert 9 in load(tmp_path / "sft", adapters)[0].base.generation_config.eos_token_id


def changed(folder, name, change):
    written = json.loads((folder / name).read_text())
    change(written)
    (folder / name).write_text(json.dumps(written))


def without_a_matrix(folder):
    file = folder / "adapter_model.safetensors"
    found = load_file(file)
    found.pop(sorted(found)[0])
    save_file(found, file)


def with_another_matrix(folder):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(1)}, file)


def of_another_type(folder):
    IA3Config(base_model_name_or_path="somewhere").save_pretrained(folder)


def on_adapters(folder):
    shutil.copytree(folder, folder.parent / "below")
    below = str(folder.parent / "below")
    changed(folder, "adapter_config.json", lambda config: config.update(base_model_name_or_path=below))


BROKEN = {
    "no base": (
        lambda folder: changed(folder, "adapter_config.json", lambda c: c.update(base_model_name_or_path=None)),
        "do not name their base model",
    ),
    "a base that is a folder of adapters": (on_adapters, "is a folder of adapters too"),
    "another adapter type": (of_another_type, "only LoRA is supported"),
    "a truncated configuration": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LO'),
        "cannot load adapters",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot load adapters"),
    "a missing matrix": (without_a_matrix, "lacks 1 weights of its adapters"),
    "an additional matrix": (with_another_matrix, "has weights that its configuration does not use"),
    "another rank": (
        lambda folder: changed(folder, "adapter_config.json", lambda c: c.update(r=5)),
        "cannot load adapters",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("adapters", [None, "continued", "stacked"])
def test_a_broken_adapter_folder_raises_a_one_line_error(base, tmp_path, how, adapters):
    step(base, tmp_path / "sft", "continued", rank=2)
    change, words = BROKEN[how]
    change(tmp_path / "sft")
    with pytest.raises(InputError) as error:
        load(tmp_path / "sft", adapters)
    assert words in str(error.value) and str(tmp_path / "sft") in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_with_modules_to_save_cannot_be_stacked_on(base, tmp_path):
    step(base, tmp_path / "sft", "continued", rank=2)
    changed(tmp_path / "sft", "adapter_config.json", lambda config: config.update(modules_to_save=["embed_tokens"]))
    weights = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(300, 32)
    save_file(weights, tmp_path / "sft" / "adapter_model.safetensors")
    with pytest.raises(
        InputError, match="the adapters in .* use modules_to_save, which adapters: stacked does not support"
    ):
        load(tmp_path / "sft", "stacked")
    assert not load(tmp_path / "sft")[0].hf.get_input_embeddings().weight.any(), "but it is folded in"


def test_adapters_are_not_merged_into_weights_partitioned_by_zero3(base, tmp_path):
    step(base, tmp_path / "sft", "continued", rank=2)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.ds_id = 7  # DeepSpeed's attribute of a partitioned weight
    with pytest.raises(InputError, match="set zero3_init_flag to false in the launch file"):
        merge_adapters(model, str(tmp_path / "sft"))


@pytest.mark.parametrize("adapters", ["continued", "stacked"])
def test_adapters_on_a_randomly_initialized_model_must_be_merged(tokenizer_folder, adapters):
    settings = PolicySettings(from_config=FRESH, tokenizer=str(tokenizer_folder), lora=lora(adapters))
    with pytest.raises(
        InputError, match=r"policy\.lora\.adapters: .* import the randomly initialized model or GGUF file"
    ):
        load_policy(settings)
