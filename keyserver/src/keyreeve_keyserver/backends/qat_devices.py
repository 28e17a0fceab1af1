"""Intel QAT devices as Linux shows them, and what is missing before a process can use one: so that a fault becomes an instruction.

Only what a process may read without privileges is looked at, and only the way that qatlib takes: physical functions bound to a driver of the
kernel, virtual functions bound to vfio-pci, their groups in /dev/vfio open to the group `qat`, the daemon qatmgr. Nothing here proves that a
card signs; the engine's self-test does. Spec: qatlib INSTALL, "Check System Prerequisites"; Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_INTEL = "0x8086"
# Physical functions by PCI device id; the driver is the name under /sys/bus/pci/drivers. qatlib serves these:
_PHYSICAL = {"0x4940": "4xxx", "0x4942": "401xx", "0x4944": "402xx", "0x4946": "420xx", "0x4948": "6xxx"}
_VIRTUAL = {"0x4941": "4xxx", "0x4943": "401xx", "0x4945": "402xx", "0x4947": "420xx", "0x4949": "6xxx"}
# And these it does not: they need Intel's own driver, outside the kernel (/dev/qat_adf_ctl, usdm_drv).
_OLD = {
    "0x37c8": "c6xx", "0x37c9": "c6xx", "0x0435": "dh895xcc", "0x0443": "dh895xcc", "0x19e2": "c3xxx", "0x19e3": "c3xxx",
    "0x6f54": "d15xx", "0x6f55": "d15xx", "0x18a0": "c4xxx", "0x18a1": "c4xxx",
}  # fmt: skip
_VFIO_DRIVER = "vfio-pci"
_MODULES = {"420xx": "qat_420xx", "6xxx": "qat_6xxx"}  # one module serves 4xxx, 401xx and 402xx


class QatStep(StrEnum):
    """What has to be there, in this order."""

    DEVICE = "device"
    DRIVER = "driver"
    FUNCTIONS = "virtual functions"
    PERMISSION = "permission"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class QatDevice:
    """`address` is that of the PCI bus; `driver` is "" where none is bound, `group` the IOMMU group, "" where there is none."""

    address: str
    model: str
    is_virtual: bool
    driver: str
    group: str


@dataclass(frozen=True, slots=True)
class QatObstacle:
    """The first step that fails, and what to do."""

    step: QatStep
    advice: str

    def __str__(self) -> str:
        return f"{self.step.value}: {self.advice}"


def find_devices(root: Path = Path("/")) -> tuple[QatDevice, ...]:
    """Those that qatlib can use. `root`: where sys and dev are, for tests."""
    return tuple(sorted(_devices(root, _PHYSICAL | _VIRTUAL), key=lambda device: device.address))


def find_obstacle(root: Path = Path("/")) -> QatObstacle | None:
    """None where nothing is seen that keeps this process from its cards."""
    devices = find_devices(root)
    physical = [device for device in devices if not device.is_virtual]
    usable = [device for device in devices if device.is_virtual and device.driver == _VFIO_DRIVER and device.group]
    if not devices:
        old = sorted({device.model for device in _devices(root, _OLD)})
        return QatObstacle(QatStep.DEVICE, _no_device(old))
    if not usable and physical and not any(device.driver for device in physical):
        named = physical[0]
        return QatObstacle(
            QatStep.DRIVER,
            f"{named.model} at {named.address} has no driver: modprobe {_MODULES.get(named.model, 'qat_4xxx')}, with its firmware installed",
        )
    if not usable:
        return QatObstacle(
            QatStep.FUNCTIONS,
            "no virtual function is bound to vfio-pci: switch on VT-d and SR-IOV, boot with intel_iommu=on, start qat.service",
        )
    groups = [root / "dev/vfio" / device.group for device in usable]
    if not (_opens(root / "dev/vfio/vfio") and any(_opens(path) for path in groups)):
        return QatObstacle(
            QatStep.PERMISSION,
            f"/dev/vfio/vfio or /dev/vfio/{usable[0].group} is not ours to open: the signer's user belongs into group qat",
        )
    if not (root / "run/qat/qatmgr.sock").exists():
        return QatObstacle(QatStep.SERVICE, "/run/qat/qatmgr.sock is missing: start qat.service (qatlib-service)")
    return None


def _no_device(old: list[str]) -> str:
    if old:
        return f"{', '.join(old)} needs Intel's driver outside the kernel, which the signer's sandbox does not admit; 4xxx and later are served"
    return "no QAT device on the PCI bus that qatlib knows (4xxx, 401xx, 402xx, 420xx, 6xxx)"


def _devices(root: Path, models: dict[str, str]) -> Iterator[QatDevice]:
    try:
        found = list((root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return
    for path in found:
        device = _text(path / "device")
        if _text(path / "vendor") == _INTEL and device in models:
            yield QatDevice(
                path.name, models[device], device in _VIRTUAL, _linked(path / "driver"), _linked(path / "iommu_group")
            )


def _opens(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip().lower()
    except (OSError, ValueError):
        return ""


def _linked(path: Path) -> str:
    try:
        return path.readlink().name
    except OSError:
        return ""
