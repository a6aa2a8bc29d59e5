"""A recipe whose pipeline is killed at moments of chance: python killed_pipeline.py FOLDER SEED NUMBER RECIPE.

FOLDER/whole holds an undisturbed run, FOLDER/killed-1 and so on those that were killed, NUMBER times in all, and then
resumed to their end. Prints a JSON object of the kills, and of every finished step that a later life began again.

The parent imports everything once and forks a child for each life. It computes nothing itself, so that no thread of
torch is there to be lost in a fork.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401 - with the next, what each life would import anew
from small_runs import skip_page, skip_rate

import align.report.page  # noqa: F401
from align.accounting import energy
from align.accounting.counters import NoCounter
from align.workflow.launcher import Command
from align.workflow.runner import run_recipe
from align.workflow.search.calls import calls

RECIPE = """
run: small
policy:
  from_config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
          max_position_embeddings: 256, initializer_range: 0.05}
  chat_template: chatml
data:
  programs: {path: "tasks:code", limit: 12}
  shown: {path: "tasks:general", limit: 24}
  ratings: {path: "tasks:general", limit: 16, responses: 3, held_out: 0.2}
  prompts: {path: "tasks:general", split: train}
  test: {path: "tasks:general", split: test, limit: 4}
steps:
  base: {stage: import, vocab_size: 300}
  code: {stage: sft, data: programs, train: &train {learning_rate: 1.0e-3, prompts_per_step: 4, checkpoint_steps: 1}}
  general: {stage: sft, data: shown, replay: {share: 0.2}, train: *train}
  rate: {stage: reward_model, loss: bt, data: ratings, train: *train}
  samples:
    stage: generate
    data: prompts
    prompts: {prompts: 8}
    sampling: &sampling {num_responses: 3, max_new_tokens: 6}
    engine: &engine {local: {precision: fp32, batch_size: 4}}
    judges: &judges [{name: reward_model, settings: {path: "step:rate"}}]
  dpo: {stage: preference, data: samples, loss: {name: dpo}, train: *train}
  rpo:
    stage: preference
    rounds: 2
    on_policy: true
    data: prompts
    generate: {prompts: {prompts: 8}, sampling: *sampling, engine: *engine, judges: *judges}
    train: *train
  evaluate: {stage: evaluate, policies: [dpo, rpo], tasks: {general: {data: test, max_new_tokens: 6}}}
"""
MORE_DATA = """
  pairs: {path: "tasks:general", limit: 12, responses: 2}
  val: {path: "tasks:general", split: validation, limit: 4}
steps:"""
SEARCHED = """
  dpo: {stage: preference, data: pairs, loss: {name: dpo}, train: {<<: *train, epochs: 2, schedule: cosine}}
  validation: {stage: evaluate, policies: [general], tasks: {chat: {task: nll, data: val}}}
  evaluate: {stage: evaluate, policies: [dpo], tasks: {general: {data: test, max_new_tokens: 6}}}
search:
  dpo:
    space: {steps.general.train.learning_rate: {choices: [1.0e-3, 3.0e-3]}, train.learning_rate: {log: [1.0e-4, 0.01]}}
    evaluation: validation
    metric: chat.nll
    budget: {trials: 4}
    rungs: [2, 4]
    halving: 2
"""
# With a search in place of the later stages
SEARCH = RECIPE[: RECIPE.index("  rate:")].replace("\nsteps:", MORE_DATA) + SEARCHED
RECIPES = {"pipeline": RECIPE, "search": SEARCH}

MOST_STEPS = 3  # that a life may begin before it is killed in the last of them
LONGEST = 1.5  # times the undisturbed run's mean seconds of a step: from the beginning of that step to the kill
EARLY = 10  # one kill in so many comes before the first step


class Log:
    """A reporter that writes down what a life begins and finishes."""

    def __init__(self, path):
        self.path = path

    def note(self, text):
        pass

    def phase(self, name, total, done=0):
        pass

    def advance(self, units, metrics=None):
        pass

    def watch(self, step, state):
        with self.path.open("a") as lines:
            lines.write(f"{step} {state}\n")


def live(folder, log):
    """One life of the pipeline in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    # Measurements of the machine and charts, which take seconds of each life and are no content of a step
    patch = pytest.MonkeyPatch()
    skip_rate(patch)
    skip_page(patch)
    energy.machine_counter = lambda: NoCounter("not measured in this test")
    try:
        for call in calls(Command(Path("small.yaml"), ())):
            run_recipe(call.command, Log(log), disk=(0, 0), until=call.until)
    except BaseException as error:
        print(f"{folder}: {error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def has_ended(child):
    """Whether the life came to its own end, which must be a good one."""
    found, status = os.waitpid(child, os.WNOHANG)
    if found and status:
        sys.exit(f"a life ended with status {status}")
    return bool(found)


def kill(child, num_steps, delay_s, log):
    """Whether the child was killed, `delay_s` after it began so many steps."""
    while len(begun(log)) < num_steps:
        if has_ended(child):
            return False
        time.sleep(0.001)
    time.sleep(delay_s)
    if has_ended(child):
        return False
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def begin(folder, name="pipeline"):
    """The folder of a run with its recipe."""
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text(RECIPES[name])
    return folder


def finished(run):
    """Return a digest of each finished step's files.

    Model cards are left out, which are written at the end of the run, and checkpoints that a search removes.
    """
    steps = [path.parent for path in run.glob("runs/small/*/manifest.json")]
    return {step.name: _digest(step) for step in steps if step.suffix != ".partial"}


def _digest(folder):
    left_out = ("README.md", "manifest.json")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in left_out]
    files = [path for path in files if ".partial-" not in path.name]  # of one of the two that a kill left half written
    kept = [path for path in files if "resume" not in path.relative_to(folder).parts]
    lines = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in kept]
    manifest = json.loads((folder / "manifest.json").read_text())
    lines.append(json.dumps({name: value for name, value in manifest.items() if name != "removed"}, sort_keys=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def begun(log):
    """The steps that a life began, the latest last."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split()[0] for line in lines if line.endswith(" running")]


def lives(run, draw, number, steps_s):
    """Kill the run so often, or until its steps are finished; then let it be. The kills, and what was run twice."""
    kills, twice, whole, num_steps = [], [], {}, len(finished(run.parent / "whole"))
    while True:
        log = run / f"life-{len(kills) + 1}.log"
        child = live(run, log)
        if len(kills) < number and len(whole) < num_steps:
            many = draw.randint(1, MOST_STEPS) if draw.random() > 1 / EARLY else 0
            delay_s = draw.uniform(0, LONGEST * steps_s / num_steps) if many else 0.0
            was_killed = kill(child, many, delay_s, log)
        else:
            was_killed = os.waitpid(child, 0)[1] != 0
            if was_killed:
                sys.exit("the last life failed")
        now = finished(run)
        twice += [f"{step} in {log.name}" for step in begun(log) if step in whole]
        twice += [f"{step} changed in {log.name}" for step in whole if now.get(step) != whole[step]]
        whole = now
        if not was_killed:
            return kills, twice
        there = [path.name for path in (run / "runs/small").rglob("*") if path.is_dir() and ".partial" in path.name]
        kills.append({"run": run.name, "delay_s": delay_s, "in": begun(log)[-1:], "half_written": sorted(there)})


if __name__ == "__main__":
    root, seed, number, recipe = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if os.waitpid(live(begin(root / "whole", recipe), root / "whole" / "life.log"), 0)[1]:
        sys.exit("the undisturbed run failed")
    ledgers = json.loads((root / "whole/runs/small/ledger.json").read_text())
    steps_s = ledgers["total"]["seconds"]
    draw, kills, twice = random.Random(seed), [], []
    while len(kills) < number:
        run = begin(root / f"killed-{len(list(root.glob('killed-*'))) + 1}", recipe)
        more, again = lives(run, draw, number - len(kills), steps_s)
        kills, twice = kills + more, twice + again
    print(json.dumps({"steps_s": steps_s, "kills": kills, "twice": twice}))
