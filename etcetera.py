#!/usr/bin/env python3
"""etcetera: a team shares immutable datasets through cloud storage, with one file.

    etc register ./digits MNIST     give a directory a name
    etc push MNIST                  share it
    etc pull MNIST                  get it, on any other machine

    import etcetera as etc
    ds = etc.dataset('MNIST', auto_install=True)
    sorted(ds['train'].iterdir())

A dataset is a directory: data/<partition>/..., and if you like meta.json, README.md,
assets/ and more. Local ones live in ~/.etc, remote ones are .tgz objects in S3,
Google Cloud Storage, a shared directory or on a web server, settings live in ~/.etc.yaml.
Nothing but the standard library of Python 3.6 or later is needed. `README.md` has the reference and the archive format.
"""

import collections
import contextlib
import errno
import functools
import itertools
import json
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

__version__ = '1.0.0'
__all__ = ['Config', 'Dataset', 'create', 'dataset', 'info', 'ls', 'pull', 'purge', 'push', 'register', 'verify',
           'Error', 'ConfigError', 'InvalidDataset', 'NotFound', 'Exists', 'Corrupt', 'RemoteError',
           'UnknownPartition']

_Path = Union[str, 'os.PathLike[str]']


# ---------------------------------------------------------------------------------------
# Errors, and all that is said to people
# ---------------------------------------------------------------------------------------

class Error(Exception):
    """What a user can cause or meet; `str()` is one line that says what to do next."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError, in UnknownPartition, would show its repr


class ConfigError(Error):
    """A setting, flag or argument is missing or wrong."""


class InvalidDataset(Error):
    """A directory or a name that cannot be a dataset's."""


class NotFound(Error):
    """No dataset of that name."""


class Exists(Error):
    """Other contents stand under that name already, and `force` was not given."""


class Corrupt(Error):
    """The bytes are not those that were published."""


class RemoteError(Error):
    """The storage could not be reached, or refused. `status` is its HTTP status, or 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class UnknownPartition(Error, KeyError):
    """The dataset has no partition of that name."""


class _FromCaller(BaseException):
    """Carries what a caller's own function raised past all handlers that are not meant for it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_F = TypeVar('_F', bound=Callable[..., Any])


def _public(function: _F) -> _F:
    """Let out an Error where the system refuses something, and what a caller's function raised as it is."""
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except OSError as e:
            where = ''
            if e.filename is not None:
                e.filename, e.filename2 = _existing(str(e.filename)), None  # its traceback shows them, too
                where = ': %s' % e.filename
            raise Error('%s%s' % (e.strerror or e, where)) from e
        except MemoryError as e:
            raise Error("there is not enough memory; set 'connections: 1', or raise the limit (ulimit -v)") from e
        except _FromCaller as e:
            error = e.error
        raise error
    return wrapper  # type: ignore[return-value]


def _check_path(path: _Path) -> str:
    """The path as text; Error if no file can have it here."""
    text = os.fspath(path)
    if '\0' in text:
        raise Error('what holds a NUL cannot be a path; check what was given')
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise Error("the path '%s' cannot be written in this locale; set LC_ALL=C.UTF-8" % _masked(text)) from None
    return text


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    import difflib
    spelled = {item.lower(): item for item in known}
    close = difflib.get_close_matches(word.lower(), spelled, 1)
    return "; did you mean '%s'?" % spelled[close[0]] if close else ''


def _printable(text: str) -> str:
    """`text` on one line, without what could steer a terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


# What may be shown of what people set and type. Keys get into places that were made for something else: so what a
# setting or variable holds is only shown where it has the form that it must have, or else its name; a URL is shown
# without user, password and query; and of a path only as much as exists.

def _masked(text: str) -> str:
    """A URL, or a word that may hold one; a password may have any characters, also / ? # and @."""
    text = re.sub(r'\A([^:]*:(?://)?)(?:.*[?#].*@.*|.*(?=@))', r'\1***', text, flags=re.S)
    return _printable(re.sub(r'([?#]).+', r'\1***', text, flags=re.S))


def _existing(path: str) -> str:
    known = path
    while known != os.path.dirname(known) and not os.path.lexists(known):
        known = os.path.dirname(known)
    return path if known == path else os.path.join(known, '...')


def _encodable(text: str, stream: Any) -> str:
    encoding = getattr(stream, 'encoding', None) or 'utf-8'
    return text.encode(encoding, 'backslashreplace').decode(encoding)


def _size(count: Optional[float]) -> str:
    """Bytes for people, in powers of 1000."""
    if count is None:
        return '-'
    value, units = float(count), ['B', 'kB', 'MB', 'GB', 'TB', 'PB']
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return '%.3g %s' % (value, units[0])


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return '%.2g s' % seconds
    minutes, seconds = divmod(round(seconds), 60)
    return '%d:%02d min' % (minutes, seconds) if minutes < 60 else '%d:%02d h' % divmod(minutes, 60)


_line = ''  # what the last line of the terminal shows, until something else is to be said there


def _show(line: str) -> None:
    """Let `line` be the last on the terminal, for now; the cursor stays at its start, also where it is folded."""
    global _line
    if line != _line:
        _line = line
        with contextlib.suppress(OSError):
            sys.stderr.write('\r\033[J%s\r' % _encodable(line, sys.stderr))  # erase to the end of the screen
            sys.stderr.flush()


def _complain(message: object) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            _show('')
            print('etc: ' + _encodable(_printable(str(message)), sys.stderr), file=sys.stderr)


_DEBUG, _INFO, _WARNING = 10, 20, 30  # as in logging, which is slow to import
_spoken = None  # type: Optional[int]  # while main() runs: the level from which it prints what is logged otherwise


def _say(message: str, *args: Any, level: int = _INFO) -> None:
    if _spoken is None:
        import logging
        logging.getLogger('etcetera').log(level, message, *args)
    elif level >= _spoken:
        _complain(message % args)


# ---------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------

_SETTINGS = {
    'url': str, 'home': str, 'public': bool, 'aws_access_key_id': str, 'aws_secret_access_key': str,
    'aws_session_token': str, 'aws_profile': str, 'region': str, 'endpoint_url': str, 'request_payer': str,
    'storage_class': str, 'sse': str, 'sse_kms_key_id': str, 'google_credentials': str, 'ca_bundle': str,
    'connections': int, 'compression_level': int,
}  # type: Dict[str, type]
_SECRETS = ('aws_secret_access_key', 'aws_session_token')
_LEVEL = 6  # of compression, if none is set
_LIMITS = {'connections': (1, 256), 'compression_level': (0, 9)}

# YAML 1.1 as PyYAML resolves plain scalars: https://yaml.org/type/{bool,int,null,float,timestamp}.html
_YAML_BOOL = r'(?:(yes|Yes|YES|true|True|TRUE|on|On|ON)|no|No|NO|false|False|FALSE|off|Off|OFF)\Z'
_YAML_NULL = r'(?:~|null|Null|NULL|)\Z'
_YAML_INT = r'[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)\Z'
_YAML_OTHER = (r'(?:[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?'   # sexagesimal
               r'|[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?'
               r'|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)'
               r'|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt ].*)?|[<=]+)\Z')
_YAML_FORBIDDEN = (  # and U+2028 and U+2029, which YAML 1.1 takes for line ends
    '[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]')
_YAML_ESCAPES = {'0': '\0', 'a': '\a', 'b': '\b', 't': '\t', 'n': '\n', 'v': '\v', 'f': '\f', 'r': '\r', 'e': '\x1b',
                 ' ': ' ', '"': '"', '\\': '\\', '/': '/', 'N': '\x85', '_': '\xa0', 'L': '\u2028', 'P': '\u2029'}
_YAML_ESCAPE = r'\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))'


class _YamlError(ValueError):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _parse_yaml(text: str) -> Dict[str, Tuple[Any, int]]:
    """Read a flat map of scalars and their lines, meaning what PyYAML would; refuse everything else."""
    found = {}  # type: Dict[str, Tuple[Any, int]]
    started = False
    for number, line in enumerate(re.split('\r\n|\n|\r', text), 1):
        if re.search(_YAML_FORBIDDEN, line):
            raise _YamlError(number, 'a character that YAML does not allow here; remove it')
        if line.rstrip(' ') == '---' and not started:
            started = True
            continue
        if re.match(r' *(#|\Z)', line):
            continue
        started = True
        match = re.match(r'''([A-Za-z_][\w-]*|"[\w-]+"|'[\w-]+') *:(?: +(.*)|\Z)''', line, re.ASCII)
        if not match:
            raise _YamlError(number, "not of the form 'key: value' (lists, nesting and indentation are not supported)")
        key = match.group(1)
        if key[0] in '"\'':
            key = key[1:-1]
        elif not isinstance(_yaml_plain(key, number), str):
            raise _YamlError(number, "'%s' cannot be a key" % key)
        if key in found:
            raise _YamlError(number, "'%s' is set a second time; remove one of the two" % key)
        found[key] = _yaml_scalar(match.group(2) or '', number), number
    return found


def _yaml_scalar(text: str, line: int) -> Any:
    """The value of what follows `key: ` on its line."""
    if text[:1] in ('"', "'"):
        pattern = r'"((?:[^"\\]|\\.)*)"' if text[0] == '"' else r"'((?:[^']|'')*)'"
        match = re.match(pattern + r' *(?: #.*)?\Z', text)
        if not match:
            raise _YamlError(line, 'a quoted value must end on its line, and only a comment may follow')
        if text[0] == "'":
            return match.group(1).replace("''", "'")
        return re.sub(_YAML_ESCAPE, functools.partial(_yaml_escape, line), match.group(1))
    if text.startswith('#'):
        return None
    plain = re.split(' +#', text, maxsplit=1)[0].rstrip(' ')
    if '\t' in plain or plain[:1] in set('?:,[]{}&*!|>%@`') or ': ' in plain or plain[-1:] == ':':
        raise _YamlError(line, 'this value is beyond the YAML that etcetera reads; put it in double quotes')
    return _yaml_plain(plain, line)


def _yaml_escape(line: int, match: Any) -> str:
    digits = match.group(1) or match.group(2) or match.group(3)
    if digits:
        code = int(digits, 16)
        if code > 0x10ffff or 0xd800 <= code < 0xe000:
            raise _YamlError(line, '%s is no character' % match.group())
        return chr(code)
    if match.group(4) not in _YAML_ESCAPES:
        raise _YamlError(line, "unknown escape '%s'; in double quotes a backslash is written \\\\" % match.group())
    return _YAML_ESCAPES[match.group(4)]


def _yaml_plain(text: str, line: int) -> Any:
    match = re.match(_YAML_BOOL, text)
    if match:
        return bool(match.group(1))
    if re.match(_YAML_NULL, text):
        return None
    if re.match(_YAML_INT, text):
        digits = text.replace('_', '')
        sign, digits = (-1 if digits[0] == '-' else 1), digits.lstrip('+-')
        base = 2 if digits[:2] == '0b' else 16 if digits[:2] == '0x' else 8 if digits[0] == '0' else 10
        try:
            return sign * int(digits[2:] if base in (2, 16) else digits, base)
        except ValueError:
            raise _YamlError(line, 'this is no number; put it in double quotes if it is text') from None
    if re.match(_YAML_OTHER, text) or text[:1] == '-':
        raise _YamlError(line, 'YAML may not read this value as text; put it in double quotes')
    return text


class Config:
    """Where datasets live and how to get at them; every function takes one as `config=`.

    url: `s3://bucket[/prefix]`, `gs://bucket[/prefix]`, `file:///path` or, only to read, `https://host/path`; only
        remote work needs it.
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

    def __init__(self, url: Optional[str] = None, home: Optional[_Path] = None, **settings: Any) -> None:
        values = dict(settings, url=url, home=None if home is None else os.fspath(home))
        for key, value in values.items():
            _check_setting(key, value)
        defaults = {'public': False, 'connections': 8, 'compression_level': _LEVEL}
        for key in _SETTINGS:
            value = values.get(key)
            setattr(self, key, defaults.get(key) if value is None else value)
        self.home = _expand(values['home'] or os.environ.get('ETC_HOME') or '~/.etc')

    @classmethod
    def load(cls, path: Optional[_Path] = None, **overrides: Any) -> 'Config':
        """Read settings from `path`, else $ETC_CONFIG, else ~/.etc.yaml (or 0.0.x's ~/.etc.toml) if there is one.

        $ETC_URL and $ETC_HOME override the file, and `overrides` that are not None override both.
        Raises ConfigError, which names the file and the line.
        """
        named = path or os.environ.get('ETC_CONFIG')
        homeless = os.environ.get('HOME') == '' or _expanduser('~') == '~'
        values = {}  # type: Dict[str, Any]
        if named or not homeless:
            file = _expand(named or '~/.etc.yaml')
            if not named and not os.path.exists(str(file)):  # Path.exists() may raise
                old = _expand('~/.etc.toml')
                file = old if os.path.exists(str(old)) else file
            shown = _masked(str(file)) if path else _existing(str(file))
            values = _read_settings(file, shown, bool(named))
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
        shown['home'] = _existing(str(self.home))
        return 'Config(%s)' % ', '.join('%s=%r' % item for item in shown.items())


def _expanduser(path: str) -> str:
    """os.path.expanduser(), which up to Python 3.7 raises KeyError for a user whom the system does not know."""
    try:
        return os.path.expanduser(path)
    except KeyError:
        return path


def _expand(path: _Path) -> Path:
    text = _check_path(path)
    expanded = _expanduser(text)
    if expanded.startswith('~') or text.startswith('~') and os.environ.get('HOME') == '':
        raise ConfigError("cannot tell where your home directory is; set $HOME, or $ETC_HOME and $ETC_CONFIG")
    try:
        return Path(os.path.abspath(expanded))
    except OSError:
        raise ConfigError('no relative path can be found from here, as the current directory is gone') from None


def _check_setting(key: str, value: Any) -> None:
    if key not in _SETTINGS:
        raise ConfigError("unknown setting '%s'%s" % (key, _did_you_mean(key, _SETTINGS)))
    if value is None:
        return
    kind = _SETTINGS[key]
    if isinstance(value, str) and not value.isprintable():
        raise ConfigError("'%s' holds characters that cannot be printed; remove them" % key)
    if type(value) is not kind:
        remedy = {str: 'text; put it in quotes', bool: 'true or false', int: 'a whole number'}[kind]
        raise ConfigError("'%s' must be %s" % (key, remedy))
    if isinstance(value, int) and key in _LIMITS and not _LIMITS[key][0] <= value <= _LIMITS[key][1]:
        raise ConfigError("'%s' must be from %d to %d" % ((key,) + _LIMITS[key]))


def _read_settings(path: Path, shown: str, required: bool) -> Dict[str, Any]:
    """shown: what to call it as long as it may be no path at all."""
    try:
        text = path.read_bytes().decode('utf-8-sig')
    except FileNotFoundError:
        if required:
            raise ConfigError("no settings file %s; create it, or drop --config and $ETC_CONFIG" % shown) from None
        return {}
    except UnicodeDecodeError:
        raise ConfigError('%s: not UTF-8 text; save it as UTF-8' % path) from None
    except OSError as e:
        raise ConfigError('%s: cannot be read: %s' % (shown, e.strerror)) from None
    if path.suffix == '.toml':  # a flat one differs but in this from YAML; 0.0.x had another name for one key
        text = re.sub(r'(?m)^[ \t]*([\w-]+)[ \t]*=[ \t]*', r'\1: ', text)
        text = text.replace('aws_access_key_secret:', 'aws_secret_access_key:')
    try:
        found = _parse_yaml(text)
    except _YamlError as e:
        raise ConfigError('%s:%d: %s' % (path, e.line, e)) from None
    for key, (value, line) in found.items():
        try:
            _check_setting(key, value)
        except ConfigError as e:
            raise ConfigError('%s:%d: %s' % (path, line, e)) from None
    if any(found.get(key, (None,))[0] for key in _SECRETS) and os.name == 'posix' and path.stat().st_mode & 0o077:
        _say('%s holds a secret and others can read it; run: chmod 600 %s', path, path, level=_WARNING)
    return {key: value for key, (value, _) in found.items()}


# ---------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------

_T = TypeVar('_T')
_R = TypeVar('_R')


def _cores() -> int:
    """Threads that are worth having for computation; each has a few MiB under way."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(count, 16)


def _threads(count: int) -> Any:
    """A pool of `count` threads, all started; of fewer, where the system gives no more."""
    import threading
    from concurrent.futures import ThreadPoolExecutor
    pool, all_started = ThreadPoolExecutor(count), threading.Barrier(count)
    try:
        for _ in range(count):
            pool.submit(all_started.wait)
        return pool
    except BaseException as e:
        all_started.abort()  # else they wait for ever, and so does the process for them at its end
        pool.shutdown()
        if not isinstance(e, (RuntimeError, MemoryError)):
            raise
    if count == 1:
        raise Error("the system gives this process no more threads; set 'connections: 1', or raise the limits "
                    '(ulimit -u, ulimit -v)')
    return _threads(count // 2)


def _ordered(pool: Any, function: Callable[[_T], _R], items: Iterable[_T], ahead: int, keep: int = 0,
             ) -> Generator[_R, None, None]:
    """Yield function(item) for every item, in order, while up to `ahead` of them are under way.

    keep: so many that are done may wait for the next item, so that the pool has work while a result is used; but a
        break of the network, or a kill, loses what waits.
    """
    pending = collections.deque()  # type: Any
    try:
        for item in items:
            while len(pending) >= ahead or len(pending) > keep and pending[0].done():
                yield pending.popleft().result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


_Progress = Optional[Callable[[int, int], Any]]  # told how many bytes are done, and of how many


def _watched(items: Iterable[_T], size: Callable[[_T], int], progress: _Progress, total: int) -> Iterable[_T]:
    """The same items, while `progress` is told of those that have passed, in the thread that takes them."""
    def watched(progress: Callable[[int, int], Any]) -> Iterator[_T]:
        def tell() -> None:
            try:
                progress(done, total)
            except Exception as e:
                raise _FromCaller(e) from e

        done = 0
        tell()
        for item in items:
            done += size(item)
            tell()
            yield item

    return watched(progress) if progress else items


# ---------------------------------------------------------------------------------------
# Contents: a directory as a canonical stream of tar bytes, and its digest
# ---------------------------------------------------------------------------------------

_BLOCK = 1 << 20  # bytes of tar that one gzip member holds
_KEPT_ENTRIES = 100000
_MANY = 32  # files in a block, if it is better read by one thread
_MTIME = 315532800  # 1980-01-01: older dates break zip tools and make some tars warn
_ZEROS = bytes(1024)
_DEPTH = 256  # levels of directories that a dataset may have
_FOLLOWED = 1000000  # entries that may be reached through followed links, which can multiply without end
_READ = os.O_RDONLY | getattr(os, 'O_BINARY', 0)
_FILE, _DIRECTORY, _LINK, _PAX = b'0', b'5', b'2', b'x'
_MODES = {_FILE: (0o644, 0o755), _DIRECTORY: (0o755,), _LINK: (0o644,)}

_Entry = collections.namedtuple('_Entry', 'name kind mode size link source')


class _Segment:
    """A part of an archive that can be fetched and checked by itself."""

    def __init__(self, path: str, offset: int = 0, length: int = 0, files: int = 0, size: int = 0,
                 digest: str = '') -> None:
        self.path = path  # '.', a top-level directory, or data/<partition>
        self.offset = offset  # where it starts in the archive, and how many bytes it takes there
        self.length = length
        self.files = files  # files and links, and the bytes of all files
        self.size = size
        self.digest = digest

    def is_sound(self) -> bool:
        """Whether the fields, as JSON may give them, are of their types."""
        types = [type(value) for value in vars(self).values()]
        return types == [str, int, int, int, int, str] and bool(re.match(r'sha256:[0-9a-f]{64}\Z', self.digest))

    @property
    def partition(self) -> Optional[str]:
        return self.path[5:] if self.path.startswith('data/') else None


_OS_IS_UTF8 = sys.getfilesystemencoding().lower().replace('-', '') == 'utf8'  # not so on Python 3.6 with LANG=C


def _from_os(name: str) -> str:
    """A file name as text, whatever the locale; UnicodeError if its bytes are no UTF-8."""
    if not _OS_IS_UTF8:
        return os.fsencode(name).decode('utf-8')
    name.encode('utf-8')
    return name


def _is_utf8(name: str) -> bool:
    """Whether UTF-8 can write it: half a surrogate pair it cannot."""
    return not re.search('[\ud800-\udfff]', name)


def _to_os(name: str) -> str:
    raw = name.encode('utf-8')
    return name if _OS_IS_UTF8 else os.fsdecode(raw)


def _join(root: _Path, name: str) -> str:
    return os.fspath(root) + os.sep + _to_os(name)


def _scan(path: _Path) -> Tuple[List[str], Set[str]]:
    """The names in a directory, sorted by code points, and which of them are links."""
    names, links = [], set()
    with os.scandir(path) as items:
        for item in items:
            try:
                name = _from_os(item.name)
            except UnicodeError:
                raise InvalidDataset('the name %r is not valid UTF-8; rename it' % os.fsencode(item.path)) from None
            names.append(name)
            if item.is_symlink():
                links.add(name)
    names.sort()
    return names, links


def _stat(name: str, path: str) -> os.stat_result:
    """Follow links; what cannot be kept is an error that names it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        problem = 'is a link to nothing; mend or remove it' if os.path.islink(path) else 'vanished; try again'
        raise InvalidDataset("'%s' %s" % (name, problem)) from None
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise InvalidDataset("'%s' is a link that leads back to itself; mend or remove it" % name) from None
    if stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise InvalidDataset("'%s' is neither a file nor a directory; remove it" % name)
    return status


def _relative(name: str, target: str) -> str:
    """The shortest relative target that a link at `name` can have to where `target` leads, going by names."""
    base = '/' + posixpath.dirname(name)
    return posixpath.relpath(posixpath.join(base, target), base)


def _kept_link(root: _Path, name: str, segment: str) -> str:
    """The target of the link `name`, if it can stay a link in this segment; else ''.

    It must be relative, so that copies of the dataset agree, and mean the same file in the archive.
    """
    path = _join(root, name)
    try:
        target = _from_os(os.readlink(path)).replace(os.sep, '/')
    except UnicodeError:
        raise InvalidDataset("the target of the link '%s' is not valid UTF-8; rename it" % name) from None
    if os.path.isabs(target):
        return ''
    base = posixpath.dirname(name)
    meant = posixpath.normpath(posixpath.join(base, target))
    inside = '/' not in meant if segment == '.' else (meant + '/').startswith(segment + '/')
    if not inside or os.path.realpath(_join(root, meant)) != os.path.realpath(path):
        return ''
    return _relative(name, target)


def _entries(root: _Path, names: Iterable[str], links: Set[str], segment: str) -> Iterator[_Entry]:
    """Everything at and below `names`, a directory before its contents."""
    levels = [('', _join(root, ''), list(names)[::-1], links, False)]  # names yet to come are taken off the end
    above = []  # type: List[Tuple[int, int]]
    followed = 0
    while levels:
        prefix, place, rest, links, through_link = levels[-1]
        if not rest:
            levels.pop()
            del above[-1:]
            continue
        own = rest.pop()
        name = prefix + own
        followed += through_link
        if followed > _FOLLOWED or len(levels) > _DEPTH:
            raise InvalidDataset("links lead to ever more files at '%.300s', or it is too deep; remove links" % name)
        path = place + _to_os(own)
        status = _stat(name, path)
        directory = stat.S_ISDIR(status.st_mode)
        link = ''
        is_link = own in links
        if is_link and name != segment and not (directory and segment == '.'):
            link = _kept_link(root, name, segment)
        if link:
            yield _Entry(name, _LINK, 0o644, 0, link, None)
        elif not directory:
            yield _Entry(name, _FILE, 0o755 if status.st_mode & 0o100 else 0o644, status.st_size, '', path)
        else:
            yield _Entry(name + '/', _DIRECTORY, 0o755, 0, '', None)
            if segment == '.':
                continue
            identity = status.st_dev, status.st_ino
            if identity in above:
                raise InvalidDataset("'%s' is a link to a directory above it; remove it" % name)
            above.append(identity)
            inner, links = _scan(path)
            levels.append((name + '/', path + os.sep, inner[::-1], links, through_link or is_link))


_Listing = Iterable[Tuple[_Segment, Iterable[_Entry]]]


_LITTER = r'data/(?:\._[^/]*|\.DS_Store|\.directory|desktop\.ini|Thumbs\.db)\Z'  # of file managers, beside partitions


def _is_litter(name: str) -> bool:
    """Whether an entry is what a file manager left beside the partitions; it is no part of the dataset."""
    return bool(re.match(_LITTER, name))


def _partitions(root: _Path) -> List[str]:
    """The names of the partitions of a dataset, sorted; InvalidDataset if something else is among them."""
    partitions = []
    for name in _scan(_join(root, 'data'))[0]:
        path = 'data/' + name
        if stat.S_ISDIR(_stat(path, _join(root, path)).st_mode):
            partitions.append(name)
        elif not _is_litter(path):
            raise InvalidDataset("'data' may hold only directories (partitions), but '%s' is a file; move it" % path)
    return partitions


def _segments(root: _Path, only: Optional[Iterable[str]] = None) -> _Listing:
    """A valid dataset's segments, or some of them, with their entries, in the archive's order."""
    names, links = _scan(root)
    others = [name for name in names if name != 'data' and stat.S_ISDIR(_stat(name, _join(root, name)).st_mode)]
    partitions = ['data/' + name for name in _partitions(root)]
    own = sorted(set(names) - set(others))
    for path, inside in [('.', own)] + [(name, [name]) for name in others + partitions]:
        if only is None or path in only:
            yield _Segment(path), _entries(root, inside, links, path)


def _survey(root: _Path) -> Tuple[_Listing, int, int]:
    """The segments again, the bytes of all files, and a number of bytes that their archive will not exceed.

    It finds what cannot be packed before any of it is sent. Entries are kept, so that they need not be looked at
    twice, unless they are so many that memory would tell.
    """
    kept = []  # type: List[Tuple[_Segment, List[_Entry]]]
    count, names, size = 0, 0, 0
    for segment, entries in _segments(root):
        own = []  # type: List[_Entry]
        kept.append((segment, own))
        for entry in entries:
            count += 1
            names += len(entry.name) + len(entry.link)
            size += entry.size
            if count <= _KEPT_ENTRIES:
                own.append(entry)
    limit = (1 << 20) + 4096 * (len(kept) + count) + 4 * names + size
    return kept if count <= _KEPT_ENTRIES else _segments(root), size, limit + limit // 1000


def _pax_record(key: str, value: str) -> bytes:
    """`length key=value` with its own length counted (POSIX pax, "Extended Header")."""
    record = b' %s=%s\n' % (key.encode(), value.encode('utf-8'))
    length = len(record) + len(str(len(record)))
    length = len(record) + len(str(length))
    return str(length).encode() + record


@functools.lru_cache(maxsize=64)
def _ustar_frame(kind: bytes, mode: int, link: bytes, mtime: int) -> Tuple[bytes, bytes, bytes, int]:
    """What many headers share: the fields before the size, between it and the checksum, after that; their sum."""
    before, after = b'%07o\x000000000\x000000000\x00' % mode, b'\x00%011o\x00' % mtime
    end = kind + link.ljust(100, b'\0') + b'ustar\x0000' + bytes(247)
    return before, after, end, sum(before) + sum(after) + 8 * 32 + sum(end)


def _ustar(name: bytes, kind: bytes, mode: int, size: int, link: bytes = b'', mtime: int = _MTIME) -> bytes:
    before, after, end, fixed = _ustar_frame(kind, mode, link, mtime)
    digits = b'%011o' % size
    total = zlib.adler32(digits, zlib.adler32(name)) & 0xffff  # the sum of so few bytes, and 1 (RFC 1950, 8.2), fast
    return b''.join((name.ljust(100, b'\0'), before, digits, after, b'%06o\x00 ' % (fixed + total - 1), end))


def _header(name: str, kind: bytes, mode: int, size: int, link: str) -> bytes:
    """The canonical tar header, byte by byte what tarfile.PAX_FORMAT writes from Python 3.9 on.

    tarfile itself will not do: up to Python 3.8 it fills devmajor and devminor otherwise.
    """
    raw_name = name.encode('ascii', 'replace')
    if len(raw_name) <= 100 and b'?' not in raw_name and not link and size < 8 ** 11:
        return _ustar(raw_name, kind, mode, size)
    raw_link = link.encode('ascii', 'replace')
    pax = b''
    for key, value, raw in (('path', name, raw_name), ('linkpath', link, raw_link)):
        if len(raw) > 100 or b'?' in raw and raw.decode() != value:
            pax += _pax_record(key, value)
    if size >= 8 ** 11:
        pax += _pax_record('size', str(size))
        size = 0
    block = _ustar(raw_name[:100], kind, mode, size, raw_link[:100])
    if pax:
        block = _ustar(b'././@PaxHeader', _PAX, 0, len(pax), mtime=0) + pax + bytes(-len(pax) % 512) + block
    return block


_Piece = Tuple[bytes, Optional[_Entry], int, int]  # bytes, and what follows them: of a file, from where to where
_Pieces = Tuple[_Segment, List[_Piece]]  # a block whose files are still to be read


def _heads(segment: _Segment, entries: Iterable[_Entry]) -> Iterator[Tuple[bytes, Optional[_Entry], int]]:
    """The segment's tar stream: what goes before each file, the file and its size."""
    padding = b''
    for entry in entries:
        name, kind, mode, size, link, _ = entry
        segment.files += kind != _DIRECTORY
        segment.size += size
        yield padding + _header(name, kind, mode, size, link), entry, size
        padding = _ZEROS[:-size % 512]
    yield padding, None, 0


def _blocks(segments: _Listing) -> Iterator[_Pieces]:
    """The dataset's tar stream, cut into blocks."""
    for segment, entries in segments:
        block, room = [], _BLOCK  # type: List[_Piece], int
        for head, entry, size in _heads(segment, entries):
            start = 0
            while len(head) + size - start > room:
                stop = start + max(0, room - len(head))
                block.append((head[:room], entry, start, stop))
                yield segment, block
                head, start, block, room = head[room:], stop, [], _BLOCK
            block.append((head, entry, start, size))
            room -= len(head) + size - start
        yield segment, block


def _load(block: Iterable[_Piece]) -> bytes:
    found = []
    for head, entry, start, stop in block:
        found.append(head)
        if entry and start < stop:
            found.append(_read_file(entry, start, stop))
    return b''.join(found)


def _read_file(entry: _Entry, start: int, stop: int) -> bytes:
    wanted = stop - start + (stop == entry.size)  # a byte more shows that a file has grown
    file = os.open(entry.source, _READ)
    try:
        if start:
            os.lseek(file, start, os.SEEK_SET)
        found = more = os.read(file, wanted)
        while more and len(found) < stop - start:
            more = os.read(file, wanted - len(found))
            found += more
    finally:
        os.close(file)
    if len(found) != stop - start:
        raise InvalidDataset("'%s' changed while it was read; try again when it is complete" % entry.name)
    return found


def _sha256(data: bytes = b'') -> Any:
    import hashlib
    return hashlib.sha256(data)


def _file_bytes(block: _Pieces) -> int:
    return sum([stop - start for _, _, start, stop in block[1]])


def _process(listing: _Listing, work: Callable[[bytes], _R], pool: Any, progress: _Progress = None, total: int = 0,
             ) -> Generator[Tuple[_Segment, _R], None, None]:
    """Yield (segment, work(payload)) for every block; a segment's digest is set before the next one's blocks come.

    progress, total: told of the bytes of files, `total` in all.
    """
    def task(item: _Pieces) -> Tuple[_Segment, bytes, _R]:
        segment, pieces = item
        payload = _load(pieces)
        return segment, _sha256(payload).digest(), work(payload)

    def blocks() -> Iterator[_Pieces]:
        fast = True
        for segment, pieces in _watched(_blocks(listing), _file_bytes, progress, total):
            if fast and len(pieces) > _MANY:  # threads that open many files would mostly wait for each other
                begin = time.monotonic()
                payload = _load(pieces)
                fast = time.monotonic() - begin < 4e-5 * len(pieces)  # or they had better wait for the disk together
                pieces = [(payload, None, 0, 0)]
            yield segment, pieces

    current, digests = None, _sha256()
    for segment, digest, result in _ordered(pool, task, blocks(), 2 * _cores(), _cores()):
        if segment is not current:
            current, digests = segment, _sha256()
        digests.update(digest)
        segment.digest = 'sha256:' + digests.hexdigest()
        yield segment, result


def _dataset_digest(segments: Iterable[_Segment]) -> str:
    total = _sha256()
    for segment in segments:
        total.update(segment.path.encode('utf-8') + b'\0' + bytes.fromhex(segment.digest[7:]))
    return 'sha256:%s' % total.hexdigest()


def _digest_segments(root: _Path, only: Optional[Sequence[str]] = None, progress: _Progress = None) -> List[_Segment]:
    """Hash the files of a dataset, or of some of its segments."""
    found = []  # type: List[_Segment]
    listing, total, _ = _survey(root) if progress else (_segments(root, only), 0, 0)
    with _threads(_cores()) as pool:
        for segment, _ in _process(listing, len, pool, progress, total):
            if not found or found[-1] is not segment:
                found.append(segment)
    return found


# ---------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------

class Dataset(Mapping[str, Path]):
    """A directory with data/<partition>/...: a read-only mapping of partition names to their pathlib.Path.

        for file in ds['train'].iterdir(): ...      UnknownPartition, a KeyError, if there is no such partition

    root: pathlib.Path of the directory. name: str. meta: what meta.json holds. digest: 'sha256:...'.
    Iteration is sorted. It can be copied and pickled, as for worker processes, which do not read it anew.
    Raises InvalidDataset if `root` is not a dataset's directory.
    """

    @_public
    def __init__(self, root: _Path, name: Optional[str] = None, digest: Optional[str] = None) -> None:
        self.root = Path(_check_path(root))  #: pathlib.Path of the dataset's directory
        self.name = name or self.root.resolve().name  #: str
        self._digest = digest
        self._partitions = _validate(self.root)

    def __getitem__(self, partition: str) -> Path:
        if partition not in self._partitions:
            raise _no_partition(partition, self.name, self._partitions)
        return self.root / 'data' / _to_os(partition)

    def __iter__(self) -> Iterator[str]:
        return iter(self._partitions)

    def __len__(self) -> int:
        return len(self._partitions)

    def __repr__(self) -> str:
        return '<Dataset %s: %s>' % (self.name, ', '.join(self))

    def keys(self) -> KeysView[str]:
        """The partitions' names, as a set that compares and prints like dict's."""
        return dict.fromkeys(self._partitions).keys()

    # what etcetera 0.0.x had besides

    @property
    def location(self) -> Path:
        """The same as `root`."""
        return self.root

    @property
    def data(self) -> Path:
        """The directory of the partitions' directories."""
        return self.root / 'data'

    def file(self, *parts: str) -> Path:
        """The path of what is in the dataset's directory."""
        return self.root.joinpath(*parts)

    def partitions(self) -> List[str]:
        """The same as list(self)."""
        return list(self)

    @property
    @_public
    def meta(self) -> Dict[str, Any]:
        """The contents of meta.json; {} without one."""
        return _read_meta(self.root)

    @property
    @_public
    def digest(self) -> str:
        """'sha256:...' of all contents; where no receipt knows it, every file is read."""
        if self._digest is None:
            self._digest = _dataset_digest(_digest_segments(self.root))
        return self._digest


def _no_partition(partition: str, name: str, known: Sequence[str]) -> UnknownPartition:
    return UnknownPartition("no partition '%s' in %s; it has: %s%s"
                            % (_masked(str(partition)), name, ', '.join(known), _did_you_mean(str(partition), known)))


def _validate(root: Path, label: str = '') -> List[str]:
    """The partitions of the dataset at `root`; InvalidDataset says what is wrong with it, or with `label`."""
    label = label or str(root)
    if not root.is_dir():
        raise InvalidDataset('%s is a file, not a directory; unpack it first' % label if root.exists()
                             else 'no directory %s' % _masked(label))
    if not (root / 'data').is_dir():
        raise InvalidDataset("%s is no dataset: it needs a directory 'data' with a directory for each partition%s"
                             % (label, _nearby(root, label)))
    try:
        partitions = _partitions(root)
    except InvalidDataset as e:
        raise InvalidDataset('%s is no dataset: %s' % (label, e)) from None
    if not partitions:
        raise InvalidDataset("%s is no dataset: 'data' is empty; make a directory in it for each partition" % label)
    _read_meta(root, label)
    return partitions


def _nearby(root: Path, label: str) -> str:
    """What to say of a dataset that is just above or below `root`, which is none."""
    if root.name == 'data':
        return '; %s is one' % root.parent
    inner = [name for name in sorted(os.listdir(str(root))) if os.path.isdir(os.path.join(str(root), name, 'data'))]
    if not inner:
        return ''
    if label == str(root):
        return '; %s is one' % (root / inner[0])
    return "; its directory '%s' is one: pack that with 'tar czf NAME.tgz -C %s .'" % (inner[0], inner[0])


def _read_meta(root: Path, label: str = '') -> Dict[str, Any]:
    label = os.path.join(label or str(root), 'meta.json')
    try:
        meta = json.loads(_read_text(root / 'meta.json', _META_LIMIT, 'strict'))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise InvalidDataset('%s is not JSON: %s' % (label, e)) from None
    if not isinstance(meta, dict):
        raise InvalidDataset('%s must hold a JSON object, {...}' % label)
    return meta


_META_LIMIT = 16 << 20  # bytes of meta.json
_README_LIMIT = 1 << 20  # bytes of README.md that are shown


def _read_text(path: Path, limit: int, errors: str) -> str:
    """The start of a file; ValueError if it is none, or longer where `errors` is 'strict'."""
    status = os.stat(str(path))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError('it is no file')
    if errors == 'strict' and status.st_size > limit:
        raise ValueError('it is larger than %d bytes' % limit)
    with open(str(path), 'rb') as file:
        return file.read(limit).decode('utf-8-sig', errors)


_NAME = r'[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z'
_PINNED = r'([^@]*)(?:@(sha256:[0-9a-f]{64}))?\Z'


def _is_name(text: str) -> bool:
    return bool(re.match(_NAME, text))


def _parse_name(text: str) -> Tuple[str, Optional[str]]:
    """Split NAME[@sha256:...]; a name must be safe in any path and any key."""
    match = re.match(_PINNED, text)
    if not match:
        raise InvalidDataset("'%s' is not NAME@sha256:... with 64 hexadecimal digits" % _masked(text))
    if not _is_name(match.group(1)):
        hint = '; a url is given by --url' if '://' in text else ''
        raise InvalidDataset("'%s' cannot be a dataset's name: it takes at most 128 letters, digits, '.', '_' and '-', "
                             'the first a letter or digit%s' % (_masked(text), hint))
    return match.group(1), match.group(2)


# ---------------------------------------------------------------------------------------
# Archives: the .tgz format, version 1 (described in README.md)
# ---------------------------------------------------------------------------------------

_GZIP = b'\x1f\x8b\x08\x04\0\0\0\0\0\xff'  # RFC 1952, 2.3: deflate, FEXTRA, no time, unknown system
_EMPTY = b'\x03\0' + bytes(8)  # an empty deflate stream, its CRC-32 and size
_HEADER = len(_GZIP) + 2 + 4 + 4  # bytes before a block's deflate stream
_LONGEST = _BLOCK + 4096  # no block need be longer: stored, it grows by 5 bytes in each 16 KiB or more
_FOOTER = 34
_Z_RLE = 3  # zlib.Z_RLE, which Python 3.6 does not name
_LARGE = 32768  # bytes of a file that are worth another thread to write them
_RANGE = 6 << 20  # bytes fetched by one request, at most
_TAIL = 65536  # bytes at an archive's end that nearly always hold the whole index
_TAR_HEADERS = 4 << 20  # bytes of names, pax records and sparse maps that may stand before one entry
_TAR_PAX = (b'x', b'g', b'X')  # POSIX's for one entry, for all that follow, and Solaris's
_TAR_LABEL = b'V'  # GNU tar's name of the volume
_INDEX_STEP = 8000  # bytes of index a member: BusyBox's gunzip fails on much longer extra fields
_INDEX_LIMIT = 16 << 20  # enough for some 80,000 partitions


def _member(tag: bytes, extra: bytes) -> bytes:
    """The gzip header with one extra field (RFC 1952, 2.3.1.1)."""
    return _GZIP + struct.pack('<H2sH', len(extra) + 4, tag, len(extra)) + extra


def _compress(level: int, payload: bytes) -> bytes:
    """One block: a gzip member that says how long it is."""
    level, strategy = _effort(level, payload)
    body = _deflate(payload, level, strategy)
    if level and len(body) > len(payload):
        body = _deflate(payload, 0)
    length = struct.pack('<I', _HEADER + len(body) + 8)
    return b''.join((_member(b'et', length), body, struct.pack('<II', zlib.crc32(payload), len(payload))))


def _deflate(payload: bytes, level: int, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
    return deflate.compress(payload) + deflate.flush()


def _effort(level: int, payload: bytes) -> Tuple[int, int]:
    """The level and strategy that pay, guessed from samples.

    JPEG, Parquet, npz and the like do not shrink: they are stored. Nor do small files of that kind, but for the
    padding that tar puts between them; finding runs of zeros will do there, at a third of the time. The default level
    shall take no more than 2 % more bytes than gzip's; often the one below does, in two thirds of the time.
    """
    if not level or len(payload) <= 65536:
        return level, zlib.Z_DEFAULT_STRATEGY
    step = len(payload) // 4
    samples = b''.join([payload[start:start + 2048] for start in range(step // 2, len(payload), step)])
    if len(_deflate(samples, level)) > 0.97 * len(samples):
        return 0, zlib.Z_DEFAULT_STRATEGY
    dense = re.sub(b'\0{8,}', b'', samples)
    if len(_deflate(dense, level)) > 0.9 * len(dense):
        return level, _Z_RLE
    if level == _LEVEL:
        middle = payload[len(payload) // 2:][:32768]
        level -= len(_deflate(middle, level - 1)) < 1.012 * len(_deflate(middle, level))
    return level, zlib.Z_DEFAULT_STRATEGY


def _inflate(body: Any) -> bytes:
    """What a block holds, from its deflate stream, CRC-32 and size (RFC 1952, 2.3.1)."""
    inflater = zlib.decompressobj(-15)
    try:
        payload = inflater.decompress(body, _BLOCK + 1)
    except zlib.error as e:
        raise Corrupt('the archive is damaged: %s' % e) from None
    if not inflater.eof or not 0 < len(payload) <= _BLOCK or len(payload) % 512 \
            or inflater.unused_data != struct.pack('<II', zlib.crc32(payload), len(payload)):
        raise Corrupt('the archive is damaged: a block does not hold what it says')
    return payload


def _index(segments: Sequence[_Segment], offset: int) -> bytes:
    """The index and the footer, for an index that starts at `offset`."""
    text = json.dumps({'etcetera': 1, 'digest': _dataset_digest(segments), 'segments': [vars(s) for s in segments]},
                      ensure_ascii=False, separators=(',', ':')).encode('utf-8')
    if len(text) > _INDEX_LIMIT * 9 // 10:
        raise InvalidDataset('it has too many partitions for one archive; gather them in fewer directories')
    steps = [text[start:start + _INDEX_STEP] for start in range(0, len(text), _INDEX_STEP)]
    return b''.join([_member(b'ei', step) + _EMPTY for step in steps]
                    + [_member(b'ef', struct.pack('<Q', offset)), _EMPTY])


def _pack(listing: _Listing, level: int, pool: Any, segments: List[_Segment], progress: _Progress = None,
          total: int = 0) -> Generator[bytes, None, None]:
    """A dataset's archive, piece by piece; `segments` is filled on the way and complete before the index."""
    offset = 0
    for segment, block in _process(listing, functools.partial(_compress, level), pool, progress, total):
        if not segments or segments[-1] is not segment:
            segment.offset = offset
            segments.append(segment)
        segment.length += len(block)
        offset += len(block)
        yield block
    end = _compress(level, _ZEROS)
    yield end
    yield _index(segments, offset + len(end))


def _footer(tail: bytes, size: int) -> Optional[int]:
    """Where the index of an archive of `size` bytes starts; None if it has none. `tail` is its end."""
    start = _member(b'ef', bytes(8))[:-8]
    footer = tail[-_FOOTER:]
    if len(footer) < _FOOTER or not footer.startswith(start) or not footer.endswith(_EMPTY):
        return None
    offset = struct.unpack_from('<Q', footer, len(start))[0]  # type: int
    if not 0 < size - _FOOTER - offset <= _INDEX_LIMIT:
        raise Corrupt('the archive is damaged: its footer points nowhere')
    return offset


def _parse_index(data: bytes, offset: int) -> Optional[List[_Segment]]:
    """The segments that an index tells of, from its bytes with the footer; None for a version not known."""
    unreadable = Corrupt('the archive is damaged: its index is unreadable')
    text, at, end = [], 0, len(data) - _FOOTER
    while at < end:
        length = int.from_bytes(data[at + 14:at + 16], 'little')
        text.append(data[at + 16:at + 16 + length])
        if data[at:at + 16] != _member(b'ei', text[-1])[:16] or data[at + 16 + length:at + 26 + length] != _EMPTY:
            raise unreadable
        at += 26 + length
    whole = b''.join(text)
    if whole.count(b'[') + whole.count(b'{') > _INDEX_LIMIT >> 6 or re.search(rb'\d{65}', whole):
        raise unreadable  # it would take much memory or time to read
    try:
        index = json.loads(whole.decode('utf-8'))
    except (ValueError, RecursionError):
        raise unreadable from None
    if not isinstance(index, dict) or type(index.get('etcetera')) is not int:
        raise unreadable
    if index['etcetera'] != 1:
        return None
    rows = index.get('segments')
    if at != end or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise unreadable
    segments = [_Segment(*map(row.get, ('path', 'offset', 'length', 'files', 'size', 'digest'))) for row in rows]
    if not _is_valid_index(segments, index.get('digest'), offset):
        raise unreadable
    return segments


def _is_valid_index(segments: List[_Segment], digest: Any, offset: int) -> bool:
    """Whether the segments are well-formed and follow one another, from 0 to before the index."""
    at = 0
    order = []
    for s in segments:
        if not s.is_sound() or not _is_utf8(s.path):
            return False
        if s.path != '.' and not _is_safe(s.path):
            return False
        if s.offset != at or s.length <= 0 or s.files < 0 or s.size < 0:
            return False
        at += s.length
        parts = s.path.split('/')
        if len(parts) > 2 or (len(parts) == 2) != (parts[0] == 'data'):
            return False
        order.append((0, '') if s.path == '.' else (len(parts), s.path))
    return (order[:1] == [(0, '')] and order == sorted(set(order)) and at <= offset
            and digest == _dataset_digest(segments))


_NOT_ON_WINDOWS = (  # https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    r'[\\:<>"|?*\x00-\x1f]|[. ](?:/|\Z)|(?:\A|/)(?:con|prn|aux|nul|com\d|lpt\d)(?:\.[^/]*)?(?:/|\Z)')


def _is_safe(name: str) -> bool:
    """Whether a name in an archive stays below where it is unpacked, on this system."""
    padded = '/%s/' % name
    if '//' in padded or '/./' in padded or '/../' in padded or '\0' in name:
        return False
    return os.sep == '/' or not re.search(_NOT_ON_WINDOWS, name, re.I)


_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0)


def _link_or_copy(source: str, target: str) -> None:
    """Give a file a second name, or make a second one where there are no hard links."""
    import shutil
    try:
        if os.name == 'nt':
            raise OSError  # to remove one link, it would have to be made writable, and so the other
        os.link(source, target)
    except OSError:
        mode = os.stat(source).st_mode & 0o777
        file = os.open(target, _CREATE, mode | 0o200)  # the x bit at once, as some disks know no chmod
        with open(source, 'rb') as original, open(file, 'wb') as copy:
            shutil.copyfileobj(original, copy, _BLOCK)
        with contextlib.suppress(OSError):
            os.chmod(target, mode)


def _symlink(target: str, path: str, remedy: str = "set 'home' to a place on another disk") -> None:
    try:
        os.symlink(target, path, target_is_directory=os.path.isabs(target))  # which only Windows heeds
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        raise Error('there can be no links on this disk: %s; %s' % (e.strerror, remedy)) from None


class _Sink:
    """Writes a dataset's entries below `root`, never through a link, and nothing anywhere else."""

    def __init__(self, root: _Path) -> None:
        self.root = os.path.join(os.fspath(root), '')
        self.writable: List[Tuple[str, int]] = []  # files that are yet to be made read-only, and their modes
        self.twin = ''  # a directory with the same files, while there is one
        self.links: Dict[str, str] = {}  # their targets, by the names of the links

    def path(self, name: str) -> str:
        if not _is_safe(name) or name.count('/') >= _DEPTH:
            raise Corrupt("the archive holds the unsafe name '%.300s'; do not trust it" % name)
        try:
            return self.root + _to_os(name)
        except UnicodeError:
            raise Corrupt("the archive holds the name '%s', which is not valid UTF-8" % name) from None

    def directory(self, name: str, exist_ok: bool = False) -> None:
        path = self.path(name)
        try:
            os.mkdir(path)
        except FileExistsError:
            if not exist_ok or not os.path.isdir(path):
                raise self.twice(name) from None
        except (FileNotFoundError, NotADirectoryError):
            raise self.astray(name) from None

    def create(self, name: str, executable: bool) -> int:
        """A new read-only file, as a descriptor to write to."""
        path, mode = self.path(name), 0o555 if executable else 0o444
        try:
            try:
                return os.open(path, _CREATE, mode)
            except PermissionError:  # some network file systems open nothing for writing that is read-only
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                file = os.open(path, _CREATE, mode | 0o200)
                self.writable.append((path, mode))
                return file
        except FileExistsError:
            raise self.twice(name) from None
        except (FileNotFoundError, NotADirectoryError):
            raise self.astray(name) from None

    def put(self, name: str, executable: bool, data: Any) -> None:
        """A new file with all it holds."""
        twin = self.twin  # which may end while a thread is here
        if twin:
            _link_or_copy(twin + _to_os(name), self.path(name))
            return
        file = self.create(name, executable)
        try:
            _write(file, data)
        finally:
            os.close(file)

    def astray(self, name: str) -> Error:
        if not os.path.isdir(self.root):
            return Error('%s was removed while it was being filled; run the command again' % self.root)
        return Corrupt("the archive is damaged: it holds '%s', but not the directory around it" % name)

    def twice(self, name: str) -> Error:
        return Corrupt("the archive holds '%s' twice (or names that this disk cannot tell apart)" % name)

    def link(self, name: str, target: str) -> None:
        """Make a link, but not before finish(), so that nothing can be written through it."""
        self.path(name)
        if name in self.links:
            raise self.twice(name)
        try:
            if not 0 < len(target) < 4096 or '\0' in _to_os(target):
                raise ValueError
        except ValueError:
            raise self.astray_link(name, ascii(target)) from None
        self.links[name] = target

    def finish(self, confined: bool) -> None:
        """Make the links; each must lead to something in the dataset or, if `confined`, in its own segment."""
        for path, mode in self.writable:
            with contextlib.suppress(OSError):
                os.chmod(path, mode)
        for name, target in self.links.items():
            try:
                _symlink(_to_os(target), self.path(name))
            except FileExistsError:
                raise self.twice(name) from None
        root = os.path.realpath(self.root)
        for name, target in self.links.items():
            try:
                os.stat(self.path(name))  # the system's own limit, before realpath() follows a chain without end
            except OSError:
                raise self.astray_link(name, target) from None
            real = os.path.realpath(self.path(name))
            inside = os.path.join(root, _to_os(_segment_of(name)) if confined else '', '')
            stays = real.startswith(os.path.normpath(inside) + os.sep) or real == os.path.normpath(inside)
            if confined and _segment_of(name) == '.':
                stays = os.path.dirname(real) == root and os.path.isfile(real)
            if os.path.isabs(target) or not stays:
                raise self.astray_link(name, target)

    def astray_link(self, name: str, target: str) -> Error:
        return Corrupt("the archive holds the link '%s' to '%.300s', which leads out of the dataset or nowhere"
                       % (name, target))


def _segment_of(name: str) -> str:
    """The path of the segment that the entry `name` belongs to; a root file's looks like any top-level name."""
    parts = name.split('/')
    if parts[0] == 'data' and len(parts) > 1:
        return 'data/' + parts[1]
    return '.' if len(parts) == 1 else parts[0]


def _write(file: int, data: Any) -> None:
    written = os.write(file, data)
    while written < len(data):
        data = data[written:]
        written = os.write(file, data)


class _Extractor:
    """Writes one segment's tar stream to a sink, and refuses whatever is not canonical.

    So what is installed hashes, file by file, to the digest that the index promised.
    """

    def __init__(self, sink: _Sink, segment: _Segment) -> None:
        self.sink = sink
        self.segment = segment
        self.digests = _sha256()
        self.rest = b''  # the start of a header whose end is in the next block
        self.path, self.executable = '', False  # of the last entry
        self.parent, self.own = '', ''  # the directory that it is in, and its name there; or itself, if it is one
        self.file = -1  # the file that goes on in the next block, its whole size, and how many bytes are to come
        self.whole = self.left = 0
        self.files = self.size = self.length = self.directories = 0

    def feed(self, payload: bytes, digest: bytes) -> List[Tuple[str, bool, Any]]:
        """Write what the segment's next block holds, but give back the larger files, for sink.put() in a thread."""
        if self.length not in (0, _BLOCK):  # only the last may be shorter
            raise self.odd()
        self.length = len(payload)
        self.digests.update(digest)
        data = self.rest + payload
        view = memoryview(data)
        self.rest = b''
        large = []
        at, end = 0, len(data)
        while at < end:
            if not self.left:
                at = self.siblings(data, view, at)
                header = self.header(data, at)
                if not header:
                    break
                at += len(header)
                if not self.entry(header):
                    continue
            stop = min(at + self.left, end)
            self.left -= stop - at
            if self.file < 0 and not self.left:
                if stop - at < _LARGE:
                    self.sink.put(self.path, self.executable, view[at:stop])
                else:
                    large.append((self.path, self.executable, view[at:stop]))
            else:
                if self.file < 0:
                    self.file = self.sink.create(self.path, self.executable)
                _write(self.file, view[at:stop])
            at = stop
            if not self.left:
                self.close()
                at += -stop % 512
                if data[stop:at] != _ZEROS[:at - stop]:
                    raise self.odd()
        return large

    def siblings(self, data: bytes, view: Any, at: int) -> int:
        """Write the files at `at` that differ from the last entry in name and size alone; return where they end.

        For them it does what entry() and sink.put() do for all, in half the time.
        """
        parent, own, mode, most = self.parent + '/', self.own, 0o755 if self.executable else 0o644, len(data) - 1024
        if data[at + 156:at + 157] != _FILE or not self.directories or self.segment.path == '.' or self.sink.twin \
                or os.sep != '/' or parent.count('/') >= _DEPTH:
            return at
        place, start, left = self.sink.path(self.parent) + '/', len(parent), self.segment.size - self.size
        while at <= most:
            raw = data[at:at + 100].rstrip(b'\0')
            try:
                name, size = raw.decode('ascii'), int(data[at + 124:at + 135], 8)
                before, own = own, name[start:]
                begin, end = at + 512, at + 512 + size
                if not (0 < size < _LARGE and end <= most and size <= left and own > before and own[0] != '.'
                        and '/' not in own and name.startswith(parent) and data.startswith(_ZEROS[:-size % 512], end)
                        and data.startswith(_ustar(raw, _FILE, mode, size), at)):
                    break
                file = os.open(place + own, _CREATE, mode & 0o555)
            except (ValueError, OSError):  # which entry() explains
                break
            try:
                _write(file, view[begin:end])
            finally:
                os.close(file)
            self.path, self.own = name, own
            self.files += 1
            left -= size
            at = end + -size % 512
        self.size = self.segment.size - left
        return at

    def header(self, data: bytes, at: int) -> bytes:
        """The header at `at`; nothing, if it goes on in the next block."""
        if data[at + 156:at + 157] != _PAX:
            return data[at:at + 512]
        length = 1024 + _octal(data[at + 124:at + 135])
        length += -length % 512
        if not 1024 < length <= 65536:
            raise self.odd()
        if at + length <= len(data):
            return data[at:at + length]
        self.rest = data[at:]
        return b''

    def entry(self, header: bytes) -> bool:
        """Make what a header tells of, but a file only if it is empty; else it says that the file's bytes follow."""
        try:
            name, kind, mode, size, link = _parse_header(header)
            odd = (_header(name, kind, mode, size, link) != header or mode not in _MODES.get(kind, ())
                   or not 0 <= size <= (self.segment.size - self.size if kind == _FILE else 0)
                   or (link != _relative(name, link) if kind == _LINK else link))
        except ValueError:
            raise self.odd() from None
        directory = kind == _DIRECTORY
        path = name[:-1] if directory else name
        parent, _, own = path.rpartition('/')
        if odd or directory != name.endswith('/') or not (
                self.directories and parent == self.parent and own > self.own and self.segment.path != '.'
                or self.may_follow(path, directory)):
            raise self.odd()
        self.path = path
        self.parent, self.own = (path, '') if directory else (parent, own)
        if directory:
            self.directories += 1
            self.sink.directory(path, exist_ok=path == 'data')  # it may be there with reused partitions
            return False
        self.files += 1
        if kind == _LINK:
            self.sink.link(path, link)
            return False
        self.executable, self.whole, self.left = mode == 0o755, size, size
        self.size += size
        if not size:
            self.sink.put(path, self.executable, b'')
        return size > 0

    def may_follow(self, path: str, directory: bool) -> bool:
        """Whether an entry belongs into this segment, and comes after the last one."""
        if self.segment.path == '.':
            inside = path == 'data' if directory else '/' not in path
        elif not self.path:
            inside = path == self.segment.path  # a segment starts with its own directory
        else:
            inside = path.startswith(self.segment.path + '/')
        above = path.rpartition('/')[0]  # whose own entry must have come: it is the last entry's directory, or above it
        return inside and path.split('/') > self.path.split('/') and (
            not self.path or (self.parent + '/').startswith(above + '/') or self.segment.path == '.')

    def finish(self) -> None:
        s = self.segment
        if self.left or self.rest or not self.directories or (self.files, self.size) != (s.files, s.size):
            raise self.odd()
        if 'sha256:' + self.digests.hexdigest() != s.digest:
            raise Corrupt("the archive is damaged: '%s' is not what its digest promises" % s.path)

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def odd(self) -> Error:
        return Corrupt("the archive is damaged: '%s' is not as etcetera writes it" % self.segment.path)


_USTAR = struct.Struct('100s7s17x11s21xc100s255x')  # name, mode, size, kind and link of a header


def _octal(field: bytes) -> int:
    return int(field, 8) if re.match(rb'[0-7]+\Z', field) else -1


def _parse_header(header: bytes) -> Tuple[str, bytes, int, int, str]:
    """The reverse of _header(), for what it wrote: the caller compares. Raises ValueError."""
    raw_name, raw_mode, raw_size, kind, raw_link = _USTAR.unpack_from(header, len(header) - 512)
    name, link, size = raw_name.rstrip(b'\0').decode('ascii'), raw_link.rstrip(b'\0').decode('ascii'), int(raw_size, 8)
    if len(header) > 512:
        records, at = header[512:512 + _octal(header[124:135])], 0
        while at < len(records):
            length = int(records[at:at + 20].split(b' ', 1)[0])
            key, _, value = records[at:at + length].partition(b' ')[2][:-1].partition(b'=')
            if length <= 0 or key not in (b'path', b'linkpath', b'size'):
                raise ValueError
            if key == b'size':
                size = int(value)
            elif key == b'path':
                name = value.decode('utf-8')
            else:
                link = value.decode('utf-8')
            at += length
    return name, kind, int(raw_mode, 8), size, link


_Block = Tuple[_Segment, int, bytes, bytes]  # its segment, its length in the archive, its payload, the digest of that


def _cut(chunks: Iterable[bytes], segments: Iterable[Tuple[_Segment, int]]) -> Iterator[Tuple[_Segment, Any]]:
    """Blocks, each from its deflate stream on, from the bytes of some segments, each without so many at its start."""
    source, rest = iter(chunks), memoryview(b'')

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

    for segment, had in segments:
        left = segment.length - had
        while left:
            head = bytes(take(min(left, _HEADER)))
            length = int.from_bytes(head[16:], 'little')
            if head != _member(b'et', head[16:]) or not _HEADER + 8 < length <= min(left, _LONGEST):
                raise Corrupt('the archive is damaged: a block does not start where it should')
            yield segment, take(length - _HEADER)
            left -= length


def _unpack(chunks: Iterable[bytes], segments: Iterable[Tuple[_Segment, int]], pool: Any,
            ) -> Generator[_Block, None, None]:
    """The blocks in the bytes of some segments, as in _cut(), inflated and checked."""
    def task(item: Tuple[_Segment, Any]) -> _Block:
        segment, body = item
        payload = _inflate(body)
        return segment, _HEADER + len(body), payload, _sha256(payload).digest()

    return _ordered(pool, task, _cut(chunks, segments), 2 * _cores(), 1)


def _extract(blocks: Iterable[_Block], sink: _Sink, pool: Any, journal: Any = None) -> None:
    """Write blocks, whole segments of them, to a sink; Corrupt if they are not what their segments promise.

    journal: a file for what _replay() needs to go on where this one ended before its time.
    """
    import threading
    extractor = None  # type: Optional[_Extractor]
    lock, unsettled = threading.Lock(), collections.deque()  # type: Any, Any  # what is not in the journal yet

    def feed() -> Iterator[List[Any]]:
        nonlocal extractor
        for number, (segment, length, payload, digest) in enumerate(blocks):
            if number % 256 == 0:
                os.utime(sink.root)  # a sign of life for _Home.sweep()
            if extractor is None or extractor.segment is not segment:
                if extractor:
                    extractor.finish()
                extractor = _Extractor(sink, segment)
            files = extractor.feed(payload, digest)
            split = [extractor.path, extractor.whole] if extractor.left else ['', 0]
            unsettled.append([files, [segment.path, length, digest.hex()] + split])
            yield unsettled[-1]
        if extractor:
            extractor.finish()

    def put(item: List[Any]) -> None:
        for name, executable, data in item[0]:
            sink.put(name, executable, data)
        item[0] = None
        with lock:  # at once, as the next block may be long in coming
            while unsettled and unsettled[0][0] is None:
                line = unsettled.popleft()[1]
                if journal:
                    journal.write(json.dumps(line).encode() + b'\n')

    try:
        for _ in _ordered(pool, put, feed(), 2 * _cores()):
            pass
    finally:
        if extractor:
            extractor.close()
    sink.finish(confined=True)


def _replay(root: _Path, journal: Callable[[], Iterator[List[Any]]], segments: Iterable[_Segment], pool: Any,
            ) -> Generator[_Block, None, None]:
    """The first blocks of some segments, from the files and the journal of an extraction that came not to its end.

    All is read and compared with the journal; where it differs, as after a power cut, there the blocks end.
    """
    wanted = {segment.path: segment for segment in segments}

    def lines() -> Iterator[List[Any]]:
        return (line for line in journal() if line[0] in wanted)

    def task(item: Tuple[List[Any], _Pieces]) -> _Block:
        (path, length, expected, _, _), (found, pieces) = item
        payload = _load(pieces)
        digest = _sha256(payload).digest()
        if digest.hex() != expected or found.path != path:
            raise Corrupt
        return wanted[path], length, payload, digest

    last = collections.deque(lines(), 1) or [['', 0]]
    name, size = last[0][-2:]  # of the file that was being written, which is not as long yet as its header says
    with contextlib.suppress(OSError, InvalidDataset, Corrupt):
        listing = ((segment, (e._replace(size=size) if e.name == name else e for e in entries))
                   for segment, entries in _segments(root, wanted))
        with contextlib.closing(_ordered(pool, task, zip(lines(), _blocks(listing)), 2 * _cores())) as blocks:
            yield from blocks


class _Stream:
    """Chunks of bytes as a file that is read once, from its start to its end."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.rest = memoryview(b'')  # of the chunks that have been taken
        self.position = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, or all up to the end if it is nearer; they stay to be read."""
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
    """The bytes of a tar, as tarfile reads them: only forward, and never past the end without an error."""

    limit: Optional[int] = None  # a position that the headers of one entry may not go past
    kept = 0  # bytes of global headers, which tarfile keeps to the end

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True

    def seek(self, position: int) -> None:
        if position < self.position:
            raise EOFError('it leads backwards')
        while self.position < position:
            self.read(min(position - self.position, _BLOCK))

    def peek(self, size: int) -> bytes:
        if size < 0 or self.limit is not None and self.position + size > self.limit:
            raise EOFError('the headers of one entry take more than %d bytes' % _TAR_HEADERS)
        data = super().peek(size)
        if len(data) < size:
            raise EOFError('it ends too early')
        return data

    def finish(self) -> None:
        """Read on after the end, where only padding may stand."""
        for chunk in itertools.chain([self.rest], self.chunks):
            if bytes(chunk).count(0) != len(chunk):
                raise EOFError('another archive follows its end; pack the files of both as one')


def _tar_members(stream: Any) -> Iterator[Tuple[Any, Any]]:
    """Each entry of a tar, from a _TarStream, with the TarFile that reads it.

    tarfile by itself takes a header that is broken or missing for the end of the archive.
    """
    import tarfile

    class Strict(tarfile.TarInfo):
        @classmethod
        def fromtarfile(cls, tar: Any) -> Any:
            header = stream.peek(512)
            if header.count(0) == len(header):
                return super().fromtarfile(tar)  # raises what tells tarfile of the end
            outermost = stream.limit is None  # or this is the header that an extended one belongs to
            if outermost:
                stream.limit = stream.position + _TAR_HEADERS
            try:
                if header[156:157] in _TAR_PAX:
                    size = cls.frombuf(header, tar.encoding, tar.errors).size
                    stream.kept += size if header[156:157] == b'g' else 0
                    if stream.kept > _TAR_HEADERS:
                        raise tarfile.ReadError('its global headers take more than %d bytes' % _TAR_HEADERS)
                    _check_pax_records(stream.peek(512 + size)[512:])
                return super().fromtarfile(tar)
            except tarfile.HeaderError as e:
                raise tarfile.ReadError(str(e)) from None
            finally:
                if outermost:
                    stream.limit = None

    tar: Any
    with tarfile.open(fileobj=stream, mode='r:', encoding='utf-8', tarinfo=Strict) as tar:
        for member in iter(tar.next, None):
            tar.members = []  # or they would pile up in memory
            yield tar, member
    stream.finish()


def _check_pax_records(data: bytes) -> None:
    """ValueError unless all is records of the form `length key=value` (POSIX pax, "Extended Header").

    Up to Python 3.12 tarfile ignores the rest where a record is malformed.
    """
    data = data.rstrip(b'\0')
    start = 0
    while start < len(data):
        length = re.compile(rb'(\d{1,20}) [^=]+=').match(data, start)
        stop = start + int(length.group(1)) if length else 0
        if not length or stop < length.end() or data[stop - 1:stop] != b'\n':
            raise ValueError('a malformed pax header')
        start = stop


def _unpack_foreign(chunks: Iterable[bytes], root: _Path, pool: Any, progress: _Progress, total: int) -> None:
    """Write what any .tgz of `total` bytes holds below `root`; the one thread of `pool` inflates what comes next."""
    import gzip
    import tarfile
    sink = _Sink(root)
    source = _Stream(chunks)
    before = 0

    def came(_: bytes) -> int:
        nonlocal before
        earlier, before = before, source.position
        return before - earlier

    try:
        plain = gzip.GzipFile(fileobj=source)  # type: ignore[call-overload]
        with contextlib.closing(_ordered(pool, plain.read, itertools.repeat(_BLOCK), 4)) as inflated:
            rest = itertools.takewhile(len, _watched(inflated, came, progress, total))
            for tar, member in _tar_members(_TarStream(rest)):
                _extract_member(tar, member, sink)
    except (tarfile.TarError, EOFError, zlib.error, ValueError, LookupError, OverflowError, RecursionError) as e:
        raise Corrupt('the archive is damaged or no .tgz: %s' % e) from None
    except OSError as e:
        if e.errno is None:  # how gzip says that it found no gzip, or a wrong CRC
            raise Corrupt('the archive is damaged or no .tgz: %s' % e) from None
        raise
    sink.finish(confined=False)


def _plain_name(name: str) -> str:
    """Without the ./ that tars like to put before it; an absolute name stays one, to be refused."""
    return name if name.startswith('/') else '/'.join(part for part in name.split('/') if part not in ('', '.'))


def _extract_member(tar: Any, member: Any, sink: _Sink) -> None:
    name = _plain_name(member.name)
    if not name and member.isdir() or member.type == _TAR_LABEL or _is_litter(name) and not member.isdir():
        return
    sink.path(name)
    for slash in re.finditer('/', name):
        sink.directory(name[:slash.start()], exist_ok=True)
    if member.isdir():
        sink.directory(name, exist_ok=True)
    elif member.issym():
        sink.link(name, member.linkname)
    elif member.islnk():
        _extract_hard_link(name, member.linkname, sink)
    elif member.isreg():
        _extract_file(tar, member, name, sink)
    elif member.isdev():
        raise Corrupt("the archive holds '%s', a device or pipe; do not trust it" % name)
    else:
        raise Corrupt("the archive holds '%s' of the unknown type %s; pack it with tar's default options"
                      % (name, ascii(member.type.decode('latin-1'))))


def _extract_hard_link(name: str, linkname: str, sink: _Sink) -> None:
    original = _plain_name(linkname)
    if original in sink.links:
        sink.link(name, sink.links[original])
        return
    target = sink.path(original)
    if not os.path.isfile(target) or os.path.lexists(sink.path(name)):
        raise Corrupt("the archive holds the hard link '%s' to '%s', which is not in it" % (name, linkname))
    _link_or_copy(target, sink.path(name))


def _extract_file(tar: Any, member: Any, name: str, sink: _Sink) -> None:
    """Write a regular file; of its mode only the owner's x bit is kept, as on push."""
    stored = tar.offset - member.offset_data  # whatever a sparse map says
    if member.size > (stored << 10) + (1 << 30):
        raise Corrupt("the archive holds '%s', which would be %d bytes of nothing" % (name, member.size))
    file = sink.create(name, bool(member.mode & 0o100))
    try:
        source = tar.extractfile(member)
        for data in iter(lambda: source.read(_BLOCK), b''):
            _write(file, data)
    finally:
        os.close(file)


# ---------------------------------------------------------------------------------------
# HTTP: kept-alive connections, proxies, private CAs, retries
# ---------------------------------------------------------------------------------------

_TIMEOUT = 60  # seconds of silence after which a connection counts as broken
_CONNECT = 15  # seconds in which a connection must stand
_TRIES = 5
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_REPLY_LIMIT = 32 << 20  # bytes of an answer whose length nobody knows before
_RETRY_AFTER = 60.0  # seconds, at most, for which a try waits because the server asks for it
_INTERIM = 100  # interim answers that may come before the final one
_SITE = r'https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?'


class _Reply(NamedTuple):
    status: int
    headers: Any  # an email.message.Message: names in any case
    body: Any  # bytes, as they came

    def page(self) -> bytes:
        """The body of what is no object, inflated: some proxies compress it although they are asked not to."""
        body = bytes(self.body)
        if self.headers.get('Content-Encoding', 'identity').lower() == 'identity':
            return body
        try:
            return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, _REPLY_LIMIT)  # 32: gzip or zlib
        except zlib.error:
            return body

    def asked_delay(self) -> float:
        """The seconds for which the server asks to be left alone (RFC 9110, 10.2.3), within reason; or 0."""
        text = self.headers.get('Retry-After') or ''
        if re.match(r'[0-9]{1,9}\Z', text):
            delay = float(text)
        else:
            delay = _http_time(text) - (_http_time(self.headers.get('Date') or '') or time.time())
        return min(max(delay, 0.0), _RETRY_AFTER)


_Signer = Callable[[str, str, Dict[str, str], Iterable[bytes]], Dict[str, str]]


class _Http:
    """Requests with whole answers; threads share it. It follows no redirect: what to do then, a remote knows."""

    def __init__(self, ca_bundle: Optional[str], direct: bool = False, timeout: float = _TIMEOUT) -> None:
        """direct: past any proxy."""
        self.ca_bundle = ca_bundle
        self.direct = direct
        self.timeout = timeout
        self.idle = collections.defaultdict(list)  # type: Dict[Tuple[str, str], List[Any]]
        self.busy = set()  # type: Any
        self.closed = False
        self.hurried = False  # requests are tried twice at most, as work that failed or was interrupted is being ended
        self.tls = None  # type: Any

    def close(self) -> None:
        """Close all connections; those that threads wait on fail at once."""
        import socket
        self.closed = True
        for connection in [c for idle in self.idle.values() for c in idle] + list(self.busy):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    @contextlib.contextmanager
    def hurry_when_it_fails(self) -> Iterator[None]:
        """Goes around what waits for threads, so that an error or Ctrl-C need not wait for all their tries."""
        try:
            yield
        except BaseException:
            self.hurried = True
            raise

    def request(self, method: str, url: str, headers: Optional[Dict[str, str]] = None, body: Sequence[bytes] = (),
                sign: Optional[_Signer] = None, limit: int = _REPLY_LIMIT, tries: int = _TRIES,
                into: Optional[Any] = None) -> _Reply:
        """One request, tried again while that may help. Raises RemoteError if no answer is to be had.

        sign: gives the headers to send, anew for each try. limit: bytes that the answer may have.
        into: a file for the body of an answer with status 200, of any size.
        """
        import http.client
        if not _is_address(url):
            raise RemoteError('an address that the settings, the credentials or a server give is not of the form '
                              'https://host[:port][/path]; a user or password cannot be in it')
        for attempt in range(1, tries + 1):
            last = attempt == tries or self.hurried and attempt > 1
            signed = dict(headers or {}) if sign is None else sign(method, url, dict(headers or {}), body)
            problem = None  # type: Optional[Exception]
            delay = 0.0
            try:
                reply = self._once(method, url, signed, body, limit, into)
                if reply.status not in _TRANSIENT or last:
                    return reply
                delay = reply.asked_delay()
            except UnicodeError:  # of the codec idna
                raise ConfigError("%s or the proxy for it has a name that no host can have; check the url, the "
                                  'endpoint_url and the proxy' % _site(url)) from None
            except (OSError, http.client.HTTPException) as e:
                problem = e
                if last or self.closed or 'CERTIFICATE_VERIFY_FAILED' in str(e):
                    raise self._failure(url, e) from None
            _say('%s %s: %s; trying again', method, _site(url), problem or reply.status, level=_DEBUG)
            _pause(attempt)
            self._wait(delay)
        raise AssertionError

    def _wait(self, seconds: float) -> None:
        """Sleep, as long as what is waited for is wanted."""
        while seconds > 0 and not self.closed and not self.hurried:
            time.sleep(min(seconds, 1.0))
            seconds -= 1.0

    def _failure(self, url: str, e: Exception) -> RemoteError:
        where = _site(url)
        if 'CERTIFICATE_VERIFY_FAILED' in str(e):
            reason = ' (%s)' % e.verify_message if hasattr(e, 'verify_message') else ''  # from Python 3.7 on
            return RemoteError("%s shows a certificate that is not trusted%s; if a private CA signed it, set "
                               "'ca_bundle' to the file with its certificate" % (where, reason))
        return RemoteError('cannot reach %s: %s; check the network, the proxy settings and the URL'
                           % (where, getattr(e, 'strerror', None) or e or type(e).__name__))

    def _once(self, method: str, url: str, headers: Dict[str, str], body: Sequence[bytes], limit: int,
              into: Optional[Any]) -> _Reply:
        import http.client
        from urllib.parse import urlsplit
        parts = urlsplit(url)
        target = (parts.path or '/') + ('?' + parts.query if parts.query else '')
        headers = dict({'Accept-Encoding': 'identity'}, **headers)
        if body or method in ('PUT', 'POST'):
            headers['Content-Length'] = str(sum(map(len, body)))
        if not all(re.match(r'[!-9;-~]+: [\t -~\x80-\xff]*\Z', '%s: %s' % item) for item in headers.items()):
            raise ConfigError('a token, a project or something else that %s is to be told holds characters that it '
                              'cannot have; check the credentials' % _site(url))
        connection, kept, proxy_headers = self._connect(parts.scheme, parts.netloc)
        if proxy_headers is not None:  # a plain request to a proxy names the whole URL
            target, headers = url, dict(headers, **proxy_headers)
        self.busy.add(connection)
        reusable = False
        try:
            try:
                response = self._ask(connection, method, target, headers, body)
            except (ConnectionError, http.client.BadStatusLine):
                if not kept or self.closed:
                    raise
                connection.close()  # the server had closed the kept connection meanwhile
                response = self._ask(connection, method, target, headers, body)
            known = response.length is not None and response.length <= limit
            data = b''  # type: Any
            if into and response.status == 200:
                self._save(response, into)
            elif known and response.length and 'Content-Range' in response.headers:
                data = self._receive(response)
            else:
                data = response.read() if known else response.read(limit + 1)
            if len(data) > limit:
                raise RemoteError('%s answers with more than was asked for; a proxy or the endpoint_url is at fault'
                                  % _site(url), response.status)
            reusable = response.isclosed() and not response.will_close
            return _Reply(response.status, response.headers, data)
        finally:
            self.busy.discard(connection)
            if reusable and not self.closed:
                self.idle[parts.scheme, parts.netloc].append(connection)
            else:
                connection.close()

    def _receive(self, response: Any) -> bytearray:
        """A range; only its start, if the connection breaks when some of it has come."""
        import http.client
        data, at = bytearray(response.length), 0
        try:
            while at < len(data):
                count = response.readinto(memoryview(data)[at:at + 262144])
                if not count:
                    raise http.client.IncompleteRead(b'', len(data) - at)
                at += count
        except (OSError, http.client.HTTPException):
            if at < 65536:
                raise
        return data[:at] if at < len(data) else data

    def _save(self, response: Any, into: Any) -> None:
        import http.client
        into.seek(0)
        into.truncate()
        for data in iter(lambda: response.read(1 << 20), b''):
            try:
                into.write(data)
            except OSError as e:
                raise Error('cannot keep a download in a temporary file: %s; set $TMPDIR to a directory with more room'
                            % e.strerror) from None
        if response.length:
            raise http.client.IncompleteRead(b'', response.length)

    def _ask(self, connection: Any, method: str, target: str, headers: Dict[str, str], body: Sequence[bytes]) -> Any:
        import http.client
        if not connection.sock:
            connection.connect()
            connection.sock.settimeout(self.timeout)
        if self.closed:  # close() may have looked before the socket was there
            raise http.client.HTTPException('interrupted')
        # a server may answer, and close, before it has read all
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, target, iter(body) if body else None, headers)
        return connection.getresponse()

    def _connect(self, scheme: str, netloc: str) -> Tuple[Any, bool, Optional[Dict[str, str]]]:
        """A connection, whether it has been used before, and the headers for a proxy that forwards plain requests."""
        import http.client
        import urllib.request
        if self.closed:
            raise http.client.HTTPException('interrupted')
        proxy = None if self.direct else urllib.request.getproxies().get(scheme)
        if proxy and urllib.request.proxy_bypass(netloc):
            proxy = None
        address, proxy_headers = _proxy(proxy, scheme) if proxy else (netloc, {})
        plain = proxy_headers if proxy and scheme == 'http' else None
        with contextlib.suppress(IndexError):
            return self.idle[scheme, netloc].pop(), True, plain
        patience = min(self.timeout, _CONNECT)
        if scheme == 'https':
            if self.tls is None:
                self.tls = _tls(self.ca_bundle)
            connection = http.client.HTTPSConnection(address, timeout=patience, context=self.tls)  # type: Any
            if proxy:
                connection.set_tunnel(netloc, headers=proxy_headers)
        else:
            connection = http.client.HTTPConnection(address, timeout=patience)
        connection.auto_open = 0  # only _ask() connects
        connection.response_class = _final_response()
        return connection, False, plain


def _proxy(url: str, scheme: str) -> Tuple[str, Dict[str, str]]:
    """The address of a proxy, and the headers that it wants."""
    import urllib.request
    from base64 import b64encode
    from urllib.parse import unquote
    match = re.match(r'(?:([^/?#@]*)://)?(?:(.*)@)?([^/?#@:\[\]\s]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?(?:[/?#].*)?\Z',
                     url.strip(), re.ASCII)
    kind, user, host, port = match.groups() if match else ('none', None, '', None)
    if kind == 'https' and os.name == 'nt' and not urllib.request.getproxies_environment():
        kind = 'http'  # up to Python 3.9 those of the registry are called so: https://bugs.python.org/issue42627
    if (kind or 'http').lower() != 'http' or int(port or 0) > 65535:
        raise ConfigError('%s_proxy is not of the form http://[user:password@]host[:port], and etcetera speaks neither '
                          'SOCKS nor TLS to a proxy; change it, or exempt this host with no_proxy' % scheme)
    name, _, password = (user or '').partition(':')
    credentials = ('%s:%s' % (unquote(name), unquote(password))).encode('utf-8', 'surrogateescape')
    headers = {'Proxy-Authorization': 'Basic ' + b64encode(credentials).decode()} if user else {}
    return '%s:%s' % (host, port or 80), headers


@functools.lru_cache(maxsize=None)
def _final_response() -> Any:
    """The class of responses that come after all interim ones (RFC 9110, 15.2); http.client itself skips only 100."""
    import http.client

    class FinalResponse(http.client.HTTPResponse):
        def begin(self) -> None:
            super().begin()
            for _ in range(_INTERIM):
                if not 101 < self.status < 200:
                    return
                self.headers = None  # type: ignore[assignment]  # so that it reads on
                super().begin()
            raise http.client.HTTPException('more than %d interim answers' % _INTERIM)

    return FinalResponse


def _pause(failures: int) -> None:
    """Exponential backoff with jitter: about 0.4, 0.8, 1.5, 3 seconds."""
    import random
    time.sleep(random.uniform(0.5, 1) * 0.25 * 2 ** failures)


def _tls(ca_bundle: Optional[str]) -> Any:
    try:
        import ssl
    except ImportError:
        raise ConfigError('this Python has no ssl module, so it cannot use https://; take another Python, or a url '
                          'that needs none') from None
    try:
        context = ssl.create_default_context(cafile=ca_bundle and _expanduser(ca_bundle))
    except OSError as e:
        raise ConfigError('cannot use the CA bundle: %s; check ca_bundle and $AWS_CA_BUNDLE'
                          % (e.strerror or e)) from None
    if ca_bundle:  # many a private CA leaves out extensions that Python 3.13 and later insist on
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _content_range(reply: _Reply) -> Tuple[Optional[int], Optional[int], Optional[int]]:
    """First byte, byte after the last, and size of the whole (RFC 9110, 14.4); None for each that it does not say."""
    pattern = r'bytes (?:(\d{1,19})-(\d{1,19})|\*)/(?:(\d{1,19})|\*)\Z'
    match = re.match(pattern, reply.headers.get('Content-Range') or '', re.ASCII | re.IGNORECASE)
    if not match:
        return None, None, None
    start, last, size = [None if digits is None else int(digits) for digits in match.groups()]
    return start, None if last is None else last + 1, size


def _xml(body: bytes) -> Any:
    """The root element, its namespaces cut off; ValueError if it is none or could grow (entities).

    White space may stand before it: S3 sends some to keep a connection open while it works.
    """
    from xml.etree import ElementTree
    if b'<!' in body.replace(b'<![CDATA[', b''):
        raise ValueError('XML with declarations')
    try:
        root = ElementTree.fromstring(body.strip())
    except (ElementTree.ParseError, LookupError, RecursionError) as e:  # LookupError: of the encoding
        raise ValueError(str(e)) from None
    for element in root.iter():
        element.tag = element.tag.rpartition('}')[2]
    return root


def _is_address(url: str) -> bool:
    """Whether a request can be sent there."""
    from ipaddress import ip_address
    from urllib.parse import urlsplit
    if not re.match(_SITE + r'(?:[/?][!-~]*)?\Z', url, re.ASCII):
        return False
    try:
        parts = urlsplit(url)
        if '[' in parts.netloc:
            ip_address(parts.hostname or '')  # urlsplit() looks only from Python 3.11 on
        return parts.port != 0
    except ValueError:  # brackets around what is no IPv6 address, or a port beyond 65535
        return False


def _site(url: str) -> str:
    """What may be shown of the address of a request, as its path and query may hold keys."""
    from urllib.parse import urlsplit
    return '%s://%s' % urlsplit(url)[:2]


def _check_endpoint(url: str) -> str:
    if url and not re.match(_SITE + r'(?:/[^?#\s]*)?\Z', url, re.ASCII):
        raise ConfigError('the endpoint_url must look like https://host[:port]; check it where it is set: in the '
                          'settings, the AWS profile or a variable such as $AWS_ENDPOINT_URL')
    return url.rstrip('/')


def _http_time(text: str) -> float:
    from email.utils import parsedate_to_datetime
    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError, OSError):  # OSError: on Windows, for years before 1970
        return 0.0


def _utc(seconds: float, form: str = '%Y-%m-%dT%H:%M:%SZ') -> str:
    """A unix time as text, or '' beyond the year 9999; time.gmtime() ends in 2038 on some 32-bit systems."""
    from datetime import datetime, timedelta
    try:
        return (datetime(1970, 1, 1) + timedelta(seconds=seconds)).strftime(form)
    except OverflowError:
        return ''


def _timestamp(text: str) -> float:
    """Unix time of an ISO 8601 time, of UTC unless it has an offset; 0 if it is none."""
    from calendar import timegm
    offset = re.match(r'[.0-9]*([+-]\d\d):?(\d\d)\Z', text[19:])
    minutes = int(offset.group(1)) * 60 + int(offset.group(1)[0] + offset.group(2)) if offset else 0
    try:
        return float(timegm(time.strptime(text[:19], '%Y-%m-%dT%H:%M:%S'))) - 60 * minutes
    except ValueError:
        return 0.0


def _json_object(reply: _Reply) -> Dict[str, Any]:
    """The object that an answer holds; {} if it holds none."""
    try:
        answer = json.loads(reply.page().decode('utf-8'))
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


class _Renewed:
    """Something that must be fetched anew before it expires; threads share it."""

    def __init__(self, fetch: Callable[[], Tuple[Any, float]]) -> None:
        """fetch: gives the thing, or None if there is none, and the unix time until when it lives."""
        import threading
        self.fetch = fetch
        self.lock = threading.Lock()
        self.value = None  # type: Any
        self.expires = 0.0

    def get(self) -> Any:
        with self.lock:
            if time.time() > self.expires - 120:
                self.value, self.expires = self.fetch()
            return self.value

    def renew(self, used: Any) -> None:
        """Forget what a refused request carried."""
        with self.lock:
            if used == self.value:
                self.expires = 0


# ---------------------------------------------------------------------------------------
# AWS: credentials and signatures
# ---------------------------------------------------------------------------------------

_AwsSections = Dict[Tuple[str, str], Dict[str, str]]
_AWS_KEYS = ('aws_access_key_id', 'aws_secret_access_key', 'aws_session_token')
_AWS_CLOCK = ('RequestTimeTooSkewed', 'RequestExpired', 'RequestInTheFuture', 'SignatureDoesNotMatch')
_AWS_REGION = r'[A-Za-z0-9_.-]{1,32}\Z'  # other stores have names of their own
_AWS_SUFFIXES = {'cn': 'amazonaws.com.cn', 'eusc-de': 'amazonaws.eu', 'us-iso': 'c2s.ic.gov',
                 'us-isob': 'sc2s.sgov.gov', 'us-isof': 'csp.hci.ic.gov', 'eu-isoe': 'cloud.adc-e.uk'}
_AWS_CONTAINER_HOSTS = ('169.254.170.2', '169.254.170.23', 'fd00:ec2::23', 'localhost')  # and https, and loopback


class _AwsKeys(NamedTuple):
    access_key: str
    secret_key: str
    token: Optional[str] = None
    expires: float = 1e12  # unix time
    source: str = ''  # where they were found, for people


class _Aws:
    """Whom AWS's own tools would act as here: https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html

    Keys are kept until they expire. region: where to sign for and to ask for keys, if nothing else is said.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sections = _aws_sections()
        self.name = (config.aws_profile or os.environ.get('AWS_PROFILE') or os.environ.get('AWS_DEFAULT_PROFILE')
                     or 'default')
        self.profile = self._profile(self.name, 'aws_profile or $AWS_PROFILE')
        self.region = _check_region(config.region or os.environ.get('AWS_REGION') or os.environ.get(
            'AWS_DEFAULT_REGION') or self.profile.get('region') or 'us-east-1')
        self.http = _Http(config.ca_bundle or os.environ.get('AWS_CA_BUNDLE') or self.profile.get('ca_bundle'))
        self.skew = 0.0  # seconds that the services' clock is ahead of ours
        self.library = None  # type: Any
        self._keys = _Renewed(self._find)

    def keys(self) -> Optional[_AwsKeys]:
        """Those to sign with now; None means unsigned requests."""
        return self._keys.get()  # type: ignore[no-any-return]

    def learn(self, reply: _Reply, code: str) -> None:
        """Go by the server's clock where it refuses a signature and the two differ much."""
        ahead = _http_time(reply.headers.get('Date') or '') - time.time()
        if code in _AWS_CLOCK and 300 < abs(ahead - self.skew) < 1e9 and 'Date' in reply.headers:
            self.skew = ahead
            _say("this machine's clock is %.0f minutes off; going by that of the server", abs(ahead) / 60,
                 level=_WARNING)

    def renew(self, keys: Optional[_AwsKeys]) -> None:
        """Look for others than these, which were refused."""
        self._keys.renew(keys)

    def signer(self, keys: Optional[_AwsKeys], service: str, region: str, digest: str) -> _Signer:
        """Signs, by the clock as it is known now, requests whose body has this SHA-256."""
        skew = self.skew

        def sign(method: str, url: str, headers: Dict[str, str], body: Iterable[bytes]) -> Dict[str, str]:
            if not keys:
                return headers
            return _aws_sign(method, url, headers, digest, keys, region, service, time.time() + skew)
        return sign

    def host(self, service: str, region: str) -> str:
        """A service's own address: https://docs.aws.amazon.com/general/latest/gr/rande.html"""
        _check_region(region)
        if self._flag('use_fips_endpoint') and (service == 's3' or not region.startswith('us-gov-')):
            service += '-fips'
        if self._flag('use_dualstack_endpoint') and service in ('s3', 's3-fips'):
            service += '.dualstack'
        return 'https://%s.%s.%s' % (service, region, _AWS_SUFFIXES.get(region.rsplit('-', 2)[0], 'amazonaws.com'))

    def endpoint(self, service: str) -> str:
        """The address that is set for a service instead of its own, or ''."""
        if self._flag('ignore_configured_endpoint_urls'):
            return ''
        services = self.sections.get(('services', self.profile.get('services', '')), {})
        return _check_endpoint(
            os.environ.get('AWS_ENDPOINT_URL_' + service.upper()) or os.environ.get('AWS_ENDPOINT_URL')
            or _aws_nested(services, service, 'endpoint_url') or self.profile.get('endpoint_url') or '')

    def _flag(self, key: str) -> bool:
        return (os.environ.get('AWS_' + key.upper()) or self.profile.get(key) or '').lower() == 'true'

    def _profile(self, name: str, source: str) -> Dict[str, str]:
        found = self.sections.get(('profile', name))
        if found is None and name != 'default':
            raise ConfigError('the AWS profile that %s names is not in ~/.aws/config or ~/.aws/credentials; check both'
                              % source)
        return found or {}

    def _find(self) -> Tuple[Optional[_AwsKeys], float]:
        self.sections = _aws_sections()  # which other tools may have changed meanwhile
        keys = _aws_static(vars(self.config), 'the settings')
        if not keys and not self.config.aws_profile:  # a profile that was asked for goes before the environment
            keys = self._from_environment()
        keys = keys or self._from_profile(self.name) or self._from_container() or self._from_instance()
        # some services go on to give the same keys until shortly before they expire; and our clock may be wrong
        return keys, max(keys.expires, time.time() + 300) if keys else 1e12

    def _from_environment(self) -> Optional[_AwsKeys]:
        return _aws_static({key: os.environ.get(key.upper()) for key in _AWS_KEYS}, 'the environment')

    def _from_profile(self, name: str, above: Tuple[str, ...] = ()) -> Optional[_AwsKeys]:
        """above: the profiles for which this one is the source."""
        profile = self._profile(name, "the source_profile of '%s'" % ''.join(above[-1:]))
        own = _aws_static(profile, "the AWS profile '%s'" % name)
        if 'role_arn' in profile and 'web_identity_token_file' not in profile and not (above and own):
            return self._from_role(name, profile, above)

        def setting(key: str) -> Optional[str]:
            from_environment = not above and not self.config.aws_profile and os.environ.get('AWS_' + key.upper())
            return from_environment or profile.get(key)

        token_file = setting('web_identity_token_file')
        if token_file:
            token = _read_secret(token_file, 'web_identity_token_file or $AWS_WEB_IDENTITY_TOKEN_FILE')
            return self._sts("web identity", 'AssumeRoleWithWebIdentity', None, {
                'RoleArn': setting('role_arn'), 'RoleSessionName': setting('role_session_name'),
                'WebIdentityToken': token})
        if 'sso_account_id' in profile or 'sso_role_name' in profile:
            return self._from_sso(name, profile)
        if 'login_session' in profile:
            return self._from_library(name, 'aws login --profile ' + name)
        if 'credential_process' in profile:
            return self._from_process(name, profile['credential_process'])
        return own

    def _from_role(self, name: str, profile: Dict[str, str], above: Tuple[str, ...]) -> _AwsKeys:
        """https://docs.aws.amazon.com/sdkref/latest/guide/feature-assume-role-credentials.html"""
        if 'mfa_serial' in profile:
            command = 'eval "$(aws configure export-credentials --profile %s --format env)"' % name
            return self._from_library(name, command)
        source, kind = profile.get('source_profile'), profile.get('credential_source')
        kinds = {'Environment': self._from_environment, 'EcsContainer': self._from_container,
                 'Ec2InstanceMetadata': self._from_instance}
        if bool(source) == bool(kind) or kind and kind not in kinds or source in above:
            raise ConfigError("the AWS profile '%s' needs, beside role_arn, either a source_profile that does not lead "
                              "back to it, or a credential_source of %s" % (name, ', '.join(sorted(kinds))))
        keys = self._from_profile(source, above + (name,)) if source else kinds[str(kind)]()
        if not keys:
            raise ConfigError("the AWS profile '%s' finds no credentials in %s" % (name, source or kind))
        return self._sts("the AWS profile '%s'" % name, 'AssumeRole', keys, {
            'RoleArn': profile['role_arn'], 'RoleSessionName': profile.get('role_session_name'),
            'ExternalId': profile.get('external_id'), 'DurationSeconds': profile.get('duration_seconds')})

    def _sts(self, source: str, action: str, keys: Optional[_AwsKeys], form: Dict[str, Optional[str]]) -> _AwsKeys:
        """https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html"""
        from urllib.parse import urlencode
        if not (form['RoleArn'] or '').startswith('arn:'):
            raise ConfigError("%s is configured without a role; set role_arn or $AWS_ROLE_ARN to 'arn:...'" % source)
        form = dict(form, Action=action, Version='2011-06-15',
                    RoleSessionName=form['RoleSessionName'] or 'etcetera-%d' % time.time())
        body = urlencode({key: value for key, value in form.items() if value}).encode()
        url = (self.endpoint('sts') or self.host('sts', self.region)) + '/'
        headers = {'Content-Type': 'application/x-www-form-urlencoded; charset=utf-8'}
        for _ in range(2):
            skew = self.skew
            sign = self.signer(keys, 'sts', self.region, _sha256(body).hexdigest())
            reply = self.http.request('POST', url, headers, [body], sign, 1 << 20)
            code, message = _aws_error(reply)[:2]
            self.learn(reply, code)
            if self.skew == skew:  # or it is worth another try
                break
        if reply.status != 200:
            raise RemoteError('%s: AWS STS answers %s: %s; check the role_arn %s and who may assume it' % (
                source, ' '.join((str(reply.status), code)).strip(), _printable(message)[:300] or 'no explanation',
                _printable(str(form['RoleArn']))), reply.status)
        try:
            found = {item.tag: item.text for part in _xml(reply.page()).iter('Credentials') for item in part}
        except ValueError:
            found = {}
        return _aws_temporary(found, source)

    def _from_sso(self, name: str, profile: Dict[str, str]) -> _AwsKeys:
        """https://docs.aws.amazon.com/singlesignon/latest/PortalAPIReference/API_GetRoleCredentials.html"""
        import hashlib
        source, session = "the AWS profile '%s'" % name, profile.get('sso_session')
        settings = dict(profile, **self.sections.get(('sso-session', session or ''), {}))
        needed = ('sso_start_url', 'sso_region', 'sso_account_id', 'sso_role_name')
        missing = ' and '.join(key for key in needed if key not in settings)
        if missing:
            raise ConfigError("%s lacks %s; run: aws configure sso --profile %s" % (source, missing, name))
        logged_out = ConfigError("%s is not logged in, or no longer; run: aws sso login --profile %s" % (source, name))
        region = settings['sso_region']
        path = os.path.join(_expanduser('~'), '.aws', 'sso', 'cache',
                            hashlib.sha1((session or settings['sso_start_url']).encode()).hexdigest() + '.json')
        try:
            with open(path, 'rb') as file:
                token = json.loads(file.read().decode('utf-8-sig'))
            left = _timestamp(token['expiresAt']) - time.time()
            if left < 300 and session and 'refreshToken' in token:
                token = self._renew_sso(token, path, region) or token
                left = _timestamp(token['expiresAt']) - time.time()
            headers = {'x-amz-sso_bearer_token': str(token['accessToken'])}
        except (OSError, ValueError, KeyError, TypeError):
            raise logged_out from None
        if left < 0:
            raise logged_out
        reply = self.http.request('GET', '%s/federation/credentials?role_name=%s&account_id=%s' % (
            self.endpoint('sso') or self.host('portal.sso', region), _quote(settings['sso_role_name']),
            _quote(settings['sso_account_id'])), headers, limit=1 << 20)
        if reply.status == 401:
            raise logged_out
        return _aws_temporary(_json_object(reply).get('roleCredentials'), source, reply)

    def _renew_sso(self, token: Dict[str, Any], path: str, region: str) -> Optional[Dict[str, Any]]:
        """A new access token, kept where the AWS tools keep it; None if only a new login gives one.

        https://docs.aws.amazon.com/singlesignon/latest/OIDCAPIReference/API_CreateToken.html
        """
        if _timestamp(token.get('registrationExpiresAt') or '') < time.time():
            return None
        form = {'grantType': 'refresh_token', 'clientId': token['clientId'], 'clientSecret': token['clientSecret'],
                'refreshToken': token['refreshToken']}
        reply = self.http.request('POST', (self.endpoint('sso_oidc') or self.host('oidc', region)) + '/token',
                                  {'Content-Type': 'application/json'}, [json.dumps(form).encode()], limit=1 << 20)
        answer = _json_object(reply)
        if reply.status != 200 or 'accessToken' not in answer:
            return None
        expires = _utc(time.time() + float(answer.get('expiresIn') or 0))
        token = dict(token, accessToken=answer['accessToken'], expiresAt=expires,
                     refreshToken=answer.get('refreshToken') or token['refreshToken'])
        new = '%s.%s' % (path, os.urandom(8).hex())
        with contextlib.suppress(OSError):
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as file:
                json.dump(token, file)
            os.replace(new, path)
        return token

    def _from_process(self, name: str, command: str) -> _AwsKeys:
        """https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html"""
        import shlex
        import subprocess
        source = "the credential_process of the AWS profile '%s'" % name
        try:
            done = subprocess.run(command if os.name == 'nt' else shlex.split(command), stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
        except (OSError, ValueError) as e:
            raise ConfigError('%s cannot be run: %s' % (source, getattr(e, 'strerror', None) or e)) from None
        if done.returncode:
            raise ConfigError('%s fails (%d): %s' % (source, done.returncode, _printable(
                done.stderr.decode('utf-8', 'replace').strip())[-300:] or 'no explanation'))
        try:
            answer = json.loads(done.stdout.decode('utf-8-sig'))
        except ValueError:
            answer = None
        return _aws_temporary(answer if isinstance(answer, dict) and answer.get('Version') == 1 else None, source)

    def _from_container(self) -> Optional[_AwsKeys]:
        """https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html"""
        from ipaddress import ip_address
        from urllib.parse import urlsplit
        relative = os.environ.get('AWS_CONTAINER_CREDENTIALS_RELATIVE_URI')
        url = 'http://169.254.170.2' + relative if relative else os.environ.get('AWS_CONTAINER_CREDENTIALS_FULL_URI')
        if not url:
            return None
        try:
            parts = urlsplit(url)
            host = parts.hostname or ''
            trusted = parts.scheme == 'https' or parts.scheme == 'http' and host in _AWS_CONTAINER_HOSTS
            if not trusted and not (parts.scheme == 'http' and ip_address(host).is_loopback):
                raise ValueError
        except ValueError:
            raise ConfigError('$AWS_CONTAINER_CREDENTIALS_FULL_URI must begin with https://, or with http:// and a '
                              'loopback address or one of ' + ', '.join(_AWS_CONTAINER_HOSTS)) from None
        variable = 'AWS_CONTAINER_AUTHORIZATION_TOKEN'
        path = os.environ.get(variable + '_FILE')
        token = _read_secret(path, '$%s_FILE' % variable) if path else os.environ.get(variable)
        if token and not re.match(r'[ -~]+\Z', token):
            raise ConfigError('$AWS_CONTAINER_AUTHORIZATION_TOKEN holds characters that it cannot have')
        with contextlib.closing(_Http(self.http.ca_bundle, direct=True, timeout=2)) as http:
            reply = http.request('GET', url, {'Authorization': token} if token else {}, limit=65536, tries=3)
        return _aws_temporary(_json_object(reply), "the container's credentials service", reply)

    def _from_instance(self) -> Optional[_AwsKeys]:
        """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html, version 2"""
        if self._flag('ec2_metadata_disabled'):
            return None
        mode = os.environ.get('AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE', '').lower()
        base = (os.environ.get('AWS_EC2_METADATA_SERVICE_ENDPOINT') or self.profile.get('ec2_metadata_service_endpoint')
                or ('http://[fd00:ec2::254]' if mode == 'ipv6' else 'http://169.254.169.254'))
        base = _check_endpoint(base) + '/latest/'
        with contextlib.closing(_Http(self.http.ca_bundle, direct=True, timeout=1)) as http:
            try:
                headers = {'X-aws-ec2-metadata-token-ttl-seconds': '21600'}
                reply = http.request('PUT', base + 'api/token', headers, limit=65536, tries=1)
                token = reply.body.decode('ascii', 'replace')
                if reply.status == 200 and re.match(r'[!-~]+\Z', token):
                    headers, path = {'X-aws-ec2-metadata-token': token}, base + 'meta-data/iam/security-credentials/'
                    reply = http.request('GET', path, headers, limit=65536, tries=1)
                    role = reply.body.decode('ascii', 'replace').strip()
                    if reply.status == 200 and re.match(r'[\w+=,.@-]+\Z', role):
                        reply = http.request('GET', path + role, headers, limit=65536, tries=1)
                        answer = _json_object(reply)
                        if answer.get('AccessKeyId'):
                            return _aws_temporary(answer, "the instance's role '%s'" % role)
            except RemoteError as e:
                _say('no instance metadata: %s', e, level=_DEBUG)
        return None

    def _from_library(self, name: str, command: str) -> _AwsKeys:
        """What asks people, or needs more than the standard library: by botocore, if it is there."""
        from importlib import import_module  # so that no type checker looks for what need not be there
        source = "the AWS profile '%s'" % name
        try:
            session_module, utils = import_module('botocore.session'), import_module('botocore.utils')
        except ImportError:
            raise ConfigError("%s needs more than the standard library; run: pip install boto3, or: %s"
                              % (source, command)) from None
        try:
            if self.library is None:
                session = session_module.Session(profile=name)
                cache = utils.JSONFileCache(_expanduser('~/.aws/cli/cache'))  # so it asks once an hour
                session.get_component('credential_provider').get_provider('assume-role').cache = cache
                self.library = session.get_credentials()
            found = self.library.get_frozen_credentials()
        except Exception as e:  # it lets out AttributeErrors and the like, too
            raise ConfigError('%s cannot be used: %s; try: %s' % (
                source, _printable(str(e) or type(e).__name__), command)) from None
        return _AwsKeys(found.access_key, found.secret_key, found.token, time.time() + 600, source)


def _check_region(region: str) -> str:
    if not re.match(_AWS_REGION, region):
        raise ConfigError("what is set is no region; check 'region', $AWS_REGION and the AWS profile")
    return region


def _aws_sections() -> _AwsSections:
    """~/.aws/config and ~/.aws/credentials by kind and name of a section; keys in the latter go first."""
    import configparser
    found = {}  # type: _AwsSections
    for variable, default in (('AWS_CONFIG_FILE', '~/.aws/config'),
                              ('AWS_SHARED_CREDENTIALS_FILE', '~/.aws/credentials')):
        path = _expanduser(os.path.expandvars(os.environ.get(variable) or default))  # as botocore does
        parser = configparser.RawConfigParser(strict=False)
        try:
            with open(path, encoding='utf-8-sig') as file:
                parser.read_file(file)
        except OSError:
            continue
        except (configparser.Error, UnicodeDecodeError):
            raise ConfigError("%s cannot be read as an AWS settings file; mend it" % path) from None
        for section in parser.sections():
            kind, _, name = section.partition(' ')
            if section == 'default' or variable != 'AWS_CONFIG_FILE':
                kind, name = 'profile', section
            values = found.setdefault((kind, name.strip(' \t"\'')), {})
            own = {key: value.strip() for key, value in parser.items(section)}
            values.update(own)
            if kind == 'profile' and variable != 'AWS_CONFIG_FILE' and 'aws_access_key_id' in own:
                for lesser in {'aws_session_token'} - set(own) | {'credential_process', 'login_session'}:
                    values.pop(lesser, None)
    return found


def _aws_nested(section: Dict[str, str], name: str, key: str) -> str:
    """The value of `key` among the indented lines below `name`, or ''."""
    match = re.search(r'^\s*%s\s*=\s*(\S+)' % key, section.get(name, ''), re.MULTILINE)
    return match.group(1) if match else ''


def _aws_static(values: Any, source: str) -> Optional[_AwsKeys]:
    """Keys that stand there as such, if any do."""
    access_key, secret_key, token = ((values.get(key) or '').strip() for key in _AWS_KEYS)
    if bool(access_key) != bool(secret_key):
        raise ConfigError('%s: aws_access_key_id and aws_secret_access_key go together; set both' % source)
    for key, value in zip(_AWS_KEYS, (access_key, secret_key, token)):
        if not re.match(r'[!-~]*\Z', value):
            raise ConfigError('%s: %s holds characters that it cannot have; copy it again' % (source, key))
    return _AwsKeys(access_key, secret_key, token or None, source=source) if access_key else None


def _aws_temporary(answer: Any, source: str, reply: Optional[_Reply] = None) -> _AwsKeys:
    """Keys as STS, SSO, a process or a metadata service gives them, each with names of its own."""
    if reply and reply.status != 200:
        message = _json_object(reply).get('message') or _json_object(reply).get('Message') or 'no explanation'
        raise RemoteError('%s answers %d: %s; check what it may do'
                          % (source, reply.status, _printable(str(message))[:300]), reply.status)
    values = {key[:1].upper() + key[1:]: value for key, value in answer.items()} if isinstance(answer, dict) else {}
    access_key, secret_key = values.get('AccessKeyId'), values.get('SecretAccessKey')
    token = values.get('SessionToken') or values.get('Token') or ''
    if not all(isinstance(key, str) and re.match(r'[!-~]+\Z', key) for key in (access_key, secret_key, token or '-')):
        raise RemoteError('%s gives nothing that can be used as credentials' % source)
    expires = values.get('Expiration')  # SSO gives milliseconds
    if isinstance(expires, (int, float)):
        expires /= 1000
    else:
        expires = _timestamp(expires) if isinstance(expires, str) else 1e12
    return _AwsKeys(str(access_key), str(secret_key), token or None, expires, source)


def _read_secret(path: str, source: str) -> str:
    """A token from a file; `source` is what names it."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError('cannot read the file with a token that %s names: %s; check the path and who may read it'
                          % (source, getattr(e, 'strerror', 'not text'))) from None


def _aws_error(reply: _Reply) -> Tuple[str, str, str]:
    """The code, message and region of an S3 error; empty if it is none."""
    try:
        root = _xml(reply.page())
    except ValueError:
        return '', '', ''
    error = root.find('.//Error') if root.tag == 'ErrorResponse' else root  # as STS wraps it
    if error is None or error.tag != 'Error':
        return '', '', ''
    return error.findtext('Code') or '', error.findtext('Message') or '', error.findtext('Region') or ''


def _quote(text: str, safe: str = '') -> str:
    """Percent-encode as Signature Version 4 and Google want it: all but A-Z a-z 0-9 - . _ ~"""
    from urllib.parse import quote
    return quote(text, safe=safe + '~')


def _aws_sign(method: str, url: str, headers: Dict[str, str], payload_hash: str, keys: _AwsKeys,
              region: str, service: str, now: float) -> Dict[str, str]:
    """`headers` with those of AWS Signature Version 4 added; `url` as it is sent, percent-encoded.

    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    import hmac
    from urllib.parse import urlsplit
    parts = urlsplit(url)
    stamp = _utc(now, '%Y%m%dT%H%M%SZ')
    headers = dict(headers, **{'x-amz-date': stamp, 'x-amz-content-sha256': payload_hash})
    if keys.token:
        headers['x-amz-security-token'] = keys.token
    netloc = parts.netloc.rpartition('@')[2]
    canonical = {key.lower(): ' '.join(value.split()) for key, value in headers.items()}
    canonical['host'] = re.sub(':443$' if parts.scheme == 'https' else ':80$', '', netloc)
    query = sorted((key, value) for key, _, value in (pair.partition('=') for pair in parts.query.split('&') if pair))
    names = ';'.join(sorted(canonical))
    request = '\n'.join([method, parts.path or '/', '&'.join('%s=%s' % pair for pair in query),
                         ''.join('%s:%s\n' % (key, canonical[key]) for key in sorted(canonical)), names, payload_hash])
    scope = '/'.join([stamp[:8], region, service, 'aws4_request'])
    text = '\n'.join(['AWS4-HMAC-SHA256', stamp, scope, _sha256(request.encode()).hexdigest()])
    key = ('AWS4' + keys.secret_key).encode()
    for part in scope.split('/'):
        key = hmac.new(key, part.encode(), 'sha256').digest()
    headers['Authorization'] = 'AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s' % (
        keys.access_key, scope, names, hmac.new(key, text.encode(), 'sha256').hexdigest())
    return headers


# ---------------------------------------------------------------------------------------
# Google: credentials
# ---------------------------------------------------------------------------------------

_GOOGLE_SCOPE = 'https://www.googleapis.com/auth/devstorage.full_control'  # read_write may not make objects public
_GOOGLE_PLATFORM = 'https://www.googleapis.com/auth/cloud-platform'
_GOOGLE_TOKEN_URL = 'https://oauth2.googleapis.com/token'


class _GoogleCredentials:
    """Access tokens, kept until they expire. Application default credentials: https://google.aip.dev/auth/4110"""

    def __init__(self, config: Config, http: _Http) -> None:
        self.http = http
        self.path = _google_file(config)
        self.info = _read_google_file(self.path) if self.path else {}
        self.token = _Renewed(self._fetch)

    def _fetch(self) -> Tuple[Optional[str], float]:
        token, seconds = _google_token(self.info, self.http, _GOOGLE_SCOPE, self.path)
        return token, time.time() + seconds

    def headers(self) -> Dict[str, str]:
        """Those that authorize a request; {} for an anonymous one."""
        token = self.token.get()
        headers = {'Authorization': 'Bearer ' + token} if token else {}
        project = os.environ.get('GOOGLE_CLOUD_QUOTA_PROJECT') or self.info.get('quota_project_id')
        if headers and project:
            headers['x-goog-user-project'] = project
        return headers

    def renew(self, headers: Dict[str, str]) -> bool:
        """Forget the token that a refused request carried; whether another one can be had."""
        self.token.renew(headers.get('Authorization', '').partition(' ')[2])
        return bool(headers)


def _google_file(config: Config) -> str:
    """The credentials file that Google's own tools would take, or ''."""
    named = config.google_credentials or os.environ.get('GOOGLE_APPLICATION_CREDENTIALS')
    if named:
        return _expanduser(named)
    folder = os.environ.get('CLOUDSDK_CONFIG') or (
        os.path.join(os.environ.get('APPDATA') or os.path.join(os.environ.get('SystemDrive', 'C:'), os.sep), 'gcloud')
        if os.name == 'nt' else os.path.join(_expanduser('~'), '.config', 'gcloud'))
    path = os.path.join(folder, 'application_default_credentials.json')
    return path if os.path.isfile(path) else ''


def _read_google_file(path: str) -> Dict[str, Any]:
    try:
        with open(path, 'rb') as file:
            info = json.loads(file.read().decode('utf-8-sig'))
    except OSError as e:
        raise ConfigError('cannot read the Google credentials: %s; check google_credentials and '
                          '$GOOGLE_APPLICATION_CREDENTIALS' % e.strerror) from None
    except ValueError:
        info = None
    if not isinstance(info, dict) or 'type' not in info:
        raise ConfigError("%s holds no Google credentials; download the file again, or run 'gcloud auth "
                          "application-default login'" % path)
    return info


def _google_token(info: Dict[str, Any], http: _Http, scope: str, path: str) -> Tuple[Optional[str], float]:
    """An access token and the seconds that it lives; (None, ever) without credentials."""
    try:
        kind = info.get('type')
        if not info:
            return _google_metadata_token(scope)
        if kind == 'service_account':
            url = info.get('token_uri') or _GOOGLE_TOKEN_URL
            return _google_post(http, url, {'grant_type': 'urn:ietf:params:oauth:grant-type:jwt-bearer',
                                            'assertion': _google_jwt(info, url, scope)})
        if kind == 'authorized_user':
            return _google_post(http, info.get('token_uri') or _GOOGLE_TOKEN_URL, {
                'grant_type': 'refresh_token', 'client_id': info['client_id'],
                'client_secret': info['client_secret'], 'refresh_token': info['refresh_token']})
        source = info.get('credential_source')
        if kind == 'external_account' and isinstance(source, dict) and (
                'file' in source or 'url' in source and 'environment_id' not in source):  # that would be AWS's
            return _google_exchange(info, source, http, scope)
        if kind == 'impersonated_service_account':
            token, _ = _google_token(info['source_credentials'], http, _GOOGLE_PLATFORM, path)
            return _google_impersonate(info, http, scope, token)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ConfigError('the Google credentials %s cannot be used: %s is missing or wrong'
                          % (path or 'of this machine', e)) from None
    return _google_library_token(path, str(kind), scope)


def _google_post(http: _Http, url: str, form: Dict[str, str], headers: Optional[Dict[str, str]] = None,
                 ) -> Tuple[str, float]:
    """Ask a token endpoint (RFC 6749, 4.1.4)."""
    from urllib.parse import urlencode
    answer = _google_json(http, 'POST', url, dict(headers or {}, **{
        'Content-Type': 'application/x-www-form-urlencoded'}), [urlencode(form).encode()])
    return _google_bearer(answer['access_token']), float(answer.get('expires_in') or 3600)


def _google_bearer(token: Any) -> str:
    """A token that can stand in a header (RFC 6750, 2.1)."""
    if not isinstance(token, str) or not re.match(r'[ -~]+\Z', token):
        raise ValueError('access_token')
    return token


def _google_json(http: _Http, method: str, url: str, headers: Dict[str, str], body: Sequence[bytes],
                 ) -> Dict[str, Any]:
    if not re.match(r'https?://', url):
        raise ValueError('the address of a token')
    reply = http.request(method, url, headers, body, limit=1 << 20)
    answer = _json_object(reply)
    if reply.status != 200:
        problem = answer.get('error_description') or answer.get('error') or reply.status
        if isinstance(problem, dict):
            problem = problem.get('message')
        raise RemoteError("%s gives no access token: %s; check the Google credentials, or run 'gcloud auth "
                          "application-default login'" % (_site(url), _printable(str(problem))[:300]),
                          reply.status)
    return answer


def _google_jwt(info: Dict[str, Any], audience: str, scope: str) -> str:
    """A signed assertion of a service account (RFC 7523; https://google.aip.dev/auth/4112)."""
    now = int(time.time())
    parts = [{'alg': 'RS256', 'typ': 'JWT', 'kid': info.get('private_key_id', '')},
             {'iss': info['client_email'], 'scope': scope, 'aud': audience, 'iat': now, 'exp': now + 3600}]
    text = b'.'.join(_base64url(json.dumps(part).encode()) for part in parts)
    return (text + b'.' + _base64url(_rsa_sign(info['private_key'], text))).decode()


def _base64url(data: bytes) -> bytes:
    from base64 import urlsafe_b64encode
    return urlsafe_b64encode(data).rstrip(b'=')


def _rsa_sign(pem: str, message: bytes) -> bytes:
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, 8.2.1), with a key in PKCS#8 (RFC 5208) or PKCS#1."""
    from base64 import b64decode
    match = re.search('-----BEGIN (?:RSA )?PRIVATE KEY-----(.*?)-----END', pem, re.S)
    if not match:
        raise ValueError('private_key')
    try:
        fields = _der_sequence(b64decode(match.group(1)))
        if isinstance(fields[1], list):  # PKCS#8 wraps PKCS#1 in an octet string
            fields = _der_sequence(fields[2])
        modulus, exponent = fields[1], fields[3]
        size = (modulus.bit_length() + 7) // 8
    except (ValueError, IndexError, TypeError, AttributeError):
        raise ValueError('private_key') from None
    digest_info = bytes.fromhex('3031300d060960864801650304020105000420') + _sha256(message).digest()
    padded = b'\0\1' + b'\xff' * (size - len(digest_info) - 3) + b'\0' + digest_info
    return pow(int.from_bytes(padded, 'big'), exponent, modulus).to_bytes(size, 'big')  # type: ignore[no-any-return]


def _der_sequence(data: bytes) -> List[Any]:
    """The items of a DER sequence (X.690): integers as int, sequences as list, others as bytes."""
    def item(data: bytes) -> Tuple[Any, bytes]:
        length, start = data[1], 2
        if length & 0x80:
            start += length & 0x7f
            length = int.from_bytes(data[2:start], 'big')
        value, rest = data[start:start + length], data[start + length:]
        if data[0] == 0x02:
            return int.from_bytes(value, 'big'), rest
        if data[0] == 0x30:
            items = []
            while value:
                found, value = item(value)
                items.append(found)
            return items, rest
        return value, rest

    try:
        found, _ = item(data)
        return found if isinstance(found, list) else []
    except IndexError:
        raise ValueError('private_key') from None


def _google_exchange(info: Dict[str, Any], source: Dict[str, Any], http: _Http, scope: str) -> Tuple[str, float]:
    """Workload identity federation: another identity's token for one of Google's (https://google.aip.dev/auth/4117)."""
    from base64 import b64encode
    if 'file' in source:
        subject = _read_secret(source['file'], 'the credential_source')
    else:
        reply = http.request('GET', source['url'], dict(source.get('headers') or {}), limit=1 << 20)
        if reply.status != 200:
            raise RemoteError('%s gives no identity token: %d' % (_site(source['url']), reply.status))
        subject = reply.body.decode('utf-8')
    if (source.get('format') or {}).get('type') == 'json':
        subject = json.loads(subject)[source['format']['subject_token_field_name']]
    impersonate = info.get('service_account_impersonation_url')
    form = {'grant_type': 'urn:ietf:params:oauth:grant-type:token-exchange', 'audience': info['audience'],
            'scope': _GOOGLE_PLATFORM if impersonate else scope,
            'requested_token_type': 'urn:ietf:params:oauth:token-type:access_token',
            'subject_token': subject, 'subject_token_type': info['subject_token_type']}
    headers = {}
    if info.get('client_id'):
        user = '%s:%s' % (info['client_id'], info.get('client_secret') or '')
        headers['Authorization'] = 'Basic ' + b64encode(user.encode()).decode()
    elif info.get('workforce_pool_user_project'):
        form['options'] = json.dumps({'userProject': info['workforce_pool_user_project']})
    token, seconds = _google_post(http, info['token_url'], form, headers)
    return _google_impersonate(info, http, scope, token) if impersonate else (token, seconds)


def _google_impersonate(info: Dict[str, Any], http: _Http, scope: str, token: Optional[str]) -> Tuple[str, float]:
    """A service account's token with another identity's (IAM Credentials API, generateAccessToken)."""
    lifetime = (info.get('service_account_impersonation') or {}).get('token_lifetime_seconds') or 3600
    answer = _google_json(http, 'POST', info['service_account_impersonation_url'], {
        'Authorization': 'Bearer %s' % token, 'Content-Type': 'application/json'},
        [json.dumps({'scope': [scope], 'delegates': info.get('delegates') or [],
                     'lifetime': '%ds' % lifetime}).encode()])
    return _google_bearer(answer['accessToken']), max(0.0, _timestamp(answer['expireTime']) - time.time())


def _google_metadata_token(scope: str) -> Tuple[Optional[str], float]:
    """Of the machine's own service account (https://cloud.google.com/compute/docs/metadata); none elsewhere."""
    host = os.environ.get('GCE_METADATA_HOST') or os.environ.get('GCE_METADATA_ROOT') or 'metadata.google.internal'
    if os.environ.get('NO_GCE_CHECK', '').lower() == 'true':
        return None, 1e9
    with contextlib.closing(_Http(None, direct=True, timeout=3)) as http, contextlib.suppress(RemoteError):
        reply = http.request('GET', 'http://%s/computeMetadata/v1/instance/service-accounts/default/token?scopes=%s'
                             % (host, _quote(scope)), {'Metadata-Flavor': 'Google'}, limit=65536, tries=1)
        if reply.headers.get('Metadata-Flavor') == 'Google' and reply.status == 200:
            answer = _json_object(reply)
            return _google_bearer(answer['access_token']), float(answer['expires_in'])
    return None, 1e9


def _google_library_token(path: str, kind: str, scope: str) -> Tuple[Optional[str], float]:
    """Of kinds that need a program, a certificate or what else may come: by Google's library, if it is there."""
    from importlib import import_module  # as for botocore
    try:
        auth, transport = import_module('google.auth'), import_module('google.auth.transport.requests')
    except ImportError:
        raise ConfigError("credentials of type '%s' in %s are beyond etcetera; run: pip install google-cloud-storage"
                          % (_printable(kind), path)) from None
    try:
        credentials, _ = auth.load_credentials_from_file(path, scopes=[scope])
        credentials.refresh(transport.Request())
    except Exception as e:  # it lets out TypeErrors and the like, too
        raise ConfigError('the Google credentials %s cannot be used: %s' % (path, e)) from None
    return credentials.token, 600.0


# ---------------------------------------------------------------------------------------
# Remotes: where archives are kept. Each kind lists, tells what is there, reads and writes.
# ---------------------------------------------------------------------------------------

_PART = 8 << 20  # bytes of a part of a multipart upload; S3 wants 5 MiB or more
_PARTS = 10000  # S3's most
_IN_FLIGHT = 64 << 20  # bytes of parts that may be under way at once

_Object = collections.namedtuple('_Object', 'name size version modified')  # version: opaque; modified: unix time


class _Taken(Exception):
    """An object of that name exists, and was to be written only if absent."""


class _Unconfirmed(RemoteError):
    """The answer to a write does not say, in the form that the API defines, that the object is there."""


class _Unlisted(RemoteError):
    """The server gives objects by name, but shows no list of them."""


def _bucket_and_prefix(url: str) -> Tuple[str, str]:
    """('bucket', 'pre/fix/') of s3://bucket/pre/fix; the prefix may be empty."""
    match = re.match(r'([a-z0-9]+)://([A-Za-z0-9][A-Za-z0-9._-]{1,221}[A-Za-z0-9])(?:/(.*))?\Z', url)
    if not match:
        raise ConfigError('the url is not of the form {0}://bucket or {0}://bucket/prefix'.format(url.partition(':')[0]))
    prefix = (match.group(3) or '').strip('/')
    return match.group(2), prefix + '/' if prefix else ''


def _headers(values: Dict[str, Optional[str]]) -> Dict[str, str]:
    for name, value in values.items():
        if value and not re.match(r'[!-~]+\Z', value):
            raise ConfigError('the settings ask for something as %s, which cannot be sent; check them' % name)
    return {name: value for name, value in values.items() if value}


def _file_path(path: str) -> str:
    """What a file:// URL means, on every Python: url2pathname() of 3.14 and later cuts it at '?', '#' and '//'."""
    from urllib.parse import unquote_to_bytes
    from urllib.request import url2pathname
    if os.name == 'nt':
        return url2pathname(path.replace('?', '%3F').replace('#', '%23'))
    return os.fsdecode(unquote_to_bytes(os.fsencode(path)))


class _FileRemote:
    """file:///path: a shared directory."""

    conditional = True  # whether write(exclusive=True) alone decides, even where stat() may not look

    def __init__(self, config: Config) -> None:
        self.url = config.url or ''
        match = re.match(r'file://(?:localhost)?(/.*)\Z', self.url)
        if not match:
            raise ConfigError('the url is no absolute path; write file:///path, with three slashes')
        self.root = _check_path(_file_path(_check_path(match.group(1))))
        self.public = config.public

    def close(self) -> None:
        pass

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name + '.tgz')

    def _object(self, name: str, status: os.stat_result) -> _Object:
        version = '%d-%d-%d' % (status.st_mtime_ns, status.st_size, status.st_ino)
        return _Object(name, status.st_size, version, status.st_mtime)

    def list(self) -> List[_Object]:
        """All datasets here."""
        try:
            names = [name[:-4] for name in os.listdir(self.root) if name.endswith('.tgz') and _is_name(name[:-4])]
        except FileNotFoundError:
            raise NotFound("no directory %s; check the url, or make it with the first push" % self.root) from None
        found = []
        for name in names:
            try:
                found.append(self.stat(name))
            except OSError as e:
                _say('%s: %s', self._path(name), e.strerror, level=_WARNING)
        return [item for item in found if item]

    def stat(self, name: str) -> Optional[_Object]:
        """What is there under this name now."""
        try:
            status = os.stat(self._path(name))
        except FileNotFoundError:
            return None
        return self._object(name, status) if stat.S_ISREG(status.st_mode) else None

    def read(self, found: _Object, start: int, stop: int) -> bytes:
        """Bytes of this very version; RemoteError if it was replaced."""
        try:
            file = open(self._path(found.name), 'rb', buffering=0)
        except PermissionError as e:
            raise RemoteError("cannot read '%s' in %s: %s; ask who pushed it to let you read it"
                              % (found.name, self.root, e.strerror)) from None
        with file:
            if self._object(found.name, os.fstat(file.fileno())) != found:
                raise _replaced(self, found)
            file.seek(start)
            data = b''.join(iter(lambda: file.read(stop - file.tell()), b''))
        if len(data) != stop - start:
            raise _replaced(self, found)
        return data

    def write(self, name: str, chunks: Iterable[bytes], limit: int, exclusive: bool) -> None:
        """Complete under its name, or absent; if `exclusive`, raise _Taken instead of replacing anything."""
        path = self._path(name)
        new = os.path.join(self.root, '.%s.tgz.%s' % (name, os.urandom(8).hex()))
        try:
            self._make_root()
            self._sweep()
            with open(new, 'xb') as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            self._open_to_readers(new, name)
            if not exclusive:
                os.replace(new, path)
            elif os.name == 'nt':
                os.rename(new, path)  # fails on Windows if there is one
            else:
                self._link(new, path)
        except FileExistsError:
            raise _Taken from None
        except OSError as e:
            if e.errno in _FULL:
                remedy = 'free some space there'
            elif e.errno in _DENIED and (e.filename in (new, path) or self.root.startswith(e.filename or ' ')):
                remedy = 'ask who owns it to replace it, or who owns the directory to let you write there'
            else:
                raise  # of a file that is to be pushed
            raise RemoteError("cannot write '%s' to %s: %s; %s" % (name, _existing(self.root), e.strerror, remedy)
                              ) from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(new)

    def _make_root(self) -> None:
        missing, path = [], self.root
        while path != os.path.dirname(path) and not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        os.makedirs(self.root, exist_ok=True)
        with contextlib.suppress(OSError):
            for path in missing if self.public else ():
                os.chmod(path, os.stat(path).st_mode | 0o555)

    def _open_to_readers(self, path: str, name: str) -> None:
        """Let everyone read a file if it is to be public; warn if it is not for all who may list the directory."""
        mode = os.stat(path).st_mode
        if self.public:
            with contextlib.suppress(OSError):
                os.chmod(path, mode | 0o444)
        elif os.name == 'posix' and os.stat(self.root).st_mode & ~mode & 0o044:
            _say("not all who can list %s can read '%s'; set 'public: true', or another umask", self.root, name,
                 level=_WARNING)

    def _link(self, new: str, path: str) -> None:
        try:
            os.link(new, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links on this file system: let the one that makes this file go on
            claim = os.path.join(self.root, '.%s.claim' % os.path.basename(path))
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
            try:
                if os.path.lexists(path):
                    raise FileExistsError from None
                os.rename(new, path)
            finally:
                os.unlink(claim)

    def _sweep(self) -> None:
        """Remove what pushes that were killed left behind a day ago or more."""
        for item in os.listdir(self.root):
            if re.match(r'\..+\.tgz\.([0-9a-f]{16}|claim)\Z', item):
                path = os.path.join(self.root, item)
                with contextlib.suppress(OSError):
                    if time.time() - os.stat(path).st_mtime > 86400:
                        os.unlink(path)


def _list_bucket(url: str, prefix: str, ask: Callable[[Dict[str, str]], _Reply]) -> List[_Object]:
    """The datasets of a bucket (ListObjectsV2, page by page); `ask` gives the answer to a query."""
    found, seen = [], set()  # type: List[_Object], Set[str]
    query = {'list-type': '2', 'prefix': prefix, 'delimiter': '/', 'encoding-type': 'url'}
    while True:
        try:
            page = _xml(ask(query).page())
            if page.tag != 'ListBucketResult':
                raise ValueError('<%s>' % page.tag)
            found += [item for item in map(functools.partial(_listed, page, prefix), page.iter('Contents')) if item]
            token = page.findtext('NextContinuationToken')
            if page.findtext('IsTruncated') == 'true' and (not token or token in seen):
                raise ValueError('a page that leads nowhere')
            seen.add(token)
        except ValueError as e:
            raise RemoteError('%s does not answer as S3 does (%s); check the endpoint_url' % (url, e)) from None
        if page.findtext('IsTruncated') != 'true':
            return found
        query['continuation-token'] = token


def _listed(page: Any, prefix: str, item: Any) -> Optional[_Object]:
    from urllib.parse import unquote_plus
    key = item.findtext('Key') or ''
    if page.findtext('EncodingType') == 'url':
        key = unquote_plus(key)
    name = key[len(prefix):-4]
    if not key.startswith(prefix) or not key.endswith('.tgz') or not _is_name(name):
        return None
    modified = _timestamp(item.findtext('LastModified') or '')
    return _Object(name, int(item.findtext('Size') or 0), _version(item.findtext('ETag'), modified), modified)


# that an answer with status 400, or even 200 of CompleteMultipartUpload, may hold:
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html
_S3_TRANSIENT = ('RequestTimeout', 'InternalError', 'SlowDown', 'ServiceUnavailable')


class _S3Remote:
    """s3://bucket[/prefix]: Amazon S3, or what speaks its protocol at `endpoint_url`."""

    def __init__(self, config: Config) -> None:
        url = config.url or ''
        if url.startswith('s3://arn:'):
            raise ConfigError('the url is an ARN; of an access point, take the alias (it ends in -s3alias) as the '
                              'bucket: s3://alias')
        self.bucket, self.prefix = _bucket_and_prefix(url)
        self.url = _masked(url)
        self.aws = _Aws(config)
        self.http = self.aws.http
        self.region = self.aws.region  # the bucket's, as soon as an answer has told it
        self.endpoint = _check_endpoint(config.endpoint_url or '') or self.aws.endpoint('s3')
        self.conditional = not self.endpoint  # other stores may ignore If-None-Match
        self.by_host = self._is_bucket_in_host()
        self.checksum = '' if _md5() else 'sha256'  # what parts carry; a bucket may want one (see _learn)
        self.connections = config.connections
        self.always = _headers({'x-amz-request-payer': config.request_payer})
        self.created = _headers({  # of requests that begin an object
            'Content-Type': 'application/gzip', 'x-amz-acl': 'public-read' if config.public else None,
            'x-amz-storage-class': config.storage_class,
            'x-amz-server-side-encryption': config.sse or config.sse_kms_key_id and 'aws:kms',
            'x-amz-server-side-encryption-aws-kms-key-id': config.sse_kms_key_id})

    def close(self) -> None:
        self.http.close()

    def _address(self, key: str, query: Dict[str, str]) -> str:
        base = self.endpoint or self.aws.host('s3', self.region)
        base = base.replace('//', '//%s.' % self.bucket, 1) if self.by_host else base + '/' + self.bucket
        pairs = '&'.join('%s=%s' % (_quote(k), _quote(v)) for k, v in sorted(query.items()))
        return '%s/%s%s' % (base, _quote(key, safe='/'), '?' + pairs if pairs else '')

    def _is_bucket_in_host(self) -> bool:
        """Whether the bucket goes into the host's name (virtual-hosted style) instead of the path.

        Decided as `aws` does, which falls back to the path where no host can have that name:
        https://docs.aws.amazon.com/cli/latest/topic/s3-config.html#addressing-style
        """
        style = _aws_nested(self.aws.profile, 's3', 'addressing_style')
        if style == 'path' or self.endpoint and style != 'virtual':
            return False
        if re.match(r'https?://([\d.]+|\[.*\])(:|/|\Z)', self.endpoint):  # an address has no subdomains
            return False
        dot = '.' if self.endpoint.startswith('http:') else ''  # with TLS, it would break the certificate
        return bool(re.match(r'[a-z0-9%s-]+\Z' % dot, self.bucket))

    def _key(self, name: str) -> str:
        return self.prefix + name + '.tgz'

    def _request(self, method: str, key: str, query: Optional[Dict[str, str]] = None,
                 headers: Optional[Dict[str, str]] = None, body: Sequence[bytes] = (), accept: Sequence[int] = (),
                 limit: int = _REPLY_LIMIT) -> _Reply:
        """A signed request; RemoteError for any answer but 2xx and what `accept` lists.

        It is made anew as long as a refusal teaches another region, clock or key to sign with.
        """
        payload = _sha256()
        for chunk in body:
            payload.update(chunk)
        headers = dict(self.always, **(headers or {}))
        for attempt in range(1, _TRIES + 1):
            state = self._state()
            address = self._address(key, query or {})
            sign = self.aws.signer(state[2], 's3', self.region, payload.hexdigest())
            checked = dict(headers, **self._checksums(method, query or {}, body, payload))
            reply = self.http.request(method, address, checked, body, sign, limit)
            if (method == 'POST' or reply.status == 400) and _aws_error(reply)[0] in _S3_TRANSIENT:
                if attempt < _TRIES:
                    _pause(attempt)
                continue
            if 200 <= reply.status < 300 and (method != 'HEAD' or _whole_size(reply) is not None):
                return reply
            if method == 'HEAD' and reply.status not in accept:  # it has no body that would tell more
                reply = self.http.request('GET', address, dict(headers, Range='bytes=0-0'), (), sign, 1 << 20)
                if 200 <= reply.status < 300:
                    return reply
            self._learn(reply, state[2])
            if reply.status >= 300 and state == self._state():
                if reply.status in accept:
                    return reply
                break
        reads = 's3:GetObject, and s3:ListBucket to tell what is missing' if key else 's3:ListBucket'
        raise self._error(reply, reads if method in ('GET', 'HEAD') else 's3:PutObject')

    def _state(self) -> Tuple[Any, ...]:
        """What a refusal may teach to do otherwise."""
        return self.region, self.aws.skew, self.aws.keys(), self.checksum

    def _checksums(self, method: str, query: Dict[str, str], body: Sequence[bytes], sha256: Any) -> Dict[str, str]:
        """The header that lets a bucket with Object Lock check what it is given.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
        """
        from base64 import b64encode
        if 'uploads' in query and self.checksum == 'sha256':
            return {'x-amz-checksum-algorithm': 'SHA256'}
        if method != 'PUT':
            return {}
        if self.checksum == 'sha256':
            return {'x-amz-checksum-sha256': b64encode(sha256.digest()).decode()}
        if self.checksum == 'md5':
            md5 = _md5()
            for chunk in body:
                md5.update(chunk)
            return {'Content-MD5': b64encode(md5.digest()).decode()}
        return {}

    def _learn(self, reply: _Reply, keys: Optional[_AwsKeys]) -> None:
        region = reply.headers.get('x-amz-bucket-region') or _aws_error(reply)[2]
        if reply.status in (301, 307, 400, 403) and re.match(_AWS_REGION, region):
            self.region = region
        code, message, _ = _aws_error(reply)
        self.aws.learn(reply, code)
        if code in ('ExpiredToken', 'TokenRefreshRequired'):
            self.aws.renew(keys)
        if code in ('InvalidArgument', 'NotImplemented') and 'x-amz-checksum' in message.lower():
            self.checksum = ''  # as at Backblaze: https://www.backblaze.com/docs/cloud-storage-s3-compatible-api
        elif reply.status == 400 and 'content-md5' in message.lower() and not self.checksum and _md5():
            self.checksum = 'md5'

    def _error(self, reply: _Reply, need: str) -> RemoteError:
        """need: the permission without which this is refused."""
        code, message, _ = _aws_error(reply)
        keys = self.aws.keys()
        source = keys.source if keys else ''
        by_host = "set 'addressing_style = virtual' below 's3 =' of the profile '%s' in ~/.aws/config" % self.aws.name
        hint = {
            'NoSuchBucket': 'check the bucket in the url',
            'InvalidAccessKeyId': 'check the access key; it comes from %s' % source,
            'SignatureDoesNotMatch': 'check the secret access key, which comes from %s, and the region' % source,
            'RequestTimeTooSkewed': "set this machine's clock",
            'ExpiredToken': 'renew the credentials, which come from %s' % source,
            'InvalidToken': 'renew the credentials, which come from %s' % source,
            'PermanentRedirect': "set 'region' to the bucket's, and no endpoint_url for Amazon",
            'AuthorizationHeaderMalformed': "set 'region' to the bucket's",
            'AccessControlListNotSupported': "drop 'public: true', and let a bucket policy make the objects public",
            'SecondLevelDomainForbidden': by_host,  # as Alibaba calls it
            'PathStyleDomainForbidden': by_host,  # Tencent: https://www.tencentcloud.com/document/product/436/75050
            'VirtualHostDomainRequired': by_host,  # Huawei
            'InvalidObjectState': 'it was moved to an archive class; restore it there first',
        }.get(code) or 'check the url, the endpoint_url and the region'
        if not keys and reply.status in (400, 401, 403):
            hint = ("no credentials were found in the settings, the environment, the AWS profile '%s', or those of a "
                    "container or this machine; set aws_access_key_id and aws_secret_access_key, or run 'aws "
                    "configure' or 'aws sso login'" % self.aws.name)
        elif code in ('AccessDenied', '') and reply.status in (401, 403):
            hint = 'the credentials, which come from %s, need %s here' % (source, need)
        return RemoteError('%s answers %s: %s; %s' % (
            self.url, ' '.join((str(reply.status), code)).strip(), _printable(message)[:300] or 'no explanation', hint),
            reply.status)

    def list(self) -> List[_Object]:
        """All datasets here."""
        return _list_bucket(self.url, self.prefix, lambda query: self._request('GET', '', query))

    def stat(self, name: str) -> Optional[_Object]:
        """What is there under this name now."""
        reply = self._request('HEAD', self._key(name), accept=[404])
        if reply.status == 404:
            return None
        return _described(self, name, reply)

    def read(self, found: _Object, start: int, stop: int) -> bytes:
        """Bytes of this very version; RemoteError if it was replaced. Some stores ignore If-Match, so compare, too."""
        reply = self._request('GET', self._key(found.name), headers=_pinned(found, start, stop), accept=[404, 412, 416],
                              limit=stop - start + 65536)
        if reply.status in (404, 412, 416) or _reply_version(reply) != found.version:
            raise _replaced(self, found, reply)
        return _ranged(self, reply, start, stop, found.size)

    def write(self, name: str, chunks: Iterable[bytes], limit: int, exclusive: bool) -> None:
        """Complete under its name, or absent; if `exclusive`, raise _Taken instead of replacing anything.

        limit: bytes that `chunks` will not exceed; it sets the size of parts, as S3 takes at most 10,000.
        """
        size = max(_PART, -(-limit // _PARTS >> 20) << 20)
        parts = _parts(chunks, size)
        first, second = next(parts, []), next(parts, None)
        if second is None:
            self._finish('PUT', name, {}, self.created, first, exclusive)
            return
        reply = self._request('POST', self._key(name), {'uploads': ''}, self.created)
        try:
            upload = _xml(reply.page()).findtext('UploadId')
        except ValueError:
            upload = None
        if not upload:
            raise self._stranger()
        parts = itertools.chain([first, second], parts)
        del first, second  # or memory would hold them to the end
        try:
            self._upload(name, upload, parts, size, exclusive)
        except BaseException:  # parts that stay behind are paid for
            with contextlib.suppress(RemoteError):
                self._request('DELETE', self._key(name), {'uploadId': upload}, accept=[404])
            raise

    def _stranger(self) -> RemoteError:
        return RemoteError('%s does not answer as S3 does; check the endpoint_url, and whether a proxy or login page '
                           'answers in its place' % self.url)

    def _upload(self, name: str, upload: str, parts: Iterable[List[bytes]], size: int, exclusive: bool) -> None:
        def send(item: Tuple[int, List[bytes]]) -> str:
            query = {'partNumber': str(item[0]), 'uploadId': upload}
            reply = self._request('PUT', self._key(name), query, body=item[1])
            if not reply.headers.get('ETag'):
                raise self._stranger()
            checksum = reply.headers.get('x-amz-checksum-sha256') or ''
            return '<Part><PartNumber>%d</PartNumber><ETag>%s</ETag>%s</Part>' % (
                item[0], escape(reply.headers['ETag']),
                '<ChecksumSHA256>%s</ChecksumSHA256>' % escape(checksum) if checksum else '')

        from xml.sax.saxutils import escape
        ahead = max(1, min(self.connections, _IN_FLIGHT // size))
        with _threads(ahead) as pool, self.http.hurry_when_it_fails(), contextlib.closing(
                _ordered(pool, send, enumerate(parts, 1), ahead)) as sent:
            manifest = '<CompleteMultipartUpload>%s</CompleteMultipartUpload>' % ''.join(sent)
        self._finish('POST', name, {'uploadId': upload}, {'Content-Type': 'application/xml'}, [manifest.encode()],
                     exclusive)

    def _finish(self, method: str, name: str, query: Dict[str, str], headers: Dict[str, str], body: List[bytes],
                exclusive: bool) -> None:
        """The request that makes the object appear.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html
        """
        if exclusive and not self.conditional and self.stat(name):
            raise _Taken
        conditional = dict(headers, **{'If-None-Match': '*'}) if exclusive else headers
        reply = self._request(method, self._key(name), query, conditional, body, accept=[400, 404, 409, 412, 501])
        code = _aws_error(reply)[0]
        if exclusive and not self.conditional and reply.status in (400, 501) and code in (
                '', 'NotImplemented', 'InvalidArgument', 'InvalidRequest'):
            reply = self._request(method, self._key(name), query, headers, body)
            code = _aws_error(reply)[0]
        if exclusive and reply.status in (409, 412):
            raise _Taken  # perhaps by ourselves, if the first answer was lost
        if code == 'NoSuchUpload':  # likewise
            raise _Unconfirmed(str(self._error(reply, 's3:PutObject')), reply.status)
        if reply.status >= 300 or code:
            raise self._error(reply, 's3:PutObject')
        if not self._is_done(method, reply):
            raise _Unconfirmed(str(self._stranger()), reply.status)

    def _is_done(self, method: str, reply: _Reply) -> bool:
        """Whether this is how PutObject or CompleteMultipartUpload say that the object is there.

        https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html, …/API_CompleteMultipartUpload.html
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


class _GsRemote:
    """gs://bucket[/prefix]: Google Cloud Storage.

    Its JSON API: https://cloud.google.com/storage/docs/json_api/v1
    """

    conditional = True

    def __init__(self, config: Config) -> None:
        self.bucket, self.prefix = _bucket_and_prefix(config.url or '')
        self.url = _masked(config.url or '')
        endpoint = config.endpoint_url or os.environ.get('STORAGE_EMULATOR_HOST') or 'https://storage.googleapis.com'
        self.endpoint = _check_endpoint(endpoint if '://' in endpoint else 'http://' + endpoint)
        self.public = config.public
        self.http = _Http(config.ca_bundle)
        self.credentials = None if self.endpoint.startswith('http://') else _GoogleCredentials(config, self.http)

    def close(self) -> None:
        self.http.close()

    def _key(self, name: str) -> str:
        return self.prefix + name + '.tgz'

    def _address(self, key: str, query: Dict[str, str], api: str = '/storage/v1') -> str:
        pairs = '&'.join('%s=%s' % (name, _quote(value)) for name, value in query.items())
        return '%s%s/b/%s/o%s?%s' % (self.endpoint, api, self.bucket, '/' + _quote(key) if key else '', pairs)

    def _request(self, method: str, url: str, headers: Optional[Dict[str, str]] = None, body: Sequence[bytes] = (),
                 accept: Sequence[int] = (), limit: int = _REPLY_LIMIT, tries: int = _TRIES) -> _Reply:
        """An authorized request; RemoteError for any answer but 2xx and what `accept` lists."""
        last = {}  # type: Dict[str, str]

        def authorize(method: str, url: str, headers: Dict[str, str], body: Iterable[bytes]) -> Dict[str, str]:
            last.clear()
            if self.credentials and url.startswith(self.endpoint + '/'):  # an upload's address comes from the server
                last.update(self.credentials.headers())
            return dict(headers, **last)

        reply = self.http.request(method, url, headers, body, authorize, limit, tries)
        if reply.status == 401 and self.credentials and self.credentials.renew(last):
            reply = self.http.request(method, url, headers, body, authorize, limit, tries)
        if 200 <= reply.status < 300 or reply.status in accept:
            return reply
        raise self._error(reply, bool(last))

    def _error(self, reply: _Reply, authorized: bool) -> RemoteError:
        try:
            message = str(_json_object(reply)['error']['message'])
        except (KeyError, TypeError):
            message = reply.page()[:300].decode('utf-8', 'replace') or 'no explanation'
        hint = 'check the url'
        if reply.status in (401, 403):
            hint = "check this account's permissions" if authorized else (
                "no credentials were found: run 'gcloud auth application-default login', or set google_credentials or "
                '$GOOGLE_APPLICATION_CREDENTIALS to a credentials file')
        elif reply.status == 400 and 'uniform bucket-level access' in message:
            hint = "drop 'public: true', which cannot work here, and let allUsers read by the bucket's IAM policy"
        elif reply.status == 404:
            hint = 'check the bucket in the url'
        return RemoteError('%s answers %d: %s; %s' % (self.url, reply.status, _printable(message)[:300], hint),
                           reply.status)

    def _parse(self, reply: _Reply) -> Dict[str, Any]:
        answer = _json_object(reply)
        if not answer and reply.page().strip() != b'{}':
            raise self._stranger()
        return answer

    def list(self) -> List[_Object]:
        """All datasets here, page by page."""
        found, seen = [], set()  # type: List[_Object], Set[str]
        query = {'prefix': self.prefix, 'delimiter': '/',
                 'fields': 'kind,items(name,size,generation,updated),nextPageToken'}
        while True:
            page = self._parse(self._request('GET', self._address('', query)))
            items = page.get('items') or []
            listing = 'storage#object' in str(page.get('kind'))  # and an 's', which an emulator leaves out
            if not listing or not isinstance(items, list):
                raise self._stranger()
            found += [item for item in map(self._object, items) if item]
            token = page.get('nextPageToken')
            if not token:
                return found
            if not isinstance(token, str):
                raise self._stranger()
            if token in seen:
                raise RemoteError('%s lists in circles; check the endpoint_url' % self.url)
            seen.add(token)
            query['pageToken'] = token

    def _object(self, item: Dict[str, Any]) -> Optional[_Object]:
        """None if it is no dataset's archive."""
        try:
            name = item['name'][len(self.prefix):-4]
            if item['name'] != self._key(name) or not _is_name(name):
                return None
            return _Object(name, int(item['size']), str(item['generation']), _timestamp(item.get('updated') or ''))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self._stranger() from None

    def _stranger(self) -> RemoteError:
        return RemoteError('%s does not answer as Google Cloud Storage does; check the endpoint_url' % self.url)

    def stat(self, name: str) -> Optional[_Object]:
        """What is there under this name now."""
        query = {'fields': 'name,size,generation,updated'}
        reply = self._request('GET', self._address(self._key(name), query), accept=[404])
        if reply.status == 404:
            return None
        found = self._object(self._parse(reply))
        if not found or found.name != name:
            raise self._stranger()
        return found

    def read(self, found: _Object, start: int, stop: int) -> bytes:
        """Bytes of this very generation; RemoteError if it was replaced."""
        url = self._address(self._key(found.name), {
            'alt': 'media', 'generation': found.version, 'ifGenerationMatch': found.version})
        headers = {'Range': 'bytes=%d-%d' % (start, stop - 1), 'Accept-Encoding': 'gzip'}  # or it may gunzip for us
        reply = self._request('GET', url, headers, accept=[404, 412, 416], limit=stop - start + 65536)
        generation = reply.headers.get('x-goog-generation') or found.version
        if reply.status in (404, 412, 416) or generation != found.version:
            raise _replaced(self, found)
        return _ranged(self, reply, start, stop, found.size)

    def write(self, name: str, chunks: Iterable[bytes], limit: int, exclusive: bool) -> None:
        """Complete under its name, or absent; if `exclusive`, raise _Taken instead of replacing anything.

        A resumable upload: https://cloud.google.com/storage/docs/performing-resumable-uploads
        """
        query = {'uploadType': 'resumable', 'name': self._key(name)}
        if exclusive:
            query['ifGenerationMatch'] = '0'
        if self.public:
            query['predefinedAcl'] = 'publicRead'
        reply = self._request('POST', self._address('', query, '/upload/storage/v1'), {
            'Content-Type': 'application/json', 'X-Upload-Content-Type': 'application/gzip'},
            [b'{"contentType": "application/gzip"}'], accept=[412])
        if reply.status == 412:
            raise _Taken
        session = reply.headers.get('Location') or ''
        if not re.match(r'https?://', session):
            raise self._stranger()
        md5, size = _md5(), 0

        def send(item: Tuple[int, List[bytes], bool]) -> Optional[_Reply]:
            nonlocal size
            start, part, last = item
            size += sum(map(len, part))
            for chunk in part if md5 else ():
                md5.update(chunk)
            return self._send(session, start, part, last)

        try:
            parts = _numbered(_parts(chunks, _PART))
            with _threads(1) as pool, self.http.hurry_when_it_fails(), contextlib.closing(
                    _ordered(pool, send, parts, 2)) as sent:
                last = collections.deque(sent, 1)[0]
            answer = _json_object(last) if last else {}
        except BaseException:
            with contextlib.suppress(RemoteError):
                self._request('DELETE', session, accept=range(400, 500), tries=1)
            raise
        known = answer.get('name') == self._key(name) and answer.get('generation')
        if known:
            self._check_md5(name, answer, md5)
        if not known or str(answer.get('size')) != str(size):
            raise _Unconfirmed(str(self._stranger()))

    def _send(self, session: str, start: int, part: List[bytes], last: bool) -> Optional[_Reply]:
        """One chunk, from whatever byte of it the server still lacks; the answer to the last."""
        data = memoryview(b''.join(part))
        stop = start + len(data)
        at, failures = start, 0
        while True:
            failures += 1  # since the last byte arrived
            body = [bytes(data[at - start:])] if at < stop else []
            span = 'bytes %s/%s' % ('%d-%d' % (at, stop - 1) if body else '*', stop if last else '*')
            try:
                reply = self._request('PUT', session, {'Content-Range': span}, body, [308, 412], tries=1)
            except RemoteError as e:
                if failures >= _TRIES or e.status not in (0,) + _TRANSIENT:
                    raise
                _pause(failures)
                reply = self._request('PUT', session, {'Content-Range': 'bytes */*'}, accept=[308, 412])
            if reply.status == 412:
                raise _Taken
            if reply.status != 308:
                if not last:
                    raise self._stranger()
                return reply
            received = re.match(r'bytes=0-(\d{1,19})\Z', reply.headers.get('Range') or '')
            have = int(received.group(1)) + 1 if received else 0
            if not at <= have <= stop:
                raise RemoteError('%s lost a part of the upload; push again' % self.url)
            if have == stop and not last:
                return None
            if have > at:
                failures = 0
            elif failures >= _TRIES:
                raise RemoteError('%s takes no more of the upload; check the endpoint_url, and push again' % self.url)
            at = have

    def _check_md5(self, name: str, answer: Dict[str, Any], md5: Any) -> None:
        from base64 import b64encode
        if md5 and answer.get('md5Hash') and answer['md5Hash'] != b64encode(md5.digest()).decode():
            query = {'ifGenerationMatch': str(answer.get('generation'))}
            self._request('DELETE', self._address(self._key(name), query), accept=[404])
            raise Corrupt("'%s' did not arrive in %s as it was sent, so it was deleted there; push again"
                          % (name, self.url))


_MISSING = (404, 410)
_HEAD_REFUSED = (400, 403, 405, 406, 501)  # 403: what gives GET away by signed URLs refuses HEAD


class _HttpRemote:
    """http(s)://host/path: what a web server shows, or a public bucket; read-only."""

    conditional = False

    def __init__(self, config: Config) -> None:
        import threading
        from urllib.parse import quote
        self.url = (config.url or '').rstrip('/')
        if '@' in self.url:  # anywhere, as a password may have a / in it
            raise ConfigError('the url has a user or password in it, which etcetera never sends; remove it, or write '
                              '%40 for an @ in the path')
        if not re.match(_SITE + r'(?:/[^?#]*)?\Z', self.url, re.ASCII):
            raise ConfigError('the url is not of the form https://host or https://host/path')
        self.base = quote(self.url, safe="%/:[]~!$&'()*+,;=@") + '/'
        self.connections = config.connections
        self.always = {'Cache-Control': 'no-transform'}  # of proxies (RFC 9111, 5.2.1.6)
        self.http = _Http(config.ca_bundle)
        self.lock = threading.Lock()
        self.whole = {}  # type: Dict[_Object, Any]  # files with all bytes of objects from servers that give no ranges

    def close(self) -> None:
        self.http.close()
        for file in self.whole.values():
            file.close()
        self.whole.clear()

    def _request(self, method: str, url: str, headers: Optional[Dict[str, str]] = None, accept: Sequence[int] = (),
                 limit: int = _REPLY_LIMIT, into: Optional[Any] = None) -> _Reply:
        """Follows redirects; RemoteError for any answer but 2xx and what `accept` lists."""
        from urllib.parse import urljoin
        for _ in range(6):
            reply = self.http.request(method, url, dict(self.always, **(headers or {})), limit=limit, into=into)
            if reply.headers.get('x-goog-stored-content-encoding') == 'gzip' and 'Accept-Encoding' not in self.always:
                self.always['Accept-Encoding'] = 'gzip'  # or Google gunzips: cloud.google.com/storage/docs/transcoding
                continue
            if 200 <= reply.status < 300 or reply.status in accept:
                return reply
            target = ''
            with contextlib.suppress(ValueError):
                target = urljoin(url, reply.headers.get('Location') or '')
            if reply.status not in (301, 302, 303, 307, 308) or not re.match(r'https?://[!-~]+\Z', target):
                break
            if url.startswith('https:') and not target.startswith('https:'):
                raise RemoteError('%s sends us on to a place without encryption; check the url' % self.url,
                                  reply.status)
            url = target
        hint = {401: 'it wants a login, which etcetera does not have', 403: 'check what everyone may read there',
                404: 'check the url'}.get(reply.status, 'check the url, or ask who runs that server')
        raise RemoteError('%s answers %d; %s' % (self.url, reply.status, hint), reply.status)

    def list(self) -> List[_Object]:
        """All datasets that the directory's index links to, or that the listing of a public bucket has."""
        from urllib.parse import unquote, urlsplit
        reply = self._request('GET', self.base, accept=[403, 404])
        page = reply.page()
        if reply.status == 200 and b'<ListBucketResult' not in page[:1000]:
            with _threads(self.connections) as pool, self.http.hurry_when_it_fails():
                return [found for found in pool.map(self.stat, _linked(self.base, page)) if found]
        site, path = '%s://%s/' % urlsplit(self.base)[:2], unquote(urlsplit(self.base).path)[1:]
        bucket, _, rest = path.partition('/')

        def ask(address: str, query: Dict[str, str]) -> _Reply:
            pairs = '&'.join('%s=%s' % (key, _quote(value)) for key, value in query.items())
            return self._request('GET', '%s?%s' % (address, pairs))

        for address, prefix in ((site, path), (site + _quote(bucket), rest)):  # the bucket may be in the host's name
            with contextlib.suppress(RemoteError):
                return _list_bucket(self.url, prefix, functools.partial(ask, address))
        raise _Unlisted('%s shows no list of what it has (%d); pull works by name, or check the url'
                        % (self.url, reply.status), reply.status)

    def stat(self, name: str) -> Optional[_Object]:
        """What is there under this name now."""
        reply = self._request('HEAD', self._address(name), accept=_MISSING + _HEAD_REFUSED)
        if reply.status not in _MISSING and (reply.status >= 400 or _whole_size(reply) is None):
            reply = self._request('GET', self._address(name), {'Range': 'bytes=0-0'}, _MISSING + (416,), 65536)
        if reply.status in _MISSING:
            return None
        return _described(self, name, reply)

    def _address(self, name: str) -> str:
        return self.base + name + '.tgz'

    def read(self, found: _Object, start: int, stop: int) -> bytes:
        """Bytes of this very version; RemoteError if it was replaced."""
        if found not in self.whole:
            try:
                reply = self._request('GET', self._address(found.name), _pinned(found, start, stop), [404, 412, 416],
                                      stop - start + 65536)
                if reply.status in (404, 412, 416) or _reply_version(reply) != found.version:
                    raise _replaced(self, found, reply)
                if reply.status != 200 or 'Content-Range' in reply.headers or len(reply.body) != found.size:
                    return _ranged(self, reply, start, stop, found.size)
                return reply.body[start:stop]  # type: ignore[no-any-return]
            except RemoteError as e:
                if e.status != 200:  # that it answers with all
                    raise
        with self.lock:
            if found not in self.whole:
                self.whole[found] = self._fetch(found)
            self.whole[found].seek(start)
            return self.whole[found].read(stop - start)  # type: ignore[no-any-return]

    def _fetch(self, found: _Object) -> Any:
        import tempfile
        file = tempfile.TemporaryFile()
        _say("%s gives no parts of files, so all of '%s' comes first", self.url, found.name)
        try:
            reply = self._request('GET', self._address(found.name), accept=[404], into=file)
            if reply.status != 200 or _reply_version(reply) != found.version or file.seek(0, os.SEEK_END) != found.size:
                raise _replaced(self, found, reply)
        except BaseException:
            file.close()
            raise
        return file

    def write(self, name: str, chunks: Iterable[bytes], limit: int, exclusive: bool) -> None:
        raise ConfigError('%s can only be read; to push, set a url that begins with s3://, gs:// or file://' % self.url)


def _linked(base: str, page: bytes) -> List[str]:
    """The names of the datasets to which the links of an HTML page lead, if they are in the directory `base`."""
    from html.parser import HTMLParser
    from urllib.parse import unquote, urljoin
    names = set()

    class Links(HTMLParser):
        def error(self, message: str) -> None:
            raise AssertionError(message)  # as Python 3.10 and later do

        def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
            with contextlib.suppress(ValueError):
                target = unquote(urljoin(base, dict(attrs).get('href') or '') if tag == 'a' else '')
                name = target[len(unquote(base)):-4]
                if target == unquote(base) + name + '.tgz' and _is_name(name):
                    names.add(name)

    with contextlib.suppress(AssertionError, ValueError):  # of what is no HTML
        Links().feed(page.decode('utf-8', 'replace'))
    return sorted(names)


def _md5() -> Any:
    """For what stores demand, not for security; None where the interpreter has no MD5 (FIPS)."""
    import hashlib
    md5: Any = hashlib.md5
    with contextlib.suppress(ValueError):
        return md5()
    with contextlib.suppress(ValueError, TypeError):  # TypeError: up to Python 3.8
        return md5(usedforsecurity=False)
    return None


def _numbered(parts: Iterator[List[bytes]]) -> Iterator[Tuple[int, List[bytes], bool]]:
    """(offset, part, whether it is the last)."""
    offset, part = 0, next(parts, [])
    while True:
        following = next(parts, None)
        yield offset, part, following is None
        if following is None:
            return
        offset += sum(map(len, part))
        part = following


def _parts(chunks: Iterable[bytes], size: int) -> Iterator[List[bytes]]:
    """Gather chunks to parts of exactly `size` bytes, as some stores want equal ones; the last may be shorter."""
    part, left = [], size  # type: List[Any], int
    for chunk in chunks:
        rest = memoryview(chunk)
        while len(rest) >= left:
            part.append(rest[:left])
            yield part
            rest, part, left = rest[left:], [], size
        if rest:
            part.append(rest)
            left -= len(rest)
    if part:
        yield part


def _version(etag: Optional[str], modified: float) -> str:
    """The ETag, always in quotes, as some stores list it bare; else the time of the last change."""
    if not etag or etag.startswith('W/'):  # weak ones say nothing of bytes (RFC 7232, 2.1)
        return '%d' % modified
    return '"%s"' % etag.strip('"')


def _reply_version(reply: _Reply) -> str:
    return _version(reply.headers.get('ETag'), _http_time(reply.headers.get('Last-Modified') or ''))


def _whole_size(reply: _Reply) -> Optional[int]:
    """The size of the object that an answer tells of, to HEAD or to GET of a range; None if it does not say."""
    if 'Content-Range' in reply.headers or reply.status not in (200, 204):
        return _content_range(reply)[2]
    length = reply.headers.get('Content-Length') or ''
    return int(length) if re.match(r'[0-9]{1,19}\Z', length) else None


def _described(remote: Any, name: str, reply: _Reply) -> _Object:
    size = _whole_size(reply)
    if size is None:
        raise RemoteError("%s does not say how large '%s' is; check the url" % (remote.url, name), reply.status)
    return _Object(name, size, _reply_version(reply), _http_time(reply.headers.get('Last-Modified') or ''))


def _pinned(found: _Object, start: int, stop: int) -> Dict[str, str]:
    """The headers that ask for a range of this very version (RFC 7232, 3.1: only a strong ETag will do)."""
    headers = {'Range': 'bytes=%d-%d' % (start, stop - 1)}
    if found.version.startswith('"'):
        headers['If-Match'] = found.version
    return headers


def _ranged(remote: Any, reply: _Reply, start: int, stop: int, size: int) -> bytes:
    """The body, if it is the very range that was asked for, or as much of it as came before the connection broke."""
    first, after, whole = _content_range(reply)
    # `rclone serve s3` says 200 instead of 206, but gives the range
    right = reply.status in (200, 206) and (first, after) == (start, stop) and whole in (size, None)
    length = stop - start
    if not right or not (len(reply.body) == length or 0 < len(reply.body) < length
                         and reply.headers.get('Content-Length') == str(length)):
        raise RemoteError('%s does not answer with the range that was asked for; a proxy or the endpoint_url is at '
                          'fault' % remote.url, reply.status)
    return reply.body  # type: ignore[no-any-return]


def _replaced(remote: Any, found: _Object, reply: Optional[_Reply] = None) -> RemoteError:
    # what is compressed on the way has no ranges; some servers call each .tgz an encoding
    if reply and reply.status == 200 and reply.headers.get('Content-Encoding', 'identity') != 'identity' \
            and 'Content-Range' not in reply.headers:
        return RemoteError("%s, or a proxy before it, compresses '%s' although it is asked not to; ask who runs it"
                           % (remote.url, found.name), reply.status)
    return RemoteError("'%s' in %s was replaced while it was read; run the command again"
                       % (found.name, remote.url), 412)


_Remote = Union[_FileRemote, _S3Remote, _GsRemote, _HttpRemote]


def _open_remote(config: Config) -> _Remote:
    if not config.url:
        raise ConfigError("no url: say where remote datasets live with a line 'url: s3://bucket' (or gs://, file://, "
                          'https://) in ~/.etc.yaml, with $ETC_URL or with --url')
    kinds = {'file': _FileRemote, 's3': _S3Remote, 'gs': _GsRemote, 'https': _HttpRemote, 'http': _HttpRemote,
             }  # type: Dict[str, Callable[[Config], _Remote]]
    kind = kinds.get(config.url.partition('://')[0])
    if not kind:
        raise ConfigError('cannot use the url; it must start with %s' % ' or '.join(k + '://' for k in kinds))
    return kind(config)


def _ranges(spans: Iterable[Tuple[int, int]], step: Callable[[], int]) -> Iterator[Tuple[int, int]]:
    """Cut spans (start, stop) to pieces of at most `step()` bytes, after joining those that touch."""
    joined = []  # type: List[List[int]]
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    for start, stop in joined:
        while start < stop:
            end = min(start + step(), stop)
            yield start, end
            start = end


def _read(remote: _Remote, found: _Object, start: int, stop: int) -> bytes:
    """A range, going on from the byte where the connection broke."""
    data = remote.read(found, start, stop)
    while start + len(data) < stop:
        _pause(1)
        data += remote.read(found, start + len(data), stop)
    return data


def _fetch(remote: _Remote, found: _Object, spans: Sequence[Tuple[int, int]], pool: Any, connections: int,
           ) -> Generator[bytes, None, None]:
    """The bytes of some spans of an object, one after the other, fetched in parallel.

    Ranges begin small and grow while they come fast: on slow connections long ones would make for little progress to
    see, and for much to be lost.
    """
    longest = max(1 << 20, min(_RANGE, sum(stop - start for start, stop in spans) // (2 * connections)))
    ahead = min(2 * connections, max(connections, _IN_FLIGHT // longest))  # so that none waits for the consumer
    step = 1 << 20

    def read(span: Tuple[int, int]) -> bytes:
        nonlocal step
        begin = time.monotonic()
        data = _read(remote, found, *span)
        if time.monotonic() - begin < 0.25:
            step = min(max(step, 2 * (span[1] - span[0])), longest)
        return data

    return _ordered(pool, read, _ranges(spans, lambda: step), ahead)


@contextlib.contextmanager
def _naming(remote: _Remote, found: _Object) -> Iterator[None]:
    """Say which archive it is that is damaged or unsafe, and what to do."""
    try:
        yield
    except Corrupt as e:
        remedy = '' if ';' in str(e) else '; push it again from where it is whole'
        raise Corrupt("'%s' in %s: %s%s" % (found.name, remote.url, e, remedy)) from e


def _read_index(remote: _Remote, found: _Object) -> Optional[List[_Segment]]:
    """The segments of a remote archive, in one or two reads; None if another tool made it."""
    with _naming(remote, found):
        start = max(0, found.size - _TAIL)
        tail = _read(remote, found, start, found.size) if found.size else b''
        offset = _footer(tail, found.size)
        if offset is None:
            head = tail if start == 0 else _read(remote, found, 0, _HEADER)
            if head[:16] == _member(b'et', bytes(4))[:16]:
                raise Corrupt('the archive is damaged: its index is missing')
            return None
        if offset < start:
            tail = _read(remote, found, offset, start) + tail
            start = offset
        return _parse_index(tail[offset - start:], offset)


# ---------------------------------------------------------------------------------------
# Home: the local store
#
# At any instant ~/.etc/NAME is absent, or a complete old, or a complete new dataset: all work happens in a staging
# directory beside it, and installing is one rename. A receipt is bound to its directory by the inode, which survives
# the rename, so that it too is never another's. Locks only save work; no promise rests on them.
# ---------------------------------------------------------------------------------------

_JOURNAL = 'journal'
_STALE = 86400  # seconds after which what another host left in staging counts as abandoned
_RESUMABLE = 7 * 86400  # seconds for which what a pull left that was killed is kept, for the next to go on from
_GRACE = 900  # seconds for which a replaced dataset is kept, for those who are reading it


_made = set()  # type: Set[str]  # names in staging that this process made


class _Home:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.inner = root / '.etcetera'

    def path(self, name: str) -> Path:
        return self.root / name

    def names(self) -> List[str]:
        """What is installed, sorted."""
        self.recover()
        hidden = {successor.name.partition('@')[0] for successor in self._successors()}
        try:
            return sorted(p.name for p in self.root.iterdir() if _is_name(p.name) and (p.is_symlink() or p.is_dir())
                          and p.name not in hidden)
        except FileNotFoundError:
            return []

    def has(self, name: str) -> bool:
        self.recover()
        return os.path.lexists(str(self.path(name))) and not self._successors(name)

    def receipt(self, name: str) -> Dict[str, Any]:
        """What is known of an installed directory; {} for a registered, created or foreign one.

        Its 'digest' is None if the directory was touched since.
        """
        path = self.path(name)
        try:
            status = os.lstat(str(path))
            own = self._receipt_path(name, status)
            receipt = self._read_receipt(own)
            if receipt.get('mtime') == status.st_mtime_ns:
                return receipt
            for other in (self.inner / 'receipts').iterdir():  # copies of a store keep times, but no inodes
                if other.name.rpartition('@')[0] == name and other != own:
                    copied = self._read_receipt(other)
                    if copied.get('mtime') == status.st_mtime_ns:
                        return copied
            there = {'data/' + partition for partition in _partitions(path)}
            if receipt and there == {p for p in receipt['installed'] if p.startswith('data/')}:
                return dict(receipt, digest=None)
        except OSError:
            pass
        return {}

    def _read_receipt(self, path: Path) -> Dict[str, Any]:
        try:
            receipt = json.loads(path.read_bytes().decode('utf-8'))
            segments = [_Segment(**segment) for segment in receipt['segments']]
            texts = [receipt[key] for key in ('digest', 'source', 'version', 'when')] + receipt['installed']
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}
        sound = all(isinstance(text, str) for text in texts) and all(segment.is_sound() for segment in segments)
        return dict(receipt, segments=segments) if sound else {}

    def _receipt_path(self, name: str, status: os.stat_result) -> Path:
        return self.inner / 'receipts' / ('%s@%d.json' % (name, status.st_ino))

    def open(self, name: str, progress: _Progress = None) -> Tuple[Dataset, Dict[str, Any]]:
        """An installed dataset and its receipt; where it was touched, its files tell whether it still is the same."""
        path = self.path(name)
        if path.is_symlink() and not path.exists():
            raise NotFound("the directory that '%s' was registered for is gone (%s); 'etc purge %s' forgets it"
                           % (name, os.readlink(str(path)), name))
        receipt = self.receipt(name)
        if receipt and not receipt.get('digest'):
            found = {segment.path: segment.digest for segment in _digest_segments(path, progress=progress)}
            if found == {s.path: s.digest for s in receipt['segments'] if s.path in receipt['installed']}:
                receipt['digest'] = _dataset_digest(receipt['segments'])
        return Dataset(path, name, receipt.get('digest')), receipt

    def _drop_traces(self, name: str) -> None:
        """Receipts of this name but that of the directory that is installed; what was to be installed earlier."""
        for successor in self._successors(name):
            _remove(successor)
        try:
            keep = self._receipt_path(name, os.lstat(str(self.path(name)))).name
        except OSError:
            keep = ''
        with contextlib.suppress(OSError):
            for path in (self.inner / 'receipts').iterdir():
                if path.name.rpartition('@')[0] == name and path.name != keep:
                    path.unlink()

    @contextlib.contextmanager
    def changes(self) -> Iterator[None]:
        """Say what to do where the system refuses to change the local store."""
        try:
            yield
        except OSError as e:
            if e.errno in _FULL:
                raise Error("%s: %s; free some space there, or set 'home' to a place that has more"
                            % (e.strerror, _existing(str(self.root)))) from e
            at, home = (os.path.join(str(path), '') for path in (e.filename2 or e.filename, self.root))
            if e.errno in _DENIED and (at.startswith(home) or home.startswith(at)):
                raise Error("cannot change what is in %s: %s; ask who owns it, or set 'home' to a place of yours"
                            % (_existing(str(self.root)), e.strerror)) from e
            raise

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A new empty directory that vanishes afterwards, unless it was installed.

        Beside it is what an earlier pull of `name` left, as 'earlier'. If this one is broken off, it is kept for a
        later one.
        """
        with self.changes(), self._staged(name) as path:
            yield path

    @contextlib.contextmanager
    def _staged(self, name: str) -> Iterator[Path]:
        outer = self._scratch(name)
        outer.mkdir()
        try:
            self._take_over(name, outer)
            self.sweep(name)
            path = outer / 'new'
            path.mkdir()
            yield path
        except (RemoteError, KeyboardInterrupt):
            if any(path.exists() for path in (outer / _JOURNAL, outer / 'earlier' / _JOURNAL)):
                with contextlib.suppress(OSError):
                    os.rename(str(outer), str(self._scratch(name, pid=0)))
            raise
        finally:
            _remove(outer)

    def _take_over(self, name: str, outer: Path) -> None:
        with contextlib.suppress(OSError):  # another process was faster
            dead = [path for path in outer.parent.glob(name + '@*') if not path.is_symlink() and not self._alive(path)]
            left = [journal for path in dead for journal in (path / _JOURNAL, path / 'earlier' / _JOURNAL)
                    if journal.exists()]
            if left:
                best = max(left, key=lambda journal: journal.stat().st_size)
                os.rename(str(best.parent), str(outer / 'earlier'))

    def _scratch(self, name: str, kind: str = 'staging', pid: Optional[int] = None) -> Path:
        """A new name in staging; it tells whether the process that works there is alive, and 0 that none does."""
        directory = self.inner / kind
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / '@'.join((name, _host(), str(os.getpid() if pid is None else pid), os.urandom(4).hex()))
        _made.add(path.name)
        return path

    def install(self, directory: Path, name: str, replace: bool, receipt: Optional[Dict[str, Any]] = None) -> None:
        """Give a complete staged directory its name. FileExistsError if there is one already and not `replace`."""
        status = os.lstat(str(directory))
        path = self._receipt_path(name, status)
        path.parent.mkdir(parents=True, exist_ok=True)
        if receipt:
            scratch = path.with_name('.%s.%s' % (path.name, os.urandom(4).hex()))
            scratch.write_text(json.dumps(dict(receipt, mtime=status.st_mtime_ns), indent=1, default=vars))
            os.replace(str(scratch), str(path))
        else:
            _remove(path)  # that of an earlier directory, if this one was given its inode
        try:
            _flush(directory)
            _remove(directory.parent / _JOURNAL)  # what stands there from here on is not to be gone on with
            self._place(str(directory), str(self.path(name)), replace)
        except BaseException:
            target = str(self.path(name))
            if not os.path.lexists(target) or os.lstat(target).st_ino != status.st_ino:
                _remove(path)
            raise
        self._drop_traces(name)

    def _place(self, new: str, target: str, replace: bool) -> None:
        if replace:
            _make_movable(target)
        while True:
            try:
                if not os.path.lexists(target):
                    os.rename(new, target)
                    break
            except OSError:
                if not os.path.lexists(target):
                    raise
            if not replace:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
            if _swap(new, target):
                self._retire(new)
                break
            if self._replace(new, target):
                break

    def _replace(self, new: str, target: str) -> bool:
        """In two renames, where _swap() cannot; between them, and after a crash there, recover() puts the old back."""
        aside = self._scratch(os.path.basename(target), 'replaced')
        try:
            os.rename(target, str(aside))
        except FileNotFoundError:
            return False  # another process was at work here
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            try:
                os.rename(new, target)  # nothing may be removed for what could not come there either
            except OSError as other:
                if other.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                    raise
                self._supplant(self._successor(target, new), target)
            return True
        try:
            os.rename(new, target)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                if not os.path.lexists(target):
                    os.rename(str(aside), target)
                    raise
            if os.path.lexists(str(aside)):  # another process was faster, with another one
                self._retire(str(aside))
            return False
        self._retire(str(aside))
        return True

    def _successor(self, target: str, path: Optional[str] = None) -> str:
        """Give a directory, or an empty file for nothing, a name by which recover() knows what it is to supplant."""
        successor = self._scratch(os.path.basename(target), 'successors')
        if path:
            os.rename(path, str(successor))
        else:
            successor.touch()
        return str(successor)

    def _supplant(self, successor: str, target: str) -> None:
        """Put a successor in the place of a directory that cannot be renamed.

        So it is with those of a lower layer of overlayfs (EXDEV), as in a container's image. The successor is
        complete before anything is removed, and recover() goes on where this was killed. While it is there, has()
        knows of no dataset of this name.
        """
        _remove(Path(target))
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if os.path.isdir(successor):
                os.rename(successor, target)
            else:
                os.unlink(successor)

    def _successors(self, name: str = '*') -> List[Path]:
        return list((self.inner / 'successors').glob(name + '@*'))

    def _retire(self, path: str) -> None:
        """Let those who are reading a replaced directory come to an end; sweep() removes it."""
        with contextlib.suppress(OSError):
            if not os.path.islink(path):
                os.utime(path)
                os.rename(path, str(self._scratch(os.path.basename(path), 'old')))
        _remove(Path(path))

    def recover(self) -> None:
        """Put back what install() had set aside when it was killed, or go on with what it was to put there."""
        for successor in self._successors():
            place = str(self.path(successor.name.partition('@')[0]))
            with contextlib.suppress(OSError):
                if not self._alive(successor, _GRACE):  # the rename lets one process do it
                    self._supplant(self._successor(place, str(successor)), place)
        with contextlib.suppress(FileNotFoundError):
            for aside in (self.inner / 'replaced').iterdir():
                target = self.path(aside.name.partition('@')[0])
                with contextlib.suppress(OSError):
                    if not os.path.lexists(str(target)):
                        os.rename(str(aside), str(target))
                    elif not self._alive(aside):
                        self._retire(str(aside))

    def link(self, directory: Path, name: str, replace: bool) -> None:
        """Register: a symlink to a directory that stays where it is."""
        self.root.mkdir(parents=True, exist_ok=True)
        new = self._scratch(name) if replace else self.path(name)
        _symlink(str(directory), str(new), "'etc register --copy' installs a copy")
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
        else:
            _make_movable(str(path))
            for aside in (self.inner / 'replaced').glob(name + '@*'):  # or recover() would put it back
                self._retire(str(aside))
            trash = self._scratch(name, 'old')
            try:
                os.rename(str(path), str(trash))
            except OSError as e:
                if e.errno != errno.EXDEV:
                    raise
                self._supplant(self._successor(str(path)), str(path))
            _remove(trash)
            self._drop_traces(name)
        self.sweep(name)

    def keeps_x_bits(self) -> bool:
        """Whether the disk tells files that are executable from others, as exFAT, NTFS and some shares do not."""
        found = {}
        with contextlib.suppress(OSError):  # as in a store that can only be read
            for mode in (0o644, 0o755):
                path = self._scratch('x', 'old')
                os.close(os.open(str(path), _CREATE, mode))
                found[mode] = path.stat().st_mode
                path.unlink()
        return all(mode & 0o100 == wanted & 0o100 for wanted, mode in found.items())

    def _alive(self, path: Path, stale: float = _STALE) -> bool:
        """Whether the process that made this may still be at work."""
        _, host, pid, _ = (path.name.split('@') + [''] * 3)[:4]
        if pid == '0':
            return False
        if os.name == 'posix' and host == _host() and pid.isdigit():
            if int(pid) == os.getpid():  # in a container, another process may have had this number before
                return path.name in _made
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                return False
            except OSError:
                pass
            return True
        return self._age(path) < stale

    def _age(self, path: Path) -> float:
        """Seconds since a sign of life."""
        newest = os.lstat(str(path)).st_mtime
        with contextlib.suppress(OSError):
            newest = max(newest, os.lstat(str(path / 'new')).st_mtime)
        return time.time() - newest

    def sweep(self, name: str) -> None:
        """Remove what processes that died left behind; of other datasets than `name` not what may be of use yet."""
        for kind in ('staging', 'old'):
            with contextlib.suppress(FileNotFoundError):
                for path in (self.inner / kind).iterdir():
                    with contextlib.suppress(OSError):
                        own = path.name.partition('@')[0] == name
                        if kind == 'old':
                            doomed = self._age(path) > _GRACE
                        else:
                            resumable = not own and (path / _JOURNAL).exists() and self._age(path) < _RESUMABLE
                            doomed = not self._alive(path) and not resumable
                        if doomed:
                            trash = self._scratch(path.name.partition('@')[0], 'old')
                            os.rename(str(path), str(trash))  # if its owner lives after all, it shall not install it
                            _remove(trash)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one process at a time work on `name`, where the system can; only to save work."""
        file: Any = None
        with contextlib.suppress(ImportError, OSError):  # as on Windows, and in a store that can only be read
            import fcntl
            (self.inner / 'locks').mkdir(parents=True, exist_ok=True)
            file = open(str(self.inner / 'locks' / name), 'ab')
        if file is None:
            yield
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    _say("waiting for another process that works on '%s'", name)
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


@functools.lru_cache(maxsize=None)
def _host() -> str:
    """This machine, and on Linux the container: where a process number means one process."""
    import platform
    machine = space = ''
    with contextlib.suppress(OSError):
        space = re.sub('[^0-9]', '', os.readlink('/proc/self/ns/pid'))
        with open('/etc/machine-id') as file:
            machine = file.read(8)
    return re.sub('[^A-Za-z0-9-]', '-', '-'.join((platform.node(), machine, space)))


def _flush(directory: Path) -> None:
    """Have the disk hold what a directory holds before it gets its name, so that a power cut takes all or nothing."""
    if not hasattr(os, 'sync') or directory.is_symlink():
        return
    try:
        import ctypes
        sync = ctypes.CDLL(None, use_errno=True).syncfs  # of Linux: only this filesystem
    except (ImportError, OSError, AttributeError, TypeError):
        os.sync()
        return
    file = os.open(str(directory), os.O_RDONLY)
    try:
        if sync(file) and ctypes.get_errno() in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
    finally:
        os.close(file)


def _swap(one: str, other: str) -> bool:
    """Exchange two names in one step, where the system can (renameat2 of Linux, renamex_np of macOS)."""
    try:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        a, b = os.fsencode(one), os.fsencode(other)
        if sys.platform == 'darwin':
            return bool(libc.renamex_np(a, b, 2) == 0)  # RENAME_SWAP
        return bool(libc.renameat2(-100, a, -100, b, 2) == 0)  # AT_FDCWD, RENAME_EXCHANGE
    except (ImportError, OSError, AttributeError, TypeError):
        return False


def _make_movable(path: str) -> None:
    """A read-only directory cannot be renamed, except by root."""
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
            shutil.rmtree(str(path))
    except FileNotFoundError:
        pass
    except OSError:  # read-only directories, or on Windows files
        _make_movable(str(path))
        for top, directories, files in os.walk(str(path)):
            for name in directories + (files if os.name == 'nt' else []):
                if not os.path.islink(os.path.join(top, name)):
                    os.chmod(os.path.join(top, name), 0o700)
        shutil.rmtree(str(path), ignore_errors=True)


# ---------------------------------------------------------------------------------------
# API
# ---------------------------------------------------------------------------------------

@_public
def ls(remote: bool = False, config: Optional[Config] = None) -> List[str]:
    """The names of the local datasets, or of those in the remote storage, sorted. Raises Error."""
    config = config or Config.load()
    if not remote:
        return _Home(config.home).names()
    with contextlib.closing(_open_remote(config)) as store:
        return sorted(found.name for found in store.list())


@_public
def info(name: str, remote: bool = False, config: Optional[Config] = None, progress: _Progress = None,
         ) -> Dict[str, Any]:
    """What is known of a dataset; of a remote one without downloading its data.

    Keys: name, digest, files, size (bytes), partitions ({name: {'files', 'size'}}), meta, readme; of a local one also
    root, source, when, partial; of a remote one archive_size (bytes) and when. What another tool packed has None for
    what only a download would tell; so have meta and readme beside large files.
    progress: as for verify(), where all files must be read, as nothing else knows a local dataset's digest.
    Raises NotFound and other Errors.
    """
    config = config or Config.load()
    name, pin = _parse_name(name)
    if remote:
        with contextlib.closing(_open_remote(config)) as store:
            found = _describe_remote(store, _find(store, name), readme=True)
    else:
        home = _Home(config.home)
        if not home.has(name):
            raise _not_installed(home, name)
        found = _describe_local(home, name, measure=True, progress=progress)
        root = home.path(name)
        found.update(meta=_read_meta(root), readme=_readme(root))
    _check_pin(name, pin, found['digest'])
    return found


def _readme(root: Path) -> str:
    try:
        return _read_text(root / 'README.md', _README_LIMIT, 'replace')
    except (FileNotFoundError, ValueError):
        return ''


def _summary(name: str, digest: Optional[str], segments: Optional[List[_Segment]], **more: Any) -> Dict[str, Any]:
    summary = {'name': name, 'digest': digest, 'files': None, 'size': None, 'partitions': None}  # type: Dict[str, Any]
    if segments is not None:
        summary.update(files=sum(s.files for s in segments), size=sum(s.size for s in segments), partitions={
            s.partition: {'files': s.files, 'size': s.size} for s in segments if s.partition})
    summary.update(more)
    return summary


def _describe_local(home: _Home, name: str, measure: bool, progress: _Progress = None) -> Dict[str, Any]:
    """From the receipt; without one from the files, if `measure`."""
    receipt = home.open(name, progress)[1] if measure else home.receipt(name)
    path = home.path(name)
    source = Path(os.path.realpath(str(path))).as_uri() if path.is_symlink() else receipt.get('source')
    digest, segments = receipt.get('digest'), receipt.get('segments')
    if segments:
        segments = [s for s in segments if s.path in receipt['installed']]
    if not digest and measure:
        segments = _digest_segments(path, progress=progress)
        digest = _dataset_digest(segments)
    return _summary(name, digest, segments, root=str(path), source=source,
                    when=receipt.get('when'), partial=bool(receipt) and _is_partial(receipt))


def _describe_remote(store: _Remote, found: _Object, readme: bool = False) -> Dict[str, Any]:
    when = _utc(found.modified) or None if found.modified else None
    segments = _read_index(store, found)
    digest = None if segments is None else _dataset_digest(segments)
    summary = _summary(found.name, digest, segments, archive_size=found.size, when=when, meta=None, readme=None)
    if segments and readme and max(segments[0].length, segments[0].size) <= _META_LIMIT + _README_LIMIT:
        import tempfile
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch) / 'new'
            root.mkdir()
            _download(store, found, segments[:1], root, 1)
            summary.update(meta=_read_meta(root, "'%s' in %s" % (found.name, store.url)),
                           readme=_readme(root))
    return summary


def _is_partial(receipt: Dict[str, Any]) -> bool:
    return len(receipt['installed']) < len(receipt['segments'])


@_public
def _list(remote: bool, config: Config) -> List[Dict[str, Any]]:
    """As ls(), with what `etc ls -l` shows."""
    if not remote:
        home = _Home(config.home)
        return [_describe_local(home, name, measure=False) for name in home.names()]

    def describe(found: _Object) -> Dict[str, Any]:
        try:
            return _describe_remote(store, found)
        except (Error, OSError) as e:  # one that cannot be read shall not hide the others
            _say('%s', e, level=_WARNING)
            return _summary(found.name, None, None, archive_size=found.size, when=None)

    store = _open_remote(config)
    with _threads(config.connections) as pool, contextlib.closing(store):  # closed first, so that no thread goes on
        return list(pool.map(describe, sorted(store.list())))


def _find(store: _Remote, name: str) -> _Object:
    found = store.stat(name)
    if found is None:
        hint = '; check the name and the url'
        with contextlib.suppress(_Unlisted):
            names = [other.name for other in store.list()]
            hint = _did_you_mean(name, names) or "; 'etc ls -r' lists what is there"
        raise NotFound("no dataset '%s' in %s%s" % (name, store.url, hint))
    return found


def _not_installed(home: _Home, name: str, remedy: str = "'etc pull %s' would fetch it") -> NotFound:
    return NotFound("no local dataset '%s'%s" % (name, _did_you_mean(name, home.names())
                                                 or '; ' + remedy.replace('%s', name)))


def _check_pin(name: str, pin: Optional[str], digest: Optional[str]) -> None:
    if pin and digest != pin:
        raise Corrupt("'%s' is %s, not %s as demanded" % (name, digest or 'of unknown digest', pin))


@_public
def dataset(name: str, auto_install: bool = False, partitions: Optional[Sequence[str]] = None,
            config: Optional[Config] = None, progress: _Progress = None, auto_pull: bool = False) -> Dataset:
    """The installed dataset `name`; with `auto_install` it is pulled first if need be.

    name: NAME, or NAME@sha256:... to insist on these contents.
    partitions: those that must be there; None means all.
    progress: as for pull().
    auto_pull: the name of `auto_install` in etcetera 0.0.x.
    Raises NotFound, UnknownPartition, Corrupt if the digest is another, and other Errors.
    """
    _check_partitions(partitions)
    config = config or Config.load()
    bare, pin = _parse_name(name)
    home = _Home(config.home)
    installed = home.has(bare)
    missing = _missing(bare, home.receipt(bare), partitions)
    if (auto_install or auto_pull) and (not installed or missing):
        return _pull(name, False, partitions, config, progress)
    if not installed:
        raise _not_installed(home, bare)
    found, _ = home.open(bare)
    _check_pin(bare, pin, pin and found.digest)
    for partition in partitions or ():
        found[partition]  # raises UnknownPartition
    if missing:
        raise NotFound("'%s' is only partly installed, without %s; 'etc pull %s' fetches the rest"
                       % (bare, ', '.join(missing), bare))
    return found


def _check_partitions(partitions: Optional[Sequence[str]]) -> None:
    if isinstance(partitions, str) or partitions is not None and not partitions:
        raise InvalidDataset('partitions must be a list of one or more names')


def _missing(name: str, receipt: Dict[str, Any], partitions: Optional[Sequence[str]]) -> List[str]:
    """The segments that a partial install lacks of what is asked for."""
    if not receipt:
        return []
    return [path for path in _wanted(name, receipt['segments'], partitions)
            if path not in receipt['installed']]


def _wanted(name: str, segments: Iterable[_Segment], partitions: Optional[Sequence[str]]) -> List[str]:
    """The paths of the segments that make up these partitions: with some, the root's own files and theirs."""
    if partitions is None:
        return [segment.path for segment in segments]
    known = [segment.partition for segment in segments if segment.partition]
    for partition in partitions:
        if partition not in known:
            raise _no_partition(partition, name, known)
    return ['.'] + ['data/' + partition for partition in sorted(set(partitions))]


@_public
def pull(name: str, force: bool = False, partitions: Optional[Sequence[str]] = None,
         config: Optional[Config] = None, progress: _Progress = None) -> Dataset:
    """Install a remote dataset, or some of its partitions, and return it; verified, or not at all.

    name: NAME, or NAME@sha256:... to insist on these contents.
    force: replace other contents of that name.
    progress: is called with (done, total), bytes of the archive, in the thread that called pull(), some hundred times
        a second at most; what it raises ends the pull.
    What a partial install has already is not fetched again.
    Raises NotFound, Exists, UnknownPartition, Corrupt, RemoteError and other Errors.
    """
    _check_partitions(partitions)
    return _pull(name, force, partitions, config or Config.load(), progress)


def _pull(name: str, force: bool, partitions: Optional[Sequence[str]], config: Config, progress: _Progress) -> Dataset:
    bare, pin = _parse_name(name)
    home = _Home(config.home)
    started = time.monotonic()
    with contextlib.closing(_open_remote(config)) as store, home.lock(bare):
        found = _find(store, bare)
        segments = _read_index(store, found)
        if segments is None:
            return _pull_foreign(home, store, found, pin, force, config.connections, progress)
        digest = _dataset_digest(segments)
        _check_pin(bare, pin, digest)
        wanted = set(_wanted(bare, segments, partitions))
        receipt = home.receipt(bare)
        if home.has(bare) and not force:
            local, receipt = home.open(bare)
            if local.digest != digest:
                raise _differs_locally(bare)
            wanted |= set(receipt.get('installed', wanted))
            if not _missing(bare, receipt, partitions):
                _say("'%s' is installed already, and identical", bare)
                return local
        with home.staging(bare) as staged:
            have = _reuse(home, bare, receipt, [s for s in segments if s.path in wanted], staged)
            lacking = [s for s in segments if s.path in wanted and s.path not in have]
            _download(store, found, lacking, staged, config.connections, progress)
            _validate(staged, "'%s' in %s" % (bare, store.url))
            _settle(home, staged, bare, force or bool(receipt), _receipt(segments, wanted, store.url, found.version))
        _say('pulled %s: %s', bare, _tally(lacking, started))
        _say('%s@%s', bare, digest, level=_DEBUG)
        return Dataset(home.path(bare), bare, digest)


def _tally(segments: Sequence[_Segment], started: float) -> str:
    files, size = sum(s.files for s in segments), sum(s.size for s in segments)
    seconds = max(time.monotonic() - started, 0.001)
    return '{:,} file{}, {} in {} ({}/s)'.format(files, 's' * (files != 1), _size(size), _duration(seconds),
                                                 _size(size / seconds))


def _differs_locally(name: str) -> Exists:
    return Exists("another '%s' is installed already; 'etc pull -f %s' replaces it" % (name, name))


def _receipt(segments: List[_Segment], installed: Iterable[str], source: str, version: str) -> Dict[str, Any]:
    return {'digest': _dataset_digest(segments), 'source': source, 'version': version,
            'when': _utc(time.time()),
            'installed': sorted(installed), 'segments': segments}


def _is_from(receipt: Dict[str, Any], store: _Remote, found: _Object) -> bool:
    """Whether what is installed is untouched and was pulled from this very object."""
    return bool(receipt.get('digest')) and (receipt['source'], receipt['version']) == (store.url, found.version)


def _settle(home: _Home, staged: Path, name: str, replace: bool, receipt: Dict[str, Any]) -> None:
    """Install; if another process was faster, what it installed must be the same."""
    try:
        home.install(staged, name, replace, receipt)
    except FileExistsError:
        if home.open(name)[0].digest != receipt['digest']:
            raise _differs_locally(name) from None


def _download(store: _Remote, found: _Object, segments: Sequence[_Segment], staged: Path, connections: int,
              progress: _Progress = None) -> None:
    """Fetch segments of an indexed archive and write them to a staged directory.

    What an earlier pull of this very object left beside it is not fetched again.
    """
    head = json.dumps([store.url, found.name, found.version]).encode() + b'\n'
    earlier = staged.parent / 'earlier'
    sink = _Sink(staged)

    def blocks() -> Generator[_Block, None, None]:
        had = dict.fromkeys(segments, 0)
        sink.twin = os.path.join(str(earlier / 'new'), '')
        journal = functools.partial(_read_journal, earlier / _JOURNAL, head)
        with contextlib.closing(_replay(earlier / 'new', journal, segments, pool)) as there:
            for block in there:
                had[block[0]] += block[1]
                yield block
        sink.twin = ''
        _say("'%s': %d bytes of it were here already", found.name, sum(had.values()), level=_DEBUG)
        rest = [(segment, count) for segment, count in had.items() if count < segment.length]
        rest.sort(key=lambda item: item[1] == 0)  # what has begun goes on first
        spans = [(segment.offset + count, segment.offset + segment.length) for segment, count in rest]
        with contextlib.closing(_fetch(store, found, spans, io_pool, connections)) as chunks, contextlib.closing(
                _unpack(chunks, rest, pool)) as fetched:
            yield from fetched

    with _naming(store, found), open(str(staged.parent / _JOURNAL), 'wb', buffering=0) as journal, _threads(
            connections) as io_pool, _threads(_cores()) as pool, contextlib.closing(store), contextlib.closing(
            blocks()) as source:
        journal.write(head)
        total = sum(segment.length for segment in segments)
        _extract(_watched(source, operator.itemgetter(1), progress, total), sink, pool, journal)


def _read_journal(path: Path, head: bytes) -> Iterator[List[Any]]:
    """What _extract() wrote down, if it worked for a pull of the same object."""
    with contextlib.suppress(OSError, ValueError, TypeError), open(str(path), 'rb') as file:
        if file.readline() == head:
            for line in file:
                segment, length, digest, name, size = json.loads(line.decode('ascii'))
                yield [str(segment), int(length), digest, name, int(size)]


def _reuse(home: _Home, name: str, receipt: Dict[str, Any], wanted: List[_Segment], staged: Path) -> List[str]:
    """Link segments into `staged` that are installed and still hash to what is wanted; their paths."""
    digests = {s.path: s.digest for s in receipt.get('segments', ()) if s.path in receipt['installed']}
    candidates = [s for s in wanted if digests.get(s.path) == s.digest]
    have = []
    if candidates:
        with contextlib.suppress(InvalidDataset):
            for segment in _digest_segments(home.path(name), [s.path for s in candidates]):
                if segment.digest == digests[segment.path]:
                    have.append(segment.path)
    for path in have:
        for _, entries in _segments(home.path(name), [path]):
            for entry in entries:
                target = _join(staged, entry.name)
                if entry.kind == _DIRECTORY:
                    os.makedirs(target, exist_ok=True)
                elif entry.kind == _LINK:
                    _symlink(_to_os(entry.link), target)
                else:
                    _link_or_copy(entry.source, target)
    return have


def _pull_foreign(home: _Home, store: _Remote, found: _Object, pin: Optional[str], force: bool,
                  connections: int, progress: _Progress) -> Dataset:
    """Pull a .tgz that another tool made: as a whole, and its digest is known only when it is here."""
    name = found.name
    started = time.monotonic()
    receipt = home.receipt(name)
    if not force and _is_from(receipt, store, found):
        _say("'%s' is installed already, and identical", name)
        return Dataset(home.path(name), name, receipt['digest'])
    with home.staging(name) as staged:
        with _naming(store, found), _threads(connections) as io_pool, contextlib.closing(
                _fetch(store, found, [(0, found.size)], io_pool, connections)) as chunks, _threads(
                1) as pool, contextlib.closing(store):
            _unpack_foreign(chunks, staged, pool, progress, found.size)
        _validate(staged, "'%s' in %s" % (name, store.url))
        segments = _digest_segments(staged)
        digest = _dataset_digest(segments)
        _check_pin(name, pin, digest)
        if home.has(name) and not force:
            local, _ = home.open(name)
            if local.digest != digest:
                raise _differs_locally(name)
            _say("'%s' is installed already, and identical", name)
            return local
        _settle(home, staged, name, force, _receipt(segments, [s.path for s in segments], store.url, found.version))
    _say('pulled %s: %s', name, _tally(segments, started))
    _say('%s@%s', name, digest, level=_DEBUG)
    return Dataset(home.path(name), name, digest)


@_public
def push(name: str, force: bool = False, config: Optional[Config] = None, progress: _Progress = None) -> str:
    """Share a local dataset; its digest is returned.

    name: NAME, or NAME@sha256:... to insist on these contents.
    force: replace other contents of that name in the remote storage.
    progress: as for pull(), but of the bytes of the files that have been packed.
    Raises NotFound, Exists, InvalidDataset, Corrupt, RemoteError and other Errors.
    """
    config = config or Config.load()
    name, pin = _parse_name(name)
    home = _Home(config.home)
    started = time.monotonic()
    if not home.has(name):
        raise _not_installed(home, name, "'etc register DIR %s' gives a directory that name")
    local, receipt = home.open(name)
    if receipt and _is_partial(receipt):
        raise InvalidDataset("'%s' is only partly installed, so it cannot be pushed; 'etc pull %s' fetches the rest"
                             % (name, name))
    _check_pin(name, pin, pin and local.digest)
    with contextlib.closing(_open_remote(config)) as store:
        if not force and _is_there(store, local, receipt):
            return local.digest
        listing, size, limit = _survey(local.root)
        segments = []  # type: List[_Segment]
        with _threads(_cores()) as pool, contextlib.closing(
                _pack(listing, config.compression_level, pool, segments, progress, size)) as blocks:
            try:
                store.write(name, _checked(blocks, local, segments), limit, not force)
            except _Taken:
                there = _is_there(store, local, receipt)
                if there is None:
                    raise Exists("'%s' is in %s already, and these credentials may not look whether it is the same; "
                                 'push it under another name' % (name, store.url)) from None
                if not there:
                    raise RemoteError("another push of '%s' to %s is under way; try again when it has ended"
                                      % (name, store.url)) from None
                return local.digest
            except _Unconfirmed as e:
                if not _holds(store, name, _dataset_digest(segments)):
                    raise e
    digest = _dataset_digest(segments)
    _say('pushed %s to %s: %s', name, store.url, _tally(segments, started))
    _say('%s@%s', name, digest, level=_DEBUG)
    return digest


def _holds(store: _Remote, name: str, digest: str) -> bool:
    """Whether what the remote shows under this name is an archive with this digest."""
    try:
        found = store.stat(name)
        segments = _read_index(store, found) if found else None
    except (RemoteError, Corrupt):
        return False
    return segments is not None and _dataset_digest(segments) == digest


def _is_there(store: _Remote, local: Dataset, receipt: Dict[str, Any]) -> Optional[bool]:
    """Whether the remote has this very dataset; raises Exists if it has another of that name.

    None if it may not be looked at, but the condition of the write decides.
    """
    try:
        found = store.stat(local.name)
    except RemoteError as e:
        if e.status == 403 and store.conditional:
            return None
        raise
    if found is None:
        return False
    segments = _read_index(store, found)
    if segments is None:
        same = _is_from(receipt, store, found)
    else:
        same = _dataset_digest(segments) == local.digest
    if not same:
        raise Exists("another '%s' is in %s already; push it under another name, or 'etc push -f %s' replaces it"
                     % (local.name, store.url, local.name))
    _say("'%s' is in %s already, and identical", local.name, store.url)
    return True


def _checked(blocks: Iterable[bytes], local: Dataset, segments: List[_Segment]) -> Iterator[bytes]:
    """The blocks; but an error instead of the last, if the contents are not those that a receipt or pin names."""
    last = b''
    for block in blocks:
        yield last
        last = block
    digest = _dataset_digest(segments)
    if local._digest and local._digest != digest:
        raise Corrupt("the files of '%s' are %s, not %s; 'etc verify %s' tells more"
                      % (local.name, digest, local._digest, local.name))
    yield last


@_public
def register(directory: _Path, name: Optional[str] = None, force: bool = False, copy: bool = False,
             config: Optional[Config] = None, progress: _Progress = None) -> Dataset:
    """Give a directory a dataset's name, by default its own; it stays where it is and must not change any more.

    copy: install a private read-only copy instead of a link.
    force: replace a local dataset of that name.
    progress: as for pull(), but of the bytes of the files that have been copied.
    Raises InvalidDataset, Exists and other Errors.
    """
    config = config or Config.load()
    started = time.monotonic()
    root = Path(os.path.realpath(_check_path(directory)))
    if name is not None and not _is_name(name) and not root.exists() and os.path.isdir(name):
        raise InvalidDataset("no directory %s; the directory comes first: 'etc register %s %s'"
                             % (_masked(str(root)), name, _masked(root.name)))
    if name is None:
        _validate(root)  # or a part of a URL might be taken for a name, and shown
    name, pin = _parse_name(root.name if name is None else name)
    local = Dataset(root, name)
    _check_pin(name, pin, pin and local.digest)
    home = _Home(config.home)
    if not copy and not home.path(name).is_symlink() and (root / 'x').as_posix().startswith(
            os.path.realpath(str(home.path(name))).replace(os.sep, '/') + '/'):
        raise InvalidDataset("%s is what is installed as '%s'; use --copy, or another directory" % (root, name))
    if home.has(name) and not force:
        if not copy and os.path.realpath(str(home.path(name))) == str(root):
            _say("'%s' is registered already", name)
            return Dataset(home.path(name), name)
        raise _taken_locally(name)
    try:
        if copy:
            with home.staging(name) as staged:
                segments = _copy(root, staged, progress)
                home.install(staged, name, force, _receipt(segments, [s.path for s in segments], root.as_uri(), ''))
        else:
            with home.changes():
                home.link(root, name, force)
    except FileExistsError:
        raise _taken_locally(name) from None
    if copy:
        _say('copied %s: %s', name, _tally(segments, started))
    else:
        _say("registered '%s': %s", name, root)
    return Dataset(home.path(name), name)


def _taken_locally(name: str) -> Exists:
    return Exists("a local dataset '%s' exists already; take another name, or -f (force) to replace it" % name)


def _copy(root: Path, target: Path, progress: _Progress) -> List[_Segment]:
    """Copy a dataset as if it had been pushed and pulled."""
    segments = []  # type: List[_Segment]

    def blocks() -> Iterator[_Block]:
        for segment, payload in source:
            if not segments or segments[-1] is not segment:
                segments.append(segment)
            yield segment, 0, payload, _sha256(payload).digest()

    listing, size, _ = _survey(root)
    with _threads(_cores()) as pool, contextlib.closing(_process(listing, bytes, pool, progress, size)) as source:
        _extract(blocks(), _Sink(target), pool)
    return segments


@_public
def create(name: str, partitions: Sequence[str] = ('train', 'test'), force: bool = False,
           config: Optional[Config] = None) -> Dataset:
    """A new local dataset with empty partitions, to be filled. Raises InvalidDataset, Exists and other Errors."""
    config = config or Config.load()
    name, pin = _parse_name(name)
    if pin:
        raise InvalidDataset('a dataset yet to be filled has no digest to insist on; give only its name')
    _check_partitions(partitions or ())
    for partition in partitions:
        if not _is_safe(partition) or '/' in partition or not _is_utf8(partition):
            raise InvalidDataset("'%s' cannot be a partition's name; it becomes a directory" % _masked(partition))
    home = _Home(config.home)
    with home.staging(name) as staged:
        for partition in sorted(set(partitions)):
            os.makedirs(_join(staged, 'data/' + partition))
        try:
            home.install(staged, name, force)
        except FileExistsError:
            raise _taken_locally(name) from None
    _say("created '%s'; now fill %s", name, home.path(name) / 'data')
    return Dataset(home.path(name), name)


@_public
def verify(name: str, config: Optional[Config] = None, progress: _Progress = None) -> str:
    """Read all files of an installed dataset and return their digest.

    Raises Corrupt if they are not what was pulled or copied, or not what NAME@sha256:... demands. A registered or
    created dataset has nothing to be compared with.
    progress: as for pull(), but of the bytes of the files that have been read.
    """
    config = config or Config.load()
    name, pin = _parse_name(name)
    home = _Home(config.home)
    started = time.monotonic()
    if not home.has(name):
        raise _not_installed(home, name)
    _, receipt = home.open(name)
    found = _digest_segments(home.path(name), progress=progress)
    if not receipt:
        digest = _dataset_digest(found)
        outcome = 'nothing known to compare it with'
    else:
        digests = {segment.path: segment.digest for segment in found}
        promised = {s.path: s.digest for s in receipt['segments'] if s.path in receipt['installed']}
        wrong = sorted(path for path in set(digests) | set(promised) if digests.get(path) != promised.get(path))
        if wrong:
            remedy = "'etc pull -f %s' mends it" % name if receipt.get('version') else 'register it again'
            if not home.keeps_x_bits():
                remedy = "this disk does not keep which files are executable; set 'home' to a place on another"
            raise Corrupt("'%s' is not what was installed: %s differ%s; %s"
                          % (name, ', '.join(wrong), 's' * (len(wrong) == 1), remedy))
        digest = _dataset_digest(receipt['segments'])
        outcome = 'partly installed, and unchanged' if _is_partial(receipt) else 'complete and unchanged'
    _check_pin(name, pin, digest)
    _say('verified %s: %s; %s', name, 'as demanded' if pin else outcome, _tally(found, started))
    _say('%s@%s', name, digest, level=_INFO if not receipt else _DEBUG)
    return digest


@_public
def purge(name: str, config: Optional[Config] = None) -> None:
    """Remove a local dataset; a registered directory itself is not touched. Raises NotFound and other Errors."""
    config = config or Config.load()
    name, pin = _parse_name(name)
    home = _Home(config.home)
    if not home.has(name):
        raise _not_installed(home, name, "'etc ls' lists what there is")
    _check_pin(name, pin, pin and home.open(name)[0].digest)
    with home.changes():
        home.remove(name)
    _say("purged '%s'", name)


# ---------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------

_Command = collections.namedtuple('_Command', 'what words flags names examples')

_COMMANDS = {  # names: those that `etc completion` offers; the order is that of a first session
    'register': _Command('give a directory a name', 'DIR [as] [NAME]', ('--force', '--copy'), '', (
        ('etc register ./digits MNIST', 'it stays where it is'),
        ('etc register ./digits as MNIST', 'the same'),
        ('etc register --copy ./digits MNIST', 'install a read-only copy of it'))),
    'push': _Command('share local datasets', 'NAME...', ('--force',), 'local', (
        ('etc push MNIST', ''),
        ('etc push -f MNIST', 'even over other contents of that name'))),
    'ls': _Command('list datasets', '', ('--remote', '--long', '--json'), '', (
        ('etc ls -r', 'what is shared'),
        ('etc ls', 'what is here'),
        ('etc ls -l', 'with size, files, when and digest'))),
    'pull': _Command('install remote datasets', 'NAME...', ('--force', '--partition'), 'remote', (
        ('etc pull MNIST', ''),
        ('etc pull MNIST -p test', 'only one partition; the rest may follow later'),
        ('etc pull -f MNIST', 'replace other contents of that name'),
        ('etc pull MNIST@sha256:...', 'insist on these contents'))),
    'info': _Command('show what is known of a dataset', 'NAME', ('--remote', '--json'), 'local', (
        ('etc info MNIST', ''),
        ('etc info -r MNIST', 'of a remote one, without downloading its data'))),
    'verify': _Command('read all files again and compare them with the digest', 'NAME...', (), 'local', (
        ('etc verify MNIST', ''),
        ('etc verify MNIST@sha256:...', 'with this digest'))),
    'create': _Command('make an empty dataset to fill', 'NAME [PARTITION...]', ('--force',), '', (
        ('etc create MNIST', 'with the partitions train and test'),
        ('etc create MNIST train val test', ''))),
    'purge': _Command('remove local datasets', 'NAME...', (), 'local', (
        ('etc purge MNIST', 'a registered directory itself is not touched'),)),
    'completion': _Command('print what lets a shell complete commands and names', 'SHELL', (), '', (
        ('eval "$(etc completion bash)"', 'in ~/.bashrc; of zsh: in ~/.zshrc, after compinit'),
        ('etc completion fish | source', 'in ~/.config/fish/config.fish'))),
}
_SWITCH = {'action': 'store_true'}
_FLAGS = {  # the short flag, if there is one; help; what else argparse is to know
    '--force': ('-f', 'replace what stands under that name', _SWITCH),
    '--copy': ('', 'install a read-only copy instead of a link', _SWITCH),
    '--remote': ('-r', 'in the remote storage', _SWITCH),
    '--long': ('-l', 'with size, files, when and digest', _SWITCH),
    '--json': ('', 'as JSON', _SWITCH),
    '--partition': ('-p', 'only this partition (can be repeated)',
                    {'action': 'append', 'dest': 'partitions', 'metavar': 'PARTITION'}),
    '--config': ('', 'settings file, instead of $ETC_CONFIG or ~/.etc.yaml', {'metavar': 'FILE'}),
    '--url': ('', 'where remote datasets live, instead of $ETC_URL or the settings', {}),
    '--home': ('', 'local store, instead of $ETC_HOME, the settings or ~/.etc', {'metavar': 'DIR'}),
    '--quiet': ('-q', 'say nothing but errors', _SWITCH),
    '--verbose': ('-v', 'say more, with a traceback of an error', _SWITCH),
}  # type: Dict[str, Tuple[str, str, Dict[str, str]]]
_README_LINES = 20  # that `etc info` shows
_PATIENCE = 3  # seconds that one who has pressed Tab may wait
_COMMON = ('--config', '--url', '--home', '--quiet', '--verbose')
_WORDS = {  # in _Command.words: what argparse is to know
    'DIR [as] [NAME]': [('words', {'nargs': '+', 'metavar': 'DIR'})],
    'NAME...': [('names', {'nargs': '+', 'metavar': 'NAME'})],
    'NAME': [('name', {'metavar': 'NAME'})],
    'NAME [PARTITION...]': [('name', {'metavar': 'NAME'}), ('partitions', {'nargs': '*', 'metavar': 'PARTITION',
                                                                                   'default': ()})],
    'SHELL': [('shell', {'choices': ('bash', 'zsh', 'fish'), 'metavar': 'SHELL'})],
}  # type: Dict[str, List[Tuple[str, Dict[str, Any]]]]


def _overview() -> str:
    """What `etc` alone shows."""
    lines = ['etc shares immutable datasets through cloud storage.', '']
    lines += ['  %-33s %s' % (command.examples[0][0], command.what) for command in _COMMANDS.values()]
    lines += ['', "Where remote datasets live says a line such as 'url: s3://my-bucket' in ~/.etc.yaml, or $ETC_URL.",
              "'etc pull -h' tells more of pull; 'etc -h' lists all."]
    if os.path.basename(sys.argv[0]) in ('etcetera.py', '-'):
        lines.append("('etc' is what pip installs; without it, write 'python3 etcetera.py' instead.)")
    return '\n'.join(lines)


def _parser(argv: Sequence[str]) -> Any:
    """For these words: only the commands that occur among them, as to make all takes longer than to parse."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            mistyped = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
            if mistyped:
                message = "no command '%s'%s" % (mistyped.group(1), _did_you_mean(mistyped.group(1), _COMMANDS))
            message = message.replace('the following arguments are required:', "'%s' needs" % self.prog)
            _complain("%s%s '%s -h' shows how" % (_masked(message), '' if message.endswith('?') else ';', self.prog))
            sys.exit(2)

    def add(parser: Any, flags: Iterable[str], **default: str) -> None:
        for flag in flags:
            short, what, more = _FLAGS[flag]
            parser.add_argument(*filter(None, (short, flag)), help=what, **dict(more, **default))

    helps = any(re.match('-[a-z]*h|--he', word) for word in argv)
    # without a width, even where no help is to be shown, it would load modules to ask how wide the terminal is
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=None if helps else 80)  # type: Any
    parser = Parser(prog='etc', description='Share immutable datasets through cloud storage.',
                    epilog="'etc COMMAND -h' tells more of a command.", formatter_class=formatter)
    add(parser, _COMMON, default=argparse.SUPPRESS)
    parser.add_argument('--version', action='version', version='etcetera ' + __version__)
    commands = parser.add_subparsers(prog='etc', dest='command', metavar='COMMAND')
    wanted = not helps and _COMMANDS.keys() & set(argv)
    for name, (what, words, flags, _, examples) in _COMMANDS.items():
        if not wanted or name in wanted:
            added = commands.add_parser(
                name, help=what, usage=' '.join(filter(None, ('etc', name, words, '[options]'))),
                description=what[0].upper() + what[1:] + '.', formatter_class=formatter,
                epilog='examples:\n' + '\n'.join(('  %-33s  %s' % example).rstrip() for example in examples))
            for word, more in _WORDS.get(words, ()):
                added.add_argument(word, **more)
            add(added, flags)
            add(added, _COMMON, default=argparse.SUPPRESS)
    return parser


def _print(text: str = '') -> None:
    """To stdout, whatever its encoding."""
    if sys.stdout is None:
        raise Error('standard output is closed')
    print(_encodable(text, sys.stdout))


def _ago(when: Optional[str]) -> str:
    """How long ago, of a time as info() gives it."""
    if not when:
        return '-'
    seconds = time.time() - _timestamp(when)
    for unit, name in ((31557600, 'year'), (2629800, 'month'), (604800, 'week'), (86400, 'day'), (3600, 'hour'),
                       (60, 'minute')):
        if seconds >= unit:
            return '%d %s%s ago' % (seconds // unit, name, 's' * (seconds >= 2 * unit))
    return 'just now'


def _print_list(items: List[Dict[str, Any]]) -> None:
    """In columns; on a terminal with a heading, and with as much of the digests as tells them apart."""
    people = sys.stdout is not None and sys.stdout.isatty()
    rows = [('NAME', 'SIZE', 'FILES', 'WHEN', 'DIGEST')] if people and items else []
    for item in items:
        files = '-' if item['files'] is None else '{:,}'.format(item['files'])
        digest = (item['digest'] or '')[:19 if people else None]
        rows.append((item['name'], _size(item['size']), files, _ago(item['when']), digest or item.get('source') or '-'))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        _print('  '.join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]),
                          row[3].ljust(widths[3]), _printable(row[4])]))


def _print_info(found: Dict[str, Any]) -> None:
    def line(key: str, value: str) -> None:
        _print('%-11s %s' % (key, _printable(value)))

    def amount(counted: Dict[str, Any]) -> str:
        return '{} in {:,} file{}'.format(_size(counted['size']), counted['files'], 's' * (counted['files'] != 1))

    line('name', found['name'])
    line('digest', found['digest'] or '- (packed by another tool; pull it to learn more)')
    if found['files'] is not None:
        line('size', amount(found) + ' (partly installed)' * bool(found.get('partial')))
    if 'archive_size' in found:
        line('archive', _size(found['archive_size']))
    for key, label in (('root', 'root'), ('source', 'from')):
        if found.get(key):
            line(label, found[key])
    if found.get('when'):
        line('when', '%s (%s)' % (_ago(found['when']), found['when']))
    for number, (name, partition) in enumerate((found['partitions'] or {}).items()):
        line('' if number else 'partitions', '%s: %s' % (name, amount(partition)))
    if found.get('meta'):
        meta = json.dumps(found['meta'], ensure_ascii=False)
        line('meta', meta if len(meta) <= 500 else meta[:500] + ' ...')
    lines = (found.get('readme') or '').splitlines()
    if lines:
        _print()
    for text in lines[:_README_LINES]:
        _print(_printable(text.expandtabs()))
    if len(lines) > _README_LINES:
        _print('... (%d more lines of README.md)' % (len(lines) - _README_LINES))


def _meter(what: str) -> _Progress:
    """Shows on the terminal how far a piece of work is, at most ten times a second; None where that would disturb."""
    if _spoken not in (_INFO, _DEBUG) or sys.stderr is None or not sys.stderr.isatty() \
            or os.environ.get('TERM') == 'dumb':
        return None
    if os.name == 'nt':
        os.system('')  # lets the console understand escape sequences
    marks = collections.deque(maxlen=50)  # type: Any  # when it was shown, and the bytes then: some 5 s

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if marks and now - marks[-1][0] < 0.1:
            return
        marks.append((now, done))
        rate = (done - marks[0][1]) / max(now - marks[0][0], 0.001)
        parts = [what, '%d%%' % (100 * done / max(total, 1)), '%s of %s' % (_size(done), _size(total))]
        if rate:
            parts += [_duration((total - done) / rate) + ' left', _size(rate) + '/s']
        try:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        except (OSError, ValueError):
            width = 80
        while len(parts) > 1 and len('  '.join(parts)) >= width:
            parts.pop()
        _show('  '.join(parts)[:max(1, width - 1)])

    return show


_COMPLETION = {  # what `etc completion` prints; it asks `etc completion SHELL WORD...` what the last word may become
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
    """What the last of the words after `etc` may become; nothing, where the shell shall offer files."""
    *before, last = words
    command = next((word for word in before if word in _COMMANDS), '')
    place = {flag: value for flag, value in zip(before, before[1:]) if flag in _COMMON[:3]}
    if before and before[-1] in _COMMON[:3]:
        known = []  # type: Iterable[str]
    elif last.startswith('-'):
        known = (_COMMANDS[command].flags if command else ('--version',)) + _COMMON + ('--help',)
    elif not command:
        known = _COMMANDS
    elif command == 'completion':
        known = _COMPLETION
    else:
        known = _names(_COMMANDS[command].names == 'remote' or bool({'-r', '--remote'} & set(before)), place) \
            if _COMMANDS[command].names else ()
    return [word for word in known if word.startswith(last) and word not in before]


def _names(remote: bool, place: Dict[str, str]) -> List[str]:
    """What ls() finds in a short time; nothing, if it fails."""
    import threading
    found = []  # type: List[str]

    def look() -> None:
        with contextlib.suppress(Error):
            config = Config.load(place.get('--config'), url=place.get('--url'), home=place.get('--home'))
            found.extend(ls(remote, config))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return found


def _run(args: Any, config: Config) -> None:
    """Do what one command says, for one dataset where it takes several."""
    if args.command == 'ls':
        if args.long or args.json:
            items = _list(args.remote, config)
            _print(json.dumps(items, indent=1)) if args.json else _print_list(items)
        else:
            for name in ls(args.remote, config):
                _print(name)
    elif args.command == 'info':
        found = info(args.name, args.remote, config, _meter('reading ' + args.name))
        _print(json.dumps(found, indent=1)) if args.json else _print_info(found)
    elif args.command == 'pull':
        pull(args.name, args.force, args.partitions or None, config, _meter('pulling ' + args.name))
    elif args.command == 'push':
        push(args.name, args.force, config, _meter('pushing ' + args.name))
    elif args.command == 'register':
        register(args.directory, args.name, args.force, args.copy, config, _meter('copying ' + args.directory))
    elif args.command == 'create':
        create(args.name, args.partitions or ('train', 'test'), args.force, config)
    elif args.command == 'verify':
        verify(args.name, config, _meter('verifying ' + args.name))
    elif args.command == 'purge':
        purge(args.name, config)
    elif args.command == 'completion':
        _print(_COMPLETION[args.shell])


@_public
def _arguments(argv: List[str]) -> Any:
    """The parsed command line; SystemExit after a usage error."""
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    parser.prog = ' '.join(filter(None, ('etc', args.command)))
    if rest and getattr(args, 'partitions', None) and not any(word.startswith('-') for word in rest):
        args.partitions += rest  # as in `etc pull NAME -p ONE TWO`
    elif rest:
        odd = next((word for word in rest if word.startswith('-')), rest[0])
        known = _COMMANDS[args.command].flags if args.command else ()
        parser.error("'%s' takes no '%s'%s" % (parser.prog, odd, _did_you_mean(odd, known + _COMMON)))
    if not args.command:
        parser.error('say what to do')
    if args.command == 'register':
        words = [word for at, word in enumerate(args.words) if at != 1 or word != 'as' or len(args.words) != 3]
        if len(words) > 2 or words[1:] == ['as']:
            parser.error('register takes DIR, DIR NAME or DIR as NAME')
        args.directory, args.name = (words + [None])[:2]
    return args


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it leaves nothing behind that is paid for.

    A signal that is ignored, as by nohup, stays ignored; one that a program around us handles is its own.
    """
    import signal
    replaced = []  # type: List[int]

    def end(number: int, _: Any) -> None:
        for other in replaced:  # a terminal that closes may send several
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    try:
        with contextlib.suppress(ValueError):  # only the main thread may do so
            for name in ('SIGTERM', 'SIGHUP'):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, end)
                    replaced.append(number)
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


@_tidy_end()
def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command `etc`; returns its exit status.

    0; 1 for an error; 2 for wrong usage; 128 and the number of the signal that ended it: 130 for Ctrl-C.
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
    global _spoken
    verbose = False
    try:
        args = _arguments(argv)
        verbose = getattr(args, 'verbose', False)
        _spoken = _DEBUG if verbose else _WARNING if getattr(args, 'quiet', False) else _INFO
        config = Config.load(getattr(args, 'config', None), url=getattr(args, 'url', None),
                             home=getattr(args, 'home', None))
        try:
            args.partitions = list(map(_from_os, getattr(args, 'partitions', None) or ()))
        except UnicodeError:
            raise InvalidDataset('the names of partitions must be UTF-8; rename them') from None
        failed = 0
        for name in getattr(args, 'names', [getattr(args, 'name', None)]):
            args.name = name
            try:
                _run(args, config)
                if sys.stdout is not None:
                    sys.stdout.flush()
            except Error as e:
                failed = 1
                _show_error(e, verbose)
        return failed
    except Error as e:
        _show_error(e, verbose)
        return 1
    except OSError as e:  # nowhere to print to, as in `etc ls | head -1`
        if not isinstance(e, BrokenPipeError):
            _complain('cannot write to standard output: %s' % e.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as e:
        _complain('interrupted')
        return 128 + (e.args[0] if e.args else 2)
    finally:
        _show('')
        _spoken = None


def _show_error(e: Error, verbose: bool) -> None:
    if verbose:
        import traceback
        traceback.print_exception(type(e), e, e.__traceback__)
    _complain(e)


if __name__ == '__main__':
    sys.exit(main())
