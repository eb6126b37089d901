"""The commands that start a federation, as scripts: Flower's own, with every option written out.

In:  addresses and ports.
Out: bash. Each script stands in the folder it is about, and runs from anywhere.

`$FEDPET_VENV` names a virtual environment whose commands to use; else they come from the path.
"""

from __future__ import annotations

from shlex import quote

CONNECTION = "fedpet"  # the name of the server in Flower's own configuration

_START = """\
#!/usr/bin/env bash
# {title}
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
if [ -n "${{FEDPET_VENV:-}}" ]; then PATH="$FEDPET_VENV/bin:$PATH"; fi
export FLWR_HOME="$PWD/flwr"
# Flower sends telemetry and looks for updates unless told not to.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 TOKENIZERS_PARALLELISM=false
# A model from the hub is kept here: under systemd no other folder may be written to.
export HF_HOME="${{HF_HOME:-$PWD/cache/hub}}"
"""

# Flower wants the certificate's path in full, and this folder may have been moved.
_CONNECT = """
mkdir -p flwr
cat >flwr/config.toml <<CONFIG
[superlink]
default = "{name}"
[superlink.{name}]
address = "{address}"
root-certificates = "$PWD/ca.crt"
CONFIG
"""


def superlink(bind: str, port: int) -> str:
    """Starts the server; returns when it is stopped."""
    return _START.format(title="The server: SuperLink over TLS, open to registered nodes.") + (
        f"""
exec flower-superlink \\
    --host {quote(bind)} --port {port} \\
    --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key \\
    --enable-supernode-auth \\
    --database superlink.db \\
    --disable-runtime-dependency-installation "$@"
"""
    )


def register(address: str) -> str:
    """Registers the nodes' public keys with a running server.

    Args:
        address: Where this machine reaches it, "host:port".
    """
    start = _START.format(title="Once, with the server running: let the nodes in.")
    return (
        start
        + _CONNECT.format(name=CONNECTION, address=address)
        + f"""
status=0
for key in nodes/*.pub; do
    name=$(basename "$key" .pub)
    flwr supernode register "$key" {CONNECTION} --name "$name" || status=1
done
flwr supernode list {CONNECTION}
exit "$status"
"""
    )


def run(address: str) -> str:
    """Submits the run, shows its log, and exits as the run did.

    Args:
        address: Where this machine reaches the server, "host:port".
    """
    start = _START.format(title="Run the experiment; exits 0 only if something was learned.")
    return (
        start
        + _CONNECT.format(name=CONNECTION, address=address)
        + f"""
field() {{ python3 -c "import json, sys; print($1)" 2>/dev/null; }}

submitted=$(flwr run app {CONNECTION} --format json "$@") || true
if ! id=$(field 'json.load(sys.stdin)["run-id"]' <<<"$submitted"); then
    echo "The run could not be submitted: $submitted" >&2
    exit 1
fi
flwr log "$id" {CONNECTION} || echo "The log broke off; the run goes on." >&2
while :; do
    listed=$(flwr ls {CONNECTION} --run-id "$id" --format json) || true
    status=$(field 'json.load(sys.stdin)["runs"][0]["status"]' <<<"$listed") || status=unknown
    case "$status" in
    finished:completed) echo "Run $id: $status. Its folder is below $PWD/runs."; exit 0 ;;
    finished:* | unknown) echo "Run $id: $status." >&2; exit 1 ;;
    esac
    sleep 3
done
"""
    )


def supernode(address: str, port: int) -> str:
    """Starts a node; returns when it is stopped.

    Args:
        address: The server's, "host:port".
        port: Where the node's own processes meet, on this machine only.
    """
    return _START.format(title="A node: SuperNode, which dials out to the server and waits.") + (
        f"""
exec flower-supernode \\
    --superlink {quote(address)} --root-certificates ca.crt \\
    --auth-supernode-private-key node.key \\
    --node-config node.toml \\
    --host 127.0.0.1 --port {port} "$@"
"""
    )
