"""Find the image files of a folder: one rule for what is data, on disks and in buckets.

These are no data, and are counted instead: hidden and system files and folders, pipes and devices, directories of runs,
files of other types, and folders that cannot be listed. A file that cannot be examined is left to its reader.
"""

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from umae_jax.data.formats import has_image_suffix
from umae_jax.errors import printable
from umae_jax.files import AnyPath, files_in_bucket, in_bucket

# Files and folders that systems write beside a user's own, in lower case.
SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler"),  # Windows
        *("system volume information", "found.000"),
        *("lost+found", "__pycache__", "~snapshot"),  # Linux, Python, NetApp
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "@tmp"),  # Synology, QNAP
    )
)

# A run's directory holds config.json and one of these. If it is the given folder itself, its own folders are left out.
RUN_CONFIG = "config.json"
RUN_FOLDERS = frozenset(("checkpoints", "checkpoints_best", "reconstructions", "tensorboard", "compiled"))
RUN_FILES = frozenset(("metrics.jsonl",))

HIDDEN = "hidden or system"
OTHER = "of other types"
SPECIAL = "special (pipe, socket or device)"
RUNS = "written by a run"
UNLISTED = "that cannot be listed"


class Found:
    """The files of a folder.

    Attributes:
        images: paths of the image files, relative to the folder, sorted.
        subfolders: names of the folders directly below that may hold images.
        left_out: number and first name of the files and folders left out, by reason.
    """

    def __init__(self) -> None:
        self.images: list[str] = []
        self.subfolders: set[str] = set()
        self.left_out: dict[str, tuple[int, str]] = {}

    def leave_out(self, reason: str, name: str) -> None:
        """Count a file or folder that is no data."""
        count, first = self.left_out.get(reason, (0, name))
        self.left_out[reason] = (count + 1, min(first, name))

    def describe_left_out(self) -> str:
        """Return the counts and first names, as a phrase."""
        return ", ".join(
            f"{count:,} {reason} (first {printable(first)})" for reason, (count, first) in self.left_out.items()
        )


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or written by a system."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def find_images(root: AnyPath) -> Found:
    """Find the image files of a folder at any depth.

    Raises:
        OSError: if a folder cannot be listed for another reason than missing permission.
    """
    found = Found()
    if in_bucket(root):
        prefix = f"{root}/"
        _sift([file.removeprefix(prefix) for file in files_in_bucket(root)], found)
    else:
        found.images.extend(_walk(str(root), found))
    found.images.sort()
    return found


def _walk(root: str, found: Found) -> Iterator[str]:
    """Yield the image files of a tree on a disk, and follow symbolic links, which may form cycles."""
    visited = set()
    pending = [""]
    while pending:
        folder = pending.pop()  # "", or ends in /
        images, folders, left_out, contents = [], [], [], set()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = entry.name
                    if is_hidden(name):
                        left_out.append((HIDDEN, f"{name}/" if _is_folder(entry) else name))
                    elif _is_folder(entry):
                        folders.append(name)
                        contents.add(name)
                    elif not has_image_suffix(name):
                        left_out.append((OTHER, name))
                        contents.add(name)
                    elif _is_special(entry):
                        left_out.append((SPECIAL, name))
                    else:
                        images.append(name)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            if not folder:
                raise
            found.leave_out(UNLISTED, folder)
            continue
        if _is_run(contents):
            if folder:
                found.leave_out(RUNS, folder)
                continue
            folders = [name for name in folders if name not in RUN_FOLDERS]
        for reason, name in left_out:
            found.leave_out(reason, folder + name)
        if not folder:
            found.subfolders.update(folders)
        yield from (folder + name for name in images)
        pending += [f"{folder}{name}/" for name in sorted(folders, reverse=True)]


def _is_run(contents: set[str]) -> bool:
    """Return whether a folder with these files and folders is a run's directory."""
    return RUN_CONFIG in contents and not contents.isdisjoint(RUN_FOLDERS | RUN_FILES)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry exists and is no regular file; opening a pipe would wait for its writer."""
    try:
        return not entry.is_file() and entry.stat() is not None
    except OSError:  # a link to nothing, or one that cannot be followed
        return False


def _sift(files: list[str], found: Found) -> None:
    """Sort the files of a bucket, which has no folders of its own."""
    contents: dict[str, set[str]] = {}  # of each folder that may be a run's directory
    for file in files:
        path = PurePosixPath(file)
        if path.name == RUN_CONFIG:
            contents.setdefault(str(path.parent), set()).add(RUN_CONFIG)
        if path.name in RUN_FILES:
            contents.setdefault(str(path.parent), set()).add(path.name)
        for folder in path.parents:
            if folder.name in RUN_FOLDERS:
                contents.setdefault(str(folder.parent), set()).add(folder.name)
    runs = {folder for folder, names in contents.items() if _is_run(names)}
    folders: dict[str, set[str]] = {HIDDEN: set(), RUNS: set()}  # each is counted once
    for file in files:
        *parents, name = file.split("/")
        paths = ["/".join(parents[: depth + 1]) for depth in range(len(parents))]
        hidden = next((path for path, part in zip(paths, parents, strict=True) if is_hidden(part)), None)
        run = next((path for path in paths if path in runs), None)
        if run is None and "." in runs and parents and parents[0] in RUN_FOLDERS:
            continue
        if hidden is not None:
            folders[HIDDEN].add(hidden)
        elif run is not None:
            folders[RUNS].add(run)
        elif is_hidden(name):
            found.leave_out(HIDDEN, file)
        else:
            found.subfolders.update(parents[:1])
            if has_image_suffix(name):
                found.images.append(file)
            elif name:  # else the object that stands for a folder
                found.leave_out(OTHER, file)
    for reason, names in folders.items():
        for folder_name in names:
            found.leave_out(reason, f"{folder_name}/")
