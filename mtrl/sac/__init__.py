"""Soft actor-critic for many tasks: agent, replay, losses and the update."""
