"""User turns that a teacher writes, and the politeness that is removed from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from align.rewards.verifiers.refusals import is_refusal
from align.synth.parsing.lists import CUT, DUPLICATE, EMPTY, REFUSED, same

# Reasons why a turn is dropped
AS_ASSISTANT, ONLY_POLITE = "speaks as the assistant", "only polite"


def _pattern(*parts: str) -> re.Pattern[str]:
    return re.compile("".join(parts).replace("'", "['’]"), re.IGNORECASE)


OPEN, CLOSE = r"[*_\[<#]{0,3}", r"[*_\]>]{0,3}"  # marks around a label
USER_LABEL = _pattern(rf"^\s*{OPEN}(?:user|human|me|follow-?up(?: question)?)\s*\d*{CLOSE}\s*:[*_]{{0,2}}\s*")
ASSISTANT_LABEL = rf"{OPEN}(?:assistant|ai|bot|model|system|answer){CLOSE}\s*:"
NEXT_SPEAKER = _pattern(rf"\n\s*{ASSISTANT_LABEL}")
ASSISTANT_START = _pattern(
    rf"^\s*{ASSISTANT_LABEL}|^(?:as an ai|how (?:can|may) i (?:help|assist)|i'm here to help|",
    r"is there anything else (?:i|you)|",
    r"(?:sure|certainly|of course|absolutely)[,!.]? (?:here|i'd be|i'll|i can|let me)|",
    r"here(?:'s| is| are) (?:a|an|the|some|your)|i'd be (?:happy|glad) to|you're welcome|feel free to|let me know if)",
)
PRAISE = (
    "great|helpful|interesting|amazing|perfect|wonderful|awesome|fantastic|clear|good|excellent|fascinating|"
    "insightful|useful|brilliant|nice"
)
REST = r"\b[^,;:?]*"  # of a sentence that asks nothing
POLITE = _pattern(
    r"^(?:(?:oh|wow|ah|okay|ok|yes|yeah|well|and|so|but)[,!.]?\s+)*(?:",
    r"thank(?:s| you)\b[^?]*|many thanks\b[^?]*|i (?:really )?appreciate\b[^?]*|much appreciated\b.*|",
    rf"(?:that(?:'s| is| was)|this is|it(?:'s| is)) (?:(?!not\b)\w+ )?(?:{PRAISE}){REST}|",
    rf"(?:{PRAISE})(?: (?:answer|explanation|point|response|job|work|stuff|summary))?|",
    rf"sure(?:,? i'd (?:love|be happy|be glad) to{REST})?|i'd (?:love|be happy|be glad) to{REST}|",
    rf"(?:i'm|i am) (?:so |very )?(?:glad|happy|grateful){REST}|",
    r"i (?:completely |totally |fully )?(?:agree|see|understand)|",
    r"got it|makes sense|that makes (?:\w+ )?sense|of course|absolutely|certainly|definitely|indeed|",
    r"sounds (?:good|great)|wow)$",
)
SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?]+[\"'”’)]*|\n|$)\s*")
POLITE_CLAUSE = _pattern(  # before a comma or dash
    r"^(?:thanks(?: a lot| so much)?|thank you(?: so much| very much)?|great|perfect|interesting|sure|okay|got it)",
    r"(?:,|\s[-–—])\s+",
)


def _is_polite(sentence: str) -> bool:
    """Return whether a sentence only thanks, praises or agrees; a question does not."""
    return POLITE.match(sentence.strip().rstrip(".!\"'”’) ")) is not None


class Turn(NamedTuple):
    """A user's turn, or why there is none."""

    text: str
    reason: str = ""  # empty if the turn is kept
    was_polite: bool = False  # whether politeness was removed


def without_politeness(text: str) -> str:
    """Return a user's turn without the sentences that only thank, praise or agree; unchanged where nothing remains.

    >>> without_politeness("Thank you so much! That's great. How hot is it?"), without_politeness("Thanks!")
    ('How hot is it?', 'Thanks!')
    """
    rest = "".join(part for part in SENTENCE.findall(text) if not _is_polite(part)).strip()
    clause = POLITE_CLAUSE.match(rest)
    if clause and rest[clause.end() :].strip():
        rest = rest[clause.end() :]
    return rest or text.strip()


def user_turn(text: str, earlier: Sequence[str] = (), *, is_cut: bool = False) -> Turn:
    """Return the turn of a user that a teacher wrote; `earlier` are the user's turns so far.

    A label and quotes around the turn are removed, and what another speaker says after it. It is dropped where it is
    empty, cut, a refusal, an assistant's words, nothing but polite, or a repetition.
    """
    if ASSISTANT_START.match(text.strip()):
        return Turn("", AS_ASSISTANT)
    own = NEXT_SPEAKER.split(text, maxsplit=1)[0]
    was_cut = is_cut and own == text
    own = USER_LABEL.sub("", own).strip()
    if len(own) > 1 and own[0] in "\"“'" and own[-1] in "\"”'" and own[0] not in own[1:-1]:
        own = own[1:-1].strip()
    turn = without_politeness(own)
    if not same(turn):
        return Turn("", EMPTY)
    if was_cut:
        return Turn("", CUT)
    if ASSISTANT_START.match(turn):
        return Turn("", AS_ASSISTANT)
    if is_refusal(turn):
        return Turn("", REFUSED)
    if all(_is_polite(part) for part in SENTENCE.findall(turn) if part.strip()):
        return Turn("", ONLY_POLITE)
    if same(turn) in {same(each) for each in earlier}:
        return Turn("", DUPLICATE)
    return Turn(turn, was_polite=turn != own)
