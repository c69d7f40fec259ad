"""Pure decisions: what should happen, given what was seen.

No I/O, no clock, no asyncio here. Time comes in as an argument (seconds of a clock that
runs at a steady rate), effects go out as values. The simulator drives these very modules.
"""
