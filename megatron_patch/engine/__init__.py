"""Everything that touches DeepSpeed: its configuration, the process groups, the optimizer, and the engines that train."""
