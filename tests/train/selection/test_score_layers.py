"""Rows that are scored by the first layers of the policy, through which half of the chosen ones are trained."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from tiny_rewards import NAMES, WEIGHTS, rated
from tiny_rewards import model as reward_model
from tiny_training import (
    Killed,
    Recorder,
    chosen,
    demonstrations,
    gap,
    llama,
    loop,
    mixture,
    numbers,
    policy,
    supervised,
    weights,
)

from align.accounting.flops import decoder_from_config
from align.data.batching import order
from align.errors import InputError
from align.models.policy import Policy
from align.models.tree.batch import EarlyExit, tree_batch
from align.stages.training.uniform import check_selection, with_uniform
from align.train.objectives.reward import reward_objective
from align.train.selection.selection import FixedModel, Selection, SelectionCost, selection_cost
from align.train.selection.settings import SelectionSettings
from align.train.settings import TrainSettings

NUM_ROWS, BATCH, LAYERS = 64, 8, 3


def selection(**changes):
    made = SelectionSettings(
        **{"reference": "step:curated", "filter": 0.75, "gain": None, "chunks": 1, "score_layers": 1} | changes
    )
    fixed = {"reference": FixedModel(loads=[lambda: policy(5, num_hidden_layers=LAYERS)])} if made.reference else {}
    return Selection(settings=made, fixed=fixed)


def trained(folder, selected, *, stop_after=None, job=None, **changes):
    made = loop(
        folder,
        supervised(),
        demonstrations(NUM_ROWS),
        model=policy(num_hidden_layers=LAYERS),
        progress=Recorder(stop_after),
        job={"selection": selected, **(job or {})},
        **changes,
    )
    with suppress(Killed):
        made.run()
    return made


def cut(whole):
    """A Llama of one layer with the weights of another: its first layer, embedding, norm and LM head."""
    made = llama(num_hidden_layers=1)
    made.model.layers[0], made.model.embed_tokens = whole.model.layers[0], whole.model.embed_tokens
    made.model.norm, made.lm_head = whole.model.norm, whole.lm_head
    return made


def nll(model, group):
    """The loss of a row from transformers' own logits, summed over the trained tokens."""
    (sequence,) = group.sequences
    ids, mask = torch.from_numpy(sequence.ids.astype(np.int64)), torch.from_numpy(sequence.loss_mask[1:])
    losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return losses[mask].sum()


@pytest.mark.parametrize("forward", ["tree", "plain"])
def test_a_model_of_the_first_layers_scores_the_rows_and_trains_on_every_second_one(tmp_path, forward):
    made = trained(tmp_path, selection(), job={"forward": forward}, max_steps=1)
    groups, ((*found,), (line, *_)) = demonstrations(NUM_ROWS), (chosen(tmp_path)[0], numbers(tmp_path))
    assert made.forward.name == forward
    whole, reference = llama(num_hidden_layers=LAYERS), llama(5, num_hidden_layers=LAYERS)
    rows = list(order(NUM_ROWS, seed=0, epoch=0)[:32])
    lengths = np.array([groups[row].response_lengths[0] for row in rows])
    with torch.no_grad():
        loss, other = (np.array([float(nll(cut(model), groups[row])) for row in rows]) for model in (whole, reference))
    assert found == [rows[place] for place in np.argsort((other - loss) / lengths)[:BATCH]]
    deep, short = (
        sum(nll(model, groups[row]) for row in part) for model, part in ((whole, found[::2]), (cut(whole), found[1::2]))
    )
    mean = (deep + short) / sum(groups[row].response_lengths[0] for row in found)
    mean.backward()
    norm = torch.nn.utils.get_total_norm([value.grad for value in whole.parameters()])
    assert line["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    exit_nll = short.item() / sum(groups[row].response_lengths[0] for row in found[1::2])
    assert line["exit/nll"] == pytest.approx(exit_nll, rel=1e-5)


def test_neither_micro_batches_nor_a_kill_change_what_is_chosen_and_trained(tmp_path):
    one = trained(tmp_path / "one", selection(chunks=4, gain=2.0))
    many = trained(tmp_path / "many", selection(chunks=4, gain=2.0), tokens_per_micro_batch=60)
    assert chosen(tmp_path / "one") == chosen(tmp_path / "many") and len(chosen(tmp_path / "one")) == 2
    assert gap(weights(one.policy), weights(many.policy)) < 1e-5
    trained(tmp_path / "killed", selection(chunks=4, gain=2.0), stop_after=1, checkpoint_steps=1)
    trained(tmp_path / "killed", selection(chunks=4, gain=2.0), checkpoint_steps=1)
    clocks = {"selection/seconds"}
    lines = [[{**line, **dict.fromkeys(clocks)} for line in numbers(tmp_path / name)] for name in ("one", "killed")]
    assert lines[0] == lines[1]


def test_a_uniform_step_trains_its_first_layers_unless_it_is_the_baseline_of_another_step(tmp_path):
    uniform = {"score": "uniform", "reference": None, "filter": 0.5}
    trained(tmp_path / "reference", selection(**uniform, compare=None), max_steps=1)
    trained(tmp_path / "baseline", selection(**uniform, equal="flops"), max_steps=1)
    (line,), (beside, _) = numbers(tmp_path / "reference"), numbers(tmp_path / "baseline")
    assert "exit/nll" in line and "exit/nll" not in beside
    assert line["targets"] == beside["targets"] and line["tokens_computed"] < beside["tokens_computed"]


def test_a_reward_model_is_scored_by_its_first_layers(tmp_path):
    objective, selected = reward_objective("regression", NAMES, WEIGHTS), selection(score="hard", reference=None)
    loop(tmp_path, objective, rated(NUM_ROWS), model=reward_model(), job={"selection": selected}, max_steps=1).run()
    (line,) = numbers(tmp_path)
    assert len(chosen(tmp_path)[0]) == BATCH and line["tokens_computed"] > 0


def test_a_cheap_run_can_cost_less_than_uniform_training_which_then_trains_for_as_many_steps():
    size = decoder_from_config(llama(num_hidden_layers=4).config.to_dict())
    groups = demonstrations(NUM_ROWS)
    made = SelectionSettings(reference="step:x", filter=0.5, score_layers=1)
    cost = selection_cost(groups, made, size, [size])
    head = 2 * size.hidden * size.vocab * sum(group.response_lengths[0] for group in groups)
    share = (cost.row * NUM_ROWS / 3 - head) / 4 + head  # of one layer
    rho = share / (cost.row * NUM_ROWS / 3)
    assert cost.scoring == pytest.approx(rho, rel=1e-3) == cost.exit
    factor = (1 + rho) / 2 + rho / (3 * 0.5)
    assert Selection(settings=made, cost=cost).cost_factor == pytest.approx(factor, rel=1e-3) and factor < 1
    uniform = made.model_copy(update={"score": "uniform", "equal": "flops"})
    beside = Selection(settings=uniform, cost=SelectionCost(cost.scoring, 0.0, 1.0, 3.0, cost.exit))
    for schedule, steps in (("constant", 4), ("linear", round(4 * factor + 0.5))):
        train = TrainSettings(learning_rate=1.0, prompts_per_step=8, schedule=schedule)
        assert beside.num_steps(train, NUM_ROWS) == steps
        assert beside.compared_steps(train, NUM_ROWS) == {4, round(4 * factor + 0.5)}


def test_what_cannot_be_cut_is_refused(tmp_path):
    size = decoder_from_config(mixture("qwen3_moe").config.to_dict())
    for model, layers, message in (
        (size, 1, "of several kinds"),
        (decoder_from_config(llama().config.to_dict()), 2, "not less than the 2 layers"),
        ("no formula", 1, "unknown: no formula"),
    ):
        with pytest.raises(InputError, match=message):
            selection_cost(demonstrations(4), SelectionSettings(score="hard", score_layers=layers), model)
    nested = Policy(llama())
    nested.base.model.layers = torch.nn.Sequential(*nested.base.model.layers)
    with pytest.raises(InputError, match="LlamaModel does not have one list of 2 layers"):
        nested.early_exit(1)
    with pytest.raises(InputError, match="router auxiliary loss"):
        selected, model = selection(score="hard", reference=None), Policy(mixture())
        loop(tmp_path, supervised(), demonstrations(NUM_ROWS), model=model, job={"selection": selected})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "step:small"}, "no effect on a fixed scorer"),
        ({"score": "easy"}, "no effect on the score easy"),
        ({"score": "uniform", "tokens": 0.5}, "selection of tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectionSettings(**{"reference": "step:x", "score_layers": 1} | settings)


@pytest.mark.parametrize(
    ("train", "needs_reference", "message"),
    [
        ({}, True, "without reference log-probabilities"),
        ({"prompts_per_step": 1}, False, "prompts_per_step of 2"),
        ({"reduce": "each"}, False, "reduce: once"),
    ],
)
def test_training_that_cannot_skip_layers_is_refused(train, needs_reference, message):
    made = SelectionSettings(score="hard", score_layers=1)
    with pytest.raises(InputError, match=message):
        check_selection(
            made, TrainSettings(learning_rate=1.0, **train), needs_kl=False, needs_reference=needs_reference
        )
    for kind in ("DEEPSPEED", "FSDP"):
        with pytest.raises(InputError, match=f"which {kind} does not support"):
            made.check_kind(kind)
    made.check_kind("MULTI_CPU")


class Step:
    """A step as `with_uniform` sees it."""

    def __init__(self, selected):
        self.selection, self.train = selected, TrainSettings(learning_rate=1.0)

    def model_copy(self, *, update):
        return Step(update["selection"])


def test_the_reference_must_have_been_trained_through_as_many_layers():
    made = SelectionSettings(reference="step:curated", score_layers=2)
    uniform = {"score": "uniform", "filter": 0, "compare": None}
    for selected in (None, SelectionSettings(**uniform), SelectionSettings(**uniform, score_layers=1)):
        with pytest.raises(InputError, match=r"'curated' was not trained .* score_layers: 2}`"):
            with_uniform("chosen", Step(made), {"curated": Step(selected)})
    good = Step(SelectionSettings(**uniform, score_layers=2))
    beside, _ = with_uniform("chosen", Step(made), {"curated": good})
    assert beside.step.selection.score_layers == 2 and not beside.step.selection.trains_exit
    folded = with_uniform("chosen", Step(made.model_copy(update={"reference": "cross_fit"})), {})
    assert [each.step.selection.trains_exit for each in folded] == [True, True, False, True]


def test_the_work_of_an_exit_is_its_share_of_the_layers_and_all_targets():
    batch = tree_batch(demonstrations(9)[0].sequences)
    whole, part = batch.work(), EarlyExit(1, 4).work(batch.work())
    assert [4 * part.tokens, part.targets] == pytest.approx([whole.tokens, whole.targets], abs=2)
