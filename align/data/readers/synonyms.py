"""Columns with the same meaning. If a user names one of them, a row's own columns do not compete with it."""

from __future__ import annotations

from collections.abc import Collection

REQUEST = frozenset({"prompt", "instruction", "question", "query", "problem", "user_input", "raw_text", "text"})
REPLY = frozenset(
    {"completion", "response", "output", "answer", "solution", "code", "generation", "generated_solution"}
)
BETTER = frozenset({"chosen", "chosen_response", "chosen_messages", "completion_a"})
WORSE = frozenset({"rejected", "rejected_response", "rejected_messages", "completion_b"})
GROUP = frozenset({"responses", "completions", "inferences", "answers", "generations", "responses_and_scores"})
DIALOGUE = frozenset({"messages", "conversations", "conversation", "conversation_json"})
ESSENTIAL = REQUEST | BETTER | WORSE | GROUP | DIALOGUE  # where named, every row needs them
# Meaning of a named column -> the row's own columns that are then not read; a `conversations` can be a pair's prompt
TAKES_THE_PLACE_OF = {
    REQUEST: REQUEST,
    REPLY: REPLY | WORSE | GROUP | DIALOGUE,
    BETTER: BETTER,
    WORSE: WORSE | GROUP,
    GROUP: GROUP | REPLY | WORSE,
    DIALOGUE: DIALOGUE | REPLY | WORSE | GROUP,
}


def competing(columns: Collection[str], named: Collection[str]) -> set[str]:
    """Return the columns that a reader could read in place of those that the user has named."""
    hidden = {name for meaning, others in TAKES_THE_PLACE_OF.items() if meaning.intersection(named) for name in others}
    return {name for name in columns if name in hidden and name not in named}
