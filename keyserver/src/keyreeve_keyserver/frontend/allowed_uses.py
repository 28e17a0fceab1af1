"""What one caller may do in one batch: each pair of key and purpose is judged once, however many items ask for it."""

from __future__ import annotations

from datetime import datetime

from keyreeve_common.errors import PurposeNotPermitted
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.purposes import Purpose

from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.frontend.access import Access
from keyreeve_keyserver.frontend.rates import RateLimiter

# A provider declares no purpose for what it does not recognise.
_NO_PURPOSE = (
    "purpose unspecified is never signed: the message is no handshake of TLS 1.2 with ECDHE or of TLS 1.3, and no certificate "
    "request; allow only these in the program that asked"
)
_PURPOSES = frozenset(int(purpose) for purpose in Purpose if purpose is not Purpose.UNSPECIFIED)


class AllowedUses:
    """Belongs to one turn of the event loop: what it says is true of that moment."""

    __slots__ = ("_access", "_known", "_now", "_rates", "caller", "limited")

    def __init__(self, access: Access, rates: RateLimiter, caller: str, now: datetime) -> None:
        self.caller = caller
        self._access = access
        self._rates = rates
        self._now = now
        self._known: dict[tuple[str, int], KeyId] = {}
        self.limited: dict[KeyId, Grant] = {}  # whose rates are to be looked at

    def of(self, key_id: str, purpose: int) -> KeyId:
        """The key's id in its checked form.

        Raises: Quarantined, InvalidRequest, KeyNotFound, PurposeNotPermitted, KeyDisabled; a refusal is found anew for each item.
        """
        asked = (key_id, purpose)
        known = self._known.get(asked)
        if known is None:
            known = self._known[asked] = self._judged(key_id, purpose)
        return known

    def _judged(self, key_id: str, purpose: int) -> KeyId:
        if purpose == Purpose.UNSPECIFIED.value:
            raise PurposeNotPermitted(_NO_PURPOSE)
        if purpose not in _PURPOSES:
            raise PurposeNotPermitted(f"purpose {purpose} is not one that Keyreeve knows")
        checked = parse_key_id(key_id)
        grant = self._access.authorize(self.caller, checked, purpose, self._now)
        if grant is not None and self._rates.limits(grant):
            self.limited[checked] = grant
        return checked
