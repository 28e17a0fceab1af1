"""Keyreeve: keyreeve_keyserver."""
