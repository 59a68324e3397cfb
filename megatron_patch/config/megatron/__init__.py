"""Megatron's command lines: a table of its flags (data), and their translation into the flags of this program."""
