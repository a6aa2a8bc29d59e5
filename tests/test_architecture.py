import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "align"
MIN_FILES = 100  # guards against a test that no longer finds the package

# Bottom up; packages on one level do not import each other (DESIGN, "Layout").
LEVELS = (
    ("errors", "redaction", "foreign_keys"),
    ("registry", "records", "storage"),
    ("build_errors",),
    ("config",),
    ("artifacts",),
    ("content_hash",),
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

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_MODULES = 12  # in one package
LARGE_PACKAGES = {"align.data", "align.data.readers"}  # one module per format
VAGUE_NAMES = {"common", "helpers", "manager", "misc", "utils"}


@cache
def parse(text):
    return ast.parse(text)


def called(node):
    """Return the last name of what a call or a decorator calls: `command` for `@app.command()`."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def modules(package):
    """Return {dotted name: syntax tree}; an `__init__` file has the name of its package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = parse(path.read_text())
    return found


def imported(name, tree, known, *, is_package):
    """Yield (module of the project, line) for each import of a module, including those inside functions."""
    here = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            wanted = [part.value for part in node.args if isinstance(part, ast.Constant)]
        else:
            continue
        for full in wanted:
            while full and full not in known:
                full = full.rpartition(".")[0]
            if full and full != name:
                yield full, node.lineno


def level_name(name):
    """Return the part of a dotted name that has a level; the root package has none."""
    return name.split(".")[1] if "." in name else ""


def imports(package):
    trees = modules(package)
    packages = {name for name in trees if (package.parent / name.replace(".", "/")).is_dir()}
    return {name: list(imported(name, tree, trees, is_package=name in packages)) for name, tree in trees.items()}


def upward_imports(package):
    for name, found in imports(package).items():
        if level_name(name) and level_name(name) not in LEVEL:
            yield f"{name} has no level"
            continue
        for target, line in found:
            source_level, target_level = LEVEL.get(level_name(name)), LEVEL.get(level_name(target))
            is_below = None not in (source_level, target_level) and target_level < source_level
            if level_name(target) not in ("", level_name(name)) and not is_below:
                yield f"{name}:{line} imports {target}, which is not below it"


def import_cycles(package):
    needs = {name: {target for target, _ in found} for name, found in imports(package).items()}
    while free := [name for name, targets in needs.items() if not targets & needs.keys()]:
        for name in free:
            del needs[name]
    if needs:
        yield f"an import cycle among {', '.join(sorted(needs))}"


def is_command(node):
    """Return whether a function is a command of the command line, whose parameters are its options."""
    return any(isinstance(each, ast.Call) and called(each) == "command" for each in node.decorator_list)


def oversized(package):
    for path in sorted(package.rglob("*.py")):
        text, where = path.read_text(), path.relative_to(package.parent)
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            yield f"{where} has {lines} lines"
        for node in ast.walk(parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            taken = node.args
            names = [part.arg for part in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS and not is_command(node):
                yield f"{where}:{node.lineno} {node.name} takes {count} parameters"
            if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                yield f"{where}:{node.lineno} {node.name} has {lines} lines"


def crowded(package):
    """Yield the packages with too many modules of their own; packages inside count as theirs."""
    counts = Counter(
        name.rpartition(".")[0] for name in modules(package) if not (package.parent / name.replace(".", "/")).is_dir()
    )
    for name, count in sorted(counts.items()):
        if count > MAX_MODULES and name not in LARGE_PACKAGES:
            yield f"{name} has {count} modules"


def undocumented(package):
    for name, tree in modules(package).items():
        if not ast.get_docstring(tree):
            yield f"{name} has no docstring"
        if VAGUE_NAMES & set(name.split(".")):
            yield f"{name} is a vague name"


def missing_in_readme(package):
    """Yield the packages and top-level modules that `align/README.md` does not name."""
    named = set(re.findall(r"`(\w+)(?:/|\.py)`", (package / "README.md").read_text()))
    present = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    for name in sorted(present - {"__init__", "__main__"} - named):
        yield f"align/README.md does not name {name}"


RULES = [upward_imports, import_cycles, oversized, crowded, undocumented]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_follows_the_rules(rule):
    num_files = len(modules(PACKAGE))
    assert num_files >= MIN_FILES, f"covered {num_files} files only"
    assert list(rule(PACKAGE)) == []


def test_the_readme_of_the_package_names_every_package():
    assert list(missing_in_readme(PACKAGE)) == []


def test_test_files_outside_packages_have_different_names():
    """pytest imports them as top-level modules, and refuses a second one of the same name."""
    alone = [path for path in (ROOT / "tests").rglob("*.py") if not (path.parent / "__init__.py").exists()]
    seen = Counter(path.name for path in alone if path.name != "conftest.py")
    assert [name for name, number in seen.items() if number > 1] == []


def test_the_command_line_does_not_import_torch():
    code = "import sys, align.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "align" in loaded
    assert not {"torch", "transformers", "datasets", "accelerate", "peft", "trl", "numpy", "pyarrow"} & set(loaded)


LONG_FILE = "pass\n" * (MAX_FILE_LINES + 1)
LONG_FUNCTION = "def long() -> None:\n" + "    pass\n" * MAX_FUNCTION_LINES
WIDE_METHOD = "class A:\n    def wide(self, a, b, c, d, *, e, f, g, h, i): ...\n"

# A package that breaks each rule: (rule, {file: content}, text of the finding)
BROKEN = [
    (
        upward_imports,
        {"losses/a.py": "import align.models.b", "models/b.py": ""},
        "align.losses.a:1 imports align.mod",
    ),
    (upward_imports, {"losses/a.py": "from align.models import b", "models/b.py": ""}, "imports align.models.b"),
    (upward_imports, {"losses/a.py": "from align import models", "models/b.py": ""}, "imports align.models,"),
    (upward_imports, {"losses/a.py": "from ..models.b import c", "models/b.py": ""}, "imports align.models.b"),
    (
        upward_imports,
        {"losses/a.py": "def f():\n  import align.cli", "cli.py": ""},
        "align.losses.a:2 imports align.cli",
    ),
    (upward_imports, {"data/a.py": "from align.losses.b import c", "losses/b.py": ""}, "imports align.losses.b"),
    (upward_imports, {"inference/a.py": "from align.train.b import c", "train/b.py": ""}, "imports align.train.b"),
    (upward_imports, {"records.py": "import align.artifacts", "artifacts.py": ""}, "imports align.artifacts"),
    (upward_imports, {"errors.py": "from align.records import R", "records.py": ""}, "imports align.records"),
    (upward_imports, {"__init__.py": "from align.cli import main", "cli.py": ""}, "align:1 imports align.cli"),
    (upward_imports, {"data/__init__.py": "from .. import cli", "cli.py": ""}, "align.data:1 imports align.cli"),
    (upward_imports, {"records.py": "import_module('align.cli')", "cli.py": ""}, "imports align.cli"),
    (upward_imports, {"attic.py": ""}, "align.attic has no level"),
    (
        import_cycles,
        {"data/a.py": "from align.data.b import c", "data/b.py": "from .a import d"},
        "align.data.a, align.data.b",
    ),
    (
        import_cycles,
        {"data/a.py": "from align.data import b", "data/b.py": "def f():\n  import align.data.a"},
        "import cycle",
    ),
    (
        oversized,
        {"cli.py": "pass\n" * (MAX_FILE_LINES + 1)},
        f"align/cli.py has {MAX_FILE_LINES + 1} lines",
    ),
    (oversized, {"cli.py": LONG_FUNCTION}, "align/cli.py:1 long has 61 lines"),
    (oversized, {"cli.py": WIDE_METHOD}, "align/cli.py:2 wide takes 9 parameters"),
    (
        crowded,
        {f"losses/a{number}.py": "" for number in range(MAX_MODULES + 1)},
        f"align.losses has {MAX_MODULES + 1} modules",
    ),
    (undocumented, {"cli.py": "# a comment only"}, "align.cli has no docstring"),
    (undocumented, {"data/utils.py": '"""Various functions."""'}, "align.data.utils is a vague name"),
    (missing_in_readme, {"data/a.py": "", "README.md": "`losses/`"}, "does not name data"),
    (missing_in_readme, {"cli.py": "", "README.md": "cli.py"}, "does not name cli"),
]


def make_package(root, files):
    for name, content in {"__init__.py": "", **files}.items():
        path = root / "align" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(content)
    return root / "align"


@pytest.mark.parametrize(("rule", "files", "message"), BROKEN)
def test_a_broken_rule_is_reported(tmp_path, rule, files, message):
    assert any(message in finding for finding in rule(make_package(tmp_path, files)))


def test_allowed_code_is_not_reported(tmp_path):
    files = {
        "config.py": '"""Level 0."""\nimport json',
        "errors.py": '"""Errors."""',
        "records.py": '"""Level 0."""\nfrom align.errors import InputError',
        "data/reading.py": '"""Level 1."""\nfrom align import records\nfrom align.data import mixing',
        "data/mixing.py": '"""A module of the same package."""\nfrom ..records import Record',
        "cli.py": '"""The top level."""\ndef f(self, a, b, c, d, *, e, f, g, h): import align.data.reading',
        "__init__.py": '"""The root package."""',
        "data/__init__.py": '"""A package."""',
        "__main__.py": '"""The entry point."""\nfrom align.cli import f',
    }
    package = make_package(tmp_path, files)
    assert [finding for rule in RULES for finding in rule(package)] == []
