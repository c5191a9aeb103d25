"""A server of shards to be killed: `serve_shards.py http|s3 PORT FOLDER`; says when it serves.

s3 has each folder in FOLDER in the bucket `bucket`.
"""

import logging
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def serve_http(port: int, folder: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            content = path.read_bytes() if path.is_file() else b"not found"
            status = 200 if path.is_file() else 404
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if part and status == 200:
                start, end = int(part[1]), int(part[2]) + 1
                status, content = (206, content[start:end]) if start < len(content) else (416, b"")
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print("serving", flush=True)
    server.serve_forever()


def serve_s3(port: int, folder: Path) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    # moto keeps its objects in memory: they are put there before anybody can ask for one.
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket("bucket", "us-east-1")
    for path in folder.rglob("*"):
        if path.is_file():
            backend.put_object("bucket", str(path.relative_to(folder)), path.read_bytes())
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", port, app, threaded=True)
    print("serving", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    {"http": serve_http, "s3": serve_s3}[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
