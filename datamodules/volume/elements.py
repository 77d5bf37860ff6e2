"""The data elements of a DICOM file, as far as its decoder relies on them without a look. Without torch.

Source: DICOM PS3.5, sections 7.1 and 7.5 and annex A.
"""

import struct
import zlib
from dataclasses import dataclass

from lightspan.core.files.foreign import BYTES, bounded_time, drained

MOST_NESTED = 100
"""Sequences inside of each other. The decoder calls itself for each, and crashes at some thousands."""
_IMPLICIT, _BIG_ENDIAN, _DEFLATED = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"
_ENCODED = (b"1.2.840.10008.1.2.4.", b"1.2.840.10008.1.2.5")  # JPEG and its kin, and run lengths
_SHORT = {*b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()}  # have lengths of two bytes
_LONG = {*b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()}  # of four
_KINDS = _SHORT | _LONG
_SYNTAX, _PIXELS = (0x0002, 0x0010), (0x7FE0, 0x0010)
_ITEM, _ENDS = (0xFFFE, 0xE000), ((0xFFFE, 0xE00D), (0xFFFE, 0xE0DD))
_OPEN = 2**32 - 1  # the length of what an element of its own ends


@dataclass
class StoredPixels:
    """What a file says of its pixels outside of all sequences.

    Attributes:
        syntax: its transfer syntax; empty of a file without a header.
        count: their bytes in the file; 0 of pixels in fragments, as encoded ones are; None of a file without pixels.
    """

    syntax: bytes = b""
    count: int | None = None

    @classmethod
    def of(cls, content: bytes) -> "StoredPixels":
        """Raises: ValueError for elements that are longer than the file, sequences nested deeper than `MOST_NESTED`,
        more than `BYTES` once unpacked, and a deflated file that is damaged.
        """
        made = cls()
        with bounded_time():
            at = made._walk(content, 132, "<", header=True) if content[128:132] == b"DICM" else 0
            if made.syntax == _DEFLATED:
                content, at = drained(zlib.decompressobj(-zlib.MAX_WBITS), content[at:], BYTES.most), 0
            made._walk(content, at, ">" if made.syntax == _BIG_ENDIAN else "<")
        return made

    def require(self, numbers: int, bits: int) -> None:
        """Raises: ValueError where so many numbers of so many bits need more bytes, unless they are encoded."""
        needed, held = (numbers * bits + 7) // 8, self.count or 0
        if held < needed and not self.syntax.startswith(_ENCODED):
            raise ValueError(f"it is cut short: it has {held:,} bytes of {needed:,} of its pixels")

    def _walk(self, content: bytes, at: int, order: str, header: bool = False) -> int:
        """Looks at the elements from `at` on, or at those of the header, and gives the place after them."""
        tags, short, long = (struct.Struct(order + kind).unpack_from for kind in ("HH", "H", "I"))
        around = [(len(content), False)]  # of each sequence and item here: where it ends at the latest; whether open
        while at + 8 <= len(content):
            while len(around) > 1 and at >= around[-1][0]:
                around.pop()
            tag, kind = tags(content, at), content[at + 4 : at + 6]
            if header and tag[0] != 2:
                return at
            if tag in _ENDS:
                at += 8
                if around[-1][1]:
                    around.pop()
                continue
            if tag == _ITEM or (self.syntax == _IMPLICIT and not header) or kind not in _KINDS:
                kind = b"UN"  # sequences of kind UN are implicit inside, and some programs mix both
                (length,), first = long(content, at + 4), at + 8
            elif kind in _LONG:
                if at + 12 > len(content):
                    return len(content)
                (length,), first = long(content, at + 8), at + 12
            else:
                (length,), first = short(content, at + 6), at + 8
            if length != _OPEN and len(around) == 1:
                _require_whole(content, first, length)
            end = around[-1][0] if length == _OPEN else min(first + length, around[-1][0])
            inside = first + 8 <= end and tags(content, first) == _ITEM
            at = first
            if tag == _PIXELS and len(around) == 1:
                held = 0 if length == _OPEN else end - first
                self.count = held if self.count is None else min(self.count, held)
            if tag == _PIXELS and length == _OPEN:
                while at + 8 <= end and tags(content, at) == _ITEM:
                    (length,), at = long(content, at + 4), at + 8
                    _require_whole(content, at, length)
                    at += length
            elif tag == _ITEM or kind == b"SQ" or length == _OPEN or (inside and kind == b"UN" and tag != _PIXELS):
                around.append((end, length == _OPEN))
                if len(around) > 2 * MOST_NESTED:
                    raise ValueError(f"its sequences are nested more than {MOST_NESTED} deep")
            else:
                if tag == _SYNTAX and header:
                    self.syntax = content[first:end].rstrip(b"\0 ")
                at = end
        return at


def _require_whole(content: bytes, first: int, length: int) -> None:
    """The decoder takes memory for all that an element is said to have. Raises: ValueError for more than there is."""
    if first + length > len(content):
        raise ValueError(f"it is cut short: one of its parts has {len(content) - first:,} bytes of {length:,}")
