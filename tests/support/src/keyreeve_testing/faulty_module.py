"""A PKCS#11 module in front of SoftHSM that stalls, fails, loses sessions or its token on demand (faulty_module.c). Needs gcc."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from keyreeve_testing.softhsm import MODULE

SOURCE = Path(__file__).with_name("faulty_module.c")


@dataclass(frozen=True, slots=True)
class FaultyModule:
    """`path` is the module; what it does stands in files beside it, which every process that loaded it looks at in each call."""

    path: Path

    def fault(self, kind: str) -> None:
        """`stall`, `stall-sign`, `fail`, `lose` or `removed`, from now on; "" ends it."""
        self._write(".fault", kind)

    def delay(self, microseconds: int) -> None:
        """Each C_Sign blocks so long first."""
        self._write(".delay", str(microseconds))

    def limit_sessions(self, processes: int) -> None:
        self._write(".sessions", str(processes))

    def hide(self, *mechanisms: int, from_list: bool = True) -> None:
        """Denies these mechanisms; with `from_list` false the token still lists them."""
        self._write(
            ".hide",
            ("" if from_list else "listed") + " " + " ".join(f"{mechanism:x}" for mechanism in mechanisms) + " ",
        )

    def _write(self, suffix: str, text: str) -> None:
        """In one step: a half-written word would be no fault at all."""
        draft = self.path.with_name(f"{self.path.name}{suffix}.draft")
        draft.write_text(text)
        draft.rename(self.path.with_name(self.path.name + suffix))


def make_faulty_module(directory: Path, forward_to: Path = MODULE) -> FaultyModule:
    directory.mkdir(parents=True, exist_ok=True)
    module = FaultyModule(directory / "faulty.so")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", f'-DFORWARD_TO="{forward_to}"']
    subprocess.run([*command, "-o", str(module.path), str(SOURCE), "-ldl"], check=True, capture_output=True)
    return module
