"""Everything that the steps of a recipe read is opened before the first one runs."""

import json
import subprocess
import sys

import pytest

from align.errors import InputError
from align.workflow.recipe.inputs import check_inputs
from align.workflow.recipe.load import load_recipe

UNKNOWN = {"prompt": "a", "responses": [{"content": "b"}, {"content": "c"}]}
SCORED = {"prompt": "a", "responses": [{"content": "b", "reward": 1.0}, {"content": "c", "reward": 0.5}]}
TIED = {"prompt": "a", "responses": [{"content": "b", "reward": 1.0}, {"content": "c", "reward": 1.0}]}
LABELS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ROWS = {
    "pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 20,
    "groups": [SCORED] * 20,
    "ties": [TIED] * 20,
    "unlabelled": [UNKNOWN] * 20,
    "late": [*[UNKNOWN] * 30, SCORED],
    "answers": [{"prompt": "a", "completion": "b"}] * 20,
    "prompts": [{"prompt": "a"}] * 20,
    "rated": [{"prompt": "a", "response": "b", **dict.fromkeys(LABELS, 2)}] * 20,
    "empty": [],
    "foreign": [{"frage": "a", "antwort": "b"}],
    "questions": [{"question": "a"}],
    "gsm8k": [{"question": "a", "answer": "#### 3"}],
}

TRAIN = "train: {learning_rate: 1.0e-4}"
STEPS = {
    "sft": f"{{stage: sft, data: SOURCE, {TRAIN}}}",
    "dpo": f"{{stage: preference, data: SOURCE, loss: {{name: dpo}}, {TRAIN}}}",
    "rpo": f"{{stage: preference, data: SOURCE, loss: {{name: rpo_sq}}, {TRAIN}}}",
    "rate": f"{{stage: reward_model, data: SOURCE, {TRAIN}}}",
    "rate bt": f"{{stage: reward_model, data: SOURCE, loss: bt, {TRAIN}}}",
    "gsm8k": "{stage: evaluate, models: [m], tasks: {t: {task: gsm8k, data: SOURCE}}}",
    "generate": "{stage: generate, models: [m], data: SOURCE, judges: []}",
    "score": "{stage: score, data: SOURCE, judges: [{name: verifier}]}",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    return tmp_path


def errors_of(folder, steps, sources, *, policy="./m"):
    """Return the errors of opening what a recipe of these steps reads."""
    data = "\n".join(f"  {name}: {{path: {name}.jsonl}}" for name in sources)
    written = "\n".join(f"  {name}: {step}" for name, step in steps.items())
    path = folder / "r.yaml"
    path.write_text(f"run: mine\npolicy: {{path: {policy}}}\ndata:\n{data}\nsteps:\n{written}\n")
    try:
        check_inputs(load_recipe(path), path)
    except InputError as error:
        return [line.removeprefix(f"{path}:") for line in str(error).splitlines()]
    return []


FIT = {
    "sft": ("answers", "pairs", "groups"),
    "dpo": ("pairs", "groups", "late"),
    "rpo": ("pairs", "groups", "ties", "late"),
    "rate": ("rated",),
    "rate bt": ("pairs", "groups"),
    "gsm8k": ("gsm8k",),
    "generate": ("prompts", "pairs", "answers"),
    "score": ("pairs", "unlabelled", "answers"),
}


@pytest.mark.parametrize(("step", "source"), [(step, source) for step, sources in FIT.items() for source in sources])
def test_rows_that_fit_their_step_pass(folder, step, source):
    assert errors_of(folder, {"s": STEPS[step].replace("SOURCE", source)}, [source]) == []


UNFIT = {
    ("sft", "prompts"): "row 1: the row is a prompt without a response, and sft needs demonstrations",
    ("sft", "ties"): "none of the first 20 rows can be trained on: all rewards of a row are equal",
    ("dpo", "answers"): "row 1: the row is a demonstration, and preference needs comparisons",
    ("dpo", "unlabelled"): "none of the first 20 rows can be trained on: the responses have no rewards",
    ("dpo", "ties"): "none of the first 20 rows can be trained on: all rewards of a row are equal",
    ("rpo", "unlabelled"): "none of the first 20 rows can be trained on: the responses have no rewards",
    ("rpo", "empty"): "empty.jsonl: contains no rows",
    ("rate", "pairs"): "no response has an attribute, and loss: regression needs helpfulness, correctness",
    ("rate bt", "ties"): "all rewards of a row are equal",
    ("gsm8k", "questions"): "row 1 has no answer; gsm8k rows have question, answer",
    ("gsm8k", "empty"): "no rows",
    ("generate", "foreign"): "row 1: no format matches the columns frage, antwort",
    ("score", "broken"): "broken.jsonl: line 1: not valid JSON",
    ("generate", "gone"): "gone.jsonl: no such file or folder",
}


@pytest.mark.parametrize(("step", "source"), UNFIT)
def test_rows_that_do_not_fit_their_step_are_an_error_with_the_line_of_their_path(folder, step, source):
    (line,) = errors_of(folder, {"s": STEPS[step].replace("SOURCE", source)}, [source])
    assert line.startswith(f"4: data.{source}.path: ")
    assert UNFIT[step, source] in line


def test_rows_of_another_kind_pass_where_they_are_skipped_and_others_are_left(folder):
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [asked]}] * 20 + [{"messages": [asked, answered]}]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = {"s": STEPS["sft"].replace("SOURCE", "mixed")}
    assert "row 1: the row is a prompt without a response" in errors_of(folder, step, ["mixed"])[0]
    path = folder / "r.yaml"
    path.write_text(path.read_text().replace("mixed.jsonl", "mixed.jsonl, on_error: skip"))
    check_inputs(load_recipe(path), path)
    (folder / "mixed.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(InputError, match="none of the first 1 rows can be trained on: mixed.jsonl: row 1: the row is"):
        check_inputs(load_recipe(path), path)


def test_all_inputs_of_all_steps_are_opened(folder):
    steps = {
        f"s{number}": STEPS[step].replace("SOURCE", source).replace("{t:", f"{{t{number}:")
        for number, (step, source) in enumerate(UNFIT)
    }
    sources = list(dict.fromkeys(source for _, source in UNFIT))
    launched = STEPS["sft"].replace("SOURCE", "answers").replace("}}", "}, launch: nowhere.yaml}")
    judged = "{stage: score, data: pairs, judges: [{name: reward_model, settings: {path: ./nowhere}}]}"
    own = "{stage: import, path: empty.jsonl}"
    answered = "{stage: evaluate, tasks: {t: {task: gsm8k, data: gsm8k, responses: [nowhere.jsonl]}}}"
    steps |= {"launched": launched, "judged": judged, "own": own, "answered": answered}
    lines = errors_of(folder, steps, [*sources, "gsm8k"], policy="./nowhere")
    keys = [line.split(": ")[1] for line in lines]
    assert keys[0] == "policy.path"
    assert {f"data.{source}.path" for source in sources} <= set(keys)
    assert {
        "steps.launched.launch",
        "steps.judged.judges.0.settings.path",
        "steps.own.path",
        "steps.answered.tasks.t.responses.0",
    } <= set(keys)
    assert [int(line.split(":")[0]) for line in lines] == sorted(int(line.split(":")[0]) for line in lines)


def test_what_no_step_reads_is_not_opened(folder):
    assert errors_of(folder, {"s": STEPS["sft"].replace("SOURCE", "answers")}, ["answers", "gone"]) == []


def test_rows_that_a_step_makes_are_not_opened_before_it(folder):
    steps = {"g": STEPS["generate"].replace("SOURCE", "prompts"), "s": STEPS["rpo"].replace("SOURCE", "g")}
    assert errors_of(folder, steps, ["prompts"]) == []


MODELS = {
    "a folder without a model": (".", "holds no model"),
    "a file": ("pairs.jsonl", "is a file, and a model is a folder"),
    "a folder that is not there": ("./nowhere", "no such folder"),
    "a GGUF file that is not there": ("gguf:nowhere.gguf", "no such GGUF file"),
    "a GGUF file without its prefix": ("model.gguf", "write gguf:model.gguf"),
    "a torn configuration": ("torn", "cannot be read as JSON"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_one_is_an_error(folder, case):
    path, said = MODELS[case]
    (folder / "model.gguf").touch()
    (folder / "torn").mkdir()
    (folder / "torn/config.json").write_text("{")
    (line,) = errors_of(folder, {"s": STEPS["sft"].replace("SOURCE", "answers")}, ["answers"], policy=path)
    assert line.startswith("2: policy.path: ") and said in line


def test_wrong_inputs_are_found_before_torch_is_imported(folder):
    errors_of(folder, {"s": STEPS["dpo"].replace("SOURCE", "answers")}, ["answers"])
    code = (
        "import sys, atexit\n"
        "sys.argv = ['align', 'run', 'r.yaml']\n"
        "from align.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules))\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False False\n"), done.stderr
    assert "needs comparisons" in done.stderr
    assert not (folder / "runs").exists()
