"""Simulators, one vector environment each, task-major."""
