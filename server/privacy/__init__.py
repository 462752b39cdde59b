"""Privacy of clients as a whole: their updates are clipped, added up and released with noise, and that is accounted."""
