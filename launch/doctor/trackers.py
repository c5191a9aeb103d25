"""What a tracker lacks on this host. No tracker's failure ever stops a run."""

import importlib.util
import netrc
import os
import socket
from urllib.parse import urlsplit

from ...recipes.config import TrackingSection

REACH_S = 3.0
WANDB_URL = "https://api.wandb.ai"


def trackers(tracking: TrackingSection) -> list[str]:
    """Sentences, each of which names the tracker, what it lacks and the mend."""
    found = []
    wanted = {
        "wandb": ("wandb", tracking.wandb != "off"),
        "comet": ("comet_ml", tracking.comet != "off"),
        "tensorboard": ("tensorboard", tracking.tensorboard),
    }
    for name, (module, is_on) in wanted.items():
        if is_on and importlib.util.find_spec(module) is None:
            found.append(f"tracking.{name}: {module} is not installed; pip install {module}")
    if tracking.wandb == "online":
        found += _online("wandb", WANDB_URL, "WANDB_BASE_URL", "WANDB_API_KEY")
    if tracking.comet == "online" and not os.environ.get("COMET_API_KEY"):
        found.append("tracking.comet = online: COMET_API_KEY is not set; set it on this host")
    return found


def _online(name: str, url: str, url_variable: str, key_variable: str) -> list[str]:
    url = os.environ.get(url_variable, url)
    host = urlsplit(url).hostname or url
    offline = f"tracking.{name} = offline"
    found = []
    if not os.environ.get(key_variable) and not _has_login(host):
        found.append(
            f"tracking.{name} = online: no {key_variable} and no login for {host} in ~/.netrc; "
            f"set it there, or {offline}"
        )
    if problem := _unreachable(url):
        found.append(f"tracking.{name} = online: {problem}; open the way, or {offline}")
    return found


def _has_login(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _unreachable(url: str) -> str:
    """Why a URL's host, or the proxy before it, can't be reached; empty if it can."""
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    parts = urlsplit(proxy or url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), REACH_S).close()
    except OSError as error:
        return f"{host}:{port} can't be reached ({error.strerror or error})"
    return ""
