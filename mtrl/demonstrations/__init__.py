"""Demonstrations: episodes of other policies, their files, and collecting them."""
