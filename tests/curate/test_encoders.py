import numpy as np
import pytest
import torch
from huggingface_hub import constants
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

from align.curate.embeddings.cache import VectorCache
from align.curate.embeddings.encoder import TextEncoder, make_encoder
from align.curate.embeddings.pipelines import Pipeline, encoder_work, is_pipeline
from align.curate.embeddings.policy_states import PolicyStates, micro_batches
from align.curate.embeddings.poolings import POOLINGS
from align.curate.embeddings.settings import EncoderSettings
from align.data.token_groups import TokenSequence
from align.errors import InputError, RunError
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings
from align.testing import tiny_policy

TEXTS = ["The cat is red.", "The cat is blue, and so is the dog.", "No", "The cat", "Gladly, the wolf"]


def by_hand(name, text):
    """Return the vector of one text alone, from transformers' own hidden states."""
    policy, tokenizer = tiny_policy()

    def states(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return [each[0].numpy() for each in policy.base(input_ids=ids, output_hidden_states=True).hidden_states]

    if name == "prompt_eol":
        return states(f'This sentence : "{text}" means in one word:"')[-1][-1]
    if name == "echo":
        twice = f"Rewrite the sentence: {text}, rewritten sentence: {text}"
        ids = tokenizer(twice)["input_ids"]
        second = next(size for size in range(len(ids)) if tokenizer.decode(ids[-size:]).strip() == text)
        return states(twice)[-1][-second:].mean(axis=0)
    *_, last = first, *_ = states(text)[1:]
    weights = np.arange(1, len(last) + 1)
    return {
        "cls": last[0],
        "mean": last.sum(axis=0) / len(last),
        "max": last.max(axis=0),
        "last": last[-1],
        "weighted_mean": (weights[:, None] * last).sum(axis=0) / weights.sum(),
        "first_last": (first.mean(axis=0) + last.mean(axis=0)) / 2,
    }[name]


@pytest.mark.parametrize("name", POOLINGS)
def test_a_pooling_equals_transformers_on_one_text_at_a_time(name):
    expected = np.stack([by_hand(name, text) for text in TEXTS])
    policy, tokenizer = tiny_policy()
    for budget in (4, 60, 4096):
        states = PolicyStates(policy, tokenizer, POOLINGS[name], token_budget=budget)
        np.testing.assert_allclose(states(TEXTS).numpy(), expected, atol=5e-6)
    assert policy.is_tree


def test_texts_over_a_sliding_window_are_embedded_as_alone(tmp_path):
    save_policy(*tiny_policy(), tmp_path)
    settings = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "initializer_range": 0.1}
    policy, tokenizer = load_policy(PolicySettings(from_config=settings, tokenizer=str(tmp_path)))
    states = PolicyStates(policy, tokenizer, POOLINGS["last"])
    states(["No", "The cat"])
    assert policy.is_tree
    long = "The cat is blue, and so is the dog, and the wolf, and the bird, and the fish."
    ids = torch.tensor([tokenizer(long)["input_ids"]])
    assert ids.shape[1] > 8
    found = states(["No", "The cat", long])[-1]
    policy.use_forward("plain")
    with torch.no_grad():
        expected = policy.base(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


def test_special_tokens_are_context_and_are_not_pooled():
    policy, tokenizer = tiny_policy()
    (plain,) = PolicyStates(policy, tokenizer, POOLINGS["mean"])(["The cat"])
    end = [("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=end)
    assert tokenizer("The cat")["input_ids"][0] == tokenizer.eos_token_id
    (found,) = PolicyStates(policy, tokenizer, POOLINGS["mean"])(["The cat"])
    ids = torch.tensor([tokenizer("The cat")["input_ids"]])
    policy.use_forward("plain")
    with torch.no_grad():
        hidden = policy.base.get_decoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, hidden[0, 1:].mean(dim=0))
    assert not torch.allclose(found, plain, atol=1e-3)


def test_a_text_is_cut_and_one_without_a_token_is_refused():
    policy, tokenizer = tiny_policy()
    states = PolicyStates(policy, tokenizer, POOLINGS["mean"], max_tokens=3)
    short = tokenizer.decode(tokenizer("The cat is red.")["input_ids"][:3])
    torch.testing.assert_close(*states(["The cat is red.", short]))
    with pytest.raises(InputError, match="the text '' has no token"):
        states(["a", ""])


def test_micro_batches_hold_each_text_once_and_neighbours_by_prefix():
    ids = [[1, 2, 3], [7], [1, 2], [1, 2, 3, 4], [7, 8, 9]]
    sequences = [TokenSequence(np.array(each, np.int32), np.zeros(len(each), bool)) for each in ids]
    assert list(micro_batches(sequences, token_budget=4, is_tree=True)) == [[2, 0, 3], [1, 4]]
    assert list(micro_batches(sequences, token_budget=4, is_tree=False)) == [[1, 2], [0], [4], [3]]


class Counting:
    """Embeds a text as (length, 1), and counts the texts."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts):
        self.texts += texts
        return torch.tensor([[len(text), 1.0] for text in texts])


def test_equal_texts_and_those_of_an_earlier_run_are_not_embedded_again(tmp_path):
    first, second = Counting(), Counting()
    encoder = TextEncoder(first, name="lengths", cache=VectorCache(tmp_path))
    found = encoder.encode(["aaa", "", "aaa"])
    np.testing.assert_allclose(found, [[3 / 10**0.5, 1 / 10**0.5], [0, 1], [3 / 10**0.5, 1 / 10**0.5]], rtol=1e-6)
    again = TextEncoder(second, name="lengths", cache=VectorCache(tmp_path)).encode(["b", "aaa"])
    assert (first.texts, second.texts) == (["aaa", ""], ["b"])
    np.testing.assert_array_equal(again[1], found[0])
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(RunError, match="delete it"):
        TextEncoder(second, name="lengths", cache=VectorCache(tmp_path)).encode(["aaa"])


def test_a_folder_of_a_policy_makes_an_encoder_and_another_pooling_has_its_own_cache(tmp_path):
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, tmp_path / "sft")
    settings = [EncoderSettings(model=str(tmp_path / "sft"), pooling=name) for name in ("mean", "max")]
    found = [make_encoder(each, cache=tmp_path / "cache") for each in settings]
    for encoder, name in zip(found, ("mean", "max"), strict=True):
        raw = PolicyStates(*tiny_policy(), POOLINGS[name])(TEXTS)
        np.testing.assert_allclose(encoder.encode(TEXTS), raw / raw.norm(dim=1, keepdim=True), atol=1e-6)
        assert encoder.name == f"{name} states of sft"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_cache_of_a_policy_is_not_read_with_another_tokenizer(tmp_path):
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, tmp_path / "sft")
    end = [("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=end)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path, settings = str(tmp_path / "sft"), EncoderSettings(pooling="cls")
    for own in (PolicySettings(path=path), PolicySettings(path=path, tokenizer=str(tmp_path / "tokenizer"))):
        cached = make_encoder(settings, policy=own, cache=tmp_path / "cache").encode(TEXTS)
        np.testing.assert_allclose(cached, make_encoder(settings, policy=own).encode(TEXTS), atol=1e-6)


def test_vectors_of_words_are_averaged_without_unknown_ones(tmp_path):
    (tmp_path / "glove.txt").write_text("the 1 0\ncat 0 1\n, 3 3\n")
    encoder = make_encoder(EncoderSettings(model=str(tmp_path / "glove.txt")))
    found = encoder.encode(["The cat", "the, xyz", "xyz"])
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [0.8, 0.6], [0, 0]], atol=1e-6)
    (tmp_path / "glove.txt").write_text("the 1 0\nat home 0 1\n")
    with pytest.raises(InputError, match="line 2: could not convert string to float: 'home'"):
        make_encoder(EncoderSettings(model=str(tmp_path / "glove.txt")))
    (tmp_path / "glove.txt").write_text("the 1 0\ncat 0\n")
    with pytest.raises(InputError, match="line 2 has 1 numbers, and the first word has 2"):
        make_encoder(EncoderSettings(model=str(tmp_path / "glove.txt")))


def distinct_prefixes(sequences):
    """Return the lengths of the distinct prefixes: the depth of each token of the sequences' tree."""
    return [len(each) for each in {tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)}]


def test_the_work_of_a_policy_is_that_of_each_distinct_prefix_that_is_not_cached(tmp_path):
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, tmp_path / "sft")
    settings = EncoderSettings(model=str(tmp_path / "sft"), pooling="mean", whiten=2)
    encoder = make_encoder(settings, texts=TEXTS, cache=tmp_path / "cache")
    encoder.encode([*TEXTS, *TEXTS])
    size, work = encoder.computed
    depths = distinct_prefixes([tokenizer(text)["input_ids"] for text in TEXTS])
    assert work == (len(depths), sum(depths), 0)
    assert size.hidden == policy.base.config.hidden_size
    encoder = make_encoder(settings, texts=TEXTS, cache=tmp_path / "cache")
    encoder.encode(["wolf", *TEXTS])
    length = len(tokenizer("wolf")["input_ids"])
    assert encoder.computed[1] == (length, length * (length + 1) // 2, 0)


def test_the_work_of_a_pipeline_counts_tokens_without_padding_and_pairs_that_its_attention_allows(tmp_path):
    _, tokenizer = tiny_policy()
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **size))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.chat_template = None  # which sentence-transformers would apply
    tokenizer.save_pretrained(tmp_path / "bert")
    layers = Transformer(str(tmp_path / "bert"), max_seq_length=6)
    model = SentenceTransformer(modules=[layers, Pooling(8)], device="cpu")
    pipeline = Pipeline(model)
    encoder = TextEncoder(pipeline, name="bert")
    encoder.encode(TEXTS)
    lengths = [min(6, len(tokenizer(text)["input_ids"])) for text in TEXTS]
    dimensions, work = encoder.computed
    assert work == (sum(lengths), sum(length**2 for length in lengths), 0)
    matrices = [value for name, value in bert.named_parameters() if name.startswith("encoder") and value.ndim == 2]
    assert dimensions.num_active == sum(value.numel() for value in matrices)
    assert encoder_work(tiny_policy()[0], [3, 4]) == (7, 6 + 10, 0)


def test_cached_models_are_recognized_offline_and_others_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, files in {"pipeline": ("modules.json", "config.json"), "policy": ("config.json",)}.items():
        folder = tmp_path / f"models--some--{name}"
        (folder / "snapshots" / "0").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0")
        for file in files:
            (folder / "snapshots" / "0" / file).write_text("{}")
    assert is_pipeline("some/pipeline") and not is_pipeline("some/policy")
    for name in ("some/other", "not a name/", "a/b/c"):
        with pytest.raises(InputError, match=f"'{name}' is not a folder, and the Hub cannot be asked for it: "):
            is_pipeline(name)
