"""Where the time of a compiled step goes, and whether another way to compute a block or Muon would be faster.

    OMP_NUM_THREADS=1 python benchmarks/step_trials.py --recipe digits --json-file step-trials.json
    OMP_NUM_THREADS=1 python benchmarks/step_trials.py --recipe cifar10 --batch 4 --rounds 5

- **Shares** of a step's time by kind of operation, from torch's profiler.
- **Blocks**: one compiled block, forward and backward, on as many images as decode and denoise at once. Each variant's
  time is relative to the present block's of the same round, and its gradients' error to a float32 block that is not
  compiled. *no …* leave something out, so they bound what a faster way to do it could gain.
- **Muon**: the iterations of all matrices of the network, in bf16; the error of their result is relative to float64.

Times are of the processor, not of the clock, and variants take turns (see `timing.py`): other work does not count.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import command
import onefold
from onefold.compute import compile_blocks
from onefold.networks.trunk import Attention, Block, rotary_table, rotate
from onefold.training import optimizer
from onefold.training.config import Config
from onefold.training.optimizer import CUBIC, LINEAR, QUINTIC, Muon, orthogonalised
from onefold.training.prepare import decide
from onefold.training.step import training_step
from timing import machine, table, taking_turns, write
from train_step import images, prepared

CPU = torch.device("cpu")
KINDS = {
    "matrix products": ("mm", "linear", "matmul", "gemm"),
    "attention": ("attention",),
    "compiled code between them": ("compiled", "inductor", "graph_"),
    "optimizers and averages": ("foreach", "adamw", "lerp"),
}
"""Words in the names of operations, by kind; `bmm` is Muon's, which attention on a CPU does without."""

# --- shares -----------------------------------------------------------------------------------------------------------


def kind_of(operation: str) -> str:
    """The kind of an operation, by its name in the profile."""
    name = operation.lower()
    if "bmm" in name:
        return "Muon's products"
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def shares(config: Config, steps: int) -> dict[str, Any]:
    """The time of each kind of operation relative to all, and of the ten longest operations."""
    state, (x, y) = prepared(training_step, config, CPU), images(config, CPU, config.training.batch)
    for _ in range(3):
        training_step(state, x, y, config)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            training_step(state, x, y, config)
    spent: dict[str, float] = defaultdict(float)
    operations = {each.key: each.self_cpu_time_total for each in found.key_averages()}
    total = sum(operations.values())
    for name, seconds in operations.items():
        spent[kind_of(name)] += seconds / total
    longest = sorted(operations.items(), key=lambda item: -item[1])[:10]
    return {"kinds": dict(spent), "operations": {name: seconds / total for name, seconds in longest}}


# --- blocks -----------------------------------------------------------------------------------------------------------


class HalfResidual(Block):
    """Tokens are bf16 between blocks."""

    def forward(self, h: Tensor, *rest: Any) -> Tensor:
        return super().forward(h.float(), *rest).bfloat16()


class DefinedAttention(Attention):
    """Attention by its definition, which is compiled with what is around it."""

    dtype = torch.float32

    def forward(self, h: Tensor, table: Tensor, change: Any = None) -> Tensor:
        projected = F.linear(h, self.project_in.weight).unflatten(-1, (3, self.heads, -1))
        q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(self.norm_q(q.float()), table), rotate(self.norm_k(k.float()), table)
        with torch.autocast("cpu", enabled=False):
            scores = q.to(self.dtype) @ (q.shape[-1] ** -0.5 * k).to(self.dtype).mT
            out = scores.float().softmax(-1).to(self.dtype) @ v.to(self.dtype)
        return F.linear(out.transpose(1, 2).flatten(2), self.project_out.weight)


class HalfAttention(DefinedAttention):
    dtype = torch.bfloat16


class NoAttention(Attention):
    """Its products alone, without what is between them."""

    def forward(self, h: Tensor, table: Tensor, change: Any = None) -> Tensor:
        q, k, v = F.linear(h, self.project_in.weight).chunk(3, -1)
        return F.linear(q + k + v, self.project_out.weight)


class Unmodulated(Block):
    def forward(self, h: Tensor, modulation: Tensor, table: Tensor, change: Any = None) -> Tensor:
        h = h + self.attention(self.norm_attention(h), table)
        return h + self.swiglu(self.norm_swiglu(h))


BLOCKS: dict[str, tuple[type[Block], type[Attention]]] = {
    "as it is": (Block, Attention),
    "bf16 residual stream": (HalfResidual, Attention),
    "attention by its definition": (Block, DefinedAttention),
    "… in bf16": (Block, HalfAttention),
    "no attention": (Block, NoAttention),
    "no modulation": (Unmodulated, Attention),
}


def block_times(config: Config, rounds: int) -> dict[str, dict[str, float]]:
    """Time relative to the present block, and error of its gradients relative to float32."""
    network = config.network
    rows = config.training.batch * (1 + config.objective.draws)
    plain = Block(network.width, network.heads)
    torch.manual_seed(0)
    for p in plain.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    h, upstream = torch.randn(2, rows, network.tokens, network.width)
    modulation = 0.1 * torch.randn(rows, 6, network.width)
    places = rotary_table(*network.grid, network.width // network.heads)

    def gradients(block: Block, *, cast: bool = True) -> Tensor:
        own = h.bfloat16() if isinstance(block, HalfResidual) else h.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = block(own.requires_grad_(), modulation, places)
        block.zero_grad()
        out.backward(upstream.to(out.dtype))
        found = [own, *(p for p in block.parameters() if p.ndim == 2)]
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.float().flatten() for p in found])

    exact = gradients(plain, cast=False)
    blocks: dict[str, Block] = {}
    for name, (kind, attention) in BLOCKS.items():
        block = copy.deepcopy(plain)
        block.__class__, block.attention.__class__ = kind, attention
        compile_blocks(block, dynamic=False)
        blocks[name] = block
    times = taking_turns(
        {name: lambda b=b: processor_seconds(lambda: gradients(b)) for name, b in blocks.items()}, rounds
    )
    return {
        name: {
            "ratio": ratio_to(times["as it is"], times[name]),
            "error": float((gradients(block) - exact).norm() / exact.norm()),
        }
        for name, block in blocks.items()
    }


# --- Muon -------------------------------------------------------------------------------------------------------------


def on_x(matrices: Tensor) -> Tensor:
    """Every iteration on X, as it is usually written."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = LINEAR * x + (CUBIC * a + QUINTIC * a @ a) @ x
    return x if wide else x.mT


def so_many_on_a(count: int) -> Callable[[Tensor], Tensor]:
    """Another number of iterations on one A."""

    def iterated(matrices: Tensor) -> Tensor:
        with patch.object(optimizer, "TOGETHER", count):
            return orthogonalised(matrices)

    return iterated


MUON: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": orthogonalised,
    "one by one, on X": on_x,
    **{f"{count} on one A": so_many_on_a(count) for count in (1, 2, 5)},
}


def muon_times(config: Config, rounds: int) -> dict[str, dict[str, float]]:
    """Time relative to the present iterations, and the largest error over shapes, both in bf16."""
    state = prepared(training_step, config.with_changes({"training.compile": "no"}), CPU)
    (muon,) = (each for each in state.optimizers["network"] if isinstance(each, Muon))
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for p in muon.param_groups[0]["params"]:
        by_shape[p.shape].append(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    stacks = [torch.stack(each).bfloat16() for each in by_shape.values()]
    times = taking_turns(
        {name: lambda f=f: processor_seconds(lambda: [f(stack) for stack in stacks]) for name, f in MUON.items()},
        rounds,
    )

    def error(f: Callable[[Tensor], Tensor]) -> float:
        pairs = [(f(stack[:1]).double(), on_x(stack[:1].double())) for stack in stacks]
        return max(float((found - exact).norm() / exact.norm()) for found, exact in pairs)

    return {name: {"ratio": ratio_to(times["as it is"], times[name]), "error": error(f)} for name, f in MUON.items()}


# --- the report -------------------------------------------------------------------------------------------------------


def processor_seconds(work: Callable[[], object]) -> float:
    """Of this process, all threads together."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio_to(base: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return median(b / a for a, b in zip(base, other, strict=True))


def main(
    recipe: str = "digits", batch: int | None = None, rounds: int = 15, steps: int = 10, json_file: Path | None = None
) -> None:
    """Measure, print tables, and write all numbers.

    Args:
        recipe: A recipe, with its own settings, in bf16 and compiled.
        batch: Images per step. Default: the recipe's.
        rounds: Rounds that count.
        steps: Steps in the profile.
        json_file: Where to write all numbers.
    """
    torch.set_num_threads(1)
    changes: dict[str, Any] = {"training.precision": "bfloat16", "training.compile": "yes", "training.device": "cpu"}
    changes |= {} if batch is None else {"training.batch": batch}
    config = decide(onefold.recipe(recipe).with_changes(changes), CPU)
    found: dict[str, Any] = {**machine(CPU), "recipe": recipe, "batch": config.training.batch, "rounds": rounds}
    found["shares"] = shares(config, steps)
    print(table(["a step's time", "share"], [[k, f"{100 * v:.1f} %"] for k, v in found["shares"]["kinds"].items()]))
    for name, measure in {"block": block_times, "muon": muon_times}.items():
        found[name] = measure(config, rounds)
        rows = [[k, f"{v['ratio']:.3f}", f"{v['error']:.1e}"] for k, v in found[name].items()]
        print("\n" + table([name, "time, as it is = 1", "error"], rows))
    write(found, json_file)


if __name__ == "__main__":
    command.run(main)
