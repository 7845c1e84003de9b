"""LaViC: recommend products in a conversation by looking at them. See README.md and docs/architecture.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavic.recommend.recommender import Recommender as Recommender

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # On demand: `import lavic` needs no torch.
    if name == "Recommender":
        from lavic.recommend.recommender import Recommender

        return Recommender
    raise AttributeError(f"module 'lavic' has no attribute {name!r}")
