"""The last look before a signature leaves: what was allowed when it was asked for may be forbidden by now.

Always true: once this replica knows of a revocation, a disabled key or a quarantine, no signature leaves that the change forbids, even one that
was asked for before. It costs one comparison for each piece of a batch, and a second judgement only after something changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.telemetry import log_warning

from keyreeve_keyserver.frames import Refused, Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.access import Access
from keyreeve_keyserver.frontend.audit_trail import AuditTrail
from keyreeve_keyserver.frontend.signer_link import OnResults


class ReleaseGate:
    def __init__(self, access: Access, clock: Callable[[], datetime], trail: AuditTrail | None = None) -> None:
        self._access = access
        self._trail = trail or AuditTrail()
        self._clock = clock

    def guard(self, caller: str, items: Sequence[SignItem], on_results: OnResults) -> OnResults:
        """`on_results` behind the gate. Call it in the same turn of the event loop in which `items` were judged."""
        access = self._access
        judged_under = access.generation

        def release(results: Sequence[SignResult]) -> None:
            if access.generation == judged_under and access.is_fresh:
                on_results(results)
            else:
                on_results(self._judged_again(caller, items, results))

        return release

    def _judged_again(
        self, caller: str, items: Sequence[SignItem], results: Sequence[SignResult]
    ) -> Sequence[SignResult]:
        by_id = {item.id: item for item in items}
        now = self._clock()
        released = [
            self._still_allowed(caller, by_id[result.id], result, now) if isinstance(result, Signed) else result
            for result in results
        ]
        withheld = sum(after is not before for after, before in zip(released, results, strict=True))
        if withheld:
            log_warning("signature_withheld", caller=caller, count=withheld)
        return released

    def _still_allowed(self, caller: str, item: SignItem, result: Signed, now: datetime) -> SignResult:
        try:
            self._access.require_fresh()
            self._access.authorize(caller, item.key_id, item.purpose, now)
        except KeyreeveError as error:
            self._trail.refused_item(
                caller, item, error
            )  # its signature is on record too: it was made, and did not leave
            return Refused(item.id, error)
        return result
