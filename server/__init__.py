"""The coordinator: Flower's ServerApp, the round loop, screening, commit and resume."""
