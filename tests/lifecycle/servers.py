import time
import urllib.request

START_S = 300.0
"""MLflow is up after half a minute on an idle machine with two cores."""


def wait_until_up(process, uri, log):
    """Until a server answers its health check; `log` is what it says meanwhile."""
    end_s = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end_s, log.read_text()[-3000:]
            time.sleep(0.2)
