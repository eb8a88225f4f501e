"""From a model's name to an instance that answers, with a progress bar on the way."""

import time
from typing import Final

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from covey.cli.client import CliError, NodeClient
from covey.cli.console import err, size
from covey.cli.naming import instances_of
from covey.control.routing import instance_status
from covey.schema.cluster import ClusterState, DownloadState, Instance, InstancePhase

APPEAR_SECONDS_MAX: Final = 15.0  # an accepted instance reaches every node well within this


def ensure_ready(node: NodeClient, model: str, node_count: int | None = None) -> Instance:
    """An instance of the model that answers; placed if there is none. Raises `CliError`."""
    state = node.cluster()
    if node_count is None:
        placed = instances_of(state.instances, model)
        ready = [each for each in placed if instance_status(state, each).phase is InstancePhase.READY]
        if ready:
            return ready[0]
        if placed:
            return wait_ready(node, placed[0].instance_id)
    options = {} if node_count is None else {"min_nodes": node_count}
    return wait_ready(node, str(node.place(model, **options)["instance_id"]))


def wait_ready(node: NodeClient, instance_id: str) -> Instance:
    """Follows the instance until it answers. Raises `CliError` if it fails or is removed."""
    bar = "[progress.description]{task.description}"
    columns = (TextColumn(bar), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("waiting", total=1, text="")
        started, was_there = time.monotonic(), False
        for state in node.changes():
            instance = next((each for each in state.instances if each.instance_id == instance_id), None)
            if instance is None:
                if was_there or time.monotonic() - started > APPEAR_SECONDS_MAX:
                    raise CliError(f"The instance {instance_id} was removed while it was being made ready.")
                continue
            was_there = True
            status = instance_status(state, instance)
            if status.phase is InstancePhase.READY:
                return instance
            if status.phase is InstancePhase.FAILED:
                raise CliError(status.explanation)
            _show(progress, task, state, instance)
    raise CliError(f"The node at {node.url} ended while {instance_id} was being made ready.")


def _show(progress: Progress, task: TaskID, state: ClusterState, instance: Instance) -> None:
    reports = [member.report for member in state.members if member.report]
    downloads = [
        download
        for report in reports
        for download in report.downloads
        if download.model_id == instance.card.model_id and download.state is DownloadState.ONGOING
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
    loaded, total = sum(runner.layers_loaded for runner in runners), instance.card.layer_count
    text = f"{loaded} of {total} layers" if loaded else instance_status(state, instance).text
    progress.update(task, description="loading", completed=loaded, total=total, text=text)
