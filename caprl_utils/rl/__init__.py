"""Training a captioner by reinforcement learning: rewards, data, trainer, and the process that runs it."""
