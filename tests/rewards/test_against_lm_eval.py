"""Verifiers against the published checker in lm-evaluation-harness, on modified real texts."""

import gzip
import json
import re
from pathlib import Path
from random import Random

import langdetect
import pytest

from align.errors import InputError
from align.rewards.verifiers import language
from align.rewards.verifiers.instructions import VERIFIERS, follows

TEXTS = Path(__file__).parents[2] / ".." / "shared" / "data" / "ultrafeedback_pairs" / "train_clean.jsonl.gz"
PER_KIND = 150
RELATIONS = ("less than", "at least")

CHANGES = [  # what is done to a real response, so that verdicts differ
    str.upper,
    str.lower,
    lambda text: text.replace(",", ""),
    lambda text: "\n".join("* " + line for line in text.split("\n")),
    lambda text: "\n".join("- " + line for line in text.split("\n")[:4]),
    lambda text: "\n".join(f"**{line}**" for line in text.split("\n")),
    lambda text: text.replace("\n\n", "\n***\n"),
    lambda text: "\n\n".join(text.split("\n")),
    lambda text: "***" + text[:90] + " ***\n***",
    lambda text: f'"{text}"',
    lambda text: f'Sure!\n"{text}"\nBye',
    lambda text: json.dumps({"a": text}),
    lambda text: f"```json\n{json.dumps([text])}\n```",
    lambda text: f"Here you are:\n```JSON\n{json.dumps(text)}```",
    lambda text: f"<<{text[:20]}>>\n{text}",
    lambda text: f"{text[:50]}******{text[50:90]}",
    lambda text: f"{text[:50]}\n******\n{text[:50]}",
    lambda text: text + "\n\nP.S. bye",
    lambda text: text + "\n*P.* P. S bye",
    lambda text: "\n".join(f"Section {place} {line}" for place, line in enumerate(text.split("\n"))),
    lambda text: text[:40] + " [name] [] [a\nb] *hi* ***both*** " + text[40:],
    lambda text: text[:80] + " My answer is no. " + text[80:120],
    lambda text: "My **answer** is maybe.\n" + text[:20],
    lambda text: text[:60] + " Dr. U.S. CANNOT... e.g. 3. Next?! " + text[60:],
    lambda text: "Das ist ein deutscher Satz, und er ist lang genug.",
    lambda text: "यह हिन्दी में है। मौसम अच्छा है।",
    lambda text: "12345 !!! ***",
    lambda text: " \n" + text[:30] + "\n ",
    lambda text: "",
]


def settings_of(kind, text, rng):
    """Return settings close to the values of the text, so that both verdicts occur."""
    words = re.findall(r"[a-zA-Z]+", text) or ["moon"]
    paragraphs = text.split("\n\n")

    def near(pattern, flags=0):
        return max(0, len(re.findall(pattern, text, flags)) + rng.choice((-1, 0, 0, 1)))

    word, letter, relation = rng.choice(words), rng.choice("aetoinAETOIN"), rng.choice(RELATIONS)
    place = rng.randrange(len(paragraphs))
    number = max(place + 1, len([each for each in paragraphs if each.strip()]))
    first = re.split(r"[.,?!'\"]", (paragraphs[place].split() or ["x"])[0])[0]
    return {
        "capital_word_frequency": {"capital_frequency": near(r"\b[A-Z]+\b"), "capital_relation": relation},
        "repeat_prompt": {
            "prompt_to_repeat": rng.choice((text[:20].strip() or "x", text[1:20] or "y", text[:9].upper() or "z"))
        },
        "number_placeholders": {"num_placeholders": near(r"\[.*?\]")},
        "postscript": {"postscript_marker": rng.choice(("P.S.", "P.P.S", "Note:", " P.S. ", "P.P.S."))},
        "multiple_sections": {
            "section_spliter": rng.choice(("Section", "SECTION")),
            "num_sections": near(r"Section \d"),
        },
        "number_bullet_lists": {"num_bullets": near(r"^\s*[*-]", re.MULTILINE)},
        "number_highlighted_sections": {"num_highlights": near(r"\*[^\n*]+\*")},
        "existence": {"keywords": [word[:4], rng.choice(words), rng.choice(("e", "a.e", "zebra"))]},
        "forbidden_words": {"forbidden_words": [word[:4], rng.choice(("zebra", "e."))]},
        "frequency": {"keyword": word[:3], "frequency": near(word[:3], re.IGNORECASE), "relation": relation},
        "letter_frequency": {"letter": letter, "let_frequency": near(letter, re.IGNORECASE), "let_relation": relation},
        "response_language": {"language": rng.choice(("en", "en", "de", "hi"))},
        "nth_paragraph_first_word": {"num_paragraphs": number, "nth_paragraph": place + 1, "first_word": first},
        "number_paragraphs": {"num_paragraphs": near(r"\*\*\*") + 1},
        "number_sentences": {"num_sentences": near(r"[.!?]\s") + rng.choice((0, 1)), "relation": relation},
        "number_words": {"num_words": near(r"\w+"), "relation": relation},
        "end_checker": {"end_phrase": rng.choice((text[-9:], text[-9:].upper(), "Anything else?"))},
    }.get(kind, {})


@pytest.mark.slow
@pytest.mark.skipif(not TEXTS.is_file(), reason=f"the published data set is not at {TEXTS}")
@pytest.mark.parametrize("name", VERIFIERS)
def test_the_published_checker_gives_the_same_verdicts(name, monkeypatch):
    try:
        language.count_sentences("One.")  # lets NLTK find its model before the harness would download it
    except InputError as absent:
        pytest.skip(str(absent))
    published = pytest.importorskip("lm_eval.tasks.ifeval.utils", reason="lm-eval[ifeval] is not installed")
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", 0)  # the checker leaves it to chance
    kind, rng = name.split(":")[1], Random(name)
    rows = [json.loads(line) for line in gzip.decompress(TEXTS.read_bytes()).decode().splitlines()]
    texts = [text for row in rows for text in (row["chosen"], row["rejected"])]
    followed, changed = {True: 0, False: 0}, 0
    for _ in range(PER_KIND):
        text = rng.choice(texts)[: rng.choice((60, 300, 2000))]
        for change in rng.sample(CHANGES, rng.choice((0, 1, 1, 2))):
            text = change(text)
        settings = settings_of(kind, text, rng)
        if not all(value for value in settings.values()):
            continue  # the harness puts a value of chance in the place of 0
        row = {"instruction_id_list": [name], "kwargs": [settings]}
        asked = published.InputExample(key=0, prompt="", **row)
        strict = published.test_instruction_following_strict(asked, text).follow_instruction_list
        loose = published.test_instruction_following_loose(asked, text).follow_instruction_list
        assert follows(row, text) == strict, (settings, text)
        assert follows(row, text, loose=True) == loose, (settings, text)
        followed[strict[0]] += 1
        changed += strict != loose
    print(f"{name}: {followed[True]} followed, {followed[False]} not, {changed} loosely only")
    assert min(followed.values()) > 0
