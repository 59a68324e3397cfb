"""Tokenizers: one interface, and a loader for each kind of tokenizer file."""
