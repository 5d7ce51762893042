"""The servers that `serving.py` compares, each a process of its own on this machine's CPU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving_files import Files
from serving.load.http import HttpError, Server

ROOT = Path(__file__).parents[1]
START_S = 600.0
GGML_F32 = 0
"""llama.cpp's number of the type."""
CONTEXT = 256
"""Tokens of prompt and answer that every server makes room for."""


@dataclass(frozen=True)
class Peer:
    """A server: its name in tables, the command that starts it at a port, the model's name in
    requests (None is the first that it lists), and further fields of them, as JSON.
    """

    name: str
    command: tuple[str, ...]
    model: str | None = None
    fields: str = "{}"


def sheaf(files: Files, port: int, *flags: str) -> Peer:
    """Our own, as `serve.py` starts it."""
    command = (sys.executable, "serve.py", f"--checkpoint={files.checkpoint}", f"--port={port}")
    sizes = ("--max-num-seqs=32", f"--max-model-len={CONTEXT}", "--no-prefix-caching")
    return Peer("Sheaf", (*command, *sizes, *flags))


def transformers(files: Files, port: int, python: str) -> Peer:
    """`transformers serve` with its continuous batching."""
    script = str(Path(python).with_name("transformers"))
    options = ("--device=cpu", "--dtype=float32", f"--port={port}", "--continuous-batching")
    command = (script, "serve", str(files.hugging_face), *options)
    return Peer("transformers serve", command, str(files.hugging_face))


def llama_cpp(files: Files, port: int, python: str) -> Peer:
    """llama-cpp-python's server, with keys and values in float32 too. It answers one request after
    another, and by default breaks one off when the next comes.
    """
    threads = os.cpu_count()
    options = (f"--port={port}", f"--n_ctx={CONTEXT}", f"--n_threads={threads}")
    options += (f"--n_threads_batch={threads}", "--model_alias=llama-12m")
    options += (f"--type_k={GGML_F32}", f"--type_v={GGML_F32}", "--interrupt_requests=false")
    command = (python, "-m", "llama_cpp.server", f"--model={files.gguf}", *options)
    return Peer("llama-cpp-python", command, "llama-12m", '{"repeat_penalty": 1.0}')


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def running(peer: Peer, port: int, log: Path) -> Iterator[int]:
    """Start a server, wait until it answers, and end it; gives its process id.

    Raises `RuntimeError` with the end of its log if it does not come up.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            peer.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + START_S
            while not asyncio.run(_answers(port)):
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{peer.name} did not start:\n{tail}")
                time.sleep(0.5)
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _answers(port: int) -> bool:
    server = Server(f"http://127.0.0.1:{port}")
    try:
        for path in ("/ready", "/v1/models"):
            status, _ = await server.json("GET", path)
            if status == 200:
                return True
            if status != 404:
                return False
    except (OSError, HttpError, asyncio.IncompleteReadError):
        return False
    return False


def main_thread_seconds(pid: int) -> float:
    """Processor time of a process's main thread, in which `serve.py` has its event loop."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
