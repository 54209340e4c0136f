"""Figures of an analysis, one function each."""
