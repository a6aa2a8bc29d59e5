"""Tiny policies of several architectures and tokenizers, saved as plain folders."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from align.compress.gguf_export import export_gguf
from align.compress.settings import GgufSettings
from align.data.chat_templates import apply_template
from align.models.loading.pretrained import load_base
from align.models.policy import Policy, save_policy
from align.models.settings import PolicySettings
from align.testing import tiny_policy

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
}
GEMMA = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 32, "hidden_size": 64}
# Name -> configuration; those of Gemma have what readers take for granted
ARCHITECTURES = {
    "llama": {"model_type": "llama", "rope_theta": 5000.0},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},
    "gemma2": {"model_type": "gemma2", **GEMMA},
    "gemma3": {"model_type": "gemma3_text", "num_hidden_layers": 6, **GEMMA},
}
TEXTS = ["What color is the wolf?", "Gladly, the cat is red.  Two  spaces", "naïve, 12 or 345 {x}\n\n\tyes", "Hi"]


def saved(folder, config, tokenizer=None, *, seed=0):
    """Save a random policy with a configuration, whose norms and biases are random too, and return its folder."""
    tokenizer = tokenizer or tiny_policy()[1]
    ids = {"vocab_size": len(tokenizer) + 3, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 2}
    policy = Policy(load_base(PolicySettings(from_config={**SMALL, **ids, **config}, seed=seed)))
    for name, value in policy.hf.named_parameters():
        if value.dim() == 1:
            value.data += 0.1 * value.new_tensor([(len(name) * i % 7) - 3.0 for i in range(len(value))])
    save_policy(policy, tokenizer, folder)
    return folder


def exported(source, kind="Q8_0", **settings):
    """Export a folder beside it and return the file with the report."""
    folder = source.with_name(f"{source.name}-{kind}")
    folder.mkdir()
    file = folder / f"{source.name}-{kind}.gguf"
    return file, export_gguf(source, file, GgufSettings(gguf=kind, **settings))


def sentencepiece_tokenizer():
    """Return a tokenizer of Llama 2's kind: BPE on text with marked spaces, with bytes for unknown characters."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # as transformers' own
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=360, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens, "<|end|>"], show_progress=False
    )
    backend.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    apply_template(tokenizer, "chatml")
    return tokenizer
