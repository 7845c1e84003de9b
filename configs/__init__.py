"""One yaml per command and scale; installed as `lavic.configs`, so `--config NAME` finds them."""
