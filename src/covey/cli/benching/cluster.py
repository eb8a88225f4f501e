"""The cluster as one of the servers that are measured: which model is meant, and what its runners hold."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from msgspec import Struct

from covey.cli.benching.asking import Server
from covey.cli.benching.figures import Case
from covey.cli.client import CliError, NodeClient, credentials
from covey.cli.naming import asked_for, instances_of, listed, local_path, named_instance
from covey.control.routing import instance_status
from covey.effects import paths
from covey.effects.addresses import is_local
from covey.effects.model_files import ModelFiles
from covey.schema.cluster import ClusterState, Hardware, Instance, InstancePhase

NAME: Final = "covey"


class Chosen(Struct, frozen=True):
    """The model that is measured: requests name it, and so may go to any of its instances that are ready."""

    instances: tuple[Instance, ...]

    @property
    def model_id(self) -> str:
        return self.instances[0].card.model_id

    @property
    def slot_count(self) -> int:
        return sum(instance.slot_count for instance in self.instances)

    @property
    def context_length(self) -> int:
        """Of the shortest."""
        return min(instance.context_length for instance in self.instances)

    def check(self, cases: Sequence[Case]) -> None:
        """Raises `CliError` for the first that no slot holds."""
        for case in cases:
            if case.prompt_tokens + case.new_tokens > self.context_length:
                raise CliError(
                    f"{case.prompt_tokens} tokens and {case.new_tokens} new ones do not fit into the context of "
                    f"{self.model_id}, which is {self.context_length}: ask for fewer, or place it with `covey place "
                    "--context N`."
                )


def chosen(state: ClusterState, name: str | None) -> Chosen:
    """The model that is ready, or the one that is named, as `covey stop` takes names. Raises `CliError`."""
    ready = [each for each in state.instances if instance_status(state, each).phase is InstancePhase.READY]
    if name is not None:
        meant = local_path(name)
        if not instances_of(asked_for(state), meant):
            meant = named_instance(asked_for(state), meant).card.model_id
        found = instances_of(ready, meant)
        if not found:
            raise CliError(f"{meant} is not ready: `covey ps` says why.")
        return Chosen(tuple(found))
    models = {each.card.model_id for each in ready}
    if not models:
        raise CliError("No model is ready, so there is nothing to measure: `covey place MODEL` places one.")
    if len(models) > 1:
        raise CliError(f"Several models are ready: name one of {listed(ready)}.")
    return Chosen(tuple(ready))


class ClusterSide:
    """Its runners wait for work without a processor, so it needs no more than not to be asked."""

    def __init__(self, node: NodeClient, model: Chosen) -> None:
        self._node = node
        self._model = model
        self.server = Server(NAME, node.url, model.model_id, credentials())

    def turn(self) -> AbstractContextManager[object]:
        return nullcontext()

    def memory_bytes(self) -> int:
        """As the nodes reported it last. Raises `CliError`."""
        ours = {stage.runner_id for instance in self._model.instances for stage in instance.stages}
        reports = [member.report for member in self._node.cluster().members if member.report]
        runners = [runner for report in reports for runner in report.runners if runner.runner_id in ours]
        return sum(runner.resident_bytes for runner in runners)


def hardware(state: ClusterState, model: Chosen) -> list[Hardware]:
    """The machines that serve the model, each once."""
    nodes = {stage.node_id for instance in model.instances for stage in instance.stages}
    known = [each.report.hardware for each in state.members if each.node_id in nodes and each.report]
    return list({each.machine_id: each for each in known if each}.values())


def file_here(state: ClusterState, model: Chosen, url: str) -> Path:
    """The model's file, for another server on the same machine. Raises `CliError` where that would not be fair."""
    if not is_local(urlsplit(url).hostname or "") or len(hardware(state, model)) > 1:
        raise CliError(
            f"--against compares two servers on one machine, and {model.model_id} is served elsewhere, too: place it "
            "on this machine alone, and name its node with --url 127.0.0.1:PORT."
        )
    path = ModelFiles(paths.models_folder()).path_of(model.instances[0].card.source)
    if not path.is_file():
        raise CliError(f"The file of {model.model_id} is not at {path}: set COVEY_HOME as the node has it.")
    return path
