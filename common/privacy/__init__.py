"""Differential privacy that both sides need: what is asked for, what it costs, how noise is drawn."""
