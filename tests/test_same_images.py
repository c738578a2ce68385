"""A run's images stay what they were: however they were given, and in what is made of the run later."""

from pathlib import Path

import numpy as np
import pytest
import torch

import onefold
from data_images import noise, png, write_folder
from helpers_runs import tiny
from onefold.cli import run as command
from onefold.commands.train import _values
from onefold.errors import UserError
from onefold.networks import Network, build
from onefold.training.conversion import onestep
from onefold.training.loop import train
from onefold.training.run import Run, load_run


def sizes(run: Run) -> list[int]:
    return [len(part) for part in run.open_data()]


def stored(folder: Path, count: int = 60) -> str:
    np.savez(folder / "images.npz", images=noise(count, 8, 8, 1), labels=np.arange(count) % 2)
    return "images.npz"


@pytest.mark.parametrize("kind", ["path", "object"])
def test_what_was_held_out_stays_so_in_one_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    images = (noise(60, 8, 8, 1), np.arange(60) % 2)
    config = tiny(training__images=32, data__source=stored(tmp_path), data__test=None)
    run = train(config, tmp_path / "run", data=images if kind == "object" else None, quiet=True)
    fast = onestep(run, images=64, changes={"training.batch": 16}, quiet=True)
    monkeypatch.chdir("/")
    again = load_run(fast.folder, data=images) if kind == "object" else load_run(fast.folder)
    assert sizes(again) == sizes(fast) == sizes(run) == [52, 8]
    digests = [[part.digest() for part in each.open_data()] for each in (again, fast, run)]
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("given", [str, Path])
def test_a_path_is_opened_as_that_of_the_configuration(given: type, tmp_path: Path):
    parts = {f"{part}/{k}.png": png(8, 8, seed=k) for part, n in (("train", 40), ("test", 12)) for k in range(n)}
    write_folder(tmp_path / "photos", parts)
    run = train(tiny(training__images=32), tmp_path / "run", data=given(tmp_path / "photos"), quiet=True)
    assert sizes(run) == sizes(load_run(run.folder)) == [40, 12]
    plan = onefold.plan(given(tmp_path / "photos"), minutes=1, say=lambda line: None)
    assert plan.config.data.source == str(tmp_path / "photos")


def test_the_returned_run_has_the_network_as_it_is_at_the_end(tmp_path: Path):
    seen: list[Network] = []
    run = train(
        tiny(training__images=96, training__log_every=16, training__checkpoint_every=48),
        tmp_path / "run",
        callbacks=[lambda run, line: seen.append(run.network) if (run.folder / "model").exists() else None],
        quiet=True,
    )
    final = load_run(run.folder).network.state_dict()
    assert all(torch.equal(value, final[name]) for name, value in run.network.state_dict().items())
    assert not all(torch.equal(value, final[name]) for name, value in seen[0].state_dict().items())


def test_test_images_alone_may_have_moved(tmp_path: Path):
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, images=noise(40, 8, 8, 1), labels=np.arange(40) % 2)
    config = tiny(training__images=32, data__source=str(tmp_path / "a.npz"), data__test=str(tmp_path / "b.npz"))
    run = train(config, tmp_path / "run", quiet=True)
    moved = (tmp_path / "b.npz").rename(tmp_path / "c.npz")
    kept = (run.folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="do not make"):
        train(None, run.folder, resume=True, images=16, test_data=moved, quiet=True)
    assert (run.folder / "config.json").read_bytes() == kept, "what is refused changes nothing"
    again = train(None, run.folder, resume=True, images=48, test_data=moved, quiet=True)
    assert again.config.data.test == str(moved)


def test_a_part_moves_with_its_images(tmp_path: Path):
    parts = {f"{part}/{k}.png": png(8, 8, seed=k) for part, n in (("train", 40), ("test", 12)) for k in range(n)}
    write_folder(tmp_path / "photos", parts)
    config = tiny(training__images=32, data__source=str(tmp_path / "photos"), data__test=None)
    run = train(config, tmp_path / "run", quiet=True)
    moved = (tmp_path / "photos").rename(tmp_path / "pictures")
    assert sizes(load_run(run.folder, data=moved)) == [40, 12]


def test_three_networks_go_on_from_three_networks(tmp_path: Path):
    """The latents are normalised anew, whatever they were before, and those of one phase alone too."""
    options: dict[str, object] = {
        "network__architecture": "three_networks",
        "network__latent_norm": "none",
        "network__depth": 3,
    }
    options["training__images"] = 64
    first = train(tiny(**options), tmp_path / "first", quiet=True)
    for phases in ((), ("diffusion",)):
        second = train(tiny(**options, phases=phases), tmp_path / f"second {phases}", network=first.network, quiet=True)
        data, _ = second.open_data()
        x = torch.stack([torch.from_numpy(data[k][0]) for k in range(64)])
        z = second.network.encode(onefold.to_tensor(x.numpy()))
        assert second.length == 64
        assert z.mean((0, 1)).abs().max() < 0.4
        assert (z.std((0, 1)) - 1).abs().max() < 0.3


def test_phases_that_a_network_cannot_have_are_refused_before_anything_is_trained(tmp_path: Path):
    for architecture, phases, told in (
        ("one_network", ("autoencoder", "diffusion"), "an encoder that can be frozen"),
        ("pixels", ("autoencoder",), "an encoder that learns"),
    ):
        config = tiny(network__architecture=architecture, phases=phases)
        with pytest.raises(UserError, match=told):
            train(config, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


def test_typing_slips_are_one_line(tmp_path: Path):
    for options, told in (
        ({"config": "digits"}, "config: 'digits' is no configuration"),
        ({"config": tiny(), "network": "runs/a"}, "network: 'runs/a' is no network"),
        ({"config": tiny(), "callbacks": print}, "callbacks: give a list"),
    ):
        with pytest.raises(UserError, match=told):
            train(**options, out=tmp_path / "run")
    assert isinstance(build(tiny().network), Network)
    with pytest.raises(UserError, match=r"onefold\.plan"):
        onefold.recipe("auto")


def test_values_of_options_however_they_are_spelled():
    words = ["--labels_from", "fine", "--data=a", "--out"]
    assert _values(words, "--labels-from", "--data", "--out") == {"--labels-from": "fine", "--data": "a", "--out": ""}
    assert _values([], "--data") == {}


def test_the_folder_of_a_run_to_resume_comes_after_out(capsys: pytest.CaptureFixture[str]):
    assert command(["train", "--resume", "my run"]) == 2
    assert "--resume --out 'my run'" in capsys.readouterr().err


def test_slips_of_a_command_are_answered(capsys: pytest.CaptureFixture[str]):
    assert command(["sampel", "run"]) == 2
    assert capsys.readouterr().err == "onefold: sampel: no such command; perhaps sample?\n"
    assert command(["data"]) == 2
    assert capsys.readouterr().err == "onefold: data: is followed by one of inspect, convert, stats\n"
