"""Says when this replica begins and ends to serve from memory alone, whatever the reason: an error, a hang, a database that is stopped."""

from __future__ import annotations

import asyncio

from keyreeve_common.telemetry import log, log_error, log_warning

from keyreeve_keyserver.frontend.access import Access, Freshness

_LOOK_S = 0.1


class FreshnessWatch:
    def __init__(self, access: Access) -> None:
        self._access = access
        self._said = Freshness.CURRENT
        self._worst_s = 0.0

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    def look(self) -> None:
        """Logs what changed since the last look."""
        staleness_s, limit_s = self._access.staleness_s, self._access.max_staleness_s
        found = self._access.freshness
        self._worst_s = max(self._worst_s, staleness_s)
        if found is self._said:
            return
        self._said = found
        if found is Freshness.CURRENT:
            log("catalog_current_again", away_s=round(self._worst_s, 1))
            self._worst_s = 0.0
        elif found is Freshness.CACHED:
            log_warning(
                "serving_from_cache",
                staleness_s=round(staleness_s, 1),
                max_staleness_s=limit_s,
                detail="what other replicas revoke is not seen meanwhile; check the database",
            )
        else:
            log_error("refusing_without_catalog", staleness_s=round(staleness_s, 1), max_staleness_s=limit_s)
