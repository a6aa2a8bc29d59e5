"""Each process of an FSDP2 launch loads its shard of a model, and trains as after loading all of it."""

from pathlib import Path

import pytest
import torch
from forked import start_forked
from launching import finish, fsdp_on_a_cpu, told
from tiny_training import llama, mixture

from align.data.tokenizer import train_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SMALL = 2048  # bytes: buffers, and a number for each parameter
MODELS = {
    "experts": lambda: mixture(vocab_size=301),
    "lora": lambda: llama(vocab_size=301),
    "master": lambda: llama(vocab_size=301),  # with weights in bf16
    "tied": lambda: llama(vocab_size=301, tie_word_embeddings=True),
}


def test_each_process_loads_its_shard_and_trains_as_with_the_whole_model(tmp_path):
    for name, make in MODELS.items():  # an odd number of embeddings, of which one process holds more than the other
        model = make()
        dtype = torch.float32 if name == "master" else torch.bfloat16
        model.to(dtype).save_pretrained(tmp_path / "models" / name)
        tokenizer = train_tokenizer(["a b"], vocab_size=259, chat_template="")
        tokenizer.save_pretrained(tmp_path / "models" / name)
    script = Path(__file__).with_name("sharded_loads.py")
    launched = start_forked(
        fsdp_on_a_cpu(tmp_path), "--main_process_port", "0", script, tmp_path / "models", ACCELERATE_TORCH_DEVICE="cpu"
    )
    output, errors = finish(launched)
    assert launched.returncode == 0, errors[-3000:]
    seen = told(output)
    assert sorted(one["case"] for one in seen) == sorted([*MODELS, *MODELS])
    for one in seen:
        assert one["start"] and one["metrics"] and one["weights"] and one["changed"] and one["steps"] == 2, one
        if one["case"] in ("experts", "tied"):
            # Half of the weights, and the space of the largest that all stand in
            assert one["shards"] <= one["whole"] / 2 + one["largest"] + SMALL < one["whole"], one
