"""`/metrics`: a few numbers of the cluster and of this process, in the text format of Prometheus.

Few enough to be written by hand: the client library would be a tenth of this process's memory.
Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field

from kvmsupervisor.cluster.host_table import DRAINED, DRAINING, NO_SESSION, UNREADABLE, UP
from kvmsupervisor.domain.consoles import ConsoleKind
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.web.frame import State
from kvmsupervisor.web.list_page import PHASES
from kvmsupervisor.web.rows import Rank

PREFIX = "kvmsupervisor_web_"


@frozen(kw_only=True)
class Numbers:
    """What is counted of people.

    Attributes:
        acts: how many came to what, by act and outcome.
        refused: how many requests of nobody known, by reason.
        consoles: how many are open, by kind.
        opened: how many were, by kind.
        access: whether the files that say who may come in are in force as they are.
    """

    acts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    consoles: Mapping[str, int] = field(default_factory=dict)
    opened: Mapping[str, int] = field(default_factory=dict)
    access: bool = True


def metrics(
    *,
    state: State,
    viewers: int,
    phases: Mapping[str, int],
    ranks: Mapping[int, int],
    hosts: Mapping[str, int],
    requests: Mapping[int, int],
    numbers: Numbers,
) -> str:
    """The whole text.

    Args:
        state: of etcd.
        viewers: open streams.
        phases: how many instances are in each phase.
        ranks: how many have each rank.
        hosts: how many hosts are in each state.
        requests: how many were answered with each status.
        numbers: of people.
    """
    by_phase = [(f'{{phase="{phase}"}}', phases.get(phase, 0)) for phase in PHASES]
    by_state = [(f'{{state="{one}"}}', hosts.get(one, 0)) for one in (UP, DRAINING, DRAINED, NO_SESSION, UNREADABLE)]
    by_act = [(f'{{act="{act}",result="{result}"}}', n) for (act, result), n in sorted(numbers.acts.items())]
    by_reason = [(f'{{reason="{reason}"}}', n) for reason, n in sorted(numbers.refused.items())]
    by_console = [(f'{{console="{kind}"}}', numbers.consoles.get(kind, 0)) for kind in ConsoleKind]
    opened = [(f'{{console="{kind}"}}', numbers.opened.get(kind, 0)) for kind in ConsoleKind]
    by_code = [(f'{{code="{int(code)}"}}', number) for code, number in sorted(requests.items())]
    return "".join(
        (
            _family("etcd_up", "gauge", "Whether all that is shown is in step with etcd.", [("", int(state.in_step))]),
            _family("watch_revision", "gauge", "The etcd revision of what is shown.", [("", state.revision)]),
            _family("instances", "gauge", "Instances of the cluster by phase; unknown without a session.", by_phase),
            _family("problems", "gauge", "Instances that need a person.", [("", ranks.get(Rank.PROBLEM, 0))]),
            _family("hosts", "gauge", "Hosts of the cluster by state.", by_state),
            _family("viewers", "gauge", "Open streams of changes.", [("", viewers)]),
            _family("consoles", "gauge", "Open consoles, by kind.", by_console),
            _family("consoles_opened_total", "counter", "Consoles that were opened, by kind.", opened),
            _family("requests_total", "counter", "Requests answered, by HTTP status.", by_code),
            _family("acts_total", "counter", "Acts for one instance or host, by act and result.", by_act),
            _family("refused_total", "counter", "Requests of nobody who is known, by reason.", by_reason),
            _family(
                "access_in_force",
                "gauge",
                "Whether the files that say who may come in are in force as they are.",
                [("", int(numbers.access))],
            ),
        )
    )


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, int]]) -> str:
    lines = [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
    return "\n".join([*lines, *(f"{PREFIX}{name}{labels} {value}" for labels, value in samples), ""])
