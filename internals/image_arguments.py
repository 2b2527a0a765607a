"""Resolve files, folders and patterns on a command line to images, and name their outputs."""

import glob
import os
from pathlib import Path, PurePath

from internals.errors import UserError
from internals.images import IMAGE_SUFFIXES, image_files

OUTPUT_SUFFIXES = (".jpg", ".png", ".txt", ".xml", ".mp4")
MAX_NAME = 230  # bytes of a stem: most file systems allow 255 in a name


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

    Stems that differ only in case are equal, as on some file systems. No output file has the name
    of a folder, or one that is too long.
    """
    stems, taken = [], set()
    folders = {parent.as_posix().lower() for name in names for parent in PurePath(name).parents}
    for name in names:
        path = PurePath(name).with_suffix("")
        stem = unique = path.with_name(_shorten(path.name)).as_posix()
        number = 1
        while unique.lower() in taken or any(
            f"{unique}{suffix}".lower() in folders for suffix in OUTPUT_SUFFIXES
        ):
            number += 1
            unique = f"{stem}-{number}"
        taken.add(unique.lower())
        stems.append(unique)
    return stems


def _shorten(name: str) -> str:
    """Cut a name for a number and a suffix to fit behind it."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= MAX_NAME else encoded[:MAX_NAME].decode(errors="ignore")
