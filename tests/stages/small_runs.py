"""A recipe that is run in a few seconds, and who is told of it."""

import json
from pathlib import Path

import pytest

from align import report
from align.report.page import render_markdown
from align.report.run_folder import read_run
from align.rewards.verdicts import Verdict
from align.stages.costs import meter
from align.workflow import runner
from align.workflow.launcher import Command
from align.workflow.runner import run_recipe

ROOT = Path(__file__).parents[2]
RATE = 1e9  # FLOP/s

SMALL_POLICY = """
run: small
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 256, initializer_range: 0.05}}
  chat_template: chatml
"""
TIED_POLICY = SMALL_POLICY.replace(
    "hidden_size: 16, intermediate_size: 32", "hidden_size: 64, intermediate_size: 96"
).replace("initializer_range: 0.05", "initializer_range: 0.2, tie_word_embeddings: true")
# An evaluation of a copy `small` of the policy `base` on the source `asked`
OF_COPY = """\
  evaluate:
    stage: evaluate
    policies: [base, small]
    tasks:
      general: {{data: asked, max_new_tokens: 4}}
      fidelity: {{task: fidelity, data: asked, reference: "step:base", max_new_tokens: 4}}
"""
RECIPE = (
    SMALL_POLICY
    + """\
data:
  shown: {{path: "tasks:general", limit: 24}}
  pairs: {{path: "tasks:general", limit: 12, responses: 2}}
steps:
  base: {{stage: import, vocab_size: 300}}
  sft: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
  dpo: {{stage: preference, data: pairs, loss: {{name: dpo}}, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
"""
)


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.notes, self.steps, self.states = [], [], []

    def note(self, text):
        self.notes.append(text)

    def phase(self, name, total, done=0):
        pass

    def advance(self, units, metrics=None):
        self.steps += [metrics] if metrics else []

    def watch(self, step, state):
        self.states.append((step, state))


class EndsInDpo(Told):
    """A reporter that ends the run in the second optimizer step against references, as an interrupt does."""

    def advance(self, units, metrics=None):
        super().advance(units, metrics)
        if metrics and "loss/preference" in metrics and metrics["step"] == 2:
            raise KeyboardInterrupt


def written(folder, text=RECIPE):
    """The file of the recipe, whose runs go to a folder beside it."""
    folder.mkdir(exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(text.format(runs=folder / "runs"))
    return path


def run(folder, *overrides, text=RECIPE, until=None, told=None):
    """A run of the recipe in this process without a page, from the root of the repository, where launch files are."""
    path, told = written(folder, text), told or Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        skip_page(patch)
        made = run_recipe(Command(path, overrides), told, disk=(0, 0), until=until)
    return made, told


def skip_rate(patch):
    """Replace the measurement of this machine's rate, which takes seconds of each process, by a number."""
    for module in (meter, runner):
        patch.setattr(module, "matrix_rate", lambda device, precision: RATE)


def skip_page(patch):
    """Render the tables of a run in place of its page, whose charts take most of the time of a small run."""
    patch.setattr(report, "write_report", lambda root: render_markdown([read_run(root)]))


def metrics(folder, step):
    lines = (folder / "runs/small" / step / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def longer():
    """A judge to whom the longer response is the better one."""
    return lambda groups: [tuple(Verdict(float(len(text))) for text in responses) for _, responses in groups]
