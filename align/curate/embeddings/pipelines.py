"""Models of sentence-transformers: loaded, and made from files of word vectors. Needs the extra `curate`.

Shape legend: N texts, D width.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from align.accounting.flops import Work, sum_work
from align.errors import InputError, one_line
from align.models.loading.pretrained import default_device

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WORD_VECTORS = (".txt", ".vec", ".gz")  # names of files with a word and its vector on each line
MODULES = "modules.json"  # of a folder that sentence-transformers wrote
CONFIG = "config.json"  # of any model
UNKNOWN = "[UNK]"  # its vector is 0


class Pipeline:
    """Embeds texts with a model of sentence-transformers."""

    def __init__(self, model: SentenceTransformer, *, max_tokens: int | None = None) -> None:
        self.model = model
        self.work = Work(0, 0, 0)  # of all texts so far; none for static vectors
        if max_tokens is not None and isinstance(limit := model.max_seq_length, int):
            model.max_seq_length = min(limit, max_tokens)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return fp32 [N, D] on the CPU."""
        first: Any = self.model[0]
        counting = first.register_forward_pre_hook(self._count) if hasattr(first, "model") else nullcontext()
        with counting:
            found: Any = self.model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return found.float().cpu()

    def _count(self, module: Any, inputs: tuple[Any, ...]) -> None:  # noqa: ANN401 - of any kind of model
        lengths = inputs[0]["attention_mask"].sum(dim=1).tolist()
        self.work = sum_work([self.work, encoder_work(module.model, lengths)])


def encoder_work(model: nn.Module, lengths: Sequence[int]) -> Work:
    """Return the work of a forward pass over texts of these numbers of tokens, without an LM head.

    Every token attends to all tokens of its text, or, in a causal model, to those up to itself.
    """
    is_causal = any(getattr(module, "is_causal", False) for module in model.modules())
    pairs = sum(length * (length + 1) // 2 if is_causal else length**2 for length in lengths)
    return Work(sum(lengths), pairs, 0)


def sentence_transformers() -> Any:  # noqa: ANN401 - a module
    """Return the package; raise `InputError` where it is not installed."""
    try:
        import sentence_transformers  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InputError("sentence-transformers is not installed: pip install 'align[curate]'") from error
    return sentence_transformers


def is_pipeline(path: str) -> bool:
    """Return whether a folder or Hub ID holds a model of sentence-transformers.

    The Hub is asked only for what is not in its cache. Raise `InputError` if it cannot be asked.
    """
    if Path(path).expanduser().is_dir() or path.startswith(("gguf:", ".", "/", "~")):
        return (Path(path).expanduser() / MODULES).is_file()
    from huggingface_hub import file_exists, try_to_load_from_cache  # noqa: PLC0415 - slow to import
    from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: PLC0415

    try:
        return isinstance(try_to_load_from_cache(path, MODULES), str) or file_exists(path, MODULES)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        if isinstance(error, OfflineModeIsEnabled) and isinstance(try_to_load_from_cache(path, CONFIG), str):
            return False  # a cached language model
        raise InputError(f"{path!r} is not a folder, and the Hub cannot be asked for it: {one_line(error)}") from error


def load_pipeline(path: str, *, max_tokens: int | None = None) -> Pipeline:
    """Load a model of sentence-transformers from a folder or Hub ID."""
    try:
        model = sentence_transformers().SentenceTransformer(path, device=default_device(), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path!r} cannot be loaded by sentence-transformers: {one_line(error)}") from error
    return Pipeline(model, max_tokens=max_tokens)


def word_vectors(path: Path) -> Pipeline:
    """Return the mean of the vectors of a text's words, read from a text file in the format of GloVe or word2vec.

    Each line is a word and its numbers, separated by spaces. Texts are put in lower case and split at white space and
    punctuation. Raises `InputError` for a line of another length than the first.
    """
    package = sentence_transformers()
    words = [UNKNOWN]
    rows = list[np.ndarray]()
    for number, line in enumerate(_lines(path), start=1):
        word, *values = line.rstrip().split(" ")
        if number == 1 and len(values) == 1:  # the head of a word2vec file: numbers of words and dimensions
            continue
        try:
            rows.append(np.array(values, np.float32))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {one_line(error)}") from error
        words.append(word)
        if len(values) != len(rows[0]):
            raise InputError(f"{path}: line {number} has {len(values)} numbers, and the first word has {len(rows[0])}")
    if not rows:
        raise InputError(f"{path}: no word vectors")
    weights = torch.from_numpy(np.stack([np.zeros_like(rows[0]), *rows]))
    vocabulary: dict[str, int] = {}
    for place, word in enumerate(words):
        vocabulary.setdefault(word, place)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # noqa: PLC0415 - an extra

    return Pipeline(package.SentenceTransformer(modules=[StaticEmbedding(tokenizer, weights)], device="cpu"))


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, which may be compressed by gzip."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield from lines
