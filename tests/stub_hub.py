"""A Hugging Face hub of one repository on 127.0.0.1, with as much of the protocol as is asked."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

REPO = "someone/tiny-vision"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StubHub:
    """Serves the files of a directory; notes what it is asked for, and can refuse.

    A context manager: past its end connections are refused. `refuse` is None, or the status and
    X-Error-Code of every answer; `refuse_files` says the same of files alone, while the repository
    itself can be seen.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.refuse: tuple[int, str] | None = None
        self.refuse_files: tuple[int, str] | None = None
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    def __enter__(self) -> "StubHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make this process take it for the hub, with an empty cache and no network but this.

        huggingface_hub has read HF_ENDPOINT and HF_HOME long ago, hence its constants.
        """
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.directory).as_posix(): path.read_bytes()
            for path in sorted(self.directory.rglob("*"))
            if path.is_file()
        }


def _handler(hub: StubHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(head=True)

        def do_GET(self, head: bool = False) -> None:
            path = unquote(urlsplit(self.path).path)
            if REPO in path:
                hub.tokens.add(self.headers.get("Authorization"))
            files = hub.files()
            file = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            if hub.refuse:
                self.answer(b"", head, *hub.refuse)
            elif path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
                self.answer_json({"id": REPO, "sha": COMMIT}, head)
            elif path == f"/api/models/{REPO}/tree/{COMMIT}":
                self.answer_json([_tree_entry(*item) for item in files.items()], head)
            elif file not in files:
                self.answer(b"", head, 404, "RepoNotFound")
            elif hub.refuse_files:
                self.answer(b"", head, *hub.refuse_files)
            else:
                if not head:
                    hub.fetched.append(file)
                self.answer(files[file], head)

        def answer_json(self, value: object, head: bool) -> None:
            self.answer(json.dumps(value).encode(), head)

        def answer(self, body: bytes, head: bool, status: int = 200, error: str = "") -> None:
            self.send_response(status)
            if error:
                self.send_header("X-Error-Code", error)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _tree_entry(path: str, data: bytes) -> dict:
    return {
        "type": "file",
        "path": path,
        "size": len(data),
        "oid": hashlib.sha1(data).hexdigest(),
    }
