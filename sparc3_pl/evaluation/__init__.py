"""Perplexity, toxicity of completions, and the statistics that compare two evaluations."""
