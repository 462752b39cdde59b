"""The demo's base model, and the program that made it."""
