"""Model lines: versions, HEAD, lineage, holds and rollback."""
