"""Reports about runs: reads the folder of a run into one record (`history`), and writes records as one HTML file (`page`) or a plot."""
