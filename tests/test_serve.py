"""The command `onefold serve`."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest

import serve
from conftest import randomised
from onefold.cli import run as command
from onefold.networks.base import NetworkConfig, build


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "net"
    randomised(build(NetworkConfig(width=16, depth=1, heads=2))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_server_says_where_it_is_and_ends_when_told_to(network: Path, end: signal.Signals):
    words = [sys.executable, "-m", "onefold", "serve", str(network), "--port", "0", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as process:  # type: ignore[call-overload]
        line = process.stdout.readline()
        found = re.fullmatch(rf"(http://127\.0\.0\.1:\d+): {re.escape(str(network))}; Ctrl-C ends\n", line)
        assert found is not None, line
        assert len(httpx.get(f"{found[1]}/api/images", params={"steps": 2}).json()["images"]) == 1
        assert "<title>onefold</title>" in httpx.get(found[1]).text
        assert httpx.get(f"{found[1]}/api/runs", headers={"host": "evil.example"}).status_code == 400
        process.send_signal(end)
        out, error = process.communicate(timeout=60)
        assert process.returncode == (0 if end == signal.SIGINT else -signal.SIGTERM)
        assert (out, error) == ("", "")


def test_an_address_that_cannot_be_had_is_refused(network: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, said in (
            (["--port", str(port)], f"--port: cannot listen at 127.0.0.1:{port} (Address already in use)"),
            (["--port", "70000"], "--port: 70000 is no port; give 1 to 65535"),
            (["--port", "-1"], "--port: -1 is no port"),
            (["--host", "192.0.2.1"], "--port: cannot listen at 192.0.2.1:8000 ("),
            (["--waiting", "-1"], "--waiting: -1 is negative"),
        ):
            assert command(["serve", str(network), *words]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"onefold: {said}")
            assert error.count("\n") == 1


def test_what_is_no_run_is_refused(tmp_path: Path, network: Path, capsys: pytest.CaptureFixture[str]):
    for words in ([str(tmp_path)], [str(network), str(tmp_path / "missing")], []):
        assert command(["serve", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(
    missing: str, network: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "onefold.web.app", raising=False)
    assert command(["serve", str(network)]) == 2
    said = f"onefold: serve: needs {missing}; install it, pip install 'onefold[serve]'\n"
    assert capsys.readouterr().err == said


def test_the_load_test_tells_the_refused_from_the_failed():
    times = [k / 100 for k in range(1, 200)]
    found = serve.latencies(times, [429, 500, 429], 10)
    assert (found["images_per_second"], found["requests"], found["failed"], found["refused"]) == (19.9, 202, 1, 2)
    assert found["p50"] == pytest.approx(1)
    assert found["p99"] == pytest.approx(1.98)
