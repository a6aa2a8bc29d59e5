"""Losses against those that TRL's DPOTrainer computes for the same tiny models and rows."""

import importlib
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.errors import InputError
from align.losses.table import TRL_NAMES, preference_loss

pytestmark = [
    pytest.mark.slow,
    # TRL uses a name that transformers has deprecated
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnop"]
ROWS = [
    {"prompt": "a b c", "chosen": " d e", "rejected": " f g h i"},
    {"prompt": "a", "chosen": " p o n m", "rejected": " k"},
    {"prompt": "b p", "chosen": " c c c", "rejected": " a b j"},
    {"prompt": "b p", "chosen": " a b j", "rejected": " c c c"},
]

# TRL's name and settings, our name and settings. `aot_unpaired` sorts a batch before it compares, so for one row it is
# cDPO; `exo_pair` is the forward KL to the smoothed label, so to rewards whose gap has a sigmoid of 0.8.
SAME = [
    ("sigmoid", {"beta": 0.3}, "dpo", {"beta": 0.3}),
    ("sigmoid_norm", {"beta": 2.0}, "dpo_norm", {"beta": 2.0}),
    ("hinge", {"beta": 0.05}, "hinge", {"beta": 0.05}),
    ("ipo", {"beta": 0.3}, "ipo", {"beta": 0.3, "per_token": True}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.2}, "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.3, "label_smoothing": 0.2}, "cdpo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("ipo", {"beta": 0.3}, "ipo_norm", {"beta": 0.3}),
    ("apo_zero", {"beta": 0.3}, "apo_zero", {"beta": 0.3}),
    ("apo_down", {"beta": 0.3}, "apo_down", {"beta": 0.3}),
    ("exo_pair", {"beta": 0.3, "label_smoothing": 0.2}, "exo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("exo_pair", {"beta": 0.3, "label_smoothing": 0.2}, "rpo_fwd_kl", {"beta": 0.3, "eta": math.log(4)}),
]


@pytest.mark.parametrize("name", TRL_NAMES)
def test_a_name_of_trl_is_answered_with_the_loss_of_the_same_numbers(name):
    ours = next(ours for theirs, _, ours, _ in SAME if theirs == name)
    with pytest.raises(InputError, match=f"TRL's {name} is called '{ours}' here"):
        preference_loss(name)


def tiny_llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,  # so that policy and reference differ by several nats
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def response_logp(model, prompt, response):
    """Return the log-probability of a response with its end token, from one forward over the unpadded row."""
    prompt_ids = [WORDS.index(word) for word in prompt.split()]
    response_ids = [WORDS.index(word) for word in [*response.split(), "<eos>"]]
    logps_TV = model(torch.tensor([prompt_ids + response_ids])).logits[0].log_softmax(dim=-1)
    return sum(logps_TV[len(prompt_ids) + i - 1, token] for i, token in enumerate(response_ids))


def row_logps(model, row):
    return torch.stack([response_logp(model, row["prompt"], row[side]) for side in ("chosen", "rejected")])[None]


def trl_trainer(folder, monkeypatch, policy, **settings):
    """TRL's trainer of ROWS, whose losses are asked for without training."""
    monkeypatch.setenv("CI", "1")  # otherwise TRL's trainers send usage reports over the network
    trl = importlib.import_module("trl")  # takes seconds, so not during collection
    return trl.DPOTrainer(
        model=policy,
        ref_model=tiny_llama(2),
        args=trl.DPOConfig(output_dir=str(folder), bf16=False, use_cpu=True, report_to=[], **settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=word_tokenizer(),
    )


@pytest.mark.parametrize(("trl_name", "trl_settings", "name", "settings"), SAME)
def test_losses_and_gradients_equal_trls(trl_name, trl_settings, name, settings, tmp_path, monkeypatch):
    ours, reference, policy = tiny_llama(1), tiny_llama(2), tiny_llama(1)
    trainer = trl_trainer(tmp_path, monkeypatch, policy, loss_type=[trl_name], **trl_settings)
    loss = preference_loss(name, **settings)
    margins = []
    for row, tokens in zip(ROWS, trainer.train_dataset, strict=True):
        trl_loss = trainer.compute_loss(policy, trainer.data_collator([tokens]))
        lengths_BK = torch.tensor([[len(row[side].split()) + 1 for side in ("chosen", "rejected")]])
        policy_BK, reference_BK = row_logps(ours, row), row_logps(reference, row).detach()
        loss_B = loss(policy_BK, reference_BK, torch.tensor([[1.0, 0.0]]), lengths_BK)
        torch.testing.assert_close(loss_B[0], trl_loss, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(loss_B.sum(), list(ours.parameters()))
        trl_gradients = torch.autograd.grad(trl_loss, list(policy.parameters()))
        torch.testing.assert_close(gradients, trl_gradients, rtol=1e-4, atol=1e-5)
        margins.append((policy_BK - reference_BK).diff().item())
    assert min(margins) < -1 < 1 < max(margins)  # margins of both signs occurred


def log_weight(model, prompt, response):
    """Return the mean over the tokens of a response of log p(token) - log sum_v p(v)^2, from all logits."""
    prompt_ids = [WORDS.index(word) for word in prompt.split()]
    response_ids = [WORDS.index(word) for word in [*response.split(), "<eos>"]]
    with torch.no_grad():
        p_TV = model(torch.tensor([prompt_ids + response_ids])).logits[0].softmax(dim=-1)
    p_TV = p_TV[len(prompt_ids) - 1 :]
    aligned = [p_TV[at, token].log() - p_TV[at].square().sum().log() for at, token in enumerate(response_ids)]
    return sum(aligned) / len(aligned)


@pytest.mark.parametrize(("trl_name", "name"), [("sigmoid", "dpo"), ("ipo", "ipo_norm"), ("apo_zero", "apo_zero")])
def test_wpo_weights_equal_trls_up_to_their_cap(trl_name, name, tmp_path, monkeypatch):
    ours, reference, policy = tiny_llama(1), tiny_llama(2), tiny_llama(1)
    trainer = trl_trainer(tmp_path, monkeypatch, policy, loss_type=[trl_name], beta=0.3, use_weighting=True)
    loss, weights = preference_loss(name, beta=0.3, weighting="wpo"), []
    for row, tokens in zip(ROWS, trainer.train_dataset, strict=True):
        trl_loss = trainer.compute_loss(policy, trainer.data_collator([tokens]))
        lengths_BK = torch.tensor([[len(row[side].split()) + 1 for side in ("chosen", "rejected")]])
        policy_BK, reference_BK = row_logps(ours, row), row_logps(reference, row).detach()
        log_weights_BK = torch.stack([log_weight(ours, row["prompt"], row[side]) for side in ("chosen", "rejected")])[
            None
        ]
        weights.append(log_weights_BK.sum().exp().item())
        labels_BK = torch.tensor([[1.0, 0.0]])
        loss_B = loss(policy_BK, reference_BK, labels_BK, lengths_BK, log_weights_BK=log_weights_BK)
        # TRL 1.16 has no cap; its releases before had one, as the authors' code
        torch.testing.assert_close(loss_B[0], trl_loss * min(1, 1 / weights[-1]), rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(loss_B.sum(), list(ours.parameters()))
        trl_gradients = torch.autograd.grad(trl_loss * min(1, 1 / weights[-1]), list(policy.parameters()))
        torch.testing.assert_close(gradients, trl_gradients, rtol=1e-4, atol=1e-5)
    assert min(weights) < 0.5


@pytest.mark.filterwarnings("ignore")  # the modules of trl.experimental announce that they may change
def test_orpo_and_cpo_equal_the_methods_of_trls_experimental_trainers():
    generator = torch.Generator().manual_seed(0)
    logps_BK = -3 * torch.rand(8, 2, generator=generator) - 0.01
    rewards_BK, lengths_BK = torch.tensor([[1.0, 0.0]]).expand(8, 2), torch.ones(8, 2)
    orpo = importlib.import_module("trl.experimental.orpo").ORPOTrainer.odds_ratio_loss
    device = SimpleNamespace(device="cpu")
    negative_B, *_ = orpo(SimpleNamespace(beta=0.3, accelerator=device), *logps_BK.unbind(1))
    found_B = preference_loss("orpo", beta=0.3)(logps_BK, logps_BK * 0, rewards_BK, lengths_BK)
    torch.testing.assert_close(found_B, -negative_B)
    cpo = importlib.import_module("trl.experimental.cpo").CPOTrainer.cpo_loss
    for smoothing in (0.0, 0.2):
        settings = SimpleNamespace(
            beta=0.3, alpha=0.0, label_smoothing=smoothing, loss_type="sigmoid", accelerator=device
        )
        expected_B, *_ = cpo(settings, *logps_BK.unbind(1))
        loss = preference_loss("cpo", beta=0.3, label_smoothing=smoothing)
        torch.testing.assert_close(loss(logps_BK, logps_BK * 0, rewards_BK, lengths_BK), expected_B)


@pytest.mark.parametrize("labels", [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("shift", [-2.0, 2.0])  # of the mismatched log-ratios, whose mean is clamped at 0
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_losses_on_labels_and_their_gradients_equal_those_of_trls_kto_trainer(name, shift, labels):
    generator = torch.Generator().manual_seed(0)
    policy_B, reference_B, other_B, other_reference_B = -9 * torch.rand(4, 4, generator=generator, dtype=torch.float64)
    other_B = other_reference_B + shift + (other_B - other_B.mean()) / 9
    policy_B.requires_grad_()
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    # A batch of two tokens each: the second is the completion
    model = lambda **inputs: SimpleNamespace(  # noqa: E731
        log_probs=policy_B[:, None], entropy=torch.zeros(4, 1), mean_logits=torch.zeros(4, 1)
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda values: values),
        _compute_kl_logps=lambda model, batch: other_B,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=name == "kto",
        loss_type=name,
        beta=0.3,
        **weights,
    )
    batch = {
        "input_ids": torch.ones(4, 2, dtype=torch.long),
        "attention_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * 4),
        "label": torch.tensor(labels).bool(),
        "ref_logps": reference_B,
        "ref_KL_logps": other_reference_B,
    }
    expected = importlib.import_module("trl").KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    kl = max(0.0, (other_B - other_reference_B).mean().item())
    assert (kl > 1) == (shift > 0)
    columns = (policy_B[:, None], reference_B[:, None], torch.tensor(labels).double()[:, None], torch.ones(4, 1))
    found = preference_loss(name, beta=0.3, **weights)(*columns, kl=kl).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (gradient_B,), (expected_B,) = (torch.autograd.grad(loss, policy_B) for loss in (found, expected))
    torch.testing.assert_close(gradient_B, expected_B, rtol=1e-12, atol=1e-12)
