"""By hand: ``python -m tests.cluster build``, ``up``, ``env`` (what to set to use it) and ``down``."""

from __future__ import annotations

import shlex
import sys

from tests.cluster.programs import build
from tests.cluster.rig import require_cluster, start_or_find, stop_cluster
from tests.shared_rig import starting


def main(verb: str) -> None:
    if verb == "build":
        build()
        return
    folder = require_cluster()
    with starting(folder):
        if verb == "down":
            (folder / "kept").unlink(missing_ok=True)
            stop_cluster(folder)
            return
        if verb == "up":
            (folder / "kept").touch()
        cluster = start_or_find(folder)
    for name, value in cluster.environment.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    if sys.argv[1:] not in (["build"], ["up"], ["env"], ["down"]):
        raise SystemExit("python -m tests.cluster build|up|env|down")
    main(sys.argv[1])
