"""A scripted OpenAI-compatible endpoint on the loopback interface, for fault tests. It says exactly what a test
scripts."""

import json, socket, struct, threading, time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    "What to do with one request."

    text: str = ""  # content of the assistant's message
    status: int = 200
    body: object = None  # raw JSON body instead of a completion (bytes are sent unchanged)
    headers: dict = field(default_factory=dict)
    finish: str = "stop"
    usage: object = (100, 50)  # prompt and completion tokens (None: the server reports none)
    delay: float = 0.0  # s before answering
    drip: float = 0.0  # s between the bytes of the body
    drop: str = ""  # "reset": connection reset. "cut": the body ends before its announced length


def completion(r: Reply, model) -> dict:
    usage = (
        {}
        if r.usage is None
        else dict(
            usage=dict(prompt_tokens=r.usage[0], completion_tokens=r.usage[1], total_tokens=sum(r.usage))
        )
    )
    return dict(
        id="x",
        object="chat.completion",
        created=0,
        model=f"{model}-served",
        choices=[dict(index=0, finish_reason=r.finish, message=dict(role="assistant", content=r.text))],
        **usage,
    )


@dataclass
class Call:
    "One request as it arrived."

    body: dict
    headers: dict
    at: float  # monotonic arrival time, s

    @property
    def system(self):
        return self.body["messages"][0]["content"]

    @property
    def user(self):
        return self.body["messages"][1]["content"]


class FakeEndpoint:
    """`script(call, n)` gives the reply to the n-th call (from 0). Use it as a context manager. `url` goes to
    --base_url."""

    def __init__(self, script):
        self.script, self.calls, self.lock, self.closing = script, [], threading.Lock(), threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *a):
                pass

            def do_POST(self):
                endpoint.answer(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *a):
                pass  # these tests kill clients

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, h):
        body = json.loads(h.rfile.read(int(h.headers["Content-Length"])))
        with self.lock:
            n = len(self.calls)
            self.calls.append(Call(body, dict(h.headers), time.monotonic()))
            r = self.script(self.calls[n], n)
        if r.delay and self.closing.wait(r.delay):
            return
        if r.drop == "reset":
            h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            h.connection.shutdown(socket.SHUT_RD)
            h.close_connection = True
            return h.connection.close()
        data = r.body if r.body is not None else completion(r, body["model"])
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        h.send_response(r.status)
        for k, v in {"Content-Type": "application/json", **r.headers}.items():
            h.send_header(k, v)
        h.send_header("Content-Length", str(len(data) + (100 if r.drop == "cut" else 0)))
        h.end_headers()
        for part in [data[i : i + 1] for i in range(len(data))] if r.drip else [data]:
            if r.drip and self.closing.wait(r.drip):
                return
            h.wfile.write(part)
        if r.drop == "cut":
            h.close_connection = True

    def __enter__(self):
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)
