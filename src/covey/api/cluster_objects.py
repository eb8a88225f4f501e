"""The objects of exo's cluster API: model cards, shards, instances, runners, downloads. Pure.

Each is rendered in the `Case` that its route speaks; tagged objects are `{"ClassName": {...}}`.
"""

from typing import Any, Final

from covey.api.case import Case
from covey.checkpoints.ranks import Heads, rank_counts
from covey.schema.cluster import ClusterState, DownloadReport, DownloadState, Instance, RunnerReport, Stage
from covey.schema.ids import NodeId, RunnerId
from covey.schema.model import KvCacheType, ModelCard
from covey.schema.runner import RunnerState

MILLISECONDS = 1000


def runner_reports(state: ClusterState) -> dict[RunnerId, RunnerReport]:
    """What the nodes say of their runners."""
    reports = (member.report for member in state.members)
    return {runner.runner_id: runner for report in reports if report for runner in report.runners}


def memory(case: Case, byte_count: int) -> dict[str, int]:
    return case(in_bytes=byte_count)


def model_card(case: Case, card: ModelCard) -> dict[str, Any]:
    return case(
        model_id=card.model_id,
        storage_size=memory(case, card.file_bytes),
        n_layers=card.layer_count,
        hidden_size=card.hidden_size,
        supports_tensor=can_be_shared(card),
        num_key_value_heads=card.kv_head_count,
        tasks=["TextGeneration"],
        components=None,
        family=card.architecture,
        quantization=card.quantization,
        base_model=card.model_id,
        capabilities=["text"],
        backends=[],
        reasoning_dialect=None,
        context_length=card.context_length_max,
        uses_cfg=False,
        trust_remote_code=False,
        is_custom=False,
        vision=None,
        sampling_defaults=None,
    )


def can_be_shared(card: ModelCard) -> bool:
    """Whether several nodes can compute each of its layers together."""
    heads = Heads(card.attention_head_count, card.kv_head_count, card.head_size)
    return len(rank_counts(card.architecture, heads, card.feed_forward_size)) > 1


def shard(case: Case, instance: Instance, rank: int) -> dict[str, Any]:
    """The layers of the runner `rank`, half open: start <= layer < end. Of each it has all, or in a
    `TensorShardMetadata` a share.
    """
    layers = instance.stages[rank].shard
    kind = "TensorShardMetadata" if instance.rank_count > 1 else "PipelineShardMetadata"
    return {
        kind: case(
            model_card=model_card(case, instance.card),
            device_rank=rank,
            world_size=len(instance.stages),
            immediate_exception=False,
            should_timeout=None,
            start_layer=layers.layer_start,
            end_layer=layers.layer_end,
            n_layers=layers.layer_count,
        )
    }


def instance(case: Case, value: Instance, runners: dict[RunnerId, RunnerReport]) -> dict[str, Any]:
    """Every placement appears as `MlxRingInstance`, the name that exo's clients know for a pipeline. The draft is there
    only where there is one, and the type of the KV cache where it is not float32: exo's clients know no such fields.
    """
    addresses = [host(stage, runners) for stage in value.stages]
    draft = {"draft_model": value.draft.model_id} if value.draft else {}
    cache = {} if value.kv_cache is KvCacheType.F32 else {"kv_cache": value.kv_cache}
    return {
        "MlxRingInstance": case(
            instance_id=value.instance_id,
            shard_assignments=case(
                model_id=value.card.model_id,
                runner_to_shard={stage.runner_id: shard(case, value, rank) for rank, stage in enumerate(value.stages)},
                node_to_runner={stage.node_id: stage.runner_id for stage in value.stages},
            ),
            hosts_by_node={stage.node_id: addresses for stage in value.stages},
            ephemeral_port=addresses[0]["port"] if addresses else 0,
            **draft,
            **cache,
        )
    }


def host(stage: Stage, runners: dict[RunnerId, RunnerReport]) -> dict[str, Any]:
    """Where a stage listens; port 0 until it does."""
    report = runners.get(stage.runner_id)
    if report is None or report.data_address is None:
        return {"ip": "0.0.0.0", "port": 0}  # noqa: S104 - exo's own words for "not known"; nothing binds to it
    return {"ip": report.data_address.host, "port": report.data_address.port}


_KNOWN_TO_EXO: Final = {RunnerState.STUCK: RunnerState.SHUTTING_DOWN, RunnerState.PARTED: RunnerState.LOADED}


def runner(case: Case, report: RunnerReport) -> dict[str, Any]:
    state = _KNOWN_TO_EXO.get(report.state, report.state)
    match state:
        case RunnerState.LOADING:
            inside = case(layers_loaded=report.layers_loaded, total_layers=report.layers_total)
        case RunnerState.READY:
            inside = case(prefill_server_port=None)
        case RunnerState.FAILED:
            inside = case(error_message=report.reason, diagnostics=[])
        case _:
            inside = {}
    return {f"Runner{state}": inside}


def download(case: Case, node_id: NodeId, report: DownloadReport, shard_metadata: dict[str, Any]) -> dict[str, Any]:
    common = {"node_id": node_id, "shard_metadata": shard_metadata, "model_directory": ""}
    match report.state:
        case DownloadState.ONGOING:
            return {"DownloadOngoing": case(**common, download_progress=progress(case, report))}
        case DownloadState.COMPLETED:
            total = memory(case, report.bytes_total)
            return {"DownloadCompleted": case(**common, total=total, read_only=False)}
        case DownloadState.FAILED:
            return {"DownloadFailed": case(**common, error_message=report.reason)}


def progress(case: Case, report: DownloadReport) -> dict[str, Any]:
    left = report.bytes_total - report.bytes_done
    return case(
        total=memory(case, report.bytes_total),
        downloaded=memory(case, report.bytes_done),
        downloaded_this_session=memory(case, report.bytes_done),
        completed_files=0,
        total_files=1,
        speed=report.bytes_per_second,
        eta_ms=int(MILLISECONDS * left / report.bytes_per_second) if report.bytes_per_second > 0 else 0,
        files={},
    )
