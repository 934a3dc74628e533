"""What is kept between runs: in $FASTPREF_CACHE, else $XDG_CACHE_HOME/fastpref, else ~/.cache/fastpref."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """The folder that the environment names; it need not be there yet."""
    own = os.environ.get("FASTPREF_CACHE")
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(general) / "fastpref").expanduser()


def cached(name: str, build: Callable[[Path], None], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder `name` of the cache; `build(folder)` fills it the first time. It is there whole or not at all."""
    cache = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    whole, partial = cache / name, cache / f"{name}.partial"
    if not whole.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):  # the other processes of a first run wait for one download
            if not whole.exists():
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
                partial.mkdir()
                try:
                    build(partial)
                    os.replace(partial, whole)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return whole
