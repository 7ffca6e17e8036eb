"""The embedded PostgreSQL: one cluster below the data directory, shared by every host that uses it.

What runs, and who ends it::

    host (and its workers)  --- shared flock on use.lock --.
    host (and its workers)  --- shared flock on use.lock --+-- keeper: waits for the exclusive lock, then stops
    bghost postgres psql    --- shared flock on use.lock --'          the server and goes
                                                            postmaster: the keeper's child, or adopted by it

The kernel lets go of a dead process's locks, so the server never outlives its users, whatever happened to them.

- :mod:`.binaries` finds the programs; :mod:`.place` says where everything lies and as whom the server runs;
- :mod:`.locks` are the lock files; :mod:`.server` is one PostgreSQL server: initdb, start, ready, stop;
- :mod:`.keeper` and :mod:`.holder` are the two processes that stay in the background, :mod:`.detached` starts them;
- :mod:`.lease` is what a user of the server holds, and the only module that a host needs.
"""
