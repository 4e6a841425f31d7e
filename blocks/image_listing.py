"""Which trainer images there are, in a registry and in the Docker Engine here. Only looks."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.image_build import LABEL_SOURCE
from blocks.image_engine import Engine
from blocks.image_ref import ImageRef
from blocks.registry import Repository
from blocks.registry_login import Identity, find_login

MOST_LISTED = 100


@dataclass(frozen=True)
class ListedImage:
    """`current`: made of exactly the sources that are here now."""

    place: str
    tag: str
    digest: str
    bytes: int
    created: str
    platform: str
    source_hash: str
    current: bool


def list_registry(place: ImageRef, identity: Identity, source_hash: str) -> list[ListedImage]:
    """Newest first. A tag whose image cannot be one machine's (an index) is left out."""
    listed: list[ListedImage] = []
    with Repository(place.registry, place.repository, find_login(place.registry, identity)) as repository:
        for tag in sorted(repository.tags(), reverse=True)[:MOST_LISTED]:
            manifest = repository.find(tag)
            if manifest is None or manifest.is_index:
                continue
            config = repository.config(manifest)
            made_of = config.labels.get(LABEL_SOURCE, "")
            current = bool(made_of) and made_of == source_hash
            listed.append(ListedImage(place.name, tag, manifest.digest, manifest.bytes, config.created, config.platform, made_of, current))
    return sorted(listed, key=lambda image: image.created, reverse=True)


def list_engine(engine: Engine, source_hash: str) -> list[ListedImage]:
    return [
        ListedImage("here", tag, image.id, image.bytes, image.created, image.platform, image.source_hash, image.source_hash == source_hash)
        for image in engine.images()
        for tag in (image.tags or ("",))
    ]
