"""Match images on a command line with those of an annotation file."""

import os
from pathlib import Path

import utils
from coco_utils import Categories, CocoIndex, Split
from internals import file_names
from internals.errors import UserError
from reporting.annotation_files import NamedImage


def match_annotations(images: list[NamedImage], file: Path, categories: Categories) -> CocoIndex:
    """Read an annotation file, and set the file name, id and size of its images.

    An image matches the longest annotated file name that its path ends with, or else the one that
    means it in another spelling (`file_names`). Images without a match get new ids.

    Raises:
        UserError: The annotation file has other categories, no image matches, or several images
            match one file name.
    """
    index = CocoIndex(Split(file, file.parent), resolve_names=False)
    categories.check_contains(index.categories, file)
    for issue in index.issues:
        utils.log(f"not drawn: {issue}")
    names = [os.path.normpath(index.file_name(i)).replace("\\", "/") for i in range(len(index))]
    rows = match_names(images, {name: i for i, name in reversed(list(enumerate(names)))})
    owners, last_id = {}, int(index.image_ids.max())
    for image in images:
        row = rows.get(image.file_name)
        if row is None:
            last_id += 1
            image.image_id = last_id
            continue
        name, image_id = index.file_name(row), int(index.image_ids[row])
        if row in owners:
            raise UserError(
                f"--show-truth: {file} lists {name} once (id {image_id}), but it "
                f"may be {owners[row]} or {image.path}: remove one from the images"
            )
        owners[row] = image.path
        image.row, image.annotated_size = row, tuple(index.sizes[row].tolist())
        image.image_id = image_id
        if image.path.as_posix().endswith(names[row]):  # else in another spelling
            image.file_name = name
    if not owners:
        raise UserError(f"--show-truth: {file} lists none of the images: compare the file names")
    return index


def match_names(images: list[NamedImage], rows: dict[str, int]) -> dict[str, int]:
    """Return the row of each image that one of the names of `rows` means, by its file name."""
    matched, others = {}, []
    for image in images:
        parts = image.path.parts
        endings = ("/".join(parts[n:]) for n in range(len(parts)))
        ending = next((ending for ending in endings if ending in rows), None)
        if ending is None:
            others.append(image.file_name)
        else:
            matched[image.file_name] = rows[ending]
    if others:
        folder = images[0].path.as_posix().removesuffix(images[0].file_name)
        used = set(matched.values())
        names = (name for name, row in rows.items() if row not in used)
        for file, name in file_names.match_files(names, Path(folder), others).items():
            matched[file] = rows[name]
    return matched
