r"""Find the final answer in a response.

It is given as in GSM8K (`#### 42`), in `\boxed{...}` or `<answer>`, as JSON, in words ("the answer is 42"), behind a
label ("Total: 42"), or as the last number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from align.rewards.answers.quantities import NO_UNIT, parse_quantity
from align.rewards.thoughts import VisibleText, visible_text

MAX_LENGTH = 1000  # characters of an answer

MARKER = re.compile(r"####[ \t]*(?P<answer>\S.*)(?P<rest>\s*)")
TAGGED = re.compile(r"<answer>(?P<answer>(?:(?!<answer>).){1,4000}?)</answer>", re.DOTALL | re.IGNORECASE)
BOXED = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
BARE_BOX = re.compile(r"\\boxed\s*(?P<answer>-?[\w.]+)")
BETWEEN_BOXES = re.compile(r"\s*(?:\$\s*)?(?:[,;]|(?:,\s*)?(?:and|or)\b)\s*(?:\$\s*)?")
MEMBER = re.compile(
    r'"(?:final[ _]?)?(?:answer|result|solution)"\s*:\s*(?P<value>"(?:[^"\\\n]|\\.)*"|\[[^\[\]{}]*\]|[^\s,"{}\[\]]+)',
    re.IGNORECASE,
)
LANGUAGES = "antwort|respuesta|réponse|reponse|risposta|resposta|ответ|jawaban|cevap"
STATED = re.compile(
    r"(?:(?:\banswers?|\b(?:correct|right|best)\s+(?:option|choice)|(?:"
    rf"\b(?:{LANGUAGES})))\**\s*(?:is|are|will\s+be|would\s+be|should\s+be|equals|comes\s+(?:out\s+)?to|=|:|"
    r"ist|lautet|est|es|è|é|adalah|-+>|→|—)(?![A-Za-z])\**:?"
    r"|(?:答案|答え|答|정답)\s*(?:是|为|為|は|은|는|：|:)+|^(?:[#*]|[^\S\n])*(?:final\s+)?answer[*:]*[ \t]*$)"
    r"\s*\**(?:(?:about|approximately|roughly)\s)?(?=\S)",
    re.IGNORECASE | re.MULTILINE,
)
CHOSEN = re.compile(
    r"(?<![\w(])(?P<choice>\([A-J]\)|[A-J])\s+is\s+(?:the\s+|our\s+|my\s+)?(?:(?:best|correct|right|final)\s+)*"
    r"(?:answer|option|choice|one|correct|right)\b"
)
ABBREVIATIONS = "".join(rf"(?<!\b{word})" for word in ("approx", "Dr", "Mr", "Mrs", "St", "sq", "U\\.S", "no", "No"))
EXPLANATION = re.compile(
    rf"\n.*|(?<=\S){ABBREVIATIONS}[.!](?:\s.*)?$|。.*|\*\*.*|\s(?:because|since|which|so that|as)\b.*", re.DOTALL
)
FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$\n]+)\$(?!\w|\.\d)"
    r"|\\\((?P<round>.{1,1000}?)\\\)|\\\[(?P<square>.{1,1000}?)\\\]",
    re.DOTALL,
)
MORE_FORMULAS = re.compile(r"\s*(?:,|(?:,\s*)?(?:and|or)\b)\s*(?:\$|\\\()")
NUMBER = re.compile(
    r"(?<![\d.,:])\d{1,2}:\d{1,2}(?![\d:])(?:\s?(?i:[ap]\.?m)\b\.?)?"  # a ratio, or a time of day
    r"|(?:(?<![\w)\]}])[-−])?[$€£¥₹]?(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
    r"(?:\.\d+|/\d+)?(?![\d])%?|(?<![\w.,])\.\d+%?"
)
DENIED = re.compile(
    r"(?:\bnot|n't|\brather than|\binstead of)\s+(?:(?:equal to|simply|just|exactly|be)\s+)?(?=[-−$€£¥₹\d.])"
)
CONTRAST = re.compile(r"(?<=\S)[,;]?\s+\(?(?:and\s+)?(?:not|rather than|instead of)\b.*", re.DOTALL)
CONNECTIVE = re.compile(
    r"(?:so|therefore|hence|thus|then|finally|overall|ok|okay|sure|well|and|∴|=>|⇒|it is|it's|that is|this is|we get|"
    r"i get|i choose|i pick|about|approximately|approx\.|roughly|around|exactly|option|choice|"
    r"(?:final\s+)?ans(?:wer|\.)|因此|所以|よって)"
    r"(?![A-Za-z])\s*[,:]?\s*(?=\S)",
    re.IGNORECASE,
)
LABEL = re.compile(
    r"(?![A-J]\s*:)[^\W\d][\w ()'/-]{0,40}(?:\s*(?<!\d)[:：]|\s+(?:=|is|are|equals|->|→)(?=\s))\s*(?=\S)"
)
RESULT = re.compile(
    r"(?:final|total|grand total|result|sum|solution|value|ans|output|conclusion|difference|product|quotient|average|"
    r"mean)\b[\w ()'/-]{0,40}(?:[:=：]|\bis\b|\bare\b)\s*(?=\S)",
    re.IGNORECASE,
)
CALCULATOR = re.compile(r"<<[^<>\n]{1,200}>>")  # annotations of GSM8K: 48/2 = <<48/2=24>>24
# `20 apples / 4 = 5 apples`, but not an equation of variables
ARITHMETIC = re.compile(r"(?!.*(?<![A-Za-z\\])[A-Za-z](?![A-Za-z]))[^=]*\d[^=]*[^=<>](?:=[^=]+)*=\s*(?P<result>[^=]+)")
MAX_WORDS = 5  # of an answer without a number: "the answer is the red one"
JOINING = re.compile(r"\b(?:and|or)\b")
MAX_NAME = 4  # words of a response that is nothing but a name
NO_NAME = re.compile(
    r"\d|\b(?:i|i'm|we|you|because|that|this|these|what|know|sure|sorry|can|cannot|can't|don't|not)\b", re.IGNORECASE
)
DECISION = re.compile(r"(?:yes|no|true|false)[,.;:][^\d]*", re.IGNORECASE)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def final_answer(response: str) -> str | None:
    r"""Return the answer that a response gives, as it is written there; None if it gives none.

    Thoughts are no part of it. Of a response that was cut off, only an answer that is marked and complete counts: a
    number at the end may lack digits, and the last number so far may be a step on the way.

    >>> final_answer(r"Half of 84 is \boxed{42}."), final_answer("Total: 42"), final_answer('{"answer": 42}')
    ('42', '42', '42')
    >>> final_answer(VisibleText("That is 5 + 4", is_cut=True)), final_answer(VisibleText("#### 9\nNow", is_cut=True))
    (None, '9')
    """
    visible = visible_text(response)
    text = CALCULATOR.sub("", visible)
    finders = CUT_FINDERS if visible.is_cut else FINDERS
    answer = next((found for find in finders if (found := find(text))), None)
    if answer is None:
        return None
    head = CONTRAST.sub("", answer)
    return head if head != answer and parse_quantity(head) else answer


def _tagged(text: str) -> str | None:
    """Return what is in the last `<answer>` element: its own final answer, or all of it."""
    match = next(reversed(list(TAGGED.finditer(text))), None)
    return (final_answer(VisibleText(match["answer"])) or strip_markup(match["answer"])) if match else None


def _after_marker(text: str) -> str | None:
    """Return what follows `####`: a number, or the last line. Other lines with this marker are headings."""
    for match in reversed(list(MARKER.finditer(text))):
        number = parse_quantity(strip_markup(match["answer"][:MAX_LENGTH]))
        if match.end() == len(text) or (number and number.unit == NO_UNIT):
            return strip_markup(match["answer"])
    return None


def _before_a_line_end(text: str) -> str | None:
    """Return what follows `####` in a response that was cut off behind that line."""
    return _after_marker(text[: text.rfind("\n") + 1])


def _last_boxed(text: str) -> str | None:
    """Return the content of the last box whose braces are balanced, with those that it is listed with."""
    end = len(text)
    found = list[str]()
    for start in reversed(list(BOXED.finditer(text))):
        close = _closing_brace(text, start.end())
        if close is None:
            continue
        if found and not BETWEEN_BOXES.fullmatch(text, close + 1, end):
            break
        found.append(strip_markup(text[start.end() : close]))
        end = start.start()
    return ", ".join(reversed([each for each in found if each])) or None


def _bare_box(text: str) -> str | None:
    r"""Return what follows `\boxed` without braces."""
    match = next(reversed(list(BARE_BOX.finditer(text))), None)
    return strip_markup(match["answer"]) if match else None


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for index in range(start, min(len(text), start + MAX_LENGTH)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None


def _member(text: str) -> str | None:
    """Return the value of the last JSON member that is called `answer`."""
    for match in reversed(list(MEMBER.finditer(text))):
        try:
            value = json.loads(match["value"], parse_float=str, parse_int=str)
        except ValueError:
            continue
        if value is not None:
            return strip_markup(", ".join(map(str, value)) if isinstance(value, list) else str(value)) or None
    return None


def _stated(text: str) -> str | None:
    """Return the last text that follows "the answer is", if it is short or has a number."""
    for match in reversed(list(STATED.finditer(text))):
        answer = _statement(text[match.end() : match.end() + MAX_LENGTH])
        if sides := ARITHMETIC.fullmatch(answer):
            answer = strip_markup(sides["result"])
        if answer and (re.search(r"[\d\\]", answer) or len(answer.split()) <= MAX_WORDS):
            return answer
    choice = next(reversed(list(CHOSEN.finditer(text))), None)
    return choice["choice"] if choice else None


def _ended_statement(text: str) -> str | None:
    """Return what follows "the answer is" in a response that was cut off behind that sentence."""
    ends = [match.end() for match in re.finditer(r"[.!]\s|\n", text)]
    return _stated(text[: ends[-1]]) if ends else None


def _statement(rest: str) -> str:
    formula = FORMULA.match(rest)
    if formula and MORE_FORMULAS.match(rest, formula.end()):
        return strip_markup(FORMULA.sub(_inside, EXPLANATION.sub("", rest)))
    return strip_markup(_inside(formula) if formula else EXPLANATION.sub("", rest))


def _whole_response(text: str) -> str | None:
    """Return a response that is nothing but an answer, perhaps behind a label: `Total: 42`."""
    text = text.strip()
    if not text or "\n" in text or len(text) > MAX_LENGTH:
        return None
    bare = _without_label(strip_markup(text))
    words = len(WORD.findall(JOINING.sub(" ", bare)))
    is_sentence = words and len(NUMBER.findall(bare)) > 1 and not parse_quantity(bare)
    if is_sentence or ARITHMETIC.fullmatch(bare) or bare.endswith("?"):
        return None
    is_name = (words <= MAX_NAME and not NO_NAME.search(bare)) or DECISION.fullmatch(bare)
    quantity = parse_quantity(bare)
    return bare if bare and (words <= 1 or is_name or (quantity and not quantity.unit.words)) else None


def _without_label(text: str) -> str:
    bare = text
    while connective := CONNECTIVE.match(bare):
        bare = bare[connective.end() :].rstrip("!")
    label = LABEL.match(bare)
    return strip_markup(bare[label.end() :]) if label else bare


def _labelled_line(text: str) -> str | None:
    """Return what follows a label such as `Result:` in the last line."""
    line = strip_markup(text.strip().rpartition("\n")[2][:MAX_LENGTH])
    label = RESULT.match(line)
    answer = strip_markup(line[label.end() :]) if label else ""
    short = len(answer.split()) <= MAX_WORDS and not re.search(r"\d", answer)
    return answer if answer and (short or parse_quantity(answer)) else None


def _last_value(text: str) -> str | None:
    """Return the last number that is not denied, as in `not 15`, or the formula that contains it."""
    denied = {match.end() for match in DENIED.finditer(text)}
    numbers = [number for number in NUMBER.finditer(text) if number.start() not in denied]
    formulas = list(FORMULA.finditer(text))
    if not numbers:
        return None
    if formulas and formulas[-1].start() <= numbers[-1].start() < formulas[-1].end():
        return strip_markup(_inside(formulas[-1]))
    return numbers[-1].group()


FINDERS: Sequence[Callable[[str], str | None]] = (
    _tagged,
    _after_marker,
    _last_boxed,
    _bare_box,
    _member,
    _stated,
    _whole_response,
    _labelled_line,
    _last_value,
)
CUT_FINDERS: Sequence[Callable[[str], str | None]] = (_tagged, _before_a_line_end, _last_boxed, _ended_statement)


def _inside(formula: re.Match[str]) -> str:
    return formula[formula.lastgroup or 0]


def strip_markup(text: str) -> str:
    """Return an answer without the Markdown, punctuation, dollar signs and box around it."""
    text = text.strip().strip("*`").rstrip(".,;: ").strip()
    formula = FORMULA.fullmatch(text)
    text = _inside(formula).strip() if formula else text
    if (box := BOXED.match(text)) and text.endswith("}"):
        text = text[box.end() : -1].strip()
    return text
