"""Contrast, selection, the plan, and the edit of a model."""
