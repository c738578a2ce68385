"""The ratio network: what it computes, what it starts from, its files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import randomised
from helpers_runs import differing
from onefold.errors import UserError
from onefold.networks.base import Network, NetworkConfig, build
from onefold.networks.ratio import RatioConfig, RatioNet

SMALL = RatioConfig(numbers=4, width=32, depth=2, heads=2, grid=(4, 4), classes=10)


def ratio_net(**changes: object) -> RatioNet:
    return randomised(RatioNet(RatioConfig(**{**vars(SMALL), **changes})))


def points(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(count, 16, 4), torch.linspace(0, 1, count), torch.arange(count)


def network(**changes: object) -> Network:
    return randomised(build(NetworkConfig(width=32, depth=2, heads=2, **changes)), seed=3)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (2, 7)], ids=str)
@pytest.mark.parametrize("numbers", [1, 12])
def test_there_is_one_number_for_each_image(grid: tuple[int, int], numbers: int):
    net = ratio_net(grid=grid, numbers=numbers)
    x_t = torch.randn(3, grid[0] * grid[1], numbers)
    logits = net(x_t, torch.rand(3), torch.tensor([0, 9, 10]))
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    assert len(set(logits.tolist())) == 3


def test_without_labels_there_is_no_class():
    net, (x_t, t, y) = ratio_net(), points()
    assert torch.equal(net(x_t, t), net(x_t, t, torch.full((5,), 10)))
    assert (net(x_t, t) - net(x_t, t, y)).abs().min() > 1e-4
    unconditional = ratio_net(classes=0)
    assert torch.equal(unconditional(x_t, t), unconditional(x_t, t, torch.zeros(5, dtype=torch.int64)))


def test_an_image_s_ratio_is_its_own():
    """It depends on its own sample, time and label, and on no other image of the batch."""
    net, (x_t, t, y) = ratio_net(), points()
    whole = net(x_t, t, y)
    for k in range(5):
        torch.testing.assert_close(net(x_t[k : k + 1], t[k : k + 1], y[k : k + 1]), whole[k : k + 1])
        changed = x_t.clone()
        changed[k] += 1
        moved = (net(changed, t, y) - whole).abs() > 1e-3
        assert moved.tolist() == [j == k for j in range(5)]
    assert (net(x_t, 1 - t, y) - whole).abs().max() > 1e-3


def test_every_token_counts():
    net, (x_t, t, y) = ratio_net(), points(1)
    whole = net(x_t, t, y)
    for token in range(16):
        changed = x_t.clone()
        changed[:, token] += 1
        assert (net(changed, t, y) - whole).abs() > 1e-4, token


@pytest.mark.parametrize("seed", range(3))
def test_it_is_not_zero_at_the_start(seed: int):
    """A head that begins at zero gives the generator no gradient and takes long to leave it."""
    torch.manual_seed(seed)
    net, (x_t, t, y) = RatioNet(SMALL), points()
    x_t.requires_grad_()
    logits = net(x_t, t, y)
    assert logits.abs().min() > 0
    (slope,) = torch.autograd.grad(logits.sum(), x_t)
    assert slope.abs().amax((1, 2)).min() > 1e-5
    assert logits.std() > 1e-3, "and tells inputs apart"


@pytest.mark.usefixtures("float64")
def test_the_gradient_at_its_input_is_that_of_finite_differences():
    net, (x_t, t, y), h = ratio_net().double(), points(3), 1e-6
    x_t, t = x_t.double().requires_grad_(), t.double()
    (slope,) = torch.autograd.grad(net(x_t, t, y).sum(), x_t)
    for _ in range(5):
        direction = torch.randn_like(x_t)
        with torch.no_grad():
            ahead, behind = (net(x_t + sign * h * direction, t, y).sum() for sign in (1, -1))
        torch.testing.assert_close((slope * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


# --- what it starts from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "three_networks", "equal": "compute"},
        {"architecture": "pixels", "channels": 3},
        {"classes": 0},
    ],
    ids=str,
)
def test_it_has_the_shape_and_the_features_of_a_network(changes: dict[str, object]):
    net = network(**changes)
    ratio = RatioNet.of(net)
    own = net.config
    assert ratio.config == RatioConfig(own.latent_channels, 32, 2, 2, own.grid, own.classes)
    assert differing(ratio.backbone.state_dict(), net.backbone().state_dict()) == []
    x_t, t = torch.randn(2, own.tokens, own.latent_channels), torch.tensor([0.2, 0.9])
    y = torch.tensor([own.classes, 0])
    torch.testing.assert_close(ratio(x_t, t, y), ratio.head(net.backbone()(x_t, t, y)))


def test_it_may_take_the_first_blocks_alone():
    net = network()
    ratio = RatioNet.of(net, 1)
    assert ratio.config.depth == len(ratio.backbone.trunk.blocks) == 1
    assert differing(ratio.backbone.state_dict(), net.backbone(1).state_dict()) == []
    with pytest.raises(UserError, match=r"^blocks: 3 is not within 1 to 2, the blocks of the network$"):
        RatioNet.of(net, 3)


def test_or_random_weights_of_the_same_shape():
    net = network()
    learned, random = RatioNet.of(net, 1), RatioNet.of(net, 1, learned=False)
    assert random.config == learned.config
    taken = differing(learned.backbone.state_dict(), random.backbone.state_dict())
    assert taken == list(net.backbone(1).state_dict()), "no weight is the network's"


def test_it_shares_no_weight_with_the_network():
    net = network()
    own = {p.data_ptr() for p in net.parameters()}
    ratio = RatioNet.of(net)
    assert not own & {p.data_ptr() for p in ratio.parameters()}
    assert all(p.requires_grad for p in ratio.parameters())


# --- files ------------------------------------------------------------------------------------------------------------


def test_there_and_back_to_the_bit(tmp_path: Path):
    net = ratio_net()
    net.save_pretrained(tmp_path / "new" / "ratio")
    found = RatioNet.from_pretrained(tmp_path / "new" / "ratio")
    assert found.config == net.config
    assert differing(found.state_dict(), net.state_dict()) == []
    assert not found.training
    x_t, t, y = points()
    assert torch.equal(found(x_t, t, y), net(x_t, t, y))
    assert sorted(path.name for path in (tmp_path / "new" / "ratio").iterdir()) == ["config.json", "model.safetensors"]


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def cut_config(folder: Path) -> None:
    os.truncate(folder / "config.json", 20)


def no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\x80\x04\xff{")


def other_width(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"width": 64}))


def no_width(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"width": 0}))


def foreign_weights(folder: Path) -> None:
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")


def weight_missing(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")
    del values["head.out.bias"]
    save_file(values, folder / "model.safetensors")


def denoiser(folder: Path) -> None:
    network().save_pretrained(folder)


DAMAGES = [remove_weights, remove_config, cut_weights, cut_config, no_text, other_width, no_width, foreign_weights]
DAMAGES += [weight_missing, denoiser]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_folder_is_one_line(damage: Callable[[Path], None], tmp_path: Path):
    folder = tmp_path / "ratio"
    ratio_net().save_pretrained(folder)
    RatioNet.from_pretrained(folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        RatioNet.from_pretrained(folder)
    assert str(caught.value).startswith(f"{folder}") or damage is no_width
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: does not hold a ratio network \(No such file or directory\)$"):
        RatioNet.from_pretrained(tmp_path / "nowhere")
