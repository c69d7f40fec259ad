"""The pytest plugin of ``phalanx.testing``."""
