"""The settings of adapters mean what they mean in peft, and dropout does not depend on how tokens are batched."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SMALL
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.token_groups import TokenSequence
from align.data.tokenizer import train_tokenizer
from align.errors import InputError
from align.models.adapters.attach import add_adapters
from align.models.adapters.dropout import keep_mask
from align.models.policy import Policy, load_policy, save_policy
from align.models.settings import LoraSettings, PolicySettings
from align.models.tree.batch import plain_batch, tree_batch

CONFIG = AutoConfig.for_model("llama", **SMALL | {"vocab_size": 300})
SEQUENCES = [
    TokenSequence(np.array(ids, np.int32), np.arange(len(ids)) > 2)
    for ids in ([5, 6, 7, 8, 9], [5, 6, 7, 8, 4, 3], [5, 6, 7, 2], [9, 8, 7, 6, 5, 4])
]
OPTIONS = {
    "dora": ({"dora": True}, {"use_dora": True}),
    "rslora": ({"rslora": True, "rank": 4}, {"use_rslora": True}),
    "head": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "regex": ({"targets": r".*layers\.1\..*_proj"}, {"target_modules": r".*layers\.1\..*_proj"}),
    "dropout": ({"dropout": 0.25}, {"lora_dropout": 0.25}),
}


@pytest.fixture
def base(tmp_path):
    """A folder with a tiny Llama and a tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path / "base")
    train_tokenizer(["a b"], vocab_size=259, chat_template="").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def randomize(model):
    """Give every trained weight a value of its own; new adapters change nothing."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=draw) * 0.05)
    return model


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("adapters", ["merged", "continued"])
def test_an_option_is_pefts_and_its_policy_is_saved_as_it_was_trained(tmp_path, base, name, adapters):
    ours, theirs = OPTIONS[name]
    settings = PolicySettings(path=base, lora=LoraSettings(**{"rank": 4, "alpha": 8, "adapters": adapters} | ours))
    policy, tokenizer = load_policy(settings)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | theirs
    expected = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    trained = {key for key, value in policy.hf.named_parameters() if value.requires_grad}
    assert trained == {key for key, value in expected.named_parameters() if value.requires_grad}
    expected.load_state_dict(randomize(policy.hf).state_dict())
    policy.use_forward("tree")
    logps = policy(tree_batch(SEQUENCES)).detach()
    assert policy.hf.peft_config["default"].lora_dropout == ours.get("dropout", 0.0)
    save_policy(policy, tokenizer, tmp_path / "saved", merge=adapters == "merged")
    loaded, _ = load_policy(PolicySettings(path=str(tmp_path / "saved")))
    torch.testing.assert_close(loaded(plain_batch(SEQUENCES)), logps, rtol=0, atol=1e-4)
    of_peft = Policy(expected.eval())
    torch.testing.assert_close(of_peft(plain_batch(SEQUENCES)).detach(), logps, rtol=0, atol=1e-4)


def test_kept_adapters_are_continued_with_their_dropout_or_another(tmp_path, base):
    kept = {"rank": 4, "alpha": 8, "adapters": "continued"}
    policy, tokenizer = load_policy(PolicySettings(path=base, lora=LoraSettings(**kept, dropout=0.25)))
    save_policy(policy, tokenizer, tmp_path / "saved", merge=False)
    for changes, expected in (({}, [0.25]), ({"dropout": 0.5}, [0.5]), ({"dropout": 0.0}, [])):
        again = PolicySettings(path=str(tmp_path / "saved"), lora=LoraSettings(**kept, **changes))
        assert load_policy(again)[0].dropout_rates == expected
    for name, value in {"dora": True, "rslora": True, "modules_to_save": ["lm_head"]}.items():
        again = PolicySettings(path=str(tmp_path / "saved"), lora=LoraSettings(**kept, **{name: value}))
        with pytest.raises(InputError, match=f"{name} is") as error:
            load_policy(again)
        assert error.value.loc == ("policy", "lora", name)


@pytest.mark.parametrize("wrong", [{"targets": "layers.(0"}, {"adapters": "stacked", "dora": True}, {"dropout": 1.0}])
def test_a_wrong_setting_is_refused_where_it_is_read(wrong):
    with pytest.raises(InputError):
        LoraSettings(**wrong)


def test_modules_that_the_model_lacks_are_named(base):
    with pytest.raises(InputError, match=r"no module 'head'; did you mean") as error:
        load_policy(PolicySettings(path=base, lora=LoraSettings(modules_to_save=["head"])))
    assert error.value.loc == ("policy", "lora", "modules_to_save")


def dropped(batch, place, model):
    with model.dropout.active(*place):
        return batch.sum_by_sequence(model(batch))


def test_dropout_is_that_of_each_token_however_the_batch_is_cut():
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(CONFIG)
    lora = LoraSettings(rank=4, alpha=8, dropout=0.3)
    policy = Policy(randomize(add_adapters(hf, lora, seed=0, task="CAUSAL_LM"))).train()
    plain = dropped(plain_batch(SEQUENCES), (0, 1), policy)
    alone = torch.cat([dropped(plain_batch([sequence]), (0, 1), policy) for sequence in SEQUENCES])
    policy.use_forward("tree")
    tree = dropped(tree_batch(SEQUENCES), (0, 1), policy)
    for other in (alone, tree):
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-4)
    undropped = tree_batch(SEQUENCES).sum_by_sequence(policy(tree_batch(SEQUENCES)))
    others = [dropped(tree_batch(SEQUENCES), place, policy) for place in ((0, 2), (1, 1))]
    assert all((other - tree).abs().min() > 1e-3 for other in [*others, undropped])
    assert torch.equal(dropped(tree_batch(SEQUENCES), (0, 1), policy), tree)
    policy.eval()
    torch.testing.assert_close(dropped(tree_batch(SEQUENCES), (0, 1), policy), undropped)


def test_masks_are_independent_over_tokens_columns_layers_and_steps():
    key_T = tree_batch([TokenSequence(np.arange(2000, dtype=np.int32) % 7, np.arange(2000) > 0)]).key_T
    assert len(key_T.unique()) == 2000
    masks = {place: keep_mask(key_T, 256, 0.3, place).double() for place in [(0, 1, "q"), (0, 2, "q"), (0, 1, "k")]}
    number = 2000 * 256
    for mask in masks.values():
        assert mask.mean().item() == pytest.approx(0.7, abs=4 * (0.21 / number) ** 0.5)
        assert mask.mean(0).std().item() == pytest.approx((0.21 / 2000) ** 0.5, rel=0.2)  # over columns
        assert mask.mean(1).std().item() == pytest.approx((0.21 / 256) ** 0.5, rel=0.1)  # over tokens
        centered = mask - mask.mean()
        for shifted in (centered.roll(1, 0), centered.roll(1, 1)):
            assert abs((centered * shifted).mean().item()) < 4 * 0.21 / number**0.5
    first, *others = (mask - mask.mean() for mask in masks.values())
    for other in others:
        assert abs((first * other).mean().item()) < 4 * 0.21 / number**0.5
