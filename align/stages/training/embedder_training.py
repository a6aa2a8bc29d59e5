"""Work of the stage `embedder`: train an encoder, fit its whitening, write the folder."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from align.accounting.flops import Work
from align.curate.embeddings.folder import add_whitening, editable_model, save_folder, set_dropout
from align.curate.embeddings.pipelines import Pipeline, encoder_work, load_pipeline
from align.curate.embeddings.settings import TEXT_COLUMNS, EncoderSettings, TrainingSettings
from align.curate.embeddings.training import Rows, train_encoder
from align.curate.embeddings.whitening import fit_whitening
from align.models.loading.config import dimensions
from align.models.loading.pretrained import default_device, silence_transformers
from align.stages.costs.measured import Done
from align.stages.inputs.context import RunContext

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHECKPOINTS = "checkpoints"  # folder of the trainer, removed at the end


def make_embedder(
    encoder: EncoderSettings, train: TrainingSettings | None, rows: Rows, context: RunContext
) -> dict[str, Any]:
    """Train and whiten an encoder and write it into the step's folder; return what the manifest says of it."""
    silence_transformers()
    model = editable_model(encoder, context.inputs.policy)
    texts = list(dict.fromkeys(row[name] for row in rows for name in TEXT_COLUMNS if name in row))
    found: dict[str, Any] = {"rows": {"rows": len(rows), "texts": len(texts)}}
    if train is not None:
        if train.objective == "simcse" and all(row["anchor"] == row["positive"] for row in rows):  # two views of a text
            set_dropout(model, train.dropout)
        context.progress.note(f"training on {len(rows):,} rows")
        outcome = train_encoder(
            model,
            rows,
            train,
            folder=context.folder / CHECKPOINTS,
            reference=_reference(train, context),
            seed=context.inputs.seed + train.seed,
        )
        found["training"] = outcome._asdict()
    found["done"] = _done(model, rows, encoder, train)
    if encoder.whiten is not None:
        vectors_ND = Pipeline(model)(texts).numpy()
        whitening = fit_whitening(vectors_ND, encoder.whiten)
        add_whitening(model, whitening)
        found["whitening"] = {"texts": len(texts), "dimensions": whitening.weights_DK.shape[1]}
    save_folder(model, context.folder)
    shutil.rmtree(context.folder / CHECKPOINTS, ignore_errors=True)
    return found


def _reference(train: TrainingSettings | None, context: RunContext) -> SentenceTransformer | None:
    """Return the encoder that selection compares with."""
    jest = train.jest if train is not None else None
    if jest is None or jest.reference is None:
        return None
    return load_pipeline(context.inputs.path_of(jest.reference)).model.eval()


def _done(model: SentenceTransformer, rows: Rows, encoder: EncoderSettings, train: TrainingSettings | None) -> Done:
    """Return the work of training, of selection and of whitening; none for static vectors."""
    first: Any = model[0]
    if not hasattr(first, "model"):
        return Done()
    texts = [text for row in rows for name, text in row.items() if name in TEXT_COLUMNS]
    encoded = model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    once = encoder_work(first.model, lengths)

    def times(share: float) -> Work:
        return Work(*(round(share * part) for part in once))

    epochs = train.epochs if train is not None else 0
    jest = train.jest if train is not None else None
    scored = 0 if jest is None else epochs * (1 if jest.reference is None else 2)
    trained = times(epochs * (1 if jest is None else 1 - jest.filter))
    return Done(
        dimensions=dimensions(first.model.config),
        weights=sum(weight.numel() for weight in model.parameters()),
        tokens_trained=trained.tokens,
        trained=trained,
        observed=times(scored + (encoder.whiten is not None)),
        device=default_device(),
    )
