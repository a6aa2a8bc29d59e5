"""Steps and commands that sample, judge and evaluate in two processes: the same files as in one, and a kill undone."""

import json
import time
from pathlib import Path

import psutil
import pytest
from forked import fork_launches, start_forked
from launching import finish, start
from middle_recipe import MIDDLE, recipe_in
from small_runs import ROOT, run
from test_cli import align

from align.commands import evaluate as evaluation
from align.commands.one_step import settings_of
from align.commands.score import score as score_file
from align.distributed.progress import SilentProgress
from align.errors import InputError

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TWO = "launch/ddp-cpu-2.yaml"
RECIPE = """
run: small
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 256, initializer_range: 0.3}}
  chat_template: chatml
data:
  ratings: {{path: "tasks:general", limit: 16, responses: 3}}
  prompts: {{path: "tasks:general", split: train}}
  test: {{path: "tasks:general", split: test, limit: 7}}
  programs: {{path: "tasks:code", split: test, limit: 5}}
  pairs: {{path: "tasks:general", limit: 90, responses: 3, seed: 5}}
steps:
  base: {{stage: import, vocab_size: 300}}
  rate: {{stage: reward_model, loss: bt, data: ratings, train: {{learning_rate: 1.0e-3, prompts_per_step: 8}}}}
  samples:
    stage: generate
    data: prompts
    policies: [base]
    prompts: {{prompts: 150}}
    sampling: {{num_responses: 3, max_new_tokens: 9}}
    engine: {{local: {{precision: fp32, batch_size: 8}}}}
    judges: [{{name: reward_model, settings: {{path: "step:rate"}}}}]
  rescored:
    stage: score
    data: samples
    judges: [{{name: verifier, weight: 2}}, {{name: reward_model, settings: {{path: "step:rate"}}}}]
    combine: weights
  evaluate:
    stage: evaluate
    policies: [base]
    tasks:
      general: {{data: test, max_new_tokens: 8, temperature: 0.7}}
      code: {{data: programs, max_new_tokens: 8}}
      nll: {{data: pairs, task: nll}}
"""
# A launch of `score` has a test of its own
LAUNCHED = [f"steps.{name}.launch={TWO}" for name in ("samples", "evaluate")]
FILES = {
    "samples": ["groups.jsonl"],
    "evaluate-base": ["general.jsonl", "code.jsonl", "nll.jsonl"],
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The recipe run in this process, and with the steps that train nothing in two processes each."""
    alone, launched = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("launched")
    made_alone = run(alone, text=RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        fork_launches(patch)
        return (alone / "runs/small", *made_alone), (launched / "runs/small", *run(launched, *LAUNCHED, text=RECIPE))


def test_two_processes_leave_the_same_bytes_and_scores_as_one(both):
    (alone, made, _), (launched, made_by_two, told) = both
    assert len([note for note in told.notes if "accelerate launch" in note]) == len(FILES)
    for step, names in FILES.items():
        for name in names:
            content = (alone / step / name).read_bytes()
            assert content.count(b"\n") >= 5
            assert (launched / step / name).read_bytes() == content, f"{step}/{name}"
        there = {path.name for path in (launched / step).iterdir()}
        assert there == {"manifest.json", "launch.log", *names}  # nothing of what the processes kept is left
        assert made_by_two[step]["fingerprint"] == made[step]["fingerprint"]
        assert (made[step]["ledger"]["devices"], made_by_two[step]["ledger"]["devices"]) == (1, 2)
    assert made_by_two["evaluate-base"]["scores"] == made["evaluate-base"]["scores"]
    assert made_by_two["samples"]["report"] == made["samples"]["report"]
    tokens = [each["samples"]["ledger"]["tokens_computed"] for each in (made, made_by_two)]
    assert tokens[0] == tokens[1]  # of both processes together, each prompt computed once


def kill(child):
    """Kill the launcher and the processes that it has started, each of which leads a session of its own."""
    launcher = psutil.Process(child.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()


def forked(*arguments, file=TWO, program=("-m", "align")):
    """A command of align in the processes of a launch, which are forked."""
    return start_forked(ROOT / file, "--main_process_port", "0", *program, *arguments)


def summary_of(child):
    """The one line of JSON that the first process ends with."""
    output, errors = finish(child)
    assert child.returncode == 0, errors[-3000:]
    (line,) = output.splitlines()
    return json.loads(line)


def items(path):
    """The keys of what a process has finished, without the header and what a kill has torn."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a text may hold other ends of a line
    return [json.loads(line)[0] for line in lines[1:]]


def test_a_killed_launch_goes_on_in_one_process_and_makes_nothing_twice(both, tmp_path):
    policy, kept = (
        both[0][0] / "base",
        [tmp_path / f".two.jsonl.work/.groups.jsonl.samples{name}" for name in ("", "-1")],
    )
    command = ["generate", "--policy", policy, "--data", "tasks:general", "--limit", "120"]
    more = ["sampling.max_new_tokens=40", "engine.local.precision=fp32", "engine.local.batch_size=4"]
    judge = ["--judge", "verifier reward=both"]
    call = [ROOT / "tests/held.py", "items", "60", *command, "--out", tmp_path / "two.jsonl", *judge, *more]
    child, last = start(ROOT / TWO, "--main_process_port", "0", *call), time.monotonic() + 300
    while min(len(items(path)) for path in kept) < 10:  # each of them is at work
        assert child.poll() is None and time.monotonic() < last, finish(child, 5)
        time.sleep(0.05)
    kill(child)
    child.communicate()
    before = [items(path) for path in kept]
    assert not set(before[0]) & set(before[1])
    assert 20 <= len(before[0]) + len(before[1]) < 120 * 4
    for name in ("two", "one"):
        ended = align(*map(str, command), "--out", str(tmp_path / f"{name}.jsonl"), *judge, *more)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    after = [items(path) for path in kept]
    assert after[1] == before[1] and after[0][: len(before[0])] == before[0]
    assert sorted(after[0] + after[1]) == sorted(
        items(tmp_path / ".one.jsonl.work/.groups.jsonl.samples")
    )  # each of them once
    print(f"of 480 responses {len(before[0])} and {len(before[1])} were there when the two processes were killed")


def test_a_launched_score_rates_what_one_process_rates(both, tmp_path):
    folder = both[0][0]
    model, data, out = str(folder / "rate"), str(folder / "samples/groups.jsonl"), tmp_path / "two.jsonl"
    found = summary_of(forked("score", "--model", model, "--data", data, "--out", out))
    alone = score_file(model, data, tmp_path / "one.jsonl", progress=SilentProgress())
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    rated = [len(items(tmp_path / f".two.jsonl.work/.groups.jsonl.ratings{name}")) for name in ("", "-1")]
    assert min(rated) > 0 and sum(rated) == alone["rows"] > 64
    changing = {"out", "seconds", "rated_now"}
    assert {name: found[name] for name in found.keys() - changing} == {
        name: alone[name] for name in alone.keys() - changing
    }


@pytest.mark.parametrize(
    ("task", "data", "keeps"),
    [("general", "tasks:general", True), ("preference", "groups", False)],
)
def test_a_launched_evaluation_gives_the_scores_of_one_process(both, tmp_path, task, data, keeps):
    folder, out = both[0][0], tmp_path / "two.jsonl"
    data = str(folder / "samples/groups.jsonl") if data == "groups" else data
    policy, more = (
        str(folder / "base"),
        ("engine.local.precision=fp32", "sampling.max_new_tokens=8", "sampling.temperature=1") * (task == "general"),
    )
    where = ("--out", out) if keeps else ()
    found = summary_of(
        forked("evaluate", "--task", task, "--data", data, "--policy", policy, "--limit", "90", *where, *more)
    )
    settings = settings_of(evaluation.EvaluateSettings, (), more)
    asked = evaluation.Request(task, data, policy, (), 90)
    alone = evaluation.evaluate(
        asked, tmp_path / "one.jsonl" if keeps else None, settings=settings, progress=SilentProgress()
    )
    assert json.loads(json.dumps({**alone, "out": None})) == {**found, "out": None}
    assert found["scores"]
    if keeps:
        assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
        asked_by = [len(items(tmp_path / f".two.jsonl.work/.evaluate.samples{name}")) for name in ("", "-1")]
        assert max(asked_by) - min(asked_by) <= 1


def test_no_process_removes_what_another_is_writing(both, tmp_path):
    """Temporary files of killed attempts are removed before any process writes its own."""
    slow_start = [str(Path(__file__).with_name("slow_start.py"))]
    policy, out = both[0][0] / "base", tmp_path / "rows.jsonl"
    command = ["generate", "--policy", policy, "--data", "tasks:general", "--limit", "4", "--out", out]
    work = tmp_path / ".rows.jsonl.work"
    work.mkdir()
    left = work / ".groups.jsonl.partial-0123abcd"
    left.write_text("of a killed attempt")
    summary_of(forked(*command, "sampling.max_new_tokens=4", program=slow_start))
    assert len(out.read_text().splitlines()) == 4
    assert not left.exists()


def test_what_goes_wrong_in_one_process_stops_all_and_is_named(both, tmp_path):
    """Every second row is judged by the second process, and one of them has no answer."""
    rows = [{"prompt": f"{number} and 1?", "answer": str(number + 1)} for number in range(100)]
    del rows[71]["answer"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "generate",
        "--policy",
        both[0][0] / "base",
        "--data",
        tmp_path / "rows.jsonl",
        "--out",
        tmp_path / "o.jsonl",
    ]
    child = forked(*command, "--judge", "ground_truth missing=error", "sampling.max_new_tokens=4")
    _, errors = finish(child)
    assert child.returncode == 1
    lines = {line for line in errors.splitlines() if line.startswith("align: ")}
    assert len(lines) == 1
    assert lines.pop().startswith("align: judging: process 1 of 2: prompt '71 and 1?': the prompt has no `answer`")
    assert not (tmp_path / "o.jsonl").exists()


def test_a_launch_that_cuts_the_weights_is_refused_by_its_processes_in_one_line(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
    command = [
        "generate",
        "--policy",
        tmp_path,
        "--data",
        "tasks:general",
        "--out",
        tmp_path / "o.jsonl",
        "--limit",
        "2",
    ]
    child = forked(*command, file="launch/zero3-cpu-2.yaml")
    _, errors = finish(child)
    assert child.returncode == 1
    refusal = (
        "align: the launch file enables DEEPSPEED, but generate, score and evaluate steps split the rows over "
        "processes and keep the whole model in each; use a launch file such as launch/ddp-8gpu.yaml"
    )
    lines = {line for line in errors.splitlines() if line.startswith("align: ")}
    others = lines - {refusal}  # a process that has not begun when the other ends is ended by the launcher
    assert refusal in lines and all("SIGTERM" in line for line in others), lines


CUTTING = {"zero1-cpu-2": "DEEPSPEED", "zero3-8gpu": "DEEPSPEED", "zero3-4x8gpu": "DEEPSPEED", "fsdp2-8gpu": "FSDP"}


@pytest.mark.parametrize(("name", "way"), CUTTING.items())
@pytest.mark.parametrize("step", ["samples", "rescored", "evaluate", "rpo.generate"])
def test_a_recipe_that_would_cut_the_weights_of_a_step_that_does_not_train_is_refused(tmp_path, step, name, way):
    file, key = ROOT / f"launch/{name}.yaml", f"steps.{step}.launch"
    with pytest.raises(InputError) as caught:
        recipe_in(tmp_path, MIDDLE, f"{key}={file}")
    said = (
        "but generate, score and evaluate steps split the rows over processes and keep the whole model in each; "
        "use a launch file such as launch/ddp-8gpu.yaml"
    )
    assert str(caught.value) == f"override '{key}={file}': {key}: {file} enables {way}, {said}"


@pytest.mark.parametrize("name", ["cpu-1", "gpu-1", "ddp-cpu-2", "ddp-8gpu"])
def test_every_other_launch_file_is_taken_and_changes_nothing_of_what_a_step_is(tmp_path, name):
    file = ROOT / f"launch/{name}.yaml"
    launched = recipe_in(
        tmp_path, MIDDLE, *(f"steps.{step}.launch={file}" for step in ("samples", "rescored", "evaluate"))
    )
    assert [step.key for step in launched.pipeline()] == [step.key for step in recipe_in(tmp_path).pipeline()]
    assert launched.steps["evaluate-general"].launch == str(file)
