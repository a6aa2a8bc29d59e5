"""Training with fp32 products whose inputs are rounded to bf16."""

from contextlib import nullcontext

import pytest
import torch
from tiny_training import comparisons, demonstrations, distillation, gap, loop, policy, preference, results, supervised

from align.errors import InputError
from align.train.sharding import products
from align.train.sharding.products import bf16_products, check_products
from align.train.training_run import Teacher

WIDE = {"hidden_size": 128, "intermediate_size": 256}


def has_effect():
    try:
        check_products(torch.device("cpu"))
    except InputError:
        return False
    return True


needs_cpu = pytest.mark.skipif(not has_effect(), reason="this CPU has no bf16 products")


def run(folder, precision, objective, train, **changes):
    return results(loop(folder, objective, train, model=policy(**WIDE), precision=precision, **changes))


@needs_cpu
@pytest.mark.parametrize("changes", [{}, {"tokens_per_micro_batch": 60}])
def test_rounded_products_stay_near_fp32_and_nearer_than_bf16(tmp_path, changes):
    task = (preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02), comparisons(16, sizes=(3, 4)))
    found = {name: run(tmp_path / name, name, *task, **changes) for name in ("fp32", "bf16-products", "bf16")}
    losses = {name: torch.tensor([line["loss"] for line in lines]) for name, (lines, _) in found.items()}
    gaps = {name: (values - losses["fp32"]).abs().max() for name, values in losses.items()}
    assert 0 < gaps["bf16-products"] < gaps["bf16"] + 1e-3 and gaps["bf16-products"] < 1e-2
    assert 0 < gap(found["bf16-products"][1], found["fp32"][1]) < 2e-2
    assert all(value.dtype == torch.float32 for value in found["bf16-products"][1].values())


@needs_cpu
def test_forward_and_backward_run_with_rounded_products_and_nothing_after_them(tmp_path, monkeypatch):
    seen, product = set(), torch.backends.mkldnn.matmul
    before = product.fp32_precision
    train = demonstrations(8)
    made = loop(tmp_path / "one", supervised(), train, model=policy(**WIDE), precision="bf16-products", max_steps=1)
    head = made.policy.base.get_output_embeddings()
    head.weight.register_hook(lambda gradient: seen.add(("backward", product.fp32_precision)))
    head.register_forward_hook(lambda *_: seen.add(("forward", product.fp32_precision)))
    monkeypatch.setattr(made.sharding.prepared, "zero_grad", lambda: seen.add(("update", product.fp32_precision)))
    made.run()
    assert seen == {("forward", "bf16"), ("backward", "bf16"), ("update", before)}
    seen.clear()
    made.outputs()
    assert seen == {("forward", before)}
    assert product.fp32_precision == before


@needs_cpu
def test_the_pass_of_a_teacher_has_rounded_products(tmp_path):
    seen, teacher = set(), policy(5, **WIDE)
    head = teacher.base.get_output_embeddings()
    head.register_forward_hook(lambda *_: seen.add(torch.backends.mkldnn.matmul.fp32_precision))
    job = {"teacher": Teacher(lambda: teacher, 4)}
    loop(tmp_path, distillation(), demonstrations(4), model=policy(**WIDE), precision="bf16-products", job=job)
    assert "bf16" in seen


@needs_cpu
def test_a_product_has_the_error_of_inputs_rounded_to_bf16():
    left, right = (torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with bf16_products():
        found = left @ right.T
    rounded = left.bfloat16().double() @ right.bfloat16().double().T
    torch.testing.assert_close(found.double(), rounded, rtol=1e-5, atol=1e-5)


def test_it_is_refused_where_it_has_no_effect(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^train.precision: bf16-products has no effect on the device cuda; use fp32"):
        check_products(torch.device("cuda"))
    monkeypatch.setattr(products, "bf16_products", nullcontext)
    with pytest.raises(InputError, match="bf16-products has no effect on this CPU with this build of PyTorch"):
        loop(tmp_path, supervised(), demonstrations(8), precision="bf16-products")
