"""A `curate` step in a recipe: what it reads, what later steps read of it, and its errors."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet
from small_runs import SMALL_POLICY, run, written
from transformers import AutoTokenizer

from align.data.reading import read
from align.data.writing import write
from align.errors import InputError
from align.records import Demonstration, Message, Prompt
from align.report.page import render_markdown
from align.report.run_folder import read_run
from align.rewards import llm_judge
from align.rewards.llm_judge import respond
from align.workflow.estimate import estimate
from align.workflow.launcher import Command
from align.workflow.recipe.load import load_recipe
from align.workflow.results.tables import run_tables

RECIPE = (
    SMALL_POLICY
    + """\
data:
  rows: {{path: "{folder}/rows.jsonl"}}
  more: {{path: "{folder}/more.jsonl"}}
  test: {{path: "{folder}/test.jsonl"}}
steps:
  base: {{stage: import, vocab_size: 300}}
  clean: {{stage: curate, data: [rows, more]}}
  sft: {{stage: sft, data: clean, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
  scores: {{stage: evaluate, policies: [sft], tasks: {{nll: {{data: test, task: nll}}}}}}
"""
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def shown(prompt, answer="Certainly."):
    return Demonstration((Message("user", prompt), Message("assistant", answer)))


def question(number):
    return f"Please tell me about the {ORDINALS[number]} chapter of this {ORDINALS[-number]} book"


@pytest.fixture
def folder(tmp_path):
    """Seven rows in one source; of the other, one is a copy, one contains a test item, and one is new."""
    write(tmp_path / "rows.jsonl", [shown(question(number)) for number in range(7)])
    test = "Which of the planets is the largest of them all?"
    write(tmp_path / "more.jsonl", [shown(question(1).upper()), shown(f"Q: {test}"), shown("Say hello to me.")])
    write(tmp_path / "test.jsonl", [shown(test, "Jupiter, by far.")])
    return tmp_path


def text_of(folder, **changes):
    text = RECIPE.replace("{folder}", str(folder))
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def test_later_steps_train_on_the_cleaned_rows_and_evaluations_name_the_test_sets(folder):
    made, told = run(folder, text=text_of(folder))
    report = made["clean"]["curation"]
    assert report["sources"]["rows"] | report["sources"]["more"] | {"kept": 0} == {
        "rows": 3,
        "kept": 0,
        "exact duplicates": 1,
        "test items": 1,
    }
    total = sum((Counter(counts) for counts in report["sources"].values()), Counter())
    assert total == {"rows": 10, "kept": 8, "exact duplicates": 1, "test items": 1}
    assert made["sft"]["rows"]["trained"] == 8
    page = render_markdown([read_run(folder / "runs/small")])
    (line,) = [line for line in page.partition("Data rows")[2].splitlines() if line.startswith("| clean")]
    assert all(part in line for part in ("| 10 | 10 |", "test items 1", "exact duplicates 1", "kept 8"))
    assert report["tests"]["test"]["rows"] == {"more": 1}
    assert any("10 rows" in note and "8 kept" in note for note in told.notes)
    kept = read(str(folder / "runs/small/clean/rows.jsonl")).records
    assert {one.metadata["curated"]["source"] for one in kept} == {"rows", "more"}
    titles = [str(table.title) for table in run_tables(made, folder / "runs/small") if table.row_count]
    assert any(title.startswith("Curated rows") for title in titles)


def test_a_changed_test_set_curates_again_and_changed_training_does_not(folder):
    first, _ = run(folder, text=text_of(folder), until="clean")
    _, told = run(folder, "steps.sft.train.learning_rate=0.002", text=text_of(folder), until="clean")
    assert not any("clean: runs" in note for note in told.notes)
    write(folder / "test.jsonl", [shown(question(0), "The first one, then.")])
    second, _ = run(folder, text=text_of(folder), until="clean")
    assert first["clean"]["curation"]["tests"]["test"]["rows"] == {"more": 1}
    assert second["clean"]["curation"]["tests"]["test"]["rows"] == {"rows": 1}


def test_skipped_rows_of_a_source_are_counted(folder):
    with (folder / "more.jsonl").open("a") as stream:
        messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": " "}]
        stream.write(json.dumps({"messages": messages, "metadata": {}}) + "\n")
    text = text_of(folder, **{'more.jsonl"': 'more.jsonl", on_error: skip'})
    made, _ = run(folder, text=text, until="clean")
    assert sum(made["clean"]["curation"]["not_read"].values()) == 1
    assert made["clean"]["curation"]["sources"]["more"]["rows"] == 3


def test_estimates_count_rows_and_name_the_test_sets(folder):
    path = written(folder, text_of(folder))
    found = {each.name: each for each in estimate(load_recipe(path))}
    assert (found["clean"].rows, found["clean"].bound, found["clean"].parts) == (10, True, {"test sets": "test"})
    assert found["sft"].rows == 10
    text = text_of(folder, **{"data: [rows, more]}}": "data: rows, rank: {{by: ifd, policy: base}}}}"})
    found = {each.name: each for each in estimate(load_recipe(written(folder, text)))}
    assert (found["clean"].flops, found["clean"].seconds) == (None, None)  # not predicted from steps without a model
    assert "ranking policy" in found["clean"].unknown


def test_no_row_left_is_a_failed_step(folder):
    write(folder / "more.jsonl", [shown("Which of the planets is the largest of them all?")])
    text = text_of(folder, **{"data: [rows, more]": "data: more"})
    with pytest.raises(Exception, match="no row is kept: 1 rows; 1 test items"):
        run(folder, text=text, until="clean")


WRONG = {
    "steps.clean.data": ("[rows, rows]", "each once"),
    "steps.clean.launch": ("launch/ddp-2cpu.yaml", "one process"),
    "steps.clean.near_duplicates.threshold": ("0.35", "permutations"),
    "steps.clean.decontamination.tests": ("[rows]", "would all be dropped"),
    "data.more.path": ("tasks:general", "generated by the project"),
    "steps.clean.rank": ("{by: rds}", "source that"),
    "steps.clean.groups": ("{keep: most_variance}", "number of responses"),
    "steps.clean.semantic_duplicates": ("{}", "has no path"),
}


@pytest.mark.parametrize("key", WRONG)
def test_wrong_settings_are_located(folder, key):
    value, message = WRONG[key]
    more = ["steps.clean.near_duplicates.permutations=16"] if "threshold" in key else []
    with pytest.raises(InputError, match=message):
        load_recipe(written(folder, text_of(folder)), [f"{key}={value}", *more])


def test_an_evaluation_of_the_cleaned_rows_themselves_is_no_test_set(folder):
    own = '  own: {{path: "step:clean/rows.jsonl", held_out: 0.2}}\nsteps:'
    text = text_of(folder, **{"steps:": own, "{data: test,": "{data: own,"})
    assert load_recipe(written(folder, text)).steps["clean"].test_sources == []


def test_prompts_are_cleaned_for_sampling(folder):
    write(folder / "rows.jsonl", [Prompt((Message("user", question(number % 3)),)) for number in range(6)])
    text = text_of(folder, **{"data: [rows, more]": "data: rows"})
    made, _ = run(folder, text=text, until="clean")
    assert made["clean"]["curation"]["sources"]["rows"] == {"rows": 6, "exact duplicates": 3, "kept": 3}
    assert Command(written(folder, text), ()).loaded.steps["clean"].rows(folder).path.endswith("rows.jsonl")


MODELS = """
  clean:
    stage: curate
    data: [rows, more]
    semantic_duplicates: {{encoder: {{model: "step:base"}}, threshold: 0.99, action: remove}}
    decontamination: {{neighbours: {{encoder: {{model: "step:base", pooling: mean}}, nearest: 1, threshold: 0.9}}}}
    rank: {{by: ifd, policy: base, keep: 0.5}}
"""


def test_models_of_steps_embed_and_rank_rows(folder):
    write(folder / "more.jsonl", [shown(f"{question(1)}, please"), shown("Say hello to me.", "Hello there.")])
    text = text_of(folder, **{"  clean: {{stage: curate, data: [rows, more]}}": MODELS})
    made, told = run(folder, text=text, until="clean")
    total = sum((Counter(counts) for counts in made["clean"]["curation"]["sources"].values()), Counter())
    assert total["kept"] + total["below the kept share"] + total["semantic duplicates"] + total["test items"] == 9
    kept = read(str(folder / "runs/small/clean/rows.jsonl")).records
    scores = [one.metadata["curated"]["ifd"] for one in kept]
    assert all(0 < score < 1 for score in scores)
    assert any("embedding" in note and "base" in note for note in told.notes)


def test_the_ledger_counts_each_distinct_prefix_that_a_rank_by_difficulty_reads(folder):
    text = text_of(folder, **{"data: [rows, more]}}": "data: rows, rank: {{by: ifd, policy: base, keep: 0.5}}}}"})
    made, _ = run(folder, text=text, until="clean")
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs/small/base")

    def rendered(prompt):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Certainly."}]
        whole, start = (
            tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=end == 1)
            for end in (2, 1)
        )
        ids = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in (whole.rstrip(), start)]
        return tuple(ids[0]), len(ids[0]) - len(ids[1])

    found = [rendered(prompt) for number in range(7) for prompt in (question(number), "")]
    depths = [len(each) for each in {ids[:end] for ids, _ in found for end in range(1, len(ids) + 1)}]
    targets = sum(trained for _, trained in found)
    hidden, inner = 16, 32
    forward = 2 * (4 * hidden**2 + 3 * hidden * inner) * len(depths) + 4 * hidden * sum(depths)
    ledger = made["clean"]["ledger"]
    assert ledger["tokens_computed"] == len(depths)
    assert ledger["flops"] == forward + 2 * hidden * len(tokenizer) * targets


def test_the_ledger_counts_what_a_local_judge_reads_and_writes(folder, monkeypatch):
    asked = []

    def recorded(engine, prompts, sampling):
        samples = list(respond(engine, prompts, sampling))
        asked.extend(zip(prompts, samples, strict=True))
        return samples

    monkeypatch.setattr(llm_judge, "respond", recorded)
    (folder / "words.txt").write_text("which 1 0\nplanet 0 1\n")
    judge = "judge: {model: 'step:base', max_new_tokens: 4, attempts: 1}"
    rule = f"{{encoder: {{model: {folder}/words.txt}}, nearest: 1, threshold: 0.1, {judge}}}"
    changes = [f"steps.clean.decontamination.neighbours={rule}", "policy.from_config.max_position_embeddings=2048"]
    write(folder / "more.jsonl", [shown("Which planet?")])
    made, _ = run(folder, *changes, text=text_of(folder), until="clean")
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs/small/base")
    ((prompt, sample),) = asked
    messages = [{"role": each.role, "content": each.content} for each in prompt.messages]
    read = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert sample.num_tokens
    length = len(tokenizer(read, add_special_tokens=False)["input_ids"]) + sample.num_tokens
    forward = 2 * (4 * 16**2 + 3 * 16 * 32) * length + 4 * 16 * length * (length + 1) // 2
    ledger = made["clean"]["ledger"]
    assert (ledger["tokens_computed"], ledger["tokens_trained"]) == (length, 0)
    assert ledger["flops"] == forward + 2 * 16 * len(tokenizer) * sample.num_tokens


def test_rows_are_ranked_by_their_similarity_to_targets(folder):
    write(folder / "targets.jsonl", [shown("Say hello to me.", "Hello there.")])
    write(folder / "more.jsonl", [shown("Say hello to us.", "Hello there.")])
    rank = "steps.clean.rank={by: rds, targets: targets, encoder: {model: 'step:base'}, keep: 0.25}"
    run(folder, f"data.targets.path={folder}/targets.jsonl", rank, text=text_of(folder), until="clean")
    kept = read(str(folder / "runs/small/clean/rows.jsonl")).records
    assert {one.metadata["curated"]["source"] for one in kept} == {"more", "rows"}  # 2 of 8
    scores = {one.messages[0].content: one.metadata["curated"]["rds"] for one in kept}
    assert max(scores, key=scores.get) == "Say hello to us."


def test_rows_that_datatrove_and_nemo_curator_wrote_are_read(folder):
    """datatrove moves all columns but the text into metadata; NeMo Curator adds columns to the rows."""
    documents = [
        {"text": question(number), "id": f"rows.jsonl/{number}", "metadata": {"answer": "Certainly.", "url": "x"}}
        for number in (1, 2, 1)
    ]
    with gzip.open(folder / "00000.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(document) + "\n" for document in documents)
    curated = [{"prompt": question(number), "response": "Certainly.", "_curator_dedup_id": number} for number in (2, 3)]
    parquet.write_table(pa.Table.from_pylist(curated), folder / "curated.parquet")
    text = text_of(folder, **{"rows.jsonl": "00000.jsonl.gz", "more.jsonl": "curated.parquet"})
    columns = "columns: {{prompt: text, response: metadata.answer}}"
    text = text.replace('00000.jsonl.gz"', f'00000.jsonl.gz", {columns}')
    made, _ = run(folder, text=text, until="clean")
    total = sum((Counter(counts) for counts in made["clean"]["curation"]["sources"].values()), Counter())
    assert total == {"rows": 5, "kept": 3, "exact duplicates": 2}
    kept = read(str(folder / "runs/small/clean/rows.jsonl")).records
    assert {one.messages[0].content for one in kept} == {question(1), question(2), question(3)}
    assert {one.messages[1].content for one in kept} == {"Certainly."}
