"""Reads and writes as much of MessagePack as LMDB sets use: arrays of numbers, text and bytes.

Bytes are not copied but found: a label behind a picture is read without the picture. MessagePack before version 1.0
wrote bytes as text, so both are the same here.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

# first byte -> what the number is, and of bytes and arrays, what the number's length is
NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
NUMBERS |= {0xCA: ">f", 0xCB: ">d"}
BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
ARRAYS = {0xDC: ">H", 0xDD: ">I"}
SINGLE = {0xC0: None, 0xC2: False, 0xC3: True}


class Span(NamedTuple):
    """Bytes or text, by its place."""

    start: int
    length: int


Item = int | float | bool | Span | None


def _item(read: Callable[[int, int], bytes], place: int, end: int) -> tuple[Item, int]:
    """What is at a place, and where it ends."""
    head = read(place, min(9, end - place))
    if not head:
        raise ValueError("it ends within an array")
    first = head[0]
    if first < 0x80 or first >= 0xE0:
        return first - (256 if first >= 0xE0 else 0), place + 1
    if first in SINGLE:
        return SINGLE[first], place + 1
    if first & 0xE0 == 0xA0:  # a short text
        width, length = 0, first & 0x1F
    elif first in NUMBERS or first in BYTES:
        form = struct.Struct(NUMBERS.get(first) or BYTES[first])
        if len(head) <= form.size:
            raise ValueError("it ends within a number")
        (length,) = form.unpack_from(head, 1)
        if first in NUMBERS:
            return length, place + 1 + form.size
        width = form.size
    else:
        raise ValueError(f"it has a byte 0x{first:02x} where a number, text or bytes are expected")
    start = place + 1 + width
    if start + length > end:
        raise ValueError(f"it ends within {length} bytes")
    return Span(start, length), start + length


def is_array(start: bytes) -> bool:
    """Whether a value that starts so is an array, and no pickle."""
    return bool(start) and (start[0] & 0xF0 == 0x90 or start[0] in ARRAYS)


def read_array(read: Callable[[int, int], bytes], size: int) -> list[Item]:
    """An array of numbers, text and bytes.

    Args:
        read: gives bytes by their place in the value, and their number.
        size: of the value.

    Raises:
        ValueError: it is something else, or damaged.
    """
    head = read(0, min(5, size))
    if not is_array(head):
        raise ValueError("it is no array")
    form = struct.Struct(ARRAYS.get(head[0], ">0s"))
    if len(head) <= form.size:
        raise ValueError("it ends within an array's length")
    number = form.unpack_from(head, 1)[0] if head[0] in ARRAYS else head[0] & 0x0F
    place = 1 + form.size
    items = []
    for _ in range(number):
        item, place = _item(read, place, size)
        items.append(item)
    if place != size:
        raise ValueError("it goes on behind its end")
    return items


def read_number(content: bytes) -> int:
    """
    Raises:
        ValueError: it is no whole number.
    """
    item, end = _item(lambda start, length: content[start : start + length], 0, len(content))
    if isinstance(item, bool) or not isinstance(item, int) or end != len(content):
        raise ValueError("it is no whole number")
    return item


def pack(value: int | bytes | str | Sequence) -> bytes:
    """A number from 0 on, bytes, text, or a sequence of these."""
    if isinstance(value, int):
        return bytes([value]) if value < 0x80 else b"\xcf" + struct.pack(">Q", value)
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, str):
        return b"\xdb" + struct.pack(">I", len(value.encode())) + value.encode()
    return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(pack, value))
