"""The HTTP interface of the web app, and its page."""

from __future__ import annotations

import asyncio
import errno
import zipfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Annotated, Any
from urllib.parse import quote

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI, File, Form, HTTPException, Path, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field

from kmdx import catalog, file_names, listening, plan_file
from kmdx.challenge import WITHOUT_VOCALS
from kmdx.encoding import FORMATS
from kmdx.errors import KmdxError, quoted, suggest
from kmdx.web.guard import COOKIE, Access, Guard, refuse
from kmdx.web.jobs import Job, NoSuchJob, NotNow, Queue, QueueFull, State, TooLarge, Wish

PAGE = FilePath(__file__).with_name("page")
ASSETS = {
    "app.js": PAGE / "app.js",
    "app.css": PAGE / "app.css",
    "theme.css": listening.PLAYER / "theme.css",
    "page.css": listening.PLAYER / "page.css",
}
INSTRUMENTAL = WITHOUT_VOCALS[1]
SWEEP = 30.0  # seconds between two looks for results that are too old
SIMILAR = 10  # times more arithmetic, up to which the time of an ensemble is estimated from another one
SENT = 2**18  # bytes of a zip archive that are sent at a time
LISTENING = "sandbox allow-scripts; frame-ancestors 'none'"
"""The listening page states its own policy; this one keeps its scripts from the server's other pages."""


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Ensemble(BaseModel):
    """An ensemble, with what helps to choose one."""

    name: str
    title: str
    description: str
    stems: list[str]
    score: str | None = Field(description="published score, and on which songs")
    license: str = Field(description="licenses of its weights")
    gflops: float | None = Field(description="arithmetic in GFLOP per second of song")
    download: int | None = Field(description="bytes of weights to download first; null if unknown")
    is_here: bool = Field(description="whether all its weights are on the server")
    time: float | None = Field(
        description="seconds of work per second of song on this server; null if unknown"
    )
    is_measured: bool = Field(description="whether the time was measured, not estimated from other ensembles")


class Server(BaseModel):
    """What the server accepts."""

    version: str
    formats: list[str]
    max_size: int = Field(description="bytes of an upload")
    max_length: float = Field(description="seconds of a song")
    max_queue: int = Field(description="songs that wait")
    keep: float = Field(description="seconds until a result is deleted")


class JobView(BaseModel):
    """A song in the queue, or its result."""

    id: str
    title: str
    ensemble: str
    stems: list[str]
    format: str
    seconds: float = Field(description="length of the song")
    state: State
    position: int | None = Field(description="place in the queue, from 1")
    doing: str | None = Field(description="what is being done, while the job is running")
    progress: float | None = Field(description="from 0 to 1, while the job is running; null if unknown")
    submitted: datetime
    ended: datetime | None
    expires: datetime | None = Field(description="when the result is deleted")
    error: str | None
    warnings: list[str]
    files: dict[str, str] = Field(description="the address of each stem, when the job is done")
    zip: str | None = Field(description="the address of a zip archive with all stems")
    page: str | None = Field(description="the address of the listening page")


class Token(BaseModel):
    """The server's token."""

    token: str = Field(max_length=1000)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its documentation."""
    return {status: {"model": Problem} for status in (401, 403, 422, *statuses)}


class _Form(Request):
    """A request whose form has few and small fields besides one file."""

    def form(self, **_: Any) -> Any:
        return super().form(max_files=1, max_fields=10, max_part_size=4096)


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_small(request: Request) -> Response:
            return await handle(_Form(request.scope, request.receive))

        return handle_small


Id = Annotated[str, Path(pattern="^[0-9a-f]{24}$", description="the id of a job")]


class Api:
    """The routes, which share a queue."""

    def __init__(self, queue: Queue, access: Access) -> None:
        self.queue, self.access = queue, access
        self._checks = CapacityLimiter(1)  # uploads are decoded one at a time, to save memory
        self.router = router = APIRouter(prefix="/api", route_class=_Route, tags=["songs"])
        get = partial(router.get, responses=_problems())
        one = partial(router.get, responses=_problems(404))
        file = partial(router.get, responses=_problems(404, 409), response_class=FileResponse)
        get("/server", summary="What the server accepts")(self.server)
        get("/ensembles", summary="Ensembles to choose from")(self.ensembles)
        router.post(
            "/jobs",
            summary="Submit a song",
            status_code=201,
            responses=_problems(400, 408, 413, 429, 507),
        )(self.submit)
        get("/jobs", summary="All jobs, the oldest first")(self.jobs)
        one("/jobs/{id}", summary="The state of a job")(self.job)
        router.post("/jobs/{id}/cancel", summary="Cancel a job", responses=_problems(404, 409))(self.cancel)
        router.delete("/jobs/{id}", summary="Delete a job", status_code=204, responses=_problems(404, 409))(
            self.delete
        )
        file("/jobs/{id}/stems/{stem}", summary="A stem")(self.stem)
        file("/jobs/{id}/zip", summary="All stems in a zip archive")(self.archive)
        file("/jobs/{id}/page", summary="A page to listen to the stems")(self.page)
        router.post("/login", summary="Store the token in a cookie", status_code=204, responses=_problems())(
            self.login
        )

    def server(self) -> Server:
        """What the server accepts."""
        limits = self.queue.limits
        return Server(
            version=version("kmdx-net"),
            formats=[*FORMATS],
            max_size=limits.size,
            max_length=limits.length,
            max_queue=limits.queue,
            keep=limits.keep,
        )

    def ensembles(self) -> list[Ensemble]:
        """The ensembles that come with kmdx, and those in the server's models folder."""
        summaries = catalog.summaries()
        times = _times(self.queue.all(), summaries)
        return [
            Ensemble(
                name=each.name,
                title=each.title,
                description=each.description,
                stems=[*each.stems, *([INSTRUMENTAL] if _has_instrumental(each.stems) else [])],
                score=each.score or None,
                license=each.license,
                gflops=each.gflops,
                download=each.download,
                is_here=each.is_here,
                time=times.get(each.name, (None, False))[0],
                is_measured=times.get(each.name, (None, False))[1],
            )
            for each in summaries
        ]

    async def submit(
        self,
        response: Response,
        song: Annotated[UploadFile, File(description="a sound file or a video")],
        ensemble: Annotated[str, Form(description="by default a demonstration")] = "mini",
        stems: Annotated[str, Form(description="separated by commas; by default all")] = "",
        format: Annotated[str, Form(description="wav16, wav24, float32, flac or mp3")] = "wav16",
    ) -> JobView:
        """Upload a song, and queue its separation."""
        try:
            wish = await to_thread.run_sync(_wish, ensemble, stems, format)
            add = partial(self.queue.add, song.file, song.filename or "", wish)
            job = await to_thread.run_sync(add, limiter=self._checks)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise HTTPException(507, "the server's disk is full") from error
        response.headers["location"] = f"/api/jobs/{job.id}"
        return self._view(job.id)

    def jobs(self) -> list[JobView]:
        """All jobs."""
        found = []
        for job in self.queue.all():
            with suppress(NoSuchJob):  # it was deleted meanwhile
                found.append(self._view(job.id))
        return found

    def job(self, id: Id) -> JobView:
        """The state of a job."""
        return self._view(id)

    def cancel(self, id: Id) -> JobView:
        """Take a job out of the queue; one that is running ends after its current window."""
        return self._view(self.queue.cancel(id).id)

    def delete(self, id: Id) -> None:
        """Delete a job with its song and its stems; one that is running must be cancelled first."""
        self.queue.delete(id)

    def stem(self, id: Id, stem: str) -> FileResponse:
        """Download a stem."""
        job = self._done(id)
        if stem not in job.files:
            raise HTTPException(404, f"this job has no stem {quoted(stem)}")
        path = self.queue.stems(job) / job.files[stem]
        name = file_names.portable(f"{job.title} ({stem})", 200) + path.suffix
        return FileResponse(path, headers={"content-disposition": disposition(name)})

    def archive(self, id: Id) -> StreamingResponse:
        """Download all stems."""
        job = self._done(id)
        folder = file_names.portable(job.title, 150) or "song"
        parts = {f"{folder}/{name}": self.queue.stems(job) / name for name in job.files.values()}
        return StreamingResponse(
            zipped(parts),
            media_type="application/zip",
            headers={"content-disposition": disposition(f"{folder}.zip")},
        )

    def page(self, id: Id) -> FileResponse:
        """Listen to the stems."""
        job = self._done(id)
        if not job.has_page:
            raise HTTPException(404, "this job has no listening page")
        headers = {"content-security-policy": LISTENING}
        return FileResponse(
            self.queue.stems(job) / listening.PAGE, headers=headers, media_type="text/html; charset=utf-8"
        )

    def login(self, token: Token) -> Response:
        """Store the token in a cookie, as the page does."""
        if not self.access.is_token(token.token):
            raise HTTPException(401, "this is not the server's token")
        answer = Response(status_code=204)
        answer.set_cookie(COOKIE, token.token, httponly=True, samesite="strict")
        return answer

    def _done(self, id: str) -> Job:
        """A job that is done."""
        job = self.queue.get(id)
        if job.state is not State.done:
            raise NotNow(f"this job is {job.state.value}, so it has no stems")
        return job

    def _view(self, id: str) -> JobView:
        job, position, progress = self.queue.status(id)
        base = f"/api/jobs/{job.id}"
        return JobView(
            **job.model_dump(include={"id", "title", "ensemble", "format", "seconds", "state", "error"}),
            stems=[*job.stems],
            position=position,
            doing=progress.doing if progress else None,
            progress=progress.share if progress else None,
            submitted=_time(job.submitted),
            ended=None if job.ended is None else _time(job.ended),
            expires=None if (expires := self.queue.expires(job)) is None else _time(expires),
            warnings=[*job.warnings],
            files={stem: f"{base}/stems/{quote(stem, safe='')}" for stem in job.files},
            zip=f"{base}/zip" if job.files else None,
            page=f"{base}/page" if job.has_page else None,
        )


def create(queue: Queue, access: Access, start: Callable[[], Callable[[], object]]) -> Guard:
    """The app as ASGI.

    Parameters
    ----------
    queue : Queue
    access : Access
    start : callable
        Called when the server starts; returns what is called, in a thread, when it ends.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        stop = start()
        sweeping = asyncio.create_task(_sweep(queue))
        yield
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping
        await to_thread.run_sync(stop)

    app = FastAPIOffline(
        title="kmdx",
        summary="Separates songs into stems.",
        version=version("kmdx-net"),
        docs_url="/docs",
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=life,
        dependencies=[Depends(HTTPBearer(auto_error=False, description="the server's token, if it has one"))],
    )
    app.include_router(Api(queue, access).router)
    _add_page(app)
    for kind, status in (
        (NoSuchJob, 404),
        (NotNow, 409),
        (TooLarge, 413),
        (QueueFull, 429),
        (KmdxError, 422),
    ):
        app.add_exception_handler(kind, partial(_refused, status=status))
    app.add_exception_handler(RequestValidationError, _invalid)
    return Guard(app, access, queue)


def _add_page(app: FastAPI) -> None:
    """Add the page, and the files that it consists of."""

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/static/{name}", include_in_schema=False)
    def asset(name: str) -> FileResponse:
        if name not in ASSETS:
            raise HTTPException(404, "not found")
        return FileResponse(ASSETS[name], headers={"cache-control": "no-cache"})


async def _refused(request: Request, error: Exception, status: int) -> JSONResponse:
    return refuse(status, str(error))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """One line about a malformed request."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "request"
    return refuse(422, f"{where}: {first['msg']}")


async def _sweep(queue: Queue) -> None:
    """Delete results that are too old, from time to time."""
    while True:
        await to_thread.run_sync(queue.expire)
        await asyncio.sleep(SWEEP)


def _wish(ensemble: str, stems: str, format: str) -> Wish:
    """What to make of a song; raises :class:`KmdxError` if the server does not offer it."""
    known = [*plan_file.names(), *plan_file.imported()]
    if ensemble not in known:  # never a path or a URL
        raise KmdxError(f"unknown ensemble {quoted(ensemble)}{suggest(ensemble, known)}")
    if format not in FORMATS:
        raise KmdxError(f"unknown format {quoted(format)}{suggest(format, FORMATS)}")
    names = [name.strip() for name in stems.split(",") if name.strip()]
    return Wish(ensemble, plan_file.load(ensemble).check_stems(names or None), format)


def _has_instrumental(stems: tuple[str, ...]) -> bool:
    return "vocals" in stems and INSTRUMENTAL not in stems


def _times(jobs: list[Job], summaries: list[catalog.Summary]) -> dict[str, tuple[float, bool]]:
    """Seconds of work per second of song, and whether they were measured, for each ensemble.

    A time is measured by the last song with all stems of the ensemble. Or else it is estimated in proportion
    to the arithmetic, from the last song of an ensemble whose arithmetic is similar: small networks use a
    processor less well.
    """
    known = {each.name: each for each in summaries}
    times: dict[str, tuple[float, bool]] = {}
    for job in sorted(jobs, key=lambda job: job.ended or 0.0):
        own = known.get(job.ensemble)
        if own is None or not job.worked or {*own.stems} - {*job.stems}:
            continue
        factor = job.worked / job.seconds
        for name, each in known.items():
            if own.gflops and each.gflops and not times.get(name, (0.0, False))[1]:
                ratio = each.gflops / own.gflops
                if 1 / SIMILAR <= ratio <= SIMILAR:
                    times[name] = factor * ratio, False
        times[job.ensemble] = factor, True
    return times


def disposition(name: str) -> str:
    """A Content-Disposition header for a file name, also for programs that know only ASCII (RFC 5987)."""
    plain = "".join(each if each.isascii() and each not in '"\\%;' else "_" for each in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


class _Sink:
    """Collects what a zip archive writes, which cannot seek."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data


def zipped(parts: Mapping[str, FilePath]) -> Iterator[bytes]:
    """A zip archive of files by name, piece by piece; sound is not compressed again."""
    sink: Any = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, path in parts.items():
            entry = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while block := source.read(SENT):
                    target.write(block)
                    yield sink.take()
    yield sink.take()


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
