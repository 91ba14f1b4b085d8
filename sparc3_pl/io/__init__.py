"""Files that are written whole or not at all, and where results come from."""
