"""A program that behaves like `vllm serve`, for tests: it starts as it does, answers as it does, and fails on demand.

Its answers depend on the served folder's weights, the messages and the seed only, its scores of sequences on weights
and tokens. A child in a session of its own stands for the workers of a real engine. The environment variable STUB_FAULT
names what goes wrong. The server of the policy that STUB_HOLD names answers HELD_AFTER requests and no more, so that a
test can kill who asks it.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

from json_handler import JsonHandler

FAULTS = {
    "": "nothing",
    "slow": "it answers only after a while",
    "crash": "it ends before it is ready",
    "wrong name": "it offers another model",
    "hang": "it accepts connections and answers none",
    "crash later": "it ends after STUB_ANSWERS answers",
    "stubborn": "it ignores SIGTERM",
}
VERSION = "0.33.0"
HELD_AFTER = 12


def arguments(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--version", action="version", version=VERSION)
    serve = parser.add_subparsers(required=True).add_parser("serve")
    serve.add_argument("model")
    serve.add_argument("--host", required=True)
    serve.add_argument("--port", type=int, required=True)
    serve.add_argument("--served-model-name", required=True)
    serve.add_argument("--tensor-parallel-size", type=int, default=1)
    serve.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    serve.add_argument("--generation-config", choices=["auto", "vllm"], default="auto")
    serve.add_argument("--max-model-len", type=int, default=10**6)
    serve.add_argument("--runner", choices=["auto", "pooling"], default="auto")
    serve.add_argument("--pooler-config", type=json.loads)
    serve.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    serve.add_argument("--tokenizer")
    serve.add_argument("--enable-lora", action="store_true")
    serve.add_argument("--max-lora-rank", type=int)
    serve.add_argument("--lora-modules", type=json.loads)
    return parser.parse_args(words)


def scores(weights, ids, num_labels):
    """Values of the labels, which depend on the weights and the tokens."""
    digest = hashlib.sha256(json.dumps([weights, ids]).encode()).digest()
    return [digest[label] / 16 - 8 for label in range(num_labels)]


class Handler(JsonHandler):
    def do_GET(self):
        if self.path == "/health":
            self.say(200, {})
        else:
            self.say(200, {"object": "list", "data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        request = self.body()
        if request["model"] not in self.server.names:
            self.say(404, {"error": f"The model `{request['model']}` does not exist."})
            return
        if self.path == "/classify":
            self.classify(request)
            return
        said = json.dumps([self.server.weights, request["messages"], request["seed"]])
        text = f"{len(said) % 7} is the answer {hashlib.sha256(said.encode()).hexdigest()[:12]}"
        if "[[A]]" in request["messages"][-1]["content"]:  # asked as a judge
            text = "Both are the same. [[C]]"
        elif "[[5]]" in request["messages"][-1]["content"]:
            text = f"[[{int(hashlib.sha256(said.encode()).hexdigest()[:4], 16) % 10 + 1}]]"
        self.count()
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        self.say(200, {"choices": [choice], "usage": usage})

    def classify(self, request):
        if self.server.num_labels is None:
            self.say(404, {"error": "The model does not support Classification API"})
            return
        if max(map(len, request["input"])) > self.server.max_length:
            error = f"This model's maximum context length is {self.server.max_length} tokens."
            self.say(400, {"error": {"message": error}})
            return
        self.count()
        found = [scores(self.server.weights, ids, self.server.num_labels) for ids in request["input"]]
        if request.get("use_activation", True):
            found = [[1 / (1 + math.exp(-value)) for value in values] for values in found]
        data = [{"index": at, "label": None, "probs": values} for at, values in enumerate(found)]
        self.say(200, {"object": "list", "data": data})

    def count(self):
        """Count an answer, and fail after the last."""
        with self.server.lock:
            self.server.answers += 1
            if self.server.is_held and self.server.answers > HELD_AFTER:
                time.sleep(600)
            if self.server.answers > self.server.most_answers:
                print("torch.AcceleratorError: CUDA error: an illegal memory access", flush=True)
                os._exit(5)


def main(words):
    fault = os.environ.get("STUB_FAULT", "")
    assert fault in FAULTS, fault
    given = arguments(words)
    print(f"INFO vLLM API server version {VERSION}", flush=True)
    if given.model.startswith("/") and not (Path(given.model) / "config.json").is_file():
        sys.exit(f"OSError: {given.model} has no config.json")
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    if fault == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if fault == "slow":
        time.sleep(1.5)
    if fault == "crash":
        print("Traceback (most recent call last):\nValueError: \x1b[31mno room for the KV cache\x1b[0m", flush=True)
        os._exit(3)
    if fault == "hang":
        with socket.create_server((given.host, given.port)):
            time.sleep(600)
    server = ThreadingHTTPServer((given.host, given.port), Handler)
    server.daemon_threads, server.lock, server.answers = True, threading.Lock(), 0
    server.most_answers = int(os.environ["STUB_ANSWERS"]) if fault == "crash later" else sys.maxsize
    server.is_held = given.served_model_name.startswith(f"{os.environ.get('STUB_HOLD', 'nobody')}-")
    adapters = [given.lora_modules["name"]] if given.lora_modules else []
    server.names = ["other"] if fault == "wrong name" else [given.served_model_name, *adapters]
    folders = [given.model, *([given.lora_modules["path"]] if given.lora_modules else [])]
    files = [path for folder in folders if Path(folder).is_dir() for path in sorted(Path(folder).glob("*.safetensors"))]
    server.weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    is_classifier = given.runner == "pooling" and given.pooler_config == {"use_activation": False}
    config = json.loads((Path(given.model) / "config.json").read_text()) if is_classifier else {}
    server.num_labels, server.max_length = len(config["id2label"]) if is_classifier else None, given.max_model_len
    server.serve_forever(poll_interval=0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
