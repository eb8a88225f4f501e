"""Every limit and interval of a node's control machine, named with its unit and its reason."""

from typing import Final

from msgspec import Struct

from covey.schema.runner import Address

NODES_REMEMBERED_MAX: Final = 1024  # (boot, sequence) of forgotten nodes; a home has a handful
COMMANDS_REMEMBERED_MAX: Final = 1024  # outcomes kept for repeated requests; one is repeated for 10 s at most
RUNNERS_REMEMBERED_MAX: Final = 256  # attempts of runners that are not assigned any more; they may be again
COMMANDS_QUEUED_MAX: Final = 256  # waiting for the leader's disk; an asker whose command is turned away repeats it
TOMBSTONES_MAX: Final = 4096  # deletions kept; a node that was away for longer than that can bring a key back
# A counter that is further ahead of all we know than this was not counted but made up; taking it in would bring every
# later counter near the end of its range. At one change a millisecond it takes a life of 50 days.
COUNTER_LEAP_MAX: Final = 2**32
KEEPERS_MAX: Final = 3  # nodes asked to confirm a write; one of them has to
ACKNOWLEDGEMENTS_MAX: Final = 64  # owed while a write is under way; whoever waits for one asks again


class PhaseLimits(Struct, frozen=True, kw_only=True):
    """How long a runner's process may go without progress, by phase. People set them by `COVEY_..._TIMEOUT_S`."""

    connect_ms: int = 30_000  # to start and listen; then to reach its neighbours, who start at the same time
    load_ms: int = 300_000  # a layer of a large model from a slow disk takes half a minute, packing all of them more
    warm_up_ms: int = 120_000  # one short prompt, which touches all weights for the first time
    step_ms: int = 300_000  # the 128 tokens of a long prompt's step, on a board that takes two seconds for each
    shut_down_ms: int = 6_000  # half of it for the end that it is asked for, half of it for SIGTERM; then it is killed


class MachineSettings(Struct, frozen=True, kw_only=True):
    """What one node's machine is told at its start."""

    # A killed node must be shown as away in under 3 s. From its last heartbeat on that takes `away_ms` and the time a
    # message is under way, so half a second is left for that. Heartbeats come five times as often, so that four lost
    # or late ones in a row are survived.
    heartbeat_ms: int = 500
    away_ms: int = 2_500
    # A node that swaps or roams between access points is silent for seconds and comes back: moving its work then would
    # only add load. But where a link to it broke too, its work is given to others as soon as it is away.
    lost_ms: int = 10_000
    forgotten_ms: int = 30_000
    sleep_ms: int = 3_000  # a longer pause between two inputs means that this machine slept

    # With no visible claim for this long the lowest visible id claims. Visibility has already taken `away_ms` to end.
    leaderless_ms: int = 1_000
    tidy_after_ms: int = 2_000  # a new leader hears the others' maps before it mends anything
    tidy_ms: int = 1_000

    intent_send_ms: int = 1_000  # a whole map goes to one node at most this often

    # A copy on a second disk takes some 10 ms at home. Whoever asked waits for it, though not for a disk that hangs.
    copy_wait_ms: int = 2_000
    copy_retry_ms: int = 500
    keep_back_off_ms: tuple[int, ...] = (1_000, 4_000, 16_000, 60_000)  # the last one for ever: disks get room again
    tombstones_max: int = TOMBSTONES_MAX

    report_spacing_ms: int = 200
    report_idle_ms: int = 10_000
    memory_step_bytes: int = 64 * 1024 * 1024  # a smaller change of free memory is not worth a report ...
    memory_step_fraction: int = 50  # ... nor one below this fraction (a 50th) of all memory

    command_timeout_ms: int = 10_000
    command_retry_ms: int = 500
    hardware_wait_ms: int = 3_000  # a leader places nothing while a node that it has seen for less has not reported

    fetch_back_off_ms: tuple[int, ...] = (1_000, 4_000, 16_000, 60_000)  # the last one for ever: a hub may come back
    # What came damaged costs all of its bytes again, and is mended at its source, if at all, in hours.
    damaged_back_off_ms: tuple[int, ...] = (60_000, 600_000, 3_600_000)  # the last one for ever
    runner_back_off_ms: tuple[int, ...] = (1_000, 4_000, 16_000)  # then the instance has failed
    memory_wait_ms: int = 60_000  # a runner may wait for so long for others' memory before its wish is placed elsewhere
    runner_spacing_ms: int = 1_000  # between two starts of one runner, for whatever reason
    runner_healthy_ms: int = 60_000  # a runner that was ready for so long has its budget of failures back ...
    runner_proven_ms: int = 4_000  # ... as has one that worked for so long, by its beats
    limits: PhaseLimits = PhaseLimits()

    life: str = ""  # drawn at random at every start
    listen_host: str = "127.0.0.1"  # the runners' data ports
    thread_count: int = 1
    engine: str = "onnx"
    engine_options: dict[str, str] = {}
    api_address: Address | None = None
    public_key: bytes = b""  # of this node's identity
