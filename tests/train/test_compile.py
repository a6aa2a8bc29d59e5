"""Compiled norms, gated products and rotary embeddings: the same numbers, one compilation, and what stays eager."""

import shutil
from itertools import product

import pytest
import torch
from tiny_training import (
    SIZES,
    VOCABULARY,
    Killed,
    Recorder,
    comparisons,
    gap,
    loop,
    policy,
    preference,
    results,
    same,
    supervised,
    weights,
)
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from align.errors import InputError
from align.models.pieces import CompiledPieces
from align.models.policy import Policy
from align.models.tree.batch import tree_batch
from align.train.settings import TrainSettings

GATED = {**SIZES, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
GPT2 = {
    "attn_pdrop": 0,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# Family -> norms, gated products and rotary embeddings of its two layers, and the modules that stay eager
FAMILIES = {
    "llama": ((5, 2, 2), {}),
    "mistral": ((5, 2, 2), {}),
    "qwen2": ((5, 2, 2), {}),
    "qwen3": ((5 + 2 * 2, 2, 2), {}),  # with norms of queries and keys
    "gemma": ((5, 2, 2), {}),
    "gemma3_text": ((9 + 2 * 2, 2, 2), {}),
    "olmo2": ((5 + 2 * 2, 2, 2), {}),
    "phi3": ((5, 0, 2), {"Phi3MLP": 2}),
    "mixtral": ((5, 0, 2), {"MixtralExperts": 2}),
    "gpt2": ((0, 0, 0), {"LayerNorm": 5, "GPT2Attention": 2, "GPT2MLP": 2}),
}


pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of its own calls while it compiles
has_compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="torch.compile needs a C++ compiler")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def model_of(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(GPT2 if family == "gpt2" else GATED))
        made = Policy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")).train()
    made.use_forward("tree")
    return made


def num_replaced(model):
    """Modules of the decoder whose forward is replaced."""
    return sum("forward" in vars(module) for module in model.base.get_decoder().modules())


def run(model, number):
    """Log-probabilities of some groups, and the gradient of their sum for every parameter."""
    groups = comparisons(number, sizes=(3,), seed=number)
    found = model(tree_batch([each for group in groups for each in group.sequences]))
    gradients = torch.autograd.grad(found.sum(), list(model.parameters()), allow_unused=True)
    return [found.detach(), *[each for each in gradients if each is not None]]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_values_and_gradients_are_those_of_eager_modules_and_batches_of_other_sizes_are_not_compiled_again(family):
    model, sizes = model_of(family), (1, 2, 3, 5)
    expected = {number: run(model, number) for number in sizes}
    pieces = CompiledPieces(model)
    counters.clear()
    compiled = []
    for number in sizes:
        for value, eager in zip(run(model, number), expected[number], strict=True):
            assert (value - eager).norm() <= 1e-5 * eager.norm()
        compiled.append(counters["stats"]["unique_graphs"])
    # The norm, the norm of queries and keys, the gated product and the rotary embedding
    assert compiled == [4 if family == "qwen3" else 3] * len(sizes)
    pieces.remove()
    assert all(torch.equal(*pair) for pair in zip(run(model, 2), expected[2], strict=True))


@pytest.mark.slow
@needs_compiler
def test_a_compiled_training_is_near_the_eager_one_and_has_the_same_bits_after_a_resume(tmp_path):
    def made(name, **changes):
        rows, held_out = comparisons(24), comparisons(6, seed=1)
        settings = {"max_steps": 4, "checkpoint_steps": 2, "evaluate_every": 1, "tokens_per_micro_batch": 90}
        return loop(tmp_path / name, preference("dpo"), rows, job={"held_out": held_out}, **(settings | changes))

    eager = results(made("eager"))
    notes = Recorder()
    whole = results(made("whole", compile="pieces", progress=notes))
    assert any("; compiled: 5 RMS norms, 2 gated products, 2 rotary embeddings" in note for note in notes.notes)
    assert 0 < gap(whole[1], eager[1]) < 1e-5
    with pytest.raises(Killed):
        made("killed", compile="pieces", progress=Recorder(stop_after=3)).run()
    resumed = results(made("killed", compile="pieces"))
    assert same(resumed[1], whole[1])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_of_a_family_have_its_own_code_and_the_others_are_counted(family):
    model = model_of(family)
    expected = run(model, 2)
    pieces = CompiledPieces(model)
    found = tuple(pieces.compiled[kind] for kind in ("norm", "mlp", "attention"))
    assert (found, dict(pieces.eager)) == FAMILIES[family]
    assert num_replaced(model) == sum(found)
    assert all(torch.equal(*pair) for pair in zip(run(model, 2), expected, strict=True))
    pieces.remove()
    assert num_replaced(model) == 0


@pytest.mark.usefixtures("uncompiled")
def test_what_stays_eager_is_in_the_note():
    assert CompiledPieces(model_of("phi3")).describe() == (
        "compiled: 5 RMS norms, 0 gated products, 2 rotary embeddings; eager: 2 Phi3MLP"
    )


@pytest.mark.usefixtures("uncompiled")
def test_modules_are_eager_again_when_the_trained_model_is_compared_with_the_saved_one(tmp_path):
    made = loop(tmp_path, supervised(), comparisons(8), compile="pieces", max_steps=1)
    assert num_replaced(made.policy) == 9
    before = weights(made.policy)
    made.run()
    assert not same(weights(made.policy), before)
    made.outputs()
    assert num_replaced(made.policy) == 0


def test_it_is_refused_without_a_compiler(tmp_path, monkeypatch):
    def fails(*_, **options):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(InputError, match=r"^train\.compile: pieces needs a C\+\+ compiler .*: No working C\+\+ comp"):
        loop(tmp_path, supervised(), comparisons(4), model=policy(), compile="pieces")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_it_is_refused_where_processes_hold_slices(kind):
    settings = TrainSettings(learning_rate=1, compile="pieces")
    with pytest.raises(InputError, match=rf"^train\.compile: pieces is not supported under {kind}; launch with DDP"):
        settings.check_kind(kind)
    settings.check_kind("MULTI_GPU")


def test_references_and_weights_of_a_compiled_training_are_others():
    eager, compiled = (TrainSettings(learning_rate=1, compile=name) for name in ("none", "pieces"))
    assert "compile" not in eager.cache_key() and compiled.cache_key() == {**eager.cache_key(), "compile": "pieces"}
    assert (eager.forward_precision, compiled.forward_precision) == ("fp32", "fp32, compiled pieces")


def test_a_piece_may_be_compiled_for_more_variants_than_pytorchs_own_limit(monkeypatch):
    """One row or several, one head or several, lengths, and gradients: each is another graph, at most."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda made, **options: compiler(made, **options, backend="eager"))
    model = model_of("gemma3_text")
    pieces = CompiledPieces(model)
    norm = model.base.get_decoder().layers[0].self_attn.q_norm
    counters.clear()
    for rows, heads, length in product((1, 2, 3), (1, 2, 4), (1, 2, 7)):
        for needs_grad in (True, False):
            hidden = torch.randn(rows, heads, length, 8, requires_grad=needs_grad)
            expected = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight)
            assert torch.allclose(norm(hidden), expected, atol=1e-5)
            with torch.no_grad():
                assert torch.allclose(norm(hidden), expected, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 8
    pieces.remove()
