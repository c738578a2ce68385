"""The DSD objective: where its gradient goes and does not go, against a loss written out image by image."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import randomised
from onefold.errors import UserError
from onefold.networks import NetworkConfig, OneFold
from onefold.objectives.losses import Span, each_tensor, perceptual_error, reconstruction_error
from onefold.objectives.self_distillation import (
    DenoisingDraws,
    SelfDistillation,
    denoising_error,
    draw,
    self_distillation,
)
from onefold.paths import TimeDistribution
from onefold.training.ema import average_of

TINY = NetworkConfig((4, 6), channels=2, classes=3, patch=2, latent_channels=3, width=8, depth=1, heads=1)
LATENT = (TINY.tokens, TINY.latent_channels)
OBJECTIVE = SelfDistillation(draws=2, label_dropout=0.3, decoder_noise=0.5, flip=True)


class Case:
    """Networks with random weights, a batch and its draws."""

    def __init__(self, objective: SelfDistillation = OBJECTIVE, batch: int = 3, *, double: bool = False) -> None:
        self.objective = objective
        self.network = randomised(OneFold(TINY), 1)
        self.target = average_of(randomised(OneFold(TINY), 2))
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(batch, 2, 4, 6, generator=generator) * 2 - 1
        self.y = torch.randint(0, 3, (batch,), generator=generator)
        self.draws = draw(objective, batch, LATENT, generator)
        if double:
            self.network.double()
            self.target.double()
            self.x = self.x.double()
            self.draws = each_tensor(self.draws, lambda v: v.double() if v.is_floating_point() else v)

    def change(self, **changes: object) -> "Case":
        self.objective = dataclasses.replace(self.objective, **changes)
        return self

    @property
    def arguments(self) -> tuple:
        return self.network, self.target, self.x, self.y, self.draws, self.objective

    def loss(self) -> Tensor:
        return self_distillation(*self.arguments).total

    def gradient(self, loss: Tensor | None = None) -> dict[str, Tensor]:
        """The gradient of a loss (default: the objective's) for each parameter of the network; zeros where none."""
        names = dict(self.network.named_parameters())
        loss = self.loss() if loss is None else loss
        found = torch.autograd.grad(loss, list(names.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(names, found, strict=True))

    def latents(self) -> Tensor:
        """The online latents now, as constants."""
        with torch.no_grad():
            return self.network.encode(mirrored(self.x, self.draws))


def mirrored(x: Tensor, draws: DenoisingDraws) -> Tensor:
    return torch.stack([image.flip(-1) if flip else image for image, flip in zip(x, draws.mirrored, strict=True)])


def written_out(case: Case, z_0: Tensor) -> Tensor:
    """The objective as its docstring has it, one image and one draw at a time.

    Latents that take no gradient are the constants `z_0`, so that the whole is a plain function of the weights.
    """
    network, target, x, y, draws, o = case.arguments
    reconstruction, denoising, perceptual = [], [], []
    for k, image in enumerate(mirrored(x, draws).split(1)):
        z = network.encode(image)
        with torch.no_grad():
            z_star = {"ema": target.encode(image), "stopped": z_0[k : k + 1]}
        z_star = {**z_star, "gradient": z}[o.target]
        t = draws.decoder_t[k]
        x_hat = network.decode(t * z + (1 - t) * draws.decoder_eps[k])
        e = (x_hat - image).flatten()
        reconstruction += [{"l1": e.abs(), "l2": e**2, "charbonnier": (e**2 + 1e-6) ** 0.5}[o.reconstruction].mean()]
        if o.perceptual_weight:
            pairs = zip(target.features(x_hat), target.features(image), strict=True)
            distances = [(F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).norm(dim=-1) ** 2 for a, b in pairs]
            perceptual += [torch.stack(distances).mean()]
        for t, eps, unlabelled in zip(draws.t[k], draws.eps[k], draws.unlabelled[k], strict=True):
            z_t = t * (z if o.through else z_0[k : k + 1]) + (1 - t) * eps
            z_hat = network.denoise(z_t, t[None], torch.tensor([3]) if unlabelled else y[k : k + 1])
            error = z_hat - z_star
            if o.loss == "velocity":
                error = ((z_hat - z_t) - (1 - t) * (z_star - eps)) / max(1 - t, 0.05)
            weight = 1.0 if o.weighting == "uniform" else min((t / (1 - t)) ** 2, 5)
            denoising += [(weight * error**2).mean()]
    terms = [o.reconstruction_weight * torch.stack(reconstruction).mean()]
    terms += [o.denoising_weight * torch.stack(denoising).mean()]
    if o.perceptual_weight:
        terms += [o.perceptual_weight * torch.stack(perceptual).mean()]
    return torch.stack(terms).sum()


COMBINATIONS = [
    {"target": target, "loss": loss, "through": through}
    for target, loss, through in itertools.product(("ema", "stopped", "gradient"), ("clean", "velocity"), (False, True))
]
OTHERS = [
    {"reconstruction": "l1"},
    {"reconstruction": "charbonnier", "reconstruction_weight": 0.3},
    {"weighting": "min_snr", "denoising_weight": 2.0},
    {"weighting": "min_snr", "loss": "velocity", "draws": 3},
    {"decoder_noise": 1.0, "decoder_noise_from": 0.1, "flip": False, "draws": 1},
    {"perceptual_weight": 0.7},
    {"perceptual_weight": 0.7, "target": "gradient", "loss": "velocity", "through": True},
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("changes", COMBINATIONS + OTHERS, ids=lambda c: "-".join(map(str, c.values())))
def test_loss_and_gradient_are_those_of_the_formula(changes: dict[str, object]):
    """The value, and the slope along random directions by finite differences of the formula, in float64."""
    case = Case(dataclasses.replace(OBJECTIVE, **changes), double=True)
    z_0, h = case.latents(), 1e-5
    assert case.loss().item() == pytest.approx(written_out(case, z_0).item(), rel=1e-10)
    gradient = case.gradient()
    weights = dict(case.network.named_parameters())
    generator = torch.Generator().manual_seed(0)
    groups = [list(weights), [n for n in weights if n.startswith("patches_in")], ["latents_out.weight"]]
    for names in groups:
        direction = {n: torch.randn(weights[n].shape, generator=generator, dtype=torch.float64) for n in names}
        values = []
        for step in (h, -2 * h):
            with torch.no_grad():
                for n in names:
                    weights[n].add_(direction[n], alpha=step)
                values.append(written_out(case, z_0).item())
        with torch.no_grad():
            for n in names:
                weights[n].add_(direction[n], alpha=h)
        slope = sum((gradient[n] * direction[n]).sum().item() for n in names)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-8)


# --- where the gradient goes ---


def denoising_only(**changes: object) -> Case:
    return Case().change(reconstruction_weight=0.0, **changes)


def largest(gradient: dict[str, Tensor], prefix: str) -> float:
    return max(g.abs().max().item() for name, g in gradient.items() if name.startswith(prefix))


@pytest.mark.parametrize("loss", ["clean", "velocity"])
@pytest.mark.parametrize(
    ("target", "through", "reaches"),
    [
        ("ema", False, False),
        ("stopped", False, False),
        ("gradient", False, True),
        ("ema", True, True),
        ("stopped", True, True),
        ("gradient", True, True),
    ],
)
def test_denoising_reaches_the_encoder_only_where_asked(loss: str, target: str, through: bool, reaches: bool):
    gradient = denoising_only(loss=loss, target=target, through=through).gradient()
    if reaches:
        assert largest(gradient, "patches_in") > 1e-4
    else:
        assert largest(gradient, "patches_in") == 0  # exactly
    for part in ("latents_in", "latents_out", "trunk", "modulation", "time", "labels"):
        assert largest(gradient, part) > 1e-6
    assert largest(gradient, "patches_out") == 0


@pytest.mark.parametrize("target", ["ema", "stopped"])
def test_without_through_latents_out_learns_from_denoising_alone(target: str):
    """Its gradient is that of the denoiser on constant latents: nothing comes through encoding."""
    case = denoising_only(target=target)
    z = case.latents()
    z_star = z if target == "stopped" else case.target.encode(mirrored(case.x, case.draws))
    t, eps = case.draws.t.flatten(), case.draws.eps.flatten(0, 1)
    at = t[:, None, None]
    labels = torch.where(case.draws.unlabelled, 3, case.y[:, None]).flatten()
    z_hat = case.network.denoise(at * z.repeat_interleave(2, 0) + (1 - at) * eps, t, labels)
    expected = case.gradient((z_hat - z_star.repeat_interleave(2, 0)).square().mean())
    for name, g in case.gradient().items():
        torch.testing.assert_close(g, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_stopped_target_has_the_gradient_of_a_constant_target():
    """The latents of an unmoved copy are such a constant."""
    case = Case().change(target="stopped", through=True)
    stopped = case.gradient()
    case.target = average_of(case.network)
    constant = case.change(target="ema").gradient()
    through_target = case.change(target="gradient").gradient()
    for name, g in stopped.items():
        torch.testing.assert_close(g, constant[name], atol=1e-6, rtol=1e-4, msg=name)
    distance = (stopped["patches_in.weight"] - through_target["patches_in.weight"]).abs().max()
    assert distance > 1e-3


def test_reconstruction_teaches_encoder_and_decoder():
    gradient = Case().change(denoising_weight=0.0).gradient()
    for part in ("patches_in", "patches_out", "latents_in", "latents_out", "trunk", "modulation"):
        assert largest(gradient, part) > 1e-5
    for part in ("time", "labels"):
        assert largest(gradient, part) == 0
    assert gradient["roles.weight"][1].abs().max() == 0


@pytest.mark.parametrize("perceptual_weight", [0.0, 0.5])
def test_the_average_takes_no_gradient(perceptual_weight: float):
    case = Case().change(target="ema", perceptual_weight=perceptual_weight, through=True)
    case.loss().backward()
    assert all(p.grad is None and not p.requires_grad for p in case.target.parameters())
    without = {name for name, p in case.network.named_parameters() if p.grad is None}
    assert without == {"jump.vector", "jump.arrival"}, "which a one-step generator alone has a use for"


def test_target_latents_take_no_gradient_even_if_the_target_could():
    case = Case().change(target="ema")
    case.target.requires_grad_(True)
    case.loss().backward()
    assert all(p.grad is None for p in case.target.parameters())


@pytest.mark.parametrize("target", ["stopped", "gradient"])
def test_without_need_the_average_is_not_read(target: str):
    case = Case().change(target=target)
    expected = case.loss()
    for p in case.target.parameters():
        p.fill_(math.nan)
    assert torch.equal(case.loss(), expected)
    assert case.change(target="ema").loss().isnan()


# --- the loss is a plain function of batch and draws ---


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 5), (4, 2)])
def test_micro_batches_have_the_gradient_of_the_batch(n: int, sizes: tuple[int, ...]):
    case = Case(dataclasses.replace(OBJECTIVE, draws=n, through=True), batch=6, double=True)
    whole, total, start = case.gradient(), {}, 0
    x, y, draws = case.x, case.y, case.draws
    for size in sizes:
        stop = start + size
        case.x, case.y, case.draws = x[start:stop], y[start:stop], draws.part(start, stop)
        for name, g in case.gradient().items():
            total[name] = total.get(name, 0) + g
        start = stop
    for name, g in whole.items():
        torch.testing.assert_close(total[name], g, atol=1e-10, rtol=1e-6, msg=name)


@pytest.mark.usefixtures("float64")
def test_draws_are_averaged():
    case = Case(dataclasses.replace(OBJECTIVE, draws=3), double=True)
    draws, whole = case.draws, case.loss()
    singles = []
    for k in range(3):
        one = slice(k, k + 1)
        case.draws = draws._replace(t=draws.t[:, one], eps=draws.eps[:, one], unlabelled=draws.unlabelled[:, one])
        singles.append(case.loss())
    torch.testing.assert_close(torch.stack(singles).mean(), whole)
    assert torch.stack(singles).std() > 1e-3


def test_the_same_draws_give_the_same_loss_and_others_another():
    case = Case()
    assert torch.equal(case.loss(), case.loss())
    before = case.loss()
    case.draws = draw(OBJECTIVE, 3, LATENT, torch.Generator().manual_seed(1))
    assert case.loss() != before


def test_parts_are_unweighted_and_without_gradient():
    case = Case().change(reconstruction_weight=0.25, denoising_weight=3.0)
    losses = self_distillation(*case.arguments)
    assert losses.parts.keys() == {"reconstruction", "denoising"}
    expected = 0.25 * losses.parts["reconstruction"] + 3 * losses.parts["denoising"]
    torch.testing.assert_close(losses.total.detach(), expected)
    assert not any(part.requires_grad for part in losses.parts.values())


def test_perceptual_part_is_listed_and_weighted():
    case = Case().change(perceptual_weight=0.5, reconstruction_weight=0.0, denoising_weight=0.0)
    losses = self_distillation(*case.arguments)
    torch.testing.assert_close(losses.total.detach(), 0.5 * losses.parts["perceptual"])
    assert largest(case.gradient(), "patches_out") > 1e-5


def test_perceptual_error_is_a_distance_in_the_features_of_the_average():
    case = Case()
    assert perceptual_error(case.target, case.x, case.x) == 0
    near, far = (perceptual_error(case.target, case.x + s * torch.randn_like(case.x), case.x) for s in (0.01, 0.5))
    assert 0 < near < far <= 4
    x_hat = torch.zeros_like(case.x, requires_grad=True)
    perceptual_error(case.target, x_hat, case.x).backward()
    assert x_hat.grad is not None
    assert x_hat.grad.abs().max() > 0
    assert all(p.grad is None for p in case.target.parameters())


def test_unconditional_networks_ignore_labels():
    case = Case()
    case.network = randomised(OneFold(dataclasses.replace(TINY, classes=0)))
    case.target = average_of(case.network)
    before = case.loss()
    case.y = case.y + 7
    assert torch.equal(case.loss(), before)


# --- draws ---


def drawn(batch: int = 20_000, seed: int = 0, **changes: object) -> DenoisingDraws:
    return draw(SelfDistillation(**changes), batch, (1, 1), torch.Generator().manual_seed(seed))


def test_draws_have_the_shapes_of_their_docstring():
    *tensors, span = d = draw(dataclasses.replace(OBJECTIVE, draws=4), 5, (6, 3), torch.Generator())
    assert [v.shape for v in tensors] == [(5,), (5, 4), (5, 4, 6, 3), (5, 4), (5,), (5, 6, 3), (5, 2)]
    assert span == Span(0, 5, 5)
    *cut, part = d.part(1, 3)
    assert all(torch.equal(a, b[1:3]) for a, b in zip(cut, tensors, strict=True))
    assert part == Span(1, 3, 5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_in_the_share_asked_for(share: float):
    found = drawn(draws=2, label_dropout=share).unlabelled.float().mean().item()
    assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / 40_000)


def test_dropped_labels_do_not_matter_and_others_do():
    case = Case(dataclasses.replace(OBJECTIVE, label_dropout=0.0))
    case.draws = case.draws._replace(unlabelled=torch.tensor([[True, True], [False, True], [False, False]]))
    before, y = case.loss(), case.y
    for k, matters in enumerate([False, True, True]):
        case.y = torch.where(torch.arange(3) == k, (y + 1) % 3, y)
        assert (case.loss() != before) == matters


def test_half_of_the_images_are_mirrored_if_asked():
    assert not drawn().mirrored.any()
    assert abs(drawn(flip=True).mirrored.float().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(20_000)


def test_mirroring_is_a_loss_of_the_mirror_image():
    case = Case()
    case.draws = case.draws._replace(mirrored=torch.tensor([True, False, True]))
    expected = case.loss()
    case.x = torch.stack([case.x[0].flip(-1), case.x[1], case.x[2].flip(-1)])
    assert case.loss() != expected
    case.draws = case.draws._replace(mirrored=torch.zeros(3, dtype=torch.bool))
    assert torch.equal(case.loss(), expected)


def test_decoder_noise_falls_on_its_share_within_its_times():
    assert (drawn(decoder_noise=0).decoder_t == 1).all()
    t = drawn(decoder_noise=0.3, decoder_noise_from=0.6).decoder_t
    noisy = t < 1
    assert abs(noisy.float().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
    assert t.min() >= 0.6
    assert abs(t[noisy].mean().item() - 0.8) < 0.01
    assert abs(t[noisy].std().item() - 0.4 / math.sqrt(12)) < 0.01


def test_decoder_noise_acts_where_chosen_only():
    case = Case()
    case.draws = case.draws._replace(decoder_t=torch.tensor([1.0, 0.5, 1.0]), mirrored=torch.zeros(3) > 0)
    z = case.latents()
    noisy = torch.stack([z[0], 0.5 * z[1] + 0.5 * case.draws.decoder_eps[1], z[2]])
    expected = (case.network.decode(noisy) - case.x).square().mean()
    torch.testing.assert_close(self_distillation(*case.arguments).parts["reconstruction"], expected.detach())
    assert ((case.network.decode(z) - case.x).square().mean() - expected).abs() > 1e-3


def test_times_of_a_batch_are_stratified_over_images_and_draws():
    d = draw(SelfDistillation(draws=4, time=TimeDistribution(shift=0.5)), 8, (1, 1), torch.Generator().manual_seed(0))
    u = d.t / (0.5 + 0.5 * d.t)  # shift 1/0.5 undoes it
    assert torch.equal((u.flatten().sort().values * 32).floor(), torch.arange(32.0))


def test_draws_come_from_the_generator_alone():
    a, b, c = (drawn(batch=4, seed=seed, flip=True, decoder_noise=0.5) for seed in (1, 1, 2))
    assert all(torch.equal(u, v) for u, v in zip(a[:-1], b[:-1], strict=True))
    assert not torch.equal(a.eps, c.eps)
    assert abs(a.eps.mean()) < 2
    eps = drawn().eps.flatten()
    assert abs(eps.mean()) < 0.03
    assert abs(eps.std() - 1) < 0.03


# --- errors of the two losses ---


def pieces(t: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z, eps, error = torch.randn(3, 2, 5, 3, dtype=torch.float64)
    at = torch.full((2,), t, dtype=torch.float64)
    return z + error, t * z + (1 - t) * eps, z, eps, at


@pytest.mark.parametrize("t", [0.0, 0.4, 0.9, 0.949])
def test_velocity_error_is_the_clean_error_over_the_square_of_what_is_left(t: float):
    """Where z_t was made from the target itself."""
    values = pieces(t)
    clean, fast = (denoising_error(*values, SelfDistillation(loss=loss)) for loss in ("clean", "velocity"))
    torch.testing.assert_close(fast, clean / (1 - t) ** 2)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.96, 0.999, 1.0])
@pytest.mark.parametrize("loss", ["clean", "velocity"])
def test_the_minimum_lies_at_the_target_at_all_times(t: float, loss: str):
    _, z_t, z, eps, at = pieces(t)
    z_hat = z.clone().requires_grad_()
    error = denoising_error(z_hat, z_t, z, eps, at, SelfDistillation(loss=loss))
    error.backward()
    assert error < 1e-25
    assert z_hat.grad is not None
    assert z_hat.grad.abs().max() < 1e-12
    assert denoising_error(z + 0.1, z_t, z, eps, at, SelfDistillation(loss=loss)) > 1e-3


@pytest.mark.parametrize(("t", "weight"), [(0.0, 0.0), (0.5, 1.0), (0.6, 2.25), (0.9, 5.0), (1.0, 5.0)])
def test_min_snr_weights(t: float, weight: float):
    values = pieces(t)
    uniform, weighted = (denoising_error(*values, SelfDistillation(weighting=w)) for w in ("uniform", "min_snr"))
    torch.testing.assert_close(weighted, weight * uniform)


def test_reconstruction_errors_by_hand():
    x, x_hat = torch.zeros(1, 1, 1, 3), torch.tensor([0.0, 3.0, -1.0]).view(1, 1, 1, 3)
    assert reconstruction_error(x_hat, x, "l1").item() == pytest.approx(4 / 3)
    assert reconstruction_error(x_hat, x, "l2").item() == pytest.approx(10 / 3)
    expected = (1e-3 + math.sqrt(9 + 1e-6) + math.sqrt(1 + 1e-6)) / 3
    assert reconstruction_error(x_hat, x, "charbonnier").item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"draws": 0}, "objective.draws: 0 is not positive"),
        ({"label_dropout": 1.1}, "objective.label_dropout: 1.1 is not between 0 and 1"),
        ({"decoder_noise": -0.1}, "objective.decoder_noise: -0.1 is not between 0 and 1"),
        ({"decoder_noise_from": math.nan}, "objective.decoder_noise_from: nan is not"),
    ],
)
def test_switches_that_make_no_sense_are_one_line(changes: dict[str, object], text: str):
    with pytest.raises(UserError) as error:
        SelfDistillation(**changes)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)
