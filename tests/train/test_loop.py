import math
from functools import cache

import pytest
import torch
from tiny_training import (
    Recorder,
    comparisons,
    demonstrations,
    gap,
    group,
    llama,
    loop,
    metrics,
    policy,
    preference,
    results,
    same,
    supervised,
    weights,
    with_adapters,
)

from align.data.batching import groups_of_step
from align.errors import InputError, RunError
from align.train.objectives.base import ObjectiveOutput
from align.train.references.cache import ReferenceCache
from align.train.sharding import replicated

BIG = 10**6  # a token budget that takes a step at once
# What the way of computing decides
CHANGING = {"tokens_computed", "pairs_attended", "targets", "micro_batches", "seconds", "peak_memory_bytes"}

# Objective and data; every run of these has clipping, warm-up and a cosine active.
RUNS = {
    "sft": (supervised(), demonstrations(36)),
    "dpo": (preference("dpo"), comparisons(36)),
    "rpo": (preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02), comparisons(36, sizes=(2, 3, 5), longest=60)),
    "pairs": (
        preference("rpo_sq", beta=0.1, pairs="all", sft_weight=0.1, sft_per_token=True),
        comparisons(36, sizes=(1, 2, 4)),
    ),
}


def run(folder, name, *, job=None, model=None, **changes):
    """Metrics and trained weights of ten steps, the last of each epoch a small one."""
    objective, train = RUNS[name]
    return results(loop(folder, objective, train, model=model, job=job, **({"epochs": 2} | changes)))


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    """The runs as trees in one micro-batch a step, each made when it is first asked for."""
    return cache(lambda name: run(tmp_path_factory.mktemp(name), name))


def values(lines, name):
    return [line[name] for line in lines]


@pytest.mark.parametrize(("budget", "forward"), [(1, "tree"), (70, "tree"), (BIG, "plain"), (150, "plain")])
@pytest.mark.parametrize("name", RUNS)
def test_how_a_step_is_cut_and_computed_changes_no_number(at_once, tmp_path, name, budget, forward):
    lines, trained = at_once(name)
    other_lines, other = run(tmp_path, name, tokens_per_micro_batch=budget, job={"forward": forward})
    assert values(lines, "loss") == pytest.approx(values(other_lines, "loss"), rel=0, abs=1e-6)
    assert gap(trained, other) <= 5e-5
    for part in lines[0].keys() - CHANGING:
        # In the first step every margin is 0 but for rounding, and so its sign is chance.
        first = int(part == "rewards/accuracies")
        expected = pytest.approx(values(other_lines, part)[first:], rel=1e-5, abs=1e-5)
        assert values(lines, part)[first:] == expected, part
    assert len(lines) == len(set(values(lines, "lr"))) == 10
    assert max(values(lines, "grad_norm")) > 1  # clipped


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_a_tree_computes_each_prefix_once(at_once, tmp_path, name):
    lines, _ = at_once(name)
    apart, _ = run(tmp_path, name, tokens_per_micro_batch=1)
    _, train = RUNS[name]
    paths = [{tuple(each.ids[: at + 1]) for each in one.sequences for at in range(len(each.ids))} for one in train]
    for step, (line, line_apart) in enumerate(zip(lines, apart, strict=True)):
        chosen = groups_of_step(step, len(train), 8, seed=0)
        together = set().union(*(paths[index] for index in chosen))
        assert line["tokens_computed"] == len(together)
        assert line_apart["tokens_computed"] == sum(len(paths[index]) for index in chosen)
        assert line["pairs_attended"] == sum(len(path) for path in together)  # a token attends to all before it
        assert line_apart["pairs_attended"] == sum(len(path) for index in chosen for path in paths[index])
        assert line["targets"] == line_apart["targets"] == line["tokens_trained"]
        assert line["tokens_trained"] == sum(sum(train[index].response_lengths) for index in chosen)
    assert sum(values(lines, "tokens_computed")) < sum(values(apart, "tokens_computed"))  # prompts that groups share


def test_the_first_dpo_loss_is_log_two(at_once):
    first = at_once("dpo")[0][0]
    assert first["loss"] == first["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert [first[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == pytest.approx(
        [0, 0, 0], abs=1e-6
    )


def test_the_first_rpo_loss_is_the_divergence_of_the_rewards_from_indifference(tmp_path):
    groups, eta = comparisons(8, sizes=(2, 3, 4)), 1.5
    loop(tmp_path, preference("rpo_bwd_kl", eta=eta), groups).run()
    expected = 0.0
    for one in groups:  # sum_k p_k log(K p_k), with p the softmax of eta times the rewards
        parts = [math.exp(eta * reward) for reward in one.rewards]
        expected += sum(part / sum(parts) * math.log(len(parts) * part / sum(parts)) for part in parts) / len(groups)
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo", "rpo_bwd_kl", f"{__name__}:indifferent"])
@pytest.mark.parametrize("beta", [0.1, 1e-3])
def test_references_of_another_policy_stop_the_run_before_the_weights_change(tmp_path, name, beta):
    groups = comparisons(8)
    objective = preference(name, beta=beta)
    right, other = (loop(tmp_path / str(seed), objective, groups, model=policy(seed)) for seed in (0, 1))
    poisoned = ReferenceCache(tmp_path / "poisoned", weights=right.initial_weights, precision="fp32")
    poisoned.store({key: (value, 1) for key, value in other.reference_cache.values.items()})
    stopped = loop(tmp_path / "run", objective, groups, references=tmp_path / "poisoned")
    before = weights(stopped.policy)
    with pytest.raises(RunError, match=r"^step 1: policy and reference differ by 0\.2\d* nats per token .*poisoned"):
        stopped.run()
    assert same(before, weights(stopped.policy))
    assert metrics(tmp_path / "run") == []


def indifferent(beta):
    """A user's own loss, of whose first value nothing is known."""
    return lambda policy_BK, reference_BK, *rest: (policy_BK - reference_BK).square().sum(dim=-1)


class Spoiled:
    """An objective that goes wrong in one of its micro-batches: `how(loss)` is its loss there."""

    def __init__(self, objective, at_call, how):
        self.needs_reference, self.cache_key = objective.needs_reference, objective.cache_key
        self.objective, self.denominator = objective, objective.denominator
        self.at_call, self.how, self.calls = at_call, how, 0

    def __call__(self, model, batch):
        step = self.objective(model, batch)
        self.calls += 1
        return ObjectiveOutput(self.how(step.loss), step.tallies) if self.calls == self.at_call else step


def steep(loss):
    """The loss itself, but the slope of a square root at 0 is infinite."""
    return loss + (loss - loss.detach()).abs().sqrt()


NOT_FINITE = [
    (lambda loss: loss * math.nan, "optimizer step 3: the loss is nan; the weights are unchanged"),
    (lambda loss: loss / 0, "optimizer step 3: the loss is inf; the weights are unchanged"),
    (lambda loss: -loss / 0, "optimizer step 3: the loss is -inf; the weights are unchanged"),
    (steep, "optimizer step 3: the gradient norm is nan; the weights are unchanged"),
]


@pytest.mark.parametrize("budget", [BIG, 1])
@pytest.mark.parametrize(("how", "said"), NOT_FINITE)
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_step_that_is_not_finite_ends_the_run_with_the_weights_as_before(tmp_path, name, how, said, budget):
    objective, train = RUNS[name]
    changes = {"tokens_per_micro_batch": budget, "schedule": "constant"}
    _, before = run(tmp_path / "before", name, max_steps=2, **changes)
    num_calls = 1 if budget == BIG else 8  # micro-batches of a step; the first one of the third goes wrong
    stopped = loop(tmp_path / "run", Spoiled(objective, 2 * num_calls + 1, how), train, **changes)
    with pytest.raises(RunError) as error:
        stopped.run()
    assert str(error.value) == said
    assert same(weights(stopped.policy), before)
    assert values(metrics(tmp_path / "run"), "step") == [1, 2]


def lost():
    """A user's own loss that is not a number for groups of three."""

    def loss(policy_BK, reference_BK, rewards_BK, lengths_BK, mask_BK):
        return policy_BK.sum(dim=-1).masked_fill(mask_BK.sum(dim=-1) == 3, math.nan)

    return loss


def test_a_users_own_loss_that_is_not_a_number_ends_the_run(tmp_path):
    train = [*comparisons(23), *comparisons(1, sizes=(3,))]
    step_of_three = next(step for step in range(3) if 23 in groups_of_step(step, 24, 8, seed=0))
    with pytest.raises(RunError, match=f"step {step_of_three + 1}: the loss is nan"):
        loop(tmp_path, preference(f"{__name__}:lost"), train, schedule="constant").run()


def test_a_supervised_step_is_a_mean_over_tokens_not_over_rows(tmp_path):
    train = [group([3, 1], [[5] * 30]), group([3, 1], [[7]]), group([2], [[9, 11]])]
    nll = [[-logp for logp in token_logps(llama(), one.sequences[0])] for one in train]
    tokens = [value for row in nll for value in row]
    loop(tmp_path, supervised(), train, tokens_per_micro_batch=1).run()
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(sum(tokens) / 33, abs=1e-6)
    assert abs(sum(tokens) / 33 - sum(sum(row) / len(row) for row in nll) / 3) > 1e-2  # the two differ here


def token_logps(model, each):
    """Log-probabilities of a sequence's trained tokens by the model's own logits, in float64."""
    ids = torch.from_numpy(each.ids).long()
    logps = model.double()(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
    return [logps[at - 1, ids[at]].item() for at in range(1, len(ids)) if each.loss_mask[at]]


def test_a_line_of_metrics_says_what_a_small_step_is_worked_out_to_be(tmp_path):
    train = [
        group([1, 2, 3], [[4, 5], [4, 6, 7]], rewards=[0.0, 1.0]),
        group([1, 2, 9], [[4], [8, 8], [4, 4]], rewards=[1.0, 3.0, 2.0]),
        group([1, 2, 3], [[5], [9]], rewards=[2.0, 2.0], chosen=1),
        group([7], [[8, 9], [8]], rewards=[0.5, 0.5]),
    ]
    best_worst = [(1, 0), (1, 0), (1, 0), (0, 0)]  # the last is tied throughout, so that both are its first response
    objective = preference("dpo", beta=0.3, sft_weight=0.25)
    changes = {"prompts_per_step": 2, "schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-2, "epochs": 2}
    loop(tmp_path / "whole", objective, train, **changes).run()
    begun = loop(tmp_path / "begun", objective, train, max_steps=3, **changes)
    begun.run()
    model, start = llama(), llama()
    model.load_state_dict(begun.policy.hf.state_dict())

    sums = {name: 0.0 for name in ("preference", "sft", "chosen", "rejected", "accuracies", "logps_c", "logps_r")}
    chosen = groups_of_step(3, 4, 2, seed=0)
    for index in chosen:
        best, worst = best_worst[index]
        logps, reference = ([sum(token_logps(each, one)) for one in train[index].sequences] for each in (model, start))
        ratios = [logp - before for logp, before in zip(logps, reference, strict=True)]
        shares = [math.exp(0.3 * ratio) for ratio in ratios]
        sums["preference"] += -math.log(shares[best] / sum(shares)) if best != worst else 0.0
        sums["sft"] += -logps[best]
        sums["chosen"] += 0.3 * ratios[best]
        sums["rejected"] += 0.3 * ratios[worst]
        sums["accuracies"] += ratios[best] > ratios[worst]
        sums["logps_c"] += logps[best]
        sums["logps_r"] += logps[worst]
    mean = {name: value / 2 for name, value in sums.items()}
    lines = metrics(tmp_path / "whole")
    line = lines[3]
    assert line.pop("seconds") > 0
    assert line.pop("peak_memory_bytes") > 10**7  # a process with torch in it holds more than that
    assert line.pop("grad_norm") > 0
    everything = [each for index in chosen for each in train[index].sequences]
    prefixes = {tuple(each.ids[: at + 1]) for each in everything for at in range(len(each.ids))}
    assert line == pytest.approx(
        {
            "step": 4,
            "epoch": 2.0,
            "loss": mean["preference"] + 0.25 * mean["sft"],
            "loss/preference": mean["preference"],
            "loss/sft": mean["sft"],
            "rewards/chosen": mean["chosen"],
            "rewards/rejected": mean["rejected"],
            "rewards/margins": mean["chosen"] - mean["rejected"],
            "rewards/accuracies": mean["accuracies"],
            "logps/chosen": mean["logps_c"],
            "logps/rejected": mean["logps_r"],
            "lr": 1e-2,
            "groups": 2,
            "micro_batches": 1,
            "imbalance": 1.0,  # of one process
            "tokens_trained": sum(int(each.loss_mask.sum()) for each in everything),
            "tokens_computed": len(prefixes),
            "pairs_attended": sum(map(len, prefixes)),
            "targets": sum(int(each.loss_mask.sum()) for each in everything),
        },
        abs=2e-5,
    )
    assert values(lines, "step") == [1, 2, 3, 4]
    assert abs(line["rewards/margins"]) > 0.1  # the policy has moved


def test_an_epoch_ends_with_its_last_step_though_that_is_smaller(tmp_path):
    lines, _ = run(tmp_path, "sft")  # 36 rows, 8 a step
    assert values(lines, "epoch") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    assert values(lines, "groups") == [8, 8, 8, 8, 4] * 2


def test_gradient_clipping_schedule_and_optimizer_are_those_of_torch(tmp_path):
    # The same steps by hand: the model's own logits, torch's clipping, one plain AdamW with a list of decays
    train = demonstrations(24)
    rates = [1.5e-3, 3e-3, 3e-3, 1.5e-3]  # two steps up, and of two steps down the last one ends at 0
    settings = {"weight_decay": 0.3, "betas": (0.8, 0.95), "epsilon": 1e-6, "max_grad_norm": 0.5}
    trained = loop(tmp_path, supervised(), train, prompts_per_step=6, warmup_steps=2, schedule="linear", **settings)
    trained.run()
    model = llama()
    norms = [value for name, value in model.named_parameters() if "norm" in name]
    matrices = [value for name, value in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": norms, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.8, 0.95),
        eps=1e-6,
        foreach=False,
        fused=False,
    )
    for step, (line, rate) in enumerate(zip(metrics(tmp_path), rates, strict=True)):
        total, count = 0.0, 0
        for index in groups_of_step(step, 24, 6, seed=0):
            each = train[index].sequences[0]
            ids = torch.from_numpy(each.ids).long()
            labels = ids.masked_fill(~torch.from_numpy(each.loss_mask), -100)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            count += int(each.loss_mask.sum())
        assert line["lr"] == pytest.approx(rate)
        for part in optimizer.param_groups:
            part["lr"] = rate
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert norm > 0.5
    assert gap(weights(trained.policy), model.state_dict()) <= 1e-5  # the gradients differ by rounding


def test_the_optimizer_on_given_gradients_is_the_plain_one_of_torch(tmp_path):
    trained = loop(tmp_path, supervised(), demonstrations(8), weight_decay=0.3, betas=(0.8, 0.95), epsilon=1e-6)
    model = llama()
    parts = [{"params": [each for each in model.parameters() if (each.dim() > 1) == big]} for big in (True, False)]
    parts[1]["weight_decay"] = 0.0
    plain = torch.optim.AdamW(parts, lr=3e-3, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        for ours, theirs in zip(trained.policy.parameters(), model.parameters(), strict=True):
            theirs.grad = torch.randn(theirs.shape, generator=draw)
            ours.grad = theirs.grad.to(ours.device, copy=True)
        trained.sharding.optimizer.step()
        plain.step()
    assert gap(weights(trained.policy), model.state_dict()) <= 1e-6


def test_weights_decay_in_matrices_and_nowhere_else(tmp_path):
    changes = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 0.01, "schedule": "constant"}
    _, plain = run(tmp_path / "plain", "sft", weight_decay=0.0, **changes)
    _, decayed = run(tmp_path / "decayed", "sft", weight_decay=5.0, **changes)
    for name, start in llama().state_dict().items():
        lost_share = 0.05 if start.dim() > 1 else 0.0  # learning rate times decay
        torch.testing.assert_close(plain[name] - decayed[name], lost_share * start, rtol=0, atol=1e-6)


def test_without_a_limit_the_gradient_is_measured_and_not_clipped(tmp_path):
    (free, _), (high, _) = (run(tmp_path / str(limit), "dpo", max_grad_norm=limit) for limit in (0.0, 1e9))
    assert values(free, "grad_norm") == values(high, "grad_norm")
    assert values(free, "loss") == values(high, "loss")


@pytest.mark.parametrize("limit", [0.0, 1.0, 1.4])
def test_only_gradients_above_the_limit_are_multiplied(tmp_path, monkeypatch, limit):
    clipped, clip = [], torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(replicated, "clip_grads_with_norm_", lambda *given: clipped.append(given[2]) or clip(*given))
    lines, _ = run(tmp_path, "dpo", max_grad_norm=limit)
    norms = values(lines, "grad_norm")
    assert [float(norm) for norm in clipped] == [norm for norm in norms if limit and norm > limit]
    assert min(norms) < 1 and max(norms) > 1.4


@pytest.mark.parametrize("name", ["sft", "rpo"])
def test_held_out_rows_are_measured_and_change_nothing(tmp_path, at_once, name):
    lines, trained = at_once(name)
    held_out = RUNS[name][1][:5]  # rows that are trained on too, so that their first loss is known
    job = {"held_out": held_out}
    evaluated, other = run(tmp_path / "a", name, job=job, evaluate_every=4)
    cut, _ = run(tmp_path / "b", name, job=job, evaluate_every=4, tokens_per_micro_batch=1)
    assert same(trained, other)
    where = [line["step"] for line in evaluated if "held_out/loss" in line]
    assert where == [4, 8, 10]  # every four steps and after the last
    for line, line_cut, alone in zip(evaluated, cut, lines, strict=True):
        assert {part: line[part] for part in alone if part not in CHANGING} == {
            part: alone[part] for part in alone if part not in CHANGING
        }
        computed = {f"{prefix}held_out/{name}" for prefix in ("", "start/") for name in CHANGING}
        extra = line.keys() - alone.keys() - computed
        assert {part: line[part] for part in extra} == pytest.approx({part: line_cut[part] for part in extra}, abs=1e-5)


def test_the_loss_of_held_out_rows_is_that_of_a_step_over_them(tmp_path):
    objective, train = RUNS["dpo"]
    trained = loop(tmp_path / "a", objective, train, job={"held_out": train[:8]}, max_steps=4)
    outcome = trained.run()
    last, first = outcome.last_metrics, outcome.metrics[0]
    assert first["start/held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is its own reference
    model = llama()
    model.load_state_dict(trained.policy.hf.state_dict())
    start, expected = llama(), 0.0
    for one in train[:8]:
        ratios = [sum(token_logps(model, each)) - sum(token_logps(start, each)) for each in one.sequences]
        best = 0 if one.rewards[0] > one.rewards[1] else 1
        expected += math.log1p(math.exp(-0.1 * (ratios[best] - ratios[1 - best]))) / 8
    assert last["held_out/loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["sft", "rpo"])
def test_half_precision_stays_near(tmp_path, at_once, name):
    lines, _ = at_once(name)
    seen = []
    model = policy()
    model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    half, trained = run(tmp_path, name, model=model, precision="bf16", max_steps=5)
    assert values(half, "loss") == pytest.approx(values(lines, "loss")[:5], rel=0, abs=2e-2)
    assert values(half, "loss") != pytest.approx(values(lines, "loss")[:5], rel=0, abs=1e-6)  # it was another run
    assert set(seen) == {torch.float32}
    assert {value.dtype for value in trained.values()} == {torch.float32}


def test_steps_of_one_process_each_have_their_own_precision(tmp_path):
    steps = enumerate(["fp32", "bf16", "fp32"])
    losses = [values(run(tmp_path / str(at), "sft", precision=name, max_steps=1)[0], "loss") for at, name in steps]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("name", ["sft", "rpo"])
@pytest.mark.parametrize("forward", ["tree", "plain"])
def test_recomputing_activations_changes_no_number(tmp_path, at_once, name, forward):
    model = policy()
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    lines, trained = at_once(name)
    other_lines, other = run(tmp_path, name, model=model, job={"forward": forward})
    assert values(lines, "loss") == pytest.approx(values(other_lines, "loss"), rel=0, abs=1e-6)
    assert gap(trained, other) <= 5e-5


def test_adapters_learn_while_the_base_stands_still_and_is_the_reference(tmp_path):
    lines, trained = run(tmp_path, "dpo", model=with_adapters())
    before = weights(with_adapters())
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < 0.65

    cached = loop(tmp_path, *RUNS["dpo"], model=with_adapters()).reference_cache.values
    of_base = loop(tmp_path / "base", *RUNS["dpo"]).reference_cache.values
    assert cached == pytest.approx(of_base, abs=1e-4)


def test_a_tracker_by_name_gets_the_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines, _ = run(tmp_path, "dpo", trackers=["tensorboard"], max_steps=3)
    events = accumulator.EventAccumulator(str(tmp_path / "tracking/tensorboard/train"))
    events.Reload()
    assert [each.value for each in events.Scalars("loss")] == pytest.approx(values(lines, "loss"), rel=1e-6)
    assert [each.step for each in events.Scalars("rewards/margins")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["tensorbord", "dvclive", "no tracker"])
def test_a_tracker_that_is_not_there_is_one_clear_line(tmp_path, name):
    with pytest.raises(InputError, match=f"^train.trackers: no tracker called '{name}' is installed; .*available: .*"):
        run(tmp_path, "dpo", trackers=[name])


def test_a_launch_file_that_accumulates_does_not_divide_the_loss_again(tmp_path, at_once, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    lines, trained = run(tmp_path, "sft")
    assert values(lines, "grad_norm") == values(at_once("sft")[0], "grad_norm")
    assert same(trained, at_once("sft")[1])


@pytest.mark.parametrize("way", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_what_a_launch_file_asks_for_in_vain_is_said(tmp_path, monkeypatch, way):
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(InputError, match=f"the launch file enables {way}"):
        run(tmp_path, "sft")


def test_a_run_says_how_it_goes(tmp_path):
    objective, train = RUNS["dpo"]
    recorder = Recorder()
    outcome = loop(tmp_path, objective, train, progress=recorder, max_steps=2, tokens_per_micro_batch=100).run()
    assert recorder.phases == [("reference", 36, 0), ("train", 2, 0)]
    assert any("36 groups to compute" in note for note in recorder.notes)
    reported = [{name: value for name, value in line.items() if "flops" not in name} for line in recorder.steps]
    assert reported == metrics(tmp_path) == [outcome.first_metrics, outcome.last_metrics]
    assert (outcome.num_steps, outcome.forward.name) == (2, "tree")
    first, second = recorder.steps  # the references of all groups are computed before the first step
    assert first["flops"] > first["timed_flops"] and second["flops"] == second["timed_flops"]
    loop(tmp_path / "plain", objective, train, progress=recorder, job={"forward": "plain"})
    assert "plain padded forward: as set" in recorder.notes
