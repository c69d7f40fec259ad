"""Things to run and to copy from: ``python -m examples.demo``, ``phalanx run examples.wiki:platform``."""
