"""HTTP/1.1 on `asyncio` streams, as little as a load generator needs.

It shares the machine with the server that it measures. A general client takes several times as
long for each event of a stream, which at thousands of tokens a second is the server's time.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class HttpError(Exception):
    """An answer that breaks the protocol, or a connection that ended early."""


@dataclass(frozen=True)
class Response:
    """The head of an answer; `parts` gives its body as it comes."""

    status: int
    headers: Mapping[str, str]
    _reader: asyncio.StreamReader

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection serves another request after this body."""
        framed = self._chunked or "content-length" in self.headers
        return framed and self.headers.get("connection", "").lower() != "close"

    @property
    def _chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, piece by piece."""
        if self._chunked:
            while size := _size(await self._reader.readline()):
                yield (await self._reader.readexactly(size + 2))[:-2]
            while (await self._reader.readline()).strip():
                pass
        elif (length := self.headers.get("content-length")) is not None:
            yield await self._reader.readexactly(int(length))
        else:
            while part := await self._reader.read(1 << 16):
                yield part

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([part async for part in self.parts()])

    async def events(self) -> AsyncIterator[bytes]:
        """The data of server-sent events."""
        rest = b""
        async for part in self.parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()


class Server:
    """A server at `http://host:port`, and the connections to it that wait for their next request.

    prefix: what its paths begin with, without `/v1`.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None
        secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port or (443 if secure else 80)
        self._ssl = ssl.create_default_context() if secure else None
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        key = "" if api_key is None else f"authorization: Bearer {api_key}\r\n"
        name = f"[{self._host}]" if ":" in self._host else self._host
        self._head = f"host: {name}:{self._port}\r\naccept: */*\r\n{key}"
        self._idle: list[Streams] = []

    @asynccontextmanager
    async def exchange(self, method: str, path: str, body: Any = None) -> AsyncIterator[Response]:
        """Send a request, `body` as JSON; leaving early closes its connection.

        Raises `OSError`, `HttpError`, `asyncio.IncompleteReadError`.
        """
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._head}"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        reader, writer = await self._connection()
        done = False
        try:
            writer.write(head.encode() + content)
            response = await _head_of(reader)
            yield response
            done = response.keeps_alive
        finally:
            if done:
                self._idle.append((reader, writer))
            else:
                writer.transport.abort()

    async def json(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded body of an answer; the text where it is not JSON."""
        async with self.exchange(method, path, body) as response:
            content = await response.body()
        try:
            return response.status, json.loads(content)
        except ValueError:
            return response.status, content.decode("utf-8", "replace")

    def close(self) -> None:
        """Close the connections that wait."""
        while self._idle:
            self._idle.pop()[1].close()

    async def _connection(self) -> Streams:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port, ssl=self._ssl)


async def _head_of(reader: asyncio.StreamReader) -> Response:
    first = await reader.readline()
    words = first.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        said = f"it says {first[:40]!r}" if first else "it closed the connection"
        raise HttpError(f"no HTTP answer: {said}")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return Response(int(words[1]), headers, reader)


def _size(line: bytes) -> int:
    try:
        return int(line.split(b";")[0], 16)
    except ValueError:
        raise HttpError(f"a chunk of size {line[:20]!r}; the connection ended early") from None
