"""The wire format of protocol buffers: a message as its fields, without a schema compiler or its library.

See the format's own description (protobuf.dev, "Encoding"). What it gives up: groups, which were deprecated
before proto3, and packed repeated numbers, which the messages read here do not have.
"""

import struct
from typing import Any

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
Fields = dict[int, list[Any]]
"""Field number -> its values in order: int of a varint, bytes of a length-delimited or fixed field."""


def parse_message(data: bytes) -> Fields:
    """Return the fields of one message; ValueError where it is cut off or not of this format."""
    fields: Fields = {}
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field has the number 0")
        value: int | bytes
        if kind == VARINT:
            value, position = _varint(data, position)
        elif kind in (FIXED64, FIXED32, LENGTH):
            size = {FIXED64: 8, FIXED32: 4}.get(kind)
            if size is None:
                size, position = _varint(data, position)
            value = data[position : position + size]
            if len(value) != size:
                raise ValueError(f"field {number} is cut off")
            position += size
        else:
            raise ValueError(f"field {number} has the unknown wire type {kind}")
        fields.setdefault(number, []).append(value)
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for count in range(MAX_VARINT_BYTES):
        if position + count >= len(data):
            raise ValueError("the message is cut off")
        byte = data[position + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position + count + 1
    raise ValueError("a number has more than 10 bytes")


def float_field(fields: Fields, number: int) -> float:
    """Return a `float` field's last value, 0 where it is absent, as proto3 has it."""
    value = fields.get(number, [bytes(4)])[-1]
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError(f"field {number} is no float")
    found: float = struct.unpack("<f", value)[0]
    return found


def int_field(fields: Fields, number: int) -> int:
    """Return an integer or enum field's last value, 0 where it is absent."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return value


def message_fields(fields: Fields, number: int) -> list[Fields]:
    """Return the messages of a repeated field."""
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise ValueError(f"field {number} is no message")
    return [parse_message(value) for value in values]
