"""Where simulated clients run: threads of this process, or Flower's runtime on Ray."""
