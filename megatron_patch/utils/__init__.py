"""Small helpers that know nothing about training: files, units, console, records, registries."""
