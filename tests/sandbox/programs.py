"""Correct programs and the tests that they pass in plain Python, one file for each part of the language.

A file holds the program and then its tests, with a line `%%` in front of each test.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "programs_and_tests"


def read(path):
    """Return the program and the tests of a file."""
    program, *tests = path.read_text().split("\n%%\n")
    return program, tests


PROGRAMS = {path.stem.replace("_", " "): read(path) for path in sorted(FOLDER.glob("*.txt"))}
