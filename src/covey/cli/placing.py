"""From a model's name to an instance that answers, with a progress bar on the way."""

import time
from typing import Any, Final

from msgspec import Struct
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from covey.cli.client import CliError, NodeClient
from covey.cli.console import err, size
from covey.cli.naming import asked_for, instances_of, is_named, is_of, short_ids
from covey.control.activity import enumerated
from covey.control.cluster import options_asked_for, wish_of
from covey.control.placement.place import place
from covey.control.routing import instance_status, nodes_of, wish_status
from covey.schema.cluster import ClusterState, DownloadState, Instance, InstancePhase, PlaceModel, Refused, Wish
from covey.schema.ids import InstanceId, NodeId
from covey.schema.model import KvCacheType, ModelCard, Quantizing
from covey.schema.pipeline import cards_placed

ASSIGN_SECONDS_MAX: Final = 15.0  # an accepted instance reaches every node, and a lost one is replaced, well within


class Wanted(Struct, frozen=True, kw_only=True):
    """What was asked for beside the model; None leaves it to the placement."""

    node_count: int | None = None  # at least
    context_length: int | None = None
    slot_count: int | None = None
    exact: bool | None = None
    quantize: Quantizing | None = None
    rank_count: int | None = None  # nodes that share each layer
    node_ids: tuple[NodeId, ...] = ()  # the nodes that may serve it; empty: any
    draft: str | None = None  # the model that guesses what comes next, as a node knows it
    kv_cache: KvCacheType | None = None

    def body(self) -> dict[str, Any]:
        given = {
            "min_nodes": self.node_count,
            "context_length": self.context_length,
            "slot_count": self.slot_count,
            "exact": self.exact,
            "quantize": self.quantize,
            "rank_count": self.rank_count,
            "node_ids": self.node_ids or None,
            "draft_model": self.draft,
            "kv_cache": self.kv_cache,
        }
        return {key: value for key, value in given.items() if value is not None}

    def command(self, card: ModelCard, draft: ModelCard | None) -> PlaceModel:
        """As the node makes it of the body. `draft`: what it names."""
        return PlaceModel(
            card=card,
            node_count_min=self.node_count or 1,
            context_length=self.context_length,
            slot_count=self.slot_count,
            node_ids=self.node_ids,
            exact=bool(self.exact),
            quantize=self.quantize,
            rank_count=self.rank_count or 1,
            draft=draft,
            kv_cache=self.kv_cache or KvCacheType.F32,
        )

    def is_met_by(self, instance: Instance) -> bool:
        return not self.missed_by(instance)

    def missed_by(self, instance: Instance) -> list[str]:
        """In what the instance is otherwise than asked for: what it is, and what was asked for. What is more than that
        is no difference.
        """
        nodes, slots, context = len(instance.stages), instance.slot_count, instance.context_length
        quantize, ranks, cache = instance.quantize, instance.rank_count, instance.kv_cache
        draft = instance.draft.model_id if instance.draft else None
        differences = (
            (nodes < (self.node_count or 0), f"on {nodes} node{'s' * (nodes > 1)}, not {self.node_count}"),
            (context < (self.context_length or 0), f"with a context of {context} tokens, not {self.context_length}"),
            (slots < (self.slot_count or 0), f"with {slots} slot{'s' * (slots > 1)}, not {self.slot_count}"),
            (bool(self.exact) and not instance.exact, "without --exact"),
            (self.quantize not in {None, quantize}, _otherwise("quantize", quantize, self.quantize)),
            (self.rank_count not in {None, ranks}, _otherwise("tensor", ranks, self.rank_count)),
            (not self.has_draft_of(instance), _otherwise("draft", draft, self.draft)),
            (self.kv_cache not in {None, cache}, _otherwise("kv-cache", cache, self.kv_cache)),
        )
        return [text for is_missed, text in differences if is_missed]

    def has_draft_of(self, instance: Instance) -> bool:
        """Whether the instance guesses with the draft that was asked for, if one was."""
        return self.draft is None or (instance.draft is not None and is_named(instance.draft, self.draft))


class Ready(Struct, frozen=True):
    """An instance that answers. `is_new`: it was placed for this."""

    instance: Instance
    is_new: bool
    on_one_node_only: bool = False


def ensure_ready(node: NodeClient, model: str, wanted: Wanted | None = None) -> Ready:
    """An instance of the model that answers; placed if there is none, and anew where it has failed for good. Raises
    `CliError`.
    """
    wanted, state = wanted or Wanted(), node.cluster()
    there = _placed(state, model, wanted)
    waiting = next((each for each in asked_for(state) if isinstance(each, Wish) and is_of(each, model)), None)
    if there is None and waiting and wanted == Wanted():
        return Ready(wait_ready(node, waiting.wish_id), is_new=False)
    if there is None:
        return make_ready(node, model, wanted)
    if _has_failed(state, there):
        return _make_anew(node, state, there, wanted)
    if missed := wanted.missed_by(there):
        short_id = short_ids([each.instance_id for each in state.instances])[there.instance_id]
        raise CliError(
            f"{there.card.model_id} is placed already, but otherwise than asked for: {enumerated(missed)}. "
            f"`covey stop {short_id}` ends that; `covey place --another` makes a second one beside it."
        )
    return Ready(wait_ready(node, wish_of(there.instance_id)), is_new=False)


def make_ready(node: NodeClient, model: str, wanted: Wanted | None = None) -> Ready:
    """A new instance, also where there is one. Raises `CliError`."""
    wanted = wanted or Wanted()
    return _wait_as_wanted(node, node.place(model, **wanted.body()), wanted)


def _wait_as_wanted(node: NodeClient, answer: dict[str, Any], wanted: Wanted) -> Ready:
    """`answer`: of the node that placed it."""
    instance = wait_ready(node, wish_of(InstanceId(answer["instance_id"])))
    missed = "--exact" if wanted.exact and not instance.exact else ""
    if wanted.quantize not in {None, instance.quantize}:
        missed = f"--quantize {wanted.quantize}"
    if wanted.rank_count not in {None, _ranks_asked_for(node.cluster(), instance)}:
        missed = f"--tensor {wanted.rank_count}"
    if not wanted.has_draft_of(instance):
        missed = f"--draft {wanted.draft}"
    if wanted.kv_cache not in {None, instance.kv_cache}:
        missed = f"--kv-cache {wanted.kv_cache}"
    if missed:
        raise CliError(f"It is placed, but not as {missed}: the leader is an older version, which knows no such mode.")
    return Ready(instance, is_new=True, on_one_node_only=bool(answer["on_one_node_only"]))


def _ranks_asked_for(state: ClusterState, instance: Instance) -> int:
    """It may have fewer meanwhile, if nodes were lost."""
    return next((each.rank_count for each in state.wishes if each.wish_id == instance.wish_id), instance.rank_count)


def _placed(state: ClusterState, model: str, wanted: Wanted) -> Instance | None:
    """One that is as asked for and ready, if there is; else one that is as asked for and may become so."""

    def rank(instance: Instance) -> tuple[bool, bool, bool]:
        is_ready = instance_status(state, instance).phase is InstancePhase.READY
        return not wanted.is_met_by(instance), not is_ready, _has_failed(state, instance)

    return min(instances_of(state.instances, model), key=rank, default=None)


def _has_failed(state: ClusterState, instance: Instance) -> bool:
    return instance_status(state, instance).phase is InstancePhase.FAILED


def _make_anew(node: NodeClient, state: ClusterState, failed: Instance, wanted: Wanted) -> Ready:
    """In the place of one that failed; as that was asked for, unless something else is now. What it failed of may be
    mended since then, and else it fails again with its reason. It is removed only where another could follow.
    """
    name, asked = failed.card.model_id, _asked_before(state, failed) if wanted == Wanted() else wanted
    reason = instance_status(state, failed).text.partition("\n")[0].rstrip(".")
    if refused := _refusal(node, state, failed, asked):
        raise CliError(f"{name} {reason}. It is left as it is, since it can't be placed anew: {refused}")
    err.print(f"{name} {reason}. It is placed anew.", style="dim", soft_wrap=True, markup=False)
    node.delete(failed.instance_id)
    try:
        answer = node.place(name, **asked.body())
    except CliError as error:
        raise CliError(
            f"It was removed to make room for itself, and could not be placed then: {error} Nobody asks for it now: "
            f"`covey place {name}` does so again."
        ) from None
    return _wait_as_wanted(node, answer, asked)


def _asked_before(state: ClusterState, failed: Instance) -> Wanted:
    wish = next((each for each in state.wishes if each.wish_id == failed.wish_id), None)
    return Wanted(
        node_count=wish.node_count_min if wish else len(failed.stages),
        context_length=failed.context_length,
        slot_count=failed.slot_count,
        exact=failed.exact or None,
        quantize=failed.quantize,
        rank_count=_ranks_asked_for(state, failed),
        node_ids=wish.node_ids if wish else (),
        draft=failed.draft.model_id if failed.draft else None,
        kv_cache=None if failed.kv_cache is KvCacheType.F32 else failed.kv_cache,
    )


def _refusal(node: NodeClient, state: ClusterState, failed: Instance, asked: Wanted) -> str:
    """Why it could not be placed anew, as far as can be seen before what it holds is given back; else empty."""
    try:
        node.expect_known(failed.card.model_id, state.node_id)
        if asked.draft:
            node.expect_known(asked.draft, state.node_id)
    except CliError as error:
        return str(error)
    leaving = [each for each in state.instances if each.wish_id == failed.wish_id]
    draft = failed.draft if asked.draft and asked.has_draft_of(failed) else None  # of another one no card is here
    options = options_asked_for(asked.command(failed.card, draft), state.node_id)
    placement = place(failed.card, nodes_of(state, leaving), options)
    return placement.reason if isinstance(placement, Refused) else ""


def _otherwise(option: str, actual: object, asked: object) -> str:
    return f"without --{option} {asked}" if actual is None else f"with --{option} {actual}, not {asked}"


def summary(ready: Ready, short_id: str) -> str:
    """For a terminal, with markup."""
    already, more = ("", "") if ready.is_new else ("already ", "; `covey place --another` makes a second one")
    return f"{escape(ready.instance.card.model_id)} is {already}ready as [bold]{short_id}[/]{more}.\n"


def shorter_context(instance: Instance) -> str:
    """A sentence, if the instance takes less than its model could."""
    most = instance.card.context_length_max
    if instance.context_length >= most:
        return ""
    halves = "" if instance.kv_cache is KvCacheType.F16 else ", and `--kv-cache f16` takes half the memory for it"
    chooses = f"`covey place --context N` chooses{halves}"
    return f"Its context is {instance.context_length} of the model's {most} tokens: {chooses}."


def drafted(instance: Instance) -> str:
    """A sentence about its draft, if it has one."""
    if instance.draft is None:
        return ""
    node = instance.stages[0].node_name or "its first node"
    return f"Its draft {instance.draft.model_id} is on {node}, and counted there."


def wait_ready(node: NodeClient, wish_id: str) -> Instance:
    """Follows the wish of an instance until one answers: what its nodes can't hold is placed again under another id.

    Raises `CliError` if it fails, is removed, or finds no place.
    """
    bar = "[progress.description]{task.description}"
    columns = (TextColumn(bar), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("waiting", total=1, text="")
        seen_s, was_there = time.monotonic(), False
        for state in node.changes():
            instance = _instance_of(state, wish_id)
            if instance is None:
                _expect_a_place(state, wish_id, time.monotonic() - seen_s, was_there=was_there)
                continue
            seen_s, was_there = time.monotonic(), True
            status = instance_status(state, instance)
            if status.phase is InstancePhase.READY:
                return instance
            if status.phase is InstancePhase.FAILED:
                raise CliError(status.explanation)
            _show(progress, task, state, instance)
    raise CliError(f"The node at {node.url} ended while the model was being made ready.")


def _instance_of(state: ClusterState, wish_id: str) -> Instance | None:
    """One that is ready, if there is; else one that was assigned last."""
    found = [each for each in state.instances if wish_of(each.instance_id) == wish_id]
    ready = [each for each in found if instance_status(state, each).phase is InstancePhase.READY]
    return next(iter([*ready, *reversed(found)]), None)


def _expect_a_place(state: ClusterState, wish_id: str, missing_s: float, *, was_there: bool) -> None:
    """Raises `CliError` where the instance is gone for good, or for longer than it takes to assign another."""
    wish = next((each for each in state.wishes if each.wish_id == wish_id), None)
    if wish is None and (was_there or missing_s > ASSIGN_SECONDS_MAX):
        raise CliError("The instance was removed while it was being made ready.")
    if wish and missing_s > ASSIGN_SECONDS_MAX:
        raise CliError(
            f"{wish.card.model_id} finds no place: {wish_status(state, wish)} "
            "It is placed as soon as there is one; `covey ps` shows it."
        )


def _show(progress: Progress, task: TaskID, state: ClusterState, instance: Instance) -> None:
    reports = [member.report for member in state.members if member.report]
    downloads = [
        download
        for report in reports
        for download in report.downloads
        if download.model_id in {card.model_id for card in cards_placed([instance])}
        and download.state is DownloadState.ONGOING
        and (download.bytes_done or download.reason)  # else the file may well be there
    ]
    if downloads:
        slowest = min(downloads, key=lambda each: each.bytes_done)
        again = f", tries again after a failure ({slowest.reason})" if slowest.reason else ""
        text = f"{size(slowest.bytes_done)} of {size(slowest.bytes_total)}{again}"
        progress.update(
            task, description="downloading", completed=slowest.bytes_done, total=slowest.bytes_total, text=text
        )
        return
    runner_ids = {stage.runner_id for stage in instance.stages}
    runners = [runner for report in reports for runner in report.runners if runner.runner_id in runner_ids]
    loaded, total = sum(each.layers_loaded for each in runners) // instance.rank_count, instance.card.layer_count
    text = f"{loaded} of {total} layers" if loaded else instance_status(state, instance).text
    progress.update(task, description="loading", completed=loaded, total=total, text=text)
