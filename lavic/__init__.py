"""LaViC: recommend products in a conversation by looking at them. See README.md and docs/architecture.md."""

__version__ = "0.1.0"
