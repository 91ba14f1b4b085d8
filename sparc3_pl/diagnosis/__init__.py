"""Checks that scores, evidence and attribution are sound."""
