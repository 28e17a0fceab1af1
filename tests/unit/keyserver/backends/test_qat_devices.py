"""Each step towards a QAT card that can be missing is named, with what to do, from a tree that looks like sysfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from keyreeve_keyserver.backends import qat_devices
from keyreeve_keyserver.backends.qat_devices import QatStep, find_devices, find_obstacle

PHYSICAL, VIRTUAL = "0000:6b:00.0", "0000:6b:00.1"


def add_device(
    root: Path, address: str, device: str, *, driver: str = "", group: str = "", vendor: str = "0x8086"
) -> None:
    path = root / "sys/bus/pci/devices" / address
    path.mkdir(parents=True)
    (path / "vendor").write_text(f"{vendor}\n")
    (path / "device").write_text(f"{device}\n")
    if driver:
        (path / "driver").symlink_to(f"../../../../bus/pci/drivers/{driver}")
    if group:
        (path / "iommu_group").symlink_to(f"../../../../kernel/iommu_groups/{group}")


def add_file(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A host that lacks nothing."""
    add_device(tmp_path, PHYSICAL, "0x4940", driver="4xxx", group="12")
    add_device(tmp_path, VIRTUAL, "0x4941", driver="vfio-pci", group="271")
    for name in ("dev/vfio/vfio", "dev/vfio/271", "run/qat/qatmgr.sock"):
        add_file(tmp_path, name)
    return tmp_path


def step(root: Path) -> tuple[QatStep, str]:
    obstacle = find_obstacle(root)
    assert obstacle is not None
    return obstacle.step, obstacle.advice


def test_a_host_that_lacks_nothing(ready: Path) -> None:
    assert find_obstacle(ready) is None
    physical, virtual = find_devices(ready)
    assert (physical.model, physical.is_virtual, physical.driver) == ("4xxx", False, "4xxx")
    assert (virtual.model, virtual.is_virtual, virtual.driver, virtual.group) == ("4xxx", True, "vfio-pci", "271")


def test_no_bus_no_device(tmp_path: Path) -> None:
    assert step(tmp_path)[0] is QatStep.DEVICE


def test_devices_of_others_are_none(tmp_path: Path) -> None:
    add_device(tmp_path, PHYSICAL, "0x1572", driver="i40e")
    add_device(tmp_path, VIRTUAL, "0x4940", vendor="0x1af4")
    assert find_devices(tmp_path) == ()
    assert step(tmp_path)[0] is QatStep.DEVICE


@pytest.mark.parametrize(("device", "model"), [("0x37c8", "c6xx"), ("0x0435", "dh895xcc")])
def test_an_old_card_is_named_with_what_it_would_need(tmp_path: Path, device: str, model: str) -> None:
    add_device(tmp_path, PHYSICAL, device, driver=model)
    found, advice = step(tmp_path)
    assert found is QatStep.DEVICE
    assert model in advice
    assert "outside the kernel" in advice


@pytest.mark.parametrize(
    ("device", "module"), [("0x4940", "qat_4xxx"), ("0x4944", "qat_4xxx"), ("0x4946", "qat_420xx")]
)
def test_no_driver_names_its_module(tmp_path: Path, device: str, module: str) -> None:
    add_device(tmp_path, PHYSICAL, device)
    found, advice = step(tmp_path)
    assert found is QatStep.DRIVER
    assert module in advice


@pytest.mark.parametrize("driver", ["", "4xxxvf"])
def test_no_virtual_function_that_a_process_may_have(tmp_path: Path, driver: str) -> None:
    add_device(tmp_path, PHYSICAL, "0x4940", driver="4xxx")
    add_device(tmp_path, VIRTUAL, "0x4941", driver=driver, group="271")
    assert step(tmp_path)[0] is QatStep.FUNCTIONS


def test_a_virtual_machine_sees_virtual_functions_alone(ready: Path) -> None:
    for file in (ready / "sys/bus/pci/devices" / PHYSICAL).iterdir():
        file.unlink()
    assert find_obstacle(ready) is None


@pytest.mark.parametrize("name", ["dev/vfio/vfio", "dev/vfio/271"])
def test_a_group_that_is_not_there_or_not_ours(ready: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`access` stands in for the kernel: root, as whom tests may run, may open all."""
    may = os.access
    monkeypatch.setattr(qat_devices.os, "access", lambda path, mode: path != ready / name and may(path, mode))
    found, advice = step(ready)
    assert found is QatStep.PERMISSION
    assert "group qat" in advice
    monkeypatch.undo()
    (ready / name).unlink()
    assert step(ready)[0] is QatStep.PERMISSION


def test_no_daemon(ready: Path) -> None:
    (ready / "run/qat/qatmgr.sock").unlink()
    found, advice = step(ready)
    assert found is QatStep.SERVICE
    assert "qat.service" in advice


def test_what_cannot_be_read_is_no_device(ready: Path) -> None:
    (ready / "sys/bus/pci/devices" / PHYSICAL / "device").write_bytes(b"\xff\xfe")
    (ready / "sys/bus/pci/devices" / VIRTUAL / "vendor").unlink()
    assert step(ready)[0] is QatStep.DEVICE
