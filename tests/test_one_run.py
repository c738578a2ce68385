"""One run: a generator and its student beside self-distillation, from random weights."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onefold
from conftest import randomised
from helpers_runs import batch, differing, fresh, log, newest, tensors, tiny
from onefold import alarm, cli
from onefold.data import read_all
from onefold.errors import UserError
from onefold.evaluation import drawn
from onefold.networks import RatioNet
from onefold.networks.base import Network, build
from onefold.networks.jump import Exit, Jump, change_flops
from onefold.objectives import one_run as objective
from onefold.objectives.losses import Losses
from onefold.objectives.one_run import OneRun, OneRunDraws
from onefold.paths import Linear, noised, per_token
from onefold.pixels import to_uint8
from onefold.sampling import Sampler, noises
from onefold.training import loop
from onefold.training.config import Config
from onefold.training.one_run import with_one_step
from onefold.training.phases import phases_of, training_flops
from onefold.training.run import Run
from onefold.training.state import TrainingState
from onefold.training.step import training_step
from onefold.verifier import Verifier
from onefold.web.generation import between
from onefold.web.served import Served


def together(**changes: Any) -> Config:
    """Ten steps of 16 digits; from the fourth on, generator, student and exit learn too."""
    kind = changes.get("network__architecture", "one_network")
    own = {"network__jump_rank": 3, "network__jump_exit": kind == "one_network"}
    return tiny(phases=("one_run",), **{**own, "onerun__begin": 48, "onerun__measured": 40, **changes})


def draws_of(config: Config, count: int = 16, seed: int = 3) -> OneRunDraws:
    shape = config.network.tokens, config.network.latent_channels
    rng = torch.Generator().manual_seed(seed)
    return objective.draw(config.onerun, config.objective.label_dropout, count, shape, rng)


class Modules(NamedTuple):
    """All different, and none of their weights is zero."""

    student: Jump
    generator: Jump
    average: Network


def modules_of(config: Config) -> Modules:
    average = randomised(build(config.network), 2).requires_grad_(False)
    jumps = [randomised(Jump(average.denoising_trunk, config.network.jump_rank), seed) for seed in (3, 4)]
    return Modules(*(jump.requires_grad_() for jump in jumps), average)


def losses_of(config: Config, draws: OneRunDraws, modules: Modules | None = None) -> Losses:
    return objective.one_run(*(modules or modules_of(config)), batch()[1], draws, config.onerun)


def gradient(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    names, values = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, values, allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, values, found, strict=True)}


# --- the loss ---------------------------------------------------------------------------------------------------------


def expected_terms(config: Config, modules: Modules, draws: OneRunDraws) -> tuple[Tensor, Tensor, Tensor]:
    """(student's error, generator's loss, mean squared difference) on the whole batch, written out."""
    student, generator, average = modules
    y = torch.where(draws.unlabelled, 10, batch()[1])
    start = torch.full((16,), config.onerun.start)
    fake = average.generate_with(generator, (1 - config.onerun.start) * draws.eps, start, y)
    x, t = fake.detach(), draws.score.t
    x_t = t[:, None, None] * x + (1 - t[:, None, None]) * draws.score.eps
    own, wanted = average.generate_with(student, x_t, t, y), average.denoise(x_t, t, y)
    difference = (own - wanted).detach()
    if config.onerun.normalised:
        difference = difference / (x - wanted).abs().flatten(1).mean(1).clamp(min=1e-3)[:, None, None]
    return (own - x).square().mean(), (difference * fake).mean(), difference.square().mean()


@pytest.mark.parametrize("normalised", [True, False])
def test_terms_are_as_they_are_defined(normalised: bool):
    config = together(onerun__share=1.0, onerun__normalised=normalised, objective__label_dropout=0.5)
    modules, draws = modules_of(config), draws_of(config)
    losses = losses_of(config, draws, modules)
    error, of_generator, difference = expected_terms(config, modules, draws)
    torch.testing.assert_close(losses.total, error + of_generator)
    torch.testing.assert_close(losses.parts["student"], error.detach())
    torch.testing.assert_close(losses.parts["difference"], difference)
    for module, loss in zip(modules[:2], (error, of_generator), strict=True):
        wanted = gradient(loss, module)
        for name, value in gradient(losses.total, module).items():
            torch.testing.assert_close(value, wanted[name], msg=name)


def test_student_and_generator_learn_by_their_own_loss_alone():
    """Exact zeros: the student's loss in the generator, the generator's in the student."""
    config = together()
    modules, draws = modules_of(config), draws_of(config)
    error, of_generator, _ = expected_terms(config, modules, draws)
    for loss, own, other in (
        (error, modules.student, modules.generator),
        (of_generator, modules.generator, modules.student),
    ):
        assert not any(value.any() for value in gradient(loss, other).values())
        assert all(value.any() for value in gradient(loss, own).values()), "and by its own with every weight"
    losses_of(config, draws, modules).total.backward()
    assert all(p.grad is None for p in modules.average.parameters())


def test_the_generators_gradient_is_that_of_finite_differences():
    """Of ½‖G − sg(G − (f_q − f_p))‖², whose gradient at G is f_q − f_p."""
    config = together(onerun__share=1.0, onerun__normalised=False)
    modules, draws = modules_of(config), draws_of(config)
    with torch.no_grad():
        y = torch.where(draws.unlabelled, 10, batch()[1])
        start = torch.full((16,), config.onerun.start)
        source = (1 - config.onerun.start) * draws.eps
        x, t = modules.average.generate_with(modules.generator, source, start, y), draws.score.t
        x_t = noised(Linear(), x, draws.score.eps, per_token(t))
        target = x - modules.average.generate_with(modules.student, x_t, t, y) + modules.average.denoise(x_t, t, y)

        def loss() -> float:
            made = modules.average.generate_with(modules.generator, source, start, y)
            return 0.5 * (made - target).double().square().mean().item()

        p, step = modules.generator.vector, 1e-2
        numbers: list[float] = []
        for k in range(4):
            sides: list[float] = []
            for sign in (1, -1):
                p[k] += sign * step
                sides.append(loss())
                p[k] -= sign * step
            numbers.append((sides[0] - sides[1]) / (2 * step))
    found = gradient(losses_of(config, draws, modules).total, modules.generator)["vector"][:4]
    torch.testing.assert_close(found, torch.tensor(numbers), rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.3, 1.0])
def test_the_losses_of_the_parts_of_a_batch_add_up(share: float):
    config = together(onerun__share=share)
    modules, draws, (_, y) = modules_of(config), draws_of(config), batch()
    whole = losses_of(config, draws, modules)
    parts = [objective.one_run(*modules, y[a:b], draws.part(a, b), config.onerun) for a, b in ((0, 5), (5, 6), (6, 16))]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    for name, value in whole.parts.items():
        torch.testing.assert_close(sum(part.parts.get(name, torch.zeros(())) for part in parts), value)


def test_guidance_moves_the_data_score_alone():
    plain, guided = (together(onerun__guidance=w) for w in (1.0, 3.0))
    modules, draws = modules_of(plain), draws_of(plain)
    a, b = (losses_of(config, draws, modules) for config in (plain, guided))
    assert torch.equal(a.parts["student"], b.parts["student"])
    assert a.parts["difference"] != b.parts["difference"]
    of_student = [gradient(each.total, modules.student) for each in (a, b)]
    assert differing(*of_student) == []


def exit_of(config: Config) -> nn.Module:
    return randomised(Exit(config.network.width, config.network.patch**2 * config.network.channels), 7)


def test_the_exit_learns_by_its_own_loss_alone():
    """The mean squared distance to the decoder's pictures; to generator and student it is as if it were not there."""
    config = together(onerun__share=1.0, objective__label_dropout=0.5)
    modules, draws, exit = modules_of(config), draws_of(config), exit_of(config)
    y = batch()[1]
    losses = objective.one_run(*modules, y, draws, config.onerun, exit)

    @torch.no_grad()
    def missed() -> Tensor:
        start, labels = torch.full((16,), 0.3), torch.where(draws.unlabelled, 10, y)
        fake, image = modules.average.generate_with_image(modules.generator, exit, 0.7 * draws.eps, start, labels)
        return (image - modules.average.decode(fake)).square().mean()

    torch.testing.assert_close(losses.parts["exit"], missed())
    without = losses_of(config, draws, modules)
    torch.testing.assert_close(losses.total, without.total + missed())
    for module in modules[:2]:
        assert differing(gradient(losses.total, module), gradient(without.total, module)) == []
    own, step = gradient(losses.total, exit), 1e-2
    weight = exit.get_parameter("linear.weight").data
    weight[0, 0] += step
    above = missed()
    weight[0, 0] -= 2 * step
    assert own["linear.weight"][0, 0].item() == pytest.approx(((above - missed()) / (2 * step)).item(), rel=0.01)
    assert all(value.any() for value in own.values())


# --- low-rank changes -------------------------------------------------------------------------------------------------


def test_a_jump_changes_each_matrix_of_the_blocks_by_a_matrix_of_its_rank():
    config = together().network
    net = randomised(build(config))
    jump = randomised(Jump(net.denoising_trunk, 3))
    merged = randomised(build(config))
    merged.load_state_dict(net.state_dict())
    change = jump.change
    assert change is not None
    matrices = [name for name, p in net.denoising_trunk.named_parameters() if p.ndim == 2 and p.shape[0] != 6]
    assert len(matrices) == len(change.a) == 4 * config.depth
    with torch.no_grad():
        for name, b, a in zip(matrices, change.b, change.a, strict=True):
            assert torch.linalg.matrix_rank(b @ a) == 3
            merged.denoising_trunk.get_parameter(name).add_(b @ a)
        merged.jump.vector.copy_(jump.vector)
        merged.jump.arrival.copy_(jump.arrival)
        merged.jump.change = None
        z, t, y = torch.randn(2, config.tokens, config.latent_channels), torch.tensor([0.2, 0.7]), torch.tensor([3, 10])
        torch.testing.assert_close(net.generate_with(jump, z, t, y), merged.generate(z, t, y))
        assert (net.generate_with(jump, z, t, y) - net.generate(z, t, y)).abs().max() > 1e-3
        fresh_one = Jump(net.denoising_trunk, 3)
        assert torch.equal(net.generate_with(fresh_one, z, t, y), net.denoise(z, t, y)), "nothing at first"


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = together(training__health_every=32)
    return onefold.train(config, tmp_path_factory.mktemp("one") / "run", quiet=True)


def test_the_shared_weights_are_those_of_plain_training_to_the_bit(whole: Run, tmp_path: Path):
    """Encoder, denoiser and decoder: whatever generator and student do, from the first step to the last."""
    plain = onefold.train(tiny(), tmp_path / "plain", quiet=True)
    one, other = whole.network.state_dict(), plain.network.state_dict()
    assert {name for name in differing(one, other) if not name.startswith(("jump.", "jump_exit."))} == set()
    assert one["jump.vector"].any()
    assert not other["jump.vector"].any()


def test_it_logs_latents_and_samples_and_every_loss(whole: Run):
    lines = {line["images"]: line for line in whole.history}
    assert list(lines) == [32, 64, 96, 128, 160]
    for images, line in lines.items():
        assert line["health"]["effective_rank"] > 1
        assert line["onestep"]["frechet"] > 0
        joined = {"student", "difference", "exit", "student_norm", "generator_norm", "exit_norm"}
        assert joined & line.keys() == (joined if images > 48 else set())
        assert all(math.isfinite(line[name]) for name in joined & line.keys())


def test_the_published_generator_is_the_average_of_the_trained_one():
    config = together(training__ema_half_lives=(32,))
    state = fresh(config)
    for step in range(7):
        training_step(state, *batch(start=16 * step), config)
        for trained, held in (("generator", "jump"), ("exit", "jump_exit")):
            own = state.network.get_submodule(held).state_dict()
            assert differing(state.modules[trained].state_dict(), own) == []
        begun = fresh(config).network.get_submodule("jump_exit").state_dict()
        moved = differing(state.averages[-1].get_submodule("jump_exit").state_dict(), begun)
        assert bool(moved) == (step >= 4), "updated in the fourth step, averaged in the fifth"
        changed = not torch.equal(state.averages[-1].jump.vector, torch.zeros(32))
        # At its first update the student is still the denoiser, so the generator does not move; after the second it is
        # handed over, and at the next step averaged.
        assert changed == (step >= 4)


@pytest.mark.parametrize("where", ["student", "generator", "network"])
def test_a_gradient_that_is_not_finite_leaves_all_as_it_was(where: str):
    config = together()
    state = fresh(config)
    for step in range(4):
        training_step(state, *batch(start=16 * step), config)
    module = state.modules[where]
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = math.inf
    before = tensors(state)
    training_step(state, *batch(start=64), config)
    changed = {name.partition(".")[0] for name in differing(before, tensors(state))}
    beside = ("student", "generator", "exit")
    assert not {*beside, *(f"optimizer of {name}" for name in beside)} & changed
    assert ("optimizer of network" in changed) == (where != "network"), "it learns before them"
    assert state.read_skips() == 1


@pytest.mark.parametrize("images", [48, 96])
def test_resumed_it_is_the_same_to_the_bit(images: int, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Stop(Exception):
        pass

    def stops(state: TrainingState, *rest: Any) -> dict[str, Tensor]:
        if state.counters.images == images + 16:
            raise Stop
        return training_step(state, *rest)

    monkeypatch.setattr(loop, "training_step", stops)
    with pytest.raises(Stop):
        onefold.train(whole.config, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    again = onefold.train(None, tmp_path / "run", resume=True, quiet=True)
    assert differing(newest(whole.folder), newest(again.folder)) == []
    assert log(whole.folder) == log(again.folder)


def test_what_it_publishes_samples_in_any_number_of_steps(whole: Run):
    network = whole.network
    assert network.sampler == Sampler(1, "refine", start=0.3)
    one = network.sample(4)
    assert one.shape == (4, 8, 8, 1)
    assert (network.sample(4, steps=1) == one).all()
    others = [network.sample(4, steps=steps) for steps in (2, 8)] + [network.sample(4, solver="euler", steps=50)]
    assert all((other != one).any() for other in others)


def test_one_pass_of_the_trunk_makes_an_image(whole: Run):
    network = whole.network
    passes: list[int] = []
    hook = network.denoising_trunk.register_forward_hook(lambda *_: passes.append(1))
    made = network.sample(4, solver="one_pass", seed=5)
    hook.remove()
    assert len(passes) == 1
    assert (network.sample(4, seed=5) != made).any()
    eps = next(noises(range(5, 9), (16, 4)))
    with torch.no_grad():
        image = network.generate_image(0.7 * eps, torch.full((4,), 0.3), torch.arange(5, 9))
        assert image.shape == (4, 1, 8, 8)
        assert (to_uint8(image).permute(0, 2, 3, 1).numpy() == made).all()
    assert (network.sample(5, solver="one_pass", seed=4, batch=2)[1:] == made).all(), "whatever the batch"
    assert network.sampler.with_options(solver="one_pass", steps=None) == Sampler(1, "one_pass", start=0.3)
    assert Sampler(1, "one_pass").evaluations == 1


def test_an_exit_changes_nothing_else_to_the_bit(whole: Run, tmp_path: Path):
    without = onefold.train(together(network__jump_exit=False, training__health_every=32), tmp_path / "run", quiet=True)
    one, other = whole.network.state_dict(), without.network.state_dict()
    assert {name for name in differing(one, other) if not name.startswith("jump_exit.")} == set()
    assert without.network.sampler == whole.network.sampler
    said = refused(lambda: without.network.sample(2, solver="one_pass"))
    assert "exit to pixels" in said
    assert "--one-step" in said


def test_what_is_evaluated_and_drawn_in_one_pass(whole: Run, tmp_path: Path):
    """By all that samples, from the same seeds."""
    sampler = whole.network.sampler.with_options(solver="one_pass")
    seen: list[Tensor] = []
    record = onefold.evaluate(
        whole, sampler=sampler, images=8, metrics={"kept": lambda real, made: seen.append(made) or 0.0}
    )
    assert record["protocol"]["sampler"] == "one_pass from t = 0.3"
    shown = between(whole.network, (3, 4), 2, 7, sampler)
    assert (shown[0] == whole.network.sample(1, labels=[7], seed=3, solver="one_pass")[0]).all()
    labels = labels_of(whole, 8)
    made = whole.network.sample(8, labels=labels, solver="one_pass")
    assert (seen[0].permute(0, 2, 3, 1).numpy() == made).all()
    picture = tmp_path / "grid.png"
    assert cli.run(["sample", str(whole.folder), "--solver", "one_pass", "-n", "4", "--out", str(picture)]) == 0
    assert picture.exists()
    assert "one_pass" in Served(whole.folder).solvers


def labels_of(run: Run, count: int) -> list[int]:
    """Of the training images that an evaluation compares with."""
    data, _ = run.open_data()
    return [int(label) for label in read_all(data, drawn(data, count, 0))[1]]


class Line(Jump):
    """A Gaussian of one mean and one standard deviation: a generator of it, or its denoiser."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.mean, self.log_std = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x | x_t] in closed form."""
        t, variance = per_token(t), (2 * self.log_std).exp()
        return self.mean + t * variance / (t**2 * variance + (1 - t) ** 2) * (x_t - t * self.mean)


class Gaussian(Network):
    """A network whose denoiser is that of data of mean 1 and standard deviation ½."""

    def __init__(self) -> None:
        super().__init__(tiny(network__classes=0).network)
        self.data = Line()
        with torch.no_grad():
            self.data.mean.fill_(1.0)
            self.data.log_std.fill_(math.log(0.5))
        self.requires_grad_(False)

    def denoise(self, z_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.data.denoise(z_t, t)

    def generate_with(
        self, jump: Jump, z_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None
    ) -> Tensor:
        assert isinstance(jump, Line)
        if isinstance(jump, Sampling):
            return jump.mean + jump.log_std.exp() * z_t / (1 - per_token(t))
        return jump.denoise(z_t, t)


class Sampling(Line):
    """The generator among the two."""


@pytest.mark.parametrize("normalised", [True, False])
def test_the_generator_of_a_gaussian_learns_its_mean_and_its_spread(normalised: bool):
    torch.manual_seed(0)
    options, average = OneRun(share=1.0, normalised=normalised), Gaussian()
    student, generator = Line(), Sampling()
    optimizers = [
        torch.optim.RMSprop(each.parameters(), lr=rate) for each, rate in ((student, 0.02), (generator, 0.01))
    ]
    rng = torch.Generator().manual_seed(0)
    for step in range(600):
        for optimizer, rate in zip(optimizers, (0.02, 0.01), strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 600)
        draws = objective.draw(options, 0.0, 64, (16, 4), rng)
        losses = objective.one_run(student, generator, average, torch.zeros(64, dtype=torch.int64), draws, options)
        losses.total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for who in (generator, student):
        assert who.mean.item() == pytest.approx(1.0, abs=0.03)
        assert who.log_std.exp().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(("size", "share"), [(1, 0.5), (5, 0.25), (16, 0.5)])
def test_micro_batches_take_the_same_step(size: int, share: float):
    """Also where one has no sample."""
    whole, cut = (together(onerun__share=share, training__micro_batch=micro) for micro in (None, size))
    found: list[dict[str, Tensor]] = []
    for config in (whole, cut):
        state = fresh(config)
        for step in range(6):
            training_step(state, *batch(start=16 * step), config)
        found.append({name: value for name, value in tensors(state).items() if value.is_floating_point()})
    assert max((found[0][name] - found[1][name]).abs().max().item() for name in found[0]) < 1e-4


def test_recomputing_the_blocks_is_the_same_to_the_bit():
    found: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        config = together(training__recompute=recompute)
        state = fresh(config)
        for step in range(6):
            training_step(state, *batch(start=16 * step), config)
        found.append(tensors(state))
    assert differing(*found) == []


def test_a_run_made_longer_goes_on_where_it_was(tmp_path: Path):
    config = with_one_step(tiny(onerun__measured=20, network__jump_rank=3))
    assert config.onerun.begin == 16 * round(0.35 * 160 / 16)
    onefold.train(config, tmp_path / "run", quiet=True)
    run = onefold.train(None, tmp_path / "run", resume=True, images=640, quiet=True)
    assert all("student" in line for line in run.history if line["images"] > 160)


@pytest.mark.parametrize("kind", ["one_network", "pixels", "three_networks"])
def test_a_rank_changes_no_other_weight_at_first(kind: str):
    """So that the shared weights of one run begin as those of plain training. An exit changes not even the generator's,
    nor the random numbers that follow."""
    nets: list[dict[str, Tensor]] = []
    for rank, exit in ((0, False), (3, False), (3, kind == "one_network")):
        torch.manual_seed(0)
        own = {"network__jump_rank": rank, "network__jump_exit": exit}
        nets.append(build(tiny(network__architecture=kind, network__depth=3, **own).network).state_dict())
        nets[-1]["following"] = torch.rand(1) if rank else torch.zeros(1)
    assert {name for name in differing(*nets[:2]) if not name.startswith("jump.")} == {"following"}
    assert {name for name in differing(*nets[1:]) if not name.startswith("jump_exit.")} == set()


def test_both_rates_and_their_schedule():
    config = together(onerun__generator_rate=0.1, onerun__student_rate=0.2, onerun__decay=0.25, onerun__updates=3)
    first, *others = phases_of(config)[0].parts
    assert len(others) == 3
    assert first.trains[0].name == "network"
    rates = {trained.name: trained.optimizers(nn.Linear(2, 2))[0].defaults["lr"] for trained in others[0].trains}
    assert rates == {"student": 0.2, "generator": 0.1, "exit": 0.2}
    factors = [others[0].trains[0].schedule.rate_factor(images, 16) for images in (0, 112, 144)]
    assert factors == pytest.approx([1, 1, 0.4], abs=0.2)


def test_what_a_cure_names_exists():
    from onefold.alarm import ONERUN_CURE

    for name in re.findall(r"onerun\.(\w+)", ONERUN_CURE):
        assert hasattr(OneRun(), name)


def test_no_classifier_is_trained_for_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of own images it would take longer than the first picture: the log has what needs none."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8), np.arange(64) % 10
    config = together(training__health_every=96, training__images=96)
    run = onefold.train(config, tmp_path / "run", data=(images, labels))
    (measured,) = [line["onestep"] for line in run.history if "onestep" in line]
    assert measured.keys() >= {"contrast", "mean_shift"}
    assert not {"frechet", "class_accuracy"} & measured.keys()
    told = capsys.readouterr()
    assert "--onerun.features" in told.out + told.err


# --- the command, and what it refuses ---------------------------------------------------------------------------------


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_command_trains_one(tmp_path: Path):
    small = ["--network.width", "32", "--network.depth", "1", "--network.heads", "2", "--onerun.measured", "20"]
    command = ["train", "digits", "--one-step", "--images", "128", "--out", str(tmp_path / "run"), "--quiet", *small]
    assert cli.run(command) == 0
    run = onefold.load_run(tmp_path / "run")
    assert run.config.phases == ("one_run",)
    assert run.network.sampler.jumps
    picture = tmp_path / "grid.png"
    assert cli.run(["sample", str(tmp_path / "run"), "--n", "4", "--out", str(picture)]) == 0
    assert picture.exists()


def test_options_of_one_run_need_one_run(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert cli.run(["train", "digits", "--onerun.start", "0.2", "--out", str(tmp_path / "run")]) == 2
    assert "--one-step" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_network_without_weights_for_it_is_refused():
    assert "network.jump_rank" in refused(lambda: phases_of(together(network__jump_rank=0)))


def test_networks_that_are_trained_in_stages_are_refused():
    config = together(network__architecture="three_networks", network__depth=3)
    assert "ThreeNetworks" in refused(lambda: phases_of(config))


def test_pixels_can_do_it_too(tmp_path: Path):
    config = together(network__architecture="pixels", training__images=96)
    network = onefold.train(config, tmp_path / "run", quiet=True).network
    assert network.jump.vector.any()
    assert network.sample(2).shape == (2, 8, 8, 1)


def test_of_a_network_with_a_generator_the_shared_weights_alone_are_taken():
    config = together()
    source = randomised(build(config.network), 5)
    begun = phases_of(config)[0].begin_from(source)
    other = {name.partition(".")[0] for name in differing(begun.state_dict(), source.state_dict())}
    assert other == {"jump", "jump_exit"}
    assert not begun.jump.vector.any(), "it begins as the denoiser"


def test_two_alarms_are_each_said_once_and_the_latents_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(loop.ImageProgress, "say", lambda self, line: said.append(line))
    monkeypatch.setattr(alarm, "LEAST_STD", 100.0)
    monkeypatch.setattr(alarm, "BOUNDS", {"contrast": (100.0, 200.0)})
    run = onefold.train(together(training__health_every=32), tmp_path / "run", quiet=True)
    assert [sum(kind in line for line in said) for kind in ("the latents collapse", "the generator departs")] == [1, 1]
    assert [line.get("alarm", "")[:11] for line in run.history] == ["", *["the latents"] * 4]


def test_other_phases_do_not_go_with_it():
    assert "--phases self_distillation" in refused(lambda: with_one_step(tiny(phases=("self_distillation",))))


def test_a_generator_must_begin():
    assert "onerun.begin: 160 images" in refused(lambda: phases_of(together(onerun__begin=160)))


def test_it_cannot_be_converted_again(whole: Run):
    assert "is already a one-step generator" in refused(lambda: onefold.onestep(whole))


def test_one_pass_is_one_step_without_guidance_or_choice(whole: Run):
    sample = whole.network.sample
    assert refused(lambda: sample(1, solver="one_pass", steps=8)).startswith("steps: 8")
    assert refused(lambda: sample(1, solver="one_pass", guidance=2.0)).startswith("guidance: 2")
    verifier = Verifier(whole.network, RatioNet.of(whole.network), 2)
    sampler = whole.network.sampler.with_options(solver="one_pass")
    assert refused(lambda: list(verifier.sample_latents([0], [1], sampler))).startswith("solver: 'one_pass'")


@pytest.mark.parametrize("kind", ["pixels", "three_networks"])
def test_an_exit_of_a_network_that_has_none_is_refused(kind: str):
    sizes = {"network__architecture": kind, "network__depth": 3}
    assert "network.jump_exit" in refused(lambda: tiny(network__jump_exit=True, **sizes))


def test_training_samples_to_latents():
    assert "sampler.solver" in refused(lambda: together(sampler__solver="one_pass", sampler__steps=1))


def test_guidance_needs_classes():
    config = together(network__classes=0, onerun__guidance=2.0)
    assert "guidance" in refused(lambda: phases_of(config))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", 1.0),
        ("begin", -1),
        ("t_max", 0.0),
        ("share", 0.0),
        ("student_rate", -1.0),
        ("generator_rate", math.nan),
        ("measured", 0),
    ],
)
def test_settings_that_make_no_sense(name: str, value: float):
    assert f"onerun.{name}" in refused(lambda: OneRun(**{name: value}))


def test_it_may_begin_with_the_weights_of_a_run_without_it(tmp_path: Path):
    plain = onefold.train(tiny(training__images=32), tmp_path / "plain", quiet=True)
    small = ["--onerun.measured", "20", "--training.batch", "16"]
    command = ["train", "digits", "--one-step", "--from", str(plain.folder), "--images", "96", "--quiet", *small]
    assert cli.run([*command, "--out", str(tmp_path / "run")]) == 0
    network = onefold.load_run(tmp_path / "run").network
    assert network.config.width == 32
    assert network.config.jump_rank > 0
    assert network.jump.vector.any()


def test_arithmetic_counts_what_is_joined():
    """See `test_estimate` for what is counted of a sample."""
    plain, joined = training_flops(tiny()), training_flops(together(onerun__share=0.25, network__jump_exit=False))
    one = build(tiny().network).role_flops(tiny().network).denoise
    products = 2 * 6 * change_flops(32, tiny().network.depth, 3) / 16
    assert joined - plain == pytest.approx((2 * 0.25 * 7 * one + products) * (160 - 48) / 160)
