"""TLS towards clients and towards instances: contexts from the configured files, loaded again when these change."""

import ssl
from pathlib import Path
from typing import Final

from block.errors import ConfigError
from block.gateway.config import GatewayConfig

Stamp = tuple[int, int, int]
ALPN: Final = ["http/1.1"]


class Certificates:
    """One context and the files it is made of. ``refresh`` renews it in place: connections made later have the new ones."""

    def __init__(self, context: ssl.SSLContext, *, cert: str | None, key: str | None, ca: str | None) -> None:
        self.context = context
        self._cert, self._key, self._ca = cert, key, ca
        self._load()
        self._loaded = self._stamps()

    def refresh(self) -> bool:
        """Load the files again if they changed; whether they did.

        Raises:
            ConfigError: they do not fit or cannot be read; those loaded before stay.
        """
        now = self._stamps()
        if now == self._loaded:
            return False
        self._load()
        self._loaded = now
        return True

    def _load(self) -> None:
        try:
            if self._cert is not None:
                self.context.load_cert_chain(self._cert, self._key)
            if self._ca is not None:
                self.context.load_verify_locations(self._ca)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(file for file in (self._cert, self._key, self._ca) if file)
            raise ConfigError(f"The certificates in {files} cannot be used: {error}.") from error

    def _stamps(self) -> list[Stamp | None]:
        return [stamp(file) for file in (self._cert, self._key, self._ca) if file]


def server_certificates(config: GatewayConfig) -> Certificates | None:
    """What clients are met with; ``None``: plain HTTP. With ``tls_ca_path`` clients must show a certificate too (mTLS).

    Raises:
        ConfigError: files are missing or do not fit.
    """
    if config.tls_cert_path is None:
        if config.tls_key_path is not None or config.tls_ca_path is not None:
            raise ConfigError("tls_key_path and tls_ca_path need tls_cert_path too.")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(ALPN)
    if config.tls_ca_path is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return Certificates(context, cert=config.tls_cert_path, key=config.tls_key_path, ca=config.tls_ca_path)


class UpstreamTls:
    """What instances and predictors with an ``https://`` URL are met with: their certificates are always verified."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._certificates: Certificates | None = None

    @property
    def certificates(self) -> Certificates:
        """Made when first needed: reading a system's authorities takes a while.

        Raises:
            ConfigError: files are missing or do not fit.
        """
        if self._certificates is None:
            config = self._config
            if config.upstream_key_path is not None and config.upstream_cert_path is None:
                raise ConfigError("upstream_key_path needs upstream_cert_path too.")
            private = config.upstream_ca_path is not None  # then no public authority is trusted
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if private else ssl.create_default_context()
            context.set_alpn_protocols(ALPN)
            self._certificates = Certificates(
                context, cert=config.upstream_cert_path, key=config.upstream_key_path, ca=config.upstream_ca_path
            )
        return self._certificates

    @property
    def configured(self) -> bool:
        """Whether there is more to it than the system's authorities."""
        config = self._config
        return (config.upstream_ca_path or config.upstream_cert_path or config.upstream_key_path) is not None

    def context_for(self, url: str) -> ssl.SSLContext | None:
        """For one URL; ``None``: plain HTTP."""
        return self.certificates.context if url.startswith("https://") else None

    def refresh(self) -> bool:
        """As ``Certificates.refresh``."""
        return self._certificates is not None and self._certificates.refresh()


def stamp(file: str) -> Stamp | None:
    """What changes when a file does, also behind a link that is swapped (as Kubernetes does); ``None``: not there."""
    try:
        status = Path(file).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
