"""Selection on real rows of which half have another row's answer: learnability beside uniform training at equal FLOPs.

Usage, from the root of the repository, with the folders of self-instruct (seed_tasks.jsonl and
user_oriented_instructions.jsonl) and of GSM8K (train.jsonl.gz):

    python -m tests.benchmarks.selection_rows --policy gguf:FILE.gguf --self-instruct FOLDER --gsm8k FOLDER [options]

    --pool N              rows that training chooses from (400)
    --curated N           rows of the reference (160), in --reference-epochs N passes (1)
    --test N              test rows (120)
    --max-length N        longer rows are dropped (512 tokens)
    --precision P         fp32 or bf16 (fp32)
    --seed N              of the sets of rows and their order (0)

Half of every set of rows comes from each source. The reference trains on curated rows with their own answers; the pool
has as many rows with their own answers as with another's. The test rows are in no other set. Prints the negative
log-likelihood of the test answers in nats per token with 95 % bootstrap intervals over rows, the paired change from
uniform training to learnability, the share of shuffled rows among those chosen, and the FLOPs of each training. The
FLOPs of uniform training and learnability are equal; those that trained the reference are not part of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from statistics import mean

import numpy as np

import align
from align.artifacts import METRICS, read_json
from tests.benchmarks.seeds import paired, parts_of

TASKS = ("seed_tasks.jsonl", "user_oriented_instructions.jsonl")
TRAINED = ("reference", "uniform", "learnability")
RECIPE = """
run: selection-rows-{seed}
runs: {folder}
seed: {seed}
policy: {{path: "{policy}"}}
data:
  curated: {{path: {folder}/curated.jsonl, max_length: {max_length}}}
  own: {{path: {folder}/own.jsonl, max_length: {max_length}}}
  shuffled: {{path: {folder}/shuffled.jsonl, max_length: {max_length}}}
  test: {{path: {folder}/test.jsonl, max_length: {max_length}}}
steps:
  base: {{stage: import}}
  reference:
    stage: sft
    policy: base
    data: curated
    train:
      <<: &train {{learning_rate: 1.0e-5, prompts_per_step: 8, tokens_per_micro_batch: 4096, precision: {precision}}}
      epochs: {reference_epochs}
  uniform:
    stage: sft
    policy: base
    data: &pool {{own: 1, shuffled: 1}}
    train: *train
    selection: {{score: uniform, filter: 0.5, equal: flops, reference: "step:reference", compare: null}}
  learnability:
    stage: sft
    policy: base
    data: *pool
    train: *train
    selection: {{score: learnability, filter: 0.5, reference: "step:reference", compare: null}}
  evaluate:
    stage: evaluate
    policies: [base, reference, uniform, learnability]
    tasks: {{nll: {{task: nll, data: test, precision: {precision}}}}}
"""


def read_pairs(self_instruct: Path, gsm8k: Path) -> list[list[tuple[str, str]]]:
    """Return (prompt, answer) of the rows of each source."""
    tasks = [json.loads(line) for name in TASKS for line in (self_instruct / name).read_text().splitlines()]
    first = [(task["instruction"], task["instances"][0]) for task in tasks]
    instructions = [("\n\n".join(filter(None, (asked, row["input"]))), row["output"]) for asked, row in first]
    with gzip.open(gsm8k / "train.jsonl.gz", "rt") as lines:
        problems = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    return [instructions, problems]


def write_sets(sources: list[list[tuple[str, str]]], sizes: dict[str, int], folder: Path, rng: np.random.Generator):
    """Write disjoint sets of rows; each row of `shuffled` gets the answer of the next one, in an order of chance."""
    orders = [rng.permutation(len(source)).tolist() for source in sources]
    for name, size in sizes.items():
        rows = [source[order.pop()] for source, order in zip(sources, orders, strict=True) for _ in range(size // 2)]
        rows = [rows[place] for place in rng.permutation(len(rows))]
        answers = [answer for _, answer in rows]
        if name == "shuffled":
            answers = [*answers[1:], answers[0]]
        messages = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for (prompt, _), answer in zip(rows, answers, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))


def main() -> None:
    """Write the rows, run the recipe and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--self-instruct", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--pool", type=int, default=400)
    parser.add_argument("--curated", type=int, default=160)
    parser.add_argument("--test", type=int, default=120)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--reference-epochs", type=float, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    half = options.pool // 2
    sizes = {"test": options.test, "curated": options.curated, "own": half, "shuffled": half}
    sources = read_pairs(options.self_instruct, options.gsm8k)
    write_sets(sources, sizes, folder, np.random.default_rng(options.seed))
    recipe = folder / f"selection-rows-{options.seed}.yaml"
    recipe.write_text(RECIPE.format(**vars(options) | {"folder": folder}))
    align.run(str(recipe))
    run = folder / f"selection-rows-{options.seed}"
    steps = [json.loads(line) for line in (run / "learnability" / METRICS).read_text().splitlines()]
    flops = {step: read_json(run / step / "manifest.json")["ledger"]["flops"] for step in TRAINED}
    parts = parts_of(run)
    change, low, high = paired([parts["learnability", "nll"]], [parts["uniform", "nll"]])
    found = {
        "nll": read_json(run / "table.json"),
        "learnability_minus_uniform": {"value": change, "low": low, "high": high},
        "shuffled_share_of_chosen": mean(step["selection/share/shuffled"] for step in steps),
        "flops": flops,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
