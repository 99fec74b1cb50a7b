"""The loop, and what a run leaves on disk."""
