import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "align"
LEAST_FILES = 11  # raise it as the house grows: a test that has lost its files must not pass

# Bottom up; packages on one level do not import each other (DESIGN, "Layout").
LEVELS = (
    ("errors",),
    ("registry", "records"),
    ("config",),
    ("artifacts",),
    ("data", "losses", "sandbox", "distributed", "accounting", "pipeline", "report"),
    ("models", "procedural"),
    ("train", "inference"),
    ("rewards",),
    ("synth", "curate", "compress", "evaluation"),
    ("stages",),
    ("workflow",),
    ("testing", "integrations"),
    ("",),  # align/__init__.py: the public names
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}

MOST_LINES_OF_A_FILE = 304
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS = 8
VAGUE = {"common", "helpers", "manager", "misc", "utils"}


def modules(package):
    """Syntax trees by dotted name; a folder's `__init__` goes by the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


def imported(name, tree, known, *, is_package):
    """The project's modules that a module imports, lazily or not, with the line of each."""
    here = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            wanted = [part.value for part in node.args if isinstance(part, ast.Constant)]
        else:
            continue
        for full in wanted:
            while full and full not in known:
                full = full.rpartition(".")[0]
            if full and full != name:
                yield full, node.lineno


def room(name):
    """The part of a dotted name that has a floor; the package itself has none."""
    return name.split(".")[1] if "." in name else ""


def imports(package):
    trees = modules(package)
    packages = {name for name in trees if (package.parent / name.replace(".", "/")).is_dir()}
    return {name: list(imported(name, tree, trees, is_package=name in packages)) for name, tree in trees.items()}


def wrong_directions(package):
    for name, found in imports(package).items():
        if room(name) and room(name) not in LEVEL:
            yield f"{name} has no level"
            continue
        for target, line in found:
            here, there = room(name), room(target)
            below = there in LEVEL and here in LEVEL and LEVEL[there] < LEVEL[here]
            if there not in ("", here) and not below:
                yield f"{name}:{line} imports {target}, which is not below it"


def rings(package):
    needs = {name: {target for target, _ in found} for name, found in imports(package).items()}
    while free := [name for name, targets in needs.items() if not targets & needs.keys()]:
        for name in free:
            del needs[name]
    if needs:
        yield f"a ring of imports among {', '.join(sorted(needs))}"


def oversized(package):
    for path in sorted(package.rglob("*.py")):
        text, where = path.read_text(), path.relative_to(package.parent)
        if (lines := len(text.splitlines())) > MOST_LINES_OF_A_FILE:
            yield f"{where} has {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            taken = node.args
            names = [part.arg for part in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MOST_PARAMETERS:
                yield f"{where}:{node.lineno} {node.name} takes {count} parameters"
            if (lines := node.end_lineno - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION:
                yield f"{where}:{node.lineno} {node.name} has {lines} lines"


def unsaid(package):
    for name, tree in modules(package).items():
        if not ast.get_docstring(tree):
            yield f"{name} has no docstring"
        if VAGUE & set(name.split(".")):
            yield f"{name} is a vague name"


def not_in_the_api_page(package):
    """Packages and top-level modules that `align/README.md` does not name."""
    named = set(re.findall(r"`(\w+)(?:/|\.py)`", (package / "README.md").read_text()))
    present = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    for name in sorted(present - {"__init__", "__main__"} - named):
        yield f"align/README.md does not name {name}"


RULES = [wrong_directions, rings, oversized, unsaid]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rules(rule):
    covered = modules(PACKAGE)
    num_imports = sum(len(found) for found in imports(PACKAGE).values())
    print(f"covered {len(covered)} files, {num_imports} imports")
    assert list(rule(PACKAGE)) == []
    assert len(covered) >= LEAST_FILES, f"covered {len(covered)} files only"


def test_the_api_page_names_every_package():
    assert list(not_in_the_api_page(PACKAGE)) == []


def test_the_command_line_answers_before_torch_is_imported():
    if not (PACKAGE / "cli.py").exists():
        pytest.skip("there is no align/cli.py yet")
    code = "import sys, align.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "align" in loaded
    assert not {"torch", "transformers", "datasets", "accelerate", "peft", "trl", "numpy", "pyarrow"} & set(loaded)


LONG_FILE = "pass\n" * (MOST_LINES_OF_A_FILE + 1)
LONG_FUNCTION = "def long() -> None:\n" + "    pass\n" * MOST_LINES_OF_A_FUNCTION
WIDE_METHOD = "class A:\n    def wide(self, a, b, c, d, *, e, f, g, h, i): ...\n"

# What each rule must find in a house that breaks it: (rule, {file: content}, words of the finding)
BROKEN = [
    (
        wrong_directions,
        {"losses/a.py": "import align.models.b", "models/b.py": ""},
        "align.losses.a:1 imports align.mod",
    ),
    (wrong_directions, {"losses/a.py": "from align.models import b", "models/b.py": ""}, "imports align.models.b"),
    (wrong_directions, {"losses/a.py": "from align import models", "models/b.py": ""}, "imports align.models,"),
    (wrong_directions, {"losses/a.py": "from ..models.b import c", "models/b.py": ""}, "imports align.models.b"),
    (
        wrong_directions,
        {"losses/a.py": "def f():\n  import align.cli", "cli.py": ""},
        "align.losses.a:2 imports align.cli",
    ),
    (wrong_directions, {"data/a.py": "from align.losses.b import c", "losses/b.py": ""}, "imports align.losses.b"),
    (wrong_directions, {"inference/a.py": "from align.train.b import c", "train/b.py": ""}, "imports align.train.b"),
    (wrong_directions, {"records.py": "import align.artifacts", "artifacts.py": ""}, "imports align.artifacts"),
    (wrong_directions, {"errors.py": "from align.records import R", "records.py": ""}, "imports align.records"),
    (wrong_directions, {"__init__.py": "from align.cli import main", "cli.py": ""}, "align:1 imports align.cli"),
    (wrong_directions, {"data/__init__.py": "from .. import cli", "cli.py": ""}, "align.data:1 imports align.cli"),
    (wrong_directions, {"records.py": "import_module('align.cli')", "cli.py": ""}, "imports align.cli"),
    (wrong_directions, {"attic.py": ""}, "align.attic has no level"),
    (rings, {"data/a.py": "from align.data.b import c", "data/b.py": "from .a import d"}, "align.data.a, align.data.b"),
    (
        rings,
        {"data/a.py": "from align.data import b", "data/b.py": "def f():\n  import align.data.a"},
        "ring of imports",
    ),
    (
        oversized,
        {"cli.py": "pass\n" * (MOST_LINES_OF_A_FILE + 1)},
        f"align/cli.py has {MOST_LINES_OF_A_FILE + 1} lines",
    ),
    (oversized, {"cli.py": LONG_FUNCTION}, "align/cli.py:1 long has 61 lines"),
    (oversized, {"cli.py": WIDE_METHOD}, "align/cli.py:2 wide takes 9 parameters"),
    (unsaid, {"cli.py": "# a comment only"}, "align.cli has no docstring"),
    (unsaid, {"data/utils.py": '"""Odds and ends."""'}, "align.data.utils is a vague name"),
    (not_in_the_api_page, {"data/a.py": "", "README.md": "`losses/`"}, "does not name data"),
    (not_in_the_api_page, {"cli.py": "", "README.md": "cli.py"}, "does not name cli"),
]


def house(root, files):
    for name, content in {"__init__.py": "", **files}.items():
        path = root / "align" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(content)
    return root / "align"


@pytest.mark.parametrize(("rule", "files", "said"), BROKEN)
def test_a_house_that_breaks_a_rule_is_found_out(tmp_path, rule, files, said):
    assert any(said in finding for finding in rule(house(tmp_path, files)))


def test_what_the_rules_allow_is_let_be(tmp_path):
    files = {
        "config.py": '"""Ground."""\nimport json',
        "errors.py": '"""Errors."""',
        "records.py": '"""Ground."""\nfrom align.errors import InputError',
        "data/reading.py": '"""A room."""\nfrom align import records\nfrom align.data import mixing',
        "data/mixing.py": '"""Its neighbour."""\nfrom ..records import Record',
        "cli.py": '"""The roof."""\ndef f(self, a, b, c, d, *, e, f, g, h): import align.data.reading',
        "__init__.py": '"""The house."""',
        "data/__init__.py": '"""A floor."""',
        "__main__.py": '"""The door."""\nfrom align.cli import f',
    }
    package = house(tmp_path, files)
    assert [finding for rule in RULES for finding in rule(package)] == []
