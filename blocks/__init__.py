"""Configuration, credentials, and what the verbs need. ``PROVIDERS`` tells who exists."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.errors import unknown_name_message

if TYPE_CHECKING:
    from blocks.credentials import AccessRef
    from blocks.provider import Provider

# name -> "module:Class"; a module is imported when its provider is asked for.
PROVIDERS: dict[str, str] = {
    "local": "blocks.providers.local_process:LocalProvider",
    "kubernetes": "blocks.providers.kubernetes_job:KubernetesProvider",
}


def load_provider(name: str, settings: dict[str, Any] | None = None, access: AccessRef | None = None) -> Provider[Any]:
    """The provider `name` with `settings` (its own defaults where None), which reaches the store of its runs by `access`.

    Raises ConfigError for an unknown name or setting.
    """
    from blocks.errors import ConfigError

    if name not in PROVIDERS:
        raise ConfigError(unknown_name_message("provider", name, list(PROVIDERS)))
    module, _, class_name = PROVIDERS[name].partition(":")
    return getattr(import_module(module), class_name).from_settings(settings or {}, access)
