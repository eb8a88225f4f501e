"""A fetch starts only because an assignment needs it, one at a time, and never again at once."""

from msgspec.structs import replace

from covey.control.downloads import Downloads
from covey.control.settings import MachineSettings
from covey.schema.cluster import DownloadState
from covey.schema.ids import ModelId
from covey.schema.machine import CancelFetch, FetchFailed, FetchFinished, FetchProgressed, StartFetch
from covey.schema.model import FileSource
from simulation.people import SMALL

MODEL = SMALL.model_id
NEEDED = {MODEL: SMALL}


def test_nothing_is_fetched_because_it_was_found() -> None:
    downloads = Downloads(MachineSettings())
    downloads.list_models(0, (ModelId("other"),))
    assert downloads.advance(0, {}) == []
    assert downloads.models_on_disk() == (ModelId("other"),)


def test_from_need_to_file() -> None:
    downloads = Downloads(MachineSettings())
    assert downloads.advance(0, NEEDED) == [StartFetch(SMALL, 1)]
    assert downloads.advance(1, NEEDED) == []
    downloads.progress(2_000, FetchProgressed(MODEL, 1, 40, 80))
    [report] = downloads.reports()
    assert (report.state, report.bytes_done, report.bytes_total) == (DownloadState.ONGOING, 40, 80)
    assert report.bytes_per_second == 20.0
    downloads.finish(FetchFinished(MODEL, 1, "/small.gguf", 80))
    assert downloads.paths() == {MODEL: "/small.gguf"}
    assert downloads.reports()[0].state is DownloadState.COMPLETED
    assert downloads.models_on_disk() == (MODEL,)


def test_a_failure_backs_off_longer_and_longer_but_never_for_good() -> None:
    downloads = Downloads(MachineSettings())
    now_ms = 0
    for attempt, pause_ms in enumerate((1_000, 4_000, 16_000, 60_000, 60_000), start=1):
        assert downloads.advance(now_ms, NEEDED) == [StartFetch(SMALL, attempt)]
        downloads.fail(now_ms, FetchFailed(MODEL, attempt, "no network"))
        assert downloads.reports()[0].state is DownloadState.ONGOING
        assert downloads.reports()[0].reason == "no network"
        assert downloads.deadline() == now_ms + pause_ms
        assert downloads.advance(now_ms + pause_ms - 1, NEEDED) == []
        now_ms += pause_ms


def test_what_no_other_try_cures_has_failed_until_bytes_come() -> None:
    downloads = Downloads(MachineSettings())
    downloads.advance(0, NEEDED)
    downloads.fail(0, FetchFailed(MODEL, 1, "the disk is full", is_final=True))
    [failed] = downloads.reports()
    assert (failed.state, failed.reason) == (DownloadState.FAILED, "the disk is full")
    assert downloads.deadline() == 60_000
    assert downloads.advance(60_000, NEEDED) == [StartFetch(SMALL, 2)]  # a person may have made room
    downloads.progress(60_000, FetchProgressed(MODEL, 2, 0, 80))
    assert downloads.reports() == (replace(failed, bytes_total=80),)
    downloads.progress(60_000, FetchProgressed(MODEL, 2, 1, 80))
    assert (downloads.reports()[0].state, downloads.reports()[0].reason) == (DownloadState.ONGOING, "")
    downloads.fail(61_000, FetchFailed(MODEL, 2, "the disk is full", is_final=True))
    downloads.fail(61_000, FetchFailed(MODEL, 2, "stale"))
    downloads.advance(121_000, NEEDED)
    downloads.finish(FetchFinished(MODEL, 3, "/small.gguf", 80))
    assert (downloads.reports()[0].state, downloads.reports()[0].reason) == (DownloadState.COMPLETED, "")


def test_what_is_fetched_from_the_start_again_has_a_rate_of_its_own() -> None:
    downloads = Downloads(MachineSettings())
    downloads.advance(0, NEEDED)
    downloads.progress(1_000, FetchProgressed(MODEL, 1, 80, 80))
    downloads.fail(1_000, FetchFailed(MODEL, 1, "its SHA-256 differs", is_final=True, is_damaged=True))
    downloads.advance(61_000, NEEDED)
    for now_ms, bytes_done in ((61_000, 0), (62_000, 20), (63_000, 40)):
        downloads.progress(now_ms, FetchProgressed(MODEL, 2, bytes_done, 80))
    assert downloads.reports()[0].bytes_per_second == 20.0


def test_what_came_damaged_is_fetched_whole_again_less_and_less_often() -> None:
    """Another try costs all of its bytes, and ends alike until somebody mends the source: at most one an hour."""
    downloads = Downloads(MachineSettings())
    now_ms = 0
    words = ("1 minute", "10 minutes", "1 hour", "1 hour")
    for attempt, (pause_ms, pause) in enumerate(zip((60_000, 600_000, 3_600_000, 3_600_000), words, strict=True), 1):
        assert downloads.advance(now_ms, NEEDED) == [StartFetch(SMALL, attempt)]
        downloads.progress(now_ms, FetchProgressed(MODEL, attempt, 79, 80))
        damaged = FetchFailed(MODEL, attempt, "its SHA-256 differs", is_final=True, is_damaged=True)
        downloads.fail(now_ms, damaged)
        [report] = downloads.reports()
        assert report.state is DownloadState.FAILED
        assert report.reason == f"its SHA-256 differs; all of it is fetched again in {pause}"
        assert downloads.deadline() == now_ms + pause_ms
        assert downloads.advance(now_ms + pause_ms - 1, NEEDED) == []
        now_ms += pause_ms
    downloads.advance(now_ms, NEEDED)
    downloads.fail(now_ms, FetchFailed(MODEL, 5, "no network"))  # that one may be better the next minute
    assert downloads.deadline() == now_ms + 60_000


def test_what_is_not_needed_any_more_is_cancelled_once() -> None:
    downloads = Downloads(MachineSettings())
    downloads.advance(0, NEEDED)
    assert downloads.advance(1, {}) == [CancelFetch(MODEL, 1)]
    assert downloads.advance(2, {}) == []
    assert downloads.advance(3, NEEDED) == [StartFetch(SMALL, 2)]
    downloads.fail(4, FetchFailed(MODEL, 1, "stale"))
    downloads.finish(FetchFinished(MODEL, 1, "/stale", 1))
    assert downloads.paths() == {}
    assert downloads.reports()[0].state is DownloadState.ONGOING


def test_a_file_that_was_deleted_by_hand_is_fetched_again() -> None:
    downloads = Downloads(MachineSettings())
    downloads.advance(0, NEEDED)
    downloads.finish(FetchFinished(MODEL, 1, "/small.gguf", 80))
    downloads.list_models(1_000, (MODEL,))
    assert downloads.advance(1_000, NEEDED) == []
    downloads.list_models(5_000, ())
    assert downloads.paths() == {}
    assert downloads.models_on_disk() == ()
    assert downloads.advance(5_000, NEEDED) == [StartFetch(SMALL, 2)]


def test_a_file_that_a_person_named_is_in_no_list() -> None:
    downloads = Downloads(MachineSettings())
    card = replace(SMALL, source=FileSource("/small.gguf"))
    downloads.advance(0, {MODEL: card})
    downloads.finish(FetchFinished(MODEL, 1, "/small.gguf", 80))
    downloads.list_models(1_000, ())
    assert downloads.paths() == {MODEL: "/small.gguf"}
