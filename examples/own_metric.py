"""A custom metric in an evaluation's record: the difference in mean brightness, in grey levels."""

from jaxtyping import UInt8
from torch import Tensor

import onefold


def brightness_error(real: UInt8[Tensor, "n C H W"], generated: UInt8[Tensor, "n C H W"]) -> float:
    """|mean of generated pixels − mean of real pixels|; 0 is best."""
    return abs(generated.float().mean() - real.float().mean()).item()


def main(run: str = "runs/digits", images: int = 1000) -> float:
    """Evaluate a run with it."""
    record = onefold.evaluate(onefold.load_run(run), images=images, metrics={"brightness_error": brightness_error})
    print(f"brightness error: {record['brightness_error']:.2f} grey levels")
    return record["brightness_error"]


if __name__ == "__main__":
    main()
