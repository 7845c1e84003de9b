"""Readers of a catalogue's file formats, as streams of records (JSON, csv, parquet), and of its photo links."""
