"""What the listing commands show, as tables for people and as plain data for `--json`."""

from collections.abc import Sequence
from typing import Any, Final

from covey.cli.console import harmless, size
from covey.cli.listing import Listing
from covey.cli.naming import asked_for, id_of, short_ids, with_short_ids
from covey.control.routing import instance_status, wish_status
from covey.schema.cluster import ClusterState, Instance, Member, NodeReport, Visibility, Wish
from covey.schema.model import KvCacheType

Row = dict[str, Any]
DISK_BYTES_LEAST: Final = 64_000_000  # for what a node notes of its cluster, and its logs


def node_names(state: ClusterState) -> dict[str, str]:
    """What people call each node; its id until it has said its name."""
    return {m.node_id: m.report.name if m.report else m.node_id[:8] for m in state.members}


def instance_rows(state: ClusterState) -> list[Row]:
    """Also of wishes that wait for a place: these have no nodes, and their own id."""
    asked = {wish.wish_id: wish for wish in state.wishes}
    names = node_names(state)
    return [
        {
            "instance_id": id_of(each),
            "model_id": each.card.model_id,
            "status": _status(state, each),
            "context_length": each.context_length,
            "slots": each.slot_count,
            "exact": each.exact,
            "quantize": each.quantize,
            "draft": each.draft.model_id if each.draft else None,
            "kv_cache": each.kv_cache,
            "ranks": each.rank_count,
            "ranks_asked_for": asked[each.wish_id].rank_count if each.wish_id in asked else each.rank_count,
            "nodes_asked_for": _nodes_asked_for(asked.get(each.wish_id)),
            "nodes": stage_rows(each, names) if isinstance(each, Instance) else [],
        }
        for each in asked_for(state)
    ]


def _nodes_asked_for(wish: Wish | None) -> int:
    return max(wish.node_count_min, wish.rank_count) if wish else 1


def _status(state: ClusterState, asked: Instance | Wish) -> str:
    if isinstance(asked, Instance):
        return instance_status(state, asked).text
    return f"waiting: {wish_status(state, asked)}"


def stage_rows(instance: Instance, names: dict[str, str]) -> list[Row]:
    """Which node holds which layers (half open), as which of the ranks that share them, and the memory that placement
    counted.
    """
    return [
        {
            "name": names.get(stage.node_id, stage.node_id[:8]),
            "node_id": stage.node_id,
            "layers": [stage.shard.layer_start, stage.shard.layer_end],
            "rank": stage.rank if instance.rank_count > 1 else None,
            "memory_bytes": stage.memory_bytes,
        }
        for stage in instance.stages
    ]


def instances_table(rows: Sequence[Row]) -> Listing:
    """A line for each node of each instance; what all of an instance's lines would repeat stands in the first."""
    short = short_ids([row["instance_id"] for row in rows])
    drawn: list[tuple[str, ...]] = []
    for row in rows:
        head = (short[row["instance_id"]], _model_cell(row), _status_cell(row), str(row["context_length"]))
        for cells in [_layers_cells(node) for node in row["nodes"]] or [("", "", "")]:
            drawn.append((*head, *cells))
            head = ("",) * len(head)
    return Listing(
        titles=("instance", "model", "status", "context", "node", "layers", "memory"),
        rows=drawn,
        folded=("model", "status", "node"),
        spared=("memory", "layers", "context", "node"),
    )


def _model_cell(row: Row) -> str:
    ways = ["exact"] * row["exact"] + [row["quantize"]] * bool(row["quantize"])
    ways += [f"{row['ranks']} ranks"] * (row["ranks"] > 1) + [f"draft {row['draft']}"] * bool(row["draft"])
    ways += [f"KV cache {row['kv_cache']}"] * (row["kv_cache"] is not KvCacheType.F32)
    return f"{row['model_id']} ({', '.join(ways)})" if ways else row["model_id"]


def _status_cell(row: Row) -> str:
    """Without the log of what failed; and that it is placed on fewer nodes or ranks than somebody asked for, since no
    more are left.
    """
    status, count, asked = row["status"].partition("\n")[0], len(row["nodes"]), row["nodes_asked_for"]
    if count and count < asked:
        return f"{status} (on {count} of {asked} nodes asked for)"
    lacks_ranks = count and row["ranks"] < row["ranks_asked_for"]
    return f"{status} (with {row['ranks']} of {row['ranks_asked_for']} ranks asked for)" if lacks_ranks else status


def layers_table(rows: Sequence[Row]) -> Listing:
    drawn = [_layers_cells(node) for node in rows]
    return Listing(titles=("node", "layers", "memory"), rows=drawn, folded=("node",))


def _layers_cells(node: Row) -> tuple[str, str, str]:
    rank = "" if node["rank"] is None else f", rank {node['rank']}"
    return (node["name"], f"{node['layers'][0]}–{node['layers'][1] - 1}{rank}", size(node["memory_bytes"]))


def node_rows(state: ClusterState) -> list[Row]:
    return [_node_row(state, member) for member in state.members]


def _node_row(state: ClusterState, member: Member) -> Row:
    report = member.report
    hardware = report.hardware if report else None
    return {
        "name": report.name if report else None,
        "node_id": member.node_id,
        "visibility": member.visibility.value,
        "heard_ms_ago": member.heard_ms_ago,
        "leader": state.leader == member.node_id,
        "this_node": state.node_id == member.node_id,
        "processor": hardware.processor if hardware else None,
        "machine_id": hardware.machine_id if hardware else None,
        "cores": hardware.physical_cores if hardware else None,
        "memory_bytes_available": hardware.memory_bytes_available if hardware else None,
        "memory_bytes_total": hardware.memory_bytes_total if hardware else None,
        "os": f"{hardware.os_name} {hardware.os_version}" if hardware else None,
        "notices": list(report.notices) if report else [],
    }


def notices(state: ClusterState) -> list[str]:
    """What a person should know: of the network as this node sees it, then of each node, as it says itself."""
    reports = [each.report for each in state.members if each.report and each.visibility is Visibility.VISIBLE]
    said = [f"{report.name}: {harmless(sentence)}" for report in reports for sentence in report.notices]
    return [*state.notices, *said, *(sentence for report in reports for sentence in _full_disk(report))]


def _full_disk(report: NodeReport) -> list[str]:
    free = report.hardware.disk_bytes_available if report.hardware else DISK_BYTES_LEAST
    return [f"{report.name}: the disk of its models has {size(free)} left; free some space"] * (free < DISK_BYTES_LEAST)


def nodes_table(rows: Sequence[Row]) -> Listing:
    """The memory of a machine stands at one of its nodes, which is here if any is, and nowhere twice."""
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["visibility"] != "visible"):
        first.setdefault(row["machine_id"] or row["node_id"], row)
    cells = [_node_cells(row, first[row["machine_id"] or row["node_id"]]) for row in rows]
    return Listing(
        titles=("node", "id", "seen", "cores", "memory free", "role"),
        rows=cells,
        folded=("node", "seen", "memory free", "role"),
        spared=("memory free", "cores"),
    )


def _node_cells(row: Row, first: Row) -> tuple[str, ...]:
    seen = row["visibility"] if row["visibility"] == "visible" else f"away for {row['heard_ms_ago'] // 1000} s"
    roles = [word for word, holds in (("leader", row["leader"]), ("this node", row["this_node"])) if holds]
    machine = _machine_cells(row) if row is first else ("", f"shared with {first['name']}")
    return (row["name"] or "unknown", row["node_id"][:8], seen, *machine, ", ".join(roles))


def _machine_cells(row: Row) -> tuple[str, str]:
    known = row["memory_bytes_total"] is not None
    memory = f"{size(row['memory_bytes_available'])} of {size(row['memory_bytes_total'])}" if known else "unknown"
    return str(row["cores"] or "unknown"), memory


def models_table(models: Sequence[Row]) -> Listing:
    drawn = [
        (
            model["id"],
            size(model["file_bytes"]),
            model["quantization"],
            str(model["context_length"]),
            "yes" if model["downloaded"] else "no",
        )
        for model in models
    ]
    return Listing(
        titles=("model", "size", "quantization", "context", "on disk"),
        rows=drawn,
        folded=("model",),
        spared=("quantization", "context"),
    )


def tensors_table(kinds: Sequence[Row]) -> Listing:
    drawn = [
        (
            kind["name"],
            str(kind["count"]),
            kind["type"],
            " x ".join(map(str, kind["shape"])),
            size(kind["file_bytes"]),
            size(kind["held_bytes"]),
            kind["held_as"] if kind["error"] is None else f"{kind['held_as']}, off by {kind['error']:.2%}",
        )
        for kind in kinds
    ]
    return Listing(
        titles=("tensor", "count", "type", "shape", "in the file", "in memory", "held"),
        rows=drawn,
        folded=("tensor", "held"),
        spared=("count", "in the file", "shape"),
    )


def events_table(events: Sequence[Row]) -> Listing:
    drawn = [(event["at"].replace("T", " ")[:19], with_short_ids(event["text"])) for event in events]
    return Listing(titles=("when (UTC)", "what"), rows=drawn, folded=("what",))
