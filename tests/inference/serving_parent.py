"""A program that starts a managed server, asks it and stops it, over and over, until it is killed."""

import sys
import threading
from pathlib import Path

from align.inference.managed.kinds import ServedModel
from align.inference.managed.server import ManagedServer
from align.inference.managed.settings import VllmSettings
from align.inference.openai_engine import OpenAIEngine
from align.inference.settings import SamplingSettings, ServerSettings
from align.records import Message, Prompt


def main(command, model, log, mark):
    print("started", flush=True)
    while True:
        settings = VllmSettings(command=command, env={"STUB_MARK": mark})
        server = ManagedServer(settings, ServedModel(model, "m"), Path(log))
        url = server.start()
        asked = OpenAIEngine("m", ServerSettings(base_url=url, models={"m": server.name}), name="m")
        list(asked.sample([Prompt((Message("user", "q"),))], SamplingSettings(num_responses=8)))
        server.stop()
        assert threading.active_count() < 100


if __name__ == "__main__":
    main(*sys.argv[1:])
