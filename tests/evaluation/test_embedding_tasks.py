import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from align.errors import InputError
from align.evaluation.tasks.embeddings import alignment, spearman, uniformity


def pairs(num_rows, width=4, seed=0):
    """Return unit vectors of related pairs, and scores from 0 to 5 with ties."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(num_rows, width))
    second = first + rng.normal(size=(num_rows, width)) * rng.uniform(0, 2, size=(num_rows, 1))
    first, second = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (first, second))
    scores = np.round(5 * np.clip((first * second).sum(axis=1) + rng.normal(scale=0.3, size=num_rows), 0, 1))
    return first.astype(np.float32), second.astype(np.float32), scores


def test_sts_is_scipys_spearman_correlation_and_the_mean_of_its_parts():
    first, second, scores = pairs(200)
    found = spearman(first, second, scores)
    assert found.score.value == pytest.approx(spearmanr((first * second).sum(axis=1), scores).statistic, abs=1e-12)
    assert np.mean(list(found.parts.values())) == pytest.approx(found.score.value, abs=1e-12)
    assert found.score.low < found.score.value < found.score.high


def test_the_parts_of_sts_vary_as_the_correlation_does_over_samples():
    of_samples = [spearman(*pairs(400, seed=seed)) for seed in range(24)]
    spread = np.std([each.score.value for each in of_samples])
    by_parts = np.mean([np.std(list(each.parts.values())) / 400**0.5 for each in of_samples])
    widths = np.mean([each.score.high - each.score.low for each in of_samples]) / 2 / 1.96
    assert by_parts == pytest.approx(spread, rel=0.4) and widths == pytest.approx(spread, rel=0.4)


def test_alignment_is_the_mean_squared_distance_of_pairs_scored_above_four():
    first, second, scores = pairs(50)
    scores[0] = 5
    distances = [math.dist(a, b) ** 2 for a, b, s in zip(first.tolist(), second.tolist(), scores, strict=True) if s > 4]
    found = alignment(first, second, scores)
    assert found.score.value == pytest.approx(np.mean(distances), rel=1e-5)
    assert found.score.n == len(found.parts) == len(distances)
    with pytest.raises(InputError, match="none is positive"):
        alignment(first, second, scores * 0)


def test_uniformity_is_the_log_mean_of_gaussians_over_distinct_sentences():
    first, second, scores = pairs(30)
    second[:5] = first[:5]
    points = np.unique(np.concatenate([first, second]), axis=0).tolist()
    kernels = [math.exp(-2 * math.dist(a, b) ** 2) for i, a in enumerate(points) for b in points[:i]]
    found = uniformity(first, second, scores).score
    assert (found.value, found.n) == (pytest.approx(math.log(sum(kernels) / len(kernels)), abs=1e-5), 55)
    assert found.low < found.value < found.high
    uniform = np.random.default_rng(0).normal(size=(2, 500, 3))
    uniform /= np.linalg.norm(uniform, axis=2, keepdims=True)
    # On the sphere in three dimensions t = x·y is uniform in [-1, 1], so E exp(4t − 4) = (1 − exp(−8)) / 8
    assert uniformity(*uniform, scores).score.value == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.02)
