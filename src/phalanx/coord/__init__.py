"""Coordination: sessions, membership, elections, locks. They feed ``decide`` and do what it says."""
