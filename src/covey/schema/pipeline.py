"""The way among an instance's runners: `Instance.stages` has those of each stage side by side, in order of rank."""

from collections.abc import Iterable

from covey.schema.cluster import Instance, Stage
from covey.schema.ids import ModelId, NodeId
from covey.schema.model import ModelCard


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


def cards_at(instance: Instance, stage: Stage) -> tuple[ModelCard, ...]:
    """The models whose files the node of `stage` needs for it: the instance's, and at the head that of its draft."""
    draft = instance.draft if stage.runner_id == head(instance).runner_id else None
    return (instance.card, draft) if draft else (instance.card,)


def cards_placed(instances: Iterable[Instance]) -> list[ModelCard]:
    """The models of all these, and then their drafts."""
    placed = list(instances)
    return [*(each.card for each in placed), *(each.draft for each in placed if each.draft)]


def cards_needed(instances: Iterable[Instance], node_id: NodeId) -> dict[ModelId, ModelCard]:
    """Of all that is assigned to a node, by model; of one name the model itself rather than a draft."""
    own = [(each, stage) for each in instances for stage in each.stages if stage.node_id == node_id]
    models = {each.card.model_id: each.card for each, _ in own}
    drafts = {card.model_id: card for each, stage in own for card in cards_at(each, stage)[1:]}
    return models | {model_id: card for model_id, card in drafts.items() if model_id not in models}


def is_regular(instance: Instance) -> bool:
    """Whether it has runners, and each stage as many as it should."""
    return instance.rank_count >= 1 and len(instance.stages) % instance.rank_count == 0 and bool(instance.stages)
