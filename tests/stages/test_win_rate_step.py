"""Win rates of a step of a recipe, with the table of judged pairs that it leaves."""

import json

import pytest
from small_runs import SMALL_POLICY, run

from align.errors import InputError
from align.evaluation.pairs.forms import read_games
from align.rewards.verdicts import Game, Verdict

STEP = """
run: small
runs: {{runs}}
policy: {{{{from_config: {{{{model_type: llama}}}}}}}}
data: {{{{asked: {{{{path: {folder}/asked.jsonl}}}}}}}}
steps:
  wins:
    stage: evaluate
    policies: []
    tasks:
      wins:
        data: asked
        task: win_rate
        responses: [{folder}/ours.jsonl, {folder}/baseline.jsonl]
        judges: [{{{{name: "test_win_rate_step:of_the_first"}}}}]
"""
NUM_PROMPTS = 4


def of_the_first():
    """A judge with probabilities that depend on the position alone."""
    return lambda groups: [(Verdict(None, games=[Game(0.75, {"m": -0.3}), Game(0.25)]),) * 2 for _ in groups]


@pytest.fixture
def recipe(tmp_path):
    rows = [{"prompt": f"Question {number}"} for number in range(NUM_PROMPTS)]
    for name, response in (("asked", {}), ("ours", {"response": "long"}), ("baseline", {"response": "no"})):
        lines = (json.dumps({**row, **response}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return STEP.format(folder=tmp_path)


def test_a_step_reports_the_rules_that_count_a_pair_and_writes_the_table(tmp_path, recipe):
    run(tmp_path, text=recipe)
    folder = tmp_path / "runs/small"
    (scores,) = json.loads((folder / "table.json").read_text()).values()
    assert {name: found["value"] for name, found in scores.items() if "equal_length" not in name} == {
        "wins win_rate.both_games": 0.5,
        "wins win_rate.tie_if_inconsistent": 0.5,
    }
    lines = [json.loads(line) for line in (folder / "wins/wins.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [f"Question {number}" for number in range(NUM_PROMPTS)]
    assert all(line["longer_by"] == 2 for line in lines)
    games = [read_games([line], "the step's file") for line in lines]
    assert all([game.verdict for game in each] == [0.75, 0.25] for each in games)
    assert all([game.order for game in each] == ["a first", "b first"] for each in games)
    assert {(game.a, game.b, game.judge) for each in games for game in each} == {
        ("long", "no", "test_win_rate_step:of_the_first")
    }
    assert all(
        line["parts"] == {"win_rate.both_games": [1, 2], "win_rate.tie_if_inconsistent": [0.5, 1]} for line in lines
    )


def test_a_metric_that_counts_no_pair_is_an_error_if_it_is_asked_for(tmp_path, recipe):
    with pytest.raises(InputError, match=r"'win_rate.consistent' counts none of the rows"):
        run(tmp_path, text=recipe + "        metrics: [win_rate.consistent]\n")


def test_a_judge_may_be_a_step_of_the_recipe(tmp_path, recipe):
    """`step:NAME` was the name of a folder that is not there, and the evaluation ran before the step."""
    changes = {
        "policy: {{from_config: {{model_type: llama}}}}\n": SMALL_POLICY[SMALL_POLICY.index("policy:") :],
        "data: {{": 'data: {{pairs: {{path: "tasks:general", limit: 4, responses: 2}}, ',
        "steps:\n": "steps:\n  base: {{stage: import, vocab_size: 300}}\n"
        "  rate: {{stage: reward_model, data: pairs, loss: bt, train: {{learning_rate: 1.0e-3, max_steps: 1}}}}\n",
        '{{name: "test_win_rate_step:of_the_first"}}': '{{name: reward_model, settings: {{path: "step:rate"}}}}',
    }
    for old, new in changes.items():
        assert recipe.count(old) == 1
        recipe = recipe.replace(old, new)
    made, _ = run(tmp_path, text=recipe)
    lines = [json.loads(line) for line in (tmp_path / "runs/small/wins/wins.jsonl").read_text().splitlines()]
    games = [game for line in lines for game in line["games"]]
    assert [game["verdict"] for game in games] == [
        "A>B" if ours > theirs else "B>A" for ours, theirs in (game["raw"]["rewards"] for game in games)
    ]
    assert len(games) == NUM_PROMPTS and made["wins"]["counts"]["wins"]["void_games"] == 0
