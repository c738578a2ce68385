"""`training.recompute`: the same step to the bit, in less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from helpers_one_step import begun, one_step
from helpers_runs import batch, differing, fresh, tensors, tiny
from onefold.training.config import Config
from onefold.training.state import TrainingState
from onefold.training.step import training_step

DEEP = {"network__depth": 4, "objective__perceptual_weight": 0.1}


def stepped(config: Config, state: TrainingState) -> tuple[dict[str, Tensor], int]:
    """What two steps make of a state, and the bytes that they keep for their backward passes, weights apart."""
    weights = {value.data_ptr() for module in state.modules.values() for value in module.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[len(kept)] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        for k in range(2):
            training_step(state, *batch(start=16 * k), config)
    return tensors(state), sum(kept.values())


@pytest.mark.parametrize("kind", ["plain", "bfloat16", "ratio", "score"])
def test_a_step_that_recomputes_is_the_same_in_less_memory(kind: str):
    def config(recompute: bool) -> tuple[Config, TrainingState]:
        changes: dict[str, Any] = {"training__recompute": recompute}
        if kind in ("ratio", "score"):
            made = one_step(**changes, onestep__method=kind, onestep__critic_warmup=16, network__depth=4)
            return made, begun(made)
        made = tiny(**changes, **DEEP, training__precision="bfloat16" if kind == "bfloat16" else "float32")
        return made, fresh(made)

    (kept, bytes_kept), (again, bytes_again) = (stepped(*config(recompute)) for recompute in (False, True))
    assert differing(kept, again) == []
    assert bytes_again < bytes_kept / 3
    assert torch.is_grad_enabled()
