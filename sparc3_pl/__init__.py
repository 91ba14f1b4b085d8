"""Attribution-guided pruning of language models after SparC3 (arXiv 2506.13727), on PyTorch Lightning."""

__version__ = "0.1.0"
