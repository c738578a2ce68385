"""The embedded data set: 1,797 real handwritten digits, 8×8 grey, in ten classes.

They are the test part of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI Machine
Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0; see digits.LICENSE), as scikit-learn distributes
it. `digits.npz` was made from scikit-learn's digits.csv.gz (64 values of 0…16 and the label per line):

    images = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)    # halves go to even
    order = np.random.Generator(np.random.PCG64(1797)).permutation(1797)

Images and labels keep the order of that file. The split is `order`: its first 1,437 are for training, its
last 360 for testing. It is stored rather than drawn anew, so that no version of numpy can change it.
"""

from importlib.resources import files

import numpy as np

from onefold.data.listing import ArrayListing
from onefold.errors import UserError

DIGITS = ("digits", "digits:test")
_TRAIN = 1437


def list_digits(source: str, labels_from: str | None = None) -> ArrayListing:
    """List "digits", the 1,437 images for training, or "digits:test", the 360 for testing.

    `labels_from` None takes the labels, "none" leaves them out; anything else raises UserError.
    """
    if labels_from not in (None, "none"):
        raise UserError(f"--labels-from {labels_from}: the embedded digits have one kind of labels; leave it out")
    with (files("onefold.data") / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as data:
        images, labels, order = data["images"], data["labels"], data["order"]
    part = order[_TRAIN:] if source == "digits:test" else order[:_TRAIN]
    if labels_from == "none":
        return ArrayListing(source, images[part][..., None], np.zeros(len(part), dtype=np.int64), ())
    names = tuple(str(digit) for digit in range(10))
    return ArrayListing(source, images[part][..., None], labels[part].astype(np.int64), names)
