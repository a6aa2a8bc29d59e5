"""The command line from outside: one clear line and the right status for whatever is wrong, and a whole small run."""

import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.cli import main

ROOT = Path(__file__).parents[1]

SMALL = """
run: small
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
           num_attention_heads: 2, max_position_embeddings: 256, initializer_range: 0.05}}
  chat_template: chatml
data:
  shown: {{path: "tasks:general", limit: 40}}
  pairs: {{path: "tasks:general", limit: 30, responses: 2, held_out: 0.2}}
  groups: {{path: "tasks:general", limit: 30, responses: 4, held_out: 0.2}}
  prompts: {{path: "tasks:general", split: test, limit: 10}}
steps:
  base: {{stage: import, vocab_size: 1024}}
  sft: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-3, prompts_per_step: 10}}}}
  dpo: {{stage: preference, data: pairs, loss: {{name: dpo}}, train: {{learning_rate: 1.0e-4, prompts_per_step: 8}}}}
  rpo: {{stage: preference, data: groups, train: {{learning_rate: 1.0e-4, prompts_per_step: 8, checkpoint_steps: 1}}}}
  table: {{stage: evaluate, policies: [sft, rpo], tasks: {{general: {{data: prompts, max_new_tokens: 8}}}}}}
"""


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def align(*arguments: str) -> Ended:
    """The command in this process: what it imports is imported once for all tests."""
    stdout, stderr = io.StringIO(), io.StringIO()
    status = 0
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["align", *arguments])
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(ROOT)
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return Ended(status, stdout.getvalue(), stderr.getvalue())


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(runs=tmp_path / "runs"))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A recipe that has run, with what the run said and printed."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "small.yaml"
    path.write_text(SMALL.format(runs=folder / "runs"))
    result = align("run", str(path))
    assert result.returncode == 0, result.stderr
    return path, result.stderr, result.stdout


WRONG = {
    "a recipe that is not there": (["check", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
    "a misspelled key of a step": (["steps.dpo.train.learnin_rate=1"], "did you mean 'learning_rate'?"),
    "a misspelled key at the top": (["polcy.path=x"], "did you mean 'policy'?"),
    "a value out of range": (["steps.dpo.train.learning_rate=-1"], "steps.dpo.train.learning_rate"),
    "a text for a number": (["steps.dpo.train.prompts_per_step=many"], "steps.dpo.train.prompts_per_step"),
    "an unknown loss": (["steps.dpo.loss.name=rpo_bwd"], "steps.dpo.loss: no preference loss is called 'rpo_bwd'"),
    "an unknown setting of a loss": (["steps.dpo.loss.settings.bta=1"], "did you mean 'beta'?"),
    "an unknown stage": (["steps.dpo.stage=prefrence"], "did you mean 'preference'?"),
    "an unknown source": (["steps.dpo.data=paris"], "did you mean 'pairs'?"),
    "an unknown step to start from": (["steps.dpo.policy=stf"], "did you mean 'sft'?"),
    "a file that is not there": (["data.pairs.path=./gone.jsonl", "data.pairs.responses=4"], "no such file"),
    "an override that is none": (["steps"], "key.sub=value"),
    "an unknown architecture": (["policy.from_config.model_type=lama"], "did you mean 'llama'?"),
    "rows that have no end": (["data.shown.limit=null"], "set limit"),
    "demonstrations for a preference": (["steps.dpo.data=rows"], "needs comparisons"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line_with_status_two(recipe: Path, tmp_path: Path, case: str):
    overrides, said = WRONG[case]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    arguments = overrides if overrides[0] == "check" else ["check", str(recipe), f"data.rows.path={rows}", *overrides]
    result = align(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("align:")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert said in lines[0]
    assert "Traceback" not in result.stderr


WRONG_CALLS = {
    "no task": (["evaluate"], "align: Missing option '--task'; see "),
    "a limit of nothing": (
        ["score", "--model", "m", "--data", "d", "--out", "o.jsonl", "--limit", "0"],
        "align: Invalid value for '--limit'",
    ),
    "an unknown command": (["rum"], "align: No such command 'rum'"),
    "an unknown option": (["check", "recipe.yaml", "--bogus"], "align: No such option: --bogus"),
    "an option without its value": (["evaluate", "--task"], "align: Option '--task' requires an argument"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_call_is_answered_in_one_line_with_status_two(case: str):
    arguments, said = WRONG_CALLS[case]
    ended = align(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(said)


def test_help_is_for_who_asks_for_it_or_gives_nothing():
    for arguments, status in (([], 2), (["--help"], 0), (["run", "--help"], 0)):
        ended = align(*arguments)
        assert (ended.returncode, ended.stderr) == (status, "")
        assert "Usage:" in ended.stdout


def test_a_command_that_is_stopped_from_the_keyboard_says_how_it_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("align.workflow.launcher.load_recipe", stopped)
    ended = align("check", str(recipe))
    assert ended.returncode == 130
    assert ended.stderr == "align: interrupted; rerun the same command to resume from the last checkpoint\n"


def test_a_warm_up_that_no_step_follows_is_told(recipe: Path):
    short = ["data.shown.limit=10", "steps.sft.train.warmup_steps=4"]
    ended = align("run", str(recipe), "--until", "sft", *short)
    assert ended.returncode == 0, ended.stderr
    assert "warmup_steps is 4, and the run has 1 steps: all of it is warm-up" in ended.stderr


BAD_ROWS = {
    "an empty response": ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty"),
    "a reward that is no number": (
        {"prompt": "a", "responses": [{"content": "b", "reward": float("nan")}, {"content": "c", "reward": 1.0}]},
        "is nan",
    ),
    "a wrong column": ({"question_text": "a", "first": "b"}, "question_text"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_and_leaves_no_artifact(recipe: Path, tmp_path: Path, case: str):
    row, said = BAD_ROWS[case]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    pairs = [f"data.pairs.path={rows}", "data.pairs.responses=4"]
    result = align("run", str(recipe), *pairs, "data.shown.limit=10", "steps.sft.train.max_steps=1")
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("align:")
    assert "rows.jsonl" in last
    assert said in last
    assert "data.pairs.path" in last
    assert not (tmp_path / "runs").exists()  # the rows of every step are opened before the first step


def test_a_run_leaves_policies_that_transformers_loads_and_a_table(finished: tuple[Path, str, str]):
    path, _, printed = finished
    root = path.parent / "runs/small"
    for step in ("base", "sft", "dpo", "rpo"):
        manifest = json.loads((root / step / "manifest.json").read_text())
        assert {"fingerprint", "settings", "seed", "versions"} <= manifest.keys()
        tokenizer = AutoTokenizer.from_pretrained(root / step)
        model = AutoModelForCausalLM.from_pretrained(root / step)
        assert tokenizer.chat_template
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert not list((root / step).glob("checkpoint-*"))
    table = json.loads((root / "table.json").read_text())
    assert {step: found["general"]["n"] for step, found in table.items()} == {"sft": 10, "rpo": 10}
    for word in ("Training", "sft", "dpo", "rpo", "Results with 95"):
        assert word in printed
    shown = printed.partition("Results with 95")[2]
    for step in ("sft", "rpo"):
        assert f"{step}  " in shown and f"{100 * table[step]['general']['value']:.1f} [" in shown


def test_every_row_of_a_run_is_accounted_for(finished: tuple[Path, str, str]):
    path, _, _ = finished
    for step, read in (("sft", 40), ("dpo", 30), ("rpo", 30)):
        manifest = json.loads((path.parent / "runs/small" / step / "manifest.json").read_text())
        counts = manifest["rows"]
        dropped = sum(number for name, number in counts.items() if name.startswith("dropped:"))
        assert counts["rows"] == read == counts["trained"] + counts["held_out"] + dropped
        lines = (path.parent / "runs/small" / step / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == manifest["optimizer_steps"] == -(-counts["trained"] // (10 if step == "sft" else 8))


def test_the_first_losses_of_a_run_have_their_known_values(finished: tuple[Path, str, str]):
    path, _, _ = finished
    first = json.loads((path.parent / "runs/small/dpo/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)


def test_a_second_run_does_nothing_and_a_changed_step_runs_again_with_what_follows(finished: tuple[Path, str, str]):
    path, _, _ = finished
    again = align("run", str(path))
    assert again.returncode == 0
    assert again.stderr.count("finished before, skipped") == 6
    changed = align("run", str(path), "steps.rpo.loss.settings.eta=2.0")
    assert changed.returncode == 0, changed.stderr
    assert changed.stderr.count("finished before, skipped") == 4
    assert "reference log-probabilities: 0 groups to compute, 30 cached or repeated" in changed.stderr
    assert align("run", str(path)).returncode == 0  # put back for the other tests


def test_train_runs_one_step_and_asks_for_its_inputs(finished: tuple[Path, str, str]):
    path, _, _ = finished
    done = align("train", str(path), "--step", "dpo")
    assert done.returncode == 0
    assert "dpo: finished before, skipped" in done.stderr
    early = align("train", str(path), "--step", "dpo", "run=other")
    assert early.returncode == 2
    assert "needs 'base'" in early.stderr


def test_preview_shows_the_rows_of_a_step(recipe: Path):
    shown = align("preview", str(recipe), "--step", "rpo", "--rows", "2")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("prompt tokens") == 2
    assert shown.stdout.count("reward") == 8
    assert "groups: rows that tasks:general generates" in shown.stdout
    assert align("preview", str(recipe), "--step", "table").returncode == 2


def test_preview_shows_the_format_of_each_source_and_the_columns_that_decide_it(recipe: Path):
    """The columns of each row are by hand; the format is that of the table in docs/data.md."""
    rows = {
        "two": ({"question": "a", "chosen": "b", "rejected": "c"}, []),
        "chats": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, []),
        "nested": ({"q": [{"text": "a"}], "good": "b"}, ["columns={prompt: q.0.text, completion: good}"]),
        "named": ({"instruction": "a", "output": "b"}, ["format=alpaca"]),
    }
    wanted = {
        "two": "preference, detected by the columns chosen, rejected",
        "chats": "messages, detected by the columns messages",
        "nested": "prompt_completion, detected by the columns prompt (q.0.text), completion (good)",
        "named": "alpaca, as its format says, from the columns instruction, output",
    }
    overrides = ["steps.sft.data={chats: 0.4, nested: 0.3, named: 0.3}"]
    for name, (row, settings) in rows.items():
        path = recipe.parent / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        overrides += [f"data.{name}.path={path}", *(f"data.{name}.{setting}" for setting in settings)]
    printed = align("preview", str(recipe), "--step", "sft", *overrides)
    assert printed.returncode == 0, printed.stderr
    printed = printed.stdout + align("preview", str(recipe), "--step", "dpo", "steps.dpo.data=two", *overrides).stdout
    for name, said in wanted.items():
        assert f"\n{name}: {recipe.parent / name}.jsonl read as {said}\n" in f"\n{printed}", printed


def test_check_counts_the_tokens_that_training_then_computes(finished: tuple[Path, str, str]):
    path, _, _ = finished
    said = align("check", str(path)).stdout
    lines = (path.parent / "runs/small/rpo/metrics.jsonl").read_text().splitlines()
    whole = [json.loads(line) for line in lines]
    groups = sum(line["groups"] for line in whole)
    assert f"{groups} trained" in said
    expected = int(said.split("rpo  preference\n")[1].split("tokens")[1].split(" per epoch")[0].replace(",", ""))
    # Micro-batches may share a prefix between groups, so training computes at most what a tree a group would.
    assert sum(line["tokens_computed"] for line in whole) <= expected


def test_a_child_process_ends_with_the_status_and_the_line_too():
    ended = subprocess.run(
        [sys.executable, "-m", "align", "check", "no.yaml"], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "align: no.yaml: no such recipe"


@pytest.mark.slow
def test_what_other_libraries_say_is_not_among_the_results(finished: tuple[Path, str, str]):
    path, _, _ = finished
    policy, more = path.parent / "runs/small/sft", ["--limit", "2", "sampling.max_new_tokens=4"]
    call = ["evaluate", "--task", "general", "--data", "tasks:general", "--policy", str(policy), *more]
    ended = subprocess.run([sys.executable, "-m", "align", *call], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert json.loads(line)["scores"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install align[deepspeed]")
def test_deepspeed_says_nothing_on_stdout_when_accelerate_imports_it():
    code = "import align.models.policy, deepspeed"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


def test_help_answers_before_anything_heavy_is_imported():
    code = (
        "import sys\n"
        "sys.argv = ['align', '--help']\n"
        "from align.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'omegaconf', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    assert time.monotonic() - began < 100  # it is a hang that this would catch; how fast it is, is in the README


def test_the_version_is_that_of_the_package():
    done = subprocess.run([sys.executable, "-m", "align", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"align {version('align')}\n"


def test_a_shell_completes_commands(monkeypatch: pytest.MonkeyPatch):
    environment = {"_ALIGN_COMPLETE": "complete_bash", "COMP_WORDS": "align ev", "COMP_CWORD": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = "import sys; sys.argv = ['align']; from align.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["evaluate"], done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a device that is always full")
@pytest.mark.parametrize("arguments", [["keys"], ["--version"], ["schema", "--json"]])
def test_a_full_disk_under_the_output_is_one_line(arguments):
    with Path("/dev/full").open("w") as full:
        call = [sys.executable, "-m", "align", *arguments]
        ended = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stderr) == (1, "align: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("override", ["run=" + 300 * "x", "steps." + 300 * "x" + ".stage=import"])
def test_a_name_that_no_folder_can_have_is_one_line(override):
    call = [sys.executable, "-m", "align", "check", "recipes/quickstart.yaml", override]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert ended.returncode == 2
    assert any("at most 200 characters" in line for line in ended.stderr.splitlines()), ended.stderr
    assert all(line.startswith("align: ") for line in ended.stderr.splitlines())
