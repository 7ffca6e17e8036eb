import bghost


class OwnLoop:
    @bghost.hookimpl
    def bghost_main(self, worker: bghost.Worker) -> None:
        rounds = 0
        for _ in worker.mainloop():  # interrupts, the host's death, a reload
            with worker.recovery():  # an exception inside is recovered, the loop goes on
                rounds += 1
                worker.log.info("round {}, woken by {}", rounds, sorted(worker.woken))
                if rounds == 2:
                    raise ValueError("this is logged, and the next round follows in a second")
                if rounds == 3:
                    return  # done: exit code 0, not started again
            worker.wait(0.1)
