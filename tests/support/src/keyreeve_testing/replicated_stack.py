"""A whole Keyreeve with two key servers over one PostgreSQL catalog: what a node sees when a part of the key cluster fails.

Both replicas share passphrase, parameters and a SoftHSM token, which stands for a network HSM. The second lives in a network namespace of its
own, at the far end of a veth pair, so that its connection can be cut without closing it. Needs root.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keyreeve_testing.processes import ManagedProcess, children_of, command_line, free_port
from keyreeve_testing.stack import PATIENCE_S, Stack

REPLICAS = (1, 2)


class FarHost:
    """A network namespace with one address, reached over a veth pair. `black_hole` drops what is sent there, without a word to either end.

    A process of its own holds it, so that it needs no place under /run and goes with us.
    """

    def __init__(self) -> None:
        mark = secrets.token_hex(3)
        self._near, self._far = f"krv{mark}a", f"krv{mark}b"
        net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
        self.near_address, self.address = f"{net}.1", f"{net}.2"
        self._holder: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        holding = "echo held; exec sleep infinity"
        command = ["unshare", "--net", "setpriv", "--pdeathsig", "KILL", "sh", "-c", holding]
        self._holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"held\n", "no network namespace could be made"
        self._holder.stdout.close()
        pid = str(self._holder.pid)
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", pid)
        _ip("addr", "add", f"{self.near_address}/30", "dev", self._near)
        _ip("link", "set", self._near, "up")
        for arguments in (["addr", "add", f"{self.address}/30", "dev", self._far], ["link", "set", self._far, "up"]):
            subprocess.run([*self._enter(), "ip", *arguments], check=True)
        subprocess.run([*self._enter(), "ip", "link", "set", "lo", "up"], check=True)

    def black_hole(self) -> None:
        """Frames go to a hardware address that nobody has: no reset, no ICMP, silence."""
        _ip("neigh", "replace", self.address, "lladdr", "02:00:00:00:00:99", "dev", self._near, "nud", "permanent")

    def mend(self) -> None:
        _ip("neigh", "del", self.address, "dev", self._near)

    def remove(self) -> None:
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
        subprocess.run(["ip", "link", "del", self._near], check=False, stderr=subprocess.DEVNULL)

    def inside(self, command: list[str | Path]) -> list[str | Path]:
        """`command` as it runs there. NOTIFY_SOCKET names an abstract socket, which belongs to our own network namespace."""
        return [*self._enter(), "env", "-u", "NOTIFY_SOCKET", *command]

    def _enter(self) -> list[str]:
        assert self._holder is not None
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class ReplicatedStack(Stack):
    """`catalog_url` is a libpq-like SQLAlchemy URL that both replicas can open (a Unix socket: it crosses network namespaces)."""

    catalog_url: str = ""
    far: FarHost = field(default_factory=FarHost)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.addresses = {1: f"127.0.0.1:{self.key_server_port}", 2: f"{self.far.address}:{free_port()}"}

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.far.remove()

    def audit_dir(self, replica: int) -> Path:
        return self.directory / "audit" / str(replica)

    def admin_socket(self, replica: int) -> Path:
        return self.key_server_socket if replica == 1 else self.run_dir / "keyserver-2" / "admin.sock"

    def prepare(self) -> None:
        super().prepare()
        self.far.make()
        (self.run_dir / "keyserver-2").mkdir(mode=0o700)
        for replica in REPLICAS:
            self.audit_dir(replica).mkdir(parents=True, mode=0o700)
            self._write(f"signer-{replica}.toml", self._signer_of(replica))
            self._write(f"keyserver-{replica}.toml", self._replica_toml(replica))

    def _signer_of(self, replica: int) -> str:
        """Each replica has an audit log of its own."""
        text, own = self._signer_toml(), f'directory = "{self.audit_directory}"'
        assert own in text
        return text.replace(own, f'directory = "{self.audit_dir(replica)}"')

    def _replica_toml(self, replica: int) -> str:
        return f"""trust_domain = "{self.config.trust_domain}"
listen = "{self.addresses[replica]}"
admin_socket = "{self.admin_socket(replica)}"
state_dir = "{self.directory / f"keyserver-{replica}"}"
signer_config = "{self.etc / f"signer-{replica}.toml"}"

[catalog]
url = "{self.catalog_url}"

[supervisor]
max_restarts = 100
"""

    def _with_both(self, text: str) -> str:
        one = f'addresses = ["127.0.0.1:{self.key_server_port}"]'
        assert one in text
        return text.replace(
            one, f"addresses = [{', '.join(repr(a).replace(chr(39), chr(34)) for a in self.addresses.values())}]"
        )

    def _ca_toml(self) -> str:
        return self._with_both(super()._ca_toml())

    def _agent_toml(self) -> str:
        return self._with_both(super()._agent_toml())

    def start_key_server(self) -> None:
        for replica in REPLICAS:
            self.start_replica(replica)

    def start_replica(self, replica: int) -> None:
        command: list[str | Path] = [sys.executable, "-m", "keyreeve_keyserver"]
        command += ["--config", self.etc / f"keyserver-{replica}.toml"]
        name = f"keyserver-{replica}"
        if (before := self.processes.pop(name, None)) is not None:
            before.close()
        if replica == 2:
            command = self.far.inside(command)
        process = ManagedProcess(command, name=name, log_path=self.directory / "log" / f"{name}.log")
        self.processes[name] = process
        process.start()
        process.wait_event("ready", timeout=PATIENCE_S)

    def ceremony(self) -> None:
        super().ceremony()
        socket = str(self.admin_socket(2))
        self.cli("init", "--config", str(self.etc / "ca.toml"), "--key-server-admin-socket", socket)

    def serves(self, replica: int) -> bool:
        """Whether the newest generation of signer and front end is ready."""
        process = self.processes[f"keyserver-{replica}"]
        names = [event["event"] for event in process.events if event.get("event") in ("started", "ready")]
        return process.running and names[-1:] == ["ready"]

    def agent_sees_all(self) -> bool:
        """Whether the agent, by its own status, has every key server in use."""
        status = json.loads((self.run_dir / "agent-state" / "status.json").read_text())
        return all(server["available"] is not False for server in status["key_servers"])

    def part(self, replica: int, role: str) -> int:
        """The pid of a replica's `signer` or `front end` now."""
        for child in children_of(self.processes[f"keyserver-{replica}"].pid):
            is_signer = "keyreeve_keyserver.signer" in command_line(child)
            if is_signer == (role == "signer"):
                return child
        raise AssertionError(f"replica {replica} has no {role} now")

    def kill_group(self, replica: int) -> None:
        """SIGKILL to all processes of a replica, as a power failure would end them."""
        self.processes[f"keyserver-{replica}"].kill_group()

    def stop_group(self, replica: int, number: int) -> None:
        os.killpg(self.processes[f"keyserver-{replica}"].pid, number)

    def pids(self) -> dict[str, Any]:
        raise NotImplementedError("a replicated stack has several key servers: use `part`")
