"""The engine: how a step is executed on the available devices, by one process or by several.

Several processes, the *ranks*, are started by a launcher (`torchrun`), each with a device of its own. For a batch of B
images and n ranks,

    draws of all B images, the same in every rank  →  rank k takes images and draws kB/n … (k+1)B/n
    gradient  =  Σ over ranks,     since the losses of the parts of a batch add up to that of the batch

so n ranks take the same step as n micro-batches do in one process. All ranks hold the same weights, or a shard of each
(see `sharding`), and decide alike; the first alone logs, measures and draws. What is exchanged between hosts goes
through gloo, what is on GPUs through NCCL. A rank that cannot go on leaves word of it with the launcher's store, so
that the cause is said once; of one that died or hangs, the others give the name.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import count as counter
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from onefold.data.messages import count_text
from onefold.errors import Elsewhere, Interrupted, TrainingAborted, UserError, reason
from onefold.training.config import TrainingConfig

__all__ = ["Engine", "Ranks", "alone", "autocast", "joined", "ranks", "running"]

Engine = Literal["ddp", "fsdp"]
"""Each rank holds everything, or a shard of each weight, gradient, average and moment. In one process it is the same.
"""

BUCKET = 1 << 25
"""Values that are added up over ranks at once."""
TIMEOUT = 1800
"""Seconds that a rank waits for another, which may be saving or measuring; ONEFOLD_TIMEOUT sets another number."""
GRACE = 3.0
"""Seconds within which every rank that lives has noticed that another does not answer."""


def autocast(training: TrainingConfig, device: torch.device) -> torch.autocast:
    """The context in which losses are computed. Norms, losses and attention on a CPU stay in float32 inside it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16")


@dataclass(frozen=True)
class Ranks:
    """The processes that work together. One alone has nothing to exchange: then all methods give what they get.

    Every rank has to call the same methods in the same order. Each raises `TrainingAborted`, with the name of a rank
    that has died or does not answer, and `Elsewhere` where one has ended and said why.
    """

    rank: int = 0
    count: int = 1
    store: "dist.Store | None" = None  # a name that a torch without them lacks
    """Where ranks leave word for each other."""
    shards: bool = False
    """Whether each holds a shard of every weight (see `sharding`)."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def span(self, total: int) -> tuple[int, int]:
        """Start and stop of this rank's part of `total` images."""
        return self.rank * total // self.count, (self.rank + 1) * total // self.count

    def check_batch(self, batch: int) -> None:
        """Refuse a batch of which ranks would have unequal parts.

        Raises:
            UserError: naming batches and numbers of ranks that fit.
        """
        if batch % self.count:
            below, above = batch // self.count * self.count, -(-batch // self.count) * self.count
            batches = f"{below} or {above}" if below else f"{above}"
            fitting = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
            raise UserError(
                f"training.batch: {count_text(batch)} cannot be divided among {self.count} ranks; "
                f"give {batches}, or launch one of {fitting} ranks"
            )

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks of tensors of one dtype and device."""
        if self.count == 1:
            return list(tensors)
        sums: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with self._answered():
                dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            sums += [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)]
        return sums

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first rank."""
        for tensor in tensors if self.count > 1 else ():
            with self._answered():
                dist.broadcast(tensor, 0)

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        with self._answered():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def texts(self, own: str) -> list[str]:
        """The texts of all ranks, in order."""
        if self.count == 1:
            return [own]
        written = torch.frombuffer(bytearray(own.encode()) or bytearray(1), dtype=torch.uint8)
        size = self.largest(len(written))
        padded = torch.zeros(size + 8, dtype=torch.uint8)
        padded[:8] = torch.tensor([len(own.encode())]).view(torch.uint8)
        padded[8 : 8 + len(written)] = written
        found = [torch.empty_like(padded) for _ in range(self.count)]
        with self._answered():
            dist.all_gather(found, padded)
        return [bytes(text[8 : 8 + int(text[:8].view(torch.int64))].tolist()).decode() for text in found]

    def of_first(self, own: str) -> str:
        """The text of the first rank."""
        return self.texts(own if self.first else "")[0]

    def gathered(self, own: Tensor, total: int) -> Tensor:
        """In the first rank, the rows of all ranks in order, of which each has its span of `total`; else its own."""
        if self.count == 1:
            return own
        most = -(-total // self.count)
        padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        found = [torch.empty_like(padded) for _ in range(self.count)] if self.first else None
        with self._answered():
            dist.gather(padded, found)
        if found is None:
            return own
        spans = [Ranks(k, self.count).span(total) for k in range(self.count)]
        return torch.cat([rows[: stop - start] for rows, (start, stop) in zip(found, spans, strict=True)])

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.largest(0)

    # --- where a rank has ended ---

    def says(self, error: BaseException) -> bool:
        """Leave word of what ends this rank; whether it is new to the others."""
        if self.store is None:
            return True
        own = {"rank": self.rank, "line": str(error), "code": _exit_code(error)}
        try:
            found = json.loads(self.store.compare_set("ended", "", json.dumps(own)))
        except RuntimeError:  # the store has ended before
            return True
        return found["rank"] == self.rank or found["line"] != own["line"]

    @contextmanager
    def _answered(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._why(error) from error

    def _why(self, error: RuntimeError) -> Exception:
        """Why an exchange has failed: every rank that lives says so here, and the others are waited for no longer."""
        assert self.store is not None
        places = [f"here/{rank}" for rank in range(self.count)]
        try:
            self.store.set(places[self.rank], "")
            end = time.monotonic() + GRACE
            while time.monotonic() < end:
                time.sleep(0.05)
                if self.store.check(["ended"]):
                    return Elsewhere(json.loads(self.store.get("ended"))["code"])
            lost = [rank for rank in range(self.count) if not self.store.check([places[rank]])]
            names = [f"{rank} ({self.store.get(f'name/{rank}').decode()})" for rank in lost]
        except RuntimeError:  # the store was in the process that has died
            names = ["0"]
        if not names:
            return TrainingAborted(f"the ranks cannot reach each other ({reason(error)}); go on with --resume")
        which = f"rank {names[0]} has" if len(names) == 1 else f"ranks {', '.join(names)} have"
        return TrainingAborted(f"{which} died or not answered in time; go on with --resume")


ALONE = Ranks()
_present = ALONE
_times = counter()


def ranks() -> Ranks:
    """The ranks that this process works with now."""
    return _present


@contextmanager
def alone() -> Generator[None]:
    """Work that each rank does for itself, such as to measure how long steps take."""
    global _present
    before, _present = _present, ALONE
    try:
        yield
    finally:
        _present = before


@contextmanager
def running(engine: Engine) -> Generator[Ranks]:
    """Let the ranks work by an engine. Where weights are sharded, every pass is an exchange, which may fail."""
    global _present
    before = _present
    _present = group = replace(before, shards=engine == "fsdp" and before.count > 1)
    try:
        yield group
    except RuntimeError as error:
        of_exchange = type(error) is RuntimeError and "gloo" in str(error)
        if not group.shards or not (of_exchange or isinstance(error, dist.DistError)):
            raise
        raise group._why(error) from error
    finally:
        _present = before


@contextmanager
def joined() -> Generator[Ranks]:
    """Work together with the other ranks, if a launcher has started some; also a decorator.

    What ends one of them ends all: the error that is said first is raised as it is, and elsewhere, if it is the same
    or another rank's, as `Elsewhere`.
    """
    global _present
    rank, count = (int(os.environ.get(name) or fallback) for name, fallback in (("RANK", 0), ("WORLD_SIZE", 1)))
    if count == 1 or _present is not ALONE or "RANK" not in os.environ:
        yield _present
        return
    local, seconds = int(os.environ.get("LOCAL_RANK") or 0), float(os.environ.get("ONEFOLD_TIMEOUT") or TIMEOUT)
    backend, timeout = "gloo", timedelta(seconds=seconds)
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store = dist.PrefixStore(f"onefold/{next(_times)}", _launchers_store(timeout))
        store.set(f"name/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = f"the {count} ranks have not met at {place} ({reason(error)[:200]})"
        raise UserError(f"rank {rank}: {why}; start all of them, with that address (see docs/scale.md)") from error
    _present = group = Ranks(rank, count, store)
    ends = True
    try:
        yield group
    except Elsewhere:
        ends = False
        raise
    except (Exception, KeyboardInterrupt) as error:
        is_new, ends = group.says(error), False
        if group.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(GRACE)  # the store is in this process: the others look there
        if is_new:
            raise
        raise Elsewhere(_exit_code(error)) from error
    finally:
        _present = ALONE
        if ends or backend == "gloo":  # NCCL would wait for ranks that have ended
            dist.destroy_process_group()


@cache
def _launchers_store(timeout: timedelta) -> "dist.Store":
    """The store of the launcher, or of the first rank where the launcher has none."""
    return next(dist.rendezvous("env://", timeout=timeout))[0]


def _exit_code(error: BaseException) -> int:
    """That of the command; see `cli`."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return 128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT)
    return 3 if isinstance(error, TrainingAborted) else 2 if isinstance(error, UserError) else 1


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = list[Tensor](), 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
