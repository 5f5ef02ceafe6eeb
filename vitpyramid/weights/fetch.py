"""Files of weights from a path, from a bucket, from the Hugging Face hub or from the web.

Downloads are written out here because libraries for them start anew after an interruption (pooch), or ask for the rest
without making sure that the server's file is still the same (huggingface_hub, for other servers than its own).
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urldefrag, urlsplit

import filelock
import platformdirs
import requests
from tqdm import tqdm

from vitpyramid.files import as_path, bucket_files, in_bucket, in_one_line, reach
from vitpyramid.weights.reader import INDEX, parts

# What Hugging Face's libraries write, the better first; large ones in parts, with an index.
HUB_FILES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
HUB_SUFFIXES = (".safetensors", ".bin", ".pth")

_WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and without a byte
_CHUNK = 1 << 17  # bytes
_TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses that may be gone soon
_BROKEN_LINE = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def fetch(source: str | Path, cache: Path | None = None) -> Path:
    """A local file or folder for `source`, downloaded if need be.

    Args:
      source: one of
        a path, which is returned as it is, `~` expanded;
        `gs://bucket/name`: a folder is returned as it is, a file is downloaded unless its version is in the cache;
        `hf://owner/repo[/file][@revision]`, through huggingface_hub and its cache; without `file`, the first of
        `HUB_FILES`, else the only .safetensors, .bin or .pth file at the top of the repository; of an index, the path
        beside which its parts are;
        `https://...`, optionally with `#sha256=` and 64 hexadecimal digits. Without them, a name that ends in `-` and
        at least 8 such digits, as in `deit_tiny-a1311bcf.pth`, gives the first digits of the file's SHA-256
        (torch.hub's convention). `http://` is for this machine, or with `#sha256=`.
      cache: folder of files from the web and from buckets; None: `weights` in the user's cache folder. What is in it
        is not downloaded again, and a download from the web that was interrupted goes on where it stopped unless the
        server's file has changed.

    Returns:
      A path that exists.

    Raises:
      ValueError: `source` is of another kind, the file has another SHA-256 or is a web page, no file can be chosen in
        the repository, or huggingface_hub or gcsfs is not installed.
      OSError: nothing there, or no connection, or no space. A file that was in the cache is still there.
    """
    text = os.fspath(source)
    scheme, separator, _ = text.partition("://")
    if not separator:
        path = Path(text).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path}: expected a file or folder, this is a pipe or device")
        return path
    if scheme == "hf":
        return _from_hub(text)
    cache = cache or Path(platformdirs.user_cache_dir("vitpyramid")) / "weights"
    if scheme in ("http", "https"):
        return _from_web(text, cache)
    if in_bucket(text):
        return _from_bucket(text, cache)
    raise ValueError(f"{text}: expected a path, gs://bucket/name, hf://owner/repo[/file][@revision] or https://...")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_bucket(source: str, cache: Path) -> Path:
    path = as_path(source)
    reach(path)
    try:
        with in_one_line(source):
            if path.is_dir():
                return path
            version = bucket_files().info(source)["generation"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}: no such file or folder") from error
    folder = cache / hashlib.sha256(f"{path.parent}".encode()).hexdigest()[:16] / version
    local = folder / path.name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        if not local.exists():
            print(f"downloading {source} to {local}", file=sys.stderr)
            _copy_from_bucket(source, local)
        for part in parts(local) if path.name.endswith(INDEX) else ():
            if not part.exists():
                _copy_from_bucket(os.fspath(path.with_name(part.name)), part)
    return local


def _copy_from_bucket(source: str, local: Path) -> None:
    part = local.with_name(f"{local.name}.part")
    with in_one_line(source):
        bucket_files().get_file(source, os.fspath(part))
    part.replace(local)


def _from_hub(source: str) -> Path:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@(.+))?", source)
    if not match:
        raise ValueError(f"{source}: expected hf://owner/repo[/file][@revision]")
    repo, file, revision = match.groups()
    try:
        from huggingface_hub import HfApi, errors
    except ImportError as error:
        raise ValueError(f"{source}: expected huggingface_hub: pip install 'vitpyramid[hub]'") from error
    try:
        file = file or _choose_hub_file(source, repo, revision)
        path = Path(HfApi().hf_hub_download(repo, file, revision=revision))
        for part in parts(path) if file.endswith(INDEX) else ():
            HfApi().hf_hub_download(repo, str(PurePosixPath(file).with_name(part.name)), revision=revision)
        return path
    except errors.GatedRepoError as error:
        raise PermissionError(f"{source}: expected access to {repo}: ask for it there, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{source}: no repository {repo}, or a private one: `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{source}: no revision {revision} of {repo}") from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(f"{source}: {_reason(error)}") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{source}: no file {file} in {repo}") from error
    except ValueError:
        raise
    except Exception as error:  # broad: errors of the HTTP library pass through, which has changed between versions
        raise OSError(f"{source}: {_reason(error)}") from error


def _choose_hub_file(source: str, repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception:  # broad, see above: no connection
        cached = [name for name in HUB_FILES if isinstance(try_to_load_from_cache(repo, name, revision=revision), str)]
        if not cached:
            raise
        return cached[0]
    candidates = [name for name in HUB_FILES if name in files][:1]
    candidates = candidates or [name for name in files if name.endswith(HUB_SUFFIXES) and "/" not in name]
    if len(candidates) != 1:
        wanted = f"{' or '.join(HUB_FILES)} or just one {'/'.join(HUB_SUFFIXES)}"
        raise ValueError(f"{source}: expected {wanted} in the repository, which has {', '.join(files) or 'no files'}")
    return candidates[0]


def _from_web(source: str, cache: Path) -> Path:
    url, fragment = urldefrag(source)
    name = _file_name(url)
    digest = _checksum(source, fragment, name)
    parts = urlsplit(url)
    if parts.scheme == "http" and not fragment and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"{source}: expected https://, or #sha256= and the file's checksum behind it")
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    if _is_good(path, digest):
        print(f"{url}: from the cache, {path}", file=sys.stderr)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Processes of one machine may all want the file: one downloads it, the others wait.
    with filelock.FileLock(folder / "lock"):
        if not _is_good(path, digest):
            print(f"downloading {url} to {path}", file=sys.stderr)
            part = folder / f"{name}.part"
            _download(url, part)
            _check(source, part, digest)
            part.replace(path)
            _note_of(part).unlink(missing_ok=True)
    return path


def _file_name(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if name in ("", ".."):
        raise ValueError(f"{url}: expected a URL that ends in the name of a file")
    return re.sub(r"[^\w.+=-]", "_", name)


def _checksum(source: str, fragment: str, name: str) -> str:
    """The first digits, or all, of the SHA-256 that the file should have; empty if nothing is known."""
    if fragment:
        if not (match := re.fullmatch("sha256=([0-9a-fA-F]{64})", fragment)):
            raise ValueError(f"{source}: expected #sha256= and 64 hexadecimal digits behind the URL")
        return match[1].lower()
    match = re.search(r"-([0-9a-f]{8,64})(\.[a-z]+)+$", name)
    # model-20210305.pth: a date, not a checksum.
    return match[1] if match and not re.fullmatch("20[0-9]{6}", match[1]) else ""


def _is_good(path: Path, digest: str) -> bool:
    return path.is_file() and (not digest or sha256(path).startswith(digest))


def _check(source: str, part: Path, digest: str) -> None:
    if digest and not (found := sha256(part)).startswith(digest):
        part.unlink()
        where = "" if "#" in source else f" as the name says (add #sha256={found} if that is no checksum)"
        raise ValueError(f"{source}: expected a file with SHA-256 {digest}{where}, got {found}")


def _download(url: str, part: Path) -> None:
    """Completes the file `part`, in several attempts if connections break."""
    for wait in (*_WAITS, None):
        try:
            return _transfer(url, part)
        except requests.exceptions.SSLError as error:
            raise OSError(f"{url}: expected a secure connection: {_reason(error)}") from error
        except _BROKEN_LINE as error:
            if wait is None:
                raise OSError(f"{url}: {_reason(error)} (attempt {len(_WAITS) + 1}, the last)") from error
            print(f"{url}: {_reason(error)}; again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
        except requests.RequestException as error:
            raise ValueError(f"{url}: {_reason(error)}") from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(error.errno, f"{url}: no space for it in {part.parent}") from error
            raise


def _transfer(url: str, part: Path) -> None:
    """One request, for what `part` does not have yet. urllib3 raises for an answer shorter than its Content-Length."""
    note = _note_of(part)
    version = note.read_text() if part.is_file() and note.is_file() else ""
    offset = part.stat().st_size if version else 0
    headers = {"Accept-Encoding": "identity"}  # compressed, neither Range nor Content-Length are the file's
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": version}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        goes_on = response.status_code == 206
        refused = goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        if refused or response.status_code == 416:
            part.unlink()
            raise requests.ConnectionError(f"cannot go on at byte {offset}, starting again")
        status = f"HTTP {response.status_code} {response.reason}"
        if response.status_code in _TRANSIENT:
            raise requests.ConnectionError(status)
        if response.status_code not in (200, 206):
            raise OSError(f"{url}: expected a file, got {status}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise ValueError(f"{url}: expected a file of weights, got a web page")
        _write(url, response, part, offset if goes_on else 0)


def _write(url: str, response: requests.Response, part: Path, offset: int) -> None:
    length = response.headers.get("Content-Length")
    size = None if length is None or "Content-Encoding" in response.headers else int(length)
    free = shutil.disk_usage(part.parent).free
    if size is not None and size > free:
        raise OSError(f"{url}: expected space for {size / 1e6:.1f} MB in {part.parent}, {free / 1e6:.1f} MB are free")
    total = None if size is None else offset + size
    bar = tqdm(desc=part.stem, total=total, initial=offset, unit="B", unit_scale=True, mininterval=0.5)
    with bar, part.open("ab" if offset else "wb") as file:
        if not offset:  # after the old bytes are gone, lest they be taken for those of this version
            _note_of(part).write_text(_version(response))
        for chunk in response.iter_content(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))


def _note_of(part: Path) -> Path:
    """The file that says which version of the server's file the bytes in `part` are of."""
    return part.with_name(f"{part.name}.version")


def _version(response: requests.Response) -> str:
    """What tells the server's file from a later one of the same name: RFC 9110, section 13.1.5. Empty: nothing does."""
    if "Content-Encoding" in response.headers:
        return ""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")  # W/"..." is not for ranges


def _reason(error: BaseException) -> str:
    """The innermost error's message, on one line."""
    inner = error.__cause__ or next((arg for arg in error.args if isinstance(arg, Exception)), None)
    return _reason(inner) if inner else " ".join(str(error).split()) or type(error).__name__
