"""The key reference and the JSON Schema: complete, and the same as in the guide."""

import json

import jsonschema
import pytest
from omegaconf import OmegaConf
from pages import ROOT

from align.workflow.reference import SECTIONS, keys, schema_text, with_reference

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_text()))


def plain(path):
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_type_and_a_meaning(section):
    assert [key.key for key in keys(section) if not (key.type and key.meaning)] == []


def test_the_guide_and_the_schema_are_current():
    """Otherwise run `python -m align.workflow.reference recipes`."""
    guide = (ROOT / "recipes/README.md").read_text("utf-8")
    assert guide == with_reference(guide)
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
