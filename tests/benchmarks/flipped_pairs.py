"""How well losses find pairs with flipped labels: AUROC of selection scores with DPO.

Usage, from the root of the repository, with the folder of UltraFeedback's pairs (train_clean.jsonl.gz and
label_flip_20_index.jsonl, which names the flipped pairs):

    python -m tests.benchmarks.flipped_pairs --policy gguf:FILE.gguf --pairs FOLDER [--max-length 384] [--limit N]

The pairs are split into two halves. A reference trains by DPO on one half with its own labels and scores the other half
with the noisy labels, and the other way around. Before its first step the policy's loss is log 2 for every pair, so
that learnability, the policy's loss minus the reference's, ranks pairs as the reference's negative loss does. Prints
the AUROC of the reference's loss for flipped pairs with its 95 % bootstrap interval over pairs, that of the base's
log-probabilities alone, and the share of flipped pairs in the half of the pairs that such a selection would choose.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

import align
from align.evaluation.statistics import bootstrap_interval

BETA = 0.1
RECIPE = """
run: flipped-pairs-{seed}
runs: {folder}
seed: {seed}
policy: {{path: "{policy}"}}
data:
  clean-1: {{path: {folder}/clean-1.jsonl, max_length: {max_length}}}
  clean-2: {{path: {folder}/clean-2.jsonl, max_length: {max_length}}}
  noisy-1: {{path: {folder}/noisy-1.jsonl, max_length: {max_length}}}
  noisy-2: {{path: {folder}/noisy-2.jsonl, max_length: {max_length}}}
steps:
  base: {{stage: import}}
  reference-1:
    &dpo
    stage: preference
    policy: base
    data: clean-2
    loss: {{name: dpo, settings: {{beta: {beta}}}}}
    train: {{learning_rate: {learning_rate}, epochs: {epochs}, prompts_per_step: 8, precision: bf16}}
  reference-2: {{<<: *dpo, data: clean-1}}
  score-1:
    stage: evaluate
    policies: [base, reference-1]
    tasks: {{half-1: &task {{task: preference, data: noisy-1, precision: bf16}}}}
  score-2:
    stage: evaluate
    policies: [base, reference-2]
    tasks: {{half-2: {{<<: *task, data: noisy-2}}}}
"""


def write_pairs(pairs: Path, folder: Path, *, limit: int | None, seed: int) -> list[list[bool]]:
    """Write both halves with their own and with the noisy labels; return which pairs of each half are flipped."""
    with gzip.open(pairs / "train_clean.jsonl.gz", "rt") as lines:
        rows = [row for row in map(json.loads, lines) if row["chosen"] and row["rejected"]]
    noise = [json.loads(line) for line in (pairs / "label_flip_20_index.jsonl").read_text().splitlines()]
    flipped = {each["source_index"] for each in noise if each["noise"]["selected"]}
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()[:limit]
    halves = [order[::2], order[1::2]]
    for number, half in enumerate(halves, 1):
        clean = [{name: rows[place][name] for name in ("prompt", "chosen", "rejected")} for place in half]
        noisy = [
            {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            if rows[place]["source_index"] in flipped
            else row
            for place, row in zip(half, clean, strict=True)
        ]
        for name, made in (("clean", clean), ("noisy", noisy)):
            (folder / f"{name}-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return [[rows[place]["source_index"] in flipped for place in half] for half in halves]


def margins(run: Path, policy: str, half: int) -> dict[int, float]:
    """Row -> log-probability of the chosen response minus that of the rejected one, in nats."""
    lines = (run / f"score-{half}-{policy}" / f"half-{half}.jsonl").read_text().splitlines()
    found = {row["row"]: row["measures"] for row in map(json.loads, lines)}
    return {row: parts["chosen_logp"][0] - parts["rejected_logp"][0] for row, parts in found.items()}


def found_flips(losses: list[float], is_flipped: np.ndarray) -> dict[str, float]:
    """AUROC of losses for flipped pairs with its interval, and the share of these in the half with the lower losses."""
    both = np.column_stack([is_flipped, losses])
    low, high = bootstrap_interval(lambda rows: roc_auc_score(both[rows, 0], both[rows, 1]), len(both))
    chosen = np.argsort(losses, kind="stable")[: len(losses) // 2]
    value = float(roc_auc_score(is_flipped, losses))
    return {"auroc": value, "low": low, "high": high, "flipped_share_of_chosen": float(is_flipped[chosen].mean())}


def main() -> None:
    """Write the pairs, run the recipe and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    flipped = write_pairs(options.pairs, folder, limit=options.limit, seed=options.seed)
    recipe = folder / f"flipped-pairs-{options.seed}.yaml"
    recipe.write_text(RECIPE.format(**vars(options) | {"folder": folder, "beta": BETA}))
    align.run(str(recipe))
    run = folder / f"flipped-pairs-{options.seed}"
    is_flipped, base, dpo = list[bool](), list[float](), list[float]()
    for half in (1, 2):
        start, reference = (margins(run, policy, half) for policy in ("base", f"reference-{half}"))
        is_flipped += [flipped[half - 1][row] for row in start]
        base += [-margin for margin in start.values()]
        dpo += [float(np.logaddexp(0, -BETA * (reference[row] - start[row]))) for row in start]
    found = {"reference's loss": dpo, "base's negative margin": base}
    scores = {name: found_flips(values, np.array(is_flipped)) for name, values in found.items()}
    print(json.dumps({"pairs": len(is_flipped), "flipped": sum(is_flipped), **scores}))


if __name__ == "__main__":
    main()
