import json

import bghost

numbers = bghost.SharedQueue(1 << 16)  # made in the host, which imports this module before it forks


class Producer:
    """The end that sends."""

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker) -> None:
        self.out = numbers.sender(worker)

    @bghost.hookimpl
    def bghost_main(self, worker: bghost.Worker) -> None:
        for first in range(0, 10_000, 100):
            self.out.send_many([json.dumps({"number": first + n}).encode() for n in range(100)])


class Summer:
    """The end that receives, until the other is gone."""

    @bghost.hookimpl
    def bghost_setup(self, worker: bghost.Worker) -> None:
        self.source = numbers.receiver(worker)

    @bghost.hookimpl
    def bghost_main(self, worker: bghost.Worker) -> None:
        total = 0
        for message in self.source:
            total += json.loads(message)["number"]
        worker.log.info("the sum is {}", total)
