"""Whether scores, evidence and attribution are sound."""
