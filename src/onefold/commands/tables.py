"""Tables and lines for people at a terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onefold.errors import printable, quoted

if TYPE_CHECKING:
    from onefold.estimate import Estimate
    from onefold.training.config import Config
    from onefold.training.run import Run

__all__ = ["duration", "show_estimate", "show_record", "show_run"]

DEVICES = (8, 64)
"""Numbers of devices for which `show_estimate` divides the time of one."""


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def show_run(console: Console, run: "Run") -> None:
    """What a finished training leaves."""
    history = run.history
    if history:
        last = history[-1]
        names = ("reconstruction", "denoising", "ratio", "student")
        losses = "  ".join(f"{name} {last[name]:.4f}" for name in names if last.get(name) is not None)
        speed = _speed_of(history)
        shown = (f"{last['images']:,} images", losses, "" if speed is None else f"{speed:,.0f} images/s on average")
        console.print("; ".join(part for part in shown if part))
    for caution in _cautions(run):
        console.print(caution)
    from onefold import evaluation  # only here, since it loads torch

    train, test = run.open_data()
    measurable = len(train) >= evaluation.LEAST_IMAGES and len(test) >= evaluation.LEAST_TEST_IMAGES
    following = f"onefold {'evaluate' if measurable else 'sample'} {quoted(run.folder)}"
    console.print(printable(f"run: {run.folder}; pictures: {run.folder / 'samples'}; next: {following}"))


def _speed_of(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Images per second over a whole log, compilation and slow beginnings included, pictures and checkpoints not."""
    images, seconds, before = 0, 0.0, 0
    for line in history:
        speed = line.get("images_per_second")
        if speed:
            images += line["images"] - before
            seconds += (line["images"] - before) / speed
        before = line["images"]
    return images / seconds if seconds else None


def _cautions(run: "Run") -> list[str]:
    """What a short run cannot show."""
    training, history = run.config.training, run.history
    found: list[str] = []
    if run.length <= training.warmup:
        found.append(
            f"Too short to judge: its {run.length:,} images end within the warm-up of {training.warmup:,}, before the "
            "learning rate is what it should be; --images makes it longer"
        )
    if len(history) < 2:
        found.append(f"One line of the log: no curves; --training.log-every is {training.log_every:,} images")
    elif sum(bool(line.get("health") or line.get("onestep")) for line in history) == 1:
        found.append(
            f"Health was measured once, so that nothing is known of its course; --training.health-every is "
            f"{training.health_every:,} images"
        )
    return found


def show_record(console: Console, record: Mapping[str, Any]) -> None:
    """The numbers of an evaluation, each with what it would be for real images and, of few, what it rests on."""
    frechet, protocol, few = record["frechet"], record["protocol"], record.get("few", {})
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "generated", "real", "note"):
        table.add_column(column, justify="left" if column in ("", "note") else "right")

    def row(name: str, value: str, real: str = "", note: str = "", *, of: str = "") -> None:
        """`of`: the name of the number in the record."""
        table.add_row(name, value, real, "; ".join(part for part in (note, few.get(of, "")) if part))

    matched, halves = f"{frechet['matched']:.2f}", f"{frechet['halves']:.2f}"
    row("Fréchet distance", matched, halves, f"of {protocol['real_images'] // 2:,} to as many; see below")
    whole = f"of {protocol['generated_images']:,} to all"
    floor = f"{frechet['floor']:.2f}"
    row("", f"{record['frechet_distance']:.2f}", floor, f"{whole}; real: fresh images", of="frechet_distance")
    row("kernel distance (KID)", f"{record['kid']:.4f}", "0", f"± {record['kid_error']:.4f}", of="kid")
    if "class_accuracy" in record:
        accuracy = record["class_accuracy"], record["class_accuracy_real"]
        row("class accuracy", f"{accuracy[0]:.3f}", f"{accuracy[1]:.3f}", _intervals(record))
    row("precision", f"{record['precision']:.3f}", of="precision")
    row("recall", f"{record['recall']:.3f}", of="recall")
    if "test" in record:
        _test_rows(record["test"], protocol, row)
    if record["memorisation"] is not None:
        share = f"{record['memorisation']['share']:.3f}"
        row("copies of training images", share, "0.050", "share; 0.050 by chance", of="memorisation")
    reconstruction, latent = record["reconstruction"], record["latent"]
    which = "test images" if "test" in protocol["split"] else "training images"
    row("reconstruction PSNR", f"{reconstruction['psnr']:.2f} dB", note=which, of="reconstruction")
    row("reconstruction SSIM", f"{reconstruction['ssim']:.4f}", "1", of="reconstruction")
    distance = f"{reconstruction['frechet_distance']:.2f}"
    row("reconstruction Fréchet", distance, "0", of="reconstruction.frechet_distance")
    row("latent effective rank", f"{latent['effective_rank']:.2f}", note="per token", of="latent")
    row("latent std", f"{latent['std']:.2f}", note=f"{latent['numbers_per_pixel_value']:.2f} values per pixel value")
    row(
        "sampling",
        f"{record['images_per_second']:.1f}/s",
        note=f"{protocol['steps']} step{'s' * (protocol['steps'] > 1)}",
    )
    console.print(table)
    console.print(printable(f"Features: {protocol['extractor']}."))
    if "spaces" in record:
        console.print(_spaces_table(record["spaces"], few))
    if frechet["ratio"] is None:
        console.print("The real images are all alike: there is nothing to measure a distance by.")
    else:
        console.print(
            f"The Fréchet distance is {frechet['ratio']:.2f} times that between two halves of the real images."
        )
    if "selection" in few:
        console.print(f"The published weights were selected by {few['selection']}.")
    if few:
        console.print("Numbers with a count in their note rest on few images; see docs/metrics.md.")


def _spaces_table(spaces: Mapping[str, Mapping[str, Any]], few: Mapping[str, str]) -> Table:
    """The same numbers in further feature spaces, a column for each."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("in other features")
    rows: dict[str, list[str]] = {}
    for name, numbers in spaces.items():
        table.add_column(Text(printable(name)), justify="right")
        shown = {
            "Fréchet distance": f"{numbers['frechet_distance']:.2f}",
            "  of fresh images": f"{numbers['frechet']['floor']:.2f}",
            "kernel distance (KID)": f"{numbers['kid']:.4f} ± {numbers['kid_error']:.4f}",
            "precision": f"{numbers['precision']:.3f}",
            "recall": f"{numbers['recall']:.3f}",
        }
        if "test" in numbers:
            test = numbers["test"]
            shown |= {"against test images: Fréchet": f"{test['frechet_distance']:.2f}"}
            shown |= {"  of training images": f"{test['floor']:.2f}"}
        shown["reconstruction Fréchet"] = f"{numbers['reconstruction']['frechet_distance']:.2f}"
        if f"spaces.{name}.frechet_distance" in few:
            shown["few images: distances too large"] = "yes"
        for row, value in shown.items():
            rows.setdefault(row, [""] * len(spaces))[list(spaces).index(name)] = value
    for row, values in rows.items():
        table.add_row(row, *values)
    return table


def _test_rows(test: Mapping[str, float], protocol: Mapping[str, Any], row: Callable[..., None]) -> None:
    """Against the test images, with training images as the real ones."""
    made, tested = protocol["generated_images"], protocol["test_images"]
    note = f"of {made:,} to {tested:,}; real: training images"
    distance, floor = f"{test['frechet_distance']:.2f}", f"{test['floor']:.2f}"
    row("against test images: Fréchet", distance, floor, note, of="test.frechet_distance")
    row("  kernel distance (KID)", f"{test['kid']:.4f}", "0", f"± {test['kid_error']:.4f}", of="test.kid")
    for name in ("precision", "recall"):
        row(f"  {name}", f"{test[name]:.3f}", note=f"of {min(made, tested):,} to as many", of=f"test.{name}")


def _intervals(record: Mapping[str, Any]) -> str:
    """Where the accuracies lie at 95 %, given the numbers of images."""
    texts = ["{:.2f} to {:.2f}".format(*record[f"class_accuracy{which}_interval"]) for which in ("", "_real")]
    return f"at 95 %: {texts[0]}; real {texts[1]}"


def show_estimate(console: Console, name: str, config: "Config", cost: "Estimate") -> None:
    """What a recipe costs."""
    from onefold.data.messages import count_text  # only here, since it loads torch

    table = Table(box=None, pad_edge=False, show_header=False)
    network = config.network
    size = f"{network.image_size[0]}×{network.image_size[1]}×{network.channels}"
    table.add_row("recipe", f"{name}: images of {size} as {network.tokens} tokens × {network.latent_channels}")
    shared = f", {100 * cost.share:.1f} % of them serve all three roles" if cost.share else ""
    table.add_row("parameters", f"{cost.parameters / 1e6:,.2f}M{shared}")
    if network.kind.learns_codec:
        table.add_row("latent", f"{cost.latent_ratio:.3f} values per value of the image")
    total = cost.flops_per_image * cost.images / 1e15
    per_image = f"{cost.flops_per_image / 1e9:,.2f} GFLOP per image"
    table.add_row("training", f"{per_image}, {cost.images:,} images, {total:,.2f} PFLOP in all")
    table.add_row("sampling", f"{cost.flops_per_sample / 1e9:,.2f} GFLOP per image ({count_text(cost.steps, 'step')})")
    table.add_row("state", f"{cost.state_bytes / 2**30:,.2f} GiB: weights, gradients, optimizer, averages")
    measured = cost.measured
    if measured is not None and cost.seconds is not None:
        compiled = "compiled" if measured.compiled else "not compiled"
        speed = f"{measured.images_per_second:,.1f} images/s"
        table.add_row("measured", f"{speed} on {measured.device}, {measured.precision}, {compiled}")
        sizes = f"{count_text(measured.batch)}, {measured.micro_batch:,} in a pass"
        table.add_row("a step", f"{sizes}; peak memory {measured.peak_memory / 2**30:,.2f} GiB")
        fits = "not known: growth or free memory cannot be seen"
        if measured.largest_micro_batch is not None and measured.bytes_per_image is not None:
            each = f"{measured.bytes_per_image / 2**20:,.1f} MiB each"
            largest = count_text(measured.largest_micro_batch)
            if measured.largest_micro_batch >= measured.batch:
                largest = f"the whole batch (there is room for {largest})"
            fits = f"{largest}, {each}"
        table.add_row("largest micro-batch", fits)
        now = ", on this machine, as busy as it is now" if measured.busy else ""
        table.add_row("expected time", f"{duration(cost.seconds)} for {cost.images:,} images{now}")
        fleet = ", ".join(f"{duration(cost.seconds / count)} on {count}" for count in DEVICES)
        table.add_row("more such devices", f"{fleet}, if communication cost nothing")
        if not measured.compiled:
            table.add_row("", "a compiled run is faster: --training.compile yes measures it")
        if measured.graphs:
            table.add_row("", "recorded steps are faster than these; their memory is counted above, not measured")
    console.print(table)
