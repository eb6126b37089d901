"""Keeping it running: systemd units, and a compose file to try a deployment on one machine.

In:  where a folder is installed, and the nodes' names.
Out: text.
"""

from __future__ import annotations

from collections.abc import Iterable

_UNIT = """\
# Copy this folder to {folder}, make a user fedpet and the environment {venv}, then:
#   cp {file} /etc/systemd/system/ && systemctl enable --now {file}
[Unit]
Description={description}
Wants=network-online.target
After=network-online.target

[Service]
User=fedpet
WorkingDirectory={folder}
Environment=FEDPET_VENV={venv}
ExecStart={folder}/{script}
Restart=always
RestartSec=10
Nice=10
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ProtectHome=true
ReadWritePaths={folder}

[Install]
WantedBy=multi-user.target
"""


def unit(*, file: str, folder: str, venv: str, script: str, description: str) -> str:
    """A systemd unit that starts one of the scripts."""
    return _UNIT.format(file=file, folder=folder, venv=venv, script=script, description=description)


def dockerfile(packages_file: str = "") -> str:
    """The image of server and nodes alike.

    Args:
        packages_file: Of the app; what it names is installed too, without what that asks for.
    """
    text = """\
# For server and nodes alike; the folder of each is mounted where it starts.
FROM python:3.12-slim
COPY server/app /app
RUN pip install --no-cache-dir /app
"""
    if packages_file:
        text += f"RUN pip install --no-cache-dir --no-deps -r /app/{packages_file}\n"
    return text


def compose(names: Iterable[str], host: str, port: int) -> str:
    """The server and all nodes in containers of one image.

    Nodes reach the server under the host's name, which its certificate bears; where that is an
    address, through the port it is published on.
    """
    text = f"""\
# The whole federation on one machine, to try it:
#   docker compose up --build -d
#   docker compose exec server bash register.sh
#   docker compose exec server bash run.sh
services:
  server:
    build: .
    working_dir: /server
    command: bash superlink.sh
    volumes: ["./server:/server"]
    networks: {{federation: {{aliases: ["{host}"]}}}}
    ports: ["{port}:{port}"]
"""
    for name in names:
        text += f"""\
  node-{name}:
    build: .
    working_dir: /node
    command: bash supernode.sh
    volumes: ["./nodes/{name}:/node"]
    networks: [federation]
    depends_on: [server]
    restart: unless-stopped
"""
    return text + "networks:\n  federation:\n"
