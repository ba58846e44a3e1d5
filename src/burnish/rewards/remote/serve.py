"""`burnish reward serve`: a reward on this machine, for runs on others."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from burnish.errors import UserError
from burnish.rewards.cache import CachedReward
from burnish.rewards.load import load_reward
from burnish.rewards.models.network import Precision
from burnish.rewards.remote.server import create_app


def serve(
    source: str,
    settings: Mapping[str, Any] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 64,
    device: str | None = None,
    dtype: Precision = "float32",
    token_variable: str = "BURNISH_REWARD_TOKEN",
    cache: Path | None = None,
) -> None:
    """Serve `load_reward(source, settings)` until it is stopped.

    `token_variable`: the variable with the token that clients have to send; "" lets in anyone who reaches the port.
    `cache`: a file that keeps what was said of a picture, also over a restart. Raises UserError for a reward that
    cannot be loaded, a token that is not set, an address that is taken.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError("reward serve needs uvicorn and fastapi: pip install 'burnish[remote]'") from error
    token = os.environ.get(token_variable, "").strip() if token_variable else None
    if token == "":
        raise UserError(
            f"reward serve: {token_variable} is not set: export a token that your runs know too, or give "
            "--token-variable '' to let in anyone who reaches the port"
        )
    reward = load_reward(source, settings, batch_size=batch_size, device=device, dtype=dtype)
    app = create_app(CachedReward(reward, cache) if cache else reward, token=token, batch_size=batch_size)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
    Console(highlight=False).print(f"serving {source} at http://{host}:{port}; Ctrl-C stops it")
    try:
        server.run()
    except SystemExit as error:  # uvicorn has said in its log that it could not bind
        raise UserError(f"reward serve: http://{host}:{port} cannot be used: is another server there?") from error
