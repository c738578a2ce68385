"""Train on a Python object: anything with image_shape, classes, len() and [i] -> (uint8 image, label)."""

import numpy as np

import onefold


class Stripes:
    """Grey 8×8 images of horizontal (0) and vertical (1) stripes, drawn on demand."""

    image_shape = (8, 8, 1)
    classes = 2
    class_names = ("horizontal", "vertical")

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        rng, label = np.random.default_rng([self.seed, index]), index % 2
        wave = np.sin(np.arange(8) * rng.uniform(0.5, 3) + rng.uniform(0, 6))
        image = np.broadcast_to(wave if label else wave[:, None], (8, 8))
        return (127.5 * (image[..., None] + 1)).round().astype(np.uint8), label


def main(out: str = "runs/stripes", images: int = 12_800) -> onefold.Run:
    """Train and sample both classes."""
    config = onefold.recipe("digits", **{"training.images": images})
    run = onefold.train(config, out, data=Stripes(1000), test_data=Stripes(100, seed=1))
    print(run.network.sample(2, labels=[0, 1], steps=10).shape)
    return run


if __name__ == "__main__":
    main()
