"""Whose API: base URL, key and price of a model. Read from names and files, never sent.

A key comes from the environment, which wins, or from a ``.env`` file, is handed to the client
and is neither printed nor stored. A provider's key is only ever sent to that provider's host.
"""

from __future__ import annotations

import io
import ipaddress
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv.parser import parse_stream

from stllms.registry import repository

#: The key for a server that is none of :data:`PROVIDERS`.
KEY = "STLLMS_API_KEY"
#: What is sent to a local server that needs no key: no secret.
NO_KEY = "no-key-needed"
#: The folder that the runner was started in, for its kernels, which work elsewhere.
STARTED = "STLLMS_STARTED"
#: A file in the shape of ``prices.json`` whose entries go before ours.
PRICES = "STLLMS_PRICES"


class MissingKey(RuntimeError):  # noqa: N818 - named as a person reads it
    """No API key where one is needed."""


@dataclass(frozen=True)
class Provider:
    """An API: models whose name starts with ``prefix`` go to ``url`` with the key ``key``."""

    prefix: str
    url: str
    key: str


#: Used for a model without a base URL: the first whose prefix fits; ``owner/name`` goes to
#: the one of prefix ``/``; the last takes the rest.
PROVIDERS = (
    Provider("claude-", "https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    Provider(
        "gemini-", "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"
    ),
    Provider("deepseek-", "https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    Provider("/", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    Provider("", "https://api.openai.com/v1", "OPENAI_API_KEY"),
)


def base_url(model: str, given: str | None = None) -> str:
    """The URL that ``/chat/completions`` is added to.

    ``given``, else ``OPENAI_BASE_URL``, else the provider of the model's name. A URL
    without a path gets ``/v1``. Raises ``ValueError`` for what is no http(s) URL.
    """
    url = given or setting("OPENAI_BASE_URL") or _provider_of(model).url
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base URL {url!r}: expected http://HOST[:PORT][/v1] or https://...")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base URL: a key does not belong there (nor a query); see api_key()")
    return url.strip().rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _provider_of(model: str) -> Provider:
    name = "/" if "/" in model else model
    return next(provider for provider in PROVIDERS if name.startswith(provider.prefix))


def is_local(url: str) -> bool:
    """Whether a server runs on this machine or a private network (no key, no price needed)."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local"))


def key_names(url: str) -> list[str]:
    """The variables that may hold the key for a server, the first that is set counts.

    Its provider's, else ``STLLMS_API_KEY``; the server that ``OPENAI_BASE_URL`` names may have
    ``OPENAI_API_KEY`` too.
    """
    parts = urlsplit(url)
    provided = [p.key for p in PROVIDERS if urlsplit(p.url).hostname == parts.hostname]
    if provided:
        return provided
    own = setting("OPENAI_BASE_URL")
    same = own is not None and urlsplit(own).netloc == parts.netloc
    return [KEY, "OPENAI_API_KEY"] if same else [KEY]


def api_key(url: str) -> str:
    """The key for a server, from the variables of :func:`key_names`.

    A local server without a key gets a placeholder. Raises :class:`MissingKey` that names
    the variables.
    """
    names = key_names(url)
    for name in names:
        key = (setting(name) or "").strip()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise MissingKey(f"{name} holds characters that no API key has: set it again")
        if key:
            return key
    if is_local(url):
        return NO_KEY
    raise MissingKey(
        f"no API key for {urlsplit(url).hostname}: set {' or '.join(names)} in the environment "
        f"or in a .env file (a line {names[0]}=...) of the working folder, of a parent, or of "
        "the project's root; keys are never stored"
    )


#: Keys shorter than this are words that a text may hold inside a longer one.
_LONG = 16


def redacted(value: Any, key: str) -> tuple[Any, int]:
    """A value of JSON with ``***`` for the key, and how often it was there.

    Looks into every text and every name of a field, however deep (but not deeper than
    :data:`stllms.foreign.DEEPEST`). The key is found as it is, and however often it was escaped
    by JSON or in a URL: an error is often the answer of another server, in quotes. A key of
    fewer than 16 characters counts only where it stands alone: ``test`` in ``latest`` is none.
    """
    if not key or key == NO_KEY:
        return value, 0
    found = 0
    form = _forms(key)

    def strike(text: str) -> str:
        nonlocal found
        text, times = form.subn("***", text)
        found += times
        return text

    def walk(one: Any) -> Any:
        if isinstance(one, str):
            return strike(one)
        if isinstance(one, list):
            return [walk(item) for item in one]
        if isinstance(one, dict):
            return {strike(name): walk(item) for name, item in one.items()}
        return one

    return walk(value), found


def _forms(key: str) -> re.Pattern[str]:
    """The key as it is, JSON-escaped (once or often), or percent-encoded, by character."""

    def of(character: str) -> str:
        units = character.encode("utf-16-be", "surrogatepass").hex()
        codes = "".join(rf"\\{{1,8}}u{units[i : i + 4]}" for i in range(0, len(units), 4))
        percent = "".join(f"%{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
        return rf"(?:\\{{0,8}}{re.escape(character)}|(?i:{codes}|{percent}))"

    pattern = "".join(map(of, key))
    if len(key) < _LONG:
        # An escaped line break before the key ends in a letter that is not of a word.
        pattern = rf"(?:(?<![\w-])|(?<=\\[nrt])){pattern}(?![\w-])"
    return re.compile(pattern)


# --- .env ---------------------------------------------------------------------------------


def setting(name: str) -> str | None:
    """A variable of the environment, else of the first of :func:`env_files` that sets it.

    What a file holds is looked up and handed on; it is never put into the environment, where
    every child and every notebook would have it.
    """
    if os.environ.get(name):
        return os.environ[name]
    return next((found for file in env_files() if (found := read_env(file).get(name))), None)


def env_files() -> list[Path]:
    """The ``.env`` files that count, in their order.

    The nearest one of the folder that the runner was started in (:data:`STARTED`; kernels work
    in the folder of the notebooks), that of the working folder, in each case there or in a
    parent; then that of the project's root, where the package is imported from a checkout.
    """
    started, root = os.environ.get(STARTED), repository()
    folders = [Path(started)] if started else []
    found = [_nearest(folder) for folder in (*folders, Path.cwd())]
    found.append(root / ".env" if root and (root / ".env").is_file() else None)
    return list(dict.fromkeys(file for file in found if file))


def _nearest(folder: Path) -> Path | None:
    return next((f for p in (folder, *folder.parents) if (f := p / ".env").is_file()), None)


def read_env(path: Path) -> dict[str, str]:
    """The variables of a ``.env`` file, read by python-dotenv; nothing in them is expanded.

    Raises ``ValueError`` that names file and line, never the value, for a line that is no
    ``NAME=value``; python-dotenv would leave it out.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text in UTF-8") from None
    values = {}
    for line in parse_stream(io.StringIO(text)):
        if line.error or (line.key is not None and line.value is None):
            number = line.original.line + line.original.string[:-1].count("\n")
            raise ValueError(f"{path}, line {number}: expected NAME=value or a # comment")
        if line.key is not None:
            values[line.key] = line.value
    return values


# --- prices -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Price:
    """Price of one million tokens in and out, in ``currency``."""

    input: float
    output: float
    currency: str = "USD"

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """The cost of so many tokens."""
        return (self.input * tokens_in + self.output * tokens_out) / 1e6


def price(model: str, url: str, table: str | os.PathLike[str] | None = None) -> Price | None:
    """The price of a model; ``None`` where nobody knows it.

    ``table`` (else the file that ``STLLMS_PRICES`` names) goes before the package's
    ``prices.json``. Looked up by the full name, then without ``provider/``, then without
    a ``:variant`` or a date. A local server without an entry, and ``:free``, cost nothing.
    """
    own = table or setting(PRICES)
    tables = [Path(own).expanduser()] if own else []
    for path in [*tables, Path(__file__).parent / "prices.json"]:
        prices, currency = _read_prices(path)
        for name in _names(model):
            if name in prices:
                entry = prices[name]
                return Price(float(entry["input"]), float(entry["output"]), currency)
    return Price(0.0, 0.0) if is_local(url) or model.endswith(":free") else None


def _names(model: str) -> list[str]:
    if model.endswith(":free"):
        return [model]
    bare = model.rpartition("/")[2]
    plain = bare.partition(":")[0]
    undated = re.sub(r"[-@](\d{4}-\d{2}-\d{2}|\d{8}|\d{3})$", "", plain)
    return list(dict.fromkeys([model, bare, plain, undated]))


def _read_prices(path: Path) -> tuple[Mapping[str, Any], str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"price table {path}: {error}") from error
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, dict):
        raise ValueError(f'price table {path}: expected {{"currency": ..., "models": {{...}}}}')
    for name, entry in models.items():
        numbers = [entry.get(k) for k in ("input", "output")] if isinstance(entry, dict) else []
        if len(numbers) != 2 or not all(_is_price(number) for number in numbers):
            raise ValueError(f"price table {path}: {name} needs input and output, numbers >= 0")
    return models, str(content.get("currency", "USD"))


def _is_price(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0
