"""The functions of benchmarks/onestep_step.py; what they measure is left to whoever runs them on an idle machine."""

import pytest
import torch

import onestep_step
from helpers_one_step import critic_of, digits, one_step, teacher_for, teacher_of
from onefold.training.state import TrainingState

CRITIC_STEPS = {"dmd, 5 student updates": 5, "dmd, 5, adversarial": 5}


def prepared(method: str) -> tuple[TrainingState, onestep_step.Config]:
    config = one_step(network__depth=2, onestep__critic_rate=3e-4)
    return onestep_step.prepared(config, teacher_for(config), onestep_step.METHODS[method])


def steps_of(state: TrainingState, name: str) -> set[float]:
    return {values["step"].item() for values in state.optimizers[name][0].state.values()}


@pytest.mark.parametrize("method", onestep_step.METHODS)
def test_an_update_is_one_of_the_generator_with_its_critic_s(method: str):
    state, config = prepared(method)
    for count in (1, 2):
        onestep_step.update(state, config, *digits())
        assert steps_of(state, "network") == {count}
        assert steps_of(state, "critic") == {count * CRITIC_STEPS.get(method, 1)}


def test_half_the_depth_is_half_the_blocks():
    ratio = critic_of(prepared("ratio, half the depth")[0]).ratio
    assert ratio is not None
    assert ratio.config.depth == 1


@pytest.mark.parametrize(("method", "networks"), [("score, 1 student update", 9), ("dmd, 5 student updates", 9)])
def test_the_state_is_counted_by_hand(method: str, networks: int):
    """Teacher, average and the upkeep's gradient once; generator and student with a gradient and one moment each.

    Nine networks in float32, but for a moment of what a student does not use, and a count of steps for each parameter.
    """
    state, config = prepared(method)
    onestep_step.update(state, config, *digits())
    parameters = dict(teacher_of(state).named_parameters())
    own, unused = (
        {name: p.numel() for name, p in parameters.items() if every or name.startswith(("jump.", "patches_"))}
        for every in (True, False)
    )
    counts = 2 * len(own) - len(unused)
    expected = networks * sum(own.values()) - sum(unused.values()) + counts
    assert onestep_step.state_bytes(state) == 4 * expected


def test_arithmetic_is_counted():
    found = onestep_step.counted(lambda: torch.ones(3, 4) @ torch.ones(4, 5))
    assert found == 2 * 3 * 4 * 5
