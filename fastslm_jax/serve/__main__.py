"""Serves a model over HTTP: OpenAI's interface, and a page at /.

    python -m fastslm_jax.serve --checkpoint=WORKDIR [--host=127.0.0.1] [--port=8000]
        [--api_key_file=FILE] [--model_name=NAME] [--max_minutes=60] …

Paths: /v1/audio/transcriptions, /v1/audio/translations, /v1/chat/completions, /v1/models, /health,
/metrics. SIGTERM and Ctrl-C finish the running requests and exit. See docs/serve.md.
"""

import asyncio
import functools
import importlib.util
import ipaddress
import pathlib
import signal
import socket
from collections.abc import Sequence

from absl import flags, logging

from fastslm_jax import cli
from fastslm_jax.errors import UserError

# The packages of the extra [serve]; imported in `main`, where their absence is one line.
EXTRA = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    string, integer, number = (
        functools.partial(define, flag_values=flag_values)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float)
    )
    string("checkpoint", None, "Working directory of a trained or imported model.", required=True)
    cli.define_step("step", "Checkpoint to use", flag_values)
    cli.define_bases(flag_values)
    flags.DEFINE_enum(
        "kv_cache",
        None,
        ["float32", "bfloat16", "int8"],
        "Type of the key-value cache (default: the model's).",
        flag_values=flag_values,
    )
    string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is reachable from other machines.")
    integer("port", 8000, "Port; 0: any free one.", lower_bound=0, upper_bound=65_535)
    string("api_key_file", None, "File with the key that clients must send (default: none).")
    string("model_name", None, "What clients call the model (default: the checkpoint's folder).")
    string(
        "span",
        "auto",
        "Length of the segments that long recordings are cut into: seconds, none, or auto.",
    )
    integer(
        "batch_size", 16, "Segments decoded at a time; fewer if the context is long.", lower_bound=1
    )
    number("max_megabytes", 200.0, "Largest request body, MiB: 413 beyond.", lower_bound=0.001)
    number("max_minutes", 60.0, "Longest recording: 413 beyond.", lower_bound=0.01)
    integer("max_requests", 64, "Requests that wait or run: 429 beyond.", lower_bound=1)
    number(
        "max_queue_minutes",
        480.0,
        "Audio of all requests that wait or run, 1.9 MB of memory a minute: 429 beyond.",
        lower_bound=0.01,
    )
    number("max_seconds", 600.0, "Time for a request: 408 beyond.", lower_bound=0.1)


def read_key(path: str | None) -> str | None:
    """The key in a file of one line.

    Raises:
        UserError: the file cannot be read, or has no key.
    """
    if path is None:
        return None
    try:
        key = pathlib.Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"--api_key_file={path}: {reason}") from None
    if not key or len(key.split()) > 1 or not key.isascii():
        raise UserError(f"--api_key_file={path}: must contain one key, without spaces")
    return key


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that the port is reserved while the model loads.

    Raises:
        UserError: the port is in use, or the address is not of this machine.
    """
    try:
        *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host={host}: {getattr(error, 'strerror', error)}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(0)  # two servers can bind a port, but only one can listen
    except OSError as error:
        listener.close()
        raise UserError(f"--host={host} --port={port}: {error.strerror}; use another") from None
    return listener


def main(argv: Sequence[str], options: flags.FlagValues = flags.FLAGS) -> None:
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}: options are --name=value (see --help)")
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the server needs {', '.join(missing)}: pip install 'fastslm-jax[serve]' "
            "(in a clone: pip install -e '.[serve]')"
        )
    import uvicorn

    from fastslm_jax.inference import api
    from fastslm_jax.serve.app import Server
    from fastslm_jax.serve.limits import Limits
    from fastslm_jax.serve.worker import Worker

    key = read_key(options.api_key_file)
    listener = bind(options.host, options.port)
    host, port = listener.getsockname()[:2]
    if key is None and not ipaddress.ip_address(host.split("%")[0]).is_loopback:
        logging.warning("anyone who reaches %s may use the model: set --api_key_file", host)
    model = api.load(
        options.checkpoint,
        options.step,
        options.whisper,
        options.llm,
        options.kv_cache,
        other_bases=options.other_bases,
    )
    name = options.model_name or pathlib.Path(options.checkpoint).resolve().name
    worker = Worker(model, options.batch_size, options.span)
    limits = Limits(
        round(options.max_megabytes * 2**20),
        options.max_minutes,
        options.max_requests,
        options.max_queue_minutes,
        options.max_seconds,
    )
    server = Server(worker, name, limits, key)
    worker.start()
    asyncio.run(server.warm_up())
    # uvicorn finishes running requests on these signals, and then raises them again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        server.app(), log_level="warning", access_log=False, server_header=False
    )
    shown = f"[{host}]" if ":" in host else host
    print(f"Serving {name} on http://{shown}:{port}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    define_flags()
    cli.run(main)
