"""Data sets of the hub, file by file: `owner/name`, or `owner/name:PART` for a split, a folder or a file of it."""

from __future__ import annotations

import glob
import re
from pathlib import Path, PurePosixPath

from twinlora.data.containers import SUFFIXES
from twinlora.errors import DataError

__all__ = ["fetch", "is_hub_name"]

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form of a hub data set and not of a file's path."""
    match = _NAME.fullmatch(text)
    return bool(match) and not text.startswith(".") and not match[1].lower().endswith(SUFFIXES)  # type: ignore[index]


def fetch(source: str) -> list[tuple[str, Path]]:
    """The files that `source` means, as (name in the data set, path in the local cache), sorted by name.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean everywhere. Raises DataError.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    match = _NAME.fullmatch(source)
    assert match, "callers ask is_hub_name first"
    repo, part = match[1], match[2]
    try:
        if constants.HF_HUB_OFFLINE:
            root = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=["."]))  # where it is; no file yet
            names = choose([path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()], part)
        else:
            names = choose([file.rfilename for file in HfApi().dataset_info(repo).siblings or []], part)
            wanted = [glob.escape(name) for name in names]
            root = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=wanted))
        return [(name, root / name) for name in names]
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"no such file here, and the hub did not give it ({type(error).__name__}: {reason}); "
            "check the name, the network, HF_TOKEN, or give a local file"
        ) from error


def choose(names: list[str], part: str | None) -> list[str]:
    """Files among `names` that have `part` in their path as whole words; without a part, the training split or all.

    Raises DataError if none has, if they are of several folders or kinds, or if a shard is missing.
    """
    readable = sorted(name for name in names if name.lower().endswith(SUFFIXES) and name != "dataset_infos.json")
    chosen = [part] if part in readable else _with_word(readable, part or "train")
    if not chosen and part is None:
        chosen = readable
    if not readable:
        raise DataError(f"this data set has no file of {', '.join(SUFFIXES)}")
    if not chosen:
        raise DataError(f"no file in this data set has {part!r} in its path; it has {', '.join(readable[:10])}")
    groups = sorted({f"{PurePosixPath(n).parent}/*{PurePosixPath(n).suffix}".removeprefix("./") for n in chosen})
    if len(groups) > 1:
        raise DataError(f"several sets of files: {', '.join(groups[:10])}; name one as owner/name:PART")
    shards = [match for name in chosen if (match := _SHARD.search(name))]
    if shards and part not in readable and len(shards) < int(shards[0][2]):
        raise DataError(f"{len(shards)} of {int(shards[0][2])} shards are here; fetch the others while online")
    return chosen


def _with_word(names: list[str], word: str) -> list[str]:
    pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])")
    return [name for name in names if pattern.search(name)]
