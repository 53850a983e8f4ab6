"""Settings: read from TOML, checked when made, handed on without loss."""

from __future__ import annotations

import dataclasses
import json
import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfs import config_file
from mfs.cache.ram import SLOTS_COUNT_MIN
from mfs.config import LOG_LEVELS, RAM_SLOTS_COUNT_MIN, SIGNED_SCHEMES, MountConfig, SourceConfig, check_paths
from mfs.errors import ConfigError
from mfs.registry import layout
from mfs.sources.options import SourceOptions
from mfs.types import CHUNK_BYTES

S3 = SourceConfig("s3://models/prod")
MOUNT = Path("/mnt/models")

GOOD = """
[mount]
mountpoint = "/mnt/models"
cache_dir = "/nvme/mfs"
cache_size = "500G"
ram_size = 34359738368
timeout = 10
refresh = "5m"
umask = "027"
log_level = "debug"

[sources.prod]
url = "s3://models/prod"
profile = "inference"

[sources."all MiniLM"]
url = "hf://sentence-transformers/all-MiniLM-L6-v2"
token = "hf_secret"
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mfs.toml"
    file.write_text(text)
    return file


def load(tmp_path: Path, text: str, **mount: Any) -> MountConfig:
    return config_file.load(written(tmp_path, text), mount=mount, source={})


def test_a_file_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config == MountConfig(
        MOUNT,
        (
            SourceConfig("s3://models/prod", "prod", profile="inference"),
            SourceConfig("hf://sentence-transformers/all-MiniLM-L6-v2", "all MiniLM", token="hf_secret"),
        ),
        cache_dir=Path("/nvme/mfs"), cache_bytes=500 << 30, ram_bytes=32 << 30, timeout_s=10.0, refresh_s=300.0,
        umask=0o027, log_level="debug",
    )  # fmt: skip


def test_the_command_line_wins(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    config = config_file.load(file, mount={"mountpoint": Path("/m"), "ram_bytes": 1 << 30}, source={"region": "r"})
    assert (config.mountpoint, config.ram_bytes, config.cache_bytes) == (Path("/m"), 1 << 30, 500 << 30)
    assert [source.region for source in config.sources] == ["r", "r"]


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    config = load(tmp_path, '[mount]\nmountpoint="here"\ncache_dir="~/c"\n[sources.a]\nurl="/data"')
    assert (config.mountpoint, config.cache_dir) == (tmp_path / "here", Path.home() / "c")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[mount]\ncache_sise = '1G'", "[mount] has no key 'cache_sise': did you mean 'cache_size'?"),
        ("[mounts]", "has no key 'mounts': did you mean 'mount'?"),
        ("[mount]\nzzz = 1", "[mount] has no key 'zzz': legal are allow_other, cache_dir"),
        ("[sources.a]\nurl='/d'\nendpoint='http://x'", "no key 'endpoint': did you mean 'endpoint_url'?"),
        ("[sources.a]", "[sources.a] has no url"),
        ("[sources]\na = 's3://x'", "[sources.a] is 's3://x': expected a table"),
        ("mount = 3", "[mount] is 3: expected a table"),
        ("[mount]\nram_size = '500GB'", "ram_size: ambiguous size"),
        ("[mount]\nram_size = 1.5", "ram_size: is 1.5: expected a whole number"),
        ("[mount]\ntimeout = true", "timeout: is True: expected seconds"),
        ("[mount]\nallow_other = 'yes'", "allow_other: is 'yes': expected true or false"),
        ("[mount]\numask = '9'", "umask: is '9': expected octal"),
        ("[mount]\nworkers = '2'", "workers: is '2': expected a whole number"),
        ("[mount]\ncache_dir = ''", "cache_dir: is empty: expected a path"),
        ("[mount", "is not TOML"),
        ("ÿ = 1", "is not TOML"),
        ("", "no mountpoint"),
        ("[mount]\nmountpoint='/m'", "no source"),
        ("[mount]\nmountpoint='/m'\n[sources.'a/b']\nurl='/d'", "cannot be a directory of the mount: contains '/'"),
        ("[mount]\nmountpoint='/m'\n[sources.'..']\nurl='/d'", "'..'"),
        ("[mount]\nmountpoint='/m'\n[sources.\"a\\nb\"]\nurl='/d'", "contains control characters"),
        ("[mount]\nmountpoint='/m'\ntimeout=0\n[sources.a]\nurl='/d'", "timeout is 0: expected 0.1 to 86,400 seconds"),
    ],
)  # fmt: skip
def test_faults_are_one_line_naming_file_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "mfs.toml"))
    assert "\n" not in message
    assert complaint in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config_file.read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        config_file.read(tmp_path)
    (tmp_path / "latin").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="is not TOML"):
        config_file.read(tmp_path / "latin")
    (tmp_path / "long").write_bytes(b" " * (config_file.FILE_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="longer than"):
        config_file.read(tmp_path / "long")


def test_every_setting_can_stand_in_a_file() -> None:
    in_file = {field for field, _ in config_file._MOUNT_KEYS.values()}
    assert in_file == {field.name for field in dataclasses.fields(MountConfig)} - {"sources"}
    in_table = {field for field, _ in config_file._SOURCE_KEYS.values()}
    assert in_table == {field.name for field in dataclasses.fields(SourceConfig)} - {"name"}


def test_config_keeps_step_with_the_rooms_it_configures() -> None:
    assert RAM_SLOTS_COUNT_MIN == SLOTS_COUNT_MIN
    assert SIGNED_SCHEMES == layout.SCHEMES
    options = {field.name for field in dataclasses.fields(SourceOptions)}
    ours = {field.name for field in dataclasses.fields(SourceConfig)}
    assert ours - {"url", "name"} == options - {
        "connections_max",
        "mountpoint",
        "cache_directory",
        "unpack_directory",
    }  # the mount's


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sources": ()}, "no source"),
        ({"sources": (S3, SourceConfig("/d", "a"))}, "must be the only one"),
        ({"sources": (SourceConfig("/c", "a"), SourceConfig("/d", "a"))}, "two sources are named 'a'"),
        ({"mountpoint": Path("relative")}, "expected an absolute path"),
        ({"cache_dir": Path("relative")}, "expected an absolute path"),
        ({"cache_dir": MOUNT}, "lies inside the mount point"),
        ({"cache_dir": MOUNT / "a" / "b"}, "lies inside the mount point"),
        ({"cache_dir": Path("/x/../mnt/models/c")}, "lies inside the mount point"),
        ({"cache_dir": Path("/mnt")}, "lies inside the cache directory"),
        ({"cache_dir": Path("/c"), "cache_bytes": CHUNK_BYTES - 1}, "expected at least 4M (one chunk)"),
        ({"ram_bytes": 16 * CHUNK_BYTES - 1}, "expected at least 64M (16 slots of 4M)"),
        ({"timeout_s": float("nan")}, "timeout is nan"),
        ({"refresh_s": 0.5}, "refresh is 0.5: expected 1 to"),
        ({"workers_count": 0}, "workers is 0: expected 1 to 64 processes"),
        ({"connections_count": 5000}, "connections is 5000"),
        ({"umask": 0o1000}, "umask is 512"),
        ({"uid": -1}, "uid is -1"),
        ({"log_level": "loud"}, "expected one of debug, info, warning, error"),
        ({"log_file": MOUNT / "log"}, "lies inside the mount point"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MountConfig(**({"mountpoint": MOUNT, "sources": (S3,)} | settings))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="no url"):
        SourceConfig("")
    for address in ("http://host/a\nb/", "s3://b/\udcff", "hf://a/b\x7f"):
        with pytest.raises(ConfigError, match="expected no control characters, and UTF-8"):
            SourceConfig(address)
    assert SourceConfig("/a\nb\udcff").url == "/a\nb\udcff"
    with pytest.raises(ConfigError, match="expected http"):
        SourceConfig("s3://b", endpoint_url="localhost:9000")
    with pytest.raises(ConfigError, match=r"source 'a': a signature can be required of a registry .* only, got s3://b"):
        SourceConfig("s3://b", "a", require_signature=Path("/key.pub"))
    for bad in (
        "cache:8080",
        "http://",
        "http://c:x",
        "http://c:70000",
        "http://c/path",
        "socks5://c:1",
        "http://u:p@c:1",
    ):
        with pytest.raises(ConfigError, match=r"via is .*: expected http://host:port") as caught:
            SourceConfig("s3://b", via=bad)
        assert "u:p" not in str(caught.value)
    with pytest.raises(ConfigError, match="via and dragonfly are both set"):
        SourceConfig("s3://b", via="http://c:1", dragonfly="http://c:2")
    assert SourceConfig("s3://b", dragonfly="http://[::1]:4001/").dragonfly == "http://[::1]:4001/"
    with pytest.raises(ConfigError, match=r"require_signature is 'key.pub': expected an absolute path"):
        SourceConfig("mfs+s3://b", require_signature=Path("key.pub"))
    with pytest.raises(ConfigError, match=r"beneath is 'srv': expected an absolute path"):
        SourceConfig("/srv/models", beneath=Path("srv"))


def test_a_key_stands_beside_the_file_that_names_it(tmp_path: Path) -> None:
    text = '[mount]\nmountpoint="/m"\n[sources.a]\nurl="mfs+s3://b/r"\nrequire_signature="team.pub"\nbeneath="/srv"'
    config = load(tmp_path, text)
    assert config.sources[0].require_signature == tmp_path / "team.pub"
    assert config.sources[0].options()["beneath"] == "/srv"
    assert MountConfig.from_json(config.to_json()) == config
    file = written(tmp_path, config_file.dump(config.masked()))
    assert config_file.load(file, mount={}, source={}) == config


def test_a_budget_for_no_cache_is_not_checked() -> None:
    assert MountConfig(MOUNT, (S3,), cache_bytes=0).cache_dir is None


NAMES = st.text(string.ascii_letters + "äß 。", min_size=1, max_size=20).filter(lambda name: name.strip(". "))
URLS = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1)
SOURCES = st.builds(
    SourceConfig, url=URLS, name=NAMES, profile=st.none() | st.text(), unsigned=st.booleans(),
    requester_pays=st.booleans(), token=st.none() | st.text(),
)  # fmt: skip
CONFIGS = st.builds(
    MountConfig,
    mountpoint=st.just(MOUNT),
    sources=st.lists(SOURCES, min_size=1, unique_by=lambda source: source.name).map(tuple),
    cache_dir=st.none() | NAMES.map(lambda name: Path("/cache") / name),
    cache_bytes=st.integers(CHUNK_BYTES, 2**62),
    ram_bytes=st.integers(16 * CHUNK_BYTES, 2**40),
    timeout_s=st.floats(0.1, 1000),
    refresh_s=st.none() | st.floats(1, 1000),
    uid=st.none() | st.integers(0, 65535),
    umask=st.integers(0, 0o777),
    log_level=st.sampled_from(LOG_LEVELS),
    allow_other=st.booleans(),
)


@settings(deadline=None)  # the release is looked up once
@given(CONFIGS)
def test_json_round_trip(config: MountConfig) -> None:
    text = config.to_json()
    assert "\n" not in text
    assert MountConfig.from_json(text) == config


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"sources": 3}', '{"sources": [], "mountpoint": 1}', '"\\ud800"']
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        MountConfig.from_json(text)


@pytest.mark.parametrize("is_of_source", [False, True])
def test_what_a_later_release_was_told_is_refused_and_its_defaults_are_not(is_of_source: bool) -> None:
    config = MountConfig(MOUNT, (S3,))
    told = json.loads(config.to_json())
    place = told["sources"][0] if is_of_source else told
    place["later_option"], told["release"] = 1, "7.1"
    assert MountConfig.from_json(json.dumps(told)) == config
    place["chosen"].append("later_option")
    with pytest.raises(ConfigError, match=r"mfs 7\.1 that mean nothing to mfs \S+: later_option; install 7\.1 again"):
        MountConfig.from_json(json.dumps(told))
    del place["chosen"]  # an earlier one, which did not say
    with pytest.raises(ConfigError, match="later_option"):
        MountConfig.from_json(json.dumps(told))


def test_secrets_do_not_show() -> None:
    source = SourceConfig("https://user:pass-secret@host/x", token="token-secret")
    config = MountConfig(MOUNT, (source,))
    assert "token-secret" not in repr(config)
    assert "secret" not in str(config.masked())
    assert config.masked()["sources"][0]["url"] == "https://***@host/x"
    assert config.masked()["sources"][0]["token"] == "***"
    assert "token-secret" in config.to_json()


class TestCheckPaths:
    def config(self, tmp_path: Path, **settings: Any) -> MountConfig:
        return MountConfig(**({"mountpoint": tmp_path / "mount", "sources": (S3,)} | settings))

    def test_an_empty_directory_and_a_new_cache(self, tmp_path: Path) -> None:
        (tmp_path / "mount").mkdir()
        check_paths(self.config(tmp_path, cache_dir=tmp_path / "new" / "cache"))
        assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700
        assert list((tmp_path / "new" / "cache").iterdir()) == []

    def test_a_missing_mountpoint(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist: create it with mkdir -p"):
            check_paths(self.config(tmp_path))

    def test_a_file_as_mountpoint(self, tmp_path: Path) -> None:
        (tmp_path / "mount").touch()
        with pytest.raises(ConfigError, match="is not a directory"):
            check_paths(self.config(tmp_path))

    def test_a_mountpoint_that_holds_something(self, tmp_path: Path) -> None:
        (tmp_path / "mount" / "precious").mkdir(parents=True)
        with pytest.raises(ConfigError, match=r"is not empty.*'precious'"):
            check_paths(self.config(tmp_path))

    def test_a_mount_that_stands_there(self, tmp_path: Path) -> None:
        (tmp_path / "to-proc").symlink_to("/proc")
        for path in (Path("/proc"), tmp_path / "to-proc"):
            with pytest.raises(ConfigError, match=r"/proc is mounted already \(proc"):
                check_paths(self.config(tmp_path, mountpoint=path))

    def test_a_cache_that_a_link_leads_into_the_mountpoint(self, tmp_path: Path) -> None:
        (tmp_path / "mount").mkdir()
        (tmp_path / "cache").symlink_to("mount/c")
        with pytest.raises(ConfigError, match="lies inside the mount point"):
            check_paths(self.config(tmp_path, cache_dir=tmp_path / "cache"))

    def test_a_file_as_cache(self, tmp_path: Path) -> None:
        (tmp_path / "mount").mkdir()
        (tmp_path / "cache").touch()
        with pytest.raises(ConfigError, match="is not a directory"):
            check_paths(self.config(tmp_path, cache_dir=tmp_path / "cache"))
        with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
            check_paths(self.config(tmp_path, cache_dir=tmp_path / "cache" / "below"))

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "mount").mkdir()
        place = Path("/proc/mfs-cache") if os.geteuid() == 0 else Path("/root-only/cache")
        with pytest.raises(ConfigError, match="cannot be written"):
            check_paths(self.config(tmp_path, cache_dir=place))


class TestMaterialize:
    def test_a_pattern_or_a_list_of_them(self, tmp_path: Path) -> None:
        for text, expected in (('"llama"', ("llama",)), ('["a/*", "**"]', ("a/*", "**")), ("[]", ())):
            file = tmp_path / "mfs.toml"
            file.write_text(f'[mount]\nmountpoint = "/m"\nmaterialize = {text}\n[sources.x]\nurl = "/x"\n')
            found = config_file.load(file, mount={}, source={})
            assert found.materialize == expected
            assert MountConfig.from_json(found.to_json()) == found
            (tmp_path / "again.toml").write_text(config_file.dump(found.masked()))
            assert config_file.load(tmp_path / "again.toml", mount={}, source={}) == found

    @pytest.mark.parametrize("text", ["5", "[5]", '""', '"/"', '["a", "../b"]', "true"])
    def test_what_is_no_pattern_is_said(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "mfs.toml"
        file.write_text(f'[mount]\nmountpoint = "/m"\nmaterialize = {text}\n[sources.x]\nurl = "/x"\n')
        with pytest.raises(ConfigError, match="materialize"):
            config_file.load(file, mount={}, source={})


class TestIdentity:
    """Under which a mount's descriptors are kept while it is upgraded: another one loses the mount."""

    def test_it_is_the_same_in_every_release(self) -> None:
        config = MountConfig(MOUNT, (SourceConfig("s3://models/prod", endpoint_url="http://s3:9000"),))
        assert config.identity() == "3f4ce2cd7de7b1b7"

    def test_how_a_source_is_reached_is_no_part_of_it(self) -> None:
        ways: list[dict[str, Any]] = [
            {"via": "http://cache:80"}, {"dragonfly": "http://127.0.0.1:4001"}, {"token": "x"}, {"region": "eu-west-1"},
        ]  # fmt: skip
        found = {MountConfig(MOUNT, (SourceConfig("s3://models/prod", **way),)).identity() for way in ways}
        assert found == {MountConfig(MOUNT, (S3,)).identity()}

    def test_what_is_shown_is(self) -> None:
        others = [S3, SourceConfig("s3://models/test"), SourceConfig("s3://models/prod", endpoint_url="http://s3:9000")]
        assert len({MountConfig(MOUNT, (source,)).identity() for source in others}) == len(others)
