"""bf16 weights: fp32 master weights are fp32 training rounded in each forward, stochastic rounding is so on average."""

import json
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from distributed_runs import BF16_WEIGHTS
from forked import start_forked
from launching import LAUNCH, finish, fsdp_on_a_cpu, told
from safetensors.torch import load_file
from small_runs import run as run_recipe
from tiny_rewards import NAMES, WEIGHTS, rated
from tiny_rewards import model as reward_model
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    gap,
    loop,
    mixture_policy,
    policy,
    preference,
    same,
    supervised,
    weights,
    with_adapters,
)
from torch.func import functional_call

from align.config import build
from align.errors import InputError
from align.train.objectives.reward import reward_objective
from align.train.settings import TrainSettings
from align.train.sharding.bf16.weights import StochasticRounding

MODES = ("bf16_master", "bf16_stochastic")
EACH = pytest.mark.parametrize("mode", MODES)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # matrices that bitsandbytes quantizes have 4,096 values
OPTIMIZERS = ["adamw", "adafactor"] + (["adamw_8bit"] if find_spec("bitsandbytes") else [])


def trained(folder, mode, *, progress=None, model=None, rows=None, **changes):
    changes = {"precision": "bf16", "weights": mode, "epochs": 2} | changes
    made = loop(
        folder,
        preference("dpo"),
        rows or comparisons(24),
        model=model or policy(**WIDE),
        progress=progress,
        **changes,
    )
    return made.run(), weights(made.policy)


def rounded_forward(model, values):
    """A policy's forward over the nearest bf16 numbers of fp32 values, through which gradients reach these."""

    def run(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return functional_call(model, {name: value.bfloat16() for name, value in values.items()}, (batch,)).float()

    return run


def independent_steps(made, *, number, learning_rate, plain=False):
    """The weights and losses of SFT with torch's own AdamW, written anew: fp32, or without it as plain bf16."""
    model = policy()
    model.use_forward(made.forward.name)
    values = {name: value.detach().bfloat16().float() for name, value in model.named_parameters()}
    values = {name: (value.bfloat16() if plain else value).requires_grad_() for name, value in values.items()}
    groups = [
        {"params": [value for value in values.values() if (value.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, 0.01), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True)
    run, indices, losses = rounded_forward(model, values), range(len(made.groups)), []
    for _ in range(number):
        optimizer.zero_grad()
        total = 0.0
        for micro in made.batcher.micro_batches(made.batcher.plan(list(indices))):
            loss = made.training_run.objective(run, micro.batch).loss / made.groups.num_trained_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(values.values(), 1.0)
        optimizer.step()
        losses.append(total)
    return {name: value.detach() for name, value in values.items()}, losses


def sft(folder, mode, *, learning_rate, rows, epochs):
    made = loop(
        folder,
        supervised(),
        rows,
        precision="bf16",
        weights=mode,
        prompts_per_step=len(rows),
        epochs=epochs,
        learning_rate=learning_rate,
        schedule="constant",
        warmup_steps=0,
        tokens_per_micro_batch=150,
    )
    return made, made.run()


def test_master_weights_are_fp32_training_rounded_in_each_forward(tmp_path):
    made, result = sft(tmp_path, "bf16_master", learning_rate=1e-3, rows=demonstrations(12), epochs=6)
    assert len(made.batcher.plan(range(12)).ranks[0]) > 1, "gradients are accumulated in fp32"
    expected, losses = independent_steps(made, number=6, learning_rate=1e-3)
    masters = dict(made.sharding.copies)
    assert masters.keys() == expected.keys()
    assert all(value.dtype == torch.float32 for value in masters.values())
    assert gap(masters, expected) < 1e-6
    assert [line["loss"] for line in result.metrics] == pytest.approx(losses, rel=1e-5)
    for name, value in made.policy.named_parameters():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, masters[name].bfloat16())


LITTLE = 2e-6  # a step of AdamW moves a weight of 0.1 by 2e-6, and bf16 numbers near 0.1 are 5e-4 apart


@EACH
def test_small_updates_move_the_weights_and_lower_the_loss_where_plain_bf16_does_not(tmp_path, mode):
    rows, number = demonstrations(12), 60
    made, result = sft(tmp_path, mode, learning_rate=LITTLE, rows=rows, epochs=number)
    plain, plain_losses = independent_steps(made, number=number, learning_rate=LITTLE, plain=True)
    fp32, losses = independent_steps(made, number=number, learning_rate=LITTLE)
    start = {name: value.detach().bfloat16().double() for name, value in policy().named_parameters()}
    along = {name: fp32[name].double() - start[name] for name in start}

    def moved(found):
        """How far weights have moved along the movement of fp32 training, as a multiple of it."""
        dots = sum(((found[name].detach().double() - start[name]) * along[name]).sum() for name in start)
        return (dots / sum(each.square().sum() for each in along.values())).item()

    own = made.sharding.copies if mode == "bf16_master" else dict(made.policy.named_parameters())
    move, plain_move = moved(own), moved(plain)
    fall, expected_fall, plain_fall = (
        each[0] - each[-1] for each in ([line["loss"] for line in result.metrics], losses, plain_losses)
    )
    print(f"{mode}: moved {move:.3f}, loss fell by {fall:.5f}; plain bf16: {plain_move:.3f}, {plain_fall:.5f}")
    assert move == pytest.approx(1, abs=0.02)
    assert fall > 0.9 * expected_fall > 0
    assert plain_move < 0.05 and plain_fall < 0.2 * expected_fall


@EACH
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_killed_run_ends_with_the_same_weights_and_resumes_with_one_fp32_copy_at_a_time(
    tmp_path, monkeypatch, mode, optimizer
):
    whole, expected = trained(tmp_path / "whole", mode, optimizer=optimizer)
    with pytest.raises(Killed):
        trained(tmp_path / "killed", mode, optimizer=optimizer, checkpoint_steps=2, progress=Recorder(stop_after=3))
    fill, alive = StochasticRounding._fill, list[int]()

    def counted_fill(self, name):
        fill(self, name)
        alive.append(sum(copy.numel() > 0 for copy in self.copies.values()))

    monkeypatch.setattr(StochasticRounding, "_fill", counted_fill)
    result, found = trained(tmp_path / "killed", mode, optimizer=optimizer, checkpoint_steps=2)
    assert same(expected, found)
    assert [line["loss"] for line in result.metrics] == [line["loss"] for line in whole.metrics]
    assert set(alive) == ({1} if mode == "bf16_stochastic" else set())


@EACH
def test_results_do_not_depend_on_micro_batches_but_for_rounding(tmp_path, mode):
    whole, expected = trained(tmp_path / "whole", mode, learning_rate=3e-4)
    cut, found = trained(tmp_path / "cut", mode, learning_rate=3e-4, tokens_per_micro_batch=90)
    losses = zip(whole.metrics, cut.metrics, strict=True)
    assert max(abs(one["loss"] - other["loss"]) for one, other in losses) < 1e-2
    assert gap(expected, found) < 1e-2


@EACH
@pytest.mark.parametrize("kind", ["adapters", "mixture", "tied"])
def test_adapters_experts_and_tied_weights_train(tmp_path, mode, kind):
    tied = partial(policy, tie_word_embeddings=True)
    make = {"adapters": with_adapters, "mixture": mixture_policy, "tied": tied}[kind]
    result, found = trained(tmp_path / mode, mode, model=make(), epochs=4)
    expected, _ = trained(tmp_path / "fp32", "fp32", model=make(), epochs=4)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert result.last_metrics["loss"] < result.first_metrics["loss"] - 0.02
    assert result.last_metrics["loss"] == pytest.approx(expected.last_metrics["loss"], abs=0.05)


@EACH
def test_the_head_of_a_reward_model_stays_in_fp32(tmp_path, mode):
    made = loop(
        tmp_path,
        reward_objective("regression", NAMES, WEIGHTS),
        rated(24),
        model=reward_model(),
        precision="bf16",
        weights=mode,
        epochs=4,
    )
    result = made.run()
    assert {value.dtype for value in made.policy.head.parameters()} == {torch.float32}
    assert result.last_metrics["loss"] < result.first_metrics["loss"]


@EACH
def test_the_policy_is_in_fp32_again_after_the_training_with_the_same_numbers(tmp_path, mode):
    made, _ = sft(tmp_path, mode, learning_rate=1e-3, rows=demonstrations(8), epochs=2)
    before = {name: value.detach().clone() for name, value in made.policy.named_parameters()}
    made.outputs()
    for name, value in made.policy.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name].float())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "bf16_master"}, "weights: bf16_master needs precision: bf16"),
        ({"weights": "bf16"}, "weights: .*'bf16_master'"),
        (
            {"weights": "bf16_stochastic", "precision": "bf16", "optimizer": "own_training:Signs"},
            "weights: bf16_stochastic updates one parameter at a time",
        ),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        build(TrainSettings, {"learning_rate": 1e-3} | values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("DEEPSPEED", {"weights": "bf16_master"}, "train.weights: bf16_master is not supported under DeepSpeed"),
        ("FSDP", {"weights": "bf16_stochastic"}, "train.weights: bf16_stochastic is not supported under FSDP2"),
        ("MULTI_GPU", {"weights": "bf16_master", "reduce": "each"}, "train.reduce: with bf16_master, DDP reduces"),
    ],
)
def test_launches_that_cannot_have_bf16_weights_are_refused(kind, values, message):
    settings = TrainSettings(learning_rate=1e-3, precision="bf16", **values)
    with pytest.raises(InputError, match=message):
        settings.check_kind(kind)
    for other in {"NO", "MULTI_CPU", "FSDP", "MULTI_GPU"} - {kind}:
        if settings.reduce == "once" and (other != "FSDP" or settings.weights == "bf16_master"):
            settings.check_kind(other)


@EACH
def test_a_step_saves_the_trained_bf16_weights(tmp_path, mode):
    train = ["steps.sft.train.precision=bf16", f"steps.sft.train.weights={mode}", "policy.save_dtype=fp32"]
    run_recipe(tmp_path, *train, until="sft")
    step = tmp_path / "runs/small/sft"
    saved = load_file(step / "model.safetensors")
    assert all(torch.equal(value, value.bfloat16().float()) for value in saved.values())
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert json.loads((step / "manifest.json").read_text())["saved"]["max_difference"] < 1e-3


def test_a_launch_that_cannot_have_bf16_weights_is_refused_with_the_recipe(tmp_path):
    train = ["steps.sft.train.precision=bf16", "steps.sft.train.weights=bf16_master"]
    with pytest.raises(InputError, match=r"steps.sft.train.weights: bf16_master is not supported under DeepSpeed"):
        run_recipe(tmp_path, *train, "steps.sft.launch=launch/zero2-cpu-2.yaml")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("way", "cases"), [("ddp", list(BF16_WEIGHTS)), ("fsdp2", ["bf16_master"])])
def test_two_processes_do_what_one_does_but_for_rounding(tmp_path, way, cases):
    from test_distributed import compare_rounded  # noqa: PLC0415 - skipped without deepspeed

    launch = fsdp_on_a_cpu(tmp_path) if way == "fsdp2" else LAUNCH / f"{way}-cpu-2.yaml"
    where = {"ACCELERATE_TORCH_DEVICE": "cpu"} if way == "fsdp2" else {}
    script = LAUNCH.parent / "tests/train/distributed_runs.py"
    launched = start_forked(launch, "--main_process_port", "0", script, tmp_path, ",".join(cases), **where)
    output, errors = finish(launched)
    assert launched.returncode == 0, errors[-3000:]
    assert sorted((one["case"], one["processes"]) for one in told(output)) == sorted((case, 2) for case in cases * 2)
    for case in cases:
        compare_rounded(case, tmp_path / case)
