"""Keyreeve: keyreeve_client."""
