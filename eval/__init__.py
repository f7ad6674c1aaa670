"""Measuring policies in either world, with the same metrics and the same tables."""
