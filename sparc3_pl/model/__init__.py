"""Loading a model, its structure, its identity, and changes to it that are put back."""
