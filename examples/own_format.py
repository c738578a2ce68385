"""A custom file format: a reader for .raw8 files, which have eight bytes of header and then the pixels."""

import struct
from pathlib import Path

import numpy as np

import onefold


def read_raw8(name: str, path: Path) -> np.ndarray:
    """All images of a file: their number and side, two little-endian integers, then uint8 pixels, row by row."""
    content = path.read_bytes()
    count, side = struct.unpack("<II", content[:8])
    if len(content) != 8 + count * side**2:
        raise onefold.UserError(f"{name}: is truncated; copy it again")
    return np.frombuffer(content, np.uint8, offset=8).reshape(count, side, side, 1)


onefold.data.register_reader(".raw8", read_raw8)


def main(out: str = "runs/raw8", images: int = 6_400) -> onefold.Run:
    """Write such a file and train on it by name."""
    source = Path(out).with_suffix(".raw8")
    source.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 4, 4), np.uint8).repeat(2, 1).repeat(2, 2)
    source.write_bytes(struct.pack("<II", 100, 8) + pixels.tobytes())
    config = onefold.recipe("digits", **{"training.images": images, "data.source": str(source), "data.test": None})
    return onefold.train(config, out)


if __name__ == "__main__":
    main()
