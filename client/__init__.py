"""The node: Flower's ClientApp, local training and evaluation, device profile."""
