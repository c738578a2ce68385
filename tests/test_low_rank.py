"""One-step generators that are low-rank changes of a teacher: what learns, what stays, and what is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onefold
from conftest import randomised
from helpers_one_step import (
    begun,
    both_gradients,
    critic_of,
    digits,
    drawn,
    one_step,
    parts_of,
    teacher_for,
    teacher_of,
)
from helpers_runs import differing, newest, tiny
from onefold import cli
from onefold.errors import UserError
from onefold.networks import Network, OneFold, build, jump
from onefold.networks.jump import RANK, Jump
from onefold.summary import command
from onefold.training import loop
from onefold.training.config import Config
from onefold.training.conversion import one_step_config
from onefold.training.phases import phases_of
from onefold.training.run import Run
from onefold.training.state import TrainingState, seeded
from onefold.training.step import training_step

METHODS: dict[str, dict[str, Any]] = {
    "score": {"onestep__method": "score"},
    "dmd": {"onestep__method": "dmd"},
    "adversarial": {"onestep__method": "dmd", "onestep__score__adversarial": 0.5},
    "ratio": {"onestep__method": "ratio"},
}
KINDS = {
    "one": {},
    "three": {"network__architecture": "three_networks", "network__depth": 3},
    "pixels": {"network__architecture": "pixels"},
}


def low_rank(**changes: Any) -> Config:
    return one_step(rank=4, **changes)


def state_of(config: Config) -> TrainingState:
    """With a teacher that has no low-rank changes of its own."""
    teacher = teacher_for(config.with_changes({"network.jump_rank": 0}))
    with seeded(0):
        return begun(config, phases_of(config)[0].begin_from(teacher))


def roles(network: Network) -> list[Tensor]:
    """What a network encodes, denoises, decodes and generates; the last is its own."""
    x, y = digits()
    t, z = torch.full((16,), 0.3), torch.randn(16, network.config.tokens, network.config.latent_channels)
    with torch.no_grad():
        return [network.encode(x), network.denoise(z, t, y), network.decode(z), network.generate(z, t, y)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_only_the_generator_changes(method: str, kind: str):
    """Also in the average that is published; at first it is the teacher's denoiser at its start."""
    config = low_rank(**METHODS[method], **KINDS[kind], onestep__critic_warmup=0)
    state = state_of(config)
    torch.manual_seed(0)
    before = roles(teacher_of(state))
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(before, roles(state.network), strict=True))
    for k in range(3):
        training_step(state, *digits(start=16 * k), config)
    for network in (state.network, *state.averages):
        torch.manual_seed(0)
        *kept, made = roles(network)
        assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=False))
        assert not torch.equal(made, before[-1])


@pytest.mark.parametrize("method", ["score", "dmd"])
def test_student_and_generator_have_the_gradients_of_score_distillation(method: str):
    config = low_rank(**METHODS[method], objective__label_dropout=0.0)
    state, (x, y) = state_of(config), digits()
    teacher, generator, student = teacher_of(state), state.network, critic_of(state).student
    assert isinstance(student, Jump)
    with torch.no_grad():
        for p in (*generator.get_submodule("jump").parameters(), *student.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    draws = drawn(state, config)
    parts = both_gradients(state, x, y, draws, config)
    found = [p.grad.clone() for m in (generator, student) for p in m.parameters() if p.grad is not None]
    t = torch.full((16,), config.onestep.start)
    jump = generator.get_submodule("jump")
    fake = teacher.generate_with(jump, (1 - t)[:, None, None] * draws.eps, t, y)
    x_t = draws.score.t[:, None, None] * fake + (1 - draws.score.t)[:, None, None] * draws.score.eps
    own = teacher.generate_with(student, x_t.detach(), draws.score.t, y)
    wanted = teacher.denoise(x_t, draws.score.t, y).detach()
    slope = (own - wanted).detach()
    if method == "dmd":
        slope = slope / (fake - wanted).abs().mean((1, 2), keepdim=True).clamp(min=1e-3).detach()
    loss = (own - fake.detach()).square().mean()
    trained = [*jump.parameters(), *student.parameters()]
    expected = torch.autograd.grad(loss + (slope * fake).mean(), trained)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(parts["student"], loss.detach())
    assert parts.keys() == {"student"}


READS = {"score": False, "dmd": False, "adversarial": True, "ratio": True}


@pytest.mark.parametrize(("method", "reads"), READS.items())
def test_scores_need_no_image_beside_a_teacher_that_stays(method: str, reads: bool):
    config = low_rank(**METHODS[method], onestep__critic_warmup=16)
    after = []
    for shift in (0.0, 0.1):
        state, (x, y) = state_of(config), digits()
        for _ in range(2):
            training_step(state, (x + shift).clamp(-1, 1), y, config)
        after.append({**state.network.state_dict(), **critic_of(state).state_dict()})
    assert bool(differing(*after)) == reads


def test_noised_data_are_read():
    config = low_rank(**METHODS["score"], onestep__renoised=1.0)
    made = []
    for shift in (0.0, 0.1):
        state, (x, y) = state_of(config), digits()
        made.append(both_gradients(state, (x + shift).clamp(-1, 1), y, drawn(state, config), config)["student"])
    assert made[0] != made[1]


def test_what_learns_is_all_that_optimizers_hold():
    config = low_rank(**METHODS["adversarial"], onestep__student_rate=0.5, onestep__critic_rate=0.25)
    state = state_of(config)
    (generator,), critic = state.optimizers["network"], state.optimizers["critic"]
    held = [p for group in generator.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in state.network.get_submodule("jump").parameters()}
    student = critic_of(state).student
    assert isinstance(student, Jump)
    by = {group["lr"]: group["params"] for optimizer in critic for group in optimizer.param_groups}
    assert {id(p) for p in by[0.5]} == {id(p) for p in student.parameters()}
    ratio, of_scale = critic_of(state).ratio, by[config.onestep.scale_rate]
    assert ratio is not None
    assert {id(p) for p in (*by[0.25], *of_scale)} == {id(p) for p in ratio.parameters()}


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        ("score", {"onestep__generator": "trunk"}, "onestep.generator: trunk needs all weights to learn"),
        ("score", {"onestep__generator_trains": "norms"}, "onestep.generator_trains: norms needs"),
        ("score", {"onestep__critic": "random"}, "onestep.critic: random needs"),
        ("dmd", {"onestep__critic_trains": "norms"}, "onestep.critic_trains: norms needs"),
        ("ratio", {"onestep__generator": "random"}, "onestep.generator: random needs"),
    ],
)
def test_what_needs_all_weights_is_refused(method: str, changes: dict[str, Any], told: str):
    config = low_rank(**METHODS[method], **changes, network__architecture="pixels")
    with pytest.raises(UserError, match=told) as error:
        phases_of(config)
    assert str(error.value).endswith("; add --rank 0")


def test_a_ratio_may_begin_anywhere():
    phases_of(low_rank(**METHODS["ratio"], onestep__critic="random", onestep__critic_trains="norms"))


@pytest.mark.parametrize(
    ("method", "rank", "found"),
    [("score", None, RANK), ("dmd", None, RANK), ("ratio", None, 0), ("ratio", 3, 3), ("score", 0, 0)],
)
def test_the_rank_follows_from_the_method(method: Any, rank: int | None, found: int):
    config = one_step_config(tiny(), method=method, rank=rank)
    assert (config.network.jump_rank, config.onestep.method) == (found, method)
    assert config.training.learning_rate == (2e-3 if found else 2e-4)
    assert config.training.images == (240 if found else 128)  # of 160: 1.5, and 0.75 in whole batches


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return onefold.train(tiny(training__images=32), tmp_path_factory.mktemp("teacher") / "run", quiet=True)


SHORT = {"training.images": 96, "onestep.critic_warmup": 32, "onestep.measured": 20, "training.precision": "float32"}
SHORT |= {"training.checkpoint_every": 48, "training.health_every": 48}


def test_a_resumed_run_is_the_same_to_the_bit(teacher: Run, tmp_path: Path):
    whole = onefold.onestep(teacher, tmp_path / "whole", changes=SHORT, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        onefold.onestep(teacher, tmp_path / "run", changes=SHORT, quiet=True, callbacks=[interrupt])
    again = onefold.train(None, tmp_path / "run", resume=True, quiet=True)
    assert differing(newest(whole.folder), newest(again.folder)) == []
    assert whole.network.config.jump_rank == RANK


def interrupt(run: Run, line: dict[str, Any]) -> None:
    if line["images"] == 64:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("words", "rank"), [("", RANK), ("--rank 2", 2), ("--rank 0", 0), ("--method ratio", 0)])
def test_the_command_takes_a_rank_and_a_report_repeats_it(teacher: Run, tmp_path: Path, words: str, rank: int):
    sizes = "--images 48 --onestep.critic-warmup 16 --onestep.measured 20 --quiet"
    place = ["--out", str(tmp_path / "run")]
    assert cli.run(["onestep", str(teacher.folder), *words.split(), *sizes.split(), *place]) == 0
    run = onefold.load_run(tmp_path / "run")
    assert run.config.network.jump_rank == rank
    told = command(run)
    assert told is not None
    assert ("--rank" in told) == ("--rank" in words)
    assert words in told


@pytest.mark.parametrize(
    ("words", "rank", "images", "warmup"),
    [
        ("", RANK, 48, 16),
        ("--rank 0", 0, 32, 16),
        ("--method=ratio", 0, 32, 16),
        ("--rank 2 --method ratio", 2, 48, 16),
    ],
)
def test_the_command_s_lengths_are_the_library_s(
    teacher: Run, words: str, rank: int, images: int, warmup: int, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Config] = []
    monkeypatch.setattr(loop, "train", lambda config, *rest, **named: seen.append(config))
    command = ["onestep", str(teacher.folder), *words.split(), "--quiet", "--training.decay", "0.5"]
    assert cli.run([*command, "--training.learning-rate", "2e-3"]) == 0
    (config,) = seen
    assert (config.network.jump_rank, config.training.images, config.onestep.critic_warmup) == (rank, images, warmup)
    assert (config.training.decay, config.training.learning_rate) == (0.5, 2e-3), "as given, whatever the defaults"


@pytest.mark.parametrize(("was", "rank"), [(4, RANK), (4, 0), (4, 4), (0, 4)])
def test_what_a_teacher_knew_of_generating_is_begun_anew(was: int, rank: int):
    """Also the exit to pixels of one run, which would make pictures of another generator's tokens."""
    theirs = tiny(network__jump_rank=was, network__jump_exit=was > 0)
    source = randomised(build(theirs.network), 1)
    config = one_step_config(theirs, rank=rank)
    network = phases_of(config)[0].begin_from(source)
    assert network.config == config.network
    assert not config.network.jump_exit
    torch.manual_seed(0)
    before = roles(source)
    torch.manual_seed(0)
    *after, made = roles(network)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False))
    assert torch.equal(made, after[1]) or not was, "it denoises"


@pytest.mark.parametrize(
    ("rank", "method", "changes", "name"),
    [
        (4, "score", {"onestep__critic_rate": 1.0}, "critic_rate"),
        (4, "dmd", {"onestep__upkeep": 2.0}, "upkeep"),
        (4, "ratio", {"onestep__upkeep_share": 0.5}, "upkeep_share"),
        (4, "ratio", {"onestep__student_rate": 1.0}, "student_rate"),
        (0, "score", {"onestep__student_rate": 1.0}, "student_rate"),
    ],
)
def test_what_has_no_effect_is_refused(rank: int, method: str, changes: dict[str, Any], name: str):
    config = one_step(rank=rank, **{**METHODS[method], **changes})
    with pytest.raises(UserError, match=f"^onestep.{name}: has no effect here; "):
        phases_of(config)


def test_an_architecture_whose_jump_changes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch):
    config = low_rank(**METHODS["score"])
    teacher = teacher_for(config.with_changes({"network.jump_rank": 0}))
    (phase,) = phases_of(config)
    with monkeypatch.context() as patch:
        patch.setattr(jump, "LowRank", lambda *arguments: None)
        with pytest.raises(UserError, match=r"network.jump_rank: the jump of OneFold changes no matrix; give --rank 0"):
            phase.begin_from(teacher)
    monkeypatch.setattr(OneFold, "has_jump", classmethod(lambda kind: False))
    with pytest.raises(UserError, match=r"network.jump_rank: OneFold defines no generate_with; give --rank 0"):
        phases_of(config.with_changes({"training.seed": 5}))


@pytest.mark.parametrize("rank", ["-1", "33"])
def test_a_rank_that_cannot_be_is_one_line(teacher: Run, rank: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["onestep", str(teacher.folder), "--rank", rank]) == 2
    assert capsys.readouterr().err == f"onefold: --rank: {rank} is not within 0 (all weights learn) and the width, 32\n"


def test_the_parts_are_those_of_any_conversion():
    config = low_rank(**METHODS["score"])
    state = state_of(config)
    critic, both = parts_of(state, config)
    assert not both.few
    assert critic.unless is both
