"""Judges what is seen of this machine: its clock, disk, memory, limits, folders and libraries."""

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from covey.cli.console import size
from covey.cli.doctor.finding import Finding, ok, problem, warning
from covey.cli.tables import DISK_BYTES_LEAST
from covey.control import join_code
from covey.control.join_code import JoinCodeError
from covey.control.placement.memory import USABLE_PERCENT, Load, shard_bytes, whole_bytes
from covey.control.placement.place import CONTEXT_LENGTH_LEAST
from covey.desktop.service import ServiceStatus
from covey.effects.surroundings import Folder
from covey.schema.cluster import Hardware
from covey.schema.model import ModelCard, Shard

BEFORE_COVEY_S: Final = int(dt.datetime(2025, 1, 1, tzinfo=dt.UTC).timestamp())  # no clock that is set shows less
AHEAD_S_MAX: Final = 300  # of another node's clock before this one's: few protocols stand more
DISK_BYTES_FEW: Final = 2_000_000_000  # for a small model
FILES_LEAST: Final = 1000
OPEN_FILES_LEAST: Final = 256
OPEN_FILES_FEW: Final = 1024
RESTARTS_MANY: Final = 5  # more than a bad day's
OTHERS_BITS: Final = 0o077
SHARED_WRITE_BITS: Final = 0o022


def clock(now_s: float, starts: Sequence[tuple[str, int]]) -> Finding:
    """`starts`: name of each node, and when it started by its own clock, in Unix time."""
    shown = _date(now_s)
    if now_s < BEFORE_COVEY_S:
        advice = "Set the clock; on Linux `timedatectl` shows whether it is set by the network."
        return problem("clock", f"This machine's clock shows {shown}, before Covey was written.", advice)
    for name, start_s in starts:
        if start_s < BEFORE_COVEY_S:
            seen = f"The clock of {name} showed {_date(start_s)} when it was started."
            return warning("clock", seen, f"Set the clock of {name}; `timedatectl` there shows more.")
        if start_s > now_s + AHEAD_S_MAX:
            seen = f"{name} was started at {_date(start_s)} by its own clock, and it is {shown} by this one."
            return warning("clock", seen, f"One of the two is wrong: compare the clock of {name} with this one.")
    return ok("clock", f"It is {shown}{', which fits what the other nodes say' if starts else ''}.")


def _date(moment_s: float) -> str:
    return dt.datetime.fromtimestamp(moment_s, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def disk(check: str, found: Folder) -> Finding:
    """`check`: what lies there."""
    free = f"{size(found.bytes_free)} are free for {check} ({found.path})"
    if found.bytes_free < DISK_BYTES_LEAST:
        advice = "Delete what is not needed on that disk, or move all data with COVEY_HOME."
        return problem("disk", f"Only {free}.", advice)
    if found.files_free is not None and found.files_free < FILES_LEAST:
        seen = f"The disk of {found.path} takes only {found.files_free} more files."
        return problem("disk", seen, "Delete small files that are not needed there, or move all data with COVEY_HOME.")
    if found.bytes_free < DISK_BYTES_FEW:
        advice = "That holds a small model at most: make room, or move all data with COVEY_HOME."
        return warning("disk", f"Only {free}.", advice)
    return ok("disk", f"{free}.")


def folder(wanted: Path, found: Folder, user: int) -> Finding:
    """`user`: the id of who runs this."""
    if not found.is_folder:
        advice = "Move that file away, or choose another folder with COVEY_HOME or --data-dir."
        return problem("folder", f"{wanted} can't be made: {found.path} is a file.", advice)
    if not found.is_writable:
        what = "can't be written" if wanted == found.path else f"can't be made: {found.path} can't be written"
        advice = f"Run `ls -ld {found.path}`, and make yourself its owner, or choose another with COVEY_HOME."
        return problem("folder", f"{wanted} {what}.", advice)
    if wanted != found.path:
        return ok("folder", f"{wanted} is not there yet; the first start makes it.")
    if found.owner != user:
        advice = "Run Covey as one user alone: files of two in one folder lock each other out."
        return warning("folder", f"{wanted} belongs to another user ({found.owner}; you are {user}).", advice)
    if found.mode & OTHERS_BITS and found.is_in_reach:
        strength = problem if found.mode & SHARED_WRITE_BITS else warning
        can = "write" if found.mode & SHARED_WRITE_BITS else "read"
        return strength("folder", f"Other users of this machine can {can} {wanted}.", f"Run `chmod 700 {wanted}`.")
    return ok("folder", f"{wanted} is yours alone.")


def code_file(path: Path, content: str | None, mode: int) -> Finding:
    """The join code; `content` is None where there is no file."""
    if content is None:
        return ok("join code", "There is none yet; the first start makes one.")
    try:
        join_code.parse(content)
    except JoinCodeError:
        advice = "Put it back with `covey up --join CODE`: `covey join-code` on another device shows it."
        return problem("join code", f"The join code in {path} is damaged.", advice)
    if mode & OTHERS_BITS:
        advice = f"Run `chmod 600 {path}`; if you don't trust them, `covey join-code rotate` makes a new one."
        return problem("join code", f"Other users of this machine can read the join code in {path}.", advice)
    return ok("join code", "It is there, and only you can read it.")


def memory(hardware: Hardware, cards: Sequence[ModelCard]) -> Finding:
    """Against what the listed models take, with the shortest context."""
    usable = hardware.memory_bytes_available * USABLE_PERCENT // 100
    loads = [Load(card, CONTEXT_LENGTH_LEAST, 1) for card in cards]
    stage = min(_smallest_stage_bytes(load) for load in loads)
    whole = min(whole_bytes(load, 1) for load in loads)
    total = size(hardware.memory_bytes_total)
    seen = f"{size(hardware.memory_bytes_available)} of {total} are free, and models may take {size(usable)} of it"
    if usable < stage:
        return problem("memory", f"{seen}; the smallest part of a model takes {size(stage)}.", "End other programs.")
    if usable < whole:
        advice = "End other programs, or let other devices take part."
        return warning("memory", f"{seen}; the smallest listed model takes {size(whole)}.", advice)
    return ok("memory", f"{seen}.")


def _smallest_stage_bytes(load: Load) -> int:
    count = load.card.layer_count
    return min(shard_bytes(load, Shard(layer, layer + 1, count)) for layer in range(count))


def open_files(limit: int) -> Finding:
    seen = f"A program started here may hold {limit} files and connections open."
    advice = "Run `ulimit -n 8192` before `covey up`; `covey service install` sees to it by itself."
    if limit < OPEN_FILES_LEAST:
        return problem("open files", seen, advice)
    if limit < OPEN_FILES_FEW:
        return warning("open files", seen, advice)
    return ok("open files", "As many may be open as are needed.")


def service(found: ServiceStatus) -> Finding:
    """Of a service that is installed."""
    if not found.is_running:
        advice = f"Its log says why: `{found.log_command}`. `covey service install` starts it anew."
        return warning("service", f"The service is installed and does not run: {found.state}.", advice)
    if found.restarts is not None and found.restarts >= RESTARTS_MANY:
        seen = f"The service was started again {found.restarts} times."
        return warning("service", seen, f"Its log says why: `{found.log_command}`.")
    return ok("service", f"It runs under {found.manager}.")


def accelerator(gpu: str, failure: str) -> Finding:
    """`failure`: why the library that computes can't be loaded. This version has an engine for processors alone."""
    if failure:
        advice = "Install Covey anew: its libraries are damaged, or not made for this machine."
        return problem("engine", f"ONNX Runtime, which computes, can't be loaded: {failure}.", advice)
    if gpu:
        seen = f"This machine has {gpu}, and this version of Covey has no library that computes on it."
        return warning("engine", seen, "Nothing is to be mended: models run on the processor, only slower.")
    return ok("engine", "ONNX Runtime can be loaded, and computes on the processor.")
