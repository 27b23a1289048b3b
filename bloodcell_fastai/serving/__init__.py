"""From a model to use."""
