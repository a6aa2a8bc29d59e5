"""`align init` writes a recipe that fits the rows, and that runs."""

import json
import sys

import pytest
import yaml

from align.cli import main
from align.commands.interactive.init import init
from align.errors import InputError
from align.models.policy import save_policy
from align.testing import tiny_policy
from align.workflow.recipe.load import load_recipe

NUMBER = 40
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
RATED = {"helpfulness": 2, "correctness": 1, "coherence": 3, "complexity": 1, "verbosity": 1}
SCORED = [{"content": f"answer {number}", "reward": number / 4} for number in range(4)]
ROWS = {  # name -> (a row, stage of its step, name of its loss)
    "messages": ({"messages": MESSAGES}, "sft", None),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "sft",
        None,
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, "sft", None),
    "trl_pairs": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference", "dpo"),
    "implicit_prompt": (
        {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "b"}]},
        "preference",
        "dpo",
    ),
    "scored_pairs": (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 2.0, "score_rejected": 1.0},
        "preference",
        "dpo",
    ),
    "scored_groups": ({"prompt": "q", "responses": SCORED}, "preference", "rpo_bwd_kl"),
    "rated": ({"prompt": "q", "response": "a", **RATED}, "reward_model", None),
    "prompts": ({"prompt": "q"}, "generate", None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("init")
    for name, (row, _, _) in ROWS.items():
        (found / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * NUMBER)
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, found / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(found / "base")
    policy.hf.save_pretrained(found / "base")
    return found


@pytest.fixture
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for recipe in folder.glob("*.yaml"):
        recipe.unlink()
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_the_step_follows_from_the_columns(in_folder, name):
    _, stage, loss = ROWS[name]
    main_with("init", f"{name}.jsonl", "--policy", "./model")
    ((step, settings),) = load_recipe(in_folder / "my-recipe.yaml").steps.items()
    assert settings.stage == stage
    assert loss is None or (step, settings.loss.name) == ("dpo" if loss == "dpo" else "rpo", loss)


def main_with(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["align", *arguments])
        main()


def test_several_files_become_one_recipe_with_the_steps_in_order(in_folder, capsys):
    names = ["scored_groups", "trl_pairs", "scored_pairs", "rated", "sharegpt", "prompts"]
    init([f"{name}.jsonl" for name in names], "./model", in_folder / "all.yaml", lora=True)
    recipe = load_recipe(in_folder / "all.yaml")
    assert list(recipe.steps) == ["sft", "rate", "dpo", "dpo-2", "rpo", "samples"]
    assert recipe.steps["rate"].head.attributes == tuple(sorted(RATED))
    assert recipe.policy.lora is not None
    assert f"{NUMBER} rows read as sharegpt: dialogues to imitate" in capsys.readouterr().out


def test_a_split_and_the_choice_to_skip_bad_rows_are_written(in_folder, capsys):
    (in_folder / "splits").mkdir(exist_ok=True)
    rows = [ROWS["trl_pairs"][0]] * 29 + [{"prompt": "q", "chosen": " ", "rejected": "bad"}]
    for name in ("train", "test"):
        (in_folder / f"splits/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"row 30: a response is empty; correct the row, or give --on-error skip"):
        init(["splits"], "./model", in_folder / "my-recipe.yaml", lora=True, reading={"split": "test"})
    assert not (in_folder / "my-recipe.yaml").exists()
    main_with("init", "splits", "--policy", "./model", "--split", "test", "--on-error", "skip")
    assert "29 rows read as preference: pairs; dropped: a response is empty 1\n" in capsys.readouterr().out
    source = load_recipe(in_folder / "my-recipe.yaml").data["splits"]
    assert (source.split, source.on_error) == ("test", "skip")


@pytest.mark.parametrize("name", ["0.scores", "1e5", "null", "on"])
def test_a_file_name_that_yaml_does_not_read_as_text_is_extended(in_folder, name):
    (in_folder / f"{name}.jsonl").write_text(json.dumps(ROWS["trl_pairs"][0]) + "\n")
    init([f"{name}.jsonl"], "./model", in_folder / "odd.yaml", lora=True)
    recipe = load_recipe(in_folder / "odd.yaml")
    assert [recipe.steps["dpo"].data] == list(recipe.data) == [f"{name.partition('.')[0]}_rows"]


def test_nothing_is_held_out_of_rows_with_few_prompts(in_folder):
    rows = [{"prompt": "the same", "completion": f"answer {number}"} for number in range(NUMBER)]
    (in_folder / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init(["same.jsonl"], "./model", in_folder / "same.yaml", lora=True)
    assert load_recipe(in_folder / "same.yaml").data["same"].held_out == 0


def test_a_dialogue_without_an_answer_among_others_is_an_error_or_skipped(in_folder, capsys):
    rows = [{"messages": MESSAGES}] * 3 + [{"messages": MESSAGES[:1]}]
    (in_folder / "mostly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"row 4: the dialogue has no answer, and 3 others have one; correct the row"):
        init(["mostly.jsonl"], "./model", in_folder / "mostly.yaml", lora=True)
    init(["mostly.jsonl"], "./model", in_folder / "mostly.yaml", lora=True, reading={"on_error": "skip"})
    assert "3 rows read as messages: dialogues to imitate; dropped: no answer 1\n" in capsys.readouterr().out
    assert list(load_recipe(in_folder / "mostly.yaml").steps) == ["sft"]


def test_prompts_that_know_their_answer_get_the_judge_for_it(in_folder):
    rows = [{"prompt": "2 + 2?", "ground_truth": "4"}, {"prompt": "Add.", "tests": ["assert add(1, 2) == 3"]}]
    (in_folder / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init(["known.jsonl"], "./model", in_folder / "known.yaml", lora=True)
    judges = load_recipe(in_folder / "known.yaml").steps["samples"].judges
    assert [judge.name for judge in judges] == ["executed_tests", "ground_truth"]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_a_file_may_be_called_as_a_step_and_have_columns_of_its_own(in_folder, name):
    column = {"sft": "response", "dpo": "chosen", "kto": "completion"}[name]
    rows = [{"q": "question", "a": f"answer {number}", "label": number % 2 == 0} for number in range(4)]
    if name == "dpo":
        rows = [{**row, "rejected": "no"} for row in rows]
    (in_folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main_with("init", f"{name}.jsonl", "--policy", "./model", "--column", "prompt=q", "--column", f"{column}=a")
    recipe = load_recipe(in_folder / "my-recipe.yaml")
    assert list(recipe.steps) == [name] and list(recipe.data) == [f"{name}_rows"]
    assert recipe.data[f"{name}_rows"].columns == {"prompt": "q", column: "a"}


def test_values_fit_the_rows_and_the_model(in_folder):
    (in_folder / "few.jsonl").write_text(json.dumps(ROWS["trl_pairs"][0]) + "\n")
    init(["few.jsonl"], "./base", in_folder / "few.yaml", lora=False)
    recipe = load_recipe(in_folder / "few.yaml")
    assert recipe.steps["dpo"].train.prompts_per_step == 1
    assert recipe.data["few"].held_out == 0
    assert recipe.policy.lora is None
    assert recipe.policy.chat_template == "chatml"  # the tokenizer has none


@pytest.mark.parametrize(("labels", "stage"), [((True, False), "preference"), ((True,), "sft")])
def test_single_responses_with_both_labels_are_for_kto(in_folder, labels, stage):
    rows = [{"prompt": "q", "completion": f"a {label}", "label": label} for label in labels]
    (in_folder / "liked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init(["liked.jsonl"], "./model", in_folder / "liked.yaml", lora=False)
    (settings,) = load_recipe(in_folder / "liked.yaml").steps.values()
    assert settings.stage == stage
    if stage == "preference":
        assert (settings.loss.name, settings.train.prompts_per_step) == ("kto", 2)


def test_every_key_of_the_recipe_has_a_comment_or_says_what_it_is(in_folder):
    init(["trl_pairs.jsonl"], "./model", in_folder / "r.yaml", lora=True)
    text = (in_folder / "r.yaml").read_text()
    commented = [line for line in text.splitlines() if "#" in line]
    assert len(commented) >= 12
    is_off = [
        line for line in commented if line.startswith(" ") and line.strip().startswith("# ") and "NAME" not in line
    ]
    off = [line.replace("# ", "", 1) for line in is_off]
    keys = {line.strip().partition(":")[0] for line in off}
    assert {"gradient_checkpointing", "max_length", "precision", "tokens_per_micro_batch"} <= keys
    on = text
    for line in off:
        on = on.replace(line.replace(line.lstrip(), f"# {line.lstrip()}"), line)
    assert on != text
    (in_folder / "on.yaml").write_text(on)
    load_recipe(in_folder / "on.yaml")  # what is commented out can be commented in
    assert yaml.safe_load(text)["run"] == "my-model"


WRONG = {
    "a recipe that exists": (["trl_pairs.jsonl", "--policy", "./model", "--out", "model/config.json"], "exists; name"),
    "a model that is not there": (["trl_pairs.jsonl", "--policy", "./gone"], "no such folder"),
    "rows that are not there": (["gone.jsonl", "--policy", "./model"], "no such file or folder"),
    "splits of which none is named": (["halves", "--policy", "./model"], "contains several splits"),
    "unrated responses": (
        ["unrated.jsonl", "--policy", "./model"],
        "unrated.jsonl: the responses have no rewards; align",
    ),
    "rows of two kinds": (["two.jsonl", "--policy", "./model"], "write them into two files"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_written_is_one_line(in_folder, capsys, case):
    rows = [{"prompt": "q", "responses": SCORED}, {"prompt": "q", "metadata": {}}]
    (in_folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (in_folder / "unrated.jsonl").write_text(json.dumps({"prompt": "q", "completions": ["a", "b"]}) + "\n")
    (in_folder / "halves").mkdir(exist_ok=True)
    for name in ("train", "test"):
        (in_folder / f"halves/{name}.jsonl").write_text(json.dumps(ROWS["prompts"][0]))
    arguments, said = WRONG[case]
    with pytest.raises(SystemExit) as ended:
        main_with("init", *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said in line
    assert not (in_folder / "my-recipe.yaml").exists()


def test_nothing_is_written_where_the_recipe_would_not_load(in_folder):
    with pytest.raises(InputError):
        init(["trl_pairs.jsonl"], "./model/config.json", in_folder / "r.yaml", lora=True)
    assert not (in_folder / "r.yaml").exists()
