"""``python -m examples.demo``: a cluster on this machine, five faults, and what a client saw of them."""
