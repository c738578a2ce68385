"""Follow a training from Python: a callback receives each line of the log, e.g. for a custom logger."""

from typing import Any

import onefold


def main(out: str = "runs/logged", images: int = 12_800) -> list[dict[str, Any]]:
    """Print the denoising loss as it falls."""
    lines: list[dict[str, Any]] = []

    def follow(run: onefold.Run, line: dict[str, Any]) -> None:
        lines.append(line)
        print(f"{run.folder}: {line['images']:,} images, denoising {line['denoising']:.4f}")

    onefold.train(onefold.recipe("digits", **{"training.images": images}), out, callbacks=[follow], quiet=True)
    return lines


if __name__ == "__main__":
    main()
