"""Addresses of files on servers: what `data.root` may say, and the files that it names.

    https://host/plants/{train-{00..31},val-{00..03}}.tar    braces as in a shell
    hf://datasets/OWNER/NAME[@REVISION][/FOLDER or FILES]    what the hub lists, or files of it

An address is written into reports and model files, so it may hold no secret; and each of its names
becomes one on the disk, whatever disk that is.
"""

import re
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from vitft import wire
from vitft.errors import DataError, MachineError, RecipeError
from vitft.folders import SPLIT_FOLDERS

MOST = 100_000  # files of one address
LONGEST = 200  # bytes of a name; a disk has 255, and ours are longer by an ending
KINDS = (".tar", ".parquet")  # files that are a data set on their own; the second is preferred
OURS = ("classes.txt", "hashes.json", "arrived.json")  # what lies beside stand-ins
OUR_ENDINGS = (".members.json", ".samples.json")
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
HUB_ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@{}]+/[^/@{}]+)(@(?P<revision>[^/]+))?(/(?P<path>.+))?",
    re.IGNORECASE,
)
BRACES = re.compile(r"(?P<a>\d+)\.\.(?P<b>\d+)")
SECRET = re.compile(
    r"(^|[-_.])(sig|signature|token|(api)?key|secret|password|auth|credential)($|[-_.])",
    re.IGNORECASE,
)  # what S3, Google, Azure and CloudFront call it, and most others
BAD_ADDRESS = "write such as https://host/plants/train-{0000..0031}.tar"


def is_far(root: str) -> bool:
    """Whether `data.root` is an address, of whatever kind."""
    return SCHEME.match(root) is not None


def host(root: str) -> str:
    """The server of an address, as a name on any disk; no network is touched.

    Raises:
        RecipeError: `data.address`.
    """
    name = urlsplit(wire.hub() if _scheme(root) == "hf" else _expanded(root)[0]).hostname or ""
    return re.sub(r"[^\w.-]", "-", name)[:100]


def urls(root: str) -> list[str]:
    """The files of an address; what lies in a repository of the hub is asked there.

    Raises:
        RecipeError: `data.address`.
        DataError: `data.root_missing`, `data.root_permission`: of the hub.
        MachineError: `env.unreachable`.
    """
    if _scheme(root) != "hf":
        return _expanded(root)
    found = HUB_ADDRESS.fullmatch(root)
    if found is None:
        fix = "write hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME/train-{0000..0031}.tar"
        raise RecipeError.of("data.address", root, "names no data set of the hub", fix)
    repo, revision, path = found["repo"], found["revision"] or "main", found["path"] or ""
    named = PurePosixPath(path).suffix
    paths = expand(path, root) if named else _of_repository(root, repo, revision, path)
    base = f"{wire.hub()}/datasets/{repo}/resolve/{quote(revision, safe='')}"
    return _sound(root, [f"{base}/{quote(one)}" for one in paths])


def _scheme(root: str) -> str:
    scheme = root.partition("://")[0].lower()
    if scheme not in (*wire.WEB, "hf"):
        text = f"{scheme}:// is not read; http, https and hf are"
        fix = "name its https address, mount it as a folder, or copy it"
        raise RecipeError.of("data.address", root, text, fix)
    rest = root.partition("://")[2]
    if "@" in re.split(r"[/?#]", rest)[0]:
        fix = "leave them out: the address is written into reports"
        raise RecipeError.of("data.address", "data.root", "it holds a user or password", fix)
    query = rest.partition("?")[2].partition("#")[0]
    secret = next((k for k, _ in parse_qsl(query, True) if SECRET.search(k)), None)
    if secret:
        text = f"it holds a secret, {secret}, which would be written into reports and model files"
        fix = "make the files readable, mount or copy them, or use hf:// with a token"
        raise RecipeError.of("data.address", "data.root", text, fix)
    return scheme


def _expanded(root: str) -> list[str]:
    """The files of a web address, quoted where a browser would."""
    scheme, rest = _scheme(root), root.partition("://")[2]
    names = [f"{scheme}://{one}" for one in expand(rest, root)]
    try:
        parts = [urlsplit(name) for name in names]
        hosts = {part.hostname for part in parts if part.port != 0}  # asking checks the port
    except ValueError as error:
        raise RecipeError.of("data.address", root, f"is no address: {error}", BAD_ADDRESS) from None
    if hosts <= {None, ""} or any(part.fragment for part in parts):
        text = "names no server" if hosts <= {None, ""} else "holds a #, which ends an address"
        raise RecipeError.of("data.address", root, text, f"{BAD_ADDRESS}; # in a name is %23")
    quoted = [
        part._replace(
            path=quote(part.path, safe="%/:@!$&'()*+,;=~"),
            query=quote(part.query, safe="%/:@!$&'()*+,;=~?"),
        ).geturl()
        for part in parts
    ]
    return _sound(root, quoted)


def _sound(root: str, urls: list[str]) -> list[str]:
    paths = [PurePosixPath(unquote(urlsplit(url).path)) for url in urls]
    kinds = {path.suffix.lower() for path in paths}
    text = next((text for path in paths if (text := _unfit(path))), "")
    if kinds not in ({kind} for kind in KINDS):
        named = ", ".join(sorted(kind or "no ending" for kind in kinds))
        text = f"shards are uncompressed .tar or .parquet files, this names {named}"
    elif len({str(path).casefold() for path in paths}) < len(paths):
        text = "names a file twice, or two that differ in upper and lower case alone"
    elif not text and (inside := {*paths} & {above for path in paths for above in path.parents}):
        text = f"names {min(inside).name} as a file and as a folder"
    if text:
        raise RecipeError.of("data.address", root, text, BAD_ADDRESS)
    return urls


def _unfit(path: PurePosixPath) -> str:
    """Why a path can be no stand-in's."""
    for part in path.parts[1:]:
        if part == "..":
            return "leads upwards (..)"
        if part.startswith("."):
            return f"names {part}, which is hidden: such files are left out"
        if not part.isprintable() or "\\" in part or re.match(r"[A-Za-z]:", part):
            return f"names {part!r}, which is no name on every disk"
        if len(part.encode()) > LONGEST:
            return f"holds a name of {len(part.encode())} bytes, at most {LONGEST}"
    for folder in path.parts[1:-1]:
        if folder in OURS or folder.endswith(OUR_ENDINGS):
            return f"names a folder {folder}, as a file of ours is called"
    return ""


def _of_repository(root: str, repo: str, revision: str, folder: str) -> list[str]:
    """The Parquet files of a repository, else its tars, of one configuration."""
    from huggingface_hub import HfApi

    try:
        listed = HfApi(endpoint=wire.hub()).list_repo_files(
            repo, repo_type="dataset", revision=revision, token=wire.token(wire.hub()) != {}
        )
    except Exception as error:  # of the hub's library, or of the one under it
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code in (401, 403, 404):
            raise DataError([wire.refused(root, code, "")]) from None
        fix = f"look at the network and the address, and run again; {wire.WAY_OUT}"
        text = f"{error}".partition("\n")[0] or type(error).__name__
        raise MachineError.of("env.unreachable", root, text, fix) from None
    within = [path for path in listed if path.startswith(f"{folder}/" if folder else "")]
    kinds = ([p for p in within if p.endswith(kind)] for kind in reversed(KINDS))
    paths = next((found for found in kinds if found), [])
    folders = sorted({str(PurePosixPath(path).parent) for path in paths})
    several = [name for name in folders if PurePosixPath(name).name not in SPLIT_FOLDERS]
    if len(several) > 1:
        text = f"holds several sets: {', '.join(several[:8])}"
        raise RecipeError.of("data.address", root, text, f"name one: {root}/{several[0]}")
    if not paths:
        text, fix = "holds neither .parquet nor .tar files", "download it, and name its folder"
        raise RecipeError.of("data.address", root, text, fix)
    return paths


def expand(text: str, place: str) -> list[str]:
    """Braces as a shell expands them: `{a,b}`, `{00..12}`, one in another.

    Raises:
        RecipeError: `data.address`: a brace is left open, or too many names come out.
    """
    opening = text.find("{")
    if opening < 0:
        if "}" in text:
            raise RecipeError.of("data.address", place, "a brace is closed twice", BAD_ADDRESS)
        return [text]
    depth, commas = 0, [opening]
    for at in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "," and depth == 1:
            commas.append(at)
        if depth == 0:
            break
    else:
        raise RecipeError.of("data.address", place, "a brace is left open", BAD_ADDRESS)
    ends = [*commas[1:], at]
    choices = [text[a + 1 : b] for a, b in zip(commas, ends, strict=True)]
    if len(choices) == 1 and (span := BRACES.fullmatch(choices[0])):
        choices = _numbers(span["a"], span["b"], place)
    inner = [name for choice in choices for name in expand(choice, place)]
    rests = expand(text[at + 1 :], place)
    if len(inner) * len(rests) > MOST:
        text = f"names {len(inner) * len(rests):,} files, at most {MOST:,}"
        raise RecipeError.of("data.address", place, text, "make larger shards")
    return [text[:opening] + name + rest for name in inner for rest in rests]


def _numbers(first: str, last: str, place: str) -> list[str]:
    low, high = int(first), int(last)
    if not low <= high < low + MOST:
        text = f"{{{first}..{last}}} names no file, or more than {MOST:,}"
        raise RecipeError.of("data.address", place, text, BAD_ADDRESS)
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [str(n).zfill(width) for n in range(low, high + 1)]
