"""`onefold serve`."""

import contextlib
import os
import socket
from pathlib import Path

from tyro.conf import Positional

from onefold.commands.terminal import console
from onefold.errors import UserError, printable
from onefold.settings import Precision

__all__ = ["serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    run: Positional[Path],
    other: Positional[Path | None] = None,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    waiting: int = 64,
    device: str = "auto",
    precision: Precision = "float32",
) -> None:
    """Serve a run's network as a page and a JSON API; also while the run trains.

    Example: onefold serve runs/digits runs/digits-onestep --port 8000

    Args:
        run: A run's folder, a saved network's folder, or a network on the hub (owner/name).
        other: Another, to be compared with it.
        host: Address to listen at. With another than this machine's own, whoever reaches it can ask.
        port: Port to listen at; 0 takes a free one.
        waiting: Requests that may wait for the network; more are told to come again.
        device: auto, cpu, cuda, …
        precision: Of matrix products. bfloat16 can be several times faster and changes images a little; auto takes it
            where it is at least twice as fast.
    """
    try:
        import uvicorn

        from onefold.web.app import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("onefold"):
            raise
        raise UserError(f"serve: needs {error.name}; install it, pip install 'onefold[serve]'") from None
    private = host in LOOPBACK
    sources = [run] if other is None else [run, other]
    hosts = ("127.0.0.1", "localhost", "[::1]") if private else ("*",)
    app = create_app(*sources, waiting=waiting, device=device, precision=precision, hosts=hosts)
    listening = _listen(host, port)
    place = f"[{host}]" if ":" in host else host
    console.print(
        printable(f"http://{place}:{listening.getsockname()[1]}: {' and '.join(map(str, sources))}; Ctrl-C ends")
    )
    if not private:
        console.print("note: whoever reaches this machine can ask; the default --host 127.0.0.1 is for you alone")
    with contextlib.suppress(KeyboardInterrupt), listening:  # Ctrl-C is the way to end it
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        UserError: a port that is taken, not allowed or no port, or an address that is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port: {port} is no port; give 1 to 65535, or 0 for a free one")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # negative for a name that nobody knows
        why = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise UserError(f"--port: cannot listen at {host}:{port} ({why}); choose another port or host") from None
