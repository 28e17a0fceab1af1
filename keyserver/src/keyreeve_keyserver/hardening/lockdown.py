"""Puts a process under the protections of its kind and says of each whether it is on, and if not why.

Nothing here fails where the kernel or the host lacks something: who needs a protection requires it (`hardening.required` in signer.toml), and
everybody sees what is off (the log event `signer_hardened`, `health`). The order is that of what each step forbids: see ADR 11.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from keyreeve_common import __file__ as _common_file
from keyreeve_common.errors import ConfigInvalid

from keyreeve_keyserver import __file__ as _keyserver_file
from keyreeve_keyserver.hardening import calls, landlock, process, seccomp
from keyreeve_keyserver.hardening.landlock import DEVICE, READ, SOCKET, WRITE, Access, Rule


class Protection(StrEnum):
    """`NO_TRACE`: not attached to, memory not read, no core, by anyone without CAP_SYS_PTRACE. `FILES`: Landlock. `CALLS`: seccomp."""

    NO_CORE = "no-core"
    NO_TRACE = "no-trace"
    MEMORY_LOCKED = "memory-locked"
    NO_NEW_PRIVILEGES = "no-new-privileges"
    NO_CAPABILITIES = "no-capabilities"
    FILES = "files"
    CALLS = "calls"


@dataclass(slots=True)
class Protections:
    """What is on in this process; a reason for each that is not."""

    on: list[Protection] = field(default_factory=list)
    off: dict[Protection, str] = field(default_factory=dict)

    def apply(self, protection: Protection, step: Callable[[], object]) -> None:
        try:
            step()
        except (OSError, ValueError) as error:
            self.off[protection] = f"{_HINTS.get(protection, '')}{_text(error)}"
        else:
            self.on.append(protection)

    def leave_off(self, protection: Protection, reason: str) -> None:
        self.off[protection] = reason

    def require(self, required: Iterable[Protection]) -> None:
        """Raises: ConfigInvalid."""
        missing = [f"{name.value} ({self.off.get(name, 'never put on')})" for name in required if name not in self.on]
        if missing:
            raise ConfigInvalid(f"hardening.required: not to be had here: {'; '.join(missing)}")

    def describe(self) -> dict[str, str]:
        """`on`, or why not, by name."""
        states = {name.value: "on" for name in self.on} | {name.value: f"off: {why}" for name, why in self.off.items()}
        return {name.value: states[name.value] for name in Protection if name.value in states}

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name.value for name in Protection if name in self.off)


_HINTS = {
    Protection.MEMORY_LOCKED: "needs LimitMEMLOCK=infinity, or CAP_SYS_RESOURCE at the start: ",
    Protection.FILES: "needs Landlock, in the kernel and switched on: ",
    Protection.CALLS: "needs seccomp in the kernel, and libseccomp.so.2: ",
}


def protect_self(protections: Protections) -> None:
    """The first step of any process here: what costs it nothing later. To be called before a secret is read."""
    protections.apply(Protection.NO_CORE, process.forbid_cores)
    protections.apply(Protection.NO_TRACE, process.forbid_tracing)
    protections.apply(Protection.NO_NEW_PRIVILEGES, process.forbid_new_privileges)
    protections.apply(Protection.MEMORY_LOCKED, process.lock_memory)


@dataclass(frozen=True, slots=True)
class Card:
    """A QAT card that the signer opens itself, by vfio; `providers` are files of OpenSSL providers outside the system's libraries."""

    providers: tuple[Path, ...] = ()


def confine_signer_files(
    protections: Protections, *, writes: Sequence[Path], sockets: Sequence[Path], card: Card | None = None
) -> None:
    """The second step of the signer: its launcher runs and its secrets are read. There is one thread still.

    `writes` are directories that it may fill; in `sockets` it may make and remove a socket file.
    """
    rules = [
        *_program_rules(),
        *(Rule(path, WRITE) for path in writes),
        *(Rule(path, SOCKET) for path in sockets),
        *_card_rules(card),
    ]
    _confine_files(protections, rules, tcp=False)
    protections.apply(Protection.NO_CAPABILITIES, process.drop_capabilities)


def confine_signer_calls(protections: Protections, *, card: bool = False) -> None:
    """The last step of the signer: every socket and device is open, every thread pool may begin its threads."""
    _finish_a_thread()
    protections.apply(
        Protection.CALLS, lambda: seccomp.allow_only(calls.signer_allows(card=card), forbidden=calls.signer_forbids())
    )


@dataclass(frozen=True, slots=True)
class Reach:
    """What a worker's backend needs. `reads` and `writes` are files or directories; None: not known, so its files are not confined."""

    network: bool = True
    reads: tuple[Path, ...] | None = None
    writes: tuple[Path, ...] = ()


def confine_worker(protections: Protections, reach: Reach) -> None:
    """All that a worker does after `protect_self`; its secrets are read, its module is not loaded. There is one thread."""
    if reach.reads is None:
        protections.leave_off(Protection.FILES, "what files the module needs is not configured: give reads and writes")
    else:
        rules = [
            *_program_rules(),
            *(Rule(Path(path), READ) for path in _SYSTEM_READS),
            *(Rule(path, READ) for path in reach.reads),
            *(Rule(path, WRITE | Access.IOCTL_DEV) for path in reach.writes),  # one may be a device
        ]
        _confine_files(protections, rules, tcp=reach.network)
    protections.apply(Protection.NO_CAPABILITIES, process.drop_capabilities)
    protections.apply(
        Protection.CALLS,
        lambda: seccomp.deny(calls.worker_forbids(sockets=reach.network), absent=calls.ABSENT),
    )


def _confine_files(protections: Protections, rules: Iterable[Rule], *, tcp: bool) -> None:
    if threading.active_count() > 1:
        protections.leave_off(Protection.FILES, "other threads run already")
        return
    protections.apply(Protection.FILES, lambda: landlock.confine(rules, tcp=tcp))


_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/sys/devices/system/cpu")
# What libraries of a vendor read of the host: name resolution, trust anchors, their own registration.
_SYSTEM_READS = (
    "/usr/share", "/etc/ssl", "/etc/pkcs11", "/etc/softhsm", "/etc/crypto-policies", "/etc/hosts", "/etc/resolv.conf", "/etc/host.conf",
    "/etc/nsswitch.conf", "/etc/services", "/etc/gai.conf", "/etc/passwd", "/etc/group",
)  # fmt: skip


def _card_rules(card: Card | None) -> list[Rule]:
    """What qatlib opens while it starts: which devices there are, and the groups of vfio. The daemon's socket needs no rule."""
    if card is None:
        return []
    shown = ("/sys/bus/pci", "/sys/devices", "/sys/kernel/iommu_groups", "/run/qat")
    return [
        *(Rule(Path(path), READ) for path in shown),
        *(Rule(path, READ) for path in card.providers),
        Rule(Path("/dev/vfio"), DEVICE | Access.READ_DIR),
    ]


def _program_rules() -> list[Rule]:
    """The interpreter, its libraries and our own packages: by where they are, not by sys.path, which may hold the working directory."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {os.path.dirname(file) for file in (_common_file, _keyserver_file)}
    paths |= {*_SYSTEM_LIBRARIES, *_SYSTEM_FILES, "/proc/self"}
    return [*(Rule(Path(path), READ) for path in sorted(paths)), Rule(Path("/dev/null"), DEVICE)]


def _finish_a_thread() -> None:
    """The end of the first thread loads libgcc, which needs what is forbidden afterwards."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    ctypes.CDLL(None)


def _text(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
