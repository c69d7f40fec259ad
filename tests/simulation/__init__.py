"""The simulator: the very modules of ``phalanx.decide``, driven through faults in virtual time.

``python -m tests.simulation --help``. A schedule is one seed: the same seed gives the same schedule,
event by event, on every machine and whatever PYTHONHASHSEED is.
"""
