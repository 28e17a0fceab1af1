"""TLS 1.3 CertificateVerify contents: accepted exactly when a regular expression written from RFC 8446 4.4.3 accepts them."""

from __future__ import annotations

import re
import sys

from harness import main
from keyreeve_common.errors import PurposeMismatch
from keyreeve_keyserver.domain.purposes.tls13 import check_client_verify, check_server_verify

_FORM = rb" {64}TLS 1\.3, %s CertificateVerify\x00(?:.{32}|.{48})"
_CHECKS = {
    "server": (check_server_verify, re.compile(_FORM % b"server", re.DOTALL)),
    "client": (check_client_verify, re.compile(_FORM % b"client", re.DOTALL)),
}


def target(data: bytes) -> str:
    words = []
    for role, (check, form) in _CHECKS.items():
        try:
            check(data)
        except PurposeMismatch as error:
            accepted, word = False, re.sub(r"\d+ bytes,", "n bytes,", error.detail)
        else:
            accepted, word = True, f"{role} accepted {len(data)}"
        if accepted != (form.fullmatch(data) is not None):
            raise AssertionError(f"{role}: accepted is {accepted}, the form says otherwise")
        words.append(word)
    return " / ".join(words)


if __name__ == "__main__":
    sys.exit(main(target, "tls13"))
