"""Runs on one page: what their folders hold, as data, and as a self-contained HTML file."""
