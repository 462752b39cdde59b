"""Training that protects every row: per-row gradients, Poisson samples, noise, and the ledger that limits it."""
