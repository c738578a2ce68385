"""The API of `onefold serve`, in front of real networks."""

import asyncio
import base64
import io
import json
import math
import re
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import onefold
import onefold.sampling
from conftest import randomised
from helpers_web import make_runs, pixels, png, publish, stacked
from onefold.networks.base import Network, NetworkConfig, build
from onefold.reconstruction import reconstruct
from onefold.web import generation, schema
from onefold.web.app import create_app
from onefold.web.served import Served
from onefold.web.turns import Busy, Stopped, Turns


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_runs(tmp_path_factory.mktemp("web"))


@pytest.fixture(scope="module")
def client(runs: tuple[Path, Path]) -> Iterator[TestClient]:
    with TestClient(create_app(*runs, device="cpu")) as client:
        yield client


def served(source: object, **options: Any) -> TestClient:
    return TestClient(create_app(source, device="cpu", **options))  # type: ignore[arg-type]


def answer(client: TestClient, path: str, code: int = 200, **parameters: Any) -> Any:
    response = client.get(f"/api/{path}", params=parameters)
    assert response.status_code == code, response.text
    return response.json()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """The same images, up to rounding."""
    return a.shape == b.shape and bool((abs(a.astype(int) - b.astype(int)) <= 1).all())


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [0, 1])
@pytest.mark.parametrize("steps", [None, 1, 2, 50])
def test_images_are_those_of_the_network(client: TestClient, runs: tuple[Path, Path], run: int, steps: int | None):
    wanted = {"n": 3, "seed": 5, "labels": ["3", "7", "none"]} | ({"steps": steps} if steps else {})
    found = answer(client, "images", run=run, **wanted)
    network = Network.from_pretrained(runs[run])
    expected = network.sample(3, seed=5, labels=[3, 7, 10], steps=steps)
    assert close(stacked(found), expected)
    assert (expected[0] != expected[1]).any()
    assert found["steps"] == (steps or network.sampler.steps)
    assert [(image["seed"], image["label"], image["name"]) for image in found["images"]] == [
        (5, 3, "3"),
        (6, 7, "7"),
        (7, 10, "no class"),
    ]


def test_one_label_is_that_of_all_images_and_without_any_classes_take_turns(client: TestClient):
    assert [image["label"] for image in answer(client, "images", n=3, labels="4")["images"]] == [4, 4, 4]
    assert [image["label"] for image in answer(client, "images", n=3, seed=9)["images"]] == [9, 0, 1]


def test_a_png_says_what_it_is_of(client: TestClient):
    found = answer(client, "images", run=1, seed=7, labels="3")["images"][0]
    with Image.open(io.BytesIO(base64.b64decode(found["png"]))) as image:
        assert image.info == {
            "network": "fast", "steps": "1", "guidance": "1.0", "solver": "refine", "seed": "7", "label": "3",
            "class": "3",
        }  # fmt: skip


def test_the_grid_holds_the_same_images(client: TestClient):
    one = client.get("/api/images.png", params={"seed": 3})
    assert one.headers["content-type"] == "image/png"
    assert 'filename="onefold-seed3.png"' in one.headers["content-disposition"]
    images = stacked(answer(client, "images", n=4, seed=3))
    assert close(pixels(one.content)[None], images[:1])
    four = pixels(client.get("/api/images.png", params={"seed": 3, "n": 4}).content)
    assert four.shape == (99, 99, 1), "2 × 2 images of 48 pixels, and lines between"
    assert close(four[4:49:6, 4:49:6][None], images[:1])


def test_guidance_acts_where_it_can(client: TestClient):
    guided, plain = (stacked(answer(client, "images", n=2, steps=3, guidance=w)) for w in (3, 1))
    assert (guided != plain).any()
    said = answer(client, "images", 422, run=1, guidance=3)["detail"]
    assert said.startswith("guidance: 3 cannot guide a one-step generator")
    assert answer(client, "images", run=1, guidance=3, solver="euler", steps=2)["guidance"] == 3


@pytest.mark.parametrize(("run", "steps", "solver"), [(0, 3, "euler"), (1, 1, "refine"), (1, 4, "refine")])
def test_an_interpolation_leads_from_one_seed_to_the_other(client: TestClient, run: int, steps: int, solver: str):
    wanted = {"run": run, "steps": steps, "solver": solver}
    found = answer(client, "interpolation", seed=4, other=11, n=5, label="2", **wanted)
    frames = stacked(found)
    for k, seed in ((0, 4), (-1, 11)):
        end = stacked(answer(client, "images", seed=seed, labels="2", **wanted))
        assert close(frames[k][None], end)
    assert (frames[0] != frames[2]).any()
    assert (frames[2] != frames[-1]).any()
    assert {image["label"] for image in found["images"]} == {2}
    assert {image["label"] for image in answer(client, "interpolation", seed=4)["images"]} == {4}


def test_noise_between_two_seeds_is_standard_normal_too():
    drawn = generation.noises_between((3, 8), 5, (100, 100))
    for _ in range(2):  # what a solver draws on its way as well
        noise = next(drawn)
        assert torch.allclose(noise.std((1, 2)), torch.ones(5), atol=0.03)
    first, last = (next(onefold.sampling.noises([seed], (100, 100)))[0] for seed in (3, 8))
    start = next(generation.noises_between((3, 8), 3, (100, 100)))
    torch.testing.assert_close(start, torch.stack([first, (first + last) / 2**0.5, last]))


# --- an image from outside --------------------------------------------------------------------------------------------


def upload(client: TestClient, data: bytes, code: int = 200, **parameters: Any) -> Any:
    response = client.post("/api/reconstruction", params=parameters, content=data)
    assert response.status_code == code, response.text
    return response.json()


def digit(k: int = 0) -> np.ndarray:
    return onefold.data.open_dataset("digits:test")[k][0]


@pytest.mark.parametrize("run", [0, 1])
def test_an_upload_is_reconstructed_noised_and_denoised(client: TestClient, runs: tuple[Path, Path], run: int):
    x = digit()
    found = {t: upload(client, png(x), run=run, t=t, seed=3, steps=4) for t in (0, 0.5, 1)}
    x_hat = reconstruct(runs[run], x[None])[0]
    for each in found.values():
        assert close(pixels(each["original"]), x)
        assert close(pixels(each["reconstruction"]), x_hat)
        both = (torch.tensor(image.transpose(2, 0, 1)[None]) for image in (x_hat, x))
        assert each["psnr"] == pytest.approx(onefold.metrics.psnr(*both), abs=0.01)
    assert close(pixels(found[1]["noised"]), x_hat), "at t = 1 there is no noise"
    network = Network.from_pretrained(runs[run])
    with torch.no_grad():
        z = network.encode(onefold.to_tensor(x[None]))
        noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(3))[None]
        for t in (0.0, 0.5, 1.0):
            z_hat = network.denoise(t * z + (1 - t) * noise, torch.full((1,), t))
            assert close(pixels(found[t]["denoised"]), onefold.to_images(network.decode(z_hat))[0])
        # At t = 0 nothing of the image is left: four Euler steps from the noise of the seed, without a class.
        if not run:
            sampled = network.sample(1, labels=[10], seed=3, steps=4)[0]
            assert close(pixels(found[0]["resampled"]), sampled)


def test_the_denoiser_may_be_told_the_class(client: TestClient):
    untold, told = (upload(client, png(digit()), t=0.2, **label)["denoised"] for label in ({}, {"label": "3"}))
    assert untold != told
    assert untold == upload(client, png(digit()), t=0.2, label="none")["denoised"]


def test_an_upload_of_another_size_is_cropped_and_resized(client: TestClient):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200  # the middle, which is what remains
    file = io.BytesIO()
    Image.fromarray(wide).save(file, format="JPEG", quality=95)
    original = pixels(upload(client, file.getvalue())["original"])
    assert original.shape == (8, 8, 1)
    assert abs(original.astype(int) - 200).max() < 20
    clear = np.zeros((8, 8, 4), np.uint8)
    assert (pixels(upload(client, png(clear))["original"]) == 255).all(), "what is transparent lies on white"


def test_uploads_are_bounded(client: TestClient):
    most = schema.MOST_BYTES
    assert upload(client, b"0" * (most + 1), 413)["detail"] == "image: more than 8 MiB; send a smaller file"
    parts = iter([b"0" * most, b"0"])  # of a length that is not told before
    assert client.post("/api/reconstruction", content=parts).status_code == 413
    bomb = io.BytesIO()
    Image.new("1", (5000, 4000)).save(bomb, format="PNG")
    assert len(bomb.getvalue()) < 10_000
    assert "5000 are too many pixels; reduce it to 16 million" in upload(client, bomb.getvalue(), 422)["detail"]


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"<html>", png(np.zeros((9, 9, 3), np.uint8))[:-30]]
)
def test_what_is_no_image_is_refused(client: TestClient, data: bytes):
    said = upload(client, data, 422)["detail"]
    assert said.startswith("image: cannot be read (")
    assert said.endswith("; send another file")


# --- wrong requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "parameters", "said"),
    [
        ("images", {"n": 65}, "n: '65' should be less than or equal to 64"),
        ("images", {"n": 0}, "n: '0' should be greater than"),
        ("images", {"n": "many"}, "n: 'many' should be a valid integer"),
        ("images", {"steps": 51}, "steps: '51' should be less than or equal to 50"),
        ("images", {"steps": 0}, "steps: '0' should be greater"),
        ("images", {"steps": "1.5"}, "steps: '1.5' should be a valid integer"),
        ("images", {"seed": -1}, "seed: '-1' should be greater"),
        ("images", {"seed": 10**30}, "seed: '1000000"),
        ("images", {"guidance": "nan"}, "guidance: 'nan' should be a finite number"),
        ("images", {"guidance": "inf"}, "guidance: 'inf' should be a finite number"),
        ("images", {"step": 3}, "step: there is no such parameter"),
        ("images", {"labels": "dog"}, "labels: 'dog' is no class"),
        ("images", {"labels": "11"}, "labels: 11 is not a class"),
        ("images", {"labels": ["1", "2"]}, "labels: 2 were given for n = 1; give one for each image"),
        ("images", {"labels": "x" * 300}, "labels: 'xxx"),
        ("images", {"labels": ["1"] * 65, "n": 64}, "labels: "),
        ("images", {"solver": "magic"}, "solver: 'magic' is not known; choose one of euler, heun"),
        ("images", {"solver": "refine"}, "solver: 'refine' needs a one-step generator"),
        ("images", {"solver": "'; DROP\ntable"}, "solver: "),
        ("interpolation", {"n": 1}, "n: '1' should be greater than or equal to 2"),
        ("interpolation", {"other": "b"}, "other: 'b' should be a valid integer"),
        ("training", {"run": 2}, "run: '2' should be less"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_in_a_sentence(client: TestClient, path: str, parameters: dict[str, Any], said: str):
    detail = answer(client, path, 422, **parameters)["detail"]
    assert detail.startswith(said)
    assert len(detail.splitlines()) == 1
    assert len(detail) < 300


def test_what_is_not_there_is_said(client: TestClient, runs: tuple[Path, Path]):
    assert "/docs describes" in client.get("/api/nothing").json()["detail"]
    wrong = client.post("/api/images")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "GET"
    assert "POST is not what this address takes" in wrong.json()["detail"]
    with served(runs[0]) as alone:
        assert answer(alone, "images", 404, run=1)["detail"] == "run: there is no run 1; only 0"


@pytest.mark.parametrize("t", [-0.1, 1.1, "nan"])
def test_times_lie_between_noise_and_data(client: TestClient, t: object):
    assert upload(client, png(digit()), 422, t=t)["detail"].startswith(f"t: '{t}' should be")


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Holds the network's work until it is called."""
    gate, drawn = threading.Event(), generation.generated

    def held(*arguments: Any) -> Any:
        assert gate.wait(20)
        return drawn(*arguments)

    monkeypatch.setattr("onefold.web.app.generated", held)
    yield gate.set
    gate.set()


async def asking(app: Any) -> AsyncIterator[Any]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        yield client


def test_too_many_are_told_when_to_come_again_and_none_of_the_others_fails(
    runs: tuple[Path, Path], slow: Callable[[], None]
):
    """One is served and two may wait; meanwhile all else is answered."""
    app = create_app(runs[0], waiting=2, device="cpu")

    async def scenario() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            asked = [asyncio.create_task(client.get(f"/api/images?steps=1&seed={k}")) for k in range(6)]
            done, _ = await asyncio.wait(asked, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 3:
                done, _ = await asyncio.wait(asked, timeout=0.1)
            assert (await client.get("/api/runs")).status_code == 200
            assert (await client.post("/api/reconstruction", content=b"unread")).status_code == 429
            slow()
            return list(await asyncio.gather(*asked))

    answers = asyncio.run(scenario())
    assert [each.status_code for each in answers] == [200] * 3 + [429] * 3
    for each in answers[3:]:
        assert int(each.headers["retry-after"]) >= 1
        assert each.json()["detail"].startswith("too many requests are waiting; try again in")
    assert [each.json()["images"][0]["seed"] for each in answers[:3]] == [0, 1, 2]


def test_who_has_gone_away_is_stopped_in_the_middle_or_passed_over():
    turns, began, worked = Turns(5), threading.Event(), list[str]()

    def endless() -> str:
        began.set()
        while True:
            turns.check_stop()

    async def leaves() -> bool:
        return began.is_set()

    async def stays() -> bool:
        return False

    async def scenario() -> list[Any]:
        first = asyncio.create_task(turns.take(endless, leaves))
        second = asyncio.create_task(turns.take(lambda: worked.append("gone"), leaves))
        third = asyncio.create_task(turns.take(lambda: worked.append("here"), stays))
        return list(await asyncio.gather(first, second, third, return_exceptions=True))

    found = asyncio.run(scenario())
    assert isinstance(found[0], Stopped)
    assert worked[-1:] == ["here"]
    assert found[2] is None
    turns.close()


def test_a_network_is_stopped_between_two_steps(runs: tuple[Path, Path]):
    run, calls = Served(runs[0], device="cpu"), []

    def third(*ignored: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped

    run.check = third
    with pytest.raises(Stopped), run.computing() as network:
        network.sample(1, steps=50)
    assert len(calls) == 3


def test_an_error_ends_the_turn_alone():
    turns = Turns(0)

    async def stays() -> bool:
        return False

    async def scenario() -> int:
        with pytest.raises(ZeroDivisionError):
            await turns.take(lambda: 1 // 0, stays)
        return await turns.take(lambda: 7, stays)

    assert asyncio.run(scenario()) == 7
    turns.check_room()
    turns._inside = 1
    with pytest.raises(Busy):
        turns.check_room()
    turns.close()


# --- a run in training ------------------------------------------------------------------------------------------------


@pytest.fixture
def own(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the plain run, which a test may change."""
    return Path(shutil.copytree(runs[0], tmp_path / "own"))


def test_a_published_network_is_used_from_then_on(own: Path):
    with served(own) as client:
        before, model = answer(client, "images", n=2), answer(client, "runs")["runs"][0]["model"]
        assert before["model"] == model
        assert answer(client, "images", n=2)["images"] == before["images"]
        publish(own, seed=2)
        assert answer(client, "runs")["runs"][0]["model"] != model
        after = answer(client, "images", n=2)
        assert after["model"] != model
        assert close(stacked(after), Network.from_pretrained(own).sample(2))
        assert not close(stacked(after), stacked(before))
        path = own / "model" / "model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:1000])  # as a copy in progress
        assert stacked(answer(client, "images", n=2)).tolist() == stacked(after).tolist()
        path.write_bytes(whole)
        assert close(stacked(answer(client, "images", n=2)), stacked(after))


def test_a_run_without_a_network_says_so_and_is_watched_until_it_has_one(own: Path):
    (own / "model").rename(own / "aside")
    with served(own) as client:
        info = answer(client, "runs")["runs"][0]
        assert (info["model"], info["image_size"], info["classes"], info["images"]) == (None, [8, 8], 10, 160)
        assert "no model yet" in answer(client, "images", 409)["detail"]
        assert answer(client, "training")["images"][-1] == 160
        (own / "aside").rename(own / "model")
        assert answer(client, "images")["images"]


def test_the_log_is_told_in_numbers(own: Path):
    with served(own) as client:
        found = answer(client, "training")
        assert found["images"] == [32, 64, 96, 128, 160]
        assert len(found["series"]["denoising"]) == 5
        assert [value is None for value in found["series"]["health.latent_std"]] == [True, False, True, False, False]
        assert "health.channel_std" not in found["series"], "is a list"
        assert found["alarm"] is None
        lines = [{"images": 176, "denoising": math.nan, "health": {"psnr": 5.0}, "alarm": "the latents\nare flat"}]
        lines += [{"images": 176 + 16 * k, "denoising": 1.0 / k} for k in range(1, 2000)]
        with (own / "log.jsonl").open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines) + '{"images": 99')
        found = answer(client, "training")
        assert len(found["images"]) < 450
        assert found["images"] == sorted(set(found["images"]))
        assert found["images"][-1] == 176 + 16 * 1999
        place = found["images"].index(176)
        assert found["series"]["denoising"][place] is None
        assert found["series"]["health.psnr"][place] == 5
        assert found["alarm"] == "the latents\\nare flat"
        assert answer(client, "runs")["runs"][0]["images"] == 176 + 16 * 1999


def test_pictures_of_the_training_are_given_out_and_nothing_else(own: Path, tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (own / "samples" / "000000001.png").symlink_to(tmp_path / "secret.png")
    (own / "samples" / "000000002.png").write_bytes(b"inside")
    (own / "samples" / "notes.png").write_bytes(b"other")
    with served(own) as client:
        found = answer(client, "training")
        names = [sample["name"] for sample in found["samples"]]
        assert names == ["000000002.png", "000000016.png", "000000080.png", "000000160.png"]
        assert [sample["images"] for sample in found["reconstructions"]] == [16, 80, 160]
        picture = client.get(f"/api/samples/{names[-1]}")
        assert picture.headers["content-type"] == "image/png"
        assert picture.content == (own / "samples" / names[-1]).read_bytes()
        assert client.get("/api/samples/000000002.png").content == b"inside"
        for name in (
            "000000001.png", "notes.png", "../config.json", "..%2Fconfig.json", "%2e%2e%2f%2e%2e%2fsecret.png",
            "/etc/passwd", "%2Fetc%2Fpasswd", "000000003.png", "0%00.png", "..\\secret.png", "x" * 5000,
        ):  # fmt: skip
            assert client.get(f"/api/samples/{name}").status_code == 404, name
        for name in ("app.py", "../app.py", "..%2Fcli.py", "page.html"):
            assert client.get(f"/files/{name}").status_code == 404, name


def test_the_pictures_of_a_linked_folder_are_not_given_out(own: Path, tmp_path: Path):
    (own / "samples").rename(tmp_path / "elsewhere")
    (own / "samples").symlink_to(tmp_path / "elsewhere")
    with served(own) as client:
        assert client.get("/api/samples/000000160.png").status_code == 404


# --- other networks ---------------------------------------------------------------------------------------------------


def test_a_network_in_memory_is_served_and_its_classes_have_names(tmp_path: Path):
    names = ("cat", "none", "7\nlives")
    config = NetworkConfig(width=32, depth=1, heads=2, classes=3, class_names=names)
    network = randomised(build(config)).eval()
    with served(network) as client:
        info = answer(client, "runs")["runs"][0]
        assert info["class_names"] == ["cat", "none", "7\\nlives"]
        assert (info["trains"], info["model"], info["images"]) == (False, "saved", 0)
        found = answer(client, "images", n=2, labels=["cat", "none"], steps=2)
        assert [image["label"] for image in found["images"]] == [0, 1], "a class may be called none"
        assert close(stacked(found), network.sample(2, labels=["cat", "none"], steps=2))
        assert "is no class of this network; perhaps cat (0)" in answer(client, "images", 422, labels="cap")["detail"]
        assert "has no log" in answer(client, "training", 422)["detail"]
        assert client.get("/api/samples/000000001.png").status_code == 404
    network.save_pretrained(tmp_path / "net")
    with served(tmp_path / "net") as client:
        assert close(stacked(answer(client, "images", n=2, labels=["cat", "none"], steps=2)), stacked(found))


def test_a_network_without_classes_or_of_odd_channels_is_served():
    config = NetworkConfig(width=32, depth=1, heads=2, classes=0, channels=2)
    with served(randomised(build(config))) as client:
        found = answer(client, "images", n=2, steps=2)["images"]
        assert [(image["label"], image["name"]) for image in found] == [(None, "")] * 2
        assert answer(client, "interpolation", steps=2)["images"][0]["label"] is None
        assert answer(client, "images", labels="none", steps=2)["images"][0]["label"] is None
        assert "needs classes" in answer(client, "images", 422, guidance=2)["detail"]
        assert "labels: 1 is not a class" in answer(client, "images", 422, labels="1")["detail"]
        assert "2 channels, which no image file has" in upload(client, png(digit()), 422)["detail"]


def test_two_runs_of_one_name_are_told_apart(runs: tuple[Path, Path]):
    with TestClient(create_app(runs[0], runs[0], device="cpu")) as client:
        assert [run["name"] for run in answer(client, "runs")["runs"]] == ["plain", "plain (2)"]


@pytest.mark.parametrize(
    ("sources", "options", "said"),
    [
        ((), {}, "0 runs were given"),
        (("a", "b", "c"), {}, "3 runs were given"),
        (("missing",), {}, "no config.json there"),
        (("missing",), {"waiting": -1}, "--waiting: -1 is negative"),
        (("missing",), {"device": "abacus"}, "device: 'abacus' cannot be used"),
    ],
)
def test_what_cannot_be_served_is_refused(sources: tuple[str, ...], options: dict[str, Any], said: str):
    with pytest.raises(onefold.UserError, match=re.escape(said)):
        create_app(*sources, **options)


# --- page, description, headers ---------------------------------------------------------------------------------------


def test_nothing_is_fetched_from_elsewhere(client: TestClient):
    for path in ("/", "/docs", "/files/page.css", "/files/page.js", "/files/charts.js"):
        response = client.get(path)
        assert response.status_code == 200
        text = response.text.replace("http://www.w3.org/2000/svg", "").replace("http://127.0.0.1:8000/", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import", text), path
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert not re.search(r"unsafe|https?:|\*", policy)
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/api/nothing").headers["content-security-policy"] == policy


def test_the_description_names_every_operation_and_its_limits(client: TestClient):
    document, page = client.get("/openapi.json").json(), client.get("/docs").text
    assert len(document["paths"]) == 7
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
    for name in document["components"]["schemas"]:
        assert f'<h3 id="{name}">' in page
    assert "integer or null, 1 to 50" in page
    assert "integer, 1 to 64, default 1" in page


def test_only_ones_own_names_are_answered(runs: tuple[Path, Path]):
    with served(runs[0], hosts=("127.0.0.1", "localhost", "[::1]")) as client:
        for host, code in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 400)):
            assert client.get("/api/runs", headers={"host": host}).status_code == code, host


def test_the_page_can_be_reached_under_a_prefix(client: TestClient):
    """As behind a notebook's proxy: no address in the page begins at the root."""
    for path in ("/", "/files/page.js", "/docs"):
        assert not re.search(r"""(href|src)=["']?/|fetch\(["'`]/""", client.get(path).text)
