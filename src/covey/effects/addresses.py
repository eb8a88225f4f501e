"""What an address to listen at means for those who connect: "all of this machine" is none to connect to."""

from typing import Final

from covey.schema.cluster import Hardware

LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
LOOPBACK_OF: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - recognised, not listened at
LINK_LOCAL: Final = "fe80:"  # of no use without the name of an interface, which differs on each machine


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    return host in LOOPBACK


def is_wildcard(host: str) -> bool:
    """Whether it stands for all addresses of this machine."""
    return host in LOOPBACK_OF


def local_host(host: str) -> str:
    """Where this machine itself reaches what listens at `host`."""
    return LOOPBACK_OF.get(host, host)


def network_hosts(host: str, hardware: Hardware) -> tuple[str, ...]:
    """Where other machines may reach what listens at `host`, IPv4 first; none if only this one can."""
    if not is_wildcard(host):
        return () if is_local(host) else (host,)
    own = sorted({address for _, address in hardware.interfaces}, key=lambda each: (":" in each, each))
    return tuple(
        each for each in own if not each.startswith(("127.", "::1", LINK_LOCAL)) and (":" not in each or host == "::")
    )


def http_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
