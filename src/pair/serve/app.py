"""The addresses of the service."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pair import __version__
from pair.serve import schema
from pair.serve.audits import HEURISTIC
from pair.serve.batching import Batcher, Closed, Full
from pair.serve.engine import FORMATS, Engine, Work, base64_text, encoded
from pair.serve.gate import Gate
from pair.serve.inputs import Upload, read_json, read_pictures
from pair.serve.metrics import Metrics
from pair.serve.problems import Problem
from pair.serve.reference import page
from pair.serve.settings import Keys, Limits

COMMON = (400, 401, 408, 413, 415, 422, 429, 503, 504)
Format = Literal["png", "jpeg", "webp"]


class Service:
    """The engine with its queue, pools, limits and records; ``app`` is what a server runs.

    ``threads`` decode pictures and ask the collection; one more thread runs the models.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: Limits | None = None,
        keys: Keys | None = None,
        batch: int = 16,
        wait: float = 0.004,
        threads: int | None = None,
    ):
        self.engine, self.limits = engine, limits or Limits()
        self.metrics = Metrics()
        self.leaving = False  # set when the process is told to stop
        self.batcher = Batcher(
            engine.compute,
            size=batch,
            capacity=self.limits.queue,
            wait=wait,
            watch=lambda kind, *rest: self.metrics.batch(str(kind), *rest),
        )
        threads = threads or max(2, os.cpu_count() or 2)
        self.decoders = ThreadPoolExecutor(threads, "pair-decode")
        self.searchers = ThreadPoolExecutor(threads, "pair-search")
        self.metrics.gauge("pair_queue_pictures", "Waiting.", lambda: float(len(self.batcher)))
        self.api = build(self)
        self.gate = Gate(self.api, self.limits, keys or Keys(), self.metrics)
        self.gate.pace = lambda: len(self.batcher) * self.batcher.pace
        self.gate.leaving = lambda: self.leaving

    @property
    def app(self) -> Gate:
        return self.gate

    @property
    def ready(self) -> str:
        """Empty, or why not to send requests here."""
        if self.leaving:
            return "stopping"
        if not self.batcher.alive:
            return "the thread that computes has ended"
        if len(self.batcher) >= self.limits.queue:
            return "the queue is full"
        return ""

    def close(self) -> None:
        """Finish what was accepted, then end all threads."""
        self.leaving = True
        self.batcher.close()
        self.decoders.shutdown(cancel_futures=True)
        self.searchers.shutdown()

    async def pictures(self, request: Request) -> Upload:
        upload = await read_pictures(request, self.limits)
        request.scope["pair.visit"].pictures = len(upload.pictures)
        return upload

    async def compute(self, work: Work, payloads: Sequence[Any]) -> list[Any]:
        """Through the queue; a request whose time is up leaves it."""
        try:
            futures = self.batcher.submit(work, payloads)
        except Full:
            wait = len(self.batcher) * self.batcher.pace
            raise Problem(503, "full", "the queue is full: try again later", wait) from None
        except Closed:
            text = "the service is stopping: try another one"
            raise Problem(503, "stopping", text, 5) from None
        waiting = [asyncio.wrap_future(future) for future in futures]
        try:
            return list(await asyncio.gather(*waiting))
        finally:
            for future in waiting:
                future.cancel()

    async def prepared(self, pictures: Sequence[bytes], what: str) -> list[Any]:
        """Decode and resize; of several pictures the first bad one is named."""

        def one(number: int, data: bytes) -> Any:
            try:
                return self.engine.view(self.engine.picture(data, self.limits), what)
            except Problem as problem:
                if len(pictures) > 1:
                    problem.message = f"picture {number}: {problem.message}"
                raise

        jobs = [in_pool(self.decoders, one, n, data) for n, data in enumerate(pictures, 1)]
        return list(await asyncio.gather(*jobs))

    async def rows(self, upload: Upload, what: str, purified: bool) -> list[Any]:
        views = await self.prepared(upload.pictures, what)
        return await self.compute(Work(what, purified), views)

    async def found(self, row: Any, *options: Any) -> Response:
        hits = await in_pool(self.searchers, self.engine.search, row, *options)
        return compact({"hits": [hit.record() for hit in hits]})

    def model(self, role: str) -> dict[str, str]:
        models = self.engine.models
        return {"name": models.names.get(role, ""), "fingerprint": models.fingerprint(role)}


def in_pool(pool: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    return asyncio.get_running_loop().run_in_executor(pool, function, *args)


def compact(data: Any) -> Response:
    """JSON without FastAPI's second look at every number of a vector."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str)
    return Response(text.encode("utf-8", "backslashreplace"), media_type="application/json")


def build(service: Service) -> FastAPI:
    """The application with all its addresses; one function below for each group of them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="pair",
        version=__version__,
        description="Image search that stays honest under adversarial patches.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host that a client claims
        lifespan=lifespan,
    )

    pictures(app, service)
    searches(app, service)
    audits(app, service)
    operations(app, service)
    reference(app)
    handlers(app)
    return app


def pictures(app: FastAPI, service: Service) -> None:
    """``/purify`` and ``/embed``."""
    engine = service.engine

    @app.post(
        "/purify",
        summary="Purify pictures",
        response_class=Response,
        responses={
            200: {
                "model": schema.Purified,
                "description": "A picture as the body: the purified one. A form: JSON.",
                "content": {media: {} for media in FORMATS.values()},
            },
            **schema.failures(*COMMON),
        },
        openapi_extra=schema.picture_body(),
    )
    async def purify(request: Request, format: Format = "png") -> Response:
        """Every picture is rebuilt twice from half of itself, under masks drawn for this request
        alone. The result has the size of the model."""
        engine.need("purifier")
        upload = await service.pictures(request)
        views = await service.prepared(upload.pictures, "purify")
        clean = await service.compute(Work("purify"), views)
        jobs = [in_pool(service.decoders, encoded, image, format) for image in clean]
        files = await asyncio.gather(*jobs)
        if not upload.form:
            return Response(files[0], media_type=FORMATS[format])
        images = [base64_text(data) for data in files]
        model = service.model("purifier")
        return compact({"media_type": FORMATS[format], "images": images, "model": model})

    @app.post(
        "/embed",
        summary="Vectors or hash codes of pictures",
        response_class=Response,
        responses={200: {"model": schema.Rows}, **schema.failures(*COMMON)},
        openapi_extra=schema.picture_body(),
    )
    async def embed(
        request: Request,
        what: schema.What = "embedding",
        purified: Annotated[
            bool | None,
            Query(description="Of the purified pictures; default: true if there is a purifier."),
        ] = None,
    ) -> Response:
        """One vector, or one code in hexadecimal digits, per picture."""
        part = engine.part(what)
        if purified is None:
            purified = engine.models.purifier is not None
        if purified:
            engine.need("purifier")
        rows = await service.rows(await service.pictures(request), what, purified)
        values = [row.tobytes().hex() if what == "code" else row.tolist() for row in rows]
        return compact(
            {
                "what": what,
                "purified": purified,
                "size": part.bits if what == "code" else part.dim,
                "rows": values,
                "model": service.model("hasher" if what == "code" else "encoder"),
            }
        )


def searches(app: FastAPI, service: Service) -> None:
    """``/search/text`` and ``/search/image``."""
    engine, limits = service.engine, service.limits

    @app.post(
        "/search/text",
        summary="Search by words",
        response_class=Response,
        responses={200: {"model": schema.Found}, **schema.failures(*COMMON)},
        openapi_extra=schema.json_body(schema.TextSearch),
    )
    async def search_text(request: Request) -> Response:
        """The pictures of the collection that fit the words best."""
        engine.need_collection()
        if not hasattr(engine.models.encoder, "encode_text"):
            raise Problem(404, "absent", "this service has no text encoder: send a picture")
        asked = await read_json(request, schema.TextSearch)
        check_text(asked.query, "query", limits)
        check_filter(asked.where, limits)
        check_count(asked.k, limits)
        (row,) = await service.compute(Work("text"), [asked.query])
        return await service.found(row, "embedding", asked.defend, asked.k, asked.where)

    @app.post(
        "/search/image",
        summary="Search by a picture",
        response_class=Response,
        responses={200: {"model": schema.Found}, **schema.failures(*COMMON)},
        openapi_extra=schema.picture_body(several=False),
    )
    async def search_image(
        request: Request,
        k: Annotated[int, Query(ge=1, description="How many results.")] = 10,
        defend: schema.Defend | None = None,
        what: schema.What = "embedding",
        where: str | None = None,
    ) -> Response:
        """The pictures of the collection nearest to the one sent."""
        collection = engine.need_collection()
        engine.part(what)
        check_count(k, limits)
        check_filter(where, limits)
        try:
            purified = collection.purifies(defend, "query")
        except ValueError as error:
            raise Problem(422, "parameter", str(error)) from error
        upload = await service.pictures(request)
        if len(upload.pictures) > 1:
            raise Problem(413, "batch", "a search takes one picture")
        (row,) = await service.rows(upload, what, purified)
        return await service.found(row, what, defend, k, where)


def audits(app: FastAPI, service: Service) -> None:
    """``/audit``."""

    @app.post(
        "/audit",
        summary="Signs that pictures were tampered with",
        response_class=Response,
        responses={200: {"model": schema.Audits}, **schema.failures(*COMMON)},
        openapi_extra=schema.picture_body(),
    )
    async def audit(request: Request) -> Response:
        """How a picture reacts to purification and to hiding one window at a time. Heuristics: a
        patch made with the audit in mind evades them."""
        service.engine.need_examiner()
        upload = await service.pictures(request)
        views = await service.prepared(upload.pictures, "audit")
        records = await service.compute(Work("audit"), views)
        return compact({"pictures": records, "note": HEURISTIC})


def operations(app: FastAPI, service: Service) -> None:
    """For those who run it: ``/healthz``, ``/readyz``, ``/metrics``."""

    @app.get("/healthz", summary="Is it alive?", responses={200: {"model": schema.Health}})
    async def healthz() -> JSONResponse:
        """Yes, as long as this answers."""
        return JSONResponse({"status": "ok"})

    @app.get(
        "/readyz",
        summary="Shall it get requests?",
        responses={200: {"model": schema.Health}, **schema.failures(503)},
    )
    async def readyz() -> JSONResponse:
        """503 while it stops or its queue is full."""
        if reason := service.ready:
            raise Problem(503, "not-ready", reason, 1)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
    async def metrics() -> Response:
        """Needs a key where keys are set."""
        text = await asyncio.to_thread(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def reference(app: FastAPI) -> None:
    """``/docs``, also at the root."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(page(app.openapi()), headers=policy)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("docs")


def check_count(k: int, limits: Limits) -> None:
    if k > limits.results:
        raise Problem(422, "parameter", f"k: at most {limits.results} results")


def check_text(text: str, name: str, limits: Limits) -> None:
    if not text.strip():
        raise Problem(422, "parameter", f"{name}: it is empty")
    if len(text) > limits.text:
        raise Problem(422, "parameter", f"{name}: at most {limits.text} characters")
    if not text.isprintable():
        raise Problem(422, "parameter", f"{name}: it has control or broken characters")


def check_filter(where: str | None, limits: Limits) -> None:
    """None, or an empty text, asks for no filter."""
    if where:
        check_text(where, "where", limits)


def handlers(app: FastAPI) -> None:
    """All failures as the same JSON, without repeating what was sent."""

    def answer(request: Request, problem: Problem) -> Response:
        request.scope["pair.visit"].code = problem.code
        return Response(problem.body, problem.status, headers=problem.headers)

    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        return answer(request, problem)

    @app.exception_handler(ClientDisconnect)
    async def on_leaving(request: Request, error: ClientDisconnect) -> Response:
        # Nobody reads this: the client has left, or the gate has answered already.
        return answer(request, Problem(400, "left", "the client left before the body was whole"))

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        name = request.scope["pair.visit"].id  # the gate logs what happened under this name
        text = f"a fault of the service; its log has more under {name}"
        return answer(request, Problem(500, "fault", text))

    @app.exception_handler(RequestValidationError)
    async def on_parameters(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return answer(request, Problem(422, "parameter", f"{name}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        codes = {
            404: ("path", "no such address"),
            405: ("method", "this address has no such method"),
        }
        code, text = codes.get(error.status_code, ("request", "the request cannot be answered"))
        answered = answer(request, Problem(error.status_code, code, text))
        answered.headers.update(error.headers or {})
        return answered
