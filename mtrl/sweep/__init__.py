"""Sweeps: planning many runs, and running them on one machine or a cluster."""
