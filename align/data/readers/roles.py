"""Names of a message's role in datasets."""

from __future__ import annotations

from align.data.readers.cells import shortened
from align.errors import InputError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}


def role_of(name: str) -> str:
    """Return the role that a dataset calls `name`.

    >>> role_of("GPT")
    'assistant'
    """
    if name.lower() not in ROLES:
        raise InputError(f"unknown role {shortened(name)}; known roles are: {', '.join(ROLES)}")
    return ROLES[name.lower()]
