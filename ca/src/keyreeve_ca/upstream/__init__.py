"""Parent authorities outside of the key cluster: one module per kind, each behind the port `UpstreamAuthority`."""

from __future__ import annotations

from keyreeve_common.errors import ConfigInvalid

from keyreeve_ca.config import UpstreamConfig
from keyreeve_ca.ports import UpstreamAuthority


def open_upstream(config: UpstreamConfig | None) -> UpstreamAuthority | None:
    """The configured one; None where the root is in the key cluster. Raises: ConfigInvalid when its extra is not installed."""
    if config is None:
        return None
    try:
        from keyreeve_ca.upstream.vault_pki import VaultPki  # noqa: PLC0415 - hvac is an extra
    except ImportError:
        raise ConfigInvalid("upstream: kind vault_pki needs the extra: install keyreeve-ca[vault]") from None
    return VaultPki(config.vault)
