"""Download of COCO from a mirror on disk."""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPTS, run

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


def make_archives(tmp_path: Path, member: str = "{}/0.txt") -> tuple[Path, Path]:
    """Write three small archives; return a script that downloads them, and their mirror."""
    root = tmp_path / "project"
    for name in ("start_scripts", "datasets"):
        (root / name).mkdir(parents=True)
    (root / "start_scripts/common.sh").write_text((SCRIPTS / "common.sh").read_text())
    text = (ROOT / "datasets/download_coco.sh").read_text()
    mirror = tmp_path / "mirror"
    for line in [line for line in text.splitlines() if line.startswith("get ")]:
        _, name, path, size, md5 = line.split()
        (mirror / path).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(mirror / path, "w") as archive:
            archive.writestr(member.format(name), name * 1000)
        content = (mirror / path).read_bytes()
        text = text.replace(size, str(len(content)))
        text = text.replace(md5, hashlib.md5(content).hexdigest())
    script = root / "datasets/download_coco.sh"
    script.write_text(text)
    return script, mirror


def test_download_is_resumed_and_verified(tmp_path):
    script, mirror = make_archives(tmp_path)
    coco = tmp_path / "my coco"

    def download():
        return run("bash", script, coco, COCO_URL=f"file://{mirror}", VIRTUAL_ENV=sys.prefix)

    val = mirror / "zips/val2017.zip"
    content = val.read_bytes()
    val.unlink()
    failed = download()
    assert failed.returncode == 2
    assert "run the same command again" in failed.stderr
    assert "downloading" in failed.stdout
    assert (coco / "annotations/0.txt").exists()
    val.write_bytes(content[:-1] + b"x")
    tampered = download()
    assert tampered.returncode == 2
    assert "differs from the published archive" in tampered.stderr
    assert not (coco / "val2017").exists()
    val.write_bytes(content)
    (coco / "val2017.zip").write_bytes(content[:50])  # an interrupted download
    done = download()
    assert done.returncode == 0, done.stderr
    assert (coco / "val2017/0.txt").read_text() == "val2017" * 1000
    assert not list(coco.glob("*.zip"))
    again = download()
    assert again.stdout.count(": complete") == 3
    assert "downloading" not in again.stdout


def test_archive_with_path_traversal_is_rejected(tmp_path):
    script, mirror = make_archives(tmp_path, member="../{}.txt")
    coco = tmp_path / "coco"
    done = run("bash", script, coco, COCO_URL=f"file://{mirror}", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 2
    assert "../annotations.txt would be written outside" in done.stderr
    assert not (tmp_path / "annotations.txt").exists()
