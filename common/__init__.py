"""The vocabulary every part shares: adapters, experiments, methods, tasks, wire and store."""
