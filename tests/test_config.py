import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from align.accounting.settings import AccountingSettings
from align.config import Settings, build, located, read_recipe, stable_hash
from align.errors import InputError, one_line
from align.registry import import_dotted, pick, suggest


class Schedule(Settings):
    kind: Literal["cosine", "constant"] = "cosine"
    warm_up: float = Field(0.1, ge=0, lt=1)


class Training(Settings):
    lr: float
    num_steps: int = 1
    bf16: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def beta_two_is_the_slower(self):
        if self.betas[0] > self.betas[1]:
            raise ValueError("the second beta is at least the first")
        return self


class Recipe(Settings):
    folder: Path = Path("runs")
    training: Training
    rounds: tuple[Training, ...] = ()
    by_name: dict[str, Training] = {}
    last: list[Schedule] | None = None


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


OVERRIDES = [
    ("training.lr=1e-5", {"training": {"lr": 0.00001, "num_steps": 7}, "rounds": [{"lr": 1}, {"lr": 2}]}),
    ("training={num_steps: 8}", {"training": {"lr": 0.5, "num_steps": 8}, "rounds": [{"lr": 1}, {"lr": 2}]}),
    ("rounds.1.lr=3", {"training": {"lr": 0.5, "num_steps": 7}, "rounds": [{"lr": 1}, {"lr": 3}]}),
    ("rounds=[]", {"training": {"lr": 0.5, "num_steps": 7}, "rounds": []}),
    ("training=off", {"training": False, "rounds": [{"lr": 1}, {"lr": 2}]}),
    ("a.b=x=y", {"training": {"lr": 0.5, "num_steps": 7}, "rounds": [{"lr": 1}, {"lr": 2}], "a": {"b": "x=y"}}),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDES)
def test_an_override_changes_only_its_key(recipe, override, expected):
    path = recipe("training: {lr: 0.5, num_steps: 7}\nrounds: [{lr: 1}, {lr: 2}]")
    assert read_recipe(path, [override]) == expected


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.0e-5", ".00001", "0.00001", "+1e-05"])
def test_scientific_notation_is_a_number_in_file_and_override(recipe, number):
    from_file = read_recipe(recipe(f"lr: {number}"))
    from_override = read_recipe(recipe("lr: 1"), [f"lr={number}"])
    assert from_file == from_override == {"lr": 10**-5}
    assert type(from_file["lr"]) is float


def test_interpolations_see_overrides(recipe):
    path = recipe("lr: 1\nsft: {lr: '${lr}', folder: 'runs/${name}'}\nname: a")
    assert read_recipe(path, ["lr=2", "name=b"])["sft"] == {"lr": 2, "folder": "runs/b"}


@pytest.mark.parametrize("entry", ["data.a", "steps.dpo", "steps.evaluate.tasks.code"])
def test_an_override_with_null_removes_an_entry(tmp_path, entry):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {a: {path: x}, b: {path: y}}\n"
        "steps: {dpo: {stage: preference, slurm: {}}, evaluate: {tasks: {code: {}, chat: {}}}}\n"
    )
    whole = read_recipe(path)
    above, _, name = entry.rpartition(".")
    part = whole
    for key in above.split("."):
        part = part[key]
    del part[name]
    assert read_recipe(path, [f"{entry}=null"]) == whole != read_recipe(path)
    assert read_recipe(path, ["steps.dpo.slurm=null"])["steps"]["dpo"] == {"stage": "preference", "slurm": None}
    with pytest.raises(InputError, match=rf"override '{above}.typo=null': nothing to remove: there is no {above}.typo"):
        read_recipe(path, [f"{above}.typo=null"])


def test_a_tilde_at_the_beginning_of_a_path_is_the_home_folder(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    values = "policy: {path: 'gguf:~/m.gguf'}\ndata: {a: {path: ~/a.jsonl}}\nlist: [~/b, a~/c, '~', '~x/y']"
    assert read_recipe(recipe(values), ["runs=~/runs"]) == {
        "policy": {"path": "gguf:/home/ada/m.gguf"},
        "data": {"a": {"path": "/home/ada/a.jsonl"}},
        "list": ["/home/ada/b", "a~/c", "~", "~x/y"],
        "runs": "/home/ada/runs",
    }


def test_keys_are_strings_at_every_depth(recipe):
    assert read_recipe(recipe("1: {2: a, b: c}")) == {"1": {"2": "a", "b": "c"}}


WRONG_RECIPES = [
    ("- 1\n- 2", [], "mapping"),
    ("- 1\n- 2", ["a=1"], "mapping"),
    ("a: [1", [], "line 1"),
    ("a: 1\na: 2", [], "duplicate key a"),
    ("a: ${b}", [], "'b' not found"),
    ("a: ${a}", [], "Recursive"),
    ("a: ???", [], "mandatory"),
    ("a: [1]", ["a.3=1"], "override 'a.3=1': list index out of range"),
    ("a: [1]", ["a.b=1"], "override 'a.b=1'"),
    ("a: 1", ["b=[1,"], "override 'b=[1,'"),
    (
        "a: {b: [1, !!binary aGVsbG8=]}",
        [],
        "recipe.yaml:1: a.b.1: values must be strings, numbers",
    ),
    ("a: {!!binary aGVsbG8=: 1}", [], "not bytes: values must be strings, numbers"),
    ("a: 1", ["lr"], "'lr' is not of the form key.sub=value"),
    ("a: 1", ["=1"], "'=1' is not of the form"),
    ("a: 1", ["a.=1"], "'a.=1' is not of the form"),
    ("a: 1", ["a..b=1"], "'a..b=1' is not of the form"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), WRONG_RECIPES)
def test_an_unreadable_recipe_is_an_error_in_one_line(recipe, text, overrides, message):
    with pytest.raises(InputError) as caught:
        read_recipe(recipe(text), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_missing_recipe_is_an_error(tmp_path, name):
    with pytest.raises(InputError, match="no such recipe"):
        read_recipe(tmp_path / name)


def test_a_binary_recipe_is_an_error(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00a: \xff")
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        read_recipe(tmp_path / "recipe.yaml")


PLACES = [
    (("by_name", "dpo", "lr"), [], ":4: "),
    (("by_name", "a step", "lr"), [], ":6: "),
    (("by_name", "dpo"), ["by_name.dpo.lr=1"], "override 'by_name.dpo.lr=1' and PATH:3: "),
    (("by_name", "dpo", "lr"), ["by_name.dpo={lr: 1}"], "override 'by_name.dpo={lr: 1}': "),
    (("by_name", "dpo", "lr"), ["by_name.dpo.lrs=1", "by_name.dp=1", "training.lr=1"], ":4: "),
    ((), ["by_name.dpo.lr=1"], ": "),
]


@pytest.mark.parametrize(("loc", "overrides", "message"), PLACES)
def test_an_error_starts_with_the_line_or_override_of_its_location(recipe, loc, overrides, message):
    path = recipe("training: {lr: 1}\nby_name:\n  dpo:\n    lr: 1\n  a step:\n    lr: 1\n")
    with pytest.raises(InputError) as caught, located(path, overrides):
        raise InputError("wrong", loc)
    begins = message.replace("PATH", str(path)) if "override" in message else f"{path}{message}"
    assert str(caught.value) == begins + (f"{'.'.join(loc)}: wrong" if loc else "wrong")


GOOD = {"training": {"lr": 1e-5}}

UNKNOWN_KEYS = [
    ({**GOOD, "foldr": "x"}, "r.yaml.foldr", "folder"),
    ({"training": {"lr": 1, "num_step": 3}}, "r.yaml.training.num_step", "num_steps"),
    ({"training": {"lr": 1, "schedule": {"warmup": 0}}}, "r.yaml.training.schedule.warmup", "warm_up"),
    ({**GOOD, "rounds": [{"lr": 1}, {"lr": 1, "bf_16": True}]}, "r.yaml.rounds.1.bf_16", "bf16"),
    ({**GOOD, "by_name": {"dpo": {"lr": 1, "beta": 1}}}, "r.yaml.by_name.dpo.beta", "betas"),
    ({**GOOD, "last": [{"kinds": "cosine"}]}, "r.yaml.last.0.kinds", "kind"),
]


@pytest.mark.parametrize(("values", "place", "right"), UNKNOWN_KEYS)
def test_an_unknown_key_is_an_error_with_location_and_suggestion(values, place, right):
    with pytest.raises(InputError) as caught:
        build(Recipe, values, ("r.yaml",))
    assert str(caught.value).startswith(f"{place}: unknown key; did you mean {right!r}? available: ")


WRONG_VALUES = [
    ({"training": {}}, "training.lr: this key is required"),
    ({"training": {"lr": "fast"}}, "training.lr: Input should be a valid number (got 'fast')"),
    ({"training": {"lr": "1e-5"}}, "training.lr: Input should be a valid number (got '1e-5')"),
    ({"training": {"lr": True}}, "training.lr: Input should be a valid number (got True)"),
    ({"training": {"lr": 1, "num_steps": 1.5}}, "training.num_steps: Input should be a valid integer (got 1.5)"),
    ({"training": {"lr": 1, "num_steps": "3"}}, "training.num_steps: Input should be a valid integer (got '3')"),
    ({"training": {"lr": 1, "num_steps": False}}, "training.num_steps: Input should be a valid integer (got False)"),
    ({"training": {"lr": 1, "bf16": "yes"}}, "training.bf16: Input should be a valid boolean (got 'yes')"),
    ({"training": {"lr": 1, "bf16": 1}}, "training.bf16: Input should be a valid boolean (got 1)"),
    ({"training": {"lr": 1, "betas": [0.9]}}, "training.betas.1: this key is required"),
    ({"training": {"lr": 1, "betas": [0.9, 0.8]}}, "training: the second beta is at least the first"),
    ({"training": {"lr": 1, "schedule": {"kind": "cos"}}}, "schedule.kind: Input should be 'cosine' or 'constant'"),
    ({"training": {"lr": 1, "schedule": {"warm_up": 1}}}, "schedule.warm_up: Input should be less than 1 (got 1)"),
    ({"training": None}, "training: Input should be an object (got None)"),
    ({**GOOD, "folder": 3}, "folder: Input should be a valid string (got 3)"),
    ({**GOOD, "rounds": "many"}, "rounds: Input should be a valid array (got 'many')"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_VALUES)
def test_a_wrong_value_is_an_error_with_location_and_value(values, message):
    with pytest.raises(InputError) as caught:
        build(Recipe, values, ("r.yaml",))
    assert str(caught.value).startswith("r.yaml.")
    assert message in str(caught.value)


def test_a_text_of_another_form_is_an_error_with_an_example():
    with pytest.raises(InputError) as caught:
        build(AccountingSettings, {"currency": "euro"}, ("accounting",))
    assert str(caught.value) == "accounting.currency: must look like 'EUR' (pattern ^[A-Z]{3}$) (got 'euro')"


def test_yaml_types_become_settings_types():
    made = build(Recipe, {"training": {"lr": 1, "betas": [0, 1]}, "folder": "a/b", "last": None}, ("r.yaml",))
    assert (made.training.lr, type(made.training.lr)) == (1.0, float)
    assert (made.training.betas, made.folder) == ((0.0, 1.0), Path("a/b"))


def test_settings_are_frozen():
    made = build(Recipe, GOOD, ("r.yaml",))
    with pytest.raises(ValueError, match="frozen"):
        made.training.lr = 2


def test_a_hash_ignores_key_order_and_changes_with_any_value():
    one = build(Recipe, {"folder": "a", "training": {"lr": 1, "num_steps": 2}})
    other = build(Recipe, {"training": {"num_steps": 2, "lr": 1.0}, "folder": "a"})
    assert stable_hash(one) == stable_hash(other)
    variants = [
        {**GOOD, "folder": "b"},
        {**GOOD, "rounds": [{"lr": 1}]},
        {**GOOD, "rounds": [{"lr": 1}, {"lr": 1}]},
        *({"training": {"lr": 1e-5} | change} for change in ({"lr": 2e-5}, {"bf16": True}, {"betas": [0.8, 0.9]})),
    ]
    hashes = {stable_hash(build(Recipe, values)) for values in [GOOD, *variants]}
    assert len(hashes) == 1 + len(variants)


HASHED = {"b": [1, 2.5, None, "é"], "a": {"y": True, "x": float("inf")}}


@pytest.mark.parametrize("seed", ["0", "1"])
def test_a_hash_does_not_depend_on_the_process(seed):
    code = f"from align.config import stable_hash; inf = float('inf'); print(stable_hash({HASHED!r}), end='')"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
    )
    assert run.stdout == stable_hash(HASHED)
    assert stable_hash({"a": Path("x")}) == stable_hash({"a": "x"})


@pytest.mark.parametrize("unstable", [{1, 2}, object(), len])
def test_a_value_without_a_stable_form_is_not_hashed(unstable):
    with pytest.raises(TypeError, match="plain values"):
        stable_hash({"a": unstable})


def test_a_dotted_path_is_imported():
    assert import_dotted("pathlib:Path", "thing") is Path


@pytest.mark.parametrize("path", ["", "json", "json:", ":dumps", ".json:dumps", "json:nothing", "no.such:thing"])
def test_a_wrong_dotted_path_is_an_error(path):
    with pytest.raises(InputError) as caught:
        import_dotted(path, "loss")
    assert f"loss {path!r} cannot be imported as module:name" in str(caught.value)


def test_a_wrong_name_gets_a_suggestion_and_all_names():
    table = {"rpo_sq": 1, "dpo": 2, "ipo": 3}
    assert pick(table, "dpo", "loss") == 2
    with pytest.raises(InputError, match=r"no loss is called 'rpo_sqr'; did you mean 'rpo_sq'\? available: dpo, ipo"):
        pick(table, "rpo_sqr", "loss")
    assert suggest("quite else", table) == "available: dpo, ipo, rpo_sq"


def test_a_message_of_several_lines_becomes_one():
    assert one_line(ValueError("first\n   second\tthird\r\n")) == "first second third"
