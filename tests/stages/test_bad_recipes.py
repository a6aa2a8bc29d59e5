"""What is wrong with a recipe is told before anything runs: in one line, with the line in the file or the override."""

import random
import re

import pytest
import yaml
from middle_recipe import MIDDLE, recipe_in

from align.errors import InputError
from align.stages.base import EMBEDDINGS, REFERENCES
from align.workflow.recipe.expansion import RESERVED
from align.workflow.recipe.expansion import RUN_FILES as LEAVES


def line_of(text, *keys):
    """The line of a key, found by walking down its parents' indentation; a number is the item of a list."""
    lines, at, depth = text.splitlines(), -1, -1
    for key in keys:
        seen = -1
        while True:
            at += 1
            indent, dash, name = re.match(r"( *)(- )?([\w-]+)?", lines[at]).groups(default="")
            assert len(indent + dash) > depth, f"{key} is not there"
            seen += bool(dash)
            if key in (name, seen):
                depth = len(indent) if key == seen else len(indent + dash)
                break
        at -= key == seen  # an item's first key stands on its own line
    return at + 1


TO_DPO = "        beta: 0.2\n    train:\n"
# What is changed in the file, what is said, and of which key (as steps.dpo.policy) the line is given
WRONG = {
    "a cycle of policies": (
        [("    stage: sft\n    data: programs\n", "    stage: sft\n    data: programs\n    policy: dpo\n")],
        "steps depend on each other in a cycle",
        None,
    ),
    "a missing policy": (
        [("policy: general\n    data: rescored", "policy: generl\n    data: rescored")],
        "did you mean 'general'?",
        "steps dpo policy",
    ),
    "a missing source": ([("data: programs", "data: progams")], "did you mean 'programs'?", "steps code data"),
    "a missing source of a mixture": (
        [("      ratings: 1.0", "      rating: 1.0")],
        "did you mean 'ratings'?",
        "steps general data rating",
    ),
    "a missing source of an evaluation": (
        [("data: test\n", "data: tset\n")],
        "did you mean 'test'?",
        "steps evaluate tasks general data",
    ),
    "a missing step to replay": ([("step: code", "step: cod")], "did you mean 'code'?", "steps general replay step"),
    "a later step to replay": (
        [("step: code", "step: general")],
        "no earlier supervised step",
        "steps general replay step",
    ),
    "a missing step of a judge": (
        [
            (
                "judges:\n      - name: reward_model\n        settings:\n          path: step:rate\n  rescored",
                "judges:\n      - name: reward_model\n        settings:\n          path: step:rte\n  rescored",
            )
        ],
        "did you mean 'rate'?",
        "steps samples judges",
    ),
    "a missing source of prompts": (
        [("    prompts:\n      prompts: 8", "    prompts:\n      promts: 8")],
        "did you mean 'prompts'?",
        "steps samples prompts",
    ),
    "a reward model for a policy": (
        [("policy: general\n    data: rescored", "policy: rate\n    data: rescored")],
        "step 'rate' makes a reward model, not a policy",
        "steps dpo policy",
    ),
    "a policy for rows": (
        [("data: rescored", "data: code")],
        "step 'code' makes a policy, not groups of responses",
        "steps dpo data",
    ),
    "groups for a policy": (
        [("policy: general\n    data: rescored", "policy: samples\n    data: rescored")],
        "makes groups of responses, not a policy",
        "steps dpo policy",
    ),
    "groups to be evaluated": (
        [("policies: [general, rpo]", "policies: [samples]")],
        "makes groups of responses, not a policy",
        "steps evaluate policies",
    ),
    "a round's policy of the wrong kind": (
        [("    rounds: 3\n", "    rounds: 3\n    policy: rate\n")],
        "makes a reward model, not a policy",
        "steps rpo policy",
    ),
    "a round's unknown prompts": (
        [("    on_policy: true\n    data: prompts", "    on_policy: true\n    data: promts")],
        "did you mean 'prompts'?",
        "steps rpo data",
    ),
    "scores for a judge": (
        [("            path: step:rate", "            path: step:samples")],
        "makes groups of responses, not a policy or a reward model",
        "steps rpo generate judges",
    ),
    "an unknown key at the top": ([("accounting:", "acounting:")], "did you mean 'accounting'?", "acounting"),
    "an unknown key of a source": ([("    limit: 5", "    limt: 5")], "did you mean 'limit'?", "data test limt"),
    "an unknown key of a step": ([("min_chosen", "mn_chosen")], "did you mean 'min_chosen'?", "steps dpo mn_chosen"),
    "an unknown key of a step in rounds": (
        [("    rounds: 3", "    round: 3")],
        "did you mean 'rounds'?",
        "steps rpo round",
    ),
    "an unknown key below a step": (
        [("      num_responses: 3", "      num_response: 3")],
        "did you mean 'num_responses'?",
        "steps samples sampling num_response",
    ),
    "an unknown key of a round's samples": (
        [("    generate:\n      prompts:", "    generate:\n      promts:")],
        "did you mean 'prompts'?",
        "steps rpo generate promts",
    ),
    "an unknown key of a loss": ([("        beta: 0.2", "        bta: 0.2")], "did you mean 'beta'?", "steps dpo loss"),
    "an unknown key of a judge": (
        [
            (
                "      - name: reward_model\n        settings:\n          path: step:rate\n  dpo",
                "      - name: reward_model\n        setings:\n          path: step:rate\n  dpo",
            )
        ],
        "did you mean 'settings'?",
        "steps rescored judges 0 setings",
    ),
    "an unknown key of an evaluation": (
        [("max_new_tokens: 8", "max_new_token: 8")],
        "did you mean 'max_new_tokens'?",
        "steps evaluate tasks general max_new_token",
    ),
    "a share out of range": ([("share: 0.02", "share: 1.5")], "less than 1", "steps general replay share"),
    "a weight of nothing": ([("shown: 2.0", "shown: 0.0")], "above 0", "steps general data shown"),
    "no round": ([("rounds: 3", "rounds: 0")], "greater than or equal to 1", "steps rpo rounds"),
    "a limit of nothing": ([("limit: 5", "limit: 0")], "greater than or equal to 1", "data test limit"),
    "a vocabulary of nothing": (
        [("vocab_size: 300", "vocab_size: 0")],
        "greater than or equal to 1",
        "steps base vocab_size",
    ),
    "prompts of nobody": (
        [("    prompts:\n      prompts: 8\n    sampling", "    prompts:\n      prompts: 0\n    sampling")],
        "a count of at least 1",
        "steps samples prompts",
    ),
    "an unknown stage": ([("stage: score", "stage: scre")], "did you mean 'score'?", "steps rescored stage"),
    "a step without a stage": ([("    stage: score\n", "")], "a step needs a stage", "steps rescored"),
    "an unknown policy of what is exhausted": (
        [("stopping_strategy: all_exhausted", "stopping_strategy: again")],
        "'first_exhausted', 'all_exhausted' or 'down_weight'",
        "steps general stopping_strategy",
    ),
    "a replayed source beside itself": (
        [("      shown: 2.0", "      programs: 2.0")],
        "is a source of the step itself, so it cannot be replayed",
        "steps general replay",
    ),
    "samples for rounds of given rows": (
        [("    on_policy: true\n", "")],
        "requires on_policy: true",
        "steps rpo generate",
    ),
    "a step and a source of one name": (
        [("  test:", "  samples:\n    path: tasks:general\n    limit: 3\n  test:")],
        "'samples' is both a step and a source of data",
        "steps rescored data",
    ),
    "a model that is both loaded and new": (
        [("    vocab_size: 300", "    path: runs/other\n    from_config: {{model_type: llama}}")],
        "give either path or from_config",
        "steps base from_config",
    ),
    "a launch of what runs in one process": (
        [("    vocab_size: 300", "    vocab_size: 300\n    launch: launch/cpu-1.yaml")],
        "runs in one process",
        "steps base launch",
    ),
    "an unknown judge": (
        [
            (
                "judges:\n      - name: reward_model\n        settings:\n          path: step:rate\n  dpo",
                "judges:\n      - name: reward_modl\n        settings:\n          path: step:rate\n  dpo",
            )
        ],
        "did you mean 'reward_model'?",
        "steps rescored judges 0 name",
    ),
    "an unknown setting of a judge": (
        [("          path: step:rate\n  dpo", "          pth: step:rate\n  dpo")],
        "did you mean 'path'?",
        "steps rescored judges 0 settings pth",
    ),
    "a judge's setting of the wrong kind": (
        [("          path: step:rate\n  dpo", "          path: 5\n  dpo")],
        "a valid string (got 5)",
        "steps rescored judges 0 settings path",
    ),
    "a judge twice": (
        [("  dpo:", "      - name: reward_model\n        settings:\n          path: step:rate\n  dpo:")],
        "judge 'reward_model' is listed twice",
        "steps rescored judges",
    ),
    "an unknown judge of a round": (
        [("        - name: reward_model\n          settings:\n            path: step:rate", "        - name: oracle")],
        "no judge is called 'oracle'",
        "steps rpo generate judges 0 name",
    ),
    "an unknown setting of an engine": (
        [("      num_responses: 3\n", "      num_responses: 3\n    engine:\n      local:\n        batch_siz: 3\n")],
        "did you mean 'batch_size'?",
        "steps samples engine local batch_siz",
    ),
    "a server's setting of the wrong kind": (
        [("      num_responses: 3\n", "      num_responses: 3\n    engine:\n      server:\n        base_url: 3\n")],
        "a valid string (got 3)",
        "steps samples engine server base_url",
    ),
    "two engines": (
        [
            (
                "      num_responses: 3\n",
                "      num_responses: 3\n    engine:\n      server:\n        base_url: u\n      local:\n"
                "        batch_size: 3\n",
            )
        ],
        "give one engine, not local an",
        "steps samples engine",
    ),
    "an unknown task": (
        [("        data: test\n", "        data: test\n        task: ifevl\n")],
        "did you mean 'ifeval'?",
        "steps evaluate tasks general task",
    ),
    "a task of other rows": (
        [("        data: test\n", "        data: test\n        task: gsm8k\n")],
        "tasks:general does not generate rows for task 'gsm8k'",
        "steps evaluate tasks general task",
    ),
    "rows of no task": (
        [
            ("    split: test\n    limit: 5", "    limit: 5"),
            ("  test:\n    path: tasks:general", "  test:\n    path: a.csv"),
        ],
        "cannot infer the task from test",
        "steps evaluate tasks general",
    ),
    "a task without a policy": (
        [
            ("    split: test\n    limit: 5", "    limit: 5"),
            ("  test:\n    path: tasks:general", "  test:\n    path: a.csv"),
            ("        data: test\n        max_new_tokens: 8\n", "        data: test\n        task: alpaca_eval\n"),
        ],
        "alpaca_eval evaluates no policy; run `align evaluate --task alpaca_eval",
        "steps evaluate tasks general task",
    ),
    "a setting that the task does not use": (
        [("        data: test\n", "        data: test\n        tasks_folder: own\n")],
        "has no effect on task general",
        "steps evaluate tasks general tasks_folder",
    ),
    "an unknown rate": (
        [("        data: test\n", "        data: test\n        metrics: [nl, correct]\n")],
        "general has no metric 'nl'; available: correct",
        "steps evaluate tasks general metrics",
    ),
    "no rate": (
        [("        data: test\n", "        data: test\n        metrics: []\n")],
        "name at least one",
        "steps evaluate tasks general metrics",
    ),
    "an evaluation of nobody": (
        [("policies: [general, rpo]", "policies: []")],
        "name at least one step",
        "steps evaluate policies",
    ),
    "an evaluation whose name has a space and an unknown key": (
        [("      general:\n        data: test\n", "      in general:\n        data: test\n        dat: a\n")],
        "did you mean 'data'?",
        None,
    ),
    "an evaluation whose name is no file's": (
        [("      general:\n        data: test\n", "      in/general:\n        data: test\n")],
        "'in/general' is used as a file name, so it must not contain '/'",
        None,
    ),
    "a step's groups to be evaluated": ([("        data: test", "        data: samples")], "no source of data", None),
    "two evaluations of one name": (
        [
            (
                "  evaluate:\n",
                "  more:\n    stage: evaluate\n    policies: [dpo]\n    tasks:\n      general:\n        data: test\n"
                "  evaluate:\n",
            )
        ],
        "results column 'general' is also used by steps.",
        None,
    ),
    "prompts that training splits": (
        [("  prompts:\n    path: tasks:general\n", "  prompts:\n    path: tasks:general\n    held_out: 0.1\n")],
        "prompts has held_out 0.1 for training",
        "steps samples data",
    ),
    "an evaluation of rows that are trained on": (
        [
            ("        data: test\n", "        data: ratings\n"),
            ("    responses: 3\n", "    responses: 3\n    held_out: 0.5\n"),
        ],
        "ratings has held_out 0.5 for training",
        "steps evaluate tasks general data",
    ),
    "the best of nothing held out": (
        [(f"{TO_DPO}", f"{TO_DPO}      keep: best\n")],
        "no row is held out: set held_out of rescored",
        "steps dpo train keep",
    ),
    "an evaluation of nothing held out": (
        [(f"{TO_DPO}", f"{TO_DPO}      evaluate_every: 3\n")],
        "no row is held out: set held_out of rescored",
        "steps dpo train evaluate_every",
    ),
    "a tracker that is not there": (
        [(f"{TO_DPO}", f"{TO_DPO}      trackers: [tensorbord]\n")],
        "no tracker called 'tensorbord' is installed",
        "steps dpo train trackers",
    ),
    "subsets of nothing held out": (
        [("    loss: bt\n", "    loss: bt\n    subset: kind\n")],
        "no row is held out: set held_out of ratings",
        "steps rate subset",
    ),
    "a tokenizer for a model that has one": (
        [("    vocab_size: 300", "    vocab_size: 300\n    path: somebody/model")],
        "somebody/model already has a tokenizer",
        "steps base vocab_size",
    ),
    "two tokenizers": (
        [("  chat_template: chatml", "  chat_template: chatml\n  tokenizer: somebody/model")],
        "would take the place of 'somebody/model'",
        "steps base vocab_size",
    ),
    "two policies to start from": (
        [("  chat_template: chatml", "  chat_template: chatml\n  path: somebody/model")],
        "give either path",
        "policy",
    ),
    "no policy to start from": (
        [("  from_config: {{model_type: llama, hidden_size: 16}}\n", "")],
        "step 'base' starts from it",
        "policy",
    ),
    "a constant rate that ends elsewhere": (
        [(f"{TO_DPO}", f"{TO_DPO}      min_lr_ratio: 0.1\n")],
        "0.1 has no effect with a constant schedule",
        "steps dpo train min_lr_ratio",
    ),
    "what happens when one source is exhausted": (
        [("    data: programs\n", "    data: programs\n    stopping_strategy: first_exhausted\n")],
        "'first_exhausted' is for several sources, and 'programs' is one",
        "steps code stopping_strategy",
    ),
    "an unknown kind of rows": (
        [("  programs:\n    path: tasks:code", "  programs:\n    path: tasks:coda")],
        "did you mean 'code'?",
        "data programs path",
    ),
    "an unknown split of rows": ([("split: test", "split: tset")], "did you mean 'test'?", "data test split"),
    "a file's format for rows that are made": (
        [("    limit: 5", "    limit: 5\n    format: native")],
        "'native' has no effect on tasks:general",
        "data test format",
    ),
    "responses of rows that are read": (
        [("  ratings:\n    path: tasks:general", "  ratings:\n    path: rows.jsonl")],
        "3 has no effect on rows.jsonl",
        "data ratings responses",
    ),
    "a seed of rows that are read": (
        [("  shown:\n    path: tasks:general", "  shown:\n    path: rows.jsonl")],
        "1 has no effect on rows.jsonl",
        "data shown seed",
    ),
    "constraints on rows that are trained on": (
        [
            (
                "    limit: 10\n    responses: 3\n",
                "    limit: 10\n    responses: 3\n    constraints: {{max_constraints: 1}}\n",
            )
        ],
        "ratings has constraints",
        "steps general data ratings",
    ),
    "a step whose name is no folder's": (
        [("  dpo:", "  d po:")],
        "a step name is also a folder name",
        None,
    ),
    "a step that is called as the run's table": (
        [("  dpo:", "  table.json:")],
        "'table.json' is the name of another file of a run",
        None,
    ),
    "a round without a number of prompts": ([("      prompts:\n        prompts: 8\n", "")], "is unlimited", None),
}


def changed(changes):
    text = MIDDLE
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_by_its_line_before_anything_runs(tmp_path, case):
    changes, said, key = WRONG[case]
    text = changed(changes)
    with pytest.raises(InputError) as caught:
        recipe_in(tmp_path, text)
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert not (tmp_path / "runs").exists()
    place = re.match(rf"{re.escape(str(tmp_path / 'recipe.yaml'))}:(\d+): (.+?): ", message)
    assert place, message
    if key is not None:
        wanted = [int(part) if part.isdigit() else part for part in key.split()]
        assert int(place[1]) == line_of(text, *wanted), message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps.dpo.policy=generl", "steps.dpo.policy: no step is called 'generl'"),
        ("steps.dpo.loss.beta=1", "steps.dpo.loss.beta: unknown key"),
        ("steps.general.replay.share=2.0", "steps.general.replay.share: "),
        ("steps.rpo.rounds=0", "steps.rpo.rounds: "),
        ("steps.rpo.generate.promts={prompts: 1}", "steps.rpo.generate.promts: unknown key"),
        ("data.test.limit=0", "data.test.limit: "),
        ("steps.more={stage: sft, data: nowhere, train: {learning_rate: 1.0}}", "steps.more.data: no source of data"),
    ],
)
def test_an_override_at_fault_is_named_in_place_of_the_line(tmp_path, override, said):
    with pytest.raises(InputError) as caught:
        recipe_in(tmp_path, MIDDLE, "seed=1", override)
    assert str(caught.value).startswith(f"override {override!r}: {said}")


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_keys_in_the_file_changes_the_line_and_nothing_else(tmp_path, seed):
    values = yaml.safe_load(MIDDLE.format(runs=tmp_path / "runs"))
    values["steps"]["dpo"]["policy"] = "generl"
    shuffled = shuffle(values, random.Random(seed))
    shuffled["steps"] = {name: shuffled["steps"][name] for name in values["steps"]}  # whose order has a meaning
    text = yaml.safe_dump(shuffled, sort_keys=False).replace("{", "{{").replace("}", "}}")
    with pytest.raises(InputError) as caught:
        recipe_in(tmp_path, text)
    assert f"recipe.yaml:{text.splitlines().index('    policy: generl') + 1}: steps.dpo.policy: " in str(caught.value)


def shuffle(values, draw):
    """The same mappings with their keys in another order."""
    if not isinstance(values, dict):
        return [shuffle(each, draw) for each in values] if isinstance(values, list) else values
    return {key: shuffle(values[key], draw) for key in draw.sample(list(values), len(values))}


def test_every_name_that_a_run_needs_beside_its_steps_is_reserved():
    assert {*LEAVES, EMBEDDINGS, REFERENCES} <= set(RESERVED)


def test_an_override_below_what_is_wrong_is_named(tmp_path):
    with pytest.raises(InputError) as caught:
        recipe_in(tmp_path, MIDDLE, "steps.dpo.loss.settings.beta=0")
    assert str(caught.value).startswith("override 'steps.dpo.loss.settings.beta=0' and ")
    assert ": steps.dpo.loss: loss 'dpo': beta" in str(caught.value)
