"""Resolve the file names of an annotation file to files below the image folder.

Annotation tools write absolute paths of another machine, backslashes, URLs, percent-encoding, or
names in another letter case or Unicode normal form. Such a name is resolved if exactly one file can
be meant. A name never leads out of the image folder; a link in that folder, which only its owner
can have made, may.
"""

import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from internals.annotations import MAX_EXAMPLES, DataIssue

NOTE_EXAMPLES = 3
URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a drive has one letter
# Label Studio writes paths of its server: /data/upload/PROJECT/HASH-NAME, for a file that was
# uploaded as NAME, and /data/local-files/?d=PATH.
SERVER_PATH = re.compile(r"/data/(upload|local-files|media)/")
UPLOADED = re.compile(r"^(.*\bupload/\d+/)[0-9a-f]{6,8}-")
ABSOLUTE = re.compile(r"/|[a-z]:/", re.IGNORECASE)

# ------------------------------------------------------------------------ names without a file


class Problem(NamedTuple):
    """Why a name has no file: a kind of issue, and its remedy, with the image folder in it."""

    kind: str
    remedy: str


_INTO_FOLDER = (
    "Link or copy them into {folder}, or give the folder that holds them instead (train.py: "
    "--train-images, --val-images)"
)
# The codes of `ResolvedNames.problems` are positions here. 0: the file was found.
PROBLEMS = (
    None,
    Problem(
        "image files that are missing",
        "Add them to {folder}, remove them from the annotation file, or skip them (train.py: "
        "--max-bad-images N)",
    ),
    Problem("image file names that are absolute paths outside of the image folder", _INTO_FOLDER),
    Problem("image file names that lead out of the image folder by '..'", _INTO_FOLDER),
    Problem(
        "image file names that are addresses on a server, without a file of that name",
        "Download the images into {folder}, each under the last part of its name",
    ),
    Problem(
        "image file names that do not tell which file they mean",
        "Write them in the annotation file as paths relative to {folder}",
    ),
)
MISSING, OUTSIDE, PARENT, ADDRESS, AMBIGUOUS = range(1, len(PROBLEMS))
KINDS = {problem.kind for problem in PROBLEMS if problem}


def find_issues(
    names: np.ndarray, problems: np.ndarray, image_ids: np.ndarray, folder: Path
) -> Iterator[DataIssue]:
    """Yield an issue for each kind of names without a file, with the ids of their images."""
    for code, (kind, remedy) in enumerate(PROBLEMS[1:], start=1):
        images = np.flatnonzero(problems == code)
        if code == MISSING and len(images) == len(names):
            remedy = "None of them is in {folder}: give the folder of the images (train.py: "
            remedy += "--train-images, --val-images)"
        first = images[:MAX_EXAMPLES]
        examples = [f"{names[i].decode()} (id {image_ids[i]})" for i in first]
        if examples:
            yield DataIssue(kind, examples, len(images), remedy.format(folder=folder))


class ResolvedNames(NamedTuple):
    """File names relative to the image folder, and which of them have no file."""

    names: np.ndarray  # UTF-8 bytes [I]; as in the annotation file where no file was found
    problems: np.ndarray  # uint8 [I], positions in PROBLEMS
    notes: list[DataIssue]  # one, if names were resolved


def resolve_names(names: np.ndarray, folder: Path) -> ResolvedNames:
    """Resolve file names, UTF-8 bytes `[I]`, to files below a folder.

    Names that need no repair cost one listing of each folder and one look-up each; only for others
    are all files below the folder listed.
    """
    problems = np.zeros(len(names), dtype=np.uint8)
    listed = names.tolist()
    unlisted = _find_unlisted(listed, folder)
    if not unlisted:
        return ResolvedNames(names, problems, [])
    positions = defaultdict(list)
    for i in unlisted:
        positions[listed[i].decode()].append(i)
    found = {name.decode() for name in set(listed).difference(listed[i] for i in unlisted)}
    files = (file.relative_to(folder).as_posix() for file in walk_files(folder))
    resolved = _Resolver(folder, files).resolve_all(list(positions), found)
    for name, result in resolved.items():
        for i in positions[name]:
            if isinstance(result, int):
                problems[i] = result
            else:
                listed[i] = result.encode()
    changed = {name: file for name, file in resolved.items() if isinstance(file, str)}
    count = sum(len(positions[name]) for name in changed)
    examples = [f"{name} -> {file}" for name, file in list(changed.items())[:NOTE_EXAMPLES]]
    kind = f"image file names resolved to files below {folder}"
    notes = [DataIssue(kind, examples, count, "These files are used", False)] if count else []
    return ResolvedNames(np.array(listed, dtype=np.bytes_), problems, notes)


def match_files(names: Iterable[str], folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Return the name of each of the `files`, relative to a folder, that exactly one name means."""
    resolved = _Resolver(folder, files).resolve_all(list(dict.fromkeys(names)), set())
    return {file: name for name, file in resolved.items() if isinstance(file, str)}


def _find_unlisted(names: list[bytes], folder: Path) -> list[int]:
    """Return the positions of the names that the folders below `folder` do not list as written."""
    root = os.fsencode(folder)
    in_root, listings, unlisted = _list_folder(root), {b"": frozenset()}, []
    for i, name in enumerate(names):
        if name in in_root:  # the common case
            continue
        parent, _, base = name.rpartition(b"/")
        if parent not in listings:
            parts = parent.replace(os.fsencode(os.sep), b"/").split(b"/")
            is_inside = parts[0] and b".." not in parts and not os.path.splitdrive(parent)[0]
            path = os.path.join(root, parent)
            listings[parent] = _list_folder(path) if is_inside else frozenset()
        if base not in listings[parent]:
            unlisted.append(i)
    return unlisted


def _list_folder(folder: bytes) -> frozenset[bytes]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: a null character
        return frozenset()


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder; links are followed unless they lead back to a folder above.

    Files of a folder are in the order of the system, folders in that of their names.
    """
    above = {str(folder): frozenset(map(str, Path(folder).resolve().parents))}
    for home, folders, names in os.walk(folder, followlinks=True):
        real, parents = os.path.realpath(home), above.pop(home)
        if real in parents:
            folders.clear()
            continue
        folders.sort()
        above.update((os.path.join(home, name), parents | {real}) for name in folders)
        yield from (Path(home, name) for name in names)


# --------------------------------------------------------------------------------- resolution


class _Resolver:
    """The files below a folder, and what names in other spellings mean by them."""

    def __init__(self, folder: Path, files: Iterable[str]):
        # With and without links in the path of the folder itself.
        self.roots = [Path(os.path.abspath(folder)).as_posix(), Path(folder).resolve().as_posix()]
        self.files = set(files)
        self.by_path, self.by_ending = defaultdict(list), defaultdict(list)
        for file in sorted(self.files):
            key = _key(file)
            self.by_path[key].append(file)
            for ending in _endings(key):
                self.by_ending[ending].append(file)

    def resolve_all(self, names: list[str], found: set[str]) -> dict[str, str | int]:
        """Return for each name its file, or the position in PROBLEMS.

        A guess is refused where another name has the file: `found` are names that are files.
        """
        paths = {name: [self.below_root(text) for text in _spellings(name)] for name in names}
        exact = {
            name: next((path for path in paths[name] if path in self.files), None) for name in names
        }
        taken = {*map(posixpath.normpath, found), *exact.values()}
        guesses = {name: self.guess(name, paths[name]) for name in names if exact[name] is None}
        counts = Counter(guesses.values())
        for name, file in guesses.items():
            if isinstance(file, str) and file in taken:
                guesses[name] = _classify(name)
            elif isinstance(file, str) and counts[file] > 1:
                guesses[name] = AMBIGUOUS
        return {**exact, **guesses}

    def guess(self, name: str, paths: list[str]) -> str | int:
        """Return the only file that fits a path of the name, or else a position in PROBLEMS."""
        problem = _classify(name)
        for path in paths:
            is_elsewhere = problem != ADDRESS and _leads_out(path)
            if is_elsewhere and os.path.exists(os.path.join(self.roots[0], path)):
                break  # a file of this machine, and not one below the folder
            candidates = self.by_path.get(_key(path)) or self.related(path)
            if len(candidates) > 1:
                return AMBIGUOUS
            if candidates:
                return candidates[0]
        return problem

    def below_root(self, text: str) -> str:
        """Return a path relative to the folder; one outside stays absolute, or begins with '..'."""
        path = posixpath.normpath(text)
        whole = path if ABSOLUTE.match(path) else posixpath.normpath(f"{self.roots[0]}/{path}")
        for root in self.roots:
            if whole.startswith(f"{root}/"):
                return whole[len(root) + 1 :]
        return path

    def related(self, path: str) -> list[str]:
        """Return the files whose path ends with this one, or the reverse, in whole components."""
        key = re.sub(r"^([a-z]:)?/+|^(\.\./)+", "", _key(path))
        found = list(self.by_ending.get(key, ()))
        for ending in _endings(key):
            found += self.by_path.get(ending, ())
        return list(dict.fromkeys(found))


def _key(path: str) -> str:
    """Return what is equal for paths that differ in letter case or Unicode normal form only."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _endings(path: str) -> Iterator[str]:
    """Yield the path, and what is left without its first components."""
    yield path
    while "/" in path:
        path = path.partition("/")[2]
        yield path


def _leads_out(path: str) -> bool:
    return bool(ABSOLUTE.match(path)) or path == ".." or path.startswith("../")


def _classify(name: str) -> int:
    if URL.match(name) or SERVER_PATH.match(name):
        return ADDRESS
    path = posixpath.normpath(name.replace("\\", "/"))
    if ABSOLUTE.match(path):
        return OUTSIDE
    return PARENT if _leads_out(path) else MISSING


def _spellings(name: str) -> Iterator[str]:
    """Yield the name, and what is left after each step of decoding it."""
    steps: tuple[Callable[[str], str], ...] = (
        _path_of_address,
        unquote,
        lambda text: text.replace("\\", "/"),
        lambda text: UPLOADED.sub(r"\1", text),
    )
    yield name
    for step in steps:
        decoded = step(name)
        if decoded != name:
            yield decoded
        name = decoded


def _path_of_address(text: str) -> str:
    if not (URL.match(text) or SERVER_PATH.match(text)):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:  # such as http://[
        return text
    return parse_qs(parts.query).get("d", [parts.path])[0]
