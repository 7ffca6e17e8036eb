"""Code that runs in the host process alone."""
