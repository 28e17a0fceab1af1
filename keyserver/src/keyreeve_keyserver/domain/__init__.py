"""What a key is, and what may be signed with it: pure, no I/O, clock or randomness."""
