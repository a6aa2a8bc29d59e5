import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sklearn.covariance import ledoit_wolf

from align.curate.embeddings.encoder import TextEncoder, make_encoder
from align.curate.embeddings.folder import add_whitening, editable_model, save_folder
from align.curate.embeddings.policy_states import PolicyStates
from align.curate.embeddings.poolings import POOLINGS
from align.curate.embeddings.settings import EncoderSettings
from align.curate.embeddings.whitening import fit_whitening, shrinkage
from align.errors import InputError
from align.models.policy import save_policy
from align.models.settings import PolicySettings
from align.testing import tiny_policy

TEXTS = ["The cat is red.", "The cat is blue, and so is the dog.", "No", "The cat", "Gladly, the wolf", "Yes, it is"]


def correlated(num_rows, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_rows, width)) @ rng.normal(size=(width, width)) + 3).astype(np.float32)


def test_whitened_vectors_have_zero_mean_and_the_identity_as_covariance():
    vectors = correlated(200_000)
    found = fit_whitening(vectors).apply(vectors).astype(np.float64)
    assert np.abs(found.mean(axis=0)).max() < 1e-3
    np.testing.assert_allclose(found.T @ found / len(found), np.eye(6), atol=2e-3)


def test_the_kept_columns_are_the_main_axes_by_singular_value_decomposition():
    vectors = correlated(100_000)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, _, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * len(vectors) ** 0.5
    found = fit_whitening(vectors, 2).apply(vectors)
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected * signs, atol=5e-3)


@pytest.mark.parametrize("num_rows", [4, 40, 4000])
def test_the_shrinkage_is_that_of_scikit_learn(num_rows):
    vectors = correlated(num_rows).astype(np.float64)
    _, expected = ledoit_wolf(vectors)
    centred = vectors - vectors.mean(axis=0)
    found = shrinkage(centred, centred.T @ centred / num_rows)
    assert found == pytest.approx(expected, rel=1e-9) and 0 < found < 1


def test_dead_dimensions_are_dropped_and_give_no_infinite_value():
    vectors = np.concatenate([correlated(20_000), np.full((20_000, 3), 1e-20, np.float32)], axis=1)
    whitening = fit_whitening(vectors)
    assert whitening.weights_DK.shape == (9, 6)
    found = whitening.apply(vectors)
    assert np.isfinite(found).all() and np.abs(found).max() < 20
    with pytest.raises(InputError, match="3 equal vectors cannot be whitened"):
        fit_whitening(np.ones((3, 2), np.float32))


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted_mean", "first_last"])
def test_a_whitened_policy_is_saved_as_a_folder_that_sentence_transformers_loads(pooling, tmp_path):
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, tmp_path / "sft")
    settings = EncoderSettings(model=str(tmp_path / "sft"), pooling=pooling, whiten=4)
    raw = PolicyStates(policy, tokenizer, POOLINGS[pooling])(TEXTS).numpy()
    model = editable_model(settings, PolicySettings())
    add_whitening(model, fit_whitening(raw, 4))
    save_folder(model, tmp_path / "encoder")
    loaded = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    expected = fit_whitening(raw, 4).apply(raw)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.encode(TEXTS), expected, atol=1e-4)
    np.testing.assert_allclose(make_encoder(settings, texts=TEXTS).encode(TEXTS), expected, atol=1e-4)
    ours = make_encoder(EncoderSettings(model=str(tmp_path / "encoder")))
    np.testing.assert_allclose(ours.encode(TEXTS), expected, atol=1e-4)
    assert "Dense" in (tmp_path / "encoder" / "modules.json").read_text()
    with pytest.raises(InputError, match="has a pooling of its own"):
        make_encoder(EncoderSettings(model=str(tmp_path / "encoder"), pooling="mean"))


def test_a_whitening_is_fitted_on_distinct_texts():
    def lengths(texts):
        return torch.tensor([[len(text), len(text) ** 2] for text in texts], dtype=torch.float32)

    encoder = TextEncoder(lengths, name="lengths")
    texts = ["a", "bb", "cccc"]
    np.testing.assert_array_equal(
        encoder.whitened(texts, 1).encode(["bb"]), encoder.whitened([*texts, "a", "a"], 1).encode(["bb"])
    )
    assert encoder.whitened(texts).name == "lengths, whitened to 2"
