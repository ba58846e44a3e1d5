"""A reward on a Ray cluster: the application of `server`, once in each replica of a Ray Serve deployment."""

import os
from collections.abc import Mapping
from typing import Any

from burnish.errors import UserError


def deploy(
    source: str,
    settings: Mapping[str, Any] | None = None,
    *,
    replicas: int = 1,
    gpus_each: float = 0.0,
    token_variable: str = "BURNISH_REWARD_TOKEN",
    batch_size: int = 64,
    host: str = "0.0.0.0",
    port: int = 8000,  # Ray Serve's own
    name: str = "reward",
) -> str:
    """Serve `load_reward(source, settings)` at http://host:port, to be asked by `client.remote`; gives that address.

    Each replica holds the reward, on its own GPU share where `gpus_each` > 0, and judges at most `batch_size` pictures
    together. `token_variable`: the variable with the token, read here; "" lets anyone in. Joins the cluster that
    RAY_ADDRESS names, or starts one on this machine; returns when all replicas answer; `ray.serve.shutdown()` ends it.
    Differs from: one `server`, which answers a retry from memory. A replica remembers its own answers only, so with
    several of them a retry may be judged a second time.
    """
    token = os.environ.get(token_variable, "").strip() if token_variable else None
    if token == "":
        raise UserError(f'reward on ray: {token_variable} is not set; export a token, or give token_variable=""')
    try:
        import ray  # pyright: ignore[reportMissingImports]: an extra of its own
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("reward on ray: ray[serve] is not installed; pip install 'burnish[ray]'") from error

    def build() -> Any:  # in the replica: what it holds is not sent there
        from burnish.rewards.load import load_reward
        from burnish.rewards.remote.server import create_app

        device = "cuda" if gpus_each else None
        reward = load_reward(source, settings, batch_size=batch_size, device=device)
        return create_app(reward, token=token, batch_size=batch_size)

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    serve.start(http_options={"host": host, "port": port})
    deployment = serve.deployment(
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus_each},
        max_ongoing_requests=64,  # with Serve's 5 only so many could be judged together
    )
    serve.run(deployment(serve.ingress(build)()).bind(), name=name, route_prefix="/")
    return f"http://{ray.util.get_node_ip_address() if host == '0.0.0.0' else host}:{port}"
