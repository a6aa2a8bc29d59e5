"""What a reward model is trained by: values and gradients against transformers' own forward, one response at a time."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tiny_rewards import NAMES, WEIGHTS, classifier, model, rated
from tiny_training import Recorder, comparisons, gap, group, loop, results, weights

from align.models.tree.batch import plain_batch, tree_batch
from align.train.objectives.batch import group_batch
from align.train.objectives.reward import reward_objective

# What the cut into micro-batches decides
CHANGING = {"tokens_computed", "pairs_attended", "targets", "micro_batches", "seconds", "peak_memory_bytes"}


def alone(hf, one):
    """Scores of a group's responses by transformers itself, [K, A]."""
    return torch.cat([hf(input_ids=torch.from_numpy(each.ids).long()[None]).logits for each in one.sequences])


def run(folder, loss, groups, *, job=None, made=None, **changes):
    objective = reward_objective(loss, NAMES, WEIGHTS)
    return results(loop(folder, objective, groups, model=made or model(), job=job, **changes))


@pytest.mark.parametrize("forward", ["tree", "plain"])
def test_missing_labels_change_neither_the_loss_nor_a_gradient(forward):
    groups = rated(12)
    make = tree_batch if forward == "tree" else plain_batch
    ours, theirs = model(), classifier()
    ours.use_forward(forward)
    objective = reward_objective("regression", NAMES, WEIGHTS)
    step = objective(ours, group_batch(groups, None, make))
    (step.loss / objective.denominator(groups)).backward()

    predicted, labels = [], []  # of the labels that there are, and of nothing else
    for one in groups:
        for scores_A, known in zip(alone(theirs, one), one.attributes, strict=True):
            predicted += [scores_A[NAMES.index(name)] for name in known]
            labels += known.values()
    expected = torch.nn.functional.mse_loss(torch.stack(predicted), torch.tensor(labels))
    expected.backward()
    num_missing = sum(len(NAMES) - len(known) for one in groups for known in one.attributes)
    assert num_missing > 10
    assert objective.denominator(groups) == len(labels)
    assert step.loss.item() / len(labels) == pytest.approx(expected.item(), abs=1e-5)
    gradients = dict(ours.hf.named_parameters())
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].grad, value.grad, rtol=1e-4, atol=1e-5)


def test_the_error_of_each_attribute_is_a_mean_over_its_own_labels():
    groups = rated(6)
    step = reward_objective("regression", NAMES, WEIGHTS)(tree_model(), group_batch(groups, None, tree_batch))
    hf = classifier()
    for index, name in enumerate(NAMES):
        squares = [
            (scores_A[index].item() - known[name]) ** 2
            for one in groups
            for scores_A, known in zip(alone(hf, one), one.attributes, strict=True)
            if name in known
        ]
        tally = step.tallies[f"mse/{name}"]
        assert float(tally.count) == len(squares)
        assert float(tally.total) == pytest.approx(sum(squares), rel=1e-5)


def tree_model(**changes):
    made = model(**changes)
    made.use_forward("tree")
    return made


RUNS = {
    "regression": rated(36),
    "bt": comparisons(36, sizes=(2, 3)),
    "bt_margin": comparisons(36, sizes=(2, 4)),
    "bt_scaled": comparisons(36, sizes=(2, 3, 5)),
}


@pytest.mark.parametrize("loss", RUNS)
def test_eight_groups_at_once_are_eight_groups_one_at_a_time(tmp_path, loss):
    # In float64 rounding hides nothing, but for the norms, which Llama takes in float32.
    lines, trained = run(tmp_path / "once", loss, RUNS[loss], made=model().double())
    for name, changes in {
        "one": {"tokens_per_micro_batch": 1},
        "few": {"tokens_per_micro_batch": 90},
        "plain": {"job": {"forward": "plain"}},
    }.items():
        other_lines, other = run(tmp_path / name, loss, RUNS[loss], made=model().double(), **changes)
        assert gap(trained, other) <= 5e-6
        for part in lines[0].keys() - CHANGING:
            expected = pytest.approx([line[part] for line in other_lines], rel=1e-6, abs=1e-6)
            assert [line[part] for line in lines] == expected, part
    assert len({line["loss"] for line in lines}) == 5


def test_32_rated_rows_are_learnt_to_near_zero_error(tmp_path):
    groups = rated(32, sizes=(1,), missing=0.2)
    lines, _ = run(tmp_path, "regression", groups, prompts_per_step=32, epochs=250, schedule="linear")
    assert lines[0]["loss"] > 2
    assert lines[-1]["loss"] < 1e-3
    assert max(lines[-1][f"mse/{name}"] for name in NAMES) < 1e-3


@pytest.mark.parametrize("loss", ["bt", "bt_margin", "bt_scaled"])
def test_pairs_are_learnt_to_be_put_right(tmp_path, loss):
    lines, _ = run(tmp_path, loss, comparisons(16, sizes=(2, 3)), prompts_per_step=16, epochs=60)
    assert lines[-1]["rewards/accuracies"] == 1.0
    assert lines[-1]["loss"] < lines[0]["loss"] / 4


def softplus(value):
    return math.log1p(math.exp(value))


FORMS = {  # of a lead d and a strength m, by hand
    "bt": lambda d, m: softplus(-d),
    "bt_margin": lambda d, m: softplus(m - d),
    "bt_scaled": lambda d, m: m * softplus(-d),
}


@pytest.mark.parametrize("loss", FORMS)
def test_a_group_costs_the_mean_over_its_pairs_of_different_rewards(loss):
    # Of six pairs one is a tie and says nothing; the reward is the weighted sum of the attributes.
    tied = group([1, 2], [[3], [4, 5], [6], [7, 8]], rewards=(2.0, 0.5, 2.0, 1.0))
    pair = group([9], [[3], [4]], rewards=(0.25, 1.0))
    expected, leads = 0.0, []
    for one in (tied, pair):
        values = (alone(classifier(), one) @ torch.tensor(WEIGHTS)).tolist()
        costs = []
        for i, j in combinations(range(len(values)), 2):
            strength = one.rewards[i] - one.rewards[j]
            if strength:
                lead = (values[i] - values[j]) * math.copysign(1, strength)
                costs.append((FORMS[loss](lead, abs(strength)), lead))
        expected += sum(cost for cost, _ in costs) / len(costs)
        leads.append(sum(lead for _, lead in costs) / len(costs))
    objective = reward_objective(loss, NAMES, WEIGHTS)
    step = objective(tree_model(), group_batch([tied, pair], None, tree_batch))
    assert step.loss.item() == pytest.approx(expected, abs=1e-5)
    assert objective.denominator([tied, pair]) == 2
    margins = step.tallies["rewards/margins"]
    assert float(margins.total / margins.count) == pytest.approx(sum(leads) / 2, abs=1e-5)


def test_the_plain_loss_follows_the_label_and_the_others_the_rewards():
    # The label goes against the rewards.
    labelled = group([1], [[2], [3]], rewards=(1.0, 0.0), chosen=1)
    first, second = (alone(classifier(), labelled) @ torch.tensor(WEIGHTS)).tolist()
    batch = group_batch([labelled], None, tree_batch)
    expected = {"bt": second - first, "bt_margin": first - second, "bt_scaled": first - second}
    for loss, lead in expected.items():
        step = reward_objective(loss, NAMES, WEIGHTS)(tree_model(), batch)
        assert step.loss.item() == pytest.approx(FORMS[loss](lead, 1.0), abs=1e-5)
        assert float(step.tallies["rewards/accuracies"].total) == float(lead > 0)


def test_groups_without_a_pair_cost_nothing_and_do_not_count():
    alone_one, tied = group([1], [[2]], rewards=(1.0,)), group([1], [[2], [3]], rewards=(1.0, 1.0))
    objective = reward_objective("bt", NAMES, WEIGHTS)
    made = tree_model()
    step = objective(made, group_batch([alone_one, tied], None, tree_batch))
    step.loss.backward()
    assert step.loss.item() == 0
    assert not any(value.grad.any() for value in made.parameters())
    assert not objective.has_pair(alone_one) and not objective.has_pair(tied)
    assert objective.has_pair(replace(tied, chosen=0))
    assert not reward_objective("bt_margin", NAMES, WEIGHTS).has_pair(replace(tied, chosen=0))


def test_an_indifferent_model_pays_log_two_for_a_pair(tmp_path):
    made = model()
    with torch.no_grad():
        made.head.weight.zero_()
    lines, _ = run(tmp_path, "bt", comparisons(8), made=made, max_steps=1)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_head_learns_at_its_own_rate(tmp_path):
    changes = {"max_steps": 1, "warmup_steps": 0, "schedule": "constant", "learning_rate": 1e-4, "weight_decay": 0.0}
    start = weights(model())
    for rate in (1.0, 20.0):
        _, trained = run(
            tmp_path / str(rate), "regression", RUNS["regression"], job={"head_lr_multiplier": rate}, **changes
        )
        moved = {name: (trained[name] - start[name]).abs().max().item() for name in start}
        head = moved.pop("score.weight")
        # The first step of Adam is as long as the learning rate.
        assert head == pytest.approx(1e-4 * rate, rel=1e-2)
        assert max(moved.values()) == pytest.approx(1e-4, rel=1e-2)


def test_a_head_that_learns_alone_learns_as_beside_the_decoder_which_stays(tmp_path):
    changes = {"max_steps": 1, "max_grad_norm": 0.0}  # the norm would be that of fewer gradients
    made, start = model(), weights(model())
    made.freeze_decoder()
    _, alone = run(tmp_path / "alone", "regression", RUNS["regression"], made=made, **changes)
    _, beside = run(tmp_path / "beside", "regression", RUNS["regression"], **changes)
    torch.testing.assert_close(alone["score.weight"], beside["score.weight"], rtol=0, atol=1e-7)
    changed = {name for name in start if not torch.equal(alone[name], start[name])}
    assert changed == {"score.weight"}


def test_labels_are_part_of_what_a_checkpoint_belongs_to(tmp_path):
    objective = reward_objective("regression", NAMES, WEIGHTS)
    other = [replace(RUNS["regression"][0], attributes=({},)), *RUNS["regression"][1:]]
    made = [
        loop(tmp_path / str(at), objective, groups, model=model())
        for at, groups in enumerate((RUNS["regression"], other))
    ]
    assert made[0].settings_hash != made[1].settings_hash


def test_two_rewards_are_one_objective_only_with_the_same_names_and_weights():
    made = [
        reward_objective("regression", NAMES, WEIGHTS),
        reward_objective("regression", NAMES[::-1], WEIGHTS),
        reward_objective("bt", NAMES, WEIGHTS),
        reward_objective("bt_scaled", NAMES, WEIGHTS),
        reward_objective("bt", NAMES, WEIGHTS[::-1]),
    ]
    assert len({str(each.cache_key()) for each in made}) == len(made)
    assert not any(each.needs_reference for each in made)


def test_a_reward_model_says_how_its_training_goes(tmp_path):
    recorder = Recorder()
    objective = reward_objective("bt", NAMES, WEIGHTS)
    loop(tmp_path, objective, RUNS["bt"], model=model(), progress=recorder, max_steps=2).run()
    assert recorder.phases == [("train", 2, 0)]  # and no reference is computed
    assert {"loss", "rewards/margins", "rewards/accuracies", "rewards/mean"} <= recorder.steps[0].keys()
