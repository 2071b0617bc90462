"""Every knob of the gateway, in one frozen record: from flags, ``BLOCK_*`` variables and a strict TOML file."""

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints
from urllib.parse import urlsplit

import msgspec

from block.engine.limits import EngineLimits
from block.errors import ConfigError
from block.gateway.peers import policy_called
from block.steptime.profile import load_profile

ENVIRONMENT_PREFIX: Final = "BLOCK_"
RELOADABLE: Final = frozenset(
    {
        "instances", "policy", "max_concurrent_requests", "queue_size", "queue_timeout_s", "instance_in_flight_max",
        "request_timeout_s", "retries", "stale_after_s", "api_keys",
        "api_key_file", "admin_key", "instance_allow", "objectives", "admission", "admission_confidence",
        "sse_keep_alive_s", "continue_streams", "continue_silent_s", "cors_allowed_origins", "request_id_headers",
    }
)  # fmt: skip
"""Fields that a reload changes; the others need a restart, and the reload says so."""


PASSED_THROUGH: Final = (
    "/v1/", "/v2/rerank", "/tokenize", "/detokenize", "/score", "/rerank", "/pooling", "/classify", "/encode", "/generate",
    "/inference/v1/", "/invocations", "/get_model_info", "/version",
)  # fmt: skip


_NAME: Final = re.compile(r"[!-~]{1,256}")
_HOST: Final = re.compile(r"[\w.\-\[\]:]+", re.ASCII)
_PATH: Final = re.compile(r"[!-~]*")
ENGINE_KEYS: Final = ("max_num_seqs", "num_gpu_blocks", "max_num_batched_tokens", "block_size", "max_model_len")
"""Limits of an engine that is modelled, as ``EngineLimits`` names them."""


class InstanceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: its base URL, its predictor's, a name (the URL's host and port where none is given).

    ``profile``, instead of a predictor: the step times of the engine that the gateway models itself (see ``blackbox``);
    the limits are that engine's, vLLM's defaults where not given, and the cache's size is asked of its metrics.
    """

    url: str
    predictor: str | None = None
    name: str = ""
    profile: str | None = None
    max_num_seqs: int | None = None
    num_gpu_blocks: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        for field, url in (("instance URL", self.url), ("predictor URL", self.predictor)):
            if url is not None:
                check_url(field, url)
        if self.name and not _NAME.fullmatch(self.name):
            raise ConfigError(f"An instance's name must be 1-256 visible ASCII characters, not {self.name!r}.")
        if self.profile is None:
            if given := sorted(self._limits_given()):
                raise ConfigError(f"The instance {self.id} has {', '.join(given)} but no profile to model it with.")
            return
        if self.predictor is not None:
            raise ConfigError(f"The instance {self.id} has a predictor and a profile: give one of them.")
        load_profile(self.profile)
        _ = self.limits

    def _limits_given(self) -> dict[str, int]:
        return {name: value for name in ENGINE_KEYS if (value := getattr(self, name)) is not None}

    @property
    def limits(self) -> EngineLimits:
        """Of the engine to model.

        Raises:
            ConfigError: no engine can have them.
        """
        given = self._limits_given()
        if "max_num_seqs" in given and "max_num_batched_tokens" not in given:
            given["max_num_batched_tokens"] = max(EngineLimits().max_num_batched_tokens, given["max_num_seqs"])
        return msgspec.structs.replace(EngineLimits(), **given)

    @property
    def id(self) -> str:
        return self.name or urlsplit(self.url).netloc


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1  # processes that share the port; limits and counts are each one's own
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # where /admin is then, and only there
    prometheus_host: str = "127.0.0.1"
    prometheus_port: int | None = None  # where the metrics and the health routes are too
    instances: list[InstanceConfig] = []
    service_discovery: Literal["static", "file", "dns", "k8s"] = "static"
    discovery_file: str | None = None
    discovery_name: str | None = None  # host:port, or a name of SRV records
    discovery_server: str | None = None  # of DNS, for SRV records; the system's where none is given
    discovery_interval_s: float = 10.0
    discovery_scheme: Literal["http", "https"] = "http"
    discovery_predictor_port: int | None = None  # on every host that was found
    discovery_profile: str | None = None
    instance_allow: list[str] = []  # hosts and networks that /admin/instances may add; empty: all
    policy: str = "block"
    length_estimator: str = "history"
    predict: Literal["local", "remote"] = "local"
    count_tokens: Literal["events", "usage"] = "events"  # of streams of instances with a profile
    seed: int | None = None

    drift_factor: float = 2.0  # predictions off by more than this are wrong; 0: not looked at
    stale_after_s: float = 2.0  # a predictor silent for this long is no evidence
    unseen_after_s: float = 5.0  # a dispatched request that no snapshot shows counts for this long
    horizon_s: float = 600.0
    predict_timeout_s: float = 0.25  # with --predict remote
    prediction_level: float = 0.9  # the share of requests that their prediction intervals shall hold for
    admission: Literal["all", "deadline"] = "all"  # deadline: 429 where no instance is expected to meet a request's SLO
    admission_confidence: float = 0.5  # the probability of meeting it that is asked for
    objectives: dict[str, int] = {}  # priorities by the name in x-llm-d-inference-objective

    max_concurrent_requests: int = 16384
    instance_in_flight_max: int = 4096
    queue_size: int = 1024
    queue_timeout_s: float = 10.0
    connections_max: int = 20000
    retries: int = 3
    retry_budget_fraction: float = 0.2  # of the requests of the last ten seconds, and ten more

    connect_timeout_s: float = 2.0
    request_timeout_s: float = 1800.0
    header_timeout_s: float = 10.0  # a request's head must be whole by then
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0  # of a client's connection between two requests
    sse_keep_alive_s: float = 0.0  # comments in a silent stream that often; 0: none
    request_bytes_max: int = 32 * 1024 * 1024
    header_bytes_max: int = 32 * 1024

    health_check_interval_s: float = 2.0
    health_check_timeout_s: float = 2.0
    health_check_path: str = "/health"
    health_failure_threshold: int = 3
    cb_failure_threshold: int = 5  # failed requests in a row that open an instance's circuit
    cb_open_s: float = 5.0
    hang_after_s: float = 0.75  # all streams of an instance silent for this long: no new requests to it; 0: off
    shutdown_grace_period_s: float = 60.0
    continue_streams: int = 0  # how often a stream whose instance died goes on elsewhere; 0: never, and nothing is kept
    continue_silent_s: float = (
        2.0  # what waits at an instance that hangs for this long is asked of another one; 0: never
    )

    tls_cert_path: str | None = None
    tls_key_path: str | None = None
    tls_ca_path: str | None = None  # of clients' certificates, which are then wanted
    upstream_ca_path: str | None = None  # of https:// instances and predictors
    upstream_cert_path: str | None = None
    upstream_key_path: str | None = None

    cors_allowed_origins: list[str] = []  # of web pages that may ask; "*": all
    request_id_headers: tuple[str, ...] = ("x-request-id",)  # where a request's id is looked for, in this order
    api_keys: list[str] = []
    api_key_file: str | None = None
    admin_key: str | None = None
    decisions_kept: int = 4096
    log_requests: str | None = None  # file of finished requests, JSON lines
    log_prompts: Literal["off", "features", "full"] = "off"
    log_requests_bytes_max: int = 64 * 1024 * 1024  # of one file
    log_requests_files_max: int = 4
    recent_kept: int = 16384  # arrivals and ends that /admin/recent can tell
    decision_headers: bool = True
    passthrough: tuple[str, ...] = PASSED_THROUGH  # paths (prefixes) of other routes that go to an instance
    config_file: str | None = None
    tracing: bool = False  # OpenTelemetry, set up by OTEL_* variables
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        for name in ("port", "admin_port", "prometheus_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ConfigError(f"{name} must be in 0-65535, not {port}.")
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind in (int, float) and value < 0:
                raise ConfigError(f"{name} must not be negative, not {value}.")
        for name, low, high in (("prediction_level", 0.5, 0.999), ("admission_confidence", 0.01, 0.99)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be in {low}-{high}, not {getattr(self, name)}.")
        if self.discovery_interval_s < 0.05:
            raise ConfigError("discovery_interval_s must be at least 0.05.")
        for name in (
            "workers",
            "max_concurrent_requests",
            "instance_in_flight_max",
            "request_bytes_max",
            "header_bytes_max",
            "connections_max",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1.")
        if self.predict == "remote" and any(instance.profile for instance in self.instances):
            raise ConfigError("An instance with a profile is modelled here: it needs predict = 'local'.")
        ids = [instance.id for instance in self.instances]
        for name in ids:
            if ids.count(name) > 1:
                raise ConfigError(f"Two instances are named {name!r}: give one of them another name=.")

    def all_keys(self) -> tuple[str, ...]:
        """The API keys given here and in the key file (one a line, # comments).

        Raises:
            ConfigError: the file cannot be read.
        """
        if self.api_key_file is None:
            return tuple(self.api_keys)
        try:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The API key file {self.api_key_file} cannot be read: {error}.") from error
        return (*self.api_keys, *(line.strip() for line in lines if line.strip() and not line.startswith("#")))


def check_url(field: str, url: str) -> None:
    """Raises ConfigError unless this is an ``http://`` or ``https://`` URL with a host and at most a path."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"The {field} {url!r} is not a URL: {error}.") from error
    written = _HOST.fullmatch(parts.netloc) and _PATH.fullmatch(parts.path)  # both become part of a request's head
    more = port == 0 or parts.query or parts.fragment or parts.username
    if parts.scheme not in ("http", "https") or not written or not parts.hostname or more:
        raise ConfigError(f"The {field} must look like http://host:port, not {url!r}.")


def parse_instance(text: str) -> InstanceConfig:
    """``URL[,predictor=URL][,name=NAME]`` or ``URL,profile=NAME[,max-num-seqs=N...]`` as written after ``--instance``.

    Raises:
        ConfigError: another key, or a URL that is none.
    """
    url, *rest = text.split(",")
    if "://" not in url:
        url = f"http://{url}"
    given: dict[str, Any] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        key = key.replace("-", "_")
        if key not in ("predictor", "name", "profile", *ENGINE_KEYS) or not equals or not value:
            raise ConfigError(
                f"After an instance's URL come predictor=URL and name=NAME, or profile=NAME and engine limits, not {part!r}."
            )
        if key in ENGINE_KEYS and not (value.isascii() and value.isdigit() and len(value) < 10):
            raise ConfigError(f"An instance's {key} must be a whole number, not {value!r}.")
        given[key] = int(value) if key in ENGINE_KEYS else value
    if "predictor" in given and "://" not in given["predictor"]:
        given["predictor"] = f"http://{given['predictor']}"
    return InstanceConfig(url=url.rstrip("/"), **given)


def load_config(
    flags: Mapping[str, Any], *, file: str | None = None, environment: Mapping[str, str] | None = None,
    sets: Iterable[str] = (),
) -> GatewayConfig:  # fmt: skip
    """Flags over ``BLOCK_*`` variables over the TOML file over the defaults. ``flags`` holds only what was given.

    ``sets``: ``NAME=VALUE`` as after ``--set``, the value written as in a variable; as strong as flags.

    Raises:
        ConfigError: an unknown key (the message lists the known ones), a wrong type or value, an unreadable file.
    """
    environment = os.environ if environment is None else environment
    file = file or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG_FILE")
    merged: dict[str, Any] = _from_file(file) if file else {}
    merged.update(_from_environment(environment))
    if sets:
        merged.update(_from_environment(_as_variables(sets)))
    merged.update(flags)
    if isinstance(merged.get("policy"), str):
        merged["policy"] = policy_called(merged["policy"])
    if file:
        merged["config_file"] = str(file)
    try:
        return msgspec.convert(merged, GatewayConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"The configuration is wrong: {error}.") from error


def dump_config(config: GatewayConfig) -> str:
    """The configuration as TOML; keys are shown as ``***``."""
    lines, tables = [], []
    for name, value in msgspec.to_builtins(config).items():
        if value is None:
            continue
        if name == "instances":
            for instance in value:
                tables.append("\n[[instances]]")
                tables += [f"{key} = {_toml(v)}" for key, v in instance.items() if v]
        elif name in ("api_keys", "admin_key"):
            lines.append(f"{name} = {_toml(['***' for _ in value] if isinstance(value, list) else '***')}")
        elif name != "config_file":
            shown = (
                f"{{ {', '.join(f'{_toml(k)} = {v}' for k, v in value.items())} }}" if isinstance(value, dict) else None
            )
            lines.append(f"{name} = {shown or _toml(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml(value: Any) -> str:
    """TOML of a plain value: JSON's spelling of strings, numbers, booleans and lists is TOML's too."""
    return msgspec.json.encode(value).decode()


def _from_file(file: str) -> dict[str, Any]:
    try:
        given = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration file {file} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}.") from error
    _check_keys(file, given, GatewayConfig)
    instances = given.get("instances")
    for instance in instances if isinstance(instances, list) else ():
        if isinstance(instance, dict):
            _check_keys(f"{file}, [[instances]]", instance, InstanceConfig)
    given.pop("config_file", None)
    return given


def _check_keys(where: str, given: Mapping[str, Any], record: type[msgspec.Struct]) -> None:
    known = [name for name in record.__struct_fields__ if name != "config_file"]
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: there is no setting {key!r}. Known: {', '.join(sorted(known))}.")


def _as_variables(sets: Iterable[str]) -> dict[str, str]:
    given = dict(text.partition("=")[::2] for text in sets)
    _check_keys("--set", given, GatewayConfig)
    return {ENVIRONMENT_PREFIX + name.upper(): value for name, value in given.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """``BLOCK_`` + the field's name; lists are separated by spaces. Other ``BLOCK_*`` variables belong to others."""
    given: dict[str, Any] = {}
    hints = get_type_hints(GatewayConfig)
    for name in GatewayConfig.__struct_fields__:
        text = environment.get(ENVIRONMENT_PREFIX + name.upper())
        if text is None or name == "config_file":
            continue
        if name == "instances":
            given[name] = [parse_instance(part) for part in text.split()]
        elif hints[name] in (list[str], tuple[str, ...]):
            given[name] = text.split()
        elif hints[name] == dict[str, int]:
            given[name] = {key: value for key, _, value in (part.partition("=") for part in text.split())}
            try:
                given[name] = msgspec.convert(given[name], dict[str, int], strict=False)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{ENVIRONMENT_PREFIX}{name.upper()} must be like NAME=1 NAME=2: {error}.") from error
        else:
            try:
                given[name] = msgspec.convert(text, hints[name], strict=False)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{ENVIRONMENT_PREFIX}{name.upper()} is wrong: {error}.") from error
    return given
