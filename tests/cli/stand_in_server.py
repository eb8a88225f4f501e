"""What `covey bench` needs of llama.cpp's server, as a small program: its options, its health, its stream of chunks.

It notes every prompt in the file PROMPTS. A prompt has as many tokens as words, and each takes a millisecond.
"""

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, count = asked["messages"][0]["content"], asked["max_tokens"]
        with Path(os.environ["PROMPTS"]).open("a") as file:
            file.write(f"{prompt}\n")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        words = len(prompt.split())
        time.sleep(words / 1000)
        self._say({"choices": [{"delta": {"role": "assistant", "content": None}}]})
        for number in range(count):
            time.sleep(0.001)
            self._say({"choices": [{"delta": {"content": f" {number}"}}]})
        self._say({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self._say({"choices": [], "usage": {"prompt_tokens": words, "completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _say(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "host"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "parallel", "ctx-size", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    if not Path(options.model).is_file():
        sys.exit(f"error: failed to open GGUF file '{options.model}'")
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
