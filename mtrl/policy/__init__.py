"""Policies: networks that act, policy files and exports."""
