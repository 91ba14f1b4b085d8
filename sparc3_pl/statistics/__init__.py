"""Paired intervals and tests, agreement of rankings."""
