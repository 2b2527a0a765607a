"""Resolve files, folders and patterns on a command line to images, and name their outputs."""

import glob
import os
from pathlib import Path, PurePath

from internals.errors import UserError
from internals.images import IMAGE_SUFFIXES, image_files


def find_images(arguments: list[str]) -> list[tuple[Path, str, str]]:
    """Resolve command-line arguments to images, in their order and without duplicates.

    Args:
        arguments: Files, folders (with their subfolders) or patterns.

    Returns:
        For each image its absolute path, its path relative to the common folder of all images, and
        a unique name without suffix for output files.

    Raises:
        UserError: An argument matches no image.
    """
    pairs = [pair for argument in arguments for pair in _expand(argument)]
    paths = list(dict.fromkeys(os.path.abspath(path) for _, path in pairs))
    try:
        root = os.path.commonpath([os.path.abspath(folder) for folder, _ in pairs])
        names = [PurePath(path).relative_to(root).as_posix() for path in paths]
    except ValueError:  # several drives on Windows
        names = [PurePath(path.replace(":", "")).as_posix() for path in paths]
    return list(zip(map(Path, paths), names, _unique_stems(names), strict=True))


def _expand(argument: str) -> list[tuple[Path, Path]]:
    """Return (folder, file) for each image that an argument matches.

    An existing path is not treated as a pattern, even if its name has brackets. Shells on Windows
    do not expand patterns.
    """
    path = Path(argument)
    if path.is_dir():
        files = image_files(path)
        if not files:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"{argument}: no image in this folder or below ({suffixes})")
        return [(path, file) for file in files]
    if path.exists():
        return [(path.parent, path)]
    if not glob.has_magic(argument):
        raise UserError(f"{argument}: no such file or folder")
    matches = sorted(glob.glob(argument, recursive=True))
    if not matches:
        raise UserError(f"{argument}: no file matches this pattern")
    return [pair for match in matches for pair in _expand(match)]


def _unique_stems(names: list[str]) -> list[str]:
    """Return file names without suffix; a number is appended to repeated ones.

    Stems that differ only in case are equal, as on some file systems.
    """
    stems, taken = [], set()
    for name in names:
        stem = unique = PurePath(name).with_suffix("").as_posix()
        number = 1
        while unique.lower() in taken:
            number += 1
            unique = f"{stem}-{number}"
        taken.add(unique.lower())
        stems.append(unique)
    return stems
