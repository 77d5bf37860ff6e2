"""From bytes to values: what decodes, to what, and what is refused by name."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lightspan.core.errors import UserError
from lightspan.datamodules.shards.decoders import check_fields, damage_of, decode_fields, decode_image


def encoded(value: object) -> bytes:
    stream = io.BytesIO()
    if isinstance(value, Image.Image):
        value.save(stream, "PNG")
    else:
        np.save(stream, value, allow_pickle=True)  # type: ignore[arg-type]
    return stream.getvalue()


def sample(**members: bytes) -> dict[str, object]:
    return {"__key__": "k7", "__url__": "a.tar", **members}


def test_members_are_decoded_by_their_ending() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    members = sample(
        png=encoded(Image.fromarray(pixels)),
        cls=b"12\n",
        txt="żółw".encode(),
        json=json.dumps({"a": 1}).encode(),
        npy=encoded(np.arange(3)),
    )
    fields = {"image": "jpg|png", "label": "cls", "caption": "txt", "about": "json", "vector": "npy"}
    values = decode_fields(members, fields)
    assert torch.equal(values["image"], torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(values["vector"], torch.arange(3))
    assert (values["label"], values["caption"], values["about"]) == (12, "żółw", {"a": 1})


def test_a_mask_keeps_the_numbers_of_its_pixels() -> None:
    numbers = np.arange(6, dtype=np.uint8).reshape(2, 3)
    with_palette = Image.fromarray(numbers, mode="P")
    with_palette.putpalette([200, 10, 10] * 256)
    for mask, dtype in (
        (Image.fromarray(numbers), torch.uint8),
        (with_palette, torch.uint8),
        (Image.fromarray(numbers.astype(np.uint16)), torch.int32),
    ):
        value = decode_fields(sample(**{"mask.png": encoded(mask)}), {"semantic": "mask.png"})["semantic"]
        assert (value.dtype, value.tolist()) == (dtype, numbers.tolist())
    assert "3 channels (RGB)" in str(damage_of("mask.png", encoded(Image.new("RGB", (2, 2))), whole=False))


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("png", b"no image"),
        ("png", encoded(Image.new("RGB", (64, 64)))[:60]),
        ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        ("cls", b"seven"),
        ("txt", b"\xff\xfe\xff"),
        ("json", b"{"),
        ("png", b""),
        ("json", b"[" * 100_000),
        ("npy", b"\x93NUMPY"),
        ("npy", encoded(np.array([{"an": "object"}], dtype=object))),
        ("npy", encoded(np.zeros(3)).replace(b"(3,)", b"(9999999999999,)")),
    ],
)
def test_bytes_that_are_not_what_their_ending_says_are_named(ending: str, content: bytes) -> None:
    with pytest.raises(UserError, match=rf"shard a\.tar: sample k7: its \.{ending} member cannot be decoded"):
        decode_fields(sample(**{ending: content}), {"field": ending})


@pytest.mark.parametrize("content", [b"-1", b"9" * 30, b"1_0", b"", "٣".encode()])
def test_a_class_is_a_whole_number_from_0_up(content: bytes) -> None:
    with pytest.raises(UserError, match=r"sample k7: its \.cls member cannot be decoded: "):
        decode_fields(sample(cls=content), {"label": "cls"})


def test_an_array_that_begins_as_an_archive_is_refused() -> None:
    for content in (b"PK\x03\x04", zipped()):
        with pytest.raises(UserError, match=r"its \.npy member cannot be decoded: .*magic"):
            decode_fields(sample(npy=content), {"x": "npy"})


def zipped() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(2))
    return stream.getvalue()


# Pictures


def saved(image: Image.Image, style: str, **more: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, style, **more)  # type: ignore[arg-type]
    return stream.getvalue()


def test_16_bit_grey_is_scaled_to_8_bits() -> None:
    values = np.array([[0, 128, 129, 300, 30000, 65407, 65535]], dtype=np.uint16)
    image = decode_image(saved(Image.fromarray(values), "PNG"))
    assert torch.equal(image, torch.tensor([[0, 0, 1, 1, 117, 255, 255]], dtype=torch.uint8).expand(3, 1, 7))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    """The stored picture, turned as EXIF says, is the one that was meant."""
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif))
    assert torch.equal(image[0], torch.from_numpy(upright))


def test_what_is_no_rgb_becomes_it() -> None:
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    pictures = {
        "palette": saved(red.convert("P"), "PNG"),
        "transparent": saved(clear, "PNG"),  # the colour below shows
        "cmyk": saved(red.convert("CMYK"), "JPEG", quality=100),
        "webp": saved(red, "WEBP", lossless=True),
    }
    for name, content in pictures.items():
        close = (decode_image(content).int() - torch.tensor([255, 0, 0])[:, None, None]).abs().max()
        assert close <= 2, name
    grey = decode_image(saved(Image.new("L", (2, 2), 77), "PNG"))
    assert torch.equal(grey, torch.full((3, 2, 2), 77, dtype=torch.uint8))
    assert torch.equal(decode_image(saved(Image.new("1", (2, 2), 1), "PNG")), torch.full_like(grey, 255))


def test_damage_is_found_in_headers_and_to_the_end_where_that_is_asked_for() -> None:
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    assert damage_of("jpg", whole, whole=True) is None
    assert damage_of("jpg", whole[:1000], whole=False) is None
    assert "truncated" in str(damage_of("jpg", whole[:1000], whole=True))
    assert damage_of("jpg", b"", whole=False) == "it is empty"
    assert damage_of("txt", b"", whole=False) is None
    assert damage_of("unknown", b"anything", whole=True) is None


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSPAN_MAX_PIXELS", "99")
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(UserError, match=r"it has 100 pixels, and the limit is 99; .* LIGHTSPAN_MAX_PIXELS"):
        decode_fields(sample(png=encoded(Image.new("L", (10, 10)))), {"image": "png"})


def test_a_png_with_a_wrong_checksum_is_damaged_although_it_decodes() -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)))
    assert damage_of("png", whole, whole=False) is None
    for at in (whole.index(b"IDAT") + 900, len(whole) - 14):  # in the numbers, and in their checksum
        flipped = bytearray(whole)
        flipped[at] ^= 1
        for all_of_it in (False, True):
            assert "checksum" in str(damage_of("png", bytes(flipped), all_of_it))
        with pytest.raises(ValueError, match="checksum"):
            decode_image(bytes(flipped))
    with Image.open(io.BytesIO(flipped)) as image:
        image.load()  # and raises nothing


def grey_png(size: int, pixels: bytes, interlaced: int) -> bytes:
    """A square PNG of 8 bits, whose checksums are right whatever its pixels are."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, interlaced))]
    parts += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    joined = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(joined)


def test_a_png_whose_pixels_end_before_its_last_row_is_damaged_and_a_black_one_is_not() -> None:
    row = bytes([0, 1, 2, 3, 4, 5])  # how it is filtered, and five pixels
    # The passes of 5 x 5 pixels have 2 + 2 + 3 + 4 + 4 + 9 + 12 bytes.
    for whole, interlaced, cut in ((5 * row, 0, 3 * 6), (bytes(5 * 6), 0, 6), (bytes(36), 1, 24)):
        assert decode_image(grey_png(5, whole, interlaced)).shape == (3, 5, 5)
        for ending in ("png", "mask.png"):
            with pytest.raises(UserError, match=f"cut short: it has {cut} of {len(whole)} bytes"):
                decode_fields(sample(**{ending: grey_png(5, whole[:cut], interlaced)}), {"image": ending})
    for mode, size in (
        ("1", (7, 13)),
        ("P", (3, 3)),
        ("LA", (2, 2)),
        ("RGBA", (1, 4)),
        ("I;16", (5, 1)),
        ("RGB", (1, 1)),
    ):
        assert decode_image(encoded(Image.new(mode, size))).shape[1:] == (size[1], size[0])


def test_a_tiff_of_floats_has_no_shades() -> None:
    with pytest.raises(ValueError, match="TIFF of mode F"):
        decode_image(saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_a_sample_without_the_member_is_named() -> None:
    with pytest.raises(UserError, match=r"sample k7 has no \.jpg or \.png member for image; it has txt"):
        decode_fields(sample(txt=b""), {"image": "jpg|png"})


@pytest.mark.parametrize("ending", ["pkl", "pickle", "pyd", "pth"])
def test_pickled_members_have_no_decoder(ending: str) -> None:
    with pytest.raises(
        UserError, match=rf"x asks for \.{ending} members, .* never read; decoders exist for jpg, .*npy"
    ):
        check_fields({"x": ending})


def test_unknown_endings_and_no_fields_are_refused() -> None:
    with pytest.raises(UserError, match=r"image asks for \.gif members, which have no decoder; decoders"):
        check_fields({"image": "png|gif"})
    with pytest.raises(UserError, match="fields is empty"):
        check_fields({})
