"""Solvers, guidance, seeds and labels; the truth is a Gaussian, whose flow from noise to data is m + √S ε."""

import itertools
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from onefold.cli import run as command
from onefold.errors import UserError
from onefold.networks.base import Network, NetworkConfig
from onefold.networks.one_network import OneFold
from onefold.paths import Linear, Path, VariancePreserving, per_token, velocity
from onefold.sampling import (
    SOLVERS,
    Denoiser,
    Sampler,
    generate,
    noises,
    resolve_labels,
    solve,
    time_grid,
    with_guidance,
)

SHAPE = (2, 2)
MEAN = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[1.0, 0.5, 0.0, 0.2], [0.5, 2.0, -0.3, 0.0], [0.0, -0.3, 0.4, 0.1], [0.2, 0.0, 0.1, 0.7]], dtype=torch.float64
)


def gaussian_denoiser(path: Path) -> Denoiser:
    """The exact E[z | z_t] for latents (2, 2) that are Gaussian together."""

    def denoise(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        alpha, sigma = path.coefficients(t[0].double())
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(4))
        return (MEAN + (z_t.flatten(1) - alpha * MEAN) @ gain.T).view_as(z_t)

    return denoise


def transported(eps: Tensor) -> Tensor:
    """Where the exact flow carries noise: m + √S ε, with the symmetric root."""
    eigenvalues, frame = torch.linalg.eigh(COVARIANCE)
    return (MEAN + eps.flatten(1) @ (frame * eigenvalues.sqrt()) @ frame.T).view_as(eps)


@pytest.mark.parametrize("path", [Linear(), VariancePreserving()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_error_falls_with_the_order_of_the_solver(path: Path, solver: str, order: int):
    eps = torch.randn(50, *SHAPE, dtype=torch.float64)
    errors = [
        (solve(gaussian_denoiser(path), eps, None, Sampler(n, solver), path) - transported(eps)).square().mean().sqrt()
        for n in (40, 80, 160)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert torch.log2(coarse / fine).item() == pytest.approx(order, abs=0.15)
    assert errors[-1] < (0.02 if order == 1 else 2e-4)


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_shifted_grid_ends_in_the_right_place_too(shift: float):
    eps = torch.randn(50, *SHAPE, dtype=torch.float64)
    end = solve(gaussian_denoiser(Linear()), eps, None, Sampler(200, "heun", shift=shift))
    torch.testing.assert_close(end, transported(eps), atol=1e-3, rtol=0)


def test_samples_have_the_mean_and_covariance_of_the_data():
    denoise = gaussian_denoiser(Linear())
    parts = list(generate(denoise, SHAPE, range(20_000), None, Sampler(32, "heun"), null_label=0, batch=5000))
    z = torch.cat(parts).flatten(1).double()
    deviation = (COVARIANCE.diagonal() / len(z)).sqrt()
    assert ((z.mean(0) - MEAN) / deviation).abs().max() < 4
    torch.testing.assert_close(z.T.cov(), COVARIANCE, atol=4 * 2 * (2 / len(z)) ** 0.5, rtol=0)


def elementwise(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """A denoiser whose arithmetic is exact rounding of each number alone, so that equality can be bitwise."""
    offset = 0 if y is None else per_token(y.float())
    return 3 * z_t / (1 + z_t.abs()) * (0.5 + per_token(t)) + offset


def test_one_step_is_the_denoiser_at_time_zero():
    eps, y = torch.randn(3, *SHAPE), torch.tensor([0, 1, 2])
    for solver in ("euler", "heun"):
        assert torch.equal(solve(elementwise, eps, y, Sampler(1, solver)), elementwise(eps, torch.zeros(3), y))


@pytest.mark.parametrize(("solver", "calls"), [("euler", 5), ("heun", 9)])
def test_network_is_called_as_often_as_said(solver: str, calls: int):
    times: list[float] = []

    def denoise(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert t.shape == (len(z_t),)
        times.extend(set(t.tolist()))
        return z_t

    solve(denoise, torch.randn(3, *SHAPE), None, Sampler(5, solver))
    assert len(times) == calls
    assert set(times) == set(time_grid(Sampler(5))[:-1].tolist())


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (solver, options)
        for solver in sorted(SOLVERS)
        for options in ({}, {"guidance": 3.0}, {"guidance": 3.0, "guidance_interval": (0.25, 0.5)})
        if not (options and Sampler(1, solver).jumps)  # a one-step generator is not guided
    ],
    ids=str,
)
def test_a_sampler_knows_how_often_it_evaluates_the_network(solver: str, options: dict):
    """At times 0, ¼, ½, ¾: two of them are exactly the ends of the interval."""
    made: list[int] = []
    sampler = Sampler(1 if solver == "one_pass" else 4, solver, **options)
    list(generate(counted(made), SHAPE, [1], [0], sampler, null_label=9))
    assert sum(made) == sampler.evaluations


@pytest.mark.parametrize(
    ("interval", "guided_times"), [((0.25, 0.5), 2), ((0.3, 0.5), 1), ((0.5, 0.5), 1), ((0.6, 0.7), 0)]
)
def test_evaluations_count_both_ends_of_the_guidance_interval(interval: tuple[float, float], guided_times: int):
    assert Sampler(4, guidance=2.0, guidance_interval=interval).evaluations == 4 + guided_times


def test_euler_on_the_linear_path_is_the_formula():
    z, y, grid = torch.randn(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2]), [0.0, 0.25, 0.5, 0.75, 1.0]
    end = solve(elementwise, z, y, Sampler(4))
    for now, then in itertools.pairwise(grid):
        z = z + (then - now) * (elementwise(z, torch.full((3,), now), y) - z) / (1 - now)
    torch.testing.assert_close(end, z)


@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
def test_time_grid_runs_from_noise_to_data(shift: float):
    grid = time_grid(Sampler(7, shift=shift))
    assert grid.shape == (8,)
    assert (grid[0], grid[-1]) == (0, 1)
    assert (grid.diff() > 0).all()
    k = torch.arange(7) / 7
    torch.testing.assert_close(grid[:-1] / (1 - grid[:-1]), shift * k / (1 - k))


# --- a solver of one's own ---


class Midpoint:
    """Second order: the velocity in the middle of a step; the last step takes ẑ."""

    def evaluation_times(self, times: list[float]) -> list[float]:
        pairs = list(itertools.pairwise(times[:-1]))
        return [t for now, then in pairs for t in (now, (now + then) / 2)] + [times[-2]]

    def integrate(self, denoise, z: Tensor, times: list[float], path: Path, noise) -> Tensor:
        def v(z: Tensor, t: float) -> Tensor:
            return velocity(path, denoise(z, t), z, per_token(torch.full((len(z),), t)))

        for now, then in itertools.pairwise(times[:-1]):
            half = z + (then - now) / 2 * v(z, now)
            z = z + (then - now) * v(half, (now + then) / 2)
        return denoise(z, times[-2])


@pytest.fixture
def midpoint(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SOLVERS, "midpoint", Midpoint())
    return "midpoint"


def test_a_solver_of_ones_own_has_its_order_and_its_count(midpoint: str):
    eps = torch.randn(50, *SHAPE, dtype=torch.float64)
    coarse, fine = (
        (solve(gaussian_denoiser(Linear()), eps, None, Sampler(n, midpoint)) - transported(eps)).square().mean().sqrt()
        for n in (40, 80)
    )
    assert torch.log2(coarse / fine).item() == pytest.approx(2, abs=0.2)
    made: list[int] = []
    sampler = Sampler(4, midpoint, guidance=2.0, guidance_interval=(0.3, 0.6))
    list(generate(counted(made), SHAPE, [1], [0], sampler, null_label=9))
    assert sum(made) == sampler.evaluations == 7 + 2


def test_a_solver_of_ones_own_works_in_networks_files_and_commands(
    midpoint: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    network = OneFold(NetworkConfig(width=32, depth=1, heads=2)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    by_name = network.sample(3, steps=4, solver=midpoint)
    assert (by_name != network.sample(3, steps=4)).any()
    network.sampler = Sampler(4, midpoint)
    network.save_pretrained(tmp_path / "network")
    assert (Network.from_pretrained(tmp_path / "network").sample(3) == by_name).all()

    words = ["sample", str(tmp_path / "network"), "--n", "3", "--steps", "4", "--solver", midpoint, "--device", "cpu"]
    assert command([*words, "--out", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as file:
        assert file.text["solver"] == midpoint
        assert (np.asarray(file)[1:49:6, 1:49:6] == by_name[0, :, :, 0]).all()

    monkeypatch.delitem(SOLVERS, midpoint)
    with pytest.raises(UserError, match=r"sampler\.json: solver: 'midpoint' is not one of 'euler'"):
        Network.from_pretrained(tmp_path / "network")


# --- renoising ---


def renoised(steps: int, seeds: list[int], labels: list[int] | None = None, **options: object) -> Tensor:
    sampler, null_label = Sampler(steps, "renoise", **options), 9 if labels else 0
    return torch.cat(list(generate(elementwise, SHAPE, seeds, labels, sampler, null_label=null_label, batch=64)))


def test_one_step_of_renoising_is_one_step_of_euler():
    seeds, labels = [3, 4, 5], [0, 1, 2]
    euler = next(generate(elementwise, SHAPE, seeds, labels, Sampler(1), null_label=9))
    assert torch.equal(renoised(1, seeds, labels), euler)
    assert not torch.equal(renoised(2, seeds, labels), euler)


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_renoising_is_the_formula(shift: float):
    """ẑ at each time, noised to the next with the seed's next noise."""
    for seed, label in ((3, 0), (8, 2)):
        rng, y = torch.Generator().manual_seed(seed), torch.tensor([label])
        grid = time_grid(Sampler(4, shift=shift))
        z = torch.randn(1, *SHAPE, generator=rng)
        for then in grid[1:-1].tolist():
            z = then * elementwise(z, grid[grid < then][-1:], y) + (1 - then) * torch.randn(SHAPE, generator=rng)
        torch.testing.assert_close(renoised(4, [seed], [label], shift=shift), elementwise(z, grid[-2:-1], y))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoising_calls_the_network_once_a_step(steps: int):
    calls: list[int] = []
    list(generate(counted(calls), SHAPE, [1, 2, 3], None, Sampler(steps, "renoise"), null_label=0))
    assert calls == [3] * steps


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_renoised_image_does_not_depend_on_batch_order_or_number(start: float):
    def latents(seeds: list[int], batch: int) -> Tensor:
        sampler, labels = Sampler(4, "renoise", start=start), [seed % 3 for seed in seeds]
        return torch.cat(list(generate(elementwise, SHAPE, seeds, labels, sampler, null_label=9, batch=batch)))

    seeds = list(range(10, 20))
    whole = latents(seeds, 64)
    for batch in (1, 3, 10):
        assert torch.equal(latents(seeds, batch), whole)
    assert torch.equal(latents(seeds[4:], 4), whole[4:])
    assert torch.equal(latents(seeds[::-1], 4), whole.flip(0))
    assert len(whole.flatten(1).unique(dim=0)) == 10


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_a_one_step_generator_is_not_guided(guidance: float):
    with pytest.raises(
        UserError, match=r"guidance: \d cannot guide a one-step generator while it samples; leave it at 1"
    ):
        Sampler(4, "renoise", guidance)
    with pytest.raises(
        UserError, match=r"--solver euler --steps 50, or train with --onestep.score.guidance or --onerun.guidance$"
    ):
        Sampler(1, "renoise").with_options(guidance=guidance)
    assert Sampler(1, "renoise").with_options(guidance=guidance, solver="euler").guidance == guidance


def never(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    raise AssertionError("denoised where it should jump")


@pytest.mark.parametrize("start", [0.0, 0.25])
def test_solvers_that_jump_ask_the_generating_role_for_a_jump_to_the_end(start: float):
    seen: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

    def jump(z_t: Tensor, t: Tensor, y: Tensor | None, r: Tensor) -> Tensor:
        seen.append((z_t, t, y, r))
        return elementwise(z_t, t, y)

    sampler = Sampler(3, "renoise", start=start)
    made = next(generate(never, SHAPE, [3, 4], [0, 2], sampler, null_label=9, jump=jump))
    assert torch.equal(made, next(generate(elementwise, SHAPE, [3, 4], [0, 2], sampler, null_label=9)))
    assert [t.tolist() for _, t, _, _ in seen] == [[t] * 2 for t in time_grid(sampler)[:-1].tolist()]
    assert all(r.tolist() == [1, 1] and y is not None and y.tolist() == [0, 2] for _, _, y, r in seen)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_solvers_of_the_flow_denoise_even_where_there_is_a_generating_role(solver: str):
    def jump(z_t: Tensor, t: Tensor, y: Tensor | None, r: Tensor) -> Tensor:
        raise AssertionError("jumped where it should denoise")

    sampler = Sampler(3, solver)
    made, plain = (
        next(generate(elementwise, SHAPE, [3], None, sampler, null_label=0, jump=role)) for role in (jump, None)
    )
    assert torch.equal(made, plain)


def test_renoising_with_the_exact_denoiser_of_a_point_ends_there():
    def point(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return torch.full_like(z_t, 0.7)

    for steps in (1, 3):
        found = next(generate(point, SHAPE, [1, 2], None, Sampler(steps, "renoise"), null_label=0))
        assert torch.equal(found, torch.full((2, *SHAPE), 0.7))


# --- drafting and refining ---


def refined(steps: int, jump: Denoiser, denoise: Denoiser, count: int = 2, **options: float) -> Tensor:
    def arriving(z_t: Tensor, t: Tensor, y: Tensor | None, r: Tensor) -> Tensor:
        assert (r == 1).all()
        return jump(z_t, t, y)

    sampler, seeds = Sampler(steps, "refine", **options), list(range(count))  # type: ignore[arg-type]
    return next(generate(denoise, SHAPE, seeds, None, sampler, null_label=0, batch=count, jump=arriving))


@pytest.mark.parametrize("start", [0.0, 0.3])
@pytest.mark.parametrize(("steps", "turn"), [(2, 0.9), (3, 0.8), (4, 0.7), (8, 0.3), (9, 0.2), (11, 0.0), (30, 0.0)])
def test_refining_goes_back_a_tenth_for_each_step_and_at_most_to_the_start(steps: int, turn: float, start: float):
    """Once at the start, then from there to the end in equal steps."""
    turn = max(start, turn)
    found = SOLVERS["refine"].evaluation_times(time_grid(Sampler(steps, "refine", start=start)).tolist())
    expected = [turn + (1 - turn) * k / (steps - 1) for k in range(steps - 1)]
    assert found == pytest.approx([start, *expected], abs=1e-6)
    jumped: list[float] = []
    denoised: list[float] = []

    def seen(times: list[float]) -> Denoiser:
        return lambda z_t, t, y: times.append(t[0].item()) or z_t

    refined(steps, seen(jumped), seen(denoised), start=start)
    assert jumped == pytest.approx([start])
    assert denoised == pytest.approx(expected, abs=1e-6)
    assert Sampler(steps, "refine", start=start).evaluations == steps


@given(st.integers(2, 12), st.floats(0.1, 4), st.floats(0, 0.95))
def test_its_later_steps_are_spaced_as_those_of_the_grid(steps: int, shift: float, start: float):
    grid = time_grid(Sampler(steps, "refine", shift=shift, start=start)).double()
    first, *found = SOLVERS["refine"].evaluation_times(grid.tolist())
    turn = max(grid[0].item(), 1 - 0.1 * (steps - 1))
    assert first == grid[0]
    assert found[0] == pytest.approx(turn)
    rest = (grid[1:] - grid[1]) / (1 - grid[1])
    torch.testing.assert_close(torch.tensor([*found, 1.0]), (turn + (1 - turn) * rest).float(), rtol=0, atol=1e-5)
    assert all(one < other for one, other in itertools.pairwise([*found, 1.0]))


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_refining_in_one_step_is_the_jump_itself(start: float):
    eps, t = next(noises([0, 1], SHAPE)), torch.full((2,), start)
    made = refined(1, elementwise, never, start=start)
    assert torch.equal(made, elementwise(eps if start == 0 else (1 - t)[:, None, None] * eps, t, None))
    renoise = next(generate(elementwise, SHAPE, [0, 1], None, Sampler(1, "renoise", start=start), null_label=0))
    assert torch.equal(made, renoise)


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_refining_is_the_formula(steps: int):
    """The draft, noised to the turn with the seed's second noise; Euler steps from there."""
    stream = noises([0, 1], SHAPE)
    eps, second = next(stream), next(stream)
    turn = max(0.0, 1 - 0.1 * (steps - 1))
    z = turn * elementwise(eps, torch.zeros(2), None) + (1 - turn) * second
    grid = torch.linspace(turn, 1, steps)
    for now, then in itertools.pairwise(grid.tolist()):
        clean = elementwise(z, torch.full((2,), now), None) + 1
        z = z + (then - now) / (1 - now) * (clean - z)
    made = refined(steps, elementwise, lambda z_t, t, y: elementwise(z_t, t, y) + 1)
    torch.testing.assert_close(made, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 40])
def test_a_perfect_generator_and_denoiser_give_the_data_s_mean_and_variance(steps: int):
    """Of N(0.5, 1.2²) in each number. Euler's own error, which is known here, is all that is taken off.

    At the turn t the variance is v = (ts)² + (1−t)², and each step to r multiplies deviations by
    1 + (r − t)(g − 1)/(1 − t), where g = ts²/v is the gain of the clean prediction.
    """
    mean, std, count = 0.5, 1.2, 20_000

    def exact(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        t = t[:, None, None]
        return mean + t * std**2 / ((t * std) ** 2 + (1 - t) ** 2) * (z_t - t * mean)

    made = refined(steps, lambda z_t, t, y: mean + std * z_t, exact, count).double()
    variance = std**2
    if steps > 1:
        turn = max(0.0, 1 - 0.1 * (steps - 1))
        variance = (turn * std) ** 2 + (1 - turn) ** 2
        for now, then in itertools.pairwise(torch.linspace(turn, 1, steps, dtype=torch.float64).tolist()):
            gain = now * std**2 / ((now * std) ** 2 + (1 - now) ** 2)
            variance *= (1 + (then - now) * (gain - 1) / (1 - now)) ** 2
        assert variance == pytest.approx(std**2, rel=0.2), "no step is so long that it ends in a mean"
    numbers = made.numel()
    assert made.mean().item() == pytest.approx(mean, abs=4 * std / numbers**0.5)
    assert made.var().item() == pytest.approx(variance, rel=4 * (2 / numbers) ** 0.5)


def test_a_refined_image_does_not_depend_on_batch_or_order():
    def latents(seeds: list[int], batch: int) -> Tensor:
        sampler = Sampler(4, "refine", start=0.3)
        return torch.cat(list(generate(elementwise, SHAPE, seeds, None, sampler, null_label=0, batch=batch)))

    whole = latents(list(range(10, 20)), 64)
    for batch in (1, 3):
        assert torch.equal(latents(list(range(10, 20)), batch), whole)
    assert torch.equal(latents(list(range(19, 9, -1)), 4), whole.flip(0))


# --- the start ---


@pytest.mark.parametrize("path", [Linear(), VariancePreserving()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("start", [0.0, 0.2, 0.6])
def test_from_a_later_start_the_flow_carries_noise_without_data(path: Path, start: float):
    """z = σ₀ε lies on the path of u with z = α₀m + (α₀²S + σ₀²)^½ u, which ends at m + S^½ u."""
    eps = torch.randn(20, *SHAPE, dtype=torch.float64)
    alpha, sigma = (float(value) for value in path.coefficients(torch.tensor(start, dtype=torch.float64)))
    eigenvalues, frame = torch.linalg.eigh(COVARIANCE)
    u = (sigma * eps.flatten(1) - alpha * MEAN) @ frame / (alpha**2 * eigenvalues + sigma**2).sqrt()
    exact = (MEAN + (u * eigenvalues.sqrt()) @ frame.T).view_as(eps)
    errors = [
        (solve(gaussian_denoiser(path), eps, None, Sampler(n, "heun", start=start), path) - exact).square().mean()
        for n in (40, 160)
    ]
    assert errors[1] < 1e-5
    assert errors[1] < errors[0] / 50, "of second order: of the squares, a 256th"


@pytest.mark.parametrize("start", [0.0, 0.3, 0.9])
def test_one_jump_is_the_role_at_noise_times_what_the_start_leaves(start: float):
    eps, y, t = next(noises([7, 8], SHAPE)), torch.tensor([2, 1]), torch.full((2,), start)
    made = next(generate(elementwise, SHAPE, [7, 8], [2, 1], Sampler(1, "renoise", start=start), null_label=9))
    torch.testing.assert_close(made, elementwise((1 - start) * eps, t, y))


@given(st.floats(0, 0.99), st.floats(0.1, 4), st.integers(1, 9))
def test_the_grid_begins_at_the_start_and_is_that_of_noise_squeezed(start: float, shift: float, steps: int):
    grid, whole = (time_grid(Sampler(steps, shift=shift, start=at)) for at in (start, 0.0))
    assert (grid[0].item(), grid[-1].item()) == (pytest.approx(start, abs=1e-7), 1)
    assert (grid.diff() > 0).all()
    torch.testing.assert_close(grid, start + (1 - start) * whole)


def test_another_solver_that_does_not_jump_begins_at_noise():
    one_step, flow = Sampler(1, "renoise", start=0.3), Sampler(8)
    assert one_step.with_options(steps=2) == Sampler(2, "renoise", start=0.3)
    assert one_step.with_options(solver="renoise", steps=4) == Sampler(4, "renoise", start=0.3)
    assert one_step.with_options(solver="heun", steps=9) == Sampler(9, "heun")
    assert one_step.with_options(solver="heun", start=0.1) == Sampler(50, "heun", start=0.1), "unless one is asked for"
    assert one_step.with_options(solver="euler", guidance=2.0, shift=0.5) == Sampler(50, guidance=2.0, shift=0.5)
    assert one_step.with_options(solver="refine", shift=0.5) == Sampler(1, "refine", shift=0.5, start=0.3)
    assert flow.with_options(solver="heun") == Sampler(8, "heun"), "a denoiser's own steps stay"
    assert one_step.with_options() == one_step.with_options(steps=None, solver=None) == one_step
    assert flow.with_options(start=0.2).with_options(steps=3) == Sampler(3, start=0.2)
    assert flow.with_options(solver="renoise") == Sampler(8, "renoise")
    assert (one_step.jumps, flow.jumps, Sampler(1, "heun").jumps) == (True, False, False)


def test_a_solver_that_jumps_is_refused_for_a_network_that_denoises():
    own, one_step = Sampler(8), Sampler(1, "refine", start=0.3)
    for solver in ("refine", "renoise"):
        jumps = own.with_options(solver=solver)
        told = rf"^solver: '{solver}' needs a one-step generator; make one with `onefold onestep RUN` or "
        with pytest.raises(UserError, match=told):
            jumps.check_for(own)
        one_step.with_options(solver=solver).check_for(one_step)
    for each in (own, one_step):
        Sampler(8, "heun").check_for(each)


def test_noises_of_a_seed_are_one_stream():
    ours = list(itertools.islice(noises([3, 5], (4, 2)), 3))
    for row, seed in enumerate((3, 5)):
        rng = torch.Generator().manual_seed(seed)
        for drawn in ours:
            assert torch.equal(drawn[row], torch.randn(4, 2, generator=rng))
    assert torch.equal(ours[0], next(noises([3, 5], (4, 2))))


# --- guidance ---


def counted(calls: list[int]) -> Denoiser:
    def denoise(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        calls.append(len(z_t))
        return elementwise(z_t, t, y)

    return denoise


def test_guidance_of_one_is_the_denoiser_itself():
    assert with_guidance(elementwise, 1.0, 9) is elementwise


@pytest.mark.parametrize("w", [0.0, 0.5, 2.5, -1.0])
def test_guidance_extrapolates_linearly_from_no_class(w: float):
    calls: list[int] = []
    z, t, y = torch.randn(3, *SHAPE), torch.full((3,), 0.5), torch.tensor([0, 1, 2])
    without = elementwise(z, t, torch.full((3,), 9))
    expected = without + w * (elementwise(z, t, y) - without)
    torch.testing.assert_close(with_guidance(counted(calls), w, 9)(z, t, y), expected)
    assert calls == [6]


@pytest.mark.parametrize(("solver", "calls"), [("euler", [3, 6, 6, 6]), ("heun", [3, 6, 6, 6, 6, 6, 6])])
def test_guidance_acts_within_its_interval_and_at_its_ends(solver: str, calls: list[int]):
    """At times 0, ¼, ½, ¾, of which Heun's method sees all but the first twice."""
    made: list[int] = []
    sampler = Sampler(4, solver, guidance=3, guidance_interval=(0.25, 0.75))
    eps, y, denoise = torch.randn(3, *SHAPE), torch.tensor([0, 1, 2]), counted(made)
    solve(denoise, eps, y, sampler, guide=with_guidance(denoise, 3, 9))
    assert made == calls


def test_no_step_reads_a_number_from_the_device():
    """It would have to wait there; on a device that computes nothing it cannot."""
    eps, y = torch.empty(3, *SHAPE, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    end = solve(elementwise, eps, y, Sampler(4, "heun", guidance=2), guide=with_guidance(elementwise, 2, 9))
    assert end.shape == eps.shape


@pytest.mark.parametrize(("labels", "null_label"), [(None, 9), (None, 0), ([0, 0], 0)])
def test_guidance_without_classes_is_refused(labels: list[int] | None, null_label: int):
    def latents(guidance: float) -> Tensor:
        sampler = Sampler(2, guidance=guidance)
        return next(generate(elementwise, SHAPE, [0, 1], labels, sampler, null_label=null_label))

    with pytest.raises(UserError, match=r"^guidance: 3 needs classes, and this network knows none; leave it at 1$"):
        latents(3)
    assert latents(1).shape == (2, *SHAPE)


def test_a_guided_denoiser_needs_labels():
    with pytest.raises(UserError, match=r"^guidance: 3 needs labels; give them, or leave it at 1$"):
        with_guidance(elementwise, 3, 9)(torch.randn(3, *SHAPE), torch.full((3,), 0.5), None)


def test_guidance_acts_in_generation_within_its_interval_only():
    def latents(**options: object) -> Tensor:
        return next(generate(elementwise, SHAPE, [0, 1], [1, 2], Sampler(4, **options), null_label=9))

    assert not torch.equal(latents(guidance=2), latents())
    assert torch.equal(latents(guidance=2, guidance_interval=(0.3, 0.4)), latents())
    assert not torch.equal(latents(guidance=2, guidance_interval=(0.2, 0.3)), latents())


# --- seeds and labels ---


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_batch_order_or_number(guidance: float):
    def latents(seeds: list[int], labels: list[int], batch: int) -> Tensor:
        sampler = Sampler(3, "heun", guidance)
        return torch.cat(list(generate(elementwise, SHAPE, seeds, labels, sampler, null_label=9, batch=batch)))

    seeds, labels = list(range(10, 20)), [k % 3 for k in range(10)]
    whole = latents(seeds, labels, 64)
    for batch in (1, 3, 10):
        assert torch.equal(latents(seeds, labels, batch), whole)
    assert torch.equal(latents(seeds[4:], labels[4:], 4), whole[4:])
    assert torch.equal(latents(seeds[::-1], labels[::-1], 4), whole.flip(0))


def test_batches_are_of_the_size_asked_for():
    calls: list[int] = []
    parts = list(generate(counted(calls), SHAPE, range(7), None, Sampler(1), null_label=0, batch=3))
    assert [len(part) for part in parts] == calls == [3, 3, 1]
    with pytest.raises(UserError, match=r"^batch: 0 is not positive"):
        next(generate(elementwise, SHAPE, range(7), None, Sampler(1), null_label=0, batch=0))


def test_noise_comes_from_each_seed_alone():
    eps = next(noises([3, 5, 3], (4, 2)))
    assert torch.equal(eps[1], torch.randn(4, 2, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(eps[0], eps[2])
    assert not torch.equal(eps[0], eps[1])
    before = torch.get_rng_state()
    next(noises([1], (4, 2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_large_seeds_are_seeds_of_their_own():
    """Of which torch's generator reads 32 bits alone."""
    seeds = [5, 5 + 2**32, 5 + 2**33, 5 + 2**40, 5 + 2**62, 5 + 2**63]
    assert len(next(noises(seeds, (4, 2))).flatten(1).unique(dim=0)) == len(seeds)
    assert torch.equal(next(noises(seeds, (4, 2))), next(noises(seeds, (4, 2))))


def test_labels_default_to_the_seed_modulo_the_classes():
    assert resolve_labels(5, None, 8, 10) == [8, 9, 0, 1, 2]
    assert resolve_labels(3, None, 8, 0) is None
    assert resolve_labels(3, [0, 9, 10], 8, 10) == [0, 9, 10]
    assert resolve_labels(1, [0], 2**63 - 2, 0) == [0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, None, 0, 10), "n: 0 images cannot be sampled; give at least 1"),
        ((1, None, -1, 10), "seed: -1 is out of range; give an integer from 0"),
        ((2, None, 2**63 - 2, 10), "seed: 9223372036854775806 is out of range"),
        ((2, [1], 0, 10), "labels: 1 were given for n = 2; give one for each image"),
        ((1, [11], 0, 10), "labels: 11 is not a class of this network, which knows 0 to 9, or 10 for no class"),
        ((1, [-1], 0, 10), "labels: -1 is not a class"),
        ((1, [1], 0, 0), "labels: 1 is not a class of this network, which knows only 0"),
    ],
)
def test_labels_that_make_no_sense_are_one_line(arguments: tuple, text: str):
    with pytest.raises(UserError) as error:
        resolve_labels(*arguments)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "steps: 0 is not positive; give 1 for one-step sampling or more"),
        ({"shift": 0.0}, "shift: 0.0 is not positive; 1 leaves the time grid uniform"),
        ({"shift": float("nan")}, "shift: nan is not"),
        ({"shift": float("inf")}, "shift: inf is not"),
        ({"guidance": float("nan")}, "guidance: nan is not"),
        ({"guidance": float("-inf")}, "guidance: -inf is not"),
        (
            {"solver": "huen"},
            "solver: 'huen' is not one of 'euler', 'heun', 'renoise', 'refine', 'one_pass'; choose one",
        ),
        ({"start": 1.0}, "start: 1.0 must be at least 0 (noise) and below 1 (data)"),
        ({"start": -0.1}, "start: -0.1 must be"),
        ({"start": float("nan")}, "start: nan must be"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval: (0.6, 0.4) is not within 0 ≤ low ≤ high ≤ 1"),
        ({"guidance_interval": (-0.1, 0.4)}, "guidance_interval: (-0.1, 0.4) is not within"),
        ({"guidance_interval": (0.1, 1.4)}, "guidance_interval: (0.1, 1.4) is not within"),
    ],
)
def test_sampler_options_that_make_no_sense_are_one_line(options: dict[str, object], text: str):
    with pytest.raises(UserError) as error:
        Sampler(**options)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)
