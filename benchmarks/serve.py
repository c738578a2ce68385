"""How fast `onefold serve` answers: images/s and latency at 1, 8 and 64 clients, and on the page, slider to image.

    python benchmarks/serve.py runs/digits-onestep --json-file docs/results/serve.json

The server is a process of its own, as users start it. Each client is a bare socket, which leaves the cores to the
server; it asks for one image, of a seed of its own, and asks again as soon as it has the answer. The first second does
not count. Beyond the number of requests that may wait, the server refuses: the last row, where twice as many clients as
places ask, counts how many. With `--page`, Chromium (Playwright) moves the slider of steps between 1 and 2 and waits
until all 16 images have changed; with `--pictures FOLDER`, it also draws the pictures of docs/serve.md.
"""

import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

import command
from timing import machine, table, write

__all__ = ["latencies", "load", "serving"]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
MOVES = 40
CHANGED = """async ([value, images]) => {
    const slider = document.querySelector("#generate [name=steps]");
    const shown = () => [...document.querySelectorAll("#generate .grid img")].map((img) => img.src);
    const before = shown(), start = performance.now();
    slider.value = value;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    while (!shown().every((src, k) => src !== before[k])) await new Promise(requestAnimationFrame);
    await Promise.all([...document.querySelectorAll("#generate .grid img")].map((img) => img.decode()));
    return performance.now() - start;
}"""


@contextlib.contextmanager
def serving(*runs: Path, waiting: int = 64) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "onefold", "serve", *map(str, runs), "--port", "0", "--waiting", str(waiting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            yield line.partition(": ")[0].rstrip("/")
        finally:
            process.terminate()


async def load(address: str, clients: int, seconds: float, warm_up: float = 1.0) -> tuple[list[float], list[int]]:
    """Latencies in seconds of all requests that were answered, and the statuses of those that were not."""
    times, failed = list[float](), list[int]()
    start = time.perf_counter() + warm_up

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        seed = 10_000 * number
        while (begun := time.perf_counter()) < start + seconds:
            writer.write(f"GET /api/images?steps=1&seed={seed} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            headers = dict(line.split(": ", 1) for line in head.splitlines()[1:-1])
            await reader.readexactly(int(headers["content-length"]))
            status, seed = int(head.split()[1]), seed + 1
            if status != 200:
                failed.append(status)
                await asyncio.sleep(float(headers.get("retry-after", 1)))
            elif begun >= start:
                times.append(time.perf_counter() - begun)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return times, failed


def latencies(times: list[float], failed: list[int], seconds: float) -> dict[str, float]:
    """Images per second, and the median and 99th percentile of the latency in seconds."""
    percentiles = statistics.quantiles(times, n=100)
    return {
        "images_per_second": len(times) / seconds,
        "p50": percentiles[49],
        "p99": percentiles[98],
        "requests": len(times) + len(failed),
        "failed": sum(status != 429 for status in failed),
        "refused": sum(status == 429 for status in failed),
    }


def moved(address: str) -> list[float]:
    """Seconds from a move of the slider of steps to all new images on the page, in Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#generate .grid img[src]")
        # From 2 steps to 1: what is timed ends with images of one step.
        times = [page.evaluate(CHANGED, [2 - k % 2, 16]) / 1000 for k in range(2 * MOVES)]
        browser.close()
    return times[1::2]


def draw(address: str, folder: Path) -> None:
    """The pictures of docs/serve.md: each panel, on a desktop and a phone, dark and light."""
    from playwright.sync_api import Page, sync_playwright

    def panel(page: Page, name: str, ready: str) -> None:
        page.click(f"#tab-{name}")
        if name == "image":
            page.click(".generated")
        page.wait_for_selector(f"#{name} {ready}")
        page.wait_for_timeout(700)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name, size, scheme in (
            ("desktop", (1000, 760), "light"),
            ("dark", (1000, 760), "dark"),
            ("phone", (390, 844), "light"),
        ):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(address)
            page.wait_for_selector("#generate .grid img[src]")
            if name != "dark":
                page.screenshot(path=folder / f"serve-{name}.png")
            if name == "dark":
                panel(page, "image", ".figures:not([hidden])")
                page.screenshot(path=folder / "serve-image.png")
                panel(page, "training", ".charts figure")
                page.screenshot(path=folder / "serve-training.png")
            if name == "desktop":
                panel(page, "compare", ".side:nth-child(2) .grid img[src]")
                page.screenshot(path=folder / "serve-compare.png")
            if name == "phone":
                panel(page, "interpolate", ".strip img[src]")
                page.focus("#interpolate [name=position]")
                for _ in range(8):
                    page.keyboard.press("ArrowRight")
                page.screenshot(path=folder / "serve-phone-interpolate.png")
            page.close()
        browser.close()


def main(
    run: Positional[Path],
    other: Positional[Path | None] = None,
    /,
    clients: tuple[int, ...] = (1, 8, 64),
    seconds: float = 20,
    page: bool = False,
    pictures: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Measure, print a table, and write all numbers.

    Args:
        run: A one-step run.
        other: Another run, for the picture in which the two are compared.
        clients: Numbers of clients.
        seconds: Of each measurement.
        page: Also measure the page in Chromium.
        pictures: Folder for the pictures of the documentation.
        json_file: Where to write all numbers.
    """
    found: dict[str, Any] = {**machine(torch.device("cpu")), "cores": os.cpu_count(), "clients": {}}
    with serving(run) as address:
        for count in clients:
            found["clients"][str(count)] = latencies(*asyncio.run(load(address, count, seconds)), seconds)
        if page:
            times = moved(address)
            found["page"] = {"moves": len(times), "p50": statistics.median(times), "most": max(times)}
    with serving(run, waiting=31) as address:
        found["overload"] = latencies(*asyncio.run(load(address, 64, seconds / 2)), seconds / 2)
    if pictures is not None:
        with serving(run, *([] if other is None else [other])) as address:
            draw(address, pictures)
    rows = [
        [
            name,
            f"{one['images_per_second']:,.0f}",
            f"{1e3 * one['p50']:.0f}",
            f"{1e3 * one['p99']:.0f}",
            *(f"{one[key]}" for key in ("failed", "refused")),
        ]
        for name, one in [*found["clients"].items(), ("64, of whom 31 may wait", found["overload"])]
    ]
    print(table(["clients", "images/s", "p50, ms", "p99, ms", "failed", "refused"], rows))
    if page:
        usual, most = (1e3 * found["page"][name] for name in ("p50", "most"))
        print(f"\npage: {usual:.0f} ms from slider to 16 images, at most {most:.0f}")
    write(found, json_file)


if __name__ == "__main__":
    command.run(main)
