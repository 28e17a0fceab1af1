"""Keyreeve: keyreeve_ca."""
