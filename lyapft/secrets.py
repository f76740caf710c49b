"""Credentials in settings: found by the name of a field or the look of its value, refused, never repeated.

Settings are written into records, logs and dashboards; credentials belong in the environment (HF_TOKEN, WANDB_API_KEY),
which is written nowhere: what a library says of it (the address of a proxy, a mirror) is hidden. Nothing here imports
torch.
"""

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

HIDDEN = "(hidden)"
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
# Parts of words that tell wherever they stand; whole words that do; and, where `key`, `token` or `pass` says little by
# itself, the words that may stand before it.
PLAIN = re.compile(r"secret|passw(?:or)?d|passphrase|credential|bearer|cookie|api_?key")
WHOLE = {"auth", "oauth", "authorization"}
OPENED_BY = {
    "access", "account", "admin", "api", "app", "auth", "aws", "azure", "bot", "client", "crypt", "db",
    "decryption", "deploy", "email", "encryption", "gcp", "gh", "git", "github", "gitlab", "google", "gpg", "hf", "hub",
    "huggingface", "jwt", "ldap", "license", "login", "mail", "master", "mysql", "oauth", "openai", "pgp", "postgres",
    "private", "proxy", "redis", "root", "rsa", "service", "session", "shared", "signing", "smtp", "ssh", "ssl",
    "storage", "sudo", "tls", "user", "wandb",
}  # fmt: skip
JOINED = re.compile(rf"({'|'.join(sorted(OPENED_BY))})(keys?|tokens?|pass|pwd)")
KEPT_IN = {  # the last words of names that say where or how one is kept
    "dir", "directory", "endpoint", "file", "filename", "folder", "helper", "host", "hostname", "location", "method",
    "mode", "mount", "name", "path", "port", "provider", "scheme", "sock", "timeout", "type", "uri", "url", "user",
    "username", "version",
}  # fmt: skip
NO_VALUE = {"", "true", "false", "none", "null", "yes", "no", "on", "off"}  # a field's text that holds no credential
NUMBER = re.compile(r"(?:(?:start|stop|step)=)?-?\d+(?:\.\d+)?")
BETWEEN = re.compile(r"(?:\b(?:choice|range|shuffle|sort)\(|[\s,()\[\]'\"])+")  # values of a list, or of a sweep
WEB = ("http://", "https://")
IN_URL = re.compile(r"(?<=://)[^/?#\s]+(?=@)")  # to the last @, which a password may hold too
FROM_ENVIRONMENT = re.compile(r"\boc\.env:\s*['\"]?(\w+)")  # OmegaConf's interpolation
# NAME=value or NAME: value inside of a text, an override that is a mapping, a line of shell, a query of a URL
PAIR = re.compile(r"(?=\b([A-Za-z][\w-]*)['\"]?\s*[=:]\s*['\"]?([^\s,;&}'\"]+))")
# as the issuers of tokens mark them: Hugging Face, OpenAI and others, GitHub, AWS, private keys, W&B, Google, Slack
VALUE = re.compile(
    r"\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bwandb_v\d_\w{20,}|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10,}"
)
SHORTEST = 8  # characters of a variable's value: a shorter one could be an ordinary word


def is_named(key: str) -> bool:
    """Whether a name is that of a credential, however its words are joined.

    >>> [is_named(key) for key in ("hub-token", "hubToken", "WANDB_API_KEY", "X-Amz-Signature", "db_pwd", "hf_tokens")]
    [True, True, True, True, True, True]
    >>> [is_named(key) for key in ("api_keys", "dbpass", "secret_value", "HF_TOKEN_READ", "hub_token_2")]
    [True, True, True, True, True]
    >>> [is_named(key) for key in ("batch_tokens", "key", "tokenizer", "pwd_model", "signature", "author", "pass_k")]
    [False, False, False, False, False, False, False]
    >>> [is_named(key) for key in ("AUTH_METHOD", "forward_pass", "user_pass")]
    [False, False, True]
    """
    words = [part for word in WORD.findall(key) for part in _parts(word.lower())]
    while words and words[-1].isdigit():
        words.pop()
    if not words or words[-1] in KEPT_IN:
        return False
    if any(word in WHOLE or PLAIN.search(word) for word in words):
        return True
    if any(opener in OPENED_BY and word.removesuffix("s") in ("key", "token") for opener, word in pairwise(words)):
        return True
    *before, last = words
    if last == "pass":
        return not before or before[-1] in OPENED_BY
    return last == "token" or (last == "pwd" and bool(before)) or (last == "signature" and "amz" in before)


def _parts(word: str) -> list[str]:
    """A word, or the two that were joined in it.

    >>> _parts("accesstoken"), _parts("monkey")
    (['access', 'token'], ['monkey'])
    """
    joined = JOINED.fullmatch(word)
    return [word] if joined is None else list(joined.groups())


def faults(settings: Any, overrides: Iterable[str] = ()) -> list[str]:
    """One sentence for each setting that looks like a credential; its value is not in it.

    Args:
        settings: nested mappings and lists of plain values.
        overrides: `key=value` as typed, those of a sweep too.

    >>> faults({"model": {"dims": {"hub_token": "abc", "n_token": 3}}})[0].split(":")[0]
    'model.dims.hub_token looks like a credential'
    """
    known = _in_environment()
    given = list(_leaves(settings))
    for override in overrides:
        name, equals, value = override.lstrip("+~").partition("=")
        if not equals:
            name, value = "an argument", override
        given.append((name.partition("{")[0], name.rpartition(".")[2], value))
    found: dict[str, str] = {}
    for name, key, value in given:
        if _is_secret(key, value):
            advice = "and put it into the environment instead (HF_TOKEN, WANDB_API_KEY)"
        elif variable := _variable_in(value, known):
            advice = f"or, as it holds the value of {variable}, unset that variable if it is no credential"
        else:
            continue
        found.setdefault(name, advice)
    return [
        f"{name} looks like a credential: settings are written into records and logs. Take it out, {advice}"
        for name, advice in found.items()
    ]


def without(value: Any, key: str = "") -> Any:
    """The same nested value with everything that looks like a credential hidden.

    >>> without({"hub_token": "abc", "batch_tokens": 8192, "path": "https://me:pw@host/x"})
    {'hub_token': '(hidden)', 'batch_tokens': 8192, 'path': 'https://(hidden)@host/x'}
    """
    if is_named(key) and _is_told(key, value):
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(name): without(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without(inner) for inner in value]
    if isinstance(value, str):
        name, equals, told = value.partition("=")  # an override such as model.hub_token=abc
        if equals and is_named(last := name.rpartition(".")[2]) and _is_told(last, told):
            return f"{name}={HIDDEN}"
        return hidden(value)
    return value


def hidden(text: str) -> str:
    """A text, of an exception or a log, without what looks like a credential or is one of the environment's.

    >>> hidden("401 Client Error for url: https://me:p@ss@mirror/api/models")
    '401 Client Error for url: https://(hidden)@mirror/api/models'
    """
    for secret in sorted(_in_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return VALUE.sub(HIDDEN, IN_URL.sub(HIDDEN, text))


class Formatter(logging.Formatter):
    """Lines of a log, tracebacks included, without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; where the message does not fit its arguments, both: a handler would print them as they are."""
        try:
            return hidden(super().format(record))
        except (TypeError, ValueError, KeyError) as error:
            place = f"{record.pathname}:{record.lineno}"
            return hidden(f"{place} logs what cannot be formatted ({error}): {record.msg!r}, {record.args!r}")


class LogFile(logging.FileHandler):
    """A log whose file may stop taking lines: that is said once, and the work goes on."""

    lost = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say why a line was lost; the line itself, or a traceback with what it was made of, is not repeated."""
        if not self.lost:
            self.lost = True
            print(hidden(f"{self.baseFilename} lacks lines: {sys.exc_info()[1]}"), file=sys.stderr)

    def close(self) -> None:
        """Close it, also when what is left cannot be written."""
        try:
            super().close()
        except OSError:
            if not self.lost:
                self.handleError(logging.makeLogRecord({}))


def _leaves(value: Any, name: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted name, last key, value) of everything that is no container; a credential's key stands for all in it."""
    if isinstance(value, Mapping):
        for inner_key, inner in value.items():
            own = key if is_named(key) else str(inner_key)
            yield from _leaves(inner, f"{name}.{inner_key}".lstrip("."), own)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{index}]", key)
    else:
        yield name, key, value


def _variable_in(value: Any, known: Mapping[str, str]) -> str | None:
    """The variable of the environment whose secret a value holds."""
    held = (variable for secret, variable in known.items() if isinstance(value, str) and secret in value)
    return next(held, None)


def _is_secret(key: str, value: Any) -> bool:
    """A value is a secret by its field, its look, or by a name before it in a text."""
    if is_named(key) and _is_told(key, value):
        return True
    if not isinstance(value, str):
        return False
    if VALUE.search(value) or IN_URL.search(value):
        return True
    if any(is_named(variable) for variable in FROM_ENVIRONMENT.findall(value)):
        return True
    # in a text, what a variable holds is not told by its name: `export WANDB_API_KEY=$KEY`
    found = [(name, told) for name, told in PAIR.findall(value) if not told.startswith("$")]
    return any(is_named(name) and _is_told(name, told) for name, told in found)


def _is_told(key: str, value: Any) -> bool:
    """Whether a credential's field holds one: numbers of tokens are settings (`experiment.token=8`), but those of a
    password are not.

    >>> [_is_told("use_auth", "False"), _is_told("token", "range(8,16)"), _is_told("password", "8")]
    [False, False, True]
    """
    told = [word for word in BETWEEN.split(str(value)) if word.lower() not in NO_VALUE]
    return not all("token" in key.lower() and NUMBER.fullmatch(word) for word in told)


def _in_environment() -> dict[str, str]:
    """The variable of each value: of those that hold credentials by their names, and what is inside of addresses
    (HTTPS_PROXY)."""
    found = {value: name for name, value in os.environ.items() if is_named(name)}
    for name, value in os.environ.items():
        for match in IN_URL.finditer(value):
            password = match[0].partition(":")[2]
            # in an address of the web a name by itself is a token; in ssh://me@host it is a name
            if password or value[: match.start()].endswith(WEB):
                found |= {match[0]: name, password: name}
    return {value: name for value, name in found.items() if len(value) >= SHORTEST}
