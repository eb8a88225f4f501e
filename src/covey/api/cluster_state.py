"""exo's `GET /state`: one snapshot, in maps keyed by node, as its clients read it. Pure.

What exo keeps and we have no counterpart for is there and empty, so that a client's loop finds something to walk.
"""

from datetime import datetime, timedelta
from itertools import permutations
from typing import Any, cast

from covey.api import cluster_objects as objects
from covey.api.case import camel_case
from covey.api.errors import RequestError
from covey.schema.cluster import ClusterState, DownloadReport, DownloadState, Hardware, Member, NodeReport, Visibility
from covey.schema.ids import ModelId, NodeId
from covey.schema.model import ModelCard

EMPTY_MAPS = (
    "tasks",
    "nodeSystem",
    "nodeThunderbolt",
    "nodeThunderboltBridge",
    "nodeRdmaCtl",
    "nodeBackends",
    "instanceLinks",
    "prefillServerPorts",
    "customModelCards",
)

INDEX_DIGITS_MAX = 6  # no list here is longer, and a number of thousands of digits costs time to read


def render_state(state: ClusterState, cards: dict[ModelId, ModelCard], now: datetime) -> dict[str, Any]:
    """`cards`: the models that this node can name, for downloads that no instance asks for. `now` is in UTC."""
    runners = objects.runner_reports(state)
    reports = [member.report for member in state.members if member.report]
    rendered: dict[str, Any] = {
        "instances": {item.instance_id: objects.instance(camel_case, item, runners) for item in state.instances},
        "runners": {runner_id: objects.runner(camel_case, report) for runner_id, report in runners.items()},
        "downloads": {report.node_id: render_downloads(state, report, cards) for report in reports},
        "lastSeen": {member.node_id: last_seen(member, now) for member in state.members},
        "topology": render_topology(state),
        "lastEventAppliedIdx": state.revision,
        "nodeIdentities": {report.node_id: render_identity(report) for report in reports},
        "thunderboltBridgeCycles": [],
    }
    rendered.update(render_hardware({report.node_id: report.hardware for report in reports if report.hardware}))
    return rendered | {name: {} for name in EMPTY_MAPS}


def last_seen(member: Member, now: datetime) -> str:
    when = now - timedelta(milliseconds=member.heard_ms_ago)
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ---- downloads ----


def render_downloads(state: ClusterState, report: NodeReport, cards: dict[ModelId, ModelCard]) -> list[dict[str, Any]]:
    """The node's downloads and the models that lie complete on its disk."""
    shards = shards_on(state, report.node_id, cards)
    reported = {download.model_id for download in report.downloads}
    on_disk = [
        DownloadReport(
            model_id=model_id,
            state=DownloadState.COMPLETED,
            bytes_done=cards[model_id].file_bytes,
            bytes_total=cards[model_id].file_bytes,
        )
        for model_id in report.models_on_disk
        if model_id in cards and model_id not in reported
    ]
    return [
        objects.download(camel_case, report.node_id, download, shards[download.model_id])
        for download in (*report.downloads, *on_disk)
        if download.model_id in shards  # an instance was deleted and its last report still stands, for a moment
    ]


def shards_on(state: ClusterState, node_id: NodeId, cards: dict[ModelId, ModelCard]) -> dict[ModelId, dict[str, Any]]:
    """For each model the shard that `node_id` holds of it; the whole model where no instance says otherwise."""
    drafts = {item.draft.model_id: whole(item.draft) for item in state.instances if item.draft}
    shards = drafts | {model_id: whole(card) for model_id, card in cards.items()}
    for item in state.instances:
        for rank, stage in enumerate(item.stages):
            if stage.node_id == node_id:
                shards[item.card.model_id] = objects.shard(camel_case, item, rank)
    return shards


def whole(card: ModelCard) -> dict[str, Any]:
    return {
        "PipelineShardMetadata": camel_case(
            model_card=objects.model_card(camel_case, card),
            device_rank=0,
            world_size=1,
            immediate_exception=False,
            should_timeout=None,
            start_layer=0,
            end_layer=card.layer_count,
            n_layers=card.layer_count,
        )
    }


# ---- nodes ----


def render_topology(state: ClusterState) -> dict[str, Any]:
    """Who can reach whom, as this node sees it: nodes that are visible reach one another at their API addresses."""
    sinks = {
        member.node_id: member.report.api_address
        for member in state.members
        if member.visibility is Visibility.VISIBLE and member.report and member.report.api_address
    }
    connections: dict[str, dict[str, Any]] = {}
    for source, sink in permutations(sinks, 2):
        address = sinks[sink]
        connections.setdefault(source, {})[sink] = [{"sinkMultiaddr": multiaddress(address.host, address.port)}]
    return {"nodes": [member.node_id for member in state.members], "connections": connections}


def multiaddress(host: str, port: int) -> dict[str, Any]:
    kind = "ip6" if ":" in host else "ip4"
    return {"address": f"/{kind}/{host}/tcp/{port}", "address_type": kind, "ip_address": host, "port": port}


def render_identity(report: NodeReport) -> dict[str, str]:
    hardware = report.hardware
    return {
        "modelId": hardware.machine_model if hardware else "",
        "chipId": hardware.processor if hardware else "",
        "friendlyName": report.name,
        "osVersion": f"{hardware.os_name} {hardware.os_version}" if hardware else "",
        "osBuildVersion": "",
    }


def render_hardware(nodes: dict[NodeId, Hardware]) -> dict[str, Any]:
    return {
        "nodeMemory": {node_id: render_memory(hardware) for node_id, hardware in nodes.items()},
        "nodeDisk": {node_id: render_disk(hardware) for node_id, hardware in nodes.items()},
        "nodeNetwork": {node_id: {"interfaces": render_interfaces(item)} for node_id, item in nodes.items()},
    }


def render_memory(hardware: Hardware) -> dict[str, Any]:
    return camel_case(
        ram_total=objects.memory(camel_case, hardware.memory_bytes_total),
        ram_available=objects.memory(camel_case, hardware.memory_bytes_available),
        swap_total=objects.memory(camel_case, hardware.swap_bytes_total),
        swap_available=objects.memory(camel_case, hardware.swap_bytes_available),
    )


def render_disk(hardware: Hardware) -> dict[str, Any]:
    return camel_case(
        total=objects.memory(camel_case, hardware.disk_bytes_total),
        available=objects.memory(camel_case, hardware.disk_bytes_available),
    )


def render_interfaces(hardware: Hardware) -> list[dict[str, str]]:
    return [{"name": name, "ipAddress": address, "interfaceType": "unknown"} for name, address in hardware.interfaces]


# ---- a part of it ----


def part_of(rendered: Any, path: str) -> Any:
    """The value at "a/b/0": keys of maps and indices of lists. Raises `RequestError` 404."""
    value = rendered
    steps = [step for step in path.split("/") if step]
    for step in steps:
        found = next_value(value, step)
        if not found:
            raise RequestError(f"unable to find path '{'.'.join(steps)}' in state json", status=404)
        value = found[0]
    return value


def next_value(value: Any, step: str) -> list[Any]:
    """One value, or none."""
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        return [mapping[step]] if step in mapping else []
    if isinstance(value, list) and step.isdecimal() and len(step) <= INDEX_DIGITS_MAX:
        return cast("list[Any]", value)[int(step) : int(step) + 1]
    return []
