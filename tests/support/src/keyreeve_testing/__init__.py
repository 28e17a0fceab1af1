"""Keyreeve: keyreeve_testing."""
