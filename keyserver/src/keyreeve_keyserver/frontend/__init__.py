"""The network-facing process: mTLS, callers, grants, batches. It holds sealed records and no key."""
