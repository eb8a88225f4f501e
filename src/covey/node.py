"""Introduces the rooms to one another: builds what touches the world, gives it a control machine, runs both.

One task group holds all that a node does. A signal makes it leave: runners end first, then the API, then the mesh.
"""

import math
import os
import platform
import secrets
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct, structs

from covey.api.backend import ListedModel
from covey.api.errors import RequestError, sentence
from covey.api.guard import Access
from covey.api.server import create_guarded_app
from covey.checkpoints.checkpoint import Checkpoint
from covey.control import routing
from covey.control.activity import Activity
from covey.control.machine import Machine
from covey.control.previewing import preview
from covey.control.settings import MachineSettings, PhaseLimits
from covey.effects import addresses, clock, identity, leftovers, mesh, paths, processes, store
from covey.effects.code_file import CodeFileError
from covey.effects.driver import Driver
from covey.effects.endpoints import API_PORT_DEFAULT, mesh_port
from covey.effects.fetching import FetchError
from covey.effects.http_server import HttpServer, ListenError, listen, log_requests, port_of
from covey.effects.identity import Identity, IdentityError
from covey.effects.mailbox import Mailbox
from covey.effects.membership import Membership, cluster_folder, keep_successor, membership_of
from covey.effects.mesh_setup import MeshError, MeshSettings
from covey.effects.model_files import ModelFiles, ModelNotFoundError
from covey.effects.probe import Probe, loopback_interface
from covey.effects.rotation import Rotation, RotationError
from covey.effects.standard_input import wait_input_closed
from covey.effects.store import Store, StoreError
from covey.effects.time_limits import TimeLimitError, leave_s_max, time_limits
from covey.effects.watching import ModelWatch, watch_activity, watch_hardware
from covey.schema.activity import ActivityEvent, ActivityPage
from covey.schema.cluster import (
    ApiKey,
    ClusterState,
    CodeSealed,
    CodeTaken,
    Command,
    CommandResult,
    Hardware,
    Instance,
    InstanceStatus,
    PlaceModel,
    Refused,
)
from covey.schema.generation import GenerationEvent, GenerationRequest
from covey.schema.ids import NodeId
from covey.schema.machine import MessageReceived, NetworkNoticed
from covey.schema.model import ModelCard
from covey.schema.pipeline import cards_placed
from covey.schema.runner import EVERYWHERE, Address
from covey.schema.trust import Credentials, RotationOutcome
from covey.serving.model_text import ModelTexts
from covey.serving.refusal import RefusedError
from covey.serving.serving import Serving

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
EXIT_INTERRUPTED: Final = 130  # as shells count: 128 and the number of SIGINT


class NodeOptions(Struct, frozen=True, kw_only=True):
    """What a person may choose about a node."""

    host: str = "127.0.0.1"
    port: int = API_PORT_DEFAULT  # 0: any
    data_dir: Path | None = None
    name: str | None = None  # None: the machine's
    peers: tuple[str, ...] = ()
    cluster: str | None = None  # tells apart clusters of one join code; None: COVEY_CLUSTER
    interfaces: tuple[str, ...] = ()  # names or addresses where other nodes are met; empty: all private ones
    anyone_joins: bool = False
    engine: str = "onnx"
    engine_options: dict[str, str] = {}
    until_stdin_closes: bool = False
    allowed_hosts: tuple[str, ...] = ()  # names by which clients call this node, beside its host's own
    allowed_origins: tuple[str, ...] = ()  # web pages that may use the API
    is_open: bool = False  # no API key is asked of other machines
    asks_everybody: bool = False  # an API key is asked on this machine, too
    logs_requests: bool = False  # one line each, to standard error
    limits: PhaseLimits | None = None  # of its runners; None: as the environment says


class NodeReady(Struct, frozen=True, kw_only=True):
    """A node that listens."""

    node_id: NodeId
    name: str
    url: str  # as this machine opens it
    network_urls: tuple[str, ...]  # as other machines do; none if only this one can
    data_folder: Path
    models_folder: Path


Tell = Callable[[ActivityEvent], None]


def _ignore(_: ActivityEvent) -> None:
    """`GET /events` has it all the same."""


def run_node(options: NodeOptions, announce: Callable[[NodeReady], None], tell: Tell = _ignore) -> int:
    """Runs a node until SIGINT, SIGTERM, or the end of its input if that is wanted.

    Returns the exit status, after a sentence where the node can't start.

    `announce` is called once, when clients can connect; `tell` with each thing that happens in the cluster.
    """
    try:
        options = structs.replace(options, limits=options.limits or time_limits(os.environ))
        with ExitStack() as held:
            folder = paths.node_folder(options.data_dir)
            if not os.access(folder, os.F_OK):
                listen(options.host, options.port).close()  # else a start that is refused would leave an identity
            mine = held.enter_context(identity.claimed(folder))
            leftovers.end_leftovers(folder)
            listener = held.enter_context(listen(options.host, options.port))
            _warn_of_strangers(options)
            if options.logs_requests:
                log_requests()
            reason = _lives(options, folder, mine, listener, announce, tell)
    except (CodeFileError, IdentityError, ListenError, MeshError, StoreError, TimeLimitError) as error:
        sys.stderr.write(f"covey: {error}\n")
        return EXIT_REFUSED
    except KeyboardInterrupt:  # before there was anything to end in order
        return EXIT_INTERRUPTED
    if reason:
        sys.stderr.write(f"covey: {reason}\n")
        return EXIT_REFUSED
    return EXIT_OK


def _warn_of_strangers(options: NodeOptions) -> None:
    if addresses.is_local(options.host):
        return
    if options.is_open:
        reached = "this machine over a network" if addresses.is_wildcard(options.host) else options.host
        sentence = f"whoever can reach {reached} can use this node and stop its models: --no-auth asks for no key"
    else:
        sentence = "other machines need an API key: `covey keys add NAME` on this one makes it, and shows it once"
    sys.stderr.write(f"covey: {sentence}\n")


def _access(options: NodeOptions) -> Access:
    own = platform.node().lower()
    short = own.partition(".")[0]
    names = {own, short, f"{short}.local", options.host.lower(), *map(str.lower, options.allowed_hosts)}
    return Access(
        host_names=frozenset(names - {"", ".local"}),
        origins=frozenset(origin.lower().rstrip("/") for origin in options.allowed_origins),
        is_open=options.is_open,
        asks_everybody=options.asks_everybody,
    )


def _lives(
    options: NodeOptions,
    folder: Path,
    mine: Identity,
    listener: socket.socket,
    announce: Callable[[NodeReady], None],
    tell: Tell,
) -> str:
    """One after the other: a new join code begins a new life. Returns why the last one ended, if nobody asked."""
    while True:
        member = membership_of(mine, options.cluster, is_open=options.anyone_joins)
        with store.opened(cluster_folder(folder, member, version("covey")), version("covey")) as intent:
            reason = anyio.run(_run, options, folder, mine, member, intent, listener, announce, tell)
        if reason is not None:
            return reason
        mine = identity.renewed(folder, mine)


async def _run(
    options: NodeOptions,
    folder: Path,
    mine: Identity,
    member: Membership,
    intent: Store,
    listener: socket.socket,
    announce: Callable[[NodeReady], None],
    tell: Tell,
) -> str | None:
    """One life. Returns why the node ended, if nobody asked it to; None if another life is to follow."""
    settings = MeshSettings(
        port=mesh_port(port_of(listener)),
        peers=options.peers,
        credentials=member.credentials,
        interfaces=options.interfaces,
    )
    with closing(Mailbox()) as mailbox:
        rotation = Rotation(mine, member.code, partial(keep_successor, member.code))
        opened = mesh.opened(mine.node_id, settings, _receiver(rotation, mailbox), _noticer(mailbox))
        rotation.send = opened.send_to
        node = Node(options, folder, mine, member.credentials, rotation, intent, opened, mailbox, listener)
        return await node.run(announce, tell)


def _receiver(rotation: Rotation, mailbox: Mailbox) -> Callable[[MessageReceived], None]:
    """What takes messages from the mesh."""

    def receive(news: MessageReceived) -> None:
        if isinstance(news.message, CodeSealed | CodeTaken):
            rotation.hear(news.message)
        else:
            mailbox.offer(news)

    return receive


def _noticer(mailbox: Mailbox) -> Callable[[tuple[str, ...]], None]:
    def notice(notices: tuple[str, ...]) -> None:
        mailbox.offer(NetworkNoticed(notices))

    return notice


class Node:
    """One node, put together. To the API it is a `Backend`."""

    def __init__(
        self,
        options: NodeOptions,
        folder: Path,
        mine: Identity,
        credentials: Credentials,
        rotation: Rotation,
        intent: Store,
        opened: mesh.Mesh,
        mailbox: Mailbox,
        listener: socket.socket,
    ) -> None:
        self.node_id = mine.node_id
        self._folder = folder
        self._engine = options.engine
        self._until_stdin_closes = options.until_stdin_closes
        self._limits = options.limits or PhaseLimits()
        self._mailbox = mailbox
        self._mesh = opened
        self._name = options.name or platform.node().partition(".")[0] or "node"
        self._files = ModelFiles(paths.models_folder())
        self._models = ModelWatch(self._files, lambda: cards_placed(self.state().instances))
        self._probe = Probe(paths.models_folder())
        self._host, self._port = options.host, port_of(listener)
        hardware = self._probe.hardware()
        self._network_hosts = addresses.network_hosts(self._host, hardware, addresses.routed_hosts())
        self._public_key = mine.key.public_key().public_bytes_raw()
        settings = self._settings(options, hardware)
        self._anyone_joins = options.anyone_joins
        self._credentials = credentials
        self._rotation = rotation
        self._driver = Driver(
            Machine(mine.node_id, mine.boot, self._name, version("covey"), settings),
            mailbox,
            opened,
            self._files,
            intent,
            clock=clock.now_ms,
            command_prefix=f"{mine.node_id[:8]}-{mine.boot}",
        )
        self._serving = Serving(self.state, self.wait_changed, ModelTexts(self._text_source), credentials)
        self._activity = Activity()
        application = create_guarded_app(self, _access(options))
        self._server = HttpServer(application, listener.dup())  # which it closes; the next life needs one
        self._server_ended = anyio.Event()
        self._begins_anew = False

    def _settings(self, options: NodeOptions, hardware: Hardware) -> MachineSettings:
        hosts = [*self._network_hosts, addresses.local_host(self._host)]
        return MachineSettings(
            thread_count=hardware.physical_cores,
            engine=options.engine,
            engine_options=options.engine_options,
            life=secrets.token_hex(8),
            api_address=Address(hosts[0], self._port),
            listen_host=_data_host(options.interfaces),
            public_key=self._public_key,
            limits=self._limits,
        )

    # ---- its life ----

    async def run(self, announce: Callable[[NodeReady], None], tell: Tell) -> str | None:
        """Until a signal asks it to leave and all has ended, or has been ended. Returns why, if nobody asked; None if
        it is to begin anew, with another join code.
        """
        reason = ""
        await self._models.look()  # so that the first client is not told of an empty list
        async with self._serving, anyio.create_task_group() as tasks:
            tasks.start_soon(self._leave_on_signal, tasks.cancel_scope)
            if self._until_stdin_closes:
                tasks.start_soon(self._leave_with_input, tasks.cancel_scope)
            tasks.start_soon(self._mesh.run)
            tasks.start_soon(self._models.run, self._mailbox)
            tasks.start_soon(watch_activity, self._driver, self._activity, tell)
            tasks.start_soon(self._serving.read_ahead)
            tasks.start_soon(self._serve)
            tasks.start_soon(self._leave_for_new_code, tasks.cancel_scope)
            announce(self._ready())
            reason = await self._driver.run(self._open_runners)
            self._serving.leave()  # it may have ended by itself
            self._server.stop()
            await self._server_ended.wait()
            tasks.cancel_scope.cancel()
        return None if self._begins_anew else reason

    def _open_runners(self, tasks: TaskGroup) -> processes.Processes:
        runners = processes.Processes(tasks, self._mailbox.put, self._folder, self._credentials)
        tasks.start_soon(watch_hardware, self._probe, self._mailbox, runners)
        return runners

    async def _serve(self) -> None:
        await self._server.serve()
        self._server_ended.set()

    async def _leave_on_signal(self, life: anyio.CancelScope) -> None:
        """The first signal asks, within a bound; a second one ends everything now, though still in order."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            was_asked = False  # by a signal: the end of the input asks, too, and a signal may well come with it
            async for _ in signals:
                if was_asked:
                    life.cancel()
                was_asked = True
                await self._leave(life)

    async def _leave_with_input(self, life: anyio.CancelScope) -> None:
        await wait_input_closed()
        await self._leave(life)

    async def _leave(self, life: anyio.CancelScope, *, begins_anew: bool = False) -> None:
        self._begins_anew = begins_anew
        life.deadline = min(life.deadline, anyio.current_time() + leave_s_max(self._limits))
        self._serving.leave()
        await self._driver.leave()

    async def _leave_for_new_code(self, life: anyio.CancelScope) -> None:
        await self._rotation.wait_taken()
        if life.deadline == math.inf:  # else a signal came first
            await self._leave(life, begins_anew=True)

    def _ready(self) -> NodeReady:
        return NodeReady(
            node_id=self.node_id,
            name=self._name,
            url=addresses.http_url(addresses.local_host(self._host), self._port),
            network_urls=tuple(addresses.http_url(host, self._port) for host in self._network_hosts),
            data_folder=self._folder,
            models_folder=paths.models_folder(),
        )

    # ---- what the API asks ----

    def state(self) -> ClusterState:
        return self._driver.state()

    def instance_status(self, instance: Instance) -> InstanceStatus:
        return routing.instance_status(self.state(), instance)

    async def wait_changed(self, revision: int, timeout_s: float) -> None:
        await self._driver.wait_changed(revision, timeout_s)

    async def resolve_model(self, name: str) -> ModelCard:
        try:
            return await self._files.resolve(name)
        except ModelNotFoundError as error:
            raise RequestError(sentence(str(error)), status=error.status) from None

    def models(self) -> Sequence[ListedModel]:
        return [ListedModel(card, self._models.is_on_disk(card)) for card in self._models.cards()]

    def keys(self) -> Sequence[ApiKey]:
        return self._driver.keys()

    def activity(self, after: int, limit: int) -> ActivityPage:
        return self._activity.page(after, limit)

    def preview(self, command: PlaceModel) -> Instance | Refused:
        return preview(self.state(), command, self._engine)

    async def submit(self, command: Command) -> CommandResult:
        result = await self._driver.submit(command)
        self._activity.hear(clock.unix_ms(), command, result.outcome)
        return result

    async def rotate_code(self, proof: str, without: Sequence[NodeId]) -> RotationOutcome:
        if self._anyone_joins:
            raise RequestError(
                "An open cluster has no join code to change. Start its nodes without --open.", status=409
            )
        if not self._rotation.is_proof(proof):
            raise RequestError("Only who holds the join code may change it: run the command as its user.", status=403)
        names = tuple(sorted(key.name for key in self.keys()))
        try:
            outcome = await self._rotation.rotate(self.state().members, without)
        except CodeFileError as error:
            raise RequestError(f"The new join code is not in use: {error}.", status=500) from None
        except RotationError as error:
            raise RequestError(sentence(str(error)), status=409) from None
        return structs.replace(outcome, keys_revoked=names) if without else structs.replace(outcome, keys_valid=names)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        return self._serving.generate(request)

    async def _text_source(self, card: ModelCard) -> Path | Checkpoint:
        """On disk already, unless this node holds no part of the instance."""
        try:
            return await self._files.text_source(card)
        except FetchError as error:
            raise RefusedError(f"{error}.", HTTPStatus.SERVICE_UNAVAILABLE) from None


def _data_host(interfaces: Sequence[str]) -> str:
    """Where runners listen for the other nodes' runners: everywhere, unless no other machine is to be met."""
    is_local = interfaces and all(addresses.is_local(each) or each == loopback_interface() for each in interfaces)
    return "127.0.0.1" if is_local else EVERYWHERE
