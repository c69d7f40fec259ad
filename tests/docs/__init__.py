"""Tests of README.md and docs/: what they say is run, parsed or looked up.

A Python block is run as a node if it calls ``platform.run()``, by pytest if it has tests, else as a program.
A comment before it says otherwise: ``<!-- test: in on_active -->`` (the lines run in a hook, with ctx and
app), ``<!-- test: fragment: why -->`` (compiled only). A block whose first line is ``# mine.py`` is also put
beside the other blocks of its page under that name.
"""
