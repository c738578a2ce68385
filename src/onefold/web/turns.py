"""One at a time: the queue of requests before a network.

A single thread computes, which leaves the event loop free to answer everything else. A bounded number of requests
wait; beyond it they are refused at once, with the time after which a place should be free. Whoever has gone away is
passed over, or stopped in the middle.
"""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Busy", "Stopped", "Turns"]

T = TypeVar("T")
LOOK = 0.1
"""Seconds between two looks at whether somebody still waits for the answer."""


class Busy(Exception):
    """Too many are waiting; `seconds` is when to come again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {seconds} s")
        self.seconds = seconds


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Turns:
    """A thread, and at most `waiting` requests that wait for it."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._thread: ThreadPoolExecutor | None = None
        self._inside = 0
        self._usual = 0.1  # seconds of a turn, a running mean
        self._stop = threading.Event()

    def check_stop(self, *ignored: object) -> None:
        """Raises Stopped, within a turn whose answer nobody waits for."""
        if self._stop.is_set():
            raise Stopped

    def check_room(self) -> None:
        """Raises Busy if all places are taken."""
        if self._inside > self.waiting:
            raise Busy(max(1, math.ceil(self._usual * self._inside)))

    async def take(self, work: Callable[[], T], is_gone: Callable[[], Awaitable[bool]]) -> T:
        """Wait for a turn and return what `work` returns.

        Args:
            work: Computes, in the thread.
            is_gone: Whether nobody waits for the answer any more; asked from time to time.

        Raises:
            Busy: all places are taken. Stopped: nobody waits any more. Whatever `work` raises.
        """
        self.check_room()
        stop = threading.Event()
        self._inside += 1
        try:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="network")
            turn = asyncio.get_running_loop().run_in_executor(self._thread, self._turn, work, stop)
            try:
                while not (await asyncio.wait({turn}, timeout=LOOK))[0]:
                    if await is_gone():
                        stop.set()
            except asyncio.CancelledError:  # the server ends
                stop.set()
                raise
            return turn.result()
        finally:
            self._inside -= 1

    def close(self) -> None:
        """End the present turn and the thread; the next turn has another."""
        self._stop.set()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread = None

    def _turn(self, work: Callable[[], T], stop: threading.Event) -> T:
        self._stop = stop
        self.check_stop()
        start = time.perf_counter()
        done = work()
        self._usual += 0.2 * (time.perf_counter() - start - self._usual)
        return done
