"""A server that answers wandb as W&B's does, so far as a run needs; it remembers what it was asked."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from typing import Any


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(b"")

    do_GET = do_HEAD

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            asked = json.loads(body)
        except ValueError:
            asked = {}
        self.server.asked.append((self.path, asked))  # type: ignore[attr-defined]
        query, variables = asked.get("query", ""), asked.get("variables") or {}
        self._answer(json.dumps({"data": self._data(query, variables)} if query else {}).encode())

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "team"}}
            bucket = {"id": "r", "name": variables["name"], "displayName": "name", "description": "", "config": "{}", "historyLineCount": 0}
            return {"upsertBucket": {"bucket": {**bucket, "sweepName": None, "project": project}, "inserted": True}}
        if "createRunFiles" in query:
            where = f"http://127.0.0.1:{self.server.server_port}/"  # type: ignore[attr-defined]
            files = [{"name": name, "uploadUrl": where + name} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query:
            return {"model": {"bucket": None, "name": variables["project"], "entity": {"name": "team"}}}
        return {}

    def _answer(self, body: bytes) -> None:
        self.send_response(self.server.status if self.path == "/graphql" else 200)  # type: ignore[attr-defined]
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class WandbServer(http.server.ThreadingHTTPServer):
    """The server, which listens at a free port of this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.asked: list[tuple[str, dict[str, Any]]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        super().__exit__(*args)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing about connections that wandb leaves."""

    def history(self) -> list[dict[str, Any]]:
        """Returns the logged values, without those that wandb adds."""
        found = []
        for path, asked in self.asked:
            lines = asked.get("files", {}).get("wandb-history.jsonl", {}).get("content", []) if path.endswith("/file_stream") else []
            found += [{name: value for name, value in json.loads(line).items() if not name.startswith("_")} for line in lines]
        return found

    def run_ids(self) -> set[str]:
        """Returns the ids of the runs that were created or continued."""
        return {asked["variables"]["name"] for _, asked in self.asked if "upsertBucket" in asked.get("query", "")}
