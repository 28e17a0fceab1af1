"""Which token of a module a PKCS#11 URI means. Imported by the worker only, since it loads python-pkcs11."""

from __future__ import annotations

from typing import Any

from keyreeve_common.errors import TokenUnavailable
from keyreeve_common.pkcs11_uri import Pkcs11Uri, TokenIdentity
from pkcs11 import exceptions as p11


def find_token(library: Any, wanted: Pkcs11Uri) -> Any:
    """The one token that the URI matches. A slot that cannot be read is passed over: another's fault is not ours.

    Raises: TokenUnavailable, which says what tokens there are.
    """
    seen: list[str] = []
    found: list[Any] = []
    for slot in library.get_slots(token_present=True):
        try:
            token = slot.get_token()
        except (p11.PKCS11Error, UnicodeDecodeError) as error:
            seen.append(f"slot {slot.slot_id}: {type(error).__name__}")
            continue
        seen.append(repr(token.label))
        if wanted.matches(identity_of(library, slot, token)):
            found.append(token)
    if len(found) == 1:
        return found[0]
    fault = "several tokens match" if found else "no token matches"
    advice = "name one by its serial as well" if found else "initialise it, or correct `uri` or `token_label`"
    there = ", ".join(seen[:8]) or "none"
    raise TokenUnavailable(f"{fault} {wanted} (there are: {there}): {advice}")


def identity_of(library: Any, slot: Any, token: Any) -> TokenIdentity:
    return TokenIdentity(
        token=_text(token.label),
        manufacturer=_text(token.manufacturer_id),
        model=_text(token.model),
        serial=_text(token.serial),
        slot_id=int(slot.slot_id),
        slot_description=_text(slot.slot_description),
        slot_manufacturer=_text(slot.manufacturer_id),
        library_manufacturer=_text(library.manufacturer_id),
        library_description=_text(library.library_description),
        library_version=library.library_version,
    )


def _text(value: str | bytes) -> str:
    """Without the blanks of PKCS#11; some modules pad with zero bytes."""
    text = value if isinstance(value, str) else value.decode("utf-8", errors="replace")
    return text.rstrip(" \x00")
