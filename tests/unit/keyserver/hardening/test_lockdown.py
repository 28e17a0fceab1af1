"""What the host lacks is named with what helps, never raised, and can be made a condition. No test here puts a protection on this process."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
from keyreeve_common.errors import ConfigInvalid
from keyreeve_keyserver.hardening import calls, landlock, lockdown, process, seccomp
from keyreeve_keyserver.hardening.lockdown import Protection, Protections


def fails(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_a_kernel_without_landlock_leaves_files_off_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: fails(errno.ENOSYS))
    monkeypatch.setattr(process, "drop_capabilities", lambda: None)
    protections = Protections()
    lockdown.confine_signer_files(protections, writes=[], sockets=[])
    assert protections.describe() == {
        "no-capabilities": "on",
        "files": "off: needs Landlock, in the kernel and switched on: Function not implemented",
    }
    assert protections.missing == ("files",)


def test_a_host_without_libseccomp_leaves_calls_off_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_LIBRARY", "libseccomp-that-is-not-here.so")
    protections = Protections()
    lockdown.confine_signer_calls(protections)
    assert "needs seccomp in the kernel, and libseccomp.so.2" in protections.describe()["calls"]


def test_rights_that_an_old_kernel_does_not_know_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ABI 2 is Debian 12's: no right to truncate, nothing of the network, no scopes."""
    made: dict[int, tuple[int, int, int]] = {}
    for version in (1, 2, 3, 4, 5, 6, 7, 9):

        def call(number: int, *arguments: object, version: int = version) -> int:
            if number == 444:
                ruleset = ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_uint64 * 3)).contents  # type: ignore[arg-type]
                made[version] = (ruleset[0], ruleset[1], ruleset[2])
                return os.open(tmp_path, os.O_RDONLY)
            return 0

        monkeypatch.setattr(landlock, "abi", lambda version=version: version)
        monkeypatch.setattr(landlock, "_call", call)
        landlock.confine([landlock.Rule(tmp_path, landlock.WRITE)], tcp=False)
    assert made[1] == (0x1FFF, 0, 0)
    assert made[2] == (0x3FFF, 0, 0)
    assert made[3] == (0x7FFF, 0, 0)
    assert made[4] == (0x7FFF, 3, 0)
    assert made[5] == (0xFFFF, 3, 0)
    assert made[6] == made[7] == made[9] == (0xFFFF, 3, 3)


def test_what_is_required_and_off_is_a_fault_of_the_configuration() -> None:
    protections = Protections()
    protections.apply(Protection.CALLS, lambda: None)
    protections.apply(Protection.MEMORY_LOCKED, lambda: fails(errno.ENOMEM))
    protections.require([Protection.CALLS])
    with pytest.raises(ConfigInvalid, match="not to be had here: memory-locked \\(needs LimitMEMLOCK=infinity"):
        protections.require([Protection.CALLS, Protection.MEMORY_LOCKED])


def test_what_is_required_and_was_never_put_on_is_missing() -> None:
    with pytest.raises(ConfigInvalid, match="files \\(never put on\\)"):
        Protections().require([Protection.FILES])


def test_a_bug_is_no_missing_protection() -> None:
    def bug() -> None:
        raise TypeError

    with pytest.raises(TypeError):
        Protections().apply(Protection.CALLS, bug)


def test_no_call_is_allowed_and_forbidden_but_by_its_arguments() -> None:
    allowed = {call.name for call in calls.signer_allows() if not call.arguments}
    forbidden = {call.name for call in calls.signer_forbids()}
    assert not allowed & forbidden
    assert {"socket", "connect", "bind", "listen", "execve", "execveat", "fork", "vfork", "ptrace"} <= forbidden
    assert {call.name for call in calls.worker_forbids(sockets=True)} >= {
        "execve",
        "execveat",
        "fork",
        "vfork",
        "ptrace",
        "listen",
    }


def rules_made(monkeypatch: pytest.MonkeyPatch, card: lockdown.Card | None) -> dict[str, landlock.Access]:
    made: dict[str, landlock.Access] = {}
    monkeypatch.setattr(landlock, "confine", lambda rules, **_: made.update({str(r.path): r.access for r in rules}))
    monkeypatch.setattr(process, "drop_capabilities", lambda: None)
    lockdown.confine_signer_files(Protections(), writes=[], sockets=[], card=card)
    return made


def test_devices_are_admitted_only_where_a_card_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = Path("/opt/qat/qatprovider.so")
    without, with_card = rules_made(monkeypatch, None), rules_made(monkeypatch, lockdown.Card((provider,)))
    added = with_card.keys() - without.keys()
    assert added == {
        "/sys/bus/pci",
        "/sys/devices",
        "/sys/kernel/iommu_groups",
        "/run/qat",
        "/dev/vfio",
        str(provider),
    }
    assert [path for path in added if with_card[path] & landlock.Access.WRITE_FILE] == ["/dev/vfio"]


def test_a_card_adds_two_requests_of_vfio_to_the_calls_and_takes_none_of_the_forbidden_away() -> None:
    added = set(calls.signer_allows(card=True)) - set(calls.signer_allows())
    assert {(call.name, call.arguments[0].masked) for call in added} == {("ioctl", 0x3B71), ("ioctl", 0x3B72)}
    assert set(calls.signer_allows()) <= set(calls.signer_allows(card=True))
