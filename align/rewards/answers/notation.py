r"""Write an answer in one notation: Unicode symbols as LaTeX, and LaTeX without markup that has no value.

Two forms of an answer are compared: `tidy`, which math-verify reads, and `plain`, without `\text{...}`.
"""

from __future__ import annotations

import re
import unicodedata

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
SYMBOLS = {  # in place of what Unicode's compatible forms are
    "º": "°",
    "˚": "°",
    "″": '"',
    "”": '"',
    "“": '"',
    "′": "'",
    "’": "'",
    "‘": "'",
    "−": "-",
    "‐": "-",
    "‑": "-",
    "–": "-",
    "—": "-",
    "×": r"\times ",
    "⋅": r"\cdot ",
    "·": r"\cdot ",
    "÷": "/",
    "⁄": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "±": r"\pm ",
    "→": r"\to ",
    "∠": r"\angle ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "φ": r"\phi ",
    "。": ".",
    "，": ", ",
    "、": ", ",
}
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}


def _vulgar_fraction(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match[2]).replace("⁄", "/")
    return f"{match[1]} {fraction}" if match[1] else fraction


def _root(match: re.Match[str]) -> str:
    return f"{ROOTS[match[1]]}{{{match[2] or match[3]}}}"


def _power(match: re.Match[str]) -> str:
    return "^{" + match[1].translate(SUPERSCRIPTS) + "}"


def _subscript(match: re.Match[str]) -> str:
    return "_{" + match[1].translate(SUBSCRIPTS) + "}"


UNICODE = (  # pattern, replacement
    (re.compile(r"(?<=\d)\s*[–—]\s*(?=\d)"), " to "),
    (re.compile(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)"), _power),
    (re.compile(r"([₀₁₂₃₄₅₆₇₈₉]+)"), _subscript),
    (re.compile(r"(\d?)\s*([¼-¾⅐-⅞])"), _vulgar_fraction),
    (re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[^\W\d_]))"), _root),
)
LATEX = (
    (re.compile(r"\\begin\s*\{([pbBvV]?matrix|array)\}"), r"\\begin{\1}"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\{,\}(?=\d)|(?<=\d)\\[,!;: ](?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<!\\)\\([$%&#_])"), r"\1"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z])|°)|\\(?:degree|textdegree)(?![A-Za-z])"), "°"),
    (re.compile(r"\\leq(?![A-Za-z])|\\leqslant(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\geq(?![A-Za-z])|\\geqslant(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\ne(?![A-Za-z])|!=|\\not\s*="), r"\\neq "),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<!\\)\\(?:[,;: !]|qquad|quad)|~"), " "),
)
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
FUNCTIONS = r"arccos|arcsin|arctan|cosh?|cot|csc|exp|gcd|lcm|lim|ln|log|max|min|mod|sec|sinh?|tanh?"
WORD_SYMBOLS = (
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(rf"(?<![\\A-Za-z])({FUNCTIONS})(?=\s*[\\(\d^]|\s[a-z]\b)"), r"\\\1 "),
)
OPERATORS = re.compile(r"\s*(\\(?:times|cdot|le|ge|neq|pm|cup|cap|in|to)(?![A-Za-z])|[-+*/=<>(){}\[\]|^_])\s*")


def tidy(text: str) -> str:
    r"""Return an answer with Unicode symbols as LaTeX, in one spelling; `\text{...}` stays.

    >>> tidy("x² ≤ √2"), tidy("1½"), tidy(r"1{,}234\,567")
    ('x^{2} \\le \\sqrt{2}', '1 1/2', '1,234,567')
    """
    for pattern, replacement in UNICODE:
        text = pattern.sub(replacement, text)
    text = "".join(SYMBOLS.get(letter, letter) for letter in text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in (*LATEX, *WORD_SYMBOLS):
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def plain(tidied: str) -> str:
    r"""Return a tidy answer without `\text{...}` around its words.

    >>> plain(r"25\text{ cm}^2")
    '25 cm^2'
    """
    while (unwrapped := TEXT.sub(r"\1", tidied)) != tidied:
        tidied = unwrapped
    return " ".join(tidied.replace("~", " ").split())


def squeezed(text: str) -> str:
    """Return a text without the spaces beside operators and braces, and without braces around one character.

    >>> squeezed("p - q"), squeezed("x^{2}")
    ('p-q', 'x^2')
    """
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", OPERATORS.sub(r"\1", text))
