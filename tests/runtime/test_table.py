"""The worker table: workers cannot write the host's words, and what they write into their own does the host no harm."""

import re

from support import StartHost, until

FORGER = """
import ctypes, fcntl, mmap, os
import bghost

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p


def refused(what, call, *errors):
    try:
        call()
    except errors:
        return
    raise AssertionError(f"{what} works")


def mprotect(address, size):
    if libc.mprotect(ctypes.c_void_p(address), size, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        control = worker.slot.control
        assert control.readonly
        refused("a store", lambda: control.__setitem__(6, 1), TypeError)
        refused("a text", lambda: worker.slot.name.write("other"), TypeError)
        refused("a store into the head", lambda: worker._table.head.__setitem__(1, 1), TypeError)

        fds = [fd for fd in os.listdir("/proc/self/fd") if fd != "0"]
        links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in fds if os.path.lexists(f"/proc/self/fd/{fd}")}
        files = [fd for fd, link in links.items() if "memfd:bghost-control" in link]
        assert files
        for fd in files:
            for file in (int(fd), os.open(f"/proc/self/fd/{fd}", os.O_RDWR)):
                refused("mmap", lambda: mmap.mmap(file, 4096), OSError)
                refused("write", lambda: os.pwrite(file, b"x", 0), OSError)
                refused("ftruncate", lambda: os.ftruncate(file, 0), OSError)
                refused("fallocate", lambda: fallocate(file), OSError)
                mmap.mmap(file, 4096, prot=mmap.PROT_READ).close()  # it is the right file
                mmap.mmap(file, 4096, flags=mmap.MAP_PRIVATE).close()  # a copy is nobody's harm

        with open("/proc/self/maps") as maps:
            mapped = [line.split() for line in maps if "memfd:bghost-control" in line]
        assert mapped and all(words[1] == "r--s" for words in mapped), mapped
        for words in mapped:
            start, end = (int(address, 16) for address in words[0].split("-"))
            refused("mprotect", lambda: mprotect(start, end - start), OSError)
        worker.log.info("note: passed")
        return bghost.UNTIL_WOKEN


def fallocate(fd):
    if libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)) != 0:  # punch a hole, which reads as zeros
        raise OSError(ctypes.get_errno(), "fallocate")
"""


def test_a_worker_cannot_write_the_words_of_the_host(bghost_host: StartHost) -> None:
    """Not through its view of them, nor through their file, however it is opened, nor by asking the kernel for more."""
    host = bghost_host(kinds={"forger": FORGER}, args=["run", "forger"], answering=False)
    assert "passed" in host.wait_line("note: passed|Error").text


SCRIBBLER = """
import random, time
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        slots = [worker._table.slot(index) for index in range(4)]
        chance = random.Random(1)
        worker.log.info("note: begins")
        while not worker.stopping:
            for slot in slots:
                size = 8 * len(slot.stats)
                slot.stats.cast("B")[:] = chance.choice((b"\\xff" * size, chance.randbytes(size), bytes(size)))
                for cell in (slot.activity, slot.wait, slot.last_error):
                    cell.write("\\x1b[2J" + chance.choice(("\\n", "\\r", "\\x00", "\\u2028")) * 500)
                time.sleep(0.005)
"""

VICTIM = """
import bghost

class Kind:
    @bghost.hookimpl
    def bghost_tick(self, worker):
        return bghost.UNTIL_WOKEN
"""


def test_the_host_believes_no_word_of_a_worker(bghost_host: StartHost) -> None:
    """A worker that fills its own slot and all others with anything: the host answers, shows it, and stops them all."""
    host = bghost_host(
        kinds={"scribbler": SCRIBBLER, "victim": VICTIM},
        config="""
            host.max_workers = 4
            worker = [{kind = "victim"}, {kind = "scribbler", tick_timeout = 0.2, stop_timeout = 30}]
        """,
        args=["run"],
    )
    host.wait_line(r"\[scribbler\] note: begins")
    for _ in range(20):
        rows = {row["name"]: row for row in host.client.ps()}
        assert rows.keys() == {"scribbler", "victim"}
        assert rows["scribbler"]["state"] in ("ready", "starting", "backoff")
        shown = host.bghost("ps")
        assert shown.code == 0
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028]", shown.stdout)
        assert len(shown.stdout.splitlines()) == 3
        host.client.status()
    stopped = host.client.stop("all")
    assert sorted(stopped["stopped"]) == ["scribbler", "victim"]
    until(lambda: {row["state"] for row in host.client.ps()} == {"stopped"})
    assert host.alive
    assert "bug of bghost" not in host.text()
