"""Networks by name: those of the package, one from outside, and what each says of itself."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import onefold
from conftest import randomised
from helpers_runs import differing, log, tiny
from onefold.cli import run as command
from onefold.errors import UserError
from onefold.networks import (
    EDM,
    EDM2,
    NETWORKS,
    FrozenCodec,
    Network,
    NetworkConfig,
    OneFold,
    PixelNetwork,
    RoleFlops,
    ThreeNetworks,
    UNet,
    build,
    parameter_shares,
    register,
)
from onefold.networks.base import architectures
from onefold.objectives.self_distillation import SelfDistillation
from onefold.objectives.two_stages import TwoStages
from onefold.training.config import Config
from onefold.training.phases import training_flops

BUILT_IN = {"one_network": OneFold, "three_networks": ThreeNetworks, "pixels": PixelNetwork}
ADOPTED = {"unet": UNet, "edm": EDM, "edm2": EDM2, "frozen_codec": FrozenCodec}
UNKNOWN = (
    "network.architecture: 'mien' is not one of one_network, pixels, three_networks; "
    "import the module that registers it first, if it is a network of your own"
)


class Linear(Network):
    """A linear map for each role; the denoiser is told the time."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        patch, latent = config.patch**2 * config.channels, config.latent_channels
        self.encoder, self.decoder = nn.Linear(patch, latent), nn.Linear(latent, patch)
        self.denoiser = nn.Linear(latent + 1, latent)

    @classmethod
    def implied(cls, config: NetworkConfig) -> dict[str, int]:
        return {"latent_channels": config.patch + 1}

    @classmethod
    def check(cls, config: NetworkConfig) -> None:
        if config.depth > 4:
            raise UserError(f"network.depth: {config.depth} is too deep for one map; give at most 4")

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        patch, latent = config.patch**2 * config.channels, config.latent_channels
        codec = 2.0 * config.tokens * patch * latent
        return RoleFlops(codec, 2.0 * config.tokens * (latent + 1) * latent, codec)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(self.patchify(x)).float()

    def denoise(self, z_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.denoiser(torch.cat([z_t, t[:, None, None].expand(-1, z_t.shape[1], 1)], 2)).float()

    def decode(self, z: Tensor) -> Tensor:
        return self.unpatchify(self.decoder(z).float())


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = dict(NETWORKS)
    yield
    NETWORKS.clear()
    NETWORKS.update(before)


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_package_s_own_networks_are_registered():
    assert NETWORKS == BUILT_IN | ADOPTED
    assert set(architectures()) == set(BUILT_IN), "those that an option can name"
    for name, kind in BUILT_IN.items():
        assert type(build(NetworkConfig(width=32, depth=3, heads=2, architecture=name))) is kind


def test_an_unknown_name_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError) as error:
        NetworkConfig(architecture="mien")
    assert str(error.value) == UNKNOWN
    with pytest.raises(UserError) as error:
        onefold.recipe("digits", network={"architecture": "mien"})
    assert str(error.value) == UNKNOWN
    for name in ("two", "One-network", "latents"):
        assert command(["train", "digits", "--architecture", name, "--out", str(tmp_path / "run")]) == 2
        known = "choose one of one-network, pixels, three-networks"
        assert capsys.readouterr().err == f"onefold: --architecture: '{name}' is not known; {known}\n"
    assert not (tmp_path / "run").exists()


def test_a_name_has_one_network():
    with pytest.raises(UserError) as error:
        register("one_network")(Linear)
    said = "register: 'one_network' is the architecture of onefold.networks.one_network.OneFold already"
    assert str(error.value) == f"{said}; choose another name"
    assert NETWORKS == BUILT_IN | ADOPTED
    assert register("one_network")(OneFold) is OneFold
    assert NETWORKS == BUILT_IN | ADOPTED


def test_a_cell_of_a_notebook_may_run_twice():
    kinds = []
    for _ in range(2):

        @register("mine")
        class Mine(Linear):
            pass

        kinds.append(Mine)
    assert kinds[0] is not kinds[1]
    assert NETWORKS["mine"] is kinds[1]


@pytest.mark.parametrize("name", ["", "my-net", "my net", "3nets"])
def test_a_name_is_an_identifier(name: str):
    with pytest.raises(UserError, match=rf"^register: '{name}' is no name for an architecture; give letters"):
        register(name)


# --- a network from outside -------------------------------------------------------------------------------------------


def test_a_network_of_one_s_own_is_trained_saved_and_loaded(tmp_path: Path):
    register("mine")(Linear)
    config = tiny(network__architecture="mine", training__images=32, training__health_every=16)
    assert config.network.latent_channels == 3, "as it follows"
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert [line["images"] for line in log(run.folder)][-1] == 32
    assert type(run.network) is Linear
    start = build(config.network).state_dict()
    assert differing(start, run.network.state_dict()) == list(start)
    assert run.network.sample(3).shape == (3, 8, 8, 1)

    net = randomised(build(config.network))
    net.save_pretrained(tmp_path / "saved")
    found = Network.from_pretrained(tmp_path / "saved")
    assert type(found) is Linear
    assert found.config == net.config
    assert differing(found.state_dict(), net.state_dict()) == []
    assert Linear.from_pretrained(run.folder).config == config.network

    del NETWORKS["mine"]
    for folder in (tmp_path / "saved", run.folder):
        with pytest.raises(UserError, match=r"config\.json: .*'mine' is not one of one_network, .* registers it first"):
            Network.from_pretrained(folder)


def test_it_says_what_it_demands_of_its_configuration():
    register("mine")(Linear)
    config = NetworkConfig(architecture="mine", depth=2, latent_channels=9)
    assert config.latent_channels == 3
    assert dataclasses.replace(config, patch=4).latent_channels == 5
    with pytest.raises(UserError, match=r"^network\.depth: 5 is too deep for one map; give at most 4$"):
        dataclasses.replace(config, depth=5)


def test_the_command_takes_it(capsys: pytest.CaptureFixture[str]):
    register("my_own")(Linear)
    assert command(["estimate", "digits", "--architecture", "my-own", "--seconds", "0"]) == 0
    assert "16 tokens × 3" in capsys.readouterr().out


def test_pixels_by_the_command(tmp_path: Path):
    tiniest = "--steps 1 --network.width 32 --network.depth 1 --network.heads 2 --training.device cpu --quiet"
    assert command(["train", "digits", "--architecture", "pixels", "--out", str(tmp_path), *tiniest.split()]) == 0
    run = onefold.load_run(tmp_path)
    assert type(run.network) is PixelNetwork
    assert run.config.network.architecture == "pixels"


# --- what a network says of itself ------------------------------------------------------------------------------------

BLOCK = 557_056
"""2·16·32·(4·32 + 3·128) for the products with weights, 4·16²·32 for attention: 16 tokens, width 32, hidden 128."""
ENDS = 22_528
"""14·32² for the modulation, 2·16·32·(4 + 4) for an entrance and an exit of 4 numbers a token each."""


@pytest.mark.parametrize(
    ("changes", "flops"),
    [
        ({}, (4 * BLOCK + ENDS,) * 3),
        ({"architecture": "three_networks"}, (BLOCK + ENDS, 2 * BLOCK + ENDS, BLOCK + ENDS)),
        ({"architecture": "three_networks", "equal": "compute"}, (4 * BLOCK + ENDS,) * 3),
        ({"architecture": "pixels"}, (0, 4 * BLOCK + ENDS, 0)),
        ({"architecture": "pixels", "channels": 3}, (0, 4 * BLOCK + ENDS + 2 * 16 * 32 * 16, 0)),
    ],
    ids=str,
)
def test_operations_of_each_role(changes: dict[str, object], flops: tuple[int, int, int]):
    config = NetworkConfig(width=32, depth=4, heads=2, **changes)
    assert config.kind.role_flops(config) == flops
    assert config.kind.role_flops(config).sample(7) == 7 * flops[1] + flops[2]


def test_operations_of_training_follow_from_roles_and_phases():
    """By hand: 3 for what is passed forwards and backwards, 1 for what is passed forwards alone."""
    register("mine")(Linear)
    network = NetworkConfig(architecture="mine", depth=2)
    config = Config(network=network, objective=SelfDistillation(draws=2), stages=TwoStages(autoencoder=0.25))
    codec, denoise = 2 * 16 * 4 * 3, 2 * 16 * 4 * 3
    assert network.kind.role_flops(network) == (codec, denoise, codec)
    assert training_flops(config) == 4 * codec + 6 * denoise + 3 * codec
    stopped = config.with_changes({"objective.target": "stopped", "objective.perceptual_weight": 0.1})
    assert training_flops(stopped) == 6 * codec + 6 * denoise + 3 * codec

    @register("staged")
    class Staged(Linear):
        phases = ("autoencoder", "diffusion")

        def normalise(self, mean: Tensor, std: Tensor) -> None:
            """Its encoder can be frozen."""

    staged = config.with_changes({"network.architecture": "staged"})
    expected = 0.25 * 6 * codec + 0.75 * (codec + 6 * denoise)
    assert training_flops(staged) == pytest.approx(expected)


def test_phases_and_codec():
    assert OneFold.phases == PixelNetwork.phases == Network.phases == ("self_distillation",)
    assert ThreeNetworks.phases == ("autoencoder", "diffusion")
    assert [kind.learns_codec for kind in (OneFold, ThreeNetworks, PixelNetwork, Network)] == [True, True, False, True]
    for name, kind in BUILT_IN.items():
        net = build(NetworkConfig(width=32, depth=3, heads=2, architecture=name))
        z = net.encode(torch.rand(1, 1, 8, 8))
        assert z.requires_grad == net.decode(torch.randn_like(z)).requires_grad == kind.learns_codec


def test_what_serves_all_roles_is_what_the_network_says():
    register("mine")(Linear)
    net = build(NetworkConfig(architecture="mine", depth=2))
    assert parameter_shares(net) == {"parameters": 15 + 16 + 15, "shared": 0, "share": 0}

    class Sharing(Linear):
        @property
        def shared_parts(self) -> tuple[nn.Module, ...]:
            return (self.denoiser,)

    shares = parameter_shares(Sharing(net.config))
    assert shares == {"parameters": 46, "shared": 15, "share": 15 / 46}
