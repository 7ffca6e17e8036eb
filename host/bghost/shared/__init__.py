"""Code that runs in the host, in workers and in commands alike; imports nothing of theirs."""
