"""Per-row gradients in one backward pass: a rule per kind of layer, attached to a model for a while."""
