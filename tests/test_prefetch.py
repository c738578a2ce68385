"""What can be downloaded is named; nothing is downloaded but when told to, and then from where it was said."""

import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from onefold import metrics
from onefold.cli import run as command
from onefold.errors import UserError
from onefold.metrics import from_file, sources
from onefold.metrics.sources import SOURCES, Source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path / "cache"


class Means(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        means = img.float().mean((2, 3))
        return means if return_features else means.softmax(1)


class Hub(SimpleHTTPRequestHandler):
    """Files of a folder, and what the hub's client asks about a repository before it takes them."""

    COMMIT = "c" * 40

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            files = sorted((Path(self.directory) / "owner" / "name").iterdir())
            described = {
                "id": "owner/name",
                "sha": self.COMMIT,
                "siblings": [{"rfilename": each.name} for each in files],
            }
            tree = [{"type": "file", "path": each.name, "oid": "0" * 40, "size": each.stat().st_size} for each in files]
            self._answer(json.dumps(tree if "/tree/" in self.path else described).encode())
        else:
            self.path = self.path.replace(f"/resolve/{self.COMMIT}", "")
            super().do_GET()

    def do_HEAD(self) -> None:
        path = Path(self.directory + self.path.replace(f"/resolve/{self.COMMIT}", ""))
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *values: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An address, and the folder whose files it gives."""
    folder = tmp_path / "server"
    (folder / "owner" / "name").mkdir(parents=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=str(folder))) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


def known(monkeypatch: pytest.MonkeyPatch, *given: Source) -> None:
    monkeypatch.setattr(sources, "SOURCES", {each.name: each for each in given})
    monkeypatch.setattr(metrics.features, "SOURCES", sources.SOURCES)


def test_without_yes_it_names_everything_and_downloads_nothing(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refused(*values: object, **options: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", refused)
    assert command(["prefetch"]) == 0
    shown = capsys.readouterr().out
    for source in SOURCES.values():
        for part in (source.name, source.gives, source.address, source.size, str(source.place), source.licence):
            assert part in shown
        assert source.place.is_relative_to(cache)
    assert "onefold prefetch inception dinov2 clip --yes" in shown
    assert not cache.exists()
    assert command(["prefetch", "dinov2"]) == 0
    assert "inception" not in capsys.readouterr().out


def test_with_yes_a_file_comes_and_is_known_by_its_name(
    server: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    address, folder = server
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Means()).save(str(folder / "net.pt"))
    known(monkeypatch, replace(SOURCES["inception"], address=f"{address}/net.pt", files=("net.pt",)))
    with pytest.raises(UserError, match=r"^inception: not at .*; `onefold prefetch inception` says what"):
        from_file("inception")
    assert command(["prefetch", "inception", "--yes"]) == 0
    digest = sha256((folder / "net.pt").read_bytes()).hexdigest()
    assert f"inception: SHA-256 {digest} (net.pt); --features inception" in capsys.readouterr().out
    extractor = from_file("inception", digest)
    assert (extractor.width, extractor.resize) == (3, "inside the file")
    (folder / "net.pt").unlink()
    assert command(["prefetch", "inception", "--yes"]) == 0, "what is there is not downloaded again"


def test_with_yes_a_folder_comes_from_the_hub(
    cache: Path, server: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    address, folder = server
    files = {name: name.encode() for name in (*sources.FOLDER, "pytorch_model.bin", "README.md")}
    for name, content in files.items():
        (folder / "owner" / "name" / name).write_bytes(content)
    known(monkeypatch, replace(SOURCES["dinov2"], address="owner/name"))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", functools.partial(huggingface_hub.snapshot_download, endpoint=address)
    )
    assert command(["prefetch", "--yes"]) == 0
    kept = cache / "features" / "dinov2"
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == {
        name: name.encode() for name in sources.FOLDER
    }
    digest = sha256(b"model.safetensors").hexdigest()
    assert f"dinov2: SHA-256 {digest} (model.safetensors)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_offline_it_is_one_line(
    name: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """At an address where nobody answers."""
    nobody = "http://127.0.0.1:9"
    known(monkeypatch, replace(SOURCES[name], **({"address": f"{nobody}/net.pt"} if name == "inception" else {})))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", functools.partial(huggingface_hub.snapshot_download, endpoint=nobody)
    )
    assert command(["prefetch", "--yes"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"onefold: {name}: not downloaded (")
    assert "check the connection, or bring" in error
    assert str(cache / "features") in error
    assert len(error.splitlines()) == 1


def test_other_names_are_one_line(capsys: pytest.CaptureFixture[str]):
    assert command(["prefetch", "resnet"]) == 2
    assert "resnet: not known; choose of inception, dinov2, clip" in capsys.readouterr().err
