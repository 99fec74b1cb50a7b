"""Judging a policy, and filming it."""
