"""Reward models: scores over a tree, saved models in transformers, and invalid settings."""

import json

import numpy as np
import pytest
import torch
from tiny_models import SEQUENCES, SMALL, TREE, perturbed, random_sequences
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align.data.token_groups import TokenGroup, TokenSequence
from align.data.tokenizer import PAD, TURN_END, TURN_START
from align.errors import InputError
from align.models.policy import load_policy, save_policy
from align.models.probe import choose_forward
from align.models.reward_model import load_rating, load_reward_model, save_reward_model, set_pad_token
from align.models.reward_scoring import score_groups
from align.models.settings import (
    HELPSTEER,
    PUBLISHED_WEIGHTS,
    HeadSettings,
    LoraSettings,
    PolicySettings,
    Rating,
    resolve_rating,
)
from align.models.tree.batch import plain_batch, tree_batch
from align.models.weights import fingerprint

FRESH = SMALL | {"model_type": "llama", "vocab_size": 300}
COHERE = {name: value for name, value in FRESH.items() if name != "head_dim"} | {"model_type": "cohere"}
TWELVE = tuple(f"{letter}-ness" for letter in "zyxwvutsrqpo")  # sorted as text, 10 precedes 2 and o precedes z
END = 1  # end-of-turn id of the tokenizer below


@pytest.fixture
def settings(tokenizer_folder):
    """Return settings of a randomly initialized model, with changes by name."""
    return lambda **changes: PolicySettings(**{"from_config": FRESH, "tokenizer": str(tokenizer_folder)} | changes)


def ended(sequences):
    """Return the sequences with an end-of-turn token appended to each."""
    return [TokenSequence(np.append(one.ids, np.int32(END)), np.append(one.loss_mask, True)) for one in sequences]


def scores_of(model, sequences, forward):
    model.use_forward(forward)
    with torch.no_grad():
        return model((tree_batch if forward == "tree" else plain_batch)(sequences))


def transformers_scores(folder, sequences, *, side="right"):
    """Return the scores that transformers computes for one padded batch of the same token ids."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = side
    inputs = tokenizer.pad({"input_ids": [one.ids.tolist() for one in sequences]}, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", ["llama, grouped heads", "qwen3", "gpt2", "gemma2"])
def test_tree_scores_equal_those_of_single_sequences(tmp_path, settings, kind):
    model_type, changes = TREE[kind]
    values = {name: value for name, value in (SMALL | changes).items() if model_type != "gpt2" or name in changes}
    fresh = {"model_type": model_type, **values, "vocab_size": 300, "initializer_range": 0.1}
    model, _ = load_reward_model(settings(from_config=fresh))
    sequences = [*SEQUENCES["many"], *SEQUENCES["a prefix of another"]]
    assert choose_forward(model, [sequences], "auto").name == "tree"
    together = scores_of(model, sequences, "tree")
    model.use_forward("plain")
    alone = torch.cat([model.forward_sequence(one) for one in sequences]).detach()
    assert together.shape == (len(sequences), 5)
    assert alone.std(dim=0).min() > 0.05  # the scores differ
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores_of(model, sequences, "plain"), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_transformers_gives_the_same_scores(tmp_path, settings, side):
    model, tokenizer = load_reward_model(settings(seed=3))
    sequences = ended(random_sequences(5, prompts=4, max_responses=5))
    set_pad_token(model, tokenizer, {END})
    save_reward_model(model, tokenizer, tmp_path)
    expected = scores_of(model, sequences, "tree")
    torch.testing.assert_close(transformers_scores(tmp_path, sequences, side=side), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "attn_implementation" not in config and "align_tree" not in json.dumps(config)
    assert [file.name for file in tmp_path.iterdir() if file.suffix in (".bin", ".pt", ".pkl")] == []


def test_a_response_that_ends_with_the_padding_token_is_scored_at_its_last_token(tmp_path, settings):
    model, tokenizer = load_reward_model(settings())
    tokenizer.pad_token = TURN_END  # as in SmolLM2's and many other tokenizers
    sequences = ended(SEQUENCES["shared response prefixes"])
    set_pad_token(model, tokenizer, {END})
    assert tokenizer.pad_token in (PAD, TURN_START)
    save_reward_model(model, tokenizer, tmp_path)
    expected = scores_of(model, sequences, "tree")
    torch.testing.assert_close(transformers_scores(tmp_path, sequences), expected, rtol=0, atol=1e-5)
    # With the end-of-turn token as padding, transformers scores the token before it
    config = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": END}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (transformers_scores(tmp_path, sequences) - expected).abs().min() > 1e-4


def test_a_valid_padding_token_is_kept_and_a_missing_one_is_an_error(settings):
    model, tokenizer = load_reward_model(settings())
    set_pad_token(model, tokenizer, {END})
    assert tokenizer.pad_token == PAD
    assert model.base.config.pad_token_id == tokenizer.pad_token_id
    with pytest.raises(InputError, match="padding needs a special token that does not end a response"):
        set_pad_token(model, tokenizer, {0, 1, 2})


def test_the_order_of_attributes_and_their_weights_survive_saving(tmp_path, settings):
    weights = tuple(float(place) for place in range(12))
    model, tokenizer = load_reward_model(settings(), HeadSettings(attributes=TWELVE, weights=weights))
    with torch.no_grad():
        model.head.weight.mul_(torch.arange(12)[:, None])  # another scale for each attribute
    set_pad_token(model, tokenizer, {END})
    save_reward_model(model, tokenizer, tmp_path)
    labels = AutoModelForSequenceClassification.from_pretrained(tmp_path).config.id2label
    assert [labels[place] for place in range(12)] == list(TWELVE)
    assert load_rating(str(tmp_path)) == Rating(TWELVE, weights)
    again, _ = load_reward_model(PolicySettings(path=str(tmp_path)))
    assert again.rating == model.rating
    sequences = ended(SEQUENCES["a pair"])
    assert torch.equal(scores_of(again, sequences, "tree"), scores_of(model, sequences, "tree"))
    assert fingerprint(again) == fingerprint(model)


def test_the_default_reward_uses_the_published_weights():
    # Computed by hand: (4, 4, 4, 2, 2) is 6.28, HelpSteer2's means are 4.8648, all 4 is 6.56.
    rating = resolve_rating(HeadSettings(), None, default=HELPSTEER)
    rows = torch.tensor([[4.0, 4, 4, 2, 2], [2.87, 2.96, 3.64, 1.70, 2.00], [4, 4, 4, 4, 4]])
    assert rating.rewards(rows) == pytest.approx([6.28, 4.8648, 6.56], abs=1e-6)
    turned = resolve_rating(HeadSettings(attributes=HELPSTEER[::-1]), None, default=())
    assert turned.rewards(rows.flip(1)) == pytest.approx([6.28, 4.8648, 6.56], abs=1e-6)


def test_other_attributes_have_equal_weights():
    assert resolve_rating(HeadSettings(attributes=("a", "b")), None, default=()).weights == (0.5, 0.5)
    assert resolve_rating(HeadSettings(), None, default=("reward",)) == Rating(("reward",), (1.0,))
    saved = Rating(("a", "b"), (3.0, 4.0))
    assert resolve_rating(HeadSettings(), saved, default=HELPSTEER) == saved
    assert resolve_rating(HeadSettings(weights=(1.0, 2.0)), saved, default=HELPSTEER).weights == (1.0, 2.0)


WRONG_HEADS = {
    "too few weights": (HeadSettings(weights=(1.0, 2.0)), None, "head.weights: 2 weights for 5 attributes"),
    "a duplicate name": (
        HeadSettings(attributes=("a", "b", "a")),
        None,
        "head.attributes: attribute names must be distinct and not empty",
    ),
    "an empty name": (
        HeadSettings(attributes=("a", " ")),
        None,
        "head.attributes: attribute names must be distinct and not empty",
    ),
    "other attributes than the trained ones": (
        HeadSettings(attributes=("b", "a")),
        Rating(("a", "b"), (1.0, 1.0)),
        "head.attributes: this reward model rates a, b, not ",
    ),
}


@pytest.mark.parametrize("how", WRONG_HEADS)
def test_invalid_head_settings_raise_a_one_line_error(how):
    head, saved, words = WRONG_HEADS[how]
    with pytest.raises(InputError) as error:
        resolve_rating(head, saved, default=HELPSTEER)
    assert words in str(error.value)


def test_a_new_head_depends_on_the_seed_and_keeps_the_decoder(tmp_path, settings):
    policy, tokenizer = load_policy(settings(seed=5))
    save_policy(policy, tokenizer, tmp_path)
    made = [load_reward_model(PolicySettings(path=str(tmp_path), seed=seed))[0] for seed in (1, 1, 2)]
    heads = [model.head.weight for model in made]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    decoder = made[0].base.base_model.state_dict()
    assert decoder.keys() == policy.base.base_model.state_dict().keys()
    assert all(torch.equal(value, decoder[name]) for name, value in policy.base.base_model.state_dict().items())
    policy.use_forward("tree")
    made[0].use_forward("tree")
    batch = tree_batch(SEQUENCES["many"])
    assert torch.equal(policy.hidden_states(batch), made[0].hidden_states(batch))


def test_a_head_can_be_added_to_a_folder_of_adapters(tmp_path, settings):
    save_policy(*load_policy(settings()), tmp_path / "base")
    policy, tokenizer = load_policy(PolicySettings(path=str(tmp_path / "base"), lora=LoraSettings(rank=4)))
    save_policy(perturbed(policy), tokenizer, tmp_path / "adapters", merge=False)
    model, _ = load_reward_model(PolicySettings(path=str(tmp_path / "adapters")))
    policy.use_forward("plain")
    batch = plain_batch(SEQUENCES["many"])
    torch.testing.assert_close(model.hidden_states(batch), policy.hidden_states(batch), rtol=1e-4, atol=1e-4)


def test_adapters_train_with_the_full_head_and_are_saved_merged(tmp_path, settings):
    model, tokenizer = load_reward_model(settings(lora=LoraSettings(rank=4), gradient_checkpointing=True))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert sum("lora_" in name for name in trained) == 28  # two matrices on seven layers of two blocks
    assert [name for name in trained if "lora_" not in name] == [
        "hf.base_model.model.score.modules_to_save.default.weight"
    ]
    perturbed(model)
    with torch.no_grad():
        model.head.modules_to_save["default"].weight.mul_(2)
    sequences = ended(SEQUENCES["many"])
    expected = scores_of(model, sequences, "tree")
    set_pad_token(model, tokenizer, {END})
    save_reward_model(model, tokenizer, tmp_path)
    torch.testing.assert_close(transformers_scores(tmp_path, sequences), expected, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "adapter_config.json").exists()


def test_head_only_freezes_the_decoder(settings):
    model, _ = load_reward_model(settings(gradient_checkpointing=True), HeadSettings(only=True))
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["hf.score.weight"]
    model.use_forward("tree")
    model(tree_batch(SEQUENCES["many"])).sum().backward()
    assert model.head.weight.grad.abs().min() > 0
    with pytest.raises(InputError, match=r"head\.only: the decoder is frozen"):
        load_reward_model(settings(lora=LoraSettings(rank=2)), HeadSettings(only=True))


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_scores_do_not_depend_on_the_micro_batches(settings, budget):
    model, _ = load_reward_model(settings())
    made = [random_sequences(seed, prompts=1, max_responses=4) for seed in range(9)]
    groups = [TokenGroup(tuple(one), None, None, ({},) * len(one), row) for row, one in enumerate(made)]
    expected = [torch.cat([model.forward_sequence(each) for each in one]).detach() for one in made]
    for forward in ("tree", "plain"):
        model.use_forward(forward)
        for scores_KA, alone in zip(score_groups(model, groups, token_budget=budget), expected, strict=True):
            torch.testing.assert_close(scores_KA, alone, rtol=0, atol=1e-5)


def test_the_head_computes_in_fp32_under_autocast(settings):
    model, _ = load_reward_model(settings())
    with torch.no_grad():
        model.head.weight.mul_(100)
    sequences = SEQUENCES["many"]
    model.use_forward("tree")
    batch = tree_batch(sequences)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        scores, hidden = model(batch), model.hidden_states(batch).flatten(0, 1)[batch.last_S]
    assert scores.dtype == torch.float32
    exact = hidden.double() @ model.head.weight.double().T
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-4)


def test_any_sequence_classifier_loads_as_a_reward_model(tmp_path, tokenizer_folder):
    values = {name: value for name, value in FRESH.items() if name != "model_type"}
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**values, num_labels=1)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    assert load_rating(str(tmp_path)) == Rating(("LABEL_0",), (1.0,))
    model, _ = load_reward_model(PolicySettings(path=str(tmp_path)))
    assert scores_of(model, SEQUENCES["a pair"], "tree").shape == (2, 1)


def test_reward_models_and_policies_are_told_apart(tmp_path, settings):
    save_policy(*load_policy(settings()), tmp_path / "policy")
    assert load_rating(str(tmp_path / "policy")) is None
    assert load_rating(None) is None
    fresh = FRESH | {"tie_word_embeddings": True}  # a language model of it would not lack weights
    model, tokenizer = load_reward_model(settings(from_config=fresh))
    set_pad_token(model, tokenizer, {END})
    save_reward_model(model, tokenizer, tmp_path / "reward")
    with pytest.raises(InputError, match="is a reward model, not a policy"):
        load_policy(PolicySettings(path=str(tmp_path / "reward")))


WRONG = {
    "an architecture without a classifier": (
        {"from_config": COHERE},
        "has no sequence classifier for CohereForCausalLM",
    ),
    "unmerged adapters": ({"lora": LoraSettings(adapters="stacked")}, "policy.lora.adapters"),
    "unknown target modules": ({"lora": LoraSettings(targets=["nowhere"])}, "policy.lora.targets"),
}


@pytest.mark.parametrize("how", WRONG)
def test_an_unsupported_reward_model_raises_a_one_line_error(settings, how):
    changes, words = WRONG[how]
    with pytest.raises(InputError) as error:
        load_reward_model(settings(**changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_last_positions_are_those_of_each_sequences_last_token():
    for sequences in SEQUENCES.values():
        for batch in (tree_batch(sequences), plain_batch(sequences)):
            ids, depths = batch.input_ids.flatten()[batch.last_S], batch.position_ids.flatten()[batch.last_S]
            assert ids.tolist() == [one.ids[-1] for one in sequences]
            assert depths.tolist() == [len(one.ids) - 1 for one in sequences]


def test_the_published_weights_are_assigned_by_name():
    assert list(PUBLISHED_WEIGHTS.values()) == [0.3, 0.74, 0.46, 0.47, -0.33]
