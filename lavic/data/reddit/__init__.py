"""Conversations from dumps of Reddit and a catalogue of Amazon's items."""
