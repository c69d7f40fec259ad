"""Calls, events, locks, semaphores and a ring under load, kills and hand-overs, and a judgement of the
history."""
