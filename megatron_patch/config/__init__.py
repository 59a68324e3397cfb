"""Flags and YAML in, a resolved run out: options, parsing, requested stages, the plan, all checks."""
