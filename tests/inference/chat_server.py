"""A chat server on localhost that misbehaves as scripted."""

import hashlib
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

from json_handler import JsonHandler

SLOW_S = 3.0  # longer than the time-out that tests set


def answer_to(request):
    """The server's answer, which depends on the request only."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return f"naïve 🙂 {digest[:8]} to {request['messages'][-1]['content']}"


class ChatServer(ThreadingHTTPServer):
    """`script` lists the outcomes of the next requests, in order of arrival; later ones succeed.

    A step is ok, half, reset, slow, odd (no choices), empty, a status, and with it perhaps a Retry-After, or a function
    of the handler that says something else. `answer` returns the text and finish reason of a request that succeeds.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        script=(),
        *,
        always="ok",
        key=None,
        models=None,
        answer=lambda request: (answer_to(request), "length"),
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.always, self.key, self.models, self.answer = list(script), always, key, models, answer
        self.refuses = None  # a text whose requests get HTTP 400, as of a chat template that raises an exception
        self.requests, self.steps, self.times = [], Counter(), []
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Print nothing when a client disconnects."""


class Handler(JsonHandler):
    def do_GET(self):
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.say(401, {"error": "who are you?"})
        elif self.server.models is None:
            self.say(404, {"error": "this server lists no models"})
        else:
            self.say(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        request = self.body()
        server = self.server
        with server.lock:
            step = server.script.pop(0) if server.script else server.always
            server.requests.append(request)
            server.times.append(time.monotonic())
            server.steps[step if isinstance(step, str) or callable(step) else step[0]] += 1
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self.act(step, request)
        finally:
            with server.lock:
                server.under_way -= 1

    def act(self, step, request):
        text, finish = self.server.answer(request)
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        answer = {"choices": [choice], "usage": {"completion_tokens": len(text)}}
        whole = json.dumps(answer).encode()
        if self.server.refuses and self.server.refuses in request["messages"][-1]["content"]:
            self.say(400, {"message": "roles must alternate"})
        elif callable(step):
            step(self)
        elif isinstance(step, tuple):
            status, *told = step
            self.say(status, {"error": f"status {status}\nas told"}, [("Retry-After", each) for each in told])
        elif step == "slow":
            time.sleep(SLOW_S)
            self.say(200, answer)
        elif step == "half":  # a whole answer by HTTP, half of one by JSON
            self.say(200, whole[: len(whole) // 2])
        elif step == "cut":  # fewer bytes than announced
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2])
            self.close_connection = True
        elif step == "reset":
            self.connection.close()
            self.close_connection = True
        elif step == "odd":
            self.say(200, {"choices": []})
        elif step == "empty":
            self.say(200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]})
        else:
            time.sleep(0.01)
            self.say(200, answer)


@contextmanager
def serving(*args, **kwargs):
    """A server that runs during the block."""
    server = ChatServer(*args, **kwargs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
