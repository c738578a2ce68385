"""Work done by threads, with results in order.

Threads suffice: Pillow and zlib let go of Python's lock while they work. Results come in the order of the
items, so nothing that uses this depends on the number of threads.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (done, total) now and then, in the caller's thread."""

_THREADS = min(8, os.cpu_count() or 1)

# Small images take so little time that handing them over one by one would cost more.
CHUNK = 32


def map_ordered(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Generator[Result]:
    """Yield `function(item)` for each item, in order; `workers` threads work ahead, 0 means none.

    At most twice as many items as workers are under way, so `items` may be infinite. An exception surfaces
    where its result would have been. Closing or dropping the iterator ends the threads.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="onefold-data")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_indices(
    function: Callable[[int], Result],
    indices: Sequence[int],
    progress: Progress | None = None,
    *,
    chunk: int = CHUNK,
) -> Iterator[Result]:
    """Yield `function(index)` for each index, in order, computed by a small pool of threads.

    Each takes `chunk` indices at a time; up to 16 chunks of results are held.
    """
    chunks = [indices[k : k + chunk] for k in range(0, len(indices), chunk)]
    done = 0
    for results in map_ordered(lambda some: [function(k) for k in some], chunks, workers=_THREADS):
        yield from results
        done += len(results)
        if progress is not None:
            progress(done, len(indices))
