"""Local servers are reached directly, whatever proxy the environment names for the rest of the network."""

from __future__ import annotations

import importlib.util
import os
import sys

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def reach_local_servers() -> None:
    """Add :data:`LOCAL_HOSTS` to ``no_proxy`` for this process and its children; call before clients are made. Idempotent.

    A proxy that httpx has no support for is taken out of the environment, with a warning: httpx would refuse to make any client, also one
    of a server that it reaches directly.
    """
    # Programs read the variable in lower case first, so the two get one value.
    listed = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    hosts = [host.strip() for host in listed.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in LOCAL_HOSTS if host not in hosts]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)
    supported = {"http", "https"} | ({"socks5", "socks5h"} if importlib.util.find_spec("socksio") else set())
    for name in [variable for variable in os.environ if variable.lower() in PROXIES]:
        scheme, colon, _ = os.environ[name].partition("://")
        if colon and scheme.lower() not in supported:
            del os.environ[name]
            hint = "; to use it: pip install socksio" if scheme.lower().startswith("socks5") else ""
            print(f"WARNING: the proxy of {name} is not used, {scheme}:// is not supported{hint}", file=sys.stderr, flush=True)
