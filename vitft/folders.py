"""A folder of photographs -> what is in it, each file once, and which class each folder says.

In: a root with one folder per class, or with `train/ val/ test/` that hold such folders. Out: a
`Listing`, nothing opened and nothing written. The walk is our own because `os.walk` drops a folder
it may not read without a word and follows link loops for ever.
"""

import difflib
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitft.errors import DataError, Fault

# What the decoder reads, and what it refuses by name (HEIC, AVIF, JXL): those must not vanish here.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"),
)
TUTORIAL_EXTENSIONS = (".jpg", ".JPG", ".png", ".PNG")
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "icon\r")
SHARDS = {".tar": "wds", ".parquet": "hfds", ".arrow": "hfds"}  # what holds photographs in a file
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass(frozen=True)
class Entry:
    """One file that claims to be a photograph.

    Attributes:
        path: Relative to the root, with forward slashes; bytes that are not UTF-8 as surrogates.
        label: Name of its class.
        split: `train`, `val`, `test`, or empty where nobody has decided yet.
        group: Files of one group stay on one side of the split; empty is no group.
    """

    path: str
    label: str
    split: str = ""
    group: str = ""


@dataclass(frozen=True)
class Listing:
    """Everything found below a root, before any file is opened.

    Attributes:
        root: What paths are relative to.
        entries: Sorted by path.
        classes: All class names in the order of their labels, empty ones too.
        found: Files met; equals `len(entries)` plus the sum of `ignored`.
        ignored: Reason -> number of files left out for it.
        not_entered: Reason -> number of folders left out for it.
        warnings: What a person should know and may well want.
    """

    root: Path
    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    found: int
    ignored: dict[str, int] = field(default_factory=dict)
    not_entered: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_folders(
    root: Path,
    *,
    split: str,
    class_from: str = "auto",
    extensions: Sequence[str] = (),
    follow_links: bool = True,
    allow_empty: bool = False,
) -> Listing:
    """Lists the photographs of a folder with their classes and, where folders say so, their split.

    Args:
        root: The folder.
        split: `auto` and `folders` look for `train/ val/ test/`; all else reads class folders.
        class_from: `auto`: one folder per class and nothing deeper; `top`: the first folder;
            `leaf`: the folder around the file; `path`: all folders, such as `eu/cat`.
        extensions: Endings of photographs beside the known ones.
        follow_links: Enter symbolic links; each folder is still read only once.
        allow_empty: Keep a class whose folder holds no photograph.

    Raises:
        DataError: `data.root_*`, `data.unreadable_folder`, `data.image_in_root`, `data.nested`,
            `data.empty_class`, `data.no_train`, `data.no_val`, `data.layout`: all that are found.
    """
    check_root(root)
    tutorial = split == "tutorial"
    accept = TUTORIAL_EXTENSIONS if tutorial else (*EXTENSIONS, *(e.lower() for e in extensions))
    tree = _Tree(root, accept, fold_case=not tutorial, follow_links=follow_links)
    tree.walk()
    parts = _split_parts(tree, split)
    entries = [e for part in parts for e in _entries(tree, part, class_from)]
    if not entries and not tree.faults:
        tree.faults.append(_nothing_found(tree))
    classes = sorted({e.label for e in entries if e.split in ("", "train")})
    empty = sorted(_empty_classes(tree, parts, class_from) - set(classes))
    if not allow_empty:
        tree.faults += [empty_class(root, name) for name in empty]
    if tree.faults:
        raise DataError(tree.faults)
    entries.sort(key=lambda e: e.path)
    return Listing(
        root=root,
        entries=tuple(entries),
        classes=tuple(sorted({*classes, *empty})),
        found=len(entries) + sum(tree.ignored.values()),
        ignored=dict(tree.ignored),
        not_entered=dict(tree.not_entered),
        warnings=(*tree.remarks(), *(f"class {name!r} has no photograph" for name in empty)),
    )


def check_root(root: Path) -> None:
    """Raises a DataError that says what the root is instead of a readable folder."""
    try:
        kind = root.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError([_missing(root)]) from None
    except OSError as error:
        raise DataError([_closed(root, error, "data.root_permission")]) from None
    if stat.S_ISDIR(kind.st_mode):
        return
    if root.suffix.lower() in ARCHIVES:
        text = f"is an archive of {kind.st_size:,} bytes, not a folder"
        raise DataError.of("data.root_archive", root, text, "unpack it and name the folder")
    raise DataError.of(
        "data.root_file",
        root,
        f"is a file of {kind.st_size:,} bytes, not a folder or a .csv",
        "name the folder that holds one folder per class, or a .csv with columns path,label",
    )


def owner_and_mode(path: str | Path) -> str:
    """Such as `mode 0700, owner 1000, group 1000; you are user 65534`."""
    try:
        s = os.lstat(path)
    except OSError as error:
        return f"not even its mode can be read ({error.strerror})"
    user = os.geteuid() if hasattr(os, "geteuid") else "unknown"
    mode = stat.S_IMODE(s.st_mode)
    return f"mode {mode:04o}, owner {s.st_uid}, group {s.st_gid}; you are user {user}"


def instead(path: Path) -> tuple[str, Path | None]:
    """What there is of a path that is not there, and what may have been meant."""
    if os.path.islink(path):  # noqa: PTH114  (False for a name that is too long, as below)
        return f"is a link to {os.readlink(path)}, which is not there", None  # noqa: PTH115
    up = path.parent
    while not os.path.exists(up) and up != up.parent:  # noqa: PTH110
        up = up.parent
    here = up == path.parent
    text = f"no such file or folder; {up} exists" if here else f"only {up} exists of it"
    try:
        siblings = [p.name for p in up.iterdir()]
    except OSError:
        siblings = []
    wanted, *below = path.relative_to(up).parts or (path.name,)
    near = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.6)
    if not near:
        return text, None
    whole = (up / near[0]).joinpath(*below)
    return text, whole if os.path.exists(whole) else up / near[0]  # noqa: PTH110


def no_run(folder: Path, text: str, fix: str) -> tuple[str, str]:
    """Text and fix for what is no run: mistyped, one level too high, or as the caller says."""
    if not os.path.lexists(folder):  # noqa: PTH110
        text, near = instead(folder)
        return text, f"did you mean {near}?" if near else fix
    if os.path.isdir(folder / "latest"):  # noqa: PTH112
        return "is a folder of runs, not one of them", f"name one, such as {folder / 'latest'}"
    return text, fix


def closest(name: str, classes: Sequence[str]) -> str:
    """Such as `; the closest class is 'rose'`, or nothing where none is close."""
    folded = {c.casefold(): c for c in classes}
    near = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    return f"; the closest class is {folded[near[0]]!r}" if near else ""


class _Tree:
    """One walk: real folders first, so that a link never takes the place of the folder itself."""

    def __init__(
        self, root: Path, accept: Iterable[str], *, fold_case: bool, follow_links: bool
    ) -> None:
        self.root = root
        self.accept = frozenset(accept)
        self.fold_case = fold_case
        self.follow_links = follow_links
        self.files: list[str] = []
        self.dirs: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.not_entered: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.again: list[str] = []
        self.outside = 0
        self._seen: set[tuple[int, int]] = set()
        self._todo: deque[str] = deque([""])
        self._links: deque[str] = deque()
        self._real_root = os.path.realpath(root)

    def walk(self) -> None:
        while self._todo or self._links:
            self._enter(self._todo.popleft() if self._todo else self._links.popleft())

    def full(self, relative: str) -> str:
        return os.path.join(self.root, relative) if relative else os.fspath(self.root)  # noqa: PTH118

    def _enter(self, relative: str) -> None:
        try:
            here = os.stat(self.full(relative))  # noqa: PTH116
            if (here.st_dev, here.st_ino) in self._seen:
                self.again.append(relative)
                self.not_entered["reached before through another path"] += 1
                return
            self._seen.add((here.st_dev, here.st_ino))
            with os.scandir(self.full(relative)) as found:
                children = sorted(found, key=lambda child: child.name)
        except OSError as error:
            id = "data.unreadable_folder" if relative else "data.root_permission"
            self.faults.append(_closed(self.full(relative), error, id))
            return
        if relative:
            self.dirs.append(relative)
        for child in children:
            self._take(child, f"{relative}/{child.name}" if relative else child.name)

    def _take(self, child: "os.DirEntry[str]", relative: str) -> None:
        is_dir = _is_dir(child)
        why_not = _why_not(child.name, is_dir)
        if why_not is None and child.is_symlink():
            why_not = self._link(child)
        if why_not is not None:
            (self.not_entered if is_dir else self.ignored)[why_not] += 1
        elif is_dir:
            (self._links if child.is_symlink() else self._todo).append(relative)
        else:
            self._file(child.name, relative)

    def _link(self, child: "os.DirEntry[str]") -> str | None:
        if not self.follow_links:
            return "symbolic link"
        target = os.path.realpath(child.path)
        self.outside += not (target + os.sep).startswith(self._real_root + os.sep)
        return None

    def _file(self, name: str, relative: str) -> None:
        ending = os.path.splitext(name)[1]  # noqa: PTH122
        if (ending.lower() if self.fold_case else ending) in self.accept:
            self.files.append(relative)
        else:
            self.ignored[f"extension {ending or 'none'}"] += 1

    def remarks(self) -> list[str]:
        """What the walk left out or followed, in words."""
        lines = []
        endings = Counter({k[10:]: n for k, n in self.ignored.items() if k[:10] == "extension "})
        if endings:
            top = endings.most_common(3)
            told = ", ".join(f"{ending} ({n:,})" for ending, n in top)
            n = endings.total()
            line = f"{n:,} file{'s' * (n != 1)} ignored by extension: {told}"
            more = ", ".join(sorted({ending.lower() for ending, _ in top if ending != "none"}))
            if more and self.fold_case:  # the tutorial reads its four endings and no other
                line += f"; where photographs are among them: data.extensions: [{more}]"
            lines.append(line)
        if self.again:
            lines.append(
                f"{len(self.again):,} folders are links to folders read already and were not read "
                f"again: {_some(self.again)}"
            )
        if self.outside:
            lines.append(
                f"{self.outside:,} symbolic links lead outside {self.root} and were followed; "
                "data.follow_links: false leaves them out"
            )
        return lines


@dataclass(frozen=True)
class _Part:
    """One folder of class folders: the root itself (empty name), or `train` and its like."""

    folder: str
    split: str

    def inside(self, paths: Iterable[str]) -> list[tuple[str, ...]]:
        """The paths below this part, cut into their components."""
        start = f"{self.folder}/" if self.folder else ""
        return [tuple(p[len(start) :].split("/")) for p in paths if p.startswith(start)]


def _split_parts(tree: _Tree, split: str) -> list[_Part]:
    tops = [d for d in tree.dirs if "/" not in d]
    named = [_Part(d, SPLIT_FOLDERS[d.lower()]) for d in tops if d.lower() in SPLIT_FOLDERS]
    have = {part.split for part in named}
    looks_split = "train" in have and len(named) == len(tops)
    if split != "folders" and not (split == "auto" and looks_split):
        return [_Part("", "")]
    loose = [f for f in tree.files if "/" not in f]
    if loose:
        tree.faults.append(_loose_fault(tree.root, loose))
    tree.faults += _layout_faults(tree.root, tops, named, have)
    return sorted(named, key=lambda part: part.folder)


def _layout_faults(root: Path, tops: list[str], named: list[_Part], have: set[str]) -> list[Fault]:
    faults = []
    if "train" not in have:
        text = f"data.split: folders needs a train/ folder; folders here: {_some(tops) or 'none'}"
        faults.append(
            Fault("data.no_train", str(root), text, "add train/, or set data.split: stratified")
        )
    elif have == {"train"}:
        train = root / next(part.folder for part in named)
        text = "has train/ but neither val/ nor test/: nothing would be left to measure on"
        fix = f"add val/, or set data.root: {train} so that vitft splits it"
        faults.append(Fault("data.no_val", str(root), text, fix))
    twice = [s for s, n in Counter(part.split for part in named).items() if n > 1]
    other = [d for d in tops if d.lower() not in SPLIT_FOLDERS]
    if twice or other:
        what = (
            f"two folders for {twice[0]}" if twice else f"folders beside the splits: {_some(other)}"
        )
        faults.append(
            Fault("data.layout", str(root), what, "keep one each of train/, val/ and test/")
        )
    return faults


def _entries(tree: _Tree, part: _Part, class_from: str) -> list[Entry]:
    prefix = f"{part.folder}/" if part.folder else ""
    cut = part.inside(tree.files)
    loose = [p[0] for p in cut if len(p) == 1]
    deep = [p for p in cut if len(p) > 2]
    if loose:
        tree.faults.append(
            _loose_fault(tree.root / part.folder, loose, only=len(loose) == len(cut))
        )
    if deep and class_from == "auto":
        tree.faults.append(_nested_fault(tree.root / part.folder, cut, deep))
    return [
        Entry(prefix + "/".join(p), _label(p, class_from), part.split) for p in cut if len(p) > 1
    ]


def _label(parts: tuple[str, ...], class_from: str) -> str:
    if class_from == "leaf":
        return parts[-2]
    return "/".join(parts[:-1]) if class_from == "path" else parts[0]


def _empty_classes(tree: _Tree, parts: list[_Part], class_from: str) -> set[str]:
    """Class folders without a photograph; a class of train/ only, val/ may lack any."""
    empty: set[str] = set()
    for part in parts:
        if part.split in ("", "train"):
            dirs = part.inside(d for d in tree.dirs if d != part.folder)
            full = {p[:k] for p in part.inside(tree.files) for k in range(1, len(p))}
            parents = {d[:-1] for d in dirs}
            bare = [d for d in dirs if d not in full]
            if class_from in ("auto", "top"):
                empty |= {d[0] for d in bare if len(d) == 1}
            else:
                empty |= {_label((*d, ""), class_from) for d in bare if d not in parents}
    return empty


def _is_dir(child: "os.DirEntry[str]") -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _why_not(name: str, is_dir: bool) -> str | None:
    if name.startswith("._"):
        return "AppleDouble (._*)"
    if name.startswith("."):
        return "hidden"
    if is_dir and name == "__MACOSX":
        return "__MACOSX"
    return "system file" if not is_dir and name.lower() in SYSTEM_FILES else None


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(repr(n) for n in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _missing(root: Path) -> Fault:
    text, near = instead(root)
    fix = f"did you mean {near}?" if near else "check data.root"
    return Fault("data.root_missing", str(root), text, fix)


def _closed(path: str | Path, error: OSError, id: str) -> Fault:
    text = f"folder cannot be read: {error.strerror} ({owner_and_mode(path)})"
    fix = "grant read and enter permission (chmod u+rx), or move the folder out of the data"
    return Fault(id, str(path), text, fix)


def _nothing_found(tree: _Tree) -> Fault:
    left_out = ", ".join(f"{k} ({n:,})" for k, n in tree.ignored.most_common(3)) or "no files"
    text = f"no photograph in {len(tree.dirs):,} folders; met {left_out}"
    fix = "name the folder that holds one folder per class; data.extensions names other endings"
    for kind, source in SHARDS.items():
        if f"extension {kind}" in tree.ignored:
            fix = f"set data.source: {source} if the photographs are in the {kind} files"
    return Fault("data.root_empty", str(tree.root), text, fix)


def _loose_fault(folder: Path, loose: list[str], *, only: bool = False) -> Fault:
    text = f"{len(loose):,} images lie outside any class folder: {_some(loose)}"
    fix = "move each into the folder of its class"
    if only:  # perhaps one class folder was named in place of the folder that holds them
        fix += f", or name the folder above if this is one class: {folder.absolute().parent}"
    return Fault("data.image_in_root", str(folder), text, fix)


def _nested_fault(folder: Path, cut: list[tuple[str, ...]], deep: list[tuple[str, ...]]) -> Fault:
    readings = {
        way: sorted({_label(p, way) for p in cut if len(p) > 1}) for way in ("top", "leaf", "path")
    }
    told = "; ".join(f"{way} gives {len(c):,} classes ({_some(c)})" for way, c in readings.items())
    text = f"{len(deep):,} images lie deeper than one folder, such as {'/'.join(deep[0])}: {told}"
    return Fault("data.nested", str(folder), text, "set data.class_from: top, leaf or path")


def empty_class(root: Path, name: str) -> Fault:
    """A class that is named and holds nothing."""
    fix = "add photographs, remove the folder, or set data.allow_empty: true to keep its place"
    return Fault("data.empty_class", str(root), f"class {name!r} holds 0 photographs", fix)
