"""Online selection on noisy rows: an additive loss (SFT) and a joint one (two towers), against uniform training.

Usage, from the root of the repository (minutes for each configuration):

    python -m tests.benchmarks.selection sft --scores uniform hard easy learnability learnability/1 --filter 0.8
    python -m tests.benchmarks.selection towers --filters 0.5 0.9

`sft`: rows of a tiny language are translated by one of 16 skills, random permutations of 32 symbols. Half of the pool
has random answers, 30 % are copies, which are trivial, and 20 % are skills. The reference is trained on curated rows.
`learnability/1` scores rows by the first layer of `--layers`.
`towers`: two towers embed two views of latent clusters with the sigmoid loss of SigLIP; half of the pairs do not match.
Rows are chosen jointly (JEST), or each by its own pair alone. Held-out rows have no noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "train"))

from tiny_training import Recorder, group, policy  # noqa: E402 - needs the path

from align.accounting.flops import decoder_from_config, forward_flops, training_flops  # noqa: E402
from align.losses.contrastive import sigmoid_losses  # noqa: E402
from align.models.policy import Policy  # noqa: E402
from align.models.tree.batch import tree_batch  # noqa: E402
from align.train.loop import Loop  # noqa: E402
from align.train.objectives.supervised import SupervisedObjective  # noqa: E402
from align.train.selection.sampler import gumbel_noise, select  # noqa: E402
from align.train.selection.selection import FixedModel, Selection  # noqa: E402
from align.train.selection.settings import SELECTION, SelectionSettings  # noqa: E402
from align.train.settings import TrainSettings  # noqa: E402
from align.train.training_run import TrainingRun, work_of  # noqa: E402


class Task(NamedTuple):
    """The language of the experiment `sft`, its rows, and the length of training."""

    symbols: int = 32
    skills: int = 16
    length: int = 12  # symbols of a row
    pool: int = 20_000  # rows: half of them garbage, 30 % trivial, 20 % skills
    curated: int = 2_000  # rows: 60 % trivial, 40 % skills
    held_out: int = 1_024  # rows, all of them skills
    steps: int = 600
    reference_steps: int = 300
    evaluate_every: int = 20
    layers: int = 2  # of the models

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens: symbols, skills, copy, separator."""
        return self.symbols + self.skills + 2

    @property
    def pool_rows(self) -> dict[str, int]:
        """Return the rows of each kind in the pool."""
        return {"garbage": self.pool * 5 // 10, "trivial": self.pool * 3 // 10, "skill": self.pool * 2 // 10}

    def rows(self, counts: dict[str, int], seed: int) -> Iterator:
        """Yield token groups of each kind in turn; the loss is on the answer."""
        permutations = [np.random.default_rng(skill).permutation(self.symbols) for skill in range(self.skills)]
        weights = 1 / np.arange(1, self.skills + 1)
        rng = np.random.default_rng(seed)
        copy, separator = self.symbols + self.skills, self.symbols + self.skills + 1
        for kind, number in counts.items():
            for _ in range(number):
                symbols = rng.integers(self.symbols, size=self.length)
                skill = int(rng.choice(self.skills, p=weights / weights.sum()))
                answer = {
                    "garbage": rng.integers(self.symbols, size=self.length),
                    "trivial": symbols,
                    "skill": permutations[skill][symbols],
                }[kind]
                first = copy if kind == "trivial" else self.symbols + skill
                yield group([first, *symbols.tolist(), separator], [answer.tolist()])


class Run(NamedTuple):
    """What a training came to."""

    curve: list[tuple[int, float]]  # steps, held-out loss in nats per token
    chosen: dict[str, float]  # share of each kind among the chosen rows; empty for uniform training
    cost: float  # FLOPs of training and scoring over those of uniform training of as many rows; all have one length

    @property
    def final(self) -> float:
        """Return the last held-out loss."""
        return self.curve[-1][1]

    def steps_to(self, loss: float) -> int | None:
        """Return the first step with a held-out loss of at most `loss`; None if it was never reached."""
        return next((step for step, value in self.curve if value <= loss), None)


def train(model: Policy, folder: Path, train_rows: list, held_out: list, selection: Selection | None, **settings):
    """Train and return the metrics of each step."""
    values = {"learning_rate": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.01, "checkpoint_minutes": None}
    run = TrainingRun(
        objective=SupervisedObjective(),
        train=train_rows,
        held_out=held_out,
        settings=TrainSettings(**(values | {"tokens_per_micro_batch": 20_000, "epochs": 1000} | settings)),
        forward="plain",
        folder=folder,
        references=folder / "references",
        selection=selection,
    )
    return Loop(model, run, Recorder()).run().metrics


def noisy_sft(scores: Sequence[str], task: Task, *, filter_share: float, seed: int) -> dict[str, Run]:
    """Return what training with each score came to; the choice takes the highest scores.

    After a slash a score may have the number of first layers that it is computed by.
    """
    pool, held_out = list(task.rows(task.pool_rows, seed)), list(task.rows({"skill": task.held_out}, seed + 1000))
    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": task.vocabulary, "initializer_range": 0.02}
    sizes["num_hidden_layers"] = task.layers
    found = dict[str, Run]()
    with TemporaryDirectory() as folder:
        counts = {"trivial": task.curated * 6 // 10, "skill": task.curated * 4 // 10}
        curated = list(task.rows(counts, seed + 2000))

        @cache
        def reference_of(layers: int | None) -> Policy:
            made, settings = policy(seed + 1, **sizes), {"prompts_per_step": 64, "max_steps": task.reference_steps}
            uniform = SelectionSettings(score="uniform", filter=0, compare=None, score_layers=layers)
            selection = None if layers is None else Selection(settings=uniform)
            train(made, Path(folder) / f"reference-{layers}", curated, [], selection, **settings)
            made.use_forward("plain")
            return made

        for name in scores:
            score, _, number = name.partition("/")
            selection, layers = None, int(number) if number else None
            if score != "uniform":
                named = "step:reference" if score != "hard" else None
                made = SelectionSettings(
                    score=score, reference=named, filter=filter_share, gain=None, chunks=1, score_layers=layers
                )
                fixed = {"reference": FixedModel(loads=[partial(reference_of, layers)])} if named else {}
                selection = Selection(settings=made, fixed=fixed, sources=task.pool_rows)
            per_pass, model = task.pool // (32 if selection is None else made.super_batch(32)), policy(seed, **sizes)
            lines = train(
                model,
                Path(folder) / name.replace("/", "-"),
                pool,
                held_out,
                selection,
                prompts_per_step=32,
                evaluate_every=task.evaluate_every,
                epochs=task.steps / per_pass,
                max_steps=task.steps,
            )
            curve = [(int(line["step"]), line["held_out/loss"]) for line in lines if "held_out/loss" in line]
            names = [each for each in lines[0] if each.startswith("selection/share/")]
            shares = {each.rpartition("/")[2]: float(np.mean([line[each] for line in lines])) for each in names}
            size = decoder_from_config(model.base.config.to_dict())
            flops = sum(
                training_flops(size, work_of(line)) + forward_flops(size, work_of(line, SELECTION)) for line in lines
            )
            uniform = training_flops(size, tree_batch(pool[0].sequences).work()) * sum(line["groups"] for line in lines)
            found[name] = Run(curve, shares, flops / uniform)
    return found


class Towers(nn.Module):
    """Two towers of 48, 128 and 24 units, with the temperature and bias of the sigmoid loss (Zhai et al. 2023)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.left, self.right = (nn.Sequential(nn.Linear(48, 128), nn.GELU(), nn.Linear(128, 24)) for _ in "lr")
        self.log_t, self.bias = nn.Parameter(torch.tensor(10.0).log()), nn.Parameter(torch.tensor(-8.0))

    def losses(self, left_B: Tensor, right_B: Tensor) -> Tensor:
        """Return the loss of each pair of rows, shape [B, B]."""
        return sigmoid_losses(self.left(left_B), self.right(right_B), self.log_t.exp(), self.bias)

    def accuracy(self, left_B: Tensor, right_B: Tensor) -> float:
        """Return the share of rows whose own partner is the nearest."""
        z_BD, w_BD = nn.functional.normalize(self.left(left_B)), nn.functional.normalize(self.right(right_B))
        return float(((z_BD @ w_BD.T).argmax(dim=1) == torch.arange(len(z_BD))).double().mean())


def pairs(number: int, seed: int, *, mismatched: float = 0.0) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return two views of each row's latent, and whether they match: 200 Zipf clusters through two tanh maps."""
    fixed = np.random.default_rng(0)
    centres, maps = fixed.normal(size=(200, 16)), [fixed.normal(size=(16, 48)) / 4 for _ in range(2)]
    rng, weights = np.random.default_rng(seed), 1 / np.arange(1, 201)
    latent = centres[rng.choice(200, size=number, p=weights / weights.sum())] + 0.35 * rng.normal(size=(number, 16))
    is_match = rng.random(number) >= mismatched
    other = np.where(is_match, np.arange(number), rng.integers(number, size=number))
    left, right = np.tanh(latent @ maps[0]), np.tanh(latent[other] @ maps[1])
    return torch.tensor(left).float(), torch.tensor(right).float(), is_match


def two_towers(choice: str, *, filter_share: float, seed: int, steps: int = 800, size: int = 128) -> dict[str, float]:
    """Return held-out accuracy and loss after training with `choice`: uniform, independent or joint learnability."""
    reference, model = _reference(seed, size), Towers(seed)
    pool, held_out = pairs(30_000, seed + 2, mismatched=0.5), pairs(1_000, seed + 3)
    num_scored = size if choice == "uniform" else round(size / (1 - filter_share))
    matched: list[float] = []

    def chosen(step: int, learner: Towers) -> np.ndarray:
        rows = np.random.default_rng([seed, step, 7]).choice(30_000, num_scored, replace=False)
        if choice != "uniform":
            left, right = pool[0][rows], pool[1][rows]
            with torch.no_grad():
                score_BB = (learner.losses(left, right) - reference.losses(left, right)).double().numpy()
            coupling, chunks, gain = (score_BB, 16, 1.0) if choice == "joint" else (None, 1, 10.0)
            noise = gumbel_noise(seed, step, rows.tolist(), chunks)
            options = {"size": size, "chunks": chunks, "gain": gain, "noise_NB": noise}
            rows = rows[select(score_BB.diagonal(), coupling, **options).rows_b]
        matched.append(float(pool[2][rows].mean()))
        return rows

    _fit(model, pool, chosen, steps)
    with torch.no_grad():
        loss = float(model.losses(*held_out[:2]).sum() / len(held_out[0]))
        accuracy = model.accuracy(*held_out[:2])
    return {"accuracy": accuracy, "loss": loss, "mismatched": 1 - float(np.mean(matched))}


@cache
def _reference(seed: int, size: int) -> Towers:
    """Return towers trained on clean pairs for 600 steps."""
    reference, clean = Towers(seed + 50), pairs(3_000, seed + 1)
    _fit(reference, clean, lambda step, _: np.random.default_rng([seed, step]).choice(3_000, size, replace=False), 600)
    return reference


def _fit(model: Towers, data, choose, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        rows = choose(step, model)
        optimizer.zero_grad()
        (model.losses(data[0][rows], data[1][rows]).sum() / len(rows)).backward()
        optimizer.step()


def main() -> None:
    """Run the experiment that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("sft", "towers"))
    parser.add_argument("--scores", nargs="+", default=["uniform", "hard", "easy", "learnability"])
    parser.add_argument("--filter", type=float, default=0.8)
    parser.add_argument("--filters", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    for seed in given.seeds:
        if given.experiment == "sft":
            runs = noisy_sft(
                given.scores, Task(steps=given.steps, layers=given.layers), filter_share=given.filter, seed=seed
            )
            for score, run in runs.items():
                reached = run.steps_to(runs["uniform"].final) if "uniform" in runs else None
                shown = {"score": score, "seed": seed, "final": run.final, "steps to uniform": reached}
                print(json.dumps(shown | {"cost": run.cost, "chosen": run.chosen, "curve": run.curve}), flush=True)
            continue
        print(json.dumps({"choice": "uniform", "seed": seed, **two_towers("uniform", filter_share=0, seed=seed)}))
        for choice in ("independent", "joint"):
            for share in given.filters:
                found = two_towers(choice, filter_share=share, seed=seed)
                print(json.dumps({"choice": choice, "filter": share, "seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main()
