"""SFT on chosen tokens: the loss by hand from transformers' logits, and what must not change it."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_training import (
    Killed,
    Recorder,
    demonstrations,
    gap,
    killed_and_whole,
    loop,
    numbers,
    policy,
    results,
    supervised,
)

from align.accounting.flops import decoder_from_config, forward_flops, training_flops
from align.errors import InputError, RunError
from align.models.tree.batch import tree_batch
from align.train.objectives.chosen_tokens import ChosenTokensObjective, top_share
from align.train.references.compute import SCORE_WORK, read_work
from align.train.selection.selection import FixedModel, Selection, selection_cost
from align.train.selection.settings import SelectionSettings
from align.train.training_run import work_of


def selected(share, seed=5, size="unknown", **changes):
    settings = SelectionSettings(tokens=share, reference="step:curated")
    reference = FixedModel(loads=[partial(policy, seed, **changes)], size=size)
    return Selection(settings=settings, fixed={"reference": reference})


def make(folder, train, *, share=0.6, job=None, selection=None, **more):
    job = {"selection": selection or selected(share), **(job or {})}
    return loop(folder, ChosenTokensObjective(share), train, job=job, **more)


def losses(model, group):
    """Return transformers' loss of each trained token of a demonstration."""
    (sequence,) = group.sequences
    ids = torch.from_numpy(sequence.ids.astype("int64"))
    labels = torch.where(torch.from_numpy(sequence.loss_mask), ids, -100)
    with torch.no_grad():
        logits = model.hf(input_ids=ids[None]).logits[0, :-1].double()
    each = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)
    return each[labels[1:] != -100].tolist()


def by_hand(groups, share):
    """Return the mean loss of the chosen tokens, that of all, and the share of the chosen ones."""
    chosen, every = [], []
    for group in groups:
        own, reference = losses(policy(), group), losses(policy(5), group)
        ranked = sorted(range(len(own)), key=lambda token: reference[token] - own[token])
        chosen += [own[token] for token in ranked[: math.ceil(round(share * len(own), 6))]]
        every += own
    return sum(chosen) / len(chosen), sum(every) / len(every), len(chosen) / len(every)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_loss_is_that_of_the_tokens_with_the_largest_excess_in_each_row(tmp_path, share):
    train = demonstrations(8)
    loss, nll, of_all = by_hand(train, share)
    line = make(tmp_path, train, share=share).step(0)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["nll"] == pytest.approx(nll, rel=1e-5)
    assert line["selection/token_share"] == pytest.approx(of_all, rel=1e-12)
    assert line["selection/mean_score_chosen"] > line["selection/mean_score"]
    assert abs(loss - nll) > 1e-3


def test_only_the_chosen_tokens_have_a_gradient(tmp_path):
    (group,) = train = demonstrations(1, seed=3)
    own, reference = losses(policy(), group), losses(policy(5), group)
    largest = max(range(len(own)), key=lambda token: own[token] - reference[token])
    assert len(own) > 5
    made = make(tmp_path, train, share=0.5 / len(own), max_grad_norm=1e6)
    norm = made.step(0)["grad_norm"]
    model, (sequence,) = policy(), group.sequences
    ids = torch.from_numpy(sequence.ids.astype("int64"))
    logps = model.hf(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
    position = torch.from_numpy(sequence.loss_mask[1:]).nonzero()[largest, 0]
    (-logps[position, ids[position + 1]]).backward()
    expected = torch.stack([value.grad.norm() for value in model.parameters() if value.grad is not None]).norm()
    assert norm == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("forward", ["tree", "plain"])
def test_micro_batches_do_not_change_the_result(tmp_path, forward):
    train, held_out = demonstrations(20), demonstrations(5, seed=3)
    runs = []
    for budget in (40, 10**6):
        job = {"forward": forward, "held_out": held_out}
        made = make(tmp_path / str(budget), train, job=job, tokens_per_micro_batch=budget, evaluate_every=2)
        runs.append(results(made))
    (lines, trained), (others, of_others) = runs
    assert lines[0]["micro_batches"] > others[0]["micro_batches"]
    for line, other in zip(lines, others, strict=True):
        assert line["selection/token_share"] == other["selection/token_share"]
        for name in ("loss", "nll", "grad_norm", "selection/mean_score_chosen"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), name
    assert gap(trained, of_others) < 5e-5


def test_held_out_rows_are_evaluated_on_all_of_their_tokens(tmp_path):
    held_out = demonstrations(5, seed=3)
    made = make(tmp_path, demonstrations(8), job={"held_out": held_out}, max_steps=1)
    made.run()
    every = [loss for group in held_out for loss in losses(policy(), group)]
    assert numbers(tmp_path)[0]["start/held_out/loss"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    assert "held_out/selection/token_share" not in numbers(tmp_path)[0]


def test_a_killed_run_goes_on_bit_for_bit_and_the_reference_computes_nothing_again(tmp_path):
    train = demonstrations(24)
    options = {"epochs": 2, "checkpoint_steps": 2, "tokens_per_micro_batch": 90}
    resumed = killed_and_whole(partial(make, train=train, **options), tmp_path)
    assert any("selection's reference: 0 groups to compute, 24" in note for note in resumed.progress.notes)


def test_a_run_with_another_share_or_reference_does_not_resume(tmp_path):
    train = demonstrations(16)
    with pytest.raises(Killed):
        make(tmp_path, train, checkpoint_steps=1, progress=Recorder(stop_after=2)).run()
    for other in ({"share": 0.7}, {"selection": selected(0.6, seed=6)}):
        with pytest.raises((InputError, RunError)):
            make(tmp_path, train, checkpoint_steps=1, **other).run()


def test_the_pass_of_the_reference_is_counted_and_the_policy_takes_no_other_pass(tmp_path):
    own, large = (decoder_from_config(policy(hidden_size=size).base.config.to_dict()) for size in (32, 64))
    train = demonstrations(16)
    chosen = selected(0.6, size=large, hidden_size=64)
    made = make(tmp_path, train, selection=chosen)
    made.run()
    whole = tree_batch([sequence for each in train for sequence in each.sequences]).work()
    assert read_work(tmp_path, SCORE_WORK["reference"]).work == whole
    extra = [step["flops"] - training_flops(own, work_of(step)) for step in made.progress.steps]
    assert extra == [forward_flops(large, whole), 0]
    alone = [forward_flops(large, tree_batch(group.sequences).work()) for group in train]
    cost = selection_cost(train, chosen.settings, own, [large])
    assert cost.once == pytest.approx(sum(alone))
    planned = Selection(settings=chosen.settings, fixed=chosen.fixed, cost=cost)
    assert planned.cost_factor == 1 and planned.num_steps(made.training_run.settings, 16) == 2


def test_of_equal_scores_the_first_are_chosen():
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0])
    groups = torch.tensor([1, 1, 1, 1, 0, 0, 2])
    expected = [False, True, True, False, True, False, True]
    assert top_share(scores, groups, 0.5).tolist() == expected


def test_a_reference_without_numbers_is_an_error(tmp_path, monkeypatch):
    def broken():
        model = policy(5)
        with torch.no_grad():
            model.hf.model.norm.weight.fill_(math.nan)
        return model

    module = "align.train.selection.token_references.choose_forward"  # which would refuse the model, for these rows
    monkeypatch.setattr(module, lambda *args, **options: SimpleNamespace(name="plain"))
    settings = SelectionSettings(tokens=0.5, reference="step:curated")
    chosen = Selection(settings=settings, fixed={"reference": FixedModel(loads=[broken])})
    with pytest.raises(RunError, match="reference's log-probability of a token is nan"):
        make(tmp_path, demonstrations(4), selection=chosen)


def test_rows_are_trained_on_as_without_a_selection(tmp_path):
    train = demonstrations(24)
    lines = [
        results(loop(tmp_path / "all", supervised(), train, epochs=3))[0],
        results(make(tmp_path / "chosen", train, epochs=3))[0],
    ]
    for name in ("groups", "tokens_trained", "tokens_computed"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]], name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0.5}, "needs one fixed model"),
        ({"tokens": 0.5, "reference": "cross_fit"}, "needs one fixed model"),
        ({"tokens": 0.5, "reference": "step:a", "filter": 0.5}, "filter: has no effect"),
        ({"tokens": 0.5, "reference": "step:a", "score": "hard"}, "score: has no effect"),
        ({"tokens": 0.5, "reference": "step:a", "every": 2}, "every: has no effect"),
        ({"tokens": 1.0, "reference": "step:a"}, "less than 1"),
        ({"tokens": 0.0, "reference": "step:a"}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectionSettings(**settings)


def test_a_selection_of_rows_has_the_key_that_it_had_before_tokens_could_be_chosen():
    assert "tokens" not in SelectionSettings(score="hard").cache_key()
    assert SelectionSettings(tokens=0.5, reference="step:a").cache_key()["tokens"] == 0.5
