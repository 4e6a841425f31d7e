"""Profiles: saved Prefect Blocks, one class per provider, that say where and how to train. The only module of this room with Prefect.

A flow names a profile; `local` resolves in code, so that a first training needs no set-up.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal, Self

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from blocks import load_provider
from blocks.credentials import AccessRef
from blocks.dataset_sources import ENV_STORE, choose_store, split_staged
from blocks.errors import ConfigError, MissingExtra, ServiceUnavailable
from blocks.image import DEFAULT_REPOSITORY, ImageSettings
from blocks.image_ref import ImageRef
from blocks.image_source import DEFAULT_PLATFORM
from blocks.job import TrainRequest, WatchPolicy
from blocks.outputs import default_output_uri
from blocks.provider import Provider, describe_validation
from blocks.providers.kubernetes_settings import LEAST_KEEP_SECONDS, URL_PASSWORD, KubernetesSettings, is_pem
from blocks.registry_login import Identity
from trainer.errors import unknown_name_message
from trainer.storage import is_bucket, to_uri
from trainer.store_access import StoreAccess


class ImageFields(BaseModel):
    """Of a profile whose provider runs a container: which image trains, or where ours is kept. Beside `Block` as a base."""

    image: str = Field(
        default="", description="Image to train with, such as registry/trainer@sha256:.... Empty: ours, built and kept in the registry."
    )
    registry: str = Field(
        default="",
        description="Where the trainer image is kept: <account>.dkr.ecr.<region>.amazonaws.com, "
        "<region>-docker.pkg.dev/<project>/<repository>, <name>.azurecr.io, or another registry's host, with a path where it wants one.",
    )
    repository: str = Field(default=DEFAULT_REPOSITORY, description="Name of the image in the registry.")
    registry_user: str = Field(default="", description="Empty: the cloud's identity, or what `docker login` stored.")
    registry_password: SecretStr = Field(default=SecretStr(""), description="Password or token of registry_user.")
    registry_credentials: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$",
        description="Saved credentials to log in to Amazon ECR with, as type/name: aws-credentials/prod. Empty: the environment's.",
    )
    create_repository: bool = Field(default=True, description="Create the repository in Amazon ECR where it is missing.")
    image_base: str = Field(
        default="", description="Image to build on; by digest, it never changes. Empty: the one in docker/trainer.Dockerfile."
    )
    image_platform: Literal["linux/amd64", "linux/arm64"] = Field(default=DEFAULT_PLATFORM, description="What the machines that train run.")

    @model_validator(mode="after")
    def _images_are_named_well(self) -> Self:
        try:
            for text in filter(None, (self.image, self.image_base)):
                ImageRef.parse(text)
            if self.registry:
                ImageSettings(registry=self.registry, repository=self.repository).place()
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
        if bool(self.registry_user) != bool(self.registry_password.get_secret_value()):
            raise ValueError("registry_user and registry_password go together: give both, or neither")
        return self

    def image_settings(self) -> ImageSettings:
        slug = self.registry_credentials
        identity = Identity(
            self.registry_user, self.registry_password.get_secret_value(), (lambda: load_credentials(slug)) if slug is not None else None
        )
        return ImageSettings(
            image=self.image,
            registry=self.registry,
            repository=self.repository,
            identity=identity,
            platform=self.image_platform,
            base=self.image_base,
            create_repository=self.create_repository,
        )


class Profile(BaseModel):
    """What every profile has: where runs and datasets are kept, and what a stall is. Beside `Block` as a base.

    Written for a provider whose jobs run elsewhere, so that all they read and write is in a bucket.
    """

    output: str | None = Field(default=None, description="Bucket URI that keeps the runs. Empty: the folder runs of the store.")
    store: str | None = Field(default=None, description="Bucket URI that datasets are staged to. Empty: $TRAINYARD_STORE.")
    store_endpoint: str | None = Field(
        default=None, description="Address of an S3-compatible store (MinIO, R2, Ceph). Empty: the cloud's own."
    )
    store_credentials: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$",
        description="Saved credentials to reach the store from here, as type/name: aws-credentials/prod, "
        "azure-blob-storage-credentials/prod. Empty: the environment's. The training itself uses the identity of the machine it runs on.",
    )
    stall_factor: float = Field(
        default=30.0, ge=3, le=10_000, description="A training is stalled after so many times the usual time of a step without a step."
    )
    stall_min_seconds: float = Field(
        default=300.0, ge=5, le=86_400, description="Seconds without a step that are no stall yet, however short the steps are."
    )
    stall_phase_seconds: float = Field(
        default=3600.0, ge=60, le=7 * 86_400, description="Seconds of silence that are a stall while data is prepared or a model evaluated."
    )
    queue_limit_seconds: float | None = Field(
        default=None, ge=30, le=28 * 86_400, description="A job that did not start after so many seconds is stalled. Empty: no limit."
    )
    on_stall: Literal["warn", "stop", "restart"] = Field(
        default="warn", description="warn: only tell; stop: cancel the run; restart: a new attempt goes on from the checkpoint."
    )

    @model_validator(mode="after")
    def _shows_no_password(self) -> Self:
        """Of the profile alone: a run's record that has one can still be read. An error of the whole value shows nothing of it."""
        for name, instead in {"store_endpoint": "store_credentials names saved ones", "api_server": "token is for the cluster's"}.items():
            if "@" in (getattr(self, name, None) or ""):
                raise ValueError(f"{name} has a user or password in it, which is not shown here, but would be elsewhere: {instead}")
        for name, value in getattr(self, "env", {}).items():
            if URL_PASSWORD.search(value):
                why = "which would be shown with the Job: keep it in a Secret and name that by env_secret"
                raise ValueError(f"env: a URL in {name} has a password, {why}")
        return self

    @property
    def watch(self) -> WatchPolicy:
        """The fields of the same names as one value, for the run's record."""
        return WatchPolicy(**{name: value for name, value in self.model_dump().items() if name in WatchPolicy.model_fields})

    @property
    def access(self) -> AccessRef:
        """How stores are reached from here: those of datasets, and that of the runs."""
        return AccessRef(self.store_endpoint, self.store_credentials)

    @abstractmethod
    def provider(self) -> Provider[Any]: ...

    def choose_output(self, asked: str | None) -> str:
        """Where a run's record is kept. Raises ConfigError where that is no bucket."""
        store = self.store or os.environ.get(ENV_STORE)
        uri = asked or self.output or (f"{store.rstrip('/')}/runs" if store else None)
        if uri is None:
            raise ConfigError("nothing says where the runs are kept", hint=f"give the profile a store in a bucket, or --output {EXAMPLE}")
        return require_bucket(uri, "--output")

    def choose_store(self, request: TrainRequest) -> str:
        """Where the dataset is staged, or lies staged. Raises ConfigError where that is no bucket."""
        if staged := split_staged(request.dataset):
            return require_bucket(staged[0], "--store")
        if not (request.store or self.store or os.environ.get(ENV_STORE)):
            raise ConfigError("nothing says where the dataset is staged to", hint=f"give the profile a store, or --store {EXAMPLE}")
        return require_bucket(choose_store(request, self.store), "--store")

    def store_access(self, uri: str) -> StoreAccess | None:
        """How to reach the store from here; None where the environment says it. Raises ConfigError for credentials that do not fit."""
        return self.access.resolve(uri)


EXAMPLE = "s3://bucket/prefix"


def require_bucket(uri: str, option: str) -> str:
    if not is_bucket(uri):
        raise ConfigError(
            f"{uri} is on this machine, and the job runs elsewhere", hint=f"use a bucket, in the profile or by {option}: {EXAMPLE}"
        )
    return to_uri(uri)


class LocalProfile(Profile, Block):
    """Train on the machine where the Prefect worker runs."""

    _block_type_name = "Trainyard Local"
    _block_type_slug = "trainyard-local"
    _description = "Trains on the machine where the flow runs."
    model_config = ConfigDict(extra="forbid")

    # Prefect refuses a block whose fields all have defaults as a flow parameter; one is required.
    slots: int = Field(ge=1, le=64, description="Trainings at a time on this machine; others wait in a queue.")
    output: str | None = Field(default=None, description="Folder for runs. Empty: the runs folder in the user's home.")
    min_free_gib: float = Field(default=1.0, ge=0, description="Refuse to start with less free disk than this, in GiB.")
    store: str | None = Field(
        default=None, description="Bucket URI or folder that datasets are staged to. Empty: a folder of this machine."
    )
    cache_limit_gib: float = Field(
        default=50.0, gt=0, description="Datasets fetched from a store stay on this machine up to so many GiB; the least recently used go."
    )

    def provider(self) -> Provider[Any]:
        settings = {"slots": self.slots, "min_free_gib": self.min_free_gib, "cache_limit_gib": self.cache_limit_gib}
        return load_provider("local", settings, self.access)

    def choose_output(self, asked: str | None) -> str:
        return to_uri(asked or self.output or default_output_uri())

    def choose_store(self, request: TrainRequest) -> str:
        staged = split_staged(request.dataset)
        return staged[0] if staged else choose_store(request, self.store)


class KubernetesProfile(ImageFields, Profile, KubernetesSettings, Block):  # type: ignore[override]  # Block has its own model_dump
    """Train as Jobs of a Kubernetes cluster. Its fields are the provider's settings, and those of every profile."""

    _block_type_name = "Trainyard Kubernetes"
    _block_type_slug = "trainyard-kubernetes"
    _description = "Trains as Jobs of a Kubernetes cluster."
    model_config = ConfigDict(extra="forbid", frozen=False)

    # One is required, as of every profile.
    namespace: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", description="Namespace of the jobs.")
    # Those of the settings are in no dump; a block's are, and are kept encrypted.
    kubeconfig: SecretStr = Field(default=SecretStr(""), description="Text of a kubeconfig: kubectl config view --raw --minify.")
    token: SecretStr = Field(default=SecretStr(""), description="Token for api_server.")

    @field_validator("kubeconfig_path", "ca_certificate")
    @classmethod
    def _files_are_found_from_any_folder(cls, value: str) -> str:
        """A worker is in another folder than the shell that saved the profile."""
        return str(Path(value).expanduser().absolute()) if value and not is_pem(value) else value

    @field_validator("keep_seconds")
    @classmethod
    def _end_can_be_seen(cls, value: int) -> int:
        if value < LEAST_KEEP_SECONDS:  # of the profile alone: the record of a run that goes on may have less
            why = "a Job that is removed sooner may be gone before its run has seen how it ended, and an attempt is lost"
            raise ValueError(f"at least {LEAST_KEEP_SECONDS}: {why}")
        return value

    def provider(self) -> Provider[Any]:
        settings = {name: getattr(self, name) for name in KubernetesSettings.model_fields}
        document: str | None = getattr(self, "_block_document_name", None)
        if document and (self.kubeconfig.get_secret_value() or self.token.get_secret_value()):
            # What a run's record has instead of the secrets, to find them again.
            settings["credentials"] = f"{self._block_type_slug}/{document}"
        return load_provider("kubernetes", settings, self.access)


PROFILES: tuple[type[Block], ...] = (LocalProfile, KubernetesProfile)


def load_cluster_credentials(slug: str) -> dict[str, Any]:
    """Kubeconfig and context, or token, of the saved block ``type/name``. Raises ConfigError where there is none, ServiceUnavailable."""
    kind, _, name = slug.partition("/")
    if kind not in (KubernetesProfile.get_block_type_slug(), "kubernetes-cluster-config"):
        raise ConfigError(f"{slug!r} is no kind of credentials for a cluster", hint=f"use {CLUSTER_CONFIG}, or the profile's own fields")
    try:
        # Its document and not its class: importing prefect_kubernetes takes many seconds.
        with get_client(sync_client=True) as client:
            data = client.read_block_document_by_name(name, kind, include_secrets=True).data
    except ObjectNotFound as exc:
        raise ConfigError(f"no credentials are saved as {slug!r}", hint="save them in the Prefect UI under Blocks") from exc
    except httpx.HTTPError as exc:
        raise ServiceUnavailable(f"the Prefect server that keeps {slug!r} does not answer ({type(exc).__name__})") from exc
    if kind == "kubernetes-cluster-config":
        return {"kubeconfig": data["config"], "context": data["context_name"]}
    return {"kubeconfig": data.get("kubeconfig") or "", "token": data.get("token") or ""}


CLUSTER_CONFIG = "kubernetes-cluster-config/NAME"


CREDENTIALS = {"aws-credentials": "aws", "minio-credentials": "aws", "azure-blob-storage-credentials": "azure"}


def load_credentials(slug: str) -> Any:
    """The saved credential block ``type/name``, as its own class. Raises ConfigError where there is none, MissingExtra."""
    kind = slug.partition("/")[0]
    if kind not in CREDENTIALS:
        raise ConfigError(f"{slug!r} is no kind of credentials for a store", hint=f"use one of {', '.join(sorted(CREDENTIALS))}")
    # Importing the package registers its classes, which Block.load then finds by the type's name.
    package = f"prefect_{CREDENTIALS[kind]}"
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as exc:
        raise MissingExtra(package.replace("_", "-"), CREDENTIALS[kind]) from exc
    try:
        loaded = Block.load(slug)
    except ValueError as exc:
        raise ConfigError(f"no credentials are saved as {slug!r}", hint="save them in the Prefect UI under Blocks") from exc
    except httpx.HTTPError as exc:
        raise ServiceUnavailable(f"the Prefect server that keeps {slug!r} does not answer ({type(exc).__name__})") from exc
    return asyncio.run(loaded) if asyncio.iscoroutine(loaded) else loaded


def image_settings(profile: BaseModel) -> ImageSettings:
    """Those of the profile; none where it has no such fields, which is then explained as a profile that says nothing of it."""
    return profile.image_settings() if isinstance(profile, ImageFields) else ImageSettings()


def save_profile(name: str, provider: str, fields: dict[str, Any]) -> str:
    """Saves a profile of that provider under `name`, in the place of an earlier one; returns its ``type/name``.

    Raises ConfigError naming every field that does not fit, or where another provider's profile has the name.
    """
    kinds = {kind.get_block_type_slug().removeprefix("trainyard-"): kind for kind in PROFILES}
    if provider not in kinds:
        raise ConfigError(unknown_name_message("provider", provider, list(kinds)), hint="`provider: kubernetes`, say")
    if name == "local" or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ConfigError(f"{name!r} is no name for a profile", hint="small letters, digits and dashes; `local` is there without saving")
    try:
        profile = kinds[provider].model_validate(fields)
    except ValidationError as exc:
        raise ConfigError(describe_validation(exc), hint="mend the file") from None
    for other in (kind for kind in PROFILES if kind is not kinds[provider]):
        if _is_saved(name, other.get_block_type_slug()):
            raise ConfigError(f"a profile of the type {other.get_block_type_slug()} has the name {name!r}", hint="choose another name")
    saved: Any = profile.save(name, overwrite=True)
    if asyncio.iscoroutine(saved):
        asyncio.run(saved)
    return f"{profile.get_block_type_slug()}/{name}"


def _is_saved(name: str, kind: str) -> bool:
    try:
        with get_client(sync_client=True) as client:
            client.read_block_document_by_name(name, kind)
    except ObjectNotFound:
        return False
    return True


SAVE_AGAIN = "`trainyard profile save`, or the Prefect UI under Blocks"


def load_profile(name: str) -> Profile:
    """The profile saved under `name`, of whichever provider. Raises ConfigError where there is none, or one that does not fit."""
    if name == "local":
        return LocalProfile(slots=1)
    for kind in PROFILES:
        try:
            loaded = kind.load(name)
        except ValueError:
            continue
        except RuntimeError as exc:
            if not isinstance(exc.__cause__, ValidationError):
                raise
            told = describe_validation(exc.__cause__)
            raise ConfigError(f"the profile {name!r} does not fit this version: {told}", hint=f"save it again: {SAVE_AGAIN}") from None
        return asyncio.run(loaded) if asyncio.iscoroutine(loaded) else loaded  # type: ignore[arg-type]
    raise ConfigError(
        f"no profile is saved under the name {name!r}",
        hint="`trainyard profile save`, or the Prefect UI under Blocks (Trainyard ...); each Prefect server has its own."
        " The profile `local` needs none",
    )
