"""Language, sentences and words of a text, as the published verifiers find them.

NLTK counts, as in the published code, so that the same NLTK gives the same verdicts. Its versions differ slightly: from
3.10 on, sentences may end in curly quotation marks, and combining marks and characters like `½` are split differently.
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
# A package on PyPI that contains NLTK's data, for machines that cannot run `nltk.download`. The project contains no
# copy, because the publishers of the data state no licence (nltk/nltk_data, issue 188).
DATA_PACKAGE, DATA_FOLDER = "llama-index-core", "llama_index/core/_static/nltk_cache"


def detected_language(text: str) -> str | None:
    """Return the ISO code of the language (`zh-cn` or `zh-tw` for Chinese); None if langdetect finds none.

    The result is the same in every run. Source: langdetect, as in the published code.
    """
    detector = _factory().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


def known_languages() -> list[str]:
    """Return the codes that `detected_language` can return."""
    return sorted(_factory().get_lang_list())


def count_sentences(text: str) -> int:
    """Return the number of sentences by NLTK's English Punkt model."""
    return len(_punkt().tokenize(text))


def count_words(text: str) -> int:
    r"""Return the number of runs of letters, digits and underscores (`\w+`)."""
    from nltk.tokenize.regexp import RegexpTokenizer  # noqa: PLC0415 - as above

    return len(RegexpTokenizer(r"\w+").tokenize(text))


def word_tokens(text: str) -> list[str]:
    """Return the result of `nltk.word_tokenize`: Punkt's sentences, split as in the Penn Treebank."""
    from nltk.tokenize.destructive import NLTKWordTokenizer  # noqa: PLC0415 - as above

    tokenizer = NLTKWordTokenizer()
    return [token for sentence in _punkt().tokenize(text) for token in tokenizer.tokenize(sentence)]


@cache
def _factory() -> DetectorFactory:
    """Return a langdetect factory with a fixed seed; langdetect's own one is left alone, as other code may use it."""
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)  # langdetect is random, and on short texts its results can differ between runs
    return factory


@cache
def _punkt() -> PunktSentenceTokenizer:
    """Load the Punkt model from NLTK's data folders, or from `DATA_PACKAGE`."""
    from nltk.data import find  # noqa: PLC0415 - as above
    from nltk.tokenize.punkt import PunktSentenceTokenizer, load_punkt_params  # noqa: PLC0415

    try:
        found = find(PUNKT)
    except LookupError:
        found = _find_in_package()
    return PunktSentenceTokenizer(load_punkt_params(found))


def _find_in_package() -> PathPointer:
    from nltk.data import find  # noqa: PLC0415 - as above
    from nltk.data import path as folders  # noqa: PLC0415

    try:
        folders.append(str(distribution(DATA_PACKAGE).locate_file(DATA_FOLDER)))  # NLTK reads its folders only
        return find(PUNKT)
    except (PackageNotFoundError, LookupError) as error:
        raise InputError(
            "NLTK's punkt_tab, which counts sentences, is not installed: "
            f"pip install {DATA_PACKAGE}, or python -m nltk.downloader punkt_tab"
        ) from error
