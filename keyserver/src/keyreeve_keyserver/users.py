"""The users that a supervisor started as root gives its children: each its own, without groups of root's."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass

from keyreeve_common.errors import ConfigInvalid


@dataclass(frozen=True, slots=True)
class User:
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def find_user(name: str, key: str) -> User | None:
    """The user of this name, with the groups that the host gives it; None for no name. Raises: ConfigInvalid."""
    if not name:
        return None
    if os.geteuid() != 0:
        raise ConfigInvalid(f"{key}: only a supervisor that root started can give its children other users")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ConfigInvalid(f"{key}: this host has no user {name!r}: make it, or correct the key") from None
    groups = os.getgrouplist(name, entry.pw_gid)
    return User(entry.pw_uid, entry.pw_gid, tuple(groups), entry.pw_dir)
