import bghost


class PollerSettings(bghost.Settings):
    naptime: float = 5.0
    directory: str = "."


class Poller:
    Settings = PollerSettings

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker[PollerSettings]) -> None:
        self.seen = 0

    @bghost.hookimpl
    def bghost_tick(self, worker: bghost.Worker[PollerSettings]) -> None:
        with worker.activity(f"looking at {worker.settings.directory}"):
            listing = worker.run(["ls", worker.settings.directory], capture_output=True, text=True, check=True)
        for name in listing.stdout.splitlines():
            worker.check_interrupts()  # a long computation gives a stop its chance
            self.seen = max(self.seen, len(name))
        worker.log.info("the longest name has {} characters", self.seen)

    @bghost.hookimpl
    def bghost_reload(self, worker: bghost.Worker[PollerSettings], old: PollerSettings, new: PollerSettings) -> None:
        if new.directory != old.directory:
            self.seen = 0

    @bghost.hookimpl
    def bghost_recover(self, worker: bghost.Worker[PollerSettings], error: Exception) -> bghost.Recovery:
        # The listing failed; everything is closed by now, the error is in the log, the next tick follows after a delay.
        return bghost.Recovery.CONTINUE
