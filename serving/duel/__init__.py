"""Duels on live answers, and their judges."""
