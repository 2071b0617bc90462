"""A process that stands for an engine: ``engine.py PORT [never|dies|late]``; healthy unless told otherwise."""

import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if "never" in sys.argv else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    if "dies" in sys.argv:
        sys.exit("CUDA out of memory")
    if "late" in sys.argv:
        time.sleep(0.5)
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
