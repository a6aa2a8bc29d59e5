"""Gathering weights in bf16 changes no number, and sends as much less as the ledger says; reducing in bf16 rounds."""

from pathlib import Path

import pytest
import torch
from forked import start_forked
from launching import LAUNCH, finish, fsdp_on_a_cpu, told
from peft import LoraConfig, get_peft_model
from rounded_gathers import CASES
from safetensors.torch import load_file
from tiny_models import MORE_TREE, SEQUENCES, TREE, tiny_model
from tiny_training import gap, llama, metrics, numbers, same, with_adapters

from align.models.loading.origin import remove_randomness
from align.models.policy import Policy
from align.models.tree.batch import plain_batch
from align.train.sharding.bf16.gathers import autocast_weights

STEPS = 3
# Of the model's weights, those that autocast rounds, by their names: all matrices but embeddings
LINEAR = ("proj.weight", "lm_head.weight")


def outputs_and_gradients(kind, settings, *, is_rounded):
    """Those of a model under autocast, whose weights that may be gathered in bf16 are in bf16 where asked."""
    hf = tiny_model(kind, settings)
    remove_randomness(hf.config)
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout) or isinstance(getattr(module, "dropout", None), float):
            module.eval()
            module.dropout = 0.0
    policy = Policy(hf)
    names = autocast_weights(policy)
    with torch.no_grad():
        for name, value in policy.named_parameters():
            if is_rounded and name in names:
                value.copy_(value.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = policy(plain_batch(SEQUENCES["a pair"]))
    outputs.sum().backward()
    gradients = {name: value.grad for name, value in policy.named_parameters() if value.grad is not None}
    return {"outputs": outputs.detach()} | gradients, names


@pytest.mark.parametrize("name", TREE | MORE_TREE)
def test_rounding_what_may_be_gathered_in_bf16_changes_no_bit_under_autocast(name):
    kind, settings = (TREE | MORE_TREE)[name]
    exact, names = outputs_and_gradients(kind, settings, is_rounded=False)
    rounded, _ = outputs_and_gradients(kind, settings, is_rounded=True)
    assert same(exact, rounded)
    assert len(names) >= 7 and not any("embed_tokens" in name or "norm" in name for name in names)


def test_frozen_weights_under_adapters_and_the_adapters_may_be_gathered_in_bf16_but_not_with_dora():
    names = autocast_weights(with_adapters())
    assert {name.partition("proj.")[2] for name in names} == {
        "base_layer.weight",
        "lora_A.default.weight",
        "lora_B.default.weight",
        "",  # the LM head
    }
    dora = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"))
    assert autocast_weights(Policy(dora)) == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", ["zero3", "fsdp2"])
def test_weights_gathered_in_bf16_give_the_same_run_for_fewer_bytes(tmp_path, way):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
    launch = fsdp_on_a_cpu(tmp_path) if way == "fsdp2" else LAUNCH / f"{way}-cpu-2.yaml"
    where = {"ACCELERATE_TORCH_DEVICE": "cpu"} if way == "fsdp2" else {}
    script = Path(__file__).with_name("rounded_gathers.py")
    launched = start_forked(launch, "--main_process_port", "0", script, tmp_path, **where)
    output, errors = finish(launched)
    assert launched.returncode == 0, errors[-3000:]
    found = {(one["case"], one["run"]): one for one in told(output)}
    for case in CASES:
        rounded, whole = tmp_path / f"{case}-rounded", tmp_path / f"{case}-whole"
        assert numbers(rounded) == numbers(whole)
        trained = load_file(rounded / "trained.safetensors")
        assert same(trained, load_file(whole / "trained.safetensors"))
        fewer, more = found[case, "rounded"], found[case, "whole"]
        check_gathers(way, case, fewer, more, trained)
        if way == "zero3":
            assert same(load_file(rounded / "outputs.safetensors"), load_file(whole / "outputs.safetensors"))
    check_reduced(tmp_path, found["uneven", "reduced"], found["uneven", "rounded"])


def check_gathers(way, case, fewer, more, trained):
    """Which weights are gathered in bf16, and that so many bytes fewer are sent as the ledger says."""
    linear = [value.numel() for name, value in trained.items() if name.endswith(LINEAR)]
    assert (fewer["rounded"], more["rounded"]) == (sum(linear), 0)
    counted, said = (more[name] - fewer[name] for name in ("sent", "said"))
    print(f"{way}, {case}: sent {fewer['sent']:,} and {more['sent']:,}, ledger {fewer['said']:,} and {more['said']:,}")
    assert fewer["sent"] < 0.7 * more["sent"]
    # FSDP2 does not gather the head again for the backward pass
    assert said == pytest.approx(counted, rel=0.06 if (way, case) == ("fsdp2", "uneven") else 1e-3)
    # FSDP2 rounds in every pass, DeepSpeed in those under autocast alone
    assert fewer["is_rounded"] == (way == "fsdp2") and not more["is_rounded"]


def check_reduced(folder, fewer, more):
    """Gradients reduced in bf16 send half of their bytes in each step, and give nearly the same run."""
    saved = STEPS * more["weights"] * 2 / 2  # two bytes, of which each process sends one
    assert more["sent"] - fewer["sent"] == pytest.approx(saved, rel=0.01)
    assert more["said"] - fewer["said"] == pytest.approx(2 * saved, rel=0.01)  # gloo reduces all gradients everywhere
    lines, exact = metrics(folder / "uneven-reduced"), metrics(folder / "uneven-rounded")
    gaps = [abs(one["loss"] - other["loss"]) for one, other in zip(lines, exact, strict=True)]
    assert 0 < max(gaps) < 1e-2, gaps
    assert 0 < gap(*(load_file(folder / f"uneven-{run}/trained.safetensors") for run in ("reduced", "rounded"))) < 1e-2
