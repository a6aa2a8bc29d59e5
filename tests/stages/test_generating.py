"""`align generate` and `align evaluate` from outside, with a small model made on the spot."""

import json
import re
from pathlib import Path

import pytest
import torch
from planned import inputs_of
from test_cli import SMALL, align

from align.data.reading import read
from align.errors import InputError
from align.inference.samples import Throughput
from align.records import Comparison, Message, Prompt
from align.stages.costs.measured import sampling_done
from align.stages.inputs.sources import SourceSettings
from align.stages.responses.tasks import likelihood_rows
from align.synth.constraints import split_of

IFEVAL = [
    {"key": 11, "prompt": "List two animals.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 12,
        "prompt": "List one city.",
        "instruction_id_list": ["change_case:english_capital", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 9, "relation": "less than"}],
    },
]
SUMS = [{"question": "What is 6 times 7?", "answer": "#### 42"}, {"question": "And 5 and 5?", "answer": "#### 10"}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A random model with its tokenizer, as `align run` leaves it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(SMALL.format(runs=folder).partition("  sft: {stage")[0])
    ended = align("run", str(folder / "small.yaml"))
    assert ended.returncode == 0, ended.stderr
    return str(folder / "small" / "base")


def rows(path: Path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(policy, out, *more, data="tasks:general"):
    limit = ("--limit", "6") if data.startswith("tasks:") else ()
    return align("generate", "--policy", policy, "--data", data, "--out", str(out), *limit, *more)


SHORT = ("sampling.max_new_tokens=12", "engine.local.precision=fp32")
JUDGED = ("--judge", "verifier reward=both")


def test_prompts_become_scored_groups_that_the_readers_know(policy, tmp_path):
    ended = generate(policy, tmp_path / "groups.jsonl", *JUDGED, *SHORT, "sampling.num_responses=6")
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert (summary["counts"]["prompts"], summary["counts"]["responses"]) == (6, 36)
    text = (tmp_path / "groups.jsonl").read_text()
    groups = read(str(tmp_path / "groups.jsonl")).records if text else []
    assert len(groups) == summary["counts"].get("groups", 0)
    for group in groups:
        assert isinstance(group, Comparison)
        rewards = [response.reward for response in group.responses]
        assert rewards == sorted(rewards, reverse=True)
        assert rewards[0] > rewards[-1]
        assert [origin["policy"] for origin in group.metadata["origins"]] == [policy] * len(rewards)


def test_columns_are_named_on_the_command_lines_of_generate_and_evaluate(policy, tmp_path):
    theirs = rows(
        tmp_path / "theirs.jsonl", [{"chat": [{"text": each["question"]}], "a": each["answer"]} for each in SUMS]
    )
    out, more = tmp_path / "groups.jsonl", ("--column", "prompt=chat.0.text", "sampling.num_responses=2", *SHORT)
    ended = generate(policy, out, *more, data=theirs)
    assert ended.returncode == 0, ended.stderr
    asked = {group.prompt[0].content for group in read(str(out)).records}
    assert asked and asked <= {each["question"] for each in SUMS}
    given = rows(tmp_path / "given.jsonl", [{"prompt": each["question"], "response": "#### 42"} for each in SUMS])
    columns = ("--column", "question=chat.0.text", "--column", "answer=a")
    graded = summary_of(evaluate("gsm8k", "--data", theirs, "--responses", given, *columns))
    assert graded["scores"]["correct"]["value"] == 0.5
    both = evaluate("gsm8k", "--data", theirs, "--responses", given, *columns[:2], "rows.columns.answer=a")
    assert summary_of(both)["scores"] == graded["scores"]
    ignored = evaluate("general", "--data", "tasks:general", "--limit", "2", "--policy", policy, *columns)
    assert ignored.returncode == 2 and "does not use --column: leave it out" in ignored.stderr


def test_a_prompt_that_the_chat_template_refuses_is_skipped_and_counted_or_named(policy, tmp_path):
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    )
    chats = [[{"role": "user", "content": f"{row} ?"}] for row in range(3)]
    chats[1] = [{"role": "system", "content": "be"}, *chats[1]]
    data = rows(tmp_path / "prompts.jsonl", [{"prompt": chat} for chat in chats])
    call = (*SHORT, "sampling.num_responses=2", f"engine.local.chat_template={strict}")
    ended = generate(policy, tmp_path / "groups.jsonl", *call, "rows.on_error=skip", data=data)
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])["counts"]
    assert (counts["prompts"], counts["responses"]) == (2, 4)
    assert counts["rows:dropped the chat template cannot render the dialogue: no system role"] == 1
    ended = generate(policy, tmp_path / "others.jsonl", *call, data=data)
    assert ended.returncode == 2 and "row 2: the chat template cannot render the dialogue: no system" in ended.stderr


def test_the_same_call_again_asks_nothing_and_gives_the_same(policy, tmp_path):
    out = tmp_path / "groups.jsonl"
    first = generate(policy, out, *JUDGED, *SHORT)
    before = out.read_bytes(), (tmp_path / ".groups.jsonl.work/.groups.jsonl.samples").read_bytes()
    second = generate(policy, out, *JUDGED, *SHORT)
    assert (first.returncode, second.returncode) == (0, 0)
    assert (out.read_bytes(), (tmp_path / ".groups.jsonl.work/.groups.jsonl.samples").read_bytes()) == before
    assert "tokens/s" in first.stderr
    assert "tokens/s" not in second.stderr


def test_a_call_that_lost_half_of_its_samples_ends_with_the_same_file(policy, tmp_path):
    out, kept = tmp_path / "groups.jsonl", tmp_path / ".groups.jsonl.work/.groups.jsonl.samples"
    generate(policy, out, *SHORT)
    whole, samples = out.read_bytes(), kept.read_bytes()
    kept.write_bytes(samples[: len(samples) // 2])
    assert generate(policy, out, *SHORT, "sampling.seed=1").returncode == 2  # other settings: refused
    assert generate(policy, out, *SHORT, "engine.local.batch_size=3").returncode == 0  # that one decides no sample
    assert out.read_bytes() == whole


def test_without_a_judge_responses_have_no_rewards(policy, tmp_path):
    assert generate(policy, tmp_path / "groups.jsonl", *SHORT).returncode == 0
    groups = read(str(tmp_path / "groups.jsonl")).records
    assert {response.reward for group in groups for response in group.responses} == {None}


def test_what_was_sampled_on_a_gpu_is_accounted_for_there(policy, monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        done = sampling_done([(Path(policy), Throughput(processed_tokens=12, sampled_tokens=7).work)], "bf16")
        assert (done.device, done.observed.tokens) == ("cuda" if there else "cpu", 12)


def test_settings_left_out_keep_their_defaults(policy, tmp_path):
    ended = generate(policy, tmp_path / "groups.jsonl", *SHORT)
    assert json.loads(ended.stdout.splitlines()[-1])["counts"]["responses"] == 6 * 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("sampling.num_responses=0",), "num_responses"),
        (("sampling.temprature=1",), "temperature"),
        (("--judge", "oracle"), "oracle"),
        (("--judge", "ground_truth missing=error"), "answer"),
        (("groups.keep=some",), "keep"),
        (("engine.server.base_url=http://127.0.0.1:9/v1",), "127.0.0.1:9"),
        (("engine.local.path=x",), "path"),
    ],
)
def test_what_cannot_be_generated_is_said_in_one_line(policy, tmp_path, more, said):
    ended = generate(policy, tmp_path / "groups.jsonl", "sampling.max_new_tokens=12", *more)
    assert ended.returncode == 2
    assert said in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "groups.jsonl").exists()


def test_a_policy_that_is_not_there_is_named(tmp_path):
    ended = generate(str(tmp_path / "nobody"), tmp_path / "groups.jsonl", *SHORT)
    assert ended.returncode == 2
    assert "nobody" in ended.stderr


def test_a_file_of_somebody_else_is_not_written_over(policy, tmp_path):
    (tmp_path / "groups.jsonl").write_text("mine\n")
    ended = generate(policy, tmp_path / "groups.jsonl", *SHORT)
    assert ended.returncode == 2
    assert (tmp_path / "groups.jsonl").read_text() == "mine\n"


def evaluate(task, *more):
    return align("evaluate", "--task", task, *map(str, more))


def summary_of(ended):
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_responses_that_are_there_are_graded_without_a_policy(tmp_path):
    data = rows(tmp_path / "data.jsonl", IFEVAL)
    answers = [
        {"key": 12, "prompt": "", "response": "THIS IS THE CITY OF MY HEART"},
        {"key": 11, "prompt": "", "response": "cats, dogs"},
    ]
    said = rows(tmp_path / "said.jsonl", answers)
    summary = summary_of(evaluate("ifeval", "--data", data, "--responses", said, "--out", tmp_path / "out.jsonl"))
    assert lines(tmp_path / "out.jsonl") == [
        {"key": 12, "strict": [True, True], "loose": [True, True]},
        {"key": 11, "strict": [False], "loose": [False]},
    ]
    values = {name: found["value"] for name, found in summary["scores"].items()}
    assert values["prompt_strict"] == 1 / 2
    assert values["instruction_strict"] == pytest.approx(2 / 3)
    assert summary["unanswered"] == summary["cut_off"] == 0


def test_answers_that_were_cut_off_are_counted_and_thoughts_are_not_graded(tmp_path):
    data = rows(tmp_path / "data.jsonl", SUMS)
    thought = "<think>Not 41, but 10.</think> It is 10."
    answers = [{"key": 0, "response": "It is 4", "finish": "length"}, {"key": 1, "response": thought}]
    said = rows(tmp_path / "said.jsonl", answers)
    ended = evaluate("gsm8k", "--data", data, "--responses", said, "--out", tmp_path / "out.jsonl")
    assert summary_of(ended)["cut_off"] == 1
    assert "1 of 2 responses were cut off" in ended.stderr
    assert [line["correct"] for line in lines(tmp_path / "out.jsonl")] == [False, True]
    ended = evaluate(
        "gsm8k", "--data", data, "--responses", said, "--out", tmp_path / "raw.jsonl", "thoughts.strip=false"
    )
    assert summary_of(ended)["scores"]["correct"]["value"] == 1 / 2
    refused = evaluate("nll", "--data", data, "--policy", "nowhere", "thoughts.strip=false")
    assert refused.returncode == 2
    assert "task nll does not use thoughts" in refused.stderr


def test_responses_find_their_rows_by_the_prompt_or_by_the_number(tmp_path):
    data = rows(tmp_path / "data.jsonl", SUMS)
    by_prompt = rows(tmp_path / "a.jsonl", [{"prompt": "And 5 and 5?", "completion": "It is 10."}])
    by_number = rows(tmp_path / "b.jsonl", [{"key": 1, "response": "It is 10."}, {"key": 0, "response": "41"}])
    first = summary_of(evaluate("gsm8k", "--data", data, "--responses", by_prompt, "--out", tmp_path / "o.jsonl"))
    assert (first["scores"]["correct"]["value"], first["unanswered"]) == (1, 1)
    assert lines(tmp_path / "o.jsonl")[0]["correct"] is True
    second = summary_of(evaluate("gsm8k", "--data", data, "--responses", by_number))
    assert second["scores"]["correct"]["value"] == 1 / 2


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{"key": 99, "response": "x"}], "row 1: '99' matches 0 rows"),
        ([{"key": 11, "response": "x"}, {"response": "x", "prompt": "Never asked."}], "row 2: its prompt"),
        ([{"key": 11, "text": "x"}], "response"),
        ([], "no responses"),
    ],
)
def test_a_response_to_nothing_is_named(tmp_path, answers, said):
    data, file = rows(tmp_path / "data.jsonl", IFEVAL), rows(tmp_path / "said.jsonl", answers)
    ended = evaluate("ifeval", "--data", data, "--responses", file, "--out", tmp_path / "out.jsonl")
    assert ended.returncode == 2
    assert said in ended.stderr
    assert not (tmp_path / "out.jsonl").exists()


ASKED, ANSWERED = ("--data", "DATA", "--policy", "nowhere"), ("--data", "DATA", "--responses", "DATA")


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("ifevil", (), "ifeval"),
        ("ifeval", (), "--data"),
        ("ifeval", ("--data", "DATA"), "--policy or one file of --responses"),
        ("gsm8k", ("--data", "DATA", "--responses", "DATA"), "row 1 has no question"),
        ("nll", ("--data", "DATA"), "--policy"),
        ("win_rate", ("--data", "DATA"), "twice"),
        ("ifeval", (*ASKED, "--responses", "a", "--responses", "b"), "--policy or one file of --responses"),
        ("ifeval", (*ASKED, "--judge", "verifier"), "does not use --judge"),
        ("ifeval", (*ANSWERED, "--judge", "verifier"), "does not use --judge"),
        ("ifeval", (*ANSWERED, "sampling.max_new_tokens=4"), "ifeval with --responses does not use sampling"),
        ("ifeval", (*ANSWERED, "engine.local.precision=fp32"), "does not use engine"),
        ("ifeval", (*ANSWERED, "rows.format=native"), "does not use rows.format"),
        ("ifeval", (*ANSWERED, "rows.on_error=skip"), "does not use rows.on_error"),
        ("ifeval", (*ANSWERED, "rows.seed=3"), "does not use rows.seed"),
        ("ifeval", (*ASKED, "max_length=9"), "does not use max_length"),
        ("general", ("--data", "tasks:general", *ASKED[2:], "rows.format=native"), "does not use rows.format"),
        ("nll", (*ASKED, "--responses", "nowhere.jsonl"), "does not use --responses"),
        ("nll", (*ASKED, "--out", "o.jsonl"), "does not use --out"),
        ("preference", (*ASKED, "--judge", "ground_truth"), "does not use --judge"),
        ("preference", (*ASKED, "sampling.max_new_tokens=4"), "does not use sampling"),
        ("win_rate", (*ANSWERED, "--responses", "b", "--judge", "verifier", "--policy", "p"), "does not use --policy"),
        ("alpaca_eval", ASKED, "does not use --policy"),
        ("alpaca_eval", (), "--data"),
        ("alpaca_eval", ("--data", "DATA"), "has no 'id'"),
        ("harness:x", ASKED, "does not use --data"),
        ("harness:x", (*ASKED[2:], "--out", "o.jsonl"), "does not use --out"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(tmp_path, task, more, said):
    data = rows(tmp_path / "data.jsonl", IFEVAL)
    ended = evaluate(task, *(data if part == "DATA" else part for part in more))
    assert ended.returncode == 2
    assert said in ended.stderr.splitlines()[-1]


OUTS = {  # --out -> what is said of it
    "data.jsonl": "is what this command reads",
    "said.jsonl": "is what this command reads",
    "folder/../data.jsonl": "is what this command reads",
    "linked.jsonl": "is what this command reads",
    "others.jsonl": "exists and was not made by this command",
    "folder.jsonl": "is a folder",
    "data.jsonl/verdicts.jsonl": "is a file, and not a folder",
    "verdicts": "written as .jsonl",
}


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.parametrize("out", OUTS)
def test_nothing_is_written_over_and_a_place_that_is_none_is_named_before_any_work(tmp_path, out, command):
    given = {"--data": rows(tmp_path / "data.jsonl", IFEVAL)}
    if command == "evaluate":
        said = [{"key": row["key"], "response": "cats"} for row in IFEVAL]
        given |= {"--task": "ifeval", "--responses": rows(tmp_path / "said.jsonl", said)}
    elif out == "said.jsonl":
        pytest.skip("generate reads no responses")
    else:
        given["--policy"] = "nowhere"
    (tmp_path / "others.jsonl").write_text("mine\n")
    for name in ("folder", "folder.jsonl"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "data.jsonl")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    ended = align(command, *(word for pair in given.items() for word in pair), "--out", str(tmp_path / out))
    assert ended.returncode == 2
    (last,) = [line for line in ended.stderr.splitlines() if line.startswith("align: ")]
    assert OUTS[out] in last
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_verdicts_are_written_again_by_the_same_command_and_by_no_other(tmp_path):
    data, out = rows(tmp_path / "data.jsonl", IFEVAL), tmp_path / "new" / "folder" / "verdicts.jsonl"
    said = [rows(tmp_path / f"{text}.jsonl", [{"key": 11, "response": text}]) for text in ("cats", "a, b")]
    call = ("ifeval", "--data", data, "--out", out, "--responses")
    first = evaluate(*call, said[0])
    whole = out.read_bytes()
    again = evaluate(*call, said[0])
    assert summary_of(first) == summary_of(again)
    other = evaluate(*call, said[1])
    assert other.returncode == 2
    assert "was started with responses" in other.stderr.splitlines()[-1]
    assert out.read_bytes() == whole
    out.unlink()
    assert summary_of(evaluate(*call, said[0]))["scores"]
    assert out.read_bytes() == whole


def test_responses_that_cannot_be_graded_leave_nothing_in_the_way_of_better_ones(tmp_path):
    out, said = tmp_path / "verdicts.jsonl", tmp_path / "said.jsonl"
    sums = rows(
        tmp_path / "data.jsonl",
        [{**SUMS[0], "answer": "Add them all up, as was said in the text above, and then you are done with it."}],
    )
    call = ("gsm8k", "--data", sums, "--responses", rows(said, [{"key": 0, "response": "42"}]), "--out", out)
    assert "no final answer" in evaluate(*call).stderr
    rows(tmp_path / "data.jsonl", SUMS[:1])
    assert summary_of(evaluate(*call))["scores"]["correct"]["value"] == 1


def test_a_dialogue_with_instructions_behind_it_is_no_row_of_a_task(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi."), ("assistant", "Yes?"))]
    data = rows(tmp_path / "data.jsonl", [{"messages": [*turns, {"role": "user", "content": "List animals."}]}])
    ended = evaluate("ifeval", "--data", data, "--policy", "nowhere", "rows.constraints.kinds=[punctuation:no_comma]")
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert re.match(rf"align: {re.escape(data)}: prompt 'List animals\..*': has messages before it", last)


def test_a_policy_is_asked_and_graded(policy, tmp_path):
    data = rows(tmp_path / "data.jsonl", IFEVAL)
    more = ("sampling.max_new_tokens=8", "engine.local.precision=fp32")
    ended = evaluate("ifeval", "--data", data, "--policy", policy, "--out", tmp_path / "out.jsonl", *more)
    summary = summary_of(ended)
    assert (summary["rows"], summary["responses"], summary["cut_off"]) == (2, 2, 2)
    assert [len(line["strict"]) for line in sorted(lines(tmp_path / "out.jsonl"), key=lambda line: line["key"])] == [
        1,
        2,
    ]


def test_a_row_that_is_too_long_to_be_answered_is_left_out_of_groups_and_ends_an_evaluation(policy, tmp_path):
    many = "sampling.max_new_tokens=100000"
    ended = generate(policy, tmp_path / "groups.jsonl", *SHORT, many)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "align: no group of responses is kept: 6 prompts; 6 prompts left out, no response; "
        "24 responses not sampled, prompt too long"
    )
    assert not (tmp_path / "groups.jsonl").exists()
    ended = evaluate("ifeval", "--data", rows(tmp_path / "data.jsonl", IFEVAL), "--policy", policy, many)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert re.match(r"align: ifeval: row \d is too long for .* with max_new_tokens 100000: lower it", last)


def test_the_default_length_of_responses_fits_a_model_of_256_positions(policy, tmp_path):
    ended = generate(policy, tmp_path / "groups.jsonl", "engine.local.precision=fp32", "sampling.num_responses=1")
    assert ended.returncode == 0, ended.stderr
    assert "sampling.max_new_tokens is 128, half of the model's context length" in ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["counts"]["responses"] == 6


def test_judges_that_know_no_prompt_are_refused_before_anything_is_sampled(policy, tmp_path):
    ended = generate(policy, tmp_path / "groups.jsonl", *SHORT, "--judge", "executed_tests")
    assert ended.returncode == 2
    assert "align: judges: no judge can score any of the 6 prompts: executed_tests needs tests or" in ended.stderr
    assert not list(tmp_path.rglob(".*.samples"))


def test_the_likelihood_of_rows_is_that_of_plain_transformers(policy, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    pairs = [{"prompt": "List two animals.", "chosen": "cat dog", "rejected": "a"} for _ in range(3)]
    data = rows(tmp_path / "pairs.jsonl", pairs)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    found: dict[str, tuple[float, int]] = {}
    for name in ("chosen", "rejected"):
        chat = [{"role": "user", "content": "List two animals."}, {"role": "assistant", "content": pairs[0][name]}]
        before = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
        start, ids = len(tokenizer(before)["input_ids"]), tokenizer(whole, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
        found[name] = float(logps.sum()), len(logps)
    nll = -found["chosen"][0] / found["chosen"][1]  # of the preferred response alone
    scores = summary_of(evaluate("nll", "--data", data, "--policy", policy))["scores"]
    assert scores["nll"]["value"] == pytest.approx(nll, rel=1e-4)
    accuracies = summary_of(evaluate("preference", "--data", data, "--policy", policy))["scores"]
    means = {name: total / length for name, (total, length) in found.items()}
    assert accuracies["accuracy_summed"]["value"] == float(found["chosen"][0] > found["rejected"][0])
    assert accuracies["accuracy_per_token"]["value"] == float(means["chosen"] > means["rejected"])


def test_a_row_whose_likelihood_cannot_be_told_is_named_by_its_place_in_the_file(policy, tmp_path):
    from transformers import AutoTokenizer  # noqa: PLC0415

    def said(text):
        return [{"role": "user", "content": "List two animals."}, {"role": "assistant", "content": text}]

    content = [{"prompt": "Hi."}, {"messages": said("cat")}, {"messages": said("dog " * 99)}]
    data = rows(tmp_path / "data.jsonl", [{**row, "metadata": {}} for row in content])
    source = SourceSettings(path=data, format="native", max_length=60, overlong="error")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    with pytest.raises(InputError, match=rf"^data\.rows\.path: {re.escape(data)}: row 3: .*60"):
        likelihood_rows("rows", inputs_of(source), tokenizer, model_limit=None)
    two = inputs_of(source.model_copy(update={"limit": 2}))
    groups, row_counts = likelihood_rows("rows", two, tokenizer, model_limit=None)
    assert (len(groups), row_counts["rows"], row_counts["left_out"]) == (1, 2, {"prompts without a response": 1})
    cut, row_counts = likelihood_rows(
        "rows", inputs_of(source.model_copy(update={"overlong": "cut_response"})), tokenizer, model_limit=None
    )
    assert (len(cut), row_counts["left_out"]) == (2, {"prompts without a response": 1})  # what is cut is not left out
    assert row_counts["cut:response"] == 1


def test_rows_that_are_dropped_and_prompts_of_another_split_are_told(policy, tmp_path):
    texts = [f"Tell me about {what}." for what in ("cats", "dogs", "rain", "snow", "tea", "figs", "oak")]
    data = rows(tmp_path / "data.jsonl", [*({"prompt": text} for text in texts), {"prompt": ""}])
    of_test = [text for text in texts if split_of(Prompt((Message("user", text),))) == "test"]
    assert 0 < len(of_test) < len(texts)  # some of both, so that the test can fail
    how = ("rows.on_error=skip", "rows.constraints.split=test", "sampling.max_new_tokens=2")
    for summary, told in (
        (summary_of(generate(policy, tmp_path / "groups.jsonl", *how, data=data)), "counts"),
        (summary_of(evaluate("ifeval", "--data", data, "--policy", policy, *how)), "left_out"),
    ):
        counts = summary[told]
        assert counts["prompts:not in constraints.split"] == len(texts) - len(of_test)
        assert [number for name, number in counts.items() if name.startswith("rows:dropped ")] == [1]
    assert summary["rows"] == len(of_test)


def longer():
    from align.rewards.verdicts import Verdict  # noqa: PLC0415 - a user's module

    return lambda groups: [tuple(Verdict(float(len(text))) for text in responses) for _, responses in groups]


def test_a_win_rate_counts_what_both_have_answered(tmp_path):
    prompts = [{"prompt": f"Question {number}"} for number in range(5)]
    data = rows(tmp_path / "data.jsonl", [*prompts, prompts[0]])
    ours = rows(tmp_path / "a.jsonl", [{**row, "response": "long answer"} for row in prompts[:4]])
    theirs = rows(
        tmp_path / "b.jsonl", [{**row, "response": "short" * (1 + 3 * (n > 2))} for n, row in enumerate(prompts)]
    )
    judge = f"{__name__}:longer"
    summary = summary_of(
        evaluate("win_rate", "--data", data, "--responses", ours, "--responses", theirs, "--judge", judge)
    )
    rates = {name: found["value"] for name, found in summary["scores"].items()}
    assert rates.pop("win_rate_equal_length.both_games") < 3 / 4
    assert rates == dict.fromkeys(("win_rate.consistent", "win_rate.both_games", "win_rate.tie_if_inconsistent"), 3 / 4)
    assert (summary["pairs"], summary["void_games"], summary["unanswered"]) == (4, 0, 1)
    assert summary["left_out"] == {"prompts with the last message of an earlier one": 1}
    assert summary["position_bias"] is None  # the judge has no order
    assert (summary["length"]["shorter"], summary["length"]["longer"]) == (1 / 4, 3 / 4)


def test_annotations_of_alpaca_eval_are_scored_without_a_policy_or_a_judge(tmp_path):
    preferences = [1.9, 1.2, 1.5, None]
    content = [
        {"instruction": f"Question {n}", "output_1": "long answer", "output_2": "short", "preference": value}
        for n, value in enumerate(preferences)
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    summary = summary_of(evaluate("alpaca_eval", "--data", path))
    rates = {name: found["value"] for name, found in summary["scores"].items()}
    assert rates["win_rate"] == pytest.approx((0.9 + 0.2 + 0.5) / 3)
    assert rates["discrete_win_rate"] == 0.5
    assert rates["win_rate_equal_length"] > rates["win_rate"]
    assert (summary["pairs"], summary["void"], summary["length"]["shorter"]) == (4, {"no mark": 1}, 1)
