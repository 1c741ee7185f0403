"""A Hub on this machine: one repository, served as huggingface_hub asks for it, with a record of what was fetched."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


@dataclass
class HubServer:
    """An address to fetch from, and the names of the files that were fetched."""

    url: str
    fetched: list[str] = field(default_factory=list)


@contextmanager
def serving(folder: Path, repository: str) -> Iterator[HubServer]:
    """Context in which the folder is a repository of a Hub."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    resolve = f"/{repository}/resolve/{COMMIT}/"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(resolve) and path.removeprefix(resolve) in files:
                name = path.removeprefix(resolve)
                if self.command == "GET":
                    server.fetched.append(name)
                return self.answer(files[name].read_bytes())
            if path == f"/api/models/{repository}/tree/{COMMIT}":
                return self.answer(json.dumps([self.entry(name) for name in files]).encode())
            if path.startswith(f"/api/models/{repository}"):
                return self.answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
            self.send_error(404)

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def entry(self, name: str) -> dict[str, object]:
            content = files[name].read_bytes()
            return {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server = HubServer(f"http://127.0.0.1:{listening.server_address[1]}")
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            listening.shutdown()
