"""Distillation by scores against Gaussians, whose denoisers E[x | x_t] and scores are known exactly."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.objectives.density_ratio import DensityRatio, NoiseDraws, draw_noise, ratio_gradient
from onefold.objectives.score_distillation import ScoreDistillation, distillation, score_gradient
from onefold.paths import Linear, TimeDistribution, score

P, Q = (0.5, 0.8), (-0.3, 1.2)
"""Mean and standard deviation of data and of samples, in each number alike."""


def denoiser(law: tuple[float, float]):
    mean, std = law

    def clean(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        t = t.view(-1, *(1,) * (x_t.ndim - 1))
        return mean + t * std**2 / ((t * std) ** 2 + (1 - t) ** 2) * (x_t - t * mean)

    return clean


def exact_score(law: tuple[float, float], x_t: Tensor, t: Tensor) -> Tensor:
    mean, std = law
    return (t * mean - x_t) / ((t * std) ** 2 + (1 - t) ** 2)


def draws_of(shape: tuple[int, ...], generator: torch.Generator) -> NoiseDraws:
    return draw_noise(TimeDistribution(), 0.98, shape, generator)


def samples(batch: int = 50) -> tuple[Tensor, NoiseDraws, Tensor, Tensor]:
    """Samples (B, N, D) of the generator, draws, t that broadcasts, x_t; float64."""
    generator = torch.Generator().manual_seed(0)
    fake = Q[0] + Q[1] * torch.randn(batch, 3, 2, generator=generator, dtype=torch.float64)
    draws = NoiseDraws(*(draw.double() for draw in draws_of((batch, 3, 2), generator)))
    t = draws.t[:, None, None]
    return fake, draws, t, t * fake + (1 - t) * draws.eps


def gradient(*networks_fake_y_draws: Any, normalised: bool) -> Tensor:
    """The generator's gradient at its samples."""
    teacher, student, fake, *rest = networks_fake_y_draws
    _, found = distillation(teacher, student, fake.detach().requires_grad_(), *rest, normalised=normalised)
    assert found is not None
    return found


def student_loss(student: Any, fake: Tensor, y: Tensor | None, draws: NoiseDraws) -> Tensor:
    """The student's loss, in which the teacher has no part."""
    return distillation(lambda x_t, t, y: x_t, student, fake, y, draws, normalised=False)[0]


def test_gradient_is_the_difference_of_scores():
    """(1−t)²/t times s_q − s_p, as the module's docstring has it; closed form, and through `paths.score`."""
    fake, draws, t, x_t = samples()
    found = gradient(denoiser(P), denoiser(Q), fake, None, draws, normalised=False)
    difference = exact_score(Q, x_t, t) - exact_score(P, x_t, t)
    torch.testing.assert_close(found.double(), (1 - t) ** 2 / t * difference, rtol=1e-5, atol=1e-6)
    by_path = [score(Linear(), denoiser(law)(x_t, draws.t), x_t, t) for law in (Q, P)]
    torch.testing.assert_close(by_path[0] - by_path[1], difference, rtol=1e-7, atol=1e-7)


def test_gradient_is_that_of_the_exact_ratio():
    """Reverse KL by the ratio, at weight (1−t)²/t² of its levels, is distillation by scores."""
    fake, draws, t, _ = samples()

    def ratio(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        t = t[:, None, None]
        (m, s), (n, r) = P, Q
        a, b = (t * s) ** 2 + (1 - t) ** 2, (t * r) ** 2 + (1 - t) ** 2
        return ((x_t - t * n) ** 2 / (2 * b) - (x_t - t * m) ** 2 / (2 * a) + (b / a).log() / 2).flatten(1).sum(1)

    by_ratio = ratio_gradient(ratio, fake, None, draws, DensityRatio(divergence="reverse_kl"))
    by_scores = gradient(denoiser(P), denoiser(Q), fake, None, draws, normalised=False)
    torch.testing.assert_close((1 - t) ** 2 / t**2 * by_ratio, by_scores.double(), rtol=1e-4, atol=1e-5)


def test_dmd_divides_each_sample_by_its_own_distance():
    fake, draws, _, x_t = samples()
    plain = gradient(denoiser(P), denoiser(Q), fake, None, draws, normalised=False)
    found = gradient(denoiser(P), denoiser(Q), fake, None, draws, normalised=True)
    for k in range(len(fake)):
        distance = (fake[k] - denoiser(P)(x_t, draws.t)[k]).abs().mean()
        torch.testing.assert_close(found[k].double(), plain[k].double() / distance, rtol=1e-5, atol=1e-6)


def test_dmd_is_bounded_where_the_teacher_is_right():
    fake, draws, _, _ = samples()
    found = gradient(lambda x_t, t, y: fake, lambda x_t, t, y: fake + 1, fake, None, draws, normalised=True)
    assert (found - 1000).abs().max() < 1  # 1 / 1e-3; float32 of the difference


def test_equal_denoisers_leave_the_generator_alone():
    fake, draws, _, _ = samples()
    for normalised in (False, True):
        assert (gradient(denoiser(P), denoiser(P), fake, None, draws, normalised=normalised) == 0).all()


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.label = nn.Linear(2, 2), nn.Embedding(4, 2)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        out = self.net(x_t) + t[:, None, None]
        return out if y is None else out + self.label(y)[:, None]


@pytest.mark.parametrize("normalised", [False, True])
def test_loss_and_gradient_have_one_evaluation_of_each(normalised: bool):
    """And the gradient is that of their predictions, whether or not there is a graph around them."""
    fake, draws, _, x_t = samples()
    calls: list[str] = []

    def counted(name: str, law: tuple[float, float]):
        return lambda x_t, t, y: calls.append(name) or denoiser(law)(x_t, t)

    found = gradient(counted("teacher", P), counted("student", Q), fake, None, draws, normalised=normalised)
    assert sorted(calls) == ["student", "teacher"]
    own, wanted = denoiser(Q)(x_t, draws.t), denoiser(P)(x_t, draws.t)
    expected = score_gradient(own, wanted, fake, normalised=normalised)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
def test_where_samples_need_no_gradient_the_teacher_is_not_asked(normalised: bool):
    """The student's loss is the same, and has the same gradient."""
    fake, draws, _, _ = samples()
    fake, draws = fake.float(), NoiseDraws(*(draw.float() for draw in draws))
    student, asked, found = Denoiser(), list[int](), []

    def teacher(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        asked.append(len(x_t))
        return x_t

    for needed in (False, True):
        loss, pull = distillation(teacher, student, fake.requires_grad_(needed), None, draws, normalised=normalised)
        assert asked == [50] * needed
        assert (pull is not None) == needed
        found.append((loss.detach(), *torch.autograd.grad(loss, list(student.net.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_no_graph_and_labels_reach_both():
    fake, draws, t, _ = samples()
    fake, draws = fake.float().requires_grad_(), NoiseDraws(*(draw.float() for draw in draws))
    teacher, student, y = Denoiser(), Denoiser(), torch.randint(0, 4, (50,))
    loss, found = distillation(teacher, student, fake, y, draws, normalised=False)
    assert found is not None
    assert not found.requires_grad
    loss.backward()
    assert fake.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    x_t = t.float() * fake + (1 - t.float()) * draws.eps
    torch.testing.assert_close(found, (student(x_t, draws.t, y) - teacher(x_t, draws.t, y)).detach())


@pytest.mark.parametrize("labelled", [True, False])
def test_student_loss(labelled: bool):
    fake, draws, _, x_t = samples()
    draws = NoiseDraws(*(draw.float() for draw in draws))
    fake, student = fake.float().requires_grad_(), Denoiser()
    y = torch.randint(0, 4, (50,)) if labelled else None
    loss = student_loss(student, fake, y, draws)
    expected = ((student(x_t.float(), draws.t, y) - fake.detach()) ** 2).sum() / (50 * 6)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert fake.grad is None
    assert student.net.weight.grad is not None


def test_student_loss_is_least_at_the_posterior_mean():
    generator = torch.Generator().manual_seed(1)
    fake = Q[0] + Q[1] * torch.randn(40_000, 1, generator=generator)
    draws = draws_of((40_000, 1), generator)

    def off(by: float, slope: float):
        return lambda x_t, t, y: denoiser(Q)(x_t, t) + by + slope * x_t

    exact = student_loss(denoiser(Q), fake, None, draws)
    for by, slope in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert student_loss(off(by, slope), fake, None, draws) > exact + 0.004


def test_wrong_options_are_refused():
    with pytest.raises(UserError, match=r"score.adversarial: -1.0 is not 0 or more"):
        ScoreDistillation(adversarial=-1.0)
    with pytest.raises(UserError, match=r"score.guidance: -0.5 is not 0 or more"):
        ScoreDistillation(guidance=-0.5)
    with pytest.raises(UserError, match=r"score.t_max: 2.0 is not between 0 and 1"):
        ScoreDistillation(t_max=2.0)
