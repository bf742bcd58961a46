"""What pytest loads beside a client library's own suite: where its servers are.

Some tests of the suites connect to where a client goes by default, localhost:2379. That may be another
server than the one under test, so the default itself is moved to TEST_SERVER_PORT.
"""

import importlib
import os
import sys

# The library, and where in it the default port is named.
DEFAULTS = {
    "etcd3": ["client.Etcd3Client.__init__", "client.client"],
    "aetcd": ["client.Client.__init__"],
    "etcd3gw": ["client.Etcd3Client.__init__"],
}


def moved(function, port):
    """Replaces the default host and port of `function`."""
    before = function.__defaults__
    if "localhost" not in before or 2379 not in before:
        raise RuntimeError(f"{function} connects to somewhere else by default: {before}")
    new = {"localhost": "127.0.0.1", 2379: port}
    function.__defaults__ = tuple(new.get(value, value) for value in before)


def pytest_configure():
    port = int(os.environ["TEST_SERVER_PORT"])
    library = os.environ["TEST_LIBRARY"]
    importlib.import_module(library)
    for path in DEFAULTS[library]:
        # `import etcd3.client` would answer the function of that name in the package.
        module, *names = path.split(".")
        found = sys.modules[f"{library}.{module}"]
        for name in names:
            found = getattr(found, name)
        moved(found, port)

    if library == "etcd3":
        limit_examples()


def limit_examples():
    """Fewer random examples: each starts an etcdctl or two.

    The suite was written for a hypothesis that did not yet mind fixtures that live for all examples. Its
    module loads a profile of its own, which takes from the one that is loaded here what it does not set.
    """
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "limited",
        max_examples=int(os.environ["TEST_EXAMPLES"]),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("limited")
