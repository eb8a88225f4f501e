"""The other runners of a runner's instance: who they are to it, and what their nodes say of them."""

from msgspec import Struct

from covey.control.runner_table import WARMED_BY_ALL_STATES, Runner, has_given_up
from covey.control.settings import COUNTER_LEAP_MAX
from covey.schema.cluster import Instance, NodeReport, RunnerReport
from covey.schema.ids import NodeId
from covey.schema.pipeline import ranks_of, stage_count, stage_index
from covey.schema.runner import RunnerState


class Neighbour(Struct, frozen=True):
    """Another runner of the same instance, as its node last reported it."""

    boot: int
    report: RunnerReport


def index_of(runner: Runner) -> int:
    """Its place among the runners of its instance."""
    return runner.instance.stages.index(runner.stage)


def linked_runners(runner: Runner) -> tuple[range, range, range]:
    """Where those stand that it is linked to: the one before, the one after, and the ranks of its own stage."""
    instance = runner.instance
    stage, count = stage_index(instance, index_of(runner)), stage_count(instance)
    ranks = ranks_of(instance, stage)
    if runner.stage.rank:
        return range(0), range(0), ranks
    before, following = ranks_of(instance, (stage - 1) % count), ranks_of(instance, (stage + 1) % count)
    return before[:1], following[:1], ranks if len(ranks) > 1 else range(0)


def can_warm_up(runner: Runner, others: dict[int, Neighbour]) -> bool:
    """Whether it and all that compute together with it have loaded, in this generation."""
    if runner.state is not RunnerState.LOADED:
        return False
    instance, own = runner.instance, index_of(runner)
    ranks = [index for index in ranks_of(instance, stage_index(instance, own)) if index != own]
    reports = [others[index].report for index in ranks if index in others]
    loaded = [each for each in reports if each.attempt == runner.attempt and each.state in WARMED_BY_ALL_STATES]
    return len(loaded) == len(ranks)


def neighbours(runner: Runner, reports: dict[NodeId, NodeReport]) -> dict[int, Neighbour]:
    """The other runners of the instance that have been reported, by stage, but for those whose attempt is made up."""
    highest = runner.attempt + COUNTER_LEAP_MAX
    found: dict[int, Neighbour] = {}
    for index, stage in enumerate(runner.instance.stages):
        report = reports.get(stage.node_id)
        if stage == runner.stage or report is None:
            continue
        for each in report.runners:
            if each.runner_id == stage.runner_id and each.attempt <= highest:
                found[index] = Neighbour(report.boot, each)
    return found


def is_given_up(others: dict[int, Neighbour]) -> bool:
    """Whether another runner of the instance can't go on without memory or a person, so that none of them can."""
    reports = [other.report for other in others.values()]
    return any(each.waiting or has_given_up(each) for each in reports)


def has_failed(others: dict[int, Neighbour]) -> bool:
    """Whether another runner will open a new generation, or has given up."""
    return any(other.report.state is RunnerState.FAILED for other in others.values())


def is_alike(first: Instance, second: Instance) -> bool:
    """Whether what is loaded for one serves the other."""
    models = [(each.card, each.engine, each.exact, each.quantize, each.draft) for each in (first, second)]
    sizes = [(each.context_length, each.slot_count, each.kv_cache, each.rank_count) for each in (first, second)]
    return models[0] == models[1] and sizes[0] == sizes[1]


def open_generation(runner: Runner, others: dict[int, Neighbour]) -> int:
    """The attempt that a new process of `runner` begins with: the highest seen, unless it has used that one."""
    latest = max((other.report.attempt for other in others.values()), default=0)
    return max(runner.last_attempt + 1, runner.attempt, latest)
