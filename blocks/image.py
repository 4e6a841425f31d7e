"""The trainer image of a run: found by its sources' hash, else built and pushed; always given as a digest that its registry confirmed.

What is there is looked for first, in the registry (no Docker is needed for that) and then in the engine. An image that goes to
several registries is pushed once and copied from registry to registry, so that it has one digest everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blocks.errors import ConfigError, ServiceUnavailable
from blocks.image_build import LABEL_CONTRACT, LABEL_SOURCE, BuildStep, run_build
from blocks.image_engine import Engine, LocalImage, connect
from blocks.image_ref import ImageRef
from blocks.image_source import DEFAULT_PLATFORM, BuildInput, find_root, hash_source, source_tag
from blocks.places import home
from blocks.registry_login import ECR, Identity, create_ecr_repository, find_login
from trainer.contract_version import CONTRACT_VERSION
from trainer.locks import holding

if TYPE_CHECKING:
    from blocks.job import CheckLine
    from blocks.registry import Manifest, Repository

DEFAULT_REPOSITORY = "trainyard-trainer"


def _ignore(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Told:
    """Whom progress is told: a line when something is decided, and what moves."""

    say: Callable[[str], None] = _ignore
    step: Callable[[BuildStep, float], None] = _ignore
    sent: Callable[[int, int], None] = _ignore


@dataclass(frozen=True)
class ImageSettings:
    """What a profile says of its image. Either `image`, or a `registry` (with a path, if it wants one) where ours is kept."""

    image: str = ""
    registry: str = ""
    repository: str = DEFAULT_REPOSITORY
    identity: Identity = field(default_factory=Identity)
    platform: str = DEFAULT_PLATFORM
    base: str = ""
    create_repository: bool = True

    def source(self) -> BuildInput:
        return BuildInput(find_root(), base=self.base, platform=self.platform)

    def place(self) -> ImageRef:
        """Raises ConfigError, also for a tag, which is made of the sources."""
        place = ImageRef.parse(f"{self.registry.strip('/')}/{self.repository}")
        if place.tag or place.digest:
            raise ConfigError(f"{self.repository!r} is more than a repository", hint="leave tag and digest out: the sources give them")
        return place


@dataclass(frozen=True)
class BuildOptions:
    """`force` builds although the image is there, `pull` besides on the base as its registry has it now. Without `build`, only what
    was built before is brought."""

    force: bool = False
    pull: bool = False
    build: bool = True
    network: str = ""

    @property
    def anew(self) -> bool:
        return self.force or self.pull


@dataclass(frozen=True)
class EnsuredImage:
    """`refs` by digest, one per registry; none where no registry was asked for."""

    refs: tuple[ImageRef, ...]
    tag: str
    why: str
    built: bool
    sent_bytes: int = 0
    image_id: str = ""


def open_repository(ref: ImageRef, identity: Identity) -> Repository:
    from blocks.registry import Repository

    return Repository(ref.registry, ref.repository, find_login(ref.registry, identity))


# --- One digest, verified --------------------------------------------------------------------------


def resolve_image(settings: ImageSettings) -> ImageRef:
    """The explicit image by digest. Raises ConfigError where it is missing, of another platform, or of another contract."""
    ref = ImageRef.parse(settings.image)
    with open_repository(ref, settings.identity) as repository:
        manifest = repository.find(ref.reference)
        if manifest is None:
            raise ConfigError(
                f"there is no image {ref}", hint=f"check the name; `trainyard image list --registry {ref.registry}` shows ours"
            )
        return ref.pinned(require_usable(repository, manifest, ref, settings.platform).digest)


def require_usable(repository: Repository, manifest: Manifest, ref: ImageRef, platform: str) -> Manifest:
    """The manifest for the platform, an index looked into. Raises ConfigError with what to do where it cannot train."""
    if manifest.is_index:
        manifest = _choose_platform(repository, manifest, ref, platform)
    config = repository.config(manifest)
    if config.platform != platform:
        raise ConfigError(
            f"the image {ref} is for {config.platform}, and {platform} is needed",
            hint=f"docker build --platform {platform} ..., or `trainyard image build`, which does so by itself",
        )
    require_contract(str(ref), config.labels)
    return manifest


def _choose_platform(repository: Repository, index: Manifest, ref: ImageRef, platform: str) -> Manifest:
    entries = [entry for entry in index.content["manifests"] if "platform" in entry]
    described = {f"{entry['platform'].get('os')}/{entry['platform'].get('architecture')}": entry["digest"] for entry in entries}
    if platform not in described:
        has = ", ".join(sorted(name for name in described if "unknown" not in name)) or "none"
        raise ConfigError(f"the image {ref} is not for {platform} (it is for {has})", hint=f"docker build --platform {platform} ...")
    manifest = repository.find(described[platform])
    if manifest is None:
        raise ConfigError(f"the image {ref} lacks its part for {platform}", hint="push it again")
    return manifest


def require_contract(name: str, labels: dict[str, str]) -> None:
    """Launcher and trainer must speak of the same things. Raises ConfigError."""
    label = labels.get(LABEL_CONTRACT)
    rebuild = "`trainyard image build` makes one that fits; or leave `image` empty and give the profile a registry"
    if label is None:
        raise ConfigError(f"{name} is no trainer image: it has no label {LABEL_CONTRACT}", hint=rebuild)
    if label != str(CONTRACT_VERSION):
        newer = label.isdecimal() and int(label) > CONTRACT_VERSION
        raise ConfigError(
            f"{name} was built by {'a newer' if newer else 'an older'} Trainyard (contract {label}, here {CONTRACT_VERSION})",
            hint="update Trainyard here, or name an older image" if newer else rebuild,
        )


# --- Find, or build and push -------------------------------------------------------------------------


def look_up_image(settings: ImageSettings) -> ImageRef | None:
    """What a run would use, by digest; None where it would be built first. Sends nothing. Raises ConfigError where neither is said."""
    require_said(settings)
    if settings.image:
        return resolve_image(settings)
    place, source = settings.place(), settings.source()
    source_hash = hash_source(source)
    with open_repository(place, settings.identity) as repository:
        manifest = find_built(repository, place.tagged(source_tag(source_hash)), source_hash, source.platform)
    return place.pinned(manifest.digest) if manifest else None


def choose_image(settings: ImageSettings, told: Told) -> ImageRef:
    """The image of a run: the explicit one, or ours, which is built and pushed where the registry lacks it."""
    require_said(settings)
    if settings.image:
        return resolve_image(settings)
    ensured = ensure_image(settings.source(), (settings,), told)
    return ensured.refs[0]


def require_said(settings: ImageSettings) -> None:
    if not settings.image and not settings.registry:
        raise ConfigError(
            "the profile says neither which image trains nor where one may be kept",
            hint="give it a registry (the image is built and pushed there by itself), or an image such as registry/trainer@sha256:...",
        )


def check_image(settings: ImageSettings) -> CheckLine:
    """For `check`: the image that would train, or what is wrong with it."""
    from blocks.job import CheckLine
    from trainer.errors import TrainyardError

    try:
        found = look_up_image(settings)
    except TrainyardError as exc:
        return CheckLine(name="image", ok=False, message=exc.message, fix=exc.hint, exit_code=int(exc.code))
    return CheckLine(name="image", ok=True, message=str(found) if found else f"built by the next run, for {settings.place().name}")


def find_built(repository: Repository, ref: ImageRef, source_hash: str, platform: str) -> Manifest | None:
    """The image under the tag of its sources. Another's image under that tag does not count: it is replaced."""
    manifest = repository.find(ref.reference)
    if manifest is None or manifest.is_index:
        return None
    config = repository.config(manifest)
    fits = config.platform == platform and config.labels.get(LABEL_CONTRACT) == str(CONTRACT_VERSION)
    return manifest if fits and config.labels.get(LABEL_SOURCE) == source_hash else None


@dataclass(frozen=True)
class _Place:
    ref: ImageRef
    repository: Repository
    settings: ImageSettings

    def prepare(self, told: Told) -> None:
        """Raises what a push would, before the build."""
        wanted = self.settings.create_repository and ECR.fullmatch(self.ref.registry)
        if wanted and create_ecr_repository(self.ref.registry, self.ref.repository, self.settings.identity):
            told.say(f"created the repository {self.ref.name}")
        self.repository.require_push()


def ensure_image(source: BuildInput, targets: Sequence[ImageSettings], told: Told, how: BuildOptions = BuildOptions()) -> EnsuredImage:
    """Finds the image of the sources in every registry, or brings it there. Nothing is returned that a registry did not confirm."""
    source_hash = hash_source(source)
    tag = source_tag(source_hash)
    with ExitStack() as stack:
        places = [_open_place(target, tag, stack) for target in targets]
        found = [None] * len(places) if how.anew else _find_everywhere(places, source_hash, source.platform)
        if places and all(found):
            refs = tuple(place.ref.pinned(manifest.digest) for place, manifest in zip(places, found, strict=True) if manifest)
            if len({ref.digest for ref in refs}) == 1:
                why = f"not built: {places[0].ref} is there, and nothing that it is made of has changed"
                return EnsuredImage(refs, tag, why, built=False)
        for place, manifest in zip(places, found, strict=True):
            if manifest is None:
                place.prepare(told)
        # One build of the same sources at a time on this machine; whoever waited finds it done.
        stack.enter_context(holding(home() / "images" / f"{tag}.lock", lambda who: told.say(f"waiting for {who}, which builds it")))
        return _bring(source, source_hash, places, found, told, how)


def _open_place(settings: ImageSettings, tag: str, stack: ExitStack) -> _Place:
    ref = settings.place().tagged(tag)
    return _Place(ref, stack.enter_context(open_repository(ref, settings.identity)), settings)


def _find_everywhere(places: Sequence[_Place], source_hash: str, platform: str) -> list[Manifest | None]:
    """All registries are asked at once."""

    def find(place: _Place) -> Manifest | None:
        return find_built(place.repository, place.ref, source_hash, platform)

    with ThreadPoolExecutor(max(1, len(places))) as pool:
        return list(pool.map(find, places))


def _bring(
    source: BuildInput,
    source_hash: str,
    places: Sequence[_Place],
    found: Sequence[Manifest | None],
    told: Told,
    how: BuildOptions,
) -> EnsuredImage:
    tag = source_tag(source_hash)
    first = next((number for number, manifest in enumerate(found) if manifest), None)
    built, why, image_id, sent = False, "not built: another registry has it", "", [0]
    if first is None or not places:
        image, built, why = _find_or_build(source, source_hash, told, how)
        told.say(why)
        image_id, first = image.id, 0
        if not places:
            return EnsuredImage((), tag, why, built, image_id=image_id)

        def on_push(done: int, total: int) -> None:
            sent[0] = done
            told.sent(done, total)

        with connect() as engine:
            manifest = _push(engine, image_id, places[0], on_push)
    else:
        manifest = found[first]
        assert manifest is not None
    refs: list[ImageRef] = []
    for number, place in enumerate(places):
        if number != first:
            copy_image(places[first].repository, manifest, place.repository, tag, told)
        refs.append(place.ref.pinned(manifest.digest))
    return EnsuredImage(tuple(refs), tag, why, built, sent_bytes=sent[0], image_id=image_id)


def _find_or_build(source: BuildInput, source_hash: str, told: Told, how: BuildOptions) -> tuple[LocalImage, bool, str]:
    tag = source_tag(source_hash)
    with connect() as engine:
        image = None if how.anew else engine.find(source_hash, source.platform)
    if image is not None:
        return image, False, f"not built: docker here has {tag}, and nothing that it is made of has changed"
    if not how.build:
        raise ConfigError(f"the image {tag} of these sources was not built here", hint="trainyard image build --registry ...")
    reason = "asked to" if how.anew else f"no image of these sources ({tag}) is in the registry or in docker here"
    told.say(f"building: {reason}")
    name = f"{DEFAULT_REPOSITORY}:{tag}"
    image_id = run_build(source, source_hash, name, told.step, network=how.network, pull=how.pull)
    return LocalImage(image_id, (name,), 0, "", source.platform, source_hash), True, f"built: {reason}"


def _push(engine: Engine, image_id: str, place: _Place, on_push: Callable[[int, int], None]) -> Manifest:
    try:
        digest = engine.push(image_id, place.ref, place.repository.login, on_push)
    except ServiceUnavailable:
        place.repository.require_push()  # the registry itself tells more: a full disk is but a 500 to the engine
        raise
    manifest = place.repository.find(digest)
    if manifest is None:
        raise ServiceUnavailable(f"the registry {place.ref.registry} does not have what was pushed ({digest})", hint="push again")
    return require_usable(place.repository, manifest, place.ref.pinned(digest), place.settings.platform)


def copy_image(source: Repository, manifest: Manifest, target: Repository, tag: str, told: Told) -> int:
    """From registry to registry, blobs first and the manifest last, byte for byte. Returns how much was sent."""
    if target.digest(manifest.digest) is None:
        lacking = [(digest, size) for digest, size in manifest.blobs if not target.has_blob(digest)]
    else:
        lacking = []
    total, done = sum(size for _, size in lacking), 0
    for digest, size in lacking:
        mounted = source.registry == target.registry and target.mount_blob(digest, source.repository)
        if not mounted:
            target.put_blob(digest, size, source.read_blob(digest))
        done += size
        told.sent(done, total)
    target.put(tag, manifest)
    if target.digest(manifest.digest) is None:
        raise ServiceUnavailable(f"the registry {target.registry} does not have what was copied to it", hint="try again")
    return total
