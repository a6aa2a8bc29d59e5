"""Tiny random reward models, and groups whose responses are rated; also for child processes of tests."""

import random
from dataclasses import replace

import torch
from tiny_training import SIZES, comparisons
from transformers import LlamaConfig, LlamaForSequenceClassification

from align.models.reward_model import RewardModel
from align.models.settings import Rating

NAMES = ("clear", "true", "long")
WEIGHTS = (0.5, 1.0, -0.25)


def classifier(seed=0, names=NAMES):
    values = {
        **SIZES,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
        "num_labels": len(names),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(LlamaConfig(**values))


def model(seed=0, names=NAMES, weights=WEIGHTS):
    return RewardModel(classifier(seed, names), Rating(names, weights)).train()


def rated(number, *, sizes=(1, 2, 3), missing=0.3, seed=0):
    """Groups whose responses have labels of which some are missing; the first response of all has every one."""
    draw = random.Random(seed)
    made = []
    for one in comparisons(number, sizes=sizes, seed=seed):
        labels = [
            {name: round(draw.uniform(0, 4), 1) for name in NAMES if not made or draw.random() > missing}
            for _ in one.sequences
        ]
        made.append(replace(one, attributes=tuple(labels)))
    return made
