"""A run's face: what a run has left in its folder, read into one record (`history`), and that record as one HTML file (`page`)."""
