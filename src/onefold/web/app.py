"""The application: the API under /api, its description at /docs, and the page at /.

A wrong request gets a 4xx and one sentence, one too many a 429 that says when to come again. All of a network's work is
done in turns, in a thread of its own. The policy sent with every answer lets a browser load nothing from elsewhere.
"""

import base64
import io
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from jaxtyping import UInt8
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onefold import __version__
from onefold.errors import UserError, printable
from onefold.networks.base import Network
from onefold.pictures.grids import grid, png_bytes
from onefold.sampling import Sampler
from onefold.settings import Precision
from onefold.training.run import Run
from onefold.web import schema
from onefold.web.generation import between, denoised, generated
from onefold.web.reference import reference_page
from onefold.web.served import NotYet, Served
from onefold.web.turns import Busy, Stopped, Turns
from onefold.web.uploads import fitted

__all__ = ["create_app"]

T = TypeVar("T")
HERE = Path(__file__).parent
FILES = ("page.css", "page.js", "charts.js")
"""What the page loads."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
REFUSED: dict[int | str, dict[str, Any]] = {
    404: {"model": schema.Problem, "description": "There is no such run or picture."},
    409: {"model": schema.Problem, "description": "The run has no network yet."},
    422: {"model": schema.Problem, "description": "A parameter is wrong."},
}
OVERLOAD: dict[int | str, dict[str, Any]] = {
    429: {
        "model": schema.Problem,
        "description": "Too many requests are waiting.",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    },
    503: {"model": schema.Problem, "description": "The device has no memory left, or nobody waits for the answer."},
}
PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "A PNG file."}}
UPLOAD = {
    "requestBody": {
        "required": True,
        "description": f"An image file (PNG, JPEG, WebP, …), of at most {schema.MOST_BYTES // 2**20} MiB and "
        f"{schema.MOST_PIXELS // 1_000_000} million pixels.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def create_app(
    *sources: Run | Network | str | Path,
    waiting: int = 64,
    device: str = "auto",
    precision: Precision = "float32",
    hosts: tuple[str, ...] = ("*",),
) -> FastAPI:
    """An application that serves one run, or two to be compared.

    Args:
        sources: One or two: runs, networks, or folders of either.
        waiting: Requests that may wait for the network.
        device: auto, cpu, cuda, …
        precision: Of matrix products; auto: bfloat16 where it is at least twice as fast.
        hosts: Names under which it may be asked. To accept only one's own keeps a foreign page in the browser from
            asking under a name that it makes point here.

    Raises:
        UserError: no run, more than two, or one that cannot be read.
    """
    if not 1 <= len(sources) <= 2:
        raise UserError(f"serve: {len(sources)} runs were given; give one, or two to compare")
    if waiting < 0:
        raise UserError(f"--waiting: {waiting} is negative; give 0 or more")
    turns = Turns(waiting)
    runs = [Served(source, device=device, precision=precision) for source in sources]
    for run in runs:
        run.check = turns.check_stop
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs[1].name = f"{runs[1].name} (2)"

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield
        turns.close()

    app = FastAPI(
        title="onefold",
        version=__version__,
        description="Images from the network of a run. Every answer is a function of its parameters.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_name,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(_Headers)
    _answer_errors(app)

    def served(number: int) -> Served:
        if number >= len(runs):
            raise HTTPException(404, f"run: there is no run {number}; only {' and '.join(map(str, range(len(runs))))}")
        return runs[number]

    async def in_turn(request: Request, work: Callable[[], T]) -> T:
        return await turns.take(work, request.is_disconnected)

    @app.get("/api/runs", tags=["runs"])
    def overview() -> schema.Overview:
        """What is served, and where it stands."""
        limits = schema.Limits(waiting=waiting)
        return schema.Overview(onefold=__version__, limits=limits, runs=[run.info() for run in runs])

    @app.get("/api/images", tags=["images"], responses=REFUSED | OVERLOAD)
    async def images(request: Request, wanted: Annotated[schema.Images, Query()]) -> schema.Pictures:
        """Generate images: image k is drawn from seed + k alone."""
        run = served(wanted.run)
        return await in_turn(request, partial(_images, run, wanted))

    @app.get("/api/images.png", tags=["images"], responses=REFUSED | OVERLOAD | PNG, response_class=Response)
    async def grid_of_images(request: Request, wanted: Annotated[schema.Images, Query()]) -> Response:
        """The same images as one PNG file: a grid, or a single image as it is."""
        run = served(wanted.run)
        png = await in_turn(request, partial(_grid, run, wanted))
        name = f'attachment; filename="onefold-seed{wanted.seed}.png"'
        return Response(png, media_type="image/png", headers={"content-disposition": name})

    @app.get("/api/interpolation", tags=["images"], responses=REFUSED | OVERLOAD)
    async def interpolation(request: Request, wanted: Annotated[schema.Between, Query()]) -> schema.Pictures:
        """Images on the way from one seed's noise to another's."""
        run = served(wanted.run)
        return await in_turn(request, partial(_between, run, wanted))

    too_large = {413: {"model": schema.Problem, "description": "The file is too large."}}

    @app.post("/api/reconstruction", tags=["images"], responses=REFUSED | OVERLOAD | too_large, openapi_extra=UPLOAD)
    async def reconstruction(request: Request, wanted: Annotated[schema.Noising, Query()]) -> schema.Reconstruction:
        """An uploaded image, encoded and decoded; and its latents noised to time t and denoised."""
        run = served(wanted.run)
        turns.check_room()  # before anything is read
        data = await _body(request)
        return await in_turn(request, partial(_reconstruction, run, wanted, data))

    @app.get("/api/training", tags=["runs"], responses=REFUSED)
    def training(wanted: Annotated[schema.Query, Query()]) -> schema.Training:
        """A run's log and the names of its pictures, also while it trains."""
        return served(wanted.run).training()

    @app.get("/api/samples/{name}", tags=["runs"], responses=REFUSED | PNG, response_class=Response)
    def sample(name: str, wanted: Annotated[schema.Query, Query()]) -> Response:
        """A picture that training wrote."""
        path = served(wanted.run).picture(name)
        if path is None:
            raise HTTPException(404, f"{printable(name)[:80]!r}: the run has no such picture; /api/training lists them")
        return FileResponse(path, media_type="image/png")

    @app.get("/docs", include_in_schema=False)
    def reference() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(HERE / "page.html")

    @app.get("/files/{name}", include_in_schema=False)
    def file_of_page(name: str) -> FileResponse:
        if name not in FILES:
            raise HTTPException(404)
        return FileResponse(HERE / name)

    return app


# --- what is computed, each in a turn ---------------------------------------------------------------------------------


def _images(run: Served, wanted: schema.Images) -> schema.Pictures:
    seeds, labels, sampler = _wanted(run, wanted)
    with run.computing() as network:
        start = time.perf_counter()
        found = generated(network, seeds, labels, sampler)
        return _pictures(run, found, seeds, labels, sampler, time.perf_counter() - start)


def _grid(run: Served, wanted: schema.Images) -> bytes:
    seeds, labels, sampler = _wanted(run, wanted)
    with run.computing() as network:
        found = generated(network, seeds, labels, sampler)
    about = _origin(run, sampler) | {"seeds": f"{seeds[0]}…{seeds[-1]}", "labels": labels}
    return png_bytes(found[0] if len(found) == 1 else grid(found), about)


def _wanted(run: Served, wanted: schema.Images) -> tuple[range, list[int] | None, Sampler]:
    run.network()  # labels and sampler are those of the newest one
    seeds = range(wanted.seed, wanted.seed + wanted.n)
    return seeds, run.labels_for(wanted.labels, wanted.n, wanted.seed), run.sampler_for(wanted)


def _between(run: Served, wanted: schema.Between) -> schema.Pictures:
    with run.computing() as network:
        sampler = run.sampler_for(wanted)
        labels = run.labels_for([] if wanted.label is None else [wanted.label], 1, wanted.seed)
        start, label = time.perf_counter(), labels[0] if labels else None
        found = between(network, (wanted.seed, wanted.other), wanted.n, label, sampler)
        seeds = [wanted.seed] * (wanted.n - 1) + [wanted.other]
        same = None if labels is None else labels * wanted.n
        return _pictures(run, found, seeds, same, sampler, time.perf_counter() - start)


def _reconstruction(run: Served, wanted: schema.Noising, data: bytes) -> schema.Reconstruction:
    with run.computing() as network:
        x = fitted(data, network.config)
        labels = run.labels_for(["none" if wanted.label is None else wanted.label], 1, wanted.seed)
        start, label = time.perf_counter(), labels[0] if labels else None
        found = denoised(network, x, wanted.t, seed=wanted.seed, label=label, steps=wanted.steps)
        original = x[0].permute(1, 2, 0).numpy()
        return schema.Reconstruction(
            original=_base64(original, {}),
            reconstruction=_base64(found.reconstruction, {}),
            noised=_base64(found.noised, {"t": wanted.t, "seed": wanted.seed}),
            denoised=_base64(found.denoised, {"t": wanted.t, "seed": wanted.seed}),
            resampled=_base64(found.resampled, {"t": wanted.t, "seed": wanted.seed, "steps": wanted.steps}),
            psnr=found.psnr,
            seconds=time.perf_counter() - start,
        )


def _pictures(
    run: Served,
    images: UInt8[np.ndarray, "n H W C"],
    seeds: "range | list[int]",
    labels: list[int] | None,
    sampler: Sampler,
    seconds: float,
) -> schema.Pictures:
    origin, shown = _origin(run, sampler), list[schema.Picture]()
    for image, seed, label in zip(images, seeds, labels or [None] * len(images), strict=True):
        name = run.label_name(label)
        about = {**origin, "seed": seed, "label": label, "class": name}
        shown.append(schema.Picture(png=_base64(image, about), seed=seed, label=label, name=name))
    return schema.Pictures(
        model=run.model or "",
        steps=sampler.steps,
        guidance=sampler.guidance,
        solver=sampler.solver,
        seconds=seconds,
        images=shown,
    )


def _origin(run: Served, sampler: Sampler) -> dict[str, object]:
    return {"network": run.name, "steps": sampler.steps, "guidance": sampler.guidance, "solver": sampler.solver}


def _base64(image: UInt8[np.ndarray, "H W C"], about: dict[str, object]) -> str:
    return base64.b64encode(png_bytes(image, about)).decode("ascii")


async def _body(request: Request) -> bytes:
    """The body of a request, which is not read further than it may be long."""
    most = schema.MOST_BYTES
    refusal = HTTPException(413, f"image: more than {most // 2**20} MiB; send a smaller file")
    if int(request.headers.get("content-length", 0)) > most:
        raise refusal
    data = io.BytesIO()
    async for part in request.stream():
        if data.tell() + len(part) > most:
            raise refusal
        data.write(part)
    return data.getvalue()


# --- errors, headers, names -------------------------------------------------------------------------------------------


def _answer_errors(app: FastAPI) -> None:
    """Every error is one sentence in `detail`."""

    def problem(code: int, text: object, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"detail": printable(text)}, code, headers)

    @app.exception_handler(RequestValidationError)
    def wrong_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, _sentence(error.errors()[0]))

    @app.exception_handler(UserError)
    def wrong_input(request: Request, error: UserError) -> JSONResponse:
        return problem(409 if isinstance(error, NotYet) else 422, error)

    @app.exception_handler(Busy)
    def busy(request: Request, error: Busy) -> JSONResponse:
        return problem(429, error, {"Retry-After": str(error.seconds)})

    @app.exception_handler(Stopped)
    def stopped(request: Request, error: Stopped) -> JSONResponse:
        return problem(503, "nobody waits for the answer any more")

    @app.exception_handler(torch.OutOfMemoryError)
    def no_memory(request: Request, error: torch.OutOfMemoryError) -> JSONResponse:
        return problem(503, "the device has no memory left; ask for fewer images")

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        text = error.detail
        if text == "Not Found":
            text = "there is nothing under this address; /docs describes what there is"
        elif text == "Method Not Allowed":
            text = f"{request.method} is not what this address takes; /docs describes what it does"
        return problem(error.status_code, text, dict(error.headers or {}))


def _sentence(error: dict[str, Any]) -> str:
    """A complaint of pydantic's about one parameter."""
    name = ".".join(map(str, error["loc"][1:2])) or "request"
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such parameter; /docs lists those there are"
    said = error["msg"].removeprefix("Input ").replace("Field required", "is required")
    if "input" not in error or error["type"] == "missing":
        return f"{name}: {said}"
    shown = repr(error["input"])
    return f"{name}: {shown if len(shown) <= 60 else shown[:60] + '…'} {said}"


def _operation_name(route: APIRoute) -> str:
    return route.name


class _Headers:
    """Puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)
