"""Which files a model is, and which of their tensors: the one place that knows folders, indexes and variants.

Every command, every load and the hooks ask here. Names in an index come from strangers: they stay below its folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from gpuload.moving.shards import Shard, close_shards, open_shards, read_shards, translated
from mfs.errors import IntegrityError, MfsError, NotFoundError, UsageError
from mfs.safetensors import Header

INDEX_BYTES_MAX = 100_000_000
"""Longest index that is read; the largest known (90,000 tensors) has 9 MB."""

SHARDS_MAX = 4096
NAME_BYTES_MAX = 255
"""Of a file's name; Linux takes no longer ones."""

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

_OTHERS = ("consolidated", "adapter_model")
"""What no library takes for the model where the folder holds anything else: the maker's own form of it, an adapter."""

_VARIANT_INDEX = re.compile(r"(.+)\.safetensors\.(?:index\.[^.]+|[^.]+\.index)\.json")
"""NAME.safetensors.index.VARIANT.json; diffusers once wrote NAME.safetensors.VARIANT.index.json."""

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[^.]+)?")
"""Of a shard's name without suffix; diffusers once wrote the variant behind the number."""


@dataclass(frozen=True)
class ModelFiles:
    """What was found."""

    paths: Sequence[Path]
    """In a fixed order."""
    index: Path | None = None
    weight_map: Mapping[str, int] | None = None
    """Tensor -> which of `paths` gives it, as the index says; None without an index."""


def find_shards(where: str | os.PathLike[str]) -> ModelFiles:
    """The safetensors files of a model, as transformers and diffusers find them, and without a variant.

    where: a .safetensors file, an index (.json), or a folder. In a folder the first of these that is there decides:

        NAME.safetensors           before NAME's index, which is then of another day (transformers); not a link that
                                   leads nowhere
        NAME.safetensors.index.json    and the shards it names, here or in folders below; of several that of 'model'
        the index of a variant     where nothing has that name without the variant
        all *.safetensors          but: a variant NAME.fp16 of a NAME that is there, and consolidated* and
                                   adapter_model* beside others

        The name 'diffusion_pytorch_model' has its index before its file (diffusers). Names that begin with a dot, and
        folders, are passed over. Numbers in names ('-00001-of-00003') are taken at their word: none may be missing.
    Raises: NotFoundError, UsageError where the name of one must be said, IntegrityError for an index that cannot be
        followed, and for numbered files of which some are missing.
    Source: transformers/modeling_utils.py `_get_resolved_checkpoint_files`, diffusers/models/modeling_utils.py
        `from_pretrained` and pipelines/pipeline_loading_utils.py `variant_compatible_siblings`.
    """
    path = Path(where)
    with translated(str(path)):
        is_folder, is_there = path.is_dir(), path.exists()
    if not is_folder:
        if not is_there:
            raise NotFoundError(f"no such file or folder: {path}")
        return read_index(path) if path.suffix == ".json" else ModelFiles([path])
    with translated(str(path)), os.scandir(path) as entries:
        named = [e for e in entries if SUFFIX in e.name and not e.name.startswith(".")]
        names = sorted(e.name for e in named if not os.path.isdir(e.path))  # e.is_dir() fails for links in a circle
    files = [name for name in names if name.endswith(SUFFIX)]
    stems = [name.removesuffix(INDEX_SUFFIX) for name in names if name.endswith(INDEX_SUFFIX)]
    for stem in ("model", "diffusion_pytorch_model"):
        has_index = stem in stems
        if stem + SUFFIX in files and (not has_index or (stem == "model" and _is_there(path / (stem + SUFFIX)))):
            return ModelFiles([path / (stem + SUFFIX)])
        if has_index:
            return read_index(path / (stem + INDEX_SUFFIX))
    if not stems:
        of_variants = {name: found[1] for name in names if (found := _VARIANT_INDEX.fullmatch(name))}
        indexes = [name for name, stem in of_variants.items() if not _has_plain(files, stem)]
    else:
        stems = [stem for stem in stems if not stem.startswith(_OTHERS)] or stems
        indexes = [stem + INDEX_SUFFIX for stem in stems]
    if len(indexes) > 1:
        raise UsageError(f"{path} has {len(indexes)} indexes: name the one to load, such as {path / indexes[0]}")
    if stems and stems[0] + SUFFIX in files and _is_there(path / (stems[0] + SUFFIX)):
        return ModelFiles([path / (stems[0] + SUFFIX)])
    if indexes:
        return read_index(path / indexes[0])
    if not files:
        raise NotFoundError(f"{path} holds no .safetensors file")
    return ModelFiles(_without_index(path, files))


def open_model(where: str | os.PathLike[str]) -> list[Shard]:
    """Open the files of a model and read their tables; each shard's `header` then has the tensors it gives.

    Where two files hold a tensor the index decides, and the last file for what the index does not name (transformers).
    Raises: as `find_shards` and `open_shards`; IntegrityError where the index promises what a file does not hold;
        UsageError where two files hold a tensor and no index decides.
    """
    return _chosen(find_shards(where), open_shards)


def read_tables(where: str | os.PathLike[str]) -> list[Shard]:
    """As `open_model`; no file stays open."""
    return _chosen(find_shards(where), read_shards)


def left_out(files: ModelFiles) -> dict[int, list[str]]:
    """Position of a file -> the tensors that are not to be taken from it. Reads tables only where there is an index.

    Raises: as `open_model`.
    """
    if files.weight_map is None:
        return {}
    shards = read_shards(files.paths)
    given = _choose(files, [shard.header for shard in shards])
    return {i: names for i, shard in enumerate(shards) if (names := _missing(shard.header, given[i]))}


def without(shards: Sequence[Shard], names: Mapping[int, Iterable[str]]) -> list[Shard]:
    """The same files without the tensors that are not to be taken from them, by position.

    Raises: UsageError if two files still give the same tensor.
    """
    kept = [_giving(s, set(s.header.by_name).difference(names.get(i, ()))) for i, s in enumerate(shards)]
    first: dict[str, str] = {}
    for shard in kept:
        for tensor in shard.header.tensors:
            if tensor.name in first:
                raise UsageError(
                    f"tensor {_shown(tensor.name)} stands in {first[tensor.name]} and again in {shard.path}, and no"
                    " index says which counts: name the file to load"
                )
            first[tensor.name] = shard.path
    return kept


def read_index(path: Path) -> ModelFiles:
    """The shards that an index names, by name. Raises: IntegrityError, one line; as opening it does."""
    with translated(str(path)), open(path, "rb") as file:
        raw = file.read(INDEX_BYTES_MAX + 1)
    if len(raw) > INDEX_BYTES_MAX:
        raise IntegrityError(f"{path}: an index of more than {INDEX_BYTES_MAX} bytes")
    try:
        given = dict(json.loads(raw)["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise IntegrityError(f"{path}: not an index of shards (a JSON object with 'weight_map')") from None
    if not given:
        raise IntegrityError(f"{path}: names no shards")
    wrong = [name for name in given.values() if not isinstance(name, str)]
    names = [] if wrong else sorted(set(given.values()))
    wrong = wrong or [name for name in names if not _is_below(name)]
    if wrong:
        raise IntegrityError(
            f"{path}: names the shard {_shown(wrong[0])}, expected a file beside the index or below it"
        )
    if len(names) > SHARDS_MAX:
        raise IntegrityError(f"{path}: names {len(names)} shards, more than {SHARDS_MAX}")
    paths = list(dict.fromkeys(path.parent / name for name in names))  # 'a' and './a' are one
    position = {found: i for i, found in enumerate(paths)}
    return ModelFiles(paths, path, {tensor: position[path.parent / name] for tensor, name in given.items()})


def picked_by_others(files: Sequence[str]) -> list[set[str]]:
    """For files that an engine picked: the tensors that each is not to give, as 'model's index beside them decides.

    Raises: IntegrityError where that index promises what one of them does not hold. Files that cannot be read here are
    left to whoever loads them.
    """
    nothing: list[set[str]] = [set() for _ in files]
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    if not folders or any(os.path.basename(file) == "model" + SUFFIX for file in files):
        return nothing
    index = Path(os.path.commonpath(folders), "model" + INDEX_SUFFIX)
    if not index.is_file():
        return nothing
    found = read_index(index)
    assert found.weight_map is not None
    position = {os.path.abspath(path): i for i, path in enumerate(found.paths)}
    shards: dict[int, tuple[int, Shard]] = {}
    for at, file in enumerate(files):
        try:
            if os.path.abspath(file) in position:
                shards[position[os.path.abspath(file)]] = at, read_shards([file])[0]
        except MfsError:
            continue
    for tensor, i in found.weight_map.items():
        if i in shards and tensor not in shards[i][1].header.by_name:
            raise _broken(found, tensor, i)
    for i, (at, shard) in shards.items():
        givers = {name: found.weight_map.get(name, i) for name in shard.header.by_name}
        nothing[at] = {name for name, giver in givers.items() if giver != i and giver in shards}
    return nothing


def _chosen(files: ModelFiles, read: Callable[[Sequence[Path]], list[Shard]]) -> list[Shard]:
    shards = read(files.paths)
    try:
        given = _choose(files, [shard.header for shard in shards])
        return without(shards, {i: _missing(shard.header, given[i]) for i, shard in enumerate(shards)})
    except BaseException:
        close_shards(shards)
        raise


def _choose(files: ModelFiles, headers: Sequence[Header]) -> list[set[str]]:
    """Per file, which tensors are taken from it. Raises: IntegrityError for a promise that is not kept."""
    if files.weight_map is None:
        return [set(header.by_name) for header in headers]
    for tensor, i in files.weight_map.items():
        if tensor not in headers[i].by_name:
            raise _broken(files, tensor, i)
    giver = {name: i for i, header in enumerate(headers) for name in header.by_name} | dict(files.weight_map)
    chosen: list[set[str]] = [set() for _ in headers]
    for name, i in giver.items():
        chosen[i].add(name)
    return chosen


def _missing(header: Header, given: set[str]) -> list[str]:
    return [t.name for t in header.tensors if t.name not in given]


def _giving(shard: Shard, names: set[str]) -> Shard:
    if len(names) == len(shard.header.by_name):
        return shard
    return replace(
        shard, header=replace(shard.header, tensors=tuple(t for t in shard.header.tensors if t.name in names))
    )


def _broken(files: ModelFiles, tensor: str, i: int) -> IntegrityError:
    return IntegrityError(
        f"{files.index} says that {files.paths[i].name!r} holds tensor {_shown(tensor)}, which it does not: one of the"
        " two is of another revision; fetch both anew"
    )


def _is_below(name: str) -> bool:
    """A file beside the index or in a folder below it. Links are followed, as in the Hub's cache."""
    path = PurePosixPath(name)
    is_plain = name.isprintable() and all(len(part.encode()) <= NAME_BYTES_MAX for part in path.parts)
    return bool(path.parts) and is_plain and not path.is_absolute() and ".." not in path.parts


def _is_there(path: Path) -> bool:
    """Not so of a link that leads nowhere. What cannot be looked at is there: opening it says why."""
    try:
        path.stat()
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return True


def _has_plain(files: Sequence[str], stem: str) -> bool:
    return any(_family(name)[0] == stem for name in files)


def _family(name: str) -> tuple[str, int]:
    """What numbered files have in common, and how many they say they are (0: it has no number).

    'net.fp16-00001-of-00002.safetensors' and 'net-00001-of-00002.fp16.safetensors' are of 'net.fp16'.
    """
    stem = name.removesuffix(SUFFIX)
    found = _NUMBERED.fullmatch(stem)
    return (found[1] + (found[4] or ""), int(found[3])) if found else (stem, 0)


def _without_index(folder: Path, files: Sequence[str]) -> list[Path]:
    """All files of a folder that no index describes, but those that are there beside the model."""
    families: dict[str, list[str]] = {}
    for name in files:
        families.setdefault(_family(name)[0], []).append(name)
    models = {stem: own for stem, own in families.items() if not stem.startswith(_OTHERS)} or families
    twins = {stem for stem in models if _is_variant(folder, stem, models)}
    kept = {stem: own for stem, own in models.items() if stem not in twins}
    for own in kept.values():
        for count in sorted({_family(name)[1] for name in own} - {0}):
            there = sum(_family(name)[1] == count for name in own)
            if there < count:
                raise IntegrityError(
                    f"{folder} holds {there} of the {count} files that {own[0]!r} is one of: fetch the others, or name"
                    " the file to load"
                )
    return [folder / name for own in kept.values() for name in own]


def _is_variant(folder: Path, stem: str, families: Mapping[str, Sequence[str]]) -> bool:
    """Whether it is called NAME.VARIANT, NAME is there and holds a tensor of that name: 'a.b' beside 'a' may be more of
    the same model, and then nothing may be lost.
    """
    plain = stem.rpartition(".")[0]
    if plain not in families:
        return False
    own, others = (read_shards([folder / name for name in families[one]]) for one in (stem, plain))
    names = {name for shard in others for name in shard.header.by_name}
    return any(not names.isdisjoint(shard.header.by_name) for shard in own)


def _shown(value: object) -> str:
    """A stranger's word, in one line."""
    text = ascii(value) if len(str(value)) > 200 else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
