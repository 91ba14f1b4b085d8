"""The passes of a Trainer over a model, and the parsers that read the settings of commands."""
