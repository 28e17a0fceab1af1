"""Forms of the audit log that its writer and its readers share: records, Merkle tree, tiles, signed notes, the journal. Pure, no I/O.

Spec: docs/protocol/audit-log.md; C2SP tlog-tiles, tlog-checkpoint, signed-note, tlog-cosignature; RFC 6962 2.1.
"""
