"""Comparisons: one run per combination of settings, gathered into a table and a plot."""
