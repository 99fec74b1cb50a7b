"""Tasks, simulators and the vector environment that steps them, in task-major order."""
