"""A chat server on localhost that misbehaves as scripted."""

import hashlib
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_S = 0.6  # longer than the time-out that tests set


def answer_to(request):
    """The server's answer, which depends on the request only."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return f"naïve 🙂 {digest[:8]} to {request['messages'][-1]['content']}"


class ChatServer(ThreadingHTTPServer):
    """`script` lists the outcomes of the next requests, in order of arrival; later ones succeed.

    A step is ok, half, reset, slow, odd (no choices), empty, a status, and with it perhaps a Retry-After, or a function
    of the handler that says something else.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script=(), *, always="ok", key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.always, self.key = list(script), always, key
        self.requests, self.steps, self.times = [], Counter(), []
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Print nothing when a client disconnects."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def say(self, status, body, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.say(401, {"error": "who are you?"})
        else:
            self.say(404, {"error": "this server lists no models"})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
        text = answer_to(request)
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": text}}
        answer = {"choices": [choice], "usage": {"completion_tokens": len(text)}}
        whole = json.dumps(answer).encode()
        if callable(step):
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
