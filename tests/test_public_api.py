"""The public names of `align`: imported on first use, typed, and without torch until one of them needs it."""

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import RECIPE

import align
from align.errors import InputError
from align.testing import tiny_policy

HEAVY = {"torch", "transformers", "numpy", "pydantic", "datasets", "accelerate", "peft", "trl", "pyarrow", "omegaconf"}


def test_importing_align_imports_nothing_heavy_and_is_fast():
    code = (
        "import sys, time; start = time.process_time(); import align; seconds = time.process_time() - start; "
        "print(seconds, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    best = 1.0
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        best = min(best, float(found[0]))
        assert "align" in found[1:]
        assert not HEAVY & set(found[1:])
    assert best < 0.1


@pytest.mark.parametrize("name", align.__all__)
def test_every_public_name_resolves_to_the_object_of_its_module(name):
    value = getattr(align, name)
    assert value is getattr(importlib.import_module(align._MODULE_OF[name]), name)
    assert name in dir(align)


def test_type_checkers_and_users_see_the_same_names():
    tree = ast.parse(Path(align.__file__).read_text())
    imports = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in imports.body for alias in node.names}
    assert typed == align._MODULE_OF
    assert set(typed) == set(align.__all__)
    assert len(align.__all__) == len(set(align.__all__))


@pytest.mark.parametrize("kind", [str, Path])
def test_what_takes_a_path_takes_it_as_text_too(kind, tmp_path):
    align.save_policy(*tiny_policy(), kind(tmp_path / "saved"))
    assert align.load_policy(kind(tmp_path / "saved"))[1].chat_template
    assert align.load_engine(kind(tmp_path / "saved")).name == str(tmp_path / "saved")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}')
    assert align.read(kind(rows)).num_rows == 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(runs=tmp_path / "runs"))
    assert list(align.load_recipe(kind(recipe)).steps) == ["base", "sft", "dpo"]


def test_the_version_is_that_of_the_installed_package():
    assert align.__version__ == importlib.metadata.version("align")
    assert "__version__" in dir(align)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'align' has no attribute 'teleport'"):
        _ = align.teleport


def test_a_recipe_is_run_from_python_and_a_second_run_does_nothing(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(runs=tmp_path / "runs"))
    manifests = align.run(recipe, ["run=other"])
    assert list(manifests) == ["base", "sft", "dpo"]
    assert (tmp_path / "runs" / "other" / "dpo" / "config.json").is_file()
    assert align.run(str(recipe), ["run=other"]) == manifests
    assert list(align.run(recipe, until="base")) == ["base"]


def test_a_wrong_recipe_is_an_input_error_with_its_location(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(runs=tmp_path / "runs"))
    with pytest.raises(InputError, match=r"override 'steps\.sft\.trian=1': steps\.sft.*trian: unknown key"):
        align.run(recipe, ["steps.sft.trian=1"])
