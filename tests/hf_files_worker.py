"""Processes of the weight file tests: a hub on the loopback, its user, a writer that is killed."""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "c" * 40


def serve(weights: str) -> None:
    """A hub with `own/model` (an index that names one odd file) and `own/old` (a pickle only);
    prints its port, then every request.
    """
    index = json.dumps({"weight_map": {"a": "odd-name.safetensors"}}).encode()
    old = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    model = {
        **old,
        "model.safetensors.index.json": index,
        "odd-name.safetensors": Path(weights).read_bytes(),
        "model.safetensors": b"of another time",
        "tf_model.h5": b"x",
        "onnx/config.json": b"x",
    }
    Hub.repositories = {"own/model": model, "own/old": old}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_port, flush=True)
    server.serve_forever()


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that a snapshot needs."""

    repositories: dict[str, dict[str, bytes]]

    def do_GET(self) -> None:
        print(self.path, flush=True)
        parts = urlsplit(self.path).path.strip("/").split("/")
        owner, repository, kind, revision, *rest = parts[2:] if parts[0] == "api" else parts
        name = f"{owner}/{repository}"
        if name == "own/gated":
            self.refuse(403, "GatedRepo")
        elif name not in self.repositories:
            self.refuse(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif kind == "resolve":
            headers = {"ETag": f'"{"-".join(rest)}"', "X-Repo-Commit": COMMIT}
            self.answer(200, self.repositories[name]["/".join(rest)], headers)
        else:
            self.describe(name, kind)

    do_HEAD = do_GET

    def describe(self, name: str, kind: str) -> None:
        files = self.repositories[name].items()
        tree = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files]
        siblings = [{"rfilename": path} for path, _ in files]
        value: Any = tree if kind == "tree" else {"id": name, "sha": COMMIT, "siblings": siblings}
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def ask(*sources: str) -> None:
    """Print what each source resolves to, or the error."""
    from model.families.hub import resolve
    from model.families.reader import WeightFilesError

    for source in sources:
        name, _, pickles = source.partition(" ")
        try:
            print(resolve(name, allow_pickle=bool(pickles)))
        except WeightFilesError as error:
            print("refused:", error)


def kill(folder: str) -> None:
    """Write `FOLDER/N` with a kill at the Nth moment, for each N until a write survives; print it.

    A moment is before a file is opened or renamed, or an array made.
    """
    import numpy as np

    from model.families.writer import write_weights

    left: int | None = None

    def moment(event: str = "open", _: tuple[Any, ...] = ()) -> None:
        nonlocal left
        if left is not None and event in ("open", "os.rename"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def make(number: int) -> np.ndarray:
        moment()
        return np.full((100, 100), number, np.float32)

    entries = [(f"t{n}", (100, 100), "float32", lambda n=n: make(n)) for n in range(5)]
    for number in range(100):
        child = os.fork()
        if not child:
            sys.addaudithook(moment)
            left = number
            write_weights(Path(folder) / str(number), entries, max_shard_bytes=80_000)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            print(number)
            return


if __name__ == "__main__":
    {"serve": serve, "ask": ask, "kill": kill}[sys.argv[1]](*sys.argv[2:])
