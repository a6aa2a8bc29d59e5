"""The key reference and the JSON Schema: complete, and the same as in the documentation."""

import json
from typing import Literal, get_args, get_origin

import jsonschema
import pytest
from omegaconf import OmegaConf
from pages import ROOT
from pydantic import RootModel

from align.commands.keys import show_keys
from align.config import Settings, build
from align.errors import InputError
from align.models.settings import PolicySettings
from align.rewards.builtin_judges import JudgeSpec
from align.stages.base import Stage
from align.stages.inputs.sources import SourceSettings
from align.stages.table import STAGES
from align.train.settings import TrainSettings
from align.workflow.recipe.schema import WrittenRecipe
from align.workflow.reference import SECTIONS, keys, page, schema_text

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_text()))


def plain(path):
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_type_and_a_meaning(section):
    assert [key.key for key in keys(section) if not (key.type and key.meaning)] == []


def test_a_part_of_a_name_finds_its_keys_in_all_sections(capsys):
    show_keys("learning_rate")
    shown = capsys.readouterr().out
    assert "Stage embedder" in shown and "train: settings" in shown
    assert [line.split()[0] for line in shown.splitlines() if "learning" in line] == [
        "train.learning_rate",
        "learning_rate",
    ]
    with pytest.raises(InputError, match="no section and no key is called 'polcy'; did you mean 'policy'?"):
        show_keys("polcy")


LAUNCHED = {"sft", "reward_model", "generate", "score", "preference", "evaluate", "synthesize", "distill"}
REFUSED = {
    **{name: ("launch", "slurm") for name in set(STAGES) - LAUNCHED},
    "distill": ("selection",),
    "average_reward_models": ("launch", "slurm", "task", "metric"),
    "average": ("launch", "slurm", "task.encoder.model"),
    "evaluate": ("tasks.NAME.encoder.model",),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_key_that_a_stage_always_refuses_is_not_listed(stage):
    refused = set(REFUSED.get(stage, ()))
    listed = {key.key for key in keys(stage)}
    assert [key for key in listed for name in refused if f"{key}.".startswith(f"{name}.")] == []
    assert (stage in LAUNCHED) == ("launch" in listed)
    offered = json.loads(schema_text())["$defs"][STAGES[stage].__name__]["properties"]
    assert not refused & set(offered)
    # Whatever else the classes have is listed
    assert set(STAGES[stage].model_fields) - refused == {key for key in listed if "." not in key} | {"stage"}


@pytest.mark.parametrize(
    ("stage", "values", "loc"),
    [
        ("distill", {"selection": {"score": "hard"}}, ("selection",)),
        ("quantize", {"launch": "launch/cpu-1.yaml"}, ("launch",)),
        ("average_reward_models", {"task": {"task": "nll"}}, ("task",)),
        ("average_reward_models", {"metric": "nll"}, ("metric",)),
        ("evaluate", {"tasks": {"sts": {"encoder": {"model": "other"}}}}, ("tasks", "sts", "encoder", "model")),
    ],
)
def test_a_key_that_is_not_listed_is_refused_with_its_reason(stage, values, loc):
    needed = {"teacher": "base", "data": "rows", "train": {"learning_rate": 1.0}, "of": ["a", "b"], "policies": "all"}
    own = {name: value for name, value in needed.items() if name in STAGES[stage].model_fields}
    with pytest.raises(InputError) as error:
        build(STAGES[stage], {"stage": stage, **own, **values})
    assert error.value.loc == loc and "unknown" not in str(error.value)


def all_settings(base=Settings):
    for settings in base.__subclasses__():
        yield from [settings] * settings.__module__.startswith("align.")
        yield from all_settings(settings)


def test_every_field_of_every_settings_class_has_a_description():
    """Also of those that the reference leaves out, such as the kind of a step; the recipe module imports all."""
    classes = set(all_settings())
    undescribed = [
        f"{settings.__name__}.{name}"
        for settings in classes
        for name, field in settings.model_fields.items()
        if not issubclass(settings, RootModel)
        and settings.__name__.isidentifier()  # not those made of a verifier's parameters
        and not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1)  # the kind's name
        and not (field.description or "").strip()
    ]
    assert undescribed == []
    assert {Stage, TrainSettings, PolicySettings, SourceSettings, JudgeSpec, WrittenRecipe} <= classes
    print(f"checked {sum(len(settings.model_fields) for settings in classes)} fields of {len(classes)} classes")


def test_the_page_and_the_schema_are_current():
    """Otherwise run `python -m align.workflow.reference`."""
    assert (ROOT / "docs/keys.md").read_text("utf-8") == page()
    assert (ROOT / "recipes/schema.json").read_text("utf-8") == schema_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_by_the_schema_and_names_it_in_its_first_line(path):
    VALIDATOR.validate(plain(path))
    mark, _, schema = path.read_text("utf-8").splitlines()[0].rpartition("=")
    assert mark == "# yaml-language-server: $schema"
    assert (path.parent / schema).resolve() == ROOT / "recipes/schema.json"


WRONG = {
    "an unknown stage": {"stage": "sftt", "data": "programs", "train": {"learning_rate": 1.0}},
    "an unknown key": {"stage": "sft", "data": "programs", "train": {"learning_rate": 1.0}, "polcy": "base"},
    "a value of another type": {"stage": "sft", "data": "programs", "train": {"learning_rate": "high"}},
    "a missing key": {"stage": "sft", "train": {"learning_rate": 1.0}},
    "no stage": {"data": "programs", "train": {"learning_rate": 1.0}},
}


@pytest.mark.parametrize("step", WRONG.values(), ids=WRONG)
def test_the_schema_rejects(step):
    recipe = {**plain(ROOT / "recipes/quickstart.yaml"), "steps": {"code": step}}
    assert not VALIDATOR.is_valid(recipe)


def test_the_schema_accepts_a_stage_of_a_users_own():
    recipe = plain(ROOT / "recipes/quickstart.yaml")
    assert VALIDATOR.is_valid({**recipe, "steps": {"code": {"stage": "mine:Stage", "anything": 1}}})
