"""Optimizers: AdamW, the same without momentum, and Muon; and a step that is skipped if the gradient is not finite.

AdamW updates every parameter or, with `optimizer="muon"`, all except the matrices inside the trunk's blocks. Muon
(Jordan et al., 2024) moves each such matrix along the nearest orthogonal matrix to its momentum, computed by five
Newton-Schulz iterations. Matrices of the same shape are stacked and iterated together, which makes small networks
cheap;
the iterations tolerate bf16, which is used where the run's matrix products are bf16.

Whether a gradient is finite is known only on the device: asking from the host would make it wait for all pending work,
at every step. `guarded_step` therefore passes the answer to the optimizers as torch's gradient scaler does, in their
attribute `found_inf`, which AdamW(fused=True), RMSPropW and Muon read on the device. Other optimizers do not: for them
the host waits for the answer.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.adamw import adamw

from onefold.networks import Network
from onefold.schedule import Schedule
from onefold.training.sharding import by_matrix, is_sharded, local

__all__ = [
    "Muon",
    "RMSPropW",
    "block_matrices",
    "build_optimizers",
    "guarded_step",
    "keep_rates_on",
    "moments_of",
    "orthogonalised",
    "set_rates",
    "total_norm",
]

BLIND = {"mps"}
"""Devices whose AdamW does not read `found_inf`: Metal's, before pytorch/pytorch#186360. There the host checks."""


def guarded_step(
    module: nn.Module, optimizers: Iterable[Optimizer], clip: float, *, skip: Bool[Tensor, ""] | None = None
) -> tuple[Float[Tensor, ""], Bool[Tensor, ""]]:
    """Clip the gradient to the norm `clip`, take the optimizer steps and clear the gradient.

    If the gradient's norm is not finite, or `skip` is true, the step is skipped: weights and optimizer state stay the
    same to the bit. The host waits only for optimizers that cannot skip on the device. Returns the norm before clipping
    and whether the step was skipped, both on the device.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = total_norm(gradients)
    if gradients:
        torch._foreach_mul_([*map(local, gradients)], (clip / (norm + 1e-6)).clamp(max=1.0))
    skipped = ~torch.isfinite(norm)
    if skip is not None:
        skipped = skipped | skip
    for optimizer in optimizers:
        if _reads_found_inf(optimizer, skipped.device):
            optimizer.found_inf = skipped.to(torch.float32)  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        elif not skipped:
            optimizer.step()
    module.zero_grad()
    return norm, skipped


def total_norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The norm of all tensors together; of sharded ones, over all ranks."""
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    norm = nn.utils.get_total_norm([tensor for tensor in tensors if not is_sharded(tensor)])
    if not sharded:
        return norm
    among_ranks = nn.utils.get_total_norm(sharded)
    assert is_sharded(among_ranks)
    return torch.hypot(norm, among_ranks.full_tensor())


def _reads_found_inf(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether `found_inf` makes a step on the device change nothing. A subclass may have a step of its own."""
    if device.type in BLIND:
        return False
    fused = type(optimizer) in (Adam, AdamW) and all(group["fused"] for group in optimizer.param_groups)
    return fused or type(optimizer) in (Muon, RMSPropW)


EPS = 1e-12
"""Of RMSPropW. Gradients of a generator by a ratio are means over the latent's values: AdamW's 1e-8 would be felt."""


class RMSPropW(Optimizer):
    """AdamW with β₁ = 0, to the bit, without the first moment: bias-corrected RMSProp with decoupled weight decay.

    For adversarial training, whose target moves with every step. Half of AdamW's state.
    """

    found_inf: Tensor | None = None
    """As in torch's fused optimizers: if it is 1 (a scalar on the device), a step changes nothing."""

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], *, lr: float, beta: float, weight_decay: float
    ) -> None:
        """`beta` is Adam's β₂. Groups of parameters may have a `weight_decay` of their own."""
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if "step" not in self.state[p]:
                    self.state[p]["step"] = torch.zeros((), device=p.device)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            gradients = [p.grad for p in trained if p.grad is not None]
            adamw(
                trained,  # type: ignore[arg-type]
                gradients,
                gradients,  # what a first moment with β₁ = 0 would be, in the memory that already holds it
                [self.state[p]["exp_avg_sq"] for p in trained],
                [],
                [self.state[p]["step"] for p in trained],
                foreach=False,
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=0.0,
                beta2=group["beta"],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=EPS,
                maximize=False,
            )


LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
"""a, b and c of `orthogonalised`, those of the original Muon."""
TOGETHER = 3
"""Iterations made on one A, where X is wide. Five would lose small singular values in bf16."""


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The orthogonal factors U Vᵀ of a stack of matrices (k, m, n) = U S Vᵀ, singular values from about 0.7 to 1.2.

    The quintic iteration is X ← PX with P = aI + bA + cA² and A = XXᵀ. A becomes PAP, which takes no X: where X is
    wide, some iterations are made on A alone, whose products are smaller, and X is multiplied by all their P at once.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    together = TOGETHER if 2 * x.shape[-1] >= 3 * x.shape[-2] else 1
    for done in range(0, iterations, together):
        x = _product(x @ x.mT, min(together, iterations - done)) @ x
    return x if wide else x.mT


def _product(a: Tensor, iterations: int) -> Tensor:
    """The product of the matrices P of so many iterations from A on."""
    p = torch.baddbmm(a, a, a, beta=CUBIC, alpha=QUINTIC)
    p.diagonal(dim1=-2, dim2=-1).add_(LINEAR)
    return p if iterations == 1 else _product(p @ a @ p, iterations - 1) @ p


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, scaled by max(1, rows/columns)^½; decoupled weight decay."""

    found_inf: Tensor | None = None
    """As in torch's fused optimizers: if it is 1 (a scalar on the device), a step changes nothing."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` is for the Newton-Schulz iterations; momentum and weights keep their own."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._step_stack(params, group, scale=max(1.0, shape[0] / shape[1]) ** 0.5)

    def _step_stack(self, params: list[Tensor], group: dict[str, Any], scale: float) -> None:
        gradients = tuple(local(p.grad) for p in params if p.grad is not None)
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [local(self.state[p]["momentum"]) for p in params]
        remaining: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        skipped = None if self.found_inf is None else self.found_inf > 0
        if skipped is not None:
            # Selected rather than multiplied by 0, since NaN · 0 is NaN. The mean of a momentum and itself is that
            # momentum.
            gradients = torch.where(skipped, torch.stack(momenta), torch.stack(gradients)).unbind()
            remaining = torch.where(skipped, 1.0, remaining)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        directions = nesterov.to(group["dtype"])
        sharded = is_sharded(params[0])
        updates = by_matrix(orthogonalised, directions, params[0]) if sharded else orthogonalised(directions)
        updates = updates.to(nesterov.dtype)
        if skipped is not None:
            updates = torch.where(skipped, 0.0, updates)
        weights = [*map(local, params)]
        torch._foreach_mul_(weights, remaining)
        if isinstance(group["lr"], Tensor):
            torch._foreach_add_(weights, (updates * (-scale * group["lr"])).unbind())
        else:
            torch._foreach_add_(weights, updates.unbind(), alpha=-group["lr"] * scale)


def block_matrices(network: Network) -> list[nn.Parameter]:
    """The parameters for Muon: the matrices of the trunk's blocks."""
    blocks = (p for trunk in network.trunks for p in trunk.blocks.parameters())
    return [p for p in blocks if p.ndim == 2 and min(p.shape) > 6 and p.requires_grad]


def build_optimizers(network: Network, schedule: Schedule, dtype: torch.dtype = torch.float32) -> list[Optimizer]:
    """AdamW, or AdamW and Muon with iterations in `dtype`.

    Vectors, embeddings and offsets have no weight decay; frozen weights are left out.
    """
    matrices = block_matrices(network)
    vectors = {id(p) for part in network.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    by_muon = {id(p) for p in matrices} if schedule.optimizer == "muon" else set[int]()
    rest = [(name, p) for name, p in network.named_parameters() if p.requires_grad and id(p) not in by_muon]

    def decays(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and not name.endswith("offset") and id(p) not in vectors

    groups = [
        {"params": [p for name, p in rest if decays(name, p)], "weight_decay": schedule.weight_decay},
        {"params": [p for name, p in rest if not decays(name, p)], "weight_decay": 0.0},
    ]
    rate, (momentum, beta) = schedule.learning_rate, schedule.betas
    adam = AdamW(groups, lr=rate, betas=(momentum, beta), fused=True) if momentum else None
    optimizers: list[Optimizer] = [adam or RMSPropW(groups, lr=rate, beta=beta, weight_decay=0.0)]
    if by_muon:
        optimizers.append(Muon(matrices, lr=schedule.muon_rate, weight_decay=schedule.weight_decay, dtype=dtype))
    return optimizers


def moments_of(optimizer: Optimizer) -> int:
    """Numbers that an optimizer of `build_optimizers`, or RMSPropW, keeps for each parameter."""
    return 2 if isinstance(optimizer, AdamW) else 1


def set_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every rate to `factor` times its peak, the rate that the optimizer was created with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = optimizer.defaults["lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def keep_rates_on(optimizers: Iterable[Optimizer], device: torch.device) -> None:
    """From now on, the rates are scalars on the device, which a recorded step reads anew each time (see `graphs`)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group["capturable"] = True
