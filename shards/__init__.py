"""Ray Data jobs over a catalogue's photos; installed as `lavic.shards`."""
