"""Turns flags and YAML into a resolved run: options, parsing, checks, stage plan."""
