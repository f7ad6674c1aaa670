"""Trials on live networks."""
