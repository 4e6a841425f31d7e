"""What each platform tells the container that it starts: where the job is, what is mounted, and where results are collected.

A class for each platform, made of variables and files alone, so that one image serves them all. What a launcher says in
`Told` counts before what the platform says of itself. Sources, by their names as of November 2026:

- SageMaker: "How Amazon SageMaker AI Runs Your Training Image", "... Provides Training Information", "... Processes Training
  Output"; the container driver of sagemaker-train 1.27.0.
- Vertex AI: "Custom container requirements for training", "Environment variables for special Cloud Storage directories",
  "Understand the CLUSTER_SPEC format", "Use Cloud Storage as a mounted file system"; google-cloud-aiplatform 2.7.0.
- Azure ML: "Access data in a job", "Distributed GPU training guide"; azure-ai-ml 1.35.2.
- Kubernetes: "Indexed Job for Parallel Processing with Static Work Assignment", "Determine the Reason for Pod Failure".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trainer.contract import AttemptLayout
from trainer.errors import ExitCode, TrainerError, unknown_name_message
from trainer.files import read_json
from trainer.mounts import ENV_MOUNTS, Mounts, parse_mounts

ENV_PLATFORM = "TRAINYARD_PLATFORM"
ENV_CONFIG = "TRAINYARD_CONFIG"
ENV_MODEL_DIR = "TRAINYARD_MODEL_DIR"
ENV_CHECKPOINT_DIR = "TRAINYARD_CHECKPOINT_DIR"
ENV_CACHE_DIR = "TRAINYARD_CACHE_DIR"
ENV_POD = "TRAINYARD_POD"  # by the downward API: a pod on its host's network has the host's name
ENV_NODE = "TRAINYARD_NODE"


@dataclass(frozen=True)
class Told:
    """The launcher's own word, as arguments: places are paths or URIs."""

    config: str = ""
    model_dir: str = ""
    checkpoint_dir: str = ""
    cache_dir: str = ""
    mounts: tuple[tuple[str, Path], ...] = ()


@dataclass(frozen=True)
class Cluster:
    """This machine's place among those of the job."""

    rank: int = 0
    world_size: int = 1
    main_address: str = "127.0.0.1"
    main_port: int | None = None


class Environment:
    """A machine that says nothing of itself: what the launcher says is all there is."""

    PLATFORM: ClassVar[str] = "local"
    FAILURE_CHARACTERS: ClassVar[int] = 0

    def __init__(self, environ: Mapping[str, str], root: Path = Path("/"), told: Told | None = None) -> None:
        self.environ = environ
        self.root = root
        self.told = told or Told()

    @classmethod
    def is_here(cls, environ: Mapping[str, str], root: Path) -> bool:
        return True

    @property
    def config(self) -> str:
        """Path or URI of the job's ``config.json``. Raises TrainerError (CONFIG) where nobody has said."""
        found = self.told.config or self.environ.get(ENV_CONFIG, "") or self._own_config()
        if not found:
            raise TrainerError(
                f"nobody has said where the job is ({self.PLATFORM})",
                hint=f"set {ENV_CONFIG} or --config to the path or URI of a config.json, or give --attempt-dir",
                code=ExitCode.CONFIG,
            )
        # Platforms mount folders, some of them nothing else.
        is_folder = "://" not in found and Path(found).is_dir()
        return f"{found.rstrip('/')}/{AttemptLayout.CONFIG}" if is_folder else found

    @property
    def mounts(self) -> Mounts:
        """Raises TrainerError (CONFIG) for what names none."""
        return Mounts((*self.told.mounts, *parse_mounts(self.environ.get(ENV_MOUNTS, ""), ENV_MOUNTS), *self._own_mounts()))

    @property
    def model_dir(self) -> str:
        """Path or URI of where the platform collects the model and its metrics. Empty: it collects nothing."""
        return self.told.model_dir or self.environ.get(ENV_MODEL_DIR, "") or self._own_model_dir()

    @property
    def checkpoint_dir(self) -> str:
        """Path or URI of what a restart finds again. It keeps the run's record where the job names no other place. Empty: nothing does."""
        return self.told.checkpoint_dir or self.environ.get(ENV_CHECKPOINT_DIR, "") or self._own_checkpoint_dir()

    @property
    def cache_dir(self) -> str:
        """Folder that keeps fetched datasets, shared with other trainings. Empty: as the job says."""
        return self.told.cache_dir or self.environ.get(ENV_CACHE_DIR, "")

    @property
    def failure_file(self) -> Path | None:
        """Where the platform looks for the reason of a failure."""
        return None

    @property
    def cluster(self) -> Cluster:
        """By the names that torch.distributed reads. Raises TrainerError (CONFIG) for what is no number."""
        return Cluster(
            rank=self._number("RANK", 0),
            world_size=self._number("WORLD_SIZE", 1),
            main_address=self.environ.get("MASTER_ADDR", "127.0.0.1"),
            main_port=self._number("MASTER_PORT", 0) or None,
        )

    def _own_config(self) -> str:
        return ""

    def _own_mounts(self) -> tuple[tuple[str, Path], ...]:
        return ()

    def _own_model_dir(self) -> str:
        return ""

    def _own_checkpoint_dir(self) -> str:
        return ""

    def _number(self, name: str, default: int) -> int:
        return self._as_number(self.environ.get(name) or default, name)

    @staticmethod
    def _as_number(value: object, name: str) -> int:
        try:
            return int(str(value))
        except ValueError:
            raise _malformed(name) from None


class SageMaker(Environment):
    """Files below ``/opt/ml``. Without the toolkit of Amazon's own images there are no ``SM_*`` variables."""

    PLATFORM = "sagemaker"
    FAILURE_CHARACTERS = 1024  # "Processes Training Output": the first 1,024 become the FailureReason

    @classmethod
    def is_here(cls, environ: Mapping[str, str], root: Path) -> bool:
        # The service sets both variables; the files are there with any image.
        return "TRAINING_JOB_NAME" in environ or (root / "opt/ml/input/config/resourceconfig.json").is_file()

    def _own_config(self) -> str:
        # "Provides Training Information": hyperparameters are strings, and a channel is a folder of its name. SDKs wrote strings as JSON.
        hyperparameters = _read(self.root / "opt/ml/input/config/hyperparameters.json")
        channel = self.root / "opt/ml/input/data/config" / AttemptLayout.CONFIG
        return str(hyperparameters.get("config") or "").strip('"') or (str(channel) if channel.is_file() else "")

    def _own_mounts(self) -> tuple[tuple[str, Path], ...]:
        # Channels do not say which objects they hold, so the launcher does; a hyperparameter takes more characters than a variable.
        hyperparameters = _read(self.root / "opt/ml/input/config/hyperparameters.json")
        return parse_mounts(str(hyperparameters.get("mounts") or ""), "the hyperparameter mounts")

    def _own_model_dir(self) -> str:
        return str(self.root / "opt/ml/model")  # sent as model.tar.gz

    def _own_checkpoint_dir(self) -> str:
        folder = self.root / "opt/ml/checkpoints"  # CheckpointConfig.LocalPath by default; there only where that is set
        return str(folder) if folder.is_dir() else ""

    @property
    def failure_file(self) -> Path | None:
        return self.root / "opt/ml/output/failure"

    @property
    def cluster(self) -> Cluster:
        resources = _read(self.root / "opt/ml/input/config/resourceconfig.json")
        # As the driver of sagemaker-train does: in the order of their names, the first one leads, at port 7777.
        hosts = sorted(map(str, resources.get("hosts") or ()), key=lambda host: (len(host), host))
        if not hosts:
            return Cluster()
        current = str(resources.get("current_host"))
        if current not in hosts:
            raise _malformed("resourceconfig.json")
        return Cluster(hosts.index(current), len(hosts), hosts[0], 7777)


class Vertex(Environment):
    """``AIP_*`` are URIs, and every bucket is mounted below ``/gcs``."""

    PLATFORM = "vertex"

    @classmethod
    def is_here(cls, environ: Mapping[str, str], root: Path) -> bool:
        return any(name in environ for name in ("CLOUD_ML_JOB_ID", "CLUSTER_SPEC", "AIP_MODEL_DIR"))

    def _own_mounts(self) -> tuple[tuple[str, Path], ...]:
        folder = self.root / "gcs"  # "Use Cloud Storage as a mounted file system"
        return (("gs://", folder),) if folder.is_dir() else ()

    def _own_model_dir(self) -> str:
        return self.environ.get("AIP_MODEL_DIR", "").rstrip("/")  # <baseOutputDirectory>/model/

    def _own_checkpoint_dir(self) -> str:
        return self.environ.get("AIP_CHECKPOINT_DIR", "").rstrip("/")  # <baseOutputDirectory>/checkpoints/

    @property
    def cluster(self) -> Cluster:
        text = self.environ.get("CLUSTER_SPEC")
        if not text:
            return Cluster()
        # "Understand the CLUSTER_SPEC format": pool 0 has the primary replica and no other; ranks go on through the pools after it.
        try:
            spec = json.loads(text)
            pools, task = dict(spec["cluster"]), spec["task"]
            replicas = [(pool, index) for pool in sorted(pools) for index in range(len(pools[pool]))]
            rank = replicas.index((str(task["type"]), int(task["index"])))
            address, _, port = str(pools["workerpool0"][0]).rpartition(":")
        except (KeyError, IndexError, TypeError, ValueError):
            raise _malformed("CLUSTER_SPEC") from None
        return Cluster(rank, len(replicas), address, self._as_number(port, "CLUSTER_SPEC"))


class AzureMl(Environment):
    """Inputs and outputs come as arguments, ``${{inputs.data}}``; the variables for outputs are a fallback that no page promises."""

    PLATFORM = "azureml"

    @classmethod
    def is_here(cls, environ: Mapping[str, str], root: Path) -> bool:
        return "AZUREML_RUN_ID" in environ

    def _own_model_dir(self) -> str:
        return self.environ.get("AZURE_ML_OUTPUT_model", "") or self.environ.get("AZURE_ML_OUTPUT_MODEL", "")

    def _own_checkpoint_dir(self) -> str:
        return self.environ.get("AZURE_ML_OUTPUT_checkpoints", "") or self.environ.get("AZURE_ML_OUTPUT_CHECKPOINTS", "")


class Kubernetes(Environment):
    """Volumes where the launcher says. An indexed Job numbers its pods; it does not say how many there are."""

    PLATFORM = "kubernetes"
    FAILURE_CHARACTERS = 1024  # "Determine the Reason for Pod Failure": 4,096 bytes at most

    @classmethod
    def is_here(cls, environ: Mapping[str, str], root: Path) -> bool:
        return "KUBERNETES_SERVICE_HOST" in environ

    @property
    def failure_file(self) -> Path | None:
        path = self.root / "dev/termination-log"  # terminationMessagePath by default
        return path if path.is_file() else None

    @property
    def cluster(self) -> Cluster:
        named = super().cluster
        index = self._number("JOB_COMPLETION_INDEX", named.rank)
        # A second pod without a word of how many there are is still a second one.
        return Cluster(index, max(named.world_size, index + 1), named.main_address, named.main_port)


# In this order: the clouds' own trainings may run on Kubernetes, too.
PLATFORMS: tuple[type[Environment], ...] = (SageMaker, Vertex, AzureMl, Kubernetes, Environment)


def detect(environ: Mapping[str, str], root: Path = Path("/"), told: Told | None = None) -> Environment:
    """Where this process runs: as the launcher says (``TRAINYARD_PLATFORM``), or by what the platform leaves. Raises TrainerError."""
    if name := environ.get(ENV_PLATFORM):
        named = {platform.PLATFORM: platform for platform in PLATFORMS}
        if name not in named:
            raise TrainerError(unknown_name_message("platform", name, list(named)), hint=f"set {ENV_PLATFORM}", code=ExitCode.CONFIG)
        return named[name](environ, root, told)
    found = next(platform for platform in PLATFORMS if platform.is_here(environ, root))
    return found(environ, root, told)


def refuse_several_machines(environment: Environment) -> None:
    """Raises TrainerError (CONFIG) for one machine of several: each would train alone, and all write the same result."""
    cluster = environment.cluster
    if cluster.world_size > 1:
        raise TrainerError(
            f"this is machine {cluster.rank + 1} of {cluster.world_size} ({environment.PLATFORM}), and a training runs on one",
            hint="ask for one machine; several GPUs in it can be used",
            code=ExitCode.CONFIG,
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except ValueError:
        raise _malformed(path.name) from None


def _malformed(name: str) -> TrainerError:
    return TrainerError(f"{name} is not as the platform documents it", hint="give TRAINYARD_PLATFORM, or look at it", code=ExitCode.CONFIG)
