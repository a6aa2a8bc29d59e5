"""Optimizers: each is its library's, and a killed run with it ends with the same weights bit for bit."""

from importlib.util import find_spec

import pytest
import torch
from forked import start_forked
from launching import LAUNCH, finish
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    gap,
    killed_and_whole,
    loop,
    policy,
    preference,
    same,
    supervised,
    weights,
)
from transformers.optimization import Adafactor

from align.config import build
from align.errors import InputError
from align.train.settings import TrainSettings

OWN = "own_training:Signs"
NAMES = ["adafactor", OWN, "adamw_8bit"]
AMSGRAD = {"optimizer_settings": {"amsgrad": True}}
WITHOUT_8BIT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=WITHOUT_8BIT if "8bit" in name else ()) for name in NAMES]
)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # matrices that bitsandbytes quantizes have 4,096 values


def trained(folder, name, *, progress=None, **changes):
    made = loop(
        folder, preference("dpo"), comparisons(24), model=policy(**WIDE), progress=progress, optimizer=name, **changes
    )
    return made.run(), weights(made.policy)


@EACH
def test_a_killed_run_ends_with_the_same_weights(tmp_path, name):
    whole, expected = trained(tmp_path / "whole", name, epochs=2)
    with pytest.raises(Killed):
        trained(tmp_path / "killed", name, epochs=2, checkpoint_steps=2, progress=Recorder(stop_after=3))
    result, found = trained(tmp_path / "killed", name, epochs=2, checkpoint_steps=2)
    assert same(expected, found)
    assert [line["loss"] for line in result.metrics] == [line["loss"] for line in whole.metrics]
    assert gap(expected, trained(tmp_path / "adamw", "adamw", epochs=2)[1]) > 1e-4


def test_a_killed_run_keeps_the_largest_second_moments_of_amsgrad(tmp_path):
    steep = {"learning_rate": 3e-2, "schedule": "constant", "betas": (0.9, 0.5)}  # second moments that fall again

    def make(folder, **more):
        return loop(folder, supervised(), demonstrations(24), epochs=2, checkpoint_steps=2, **AMSGRAD, **steep, **more)

    resumed = killed_and_whole(make, tmp_path)
    without = loop(tmp_path / "without", supervised(), demonstrations(24), epochs=2, **steep)
    without.run()
    assert gap(weights(resumed.policy), weights(without.policy)) > 1e-3


@EACH
def test_results_do_not_depend_on_micro_batches(tmp_path, name):
    _, whole = trained(tmp_path / "whole", name, learning_rate=3e-4)
    _, cut = trained(tmp_path / "cut", name, learning_rate=3e-4, tokens_per_micro_batch=90)
    signs = 3 * 2 * 3e-4  # sign descent moves a weight whose gradient is 0 but for rounding either way
    assert gap(whole, cut) < (signs if name == OWN else 1e-4)


def test_adafactor_is_that_of_transformers_with_a_learning_rate_of_its_own(tmp_path):
    rows = demonstrations(8)
    made = loop(tmp_path, supervised(), rows, optimizer="adafactor", max_grad_norm=0.0, weight_decay=0.1)
    other = policy()
    groups = [[value for value in other.parameters() if (value.ndim > 1) == matrix] for matrix in (True, False)]
    parameters = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)]
    expected = Adafactor(parameters, lr=made.training_run.settings.learning_rate_at(0, made.num_steps),
                         scale_parameter=False, relative_step=False)  # fmt: skip
    ids = [torch.from_numpy(row.sequences[0].ids.astype("int64"))[None] for row in rows]
    masks = [torch.from_numpy(row.sequences[0].loss_mask) for row in rows]
    total = sum(int(mask.sum()) for mask in masks)
    for each, mask in zip(ids, masks, strict=True):
        logps = other.hf(each).logits[0, :-1].log_softmax(-1).gather(1, each[0, 1:, None])[:, 0]
        (-logps[mask[1:]].sum() / total).backward()
    expected.step()
    made.step(0)
    assert gap(weights(other), weights(made.policy)) < 1e-5


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("align.train.sharding.optimizer_names.find_spec", lambda name: None)
    with pytest.raises(InputError, match="adamw_8bit needs bitsandbytes, which is not installed: pip install") as error:
        loop(tmp_path, supervised(), demonstrations(4), optimizer="adamw_8bit")
    assert error.value.loc == ("train", "optimizer")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: no optimizer is called 'adam'; did you mean 'adamw'"),
        ({"optimizer": "adafactor", "betas": [0.9, 0.99]}, "betas: applies to AdamW only"),
        ({"optimizer_settings": {"weight_decay": 0.1}}, "optimizer_settings: weight_decay is a key of train itself"),
    ],
)
def test_a_wrong_optimizer_is_refused_where_the_recipe_is_read(values, message):
    with pytest.raises(InputError, match=message):
        build(TrainSettings, {"learning_rate": 1e-3} | values)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adafactor", {"momentum": 0.9}, "adafactor does not take these settings: .*momentum"),
        ("adamw", {"foreach": True}, "adamw does not take these settings: .*foreach"),
        ("own_training:no_optimizer", {}, "returned a str, not a torch.optim.Optimizer"),
        ("own_training:nothing", {}, "optimizer 'own_training:nothing' cannot be imported"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_one_line(tmp_path, name, settings, message):
    with pytest.raises(InputError, match=message):
        loop(tmp_path, supervised(), demonstrations(4), optimizer=name, optimizer_settings=settings)


def test_earlier_settings_keep_their_hash():
    assert (
        not {"optimizer", "optimizer_settings", "early_stopping", "callbacks", "weights"}
        & TrainSettings(learning_rate=1e-3).cache_key().keys()
    )
    assert TrainSettings(learning_rate=1e-3, optimizer=OWN).cache_key()["optimizer"] == OWN


SHARDED = """
import sys; sys.path.insert(0, "tests/train")
from pathlib import Path
from tiny_training import *
from align.errors import InputError
try:
    loop(Path(sys.argv[1]), supervised(), demonstrations(4), optimizer="adafactor")
except InputError as error:
    print(error, flush=True)
import os; os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_parameters_are_refused_for_optimizers_that_need_whole_ones(tmp_path):
    pytest.importorskip("deepspeed")
    script = tmp_path / "script.py"
    script.write_text(SHARDED)
    output, errors = finish(start_forked(LAUNCH / "zero2-cpu-2.yaml", "--main_process_port", "0", script, tmp_path))
    assert "train.optimizer: adafactor averages squared gradients over rows" in output, errors[-2000:]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adafactor", "averages squared gradients over rows and columns of whole matrices"),
        ("adamw_8bit", "quantizes its state in blocks of whole parameters"),
        (OWN, "may need whole parameters"),
    ],
)
@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_sharding_is_refused_with_a_reason_where_the_recipe_is_checked(name, reason, kind):
    settings = TrainSettings(learning_rate=1e-3, optimizer=name)
    with pytest.raises(InputError, match=f"train.optimizer: {name} {reason}, and {kind} gives each process slices"):
        settings.check_kind(kind)
    for other in ("NO", "MULTI_CPU", "MULTI_GPU"):
        settings.check_kind(other)
    TrainSettings(learning_rate=1e-3).check_kind(kind)
