"""Many processes that promote at once: `python -m tests.lifecycle.race homes|home VERSION...`.

Forked from one that has imported MLflow but not yet connected, so that they start together.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

from flowloom.lifecycle import registry, tracking
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import gate

NUM_PROCESSES = 20


def winner_of(shared, versions, evaluation):
    """Run the race by command: the one version that was promoted, where the others were refused."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.lifecycle.race", shared, *versions],
        input=json.dumps(evaluation),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    assert sorted(statuses) == [0] + [2] * (len(versions) - 1), done.stderr
    return versions[statuses.index(0)]


def main(arguments):
    apart, versions = arguments[0] == "homes", arguments[1:]
    import mlflow.tracking.client  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401

    evaluation = json.load(sys.stdin)
    root, uri = Path(os.environ["FLOWLOOM_HOME"]), tracking.tracking_uri()
    starting, start = os.pipe()
    children = []
    for number, version in enumerate(versions):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.close(start)
        status = 1
        try:
            if apart:  # a machine of its own: nothing is shared but the tracker
                os.environ["FLOWLOOM_HOME"] = str(root / f"machine-{number}")
            os.environ["MLFLOW_TRACKING_URI"] = uri
            os.read(starting, 1)
            decision = registry.promote(version, gate(evaluation, GateConfig()))
            status = 0 if decision.promoted else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(start)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(sys.argv[1:])
