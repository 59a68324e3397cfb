"""A study of the method: arms that cost the same (`arms`), and their runs as one table and one plot (`results`)."""
