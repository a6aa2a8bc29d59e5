"""Continuous batching: logits equal the model's own and are bit-identical in any batch."""

import importlib.util
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from align.inference.continuous_batching import (
    CPU_ROWS,
    MAX_BF16_ROWS,
    WIDTH,
    ContinuousBatch,
    enable_continuous_batching,
    forward_sizes,
    padded_length,
    prefill,
)
from align.inference.transformers_engine import cast_weights

MODELS = Path(__file__).parents[1] / "models" / "tiny_models.py"
spec = importlib.util.spec_from_file_location("tiny_models_for_slots", MODELS)
tiny_models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_models)

# Three query heads to a key head, one, and all. Threads have buffers of their own, which PyTorch aligns in their own
# way; two of them wait for each other at each of a thousand products, so one layout and one layer stand for all there.
HEADS_AND_THREADS = [((9, 3), 2), ((9, 3), 1), ((4, 4), 1), ((5, 1), 1)]
SLIDING = {
    "every layer": ("mistral", {"sliding_window": 5}),
    "some layers": ("gemma3_text", {"sliding_window": 5, "query_pre_attn_scalar": 8}),
    "switched off": ("qwen2", {"sliding_window": 5, "use_sliding_window": False}),
}


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def wide_model(heads, precision, *, num_layers):
    """A model with layers of realistic width: smaller matrix products use other kernels."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=64 * heads[0],
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return cast_weights(model, precision)


def sequences(lengths, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def logits_of(model, rows, num_steps, size):
    """The last `num_steps` logits of each sequence, decoded in a batch of `size` rows."""
    waiting = [row for row in rows]
    batch = ContinuousBatch(model, size, forward_sizes(model, size))
    found = {number: [] for number, _ in waiting}
    while waiting or batch.rows:
        while waiting and len(batch.rows) < size:
            number, ids = waiting.pop(0)
            batch.add([(number, ids)], prefill(model, [ids[:-num_steps]])[0][0], len(ids) - num_steps)
        going = list(batch.sort())
        logits = batch.step([ids[len(ids) - num_steps + len(found[number])] for number, ids in going])
        for (number, _), row in zip(going, logits, strict=True):
            found[number].append(row.clone())
        # rows do not all go at once
        batch.remove([(number, ids) for number, ids in going if len(found[number]) == num_steps - number % 3])
    return found


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads, num_threads", HEADS_AND_THREADS)
def test_logits_of_a_row_are_bit_identical_in_any_batch(heads, num_threads, precision):
    alone = num_threads == 1
    model = wide_model(heads, precision, num_layers=2 if alone else 1)
    assert enable_continuous_batching(model) == ""
    wider = [WIDTH + 3, 9, 2 * WIDTH + 1, WIDTH + 1, 30, 3 * WIDTH - 2]  # three come to see more keys on the way
    has_large_forwards = alone and precision == torch.float32
    num_more = (CPU_ROWS[3] if has_large_forwards else CPU_ROWS[0]) - 3  # more than the smallest forward takes
    rows = list(enumerate(sequences([*wider, *(6 + number % 20 for number in range(num_more))], 512)))
    num_compared = 0
    with threads(num_threads):
        together = logits_of(model, rows, 4, len(rows))
        for order, size in ((rows[:6], 1), (rows[::-2], 5), (rows[1::2] + rows[::2], 9))[: 3 if alone else 2]:
            other = logits_of(model, order, 4, size)
            for number, _ in order:
                assert torch.equal(torch.stack(other[number]), torch.stack(together[number])), (number, size)
                num_compared += len(other[number])
    print(f"compared {num_compared} rows of logits")


def test_logits_over_a_large_vocabulary_do_not_depend_on_the_batch_size():
    """The kernel was seen to change for the LM head of SmolLM2."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    assert enable_continuous_batching(model) == ""
    rows = list(enumerate(sequences(range(6, 6 + MAX_BF16_ROWS + 8), 512)))
    with threads(1):
        together, few = logits_of(model, rows, 4, len(rows)), logits_of(model, rows, 4, 4)
    assert all(torch.equal(torch.stack(few[number]), torch.stack(together[number])) for number, _ in rows)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_prompts_computed_together_are_bit_identical_to_each_alone_and_equal_the_models_own(name):
    kind, settings = tiny_models.TREE.get(name) or SLIDING["some layers"]
    model = tiny_models.tiny_model(kind, settings)
    assert enable_continuous_batching(model) == ""
    prompts = sequences([9, 16, 3, 12, 1, 14, 8, 2], tiny_models.VOCABULARY)
    for together in (prompts[:4], prompts):  # 64 rows, and 128
        for ids, (cache, logits), (alone,) in zip(
            together, prefill(model, together), [prefill(model, [ids]) for ids in together], strict=True
        ):
            assert torch.equal(logits, alone[1])
            for layer, other in zip(cache.layers, alone[0].layers, strict=True):
                assert layer.keys.shape[2] == len(ids)
                assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
            with torch.no_grad():
                own = model(input_ids=torch.tensor([ids])).logits[:, -1]
            assert (logits - own).abs().max() < 1e-4


def test_a_prompt_is_padded_only_where_the_model_has_the_positions():
    model = tiny_models.tiny_model("llama")
    model.config.max_position_embeddings = 50
    assert [padded_length(model, length) for length in (1, 16, 17, 48, 49)] == [16, 16, 32, 48, 49]
    model.config.max_position_embeddings = 500
    assert [padded_length(model, length) for length in (49, 64, 65, 200)] == [64, 64, 65, 200]


def test_a_forward_pass_has_only_as_many_rows_as_leave_the_logits_alone():
    class Changing(type(tiny_models.tiny_model("llama"))):
        """Changes the last bits of large batches, as a matrix product does whose kernel depends on its rows."""

        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            if len(input_ids) > self.most_rows:
                output.logits *= 1 + 1e-6
            return output

    model = tiny_models.tiny_model("llama")
    enable_continuous_batching(model)
    model.__class__ = Changing
    for most_rows in (16, 40, 64, 200):
        model.most_rows = most_rows
        assert forward_sizes(model, 1000) == [rows for rows in CPU_ROWS if rows <= most_rows]
    assert forward_sizes(model, 1) == forward_sizes(model, 16) == [16]
    assert forward_sizes(model, 17) == forward_sizes(model, 32) == [16, 32]  # no larger than the batch
    assert forward_sizes(model, 100) == [16, 32, 48, 64, 112]  # and the batch as a whole
    assert forward_sizes(cast_weights(model, torch.bfloat16), 1000) == [16, MAX_BF16_ROWS]


def agreement(model, lengths=(9, 14, 20)):
    """Largest difference of batched logits from the model's own without a cache."""
    rows = list(enumerate(sequences(lengths, tiny_models.VOCABULARY)))
    found = logits_of(model, rows, 4, 2)
    with torch.no_grad():
        gaps = [
            (torch.stack(found[number]) - model(input_ids=torch.tensor([ids])).logits[0, -4:][: len(found[number])])
            for number, ids in rows
        ]
    return max(gap.abs().max().item() for gap in gaps)


@pytest.mark.parametrize("name", sorted(tiny_models.TREE))
def test_batched_logits_equal_the_models_own(name):
    model = tiny_models.tiny_model(*tiny_models.TREE[name])
    assert enable_continuous_batching(model) == ""
    assert agreement(model) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tiny_models.MORE_TREE))
def test_batched_logits_of_further_models_equal_their_own(name, monkeypatch):
    monkeypatch.setattr(
        "align.inference.continuous_batching.EXPERT_COUNTS", ()
    )  # which refuse in fp32, and would be right but for the last bits
    model = tiny_models.tiny_model(*tiny_models.MORE_TREE[name])
    refusal = enable_continuous_batching(model)
    print(refusal or "supported")
    assert refusal or agreement(model) < 1e-4


@pytest.mark.parametrize("name", sorted(SLIDING))
def test_sliding_windows_are_respected(name):
    kind, settings = SLIDING[name]
    model = tiny_models.tiny_model(kind, settings)
    assert enable_continuous_batching(model) == ""
    assert agreement(model) < 1e-4


@pytest.mark.parametrize("name", ["bloom", "mamba", "falcon", *tiny_models.RECURRENT])
def test_models_without_keys_by_position_are_rejected_with_the_reason(name):
    kind, settings, *_ = (tiny_models.PLAIN | tiny_models.RECURRENT)[name]
    model = tiny_models.tiny_model(kind, settings)
    assert enable_continuous_batching(model).startswith(type(model).__name__)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_rejected_in_fp32_because_rows_would_depend_on_each_other(name):
    model = tiny_models.tiny_model(*tiny_models.MORE_TREE[name])
    assert "experts" in enable_continuous_batching(model)
    assert enable_continuous_batching(cast_weights(model, torch.bfloat16)) == ""


def test_a_model_with_wrong_batched_logits_is_detected():
    class Elsewhere(type(tiny_models.tiny_model("llama"))):
        """Puts every token at another place than it is told, as a model would that counts for itself."""

        def forward(self, *args, position_ids=None, **kwargs):
            if position_ids is not None:
                position_ids = position_ids + 40
            return super().forward(*args, position_ids=position_ids, **kwargs)

    model = tiny_models.tiny_model("llama")
    model.__class__ = Elsewhere
    assert "in a batch" in enable_continuous_batching(model)


def test_cast_weights_equal_those_that_transformers_loads(tmp_path):
    for name in ("llama", "gpt2", "deepseek_v3"):
        kind, settings = {**tiny_models.TREE, **tiny_models.MORE_TREE}[name]
        model = tiny_models.tiny_model(kind, settings)
        model.save_pretrained(tmp_path / name)
        rounded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).eval()
        ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            assert torch.equal(cast_weights(rounded, torch.bfloat16)(ids).logits, loaded(ids).logits), name
