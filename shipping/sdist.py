# SPDX-License-Identifier: Apache-2.0
"""Build the source distribution, the same bytes from the same commit.

    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) python shipping/sdist.py FOLDER

setuptools writes today's date, the user's name and the order of the disk into the archive; here all entries are of
SOURCE_DATE_EPOCH and nobody's, and sorted. Needs the package `build`.
"""

import gzip
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def normalised(entry, date):
    """The entry without what depends on where and when it was archived."""
    entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = date, 0, 0, "", ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    entry.pax_headers = {}
    return entry


def main(folder):
    """Build in a temporary folder, and write the archive anew into `folder`."""
    date = int(os.environ["SOURCE_DATE_EPOCH"])
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "build", "--sdist", "--outdir", scratch, root]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (built,) = Path(scratch).glob("*.tar.gz")
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tarfile.open(built) as source,
            open(folder / built.name, "wb") as file,
            gzip.GzipFile("", "wb", mtime=date, fileobj=file) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as target,
        ):
            for entry in sorted(source.getmembers(), key=lambda entry: entry.name):
                content = source.extractfile(entry) if entry.isfile() else None
                target.addfile(normalised(entry, date), content)
    print(folder / built.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
