"""`align score` from outside: every row rated, once, in a form that trains; and one line for whatever is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from chat_server import serving
from saved_models import SMALL_LLAMA, save_reward_and_policy
from small_runs import SMALL_POLICY, Told, run
from test_cli import ROOT, align

from align.accounting.process_usage import PROCESS_USAGE
from align.data.reading import read
from align.data.writing import write
from align.errors import InputError, RunError
from align.inference.engines import load_engine
from align.models.reward_model import load_reward_model
from align.models.settings import PolicySettings
from align.records import Comparison, Demonstration, Message, Prompt, Response
from align.rewards.builtin_judges import LlmSettings
from align.rewards.llm_judge import llm_judge
from align.workflow.launcher import Command
from align.workflow.runner import run_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two reward models and a policy on disk."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_reward_and_policy(root, reward=f"reward{seed}", seed=seed)
    return root


def said(text):
    return (Message("user", text),)


def comparisons(number):
    return [
        Comparison(
            said(f"question {row}"),
            tuple(Response(f"answer {letter} {row}", float(at)) for at, letter in enumerate("abcd"[: 2 + row % 3])),
            0 if row % 2 else None,
            {"kind": "odd" if row % 2 else "even"},
        )
        for row in range(number)
    ]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, comparisons(20))
    return path


def score(models, data, out, *more, model="reward0"):
    ended = align("score", "--model", str(models / model), "--data", str(data), "--out", str(out), *more)
    return ended, json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else None


def test_rows_of_rewardbench_get_its_sections(models, tmp_path):
    rows = [
        {"id": str(row), "prompt": f"ask {row}", "chosen": f"one {row}", "rejected": f"two {row}", "subset": subset}
        for row, subset in enumerate(["hep-go", "math-prm", "hep-go", "donotanswer", "pku-safer"])
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended, summary = score(models, tmp_path / "bench.jsonl", tmp_path / "out.jsonl")
    rated = read(str(tmp_path / "out.jsonl")).records
    won = [float(one.responses[0].reward > one.responses[1].reward) for one in rated]
    found = summary["reward_bench"]
    assert {name: each["value"] for name, each in found["sections"].items()} == pytest.approx(
        {"Safety": won[3], "Reasoning": (984 * won[1] + 164 * (won[0] + won[2]) / 2) / (984 + 164)}
    )
    assert found["overall"] is None and "Reasoning" in ended.stdout
    assert found["other_rows"] == 1 and "1 rated rows are of none" in ended.stderr


def test_every_response_is_rated_and_the_rows_read_back(models, data, tmp_path):
    ended, summary = score(models, data, tmp_path / "out.jsonl")
    assert ended.returncode == 0, ended.stderr
    before, after = comparisons(20), read(str(tmp_path / "out.jsonl")).records
    assert [(one.prompt, one.chosen, one.metadata) for one in after] == [
        (one.prompt, one.chosen, one.metadata) for one in before
    ]
    assert [[each.content for each in one.responses] for one in after] == [
        [each.content for each in one.responses] for one in before
    ]
    responses = [each for one in after for each in one.responses]
    for each in responses:
        assert each.attributes.keys() == {"good", "long"}
        assert each.reward == pytest.approx(2 * each.attributes["good"] - each.attributes["long"], abs=1e-5)
    assert (summary["rows"], summary["rated"], summary["responses"]) == (20, 20, len(responses))
    rewards = [each.reward for each in responses]
    assert summary["reward"] == pytest.approx(
        {"mean": sum(rewards) / len(rewards), "lowest": min(rewards), "highest": max(rewards)}
    )
    assert summary["attributes"]["good"] == pytest.approx(sum(r.attributes["good"] for r in responses) / len(responses))
    assert "good" in ended.stderr and "mean reward" in ended.stderr


def test_rewards_are_those_of_the_rendered_dialogue_alone(models, data, tmp_path):
    score(models, data, tmp_path / "out.jsonl")
    model, tokenizer = load_reward_model(PolicySettings(path=str(models / "reward0")))
    for one in read(str(tmp_path / "out.jsonl")).records[:5]:
        for each in one.responses:
            turns = f"user\n{one.prompt[0].content}<|im_end|><|im_start|>assistant\n{each.content}<|im_end|>"
            ids = tokenizer("<|im_start|>" + turns, return_tensors="pt", add_special_tokens=False)["input_ids"]
            good, long = model.hf(input_ids=ids).logits[0].tolist()
            assert each.reward == pytest.approx(2 * good - long, abs=2e-5)


def test_the_agreement_is_counted_against_what_the_rows_said_before(models, data, tmp_path):
    _, summary = score(models, data, tmp_path / "out.jsonl")
    right = total = 0
    for before, after in zip(comparisons(20), read(str(tmp_path / "out.jsonl")).records, strict=True):
        order = [each.reward for each in before.responses]
        if before.chosen is not None:
            order[before.chosen] = 99.0
        for one in range(len(order)):
            for other in range(one):
                total += 1
                right += (order[one] > order[other]) == (after.responses[one].reward > after.responses[other].reward)
    found = summary["agreement"]["all"]
    assert (found["pairs"], found["n"]) == (total, 20)
    assert found["value"] == pytest.approx(right / total)


def test_any_format_with_responses_is_rated(models, tmp_path):
    shown = [Demonstration((*said("a"), Message("assistant", "b"), *said("c"), Message("assistant", "d")), {"key": 1})]
    write(tmp_path / "shown.jsonl", shown)
    ended, summary = score(models, tmp_path / "shown.jsonl", tmp_path / "out.jsonl")
    assert ended.returncode == 0, ended.stderr
    (found,) = read(str(tmp_path / "out.jsonl")).records
    assert [message.content for message in found.prompt] == ["a", "b", "c"]
    assert found.responses[0].content == "d"
    assert found.metadata == {"key": 1}
    assert summary["agreement"] == {}


def test_limit_rates_the_first_rows_and_a_higher_one_goes_on(models, data, tmp_path):
    out = tmp_path / "out.jsonl"
    _, first = score(models, data, out, "--limit", "7")
    assert (first["rated_now"], len(read(str(out)).records)) == (7, 7)
    _, second = score(models, data, out)
    assert (second["rated_now"], second["rated"]) == (13, 20)
    _, third = score(models, data, out)
    assert third["rated_now"] == 0
    _, whole = score(models, data, tmp_path / "whole.jsonl")
    pairs = zip(read(str(out)).records, read(str(tmp_path / "whole.jsonl")).records, strict=True)
    for one, other in pairs:
        assert [each.reward for each in one.responses] == pytest.approx(
            [each.reward for each in other.responses], abs=1e-5
        )


def test_rows_that_are_too_long_are_left_out_and_counted(models, tmp_path):
    rows = comparisons(3)
    rows[1] = Comparison(said("long"), (Response("x" * 300), Response("y")))
    write(tmp_path / "data.jsonl", rows)
    ended, summary = score(models, tmp_path / "data.jsonl", tmp_path / "out.jsonl")
    assert ended.returncode == 0, ended.stderr
    assert summary["left_out"] == {"too long": 1}
    assert (summary["rows"], summary["rated"]) == (3, 2)
    assert [one.prompt for one in read(str(tmp_path / "out.jsonl")).records] == [rows[0].prompt, rows[2].prompt]


@pytest.mark.slow
def test_a_killed_call_goes_on_where_it_was(models, tmp_path):
    write(tmp_path / "data.jsonl", comparisons(600))
    out, kept = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.work/.groups.jsonl.ratings"
    model, data = str(models / "reward0"), str(tmp_path / "data.jsonl")
    held = [sys.executable, str(ROOT / "tests/held.py"), "items", "400"]
    command = [*held, "score", "--model", model, "--data", data, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not kept.exists() or kept.read_bytes().count(b"\n") < 100:
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    done = kept.read_bytes().count(b"\n") - 1
    ended, summary = score(models, data, out)
    assert ended.returncode == 0, ended.stderr
    assert 0 < summary["rated_now"] <= 600 - done
    assert [one.prompt[0].content for one in read(str(out)).records] == [f"question {row}" for row in range(600)]


WRONG = {
    "a policy in place of a reward model": (lambda o: o | {"model": "policy"}, "not a reward model"),
    "a folder that is not there": (lambda o: o | {"model": "nowhere"}, "cannot load a model"),
    "rows that are not there": (lambda o: o | {"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "prompts alone": (lambda o: o | {"data": "prompts.jsonl"}, "prompts.jsonl: row 1: a prompt without a response"),
    "another kind of file": (lambda o: o | {"out": "out.csv"}, "written as .jsonl, not as .csv"),
    "a file that something else has made": (
        lambda o: o | {"out": "prompts.jsonl"},
        "exists and was not made by this command",
    ),
    "the rows themselves": (lambda o: o | {"out": "data.jsonl"}, "data.jsonl: is what this command reads"),
    "a file in place of a folder": (lambda o: o | {"out": "data.jsonl/o.jsonl"}, "is a file, and not a folder"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_is_one_line_with_status_two(models, data, tmp_path, how):
    change, words = WRONG[how]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    given = change({"model": "reward0", "data": "data.jsonl", "out": "out.jsonl"})
    ended, _ = score(models, tmp_path / given["data"], tmp_path / given["out"], model=given["model"])
    lines = [line for line in ended.stderr.splitlines() if line.startswith("align:")]
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("what", ["model", "data"])
def test_ratings_of_another_model_or_of_other_rows_are_not_gone_on_with(models, data, tmp_path, what):
    out = tmp_path / "out.jsonl"
    score(models, data, out)
    before = out.read_bytes()
    if what == "data":
        write(data, comparisons(21))
    ended, _ = score(models, data, out, model="reward1" if what == "model" else "reward0")
    assert ended.returncode == 2
    assert f"was started with {what}" in ended.stderr
    assert out.read_bytes() == before


def test_a_demonstration_that_begins_with_its_answer_is_named(models, tmp_path):
    write(tmp_path / "data.jsonl", [Demonstration((Message("assistant", "b"),))])
    ended, _ = score(models, tmp_path / "data.jsonl", tmp_path / "out.jsonl")
    assert ended.returncode == 2
    assert "data.jsonl: row 1: a comparison needs a prompt" in ended.stderr


def test_columns_of_a_file_are_named_on_the_command_line(models, tmp_path):
    one = {"chat": [{"text": "question"}], "best": "answer a", "other": {"text": "answer b"}}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(one) + "\n")
    (tmp_path / "ours.jsonl").write_text(
        json.dumps({"prompt": "question", "chosen": "answer a", "rejected": "answer b"})
    )
    named = ("--column", "prompt=chat.0.text", "--column", "chosen=best", "--column", "rejected=other.text")
    ended, _ = score(models, tmp_path / "theirs.jsonl", tmp_path / "out.jsonl", *named)
    assert ended.returncode == 0, ended.stderr
    assert score(models, tmp_path / "ours.jsonl", tmp_path / "same.jsonl")[0].returncode == 0
    (theirs,), (ours,) = (read(str(tmp_path / name)).records for name in ("out.jsonl", "same.jsonl"))
    assert (theirs.prompt, theirs.responses) == (ours.prompt, ours.responses)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("prompt",), "--column 'prompt' is not of the form NAME=COLUMN"),
        (("prompt=",), "--column 'prompt=' is not of the form NAME=COLUMN"),
        (("prompt=a", "prompt=b"), "--column 'prompt=b': prompt is 'a' already"),
        (("prompt=a",), "rows.jsonl: row 1: columns.prompt names 'a', and the row has the columns prompt, chosen"),
    ],
)
def test_a_wrong_column_option_is_one_line(models, tmp_path, options, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    named = [part for option in options for part in ("--column", option)]
    ended, _ = score(models, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", *named)
    assert ended.returncode == 2
    assert said in ended.stderr and len(ended.stderr.splitlines()) == 1


STRICT = (
    "{% for m in messages %}{% if 'odd' in m.content %}{{ raise_exception('odd words') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ODD_ROWS = [
    {"prompt": "first", "chosen": "good", "rejected": "bad"},
    {"prompt": "an odd one", "chosen": "good", "rejected": "bad"},
    {"prompt": "last", "chosen": "good", "rejected": "bad"},
]


@pytest.fixture(scope="module")
def strict(models):
    """A reward model whose chat template refuses some words."""
    folder = models / "strict"
    shutil.copytree(models / "reward0", folder)
    (folder / "chat_template.jinja").write_text(STRICT)
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


def test_a_row_that_a_reward_models_template_refuses_is_skipped_and_counted_or_named(strict, models, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ODD_ROWS))
    ended, summary = score(models, data, tmp_path / "out.jsonl", "--on-error", "skip", model="strict")
    assert ended.returncode == 0, ended.stderr
    assert (summary["rows"], summary["rated"]) == (3, 2)
    assert summary["left_out"] == {"the reward model's chat template refuses the row": 1}
    kept = read(str(tmp_path / "out.jsonl")).records
    assert [each.prompt[0].content for each in kept] == ["first", "last"]
    ended, _ = score(models, data, tmp_path / "stopped.jsonl", model="strict")
    assert ended.returncode == 2 and ended.stderr.count("align: ") == 1
    assert f"{data}: row 2: the reward model's chat template refuses the row: " in ended.stderr.splitlines()[-1]
    assert "odd words" in ended.stderr


@pytest.mark.parametrize("combine", ["precedence", "weights"])
def test_generation_skips_the_rows_that_a_server_or_a_judge_refuses(strict, tmp_path, combine):
    data = tmp_path / "prompts.jsonl"
    texts = ["first", "an odd one", "a strange one", "last"]
    data.write_text("".join(json.dumps({"prompt": text, "answer": "x"}) + "\n" for text in texts))
    with serving() as server:
        server.refuses = "strange"
        judges = ("--judge", f"reward_model path={strict}", "--judge", "ground_truth", f"combine={combine}")
        call = ("generate", "--policy", "m", "--data", str(data), *judges, f"engine.server.base_url={server.url}")
        ended = align(*call, "--out", str(tmp_path / "out.jsonl"), "sampling.num_responses=2", "rows.on_error=skip")
        assert ended.returncode == 0, ended.stderr
        counts = json.loads(ended.stdout.splitlines()[-1])["counts"]
        dropped = {name: number for name, number in counts.items() if name.startswith("rows:dropped")}
        assert sorted(dropped.values()) == [1, 1] and counts["prompts"] == 4
        assert any("HTTP 400" in name for name in dropped)
        assert any("chat template refuses the row" in name for name in dropped)
        server.refuses = None
        stopped = align(*call, "--out", str(tmp_path / "stopped.jsonl"), "sampling.num_responses=2")
        assert stopped.returncode == 2
        assert f"{data}: row 2: " in stopped.stderr and "refuses the row" in stopped.stderr
        server.refuses = "strange"
        refused = align(*call, "--out", str(tmp_path / "refused.jsonl"), "sampling.num_responses=2")
        assert refused.returncode == 2 and f"{data}: row 3: " in refused.stderr and "HTTP 400" in refused.stderr


@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_a_row_is_not_graded_by_the_answer_of_another_row_with_its_prompt(tmp_path, on_error):
    rows = [("2+2?", "4", ["4", "5"]), ("2+2?", "11", ["11", "4"]), ("3+3?", "6", ["6", "7"])]
    lines = [{"prompt": ask, "responses": [{"content": text} for text in texts], "answer": a} for ask, a, texts in rows]
    data, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe.write_text(
        f"run: graded\nruns: {tmp_path}/runs\npolicy: {{}}\ndata:\n  rows: {{path: {data}, on_error: {on_error}}}\n"
        "steps:\n  graded: {stage: score, data: rows, judges: [{name: ground_truth}]}\n"
    )
    if on_error == "error":
        with pytest.raises(InputError, match=r"row 2: the row has the prompt of an earlier row, and another answer"):
            run_recipe(Command(recipe, ()), Told(), disk=(0, 0))
        return
    run_recipe(Command(recipe, ()), Told(), disk=(0, 0))
    made = {row.prompt[0].content: row for row in read(str(tmp_path / "runs/graded/graded/groups.jsonl")).records}
    assert {name: made[name].responses[0].content for name in made} == {"2+2?": "4", "3+3?": "6"}
    assert all([one.reward for one in row.responses] == [1.0, 0.0] for row in made.values())


JUDGED = (
    SMALL_POLICY
    + """\
data:
  answers: {{path: DATA}}
steps:
  rated:
    stage: score
    data: answers
    judges:
      - JUDGE
"""
)
BY_MODEL = "{{name: reward_model, settings: {{path: MODELS/reward0}}}}"
BY_CHAT = (
    "{{name: llm, settings: {{model: MODELS/policy, mode: rating, max_new_tokens: 3, attempts: 1, "
    "engine: {{local: {{precision: fp32}}}}}}}}"
)


def test_the_ledger_counts_the_forward_passes_of_a_reward_model(models, data, tmp_path):
    text = JUDGED.replace("JUDGE", BY_MODEL).replace("MODELS", str(models)).replace("DATA", str(data))
    made, _ = run(tmp_path, text=text)
    model, tokenizer = load_reward_model(PolicySettings(path=str(models / "reward0")))
    tokens = pairs = 0
    for one in comparisons(20):
        prefixes = set()
        for each in one.responses:
            turns = f"user\n{one.prompt[0].content}<|im_end|><|im_start|>assistant\n{each.content}<|im_end|>"
            ids = tokenizer("<|im_start|>" + turns, add_special_tokens=False)["input_ids"]
            prefixes |= {tuple(ids[:end]) for end in range(1, len(ids) + 1)}
        tokens, pairs = tokens + len(prefixes), pairs + sum(map(len, prefixes))
    config, ledger = model.base.config, made["rated"]["ledger"]
    weights = sum(each.numel() for name, each in model.base.named_parameters() if ".layers." in name and each.ndim == 2)
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    flops = 2 * weights * tokens + 4 * width * config.num_hidden_layers * pairs
    assert (ledger["tokens_computed"], ledger["flops"]) == (tokens, flops)


def test_the_ledger_counts_the_forward_passes_of_a_chat_model_that_judges(data, tmp_path):
    models = tmp_path / "models"
    save_reward_and_policy(models, config={**SMALL_LLAMA, "max_position_embeddings": 4096})
    text = JUDGED.replace("JUDGE", BY_CHAT).replace("MODELS", str(models)).replace("DATA", str(data))
    before, engine = PROCESS_USAGE.now, load_engine(str(models / "policy"))
    with pytest.raises(RunError, match="59 responses left out, no verdict"):  # no answer of this model is a rating
        run(tmp_path, text=text)
    used = PROCESS_USAGE.now.since(before)
    judge = llm_judge(LlmSettings(model=str(models / "policy"), mode="rating", max_new_tokens=3, attempts=1))
    rows = [(Prompt(one.prompt), [each.content for each in one.responses]) for one in comparisons(20)]
    judge.engine = engine
    list(judge(rows))
    assert used.judge_tokens == engine.throughput.processed_tokens > 59 * 3
    assert used.judge_flops > 0 and used.judge_unknown == ""
