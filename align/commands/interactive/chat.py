"""`align chat`: talk to a policy in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from pydantic import Field

from align.config import Settings, build, read_overrides
from align.errors import InputError, noting_interrupts
from align.inference.engines import load_engine
from align.inference.managed.engine import ManagedEngine
from align.inference.samples import TOO_LONG, Engine
from align.inference.settings import EngineSettings, SamplingSettings
from align.models.loading.pretrained import silence_transformers
from align.records import Message, Prompt
from align.stages.inputs.opening import open_model

RESET, QUIT = "/reset", ("/exit", "/quit")
PROMPT = "> "


class ChatSettings(Settings):
    """Settings of the command, as `key.sub=value`."""

    sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.7, top_p=0.95, max_new_tokens=256), description="How replies are drawn."
    )
    engine: EngineSettings = Field(default=EngineSettings(), description="What runs the policy.")


def chat_settings(overrides: Sequence[str]) -> ChatSettings:
    """Return the settings that a command line gives."""
    found = build(ChatSettings, read_overrides(overrides, ChatSettings().model_dump(mode="json")))
    if found.sampling.num_responses != 1:
        raise InputError("a message gets one reply", ("sampling", "num_responses"))
    return found


def chat(policy: str, system: str | None, settings: ChatSettings) -> None:
    """Answer the lines of the standard input until it ends; every reply sees the dialogue so far."""
    if Path(policy).is_dir():
        open_model(policy)
    silence_transformers()
    with noting_interrupts("the dialogue is not kept"):
        engine = load_engine(policy, settings.engine)
        with engine if isinstance(engine, ManagedEngine) else nullcontext():
            _talk(engine, policy, system, settings.sampling)


def _talk(engine: Engine, policy: str, system: str | None, sampling: SamplingSettings) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{policy}: {RESET} starts a new dialogue, {QUIT[0]} or Ctrl-D ends")
    start = [Message("system", system)] if system is not None else []
    dialogue = list(start)
    for line in _lines(is_terminal=is_terminal):
        if line in QUIT:
            return
        if line == RESET:
            dialogue = list(start)
        elif line:
            dialogue.append(Message("user", line))
            answer = reply(engine, dialogue, sampling)
            print(answer, flush=True)
            dialogue.append(Message("assistant", answer))


def reply(engine: Engine, dialogue: Sequence[Message], sampling: SamplingSettings) -> str:
    """Return the policy's reply to a dialogue that ends with the user's message."""
    (sample,) = engine.sample([Prompt(tuple(dialogue))], sampling, finished={})
    if sample.finish == TOO_LONG:
        room = f"sampling.max_new_tokens={sampling.max_new_tokens}"
        raise InputError(f"the dialogue is too long for the model with {room}; lower it, or begin again with {RESET}")
    return sample.text


def _lines(*, is_terminal: bool) -> Iterator[str]:
    """Yield what the user writes, line by line."""
    while True:
        try:
            yield input(PROMPT if is_terminal else "").strip()
        except EOFError:
            return
