"""Pearson's chi-square test of sampled outcomes, and reference distributions."""

import math
from collections import Counter


def shares_by_definition(logits, temperature, top_p):
    """Probability of each token in the nucleus, in double precision, by a plain loop."""
    scaled = [float(logit) / temperature for logit in logits]
    most = max(scaled)
    weights = [math.exp(each - most) for each in scaled]
    total = sum(weights)
    kept, mass = [], 0.0
    for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    return {token: weights[token] / total / mass for token in kept}


def are_drawn_from(outcomes, shares):
    """Whether all outcomes are possible and Pearson's statistic, with rare outcomes pooled, is within 4 deviations."""
    counts = Counter(outcomes)
    common = {outcome: share * len(outcomes) for outcome, share in shares.items() if share * len(outcomes) >= 5}
    pairs = [(counts[outcome], wanted) for outcome, wanted in common.items()]
    rare = len(outcomes) - sum(common.values())
    if rare >= 5:
        pairs.append((len(outcomes) - sum(counts[outcome] for outcome in common), rare))
    assert len(pairs) > 4, "too few kinds of outcomes to say anything"
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    freedom = len(pairs) - 1
    return counts.keys() <= shares.keys() and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
