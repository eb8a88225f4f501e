"""A head that says what a test wants, over a real socket, and remembers what it was told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from covey.engine.tls import server_context
from covey.schema.generation import (
    Admit,
    Alive,
    Cancel,
    Ended,
    FinishReason,
    HeadEvent,
    Prefilled,
    ProveAlive,
    ServeHello,
    Timings,
    TokenSampled,
)
from covey.schema.runner import Address
from covey.schema.wire import FrameBuffer, pack
from tests.credentials import credentials

TIMINGS = Timings(1.0, 20.0, 30.0)
_commands = msgspec.msgpack.Decoder(ServeHello | Admit | Cancel | Alive)


def answer(admit: Admit, token_ids: Sequence[int], cached_tokens: int = 0) -> list[HeadEvent]:
    """What a well-behaved head says: the prompt is read, the tokens, the end."""
    name, attempt, first = admit.request_id, admit.attempt, len(admit.token_ids)
    tokens = [TokenSampled(name, attempt, first + i, token_id) for i, token_id in enumerate(token_ids)]
    generated = first + len(token_ids) - admit.prompt_length
    end = Ended(name, attempt, FinishReason.STOP, generated + 1, TIMINGS)
    return [Prefilled(name, attempt, first, first, cached_tokens), *tokens, end]


@dataclass
class FakeHead:
    say: Callable[[Admit], list[HeadEvent]]
    port: int = 0
    number: int = 0  # which node it is
    connections: int = 0
    hellos: list[ServeHello] = field(default_factory=list)
    admits: list[Admit] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    proofs: int = 0  # that whoever asks is alive
    wants_proof_ms: int | None = None  # between two; None: it does not know of them yet, as older ones
    hang_up_after: int | None = None  # events of the first request, then the connection ends

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.port)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["FakeHead"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=server_context(credentials(self.number)))
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        frames = FrameBuffer()
        while data := await reader.read(4096):
            for body in frames.feed(data):
                self._hear(_commands.decode(body), writer)
        writer.close()

    def _hear(self, command: ServeHello | Admit | Cancel | Alive, writer: asyncio.StreamWriter) -> None:
        match command:
            case ServeHello():
                self.hellos.append(command)
                if self.wants_proof_ms is not None and command.can_prove_alive:
                    writer.write(pack(ProveAlive(self.wants_proof_ms)))
            case Alive():
                self.proofs += 1
            case Cancel():
                self.cancels.append(command)
            case Admit():
                self.admits.append(command)
                for event in self.say(command)[: self.hang_up_after]:
                    writer.write(pack(event))
                if self.hang_up_after is not None:
                    writer.close()
