"""Code that runs in worker processes alone."""
