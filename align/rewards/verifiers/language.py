"""What the published verifiers ask of a text's language: which one it is, its sentences, its words.

NLTK counts, as in the published code, so that the same NLTK gives the same verdicts. Its versions differ a little: from
3.10 on, sentences may end in curly quotation marks, and combining marks and characters like `½` are read otherwise.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING

from langdetect import DetectorFactory, LangDetectException
from langdetect.detector_factory import PROFILES_DIRECTORY

from align.errors import InputError

if TYPE_CHECKING:  # nltk imports scikit-learn, which takes over a second
    from nltk.data import PathPointer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

PUNKT = "tokenizers/punkt_tab/english/"
# A package of the registry that carries NLTK's data, for machines that cannot run `nltk.download`. The project does not
# carry a copy: those who publish the data do not say under which licence (nltk/nltk_data, issue 188).
CARRIER, CARRIED = "llama-index-core", "llama_index/core/_static/nltk_cache"


def detected_language(text: str) -> str | None:
    """The ISO code that langdetect gives (`zh-cn` and `zh-tw` for Chinese), the same each time; None where it fails."""
    detector = _languages().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


def known_languages() -> list[str]:
    """The codes that `detected_language` can give."""
    return sorted(_languages().get_lang_list())


def count_sentences(text: str) -> int:
    """Sentences by NLTK's English Punkt model."""
    return len(_punkt().tokenize(text))


def count_words(text: str) -> int:
    r"""Runs of letters, digits and underscores (`\w+`)."""
    from nltk.tokenize.regexp import RegexpTokenizer  # noqa: PLC0415 - as above

    return len(RegexpTokenizer(r"\w+").tokenize(text))


def word_tokens(text: str) -> list[str]:
    """What `nltk.word_tokenize` gives: sentences by Punkt, then words and punctuation as in the Penn Treebank."""
    from nltk.tokenize.destructive import NLTKWordTokenizer  # noqa: PLC0415 - as above

    tokenizer = NLTKWordTokenizer()
    return [token for sentence in _punkt().tokenize(text) for token in tokenizer.tokenize(sentence)]


@cache
def _languages() -> DetectorFactory:
    """Our own factory: a seed in the package's would bind everyone who uses langdetect in this process."""
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)  # langdetect draws at random, and an unseeded verdict on a short text can change between runs
    return factory


@cache
def _punkt() -> PunktSentenceTokenizer:
    """The model from NLTK's own data folders, or else from the package that carries it."""
    from nltk.data import find  # noqa: PLC0415 - as above
    from nltk.tokenize.punkt import PunktSentenceTokenizer, load_punkt_params  # noqa: PLC0415

    try:
        found = find(PUNKT)
    except LookupError:
        found = _carried_punkt()
    return PunktSentenceTokenizer(load_punkt_params(found))


def _carried_punkt() -> PathPointer:
    from nltk.data import find  # noqa: PLC0415 - as above
    from nltk.data import path as folders  # noqa: PLC0415

    try:
        folders.append(str(distribution(CARRIER).locate_file(CARRIED)))  # NLTK opens no file outside of its folders
        return find(PUNKT)
    except (PackageNotFoundError, LookupError) as error:
        raise InputError(
            "sentences are counted with NLTK's punkt_tab, which is not installed: "
            f"pip install {CARRIER} (no other step), or python -m nltk.downloader punkt_tab"
        ) from error
