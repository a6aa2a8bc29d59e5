"""Averages of models: exact where they must be, against formulas by another way, and the stage's settings."""

import math

import numpy as np
import pytest
import torch
from exported import ARCHITECTURES, saved
from safetensors.torch import load_file, save_file

from align.compress.averaging import interpolate, mean, slerp, write_average
from align.compress.weights import StoredWeights
from align.errors import InputError
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.stages.compression.average import Average


def draws(number, shape=(5, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).double() for _ in range(number)]


def test_the_mean_of_equal_tensors_is_the_tensor_and_others_are_summed_in_order():
    (value,) = draws(1)
    value = value.float().double()
    assert all(torch.equal(mean(iter([value] * number)).float(), value.float()) for number in (1, 2, 3, 5, 7))
    first, second, third = draws(3)
    assert torch.equal(mean(iter([first, second, third])), ((first + second) + third) / 3)


@pytest.mark.parametrize("seed", range(3))
def test_slerp_is_exact_at_its_ends_and_keeps_the_angle_between_them(seed):
    first, second, base = draws(3, seed=seed)
    assert torch.equal(slerp(first, second, base, 0.0), first)
    assert torch.equal(slerp(first, second, base, 1.0), second)
    d1, d2 = (each - base for each in (first, second))
    angle = math.acos(float((d1 * d2).sum() / (d1.norm() * d2.norm())))
    # Rotated in the plane of the two differences, of equal lengths
    d2 = d2 * d1.norm() / d2.norm()
    normal = d2 - d1 * (d1 * d2).sum() / d1.norm() ** 2
    normal = normal * d1.norm() / normal.norm()
    for weight in (0.25, 0.5, 0.9):
        expected = base + d1 * math.cos(weight * angle) + normal * math.sin(weight * angle)
        torch.testing.assert_close(slerp(base + d1, base + d2, base, weight), expected)


def test_slerp_of_parallel_differences_is_a_straight_line():
    base, step = draws(2)
    for second in (base + step, base + 3 * step, base):
        expected = (base + step) * 0.7 + second * 0.3
        torch.testing.assert_close(slerp(base + step, second, base, 0.3), expected)


def test_interpolation_is_exact_at_its_ends():
    first, second = draws(2)
    assert torch.equal(interpolate(first, second, 0.0), first) and torch.equal(interpolate(first, second, 1.0), second)


def test_a_saved_average_has_the_mean_of_every_weight_and_loads(tmp_path):
    folders = [saved(tmp_path / f"p{seed}", ARCHITECTURES["llama, tied"], seed=seed) for seed in range(3)]
    sources = [StoredWeights(folder) for folder in folders]
    (tmp_path / "out").mkdir()
    count = write_average(sources, tmp_path / "out", mean)
    parts = [load_file(folder / "model.safetensors") for folder in folders]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == parts[0].keys() and "lm_head.weight" not in found
    for name, value in found.items():
        expected = np.mean([part[name].numpy().astype(np.float64) for part in parts], axis=0).astype(np.float32)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-8)
    policy, tokenizer = load_policy(PolicySettings(path=str(tmp_path / "out")))
    assert count == sum(value.numel() for value in policy.parameters())
    assert tokenizer.chat_template == load_policy(PolicySettings(path=str(folders[0])))[1].chat_template


def test_the_average_of_one_model_is_the_file_itself_also_in_shards_and_in_bf16(tmp_path):
    folder, out = saved(tmp_path / "one", ARCHITECTURES["qwen2"]), tmp_path / "out"
    policy, _ = load_policy(PolicySettings(path=str(folder)))
    (folder / "model.safetensors").unlink()
    policy.hf.bfloat16().save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    out.mkdir()
    write_average([StoredWeights(folder)] * 2, out, mean)
    for shard in shards:
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    assert (out / "model.safetensors.index.json").read_bytes() == (folder / "model.safetensors.index.json").read_bytes()


def test_models_that_do_not_fit_are_refused(tmp_path):
    for name, tensors in {
        "a": {"x": torch.zeros(2), "y": torch.zeros(3)},
        "b": {"x": torch.zeros(2)},
        "c": {"x": torch.zeros(2), "y": torch.zeros(4)},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    a, b, c = (StoredWeights(tmp_path / name) for name in "abc")
    with pytest.raises(InputError, match="a and b differ: only one of them has y"):
        write_average([a, b], tmp_path, mean)
    with pytest.raises(InputError, match=r"a and c differ: y has shape \(3,\) and \(4,\)"):
        write_average([a, c], tmp_path, mean)


TASK = {"data": "held", "task": "nll"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of": ["a", "a"]}, "of: names a step twice"),
        ({"of": ["a", "b"], "how": "slerp"}, "base: is needed by how: slerp"),
        ({"of": ["a", "b"], "base": "c"}, "base: is only for how: slerp"),
        ({"of": ["a", "b", "c"], "how": "slerp", "base": "d"}, "of: slerp takes two policies, not 3"),
        ({"of": ["a"], "toward_weight": 0.1}, "toward_weight: has no effect here"),
        ({"of": ["a", "b"], "how": "greedy"}, "task: is needed by how: greedy"),
        ({"of": ["a", "b"], "task": TASK}, "task: is only for how: greedy"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Average.model_validate(settings).validate_settings()
