"""Serving until SIGTERM or Ctrl-C, then ending what is begun."""

import argparse
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from qlora_runtime.console import warn_unverified
from qlora_runtime.errors import ArgumentError
from qlora_runtime.generating import GeneratingBundle, open_generating
from qlora_runtime.schema import read_manifest
from qlora_runtime.task import Seq2SeqTask
from qlora_runtime.task_bundle import TaskBundle

KEY_VARIABLE = "QLORA_RUNTIME_API_KEY"


def serve(options: argparse.Namespace) -> None:
    """Open the bundle and answer requests. The address is told on stderr once it can be asked.

    Raises:
        ArgumentError: the extra `serve` is not installed, a limit is out of range, or other machines could
            ask without a key.
        BundleError: as `Bundle.open`.
        OSError: the address is taken or not this machine's.
    """
    try:
        import uvicorn

        from qlora_runtime.server.app import Service
        from qlora_runtime.server.limits import Limits
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"serve needs {error.name}, which is not installed: pip install 'qlora-runtime[serve]'."
        ) from error
    limits = Limits(**{name: getattr(options, name) for name in vars(Limits())})
    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    loopback = _is_loopback(options.host)
    if not loopback and key is None and not options.without_key:
        raise ArgumentError(
            f"--host {options.host} lets other machines ask. Set a key in {KEY_VARIABLE}, or give "
            "--without-key."
        )
    bundle = _open(options)
    service = Service(
        bundle,
        options.name or Path(options.bundle).resolve().name,
        limits,
        key,
        ("localhost", "127.0.0.1", "[::1]") if loopback else ("*",),
    )
    config = uvicorn.Config(
        service.app(),
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        timeout_graceful_shutdown=options.grace_s,
    )
    with _bound(options.host, options.port) as listening:
        host, port = listening.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"qlora-runtime: {service.name} answers at {where}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, _ended)
        uvicorn.Server(config).run(sockets=[listening])


def _open(options: argparse.Namespace) -> GeneratingBundle | TaskBundle:
    task = read_manifest(options.bundle).task
    opened = open_generating if task is None or isinstance(task, Seq2SeqTask) else TaskBundle.open
    bundle = opened(options.bundle, not options.no_hashes, options.threads)
    warn_unverified(bundle.manifest)
    return bundle


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ended(signal_number: int, frame: FrameType | None) -> None:
    """The server has its own handler while it runs, and raises the signal again when all is done."""
