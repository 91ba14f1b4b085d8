"""Sentences in pairs that are made for a tokenizer: indirect objects, years, agreement."""
