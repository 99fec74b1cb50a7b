"""Evaluation and filming of policies."""
