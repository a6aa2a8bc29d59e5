r"""Lists in a teacher's answer, in whatever form it writes them, without a second model call.

The first form that is found is read: a JSON array (bare, fenced or under a key), numbered lines, bullets, plain lines,
and for names a list with commas. Every item is a part of the answer, after the escapes of JSON and runs of white space
have been resolved and marks around it (quotes, Markdown, labels, descriptions of a name) have been left out.

>>> items("Sure!\n1. **Algebra**: numbers\n2. Optics\n\nLet me know!", 3, names=True).items
('Algebra', 'Optics')
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from align.records import is_cut_off
from align.rewards.verifiers.refusals import is_refusal

# Reasons why a wanted item is missing
EMPTY, REFUSED, CUT, TOO_FEW, NOT_A_LIST = "empty", "refused", "cut", "too few", "not a list"
DUPLICATE, TOO_LONG_ITEM = "duplicate", "too long"
MAX_NAME_WORDS, MAX_SENTENCE_WORDS = 12, 250  # of an item; longer ones are not what was asked for
FEWER, MORE = 2, 3  # than wanted: unmarked lines and comma lists are taken for a list within this range only
NUMBERED = re.compile(
    r"^(\s*)(?:[*_#]{1,3}\s*)?(?:\(\d{1,3}\)|\d{1,3}\s*[.):](?!\d)|(?:[A-Za-z]+\s){1,2}\d{1,3}\s*[.:)\-–—]|[A-Za-z]\d{1,3}\s*[.:)])"
    r"(?:\s*[*_]{1,2}(?=\s))?\s*(.*)$"
)
BULLET = re.compile(r"^(\s*)[-*•–+·]\s+(.*)$")
FENCE = re.compile(r"^\s*(?:```|~~~)\w*\s*$")
LABEL = re.compile(
    r"^[*_]{0,2}(?:topic|subtopic|question|task|problem|prompt|request|instruction|item|keyword|revision|rewrite|"
    r"exercise|version|q)\s*(?:\d{1,3})?\s*:\s*[*_]{0,2}\s*",
    re.IGNORECASE,
)
CHAT = re.compile(  # what a teacher says around a list
    r"^(?:sure|certainly|of course|absolutely|okay|ok|great|here (?:are|is|'s)|here’s|below (?:are|is)|"
    r"these (?:are|topics|questions|tasks)|i hope|let me know|feel free|would you like|"
    r"if you(?:'d| would| need| want)|happy to|please let)\b",
    re.IGNORECASE,
)
CLOSING = re.compile(  # what a teacher says after a list; narrower than CHAT, as the last item may go on in its line
    r"^(?:i hope (?:this|these)|(?:please )?let me know|feel free to|would you like (?:me|more)|"
    r"(?:i(?:'|’)m |i am )?happy to|if you(?:(?:'|’)d| would)? (?:like|need|want) (?:me|more|any|further))\b",
    re.IGNORECASE,
)
TABLE_ROW = re.compile(r"^\s*\|(.+)\|\s*$")
TABLE_RULE = re.compile(r"^\s*\|(?:\s*:?-{2,}:?\s*\|)+\s*$")  # below the names of the columns
ARRAY = re.compile(  # not the values in a task about an array
    r'^[ \t]*(?:\{[ \t]*)?(?:"[^"\n]*"[ \t]*:[ \t]*)?\[', re.MULTILINE
)
# Keys of the text in an entry that is a JSON object, the most specific first
TEXT_KEYS = ("task", "question", "prompt", "instruction", "request", "problem", "name", "topic", "text")
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}
MARKED_NAME = re.compile(r"^(?:\*\*|__|`)(.+?)(?:\*\*|__|`)")
TOKEN = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s]")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
OPERATOR = re.compile(
    r"[+=<>%^|~\\{}\[\]#&×÷√$€£]"
    r"|(?<=[\w)]) ?[-*/](?= ?[\d(])|(?<=[\d)]) ?[-*/](?= ?[\w(])"  # beside a number or parenthesis
    r"|(?<=\b\w) ?[-*/](?= ?\w\b)|(?<![\w)])-(?=\d)"  # between variables, or of a negative number
)
SENTENCE_MARKS = frozenset(".,;:?!'\"`“”‘’…–—")
DESCRIPTION = re.compile(r"(?<!\s)\s*(?::\s|:$|\s[-–—]\s|\s\().*$", re.DOTALL)  # of a name


@dataclass(frozen=True, slots=True)
class Parsed:
    """The items of an answer. Wanted items = `items` and all counts of `dropped`."""

    items: tuple[str, ...]
    dropped: Counter[str] = field(default_factory=Counter[str])  # reason -> wanted items that are missing for it
    surplus: int = 0  # items beyond the wanted number


def items(
    text: str, wanted: int, *, finish: str | None = None, names: bool = False, known: Iterable[str] = ()
) -> Parsed:
    """Return the first `wanted` items of an answer that ended with `finish`, in order.

    `names` are short: of each the description is left out. Items that equal one in `known` are duplicates.
    """
    if not text.strip():
        return Parsed((), Counter({EMPTY: wanted}))
    found, is_complete = _entries(text, wanted, names=names)
    if not found:
        reason = REFUSED if is_refusal(text) else CUT if is_cut_off(finish) else NOT_A_LIST
        return Parsed((), Counter({reason: wanted}))
    lost = Counter[str]()
    if is_cut_off(finish) and not is_complete:
        found = found[:-1]
        lost[CUT] += 1
    kept: list[str] = []
    seen = {same(each) for each in known}
    limit = MAX_NAME_WORDS if names else MAX_SENTENCE_WORDS
    for entry in found:
        item = _clean_name(entry) if names else _clean(entry)
        reason = EMPTY if not same(item) else TOO_LONG_ITEM if len(item.split()) > limit else ""
        reason = reason or (DUPLICATE if same(item) in seen else "")
        if reason:
            lost[reason] += 1
        else:
            seen.add(same(item))
            kept.append(item)
    surplus = max(0, len(kept) - wanted)
    return Parsed(tuple(kept[:wanted]), _shortage(wanted - min(wanted, len(kept)), lost), surplus)


def same(text: str) -> str:
    """Return what two texts have in common that differ in case, white space and punctuation only.

    Numbers keep their points. Of a formula or code all marks are kept but those of sentences.

    >>> same("What is 3 - 4?") == same("what is 3-4"), same("3 + 4") == same("3 - 4"), same("a follow-up!")
    (True, False, 'a follow up')
    """
    text = THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold().replace("\N{MINUS SIGN}", "-"))
    tokens = TOKEN.findall(text)
    if OPERATOR.search(text):
        return " ".join(token for token in tokens if token not in SENTENCE_MARKS)
    return " ".join(token for token in tokens if re.match(r"\w", token))


def _shortage(missing: int, lost: Counter[str]) -> Counter[str]:
    """Return the reasons of the missing items; what is left of them came too few."""
    reasons = Counter[str]()
    for reason, number in lost.items():
        reasons[reason] = min(number, missing)
        missing -= reasons[reason]
    reasons[TOO_FEW] = missing
    return +reasons


def _entries(text: str, wanted: int, *, names: bool) -> tuple[list[str], bool]:
    """Return the items as written, and whether the list is known to be complete."""
    from_json = _json_strings(text)
    if from_json is not None:
        return from_json
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n") if not FENCE.match(line)]
    while lines and (not lines[-1] or CLOSING.match(lines[-1].strip())):
        lines.pop()
    body = [line for line in lines if line.strip() and not _is_preamble(line, wanted)]
    first = next(iter(body), "")
    marked = next((line for line in lines if any(mark.match(line) for mark in (NUMBERED, BULLET, TABLE_ROW))), "")
    holds_nothing_else = wanted > 1 or all(map(TABLE_ROW.match, body))  # a single task may hold a table
    if TABLE_ROW.match(marked) and holds_nothing_else and (table := _table(lines, names=names)):
        return table, False
    for mark in (NUMBERED, BULLET):
        found = _marked(lines, mark, joins=not names)
        if mark.match(first) or (len(found) > 1 and wanted > 1):  # one task may hold a list of its own
            return found, False
    found = _plain_lines(lines, wanted)
    if found is not None and not (names and len(found) == 1 and wanted > 1):
        return found, False
    return (_comma_list(lines, wanted) if names else []), False


def _json_strings(text: str) -> tuple[list[str], bool] | None:
    """Return the strings of the first JSON array, and whether it is closed; None if there is none."""
    start = next((mark.end() - 1 for mark in ARRAY.finditer(text)), -1)
    is_unclear = False  # whether an entry was left out
    decoder = json.JSONDecoder()
    found = list[str]()
    place = start + 1
    while 0 < place < len(text):
        place += len(text[place:]) - len(text[place:].lstrip(" \t\r\n,"))
        if text[place : place + 1] == "]":
            return (found, True) if found or is_unclear else None
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return (found, True) if found or is_unclear else None  # an unfinished string is not among them
        if isinstance(value, dict) and any(isinstance(each, str) for each in value.values()):  # pyright: ignore[reportUnknownVariableType] - any JSON
            value = _text_of(value)  # pyright: ignore[reportUnknownArgumentType] - any JSON
            if value is None:
                is_unclear = True
                continue
        if not isinstance(value, str):
            return None
        found.append(_whole_characters(value))
    return (found, True) if found or is_unclear else None


def _text_of(entry: dict[str, object]) -> str | None:
    """Return the text of an item with several keys: of a known key, or the only text; None if it is not clear."""
    texts = {name.lower(): value for name, value in entry.items() if isinstance(value, str)}
    known = next((texts[name] for name in TEXT_KEYS if name in texts), None)
    return next(iter(texts.values())) if known is None and len(texts) == 1 else known


def _whole_characters(text: str) -> str:
    """Return a text with U+FFFD in place of unpaired surrogates, which JSON escapes can write."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _marked(lines: Sequence[str], mark: re.Pattern[str], *, joins: bool) -> list[str]:
    """Return the entries of numbered or bulleted lines, of the outermost level; `joins` the lines that follow each."""
    matches = [mark.match(line) for line in lines]
    level = min((len(match[1]) for match in matches if match), default=0)
    found: list[list[str]] = []
    is_open = False  # whether the next line may belong to the latest entry
    for line, match in zip(lines, matches, strict=True):
        if match and len(match[1]) <= level + 1:
            found.append([match[2].strip()])
            is_open = True
        elif not line.strip():
            is_open = False
        elif found and joins and (is_open or line.startswith(" ")):
            found[-1].append(line.strip())
        elif found and not found[-1][0]:
            found[-1][0] = line.strip()
    return [" ".join(part for part in each if part) for each in found]


def _table(lines: Sequence[str], *, names: bool) -> list[str]:
    """Return the items in a Markdown table, one of each row below the columns' names; none without a table.

    They are the cells of the longest column; of `names`, which may have a description beside them, of the first column
    that is no number.
    """
    rule = next((place for place, line in enumerate(lines) if TABLE_RULE.match(line)), len(lines))
    rows = [re.split(r"(?<!\\)\|", match[1]) for match in map(TABLE_ROW.match, lines[rule + 1 :]) if match]
    columns = [[cell.replace("\\|", "|").strip() for cell in column] for column in zip(*rows, strict=False)]
    named = [cells for cells in columns if not all(cell.rstrip(".").isdigit() for cell in cells)]
    return next(iter(named), []) if names else max(columns, key=lambda cells: sum(map(len, cells)), default=[])


def _is_preamble(line: str, wanted: int) -> bool:
    """Return whether a line introduces a list; a single task may itself begin with a line that ends in a colon."""
    parts = [line.rstrip(" *_").endswith(":"), CHAT.match(line.strip()) is not None]
    return any(parts) if wanted > 1 else all(parts)


def _plain_lines(lines: Sequence[str], wanted: int) -> list[str] | None:
    """Return unmarked lines where their number is about the wanted one; None for anything else."""
    found = [line.strip() for line in lines if line.strip()]
    while len(found) > 1 and _is_preamble(found[0], wanted):
        found = found[1:]
    while len(found) > 1 and CHAT.match(found[-1]):
        found = found[:-1]
    if wanted == 1:
        return None if is_refusal(" ".join(found)) else ["\n".join(found)]
    fits = max(2, wanted - FEWER) <= len(found) <= wanted + MORE
    return found if fits and not is_refusal(found[0]) else None


def _comma_list(lines: Sequence[str], wanted: int) -> list[str]:
    """Return the names of the line that lists about the wanted number of them with commas or semicolons."""
    for line in lines:
        listed = line.partition(":")[2] if ":" in line and "," not in line.partition(":")[0] else line
        parts = [re.sub(r"^(?:and|or)\s+", "", part.strip()) for part in re.split(r"[,;]", listed.strip().rstrip("."))]
        last = re.split(r"\s+and\s+", parts[-1])
        splits_last = len(parts) > 1 or len(last) == wanted
        parts = [part for part in [*parts[:-1], *(last if splits_last else parts[-1:])] if part]
        if max(2, wanted - FEWER) <= len(parts) <= wanted + MORE and not is_refusal(line):
            return parts
    return []


def _clean(entry: str) -> str:
    """Return an item without the label, quotes and Markdown marks around it."""
    text = LABEL.sub("", entry.strip()).strip()
    text = _unquoted(text)
    for mark in ("**", "__", "*", "_"):
        size = len(mark)
        if len(text) > 2 * size and text.startswith(mark) and text.endswith(mark) and mark not in text[size:-size]:
            text = text[size:-size].strip()
    if text.endswith("**") and text.count("**") == 1:  # of marks that began before the number
        text = text.removesuffix("**")
    return LABEL.sub("", text).strip()


def _unquoted(text: str) -> str:
    """Return a text without the quotes around all of it; escapes as in JSON and YAML are resolved."""
    if len(text) < 2 or QUOTES.get(text[0]) != text[-1]:  # noqa: PLR2004 - two quotes
        return text
    if text[0] == '"' and "\\" in text:
        try:
            return _whole_characters(str(json.loads(text)))
        except ValueError:
            return text
    inside = text[1:-1]
    place = inside.find(text[0])
    opens_again = place > 0 and inside[place - 1] in " ("  # a quotation inside, not the end of a first one
    return inside.strip() if place < 0 or opens_again else text


def _clean_name(entry: str) -> str:
    """Return a name without its description."""
    text = LABEL.sub("", entry.strip()).strip()
    marked = MARKED_NAME.match(text)
    name = DESCRIPTION.sub("", marked[1] if marked else _clean(text.split("\n")[0]))
    return _clean(name.rstrip(":")).rstrip(".,;").strip()
