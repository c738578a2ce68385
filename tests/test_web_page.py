"""The page of `onefold serve` in Chromium: every control is driven, with real runs behind it."""

import io
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from helpers_web import make_runs, pixels, png, publish
from onefold.training.loop import train
from onefold.web.app import create_app

try:
    from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
except ModuleNotFoundError:
    pytest.skip("playwright is not installed", allow_module_level=True)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)")
expect.set_options(timeout=30_000)  # on a busy machine


class Serving:
    """A server in a thread."""

    def __init__(self, *runs: Path, waiting: int = 64) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        app = create_app(*runs, waiting=waiting, device="cpu")
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()

    def __enter__(self) -> str:
        return self.address

    def __exit__(self, *ignored: object) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The one-step run and the plain one."""
    plain, fast = make_runs(tmp_path_factory.mktemp("page"))
    return fast, plain


@pytest.fixture(scope="module")
def address(runs: tuple[Path, Path]) -> Iterator[str]:
    with Serving(*runs) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that complains of nothing and asks nobody else."""
    page, complaints, asked = browser.new_page(), list[str](), list[str]()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    refused = re.compile(r"Failed to load resource: .*(4\d\d|ERR_FAILED)")  # which a test brings about
    assert [text for text in complaints if not refused.match(text)] == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []


def opened(page: Page, address: str, panel: str) -> Locator:
    page.goto(f"{address}#{panel}")
    found = page.locator(f"#{panel}")
    expect(found).to_be_visible()
    return found


def image_of(image: Locator) -> np.ndarray:
    return pixels((image.get_attribute("src") or "").partition(",")[2])


def asked(page: Page, path: str, **parameters: Any) -> list[np.ndarray]:
    """What the API gives to the same question."""
    answer = page.request.get(f"{page.url.split('#')[0]}api/{path}", params=parameters).json()
    return [pixels(each["png"]) for each in answer["images"]]


def slide(slider: Locator, value: float) -> None:
    """Move a slider as a hand does."""
    slider.evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def until(page: Page, holds: Callable[[], Any]) -> None:
    """Wait until something holds."""
    for _ in range(300):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never held")


def shows(panel: Locator, images: list[np.ndarray]) -> bool:
    found = [image_of(image) for image in panel.locator(".grid img").all()]
    return len(found) == len(images) and all((a == b).all() for a, b in zip(found, images, strict=True))


def downloaded(page: Page, link: Locator) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        link.click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


# --- generate ---------------------------------------------------------------------------------------------------------


def test_images_follow_the_controls(page: Page, address: str):
    panel = opened(page, address, "generate")
    facts = panel.locator(".facts")
    expect(facts).to_contain_text("16 images, 1 step (refine)")
    assert shows(panel, asked(page, "images", n=16))
    steps = panel.get_by_label("Steps")
    steps.focus()
    for _ in range(3):
        steps.press("ArrowRight")
    expect(facts).to_contain_text("16 images, 4 steps (refine)")
    assert shows(panel, asked(page, "images", n=16, steps=4))
    steps.press("End")
    expect(facts).to_contain_text("16 images, 50 steps")
    steps.press("Home")
    expect(facts).to_contain_text("16 images, 1 step")
    panel.get_by_label("Class").select_option("3")
    expect(panel.locator(".grid span").first).to_have_text("3")
    assert {image.get_attribute("alt") for image in panel.locator(".grid img").all()} == {
        f"seed {k}, class 3" for k in range(16)
    }
    panel.get_by_label("Class").select_option("no class")
    expect(panel.locator(".grid span").first).to_have_text("no class")
    slide(panel.get_by_role("slider", name="Images"), 1)
    expect(facts).to_contain_text("1 image,")
    expect(panel.locator(".grid.single img")).to_have_count(1)
    panel.get_by_label("Seed", exact=True).fill("77")
    expect(panel.locator("img")).to_have_attribute("alt", "seed 77, class no class")
    panel.get_by_role("button", name="Random").click()
    expect(panel.locator("img")).not_to_have_attribute("alt", "seed 77, class no class")
    seed = int(panel.get_by_label("Seed", exact=True).input_value())
    expect(panel.locator("img")).to_have_attribute("alt", f"seed {seed}, class no class")
    assert shows(panel, asked(page, "images", seed=seed, labels="none"))


def test_guidance_is_offered_where_it_acts(page: Page, address: str):
    panel = opened(page, address, "generate")
    expect(panel.locator(".facts")).to_contain_text("refine")
    expect(panel.get_by_label("Guidance")).to_be_disabled()
    panel.get_by_label("Solver").select_option("euler")
    expect(panel.get_by_label("Guidance")).to_be_enabled()
    slide(panel.get_by_label("Guidance"), 2.5)
    slide(panel.get_by_label("Steps"), 3)
    expect(panel.locator(".facts")).to_contain_text("3 steps (euler, guidance 2.5)")
    assert shows(panel, asked(page, "images", n=16, steps=3, solver="euler", guidance=2.5))
    panel.get_by_label("Run").select_option("plain")
    expect(panel.locator(".facts")).to_contain_text("2 steps (euler)")
    assert shows(panel, asked(page, "images", run=1, n=16))
    expect(panel.get_by_label("Solver").locator("option")).to_have_text(["euler", "heun"])


def test_of_many_moves_few_are_asked_and_the_last_is_shown(page: Page, address: str):
    panel = opened(page, address, "generate")
    expect(panel.locator(".facts")).to_contain_text("16 images")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if "api/images" in request.url else None)
    panel.get_by_label("Steps").evaluate(
        """async (slider) => {
            for (let steps = 1; steps <= 50; steps++) {
                slider.value = steps;
                slider.dispatchEvent(new Event("input", {bubbles: true}));
                await new Promise((done) => setTimeout(done, 4));
            }
        }"""
    )
    expect(panel.locator(".facts")).to_contain_text("50 steps")
    page.wait_for_timeout(300)
    expect(panel.locator(".facts")).to_contain_text("50 steps")
    assert shows(panel, asked(page, "images", n=16, steps=50))
    assert len(requests) < 40


def test_images_are_downloaded_with_their_origin(page: Page, address: str):
    panel = opened(page, address, "generate")
    expect(panel.locator(".facts")).to_contain_text("16 images")
    name, data = downloaded(page, panel.get_by_role("link", name="Download"))
    assert name == "onefold-seed0.png"
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["seeds"] == "0…15"


def test_an_image_is_enlarged_and_its_neighbours_are_reached(page: Page, address: str):
    panel, dialog = opened(page, address, "generate"), page.locator("dialog")
    panel.locator(".grid button").nth(2).click()
    expect(dialog.locator("figcaption")).to_have_text("seed 2, class 2")
    page.keyboard.press("ArrowRight")
    expect(dialog.locator("figcaption")).to_have_text("seed 3, class 3")
    assert (image_of(dialog.locator("img")) == image_of(panel.locator("img").nth(3))).all()
    assert dialog.locator("img").evaluate("(img) => getComputedStyle(img).imageRendering") == "pixelated"
    dialog.get_by_role("button", name="Next").click()
    dialog.get_by_role("button", name="Previous").click()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    expect(dialog.locator("figcaption")).to_have_text("seed 15, class 5")
    name, data = downloaded(page, dialog.get_by_role("link", name="Download"))
    assert name == "seed15.png"
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.info["seed"]) == ((8, 8), "15")
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()
    panel.locator(".grid button").first.press("Enter")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


@pytest.mark.parametrize("typed", ["-1", "1.5", "", "99999999999999999999"])
def test_a_wrong_seed_is_said_and_not_asked_for(page: Page, address: str, typed: str):
    panel = opened(page, address, "generate")
    expect(panel.locator(".facts")).to_contain_text("16 images")
    panel.get_by_label("Seed", exact=True).fill(typed)
    expect(panel.get_by_role("alert")).to_contain_text("Seed: ")
    panel.get_by_label("Seed", exact=True).fill("4")
    expect(panel.locator("img").first).to_have_attribute("alt", "seed 4, class 4")
    expect(panel.get_by_role("alert")).to_be_hidden()


def test_a_server_that_is_gone_is_said_until_it_is_back(page: Page, address: str):
    panel = opened(page, address, "generate")
    expect(panel.locator(".facts")).to_contain_text("16 images")
    page.route("**/api/**", lambda route: route.abort())
    panel.get_by_label("Class").select_option("5")
    expect(panel.get_by_role("alert")).to_contain_text("The server does not answer")
    expect(page.locator("#status")).to_contain_text("The server does not answer")
    page.unroute("**/api/**")
    panel.get_by_label("Class").select_option("6")
    expect(panel.locator("img").first).to_have_attribute("alt", "seed 0, class 6")
    expect(panel.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#status")).to_be_empty()


# --- the other panels -------------------------------------------------------------------------------------------------


def test_an_interpolation_is_scrubbed_and_played(page: Page, address: str):
    panel = opened(page, address, "interpolate")
    frame, position = panel.locator(".frame img"), panel.get_by_label("Position")
    expect(panel.locator(".facts")).to_contain_text("17 images")
    panel.get_by_label("To seed", exact=True).fill("9")
    panel.get_by_label("Class").select_option("2")
    slide(panel.get_by_label("Steps"), 2)
    expect(panel.locator(".facts")).to_contain_text("2 steps")
    expect(frame).to_have_attribute("alt", "the image of seed 0, class 2")
    frames = asked(page, "interpolation", seed=0, other=9, n=17, label="2", steps=2)
    assert (image_of(frame) == frames[0]).all()
    position.focus()
    page.keyboard.press("End")
    expect(frame).to_have_attribute("alt", "the image of seed 9, class 2")
    assert (image_of(frame) == frames[-1]).all()
    panel.locator(".strip button").nth(2).click()
    expect(frame).to_have_attribute("alt", "between seeds 0 and 9, class 2")
    assert (image_of(frame) == frames[4]).all()
    name, data = downloaded(page, panel.get_by_role("link", name="Download"))
    assert name == "seed0-9-4.png"
    assert (pixels(data) == frames[4]).all()
    panel.get_by_role("button", name="Play").click()
    expect(position).not_to_have_value("4")
    panel.get_by_role("button", name="Stop").click()
    at = position.input_value()
    page.wait_for_timeout(300)
    assert position.input_value() == at
    panel.get_by_role("button", name="Random: from seed").click()
    expect(panel.locator(".strip img").first).not_to_have_attribute("alt", "seed 0, class 2")
    panel.get_by_role("button", name="Random: to seed").click()
    expect(panel.locator(".strip img").last).not_to_have_attribute("alt", "seed 9, class 2")


def test_an_uploaded_image_is_reconstructed_and_noised_live(page: Page, address: str, tmp_path: Path):
    panel = opened(page, address, "image")
    expect(panel.locator(".hint")).to_be_visible()
    photo = np.zeros((60, 90, 3), np.uint8)
    photo[10:50, 30:60] = (250, 40, 40)
    (tmp_path / "photo.png").write_bytes(png(photo))
    panel.get_by_label("Image file").set_input_files(tmp_path / "photo.png")
    parts = {
        name: panel.locator(f"[data-part={name}]") for name in ("original", "reconstruction", "noised", "denoised")
    }
    expect(panel.locator(".psnr")).to_contain_text("dB")
    assert image_of(parts["original"]).shape == (8, 8, 1)
    before = {name: image_of(part) for name, part in parts.items()}
    sizes: list[int] = []
    page.on("request", lambda request: sizes.append(len(request.post_data_buffer or b"")))
    slide(panel.get_by_label("Time t"), 1)
    until(page, lambda: (image_of(parts["noised"]) == before["reconstruction"]).all())
    assert sizes
    assert max(sizes) < 400, "from then on the small image is sent"
    for name in ("original", "reconstruction"):
        assert (image_of(parts[name]) == before[name]).all()
    slide(panel.get_by_label("Time t"), 0.2)
    until(page, lambda: (image_of(parts["noised"]) != before["reconstruction"]).any())
    for change in ("Random", "Class", "Steps"):
        source = panel.locator("[data-part=resampled]").get_attribute("src") or ""
        if change == "Random":
            panel.get_by_role("button", name="Random").click()
        elif change == "Class":
            panel.get_by_label("Class").select_option("8")
        else:
            slide(panel.get_by_label("Steps from t to 1"), 2)
        expect(panel.locator("[data-part=resampled]")).not_to_have_attribute("src", source)
    original = parts["original"].get_attribute("src") or ""
    panel.get_by_role("button", name="Take a generated image").click()
    expect(parts["original"]).not_to_have_attribute("src", original)
    (tmp_path / "notes.txt").write_text("no image")
    panel.get_by_label("Image file").set_input_files(tmp_path / "notes.txt")
    expect(panel.get_by_role("alert")).to_contain_text("image: cannot be read")
    (tmp_path / "huge.png").write_bytes(bytes(9 * 2**20))
    panel.get_by_label("Image file").set_input_files(tmp_path / "huge.png")
    expect(panel.get_by_role("alert")).to_have_text("huge.png: more than 8 MiB; choose a smaller file")


def test_two_runs_are_compared_at_the_same_seeds(page: Page, address: str):
    panel = opened(page, address, "compare")
    first, second = panel.locator(".side").all()
    expect(first.locator(".facts")).to_contain_text("16 images, 1 step (refine)")
    expect(second.locator(".facts")).to_contain_text("16 images, 2 steps (euler)")
    expect(first.locator("h2")).to_have_text("fast")
    slide(second.get_by_label("Steps"), 5)
    panel.get_by_label("Seed", exact=True).fill("30")
    for side in (first, second):
        expect(side.locator("img").first).to_have_attribute("alt", "seed 30, class 0")
    expect(second.locator(".facts")).to_contain_text("5 steps")
    assert shows(first, asked(page, "images", n=16, seed=30))
    assert shows(second, asked(page, "images", run=1, n=16, seed=30, steps=5))
    slide(panel.get_by_role("slider", name="Images"), 4)
    panel.get_by_role("button", name="Random").click()
    for side in (first, second):
        expect(side.locator("img")).to_have_count(4)
    expect(second.locator("img").first).not_to_have_attribute("alt", "seed 30, class 0")
    second.locator("button").nth(1).click()
    expect(page.locator("dialog")).to_be_visible()


def test_who_is_told_to_come_again_does(page: Page, runs: tuple[Path, Path]):
    """Nobody may wait, and the two sides ask at once."""
    with Serving(*runs, waiting=0) as busy:
        panel = opened(page, busy, "compare")
        for side in panel.locator(".side").all():
            expect(side.locator(".facts")).to_contain_text("16 images")
            expect(side.get_by_role("alert")).to_be_hidden()
        page.goto("about:blank")  # which lets go of its connections


def test_a_run_is_watched_while_it_trains(page: Page, runs: tuple[Path, Path], tmp_path: Path):
    own = Path(shutil.copytree(runs[1], tmp_path / "own"))
    with Serving(own) as address:
        panel = opened(page, address, "training")
        expect(page.get_by_role("tab", name="Compare")).to_be_hidden()
        expect(panel.locator(".stands")).to_have_text("Finished, 160 images.")
        picture, samples = panel.get_by_label("Images seen"), panel.locator(".samples")
        expect(samples).to_have_attribute("alt", "Samples at 160 images")
        assert samples.evaluate("(img) => img.decode().then(() => img.naturalWidth)") > 100
        line = panel.get_by_role("img", name=re.compile("^denoising: ")).locator("path")
        expect(line).to_be_visible()
        before = line.get_attribute("d") or ""
        picture.focus()
        picture.press("Home")
        assert not panel.get_by_label("Follow the newest").is_checked()
        panel.get_by_label("Follow the newest").check()
        expect(samples).to_have_attribute("alt", "Samples at 160 images")
        train(None, own, resume=True, images=320, quiet=True)
        expect(panel.locator(".stands")).to_contain_text("320 images")
        expect(samples).to_have_attribute("alt", "Samples at 320 images")
        expect(panel.locator(".reconstructions")).to_have_attribute("alt", re.compile("at 320 images"))
        expect(line).not_to_have_attribute("d", before)
        page.get_by_role("tab", name="Generate").click()
        images = page.locator("#generate")
        expect(images.locator(".facts")).to_contain_text("16 images")
        source = images.locator("img").first.get_attribute("src") or ""
        publish(own, seed=5)
        expect(images.locator("img").first).not_to_have_attribute("src", source)
        page.goto("about:blank")


# --- for everybody ----------------------------------------------------------------------------------------------------

PANELS = ("generate", "interpolate", "image", "compare", "training")


def test_tabs_are_reached_by_keyboard_and_by_address(page: Page, address: str):
    opened(page, address, "generate")
    page.get_by_role("tab", name="Generate").focus()
    for panel in (*PANELS[1:], "generate"):
        page.keyboard.press("ArrowRight")
        expect(page.locator(f"#{panel}")).to_be_visible()
        expect(page.locator("[role=tabpanel]:visible")).to_have_count(1)
        assert page.url.endswith(f"#{panel}")
        assert page.evaluate("document.activeElement.getAttribute('aria-controls')") == panel
    page.keyboard.press("End")
    expect(page.locator("#training")).to_be_visible()
    page.reload()
    expect(page.locator("#training")).to_be_visible()


@pytest.mark.parametrize("width", [360, 1200])
def test_every_control_has_a_name_and_nothing_leaves_the_screen(page: Page, address: str, width: int):
    page.set_viewport_size({"width": width, "height": 800})
    for panel in PANELS:
        opened(page, address, panel)
        if panel == "image":
            page.get_by_role("button", name="Take a generated image").click()
            expect(page.locator(".figures")).to_be_visible()
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, a, img, progress")]
                .filter((each) => each.checkVisibility())
                .filter((each) => !(each.labels?.length || each.ariaLabel || each.textContent.trim() || each.alt))
                .map((each) => each.outerHTML)"""
        )
        assert nameless == [], panel
        assert page.evaluate("document.documentElement.scrollWidth") <= width, panel


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_dark_and_light(page: Page, address: str, scheme: str):
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    opened(page, address, "generate")

    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return max(map(int, re.findall(r"\d+", colour)[:3]))

    assert (brightness() > 128) == (scheme == "light")
    page.locator("#theme").click()
    assert (brightness() > 128) == (scheme == "dark")
    page.reload()
    assert (brightness() > 128) == (scheme == "dark"), "which the browser keeps"


def test_the_api_is_described(page: Page, address: str):
    opened(page, address, "generate")
    page.get_by_role("link", name="API").click()
    expect(page.get_by_role("heading", name="GET /api/images", exact=True)).to_be_visible()
    page.get_by_role("link", name="Pictures").first.click()
    assert page.url.endswith("/docs#Pictures")


def test_a_run_whose_network_is_missing_is_waited_for(page: Page, runs: tuple[Path, Path], tmp_path: Path):
    own = Path(shutil.copytree(runs[1], tmp_path / "own"))
    (own / "model").rename(own / "aside")
    with Serving(own) as address:
        panel = opened(page, address, "generate")
        expect(panel.get_by_role("alert")).to_contain_text("no model yet")
        (own / "aside").rename(own / "model")
        expect(panel.locator(".facts")).to_contain_text("16 images")
        expect(panel.get_by_role("alert")).to_be_hidden()
        page.goto("about:blank")
