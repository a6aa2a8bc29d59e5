"""The README: its commands name what is there, and its programs run."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from align.cli import app
from align.commands.evaluate import EvaluateSettings
from align.commands.generate import GenerateSettings
from align.commands.one_step import settings_of
from align.data.writing import write
from align.losses.table import preference_loss
from align.records import Comparison
from align.stages.inputs.sources import SourceSettings, streamed
from align.workflow.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parent / "stages"))
from small_runs import RECIPE, run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands():
    """Every call of `align` in the blocks, as words; of a launch what it launches."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(each, comments=True) for line in lines for each in line.split("&&")]
    return [each[each.index("align") + 1 :] for each in words if "align" in each]


RECIPES = [load_recipe(path) for path in sorted((ROOT / "recipes").rglob("*.yaml"))]
MADE = {f"runs/{recipe.run}/{name}" for recipe in RECIPES for name in recipe.steps}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_names_options_recipes_steps_settings_and_folders_that_are_there(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *arguments = words
    command = typer.main.get_command(app).commands[name]
    given = command.make_context(name, list(arguments)).params  # raises for an unknown option
    settings = given.get("overrides") or ()
    if "recipe" in given:
        recipe = load_recipe(given["recipe"], settings)
        for option in ("step", "until", "again"):
            assert given.get(option) is None or recipe.expanded(given[option])
    else:
        kinds = {"generate": GenerateSettings, "evaluate": EvaluateSettings}
        settings_of(kinds[name], given["judge"] or (), settings)
    assert set(re.findall(r"runs/[\w.-]+/[\w.-]+", " ".join(words))) <= MADE


def test_there_are_commands_of_every_kind():
    assert {words[0] for words in commands()} == {"run", "check", "preview", "train", "generate", "evaluate"}
    assert any(words[0] == "generate" and "runs/quickstart/general" in words for words in commands())


def program(mark):
    (found,) = [block for block in blocks("python") if mark in block]
    return found


def test_the_loss_of_ones_own_is_found_and_computes_what_it_says(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(program("# mine.py"))
    monkeypatch.syspath_prepend(tmp_path)
    policy_BK, reference_BK, rewards_BK = torch.tensor([[[-3.0, -5.0]], [[-4.0, -4.0]], [[1.0, -0.5]]]).double()
    found_B = preference_loss("mine:make", beta=0.5)(policy_BK, reference_BK, rewards_BK, torch.ones(1, 2).double())
    assert found_B.tolist() == pytest.approx([((0.5 - 1.0) ** 2 + (-0.5 + 0.5) ** 2) / 2])


def test_the_program_of_ones_own_trains_and_saves_a_policy(tmp_path, monkeypatch, capsys):
    steps = RECIPE.index("  sft:")
    run(tmp_path, text=RECIPE[:steps])
    (tmp_path / "runs/quickstart").mkdir()
    (tmp_path / "runs/small/base").rename(tmp_path / "runs/quickstart/general")
    source = SourceSettings(path="tasks:general", limit=6, responses=4)
    write(tmp_path / "groups.jsonl", streamed(source, kind=Comparison, seed=0).read().records)
    monkeypatch.chdir(tmp_path)
    exec(program("save_policy("), {})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)
    AutoModelForCausalLM.from_pretrained("mine")
