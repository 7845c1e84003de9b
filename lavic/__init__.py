"""LaViC: recommend products in a conversation by looking at them. See README.md and docs/architecture.md."""

__version__ = "0.2.0"
