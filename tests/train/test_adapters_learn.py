"""Training steps on adapters of earlier steps: what learns, and what the reference is."""

import importlib.util
import math

import pytest
import torch
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    llama,
    loop,
    metrics,
    preference,
    same,
    supervised,
    weights,
)

from align.data.tokenizer import train_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.settings import LoraSettings, PolicySettings

WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}
WAYS = {
    "continued": {"lora": {"adapters": "continued"}},
    "stacked": {"lora": {"adapters": "stacked"}},
    "continued in 4 bits": {"lora": {"adapters": "continued"}, "quantize": "nf4"},
    "stacked in 4 bits": {"lora": {"adapters": "stacked"}, "quantize": "nf4"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "base"
    llama(**WIDE).save_pretrained(folder)
    train_tokenizer(["a b"], vocab_size=259, chat_template="").save_pretrained(folder)
    return folder


@pytest.fixture(params=WAYS)
def way(request):
    if "quantize" in WAYS[request.param] and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (align[qlora])")
    return WAYS[request.param]


def load(path, way, seed=0):
    lora = LoraSettings(rank=4, alpha=8, **way["lora"])
    return load_policy(PolicySettings(path=str(path), lora=lora, quantize=way.get("quantize"), seed=seed))


def test_two_steps_train_their_adapters_against_the_policy_that_entered(base, tmp_path, way):
    policy, tokenizer = load(base, way, seed=1)
    loop(tmp_path / "sft", supervised(), demonstrations(24), model=policy, epochs=4.0).run()
    lines = metrics(tmp_path / "sft")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    save_policy(policy, tokenizer, tmp_path / "sft" / "policy", merge=False)

    policy, _ = load(tmp_path / "sft" / "policy", way, seed=2)
    before = weights(policy)
    trained = loop(tmp_path / "dpo", preference("dpo", beta=0.5), comparisons(24), model=policy, epochs=4.0)
    known = dict(trained.reference_cache.values)
    trained.run()
    lines = metrics(tmp_path / "dpo")
    # 2e-6: rounding of sums of up to 24 tokens, times beta
    assert math.isclose(lines[0]["loss"], math.log(2), abs_tol=2e-6)
    assert lines[-1]["loss"] < math.log(2) - 0.05
    after = weights(policy)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name and ".default." in name}
    assert any(".below." in name for name in before) == (way["lora"]["adapters"] == "stacked")

    # Another policy on the same adapters knows the same references, though its new ones begin elsewhere.
    again, _ = load(tmp_path / "sft" / "policy", way, seed=3)
    other = loop(tmp_path / "again", preference("dpo", beta=0.5), comparisons(24), model=again)
    assert other.reference_cache.values == known


def test_a_killed_step_on_adapters_goes_on_bit_for_bit(base, tmp_path, way):
    policy, tokenizer = load(base, way)
    save_policy(policy, tokenizer, tmp_path / "policy", merge=False)

    def start(name, progress=None):
        policy, _ = load(tmp_path / "policy", way, seed=1)
        folder = tmp_path / name
        return loop(folder, preference("dpo"), comparisons(24), model=policy, progress=progress, checkpoint_steps=1)

    whole = start("whole")
    whole.run()
    with pytest.raises(Killed):
        start("killed", Recorder(stop_after=2)).run()
    again = start("killed")
    again.run()
    assert same(weights(whole.policy), weights(again.policy))
