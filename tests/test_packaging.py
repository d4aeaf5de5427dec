"""What is shipped: the lock file of the image, and the package's own data."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import checkout

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "deploy" / "requirements.lock").read_text()
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
REQUIREMENTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_names_every_dependency_with_hashes_and_no_place() -> None:
    """Law: what pyproject.toml requires is locked, in a version that it allows; each has hashes; no host, no path."""
    for requirement in map(Requirement, REQUIREMENTS):
        pin = PINS.get(canonical(requirement.name))
        assert pin is not None, f"run `make lock`: {requirement}"
        assert requirement.specifier.contains(pin), f"run `make lock`: {requirement}, locked {pin}"
    entries = re.split(r"\n(?=\w)", LOCK.strip())
    assert len(entries) == len(PINS)
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|@|--index|--find-links", LOCK)


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_the_lock_is_closed(python: str) -> None:
    """Law: whatever a locked package requires is locked, too (pip is told to look for nothing), and nothing else is.

    What packages require is taken from those that are installed here, which may be of other versions.
    """
    told = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    left = [Requirement(one) for one in REQUIREMENTS]
    found = set()
    while left:
        name = canonical(left.pop().name)
        if name in found:
            continue
        found.add(name)
        left += [
            one
            for one in map(Requirement, metadata.requires(name) or ())
            if one.marker is None or one.marker.evaluate(told)
        ]
    assert found == set(PINS), f"run `make lock`: {sorted(found ^ set(PINS))}"


def test_a_package_has_every_file_that_is_no_module() -> None:
    """Law: what the program reads of its own folders is in wheel, sdist, image and Debian package: all of one list."""
    patterns = SETUPTOOLS["package-data"]["kvmsupervisor"]
    files = [path for path in checkout.files() if str(path).startswith("kvmsupervisor/")]
    for path in files:
        if path.suffix != ".py":
            assert any(path.relative_to("kvmsupervisor").match(pattern) for pattern in patterns), path
    assert any(path.name == "list.js" for path in files)


def test_the_image_takes_what_it_is_made_of_and_nothing_else() -> None:
    """Law: .dockerignore lets in exactly what the Dockerfile copies."""
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    sources = {word for line in copied for word in line.split()}
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert sources == allowed
