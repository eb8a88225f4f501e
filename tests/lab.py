"""A network of our own: hosts are network namespaces, and what joins them is a switch in this process.

Frames pass through Python, so a test can delay, lose, cut, filter and read them, on kernels that have no `netem` too.
Needs root, iproute2 and /dev/net/tun. Everything is made inside namespaces of this process and goes with them.
"""

import ctypes
import errno
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
FRAME_BYTES_MAX = 65536
MULTICAST_4, MULTICAST_6 = b"\x01\x00\x5e", b"\x33\x33"

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> str:
    """Why no network can be made here; empty if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "the switch needs /dev/net/tun"
    probe = f"covey{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "network namespaces are not allowed here"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


@contextmanager
def inside(namespace: str) -> Generator[None]:
    """What this thread opens in the block belongs to the namespace."""
    with open("/proc/thread-self/ns/net", "rb") as here, open(f"/run/netns/{namespace}", "rb") as there:  # noqa: PTH123
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(here.fileno())


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns failed")


class Host:
    """One machine. Its interfaces have no addresses until it is given some."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.namespace = f"covey{os.getpid()}-{name}"
        subprocess.run(["ip", "netns", "add", self.namespace], check=True)
        self.ip("link set lo up")

    def ip(self, command: str) -> str:
        done = subprocess.run(
            ["ip", "-n", self.namespace, *command.split()], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"ip {command}: {done.stderr}"
        return done.stdout

    def run(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def address(self, address: str, interface: str = "e0") -> None:
        self.ip(f"addr add {address} dev {interface}" + (" nodad" if ":" in address else ""))

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.namespace], check=False)


class Port:
    """One interface of a host and its cable."""

    def __init__(self, host: Host, interface: str) -> None:
        self.host, self.interface = host, interface
        self.cut = False
        with inside(host.namespace):
            self.descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            request = struct.pack("16sH22x", interface.encode(), IFF_TAP | IFF_NO_PI)
            fcntl.ioctl(self.descriptor, TUNSETIFF, request)
        host.ip(f"link set {interface} up")


class Switch:
    """One LAN. A test may replace `allows(frame, source, target)`, and let `frames` keep what comes by."""

    def __init__(self) -> None:
        self.ports: list[Port] = []
        self.delay_s = self.loss = 0.0
        self.allows: Callable[[bytes, Port, Port], bool] = lambda *_: True
        self.frames: list[bytes] | None = None
        self._random = random.Random(1)
        self._late: list[tuple[float, int, Port, bytes]] = []
        self._count = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._forward, name="switch", daemon=True)
        self._thread.start()

    def plug(self, host: Host, interface: str = "e0") -> Port:
        port = Port(host, interface)
        self.ports.append(port)
        return port

    def close(self) -> None:
        self._is_over = True
        self._thread.join(5)
        for port in self.ports:
            os.close(port.descriptor)

    def _forward(self) -> None:
        while not self._is_over:
            by_descriptor = {port.descriptor: port for port in self.ports}
            wait_s = min(0.05, max(0.0, self._late[0][0] - time.monotonic())) if self._late else 0.05
            for descriptor in select.select(list(by_descriptor), [], [], wait_s)[0]:
                self._read(by_descriptor[descriptor])
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, target, frame = heapq.heappop(self._late)
                _write(target, frame)

    def _read(self, source: Port) -> None:
        try:
            frame = os.read(source.descriptor, FRAME_BYTES_MAX)
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.EIO, errno.EBADFD}:  # the interface is down
                return
            raise
        if self.frames is not None:
            self.frames.append(frame)
        for target in list(self.ports):
            if target is not source and not source.cut and not target.cut and self.allows(frame, source, target):
                self._send(target, frame)

    def _send(self, target: Port, frame: bytes) -> None:
        if self._random.random() < self.loss:
            return
        if self.delay_s:
            self._count += 1
            heapq.heappush(self._late, (time.monotonic() + self.delay_s, self._count, target, frame))
        else:
            _write(target, frame)


def _write(target: Port, frame: bytes) -> None:
    with suppress(OSError):  # full or down: a frame may be lost
        os.write(target.descriptor, frame)


def is_multicast(frame: bytes) -> bool:
    """IPv4 or IPv6; ARP's broadcast is not, and neither are the neighbour solicitations that IPv6 can't do without."""
    if frame.startswith(MULTICAST_4):
        return True
    return frame.startswith(MULTICAST_6) and frame[20:21] != b"\x3a"


class Lab:
    """Hosts and switches of one test."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.hosts: list[Host] = []
        self.switches: list[Switch] = []

    def switch(self) -> Switch:
        self.switches.append(Switch())
        return self.switches[-1]

    def host(self, name: str, switch: Switch | None = None, *addresses: str) -> Host:
        host = Host(name)
        self.hosts.append(host)
        if switch is not None:
            switch.plug(host)
        for address in addresses:
            host.address(address)
        return host

    def close(self) -> None:
        for switch in self.switches:
            switch.close()
        for host in self.hosts:
            host.remove()


@contextmanager
def lab(home: Path) -> Iterator[Lab]:
    made = Lab(home)
    try:
        yield made
    finally:
        made.close()
