"""The way among an instance's runners: `Instance.stages` has those of each stage side by side, in order of rank."""

from covey.schema.cluster import Instance, Stage


def head(instance: Instance) -> Stage:
    """The runner that takes requests."""
    return instance.stages[0]


def stage_count(instance: Instance) -> int:
    """How many stages the pipeline has, however many runners share each."""
    return len(instance.stages) // instance.rank_count


def stage_index(instance: Instance, runner_index: int) -> int:
    """In which stage of the pipeline the runner at `runner_index` is."""
    return runner_index // instance.rank_count


def leaders(instance: Instance) -> tuple[Stage, ...]:
    """Rank 0 of each stage: those that are linked as a pipeline."""
    return instance.stages[:: instance.rank_count]


def ranks_of(instance: Instance, stage: int) -> range:
    """Where the runners of a stage of the pipeline stand in `Instance.stages`."""
    return range(stage * instance.rank_count, (stage + 1) * instance.rank_count)


def is_regular(instance: Instance) -> bool:
    """Whether it has runners, and each stage as many as it should."""
    return instance.rank_count >= 1 and len(instance.stages) % instance.rank_count == 0 and bool(instance.stages)
