"""`onefold prefetch`."""

from tyro.conf import Positional

from onefold.commands.terminal import console
from onefold.errors import UserError, printable, quoted

__all__ = ["prefetch"]


def prefetch(names: Positional[tuple[str, ...]] = (), /, yes: bool = False) -> None:
    """Say which feature extractors can be had, from where and under which licence; download them with --yes.

    Without --yes nothing is downloaded, and no connection is made.

    Example: onefold prefetch inception dinov2 --yes

    Args:
        names: inception, dinov2 or clip. Default: all of them.
        yes: Download those that are not there.
    """
    from onefold.metrics.external import file_sha256
    from onefold.metrics.pretrained import weights_of
    from onefold.metrics.sources import SOURCES

    for name in names:
        if name not in SOURCES:
            raise UserError(f"{name}: not known; choose of {', '.join(SOURCES)}, or give a file to --features itself")
    chosen = [SOURCES[name] for name in dict.fromkeys(names or SOURCES)]
    if yes:
        for source in chosen:
            source.fetch(lambda line: console.print(printable(line), style="dim"))
    for source in chosen:
        console.print(printable(f"{source.name}: {source.gives}; {source.size}"))
        console.print(printable(f"  from {source.address}"))
        console.print(printable(f"  {'kept' if source.is_kept else 'to be kept'} as {source.place}"))
        console.print(printable(f"  licence: {source.licence}"))
    kept = [source for source in chosen if source.is_kept]
    for source in kept:
        path = source.place if source.is_file else weights_of(source.place)
        console.print(printable(f"{source.name}: SHA-256 {file_sha256(path)} ({path.name}); --features {source.name}"))
    if missing := [source.name for source in chosen if not source.is_kept]:
        console.print(f"Nothing was downloaded. To do so: onefold prefetch {' '.join(missing)} --yes")
    elif not yes:
        console.print(f"All is there: onefold evaluate RUN --features {' '.join(map(quoted, [s.name for s in kept]))}")
