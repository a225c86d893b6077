"""By what NCCL talks between hosts: plain sockets are several times slower than the cards that a cluster has."""

import re
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from pretrain.runtime.findings import Finding

CHECK = "network of NCCL"

#: Lines in which NCCL tells its choice (src/init.cc, src/plugin/net.cc).
CHOICE = re.compile(r"(?:Using network|Assigned NET plugin) (\w+)")

#: NCCL's name for TCP.
SOCKET = "Socket"

CARDS = Path("/sys/class/infiniband")


def listen(environ: MutableMapping[str, str]) -> Path | None:
    """Have NCCL write what it chooses into a file; call it before the ranks meet.

    Returns:
        The file; None where the user has NCCL talk elsewhere, which stays as it is.
    """
    if {"NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS"} & environ.keys():
        return None
    path = Path(tempfile.mkdtemp(prefix="doctor_")) / "nccl"
    environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET", NCCL_DEBUG_FILE=str(path))
    return path


def judge_network(said: str, several_hosts: bool, environ: Mapping[str, str], cards: Path = CARDS) -> Finding:
    """Judge what NCCL said of its choice.

    Args:
        said: its lines.
        several_hosts: the ranks are on more than one.
        environ: of the process: sockets may be asked for.
        cards: folder in which the kernel lists InfiniBand and RoCE devices.
    """
    chosen = sorted(set(CHOICE.findall(said)))
    asked = environ.get("NCCL_NET") == SOCKET or environ.get("NCCL_IB_DISABLE") == "1"
    if not several_hosts:
        return Finding(CHECK, "ok", "one host")
    if not chosen:
        return Finding(CHECK, "warn", "not told by NCCL", "unset NCCL_DEBUG, NCCL_DEBUG_FILE and NCCL_DEBUG_SUBSYS")
    if SOCKET not in chosen or asked:
        return Finding(CHECK, "ok", ", ".join(chosen) + ", as asked for" * (SOCKET in chosen))
    there = sorted(card.name for card in cards.iterdir()) if cards.is_dir() else []
    value = f"plain sockets, beside {', '.join(there)}" if there else "plain sockets, no InfiniBand or RoCE device"
    advice = (
        "see that the container has libibverbs and /dev/infiniband, or the provider's plugin (aws-ofi-nccl), and "
        "NCCL_IB_HCA; NCCL_NET=Socket where nothing else is there"
    )
    return Finding(CHECK, "fail", value, advice)
