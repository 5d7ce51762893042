"""Plain Python values as bytes and back, and frames of them over file descriptors.

Values cross from a process nobody trusts into one that decides, so this is neither pickle nor
marshal: decoding makes only numbers, text, bytes and the built-in containers, and fails with
`ValueError` on anything else. An instance of a subclass is sent as its built-in value, so no
method of the sender's (say an `__eq__` that is always true) arrives. The file imports nothing that
Python's start has not loaded: it is also copied into the sandbox, where each import costs.
"""

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LARGEST = 64 * 2**20
"""Bytes of one frame that a reader accepts."""

_MOST_ITEMS = 100_000
_CONTAINERS: "dict[Any, bytes]" = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z"}


class Iterated:
    """An iterator that was sent: the items it gave."""

    def __init__(self, items: list):
        self._items = iter(items)

    def __iter__(self):
        return self

    def __next__(self) -> object:
        return next(self._items)


def encode(value: object) -> bytes:
    """`bytes` of a value; `TypeError` naming the type that cannot be sent."""
    parts = []
    _encode(value, parts)
    return b"".join(parts)


def _sized(tag: bytes, data: bytes, parts: list[bytes]) -> None:
    parts.append(b"%b%d:" % (tag, len(data)))
    parts.append(data)


def _encode(value: "Any", parts: list[bytes]) -> None:
    if value is None or value is True or value is False:
        parts.append({None: b"N", True: b"T", False: b"F"}[value])
    elif isinstance(value, int):
        _sized(b"i", int.__format__(int(value), "x").encode(), parts)
    elif isinstance(value, float):
        _sized(b"f", float.hex(value).encode(), parts)
    elif isinstance(value, complex):
        _sized(b"c", b"", parts)
        _encode(value.real, parts)
        _encode(value.imag, parts)
    elif isinstance(value, str):
        _sized(b"s", str.encode(value, "utf-8", "surrogatepass"), parts)
    elif isinstance(value, bytes):
        _sized(b"b", bytes(value), parts)
    elif isinstance(value, bytearray):
        _sized(b"B", bytes(value), parts)
    else:
        _encode_container(value, parts)


def _encode_container(value: "Any", parts: list[bytes]) -> None:
    if isinstance(value, dict):
        parts.append(b"d%d:" % dict.__len__(value))
        for key, item in dict.items(value):
            _encode(key, parts)
            _encode(item, parts)
        return
    for kind, tag in _CONTAINERS.items():
        if isinstance(value, kind):
            parts.append(b"%b%d:" % (tag, kind.__len__(value)))
            for item in kind.__iter__(value):
                _encode(item, parts)
            return
    if isinstance(value, range):
        parts.append(b"r3:")
        for item in (value.start, value.stop, value.step):
            _encode(item, parts)
        return
    if not hasattr(type(value), "__next__"):
        raise TypeError(f"a {type(value).__name__} cannot be sent")
    items = [item for item, _ in zip(value, range(_MOST_ITEMS + 1), strict=False)]
    if len(items) > _MOST_ITEMS:
        raise TypeError(f"an iterator of more than {_MOST_ITEMS} items cannot be sent")
    parts.append(b"I%d:" % len(items))
    for item in items:
        _encode(item, parts)


def decode(data: bytes) -> "Any":
    """The value of `encode`'s bytes; `ValueError` for any other bytes."""
    try:
        value, end = _decode(data, 0)
    except (IndexError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"not an encoded value: {error}") from None
    if end != len(data):
        raise ValueError(f"not an encoded value: {len(data) - end} bytes too many")
    return value


_CONSTANTS: "dict[bytes, Any]" = {b"N": None, b"T": True, b"F": False}
_FROM_BYTES: "dict[bytes, Any]" = {
    b"i": lambda data: int(data, 16),
    b"f": lambda data: float.fromhex(data.decode("ascii")),
    b"s": lambda data: data.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"B": bytearray,
}
_FROM_ITEMS: "dict[bytes, Any]" = {
    b"l": list,
    b"t": tuple,
    b"S": set,
    b"Z": frozenset,
    b"I": Iterated,
    b"r": lambda items: range(*items),
}


def _decode(data: bytes, at: int) -> "tuple[Any, int]":
    tag = data[at : at + 1]
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at + 1
    colon = data.index(b":", at, at + 24)
    count = int(data[at + 1 : colon])
    at = colon + 1
    if tag in _FROM_BYTES:
        if count < 0 or at + count > len(data):
            raise ValueError(f"not an encoded value: {count} bytes announced, fewer there")
        return _FROM_BYTES[tag](data[at : at + count]), at + count
    if tag == b"d":
        result = {}
        for _ in range(count):
            key, at = _decode(data, at)
            result[key], at = _decode(data, at)
        return result, at
    if tag == b"c":
        count = 2
    elif tag not in _FROM_ITEMS:
        raise ValueError(f"not an encoded value: tag {tag!r}")
    items = []
    for _ in range(count):
        item, at = _decode(data, at)
        items.append(item)
    return (complex(*items) if tag == b"c" else _FROM_ITEMS[tag](items)), at


def send(descriptor: int, value: object) -> None:
    """Write one frame: eight bytes of length, then the value."""
    data = encode(value)
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[posix.write(descriptor, data[: 2**20]) :]


def _exactly(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = posix.read(descriptor, min(count, 2**20))
        if not part:
            raise EOFError("the other side has gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def receive(descriptor: int, largest: int = LARGEST) -> "Any":
    """Read one frame. `EOFError` where the other side has gone, `ValueError` for a bad frame."""
    count = int.from_bytes(_exactly(descriptor, 8), "big")
    if count > largest:
        raise ValueError(f"a frame of {count} bytes is larger than {largest}")
    return decode(_exactly(descriptor, count))
