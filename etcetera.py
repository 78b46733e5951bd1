#!/usr/bin/env python3
# etcetera: share immutable datasets through cloud storage, with one file.
#
# Copyright (c) 2026 the etcetera maintainers
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
# rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
# persons to whom the Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
# Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
# WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
# COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
# OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""etcetera shares immutable datasets through cloud storage.

    etc register ./digits MNIST     give a directory a name
    etc push MNIST                  share it
    etc pull MNIST                  install it on any other machine

    import etcetera as etc
    ds = etc.dataset('MNIST', auto_install=True)
    sorted(ds['train'].iterdir())

A dataset is a directory: data/<partition>/..., and optionally meta.json, README.md, assets/ and more. Local datasets
live in ~/.etc. Remote ones are .tgz objects in S3, Google Cloud Storage, a shared directory or on a web server.
Settings live in ~/.etc.yaml. This file needs Python 3.6 or later and nothing else.

HOW THIS FILE IS LAID OUT. Each section uses only the sections above it.

    Messages        what is shown to people, and how secrets are kept out of it
    Errors          what is raised, and how errors of the system become errors of etcetera
    Settings        ~/.etc.yaml and Config
    Threads         parallel work, its progress, and signals meanwhile
    Contents        a directory as canonical tar bytes, and its digest
    Datasets        Dataset: a directory with partitions
    Deflate         one block in and out of it, as fast as this machine can
    Archives        the .tgz format: its specification, writing it, reading it safely
    Other tools     reading any .tgz safely
    HTTP            one client: connections, proxies, TLS, retries
    AWS             credentials and request signatures
    Google          credentials
    Remotes         file://, s3://, gs://, https://: list, stat, read, write, remove
    Home            the local store: receipts, and installing atomically
    Stored archives an archive in a remote: its index, extracting it, and writing it
    API             what `import etcetera` offers
    Command line    the command `etc`

AUDIT MAP. What this file touches, and when.

Hosts. Importing contacts none. Commands that need a remote, and shell completion of remote names, contact:
    - the host in `url` or `endpoint_url`, in AWS's variables or profile ($AWS_ENDPOINT_URL, ...) or in
      $STORAGE_EMULATOR_HOST; for s3:// without an endpoint, hosts below amazonaws.com or the domain of another AWS
      partition; for gs://, storage.googleapis.com, and the host that it names for an upload (it gets the data, no
      credentials);
    - for http(s):// URLs, any host that the server redirects to; no credentials are sent, and redirects from https://
      to http:// are refused;
    - for AWS credentials, if the profile or AWS's variables ask for them: the sts, portal.sso and oidc hosts of AWS,
      or endpoints that are set for them; the container's credential service ($AWS_CONTAINER_CREDENTIALS_...); and if
      no keys are found anywhere else, the metadata service of EC2 (169.254.169.254, or the address that is set);
    - for Google credentials: the URLs in the credentials file, by default oauth2.googleapis.com; without a file, the
      metadata service of the machine (metadata.google.internal, or $GCE_METADATA_HOST);
    - a proxy that the environment or the system names. Requests to a container's or machine's credential service never
      go through a proxy.
Environment. Besides the variables above and those of AWS's and Google's own tools (AWS_..., GOOGLE_...,
CLOUDSDK_CONFIG, NO_GCE_CHECK): ETC_URL, ETC_HOME, ETC_CONFIG, ETC_LIBDEFLATE, HOME, TERM; and what Python itself
reads (TMPDIR, http_proxy and the like, SSL_CERT_FILE, SSLKEYLOGFILE, ...).
Files. It reads:
    - ~/.etc.yaml (else ~/.etc.toml), or the file that --config or $ETC_CONFIG names;
    - ~/.aws/config, ~/.aws/credentials, ~/.aws/sso/cache/*.json, and token files that AWS's variables or profiles
      name;
    - Google's application_default_credentials.json, or the file that is configured, and token files that it names;
    - the `ca_bundle`; /etc/machine-id and /proc/self/ns/pid, to tell apart hosts and containers that share a store;
    - what is installed, where a pull wants the same contents;
    - directories that are registered, copied or pushed. Links in them are followed to any file that can be read,
      unless they stay inside their partition.
  It writes below the local store (~/.etc by default), and besides:
    - a `file://` remote, where `purge -r` removes an archive, and a push what killed commands left behind a day ago or
      more;
    - a temporary file, if a web server does not support range requests; a temporary directory for `etc info -r`;
    - ~/.aws/sso/cache/*.json, when it renews an SSO token, as AWS's own tools do.
  In S3 and Google Cloud Storage it deletes uploads of its own that failed, and the archives that `purge -r` names.
  In S3 and shared directories, a push reads other archives there, and lets the storage copy what it shares with them;
  if what was copied proves damaged, it deletes the new archive.
  `purge -r` reads an answer from the terminal.
Programs: the `credential_process` of an AWS profile, without a shell; on Windows, cmd.exe with an empty command, so
that the console understands escape sequences.
Signals: while the command `etc` runs, SIGTERM and SIGHUP end it as Ctrl-C does, all three where no lock is held.
Signal 0 tests whether a process lives.
Optional libraries: botocore (MFA, `aws login`) and google-auth (credential types that need more than the standard
library) are imported only where the configured credentials need them. They have hosts, files (~/.aws/cli/cache) and
programs of their own.
ctypes: syncfs and renameat2 of Linux's libc and renamex_np of macOS's, to flush and to swap directories; and
libdeflate, if it is beside Python's standard library or among the system's libraries, unless ETC_LIBDEFLATE is 0.
TLS: certificates and names are always verified. With `ca_bundle` (for s3:// also $AWS_CA_BUNDLE and the profile's),
that file replaces the system's CAs, and VERIFY_X509_STRICT is switched off, since many private CAs leave out
extensions that it demands.
"""

# Modules that are slow to import (ssl, http.client, urllib.request, xml, argparse, hashlib and the like) are imported
# in the functions that need them, so that `import etcetera` and shell completion stay fast.

import collections
import contextlib
import errno
import functools
import itertools
import json
import marshal
import math
import operator
import os
import posixpath
import re
import stat
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Generator,
    Iterable,
    Iterator,
    KeysView,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)
from urllib.parse import quote, unquote, unquote_plus, urlencode, urljoin, urlsplit

__version__ = '1.0.0'
__all__ = ['Config', 'Dataset', 'create', 'dataset', 'diff', 'info', 'ls', 'pull', 'purge', 'push', 'register',
           'verify', 'Error', 'ConfigError', 'InvalidDataset', 'NotFound', 'Exists', 'Corrupt', 'RemoteError',
           'UnknownPartition']

_Path = Union[str, 'os.PathLike[str]']


# ---------------------------------------------------------------------------------------
# Messages
#
# Output goes to stdout, messages go to stderr: through the console while the command `etc` runs, otherwise to the
# logger `etcetera`. People paste keys in the wrong places, so what they set and type is shown with care: the value of a
# setting or variable only if it is well-formed, otherwise its name; a URL without user, password and query; a path only
# as far as it exists.
# ---------------------------------------------------------------------------------------

def _masked(text: str) -> str:
    """A URL, or a word that may hold one, without secrets. A password may contain any character, even / ? # and @."""
    text = re.sub(r'\A([^:]*:(?://)?)(?:.*[?#].*@.*|.*(?=@))', r'\1***', text, flags=re.S)
    return _printable(re.sub(r'([?#]).+', r'\1***', text, flags=re.S))


def _existing_part(path: str) -> str:
    """The part of a path that exists, followed by `...` if there is more."""
    known = path
    while known != os.path.dirname(known) and not os.path.lexists(known):
        known = os.path.dirname(known)
    return path if known == path else os.path.join(known, '...')


def _printable(text: str) -> str:
    """The text on one line, without characters that could steer a terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def _encodable(text: str, stream: Any) -> str:
    """The text with escapes for what the stream's encoding lacks."""
    encoding = getattr(stream, 'encoding', None) or 'utf-8'
    return text.encode(encoding, 'backslashreplace').decode(encoding)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy for a misspelled word, or ''."""
    import difflib
    spellings = {item.lower(): item for item in known}
    close = difflib.get_close_matches(word.lower(), spellings, 1)
    return f"did you mean '{spellings[close[0]]}'?" if close else ''


def _plural(count: int, noun: str) -> str:
    return f'{count:,} {noun}' if count == 1 else f'{count:,} {noun}s'


def _size(count: Optional[float]) -> str:
    """Bytes in powers of 1000."""
    if count is None:
        return '-'
    value = float(count)
    units = ['B', 'kB', 'MB', 'GB', 'TB', 'PB']
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f'{value:.3g} {units[0]}'


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f'{seconds:.2g} s'
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes}:{seconds:02} min'
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02} h'


_DEBUG, _INFO, _WARNING = 10, 20, 30  # as in logging, which is slow to import


class _Console:
    """What the command `etc` shows on stderr: messages, and below them at most one line of progress."""

    def __init__(self) -> None:
        self.level: Optional[int] = None  # the least to show; None in a program that uses etcetera as a library
        self.progress = ''  # the line of progress that is shown

    def show_progress(self, line: str) -> None:
        """Replace the line of progress. The cursor stays at its start, so that the next message overwrites it."""
        if line == self.progress:
            return
        self.progress = line
        with contextlib.suppress(OSError):
            erase_below = '\033[J'  # also what a narrow terminal has folded
            sys.stderr.write(f'\r{erase_below}{_encodable(line, sys.stderr)}\r')
            sys.stderr.flush()

    def show(self, message: object, end: str = '\n') -> None:
        if sys.stderr is None:
            return
        with contextlib.suppress(OSError):
            self.show_progress('')
            print('etc: ' + _encodable(_printable(str(message)), sys.stderr), end=end, file=sys.stderr, flush=True)


_console = _Console()


def _say(message: str, level: int = _INFO) -> None:
    """Show a message, or log it where a program uses etcetera as a library."""
    if _console.level is None:
        import logging
        logging.getLogger('etcetera').log(level, '%s', message)
    elif level >= _console.level:
        _console.show(message)


# ---------------------------------------------------------------------------------------
# Errors
#
# Every failure that a user can cause or run into is an Error. Its text is one line: what happened; what to do next.
# ---------------------------------------------------------------------------------------

class Error(Exception):
    """Something that a user can cause or run into.

    str() is one line: the message and, after a semicolon, the remedy, if there is one.
    """

    def __init__(self, message: str = '', remedy: str = '') -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return '; '.join(filter(None, [self.message, self.remedy]))


class ConfigError(Error):
    """A setting, flag or argument is missing or wrong."""


class InvalidDataset(Error):
    """A directory that is not a dataset, or a name that no dataset can have."""


class NotFound(Error):
    """There is no dataset of that name."""


class Exists(Error):
    """A dataset with other contents has that name already, and `force` was not given."""


class Corrupt(Error):
    """The bytes are not those that were published."""


class RemoteError(Error):
    """The storage could not be reached, or refused. `status` is its HTTP status, or 0."""

    def __init__(self, message: str = '', remedy: str = '', status: int = 0) -> None:
        super().__init__(message, remedy)
        self.status = status


class UnknownPartition(Error, KeyError):
    """The dataset has no partition of that name."""


class _Malformed(Exception):
    """The data that was read is malformed. Not a ValueError, since that may be a bug in etcetera."""


class _FromCaller(BaseException):
    """Carries an exception of a caller's function past handlers that are not meant for it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_F = TypeVar('_F', bound=Callable[..., Any])


def _api(function: _F) -> _F:
    """Decorates what users call: errors of the system become an Error, errors of a caller's function stay as they are.
    """
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except OSError as e:
            where = ''
            if e.filename is not None:
                e.filename = _existing_part(str(e.filename))  # a traceback shows both names, too
                e.filename2 = None
                where = f': {e.filename}'
            raise Error(f'{e.strerror or e}{where}') from e
        except MemoryError as e:
            raise Error('there is not enough memory', "set 'connections: 1', or raise the limit (ulimit -v)") from e
        except _FromCaller as e:
            error = e.error
        raise error
    return wrapper  # type: ignore[return-value]


def _check_path(path: _Path) -> str:
    """Return the path as text. Raises Error if no file can have that path on this system."""
    text = os.fspath(path)
    if '\0' in text:
        raise Error('a path cannot contain a NUL character', 'check the path')
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise Error(f"the path '{_masked(text)}' cannot be written in this locale", 'set LC_ALL=C.UTF-8') from None
    return text


# ---------------------------------------------------------------------------------------
# Settings
#
# A settings file is a flat map in a subset of YAML. What is accepted has its YAML 1.1 meaning, as in PyYAML; everything
# else is refused with its line number.
# ---------------------------------------------------------------------------------------

_SETTINGS: Dict[str, type] = {
    'url': str, 'home': str, 'public': bool, 'aws_access_key_id': str, 'aws_secret_access_key': str,
    'aws_session_token': str, 'aws_profile': str, 'region': str, 'endpoint_url': str, 'request_payer': str,
    'storage_class': str, 'sse': str, 'sse_kms_key_id': str, 'google_credentials': str, 'ca_bundle': str,
    'connections': int, 'compression_level': int,
}
_SECRETS = ('aws_secret_access_key', 'aws_session_token')
_LIMITS: Dict[str, Tuple[int, int]] = {'connections': (1, 256), 'compression_level': (0, 9)}
_DEFAULT_LEVEL = 6  # of compression

# Plain scalars that are not text: https://yaml.org/type/{bool,int,null,float,timestamp}.html
_YAML_BOOL = r'(?:(yes|Yes|YES|true|True|TRUE|on|On|ON)|no|No|NO|false|False|FALSE|off|Off|OFF)\Z'
_YAML_NULL = r'(?:~|null|Null|NULL|)\Z'
_YAML_INT = r'[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)\Z'
_YAML_OTHER = (r'(?:[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?'   # sexagesimal
               r'|[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?'
               r'|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)'
               r'|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt ].*)?|[<=]+)\Z')
_YAML_FORBIDDEN = (  # what YAML forbids, and U+2028 and U+2029, which YAML 1.1 takes for line ends
    '[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]')
_YAML_KEY = r'''([A-Za-z_][\w-]*|"[\w-]+"|'[\w-]+') *:(?: +(.*)|\Z)'''


class _YamlError(ValueError):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _parse_yaml(text: str) -> Dict[str, Tuple[Any, int]]:
    """Read a flat map: for each key its value and the number of its line. Raises _YamlError."""
    values: Dict[str, Tuple[Any, int]] = {}
    started = False
    for number, line in enumerate(re.split('\r\n|\n|\r', text), 1):
        if re.search(_YAML_FORBIDDEN, line):
            raise _YamlError(number, 'YAML does not allow one of these characters; remove it')
        if line.rstrip(' ') == '---' and not started:
            started = True
            continue
        if re.match(r' *(#|\Z)', line):
            continue
        started = True
        match = re.match(_YAML_KEY, line, re.ASCII)
        if not match:
            raise _YamlError(number, "not of the form 'key: value' (lists, nesting and indentation are not supported)")
        key = match.group(1)
        if key[0] in '"\'':
            key = key[1:-1]
        elif not isinstance(_yaml_plain(key, number), str):
            raise _YamlError(number, f"'{key}' cannot be a key")
        if key in values:
            raise _YamlError(number, f"'{key}' is set a second time; remove one of the two")
        values[key] = _yaml_scalar(match.group(2) or '', number), number
    return values


def _yaml_scalar(text: str, line: int) -> Any:
    """The value of what follows `key: ` on its line."""
    if text.startswith('#'):
        return None
    if text[:1] in ('"', "'"):
        return _yaml_quoted(text, line)
    plain = re.split(' +#', text, maxsplit=1)[0].rstrip(' ')
    means_something_else = plain[:1] in set('?:,[]{}&*!|>%@`') or plain[-1:] == ':' or ': ' in plain
    if means_something_else or '\t' in plain:
        raise _YamlError(line, 'this YAML syntax is not supported; put the value in double quotes')
    return _yaml_plain(plain, line)


def _yaml_quoted(text: str, line: int) -> str:
    pattern = r'("(?:[^"\\]|\\.)*")' if text[0] == '"' else r"('(?:[^']|'')*')"
    match = re.match(pattern + r' *(?: #.*)?\Z', text)
    if not match:
        raise _YamlError(line, 'a quoted value must end on its line, and only a comment may follow')
    quoted = match.group(1)
    if quoted[0] == "'":
        return quoted[1:-1].replace("''", "'")
    try:
        value: Optional[str] = json.loads(quoted, strict=False)
    except ValueError:
        value = None
    # JSON's escapes mean the same in YAML, except for surrogates.
    if value is None or re.search(r'(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]', quoted):
        raise _YamlError(line, 'unknown escape; in double quotes, write \\\\ for a backslash and \\u00e9 for U+00E9')
    return value


def _yaml_plain(text: str, line: int) -> Any:
    boolean = re.match(_YAML_BOOL, text)
    if boolean:
        return bool(boolean.group(1))
    if re.match(_YAML_NULL, text):
        return None
    if re.match(_YAML_INT, text):
        digits = text.replace('_', '')
        octal = re.match(r'([-+]?)0([0-7]+)\Z', digits)
        try:
            return int(octal.group(1) + octal.group(2), 8) if octal else int(digits, 0)
        except ValueError:
            raise _YamlError(line, 'this is no number; put it in double quotes if it is text') from None
    if re.match(_YAML_OTHER, text) or text[:1] == '-':
        raise _YamlError(line, 'YAML may not read this value as text; put it in double quotes')
    return text


def _is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode the text; it cannot encode half a surrogate pair."""
    return not re.search('[\ud800-\udfff]', text)


class Config:
    """Where datasets live and how to reach them. Every function takes one as `config=`.

    url: `s3://bucket[/prefix]`, `gs://bucket[/prefix]`, `file:///path` or, to read only, `https://host/path`; needed
        only for remote datasets.
    home: the local store, by default $ETC_HOME or ~/.etc.
    settings: any other key of the settings file, by its name there.
    Raises ConfigError for an unknown key or a value of the wrong type.
    """

    url: Optional[str]
    home: Path
    public: bool
    aws_access_key_id: Optional[str]
    aws_secret_access_key: Optional[str]
    aws_session_token: Optional[str]
    aws_profile: Optional[str]
    region: Optional[str]
    endpoint_url: Optional[str]
    request_payer: Optional[str]
    storage_class: Optional[str]
    sse: Optional[str]
    sse_kms_key_id: Optional[str]
    google_credentials: Optional[str]
    ca_bundle: Optional[str]
    connections: int
    compression_level: int

    def __init__(
            self,
            url: Optional[str] = None,
            home: Optional[_Path] = None,
            **settings: Any
    ) -> None:
        values = dict(settings, url=url, home=None if home is None else os.fspath(home))
        for key, value in values.items():
            _check_setting(key, value)
        defaults = {'public': False, 'connections': 32, 'compression_level': _DEFAULT_LEVEL}
        for key in _SETTINGS:
            value = values.get(key)
            setattr(self, key, defaults.get(key) if value is None else value)
        self.home = _expand(values['home'] or os.environ.get('ETC_HOME') or '~/.etc')

    @classmethod
    def load(cls, path: Optional[_Path] = None, **overrides: Any) -> 'Config':
        """Read settings from `path`, else $ETC_CONFIG, else ~/.etc.yaml, if it exists, else ~/.etc.toml (of 0.0.x).

        $ETC_URL and $ETC_HOME override the file, and `overrides` that are not None override both.
        Raises ConfigError, which names the file and the line.
        """
        values: Dict[str, Any] = {}
        named = path or os.environ.get('ETC_CONFIG')
        homeless = os.environ.get('HOME') == '' or _expanduser('~') == '~'
        if named:
            file = _expand(named)
            values = _read_settings(file, _masked(str(file)) if path else _existing_part(str(file)), required=True)
        elif not homeless:
            file, old = _expand('~/.etc.yaml'), _expand('~/.etc.toml')
            if not os.path.exists(file) and os.path.exists(old):  # Path.exists() may raise
                file = old
            values = _read_settings(file, _existing_part(str(file)), required=False)
        for key, variable in (('url', 'ETC_URL'), ('home', 'ETC_HOME')):
            if os.environ.get(variable):
                values[key] = os.environ[variable]
        values.update((key, value) for key, value in overrides.items() if value is not None)
        return cls(**values)

    def __repr__(self) -> str:
        shown = {key: getattr(self, key) for key in _SETTINGS if getattr(self, key) is not None}
        for key, value in shown.items():
            if isinstance(value, str):
                shown[key] = _masked(value) if re.match('(https?|s3|gs|file)://', value) else '***'
        shown['home'] = _existing_part(str(self.home))
        return 'Config(%s)' % ', '.join(f'{key}={value!r}' for key, value in shown.items())


def _expanduser(path: str) -> str:
    """os.path.expanduser(), which up to Python 3.7 raises KeyError for a user whom the system does not know."""
    try:
        return os.path.expanduser(path)
    except KeyError:
        return path


def _expand(path: _Path) -> Path:
    """The absolute path, with ~ expanded."""
    text = _check_path(path)
    expanded = _expanduser(text)
    if expanded.startswith('~') or text.startswith('~') and os.environ.get('HOME') == '':
        raise ConfigError('cannot tell where your home directory is', 'set $HOME, or $ETC_HOME and $ETC_CONFIG')
    try:
        return Path(os.path.abspath(expanded))
    except OSError:
        raise ConfigError('the current directory is gone, so no relative path can be found',
                          'change to another directory') from None


def _check_setting(key: str, value: Any) -> None:
    if key not in _SETTINGS:
        raise ConfigError(f"unknown setting '{key}'", _did_you_mean(key, _SETTINGS))
    if value is None:
        return
    kind = _SETTINGS[key]
    if isinstance(value, str) and not value.isprintable():
        raise ConfigError(f"'{key}' holds characters that cannot be printed", 'remove them')
    if type(value) is not kind:  # True is an int, but no number of connections
        if kind is str:
            raise ConfigError(f"'{key}' must be text", 'put it in quotes')
        raise ConfigError(f"'{key}' must be {'true or false' if kind is bool else 'a whole number'}")
    if key in _LIMITS:
        least, most = _LIMITS[key]
        if value not in range(least, most + 1):
            raise ConfigError(f"'{key}' must be from {least} to {most}")


def _read_settings(path: Path, shown: str, required: bool) -> Dict[str, Any]:
    """The settings in a file; {} if it does not exist and is not required.

    shown: its name in messages until it is known to exist, since someone may have passed a secret by mistake.
    """
    try:
        text = path.read_bytes().decode('utf-8-sig')
    except FileNotFoundError:
        if required:
            raise ConfigError(f'no settings file {shown}', 'create it, or drop --config and $ETC_CONFIG') from None
        return {}
    except UnicodeDecodeError:
        raise ConfigError(f'{path}: not UTF-8 text', 'save it as UTF-8') from None
    except OSError as e:
        raise ConfigError(f'{shown}: cannot be read: {e.strerror}') from None
    if path.suffix == '.toml':
        # A flat TOML file differs from YAML only in its equals signs; 0.0.x called one key by another name.
        text = re.sub(r'(?m)^[ \t]*([\w-]+)[ \t]*=[ \t]*', r'\1: ', text)
        text = text.replace('aws_access_key_secret:', 'aws_secret_access_key:')
    try:
        lines = _parse_yaml(text)
    except _YamlError as e:
        raise ConfigError(f'{path}:{e.line}: {e}') from None
    settings = {}
    for key, (value, line) in lines.items():
        try:
            _check_setting(key, value)
        except ConfigError as e:
            raise ConfigError(f'{path}:{line}: {e.message}', e.remedy) from None
        settings[key] = value
    has_secret = any(settings.get(key) for key in _SECRETS)
    if has_secret and os.name == 'posix' and path.stat().st_mode & 0o077:
        _say(f'{path} holds a secret and others can read it; run: chmod 600 {path}', _WARNING)
    return settings


# ---------------------------------------------------------------------------------------
# Threads
#
# Work runs in parallel. Results come in order, and a limit on what is under way bounds memory.
#
# A signal may raise KeyboardInterrupt between any two steps of the main thread, even while it holds a lock of a pool,
# whose threads would then wait for ever. So while there is a pool, the command `etc` notes a signal, and raises it
# where the main thread waits.
# ---------------------------------------------------------------------------------------

_T = TypeVar('_T')
_R = TypeVar('_R')
_TICK = 0.1  # seconds between two looks at what happens while the main thread waits


class _Interrupts:
    """Signals that end the command."""

    def __init__(self) -> None:
        self.deferred = 0  # how many pools there are
        self.number = 0  # of the signal that has come
        self.is_raised = False

    def forget(self) -> None:
        self.number = 0
        self.is_raised = False

    def receive(self, number: int) -> None:
        """Raise KeyboardInterrupt, or note a signal; the second one is raised at once."""
        is_second = bool(self.number)
        self.number = number
        if is_second or not self.deferred:
            self.is_raised = True
            raise KeyboardInterrupt(number)

    def check(self) -> None:
        """Raise the signal that has been noted."""
        if self.number and not self.is_raised:
            import threading
            if threading.current_thread() is threading.main_thread():
                self.is_raised = True
                raise KeyboardInterrupt(self.number)

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        self.deferred += 1
        try:
            yield
        finally:
            self.deferred -= 1
        self.check()

    @contextlib.contextmanager
    def allow(self) -> Iterator[None]:
        """For what may be interrupted anywhere, since it takes no lock that threads need."""
        import threading
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        deferred = self.deferred
        try:
            self.deferred = 0
            self.check()
            yield
        finally:
            self.deferred = deferred


_interrupts = _Interrupts()


def _cores() -> int:
    """How many threads are worth having for computation. Each has a few MiB under way, so there is a bound."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(count, 16)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[Any]:
    """A pool of `count` threads, or of fewer if the system grants no more. Raises Error."""
    with _interrupts.defer(), _start_threads(count) as pool:
        yield pool


def _start_threads(count: int) -> Any:
    """A pool whose threads have all been started."""
    import threading
    from concurrent.futures import ThreadPoolExecutor
    pool = ThreadPoolExecutor(count)
    all_started = threading.Barrier(count)
    started = 0
    try:
        while started < count:
            pool.submit(all_started.wait)
            started += 1
        return pool
    except BaseException as e:
        all_started.abort()  # or the threads would wait for ever, and the process for them
        pool.shutdown()
        if not isinstance(e, (RuntimeError, MemoryError)):
            raise
    if count == 1:
        raise Error('the system does not allow this process any more threads',
                    "set 'connections: 1', or raise the limits (ulimit -u, ulimit -v)")
    return _start_threads(max(1, started // 2))  # and leave the others to the next pool


def _ordered(
        pool: Any,
        function: Callable[[_T], _R],
        items: Iterable[_T],
        ahead: int,
        keep: int = 0,
) -> Generator[_R, None, None]:
    """Yield function(item) for every item, in order, while up to `ahead` of them are under way.

    keep: how many finished results may be buffered. That keeps the pool busy while the caller uses a result, but they
        are lost if the process is killed.
    """
    pending: Any = collections.deque()
    try:
        for item in items:
            while len(pending) >= ahead or len(pending) > keep and pending[0].done():
                yield _result(pending.popleft())
            pending.append(pool.submit(function, item))
        while pending:
            yield _result(pending.popleft())
    finally:
        for future in pending:
            future.cancel()


def _result(future: Any) -> Any:
    from concurrent.futures import TimeoutError
    _interrupts.check()
    while not future.done():
        with contextlib.suppress(TimeoutError):
            future.exception(_TICK)  # waits, but unlike result() never raises what the function raised
        _interrupts.check()
    return future.result()


def _unordered(
        pool: Any,
        function: Callable[[_T], _R],
        items: Iterable[_T],
        ahead: Callable[[], int],
        wait: Callable[[Set[Any]], Set[Any]],
) -> Generator[_R, None, None]:
    """Yield function(item) for every item, in the order in which they end.

    ahead: how many may be under way now. wait: gives those of some futures that are done, at least one.
    """
    pending: Set[Any] = set()

    def next_results() -> List[_R]:
        done = wait(pending)
        pending.difference_update(done)
        return [future.result() for future in done]

    try:
        for item in items:
            pending.add(pool.submit(function, item))
            del item  # or memory would hold it while this waits
            while len(pending) >= ahead():
                yield from next_results()
        while pending:
            yield from next_results()
    finally:
        for future in pending:
            future.cancel()


_Progress = Optional[Callable[[int, int], Any]]  # is told how many bytes are done, and of how many
_Watch = Callable[[int], Any]  # is told how many bytes of something have been sent or received; see _Reader.watch()


def _tell(progress: Callable[[int, int], Any], done: int, total: int) -> None:
    """Call a caller's function. What it raises is not for handlers of ours."""
    try:
        progress(done, total)
    except Exception as e:
        raise _FromCaller(e) from e


def _reported(
        items: Iterable[_T],
        size: Callable[[_T], int],
        progress: _Progress,
        total: int,
) -> Iterable[_T]:
    """The same items. `progress` is told of the bytes that have passed, in the thread that takes the items."""
    if not progress:
        return items

    def reported() -> Iterator[_T]:
        done = 0
        _tell(progress, done, total)
        for item in items:
            done += size(item)
            _tell(progress, done, total)
            yield item

    return reported()


_PACE_TIME = 2.0  # seconds over which the speed of a transfer is measured
_PACE_START = 8  # connections that a transfer begins with


class _Transfer:
    """Counts the bytes that connections move, and reports progress in the thread that waits for them.

    It also says how many connections are worth having: half as many again, as long as that makes it a tenth faster.
    """

    def __init__(self, progress: _Progress = None, total: int = 0, most: int = _PACE_START) -> None:
        """total: what progress is to reach. most: connections."""
        self.progress = progress
        self.total = total
        self.most = most
        self.connections = min(most, _PACE_START)
        self.moved: Dict[Any, int] = {}  # bytes of each request that may go on
        self.settled = 0  # bytes of all others
        self.expected: Any = collections.deque()  # up to how many moved bytes, and how much progress that is
        self.passed = (0, 0)  # the last of `expected` that was reached
        self.done = 0  # the most that was reported
        self.reported = 0.0  # when
        self.since = math.inf  # when measuring the speed began; infinite before start_clock()
        self.before = 0  # bytes that had been moved then
        self.speed = 0.0

    def watch(self, key: Any) -> _Watch:
        """What counts the bytes of a request. Requests have different keys, and another try of one counts anew."""
        return functools.partial(self.moved.__setitem__, key)

    def counter(self, key: Any) -> Callable[[int, int], None]:
        """The same for what takes a progress function, and does its work in the thread that calls report()."""
        watch = self.watch(key)

        def count(done: int, _: int) -> None:
            watch(done)
            self.tick()

        return count

    def settle(self, key: Any) -> None:
        """Count a request for good, in the thread that calls report()."""
        self.settled += self.moved.pop(key, 0)

    def expect(self, moved: int, progress: int) -> None:
        """Say that so many more bytes are going to be moved, and that they mean so much more progress."""
        if self.progress:
            last = self.expected[-1] if self.expected else self.passed
            self.expected.append((last[0] + moved, last[1] + progress))

    def tick(self) -> None:
        """report(), unless it has been called just now."""
        if time.monotonic() - self.reported > _TICK / 2:
            self.report()

    def all_moved(self) -> int:
        return self.settled + sum(list(self.moved.values()))

    def report(self) -> None:
        self.reported = time.monotonic()
        moved = self.all_moved()
        self.choose_connections(moved)
        if not self.progress:
            return
        while self.expected and self.expected[0][0] <= moved:
            self.passed = self.expected.popleft()
        start, done = self.passed
        if self.expected:
            stop, then = self.expected[0]
            done += (then - done) * max(0, moved - start) // (stop - start)
        self.done = max(self.done, done)  # what a request sends again does not count backwards
        _tell(self.progress, self.done, self.total)

    def limit_connections(self, most: int) -> None:
        """Use no more connections than these, but at least one."""
        self.most = max(1, min(self.most, most))
        self.connections = min(self.connections, self.most)

    def start_clock(self) -> None:
        """Say that the network comes into play now."""
        self.since = time.monotonic()
        self.before = self.all_moved()
        self.speed = 0.0

    def choose_connections(self, moved: int) -> None:
        now = time.monotonic()
        if now - self.since < _PACE_TIME or moved == self.before or self.connections == self.most:
            return
        speed = (moved - self.before) / (now - self.since)
        if speed > 1.1 * self.speed:
            self.connections = min(self.most, self.connections * 3 // 2)
        else:
            self.most = self.connections
        self.since, self.before, self.speed = now, moved, speed

    def wait(self, futures: Set[Any]) -> Set[Any]:
        """Wait until one of them is done, and return those that are."""
        from concurrent.futures import FIRST_COMPLETED, wait
        while True:
            done, _ = wait(futures, timeout=_TICK, return_when=FIRST_COMPLETED)
            _interrupts.check()
            self.report()
            if done:
                return done


def _after(had: int, watch: Optional[_Watch]) -> Optional[_Watch]:
    """What counts the bytes that follow the first `had` of a request."""
    return (lambda count: watch(had + count)) if watch else None


# ---------------------------------------------------------------------------------------
# Contents
#
# A directory as a canonical stream of tar bytes, which depends on names, file contents, links and x bits alone: not on
# the machine, the Python, times or owners. The stream consists of segments: one for the files in the root directory,
# one for each other top-level directory, one for each partition. A segment is cut into blocks of 1 MiB. The digest of
# a segment is SHA-256 over the SHA-256 digests of its blocks, so blocks can be hashed in parallel.
# ---------------------------------------------------------------------------------------

_BLOCK = 1 << 20  # bytes of a block
_MTIME = 315532800  # 1980-01-01: older dates break zip tools and make some tars warn
_ZEROS = bytes(1024)
_DEPTH = 256  # levels of directories that a dataset may have
_MAX_FOLLOWED = 1000000  # entries that followed links may lead to, as links can multiply them without end
_BATCH = 1000  # entries that _survey() packs at once
_MANY_FILES = 32  # in a block, above which one thread may read them faster than several
_READ = os.O_RDONLY | getattr(os, 'O_BINARY', 0)

_FILE, _DIRECTORY, _LINK, _PAX = b'0', b'5', b'2', b'x'  # type flags of tar
_MODES = {_FILE: (0o644, 0o755), _DIRECTORY: (0o755,), _LINK: (0o644,)}

# What file managers leave beside the partitions
_LITTER = r'data/(?:\._[^/]*|\.DS_Store|\.directory|desktop\.ini|Thumbs\.db)\Z'


class _Entry(NamedTuple):
    """What one tar header describes."""

    name: str  # in the archive; a directory's ends in a slash
    kind: bytes  # _FILE, _DIRECTORY or _LINK
    mode: int
    size: int
    link: str  # target of a link
    source: str  # path of a file


_Listing = Iterable[Tuple[str, Iterable[_Entry]]]  # paths of segments, each with its entries, in the archive's order


class _Segment(NamedTuple):
    """A part of an archive that can be fetched and verified by itself."""

    path: str  # '.', a top-level directory, or data/<partition>
    offset: int = 0  # of its first byte in the archive
    length: int = 0  # bytes in the archive
    files: int = 0  # number of files and links
    size: int = 0  # bytes of all files
    digest: str = ''  # sha256:...

    @property
    def partition(self) -> Optional[str]:
        """The name of the partition; None if it is another segment."""
        return self.path[5:] if self.path.startswith('data/') else None

    def amount(self) -> Dict[str, int]:
        return {'files': self.files, 'size': self.size}

    def to_json(self) -> Dict[str, Any]:
        """As indexes and receipts hold it."""
        return {'path': self.path, 'offset': self.offset, 'length': self.length, 'files': self.files,
                'size': self.size, 'digest': self.digest}

    @classmethod
    def from_json(cls, row: Any) -> '_Segment':
        """The reverse of to_json(). Raises _Malformed."""
        if not isinstance(row, dict):
            raise _Malformed
        fields: List[Any] = [row.get(key) for key in ('path', 'offset', 'length', 'files', 'size', 'digest')]
        if [type(field) for field in fields] != [str, int, int, int, int, str]:
            raise _Malformed
        if not _is_utf8(fields[0]) or not re.match(r'sha256:[0-9a-f]{64}\Z', fields[-1]):
            raise _Malformed
        return cls(*fields)


def _segment_order(path: str) -> Tuple[int, str]:
    """What segments are sorted by."""
    return (0, '') if path == '.' else (1 + path.count('/'), path)


# Names are text in UTF-8 everywhere but on disk, where the locale decides (Python 3.6 with LANG=C reads ASCII only).
_OS_IS_UTF8 = sys.getfilesystemencoding().lower().replace('-', '') == 'utf8'


def _from_os(name: str) -> str:
    """A file name as text. Raises UnicodeError if its bytes are not UTF-8."""
    if not _OS_IS_UTF8:
        return os.fsencode(name).decode('utf-8')
    name.encode('utf-8')
    return name


def _to_os(name: str) -> str:
    """A name as the system's functions take it. Raises UnicodeError if UTF-8 cannot encode it."""
    raw = name.encode('utf-8')
    return name if _OS_IS_UTF8 else os.fsdecode(raw)


def _join(root: _Path, name: str) -> str:
    return os.fspath(root) + os.sep + _to_os(name)


def _scan(path: _Path) -> Tuple[List[str], Set[str]]:
    """The names in a directory, sorted by code points, and those among them that are links."""
    names = []
    links = set()
    with os.scandir(path) as items:
        for item in items:
            try:
                name = _from_os(item.name)
            except UnicodeError:
                raise InvalidDataset(f'the name {os.fsencode(item.path)!r} is not valid UTF-8', 'rename it') from None
            names.append(name)
            if item.is_symlink():
                links.add(name)
    names.sort()
    return names, links


def _stat(name: str, path: str) -> os.stat_result:
    """os.stat() of `path`. Raises InvalidDataset, which calls it `name`, if it cannot be part of a dataset."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise InvalidDataset(f"'{name}' is a link to nothing", 'repair or remove it') from None
        raise InvalidDataset(f"'{name}' vanished", 'try again') from None
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise InvalidDataset(f"'{name}' is a link that leads back to itself", 'repair or remove it') from None
    if stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise InvalidDataset(f"'{name}' is neither a file nor a directory", 'remove it')
    return status


def _is_directory(root: _Path, name: str) -> bool:
    return stat.S_ISDIR(_stat(name, _join(root, name)).st_mode)


def _is_litter(name: str) -> bool:
    """Whether an entry is what a file manager left beside the partitions, and no part of the dataset."""
    return bool(re.match(_LITTER, name))


def _partitions(root: _Path) -> List[str]:
    """The names of a dataset's partitions, sorted. Raises InvalidDataset if there is anything else beside them."""
    partitions = []
    for name in _scan(_join(root, 'data'))[0]:
        path = 'data/' + name
        if _is_directory(root, path):
            partitions.append(name)
        elif not _is_litter(path):
            raise InvalidDataset(f"'data' may hold only directories (partitions), but '{path}' is a file", 'move it')
    return partitions


def _segments(root: _Path, only: Optional[Container[str]] = None) -> _Listing:
    """The segments of a dataset, or only those with the given paths, each with its entries."""
    names, links = _scan(root)
    directories = [name for name in names if name != 'data' and _is_directory(root, name)]
    inside = {'.': sorted(set(names) - set(directories))}
    for path in directories + ['data/' + name for name in _partitions(root)]:
        inside[path] = [path]
    for path, tops in inside.items():
        if only is None or path in only:
            yield path, _entries(root, tops, links, path)


class _Level:
    """A directory that _entries() is in."""

    def __init__(
            self,
            prefix: str,
            place: str,
            names: List[str],
            links: Set[str],
            through_link: bool = False,
            identity: Optional[Tuple[int, int]] = None,
    ) -> None:
        self.prefix = prefix  # of the names in it
        self.place = place  # of their paths on disk
        self.names = names[::-1]  # that are still to come, the next one last
        self.links = links  # those that are links
        self.through_link = through_link  # whether a followed link leads here
        self.identity = identity  # device and inode


def _entries(root: _Path, names: Iterable[str], links: Set[str], segment: str) -> Iterator[_Entry]:
    """Everything at and below `names`, a directory before its contents."""
    levels = [_Level('', _join(root, ''), list(names), links)]
    followed = 0
    while levels:
        level = levels[-1]
        if not level.names:
            levels.pop()
            continue
        own = level.names.pop()
        name = level.prefix + own
        followed += level.through_link
        if followed > _MAX_FOLLOWED or len(levels) > _DEPTH:
            raise InvalidDataset(f"'{name[:300]}' is nested too deeply, or its links lead to too many files",
                                 'remove links')
        path = level.place + _to_os(own)
        status = _stat(name, path)
        is_directory = stat.S_ISDIR(status.st_mode)
        is_link = own in level.links
        link = ''
        if is_link and name != segment and not (is_directory and segment == '.'):
            link = _kept_link(root, name, segment)
        if link:
            yield _Entry(name, _LINK, 0o644, 0, link, '')
        elif not is_directory:
            mode = 0o755 if status.st_mode & 0o100 else 0o644
            yield _Entry(name, _FILE, mode, status.st_size, '', path)
        else:
            yield _Entry(name + '/', _DIRECTORY, 0o755, 0, '', '')
            if segment == '.':
                continue
            identity = status.st_dev, status.st_ino
            if any(level.identity == identity for level in levels):
                raise InvalidDataset(f"'{name}' is a link to a directory above it", 'remove it')
            inner, inner_links = _scan(path)
            levels.append(_Level(name + '/', path + os.sep, inner, inner_links,
                                 level.through_link or is_link, identity))


def _kept_link(root: _Path, name: str, segment: str) -> str:
    """The target of the link `name` if it can stay a link, or '' if it must be followed.

    It stays one if it is relative, so that copies of the dataset agree, and leads to a file of the same segment.
    """
    path = _join(root, name)
    try:
        target = _from_os(os.readlink(path)).replace(os.sep, '/')
    except UnicodeError:
        raise InvalidDataset(f"the target of the link '{name}' is not valid UTF-8", 'rename it') from None
    if os.path.isabs(target):
        return ''
    meant = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    is_inside = '/' not in meant if segment == '.' else (meant + '/').startswith(segment + '/')
    if not is_inside or os.path.realpath(_join(root, meant)) != os.path.realpath(path):
        return ''
    return _relative(name, target)


def _relative(name: str, target: str) -> str:
    """The shortest relative target that a link called `name` can have, going by names alone."""
    base = '/' + posixpath.dirname(name)
    return posixpath.relpath(posixpath.join(base, target), base)


class _Survey:
    """What is known of a dataset before its files are read.

    The entries are kept, so that they need not be looked at twice; compressed, as there may be millions. Names and
    paths have much in common, so some ten bytes remain of each entry.
    """

    def __init__(self) -> None:
        self.kept: List[Tuple[str, bytes]] = []  # the path of a segment, and a batch of its entries
        self.segments: Dict[str, _Segment] = {}  # by path, with the number and bytes of their files
        self.entries = 0
        self.name_length = 0  # characters of all names and targets of links

    def add(self, path: str, batch: List[_Entry]) -> None:
        """Note some entries of a segment."""
        self.kept.append((path, zlib.compress(marshal.dumps(list(map(tuple, batch))), 1)))
        self.entries += len(batch)
        segment = self.segments.get(path) or _Segment(path)
        files, size = segment.files, segment.size
        for entry in batch:
            self.name_length += len(entry.name) + len(entry.link)
            files += entry.kind != _DIRECTORY
            size += entry.size
        self.segments[path] = segment._replace(files=files, size=size)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(segment.size for segment in self.segments.values())

    @property
    def limit(self) -> int:
        """Bytes that the archive will not exceed."""
        headers = (1 << 20) + 4096 * (len(self.kept) + self.entries) + 4 * self.name_length
        tar = headers + self.size
        return tar + tar // 250  # as _LONGEST_BLOCK allows

    def listing(self, only: Optional[Container[str]] = None) -> _Listing:
        """The segments, or only those with the given paths, each with its entries."""
        for path, batches in itertools.groupby(self.kept, operator.itemgetter(0)):
            if only is None or path in only:
                rows = itertools.chain.from_iterable(marshal.loads(zlib.decompress(batch)) for _, batch in batches)
                yield path, itertools.starmap(_Entry, rows)


def _survey(root: _Path) -> _Survey:
    """Look at all entries of a dataset. Raises InvalidDataset for what cannot be packed, before any of it is sent."""
    survey = _Survey()
    for path, entries in _segments(root):
        for batch in _batches(entries):
            survey.add(path, batch)
    return survey


def _batches(entries: Iterable[_Entry]) -> Iterator[List[_Entry]]:
    source = iter(entries)
    return iter(lambda: list(itertools.islice(source, _BATCH)), [])


# The fields of a ustar header around name, size and checksum: mode, uid, gid; mtime; type flag, link, magic, the rest
_BEFORE_SIZE = struct.Struct('8s8s8s')
_BEFORE_CHECKSUM = struct.Struct('x11sx')
_AFTER_CHECKSUM = struct.Struct('c100s8s247x')
_HEADER_SIZE = 512  # bytes of a ustar header
_SIZE_FIELD = slice(124, 135)  # of a ustar header: the digits
_KIND_AT = 156


@functools.lru_cache(maxsize=64)
def _ustar_frame(
        kind: bytes,
        mode: int,
        link: bytes,
        mtime: int,
) -> Tuple[bytes, bytes, bytes, int]:
    """What many headers share: the fields around name, size and checksum, and the sum of their bytes."""
    nobody = b'%07o\0' % 0
    before_size = _BEFORE_SIZE.pack(b'%07o\0' % mode, nobody, nobody)
    before_checksum = _BEFORE_CHECKSUM.pack(b'%011o' % mtime)
    after_checksum = _AFTER_CHECKSUM.pack(kind, link, b'ustar\x0000')
    blank_checksum = b' ' * 8
    total = sum(before_size + before_checksum + blank_checksum + after_checksum)
    return before_size, before_checksum, after_checksum, total


def _ustar(
        name: bytes,
        kind: bytes,
        mode: int,
        size: int,
        link: bytes = b'',
        mtime: int = _MTIME,
) -> bytes:
    """A ustar header of ASCII fields."""
    before_size, before_checksum, after_checksum, total = _ustar_frame(kind, mode, link, mtime)
    digits = b'%011o' % size
    # Adler-32 starts at 1 and adds bytes up modulo 65521 in its lower half (RFC 1950, 8.2), far quicker than sum().
    total += (zlib.adler32(digits, zlib.adler32(name)) & 0xffff) - 1
    return b''.join((name.ljust(100, b'\0'), before_size, digits, before_checksum, b'%06o\0 ' % total, after_checksum))


def _tar_header(name: str, kind: bytes, mode: int, size: int, link: str) -> bytes:
    """The canonical header of an entry, with a pax header before it where ustar cannot hold a field.

    It is byte for byte what tarfile.PAX_FORMAT writes from Python 3.9 on. tarfile itself will not do, as up to 3.8 it
    fills devmajor and devminor otherwise.
    """
    raw_name = name.encode('utf-8')
    if len(raw_name) == len(name) <= 100 and not link and size < 8 ** 11:  # the most frequent case: all is ASCII
        return _ustar(raw_name, kind, mode, size)
    raw_name = name.encode('ascii', 'replace')
    raw_link = link.encode('ascii', 'replace')
    pax = b''
    for key, value, raw in (('path', name, raw_name), ('linkpath', link, raw_link)):
        if len(raw) > 100 or raw.decode() != value:
            pax += _pax_record(key, value)
    if size >= 8 ** 11:
        pax += _pax_record('size', str(size))
        size = 0
    header = _ustar(raw_name[:100], kind, mode, size, raw_link[:100])
    if not pax:
        return header
    return _ustar(b'././@PaxHeader', _PAX, 0, len(pax), mtime=0) + pax + bytes(-len(pax) % 512) + header


def _pax_record(key: str, value: str) -> bytes:
    """`length key=value`, whose length counts itself (POSIX pax, "Extended Header")."""
    record = f' {key}={value}\n'.encode('utf-8')
    length = len(record) + len(str(len(record)))
    length = len(record) + len(str(length))  # it may have a digit more by now
    return str(length).encode() + record


# A part of a block: bytes of headers and padding; then bytes of a file: its entry, from where, to where
_Piece = Tuple[bytes, Optional[_Entry], int, int]


class _BlockPlan(NamedTuple):
    """A block whose files have not been read yet."""

    path: str  # of its segment
    files: int  # number of files and links whose header begins in this block
    size: int  # bytes of these files
    pieces: List[_Piece]

    def file_bytes(self) -> int:
        """Bytes of files that this block holds."""
        return sum([stop - start for _, _, start, stop in self.pieces])

    def read(self) -> bytes:
        parts = []
        for head, entry, start, stop in self.pieces:
            parts.append(head)
            if entry and start < stop:
                parts.append(_read_file(entry, start, stop))
        return b''.join(parts)


def _heads(entries: Iterable[_Entry]) -> Iterator[Tuple[bytes, Optional[_Entry], int]]:
    """What stands before the bytes of each entry, the entry, and its size; at the end the last padding."""
    padding = b''
    for entry in entries:
        name, kind, mode, size, link, _ = entry
        yield padding + _tar_header(name, kind, mode, size, link), entry, size
        padding = _ZEROS[:-size % 512]
    yield padding, None, 0


def _blocks(listing: _Listing) -> Iterator[_BlockPlan]:
    """The tar stream of the segments, cut into blocks."""
    for path, entries in listing:
        pieces: List[_Piece] = []
        room = _BLOCK
        files = size = 0
        for head, entry, entry_size in _heads(entries):
            if entry and entry.kind != _DIRECTORY:
                files += 1
                size += entry_size
            start = 0
            while len(head) + entry_size - start > room:
                stop = start + max(0, room - len(head))
                pieces.append((head[:room], entry, start, stop))
                yield _BlockPlan(path, files, size, pieces)
                head = head[room:]
                start = stop
                pieces = []
                room = _BLOCK
                files = size = 0
            pieces.append((head, entry, start, entry_size))
            room -= len(head) + entry_size - start
        yield _BlockPlan(path, files, size, pieces)


def _read_file(entry: _Entry, start: int, stop: int) -> bytes:
    """Bytes of a file. Raises InvalidDataset if it has another size than when it was looked at."""
    wanted = stop - start
    if stop == entry.size:
        wanted += 1  # a byte more would show that the file has grown
    file = os.open(entry.source, _READ)
    try:
        if start:
            os.lseek(file, start, os.SEEK_SET)
        data = more = os.read(file, wanted)
        while more and len(data) < stop - start:
            more = os.read(file, wanted - len(data))
            data += more
    finally:
        os.close(file)
    if len(data) != stop - start:
        raise InvalidDataset(f"'{entry.name}' changed while it was read", 'try again when it is complete')
    return data


def _sha256(data: bytes = b'') -> Any:
    import hashlib
    try:
        return hashlib.sha256(data)
    except ValueError:  # "no reason supplied", where OpenSSL finds no memory
        raise MemoryError from None


class _Processed:
    """A block after its files have been read."""

    def __init__(self, plan: _BlockPlan, digest: bytes, result: Any) -> None:
        self.plan = plan
        self.digest = digest  # SHA-256 of its bytes
        self.result = result  # of the work that was asked for


def _process(
        listing: _Listing,
        work: Callable[[bytes], Any],
        pool: Any,
        progress: _Progress = None,
        total: int = 0,
) -> Generator[_Processed, None, None]:
    """Read, hash and give to `work` every block, in parallel; yield them in order.

    progress: is told of the bytes of files, which are `total` in all.
    """
    def process(plan: _BlockPlan) -> _Processed:
        payload = plan.read()
        return _Processed(plan, _sha256(payload).digest(), work(payload))

    def plans() -> Iterator[_BlockPlan]:
        is_fast = True
        for plan in _reported(_blocks(listing), _BlockPlan.file_bytes, progress, total):
            # Threads that open many files mostly wait for each other, so one thread reads them here, unless the disk
            # is slow: then several threads overlap their waits.
            if is_fast and len(plan.pieces) > _MANY_FILES:
                begin = time.monotonic()
                payload = plan.read()
                is_fast = time.monotonic() - begin < 4e-5 * len(plan.pieces)
                plan = plan._replace(pieces=[(payload, None, 0, plan.file_bytes())])
            yield plan

    return _ordered(pool, process, plans(), 2 * _cores(), _cores())


class _SegmentList:
    """Accumulates blocks into segments."""

    def __init__(self) -> None:
        self.segments: List[_Segment] = []
        self.digests = _sha256()  # of the last segment's blocks
        self.ends: Dict[str, Tuple[bytes, bytes]] = {}  # digests of each segment's first and last block, by path

    def add(self, block: _Processed, length: int = 0) -> None:
        """Count a block, which takes `length` bytes in the archive."""
        path, files, size, _ = block.plan
        if not self.segments or self.segments[-1].path != path:
            self.segments.append(_Segment(path, self.archive_length()))
            self.digests = _sha256()
        self.digests.update(block.digest)
        first, _ = self.ends.get(path) or (block.digest, b'')
        self.ends[path] = first, block.digest
        last = self.segments[-1]
        self.segments[-1] = last._replace(length=last.length + length, files=last.files + files, size=last.size + size,
                                          digest='sha256:' + self.digests.hexdigest())

    def add_whole(self, segment: _Segment) -> None:
        """Count a segment that is to stand here as it stands in another archive."""
        self.segments.append(segment._replace(offset=self.archive_length()))

    def archive_length(self) -> int:
        """Bytes of all blocks in the archive."""
        return self.segments[-1].offset + self.segments[-1].length if self.segments else 0

    def digest(self) -> str:
        return _dataset_digest(self.segments)


def _dataset_digest(segments: Iterable[_Segment]) -> str:
    """The digest of a dataset: SHA-256 over the path, a zero byte and the digest of each segment."""
    total = _sha256()
    for segment in segments:
        total.update(segment.path.encode('utf-8') + b'\0' + bytes.fromhex(segment.digest[7:]))
    return f'sha256:{total.hexdigest()}'


def _digest_segments(
        root: _Path,
        only: Optional[Container[str]] = None,
        progress: _Progress = None,
) -> List[_Segment]:
    """The segments of a dataset, or only those with the given paths, after reading all their files.

    progress: is told of the bytes that have been read, and without `only` of how many there are.
    """
    listing = _segments(root, only)
    total = 0
    if progress and not only:
        survey = _survey(root)
        listing = survey.listing()
        total = survey.size
    return _hash_segments(listing, progress, total).segments


def _hash_segments(listing: _Listing, progress: _Progress = None, total: int = 0) -> _SegmentList:
    """Read all files of some segments."""
    found = _SegmentList()
    with _threads(_cores()) as pool:
        for block in _process(listing, len, pool, progress, total):
            found.add(block)
    return found


# ---------------------------------------------------------------------------------------
# Datasets
#
# A dataset is a directory with at least one partition. Its name is safe in any path and any key of any storage.
# ---------------------------------------------------------------------------------------

_META_LIMIT = 16 << 20  # bytes of meta.json
_README_LIMIT = 1 << 20  # bytes of README.md that are shown

_NAME = r'[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z'
_NAME_AND_DIGEST = r'([^@]*)(?:@(sha256:[0-9a-f]{64}))?\Z'


class Dataset(Mapping[str, Path]):
    """A directory with data/<partition>/...: a read-only mapping of the partitions' names to their directories.

        for file in ds['train'].iterdir(): ...      UnknownPartition, a KeyError, if there is no such partition

    root: pathlib.Path of the directory. name: str. meta: the contents of meta.json. digest: 'sha256:...'.
    Iteration is sorted. A Dataset can be copied and pickled, for instance for worker processes, which do not read the
    directory again.
    Raises InvalidDataset if `root` is not a dataset.
    """

    @_api
    def __init__(
            self,
            root: _Path,
            name: Optional[str] = None,
            digest: Optional[str] = None,
    ) -> None:
        self.root = Path(_check_path(root))  #: pathlib.Path of the dataset's directory
        self.name = name or os.path.basename(os.path.realpath(self.root))  #: str
        self._digest = digest
        self._partitions = _validate(self.root)

    def __getitem__(self, partition: str) -> Path:
        if partition not in self._partitions:
            raise _unknown_partition_error(partition, self.name, self._partitions)
        return self.root / 'data' / _to_os(partition)

    def __iter__(self) -> Iterator[str]:
        return iter(self._partitions)

    def __len__(self) -> int:
        return len(self._partitions)

    def __repr__(self) -> str:
        return f"<Dataset {self.name}: {', '.join(self)}>"

    def keys(self) -> KeysView[str]:
        """The partitions' names, as a set-like view, like dict.keys()."""
        return dict.fromkeys(self._partitions).keys()

    @property
    @_api
    def meta(self) -> Dict[str, Any]:
        """The contents of meta.json; {} if there is none."""
        return _read_meta(self.root)

    @property
    @_api
    def digest(self) -> str:
        """'sha256:...' of all contents. If no receipt holds it, every file is read."""
        if self._digest is None:
            self._digest = _dataset_digest(_digest_segments(self.root))
        return self._digest

    # What etcetera 0.0.x offered, too

    @property
    def location(self) -> Path:
        """The same as `root`."""
        return self.root

    @property
    def data(self) -> Path:
        """The directory of the partitions' directories."""
        return self.root / 'data'

    def file(self, *parts: str) -> Path:
        """The path of something in the dataset's directory."""
        return self.root.joinpath(*parts)

    def partitions(self) -> List[str]:
        """The same as list(self)."""
        return list(self)


def _unknown_partition_error(partition: str, name: str, known: Sequence[str]) -> UnknownPartition:
    return UnknownPartition(f"no partition '{_masked(str(partition))}' in {name}; it has: {', '.join(known)}",
                            _did_you_mean(str(partition), known))


def _validate(root: Path, label: str = '') -> List[str]:
    """The partitions of the dataset at `root`. Raises InvalidDataset, which calls the directory `label`."""
    label = label or str(root)
    if not root.is_dir():
        if root.exists():
            raise InvalidDataset(f'{label} is a file, not a directory', 'unpack it first')
        raise InvalidDataset(f'no directory {_masked(label)}')
    if not (root / 'data').is_dir():
        raise InvalidDataset(f"{label} is no dataset: it needs a directory 'data' with a directory for each partition",
                             _nearby_dataset(root, label))
    try:
        partitions = _partitions(root)
    except InvalidDataset as e:
        raise InvalidDataset(f'{label} is no dataset: {e.message}', e.remedy) from None
    if not partitions:
        raise InvalidDataset(f"{label} is no dataset: 'data' is empty", 'make a directory in it for each partition')
    _read_meta(root, label)
    return partitions


def _nearby_dataset(root: Path, label: str) -> str:
    """A remedy if a dataset is directly above or below `root`, or ''."""
    if root.name == 'data':
        return f'{root.parent} is one'
    inner = [name for name in sorted(os.listdir(root)) if os.path.isdir(root / name / 'data')]
    if not inner:
        return ''
    if label == str(root):
        return f'{root / inner[0]} is one'
    return f"its directory '{inner[0]}' is one: pack that with 'tar czf NAME.tgz -C {inner[0]} .'"


def _read_meta(root: Path, label: str = '') -> Dict[str, Any]:
    label = os.path.join(label or str(root), 'meta.json')
    try:
        meta = json.loads(_read_text(root / 'meta.json', _META_LIMIT, 'strict'))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise InvalidDataset(f'{label} is not JSON: {e}') from None
    if not isinstance(meta, dict):
        raise InvalidDataset(f'{label} must hold a JSON object, {{...}}')
    return meta


def _read_readme(root: Path) -> str:
    try:
        return _read_text(root / 'README.md', _README_LIMIT, 'replace')
    except (FileNotFoundError, ValueError):
        return ''


def _read_text(path: Path, limit: int, errors: str) -> str:
    """The start of a file. Raises ValueError if it is no file or, where `errors` is 'strict', longer than `limit`."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError('it is not a file')
    if errors == 'strict' and status.st_size > limit:
        raise ValueError(f'it is larger than {limit} bytes')
    with open(path, 'rb') as file:
        return file.read(limit).decode('utf-8-sig', errors)


def _is_name(text: str) -> bool:
    """Whether a dataset can have this name, which must be safe in any path and any key."""
    return bool(re.match(_NAME, text))


def _parse_name(text: str) -> Tuple[str, Optional[str]]:
    """Split NAME[@sha256:...]. Raises InvalidDataset."""
    match = re.match(_NAME_AND_DIGEST, text)
    if not match:
        raise InvalidDataset(f"'{_masked(text)}' is not NAME@sha256:... with 64 hexadecimal digits")
    name: str = match.group(1)
    if not _is_name(name):
        raise InvalidDataset(
            f"'{_masked(text)}' cannot be a dataset's name: it takes at most 128 letters, digits, '.', '_' and '-', "
            'the first a letter or digit', 'use --url for a URL' if '://' in text else '')
    return name, match.group(2)


# ---------------------------------------------------------------------------------------
# Deflate
#
# RFC 1951 by this machine's libdeflate, which takes about half of zlib's time, and fewer bytes; by Python's zlib if
# there is none, or if $ETC_LIBDEFLATE is 0. Each reads what the other writes, and what libdeflate cannot read as it
# should be, zlib gets to judge, so errors are the same. libdeflate is loaded by a full path: from beside the standard
# library, or from where the system's own libraries and those of its package manager are.
# ---------------------------------------------------------------------------------------

_ROOM = _BLOCK + 4096  # bytes that a deflated block takes at most
_Z_RLE = 3  # zlib.Z_RLE, which Python 3.6 does not name


class _Libdeflate:
    """The functions of the library at a path. Raises OSError, AttributeError or ImportError if it is not usable."""

    def __init__(self, path: str) -> None:
        import ctypes
        import threading
        library = ctypes.CDLL(path)
        number, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p

        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = getattr(library, 'libdeflate_' + name)
            found.restype, found.argtypes = result, arguments
            return found

        self.new_compressor = function('alloc_compressor', pointer, number)
        self.compress = function('deflate_compress', size, pointer, pointer, size, pointer, size)
        self.free_compressor = function('free_compressor', None, pointer)
        self.new_decompressor = function('alloc_decompressor', pointer)
        sizes = (ctypes.POINTER(size), ctypes.POINTER(size))
        self.decompress = function('deflate_decompress_ex', number, pointer, pointer, size, pointer, size, *sizes)
        self.free_decompressor = function('free_decompressor', None, pointer)
        self.crc32 = function('crc32', ctypes.c_uint32, ctypes.c_uint32, pointer, size)
        self.local = threading.local()

    def state(self) -> Any:
        """The state of this thread."""
        if not hasattr(self.local, 'state'):
            self.local.state = _LibdeflateState(self)
        return self.local.state


class _LibdeflateState:
    """What one thread uses. It goes when the thread ends."""

    def __init__(self, library: _Libdeflate) -> None:
        import ctypes
        self.library = library
        self.compressors: Dict[int, Any] = {}  # by level; None where there was no memory
        self.decompressor = library.new_decompressor()
        self.room = ctypes.create_string_buffer(_ROOM)
        self.read, self.written = ctypes.c_size_t(), ctypes.c_size_t()
        self.copy = ctypes.string_at

    def __del__(self) -> None:
        for compressor in self.compressors.values():
            self.library.free_compressor(compressor)
        self.library.free_decompressor(self.decompressor)

    def deflate(self, data: bytes, level: int) -> bytes:
        """Empty if that fails."""
        if level not in self.compressors:
            self.compressors[level] = self.library.new_compressor(level)
        compressor = self.compressors[level]
        length = compressor and self.library.compress(compressor, data, len(data), self.room, _ROOM)
        return self.copy(self.room, length) if length else b''

    def inflate(self, data: bytes) -> Tuple[bytes, bytes]:
        """What a stream holds, at most a block, and the bytes that follow it. Both are empty if that fails."""
        failed = not self.decompressor or self.library.decompress(
            self.decompressor, data, len(data), self.room, _BLOCK, self.read, self.written)
        return (b'', b'') if failed else (self.copy(self.room, self.written.value), data[self.read.value:])


def _libdeflate() -> Optional[_Libdeflate]:
    """libdeflate, if it is to be used."""
    return None if os.environ.get('ETC_LIBDEFLATE') == '0' else _load_libdeflate()


@functools.lru_cache(maxsize=None)
def _load_libdeflate() -> Optional[_Libdeflate]:
    """The first libdeflate that is there, or None if it does not work."""
    try:
        return next((_Libdeflate(path) for path in _libdeflate_paths() if os.path.exists(path)), None)
    except (ImportError, OSError, AttributeError):
        return None


def _libdeflate_paths() -> List[str]:
    """Where libdeflate is trusted. A bare name would also be looked for in the current directory on some systems."""
    beside = sys.base_prefix  # where the standard library is
    if not os.path.isabs(beside) or sys.implementation.name != 'cpython':  # ctypes of PyPy copies bytes one by one
        return []
    if os.name == 'nt':
        names = ('deflate.dll', 'libdeflate.dll') if sys.maxsize > 1 << 32 else ()  # 32 bits have another convention
        return [os.path.join(beside, 'Library', 'bin', name) for name in names]
    if sys.platform == 'darwin':
        return [f'{top}/lib/libdeflate.0.dylib' for top in (beside, '/opt/homebrew', '/usr/local', '/opt/local')]
    debian = f'/usr/lib/{os.uname().machine}-linux-gnu'
    return [f'{lib}/libdeflate.so.0' for lib in (f'{beside}/lib', debian, '/usr/lib64', '/usr/lib', '/usr/local/lib')]


def _deflate(data: bytes, level: int, only_runs: bool = False) -> bytes:
    """A deflate stream. Level 0 stores. only_runs: be fast, since nothing but runs of a byte shrinks."""
    library = _libdeflate()
    deflated = library.state().deflate(data, 1 if only_runs else level) if library and level else b''
    if not deflated:
        strategy = _Z_RLE if only_runs else zlib.Z_DEFAULT_STRATEGY
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
        deflated = deflate.compress(data) + deflate.flush()
    return deflated


def _deflater() -> str:
    return 'libdeflate' if _libdeflate() else f'zlib {zlib.ZLIB_RUNTIME_VERSION}'


def _crc32(data: bytes) -> int:
    library = _libdeflate()
    return int(library.crc32(0, data, len(data))) if library else zlib.crc32(data)


# ---------------------------------------------------------------------------------------
# Archives
#
# THE FORMAT, VERSION 1
#
# An archive is one object, NAME.tgz: an ordinary gzipped tar that every tar unpacks. Inside the rules of gzip (RFC
# 1952: members may follow one another, headers may carry extra fields) it has more structure:
#
#     archive  = segment...  end  index  footer
#     segment  = block...
#     block    = one gzip member that holds the next 1,048,576 bytes of the segment's tar stream; the last block of a
#                segment may hold fewer
#     end      = one block that holds tar's end of archive, 1,024 zero bytes
#     index    = empty gzip members, each of which carries the next bytes of the index, at most 8,000
#     footer   = an empty gzip member of 34 bytes
#
# All members start with the bytes 1f 8b 08 04 00 00 00 00 00 ff, a 16-bit length XLEN and one extra field:
#
#     bytes 10-11   XLEN: the length of all that follows up to the deflate stream
#     bytes 12-13   the tag: "et" of a block, "ei" of an index member, "ef" of the footer
#     bytes 14-15   the length of the data
#     bytes 16-     the data: of a block the length of the whole member (32 bits), of an index member bytes of the
#                   index, of the footer the offset of the first index member in the archive (64 bits)
#
# Numbers are little-endian. A block MUST NOT take more than 1,052,672 bytes. The index is JSON in UTF-8, for example:
#
#     {"etcetera":1,"digest":"sha256:...","segments":[
#         {"path":".","offset":0,"length":204,"files":1,"size":2,"digest":"sha256:..."},
#         {"path":"data/train","offset":204,"length":1312,"files":4,"size":5160,"digest":"sha256:..."}]}
#
#     path      "." for the files in the root directory (MUST be the first segment); then other top-level directories;
#               then "data/" and the name of a partition; the latter two kinds sorted by code points
#     offset    of the segment's first byte in the archive; segments MUST follow one another without gaps, from 0 on
#     length    bytes of the segment in the archive
#     files     number of files and links
#     size      bytes of all files
#     digest    SHA-256 over the SHA-256 digests (32 bytes each) of the contents of the segment's blocks
#
# The digest of the dataset is SHA-256 over, for each segment: its path in UTF-8, a zero byte, its digest (32 bytes).
# Readers MUST ignore keys that they do not know. If "etcetera" is not 1, they MUST treat the archive as any .tgz.
#
# The tar stream MUST be canonical:
#     - Entries are sorted by the components of their paths as code points, a directory before its contents. Every
#       directory has an entry. The segment "." holds the root's files and the entry "data/".
#     - Names are relative, without "./"; those of directories end in "/".
#     - The mode is 0644; of directories and of files that their owner may execute 0755. uid and gid are 0; mtime is
#       315532800; uname, gname, devmajor and devminor are zero bytes.
#     - Headers are ustar. A pax header (name "././@PaxHeader", mode 0, mtime 0) precedes an entry whose name or link
#       target is not ASCII or longer than 100 bytes, or whose size is 8 GiB or more. Its records are "path",
#       "linkpath", "size", in this order, and only those that are needed.
#     - The target of a link is the shortest relative path to an entry of the same segment.
#
# So a reader finds the index from the object's end, fetches any segment by a range of bytes, and inflates blocks in
# parallel, as it knows where each ends. A writer SHOULD store a block that would not shrink.
# ---------------------------------------------------------------------------------------

_GZIP = b'\x1f\x8b\x08\x04\0\0\0\0\0\xff'  # RFC 1952, 2.3: deflate, FEXTRA, no time, unknown system
_EMPTY = b'\x03\0' + bytes(8)  # an empty deflate stream, its CRC-32 and its size
_EXTRA = struct.Struct('<H2sH')  # RFC 1952, 2.3.1.1: length of all fields, tag and length of the only one
_FIELD_OFFSET = len(_GZIP) + _EXTRA.size  # where the data of the extra field start
_BLOCK_HEADER_SIZE = _FIELD_OFFSET + 4  # bytes before a block's deflate stream
_TRAILER = struct.Struct('<II')  # CRC-32 and size
_FOOTER_SIZE = _FIELD_OFFSET + 8 + len(_EMPTY)
_LONGEST_BLOCK = _BLOCK + 4096  # bytes in the archive: stored, a block grows by 5 bytes in each 16 KiB or more
_INDEX_STEP = 8000  # bytes of index a member: BusyBox's gunzip fails on much longer extra fields
_INDEX_LIMIT = 16 << 20  # bytes of index: enough for some 80,000 partitions
_LARGE_FILE = 32768  # bytes above which writing a file in another thread pays off


def _member(tag: bytes, data: bytes) -> bytes:
    """The header of a gzip member with one extra field."""
    return _GZIP + _EXTRA.pack(len(data) + 4, tag, len(data)) + data


def _compress(level: int, payload: bytes) -> bytes:
    """A block of the archive, from the bytes that it is to hold."""
    level, only_runs = _choose_effort(level, payload)
    body = _deflate(payload, level, only_runs)
    if level and len(body) > len(payload):
        body = _deflate(payload, 0)
    length = struct.pack('<I', _BLOCK_HEADER_SIZE + len(body) + _TRAILER.size)
    return b''.join((_member(b'et', length), body, _TRAILER.pack(_crc32(payload), len(payload))))


def _choose_effort(level: int, payload: bytes) -> Tuple[int, bool]:
    """The level that pays for these bytes, judged by samples of them, and whether only runs in them shrink.

    JPEG, Parquet, npz and the like do not shrink: they are stored. Small files of that kind do not shrink either, but
    the padding between them does. The default level is to take at most 2 % more bytes than gzip's; zlib's level below
    often achieves that, in two thirds of the time, and its run-length encoding takes a third for what hardly shrinks.
    libdeflate takes fewer bytes anyway.
    """
    if not level or len(payload) <= 65536:
        return level, False
    by_zlib = _libdeflate() is None
    step = len(payload) // 4
    samples = b''.join([payload[start:start + 2048] for start in range(step // 2, len(payload), step)])
    if len(_deflate(samples, level)) > 0.97 * len(samples):
        return 0, False
    without_padding = re.sub(b'\0{8,}', b'', samples)
    if len(_deflate(without_padding, level)) > (0.9 if by_zlib else 0.95) * len(without_padding):
        return level, True
    if by_zlib and level == _DEFAULT_LEVEL:
        middle = payload[len(payload) // 2:][:32768]
        if len(_deflate(middle, level - 1)) < 1.012 * len(_deflate(middle, level)):
            level -= 1
    return level, False


def _inflate(body: Any) -> bytes:
    """The bytes that a block holds, from what follows its header."""
    is_deflated = body[0] & 6  # zlib takes fewer copies to read what is stored
    library = _libdeflate() if is_deflated else None
    payload, rest = library.state().inflate(bytes(body)) if library else (b'', b'')
    if not _is_sound(payload, rest):
        payload, rest = _inflate_by_zlib(body)
    if not _is_sound(payload, rest):
        raise Corrupt('the archive is damaged: a block does not match its checksum or size')
    return payload


def _inflate_by_zlib(body: Any) -> Tuple[bytes, bytes]:
    """What the deflate stream of a block holds, and what follows it, or b'' if the stream has no end."""
    inflater = zlib.decompressobj(-15)
    try:
        payload = inflater.decompress(body, _BLOCK + 1)
    except zlib.error as e:
        if 'Error -4' in str(e):  # Z_MEM_ERROR
            raise MemoryError from None
        raise Corrupt(f'the archive is damaged: {e}') from None
    return payload, inflater.unused_data


def _is_sound(payload: bytes, trailer: bytes) -> bool:
    """Whether these can be the contents and the trailer of a block."""
    is_block = 0 < len(payload) <= _BLOCK and len(payload) % 512 == 0
    return is_block and trailer == _TRAILER.pack(_crc32(payload), len(payload))


def _pack(
        survey: _Survey,
        level: int,
        pool: Any,
        segments: _SegmentList,
        transfer: _Transfer,
        copies: Mapping[str, _Segment],
) -> Generator[Union[bytes, _Segment], None, None]:
    """Yield the blocks of a dataset's archive; `segments` grows on the way.

    copies: segments, by path, that are not packed, but yielded where they are to stand.
    """
    paths = iter(survey.segments)

    def copied_before(path: str) -> Iterator[_Segment]:
        for other in paths:
            if other == path:
                return
            segments.add_whole(copies[other])
            transfer.expect(copies[other].length, 0)
            yield copies[other]

    path = ''
    listing = survey.listing(survey.segments.keys() - copies.keys())
    for block in _process(listing, functools.partial(_compress, level), pool):
        if block.plan.path != path:
            path = block.plan.path
            yield from copied_before(path)
        segments.add(block, len(block.result))
        transfer.expect(len(block.result), block.plan.file_bytes())
        yield block.result
    yield from copied_before('')


def _archive_end(level: int, segments: _SegmentList) -> bytes:
    """What follows the blocks: the end of the tar, the index and the footer."""
    end = _compress(level, _ZEROS)
    return end + _index(segments.segments, segments.archive_length() + len(end))


def _index(segments: Sequence[_Segment], offset: int) -> bytes:
    """The index and the footer, for an index that starts at `offset`."""
    index = {'etcetera': 1, 'digest': _dataset_digest(segments),
             'segments': [segment.to_json() for segment in segments]}
    text = json.dumps(index, ensure_ascii=False, separators=(',', ':')).encode('utf-8')
    if len(text) > _INDEX_LIMIT * 9 // 10:
        raise InvalidDataset('it has too many partitions for one archive', 'gather them in fewer directories')
    steps = [text[start:start + _INDEX_STEP] for start in range(0, len(text), _INDEX_STEP)]
    members = [_member(b'ei', step) + _EMPTY for step in steps]
    return b''.join(members) + _member(b'ef', struct.pack('<Q', offset)) + _EMPTY


def _find_index(tail: bytes, size: int) -> Optional[int]:
    """The offset of the index in an archive of `size` bytes that ends in `tail`; None if it has no index."""
    footer = tail[-_FOOTER_SIZE:]
    offset_bytes = footer[_FIELD_OFFSET:_FIELD_OFFSET + 8]
    if len(footer) < _FOOTER_SIZE or footer != _member(b'ef', offset_bytes) + _EMPTY:
        return None
    offset = int.from_bytes(offset_bytes, 'little')
    if not 0 < size - _FOOTER_SIZE - offset <= _INDEX_LIMIT:
        raise Corrupt('the archive is damaged: its footer points nowhere')
    return offset


def _parse_index(data: bytes, offset: int) -> Optional[List[_Segment]]:
    """The segments in the index that starts at `offset`, from its bytes up to the archive's end.

    None if the index is of an unknown version. Raises Corrupt.
    """
    try:
        index = _parse_json(_index_text(data[:-_FOOTER_SIZE]))
        if not isinstance(index, dict) or type(index.get('etcetera')) is not int:
            raise _Malformed
        if index['etcetera'] != 1:
            return None
        if not isinstance(index.get('segments'), list):
            raise _Malformed
        segments = [_Segment.from_json(row) for row in index['segments']]
        _check_order(segments, offset)
        if index.get('digest') != _dataset_digest(segments):
            raise _Malformed
        return segments
    except _Malformed:
        raise Corrupt('the archive is damaged: its index is unreadable') from None


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode('utf-8'))
    except (ValueError, RecursionError):
        raise _Malformed from None


def _index_text(data: bytes) -> bytes:
    """The JSON in the members of an index. Raises _Malformed, also for what would take much memory or time to parse."""
    parts = []
    at = 0
    while at < len(data):
        header = data[at:at + _FIELD_OFFSET]
        length = int.from_bytes(header[-2:], 'little')
        end = at + _FIELD_OFFSET + length + len(_EMPTY)
        part = data[at + _FIELD_OFFSET:at + _FIELD_OFFSET + length]
        if data[at:end] != _member(b'ei', part) + _EMPTY:
            raise _Malformed
        parts.append(part)
        at = end
    text = b''.join(parts)
    if text.count(b'[') + text.count(b'{') > _INDEX_LIMIT >> 6 or re.search(rb'\d{65}', text):
        raise _Malformed
    return text


def _check_order(segments: List[_Segment], end: int) -> None:
    """Raises _Malformed unless these segments can follow one another from the archive's start to `end`, or before."""
    offset = 0
    order = []
    for segment in segments:
        if segment.offset != offset or segment.length <= 0 or segment.files < 0 or segment.size < 0:
            raise _Malformed
        offset += segment.length
        order.append(_segment_order(segment.path))
        if segment.path == '.':
            continue
        if not _is_safe(segment.path):
            raise _Malformed
        parts = segment.path.split('/')
        if len(parts) > 2 or (len(parts) == 2) != (parts[0] == 'data'):
            raise _Malformed
    if order[:1] != [(0, '')] or order != sorted(set(order)) or offset > end:
        raise _Malformed


_NOT_ON_WINDOWS = (  # https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    r'[\\:<>"|?*\x00-\x1f]|[. ](?:/|\Z)|(?:\A|/)(?:con|prn|aux|nul|com\d|lpt\d)(?:\.[^/]*)?(?:/|\Z)')


def _is_safe(name: str) -> bool:
    """Whether a name in an archive stays below the directory where it is unpacked, on this system."""
    padded = f'/{name}/'
    if '//' in padded or '/./' in padded or '/../' in padded or '\0' in name:
        return False
    return os.sep == '/' or not re.search(_NOT_ON_WINDOWS, name, re.I)


_HAS_OPENAT = os.open in os.supports_dir_fd  # as POSIX demands; Windows has no such thing
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0)


def _link_or_copy(source: str, target: str) -> None:
    """Give a read-only file a second name. Make a read-only copy where hard links do not work, or would not be safe."""
    import shutil
    mode = os.stat(source).st_mode & 0o777
    try:
        if mode & 0o222 or os.path.islink(source) or os.name == 'nt':
            raise OSError  # on Windows, a link can be removed only if the file is writable, and so would the other be
        os.link(source, target)
    except OSError:
        mode &= 0o555
        file = os.open(target, _CREATE, mode | 0o200)  # with the x bit at once, as some disks have no chmod
        with open(source, 'rb') as original, open(file, 'wb') as copy:
            shutil.copyfileobj(original, copy, _BLOCK)
        with contextlib.suppress(OSError):
            os.chmod(target, mode)


def _symlink(
        target: _Path,
        path: _Path,
        remedy: str = "set 'home' to a place on another disk",
) -> None:
    try:
        os.symlink(target, path, target_is_directory=os.path.isabs(target))  # only Windows heeds the flag
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        raise Error(f'this disk cannot hold links: {e.strerror}', remedy) from None


def _write(file: int, data: Any) -> None:
    """os.write(), until all is written."""
    written = os.write(file, data)
    while written < len(data):
        data = data[written:]
        written = os.write(file, data)


class _Sink:
    """Writes the entries of an archive below `root`: nothing elsewhere, nothing twice, nothing through a link."""

    def __init__(self, root: _Path) -> None:
        self.root = os.path.join(os.fspath(root), '')
        self.reuse_from = ''  # a directory that holds the same files, while there is one
        self.links: Dict[str, str] = {}  # targets of links, which finish() makes
        self.writable: List[Tuple[str, int]] = []  # files that finish() makes read-only, with their modes

    def path(self, name: str) -> str:
        """Where an entry goes. Raises Corrupt if that is not below the root."""
        if not _is_safe(name) or name.count('/') >= _DEPTH:
            raise Corrupt(f"the archive holds the unsafe name '{name[:300]}'", 'do not trust it')
        try:
            return self.root + _to_os(name)
        except UnicodeError:
            raise Corrupt(f"the archive holds the name '{name}', which is not valid UTF-8") from None

    def make_directory(self, name: str, exist_ok: bool = False) -> None:
        path = self.path(name)
        try:
            os.mkdir(path)
        except FileExistsError:
            if not exist_ok or not os.path.isdir(path):
                raise self.duplicate_error(name) from None
        except (FileNotFoundError, NotADirectoryError):
            raise self.orphan_error(name) from None

    def create_file(self, name: str, executable: bool) -> int:
        """Create a read-only file, and return a descriptor to write to it."""
        path = self.path(name)
        mode = 0o555 if executable else 0o444
        try:
            try:
                return os.open(path, _CREATE, mode)
            except PermissionError:  # some network file systems do not open a new read-only file for writing
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                file = os.open(path, _CREATE, mode | 0o200)
                self.writable.append((path, mode))
                return file
        except FileExistsError:
            raise self.duplicate_error(name) from None
        except (FileNotFoundError, NotADirectoryError):
            raise self.orphan_error(name) from None

    def write_file(self, name: str, executable: bool, data: Any) -> None:
        """Create a file with all its contents."""
        reuse_from = self.reuse_from  # another thread may reset it
        if reuse_from:
            _link_or_copy(reuse_from + _to_os(name), self.path(name))
            return
        file = self.create_file(name, executable)
        try:
            _write(file, data)
        finally:
            os.close(file)

    def add_link(self, name: str, target: str) -> None:
        """Note a link. finish() makes it, so that nothing can be written through it."""
        self.path(name)
        if name in self.links:
            raise self.duplicate_error(name)
        if not 0 < len(target) < 4096 or '\0' in target or not _is_utf8(target):
            raise self.link_error(name, ascii(target)[1:-1])
        self.links[name] = target

    def finish(self, confined: bool) -> None:
        """Make the links. Raises Corrupt if one leads out of the dataset or, if `confined`, out of its segment."""
        for path, mode in self.writable:
            with contextlib.suppress(OSError):
                os.chmod(path, mode)
        for name, target in self.links.items():
            try:
                _symlink(_to_os(target), self.path(name))
            except FileExistsError:
                raise self.duplicate_error(name) from None
        root = os.path.realpath(self.root)
        for name, target in self.links.items():
            if os.path.isabs(target) or not self.stays_inside(root, name, confined):
                raise self.link_error(name, target)

    def stays_inside(self, root: str, name: str, confined: bool) -> bool:
        """Whether a link leads to something in the dataset or, if `confined`, in its segment."""
        try:
            os.stat(self.path(name))  # the system bounds chains of links, which realpath() may follow for ever
        except OSError:
            return False
        real = os.path.realpath(self.path(name))
        segment = _segment_of(name) if confined else ''
        if segment == '.':
            return os.path.dirname(real) == root and os.path.isfile(real)
        inside = os.path.normpath(os.path.join(root, _to_os(segment)))
        return real == inside or real.startswith(inside + os.sep)

    def orphan_error(self, name: str) -> Error:
        if not os.path.isdir(self.root):
            return Error(f'{self.root} was removed while it was being filled', 'run the command again')
        return Corrupt(f"the archive is damaged: it holds '{name}', but not the directory around it")

    def duplicate_error(self, name: str) -> Error:
        return Corrupt(f"the archive holds '{name}' twice (or names that this disk cannot tell apart)")

    def link_error(self, name: str, target: str) -> Error:
        return Corrupt(f"the archive holds the link '{name}' to '{target[:300]}', which leads out of the dataset or "
                       'nowhere')


def _segment_of(name: str) -> str:
    """The path of the segment that holds the entry `name`; of a top-level name '.', whatever it is."""
    parts = name.split('/')
    if parts[0] == 'data' and len(parts) > 1:
        return 'data/' + parts[1]
    return '.' if len(parts) == 1 else parts[0]


class _Extractor:
    """Writes the tar stream of one segment to a sink, and refuses whatever is not canonical.

    So what is installed hashes, file by file, to the digest that the index promises.
    """

    def __init__(self, sink: _Sink, path: str, promised: Optional[_Segment]) -> None:
        """promised: what the index says of the segment."""
        self.sink = sink
        self.path = path
        self.promised = promised
        self.limit = promised.size if promised else 1 << 63  # bytes of all files
        self.digests = _sha256()
        self.files = 0
        self.size = 0
        self.block_length = 0  # of the last block
        self.rest = b''  # the start of headers whose end is in the next block
        # the last entry
        self.name = ''
        self.executable = False
        self.parent = ''  # the directory that it is in; itself, if it is a directory
        self.own = ''  # its name there
        self.has_directory = False  # whether a directory has come
        # the file whose bytes come next
        self.file = -1  # its descriptor, if it goes on in the next block
        self.file_size = 0
        self.left = 0  # bytes of it that are still to come

    def feed(self, payload: bytes, digest: bytes) -> List[Tuple[str, bool, Any]]:
        """Write what the next block holds, but return the larger files, as arguments for _Sink.write_file()."""
        if self.block_length not in (0, _BLOCK):  # only the last block may be shorter
            raise self.rule_error('block length')
        self.block_length = len(payload)
        self.digests.update(digest)
        data = self.rest + payload
        self.rest = b''
        view = memoryview(data)
        large = []
        at = 0
        while at < len(data):
            if not self.left:
                at = self.write_siblings(data, view, at)
                if at == len(data):
                    break
                length = self.header_length(data, at) if data[at + _KIND_AT] == _PAX[0] else _HEADER_SIZE
                if at + length > len(data):
                    self.rest = data[at:]
                    break
                header = data[at:at + length]
                at += length
                self.begin(header)
                if not self.left:
                    continue
            stop = at + self.left
            if self.file < 0 and stop <= len(data):  # all of a file
                if self.left < _LARGE_FILE:
                    self.sink.write_file(self.name, self.executable, view[at:stop])
                else:
                    large.append((self.name, self.executable, view[at:stop]))
                self.left = 0
            else:
                stop = min(stop, len(data))
                self.write_part(view[at:stop])
            at = stop
            if not self.left:
                at += -stop % 512
                if not data.startswith(_ZEROS[:at - stop], stop):
                    raise self.rule_error('padding')
        return large

    def write_siblings(self, data: bytes, view: Any, at: int) -> int:
        """Write the small files at `at` that differ from the last entry in name and size alone; return where they end.

        The rules are those of begin(), to which it leaves whatever breaks one. Without this short cut, pulling many
        small files takes a fifth longer.
        """
        if not self.has_directory or self.path == '.' or self.sink.reuse_from or not _HAS_OPENAT:
            return at
        prefix = self.parent + '/'
        if prefix.count('/') >= _DEPTH or not data.startswith(prefix.encode('utf-8'), at):
            return at
        try:
            directory = os.open(self.sink.path(self.parent), os.O_RDONLY)
        except OSError:
            return at
        try:
            return self.write_siblings_in(directory, prefix, data, view, at)
        finally:
            os.close(directory)

    def write_siblings_in(self, directory: int, prefix: str, data: bytes, view: Any, at: int) -> int:
        """The loop of write_siblings(). Paths that start at a descriptor are short, which saves a tenth of the time."""
        mode = 0o755 if self.executable else 0o644
        last_start = len(data) - 2 * _HEADER_SIZE
        while at <= last_start:
            raw_name = data[at:at + 100].rstrip(b'\0')
            try:
                name = raw_name.decode('ascii')
                size = int(data[at:at + _HEADER_SIZE][_SIZE_FIELD], 8)
            except ValueError:
                break
            own = name[len(prefix):]
            if not name.startswith(prefix) or own <= self.own or own[0] == '.' or '/' in own:
                break
            start = at + _HEADER_SIZE
            stop = start + size
            if not 0 < size < _LARGE_FILE or size > self.limit - self.size or stop > last_start:
                break
            is_canonical = data.startswith(_ustar(raw_name, _FILE, mode, size), at)
            if not is_canonical or not data.startswith(_ZEROS[:-size % 512], stop):
                break
            try:
                file = os.open(own, _CREATE, mode & 0o555, dir_fd=directory)
            except (OSError, ValueError):
                break
            try:
                _write(file, view[start:stop])
            finally:
                os.close(file)
            self.name = name
            self.own = own
            self.files += 1
            self.size += size
            at = stop + -size % 512
        return at

    def write_part(self, data: Any) -> None:
        """Write the next bytes of a file that does not end in the block where it begins."""
        if self.file < 0:
            self.file = self.sink.create_file(self.name, self.executable)
        _write(self.file, data)
        self.left -= len(data)
        if not self.left:
            self.close()

    def header_length(self, data: bytes, at: int) -> int:
        """The length of the pax header at `at` and the ustar header that follows it."""
        pax = _octal(data[at:at + _HEADER_SIZE][_SIZE_FIELD])
        length = 2 * _HEADER_SIZE + pax + -pax % 512
        if not 0 < pax or length > 65536:
            raise self.rule_error('pax header')
        return length

    def begin(self, header: bytes) -> None:
        """Make what a header describes; of a file that is not empty, its bytes follow."""
        try:
            name, kind, mode, size, link = _parse_header(header)
        except ValueError:
            raise self.rule_error('header') from None
        self.check(name, kind, mode, size, link)
        is_directory = kind == _DIRECTORY
        path = name[:-1] if is_directory else name
        parent, _, own = path.rpartition('/')
        self.check_place(path, parent, own, is_directory)
        self.name = path
        if is_directory:
            self.parent = path
            self.own = ''
            self.has_directory = True
            self.sink.make_directory(path, exist_ok=path == 'data')  # reused partitions may have made it
            return
        self.parent = parent
        self.own = own
        self.files += 1
        if kind == _LINK:
            self.sink.add_link(path, link)
            return
        self.executable = mode == 0o755
        self.file_size = size
        self.left = size
        self.size += size
        if not size:
            self.sink.write_file(path, self.executable, b'')

    def check(self, name: str, kind: bytes, mode: int, size: int, link: str) -> None:
        """The rules for an entry by itself."""
        if kind not in _MODES:
            raise self.rule_error('type')
        if mode not in _MODES[kind]:
            raise self.rule_error('mode')
        if name.endswith('/') != (kind == _DIRECTORY):
            raise self.rule_error('name')
        if size < 0 or size > self.limit - self.size or size and kind != _FILE:
            raise self.rule_error('size')
        if link and kind != _LINK or kind == _LINK and link != _relative(name, link):
            raise self.rule_error('link')

    def check_place(self, path: str, parent: str, own: str, is_directory: bool) -> None:
        """The rules for which entries a segment holds, and in which order."""
        is_root = self.path == '.'
        if parent == self.parent and own > self.own and self.has_directory and not is_root:
            return  # the most frequent case: the next file of the same directory
        if is_root:
            belongs = path == 'data' if is_directory else '/' not in path
        elif not self.name:
            belongs = path == self.path  # the segment's own directory comes first
        else:
            belongs = path.startswith(self.path + '/')
        if not belongs:
            raise self.rule_error('place')
        if path.split('/') <= self.name.split('/'):
            raise self.rule_error('order')
        # The directory around it must have come: it is the directory of the last entry, or one above that.
        if self.name and not is_root and not (self.parent + '/').startswith(parent + '/'):
            raise self.rule_error('directory')

    def finish(self) -> _Segment:
        """The segment that was read. Raises Corrupt if it is truncated, or not what was promised."""
        if self.left or self.rest or not self.has_directory:
            raise self.rule_error('end')
        segment = _Segment(self.path, 0, 0, self.files, self.size, 'sha256:' + self.digests.hexdigest())
        if self.promised and segment != self.promised._replace(offset=0, length=0):
            raise Corrupt(f"the archive is damaged: '{self.path}' does not have the digest that the index promises")
        return segment

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def rule_error(self, rule: str) -> Error:
        return Corrupt(f"the archive is damaged: '{self.path}' violates the format ({rule})")


def _octal(field: bytes) -> int:
    return int(field, 8) if re.match(rb'[0-7]+\Z', field) else -1


_USTAR_FIELDS = struct.Struct('100s7s17x11s21xc100s255x')  # name, mode, size, type flag and link target


def _parse_header(header: bytes) -> Tuple[str, bytes, int, int, str]:
    """Name, type flag, mode, size and link target of a canonical header. Raises ValueError if it is not canonical."""
    raw_name, raw_mode, raw_size, kind, raw_link = _USTAR_FIELDS.unpack_from(header, len(header) - _HEADER_SIZE)
    raw_name = raw_name.rstrip(b'\0')
    raw_link = raw_link.rstrip(b'\0')
    name = raw_name.decode('ascii')
    link = raw_link.decode('ascii')
    mode = int(raw_mode, 8)
    size = int(raw_size, 8)
    if len(header) == _HEADER_SIZE:
        canonical = _ustar(raw_name, kind, mode, size, raw_link)
    else:
        pax = _parse_pax(header[_HEADER_SIZE:_HEADER_SIZE + _octal(header[_SIZE_FIELD])])
        name = pax.get(b'path', raw_name).decode('utf-8')
        link = pax.get(b'linkpath', raw_link).decode('utf-8')
        size = int(pax.get(b'size', size))
        canonical = _tar_header(name, kind, mode, size, link)
    if header != canonical:
        raise ValueError('not canonical')
    return name, kind, mode, size, link


def _parse_pax(records: bytes) -> Dict[bytes, bytes]:
    """The records of a pax header. For what _tar_header() would not write, any result or ValueError."""
    values = {}
    while records:
        length = int(records[:20].split(b' ', 1)[0])
        if length <= 0:
            raise ValueError('a pax record')
        key, _, value = records[:length].partition(b' ')[2][:-1].partition(b'=')
        values[key] = value
        records = records[length:]
    return values


class _Block(NamedTuple):
    """A block that was read from an archive or from the files of a dataset."""

    path: str  # of its segment
    length: int  # bytes in the archive
    payload: bytes
    digest: bytes  # SHA-256 of the payload


_Span = Tuple[_Segment, int]  # a segment, and how many bytes to skip at its start


def _split_blocks(chunks: Iterable[bytes], spans: Iterable[_Span]) -> Iterator[Tuple[str, Any]]:
    """Cut the bytes of some spans into blocks: the path of the segment, and what follows the block's header."""
    source = iter(chunks)
    rest = memoryview(b'')

    def take(count: int) -> Any:
        nonlocal rest
        taken = []
        while count:
            rest = rest or memoryview(next(source, b''))
            if not rest:
                raise Corrupt('the archive is damaged: it ends too early')
            taken.append(rest[:count])
            rest = rest[count:]
            count -= len(taken[-1])
        return taken[0] if len(taken) == 1 else b''.join(taken)

    for segment, skipped in spans:
        left = segment.length - skipped
        while left:
            header = bytes(take(min(left, _BLOCK_HEADER_SIZE)))
            length = int.from_bytes(header[_FIELD_OFFSET:], 'little')
            if header != _member(b'et', header[_FIELD_OFFSET:]):
                raise Corrupt('the archive is damaged: a block does not start where it should')
            if not _BLOCK_HEADER_SIZE + _TRAILER.size < length <= min(left, _LONGEST_BLOCK):
                raise Corrupt('the archive is damaged: a block does not end where it should')
            yield segment.path, take(length - _BLOCK_HEADER_SIZE)
            left -= length


def _first_block(data: bytes) -> bytes:
    """What follows the header of the block that bytes of an archive begin with."""
    return bytes(next(_split_blocks([data], [(_Segment('', length=len(data)), 0)]))[1])


def _last_block(data: bytes) -> bytes:
    """What follows the header of the block that bytes of an archive end with."""
    for match in re.finditer(re.escape(_member(b'et', bytes(4))[:_FIELD_OFFSET]), data):
        body = match.end() + 4
        if match.start() + int.from_bytes(data[match.end():body], 'little') == len(data):
            return data[body:]
    raise Corrupt('the archive is damaged: a block does not end where it should')


def _inflate_blocks(
        chunks: Iterable[bytes],
        spans: Iterable[_Span],
        pool: Any,
) -> Generator[_Block, None, None]:
    """The blocks in the bytes of some spans."""
    def inflate(item: Tuple[str, Any]) -> _Block:
        path, body = item
        payload = _inflate(body)
        return _Block(path, _BLOCK_HEADER_SIZE + len(body), payload, _sha256(payload).digest())

    return _ordered(pool, inflate, _split_blocks(chunks, spans), 2 * _cores(), 1)


class _Journal:
    """Notes which blocks have been written, so that _replay() can continue where an extraction was interrupted.

    The first line identifies the object. Each later line describes one block: the path of its segment, its length in
    the archive, its digest, and the name and size of the file that goes on in the next block.
    """

    def __init__(self, path: Path, head: str) -> None:
        import threading
        self.file = path.open('wb', buffering=0)
        self.file.write(head.encode() + b'\n')
        self.lock = threading.Lock()
        self.pending: Any = collections.deque()  # blocks that are not noted yet: [line, whether it is written]

    def begin(self, block: _Block, name: str, size: int) -> List[Any]:
        note = [json.dumps([block.path, block.length, block.digest.hex(), name, size]), False]
        self.pending.append(note)
        return note

    def done(self, note: List[Any]) -> None:
        """Note all blocks that are written, in order; at once, as the next block may be long in coming."""
        note[1] = True
        with self.lock:
            while self.pending and self.pending[0][1]:
                self.file.write(self.pending.popleft()[0].encode() + b'\n')

    def close(self) -> None:
        self.file.close()

    @staticmethod
    def read(path: Path, head: str) -> Iterator[List[Any]]:
        """The lines of a journal, if it is of the same object."""
        with contextlib.suppress(OSError, ValueError, TypeError), path.open('rb') as file:
            if file.readline() == head.encode() + b'\n':
                for line in file:
                    segment, length, digest, name, size = json.loads(line.decode('ascii'))
                    yield [str(segment), int(length), digest, name, int(size)]


def _extract(
        blocks: Iterable[_Block],
        promised: Optional[Mapping[str, _Segment]],
        sink: _Sink,
        pool: Any,
        journal: Optional[_Journal] = None,
) -> List[_Segment]:
    """Write complete segments to a sink, and return them as they were read.

    promised: what the index says of each segment, by its path; None if there is no index.
    """
    segments: List[_Segment] = []
    extractor: Optional[_Extractor] = None

    def feed() -> Iterator[Tuple[List[Any], Optional[List[Any]]]]:
        nonlocal extractor
        for number, block in enumerate(blocks):
            if number % 256 == 0:
                os.utime(sink.root)  # a sign of life, or this would soon count as abandoned
            if extractor is None or extractor.path != block.path:
                if extractor:
                    segments.append(extractor.finish())
                extractor = _Extractor(sink, block.path, promised[block.path] if promised else None)
            files = extractor.feed(block.payload, block.digest)
            note = None
            if journal and extractor.left:
                note = journal.begin(block, extractor.name, extractor.file_size)
            elif journal:
                note = journal.begin(block, '', 0)
            yield files, note
        if extractor:
            segments.append(extractor.finish())

    def write(item: Tuple[List[Any], Optional[List[Any]]]) -> None:
        files, note = item
        while files:  # and do not keep what is written
            sink.write_file(*files.pop(0))
        if journal and note:
            journal.done(note)

    try:
        for _ in _ordered(pool, write, feed(), 2 * _cores()):
            pass
    finally:
        if extractor:
            extractor.close()
    sink.finish(confined=True)
    return segments


def _replay(
        root: Path,
        lines: Callable[[], Iterator[List[Any]]],
        paths: Iterable[str],
        pool: Any,
) -> Generator[_Block, None, None]:
    """The first blocks of some segments, from the files and the journal of an extraction that was interrupted.

    Everything is read, hashed and compared with the journal. It stops at the first block that differs, as after a power
    cut.
    """
    wanted = set(paths)

    def notes() -> Iterator[List[Any]]:
        return (line for line in lines() if line[0] in wanted)

    def read(item: Tuple[List[Any], _BlockPlan]) -> _Block:
        (path, length, expected, _, _), plan = item
        payload = plan.read()
        digest = _sha256(payload).digest()
        if digest.hex() != expected or plan.path != path:
            raise Corrupt
        return _Block(path, length, payload, digest)

    def listing() -> _Listing:
        for path, entries in _segments(root, wanted):
            yield path, map(with_whole_size, entries)

    def with_whole_size(entry: _Entry) -> _Entry:
        """The file that was being written is not yet as long as its header says."""
        return entry._replace(size=unfinished_size) if entry.name == unfinished else entry

    last: Any = collections.deque(notes(), 1) or [['', 0]]
    unfinished, unfinished_size = last[0][-2:]
    with contextlib.suppress(OSError, InvalidDataset, Corrupt):
        with contextlib.closing(_ordered(pool, read, zip(notes(), _blocks(listing())), 2 * _cores())) as blocks:
            yield from blocks


# ---------------------------------------------------------------------------------------
# Archives of other tools
#
# Any .tgz that holds a dataset can be pulled: as a whole and in one pass, since it has no index. tarfile reads it, but
# treats a bad or missing header as the end of the archive, and sets no limits. So it gets a forward-only stream that
# raises an error at an early end and limits the size of headers, and each header is checked first. _Sink checks names
# and targets of links.
# ---------------------------------------------------------------------------------------

_TAR_HEADERS = 4 << 20  # bytes of names, pax records and sparse maps that may stand before one entry
_TAR_PAX = (b'x', b'g', b'X')  # pax headers: POSIX's for one entry, POSIX's for all that follow, Solaris's
_TAR_LABEL = b'V'  # GNU tar's name of the volume
_SPARSE_ZEROS = 1 << 30  # bytes that a sparse file may have beyond 1,024 times those that are stored


@contextlib.contextmanager
def _refuse_damage() -> Iterator[None]:
    """For code that reads gzip and tar: their errors mean that the archive is damaged."""
    import tarfile
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, ValueError, LookupError, OverflowError, RecursionError) as e:
        raise Corrupt(f'the archive is damaged or not a .tgz: {e}') from None
    except OSError as e:
        if e.errno is None:  # gzip's way to say that this is not gzip, or that a CRC is wrong
            raise Corrupt(f'the archive is damaged or not a .tgz: {e}') from None
        raise


class _Stream:
    """Chunks of bytes as a file that is read once, from start to end."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.rest = memoryview(b'')  # of the chunks that have been taken
        self.position = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end; they stay to be read."""
        while len(self.rest) < size:
            chunk = next(self.chunks, None)
            if chunk is None:
                break
            self.rest = memoryview(bytes(self.rest) + chunk)
        return bytes(self.rest[:size])

    def read(self, size: int) -> bytes:
        data = self.peek(size)
        self.rest = self.rest[len(data):]
        self.position += len(data)
        return data


class _TarStream(_Stream):
    """The bytes of a tar as tarfile reads them."""

    limit: Optional[int] = None  # a position that the headers of one entry may not pass
    kept = 0  # bytes of global headers, which tarfile keeps to the end

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True

    def seek(self, position: int) -> None:
        if position < self.position:
            raise EOFError('it contains a backward seek')
        while self.position < position:
            self.read(min(position - self.position, _BLOCK))

    def peek(self, size: int) -> bytes:
        if size < 0 or self.limit is not None and self.position + size > self.limit:
            raise EOFError(f'the headers of one entry take more than {_TAR_HEADERS} bytes')
        data = super().peek(size)
        if len(data) < size:
            raise EOFError('it ends too early')
        return data

    def finish(self) -> None:
        """Read what follows the end of the tar, which may only be padding."""
        for chunk in itertools.chain([self.rest], self.chunks):
            if bytes(chunk).count(0) != len(chunk):
                raise Corrupt('the archive is damaged or not a .tgz: another archive follows its end',
                              'pack the files of both as one')


def _tar_members(stream: _TarStream) -> Iterator[Tuple[Any, Any]]:
    """Each entry of a tar, with the TarFile that reads it."""
    import tarfile

    class Strict(tarfile.TarInfo):
        """Lets no error of a header pass for the end of the archive."""

        @classmethod
        def fromtarfile(cls, tar: Any) -> Any:
            header = stream.peek(512)
            if header.count(0) == len(header):
                return super().fromtarfile(tar)  # raises what tells tarfile of the end
            is_outermost = stream.limit is None  # otherwise it is the header that an extended one belongs to
            if is_outermost:
                stream.limit = stream.position + _TAR_HEADERS
            try:
                cls.check_pax(tar, header)
                return super().fromtarfile(tar)
            except tarfile.HeaderError as e:
                raise tarfile.ReadError(str(e)) from None
            finally:
                if is_outermost:
                    stream.limit = None

        @classmethod
        def check_pax(cls, tar: Any, header: bytes) -> None:
            kind = header[_KIND_AT:_KIND_AT + 1]
            if kind not in _TAR_PAX:
                return
            size = cls.frombuf(header, tar.encoding, tar.errors).size
            if kind == b'g':
                stream.kept += size
            if stream.kept > _TAR_HEADERS:
                raise tarfile.ReadError(f'its global headers take more than {_TAR_HEADERS} bytes')
            _check_pax_records(stream.peek(512 + size)[512:])

    with _refuse_damage():
        tar: Any = tarfile.open(fileobj=stream, mode='r:', encoding='utf-8', tarinfo=Strict)  # type: ignore
    with tar:
        while True:
            with _refuse_damage():
                member = tar.next()
            if member is None:
                break
            tar.members = []  # or they would pile up in memory
            yield tar, member
    with _refuse_damage():
        stream.finish()


def _check_pax_records(data: bytes) -> None:
    """ValueError unless the data are records of the form `length key=value` (POSIX pax, "Extended Header").

    Up to Python 3.12 tarfile ignores a malformed record and all that follow it.
    """
    data = data.rstrip(b'\0')
    start = 0
    while start < len(data):
        length = re.compile(rb'(\d{1,20}) [^=]+=').match(data, start)
        stop = start + int(length.group(1)) if length else 0
        if not length or stop < length.end() or data[stop - 1:stop] != b'\n':
            raise ValueError('a malformed pax header')
        start = stop


def _extract_foreign(
        chunks: Iterable[bytes],
        root: Path,
        pool: Any,
        progress: _Progress,
        total: int,
) -> None:
    """Write what a .tgz of `total` bytes holds below `root`. The one thread of `pool` inflates ahead."""
    import gzip
    source = _Stream(chunks)
    before = 0

    def advance(_: bytes) -> int:
        """The bytes of the .tgz that were read for the last chunk."""
        nonlocal before
        earlier = before
        before = source.position
        return before - earlier

    def inflated() -> Generator[bytes, None, None]:
        with contextlib.closing(_ordered(pool, plain.read, itertools.repeat(_BLOCK), 4)) as parts:
            yield from itertools.takewhile(len, _reported(parts, advance, progress, total))

    plain = gzip.GzipFile(fileobj=source)  # type: ignore[call-overload]
    sink = _Sink(root)
    with contextlib.closing(inflated()) as data:
        for tar, member in _tar_members(_TarStream(data)):
            _extract_member(tar, member, sink)
    sink.finish(confined=False)


def _plain_name(name: str) -> str:
    """Without the ./ that tars like to put before it. An absolute name stays absolute, to be refused."""
    if name.startswith('/'):
        return name
    return '/'.join(part for part in name.split('/') if part not in ('', '.'))


def _extract_member(tar: Any, member: Any, sink: _Sink) -> None:
    name = _plain_name(member.name)
    if not name and member.isdir() or member.type == _TAR_LABEL:
        return
    if _is_litter(name) and not member.isdir():
        return
    sink.path(name)
    for slash in re.finditer('/', name):
        sink.make_directory(name[:slash.start()], exist_ok=True)
    if member.isdir():
        sink.make_directory(name, exist_ok=True)
    elif member.issym():
        sink.add_link(name, member.linkname)
    elif member.islnk():
        _extract_hard_link(name, member.linkname, sink)
    elif member.isreg():
        _extract_file(tar, member, name, sink)
    elif member.isdev():
        raise Corrupt(f"the archive holds '{name}', a device or pipe", 'do not trust it')
    else:
        kind = ascii(member.type.decode('latin-1'))
        raise Corrupt(f"the archive holds '{name}' of the unknown type {kind}", "pack it with tar's default options")


def _extract_hard_link(name: str, linkname: str, sink: _Sink) -> None:
    original = _plain_name(linkname)
    if original in sink.links:
        sink.add_link(name, sink.links[original])
        return
    target = sink.path(original)
    if not os.path.isfile(target) or os.path.lexists(sink.path(name)):
        raise Corrupt(f"the archive holds the hard link '{name}' to '{linkname}', which is not in it")
    _link_or_copy(target, sink.path(name))


def _extract_file(tar: Any, member: Any, name: str, sink: _Sink) -> None:
    """Write a regular file. Of its mode only the owner's x bit is kept, as on push."""
    stored = tar.offset - member.offset_data  # whatever a sparse map says
    if member.size > (stored << 10) + _SPARSE_ZEROS:
        raise Corrupt(f"the archive holds '{name}', which would expand to {member.size} bytes, nearly all zeros")
    file = sink.create_file(name, bool(member.mode & 0o100))
    try:
        with _refuse_damage():
            source = tar.extractfile(member)
        while True:
            with _refuse_damage():
                data = source.read(_BLOCK)
            if not data:
                break
            _write(file, data)
    finally:
        os.close(file)


# ---------------------------------------------------------------------------------------
# HTTP
#
# One client for all: connections that are kept alive, proxies, private CAs, time-outs, and tries. It knows nothing of
# S3 or Google, and follows no redirect: what to do then is for a remote to decide.
#
# What is retried: a request whose connection breaks or stays silent, and one that is answered with a status in
# _TRANSIENT, five times in all, with pauses of about 0.4, 0.9, 1.8 and 3.5 seconds, and for as long as Retry-After
# asks, up to a minute. A server that has answered before gets two tries more, 7 seconds apart, as it may be restarting.
# A kept connection that the server has closed meanwhile does not count as a try. Besides: remotes go on with a range
# where it broke, or where it was given up as too slow (see _Reader.watch()); S3 makes a request again after errors that
# it calls transient, or when it has learnt another region, clock, key or checksum; a large upload to Google goes on
# until five tries in a row bring nothing across; metadata services are asked once, a container's three times.
# ---------------------------------------------------------------------------------------

_TIMEOUT = 60.0  # seconds of silence after which a connection counts as broken
_READ_TIMEOUT = 20.0  # the same for the first try of a request that only reads
_LAST_TIMEOUT = 1.0  # the same after an interruption
_CONNECT = 15  # seconds that connecting may take
_TRIES = 5
_MORE_TRIES = 2  # for a server that has answered before
_SLICE = 65536  # bytes that are sent or received at once, or up to four times as many where that goes fast
# The socket option TCP_NOTSENT_LOWAT, which Python names on some systems only from 3.7 on. It keeps the system from
# taking megabytes that a slow link has yet to send: a server's silence meanwhile would look like a fault.
_NOTSENT_LOWAT = {'linux': 25, 'darwin': 0x201}.get(sys.platform)
_TRANSIENT = (408, 429, 500, 502, 503, 504)  # statuses after which another try may help
_REPLY_LIMIT = 32 << 20  # bytes of an answer, if the caller sets no limit
_RETRY_AFTER = 60.0  # seconds that a server may ask for before the next try
_INTERIM = 100  # interim answers that may precede the final one
_SITE = r'https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?'


def _next_slice(size: int, seconds: float) -> int:
    """How many bytes to send or receive next, after so many have taken so long."""
    return min(2 * size, 4 * _SLICE) if seconds < _TICK / 2 else _SLICE


class _Request(NamedTuple):
    """What a server is asked."""

    method: str
    url: str  # percent-encoded, as it is sent
    headers: Mapping[str, str] = {}
    body: Sequence[Any] = ()  # of bytes
    watch: Optional[_Watch] = None  # of the body, while it is sent, or of a range, while it is received
    patience: float = _TIMEOUT  # seconds of silence
    unwanted: Any = None  # a threading.Event: whether the answer is of no use any more

    def slices(self) -> Iterator[Any]:
        """The body in small pieces, as the time-out of a socket applies to each piece."""
        sent = 0
        size = _SLICE
        for chunk in self.body:
            rest = memoryview(chunk)
            while len(rest):
                begin = time.monotonic()
                yield rest[:size]
                sent += len(rest[:size])
                rest = rest[size:]
                size = _next_slice(size, time.monotonic() - begin)
                if self.watch:
                    self.watch(sent)


class _Reply(NamedTuple):
    """What a server answers."""

    status: int
    headers: Any  # an email.message.Message, which finds names in any case
    body: Any  # bytes, as they came

    def page(self) -> bytes:
        """The body, inflated if a proxy has compressed it, although it was asked not to. Not for objects."""
        body = bytes(self.body)
        if self.headers.get('Content-Encoding', 'identity').lower() == 'identity':
            return body
        gzip_or_zlib = zlib.MAX_WBITS | 32
        try:
            return zlib.decompressobj(gzip_or_zlib).decompress(body, _REPLY_LIMIT)
        except zlib.error:
            return body

    def json(self) -> Dict[str, Any]:
        """The JSON object in the body; {} if there is none."""
        try:
            answer = json.loads(self.page().decode('utf-8'))
        except (ValueError, RecursionError):
            return {}
        return answer if isinstance(answer, dict) else {}

    def requested_delay(self) -> float:
        """The seconds for which the server asks to be left alone, within reason; or 0 (RFC 9110, 10.2.3)."""
        text = self.headers.get('Retry-After') or ''
        if re.match(r'[0-9]{1,9}\Z', text):
            delay = float(text)
        else:
            now = _http_time(self.headers.get('Date') or '') or time.time()
            delay = _http_time(text) - now
        return min(max(delay, 0.0), _RETRY_AFTER)

    def content_range(self) -> Tuple[Optional[int], Optional[int], Optional[int]]:
        """First byte, byte after the last, and size of the whole; None for what it does not say (RFC 9110, 14.4)."""
        pattern = r'bytes (?:(\d{1,19})-(\d{1,19})|\*)/(?:(\d{1,19})|\*)\Z'
        match = re.match(pattern, self.headers.get('Content-Range') or '', re.ASCII | re.IGNORECASE)
        if not match:
            return None, None, None
        first, last, size = [None if digits is None else int(digits) for digits in match.groups()]
        return first, None if last is None else last + 1, size

    def whole_size(self) -> Optional[int]:
        """The size of an object, from an answer to HEAD or to GET of a range; None if it does not say."""
        if 'Content-Range' in self.headers or self.status not in (200, 204):
            return self.content_range()[2]
        length = self.headers.get('Content-Length') or ''
        return int(length) if re.match(r'[0-9]{1,19}\Z', length) else None


_Signer = Callable[[_Request], Dict[str, str]]  # gives the headers to send


class _Proxy:
    def __init__(self, address: str, headers: Dict[str, str]) -> None:
        self.address = address  # host:port
        self.headers = headers  # that it wants to see


class _Http:
    """Makes requests. Threads share it."""

    def __init__(
            self,
            ca_bundle: Optional[str] = None,
            direct: bool = False,
            timeout: float = _TIMEOUT,
    ) -> None:
        """direct: without any proxy. timeout: seconds of silence."""
        import threading
        self.ca_bundle = ca_bundle
        self.direct = direct
        self.timeout = timeout
        self.idle: Dict[Tuple[str, str], List[Any]] = collections.defaultdict(list)  # connections by scheme and host
        self.busy: Set[Any] = set()  # connections that are in use
        self.closed = threading.Event()
        self.tries = _TRIES + _MORE_TRIES  # of any request, at most
        self.answered: Set[str] = set()  # sites that have answered
        self.tls: Any = None

    def close(self) -> None:
        """Close all connections. Requests that threads wait for fail at once, and so do later ones."""
        import socket
        self.closed.set()
        for connection in list(self.busy):
            # Not SSLSocket.shutdown(), after which a thread could go on sending without encryption.
            with contextlib.suppress(OSError, TypeError):
                socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
        for connection in [connection for idle in self.idle.values() for connection in idle]:
            connection.close()

    @contextlib.contextmanager
    def briefly(self, in_haste: bool = False) -> Iterator[None]:
        """For requests that are not worth a long wait, even after close(): two tries of each, in haste short ones."""
        import threading
        before = self.tries, self.timeout
        self.tries = 2
        if self.closed.is_set():
            self.closed = threading.Event()
        if in_haste:
            self.idle.clear()  # as they have their own time-outs
            self.timeout = min(self.timeout, _LAST_TIMEOUT)
        try:
            yield
        finally:
            self.tries, self.timeout = before

    def request(
            self,
            request: _Request,
            sign: Optional[_Signer] = None,
            limit: int = _REPLY_LIMIT,
            tries: Optional[int] = None,
            into: Optional[Any] = None,
    ) -> _Reply:
        """Make a request, retrying while that may help. Raises RemoteError if there is no answer.

        sign: gives the headers to send, anew for each try. limit: bytes that the answer may have.
        into: a file that takes the body of an answer with status 200, of any size.
        """
        import http.client
        if not _is_address(request.url):
            raise RemoteError('a URL from the settings, the credentials or a server does not have the form '
                              'https://host[:port][/path]; a user or password cannot be in it')
        site = _site(request.url)
        request = request._replace(unwanted=self.closed)
        for attempt in itertools.count(1):
            is_last = attempt >= min(self.tries, tries or _TRIES + _MORE_TRIES * (site in self.answered))
            is_eager = attempt == 1 and request.method in ('GET', 'HEAD')
            request = request._replace(patience=min(self.timeout, _READ_TIMEOUT if is_eager else _TIMEOUT))
            signed = request._replace(headers=sign(request)) if sign else request
            delay = 0.0
            try:
                with _interrupts.allow():
                    reply = self._try(signed, limit, into)
                self.answered.add(site)
                if reply.status not in _TRANSIENT or is_last:
                    return reply
                delay = reply.requested_delay()
                problem: object = reply.status
            except UnicodeError:  # of the codec idna
                raise ConfigError(f'{site} or the proxy for it has an invalid host name',
                                  'check the url, the endpoint_url and the proxy') from None
            except (OSError, http.client.HTTPException) as e:
                if is_last or request.unwanted.is_set() or 'CERTIFICATE_VERIFY_FAILED' in str(e):
                    raise _unreachable_error(request.url, e) from None
                problem = e
            _say(f'{request.method} {site}: {problem}; trying again', _DEBUG)
            self.wait(attempt, min(delay, self.timeout))
        raise AssertionError

    def wait(self, failures: int, delay: float = 0.0) -> None:
        """Sleep before another try, and so many seconds longer, but not after close()."""
        left = _backoff(failures) + delay
        while left > 0 and not self.closed.is_set():
            time.sleep(min(left, _TICK))
            _interrupts.check()
            left -= _TICK

    def _try(self, request: _Request, limit: int, into: Optional[Any]) -> _Reply:
        import http.client
        scheme, netloc, path, query, _ = urlsplit(request.url)
        target = (path or '/') + ('?' + query if query else '')
        headers = _complete_headers(request)
        proxy = self._find_proxy(scheme, netloc)
        if proxy and scheme == 'http':  # a plain request to a proxy names the whole URL
            target = request.url
            headers.update(proxy.headers)
        if request.unwanted.is_set():
            raise http.client.HTTPException('interrupted')
        connection, is_kept = self._connection(scheme, netloc, proxy)
        self.busy.add(connection)
        is_reusable = False
        try:
            response = self._ask(connection, is_kept, request._replace(url=target, headers=headers))
            with contextlib.closing(response):  # or it would keep the socket open
                body = _receive(response, limit, into, request.watch)
                is_reusable = response.isclosed() and not response.will_close
            if len(body) > limit:
                raise RemoteError(f'{_site(request.url)} answers with more than was asked for',
                                  'a proxy or the endpoint_url is at fault', response.status)
            return _Reply(response.status, response.headers, body)
        finally:
            self.busy.discard(connection)
            if is_reusable and not request.unwanted.is_set():
                self.idle[scheme, netloc].append(connection)
            else:
                connection.close()

    def _find_proxy(self, scheme: str, netloc: str) -> Optional[_Proxy]:
        import urllib.request
        url = None if self.direct else urllib.request.getproxies().get(scheme)
        if not url or urllib.request.proxy_bypass(netloc):
            return None
        return _parse_proxy(url, scheme)

    def _connection(self, scheme: str, netloc: str, proxy: Optional[_Proxy]) -> Tuple[Any, bool]:
        """A connection, and whether it has been used before."""
        import http.client
        with contextlib.suppress(IndexError):
            return self.idle[scheme, netloc].pop(), True
        address = proxy.address if proxy else netloc
        patience = min(self.timeout, _CONNECT)
        connection: Any
        if scheme == 'https':
            if self.tls is None:
                self.tls = _tls(self.ca_bundle)
            connection = http.client.HTTPSConnection(address, timeout=patience, context=self.tls)
            if proxy:
                connection.set_tunnel(netloc, headers=proxy.headers)
        else:
            connection = http.client.HTTPConnection(address, timeout=patience)
        connection.auto_open = 0  # only _send() connects
        connection.response_class = _final_response()
        return connection, False

    def _ask(self, connection: Any, is_kept: bool, request: _Request) -> Any:
        """Send a request, and return the response, whose body is still to be read."""
        import http.client
        try:
            return self._send(connection, request)
        except (ConnectionError, http.client.BadStatusLine):
            if not is_kept or request.unwanted.is_set():
                raise
            connection.close()  # the server had closed the kept connection meanwhile
            return self._send(connection, request)

    def _send(self, connection: Any, request: _Request) -> Any:
        import http.client
        import socket
        if not connection.sock:
            connection.connect()
            if _NOTSENT_LOWAT:
                with contextlib.suppress(OSError):
                    connection.sock.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, 2 * _SLICE)
        connection.sock.settimeout(request.patience)
        if request.unwanted.is_set():  # close() may have looked before the socket was there
            raise http.client.HTTPException('interrupted')
        body = request.slices() if request.body else None
        # A server may answer, and close the connection, before it has read the whole request.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(request.method, request.url, body, request.headers)
        return connection.getresponse()


def _complete_headers(request: _Request) -> Dict[str, str]:
    """The headers of a request, with those that all requests have."""
    headers = {'Accept-Encoding': 'identity'}
    headers.update(request.headers)
    if request.body or request.method in ('PUT', 'POST'):
        headers['Content-Length'] = str(sum(map(len, request.body)))
    for name, value in headers.items():
        if not re.match(r'[!-9;-~]+: [\t -~\x80-\xff]*\Z', f'{name}: {value}'):
            raise ConfigError(f'a header for {_site(request.url)}, such as a token or project, contains invalid '
                              'characters', 'check the credentials')
    return headers


def _receive(response: Any, limit: int, into: Optional[Any], watch: Optional[_Watch]) -> Any:
    """The body of a response; more bytes than `limit` if it is too long."""
    if into and response.status == 200:
        _save(response, into)
        return b''
    is_bounded = response.length is not None and response.length <= limit
    if not is_bounded:
        return response.read(limit + 1)
    if response.length and 'Content-Range' in response.headers:
        return _receive_range(response, watch)
    return response.read()


def _receive_range(response: Any, watch: Optional[_Watch]) -> bytearray:
    """The body of a range; only its start, if some of it has come when the connection breaks or `watch` says so."""
    import http.client
    data = bytearray(response.length)
    received = 0
    size = _SLICE
    try:
        while received < len(data):
            begin = time.monotonic()
            count = response.readinto(memoryview(data)[received:received + size])
            if not count:
                raise http.client.IncompleteRead(b'', len(data) - received)
            received += count
            size = _next_slice(size, time.monotonic() - begin)
            if watch and watch(received):
                break
    except (OSError, http.client.HTTPException):
        if received < _SLICE:
            raise
    return data if received == len(data) else data[:received]


def _save(response: Any, file: Any) -> None:
    """Write the body of a response to a file."""
    import http.client
    file.seek(0)
    file.truncate()
    for data in iter(lambda: response.read(1 << 20), b''):
        try:
            file.write(data)
        except OSError as e:
            raise Error(f'cannot keep a download in a temporary file: {e.strerror}',
                        'set $TMPDIR to a directory with more room') from None
    if response.length:
        raise http.client.IncompleteRead(b'', response.length)


def _unreachable_error(url: str, e: Exception) -> RemoteError:
    if 'CERTIFICATE_VERIFY_FAILED' in str(e):
        reason = getattr(e, 'verify_message', '')  # from Python 3.7 on
        detail = f' ({reason})' if reason else ''
        return RemoteError(f'{_site(url)} presented a certificate that is not trusted{detail}',
                           "if a private CA signed it, set 'ca_bundle' to the file with its certificate")
    reason = getattr(e, 'strerror', None) or e or type(e).__name__
    return RemoteError(f'cannot reach {_site(url)}: {reason}', 'check the network, the proxy settings and the URL')


def _parse_proxy(url: str, scheme: str) -> _Proxy:
    """The proxy that a variable or the system names for `scheme`."""
    import urllib.request
    pattern = r'(?:([^/?#@]*)://)?(?:(.*)@)?([^/?#@:\[\]\s]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?(?:[/?#].*)?\Z'
    match = re.match(pattern, url.strip(), re.ASCII)
    kind, user, host, port = match.groups() if match else ('none', None, '', None)
    if kind == 'https' and os.name == 'nt' and not urllib.request.getproxies_environment():
        kind = 'http'  # up to Python 3.9 those of the registry are called so: https://bugs.python.org/issue42627
    if (kind or 'http').lower() != 'http' or int(port or 0) > 65535:
        raise ConfigError(f'{scheme}_proxy is not of the form http://[user:password@]host[:port], and etcetera speaks '
                          'neither SOCKS nor TLS to a proxy', 'change it, or exempt this host with no_proxy')
    headers = {}
    if user:
        name, _, password = user.partition(':')
        credentials = f'{unquote(name)}:{unquote(password)}'.encode('utf-8', 'surrogateescape')
        headers['Proxy-Authorization'] = 'Basic ' + _base64(credentials)
    return _Proxy(f'{host}:{port or 80}', headers)


@functools.lru_cache(maxsize=None)
def _final_response() -> Any:
    """A class of responses that skips all interim ones (RFC 9110, 15.2); http.client itself skips only 100."""
    import http.client

    class FinalResponse(http.client.HTTPResponse):
        def begin(self) -> None:
            super().begin()
            for _ in range(_INTERIM):
                if not 101 < self.status < 200:
                    return
                self.headers = None  # type: ignore[assignment]  # so that begin() reads the next one
                super().begin()
            raise http.client.HTTPException(f'more than {_INTERIM} interim answers')

    return FinalResponse


def _backoff(failures: int) -> float:
    """Seconds to wait before another try: about 0.4, 0.9, 1.8, 3.5, 7, 7, ..."""
    import random
    return random.uniform(0.75, 1) * min(8.0, 0.25 * 2.0 ** failures)


def _tls(ca_bundle: Optional[str]) -> Any:
    try:
        import ssl
    except ImportError:
        raise ConfigError('this Python has no ssl module, so it cannot use https://',
                          'use another Python, or a url that needs none') from None
    try:
        context = ssl.create_default_context(cafile=ca_bundle and _expanduser(ca_bundle))
    except OSError as e:
        raise ConfigError(f'cannot use the CA bundle: {e.strerror or e}',
                          'check ca_bundle and $AWS_CA_BUNDLE') from None
    if ca_bundle:  # many private CAs leave out extensions that Python 3.13 and later demand
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _is_address(url: str) -> bool:
    """Whether a request can be sent there."""
    from ipaddress import ip_address
    if not re.match(_SITE + r'(?:[/?][!-~]*)?\Z', url, re.ASCII):
        return False
    try:
        parts = urlsplit(url)
        if '[' in parts.netloc:
            ip_address(parts.hostname or '')  # urlsplit() checks it only from Python 3.11 on
        return parts.port != 0
    except ValueError:  # brackets around what is no IPv6 address, or a port beyond 65535
        return False


def _site(url: str) -> str:
    """What may be shown of the address of a request, whose path and query may hold keys."""
    scheme, netloc = urlsplit(url)[:2]
    return f'{scheme}://{netloc}'


def _check_endpoint(url: str) -> str:
    if url and not re.match(_SITE + r'(?:/[^?#\s]*)?\Z', url, re.ASCII):
        raise ConfigError('the endpoint_url must look like https://host[:port]', 'check it where it is set: in the '
                          'settings, the AWS profile or a variable such as $AWS_ENDPOINT_URL')
    return url.rstrip('/')


def _quote(text: str, safe: str = '') -> str:
    """Percent-encode all but A-Z a-z 0-9 - . _ ~ and what is safe, as Signature Version 4 and Google want it."""
    return quote(text, safe=safe + '~')


def _base64(data: bytes) -> str:
    from base64 import b64encode
    return b64encode(data).decode()


def _query(pairs: Iterable[Tuple[str, str]]) -> str:
    return '&'.join(f'{_quote(key)}={_quote(value)}' for key, value in pairs)


def _read_token(path: str, source: str) -> str:
    """A token from a file that `source` names."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, 'strerror', 'not text')
        raise ConfigError(f'cannot read the file with a token that {source} names: {reason}',
                          'check the path and who may read it') from None


def _xml(body: bytes) -> Any:
    """The root element, without namespaces. Raises ValueError for anything else, and for entities, which could grow.

    White space may precede it: S3 sends some to keep a connection open while it works.
    """
    from xml.etree import ElementTree
    if b'<!' in body.replace(b'<![CDATA[', b''):
        raise ValueError('XML with declarations')
    try:
        root = ElementTree.fromstring(body.strip())
    except (ElementTree.ParseError, LookupError, RecursionError) as e:  # LookupError: an unknown encoding
        raise ValueError(str(e)) from None
    for element in root.iter():
        element.tag = element.tag.rpartition('}')[2]
    return root


def _http_time(text: str) -> float:
    """Unix time of a date in a header; 0 if it is none."""
    from email.utils import parsedate_to_datetime
    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError, OSError):  # OSError: on Windows, before 1970
        return 0.0


def _iso_time(text: str) -> float:
    """Unix time of an ISO 8601 time, which is UTC unless it has an offset; 0 if it is none."""
    from calendar import timegm
    offset = re.match(r'[.0-9]*([+-])(\d\d):?(\d\d)\Z', text[19:])
    minutes = 0
    if offset:
        sign, hours, rest = offset.groups()
        minutes = int(sign + hours) * 60 + int(sign + rest)
    try:
        return float(timegm(time.strptime(text[:19], '%Y-%m-%dT%H:%M:%S'))) - 60 * minutes
    except ValueError:
        return 0.0


def _utc(seconds: float, form: str = '%Y-%m-%dT%H:%M:%SZ') -> str:
    """A unix time as text; '' beyond the year 9999. time.gmtime() ends in 2038 on some 32-bit systems."""
    from datetime import datetime, timedelta
    try:
        return (datetime(1970, 1, 1) + timedelta(seconds=seconds)).strftime(form)
    except OverflowError:
        return ''


class _Renewed:
    """Something that must be fetched anew before it expires. Threads share it."""

    def __init__(self, fetch: Callable[[], Tuple[Any, float]]) -> None:
        """fetch: gives the thing, or None if there is none, and the unix time at which it expires."""
        import threading
        self.fetch = fetch
        self.lock = threading.Lock()
        self.value: Any = None
        self.expires = 0.0

    def get(self) -> Any:
        with self.lock:
            if time.time() > self.expires - 120:
                self.value, self.expires = self.fetch()
            return self.value

    def renew(self, used: Any) -> None:
        """Fetch it anew next time, unless `used`, which was refused, has already been replaced."""
        with self.lock:
            if used == self.value:
                self.expires = 0


# ---------------------------------------------------------------------------------------
# AWS
#
# Finds credentials in the order of the AWS SDKs, and signs requests:
# https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html
# ---------------------------------------------------------------------------------------

_AWS_KEYS = ('aws_access_key_id', 'aws_secret_access_key', 'aws_session_token')
_AWS_CLOCK_ERRORS = ('RequestTimeTooSkewed', 'RequestExpired', 'RequestInTheFuture', 'SignatureDoesNotMatch')
_AWS_REGION = r'[A-Za-z0-9_.-]{1,32}\Z'  # other stores have names of their own
_AWS_SUFFIXES = {'cn': 'amazonaws.com.cn', 'eusc-de': 'amazonaws.eu', 'us-iso': 'c2s.ic.gov',
                 'us-isob': 'sc2s.sgov.gov', 'us-isof': 'csp.hci.ic.gov', 'eu-isoe': 'cloud.adc-e.uk'}
# that may be asked by http; any https host and any loopback address will do, too
_AWS_CONTAINER_HOSTS = ('169.254.170.2', '169.254.170.23', 'fd00:ec2::23', 'localhost')
_TOKEN_LIMIT = 1 << 20  # bytes of an answer that holds credentials


class _AwsKeys(NamedTuple):
    access_key: str
    secret_key: str
    token: Optional[str] = None
    expires: float = 1e12  # unix time
    source: str = ''  # where they were found, for people


class _AwsProfile:
    """A profile of ~/.aws/config and ~/.aws/credentials, and what the environment says instead."""

    def __init__(self, config: Config) -> None:
        self.is_explicit = bool(config.aws_profile)  # then it precedes the environment's keys
        self.name = (config.aws_profile or os.environ.get('AWS_PROFILE') or os.environ.get('AWS_DEFAULT_PROFILE')
                     or 'default')
        self.reload()
        self.values = self.section(self.name, 'aws_profile or $AWS_PROFILE')
        self.region = _check_region(
            config.region or os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION')
            or self.values.get('region') or 'us-east-1')
        self.ca_bundle = config.ca_bundle or os.environ.get('AWS_CA_BUNDLE') or self.values.get('ca_bundle')

    def reload(self) -> None:
        """Read the files, which other tools may have changed meanwhile."""
        self.sections = _aws_sections()

    def section(self, name: str, source: str) -> Dict[str, str]:
        """The settings of a profile that `source` names."""
        section = self.sections.get(('profile', name))
        if section is None and name != 'default':
            raise ConfigError(f'the AWS profile that {source} names is not in ~/.aws/config or ~/.aws/credentials',
                              'check both')
        return section or {}

    def flag(self, key: str) -> bool:
        return (os.environ.get('AWS_' + key.upper()) or self.values.get(key) or '').lower() == 'true'

    def endpoint(self, service: str) -> str:
        """The address that is set for a service instead of its own, or ''."""
        if self.flag('ignore_configured_endpoint_urls'):
            return ''
        services = self.sections.get(('services', self.values.get('services', '')), {})
        return _check_endpoint(
            os.environ.get('AWS_ENDPOINT_URL_' + service.upper()) or os.environ.get('AWS_ENDPOINT_URL')
            or _aws_nested(services, service, 'endpoint_url') or self.values.get('endpoint_url') or '')

    def host(self, service: str, region: str) -> str:
        """A service's own address: https://docs.aws.amazon.com/general/latest/gr/rande.html"""
        _check_region(region)
        if self.flag('use_fips_endpoint') and (service == 's3' or not region.startswith('us-gov-')):
            service += '-fips'
        if self.flag('use_dualstack_endpoint') and service in ('s3', 's3-fips'):
            service += '.dualstack'
        partition = region.rsplit('-', 2)[0]
        return f"https://{service}.{region}.{_AWS_SUFFIXES.get(partition, 'amazonaws.com')}"


class _AwsCredentials:
    """Keys to sign requests with. They are kept until they expire."""

    def __init__(self, config: Config, profile: _AwsProfile, http: _Http) -> None:
        self.config = config
        self.profile = profile
        self.http = http
        self.skew = 0.0  # seconds by which the services' clock is ahead of ours
        self.library: Any = None  # botocore's credentials
        self.current = _Renewed(self.find)

    def keys(self) -> Optional[_AwsKeys]:
        """The keys to sign with now; None means unsigned requests."""
        return self.current.get()  # type: ignore[no-any-return]

    def renew(self, keys: Optional[_AwsKeys]) -> None:
        """Look for new keys; these were refused."""
        self.current.renew(keys)

    def learn_clock(self, reply: _Reply, code: str) -> None:
        """Go by the server's clock if it refuses a signature and the two clocks differ much."""
        if code not in _AWS_CLOCK_ERRORS or 'Date' not in reply.headers:
            return
        ahead = _http_time(reply.headers['Date']) - time.time()
        if 300 < abs(ahead - self.skew) < 1e9:
            self.skew = ahead
            _say(f"this machine's clock is {abs(ahead) / 60:.0f} minutes off; using the server's", _WARNING)

    def signer(self, keys: Optional[_AwsKeys], service: str, region: str, digest: str) -> _Signer:
        """Signs, by the clock as it is known now, requests whose body has this SHA-256."""
        skew = self.skew

        def sign(request: _Request) -> Dict[str, str]:
            if not keys:
                return dict(request.headers)
            return _aws_sign(request, digest, keys, f'{region}/{service}', time.time() + skew)
        return sign

    def find(self) -> Tuple[Optional[_AwsKeys], float]:
        """From the settings, else the environment, the profile, the container, or the machine; and when they expire."""
        self.profile.reload()
        keys = _aws_static(vars(self.config), 'the settings')
        if not keys and not self.profile.is_explicit:
            keys = self.from_environment()
        keys = keys or self.from_profile(self.profile.name) or self.from_container() or self.from_instance()
        if not keys:
            return None, 1e12
        # Some services give out the same keys until shortly before they expire, and our clock may be wrong.
        return keys, max(keys.expires, time.time() + 300)

    def from_environment(self) -> Optional[_AwsKeys]:
        return _aws_static({key: os.environ.get(key.upper()) for key in _AWS_KEYS}, 'the environment')

    def from_profile(self, name: str, users: Tuple[str, ...] = ()) -> Optional[_AwsKeys]:
        """The first of: a role, a web identity, SSO, `aws login`, a credential_process, keys.

        users: the profiles whose roles are assumed with the keys of this one.
        """
        values = self.profile.section(name, f"the source_profile of '{''.join(users[-1:])}'")
        own = _aws_static(values, f"the AWS profile '{name}'")
        if 'role_arn' in values and 'web_identity_token_file' not in values and not (users and own):
            return self.from_role(name, values, users)
        web_identity = dict(values)
        if not users and not self.profile.is_explicit:
            for key in ('web_identity_token_file', 'role_arn', 'role_session_name'):
                web_identity[key] = os.environ.get('AWS_' + key.upper()) or values.get(key) or ''
        if web_identity.get('web_identity_token_file'):
            return self.from_web_identity(web_identity)
        if 'sso_account_id' in values or 'sso_role_name' in values:
            return self.from_sso(name, values)
        if 'login_session' in values:
            return self.from_botocore(name, 'aws login --profile ' + name)
        if 'credential_process' in values:
            return self.from_process(name, values['credential_process'])
        return own

    def from_web_identity(self, values: Dict[str, str]) -> _AwsKeys:
        """https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html"""
        token = _read_token(values['web_identity_token_file'],
                            'web_identity_token_file or $AWS_WEB_IDENTITY_TOKEN_FILE')
        return self.from_sts('web identity', 'AssumeRoleWithWebIdentity', None, {
            'RoleArn': values.get('role_arn'), 'RoleSessionName': values.get('role_session_name'),
            'WebIdentityToken': token})

    def from_role(self, name: str, values: Dict[str, str], users: Tuple[str, ...]) -> _AwsKeys:
        """https://docs.aws.amazon.com/sdkref/latest/guide/feature-assume-role-credentials.html"""
        if 'mfa_serial' in values:
            command = f'eval "$(aws configure export-credentials --profile {name} --format env)"'
            return self.from_botocore(name, command)
        source = values.get('source_profile')
        kind = values.get('credential_source')
        kinds = {'Environment': self.from_environment, 'EcsContainer': self.from_container,
                 'Ec2InstanceMetadata': self.from_instance}
        if bool(source) == bool(kind) or kind and kind not in kinds or source in users:
            raise ConfigError(f"the AWS profile '{name}' needs, besides role_arn, either a source_profile that does "
                              f"not lead back to it, or a credential_source of {', '.join(sorted(kinds))}")
        keys = self.from_profile(source, users + (name,)) if source else kinds[str(kind)]()
        if not keys:
            raise ConfigError(f"the AWS profile '{name}' finds no credentials in {source or kind}")
        return self.from_sts(f"the AWS profile '{name}'", 'AssumeRole', keys, {
            'RoleArn': values['role_arn'], 'RoleSessionName': values.get('role_session_name'),
            'ExternalId': values.get('external_id'), 'DurationSeconds': values.get('duration_seconds')})

    def from_sts(
            self,
            source: str,
            action: str,
            keys: Optional[_AwsKeys],
            form: Dict[str, Optional[str]],
    ) -> _AwsKeys:
        """https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html"""
        role = form['RoleArn'] or ''
        if not role.startswith('arn:'):
            raise ConfigError(f'{source} is configured without a role', "set role_arn or $AWS_ROLE_ARN to 'arn:...'")
        form = dict(form, Action=action, Version='2011-06-15',
                    RoleSessionName=form['RoleSessionName'] or f'etcetera-{time.time():.0f}')
        body = urlencode({key: value for key, value in form.items() if value}).encode()
        url = (self.profile.endpoint('sts') or self.profile.host('sts', self.profile.region)) + '/'
        headers = {'Content-Type': 'application/x-www-form-urlencoded; charset=utf-8'}
        for _ in range(2):
            skew = self.skew
            sign = self.signer(keys, 'sts', self.profile.region, _sha256(body).hexdigest())
            reply = self.http.request(_Request('POST', url, headers, [body]), sign, _TOKEN_LIMIT)
            code, message, _ = _aws_error(reply)
            self.learn_clock(reply, code)
            if self.skew == skew:  # otherwise another try may help
                break
        if reply.status != 200:
            raise RemoteError(f'{source}: AWS STS answers {_status(reply, code, message)}',
                              f'check the role_arn {_printable(role)} and who may assume it', reply.status)
        try:
            credentials = {item.tag: item.text for part in _xml(reply.page()).iter('Credentials') for item in part}
        except ValueError:
            credentials = {}
        return _aws_temporary(credentials, source)

    def from_sso(self, name: str, values: Dict[str, str]) -> _AwsKeys:
        """https://docs.aws.amazon.com/singlesignon/latest/PortalAPIReference/API_GetRoleCredentials.html"""
        source = f"the AWS profile '{name}'"
        session = values.get('sso_session')
        values = dict(values, **self.profile.sections.get(('sso-session', session or ''), {}))
        needed = ('sso_start_url', 'sso_region', 'sso_account_id', 'sso_role_name')
        missing = ' and '.join(key for key in needed if key not in values)
        if missing:
            raise ConfigError(f'{source} lacks {missing}', f'run: aws configure sso --profile {name}')
        logged_out = ConfigError(f'{source} has no SSO login, or it has expired',
                                 f'run: aws sso login --profile {name}')
        region = values['sso_region']
        try:
            token = self.sso_token(session or values['sso_start_url'], region, renew=bool(session))
            headers = {'x-amz-sso_bearer_token': str(token['accessToken'])}
            if _iso_time(token['expiresAt']) < time.time():
                raise logged_out
        except (OSError, ValueError, KeyError, TypeError):
            raise logged_out from None
        site = self.profile.endpoint('sso') or self.profile.host('portal.sso', region)
        query = _query([('role_name', values['sso_role_name']), ('account_id', values['sso_account_id'])])
        reply = self.http.request(_Request('GET', f'{site}/federation/credentials?{query}', headers),
                                  limit=_TOKEN_LIMIT)
        if reply.status == 401:
            raise logged_out
        return _aws_temporary(reply.json().get('roleCredentials'), source, reply)

    def sso_token(self, session: str, region: str, renew: bool) -> Dict[str, Any]:
        """The access token in the cache of AWS's tools, renewed if it expires soon. Raises OSError and ValueError."""
        import hashlib
        file_name = hashlib.sha1(session.encode()).hexdigest() + '.json'
        path = os.path.join(_expanduser('~'), '.aws', 'sso', 'cache', file_name)
        with open(path, 'rb') as file:
            token: Dict[str, Any] = json.loads(file.read().decode('utf-8-sig'))
        if renew and 'refreshToken' in token and _iso_time(token['expiresAt']) < time.time() + 300:
            return self.renew_sso_token(token, path, region) or token
        return token

    def renew_sso_token(
            self,
            token: Dict[str, Any],
            path: str,
            region: str,
    ) -> Optional[Dict[str, Any]]:
        """A new access token, kept where AWS's tools keep it; None if only a new login gives one.

        https://docs.aws.amazon.com/singlesignon/latest/OIDCAPIReference/API_CreateToken.html
        """
        if _iso_time(token.get('registrationExpiresAt') or '') < time.time():
            return None
        form = {'grantType': 'refresh_token', 'clientId': token['clientId'], 'clientSecret': token['clientSecret'],
                'refreshToken': token['refreshToken']}
        site = self.profile.endpoint('sso_oidc') or self.profile.host('oidc', region)
        reply = self.http.request(_Request('POST', site + '/token', {'Content-Type': 'application/json'},
                                           [json.dumps(form).encode()]), limit=_TOKEN_LIMIT)
        answer = reply.json()
        if reply.status != 200 or 'accessToken' not in answer:
            return None
        expires = _utc(time.time() + float(answer.get('expiresIn') or 0))
        token = dict(token, accessToken=answer['accessToken'], expiresAt=expires,
                     refreshToken=answer.get('refreshToken') or token['refreshToken'])
        new = f'{path}.{os.urandom(8).hex()}'
        with contextlib.suppress(OSError):
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as file:
                json.dump(token, file)
            os.replace(new, path)
        return token

    def from_process(self, name: str, command: str) -> _AwsKeys:
        """https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html"""
        import shlex
        import subprocess
        source = f"the credential_process of the AWS profile '{name}'"
        try:
            done = subprocess.run(command if os.name == 'nt' else shlex.split(command), stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
        except (OSError, ValueError) as e:
            raise ConfigError(f"{source} cannot be run: {getattr(e, 'strerror', None) or e}") from None
        if done.returncode:
            reason = _printable(done.stderr.decode('utf-8', 'replace').strip())[-300:] or 'no explanation'
            raise ConfigError(f'{source} fails ({done.returncode}): {reason}')
        try:
            answer = json.loads(done.stdout.decode('utf-8-sig'))
        except ValueError:
            answer = None
        is_known = isinstance(answer, dict) and answer.get('Version') == 1
        return _aws_temporary(answer if is_known else None, source)

    def from_container(self) -> Optional[_AwsKeys]:
        """https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html"""
        relative = os.environ.get('AWS_CONTAINER_CREDENTIALS_RELATIVE_URI')
        url = 'http://169.254.170.2' + relative if relative else os.environ.get('AWS_CONTAINER_CREDENTIALS_FULL_URI')
        if not url:
            return None
        if not _is_trusted_container(url):
            if relative:
                raise ConfigError('$AWS_CONTAINER_CREDENTIALS_RELATIVE_URI must be a path that begins with /')
            raise ConfigError('$AWS_CONTAINER_CREDENTIALS_FULL_URI must begin with https://, or with http:// and a '
                              'loopback address or one of ' + ', '.join(_AWS_CONTAINER_HOSTS))
        variable = 'AWS_CONTAINER_AUTHORIZATION_TOKEN'
        path = os.environ.get(variable + '_FILE')
        token = _read_token(path, f'${variable}_FILE') if path else os.environ.get(variable)
        if token and not re.match(r'[ -~]+\Z', token):
            raise ConfigError(f'${variable} holds characters that it cannot have')
        headers = {'Authorization': token} if token else {}
        with contextlib.closing(_Http(self.http.ca_bundle, direct=True, timeout=2)) as http:
            reply = http.request(_Request('GET', url, headers), limit=_TOKEN_LIMIT, tries=3)
        return _aws_temporary(reply.json(), "the container's credentials service", reply)

    def from_instance(self) -> Optional[_AwsKeys]:
        """Instance metadata, version 2:

        https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
        """
        if self.profile.flag('ec2_metadata_disabled'):
            return None
        is_ipv6 = os.environ.get('AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE', '').lower() == 'ipv6'
        site = _check_endpoint(
            os.environ.get('AWS_EC2_METADATA_SERVICE_ENDPOINT')
            or self.profile.values.get('ec2_metadata_service_endpoint')
            or ('http://[fd00:ec2::254]' if is_ipv6 else 'http://169.254.169.254'))
        try:
            with contextlib.closing(_Http(self.http.ca_bundle, direct=True, timeout=1)) as http:
                return _ask_instance(http, site + '/latest/')
        except RemoteError as e:
            _say(f'no instance metadata: {e}', _DEBUG)
            return None

    def from_botocore(self, name: str, command: str) -> _AwsKeys:
        """Keys that need a prompt, or more than the standard library: from botocore, if it is installed."""
        from importlib import import_module  # so that no type checker looks for it
        source = f"the AWS profile '{name}'"
        try:
            session_module = import_module('botocore.session')
            utils = import_module('botocore.utils')
        except ImportError:
            raise ConfigError(f'{source} needs more than the standard library',
                              f'run: pip install boto3, or: {command}') from None
        try:
            if self.library is None:
                session = session_module.Session(profile=name)
                cache = utils.JSONFileCache(_expanduser('~/.aws/cli/cache'))  # so that it asks once an hour
                session.get_component('credential_provider').get_provider('assume-role').cache = cache
                self.library = session.get_credentials()
            keys = self.library.get_frozen_credentials()
        except Exception as e:  # it lets out AttributeErrors and the like, too
            raise ConfigError(f'{source} cannot be used: {_printable(str(e) or type(e).__name__)}',
                              f'try: {command}') from None
        return _AwsKeys(keys.access_key, keys.secret_key, keys.token, time.time() + 600, source)


def _check_region(region: str) -> str:
    if not re.match(_AWS_REGION, region):
        raise ConfigError('the region is not valid', "check 'region', $AWS_REGION and the AWS profile")
    return region


def _aws_sections() -> Dict[Tuple[str, str], Dict[str, str]]:
    """The sections of ~/.aws/config and ~/.aws/credentials by kind and name. Keys in the latter take precedence."""
    sections: Dict[Tuple[str, str], Dict[str, str]] = {}
    for name, values in _read_ini('AWS_CONFIG_FILE', '~/.aws/config').items():
        kind, _, rest = name.partition(' ')
        place = ('profile', name) if name == 'default' else (kind, rest.strip(' \t"\''))
        sections.setdefault(place, {}).update(values)
    for name, values in _read_ini('AWS_SHARED_CREDENTIALS_FILE', '~/.aws/credentials').items():
        section = sections.setdefault(('profile', name.strip(' \t"\'')), {})
        section.update(values)
        if 'aws_access_key_id' in values:  # nothing in the other file may be mixed with these keys
            for lesser in {'aws_session_token'} - set(values) | {'credential_process', 'login_session'}:
                section.pop(lesser, None)
    return sections


def _read_ini(variable: str, default: str) -> Dict[str, Dict[str, str]]:
    """The sections of one of AWS's files; {} if it cannot be read."""
    import configparser
    path = _expanduser(os.path.expandvars(os.environ.get(variable) or default))  # as botocore does
    parser = configparser.RawConfigParser(strict=False)
    try:
        with open(path, encoding='utf-8-sig') as file:
            parser.read_file(file)
    except OSError:
        return {}
    except (configparser.Error, UnicodeDecodeError):
        raise ConfigError(f'{path} cannot be read as an AWS settings file', 'repair it') from None
    return {section: {key: value.strip() for key, value in parser.items(section)} for section in parser.sections()}


def _aws_nested(section: Dict[str, str], name: str, key: str) -> str:
    """The value of `key` among the indented lines below `name`, or ''."""
    match = re.search(r'^\s*%s\s*=\s*(\S+)' % key, section.get(name, ''), re.MULTILINE)
    return match.group(1) if match else ''


def _aws_static(values: Mapping[str, Any], source: str) -> Optional[_AwsKeys]:
    """The keys that are among these values, if there are any."""
    access_key, secret_key, token = [(values.get(key) or '').strip() for key in _AWS_KEYS]
    if bool(access_key) != bool(secret_key):
        raise ConfigError(f'{source}: aws_access_key_id and aws_secret_access_key go together', 'set both')
    for key, value in zip(_AWS_KEYS, (access_key, secret_key, token)):
        if not re.match(r'[!-~]*\Z', value):
            raise ConfigError(f'{source}: {key} holds characters that it cannot have', 'copy it again')
    return _AwsKeys(access_key, secret_key, token or None, source=source) if access_key else None


def _aws_temporary(answer: Any, source: str, reply: Optional[_Reply] = None) -> _AwsKeys:
    """Keys as STS, SSO, a process or a metadata service gives them, which call them by slightly different names."""
    if reply and reply.status != 200:
        message = reply.json().get('message') or reply.json().get('Message') or ''
        raise RemoteError(f"{source} answers {_status(reply, '', str(message))}", 'check what it may do', reply.status)
    values = {key[:1].upper() + key[1:]: value for key, value in answer.items()} if isinstance(answer, dict) else {}
    access_key = values.get('AccessKeyId')
    secret_key = values.get('SecretAccessKey')
    token = values.get('SessionToken') or values.get('Token') or ''
    for key in (access_key, secret_key, token or '-'):
        if not isinstance(key, str) or not re.match(r'[!-~]+\Z', key):
            raise RemoteError(f'{source} returned no usable credentials')
    expiration = values.get('Expiration')
    expires = 1e12
    if isinstance(expiration, str):
        expires = _iso_time(expiration)
    elif isinstance(expiration, (int, float)):
        expires = expiration / 1000  # SSO gives milliseconds
    return _AwsKeys(str(access_key), str(secret_key), token or None, expires, source)


def _is_trusted_container(url: str) -> bool:
    """Whether a container's credentials may be asked for there."""
    from ipaddress import ip_address
    try:
        parts = urlsplit(url)
        host = parts.hostname or ''
        if parts.scheme != 'http' or host in _AWS_CONTAINER_HOSTS:
            return parts.scheme in ('http', 'https')
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _ask_instance(http: _Http, site: str) -> Optional[_AwsKeys]:
    """The keys of the machine's role; None if it has none."""
    def ask(method: str, path: str, headers: Dict[str, str]) -> Optional[_Reply]:
        reply = http.request(_Request(method, site + path, headers), limit=65536, tries=1)
        return reply if reply.status == 200 else None

    reply = ask('PUT', 'api/token', {'X-aws-ec2-metadata-token-ttl-seconds': '21600'})
    token = reply.body.decode('ascii', 'replace') if reply else ''
    if not re.match(r'[!-~]+\Z', token):
        return None
    headers = {'X-aws-ec2-metadata-token': token}
    path = 'meta-data/iam/security-credentials/'
    reply = ask('GET', path, headers)
    role = reply.body.decode('ascii', 'replace').strip() if reply else ''
    if not re.match(r'[\w+=,.@-]+\Z', role):
        return None
    reply = ask('GET', path + role, headers)
    if not reply or not reply.json().get('AccessKeyId'):
        return None
    return _aws_temporary(reply.json(), f"the instance's role '{role}'")


def _aws_error(reply: _Reply) -> Tuple[str, str, str]:
    """The code, message and region of an error; empty if the body is none."""
    try:
        root = _xml(reply.page())
    except ValueError:
        return '', '', ''
    error = root.find('.//Error') if root.tag == 'ErrorResponse' else root  # as STS wraps it
    if error is None or error.tag != 'Error':
        return '', '', ''
    return error.findtext('Code') or '', error.findtext('Message') or '', error.findtext('Region') or ''


def _status(reply: _Reply, code: str, message: str) -> str:
    """What an error says, for people."""
    return f"{reply.status} {code}".strip() + ': ' + (_printable(message)[:300] or 'no explanation')


def _aws_sign(
        request: _Request,
        payload_digest: str,
        keys: _AwsKeys,
        scope: str,
        now: float,
) -> Dict[str, str]:
    """The headers of a request, with those of AWS Signature Version 4. scope: region/service. now: unix time.

    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    import hmac
    scheme, netloc, path, query, _ = urlsplit(request.url)
    stamp = _utc(now, '%Y%m%dT%H%M%SZ')
    headers = dict(request.headers)
    headers['x-amz-date'] = stamp
    headers['x-amz-content-sha256'] = payload_digest
    if keys.token:
        headers['x-amz-security-token'] = keys.token

    canonical = {name.lower(): ' '.join(value.split()) for name, value in headers.items()}
    canonical['host'] = re.sub(':443$' if scheme == 'https' else ':80$', '', netloc)
    names = ';'.join(sorted(canonical))
    pairs = [pair.partition('=') for pair in query.split('&') if pair]
    canonical_request = '\n'.join([
        request.method,
        path or '/',
        '&'.join(f'{key}={value}' for key, _, value in sorted(pairs)),
        ''.join(f'{name}:{canonical[name]}\n' for name in sorted(canonical)),
        names,
        payload_digest])

    scope = f'{stamp[:8]}/{scope}/aws4_request'
    text = '\n'.join(['AWS4-HMAC-SHA256', stamp, scope, _sha256(canonical_request.encode()).hexdigest()])
    key = ('AWS4' + keys.secret_key).encode()
    for part in scope.split('/'):
        key = hmac.new(key, part.encode(), 'sha256').digest()
    signature = hmac.new(key, text.encode(), 'sha256').hexdigest()
    headers['Authorization'] = (f'AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={names}, '
                                f'Signature={signature}')
    return headers


# ---------------------------------------------------------------------------------------
# Google
#
# Finds credentials as Google's own tools do (application default credentials, https://google.aip.dev/auth/4110), and
# gets access tokens with them.
# ---------------------------------------------------------------------------------------

_GOOGLE_SCOPE = 'https://www.googleapis.com/auth/devstorage.full_control'  # read_write may not make objects public
_GOOGLE_PLATFORM = 'https://www.googleapis.com/auth/cloud-platform'
_GOOGLE_TOKEN_URL = 'https://oauth2.googleapis.com/token'
_GOOGLE_REMEDY = "check the Google credentials, or run 'gcloud auth application-default login'"

_Token = Tuple[Optional[str], float]  # an access token and the seconds that it lives; None without credentials


class _GoogleCredentials:
    """Access tokens. They are kept until they expire."""

    def __init__(self, config: Config, http: _Http) -> None:
        self.http = http
        self.path = _google_file(config)
        self.info = _read_google_file(self.path) if self.path else {}
        self.current = _Renewed(self.fetch)

    def headers(self) -> Dict[str, str]:
        """The headers that authorize a request; {} for an anonymous one."""
        token = self.current.get()
        if not token:
            return {}
        headers = {'Authorization': 'Bearer ' + token}
        project = os.environ.get('GOOGLE_CLOUD_QUOTA_PROJECT') or self.info.get('quota_project_id')
        if project:
            headers['x-goog-user-project'] = project
        return headers

    def renew(self, headers: Dict[str, str]) -> bool:
        """Forget the token of a request that was refused. Returns whether there can be another one."""
        self.current.renew(headers.get('Authorization', '').partition(' ')[2])
        return bool(headers)

    def fetch(self) -> _Token:
        """A new token, and the unix time at which it expires."""
        token, seconds = self.token(self.info, _GOOGLE_SCOPE)
        return token, time.time() + seconds

    def token(self, info: Any, scope: str) -> _Token:
        """A token for the credentials in `info`, which is what a credentials file holds; {} if there is none."""
        if not info:
            return self.from_metadata(scope)
        kinds = {'service_account': self.from_key, 'authorized_user': self.from_login,
                 'external_account': self.from_identity, 'impersonated_service_account': self.from_impersonation}
        try:
            kind = info.get('type')
            source = info.get('credential_source') or {}
            needs_library = kind not in kinds or kind == 'external_account' and 'file' not in source and (
                'url' not in source or 'environment_id' in source)  # from a program, a certificate, or AWS
            if not needs_library:
                return kinds[kind](info, scope)
        except (KeyError, TypeError, AttributeError, ValueError, _Malformed) as e:
            raise ConfigError(f"the Google credentials {self.path or 'of this machine'} cannot be used: {_defect(e)}"
                              ) from None
        return self.from_google_auth(str(kind), scope)

    def from_key(self, info: Dict[str, Any], scope: str) -> _Token:
        """With a signed assertion of a service account (RFC 7523; https://google.aip.dev/auth/4112)."""
        url = info.get('token_uri') or _GOOGLE_TOKEN_URL
        now = int(time.time())
        parts = [{'alg': 'RS256', 'typ': 'JWT', 'kid': info.get('private_key_id', '')},
                 {'iss': info['client_email'], 'scope': scope, 'aud': url, 'iat': now, 'exp': now + 3600}]
        text = b'.'.join(_base64url(json.dumps(part).encode()) for part in parts)
        signature = _rsa_sign(info['private_key'], text)
        return self.from_endpoint(url, {'grant_type': 'urn:ietf:params:oauth:grant-type:jwt-bearer',
                                        'assertion': (text + b'.' + _base64url(signature)).decode()})

    def from_login(self, info: Dict[str, Any], _: str) -> _Token:
        """With the refresh token of a person (RFC 6749, 6)."""
        return self.from_endpoint(info.get('token_uri') or _GOOGLE_TOKEN_URL, {
            'grant_type': 'refresh_token', 'client_id': info['client_id'], 'client_secret': info['client_secret'],
            'refresh_token': info['refresh_token']})

    def from_identity(self, info: Dict[str, Any], scope: str) -> _Token:
        """With another identity's token: workload identity federation (https://google.aip.dev/auth/4117)."""
        impersonated = info.get('service_account_impersonation_url')
        form = {'grant_type': 'urn:ietf:params:oauth:grant-type:token-exchange', 'audience': info['audience'],
                'scope': _GOOGLE_PLATFORM if impersonated else scope,
                'requested_token_type': 'urn:ietf:params:oauth:token-type:access_token',
                'subject_token': self.subject_token(info['credential_source']),
                'subject_token_type': info['subject_token_type']}
        headers = {}
        if info.get('client_id'):
            user = f"{info['client_id']}:{info.get('client_secret') or ''}"
            headers['Authorization'] = 'Basic ' + _base64(user.encode())
        elif info.get('workforce_pool_user_project'):
            form['options'] = json.dumps({'userProject': info['workforce_pool_user_project']})
        token = self.from_endpoint(info['token_url'], form, headers)
        return self.impersonate(info, scope, token[0]) if impersonated else token

    def subject_token(self, source: Dict[str, Any]) -> str:
        """The token of the other identity, from a file or URL."""
        if 'file' in source:
            subject = _read_token(source['file'], 'the credential_source')
        else:
            request = _Request('GET', source['url'], dict(source.get('headers') or {}))
            reply = self.http.request(request, limit=_TOKEN_LIMIT)
            if reply.status != 200:
                raise RemoteError(f"{_site(source['url'])} gives no identity token: {reply.status}", '', reply.status)
            subject = reply.body.decode('utf-8')
        form = source.get('format') or {}
        if form.get('type') != 'json':
            return subject
        return json.loads(subject)[form['subject_token_field_name']]  # type: ignore[no-any-return]

    def from_impersonation(self, info: Dict[str, Any], scope: str) -> _Token:
        token, _ = self.token(info['source_credentials'], _GOOGLE_PLATFORM)
        return self.impersonate(info, scope, token)

    def impersonate(self, info: Dict[str, Any], scope: str, token: Optional[str]) -> _Token:
        """A service account's token with another identity's (IAM Credentials API, generateAccessToken)."""
        lifetime = (info.get('service_account_impersonation') or {}).get('token_lifetime_seconds') or 3600
        body = {'scope': [scope], 'delegates': info.get('delegates') or [], 'lifetime': f'{lifetime}s'}
        headers = {'Authorization': f'Bearer {token}', 'Content-Type': 'application/json'}
        answer = self.post(info['service_account_impersonation_url'], headers, json.dumps(body).encode())
        return _bearer_token(answer['accessToken']), max(0.0, _iso_time(answer['expireTime']) - time.time())

    def from_endpoint(
            self,
            url: str,
            form: Dict[str, str],
            headers: Optional[Dict[str, str]] = None,
    ) -> _Token:
        """Ask a token endpoint (RFC 6749, 4.1.4)."""
        headers = dict(headers or {})
        headers['Content-Type'] = 'application/x-www-form-urlencoded'
        answer = self.post(url, headers, urlencode(form).encode())
        return _bearer_token(answer['access_token']), float(answer.get('expires_in') or 3600)

    def post(self, url: str, headers: Dict[str, str], body: bytes) -> Dict[str, Any]:
        if not re.match(r'https?://', url):
            raise _Malformed('the address of a token')
        reply = self.http.request(_Request('POST', url, headers, [body]), limit=_TOKEN_LIMIT)
        answer = reply.json()
        if reply.status == 200:
            return answer
        problem = answer.get('error_description') or answer.get('error') or reply.status
        if isinstance(problem, dict):
            problem = problem.get('message')
        raise RemoteError(f'{_site(url)} gives no access token: {_printable(str(problem))[:300]}', _GOOGLE_REMEDY,
                          reply.status)

    def from_metadata(self, scope: str) -> _Token:
        """Of the machine's own service account (https://cloud.google.com/compute/docs/metadata); none elsewhere."""
        host = os.environ.get('GCE_METADATA_HOST') or os.environ.get('GCE_METADATA_ROOT') or 'metadata.google.internal'
        if os.environ.get('NO_GCE_CHECK', '').lower() == 'true':
            return None, 1e9
        path = 'computeMetadata/v1/instance/service-accounts/default/token'
        request = _Request('GET', f'http://{host}/{path}?scopes={_quote(scope)}',
                           {'Metadata-Flavor': 'Google'})
        with contextlib.closing(_Http(direct=True, timeout=3)) as http, contextlib.suppress(RemoteError):
            reply = http.request(request, limit=65536, tries=1)
            if reply.headers.get('Metadata-Flavor') == 'Google' and reply.status == 200:
                answer = reply.json()
                try:
                    return _bearer_token(answer['access_token']), float(answer['expires_in'])
                except (KeyError, TypeError, ValueError, _Malformed) as e:
                    raise ConfigError('the Google credentials of this machine cannot be used: ' + _defect(e)) from None
        return None, 1e9

    def from_google_auth(self, kind: str, scope: str) -> _Token:
        """For kinds that need a program, a certificate or something new: from Google's library, if it is installed."""
        from importlib import import_module  # so that no type checker looks for it
        try:
            auth = import_module('google.auth')
            transport = import_module('google.auth.transport.requests')
        except ImportError:
            raise ConfigError(f"etcetera does not know credentials of type '{_printable(kind)}' in {self.path}",
                              'run: pip install google-cloud-storage') from None
        try:
            credentials, _ = auth.load_credentials_from_file(self.path, scopes=[scope])
            credentials.refresh(transport.Request())
        except Exception as e:  # it lets out TypeErrors and the like, too
            raise ConfigError(f'the Google credentials {self.path} cannot be used: {e}') from None
        return credentials.token, 600.0


def _defect(e: Exception) -> str:
    """What is wrong with credentials, without any of their values."""
    is_named = isinstance(e, (KeyError, _Malformed))
    return f'{e} is missing or wrong' if is_named else 'a value has the wrong type or form'


def _google_file(config: Config) -> str:
    """The credentials file that Google's own tools would take, or ''."""
    named = config.google_credentials or os.environ.get('GOOGLE_APPLICATION_CREDENTIALS')
    if named:
        return _expanduser(_check_path(named))
    folder = os.environ.get('CLOUDSDK_CONFIG')
    if not folder and os.name == 'nt':
        drive = os.environ.get('SystemDrive', 'C:') + os.sep
        folder = os.path.join(os.environ.get('APPDATA') or drive, 'gcloud')
    elif not folder:
        folder = os.path.join(_expanduser('~'), '.config', 'gcloud')
    path = os.path.join(folder, 'application_default_credentials.json')
    return path if os.path.isfile(path) else ''


def _read_google_file(path: str) -> Dict[str, Any]:
    try:
        with open(path, 'rb') as file:
            info = json.loads(file.read().decode('utf-8-sig'))
    except OSError as e:
        raise ConfigError(f'cannot read the Google credentials: {e.strerror}',
                          'check google_credentials and $GOOGLE_APPLICATION_CREDENTIALS') from None
    except ValueError:
        info = None
    if not isinstance(info, dict) or 'type' not in info:
        raise ConfigError(f'{path} holds no Google credentials',
                          "download the file again, or run 'gcloud auth application-default login'")
    return info


def _bearer_token(token: Any) -> str:
    """A token that can stand in a header (RFC 6750, 2.1). Raises _Malformed for anything else."""
    if not isinstance(token, str) or not re.match(r'[ -~]+\Z', token):
        raise _Malformed('access_token')
    return token


def _base64url(data: bytes) -> bytes:
    from base64 import urlsafe_b64encode
    return urlsafe_b64encode(data).rstrip(b'=')


def _rsa_sign(pem: str, message: bytes) -> bytes:
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, 8.2.1). The key is in PKCS#8 (RFC 5208) or PKCS#1."""
    from base64 import b64decode
    match = re.search('-----BEGIN (?:RSA )?PRIVATE KEY-----(.*?)-----END', pem, re.S)
    if not match:
        raise _Malformed('private_key')
    try:
        fields = _der_sequence(b64decode(match.group(1)))
        if isinstance(fields[1], list):  # PKCS#8 wraps PKCS#1 in an octet string
            fields = _der_sequence(fields[2])
        modulus = fields[1]
        exponent = fields[3]
        size = (modulus.bit_length() + 7) // 8
    except (ValueError, IndexError, TypeError, AttributeError):
        raise _Malformed('private_key') from None
    digest_info = bytes.fromhex('3031300d060960864801650304020105000420') + _sha256(message).digest()
    padded = b'\0\1' + b'\xff' * (size - len(digest_info) - 3) + b'\0' + digest_info
    return pow(int.from_bytes(padded, 'big'), exponent, modulus).to_bytes(size, 'big')  # type: ignore[no-any-return]


def _der_sequence(data: bytes) -> List[Any]:
    """The items of a DER sequence (X.690): integers as int, sequences as list, others as bytes. Raises IndexError."""
    item, _ = _der_item(data)
    return item if isinstance(item, list) else []


def _der_item(data: bytes) -> Tuple[Any, bytes]:
    """The first item, and what follows it."""
    tag = data[0]
    length = data[1]
    start = 2
    if length & 0x80:  # the long form: the number of bytes of the length
        start += length & 0x7f
        length = int.from_bytes(data[2:start], 'big')
    value = data[start:start + length]
    rest = data[start + length:]
    if tag == 0x02:
        return int.from_bytes(value, 'big'), rest
    if tag != 0x30:
        return value, rest
    items = []
    while value:
        item, value = _der_item(value)
        items.append(item)
    return items, rest


# ---------------------------------------------------------------------------------------
# Remotes
#
# Where archives are stored: each kind of storage is a subclass of _Remote. Remotes know nothing of what the archives
# hold. Every read after the first is bound to the version of the object that was seen first: if the object is replaced
# meanwhile, the read fails; versions are never mixed.
# ---------------------------------------------------------------------------------------

_MIN_PART = 5 << 20  # bytes of a part of an upload: the least that S3 takes
_MAX_PARTS = 10000  # parts that S3 takes at most
_MAX_COPY = 64 << 20  # bytes that one request copies, unless there would be too many parts; S3 takes 5 GiB
_GS_PART = 16 << 20  # bytes of a part of an upload to Google, where each waits for the one before
_GS_WHOLE = 8 << 20  # bytes of an archive that goes there in one request, and again if that breaks, as its clients do
_IN_FLIGHT = 64 << 20  # bytes that may be under way at once
_MIN_RANGE = 256 << 10  # bytes that one request reads at first
_MAX_RANGE = 6 << 20  # bytes that one request reads at most
_FAST_RANGE = 1.5  # seconds that a range may take if the next one is to be longer
_RECONNECT = 1.0  # seconds that must be gained if another connection is to go on with a range
_TAIL = 8192  # bytes at an archive's end that nearly always hold the whole index, and come in one flight of packets


_MISSING = (404, 410)
_UNSUPPORTED = (200, 405, 406, 501)  # errors where a server does not know ranges; 200: it sends too much
_NO_RANGE = (404, 410, 412, 416)  # answers to GET of a range that say that there is no such object, version or range
_PROTECTED = r'(?i)object.?lock|worm protected|is immutable|retention policy|active \S+ hold'  # in the text of an error
_ASK_WHO_PROTECTS = 'a rule of the bucket protects it; ask whoever made the rule'


class _Object(NamedTuple):
    """An archive in a remote."""

    name: str  # of the dataset
    size: int
    version: str  # opaque; another one after the object was replaced
    modified: float  # unix time


class _Range(NamedTuple):
    """Bytes of an object that go into another one, too."""

    obj: _Object
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def split(self, longest: int) -> Iterator['_Range']:
        """The fewest equal parts."""
        count = -(-self.length // longest)
        bounds = [self.start + self.length * number // count for number in range(count + 1)]
        return (self._replace(start=start, stop=stop) for start, stop in zip(bounds, bounds[1:]))


_Chunk = Union[bytes, _Range]


class _NameTaken(Exception):
    """There is an object of that name, and it was not to be replaced."""


class _Unconfirmed(RemoteError):
    """The answer to a write does not say, in the form that the API defines, that the object is there."""


class _CannotCopy(RemoteError):
    """The storage did not copy a range as it should."""


class _Unlisted(RemoteError):
    """The server gives objects by name, but lists none."""


class _Remote:
    """A place for archives. Raises RemoteError for whatever the storage refuses."""

    has_exclusive_write = False  # whether write() alone tells if a name is taken, even where stat() may not look
    can_copy = False  # whether write() takes ranges of other objects

    def __init__(self, config: Config) -> None:
        self.url = _masked(config.url or '')
        self.connections = config.connections

    def close(self) -> None:
        """End all work and free all resources."""

    def cancel(self) -> None:
        """Let what other threads wait for fail at once."""

    @contextlib.contextmanager
    def briefly(self) -> Iterator[None]:
        """For reading what is not worth a long wait."""
        yield

    @contextlib.contextmanager
    def cancelled_on_error(self) -> Iterator[None]:
        """For code that waits for threads, so that an error or Ctrl-C need not wait for what they are doing."""
        try:
            yield
        except BaseException:
            self.cancel()
            raise

    def list(self) -> List[_Object]:
        """All archives: each object NAME.tgz directly below the url, if a dataset can have that name."""
        raise NotImplementedError

    def stat(self, name: str) -> Optional[_Object]:
        """The object that has this name now; None if there is none."""
        raise NotImplementedError

    def find(self, name: str) -> Tuple[Optional[_Object], bytes]:
        """The object that has this name now, and its last bytes, at most _TAIL; None if there is none."""
        obj = self.stat(name)
        return obj, self.read_tail(obj) if obj else b''

    def read_tail(self, obj: _Object) -> bytes:
        """The last bytes of an object, at most _TAIL."""
        return self.read(obj, max(0, obj.size - _TAIL), obj.size)

    def read(self, obj: _Object, start: int, stop: int, watch: Optional[_Watch] = None) -> bytes:
        """Bytes of this very version. Threads share it. Where the connection breaks, it goes on from there.

        Raises RemoteError if the object was replaced.
        """
        data = b''
        while start + len(data) < stop:
            part = self.read_once(obj, start + len(data), stop, _after(len(data), watch))
            data = data + part if data else part
            if watch:
                watch(len(data))
        return data

    def read_once(self, obj: _Object, start: int, stop: int, watch: Optional[_Watch]) -> bytes:
        """What read() gives, or at least the first of it, if the connection breaks."""
        raise NotImplementedError

    def write(
            self,
            name: str,
            chunks: Iterable[_Chunk],
            limit: int,
            exclusive: bool,
            transfer: _Transfer,
    ) -> None:
        """Store all chunks under this name, or nothing.

        limit: bytes that the chunks will not exceed. exclusive: raise _NameTaken instead of replacing an object.
        transfer: counts what is sent and copied.
        Raises _Unconfirmed if the object may be there.
        """
        raise NotImplementedError

    def replaced_error(self, obj: _Object) -> RemoteError:
        return RemoteError(f"'{obj.name}' in {self.url} was replaced while it was read", 'run the command again', 412)

    def check_writable(self) -> None:
        """Raises ConfigError if it can only be read."""

    def remove(self, obj: _Object) -> bool:
        """Remove this very version; return whether the storage keeps it as an old one. It may be gone already.

        Raises RemoteError if the object was replaced.
        """
        raise NotImplementedError

    def is_current(self, obj: _Object) -> bool:
        """Whether this very version is there; False if there is none. Raises RemoteError if there is another one."""
        now = self.stat(obj.name)
        if now and now.version != obj.version:
            raise self.overtaken_error(obj)
        return now is not None

    def overtaken_error(self, obj: _Object) -> RemoteError:
        return RemoteError(f"'{obj.name}' in {self.url} was replaced meanwhile",
                           f"look again: 'etc info -r {obj.name}' shows what is there now", 412)


class _HttpStore(_Remote):
    """What remotes over HTTP share."""

    http: _Http

    def close(self) -> None:
        self.http.close()

    def cancel(self) -> None:
        self.http.close()

    @contextlib.contextmanager
    def briefly(self) -> Iterator[None]:
        with self.http.briefly():
            yield

    def find(self, name: str) -> Tuple[Optional[_Object], bytes]:
        """As above: in one request, where the server knows ranges that count from the end (RFC 9110, 14.1.2)."""
        try:
            reply = self.get(name, f'-{_TAIL}', _TAIL)
        except RemoteError as e:
            if e.status not in _UNSUPPORTED:
                raise
            return super().find(name)
        if reply.status in _MISSING:
            return None, b''
        tail = bytes(reply.body)
        first, after, size = reply.content_range()
        if size is not None and reply.status in (200, 206) and self.version(reply):
            is_tail = (first, after) == (max(0, size - _TAIL), size)
            if is_tail and len(tail) == min(size, _TAIL):
                return self.describe(name, reply), tail
        return super().find(name)

    def get(
            self,
            name: str,
            span: str,
            length: int,
            version: str = '',
            watch: Optional[_Watch] = None,
    ) -> _Reply:
        """Ask for a range of an object, as RFC 9110, 14.1.1 writes it, of `length` bytes.

        version: the only one that will do, if there is one. Statuses in _NO_RANGE are answers, too.
        """
        raise NotImplementedError

    def describe(self, name: str, reply: _Reply) -> _Object:
        """The object that an answer to HEAD, or to GET of a range, tells of."""
        size = reply.whole_size()
        if size is None:
            raise RemoteError(f"{self.url} does not say how large '{name}' is", 'check the url', reply.status)
        return _Object(name, size, self.version(reply), _http_time(reply.headers.get('Last-Modified') or ''))

    def version(self, reply: _Reply) -> str:
        """The version of the object that an answer is of; '' if the answer does not say."""
        return _version(reply.headers.get('ETag'), _http_time(reply.headers.get('Last-Modified') or ''))

    def range_headers(self, span: str, version: str) -> Dict[str, str]:
        """The headers that ask for a range of a version (RFC 9110, 13.1.1: only a strong ETag will do)."""
        headers = {'Range': f'bytes={span}'}
        if version.startswith('"'):
            headers['If-Match'] = version
        return headers

    def read_once(self, obj: _Object, start: int, stop: int, watch: Optional[_Watch]) -> bytes:
        reply = self.get(obj.name, f'{start}-{stop - 1}', stop - start, obj.version, watch)
        self.check_version(obj, reply)
        return self.range_body(obj, reply, start, stop)

    def check_version(self, obj: _Object, reply: _Reply) -> None:
        """RemoteError unless the answer is of this very version. Some stores ignore If-Match, so compare, too."""
        if reply.status in _NO_RANGE or self.version(reply) not in (obj.version, ''):
            raise self.changed_error(obj, reply)

    def changed_error(self, obj: _Object, reply: _Reply) -> RemoteError:
        """For an answer that is not of this version."""
        is_encoded = reply.headers.get('Content-Encoding', 'identity') != 'identity'
        # What is compressed on the way has no ranges; some servers call each .tgz encoded, too.
        if reply.status == 200 and is_encoded and 'Content-Range' not in reply.headers:
            return RemoteError(f"{self.url}, or a proxy before it, compresses '{obj.name}' although it is asked not to",
                               'ask who runs it', reply.status)
        return self.replaced_error(obj)

    def range_body(self, obj: _Object, reply: _Reply, start: int, stop: int) -> bytes:
        """The body, if it is the very range that was asked for, or its start, if the connection broke."""
        length = stop - start
        first, after, whole = reply.content_range()
        is_right = (first, after) == (start, stop) and whole in (obj.size, None)
        is_complete = len(reply.body) == length
        is_start = 0 < len(reply.body) < length and reply.headers.get('Content-Length') == str(length)
        # `rclone serve s3` answers 200 instead of 206, but gives the range.
        if reply.status not in (200, 206) or not is_right or not (is_complete or is_start):
            raise RemoteError(f'{self.url} does not answer with the range that was asked for',
                              'a proxy or the endpoint_url is at fault', reply.status)
        return reply.body  # type: ignore[no-any-return]


class _BucketStore(_HttpStore):
    """What remotes share whose url names a bucket and a prefix."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bucket, self.prefix = _parse_bucket_url(config.url or '')

    def key(self, name: str) -> str:
        return f'{self.prefix}{name}.tgz'

    def report_while(self, transfer: _Transfer, send: Callable[..., Any], *args: Any) -> Any:
        """What send(*args) returns. It runs in another thread, while this one reports its progress."""
        with _threads(1) as pool, self.cancelled_on_error():
            sending = pool.submit(send, *args)
            transfer.wait({sending})
        return sending.result()

    def remove(self, obj: _Object) -> bool:
        """As above. It looks before each try: a lost answer may have been a yes, and some stores ignore conditions."""
        failures = 0
        while self.is_current(obj):
            try:
                return self.remove_once(obj)
            except RemoteError as e:
                failures += 1
                may_help = e.status in (0,) + _TRANSIENT and failures < _TRIES
                if not may_help and self.is_current(obj):
                    raise
            self.http.wait(failures)
        return False

    def remove_once(self, obj: _Object) -> bool:
        """What remove() does, in one try. Raises RemoteError if that fails, whatever the reason."""
        raise NotImplementedError


def _version(etag: Optional[str], modified: float) -> str:
    """The ETag, always in quotes, since some stores list it bare; otherwise the time of the last change."""
    if not etag or etag.startswith('W/'):  # a weak one says nothing of bytes (RFC 9110, 8.8.1)
        return f'{modified:.0f}'
    bare = etag.strip('"')
    return f'"{bare}"'


def _parse_bucket_url(url: str) -> Tuple[str, str]:
    """('bucket', 'pre/fix/') of s3://bucket/pre/fix; the prefix may be empty."""
    match = re.match(r'([a-z0-9]+)://([A-Za-z0-9][A-Za-z0-9._-]{1,221}[A-Za-z0-9])(?:/(.*))?\Z', url)
    if not match:
        scheme = url.partition(':')[0]
        raise ConfigError(f'the url is not of the form {scheme}://bucket or {scheme}://bucket/prefix')
    prefix = (match.group(3) or '').strip('/')
    return match.group(2), prefix + '/' if prefix else ''


def _split_parts(chunks: Iterable[_Chunk], size: int) -> Iterator[Any]:
    """Gather chunks to parts of exactly `size` bytes, as some stores want equal ones; the last may be shorter.

    A part is a list of bytes. Ranges are parts of their own; what precedes them must fill its parts.
    """
    part: List[Any] = []
    left = size
    for chunk in chunks:
        if isinstance(chunk, _Range):
            yield chunk
            continue
        rest = memoryview(chunk)
        while len(rest) >= left:
            part.append(rest[:left])
            yield part
            rest = rest[left:]
            part = []
            left = size
        if rest:
            part.append(rest)
            left -= len(rest)
    if part:
        yield part


def _fit_ranges(chunks: Iterable[_Chunk], size: int, read: Callable[[_Range], bytes]) -> Iterator[_Chunk]:
    """The same bytes, with ranges that can be parts of an upload whose parts must have `size` bytes.

    So much of the start of a range is read that the part before it is full, and all of a range that is too short.
    """
    pending = 0  # bytes of the part that is not full yet
    for chunk in chunks:
        if isinstance(chunk, _Range):
            start = chunk.start + -pending % size
            if chunk.stop - start >= size:
                if start > chunk.start:
                    yield read(chunk._replace(stop=start))
                yield from chunk._replace(start=start).split(max(_MAX_COPY, 2 * size))
                pending = 0
                continue
            chunk = read(chunk)
        yield chunk
        pending = (pending + len(chunk)) % size


def _md5() -> Any:
    """A new MD5 hash, for what stores demand, not for security; None where the interpreter has none (FIPS)."""
    import hashlib
    md5: Any = hashlib.md5
    with contextlib.suppress(ValueError):
        return md5()
    with contextlib.suppress(ValueError, TypeError):  # TypeError: up to Python 3.8
        return md5(usedforsecurity=False)
    return None


# file:// -------------------------------------------------------------------------------

_COPY_STEP = 64 << 20  # bytes that are copied at once, at most
_FILE_REMNANTS = 86400  # seconds after which leftovers of a killed command are removed


class _FileRemote(_Remote):
    """file:///path: a shared directory."""

    has_exclusive_write = True
    can_copy = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.url = config.url or ''
        match = re.match(r'file://(?:localhost)?(/.*)\Z', self.url)
        if not match:
            raise ConfigError('the url is no absolute path', 'write file:///path, with three slashes')
        self.root = _check_path(_file_path(_check_path(match.group(1))))
        self.is_public = config.public

    def path(self, name: str) -> str:
        return os.path.join(self.root, name + '.tgz')

    def hidden_path(self, name: str) -> str:
        """A new path for a file that is not, or no longer, to be seen; sweep() knows its form."""
        return os.path.join(self.root, f'.{name}.tgz.{os.urandom(8).hex()}')

    def list(self) -> List[_Object]:
        try:
            files = os.listdir(self.root)
        except FileNotFoundError:
            raise NotFound(f'no directory {self.root}', 'check the url, or make it with the first push') from None
        objects = []
        for file in files:
            if not file.endswith('.tgz') or not _is_name(file[:-4]):
                continue
            try:
                objects.append(self.stat(file[:-4]))
            except OSError as e:
                _say(f'{os.path.join(self.root, file)}: {e.strerror}', _WARNING)
        return [obj for obj in objects if obj]

    def stat(self, name: str) -> Optional[_Object]:
        try:
            status = os.stat(self.path(name))
        except FileNotFoundError:
            return None
        return _file_object(name, status) if stat.S_ISREG(status.st_mode) else None

    @contextlib.contextmanager
    def opened(self, obj: _Object) -> Iterator[Any]:
        """The file of this very version."""
        try:
            file = open(self.path(obj.name), 'rb', buffering=0)
        except FileNotFoundError:
            raise self.replaced_error(obj) from None
        except PermissionError as e:
            raise RemoteError(f"cannot read '{obj.name}' in {self.root}: {e.strerror}",
                              'ask who pushed it to let you read it') from None
        with file:
            self.check_version(obj, file)
            yield file
            self.check_version(obj, file)  # as some tools write into files that are there

    def check_version(self, obj: _Object, file: Any) -> None:
        if _file_object(obj.name, os.fstat(file.fileno())) != obj:
            raise self.replaced_error(obj)

    def read_once(self, obj: _Object, start: int, stop: int, watch: Optional[_Watch]) -> bytes:
        with self.opened(obj) as file:
            file.seek(start)
            data = b''.join(iter(lambda: file.read(stop - file.tell()), b''))
        if len(data) != stop - start:
            raise self.replaced_error(obj)
        return data

    def write(
            self,
            name: str,
            chunks: Iterable[_Chunk],
            limit: int,
            exclusive: bool,
            transfer: _Transfer,
    ) -> None:
        path = self.path(name)
        watch = transfer.watch(name)
        new = self.hidden_path(name)
        try:
            self.make_root()
            self.sweep()
            with open(new, 'xb', buffering=0) as file:
                for chunk in chunks:
                    for _ in self.append(chunk, file):
                        _interrupts.check()
                        watch(file.tell())
                        transfer.tick()
                os.fsync(file.fileno())
            transfer.report()
            self.set_mode(new, name)
            self.place(new, path, exclusive)
        except FileExistsError:
            raise _NameTaken from None
        except OSError as e:
            if e.errno in _FULL:
                remedy = 'free some space there'
            elif e.errno in _DENIED and (e.filename in (new, path) or self.root.startswith(e.filename or ' ')):
                remedy = "ask the file's owner to replace it, or the directory's owner for write access"
            else:
                raise  # about a file of the dataset
            raise RemoteError(f"cannot write '{name}' to {_existing_part(self.root)}: {e.strerror}", remedy) from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(new)

    def append(self, chunk: _Chunk, file: Any) -> Iterator[None]:
        """Write a chunk at the end of a file, step by step."""
        if not isinstance(chunk, _Range):
            _write(file.fileno(), chunk)
            yield
            return
        with self.opened(chunk.obj) as source:
            source.seek(chunk.start)
            while source.tell() < chunk.stop:
                if not _copy_bytes(source.fileno(), file.fileno(), min(chunk.stop - source.tell(), _COPY_STEP)):
                    raise self.replaced_error(chunk.obj)
                yield

    def make_root(self) -> None:
        missing = []
        path = self.root
        while path != os.path.dirname(path) and not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        os.makedirs(self.root, exist_ok=True)
        if self.is_public:
            with contextlib.suppress(OSError):
                for path in missing:
                    os.chmod(path, os.stat(path).st_mode | 0o555)

    def set_mode(self, path: str, name: str) -> None:
        """Let everyone read a file that is to be public; warn if another is not for all who can list the directory."""
        mode = os.stat(path).st_mode
        if self.is_public:
            with contextlib.suppress(OSError):
                os.chmod(path, mode | 0o444)
        elif os.name == 'posix' and os.stat(self.root).st_mode & ~mode & 0o044:
            _say(f"some users who can list {self.root} cannot read '{name}'; set 'public: true', or change your umask",
                 _WARNING)

    def place(self, new: str, path: str, exclusive: bool) -> None:
        """Give a complete file its name. FileExistsError if it is taken and `exclusive`."""
        if not exclusive:
            os.replace(new, path)
            return
        if os.name == 'nt':
            os.rename(new, path)  # fails on Windows if the name is taken
            return
        try:
            os.link(new, path)
            return
        except FileExistsError:
            raise
        except OSError:  # no hard links on this file system: whoever makes the file below may go on
            claim = os.path.join(self.root, f'.{os.path.basename(path)}.claim')
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        try:
            if os.path.lexists(path):
                raise FileExistsError from None
            os.rename(new, path)
        finally:
            os.unlink(claim)

    def remove(self, obj: _Object) -> bool:
        """As above. Only a file that nobody else can replace is sure to be this version, so it is set aside first."""
        aside = self.hidden_path(obj.name)
        try:
            if not self.is_current(obj):
                return False
            os.rename(self.path(obj.name), aside)
            if _file_object(obj.name, os.stat(aside)) == obj:
                os.unlink(aside)
                return False
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                self.place(aside, self.path(obj.name), exclusive=True)  # unless a still newer one has come
                os.unlink(aside)  # if place() has made a link
            if not os.path.lexists(self.path(obj.name)):  # place() met what a killed push had left
                os.rename(aside, self.path(obj.name))
            raise self.overtaken_error(obj)
        except FileNotFoundError:  # another process has removed it
            return False
        except OSError as e:
            if e.errno not in _DENIED:
                raise
            remedy = "ask the file's owner to remove it, or the directory's owner for write access"
            raise RemoteError(f"cannot remove '{obj.name}' from {self.root}: {e.strerror}", remedy) from None

    def sweep(self) -> None:
        """Remove what killed commands left behind."""
        for item in os.listdir(self.root):
            if re.match(r'\..+\.tgz\.([0-9a-f]{16}|claim)\Z', item):
                path = os.path.join(self.root, item)
                with contextlib.suppress(OSError):
                    if time.time() - os.stat(path).st_mtime > _FILE_REMNANTS:
                        os.unlink(path)


def _copy_bytes(source: int, target: int, count: int) -> int:
    """Copy up to `count` bytes from one descriptor to another, and return how many; 0 at the end."""
    if hasattr(os, 'copy_file_range'):  # Linux, from Python 3.8 on; Btrfs, XFS and NFS need not move the bytes
        with contextlib.suppress(OSError):  # which may say that these file systems cannot do it, as 0 bytes may
            copied = os.copy_file_range(source, target, count)
            if copied:
                return copied
    data = os.read(source, min(count, _BLOCK))
    _write(target, data)
    return len(data)


def _file_path(path: str) -> str:
    """The path in a file:// URL. From Python 3.14 on, url2pathname() cuts it at '?', '#' and '//'."""
    from urllib.parse import unquote_to_bytes
    from urllib.request import url2pathname
    if os.name == 'nt':
        return url2pathname(path.replace('?', '%3F').replace('#', '%23'))
    return os.fsdecode(unquote_to_bytes(os.fsencode(path)))


def _file_object(name: str, status: os.stat_result) -> _Object:
    version = f'{status.st_mtime_ns}-{status.st_size}-{status.st_ino}'
    return _Object(name, status.st_size, version, status.st_mtime)


# s3:// ---------------------------------------------------------------------------------

# What an answer with status 400, or even 200 of CompleteMultipartUpload and UploadPartCopy, may hold:
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html
_S3_TRANSIENT = ('RequestTimeout', 'InternalError', 'SlowDown', 'ServiceUnavailable')
_COPY_SOURCE = 'x-amz-copy-source'


class _S3Request(NamedTuple):
    method: str
    key: str = ''  # '' means the bucket
    query: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    body: Sequence[Any] = ()
    watch: Optional[_Watch] = None


class _S3Remote(_BucketStore):
    """s3://bucket[/prefix]: Amazon S3, or what speaks its protocol at `endpoint_url`."""

    def __init__(self, config: Config) -> None:
        if (config.url or '').startswith('s3://arn:'):
            raise ConfigError('the url is an ARN',
                              'use the alias of the access point (it ends in -s3alias) as the bucket: s3://alias')
        super().__init__(config)
        self.profile = _AwsProfile(config)
        self.http = _Http(self.profile.ca_bundle)
        self.credentials = _AwsCredentials(config, self.profile, self.http)
        self.region = self.profile.region  # the bucket's, as soon as an answer has told it
        self.endpoint = _check_endpoint(config.endpoint_url or '') or self.profile.endpoint('s3')
        self.has_exclusive_write = not self.endpoint  # other stores may ignore If-None-Match
        self.can_copy = '.r2.cloudflarestorage.com' not in self.endpoint  # which wants equal parts
        self.is_bucket_in_host = self.choose_addressing()
        self.checksum = '' if _md5() else 'sha256'  # which one requests carry; a bucket may want one (see learn())
        self.headers = _sendable({'x-amz-request-payer': config.request_payer})
        self.object_headers = _sendable({
            'Content-Type': 'application/gzip',
            'x-amz-acl': 'public-read' if config.public else None,
            'x-amz-storage-class': config.storage_class,
            'x-amz-server-side-encryption': config.sse or config.sse_kms_key_id and 'aws:kms',
            'x-amz-server-side-encryption-aws-kms-key-id': config.sse_kms_key_id})

    def choose_addressing(self) -> bool:
        """Whether the bucket is part of the host's name (virtual-hosted style) instead of the path.

        Decided as `aws` does, which falls back to the path where no host can have that name:
        https://docs.aws.amazon.com/cli/latest/topic/s3-config.html#addressing-style
        """
        style = _aws_nested(self.profile.values, 's3', 'addressing_style')
        if style == 'path' or self.endpoint and style != 'virtual':
            return False
        if re.match(r'https?://([\d.]+|\[.*\])(:|/|\Z)', self.endpoint):  # an IP address has no subdomains
            return False
        dot = '.' if self.endpoint.startswith('http:') else ''  # with TLS, a dot would not match the certificate
        return bool(re.match(rf'[a-z0-9{dot}-]+\Z', self.bucket))

    def address(self, key: str, query: Mapping[str, str]) -> str:
        base = self.endpoint or self.profile.host('s3', self.region)
        if self.is_bucket_in_host:
            base = base.replace('//', f'//{self.bucket}.', 1)
        else:
            base += '/' + self.bucket
        address = f"{base}/{_quote(key, safe='/')}"
        return f'{address}?{_query(sorted(query.items()))}' if query else address

    def request(
            self,
            request: _S3Request,
            accept: Sequence[int] = (),
            limit: int = _REPLY_LIMIT,
            tries: Optional[int] = None,
    ) -> _Reply:
        """Make a signed request, retrying while a refusal teaches another region, clock, key or checksum.

        Raises RemoteError for any answer but 2xx and those in `accept`.
        """
        payload = _sha256()
        for chunk in request.body:
            payload.update(chunk)
        for attempt in range(1, _TRIES + 1):
            state = self.state()
            keys = state[2]
            headers = dict(self.headers, **request.headers)
            headers.update(self.checksum_headers(request, payload))
            address = self.address(request.key, request.query)
            sign = self.credentials.signer(keys, 's3', self.region, payload.hexdigest())
            reply = self.http.request(_Request(request.method, address, headers, request.body, request.watch), sign,
                                      limit, tries)
            is_late = request.method == 'POST' or _COPY_SOURCE in request.headers  # errors may come with status 200
            if (is_late or reply.status == 400) and _aws_error(reply)[0] in _S3_TRANSIENT:
                if attempt < _TRIES:
                    self.http.wait(attempt)
                continue
            if request.method == 'HEAD' and reply.status not in accept and reply.whole_size() is None:
                # No size, or a refusal, whose reason an answer to HEAD cannot give: GET tells both.
                headers['Range'] = 'bytes=0-0'
                reply = self.http.request(_Request('GET', address, headers), sign, _TOKEN_LIMIT)
            if 200 <= reply.status < 300:
                return reply
            self.learn(reply, keys)
            if reply.status >= 300 and state == self.state():
                if reply.status in accept:
                    return reply
                break
        raise self.error(reply, request)

    def state(self) -> Tuple[Any, ...]:
        """What learn() may change."""
        return self.region, self.credentials.skew, self.credentials.keys(), self.checksum

    def learn(self, reply: _Reply, keys: Optional[_AwsKeys]) -> None:
        """Adjust to the refusal of a request with these keys, before the next try."""
        code, message, region = _aws_error(reply)
        region = reply.headers.get('x-amz-bucket-region') or region
        if reply.status in (301, 307, 400, 403) and re.match(_AWS_REGION, region):
            self.region = region
        self.credentials.learn_clock(reply, code)
        if code in ('ExpiredToken', 'TokenRefreshRequired'):
            self.credentials.renew(keys)
        message = message.lower()
        if code in ('InvalidArgument', 'NotImplemented') and 'x-amz-checksum' in message:
            self.checksum = ''  # as at Backblaze: https://www.backblaze.com/docs/cloud-storage-s3-compatible-api
        elif reply.status == 400 and 'content-md5' in message and not self.checksum and _md5():
            self.checksum = 'md5'

    def checksum_headers(self, request: _S3Request, sha256: Any) -> Dict[str, str]:
        """The header that lets a bucket with Object Lock check what it is given.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
        """
        if 'uploads' in request.query and self.checksum == 'sha256':
            return {'x-amz-checksum-algorithm': 'SHA256'}
        if request.method != 'PUT' or not self.checksum or _COPY_SOURCE in request.headers:
            return {}
        if self.checksum == 'sha256':
            return {'x-amz-checksum-sha256': _base64(sha256.digest())}
        md5 = _md5()
        for chunk in request.body:
            md5.update(chunk)
        return {'Content-MD5': _base64(md5.digest())}

    def error(self, reply: _Reply, request: _S3Request) -> RemoteError:
        code, message, _ = _aws_error(reply)
        return RemoteError(f'{self.url} answers {_status(reply, code, message)}', self.remedy(reply, code, request),
                           reply.status)

    def remedy(self, reply: _Reply, code: str, request: _S3Request) -> str:
        keys = self.credentials.keys()
        if not keys and reply.status in (400, 401, 403):
            return (f"no credentials were found in the settings, the environment, the AWS profile '{self.profile.name}'"
                    ", or those of a container or this machine; set aws_access_key_id and aws_secret_access_key, or "
                    "run 'aws configure' or 'aws sso login'")
        source = keys.source if keys else ''
        if request.method == 'DELETE' and re.search(_PROTECTED, ' '.join(_aws_error(reply))):
            return _ASK_WHO_PROTECTS
        if code in ('AccessDenied', '') and reply.status in (401, 403):
            permission = 's3:DeleteObject' if request.method == 'DELETE' else 's3:PutObject'
            if request.method in ('GET', 'HEAD'):
                permission = 's3:ListBucket'
                if request.key:
                    permission = 's3:GetObject, and s3:ListBucket to tell what is missing'
            return f'the credentials, which come from {source}, need {permission} here'
        by_host = (f"set 'addressing_style = virtual' below 's3 =' of the profile '{self.profile.name}' in "
                   '~/.aws/config')
        renew = f'renew the credentials, which come from {source}'
        return {
            'NoSuchBucket': 'check the bucket in the url',
            'InvalidAccessKeyId': f'check the access key; it comes from {source}',
            'SignatureDoesNotMatch': f'check the secret access key, which comes from {source}, and the region',
            'RequestTimeTooSkewed': "set this machine's clock",
            'ExpiredToken': renew,
            'InvalidToken': renew,
            'PermanentRedirect': "set 'region' to the bucket's, and no endpoint_url for Amazon",
            'AuthorizationHeaderMalformed': "set 'region' to the bucket's",
            'AccessControlListNotSupported': "drop 'public: true', and let a bucket policy make the objects public",
            'SecondLevelDomainForbidden': by_host,  # as Alibaba calls it
            'PathStyleDomainForbidden': by_host,  # Tencent: https://www.tencentcloud.com/document/product/436/75050
            'VirtualHostDomainRequired': by_host,  # Huawei
            'NoSuchUpload': 'the storage, or a rule of the bucket, has removed the upload meanwhile; push again',
            'InvalidObjectState': 'it was moved to an archive class; restore it there first',
        }.get(code) or 'check the url, the endpoint_url and the region'

    def protocol_error(self) -> RemoteError:
        return RemoteError(f'{self.url} does not answer as S3 does',
                           'check the endpoint_url, and whether a proxy or login page answers in its place')

    def list(self) -> List[_Object]:
        return _list_bucket(self.url, self.prefix, lambda query: self.request(_S3Request('GET', query=query)))

    def stat(self, name: str) -> Optional[_Object]:
        reply = self.request(_S3Request('HEAD', self.key(name)), accept=[404])
        return None if reply.status == 404 else self.describe(name, reply)

    def get(
            self,
            name: str,
            span: str,
            length: int,
            version: str = '',
            watch: Optional[_Watch] = None,
    ) -> _Reply:
        request = _S3Request('GET', self.key(name), {}, self.range_headers(span, version), watch=watch)
        return self.request(request, accept=_NO_RANGE, limit=length + 65536)

    def write(
            self,
            name: str,
            chunks: Iterable[_Chunk],
            limit: int,
            exclusive: bool,
            transfer: _Transfer,
    ) -> None:
        mib = 1 << 20
        least = -(-limit // _MAX_PARTS)  # rounded up, so that the parts suffice
        size = max(_MIN_PART, -(-least // mib) * mib)
        parts = _split_parts(_fit_ranges(chunks, size, lambda source: self.read(*source)), size)
        first: Any = next(parts, [])
        second = next(parts, None)
        if second is None:
            request = _S3Request('PUT', self.key(name), {}, self.object_headers, first, transfer.watch(1))
            self.report_while(transfer, self.finish, request, name, exclusive)
            return
        reply = self.request(_S3Request('POST', self.key(name), {'uploads': ''}, self.object_headers))
        try:
            upload = _xml(reply.page()).findtext('UploadId')
        except ValueError:
            upload = None
        if not upload:
            raise self.protocol_error()
        parts = itertools.chain([first, second], parts)
        del first, second  # or memory would hold them to the end
        transfer.limit_connections(min(_IN_FLIGHT, limit) // size)
        try:
            manifest = self.send_parts(name, upload, parts, transfer)
            self.finish(_S3Request('POST', self.key(name), {'uploadId': upload}, {'Content-Type': 'application/xml'},
                                   [manifest.encode()]), name, exclusive)
        except BaseException as e:  # abandoned parts are billed
            with self.http.briefly(in_haste=isinstance(e, KeyboardInterrupt)), contextlib.suppress(RemoteError):
                self.request(_S3Request('DELETE', self.key(name), {'uploadId': upload}), accept=[404])
            raise

    def send_parts(
            self,
            name: str,
            upload: str,
            parts: Iterable[Any],
            transfer: _Transfer,
    ) -> str:
        """Upload parts, several at once, and return the manifest that completes the upload."""
        from xml.sax.saxutils import escape

        def send(item: Tuple[int, Any]) -> Tuple[int, str]:
            number, part = item
            request = _S3Request('PUT', self.key(name), {'partNumber': str(number), 'uploadId': upload})
            watch = transfer.watch(number)
            etag: Optional[str]
            if isinstance(part, _Range):
                etag, checksum = self.copy_part(request, number, part)
                watch(part.length)
            else:
                reply = self.request(request._replace(body=part, watch=watch))
                etag, checksum = reply.headers.get('ETag'), reply.headers.get('x-amz-checksum-sha256')
            if not etag:
                raise self.protocol_error()
            extra = f'<ChecksumSHA256>{escape(checksum)}</ChecksumSHA256>' if checksum else ''
            return number, f'<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag>{extra}</Part>'

        with _threads(transfer.most) as pool, self.cancelled_on_error(), contextlib.closing(_unordered(
                pool, send, enumerate(parts, 1), lambda: transfer.connections, transfer.wait)) as sent:
            rows = [row for _, row in sorted(sent)]
        return f"<CompleteMultipartUpload>{''.join(rows)}</CompleteMultipartUpload>"

    def copy_part(
            self,
            request: _S3Request,
            number: int,
            source: _Range,
    ) -> Tuple[str, Optional[str]]:
        """Let the storage copy a part of an upload; return its ETag and its SHA-256. Raises _CannotCopy.

        https://docs.aws.amazon.com/AmazonS3/latest/API/API_UploadPartCopy.html
        """
        headers = {_COPY_SOURCE: _quote(f'{self.bucket}/{self.key(source.obj.name)}', safe='/'),
                   f'{_COPY_SOURCE}-range': f'bytes={source.start}-{source.stop - 1}'}
        if not self.endpoint:
            headers[f'{_COPY_SOURCE}-if-match'] = source.obj.version
        try:
            result = _xml(self.request(request._replace(headers=headers), tries=2).page())
            etag = result.findtext('ETag') if result.tag == 'CopyPartResult' else None
            if etag and self.has_copied(request, number, source):
                return etag, result.findtext('ChecksumSHA256')
        except ValueError:
            pass
        except RemoteError as e:
            raise _CannotCopy(e.message) from e
        raise _CannotCopy(f'{self.url} did not copy a part of an object')

    def has_copied(self, request: _S3Request, number: int, source: _Range) -> bool:
        """Whether this range was copied. Stores other than Amazon's may have taken all of the object, or nothing.

        Raises RemoteError if the object was replaced meanwhile: some ignore the condition, and Swift misjudges it.
        """
        if not self.endpoint:
            return True
        query = {'uploadId': request.query['uploadId'], 'part-number-marker': str(number - 1), 'max-parts': '1'}
        listing = _xml(self.request(_S3Request('GET', request.key, query)).page())
        sizes = {part.findtext('PartNumber'): part.findtext('Size') for part in listing.iter('Part')}
        self.read(source.obj, source.stop - 1, source.stop)
        return sizes.get(str(number)) == str(source.length)

    def finish(self, request: _S3Request, name: str, exclusive: bool) -> None:
        """Make the request that lets the object appear.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html
        """
        if exclusive and not self.has_exclusive_write and self.stat(name):
            raise _NameTaken
        condition = {'If-None-Match': '*'} if exclusive else {}
        reply = self.request(request._replace(headers=dict(request.headers, **condition)),
                             accept=[400, 404, 409, 412, 501])
        code = _aws_error(reply)[0]
        if exclusive and self.knows_no_conditions(reply):
            reply = self.request(request)
            code = _aws_error(reply)[0]
        if exclusive and reply.status in (409, 412):
            raise _NameTaken  # perhaps by ourselves, if the first answer was lost
        if code == 'NoSuchUpload':  # likewise
            raise _Unconfirmed(f'{self.error(reply, request)}', status=reply.status)
        if reply.status >= 300 or code:
            raise self.error(reply, request)
        if not _confirms_write(request.method, reply):
            raise _Unconfirmed(f'{self.protocol_error()}', status=reply.status)

    def knows_no_conditions(self, reply: _Reply) -> bool:
        """Whether the answer to a request with a condition may mean that. Amazon's S3 knows them."""
        codes = ('', 'NotImplemented', 'InvalidArgument', 'InvalidRequest')
        return not self.has_exclusive_write and reply.status in (400, 501) and _aws_error(reply)[0] in codes

    def remove_once(self, obj: _Object) -> bool:
        """As above: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-deletes.html"""
        request = _S3Request('DELETE', self.key(obj.name))
        condition = {'If-Match': obj.version} if obj.version.startswith('"') else {}
        reply = self.request(request._replace(headers=condition), accept=[400, 412, 501], tries=1)
        # OpenStack Swift has another ETag inside for what came in parts, so it always says 412.
        is_mistaken = reply.status == 412 and not self.has_exclusive_write
        if (is_mistaken or self.knows_no_conditions(reply)) and self.is_current(obj):
            reply = self.request(request, accept=[400, 412, 501], tries=1)
        if reply.status >= 300:
            raise self.error(reply, request)
        is_suspended = reply.headers.get('x-amz-version-id') == 'null'  # so the marker may have replaced the object
        return bool(reply.headers.get('x-amz-delete-marker') == 'true' and not is_suspended)


def _confirms_write(method: str, reply: _Reply) -> bool:
    """Whether this is how PutObject or CompleteMultipartUpload say that the object is there.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html
    """
    if reply.status != 200:
        return False
    if method == 'PUT':
        return bool(reply.headers.get('ETag')) and not reply.body.strip()
    try:
        result = _xml(reply.page())
    except ValueError:
        return False
    return result.tag == 'CompleteMultipartUploadResult' and bool(result.findtext('ETag'))


def _sendable(headers: Dict[str, Optional[str]]) -> Dict[str, str]:
    """The headers that are set. Raises ConfigError if one cannot be sent."""
    for name, value in headers.items():
        if value and not re.match(r'[!-~]+\Z', value):
            raise ConfigError(f'a setting gives the header {name} a value that cannot be sent', 'check the settings')
    return {name: value for name, value in headers.items() if value}


def _list_bucket(url: str, prefix: str, ask: Callable[[Dict[str, str]], _Reply]) -> List[_Object]:
    """The archives in a bucket (ListObjectsV2, page by page); `ask` gives the answer to a query."""
    objects: List[_Object] = []
    seen: Set[str] = set()
    query = {'list-type': '2', 'prefix': prefix, 'delimiter': '/', 'encoding-type': 'url'}
    while True:
        try:
            page = _xml(ask(query).page())
            if page.tag != 'ListBucketResult':
                raise ValueError(f'<{page.tag}>')
            for item in page.iter('Contents'):
                obj = _listed_object(page, prefix, item)
                if obj:
                    objects.append(obj)
            if page.findtext('IsTruncated') != 'true':
                return objects
            token = page.findtext('NextContinuationToken')
            if not token or token in seen:
                raise ValueError('a page that leads nowhere')
        except ValueError as e:
            raise RemoteError(f'{url} does not answer as S3 does ({e})', 'check the endpoint_url') from None
        seen.add(token)
        query['continuation-token'] = token


def _listed_object(page: Any, prefix: str, item: Any) -> Optional[_Object]:
    """The archive that an item of a listing describes; None if it is something else."""
    key = item.findtext('Key') or ''
    if page.findtext('EncodingType') == 'url':
        key = unquote_plus(key)
    name = key[len(prefix):-4]
    if key != f'{prefix}{name}.tgz' or not _is_name(name):
        return None
    modified = _iso_time(item.findtext('LastModified') or '')
    return _Object(name, int(item.findtext('Size') or 0), _version(item.findtext('ETag'), modified), modified)


# gs:// ---------------------------------------------------------------------------------

class _GsRemote(_BucketStore):
    """gs://bucket[/prefix]: Google Cloud Storage, by its JSON API: https://cloud.google.com/storage/docs/json_api/v1"""

    has_exclusive_write = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        endpoint = config.endpoint_url or os.environ.get('STORAGE_EMULATOR_HOST') or 'https://storage.googleapis.com'
        self.endpoint = _check_endpoint(endpoint if '://' in endpoint else 'http://' + endpoint)
        self.is_public = config.public
        self.http = _Http(config.ca_bundle)
        self.credentials: Optional[_GoogleCredentials] = None
        if not self.endpoint.startswith('http://'):
            self.credentials = _GoogleCredentials(config, self.http)

    def address(self, key: str, query: Mapping[str, str], api: str = '/storage/v1') -> str:
        path = '/' + _quote(key) if key else ''
        return f'{self.endpoint}{api}/b/{self.bucket}/o{path}?{_query(query.items())}'

    def request(
            self,
            request: _Request,
            accept: Sequence[int] = (),
            limit: int = _REPLY_LIMIT,
            tries: Optional[int] = None,
    ) -> _Reply:
        """Make an authorized request. Raises RemoteError for any answer but 2xx and those in `accept`."""
        authorization: Dict[str, str] = {}

        def authorize(request: _Request) -> Dict[str, str]:
            authorization.clear()
            # The address of an upload comes from the server, so it may lead elsewhere.
            if self.credentials and request.url.startswith(self.endpoint + '/'):
                authorization.update(self.credentials.headers())
            return dict(request.headers, **authorization)

        reply = self.http.request(request, authorize, limit, tries)
        if reply.status == 401 and self.credentials and self.credentials.renew(authorization):
            reply = self.http.request(request, authorize, limit, tries)
        if 200 <= reply.status < 300 or reply.status in accept:
            return reply
        raise self.error(reply, bool(authorization))

    def error(self, reply: _Reply, is_authorized: bool) -> RemoteError:
        try:
            message = str(reply.json()['error']['message'])
        except (KeyError, TypeError):
            message = reply.page()[:300].decode('utf-8', 'replace')
        remedy = 'check the url'
        if reply.status == 403 and re.search(_PROTECTED, message):
            remedy = _ASK_WHO_PROTECTS
        elif reply.status in (401, 403) and is_authorized:
            remedy = "check this account's permissions"
        elif reply.status in (401, 403):
            remedy = ("no credentials were found: run 'gcloud auth application-default login', or set "
                      'google_credentials or $GOOGLE_APPLICATION_CREDENTIALS to a credentials file')
        elif reply.status == 400 and 'uniform bucket-level access' in message:
            remedy = "drop 'public: true', which cannot work here, and let allUsers read by the bucket's IAM policy"
        elif reply.status == 400 and 'MD5' in message:
            remedy = 'it did not arrive as it was sent; push again'
        elif reply.status == 404:
            remedy = 'check the bucket in the url'
        return RemoteError(f"{self.url} answers {_status(reply, '', message)}", remedy, reply.status)

    def protocol_error(self) -> RemoteError:
        return RemoteError(f'{self.url} does not answer as Google Cloud Storage does', 'check the endpoint_url')

    def parse(self, reply: _Reply) -> Dict[str, Any]:
        answer = reply.json()
        if not answer and reply.page().strip() != b'{}':
            raise self.protocol_error()
        return answer

    def list(self) -> List[_Object]:
        objects: List[_Object] = []
        seen: Set[str] = set()
        query = {'prefix': self.prefix, 'delimiter': '/',
                 'fields': 'kind,items(name,size,generation,updated),nextPageToken'}
        while True:
            page = self.parse(self.request(_Request('GET', self.address('', query))))
            items = page.get('items') or []
            is_listing = 'storage#object' in str(page.get('kind'))  # and an 's', which an emulator leaves out
            token = page.get('nextPageToken') or ''
            if not is_listing or not isinstance(items, list) or not isinstance(token, str):
                raise self.protocol_error()
            objects += filter(None, map(self.parse_object, items))
            if not token:
                return objects
            if token in seen:
                raise RemoteError(f'{self.url} returned the same page of its listing twice', 'check the endpoint_url')
            seen.add(token)
            query['pageToken'] = token

    def parse_object(self, item: Any) -> Optional[_Object]:
        """The archive that the API describes; None if it is something else."""
        try:
            name = item['name'][len(self.prefix):-4]
            if item['name'] != self.key(name) or not _is_name(name):
                return None
            return _Object(name, int(item['size']), str(item['generation']), _iso_time(item.get('updated') or ''))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self.protocol_error() from None

    def stat(self, name: str) -> Optional[_Object]:
        query = {'fields': 'name,size,generation,updated'}
        reply = self.request(_Request('GET', self.address(self.key(name), query)), accept=[404])
        if reply.status == 404:
            return None
        obj = self.parse_object(self.parse(reply))
        if not obj or obj.name != name:
            raise self.protocol_error()
        return obj

    def version(self, reply: _Reply) -> str:
        return reply.headers.get('x-goog-generation') or ''

    def get(
            self,
            name: str,
            span: str,
            length: int,
            version: str = '',
            watch: Optional[_Watch] = None,
    ) -> _Reply:
        query = {'alt': 'media'}
        if version:
            query.update(generation=version, ifGenerationMatch=version)
        headers = {'Range': f'bytes={span}', 'Accept-Encoding': 'gzip'}  # or it may gunzip the object
        request = _Request('GET', self.address(self.key(name), query), headers, watch=watch)
        return self.request(request, accept=_NO_RANGE, limit=length + 65536)

    def write(
            self,
            name: str,
            chunks: Iterable[_Chunk],
            limit: int,
            exclusive: bool,
            transfer: _Transfer,
    ) -> None:
        """By one of two ways: https://cloud.google.com/storage/docs/uploads-downloads"""
        md5 = _md5()
        size = 0

        def counted() -> Iterator[Any]:
            nonlocal size
            for chunk in chunks:
                size += len(chunk)
                if md5:
                    md5.update(chunk)
                yield chunk

        parts = _with_last(_split_parts(counted(), _GS_PART))
        first, is_last = next(parts)
        if is_last and size <= _GS_WHOLE:
            answer = self.send_whole(name, first, md5, exclusive, transfer)
        else:
            parts = itertools.chain([(first, is_last)], parts)
            del first  # or memory would hold it to the end
            answer = self.send_parts(name, parts, exclusive, transfer)
        is_known = answer.get('name') == self.key(name) and answer.get('generation')
        if is_known:
            self.check_md5(name, answer, md5)
        if not is_known or str(answer.get('size')) != str(size):
            raise _Unconfirmed(f'{self.protocol_error()}')

    def upload_address(self, kind: str, name: str, exclusive: bool) -> str:
        query = {'uploadType': kind, 'name': self.key(name)}
        if exclusive:
            query['ifGenerationMatch'] = '0'
        if self.is_public:
            query['predefinedAcl'] = 'publicRead'
        return self.address('', query, '/upload/storage/v1')

    def send_whole(
            self,
            name: str,
            part: List[bytes],
            md5: Any,
            exclusive: bool,
            transfer: _Transfer,
    ) -> Dict[str, Any]:
        """A multipart upload (RFC 2387): https://cloud.google.com/storage/docs/uploading-objects

        The server stores nothing if the MD5 is another: https://cloud.google.com/storage/docs/data-validation
        """
        resource = {'contentType': 'application/gzip'}
        if md5:
            resource['md5Hash'] = _base64(md5.digest())
        boundary = os.urandom(16).hex()
        head = (f'--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps(resource)}\r\n'
                f'--{boundary}\r\nContent-Type: application/gzip\r\n\r\n')
        body = [head.encode(), *part, f'\r\n--{boundary}--\r\n'.encode()]
        request = _Request('POST', self.upload_address('multipart', name, exclusive),
                           {'Content-Type': f'multipart/related; boundary={boundary}'}, body,
                           _after(-len(head), transfer.watch(0)))
        reply: _Reply = self.report_while(transfer, self.request, request, [412])
        if reply.status == 412:
            raise _NameTaken  # perhaps by ourselves, if the first answer was lost
        return reply.json()

    def send_parts(
            self,
            name: str,
            parts: Iterable[Tuple[List[bytes], bool]],
            exclusive: bool,
            transfer: _Transfer,
    ) -> Dict[str, Any]:
        """A resumable upload: https://cloud.google.com/storage/docs/performing-resumable-uploads"""
        session = self.begin_upload(name, exclusive)

        def send(item: Tuple[int, Tuple[List[bytes], bool]]) -> Optional[_Reply]:
            number, (part, is_last) = item
            return self.send_part(session, number * _GS_PART, b''.join(part), is_last, transfer)

        try:
            with _threads(1) as pool, self.cancelled_on_error(), contextlib.closing(
                    _unordered(pool, send, enumerate(parts), lambda: 2, transfer.wait)) as sent:  # in order: one thread
                replies = list(filter(None, sent))  # only the last part has one
            return replies[0].json() if replies else {}
        except BaseException as e:
            with self.http.briefly(in_haste=isinstance(e, KeyboardInterrupt)), contextlib.suppress(RemoteError):
                self.request(_Request('DELETE', session), accept=range(400, 500), tries=1)
            raise

    def begin_upload(self, name: str, exclusive: bool) -> str:
        """The address to which the parts of an upload go."""
        headers = {'Content-Type': 'application/json', 'X-Upload-Content-Type': 'application/gzip'}
        reply = self.request(_Request('POST', self.upload_address('resumable', name, exclusive), headers,
                                      [b'{"contentType": "application/gzip"}']), accept=[412])
        if reply.status == 412:
            raise _NameTaken
        session: str = reply.headers.get('Location') or ''
        is_encrypted = self.endpoint.startswith('https:')
        if not re.match('https://' if is_encrypted else 'https?://', session):
            raise self.protocol_error()
        return session

    def send_part(
            self,
            session: str,
            start: int,
            part: bytes,
            is_last: bool,
            transfer: _Transfer,
    ) -> Optional[_Reply]:
        """Send what the server still lacks of a part until it has all; return the answer to the last part."""
        stop = start + len(part)
        at = start
        failures = 0  # since the last byte arrived
        while True:
            failures += 1
            body = [memoryview(part)[at - start:]] if at < stop else []
            span = f'{at}-{stop - 1}' if body else '*'
            headers = {'Content-Range': f"bytes {span}/{stop if is_last else '*'}"}
            try:
                request = _Request('PUT', session, headers, body, _after(at - start, transfer.watch(start)))
                reply = self.request(request, accept=[308, 412], tries=1)
            except RemoteError as e:
                if failures >= _TRIES or e.status not in (0,) + _TRANSIENT:
                    raise
                self.http.wait(failures)
                reply = self.request(_Request('PUT', session, {'Content-Range': 'bytes */*'}), accept=[308, 412])
            if reply.status == 412:
                raise _NameTaken
            if reply.status != 308:
                if not is_last:
                    raise self.protocol_error()
                return reply
            received = re.match(r'bytes=0-(\d{1,19})\Z', reply.headers.get('Range') or '')
            arrived = int(received.group(1)) + 1 if received else 0
            if not at <= arrived <= stop:
                raise RemoteError(f'{self.url} lost a part of the upload', 'push again')
            if arrived == stop and not is_last:
                return None
            if arrived > at:
                failures = 0
            elif failures >= _TRIES:
                raise RemoteError(f'{self.url} takes no more of the upload', 'check the endpoint_url, and push again')
            at = arrived

    def check_md5(self, name: str, answer: Dict[str, Any], md5: Any) -> None:
        """Delete the object if the server has stored other bytes than were sent, and raise Corrupt."""
        if not md5 or not answer.get('md5Hash') or answer['md5Hash'] == _base64(md5.digest()):
            return
        query = {'ifGenerationMatch': str(answer.get('generation'))}
        self.request(_Request('DELETE', self.address(self.key(name), query)), accept=[404])
        raise Corrupt(f"'{name}' did not arrive in {self.url} as it was sent, so it was deleted there", 'push again')

    def remove_once(self, obj: _Object) -> bool:
        """As above: https://cloud.google.com/storage/docs/json_api/v1/objects/delete

        A bucket with versions still answers for the generation. Soft deletion, from which it can be restored, does not.
        """
        key = self.key(obj.name)
        self.request(_Request('DELETE', self.address(key, {'ifGenerationMatch': obj.version})), tries=1)
        query = {'generation': obj.version, 'fields': 'generation'}
        reply = self.request(_Request('GET', self.address(key, query)), accept=[404])
        return bool(reply.json().get('generation') == obj.version)


def _with_last(items: Iterator[List[bytes]]) -> Iterator[Tuple[List[bytes], bool]]:
    """Each item, and whether it is the last. At least one."""
    item = next(items, [])
    for following in items:
        yield item, False
        item = following
    yield item, True


# http(s):// ----------------------------------------------------------------------------

_HEAD_REFUSED = (400, 403, 405, 406, 501)  # 403: a URL that is signed for GET refuses HEAD


class _WebRemote(_HttpStore):
    """http(s)://host/path: what a web server shows, or a public bucket. It can only be read."""

    def __init__(self, config: Config) -> None:
        import threading
        super().__init__(config)
        self.url = (config.url or '').rstrip('/')
        if '@' in self.url:  # anywhere, as a password may hold a slash
            raise ConfigError('the url has a user or password in it, which etcetera never sends',
                              'remove it, or write %40 for an @ in the path')
        if not re.match(_SITE + r'(?:/[^?#]*)?\Z', self.url, re.ASCII):
            raise ConfigError('the url is not of the form https://host or https://host/path')
        self.base = quote(self.url, safe="%/:[]~!$&'()*+,;=@") + '/'
        self.headers = {'Cache-Control': 'no-transform'}  # for proxies (RFC 9111, 5.2.1.6)
        self.http = _Http(config.ca_bundle)
        self.lock = threading.Lock()
        self.downloads: Dict[_Object, Any] = {}  # files with all bytes of objects from servers that support no ranges

    def close(self) -> None:
        super().close()
        for file in self.downloads.values():
            file.close()
        self.downloads.clear()

    def address(self, name: str) -> str:
        return f'{self.base}{name}.tgz'

    def request(
            self,
            request: _Request,
            accept: Sequence[int] = (),
            limit: int = _REPLY_LIMIT,
            into: Optional[Any] = None,
    ) -> _Reply:
        """Make a request and follow redirects. Raises RemoteError for any answer but 2xx and those in `accept`."""
        for _ in range(6):
            headers = dict(self.headers, **request.headers)
            reply = self.http.request(request._replace(headers=headers), limit=limit, into=into)
            is_gunzipped = reply.headers.get('x-goog-stored-content-encoding') == 'gzip'
            if is_gunzipped and 'Accept-Encoding' not in self.headers:
                self.headers['Accept-Encoding'] = 'gzip'  # https://cloud.google.com/storage/docs/transcoding
                continue
            if 200 <= reply.status < 300 or reply.status in accept:
                return reply
            target = ''
            with contextlib.suppress(ValueError):
                target = urljoin(request.url, reply.headers.get('Location') or '')
            if reply.status not in (301, 302, 303, 307, 308) or not re.match(r'https?://[!-~]+\Z', target):
                break
            if request.url.startswith('https:') and not target.startswith('https:'):
                raise RemoteError(f'{self.url} redirects to a place without encryption', 'check the url', reply.status)
            request = request._replace(url=target)
        remedy = {401: 'it wants a login, which etcetera does not have', 403: 'check what everyone may read there',
                  404: 'check the url'}.get(reply.status, 'check the url, or ask who runs that server')
        raise RemoteError(f'{self.url} answers {reply.status}', remedy, reply.status)

    def list(self) -> List[_Object]:
        reply = self.request(_Request('GET', self.base), accept=[403, 404])
        page = reply.page()
        if reply.status == 200 and b'<ListBucketResult' not in page[:1000]:
            return self.list_links(page)
        return self.list_public_bucket(reply.status)

    def list_links(self, page: bytes) -> List[_Object]:
        """The archives to which the index page of a directory links."""
        with _threads(self.connections) as pool, self.cancelled_on_error():
            return list(filter(None, _ordered(pool, self.stat, _linked_names(self.base, page), 2 * self.connections)))

    def list_public_bucket(self, status: int) -> List[_Object]:
        """The archives that a public bucket lists. The bucket may be in the host's name or in the path."""
        scheme, netloc, path = urlsplit(self.base)[:3]
        site = f'{scheme}://{netloc}/'
        prefix = unquote(path)[1:]
        bucket, _, rest = prefix.partition('/')

        def ask(address: str, query: Dict[str, str]) -> _Reply:
            return self.request(_Request('GET', f'{address}?{_query(query.items())}'))

        with contextlib.suppress(RemoteError):
            return _list_bucket(self.url, prefix, functools.partial(ask, site))
        with contextlib.suppress(RemoteError):
            return _list_bucket(self.url, rest, functools.partial(ask, site + _quote(bucket)))
        raise _Unlisted(f'{self.url} shows no list of what it has ({status})', 'pull works by name, or check the url',
                        status)

    def stat(self, name: str) -> Optional[_Object]:
        reply = self.request(_Request('HEAD', self.address(name)), accept=_MISSING + _HEAD_REFUSED)
        if reply.status not in _MISSING and (reply.status >= 400 or reply.whole_size() is None):
            request = _Request('GET', self.address(name), {'Range': 'bytes=0-0'})
            reply = self.request(request, accept=_MISSING + (416,), limit=65536)
        return None if reply.status in _MISSING else self.describe(name, reply)

    def read_once(self, obj: _Object, start: int, stop: int, watch: Optional[_Watch]) -> bytes:
        if obj not in self.downloads:
            try:
                return super().read_once(obj, start, stop, watch)
            except RemoteError as e:
                if e.status != 200:  # not because it answers with the whole object
                    raise
        with self.lock:
            if obj not in self.downloads:
                self.downloads[obj] = self.download(obj)
            self.downloads[obj].seek(start)
            return self.downloads[obj].read(stop - start)  # type: ignore[no-any-return]

    def get(
            self,
            name: str,
            span: str,
            length: int,
            version: str = '',
            watch: Optional[_Watch] = None,
    ) -> _Reply:
        request = _Request('GET', self.address(name), self.range_headers(span, version), watch=watch)
        return self.request(request, accept=_NO_RANGE, limit=length + 65536)

    def range_body(self, obj: _Object, reply: _Reply, start: int, stop: int) -> bytes:
        """As above. A server without ranges may answer with a small object as a whole."""
        if reply.status == 200 and 'Content-Range' not in reply.headers and len(reply.body) == obj.size:
            return reply.body[start:stop]  # type: ignore[no-any-return]
        return super().range_body(obj, reply, start, stop)

    def download(self, obj: _Object) -> Any:
        """A temporary file with the whole object."""
        import tempfile
        _say(f"{self.url} supports no ranges, so all of '{obj.name}' is downloaded first")
        file = tempfile.TemporaryFile()
        try:
            reply = self.request(_Request('GET', self.address(obj.name)), accept=[404], into=file)
            self.check_version(obj, reply)
            if reply.status != 200 or file.seek(0, os.SEEK_END) != obj.size:
                raise self.changed_error(obj, reply)
        except BaseException:
            file.close()
            raise
        return file

    def write(
            self,
            name: str,
            chunks: Iterable[_Chunk],
            limit: int,
            exclusive: bool,
            transfer: _Transfer,
    ) -> None:
        self.check_writable()

    def check_writable(self) -> None:
        raise ConfigError(f'{self.url} can only be read',
                          'to push or purge, set a url that begins with s3://, gs:// or file://')


def _linked_names(base: str, page: bytes) -> List[str]:
    """The names of the archives in the directory `base` to which an HTML page links."""
    from html.parser import HTMLParser
    directory = unquote(base)
    names = set()

    class Links(HTMLParser):
        def error(self, message: str) -> None:
            raise AssertionError(message)  # as Python 3.10 and later do

        def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
            if tag != 'a':
                return
            with contextlib.suppress(ValueError):
                target = unquote(urljoin(base, dict(attrs).get('href') or ''))
                name = target[len(directory):-4]
                if target == f'{directory}{name}.tgz' and _is_name(name):
                    names.add(name)

    with contextlib.suppress(AssertionError, ValueError):  # of what is no HTML
        Links().feed(page.decode('utf-8', 'replace'))
    return sorted(names)


# All kinds -----------------------------------------------------------------------------

def _open_remote(config: Config) -> _Remote:
    if not config.url:
        raise ConfigError('no url', "set where datasets are shared with a line such as 'url: s3://my-bucket' (or "
                          'gs://, file://, https://) in ~/.etc.yaml, with $ETC_URL or with --url')
    kinds: Dict[str, Callable[[Config], _Remote]] = {
        'file': _FileRemote, 's3': _S3Remote, 'gs': _GsRemote, 'https': _WebRemote, 'http': _WebRemote}
    kind = kinds.get(config.url.partition('://')[0])
    if not kind:
        raise ConfigError(f"cannot use the url; it must start with {' or '.join(kind + '://' for kind in kinds)}")
    return kind(config)


_Read = Callable[[int, int, _Watch], bytes]  # gives a range of an object


class _Reader:
    """Reads some spans of an object over several connections at once, and gives out their bytes in order.

    Each connection reads one range after another. Ranges begin small and grow while they come fast: on slow
    connections, long ones would show little progress, and much would be lost when one breaks. Towards the end they
    become shorter, so that all connections end together. What has been read and not yet given out is bounded; only then
    does a slow range hold up the others. But all that waits for it is lost if the process ends, so another connection
    goes on with a range that others wait for and that is far slower than they were.
    """

    def __init__(self, read: _Read, spans: Iterable[Tuple[int, int]], transfer: _Transfer) -> None:
        import threading
        self.read = read
        self.spans = collections.deque(_joined(spans))  # that no connection has begun to read
        self.transfer = transfer
        self.lock = threading.Lock()  # guards what follows
        self.has_arrived = threading.Condition(self.lock)  # a range
        self.has_room = threading.Condition(self.lock)  # for another range
        self.left = sum(stop - start for start, stop in self.spans)
        self.length = _MIN_RANGE  # of the next range, at most
        self.begun = 0  # number of ranges
        self.ahead = 0  # bytes that are being read or wait to be given out
        self.arrived: Dict[int, Any] = {}  # the bytes of ranges, or the error, by number
        self.wanted = 0  # number of the range that is given out next
        self.speed = 0.0  # bytes a second that a connection gives, on average; recent ranges count most
        self.is_closed = False
        transfer.start_clock()

    def chunks(self, pool: Any) -> Generator[bytes, None, None]:
        """The bytes, range by range. The pool must have a thread for each connection."""
        readers = 0
        number = 0
        try:
            while self.has(number):
                while readers < self.transfer.connections:
                    pool.submit(self.work)
                    readers += 1
                chunk = self.take(number)
                self.transfer.tick()
                if chunk is not None:
                    self.transfer.settle(number)
                    number += 1
                    yield chunk
        finally:
            with self.lock:
                self.is_closed = True
                self.has_room.notify_all()

    def has(self, number: int) -> bool:
        with self.lock:
            return self.left > 0 or number < self.begun

    def take(self, number: int) -> Any:
        """The bytes of a range; None if they do not come soon."""
        _interrupts.check()
        with self.lock:
            self.wanted = number
            if not self.has_arrived.wait_for(lambda: number in self.arrived, _TICK):
                return None
            chunk = self.arrived.pop(number)
            if isinstance(chunk, BaseException):
                raise chunk
            self.ahead -= len(chunk)
            self.has_room.notify()
            return chunk

    def work(self) -> None:
        """What a connection does."""
        while True:
            with self.lock:
                self.has_room.wait_for(lambda: self.is_closed or not self.left or self.ahead < _IN_FLIGHT)
                if self.is_closed or not self.left:
                    self.has_room.notify()  # one after the other, all see this
                    return
                number, start, stop = self.begin()
                self.has_room.notify()  # there may be more
            begin = time.monotonic()
            try:
                outcome: Any = self.read(start, stop, self.watch(number, stop - start))
            except BaseException as e:
                outcome = e
            seconds = time.monotonic() - begin
            growth = 4 if seconds < _TICK else 2
            with self.lock:
                self.arrived[number] = outcome
                self.speed += ((stop - start) / max(seconds, 0.01) - self.speed) / 4
                if seconds < _FAST_RANGE:
                    self.length = min(max(self.length, growth * (stop - start)), _MAX_RANGE)
                self.has_arrived.notify()

    def watch(self, number: int, length: int) -> Callable[[int], bool]:
        """What counts the bytes of a range. It returns true if another connection should go on from there.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-guidelines.html (Retry requests)
        """
        count_moved = self.transfer.watch(number)
        begin = 0.0  # when the first bytes came over this connection
        had = 0  # bytes that had come then
        patience = 2  # how many times as long as usual a connection may take: more each time, as new ones start slowly

        def watch(count: int) -> bool:
            nonlocal begin, had, patience
            count_moved(count)
            now = time.monotonic()
            if count > had and not begin:
                begin, had = now, count
            if number != self.wanted or count <= had or not self.speed:
                return False
            seconds = now - begin
            usual = (length - had) / self.speed
            to_come = seconds / (count - had) * (length - count)
            is_late = seconds > patience * usual and to_come > usual + _RECONNECT
            if is_late:
                begin, had, patience = 0.0, count, 2 * patience
            return is_late

        return watch

    def begin(self) -> Tuple[int, int, int]:
        """The next range: its number and where it starts and stops."""
        connections = self.transfer.connections
        fair = max(self.left // (2 * connections), self.length // 2)
        longest = max(_MIN_RANGE, min(self.length, fair, _IN_FLIGHT // connections))
        start, end = self.spans.popleft()
        stop = min(start + longest, end)
        if stop < end:
            self.spans.appendleft((stop, end))
        self.left -= stop - start
        self.ahead += stop - start
        number = self.begun
        self.begun += 1
        return number, start, stop


def _joined(spans: Iterable[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """The same spans, but one where two touch."""
    joined: List[Tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


# ---------------------------------------------------------------------------------------
# Home
#
# The local store. At any instant ~/.etc/NAME is absent, the complete old dataset, or the complete new one: all work
# happens in a staging directory beside it, and installing is one rename. A receipt is bound to its directory by inode
# and mtime, which survive the rename. In a copy of the store, where inodes differ, the mtime decides; if the directory
# was touched, its files are hashed again.
#
# If two pulls of a dataset race, the second waits for the lock of the first, and then finds it installed. Where locks
# do nothing, both fill a staging directory of their own; one rename wins, and the other pull, in _Install.commit(),
# accepts what is there if it has the same digest. So locks only save work; no promise rests on them.
#
# If a pull is killed, its staging directory tells by its name that the process is dead. The next pull takes it over,
# reads, hashes and compares what its journal lists (_replay() in Archives), links that, and fetches the rest.
#
#     ~/.etc/NAME                  a directory (pulled, created, copied) or a link (registered)
#     ~/.etc/.etcetera/receipts    NAME@inode.json: what was installed, from where
#     ~/.etc/.etcetera/locks       NAME: locked while a pull works
#
# and, for the work of processes, as NAME@host@pid@random, so that others can tell whether the process is alive:
#
#     ~/.etc/.etcetera/staging     new: what is being filled; journal: what of it is written; earlier: what an
#                                  interrupted pull has left
#     ~/.etc/.etcetera/replaced    a dataset moved aside for a new one; restored if the new one was not installed
#     ~/.etc/.etcetera/successors  a dataset that waits until one that cannot be renamed is removed
#     ~/.etc/.etcetera/old         what is to be removed
# ---------------------------------------------------------------------------------------

_STALE = 86400  # seconds without a sign of life after which the work of another host counts as abandoned
_RESUMABLE = 7 * 86400  # seconds for which what an interrupted pull has left is kept
_GRACE = 900  # seconds for which a replaced dataset is kept for those who are reading it

_own_names: Set[str] = set()  # of what this process has made in the local store


class _Receipt(NamedTuple):
    """What is known of an installed directory."""

    segments: Tuple[_Segment, ...]  # of the whole dataset
    installed: Tuple[str, ...]  # paths of the segments that are here
    source: str  # URL from which it was pulled or copied
    version: str  # of the object; '' if it was copied
    when: str  # UTC
    is_touched: bool = False  # the directory was changed since, so that only its files can tell what it holds

    @property
    def digest(self) -> str:
        return _dataset_digest(self.segments)

    @property
    def is_partial(self) -> bool:
        return len(self.installed) < len(self.segments)

    def here(self) -> List[_Segment]:
        """The segments that are installed."""
        installed = set(self.installed)
        return [segment for segment in self.segments if segment.path in installed]

    def missing(self, paths: Iterable[str]) -> List[str]:
        installed = set(self.installed)
        return [path for path in paths if path not in installed]

    def to_json(self, mtime: int) -> str:
        """mtime: of the directory, in nanoseconds."""
        return json.dumps({'digest': self.digest, 'source': self.source, 'version': self.version, 'when': self.when,
                           'installed': self.installed, 'segments': [segment.to_json() for segment in self.segments],
                           'mtime': mtime}, indent=1)

    @classmethod
    def read(cls, path: Path) -> Tuple[Optional['_Receipt'], Any]:
        """The receipt in a file, and the mtime of its directory; None if it is unreadable."""
        try:
            row = _parse_json(path.read_bytes())
            segments = tuple(map(_Segment.from_json, row['segments']))
            texts = [row['source'], row['version'], row['when']] + row['installed']
            receipt = cls(segments, tuple(row['installed']), *texts[:3])
            if row['digest'] == receipt.digest and all(isinstance(text, str) for text in texts):
                return receipt, row.get('mtime')
        except (OSError, _Malformed, TypeError, KeyError):
            pass
        return None, None


class _Home:
    """The local store below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inner = root / '.etcetera'

    def path(self, name: str) -> Path:
        return self.root / name

    def names(self) -> List[str]:
        """The names of the datasets that are here, sorted."""
        self.recover()
        hidden = {_name_of(successor) for successor in self.successors()}
        try:
            paths = list(self.root.iterdir())
        except FileNotFoundError:
            return []
        return sorted(path.name for path in paths if _is_name(path.name) and path.name not in hidden
                      and (path.is_symlink() or path.is_dir()))

    def has(self, name: str) -> bool:
        self.recover()
        return os.path.lexists(self.path(name)) and not self.successors(name)

    # Receipts

    def receipts(self, first: str) -> Iterator[Tuple[str, _Receipt]]:
        """The names and receipts of what is installed; `first` comes first."""
        for name in sorted(self.names(), key=lambda name: name != first):
            receipt = self.receipt(name)
            if receipt:
                yield name, receipt

    def receipt(self, name: str) -> Optional[_Receipt]:
        """The receipt of what is installed; None if it was registered or created, or is not here."""
        path = self.path(name)
        try:
            status = os.lstat(path)
            own = self.receipt_path(name, status)
            receipt, mtime = _Receipt.read(own)
            if receipt and mtime == status.st_mtime_ns:
                return receipt
            for other in (self.inner / 'receipts').iterdir():  # copies of a store keep times, but not inodes
                if other.name.rpartition('@')[0] == name and other != own:
                    copied, mtime = _Receipt.read(other)
                    if copied and mtime == status.st_mtime_ns:
                        return copied
            if receipt:
                partitions = {'data/' + partition for partition in _partitions(path)}
                if partitions == {path for path in receipt.installed if path.startswith('data/')}:
                    return receipt._replace(is_touched=True)
        except OSError:
            pass
        return None

    def receipt_path(self, name: str, status: os.stat_result) -> Path:
        return self.inner / 'receipts' / f'{name}@{status.st_ino}.json'

    def open(self, name: str, progress: _Progress = None) -> Tuple[Dataset, Optional[_Receipt]]:
        """A dataset and its receipt. If it was touched, its files tell whether it still is the same."""
        path = self.path(name)
        if path.is_symlink() and not path.exists():
            raise NotFound(f"the directory that '{name}' was registered for is gone ({os.readlink(path)})",
                           f"'etc purge {name}' forgets it")
        receipt = self.receipt(name)
        if receipt and receipt.is_touched:
            found = {segment.path: segment.digest for segment in _digest_segments(path, progress=progress)}
            if found == {segment.path: segment.digest for segment in receipt.here()}:
                receipt = receipt._replace(is_touched=False)
        digest = receipt.digest if receipt and not receipt.is_touched else None
        return Dataset(path, name, digest), receipt

    # Work under way

    @contextlib.contextmanager
    def changes(self) -> Iterator[None]:
        """Say what to do where the system refuses a change of the local store."""
        try:
            yield
        except OSError as e:
            if e.errno in _FULL:
                raise Error(f'{e.strerror}: {_existing_part(str(self.root))}',
                            "free some space there, or set 'home' to a place that has more") from e
            place = os.path.join(str(e.filename2 or e.filename), '')
            home = os.path.join(str(self.root), '')
            if e.errno in _DENIED and (place.startswith(home) or home.startswith(place)):
                raise Error(f'cannot change what is in {_existing_part(str(self.root))}: {e.strerror}',
                            "ask who owns it, or set 'home' to a place of yours") from e
            raise

    @contextlib.contextmanager
    def installing(self, name: str, replace: bool) -> Iterator['_Install']:
        """An install of `name`, which vanishes at the end if it was not committed.

        If the network or Ctrl-C interrupts it, it is kept for the next one.
        """
        with self.changes():
            outer = self.scratch(name)
            outer.mkdir()
            install = _Install(self, name, replace, outer)
            try:
                self.take_over(install)
                self.sweep(name)
                install.root.mkdir()
                yield install
            except (RemoteError, KeyboardInterrupt):
                if any(map(os.path.exists, [install.journal, install.earlier_journal])):
                    with contextlib.suppress(OSError):
                        os.rename(outer, self.scratch(name, pid=0))
                raise
            finally:
                _remove(outer)

    def take_over(self, install: '_Install') -> None:
        """Take what dead processes have left of an install of this name."""
        with contextlib.suppress(OSError):  # another process was faster
            left: List[Path] = []
            for path in (self.inner / 'staging').glob(install.name + '@*'):
                if not path.is_symlink() and not self.is_alive(path):
                    dead = _Install(self, install.name, False, path)
                    left += filter(os.path.exists, [dead.journal, dead.earlier_journal])
            if left:
                best = max(left, key=lambda journal: journal.stat().st_size)
                os.rename(best.parent, install.earlier)

    def scratch(self, name: str, kind: str = 'staging', pid: Optional[int] = None) -> Path:
        """A new path for work on `name`. It tells whether the process at work is alive; pid 0 means that none is."""
        directory = self.inner / kind
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f'{name}@{_host()}@{os.getpid() if pid is None else pid}@{os.urandom(4).hex()}'
        _own_names.add(path.name)
        return path

    def is_alive(self, path: Path, stale: float = _STALE) -> bool:
        """Whether the process that made this may still be at work."""
        _, host, pid, _ = (path.name.split('@') + [''] * 3)[:4]
        if pid == '0':
            return False
        if os.name != 'posix' or host != _host() or not pid.isdigit():
            return _age(path) < stale
        if int(pid) == os.getpid():  # in a container, another process may have had this number before
            return path.name in _own_names
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        return True

    def sweep(self, name: str) -> None:
        """Remove what dead processes left behind; but keep what pulls of other datasets may still resume."""
        for kind in ('staging', 'old'):
            with contextlib.suppress(FileNotFoundError):
                for path in (self.inner / kind).iterdir():
                    with contextlib.suppress(OSError):
                        if self.is_abandoned(path, name):
                            trash = self.scratch(_name_of(path), 'old')
                            os.rename(path, trash)  # if its owner lives after all, it must not install it
                            _remove(trash)

    def is_abandoned(self, path: Path, name: str) -> bool:
        if path.parent.name == 'old':
            return _age(path) > _GRACE
        is_resumable = _name_of(path) != name and (path / 'journal').exists() and _age(path) < _RESUMABLE
        return not self.is_alive(path) and not is_resumable

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one process at a time work on `name`, if the system can. It only saves work."""
        file: Any = None
        with contextlib.suppress(ImportError, OSError):  # as on Windows, and in a store that can only be read
            import fcntl
            (self.inner / 'locks').mkdir(parents=True, exist_ok=True)
            file = open(self.inner / 'locks' / name, 'ab')
        if file is None:
            yield
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    _say(f"waiting for another process that works on '{name}'")
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # Putting datasets in place

    def install(
            self,
            directory: Path,
            name: str,
            replace: bool,
            receipt: Optional[_Receipt] = None,
    ) -> None:
        """Give a complete staged directory its name. FileExistsError if the name is taken and not `replace`."""
        status = os.lstat(directory)
        path = self.receipt_path(name, status)
        path.parent.mkdir(parents=True, exist_ok=True)
        if receipt:
            new = path.with_name(f'.{path.name}.{os.urandom(4).hex()}')
            new.write_text(receipt.to_json(status.st_mtime_ns))
            os.replace(new, path)
        else:
            _remove(path)  # of an earlier directory, whose inode this one was given
        try:
            _flush(directory)
            _remove(directory.parent / 'journal')  # from here on, nobody may go on with it
            self.move_into_place(directory, self.path(name), replace)
        except BaseException:
            target = self.path(name)
            if not os.path.lexists(target) or os.lstat(target).st_ino != status.st_ino:
                _remove(path)
            raise
        self.drop_traces(name)

    def move_into_place(self, new: Path, target: Path, replace: bool) -> None:
        if replace:
            _make_movable(target)
        while True:
            try:
                if not os.path.lexists(target):
                    os.rename(new, target)
                    return
            except OSError:
                if not os.path.lexists(target):
                    raise
            if not replace:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
            if _swap(new, target):
                self.retire(new)
                return
            if self.replace_by_renames(new, target):
                return

    def replace_by_renames(self, new: Path, target: Path) -> bool:
        """Replace a directory in two renames, where _swap() cannot. False if another process was at work here.

        Between the two, and after a crash there, recover() puts the old one back.
        """
        aside = self.scratch(target.name, 'replaced')
        try:
            os.rename(target, aside)
        except FileNotFoundError:
            return False
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            self.replace_by_removal(new, target)
            return True
        try:
            os.rename(new, target)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                if not os.path.lexists(target):
                    os.rename(aside, target)
                    raise
            if os.path.lexists(aside):  # another process was faster, with another one
                self.retire(aside)
            return False
        self.retire(aside)
        return True

    def replace_by_removal(self, new: Path, target: Path) -> None:
        """Replace a directory of a lower layer of overlayfs, which cannot be renamed."""
        try:
            os.rename(new, target)  # make sure that it can be moved there, before anything is removed
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                raise
            self.supplant(self.successor(target, new), target)

    def successor(self, target: Path, path: Optional[Path] = None) -> Path:
        """Move a directory to a name that tells recover() what it is to supplant.

        Without one, an empty file says that the target is only to be removed.
        """
        successor = self.scratch(target.name, 'successors')
        if path:
            os.rename(path, successor)
        else:
            successor.touch()
        return successor

    def supplant(self, successor: Path, target: Path) -> None:
        """Put a successor in the place of a directory that cannot be renamed.

        It is complete before anything is removed, and recover() goes on if this is killed. While it is there, has()
        knows of no dataset of this name.
        """
        _remove(target)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if os.path.isdir(successor):
                os.rename(successor, target)
            else:
                os.unlink(successor)

    def successors(self, name: str = '*') -> List[Path]:
        return list((self.inner / 'successors').glob(name + '@*'))

    def retire(self, path: Path) -> None:
        """Let those who are reading a replaced directory finish; sweep() removes it."""
        with contextlib.suppress(OSError):
            if not os.path.islink(path):
                os.utime(path)
                os.rename(path, self.scratch(_name_of(path), 'old'))
        _remove(path)

    def recover(self) -> None:
        """Finish what put() and remove() were doing when they were killed."""
        for successor in self.successors():
            target = self.path(_name_of(successor))
            with contextlib.suppress(OSError):
                if not self.is_alive(successor, _GRACE):  # the rename lets one process do it
                    self.supplant(self.successor(target, successor), target)
        with contextlib.suppress(FileNotFoundError):
            for aside in (self.inner / 'replaced').iterdir():
                target = self.path(_name_of(aside))
                with contextlib.suppress(OSError):
                    if not os.path.lexists(target):
                        os.rename(aside, target)
                    elif not self.is_alive(aside):
                        self.retire(aside)

    def drop_traces(self, name: str) -> None:
        """Remove receipts of other directories that had this name, and what was to be installed before."""
        for successor in self.successors(name):
            _remove(successor)
        try:
            current = self.receipt_path(name, os.lstat(self.path(name))).name
        except OSError:
            current = ''
        with contextlib.suppress(OSError):
            for path in (self.inner / 'receipts').iterdir():
                if path.name.rpartition('@')[0] == name and path.name != current:
                    path.unlink()

    def link(self, directory: Path, name: str, replace: bool) -> None:
        """Register a directory, which stays where it is. FileExistsError if the name is taken and not `replace`."""
        self.root.mkdir(parents=True, exist_ok=True)
        new = self.scratch(name) if replace else self.path(name)
        _symlink(directory, new, "'etc register --copy' installs a copy")
        if not replace:
            return
        try:
            self.install(new, name, replace)
        finally:
            _remove(new)

    def remove(self, name: str) -> None:
        path = self.path(name)
        if path.is_symlink():
            path.unlink()
            self.sweep(name)
            return
        _make_movable(path)
        for aside in (self.inner / 'replaced').glob(name + '@*'):  # or recover() would put it back
            self.retire(aside)
        trash = self.scratch(name, 'old')
        try:
            os.rename(path, trash)
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            self.supplant(self.successor(path), path)
        _remove(trash)
        self.drop_traces(name)
        self.sweep(name)

    def keeps_x_bits(self) -> bool:
        """Whether the disk tells executable files from others, as exFAT, NTFS and some network shares do not."""
        with contextlib.suppress(OSError):  # as in a store that can only be read
            for mode in (0o644, 0o755):
                path = self.scratch('x', 'old')
                os.close(os.open(path, _CREATE, mode))
                kept = path.stat().st_mode
                path.unlink()
                if (kept ^ mode) & 0o100:
                    return False
        return True


class _Install:
    """An install under way: a directory to fill, which becomes a dataset of the local store, or vanishes."""

    def __init__(self, home: _Home, name: str, replace: bool, outer: Path) -> None:
        self.home = home
        self.name = name
        self.replace = replace
        self.root = outer / 'new'  # to be filled
        self.journal = outer / 'journal'
        self.earlier = outer / 'earlier'  # what an interrupted install has left
        self.earlier_journal = self.earlier / 'journal'

    def reuse(self, wanted: Iterable[_Segment], transfer: _Transfer) -> Set[str]:
        """Link the wanted segments that any installed dataset has, and return their paths."""
        lacking = {segment.path: segment for segment in wanted}
        reused: Set[str] = set()
        for name, receipt in self.home.receipts(self.name):
            here = {segment.path: segment.digest for segment in receipt.here()}
            same = [segment for segment in lacking.values() if here.get(segment.path) == segment.digest]
            if same:
                linked = self.link_segments(name, same, transfer)
                reused.update(linked)
                lacking = {path: segment for path, segment in lacking.items() if path not in linked}
            if not lacking:
                break
        return reused

    def link_segments(self, name: str, same: Iterable[_Segment], transfer: _Transfer) -> Set[str]:
        """Link some segments of a dataset, keep those whose files hash to what they should, and return their paths."""
        promised = {segment.path: segment for segment in same}
        key = '@' + name
        for segment in promised.values():
            transfer.expect(segment.size, segment.length)
        linked: Set[str] = set()
        with contextlib.suppress(InvalidDataset, OSError):  # as where it is being removed
            os.makedirs(_join(self.root, 'data'), exist_ok=True)
            for _, entries in _segments(self.home.path(name), promised):
                for entry in entries:
                    self.link_entry(entry)
            found = _digest_segments(self.root, promised, transfer.counter(key))  # of what nobody can exchange any more
            linked = {segment.path for segment in found if segment.digest == promised[segment.path].digest}
        for path in promised.keys() - linked:
            self.remove_segment(path)
            transfer.total += promised[path].length
        transfer.watch(key)(sum(segment.size for segment in promised.values()))
        return linked

    def remove_segment(self, path: str) -> None:
        if path != '.':
            _remove(Path(_join(self.root, path)))
            return
        for item in list(os.scandir(self.root)):
            if not item.is_dir(follow_symlinks=False):
                os.unlink(item.path)

    def link_entry(self, entry: _Entry) -> None:
        target = _join(self.root, entry.name)
        if entry.kind == _DIRECTORY:
            os.makedirs(target, exist_ok=True)
        elif entry.kind == _LINK:
            _symlink(_to_os(entry.link), target)
        else:
            _link_or_copy(entry.source, target)

    def commit(self, receipt: Optional[_Receipt] = None) -> bool:
        """Give the directory its name.

        If that is taken and may not be replaced: returns False if that dataset has the same contents, otherwise raises
        Exists.
        """
        try:
            self.home.install(self.root, self.name, self.replace, receipt)
            return True
        except FileExistsError:
            if receipt and self.home.open(self.name)[0].digest == receipt.digest:
                return False
            raise _taken_error(self.name) from None


def _taken_error(name: str, remedy: str = 'choose another name, or -f (force) to replace it') -> Exists:
    return Exists(f"another '{name}' is installed already", remedy)


def _name_of(path: Path) -> str:
    """The name of the dataset for which scratch() made this path."""
    return path.name.partition('@')[0]


def _age(path: Path) -> float:
    """Seconds since a sign of life."""
    newest = os.lstat(path).st_mtime
    with contextlib.suppress(OSError):
        newest = max(newest, os.lstat(path / 'new').st_mtime)
    return time.time() - newest


@functools.lru_cache(maxsize=None)
def _host() -> str:
    """This machine and, on Linux, the container: where a process number means one process."""
    import socket
    node = os.uname().nodename if hasattr(os, 'uname') else socket.gethostname()
    machine = space = ''
    with contextlib.suppress(OSError):
        space = re.sub('[^0-9]', '', os.readlink('/proc/self/ns/pid'))
        with open('/etc/machine-id') as file:
            machine = file.read(8)
    return re.sub('[^A-Za-z0-9-]', '-', f'{node}-{machine}-{space}')


def _flush(directory: Path) -> None:
    """Let the disk hold all of a directory before it gets its name, so that a power cut takes all or nothing."""
    if not hasattr(os, 'sync') or directory.is_symlink():
        return
    try:
        import ctypes
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs  # Linux: only this file system
    except (ImportError, OSError, AttributeError, TypeError):
        os.sync()
        return
    file = os.open(directory, os.O_RDONLY)
    try:
        if syncfs(file) and ctypes.get_errno() in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), directory)
    finally:
        os.close(file)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one step, if the system can: by renameat2 of Linux or renamex_np of macOS."""
    try:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        one_raw, other_raw = os.fsencode(one), os.fsencode(other)
        if sys.platform == 'darwin':
            rename_swap = 2
            return bool(libc.renamex_np(one_raw, other_raw, rename_swap) == 0)
        at_fdcwd = -100
        rename_exchange = 2
        return bool(libc.renameat2(at_fdcwd, one_raw, at_fdcwd, other_raw, rename_exchange) == 0)
    except (ImportError, OSError, AttributeError, TypeError):
        return False


def _make_movable(path: Path) -> None:
    """Let a read-only directory be renamed, which otherwise only root can."""
    with contextlib.suppress(OSError):
        if not os.path.islink(path):
            os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | 0o700)


def _remove(path: Path) -> None:
    """Remove a file, link or tree, if it is there."""
    import shutil
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError:  # read-only directories, or on Windows files
        _make_movable(path)
        for top, directories, files in os.walk(path):
            for name in directories + (files if os.name == 'nt' else []):
                if not os.path.islink(os.path.join(top, name)):
                    os.chmod(os.path.join(top, name), 0o700)
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------
# Stored archives
#
# An archive in a remote, bound to one version of an object. One with an index has known segments, any of which can be
# fetched and verified by itself. One that another tool made is pulled as a whole, and its digest is known afterwards.
#
# No segment is moved that is in its place already: a pull links what any installed dataset has (reuse() in Home), and a
# push lets the remote copy what other archives hold. Names prove nothing: all files are read, and must hash alike.
# ---------------------------------------------------------------------------------------

class _StoredArchive:
    """An archive with an index."""

    def __init__(
            self,
            remote: _Remote,
            obj: _Object,
            tail: bytes,
            segments: Sequence[_Segment],
    ) -> None:
        self.remote = remote
        self.obj = obj
        self.tail = tail  # its last bytes
        self.name = obj.name
        self.segments = segments  # empty while they are not known; neither is the digest then
        self.digest = _dataset_digest(segments) if segments else None
        self.label = f"'{obj.name}' in {remote.url}"

    @contextlib.contextmanager
    def labelled(self) -> Iterator[None]:
        """Say in errors which archive it is that is damaged or unsafe."""
        try:
            yield
        except Corrupt as e:
            remedy = e.remedy or f"'etc push -f {self.name}' from an intact copy repairs it"
            raise Corrupt(f'{self.label}: {e.message}', remedy) from e

    def read(self, start: int, stop: int, watch: Optional[_Watch] = None) -> bytes:
        """Bytes of the archive. Those of the tail are here already."""
        tail_start = self.obj.size - len(self.tail)
        here = self.tail[max(0, start - tail_start):max(0, stop - tail_start)]
        if watch:
            watch(len(here))
        if len(here) == stop - start:
            return here
        data = self.remote.read(self.obj, start, stop - len(here), _after(len(here), watch))
        return data + here if here else data

    def holds(self, digests: Mapping[str, str]) -> bool:
        """Whether it has the segments with these digests, by path, and no others."""
        return {segment.path: segment.digest for segment in self.segments} == digests

    def read_ends(self, segment: _Segment) -> Tuple[bytes, bytes]:
        """The digests of the first and the last block of a segment. Raises Corrupt."""
        start, stop = segment.offset, segment.offset + segment.length
        longest = min(segment.length, _LONGEST_BLOCK)
        blocks = _first_block(self.read(start, start + longest)), _last_block(self.read(stop - longest, stop))
        first, last = [_sha256(_inflate(block)).digest() for block in blocks]
        return first, last

    def has_contents_of(self, local: Dataset, receipt: Optional[_Receipt]) -> Optional[bool]:
        """Whether it holds what is installed; None if only extracting it would tell."""
        return self.digest == local.digest

    def wanted(
            self,
            partitions: Optional[Sequence[str]],
            receipt: Optional[_Receipt] = None,
    ) -> List[_Segment]:
        """The segments that make up these partitions (with None all), and those that are installed already."""
        paths = set(_paths_of(self.name, self.segments, partitions))
        if receipt:
            paths.update(receipt.installed)
        return [segment for segment in self.segments if segment.path in paths]

    def extract(
            self,
            install: _Install,
            wanted: Sequence[_Segment],
            progress: _Progress = None,
    ) -> Set[str]:
        """Fill an install with the wanted segments, and return the paths of those that were here already."""
        transfer = _Transfer(progress, sum(segment.length for segment in wanted), self.remote.connections)
        transfer.report()
        reused = install.reuse(wanted, transfer)
        self.fetch([segment for segment in wanted if segment.path not in reused], install, transfer)
        _validate(install.root, self.label)
        return reused

    def fetch(
            self,
            segments: Sequence[_Segment],
            install: _Install,
            transfer: _Transfer,
    ) -> None:
        """Fetch segments, verify them and write them into an install. What an earlier one left is not fetched again."""
        head = json.dumps([self.remote.url, self.name, self.obj.version])
        sink = _Sink(install.root)
        length = sum(segment.length for segment in segments)
        transfer.limit_connections(length // _MIN_RANGE)
        transfer.expect(length, length)
        with self.labelled(), contextlib.closing(_Journal(install.journal, head)) as journal, \
                _threads(transfer.most) as io_pool, _threads(_cores()) as pool, \
                self.remote.cancelled_on_error(), contextlib.closing(
                    self.blocks(segments, install, head, sink, (io_pool, pool), transfer)) as blocks:
            _extract(blocks, {segment.path: segment for segment in segments}, sink, pool, journal)
            transfer.report()

    def blocks(
            self,
            segments: Sequence[_Segment],
            install: _Install,
            head: str,
            sink: _Sink,
            pools: Tuple[Any, Any],
            transfer: _Transfer,
    ) -> Generator[_Block, None, None]:
        """The blocks of some segments: first what an earlier install has left, then the rest from the remote."""
        io_pool, pool = pools
        had = {segment.path: 0 for segment in segments}
        earlier = install.earlier / 'new'
        sink.reuse_from = os.path.join(str(earlier), '')
        lines = functools.partial(_Journal.read, install.earlier_journal, head)
        with contextlib.closing(_replay(earlier, lines, list(had), pool)) as there:
            for block in there:
                had[block.path] += block.length
                transfer.watch('here')(sum(had.values()))
                transfer.tick()
                yield block
        sink.reuse_from = ''
        _say(f"'{self.name}': {sum(had.values())} bytes of it were here already", _DEBUG)
        rest = [(segment, had[segment.path]) for segment in segments if had[segment.path] < segment.length]
        rest.sort(key=lambda item: item[1] == 0)  # what has begun goes on first
        spans = [(segment.offset + skipped, segment.offset + segment.length) for segment, skipped in rest]
        reader = _Reader(self.read, spans, transfer)
        with contextlib.closing(reader.chunks(io_pool)) as chunks, \
                contextlib.closing(_inflate_blocks(chunks, rest, pool)) as fetched:
            yield from fetched

    def receipt(self, wanted: Iterable[_Segment]) -> _Receipt:
        """Of an install with these segments."""
        return _new_receipt(self.segments, [segment.path for segment in wanted], self.remote.url, self.obj.version)


class _ForeignArchive(_StoredArchive):
    """An archive that another tool made."""

    def has_contents_of(self, local: Dataset, receipt: Optional[_Receipt]) -> Optional[bool]:
        is_same_object = receipt and (receipt.source, receipt.version) == (self.remote.url, self.obj.version)
        return True if is_same_object and receipt and not receipt.is_touched else None

    def wanted(
            self,
            partitions: Optional[Sequence[str]],
            receipt: Optional[_Receipt] = None,
    ) -> List[_Segment]:
        return []  # all

    def extract(
            self,
            install: _Install,
            wanted: Sequence[_Segment],
            progress: _Progress = None,
    ) -> Set[str]:
        transfer = _Transfer(most=self.remote.connections)
        transfer.limit_connections(self.obj.size // _MIN_RANGE)
        reader = _Reader(self.read, [(0, self.obj.size)], transfer)
        # The pool's thread reads the chunks, so it must come to its end before they are closed.
        with self.labelled(), _threads(transfer.most) as io_pool, contextlib.closing(
                reader.chunks(io_pool)) as chunks, _threads(1) as pool, self.remote.cancelled_on_error():
            _extract_foreign(chunks, install.root, pool, progress, self.obj.size)
        _validate(install.root, self.label)
        self.segments = _digest_segments(install.root)
        self.digest = _dataset_digest(self.segments)
        return set()

    def receipt(self, wanted: Iterable[_Segment]) -> _Receipt:
        return super().receipt(self.segments)


def _look_up(remote: _Remote, name: str) -> Optional[_StoredArchive]:
    """The archive of this name; None if there is none."""
    obj, tail = remote.find(name)
    return _open_archive(remote, obj, tail) if obj else None


def _find(remote: _Remote, name: str) -> _StoredArchive:
    archive = _look_up(remote, name)
    if archive is None:
        raise _not_stored_error(remote, name)
    return archive


def _not_stored_error(remote: _Remote, name: str) -> NotFound:
    remedy = 'check the name and the url'
    with contextlib.suppress(_Unlisted):
        names = [other.name for other in remote.list()]
        remedy = _did_you_mean(name, names) or "'etc ls -r' lists what is there"
    return NotFound(f"no dataset '{name}' in {remote.url}", remedy)


def _open_archive(remote: _Remote, obj: _Object, tail: bytes) -> _StoredArchive:
    """Read the index of an archive that ends in `tail`."""
    archive = _ForeignArchive(remote, obj, tail, ())
    with archive.labelled():
        offset = _find_index(tail, obj.size)
        if offset is None:
            head = archive.read(0, min(obj.size, _BLOCK_HEADER_SIZE))
            if head[:_FIELD_OFFSET] == _member(b'et', bytes(4))[:_FIELD_OFFSET]:
                raise Corrupt('the archive is damaged: its index is missing')
            return archive
        segments = _parse_index(archive.read(offset, obj.size), offset)
    return archive if segments is None else _StoredArchive(remote, obj, tail, segments)


def _open_listed(remote: _Remote, obj: _Object) -> _StoredArchive:
    return _open_archive(remote, obj, remote.read_tail(obj))


def _paths_of(
        name: str,
        segments: Iterable[_Segment],
        partitions: Optional[Sequence[str]],
) -> List[str]:
    """The paths of the segments that make up some partitions: the root's files and their own. None means all."""
    if partitions is None:
        return [segment.path for segment in segments]
    known = [segment.partition for segment in segments if segment.partition]
    for partition in partitions:
        if partition not in known:
            raise _unknown_partition_error(partition, name, known)
    return ['.'] + ['data/' + partition for partition in sorted(set(partitions))]


def _new_receipt(
        segments: Sequence[_Segment],
        installed: Iterable[str],
        source: str,
        version: str,
) -> _Receipt:
    return _Receipt(tuple(segments), tuple(sorted(installed)), source, version, _utc(time.time()))


# Pushing

_MIN_SHARED = 32 << 20  # bytes of a dataset above which it pays to look for what other archives share with it
_MIN_COPY = 2 * _MIN_PART  # bytes of an archive that are worth a copy
_MAX_SOURCES = 24  # archives that are looked at
_MAX_CHECKED = 16  # segments of which it is checked that they were copied well


class _Push:
    """A dataset on its way into a remote, which copies what archives there hold already, if it can."""

    def __init__(
            self,
            remote: _Remote,
            local: Dataset,
            survey: _Survey,
            level: int,
            progress: _Progress,
    ) -> None:
        self.remote = remote
        self.local = local
        self.survey = survey
        self.level = level
        self.transfer = _Transfer(progress, survey.size, remote.connections)
        self.segments = _SegmentList()  # of the archive, as far as it is written
        self.copies: Dict[str, _Segment] = {}  # segments that are copied, by path, as they stand in other archives
        self.ranges: Dict[str, _Range] = {}  # runs of them, by the path of the first
        self.ends: Dict[str, Tuple[bytes, bytes]] = {}  # digests of their first and last blocks, as the files have them
        self.transfer.report()

    def find_copies(self) -> None:
        """Find segments that need not be sent. All their files are read, and must hash to what an index says."""
        if not self.remote.can_copy or self.survey.size < _MIN_SHARED:
            return
        archives = self.sources()
        candidates: Dict[str, List[Tuple[_Object, _Segment]]] = {}
        for archive in archives:
            for segment in archive.segments:
                own = self.survey.segments.get(segment.path)
                if own and (own.files, own.size) == (segment.files, segment.size):
                    candidates.setdefault(segment.path, []).append((archive.obj, segment))
        if not candidates:
            return
        size = sum(self.survey.segments[path].size for path in candidates)
        self.transfer.expect(size, size)
        read = _hash_segments(self.survey.listing(candidates), self.transfer.counter('@'))
        self.ends = read.ends
        digests = {segment.path: segment.digest for segment in read.segments}
        is_there = any(archive.obj.name == self.local.name and archive.holds(digests) for archive in archives)
        if not is_there:  # otherwise this push is to repair it
            self.choose_copies({path: [(obj, segment) for obj, segment in found if segment.digest == digests[path]]
                                for path, found in candidates.items()})
        self.transfer.total += size - sum(segment.size for segment in self.copies.values())
        self.transfer.report()

    def sources(self) -> List[_StoredArchive]:
        """The archive of this name, if there is one, and the newest others; but none that cannot be read."""
        def look(obj: _Object) -> Optional[_StoredArchive]:
            with contextlib.suppress(Error, OSError):
                return _open_listed(self.remote, obj)
            return None

        try:
            objects = [obj for obj in self.remote.list() if obj.size >= _MIN_COPY]
        except Error as e:
            _say(f'nothing is copied: {e.message}', _DEBUG)
            return []
        objects.sort(key=lambda obj: (obj.name != self.local.name, -obj.modified))
        with _threads(self.transfer.connections) as pool, self.remote.cancelled_on_error(), self.remote.briefly():
            return list(filter(None, _ordered(pool, look, objects[:_MAX_SOURCES], _MAX_SOURCES)))

    def choose_copies(self, same: Mapping[str, Sequence[Tuple[_Object, _Segment]]]) -> None:
        """Choose from where segments are copied: in long runs.

        same: by path, where these contents stand.
        """
        runs: List[Tuple[_Object, List[_Segment]]] = []
        end: Optional[Tuple[_Object, int]] = None  # of a run that may go on: the object, and the offset
        for path in self.survey.segments:
            found = same.get(path)
            if not found:
                end = None
                continue
            following = [(obj, segment) for obj, segment in found if (obj, segment.offset) == end]
            obj, segment = (following or found)[0]
            if not following:
                runs.append((obj, []))
            runs[-1][1].append(segment)
            end = obj, segment.offset + segment.length
        for obj, run in runs:
            span = _Range(obj, run[0].offset, run[-1].offset + run[-1].length)
            if span.length >= _MIN_COPY:
                self.ranges[run[0].path] = span
                self.copies.update((segment.path, segment) for segment in run)

    def write(self, exclusive: bool) -> None:
        """Write the archive. Raises _NameTaken if there is one already and `exclusive`."""
        def archive() -> Iterator[_Chunk]:
            for chunk in packed:
                if not isinstance(chunk, _Segment):
                    yield chunk
                elif chunk.path in self.ranges:
                    yield self.ranges[chunk.path]
            digest = self.segments.digest()
            if self.local._digest and self.local._digest != digest:
                raise Corrupt(f"the files of '{self.local.name}': expected digest {self.local._digest}, found {digest}",
                              f"'etc verify {self.local.name}' tells more")
            yield _archive_end(self.level, self.segments)

        self.transfer.start_clock()
        with _threads(_cores()) as pool, contextlib.closing(_pack(
                self.survey, self.level, pool, self.segments, self.transfer, self.copies)) as packed:
            try:
                self.remote.write(self.local.name, archive(), self.survey.limit, exclusive, self.transfer)
            except _Unconfirmed as e:
                if not self.is_there():
                    raise e

    def is_there(self) -> bool:
        """Whether the remote shows an archive with this digest under this name."""
        try:
            archive = _look_up(self.remote, self.local.name)
            return archive is not None and archive.digest == self.segments.digest()
        except (RemoteError, Corrupt):
            return False

    def damaged_copy(self) -> Optional[_Object]:
        """The archive that was written, if what was copied begins or ends otherwise than the files do.

        None also if it was replaced meanwhile.
        """
        obj, tail = self.remote.find(self.local.name)
        if obj is None:
            return None
        try:
            archive = _open_archive(self.remote, obj, tail)
        except Corrupt:
            return obj
        if archive.digest != self.segments.digest():
            return None
        copied = [segment for segment in archive.segments if segment.path in self.copies]
        some = copied[::-(-len(copied) // _MAX_CHECKED)]
        with _threads(self.transfer.connections) as pool, self.remote.cancelled_on_error():
            is_same = functools.partial(self.has_ends_of, archive)
            return None if all(_ordered(pool, is_same, some, self.transfer.connections)) else obj

    def has_ends_of(self, archive: _StoredArchive, segment: _Segment) -> bool:
        with contextlib.suppress(Corrupt):
            return archive.read_ends(segment) == self.ends[segment.path]
        return False


def _remove_damaged(remote: _Remote, obj: _Object, exclusive: bool) -> None:
    """Remove an archive, or a later push would take it for one that is there already."""
    try:
        remote.remove(obj)
    except RemoteError as e:
        if exclusive:
            raise Corrupt(f"what {remote.url} copied for '{obj.name}' is damaged, and cannot be removed: {e.message}",
                          f"'etc push -f {obj.name}' replaces it") from None


def _write_archive(
        remote: _Remote,
        local: Dataset,
        exclusive: bool,
        level: int,
        progress: _Progress,
) -> _Push:
    """Pack a dataset into the remote. Raises _NameTaken if there is an archive of that name already and `exclusive`."""
    survey = _survey(local.root)
    push = _Push(remote, local, survey, level, progress)
    push.find_copies()
    if push.ranges:
        reason = 'what was copied is damaged'
        try:
            push.write(exclusive)
            damaged = push.damaged_copy()
        except RemoteError as e:
            if e.status < 400 and not isinstance(e, _CannotCopy):
                raise
            reason = e.message
        else:
            if not damaged:
                return push
            _remove_damaged(remote, damaged, exclusive)
        _say(f'nothing is copied, so all is sent: {reason}', _DEBUG)
        push = _Push(remote, local, survey, level, progress)
    push.write(exclusive)
    return push


# ---------------------------------------------------------------------------------------
# API
#
# What programs call, and what each command does. Every function takes its settings as `config`, and raises only Error.
# ---------------------------------------------------------------------------------------

@_api
def ls(
        remote: bool = False,
        config: Optional[Config] = None,
        patterns: Optional[Sequence[str]] = None,
) -> List[str]:
    """The names of the local datasets, or of those in the remote storage, sorted. Raises Error.

    patterns: only names that match one of these, as in a shell: *, ?, [seq], [!seq]. None means all.
    """
    if isinstance(patterns, str):
        raise ConfigError("'patterns' must be a list")
    config = config or Config.load()
    if not remote:
        return [name for name in _Home(config.home).names() if _matches(name, patterns)]
    with contextlib.closing(_open_remote(config)) as store:
        return sorted(obj.name for obj in store.list() if _matches(obj.name, patterns))


def _matches(name: str, patterns: Optional[Sequence[str]]) -> bool:
    import fnmatch
    try:
        return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    except re.error:  # up to Python 3.11, from a range without characters, [z-a]
        return False


@_api
def info(
        name: str,
        remote: bool = False,
        config: Optional[Config] = None,
        progress: _Progress = None,
) -> Dict[str, Any]:
    """What is known of a dataset; of a remote one without downloading its data.

    Keys: name, digest, files, size (bytes), partitions ({name: {'files', 'size'}}), meta, readme; of a local dataset
    also root, source, when, partial; of a remote one archive_size (bytes) and when. Values that only a download would
    tell are None: in an archive that another tool made, and meta and readme if the top-level files are large.
    progress: as for verify(), if all files must be read, because nothing else knows a local dataset's digest.
    Raises NotFound and other Errors.
    """
    config = config or Config.load()
    name, pin = _parse_name(name)
    if remote:
        with contextlib.closing(_open_remote(config)) as store:
            summary = _describe_remote(_find(store, name), with_readme=True)
    else:
        home = _Home(config.home)
        if not home.has(name):
            raise _not_installed_error(home, name)
        summary = _describe_local(home, name, measure=True, progress=progress)
        root = home.path(name)
        summary.update(meta=_read_meta(root), readme=_read_readme(root))
    _check_pin(name, pin, summary['digest'])
    return summary


def _summary(
        name: str,
        digest: Optional[str],
        segments: Sequence[_Segment],
        **more: Any
) -> Dict[str, Any]:
    """What info() and _list() tell of all datasets. segments: empty if they are not known."""
    summary: Dict[str, Any] = {'name': name, 'digest': digest, 'files': None, 'size': None, 'partitions': None}
    if segments:
        summary['files'] = sum(segment.files for segment in segments)
        summary['size'] = sum(segment.size for segment in segments)
        summary['partitions'] = {segment.partition: segment.amount() for segment in segments if segment.partition}
    summary.update(more)
    return summary


def _describe_local(
        home: _Home,
        name: str,
        measure: bool,
        progress: _Progress = None,
) -> Dict[str, Any]:
    """From the receipt; without one, if `measure`, from the files."""
    receipt = home.open(name, progress)[1] if measure else home.receipt(name)
    path = home.path(name)
    source = receipt.source if receipt else None
    if path.is_symlink():
        source = Path(os.path.realpath(path)).as_uri()
    digest = receipt.digest if receipt and not receipt.is_touched else None
    segments = receipt.here() if receipt else []
    if not digest and measure:
        segments = _digest_segments(path, progress=progress)
        digest = _dataset_digest(segments)
    return _summary(name, digest, segments, root=str(path), source=source, when=receipt.when if receipt else None,
                    partial=bool(receipt and receipt.is_partial))


def _describe_remote(archive: _StoredArchive, with_readme: bool = False) -> Dict[str, Any]:
    obj = archive.obj
    when = _utc(obj.modified) or None if obj.modified else None
    summary = _summary(obj.name, archive.digest, archive.segments, archive_size=obj.size, when=when, meta=None,
                       readme=None)
    root_files = archive.segments[:1]
    if with_readme and root_files:
        if max(root_files[0].length, root_files[0].size) <= _META_LIMIT + _README_LIMIT:
            import tempfile
            with tempfile.TemporaryDirectory() as scratch:
                install = _Install(_Home(Path(scratch)), obj.name, False, Path(scratch))  # which is never committed
                install.root.mkdir()
                archive.fetch(root_files, install, _Transfer())
                summary.update(meta=_read_meta(install.root, archive.label), readme=_read_readme(install.root))
    return summary


@_api
def _list(remote: bool, config: Config, patterns: Optional[Sequence[str]] = None) -> List[Dict[str, Any]]:
    """As ls(), with what `etc ls -l` shows."""
    if not remote:
        home = _Home(config.home)
        names = ls(config=config, patterns=patterns)
        return [_describe_local(home, name, measure=False) for name in names]

    def describe(obj: _Object) -> Dict[str, Any]:
        try:
            return _describe_remote(_open_listed(store, obj))
        except (Error, OSError) as e:  # one that cannot be read must not hide the others
            _say(str(e), _WARNING)
            return _summary(obj.name, None, (), archive_size=obj.size, when=None)

    with contextlib.closing(_open_remote(config)) as store:
        objects = sorted(obj for obj in store.list() if _matches(obj.name, patterns))
        with _threads(min(config.connections, len(objects) or 1)) as pool, store.cancelled_on_error():
            return list(_ordered(pool, describe, objects, 2 * config.connections))


def _not_installed_error(home: _Home, name: str, remedy: str = '') -> NotFound:
    return NotFound(f"no local dataset '{name}'",
                    _did_you_mean(name, home.names()) or remedy or f"'etc pull {name}' would fetch it")


def _partial_error(name: str, missing: Iterable[str]) -> NotFound:
    return NotFound(f"'{name}' is only partly installed, without {', '.join(missing)}",
                    f"'etc pull {name}' fetches the rest")


def _check_pin(name: str, pin: Optional[str], digest: Optional[str]) -> None:
    """Raises Corrupt if NAME@sha256:... insists on other contents."""
    if pin and digest != pin:
        raise Corrupt(f"'{name}': expected digest {pin}, found {digest or 'none, as another tool packed it'}")


def _check_partitions(partitions: Optional[Sequence[str]]) -> None:
    if isinstance(partitions, str) or partitions is not None and not partitions:
        raise InvalidDataset('partitions must be a list of one or more names')


@_api
def diff(
        a: str,
        b: str,
        remote: Union[bool, Tuple[bool, bool]] = False,
        files: bool = False,
        config: Optional[Config] = None,
        progress: _Progress = None,
) -> Dict[str, Any]:
    """How dataset `b` differs from dataset `a`, without downloading any data.

    a, b: NAME, or NAME@sha256:... to insist on these contents. Of a partial dataset, what is not installed counts, too.
    remote: whether they are in the remote storage: both, or a pair, such as (False, True) for `b` alone.
    files: compare the files, too, which takes two local datasets. progress: as for info(), for each of these readings.
    Keys: equal; a, b ({'name', 'remote', 'digest'}); segments ({path: {'status', 'a', 'b'}}), with the path '.' for the
    root's files, a directory, or data/<partition>, the status 'same', 'differs', 'new' (not in `a`) or 'gone' (not in
    `b`), a and b {'files', 'size'} or None; files, if compared, alike, with {'size', 'link', 'executable'} or None, but
    only what is not the same. Raises NotFound, Corrupt if a digest is another one, and other Errors.
    """
    config = config or Config.load()
    remotes = (remote, remote) if isinstance(remote, bool) else remote
    if files and any(remotes):
        raise ConfigError('only local datasets can be compared file by file', 'pull the remote one first')
    home = _Home(config.home)
    sides = [('a', *_parse_name(a), remotes[0]), ('b', *_parse_name(b), remotes[1])]
    for _, name, _, is_remote in sides:
        if not is_remote and not home.has(name):
            raise _not_installed_error(home, name)
    found: Dict[str, Any] = {'equal': None, 'a': None, 'b': None}
    known: Dict[str, Dict[str, _Segment]] = {}
    for side, name, pin, is_remote in sorted(sides, key=lambda item: not item[3]):  # first what takes no time
        segments = _remote_segments(config, name) if is_remote else _local_segments(home, name, progress)
        known[side] = {segment.path: segment for segment in segments}
        found[side] = {'name': name, 'remote': is_remote, 'digest': _dataset_digest(segments)}
        _check_pin(name, pin, found[side]['digest'])
    found['segments'] = {path: _contrast(known['a'].get(path), known['b'].get(path), _Segment.amount,
                                         lambda one, other: one.digest == other.digest)
                         for path in sorted({**known['a'], **known['b']}, key=_segment_order)}
    unlike = [path for path, row in found['segments'].items() if row['status'] != 'same']
    found['equal'] = not unlike
    total = sum(known['a'][path].size for path in unlike if path in known['a'])
    found['files'] = _compare_files(home, [name for _, name, _, _ in sides], unlike, progress, total) if files else None
    return found


def _remote_segments(config: Config, name: str) -> Sequence[_Segment]:
    with contextlib.closing(_open_remote(config)) as store:
        archive = _find(store, name)
    if not archive.segments:
        raise Error(f'{archive.label} was packed by another tool, and has no index to compare',
                    f"run 'etc pull {name}', and compare what that installs")
    return archive.segments


def _local_segments(home: _Home, name: str, progress: _Progress) -> Sequence[_Segment]:
    """Of the whole dataset, from its receipt; otherwise from the files, and of what is not installed from the receipt.
    """
    _, receipt = home.open(name, progress)
    if receipt and not receipt.is_touched:
        return receipt.segments
    known = [segment for segment in receipt.segments if segment.path not in receipt.installed] if receipt else []
    known += _digest_segments(home.path(name), progress=progress)
    return sorted({segment.path: segment for segment in known}.values(), key=lambda one: _segment_order(one.path))


def _contrast(a: Any, b: Any, describe: Callable[[Any], Any], is_same: Callable[[Any, Any], bool]) -> Dict[str, Any]:
    """What diff() tells of what has one path in both datasets; None where there is nothing."""
    status = 'new' if a is None else 'gone' if b is None else 'same' if is_same(a, b) else 'differs'
    return {'status': status, 'a': None if a is None else describe(a), 'b': None if b is None else describe(b)}


def _compare_files(
        home: _Home,
        names: Sequence[str],
        paths: Sequence[str],
        progress: _Progress,
        total: int,
) -> Dict[str, Any]:
    """What diff() tells of files in these segments of two local datasets. total: bytes of them in the first one."""
    import heapq
    listings = []
    for name in names:
        receipt = home.receipt(name)
        known = [segment.path for segment in receipt.segments if segment.path in paths] if receipt else []
        if receipt and receipt.missing(known):
            raise _partial_error(name, receipt.missing(known))
        listings.append(dict(_segments(home.path(name), paths)))

    def pairs() -> Iterator[Tuple[str, Optional[_Entry], Optional[_Entry]]]:  # of millions, which it does not keep
        for path in paths:
            both = [zip(itertools.repeat(side), listing.get(path, ())) for side, listing in enumerate(listings)]
            merged = heapq.merge(*both, key=lambda item: item[1].name.rstrip('/').split('/'))
            for name, items in itertools.groupby(merged, lambda item: item[1].name):
                pair = dict(items)
                yield name, pair.get(0), pair.get(1)

    def describe(entry: _Entry) -> Dict[str, Any]:
        return {'size': None if entry.kind == _DIRECTORY else entry.size, 'link': entry.link or None,
                'executable': entry.kind == _FILE and entry.mode == 0o755}

    def is_same(a: _Entry, b: _Entry) -> bool:
        spans = ((start, min(start + _BLOCK, a.size)) for start in range(0, a.size, _BLOCK))
        return a[:-1] == b[:-1] and all(_read_file(a, *span) == _read_file(b, *span) for span in spans)

    compared = _reported(pairs(), lambda item: item[1].size if item[1] else 0, progress, total)
    rows = ((name, _contrast(a, b, describe, is_same)) for name, a, b in compared)
    return {name: row for name, row in rows if row['status'] != 'same'}


@_api
def dataset(
        name: str,
        auto_install: bool = False,
        partitions: Optional[Sequence[str]] = None,
        config: Optional[Config] = None,
        progress: _Progress = None,
        auto_pull: bool = False,
) -> Dataset:
    """The installed dataset `name`; with `auto_install`, it is pulled first if necessary.

    name: NAME, or NAME@sha256:... to insist on these contents.
    partitions: those that must be there; None means all.
    progress: as for pull().
    auto_pull: the name of `auto_install` in etcetera 0.0.x.
    Raises NotFound, UnknownPartition, Corrupt if the digest is another one, and other Errors.
    """
    _check_partitions(partitions)
    config = config or Config.load()
    bare, pin = _parse_name(name)
    home = _Home(config.home)
    is_installed = home.has(bare)
    receipt = home.receipt(bare)
    missing = receipt.missing(_paths_of(bare, receipt.segments, partitions)) if receipt else []
    if (auto_install or auto_pull) and (not is_installed or missing):
        return _pull(name, False, partitions, config, progress)
    if not is_installed:
        raise _not_installed_error(home, bare)
    local, _ = home.open(bare)
    if pin:
        _check_pin(bare, pin, local.digest)
    for partition in partitions or ():
        local[partition]  # raises UnknownPartition
    if missing:
        raise _partial_error(bare, missing)
    return local


@_api
def pull(
        name: str,
        force: bool = False,
        partitions: Optional[Sequence[str]] = None,
        config: Optional[Config] = None,
        progress: _Progress = None,
) -> Dataset:
    """Install a remote dataset, or some of its partitions, and return it; verified, or not at all.

    name: NAME, or NAME@sha256:... to insist on these contents.
    force: replace other contents of that name.
    progress: is called with (done, total), bytes of the archive, in the thread that called pull(), at most some hundred
        times a second; what it raises ends the pull.
    What a partial install has already is not fetched again.
    Raises NotFound, Exists, UnknownPartition, Corrupt, RemoteError and other Errors.
    """
    _check_partitions(partitions)
    return _pull(name, force, partitions, config or Config.load(), progress)


def _pull(
        name: str,
        force: bool,
        partitions: Optional[Sequence[str]],
        config: Config,
        progress: _Progress,
) -> Dataset:
    name, pin = _parse_name(name)
    started = time.monotonic()
    home = _Home(config.home)
    with contextlib.closing(_open_remote(config)) as store, home.lock(name):
        archive = _find(store, name)
        if archive.digest:
            _check_pin(name, pin, archive.digest)
        wanted = archive.wanted(partitions)
        is_same: Optional[bool] = None
        if home.has(name) and not force:
            local, receipt = home.open(name)
            is_same = archive.has_contents_of(local, receipt)
            if is_same is False:
                raise _taken_error(name, f"'etc pull -f {name}' replaces it")
            if is_same and not (receipt and receipt.missing(segment.path for segment in wanted)):
                if pin:
                    _check_pin(name, pin, local.digest)
                _say(f"'{name}' is installed already, and identical")
                return local
            wanted = archive.wanted(partitions, receipt)
        with home.installing(name, replace=force or bool(is_same)) as install:
            reused = archive.extract(install, wanted, progress)
            _check_pin(name, pin, archive.digest)
            new = archive.receipt(wanted)
            is_new = install.commit(new)
        if is_new:
            _say(f'pulled {name}: {_tally(new.here(), started, reused)}')
        else:
            _say(f"'{name}' is installed already, and identical")
        _say(f'{name}@{archive.digest}', _DEBUG)
        return Dataset(home.path(name), name, archive.digest)


def _tally(segments: Sequence[_Segment], started: float, reused: Iterable[str] = (), place: str = 'here') -> str:
    """How much was done, how fast, and how much was in its place already: the segments with the paths `reused`."""
    size = sum(segment.size for segment in segments)
    had = sum(segment.size for segment in segments if segment.path in reused)
    seconds = max(time.monotonic() - started, 0.001)
    files = _plural(sum(segment.files for segment in segments), 'file')
    more = f'; {_size(had)} were {place} already' if had else f' ({_size(size / seconds)}/s)'
    return f'{files}, {_size(size)} in {_duration(seconds)}{more}'


@_api
def push(
        name: str,
        force: bool = False,
        config: Optional[Config] = None,
        progress: _Progress = None,
) -> str:
    """Share a local dataset. Returns its digest.

    name: NAME, or NAME@sha256:... to insist on these contents.
    force: replace other contents of that name in the remote storage.
    progress: as for pull(), but of the bytes of the files whose part of the archive has been sent.
    Raises NotFound, Exists, InvalidDataset, Corrupt, RemoteError and other Errors.
    """
    config = config or Config.load()
    name, pin = _parse_name(name)
    started = time.monotonic()
    home = _Home(config.home)
    if not home.has(name):
        raise _not_installed_error(home, name, f"'etc register DIR {name}' gives a directory that name")
    local, receipt = home.open(name)
    if receipt and receipt.is_partial:
        raise InvalidDataset(f"'{name}' is only partly installed, so it cannot be pushed",
                             f"'etc pull {name}' fetches the rest")
    if pin:
        _check_pin(name, pin, local.digest)
    with contextlib.closing(_open_remote(config)) as store:
        if not force and _is_stored_already(store, local, receipt):
            return local.digest
        try:
            pushed = _write_archive(store, local, not force, config.compression_level, progress)
        except _NameTaken:
            _explain_taken(store, local, receipt)
            return local.digest
    segments = pushed.segments
    _say(f"pushed {name} to {store.url}: {_tally(segments.segments, started, pushed.copies, 'there')}")
    _say(f'{name}@{segments.digest()}', _DEBUG)
    return segments.digest()


def _is_stored_already(
        store: _Remote,
        local: Dataset,
        receipt: Optional[_Receipt],
) -> Optional[bool]:
    """Whether the remote has this very dataset; None if it may not look, but the condition of the write decides.

    Raises Exists if it has another one of that name.
    """
    try:
        archive = _look_up(store, local.name)
    except RemoteError as e:
        if e.status == 403 and store.has_exclusive_write:
            return None
        raise
    if archive is None:
        return False
    if not archive.has_contents_of(local, receipt):
        raise Exists(f"another '{local.name}' is in {store.url} already",
                     f"push it under another name, or 'etc push -f {local.name}' replaces it")
    _say(f"'{local.name}' is in {store.url} already, and identical")
    return True


def _explain_taken(store: _Remote, local: Dataset, receipt: Optional[_Receipt]) -> None:
    """After a write that was refused because of the name: raises an error, unless this very dataset is there."""
    is_stored = _is_stored_already(store, local, receipt)
    if is_stored is None:
        raise Exists(f"'{local.name}' is in {store.url} already, and these credentials cannot read it to "
                     'compare', 'push it under another name') from None
    if not is_stored:
        raise RemoteError(f"another push of '{local.name}' to {store.url} is under way",
                          'try again when it has ended') from None


@_api
def register(
        directory: _Path,
        name: Optional[str] = None,
        force: bool = False,
        copy: bool = False,
        config: Optional[Config] = None,
        progress: _Progress = None,
) -> Dataset:
    """Give a directory a dataset's name, by default its own. It stays where it is, and must not change any more.

    copy: install a private read-only copy instead of a link.
    force: replace a local dataset of that name.
    progress: as for pull(), but of the bytes of the files that have been copied.
    Raises InvalidDataset, Exists and other Errors.
    """
    config = config or Config.load()
    root = Path(os.path.realpath(_check_path(directory)))
    _check_arguments_order(root, name)
    if name is None:
        _validate(root)  # first, or a part of a URL might be taken for a name, and shown
    name, pin = _parse_name(root.name if name is None else name)
    local = Dataset(root, name)
    if pin:
        _check_pin(name, pin, local.digest)
    home = _Home(config.home)
    installed = os.path.realpath(home.path(name))
    is_inside = root == Path(installed) or Path(installed) in root.parents
    if is_inside and not copy and not home.path(name).is_symlink():
        raise InvalidDataset(f"{root} is what is installed as '{name}'", 'use --copy, or another directory')
    if home.has(name) and not force:
        if not copy and installed == str(root):
            _say(f"'{name}' is registered already")
            return Dataset(home.path(name), name)
        raise _taken_error(name)
    if copy:
        return _install_copy(home, name, root, force, progress)
    try:
        with home.changes():
            home.link(root, name, force)
    except FileExistsError:
        raise _taken_error(name) from None
    _say(f"registered '{name}': {root}")
    return Dataset(home.path(name), name)


def _check_arguments_order(root: Path, name: Optional[str]) -> None:
    """As in `etc register NAME DIR`."""
    if name is not None and not _is_name(name) and not root.exists() and os.path.isdir(name):
        raise InvalidDataset(f'no directory {_masked(str(root))}',
                             f"the directory comes first: 'etc register {name} {_masked(root.name)}'")


def _install_copy(home: _Home, name: str, root: Path, force: bool, progress: _Progress) -> Dataset:
    """Copy a dataset as if it had been pushed and pulled."""
    started = time.monotonic()
    survey = _survey(root)

    def blocks() -> Iterator[_Block]:
        for block in processed:
            yield _Block(block.plan.path, 0, block.result, block.digest)

    with home.installing(name, force) as install:
        with _threads(_cores()) as pool, contextlib.closing(
                _process(survey.listing(), bytes, pool, progress, survey.size)) as processed:
            segments = _extract(blocks(), None, _Sink(install.root), pool)
        install.commit(_new_receipt(segments, [segment.path for segment in segments], root.as_uri(), ''))
    _say(f'copied {name}: {_tally(segments, started)}')
    return Dataset(home.path(name), name)


@_api
def create(
        name: str,
        partitions: Sequence[str] = ('train', 'test'),
        force: bool = False,
        config: Optional[Config] = None,
) -> Dataset:
    """Make a local dataset with empty partitions, to be filled. Raises InvalidDataset, Exists and other Errors."""
    config = config or Config.load()
    name, pin = _parse_name(name)
    if pin:
        raise InvalidDataset('a dataset that is yet to be filled has no digest to insist on', 'give only its name')
    _check_partitions(partitions or ())
    for partition in partitions:
        if not _is_safe(partition) or '/' in partition or not _is_utf8(partition):
            raise InvalidDataset(f"'{_masked(partition)}' cannot be a partition's name", 'it becomes a directory')
    home = _Home(config.home)
    with home.installing(name, force) as install:
        for partition in set(partitions):
            os.makedirs(_join(install.root, 'data/' + partition))
        install.commit()
    _say(f"created '{name}'; now fill {home.path(name) / 'data'}")
    return Dataset(home.path(name), name)


@_api
def verify(name: str, config: Optional[Config] = None, progress: _Progress = None) -> str:
    """Read all files of a local dataset and return their digest.

    Raises Corrupt if they are not what was pulled or copied, or not what NAME@sha256:... insists on. A registered or
    created dataset has nothing to be compared with.
    progress: as for pull(), but of the bytes of the files that have been read.
    """
    config = config or Config.load()
    name, pin = _parse_name(name)
    started = time.monotonic()
    home = _Home(config.home)
    if not home.has(name):
        raise _not_installed_error(home, name)
    _, receipt = home.open(name)
    found = _digest_segments(home.path(name), progress=progress)
    digest = _dataset_digest(found)
    outcome = 'nothing known to compare it with'
    if receipt:
        _compare(home, name, receipt, found)
        digest = receipt.digest
        outcome = 'partly installed, and unchanged' if receipt.is_partial else 'complete and unchanged'
    _check_pin(name, pin, digest)
    if pin:
        outcome = 'the expected digest'
    _say(f'verified {name}: {outcome}; {_tally(found, started)}')
    _say(f'{name}@{digest}', _DEBUG if receipt else _INFO)
    return digest


def _compare(home: _Home, name: str, receipt: _Receipt, found: Iterable[_Segment]) -> None:
    """Raises Corrupt unless the files are what was installed."""
    digests = {segment.path: segment.digest for segment in found}
    promised = {segment.path: segment.digest for segment in receipt.here()}
    wrong = sorted(path for path in set(digests) | set(promised) if digests.get(path) != promised.get(path))
    if not wrong:
        return
    remedy = f"'etc pull -f {name}' repairs it" if receipt.version else 'register it again'
    if not home.keeps_x_bits():
        remedy = "this disk does not keep executable bits; set 'home' to a place on another"
    verb = 'differs' if len(wrong) == 1 else 'differ'
    raise Corrupt(f"'{name}' is not what was installed: {', '.join(wrong)} {verb}", remedy)


@_api
def purge(name: str, config: Optional[Config] = None, *, remote: bool = False) -> None:
    """Remove a local dataset, or, without asking, one in the remote storage. A registered directory is not touched.

    name: NAME, or NAME@sha256:... to insist on these contents.
    remote: by keyword only, so that no call that was meant for the local store can reach what others share.
    Raises NotFound, Corrupt, RemoteError if it was replaced meanwhile, and other Errors.
    """
    config = config or Config.load()
    if remote:
        _purge_remote(name, config)
        return
    name, pin = _parse_name(name)
    home = _Home(config.home)
    if not home.has(name):
        raise _not_installed_error(home, name, "'etc ls' lists what there is")
    if pin:
        _check_pin(name, pin, home.open(name)[0].digest)
    with home.changes():
        home.remove(name)
    _say(f"purged '{name}'")


@_api
def _purge_remote(name: str, config: Config, confirm: Optional[Callable[[str], None]] = None) -> None:
    """Remove the version of a remote dataset that is there now.

    confirm: is called with a description of it before, and may raise an Error.
    """
    name, pin = _parse_name(name)
    with contextlib.closing(_open_remote(config)) as store:
        store.check_writable()
        if pin:
            archive = _find(store, name)
            _check_pin(name, pin, archive.digest)
        obj = archive.obj if pin else store.stat(name)  # which finds damaged archives, too
        if obj is None:
            raise _not_stored_error(store, name)
        if confirm:
            confirm(f"'{name}' ({_size(obj.size)}) in {store.url}")
        is_kept = store.remove(obj)
    _say(f"purged '{name}' from {store.url}" + ', which keeps it as an old version' * is_kept)


# ---------------------------------------------------------------------------------------
# Command line
#
# Each command parses its arguments, calls one function of the API, and prints what that returns.
# ---------------------------------------------------------------------------------------

_README_LINES = 20  # that `etc info` shows
_COMPLETION_TIMEOUT = 3  # seconds that shell completion waits for names


def _version_line() -> str:
    return f'etcetera {__version__} (Python {sys.version.split()[0]}, {_deflater()})'


def _parser(argv: Sequence[str] = ()) -> Any:
    """The parser of a command line: of all commands, unless this one names some, since to make all takes its time."""
    import argparse
    is_help = any(re.match('-[a-z]*h|--he', word) for word in argv)

    # Without a width, argparse loads modules to ask how wide the terminal is, even where it shows no help.
    formatter: Any = functools.partial(argparse.RawDescriptionHelpFormatter, width=None if is_help else 80)

    class Parser(argparse.ArgumentParser):
        """Also keeps what completion and the overview need."""

        what = ''
        examples: Sequence[Tuple[str, str]] = ()
        completes = ''  # whether its arguments are 'local', 'remote' or, with -r before each remote one, 'either' names
        commands: Any  # argparse's action that holds the commands

        def __init__(self, **kwargs: Any) -> None:
            self.flags: List[str] = []
            self.flags_with_value: List[str] = []
            super().__init__(formatter_class=formatter, **kwargs)

        def add_argument(self, *args: Any, **kwargs: Any) -> Any:
            action = super().add_argument(*args, **kwargs)
            self.flags += action.option_strings
            if action.nargs is None:
                self.flags_with_value += action.option_strings
            return action

        def error(self, message: str) -> Any:
            unknown = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
            if unknown:
                self.fail(f"no command '{unknown.group(1)}'", _did_you_mean(unknown.group(1), _COMMANDS))
            self.fail(message.replace('the following arguments are required:', f"'{self.prog}' needs"))

        def fail(self, message: str, remedy: str = '') -> None:
            _console.show(Error(_masked(message), f"{remedy} '{self.prog} -h' shows how".lstrip()))
            sys.exit(2)

    parser = Parser(prog='etc', description='Share immutable datasets through cloud storage.',
                    epilog="For help on a command, run 'etc COMMAND -h'.")
    parser.set_defaults(config=None, url=None, home=None, quiet=False, verbose=False, names=[None])
    wants_version = any(word.startswith('--vers') for word in argv)
    parser.add_argument('--version', action='version', version=_version_line() if wants_version else '')
    parser.commands = parser.add_subparsers(prog='etc', dest='command', metavar='COMMAND')
    named = () if is_help else _COMMANDS.keys() & set(argv)
    for name in named or _COMMANDS:
        _COMMANDS[name](functools.partial(_add_command, parser.commands, name))
    for each in (parser, *parser.commands.choices.values()):
        _add_common_flags(each)
    return parser


_AddCommand = Callable[..., Any]


def _add_command(
        commands: Any,
        name: str,
        words: str,
        what: str,
        run: Callable[..., Optional[int]],
        examples: Sequence[Tuple[str, str]],
) -> Any:
    """Add a command. words: its arguments. what: it does. run: does it, with (args, name, config).

    run() may return an exit status.
    """
    lines = [f'  {example:33}  {note}'.rstrip() for example, note in examples]
    command = commands.add_parser(
        name, help=what, usage=f'etc {name} {words} [options]'.replace('  ', ' '),
        description=what[0].upper() + what[1:] + '.', epilog='examples:\n' + '\n'.join(lines))
    command.what = what
    command.examples = examples
    command.set_defaults(run=run)
    return command


def _add_common_flags(parser: Any) -> None:
    """The flags that may precede a command or follow it."""
    import argparse
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)

    add('--config', metavar='FILE', help='settings file, instead of $ETC_CONFIG or ~/.etc.yaml')
    add('--url', help='where datasets are shared, instead of $ETC_URL or the settings')
    add('--home', metavar='DIR', help='local store, instead of $ETC_HOME, the settings or ~/.etc')
    add('-q', '--quiet', action='store_true', help='show nothing but errors')
    add('-v', '--verbose', action='store_true', help='show more, with a traceback of an error')


def _add_force(command: Any) -> None:
    command.add_argument('-f', '--force', action='store_true', help='replace a different dataset of that name')


def _add_remote(command: Any) -> None:
    command.add_argument('-r', '--remote', action='store_true', help='in the remote storage')


def _add_json(command: Any) -> None:
    command.add_argument('--json', action='store_true', help='as JSON')


# The commands: for each, what argparse is to know, and what to do

def _add_register(add: _AddCommand) -> None:
    command = add('DIR [as] [NAME]', 'give a directory a name', _run_register, [
        ('etc register ./digits MNIST', 'it stays where it is'),
        ('etc register ./digits as MNIST', 'the same'),
        ('etc register --copy ./digits MNIST', 'install a read-only copy of it')])
    command.add_argument('words', nargs='+', metavar='DIR')
    _add_force(command)
    command.add_argument('--copy', action='store_true', help='install a read-only copy instead of a link')


def _run_register(args: Any, _: None, config: Config) -> None:
    directory, name = args.words
    register(directory, name, args.force, args.copy, config, _meter(f'copying {directory}'))


def _add_push(add: _AddCommand) -> None:
    command = add('NAME...', 'share local datasets', _run_push, [
        ('etc push MNIST', ''),
        ('etc push -f MNIST', 'replace a different dataset of that name')])
    command.add_argument('names', nargs='+', metavar='NAME')
    command.completes = 'local'
    _add_force(command)


def _run_push(args: Any, name: str, config: Config) -> None:
    push(name, args.force, config, _meter(f'pushing {name}'))


def _add_ls(add: _AddCommand) -> None:
    command = add('[PATTERN...]', 'list datasets', _run_ls, [
        ('etc ls -r', 'what is shared'),
        ('etc ls', 'what is here'),
        ("etc ls -r 'MNIST*'", 'whose names match'),
        ('etc ls -l', 'with size, files, when and digest')])
    command.add_argument('patterns', nargs='*', metavar='PATTERN', help='only names that match, with *, ? and [...]')
    command.completes = 'local'
    _add_remote(command)
    command.add_argument('-l', '--long', action='store_true', help='with size, files, when and digest')
    _add_json(command)


def _run_ls(args: Any, _: None, config: Config) -> None:
    patterns = args.patterns or None
    is_short = not (args.long or args.json)
    summaries = [] if is_short else _list(args.remote, config, patterns)
    names = ls(args.remote, config, patterns) if is_short else [summary['name'] for summary in summaries]
    if args.json:
        _print(json.dumps(summaries, indent=1))
    elif args.long:
        _print_list(summaries)
    else:
        for name in names:
            _print(name)
    unmatched = [pattern for pattern in args.patterns if not any(_matches(name, [pattern]) for name in names)]
    if unmatched:
        where = f"in {_masked(config.url or '')}" if args.remote else 'here'
        raise NotFound(f"no dataset {where} matches {' or '.join(map(repr, map(_masked, unmatched)))}",
                       'use --url for a URL' if '://' in unmatched[0] else
                       _did_you_mean(unmatched[0], ls(args.remote, config)))


def _add_pull(add: _AddCommand) -> None:
    command = add('NAME...', 'install remote datasets', _run_pull, [
        ('etc pull MNIST', ''),
        ('etc pull MNIST -p test', 'only one partition; the rest may follow later'),
        ('etc pull -f MNIST', 'replace a different dataset of that name'),
        ('etc pull MNIST@sha256:...', 'insist on these contents')])
    command.add_argument('names', nargs='+', metavar='NAME')
    command.completes = 'remote'
    _add_force(command)
    command.add_argument('-p', '--partition', action='append', dest='partitions', metavar='PARTITION',
                         help='only this partition (can be repeated)')


def _run_pull(args: Any, name: str, config: Config) -> None:
    pull(name, args.force, args.partitions, config, _meter(f'pulling {name}'))


def _add_info(add: _AddCommand) -> None:
    command = add('NAME', 'show what is known of a dataset', _run_info, [
        ('etc info MNIST', ''),
        ('etc info -r MNIST', 'of a remote one, without downloading its data')])
    command.add_argument('names', nargs=1, metavar='NAME')
    command.completes = 'local'
    _add_remote(command)
    _add_json(command)


def _run_info(args: Any, name: str, config: Config) -> None:
    summary = info(name, args.remote, config, _meter(f'reading {name}'))
    if args.json:
        _print(json.dumps(summary, indent=1))
    else:
        _print_info(summary)


def _add_diff(add: _AddCommand) -> None:
    import argparse

    class Side(argparse.Action):
        """Keeps the names in the order in which they were typed, with -r or without."""

        def __call__(self, parser: Any, args: Any, values: Any, flag: Optional[str] = None) -> None:
            args.sides += tuple((name, flag is not None) for name in values)

    command = add('[-r] A [-r] B', 'show what of a dataset is the same, differs, is new or gone', _run_diff, [
        ('etc diff MNIST -r MNIST', 'what is here, and what is shared'),
        ('etc diff -r MNIST -r MNIST2', 'both are remote'),
        ('etc diff --files MNIST MNIST2', 'file by file')])
    command.set_defaults(sides=())
    command.add_argument('sides', nargs='*', action=Side, default=(), metavar='NAME', help='a local dataset')
    command.add_argument('-r', '--remote', nargs=1, action=Side, dest='sides', default=(), metavar='NAME',
                         help='a remote dataset, for which nothing but its index is read')
    command.add_argument('--files', action='store_true', help='each file that is not the same, of two local datasets')
    command.completes = 'either'
    _add_json(command)


def _run_diff(args: Any, _: None, config: Config) -> int:
    (a, is_a_remote), (b, is_b_remote) = args.sides
    found = diff(a, b, (is_a_remote, is_b_remote), args.files, config, _meter(f'comparing {a} with {b}'))
    if args.json and not args.quiet:
        _print(json.dumps(found, indent=1))
    elif not args.quiet:
        _print_diff(found)
    return 0 if found['equal'] else 1


def _add_verify(add: _AddCommand) -> None:
    command = add('NAME...', 'read all files again and compare them with the digest', _run_verify, [
        ('etc verify MNIST', ''),
        ('etc verify MNIST@sha256:...', 'with this digest')])
    command.add_argument('names', nargs='+', metavar='NAME')
    command.completes = 'local'


def _run_verify(args: Any, name: str, config: Config) -> None:
    verify(name, config, _meter(f'verifying {name}'))


def _add_create(add: _AddCommand) -> None:
    command = add('NAME [PARTITION...]', 'make an empty dataset to fill', _run_create, [
        ('etc create MNIST', 'with the partitions train and test'),
        ('etc create MNIST train val test', '')])
    command.add_argument('names', nargs=1, metavar='NAME')
    command.add_argument('partitions', nargs='*', default=(), metavar='PARTITION')
    _add_force(command)


def _run_create(args: Any, name: str, config: Config) -> None:
    create(name, args.partitions or ('train', 'test'), args.force, config)


def _add_purge(add: _AddCommand) -> None:
    command = add('NAME...', 'remove local datasets, or with -r remote ones', _run_purge, [
        ('etc purge MNIST', 'a registered directory itself is not touched'),
        ('etc purge -r MNIST', 'from the remote storage, after a question'),
        ('etc purge -r MNIST@sha256:...', 'only if it has these contents')])
    command.add_argument('names', nargs='+', metavar='NAME')
    command.completes = 'local'
    _add_remote(command)
    command.add_argument('-f', '--force', action='store_true', help='with -r: do not ask')
    command.set_defaults(fail=command.fail)


def _run_purge(args: Any, name: str, config: Config) -> None:
    if not args.remote:
        purge(name, config)
    elif args.force:
        purge(name, config, remote=True)
    elif all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        _purge_remote(name, config, _confirm_removal)
    else:
        args.fail("without a terminal to ask on, 'etc purge -r' needs -f")


def _confirm_removal(what: str) -> None:
    """Raises Error unless the person at the terminal agrees."""
    _console.show(f'remove {what}? [y/N] ', end='')
    answer = sys.stdin.buffer.readline()  # of any encoding
    if not answer.endswith(b'\n'):
        print(file=sys.stderr)
    if answer.strip().lower() not in (b'y', b'yes'):
        raise Error(f'{what} stays')


def _add_completion(add: _AddCommand) -> None:
    command = add('SHELL', 'print a shell completion script', _run_completion, [
        ('eval "$(etc completion bash)"', 'in ~/.bashrc; for zsh: in ~/.zshrc, after compinit'),
        ('etc completion fish | source', 'in ~/.config/fish/config.fish')])
    command.add_argument('shell', choices=sorted(_COMPLETION), metavar='SHELL')


def _run_completion(args: Any, _: None, config: Config) -> None:
    _print(_COMPLETION[args.shell])


_COMMANDS: Dict[str, Callable[[_AddCommand], None]] = {  # in the order of a first session
    'register': _add_register,
    'push': _add_push,
    'ls': _add_ls,
    'pull': _add_pull,
    'info': _add_info,
    'diff': _add_diff,
    'verify': _add_verify,
    'create': _add_create,
    'purge': _add_purge,
    'completion': _add_completion,
}


# Output

def _overview() -> str:
    """What `etc` alone shows."""
    commands = _parser().commands.choices.values()
    lines = ['etc shares immutable datasets through cloud storage.', '']
    lines += [f'  {command.examples[0][0]:33} {command.what}' for command in commands]
    lines += ['', "Set where datasets are shared with a line 'url: s3://my-bucket' in ~/.etc.yaml, or with $ETC_URL.",
              "For help on a command, run 'etc pull -h'; for all commands, 'etc -h'."]
    if os.path.basename(sys.argv[0]) in ('etcetera.py', '-'):
        lines.append("('etc' is what pip installs; without it, write 'python3 etcetera.py' instead.)")
    return '\n'.join(lines)


def _print(text: str = '') -> None:
    """To stdout, whatever its encoding."""
    if sys.stdout is None:
        raise Error('standard output is closed')
    print(_encodable(text, sys.stdout))


def _ago(when: Optional[str]) -> str:
    """How long ago a time was that info() gives."""
    if not when:
        return '-'
    seconds = time.time() - _iso_time(when)
    for unit, name in ((31557600, 'year'), (2629800, 'month'), (604800, 'week'), (86400, 'day'), (3600, 'hour'),
                       (60, 'minute')):
        if seconds >= unit:
            return _plural(int(seconds // unit), name) + ' ago'
    return 'just now'


def _print_list(summaries: List[Dict[str, Any]]) -> None:
    """In columns. On a terminal with a heading, and only so much of the digests as tells them apart."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    rows = [('NAME', 'SIZE', 'FILES', 'WHEN', 'DIGEST')] if is_terminal and summaries else []
    for summary in summaries:
        files = '-' if summary['files'] is None else f"{summary['files']:,}"
        digest = summary['digest'] or summary.get('source') or '-'
        if is_terminal and summary['digest']:
            digest = digest[:19]
        rows.append((summary['name'], _size(summary['size']), files, _ago(summary['when']), _printable(digest)))
    _print_columns(rows, right=(1, 2))


def _print_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """right: the columns whose text is aligned there. What is in the last one may have any length."""
    widths = [max(map(len, column)) for column in zip(*rows)][:-1]
    for row in rows:
        cells = [text.rjust(width) if index in right else text.ljust(width)
                 for index, (text, width) in enumerate(zip(row, widths))]
        _print('  '.join([*cells, row[-1]]))


def _print_diff(found: Dict[str, Any]) -> None:
    """In columns: of the files that differ, if they were compared, otherwise of all segments."""
    def cell(side: Optional[Dict[str, Any]]) -> str:
        if side is None or 'files' in side:
            return _amount(side) if side else '-'
        if side['link']:
            return _printable('-> ' + side['link'])
        size = 'directory' if side['size'] is None else _size(side['size'])
        return size + (', executable' if side['executable'] else '')

    rows = [(row['status'], cell(row['a']), cell(row['b']), _printable(path))
            for path, row in (found['segments'] if found['files'] is None else found['files']).items()]
    if rows and sys.stdout is not None and sys.stdout.isatty():
        names = [('-r ' if found[side]['remote'] else '') + found[side]['name'] for side in 'ab']
        rows.insert(0, ('STATUS', names[0], names[1], 'PATH'))
    _print_columns(rows)


def _amount(counted: Dict[str, Any]) -> str:
    return f"{_size(counted['size'])} in {_plural(counted['files'], 'file')}"


def _print_info(summary: Dict[str, Any]) -> None:
    def line(key: str, value: str) -> None:
        _print(f'{key:11} {_printable(value)}')

    line('name', summary['name'])
    line('digest', summary['digest'] or '- (packed by another tool; pull it to learn more)')
    if summary['files'] is not None:
        line('size', _amount(summary) + (' (partly installed)' if summary.get('partial') else ''))
    if 'archive_size' in summary:
        line('archive', _size(summary['archive_size']))
    for key, label in (('root', 'root'), ('source', 'from')):
        if summary.get(key):
            line(label, summary[key])
    if summary.get('when'):
        line('when', f"{_ago(summary['when'])} ({summary['when']})")
    label = 'partitions'
    for name, partition in (summary['partitions'] or {}).items():
        line(label, f'{name}: {_amount(partition)}')
        label = ''
    if summary.get('meta'):
        meta = json.dumps(summary['meta'], ensure_ascii=False)
        line('meta', meta if len(meta) <= 500 else meta[:500] + ' ...')
    _print_readme(summary.get('readme') or '')


def _print_readme(text: str) -> None:
    lines = text.splitlines()
    if lines:
        _print()
    for line in lines[:_README_LINES]:
        _print(_printable(line.expandtabs()))
    if len(lines) > _README_LINES:
        _print(f'... ({len(lines) - _README_LINES} more lines of README.md)')


_METER_TIME = 2.0  # seconds after which there is enough to tell how long the rest will take


def _meter(what: str) -> _Progress:
    """Shows on the terminal how far a piece of work is; None where that would disturb."""
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get('TERM') == 'dumb':
        return None
    if _console.level is None or _console.level > _INFO:
        return None
    if os.name == 'nt':
        os.system('')  # lets the console understand escape sequences
    marks: Any = collections.deque(maxlen=50)  # when it was shown, and the bytes then: some 5 s

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if marks and done < marks[-1][1]:  # the next piece begins
            marks.clear()
        if marks and now - marks[-1][0] < 0.1:
            return
        marks.append((now, done))
        since, before = marks[0]
        seconds = now - since
        parts = [what, f'{100 * done // max(total, 1)}%', f'{_size(done)} of {_size(total)}']
        if done > before and seconds > _METER_TIME:
            rate = (done - before) / seconds
            parts += [_duration((total - done) / rate) + ' left', _size(rate) + '/s']
        width = _terminal_width()
        while len(parts) > 1 and len('  '.join(parts)) >= width:
            parts.pop()
        _console.show_progress('  '.join(parts)[:max(1, width - 1)])

    return show


def _terminal_width() -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


# Completion: the shells ask `etc completion SHELL WORD...` what the last word may become.

_COMPLETION = {
    'bash': r'''_etc() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$' \t\n' words
    read -r -a words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=('')
    IFS=$'\n'
    COMPREPLY=($("${words[0]}" completion bash "${words[@]:1}" 2>/dev/null))
}
complete -o default -F _etc etc''',
    'zsh': r'''#compdef etc
_etc() {
    local -a found
    found=(${(f)"$("${words[1]}" completion zsh "${(@Q)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
if [[ ${funcstack[1]} == _etc ]]; then _etc "$@"; else compdef _etc etc; fi''',
    'fish': r"""function __etc
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l found ($words[1] completion fish $words[2..-1] "$word" 2>/dev/null)
    if count $found >/dev/null
        printf '%s\n' $found
    else
        __fish_complete_path "$word"
    end
end
complete -c etc -f -a '(__etc)'""",
}


def _completions(words: Sequence[str]) -> List[str]:
    """What the last of the words after `etc` may become; nothing where the shell is to offer files."""
    *before, last = words
    parser = _parser(['completion', *before])
    commands = parser.commands.choices
    command = next((commands[word] for word in before if word in commands), None)
    known: Iterable[str] = ()
    if before and before[-1] in (command or parser).flags_with_value:
        pass
    elif last.startswith('-'):
        known = [flag for flag in (command or parser).flags if flag.startswith('--')]
    elif not command:
        known = _COMMANDS
    elif command is commands['completion']:
        known = _COMPLETION
    elif command.completes:
        is_remote = command.completes == 'remote' or bool({'-r', '--remote'} & set(before))
        place = {flag[2:]: value for flag, value in zip(before, before[1:]) if flag in parser.flags_with_value}
        if command.completes == 'either':
            is_remote = before[-1] in ('-r', '--remote')
            before = []  # both names may be the same
        known = _names_in_time(is_remote, place)
    return [word for word in known if word.startswith(last) and word not in before]


def _names_in_time(is_remote: bool, place: Dict[str, str]) -> List[str]:
    """What ls() finds before people lose patience; nothing, if it fails."""
    import threading
    names: List[str] = []

    def look() -> None:
        with contextlib.suppress(Error):
            config = Config.load(place.get('config'), url=place.get('url'), home=place.get('home'))
            names.extend(ls(is_remote, config))

    thread = threading.Thread(target=look, daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads
        thread.start()
        thread.join(_COMPLETION_TIMEOUT)
    return names


# main()

@_api
def _arguments(argv: List[str]) -> Any:
    """The parsed command line. SystemExit after wrong usage."""
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    command = parser.commands.choices.get(args.command, parser)
    has_names = rest and not any(word.startswith('-') for word in rest)  # after a flag, where argparse expects none
    if has_names and getattr(args, 'partitions', None):
        args.partitions += rest  # as in `etc pull NAME -p ONE TWO`
    elif has_names and args.command == 'ls':
        args.patterns += rest
    elif has_names and args.command == 'diff':
        args.sides += tuple((name, False) for name in rest)
    elif rest:
        unknown = next((word for word in rest if word.startswith('-')), rest[0])
        command.fail(f"'{command.prog}' takes no '{unknown}'", _did_you_mean(unknown, command.flags))
    if not args.command:
        parser.fail('no command is given')
    if args.command == 'register':
        if args.words[1:2] == ['as'] and len(args.words) == 3:
            del args.words[1]
        if len(args.words) > 2 or args.words[1:] == ['as']:
            command.fail('register takes DIR, DIR NAME or DIR as NAME')
        args.words = (args.words + [None])[:2]
    if args.command == 'diff':
        if len(args.sides) != 2:
            command.fail("diff takes two names, and '-r' before one that is remote")
        if args.files and any(is_remote for _, is_remote in args.sides):
            command.fail("'--files' takes two local datasets", 'pull the remote one first;')
    try:
        if getattr(args, 'partitions', None):
            args.partitions = [_from_os(partition) for partition in args.partitions]
    except UnicodeError:
        raise InvalidDataset('the names of partitions must be UTF-8', 'rename them') from None
    return args


def _run(argv: List[str]) -> int:
    """Run one command, for each dataset that it names, and return the exit status."""
    is_verbose = False
    status = 0
    try:
        args = _arguments(argv)
        is_verbose = args.verbose
        _console.level = _DEBUG if args.verbose else _WARNING if args.quiet else _INFO
        config = Config.load(args.config, url=args.url, home=args.home)
        for name in args.names:
            try:
                status = args.run(args, name, config) or status
                if sys.stdout is not None:
                    sys.stdout.flush()
            except Error as e:
                status = 1
                _show_error(e, is_verbose)
    except Error as e:
        status = 1
        _show_error(e, is_verbose)
    return status


def _show_error(e: Error, is_verbose: bool) -> None:
    if is_verbose:
        import traceback
        traceback.print_exception(type(e), e, e.__traceback__)
    _console.show(e)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it leaves nothing behind that is billed.

    A signal that is ignored, as by nohup, stays ignored. One that a program around us handles is left to it.
    """
    import signal
    defaults = {'SIGINT': signal.default_int_handler, 'SIGTERM': signal.SIG_DFL, 'SIGHUP': signal.SIG_DFL}
    replaced: Dict[int, Any] = {}

    def end(number: int, _: Any) -> None:
        for other in replaced:  # a terminal that closes may send several
            if other != signal.SIGINT:  # which a person may send again
                signal.signal(other, signal.SIG_IGN)
        _interrupts.receive(number)

    _interrupts.forget()
    try:
        with contextlib.suppress(ValueError):  # only the main thread may do so
            for name, default in defaults.items():
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) == default:
                    signal.signal(number, end)
                    replaced[number] = default
        yield
    finally:
        for number, default in replaced.items():
            signal.signal(number, default)


@_ended_by_signals()
def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command `etc`. Returns its exit status.

    0; 1 for an error; 2 for wrong usage; 128 and the number of the signal that ended it, such as 130 for Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ['completion'] and len(argv) > 2:
        for word in _completions(argv[2:]):
            _print(word)
        return 0
    if not argv:
        print(_overview(), file=sys.stderr)
        return 2
    if argv[0] == 'help':
        argv = argv[1:] + ['-h']
    try:
        return _run(argv)
    except OSError as e:  # stdout cannot be written to
        if not isinstance(e, BrokenPipeError):  # as in `etc ls | head -1`
            _console.show(f'cannot write to standard output: {e.strerror}')
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as e:
        _console.show('interrupted')
        number = e.args[0] if e.args else 2
        return 128 + int(number)
    finally:
        _console.show_progress('')
        _console.level = None


if __name__ == '__main__':
    sys.exit(main())
