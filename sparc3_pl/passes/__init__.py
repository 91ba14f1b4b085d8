"""The passes of a Trainer over a model, the parsers that read settings, and the program around a command."""
