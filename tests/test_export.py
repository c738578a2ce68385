"""Exports: what other programs make of a network is what onefold makes of it, by the real libraries."""

import base64
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from conftest import randomised
from helpers_runs import tiny
from onefold import cli
from onefold.errors import UserError
from onefold.export import diffusers, hub, onnx, web
from onefold.files import read_tensors
from onefold.metrics.record import Protocol, Record, Subject
from onefold.networks import Network, NetworkConfig, OneFold, build
from onefold.sampling import Sampler, noises
from onefold.training.loop import train
from onefold.training.run import Run

ONE_STEP = Sampler(steps=1, solver="refine", start=0.3)
COUNT = 5
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def network(sampler: Sampler = ONE_STEP, **changes: Any) -> Network:
    """One whose weights are all random and none of them zero."""
    found = randomised(build(NetworkConfig(**{"width": 32, "depth": 2, "heads": 2, **changes})), 1).eval()
    found.sampler = sampler
    return found


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """Grey levels between two lots of images, at most."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# --- onnx -------------------------------------------------------------------------------------------------------------


def outcome(folder: Path, name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What onnxruntime makes of a role's inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    assert {each.name for each in session.get_inputs()} == inputs.keys()
    return session.run(None, inputs)[0]


def pixels(x: np.ndarray) -> np.ndarray:
    return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.fixture
def _exporter() -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="needs onefold[export]")


@pytest.mark.usefixtures("_exporter")
def test_onnx_files_give_the_same_images(tmp_path: Path):
    net = network(depth=1, jump_rank=3)
    onnx.write(net, tmp_path)
    for count in (1, COUNT):  # any number of images
        eps = next(noises(range(count), (16, 4))).numpy()
        made = outcome(tmp_path, "generator", {"noise": eps, "labels": np.arange(count)})
        assert apart(pixels(made), net.sample(count)) <= 1
    check_roles(net, tmp_path, torch.arange(COUNT))
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["network"]["width"] == 32
    assert described["sampler"]["start"] == 0.3


@torch.no_grad()
def check_roles(net: Network, folder: Path, y: torch.Tensor | None) -> None:
    x = torch.rand(COUNT, net.config.channels, 8, 8) * 2 - 1
    z, t = net.encode(x), torch.linspace(0, 0.9, COUNT)
    labels = {} if y is None else {"labels": y.numpy()}
    assert np.allclose(outcome(folder, "encoder", {"images": x.numpy()}), z, atol=1e-4)
    assert np.allclose(outcome(folder, "decoder", {"latents": z.numpy()}), net.decode(z), atol=1e-4)
    clean = outcome(folder, "denoiser", {"z_t": z.numpy(), "t": t.numpy(), **labels})
    assert np.allclose(clean, net.denoise(z, t, y), atol=1e-4)


@pytest.mark.usefixtures("_exporter")
def test_a_network_without_classes_and_one_step_has_neither(capsys: pytest.CaptureFixture[str]):
    net = network(Sampler(), classes=0, architecture="three_networks", depth=3, channels=3, output="velocity")
    net.save_pretrained("net")
    assert cli.run(["export", "net", "--to", "onnx"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("net-onnx: encoder.onnx, decoder.onnx, denoiser.onnx\n")
    assert "no generator.onnx" in shown
    assert not Path("net-onnx/generator.onnx").exists()
    check_roles(net, Path("net-onnx"), None)


def test_onnx_without_its_libraries_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to onnx and --to web: need onnx; pip install 'onefold\[export\]'"):
        onnx.write(network(), tmp_path / "out")


# --- diffusers --------------------------------------------------------------------------------------------------------

ASK = """
import sys, warnings
warnings.simplefilter("error")
import numpy as np, torch
from diffusers import DiffusionPipeline
labels = [0, 1, 2, 3, 4]
for folder in ("few", "many"):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    def images(labels, **options):
        generator = [torch.Generator().manual_seed(k) for k in range(len(labels))]
        return np.stack([np.array(x) for x in pipe(class_labels=labels, generator=generator, **options).images])
    x = torch.linspace(-1, 1, pipe.network.config.channels * 64).reshape(1, -1, 8, 8)
    np.savez(
        folder,
        own=images(labels),
        one=images(labels, num_inference_steps=1),
        many=images(labels, num_inference_steps=50),
        guided=images(labels, num_inference_steps=3, guidance_scale=2.0),
        named=images(["class 3"] * 2 if folder == "few" else [3, 3]),
        alone=np.array(pipe(class_labels=3, generator=torch.Generator().manual_seed(7)).images[0]),
        free=(255 * pipe(generator=torch.Generator().manual_seed(7), output_type="np").images).round(),
        latents=pipe.network.encode(x).detach(),
    )
assert "onefold" not in sys.modules
"""


def test_a_diffusers_pipeline_gives_the_same_images_without_onefold(tmp_path: Path):
    pytest.importorskip("diffusers")
    wide = {"channels": 3, "patch": 4, "output": "velocity", "latent_norm": "layer_norm"}
    networks = {
        "few": network(jump_rank=3, jump_exit=True, class_names=tuple(f"class {k}" for k in range(10))),
        "many": network(Sampler(steps=2, shift=0.5), **wide),
    }
    for name, net in networks.items():
        diffusers.write(net, Path(name))
    weights, _ = read_tensors(Path("few/network/diffusion_pytorch_model.safetensors"))
    assert {name.partition(".")[0] for name in networks["few"].state_dict().keys() - weights.keys()} == {"jump_exit"}
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    asked = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    for name, net in networks.items():
        made = dict(np.load(f"{name}.npz"))
        x = torch.linspace(-1, 1, net.config.channels * 64).reshape(1, -1, 8, 8)
        assert np.allclose(made.pop("latents"), net.encode(x).detach(), atol=1e-5)
        made = {key: images.reshape(-1, 8, 8, net.config.channels) for key, images in made.items()}
        one = {"steps": 1} if net.sampler.jumps else {"steps": 1, "solver": "euler"}
        assert apart(made["own"], net.sample(5)) <= 1
        assert apart(made["one"], net.sample(5, **one)) <= 1
        assert apart(made["many"], net.sample(5, steps=50, solver="euler")) <= 1
        assert apart(made["guided"], net.sample(5, steps=3, solver="euler", guidance=2.0)) <= 1
        assert apart(made["named"], net.sample(2, labels=[3, 3])) <= 1
        assert apart(made["alone"], net.sample(1, labels=[3], seed=7)) <= 1
        assert apart(made["free"], net.sample(1, labels=[10], seed=7)) <= 1


def test_what_the_pipeline_does_not_know_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is that of OneFold, and this is a PixelNetwork; export it --to hub"):
        diffusers.write(network(architecture="pixels"), tmp_path / "out")
    with pytest.raises(UserError, match="the pipeline knows no guidance interval"):
        diffusers.write(network(Sampler(guidance=2.0, guidance_interval=(0.2, 0.8))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(tiny(training__images=64), tmp_path_factory.mktemp("export") / "run", quiet=True)
    protocol = Protocol(
        data="digits",
        data_sha256="0" * 64,
        split="train",
        extractor="a | b",
        extractor_sha256="1" * 64,
        resize="none",
        real_images=9,
        generated_images=9,
        few_images=True,
        steps=2,
    )
    subject = Subject(
        model_sha256="2", training_seed=0, images_seen=64, checkpoint=64, training_commit=None, commit=None
    )
    Record.of(protocol, subject, frechet_distance=1.25, reconstruction={"psnr": 20.5}, images_per_second=3.0).write(
        run.folder / "evaluation" / "two-steps.json"
    )
    return run


def front_matter(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_tells_what_was_trained_and_measured(run: Run, tmp_path: Path):
    hub.write(run.network, tmp_path / "out", run=run, name="someone/digits")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = front_matter(text)
    assert (front["library_name"], front["pipeline_tag"]) == ("onefold", "unconditional-image-generation")
    assert "one-step-generation" not in front["tags"]
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert {each["type"]: each["value"] for each in metrics} == {"frechet_distance": 1.25, "reconstruction.psnr": 20.5}
    for line in (
        'network = onefold.OneFold.from_pretrained("someone/digits")  # or the path of this folder',
        "# someone/digits",
        "Generates images in 2 steps: 8×8, 1 channel; 10 classes.",
        "| trained on | digits: 1,437 images to train on, 360 images to test with |",
        "### two-steps",
        "| frechet distance | 1.25 |",
        "| extractor | a \\| b |",
        "| steps | 2 |",
    ):
        assert f"{line}\n" in text
    assert "| length | 64 images seen, " in text
    assert "images per second" not in text, "which is of a machine, not of the network"
    assert str(run.folder.parent) not in text, "no path of this machine"
    found = Network.from_pretrained(tmp_path / "out")
    assert (found.sample(3) == run.network.sample(3)).all()
    assert (tmp_path / "out" / "samples.png").is_file()


def test_a_card_installs_as_the_readme_does(run: Run):
    """The card of a run, and that of the network in the package."""
    packaged = (ROOT / "src" / "onefold" / "pretrained" / "digits" / "README.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (hub.card(run.network, run, "someone/digits"), packaged):
        (command,) = re.findall(r"^pip install .*$", text, re.MULTILINE)
        install, why = command.split("#")
        assert re.search(rf"^{re.escape(install.strip())} +# from a clone$", readme, re.MULTILINE)
        assert why == " from a clone of onefold"


def test_a_network_without_a_run_has_a_card_too(tmp_path: Path):
    text = hub.card(network(architecture="pixels", classes=0), None, "a")
    assert "model-index" not in front_matter(text)
    assert "one-step-generation" in front_matter(text)["tags"]
    assert 'network = onefold.networks.Network.from_pretrained("OWNER/a")' in text
    assert "Generates images in one step: 8×8, 1 channel.\n" in text
    assert "## Training" not in text
    assert "| latents | 16 tokens × 4 channels |" in text
    text = hub.card(network(architecture="pixels", classes=0, patch=1), None, "a")
    assert "| latents | 64 tokens × 1 channel |" in text
    assert "Generates images in 1 step: " in hub.card(network(Sampler(1)), None, "a")


def test_a_network_is_pushed_as_it_is_saved(monkeypatch: pytest.MonkeyPatch):
    sent: dict[str, object] = {}

    def create(self: object, repository: str, **options: object) -> str:
        sent.update(repository=repository, **options)
        return f"https://hub/{repository}"

    def upload(self: object, *, repo_id: str, folder_path: Path, **options: object) -> None:
        sent.update(to=repo_id, files=sorted(path.name for path in folder_path.iterdir()))
        sent["weights"] = load_file(folder_path / "model.safetensors")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    net = network()
    assert net.push_to_hub("someone/net", private=True) == "https://hub/someone/net"
    assert (sent["repository"], sent["to"], sent["private"]) == ("someone/net", "someone/net", True)
    assert sent["files"] == ["config.json", "model.safetensors", "sampler.json"]
    assert all(torch.equal(sent["weights"][name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "why"), [("someone/net", "OfflineModeIsEnabled"), ("a/b/c", "HFValidationError")], ids=str
)
def test_what_the_hub_does_not_take_is_one_line(name: str, why: str):
    """By the real library, which is offline here."""
    with pytest.raises(
        UserError, match=rf"^{name}: not uploaded \({why}.*; check the name and the connection"
    ) as error:
        network().push_to_hub(name)
    assert "\n" not in str(error.value)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_exports_a_run(run: Run, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["export", str(run.folder), "--to", "hub"]) == 0
    assert capsys.readouterr().out.startswith("run-hub: README.md, config.json, sampler.json, model.safetensors")
    assert front_matter(Path("run-hub/README.md").read_text(encoding="utf-8"))["model-index"][0]["name"] == "run"
    assert cli.run(["export", str(run.folder), "--to", "diffusers", "--out", "new"]) == 0
    assert (
        OneFold(run.network.config).state_dict().keys()
        == load_file("new/network/diffusion_pytorch_model.safetensors").keys()
    )
    capsys.readouterr()
    for words, line in (
        (("--to", "hub"), "run-hub: is not an empty folder; choose another --out"),
        (("--to", "onnx", "--push", "a/b"), "--push: goes with --to hub or diffusers"),
        (("--to", "tensorflow"), "export: --to: 'tensorflow' is not one of 'hub', 'onnx', "),
        (("--to", "hub", "--out", "pushed", "--push", "a/b"), "a/b: not uploaded (OfflineModeIsEnabled"),
    ):
        assert cli.run(["export", str(run.folder), *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert line in error, error
    assert front_matter(Path("pushed/README.md").read_text(encoding="utf-8"))["model-index"][0]["name"] == "a/b"


# --- the web ----------------------------------------------------------------------------------------------------------

NODE = shutil.which("node")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
RUNTIME = ROOT / web.RUNTIME


@pytest.mark.skipif(NODE is None, reason="needs node")
@pytest.mark.parametrize("count", [16, 64, 83])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_the_pages_noise_is_that_of_torch(seed: int, count: int):
    program = (
        f"import {{ noise }} from '{web.PAGE / 'noise.js'}'; console.log(JSON.stringify([...noise({seed}, {count})]))"
    )
    asked = subprocess.run(
        [str(NODE), "--input-type=module", "-e", program], capture_output=True, text=True, check=True
    )
    assert np.allclose(json.loads(asked.stdout), next(noises([seed], (count,)))[0], atol=1e-5)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *values: object) -> None:
        pass


def dom(folder: Path, fragment: str) -> str:
    """What the page has become in a real browser, once nothing is left to do."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
        address = f"http://127.0.0.1:{server.server_port}/{fragment}"
        shown = subprocess.run([str(BROWSER), *words, address], capture_output=True, text=True, timeout=200).stdout
        server.shutdown()
    return shown


def drawn(text: str) -> np.ndarray:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    images = [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in found]
    return np.stack([np.array(image) for image in images])


@pytest.mark.usefixtures("_exporter")
@pytest.mark.skipif(BROWSER is None, reason="needs chromium (Debian: apt install chromium)")
@pytest.mark.skipif(not RUNTIME.is_dir(), reason="needs onnxruntime-web (npm install onnxruntime-web)")
def test_the_page_draws_the_same_images_in_a_browser(tmp_path: Path):
    net = network(depth=1, class_names=tuple(f"<b>{k}" for k in range(10)))
    files = web.write(net, tmp_path / "page", runtime=RUNTIME)
    assert not any(path.name.startswith("denoiser") for path in files)
    text = dom(tmp_path / "page", "#seed=5")
    assert re.search(r'<p id="status" role="status">50 images in \d+ ms', text)
    assert '<option value="3">&lt;b&gt;3</option>' in text
    assert apart(drawn(text)[..., :1], net.sample(50, seed=5)) <= 1
    assert (
        apart(drawn(dom(tmp_path / "page", "#seed=9&class=3"))[..., :1], net.sample(50, labels=[3] * 50, seed=9)) <= 1
    )


@pytest.mark.usefixtures("_exporter")
@pytest.mark.skipif(BROWSER is None, reason="needs chromium (Debian: apt install chromium)")
@pytest.mark.skipif(not RUNTIME.is_dir(), reason="needs onnxruntime-web (npm install onnxruntime-web)")
def test_each_click_on_the_page_draws_new_images(tmp_path: Path):
    playwright = pytest.importorskip("playwright.sync_api")
    net = network(depth=1)
    web.write(net, tmp_path / "page", runtime=RUNTIME)
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "page"))) as server,
        playwright.sync_playwright() as driver,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page, complaints = browser.new_page(), list[str]()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/#seed=5")
        seen: list[np.ndarray] = []
        for act, address in ((lambda: None, "#seed=5"), (page.get_by_role("button").click, "#seed=55")):
            before = page.locator("#images").inner_html()
            act()
            page.wait_for_function(
                "before => document.querySelectorAll('#images img').length == 50 "
                "&& document.getElementById('images').innerHTML != before",
                arg=before,
            )
            assert address in page.url
            seen.append(drawn(page.content())[..., :1])
        page.get_by_label("Class").select_option("3")
        page.wait_for_url("**/#seed=55&class=3")
        browser.close()
        server.shutdown()
    assert complaints == []
    for images, seed in zip(seen, (5, 55), strict=True):
        assert apart(images, net.sample(50, seed=seed)) <= 1


def test_the_page_asks_for_its_own_files_alone():
    for path in web.PAGE.iterdir():
        assert not re.search(r"https?://", path.read_text(encoding="utf-8")), path.name
    assert "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'" in (web.PAGE / "index.html").read_text()


def test_what_the_page_needs_is_named(tmp_path: Path):
    for net, line in (
        (network(Sampler()), "--to web: needs a one-step generator; make one with `onefold onestep RUN`"),
        (network(latent_channels=2, patch=4), "--to web: latents of fewer than 16 numbers"),
        (network(), "node_modules/onnxruntime-web/dist/ort.wasm.min.mjs: no such file; run `npm install"),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            web.write(net, tmp_path / "page")
    assert not (tmp_path / "page").exists()
