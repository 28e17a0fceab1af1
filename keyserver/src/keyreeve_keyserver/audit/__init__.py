"""The signer's audit log: what is recorded, and the append-only log on disk that a client verifies (docs/protocol/audit-log.md)."""
