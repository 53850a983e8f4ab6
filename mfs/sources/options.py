"""What an operator may say about reaching a source; each source uses what concerns it and refuses nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mfs.fetch.route import Cache


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Settings of one source; secrets stay out of the repr."""

    endpoint_url: str | None = None
    """S3: the service's address, where it is not AWS's. Hub: the hub's, instead of HF_ENDPOINT."""
    profile: str | None = None
    """S3: the profile of ~/.aws/config to use instead of AWS_PROFILE."""
    region: str | None = None
    """S3: the region to sign for, where the configuration does not say."""
    unsigned: bool = False
    """S3: do not sign; for public buckets."""
    requester_pays: bool = False
    """S3: say with every request that we pay for it, without which such buckets refuse everybody but their owner."""
    token: str | None = field(default=None, repr=False)
    """Hub: the access token, instead of HF_TOKEN and the file that `hf auth login` writes."""
    layout: str = "plain"
    """Hub: 'hub-cache' shows the repository as huggingface_hub's cache would, see `sources.hf_cache`."""
    via: str | None = None
    """A cache that many nodes share, asked for ranges of objects before their origin: see `fetch.route`."""
    dragonfly: str | None = None
    """The same, where it is Dragonfly's dfdaemon."""
    require_signature: str | None = None
    """Registry: file with the public key that every revision must be signed with, see `registry.signing`."""
    mountpoint: str = ""
    """Folder: real path of the mount's own directory, which no folder shows."""
    cache_directory: str = ""
    """Folder: the mount's own cache, which no folder shows. OCI: compressed layers stand there unpacked."""
    unpack_directory: str = ""
    """OCI: where layers are unpacked by who may only look into that cache; '' for the cache itself."""
    beneath: str = ""
    """Folder, and a registry in one: real path of the directory that nothing may lead out of; '' lets links do so."""
    connections_max: int = 32
    """Connections kept per origin and process; readers beyond it wait inside their deadline."""

    @property
    def cache(self) -> Cache | None:
        """What `via` or `dragonfly` names. Raises: StoreError for what is no http(s) address."""
        from mfs.fetch.route import cache_at  # a daemon has the options, and fetches nothing

        return cache_at(self.via, self.dragonfly)
