import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from data_images import cut, encode, noise, png
from onefold.data.classes import natural_key, number_labels, order_by_class
from onefold.data.decode import decode, header_shape, is_image, over_white
from onefold.errors import UserError


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 4), ("P", 3), ("RGB", 3), ("RGBA", 4)])
def test_modes_become_grey_rgb_or_rgba(mode: str, channels: int):
    data = saved(Image.fromarray(noise(6, 5, 3)).convert(mode))
    assert decode(data).shape == (6, 5, channels) == header_shape(data)
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
    assert header_shape(data) == (1, 2, 3)


def test_cmyk_becomes_rgb():
    data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert decode(data).shape == (8, 8, 3) == header_shape(data)
    assert decode(data)[4, 4, 0] > 200 > 50 > decode(data)[4, 4, 1]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_sixteen_bits_and_alpha(kind: str):
    if kind == "PNG":
        with pytest.raises(ValueError, match="more than 8 bits"):
            decode(encode(noise(4, 4).astype(np.uint16)))
        with pytest.raises(ValueError, match="more than 8 bits"):
            header_shape(encode(noise(4, 4).astype(np.uint16)))
    alpha = noise(4, 4, 4)
    alpha[..., 3] |= 1  # fully transparent pixels have no colour in WebP
    assert np.array_equal(decode(encode(alpha, kind, **({"lossless": True} if kind == "WEBP" else {}))), alpha)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
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
    data = saved(image, kind, exif=exif)
    assert header_shape(data) == (32, 64, 3)
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
    assert pixels.shape == header_shape(data)


def test_other_formats_are_not_even_tried():
    for read in (decode, header_shape):
        with pytest.raises(UnidentifiedImageError, match=r"^not a JPEG, PNG, WebP or BMP image$"):
            read(encode(noise(4, 4), "GIF"))
        with pytest.raises(ValueError, match="the file is empty"):
            read(b"")


def test_the_head_of_a_file_tells_its_shape():
    data = png(200, 300)
    assert header_shape(data[:100]) == (200, 300, 3)
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
    order, labels, class_names = order_by_class("set", names)
    assert class_names == ("a", "a9", "a10", "a b") or class_names == tuple(sorted({*class_names}, key=natural_key))
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    expected = [f"{c}/{k}.png" for c in class_names for k in (1, 5, 10)]
    assert [names[k] for k in order] == expected


@given(st.lists(st.integers(-50, 50), min_size=1))
def test_integer_labels_are_numbered_in_order(values: list[int]):
    labels, names = number_labels("set", values)
    assert [int(names[k]) for k in labels] == values
    assert [int(name) for name in names] == sorted(set(values))


@given(st.lists(st.sampled_from(["9", "10", "cat", "dog", "cat 2", "cat 10"]), min_size=1))
def test_words_as_labels_are_numbered_in_natural_order(values: list[str]):
    labels, names = number_labels("set", values)
    assert [names[k] for k in labels] == values
    assert list(names) == sorted(set(values), key=natural_key)
    as_bytes, names_of_bytes = number_labels("set", np.array(values, dtype="S"))
    assert names_of_bytes == names
    assert np.array_equal(as_bytes, labels)


@pytest.mark.parametrize("values", [np.array([0.5, 1.0]), np.eye(3, dtype=int), [[1], [2, 3]]])
def test_other_labels_are_refused(values: np.ndarray | list[list[int]]):
    with pytest.raises(UserError, match="set: labels must be one integer or word per image"):
        number_labels("set", values)
