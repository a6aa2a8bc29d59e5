"""Parsers of a teacher's answers: pure functions of the text, which never invent anything and count every drop.

`PARSERS` is the version of all of them. A step parses its stored answers again when it changes, and asks nothing.
"""

PARSERS = 2
