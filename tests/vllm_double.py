"""Stands in for vLLM's process: says its lines in vLLM's form, or fails as ``DOUBLE`` tells it."""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MOOD, NOTES = os.environ.get("DOUBLE", ""), Path(os.environ["DOUBLE_NOTES"])
LINES = json.loads(os.environ["DOUBLE_LINES"])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.headers["authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"
        if body.get("stream"):  # else it is what the engine tries when it starts
            with NOTES.open("a") as notes:
                notes.write(json.dumps(body) + "\n")
        if MOOD == "cannot" and not body.get("stream"):
            sys.stderr.write("(Worker) RuntimeError: no kernel for head_dim=8\nDeadError: see it\n")
            sys.stderr.flush()
        self.send_response(500 if MOOD == "cannot" else 200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            for place in range(body["max_tokens"]):
                if MOOD == "breaks" and place == 3:
                    os._exit(1)
                self.say(body, place)
        except OSError:
            NOTES.with_suffix(".gone").touch()

    def say(self, body: dict[str, Any], place: int) -> None:
        token = LINES[place % len(LINES)]
        ended = token in body["stop_token_ids"] or (MOOD == "ends" and place == 2)
        choice: dict[str, Any] = {"token_ids": [token], "finish_reason": None, "logprobs": None}
        if ended or place + 1 == body["max_tokens"]:
            choice["finish_reason"] = "stop" if ended else "length"
        if "logprobs" in body:
            tops = {"token_id:1": -2.0, "token_id:2": -0.5, f"token_id:{token}": -3.0}
            choice["logprobs"] = {"token_logprobs": [-3.0], "top_logprobs": [tops]}
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.flush()
        if MOOD == "dawdles":
            time.sleep(0.005)

    def log_message(self, *_: object) -> None:
        pass


if MOOD == "dies":
    sys.exit("ValueError: there is no such attention")
NOTES.with_suffix(".pid").write_text(str(os.getpid()))
if MOOD == "hangs":
    time.sleep(60)
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
