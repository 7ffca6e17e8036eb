"""Each distribution's wheel: what is in it, and that it works in an environment that has only what it declares."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDERS: Final = {
    "bghost": "host",
    "bghost_postgres": "plugins/bghost-postgres",
    "bghost_worker_spi": "contrib/worker_spi",
    "bghost_test_shm_mq": "contrib/test_shm_mq",
}
PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

pytestmark = pytest.mark.timeout(240)  # packages may have to come over the network

Install = Callable[[str], Path]


def run(*command: str | Path, code: int = 0) -> str:
    """The standard output of a command, which must end with *code*."""
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels, by import package."""
    target = tmp_path_factory.mktemp("wheels")
    folders = [ROOT / folder for folder in FOLDERS.values()]
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, *folders)
    return {wheel.name.split("-")[0]: wheel for wheel in target.iterdir()}


@pytest.fixture
def install(wheels: dict[str, Path], tmp_path: Path) -> Install:
    """Makes an environment with one wheel and what it declares; gives the environment's bin folder."""

    def install(package: str) -> Path:
        # Ours are given as constraints, not as requirements: they come only where they are declared.
        constraints = tmp_path / "constraints.txt"
        ours = [f"{name.replace('_', '-')} @ {wheel.as_uri()}\n" for name, wheel in wheels.items() if name != package]
        constraints.write_text((ROOT / "constraints.txt").read_text() + "".join(ours))
        run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
        python = tmp_path / "venv" / "bin" / "python"
        run(*PIP, "--python", python, "install", "--no-compile", "--constraint", constraints, wheels[package])
        return python.parent

    return install


@pytest.mark.parametrize("package", FOLDERS)
def test_a_wheel_holds_the_package_its_licence_and_nothing_else(wheels: dict[str, Path], package: str) -> None:
    """A wheel holds the modules of its package, py.typed, its metadata and the licence: no tests, no stray file."""
    with zipfile.ZipFile(wheels[package]) as wheel:
        names = set(wheel.namelist())
        [licence] = [name for name in names if name.endswith("LICENSE")]
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    source = ROOT / FOLDERS[package]
    expected = {
        str(path.relative_to(source))
        for path in (source / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert f"{package}/py.typed" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("package", FOLDERS)
def test_a_wheel_works_with_what_it_declares(install: Install, package: str) -> None:
    """In an environment of its own every module of the package imports, and ``bghost`` finds what it offers."""
    binaries = install(package)
    walk = (
        "import importlib, pkgutil, sys; package = importlib.import_module(sys.argv[1])\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)"
    )
    run(binaries / "python", "-W", "error", "-I", "-c", walk, package)

    assert "Usage: bghost" in run(binaries / "bghost", "--help")

    rows = json.loads(run(binaries / "bghost", "plugins", "--json"))
    assert [row for row in rows if row["state"] != "ok"] == []
    offered = {(row["type"], row["name"]) for row in rows if row["distribution"] == package.replace("_", "-")}
    assert (
        offered
        >= {
            "bghost": {("command", "run"), ("command", "ps")},
            "bghost_postgres": {("extension", "postgres"), ("command", "postgres")},
            "bghost_worker_spi": {("kind", "worker_spi"), ("kind", "worker_spi_feed")},
            "bghost_test_shm_mq": {("kind", "test_shm_mq"), ("command", "test-shm-mq")},
        }[package]
    )
