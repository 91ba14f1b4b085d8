"""The Trainer, its processes and what they tell each other, progress and logging."""
