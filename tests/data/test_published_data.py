"""Published data sets: records and letters are counted again with the standard library alone."""

import ast
import csv
import gzip
import io
import json
from pathlib import Path
from statistics import mean

import pytest
from public_rows import PUBLIC

from align.data.readers.table import READERS
from align.data.reading import read
from align.errors import InputError
from align.records import Comparison, Demonstration, Prompt

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the published data sets are not at {DATA}")


def plain(path):
    """Return the rows of a file, read with the standard library alone."""
    content = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    if ".csv" in path.name:
        return list(csv.DictReader(io.StringIO(content, newline="")))
    try:
        whole = json.loads(content)
        return whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        return [json.loads(line) for line in content.split("\n") if line]


def letters(*texts):
    return sum(map(len, texts))


def each(*path):
    """Return a function that counts the letters at `path` in every row; `*` is every item of a list."""

    def found(value, path):
        if not path:
            return len(value) if isinstance(value, str) else sum(found(part["value"], ()) for part in value)
        head, *tail = path
        return sum(found(item, tail) for item in value) if head == "*" else found(value[head], tail)

    return lambda rows: found(rows, ("*", *path))


def said_by(name, speaker, text):
    """Return a function that counts the letters of the assistant messages in every row."""
    names = {"assistant", "Assistant", "gpt"}
    return lambda rows: sum(
        letters(turn[text] if isinstance(turn[text], str) else "".join(part["value"] for part in turn[text]))
        for row in rows
        for turn in row[name]
        if turn[speaker] in names
    )


def nodes(rows):
    waiting = [row.get("prompt", row) for row in rows]
    while waiting:
        yield (node := waiting.pop())
        waiting += node["replies"]


def ranked(rows):
    """Return the ranked replies to each message with at least two of them."""
    places = ([reply for reply in node["replies"] if reply.get("rank") is not None] for node in nodes(rows))
    return [replies for replies in places if len(replies) > 1]


def ranked_letters(rows):
    return letters(*(reply["text"] for replies in ranked(rows) for reply in replies))


def topics(rows):
    """Count the assistant's letters in a column of JSON strings that contain Python literals without commas."""
    spelled = [json.loads(row["conversation_json"]).replace("}\n {", "},\n {") for row in rows]
    return letters(
        *(turn["content"] for text in spelled for turn in ast.literal_eval(text) if turn["role"] == "assistant")
    )


def steerlm_letters(rows):
    return letters(*(row["text"].partition("Assistant\n")[2].removesuffix("\n<extra_id_2>") for row in rows))


def aligner_letters(rows):
    return letters(*(row[f"{side}_response"].split("\n<")[0] for row in rows for side in ("chosen", "rejected")))


def half_of(rows):
    return len(rows) // 2


def nothing(_):
    return 0


JUST_EVAL = ("just_eval", len, each("output_cand"))
PAIRWISE = ("just_eval_pairs", len, lambda rows: each("output_A")(rows) + each("output_B")(rows))
TOPICS = ("topic_following", len, topics)
SEEDS = ("self_instruct", len, each("instances", "*", "output"))
TREES = ("openassistant", lambda rows: len(ranked(rows)), ranked_letters)
ASPECT = ("completions", len, each("completions", "*"))

# file -> format, number of records, letters of all answers
READ = {
    "alpaca_eval/multi_response_subset.jsonl.gz": ("alpaca_eval", len, each("responses", "*", "output")),
    "alpaca_eval/outputs.json.gz": ("alpaca", len, each("output")),
    "cant_talk_about_this/insurance_final.csv.gz": TOPICS,
    "cant_talk_about_this/real_estate_final.csv.gz": TOPICS,
    "cant_talk_about_this/travel_final_jelle.csv.gz": TOPICS,
    "cant_talk_about_this/travel_final_karlijn.csv.gz": TOPICS,
    "code_alpaca/code_alpaca_2k.json.gz": (
        "alpaca",
        lambda rows: sum(row["output"] != "" for row in rows),
        each("output"),
    ),
    "code_alpaca/seed_tasks.jsonl": SEEDS,
    "gsm8k/train.jsonl.gz": ("question_answer", len, each("answer")),
    "just_eval/0-2.pairwise_multi.gpt-4.json": PAIRWISE,
    "just_eval/0.score_multi.gpt-4.json": JUST_EVAL,
    "just_eval/1-2.pairwise_multi.gpt-4.json": PAIRWISE,
    "just_eval/1.score_multi.gpt-4.json": JUST_EVAL,
    "just_eval/gpt35_multi_attribute.jsonl.gz": ("just_eval", len, each("response")),
    "just_eval/score_multi.gpt4.json": JUST_EVAL,
    "llama_factory_demo/alpaca_en_demo.json.gz": ("alpaca", len, each("output")),
    "llama_factory_demo/dpo_en_demo.json.gz": (
        "preference",
        len,
        lambda rows: each("chosen", "value")(rows) + each("rejected", "value")(rows),
    ),
    "llama_factory_demo/kto_en_demo.json.gz": ("unpaired", len, each("messages", -1, "content")),
    "llama_factory_demo/v1_dpo_demo.jsonl.gz": (
        "preference",
        len,
        lambda rows: sum(each(f"{side}_messages", -1, "content")(rows) for side in ("chosen", "rejected")),
    ),
    "llama_factory_demo/v1_sft_demo.jsonl.gz": ("messages", len, said_by("messages", "role", "content")),
    "mbpp/mbpp_train.jsonl": ("mbpp", len, each("code")),
    "nemo_aligner/dummy-dpo.jsonl": ("nemo_aligner", len, aligner_letters),
    "nemo_aligner/dummy-sft.jsonl.gz": ("sharegpt", len, said_by("conversations", "from", "value")),
    "nemo_aligner/synthetic-kd.jsonl": ("prompt_completion", len, each("output")),
    "nemo_aligner/test-rm.jsonl": ("steerlm", half_of, steerlm_letters),
    "open_instruct/acecode_sample.jsonl.gz": ("acecode", len, each("inferences", "*", "completion")),
    "open_instruct/eval_instances_tulu_1.jsonl.gz": ("completions", len, each("completions", "*", "completion")),
    "open_instruct/helpfulness-full.jsonl": ASPECT,
    "open_instruct/honesty-full.jsonl": ASPECT,
    "open_instruct/instruction_following-full.jsonl": ASPECT,
    "open_instruct/rlvr_test.jsonl": ("messages", len, nothing),
    "open_instruct/truthfulness-full.jsonl": ASPECT,
    "openassistant/2023-03-01_theblackcat102_pythia-1b-deduped-sft_sampling.json.gz": (
        "sampling_report",
        lambda rows: len(rows[0]["prompts"]),
        each("prompts", "*", "results", "*", "outputs", "*"),
    ),
    "openassistant/en_100_message.jsonl.gz": TREES,
    "openassistant/en_100_tree.jsonl.gz": TREES,
    "openassistant/prompt_lottery_en_250_text.jsonl": ("prompt", len, nothing),
    "self_instruct/seed_tasks.jsonl": SEEDS,
    "self_instruct/user_oriented_instructions.jsonl": SEEDS,
    "ultrafeedback_pairs/train_clean.jsonl.gz": (
        "preference",
        lambda rows: sum(bool(row["chosen"].strip() and row["rejected"].strip()) for row in rows),
        lambda rows: sum(
            letters(row["chosen"], row["rejected"]) for row in rows if row["chosen"].strip() and row["rejected"].strip()
        ),
    ),
    "vicuna_blog_eval/question.jsonl": ("vicuna_eval", len, nothing),
}

REFUSED = {  # files that are no training data, or not without other files
    "nemo_aligner/CritiqueRevisionInstructions.json": "row 1: no format matches the columns harmful0, harmful1",
    "stories260k/stories260K.bin": "not a data file; those end in .json,",
    "stories260k/tok512.bin": "not a data file; those end in .json,",
    "sts_benchmark/stsb-en-dev.csv": "row 1: no format matches the columns A man with a hard hat is dancing.,",
    "ultrafeedback_pairs/label_flip_20_index.jsonl": "row 1: no format matches the columns source_index, noise",
    "vicuna_blog_eval/answers.jsonl.gz": "no row is a question; name the folder with questions",
    "vicuna_blog_eval/reviews_gpt4.jsonl.gz": "no row is a question; name the folder with questions",
}

WITH_EMPTY_ANSWERS = {  # file -> number of rows with an empty answer
    "alpaca_eval/multi_response_subset.jsonl.gz": 4,
    "code_alpaca/code_alpaca_2k.json.gz": 2,
    "ultrafeedback_pairs/train_clean.jsonl.gz": 2,
}


def answers(record):
    if isinstance(record, Comparison):
        return [response.content for response in record.responses]
    return [message.content for message in record.messages if message.role == "assistant"]


def test_every_published_file_is_covered():
    there = {path.relative_to(DATA).as_posix() for path in DATA.glob("*/*") if path.suffix not in (".md", ".txt")}
    assert there == READ.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", READ)
def test_published_files_are_read_completely(name):
    reader, count, num_letters = READ[name]
    rows = plain(DATA / name)
    found = read(str(DATA / name), on_error="skip")
    assert (found.format, len(found.records)) == (reader, count(rows))
    assert letters(*(text for record in found.records for text in answers(record))) == num_letters(rows)
    assert sum(found.dropped.values()) == WITH_EMPTY_ANSWERS.get(name, 0)
    assert found.num_rows == len(rows[0]["prompts"] if reader == "sampling_report" else rows)


@pytest.mark.parametrize("name", WITH_EMPTY_ANSWERS)
def test_an_empty_answer_is_an_error_by_default(name):
    with pytest.raises(InputError, match=r"row \d+: (a response|an assistant message) is empty"):
        read(str(DATA / name))


@pytest.mark.parametrize("name", REFUSED)
def test_files_of_unknown_format_are_rejected_in_one_line(name):
    for on_error in ("error", "skip"):
        with pytest.raises(InputError) as caught:
            read(str(DATA / name), on_error=on_error)
        assert REFUSED[name] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", READ)
def test_the_kind_of_record_follows_from_the_reader(name):
    kinds = {type(record) for record in read(str(DATA / name), limit=20, on_error="skip").records}
    demonstrates = (
        "alpaca",
        "topic_following",
        "self_instruct",
        "question_answer",
        "mbpp",
        "sharegpt",
        "prompt_completion",
    )
    if READ[name][0] in demonstrates or name == "llama_factory_demo/v1_sft_demo.jsonl.gz":
        assert kinds == {Demonstration}
    else:
        assert kinds == ({Prompt} if READ[name][2] is nothing else {Comparison})


def rewards(name):
    records = read(str(DATA / name), on_error="skip").records
    return [[response.reward for response in record.responses] for record in records]


def test_rewards_of_pairs_are_their_published_scores():
    rows = [
        row
        for row in plain(DATA / "ultrafeedback_pairs/train_clean.jsonl.gz")
        if row["chosen"].strip() and row["rejected"].strip()
    ]
    expected = [[row["metadata"]["score_chosen"], row["metadata"]["score_rejected"]] for row in rows]
    assert rewards("ultrafeedback_pairs/train_clean.jsonl.gz") == expected


def test_rewards_of_groups_are_the_judges_preferences():
    rows = plain(DATA / "alpaca_eval/multi_response_subset.jsonl.gz")
    expected = [[one["preference"] for one in row["responses"] if one["output"].strip()] for row in rows]
    found = rewards("alpaca_eval/multi_response_subset.jsonl.gz")
    assert found == expected and {len(group) for group in found} == {11, 12, 13}


def test_likes_become_reward_one_and_dislikes_zero():
    rows = plain(DATA / "llama_factory_demo/kto_en_demo.json.gz")
    assert rewards("llama_factory_demo/kto_en_demo.json.gz") == [[float(row["label"])] for row in rows]


def test_ranked_replies_are_ordered_best_first():
    found = rewards("openassistant/en_100_tree.jsonl.gz")
    ranks = [
        sorted(reply["rank"] for reply in replies)
        for replies in ranked(plain(DATA / "openassistant/en_100_tree.jsonl.gz"))
    ]
    assert sorted(found) == sorted([[-rank for rank in place] for place in ranks])
    assert {len(group) for group in found} == {2, 3, 4, 5, 6, 8, 9}


def test_both_exports_of_openassistant_give_the_same_comparisons():
    trees, messages = (
        read(str(DATA / f"openassistant/en_100_{kind}.jsonl.gz")).records for kind in ("tree", "message")
    )
    assert trees == messages


def test_ratings_become_attributes_without_missing_ones():
    name = "just_eval/gpt35_multi_attribute.jsonl.gz"
    marks = [[rating["score"] for rating in row["ratings"].values()] for row in plain(DATA / name)]
    found = [dict(record.responses[0].attributes) for record in read(str(DATA / name)).records]
    assert [sorted(one.values()) for one in found] == [
        sorted(float(mark) for mark in row if mark != "N/A") for row in marks
    ]
    assert sum(len(one) for one in found) == 800 * 5 - sum(row.count("N/A") for row in marks)


def test_label_vectors_become_helpsteers_attributes():
    found = read(str(DATA / "nemo_aligner/test-rm.jsonl")).records
    names = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    labels = [row["label"][4:] for row in plain(DATA / "nemo_aligner/test-rm.jsonl")]
    responses = [response for record in found for response in record.responses]
    assert [dict(response.attributes) for response in responses] == [
        dict(zip(names, label, strict=True)) for label in labels
    ]
    assert [[message.role for message in record.prompt] for record in found] == [["system", "user"]] * 4


def test_questions_answers_and_reviews_join_to_scored_groups():
    folder = DATA / "vicuna_blog_eval"
    found = read(str(folder), on_error="skip")
    given = {}
    for review in plain(folder / "reviews_gpt4.jsonl.gz"):
        for side in (0, 1):
            given.setdefault(review[f"answer{side + 1}_id"], []).append(review["score"][side])
    written = [answer for answer in plain(folder / "answers.jsonl.gz") if answer["text"].strip()]
    expected = {(answer["question_id"], answer["text"], mean(given[answer["answer_id"]])) for answer in written}
    records = found.records
    assert {
        (record.metadata["question_id"], one.content, one.reward) for record in records for one in record.responses
    } == expected
    assert (found.format, len(records), found.num_rows, found.dropped) == (
        "vicuna_eval",
        80,
        1680,
        {"a response is empty": 1},
    )
    assert sorted(len(record.responses) for record in records) == [6] + [7] * 79


def test_only_these_readers_have_no_published_file():
    seen = {reader for reader, *_ in READ.values()}
    assert READERS.keys() - seen - {each.format for each in PUBLIC.values()} == {"nemo_rl", "helpsteer"}
