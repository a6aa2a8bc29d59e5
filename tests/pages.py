"""The Markdown pages of the project, and what they show as code: blocks, inline code, commands and links."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = tuple(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md")))
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "align/README.md",
    "launch/README.md",
    "recipes/README.md",
    "tests/README.md",
    *DOCS,
)
OWN_RECIPE = "my-recipe.yaml"  # the reader's recipe in examples


def text(page):
    return (ROOT / page).read_text("utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def prose(page):
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def shell_commands(page):
    """Every command of the page's bash blocks, as words; of a loop its body with 0 for the variable."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    plain = [re.sub(r"\$\w+", "0", re.sub(r"\s#.*", "", line)) for line in lines]
    parts = [part for line in plain for part in re.split(r"&&|;", line)]
    words = [shlex.split(part.strip().removeprefix("do ")) for part in parts]
    return [each for each in words if each and each[0] not in ("for", "done", "do")]


def align_commands():
    """(page, words after `align`) of every call, also of those that `accelerate launch` makes."""
    found = [(page, words) for page in PAGES for words in shell_commands(page)]
    return [(page, words[words.index("align") + 1 :]) for page, words in found if _calls_align(words)]


def _calls_align(words):
    return words[0] == "align" or (words[0] == "accelerate" and "align" in words)


def links(page):
    """(target, anchor) of every link inside the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [tuple((target.split("#") + [""])[:2]) for target in targets if "://" not in target]


def anchors(page):
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
