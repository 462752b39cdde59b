"""What the command line does and shows, once its arguments are read."""
