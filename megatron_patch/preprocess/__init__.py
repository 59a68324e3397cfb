"""From text to indexed datasets: readers, encoders in worker processes, one writer that keeps the order."""
