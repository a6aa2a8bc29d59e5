"""The Markdown pages: their commands, recipes, programs, links and names are those of the project."""

import importlib.util
import re
import tomllib
from fnmatch import fnmatch

import pytest
import typer
import yaml
from pages import (
    DOCS,
    OWN_RECIPE,
    PAGES,
    ROOT,
    align_commands,
    anchors,
    blocks,
    inline_code,
    links,
    shell_commands,
    text,
)
from transformers import AutoModelForCausalLM

import align
from align.cli import app
from align.commands.evaluate import EvaluateSettings
from align.commands.generate import GenerateSettings
from align.commands.one_step import settings_of
from align.data.writing import write
from align.losses.table import LOSSES
from align.models.policy import save_policy
from align.records import Demonstration, Message
from align.testing import tiny_policy, tiny_preferences
from align.workflow.recipe.load import load_recipe, validated_recipe
from align.workflow.recipe.schema import WrittenRecipe
from align.workflow.reference import SECTIONS, keys

COMMANDS = typer.main.get_command(app).commands
RECIPES = [load_recipe(path) for path in sorted((ROOT / "recipes").rglob("*.yaml"))]
MADE = {f"runs/{recipe.run}/{name}" for recipe in RECIPES for name in recipe.steps}
PARTS = "policy|train|accounting|head|lora|loss|engine|constraints"
KEYS = {part for section in SECTIONS for key in keys(section) for part in re.split(r"\W+", key.key)}


def own_recipe(page):
    """The complete recipe that the page shows first; `my-recipe.yaml` in its commands."""
    return next((block for block in blocks(page, "yaml") if re.search(r"^run:", block, re.MULTILINE)), None)


@pytest.mark.parametrize(("page", "words"), align_commands(), ids=str)
def test_a_command_names_options_recipes_steps_settings_and_folders_that_exist(page, words, tmp_path, monkeypatch):
    for name in ("recipes", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    if own := own_recipe(page):
        (tmp_path / OWN_RECIPE).write_text(own)
    monkeypatch.chdir(tmp_path)
    name, *arguments = words
    given = COMMANDS[name].make_context(name, list(arguments)).params  # raises for an unknown option
    settings = given.get("overrides") or ()
    if "recipe" in given:
        recipe = load_recipe(given["recipe"], settings)
        for option in ("step", "until", "rerun_from"):
            assert given.get(option) is None or recipe.expanded(given[option])
    elif name in ("generate", "evaluate"):
        kinds = {"generate": GenerateSettings, "evaluate": EvaluateSettings}
        settings_of(kinds[name], given["judge"] or (), settings)
    assert set(re.findall(r"runs/[\w.-]+/[\w.-]+", " ".join(words))) <= MADE


def test_every_command_is_on_the_page_of_commands():
    shown = {name for code in inline_code("docs/commands.md") for name in re.findall(r"^align ([a-z-]+)", code)}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_inline_commands_name_commands_and_options_that_exist(page):
    if page == "CHANGELOG.md":
        pytest.skip("names old options")
    for code in inline_code(page):
        if found := re.match(r"(?:align|… -m align) ([a-z][\w-]*)", code):
            for name in found[1].split("|"):
                options = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
                assert set(re.findall(r"--[a-z-]+", code)) <= options, code


@pytest.mark.parametrize("page", PAGES)
def test_other_shell_commands_name_modules_extras_and_files_that_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for code in [" ".join(words) for words in shell_commands(page)] + inline_code(page):
        for module in re.findall(r"python -m ([\w.]+)", code):
            assert importlib.util.find_spec(module), code
        for names in re.findall(r"pip install -e \W*\.\[([\w,]+)\]", code):
            assert set(names.split(",")) <= set(extras), code


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_to_files_and_headings_that_exist(page):
    for target, anchor in links(page):
        path = ((ROOT / page).parent / target if target else ROOT / page).resolve()
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.relative_to(ROOT)), f"{target}#{anchor}"
    for code in inline_code(page):
        if re.fullmatch(r"(align|docs|tests|recipes|launch)/[\w./-]+", code) and page != "CHANGELOG.md":
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize(
    "page", ["README.md", "recipes/README.md", "align/README.md", "launch/README.md", "CONTRIBUTING.md", *DOCS]
)
def test_keys_in_the_text_are_keys_of_a_recipe(page):
    for code in inline_code(page):
        if re.fullmatch(rf"({PARTS})(\.[a-z_]+)+(: [\w.-]+|=\S+)?", code):
            assert set(re.split(r"[:=]", code)[0].split(".")) <= KEYS, code


# Pages whose steps other pages refer to
BEGINNINGS = (
    "docs/models.md",
    "docs/sft.md",
    "docs/reward-models.md",
    "docs/preference.md",
    "docs/on-policy-rounds.md",
)
SOURCES = ("programs", "self_instruct", "gsm8k", "pairs", "ratings", "ifeval", "texts", "stsb", "held_out", "chats")
PROMPTS = ("prompts", "questions")


def merged(old, new):
    """`old` with the keys of `new`, also below keys that both have."""
    nested = {key: merged(old[key], value) for key, value in new.items() if isinstance(old.get(key), dict) and value}
    return {**old, **new, **nested}


def parts(page):
    """The parts of a recipe that a page shows."""
    recipes = [yaml.safe_load(block) for block in blocks(page, "yaml")]
    return [recipe for recipe in recipes if "run" not in recipe]


def test_complete_recipes_of_the_pages_are_valid(tmp_path):
    complete = [(page, block) for page in PAGES for block in blocks(page, "yaml") if "\nrun:" in f"\n{block}"]
    assert {page for page, _ in complete} == {"README.md", "docs/first-recipe.md", "docs/tools.md"}
    for page, block in complete:
        (tmp_path / OWN_RECIPE).write_text(block)
        assert load_recipe(tmp_path / OWN_RECIPE).steps, page


@pytest.mark.parametrize("page", [page for page in DOCS if parts(page)])
def test_parts_of_recipes_on_a_page_are_valid_together(page, tmp_path, monkeypatch):
    """After the page's complete recipe or the pages whose steps others refer to; other sources are files of rows."""
    (tmp_path / "my_module.py").write_text("def after_step(event): ...")
    monkeypatch.syspath_prepend(tmp_path)
    own = own_recipe(page)
    whole = yaml.safe_load(own) if own else {"run": "guide", "data": {}, "steps": {}}
    pages = [page] if own else dict.fromkeys((*BEGINNINGS, page))
    for part in [part for each in pages for part in parts(each)]:
        assert part.keys() <= WrittenRecipe.model_fields.keys()
        whole = merged(whole, part)
    sources = dict.fromkeys(SOURCES, {"path": "rows.jsonl"}) | dict.fromkeys(
        PROMPTS, {"path": "tasks:general", "limit": 2000}
    )
    given = {name: source for name, source in sources.items() if name not in whole["steps"]}
    assert validated_recipe({**whole, "data": given | whole["data"]}).steps


def test_every_page_is_in_the_index():
    listed = {target for target, _ in links("docs/README.md")}
    assert {page.removeprefix("docs/") for page in DOCS} - {"README.md"} <= listed


def test_the_table_of_loss_settings_has_the_defaults_of_every_loss():
    table = text("docs/preference.md").partition("| setting | meaning | default |")[2].partition("\n\n")[0]
    rows = {row[0].strip(" `"): row[2] for row in (line.strip("|").split("|") for line in table.splitlines()[2:])}
    assert rows.keys() == {setting for loss in LOSSES.values() for setting in loss.settings}
    for name, loss in LOSSES.items():
        for setting in loss.settings:
            default, _, others = rows[setting].partition(";")
            for pattern, other in re.findall(r"`([\w*]+)` (\S+?)(?:,|$)", others.strip()):
                default = other if fnmatch(name, pattern) else default
            assert str(getattr(loss, setting)).lower() == default.strip(), (name, setting)


def test_the_losses_of_the_readme_are_all_losses():
    table = text("README.md").partition("| name | loss of a group of K responses | source |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert re.findall(r"`(\w+)`", " ".join(cells)) == list(LOSSES)


def test_the_program_of_the_readme_trains_and_saves_a_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/quickstart"
    save_policy(*tiny_policy(), run / "general")
    (run / "rpo-1-samples").mkdir()
    write(run / "rpo-1-samples/groups.jsonl", tiny_preferences(6, num_responses=4))
    for program in blocks("README.md", "python"):
        exec(program, {})
    AutoModelForCausalLM.from_pretrained("mine")


def test_the_program_on_synthetic_data_measures_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "demonstrations.jsonl",
        [Demonstration((Message("user", f"Say {at}."), Message("assistant", "Yes."))) for at in range(3)],
    )
    (program,) = blocks("docs/synthetic-data.md", "python")
    exec(program, {})
    assert "seeds" in (tmp_path / "measures.json").read_text()


def test_the_programs_of_the_library_page_train_sample_and_judge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for program in blocks("docs/library.md", "python"):
        exec(program, names)
    AutoModelForCausalLM.from_pretrained("trained")
    assert names["result"].last_metrics["loss"] < 1  # that of equal margins
    assert len(names["texts"]) == 4
    assert "[0.0, 0.0, 0.0, 0.0]" in capsys.readouterr().out


def test_the_readme_has_one_test_command():
    """`.ci/run` reads it."""
    first_lines = [block.splitlines()[0] for block in blocks("README.md", "bash")]
    assert [line for line in first_lines if line.startswith("pytest")] == ["pytest -n 2"]


def test_the_api_page_lists_every_public_name():
    table = text("align/README.md").partition("| for | names |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(align.__all__)
