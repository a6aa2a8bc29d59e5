"""Settings of judges: the JSON schema lists each judge's own, and each row of JUDGES says what its judge needs."""

import importlib
import subprocess
import sys
from typing import get_args

import pytest

from align.config import Settings, build
from align.rewards.builtin_judges import JUDGES
from align.rewards.settings import AnySpec, CustomSpec, JudgeSettings


class Step(Settings):
    """A part of a recipe with judges."""

    judges: list[JudgeSettings]


def own_judge(scale: float = 1.0, *, names: list[str] = []):  # noqa: B006 - never changed
    return lambda groups: []


def test_the_schema_of_a_recipe_lists_every_setting_of_every_judge():
    schema = Step.model_json_schema()
    definitions = schema["$defs"]
    members = [definitions[member["$ref"].rpartition("/")[2]] for member in definitions["JudgeSettings"]["oneOf"]]
    by_name = {member["properties"]["name"].get("const"): member for member in members}
    assert by_name.keys() == {*JUDGES, None}  # None: a user's own judge
    for name, spec in JUDGES.items():
        settings = by_name[name]["properties"]["settings"]["$ref"].rpartition("/")[2]
        described = definitions[settings]["properties"]
        assert described.keys() == spec.model_fields["settings"].annotation.model_fields.keys()
        assert all(each["description"].endswith(".") for each in described.values())


def test_the_union_holds_every_judge_of_the_table():
    union, _ = get_args(AnySpec)
    tagged = {get_args(member)[0]: get_args(member)[1].tag for member in get_args(union)}
    assert tagged == {spec: spec.__name__ for spec in (*JUDGES.values(), CustomSpec)}


@pytest.mark.parametrize("name", JUDGES)
def test_each_judge_of_the_table_has_a_maker(name):
    spec = JUDGES[name]
    assert get_args(spec.model_fields["name"].annotation) == (name,)
    module, _, attribute = spec.maker.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    assert spec.loads_model is (name in ("reward_model", "llm"))
    assert bool(spec.metadata_keys) is not spec.loads_model


def test_settings_become_the_named_judges_own():
    step = build(Step, {"judges": [{"name": "verifier", "settings": {"min_words": 3}}, {"name": "ground_truth"}]})
    assert [type(judge.root) for judge in step.judges] == [JUDGES["verifier"], JUDGES["ground_truth"]]
    assert step.judges[0].values == {"reward": "share", "loose": False, "min_words": 3, "verifiers": {}}
    assert build(Step, step.model_dump()) == step


def test_a_users_own_judge_keeps_its_settings():
    settings = {"scale": 2.0, "names": ["a"]}
    judge = JudgeSettings(name=f"{__name__}:own_judge", settings=settings, weight=0.5)
    assert judge.values == settings
    assert judge.cache_key() == {"name": judge.name, "weight": 0.5, "settings": settings}
    assert judge.with_values({"scale": 3}).values == {"scale": 3}


def test_the_cache_key_leaves_out_what_changes_no_verdict():
    few, many, strict = (
        JudgeSettings(name="executed_tests", settings=settings)
        for settings in ({"num_workers": 1}, {"num_workers": 9}, {"num_workers": 9, "reward": "all"})
    )
    assert few.cache_key() == many.cache_key() != strict.cache_key()


@pytest.mark.parametrize(
    "module",
    ["align.rewards.settings", "align.rewards.builtin_judges", "align.rewards.judges", "align.rewards.unit_tests"],
)
def test_settings_and_rule_judges_import_without_torch(module):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "align" in loaded
    assert not {"torch", "transformers", "datasets", "numpy", "pyarrow"} & set(loaded)
