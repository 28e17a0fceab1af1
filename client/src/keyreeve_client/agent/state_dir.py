"""What the agent keeps in its state directory, normally under /run: it survives a restart of the process, not a reboot, and a stolen disk image
holds no agent key.

    svid.pem        the agent's own key and chain in one file, mode 0600, so that they can only change together
    bundle.pem      the trust bundle that the CA sent last
    assignments.pb  what the CA assigned last: public data, verified anew when it is read
    status.json     for `keyreeve svid show` and `keyreeve doctor`
    agent.lock      held by the one agent that runs here
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.files import make_private_directory


@dataclass(frozen=True, slots=True)
class StateDir:
    path: Path

    @property
    def svid(self) -> Path:
        return self.path / "svid.pem"

    @property
    def bundle(self) -> Path:
        return self.path / "bundle.pem"

    @property
    def assignments(self) -> Path:
        return self.path / "assignments.pb"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    def lock(self) -> int:
        """Makes the directory and takes its lock, which the kernel releases when this process ends. Raises: ConfigInvalid."""
        make_private_directory(self.path)
        descriptor = os.open(self.path / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigInvalid(f"{self.path}: another agent runs with this state_dir") from None
        return descriptor
