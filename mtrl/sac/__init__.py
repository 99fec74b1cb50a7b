"""Multi-task soft actor-critic: agent, replay buffer, losses and update."""
