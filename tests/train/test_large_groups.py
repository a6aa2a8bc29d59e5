"""Groups with more tokens than a micro-batch may have, in whole runs: numbers, rows of each pass, and notes."""

import pytest
from tiny_training import (
    Recorder,
    comparisons,
    demonstrations,
    gap,
    llama,
    loop,
    metrics,
    mixture_policy,
    policy,
    preference,
    supervised,
    weights,
    with_adapters,
)

from align.models.policy import Policy

BUDGET = 100
GROUPS = comparisons(6, sizes=(3, 16), longest=30)  # some fit in a micro-batch
SETTINGS = {"prompts_per_step": 2, "epochs": 2, "tokens_per_micro_batch": BUDGET}
DISTINCT = [len({tuple(each.ids[: at + 1]) for each in one.sequences for at in range(len(each.ids))}) for one in GROUPS]
HELD_OUT = {"held_out": GROUPS[:2]}
ABOVE = sum(size > BUDGET for size in [*DISTINCT, *DISTINCT[:2]])
NOTE = f"{ABOVE} of 8 groups have more tokens than a micro-batch may have (100), up to {max(DISTINCT)}; they run "


def run(folder, *, model=None, objective=None, train=GROUPS, job=None, **changes):
    """Return the notes, metrics and trained weights of a run, and the rows of each pass of its decoder."""
    recorder, rows = Recorder(), []
    model = model or policy()
    objective = objective or preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02)
    job = HELD_OUT | (job or {})
    made = loop(folder, objective, train, model=model, progress=recorder, job=job, **(SETTINGS | changes))
    embedding = model.base.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:2].numel()))
    made.run()
    return recorder.notes, metrics(folder), weights(model), rows


def test_a_group_above_the_budget_runs_in_parts_and_changes_no_number(tmp_path):
    assert 0 < ABOVE < 8
    notes, lines, trained, rows = run(tmp_path / "parts")
    assert NOTE + "in parts, with each shared prefix computed once" in notes
    others, expected_lines, expected, all_rows = run(tmp_path / "whole", tokens_per_micro_batch=10**6)
    assert not any("they run" in note for note in others)
    assert max(rows) <= BUDGET < max(all_rows)
    for name in ("loss", "grad_norm", "held_out/loss", "start/held_out/loss", "rewards/margins", "logps/chosen"):
        assert [line[name] for line in lines if name in line] == pytest.approx(
            [line[name] for line in expected_lines if name in line], rel=1e-5, abs=1e-6
        ), name
    assert gap(trained, expected) <= 5e-5
    assert sum(line["tokens_computed"] for line in lines) == 2 * sum(DISTINCT)


def test_references_and_evaluations_compute_each_prefix_once(tmp_path):
    model = policy()
    made = loop(tmp_path, preference("dpo"), GROUPS, model=model, job=HELD_OUT, **SETTINGS)
    rows = []
    embedding = model.base.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    made.evaluator.evaluate()
    assert sum(rows) == sum(DISTINCT[:2])


def dropout_and_checkpointing():
    model = with_adapters(dropout=0.2)
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def long_rope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    return Policy(llama(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors})).train()


AT_ONCE = {
    "padded": (policy, {"forward": "plain"}, "a padded forward has no shared prefixes"),
    "router loss": (mixture_policy, {}, "the router auxiliary loss counts whole micro-batches"),
    "dropout": (dropout_and_checkpointing, {}, "gradient checkpointing would recompute dropout"),
    "long rope": (long_rope, {}, "longrope rotary embeddings depend on the longest sequence of a pass"),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_cannot_run_in_parts_runs_at_once_and_is_noted(tmp_path, name):
    make, job, reason = AT_ONCE[name]
    notes, *_, rows = run(tmp_path, model=make(), job=job, max_steps=1)
    noted = [note for note in notes if "they run" in note]
    assert len(noted) == 1 and f"they run at once: {reason}" in noted[0]
    assert max(rows) > BUDGET


def test_a_long_demonstration_is_not_cut(tmp_path):
    train = demonstrations(6, longest=200)
    notes, *_, rows = run(tmp_path, objective=supervised(), train=train, job={"held_out": ()})
    assert max(rows) == max(len(each.sequences[0].ids) for each in train) > BUDGET
    assert not any("they run" in note for note in notes)
