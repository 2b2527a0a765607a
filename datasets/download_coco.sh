#!/usr/bin/env bash
# Download COCO 2017 (train, val and annotations; 20 GB, up to 40 GB while unpacking) to FOLDER
# (default: datasets/coco):
#
#   bash datasets/download_coco.sh [FOLDER]
#
# Run it again to resume an interrupted download; complete archives are skipped. Each archive is
# verified by size and MD5, unpacked, and removed.
# COCO_URL=... downloads from a mirror with the same paths.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../start_scripts/common.sh"

folder=${1:-$ROOT/datasets/coco}
url=${COCO_URL:-https://s3.amazonaws.com/images.cocodataset.org}
find_python || PYTHON=$(command -v python3) || fail "no python3 found: install it to unpack the archives"
command -v curl > /dev/null || fail "no curl found: install it, e.g. apt install curl"
mkdir -p "$folder"

# Prints the MD5 of a file; in Python, because not every system has md5sum.
md5_of() {
    "$PYTHON" -c 'import hashlib, sys
digest = hashlib.md5(usedforsecurity=False)
with open(sys.argv[1], "rb") as file:
    while block := file.read(1 << 20):
        digest.update(block)
print(digest.hexdigest())' "$1"
}

# Unpacks an archive, unless a member would be written outside of the folder.
unpack() {
    "$PYTHON" -c 'import os, sys, zipfile
archive, folder = sys.argv[1:]
root = os.path.realpath(folder)
with zipfile.ZipFile(archive) as opened:
    for name in opened.namelist():
        if not os.path.realpath(os.path.join(root, name)).startswith(os.path.join(root, "")):
            sys.exit(f"{archive}: {name} would be written outside of {folder}: nothing was unpacked")
    opened.extractall(root)' "$1" "$folder" || fail "$1 was not unpacked"
}

# get NAME PATH BYTES MD5
get() {
    local name=$1 path=$2 bytes=$3 md5=$4 archive=$folder/$1.zip done_mark=$folder/.$1.complete
    if [ -f "$done_mark" ]; then
        echo "$name: complete"
        return
    fi
    if [ "$(wc -c < "$archive" 2> /dev/null || echo 0)" -lt "$bytes" ]; then
        echo "$name: downloading $((bytes / 1000000)) MB"
        curl --fail --location --proto =https,file --retry 5 --continue-at - \
            --output "$archive" "$url/$path" ||
            fail "$name: the download was interrupted: run the same command again to resume"
    fi
    echo "$name: verifying"
    if [ "$(wc -c < "$archive")" -ne "$bytes" ] || [ "$(md5_of "$archive")" != "$md5" ]; then
        rm "$archive"
        fail "$archive differs from the published archive (size or MD5) and was removed: try again"
    fi
    echo "$name: unpacking"
    unpack "$archive"
    touch "$done_mark"
    rm "$archive"
}

get annotations annotations/annotations_trainval2017.zip 252907541 f4bbac642086de4f52a3fdda2de5fa2c
get val2017 zips/val2017.zip 815585330 442b8da7639aecaf257c1dceb8ba8c80
get train2017 zips/train2017.zip 19336861798 cced6f7f71b7629ddf16f17bbcfab6b2
echo "COCO 2017: $folder"
