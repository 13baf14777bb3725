"""A submission's git repository: what is committed, what is in Git LFS, and which tags a commit has.

Nothing in it is changed. Git LFS itself is not needed: its pointers are short text files.

References
----------
git-lfs/docs/spec.md, gitattributes(5), git-ls-tree(1).
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluator.process import POINTER, POINTER_SIZE
from kmdx.errors import KmdxError, first_line

SUBMISSION = "submission-"
"""Beginning of the name of a tag that AIcrowd evaluates."""
_LOCAL = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_COMMON_DIR",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
)
"""Environment variables that would make git use another repository, such as in a hook."""
_FIELDS = re.compile(rb"\noid sha256:([0-9a-f]{64})\nsize ([0-9]+)\n")


class RepositoryError(KmdxError):
    """A folder is not a git repository, or git reports an error."""


@dataclass(frozen=True)
class Pointer:
    """What Git LFS stores in git instead of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class CommittedFile:
    """A file of a commit."""

    path: str  # relative to the repository's folder
    bytes: int  # size in git
    pointer: Pointer | None  # if the file is in Git LFS


@dataclass(frozen=True)
class Tag:
    """A tag of a commit."""

    name: str
    annotated: bool


class Repository:
    """The git repository of a submission.

    Parameters
    ----------
    folder : Path
        Its top folder.

    Raises
    ------
    RepositoryError
        If git is missing, or the folder is not the top of a repository.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        top = os.fsdecode(self._git("rev-parse", "--show-toplevel")).rstrip("\n")
        if Path(top).resolve() != self.folder:
            raise RepositoryError(f"{folder} is not a git repository of its own, but a part of {top}")

    @property
    def private(self) -> Path:
        """Git's own folder, on the same disk as the repository; nothing in it is ever committed."""
        return Path(os.fsdecode(self._git("rev-parse", "--absolute-git-dir")).rstrip("\n"))

    def head(self) -> str | None:
        """The current commit; None before the first."""
        try:
            return self._git("rev-parse", "--verify", "--quiet", "HEAD^{commit}").decode().strip()
        except RepositoryError:
            return None

    def changes(self) -> list[str]:
        """Files that differ from the current commit, or are neither committed nor ignored."""
        lines = self._git("status", "--porcelain", "--no-renames", "--untracked-files=all", "-z").split(b"\0")
        return [os.fsdecode(line[3:]) for line in lines if line]

    def files(self) -> dict[str, CommittedFile]:
        """The files of the current commit by their paths."""
        entries = []
        for line in self._git("ls-tree", "-r", "-z", "--long", "HEAD").split(b"\0"):
            if line:
                facts, path = line.split(b"\t", 1)
                _, kind, identity, size = facts.split()
                if kind == b"blob":
                    entries.append((os.fsdecode(path), identity, int(size)))
        small = [identity for _, identity, size in entries if size < POINTER_SIZE]
        pointers = dict(self._pointers(small))
        return {path: CommittedFile(path, size, pointers.get(identity)) for path, identity, size in entries}

    def in_lfs(self, paths: Sequence[str]) -> set[str]:
        """Those of the paths that Git LFS would store if they were committed now."""
        if not paths:
            return set()
        names = b"\0".join(map(os.fsencode, paths))
        words = self._git("check-attr", "-z", "--stdin", "filter", given=names).split(b"\0")
        return {os.fsdecode(words[i]) for i in range(0, len(words) - 2, 3) if words[i + 2] == b"lfs"}

    def lfs_is_set_up(self) -> bool:
        """Whether git runs Git LFS when files are committed."""
        try:
            self._git("config", "--get", "filter.lfs.clean")
            return shutil.which("git-lfs") is not None
        except RepositoryError:
            return False

    def tags(self) -> list[Tag]:
        """The submission tags of the current commit."""
        shown = self._git(
            "for-each-ref", "--points-at=HEAD", "--format=%(objecttype) %(refname:strip=2)", "refs/tags"
        )
        found = [line.split(" ", 1) for line in os.fsdecode(shown).splitlines()]
        return [Tag(name, kind == "tag") for kind, name in found if name.startswith(SUBMISSION)]

    def export(self, target: Path) -> None:
        """Write the files of the current commit into a folder, as a clone with Git LFS would have them.

        Files in Git LFS are linked or copied from what a push would upload; one that is missing there stays
        a pointer.
        """
        index = target.with_name(f"{target.name}.index")
        settings = {"GIT_INDEX_FILE": str(index), "GIT_LFS_SKIP_SMUDGE": "1"}
        try:
            self._git("read-tree", "HEAD", settings=settings)
            self._git("checkout-index", "--all", f"--prefix={target}{os.sep}", settings=settings)
        finally:
            index.unlink(missing_ok=True)
        for file in self.files().values():
            if file.pointer and (source := self.stored(file.pointer)):
                (target / file.path).unlink()
                _link_or_copy(source, target / file.path)

    def stored(self, pointer: Pointer) -> Path | None:
        """The content of a file in the local storage of Git LFS; None if it is not there."""
        common = os.fsdecode(self._git("rev-parse", "--git-common-dir")).rstrip("\n")
        digest = pointer.sha256
        path = self.folder / common / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
        return path if path.is_file() and path.stat().st_size == pointer.bytes else None

    def _pointers(self, identities: Sequence[bytes]) -> Iterator[tuple[bytes, Pointer]]:
        """The objects that are pointers of Git LFS."""
        output = self._git("cat-file", "--batch", given=b"\n".join(identities)) if identities else b""
        while output:
            facts, _, output = output.partition(b"\n")
            identity, _, size = facts.split()
            content, output = output[: int(size)], output[int(size) + 1 :]
            if content.startswith(POINTER) and (fields := _FIELDS.search(content)):
                yield identity, Pointer(fields[1].decode(), int(fields[2]))

    def _git(self, *words: str, given: bytes = b"", settings: dict[str, str] | None = None) -> bytes:
        """Run git in the repository; return what it prints."""
        kept = {name: value for name, value in os.environ.items() if name not in _LOCAL}
        try:
            ended = subprocess.run(
                ["git", "-C", str(self.folder), *words],
                input=given,
                capture_output=True,
                env={**kept, "LC_ALL": "C", **(settings or {})},
            )
        except OSError as error:
            raise RepositoryError(f"git cannot be run: {error.strerror}") from error
        if ended.returncode:
            problem = first_line(RuntimeError(os.fsdecode(ended.stderr))).removeprefix("fatal: ")
            raise RepositoryError(f"{self.folder}: git {words[0]} failed: {problem}")
        return ended.stdout


def _link_or_copy(source: Path, target: Path) -> None:
    """Link to a file, or copy it if that is impossible or other users may not read it."""
    if source.stat().st_mode & stat.S_IROTH:
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)
    target.chmod(0o644)
