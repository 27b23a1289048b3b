"""From a model to knowledge."""
