"""Circuits: how much of a task is left when only its most relevant components stay, or when they are removed."""
