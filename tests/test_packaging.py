"""What is shipped: the lock file of the image, and the package's own data."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "deploy" / "requirements.lock").read_text()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_names_every_dependency_with_hashes_and_no_place() -> None:
    """Law: what pyproject.toml requires is locked; each package has hashes; no index, no path, no host's name."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {canonical(re.split(r"[<>=]", one)[0]) for one in requirements}
    entries = re.split(r"\n(?=\w)", LOCK.strip())
    locked = {canonical(entry.split("==")[0]) for entry in entries}
    assert wanted <= locked, f"run `make lock`: {sorted(wanted - locked)}"
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|@|--index|--find-links", LOCK)


def test_the_image_takes_what_it_is_made_of_and_nothing_else() -> None:
    """Law: .dockerignore lets in exactly what the Dockerfile copies."""
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    sources = {word for line in copied for word in line.split()}
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert sources == allowed
