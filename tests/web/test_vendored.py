"""Files of others that browsers get: as npm has them, with their licences, and nothing more."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from kvmsupervisor.web.vendored import FOLDER, files, manifest, path_of, vendored
from tests.web.conftest import Site

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "kvmsupervisor" / "web" / "static"


def test_the_files_are_those_of_the_manifest() -> None:
    """Law: each file has the digest that its package had, and there is no other one."""
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert there == files() | {"manifest.json"}
    for package in manifest()["packages"]:
        for path, digest in package["files"].items():
            data = (FOLDER / package["folder"] / path).read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest, path


def test_the_manifest_is_that_of_the_lock() -> None:
    """Law: the versions and digests of packages are those that npm has locked; the lock names no registry."""
    text = (ROOT / "tools" / "web" / "package-lock.json").read_text()
    assert "resolved" not in text
    assert "://" not in text
    locked = {
        name.removeprefix("node_modules/"): (one["version"], one["integrity"], one["license"])
        for name, one in json.loads(text)["packages"].items()
        if name
    }
    assert {one["name"]: (one["version"], one["integrity"], one["licence"]) for one in manifest()["packages"]} == locked
    wanted = json.loads((ROOT / "tools" / "web" / "package.json").read_text())["dependencies"]
    assert wanted == {name: version for name, (version, _, _) in locked.items()}


def test_each_has_its_licence() -> None:
    """Law: the text of a licence lies beside what it is for; a decision record names all."""
    record = "".join(path.read_text() for path in (ROOT / "docs" / "decisions").glob("*-consoles-in-the-browser.md"))
    for package in manifest()["packages"]:
        assert any("LICENSE" in path for path in package["files"])
        assert f"`{package['name']}` {package['version']}" in record
        assert package["licence"] in record


def test_no_page_of_others_is_served(site: Site) -> None:
    """Law: noVNC's own pages connect to any host that their address names, under this site's name."""
    assert not any(path.endswith((".html", ".map")) for path in files())
    assert site.get("/static/vendor/novnc-1.7.0/vnc.html").status == 404
    for path in ("../api.py", "manifest.json", "novnc-1.7.0/core/../../../api.py", "/etc/passwd", ""):
        assert vendored(path) is None
        assert site.get(f"/static/vendor/{path}").status == 404


def test_what_our_scripts_import_is_there(site: Site) -> None:
    """Law: each path in an import leads to a file, of a type that browsers take for a script."""
    found = [(path, name) for path in STATIC.glob("*.js") for name in re.findall(r'from "([^"]+)"', path.read_text())]
    assert any("xterm" in name for _, name in found)
    for path, name in found:
        reply = site.get(name if name.startswith("/") else f"/static/{name.removeprefix('./')}")
        assert (reply.status, reply.content_type) == (200, "text/javascript; charset=utf-8"), (path, name)
    reply = site.get(path_of("xterm.css"))
    assert (reply.status, reply.content_type) == (200, "text/css; charset=utf-8")
    assert "immutable" in reply.headers["Cache-Control"]
