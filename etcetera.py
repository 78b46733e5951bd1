#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
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
    Jobs            work in threads, its progress, and signals meanwhile
    Contents        a directory as canonical tar bytes, and its digest
    Datasets        Dataset: a directory with partitions
    Deflate         one block in and out of it, as fast as this machine can
    Archives        the .tgz format: its specification, writing it, reading it safely
    Other tools     reading any .tgz safely, whoever made it
    HTTP            one client: connections, proxies, TLS, retries
    AWS             credentials and request signatures
    Google          credentials
    Remotes         file://, s3://, gs://, https://: list, find, read, write, remove
    Home            the local store: receipts, and installing atomically
    Stored archives an archive in a remote: its index, extracting it, and writing it
    API             what `import etcetera` offers
    Command line    the command `etc`

Who uses only S3 can skip Google, and in Remotes the parts gs:// and http(s)://; who uses only a shared directory can
skip HTTP (but for times), AWS, Google, and in Remotes all but _Remote, file:// and the end.

AUDIT MAP. What this file touches, and when.

Hosts. Importing contacts none. Commands that need a remote contact:
    - the host in `url` or `endpoint_url`, in AWS's variables or profile ($AWS_ENDPOINT_URL, ...) or in
      $STORAGE_EMULATOR_HOST, or, if AWS's profile says so, BUCKET.HOST; for s3:// without an endpoint, hosts below
      amazonaws.com or the domain of another AWS partition; for gs://, storage.googleapis.com, and the host that it
      names for an upload (it gets the data, no credentials);
    - for http(s):// URLs, any host that the server redirects to; no credentials are sent, and redirects from https://
      to http:// are refused;
    - for AWS credentials, if the profile or AWS's variables ask for them: the sts host of AWS, or an endpoint that is
      set for it; the container's credential service ($AWS_CONTAINER_CREDENTIALS_...); and if a role asks for it, or
      no keys are found anywhere else, the metadata service of EC2 (169.254.169.254, or the address that is set);
    - for Google credentials: the URL in the credentials file, by default oauth2.googleapis.com; without a file, the
      metadata service of the machine (metadata.google.internal, $GCE_METADATA_HOST or $GCE_METADATA_ROOT);
    - a proxy that the environment or the system names. Requests to a container's or machine's credential service never
      go through a proxy.
Environment. Besides the variables above and those of AWS's and Google's own tools (AWS_..., GOOGLE_...,
CLOUDSDK_CONFIG, APPDATA, NO_GCE_CHECK): ETC_URL, ETC_HOME, ETC_CONFIG, ETC_LIBDEFLATE, HOME, TERM; and what Python
itself reads (TMPDIR, http_proxy and the like, SSL_CERT_FILE, ...).
Files. It reads:
    - ~/.etc.yaml (else ~/.etc.toml), or the file that --config or $ETC_CONFIG names;
    - ~/.aws/config, ~/.aws/credentials, and token files that AWS's variables or profiles name;
    - Google's application_default_credentials.json, or the file that is configured;
    - the `ca_bundle`; /etc/machine-id and /proc/self/ns/pid, to tell apart hosts and containers that share a store;
    - what is installed, where a pull wants the same contents, and for `verify`, `info`, `diff` and NAME@sha256:...;
    - directories that are registered, copied or pushed. Links in them are followed to any file that can be read,
      unless they stay inside their partition.
  It writes below the local store (~/.etc by default), and besides:
    - a `file://` remote, which the first push makes, with the directories around it. `purge -r` removes an archive
      there, and a push removes what killed commands have left behind a day ago or more;
    - temporary files, for `etc info -r`, and if a web server does not support range requests;
    - ~/.aws/cli, sso and login, by botocore; what the programs below write; and if $SSLKEYLOGFILE is set, TLS keys, by
      Python's ssl module.
  In S3 and Google Cloud Storage it deletes uploads of its own that failed (but not if it was killed), the archives that
  `purge -r` names, and a new archive that did not arrive as it was sent. In S3, a push reads other archives in the
  bucket, and lets the storage copy what it shares with them; if that copies something else, the new archive is deleted.
  `purge -r` reads an answer from the terminal.
Programs: the `credential_process` of an AWS profile, without a shell; for credentials that need more than the standard
library, `aws` or `gcloud`, as the system finds them (Windows looks in the current directory, too, and runs gcloud.cmd
by cmd.exe); on Windows, cmd.exe with an empty command, so that the console understands escape sequences.
Signals: while the command `etc` runs, SIGTERM and SIGHUP end it as Ctrl-C does, which kills the programs that it has
started. Signal 0 tests whether a process lives.
Optional libraries: botocore (SSO, `aws login`, MFA) and google-auth (credential types that need more than the standard
library) are imported only where the configured credentials need them. They have hosts, files (~/.aws/sso, ~/.aws/cli)
and programs of their own. argcomplete is imported if a shell asks it for completions.
ctypes: syncfs of Linux's libc, to flush what was installed; and libdeflate, which also inflates archives, if it is
beside Python's standard library or below /usr, /usr/local, /opt/local or /opt/homebrew, unless ETC_LIBDEFLATE is 0.
TLS: certificates and names are always verified. With `ca_bundle` (for s3:// also $AWS_CA_BUNDLE and the profile's),
that file replaces the system's CAs, and VERIFY_X509_STRICT is switched off, since many private CAs leave out
extensions that it demands.
Order of credentials. AWS: keys in the settings; keys in variables, unless the settings name a profile; the profile: its
role; web identity (also of variables); SSO; `aws login` or credential_process, unless ~/.aws/credentials has keys for
it; keys; then the container; the machine. Google: the file that `google_credentials` or, else, the variable names; the
one that gcloud has made; the machine.
Archives are unpacked only below a new directory. Names must be relative and without '..', every file is created anew,
links are made last and refused if they lead out, and anything but files, directories and links is refused (_is_safe,
_Sink, _extract_member). Our own archives must be, header by header, what a push would write (_SegmentReader.entry).
Races. Pulls: see Home. Pushes take no lock: the storage lets one of two have the name (a hard link or a claim file in a
directory, If-None-Match, ifGenerationMatch), and the other compares. S3 stores other than Amazon's are asked before;
some of them ignore conditions, and then the last push wins, as with -f.
Sizes. S3: parts of 5 MiB or, of large archives, more; some 50 MiB are sent at once. Google: 16 MiB, one after another.
Reading: ranges of 256 KiB to 2.7 MiB (more if `connections` is below 5), at most 40 MiB ahead. See read_ahead().
Retries: see HTTP. What killed pulls leave, and how the next one goes on: see Home.
"""

# Modules that are slow to import (ssl, argparse and the like) wait in the functions that need them: completion is fast.
import errno  # noqa: I001, as the names of typing would take a line each
import itertools
import json
import marshal
import operator
import os
import posixpath
import re
import stat
import struct
import sys
import time
import zlib
from collections import defaultdict, deque
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import (Any, Callable, Container, Dict, FrozenSet, Generator, Iterable, Iterator, List, Mapping, NamedTuple,
                    Optional, Sequence, Set, Tuple, TypeVar, Union)
from urllib.parse import quote, unquote, unquote_plus, urlencode, urljoin, urlsplit

__version__ = '1.1.0'
__all__ = ('Config Dataset create dataset diff info ls pull purge push register verify Error ConfigError '
           'InvalidDataset NotFound Exists Corrupt RemoteError UnknownPartition').split()

_Path = Union[str, 'os.PathLike[str]']
_MaybeText = Optional[str]
_Names = Optional[Sequence[str]]
_Row = Dict[str, Any]
_Texts = Dict[str, str]


# ---------------------------------------------------------------------------------------
# Messages
#
# Output goes to stdout, messages to stderr: through the console while `etc` runs, otherwise to the logger `etcetera`.
# People paste keys in the wrong places, so what they set and type is shown with care: a setting or variable only if it
# is well-formed, otherwise its name; a URL without user, password and query; a path only as far as it exists.
# ---------------------------------------------------------------------------------------

def _masked(text: str) -> str:
    """A URL, or a word that may hold one, without secrets. A password may contain any character, even / ? # and @."""
    text = re.sub(r'(?s)\A([^:]*:(?://)?)(?:.*[?#].*@.*|.*(?=@))', r'\1***', text)
    return _printable(re.sub(r'(?s)([?#]).+', r'\1***', text))


def _existing_part(path: str) -> str:
    """The part of a path that exists, followed by `...` if there is more that may be a key."""
    known = next(filter(os.path.lexists, [path, *map(str, Path(path).parents)]), '')
    return path if _is_harmless(path[len(known):]) else os.path.join(known, '...')


def _is_harmless(text: str) -> bool:
    """Whether it does not look like a key: short words in lower case."""
    return not re.search('[^a-z0-9_./~-]|[^/]{20}', text)


def _printable(text: str) -> str:
    """The text on one line, without characters that could steer a terminal."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _size(count: Optional[float]) -> str:
    """Bytes in powers of 1000."""
    if count is None:
        return '-'
    for unit in 'B kB MB GB TB PB EB'.split():
        if count < 999.5:
            return f'{count:.3g} {unit}'
        count /= 1000
    return f'{count:.3g} ZB'


_DEBUG, _INFO, _WARNING = 10, 20, 30  # as in logging, which is slow to import


class _Console:
    """What the command `etc` shows on stderr: messages, and below them at most one line of progress."""
    level: Optional[int] = None  # the least to show; None in a program that uses etcetera as a library
    program = 'etc'  # how it was called, for remedies
    progress = ''  # the line of progress that is shown

    def write(self, text: str) -> None:
        with suppress(OSError, AttributeError, ValueError):  # stderr may be closed, None, or made by a notebook
            sys.stderr.write(text)
            sys.stderr.flush()

    def show_progress(self, line: str) -> None:
        """Replace the line of progress. The cursor stays at its start, so that the next message overwrites it."""
        if line != self.progress:
            self.progress = line
            self.write(f'\r\033[J{line}\r')  # erases the line, and below it what a narrow terminal has folded

    def show(self, message: str) -> None:
        text = _printable(message).replace("'etc ", f"'{self.program} ")
        erase = '\r\033[J' * bool(self.progress)  # in one piece with the message, as another thread may draw meanwhile
        self.write(f'{erase}etc: {text}\n')


_console = _Console()


def _say(message: str, level: int = _INFO) -> None:
    """Show a message, or log it where a program uses etcetera as a library."""
    if _console.level is None:
        from logging import getLogger
        getLogger('etcetera').log(level, '%s', message)
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
    `status` is the HTTP status of the answer that caused it, or 0.
    """
    def __init__(self, message: str = '', remedy: str = '', status: int = 0) -> None:
        self.message, self.remedy = message, remedy
        self.status = status

    def __str__(self) -> str:
        return f"{self.message}{'; ' * bool(self.remedy)}{self.remedy}"


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
    """The storage could not be reached, or refused."""

class UnknownPartition(Error, KeyError):
    """The dataset has no partition of that name."""

class _NoRoom(Error):
    """There is too little room on a disk; nothing was written."""
    codes = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # which the system gives


@contextmanager
def _system_errors() -> Iterator[None]:
    """For a block of code, or as @_system_errors() for a function: errors of the system become an Error."""
    try:
        yield
    except OSError as e:
        message = e.strerror or str(e)
        if e.filename is not None:
            path = os.fsdecode(e.filename) if isinstance(e.filename, bytes) else str(e.filename)  # PyPy tells bytes
            e.filename = _existing_part(path)  # a traceback shows both names, too
            e.filename2 = None
            message += f': {e.filename}'
        remedy = 'free some space' if e.errno in _NoRoom.codes else ''
        if isinstance(e, PermissionError):
            remedy = 'ask who owns it, or its directory, for access, or use another place'
        raise Error(message, remedy) from e
    except (MemoryError, RuntimeError) as e:
        if (type(e) is RuntimeError
                and "can't allocate" not in str(e)):  # as Python says of locks
            raise
        raise Error('there is not enough memory', "set 'connections: 1', or raise the limit (ulimit -v)") from e


def _check_path(path: _Path) -> str:
    """Return the path as text. Raises Error if no file can have that path on this system."""
    text = os.fspath(path)
    try:
        with suppress(OSError):  # as it need not be there
            os.lstat(text)
    except ValueError:
        raise Error(f"no file can have the path '{_masked(text)}' here", 'check it, or set LC_ALL=C.UTF-8') from None
    return text


# ---------------------------------------------------------------------------------------
# Settings
#
# A settings file is a flat map in a subset of YAML 1.1. What is accepted means the same there; the rest is refused.
# ---------------------------------------------------------------------------------------

_CHOICES = {  # of the settings that are not text
    'public': ((False, True), 'true or false'),
    'connections': (range(1, 257), 'a whole number from 1 to 256'),
    'compression_level': (range(10), 'a whole number from 0 to 9')}
_YAML_START = r'\A((?: *(?:#[^\r\n]*)?[\r\n])*)--- *(?=[\r\n]|\Z)'  # comments, and the mark that they may stand before
_YAML_FORBIDDEN = (  # what YAML forbids, and U+2028 and U+2029, which YAML 1.1 takes for line ends
    '[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]')
# What JSON has, too, means the same in YAML, but for surrogates.
_YAML_LINE = r"""(?x)
    (?: (["']?) ( [A-Za-z_][A-Za-z0-9_-]* ) \1 [ ]* :
        (?: [ ]+ (?: ( "(?: [^"\\] | \\["\\/bfnrt] | \\u (?! [dD][89a-fA-F] ) [0-9a-fA-F]{4} )*"
                     | true | false | null | 0 | [1-9][0-9]{0,8} )
                   | '( (?: [^'] | '' )* )' | ( [^ \t#].*? ) ) )? )?
    [ ]* (?: (?<! [^ ] ) [#] .* )? \Z"""
# Plain values that YAML 1.1 may not read as they stand: https://yaml.org/type/{bool,int,null,float,timestamp}.html
_YAML_SURPRISES = r"""(?xi)
    [-?:,[\]{}&*!|>%@`"'<=] | .* (?: :[ ] | :\Z | \t )
    | (?: ~ | true | false | yes | no | on | off | null
        | [-+]? (?: 0x[0-9a-f_]+ | 0b[01_]+ | \.(?:inf|nan) | (?: \.?[0-9] | \._ ) [0-9_:.etz+ -]* ) ) \Z"""


def _parse_yaml(line: str) -> Tuple[_MaybeText, Any]:
    """The key and the value in a line of a settings file; None if there is no key. Raises ConfigError."""
    if re.search(_YAML_FORBIDDEN, line):
        raise ConfigError('YAML does not allow one of these characters', 'remove it, or save the file as UTF-8')
    match = re.match(_YAML_LINE, line)
    if not match:
        raise ConfigError("not of the form 'key: value' (lists, nesting and indentation are not supported)")
    _, key, as_json, quoted, value = match.groups()
    if value and re.match(_YAML_SURPRISES, value):
        raise ConfigError('this YAML syntax is not supported', 'put the value in double quotes, with \\\\ for each '
                          'backslash, or write true, false or a plain number')
    if quoted is not None:
        value = quoted.replace("''", "'")
    elif as_json:
        value = json.loads(as_json, strict=False)
    return key, value


class Config:
    """Where datasets live and how to reach them. Every function takes one as `config=`.

    url: `s3://bucket[/prefix]`, `gs://bucket[/prefix]`, `file:///path` or, to read only, `https://host/path`; needed
        only for remote datasets.
    home: the local store, by default $ETC_HOME or ~/.etc.
    settings: any other key of the settings file, by its name there.
    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    url: _MaybeText = None
    home: Path
    public: bool = False
    aws_access_key_id: _MaybeText = None
    aws_secret_access_key: _MaybeText = None
    aws_session_token: _MaybeText = None
    aws_profile: _MaybeText = None
    region: _MaybeText = None
    endpoint_url: _MaybeText = None
    request_payer: _MaybeText = None
    storage_class: _MaybeText = None
    sse: _MaybeText = None
    sse_kms_key_id: _MaybeText = None
    google_credentials: _MaybeText = None
    ca_bundle: _MaybeText = None
    connections: int = 32
    compression_level: int = 6
    _url_source = ''  # for messages

    def __init__(self, url: _MaybeText = None, home: Optional[_Path] = None, **settings: Any) -> None:
        settings.update(url=url, home=home and os.fspath(home))
        for key, value in settings.items():
            _check_setting(key, value)
            if value is not None:
                setattr(self, key, value)
        self.home = _expand(home or os.environ.get('ETC_HOME') or '~/.etc')

    @classmethod
    def load(cls, path: Optional[_Path] = None, **overrides: Any) -> 'Config':
        """Read settings from `path`, else $ETC_CONFIG, else ~/.etc.yaml, if it exists, else ~/.etc.toml (of 0.0.x).

        $ETC_URL and $ETC_HOME override the file, and `overrides` that are not None override both.
        Raises ConfigError, which names the file and the line.
        """
        usual = map(_expanduser, ('~/.etc.yaml', '~/.etc.toml'))
        found = path or os.environ.get('ETC_CONFIG') or next(filter(os.path.exists, usual), '')
        values = _read_settings(_expand(found)) if found else {}
        for key in 'url', 'home':
            values[key] = os.environ.get(f'ETC_{key.upper()}') or values.get(key)
        given = {key: value for key, value in overrides.items() if value is not None}
        config = cls(**{**values, **given})
        source = '$ETC_URL' if os.environ.get('ETC_URL') else str(found)
        config._url_source = '--url' if overrides.get('url') else source
        _say(f"settings file: {found or 'none'}; url from {config._url_source or 'nowhere'}; {config}", _DEBUG)
        return config

    def __repr__(self) -> str:
        is_url = re.match('(https?|s3|gs|file)://', self.url or '')
        shown = _masked(self.url or '') if is_url else '***' * bool(self.url)
        return f'Config({shown!r}, {_existing_part(str(self.home))!r}, ...)'


def _expanduser(path: str) -> str:
    """The path, if it begins with a ~ that nothing tells the meaning of; otherwise what the ~ stands for."""
    with suppress(KeyError):  # up to Python 3.7, for a user whom the system does not know
        if os.environ.get('HOME') != '':
            return os.path.expanduser(path)
    return path


def _expand(path: _Path) -> Path:
    """The absolute path, with ~ expanded."""
    expanded = _expanduser(_check_path(path))
    with suppress(OSError):  # the current directory may be gone
        if expanded[:1] != '~':
            return Path(os.path.abspath(expanded))
    raise ConfigError('cannot tell where your home directory, or the current one, is',
                      'set $HOME, $ETC_HOME and $ETC_CONFIG to absolute paths')


def _check_setting(key: str, value: Any) -> None:
    if key not in Config.__annotations__:
        raise ConfigError(f"unknown setting '{key}'", f"there are {', '.join(Config.__annotations__)}")
    choices, kind = _CHOICES.get(key, ((), 'text that can be printed; put it in quotes'))
    is_right = isinstance(value, str) and value.isprintable()
    if choices:  # True is an int, but no number of connections
        is_right = type(value) is type(choices[0]) and value in choices
    if value is not None and not is_right:
        raise ConfigError(f"'{key}' must be {kind}")


def _read_settings(path: Path) -> _Row:
    """The settings in a file. Raises ConfigError, which names the file and the line."""
    try:
        text = path.read_bytes().decode('utf-8-sig', 'surrogateescape')
    except OSError as e:
        raise ConfigError(f'cannot read the settings file {_existing_part(str(path))}: {e.strerror}',
                          'make it readable, or name another one with --config or $ETC_CONFIG') from None
    if path.suffix == '.toml':
        # A flat TOML file differs from YAML only in its equals signs; 0.0.x called one key by another name.
        text = re.sub(r'(?m)^[ \t]*([\w-]+)[ \t]*=[ \t]*', r'\1: ', text)
        text = text.replace('aws_access_key_secret:', 'aws_secret_access_key:')
    settings: _Row = {}
    for number, line in enumerate(re.split('\r\n|\n|\r', re.sub(_YAML_START, r'\1', text)), 1):
        try:
            key, value = _parse_yaml(line)
            if key in settings:
                raise ConfigError(f"'{key}' is set a second time", 'remove one of the two')
            if key:
                _check_setting(key, value)
                settings[key] = value
        except ConfigError as e:
            raise ConfigError(f'{path}:{number}: {e.message}', e.remedy) from None
    has_secret = settings.keys() & {'aws_secret_access_key', 'aws_session_token'}
    if has_secret and os.name == 'posix' and path.stat().st_mode & 0o077:
        _say(f'{path} holds a secret and others can read it; run: chmod 600 {path}', _WARNING)
    return settings


# ---------------------------------------------------------------------------------------
# Jobs
#
# Each call of the API is a job. Its work runs in a thread of its own, while the thread of the caller only waits and
# reports progress. So a signal, which Python raises in the main thread, leaves no lock behind that other threads need:
# it ends the job, whose threads then raise _Ended where they next count bytes, and whose sockets are shut down. Where
# the system grants few threads, fewer do the work; where it grants none, as while Python shuts down, the caller's does.
# ---------------------------------------------------------------------------------------

_T = TypeVar('_T')
_R = TypeVar('_R')
_TICK = 0.1  # seconds between two looks at what happens meanwhile
_Progress = Optional[Callable[[int, int], Any]]  # is told how many bytes are done, and of how many


class _Ended(BaseException):
    """The job was ended by its caller."""


class _Job:
    """What the threads of one call share."""
    is_ended = False
    reported = 0  # the total that was reported last

    def __init__(self, progress: _Progress = None) -> None:
        import threading
        self.progress = progress
        self.lock = threading.Lock()
        self.answer = threading.local()  # began: when that one came which this thread has read last
        self.news = threading.Lock()  # held while there are none for the caller
        self.at_end: List[Callable[[], Any]] = []  # what shuts down the connections that threads wait for
        self.begin(0)

    def begin(self, total: int) -> None:
        """Count anew, up to `total`. The caller hears of it first, as this may be the last moment to end the job."""
        self.moved, self.total = 0, total  # bytes that were read, sent or received; that progress is to reach
        self.packed = self.produced = 1  # bytes that a push has packed, and made of them; progress is the share sent
        self.wake()
        while self.progress and self.reported != total:
            self.sleep(_TICK / 100)

    def wake(self) -> None:
        """Let the caller look at once."""
        with suppress(RuntimeError):  # there are news already
            self.news.release()

    def add(self, count: int) -> None:
        """Count bytes. Raises _Ended."""
        with self.lock:
            self.moved += count
        if self.is_ended:
            raise _Ended

    def sleep(self, seconds: float) -> None:
        """Raises _Ended."""
        while seconds > 0:
            time.sleep(min(_TICK, seconds))
            seconds -= _TICK
            self.add(0)

    def interrupt(self) -> None:
        """Let what threads wait for fail at once."""
        for shut_down in self.at_end:
            shut_down()


def _perform(progress: _Progress, function: Callable[[_Job], _R]) -> _R:
    """What function(job) returns. Its errors are raised here; those of the system become an Error."""
    # progress() is called ten times a second, and at the end. What it raises ends the job, as a signal does.
    import threading
    job = _Job(progress)
    results: List[_R] = []
    errors: List[BaseException] = []

    def work() -> None:
        try:
            results.append(function(job))
        except BaseException as e:
            errors.append(e)
        job.wake()

    thread = threading.Thread(target=work, daemon=True)
    try:
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            job.progress = None
            work()
        while not (results or errors):
            total = job.total
            if progress and total:
                done = job.moved * job.packed // job.produced
                progress(min(done, total), total)
            job.reported = total
            job.news.acquire(timeout=_TICK)
    except BaseException:
        job.is_ended = True
        job.interrupt()
        while thread.is_alive():
            job.news.acquire(timeout=_TICK)
        raise
    with _system_errors():
        for error in errors:
            raise error
    if progress and job.total:
        progress(job.total, job.total)
    return results[0]


def _cores() -> int:
    """How many threads are worth having for computation. Each has a few MiB under way, so there is a bound."""
    with suppress(AttributeError):  # not all systems have it
        return min(len(os.sched_getaffinity(0)), 16)
    return min(os.cpu_count() or 1, 16)


def _work(tasks: Any, function: Callable[[Any], Any]) -> None:
    """Let each future in a queue have what the function makes of the item beside it, until None comes."""
    for future, item in iter(tasks.get, None):
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(function(item))
        except BaseException as e:
            future.set_exception(e)
        del future, item  # or memory would hold them until the next ones come


_HasRoom = Callable[[int, int], bool]  # of items that run, and that have not been yielded: may another one begin?


def _results(pending: Any, has_room: _HasRoom) -> Iterator[Any]:
    """Take results from a queue of futures, in order, until there is room or none is left. Failures come early."""
    from concurrent.futures import FIRST_COMPLETED, wait
    while pending:
        running = [future for future in pending
                   if not future.done()]
        failed = [place for place, future in enumerate(pending)
                  if future.done() and future.exception()]
        if not failed and has_room(len(running), len(pending)):
            break
        if pending[0].done():
            yield pending.popleft().result()
        elif failed:
            pending.rotate(-failed[0])  # so that it is raised next
        else:
            wait(running, return_when=FIRST_COMPLETED)


def _ordered(job: _Job, count: int, function: Callable[[_T], _R], items: Iterable[_T],
             has_room: Optional[_HasRoom] = None) -> Generator[_R, None, None]:
    """Yield function(item) for all items, in order, by up to `count` threads. Close it where it may be left earlier."""
    # Threads start when they are needed, as each keeps memory. What is done is yielded once there is no room. By
    # default, one item may wait for the threads, and as many as there are threads for the caller.
    import queue
    import threading
    from concurrent.futures import Future
    has_room = has_room or (lambda running, pending: running <= count and pending < 2 * count)
    tasks: Any = queue.Queue()
    work = partial(_work, tasks, function)
    pending: Any = deque()
    threads: List[Any] = []
    try:
        for item in items:
            pending.append(Future())
            tasks.put((pending[-1], item))
            del item
            try:
                if len(threads) < min(count, sum(
                        not future.done() for future in pending)):
                    thread = threading.Thread(target=work, daemon=True)
                    thread.start()
                    threads.append(thread)
            except (RuntimeError, MemoryError):
                count = len(threads)
            if not threads:
                tasks.put(None)
                work()
            yield from _results(pending, has_room)
        yield from _results(pending, lambda *_: False)
    finally:
        for future in pending:
            future.cancel()
        if pending:  # after an error
            job.interrupt()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()


# ---------------------------------------------------------------------------------------
# Contents
#
# A directory as a canonical stream of tar bytes, which depends on names, file contents, links and x bits alone: not on
# the machine, the Python, times or owners. The stream consists of segments: one for the files in the root directory,
# one for each other top-level directory, one for each partition. A segment is cut into blocks of 1 MiB. The digest of
# a segment is SHA-256 over the SHA-256 digests of its blocks, so blocks can be hashed in parallel.
# ---------------------------------------------------------------------------------------

_BLOCK = 1 << 20  # bytes of a block
_MTIME = b'%011o' % 315532800  # 1980-01-01: older dates break zip tools and make some tars warn
_ZEROS = bytes(1024)
_USTAR = struct.Struct('100s8s8s8s12s12s8sc100s8s247x')
_NO_ONE = b'0000000'  # uid and gid
_DEPTH = 256  # levels of directories that a dataset may have
_MAX_FOLLOWED = 1000000  # entries that followed links may lead to, as links can multiply them without end
_BATCH = 1000  # entries that _Survey packs at once
_MANY_FILES = 32  # in a block, above which one thread may read them faster than several
_READ = os.O_RDONLY | getattr(os, 'O_BINARY', 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0)

_RECEIPT = '.etcetera.json'  # what is known of an installed directory, in that directory; no part of the dataset
_LITTER = r'data/(?:\._[^/]*|\.DS_Store|\.directory|desktop\.ini|Thumbs\.db)\Z'  # of file managers
_ODD = ('.', '@', '__', 'lost+found')  # how partitions start that programs make, and that may be shared by accident


class _Entry(NamedTuple):
    """What one tar header describes."""
    name: str  # in the archive; a directory's ends in a slash
    size: int = 0
    is_executable: bool = False  # as directories are
    link: str = ''  # target of a link
    source: str = ''  # path of a file

_Listing = Iterable[Tuple[str, Iterable[_Entry]]]  # paths of segments, each with its entries, in the archive's order
_Segments = Sequence['_Segment']
_Items = List[Tuple[str, bool]]  # names, sorted by code points, and whether they are links
_Piece = Tuple[bytes, _Entry, int, int]  # of a block: headers; then bytes of a file, from where, to where, and zeros
_Plan = Tuple[str, List[_Piece], bytes]  # of a block: its segment, what it consists of, and its bytes, if read


class _Segment(NamedTuple):
    """A part of an archive that can be fetched and verified by itself."""
    path: str  # '.', a top-level directory, or data/<partition>
    offset: int = 0  # of its first byte in the archive
    length: int = 0  # bytes in the archive
    files: int = 0  # number of files and links
    size: int = 0  # bytes of all files
    digest: str = ''  # sha256:...

    @property
    def partition(self) -> _MaybeText:
        """The name of the partition; None if it is another segment."""
        return self.path[5:] if self.path.startswith('data/') else None

    @property
    def stop(self) -> int:
        """The offset of what follows in the archive."""
        return self.offset + self.length

    @classmethod
    def from_json(cls, row: Any) -> '_Segment':
        """From what indexes and receipts hold. Raises ValueError, KeyError or TypeError."""
        segment = cls(*[row[key] for key in cls._fields])
        if ([type(field) for field in segment] != [str, int, int, int, int, str]
                or min(segment[1:5]) < 0
                or not re.match(r'sha256:[0-9a-f]{64}\Z', segment.digest)):
            raise ValueError
        return segment


def _segment_of(name: str) -> str:
    """The path of the segment that holds the entry `name`; of a top-level name '.', whatever it is."""
    match = re.match('data/[^/]+|[^/]+(?=/)', name)
    return match.group() if match else '.'


# Names are text in UTF-8 everywhere but on disk, where the locale decides (Python 3.6 with LANG=C reads ASCII only).
def _to_os(name: str) -> str:
    """A name as the system's functions take it. Raises UnicodeError if UTF-8 cannot encode it."""
    return os.fsdecode(name.encode('utf-8'))


def _join(root: _Path, name: str) -> str:
    return f'{root}{os.sep}{_to_os(name)}'


def _scan(root: _Path, prefix: str = '') -> _Items:
    """What is in a dataset's root, or in the directory `prefix` below it."""
    path = _join(root, prefix)
    with os.scandir(path) as items:
        try:
            return sorted([(prefix + os.fsencode(item.name).decode('utf-8'), item.is_symlink()) for item in items])
        except UnicodeDecodeError as e:
            raise InvalidDataset(f'the name {os.path.join(os.fsencode(path), e.object)!r} is not valid UTF-8',
                                 'rename it') from None


def _partitions(root: _Path) -> _Items:
    """The paths of a dataset's partitions. Raises InvalidDataset if there is anything else beside them."""
    partitions = []
    for name, is_link in _scan(root, 'data/'):
        if os.path.isdir(_join(root, name)):
            partitions.append((name, is_link))
        elif not re.match(_LITTER, name):
            raise InvalidDataset(f"'data' may hold only directories (partitions), but '{name}' is none", 'move it')
    return partitions


def _kept_link(root: _Path, name: str, segment: str) -> str:
    """The shortest target of a link that is relative and leads to a file of its segment; '' if it must be followed."""
    path = _join(root, name)
    target = os.fsencode(os.readlink(path)).decode('utf-8', 'replace').replace(os.sep, '/')
    base = '/' + posixpath.dirname(name)
    meant = posixpath.normpath(posixpath.join(base, target))[1:]
    if (os.path.isabs(target) or meant == _RECEIPT
            or segment not in (meant, _segment_of(meant))
            or os.path.realpath(_join(root, meant)) != os.path.realpath(path)):
        return ''
    return posixpath.relpath('/' + meant, base)


class _Survey:
    """What is known of a dataset, or `only` of some segments, before files are read. InvalidDataset if it is none."""
    def __init__(self, root: _Path, only: Container[str] = ()) -> None:
        self.root = os.path.realpath(root)
        self.size = 0  # bytes of all files
        # Batches of entries by segment; compressed, as there may be millions. marshal never reads what others wrote.
        self.kept: Dict[str, List[bytes]] = defaultdict(list)
        self.segments: Dict[str, _Segment] = {}  # by path, with the number and bytes of their files
        self.surprises: Dict[str, List[str]] = defaultdict(list)  # names of what may be shared by accident
        tops: Dict[str, _Items] = {'.': []}
        for name, is_link in _scan(root):
            is_top = name != 'data' and os.path.isdir(_join(root, name))
            if name != _RECEIPT:
                tops.setdefault(name if is_top else '.', []).append((name, is_link))
        tops.update((item[0], [item]) for item in _partitions(root))
        count = 0
        for path, items in tops.items():
            if not only or path in only:
                entries = self.visit(path, items, False)
                self.followed = files = size = 0  # followed: entries that links have led to
                for batch in iter(lambda: list(itertools.islice(entries, _BATCH)), []):  # noqa: B023
                    self.kept[path].append(zlib.compress(marshal.dumps(list(map(tuple, batch))), 1))
                    count += len(batch)
                    files += sum([not entry.name.endswith('/') for entry in batch])
                    size += sum([entry.size for entry in batch])
                self.segments[path] = _Segment(path, files=files, size=size)
                self.size += size
        # Bytes that the archive will not exceed: headers take less than 12 KiB, and blocks grow by less than 0.4 %.
        self.limit = int(1.004 * (self.size + 12288 * (count + 100)))

    def visit(self, segment: str, items: _Items, through_link: bool) -> Iterator[_Entry]:
        """Everything at and below the items, a directory before its contents."""
        for name, is_link in items:
            self.followed += through_link
            if self.followed > _MAX_FOLLOWED or name.count('/') >= _DEPTH:
                raise InvalidDataset(f"'{name[:300]}' is nested too deeply, or its links lead to too many files",
                                     'remove links')
            path = _join(self.root, name)
            try:
                status = os.stat(path)
            except OSError as e:  # as for a link to nothing, or back to itself
                raise InvalidDataset(f"'{name[:300]}' cannot be read: {e.strerror}", 'repair or remove it') from None
            link = _kept_link(self.root, name, segment) if is_link and name != 'data' else ''
            real = os.path.realpath(path) if is_link else ''
            if real and not real.startswith(self.root + os.sep):
                self.surprises['links that lead out of it'].append(f'{name} -> {real}')
            around = os.path.realpath(os.path.dirname(path)) if real and not link else ''
            if around and (around + os.sep).startswith(real + os.sep):
                raise InvalidDataset(f"'{name}' is a link to a directory above it", 'remove it')
            if name.startswith(_ODD if name == segment else '.', name.rfind('/') + 1):
                self.surprises['hidden or odd names'].append(name)
            if link:
                yield _Entry(name, link=link)
            elif stat.S_ISREG(status.st_mode):
                yield _Entry(name, status.st_size, bool(status.st_mode & 0o100), '', path)
            elif stat.S_ISDIR(status.st_mode):
                yield _Entry(name + '/', is_executable=True)
                if segment != '.':
                    below = _scan(self.root, name + '/')
                    yield from self.visit(segment, below, through_link or is_link)
            else:
                raise InvalidDataset(f"'{name}' is neither a file nor a directory", 'remove it')

    def warn(self, name: str) -> None:
        """Tell what may be shared by accident."""
        found = [f'{what} ({len(names)}, such as {names[0]})' for what, names in self.surprises.items()]
        if found:
            _say(f"all of '{name}' is shared, also {', '.join(found)}")

    def listing(self, paths: Container[str]) -> _Listing:
        """The segments with these paths."""
        for path, batches in self.kept.items():
            if path in paths:
                rows = itertools.chain.from_iterable(marshal.loads(zlib.decompress(batch)) for batch in batches)
                yield path, itertools.starmap(_Entry, rows)


def _ustar(name: bytes, kind: bytes, mode: bytes, size: int, link: bytes = b'', mtime: bytes = _MTIME) -> bytes:
    """A ustar header of ASCII fields."""
    header = _USTAR.pack(name, mode, _NO_ONE, _NO_ONE, b'%011o' % size, mtime, b'        ', kind, link, b'ustar\x0000')
    # Adler-32 starts at 1 and adds bytes up modulo 65521 in its lower half (RFC 1950, 8.2), far quicker than sum().
    checksum = (zlib.adler32(header) & 0xffff) - 1
    return header[:148] + b'%06o\0' % checksum + header[155:]


def _tar_header(entry: _Entry) -> bytes:
    """The canonical header of an entry, after a pax header if need be: what tarfile writes from Python 3.9 on."""
    kind = b'5' if entry.name.endswith('/') else b'2' if entry.link else b'0'  # a directory, link or file
    mode = b'0000755' if entry.is_executable else b'0000644'
    size = entry.size
    texts, records = [], []
    for key, text in ((b'path', entry.name), (b'linkpath', entry.link)):
        raw = text.encode('utf-8')
        if not len(text) == len(raw) <= 100:
            records.append(b' %s=%s\n' % (key, raw))
            raw = text.encode('ascii', 'replace')[:100]
        texts.append(raw)
    if size >= 8 ** 11:
        records.append(b' size=%d\n' % size)
        size = 0
    header = _ustar(texts[0], kind, mode, size, texts[1])
    if not records:
        return header
    pax = b''
    for record in records:  # `length key=value`, whose length counts itself (POSIX pax, "Extended Header")
        length = len(record)
        pax += b'%d%s' % (length + len(str(length + len(str(length)))), record)
    before = _ustar(b'././@PaxHeader', b'x', _NO_ONE, len(pax), mtime=b'00000000000')
    return before + pax + bytes(-len(pax) % 512) + header


@_system_errors()
def _read_pieces(pieces: Iterable[_Piece]) -> bytes:
    """The bytes of a block. Raises InvalidDataset if a file has another size than when it was looked at."""
    parts = []
    for head, entry, start, stop in pieces:
        parts.append(head)
        if start == stop:
            continue
        wanted = stop - start + (stop == entry.size)  # a byte more would show that the file has grown
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
        parts += data, bytes(-len(data) % 512)
    return b''.join(parts)


def _plans(listing: _Listing) -> Iterator[_Plan]:
    """The tar stream of the segments, cut into blocks."""
    for path, entries in listing:
        pieces: List[_Piece] = []
        room = _BLOCK
        for entry in entries:
            head = _tar_header(entry)
            size, start = entry.size, 0
            while len(head) + size - start > room:
                stop = start + max(0, room - len(head))
                pieces.append((head[:room], entry, start, stop))
                yield path, pieces, b''
                head, start = head[room:], stop
                pieces, room = [], _BLOCK
            pieces.append((head, entry, start, size))
            room -= len(head) + size - start
            room -= room % 512  # for the zeros
        yield path, pieces, b''


def _sha256(data: bytes = b'') -> Any:
    import hashlib
    try:
        return hashlib.sha256(data)
    except ValueError:  # "no reason supplied", where OpenSSL finds no memory
        raise MemoryError from None


class _Block(NamedTuple):
    """A block that was read, from files or from an archive."""
    path: str  # of its segment
    payload: Any  # its bytes, or what was made of them
    digest: bytes  # SHA-256 of its bytes
    size: int = 0  # bytes of files in it
    length: int = 0  # bytes in the archive
    source: str = ''  # the directory whose files it was read from, if they may be linked


def _process(job: _Job, listing: _Listing, work: Callable[[bytes], Any],
             is_all: bool = False) -> Generator[_Block, None, None]:
    """Read, hash and give to `work` every block, in parallel; yield them, with what it made of them, in order."""
    def process(plan: _Plan) -> _Block:
        path, pieces, payload = plan
        payload = payload or _read_pieces(pieces)
        size = sum([stop - start for _, _, start, stop in pieces])
        job.add(size if is_all else 0)  # reading is the progress if it is all of the job
        return _Block(path, work(payload), _sha256(payload).digest(), size)

    def plans() -> Iterator[_Plan]:
        is_fast = True
        for path, pieces, payload in _plans(listing):
            # Threads that open many files wait for each other, so one reads them here, unless the disk is slow.
            if is_fast and len(pieces) > _MANY_FILES:
                begin = time.monotonic()
                payload = _read_pieces(pieces)
                is_fast = time.monotonic() - begin < 4e-5 * len(pieces)
            yield path, pieces, payload
    return _ordered(job, _cores(), process, plans())


def _digest(data: Any) -> str:
    """Of a segment, from the digests of its blocks."""
    return f'sha256:{_sha256(data).hexdigest()}'


def _dataset_digest(segments: Iterable[_Segment]) -> str:
    """The digest of a dataset: SHA-256 over the path, a zero byte and the digest of each segment."""
    parts = [segment.path.encode('utf-8') + b'\0' + bytes.fromhex(segment.digest[7:]) for segment in segments]
    return _digest(b''.join(parts))


def _hash(job: _Job, listing: _Listing) -> Mapping[str, bytes]:
    """Read all files of some segments; return the digests of the blocks of each, one after another, by its path."""
    found: Dict[str, Any] = defaultdict(bytearray)
    for block in _process(job, listing, len, is_all=True):
        found[block.path] += block.digest
    return found


def _digest_segments(job: _Job, root: Path) -> List[_Segment]:
    """The segments of a dataset, after reading all its files."""
    survey = _Survey(root)
    job.begin(survey.size)
    blocks = _hash(
        job, survey.listing(survey.segments))
    return [segment._replace(digest=_digest(blocks[path])) for path, segment in survey.segments.items()]


# ---------------------------------------------------------------------------------------
# Datasets
#
# A dataset is a directory with at least one partition. Its name is safe in any path and any key of any storage.
# ---------------------------------------------------------------------------------------

_META_LIMIT, _README_LIMIT = 16 << 20, 1 << 20  # bytes of meta.json; characters of README.md that are shown
_NAME = '[A-Za-z0-9][A-Za-z0-9._-]{0,127}'


class _Receipt(NamedTuple):
    """What is known of an installed directory."""
    name: str = ''
    segments: _Segments = ()  # of the whole dataset
    installed: FrozenSet[str] = frozenset()  # paths of the segments that are here
    source: _MaybeText = None  # URL from which it was pulled or copied
    version: str = ''  # of the object; '' if it was copied
    when: _MaybeText = None  # UTC; set when it is written

    @property
    def digest(self) -> str:
        return _dataset_digest(self.segments)

    @property
    def is_partial(self) -> bool:
        return len(self.installed) < len(self.segments)

    def here(self) -> List[_Segment]:
        return [segment for segment in self.segments if segment.path in self.installed]


_NO_RECEIPT = _Receipt()  # of what was registered or created


class Dataset(Mapping[str, Path]):
    """A directory with data/<partition>/...: a read-only mapping of the partitions' names to their directories.

        for file in ds['train'].iterdir(): ...      UnknownPartition, a KeyError, if there is no such partition

    root: pathlib.Path of the directory. name: str. meta: the contents of meta.json. digest: 'sha256:...'.
    Iteration is sorted. A Dataset can be copied and pickled, for instance for worker processes, which do not read the
    directory again.
    Raises InvalidDataset if `root` is not a dataset.
    """
    @_system_errors()
    def __init__(self, root: _Path, name: _MaybeText = None, receipt: _Receipt = _NO_RECEIPT) -> None:
        """receipt: only etcetera itself gives one."""
        self.root = Path(_check_path(root))  #: pathlib.Path of the dataset's directory
        self.location = self.root  #: the same, as in etcetera 0.0.x
        self.data = self.root / 'data'  #: pathlib.Path of the directory of the partitions' directories
        self._partitions = _validate(self.root)
        self.name = name or self.root.resolve().name  #: str
        self._receipt = receipt
        self._segments: _Segments = receipt.segments  # as soon as they are known

    def __getitem__(self, partition: str) -> Path:
        if partition in self._partitions:
            return self.data / _to_os(partition)
        shown = _masked(str(partition))
        raise UnknownPartition(f"no partition '{shown}' in {self.name}, as it is here: {', '.join(self)}",
                               f"'etc pull {self.name} -p {shown}' would add it, if there is one")

    def __iter__(self) -> Iterator[str]:
        return iter(self._partitions)

    def __len__(self) -> int:
        return len(self._partitions)

    def __repr__(self) -> str:
        return f"<Dataset {self.name}: {', '.join(self)}>"

    @property
    @_system_errors()
    def meta(self) -> Dict[str, Any]:
        """The contents of meta.json; {} if there is none."""
        return _read_meta(self.root)

    @property
    @_system_errors()
    def digest(self) -> str:
        """'sha256:...' of all contents. If no receipt holds it, every file is read."""
        return _dataset_digest(_perform(None, self._read))

    def _read(self, job: _Job) -> _Segments:
        """The segments of all contents. If no receipt holds them, every file is read, but once."""
        self._segments = self._segments or _digest_segments(job, self.root)
        return self._segments

    # What etcetera 0.0.x offered, too
    def file(self, *parts: str) -> Path:
        """The path of something in the dataset's directory."""
        return self.root.joinpath(*parts)

    def partitions(self) -> List[str]:
        """The same as list(self)."""
        return list(self)


def _validate(root: Path, label: str = '') -> List[str]:
    """The partitions of the dataset at `root`. Raises InvalidDataset, which calls the directory `label`."""
    label = label or str(root)
    if not root.is_dir():
        raise InvalidDataset(f'no directory {_masked(label)}', 'check the path; an archive must be unpacked first')
    try:
        partitions = _partitions(root) if (root / 'data').is_dir() else []
        if not partitions:
            raise InvalidDataset("it needs a directory 'data' with a directory for each partition")
        _read_meta(root)
    except InvalidDataset as e:
        raise InvalidDataset(f'{label} is no dataset: {e.message}', e.remedy) from None
    return [path[5:] for path, _ in partitions]  # without 'data/'


def _read_meta(root: Path) -> _Row:
    path = root / 'meta.json'
    if not path.exists():
        return {}
    try:
        if not path.is_file() or path.stat().st_size > _META_LIMIT:
            raise ValueError(f'it is not a file of at most {_META_LIMIT} bytes')
        meta = json.loads(path.read_text('utf-8-sig'))
        if isinstance(meta, dict):
            return meta
        raise ValueError('it must hold a JSON object, {...}')
    except (ValueError, RecursionError) as e:
        raise InvalidDataset(f'meta.json is not JSON: {e}') from None


def _read_about(root: Path) -> _Row:
    """What meta.json and the start of README.md hold."""
    about = {'meta': _read_meta(root), 'readme': ''}
    if (root / 'README.md').is_file():
        with open(root / 'README.md', encoding='utf-8-sig', errors='replace') as file:
            about['readme'] = file.read(_README_LIMIT)
    return about


def _is_name(text: str) -> bool:
    """Whether a dataset can have this name, which must be safe in any path and any key."""
    return bool(re.fullmatch(_NAME, text))


# ---------------------------------------------------------------------------------------
# Deflate
#
# gzip (RFC 1951 and 1952) by this machine's libdeflate, which takes about half of zlib's time, and fewer bytes; by
# Python's zlib if there is none, or if $ETC_LIBDEFLATE is 0. Each reads what the other writes, and what libdeflate
# cannot read, zlib gets to judge, so errors are the same. libdeflate is loaded by a full path, as some systems would
# look for a bare name in the current directory, too.
# ---------------------------------------------------------------------------------------

_RUNS = -1  # a level that is fast, as only runs of a byte shrink; to zlib the default, to libdeflate its absolute value
_GZIP_HEADER_SIZE = 10  # bytes of a header without extra fields


@lru_cache(maxsize=None)
def _libdeflate() -> Any:
    """libdeflate, if it is there and to be used, else None."""
    is_slow = sys.implementation.name != 'cpython'  # ctypes of PyPy copies bytes one by one
    if is_slow or os.environ.get('ETC_LIBDEFLATE') == '0':
        return None
    with suppress(Exception):  # whatever keeps it from being loaded, zlib will do
        import ctypes
        tops = sys.base_prefix, '/opt/homebrew', '/usr/local', '/opt/local', '/usr'
        places = 'lib', f'lib/{os.uname().machine}-linux-gnu', 'lib64'
        paths = map('/'.join, itertools.product(
            tops, places, ('libdeflate.so.0', 'libdeflate.0.dylib')))
        library = ctypes.CDLL(next(filter(os.path.exists, paths)))
        library.libdeflate_alloc_compressor.restype = ctypes.c_void_p
        library.libdeflate_gzip_compress.restype = ctypes.c_size_t
        library.libdeflate_alloc_decompressor.restype = ctypes.c_void_p
        return library
    return None


def _deflate(data: bytes, level: int) -> bytes:
    """What follows the header of a gzip member. Level 0 stores."""
    library = _libdeflate()
    if library:
        from ctypes import c_size_t, c_void_p
        room = bytes(len(data) + 4096)  # as nothing else knows this object yet, the library may write to it
        state = c_void_p(library.libdeflate_alloc_compressor(abs(level)))
        length = state and library.libdeflate_gzip_compress(state, data, c_size_t(len(data)), room, c_size_t(len(room)))
        library.libdeflate_free_compressor(state)
        if length:
            return room[_GZIP_HEADER_SIZE:length]
    strategy = 3 if level == _RUNS else 0  # Z_RLE, which Python 3.6 does not name, or the default
    deflate = zlib.compressobj(level, zlib.DEFLATED, 31, 8, strategy)
    return (deflate.compress(data) + deflate.flush())[_GZIP_HEADER_SIZE:]


def _inflate(member: bytes) -> bytes:
    """What a gzip member holds, but at most _BLOCK + 1 bytes; b'' if it is damaged, or anything else."""
    library = _libdeflate()
    if library:
        from ctypes import byref, c_size_t, c_void_p
        payload = bytes(min(int.from_bytes(member[-4:], 'little'), _BLOCK))  # which the library may write to, as above
        taken = c_size_t()
        state = c_void_p(library.libdeflate_alloc_decompressor())
        failed = not state or library.libdeflate_gzip_decompress_ex(
            state, member, c_size_t(len(member)), payload, c_size_t(len(payload)), byref(taken), None)
        library.libdeflate_free_decompressor(state)
        if not failed and taken.value == len(member):
            return payload
    inflater = zlib.decompressobj(31)
    try:
        payload = inflater.decompress(member, _BLOCK + 1)
    except zlib.error as e:
        if 'Error -4' in str(e):  # Z_MEM_ERROR
            raise MemoryError from None
        return b''
    return payload if inflater.eof and not inflater.unused_data else b''


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
_FOOTER_SIZE = _FIELD_OFFSET + 8 + len(_EMPTY)
_LONGEST_BLOCK = _BLOCK + 4096  # bytes in the archive: stored, a block grows by 5 bytes in each 16 KiB or more
_INDEX_MEMBER = re.escape(_GZIP) + rb'(?s:..)ei(?s:..)([^\0]*)' + re.escape(_EMPTY)  # JSON holds no zero byte
_INDEX_STEP = 8000  # bytes of index a member: BusyBox's gunzip fails on much longer extra fields
_INDEX_LIMIT = 16 << 20  # bytes of index: enough for some 80,000 partitions
_KIND_AT = 156  # where the type flag is in a ustar header, which takes 512 bytes
_USTAR_FIELDS = struct.Struct('100s7s17x11s21xc100s255x')  # name, mode, size, type flag and link target
_NOT_ON_WINDOWS = (  # https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    r'[\\:<>"|?*\x00-\x1f]|[. ](?:/|\Z)|(?:\A|/)(?:con|prn|aux|nul|com\d|lpt\d)(?:\.[^/]*)?(?:/|\Z)')


def _member(tag: bytes, data: bytes) -> bytes:
    """The header of a gzip member with one extra field."""
    return _GZIP + _EXTRA.pack(len(data) + 4, tag, len(data)) + data


def _index_members(parts: Iterable[bytes]) -> bytes:
    return b''.join([_member(b'ei', part) + _EMPTY for part in parts])


def _compress(level: int, payload: bytes) -> bytes:
    """A block of the archive, from the bytes that it is to hold, at the level that pays, judged by samples of them."""
    if level and len(payload) > 65536:
        step = len(payload) // 4
        samples = b''.join([payload[start:start + 2048] for start in range(step // 2, len(payload), step)])
        best = len(_deflate(samples, level))
        if best > 0.97 * len(samples):
            level = 0
        elif len(_deflate(samples, _RUNS)) < 1.06 * best:
            level = _RUNS  # as for small files that do not shrink, but for the padding between them
        elif level == Config.compression_level and not _libdeflate():
            # It may take 2 % more bytes than gzip's. The level below often takes no more, in two thirds of the time.
            middle = payload[len(payload) // 2:][:32768]
            level -= len(_deflate(middle, level - 1)) < 1.012 * len(_deflate(middle, level))
    body = _deflate(payload, level)
    if level and len(body) > len(payload):
        body = _deflate(payload, 0)
    return _member(b'et', struct.pack('<I', _BLOCK_HEADER_SIZE + len(body))) + body


def _archive_end(level: int, segments: _Segments) -> bytes:
    """What follows the blocks: the end of the tar, the index and the footer."""
    index = {'etcetera': 1, 'digest': _dataset_digest(segments), 'segments': [each._asdict() for each in segments]}
    text = json.dumps(index, ensure_ascii=False, separators=(',', ':')).encode('utf-8')
    end = _compress(level, _ZEROS)
    offset = segments[-1].stop + len(end)
    parts = [text[start:start + _INDEX_STEP] for start in range(0, len(text), _INDEX_STEP)]
    return end + _index_members(parts) + _member(b'ef', struct.pack('<Q', offset)) + _EMPTY


def _read_index(size: int, read: Callable[[int, int], bytes]) -> _Segments:
    """The segments of an archive, from its size and what reads it; () if it has no index that we know. Or Corrupt."""
    end = max(0, size - _FOOTER_SIZE)
    footer = read(end, size)
    offset_bytes = footer[_FIELD_OFFSET:_FIELD_OFFSET + 8]
    if footer != _member(b'ef', offset_bytes) + _EMPTY:
        if read(0, min(size, _FIELD_OFFSET)) == _member(b'et', bytes(4))[:_FIELD_OFFSET]:
            raise Corrupt('the archive is damaged: its index is missing')
        return ()
    offset = int.from_bytes(offset_bytes, 'little')
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        data = read(offset, end) if 0 < end - offset <= _INDEX_LIMIT else b''
        parts = re.findall(_INDEX_MEMBER, data)
        text = b''.join(parts)
        if (_index_members(parts) != data
                or text.count(b'[') + text.count(b'{') > _INDEX_LIMIT >> 6  # which would take much memory to parse,
                or re.search(rb'\d{65}', text)):  # or time
            raise ValueError
        index = json.loads(text.decode('utf-8'))
        if index['etcetera'] != 1:
            return ()
        segments = list(map(_Segment.from_json, index['segments']))
        paths = [segment.path for segment in segments]
        starts = [segment.offset for segment in segments]
        stops = [segment.stop for segment in segments]
        if (index['digest'] == _dataset_digest(segments)
                and paths == ['.', *sorted(set(paths[1:]), key=lambda path: (path.count('/'), path))]
                and all(_is_safe(path) and path == _segment_of(path + '/x') for path in paths[1:])
                and starts == [0, *stops[:-1]]
                and stops == sorted(set(stops) - {0})
                and stops[-1] <= offset):
            return segments
    raise Corrupt('the archive is damaged: its index is unreadable')


def _is_safe(name: str) -> bool:
    """Whether a name in an archive stays below the directory where it is unpacked, on this system."""
    padded = f'/{name}/'
    if '//' in padded or '/./' in padded or '/../' in padded or '\0' in name:
        return False
    return os.sep == '/' or not re.search(_NOT_ON_WINDOWS, name, re.I)


def _write_file(path: str, mode: int,
                pieces: Iterable[Any], size: int = 0, near: Any = (0, None)) -> None:
    """Create a read-only file, with the x bit at once, as some disks have no chmod; with `size`, so large at once."""
    # near: how much of the path leads to a directory that is open, and its descriptor; so nobody has to look for it.
    known, directory = near
    try:
        file = os.open(path[known:], _CREATE, mode, dir_fd=directory)
    except PermissionError:  # some network file systems do not open a new read-only file for writing
        with suppress(FileNotFoundError):
            os.unlink(path)
        file = os.open(path, _CREATE, mode | 0o200)
        with suppress(OSError):
            os.chmod(path, mode)
    except OSError as e:
        e.filename = path
        raise
    try:
        if size:
            with suppress(OSError):
                os.ftruncate(file, size)
        for piece in pieces:
            while piece:
                piece = piece[os.write(file, piece):]
    except OSError as e:
        if e.errno in _NoRoom.codes:
            e.filename = path  # which write() does not tell
        raise
    finally:
        os.close(file)


def _link_or_copy(source: str, target: str) -> None:
    """Give a read-only file a second name. Make a read-only copy where hard links do not work, or would not be safe."""
    mode = os.stat(source).st_mode
    try:
        if mode & 0o222 or os.path.islink(source) or os.name == 'nt':
            raise OSError  # on Windows, a link can be removed only if the file is writable, and so would the other be
        os.link(source, target)
    except OSError:
        with open(source, 'rb') as file:
            _write_file(target, mode & 0o555, iter(partial(file.read, _BLOCK), b''))


def _symlink(target: _Path, path: _Path) -> None:
    try:
        os.symlink(target, path, target_is_directory=os.path.isabs(target))  # only Windows heeds the flag
    except (FileExistsError, FileNotFoundError, NotADirectoryError):
        raise
    except OSError as e:
        raise Error(f'this disk cannot hold links: {e.strerror}',
                    "set 'home' to a place on another disk, or register with --copy") from None


class _Sink:
    """Writes the entries of an archive below `root`: nothing elsewhere, nothing twice, nothing through a link."""
    def __init__(self, root: _Path) -> None:
        self.root = f'{os.path.realpath(root)}{os.sep}'
        self.links: _Texts = {}  # targets of links, made at the end, so that nothing is written through one

    def path(self, name: str) -> str:
        """Where an entry goes. Raises Corrupt if that is not below the root."""
        name = name.rstrip('/')
        if not _is_safe(name) or name.count('/') >= _DEPTH:
            raise Corrupt(f"the archive holds the unsafe name '{name[:300]}'", 'do not trust it')
        return self.root + _to_os(name)

    @contextmanager
    def filling(self, confined: bool) -> Iterator[None]:
        """Explain refusals; at the end make the links, which may not lead out; if confined, each as a push has it."""
        try:
            yield
            for name, target in self.links.items():
                with suppress(ValueError):  # of NUL, or half a surrogate pair
                    _symlink(_to_os(target), self.path(name))
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as e:
            name = str(e.filename2 or e.filename)[len(self.root):]
            if isinstance(e, FileExistsError):
                raise Corrupt(f"the archive holds '{name}' twice (or names that this disk cannot tell apart)") from None
            if not os.path.isdir(self.root):
                raise  # somebody has removed it
            raise Corrupt(f"the archive is damaged: it holds '{name}', but not the directory around it") from None
        for name, target in self.links.items():
            path = self.path(name)
            is_sound = os.path.exists(path)  # first, as realpath() may follow chains of links for ever
            if is_sound and confined:
                is_sound = target == _kept_link(self.root, name, _segment_of(name + '/' * os.path.isdir(path)))
            elif is_sound:
                # By its text, too, as a way back into the root from above it would lead elsewhere once that has moved.
                meant = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                real = f'{os.path.realpath(path)}{os.sep}'
                is_sound = real.startswith(self.root) and not f'{meant}/'.startswith(('/', '../'))
            if not is_sound:
                raise Corrupt(f"the archive holds the link '{name}' to '{target[:300]}', which leads out of the "
                              'dataset or nowhere')


def _pax_records(data: bytes) -> Iterator[Tuple[bytes, bytes]]:
    """The keys and values in a pax header (POSIX pax, "Extended Header"). Raises ValueError."""
    data = data.rstrip(b'\0')
    start = 0
    while start < len(data):
        head = re.compile(rb'(\d{1,20}) ([^=]+)=').match(data, start)
        stop = start + int(head.group(1)) if head else 0
        if not head or stop < head.end() or data[stop - 1:stop] != b'\n':
            raise ValueError('a malformed pax header')
        yield head.group(2), data[head.end():stop - 1]
        start = stop


class _Stream:
    """Chunks of bytes as a file that is read once, from start to end."""
    def __init__(self, chunks: Iterable[Any]) -> None:
        self.chunks = iter(chunks)
        self.data: Any = b''  # the last chunk that was taken
        self.at = 0  # up to where it has been read

    def pieces(self, size: int) -> Iterator[Any]:
        """The next bytes, as slices of chunks; fewer at the end."""
        while size:
            if self.at == len(self.data):
                self.data = next(self.chunks, b'')
                self.at = 0
                if not self.data:
                    break
            piece = self.data[self.at:self.at + size]
            self.at += len(piece)
            size -= len(piece)
            yield piece

    def read(self, size: int) -> Any:
        """The next bytes, or fewer at the end; a slice of a chunk if they are in one."""
        stop = self.at + size
        if stop <= len(self.data):
            self.at = stop
            return self.data[stop - size:stop]
        parts = list(self.pieces(size))
        return parts[0] if len(parts) == 1 else b''.join(parts)


class _SegmentReader(_Stream):
    """Writes one segment into a sink, and refuses whatever is not canonical, so that the digest holds for each file."""
    def __init__(self, path: str, blocks: Iterable[_Block], sink: _Sink, notes: Any) -> None:
        super().__init__(self.payloads(blocks, notes))
        self.path, self.sink = path, sink
        self.source, self.digests = '', bytearray()  # of the last block; of all blocks
        self.near: Any = (0, None)  # what _write_file() may know of the segment's directory

    def close(self) -> None:
        if self.near[0]:
            os.close(self.near[1])

    def payloads(self, blocks: Iterable[_Block], notes: Any) -> Iterator[bytes]:
        """The tar stream. Once all of a block has been taken, and so written, note that in the journal."""
        for block in blocks:
            if len(self.data) % _BLOCK:  # only the last block may be shorter
                raise self.error('block length')
            self.source = block.source
            self.digests += block.digest
            yield block.payload
            print(json.dumps([self.path, block.length, block.digest.hex()]), file=notes)
            os.utime(self.sink.root + os.pardir)  # a sign of life, or this would soon count as abandoned

    def extract(self, promised: Optional[_Segment]) -> _Segment:
        """Write all of it, and return it as it was read. Raises Corrupt if it is not what was promised."""
        files = size = 0
        has_directory = False
        last = 'data\0' if self.path.startswith('data/') else ''  # by what the last entry is sorted
        for name, length, is_executable, link in iter(self.entry, ()):
            # Which entries a segment holds, and in which order
            belongs = name.startswith(self.path + '/')
            if self.path == '.':
                belongs = name == 'data/' or '/' not in name and name != _RECEIPT
            order = name.replace('/', '\0')  # as lists of their components would be
            around = order[:order.rfind('\0', 0, -1) + 1]  # the last entry is this directory, or in it
            if not (belongs and last.startswith(around) and last < order):
                raise self.error('place')
            last = order
            path = self.sink.path(name)
            if name.endswith('/'):
                has_directory = True
                self.add_directory(name, path)
                continue
            files += 1
            size += length
            if promised and size > promised.size:
                raise self.error('size')
            stop = self.at + length
            padding = -length % 512
            mode = 0o555 if is_executable else 0o444
            if link:
                self.sink.links[name] = link
            elif stop > len(self.data):
                _write_file(path, mode, self.pieces(length), length)
            else:
                if self.source:
                    _link_or_copy(_join(self.source, name), path)
                else:
                    data = memoryview(self.data) if length > 4096 else self.data  # views copy nothing, but take time
                    _write_file(path, mode, [data[self.at:stop]], 0, self.near)
                self.at = stop
            # It ends in the block in which the file does, if that does not end too early.
            if not (self.data and self.data.startswith(_ZEROS[:padding], self.at)):
                raise self.error('padding')
            self.at += padding
        segment = _Segment(self.path, 0, 0, files, size, _digest(self.digests))
        if not has_directory or promised and segment != promised._replace(offset=0, length=0):
            raise Corrupt(f"the archive is damaged: '{self.path}' does not have the digest that the index promises")
        return segment

    def add_directory(self, name: str, path: str) -> None:
        """Make a directory, and keep that of the segment open, as most files go there."""
        if name != 'data/' or not os.path.isdir(path):  # which reused partitions have made
            os.mkdir(path)
        if os.name == 'posix' and name == f'{self.path}/':
            directory = os.open(path, os.O_RDONLY)
            self.near = len(path) + 1, directory

    def entry(self) -> Sequence[Any]:
        """The name, size, x bit and link target of the next entry, or (). Raises Corrupt if it is not canonical."""
        header = self.read(512)
        if not header:
            return ()
        pax = {}
        try:
            # The most frequent case, made fast
            bare, size = header[:100].rstrip(b'\0'), int(header[124:135], 8)
            if header == _ustar(bare, b'0', b'0000644', size) and size >= 0 and bare[-1:] != b'/':
                return bare.decode('ascii'), size, False, ''
            if header[_KIND_AT] == ord('x'):
                if not 0 < size <= 32768:
                    raise ValueError
                header += self.read(size + -size % 512 + 512)
                pax = dict(_pax_records(header[512:-512]))
            raw_name, mode, digits, kind, raw_link = _USTAR_FIELDS.unpack(header[-512:])
            bare = raw_name.rstrip(b'\0')
            size = int(digits, 8)
            name = pax.get(b'path', bare).decode()
            link = pax.get(b'linkpath', raw_link.rstrip(b'\0')).decode()
            size = int(pax.get(b'size', size))
            is_executable = name.endswith('/') or mode == b'0000755' and not link
            entry = _Entry(name, size, is_executable, link)
            is_possible = size == 0 or size > 0 and kind == b'0'
            is_possible &= not (link and kind == b'5')  # as nothing would remain of the link of a directory
            if is_possible and header == _tar_header(entry):
                return entry[:4]
        except ValueError:
            pass
        raise self.error('header')

    def error(self, rule: str) -> Error:
        return Corrupt(f"the archive is damaged: '{self.path}' violates the format ({rule})")


def _extract(blocks: Iterable[_Block], promised: Mapping[str, _Segment], root: _Path,
             journal: Optional[Path] = None, head: str = '') -> List[_Segment]:
    """Write complete segments below `root`; return them as they were read. promised: what an index says, by path."""
    # journal: a new file, for _replay(): `head`, which identifies the object, then a line of each block once written
    sink = _Sink(root)
    groups = itertools.groupby(blocks, operator.attrgetter('path'))
    with open(journal or os.devnull, 'w', buffering=1) as notes, sink.filling(confined=True):
        print(head, file=notes)
        segments = []
        for path, own in groups:
            reader = _SegmentReader(path, own, sink, notes)
            with closing(reader):
                segments.append(reader.extract(promised.get(path)))
        return segments


def _replay(job: _Job, work: Path, head: str, paths: Container[str]) -> Generator[_Block, None, None]:
    """The first blocks of some segments, from an interrupted extraction, as far as they hash as its journal says."""
    root = work / 'new'
    with suppress(OSError, Error, ValueError, TypeError), open(work / 'journal') as file:
        if file.readline() != head + '\n':
            return
        survey = _Survey(root, paths)
        for path, notes in itertools.groupby(map(json.loads, file), operator.itemgetter(0)):
            with closing(_process(job, survey.listing([path]), bytes)) as blocks:
                for (_, length, digest), block in zip(notes, blocks):
                    if block.digest.hex() != digest:
                        return
                    yield block._replace(length=int(length), source=str(root))


def _block_length(data: bytes) -> int:
    """The length of the block that some bytes of an archive begin with; 0 if none does."""
    header = data[:_BLOCK_HEADER_SIZE]
    length = header[_FIELD_OFFSET:]
    return int.from_bytes(length, 'little') if header == _member(b'et', length) else 0


def _inflate_block(item: Tuple[str, Iterable[bytes]]) -> _Block:
    """item: the path of its segment, and its bytes in parts."""
    path, parts = item
    member = b''.join(parts)
    payload = _inflate(member)
    if not payload or len(payload) % 512:
        raise Corrupt('the archive is damaged: a block does not match its checksum or size')
    return _Block(path, payload, _sha256(payload).digest(), length=len(member))


def _inflate_blocks(job: _Job, chunks: Iterable[bytes], segments: Iterable[_Segment]) -> Iterator[_Block]:
    """The blocks in the bytes of some segments, or of what is left of these."""
    def members() -> Iterator[Tuple[str, Iterable[bytes]]]:
        stream = _Stream(map(memoryview, chunks))  # whose slices are no copies
        for segment in segments:
            left = segment.length
            while left:
                header = stream.read(_BLOCK_HEADER_SIZE)
                length = _block_length(header)
                if not _BLOCK_HEADER_SIZE < length <= min(left, _LONGEST_BLOCK):
                    raise Corrupt('the archive is damaged: a block does not start or end where it should')
                yield segment.path, [header, *stream.pieces(length - _BLOCK_HEADER_SIZE)]
                left -= length
    threads = min(_cores(), 8)  # that is fast enough, and what waits would be fetched again after a kill
    return _ordered(job, threads, _inflate_block, members())


def _end_digests(first: bytes, last: bytes) -> List[bytes]:
    """The digests of the block that some bytes of an archive begin with, and of the one that others end with."""
    starts = [match.start() for match in re.finditer(re.escape(_GZIP), last)]
    ends = [last[start:] for start in starts if start + _block_length(last[start:]) == len(last)]
    members = first[:_block_length(first)], b''.join(ends[-1:])
    return [_inflate_block(('', [member])).digest for member in members]


# ---------------------------------------------------------------------------------------
# Archives of other tools
#
# Any .tgz that holds a dataset can be pulled: as a whole and in one pass, since it has no index. tarfile reads it, but
# treats a bad or missing header as the end of the archive, and sets no limits. So it gets a forward-only stream that
# raises an error at an early end and limits the size of headers, and each header is checked first. _Sink checks names
# and targets of links.
# ---------------------------------------------------------------------------------------

_TAR_HEADERS = 4 << 20  # bytes of names, pax records and sparse maps that may stand before one entry
_SPARSE_ZEROS = 1 << 30  # bytes that a sparse file may have beyond 1,024 times those that are stored


class _TarStream(_Stream):
    """The bytes of a tar as tarfile reads them."""
    position = 0
    limit = sys.maxsize  # a position that the headers of one entry may not pass
    kept = 0  # bytes of global headers, which tarfile keeps to the end, so that all others may take less

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        while self.position != position:
            self.read(min(position - self.position, _BLOCK))

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read."""
        if not 0 <= size <= self.limit - self.position:
            raise EOFError(f'it seeks backward, or the headers of one entry take more than {_TAR_HEADERS} bytes')
        while self.at + size > len(self.data):
            more = next(self.chunks, b'')
            if not more:
                raise EOFError('it ends too early')
            self.data = self.data[self.at:] + more
            self.at = 0
        return bytes(self.data[self.at:self.at + size])

    def read(self, size: int) -> bytes:
        data = self.peek(size)
        self.at += size
        self.position += size
        return data


def _extract_foreign(job: _Job, chunks: Iterable[bytes], root: Path) -> None:
    """Write what a .tgz holds below `root`."""
    import gzip
    import tarfile
    plain = gzip.GzipFile(fileobj=_Stream(chunks))  # type: ignore[call-overload]
    pieces = _ordered(job, 1, plain.read, itertools.repeat(_BLOCK))  # a thread inflates ahead
    stream = _TarStream(itertools.takewhile(len, pieces))
    sink = _Sink(root)

    class Strict(tarfile.TarInfo):
        """It lets no error of a header pass for the end of the archive."""
        @classmethod
        def fromtarfile(cls, tar: Any) -> Any:
            header = stream.peek(512)
            outer = stream.limit  # of the extended header that this one belongs to
            stream.limit = min(outer, stream.position + _TAR_HEADERS - stream.kept)
            try:
                if header[_KIND_AT] in b'xgX':  # pax: POSIX's for one entry, for all that follow, Solaris's
                    size = cls.frombuf(header, tar.encoding, tar.errors).size
                    stream.kept += size * header.startswith(b'g', _KIND_AT)
                    # Up to Python 3.12, tarfile ignores a malformed record and all that follow it.
                    dict(_pax_records(stream.peek(512 + size)[512:]))
                return super().fromtarfile(tar)
            except tarfile.HeaderError as e:
                if any(header):
                    raise tarfile.ReadError(str(e)) from None
                raise  # what tells tarfile of the end
            finally:
                stream.limit = outer

    with closing(pieces), sink.filling(confined=False):
        try:
            tar: Any = tarfile.open(fileobj=stream, mode='r:', encoding='utf-8', tarinfo=Strict)  # type: ignore
            for member in iter(tar.next, None):
                tar.members = []  # or they would pile up in memory
                _extract_member(tar, member, sink)
            for chunk in itertools.chain([stream.data[stream.at:]], stream.chunks):  # which may only be padding
                if chunk.strip(b'\0'):
                    raise Corrupt('the archive is damaged or not a .tgz: another archive follows its end',
                                  'pack the files of both as one')
        except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, LookupError, ArithmeticError,
                RecursionError) as e:
            if getattr(e, 'errno', None) is not None:  # without a number, it is gzip's
                raise
            raise Corrupt(f'the archive is damaged or not a .tgz: {e}') from None


def _plain_name(name: str) -> str:
    """Without the ./ that tars like to put before it. An absolute name stays absolute, to be refused."""
    if name.startswith('/'):
        return name
    return '/'.join(part for part in name.split('/') if part not in ('', '.'))


def _extract_member(tar: Any, member: Any, sink: _Sink) -> None:
    """Write an entry. Of a file's mode only the owner's x bit is kept, as on push."""
    name = _plain_name(member.name)
    if (not name and member.isdir()
            or member.type == b'V'  # GNU tar's name of the volume
            or name.split('/')[0] == _RECEIPT
            or re.match(_LITTER, name) and not member.isdir()):
        return
    path = sink.path(name)
    os.makedirs(path if member.isdir() else os.path.dirname(path), exist_ok=True)
    if member.issym():
        sink.links[name] = member.linkname
    elif member.islnk():
        original = _plain_name(member.linkname)
        target = sink.path(original)
        if original in sink.links:
            sink.links[name] = sink.links[original]
        elif os.path.isfile(target):
            _link_or_copy(target, path)
        else:
            raise Corrupt(f"the archive holds the hard link '{name}' to '{member.linkname}', which is not in it")
    elif member.isreg():
        stored = tar.offset - member.offset_data  # whatever a sparse map says
        if member.size > (stored << 10) + _SPARSE_ZEROS:
            raise Corrupt(f"the archive holds '{name}', which would expand to {member.size} bytes, nearly all zeros")
        mode = 0o555 if member.mode & 0o100 else 0o444
        _write_file(path, mode, iter(partial(tar.extractfile(member).read, _BLOCK), b''))
    elif not member.isdir():
        raise Corrupt(f"the archive holds '{name}', which is no file, link or directory ({member.type!r})",
                      "pack it with tar's default options")


# ---------------------------------------------------------------------------------------
# HTTP
#
# One client for all, which follows no redirect. What is retried: a request whose connection breaks or stays silent, and
# one that is answered with a status in _TRANSIENT, or as the caller's judge() says; five times in all, with pauses of
# about 0.4, 0.9, 1.8 and 3.5 seconds, and as Retry-After asks, up to a minute. Once one has been answered there are two
# more, 7 seconds apart: the server may be restarting. A kept connection that was closed does not count as a try, nor
# does a refusal for overload while other requests succeed: fewer are then made at once. Besides, remotes go on with a
# range where it broke, and with an upload to Google as long as it advances. A metadata service that is silent gets one.
# ---------------------------------------------------------------------------------------

_TIMEOUT = 60.0  # seconds of silence after which a connection counts as broken, and of Retry-After at most
_READ_TIMEOUT = 20.0  # the same for the first try of a request that only reads
_NEAR_TIMEOUT, _LAST_TIMEOUT = 2.0, 1.0  # for a metadata service; for what is tidied up after an interruption
_CONNECT = 15.0  # seconds that connecting may take
_IDLE = 60.0  # seconds after which a kept connection is not used again, as a NAT may have forgotten it
_TRIES, _MORE_TRIES = 5, 2  # at first; and once a request has been answered, but for overload
_LAST_TRIES = 2  # of the request that ends an upload to S3 after an interruption or failure
_SLICE = 1 << 17  # bytes that are sent at once, or received, or up to four times as many of a long range
_TRANSIENT = 408, 429, 500, 502, 503, 504  # statuses after which another try may help
_REPLY_LIMIT = 32 << 20  # bytes of an answer, if the caller sets no limit
_PORT = '(?:0*(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))'  # to 65535
_SITE = rf'https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::{_PORT})?'


class _Request(NamedTuple):
    """What a server is asked."""
    method: str
    url: str  # percent-encoded, as it is sent
    headers: _Texts = {}
    body: Sequence[Any] = ()  # of bytes
    limit: int = _REPLY_LIMIT  # bytes that the answer may have
    into: Any = None  # a file for the body of an answer with status 200
    tries: int = _TRIES + _MORE_TRIES  # at most
    is_near: bool = False  # whether it goes to a metadata service: soon, and through no proxy
    is_vital: bool = False  # whether an interruption waits for the answer, if not for long
    condition: _Texts = {}  # for remotes: headers; they are cleared if the store turns out to know none
    keys: Any = None  # with which it is signed

    def digest(self, digest: Any) -> Any:
        """What a new hash object makes of the body."""
        for chunk in self.body:
            digest.update(chunk)
        return digest.digest()


class _Reply(NamedTuple):
    """What a server answers."""
    status: int
    headers: Any  # an email.message.Message, which finds names in any case
    body: bytes
    request: _Request = _Request('', '')

    def json(self) -> _Row:
        """The JSON object in the body; {} if there is none."""
        with suppress(ValueError, RecursionError):
            answer = json.loads(self.body)
            if isinstance(answer, dict):
                return answer
        return {}

    def xml(self, name: str) -> List[_Texts]:
        """The texts in each XML element of that name by their tags; [] if there is none, or if entities could grow."""
        from xml.etree import ElementTree
        if b'<!' in self.body.replace(b'\0', b'').replace(b'<![CDATA[', b''):  # in UTF-16, too
            return []
        with suppress(ElementTree.ParseError, LookupError, ValueError):  # LookupError: an unknown encoding
            root = ElementTree.fromstring(self.body.strip())  # S3 sends spaces to keep a connection open meanwhile
            for element in root.iter():
                element.tag = element.tag.rpartition('}')[2]
            return [{item.tag: item.text or '' for item in element} for element in root.iter(name)]
        return []

    def time(self, name: str) -> float:
        """Unix time of the date in a header; 0 if there is none."""
        from email.utils import parsedate_to_datetime
        with suppress(TypeError, ValueError, IndexError, OverflowError, OSError):  # OSError: on Windows, before 1970
            return parsedate_to_datetime(self.headers[name]).timestamp()
        return 0.0


def _judge(reply: _Reply) -> str:
    """'final', or whether to try again: 'later', or 'at once' because something was learnt."""
    return 'later' if reply.status in _TRANSIENT else 'final'


class _Http:
    """Makes requests. Threads share it."""
    most = 256.0  # requests that may be made at once
    successes = 0
    tls: Any = None

    def __init__(self, job: _Job, ca_bundle: _MaybeText = None) -> None:
        self.job, self.ca_bundle = job, ca_bundle
        self.idle: Any = defaultdict(list)  # connections that are kept, by what connection() takes
        self.busy: Dict[Any, _Request] = {}  # what is under way, by connection, unless it was interrupted
        job.at_end.append(self.interrupt)

    def interrupt(self) -> None:
        """Let all requests fail that are under way."""
        import socket
        for _ in range(100):
            busy = dict(self.busy)
            if not any(request.is_vital for request in busy.values()):
                break
            time.sleep(_LAST_TIMEOUT / 100)
        for connection, request in busy.items():
            if self.busy.get(connection) is request:  # and not a vital one that has begun since
                self.busy.pop(connection, None)
                with suppress(OSError, TypeError):  # SSLSocket.shutdown() would let threads send on without encryption
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the kept connections."""
        for idle in list(self.idle.values()):
            with suppress(IndexError):  # there are no more
                while True:
                    idle.pop().close()

    def request(self, prepare: Callable[[], _Request], judge: Callable[[_Reply], str] = _judge) -> _Reply:
        """Make a request, retrying while that may help. Raises RemoteError if there is no answer."""
        # prepare() gives the request anew for each try, signed; judge() says whether to try again, see _judge().
        import random
        from http.client import HTTPException
        failures = 0
        while True:
            request = prepare()
            site = _site(request.url)
            job = _Job() if request.is_vital else self.job
            longest = _NEAR_TIMEOUT if request.is_near else _TIMEOUT
            if self.job.is_ended:
                longest = _LAST_TIMEOUT
            is_first_read = not failures and request.method in ('GET', 'HEAD')
            patience = min(longest, _READ_TIMEOUT) if is_first_read else longest
            successes = self.successes
            tries = min(request.tries, _TRIES + _MORE_TRIES * bool(successes))
            failures += 1
            asked = 0.0  # seconds, by the server
            try:
                reply = self.exchange(request, job, patience)
            except (OSError, UnicodeError, HTTPException) as e:
                problem = f"cannot reach {site}: {getattr(e, 'strerror', None) or e}"
                if getattr(e, 'errno', 0) in _NoRoom.codes:
                    raise Error(f'cannot keep a download: {e}', 'set $TMPDIR to a directory with more room') from None
                if failures >= tries or 'CERTIFICATE' in problem:
                    raise RemoteError(problem, 'check the network, the URL, the proxy settings and ca_bundle') from None
            else:
                if reply.status in (429, 503):
                    self.most = max(1.0, len(self.busy) / 2)
                    failures -= successes < self.successes
                else:
                    self.most += 1 / self.most
                    self.successes += 1
                verdict = judge(reply)
                if verdict == 'final' or failures >= tries:
                    return reply
                if verdict == 'at once':
                    continue
                problem = f'{site} answers {reply.status}'
                now = reply.time('Date') or time.time()
                asked = reply.time('Retry-After') - now
                with suppress(TypeError, ValueError):  # a date (RFC 9110, 10.2.3)
                    asked = float(reply.headers['Retry-After'])
            _say(f'{request.method}: {problem}; trying again', _INFO if failures == 2 else _DEBUG)
            pause = min(8, 0.25 * 2 ** failures)
            pause *= random.uniform(0.75, 1)
            job.sleep(pause + max(0.0, min(asked, longest)))

    def exchange(self, request: _Request, job: _Job, patience: float) -> _Reply:
        """Make a request once, or again if the server has closed the connection that was kept."""
        from http.client import HTTPException
        while len(self.busy) >= self.most:
            job.sleep(_TICK)
        place = _site(request.url), request.is_near
        connection = self.connection(*place)
        was_kept, is_reusable = connection.sock, False
        connection.moved = 0  # bytes that are counted in vain if it fails
        self.busy[connection] = request
        try:
            with closing(self.send(connection, request, job, patience)) as response:  # or it keeps the socket open
                body = self.receive(connection, response, request, job)
                is_reusable = response.isclosed()
            if response.status >= 400:
                job.add(-connection.moved)
                is_reusable &= not request.body  # of which the server may not have read all
            return _Reply(response.status, response.headers, body, request)
        except (OSError, HTTPException) as e:
            job.add(-connection.moved)
            self.close()  # as whatever has ended or forgotten this connection has done so to those that are kept
            if connection not in self.busy:
                raise _Ended from None
            if not was_kept or not isinstance(e, ConnectionError):
                raise
        finally:
            self.busy.pop(connection, None)
            if not is_reusable:
                connection.close()
            connection.idle_since = time.monotonic()
            self.idle[place].append(connection)
        return self.exchange(request, job, patience)

    def connection(self, site: str, is_near: bool) -> Any:
        """A kept connection, or a new one, which send() connects."""
        from http import client  # which has no HTTPSConnection where there is no ssl
        with suppress(IndexError):
            connection = self.idle[site, is_near].pop()
            if time.monotonic() - connection.idle_since > _IDLE:
                connection.close()  # so that send() connects it anew
            return connection
        scheme, _, host = site.partition('://')
        proxy, headers = _find_proxy(scheme, host, is_near)
        if scheme == 'http':
            connection = client.HTTPConnection(proxy or host)
        else:
            self.tls = self.tls or _tls(self.ca_bundle)
            connection = client.HTTPSConnection(proxy or host, context=self.tls)
            if proxy:
                connection.set_tunnel(host, headers=headers)
                proxy, headers = '', {}
        connection.base, connection.headers = proxy and site, headers  # to a proxy, a plain request names the whole URL
        return connection

    def send(self, connection: Any, request: _Request,
             job: _Job, patience: float) -> Any:
        """Send a request, and return the response, whose body is still to be read."""
        import socket
        from http.client import HTTPException
        parts = urlsplit(request.url)
        target = f"{connection.base}{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}"
        headers = {**request.headers, **connection.headers}
        if request.body:  # otherwise http.client knows where to say 0
            headers['Content-Length'] = f'{sum(map(len, request.body))}'
        for name, value in headers.items():
            if not re.match(r'[!-9;-~]+: [\t -~\x80-\xff]*\Z', f'{name}: {value}'):
                raise ConfigError(f'a header for {_site(request.url)}, such as a token or project, contains invalid '
                                  'characters', 'check the credentials')
        job.add(0)  # an interruption may have come before the connection was among the busy ones
        if not connection.sock:
            connection.timeout = min(patience, _CONNECT)
            connection.connect()
            # Let the system not take megabytes that a slow link has yet to send: a server's silence meanwhile would
            # look like a fault. Python 3.6 lacks the name; 25 is the option's number in Linux, and of none elsewhere.
            unsent = getattr(socket, 'TCP_NOTSENT_LOWAT', 25)
            with suppress(OSError):
                connection.sock.setsockopt(socket.IPPROTO_TCP, unsent, _SLICE)
        connection.sock.settimeout(patience)
        job.add(0)  # or before the socket was there
        with suppress(ConnectionError):  # a server may answer, and close the connection, before it has read it all
            connection.request(request.method, target, headers=headers)
            for chunk in request.body:
                for start in range(0, len(chunk), _SLICE):  # as the time-out of a socket applies to each
                    piece = memoryview(chunk)[start:start + _SLICE]
                    connection.send(piece)
                    connection.moved += len(piece)
                    job.add(len(piece))
        response = connection.getresponse()
        for _ in range(100):
            if not 101 < response.status < 200:  # http.client itself skips only 100 (RFC 9110, 15.2)
                return response
            response.headers = None  # so that begin() reads the next one
            response.begin()
        raise HTTPException('more than 100 interim answers')

    def receive(self, connection: Any, response: Any,
                request: _Request, job: _Job) -> bytes:
        """The body of a response; of a range, what has come if the connection breaks; or it goes to a file."""
        import io
        from http.client import HTTPException, IncompleteRead
        is_file = request.into and response.status == 200
        is_range = 'Content-Range' in response.headers
        # Allocated at once, as allocators keep what a body leaves behind as it grows
        size = min(response.length or 0, request.limit, _REPLY_LIMIT)
        body = request.into if is_file else io.BytesIO(bytes(size))
        body.seek(0)
        room = memoryview(bytearray(4 * _SLICE))
        try:
            job.answer.began = time.monotonic()
            # More at once of long ranges, as threads that read a little each mostly wait for each other.
            for count in iter(lambda: response.readinto(room[:max(_SLICE, body.tell())]), 0):
                body.write(room[:count])
                connection.moved += count
                job.add(count)
                if body.tell() > request.limit:
                    raise RemoteError(f'{_site(request.url)} answers with more than was asked for',
                                      'a proxy or the endpoint_url is at fault', response.status)
            if response.length:
                raise IncompleteRead(b'', response.length)
        except (OSError, HTTPException):
            if connection not in self.busy or not is_range or body.tell() < _SLICE:
                raise
        body.truncate()
        whole: bytes = b'' if is_file else body.getvalue()
        if not is_range:
            with suppress(zlib.error):  # a proxy may compress a page, although it was asked not to
                whole = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(whole, _REPLY_LIMIT)
        return whole


def _find_proxy(scheme: str, host: str,
                is_near: bool) -> Tuple[str, _Texts]:
    """The address of the proxy for a host, or '', and the headers that it wants to see."""
    from urllib.request import getproxies, proxy_bypass
    url = getproxies().get(scheme, '').strip()
    if is_near or not url or proxy_bypass(host):
        return '', {}
    match = re.match(r'(?ai)(?:http://|(?![^/?#@]*://))(?:(.*)@)?'
                     rf'([^/?#@:\[\]\s]+|\[[0-9a-f:.]+\])(?::({_PORT}))?(?:[/?#].*)?\Z', url)
    if not match:
        raise ConfigError(f'{scheme}_proxy is not of the form http://[user:password@]host[:port], and etcetera speaks '
                          'neither SOCKS nor TLS to a proxy', 'change it, or exempt this host with no_proxy')
    user, address, port = match.groups()
    headers = {}
    if user:
        user = f"{unquote(user)}{':' * (':' not in user)}"  # a password follows in any case
        headers['Proxy-Authorization'] = f"Basic {_base64(user.encode('utf-8', 'surrogateescape'))}"
    return f'{address}:{port or 80}', headers


def _tls(ca_bundle: _MaybeText) -> Any:
    try:
        from ssl import VERIFY_X509_STRICT, create_default_context
        context = create_default_context(cafile=ca_bundle and _expanduser(ca_bundle))
    except (ImportError, OSError) as e:
        raise ConfigError(f'https:// cannot be used: {e}',
                          'check ca_bundle and $AWS_CA_BUNDLE, or use a Python with the module ssl') from None
    if ca_bundle:  # many private CAs leave out extensions that Python 3.13 and later demand
        context.verify_flags &= ~VERIFY_X509_STRICT
    return context


def _site(url: str) -> str:
    """The scheme, host and port of a URL, which may be shown. Raises RemoteError if no request can be sent there."""
    with suppress(ValueError):  # of an address in brackets
        parts = urlsplit(url)
        if re.match(_SITE + r'(?:[/?][!-~]*)?\Z', url):
            return f'{parts.scheme}://{parts.netloc}'
    raise RemoteError('a URL from the settings, the AWS profile, a variable such as $AWS_ENDPOINT_URL, the credentials '
                      'or a server does not have the form https://host[:port][/path]',
                      'check them; a user or password cannot be in it')


def _base64(data: bytes) -> str:
    from base64 import b64encode
    return b64encode(data).decode()


def _query(query: _Texts) -> str:
    """Sorted, and quoted to the last but A-Z a-z 0-9 - . _ ~, as signatures want it."""
    pairs = sorted(query.items())
    return urlencode(pairs, safe='~', quote_via=quote)


def _iso_time(text: str) -> float:
    """Unix time of an ISO 8601 time, which is UTC unless it has an offset; 0 if it is none."""
    from datetime import datetime
    zone = re.sub(r'\A[.\d]+|[:UTCZ]', '', text[19:]) or '+0000'
    with suppress(ValueError):
        return datetime.strptime(f'{text[:19]}{zone}', '%Y-%m-%dT%H:%M:%S%z').timestamp()
    return 0.0


def _utc(seconds: float, form: str = '%Y-%m-%dT%H:%M:%SZ') -> str:
    """A unix time as text; '' beyond the year 9999. time.gmtime() ends in 2038 on some 32-bit systems."""
    from datetime import datetime, timedelta
    with suppress(OverflowError):
        return (datetime(1970, 1, 1) + timedelta(seconds=seconds)).strftime(form)
    return ''


class _Renewed:
    """Something that must be fetched anew before it expires. Threads share it."""
    fetch: Callable[[], Tuple[Any, float]]  # gives it, or None if there is none, and until when it can be used
    value: Any = None
    expires = next = 0.0  # when it ends, and when to fetch it anew

    def __init__(self) -> None:
        import threading
        self.lock = threading.Lock()

    def get(self) -> Any:
        """What is there serves until it expires, if it cannot be renewed; nor does it ever become None."""
        with self.lock:
            if time.time() > self.next:
                try:
                    value, expires = self.fetch()
                    if self.value and not value:
                        raise RemoteError('the credentials have expired, and new ones cannot be had', 'try again')
                    self.value, self.expires = value, expires
                    self.next = expires - 120
                except Error as e:
                    if time.time() > self.expires:
                        raise
                    _say(f'{e.message}; what is there serves on', _DEBUG)
                    self.next = time.time() + 10
            return self.value

    def renew(self, used: Any) -> None:
        """Fetch it anew next time, unless `used`, which was refused, has already been replaced."""
        with self.lock:
            if used == self.value:
                self.expires = self.next = 0.0


# ---------------------------------------------------------------------------------------
# AWS
#
# Finds credentials in the order of the AWS SDKs, and signs requests:
# https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html
# Who has had some never becomes anonymous: old ones serve until they expire (see _Renewed), and then that is an error.
# Only where nothing answers at first is there no metadata service.
# ---------------------------------------------------------------------------------------

_AWS_KEYS = ('aws_access_key_id', 'aws_secret_access_key', 'aws_session_token')
_AWS_TRANSIENT = (  # codes that mean 'try again later', whatever the status
    'RequestTimeout|InternalError|SlowDown|ServiceUnavailable|Throttling(Exception)?|RequestLimitExceeded|'
    'IDPCommunicationError|ConditionalRequestConflict|OperationAborted')
_AWS_REGION = r'[A-Za-z0-9_.-]{1,32}\Z'  # other stores have names of their own
_AWS_SUFFIXES = {
    'cn': 'amazonaws.com.cn', 'eusc-de': 'amazonaws.eu', 'us-iso': 'c2s.ic.gov',
    'us-isob': 'sc2s.sgov.gov', 'us-isof': 'csp.hci.ic.gov', 'eu-isoe': 'cloud.adc-e.uk'}
_AWS_CONTAINER = (  # where a container's credentials may be asked for
    r'https://|http://(localhost|127(\.\d{1,3}){3}|\[::1\]|169\.254\.170\.23?|\[fd00:ec2::23\])(:\d+)?(/|\Z)')


class _AwsKeys(NamedTuple):
    access_key: str
    secret_key: str
    token: str
    expires: float  # unix time
    source: str  # where they were found, for people


_MaybeKeys = Optional[_AwsKeys]


class _Aws(_Renewed):
    """What AWS's tools go by: settings of the environment, else of a profile; get() gives _AwsKeys, or None."""
    def __init__(self, config: Config, job: _Job) -> None:
        super().__init__()
        self.config = config
        self.skew = 0.0  # seconds by which the services' clock is ahead of ours
        self.name = (
            config.aws_profile or _env('AWS_PROFILE', 'AWS_DEFAULT_PROFILE') or 'default')
        self.read_files()
        ca_bundle = config.ca_bundle or self.setting('ca_bundle')
        self.http = _Http(job, ca_bundle)
        self.region = (
            config.region or _env('AWS_REGION', 'AWS_DEFAULT_REGION')
            or self.values.get('region') or 'us-east-1')
        if not re.match(_AWS_REGION, self.region):
            raise ConfigError('the region is not valid', "check 'region', $AWS_REGION and the AWS profile")

    def read_files(self) -> None:
        """Read ~/.aws/config and ~/.aws/credentials, which precedes. Indented settings are called OUTER.INNER."""
        import configparser
        sections: Dict[str, _Texts] = defaultdict(dict)
        for file, variable in (
                ('config', 'AWS_CONFIG_FILE'), ('credentials', 'AWS_SHARED_CREDENTIALS_FILE')):
            path = _env(variable) or f'~/.aws/{file}'
            path = _expanduser(os.path.expandvars(path))  # as botocore does
            parser = configparser.RawConfigParser(strict=False)
            try:
                parser.read(path, 'utf-8-sig')
            except (configparser.Error, UnicodeDecodeError):
                raise ConfigError(f'{path} cannot be read as an AWS settings file', 'repair it') from None
            for title in parser.sections():
                name = re.sub(r'''^profile\s+|(?<=\s)["']|["']$''', '', title)
                section = sections[name]
                items = dict(parser.items(title))
                if file == 'credentials' and 'aws_access_key_id' in items:
                    # Nothing in the other file may be mixed with these keys.
                    items.setdefault('aws_session_token', '')
                    items.update(credential_process='', login_session='')
                section.update(items)
                for key, text in items.items():
                    for inner, value in re.findall(r'(?m)^(\w+)\s*=\s*(\S+)', text):
                        section[f'{key}.{inner}'] = value
        if self.name != 'default' and self.name not in sections:
            shown = f"'{self.name}' " * _is_harmless(self.name)
            raise ConfigError(f'the AWS profile {shown}that aws_profile or $AWS_PROFILE names is not in ~/.aws/config '
                              'or ~/.aws/credentials', 'check both')
        self.sections = sections
        self.values = sections[self.name]

    def setting(self, key: str) -> str:
        """What the environment says, else the profile; or ''."""
        return _env(f'AWS_{key.upper()}') or self.values.get(key, '')

    def flag(self, key: str) -> bool:
        return self.setting(key).lower() == 'true'

    def endpoint(self, service: str) -> str:
        """The address that is set for a service instead of its own, or ''."""
        if self.flag('ignore_configured_endpoint_urls'):
            return ''
        services = self.sections[f"services {self.values.get('services')}"]
        return (_env(f'AWS_ENDPOINT_URL_{service.upper()}', 'AWS_ENDPOINT_URL')
                or services.get(f'{service}.endpoint_url') or self.values.get('endpoint_url', '')).rstrip('/')

    def host(self, service: str, region: str) -> str:
        """A service's own address: https://docs.aws.amazon.com/general/latest/gr/rande.html"""
        partition = region.rsplit('-', 2)[0]
        if self.flag('use_fips_endpoint') and (service, partition) != ('sts', 'us-gov'):
            service += '-fips'
        return f"https://{service}.{region}.{_AWS_SUFFIXES.get(partition, 'amazonaws.com')}"

    def judge(self, reply: _Reply) -> str:
        """For _Http.request(): errors are judged by their code, too. One may tell that our clock is wrong."""
        ahead = reply.time('Date') - time.time()
        is_news = 300 < abs(ahead - self.skew) < 1e9
        if is_news and reply.status in (400, 403):
            self.skew = ahead
            _say(f"this machine's clock is {abs(ahead) / 60:.0f} minutes off; using the server's", _WARNING)
            return 'at once'
        return 'later' if re.fullmatch(_AWS_TRANSIENT, _aws_error(reply)['Code']) else _judge(reply)

    def sign(self, request: _Request, place: str) -> _Request:
        """The request, its query as _query() gives it, with a signature for region/service; as it is without keys."""
        import hmac  # https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
        keys = request.keys
        if not keys:
            return request
        _site(request.url)  # as urlsplit() is strict with addresses
        _, netloc, path, query, _ = urlsplit(request.url)
        digest = request.digest(_sha256()).hex()
        stamp = _utc(time.time() + self.skew, '%Y%m%dT%H%M%SZ')
        headers = {
            **request.headers, 'x-amz-date': stamp, 'x-amz-content-sha256': digest,
            'host': re.sub(':(80|443)$', '', netloc)}
        if keys.token:
            headers['x-amz-security-token'] = keys.token
        names = sorted(headers, key=str.lower)
        lines = (f"{name.lower()}:{' '.join(headers[name].split())}\n" for name in names)
        signed = ';'.join(names).lower()
        canonical = f"{request.method}\n{path or '/'}\n{query}\n{''.join(lines)}\n{signed}\n{digest}"
        scope = f'{stamp[:8]}/{place}/aws4_request'
        text = f'AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{_sha256(canonical.encode()).hexdigest()}'
        key = f'AWS4{keys.secret_key}'.encode()
        for part in scope.split('/') + [text]:
            key = hmac.new(
                key, part.encode(), 'sha256').digest()
        headers['Authorization'] = (f'AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={signed}, '
                                    f'Signature={key.hex()}')
        return request._replace(headers=headers)

    def fetch(self) -> Tuple[_MaybeKeys, float]:
        """From the settings, else the environment, the profile, the container, or the machine."""
        self.read_files()  # as other tools may have changed them meanwhile
        keys = _aws_static(vars(self.config), 'the settings')
        if not keys and not self.config.aws_profile:  # which precedes the environment
            keys = self.from_environment()
        keys = (keys or self.from_profile(self.name)
                or self.from_container() or self.from_instance())
        if not keys:
            return None, 1e12
        # Some services give out the same keys until shortly before they expire, and our clock may be wrong.
        return keys, max(keys.expires, time.time() + 300)

    def from_environment(self) -> _MaybeKeys:
        return _aws_static({key: _env(key.upper())
                            for key in _AWS_KEYS}, 'the environment')

    def from_profile(self, name: str, users: Tuple[str, ...] = ()) -> _MaybeKeys:
        """The first of: a role, a web identity, SSO or `aws login`, credential_process, keys; for roles of `users`."""
        # https://docs.aws.amazon.com/sdkref/latest/guide/feature-assume-role-credentials.html
        where = f"the AWS profile '{name}'"
        values = self.sections[name]
        keys = _aws_static(values, where)
        is_role = 'role_arn' in values and 'web_identity_token_file' not in values
        if is_role and not (users and keys):
            if 'mfa_serial' in values:
                return self.from_tools(name)
            sources = {'Environment': self.from_environment,
                       'EcsContainer': self.from_container, 'Ec2InstanceMetadata': self.from_instance}
            profile = values.get('source_profile')
            kind = values.get('credential_source')
            keys = None
            if kind in sources:
                keys = sources[kind]()
            elif profile and profile not in users:
                keys = self.from_profile(
                    profile, users + (name,))
            if not keys:
                raise ConfigError(f'{where} needs, besides role_arn, either a source_profile that has credentials and '
                                  'does not lead back to it, or a credential_source of Environment, EcsContainer or '
                                  'Ec2InstanceMetadata, where there are some')
            return self.from_sts(where, values.get, keys)
        find = values.get if users or self.config.aws_profile else self.setting
        path = find('web_identity_token_file')
        if path:
            token = _read_secret(path, 'the file with a token that web_identity_token_file or '
                                       '$AWS_WEB_IDENTITY_TOKEN_FILE names')
            return self.from_sts('web identity', find, None,
                                 WebIdentityToken=token)
        if 'sso_account_id' in values or values.get('login_session'):
            return self.from_tools(name)
        if values.get('credential_process'):
            return self.from_process(values['credential_process'], f'the credential_process of {where}')
        return keys

    def from_sts(self, source: str, find: Callable[[str], Any], keys: _MaybeKeys, **form: str) -> _AwsKeys:
        """https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html"""
        form['Action'] = 'AssumeRole' if keys else 'AssumeRoleWithWebIdentity'
        form.update(Version='2011-06-15', RoleSessionName='etcetera')
        for key in 'role_arn', 'role_session_name', 'external_id', 'duration_seconds':
            if find(key):
                parameter = key.title().replace('_', '')
                form[parameter] = find(key)
        data = urlencode(form).encode()
        request = _Request('POST', f"{self.endpoint('sts') or self.host('sts', self.region)}/",
                           {'Content-Type': 'application/x-www-form-urlencoded'}, [data], keys=keys)
        reply = self.http.request(lambda: self.sign(request, f'{self.region}/sts'), self.judge)
        if reply.status == 200:
            return _aws_keys(_xml_items(reply, 'Credentials'), source)
        raise RemoteError(f'{source}: AWS STS answers {_status(reply)}',
                          'check the role_arn or $AWS_ROLE_ARN and who may assume it, or try again later', reply.status)

    def from_tools(self, name: str) -> _AwsKeys:
        """Keys that take a prompt, or more than the standard library: from botocore, else from the command `aws`."""
        source = f"the AWS profile '{name}'"
        remedy = (f"install boto3 or the command aws, and run 'aws sso login --profile {name}' or 'aws login --profile "
                  f"{name}'")
        with _optional_library(source, remedy) as import_module:
            session = import_module('botocore.session').Session(profile=name)
            provider = session.get_component('credential_provider').get_provider('assume-role')
            # so that it asks for a code once an hour
            provider.cache = import_module('botocore.utils').JSONFileCache(_expanduser('~/.aws/cli/cache'))
            found = session.get_credentials()
            if found:  # otherwise it may be too old
                values = zip(_AWS_KEYS, found.get_frozen_credentials())
                return _aws_keys(dict(values), source)._replace(expires=time.time() + 600)
        command = f'aws configure export-credentials --profile "{name}" --format process'
        return self.from_process(command, f'the command aws for {source}', remedy)

    def from_process(self, command: str, source: str, remedy: str = '') -> _AwsKeys:
        """https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html"""
        return _aws_keys(_Reply(200, {}, _output_of(self.http, command, source, remedy)).json(), source)

    def from_container(self) -> _MaybeKeys:
        """https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html"""
        relative = _env('AWS_CONTAINER_CREDENTIALS_RELATIVE_URI')
        url = 'http://169.254.170.2' + relative if relative else _env('AWS_CONTAINER_CREDENTIALS_FULL_URI')
        if not url:
            return None
        if not re.match(_AWS_CONTAINER, url):
            raise ConfigError('$AWS_CONTAINER_CREDENTIALS_RELATIVE_URI must be a path that begins with /, and '
                              '$AWS_CONTAINER_CREDENTIALS_FULL_URI must begin with https://, or with http:// and a '
                              'loopback address, 169.254.170.2, 169.254.170.23 or fd00:ec2::23')
        path = _env('AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE')
        token = _env('AWS_CONTAINER_AUTHORIZATION_TOKEN')
        if path:
            token = _read_secret(path, 'the file with a token that $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE names')
        reply = _ask_metadata(self.http, _Request('GET', url, {'Authorization': token} if token else {}))
        source = "the container's credentials service"
        if reply.status == 200:
            return _aws_keys(reply.json(), source)
        raise RemoteError(f'{source} answers {_status(reply)}', 'check what it may do', reply.status)

    def from_instance(self) -> _MaybeKeys:
        """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html"""
        if self.flag('ec2_metadata_disabled'):
            return None
        site = (self.setting('ec2_metadata_service_endpoint').rstrip('/')
                or 'http://169.254.169.254')
        reply = _ask_metadata(self.http, _Request('PUT', f'{site}/latest/api/token',
                                                  {'X-aws-ec2-metadata-token-ttl-seconds': '21600'}, tries=1))
        token = reply.body.decode('latin-1').strip()
        if reply.status != 200 or not re.match(r'[!-~]+\Z', token):
            return None
        url = f'{site}/latest/meta-data/iam/security-credentials/'
        request = _Request('GET', url, {'X-aws-ec2-metadata-token': token})
        reply = _ask_metadata(self.http, request)
        role = quote(reply.body.strip())
        request = request._replace(url=f'{url}{role}')
        answer = _ask_metadata(self.http, request).json()
        return _aws_keys(answer, f"the instance's role '{role}'") if 'AccessKeyId' in answer else None


def _env(*names: str) -> str:
    """The first of these variables that is set, or ''."""
    values = map(os.environ.get, names)
    return next(filter(None, values), '')


def _aws_static(values: _Row, source: str) -> _MaybeKeys:
    """The keys that are among these values, if there are any."""
    return _aws_keys(values, source) if any(map(values.get, _AWS_KEYS[:2])) else None


def _aws_keys(values: _Row, source: str) -> _AwsKeys:
    """Keys from settings, or as STS, a process or a metadata service gives them, which use other spellings."""
    plain = {re.sub('aws_|session|_', '', key.lower()): str(value or '').strip()
             for key, value in values.items()}
    parts = [plain.get(name, '')
             for name in ('accesskeyid', 'secretaccesskey', 'token')]
    for name, part in zip(_AWS_KEYS, parts[:2]):
        if not re.match(r'[!-~]+\Z', part):
            raise ConfigError(f'{source}: {name} is missing, or holds characters that it cannot have', 'get it again')
    return _AwsKeys._make([*parts, _iso_time(plain.get('expiration', '')) or 1e12, source])


def _ask_metadata(http: _Http, request: _Request) -> _Reply:
    """What a metadata service answers. A request for one that may not be there has one try, and then no answer."""
    request = request._replace(is_near=True)
    try:
        reply = http.request(lambda: request)
    except RemoteError as e:
        if request.tries > 1:
            raise
        _say(f'no metadata service: {e}', _DEBUG)
        return _Reply(0, {}, b'')
    if reply.status not in _TRANSIENT:
        return reply
    if request.tries == 1:
        return _ask_metadata(http, request._replace(tries=_TRIES))
    raise RemoteError(f'{_site(request.url)} answers {reply.status}', 'try again later', reply.status)


@contextmanager
def _optional_library(
        source: str, remedy: str
) -> Iterator[Callable[[str], Any]]:
    """For code that gets credentials from a library, with import_module(): skipped if that is not installed."""
    from importlib import import_module  # so that no type checker looks for the library
    try:
        with suppress(ImportError):
            yield import_module
    except Exception as e:  # they let out AttributeErrors and the like, too
        raise ConfigError(f'{source} cannot be used: {_printable(repr(e))}', remedy) from None


def _output_of(
        http: _Http, command: str, source: str,
        remedy: str, **variables: str) -> bytes:
    """What a program prints. It can ask at the terminal, as getpass does, which needs neither stdout nor stderr."""
    import shlex
    from subprocess import PIPE, Popen
    try:
        process = Popen(command if os.name == 'nt' else shlex.split(command), stdout=PIPE, stderr=PIPE,
                        env={**os.environ, **variables})
    except (OSError, ValueError) as e:
        raise ConfigError(f"{source} cannot be run: {getattr(e, 'strerror', None) or e}", remedy) from None
    with process:
        http.job.at_end.append(process.kill)
        output, errors = process.communicate()
    if process.returncode:
        said = errors.decode('utf-8', 'replace').strip()
        raise ConfigError(f'{source} fails ({process.returncode}): {_printable(said)[-300:]}', remedy)
    return output


def _read_secret(path: str, what: str) -> str:
    """The text of a file whose path someone has set."""
    try:
        with open(_check_path(path), encoding='utf-8-sig', errors='replace') as file:
            return file.read().strip()
    except OSError as e:
        raise ConfigError(f'cannot read {what}: {e.strerror}', 'check the path') from None


def _xml_items(reply: _Reply, name: str) -> _Texts:
    """The texts in all XML elements of that name by their tags; {} if there is none."""
    return {key: text for row in reply.xml(name)
            for key, text in row.items()}


def _aws_error(reply: _Reply) -> _Texts:
    """The Code, Message and Region of an error; '' for what it does not say."""
    return defaultdict(str, _xml_items(reply, 'Error'))


def _status(reply: _Reply) -> str:
    """What an error says, for people: in the XML of AWS, or the JSON of Google or of a container's service."""
    error = _aws_error(reply)
    answer = reply.json()
    inner = answer.get('error')
    if isinstance(inner, dict):
        answer = inner
    text = (error['Message'] or answer.get('message')
            or answer.get('error_description') or inner
            or 'X-GUploader-UploadID' in reply.headers and reply.body.decode('utf-8', 'replace')  # Google, of an object
            or 'no explanation')
    return f"{reply.status}{' ' * bool(error['Code'])}{error['Code']}: {_printable(str(text))[:300]}"


# ---------------------------------------------------------------------------------------
# Google
#
# Finds credentials as Google's own tools do (application default credentials, https://google.aip.dev/auth/4110), and
# gets access tokens with them.
# ---------------------------------------------------------------------------------------

_GOOGLE_SCOPE = 'https://www.googleapis.com/auth/devstorage.full_control'  # read_write may not make objects public
_GOOGLE_REMEDY = "check the Google credentials, or run 'gcloud auth application-default login'"


class _GoogleCredentials(_Renewed):
    """The headers that authorize requests; None if there are no credentials."""
    def __init__(self, config: Config, http: _Http) -> None:
        super().__init__()
        self.http = http
        self.info: _Row = {}
        named = config.google_credentials or _env('GOOGLE_APPLICATION_CREDENTIALS')
        default = '%APPDATA%/gcloud' if os.name == 'nt' else '~/.config/gcloud'
        place = _env('CLOUDSDK_CONFIG') or os.path.expandvars(_expanduser(default))
        self.path = _expanduser(named or f'{place}/application_default_credentials.json')
        if named or os.path.isfile(self.path):
            text = _read_secret(self.path, 'the file with Google credentials that google_credentials or '
                                           '$GOOGLE_APPLICATION_CREDENTIALS names')
            self.info = _Reply(200, {}, text.encode()).json()
            if 'type' not in self.info:
                raise ConfigError(f'{self.path} holds no Google credentials', _GOOGLE_REMEDY)

    def fetch(self) -> Tuple[Optional[_Texts], float]:
        try:
            answer = self.ask() if self.info else self.from_metadata()
            if answer is None:
                return None, 1e12
            token = answer['access_token']
            if not re.match(r'[ -~]+\Z', token):  # RFC 6750, 2.1
                raise ValueError
            lifetime = float(answer.get('expires_in') or 3600)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ConfigError(f"the Google credentials {self.path if self.info else 'of this machine'} cannot be used: "
                              'something in them, or in the answer to them, is missing or wrong',
                              _GOOGLE_REMEDY) from None
        headers = {'Authorization': f'Bearer {token}'}
        project = _env('GOOGLE_CLOUD_QUOTA_PROJECT') or self.info.get('quota_project_id')
        if project:
            headers['x-goog-user-project'] = project
        return headers, time.time() + lifetime

    def ask(self) -> _Row:
        """What a token endpoint answers (RFC 6749, 4.1.4)."""
        info = self.info
        url = info.get('token_uri') or 'https://oauth2.googleapis.com/token'
        if info['type'] == 'service_account':
            form = {'grant_type': 'urn:ietf:params:oauth:grant-type:jwt-bearer',
                    'assertion': _assertion(info, url)}
        elif info['type'] == 'authorized_user':  # with the refresh token of a person (RFC 6749, 6)
            names = 'client_id', 'client_secret', 'refresh_token'
            form = {name: info[name] for name in names}
            form['grant_type'] = 'refresh_token'
        else:
            return self.from_tools()
        headers = {'Content-Type': 'application/x-www-form-urlencoded'}
        body = [urlencode(form).encode()]
        request = _Request('POST', url, headers, body)
        reply = self.http.request(lambda: request)
        if reply.status == 200:
            return reply.json()
        raise RemoteError(f'{_site(url)} gives no access token: {_status(reply)}', _GOOGLE_REMEDY, reply.status)

    def from_metadata(self) -> Optional[_Row]:
        """Of the machine's own service account (https://cloud.google.com/compute/docs/metadata); none elsewhere."""
        if _env('NO_GCE_CHECK').lower() == 'true':
            return None
        host = _env('GCE_METADATA_HOST', 'GCE_METADATA_ROOT') or 'metadata.google.internal'
        path = 'computeMetadata/v1/instance/service-accounts/default/token'
        url = f"http://{host}/{path}?scopes={quote(_GOOGLE_SCOPE, '')}"
        reply = _ask_metadata(self.http, _Request('GET', url,
                                                  {'Metadata-Flavor': 'Google'}, tries=1))
        return reply.json() if reply.headers.get('Metadata-Flavor') == 'Google' and reply.status == 200 else None

    def from_tools(self) -> _Row:
        """For federation, impersonation and all other kinds: from google-auth, else from the command `gcloud`."""
        from shutil import which
        source = f"the Google credentials of type '{_printable(str(self.info['type']))}' in {self.path}"
        remedy = "install google-cloud-storage or the command gcloud, and run 'gcloud auth application-default login'"
        with _optional_library(source, remedy) as import_module:
            request = import_module('google.auth.transport.requests').Request()
            load = import_module('google.auth').load_credentials_from_file
            credentials, _ = load(self.path, scopes=[_GOOGLE_SCOPE])
            credentials.refresh(request)
            return {'access_token': credentials.token, 'expires_in': 600}
        program = which('gcloud') or 'gcloud'  # on Windows, gcloud.cmd
        output = _output_of(self.http, f'"{program}" auth application-default print-access-token',
                            f'gcloud for {source}', remedy, GOOGLE_APPLICATION_CREDENTIALS=self.path)
        token = output.decode('ascii', 'replace').strip()
        return {'access_token': token, 'expires_in': 600}


def _assertion(info: _Row, url: str) -> str:
    """What a service account signs for a token endpoint (RFC 7523; https://google.aip.dev/auth/4112)."""
    now = int(time.time())
    head = {'alg': 'RS256', 'typ': 'JWT',
            'kid': info.get('private_key_id', '')}
    claims = {'iss': info['client_email'], 'scope': _GOOGLE_SCOPE,
              'aud': url, 'iat': now, 'exp': now + 3600}
    text = f'{_base64url(json.dumps(head).encode())}.{_base64url(json.dumps(claims).encode())}'
    return f"{text}.{_base64url(_rsa_sign(info['private_key'], text.encode()))}"


def _base64url(data: bytes) -> str:
    from base64 import urlsafe_b64encode
    return urlsafe_b64encode(data).decode().rstrip('=')


def _rsa_sign(pem: str, message: bytes) -> bytes:
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, 8.2.1). Raises ValueError unless the key is in PKCS#8 or PKCS#1."""
    from base64 import b64decode
    key = b64decode(re.sub('-----.*?-----', '', pem))
    # In both forms, the modulus and the private exponent are the first two of more than 64 bits.
    modulus, exponent, *_ = (
        number for number in _der_integers(key) if number >> 64)
    size = (modulus.bit_length() + 7) // 8
    prefix = bytes.fromhex('003031300d060960864801650304020105000420')
    hashed = prefix + _sha256(message).digest()
    padded = b'\0\1' + hashed.rjust(size - 2, b'\xff')
    return pow(int.from_bytes(padded, 'big'), exponent, modulus).to_bytes(size, 'big')


def _der_integers(data: bytes) -> Iterator[int]:
    """The integers in DER (X.690), those in sequences and octet strings too, in order. Raises ValueError."""
    while data:
        tag, length = data[:2]
        start = 2
        if length & 0x80:  # the long form: the number of bytes of the length
            start += length & 0x7f
            length = int.from_bytes(data[2:start], 'big')
        if tag in (0x30, 0x04):  # what it holds comes next
            length = 0
        if tag == 0x02:
            yield int.from_bytes(data[start:start + length], 'big')
        data = data[start + length:]


# ---------------------------------------------------------------------------------------
# Remotes
#
# Where archives are stored: each kind of storage is a subclass of _Remote. Remotes know nothing of what the archives
# hold. Every read after the first is bound to the version of the object that was seen first, its ETag, generation or
# time: if the object is replaced meanwhile, the read fails; versions are never mixed.
# ---------------------------------------------------------------------------------------

_MIN_PART = 5 << 20  # bytes of a part of an upload: the least that S3 takes
_MAX_PARTS = 10000  # parts that S3 takes at most
_FEW_PARTS = 1000  # parts that some other stores take at most
_LONG_PART = 64 << 20  # bytes of a part that are still moderate
_GS_PART = 16 << 20  # bytes of a part of an upload to Google, where each waits for the one before
_IN_FLIGHT = 48 << 20  # bytes that may be sent at once, rounded up to whole parts; one part more waits
_AHEAD = 40 << 20  # bytes that may be read at once, or wait until those before them have come
_MIN_RANGE = 256 << 10  # bytes that one request reads at first
_FAIR_RANGE = 2 << 20  # bytes that one may read if it comes fast, however many connections there are
_FAST_RANGE = 0.4  # seconds from its first byte on, or as many as that one took; ranges grow to twice that
_FEW_CONNECTIONS = 5  # that read at first, with one more, and suffice on a fast link, where more would lose packets
_FAST_LINK = 50e6  # bytes a second that these have to read
_TAIL = 8192  # bytes at an archive's end that nearly always hold the whole index, and come in one flight of packets
_FILE_REMNANTS = 86400  # seconds after which leftovers of a killed command are removed from a directory

_UNCHANGED = {'Cache-Control': 'no-transform'}  # the header that asks for an object as it is (RFC 9111, 5.2.1.6)
_MISSING = (404, 410)
_REDIRECTS = (301, 302, 303, 307, 308)
_NO_RANGE = (404, 410, 416)  # answers to GET of a range that say that there is no such object or range
_UNSUPPORTED = (200, 206, 405, 406, 416, 501)  # of answers to GET of a range from the end that tell nothing
_TO_WRITE = 'to push or purge, set a url that begins with s3://, gs:// or file://'
_WHO_ANSWERS = 'check the endpoint_url, and whether a proxy or login page answers in its place'
_REMEDIES = (  # by patterns for what _BucketStore.error() puts together
    ('.*(object.?lock|worm protected|is immutable|retention policy|active \\S+ hold)',
     'a rule of the bucket protects it; ask whoever made the rule'),
    ('429|503', "the storage is overloaded; try again later, or with 'connections: 1'"),
    (r'2.. \w+ \w+ ...:|308', _WHO_ANSWERS))


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


_Chunk = Union[bytes, _Range]
_Chunks = Iterable[_Chunk]
_MaybeObject = Optional[_Object]
_Found = Tuple[_MaybeObject, bytes]  # an object, if there is one, and some bytes of it
_Page = Tuple[List[_Object], str]  # some objects, and the token of the next page, if there is one


class _Unconfirmed(RemoteError):
    """The answer to a write does not say, in the form that the API defines, that the object is there."""


class _WriteAgain(RemoteError):
    """Nothing was written, and the remote knows now how to do it otherwise."""


class _Remote:
    """A place for archives. Raises RemoteError for whatever the storage refuses."""
    has_exclusive_write = True  # whether write() alone tells if a name is taken, even where find() may not look
    can_copy = False  # whether write() takes ranges of other objects
    prefix = ''  # of keys
    list: Callable[[], List[_Object]]  # all NAME.tgz directly below the url, if a dataset can have that name
    stat: Callable[[str], _MaybeObject]  # the object that has this name now; None if there is none
    read: Callable[[_Object, int, int], bytes]  # of this very version, or RemoteError if it was replaced

    def __init__(self, config: Config, job: _Job) -> None:
        self.url = _masked(config.url or '')
        self.connections = config.connections
        self.job = job
        self.opened = ExitStack()  # what is closed at the end
        self.set_up(config)

    def set_up(self, config: Config) -> None:
        """The rest of __init__(). Raises ConfigError if it cannot work with these settings."""

    def key(self, name: str) -> str:
        """What the object of this name is called in the storage."""
        return f'{self.prefix}{name}.tgz'

    def name_of(self, key: str) -> str:
        """The reverse of key(); '' for the key of something else."""
        name = key[len(self.prefix):-4]
        return name if key == self.key(name) and _is_name(name) else ''

    def check(self) -> None:
        """Raises NotFound if there is no such place, as far as that can be told without a request."""

    def find(self, name: str) -> _Found:
        """The object that has this name now, and its last bytes, at most _TAIL; None if there is none."""
        obj = self.stat(name)
        return obj, self.tail(obj) if obj else b''

    def tail(self, obj: _Object) -> bytes:
        """The last bytes of an object, at most _TAIL."""
        return self.read(obj, max(0, obj.size - _TAIL), obj.size)

    def write(self, name: str, chunks: _Chunks,
              limit: int, exclusive: bool) -> None:
        """Store all chunks, at most `limit` bytes, or nothing; if `exclusive`, FileExistsError rather than replace."""
        raise ConfigError(f'{self.url} can only be read', _TO_WRITE)

    def remove(self, obj: _Object) -> None:
        """Remove this very version, unless it is gone already. Raises RemoteError if the object was replaced."""
        raise ConfigError(f'{self.url} can only be read', _TO_WRITE)

    def is_current(self, obj: _Object) -> bool:
        """Whether this very version is there; False if there is none. Raises RemoteError if there is another one."""
        now = self.stat(obj.name)
        if now and now.version != obj.version:
            raise self.replaced_error(obj)
        return bool(now)

    def replaced_error(self, obj: _Object) -> RemoteError:
        return RemoteError(f"'{obj.name}' in {self.url} was replaced meanwhile, or is changed on the way",
                           f"run the command again, or look with 'etc info -r {obj.name}'", 412)


class _HttpStore(_Remote):
    """What remotes over HTTP share."""
    http: _Http

    def prepare(self, request: _Request) -> _Request:
        """A request as it is sent now; its url may be relative to the bucket."""
        return request

    judge = staticmethod(_judge)  # for _Http.request()

    def error(self, reply: _Reply) -> RemoteError:
        remedy = "check the url, and whether everyone can read it without a login; 'ls -r' needs an index page"
        return RemoteError(f'{self.url} answers {reply.status}', remedy, reply.status)

    def ask(self, method: str, url: str, *accept: int, **more: Any) -> _Reply:
        """Make a request; more: what else _Request has. Raises RemoteError for any answer but 2xx and in `accept`."""
        request = _Request(method, url, **more)
        reply = self.http.request(lambda: self.prepare(request), self.judge)
        if 200 <= reply.status < 300 or reply.status in accept:
            return reply
        raise self.error(reply)

    def address(self, name: str, version: str = '') -> str:
        """Where an object is, as prepare() takes it; only this version, if the address can say so."""
        return '/' + quote(self.key(name), '/~')

    def get(self, name: str, start: int, stop: int, known: _MaybeObject = None) -> _Found:
        """The object, if there is one, and a range of it, or its start, if the connection broke; it must be `known`."""
        span = f'{start}-{stop - 1}' if stop else str(start)  # the latter is -N, for the last N bytes
        headers = {'Range': f'bytes={span}', **_UNCHANGED}
        reply = self.ask('GET', self.address(name), *_NO_RANGE, headers=headers, limit=stop - start + 65536)
        if known:  # the answer tells, as some stores ignore If-Match
            if reply.status in _NO_RANGE or self.version(reply) not in (known.version, ''):
                raise self.replaced_error(known)
        if reply.status in _MISSING:
            return None, b''
        obj = known or self.describe(name, reply)
        if not obj.size:
            return obj, b''
        start, stop, _ = slice(start, stop or None).indices(obj.size)
        span = f'bytes {start}-{stop - 1}'
        told = reply.headers.get('Content-Range', '').lower()
        fits = min(stop - start, _SLICE) <= len(reply.body) <= stop - start  # see _Http.receive()
        if told not in (f'{span}/{obj.size}', f'{span}/*') or not fits:
            raise RemoteError(f'{self.url} does not answer with the range that was asked for',
                              'a proxy or the endpoint_url is at fault', reply.status)
        return obj, reply.body

    def find(self, name: str) -> _Found:
        """As above: in one request, where the server knows ranges that count from the end."""
        try:
            return self.get(name, -_TAIL, 0)
        except RemoteError as e:
            if e.status not in _UNSUPPORTED:
                raise
            return super().find(name)

    def describe(self, name: str, reply: _Reply) -> _Object:
        """The object that an answer to HEAD, or to GET of a range, tells of."""
        whole = f"/{reply.headers.get('Content-Length')}" if reply.status == 200 else ''
        told = reply.headers.get('Content-Range', whole)
        size = re.search(r'/([0-9]{1,19})\Z', told)
        version = self.version(reply)
        if not size or not version:
            raise RemoteError(f"{self.url} does not say how large '{name}' is, or of which version", 'check the url',
                              reply.status)
        return _Object(name, int(size.group(1)), version, reply.time('Last-Modified'))

    def version(self, reply: _Reply) -> str:
        """The version of the object that an answer is of; '' or '0' if the answer does not say."""
        return _version(reply.headers.get('ETag'),
                        reply.time('Last-Modified'))

    def read(self, obj: _Object, start: int, stop: int) -> bytes:
        """As above. Where the connection breaks, it goes on from there."""
        data = b''
        while start < stop:
            _, part = self.get(obj.name, start, stop, obj)
            data += part
            start += len(part)
        return data


class _BucketStore(_HttpStore):
    """What remotes share whose url names a bucket and a prefix."""
    remedies: Sequence[Tuple[str, str]] = ()  # more of them; in braces is what error() knows
    next_page = ''  # the part of a query that asks for another page of the listing
    list_page: Callable[[_Texts], _Page]  # in which what is no archive has no name

    def set_up(self, config: Config) -> None:
        match = re.match(r'[a-z0-9]+://([A-Za-z0-9][A-Za-z0-9._-]{1,221}[A-Za-z0-9])(?:/+(.*?))?/*\Z', config.url or '')
        if not match:
            raise ConfigError('the url is not of the form s3://bucket, gs://bucket, s3://bucket/prefix or the like',
                              "a bucket's name has at least 3 letters, digits, '.', '_' or '-'; of an access point, "
                              'take the alias, which ends in -s3alias')
        self.bucket, prefix = match.groups('')
        self.prefix = prefix and f'{prefix}/'

    def error(self, reply: _Reply) -> RemoteError:
        keys = reply.request.keys
        status = _status(reply)
        verb = 'LIST' if 'delimiter=' in reply.request.url else reply.request.method
        text = f"{reply.status} {'account' if keys else 'nobody'} {verb} {status}"
        remedy = next(remedy for pattern, remedy in (*_REMEDIES, *self.remedies)
                      if re.match('(?is)' + pattern, text))
        source = getattr(keys, 'source', 'nowhere')
        remedy = remedy.format(source=source, store=self)
        return RemoteError(f'{self.url} answers {status}', remedy, reply.status)

    def list(self) -> List[_Object]:
        query = {'prefix': self.prefix, 'delimiter': '/'}
        pages: Dict[str, List[_Object]] = {}
        token = ''
        try:
            while token not in pages:
                pages[token], token = self.list_page(query)
                query[self.next_page] = token
            if token:
                raise ValueError  # the same page again
        except (KeyError, TypeError, ValueError, OverflowError):
            raise RemoteError(f'{self.url} does not list its objects in the form of its API', _WHO_ANSWERS) from None
        return [obj for page in pages.values()
                for obj in page if obj.name]

    def stat(self, name: str) -> _MaybeObject:
        """As above. A GET needs no other permission; what is empty, archived, or tells too little, can be listed."""
        try:
            return self.get(name, 0, 2)[0]  # as s3rver takes 0-0 for all
        except RemoteError as e:
            is_archived = 'InvalidObjectState' in e.message
            if not is_archived and e.status not in _UNSUPPORTED:
                raise
        return next((obj for obj in self.list() if obj.name == name), None)

    def remove(self, obj: _Object) -> None:
        """As above: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-deletes.html"""
        is_etag = obj.version.startswith('"')
        condition = {'If-Match': obj.version} if is_etag else {}
        url = self.address(obj.name, obj.version)
        request = _Request('DELETE', url, condition=condition)

        def prepare() -> _Request:  # it looks first, as a lost answer may have been a yes
            if not self.is_current(obj):
                raise NotFound
            return self.prepare(request)

        with suppress(NotFound):
            reply = self.http.request(prepare, self.judge)
            if reply.status >= 300:
                prepare()
                raise self.error(reply)

    def split(self, chunks: _Chunks, size: int) -> Iterator[Any]:
        """Gather chunks to parts of just `size` bytes, as some stores want equal ones; the last is shorter or empty.
        Long ranges are parts of their own, but for what the part before lacks: that one comes as a list of both."""
        part: List[bytes] = []
        room = size
        for chunk in chunks:
            if isinstance(chunk, _Range):
                obj, start, stop = chunk
                middle = start + room % size
                if stop - middle >= _MIN_PART:
                    if room < size:
                        yield [b''.join(part), _Range(obj, start, middle)]
                        part, room = [], size
                    count = (stop - middle) // max(size, _LONG_PART) + 1
                    step = (stop - middle) // count + 1
                    for at in range(middle, stop, step):
                        yield _Range(obj, at, min(at + step, stop))
                    continue
                chunk = self.read(*chunk)
            while len(chunk) >= room:
                part.append(chunk[:room])
                yield b''.join(part)
                chunk = chunk[room:]
                part, room = [], size
            part.append(chunk)
            room -= len(chunk)
        yield b''.join(part)


def _version(etag: _MaybeText, modified: float) -> str:
    """The ETag, always in quotes, since some stores list it bare; otherwise the time of the last change."""
    if not etag or etag.startswith('W/'):  # a weak one says nothing of bytes (RFC 9110, 8.8.1)
        return f'{modified:.0f}'
    return '"{}"'.format(etag.strip('"'))


def _md5() -> Any:
    """A new MD5 hash, which storage compares, not for security; None where there is none (FIPS)."""
    import hashlib
    md5: Any = hashlib.md5
    for options in ({'usedforsecurity': False}, {}):  # the former is a TypeError up to Python 3.8
        with suppress(ValueError, TypeError):
            return md5(**options)
    return None


# file:// -------------------------------------------------------------------------------

class _FileRemote(_Remote):
    """file:///path: a shared directory."""
    def set_up(self, config: Config) -> None:
        self.url = config.url or ''
        match = re.match(r'file://(?:localhost)?(/.*)\Z', self.url)
        if not match:
            raise ConfigError('the url is no absolute path', 'write file:///path, with three slashes')
        path = unquote(match.group(1),
                       sys.getfilesystemencoding(), 'surrogateescape')
        if os.name == 'nt':
            path = re.sub(r'\A/(?=\w:)', '', path)  # /C:/...
        self.root = _check_path(path)
        self.prefix = os.path.join(self.root, '')  # so that keys are paths
        self.is_public = config.public

    def check(self) -> None:
        try:
            os.stat(self.root)
        except FileNotFoundError:
            raise NotFound(f'no directory {self.root}', 'check the url, or make it with the first push') from None

    def list(self) -> List[_Object]:
        self.check()
        names = [self.name_of(item.path) for item in os.scandir(self.root)]
        found = []
        for name in filter(None, names):
            try:
                found.append(self.stat(name))
            except OSError as e:  # one that cannot be read must not hide the others
                _say(f'{self.key(name)}: {e.strerror}', _WARNING)
        return [obj for obj in found if obj]

    def stat(self, name: str, file: Union[str, int] = '') -> _MaybeObject:
        """As above; or the object in this file, which may be open. None if it is no regular one."""
        with suppress(FileNotFoundError):
            status = os.stat(self.key(name) if file == '' else file)
            if stat.S_ISREG(status.st_mode):
                version = f'{status.st_mtime_ns}-{status.st_size}-{status.st_ino}'
                return _Object(name, status.st_size, version, status.st_mtime)
        return None

    def read(self, obj: _Object, start: int, stop: int) -> bytes:
        """As above. A tool that writes into the file meanwhile changes its time."""
        with suppress(FileNotFoundError):
            with open(self.key(obj.name), 'rb') as file:
                file.seek(start)
                data = file.read(stop - start)
                found = self.stat(obj.name, file.fileno())
            if found == obj and len(data) == stop - start:
                self.job.add(len(data))
                return data
        raise self.replaced_error(obj)

    def write(self, name: str, chunks: _Chunks,
              limit: int, exclusive: bool) -> None:
        self.make_directory(self.root)
        latest = time.time() - _FILE_REMNANTS
        for item in os.scandir(self.root):
            with suppress(OSError):
                if re.match(r'\..+\.tgz\.([0-9a-f]{16}|claim)\Z', item.name):
                    if item.stat().st_mtime < latest:
                        os.unlink(item.path)
        new = f"{self.key('.' + name)}.{os.urandom(8).hex()}"
        try:
            with open(new, 'xb') as file:
                for chunk in chunks:
                    file.write(chunk)  # type: ignore[arg-type]
                    self.job.add(len(chunk))
                file.flush()
                os.fsync(file.fileno())
            self.publish(new, 0o444)
            self.place(new, name, exclusive)
        except OSError as e:
            e.filename = e.filename or self.root  # which write() does not tell
            raise
        finally:
            with suppress(OSError):
                os.unlink(new)

    def make_directory(self, path: str) -> None:
        if not os.path.isdir(path):
            self.make_directory(os.path.dirname(path))
            with suppress(FileExistsError):  # another push was faster
                os.mkdir(path)
                self.publish(path, 0o555)

    def publish(self, path: str, bits: int) -> None:
        """Let everyone read what is to be public."""
        if self.is_public:
            with suppress(OSError):
                os.chmod(path, os.stat(path).st_mode | bits)

    def place(self, new: str, name: str, exclusive: bool) -> None:
        """Give a complete file its name. FileExistsError if it is taken and `exclusive`."""
        path = self.key(name)
        if not exclusive:
            os.replace(new, path)
            return
        with suppress(OSError):
            os.link(new, path)
            os.unlink(new)
            return
        # The name is taken, or there are no hard links here: then whoever makes this file may go on.
        claim = f"{self.key('.' + name)}.claim"
        open(claim, 'x').close()
        try:
            if os.path.lexists(path):
                raise FileExistsError
            os.rename(new, path)
        finally:
            os.unlink(claim)

    def remove(self, obj: _Object) -> None:
        """As above. Only a file that nobody else can replace is sure to be this version, so it is set aside first."""
        aside = f"{self.key('.' + obj.name)}.{os.urandom(8).hex()}"
        with suppress(FileNotFoundError):  # another purge was faster
            if self.is_current(obj):
                os.rename(self.key(obj.name), aside)
                if self.stat(obj.name, aside) != obj:
                    with suppress(FileExistsError):  # a still newer one has come
                        self.place(aside, obj.name, exclusive=True)
                    raise self.replaced_error(obj)
                os.unlink(aside)


# s3:// ---------------------------------------------------------------------------------

# How stores answer that know no conditions (DELETE: OpenStack Swift has another ETag inside for what came in parts)
_S3_UNCONDITIONAL = r'\S+ (400|501) (|NotImplemented|InvalidArgument|InvalidRequest)\Z|DELETE 412 '
_S3_NO_COPIES = r'.*\.r2\.cloudflarestorage\.com|\S+ .*%'  # R2 wants equal parts; Ceph decodes a source's name twice
# As with `aws`, the bucket is part of the path where no host can have its name (an address has no subdomains; with TLS,
# a dot does not match the certificate): https://docs.aws.amazon.com/cli/latest/topic/s3-config.html#addressing-style
_S3_IN_HOST = r'(?!https?://([\d.]+|\[.*\])[:/\s])(http:.*\s[a-z0-9.-]+|.*\s[a-z0-9-]+)\Z'
_S3_NEEDS = 'the credentials, which come from {source}, need %s here'


class _S3Remote(_BucketStore):
    """s3://bucket[/prefix]: Amazon S3, or what speaks its protocol at `endpoint_url`."""
    remedies = (  # see error()
        ('40[013] nobody',
         "no credentials were found in the settings, the environment, the AWS profile '{store.aws.name}', or those of "
         "a container or this machine; set aws_access_key_id and aws_secret_access_key, or run 'aws configure' or "
         "'aws sso login'"),
        ('.* RequestTimeTooSkewed:', "set this machine's clock"),
        ('.* (InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken):',
         'check or renew the credentials, which come from {source}, and check the region'),
        ('.* (PermanentRedirect|AuthorizationHeaderMalformed):',
         "set 'region' to the bucket's, and no endpoint_url for Amazon"),
        ('.* AccessControlListNotSupported:', "drop 'public: true', and let a bucket policy make the objects public"),
        # As Alibaba calls it, Tencent (https://www.tencentcloud.com/document/product/436/75050) and Huawei
        ('.* (SecondLevelDomainForbidden|PathStyleDomainForbidden|VirtualHostDomainRequired):',
         "set 'addressing_style = virtual' below 's3 =' of the profile '{store.aws.name}' in ~/.aws/config"),
        ('.* NoSuchUpload:', 'the storage, or a rule of the bucket, has removed the upload meanwhile; push again'),
        ('.* InvalidObjectState:', 'it was moved to an archive class; restore it there first'),
        ('40[13] account LIST', _S3_NEEDS % 's3:ListBucket'),
        ('40[13] account GET', _S3_NEEDS % 's3:GetObject, and s3:ListBucket to tell what is missing'),
        ('40[13] account DELETE', _S3_NEEDS % 's3:DeleteObject'),
        ('40[13] account|.* AccessDenied:', _S3_NEEDS % 's3:PutObject'),
        ('', 'check the bucket in the url, the endpoint_url and the region'))
    next_page = 'continuation-token'
    must_check = False  # whether the bucket has been found to want MD5 sums
    takes_few_parts = False  # the same

    def set_up(self, config: Config) -> None:
        super().set_up(config)
        self.aws = _Aws(config, self.job)
        self.http = self.aws.http
        self.opened.callback(self.http.close)
        self.region = self.aws.region  # the bucket's, as soon as an answer has told it
        self.endpoint = (config.endpoint_url or '').rstrip('/') or self.aws.endpoint('s3')
        self.has_exclusive_write = not self.endpoint  # other stores may ignore If-None-Match
        self.can_copy = not re.match(_S3_NO_COPIES, f'{self.endpoint} {self.prefix}')
        style = self.aws.values.get('s3.addressing_style')
        is_wanted = style == 'virtual' or not self.endpoint and style != 'path'
        self.is_bucket_in_host = is_wanted and re.match(_S3_IN_HOST, f'{self.endpoint} {self.bucket}')
        self.headers = {'x-amz-request-payer': config.request_payer}
        self.object_headers = {
            'Content-Type': 'application/gzip',
            'x-amz-acl': 'public-read' if config.public else None,
            'x-amz-storage-class': config.storage_class,
            'x-amz-server-side-encryption': config.sse or config.sse_kms_key_id and 'aws:kms',
            'x-amz-server-side-encryption-aws-kms-key-id': config.sse_kms_key_id}

    def prepare(self, request: _Request) -> _Request:
        found = {**self.headers, **request.headers, **request.condition}
        headers = {name: value
                   for name, value in found.items() if value}
        md5 = self.must_check and request.body and _md5()
        if md5:
            headers['Content-MD5'] = _base64(request.digest(md5))
        scheme, _, host = (self.endpoint or self.aws.host('s3', self.region)).partition('//')
        place = f'{self.bucket}.{host}' if self.is_bucket_in_host else f'{host}/{self.bucket}'
        request = request._replace(url=f'{scheme}//{place}{request.url}',
                                   headers=headers, keys=self.aws.get())
        return self.aws.sign(request, f'{self.region}/s3')

    def judge(self, reply: _Reply) -> str:
        """As above. Another try may help after a refusal that tells of a region, clock or key, or no conditions."""
        request = reply.request
        if reply.status < 300 and request.method == 'GET':  # of others, errors may come with status 200
            return 'final'
        error = _aws_error(reply)
        code = error['Code']
        region = reply.headers.get('x-amz-bucket-region') or error['Region']
        is_unknown = re.match(_S3_UNCONDITIONAL, f'{request.method} {reply.status} {code}')
        is_elsewhere = region != self.region and reply.status >= 300
        if 'content-md5' in error['Message'].lower() and 'Content-MD5' not in request.headers:
            self.must_check = True
        elif request.condition and is_unknown and not self.has_exclusive_write:
            request.condition.clear()
        elif code in ('ExpiredToken', 'TokenRefreshRequired'):
            self.aws.renew(request.keys)
        elif is_elsewhere and re.match(_AWS_REGION, region):
            self.region = region
        else:
            return self.aws.judge(reply)
        return 'at once'

    def list_page(self, query: _Texts) -> _Page:
        """ListObjectsV2"""
        query = {'list-type': '2', 'encoding-type': 'url', **query}
        reply = self.ask('GET', f'/?{_query(query)}')
        page = _xml_items(reply, 'ListBucketResult')
        decode = unquote_plus if page.get('EncodingType') == 'url' else str
        objects = []
        for item in reply.xml('Contents'):
            modified = _iso_time(item.get('LastModified', ''))
            name = self.name_of(decode(item['Key']))
            objects.append(_Object(name, int(item['Size']), _version(item.get('ETag'), modified), modified))
        is_last = page['IsTruncated'] != 'true'
        return objects, '' if is_last else page['NextContinuationToken']

    def write(self, name: str, chunks: _Chunks,
              limit: int, exclusive: bool) -> None:
        """https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html"""
        # Amazon takes many parts, others often only few: so there are few while they are moderate.
        is_few = self.takes_few_parts or self.endpoint and limit < _FEW_PARTS * _LONG_PART
        size = max(_MIN_PART, limit // (_FEW_PARTS if is_few else _MAX_PARTS) + 1)  # bytes of a part
        url = self.address(name)
        parts = self.split(chunks, size)
        first = next(parts)
        if isinstance(first, bytes) and len(first) < size:
            return self.finish(name, exclusive, 'PUT', url,
                               headers=self.object_headers, body=[first])
        # An interruption waits for the answer, or nobody would know which upload to abort.
        reply = self.ask('POST', f'{url}?uploads=',
                         headers=self.object_headers, is_vital=True)
        upload = _xml_items(reply, '*').get('UploadId')  # some stores have another name for what it is in
        if not upload:
            raise self.error(reply)
        query = _query({'uploadId': upload})
        connections = min(self.connections, _IN_FLIGHT // size + 1)
        parts = itertools.chain([first], filter(None, parts))
        del first  # or memory would hold it to the end
        try:
            rows = _ordered(self.job, connections, partial(self.send_part, url, query), enumerate(parts, 1),
                            lambda running, pending: running <= connections and pending < 256)  # if one is slow
            manifest = f"<CompleteMultipartUpload>{''.join(rows)}</CompleteMultipartUpload>".encode()
            self.finish(name, exclusive, 'POST', f'{url}?{query}',
                        headers={'Content-Type': 'application/xml'}, body=[manifest])
        except BaseException as e:  # abandoned parts are billed
            self.takes_few_parts |= isinstance(e, _WriteAgain)
            with suppress(RemoteError):
                self.ask('DELETE', f'{url}?{query}', 404,
                         tries=_LAST_TRIES, is_vital=True)
            raise

    def send_part(self, url: str, query: str, item: Tuple[int, Any]) -> str:
        """Send a part, or let the storage copy it from another object; return what the manifest says of it."""
        from xml.sax.saxutils import escape
        number, part = item
        url = f'{url}?partNumber={number}&{query}'
        if isinstance(part, _Range):
            source, start, stop = part
            headers = {'x-amz-copy-source': f'{self.bucket}{self.address(source.name)}',
                       'x-amz-copy-source-range': f'bytes={start}-{stop - 1}'}
            reply = self.ask('PUT', url, headers=headers)
            etag = _xml_items(reply, 'CopyPartResult').get('ETag')
            if etag and not self.is_current(source):  # some stores misjudge conditions of the source, or ignore them
                raise self.replaced_error(source)
        else:
            body = [part]
            if isinstance(part, list):
                begin, rest = part
                body = [begin, self.read(*rest)]
            try:
                reply = self.ask('PUT', url, body=body)
            except RemoteError as e:
                if self.takes_few_parts or number <= _FEW_PARTS or not 400 <= e.status < 500:
                    raise
                raise _WriteAgain(e.message) from e
            etag = reply.headers.get('ETag')
        if not etag:
            raise self.error(reply)
        return f'<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag></Part>'

    def finish(self, name: str, exclusive: bool, method: str, url: str, **more: Any) -> None:
        """Make the request that lets the object appear: CompleteMultipartUpload or PutObject."""
        if exclusive:
            more['condition'] = {'If-None-Match': '*'}
            if not self.has_exclusive_write and self.stat(name):
                raise FileExistsError
        reply = self.ask(
            method, url, 404, 409, 412, **more)
        if exclusive and reply.status in (409, 412):
            raise FileExistsError  # perhaps by ourselves, if the first answer was lost
        code = _aws_error(reply)['Code']
        if code != 'NoSuchUpload' and (code or reply.status >= 300):
            raise self.error(reply)
        found: Any = _xml_items(reply, 'CompleteMultipartUploadResult')
        if method == 'PUT' and not reply.body.strip():
            found = reply.headers
        if reply.status != 200 or not found.get('ETag'):
            raise _Unconfirmed(str(self.error(reply)))


# gs:// ---------------------------------------------------------------------------------

class _GsRemote(_BucketStore):
    """gs://bucket[/prefix]: Google Cloud Storage, by its JSON API: https://cloud.google.com/storage/docs/json_api/v1"""
    remedies = (  # see error()
        ('40[13] account', 'this account needs roles/storage.objectViewer here to read, or roles/storage.objectUser'),
        ('40[13] nobody', "no credentials were found: run 'gcloud auth application-default login', or set "
                          'google_credentials or $GOOGLE_APPLICATION_CREDENTIALS to a credentials file'),
        ('400 .*uniform bucket-level access',
         "drop 'public: true', which cannot work here, and let allUsers read by the bucket's IAM policy"),
        ('', 'check the bucket in the url'))
    next_page = 'pageToken'
    credentials: Any = None

    def set_up(self, config: Config) -> None:
        super().set_up(config)
        endpoint = config.endpoint_url or _env('STORAGE_EMULATOR_HOST') or 'https://storage.googleapis.com'
        self.endpoint = (endpoint if '://' in endpoint else f'http://{endpoint}').rstrip('/')
        self.is_public = config.public
        self.http = _Http(self.job, config.ca_bundle)
        self.opened.callback(self.http.close)
        if not self.endpoint.startswith('http://'):
            self.credentials = _GoogleCredentials(config, self.http)

    def resource(self, archive: str = '', api: str = '', **query: str) -> str:
        """The address of an object, or of the bucket."""
        key = f"/{quote(self.key(archive), '~')}" if archive else ''
        return f'{api}/storage/v1/b/{self.bucket}/o{key}?{_query(query)}'

    def address(self, name: str, version: str = '') -> str:
        query = {'ifGenerationMatch': version} if version else {'alt': 'media'}
        return self.resource(name, **query)

    def prepare(self, request: _Request) -> _Request:
        keys = self.credentials and self.credentials.get()
        headers = {'Accept-Encoding': 'gzip', **request.headers, **(keys or {})}  # or it may gunzip an object
        return request._replace(url=f'{self.endpoint}{request.url}', headers=headers, keys=keys)

    def judge(self, reply: _Reply) -> str:
        if reply.status == 401 and reply.request.keys:
            self.credentials.renew(reply.request.keys)
            return 'at once'
        return _judge(reply)

    def list_page(self, query: _Texts) -> _Page:
        url = self.resource(fields='kind,items(name,size,generation,updated),nextPageToken', **query)
        page = self.ask('GET', url).json()
        if 'storage#object' not in page['kind']:  # and an 's', which an emulator leaves out
            raise ValueError
        objects = [_Object(self.name_of(item['name']), int(item['size']), str(item['generation']),
                           _iso_time(item.get('updated', '')))
                   for item in page.get('items') or []]
        return objects, '' + page.get('nextPageToken', '')  # a TypeError if that is no text

    def version(self, reply: _Reply) -> str:
        return reply.headers.get('x-goog-generation') or ''

    def write(self, name: str, chunks: _Chunks,
              limit: int, exclusive: bool) -> None:
        """A resumable upload: https://cloud.google.com/storage/docs/performing-resumable-uploads"""
        query = {'name': self.key(name)}
        if exclusive:
            query['ifGenerationMatch'] = '0'
        if self.is_public:
            query['predefinedAcl'] = 'publicRead'
        headers = {'X-Upload-Content-Type': 'application/gzip'}
        reply = self.ask('POST', self.resource(api='/upload', uploadType='resumable', **query), 412, headers=headers)
        if reply.status == 412:
            raise FileExistsError
        session: str = reply.headers.get('Location') or ''  # whoever has it needs no credentials
        if not session.startswith('https://' if self.endpoint.startswith('https:') else 'http'):
            raise self.error(reply)
        md5 = _md5()
        size = 0

        def parts() -> Iterator[Tuple[int, Any, Any]]:
            nonlocal size
            for part in self.split(chunks, _GS_PART):
                size += len(part)
                yield size - len(part), part, size if len(part) < _GS_PART else '*'
                if md5:
                    md5.update(part)

        try:
            *_, reply = _ordered(self.job, 1, partial(self.send_part, session), parts())  # the next is packed meanwhile
        except BaseException:
            with suppress(RemoteError):
                self.http.request(lambda: _Request('DELETE', session, tries=1, is_vital=True))
            raise
        answer = reply.json()
        generation = str(answer.get('generation', ''))
        if not generation or (answer.get('name'), str(answer.get('size'))) != (self.key(name), str(size)):
            raise _Unconfirmed(str(self.error(reply)))
        if md5 and answer.get('md5Hash') not in (None, '', _base64(md5.digest())):
            url = self.address(name, generation)
            self.ask('DELETE', url, 404)
            raise Corrupt(f"'{name}' did not arrive in {self.url} as it was sent, so it was deleted there",
                          'push again')

    def send_part(self, session: str, item: Tuple[int, Any, Any]) -> _Reply:
        """Send what the server lacks of a part until it has all; return what it says then."""
        start, part, total = item  # where it begins, the part, and the size of all, or '*' if it is not the last one
        stop = start + len(part)
        at = start  # up to where it has arrived; -1 while that is not known

        def prepare() -> _Request:
            nonlocal at
            rest = memoryview(part)[at - start:] if at >= start else b''
            span = f'{at}-{stop - 1}' if rest else '*'
            at = -1
            return _Request('PUT', session, {'Content-Range': f'bytes {span}/{total}'}, [rest], keys=session)

        def judge(reply: _Reply) -> str:
            nonlocal at
            if reply.status != 308:
                return _judge(reply)
            told = reply.headers.get('Range') or ''
            received = re.match(r'bytes=0-(\d{1,19})\Z', told)
            at = int(received.group(1)) + 1 if received else 0
            return 'final' if at > start else 'later'

        while True:
            reply = self.http.request(prepare, judge)
            if reply.status == 412:
                raise FileExistsError  # perhaps by ourselves, if an answer was lost
            if reply.status < 300 and total != '*':
                return reply
            if reply.status != 308 or not start < at <= stop:
                raise self.error(reply)
            if at == stop and total == '*':
                return reply
            start, part = at, memoryview(part)[at - start:]


# http(s):// ----------------------------------------------------------------------------

class _WebRemote(_HttpStore):
    """http(s)://host/path: what a web server shows. It can only be read."""
    def set_up(self, config: Config) -> None:
        self.url = (config.url or '').rstrip('/')
        if not re.match(rf'{_SITE}(?:/[^?#@]*)?\Z', self.url):  # no @ anywhere, as a password may hold a slash
            raise ConfigError('the url is not of the form https://host or https://host/path, or it has a user or '
                              'password in it, which etcetera never sends', 'write %40 for an @ in the path')
        self.base = quote(self.url, safe="%/:[]~!$&'()*+,;=@") + '/'
        self.prefix = unquote(self.base)
        self.http = _Http(self.job, config.ca_bundle)
        self.opened.callback(self.http.close)
        self.downloads: Dict[_Object, Any] = {}  # files, for objects of a server that knows no ranges

    def address(self, name: str, version: str = '') -> str:
        return f'{self.base}{name}.tgz'

    def ask(self, method: str, url: str, *accept: int, **more: Any) -> _Reply:
        """As above. It follows redirects."""
        for _ in range(_TRIES):
            reply = super().ask(
                method, url, *accept, *_REDIRECTS, **more)
            if reply.status not in _REDIRECTS:
                return reply
            with suppress(ValueError):
                target = urljoin(url, reply.headers.get('Location') or '')
                if url.startswith('https:') and not target.startswith('https:'):
                    raise RemoteError(f'{self.url} redirects to a place without encryption', 'check the url')
                url = target
        raise self.error(reply)

    def list(self) -> List[_Object]:
        """The archives in the directory to which its index page links."""
        from html import unescape
        page = self.ask('GET', self.base).body.decode('utf-8', 'replace')
        names = set()
        links = r'(?i)<a\s(?:[^<>]*\s)?href\s*=\s*("[^"]*"|\'[^\']*\'|[^\s<>]*)'
        for link in re.findall(links, page):
            with suppress(ValueError):
                address = unescape(link.strip('"\''))
                target = unquote(urljoin(self.base, address))
                names.add(self.name_of(target))
        found = _ordered(self.job, self.connections, self.stat, sorted(names - {''}))
        return [obj for obj in found if obj]

    def stat(self, name: str) -> _MaybeObject:
        """As above. HEAD comes first, as a server without ranges answers GET with the whole object; some refuse it."""
        with suppress(RemoteError):
            reply = self.ask('HEAD', self.address(name), *_MISSING)
            return None if reply.status in _MISSING else self.describe(name, reply)
        return self.get(name, 0, 2)[0]

    def read(self, obj: _Object, start: int, stop: int) -> bytes:
        """As above. An object of a server that knows no ranges is downloaded first."""
        import tempfile
        if obj not in self.downloads:
            try:
                return super().read(obj, start, stop)
            except RemoteError as e:
                if e.status != 200:  # not because it answers with the whole object
                    raise
            _say(f"{self.url} supports no ranges, so all of '{obj.name}' is downloaded first")
            file = self.opened.enter_context(tempfile.TemporaryFile())
            reply = self.ask('GET', self.address(obj.name), headers=_UNCHANGED, into=file, limit=obj.size)
            if file.tell() != obj.size or self.version(reply) != obj.version:
                raise self.replaced_error(obj)
            self.downloads[obj] = file
        file = self.downloads[obj]
        with self.job.lock:
            file.seek(start)
            data: bytes = file.read(stop - start)
        self.job.add(len(data))
        return data


# All kinds -----------------------------------------------------------------------------

@contextmanager
def _open_remote(config: Config, job: _Job) -> Iterator[_Remote]:
    """The remote that `url` names. What is said of the url says where it was set."""
    kinds = {'file': _FileRemote, 's3': _S3Remote, 'gs': _GsRemote, 'https': _WebRemote, 'http': _WebRemote}
    url = config.url or ''
    try:
        kind = kinds.get(url.partition('://')[0])
        if not kind:
            starts = ' or '.join(f'{kind}://' for kind in kinds)
            raise ConfigError(
                f'cannot use the url; it must start with {starts}' if url else 'no url',
                f"did you mean 'file://{_existing_part(url)}'?" if url[:1] == '/' else
                "set where datasets are shared with a line such as 'url: s3://my-bucket' in ~/.etc.yaml, with $ETC_URL "
                'or with --url')
        remote = kind(config, job)
        with remote.opened:
            yield remote
    except Error as e:
        if config._url_source:
            e.message, e.remedy = (
                re.sub(r'\bthe url\b', f'the url (from {config._url_source})', text, count=1)
                for text in (e.message, e.remedy))
        raise


# ---------------------------------------------------------------------------------------
# Home
#
# The local store. At any instant ~/.etc/NAME is absent, the complete old dataset, or the complete new one: all work
# happens in a directory beside it, and installing is one rename. Only in a container's image, where directories cannot
# be renamed, an old one is emptied in its place; its receipt says first that it is none any more.
#     ~/.etc/NAME                     a directory (pulled, created, copied) or a link (registered)
#     ~/.etc/NAME/.etcetera.json      its receipt: what was installed, and from where
#     ~/.etc/.etcetera/locks/NAME     locked while a pull or purge works
#     ~/.etc/.etcetera/NAME@host@pid@random   what a process works on; the name tells whether it is alive
#         new, journal                what is being filled; what of it is written
#         earlier                     what an interrupted pull has left: all of its directory
#         old                         a dataset that is being replaced; it goes back if nothing took its place
#         gone                        a dataset that was replaced, for those who are still reading it
#     ~/.etc/.etcetera/NAME@host@pid@random@0   the same, when the process has ended its work, but something is to stay
#
# The receipt goes where its dataset goes: into a copy of the store, or an image. It is believed only in a directory of
# the name that it holds, never through a link. Locks only save work, as some disks ignore them: then two pulls fill a
# directory each, one rename wins, and the other accepts it if it is the same (with -f, or if both add partitions to
# what is there, the last one wins).
# If a pull is killed, the next one takes over what hashes as its journal says (see _replay()), and fetches the rest. It
# begins anew with archives of other tools, and for a day where it may be alive: on Windows and other machines.
# ---------------------------------------------------------------------------------------

_STALE = 86400  # seconds without a sign of life after which the work of another host counts as abandoned
_RESUMABLE = 7 * 86400  # seconds for which what an interrupted pull has left is kept
_GRACE = 900  # seconds for which a replaced dataset is kept for those who are reading it
_OURS = os.urandom(4).hex()  # tells this process from an earlier one that had the same number, as in a container


def _names(home: Path) -> List[str]:
    """The names of the datasets that are here, sorted."""
    _abandoned(home)  # so that what had been set aside is back
    with suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(home)
                      if _is_name(name) and _is_dataset(home / name))
    return []


def _abandoned(home: Path) -> List[Path]:
    """What processes worked on when they died, or have left on purpose. What they had set aside is put back."""
    found = []
    for work in home.glob('.etcetera/*@*@[0-9]*@*'):
        with suppress(OSError):  # another process was faster
            if not _is_alive(work):
                _put_back(work)
                found.append(work)
    return found


def _put_back(work: Path) -> None:
    """Put back what was set aside; or if another dataset took its place, keep it for those who are reading it."""
    place = work.parents[1] / work.name.split('@')[0]
    if os.path.lexists(work / 'old'):
        if os.path.lexists(place):
            place = work / 'gone'
            _remove(place)  # set aside by a try before
        os.rename(work / 'old', place)


class _Place:
    """Where a dataset is in the local store, or is to come; and the contents that the caller insists on."""
    def __init__(self, text: str,
                 config: Optional[Config]) -> None:
        """text: NAME, or NAME@sha256:... Raises InvalidDataset."""
        self.started = time.monotonic()
        self.config = config or Config.load()
        match = re.fullmatch(f'({_NAME})(?:@(sha256:[0-9a-f]{{64}}))?', text)
        if not match:
            raise InvalidDataset(
                f"'{_masked(text)}' cannot be a dataset's name", "it takes at most 128 letters, digits, '.', '_' and "
                "'-', the first a letter or digit; after that, only @sha256: and 64 hexadecimal digits")
        self.name, self.pin = match.groups()
        self.root = self.config.home
        self.path = self.root / self.name
        self.work = self.root / f'.etcetera/{self.name}@{_host()}@{os.getpid()}@{_OURS}{os.urandom(4).hex()}'
        self.new = self.work / 'new'
        _abandoned(self.root)  # so that what had been set aside is back

    def check(self, segments: _Segments) -> None:
        """Raises Corrupt if these are not the contents that the caller insists on. None means that nothing is known."""
        digest = _dataset_digest(segments) if segments else 'none, as another tool packed it'
        if self.pin not in (None, digest):
            raise Corrupt(f"'{self.name}': expected digest {self.pin}, found {digest}",
                          'those contents are not there, or not any more')

    def open(self) -> Dataset:
        """The dataset that is here, with its receipt. Raises NotFound."""
        if not _is_dataset(self.path):
            raise NotFound(f"no local dataset '{self.name}'",
                           f"'etc pull {self.name}' would fetch it, 'etc register DIR {self.name}' add it")
        if not self.path.exists():
            raise NotFound(f"the directory that '{self.name}' was registered for is gone ({os.readlink(self.path)})",
                           f"'etc purge {self.name}' forgets it")
        return Dataset(self.path, self.name,
                       _read_receipt(self.path))

    @contextmanager
    def lock(self, job: _Job) -> Iterator[None]:
        """Let one process at a time work on this dataset, if the system can. It only saves work."""
        path = self.root / f'.etcetera/locks/{self.name}'
        with ExitStack() as stack:
            with suppress(ImportError, OSError):  # as on Windows, and in a store that can only be read
                import fcntl
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, 'ab'))
                for attempt in itertools.count():
                    with suppress(BlockingIOError, PermissionError):
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as waiting would stop green threads
                        break
                    if not attempt:
                        _say(f"waiting for another process that works on '{self.name}'")
                    job.sleep(_TICK)
            yield

    @contextmanager
    def installing(self) -> Iterator[None]:
        """Let `new` be filled for commit(). If the network, Ctrl-C or foreseen lack of room interrupts, it is kept."""
        self.work.mkdir(parents=True)
        try:
            self.clear()
            _make_movable(self.path)
            self.sweep()
            yield
        except Exception as e:
            if not isinstance(e, (RemoteError, _NoRoom)):
                self.forget()
            raise
        finally:
            if _journals(self.work) or os.path.lexists(self.work / 'gone'):
                os.rename(self.work, f'{self.work}@0')
            else:
                _remove(self.work)

    def forget(self) -> None:
        """From here on, nobody may go on with this pull."""
        _remove(self.work / 'journal')
        _remove(self.work / 'earlier')

    def sweep(self) -> None:
        """Remove what was abandoned, but for what may be resumed or read; `earlier` is what pulls of this one left."""
        for work in _abandoned(self.root):
            is_same = work.name.startswith(self.name + '@')
            keep = _RESUMABLE if _journals(work) and not is_same else 0
            if os.path.lexists(work / 'gone'):
                keep = _GRACE
            with suppress(OSError):  # another process was faster
                if time.time() - work.stat().st_mtime < keep:
                    continue
                claimed = self.work / work.name
                os.rename(work, claimed)  # if its owner lives after all, it must not install it
                if is_same and _journals(claimed):
                    os.rename(_journals(claimed)[0].parent, self.work / 'earlier')
                _remove(claimed)

    def commit(self, replace: bool,
               receipt: _Receipt = _NO_RECEIPT) -> None:
        """Give `new` the dataset's name. Raises Exists if other contents have that, and may not be replaced."""
        if receipt.name:
            _write_receipt(self.new, receipt)
        self.forget()
        while replace or not os.path.lexists(self.path):
            with suppress(FileNotFoundError):
                if replace:
                    self.vacate('old')
            try:
                return os.rename(self.new, self.path)
            except OSError:
                if not (os.path.lexists(self.path) and os.path.lexists(self.new)):
                    raise
            finally:
                _put_back(self.work)
        other = _read_receipt(self.path)
        is_same = other.name and receipt.digest == other.digest
        if not is_same or receipt.installed - other.installed:
            raise self.taken_error()

    def taken_error(self) -> Exists:
        return Exists(f"another '{self.name}' is installed already", 'choose another name, or -f (force) to replace it')

    def vacate(self, name: str) -> None:
        """Let the dataset have this name in `work`; or remove it, as none in a container image can be renamed."""
        try:
            os.rename(self.path, self.work / name)
        except OSError as e:
            if e.errno != errno.EXDEV or self.path.is_symlink():
                raise
            _write_receipt(self.work, _Receipt(self.name, source=''))  # first it stops counting as a dataset
            os.rename(self.work / _RECEIPT, self.path / _RECEIPT)
            self.clear()
            if os.path.lexists(self.path):
                raise

    def clear(self) -> None:
        """Remove a directory that no longer counts as a dataset; last its receipt, which says so."""
        if self.path.is_dir() and not _is_dataset(self.path):
            for item in sorted(self.path.iterdir(),
                               key=lambda item: item.name == _RECEIPT):
                _remove(item)
                if os.path.lexists(item):
                    return
            os.rmdir(self.path)

    def reuse(self, job: _Job,
              wanted: _Texts) -> Set[str]:
        """Link what installed datasets have of segments with these digests, by path; return the paths of the sound."""
        linked: _Texts = {}
        os.mkdir(self.new / 'data')
        for name in _names(self.root):
            receipt = _read_receipt(self.root / name)
            same = dict(_digests(receipt.here()).items() & wanted.items() - linked.items())
            linked.update(same)
            with suppress(InvalidDataset, OSError):  # as where it is being removed
                for _, entries in _Survey(self.root / name, same).listing(same) if same else ():
                    for entry in entries:
                        job.add(0)
                        target = _join(self.new, entry.name)
                        if entry.name.endswith('/'):
                            os.mkdir(target)
                        elif entry.link:
                            _symlink(_to_os(entry.link), target)
                        else:
                            _link_or_copy(entry.source, target)
        found: _Segments = ()
        with suppress(Error, OSError):
            found = _digest_segments(job, self.new)  # which nobody can exchange any more
        sound = {segment.path for segment in found
                 if segment.digest == linked.get(segment.path)}
        for path in linked.keys() - sound:
            _remove(self.new / _to_os(path))
        return sound


def _digests(segments: Iterable[_Segment]) -> _Texts:
    """The digests of segments, by their paths."""
    return {segment.path: segment.digest for segment in segments}


def _is_dataset(path: Path) -> bool:
    """Whether that is a dataset, or a link to one, and neither empty nor being removed."""
    receipt = _read_receipt(path)
    if receipt.name:  # without anything that is installed while it is being removed
        return bool(receipt.installed)
    return path.is_symlink() or path.is_dir() and os.listdir(path) != []


def _read_receipt(directory: Path) -> _Receipt:
    """The receipt of what is installed; an empty one if there is none that can be believed."""
    path = directory / _RECEIPT
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        if directory.is_symlink() or path.is_symlink():
            return _NO_RECEIPT
        row = json.loads(path.read_text('utf-8'))
        values = [row[key] for key in _Receipt._fields]
        name, rows, installed, *texts = values
        ''.join(texts + installed)  # TypeError if they are no texts
        segments = list(map(_Segment.from_json, rows))
        receipt = _Receipt(name, segments, frozenset(installed), *texts)
        if receipt.name == directory.name and receipt.digest == row['digest']:
            return receipt
    return _NO_RECEIPT


def _write_receipt(directory: Path, receipt: _Receipt) -> None:
    """Write it, and let the disk hold all of the directory: before it gets its name, or is removed."""
    row = receipt._asdict()
    row.update(digest=receipt.digest, when=_utc(time.time()), segments=[
        segment._asdict() for segment in receipt.segments])
    _write_file(str(directory / _RECEIPT), 0o444, [json.dumps(row, default=sorted).encode()])
    _flush(directory)


def _journals(work: Path) -> List[Path]:
    """Those of the interrupted pulls in a directory of work; the first is further than the other."""
    return [*work.glob('earlier/journal'), *work.glob('journal')]


def _is_alive(work: Path) -> bool:
    """Whether the process that made this may still be at work."""
    host, pid, token, *end = work.name.split('@')[1:]
    if end:
        return False
    if os.name != 'posix' or host != _host():
        return time.time() - work.stat().st_mtime < _STALE
    if int(pid) == os.getpid():
        return token.startswith(_OURS)
    try:
        os.kill(int(pid), 0)
    except OSError as e:
        return e.errno != errno.ESRCH  # or it belongs to somebody else
    return True


def _host() -> str:
    """This machine and, on Linux, the container: where a process number means one process."""
    import socket
    words = socket.gethostname()
    with suppress(OSError):
        words += os.readlink('/proc/self/ns/pid')
        words += Path('/etc/machine-id').read_text()[:8]
    return re.sub('[^A-Za-z0-9]+', '-', words)


def _flush(directory: Path) -> None:
    """Let the disk hold what is written there, so that a power cut takes all or nothing."""
    if not hasattr(os, 'sync'):
        return
    try:
        import ctypes
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs  # Linux: only this file system
    except (ImportError, OSError, AttributeError):
        return os.sync()
    file = os.open(directory, os.O_RDONLY)
    code = syncfs(file) and ctypes.get_errno()
    os.close(file)
    if code in (errno.EIO, *_NoRoom.codes):
        raise OSError(code, os.strerror(code), directory)


def _make_movable(path: Path) -> None:
    """Let a read-only directory be renamed, which otherwise only root can."""
    with suppress(OSError):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o700)


def _check_room(directory: Path, size: int) -> None:
    """Raises _NoRoom if a disk has less room than that, as far as it says."""
    import shutil
    free = shutil.disk_usage(str(directory)).free
    if 0 < free < size:
        raise _NoRoom(f'{_size(size)} are to be written to {directory.parent}, but only {_size(free)} are free there',
                      "free some space, or set 'home' to a place that has more")


def _remove(path: Path) -> None:
    """Remove a file, link or tree, if it is there."""
    import shutil
    with suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    if path.is_dir() and not path.is_symlink():  # read-only directories, or on Windows files
        _make_movable(path)
        for top, directories, files in os.walk(path):
            for name in directories + (files if os.name == 'nt' else []):
                _make_movable(Path(top, name))
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------
# Stored archives
#
# An archive in a remote, bound to one version of an object. One with an index has known segments, any of which can be
# fetched and verified by itself. One that another tool made is pulled as a whole, and its digest is known afterwards.
# No directory is moved that is in its place already: a pull links what any installed dataset has (reuse() in Home), and
# a push lets S3 copy what other archives hold. Names prove nothing: all files are read, and must hash alike.
# ---------------------------------------------------------------------------------------

class _Archive:
    """segments: empty if another tool made the archive, until it has been extracted; nothing is known of them then."""
    def __init__(self, remote: _Remote,
                 obj: _Object, tail: bytes) -> None:
        self.remote = remote
        self.job = remote.job
        self.obj = obj
        self.tail = tail  # its last bytes
        self.label = f"'{obj.name}' in {remote.url}"
        with self.labelled():
            self.segments = _read_index(obj.size, self.read)

    @contextmanager
    def labelled(self) -> Iterator[None]:
        """Say in errors which archive it is that is damaged or unsafe."""
        try:
            yield
        except Corrupt as e:
            remedy = e.remedy or f"'etc push -f {self.obj.name}' from an intact copy repairs it"
            raise Corrupt(f'{self.label}: {e.message}', remedy) from e

    def read(self, start: int,
             stop: int) -> bytes:
        """Bytes of the archive. Those of the tail are here already."""
        skipped = start + len(self.tail) - self.obj.size
        if skipped < 0:
            return self.remote.read(self.obj, start, stop)
        return self.tail[skipped:][:stop - start]

    def read_ahead(self, spans: Sequence[Sequence[int]]
                   ) -> Generator[bytes, None, None]:
        """The bytes of some spans, in order, read over several connections at once; what is under way is bounded.
        Ranges grow while they come fast, or shrink: on a slow link, long ones tell little, and lose much at a break."""
        left = sum(stop - start for start, stop in spans)
        self.job.begin(left)
        begun = time.monotonic()
        connections = self.remote.connections
        active = min(_FEW_CONNECTIONS, connections)
        length = _MIN_RANGE  # of the next range
        ahead = 0  # bytes that are being read or wait to be yielded

        def ranges() -> Iterator[Sequence[int]]:
            nonlocal ahead, left
            for start, end in spans:
                while start < end:
                    # So that a slow range holds up few others, and all connections end together
                    fair = max(_FAIR_RANGE, min(left, _AHEAD // 3) // active)
                    step = min(length, fair, end - start)
                    left -= step
                    ahead += step
                    start += step
                    yield start - step, start

        def fetch(span: Sequence[int]) -> bytes:
            nonlocal active, length
            asked = self.job.answer.began = time.monotonic()
            data = self.read(*span)
            end = time.monotonic()
            came = self.job.answer.began
            fast = max(_FAST_RANGE, came - asked)
            growth = 2 * fast / max(0.01, end - came)
            length = max(_MIN_RANGE, int(len(data) * min(4, growth)))  # 4, as one may be fast by luck
            moved, passed = self.job.moved, end - begun
            if passed > _FAST_RANGE and moved < _FAST_LINK * passed:
                active = connections
            return data

        chunks = _ordered(self.job, connections, fetch, ranges(),
                          lambda running, _: running <= active and ahead < _AHEAD)
        with closing(chunks):
            for data in chunks:
                ahead -= len(data)
                yield data

    def is_same(self, local: Dataset) -> Optional[bool]:
        """Whether it holds a local dataset; None if only extracting it would tell."""
        if self.segments:
            return _dataset_digest(self.segments) == _dataset_digest(
                local._read(self.job))
        receipt = local._receipt
        return (receipt.source, receipt.version) == (
            self.remote.url, self.obj.version) or None

    def extract(self, place: _Place,
                wanted: Set[str]) -> Set[str]:
        """Fill a place with the segments that have these paths; return the paths of those that were here already."""
        place.new.mkdir()
        if not self.segments:
            whole = self.read_ahead([(0, self.obj.size)])
            with self.labelled(), closing(whole) as chunks:
                _extract_foreign(self.job, chunks, place.new)
            _validate(place.new, self.label)
            self.segments = _digest_segments(self.job, place.new)
            return set()
        # Not of the first, the files beside all directories, as they are few, and hard to tell from others there.
        lacking = _digests(segment for segment in self.segments[1:] if segment.path in wanted)
        reused = place.reuse(self.job, lacking)
        self.fetch(wanted - reused, place.work)
        _validate(place.new, self.label)
        return reused

    def fetch(self, paths: Set[str], work: Path) -> None:
        """Fetch segments, verify them and write them to work/new. What work/earlier has is not fetched again."""
        head = f'{self.label!a} {self.obj.version!a}'  # of any locale
        promised = {segment.path: segment
                    for segment in self.segments if segment.path in paths}

        def blocks() -> Generator[_Block, None, None]:
            lacking = dict(promised)
            with closing(_replay(self.job, work / 'earlier', head, promised)) as replayed:
                for block in replayed:
                    segment = lacking[block.path]
                    lacking[block.path] = segment._replace(
                        offset=segment.offset + block.length,
                        length=segment.length - block.length,
                        size=segment.size - block.size)
                    yield block
            _check_room(work, sum(segment.size for segment in lacking.values()))
            _remove(work / 'earlier/journal')  # all of it is in place
            rest = sorted(lacking.values(),  # what has begun goes on first
                          key=lambda segment: segment == promised[segment.path])
            spans = [[segment.offset, segment.stop] for segment in rest]
            for before, span in zip(spans, spans[1:]):
                if before[1] == span[0]:  # one request may read both
                    span[0] = before[1] = before[0]
            with closing(self.read_ahead(spans)) as chunks:
                yield from _inflate_blocks(self.job, chunks, rest)
        with self.labelled(), closing(blocks()) as found:
            _extract(found, promised, work / 'new', work / 'journal', head)


def _find(remote: _Remote, name: str) -> _Archive:
    obj, tail = remote.find(name)
    if obj:
        return _Archive(remote, obj, tail)
    remote.check()
    raise NotFound(f"no dataset '{name}' in {remote.url}", "'etc ls -r' lists what is there")


def _check_partitions(partitions: _Names) -> None:
    if isinstance(partitions, str) or partitions is not None and not partitions:
        raise ConfigError("'partitions' must be a list of one or more names")


def _paths_of(name: str, segments: _Segments,
              partitions: _Names) -> Set[str]:
    """The paths of the segments that make up some partitions: the root's files and their own. None means all."""
    _check_partitions(partitions)
    if partitions is None or not segments:  # if they are not known, all that is there
        return {segment.path for segment in segments}
    known = [segment.partition for segment in segments if segment.partition]
    for partition in partitions:
        if partition not in known:
            raise UnknownPartition(f"no partition '{_masked(partition)}' in {name}; it has: {', '.join(known)}")
    return {'.', *map('data/{}'.format, partitions)}


_MIN_SHARED = 32 << 20  # bytes of a dataset above which it pays to look for what other archives share with it
_MAX_SOURCES = 24  # archives that are looked at
_Source = Tuple[_Archive, _Segment]  # where a segment stands
_Copies = Dict[str, _Source]  # segments that S3 copies, by path


def _find_copies(remote: _Remote, name: str,
                 survey: _Survey) -> _Copies:
    """Segments that need not be sent: their files, which are read, and both ends of what is to be copied hash alike."""
    def look(obj: _Object) -> List[_Source]:
        with suppress(Error):
            archive = _find(remote, obj.name)
            return [(archive, segment) for segment in archive.segments
                    if segment._replace(offset=0, length=0, digest='') == survey.segments.get(segment.path)]
        return []

    def is_sound(source: _Source) -> bool:
        archive, segment = source
        digests = read[segment.path]
        with suppress(Error):
            first = archive.read(segment.offset, min(segment.offset + _LONGEST_BLOCK, segment.stop))
            last = archive.read(max(segment.stop - _LONGEST_BLOCK, segment.offset), segment.stop)
            return _end_digests(first, last) == [digests[:32], digests[-32:]]
        return False
    if survey.size < _MIN_SHARED or not remote.can_copy:
        return {}
    try:
        objects = [obj for obj in remote.list() if obj.size >= _MIN_PART]
    except Error as e:
        _say(f'nothing is copied: {e.message}', _DEBUG)
        return {}
    objects.sort(key=lambda obj: (obj.name == name, obj.modified))
    in_parallel = partial(_ordered, remote.job, remote.connections)
    held: List[_Source] = sum(in_parallel(look, objects[-_MAX_SOURCES:]), [])
    read = _hash(remote.job, survey.listing({segment.path for _, segment in held}))
    found: _Copies = {}
    replaced = []
    for archive, segment in held:
        if segment.digest == _digest(read[segment.path]):
            if archive.obj.name == name:
                replaced.append(archive)
            if segment.length >= _MIN_PART:
                found[segment.path] = archive, segment
    if len(survey.segments) == len(replaced) == len(replaced[0].segments):
        return {}  # as what is the same already may be damaged where nobody looks
    sound = list(in_parallel(is_sound, found.values()))  # to its end, which compress() does not ask for
    return dict(itertools.compress(found.items(), sound))


def _pack(job: _Job, local: Dataset, survey: _Survey, copies: _Copies, level: int, segments: List[_Segment]
          ) -> Generator[_Chunk, None, None]:
    """The archive of a dataset, whose segments are appended to those that are given."""
    lacking = survey.segments.keys() - copies.keys()
    with closing(_process(job, survey.listing(lacking), partial(_compress, level))) as blocks:
        packed = itertools.groupby(blocks, operator.attrgetter('path'))
        for path, segment in survey.segments.items():
            offset = segments[-1].stop if segments else 0
            if path in copies:
                archive, segment = copies[path]
                yield _Range(archive.obj, segment.offset, segment.stop)
            else:
                begin = job.produced
                digests = bytearray()
                for block in next(packed)[1]:
                    digests += block.digest
                    job.produced += len(block.payload)
                    job.packed += block.size
                    yield block.payload
                segment = segment._replace(length=job.produced - begin,
                                           digest=_digest(digests))
            segments.append(segment._replace(offset=offset))
    digest = _dataset_digest(segments)
    expected = _dataset_digest(local._segments or segments)
    if digest != expected:  # as of an installed dataset that somebody has changed
        raise Corrupt(f"the files of '{local.name}': expected digest {expected}, found {digest}",
                      f"'etc verify {local.name}' tells more")
    yield _archive_end(level, segments)


def _write_archive(remote: _Remote, local: Dataset,
                   exclusive: bool, level: int
                   ) -> Tuple[List[_Segment], _Copies]:
    """Pack a dataset into the remote, as write() does; return its segments, and those of them that were copied."""
    name = local.name
    survey = _Survey(local.root)
    survey.warn(name)
    if len(json.dumps(list(survey.segments))) + 200 * len(survey.segments) > _INDEX_LIMIT:
        raise InvalidDataset('it has too many partitions for one archive', 'gather them in fewer directories')
    copies = _find_copies(remote, name, survey)
    while True:
        segments: List[_Segment] = []
        doubt: Optional[Error] = None
        remote.job.begin(survey.size - sum(segment.size for _, segment in copies.values()))
        try:
            with closing(_pack(remote.job, local, survey, copies, level, segments)) as chunks:
                remote.write(name, chunks, survey.limit, exclusive)
        except _WriteAgain:
            continue
        except _Unconfirmed as e:
            doubt = e
        except RemoteError as e:
            if not copies or not e.status:
                raise
            _say(f'nothing is copied: {e.message}', _DEBUG)
            copies = {}
            continue
        if not copies and not doubt:
            return segments, copies
        end = _archive_end(level, segments)
        obj, tail = remote.find(name)
        if not obj or not tail.endswith(end[-_TAIL:]):
            if doubt:
                raise FileExistsError if obj and exclusive else doubt
            _say(f"'{name}' in {remote.url} was replaced meanwhile, or removed")
        elif obj.size != segments[-1].stop + len(end):
            _say(f'nothing is copied: {remote.url} does not do so rightly', _DEBUG)
            copies = {}
            exclusive = True  # as another push may have been faster
            try:
                remote.remove(obj)
                continue
            except RemoteError as e:
                raise Corrupt(f'what was copied is damaged, and cannot be removed: {e.message}',
                              f"'etc push -f {name}' replaces it") from None
        return segments, copies


# ---------------------------------------------------------------------------------------
# API
#
# What programs call, and what each command does. Every function takes its settings as `config`, and raises only Error.
# ---------------------------------------------------------------------------------------

_MaybeConfig = Optional[Config]  # None means Config.load()


def ls(remote: bool = False, config: _MaybeConfig = None, patterns: _Names = None) -> List[str]:
    """The names of the local datasets, or of those in the remote storage, sorted. Raises Error.

    patterns: only names that match one of these, as in a shell: *, ?, [seq], [!seq]. None means all."""
    if isinstance(patterns, str):
        raise ConfigError("'patterns' must be a list")
    return [row['name'] for row in _list(remote, config or Config.load(), patterns)]


def _list(remote: bool, config: Config, patterns: _Names, in_full: bool = False) -> List[_Row]:
    """As ls(); in full: with what `etc ls -l` shows."""
    def is_wanted(name: str) -> bool:
        from fnmatch import fnmatchcase
        with suppress(re.error):  # up to Python 3.11, from a range without characters, [z-a]
            return patterns is None or any(
                fnmatchcase(name, pattern) for pattern in patterns)
        return False

    def work(job: _Job) -> List[_Row]:
        def describe(obj: _Object) -> _Row:
            segments: _Segments = ()
            try:
                with _system_errors():
                    tail = store.tail(obj)
                    segments = _Archive(store, obj, tail).segments
            except Error as e:  # one that cannot be read must not hide the others
                _say(str(e), _WARNING)
            return _describe(obj, segments)

        if not remote:
            return [_describe(config.home / name) for name in filter(is_wanted, _names(config.home))]
        with _open_remote(config, job) as store:
            found = sorted(obj for obj in store.list() if is_wanted(obj.name))
            if not in_full:
                return list(map(_describe, found))
            return list(_ordered(job, config.connections, describe, found))
    return _perform(None, work)


def info(name: str, remote: bool = False, config: _MaybeConfig = None, progress: _Progress = None) -> _Row:
    """What is known of a dataset; of a remote one without downloading its data.

    Keys: name, digest, files, size (bytes), partitions ({name: {'files', 'size'}}), meta, readme; of a local dataset
    also root, source, when, partial; of a remote one archive_size (bytes) and when. Values that only a download would
    tell are None: in an archive that another tool made, and meta and readme if the top-level files are large.
    progress: as for verify(), if all files must be read, because nothing else knows a local dataset's digest.
    Raises NotFound and other Errors."""
    return _perform(progress, lambda job: _look(job, _Place(name, config), remote, True)[0])


def _look(job: _Job, place: _Place, remote: bool, in_full: bool) -> Tuple[_Row, _Segments]:
    """What info() tells, but meta and readme of a remote dataset only in full; and the segments."""
    if remote:
        with _open_remote(place.config, job) as store:
            archive = _find(store, place.name)
            segments = archive.segments
            row = _describe(archive.obj, segments)
            row.update(_read_root_files(archive) if in_full else {})
    else:
        segments = place.open()._read(job)
        row = _describe(place.path, segments)
        row.update(_read_about(place.path))
    place.check(segments)
    return row, segments


def _describe(item: Union[Path, _Object], segments: _Segments = ()) -> _Row:
    """What info() and _list() tell of what is in a directory or an object. segments: if there is no receipt."""
    row: _Row = dict.fromkeys('digest files size partitions meta readme'.split())
    here = segments
    if isinstance(item, _Object):
        row.update(name=item.name, archive_size=item.size, when=_utc(item.modified) if item.modified else None)
    else:
        receipt = _read_receipt(item)
        if receipt.name:
            segments, here = receipt.segments, receipt.here()
        row.update(name=item.name, root=os.path.realpath(item), source=receipt.source, when=receipt.when,
                   partial=receipt.is_partial)
    if segments:
        row.update(_total(*here))
        row['digest'] = _dataset_digest(segments)
        row['partitions'] = {segment.partition: _total(segment) for segment in here if segment.partition}
    return row


def _total(*segments: _Segment) -> _Row:
    return {key: sum(getattr(segment, key) for segment in segments) for key in ('files', 'size')}


def _read_root_files(archive: _Archive) -> _Row:
    """meta and readme of a remote dataset, unless they are in large files."""
    import tempfile
    for root in archive.segments[:1]:
        if max(root.length, root.size) <= _META_LIMIT + _README_LIMIT:
            with tempfile.TemporaryDirectory() as work:
                new = Path(work, 'new')
                new.mkdir()
                archive.fetch({'.'}, new.parent)
                return _read_about(new)
    return {}


def diff(a: str, b: str, remote: Union[bool, Tuple[bool, bool]] = False, config: _MaybeConfig = None,
         progress: _Progress = None) -> _Row:
    """How dataset `b` differs from dataset `a`, without downloading any data.

    a, b: NAME, or NAME@sha256:... to insist on these contents. Of a partial dataset, what is not installed counts, too.
    remote: whether they are in the remote storage: both, or a pair, such as (False, True) for `b` alone.
    progress: as for info(), for each of these readings.
    Keys: equal; a, b ({'name', 'remote', 'digest'}); segments ({path: {'status', 'a', 'b'}}), with the path '.' for the
    root's files, a directory, or data/<partition>, the status 'same', 'differs', 'new' (not in `a`) or 'gone' (not in
    `b`), a and b {'files', 'size'} or None. Raises NotFound, Corrupt if a digest is another one, and other Errors."""
    def work(job: _Job) -> _Row:
        remotes = (remote, remote) if isinstance(remote, bool) else remote
        found: _Row = {'segments': {}}
        known: Any = defaultdict(dict)  # segments by path and side
        for side, place, is_remote in zip('ab', (_Place(a, config), _Place(b, config)), remotes):
            row, segments = _look(job, place, is_remote, False)
            if not segments:
                raise Error(f"'{place.name}' was packed by another tool, and has no index to compare",
                            f"run 'etc pull {place.name}', and compare what that installs")
            found[side] = {'name': place.name, 'remote': is_remote, 'digest': row['digest']}
            for segment in segments:
                known[segment.path][side] = segment
        for path, sides in sorted(known.items()):
            one, other = map(sides.get, 'ab')
            status = 'new' if not one else 'gone' if not other else 'differs'
            if one and other and one.digest == other.digest:
                status = 'same'
            found['segments'][path] = {'status': status, 'a': one and _total(one), 'b': other and _total(other)}
        found['equal'] = found['a']['digest'] == found['b']['digest']
        return found
    return _perform(progress, work)


def dataset(name: str, auto_install: bool = False,
            partitions: _Names = None, config: _MaybeConfig = None,
            progress: _Progress = None,
            auto_pull: bool = False) -> Dataset:
    """The installed dataset `name`; with `auto_install`, it is pulled first if necessary.

    name: NAME, or NAME@sha256:... to insist on these contents. partitions: those that must be there; None means all.
    progress: as for pull(). auto_pull: the name of `auto_install` in etcetera 0.0.x. Raises NotFound, UnknownPartition,
    Corrupt if the digest is another one, and other Errors."""
    def work(job: _Job) -> Dataset:
        place = _Place(name, config)
        receipt = _read_receipt(place.path)
        missing = _paths_of(place.name, receipt.segments, partitions) - receipt.installed
        if (auto_install or auto_pull) and (missing or not _is_dataset(place.path)):
            return _pull(job, place, False, partitions)
        local = place.open()
        if place.pin:
            place.check(local._read(job))
        if missing:
            raise NotFound(f"'{place.name}' is only partly installed, without {', '.join(sorted(missing))}",
                           f"'etc pull {place.name}' fetches the rest")
        for partition in partitions or ():
            local[partition]  # raises UnknownPartition
        return local
    return _perform(progress, work)


def pull(name: str, force: bool = False,
         partitions: _Names = None, config: _MaybeConfig = None,
         progress: _Progress = None) -> Dataset:
    """Install a remote dataset, or some of its partitions, and return it; verified, or not at all.

    name: NAME, or NAME@sha256:... to insist on these contents.
    force: replace other contents of that name, and repair those that are the same.
    progress: is called with (done, total), bytes that are to be moved, in the thread that called pull(), ten times a
        second; what it raises ends the pull.
    Directories that are installed already, in whatever dataset, are not fetched again.
    Raises NotFound, Exists, UnknownPartition, Corrupt, RemoteError and other Errors."""
    return _perform(progress, lambda job: _pull(job, _Place(name, config), force, partitions))


def _pull(job: _Job, place: _Place, force: bool, partitions: _Names) -> Dataset:
    with _open_remote(place.config, job) as store, place.lock(job):
        archive = _find(store, place.name)
        if archive.segments:
            place.check(archive.segments)
        wanted = _paths_of(place.name, archive.segments, partitions)
        receipt = _read_receipt(place.path)

        def receipt_of(paths: Iterable[str]) -> _Receipt:
            return _Receipt(place.name, archive.segments, frozenset(paths), store.url, archive.obj.version)

        is_same: Optional[bool] = False
        if not force and _is_dataset(place.path):
            local = place.open()
            is_same = archive.is_same(local)
            if is_same is False:
                raise place.taken_error()
            if is_same and (not receipt.name or wanted <= receipt.installed):
                place.check(local._read(job))
                is_old = (place.root / '.etcetera/receipts').exists()  # as 1.0 kept them elsewhere
                if is_old and not receipt.name and not place.path.is_symlink():
                    with suppress(OSError):  # as in a store that can only be read
                        _write_receipt(place.path, receipt_of(_digests(archive.segments)))
                _say(f"'{place.name}' is installed already; 'etc verify {place.name}' reads it again")
                return local
        if receipt.digest == _dataset_digest(archive.segments):
            wanted |= receipt.installed
        with place.installing():
            reused = archive.extract(place, wanted)
            place.check(archive.segments)
            new = receipt_of(wanted or _digests(archive.segments))
            place.commit(force or bool(is_same), new)
        is_other = receipt.name and receipt.digest != new.digest
        old = f"; it replaces another one with {', '.join(sorted(receipt.installed))}" if is_other else ''
        _say(f'pulled {place.name} to {place.path}: {_tally(place, new.here(), reused)}{old}')
        return place.open()


def _tally(place: _Place, segments: _Segments, reused: Container[str] = ()) -> str:
    """How much was done, how long it took, and how much was in its place already: the segments with these paths."""
    had = sum(
        segment.size for segment in segments if segment.path in reused)
    total = _total(*segments)
    seconds = time.monotonic() - place.started or 0.001  # where the clock is coarse
    more = f'; {_size(had)} were there already' if had else f" ({_size(total['size'] / seconds)}/s)"
    return f'{_amount(total)} in {seconds:,.2f} s{more}'


def _amount(counted: Optional[_Row]) -> str:
    """Of what _total() has counted, if it is known."""
    if not counted or counted['files'] is None:
        return '-'
    return f"{counted['files']:,} file{'s' * (counted['files'] != 1)}, {_size(counted['size'])}"


def push(name: str, force: bool = False, config: _MaybeConfig = None, progress: _Progress = None) -> str:
    """Share a local dataset. Returns its digest.

    name: NAME, or NAME@sha256:... to insist on these contents.
    force: replace other contents of that name in the remote storage.
    progress: as for pull(), but of the bytes of the files whose part of the archive has been sent.
    Raises NotFound, Exists, InvalidDataset, Corrupt, RemoteError and other Errors."""
    def work(job: _Job) -> str:
        place = _Place(name, config)
        local = place.open()
        if local._receipt.is_partial:
            raise InvalidDataset(f"'{local.name}' is only partly installed, so it cannot be pushed",
                                 f"'etc pull {local.name}' fetches the rest")
        if place.pin:
            place.check(local._read(job))
        with _open_remote(place.config, job) as store:
            if not force and _is_stored(store, local):
                return local.digest
            try:
                segments, copies = _write_archive(
                    store, local, not force, place.config.compression_level)
            except FileExistsError:
                if _is_stored(store, local):
                    return local.digest
                raise Exists(f"'{local.name}' is being pushed, or these credentials cannot read it to compare",
                             'try again later, or push it under another name') from None
        _say(f'pushed {local.name} to {store.url}: {_tally(place, segments, copies)}')
        return _dataset_digest(segments)
    return _perform(progress, work)


def _is_stored(store: _Remote, local: Dataset) -> bool:
    """Whether the remote has this very dataset. Raises Exists if it has another one of that name."""
    try:
        archive = _find(store, local.name)
    except NotFound:
        return False
    except RemoteError as e:
        if e.status != 403 or not store.has_exclusive_write:
            raise
        return False  # the condition of the write decides
    if not archive.is_same(local):
        raise Exists(f"another '{local.name}' is in {store.url} already",
                     f"push it under another name, or 'etc push -f {local.name}' replaces it")
    _say(f"'{local.name}' is in {store.url} already, and identical")
    return True


def register(directory: _Path, name: _MaybeText = None,
             force: bool = False, copy: bool = False,
             config: _MaybeConfig = None,
             progress: _Progress = None) -> Dataset:
    """Give a directory a dataset's name, by default its own. It stays where it is, and must not change any more.

    copy: install a private read-only copy instead of a link. force: replace a local dataset of that name.
    progress: as for pull(), but of the bytes of the files that have been copied.
    Raises InvalidDataset, Exists and other Errors."""
    def work(job: _Job) -> Dataset:
        root = Path(os.path.realpath(_check_path(directory)))
        _validate(root)  # first, or a part of a URL might be taken for a name, and shown
        place = _Place(root.name if name is None else name, config)
        if place.pin:
            place.check(_digest_segments(job, root))
        installed = Path(os.path.realpath(place.path))
        if installed in (root, *root.parents) and not (copy or place.path.is_symlink()):
            raise InvalidDataset(f"{root} is what is installed as '{place.name}'", 'use --copy, or another directory')
        replace = force or installed == root and not copy
        if _is_dataset(place.path) and not replace:
            raise place.taken_error()
        receipt = _NO_RECEIPT
        with place.installing():
            if copy:  # as if it had been pushed and pulled
                survey = _Survey(root)
                job.begin(survey.size)
                _check_room(place.work, survey.size)
                place.new.mkdir()
                with closing(_process(job, survey.listing(survey.segments), bytes, is_all=True)) as blocks:
                    segments = _extract(blocks, {}, place.new)
                receipt = _Receipt(place.name, segments, frozenset(survey.segments), root.as_uri())
            else:
                _symlink(root, place.new)
            place.commit(replace, receipt)
        _say(f"{'copied' if copy else 'registered'} '{place.name}': {root}")
        with suppress(InvalidDataset, OSError):  # which a push will tell
            if not copy:
                _Survey(root).warn(place.name)
        return place.open()
    return _perform(progress, work)


def create(name: str, partitions: Sequence[str] = ('train', 'test'), force: bool = False,
           config: _MaybeConfig = None) -> Dataset:
    """Make a local dataset with empty partitions, to be filled. Raises InvalidDataset, Exists and other Errors."""
    def work(job: _Job) -> Dataset:
        _check_partitions(partitions or ())
        place = _Place(name, config)
        for partition in partitions:
            if not _is_safe(partition) or re.search('[/\ud800-\udfff]', partition):  # UTF-8 cannot encode these halves
                raise InvalidDataset(f"'{_masked(partition)}' cannot be a partition's name", 'it becomes a directory')
        with place.installing():
            for partition in set(partitions):
                os.makedirs(_join(place.new, f'data/{partition}'))
            place.check(_digest_segments(job, place.new))
            place.commit(force)
        _say(f"created '{place.name}'; now fill {place.path / 'data'}")
        return place.open()
    return _perform(None, work)


def verify(name: str, config: _MaybeConfig = None, progress: _Progress = None) -> str:
    """Read all files of a local dataset and return their digest.

    Raises Corrupt if they are not what was pulled or copied, or not what NAME@sha256:... insists on. A registered or
    created dataset has nothing to be compared with.
    progress: as for pull(), but of the bytes of the files that have been read."""
    def work(job: _Job) -> str:
        place = _Place(name, config)
        receipt = place.open()._receipt
        found = _digest_segments(job, place.path)
        wrong = dict(_digests(receipt.here() or found).items() ^ _digests(found).items())
        if wrong:
            remedy = f"'etc pull -f {place.name}' repairs it" if receipt.version else 'register it again'
            raise Corrupt(f"'{place.name}' is not what was installed: {', '.join(sorted(wrong))}",
                          f'{remedy}, unless this disk keeps no executable bits')
        whole = receipt.segments or found
        place.check(whole)
        digest = _dataset_digest(whole)
        outcome = 'unchanged' if receipt.name or place.pin else 'nothing known to compare it with'
        _say(f'verified {place.name}@{digest}: {outcome}; {_tally(place, found)}')
        return digest
    return _perform(progress, work)


def purge(name: str, config: _MaybeConfig = None, *, remote: bool = False) -> None:
    """Remove a local dataset, or, without asking, one in the remote storage. A registered directory is not touched.

    name: NAME, or NAME@sha256:... to insist on these contents.
    remote: by keyword only, so that no call that was meant for the local store can reach what others share.
    Raises NotFound, Corrupt, RemoteError if it was replaced meanwhile, and other Errors."""
    if remote:
        return _purge_remote(_Place(name, config))

    def work(job: _Job) -> None:
        place = _Place(name, config)
        with place.lock(job), place.installing():
            if place.pin or not _is_dataset(place.path):
                segments = place.open()._read(job)
                place.check(segments)
            place.vacate('new')
            place.forget()
        _say(f"purged '{place.name}'")
    _perform(None, work)


def _purge_remote(place: _Place, confirm: Callable[..., Any] = bool) -> None:
    """Remove the version of a remote dataset that is there now, unless confirm(description of it) raises an Error."""
    def find(job: _Job) -> Tuple[_Object, str]:
        with _open_remote(place.config, job) as store:
            obj = (store.stat(place.name)  # which finds damaged archives and archived ones, too
                   or _find(store, place.name).obj)
            if place.pin:
                archive = _find(store, place.name)
                place.check(archive.segments)
            return obj, store.url

    def remove(job: _Job) -> None:
        with _open_remote(place.config, job) as store:
            store.remove(obj)
    obj, url = _perform(None, find)
    confirm(f"'{place.name}' ({_size(obj.size)}) in {url}")
    _perform(None, remove)
    _say(f"purged '{place.name}' from {url}")


# ---------------------------------------------------------------------------------------
# Command line
#
# Each command calls one function of the API, and prints what that returns. Parser and help are made from _COMMANDS.
# ---------------------------------------------------------------------------------------

def _print(*lines: str) -> None:
    """To stdout, whatever its encoding."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, 'it is closed')
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    for line in lines:
        escaped = _printable(line).encode(encoding, 'backslashreplace')
        print(escaped.decode(encoding), flush=True)


def _output(found: object, as_json: bool, rows: Sequence[Sequence[str]]) -> None:
    """Print what was found: as JSON, or in columns."""
    if as_json:
        text = json.dumps(found, indent=1)
        return _print(*text.splitlines())
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = map(str.ljust, row, widths)
        _print('  '.join(cells).rstrip())


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, 'isatty', bool)())  # None has none, nor what some notebooks put in its place


def _meter(what: str) -> _Progress:
    """Shows on the terminal how far a piece of work is; None where that would disturb."""
    is_dumb = os.environ.get('TERM') == 'dumb'
    is_quiet = _console.level == _WARNING
    if is_dumb or is_quiet or not _is_terminal(sys.stderr):
        return None
    if os.name == 'nt':
        os.system('')  # lets the console understand escape sequences
    begin = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal begin
        if not done:  # a piece of the work begins
            begin = time.monotonic()
        seconds = time.monotonic() - begin
        line = f'{what}  {100 * done // total}%  {_size(done)} of {_size(total)}'
        if done and seconds > 2:  # enough to tell how long the rest will take
            line += f'  {(total - done) * seconds / done:,.0f} s left  {_size(done / seconds)}/s'
        columns = 80
        with suppress(OSError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or columns
        if done < total:  # afterwards, a message tells of the end
            _console.show_progress(line[:columns - 1])
    return show


def _ls(*patterns: str, config: Config, remote: bool = False, long: bool = False, json: bool = False) -> None:
    in_full = long or json
    found = _list(remote, config, patterns or None, in_full)
    shown = 4 if in_full else 1
    rows = [(row['name'], _amount(row), row['when'] or '-', row['digest'] or row.get('root') or '-')[:shown]
            for row in found]
    _output(found, json, rows)
    if not found:
        where = 'in the remote storage' if remote else 'here'
        if patterns:
            raise NotFound(f'no dataset {where} matches', 'without a pattern, all are listed')
        _say(f'there is no dataset {where}')


def _info(name: str, **options: Any) -> None:
    as_json = options.pop('json', False)
    found = info(name, **options)
    shown = {'name': found['name'],
             'digest': found['digest'] or '- (packed by another tool; pull it to learn more)',
             'size': f"{_amount(found)}{' (partly installed)' * bool(found.get('partial'))}",
             'archive': 'archive_size' in found and _size(found['archive_size']),
             'root': found.get('root'), 'from': found.get('source'), 'when': found['when']}
    partitions = found['partitions'] or {}
    for partition, counted in partitions.items():
        shown[f'data/{partition}'] = _amount(counted)
    shown['meta'] = found['meta'] and json.dumps(found['meta'], ensure_ascii=False)
    _output(found, as_json, [row for row in shown.items() if row[1]])
    if found['readme'] and not as_json:
        lines = found['readme'].splitlines()
        _print('', *map(str.expandtabs, lines))


class _RemoteName(str):
    """A name of `etc diff` that -r precedes."""


def _diff(a: str, b: str, json: bool = False, **options: Any) -> Any:
    """Whether they are the same."""
    found = diff(a, b, (isinstance(a, _RemoteName), isinstance(b, _RemoteName)), **options)
    rows = found['segments'].items()
    _output(found, json, [(row['status'], _amount(row['a']), _amount(row['b']), path) for path, row in rows])
    return found['equal']


def _create(name: str, *partitions: str, **options: Any) -> None:
    if partitions:
        options['partitions'] = list(map(_text, partitions))
    create(name, **options)


def _text(word: str) -> str:
    """A word in UTF-8, even where the locale has another encoding."""
    return os.fsencode(word).decode('utf-8', 'surrogateescape')


def _purge(name: str, config: Config, remote: bool = False, force: bool = False) -> None:
    def confirm(what: str) -> None:
        if not (_is_terminal(sys.stdin) and _is_terminal(sys.stderr)):
            _fail('etc purge', "without a terminal to ask on, 'etc purge -r' needs -f")
        _console.write(f'etc: remove {what}? [y/N] ')
        answer = sys.stdin.buffer.readline()  # of any encoding
        if not re.match(rb'(?i)\s*y(es)?\s*\Z', answer):
            raise Error(f'{what} stays')
    if remote and not force:
        _purge_remote(_Place(name, config), confirm)
    else:
        purge(name, config, remote=remote)


_FLAGS = '''
[-f]            -f --force      replace what has that name; with purge -r: do not ask
[--copy]        --copy          install a read-only copy instead of a link
[-r]            -r --remote     in the remote storage
[-r NAME]       -r --remote     a remote dataset in place of A or B, for which nothing but its index is read
[-l]            -l --long       with files, size, when and digest
[--json]        --json          as JSON
[-p PARTITION]  -p --partition  only this partition (can be repeated)
[--version]     --version       show the versions of etcetera and Python, and what compresses
[--config FILE] --config        settings file, instead of $ETC_CONFIG or ~/.etc.yaml
[--url URL]     --url           where datasets are shared, instead of $ETC_URL or the settings
[--home DIR]    --home          local store, instead of $ETC_HOME, the settings or ~/.etc
[-q]            -q --quiet      no messages but errors
[-v]            -v --verbose    show more, with a traceback of an error'''
_ARGUMENTS: Dict[str, Any] = {  # what argparse must know of flags with these values, or none
    '': {'action': 'store_true'},
    'PARTITION': {'metavar': 'PARTITION', 'action': 'append', 'dest': 'partitions', 'type': _text},
    'NAME': {'metavar': 'NAME', 'action': 'append', 'dest': 'words', 'nargs': 1, 'type': _RemoteName}}

# What runs with the words, `config` and flags (False: exit status 1); usage (NAME...: runs once for each); help
_COMMANDS: Dict[str, Any] = {
    'register': (register, 'DIR [NAME] [-f] [--copy]', """Give a directory a name
  etc register ./digits MNIST         it stays where it is"""),
    'push': (push, 'NAME... [-f]', """Share local datasets
  etc push MNIST                      what others are to pull"""),
    'ls': (_ls, '[PATTERN...] [-r] [-l] [--json]', """List datasets
  etc ls -r                           what is shared
  etc ls -r 'MNIST*'                  whose names match, with *, ? and [...]"""),
    'pull': (pull, 'NAME... [-f] [-p PARTITION]', """Install remote datasets
  etc pull MNIST -p test              only one partition; the rest may follow later
  etc pull MNIST@sha256:...           insist on these contents"""),
    'info': (_info, 'NAME [-r] [--json]', """Show what is known of a dataset
  etc info -r MNIST                   of a remote one, without downloading its data"""),
    'diff': (_diff, 'A B [-r NAME] [--json]', """Show what of a dataset is the same, differs, is new or gone
  etc diff MNIST -r MNIST             what is here, and what is shared"""),
    'verify': (verify, 'NAME...', """Read all files again and compare them with the digest
  etc verify MNIST@sha256:...         with this digest"""),
    'create': (_create, 'NAME [PARTITION...] [-f]', """Make an empty dataset to fill
  etc create MNIST                    with the partitions train and test"""),
    'purge': (_purge, 'NAME... [-r] [-f]', """Remove local datasets, or with -r remote ones
  etc purge MNIST                     a registered directory itself is not touched
  etc purge -r MNIST                  from the remote storage, after a question""")}

_NOTES = """Set where datasets are shared with a line 'url: s3://my-bucket' in ~/.etc.yaml, or with $ETC_URL.
For help on a command, run 'etc pull -h'. ('etc' is what pip installs; 'python3 etcetera.py' is the same.)

exit status: 0; 1 after an error, or if diff finds a difference; 2 after wrong usage; 130 after Ctrl-C,
143 after SIGTERM, 129 after SIGHUP"""


def _parser(argv: Sequence[str] = ()) -> Any:
    """The parser of a command line: of all commands, unless it begins with one, since to make all takes its time."""
    from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
    new_parser: Any = partial(
        ArgumentParser, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    parser = new_parser('etc', description='Share immutable datasets through cloud storage.', epilog=_NOTES)
    _add_flags(parser, '[--version] COMMAND')
    commands = parser.add_subparsers(prog='etc', parser_class=new_parser, dest='command', metavar='COMMAND')
    for name in _COMMANDS.keys() & argv[:1] or _COMMANDS:
        _, usage, text = _COMMANDS[name]
        command = commands.add_parser(name, description=text, help=text.split('\n')[0])
        command.add_argument(
            'words', nargs='*', action='append', help=SUPPRESS)
        _add_flags(command, usage)
    return parser


def _add_flags(parser: Any, usage: str) -> None:  # the common ones may precede a command or follow it
    parser.error = partial(_fail, parser.prog)
    parser.usage = f'{parser.prog} {usage} [--config FILE] [--url URL] [--home DIR] [-q] [-v]'
    rows = re.findall(r'(\[\S+ ?(.*?)\]) +(.*?)  +(.*)', _FLAGS)
    for shown, value, names, what in rows:
        if shown in parser.usage:
            parser.add_argument(*names.split(), help=what, **_ARGUMENTS.get(value, {'metavar': value}))


def _fail(prog: str, message: str) -> None:
    """Wrong usage."""
    _console.show(f"{_masked(message)}; '{prog} -h' shows how")
    sys.exit(2)


def _run(argv: Sequence[str]) -> int:
    """Run one command, for each dataset that it names, and return the exit status. SystemExit after wrong usage."""
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    options = vars(args)
    version, name, groups, path, url, home, quiet, verbose = (
        options.pop(key, None)
        for key in 'version command words config url home quiet verbose'.split())
    if version:
        deflater = 'libdeflate' if _libdeflate() else f'zlib {zlib.ZLIB_RUNTIME_VERSION}'
        _print(f'etcetera {__version__} (Python {sys.version.split()[0]}, {deflater})')
        return 0
    if not name:
        parser.print_help(sys.stderr)
        return 2
    run, usage, _ = _COMMANDS[name]
    words: List[str] = sum(groups or [], [])
    more = options.get('partitions', words)  # as in `etc pull NAME -p ONE TWO`
    more.extend(map(_text, rest))
    if name == 'register' and words[1:2] == ['as']:
        del words[1]
    places = usage.partition(' [-')[0].split()
    least = sum('[' not in place for place in places)
    most = len(words if '...' in usage else places)
    if any(word.startswith('-') for word in rest) or not least <= len(words) <= most:
        _fail(f'etc {name}', f'usage: etc {name} {usage}')
    _console.level = _DEBUG if verbose else _WARNING if quiet else _INFO
    config: _MaybeConfig = None
    status = 0
    for each in ([[word] for word in words] if places == ['NAME...'] else [words]):
        if name not in ('ls', 'create', 'purge'):
            what = ' '.join([name, *each])
            options['progress'] = _meter(what)
        try:
            config = config or Config.load(path, url=url, home=home)
            status |= run(*each, config=config, **options) is False
        except Error as e:
            if verbose:
                import traceback
                for line in traceback.format_exc().splitlines():
                    _console.write(f'{_printable(line)}\n')
            _console.show(str(e))
            status = 1
            if not config:
                break
    return status


def main(argv: _Names = None) -> int:
    """The command `etc`. Returns its exit status.

    0; 1 for an error; 2 for wrong usage; 128 and the number of the signal that ended it, such as 130 for Ctrl-C."""
    import signal
    if '_ARGCOMPLETE' in os.environ:
        from importlib import import_module  # so that no type checker looks for it
        import_module('argcomplete').autocomplete(_parser())
    usual = (signal.SIG_DFL, signal.default_int_handler)
    handled: Dict[int, Any] = {}  # signals that are neither ignored, as by nohup, nor handled by a program around us

    def end(number: int, _: Any) -> None:  # as Ctrl-C does, so that nothing is left behind that is billed
        for other in set(handled) - {signal.SIGINT}:  # a terminal that closes may send several
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    try:
        try:
            with suppress(ValueError):  # only the main thread may do so; and Windows has no SIGHUP
                for number in signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM):
                    if signal.getsignal(number) in usual:
                        handled[number] = signal.signal(number, end)
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            for number, handler in handled.items():
                if argv is None:  # the program ends now, and a signal should not show a traceback
                    handler = signal.SIG_DFL
                signal.signal(number, handler)
            _console.show_progress('')
            _console.level = None
    except OSError as e:  # stdout cannot be written to
        if not isinstance(e, BrokenPipeError):  # as in `etc ls | head -1`
            _console.show(f'cannot write to standard output: {e.strerror}')
        if sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as e:
        _console.show('interrupted; run the same command again: a pull goes on, a push begins anew')
        number, = e.args or [2]
        return 128 + number


if __name__ == '__main__':
    _console.program = 'python3 -m etcetera' if __spec__ else f'python3 {sys.argv[0]}'
    sys.exit(main())
