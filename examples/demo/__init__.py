"""``python -m examples.demo``: a cluster on this machine, nine faults, and what clients saw of them."""
