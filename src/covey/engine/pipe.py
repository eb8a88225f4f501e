"""The runner's line to its node: commands on standard input, messages on standard output.

A library that prints would corrupt the line, so the runner keeps both for itself: what anybody else reads from
standard input is empty, and what it prints goes to standard error.
"""

import os
import signal
import sys
import threading
from typing import Final, NoReturn

import msgspec

from covey.engine.mailbox import Mailbox, Message
from covey.schema.runner import RunnerCommand, RunnerMessage, ShutDown
from covey.schema.wire import FrameBuffer, FrameTooLargeError, pack

READ_BYTES: Final = 64 * 1024
INPUT, OUTPUT, ERROR = 0, 1, 2  # file descriptors

_commands = msgspec.msgpack.Decoder(RunnerCommand)


class NodePipe:
    def __init__(self) -> None:
        """Takes the process's standard input and output. Made by the main thread."""
        self._main_thread = threading.get_ident()
        self._input = os.dup(INPUT)
        self._output = os.dup(OUTPUT)
        self._telling = threading.Lock()  # two threads tell, and a long message may go in pieces
        self.is_ending = False  # the node has asked for it
        self._mailbox: Mailbox = Mailbox()
        self._delivering = threading.Lock()
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, INPUT)
        os.close(empty)
        os.dup2(ERROR, OUTPUT)

    def listen(self) -> None:
        """Passes on commands from a thread of its own, which ends the process at once when the node is gone."""
        threading.Thread(target=self._read, name="node pipe", daemon=True).start()

    def deliver_to(self, mailbox: Mailbox) -> None:
        """Commands go there from now on, and those that nobody took from where they went before."""
        with self._delivering:
            while not self._mailbox.empty():
                message = self._mailbox.get()
                if isinstance(message, RunnerCommand):
                    mailbox.put(message)
            self._mailbox = mailbox

    def take(self) -> Message:
        """Waits for what comes next where commands go now."""
        return self._mailbox.get()

    def tell(self, message: RunnerMessage) -> None:
        data = pack(message)
        try:
            with self._telling:
                while data:
                    data = data[os.write(self._output, data) :]
        except BrokenPipeError:
            self._vanish("the node reads no more")

    def _read(self) -> None:
        frames = FrameBuffer()
        while data := os.read(self._input, READ_BYTES):
            try:
                for body in frames.feed(data):
                    self._pass_on(_commands.decode(body))
            except (msgspec.MsgspecError, FrameTooLargeError) as error:
                self._vanish(f"the node's commands can't be read: {error}")
        self._vanish("the node is gone")

    def _pass_on(self, command: RunnerCommand) -> None:
        if isinstance(command, ShutDown):
            # The same as SIGTERM, which interrupts the main thread in whatever phase it is.
            self.is_ending = True
            signal.pthread_kill(self._main_thread, signal.SIGTERM)
        else:
            with self._delivering:
                self._mailbox.put(command)

    def _vanish(self, reason: str) -> NoReturn:
        """Ends the process even while the main thread computes: nobody is left whom a clean end would serve."""
        try:
            if not self.is_ending:
                sys.stderr.write(f"runner: {reason}\n")
                sys.stderr.flush()
        finally:  # the node was also the reader of standard error: writing to it may fail
            self._exit()

    def _exit(self) -> NoReturn:
        os._exit(0 if self.is_ending else 1)
