"""The component `score_shard`."""

from components.score_shard.component import score_shard

__all__ = ["score_shard"]
