"""A small picture inside a page, as PNG in a data URI."""

from __future__ import annotations

import base64
import struct
import zlib

# A blue that stands out on white and on black; the value is its opacity.
_COLOUR = (37, 99, 235)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_uri(values: bytes, columns: int) -> str:
    """Return a picture of one byte per pixel, row by row, as a data URI.

    Raises:
        ValueError: the rows do not all have ``columns`` pixels, or there are none.
    """
    if columns < 1 or not values or len(values) % columns:
        raise ValueError(f"{len(values)} pixels do not make rows of {columns}")
    rows = [values[start : start + columns] for start in range(0, len(values), columns)]
    # Each row begins with its filter, 0 = none; a pixel is red, green, blue, opacity.
    raw = b"".join(b"\0" + b"".join(bytes((*_COLOUR, value)) for value in row) for row in rows)
    header = struct.pack(">IIBBBBB", columns, len(rows), 8, 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(_SIGNATURE + b"".join(map(_chunk, parts))).decode()


def _chunk(part: tuple[bytes, bytes]) -> bytes:
    kind, content = part
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
