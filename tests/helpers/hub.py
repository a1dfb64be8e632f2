"""A Hugging Face hub on this machine that accepts uploads, over the protocol that huggingface_hub speaks."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Requests that carry another token than `TOKEN` are refused; `fail_commits` makes every commit fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.fail_commits = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: object, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:  # a large file, at the address that the batch request returned
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        place = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif place == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.address}/acme/model", "name": "acme/model"})
        elif place.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = {
                name["path"]: "lfs" if name["path"].endswith(".safetensors") else "regular" for name in files
            }
            self._answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        elif place.endswith("/info/lfs/objects/batch"):
            self._answer(
                {"transfer": "basic", "objects": [self._place(each) for each in json.loads(body)["objects"]]}
            )
        elif place.endswith("/commit/main") and not self.server.fail_commits:
            self._commit([json.loads(line) for line in body.splitlines()])
            self._answer({"commitUrl": f"{self.server.address}/acme/model/commit/1", "commitOid": "1"})
        else:
            self._answer({"error": "the disk is full"}, 400)

    def _place(self, file: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server.address}/large/{file['oid']}"}
        return {"oid": file["oid"], "size": file["size"], "actions": {"upload": upload}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]
            else:
                self.server.files[value["path"]] = base64.b64decode(value["content"])


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
