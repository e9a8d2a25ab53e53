"""Production life of the runs: tracking (MLflow), versioning (DVC), registry and gate, turns."""
