"""Model files on this node: a fetch starts only because an assignment needs the file.

One attempt at a time per model. A failure backs off; the last step of the back-off repeats for as long as the file is
needed, since a hub or a disk may come back. One that another try can't cure is reported as such, and waits for that
last step at once, since a person may have cured it. What came damaged would be fetched whole again, so that it waits
longer and longer. What nobody needs any more is cancelled.
"""

from enum import Enum
from typing import Final

from msgspec import Struct

from covey.control.settings import MachineSettings
from covey.schema.cluster import DownloadReport, DownloadState
from covey.schema.ids import ModelId
from covey.schema.machine import CancelFetch, Effect, FetchFailed, FetchFinished, FetchProgressed, StartFetch
from covey.schema.model import FileSource, ModelCard

RATE_WINDOW_MS: Final = 2_000  # bytes per second are measured over at least this
MINUTE_MS: Final = 60_000


class Phase(Enum):
    WAITING = "waiting"  # for its back-off
    FETCHING = "fetching"
    PRESENT = "present"


class Download(Struct):
    """One model's file. Attempts grow for as long as this node runs, so that a stale answer is known."""

    card: ModelCard
    phase: Phase
    due_ms: int
    attempt: int = 0
    failures: int = 0
    damages: int = 0  # of those, how often what came was not what was to come
    is_final: bool = False  # the last failure was, and no byte has come since
    path: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    reason: str = ""
    rate_from: tuple[int, int] = (0, 0)  # (ms, bytes) where the measured window began
    bytes_per_second: float = 0.0


class Downloads:
    """The files that this node has or needs. `revision` grows when its report would differ."""

    def __init__(self, settings: MachineSettings) -> None:
        self.settings = settings
        self.downloads: dict[ModelId, Download] = {}
        self.attempts: dict[ModelId, int] = {}
        self.on_disk: tuple[ModelId, ...] = ()
        self.revision = 0

    def advance(self, now_ms: int, needed: dict[ModelId, ModelCard]) -> list[Effect]:
        """Starts what is needed and due, cancels what is not needed."""
        effects: list[Effect] = []
        for model_id in [model_id for model_id in self.downloads if model_id not in needed]:
            effects += self._drop(model_id)
        for model_id, card in needed.items():
            if model_id not in self.downloads:
                self.downloads[model_id] = Download(card, Phase.WAITING, now_ms, bytes_total=card.file_bytes)
            download = self.downloads[model_id]
            if download.phase is Phase.WAITING and now_ms >= download.due_ms:
                effects.append(self._start(now_ms, download))
        return effects

    def paths(self) -> dict[ModelId, str]:
        """Where the files lie that are known to be there."""
        return {model_id: each.path for model_id, each in self.downloads.items() if each.phase is Phase.PRESENT}

    def deadline(self) -> int | None:
        """When the next back-off ends."""
        return min((each.due_ms for each in self.downloads.values() if each.phase is Phase.WAITING), default=None)

    def reports(self) -> tuple[DownloadReport, ...]:
        """What this node says of its downloads, by model id."""
        return tuple(_report(self.downloads[model_id]) for model_id in sorted(self.downloads))

    def models_on_disk(self) -> tuple[ModelId, ...]:
        """The complete files, listed or fetched since."""
        present = [model_id for model_id, each in self.downloads.items() if each.phase is Phase.PRESENT]
        return tuple(sorted({*self.on_disk, *present}))

    # ---- answers ----

    def list_models(self, now_ms: int, model_ids: tuple[ModelId, ...]) -> None:
        """What lies on the disk; a file that was deleted by hand is fetched again."""
        self.revision += model_ids != self.on_disk
        self.on_disk = model_ids
        for model_id, download in self.downloads.items():
            if download.phase is Phase.PRESENT and model_id not in model_ids and _is_listed(download.card):
                download.phase, download.due_ms, download.bytes_done = Phase.WAITING, now_ms, 0
                self.revision += 1

    def progress(self, now_ms: int, news: FetchProgressed) -> None:
        download = self._current(news.model_id, news.attempt)
        if download:
            if news.bytes_done < download.bytes_done:  # it is fetched from the start again
                download.rate_from = (now_ms, news.bytes_done)
            download.is_final = download.is_final and news.bytes_done <= download.bytes_done
            download.bytes_done, download.bytes_total = news.bytes_done, news.bytes_total
            self._measure(now_ms, download)
            self.revision += 1

    def finish(self, news: FetchFinished) -> None:
        download = self._current(news.model_id, news.attempt)
        if download:
            download.phase, download.path, download.reason, download.is_final = Phase.PRESENT, news.path, "", False
            download.failures = download.damages = 0
            download.bytes_done = download.bytes_total = news.bytes_total
            self.revision += 1

    def fail(self, now_ms: int, news: FetchFailed) -> None:
        download = self._current(news.model_id, news.attempt)
        if download:
            pause_ms = self._pause_ms(download, news)
            again = f"; all of it is fetched again in {_span(pause_ms)}" if news.is_damaged else ""
            download.phase, download.reason, download.is_final = Phase.WAITING, news.reason + again, news.is_final
            download.due_ms = now_ms + pause_ms
            download.failures += 1
            download.damages += news.is_damaged
            self.revision += 1

    def _pause_ms(self, download: Download, news: FetchFailed) -> int:
        if news.is_damaged:
            steps = self.settings.damaged_back_off_ms
            return steps[min(download.damages, len(steps) - 1)]
        steps = self.settings.fetch_back_off_ms
        return steps[-1 if news.is_final else min(download.failures, len(steps) - 1)]

    def _current(self, model_id: ModelId, attempt: int) -> Download | None:
        """The download that an answer belongs to, unless the answer is stale."""
        download = self.downloads.get(model_id)
        if download and download.phase is Phase.FETCHING and download.attempt == attempt:
            return download
        return None

    def _start(self, now_ms: int, download: Download) -> StartFetch:
        model_id = download.card.model_id
        self.attempts[model_id] = download.attempt = self.attempts.get(model_id, 0) + 1
        download.phase = Phase.FETCHING
        download.rate_from, download.bytes_per_second = (now_ms, download.bytes_done), 0.0
        self.revision += 1
        return StartFetch(download.card, download.attempt)

    def _drop(self, model_id: ModelId) -> list[Effect]:
        download = self.downloads.pop(model_id)
        self.revision += 1
        if download.phase is Phase.PRESENT:
            self.on_disk = tuple(sorted({*self.on_disk, model_id}))
        return [CancelFetch(model_id, download.attempt)] if download.phase is Phase.FETCHING else []

    @staticmethod
    def _measure(now_ms: int, download: Download) -> None:
        started_ms, started_bytes = download.rate_from
        if now_ms - started_ms >= RATE_WINDOW_MS:
            download.bytes_per_second = (download.bytes_done - started_bytes) * 1000 / (now_ms - started_ms)
            download.rate_from = (now_ms, download.bytes_done)


def _span(span_ms: int) -> str:
    """In whole minutes or hours, for people."""
    minutes = span_ms // MINUTE_MS
    count, unit = (minutes // 60, "hour") if minutes and minutes % 60 == 0 else (minutes, "minute")
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _is_listed(card: ModelCard) -> bool:
    """Files that a person named by their path are nobody's to list, or to fetch."""
    return not isinstance(card.source, FileSource)


def _report(download: Download) -> DownloadReport:
    state = DownloadState.FAILED if download.is_final else DownloadState.ONGOING
    tells_why = download.is_final or download.phase is Phase.WAITING
    return DownloadReport(
        model_id=download.card.model_id,
        state=DownloadState.COMPLETED if download.phase is Phase.PRESENT else state,
        bytes_done=download.bytes_done,
        bytes_total=download.bytes_total,
        bytes_per_second=download.bytes_per_second,
        reason=download.reason if tells_why else "",
    )
