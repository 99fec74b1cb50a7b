"""Training loop, logs and checkpoints."""
