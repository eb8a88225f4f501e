"""What can go wrong in a world. Each seed first draws which faults exist: rare combinations hide bugs."""

from random import Random

from msgspec import Struct

from covey.control.settings import TOMBSTONES_MAX


class Faults(Struct, frozen=True, kw_only=True):
    """The defaults are a world in which nothing goes wrong."""

    loss_percent: int = 0  # of messages
    duplicate_percent: int = 0
    delay_ms_max: int = 5
    reorders: bool = False
    late_percent: int = 0  # of messages that take longer than a node may be silent
    partitions: bool = False
    one_way_cuts: bool = False
    crashes: bool = False
    leaves: bool = False
    sleeps: bool = False
    clocks_stop: bool = False  # of those that sleep
    clocks_drift: bool = False
    acknowledgement_loss_percent: int = 0  # beside the loss of messages of any kind
    late_joins: bool = False
    fetch_failure_percent: int = 0
    fetch_ms_max: int = 500
    start_failure_percent: int = 0  # of runner processes that can't be started
    phase_failure_percent: int = 0  # of the phases of a runner's life
    hangs: bool = False  # failed runners wait to be stopped, and some end only long after they were killed
    stall_permille: int = 0  # of all that a process does: it is its last, and the process goes on living
    echo_percent: int = 0  # of the ends of fetches and processes that are told again, later
    link_loss_goes_unnoticed: bool = False
    disk_ms_max: int = 5
    full_disks: bool = False
    lost_disks: bool = False
    power_cuts: bool = False
    tombstones_max: int = TOMBSTONES_MAX
    load_ms_max: int = 400  # for a quarter of a runner's layers
    caches_fill: bool = False  # of runners that have loaded; else they take all of their memory at once
    scarce_memory: bool = False
    greedy_programs: bool = False  # others than ours take memory for a while
    shared_machines: bool = False
    models_rest: bool = False  # for so long that they are spread over more nodes


NONE = Faults()


def draw(random: Random) -> Faults:
    """Each fault exists in about a third of the worlds."""

    def exists() -> bool:
        return random.random() < 0.35

    def amount(low: int, high: int, otherwise: int = 0) -> int:
        return random.randint(low, high) if exists() else otherwise

    return Faults(
        loss_percent=amount(1, 30),
        duplicate_percent=amount(1, 30),
        delay_ms_max=amount(50, 1_500, NONE.delay_ms_max),
        reorders=exists(),
        partitions=exists(),
        one_way_cuts=exists(),
        crashes=exists(),
        leaves=exists(),
        sleeps=exists(),
        clocks_stop=exists(),
        clocks_drift=exists(),
        acknowledgement_loss_percent=amount(30, 100),
        late_joins=exists(),
        fetch_failure_percent=amount(10, 60),
        fetch_ms_max=amount(1_000, 10_000, NONE.fetch_ms_max),
        start_failure_percent=amount(5, 30) if exists() else amount(50, 95),
        phase_failure_percent=amount(2, 15) if exists() else amount(5, 70),
        hangs=exists(),
        echo_percent=amount(5, 50),
        link_loss_goes_unnoticed=exists(),
        disk_ms_max=amount(50, 4_000, NONE.disk_ms_max),
        full_disks=exists(),
        lost_disks=exists(),
        power_cuts=exists(),
        tombstones_max=amount(3, 8, NONE.tombstones_max),
        scarce_memory=exists(),
        shared_machines=exists(),
        greedy_programs=exists(),
        load_ms_max=amount(1_000, 4_000, NONE.load_ms_max),
        caches_fill=exists(),
        stall_permille=amount(5, 60),
        late_percent=amount(1, 10),
        models_rest=exists(),
    )
