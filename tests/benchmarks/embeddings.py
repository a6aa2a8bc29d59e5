"""Spearman correlation, alignment and uniformity on STS-B of encoders, raw and whitened, and of a newly trained one.

Usage, from the root of the repository:

    python -m tests.benchmarks.embeddings --sts FILE [--model PATH [--pooling NAME ...]] [--simcse]

    --sts FILE      sentence1, sentence2, score from 0 to 5, without a header (stsb-en-dev.csv of stsb-multi-mt)
    --model PATH    as `encoder.model` in a recipe: a folder of sentence-transformers, gguf:FILE, word vectors
    --pooling NAME  poolings of a language model
    --simcse        a BERT of two layers with random weights, before and after unsupervised SimCSE on the sentences

The whitening is fitted on the sentences, which have no labels. Seconds are those of a core.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast

from align.curate.embeddings.encoder import Encoder, make_encoder
from align.curate.embeddings.folder import save_folder, set_dropout
from align.curate.embeddings.settings import EncoderSettings, TrainingSettings
from align.curate.embeddings.training import train_encoder
from align.evaluation.tasks.embeddings import alignment, spearman, uniformity

SIZES = (None, 128)  # dimensions that whitening keeps
VOCABULARY = 4000


def measure(name: str, encoder: Encoder, pairs: tuple[list[str], list[str], np.ndarray]) -> None:
    """Print the scores of an encoder."""
    first, second, scores = pairs
    start = time.process_time()
    vectors = encoder.encode(first + second)
    seconds = time.process_time() - start
    found = [
        task(vectors[: len(first)], vectors[len(first) :], scores).score for task in (spearman, alignment, uniformity)
    ]
    correlation, *others = (f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in found)
    print(f"| {name} | {correlation} | {' | '.join(others)} | {seconds:.0f} |", flush=True)


def new_encoder(folder: Path, texts: list[str]) -> SentenceTransformer:
    """Return a BERT of two layers with random weights; its tokenizer is trained on the texts."""
    words = BertWordPieceTokenizer()
    words.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer, model_max_length=64)
    size = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    decoder = Transformer(str(folder), max_seq_length=64)
    return SentenceTransformer(modules=[decoder, Pooling(128, pooling_mode="mean")], device="cpu")


def simcse(pairs: tuple[list[str], list[str], np.ndarray]) -> None:
    """Measure a new encoder before and after unsupervised SimCSE."""
    torch.manual_seed(0)
    texts = list(dict.fromkeys(pairs[0] + pairs[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = new_encoder(folder / "bert", texts)
        for label in ("new BERT, 2 layers", "… after SimCSE"):
            save_folder(model, folder / "saved")
            measure(label, make_encoder(EncoderSettings(model=str(folder / "saved"))), pairs)
            set_dropout(model, 0.1)
            settings = TrainingSettings(objective="simcse", epochs=5, batch_size=64, learning_rate=5e-4)
            if label.startswith("new"):
                train_encoder(model, [{"anchor": text, "positive": text} for text in texts], settings, folder=folder)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sts", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--pooling", nargs="+", default=[None])
    parser.add_argument("--simcse", action="store_true")
    chosen = parser.parse_args()
    with chosen.sts.open(encoding="utf-8", newline="") as file:
        first, second, scores = zip(*csv.reader(file), strict=True)
    pairs = list(first), list(second), np.array(scores, np.float64)
    print("| encoder | Spearman | alignment | uniformity | seconds |\n|---|---|---|---|---|", flush=True)
    for pooling in chosen.pooling if chosen.model else ():
        with tempfile.TemporaryDirectory() as cache:
            encoder = make_encoder(EncoderSettings(model=chosen.model, pooling=pooling), cache=Path(cache))
            measure(encoder.name, encoder, pairs)
            for size in SIZES:
                whitened = encoder.whitened(pairs[0] + pairs[1], size)
                measure(whitened.name, whitened, pairs)
    if chosen.simcse:
        simcse(pairs)


if __name__ == "__main__":
    main()
