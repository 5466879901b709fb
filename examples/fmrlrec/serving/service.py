"""A small HTTP service over a trained run: recommendations at several sizes, events, new items.

One process, one thread: an answer takes less than it would cost to hand it to another, and no two
events of a user can meet. Errors are 4xx with {"error": what to do}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from examples.fmrlrec import pipeline
from examples.fmrlrec.config import DataError
from examples.fmrlrec.encoders import open_picture
from examples.fmrlrec.nesting import sizes_of
from examples.fmrlrec.pipeline import Material, Run
from examples.fmrlrec.serving.compact import compact, project, titles_of
from examples.fmrlrec.serving.live import Live, Unknown, logged
from examples.fmrlrec.serving.recommending import encode_items
from matryoshkafy.errors import MatryoshkafyError

PAGE = Path(__file__).with_name("page.html")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
Scope = MutableMapping[str, Any]
Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Shop:
    """What the service shows of items: titles and pictures by id; and how it takes new ones."""

    live: Live
    titles: dict[str, str]
    pictures: dict[str, Path]
    add: Callable[[dict[str, Any]], str] | None = None


class Event(BaseModel):
    """A user had an item."""

    user: str = Field(min_length=1, max_length=200)
    item: str = Field(min_length=1, max_length=200)


class Item(BaseModel):
    """A new item; what it is told by are its title, price, brand, categories and picture."""

    item_id: str = Field(min_length=1, max_length=200)
    title: str = ""
    price: str = ""
    brand: str = ""
    categories: str = ""
    image: str = Field("", description="a path beside the data of the run")


def open_shop(run: Run, material: Material, sizes: list[int], index: str) -> Shop:
    """The users, items and sizes of a run, with the events that came since it was trained."""
    doll = pipeline.trained_doll(run, material)
    chosen = sizes or list(sizes_of(run.config))
    models = {size: compact(doll, run.config, size) for size in chosen}
    found = material.data
    ids = found.catalogue["item_id"].cast(pl.String).to_list()
    users = found.user_ids.cast(pl.String).to_list()
    histories = {user: found.sequence(number) for number, user in enumerate(users)}
    live = Live(models, ids, histories, index=index, length=run.config.max_length)
    titles = dict(zip(ids, titles_of(found)[1:], strict=True))
    pairs = zip(ids, found.catalogue["image"], strict=True)
    shop = Shop(live, titles, {name: Path(path) for name, path in pairs if path})
    folder = run.folder / "serving"
    folder.mkdir(exist_ok=True)
    newcomers = Newcomers(run, material, doll, shop, folder / "items.jsonl")
    newcomers.replay()
    live.replay(folder / "events.jsonl")
    return Shop(live, titles, shop.pictures, newcomers.add)


@dataclass(frozen=True)
class Newcomers:
    """Items that come while the service runs: encoded, projected, and kept for the next start."""

    run: Run
    material: Material
    doll: Any
    shop: Shop
    log: Path

    def replay(self) -> None:
        """Takes up the items of earlier runs of the service, but those that fit no more."""
        for row in logged(self.log):
            try:
                self._add(row)
            except MatryoshkafyError as error:
                print(f"note: item {row['item_id']!r} of {self.log.name} is left out: {error}")

    def add(self, row: dict[str, Any]) -> str:
        """Adds an item described as a row of items.csv; returns its title."""
        title = self._add(row)
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        return title

    def _add(self, row: dict[str, Any]) -> str:
        root = pipeline.data_path(self.run)
        root = root if root.is_dir() else root.parent
        picture = picture_in(root, row.get("image", ""))
        found = encode_items(self.run, self.material, [row], root)
        live, name = self.shop.live, str(row["item_id"])
        live.add(name, {size: project(self.doll, size, found.features)[0] for size in live.sizes})
        self.shop.titles[name] = found.titles[0]
        if picture is not None:
            self.shop.pictures[name] = picture
        return found.titles[0]


def picture_in(root: Path, name: str) -> Path | None:
    """The picture of that name beside the data; the service shows no other file."""
    if not name:
        return None
    try:
        path = (root / name).resolve()
    except (OSError, ValueError):
        path = root
    inside = path.is_relative_to(root.resolve())
    if not inside or isinstance(open_picture(path), str):
        raise DataError(f"{name!r} is no picture that can be read in the folder of the data")
    return path


class Metrics:
    """Requests and their seconds by path and status, and the bytes of each size."""

    def __init__(self, live: Live) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("fmrlrec_requests", "Requests answered", ["path", "status"],
                                registry=self.registry)  # fmt: skip
        self.seconds = Histogram("fmrlrec_request_seconds", "Time of an answer", ["path"],
                                 buckets=SECONDS, registry=self.registry)  # fmt: skip
        memory = Gauge("fmrlrec_size_bytes", "Weights, table and states", ["size"],
                       registry=self.registry)  # fmt: skip
        for number, size in live.sizes.items():
            memory.labels(number).set_function(lambda size=size: size.bytes)


class Counted:
    """The ASGI application with every request counted, by its route rather than its address."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """Answers a request and counts it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)


def application(shop: Shop) -> FastAPI:
    """The service as a FastAPI application."""
    app = FastAPI(title="fMRLRec", docs_url="/docs", redoc_url=None)
    metrics = Metrics(shop.live)
    app.add_middleware(Counted, metrics=metrics)
    app.add_exception_handler(MatryoshkafyError, _told)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    _answer_pages(app, shop)
    _answer_questions(app, shop)
    _take_news(app, shop)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return app


def _answer_pages(app: FastAPI, shop: Shop) -> None:
    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/items/{item:path}/image")
    async def image(item: str) -> Response:
        path = shop.pictures.get(item)
        if path is None or not path.exists():
            raise Unknown(f"no picture of item {item!r}")
        return FileResponse(path)


def _answer_questions(app: FastAPI, shop: Shop) -> None:
    live = shop.live

    @app.get("/health")
    async def health() -> Response:
        counts = {"users": len(live.users), "items": len(live.items), "index": live.index}
        return _json({"status": "ok", "sizes": list(live.sizes), **counts})

    @app.get("/users")
    async def users(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> Response:
        return _json({"users": list(live.users)[:limit]})

    @app.get("/users/{user:path}")
    async def user(user: str, limit: Annotated[int, Query(ge=1, le=100)] = 10) -> Response:
        if user not in live.users:
            raise Unknown(f"no user {user!r}; POST /events starts one")
        numbers = live.seen[live.users[user]][-limit:]
        names = [live.names[number - 1] for number in numbers]
        return _json({"user": user, "history": [_shown(shop, name) for name in names]})

    @app.get("/recommend")
    async def recommend(
        user: str,
        size: Annotated[list[int] | None, Query()] = None,
        k: Annotated[int, Query(ge=1, le=100)] = 10,
    ) -> Response:
        found = {}
        for number in size or list(live.sizes):
            best = live.top(user, number, k)
            found[number] = [{**_shown(shop, name), "score": score} for name, score in best]
        return _json({"user": user, "sizes": found})


def _take_news(app: FastAPI, shop: Shop) -> None:
    @app.post("/events")
    async def event(event: Event) -> Response:
        return _json({"user": event.user, "events": shop.live.event(event.user, event.item)})

    @app.post("/items", status_code=201)
    async def add(item: Item) -> Response:
        if shop.add is None:
            raise Unknown("this service takes no new items")
        return _json({"item_id": item.item_id, "title": shop.add(item.model_dump())}, 201)


def _shown(shop: Shop, name: str) -> dict[str, Any]:
    return {"id": name, "title": shop.titles.get(name, name), "picture": name in shop.pictures}


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")


async def _told(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 404 if isinstance(error, Unknown) else 400)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    told = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
    return JSONResponse({"error": "; ".join(told)}, 422)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    """A path or a method that is not there."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": f"{error.detail}; /docs lists the paths"}, error.status_code)


def serve(run: Run, shop: Shop, host: str, port: int) -> None:
    """Serves a run until it is stopped."""
    import uvicorn

    app = application(shop)
    print(f"serving {run.folder} at http://{host}:{port} (metrics: /metrics, API: /docs)")
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
