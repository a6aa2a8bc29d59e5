"""Training of an encoder by the losses and the trainer of sentence-transformers, and by the sigmoid loss.

Shape legend: B rows of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.curate.embeddings.settings import JestSettings, ObjectiveName, TrainingSettings
from align.errors import InputError, RunError
from align.losses.contrastive import INITIAL_BIAS, INITIAL_SCALE, sigmoid_losses
from align.train.selection.sampler import gumbel_noise, select

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Rows = Sequence[Mapping[str, Any]]

LOSS = "loss.pt"  # in a checkpoint: weights and counts of the loss, which the trainer does not save


class Trained(NamedTuple):
    """What training has done."""

    steps: int
    losses: list[tuple[int, float]]  # (step, mean loss since the one before)
    rows_scored: int = 0  # by selection


class SigmoidLoss(nn.Module):
    """The sigmoid contrastive loss with a learnt scale and bias; with `jest` on a jointly selected part of each batch.

    The scores of selection are the elements of the loss matrix, less those of the reference where there is one
    (learnability; Evans et al. 2024, sec. 3). Rows are scored without gradient and without dropout.
    """

    def __init__(
        self, model: SentenceTransformer, jest: JestSettings | None, reference: SentenceTransformer | None, seed: int
    ) -> None:
        super().__init__()
        if reference is not None and reference.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise InputError(
                "the reference has another tokenizer than the encoder; name an encoder with the same",
                ("train", "jest", "reference"),
            )
        self.model, self.jest, self.seed = model, jest, seed
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_SCALE).log())
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS))
        self._reference = [reference]  # in a list: it is not trained, and not saved with the loss
        self.register_buffer("rows_scored", torch.tensor(0))
        self.register_buffer("num_selections", torch.tensor(0))

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Return the sum over all pairs divided by the number of trained rows."""
        features = list(sentence_features)
        if self.jest is not None and self.training:
            if "offsets" in features[0]:  # the tokens of all texts in one row
                raise InputError("word vectors are not supported by selection; leave jest out", ("train", "jest"))
            chosen = self._chosen(features, self.jest)
            features = [{name: _rows(value, chosen) for name, value in each.items()} for each in features]
        losses_BB = self._losses(self.model, features)
        return losses_BB.sum() / len(losses_BB)

    def _losses(self, model: SentenceTransformer, features: Sequence[dict[str, Tensor]]) -> Tensor:
        anchor_BD, positive_BD = (model(dict(each))["sentence_embedding"] for each in features)
        return sigmoid_losses(anchor_BD, positive_BD, self.log_scale.exp(), self.bias)

    @torch.no_grad()
    def _chosen(self, features: Sequence[dict[str, Tensor]], jest: JestSettings) -> Tensor:
        """Return the positions of the rows to train on."""
        self.model.eval()
        scores_BB = self._losses(self.model, features).double()
        self.model.train()
        if (reference := self._reference[0]) is not None:
            scores_BB = scores_BB - self._losses(reference, features)
        values_BB = scores_BB.cpu().numpy()
        num_rows = len(values_BB)
        size = max(1, round(num_rows * (1 - jest.filter)))
        chunks = min(jest.chunks, size)
        noise_NB = gumbel_noise(self.seed, int(self.num_selections), range(num_rows), chunks)
        self.rows_scored += num_rows
        self.num_selections += 1
        chosen = select(
            np.diag(values_BB), values_BB, size=size, chunks=chunks, gain=jest.gain, noise_NB=noise_NB
        ).rows_b
        return torch.from_numpy(chosen.copy()).to(scores_BB.device)


def _rows(value: Any, chosen: Tensor) -> Any:  # noqa: ANN401 - features are tensors, and settings of the tokenizer
    return value[chosen] if isinstance(value, Tensor) and value.dim() > 0 else value


class _SaveLoss(TrainerCallback):
    """Adds the loss to each checkpoint of the trainer, which holds the model only."""

    def __init__(self, loss: nn.Module) -> None:
        self._loss = loss

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401 - of the trainer
        """Write what the loss has besides the model."""
        own = {name: value for name, value in self._loss.state_dict().items() if not name.startswith("model.")}
        torch.save(own, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / LOSS)


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint: the loss is written last, so a kill may have left one without it."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{LOSS}")]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _make_loss(
    model: SentenceTransformer,
    settings: TrainingSettings,
    rows: Rows,
    *,
    reference: SentenceTransformer | None,
    seed: int,
) -> nn.Module:
    from sentence_transformers.sentence_transformer import losses  # noqa: PLC0415 - an extra, and slow to import

    width = int(model.get_embedding_dimension() or 0)
    make: dict[ObjectiveName, Callable[[], nn.Module]] = {
        "classification": lambda: losses.SoftmaxLoss(model, width, len({row["label"] for row in rows})),
        "cosine": lambda: losses.CosineSimilarityLoss(model),
        "triplet": lambda: losses.TripletLoss(model, triplet_margin=settings.margin),
        "simcse": lambda: losses.MultipleNegativesRankingLoss(model, scale=1 / settings.temperature),
        "sigmoid": lambda: SigmoidLoss(model, settings.jest, reference, seed),
    }
    return make[settings.objective]()


def train_encoder(
    model: SentenceTransformer,
    rows: Rows,
    settings: TrainingSettings,
    *,
    folder: Path,
    reference: SentenceTransformer | None = None,
    seed: int = 0,
) -> Trained:
    """Train the model in place. `rows` have the columns of the objective; `folder` holds its checkpoints.

    A run that was interrupted resumes from the last epoch that `folder` holds. Raises `InputError` for fewer rows than
    a batch, and `RunError` for a loss or a weight that is not finite.
    """
    from datasets import Dataset  # noqa: PLC0415 - seconds to import
    from sentence_transformers import (  # noqa: PLC0415 - an extra, and slow to import
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    if len(rows) < settings.batch_size:
        raise InputError(f"{len(rows)} rows are fewer than batch_size: {settings.batch_size}", ("train", "batch_size"))
    model.model_card_data.generate_widget_examples = False  # no model card is written
    loss = _make_loss(model, settings, rows, reference=reference, seed=seed)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        seed=seed,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # it replaces a loss that is not finite by the mean
        report_to="none",
        disable_tqdm=True,
    )
    # The trainer multiplies the batch by the number of GPUs that it uses
    arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage] - no argument sets it
    dataset = Dataset.from_list([dict(row) for row in rows])
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[_SaveLoss(loss)]
    )
    if (checkpoint := _last_checkpoint(folder)) is not None:
        loss.load_state_dict(torch.load(checkpoint / LOSS, weights_only=True), strict=False)  # without the model
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    losses = [(int(log["step"]), float(log["loss"])) for log in trainer.state.log_history if "loss" in log]
    if bad := [step for step, value in losses if not np.isfinite(value)]:
        raise RunError(f"step {bad[0]}: the loss is not finite; lower learning_rate ({settings.learning_rate})")
    for name, weights in loss.named_parameters():
        if not weights.isfinite().all():
            raise RunError(f"{name}: weights are not finite; lower learning_rate ({settings.learning_rate})")
    model.eval()
    return Trained(trainer.state.global_step, losses, int(getattr(loss, "rows_scored", 0)))
