"""Samples: texts are read, filtered, tokenised, and served to the Trainer in batches."""
