"""The commands of ``bghost``, found by entry point; ``run`` alone brings host and worker code together."""
