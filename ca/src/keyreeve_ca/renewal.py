"""What happens by itself: prune, withdraw, rotate authorities, renew SVIDs and grants, renew the services' own SVIDs.

One round after another; each step stands for itself, and one that fails is logged and tried again in the next round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from keyreeve_common.errors import Conflict, KeyreeveError, Unavailable
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log, log_exception, log_warning

from keyreeve_ca.assignment_service import sync_agent
from keyreeve_ca.authority_service import rotate_authorities
from keyreeve_ca.domain.authority import AuthorityAction
from keyreeve_ca.entry_service import prune_expired_entries
from keyreeve_ca.own_svids import OwnSvid, certify_key_server, key_server_is_due
from keyreeve_ca.rotation_service import retire_former_keys
from keyreeve_ca.service import Ca
from keyreeve_ca.withdrawal_service import withdraw_grants

LOOKED_AT_A_ROUND = 50  # agents for which nothing is known to be due


@dataclass
class Renewal:
    """Called from a worker thread: `changed` when a round changed what nodes must see, `recovered` when a step works again that had failed."""

    ca: Ca
    own: OwnSvid
    key_server_id: SpiffeId
    changed: Callable[[], None] = lambda: None
    recovered: Callable[[], None] = lambda: None
    _failing: set[str] = field(default_factory=set)
    _looked_at: str = ""  # the last agent that a round looked at without a cause

    async def run(self, interval: timedelta) -> None:
        """Rounds until it is cancelled."""
        while True:
            await asyncio.to_thread(self.round)
            await asyncio.sleep(interval.total_seconds())

    def round(self) -> None:
        steps: dict[str, Callable[[], None]] = {
            "prune": self._prune,
            "withdraw_grants": lambda: withdraw_grants(self.ca),
            "retire_former_keys": lambda: retire_former_keys(self.ca),
            "rotate_authorities": self._rotate,
            "renew_own_svid": self._renew_own,
            "renew_key_server_svids": self._renew_key_servers,
            "renew_assignments": self._renew_assignments,
        }
        for name, step in steps.items():
            self._try(name, step)

    def _try(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Conflict as error:  # another instance was first
            log("background_step_overtaken", step=name, detail=error.detail)
        except KeyreeveError as error:
            self._failing.add(name)
            log_warning("background_step_failed", step=name, code=error.code.value, detail=error.detail)
        except Exception:
            self._failing.add(name)
            log_exception("background_step_failed", step=name)
        else:
            if name in self._failing:
                self._failing.discard(name)
                log("background_step_recovered", step=name)
                self.recovered()

    def _prune(self) -> None:
        self.ca.store.prune_join_tokens(self.ca.clock())
        self.ca.store.prune_change_log()
        if prune_expired_entries(self.ca):
            self.changed()

    def _rotate(self) -> None:
        if rotate_authorities(self.ca) is not AuthorityAction.NONE:
            self.changed()

    def _renew_own(self) -> None:
        if self.own.is_due():
            self.own.renew()

    def _renew_key_servers(self) -> None:
        failure: KeyreeveError | None = None
        for server in self.ca.cluster.replicas():
            try:
                if key_server_is_due(self.ca, server, self.ca.policy.service.ttl):
                    certify_key_server(self.ca, server, self.key_server_id)
            except KeyreeveError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _renew_assignments(self) -> None:
        """The agents for which something is due, and a few of the others in turn, for what only the key cluster knows.

        Agents that are connected are served by their stream as well; whoever comes first does the work. What fails for one agent does not
        stop the others, unless the store itself is away.
        """
        failure: Exception | None = None
        for agent in dict.fromkeys([*self.ca.store.agents_due(self.ca.clock()), *self._next_agents()]):
            try:
                sync_agent(self.ca, agent)
            except Unavailable:
                raise
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _next_agents(self) -> list[SpiffeId]:
        page = self.ca.store.list_agents(limit=LOOKED_AT_A_ROUND, after=self._looked_at)
        self._looked_at = str(page[-1].spiffe_id) if len(page) == LOOKED_AT_A_ROUND else ""
        return [agent.spiffe_id for agent in page if agent.may_act]
