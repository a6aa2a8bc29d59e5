"""Whole training runs that choose their rows: what is chosen, and that nothing else decides it."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from tiny_rewards import NAMES, WEIGHTS, rated
from tiny_rewards import model as reward_model
from tiny_training import (
    Killed,
    Recorder,
    chosen,
    comparisons,
    demonstrations,
    group,
    loop,
    numbers,
    policy,
    preference,
    supervised,
    with_adapters,
)

from align.accounting.flops import Work, decoder_from_config, forward_flops, training_flops
from align.data.batching import order
from align.data.mixing import Mixture
from align.errors import InputError
from align.models.policy import response_logps
from align.models.tree.batch import tree_batch
from align.report.selection.section import comparisons as reported
from align.stages.training.policy_training import work_done
from align.stages.training.selecting import selection_report
from align.train.objectives.batch import group_batch
from align.train.objectives.reward import reward_objective
from align.train.references.compute import SCORE_WORK, read_work
from align.train.selection.cut_groups import CutGroups
from align.train.selection.folds import SomeGroups, fold_of, folds_of
from align.train.selection.selection import FixedModel, Selection, SelectionCost, selection_cost
from align.train.selection.settings import SelectionSettings
from align.train.settings import TrainSettings
from align.train.training_run import work_of

NUM_ROWS, BATCH = 64, 8
CLOCKS = ("selection/seconds",)


def selection(load_reference=None, sources=None, **settings):
    if load_reference is not None:
        settings["reference"] = "step:curated"
    made = SelectionSettings(**{"score": "hard", "gain": None, **settings})
    fixed = {"reference": FixedModel(loads=[load_reference])} if load_reference is not None else {}
    return Selection(settings=made, fixed=fixed, sources=sources or {})


def curated():
    return policy(seed=5)


def trained(folder, selected, *, stop_after=None, objective=None, train=None, model=None, job=None, **changes):
    """Run a training and return the groups that it chose in each step."""
    progress, job = Recorder(stop_after), {"selection": selected, **(job or {})}
    made = loop(
        folder,
        objective or supervised(),
        train or demonstrations(NUM_ROWS),
        model=model,
        progress=progress,
        job=job,
        **changes,
    )
    with suppress(Killed):
        made.run()
    return chosen(folder)


def logged(folder):
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in numbers(folder)]


def mean_nll(model, groups):
    with torch.no_grad():
        logps = [response_logps(model, [group])[0, 0].item() for group in groups]
    return [-logp / group.response_lengths[0] for logp, group in zip(logps, groups, strict=True)]


@pytest.mark.parametrize("score", ["hard", "easy", "learnability"])
def test_the_first_step_takes_the_rows_with_the_highest_scores(tmp_path, score):
    groups = demonstrations(NUM_ROWS)
    reference = None if score == "hard" else curated
    found = trained(tmp_path, selection(reference, score=score, filter=0.75), train=groups, max_steps=1)
    rows = list(order(NUM_ROWS, seed=0, epoch=0)[:32])
    before, after = (np.array(mean_nll(model, [groups[row] for row in rows])) for model in (policy(), curated()))
    scores = {"hard": before, "easy": -after, "learnability": before - after}[score]
    best = np.argsort(-scores)[:BATCH]
    assert sorted(found[0]) == sorted(rows[position] for position in best)
    line = numbers(tmp_path)[0]
    assert line["selection/mean_score_chosen"] == pytest.approx(scores[best].mean(), abs=1e-5)
    assert line["selection/mean_score"] == pytest.approx(scores.mean(), abs=1e-5)


def test_each_of_two_references_scores_the_half_that_it_was_not_trained_on(tmp_path):
    groups = demonstrations(NUM_ROWS)
    made = SelectionSettings(score="easy", reference="cross_fit:x", filter=0.75, gain=None, score_tokens=30)
    cross_fitted = Selection(settings=made, fixed={"reference": FixedModel(loads=[curated, lambda: policy(seed=6)])})
    (found,) = trained(tmp_path, cross_fitted, train=groups, max_steps=1)
    rows = list(order(NUM_ROWS, seed=0, epoch=0)[:32])
    cut = CutGroups(groups, 30)
    first, second = (mean_nll(model, [cut[row] for row in rows]) for model in (curated(), policy(seed=6)))
    is_first_half = [fold_of(groups[row]) == 1 for row in rows]
    assert 8 < sum(is_first_half) < 24
    scores = np.where(is_first_half, second, first)
    assert sorted(found) == sorted(rows[position] for position in np.argsort(scores)[:BATCH])


def test_halves_keep_prompts_together_and_do_not_depend_on_the_responses():
    groups = comparisons(500)
    folds = [fold_of(each) for each in groups]
    assert 0.4 < folds.count(1) / 500 < 0.6
    assert all(folds[row] == folds[row - 1] for row in range(4, 500, 5))  # of the same prompt
    assert folds == folds_of(CutGroups(groups, 1)).tolist()
    assert [each.row for each in SomeGroups(groups, [3, 1])] == [3, 1] == [each.row for each in groups[3:0:-2]]


def test_rows_are_consumed_one_super_batch_per_step_and_the_last_is_smaller(tmp_path):
    found = trained(tmp_path, selection(filter=0.6, gain=1.0, chunks=4))
    epoch = order(NUM_ROWS, seed=0, epoch=0)
    assert [len(each) for each in found] == [8, 8, 8, 2]  # of 20, 20, 20 and 4 rows
    assert all(set(each) <= set(epoch[20 * step : 20 * step + 20]) for step, each in enumerate(found))


def test_a_choice_does_not_depend_on_the_micro_batches(tmp_path):
    one = trained(tmp_path / "one", selection(curated, score="learnability", gain=2.0))
    many = trained(tmp_path / "many", selection(curated, score="learnability", gain=2.0), tokens_per_micro_batch=60)
    assert one == many and len(one) == 4


@pytest.mark.parametrize("every", [1, 3])
def test_a_killed_run_repeats_its_choices_and_its_numbers(tmp_path, every):
    selected = selection(curated, score="learnability", gain=2.0, every=every)
    trained(tmp_path / "whole", selected)
    trained(tmp_path / "killed", selected, stop_after=3, checkpoint_steps=2)
    trained(tmp_path / "killed", selected, checkpoint_steps=2)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert chosen(tmp_path / "killed") == chosen(tmp_path / "whole")


def test_a_resumed_run_reads_what_was_chosen_after_its_checkpoint(tmp_path, monkeypatch):
    trained(tmp_path, selection(), stop_after=3, checkpoint_steps=2)
    scored = []
    monkeypatch.setattr("align.train.selection.scorer.Scorer.losses", lambda *_, **__: scored.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, selection())  # step 3 is in the journal, step 4 is not
    assert len(scored) == 1 and len(numbers(tmp_path)) == 3


def test_scores_are_of_the_weights_at_the_time_of_a_scoring(tmp_path):
    always = trained(tmp_path / "1", selection(), learning_rate=0.1)
    rarely = trained(tmp_path / "2", selection(every=4), learning_rate=0.1)
    assert always[0] == rarely[0] and always[2:] != rarely[2:]
    work = [[line.get("selection/tokens_computed", 0) > 0 for line in numbers(tmp_path / name)] for name in ("1", "2")]
    assert work == [[True] * 4, [True, False, False, False]]


def test_after_its_share_of_the_steps_a_run_takes_rows_in_the_order_of_the_epoch(tmp_path):
    assert len(trained(tmp_path, selection(until=0.5))) == 2
    assert [line["groups"] for line in numbers(tmp_path)] == [BATCH] * 4
    assert ["selection/rows" in line for line in numbers(tmp_path)] == [True, True, False, False]


@pytest.mark.parametrize(("cut", "coupling"), [(None, "none"), (3, "none"), (None, "embedding"), (None, "gradient")])
def test_training_costs_what_the_formula_says(tmp_path, cut, coupling):
    draw = np.random.default_rng(0)
    rows = draw.integers(120, size=(NUM_ROWS, 16)).tolist()
    groups = [group(row[:6], [row[6:]]) for row in rows]  # of equal lengths, so that any choice costs the same
    selected = selection(filter=0.75, score_tokens=cut, coupling=coupling)
    progress, job = Recorder(), {"selection": selected, "forward": "plain"}
    loop(tmp_path, supervised(), groups, progress=progress, job=job, max_steps=2).run()
    model = decoder_from_config(policy().base.config.to_dict())
    lines = numbers(tmp_path)
    training = sum(training_flops(model, work_of(line)) for line in lines)
    scoring = sum(forward_flops(model, work_of(line, "selection/")) for line in lines)
    rho = selection_cost(groups, selected.settings, model).scoring
    assert (training + scoring) / training == pytest.approx(1 + rho / (3 * (1 - 0.75)), rel=0.02)
    if cut is not None:
        assert 9 / 16 * 0.8 < rho < 9 / 16 * 1.1  # of 6 + 10 tokens
    elif coupling == "gradient":  # 10 of 16 tokens pass the LM head once more
        head = 10 * 2 * model.hidden * model.vocab
        assert rho == pytest.approx(1 + head / forward_flops(model, tree_batch(groups[0].sequences).work()))
    else:
        assert rho == 1


UNEQUAL = [
    {},
    {"score_tokens": 3},
    {"coupling": "gradient", "coupling_weight": 20.0},
    {"until": 0.5},
    {"until": 0.5, "score_layers": 1, "score_tokens": 3},
]


@pytest.mark.parametrize("changes", UNEQUAL)
def test_the_ledger_and_the_report_count_the_tokens_of_rows_of_unequal_lengths(tmp_path, changes):
    draw = np.random.default_rng(5)
    sizes = [(int(prompt), int(answer)) for prompt, answer in draw.integers(2, 60, size=(NUM_ROWS, 2))]
    rows = [
        (draw.integers(120, size=prompt).tolist(), draw.integers(120, size=answer).tolist()) for prompt, answer in sizes
    ]
    model, progress = policy(), Recorder()
    size = decoder_from_config(model.base.config.to_dict())
    selected = replace(selection(filter=0.75, **changes), size=size)
    selected = replace(
        selected, cost=selection_cost([group(row, [answer]) for row, answer in rows], selected.settings, size)
    )
    made = loop(
        tmp_path,
        supervised(),
        [group(row, [answer]) for row, answer in rows],
        model=model,
        progress=progress,
        job={"selection": selected},
        epochs=2,
    )
    outcome = made.run()

    matrices = sum(value.numel() for value in model.base.model.layers[0].parameters() if value.dim() == 2)

    def forward(row, *, answers=None, heads=1, layers=2):
        """FLOPs of a row: matrices, attention (width 32), and the LM head at the answer's tokens."""
        prompt, answer = sizes[row]
        answer = min(answer, answers or answer)
        tokens = prompt + answer
        return layers * (2 * tokens * matrices + 2 * 32 * tokens * (tokens + 1)) + heads * 2 * 32 * 120 * answer

    epochs = [order(NUM_ROWS, seed=0, epoch=number) for number in (0, 1)]
    super_batches = [list(epoch[start : start + 32]) for epoch in epochs for start in (0, 32)]
    found = chosen(tmp_path)
    num_scored = len(found)
    assert (num_scored, outcome.num_steps) == (2 if "until" in changes else 4, 4)
    found += [rows[:BATCH] for rows in super_batches[num_scored:]]
    heads, layers = 2 if "coupling" in changes else 1, changes.get("score_layers", 2)
    training = 3 * sum(forward(row) for each in found for row in each)
    training -= 3 * sum(forward(row) - forward(row, layers=layers) for each in found[:num_scored] for row in each[1::2])
    scoring = sum(
        forward(row, answers=changes.get("score_tokens"), heads=heads, layers=layers)
        for each in super_batches[:num_scored]
        for row in each
    )
    assert sum(step["flops"] for step in progress.steps) == pytest.approx(training + scoring, rel=0.02)
    assert work_done(made, outcome).flops[0] == pytest.approx(training + scoring, rel=0.02)
    # As many rows of mean cost in place of the chosen ones
    uniform = 3 * sum(BATCH * np.mean([forward(row) for row in each]) for each in super_batches[:num_scored])
    uniform += 3 * sum(forward(row) for each in found[num_scored:] for row in each)
    (compared,) = reported({"chosen": selection_report(made, outcome, size)["selection"]})
    assert compared.cost == pytest.approx((training + scoring) / uniform, rel=0.02)
    assert abs(training / uniform - 1) > 0.03  # the chosen rows are of other lengths
    line = numbers(tmp_path)[0]
    lengths = [[sum(sizes[row]) for row in each] for each in (super_batches[0], found[0])]
    assert [line["selection/mean_tokens"], line["selection/mean_tokens_chosen"]] == [np.mean(each) for each in lengths]


def test_a_run_costs_between_the_choice_of_the_shortest_and_of_the_longest_rows():
    works = [Work(int(tokens), 0, 0) for tokens in np.random.default_rng(0).integers(1, 100, size=20)]
    made = selection(filter=0.5, until=0.5)
    epoch, train = list(order(20, seed=0, epoch=0)), TrainSettings(learning_rate=1.0, prompts_per_step=4)
    batches = [[works[row].tokens for row in epoch[start : start + 8]] for start in (0, 8, 16)]
    sums = [[sum(some) for some in combinations(each, len(each) // 2)] for each in batches]
    mean = sum(map(np.mean, sums))
    low, high = made.cost_range(works, epoch, train)
    predicted = 1 + 0.5 / (3 * 0.5)
    assert low == pytest.approx(predicted + 0.5 * (sum(map(min, sums)) / mean - 1))
    assert high == pytest.approx(predicted + 0.5 * (sum(map(max, sums)) / mean - 1))
    assert low < predicted < high


def test_a_small_scorer_takes_the_place_of_the_policy_at_its_own_cost(tmp_path):
    draw = np.random.default_rng(0)
    groups = [group(row[:6], [row[6:]]) for row in draw.integers(120, size=(NUM_ROWS, 16)).tolist()]
    models = {"scorer": policy(seed=7, hidden_size=16, intermediate_size=32), "reference": curated()}
    own, small = (decoder_from_config(model.base.config.to_dict()) for model in (policy(), models["scorer"]))
    made = SelectionSettings(scorer="step:small", reference="step:curated", filter=0.75, gain=None)
    fixed = {key: FixedModel(loads=[lambda model=model: model], size=small) for key, model in models.items()}
    found = trained(tmp_path, Selection(settings=made, fixed=fixed), train=groups, job={"forward": "plain"})
    rows = list(order(NUM_ROWS, seed=0, epoch=0)[:32])
    losses = [np.array(mean_nll(models[key], [groups[row] for row in rows])) for key in ("scorer", "reference")]
    assert sorted(found[0]) == sorted(rows[place] for place in np.argsort(losses[1] - losses[0])[:BATCH])
    lines = numbers(tmp_path)
    assert not any(line["selection/tokens_computed"] for line in lines)
    training = sum(training_flops(own, work_of(line)) for line in lines)
    scoring = forward_flops(small, read_work(tmp_path, SCORE_WORK["scorer"]).work)
    whole = tree_batch(groups[0].sequences).work()
    rho = forward_flops(small, whole) / forward_flops(own, whole)
    assert rho < 0.6 and (training + scoring) / training == pytest.approx(1 + rho / (3 * (1 - 0.75)), rel=0.02)


def test_the_first_step_counts_the_passes_of_fixed_models(tmp_path):
    draw = np.random.default_rng(0)
    groups = [group(row[:6], [row[6:]]) for row in draw.integers(120, size=(NUM_ROWS, 16)).tolist()]
    own, small = (decoder_from_config(policy(hidden_size=size).base.config.to_dict()) for size in (32, 16))
    made = SelectionSettings(scorer="step:small", reference="step:curated", filter=0.75, gain=None)
    loads = {name: partial(policy, seed, hidden_size=16) for seed, name in enumerate(("scorer", "reference"), start=7)}
    fixed = {name: FixedModel(loads=[load], size=small) for name, load in loads.items()}
    job = {"selection": Selection(settings=made, fixed=fixed), "forward": "plain"}
    progress = Recorder()
    loop(tmp_path, supervised(), groups, progress=progress, job=job).run()
    extra = [step["flops"] - training_flops(own, work_of(step)) for step in progress.steps]
    assert extra == [2 * NUM_ROWS * forward_flops(small, tree_batch(groups[0].sequences).work()), 0]


def test_the_reference_costs_one_pass_of_its_own_size_over_all_rows():
    draw = np.random.default_rng(0)
    groups = [group(row[:6], [row[6:]]) for row in draw.integers(120, size=(600, 16)).tolist()]
    large, small = (decoder_from_config(policy(hidden_size=size).base.config.to_dict()) for size in (64, 16))
    cost = selection_cost(groups, selection(filter=0.75).settings, large, [small])
    whole = tree_batch([each.sequences[0] for each in groups[:1]]).work()
    assert cost.once == 600 * forward_flops(small, whole)
    assert cost.row == training_flops(large, whole)
    for sizes in (("unknown", "unknown"), ("unknown", small), (large, "unknown")):  # then tokens, for all models
        cost = selection_cost(groups, selection(filter=0.75).settings, sizes[0], sizes[1:])
        assert cost == (1.0, 600 * 16, 3 * 16, 3, 1.0)


def test_an_epoch_has_the_rows_of_a_mixture_and_a_fixed_model_scores_every_row():
    groups = [group([1], [[2] * length]) for length in [9] * 12 + [99] * 30]
    mixture = Mixture((12, 30), (0.75, 0.25), seed=0)
    assert sorted(len(groups[row].sequences[0].ids) for row in mixture.epoch(0)).count(10) == 0.75 * mixture.num_rows
    cost = selection_cost(groups, selection(score_tokens=4).settings, "unknown", ["unknown"], mixture=mixture)
    assert cost.once == 42 * 5
    assert cost.row == pytest.approx(3 * (0.75 * 10 + 0.25 * 100))
    assert cost.scoring == pytest.approx(5 / (0.75 * 10 + 0.25 * 100))


def test_scoring_is_a_larger_share_of_the_training_of_adapters():
    model, groups = with_adapters(), demonstrations(8)
    size = decoder_from_config(model.base.config.to_dict())
    chosen_by = selection(filter=0.75)
    cost = selection_cost(groups, chosen_by.settings, size, frozen=True)
    whole = [tree_batch(each.sequences).work() for each in groups]
    assert cost.row == pytest.approx(sum(2 * forward_flops(size, work) for work in whole) / 8)
    assert replace(chosen_by, cost=cost).cost_factor == 1 + 1 / (2 * 0.25)


def test_uniform_training_of_equal_flops_pays_for_the_reference_too():
    settings = SelectionSettings(score="uniform", equal="flops", reference="step:curated", filter=0.5)
    made = Selection(settings=settings, cost=SelectionCost(scoring=0.6, once=960.0, row=12.0))
    train = TrainSettings(learning_rate=1.0, prompts_per_step=8)
    assert made.selected_steps(train, 160) == 10
    assert made.num_steps(train, 160) == 10 + 4 + 10  # 10 * 0.6 / (3 * 0.5) of scoring, 960 / (8 * 12) of the reference
    assert made.compared_steps(train, 160) == {10, 20}
    fitted = replace(made, fixed={"reference": FixedModel(trained_rows=157)})
    assert fitted.num_steps(train, 160) == 24 + 20 and fitted.compared_steps(train, 160) == {10, 40}


def test_only_the_first_trained_tokens_are_scored():
    groups = comparisons(6)
    for given, cut in zip(groups, CutGroups(groups, 4), strict=True):
        for whole, short in zip(given.sequences, cut.sequences, strict=True):
            assert short.loss_mask.sum() == min(4, whole.loss_mask.sum())
            assert short.ids.tolist() == whole.ids[: len(short.ids)].tolist() and short.loss_mask[-1]


OBJECTIVES = {
    "dpo": (preference("dpo"), lambda: comparisons(12), policy),
    "rpo": (preference("rpo_bwd_kl"), lambda: comparisons(12, sizes=(2, 4)), policy),
    "bt": (reward_objective("bt", NAMES, WEIGHTS), lambda: rated(12), reward_model),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_losses_of_the_groups_of_a_batch_sum_to_its_loss(name):
    objective, groups, make = OBJECTIVES[name]
    model = make()
    model.use_forward("tree")
    groups = groups()
    references = [[-3.0 - number for number in range(len(group.sequences))] for group in groups]
    batch = group_batch(groups, references, tree_batch)
    losses_B = objective.group_losses(objective.outputs(model, batch.tokens), batch)
    assert losses_B.shape == (12,)
    torch.testing.assert_close(losses_B.sum(), objective(model, batch).loss)


def test_the_loss_of_a_rated_group_is_the_mean_over_its_labels():
    objective, groups, model = reward_objective("regression", NAMES, WEIGHTS), rated(12), reward_model()
    model.use_forward("tree")
    batch = group_batch(groups, None, tree_batch)
    scores = objective.outputs(model, batch.tokens).tolist()
    for rated_group, loss in zip(groups, objective.group_losses(torch.tensor(scores), batch), strict=True):
        own = [scores.pop(0) for _ in rated_group.sequences]
        errors = [
            (row[NAMES.index(name)] - label) ** 2
            for row, labels in zip(own, rated_group.attributes, strict=True)
            for name, label in labels.items()
        ]
        assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "regression"])
def test_preferences_and_rewards_are_chosen_by_a_reference_of_their_own_kind(tmp_path, name):
    if name == "dpo":
        objective, train, make = preference("dpo"), comparisons(NUM_ROWS), policy
    else:
        objective, train, make = reward_objective("regression", NAMES, WEIGHTS), rated(NUM_ROWS), reward_model
    selected = selection(lambda: make(seed=4) if name == "dpo" else make(), score="easy", chunks=2, score_tokens=3)
    found = trained(tmp_path, selected, objective=objective, train=train, model=make())
    assert [len(each) for each in found] == [BATCH] * 4
    cached = {path.parent.name for path in (tmp_path / "references").glob("*/*.json")}
    assert len(cached) == (2 if name == "dpo" else 1)


def test_a_run_that_was_killed_resumes_with_another_step_to_compare_with(tmp_path):
    trained(tmp_path, selection(), stop_after=3, checkpoint_steps=2)
    trained(tmp_path, selection(compare="step:earlier"))
    assert len(numbers(tmp_path)) == 4


def summed():
    return lambda logps, *rest: logps.sum()


def test_a_users_loss_of_another_shape_is_named_when_it_scores_rows(tmp_path):
    objective = preference(f"{__name__}:summed")
    with pytest.raises(InputError, match="it must return one value per group"):
        trained(tmp_path, selection(), objective=objective, train=comparisons(NUM_ROWS), model=policy())


def twice(number):
    """Rows of which each occurs twice, with another index."""
    return [each for row in demonstrations(number) for each in (row, row)]


@pytest.mark.parametrize("coupling", ["none", "embedding", "gradient"])
def test_a_coupling_avoids_copies_of_a_row(tmp_path, coupling):
    weight = {} if coupling == "none" else {"coupling_weight": 100.0}
    selected = selection(filter=0.75, chunks=8, coupling=coupling, **weight)
    (found,) = trained(tmp_path, selected, train=twice(16), max_steps=1)
    assert len({row // 2 for row in found}) == (4 if coupling == "none" else 8)
    (line,) = numbers(tmp_path)
    if coupling != "none":
        assert line["selection/mean_cosine_chosen"] < line["selection/mean_cosine"]


@pytest.mark.parametrize("coupling", ["embedding", "gradient"])
def test_a_coupled_choice_does_not_depend_on_the_micro_batches(tmp_path, coupling):
    selected = selection(curated, score="learnability", gain=2.0, chunks=4, coupling=coupling, coupling_weight=20.0)
    one = trained(tmp_path / "one", selected)
    many = trained(tmp_path / "many", selected, tokens_per_micro_batch=60)
    free = trained(tmp_path / "free", selection(curated, score="learnability", gain=2.0, chunks=4))
    assert one == many != free


def test_shares_of_the_sources_are_logged(tmp_path):
    found = trained(tmp_path, selection(sources={"first": 20, "second": 44}))
    for groups, line in zip(found, numbers(tmp_path), strict=True):
        assert line["selection/share/first"] == sum(group < 20 for group in groups) / BATCH
        assert line["selection/share/first"] + line["selection/share/second"] == 1
        assert 0 < line["selection/pool_share/first"] < 1


def keep_short(policy_losses, reference_losses):
    return -policy_losses


def test_a_users_own_score_decides(tmp_path):
    name = f"{__name__}:keep_short"
    own = trained(tmp_path / "own", selection(score=name), max_steps=1)
    hard = trained(tmp_path / "hard", selection(), max_steps=1)
    assert not set(own[0]) & set(hard[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": 0.9}, "a step chooses 8 of 80"),
        ({"filter": 0.5, "epochs": 3}, "would train on 96 chosen ones.* at most 2 epochs"),
    ],
)
def test_a_pool_that_is_too_small_is_refused(tmp_path, settings, message):
    epochs = settings.pop("epochs", 1)
    with pytest.raises(InputError, match=message):
        trained(tmp_path, selection(**settings), epochs=epochs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "learnabilty"}, "did you mean 'learnability'"),
        ({"score": "easy"}, "name a step"),
        ({"score": "hard", "reference": "step:x"}, "no effect"),
        ({"score": "easy", "reference": "x"}, "step:NAME"),
        ({"score": "hard", "fold": 1}, "for the score uniform"),
        ({"score": "easy", "reference": "step:x", "scorer": "step:y"}, "no effect"),
        ({"score": "hard", "scorer": "y"}, "step:NAME"),
        ({"score": "hard", "scorer": "step:y", "coupling": "gradient"}, "needs the policy's pass"),
        ({"score": "uniform", "reference": "step:x"}, "no effect"),
        ({"score": "hard", "equal": "flops"}, "for the score uniform"),
        ({"score": "hard", "compare": "random"}, "neither uniform nor"),
        ({"score": "hard", "coupling": "contrastive"}, "`embedder` has one"),
        ({"score": "uniform", "coupling": "gradient"}, "no effect"),
        ({"score": "hard", "coupling_weight": 2.0}, "no effect without a coupling"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises((InputError, ValueError), match=message):
        SelectionSettings(**settings)
