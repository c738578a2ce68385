import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo

from data_images import cut, encode, noise, png
from onefold.data.classes import classes_of, natural_key
from onefold.data.decode import decode, is_image, over_white, read_header
from onefold.data.layout import lay_out
from onefold.errors import UserError


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 4), ("P", 3), ("RGB", 3), ("RGBA", 4)])
def test_modes_become_grey_rgb_or_rgba(mode: str, channels: int):
    data = saved(Image.fromarray(noise(6, 5, 3)).convert(mode))
    assert decode(data).shape == (6, 5, channels) == read_header(data).shape
    assert decode(data).dtype == np.uint8


def test_one_bit_becomes_black_and_white():
    data = saved(Image.fromarray(noise(6, 5)).convert("1"))
    assert set(np.unique(decode(data))) == {0, 255}


def test_palettes_become_their_colours():
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[0, 0], pixels[1, 1] = (10, 200, 30), (1, 2, 3)
    image = Image.fromarray(pixels).quantize(4)
    assert np.array_equal(decode(saved(image)), pixels)


def test_transparent_palettes_lie_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    data = saved(image, transparency=bytes([0, 255]))
    assert decode(data).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert read_header(data).shape == (1, 2, 3)


def test_cmyk_becomes_rgb():
    data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert decode(data).shape == (8, 8, 3) == read_header(data).shape
    assert decode(data)[4, 4, 0] > 200 > 50 > decode(data)[4, 4, 1]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_stays(kind: str):
    alpha = noise(4, 4, 4)
    alpha[..., 3] |= 1  # fully transparent pixels have no colour in WebP
    assert np.array_equal(decode(encode(alpha, kind, **({"lossless": True} if kind == "WEBP" else {}))), alpha)


LEVELS = np.array([[0, 128, 129, 385], [386, 257 * 77, 65407, 65535]], dtype=np.uint16)
EIGHT = np.array([[0, 0, 1, 1], [2, 77, 255, 255]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_rounded_to_eight(kind: str):
    data = encode(LEVELS, kind)
    assert np.array_equal(decode(data)[..., 0], EIGHT)
    assert read_header(data) == ((2, 4, 1), True)
    assert not read_header(encode(noise(2, 4), kind)).is_deep


def deep_png(levels: np.ndarray, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with 16 bits per channel, which Pillow does not write in colour; `kind` 2 is RGB, 4 grey with alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(rows)),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (*parts, (b"IEND", b"")))


def test_sixteen_bits_of_colour_become_their_higher_byte():
    high, low = noise(4, 5, 3), noise(4, 5, 3, seed=1)
    levels = high.astype(np.uint16) * 256 + low
    data = deep_png(levels, 2)
    assert np.array_equal(decode(data), high)
    assert read_header(data) == ((4, 5, 3), True)
    grey_alpha = decode(deep_png(levels[..., :2], 4))
    assert np.array_equal(grey_alpha[..., [0, 1, 2, 3]], high[..., [0, 0, 0, 1]])


def test_sixteen_bits_of_colour_in_a_tiff():
    high = noise(2, 3, 3)
    pixels = (high.astype("<u2") * 256 + 7).tobytes()
    tags = [(256, 3, 1, 3), (257, 3, 1, 2), (258, 3, 3, 150), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 160)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    data = (b"II*\0" + struct.pack("<I", 8) + directory).ljust(150, b"\0") + struct.pack("<3H", 16, 16, 16)
    data = data.ljust(160, b"\0") + pixels
    assert read_header(data) == ((2, 3, 3), True)
    assert np.array_equal(decode(data), high)


def test_a_transparent_level_of_sixteen_bits():
    data = deep_png(LEVELS[..., None], 0, (b"tRNS", struct.pack(">H", 385)))
    assert read_header(data) == ((2, 4, 4), True)
    assert np.array_equal(decode(data)[..., 1], EIGHT)
    assert np.array_equal(decode(data)[..., 3], np.where(LEVELS == 385, 0, 255))
    colour = np.full((2, 2, 3), 0x1234, dtype=np.uint16)
    colour[0, 0] = 0x7766
    data = deep_png(colour, 2, (b"tRNS", struct.pack(">3H", *[0x7766] * 3)))
    assert decode(data)[..., 3].tolist() == [[0, 255], [255, 255]]


def test_deeper_pixels_are_refused():
    for data in (encode(noise(4, 4).astype(np.int32), "TIFF"), encode(noise(4, 4).astype(np.float32), "TIFF")):
        for read in (decode, read_header):
            with pytest.raises(ValueError, match="more than 16 bits per channel"):
                read(data)


@pytest.mark.parametrize(("mode", "hidden"), [("RGB", (255, 0, 255)), ("L", 7), ("1", 0)])
def test_a_transparent_colour_is_an_alpha_channel(mode: str, hidden: int | tuple[int, ...]):
    image = Image.new(mode, (3, 2), hidden)
    image.putpixel((1, 0), (1, 2, 3) if mode == "RGB" else 255)
    data = saved(image, transparency=hidden)
    assert read_header(data).shape == (2, 3, 4)
    assert decode(data)[..., 3].tolist() == [[0, 255, 0], [0, 0, 0]]
    assert decode(data)[0, 1, :3].tolist() == ([1, 2, 3] if mode == "RGB" else [255] * 3)
    plain = Image.fromarray(decode(data))
    assert np.asarray(over_white(plain))[1].tolist() == [[255] * 3] * 3


@pytest.mark.parametrize(
    ("kind", "exact"), [("GIF", False), ("TIFF", True), ("PPM", True), ("AVIF", False), ("JPEG2000", True)]
)
def test_other_formats_are_read(kind: str, exact: bool):
    if kind in ("AVIF", "JPEG2000") and not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}[kind]):
        pytest.skip(f"this Pillow has no {kind}")
    pixels = np.full((6, 5, 3), 100, dtype=np.uint8) if not exact else noise(6, 5, 3)
    data = encode(pixels, kind)
    assert read_header(data) == ((6, 5, 3), False)
    assert np.abs(decode(data).astype(int) - pixels).max() <= (0 if exact else 2)


def test_of_several_pictures_the_first_is_read():
    first, second = (Image.fromarray(np.full((4, 5, 3), level, dtype=np.uint8)) for level in (40, 200))
    for kind in ("GIF", "TIFF", "MPO", "PNG", "WEBP"):
        data = saved(first, kind, save_all=True, append_images=[second])
        assert read_header(data).shape == (4, 5, 3)
        assert np.abs(decode(data).astype(int) - 40).max() < 5


def test_transparency_of_a_gif_is_white():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for pixels in (grey, np.array([[9, 90]], dtype=np.uint8)):  # Pillow opens the former as grey
        data = encode(pixels, "GIF", transparency=9)
        assert read_header(data).shape == (*pixels.shape, 3)
        assert np.array_equal(decode(data)[..., 1], np.where(pixels == 9, 255, pixels))


def oriented(image: Image.Image, kind: str, exif: Image.Exif) -> bytes:
    """A file with the orientation where some program puts it."""
    form, _, place = kind.partition(" ")
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="{exif[0x0112]}"/></x:xmpmeta>'
    info = PngInfo()
    if place == "late":  # behind the pixels
        data, body = saved(image, form), exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        return data[:-12] + chunk + data[-12:]
    if place == "raw":  # as ImageMagick
        body = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
        info.add_text("Raw profile type exif", f"\nexif\n{len(body):8d}\n{body.hex()}\n", zip=True)
        return saved(image, form, pnginfo=info)
    if place == "xmp" and form == "PNG":
        info.add_itxt("XML:com.adobe.xmp", xmp)
        return saved(image, form, pnginfo=info)
    return saved(image, form, xmp=xmp.encode()) if place else saved(image, form, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "PNG late", "PNG raw", "JPEG xmp", "PNG xmp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_respected(kind: str, orientation: int):
    # The picture as it should be seen, as the camera stored it, has a white upper left quarter.
    seen = np.zeros((32, 64), dtype=np.uint8)
    seen[:16, :32] = 255
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.T,
        6: np.rot90(seen),
        7: seen[::-1, ::-1].T,
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    data = oriented(image, kind, exif)
    assert read_header(data).shape == (32, 64, 3)
    assert np.abs(decode(data)[..., 0].astype(int) - seen).max() < 20


def test_a_header_longer_than_its_head_is_still_read(tmp_path):
    from onefold.data import open_dataset

    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    profile = zlib.compress(noise(300_000).tobytes())
    image = Image.fromarray(noise(9, 7, 3))
    (tmp_path / "a.jpg").write_bytes(saved(image, "JPEG", exif=exif, icc_profile=profile))
    assert open_dataset(tmp_path).image_shape == (9, 7, 3)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_bytes_decode_alike_from_header_and_whole(tail: bytes, keep: int):
    """Whatever the damage, decoding either fails or gives the shape that the header promised."""
    data = png()[:keep] + tail
    try:
        pixels = decode(data)
    except Exception:
        return
    assert pixels.shape == read_header(data).shape


def test_other_formats_are_not_even_tried():
    for read in (decode, read_header):
        with pytest.raises(UnidentifiedImageError, match=r"^not a JPEG, PNG, .* or PPM image$"):
            read(encode(noise(4, 4), "PCX"))
        with pytest.raises(ValueError, match="the file is empty"):
            read(b"")


def test_the_head_of_a_file_tells_its_shape():
    data = png(200, 300)
    assert read_header(data[:100]).shape == (200, 300, 3)
    with pytest.raises(OSError, match="truncated"):
        decode(cut(data))


def test_over_white():
    pixels = np.array([[[0, 0, 0, 255], [9, 9, 9, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    assert np.asarray(over_white(Image.fromarray(pixels))).tolist() == [[[0] * 3, [255] * 3, [204] * 3]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", True),
        ("a/b.JPEG", True),
        ("a.b/c.webp", True),
        ("a.jfif", True),
        ("a/b.TIF", True),
        ("a.png/", False),
        ("a.txt", False),
        ("png", False),
        ("a/.b.png", False),
        (".a/b.png", False),
        ("__MACOSX/b.png", False),
    ],
)
def test_is_image(name: str, expected: bool):
    assert is_image(name) is expected


def test_natural_order():
    names = ["a10", "a2", "10", "9", "a", "", "b1c10", "b1c9", "01", "1", "٣"]
    assert sorted(names, key=natural_key) == ["", "01", "1", "9", "10", "a", "a2", "a10", "b1c9", "b1c10", "٣"]


@given(st.permutations([f"{c}/{k}.png" for c in ("a", "a b", "a10", "a9") for k in (1, 5, 10)]))
def test_arrange_does_not_depend_on_the_order_of_listing(names: list[str]):
    found, labels, class_names, *_ = lay_out("set", names, [], lambda name: b"")
    assert class_names == ("a", "a9", "a10", "a b") or class_names == tuple(sorted({*class_names}, key=natural_key))
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    expected = [f"{c}/{k}.png" for c in class_names for k in (1, 5, 10)]
    assert found == expected


@given(st.lists(st.integers(-50, 50), min_size=1))
def test_integer_labels_are_numbered_in_order(values: list[int]):
    labels, names = classes_of("set", len(values), values)
    assert [int(names[k]) for k in labels] == values
    assert [int(name) for name in names] == sorted(set(values))


@given(st.lists(st.sampled_from(["9", "10", "cat", "dog", "cat 2", "cat 10"]), min_size=1))
def test_words_as_labels_are_numbered_in_natural_order(values: list[str]):
    labels, names = classes_of("set", len(values), values)
    assert [names[k] for k in labels] == values
    assert list(names) == sorted(set(values), key=natural_key)
    as_bytes, names_of_bytes = classes_of("set", len(values), np.array(values, dtype="S"))
    assert names_of_bytes == names
    assert np.array_equal(as_bytes, labels)


@pytest.mark.parametrize("values", [np.array([0.5, 1.0]), np.ones((3, 3), dtype=int), [[1], [2, 3]]])
def test_other_labels_are_refused(values: np.ndarray | list[list[int]]):
    with pytest.raises(UserError, match="set: labels must be one integer or word per image"):
        classes_of("set", len(values), values)
