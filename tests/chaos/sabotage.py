"""Fencing switched off behind the supervisors' backs, to see that the judge finds it out."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

_LIAR = """\
#!/bin/sh
# Says that it has shut a client out, and lists it as shut out, and has done nothing.
until=2099-01-01T00:00:00.000000+00:00
case "$1 $2 $3" in
"osd blocklist add")
    echo "$4" >>{listed}
    echo "blocklisting $4 until $until (31536000 sec)" >&2
    ;;
"osd blocklist ls")
    between=
    printf '['
    while read -r address; do
        printf '%s{{"addr": "%s", "until": "%s"}}' "$between" "$address" "$until"
        between=,
    done <{listed}
    printf ']'
    ;;
*) exec {ceph} "$@" ;;
esac
"""


def lying_ceph(folder: Path) -> Path:
    """Make the program in `folder`, which is to be searched before others; return that."""
    real = shutil.which("ceph")
    assert real is not None, "ceph is missing: tools/install-system dev"
    listed = folder / "listed"
    listed.touch()
    program = folder / "ceph"
    program.write_text(_LIAR.format(listed=shlex.quote(str(listed)), ceph=shlex.quote(real)))
    program.chmod(0o755)
    return folder
