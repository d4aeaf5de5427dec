"""Rules of the house that no other tool checks, or that must not be forgotten when the tools' settings change."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import checkout

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kvmsupervisor"
LINE_LIMIT = 500
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project that is not ignored by git: its name, and what it holds."""
    for path in checkout.files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data:
            yield str(path), data.decode()


def broad_excepts(tree: ast.AST) -> Iterator[int]:
    """Lines of handlers that catch everything."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {item.id for item in caught if isinstance(item, ast.Name)}
            if node.type is None or names & {"Exception", "BaseException"}:
                yield node.lineno


def string_patches(tree: ast.AST) -> Iterator[int]:
    """Lines where something of ours is replaced whose name is in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            targets = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "target")]
            if called in {"setattr", "delattr", "patch"} and any(map(_names_us, targets)):
                yield node.lineno


def _names_us(target: ast.expr) -> bool:
    """Whether that is, or may be, the name of something of ours; one that is put together may be."""
    return isinstance(target, ast.JoinedStr) or (
        isinstance(target, ast.Constant) and str(target.value).startswith(f"{PACKAGE.name}.")
    )


def lint_imports(root: Path) -> tuple[int, str]:
    """Hold the contracts of pyproject.toml against the package in `root`; exit status, and what was printed."""
    checked = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return checked.returncode, checked.stdout


def test_imports_point_one_way() -> None:
    """From cli to supervisor to instance to adapters to domain; adapters do not know each other, the domain is pure."""
    status, said = lint_imports(ROOT)
    assert status == 0, said
    assert "0 broken" in said


def test_the_rooms_are_those_of_the_page() -> None:
    """docs/architecture.md names every room, and every module of the rooms between command line and adapters."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = set(re.findall(r"^\| `([\w/.]+)` \|", page, re.MULTILINE))
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    outside = rooms & {"cli", "adapters", "domain"}
    inside = {
        str(path.relative_to(PACKAGE))
        for room in rooms - outside
        for path in (PACKAGE / room).glob("*.py")
        if path.name != "__init__.py"
    }
    assert told == {f"{room}/" for room in rooms} | inside | {"aio.py", "failpoints.py", "folders.py"}
    for room in rooms:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())), room


PLANTED = {
    "gRPC outside of its adapter": ("adapters/ceph/client.py", "import grpc"),
    "settings in the domain": ("domain/lifecycle.py", "import kvmsupervisor.config.settings"),
    "an adapter that knows another": ("adapters/ceph/client.py", "import kvmsupervisor.adapters.network"),
    "a clock in the domain": ("domain/lifecycle.py", "import time"),
    "a module in no layer": ("stray.py", ""),
}


@pytest.mark.parametrize(("file", "line"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_is_found(file: str, line: str, tmp_path: Path) -> None:
    """The contracts have no hole where these were planted."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / PACKAGE.name / file).open("a") as module:
        module.write(f"\n{line}\n")
    status, said = lint_imports(tmp_path)
    assert (status, "1 broken" in said or file.removesuffix(".py") in said) == (1, True), said


def test_there_is_exactly_one_broad_except() -> None:
    """The one that contains a bug in one instance; any other would hide bugs."""
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in modules() for line in broad_excepts(ast.parse(path.read_text()))
    ]
    assert len(found) == 1, found


def test_a_broad_except_is_found_in_every_shape() -> None:
    """The check above can fail."""
    shapes = ("except:", "except Exception:", "except BaseException as e:", "except (OSError, Exception):")
    for shape in shapes:
        assert list(broad_excepts(ast.parse(f"try: pass\n{shape} pass"))) == [2], shape
    assert list(broad_excepts(ast.parse("try: pass\nexcept (OSError, ValueError): pass"))) == []


def test_every_folder_is_made_with_its_mode() -> None:
    """`mkdir(parents=True)` and `makedirs` make parents that the umask decides: with 0 they are open to everybody.

    Two may: one is in a file system of its own with a umask of its own, the demo is a person's own.
    """
    made = re.compile(r"parents=True|makedirs\(")
    found = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py") if made.search(file.read_text())}
    assert found == {"kvmsupervisor/adapters/apart/room.py", "kvmsupervisor/cli/demo/guest.py"}


def test_no_test_patches_our_modules_by_their_names() -> None:
    """What a test needs to be another one is given as an argument; a name in a string holds nothing together."""
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line in string_patches(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "planted",
    [
        "monkeypatch.setattr('kvmsupervisor.machine.spawn.kernel', fake)",
        "patch('kvmsupervisor.supervisor.supervisor.Clock')",
        "mock.patch(target='kvmsupervisor.cli.run')",
        "monkeypatch.setattr(f'{module}.kernel', fake)",
    ],
)
def test_a_patch_by_name_is_found(planted: str) -> None:
    """The check above can fail, and leaves others' modules alone."""
    assert list(string_patches(ast.parse(planted))) == [1]
    others = "monkeypatch.setattr('random.random', fake); monkeypatch.setattr(Wishes, 'lock_of', fake)"
    assert list(string_patches(ast.parse(others))) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_reads_in_one_sitting(path: Path) -> None:
    """Longer than 500 lines means: two modules."""
    assert len(path.read_text().splitlines()) <= LINE_LIMIT


def test_no_file_knows_where_it_was_written() -> None:
    """The path of this checkout, or of somebody's home, works on one machine only."""
    # Put together here, so that this file does not hold what it looks for.
    homes = re.compile("/ho" + r"me/(?!someone\b)\w+")
    place = str(ROOT) + "/"
    for name, text in texts():
        assert place not in text, name
        assert not homes.search(text), name


def test_links_between_the_projects_own_pages_lead_somewhere() -> None:
    """Relative links of every Markdown page."""
    for name, text in texts():
        if name.endswith(".md"):
            for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
                assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


def test_what_the_pages_say_about_make_is_so() -> None:
    """Every `make` target that a page names is there."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for name, text in texts():
        if name.endswith(".md"):
            for target in re.findall(r"`(?:KVM_DEMO_ONCE=1 )?make ([a-z-]+)`", text):
                assert target in targets, f"{name}: make {target}"


def test_ci_runs_what_people_run() -> None:
    """`.ci/run` can be executed, and calls `make test`."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test")


def test_every_dependency_has_a_lower_bound_and_a_reason() -> None:
    """`make lowest` tries the bounds; the decision record says why each package is there."""
    reasons = (ROOT / "docs" / "decisions" / "0001-dependencies.md").read_text()
    for requirement in PROJECT["dependencies"]:
        found = re.match(r"([\w.-]+)(>=|==)[\d.]+", requirement)
        assert found is not None, requirement
        assert f"`{found[1]}`" in reasons, found[1]
