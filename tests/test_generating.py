"""The generating role: at first that of denoising; then a role of its own, from which the others know nothing."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import randomised
from onefold.errors import UserError
from onefold.networks import RatioNet
from onefold.networks.base import Network, NetworkConfig, RoleFlops, build
from onefold.networks.jump import Jump
from onefold.networks.trunk import TIME_FEATURES, Trunk, fourier_features
from onefold.sampling import Sampler, noises

KINDS = {
    "one": NetworkConfig(width=32, depth=1, heads=2),
    "velocity": NetworkConfig(width=32, depth=1, heads=2, output="velocity"),
    "three": NetworkConfig(width=32, depth=3, heads=2, architecture="three_networks"),
    "pixels": NetworkConfig(width=32, depth=1, heads=2, architecture="pixels"),
    "unconditional": NetworkConfig(width=32, depth=1, heads=2, classes=0),
}
JUMP = {"jump.vector", "jump.arrival"}

every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: str) -> Network:
    """All its weights are random, but for those of the role, which are still zero."""
    net = randomised(build(KINDS[kind]))
    with torch.no_grad():
        for name in JUMP:
            net.get_parameter(name).zero_()
    return net


def noised_latents(kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    config, rng = KINDS[kind], torch.Generator().manual_seed(1)
    z_t = torch.randn(3, config.tokens, config.latent_channels, generator=rng)
    return z_t, torch.tensor([0.0, 0.3, 0.9]), torch.tensor([0, 3, 10]) if config.classes else None


def roles(net: Network, kind: str) -> dict[str, Tensor]:
    """What the other roles do."""
    z_t, t, y = noised_latents(kind)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        together = net.decode_and_denoise(z_t, z_t, t, y)
        parts = {"denoise": net.denoise(z_t, t, y), "encode": net.encode(x), "decode": net.decode(z_t)}
        return (
            parts
            | {f"features {k}": h for k, h in enumerate(net.features(x))}
            | {f"both {k}": value for k, value in enumerate(together)}
        )


# --- what it is -------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("fresh", [True, False])
def test_an_untrained_generator_denoises(kind: str, fresh: bool):
    """To the bit, wherever it goes."""
    net = build(KINDS[kind]) if fresh else network(kind)
    z_t, t, y = noised_latents(kind)
    for r in (None, torch.ones(3), torch.tensor([0.5, 0.4, 0.95])):
        assert torch.equal(net.generate(z_t, t, y, r), net.denoise(z_t, t, y))


@every_kind
@pytest.mark.parametrize("name", sorted(JUMP))
def test_its_own_weights_change_it_alone(kind: str, name: str):
    net = network(kind)
    given, before = noised_latents(kind), roles(net, kind)
    generated = net.generate(*given)
    with torch.no_grad():
        net.get_parameter(name).normal_(generator=torch.Generator().manual_seed(3))
    after = roles(net, kind)
    assert all(torch.equal(after[role], value) for role, value in before.items())
    assert ((net.generate(*given) - generated).flatten(1).norm(dim=1) > 1e-3).all()


@every_kind
def test_a_jump_ends_at_data_unless_it_is_told_otherwise(kind: str):
    net = network(kind)
    z_t, t, y = noised_latents(kind)
    earlier = torch.tensor([0.2, 0.5, 0.95])
    with torch.no_grad():
        net.get_parameter("jump.vector").normal_()
        assert torch.equal(net.generate(z_t, t, y, earlier), net.generate(z_t, t, y)), "a vector knows no time"
        net.get_parameter("jump.arrival").normal_()
        assert torch.equal(net.generate(z_t, t, y), net.generate(z_t, t, y, torch.ones(3)))
        differences = net.generate(z_t, t, y, earlier) - net.generate(z_t, t, y)
    assert (differences.flatten(1).norm(dim=1) > 1e-3).all()


def test_what_it_adds_is_a_vector_and_a_linear_map_of_the_arrival():
    jump, r = randomised(Jump(Trunk(8, 1, 2, 2, 2))), torch.tensor([0.0, 0.4, 1.0])
    features = fourier_features(r, TIME_FEATURES)
    expected = jump.vector + torch.stack([(jump.arrival * row).sum(1) for row in features])
    torch.testing.assert_close(jump.condition(r), expected)
    assert (jump.condition(r)[1:] - jump.condition(r)[0]).abs().min() > 0


@every_kind
def test_it_is_conditioned_as_denoising_plus_that(kind: str, monkeypatch: pytest.MonkeyPatch):
    net = randomised(build(KINDS[kind]))
    given = noised_latents(kind)
    (modulation,) = [part for name, part in net.named_modules() if name.split(".")[-1] == "modulation"]
    seen: list[Tensor] = []
    honest = modulation.forward

    def forward(condition: Tensor) -> Tensor:
        seen.append(condition)
        return honest(condition)

    monkeypatch.setattr(modulation, "forward", forward)
    r = torch.tensor([0.5, 0.6, 1.0])
    net.denoise(*given)
    net.generate(*given, r)
    jump = net.get_submodule("jump")
    torch.testing.assert_close(seen[1] - seen[0], jump.condition(r), atol=1e-5, rtol=1e-5)


@every_kind
def test_its_weights_have_a_gradient_from_generating_alone(kind: str):
    net = network(kind)
    given = noised_latents(kind)
    own = [net.get_parameter(name) for name in sorted(JUMP)]
    for role in (net.denoise, net.generate):
        found = torch.autograd.grad(role(*given).square().sum(), own, allow_unused=True)
        assert [g is not None and bool((g != 0).any()) for g in found] == [role == net.generate] * 2


@every_kind
def test_wrong_inputs_are_refused_as_denoising_does(kind: str):
    net = network(kind)
    z_t, t, y = noised_latents(kind)
    for wrong in ((z_t[:, :-1], t, y), (z_t[..., :-1], t, y)):
        said: list[str] = []
        for role in (net.denoise, net.generate):
            with pytest.raises(UserError) as error:
                role(*wrong)
            said.append(str(error.value))
        assert said[0] == said[1]


def test_a_network_without_the_role_denoises_in_it():
    class Plain(Network):
        def denoise(self, z_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            return z_t * (1 + t[:, None, None]) + (0 if y is None else y[:, None, None])

        @classmethod
        def role_flops(cls, config: NetworkConfig) -> RoleFlops:
            return RoleFlops(0, 0, 0)

    net, (z_t, t, y) = Plain(KINDS["one"]), noised_latents("one")
    assert torch.equal(net.generate(z_t, t, y), net.denoise(z_t, t, y))
    assert torch.equal(net.generate(z_t, t, y, torch.ones(3)), net.denoise(z_t, t, y))


@every_kind
def test_one_step_is_sampled_in_this_role_and_many_in_the_other(kind: str):
    net = randomised(build(KINDS[kind]))
    labels = [4, 7] if net.config.classes else None
    y = None if labels is None else torch.tensor(labels)
    eps = next(noises([8, 9], (net.config.tokens, net.config.latent_channels)))
    for start in (0.0, 0.3):
        (made,) = net.sample_latents([8, 9], labels, Sampler(1, "renoise", start=start))
        with torch.no_grad():
            expected = net.generate((1 - start) * eps, torch.full((2,), start), y)
        torch.testing.assert_close(made, expected)
    (made,) = net.sample_latents([8, 9], labels, Sampler(1))
    with torch.no_grad():
        torch.testing.assert_close(made, net.denoise(eps, torch.zeros(2), y))


def test_a_ratio_network_starts_from_denoising_whatever_the_generator_has_learned():
    net = network("one")
    before = RatioNet.of(net).backbone.state_dict()
    with torch.no_grad():
        for name in JUMP:
            net.get_parameter(name).normal_()
    assert all(torch.equal(value, before[name]) for name, value in RatioNet.of(net).backbone.state_dict().items())


# --- weights from before there was this role --------------------------------------------------------------------------


@every_kind
def test_no_random_number_is_drawn_for_it(kind: str, monkeypatch: pytest.MonkeyPatch):
    """So that a seed means the weights that it has always meant."""
    trunk = Trunk(32, 1, 2, 2, 2)
    generator = torch.get_rng_state()
    Jump(trunk)
    assert torch.equal(torch.get_rng_state(), generator)
    for name in JUMP:
        assert not build(KINDS[kind]).get_parameter(name).any()


@every_kind
def test_older_weights_load_with_zeros(kind: str, tmp_path: Path):
    net, other = network(kind), randomised(build(KINDS[kind]), 5)
    older = {name: value for name, value in net.state_dict().items() if name not in JUMP}
    names = set(older)
    assert len(names) == len(net.state_dict()) - 2
    other.load_state_dict(older)
    assert set(older) == names, "what was given is left alone"
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())

    net.save_pretrained(tmp_path)
    save_file({name: v for name, v in load_file(tmp_path / "model.safetensors").items() if name not in JUMP},
              tmp_path / "model.safetensors")  # fmt: skip
    found, given = Network.from_pretrained(tmp_path), noised_latents(kind)
    assert torch.equal(found.generate(*given), net.denoise(*given))


@every_kind
def test_its_own_weights_are_saved_and_loaded(kind: str, tmp_path: Path):
    net = randomised(build(KINDS[kind]))
    net.sampler = Sampler(1, "renoise", start=0.4)
    net.save_pretrained(tmp_path)
    found, given = Network.from_pretrained(tmp_path), noised_latents(kind)
    assert found.sampler == net.sampler
    assert torch.equal(found.generate(*given), net.generate(*given))
    assert not torch.equal(found.generate(*given), found.denoise(*given))


@pytest.mark.parametrize("missing", ["trunk.norm.weight", "roles.weight"])
def test_nothing_else_may_be_missing(missing: str):
    net = network("one")
    state = {name: value for name, value in net.state_dict().items() if name not in {*JUMP, missing}}
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(state)


def test_a_sampler_saved_before_there_was_a_start_begins_at_noise(tmp_path: Path):
    net = network("one")
    net.save_pretrained(tmp_path)
    (tmp_path / "sampler.json").write_text('{"steps": 1, "solver": "renoise"}')
    assert Network.from_pretrained(tmp_path).sampler == Sampler(1, "renoise")
    assert dataclasses.asdict(Sampler())["start"] == 0
