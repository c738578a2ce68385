"""How shapes and numbers are said in messages: height before width, as in (H, W, C), and one image, two images."""

from onefold.data.decode import Shape

_CHANNEL_NAMES = {1: "grey", 3: "RGB", 4: "RGBA"}


def shape_text(shape: Shape) -> str:
    """Say (H, W, C) as height × width and the kind of channels, such as "480×640 RGB"."""
    height, width, channels = shape
    return f"{height}×{width} {channels_text(channels)}"


def channels_text(channels: int) -> str:
    return _CHANNEL_NAMES.get(channels, f"{channels} channels")


def counted(number: int, noun: str = "image") -> str:
    """Say a number of things, such as "1 image" or "1,437 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
