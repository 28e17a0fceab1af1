"""Says whether requirements.lock covers what the workspace's members ask for, and nothing else. Uses no network.

It walks from the members' requirements through the metadata of the installed packages, which were installed from that very lock.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = ("common", "keyserver", "keyserver/engine", "ca", "client", "bench", "tests/support")
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)(?:\s*;\s*([^\\]+?))?\s*\\?$", re.MULTILINE)
_ADDRESS = re.compile(r"https?://|@\s*(?:git|file)")


def main() -> int:
    text = (ROOT / "requirements.lock").read_text()
    locked = {canonicalize_name(name): pinned for name, pinned, _ in _LOCKED.findall(text)}
    problems = ["holds an address: docs/adr/0002 says why it must not"] if _ADDRESS.search(text) else []
    projects = [tomllib.loads((ROOT / path / "pyproject.toml").read_text()) for path in (".", *MEMBERS)]
    members = {canonicalize_name(project["project"]["name"]) for project in projects}
    pending = [Requirement(line) for project in projects for line in _asked_by(project)]
    reached: set[tuple[str, frozenset[str]]] = set()
    while pending:
        asked = pending.pop()
        name = canonicalize_name(asked.name)
        if name in members or (name, frozenset(asked.extras)) in reached:
            continue
        reached.add((name, frozenset(asked.extras)))
        problems += _problems_of(asked, locked.get(name))
        pending += _asked_by_installed(asked)
    conditional = {canonicalize_name(name) for name, _, marker in _LOCKED.findall(text) if marker}
    surplus = locked.keys() - {name for name, _ in reached} - conditional
    problems += [f"holds {name}, which nobody asks for" for name in sorted(surplus)]
    for problem in problems:
        print(f"requirements.lock: {problem}", file=sys.stderr)  # noqa: T201 - a command's answer
    if problems:
        print("run script/lock and commit requirements.lock", file=sys.stderr)  # noqa: T201
        return 1
    print(f"requirements.lock is up to date: {len(locked)} packages")  # noqa: T201
    return 0


def _asked_by(project: dict[str, dict[str, object]]) -> list[str]:
    table = project["project"]
    groups: list[object] = [table.get("dependencies", []), project.get("build-system", {}).get("requires", [])]
    for optional in (table.get("optional-dependencies", {}), project.get("dependency-groups", {})):
        groups += optional.values() if isinstance(optional, dict) else []
    return [line for group in groups if isinstance(group, list) for line in group if isinstance(line, str)]


def _problems_of(asked: Requirement, pinned: str | None) -> list[str]:
    if pinned is None:
        return [f"lacks {asked}"]
    if not asked.specifier.contains(pinned, prereleases=True):
        return [f"has {asked.name}=={pinned}, asked for is {asked}"]
    try:
        installed = version(asked.name)
    except PackageNotFoundError:
        return [f"has {asked.name}, which is not installed here: run script/bootstrap"]
    return [] if installed == pinned else [f"has {asked.name}=={pinned}, installed here is {installed}"]


def _asked_by_installed(asked: Requirement) -> list[Requirement]:
    try:
        lines = requires(asked.name) or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    extras = asked.extras or {""}
    return [
        need for need in found if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
    ]


if __name__ == "__main__":
    sys.exit(main())
