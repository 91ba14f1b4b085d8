"""Which components a plan takes: contrasts, scopes, controls."""
