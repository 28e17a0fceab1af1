"""Where private keys live and sign: one module per kind, all under one contract suite (tests/contract/test_backends.py)."""
