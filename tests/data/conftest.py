"""Fixtures of the data tests."""

import json

import pytest


@pytest.fixture
def lines(tmp_path):
    """A function that writes rows to a JSON-lines file and returns its path."""

    def write_rows(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows
