"""From batches to a model."""
