"""A step `synthesize` measures what each entry made, and the report shows it."""

import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from scripted_teacher import FAULTS, FORMS, ScriptedTeacher
from synthetic_runs import FAMILIES, lines, make, recipe, rows, write_recipe

from align import ChatEncoder, save_policy
from align.curate.embeddings.policy_states import PolicyStates
from align.curate.embeddings.poolings import POOLINGS
from align.errors import InputError
from align.evaluation.likelihood import likelihoods
from align.records import Demonstration, Message
from align.report import write_report
from align.rewards.verdicts import Verdict
from align.stages.responses.made_data import _difficulties, _embedding
from align.synth.items import DEMONSTRATION, PROMPT, Item
from align.testing import tiny_policy
from align.train.instruction_difficulty import instruction_difficulty
from align.workflow.recipe.load import load_recipe

MADE = "runs/made/prompts"
WORDS = ("amber", "basalt", "cobalt", "dew", "ether", "flint", "gravel", "humus", "ice", "jade")


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """The folder of a finished step whose teacher makes faults, and its report."""
    folder = tmp_path_factory.mktemp("made")
    report = make(folder, ScriptedTeacher({**dict.fromkeys(FORMS, 1), **dict.fromkeys(FAULTS, 0.3)}))
    return folder, report, json.loads((folder / MADE / "measures.json").read_text())


def test_every_entry_is_measured_and_its_counts_add_up(step):
    _, report, found = step
    assert list(found["families"]) == list(FAMILIES)
    for name, measured in found["families"].items():
        counts = report["entries"][name]
        assert (measured["asked"], measured["rows"]) == (counts["asked"], counts["kept"])
        assert measured["asked"] == measured["rows"] + sum(measured["dropped"].values())
    assert sum(sum(measured["dropped"].values()) for measured in found["families"].values()) > 0


def test_topics_without_a_row_are_not_covered(step):
    folder, _, found = step
    made = lines(folder / MADE / "lineage.jsonl")
    topics = {row["text"] for row in made if row["kind"] == "topic"}
    text = {row["id"]: row["text"] for row in made if row["kind"] == "topic"}
    questions = {row["id"]: text[row["parents"][0]] for row in made if row["entry"] == "questions"}
    asked = {text[parent] for row in made if row["entry"] == "questions" for parent in row["parents"]}
    longer = [questions[row["parents"][0]] for row in made if row["entry"] == "longer"]
    assert found["topics"]["num"] == len(topics)
    assert found["topics"]["covered"] == pytest.approx(len(asked | set(longer)) / len(topics))


def test_examples_show_the_row_and_what_it_was_made_from(step):
    folder, _, found = step
    example = next(one for one in found["examples"] if one["family"] == "longer")
    assert [one["family"] for one in example["lineage"]][0] == "questions"
    assert example["lineage"][-1]["family"] == "topics"
    assert example["text"] in {row["prompt"][0]["content"] for file in files(folder) for row in rows(folder, file)}


def files(folder):
    return [path.name for path in (folder / MADE).glob("*-prompts.jsonl")]


def test_the_measures_stand_in_the_report_of_the_run(step, tmp_path):
    folder, _, _ = step
    (folder / MADE / "manifest.json").write_text(json.dumps({"stage": "synthesize"}))
    text = write_report(folder / "runs/made", tmp_path / "report.html").read_text()
    assert "Synthetic data" in text and "Map of embeddings" in text and "hashed words" in text


def test_a_server_gives_no_embeddings(tmp_path):
    engine = {"server": {"base_url": "http://localhost:1"}}
    path = write_recipe(tmp_path, recipe(tmp_path, FAMILIES, engine=engine, embeddings="policy"))
    with pytest.raises(InputError, match="only a policy that runs in this process gives embeddings; use words"):
        load_recipe(path, ())


def test_a_policy_of_the_recipe_embeds_by_its_hidden_states(tmp_path):
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, tmp_path)
    settings = SimpleNamespace(embeddings="policy", policies=["sft", "rpo"])
    found = _embedding(settings, SimpleNamespace(inputs=SimpleNamespace(folders={"sft": tmp_path})))
    assert found["embedding"] == "mean hidden states of sft"
    texts = ["The cat is red.", "No"]
    expected = PolicyStates(policy, tokenizer, POOLINGS["mean"])(texts)
    np.testing.assert_allclose(found["embedder"](texts), expected / expected.norm(dim=1, keepdim=True), atol=1e-6)


def test_the_yield_of_a_topic_is_what_was_kept_of_what_was_asked_about_it(step):
    folder, _, found = step
    made = lines(folder / MADE / "lineage.jsonl")
    by_id, kept = {row["id"]: row for row in made}, Counter()

    def topic(row):
        while row["kind"] != "topic":
            row = by_id[row["parents"][0]]
        return row["text"]

    for row in made:
        if row["entry"] in ("questions", "longer"):
            kept[topic(row)] += 1
    lowest = found["topics"]["lowest"]
    assert [share for _, share in lowest] == sorted(share for _, share in lowest)
    for text, share in lowest:
        assert share == 0 or kept[text] / share == pytest.approx(round(kept[text] / share))
    assert 0 < len(lowest) <= 5 and any(share < 1 for _, share in lowest)


def test_demonstrations_have_the_difficulty_that_the_first_policy_finds(tmp_path):
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, tmp_path)
    messages = (Message("user", "Name a red thing."), Message("assistant", "The cat is red."))
    items = [Item(kind=kind, entry="a", messages=messages) for kind in (DEMONSTRATION, PROMPT)]
    context = SimpleNamespace(inputs=SimpleNamespace(folders={"sft": tmp_path}))
    found = _difficulties(SimpleNamespace(difficulty=True, policies=["sft"]), context, items)
    encoder, rows = ChatEncoder(tokenizer), [Demonstration(messages)]
    assert list(found) == [items[0].id]
    assert found[items[0].id] == pytest.approx(instruction_difficulty(rows, encoder, partial(likelihoods, policy))[0])
    assert _difficulties(SimpleNamespace(difficulty=False, policies=["sft"]), context, items) == {}


def odd_judge():
    """Rates answers by their length, and abstains from every third length."""

    def rate(texts):
        return tuple(Verdict(float(len(text)) if len(text) % 3 else None) for text in texts)

    return lambda groups: [rate(texts) for _, texts in groups]


def test_rewards_are_those_of_judges_and_not_a_column_of_the_source(tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(f'{{"prompt": "What is {word}?", "reward": "high"}}\n' for word in WORDS))
    families = {
        "longer": {"family": "revise_open_qa", "of": "seeds", "number": 1},
        "talks": {"family": "dialogues", "of": "longer", "turns": 1, "min_reward": 0},
    }
    judges = [{"name": "test_made_data:odd_judge"}]
    report = make(
        tmp_path, ScriptedTeacher(dict.fromkeys(FORMS, 1)), families, data={"seeds": {"path": str(path)}}, judges=judges
    )
    talks = [row for row in rows(tmp_path, "lineage.jsonl") if row["entry"] == "talks"]
    counts = report["entries"]["talks"]
    assert len(talks) == counts["kept"] == len(WORDS) - counts["dropped: not rated by a judge"] < len(WORDS)
    found = json.loads((tmp_path / MADE / "measures.json").read_text())["families"]
    assert found["longer"]["rewarded"] == 0 and found["talks"]["rewarded"] == len(talks) > 0
    assert found["talks"]["reward_mean"] == pytest.approx(np.mean([row["details"]["reward"] for row in talks]))
