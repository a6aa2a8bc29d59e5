"""Averages of models: mean, spherical interpolation, and interpolation toward an earlier model, tensor by tensor.

Each result is computed in fp64 in the given order and rounded once to the dtype of the model that gives the
configuration, so the mean of equal models, and both ends of an interpolation, are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from align.compress.weights import StoredWeights, copy_other_files, tensor_names, write_like
from align.errors import InputError

PARALLEL = 1e-6  # sine of the angle below which a spherical interpolation is a straight one

Rule = Callable[[Iterator[Tensor]], Tensor]  # of a tensor's values in each model, fp64, to the result


def mean(values: Iterator[Tensor]) -> Tensor:
    """Return the mean of the tensors, summed in the given order."""
    total = next(values).clone()
    count = 1
    for value in values:
        total += value
        count += 1
    return total / count


def slerp(first: Tensor, second: Tensor, base: Tensor, weight: float) -> Tensor:
    """Return `base` plus the spherical interpolation of the differences from it; `weight` is that of the second.

    sin((1 - w) a) / sin(a) d1 + sin(w a) / sin(a) d2 for an angle of a between d1 and d2 (Ramé et al. 2024, WARP,
    eq. 4). Parallel differences are interpolated linearly.
    """
    of_first, of_second = first - base, second - base
    norms = torch.linalg.vector_norm(of_first) * torch.linalg.vector_norm(of_second)
    cosine = (of_first * of_second).sum() / norms if norms > 0 else torch.ones((), dtype=torch.float64)
    angle = torch.arccos(cosine.clamp(-1, 1))
    if torch.sin(angle) < PARALLEL:
        return interpolate(first, second, weight)
    shares = torch.sin((1 - weight) * angle) / torch.sin(angle), torch.sin(weight * angle) / torch.sin(angle)
    # In terms of the models themselves, so that a share of 1 gives one of them exactly
    return shares[0] * first + shares[1] * second + (1 - shares[0] - shares[1]) * base


def interpolate(value: Tensor, toward: Tensor, weight: float) -> Tensor:
    """Return (1 - weight) value + weight toward; exact at 0 and 1."""
    return (1 - weight) * value + weight * toward


def write_average(
    sources: Sequence[StoredWeights], target: Path, rule: Rule, *, like: StoredWeights | None = None
) -> int:
    """Write the average of models to `target` with the dtypes, configuration and tokenizer of `like`.

    `like` is the first model by default. `rule` receives a tensor's values in the order of `sources`. One tensor of
    each is in memory at a time. Returns the number of weights, tied ones once. Raises `InputError` for models whose
    tensors differ in name or shape.
    """
    like = like or sources[0]
    _check_alike([like, *sources])
    for file in like.files:
        names = tensor_names(file)
        averages = ((name, rule(source.read(name).double() for source in sources)) for name in names)
        write_like(file, target / file.name, averages)
    copy_other_files(like.folder, target)
    return like.num_weights


def _check_alike(sources: Sequence[StoredWeights]) -> None:
    """Raise `InputError` unless all models have tensors of the same names and shapes."""
    first = sources[0]
    for other in sources[1:]:
        if odd := sorted(set(first.names) ^ set(other.names)):
            raise InputError(f"{first.folder.name} and {other.folder.name} differ: only one of them has {odd[0]}")
        for name in first.names:
            if first.shape(name) != other.shape(name):
                raise InputError(
                    f"{first.folder.name} and {other.folder.name} differ: {name} has shape {first.shape(name)} and "
                    f"{other.shape(name)}"
                )
