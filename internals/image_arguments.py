"""The images that files, folders and patterns on a command line stand for, and names for them."""

import glob
import os
from pathlib import Path, PurePath

from internals.errors import UserError
from internals.images import IMAGE_SUFFIXES, image_files


def find_images(arguments: list[str]) -> list[tuple[Path, str, str]]:
    """Find the images that command-line arguments stand for, in that order, each once.

    Args:
        arguments: files, folders, which stand for all images below them, or patterns.

    Returns:
        For each image its absolute path, its name, which is the path from the folder that holds all
        of them, and a unique name without suffix for files that are made of it.

    Raises:
        UserError: an argument stands for nothing.
    """
    found = [pair for argument in arguments for pair in _expand(argument)]
    paths = list(dict.fromkeys(os.path.abspath(path) for _, path in found))
    try:
        root = os.path.commonpath([os.path.abspath(folder) for folder, _ in found])
        names = [PurePath(path).relative_to(root).as_posix() for path in paths]
    except ValueError:  # several drives of Windows
        names = [PurePath(path.replace(":", "")).as_posix() for path in paths]
    return list(zip(map(Path, paths), names, _unique_stems(names), strict=True))


def _expand(argument: str) -> list[tuple[Path, Path]]:
    """Return (folder, file) for each image that an argument stands for.

    What exists is no pattern, whatever brackets its name has. Patterns are expanded here if the
    shell has not done so, as those of Windows do not.
    """
    path = Path(argument)
    if path.is_dir():
        files = image_files(path)
        if not files:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"there is no image in the folder {argument} ({suffixes})")
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
    """Return file names without suffix, with a number where they would be equal without it.

    Stems that differ in capitals alone count as equal, as they do on some file systems.
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
