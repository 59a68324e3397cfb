"""Optimizers: which ones there are, the state that they keep, and Muon, whose update needs full matrices under every layout."""
