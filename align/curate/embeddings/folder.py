"""Encoders as folders of sentence-transformers, which load without this package.

Shape legend: D width, K kept dimensions.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align.curate.embeddings.pipelines import WORD_VECTORS, is_pipeline, load_pipeline, word_vectors
from align.curate.embeddings.settings import EncoderSettings
from align.curate.embeddings.whitening import Whitening
from align.errors import InputError
from align.models.loading.pretrained import default_device
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Names in sentence-transformers; it has no template after a text, so echo and prompt_eol have none
MODES = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "last": "lasttoken",
    "weighted_mean": "weightedmean",
    "first_last": "mean",
}


def editable_model(settings: EncoderSettings, policy: PolicySettings) -> SentenceTransformer:
    """Return the encoder as a model of sentence-transformers that can be trained, whitened and saved.

    A language model gets the pooling of the settings; special tokens that its tokenizer adds are pooled too.
    """
    path = settings.model or str(policy.path)
    if path.endswith(WORD_VECTORS):
        return word_vectors(Path(path)).model
    if is_pipeline(path):
        return load_pipeline(path, max_tokens=settings.max_tokens).model
    loaded, tokenizer = load_policy(policy if settings.model is None else PolicySettings(path=path))
    tokenizer.chat_template = None  # sentence-transformers would write each text as a turn
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with TemporaryDirectory() as folder:
        save_policy(loaded, tokenizer, Path(folder), dtype="fp32")
        return _from_language_model(Path(folder), settings)


def _from_language_model(folder: Path, settings: EncoderSettings) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - an extra, and slow to import
    from sentence_transformers.base.modules import Transformer  # noqa: PLC0415
    from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling  # noqa: PLC0415

    pooling = settings.pooling or "first_last"
    decoder = Transformer(
        str(folder),
        max_seq_length=settings.max_tokens,
        config_kwargs={"output_hidden_states": True} if pooling == "first_last" else {},
        model_kwargs={"dtype": torch.float32, "use_safetensors": True},
    )
    width = decoder.get_embedding_dimension()
    modules: list[nn.Module] = [decoder]
    if pooling == "first_last":
        layers: int = decoder.model.config.get_text_config().num_hidden_layers
        weights = torch.zeros(layers)
        weights[0] += 1
        weights[-1] += 1
        fixed = nn.Parameter(weights, requires_grad=False)
        modules.append(
            WeightedLayerPooling(width, num_hidden_layers=layers, layer_start=1, layer_weights=fixed)  # 0: embeddings
        )
    mode: Any = MODES[pooling]  # one of the literals of sentence-transformers
    modules.append(Pooling(width, pooling_mode=mode))
    return SentenceTransformer(modules=modules, device=default_device())


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set every dropout rate of the model's modules, not of its configuration; raise `InputError` where none has one.

    Decoders such as Llama are trained without dropout, and have a rate of 0.
    """
    is_found = False
    for module in model.modules():
        names = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        names += ["p"] if isinstance(module, nn.Dropout) else []
        for name in names:
            setattr(module, name, rate)
            is_found = True
    if not is_found:
        raise InputError("the model has no dropout, so both views of a text would be equal; give pairs of texts")


def add_whitening(model: SentenceTransformer, whitening: Whitening) -> None:
    """Append the whitening, as a module `Dense`."""
    from sentence_transformers.base.modules import Dense  # noqa: PLC0415 - an extra, and slow to import

    weights_KD = torch.from_numpy(whitening.weights_DK.T).float().contiguous()
    bias_K = torch.from_numpy(-whitening.mean_D @ whitening.weights_DK).float()
    kept, width = weights_KD.shape
    dense = Dense(width, kept, activation_function=nn.Identity(), init_weight=weights_KD, init_bias=bias_K)
    model.append(dense.to(model.device))


def save_folder(model: SentenceTransformer, folder: Path) -> None:
    """Write the model, with vectors of unit length, as a folder that sentence-transformers loads."""
    from sentence_transformers.base.modules import Normalize  # noqa: PLC0415 - an extra, and slow to import

    if not isinstance(model[-1], Normalize):
        model.append(Normalize())
    model.save_pretrained(str(folder), create_model_card=False)
