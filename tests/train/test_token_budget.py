"""The default token budget of a micro-batch."""

import pytest
import torch
import transformers
from small_runs import written
from tiny_training import Recorder, comparisons, gap, loop, preference, supervised, weights

from align.distributed.processes import Processes
from align.models.loading.config import dimensions
from align.train.passes import token_budget
from align.train.passes.token_budget import default_token_budget
from align.train.settings import TrainSettings
from align.workflow.estimate import estimate
from align.workflow.recipe.load import load_recipe

GIB = 2**30
BF16 = TrainSettings(learning_rate=1, precision="bf16")
# Llama 3.2 1B. Stored for a token and layer under autocast: 2 norms of 2048 values twice in fp32, 2048 inputs of 5
# products, 3 queries, keys and values, and 4 values of the MLP in bf16: 132 KB, of 16 layers 2.1 MB. Beside that 2.0 GB
# of cast weights. So 8,192 tokens take 19 GB and 16,384 take 37 GB.
ONE_BILLION = transformers.LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("memory", "checkpointing", "expected"),
    [(None, False, 2048), (24, False, 2048), (48, False, 4096), (80, False, 8192), (180, False, 16_384)]
    + [(24, True, 16_384), (None, True, 2048)],
)
def test_activations_take_a_quarter_of_the_memory(memory, checkpointing, expected):
    memory = None if memory is None else memory * GIB
    found = default_token_budget(BF16, dimensions(ONE_BILLION), checkpointing=checkpointing, memory=memory)
    assert found == expected


@pytest.mark.parametrize("model", ["unknown", dimensions(transformers.Qwen3_5TextConfig())])
def test_a_model_of_unknown_activations_has_the_smallest_budget(model):
    assert default_token_budget(BF16, model, checkpointing=False, memory=80 * GIB) == 2048


def trained(folder, **changes):
    """The notes, the budget of the run, and the trained weights."""
    progress = Recorder()
    made = loop(folder, preference("dpo"), comparisons(8), progress=progress, max_steps=2, **changes)
    made.run()
    return progress.notes, made.training_run.settings.tokens_per_micro_batch, weights(made.policy)


def test_the_loop_takes_the_default_of_its_device_and_reports_it(tmp_path, monkeypatch):
    notes, budget, expected = trained(tmp_path / "cpu", tokens_per_micro_batch=None)
    assert budget == 2048 and any("micro-batches of up to 2048 tokens" in note for note in notes)
    monkeypatch.setattr(token_budget, "gpu_memory", lambda device: 80 * GIB)
    notes, budget, found = trained(tmp_path / "gpu", tokens_per_micro_batch=None)
    assert budget == 16_384 and any("micro-batches of up to 16384 tokens" in note for note in notes)
    assert gap(found, expected) < 1e-6
    assert trained(tmp_path / "set", tokens_per_micro_batch=100)[1] == 100


def test_all_ranks_have_the_default_of_the_smallest_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(token_budget, "gpu_memory", lambda device: 80 * GIB)
    small = 10**6  # a quarter of it has room for 32 tokens
    monkeypatch.setattr(Processes, "all_gather_object", lambda self, value: [value, small])
    made = loop(tmp_path, supervised(), comparisons(8), tokens_per_micro_batch=None)
    assert made.training_run.settings.tokens_per_micro_batch == 2048


def budget_line(folder, *overrides):
    found = {each.name: each for each in estimate(load_recipe(written(folder), overrides))}
    return found["sft"].parts.get("micro-batches")


def test_check_says_which_device_it_assumes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = f"steps.sft.launch={tmp_path / 'gpu.yaml'}"
    (tmp_path / "gpu.yaml").write_text("num_processes: 1\nuse_cpu: false\n")
    assert budget_line(tmp_path) == "of up to 2,048 tokens, the default on a CPU"
    text = "of up to 16,384 tokens, the default on a GPU of 80 GiB (assumed: this machine has no GPU)"
    assert budget_line(tmp_path, asked) == text
    assert budget_line(tmp_path, asked, "steps.sft.train.tokens_per_micro_batch=64") is None
