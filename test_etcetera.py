#!/usr/bin/env python3
"""Tests of etcetera: `python3 test_etcetera.py`, on any Python from 3.6 on, with nothing installed.

They drive the command line and the Python API over real directories and real sockets on 127.0.0.1. Classes that need
real peers (see [options.extras_require] test in setup.cfg) are skipped without them, and fail instead of being
skipped where ETC_TEST_REQUIRE_PEERS=1.
"""

import base64
import calendar
import contextlib
import email.utils
import errno
import faulthandler
import functools
import glob
import gzip
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import types
import unittest
import urllib.parse
import urllib.request
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import etcetera as etc  # noqa: E402

SCRIPT = str(HERE / 'etcetera.py')
AKID, SECRET = 'AKIDEXAMPLE', 'wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY'
MIB = 1 << 20
UNIT = 1 << 16  # what a Scaled test has for a MiB
RUNS = int(os.environ.get('ETC_TEST_RUNS') or 1)  # how many times longer random tests run
POSIX = unittest.skipIf(os.name == 'nt', 'only where there are signals, modes, links, scripts and terminals')
LINUX = unittest.skipUnless(sys.platform == 'linux', 'only where there are /proc, and the limits and paths of Linux')
# Another process imports the command, as this takes a fraction of the time to compile a script.
START = 'import sys; sys.path.insert(0, %r); import etcetera; vars(etcetera).update(%%r); ' \
        'sys.exit(etcetera.main())' % str(HERE)

parser_of = functools.lru_cache(maxsize=None)(etc._parser)  # as to make one takes longer than many a command
etc._parser = lambda argv=(): parser_of(tuple(argv[:1]))

ordered, pools = etc._ordered, []  # of which each must come to its end, see clean()
etc._ordered = lambda *args: pools.append(ordered(*args)) or pools[-1]

with contextlib.suppress(AttributeError, OSError):
    memory = os.statvfs('/dev/shm')  # is faster than many a disk
    if memory.f_bavail * memory.f_frsize >> 32 and not memory.f_flag & os.ST_NOEXEC and os.access('/dev/shm', 7):
        os.environ.setdefault('TMPDIR', '/dev/shm')


def needs(condition, reason):
    """Skip a class without its peers, but fail where they are demanded."""
    if condition or os.environ.get('ETC_TEST_REQUIRE_PEERS'):
        return lambda cls: cls
    return unittest.skip(reason)


def importable(*names):
    try:
        return all(map(importlib.util.find_spec, names))
    except ImportError:  # of the package of a submodule
        return False


# ---------------------------------------------------------------------------------------
# Data, and a place for it
# ---------------------------------------------------------------------------------------

def write(root, files):
    """Make files from {name: text or bytes}; None makes a directory, ('->', target) a link."""
    for name, content in files.items():
        path = Path(str(root), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        elif isinstance(content, tuple):
            os.symlink(content[1], str(path))
        else:
            path.write_bytes(content.encode('utf-8') if isinstance(content, str) else content)
    return Path(str(root))


@functools.lru_cache(maxsize=8)
def noise(size, seed=0):
    return hashlib.shake_128(repr(seed).encode()).digest(size)


def small(root):
    return write(root, {'data/train/a.txt': 'alpha\n', 'data/train/b.txt': 'beta\n' * 1000, 'data/test/c.txt': 'gamma',
                        'meta.json': '{"classes": 10}', 'README.md': '# Small\n', 'assets/logo.svg': '<svg/>'})


def odd(root, files=300):
    """All that makes tools stumble: long paths, odd names, links, an executable, emptiness."""
    write(root, {
        'README.md': 'hi', 'LICENCE': ('->', 'README.md'), 'meta.json': '{}', 'a-b': 'between a and a/', 'a/x': 'x',
        'a.b': 'after a-b', 'data/empty': None, 'data/train/empty.txt': '', 'data/train/hollow/hole': None,
        'data/train/white space': ' ', 'data/train/quo"te\'s': 'q', 'data/train/new\nline': 'n',
        'data/train/na\u00efve/\u65e5\u672c\u8a9e/\U0001f600': 'u', 'data/train/' + '\u00e9' * 60: 'e',
        'data/train/' + '/'.join(['d' * 60] * 5): 'deep', 'data/train/' + 'x' * 89: 'exactly a hundred',
        'data/train/' + 'y' * 90: 'one more', 'data/train/' + 'z' * 88 + '/f': 'directory of a hundred',
        'data/train/run.sh': '#!/bin/sh\n', 'data/train/in': ('->', 'white space'),
        'data/train/sub/up': ('->', '../run.sh'), 'data/train/self': ('->', '.'), 'data/train/dir': ('->', 'sub'),
        'data/test/big': noise(2 * etc._BLOCK + 12345), 'data/test/zeros': bytes(etc._BLOCK),
        'data/test/block': noise(etc._BLOCK - 1024, 1), 'assets/deep/er/file': 'f'})
    write(root, {'data/test/many/%05d.txt' % n: 'number %d\n' % n * (n % 7) for n in range(files)})
    os.chmod(str(root / 'data/train/run.sh'), 0o755)
    return root


def tree(root):
    """All that is below a directory, as {name: content}, but for the receipt of an installed dataset."""
    found = {}
    for top, directories, files in os.walk(str(root)):
        for path in [os.path.join(top, name) for name in directories + files]:
            key = os.path.relpath(path, str(root))
            if os.path.islink(path):
                found[key] = ('->', os.readlink(path))
            elif os.path.isdir(path):
                found[key] = None
            else:
                with open(path, 'rb') as file:
                    found[key] = (file.read(), bool(os.stat(path).st_mode & 0o100))
    found.pop('.etcetera.json', None)
    return found


def remove(path):
    """Take a file or a tree away, if it is there, whatever its modes are."""
    path = str(path)
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    elif os.path.isdir(path):
        os.chmod(path, 0o700)
        for top, directories, files in os.walk(path):
            for place in [os.path.join(top, name) for name in directories + files]:
                if not os.path.islink(place) and (os.name == 'nt' or os.path.isdir(place)):
                    os.chmod(place, 0o700)
        shutil.rmtree(path, ignore_errors=True)


def default_signals():
    """In a child: let signals reach it even where the tests run in the background, or under nohup, and ignore them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def split(words):
    """The words of a command line, of which a text may hold several."""
    return [part for word in words for part in (word.split() or [word] if isinstance(word, str) else [word])]


def use_libdeflate(value):
    """Let it compress and inflate, or not, until the test ends."""
    os.environ['ETC_LIBDEFLATE'] = value
    etc._libdeflate.cache_clear()


INTERRUPTED = b'etc: interrupted; run the same command again: a pull goes on, a push begins anew\n'


class Case(unittest.TestCase):
    maxDiff = 2000
    sizes = {}  # type: dict  # of blocks and more, in processes that are spawned

    def setUp(self):
        self.tmp = Path(os.path.realpath(tempfile.mkdtemp(prefix='etc-test-')))
        self.tmp.chmod(0o755)
        self.addCleanup(self.clean)
        saved = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(saved)))
        self.addCleanup(etc._libdeflate.cache_clear)
        for key in saved:
            if re.match('(?i)(ETC|AWS|GOOGLE|CLOUDSDK|STORAGE)_|.*_proxy$', key) and key != 'ETC_LIBDEFLATE':
                del os.environ[key]
        os.environ.update(HOME=str(self.tmp), USERPROFILE=str(self.tmp), AWS_EC2_METADATA_DISABLED='true',
                          no_proxy='127.0.0.1')
        logging.getLogger('etcetera').handlers[:] = []  # those of a command line before
        self.url = (self.tmp / 'share').as_uri()
        self.settings = {}

    def clean(self):
        remove(self.tmp)
        self.assertFalse(self.tmp.exists())
        left = [pool for pool in pools if inspect.getgeneratorstate(pool) == 'GEN_SUSPENDED']
        pools.clear()
        self.assertEqual(left, [], 'PyPy would end these and their threads at any time, as in the child of a fork')

    def config(self, home='home', **more):
        return etc.Config(**dict(dict(self.settings, url=self.url, home=self.tmp / home), **more))

    def etc(self, *args, home='home', url=None, status=0):
        """Run the command line in this process; returns (stdout, stderr)."""
        args, settings = split(args), self.tmp / 'settings.yaml'
        settings.write_text(''.join('%s: %s\n' % (k, json.dumps(v)) for k, v in self.settings.items()))
        settings.chmod(0o600)
        words = ['--config', settings, '--url', url or self.url, '--home', self.tmp / home, *args]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = etc.main([str(word) for word in words])
            except SystemExit as e:
                code = e.code
        out, err = out.getvalue(), err.getvalue()
        self.assertIn(code, (0, 1) if status is None else (status,), out + err)
        if code == 1 and (err or 'diff' not in args):  # which tells by it that there are differences
            self.assertTrue(err.splitlines()[-1].startswith('etc: ') and 'Traceback' not in err, err)
        return out, err

    def fails_with(self, problem, *args, **kwargs):
        """The command line fails and says this."""
        with self.subTest(args, problem=problem):
            self.assertIn(problem, self.etc(*args, status=1, **kwargs)[1])

    def nothing_is_left(self):
        self.assertEqual((self.installed(), self.leftovers()), ([], []))

    def large(self, size, name='ds'):
        """A dataset with one file, which cannot be compressed."""
        return write(self.tmp / name, {'data/train/x': noise(size)})

    def register(self, root, name='X', home='home'):
        self.etc('register', root, name, home=home)

    def share(self, root, name='X', home='home'):
        """Publish a dataset."""
        self.register(root, name, home)
        self.etc('push', name, home=home)

    def spawn(self, *args, home='home', url=None, python=('-S',), **kwargs):
        command = [sys.executable, *python, '-c', START % self.sizes, '--url', url or self.url,
                   '--home', self.tmp / home, *split(args)]
        env = dict(os.environ)
        for key, value in self.settings.items():
            if re.match('aws_|endpoint_url$', key):
                env['AWS_' + key.replace('aws_', '').upper()] = value
        if os.name == 'posix':
            kwargs.setdefault('preexec_fn', default_signals)
        return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=env, **kwargs)

    def installed(self, home='home'):
        return etc.ls(config=self.config(home))

    def leftovers(self, home='home'):
        """The work directories, but for those that only keep a replaced dataset for who still reads it."""
        return [p for p in (self.tmp / home / '.etcetera').glob('*')
                if p.name != 'locks' and glob.glob(str(p / '*')) != [str(p / 'gone')]]


class Scaled:
    """For a Case: blocks, ranges and parts are smaller, and so few data do; other tests show that the true sizes do."""

    def setUp(self):
        super().setUp()
        names = '_BLOCK _MIN_PART _LONG_PART _GS_PART _IN_FLIGHT _AHEAD _MIN_RANGE _FAIR_RANGE _MIN_SHARED'.split()
        self.sizes = {name: getattr(etc, name) * UNIT // MIB for name in names}
        self.sizes['_LONGEST_BLOCK'] = UNIT + 4096
        for name, size in self.sizes.items():
            stand_in(self, etc, name, size)


@contextlib.contextmanager
def unprivileged(*places):
    """As a user who is not root; root becomes one for a while, who owns these directories."""
    if os.name != 'posix' or os.geteuid():
        yield
        return
    for place in map(str, places):
        os.chown(place, 65534, -1)
        for top, directories, files in os.walk(place):
            for name in directories + files:
                os.chown(os.path.join(top, name), 65534, -1, follow_symlinks=False)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# ---------------------------------------------------------------------------------------
# An S3 server that checks signatures and knows conditions
# ---------------------------------------------------------------------------------------

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Counts, and lets a test misbehave: `fault(handler)` may answer itself, or return True for no answer."""
    daemon_threads = True
    request_queue_size = 128
    fault = respell = None
    final = None  # answers instead, once an object is stored
    copied = None  # gives what UploadPartCopy copies instead
    page = 1000
    conditions = encoding = may_list = True
    must_check = False  # as a bucket with Object Lock
    versioned = None  # or the version of the next delete marker
    sent = 0

    def __init__(self, handler, case=None):
        """case: the test, at whose end it stops."""
        super().__init__(('127.0.0.1', 0), handler)
        if case:
            case.addCleanup(self.stop)
        self.url = 'http://127.0.0.1:%d' % self.server_port
        self.lock = threading.RLock()
        self.objects = {}  # path -> (bytes, etag, headers)
        self.old = {}  # (path, version) -> what a bucket with versions keeps
        self.uploads = {}
        self.log = []  # (method, path with query, headers)
        self.connections = set()
        self.secrets = {AKID: SECRET}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass

    def stop(self):
        self.shutdown()
        self.server_close()


S3_XML = '<?xml version="1.0" encoding="UTF-8"?>\n<{0} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{1}</{0}>'
COMPLETED = S3_XML.format('CompleteMultipartUploadResult', (
    '<Location>%s/bucket/%s</Location><Bucket>bucket</Bucket><Key>%s</Key><ETag>&quot;%s&quot;</ETag>')).encode()


def asked_range(headers, size):
    """Where the range that a request asks for starts and stops (RFC 9110, 14.1.2)."""
    first, last = re.match(r'bytes=(\d*)-(\d*)$', headers['Range']).groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size)


class Handler(http.server.BaseHTTPRequestHandler):
    """What all fakes share. They implement handle_one()."""
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def do_GET(self):
        self.handle_one()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def read_body(self):
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def json(self, answer, status=200, headers=()):
        self.answer(status, json.dumps(answer).encode(), headers)

    def misbehaves(self):
        """Whether the server's fault has answered this request, or wants no answer to it."""
        self.is_answered = False
        return self.server.fault and (self.server.fault(self) or self.is_answered)

    def send_response(self, *args):
        self.is_answered = True
        super().send_response(*args)

    def send_header(self, keyword, value):
        """`server.respell` may send another value of a header, or None for not to send it."""
        value = self.server.respell(keyword, value) if self.server.respell else value
        if value is not None:
            super().send_header(keyword, value)

    def log_message(self, *args):
        pass

    def answer(self, status, body=b'', headers=(), length=None):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
            self.server.sent += len(body)

    def give(self, data, headers):
        """Answer with all of this, or with the range that is asked for."""
        if 'Range' not in self.headers:
            return self.answer(200, data, headers)
        start, stop = asked_range(self.headers, len(data))
        if start >= stop:
            return self.error(416, 'InvalidRange')
        headers['Content-Range'] = 'bytes %d-%d/%d' % (start, stop - 1, len(data))
        self.answer(206, data[start:stop], headers)


class SignedHandler(Handler):
    """Checks signatures."""
    service = 's3'
    error_xml = '<?xml version="1.0"?>\n<Error><Code>%s</Code><Message>%s</Message></Error>'

    def error(self, status, code, headers=(), message=''):
        self.answer(status, (self.error_xml % (code, message or 'about ' + code)).encode(), headers)

    def unsigned(self, body):
        """What is wrong with the signature; written from AWS's description, not from etcetera."""
        match = re.match(r'AWS4-HMAC-SHA256 Credential=([^/]+)/((\d{8})/([^/]+)/%s/aws4_request), ?SignedHeaders='
                         r'([^,]+), ?Signature=([0-9a-f]{64})$' % self.service, self.headers.get('Authorization', ''))
        if not match:
            return 'AccessDenied'
        akid, scope, day, region, names, signature = match.groups()
        names = ';'.join(sorted(names.split(';')))
        if akid not in self.server.secrets:
            return 'InvalidAccessKeyId'
        digest = hashlib.sha256(body).hexdigest()
        if self.headers.get('x-amz-content-sha256', 'none' if self.service == 's3' else digest) != digest:
            return 'XAmzContentSHA256Mismatch'
        if not {name.lower() for name in self.headers if name.lower().startswith('x-amz-')} <= set(names.split(';')):
            return 'AccessDenied'
        path, _, query = self.path.partition('?')
        pairs = sorted(urllib.parse.parse_qsl(query, keep_blank_values=True))
        canonical = '\n'.join([
            self.command, urllib.parse.quote(urllib.parse.unquote(path), safe='/~'),
            urllib.parse.urlencode(pairs, safe='~', quote_via=urllib.parse.quote),
            ''.join('%s:%s\n' % (name, self.headers[name].strip()) for name in names.split(';')), names, digest])
        stamp = self.headers['x-amz-date']
        text = '\n'.join(['AWS4-HMAC-SHA256', stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = b'AWS4' + self.server.secrets[akid].encode()
        for part in (day, region, self.service, 'aws4_request', text):
            key = hmac.new(key, part.encode(), 'sha256').digest()
        return None if key.hex() == signature and stamp[:8] == day else 'SignatureDoesNotMatch'


class S3Handler(SignedHandler):
    def handle_one(self):
        body = self.read_body()
        self.server.log.append((self.command, self.path, self.headers))
        self.server.connections.add(self.client_address)
        if self.misbehaves():
            return
        problem = self.unsigned(body)
        if problem:
            return self.error(403, problem)
        path, _, query = self.path.partition('?')
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        bucket, _, self.key = urllib.parse.unquote(path)[1:].partition('/')
        if bucket != 'bucket':
            return self.error(404, 'NoSuchBucket')
        with self.server.lock:
            if self.command in ('GET', 'HEAD') and not self.key:
                return self.list()
            getattr(self, 's3_' + self.command.lower())(body)

    def xml(self, name, text):
        self.answer(200, S3_XML.format(name, text).encode(), {'Content-Type': 'application/xml'})

    def list(self):
        prefix, after = self.query.get('prefix', ''), self.query.get('continuation-token', '')
        keys = sorted(k for k in self.server.objects if k > after and re.match(re.escape(prefix) + '[^/]*$', k))
        page, more = keys[:self.server.page], len(keys) > self.server.page
        url = self.server.encoding and self.query.get('encoding-type') == 'url'
        encode = urllib.parse.quote_plus if url else escape
        items = '<EncodingType>url</EncodingType>' * url
        for key in page:
            data, etag, _ = self.server.objects[key]
            items += ('<Contents><Key>%s</Key><LastModified>2024-05-06T07:08:09.000Z</LastModified><ETag>%s</ETag>'
                      '<Size>%d</Size></Contents>' % (encode(key), escape(etag), len(data)))
        if more:
            items += '<NextContinuationToken>%s</NextContinuationToken>' % escape(page[-1])
        self.xml('ListBucketResult', items + '<IsTruncated>%s</IsTruncated>' % str(more).lower())

    def s3_get(self, body):
        if self.key not in self.server.objects:
            return self.error(404, 'NoSuchKey') if self.server.may_list else self.error(403, 'AccessDenied')
        data, etag, _ = self.server.objects[self.key]
        headers = {'ETag': etag, 'Last-Modified': 'Mon, 06 May 2024 07:08:09 GMT'}
        if self.server.conditions and self.headers.get('If-Match', etag) != etag:
            return self.error(412, 'PreconditionFailed')
        self.give(data, headers)

    s3_head = s3_get

    def s3_put(self, body):
        sums = {'Content-MD5': md5, 'x-amz-checksum-sha256': hashlib.sha256}
        given = {name: self.headers[name] for name in sums if self.headers[name]}
        kind = 'Part' if 'partNumber' in self.query else 'Object'
        copies = self.headers['x-amz-copy-source']
        if copies and given:
            return self.error(400, 'InvalidRequest', message='there is no body to check')
        if self.server.must_check and not given and not copies:
            return self.error(400, 'InvalidRequest', message='Content-MD5 OR x-amz-checksum- HTTP header is '
                              'required for Put %s requests with Object Lock parameters' % kind)
        if any(base64.b64decode(value) != sums[name](body).digest() for name, value in given.items()):
            return self.error(400, 'BadDigest')
        if kind == 'Object':
            return self.store(body, self.headers)
        if self.query['uploadId'] not in self.server.uploads:
            return self.error(404, 'NoSuchUpload')
        headers, parts = self.server.uploads[self.query['uploadId']]
        number, algorithm = int(self.query['partNumber']), headers['x-amz-checksum-algorithm']
        if copies:
            return self.copy_part(parts, number, algorithm)
        if 'x-amz-checksum-sha256' in given and algorithm != 'SHA256':
            return self.error(400, 'InvalidRequest', message='Checksum Type mismatch occurred')
        parts[number] = body
        given.pop('Content-MD5', None)
        self.answer(200, b'', dict(given, ETag='"%s"' % hashlib.sha1(body).hexdigest()))

    def copy_part(self, parts, number, algorithm):
        bucket, _, key = urllib.parse.unquote(self.headers['x-amz-copy-source']).lstrip('/').partition('/')
        if bucket != 'bucket' or key not in self.server.objects:
            return self.error(404, 'NoSuchKey')
        data, etag, _ = self.server.objects[key]
        if self.headers.get('x-amz-copy-source-if-match', etag) != etag:
            return self.error(412, 'PreconditionFailed')
        start, stop = map(int, re.match(r'bytes=(\d+)-(\d+)$', self.headers['x-amz-copy-source-range']).groups())
        if not start <= stop < len(data) or stop - start >= 5 << 30:
            return self.error(400, 'InvalidArgument')
        copied = self.server.copied(data, start, stop + 1) if self.server.copied else data[start:stop + 1]
        parts[number], etag = copied, hashlib.sha1(copied).hexdigest()
        xml = '<LastModified>2024-05-06T07:08:09.000Z</LastModified><ETag>&quot;%s&quot;</ETag>' % etag
        if algorithm == 'SHA256':
            xml += '<ChecksumSHA256>%s</ChecksumSHA256>' % base64.b64encode(hashlib.sha256(copied).digest()).decode()
        self.xml('CopyPartResult', xml)

    def store(self, data, headers):
        if self.server.conditions and self.headers.get('If-None-Match') == '*' and self.key in self.server.objects:
            return self.error(412, 'PreconditionFailed')
        etag = '%s-x' % hashlib.sha1(data).hexdigest()
        self.server.objects[self.key] = data, '"%s"' % etag, headers
        if self.server.final:
            return self.server.final(self)
        if self.command == 'PUT':
            return self.answer(200, b'', {'ETag': '"%s"' % etag})
        key = self.key.encode()
        self.answer(200, COMPLETED % (self.server.url.encode(), key, key, etag.encode()))

    def s3_post(self, body):
        if 'uploads' in self.query:
            upload = os.urandom(8).hex()
            self.server.uploads[upload] = self.headers, {}
            xml = '<Bucket>bucket</Bucket><Key>%s</Key><UploadId>%s</UploadId>' % (escape(self.key), upload)
            return self.xml('InitiateMultipartUploadResult', xml)
        if self.query['uploadId'] not in self.server.uploads:
            return self.error(404, 'NoSuchUpload')
        headers, parts = self.server.uploads[self.query['uploadId']]
        if headers['x-amz-checksum-algorithm'] and body.count(b'<ChecksumSHA256>') != len(parts):
            return self.error(400, 'InvalidRequest', message='The upload was created using a sha256 checksum.')
        listed = re.findall(r'<PartNumber>(\d+)</PartNumber><ETag>([^<]*)</ETag>', body.decode().replace('&quot;', '"'))
        data = [parts[number] for number in sorted(parts)]
        if listed != [(str(n), '"%s"' % hashlib.sha1(part).hexdigest()) for n, part in zip(sorted(parts), data)]:
            return self.error(400, 'InvalidPart')
        if any(len(part) < etc._MIN_PART for part in data[:-1]):  # 5 MiB
            return self.error(400, 'EntityTooSmall')
        if not (self.server.conditions and self.headers.get('If-None-Match') and self.key in self.server.objects):
            del self.server.uploads[self.query['uploadId']]
        self.store(b''.join(data), headers)

    def s3_delete(self, body):
        """https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-deletes.html, and API_DeleteObject.html."""
        if 'uploadId' in self.query:
            self.server.uploads.pop(self.query['uploadId'], None)
            return self.answer(204)
        found = self.server.objects.get(self.key)
        if self.server.conditions and 'If-Match' in self.headers:
            if not found:
                return self.error(404, 'NoSuchKey')
            if self.headers['If-Match'] not in (found[1], '*'):
                return self.error(412, 'PreconditionFailed')
        self.server.objects.pop(self.key, None)
        version = self.server.versioned
        self.answer(204, headers={'x-amz-delete-marker': 'true', 'x-amz-version-id': version} if version else {})


class S3Case(Case):
    def setUp(self):
        super().setUp()
        self.server = Server(S3Handler, self)
        self.url = 's3://bucket/some/prefix'
        self.settings = {'endpoint_url': self.server.url, 'aws_access_key_id': AKID, 'aws_secret_access_key': SECRET}

    def put(self, name, data):
        self.server.objects['some/prefix/' + name] = data, '"%s"' % hashlib.sha1(data).hexdigest(), {}

    def requests(self, method=None):
        return [path for m, path, _ in self.server.log if method in (None, m)]


# ---------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------

def settings_of(config):
    return {key: value for key, value in vars(config).items() if not key.startswith('_')}


def agrees_with_yaml(path, data):
    """Whether these settings are accepted; if so, they mean the same to PyYAML."""
    path.write_bytes(data)
    try:
        found = etc.Config.load(path)
    except etc.ConfigError:
        return False
    if importable('yaml'):
        import yaml
        expected = yaml.load(data.decode('utf-8'), getattr(yaml, 'CSafeLoader', yaml.SafeLoader)) or {}
        assert settings_of(found) == settings_of(etc.Config(**expected)), (data, found, expected)
    return True


class Settings(Case):
    def load(self, text, mode=0o600, name='.etc.yaml'):
        path = self.tmp / name
        path.write_bytes(text.encode('utf-8') if isinstance(text, str) else text)
        path.chmod(mode)
        return etc.Config.load()

    def fails(self, text, *words):
        """The last line is named, and a remedy."""
        with self.assertRaises(etc.ConfigError) as caught:
            self.load(text)
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertTrue(str(caught.exception).isprintable())

    def test_what_is_read(self):
        config = self.load(
            '# comment\n---\nurl: s3://bucket/x#y  # why\nhome:   ~/data \npublic: true\nregion: "a\\u0041\\u00e9"\n'
            "endpoint_url: 'it''s'\nconnections: 16\ncompression_level: 0\nca_bundle:\n"
            "aws_access_key_id: a:b\r\n'google_credentials': x y\n")
        self.assertEqual(settings_of(config), settings_of(etc.Config(
            's3://bucket/x#y', self.tmp / 'data', public=True, region='aA\u00e9', endpoint_url="it's", connections=16,
            compression_level=0, aws_access_key_id='a:b', google_credentials='x y')))
        for text, value in ((r'"C:\\udata"', 'C:\\udata'), (r'"\\\u00e9"', '\\\u00e9'), ('"yes"', 'yes'),
                            ("'017'", '017'),
                            ('yes!', 'yes!'), ('a_1', 'a_1')):
            with self.subTest(text):
                self.assertEqual(self.load('region: ' + text).region, value)
        self.assertIs(self.load('public: false').public, False)

    def test_what_is_refused(self):
        for problem, texts in (
                ("not of the form 'key: value'", 'url;url:x; url: x;\turl: x;- x;? a;...;%YAML 1.1'),
                ('this YAML syntax is not supported; put the value in double quotes',
                 'url: [a];url: {a: b};url: |;url: >;url: &a b;url: *a;url: !!str x;url: a: b;url: @x;url: `x`;'
                 'url: %x;url: a\tb'),
                ('quotes', 'url: 1.5;url: 2001-01-01;url: 1:30;url: -x;url: .inf;aws_access_key_id: 1234'),
                ('quotes', 'public: yes;region: No;region: on;region: off;region: TRUE;public: False'),
                ('quotes', 'connections: 0x10;connections: 1_000;connections: 017;region: 0b1;connections: +1'),
                ('put the value in double quotes', 'url: "a;url: \'a\' b;url: "a"#b'),
                ('put the value in double quotes',
                 r'home: "\ud83d\ude00";home: "\\\ud83d";home: "\ud83d";home: "\q";home: "\x41"'),
                ('yes', 'yes: x'), ('YAML does not allow one of these characters', 'url: a\x07b;url: a\u2028b'),
                ('is set a second time', 'url: a\nurl: b'),
                ("unknown setting 'endpont_url'; there are url, home, public, ", 'url: s3://b\nendpont_url: x'),
                ('true or false', 'public: 1'), ('whole number', '\nconnections: many;connections: true'),
                ('from 1 to 256', 'connections: 0;connections: 257'), ('from 0 to 9', 'compression_level: 10'),
                ("unknown setting 'ulr'", '\ufeffurl: x\nulr: x')):
            for text in texts.split(';'):
                with self.subTest(text):
                    self.fails(text, problem, '%s/.etc.yaml:%d: ' % (self.tmp, text.count('\n') + 1))
        self.fails(b'url: \xff', str(self.tmp / '.etc.yaml'), 'UTF-8')

    def test_byte_order_mark(self):
        """Notepad and PowerShell begin files with one."""
        self.assertEqual(self.load('\ufeffurl = "s3://toml"\nregion = "x"\n', name='.etc.toml').url, 's3://toml')
        self.assertEqual(self.load('\ufeffurl: s3://yaml\nregion: x\n').url, 's3://yaml')

    def test_precedence(self):
        self.load('url: file:///a\nhome: /h/a')
        for environment, overrides, url, home in (
                ({}, {}, 'file:///a', '/h/a'), ({'ETC_URL': 'file:///b', 'ETC_HOME': '/h/b'}, {}, 'file:///b', '/h/b'),
                ({}, {'url': 'file:///c', 'home': '/h/c'}, 'file:///c', '/h/c')):
            os.environ.update(environment)
            config = etc.Config.load(**overrides)
            self.assertEqual((config.url, config.home), (url, Path(os.path.abspath(home))))
        os.environ['ETC_CONFIG'] = str(self.tmp / 'other.yaml')
        with self.assertRaisesRegex(etc.ConfigError, 'cannot read the settings file .*; make it readable, or name'):
            etc.Config.load()
        write(self.tmp, {'other.yaml': 'region: x\n'})
        self.assertEqual(etc.Config.load().region, 'x')

    def test_nothing_is_needed_for_local_work(self):
        config = etc.Config.load()
        self.assertEqual((config.url, config.home), (None, self.tmp / '.etc'))
        self.assertEqual(etc.ls(), [])
        with self.assertRaisesRegex(etc.ConfigError, r'^no url; set where datasets are shared .* ~/\.etc\.yaml'):
            etc.ls(remote=True)
        self.assertFalse((self.tmp / '.etc').exists())

    def test_secrets(self):
        self.assertNotIn('hush', repr(etc.Config('s3://b', aws_secret_access_key='hush', aws_session_token='hush')))
        with self.assertLogs('etcetera', 'WARNING') as logs:
            self.load('aws_secret_access_key: x', 0o600)
            self.load('region: x', 0o644)
            self.assertEqual(logs.output, [])
            self.load('aws_secret_access_key: x', 0o644)
        self.assertIn('chmod 600', logs.output[0])

    def test_config_in_python(self):
        with self.assertRaisesRegex(etc.ConfigError, "^unknown setting 'nonsense'"):
            etc.Config('s3://b', nonsense=1)
        with self.assertRaisesRegex(etc.ConfigError, "^'public' must be true or false"):
            etc.Config('s3://b', public='yes')


@needs(importable('yaml'), 'PyYAML is not installed')
class SettingsOracle(Case):
    def test_generated_documents(self):
        rng = random.Random(7)
        atoms = (
            'yes;No;true;off;null;~;;0;7;-3;+4;0x1F;0b101;017;08;1_000;1.5;1e3;.5;1:30;2001-01-01;s3://b/c;a b;a#b;'
            'a #b;# c;"q";'
            '\'q\';"a\\nb";"\\x41\\u00e9\\U0001F600";\'it\'\'s\';"a" # c;\'a\'  # c;";\';a: b;a:;:a;-;- a;-a;?;'
            '? a;[a];{a: b};,;'
            '&a;*a;!a;|;>;%a;@a;`a;'
            '\u00e9;\u65e5;a\tb;\ta;a\u00a0;a\u2028b;a\x85b;<<;=;.;..;.inf;.NaN;0o7;0_;_1;1_;"\\/";"\\ ";'
            '"\\\t";a\\nb;a\'b;a"b;~x;nullx;Yes!;y;N;---;--- a;...;a  ;'
            '12e03;1.;685.230_15e+03;190:20:30;-0;+0x_1;1__0;a];a};'
            'a,b;a,;http://x:1/;::;a::b;a :b;false;False;12;200;256').split(';')
        shapes = ('%s: %s;%s:  %s;%s : %s;%s:%s; %s: %s;"%s": %s;\'%s\': %s;%s:\t%s;%s: %s ;%s: %s # c;# %s%s;'
                  '%s;- %s: %s;%s: %s\n  more;%s:\n- %s;%s:\n %s').split(';')
        keys = 'region sse public connections url storage_class home'.split()
        read = 0
        for _ in range(3000 * RUNS):
            lines = []
            for _ in range(rng.randrange(1, 4)):
                shape = rng.choice(shapes) if rng.random() < .4 else shapes[0]
                value = ''.join(rng.choice(atoms) for _ in range(1 if rng.random() < .7 else 2))
                lines.append(shape % (rng.choice(keys), value)[:shape.count('%s')])
            text = rng.choice(['', '---\n', '\n', '# c\n']) + rng.choice(['\n', '\n', '\r\n', '\n\n']).join(lines)
            read += agrees_with_yaml(self.tmp / 'settings', text.encode('utf-8'))
        self.assertGreater(read, 300)


# ---------------------------------------------------------------------------------------
# Datasets and local commands
# ---------------------------------------------------------------------------------------

class Datasets(Case):
    def test_mapping(self):
        ds = etc.register(small(self.tmp / 'ds'), 'Small', config=self.config())
        root = self.tmp / 'home/Small'
        self.assertEqual((ds.name, ds.root, ds.meta, len(ds)), ('Small', root, {'classes': 10}, 2))
        self.assertEqual((ds.keys(), list(ds)), ({'test', 'train'}, ['test', 'train']))
        self.assertEqual(dict(ds), {name: root / 'data' / name for name in ds})
        self.assertRegex(repr(ds) + ds.digest, r'Small.*sha256:[0-9a-f]{64}$')
        with self.assertRaises(KeyError) as caught:
            ds['val']
        self.assertIsInstance(caught.exception, etc.Error)
        self.assertEqual(str(caught.exception), "no partition 'val' in Small, as it is here: test, train; "
                         "'etc pull Small -p val' would add it, if there is one")
        self.assertNotIn('val', ds)
        self.assertIsNone(ds.get('val'))
        self.assertFalse(hasattr(ds, '__setitem__'))

    def test_validation(self):
        root = self.tmp / 'bad'
        for files, problem in (
                ({'x': 'y'}, "needs a directory 'data'"), ({'data': 'y'}, "needs a directory 'data'"),
                ({'data': None}, 'is no dataset: '),
                ({'data/p/x': 'y', 'data/stray': 'z'},
                 "may hold only directories (partitions), but 'data/stray' is none"),
                ({'data/p/x': 'y', 'data/link': ('->', 'nowhere')}, "but 'data/link' is none"),
                ({'data/p/x': 'y', 'meta.json': '[1]'}, 'JSON object'),
                ({'data/p/x': 'y', 'meta.json': '{'}, 'meta.json is not JSON'),
                ({'data/p/x': 'y', 'meta.json': b'\xff'}, 'meta.json is not JSON'),
                ({'data/p/x': 'y', 'meta.json': None}, 'meta.json is not JSON: it is not a file'),
                ({}, 'no directory %s' % root)):
            write(root, files)
            self.fails_with(problem, 'register', root, 'Bad')
            self.assertRaises(etc.InvalidDataset, etc.Dataset, root)
            self.assertEqual(self.installed(), [])
            remove(root)
        self.fails_with('no file can have the path', 'register', 'a\0b', 'X')

    def test_names(self):
        root = small(self.tmp / 'ds')
        bad = '. .. .x -x _x a/b a\\b \u00e9 a@b ../x /x a@sha256:12 CON\0'.split() + ['', 'a b', 'a\n', 'x' * 129]
        for name in bad:
            for call in (etc.pull, etc.push, etc.create, etc.purge, etc.verify, etc.dataset, etc.info, etc.register):
                with self.subTest(name=name, call=call.__name__):
                    with self.assertRaisesRegex(etc.InvalidDataset, "cannot be a dataset's name"):
                        call(*[root] * (call is etc.register), name, config=self.config())
        self.assertFalse((self.tmp / 'home').exists())
        for name in ('a', '0', 'A.b-c_d', 'x' * 128):
            self.register(root, name)

    def test_register(self):
        root, other = small(self.tmp / 'ds'), small(self.tmp / 'other')
        self.etc('register', root)
        self.etc('register', root, 'as Two')
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(str(self.tmp))
        self.etc('register ./ds Three')
        self.assertEqual(self.etc('ls')[0], 'Three\nTwo\nds\n')
        self.assertIn('registered', self.etc('register', root, 'Two')[1])
        self.fails_with('is installed already', 'register', other, 'Two')
        self.etc('register -f', other, 'Two')
        self.assertEqual([(self.tmp / 'home' / name).resolve() for name in ('Two', 'Three')], [other, root])
        for words in ('a b c', 'a as b c'):
            err = self.etc('register', words, status=2)[1]
            self.assertIn("'etc register -h' shows how", err)
        self.etc('purge Two Three')
        self.assertEqual((self.installed(), tree(other)), (['ds'], tree(root)))

    def test_register_copy(self):
        root, new, copy = odd(self.tmp / 'ds', 10), small(self.tmp / 'new'), self.tmp / 'home/Copy'
        self.etc('register --copy', root, 'Copy')
        self.assertFalse(copy.is_symlink())
        self.assertEqual(tree(copy), tree(root))
        self.assertEqual(etc.verify('Copy', config=self.config()), etc.Dataset(root).digest)
        for path in copy.rglob('*'):
            self.assertFalse(path.is_file() and path.stat().st_mode & 0o222, path)
        self.fails_with("another 'Copy' is installed already", 'register --copy', root, 'Copy')
        self.etc('register --copy -f', new, 'Copy')
        self.assertEqual(tree(copy), tree(new))
        self.etc('register -f', root, 'Copy')  # a directory makes room for a link
        self.assertTrue(copy.is_symlink())
        self.etc('register -f --copy', new, 'Copy')  # and a link for a directory
        self.assertEqual((tree(copy), self.leftovers()), (tree(new), []))

    def test_create(self):
        self.etc('create New')
        self.assertEqual(list(etc.dataset('New', config=self.config())), ['test', 'train'])
        self.fails_with("another 'New' is installed already", 'create New')
        write(self.tmp / 'home/New', {'data/train/x': 'x'})
        self.etc('create -f New val', Path('dev set'))
        expected = write(self.tmp / 'new', {'data/val': None, 'data/dev set': None})
        self.assertEqual(tree(self.tmp / 'home/New'), tree(expected))
        for bad in ('..', 'a/b', '.', ''):
            self.fails_with("etc: '%s' cannot be a partition's name" % bad, 'create Bad', bad)
        for bad in ('train', ()):
            with self.assertRaisesRegex(etc.ConfigError, 'must be a list of one or more names'):
                etc.create('Bad', bad, config=self.config())

    def test_register_what_is_installed(self):
        self.etc('register --copy', small(self.tmp / 'ds'), 'X')
        write(self.tmp / 'home/X/data', {'data/p/x': 'x'})  # so that even data/ looks like a dataset
        for path in ('home/X', 'home/X/data/..', 'home/X/data'):
            self.fails_with("is what is installed as 'X'; use --copy", 'register -f', self.tmp / path, 'X')
        self.etc('register -f --copy', self.tmp / 'home/X', 'X')
        self.register(self.tmp / 'home/X', 'Y')
        self.assertEqual(*[etc.dataset(name, config=self.config()).digest for name in 'XY'])

    def test_registered_directory_that_is_gone(self):
        self.register(small(self.tmp / 'ds'))
        remove(self.tmp / 'ds')
        for command in ('push', 'verify', 'info'):
            self.fails_with("'etc purge X' forgets it", command, 'X')
        self.etc('ls -l')
        self.etc('purge X')

    def test_a_file_for_a_directory(self):
        file = str(write(self.tmp, {'file': 'x'}) / 'file')
        problem = ('Not a directory: ' if os.name == 'posix' else '') + file
        self.fails_with(problem, 'ls -l', home='file')
        self.fails_with(problem, 'create X', home='file/home')
        self.fails_with(problem, 'ls -r -l', url=Path(file).as_uri())

    def test_info_and_purge(self):
        self.etc('register --copy', small(self.tmp / 'ds'), 'Small')
        self.assertRegex(self.etc('info Small')[0], '(?s)sha256:.*test.*train.*"classes": 10.*# Small')
        found, = json.loads(self.etc('ls --json')[0])
        more = json.loads(self.etc('info --json Small')[0])
        self.assertEqual(more, dict(found, meta={'classes': 10}, readme='# Small\n'))
        self.assertEqual(found['partitions'], {'train': {'files': 2, 'size': 5006}, 'test': {'files': 1, 'size': 5}})
        self.assertIn(found['digest'], self.etc('ls -l')[0])
        self.assertIn(b'Traceback', self.spawn('-v info Nope').communicate()[1])
        for path in (self.tmp / 'home').rglob('Small/**'):
            path.chmod(0o555)
        self.assertEqual(self.etc('purge Nope Small Nada', status=1)[1].count('etc: no local dataset'), 2)
        self.nothing_is_left()

    def test_verify(self):
        self.etc('register --copy', small(self.tmp / 'ds'), 'Small')
        digest = etc.verify('Small', config=self.config())
        self.etc('verify Small@' + digest)
        self.fails_with("'Small': expected digest sha256:000", 'verify Small@sha256:' + '0' * 64)
        victim = self.tmp / 'home/Small/data/train/a.txt'
        victim.chmod(0o644)
        victim.write_text('alphA\n')
        err = self.etc('verify Small', status=1)[1]
        self.assertIn('not what was installed: data/train;', err)
        self.assertNotIn('data/test', err)
        self.fails_with("the files of 'Small': expected digest %s, found" % digest, 'push Small')
        self.assertEqual(tree(self.tmp / 'share'), {})


# ---------------------------------------------------------------------------------------
# The archive format, read and written here independently
# ---------------------------------------------------------------------------------------

PINNED = 'sha256:04a28282072296f3cbbc2ea22b5cc10bb832a4bcc56f36ef05975be6684a31ae'
EMPTY = b'\3\0' + bytes(8)  # what follows the header of an empty member


def members(archive):
    """All gzip members as (offset, length, tag, extra, payload)."""
    found, at = [], 0
    while at < len(archive):
        magic, total, tag, length = struct.unpack_from('<4s6xH2sH', archive, at)
        assert (magic, total) == (b'\x1f\x8b\x08\x04', length + 4), at
        inflater = zlib.decompressobj(31)
        payload = inflater.decompress(archive[at:])
        assert inflater.eof
        size = len(archive) - at - len(inflater.unused_data)
        found.append((at, size, tag, archive[at + 16:at + 16 + length], payload))
        at += size
    return found


def member(tag, data):
    """The header of a gzip member with one extra field."""
    return b'\x1f\x8b\x08\x04' + bytes(5) + b'\xff' + struct.pack('<H2sH', len(data) + 4, tag, len(data)) + data


def deflated(data, level=6):
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def block(payload, body=None, crc=None, size=None):
    """A block with this payload; all else may lie."""
    body = deflated(payload) if body is None else body
    trailer = struct.pack('<II', zlib.crc32(payload) if crc is None else crc, len(payload) if size is None else size)
    return member(b'et', struct.pack('<I', 28 + len(body))) + body + trailer


def mended(tar):
    """With right checksums wherever a header may be."""
    tar = bytearray(tar)
    for at in range(0, len(tar) - 511, 512):
        if tar[at + 257:at + 262] == b'ustar':
            tar[at + 148:at + 156] = b' ' * 8
            tar[at + 148:at + 155] = b'%06o\0' % sum(tar[at:at + 512])
    return bytes(tar)


def entry(name, data=b'', kind=None, mode=None, link='', mtime=315532800, pax=(), **fields):
    """A canonical tar entry; its header may have other bytes at _OFFSET."""
    info = tarfile.TarInfo(name)
    info.type = kind or (b'5' if name.endswith('/') else b'0')
    info.mode = mode or (0o755 if info.type == b'5' else 0o644)
    info.size, info.linkname, info.mtime, info.pax_headers = len(data), link, mtime, dict(pax)
    raw = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    own = len(raw) - 512  # after those of pax
    raw[329:345] = bytes(16)  # device numbers, which Python has left out since 3.9
    for field, value in dict({'_329': bytes(16)}, **fields).items():
        at = own + int(field[1:])
        raw[at:at + len(value)] = value
    return mended(raw) + data + bytes(-len(data) % 512)


def framed(text, offset):
    """The members that hold the text of an index, and the footer."""
    steps = [text[at:at + 8000] for at in range(0, len(text), 8000)]
    return b''.join(member(b'ei', step) + EMPTY for step in steps) + member(b'ef', struct.pack('<Q', offset)) + EMPTY


def sha256(data):
    return hashlib.sha256(data).digest()


def archive_of(*segments, **lies):
    """An archive of (path, files, size, payloads of blocks); the index may tell lies of the last one.

    Instead of a payload, there may be (payload, what stands for it).
    """
    data, told, total = b'', [], b''
    for path, files, size, blocks in segments:
        blocks = [each if isinstance(each, tuple) else (each, block(each)) for each in blocks]
        digest = 'sha256:' + sha256(b''.join(sha256(payload) for payload, _ in blocks)).hex()
        coded = b''.join(coded for _, coded in blocks)
        told.append(dict(path=path, offset=len(data), length=len(coded), files=files, size=size, digest=digest))
        data += coded
    told[-1].update(lies)
    for each in told:
        total += each['path'].encode() + b'\0' + bytes.fromhex(str(each['digest'])[7:])
    data += block(bytes(1024))
    index = {'etcetera': 1, 'digest': 'sha256:' + sha256(total).hex(), 'segments': told}
    return data + framed(json.dumps(index, ensure_ascii=False).encode(), len(data))


def indexed(payload, **lies):
    """An archive whose partition data/train is this payload, which holds one empty file unless told otherwise."""
    return archive_of(('.', 0, 0, [entry('data/')]), ('data/train', 1, 0, [payload]), **lies)


def canonical(root, names):
    """The canonical tar bytes of some names."""
    out = b''
    for name in names:
        path = root / name
        if path.is_symlink():
            out += entry(name, kind=b'2', link=os.readlink(str(path)))
        elif path.is_dir():
            out += entry(name + '/')
        else:
            out += entry(name, path.read_bytes(), mode=0o755 if path.stat().st_mode & 0o100 else 0o644)
    return out


def foreign_tools(*tools):
    """Those that are here."""
    found = [tool for tool in tools if shutil.which(tool)]
    assert len(found) == len(tools) or not os.environ.get('ETC_TEST_REQUIRE_PEERS'), found
    return found


class Format(Case):
    def push(self, root, **settings):
        etc.register(root, 'X', force=True, config=self.config())
        etc.push('X', force=True, config=self.config(**settings))
        return (self.tmp / 'share/X.tgz').read_bytes()

    def check_pull(self, expected):
        self.etc('pull X', home='two')
        self.etc('verify X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), expected)

    def test_structure(self):
        root, segments = odd(self.tmp / 'ds'), []
        names = {name.replace(os.sep, '/'): content for name, content in tree(root).items()}
        for path in '. a assets data/empty data/test data/train'.split():
            inside = [n for n in names if (n + '/').startswith(path + '/')
                      or path == '.' and '/' not in n and (n == 'data' or names[n])]
            payload = canonical(root, sorted(inside, key=lambda n: n.split('/')))
            files = [names[n][0] for n in inside if names[n]]
            segments.append((path, len(files), sum(len(data) for data in files if data != '->'),
                             [payload[at:at + MIB] for at in range(0, len(payload), MIB)]))
        write(root, {'.etcetera.json': 'the receipt of an installed dataset that was copied'})
        found, expected = members(self.push(root)), members(archive_of(*segments))
        blocks, index = [[m for m in found if m[2] == tag] for tag in (b'et', b'ei')]
        self.assertEqual(found[-1][1:], (34, b'ef', struct.pack('<Q', index[0][0]), b''))
        self.assertEqual(found, blocks + index + found[-1:])
        self.assertTrue(all(len(m[3]) <= 8000 and m[4] == b'' for m in index))
        self.assertTrue(all(m[3] == struct.pack('<I', m[1]) for m in blocks))
        self.assertTrue([m[4] for m in blocks] == [m[4] for m in expected if m[2] == b'et'])
        text, told = (json.loads(b''.join(m[3] for m in each if m[2] == b'ei').decode('utf-8'))
                      for each in (found, expected))
        for segment, other, (_, _, _, parts) in zip(text['segments'], told['segments'], segments):
            own, blocks = blocks[:len(parts)], blocks[len(parts):]
            other.update(offset=own[0][0], length=sum(m[1] for m in own))
        self.assertEqual(text, told)

    def test_blocks(self):
        root = write(self.tmp / 'ds', {'data/a/noise': noise(3 * MIB),
                                       'data/b/text': 'some text, again and again\n' * 120000})
        archive = self.push(root)
        blocks = [m for m in members(archive) if m[2] == b'et']
        self.assertTrue(all(archive[m[0] + 20] & 6 == 0 for m in blocks[1:4]), 'incompressible blocks are stored')
        self.assertTrue(all(m[1] < MIB / 10 for m in blocks[-4:-1]), 'text is compressed')
        self.assertLess(len(archive), 3.4 * MIB)
        self.assertGreater(len(self.push(root, compression_level=0)), 6 * MIB)

    def test_digest_is_pinned(self):
        root = write(self.tmp / 'ds', {
            'README.md': 'pinned\n', 'assets/a': b'\0\1\2', 'data/train/\u00e9/x': 'x' * 3000,
            'data/train/' + 'n' * 120: 'long', 'data/train/link': ('->', '\u00e9/x'), 'data/test': None,
            'data/train/big': bytes(range(256)) * 8192})
        os.chmod(str(root / 'assets/a'), 0o700)
        self.assertEqual(etc.Dataset(root).digest, PINNED)

    def test_digest_depends_on_contents_alone(self):
        one, two = odd(self.tmp / 'one', 5), self.tmp / 'two'
        shutil.copytree(str(one), str(two), symlinks=True)
        for path in two.rglob('*'):
            if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() or path.name == 'run.sh' else 0o600)
                os.utime(str(path), (1e9, 1e9))
        digests = [etc.Dataset(one).digest]
        for name, content in (('.etcetera.json', '{}'), ('data/train/.etcetera.json', '{}'),
                              ('data/train/white space', '!'),
                              ('data/new', None), ('data/train/sub/x', None), ('data/train/sub/y', '')):
            write(two, {name: content})
            digests.append(etc.Dataset(two).digest)
        self.assertEqual(digests[0], digests[1])
        (two / 'data/train/run.sh').chmod(0o644)
        digests.append(etc.Dataset(two).digest)
        (two / 'a/x').rename(two / 'a/y')
        self.assertEqual(len(set(digests + [etc.Dataset(two).digest])), 8)

    def test_links(self):
        root = write(self.tmp / 'ds', {
            'outside/f': 'f', 'ds/data/train/real/f': 'real', 'ds/data/train/kept': ('->', 'real/f'),
            'ds/data/train/round': ('->', 'real/../real/f'), 'ds/data/train/out': ('->', '../../../outside'),
            'ds/data/train/other': ('->', '../test/t'), 'ds/data/test/t': 't', 'ds/notes': ('->', 'data/test/t'),
            'ds/data/val': ('->', 'test'), 'ds/extra': ('->', '../outside'),
            'ds/data/train/back': ('->', '../../../ds/data/train/real/f'),
            'ds/data/train/absolute': ('->', str(self.tmp / 'ds/ds/data/train/real/f'))}) / 'ds'
        self.push(root)
        self.check_pull(tree(write(self.tmp / 'expected', {
            'data/train/kept': ('->', 'real/f'), 'data/train/round': ('->', 'real/f'), 'data/train/real/f': 'real',
            'data/train/back': 'real', 'data/train/absolute': 'real', 'data/train/other': 't', 'notes': 't',
            'data/val/t': 't',
            'data/test/t': 't', 'data/train/out/f': 'f', 'extra/f': 'f'})))

    def test_what_cannot_be_packed(self):
        train = self.tmp / 'ds/data/train'
        for problem, make in (
                ("'data/train/x' cannot be read: No such file", lambda: write(train, {'x': ('->', 'gone')})),
                ("'data/train/x' cannot be read: Too many levels",
                 lambda: write(train, {'x': ('->', 'y'), 'y': ('->', 'x')})),
                ('is a link to a directory above it', lambda: write(train, {'up': ('->', '../../..')})),
                ("'data/train/up' is a link to a directory above it", lambda: write(train, {'up': ('->', '../..')})),
                ("'data/train/pipe' is neither a file nor a directory", lambda: os.mkfifo(str(train / 'pipe'))),
                (r'caf\\xe9.* is not valid UTF-8', lambda: os.mkdir(os.fsencode(str(train)) + b'/caf\xe9'))):
            with self.subTest(problem):
                write(train, {'ok': 'ok'})
                make()
                self.etc('register -f', self.tmp / 'ds', 'Bad')
                self.assertRegex(self.etc('push Bad', status=1)[1], problem)
                self.assertEqual(tree(self.tmp / 'share'), {})
                remove(train)

    def test_file_that_grows(self):
        root, stop = write(self.tmp / 'ds', {'data/train/log': b'x' * (8 * MIB)}), threading.Event()
        self.register(root)

        def grow():
            with open(str(root / 'data/train/log'), 'ab', 0) as file:
                while not stop.is_set():
                    file.write(b'y' * 100)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(grow)
            try:
                self.fails_with("'data/train/log' changed", 'push X')
            finally:
                stop.set()
        self.assertEqual(tree(self.tmp / 'share'), {})

    def test_other_tools_unpack_it(self):
        root = odd(self.tmp / 'ds')
        self.push(root)
        gz = str(self.tmp / 'share/X.tgz')
        for tool in foreign_tools('tar', 'bsdtar', 'busybox'):
            with self.subTest(tool):
                target = write(self.tmp / tool, {'.': None})
                command = [tool] + ['tar'] * (tool == 'busybox') + ['xzf', gz, '-C', str(target)]
                out = subprocess.check_output(command, stderr=subprocess.STDOUT, env=dict(os.environ, LC_ALL='C.UTF-8'))
                self.assertEqual((out, tree(target)), (b'', tree(root)))
        with tarfile.open(gz) as tar:
            options = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
            tar.extractall(str(self.tmp / 'by-tarfile'), **options)
        self.assertEqual(tree(self.tmp / 'by-tarfile'), tree(root))

    def test_many_partitions_make_a_long_index(self):
        root = write(self.tmp / 'ds', {'data/partition %04d/x' % n: str(n) for n in range(420)})
        self.assertGreater(sum(m[1] for m in members(self.push(root)) if m[2] == b'ei'), 65536)
        self.check_pull(tree(root))
        self.assertEqual(len(etc.info('X', remote=True, config=self.config())['partitions']), 420)

    def test_unknown_version_is_still_a_tgz(self):
        root = small(self.tmp / 'ds')
        archive = self.push(root).replace(b'{"etcetera":1,', b'{"etcetera":2,')
        write(self.tmp / 'share', {'X.tgz': archive})
        self.check_pull(tree(root))


class Pulls(Case):
    """Pulls of archives that are put into the share by hand."""

    def offer(self, archive):
        write(self.tmp / 'share', {'X.tgz': archive})

    def accepted(self, archive):
        self.offer(archive)
        for command in ('pull', 'verify', 'purge'):
            self.etc(command, 'X')

    def refused(self, problem, archive, what=''):
        self.offer(archive)
        with self.subTest(what, problem=problem):
            self.assertRegex(self.etc('pull X', status=1)[1], "^etc: 'X' in file:///.*: the archive (%s)" % problem)
            self.nothing_is_left()


class Foreign(Pulls):
    """Archives that other tools made."""

    def check(self, root):
        """Pull X, which must be the same as this directory."""
        ds = etc.pull('X', config=self.config())
        self.assertEqual((ds.digest, tree(ds.root) == tree(root)), (etc.Dataset(root).digest, True))
        self.etc('verify X')
        self.assertIn('is installed already', self.etc('pull X')[1])
        self.etc('purge X')

    def tar(self, *entries):
        self.offer(gzip.compress(b''.join(entries), 1))

    def train(self, *entries):
        """Pull X, of these entries; returns the files of its partition train."""
        self.tar(*entries, bytes(1024))
        self.etc('pull X')
        names = sorted(os.listdir(str(self.tmp / 'home/X/data/train')))
        self.etc('purge X')
        return names

    def breaks(self, message, tar, what=''):
        self.refused('is damaged or not a .tgz: .*(%s)' % message, gzip.compress(tar, 1), what)

    def pack(self, path, name='.'):
        with tarfile.open(str(write(self.tmp / 'share', {'.': None}) / 'X.tgz'), 'w:gz') as tar:
            tar.add(str(path), name)

    def test_tools(self):
        root, short = odd(self.tmp / 'ds', 20), small(self.tmp / 'short')
        write(short, {'data/train/link': ('->', 'a.txt'), 'data/test/a.txt': 'other',
                      '.etcetera.json': '{"name": "X", "digest": "sha256:0"}'})
        os.link(str(short / 'data/train/a.txt'), str(short / 'data/train/hard'))
        subprocess.check_call(['cp', '-al', str(short / 'data/train/link'), str(short / 'data/test/twin')])
        gz = str(write(self.tmp / 'share', {'.': None}) / 'X.tgz')
        for words, source in (
                ('tar --format=gnu', root), ('tar --format=pax', root), ('tar --format=ustar', short),
                ('tar --sparse', short),
                ('tar --format=v7', short), ('tar -V label', short), ('tar --format=pax -V label', short),
                ('bsdtar', root),
                ('bsdtar --format=ustar', short), ('busybox tar', short)):
            for names in [['.'], os.listdir(str(source))] * len(foreign_tools(words.split()[0])):
                with self.subTest(words, names=names):
                    command = words.split() + ['-czf', gz, '-C', str(source)] + names
                    subprocess.check_call(command, env=dict(os.environ, LC_ALL='C.UTF-8'))
                    self.check(source)

    def test_members_and_missing_directories(self):
        root = small(self.tmp / 'ds')
        raw = canonical(root, [name for name, content in tree(root).items() if content])
        self.offer(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:] + bytes(1024)) + bytes(512))
        self.check(root)

    def test_tar_that_breaks_off(self):
        whole = b''.join(entry('data/train/' + name, name.encode() * 600) for name in 'abc')
        pax, name = entry('data/train/' + 'l' * 120), entry('././@LongLink', b'data/train/' + b'n' * 200 + b'\0', b'L')
        sparse = entry('data/train/s', kind=b'S', _483=b'%011o\0' % 4096)
        more = entry('data/train/s', kind=b'S', _482=b'\1', _483=b'%011o\0' % 4096)
        hole = entry('data/train/s', kind=b'S', _124=b'%011o\0' % 2048, _386=b'%011o\0%011o\0' % (0, 2048),
                     _483=b'%011o\0' % 4096)
        for cut in list(range(0, len(whole), 500)) + [512, 1536, len(whole)]:
            self.breaks('ends too early', whole[:cut], cut)
        for rest in (pax[:520], pax[:1024], name[:600], name, more, more + bytes(100), hole + bytes(600)):
            self.breaks('ends too early', whole + rest, rest)
        checksum, subsequent = 'bad checksum|invalid header|subsequent header', 'end of file header|subsequent header'
        for what, message, tar in (
                ('an end after a pax header', subsequent, whole + pax[:-512]),
                ('an end after a long name', subsequent, whole + name),
                ('a broken header', checksum, whole[:1536] + b'?' + whole[1537:]),
                ('a broken first header', checksum, b'?' + whole[1:]),
                ('a broken header after a pax header', checksum, pax[:-512] + b'?' + whole[1:]),
                ('text', checksum, b'<html>' * 1000),
                ('two archives', 'another archive follows its end', whole + bytes(1024) + whole)):
            self.breaks(message, tar + bytes(1024), what)
        for end in (0, 512, 10240):  # and two blocks of zeros
            self.assertEqual(self.train(whole, pax, sparse, bytes(end)), ['a', 'b', 'c', 'l' * 120, 's'])

    def test_malformed_pax_records(self):
        good, ok = b'12 a=bcdefg\n', entry('data/train/a') + bytes(1024)
        name = entry('././@LongLink', b'data/train/' + b'n' * 200 + b'\0', b'L')
        for kind in (b'x', b'g', b'X'):
            for records in (b' a=b\n', b'x a=b\n', b'0 X=1\n', b'4 a=b\n', b'99 a=b\n', b'6 abc\n', b'5 =b\n',
                            b'6 a=bc', b'junk',
                            good + b'junk', good + b'\0' + good, b'-6 a=b\n', b'9' * 30 + b' a=b\n'):
                self.breaks('pax', entry('pax', records, kind) + ok, (kind, records))
            self.breaks('pax|invalid|subsequent', name + entry('pax', b'0 X=1\n', kind) + ok, kind)
            self.assertEqual(self.train(entry('pax', good * 2, kind), ok), ['a'])

    def test_absurd_sizes(self):
        ok, huge, negative = entry('data/train/a'), b'\x80' + (1 << 60).to_bytes(11, 'big'), b'\xff' * 10 + b'\xfe\0'
        stand_in(self, etc, '_TAR_HEADERS', UNIT)
        headers = '(its global headers|(the )?headers( of one entry)?) take more than 65536 bytes'
        wrong = 'backward|headers of one entry|ends too early|bad checksum|invalid|subsequent|end of file'
        for kind, size in itertools.product((b'L', b'K', b'x', b'g', b'X'), (b'%011o\0' % (700 * MIB), huge)):
            self.breaks(headers, entry('././@LongLink', kind=kind, _124=size) + bytes(2 * UNIT), (kind, size))
        numbers = entry('pax', b'22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=9\n', b'x')
        for what, tar, message in (
                ('many records', b''.join(entry('pax', b'10011 %08d=%s\n' % (number, b'v' * 9995), b'g')
                                          for number in range(7)), headers),
                ('many names', entry('././@LongLink', b'n' * (UNIT // 4), b'L') * 5, headers),
                ('a sparse map', numbers + entry('data/train/s', b'9999999\n' + b'0\n' * UNIT), headers),
                ('a negative file', ok + entry('data/train/n', _124=negative), wrong),
                ('a negative name', ok + entry('data/train/n', kind=b'L', _124=negative), wrong)):
            self.breaks(message, tar + ok + bytes(1024), what)
        self.tar(entry('././@LongLink', b't' * 5000 + b'\0', b'K'), entry('data/train/l', kind=b'2'), ok, bytes(1024))
        err = self.etc('pull X', status=1)[1]
        self.assertIn('cannot hold links: File name too long', err)
        self.assertLess(len(err), 1000)
        for zeros in [entry('data/train/x', kind=b'S', _483=huge)] + [
                entry('data/train/x', pax={'GNU.sparse.size': str(1 << 60), 'GNU.sparse.map': claim})
                for claim in ('0,0', '%d,%d' % (1 << 60, 1 << 60))]:  # of data that is not there
            self.tar(zeros, bytes(1024))
            self.fails_with('nearly all zeros', 'pull X')

    def test_setuid_bits_are_dropped(self):
        modes = {0o4755: 0o555, 0o2755: 0o555, 0o6644: 0o444, 0o1644: 0o444, 0o7777: 0o555}
        self.tar(*[entry('data/train/%o' % mode, mode=mode) for mode in modes],
                 entry('data/train/shared/', mode=0o2775), bytes(1024))  # as directories of a group are on many servers
        train = etc.pull('X', config=self.config())['train']
        self.assertEqual({mode: (train / ('%o' % mode)).stat().st_mode & 0o7555 for mode in modes}, modes)
        self.assertFalse((train / 'shared').stat().st_mode & ~self.tmp.stat().st_mode & 0o6000)

    def test_what_file_managers_leave_beside_partitions(self):
        root = small(self.tmp / 'ds')
        digest = etc.Dataset(root).digest
        self.register(root)
        write(root / 'data', dict.fromkeys(['.DS_Store', '._train', 'desktop.ini', 'Thumbs.db', '.directory'], 'left'))
        self.assertEqual((list(etc.Dataset(root)), etc.Dataset(root).digest), (['test', 'train'], digest))
        for pack in (lambda: self.etc('push X'), lambda: self.pack(root)):
            pack()
            ds = etc.pull('X', force=True, config=self.config('other'))
            self.assertEqual((ds.digest, sorted(os.listdir(str(ds.root / 'data')))), (digest, ['test', 'train']))
        write(root, {'data/notes.txt': 'no litter', 'data/train/.DS_Store': 'inside a partition it is a file as any'})
        self.fails_with("'data/notes.txt' is none; move it", 'push -f X')
        (root / 'data/notes.txt').unlink()
        self.assertNotEqual(etc.Dataset(root).digest, digest)

    def test_push_of_what_was_pulled(self):
        self.pack(small(self.tmp / 'ds'))
        before = tree(self.tmp / 'share')
        self.etc('pull X')
        self.assertIn('in %s already, and identical' % self.url, self.etc('push X')[1])
        self.assertEqual(tree(self.tmp / 'share'), before)
        self.pack(odd(self.tmp / 'other', 3))
        self.fails_with("another 'X' is in", 'push X')

    def test_not_an_archive(self):
        for content, problem in ((b'', 'it ends too early'), (b'hello', r'Not a gzipped file \(b.he.\)'),
                                 (b'\x1f\x8b', 'Compressed file ended before'), (noise(1000), 'Not a gzipped file')):
            self.refused('is damaged or not a .tgz: ' + problem, content)
        self.pack(SCRIPT, 'X/data/train')
        self.fails_with("needs a directory 'data'", 'pull X')
        self.nothing_is_left()


class ForeignBrokenOff(S3Case):
    def test_broken_off(self):
        """Whatever ends a pull while a thread waits for the network comes out as it is."""
        def stall(handler):
            if not re.match('bytes=[0-]', handler.headers.get('Range', 'bytes=0')):
                time.sleep(1)

        def progress(done, total):
            if done and error:
                raise error
        self.server.fault, good = stall, entry('data/train/x', noise(6 * MIB))
        for tar, error, message in ((entry('../evil') + good, None, "the unsafe name '../evil'"),
                                    (good, KeyError('mine'), '^.mine.$'),
                                    (good, KeyboardInterrupt('mine'), '^mine$')):
            with self.subTest(message):
                self.server.objects['some/prefix/X.tgz'] = gzip.compress(tar + bytes(1024), 1), '"e"', {}
                with self.assertRaisesRegex(type(error) if error else etc.Corrupt, message):
                    etc.pull('X', config=self.config(), progress=progress)
                self.nothing_is_left()


class Hostile(Pulls):
    def outside(self):
        """What lies beside the local store, where nothing may change."""
        return {name: content for name, content in tree(self.tmp).items() if not name.startswith(('home', 'settings'))}

    def attack(self, problem, *entries):
        """Pull a .tgz with these entries; it must fail in any order with these words, and leave nothing anywhere."""
        ok, said = (entry('data/train/ok', b'ok'),), set()
        for order in (ok + entries, entries + ok):
            write(self.tmp, {'victim/file': 'precious', 'share/X.tgz': gzip.compress(b''.join(order) + bytes(1024), 1)})
            before = self.outside()
            said.add(self.etc('pull X', status=1)[1])
            self.assertEqual((self.outside(), self.installed(), self.leftovers()), (before, [], []), said)
        with self.subTest(problem):
            for err in said:
                self.assertIn(problem, err)

    def test_names(self):
        unsafe = "the archive holds the unsafe name '%s'; do not trust it"
        for name in ('/etc/passwd', str(self.tmp / 'victim/new'), '../victim/new', 'data/../../../victim/new', '..',
                     'data/train/..',
                     '../../../../../../../../tmp/etc-evil'):
            for attack in (entry(name, b'evil'), entry(name + '/'), entry('data/train/x', b'evil', pax={'path': name})):
                self.attack(unsafe % name, attack)
        self.attack(unsafe % r'data/train/a\x00b', entry('data/train/x', pax={'path': 'data/train/a\0b'}))
        write(self.tmp, {'share/X.tgz': gzip.compress(entry('../\x1b]0;x\x07/b', b'x') + bytes(1024))})
        self.assertNotIn(b'\x1b', self.spawn('-v pull X').communicate()[1])
        for name in ('d/' * 1900 + 'x', 'd/' * 300):
            self.attack("the unsafe name 'data/train/d/d/d/", entry('data/train/' + name))

    def test_links(self):
        def link(name, target, kind=b'2', **more):
            return entry('data/train/' + name, kind=kind, link=target, **more)
        nowhere = "the link 'data/train/%s' to '%s', which leads out of the dataset or nowhere;"
        twice = "'data/train/%s' twice (or names that this disk cannot tell apart);"
        outside = ['/etc/passwd', '../../../victim/file', str(self.tmp / 'victim')]
        for problem, *entries in (
                [(nowhere % ('l', target), link('l', target))
                 for target in outside + ['..' + '/..' * 20, 'gone', 'l', '../../../../X/../victim']]
                + [("the unsafe name '%s'; do not trust it" % target, link('h', target, b'1')) for target in outside]
                + [(nowhere % ('l', shown), link('l', 'x', pax={'linkpath': target}))
                   for target, shown in (('a\0b', r'a\x00b'), ('\udcff', r'\udcff'))]
                + [(nowhere % ('0000', '0001'), *[link('%04d' % n, '%04d' % (n + 1)) for n in range(count)])
                   for count in (60, 1500)]
                + [(nowhere % ('x', 'd/e/up/../../../..'), link('d/e/up', '../..'), link('x', 'd/e/up/../../../..')),
                   (nowhere % ('b', 'a/../../victim'), link('a', '../..'), link('b', 'a/../../victim')),
                   (nowhere % ('l', '../../../new/data/train/f'), entry('data/train/f'),  # where it is unpacked
                    link('l', '../../../new/data/train/f')),
                   (nowhere % ('s', outside[1]), link('s', outside[1]), link('h', 'data/train/s', b'1')),
                   # which is a link, too
                   ("the hard link 'data/train/h' to 'data/train/none', which is not in it;",
                    link('h', 'data/train/none', b'1')),
                   (twice % 'l', link('l', '../../..'), entry('data/train/l/victim', b'evil')),
                   (twice % 's', link('s', 'ok'), entry('data/train/s'))]):
            self.attack(problem, *entries)

    def test_kinds_and_duplicates(self):
        twice = "the archive holds '%s' twice (or names that this disk cannot tell apart);"
        unknown = "'data/train/x', which is no file, link or directory (b'%s'); pack it with tar's default options"
        special = [("'data/train/dev', which is no file, link or directory", entry('data/train/dev', kind=kind))
                   for kind in (b'3', b'4', b'6')]
        for problem, attack in special + [
                (unknown % 'M', entry('data/train/x', kind=b'M')),  # the rest of a file that began on another volume
                (unknown % 'D', entry('data/train/x', kind=b'D')),  # a directory of an incremental archive
                (twice % 'data/train/ok', entry('data/train/ok', b'again')),
                (twice % 'data/train/ok', entry('data/train/ok/')),
                (twice % 'data/train/ok', entry('data/train/ok/below', b'x')),
                ("holds 'data", entry('data', b'a file')),
                (twice % 'data/train', entry('data/train', kind=b'2', link='../../../victim')),
                (twice % 'data', entry('data', kind=b'2', link='.'))]:
            self.attack(problem, attack)

    def test_webs_of_links(self):
        root = write(self.tmp / 'web', {'data/p%02d/%s' % (n, side): ('->', '../p%02d' % (n + 1))
                                        for n in range(12) for side in 'ab'})
        write(root, {'data/p12/x': 'x'})
        stand_in(self, etc, '_MAX_FOLLOWED', 500)
        self.register(root, 'W')
        self.fails_with('its links lead to too many files; remove links', 'push W')

    def test_large_meta(self):
        root = write(self.tmp / 'ds', {'data/train/x': 'x', 'README.md': b'r' * (3 * MIB)})
        self.register(root)
        self.assertEqual(len(etc.info('X', config=self.config())['readme']), MIB)
        write(root, {'meta.json': b'{' + b' ' * (17 * MIB) + b'}'})
        self.fails_with('meta.json is not JSON: it is not a file of at most 16777216 bytes', 'push X')
        (root / 'meta.json').unlink()
        getattr(os, 'mkfifo', os.mkdir)(str(root / 'meta.json'))
        self.fails_with('meta.json is not JSON: it is not a file', 'push X')

    def test_indexes(self):
        blocks, unreadable = block(bytes(1024)), 'is damaged: its index is unreadable; '
        for text in (b'[' + b'[],' * 4000000 + b'1]', b'{"etcetera":' + b'1' * 1000000 + b'}', b'[' * 100000,
                     b'{"etcetera":1}', b'[]', b'null', b'\xff'):
            self.refused(unreadable, blocks + framed(text, len(blocks)), text[:20])
        promise = "is damaged: 'data/train' does not have the digest that the index promises; "
        for problem, key, values in (
                (promise, 'files', (2, 0)), (promise, 'size', (1,)), (promise, 'digest', ('sha256:' + '0' * 64,)),
                (unreadable, 'digest', ('md5:0', None)), (unreadable, 'offset', (7,)),
                (unreadable, 'length', (10 ** 12, 0, -5)),
                (unreadable, 'files', (-1,)), (unreadable, 'path', ('../x', 'data', 'data/a/b', '.', '/x', 'a/b', ''))):
            for value in values:
                archive = indexed(entry('data/train/') + entry('data/train/x'), **{key: value})
                self.refused(problem, archive, (key, value))

    def test_entries_are_canonical_or_refused(self):
        def file(name='m', data=b'hi', **more):
            return entry('data/train/' + name, data, **more)

        def link(target, name='m'):
            return file(name, b'', kind=b'2', link=target)
        before, after = entry('data/train/') + file('a') + file('b'), file('x', b'x') + file('z')
        for good, size in ((b'', 7), (file(mode=0o755), 9), (file('c') + file('d'), 11), (file(data=bytes(512)), 519),
                           (link('a'), 7)):
            self.accepted(indexed(before + good + after, files=4 + good.count(b'ustar'), size=size))
        pax = file('p' * 200, b'')
        cases = {
            'setuid': file(mode=0o4755), 'twice': file('b'), 'not sorted': file('am'),
            'below no directory': file('m/n'), 'another partition': entry('data/test/m'),
            'among the root files': entry('m'), 'absolute': entry('/data/train/m'), '..': file('..'),
            'after ..': file('../m'), 'an empty component': file('/m'), '.': file('./m'),
            'too deep': file('d/' * 300 + 'x'), 'no name': file(_11=b'\0'), 'NUL': file('mmm', _12=b'\0'),
            'not ASCII': file('mmm', _12='\u00e9'.encode()), 'a file with a slash': file('d/', kind=b'0'),
            'a directory without slash': file(data=b'', kind=b'5', _12=b'\0'), 'a device': file(kind=b'3'),
            'a hard link': file(data=b'', kind=b'1', link='data/train/a'), 'an old file': file(_156=b'\0'),
            'more than the index tells': file(data=b'hello'), 'beyond the block': file(_124=b'00000010002'),
            'a negative size': file(_124=b'-0000000002'), 'a size with spaces': file(_124=b'         2\0 '),
            'a size with _': file(_124=b'0000000_002'), 'a target': file(link='a'), 'a link to nothing': link('gone'),
            'a directory with a target': file('m/', b'', link='a'),
            'a link out of the dataset': link('../../../victim'), 'an absolute link': link('/etc/passwd'),
            'a link to data': link('../../data'), 'a link with a detour': link('./a'),
            'a longer detour': link('b/../a'), 'NUL in a link': link('a\0b'),
            'a chain of links': b''.join(link('m%02d' % n, 'm%02d' % (n + 1)) for n in range(50)) + file('m50'),
            'a wrong checksum': file()[:148] + b'000000\0 ' + file()[156:], 'padding': file()[:-1] + b'p',
            'zeros': bytes(512), 'noise': noise(512), 'only a pax header': pax[:-512],
            'another pax header': pax[:600] + b'x' + pax[601:]}
        for at in set(range(1, 512, 9)) - {154}:  # which is of the checksum
            cases['byte %d' % at] = file(**{'_%d' % at: bytes([file()[at] ^ 1])})
        for what, bad in cases.items():
            for row, size in ((before + bad + after, 9), (before + bad, 6)):
                self.refused("is damaged: 'data/train' violates the format|holds the (unsafe name|link .* leads out)",
                             indexed(row, files=row.count(b'ustar') - 1, size=size - 2 * (b'hi' not in bad)), what)

    def test_segments(self):
        data, train, x = entry('data/'), entry('data/train/'), entry('data/train/x', b'hi')
        root, good = ('.', 0, 0, [data]), ('data/train', 1, 2, [train + x])
        large = train + entry('data/train/x', bytes(4096))
        other = train + entry('data/train/A/') + entry('data/train/a/x', b'hi')
        self.accepted(archive_of(root, good))
        damaged = 'is damaged: a block does not match its checksum or size; '
        astray = "is damaged: '(.|data/train)' violates the format "
        for what, problem, *segments in (
                ('a partition among the root files', astray,
                 ('.', 1, 2, [data + entry('data/evil/') + entry('data/evil/f', b'hi')]), good),
                ('a file in data among the root files', astray, ('.', 1, 2, [data + entry('data/f', b'hi')]), good),
                ('an empty block', damaged, ('.', 0, 0, [b'', data]), good),
                ('an empty block of a partition', damaged, root, ('data/train', 1, 2, [b'', train + x])),
                ('no entry at all', damaged, root, ('data/train', 0, 0, [b''])),
                ('no entry for the partition', astray, root, ('data/train', 1, 2, [x])),
                ('only another directory', astray, root, ('data/train', 1, 2, [other])),
                ('more bytes than the index tells', astray, root, ('data/train', 1, 1, [train + x])),
                ('a short block in the middle', astray, root, ('data/train', 1, 4096, [large[:2048], large[2048:]])),
                ('a bomb', damaged, root, ('data/train', 1, 1, [(b'', block(bytes(64 * MIB)))])),
                ('a receipt', astray, ('.', 1, 2, [entry('.etcetera.json', b'{}') + data]), good)):
            self.refused(problem, archive_of(*segments), what)

    def test_damaged_blocks(self):
        file = ''.join('%d ' % number for number in range(9999)).encode()[:30000]
        payload = entry('data/train/') + entry('data/train/x', file)
        good, stored, crc, size = deflated(payload), deflated(payload, 0), zlib.crc32(payload), len(payload)
        mismatch = '.*does not match its checksum or size'
        for problem, *blocks in (
                ('is damaged', good[:-1], good[:len(good) // 2], good[:1], stored[:-1], noise(2000)),
                ('is damaged', b'\7' + good, b'\1\1\0\1\0x', b'\x4b\x04\xa2' + good),  # type, length, distance
                (mismatch, good + b'\0', good + good, good + struct.pack('<II', crc, size)),
                (mismatch, (payload, good, crc ^ 1), (payload, good, crc, size + 512),
                 (payload, good, crc, size - 512)),
                (mismatch, (b'',), (payload + b'x',), (bytes(MIB + 512),)),
                # empty, no whole records, larger than a block
                ('.*', (payload, deflated(payload[::-1]), zlib.crc32(payload[::-1])))):
            for what, each in enumerate(blocks):
                says = each if isinstance(each, tuple) else (payload, each)
                for use in '01':
                    use_libdeflate(use)
                    self.refused(problem, indexed((says[0], block(*says)), size=30000), what)
        for body in (good, stored):
            for use in '01':
                use_libdeflate(use)
                self.accepted(indexed((payload, block(payload, body)), size=30000))

    def test_one_flipped_byte(self):
        root = write(self.tmp / 'ds', {'data/train/a': 'text ' * 3000, 'data/train/n': noise(70000),
                                       'data/test/b': 'b' * 500, 'README.md': 'r'})
        self.share(root, home='pub')
        archive, rng, silent = (self.tmp / 'share/X.tgz').read_bytes(), random.Random(3), 0
        positions = [rng.randrange(len(archive)) for _ in range(100 * RUNS)]
        positions += list(range(60)) + [rng.randrange(-1500, 0) for _ in range(60)]
        for position in positions:
            with self.subTest(position):
                bad = bytearray(archive)
                bad[position] ^= 1 << rng.randrange(8)
                use_libdeflate(rng.choice('01'))
                self.offer(bytes(bad))
                err = self.etc('pull X', status=None)[1]
                if 'pulled' in err:  # a byte that means nothing, such as the time in a gzip header
                    silent += 1
                    self.assertEqual(tree(self.tmp / 'home/X'), tree(root))
                    self.etc('purge X')
                else:
                    self.assertRegex(err, "^etc: 'X' in file:///.*: the archive (is damaged|holds)")
                    self.nothing_is_left()
        self.assertLess(silent, 60)

    def test_truncated(self):
        self.share(small(self.tmp / 'ds'), home='pub')
        archive, remedy = (self.tmp / 'share/X.tgz').read_bytes(), "; 'etc push -f X' from an intact copy repairs it\n"
        for length in list(range(37, len(archive), 37)) + [len(archive) - 1, len(archive) - 34]:
            self.refused('is damaged: its index is missing' + remedy, archive[:length], length)
        self.refused('is damaged or not a .tgz: it ends too early' + remedy, b'')
        end = members(archive)[0][1]  # of the block with the root's files
        self.offer(archive[:end - 8] + b'wrong' + archive[end - 3:])
        self.fails_with('is damaged: a block does not match its checksum or size' + remedy, 'info -r X')



# ---------------------------------------------------------------------------------------
# libdeflate and zlib: all other classes run with the one that is there
# ---------------------------------------------------------------------------------------

FALSE_LIBRARY = r'''
#include <stddef.h>
#include <string.h>
#include <unistd.h>
static char it;
static int say(const char *what) { return write(2, what, strlen(what)) < 0; }
void *libdeflate_alloc_compressor(int level) { return MEMORY ? &it : NULL; }
void *libdeflate_alloc_decompressor(void) { return MEMORY ? &it : NULL; }
void libdeflate_free_compressor(void *it) {}
void libdeflate_free_decompressor(void *it) {}
size_t libdeflate_gzip_compress(void *c, const void *in, size_t n, void *out, size_t room) {
    return say("deflates\n");
}
int libdeflate_gzip_decompress_ex(void *d, const void *in, size_t n, void *out, size_t room,
                                  size_t *read, size_t *written) {
    memset(out, 1, room);
    *read = n;
    return 1 + say("inflates\n");
}
'''


class Deflate(Case):
    def setUp(self):
        super().setUp()
        use_libdeflate('1')
        if 'libdeflate' not in self.etc('--version')[0]:
            self.skipTest('libdeflate is not installed, or this is not CPython')

    def test_version(self):
        for use, pattern in (('1', 'libdeflate'), ('0', r'zlib \d[\w.-]*')):
            use_libdeflate(use)
            self.assertRegex(self.etc('--version')[0], r'\Aetcetera %s \(Python %s, %s\)\n\Z' % (
                re.escape(etc.__version__), re.escape(sys.version.split()[0]), pattern))

    def test_each_reads_what_the_other_writes(self):
        rng = random.Random(1)
        text = ''.join('line %d says %x\n' % (number, rng.randrange(1 << 20)) for number in range(50000))
        root = write(self.tmp / 'ds', {'data/padded/%02d' % n: noise(700 + n, n) for n in range(60)})
        write(root, {'data/text/a': text, 'data/noise/n': noise(100000), 'data/zeros/z': bytes(MIB), 'README.md': ''})
        self.register(root)
        share, zlib_sizes, sizes = self.tmp / 'share', [], []
        for level in 0, 1, 3, 6, 9:
            for writer, reader, found in (('0', '1', zlib_sizes), ('1', '0', sizes)):
                use_libdeflate(writer)
                etc.push('X', config=self.config(compression_level=level))
                found.append((share / 'X.tgz').stat().st_size)
                (share / 'X.tgz').replace(share / 'Y.tgz')
                use_libdeflate(reader)
                self.etc('pull Y', home='two')
                self.assertEqual(tree(self.tmp / 'two/Y'), tree(root), (writer, level))
                self.etc('purge Y', home='two')
        self.assertLess(abs(sizes[0] - zlib_sizes[0]), 1000)
        for ours, others in zip(sizes[1:], zlib_sizes[1:]):
            self.assertLess(ours, min(others, 0.6 * sizes[0]))

    def beside(self, make, *commands):
        """What commands say, in a Python beside whose standard library make(path) has put a libdeflate."""
        home, stdlib = Path(tempfile.mkdtemp(dir=str(self.tmp))), os.path.dirname(os.path.realpath(os.__file__))
        write(home / 'lib', {os.path.basename(stdlib): ('->', stdlib)})
        make(home / 'lib/libdeflate.so.0')
        os.environ['PYTHONHOME'] = str(home)
        said = ''
        for words in commands:
            process = self.spawn(words)
            said += b''.join(process.communicate()).decode()
            self.assertEqual(process.returncode, 0, said)
        del os.environ['PYTHONHOME']
        return said

    @LINUX
    def test_broken_libraries(self):
        loaded = Path('/proc/self/maps').read_text()
        real, other = (re.search(r'/.*/%s[.-]\S*' % name, loaded).group() for name in ('libdeflate', 'libc'))
        for make, loads in (
                (lambda path: path.symlink_to(real), 'libdeflate'), (lambda path: None, 'libdeflate'),
                (Path.touch, 'zlib'),
                (Path.mkdir, 'zlib'), (lambda path: path.write_text('text'), 'zlib'),
                (lambda path: path.symlink_to(other), 'zlib')):
            self.assertIn(loads, self.beside(make, '--version'))
        write(self.tmp, {'libdeflate.so.0': 'text'})
        os.environ['LD_LIBRARY_PATH'] = ':'  # the current directory
        self.assertIn(b'libdeflate', self.spawn('--version', cwd=str(self.tmp)).communicate()[0])

    @unittest.skipUnless(sys.platform == 'linux' and shutil.which('gcc'), 'no gcc here')
    def test_false_libraries(self):
        root = small(write(self.tmp, {'false.c': FALSE_LIBRARY}) / 'ds')
        for memory, used in enumerate((set(), {'inflates', 'deflates'})):
            def make(path):
                source = ['-DMEMORY=%d' % memory, str(self.tmp / 'false.c')]
                subprocess.check_call(['gcc', '-shared', '-fPIC', '-o', str(path)] + source)
            with self.subTest(memory=memory):
                said = self.beside(make, 'register -f %s X' % root, 'push -f X', 'pull -f X', '--version')
                self.assertIn('libdeflate', said)
                self.assertEqual(set(re.findall('(?:in|de)flates', said)), used)
                self.assertEqual(tree(self.tmp / 'home/X'), tree(root))
                self.etc('purge X')
                (self.tmp / 'share/X.tgz').unlink()


# ---------------------------------------------------------------------------------------
# Remotes: one suite for all of them
# ---------------------------------------------------------------------------------------

OVERTAKEN = "etc: 'X' in %s was replaced meanwhile, or is changed on the way; run the command again, or look with " \
            "'etc info -r X'\n"
PROTECTED = '; a rule of the bucket protects it; ask whoever made the rule'
PORTAL = b'<!DOCTYPE html><html><body>Please log in</body></html>'


def stand_in(case, owner, name, value):
    """Put something in the place of what a module or class has, until a test ends; returns what it had."""
    original = getattr(owner, name)
    case.addCleanup(setattr, owner, name, original)
    setattr(owner, name, value)
    return original


def skip_pauses(case):
    """Let sleep() take no time until a test ends; returns the list of its seconds."""
    slept = []
    stand_in(case, etc._Job, 'sleep', lambda job, seconds: slept.append(seconds) or job.add(0))
    return slept


def no_md5(*args, **kwargs):
    """Instead of hashlib.md5, in FIPS mode."""
    raise ValueError('disabled for FIPS')


@contextlib.contextmanager
def found(case):
    """The dataset X as pull and purge find it: functions that read from this version, and that remove it.

    All other tests talk to remotes through the public surface.
    """
    with etc._open_remote(case.config(), etc._Job()) as remote:
        obj = remote.stat('X')
        yield (lambda: remote.read(obj, 5, 50)), (lambda: remote.remove(obj))


def assert_pulls(case, root, name='X', home='two', **how):
    """What is pulled is what this directory holds."""
    ds = etc.pull(name, config=case.config(home), **how)
    case.assertEqual(tree(ds.root), tree(case.tmp / root))
    return ds


class RemoteSuite:
    """What push, pull, ls, info and purge do, wherever the datasets live.

    Subclasses set `url` and `settings`, and put(name, data) stores an object behind etcetera's back.
    """

    conditions = True  # whether the second of two pushes is refused
    atomic = True  # and does so when both end at the same instant
    copies = False  # whether it copies what a push need not send
    bound = True  # whether a read can be bound to a version

    def publish(self, size, seed):
        """Push noise as X, whatever was there; returns its digest."""
        self.etc('register -f', write(self.tmp / ('noise%d' % seed), {'data/train/x': noise(size, seed)}), 'X')
        return etc.push('X', force=True, config=self.config())

    def at_first_read(self, name, action):
        """Let something happen just before a push reads a file of this name for the first time."""
        def late(path, *args, **kwargs):
            if os.open is late and str(path).endswith(name):
                os.open = original
                action()
            return original(path, *args, **kwargs)
        original = stand_in(self, os, 'open', late)

    def test_another_version(self):
        """Whether or not it copies, the new archive is right."""
        size = (11 if self.copies else 1) * etc._BLOCK
        root = write(self.tmp / 'ds', {'data/%d/x' % seed: noise(size, seed) for seed in range(3)})
        self.share(root, 'Old')
        for name, changes in (('Readme', {'README.md': 'x'}), ('Middle', {'data/1/x': noise(size, 4)}), ('Same', {})):
            with self.subTest(name):
                self.register(write(root, changes), name)
                err = self.etc('push -v', name)[1]
                self.assertTrue(not self.copies or 'were there already' in err, err)
                assert_pulls(self, root, name, home=name)

    def test_round_trip(self):
        root = odd(self.tmp / 'ds')
        self.register(root, 'Odd')
        self.assertIn('pushed', self.etc('push Odd')[1])
        self.assertIn('pulled', self.etc('pull Odd', home='two')[1])
        self.etc('verify Odd', home='two')
        for home in ('two', 'three'):
            ds = etc.dataset('Odd', auto_install=True, config=self.config(home))
            self.assertEqual((ds.digest, tree(ds.root)), (etc.Dataset(root).digest, tree(root)))

    def test_listing(self):
        root = small(self.tmp / 'ds')
        for name in ('One', 'a.b-c_d'):
            self.share(root, name)
        for name in ('not a dataset.tgz', 'other.txt', 'sub/Inner.tgz'):
            self.put(name, b'x')
        digest = etc.Dataset(root).digest
        self.assertEqual(self.etc('ls -r')[0], 'One\na.b-c_d\n')
        self.assertEqual(self.etc('ls -r a*')[0], 'a.b-c_d\n')
        self.assertEqual(etc.ls(True, self.config(), ['O?e', 'nope']), ['One'])
        for item in json.loads(self.etc('ls -r --json')[0]):
            with self.subTest(item['name']):
                self.assertEqual((item['digest'], item['files'], item['when'][:2]), (digest, 6, '20'))
        info = etc.info('One', remote=True, config=self.config('fresh'))
        self.assertEqual((info['meta'], info['readme']), ({'classes': 10}, '# Small\n'))
        self.assertEqual(info['partitions'], {'train': {'files': 2, 'size': 5006}, 'test': {'files': 1, 'size': 5}})
        self.assertFalse((self.tmp / 'fresh').exists())
        self.fails_with("'etc ls -r' lists what is there", 'pull Onne')

    def test_push_again(self):
        root = small(self.tmp / 'ds')
        self.share(root)
        old = etc.Dataset(root).digest
        self.assertIn('identical', self.etc('push X')[1])
        write(root, {'data/train/new': 'new'})
        self.fails_with('push -f', 'push X')
        for pin in (old, 'sha256:' + '1' * 64):  # of other files than there are now
            with self.subTest(pin):
                self.fails_with("'X': expected digest " + pin, 'push X@' + pin, '-f')
        self.etc('push -f X@' + etc.Dataset(root).digest)
        assert_pulls(self, root)
        err = self.etc('push Gone X', status=1)[1]
        self.assertRegex(err, "\\Aetc: no local dataset 'Gone'; .*\netc: 'X' is in .* already, and identical\n\\Z")

    def test_pull_again(self):
        root = small(self.tmp / 'ds')
        self.register(root)
        old = etc.push('X', config=self.config())
        two = self.config('two')
        assert_pulls(self, root, 'X@' + old)
        for home in ('two', 'home'):  # what is registered is compared, too
            self.assertIn('installed already', self.etc('pull X', home=home)[1])
        write(root, {'data/train/new': 'new'})
        new = etc.push('X', force=True, config=self.config())
        self.fails_with('(force) to replace it', 'pull X', home='two')
        self.fails_with('; those contents are not there, or not any more', 'pull -f X@' + old, home='two')
        self.assertEqual(etc.dataset('X@' + old, config=two).digest, old)
        assert_pulls(self, root, 'X@' + new, force=True)
        with self.assertRaisesRegex(etc.Corrupt, "'X': expected digest %s, found %s" % (old, new)):
            etc.dataset('X@' + old, auto_install=True, config=two)
        self.assertEqual(self.leftovers('two'), [])
        err = self.etc('pull Nope X', home='three', status=1)[1]
        self.assertRegex(err, "\\Aetc: no dataset 'Nope' in .*\netc: pulled X to .*: ")

    def test_partitions(self):
        root = write(small(self.tmp / 'ds'), {'data/train/large': noise(3 * etc._BLOCK), 'data/val/v': 'v'})
        self.share(root)
        two, three, call = self.config('two'), self.config('three'), functools.partial(self.etc, home='two')
        call('pull', '-p', 'test', 'X')
        ds = etc.dataset('X', partitions=['test'], config=two)
        self.assertEqual((ds.keys(), ds.meta, ds.digest), ({'test'}, {'classes': 10}, etc.Dataset(root).digest))
        self.assertIn('partly', call('info', 'X')[0])
        call('verify', 'X')
        self.assertIn("'X' is only partly installed, so it cannot be pushed", call('push', 'X', status=1)[1])
        self.assertIn("it has: test, train", call('pull', '-p', 'trian', 'X', status=1)[1])
        with self.assertRaisesRegex(etc.NotFound, "'X' is only partly installed, without assets, data/train, data/val"):
            etc.dataset('X', config=two)
        with self.assertRaisesRegex(KeyError, "no partition 'nope' in X; it has: test, train, val"):
            etc.dataset('X', partitions=['nope'], config=two)
        self.assertIn('installed already', call('pull', '-p', 'test', 'X')[1])
        call('pull', '-p', 'val', 'X')
        self.assertEqual(etc.Dataset(self.tmp / 'two/X').keys(), {'test', 'val'})
        assert_pulls(self, root)
        call('verify', 'X')
        call('push', 'X')
        self.assertEqual(etc.dataset('X', True, ['val', 'train'], three).keys(), {'train', 'val'})
        self.assertEqual(etc.dataset('X', True, config=three).keys(), {'train', 'test', 'val'})

    def test_overtaken_push(self):
        for name, size in (('Small', 1000), ('Large', 9 * etc._BLOCK)):  # a single request, and an upload in parts
            with self.subTest(name):
                for seed, home in enumerate(('slow', 'fast')):
                    root = write(self.tmp / name / home, {'data/train/' + home: noise(size, seed)})
                    self.register(root, name, home=home)
                digests = []
                self.at_first_read('/slow', lambda: digests.append(etc.push(name, config=self.config('fast'))))
                err = self.etc('push', name, home='slow', status=int(self.conditions))[1]
                self.assertEqual(len(digests), 1)
                if self.conditions:
                    self.assertIn("another '%s' is in %s already; push it under another name" % (name, self.url), err)
                    self.assertEqual(etc.info(name, remote=True, config=self.config())['digest'], digests[0])

    def test_races(self):
        if not (self.conditions and self.atomic):
            return
        homes, barrier = ['home%d' % number for number in range(4)], threading.Barrier(4)

        def push(home):
            barrier.wait()
            try:
                return 'won', etc.push('X', config=self.config(home))
            except (etc.Exists, etc.RemoteError) as e:  # RemoteError: the other is not ready yet
                return str(e), None
        for seed, home in enumerate(homes):
            root = write(self.tmp / 'ds' / home, {'data/train/big': noise(9 * etc._BLOCK, seed)})
            self.register(root, home=home)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(push, homes))
        self.assertEqual([outcome for outcome, _ in results].count('won'), 1, results)
        self.assertEqual(etc.pull('X', config=self.config('two')).digest, dict(results)['won'])

    def test_replaced_meanwhile(self):
        for size in (1000, 9 * etc._BLOCK):  # a single request, and an upload in parts
            self.publish(size, 1)
            with self.subTest(size), found(self) as (read, remove_old):
                self.assertEqual(len(read()), 45)
                new = self.publish(size, 2)
                if self.bound:
                    with self.assertRaisesRegex(etc.RemoteError, "'X' in .* was replaced meanwhile"):
                        read()
                with self.assertRaisesRegex(etc.RemoteError, "'X' in .* was replaced meanwhile"):
                    remove_old()
                self.assertEqual(etc.info('X', True, self.config())['digest'], new)
                with found(self) as (_, remove_new):
                    remove_new()
                    self.assertEqual(etc.ls(True, self.config()), [])
                    remove_new()  # another was faster

    def test_foreign(self):
        root = write(odd(self.tmp / 'ds', 5), {'data/test/large': noise(6 * etc._BLOCK)})
        with tarfile.open(str(self.tmp / 'X.tgz'), 'w:gz', compresslevel=1, format=tarfile.PAX_FORMAT) as tar:
            tar.add(str(root), '.')
        self.put('X.tgz', (self.tmp / 'X.tgz').read_bytes())
        info = etc.info('X', remote=True, config=self.config())
        self.assertEqual({info[key] for key in 'digest files size partitions meta readme'.split()}, {None})
        self.fails_with("'X' was packed by another tool, and has no index to compare; run 'etc pull X', and "
                        'compare what that installs\n', 'diff -r X -r X')
        assert_pulls(self, root, home='home', partitions=['test'])
        digest, wrong = etc.Dataset(root).digest, 'sha256:' + '2' * 64
        self.assertIn('installed already', self.etc('pull X@' + digest)[1])
        self.fails_with("'X': expected digest " + wrong, 'pull -f X@' + wrong)
        self.etc('verify X')
        self.assertIn('is in %s already, and identical' % self.url, self.etc('push X')[1])
        self.register(root, home='another')  # where no receipt knows that it is the same
        self.fails_with('push -f', 'push X', home='another')
        self.etc('push -f X')
        self.assertEqual(etc.info('X', remote=True, config=self.config())['digest'], digest)

    def test_purge(self):
        root, config = small(self.tmp / 'ds'), self.config()
        self.share(root, 'One')
        self.share(self.large(9 * etc._BLOCK, 'large'), 'Large')
        self.put('Foreign.tgz', b'no archive at all')
        digest, wrong = etc.Dataset(root).digest, 'sha256:' + '4' * 64
        gone = '; those contents are not there, or not any more'
        for words, status, problem in (
                ('One', 2, "without a terminal to ask on, 'etc purge -r' needs -f; 'etc purge -h' shows how"),
                ('-f Onne', 1, "no dataset 'Onne' in %s; 'etc ls -r' lists what is there" % self.url),
                ('-f One@' + wrong, 1, "'One': expected digest %s, found %s%s" % (wrong, digest, gone)),
                ('-f Foreign@' + digest, 1,
                 "'Foreign': expected digest %s, found none, as another tool packed it%s" % (digest, gone))):
            with self.subTest(words):
                self.assertEqual(self.etc('purge -r', words, status=status), ('', 'etc: %s\n' % problem))
                self.assertEqual(etc.ls(True, config), ['Foreign', 'Large', 'One'])
        self.assertEqual(self.etc('purge -r -f Nope Foreign Large', status=1)[1].splitlines(), [
            "etc: no dataset 'Nope' in %s; 'etc ls -r' lists what is there" % self.url,
            "etc: purged 'Foreign' from %s" % self.url, "etc: purged 'Large' from %s" % self.url])
        self.assertIsNone(etc.purge('One@' + digest, remote=True, config=config))
        self.assertEqual((etc.ls(True, config), self.installed()), ([], ['Large', 'One']))
        with self.assertRaisesRegex(etc.NotFound, "no dataset 'One' in "):
            etc.purge('One', remote=True, config=config)
        self.etc('push One')
        etc.purge('One', config)
        self.assertEqual((etc.ls(True, config), self.installed()), (['One'], ['Large']))


class BucketSuite(RemoteSuite):
    """What buckets on servers of ours have in common."""

    def test_lost_last_answer(self):
        self.register(self.large(9 * etc._BLOCK))
        skip_pauses(self)

        def lose(handler):
            self.server.final = None
            handler.close_connection = True
        for self.server.conditions, words in ((True, 'push'), (False, 'push -f')):
            with self.subTest(words):
                self.server.final = lose
                self.etc(words, 'X')
                self.assertIsNone(self.server.final)
                assert_pulls(self, 'ds', force=True)

    def test_pages(self):
        for number in range(25):
            self.put('D%02d.tgz' % number, b'x')
        self.server.page = 10
        self.assertEqual(etc.ls(True, self.config()), ['D%02d' % n for n in range(25)])
        self.assertEqual(len(self.server.log), 3)

    def test_odd_prefixes(self):
        self.register(small(self.tmp / 'ds'))
        bucket = self.url.replace('some/prefix', '')
        for prefix in ('a b/+~\u00e9/(x)', 'a+b %41&'):
            for self.server.encoding in (True, False):
                with self.subTest(prefix, encoding=self.server.encoding):
                    self.url = bucket + prefix
                    self.server.objects.clear()
                    self.etc('push X')
                    self.assertEqual(list(self.server.objects), [prefix + '/X.tgz'])
                    self.assertEqual(self.etc('ls -r')[0], 'X\n')
                    self.etc('pull -f X', home='two')


def no_link(*args, **kwargs):
    """Instead of os.link, where a file system has no hard links."""
    raise PermissionError(1, 'Operation not permitted')


class FileRemote(Scaled, RemoteSuite, Case):
    """Of a shared directory; and what only depends on what is here."""

    def put(self, name, data):
        write(self.tmp / 'share', {name: data})

    def shared(self):
        return sorted(os.listdir(str(self.tmp / 'share')))

    def test_several_partitions(self):
        self.share(write(small(self.tmp / 'ds'), {'data/val/v': 'v'}))
        for number, words in enumerate(('X -p train val', '-p train -p val X', '-p val X -p train',
                                        'X --partition val train -f')):
            with self.subTest(words):
                self.etc('pull', words, home=str(number))
                self.assertEqual(etc.Dataset(self.tmp / str(number) / 'X').keys(), {'train', 'val'})

    def test_copied_installs(self):
        """A copy of a home knows what is missing, and what it has."""
        root = write(small(self.tmp / 'ds'), {'data/val/v': 'v'})
        self.share(root)
        self.etc('pull -p test X', home='two')
        shutil.copytree(str(self.tmp / 'two'), str(self.tmp / 'copy'), symlinks=True)
        for home in ('two', 'copy'):
            with self.subTest(home):
                self.fails_with('is only partly installed, so it cannot be pushed', 'push X', home=home)
                ds = etc.dataset('X@' + etc.Dataset(root).digest, partitions=['test'], config=self.config(home))
                self.assertEqual(ds.keys(), {'test'})
                modes = {path: path.stat().st_mode for path in ds.root.rglob('*') if path.is_file()}
                for path in modes:
                    path.parent.chmod(0o555)
                assert_pulls(self, root, home=home)
                self.etc('verify X', home=home)
                self.assertEqual(modes, {path: path.stat().st_mode for path in modes})
                self.etc('pull -f -p test X', home=home)
                wrong = 'X@sha256:' + '0' * 64
                self.fails_with("'X': expected digest sha256:000", 'purge', wrong, home=home)
                self.etc('purge X@' + ds.digest, home=home)

    def test_pull_mends(self):
        root = write(small(self.tmp / 'ds'), {'data/val/v': 'v'})
        self.share(root)
        self.etc('pull X', home='two')
        victim = self.tmp / 'two/X/data/train/a.txt'
        victim.chmod(0o644)
        victim.write_text('broken')
        (self.tmp / 'two/X/data/val/v').unlink()
        self.fails_with("'X' is not what was installed: data/train, data/val;", 'verify X', home='two')
        assert_pulls(self, root, force=True)
        self.etc('verify X', home='two')

    def test_diff(self):
        root = small(self.tmp / 'ds')
        self.share(root)
        self.etc('diff -r X X')
        self.share(write(root, {'data/train/new': 'new'}), 'Y')
        rows = [row.split() for row in self.etc('diff -r X -r Y', status=1)[0].splitlines()]
        self.assertEqual([(row[0], row[-1]) for row in rows],
                         [('same', '.'), ('same', 'assets'), ('same', 'data/test'), ('differs', 'data/train')])
        contrast = etc.diff('X', 'Y', remote=(True, False), config=self.config())
        self.assertEqual((contrast['equal'], contrast['segments']['data/train']), (
            False, {'status': 'differs', 'a': {'files': 2, 'size': 5006}, 'b': {'files': 3, 'size': 5009}}))
        self.etc('pull -p test X', home='two')
        self.etc('diff X -r X', home='two')  # what a receipt knows of the whole
        self.fails_with("no dataset 'Z' in", 'diff X -r Z')

    def test_urls(self):
        start = 'cannot use the url (from --url); it must start with file://'
        bucket = 'the url (from --url) is not of the form s3://bucket'
        nowhere = self.tmp / 'no where'
        for url, problem in (
                ('file://host/x', 'the url (from --url) is no absolute path; write file:///path'), ('file:x', start),
                ('nonsense', start), ('ftp://x/y', start), ('s3:/x', start), ('S3://x', start), ('s3://', bucket),
                ('s3://a b', bucket), ('s3://ab', bucket + ", gs://bucket, s3://bucket/prefix or the like; a bucket's "
                                                           'name has at least 3 letters'),
                (nowhere.as_uri(), 'no directory %s;' % nowhere)):
            with self.subTest(url):
                self.fails_with('etc: ' + problem, 'ls -r', url=url)
        nowhere.mkdir()
        self.assertEqual(self.etc('ls -r', url=nowhere.as_uri()),
                         ('', 'etc: there is no dataset in the remote storage\n'))

    def test_directories_and_dead_links_are_no_datasets(self):
        write(self.tmp / 'share', {'X.tgz/file': 'x', 'Y.tgz': ('->', 'nowhere')})
        self.assertEqual(self.etc('ls -r')[0], '')
        for name in 'XY':
            with self.subTest(name):
                self.fails_with("no dataset '%s'" % name, 'pull', name)

    def test_killed_push_leaves_nothing_under_the_name(self):
        self.register(write(self.tmp / 'ds', {'data/train/%d' % n: noise(16 * UNIT, n) for n in range(20)}))
        process = self.spawn('push X')
        while not glob.glob(str(self.tmp / 'share/.X.tgz.*')):
            self.assertIsNone(process.poll())
        process.kill()
        process.communicate()
        rest, = self.shared()
        self.assertNotEqual(rest, 'X.tgz')
        self.assertEqual(etc.ls(True, self.config()), [])
        os.utime(str(self.tmp / 'share' / rest), (1, 1))
        self.etc('push X')
        self.assertEqual(self.shared(), ['X.tgz'])

    def test_signs_in_paths(self):
        self.register(small(self.tmp / 'ds'))
        names = ['a#b', 'a?b', 'a?b#c', '#', 'a b', 'per%cent', 'a%23b']
        urls = {'file:///%s/%s' % (self.tmp, name.replace('%', '%25')): name for name in names}
        if sys.platform == 'linux':  # elsewhere names are text
            names.append(os.fsdecode(b'\xff\xc3\xa9'))
        for url, name in itertools.chain(urls.items(), [((self.tmp / name).as_uri(), name) for name in names]):
            with self.subTest(url):
                self.etc('push X', url=url)
                (self.tmp / name / 'X.tgz').unlink()

    @POSIX
    def test_who_may_read(self):
        self.register(small(self.tmp / 'ds'))
        share = self.tmp / 'share'
        self.addCleanup(os.umask, os.umask(0o022))
        for row in ('77 0 1 644, 77 755 1 644, 77 755 0 600, 27 755 0 640, 27 750 0 640, 77 700 0 600, '
                    '22 755 0 644, 2 775 0 664, 77 0 0 600').split(', '):
            umask, directory, public, mode = [int(word, 8) for word in row.split()]
            with self.subTest(row):
                remove(share)
                if directory:
                    share.mkdir()
                    share.chmod(directory)
                self.settings = {'public': public > 0}
                os.umask(umask)
                self.etc('push X')
                self.assertEqual(stat.S_IMODE((share / 'X.tgz').stat().st_mode), mode)
                if public:
                    self.assertEqual(share.stat().st_mode & 0o055, 0o055)
        self.settings = {'public': True}
        self.etc('push X', url=self.url + '/a/b')
        self.assertEqual([(share / place).stat().st_mode & 0o055 for place in ('a', 'a/b')], [0o055] * 2)

    @LINUX
    def test_no_room_for_a_push(self):
        import resource
        self.register(small(self.tmp / 'ds'))
        process = self.spawn('push X', preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)))
        problem = ('etc: File too large: %s; free some space\n' % (self.tmp / 'share')).encode()
        self.assertEqual((process.communicate(), process.returncode), ((b'', problem), 1))

    @POSIX
    def test_places_where_one_may_not_write(self):
        self.share(small(self.tmp / 'ds'))
        self.etc('register -f', odd(self.tmp / 'other', 3), 'X')
        self.etc('push Y', status=1)  # what is imported for an error is there from here on
        share, push = self.tmp / 'share', 'push -f X'
        for mode, words, problem in ((0o1777, push, 'Operation not permitted'), (0o555, push, 'Permission denied'),
                                     (0o555, 'purge -r -f X', 'Permission denied')):
            if mode == 0o1777 and os.geteuid():
                continue  # nobody else's files are here
            with self.subTest(words, mode=oct(mode)):
                share.chmod(mode)
                with unprivileged(self.tmp / 'home', self.tmp / 'settings.yaml', self.tmp / 'other'):
                    self.fails_with('%s: %s%s' % (problem, share, os.sep), words)
                    self.fails_with('; ask who owns it, or its directory, for access', words)
                share.chmod(0o755)
                self.assertEqual(self.shared(), ['X.tgz'])

    @POSIX
    def test_files_that_cannot_be_read(self):
        self.share(small(self.tmp / 'ds'))
        self.etc('push Y', status=1)  # as above
        share, home, file = self.tmp / 'share', self.tmp / 'home', self.tmp / 'home/X/data/train/a.txt'
        with unprivileged(self.tmp):
            (share / 'X.tgz').chmod(0)
            file.chmod(0)
            denied = 'Permission denied: %s' % file.resolve()
            ask = 'Permission denied: %s; ask who owns it' % (share / 'X.tgz')
            for words, problem in (('push -f X', denied), ('pull X', ask), ('info -r X', ask),
                                   ('push X --url ' + home.as_uri(), denied)):  # below which the file lies
                with self.subTest(words):
                    self.fails_with(problem, words)

    def test_purge_while_others_push(self):
        """Just before, and perhaps also just after the file is set aside."""
        rename, share = os.rename, self.tmp / 'share'
        for link, others in itertools.product((os.link, no_link), ((b'second',), (b'second', b'third'))):
            def late(source, target):
                os.rename = rename
                (self.tmp / '0').replace(share / 'X.tgz')
                rename(source, target)
                if len(others) > 1:
                    (self.tmp / '1').replace(share / 'X.tgz')
            with self.subTest(others, links=link is not no_link):
                remove(share)
                self.put('X.tgz', b'first')
                write(self.tmp, {str(number): data for number, data in enumerate(others)})
                stand_in(self, os, 'link', link)
                stand_in(self, os, 'rename', late)
                self.assertEqual(self.etc('purge -r -f X', status=1)[1], OVERTAKEN % self.url)
                self.assertEqual((share / 'X.tgz').read_bytes(), others[-1])
                self.assertEqual(len(self.shared()), len(others))  # what was overtaken twice is kept for a day

    def test_purge_that_another_overtakes(self):
        self.put('X.tgz', b'x')
        rename = os.rename
        stand_in(self, os, 'rename', lambda source, target: (os.unlink(source), rename(source, target)))
        self.assertIn("purged 'X'", self.etc('purge -r -f X')[1])

    def test_killed_purge(self):
        program = ('import os, sys; sys.path.insert(0, sys.argv[1]); import etcetera; '
                   'setattr(os, sys.argv[2], lambda *args: os._exit(9)); '
                   "etcetera.main(['--url', sys.argv[3], 'purge', '-r', '-f', 'X'])")
        self.register(small(self.tmp / 'ds'), 'Y')
        for function, left in (('rename', ['X.tgz', 'Y.tgz']), ('unlink', ['Y.tgz'])):
            with self.subTest(function):
                remove(self.tmp / 'share')
                self.put('X.tgz', b'x')
                os.utime(str(self.tmp / 'share/X.tgz'), (1, 1))
                command = [sys.executable, '-c', program, str(HERE), function, self.url]
                self.assertEqual(subprocess.call(command), 9)
                self.assertEqual(etc.ls(True, self.config()), [name[0] for name in left[:-1]])
                self.assertEqual(len(self.shared()), 1)
                self.etc('push Y')
                self.assertEqual(self.shared(), left)

    def test_purge_of_a_link(self):
        write(self.tmp, {'elsewhere': 'x', 'share/X.tgz': ('->', '../elsewhere')})
        self.etc('purge -r -f X')
        self.assertEqual((self.shared(), (self.tmp / 'elsewhere').read_text()), ([], 'x'))

    def test_races_without_hard_links(self):
        stand_in(self, os, 'link', no_link)
        self.test_races()

    def test_partitions_without_hard_links(self):
        stand_in(self, os, 'link', no_link)
        self.test_partitions()


class PurgeSuite:
    """How purge -r fares with answers that are lost, refusals and other pushes; on servers of ours."""

    def setUp(self):
        super().setUp()
        skip_pauses(self)
        self.put('X.tgz', b'first')

    def at_delete(self, action, times=1):
        """Let `action(handler)` happen at the first deletions; it may answer itself, as a fault."""
        left = [None] * times
        self.server.fault = lambda h: h.command == 'DELETE' and left and (left.pop(), action(h))[1]

    def stored(self):
        return [data for data, _, _ in self.server.objects.values()]

    def purge(self, status=0):
        return self.etc('purge -r -f X', status=status)[1]

    def lose(self, handler, *then):
        """Delete the object, but let the answer be lost."""
        self.server.objects.clear()
        for data in then:
            self.put('X.tgz', data)
        handler.close_connection = True
        return True

    def busy(self, handler):
        handler.answer(503)

    def test_another_push_meanwhile(self):
        """Whether or not the answer is lost, and the store knows conditions."""
        for self.server.conditions, action in (
                (True, lambda handler: self.put('X.tgz', b'second')),
                (True, lambda handler: self.lose(handler, b'second') and self.busy(handler)),
                (False, lambda handler: self.lose(handler, b'second') and self.busy(handler))):
            with self.subTest(conditions=self.server.conditions):
                self.put('X.tgz', b'first')
                self.at_delete(action)
                self.assertEqual(self.purge(status=1), OVERTAKEN % self.url)
                self.assertEqual(self.stored(), [b'second'])

    def test_lost_answers(self):
        for what, action in (('a broken connection', self.lose), ('another purge', lambda h: self.lose(h) and None),
                             ('a busy proxy', lambda h: self.lose(h) and self.busy(h))):
            with self.subTest(what):
                self.put('X.tgz', b'first')
                self.at_delete(action)
                self.assertEqual(self.purge(), "etc: purged 'X' from %s\n" % self.url)
                self.assertEqual(self.stored(), [])

    def test_no_answer_at_all(self):
        self.at_delete(self.busy, 4)
        self.assertIn("purged 'X'", self.purge())
        self.put('X.tgz', b'first')
        self.at_delete(self.busy, 100)
        self.assertRegex(self.purge(status=1), r'\A(etc: DELETE: .* answers 503; trying again\n)?'
                                               r'etc: %s answers 503: [^\n]*\n\Z' % self.url)
        self.assertEqual(self.stored(), [b'first'])

    def test_versions_that_are_kept(self):
        self.server.versioned = '5'
        self.assertEqual(self.purge(), "etc: purged 'X' from %s\n" % self.url)
        self.assertEqual(self.stored(), [])
        self.assertIn("no dataset 'X'", self.purge(status=1))

    def refused(self, answer, problem):
        with self.subTest(problem):
            self.at_delete(answer, 9)
            self.assertEqual(self.purge(status=1), 'etc: %s answers %s\n' % (self.url, problem))
            self.assertEqual(self.stored(), [b'first'])


class S3Purge(PurgeSuite, S3Case):
    def test_refusals(self):
        for status, code, message, remedy in (
                (403, 'AccessDenied', 'Access Denied',
                 '; the credentials, which come from the settings, need s3:DeleteObject here'),
                (403, 'AccessDenied', 'Access Denied because object protected by object lock.', PROTECTED),
                (400, 'InvalidRequest', 'Object is WORM protected and cannot be overwritten', PROTECTED),  # MinIO
                (409, 'FileImmutable', 'The object you specified is immutable.', PROTECTED)):  # Alibaba
            self.refused(lambda handler: handler.error(status, code, message=message),
                         '%d %s: %s' % (status, code, message + remedy))

    def test_conditions(self):
        """Weak ETags are no condition, and a marker of the version 'null' says that nothing is kept:

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/DeletingObjectsfromVersioningSuspendedBuckets.html
        """
        etag = self.server.objects['some/prefix/X.tgz'][1]
        for sent, condition in ((etag, etag), ('W/"weak"', None)):
            for self.server.versioned in (None, 'null'):
                with self.subTest(sent, versioned=self.server.versioned):
                    self.put('X.tgz', b'first')
                    self.server.respell = lambda name, value: sent if name == 'ETag' else value
                    self.assertEqual(self.purge(), "etc: purged 'X' from %s\n" % self.url)
                    method, path, headers = self.server.log[-1]
                    self.assertEqual((method, path, headers['If-Match']),
                                     ('DELETE', '/bucket/some/prefix/X.tgz', condition))

    def test_stores_that_know_no_conditions(self):
        self.server.conditions = False
        for status, code in ((501, 'NotImplemented'), (400, 'InvalidArgument'), (400, 'InvalidRequest'), (501, ''),
                             (412, 'PreconditionFailed'), (None, '')):  # 412: Swift; None: they ignore conditions
            for look in (None, 2, 3)[:3 if status else 2]:  # before which another push ends: before a deletion
                looks = []

                def fault(handler):
                    if handler.command != 'DELETE':
                        looks.append(handler)
                        if len(looks) == look:
                            self.put('X.tgz', b'second')
                    elif status and 'If-Match' in handler.headers:
                        handler.error(status, code)
                with self.subTest(code, status=status, look=look):
                    self.put('X.tgz', b'first')
                    self.server.fault = fault
                    self.assertIn('was replaced meanwhile' if look else "purged 'X'",
                                  self.purge(status=int(bool(look))))
                    self.assertEqual(self.stored(), [b'second'] if look else [])

    def test_archive_classes(self):
        """What cannot be read can be listed, and removed."""
        self.server.fault = lambda h: h.command == 'GET' and h.path.endswith('X.tgz') and h.error(
            403, 'InvalidObjectState')
        self.assertEqual(self.etc('ls -r')[0], 'X\n')
        self.assertIn("purged 'X'", self.purge())


class S3Remote(Scaled, BucketSuite, S3Case):
    copies = True

    def parts(self):
        return [path for path in self.requests('PUT') if 'partNumber=' in path]

    def stored(self):
        """The bytes and the ETag of the only object."""
        (data, etag, _), = self.server.objects.values()
        return data, etag

    def test_reads_go_on_where_they_broke(self):
        skip_pauses(self)
        stand_in(self, etc, '_SLICE', 5000)
        self.share(self.large(5 * UNIT))
        data, etag = self.stored()
        self.settings['connections'] = 1
        sent = []

        def fault(handler):
            if 'Range' in handler.headers:
                start, stop = asked_range(handler.headers, len(data))
                part = data[start:min(stop, start + 10000)]
                sent.append(len(part))
                handler.answer(206, part, {'ETag': etag, 'Content-Range': 'bytes %d-%d/%d' % (
                    start, stop - 1, len(data))}, stop - start)
                handler.close_connection = True
        self.server.fault = fault
        assert_pulls(self, 'ds')
        self.assertGreater(len(sent), 30)
        self.assertLess(sum(sent), len(data) + 65536)

    def test_wrong_answers(self):
        skip_pauses(self)
        self.share(self.large(20000))
        data, etag = self.stored()
        no_range, too_much = 'does not answer with the range that was asked for', 'answers with more than was asked for'
        no_headers, ten = {'ETag': None, 'Content-Range': None}, b'x' * 10
        for problem, status, body, headers, length in (
                (no_range, 200, b'x' * 500, {'Content-Range': None}, None),
                (no_range, 206, ten, {'Content-Range': 'bytes 0-9/10'}, None),
                (no_range, 206, b'0\r\n\r\n', {'Transfer-Encoding': 'chunked'}, None),
                ("'X' in %s was replaced meanwhile" % self.url, 206, ten, {'ETag': '"other"'}, None),
                ('IncompleteRead(', 206, ten, no_headers, 1000),
                (too_much, 206, b'x' * 3 * MIB, no_headers, None), (too_much, 200, b'x' * 9 * MIB, no_headers, None)):
            def fault(handler):
                if not handler.headers.get('Range', 'bytes=-').startswith('bytes=-'):
                    start, stop = asked_range(handler.headers, len(data))
                    span = 'bytes %d-%d/%d' % (start, stop - 1, len(data))
                    handler.answer(status, body, dict({'ETag': etag, 'Content-Range': span}, **headers), length)
                    handler.close_connection = True
            with self.subTest(problem, status=status, headers=headers):
                self.server.log.clear()
                self.server.fault = fault
                self.fails_with(problem, 'pull X', home='two')
                self.assertEqual(self.installed('two'), [])
                self.assertLess(len(self.server.log), 30)

    def test_absurd_headers(self):
        self.share(small(self.tmp / 'ds'))
        problem = "the range that was asked for|does not say how large 'X' is"
        for name, pattern, text, said in (
                ('Last-Modified', '20.. ', '99999999999 ', 'pulled'),
                ('Last-Modified', '20.. ', '9' * 22 + ' ', 'pulled'), ('Last-Modified', '.+', 'never', 'pulled'),
                ('Content-Range', '/.*', '/1e3', problem),
                ('Content-Range', '/.*', '/5 5', problem), ('Content-Range', '/.*', '/-5', problem),
                ('Content-Range', '/.*', '/' + '9' * 5000, problem), ('Content-Range', '.+', '', problem)):
            with self.subTest(name, text=text[:99]):
                self.server.respell = lambda key, value: re.sub(pattern, text, value) if key == name else value
                self.assertRegex(self.etc('pull -f X', home='two', status=int(said == problem))[1], said)

    def test_stores_without_etags(self):
        self.share(small(self.tmp / 'ds'))
        data = self.stored()[0]
        for etag in ('W/"weak"', ''):
            with self.subTest(etag):
                self.server.objects['some/prefix/X.tgz'] = data, etag, {}
                self.assertIn('sha256:', self.etc('ls -r -l')[0])  # times of listing and reading differ here
                self.etc('pull -f X', home='two')

    def test_nothing_is_left_in_the_temporary_directory(self):
        self.share(small(self.tmp / 'ds'))
        stand_in(self, tempfile, 'tempdir', tempfile.mkdtemp(dir=str(self.tmp)))
        self.etc('info -r X')
        self.assertEqual(os.listdir(tempfile.gettempdir()), [])

    def test_last_answers_that_are_not_understood(self):
        """A push is done if the store says so as its API defines, with status 200, or if what is there is right."""
        skip_pauses(self)
        self.publish(6 * UNIT, 1)
        self.share(small(self.tmp / 'small'), 'Y')
        others = dict(self.server.objects)
        write(self.tmp, {'noise1/data/train/x': noise(6 * UNIT, 2), 'small/README.md': '# Other\n'})  # as large
        done, etag = COMPLETED % (b'http://store', b'key', b'key', b'e'), {'ETag': '"e"'}
        error = b' \n <?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'
        for name, what, status, body, headers in [
                ('X', 'success', 200, b' \n \r\n' + done, {}), ('X', 'error', 200, error, {}),
                ('X', 'nothing', 200, b'', etag), ('X', 'white space', 200, b'   ', {}),
                ('X', 'a page', 200, PORTAL, etag), ('X', 'another result', 200, b'<R/>', {}),
                ('X', 'half a result', 200, done[:100], {}),
                ('X', 'no ETag', 200, b'<CompleteMultipartUploadResult/>', {}),
                ('Y', 'a page', 200, PORTAL, dict(etag, **{'Content-Type': 'text/html'})),
                ('Y', 'no ETag', 200, b'', {})] + [
                    (name, 'status', status, done if name == 'X' and status != 204 else b'', etag)
                    for status in (201, 204) for name in 'XY']:
            for before, stored in itertools.product(({}, others), (True, False)):
                def answer(handler):
                    handler.answer(status, body, headers)

                def fault(handler):
                    method, word = ('POST', 'uploadId=') if name == 'X' else ('PUT', '.tgz')
                    return handler.command == method and word in handler.path and answer(handler)
                with self.subTest(what, name=name, status=status, before=len(before), stored=stored):
                    self.server.objects, self.server.uploads = dict(before), {}
                    self.server.fault, self.server.final = (None, answer) if stored else (fault, None)
                    is_done = what == 'success' or what != 'error' and stored
                    err = self.etc('push', *['-f'] * len(before), name, status=int(not is_done))[1]
                    self.assertIn('pushed' if is_done else 'no;' if what == 'error' else 'answers 20', err)
                    if not stored and not is_done:
                        self.assertEqual((self.server.objects == before, self.server.uploads), (True, {}))

    def test_uploads_that_fail(self):
        """Nothing is left, neither an object nor parts that are billed."""
        skip_pauses(self)
        self.register(self.large(16 * UNIT))
        for method, word, status, code, problem in (
                ('POST', '?uploads=', 200, '', 'answers 200: '),
                ('PUT', 'partNumber=2', 200, '', 'answers 200: '),
                ('PUT', 'partNumber=3', 403, 'AccessDenied', 'AccessDenied'),
                ('POST', 'uploadId=', 200, 'InternalError', 'InternalError')):
            with self.subTest(word):
                self.server.fault = lambda handler: handler.command == method and word in handler.path and (
                    handler.error(status, code) if code else handler.answer(status, PORTAL))
                self.fails_with(problem, 'push X')
                self.assertEqual((self.server.uploads, self.server.objects), ({}, {}))

    def test_errors_that_hide(self):
        """InternalError in a 200 of CompleteMultipartUpload, RequestTimeout in a 400."""
        skip_pauses(self)
        left = [('uploadId=', 'POST', 200, 'InternalError'), ('partNumber=', 'PUT', 400, 'RequestTimeout'),
                ('uploads=', 'POST', 400, 'RequestTimeout')] * 2

        def fault(handler):
            for failure in left:
                word, method, status, code = failure
                if handler.command == method and word in handler.path:
                    left.remove(failure)
                    return handler.error(status, code)
        self.server.fault = fault
        self.share(self.large(9 * UNIT))
        self.assertEqual(left, [])
        assert_pulls(self, 'ds')

    def test_white_space_before_answers(self):
        class Slow(S3Handler):
            def answer(self, status, body=b'', headers=(), length=None):
                super().answer(status, b' \n' * 3 + body if body[:6] == b'<?xml ' else body, headers, length)
        self.server.RequestHandlerClass = Slow
        self.test_replaced_meanwhile()
        self.fails_with('NoSuchBucket', 'ls -r', url='s3://other')

    @POSIX
    def test_interrupted_while_the_store_is_busy(self):
        """It waits neither for all tries of each thread nor for what Retry-After asks."""
        self.register(self.large(20 * UNIT))
        busy = threading.Event()
        self.server.fault = lambda handler: handler.command in ('PUT', 'DELETE') and (
            handler.answer(503, b'', {'Retry-After': '3600'}), busy.set())
        process = self.spawn('push X')
        self.assertTrue(busy.wait(60))
        process.terminate()
        err = process.communicate(timeout=60)[1]
        self.assertEqual((process.returncode, err), (143, INTERRUPTED))

    def test_object_lock(self):
        """Such buckets want a checksum of every body; MD5 will do."""
        self.register(small(self.tmp / 'small'))
        self.register(self.large(9 * UNIT), 'Y')
        for self.server.must_check in (False, True):
            with self.subTest(self.server.must_check):
                self.server.objects.clear()
                self.etc('push X Y')
                sent = [headers for method, _, headers in self.server.log if method == 'PUT'][-1]
                self.assertEqual('Content-MD5' in sent, self.server.must_check)
                assert_pulls(self, 'ds', 'Y', home=str(self.server.must_check))
        stand_in(self, hashlib, 'md5', no_md5)  # the server has its own
        self.fails_with('Content-MD5 OR x-amz-checksum', 'push -f X')

    def test_lists_that_are_not_understood(self):
        page = b'<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>%s</NextContinuationToken>' \
               b'</ListBucketResult>'
        tokens, told = itertools.cycle((b'a', b'b', b'c')), 'does not list its objects in the form of its API'
        for what, body, problem in (
                ('tokens that go round', lambda: page % next(tokens), told),
                ('no such encoding', lambda: b'<?xml version="1.0" encoding="foo"?><ListBucketResult/>', told),
                ('no text encoding', lambda: b'<?xml version="1.0" encoding="hex"?><ListBucketResult/>', told),
                ('deep', lambda: b'<ListBucketResult>' + b'<a>' * 100000, told),
                ('entities', lambda: (
                    '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE x [<!ENTITY a "false">]><ListBucketResult>'
                    '<IsTruncated>&a;</IsTruncated></ListBucketResult>').encode('utf-16'), told),
                ('nothing', lambda: b'', told), ('a page', lambda: PORTAL, told)):
            with self.subTest(what):
                self.server.log.clear()
                self.server.fault = lambda handler: handler.answer(200, body())
                self.fails_with(problem, 'ls -r')
                self.assertLess(len(self.server.log), 5)

    def test_one_bad_archive_does_not_hide_the_others(self):
        self.share(small(self.tmp / 'ds'))
        self.put('Bad.tgz', b'x' * 100)
        self.server.fault = lambda h: 'Bad.tgz' in h.path and h.error(403, 'AccessDenied')
        out, err = self.etc('ls -r -l')
        self.assertIn('sha256:', out)
        self.assertIn('AccessDenied', err)

    def test_partial_pull_reads_little(self):
        self.share(write(self.tmp / 'ds', {'data/train/large': noise(20 * UNIT), 'data/test/x': noise(100000)}))
        for words, most in (('pull -p test X', 110000), ('info -r X', 0), ('pull X', 20 * UNIT)):
            with self.subTest(words):
                self.server.sent = 0
                self.etc(words, home='two')  # what is there is not fetched again
                self.assertLess(self.server.sent, most + 2 * 65536)

    def test_connections_are_kept(self):
        self.share(self.large(40 * UNIT))
        self.settings['connections'] = 8
        for words, most in (('pull X', 8), ('ls -r -l', 1)):
            with self.subTest(words):
                self.server.connections.clear()
                self.server.log.clear()
                self.etc(words, home='two')
                self.assertLessEqual(len(self.server.connections), most)
                self.assertGreater(len(self.server.log), most)

    def test_number_of_parts(self):
        """S3 takes 10,000 of 5 MiB to 5 GiB."""
        stand_in(self, etc, '_MAX_PARTS', 4)
        stand_in(self, etc, '_FEW_PARTS', 4)
        self.share(self.large(30 * UNIT))
        self.assertLessEqual(len(self.parts()), 4)
        self.etc('pull X', home='two')

    def test_stores_that_take_few_parts(self):
        """Parts grow while they are moderate, and beyond if the store refuses more of them."""
        stand_in(self, etc, '_FEW_PARTS', 4)
        self.register(self.large(30 * UNIT))
        for moderate, begun in ((64 * UNIT, 1), (5 * UNIT, 2)):
            with self.subTest(moderate):
                stand_in(self, etc, '_LONG_PART', moderate)
                self.server.log.clear()
                self.server.fault = lambda h: re.search(r'partNumber=([5-9]|1\d)', h.path) and h.error(
                    400, 'InvalidArgument', message='Part number must be between 1 and 4')
                self.etc('push -f X')
                self.assertEqual(sum('uploads' in path for path in self.requests('POST')), begun)
                self.assertEqual(self.server.uploads, {})
                assert_pulls(self, 'ds', force=True)

    def test_slow_part(self):
        """It holds up no others."""
        self.settings['connections'] = 2
        met, last = [], threading.Event()

        def fault(handler):
            if 'partNumber=1&' in handler.path:
                met.append(last.wait(30))
            elif 'partNumber=9&' in handler.path:
                last.set()
        self.register(self.large(50 * UNIT))
        self.server.fault = fault
        self.etc('push X')
        self.assertEqual(met, [True])

    def test_slow_link(self):
        """Where the first ranges come slowly, all connections are used."""
        self.settings['connections'] = 12
        self.share(self.large(20 * UNIT))
        number, gate, met = itertools.count(), threading.Barrier(12), []

        def fault(handler):
            if 'bytes=-' not in handler.headers['Range']:
                if next(number) < 5:
                    time.sleep(0.5)
                elif len(met) < 12:
                    gate.wait(10)
                    met.append(1)
        self.server.fault = fault
        self.etc('pull X', home='two')
        self.assertEqual(len(met), 12)

    def test_conflicts(self):
        """Amazon says of both that one may try again."""
        skip_pauses(self)
        self.register(small(self.tmp / 'small'))
        self.register(self.large(9 * UNIT), 'Y')
        for code in ('ConditionalRequestConflict', 'OperationAborted'):
            met = set()

            def fault(handler):
                kind = handler.command, re.sub('=.*', '', handler.path)
                if handler.command != 'GET' and kind not in met:
                    met.add(kind)
                    handler.error(409, code)
            with self.subTest(code):
                self.server.fault = fault
                self.etc('push X Y')
                self.etc('purge -r -f X Y')
                self.assertEqual(len(met), 6)  # an object, an upload, its parts, its end, and two deletions

    def test_lost_race_on_ceph(self):
        """It says 200 then, but gives no ETag."""
        self.publish(9 * UNIT, 1)
        other = dict(self.server.objects)
        self.server.objects.clear()
        self.etc('register -f', self.large(9 * UNIT), 'X')

        def final(handler):
            self.server.objects = other
            handler.answer(200, COMPLETED.replace(b'&quot;', b'') % (b'', b'', b'', b''))
        self.server.final = final
        self.fails_with("another 'X' is in", 'push X')

    def test_overload(self):
        skip_pauses(self)
        self.register(small(self.tmp / 'ds'))
        self.server.fault = lambda handler: handler.error(503, 'SlowDown')
        self.fails_with("the storage is overloaded; try again later, or with 'connections: ", 'push X')

    def test_stores_that_take_few_requests_at_once(self):
        sleep = etc._Job.sleep
        stand_in(self, etc._Job, 'sleep', lambda job, seconds: sleep(job, min(seconds, 0.01)))

        class Narrow(S3Handler):
            def handle_one(self):
                if not slots.acquire(blocking=False):
                    return self.error(429, 'SlowDown')
                try:
                    time.sleep(0.02)
                    super().handle_one()
                finally:
                    slots.release()

        self.server.RequestHandlerClass = Narrow
        root = self.large(12 * UNIT)
        self.register(root)
        for most in 1, 2:
            with self.subTest(most):
                slots = threading.Semaphore(most)
                self.etc('push -f X')
                self.etc('pull -f X', home='two')
                self.assertEqual(tree(self.tmp / 'two/X'), tree(root))

    def test_too_many_partitions(self):
        """They are refused before anything is sent."""
        stand_in(self, etc, '_INDEX_LIMIT', 3000)
        self.register(write(self.tmp / 'ds', {'data/%02d/x' % n: '' for n in range(20)}))
        self.fails_with('it has too many partitions for one archive; gather them', 'push X')
        self.assertEqual(self.requests('PUT') + self.requests('POST'), [])

    def test_parts_are_sent_while_packing_goes_on(self):
        write(self.tmp / 'ds', {'data/train/%d' % n: noise(4 * UNIT, n) for n in range(12)})
        self.register(write(self.tmp / 'ds', {'data/train/last': 'x'}))
        sent = []

        def wait():
            deadline = time.time() + 20
            while not self.parts() and time.time() < deadline:
                time.sleep(0.01)
            sent.append(len(self.parts()))
        self.at_first_read('/last', wait)
        self.etc('push X')
        self.assertGreater(sent[0], 0)

    def test_stores_without_conditions(self):
        self.server.conditions = False
        for answer in ((501, 'NotImplemented'), (400, 'InvalidArgument'), (501, ''), ()):
            with self.subTest(answer):
                self.server.fault = lambda h: h.headers['If-None-Match'] and answer and h.error(*answer)
                for name, size in (('X', 1000), ('Y', 9 * UNIT)):
                    self.etc('register -f', self.large(size, name), name)
                    self.server.objects.clear()
                    self.etc('push', name)
                    self.assertIn('identical', self.etc('push', name)[1])
                    write(self.tmp / name, {'data/train/x': 'changed'})
                    err = self.etc('push', name, status=1)[1]
                    self.assertIn("another '%s' is in %s already" % (name, self.url), err)
                    self.assertEqual((len(self.server.objects), self.server.uploads), (1, {}))

    def test_ignored_if_match(self):
        self.server.conditions = False
        self.test_replaced_meanwhile()

    def test_credentials(self):
        """Which ones are taken is tested below."""
        right = {'aws_access_key_id': AKID, 'aws_secret_access_key': SECRET}
        odd_one = 'the environment: aws_secret_access_key is missing, or holds characters that it cannot have;'
        nothing = "no credentials were found in the settings, the environment, the AWS profile 'default', or those " \
                  'of a container or this machine; set aws_access_key_id and aws_secret_access_key, or run '
        for what, settings, akid, secret, problem in (
                ('none', {}, '', '', nothing), ('half', {}, AKID, '', odd_one),
                ('line ends', {}, AKID + '\n', SECRET + '\r\n', ''), ('a line end inside', {}, AKID, 'hu\nsh', odd_one),
                ('no such profile', {'aws_profile': 'nope'}, '', '',
                 "the AWS profile 'nope' that aws_profile or $AWS_PROFILE names is not in"),
                ('wrong', dict(right, aws_secret_access_key='wrong' + SECRET[5:]), '', '', 'SignatureDoesNotMatch'),
                ('a token', dict(right, aws_session_token='a/token+=='), '', '', '')):
            with self.subTest(what):
                self.settings = dict(settings, endpoint_url=self.server.url)
                os.environ.update(AWS_ACCESS_KEY_ID=akid, AWS_SECRET_ACCESS_KEY=secret)
                err = self.etc('ls -r', status=int(bool(problem)))[1]
                self.assertIn(problem, err)
                for part in (SECRET[5:], 'sh\n'):
                    self.assertNotIn(part, err)
        self.assertEqual(self.server.log[-1][2]['x-amz-security-token'], 'a/token+==')

    def test_unreachable(self):
        self.server.stop()
        skip_pauses(self)
        self.fails_with('cannot reach http://127.0.0.1', 'ls -r')
        for bad in 'h:1', 'ftp://h', 'http://user:pw@h':
            with self.subTest(bad):
                self.settings['endpoint_url'] = bad
                self.fails_with('does not have the form https://host[:port][/path];', 'ls -r')


class AnyHost(S3Handler):
    """Of a proxy: any host is the store, and the bucket stands in the host's name or in the path."""

    def unsigned(self, body):
        parts = urllib.parse.urlsplit(self.path)
        self.path = parts.path + '?' + parts.query
        problem = super().unsigned(body)
        self.path = '/bucket' * parts.netloc.startswith('bucket.') + self.path
        return problem

    def do_CONNECT(self):
        self.server.log.append((self.command, self.path, self.headers))
        self.answer(403)


class S3Kinds(S3Case):
    """In what Amazon's regions and the stores that are like S3 differ."""

    def setUp(self):
        super().setUp()
        self.register(small(self.tmp / 'ds'))

    def behind_proxy(self):
        """Let the server stand for any host."""
        self.server.RequestHandlerClass = AnyHost
        os.environ.update(http_proxy=self.server.url, https_proxy=self.server.url, no_proxy='')

    def as_amazon(self):
        """Let the server be Amazon's, though not over TLS."""
        self.behind_proxy()
        del self.settings['endpoint_url']
        stand_in(self, etc._Aws, 'host',
                 lambda aws, service, region: 'http://%s.%s.amazonaws.example' % (service, region))

    def hosts(self):
        """Whom the client asked, since the last time."""
        hosts = [urllib.parse.urlsplit(path).hostname for path in self.requests()]
        self.server.log.clear()
        return hosts

    def anonymous(self):
        """Let nobody need a key."""
        self.settings.pop('aws_access_key_id')
        self.settings.pop('aws_secret_access_key')
        stand_in(self, S3Handler, 'unsigned', lambda h, body: h.headers['Authorization'] and 'AccessDenied')

    def test_anonymous(self):
        self.etc('push X')
        self.anonymous()
        self.assertEqual(self.etc('ls -r')[0], 'X\n')
        self.etc('pull X', home='two')

    def test_access_points(self):
        url = 's3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine'
        self.fails_with('-s3alias', 'ls -r', url=url)

    def test_hosts_of_amazon(self):
        """The region comes from the settings, or else from the profile."""
        self.behind_proxy()
        skip_pauses(self)
        write(self.tmp, {'.aws/config': '[profile work]\nregion = eu-north-1\n'})
        for url, more, host in (
                ('s3://box', {}, 'box.s3.us-east-1.amazonaws.com'),
                ('s3://box', {'aws_profile': 'work'}, 'box.s3.eu-north-1.amazonaws.com'),
                ('s3://box', {'aws_profile': 'work', 'region': 'cn-north-1'}, 'box.s3.cn-north-1.amazonaws.com.cn'),
                ('s3://my.box', {}, 's3.us-east-1.amazonaws.com')):
            with self.subTest(host):
                self.settings = dict(more, aws_access_key_id=AKID, aws_secret_access_key=SECRET)
                self.server.log.clear()
                self.etc('ls -r', url=url, status=1)
                self.assertEqual(set(self.requests()), {host + ':443'})

    def test_addressing_style(self):
        """Of ~/.aws/config."""
        self.behind_proxy()
        port = self.server.url.rpartition(':')[2]
        for style, endpoint, bucket, host in (
                ('path', 'store.example', 'bucket', 'store.example'),
                ('auto', 'store.example', 'bucket', 'store.example'),
                ('virtual', 'store.example', 'bucket', 'bucket.store.example'),
                ('virtual', 'store.example', 'My_Bucket', 'store.example'),  # no host can have such a name
                ('virtual', '127.0.0.1', 'bucket', '127.0.0.1')):  # nor can a name stand before an address
            with self.subTest(style, bucket=bucket, host=host):
                write(self.tmp, {'.aws/config': '[default]\ns3 =\n    max_concurrent_requests = 20\n'
                                                '    addressing_style = %s\n' % style})
                self.settings['endpoint_url'] = 'http://%s:%s' % (endpoint, port)
                self.url = 's3://%s/some/prefix' % bucket
                for words in ('push -f X', 'pull -f X', 'ls -r')[::2 if bucket == 'My_Bucket' else 1]:
                    out, err = self.etc(words, status=int(bucket == 'My_Bucket'))
                    self.assertIn('404 NoSuchBucket' if bucket == 'My_Bucket' else 'X', out + err)
                self.assertEqual(set(self.hosts()), {host})

    def test_region_of_the_signature(self):
        def fault(handler):
            if '/eu-9/s3/' not in handler.headers['Authorization']:
                refused.append(handler)
                handler.answer(400, b'<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong'
                                    b'</Message><Region>%s</Region></Error>' % region)
        self.server.fault, region = fault, b'eu-9'
        for words in ('push X', 'push -f X', 'pull -f X'):  # asked once, then remembered
            with self.subTest(words):
                refused = []
                self.etc(words)
                self.assertEqual(len(refused), 1)
        region = b'a/b'
        self.fails_with('AuthorizationHeaderMalformed', 'ls -r')

    def test_regions_of_amazon(self):
        self.as_amazon()
        here, there = ('bucket.s3.%s.amazonaws.example' % region for region in ('us-east-1', 'eu-west-1'))
        self.server.fault = lambda handler: here in handler.path and handler.answer(
            status, b'<Error><Code>PermanentRedirect</Code></Error>', {'x-amz-bucket-region': region})
        for anonymous in (False, True):
            if anonymous:
                self.anonymous()
            for status, region in ((301, 'eu-west-1'), (307, 'eu-west-1'), (400, 'eu-west-1'), (403, 'eu-west-1')):
                with self.subTest(anonymous=anonymous, status=status):
                    self.assertEqual(self.etc('ls -r')[0], '')
                    self.assertEqual(self.hosts(), [here, there])
        status, region = 301, 'evil.example/'
        self.fails_with('PermanentRedirect', 'ls -r')
        self.assertEqual(set(self.hosts()), {here})

    def test_amazon_knows_conditions(self):
        self.as_amazon()
        self.etc('push X')
        self.server.fault = lambda h: 'If-Match' in h.headers and h.command == 'DELETE' and h.error(
            501, 'NotImplemented')
        self.fails_with('answers 501 NotImplemented', 'purge -r -f X')
        self.assertEqual(len(self.server.objects), 1)

    def test_keys_that_may_not_list(self):
        """Without s3:ListBucket what is missing is forbidden; on Amazon's hosts the condition of the write decides."""
        self.server.may_list = False
        self.fails_with('s3:ListBucket', 'push X')  # this store may ignore conditions
        self.as_amazon()
        self.etc('push X')
        self.assertIn('already, and identical', self.etc('push X')[1])
        before = dict(self.server.objects)

        def fault(handler):
            if handler.command in ('GET', 'HEAD'):
                handler.error(403, 'AccessDenied')
            elif handler.headers['If-None-Match'] and answer:
                handler.error(*answer)
        self.server.fault = fault
        for answer, problem in (((), 'cannot read it to compare'),
                                ((501, 'NotImplemented'), 'NotImplemented')):  # nobody would tell if there is another
            with self.subTest(problem):
                self.fails_with(problem, 'push X')
                self.assertEqual(self.server.objects, before)
        answer = ()
        self.share(self.tmp / 'ds', 'Y')
        self.assertEqual(len(self.server.objects), 2)

    def test_clock(self):
        now = time.time

        def fault(handler):
            stamp = time.strptime(handler.headers['x-amz-date'], '%Y%m%dT%H%M%SZ')
            if abs(calendar.timegm(stamp) - now()) > 900:
                refused.append(handler)
                handler.error(403, 'RequestTimeTooSkewed')
        self.server.fault = fault
        stand_in(self, Handler, 'date_time_string', lambda h, stamp=None: email.utils.formatdate(now(), usegmt=True))
        stand_in(self, time, 'time', now)
        for skew in (-3 * 3600, 40 * 86400):
            with self.subTest(skew=skew):
                refused = []
                time.time = lambda: now() + skew
                self.assertIn('clock is %d minutes off' % (abs(skew) // 60), self.etc('push X -f')[1])
                self.assertEqual(len(refused), 1)
                self.etc('pull X -f', home='two')
        Handler.date_time_string = lambda handler, timestamp=None: 'no date'
        self.fails_with("set this machine's clock", 'ls -r')

    def test_headers_that_are_asked_for(self):
        self.register(self.large(9 * MIB, 'big'), 'Big')
        names = ('x-amz-server-side-encryption', 'x-amz-server-side-encryption-aws-kms-key-id', 'x-amz-storage-class',
                 'x-amz-acl')
        key = 'arn:aws:kms:eu-west-1:1:key/k'
        settings = dict(self.settings, request_payer='requester')
        for more, expected in (({'sse_kms_key_id': key, 'public': True}, ['aws:kms', key, None, 'public-read']),
                               ({'sse': 'AES256', 'storage_class': 'STANDARD_IA'},
                                ['AES256', None, 'STANDARD_IA', None])):
            with self.subTest(more):
                self.settings = dict(settings, **more)
                self.server.log.clear()
                self.etc('push -f X Big')
                self.etc('pull -f X', home='two')
                self.etc('ls -r')
                created = 0
                for method, path, headers in self.server.log:
                    is_new = method == 'PUT' and '?' not in path or path.endswith('?uploads=')
                    created += is_new
                    self.assertEqual([headers.get(name) for name in names], expected if is_new else [None] * 4)
                    self.assertEqual(headers['x-amz-request-payer'], 'requester')
                    self.assertNotRegex(' '.join(headers).lower(),
                                        'checksum|trailer|content-md5|transfer-encoding|expect')
                    self.assertRegex(headers['x-amz-content-sha256'], '^[0-9a-f]{64}$')
                self.assertEqual(created, 2)
        self.settings['sse'] = 'caf\u20ac'
        self.fails_with('contains invalid characters', 'push -f X')

    def test_who_is_to_blame(self):
        self.etc('push X')
        read, style = ('GET', 'HEAD'), 'addressing_style = virtual'
        for words, methods, status, code, remedy in [
                ('pull -f X', read, 403, 'AccessDenied', 'need s3:GetObject, and s3:ListBucket to tell'),
                ('push -f X', ['PUT'], 403, 'AccessDenied', 'need s3:PutObject here'),
                ('push -f X', ['PUT'], 400, 'AccessControlListNotSupported',
                 "drop 'public: true', and let a bucket policy make the objects public")] + [
                ('ls -r', read, status, code, remedy) for status, code, remedy in (
                    (403, 'AccessDenied', 'come from the settings, need s3:ListBucket here'),
                    (404, 'NoSuchBucket', 'check the bucket'), (301, 'PermanentRedirect', "set 'region'"),
                    (400, 'InvalidToken', 'renew'), (404, '', 'check the bucket'), (400, '', 'the region'),
                    (403, 'InvalidAccessKeyId', 'come from the settings'),
                    (403, 'SecondLevelDomainForbidden', style),  # Alibaba
                    (403, 'PathStyleDomainForbidden', style),  # Tencent
                    (400, 'VirtualHostDomainRequired', style))]:  # Huawei
            with self.subTest(words, code=code, status=status):
                body = b'<Error><Code>%s</Code><Message>why</Message></Error>' % code.encode() if code else b''
                self.server.fault = lambda handler: handler.command in methods and handler.answer(status, body)
                err = self.etc(words, status=1)[1]
                self.assertIn(remedy, err)
                self.assertIn('answers %d%s;' % (status, ' %s: why' % code if code else ': no explanation'), err)
        self.server.fault = None
        for words in ('ls -r', 'push X'):
            self.fails_with('NoSuchBucket', words, url='s3://missing')


class GsHandler(Handler):
    """Google Cloud Storage's JSON API, as https://cloud.google.com/storage/docs/json_api/v1 describes it."""

    def error(self, status, message, headers=()):
        self.json({'error': {'code': status, 'message': message}}, status, headers)

    def handle_one(self):
        server = self.server
        path, _, query = self.path.partition('?')
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        server.log.append((self.command, self.path, self.headers))
        server.connections.add(self.client_address)
        if self.command == 'PUT' and server.cuts and 'bytes */' not in self.headers['Content-Range']:
            start = int(re.match(r'bytes (\d+)-', self.headers['Content-Range']).group(1))
            received = self.rfile.read(min(server.cuts.pop(0), int(self.headers['Content-Length'])))
            with server.lock:
                self.receive(start, received[:len(received) // server.granule * server.granule])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.read_body()
        if self.misbehaves():
            return
        if path == '/session':  # whoever has its address may go on
            assert 'Authorization' not in self.headers
        elif server.token and self.headers.get('Authorization') != 'Bearer ' + server.token:
            return self.error(403 if 'Authorization' not in self.headers else 401, 'who are you?')
        with server.lock:
            if path == '/session':
                return self.session(body)
            if path == '/upload/storage/v1/b/bucket/o' and self.command == 'POST':
                return self.start()
            parts = path.split('/')
            if parts[:6] != ['', 'storage', 'v1', 'b', 'bucket', 'o']:
                return self.error(404, 'The specified bucket does not exist.')
            if len(parts) == 6:
                return self.list()
            self.object(urllib.parse.unquote(parts[6]))

    def resource(self, name, found=None):
        data, generation, _ = found or self.server.objects[name]
        return {'kind': 'storage#object', 'name': name, 'size': str(len(data)), 'generation': generation,
                'updated': '2024-05-06T07:08:09.123Z',
                'md5Hash': 'AAAA' if self.server.garble else base64.b64encode(md5(data).digest()).decode()}

    def list(self):
        prefix, after = self.query.get('prefix', ''), self.query.get('pageToken', '')
        names = sorted(n for n in self.server.objects if n.startswith(prefix) and n > after
                       and '/' not in n[len(prefix):])
        page = {'kind': 'storage#objects'} if 'kind' in self.query.get('fields', 'kind').split(',') else {}
        if names:
            page['items'] = [self.resource(n) for n in names[:self.server.page]]
        if len(names) > self.server.page:
            page['nextPageToken'] = names[self.server.page - 1]
        self.json(page)

    def object(self, name):
        found = self.server.objects.get(name)
        if not found or self.query.get('generation', found[1]) != found[1]:
            found = self.server.old.get((name, self.query.get('generation')))
        if not found:
            return self.error(404, 'No such object')
        if self.server.conditions and self.query.get('ifGenerationMatch', found[1]) != found[1]:
            return self.error(412, 'conditionNotMet')
        if self.command == 'DELETE':
            if self.server.versioned:
                self.server.old[name, found[1]] = found
            del self.server.objects[name]
            return self.answer(204)
        if self.query.get('alt') != 'media':
            return self.json(self.resource(name, found))
        self.give(found[0], {'Last-Modified': 'Mon, 06 May 2024 07:08:09 GMT', 'x-goog-generation': found[1]})

    def start(self):
        assert self.query['uploadType'] == 'resumable'
        if self.query.get('ifGenerationMatch') == '0' and self.query['name'] in self.server.objects:
            return self.error(412, 'conditionNotMet')
        if self.query.get('predefinedAcl') and self.server.uniform:
            return self.error(400, 'Cannot insert legacy ACL for an object when uniform bucket-level access is '
                                     'enabled.')
        upload = os.urandom(8).hex()
        self.server.uploads[upload] = self.query, bytearray()
        self.answer(200, b'', {'Location': self.server.url + '/session?upload_id=' + upload})

    def receive(self, start, data):
        upload = self.server.uploads[self.query['upload_id']][1]
        assert start == len(upload), 'neither a gap nor a byte again'
        upload += data

    def session(self, body):
        server, upload = self.server, self.query['upload_id']
        if self.command == 'PUT' and upload in server.finished:
            return self.json(self.resource(server.finished[upload]))
        if self.command == 'DELETE' or upload not in server.uploads:
            return self.answer(499 if server.uploads.pop(upload, None) else 404)
        start, stop, total = re.match(r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)$', self.headers['Content-Range']).groups()
        if start is not None:
            if int(stop) + 1 - int(start) != len(body) or (total == '*' and (int(stop) + 1) % (256 << 10)):
                return self.error(400, 'wrong chunk')
            self.receive(int(start), body[:getattr(server, 'step', None)])
        query, data = server.uploads[upload]
        name = query['name']
        if total == '*' or int(total) != len(data):
            return self.answer(308, b'', {'Range': 'bytes=0-%d' % (len(data) - 1)} if data else {})
        if query.get('ifGenerationMatch') == '0' and name in server.objects:
            return self.error(412, 'conditionNotMet')
        del server.uploads[upload]
        server.finished[upload] = name
        server.generation += 1
        server.objects[name] = bytes(data), str(server.generation), query
        if server.final:
            return server.final(self)
        self.json(self.resource(name))


class GsCase(Case):
    def setUp(self):
        super().setUp()
        self.server = Server(GsHandler, self)
        self.server.cuts, self.server.granule, self.server.token, self.server.finished = [], 1, None, {}
        self.server.generation, self.server.uniform, self.server.garble = 1700000000000000, False, False
        self.url = 'gs://bucket/some/prefix'
        self.settings = {'endpoint_url': self.server.url}
        os.environ['STORAGE_EMULATOR_HOST'] = self.server.url  # for spawned processes

    def put(self, name, data):
        self.server.generation += 1
        self.server.objects['some/prefix/' + name] = data, str(self.server.generation), {}


class GsRemote(Scaled, BucketSuite, GsCase):
    def test_answers_that_are_not_understood(self):
        """A push is done if the store says so, or if what is there is right."""
        self.register(small(self.tmp / 'ds'))
        self.register(self.large(17 * UNIT, 'large'), 'Y')
        start = b'{"name": "some/prefix/X.tgz"'
        for body in (b'{}', b'', PORTAL, b'[]', b'{"name": "some/prefix/Z.tgz", "generation": "5", "size": "7"}',
                     start + b', "size": "7"}', start + b', "generation": "5"}',
                     start + b', "generation": "5", "size": "7"}'):
            for method, stored in (('POST', False), ('PUT', True), ('PUT', False)):
                with self.subTest(body, method=method, stored=stored):
                    self.server.objects.clear()
                    self.server.final = (lambda handler: handler.answer(200, body)) if stored else None
                    self.server.fault = lambda h: not stored and h.command == method and h.answer(200, body)
                    err = self.etc('push X', status=int(not stored))[1]
                    self.assertIn('pushed' if stored else 'answers 20', err)
                    self.assertEqual(len(self.server.objects), int(stored))
        self.server.fault = lambda h: '/*' in h.headers.get('Content-Range', '') and h.answer(200, b'{}')
        self.fails_with('answers 200: no explanation; check the endpoint_url', 'push Y')

    def test_lists_that_are_not_understood(self):
        """They must not pass for an empty bucket, either."""
        right = b'{"kind": "storage#objects", '
        item = b'"items": [{"name": "some/prefix/X.tgz", "size": %s, "generation": 1}]}'
        for body in (b'', b'[]', PORTAL, b'[' * 100000, b'{}', b'{"login": "https://portal.example"}',
                     b'{"kind": "login"}', right + b'"items": 5}', right + b'"items": [{}]}',
                     right + b'"items": [{"name": 5}]}',
                     right + item % b'"x"', right + item % b'1e999', right + b'"nextPageToken": 3}'):
            with self.subTest(body[:99]):
                self.server.fault = lambda handler: handler.answer(200, body)
                for words in ('ls -r', 'pull X'):
                    self.fails_with('does not list its objects', words)
        tokens = itertools.cycle('abc')
        self.server.fault = lambda handler: handler.json(
            {'kind': 'storage#objects', 'nextPageToken': next(tokens)})
        self.fails_with('does not list its objects', 'ls -r')

    def test_accounts_that_may_only_create(self):
        """The condition of the write decides where storage.objects.get is missing."""
        self.register(small(self.tmp / 'ds'))
        self.server.fault = lambda h: h.command == 'GET' and h.error(403, 'no storage.objects.get access')
        self.etc('push X')
        self.fails_with('cannot read it to compare', 'push X')

    def test_errors_in_plain_text(self):
        """As Google answers to a read of an object; in the text of anybody else may be what we sent."""
        for headers, said in (({'X-GUploader-UploadID': 'x'}, 'a@b.example lacks access'), ({}, 'no explanation')):
            self.server.fault = lambda h: 'alt=media' in h.path and h.answer(403, b'a@b.example lacks access', headers)
            self.fails_with('answers 403: %s; ' % said, 'pull X')

    def test_emulator_host(self):
        del self.settings['endpoint_url']
        self.put('X.tgz', b'x')
        for host in (self.server.url, self.server.url[7:]):
            with self.subTest(host):
                os.environ['STORAGE_EMULATOR_HOST'] = host
                self.assertEqual(self.etc('ls -r')[0], 'X\n')
        self.assertIsNone(self.server.log[-1][2].get('Authorization'))

    def test_public(self):
        self.register(small(self.tmp / 'ds'))
        self.settings['public'] = self.server.uniform = True
        self.fails_with('allUsers', 'push X')
        self.server.uniform = False
        self.etc('push X')
        self.assertEqual(self.server.objects['some/prefix/X.tgz'][2]['predefinedAcl'], 'publicRead')

    def test_cut_uploads_go_on_where_they_were(self):
        self.register(self.large(30 * UNIT))
        skip_pauses(self)
        rng = random.Random(9)
        for trial in range(4):
            with self.subTest(trial=trial):
                self.server.cuts = [rng.randrange(9 * UNIT) for _ in range(6)] + [0, 1, 8 * UNIT]
                rng.shuffle(self.server.cuts)
                self.server.granule = (1, 256 << 10)[trial % 2]
                self.etc('push -f X')  # the server asserts that no byte came twice
                self.assertEqual(self.server.cuts, [])
                assert_pulls(self, 'ds', force=True)

    def test_many_small_steps(self):
        """As with a server, or a proxy, that takes little at once."""
        self.register(self.large(70000))
        self.server.step = 64
        self.etc('push X')
        assert_pulls(self, 'ds')

    def test_uploads_that_fail(self):
        """Nothing is left."""
        skip_pauses(self)
        self.register(self.large(17 * UNIT))
        for what, place, answer, problem in (
                ('it takes nothing', 'bytes', lambda h: h.answer(308), 'answers 308: '),  # to some servers a redirect
                ('it refuses a part', '%d-' % etc._GS_PART, lambda h: h.error(403, 'no'), 'answers 403: no;')):
            with self.subTest(what):
                self.server.fault = lambda h: place in (h.headers.get('Content-Range') or '') and answer(h)
                self.fails_with(problem, 'push X')
                self.assertEqual((self.server.uploads, self.server.objects), ({}, {}))

    def test_md5(self):
        self.register(small(self.tmp / 'ds'))
        self.server.garble = True
        self.fails_with('did not arrive', 'push X')
        self.assertEqual(self.server.objects, {})
        stand_in(self, hashlib, 'md5', no_md5)  # the server has its own
        self.etc('push X')

class GsPurge(PurgeSuite, GsCase):
    def test_refusals(self):
        os.environ.pop('STORAGE_EMULATOR_HOST')
        for message, remedy in (
                ("Object 'bucket/X.tgz' is subject to bucket's retention policy or object retention and cannot be "
                 'deleted or overwritten until 2030-01-01T00:00:00Z', PROTECTED),
                ("Object 'bucket/X.tgz' is under active Event-Based hold and cannot be deleted, overwritten or "
                 'archived until hold is removed.', PROTECTED),
                ('a@b.example does not have storage.objects.delete access to the Google Cloud Storage object.',
                 "; no credentials were found: run 'gcloud auth application-default login', or set google_credentials "
                 'or $GOOGLE_APPLICATION_CREDENTIALS to a credentials file')):
            self.refused(lambda h: h.error(403, message), '403: ' + message + remedy)

    def test_conditions(self):
        generation = self.server.objects['some/prefix/X.tgz'][1]
        self.assertIn("purged 'X'", self.purge())
        self.assertEqual([path.partition('?')[2] for method, path, _ in self.server.log if method == 'DELETE'],
                         ['ifGenerationMatch=' + generation])


class TokenHandler(Handler):
    """Google's token endpoints; `server.respond(handler, form)` gives an answer, or tells what is wrong."""

    def handle_one(self):
        body = self.read_body()
        self.server.log.append((self.command, self.path, self.headers))
        answer = self.server.respond(self, dict(urllib.parse.parse_qsl(body.decode())))
        if isinstance(answer, str):
            self.json({'error': 'invalid_grant', 'error_description': answer}, 400)
        else:
            self.json(answer, headers={'Metadata-Flavor': 'Google'})


class GoogleCase(GsCase):
    def setUp(self):
        super().setUp()
        del os.environ['STORAGE_EMULATOR_HOST']
        os.environ['NO_GCE_CHECK'] = 'true'
        self.server.token = 'ya29.token'
        self.tokens = Server(TokenHandler, self)
        self.asked = []

        def init(remote, config, job):
            """Credentials are only for https; a test has none, so it lifts that rule, and nothing else."""
            original(remote, config, job)
            remote.credentials = etc._GoogleCredentials(config, remote.http)
        original = stand_in(self, etc._GsRemote, '__init__', init)

    def respond(self, checks):
        """Let the token endpoint give a token, if all `checks` {key: value or function} hold for the form."""
        def respond(handler, form):
            self.asked.append(form)
            for key, expected in checks.items():
                value = form.get(key)
                if not (expected(value) if callable(expected) else value == expected):
                    return 'wrong %s: %s' % (key, value)
            return {'access_token': 'ya29.token', 'expires_in': 3599, 'token_type': 'Bearer'}
        self.tokens.respond = respond

    def use(self, info):
        self.settings['google_credentials'] = str(self.tmp / 'key.json')
        (self.tmp / 'key.json').write_text(json.dumps(info))

    def user(self, **more):
        return dict({'type': 'authorized_user', 'client_id': 'i', 'client_secret': 's', 'refresh_token': 'r',
                     'token_uri': self.tokens.url}, **more)

    def works(self):
        self.assertEqual(self.etc('ls -r')[0], '')


class GoogleCredentials(GoogleCase):
    def test_authorized_user(self):
        self.use({'type': 'authorized_user', 'client_id': 'id', 'client_secret': 'se+cret', 'refresh_token': 'a/b',
                  'token_uri': self.tokens.url + '/token', 'quota_project_id': 'billing'})
        path = self.tmp / 'key.json'
        path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())  # a byte order mark
        right = {'grant_type': 'refresh_token', 'client_id': 'id', 'client_secret': 'se+cret', 'refresh_token': 'a/b'}
        self.respond(right)
        self.share(small(self.tmp / 'ds'))
        self.assertEqual(self.asked, [right], 'a token is kept')
        self.assertIn('billing', [headers.get('x-goog-user-project') for _, _, headers in self.server.log])
        self.respond({'refresh_token': 'other'})
        err = self.etc('ls -r', status=1)[1]
        self.assertIn('gives no access token: 400: wrong refresh_token', err)
        self.assertNotIn('se+cret', err)

    def test_renewed_when_refused_and_before_it_expires(self):
        self.use(self.user())
        tokens = ['ya29.token', 'old']
        self.tokens.respond = lambda h, form: {'access_token': tokens.pop(), 'expires_in': 3600}
        self.works()
        self.assertEqual(len(self.server.log), 2)
        self.tokens.respond = lambda h, form: self.asked.append(h) or {'access_token': 'ya29.token', 'expires_in': 100}
        self.share(small(self.tmp / 'ds'))
        self.assertGreater(len(self.asked), 1)
        for token, problem in (('never right', 'roles/storage'), ('two\nlines', "missing or wrong"),
                               (['list'], 'missing or wrong'), ('', "missing or wrong")):
            with self.subTest(token):
                self.tokens.respond = lambda h, form: {'access_token': token, 'expires_in': 3600}
                self.fails_with(problem, 'ls -r')

    @unittest.skipUnless(shutil.which('openssl') or os.environ.get('ETC_TEST_REQUIRE_PEERS'), 'no openssl here')
    def test_service_account(self):
        def openssl(*args):
            return subprocess.check_output(('openssl',) + args, stderr=subprocess.DEVNULL, cwd=str(self.tmp)).decode()

        def right(assertion):
            text, _, signature = assertion.rpartition('.')
            head, claims, signature = (base64.urlsafe_b64decode(part + '==') for part in text.split('.') + [signature])
            write(self.tmp, {'signature': signature, 'text': text})
            openssl('dgst', '-sha256', '-verify', 'pub.pem', '-signature', 'signature', 'text')
            self.assertEqual(json.loads(head.decode()), {'alg': 'RS256', 'typ': 'JWT', 'kid': 'kid1'})
            claims = json.loads(claims.decode())
            self.assertEqual((claims['iss'], claims['aud']), ('me@project', self.tokens.url + '/token'))
            self.assertTrue(claims['scope'].startswith('https://www.googleapis.com/auth/devstorage.'))
            self.assertTrue(abs(claims['iat'] - time.time()) < 60 and claims['exp'] - claims['iat'] == 3600)
            return True
        self.respond({'grant_type': 'urn:ietf:params:oauth:grant-type:jwt-bearer', 'assertion': right})
        info = {'type': 'service_account', 'client_email': 'me@project', 'private_key_id': 'kid1',
                'token_uri': self.tokens.url + '/token'}
        for bits, form in ((2048, ['pkey']), (1536, ['rsa', '-traditional'])):
            with self.subTest(bits=bits, form=form):
                openssl('genpkey', '-algorithm', 'RSA', '-pkeyopt', 'rsa_keygen_bits:%d' % bits, '-out', 'key.pem')
                openssl('pkey', '-in', 'key.pem', '-pubout', '-out', 'pub.pem')
                self.use(dict(info, private_key=openssl(*form, '-in', 'key.pem')))
                self.works()
        self.use(dict(info, private_key='garbage'))
        self.fails_with('cannot be used: something in them', 'ls -r')

    def library(self, load):
        """Let Google's library be installed, with this load_credentials_from_file(); or not, if that is None."""
        requests = type('requests', (), {'Request': object})
        transport = type('transport', (), {'requests': requests})
        auth = type('auth', (), {'load_credentials_from_file': load, 'transport': transport})
        for name, module in (('google', type('google', (), {'auth': auth})), ('google.auth', auth),
                             ('google.auth.transport', transport), ('google.auth.transport.requests', requests)):
            sys.modules[name] = module if load else None
            self.addCleanup(sys.modules.pop, name, None)

    @POSIX
    def test_kinds_that_need_another_tool(self):
        """Federation, impersonation and new kinds: from Google's library, or else from gcloud."""
        credentials = type('Credentials', (), {'token': 'ya29.token', 'expiry': None, 'refresh': lambda *args: None})()
        os.environ['PATH'] = str(self.tmp / 'bin')
        right = '[ "$*:$GOOGLE_APPLICATION_CREDENTIALS" = "auth application-default print-access-token:%s" ] && ' \
                'echo ya29.token' % (self.tmp / 'key.json')
        for kind in ('external_account', 'impersonated_service_account', 'external_account_authorized_user', 'new'):
            self.use({'type': kind})
            for what, load, script, problem in (
                    ('library', lambda path, scopes: (credentials, 'project'), 'exit 1', None),
                    ('gcloud', None, right, None),
                    ('library that fails', lambda path, scopes: 1 / 0, right, 'key.json cannot be used: '),
                    ('gcloud that fails', None, 'echo ya29.token; echo please log in >&2; exit 1', 'please log in'),
                    ('gcloud that says nothing', None, 'true', 'key.json cannot be used: '),
                    ('neither', None, '', 'gcloud')):
                with self.subTest(kind, what=what):
                    remove(self.tmp / 'bin')
                    if script:
                        write(self.tmp / 'bin', {'gcloud': '#!/bin/sh\n' + script}).joinpath('gcloud').chmod(0o755)
                    self.library(load)
                    err = self.etc('ls -r', status=int(bool(problem)))[1]
                    self.assertIn(problem or '', err)

    def test_metadata_server(self):
        del os.environ['NO_GCE_CHECK']
        os.environ['GCE_METADATA_HOST'] = self.tokens.url[7:]
        self.tokens.respond = lambda handler, form: {'access_token': 'ya29.token', 'expires_in': 3600} if (
            handler.headers['Metadata-Flavor'] == 'Google') else 'no'
        self.works()
        self.tokens.respell = lambda name, value: None if name == 'Metadata-Flavor' else value
        self.fails_with('no credentials were found', 'ls -r')  # an impostor

    def test_places(self):
        """From the last one that is looked at to the first."""
        self.respond({'refresh_token': 'right'})
        right, wrong = (json.dumps(self.user(refresh_token=token)) for token in ('right', 'wrong'))
        self.fails_with('no credentials were found', 'ls -r')
        name, home, sdk = 'application_default_credentials.json', self.tmp / '.config/gcloud', self.tmp / 'sdk'
        if os.name != 'nt':
            write(home, {name: right})
            self.works()
        write(home, {name: wrong})
        write(sdk, {name: right})
        os.environ['CLOUDSDK_CONFIG'] = str(sdk)
        self.works()
        write(sdk, {name: wrong, 'right.json': right})
        os.environ['GOOGLE_APPLICATION_CREDENTIALS'] = str(sdk / 'right.json')
        self.works()
        os.environ['GOOGLE_APPLICATION_CREDENTIALS'] = str(sdk / 'gone.json')
        self.assertIn('cannot read the file with Google credentials that google_credentials or '
                      '$GOOGLE_APPLICATION_CREDENTIALS', self.etc('ls -r', status=1)[1])
        self.settings['google_credentials'] = str(sdk / 'right.json')
        self.works()

    def test_what_cannot_be_used(self):
        self.library(None)
        os.environ['PATH'] = ''
        for info, problem in (
                ([], 'holds no Google credentials;'), ({}, 'holds no Google credentials;'),
                ('x', 'holds no Google credentials;'),
                ({'type': 'authorized_user'}, 'cannot be used: something in them'),
                ({'type': 'service_account'}, 'cannot be used: something in them'),
                ({'type': 'service_account', 'client_email': 5, 'private_key': 5}, 'cannot be used: something in them'),
                ({'type': '\x1b[31m'}, 'type')):
            with self.subTest(info):
                self.use(info)
                err = self.etc('ls -r', status=1)[1]
                self.assertIn(problem, err)
                self.assertIn('key.json', err)
                self.assertNotIn('\x1b', err)

    def test_nothing_is_sent_elsewhere(self):
        self.use(self.user())
        self.respond({})
        other = Server(GsHandler, self)
        other.cuts, other.token, other.finished = [], None, {}
        self.server.fault = lambda h: h.command == 'POST' and h.answer(
            200, b'', {'Location': other.url + '/session?upload_id=1'})
        self.register(small(self.tmp / 'ds'))
        self.fails_with('answers 404', 'push X')
        self.assertEqual({headers.get('Authorization') for _, _, headers in other.log}, {None})


class WebHandler(Handler, http.server.SimpleHTTPRequestHandler):
    """`python3 -m http.server`, which gives no ranges; or as a server that does."""
    protocol_version = 'HTTP/1.0'

    def handle_one(self):
        self.server.log.append((self.command, self.path, self.headers))
        if self.misbehaves():
            return
        path = Path(self.translate_path(self.path))
        if not self.server.ranges or not path.is_file():
            simple = http.server.SimpleHTTPRequestHandler
            return (simple.do_GET if self.command == 'GET' else simple.do_HEAD)(self)
        data = path.read_bytes()
        headers = {'ETag': '"%s"' % hashlib.sha1(data).hexdigest()}
        if self.server.conditions and self.headers.get('If-Match', headers['ETag']) != headers['ETag']:
            return self.answer(412)
        self.give(data, headers)

    def translate_path(self, path):
        return os.path.join(self.server.root, os.path.relpath(super().translate_path(path), os.getcwd()))


class WebSuite(Scaled):
    """What was pushed into a directory is read by its web address. Subclasses start(), and set `url`."""
    path = '/data sets/\u00e9'

    def setUp(self):
        super().setUp()
        self.share = self.tmp / ('www' + self.path)
        self.share.mkdir(parents=True)
        self.start()
        self.register(write(small(self.tmp / 'ds'), {'data/train/large': noise(9 * UNIT)}))
        self.etc('push X', url=self.share.as_uri())

    def test_round_trip(self):
        self.register(odd(self.tmp / 'odd'), 'Odd')
        self.etc('push Odd', url=self.share.as_uri())
        write(self.share, {'other.txt': 'x', 'not a dataset.tgz': 'x', 'sub/Inner.tgz': 'x'})
        with tarfile.open(str(self.share / 'foreign.tgz'), 'w:gz', compresslevel=1) as tar:
            tar.add(str(self.tmp / 'ds'), '.')
        self.assertEqual(self.etc('ls -r')[0], 'Odd\nX\nforeign\n')
        self.assertIn(etc.Dataset(self.tmp / 'odd').digest, self.etc('ls -r -l')[0])
        for name, root in (('X', 'ds'), ('Odd', 'odd'), ('foreign', 'ds')):
            with self.subTest(name):
                assert_pulls(self, root, name)
        self.etc('pull -p test X', home='three')
        self.assertEqual(etc.dataset('X', partitions=['test'], config=self.config('three')).keys(), {'test'})
        assert_pulls(self, 'ds', home='three')
        self.fails_with("'etc ls -r' lists what is there", 'pull Odds')

    def test_read_only(self):
        write(self.tmp / 'ds', {'data/train/new': ''})
        self.register(self.tmp / 'ds', 'Y')
        before = tree(self.share)
        only = 'can only be read; to push or purge, set a url that begins with s3://, gs:// or file://\n'
        for words, problem in (('push -f X', only), ('push Y', only), ('push X', "another 'X' is in"),
                               ('purge -r -f X', only)):
            with self.subTest(words):
                self.assertRegex(self.etc(words, status=1)[1], r'\Aetc: [^\n]*%s[^\n]*\n?\Z' % problem)
        self.assertEqual(tree(self.share), before)


class Web(WebSuite, Case):
    def start(self):
        self.server = self.serve_files()
        self.url = self.server.url + self.path

    def serve_files(self):
        server = Server(WebHandler, self)
        server.root, server.ranges = str(self.tmp / 'www'), True
        return server

    def test_partial_pull_reads_little(self):
        self.server.sent = 0
        self.etc('pull -p test X', home='two')
        self.etc('info -r X')
        self.assertLess(self.server.sent, UNIT)

    def test_replaced_while_read(self):
        for self.server.conditions in (True, False):
            with self.subTest(conditions=self.server.conditions), found(self) as (read, _):
                self.assertEqual(len(read()), 45)
                path = self.share / 'X.tgz'
                path.write_bytes(path.read_bytes() + b'x')
                with self.assertRaisesRegex(etc.RemoteError, 'replaced'):
                    read()

    def test_without_ranges(self):
        self.server.ranges = False
        self.test_round_trip()
        del self.server.log[:]
        self.assertEqual(self.etc('ls -r')[0], 'Odd\nX\nforeign\n')
        self.assertEqual([path for method, path, _ in self.server.log if method == 'GET' and path.endswith('.tgz')], [])
        self.assertIn('supports no ranges', self.etc('pull X', home='four')[1])
        for modified in ('01 Jan , 00:00:00', 'x', 'Mon, 99 Foo 2024 07:08:09 GMT'):
            with self.subTest(modified):
                self.server.respell = lambda name, value: modified if name == 'Last-Modified' else value
                assert_pulls(self, 'ds', force=True)

    def test_cut_download(self):
        skip_pauses(self)
        self.server.ranges = False
        path, cuts = self.share / 'X.tgz', []

        def fault(handler):
            if handler.command == 'GET' and not handler.headers.get('Range') and len(cuts) < 2:
                cuts.append(handler)
                modified = handler.date_time_string(path.stat().st_mtime)
                handler.answer(200, b'x' * UNIT, {'Last-Modified': modified}, path.stat().st_size)
        self.server.fault = fault
        assert_pulls(self, 'ds', force=True)
        self.assertEqual(len(cuts), 2)

    def test_indexes(self):
        """As Apache, nginx and lighttpd write them, and worse."""
        (self.share / 'Y.tgz').write_bytes(b'x')
        here = urllib.parse.quote(self.path)
        for page, names in (
                ('<?xml version="1.0"?><!DOCTYPE html><a href="X.tgz"></a><a href="Y.tgz">', 'XY'),
                ('<tr><td><a href="?C=N;O=D">Name</a><td><a href="X.tgz">X.tgz</a> 9M</tr><A HREF="%s/Y.tgz">Y' % here,
                 'XY'),
                ('<html><body>\r\n<h1>Index of</h1><hr><pre><a href="../">../</a>\r\n<a href="X.tgz">X.tgz</a> '
                 '1-Jan-2024 9\r\n<a href="./Y.tgz">Y</a>', 'XY'),
                ('<a href=X.tgz><a name="Z.tgz"><a href="http://[x"><a href><![x[<a href="%s/Y.tgz">' % self.url, 'XY'),
                ('<a href="X.tgz"><a href="Y%2etgz"><a href="/Y.tgz"><a href="http://else.example/Y.tgz">'
                 '<a href="sub/Y.tgz"><a href="-Y.tgz"><a href="X.tgz?x"><a href="X.tgz">', 'XY'),
                ('<a href="X.tgz"><a href="&#%s;">' % ('1' * 5000), 'X'), ('<p>Welcome!', '')):
            with self.subTest(page[:99]):
                self.server.fault = lambda h: h.path.endswith('/') and h.answer(200, page.encode())
                self.assertEqual(''.join(self.etc('ls -r')[0].split()), names)
        for status in (403, 404):
            with self.subTest(status):
                self.server.fault = lambda h: h.path.endswith('/') and h.answer(status)
                self.fails_with('answers %d; check the url' % status, 'ls -r')
                assert_pulls(self, 'ds', force=True)

    def test_redirects(self):
        other = self.serve_files()
        self.server.fault = lambda h: h.answer(302, headers={'Location': other.url + h.path})
        assert_pulls(self, 'ds', force=True)
        self.assertEqual(self.etc('ls -r')[0], 'X\n')
        for location in (self.url, 'file:///etc/passwd', 'http://[', 'http://[1/x', '//[x]/', 'http://[::::]/'):
            with self.subTest(location):
                self.server.fault = lambda h: h.answer(302, headers={'Location': location})
                for words in ('ls -r', 'pull X'):
                    self.assertRegex(self.etc(words, home='three', status=1)[1],
                                     'answers 302;|does not have the form https://host|'
                                     'cannot reach')  # as Python reads it

    def test_head_that_tells_nothing(self):
        """Where GET with a range works."""
        def refuse(handler):
            return handler.command == 'HEAD' and handler.answer(status)

        def redirect(handler):
            if handler.path.endswith('.tgz'):
                handler.answer(307, headers={'Location': handler.path + '?signed-for=GET'})
            return 'signed-for=GET' in handler.path and refuse(handler)

        def tell_no_length(handler):
            if handler.command == 'HEAD' and 'Z' not in handler.path:
                handler.send_response(200)
                handler.end_headers()
        for status, fault in ((403, refuse), (405, refuse), (400, refuse), (501, refuse), (403, redirect),
                              (200, tell_no_length)):
            with self.subTest(status=status, fault=fault.__name__):
                self.server.fault = fault
                assert_pulls(self, 'ds', force=True)
                self.assertEqual(self.etc('ls -r')[0], 'X\n')
                self.fails_with("no dataset 'Z'", 'pull Z')
        for status, body, span, problem in (
                (403, b'', None, 'answers 403'), (206, b'x', 'bytes 0-0/*', "does not say how large 'X' is"),
                (416, b'out of range', 'bytes */0', 'the archive is damaged or not a .tgz: it ends too early')):
            with self.subTest(problem):
                self.server.fault = lambda handler: handler.path.endswith('.tgz') and (
                    handler.answer(405) if handler.command == 'HEAD' else
                    handler.answer(status, body, {'Content-Range': span}))
                self.fails_with(problem, 'pull X', home='three')

    def test_compressed_against_the_request(self):
        """A page is understood; an archive would have other bytes, perhaps under the same version."""
        def fault(handler):
            if handler.command == 'GET' and handler.path.endswith(suffix):
                modified = handler.date_time_string(path.stat().st_mtime)
                handler.answer(200, body, {'Content-Encoding': 'gzip', 'Last-Modified': modified})
        path, suffix, body = self.share / 'X.tgz', '/', gzip.compress(b'<a href="X.tgz">X</a>')
        self.server.fault = fault
        self.assertEqual(self.etc('ls -r')[0], 'X\n')
        assert_pulls(self, 'ds')
        suffix, body = '.tgz', gzip.compress(path.read_bytes(), 1)
        for self.server.ranges in (True, False):
            with self.subTest(ranges=self.server.ranges):
                self.assertRegex(self.etc('pull X', home='three', status=1)[1],
                                 "'X' in .* is changed on the way|the range that was asked for|more than was asked for")


class Rfc9110(Scaled, S3Case):
    """Answers that are rare, but right by RFC 9110."""

    def setUp(self):
        super().setUp()
        root = write(self.tmp / 'ds', {'data/train/x': noise(9 * UNIT), 'data/test/y': 'y', 'README.md': '# Hi'})
        self.register(root)

    def round_trip(self):
        self.etc('push -f X')
        self.assertEqual(self.etc('ls -r')[0], 'X\n')
        self.assertIn('# Hi', self.etc('info -r X')[0])
        assert_pulls(self, 'ds', force=True)

    def test_interim_answers(self):
        hints = b'HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nContent-Length: 5\r\n\r\n'
        again = b'HTTP/1.1 100 Continue\r\n\r\n'
        for what, interim in (('100', again), ('102', b'HTTP/1.1 102 Processing\r\n\r\n'), ('103', hints),
                              ('several', hints + again + hints * 3)):
            with self.subTest(what):
                self.server.fault = lambda handler: handler.wfile.write(interim) and None
                self.server.connections.clear()
                self.etc('push -f X')
                self.assertLess(len(self.server.connections), 15)  # so connections were used again
                self.round_trip()

    def test_interim_answers_without_end(self):
        skip_pauses(self)

        def flood(handler):
            with contextlib.suppress(OSError):
                for _ in range(10000):
                    handler.wfile.write(b'HTTP/1.1 102 Processing\r\n\r\n')
            handler.close_connection = True
            return True
        self.server.fault = flood
        self.fails_with('interim answers', 'ls -r')

    def test_spelling_of_ranges(self):
        self.etc('push X')
        for what, pattern, text, is_right in (
                ('size not told', '/.*', '/*', True), ('unit', 'b', 'B', True),
                ('both', 'bytes(.*)/.*', r'BYTES\1/*', True),
                ('another unit', 'bytes', 'lines', False), ('another start', 'bytes .', 'bytes 7', False),
                ('another size', '$', '0', False), ('no number', '.*/.*', 'bytes x-y/z', False),
                ('unsatisfied', ' .*/', ' */', False)):
            with self.subTest(what):
                self.server.respell = lambda key, value: (
                    re.sub(pattern, text, value) if key == 'Content-Range' else value)
                if is_right:
                    self.round_trip()
                else:
                    self.assertRegex(self.etc('pull X', home='three', status=1)[1],
                                     'range that was asked for|does not say how large|was replaced meanwhile')

    def test_retry_after(self):
        slept = skip_pauses(self)
        soon = email.utils.formatdate(time.time() + 20, usegmt=True)
        past, before = 'Mon, 06 May 2024 07:08:29 GMT', 'Mon, 06 May 2024 07:08:09 GMT'
        for status, value, date, least, most in (
                (429, '30', None, 30, 32), (503, soon, None, 15, 22), (503, past, None, 0, 2),
                (503, past, before, 20, 22),  # by the clock of the server
                (429, '999999999', None, 60, 62), (429, '-9', None, 0, 2), (429, 'soon', None, 0, 2),
                (429, None, None, 0, 2)):
            with self.subTest(value, status=status, date=date):
                del slept[:]
                pending = [value]
                self.server.respell = lambda key, found: date if date and key == 'Date' else found
                self.server.fault = lambda h: pending and h.answer(status, b'', {'Retry-After': pending.pop()})
                self.etc('ls -r')
                self.assertTrue(least <= sum(slept) <= most, slept)

    def test_pages_that_are_compressed_against_the_request(self):
        class Compressing(S3Handler):
            def answer(self, status, body=b'', headers=(), length=None):
                if body and 'Content-Range' not in dict(headers) and self.command == 'GET':
                    packer = zlib.compressobj(6, zlib.DEFLATED, 15 if coding == 'deflate' else 31)
                    body, headers = packer.compress(body) + packer.flush(), {'Content-Encoding': coding}
                super().answer(status, body, headers, length)
        self.server.RequestHandlerClass = Compressing
        for coding in ('gzip', 'X-GZIP', 'deflate'):
            with self.subTest(coding):
                self.round_trip()
                self.fails_with("no dataset 'Y'", 'pull Y')
                self.fails_with('NoSuchBucket: about NoSuchBucket', 'ls -r', url='s3://other')


def serve(*command, conf=None, **env):
    """Start a peer's server with a free port in place of PORT; its process and URL, when it answers.

    conf: a directory, and a text (with PORT) that is written there to the file CONF.
    """
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    path = ''
    if conf:
        path = os.path.join(conf[0], 'server.conf')
        write(conf[0], {'server.conf': conf[1].replace('PORT', str(port))})
    command = [path if part == 'CONF' else str(part).replace('PORT', str(port)) for part in command]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=dict(os.environ, **env))
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return process, 'http://127.0.0.1:%d' % port
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError('%s does not start' % command[0])


def tool(name):
    beside = os.path.join(os.path.dirname(sys.executable), name)
    return beside if os.path.exists(beside) else shutil.which(name)


class Peer:
    """Stops what setUpClass() has started: `process`, with files below `root`."""
    root = None

    @classmethod
    def tearDownClass(cls):
        cls.process.kill()
        cls.process.wait()
        if cls.root:
            shutil.rmtree(cls.root)


@needs(all(map(tool, ('nginx', 'tinyproxy', 'openssl'))), 'nginx, tinyproxy and openssl are not installed')
class Nginx(Peer, WebSuite, Case):
    """nginx over TLS, with a certificate of a private CA (without the newer extensions), behind a proxy (tinyproxy)."""

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix='etc-nginx-')

        def openssl(*args):
            subprocess.check_output(('openssl',) + args, stderr=subprocess.STDOUT, cwd=cls.root)
        new = ['-newkey', 'rsa:2048', '-nodes', '-days', '9']
        openssl('req', '-x509', '-subj', '/CN=A private CA', '-keyout', 'ca.key', '-out', 'ca.pem', *new)
        openssl('req', '-subj', '/CN=data', '-keyout', 'key.pem', '-out', 'request.pem', *new[:3])
        write(cls.root, {'names': 'subjectAltName = DNS:localhost, IP:127.0.0.1'})
        openssl('x509', '-req', '-in', 'request.pem', '-CA', 'ca.pem', '-CAkey', 'ca.key', '-CAcreateserial',
                '-days', '9', '-extfile', 'names', '-out', 'cert.pem')
        cls.log = os.path.join(cls.root, 'proxy.log')
        cls.process, cls.proxy_url = serve(tool('tinyproxy'), '-d', '-c', 'CONF', conf=(
            cls.root, 'Port PORT\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout 60\nMaxClients 50\nLogLevel Connect\n'
                      'LogFile "%s"\n' % cls.log))

    def start(self):
        process, url = serve(tool('nginx'), '-c', 'CONF', conf=(str(self.tmp), '''
            daemon off; master_process off; pid %(tmp)s/pid; error_log %(tmp)s/errors; events {}
            http {
                access_log off; client_body_temp_path %(tmp)s; proxy_temp_path %(tmp)s; fastcgi_temp_path %(tmp)s;
                uwsgi_temp_path %(tmp)s; scgi_temp_path %(tmp)s;
                server {
                    listen 127.0.0.1:PORT ssl; ssl_certificate %(root)s/cert.pem; ssl_certificate_key %(root)s/key.pem;
                    root %(tmp)s/www; autoindex on; location /away/ { return 302 http://127.0.0.1:1/; }
                }
            }''' % {'tmp': self.tmp, 'root': self.root}))
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.origin = 'localhost' + url[url.rindex(':'):]
        self.url = 'https://' + self.origin + self.path
        self.settings['ca_bundle'] = os.path.join(self.root, 'ca.pem')
        os.environ.update(HTTPS_PROXY=self.proxy_url, no_proxy='')

    def test_proxy_and_ca(self):
        self.assertEqual(self.etc('ls -r')[0], 'X\n')
        self.assertIn('CONNECT ' + self.origin, Path(self.log).read_text())
        self.fails_with('without encryption', 'ls -r', url='https://%s/away' % self.origin)
        skip_pauses(self)
        bundle = self.settings.pop('ca_bundle')
        self.assertRegex(self.etc('pull X', home='two', status=1)[1],
                         "CERTIFICATE_VERIFY_FAILED.*; check .* ca_bundle")
        self.settings['ca_bundle'] = bundle
        with socket.socket() as closed:
            closed.bind(('127.0.0.1', 0))
            os.environ['HTTPS_PROXY'] = 'http://127.0.0.1:%d' % closed.getsockname()[1]
            self.fails_with('check the network, the URL, the proxy settings', 'pull X', home='two')
        self.assertEqual(self.installed('two'), [])


class BucketPeer(Peer, RemoteSuite):
    """Subclasses put() and get() objects with another client."""

    def setUp(self):
        super().setUp()
        self.prefix = os.urandom(4).hex()

    def test_another_client_reads_what_we_push(self):
        self.share(self.large(20 * MIB))
        with tarfile.open(fileobj=io.BytesIO(self.get('X.tgz'))) as tar:
            self.assertEqual(tar.extractfile('data/train/x').read(), noise(20 * MIB))


class S3Peer(BucketPeer):
    """Read and written with boto3, too."""
    atomic = False
    akid, secret = AKID, SECRET

    def setUp(self):
        super().setUp()
        self.url = 's3://bucket/' + self.prefix
        self.settings = {'endpoint_url': self.endpoint, 'aws_access_key_id': self.akid,
                         'aws_secret_access_key': self.secret}

    def client(self):
        import boto3
        import botocore.config
        return boto3.client('s3', endpoint_url=self.endpoint, aws_access_key_id=self.akid, region_name='us-east-1',
                            aws_secret_access_key=self.secret, config=botocore.config.Config(
                                s3={'addressing_style': 'path'}, request_checksum_calculation='when_required'))

    def put(self, name, data):
        self.client().put_object(Bucket='bucket', Key=self.prefix + '/' + name, Body=data)

    def get(self, name):
        return self.client().get_object(Bucket='bucket', Key=self.prefix + '/' + name)['Body'].read()


@needs(tool('rclone') and importable('boto3'), 'rclone and boto3 are not installed')
class Rclone(S3Peer, Case):
    """rclone serve s3: checks signatures, ignores conditions (so we look ourselves), answers 200 to ranges."""

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix='etc-rclone-')
        os.mkdir(os.path.join(cls.root, 'bucket'))
        cls.process, cls.endpoint = serve(tool('rclone'), 'serve', 's3', '--addr', '127.0.0.1:PORT', '--auth-key',
                                          AKID + ',' + SECRET, '--config', os.devnull, cls.root)

    def test_wrong_secret(self):
        self.settings['aws_secret_access_key'] = 'wrong'
        self.fails_with('SignatureDoesNotMatch', 'ls -r')


@needs(importable('moto', 'flask', 'boto3'), 'moto[server] and boto3 are not installed')
class Moto(S3Peer, Case):
    """moto_server: knows conditions, checks no signature."""
    copies = True

    @classmethod
    def setUpClass(cls):
        cls.process, cls.endpoint = serve(tool('moto_server'), '-H', '127.0.0.1', '-p', 'PORT')

    def setUp(self):
        super().setUp()
        self.client().create_bucket(Bucket='bucket')

    def test_purge_from_a_bucket_with_versions(self):
        self.url, client = 's3://versions', self.client()
        client.create_bucket(Bucket='versions')
        client.put_bucket_versioning(Bucket='versions', VersioningConfiguration={'Status': 'Enabled'})
        self.share(small(self.tmp / 'ds'))
        self.assertEqual(self.etc('purge -r -f X')[1],
                         "etc: purged 'X' from s3://versions\n")
        self.assertEqual(etc.ls(True, self.config()), [])
        self.assertEqual(len(client.list_object_versions(Bucket='versions')['Versions']), 1)


SWIFT = r'''
"""OpenStack Swift with its S3 interface, in one process: PORT DIRECTORY ACCOUNT:USER SECRET"""
import eventlet
eventlet.monkey_patch()
import os, sys
port, root, user, secret = sys.argv[1:]
os.makedirs(root + '/devices/d')


def conf(name, text):
    with open('%s/%s.conf' % (root, name), 'w') as file:
        file.write(text)


conf('swift', '[swift-hash]\nswift_hash_path_suffix = x\n[storage-policy:0]\nname = only\ndefault = yes\n')
import swift.common.utils
swift.common.utils.SWIFT_CONF_FILE = root + '/swift.conf'
import swift.common.storage_policy
swift.common.storage_policy.reload_storage_policies()
from eventlet import wsgi
from swift.common.ring import RingBuilder
from swift.common.wsgi import loadapp

servers = {}
for kind in ('account', 'container', 'object'):
    servers[kind] = eventlet.listen(('127.0.0.1', 0))
    builder = RingBuilder(1, 1, 0)
    builder.add_dev({'id': 0, 'region': 1, 'zone': 1, 'weight': 1, 'ip': '127.0.0.1', 'device': 'd',
                     'port': servers[kind].getsockname()[1]})
    builder.rebalance()
    builder.get_ring().save('%s/%s.ring.gz' % (root, kind))
    conf(kind, '[DEFAULT]\nswift_dir = %s\ndevices = %s/devices\nmount_check = false\n'
         '[app:main]\nuse = egg:swift#%s\n' % (root, root, 'mem_object' if kind == 'object' else kind))
filters = ['catch_errors', 'gatekeeper', 'listing_formats', 'bulk', 's3api', 'tempauth', 'slo', 'dlo']
conf('proxy', '[DEFAULT]\nswift_dir = %s\n[pipeline:main]\npipeline = %s proxy-server\n'
     '[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n' % (root, ' '.join(filters))
     + ''.join('[filter:%s]\nuse = egg:swift#%s\n%s' % (
         name, name, 'user_%s = %s .admin\n' % (user.replace(':', '_'), secret) * (name == 'tempauth'))
         for name in filters))


class Cache:  # instead of memcached
    kept = {}

    def get(self, key, *args, **kwargs):
        return self.kept.get(key)

    def set(self, key, value, *args, **kwargs):
        self.kept[key] = value

    def delete(self, key, *args, **kwargs):
        self.kept.pop(key, None)


def cached(env, start_response, app=loadapp(root + '/proxy.conf')):
    env['swift.cache'] = Cache()
    return app(env, start_response)


for kind in servers:
    eventlet.spawn(wsgi.server, servers[kind], loadapp('%s/%s.conf' % (root, kind)), open(os.devnull, 'w'))
wsgi.server(eventlet.listen(('127.0.0.1', int(port))), cached, open(os.devnull, 'w'))
'''


def debian(module):
    """Whether the system's own Python has a module."""
    return os.path.exists('/usr/bin/python3') and not subprocess.call(
        ['/usr/bin/python3', '-c', 'import ' + module], stderr=subprocess.DEVNULL)


@needs(importable('boto3') and debian('swift'), 'python3-swift (Debian) and boto3 are not installed')
class Swift(S3Peer, Case):
    """OpenStack Swift's S3 interface: checks signatures; it knows no conditions of writes, but says so."""
    akid = 'test:tester'
    copies = True
    test_wrong_secret = Rclone.test_wrong_secret

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix='etc-swift-')
        script = write(cls.root, {'server.py': SWIFT}) / 'server.py'
        cls.process, cls.endpoint = serve('/usr/bin/python3', script, 'PORT', os.path.join(cls.root, 'swift'), cls.akid,
                                          SECRET)

    def setUp(self):
        super().setUp()
        if not self.client().list_buckets()['Buckets']:
            self.client().create_bucket(Bucket='bucket')


@needs(importable('boto3') and tool('s3rver'), 's3rver (npm) and boto3 are not installed')
class S3rver(S3Peer, Case):
    """A sloppy one: it checks no signature, knows no conditions, and misreads ranges that name only the last bytes."""
    akid = secret = 'S3RVER'

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix='etc-s3rver-')
        cls.process, cls.endpoint = serve(tool('s3rver'), '-d', cls.root, '-a', '127.0.0.1', '-p', 'PORT',
                                          '--configure-bucket', 'bucket')


@needs(importable('gcp_storage_emulator', 'google.cloud.storage'),
       'gcp-storage-emulator, google-cloud-storage are not installed')
class GcpEmulator(BucketPeer, Case):
    """gcp-storage-emulator, which knows no conditions, nor says which generation it sends; and Google's own client."""
    conditions = bound = False

    @classmethod
    def setUpClass(cls):
        cls.process, cls.endpoint = serve(tool('gcp-storage-emulator'), 'start', '--host', '127.0.0.1', '--port',
                                          'PORT', '--in-memory', '--default-bucket', 'bucket')

    def setUp(self):
        super().setUp()
        self.url = 'gs://bucket/' + self.prefix
        os.environ['STORAGE_EMULATOR_HOST'] = self.endpoint

    def blob(self, name):
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage
        return storage.Client(project='p', credentials=AnonymousCredentials()).bucket('bucket').blob(
            self.prefix + '/' + name)

    def put(self, name, data):
        self.blob(name).upload_from_string(data)

    def get(self, name):
        return self.blob(name).download_as_bytes(raw_download=True)


def misbehave(handler, how):
    """Answer with a status, a page, or not at all."""
    if how == 'silence':
        handler.rfile.read(1)
    elif how == 'reset':
        handler.connection.shutdown(socket.SHUT_RDWR)
    elif how == 'a page':
        handler.answer(200, b'<html>\n</html>')
    else:
        handler.answer(how)
    return True


def signed_by(headers):
    """The access key that a request is signed with, or ''."""
    return headers.get('Authorization', '').partition('Credential=')[2].partition('/')[0]


class AwsHandler(SignedHandler):
    """STS, SSO's portal, a container's credentials service, and instance metadata of version 2.

    Every access key has the secret 'secret-of-KEY', and if it is temporary the token 'token/of+KEY'.
    """
    service = 'sts'
    error_xml = '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Code>%s</Code>' \
                '<Message>%s</Message></Error></ErrorResponse>'

    def temporary(self, akid, token='SessionToken'):
        return temporary(akid + self.server.suffix, self.server.lifetime, token)

    def handle_one(self):
        body = self.read_body()
        path, headers = self.path.partition('?')[0], self.headers
        self.server.log.append((self.command, path, headers))
        if self.misbehaves():
            return
        parent, _, role = path.rpartition('/')
        if path == '/':
            self.sts(body, dict(urllib.parse.parse_qsl(body.decode())))
        elif path == '/federation/credentials' and headers['x-amz-sso_bearer_token'] == 'sso-token':
            self.json({'roleCredentials': {'accessKeyId': 'SSO', 'secretAccessKey': 'secret-of-SSO',
                                           'sessionToken': 'token/of+SSO', 'expiration': 4e12}})
        elif path == '/container':
            refused = headers['Authorization'] != self.server.authorization and {'message': 'wrong authorization'}
            self.json(refused or self.temporary('CONTAINER', 'Token'), 401 if refused else 200)
        elif path == '/latest/api/token' and self.command == 'PUT' and headers['x-aws-ec2-metadata-token-ttl-seconds']:
            self.answer(200, b'imds-token')
        elif headers['X-aws-ec2-metadata-token'] != 'imds-token':
            self.answer(401)
        elif parent != '/latest/meta-data/iam/security-credentials':
            self.answer(404)
        elif role:
            self.json(dict(self.temporary('INSTANCE-' + role, 'Token'), Code='Success'))
        else:
            self.answer(200, b'my-role')

    def sts(self, body, form):
        action, role = form['Action'], form.get('RoleArn', '').rpartition('/')[2]
        if not role:
            return self.error(400, 'ValidationError')
        if action == 'AssumeRoleWithWebIdentity':
            akid = 'WEB-' + role
            problem = form['WebIdentityToken'] != 'web-token' and 'InvalidIdentityToken'
        else:
            akid = '%s-by-%s' % (role, signed_by(self.headers))
            problem = self.unsigned(body)
            wishes = form.get('ExternalId'), form.get('DurationSeconds'), form['RoleSessionName']
            if role == 'forbidden' or role == 'picky' and wishes != ('x y&z', '900', 'me'):
                problem = 'AccessDenied'
        if problem:
            return self.error(403, problem)
        xml = ''.join('<%s>%s</%s>' % (key, value, key) for key, value in self.temporary(akid).items())
        self.answer(200, ('<{0}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{0}Result><AssumedRoleUser>'
                          '<Arn>a</Arn></AssumedRoleUser><Credentials>{1}</Credentials></{0}Result></{0}Response>'
                          ).format(action, xml).encode())


def temporary(akid, lifetime=3600, token='SessionToken', form='%Y-%m-%dT%H:%M:%SZ', offset=0):
    """Keys as AWS's services give them, with the time of a clock that is so many seconds ahead of UTC."""
    expires = time.strftime(form, time.gmtime(time.time() + lifetime + offset))
    return {'AccessKeyId': akid, 'SecretAccessKey': 'secret-of-' + akid, token: 'token/of+' + akid,
            'Expiration': expires}


def static(akid):
    """Keys as AWS's files hold them."""
    return 'aws_access_key_id = %s\naws_secret_access_key = secret-of-%s\n' % (akid, akid)


class AnySecret(dict):
    def __missing__(self, akid):
        return 'secret-of-' + akid

    def __contains__(self, akid):
        return True


ROLE = 'role_arn = arn:aws:iam::123456789012:role/'
INSTANCE = 'INSTANCE-my-role'
BASE = '[base]\n' + static('STATIC-B')
DEV = '[default]\nsource_profile = base\n' + ROLE + 'dev\n'


class AwsCase(S3Case):
    def setUp(self):
        super().setUp()
        self.aws = Server(AwsHandler, self)
        self.settings = {'endpoint_url': self.server.url}
        self.server.secrets = self.aws.secrets = AnySecret()
        self.aws.lifetime, self.aws.authorization, self.aws.suffix = 3600, None, ''
        os.environ.update(AWS_ENDPOINT_URL=self.aws.url, AWS_EC2_METADATA_SERVICE_ENDPOINT=self.aws.url,
                          AWS_DEFAULT_REGION='us-east-1')
        del os.environ['AWS_EC2_METADATA_DISABLED']
        self.container = {'AWS_CONTAINER_CREDENTIALS_FULL_URI': self.aws.url + '/container'}

    def profile(self, config, credentials=''):
        write(self.tmp / '.aws', {'config': config, 'credentials': credentials})

    def process(self, akid, **more):
        """A credential_process that gives these keys."""
        answer = write(self.tmp, {'answer': json.dumps(dict(temporary(akid, **more), Version=1))}) / 'answer'
        return 'credential_process = "%s" -S -c "print(open(%r).read())"\n' % (sys.executable, str(answer))

    def token(self, text):
        return str(write(self.tmp, {'token': text}) / 'token')

    def web_identity(self, text='web-token'):
        return {'AWS_WEB_IDENTITY_TOKEN_FILE': self.token(text), 'AWS_ROLE_ARN': 'arn:aws:iam::1:role/pod'}

    def expect(self, akid, config='', credentials='', profile=None, **env):
        """The files, the setting aws_profile and the environment lead to this access key."""
        from unittest import mock
        self.settings['aws_profile'] = profile
        self.profile(config, credentials)
        with self.subTest(akid, config=config, credentials=credentials, profile=profile, env=env):
            with mock.patch.dict(os.environ, env):
                self.assertEqual(self.found(), akid)

    def found(self):
        """The access key that a listing is signed with; its signature and token are right."""
        self.server.log.clear()
        self.assertEqual(self.etc('ls -r')[0], '')
        headers = self.server.log[-1][2]
        akid = signed_by(headers)
        if not akid.startswith('STATIC'):
            self.assertEqual(headers['x-amz-security-token'], 'token/of+' + akid)
        return akid

    def refused(self, problem, config='', **env):
        """With these settings there are no credentials, for this reason."""
        from unittest import mock
        self.profile(config)
        with self.subTest(config=config, env=env), mock.patch.dict(os.environ, env):
            err = self.etc('ls -r', status=1)[1]
            self.assertIn(problem, err)
            self.assertNotRegex(err.replace('aws_secret_access_key', ''), 'secret|token/of|web-token')

    def signers(self):
        return [signed_by(headers) for _, _, headers in self.server.log]

    def pages(self, *steps, status=0):
        """Who signs the requests of a listing, if these things happen on the server when it gets each but the last."""
        self.server.page = 1
        self.server.objects = {'some/prefix/%d.tgz' % number: (b'', '"e"', {}) for number in range(len(steps) + 1)}
        left = list(steps)
        self.server.fault = lambda handler: left and left.pop(0)()
        self.server.log.clear()
        self.etc('ls -r', status=status)
        return self.signers()

    def shift(self, seconds):
        """Let time pass."""
        now = stand_in(self, time, 'time', lambda: now() + seconds)

    def rotate(self, seconds):
        """Let time pass, after which the services give out other keys."""
        self.shift(seconds)
        self.aws.suffix += '2'


class AwsCredentials(AwsCase):
    """Where AWS's tools find credentials, and in which order."""

    ENVIRONMENT = {'AWS_ACCESS_KEY_ID': 'STATIC-E', 'AWS_SECRET_ACCESS_KEY': 'secret-of-STATIC-E'}

    def test_static(self):
        config = ('[default]\n' + static('STATIC-D') + '[profile work]\n' + static('STATIC-W') + '[profile "a b"]\n'
                  + static('STATIC-Q') + '[profile both]\nregion = eu-west-1\n' + static('STATIC-C'))
        credentials = '[both]\n' + static('STATIC-B') + 'credential_process = false\n'
        for akid, profile, variables in (
                ('STATIC-D', None, ''),
                ('STATIC-W', None, 'AWS_PROFILE=work'),
                ('STATIC-W', None, 'AWS_DEFAULT_PROFILE=work'),
                ('STATIC-Q', None, 'AWS_PROFILE=a b'),
                ('STATIC-B', None, 'AWS_PROFILE=both'),
                ('STATIC-W', 'work', 'AWS_PROFILE=both')):
            self.expect(akid, config, credentials, profile, **dict(re.findall('(.+)=(.+)', variables)))
        self.expect('STATIC-E', config, AWS_PROFILE='work', **self.ENVIRONMENT)
        self.expect('STATIC-W', config, profile='work', **self.ENVIRONMENT)
        self.expect('TEMP', config, AWS_ACCESS_KEY_ID='TEMP', AWS_SECRET_ACCESS_KEY='secret-of-TEMP',
                    AWS_SESSION_TOKEN='token/of+TEMP')

    def test_variables_in_the_paths_of_files(self):
        write(self.tmp / 'place', {'config': '[profile p]\nsource_profile = base\n' + ROLE + 'dev', 'mine.ini': BASE})
        os.environ.update(PLACE=str(self.tmp / 'place'), NAME='mine', AWS_PROFILE='p')
        for config, credentials in (('$PLACE/config', '~/place/$NAME.ini'),
                                    ('$HOME/place/config', '${PLACE}/mine.ini')):
            self.expect('dev-by-STATIC-B', AWS_CONFIG_FILE=config, AWS_SHARED_CREDENTIALS_FILE=credentials)

    def test_roles(self):
        chain = ('[profile top]\nsource_profile = mid\n' + ROLE + 'top\n'
                 '[profile mid]\nsource_profile = base\n' + ROLE + 'mid\n')
        picky = DEV.replace('dev', 'picky') + 'external_id = x y&z\nduration_seconds = 900\nrole_session_name = me\n'
        source = '[default]\n' + ROLE + 'dev\ncredential_source = '
        self.expect('dev-by-STATIC-B', DEV, BASE)
        self.expect('dev-by-STATIC-B', DEV, BASE + '[default]\n' + static('STATIC'), **self.web_identity())
        self.expect('top-by-mid-by-STATIC-B', chain, BASE, AWS_PROFILE='top')
        self.expect('top-by-STATIC-S', chain + static('STATIC-S'), BASE, AWS_PROFILE='top')
        self.expect('dev-by-STATIC-S', DEV.replace('base', 'default') + static('STATIC-S'))
        self.expect('picky-by-STATIC-B', picky, BASE)
        self.expect('dev-by-PROCESS', DEV + '[profile base]\n' + self.process('PROCESS'))
        self.expect('dev-by-' + INSTANCE, source + 'Ec2InstanceMetadata')
        self.expect('dev-by-CONTAINER', source + 'EcsContainer', **self.container)
        self.expect('dev-by-STATIC-E', source + 'Environment', profile='default', **self.ENVIRONMENT)

    def test_web_identity(self):
        env = self.web_identity()
        profile = '[default]\nweb_identity_token_file = %s\n' % env['AWS_WEB_IDENTITY_TOKEN_FILE'] + ROLE + 'prof\n'
        self.expect('WEB-pod', **env)
        self.expect('WEB-prof', profile)
        self.expect('WEB-pod', profile, '[default]\n' + static('STATIC'), **env)
        self.expect('STATIC-W', '[profile work]\n' + static('STATIC-W'), profile='work', **env)

    def test_process(self):
        profile = '[default]\n' + self.process('PROCESS')
        self.expect('PROCESS', profile + static('STATIC'))
        self.expect('STATIC', profile, '[default]\n' + static('STATIC'))

    def test_container(self):
        token = 'AWS_CONTAINER_AUTHORIZATION_TOKEN'
        os.environ.update(self.container)
        self.expect('CONTAINER')
        self.expect('STATIC', '', '[default]\n' + static('STATIC'))
        self.expect('CONTAINER', '[profile empty]\n', AWS_PROFILE='empty')
        self.aws.authorization = 'Basic secret'
        self.expect('CONTAINER', **{token: 'Basic secret'})
        self.expect('CONTAINER', **{token: 'wrong', token + '_FILE': self.token('Basic secret')})

    def test_instance(self):
        self.expect(INSTANCE)
        self.expect(INSTANCE, '[profile x]\nregion = us-east-1\n', profile='x')
        del os.environ['AWS_EC2_METADATA_SERVICE_ENDPOINT']
        self.expect(INSTANCE, '[default]\nec2_metadata_service_endpoint = ' + self.aws.url)


class Reached(Exception):
    """A connection would be made to this host."""


@needs(importable('botocore'), 'botocore is not installed')
class AwsCredentialsOracle(AwsCredentials):
    """The same, and each time botocore finds the same keys as we do."""

    def found(self):
        import botocore.session
        akid = super().found()
        session = botocore.session.Session(profile=self.settings['aws_profile'])
        keys = session.get_credentials().get_frozen_credentials()
        self.assertEqual((keys.access_key, keys.secret_key), (akid, 'secret-of-' + akid))
        return akid

    def test_hosts(self):
        """Of every region and partition that botocore knows."""
        import ssl

        import botocore.endpoint_provider
        import botocore.exceptions
        import botocore.session

        def connect(address, *args, **kwargs):
            raise Reached(address[0])
        stand_in(self, socket, 'create_connection', connect)
        stand_in(self, ssl.SSLContext, 'load_default_certs', lambda context, *args: None)  # which takes long
        del os.environ['AWS_ENDPOINT_URL']
        session = botocore.session.Session()
        loader = session.get_component('data_loader')
        regions = [region for partition in session.get_available_partitions()
                   for region in session.get_available_regions('s3', partition)]
        self.assertGreater(len(regions), 30)
        for service, bucket in (('s3', 'bucket'), ('s3', 'my.bucket'), ('s3', 'Upper_1'), ('sts', 'bucket')):
            rules = botocore.endpoint_provider.EndpointProvider(
                loader.load_service_model(service, 'endpoint-rule-set-1'), loader.load_data('partitions'))
            self.profile(DEV if service == 'sts' else '[default]\n' + static('STATIC'), BASE)
            for region, fips in itertools.product(regions, (False, True)):
                if service == 'sts' and 'global' in region:
                    continue
                os.environ.update(AWS_USE_FIPS_ENDPOINT=str(fips))
                place = {'Region': region, 'Bucket': bucket, 'UseFIPS': fips}
                with self.subTest(service, **place), contextlib.suppress(botocore.exceptions.EndpointProviderError):
                    theirs = rules.resolve_endpoint(**place).url
                    with self.assertRaises(Reached) as caught:
                        etc.ls(True, etc.Config('s3://' + bucket, region=region))
                    self.assertEqual(caught.exception.args[0], urllib.parse.urlsplit(theirs).netloc)


class AwsLife(AwsCase):
    """How long credentials live, who may see them, and what is said when there are none."""

    def test_renewed_before_they_expire(self):
        """However the time is written."""
        for end, offset in (('Z', 0), ('.123456Z', 0), ('+02:00', 7200), ('.5-0530', -19800), ('UTC', 0), ('', 0)):
            def give(akid):
                return self.process(akid, form='%Y-%m-%dT%H:%M:%S' + end, offset=offset)
            with self.subTest(end):
                self.profile('[default]\n' + give('OLD'))
                signers = self.pages(lambda: (self.shift(3400), give('NEW'))[0], lambda: self.shift(100))
                self.assertEqual(signers, ['OLD', 'OLD', 'NEW'])

    def test_threads_ask_once(self):
        self.share(small(self.tmp / 'ds'))
        self.server.objects.update({'some/prefix/%d.tgz' % number: data for number in range(8)
                                    for data in self.server.objects.values()})
        self.server.fault = lambda handler: 'list-type' in handler.path and self.rotate(3500)
        self.server.log.clear()
        self.aws.log.clear()
        self.etc('ls -r -l')
        self.assertEqual((self.signers(), len(self.aws.log)), ([INSTANCE] + [INSTANCE + '2'] * 9, 6))

    def test_keys_that_are_given_out_shortly_before_they_expire(self):
        self.aws.lifetime = 60
        self.pages(lambda: None)
        self.assertEqual(len(self.aws.log), 3)

    def test_renewed_once_when_refused(self):
        def refuse(handler):
            self.aws.suffix = '2'
            return signed_by(handler.headers) in refused and handler.error(400, 'ExpiredToken')
        self.server.fault, refused = refuse, [INSTANCE]
        self.assertEqual((self.found(), len(self.aws.log)), (INSTANCE + '2', 6))
        refused.append(INSTANCE + '2')
        self.server.log.clear()
        self.refused("the credentials, which come from the instance's role 'my-role'")
        self.assertLess(len(self.server.log), 8)

    def test_keys_that_are_changed_in_their_file(self):
        def fault(handler):
            self.profile('', '[default]\n' + static('STATIC-NEW'))
            return signed_by(handler.headers) == 'STATIC-OLD' and handler.error(400, 'ExpiredToken')
        self.server.fault = fault
        self.expect('STATIC-NEW', '', '[default]\n' + static('STATIC-OLD'))

    def test_byte_order_marks(self):
        bom = '\ufeff'
        process, answer = self.process('PROCESS'), self.tmp / 'answer'
        answer.write_text(bom + answer.read_text(), encoding='utf-8')
        self.expect('STATIC', '', bom + '[default]\n' + static('STATIC'))
        self.expect('PROCESS', bom + '[default]\n' + process, PYTHONUTF8='1')
        self.expect('WEB-pod', **self.web_identity(bom + 'web-token\n'))
        self.aws.authorization = 'right'
        self.expect('CONTAINER', AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=self.token(bom + 'right'), **self.container)

    def test_no_metadata(self):
        none = 'no credentials were found'
        for how in (403, 404, 405, 'a page', 'silence', 'reset'):
            with self.subTest(how):
                self.aws.log.clear()
                self.aws.fault = lambda handler: misbehave(handler, how)
                self.refused(none)
                self.assertEqual([method for method, _, _ in self.aws.log], ['PUT'], 'never version 1')
        self.aws.fault = lambda handler: handler.path.endswith('my-role') and handler.json({'Code': 'Failed'})
        self.refused(none)
        self.aws.log.clear()
        self.refused(none, AWS_EC2_METADATA_DISABLED='TRUE')
        self.assertEqual(self.aws.log, [])

    def test_metadata_is_not_asked_through_a_proxy(self):
        os.environ.update(http_proxy='http://127.0.0.1:1', no_proxy=self.server.url[7:])
        self.expect(INSTANCE)
        self.expect('CONTAINER', **self.container)

    def test_containers_that_are_not_trusted(self):
        for url in ('http://example.com/x http://169.254.170.3/ http://10.0.0.1/ ftp://localhost/ nonsense '
                    'http://[::2]/ http://[x http://localhost.example.com http://127.0.0.1@example.com/').split():
            self.refused('must begin with https://, or with http:// and a loopback address',
                         AWS_CONTAINER_CREDENTIALS_FULL_URI=url)
        for path in ('@example.com/', '.example.com/'):
            self.refused('RELATIVE_URI must be a path that begins with /', AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=path)

    def test_containers_that_refuse(self):
        variable = 'AWS_CONTAINER_AUTHORIZATION_TOKEN'
        os.environ.update(self.container)
        self.aws.authorization = 'right'
        self.refused("container's credentials service answers 401: wrong authorization")
        self.refused('cannot read the file with a token that $%s_FILE names: No such file' % variable,
                     **{variable + '_FILE': '/nowhere'})
        self.refused('contains invalid characters; check the credentials',
                     **{variable + '_FILE': self.token('secret\r\nX: y')})
        self.aws.fault = lambda handler: handler.json({'AccessKeyId': 'x', 'SecretAccessKey': 'secret\nX: y'})
        self.refused("the container's credentials service: aws_secret_access_key is missing, or holds characters")

    def test_roles_that_cannot_be(self):
        role = '[default]\n' + ROLE + 'forbidden\n'
        base = '\n[profile base]\n' + static('STATIC')
        needs = "the AWS profile '%s' needs, besides role_arn, either a source_profile that has credentials and " \
                'does not'
        self.refused("the AWS profile 'default': AWS STS answers 403 AccessDenied: about AccessDenied; check the "
                     'role_arn', role + 'source_profile = base' + base)
        self.refused(needs % 'default', role)
        self.refused(needs % 'default', role + 'credential_source = Moon')
        self.refused(needs % 'default', role + 'source_profile = default')
        self.refused(needs % 'default', role + 'source_profile = base\ncredential_source = Environment' + base)
        self.refused(needs % 'a', role + 'source_profile = a\n[profile a]\nsource_profile = default\n' + ROLE + 'x')
        self.refused(needs % 'default', role + 'source_profile = nope')
        self.refused(needs % 'default', role + 'source_profile = a\n[profile a]\n')

    def test_roles_by_a_wrong_clock(self):
        now = time.time

        def fault(handler):
            stamp = calendar.timegm(time.strptime(handler.headers['x-amz-date'], '%Y%m%dT%H%M%SZ'))
            return abs(stamp - now()) > 300 and handler.error(403, 'SignatureDoesNotMatch')
        self.server.fault = self.aws.fault = fault
        stand_in(self, Handler, 'date_time_string', lambda handler: email.utils.formatdate(now(), usegmt=True))
        self.shift(5 * 3600)
        self.expect('dev-by-STATIC-B', DEV, BASE)
        self.assertEqual((len(self.aws.log), len(self.server.log)), (2, 1))

    def test_web_identities_that_cannot_be(self):
        self.refused('web identity: AWS STS answers 403 InvalidIdentityToken', **self.web_identity('another'))
        self.refused('cannot read the file with a token that web_identity_token_file or $AWS_WEB_IDENTITY_TOKEN_FILE',
                     AWS_ROLE_ARN='arn:aws:iam::1:role/pod', AWS_WEB_IDENTITY_TOKEN_FILE='/nowhere')
        self.refused('web identity: AWS STS answers 400 ValidationError: about ValidationError; check the role_arn or '
                     '$AWS_ROLE_ARN', AWS_WEB_IDENTITY_TOKEN_FILE=self.token('web-token'))

    def test_processes_that_fail(self):
        python = '"%s" -S -c ' % sys.executable
        for command, problem in (
                (python + "'import sys; sys.exit(chr(27) + str(12))'", ' fails (1): \\x1b12'),
                (python + "'print(5)'", ': aws_access_key_id is missing'),
                (python + "'print(chr(123) + chr(125))'", ': aws_access_key_id is missing'),
                (python + "'", ' cannot be run: No closing quotation'),
                ('/nowhere/at/all', ' cannot be run: No such file')):
            self.refused("the credential_process of the AWS profile 'default'" + problem,
                         '[default]\ncredential_process = ' + command)

    def test_regions_are_no_hosts(self):
        del self.settings['endpoint_url'], os.environ['AWS_ENDPOINT_URL']
        for region in ('evil.example/', 'x@evil', 'a#b'):
            self.refused("the region is not valid; check 'region', $AWS_REGION", AWS_REGION=region)

    def test_endpoints(self):
        other = self.server.url
        del self.settings['endpoint_url']
        services = ('[default]\nservices = s\n[services s]\nsts =\n  endpoint_url = http://127.0.0.1:1\n'
                    's3 =\n  addressing_style = path\n  endpoint_url = ' + other)
        for config, variable, general in (('', other, self.aws.url), ('', '', other), (services, '', ''),
                                          ('[default]\nendpoint_url = ' + other, '', '')):
            self.expect('STATIC', config, '[default]\n' + static('STATIC'),
                        AWS_ENDPOINT_URL_S3=variable, AWS_ENDPOINT_URL=general)


class AwsRenewal(AwsCase):
    """A service that fails takes nothing away that still works."""

    def setUp(self):
        super().setUp()
        stand_in(self, random, 'uniform', lambda low, high: 0)  # no pauses
        stand_in(self, etc, '_TIMEOUT', 0.3)

    def begin_to_fail(self, how):
        """Let the keys expire in 100 seconds, and the service fail from now on."""
        self.shift(3500)
        self.aws.fault = lambda handler: misbehave(handler, how)

    def mend(self):
        self.rotate(60)
        self.aws.fault = None

    def test_failed_renewals(self):
        for how in (503, 429, 404, 'silence', 'reset'):
            with self.subTest(how):
                self.aws.suffix, self.aws.fault = '', None
                signers = self.pages(lambda: self.begin_to_fail(how), lambda: None, self.mend, lambda: None)
                self.assertEqual((signers[:3], signers[-1]), ([INSTANCE] * 3, INSTANCE + '2'))
            with self.subTest(how, until='they expire'):
                self.aws.fault = None
                signers = self.pages(lambda: self.begin_to_fail(how), lambda: self.shift(200), status=1)
                self.assertEqual(set(signers), {INSTANCE + self.aws.suffix}, 'nobody becomes anonymous')

    def test_an_upload_is_aborted_with_old_keys(self):
        def fault(handler):
            if handler.command == 'POST':
                self.begin_to_fail(503)
            return 'partNumber=2' in handler.path and handler.error(403, 'AccessDenied')
        self.server.fault = fault
        self.register(self.large(12 * MIB))
        self.fails_with('AccessDenied', 'push X')
        self.assertEqual((self.server.uploads, set(self.signers())), ({}, {INSTANCE}))

    def test_what_is_transient(self):
        for code in ('Throttling', 'RequestLimitExceeded', 'IDPCommunicationError'):
            left = [400] * 3
            self.aws.fault = lambda handler: left and handler.error(left.pop(), code)
            self.expect('WEB-pod', **self.web_identity())
        left = [500] * 3
        self.expect('CONTAINER', **self.container)


@POSIX
class AwsCommand(AwsCase):
    """What needs more than the standard library comes from the command `aws`, where boto3 is not installed."""

    KINDS = {'sso': 'sso_session = corp\nsso_account_id = 1\nsso_role_name = R\n[sso-session corp]\n'
                    'sso_region = us-east-1\nsso_start_url = https://corp\n',
             'sso without a session': 'sso_account_id = 1\nsso_role_name = R\nsso_region = us-east-1\n'
                                      'sso_start_url = https://corp\n',
             'login': 'login_session = arn:aws:iam::1:user/me\n',
             'mfa': 'mfa_serial = arn:aws:iam::1:mfa/me\nsource_profile = b\n' + ROLE + 'x\n[profile b]\n'
                    + static('STATIC')}

    def setUp(self):
        from unittest import mock
        super().setUp()
        hidden = mock.patch.dict(sys.modules, {name: None for name in [*sys.modules, 'boto3', 'botocore']
                                               if name.startswith('boto')})
        hidden.start()
        self.addCleanup(hidden.stop)
        write(self.tmp / 'bin', {'aws': '#!/bin/sh\necho "$*" >> "$HOME/asked"\ncat "$HOME/answer"\n'})
        (self.tmp / 'bin/aws').chmod(0o755)
        os.environ.update(PATH='%s:/usr/bin:/bin' % (self.tmp / 'bin'), AWS_PROFILE='work')

    def was_asked(self, times=1):
        command = 'configure export-credentials --profile work --format process\n'
        self.assertEqual((self.tmp / 'asked').read_text(), command * times)
        (self.tmp / 'asked').unlink()

    def test_kinds(self):
        for kind, text in self.KINDS.items():
            with self.subTest(kind):
                self.profile('[profile work]\n' + text)
                self.process('OLD')
                signers = self.pages(lambda: None, lambda: (self.shift(3500), self.process('NEW'))[0])
                self.assertEqual(signers, ['OLD', 'OLD', 'NEW'])
                self.was_asked(2)
        role = '[profile top]\nsource_profile = work\n' + ROLE + 'dev\n[profile work]\n' + self.KINDS['sso']
        self.server.objects.clear()
        self.expect('dev-by-NEW', role, AWS_PROFILE='top')
        self.was_asked()

    def test_what_fails(self):
        for kind, text in self.KINDS.items():
            profile = '[profile work]\n' + text
            self.refused('No such file', profile)  # the command's own words
            self.refused('--profile work', profile)
            write(self.tmp, {'answer': '{"Version": 1, "SecretAccessKey": "secret"}'})
            self.refused('aws_access_key_id is missing', profile)
            self.refused('boto3', profile, PATH=str(self.tmp))
            (self.tmp / 'answer').unlink()


@needs(importable('botocore'), 'botocore is not installed')
class AwsLibrary(AwsCase):
    """What the standard library cannot comes from boto3, where it is installed."""

    def test_kinds(self):
        os.environ.update(AWS_PROFILE='work', AWS_ENDPOINT_URL_STS=self.aws.url, AWS_ENDPOINT_URL_SSO=self.aws.url)
        token = {'accessToken': 'sso-token', 'expiresAt': '2099-01-01T00:00:00Z'}
        write(self.tmp / '.aws/sso/cache', {hashlib.sha1(b'corp').hexdigest() + '.json': json.dumps(token)})
        for what, code, signers, words in (
                ('sso', b'', ['SSO'], ''), ('mfa', b'123456\n', ['x-by-STATIC'], ''),
                ('mfa', b'', ['x-by-STATIC'], ''),  # it is asked once an hour
                ('sso', b'', [], 'aws sso login --profile work'), ('mfa', b'', [], 'EOFError')):
            with self.subTest(what, code=code, words=words):
                if words:
                    remove(self.tmp / '.aws')
                self.profile('[profile work]\n' + AwsCommand.KINDS[what])
                self.server.log.clear()
                process = self.spawn('ls -r', python=(), stdin=subprocess.PIPE, start_new_session=True)
                err = process.communicate(code)[1].decode()
                self.assertEqual((process.returncode, self.signers()), (len(words) > 0, signers), err)
                self.assertIn(words, err)


@needs(importable('moto', 'flask', 'boto3'), 'moto[server] and boto3 are not installed')
class MotoIdentity(Case):
    """moto_server as IAM, STS and instance metadata; here it checks signatures and policies, of S3 too."""

    POLICY = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": %s, %s}]}'

    def setUp(self):
        super().setUp()
        import boto3
        process, endpoint = serve(tool('moto_server'), '-H', '127.0.0.1', '-p', 'PORT',
                                  INITIAL_NO_AUTH_ACTION_COUNT='1000')
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.url = 's3://bucket/prefix'
        os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION='us-east-1')
        session = boto3.Session(aws_access_key_id='x', aws_secret_access_key='y')
        session.client('s3').create_bucket(Bucket='bucket')
        self.iam, self.endpoint = session.client('iam'), endpoint

    def user(self, name, actions):
        """Its keys, as settings."""
        self.iam.create_user(UserName=name)
        self.iam.put_user_policy(UserName=name, PolicyName='p', PolicyDocument=self.POLICY % (
            json.dumps(actions), '"Resource": "*"'))
        key = self.iam.create_access_key(UserName=name)['AccessKey']
        return {'aws_access_key_id': key['AccessKeyId'], 'aws_secret_access_key': key['SecretAccessKey']}

    def be_strict(self):
        strict = urllib.request.Request(self.endpoint + '/moto-api/reset-auth', b'0', {'Content-Type': 'text/plain'})
        self.assertEqual(urllib.request.urlopen(strict).status, 200)

    def test_permissions(self):
        """Those that the README names suffice, and each is needed."""
        reading, writing = ['s3:GetObject', 's3:ListBucket'], ['s3:PutObject', 's3:AbortMultipartUpload']
        users = {name: self.user(name, actions) for name, actions in (
            ('reader', reading), ('writer', reading + writing), ('remover', reading + ['s3:DeleteObject']))}
        self.be_strict()
        self.register(small(self.tmp / 'small'))
        self.register(write(self.tmp / 'ds', {'data/train/x': noise(40 * MIB), 'data/test/y': 'y'}), 'Y')
        write(self.tmp / 'ds2', {'data/train/x': noise(40 * MIB), 'data/test/y': 'other'})
        self.register(self.tmp / 'ds2', 'Z')
        for user, commands, lacking in (
                ('reader', (), 'push X needs s3:PutObject'),
                ('writer', ('push X', 'push Y Z', 'push -f Y'), 'purge -r -f X needs s3:DeleteObject'),
                ('reader', ('info -r X', 'pull X Y Z'), ''),  # moto misjudges signatures of listings, boto3's too
                ('remover', ('purge -r -f X Y Z',), '')):
            self.settings = users[user]
            for command in commands:
                self.etc(command, home='home' if 'push' in command else 'two')
            if lacking:
                command, _, permission = lacking.partition(' needs ')
                self.fails_with(permission, command)

    def test_roles_and_metadata(self):
        key = self.user('base', 'sts:*')
        for name, service in (('mid', 'sts'), ('top', 's3')):
            trust, resource = '"Principal": {"AWS": "*"}', '"Resource": "*"'
            self.iam.create_role(RoleName=name, AssumeRolePolicyDocument=self.POLICY % ('"sts:*"', trust))
            self.iam.put_role_policy(RoleName=name, PolicyName='p', PolicyDocument=self.POLICY % (
                '"%s:*"' % service, resource))
        self.be_strict()
        write(self.tmp / '.aws', {'config': '[profile top]\nsource_profile = mid\n' + ROLE + 'top\n[profile mid]\n'
                                            'credential_source = Environment\n' + ROLE + 'mid\n'})
        os.environ.update((name.upper(), value) for name, value in key.items())
        self.register(small(self.tmp / 'ds'))
        self.fails_with('AccessDenied', 'push X')
        self.settings['aws_profile'] = 'top'
        self.etc('push X')
        self.etc('pull X', home='two')
        self.settings.clear()
        os.environ.update(AWS_ACCESS_KEY_ID='', AWS_SECRET_ACCESS_KEY='', AWS_EC2_METADATA_DISABLED='',
                          AWS_EC2_METADATA_SERVICE_ENDPOINT=self.endpoint)
        self.fails_with('InvalidAccessKeyId', 'ls -r')  # it does not know those of its metadata


class Plain(http.client.HTTPConnection):
    """In place of HTTPS."""
    default_port = 443

    def __init__(self, host, context):
        super().__init__(host)


class Signature(S3Case):
    def test_published_examples(self):
        """The server of these tests agrees with Amazon's own examples, which it then looks for in vain:

        https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
        """
        put = {'date': 'Fri, 24 May 2013 00:00:00 GMT', 'x-amz-storage-class': 'REDUCED_REDUNDANCY'}
        for method, path, more, body, signature in (
                ('GET', '/test.txt', {'range': 'bytes=0-9'}, b'',
                 'f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41'),
                ('PUT', '/test%24file.text', put, b'Welcome to Amazon S3.',
                 '98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd'),
                ('GET', '/?lifecycle', {}, b'', 'fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543'),
                ('GET', '/?max-keys=2&prefix=J', {}, b'',
                 '34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7')):
            headers = {'host': 'examplebucket.s3.amazonaws.com', 'x-amz-date': '20130524T000000Z',
                       'x-amz-content-sha256': hashlib.sha256(body).hexdigest()}
            headers.update(more)
            headers['Authorization'] = (
                'AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,'
                'SignedHeaders=%s,Signature=%s' % (';'.join(sorted(headers)), signature))
            with self.subTest(path):
                self.server.secrets = {'AKIAIOSFODNN7EXAMPLE': 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY'}
                connection = http.client.HTTPConnection(*self.server.server_address)
                self.addCleanup(connection.close)
                connection.request(method, path, body, headers)
                self.assertEqual(connection.getresponse().status, 404)

    def test_odd_requests(self):
        """Signatures are right for odd keys, of odd hosts and with all kinds of headers."""
        import ssl
        # all hosts are the test's server, which speaks plain HTTP
        connect = stand_in(self, socket, 'create_connection', lambda address, *args, **kwargs: connect(
            self.server.server_address, *args, **kwargs))
        stand_in(self, http.client, 'HTTPSConnection', Plain)
        stand_in(self, ssl.SSLContext, 'load_default_certs', lambda context, *args: None)  # which takes long
        self.url = "s3://bucket/a b+~\u00e9//.=&%$'%41(*:@Z-_\u65e5"
        self.settings.update(region='eu-west-3', aws_session_token='to/ken+=', public=True, storage_class='STANDARD_IA',
                             request_payer='requester')
        self.register(small(self.tmp / 'ds'))
        for host in ('http://127.0.0.1:9000', 'http://h:80', 'https://h', 'https://h:443', 'https://h:8443'):
            with self.subTest(host):
                self.settings['endpoint_url'] = host
                for words in ('push X', 'ls -r', 'info -r X', 'purge -r -f X'):
                    self.etc(words)


# ---------------------------------------------------------------------------------------
# Faults of networks, servers and shared directories
# ---------------------------------------------------------------------------------------

class Flaky:
    """Mixed into a handler: commits the fault that `server.case` plans for a request, on the real socket."""

    GARBAGE = [b'', b'<', b'[]', b'null', b'"x"', b'{"items": 5}', b'\xff\xfe' * 99, b'<Error/>', b'{"' * 5000,
               b'[' * 200000, b'[' + b'1' * 100000 + b']', b'<html><body>Welcome to our hotel</body></html>',
               b'<ListBucketResult><Contents>',
               b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>'
               b'<ListBucketResult>&b;</ListBucketResult>']
    damage = ''

    def handle_one(self):
        server, case = self.server, self.server.case
        kind, rng = case.plan(self.command, self.path, self.headers), case.rng
        length = int(self.headers.get('Content-Length') or 0)
        if kind in ('refused', 'reset', 'silence'):
            self.rfile.read(rng.choice([0, length, rng.randrange(length + 1)]))
            if kind == 'refused':
                with server.lock:
                    if case.is_armed:  # still, as this request may have been given up
                        server.shut()
            if kind == 'silence':
                self.wait()
            return self.slam()
        if kind[:1].isdigit():
            if rng.random() < .5:
                self.rfile.read(length)
            else:
                self.close_connection = True
            headers = {'Location': case.other.url + self.path} if kind[0] == '3' else {}
            return self.error(int(kind[:3]), kind[4:], headers)
        if kind == 'replaced':
            with server.lock:
                if case.is_armed:  # see above
                    case.replace()
            kind = ''
        self.damage = kind
        before = set(server.uploads)
        super().handle_one()
        if kind and self.command == 'POST':  # nobody was told of this upload, so nobody can abort it
            case.orphans |= set(server.uploads) - before

    def slam(self):
        """Close with a RST."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.rfile.close()
        self.connection.close()

    def wait(self):
        """Say nothing until the other side gives up."""
        self.connection.settimeout(30)
        with contextlib.suppress(OSError):
            while self.connection.recv(1 << 16):
                pass

    def answer(self, status, body=b'', headers=(), length=None):
        kind, self.damage = self.damage, ''
        if not kind:
            return super().answer(status, body, headers, length)
        if kind == 'lost':
            return self.slam()
        rng, headers = self.server.case.rng, dict(headers)
        if kind == 'garbage':
            body = rng.choice(self.GARBAGE)
        elif kind == 'range':
            told = headers['Content-Range']
            headers['Content-Range'] = rng.choice([
                '', 'x', 'bytes */9', 'bytes 0-0/1', 'bytes 1-2/3', 'bytes 9-1/5', re.sub(r'/\d+', '/*', told),
                re.sub(r'\d+-', '1-', told)])
        elif kind == 'whole':
            status, body = 200, next(iter(self.server.objects.values()))[0]
            del headers['Content-Range']
        elif kind == 'flipped':
            body = flipped(body, rng)
        length = len(body)
        if kind == 'long':
            length += rng.randrange(1, 1000)
        elif kind == 'short':
            length = rng.randrange(length or 1)
        lines = ['HTTP/1.1 %d Whatever' % status, 'Content-Length: %d' % length]
        lines += ['%s: %s' % item for item in headers.items()] + ['', '']
        if kind == 'headless':
            lines, body = lines[:rng.randrange(1, len(lines) - 1)] + [''], b''
        elif kind in ('cut', 'torn', 'stalled'):
            body = body[:rng.randrange(len(body) or 1)]
        with contextlib.suppress(OSError):
            self.connection.sendall('\r\n'.join(lines).encode() + body)
        if kind == 'torn':
            return self.slam()
        if kind == 'stalled' and length:
            self.wait()
        self.close_connection = kind != 'short'


def flipped(data, rng):
    """These bytes, but for one bit."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


class ClosingServer(Server):
    """It can refuse connections for a while."""

    def shut(self):
        with self.lock:
            if self.socket.fileno() >= 0:
                self.shutdown()
                self.socket.close()

    def reopen(self):
        with self.lock:
            if self.socket.fileno() < 0:
                self.socket = socket.socket(self.address_family, self.socket_type)
                self.server_bind()
                self.server_activate()
                threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Recorder(Handler):
    """The host that a redirect leads to; it keeps every byte that it is told."""

    def handle_one(self):
        body = self.read_body()
        self.server.log.append('%s %s\n%s\n%s' % (self.command, self.path, self.headers, body[:MIB].decode('latin-1')))
        self.answer(200)


class Faults:
    """Each command that reads or writes a remote, with each kind of fault at a random request and byte.

    All end in the right dataset, or with one line and nothing changed.
    """
    counts = [1, 1, 1, 2, 2, 4, 10 ** 6, 10 ** 6]

    def setUp(self):
        super().setUp()
        self.requests, self.hits, self.is_armed = [], [], False
        self.mutex, self.rng = threading.RLock(), random.Random()
        for name in ('_TIMEOUT', '_READ_TIMEOUT'):
            stand_in(self, etc, name, 60)

    def patience(self, seconds):
        """Let a connection count as broken after so much silence."""
        etc._TIMEOUT = etc._READ_TIMEOUT = seconds

    def plan(self, *request):
        """The fault of this request, or ''."""
        with self.mutex:
            self.requests.append(request)
            if self.is_armed and self.applies(self.kind, request):
                self.place -= 1
                if -self.count < self.place <= 0:
                    self.hits.append(request[0])
                    self.patience(60)
                    return self.kind
        return ''

    def replace(self):
        """As another push or purge does."""
        self.put('X.tgz', self.new) if self.new else self.remove()

    def make(self, version, size):
        """A version of X: its archive, its tree, and what of it `pull -p test` installs."""
        root = write(self.tmp / version, {
            'data/train/noise': noise(size, version), 'data/train/x/text': (version + '\n') * 5000,
            'data/train/l': ('->', 'noise'), 'data/test/t': 'the same in all', 'README.md': version,
            'meta.json': '{"version": "%s"}' % version})
        local = etc.Config((self.tmp / 'made' / version).as_uri(), self.tmp / 'makers' / version)
        etc.register(root, 'X', config=local)
        etc.push('X', config=local)
        whole = tree(root)
        part = {name: content for name, content in whole.items() if not name.startswith('data/train')}
        return (self.tmp / 'made' / version / 'X.tgz').read_bytes(), whole, part

    def succeeds(self, words, home):
        self.assertEqual(self.etc('-q', words, home=home), ('', ''))

    def prepare(self, op, home):
        """Make the archive of an operation ready; gives the home to use."""
        self.reset(op[1])
        return home

    def strike(self, kinds, ops, check, others=(None,)):
        """Let each kind of fault strike one of the operations, which begin with a command and the archive there.

        check(op, home, out, err) looks at what came of it; without an error, err is ''.
        others: what may take the archive's place when it is replaced.
        """
        places = []
        for number, op in enumerate(ops):
            home = self.prepare(op, 'clean%d' % number)
            self.requests.clear()
            self.assertEqual(self.etc('-q', op[0], home=home)[1], '')
            places += [(op, self.requests[:place]) for place in range(1, len(self.requests) + 1)]
        for seed in range(len(kinds) * RUNS):
            self.rng = rng = random.Random('%s %d' % (self.id(), seed))
            self.kind, self.new = kinds[seed % len(kinds)], rng.choice(others)
            fitting = [(op, requests) for op, requests in places if self.applies(self.kind, requests[-1])]
            op, requests = rng.choice(fitting or places)
            self.place = place = sum(self.applies(self.kind, request) for request in requests)
            is_silent = self.kind in ('silence', 'stalled')
            self.count = 1 if is_silent else rng.choice(self.counts)
            with self.subTest(seed=seed, command=op[0], kind=self.kind, place=place, count=self.count):
                home = self.prepare(op, 'h%d' % seed)
                self.requests.clear()
                self.hits.clear()
                self.patience(0.5 if is_silent else 60)
                self.is_armed = True
                out, err = self.etc('-q', op[0], home=home, status=None)
                self.is_armed = False
                if err and not out:
                    self.assertRegex(err, r'\Aetc: [^\n]+\n\Z')
                self.after(op, place, err)
                check(op, home, out, err)

    def test_pull(self):
        one, tree_one, part_one = self.make('one', 75000)
        two, tree_two, part_two = self.make('two', 75000)
        with tarfile.open(str(self.tmp / 'foreign.tgz'), 'w:gz') as tar:
            tar.add(str(self.tmp / 'two'), '.')
        foreign = (self.tmp / 'foreign.tgz').read_bytes()
        # the command, the archive, what comes of it, what is there before and which command installs it
        ops = [('pull X', one, tree_one, None, ''), ('pull X', one, tree_one, part_one, 'pull -p test X'),
               ('pull X', foreign, tree_two, None, ''), ('pull -p test X', one, part_one, None, ''),
               ('pull -f X', two, tree_two, tree_one, 'pull X'), ('pull -f X', foreign, tree_two, tree_one, 'pull X'),
               ('pull -f -p test X', two, part_two, tree_one, 'pull X')]

        def prepare(op, home):
            if op[4]:
                self.reset(one)
                self.succeeds(op[4], home)
            self.reset(op[1], conditions=self.rng.random() < .5)  # some stores know none
            return home

        def check(op, home, out, err):
            command, _, target, before, _ = op
            is_replaced = self.kind in ('replaced', 'rewritten')
            versions = [tree_one, tree_two]
            if '-p' in command:
                versions = [before or part_one, part_two]  # no partition of the same version goes
            possible = [before] if err else versions if is_replaced else [target]
            if err and is_replaced:
                self.assertRegex(err, "was replaced|no dataset|another 'X' is installed")
            found = tree(self.tmp / home / 'X') if os.path.lexists(str(self.tmp / home / 'X')) else None
            self.assertTrue(found in possible, (err, sorted(found or {})))
            if found:
                self.succeeds('verify X', home)
            if err:
                self.reset(two)
                self.succeeds('pull -f X', home)
                self.assertTrue(tree(self.tmp / home / 'X') == tree_two)
            self.assertEqual(self.leftovers(home), [])
            remove(self.tmp / home)
        self.prepare = prepare
        self.strike(self.kinds, ops, check, [one, two, None])

    def test_push(self):
        one, two, big = [self.make(*version)[0] for version in (('one', 20000), ('two', 30000), ('big', 9 * UNIT))]
        # the command, the archive that is there, what comes of it, whose version is pushed
        ops = [('push X', None, two, 'two'), ('push -f X', one, two, 'two'), ('push X', two, two, 'two'),
               ('push X', None, big, 'big'), ('push -f X', one, big, 'big')]
        self.prepare = lambda op, home: self.reset(op[1]) or 'makers/' + op[3]

        def check(op, home, out, err):
            _, before, target, _ = op
            others = {'replaced': [self.new], 'moved': [None]}.get(self.kind, [])
            self.assertTrue(self.remote() in ([before, target] + others if err or before == target else [target]), err)
            if err:
                self.succeeds('push -f X', home)
                self.assertTrue(self.remote() == target)
        self.strike(self.push_kinds, ops, check, [one, None])


class HttpFaults(Scaled, Faults):
    SECRETS = [AKID, SECRET[:20]] + 'AWS4-HMAC Signature session/token ya29.token Bearer refresh-secret'.split()
    MENDED = ('refused, reset, silence, lost, cut, torn, stalled, long, 408, 429 SlowDown, 500 InternalError, 502, '
              '503 SlowDown, 503 ServiceUnavailable, 504').split(', ')
    ENDED = ('replaced, short, garbage, range, whole, flipped, headless, 301 PermanentRedirect, 302, 303, '
             '307 TemporaryRedirect, 308, 400 InvalidRequest, 401, 403 AccessDenied, 404 NoSuchKey, '
             '409 OperationAborted, 410 Gone, 412, 416, 501').split(', ')

    def setUp(self):
        super().setUp()
        self.server.stop()
        old, self.server = self.server, ClosingServer(self.handler, self)
        self.addCleanup(self.server.reopen)
        for name, value in vars(old).items():
            vars(self.server).setdefault(name, value)
        self.server.case, self.orphans = self, set()
        self.settings['endpoint_url'] = os.environ['STORAGE_EMULATOR_HOST'] = self.server.url
        self.other = Server(Recorder, self)
        self.kinds = self.push_kinds = self.MENDED + self.ENDED
        stand_in(self, random, 'uniform', self.pause)  # by which pauses are multiplied

    @staticmethod
    def applies(kind, request):
        method, path, headers = request
        if kind in ('range', 'whole', 'flipped'):
            return method == 'GET' and 'Range' in headers
        return kind != '200 InternalError' or method == 'POST' and 'uploadId' in path

    def pause(self, low, high):
        """The client pauses, here for no time. A server that refuses connections is back after one or two."""
        with self.server.lock:
            self.pauses += 1
            if self.count < 3 and self.pauses > self.rng.randrange(2):
                self.server.reopen()
        return 0

    def remove(self):
        self.server.objects.pop('some/prefix/X.tgz', None)

    def remote(self):
        return self.server.objects.get('some/prefix/X.tgz', [None])[0]

    def reset(self, archive, conditions=True):
        self.server.reopen()
        self.server.conditions, self.pauses = conditions, 0
        for kept in (self.server.objects, self.server.uploads, self.orphans, self.other.log):
            kept.clear()
        if archive is not None:
            self.put('X.tgz', archive)

    def after(self, op, place, err):
        """What holds after each run."""
        self.server.reopen()
        is_mended = self.kind in self.MENDED
        if self.count <= 2 and is_mended:
            self.assertEqual(err, '')
        self.assertLessEqual(len(self.requests) + self.pauses, 300)
        # the server could not be told to forget an upload if that request failed, too
        told = 'DELETE' not in self.hits or is_mended and self.hits.count('DELETE') < self.tries_of_delete
        if told and self.count < (3 if self.kind == 'refused' else 1000):
            self.assertEqual(set(self.server.uploads) - self.orphans, set())
        for secret in self.SECRETS:
            self.assertNotIn(secret, ''.join(self.other.log))

    def test_purge(self):
        one, two = self.make('one', 70000)[0], self.make('two', 80000)[0]
        digest = etc.Dataset(self.tmp / 'one').digest

        def check(op, home, out, err):
            possible = [None, two if self.kind == 'replaced' else one]
            if self.kind == 'replaced' and not err and self.remote():  # which came after the deletion
                self.assertIn('DELETE', [method for method, _, _ in self.requests[:-1]])
            elif not err and self.kind[:3] not in ('404', '410'):  # which some looks take for the truth
                possible = [None]
            self.assertTrue(self.remote() in possible, err)
        self.strike(self.kinds, [('purge -r -f X', one), ('purge -r -f X@' + digest, one)], check, [two, None])

    def test_listings(self):
        one, clean = self.make('one', 300000)[0], {}
        self.server.page = 2

        def prepare(op, home):
            self.reset(one)
            for name in ('a.tgz', 'b.tgz', 'c.tgz'):
                self.put(name, one)
            clean[op] = clean.get(op) or self.etc(op[0], home=home)[0]
            return home

        def check(op, home, out, err):
            if out and err:  # an archive that cannot be read does not hide the others
                found, expected = json.loads(out), json.loads(clean[op])
                self.assertEqual([item['name'] for item in found], ['X', 'a', 'b', 'c'], err)
                self.assertTrue(all(item in expected or item['digest'] is None for item in found), out)
                self.assertRegex(err, r'\A(etc: [^\n]+\n)+\Z')
            elif self.kind == 'flipped' and not err:  # nothing but TLS guards the counts of an index
                self.assertEqual(*[re.sub(r'(files|size)": [0-9]+', '', text) for text in (out, clean[op])])
            elif self.kind != 'replaced':
                self.assertEqual(out, '' if err else clean[op])
            self.assertFalse((self.tmp / home / 'X').exists())
        self.prepare = prepare
        self.strike(self.kinds, [('ls -r',), ('ls -r --json',), ('info -r --json X',)], check)


class S3Faults(HttpFaults, S3Case):
    class handler(Flaky, S3Handler):
        pass
    MENDED = HttpFaults.MENDED + ['200 InternalError', '400 RequestTimeout']
    tries_of_delete = 2

    def setUp(self):
        super().setUp()
        self.settings['aws_session_token'] = 'session/token'


class GsFaults(HttpFaults, GoogleCase):
    class handler(Flaky, GsHandler):
        pass
    tries_of_delete = 1

    def setUp(self):
        super().setUp()
        self.respond({'refresh_token': 'refresh-secret'})
        self.use(self.user(refresh_token='refresh-secret'))


class FileFaults(Scaled, Faults, Case):
    """A shared directory, and a full disk. Faults strike when the archive or a file of the dataset is opened."""

    kinds = 'replaced, rewritten, truncated, emptied, removed, moved, flipped, full'.split(', ') * 2
    push_kinds = 'replaced, moved, full, source truncated, source removed'.split(', ') * 3
    counts = [1]

    def setUp(self):
        import builtins
        super().setUp()
        self.archive, self.undo = self.tmp / 'share/X.tgz', []
        for module in (builtins, os):
            opened = getattr(module, 'open')
            stand_in(self, module, 'open', lambda path, *args, opened=opened, **kwargs: (
                self.commit(str(path)), opened(path, *args, **kwargs))[1])

    @staticmethod
    def applies(kind, request):
        return not kind.startswith('source') or not request[0].endswith('.tgz')

    def commit(self, path):
        """Let the fault happen that is planned for the opening of this file."""
        if re.search(r'/share/X\.tgz$|/(two|big)/.*/noise$', path):
            with self.mutex:
                kind = self.plan(path)
                if kind:
                    self.damage(kind, Path(path), Path(path).read_bytes(), os.stat(path))

    def damage(self, kind, path, data, before):
        if kind.startswith('source'):
            self.undo.append(lambda: path.write_bytes(data))
        if kind == 'replaced':
            self.replace()
        elif kind == 'moved':
            os.rename(str(self.tmp / 'share'), str(self.tmp / 'elsewhere'))
        elif kind == 'full':
            import resource
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            self.undo.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.rng.choice([5000, 50000, 500000]), limits[1]))
        elif kind.endswith('removed'):
            path.unlink()
        elif kind.endswith('truncated'):
            os.truncate(str(path), self.rng.randrange(len(data)))
        else:
            path.write_bytes({'flipped': flipped(data, self.rng), 'rewritten': self.new or b'', 'emptied': b''}[kind])
            if kind == 'flipped':
                os.utime(str(path), ns=(before.st_atime_ns, before.st_mtime_ns))

    def remove(self):
        remove(self.archive)

    def put(self, name, data):
        write(self.tmp, {'new': data})
        self.archive.parent.mkdir(exist_ok=True)
        os.replace(str(self.tmp / 'new'), str(self.archive))

    def remote(self):
        return self.archive.read_bytes() if self.archive.exists() else None

    def reset(self, archive, conditions=True):
        remove(self.tmp / 'elsewhere')
        remove(self.tmp / 'share')
        if archive is not None:
            self.put('X.tgz', archive)

    def after(self, op, place, err):
        while self.undo:
            self.undo.pop()()
        if op[0].startswith('pull') and place > 1 and self.hits and self.kind not in ('flipped', 'full'):
            self.assertIn(self.url[7:] if self.kind in ('removed', 'moved') else 'was replaced', err)
        self.assertEqual(list(self.tmp.glob('share/.*')), [])


class SlowBodies(S3Handler):
    """Receives and sends bodies piece by piece: `server.slow(handler, bytes left)` comes before each."""

    def read_body(self):
        size, body, piece = int(self.headers.get('Content-Length') or 0), b'', b'.'
        while piece and len(body) < size:
            self.server.slow(self, size - len(body))
            piece = self.rfile.read(min(size - len(body), 32768))
            body += piece
        return body

    def answer(self, status, body=b'', headers=(), length=None):
        super().answer(status, b'', headers, len(body))
        for start in range(0, len(body), 32768):
            self.server.slow(self, len(body) - start)
            self.wfile.write(body[start:start + 32768])


class Links(S3Case):
    """Slow, lossy and long links, and servers that are slow or gone for a while."""
    sizes = {'_LAST_TIMEOUT': 10}  # as this machine may be busy

    def serve(self, server):
        self.server.stop()
        self.server = server
        self.settings['endpoint_url'] = server.url

    def serve_slowly(self, size, slow):
        """Let bodies be slow, and X so large."""
        self.serve(Server(SlowBodies, self))
        self.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        self.server.slow = slow
        self.register(self.large(size))

    def test_slow_uplink(self):
        """A link on which a block takes longer than the time-out, but is never silent for so long."""
        stand_in(self, etc, '_TIMEOUT', 1.2)
        self.serve_slowly(2 * MIB, lambda handler, left: time.sleep(0.04 * (handler.command == 'PUT')))
        self.etc('push X')
        self.assertEqual(len(self.requests('PUT')), 1)

    def test_answers_in_any_order(self):
        """Each byte is asked for once, by no more connections than are allowed, and all find their places."""
        root = self.large(22 * MIB)
        self.register(root)
        now, most, full = set(), set(), threading.Event()

        def fault(handler):
            now.add(handler)
            most.add(len(now))
            if len(now) == connections:
                full.set()
            if 'bytes=-' not in handler.headers.get('Range', 'bytes=-'):
                full.wait(10)
            time.sleep(random.random() / 20)
            now.discard(handler)
        self.server.fault = fault
        for connections in (1, 4):
            with self.subTest(connections):
                self.settings['connections'] = connections
                self.server.objects.clear()
                most.clear()
                self.etc('push X')
                self.server.sent = 0
                full.clear()
                self.etc('pull X', home=str(connections))
                self.assertEqual(tree(self.tmp / str(connections) / 'X'), tree(root))
                self.assertEqual((max(most), full.is_set()), (connections, True))
                self.assertLess(self.server.sent, 22.5 * MIB)

    def test_refusal_while_another_part_hangs(self):
        self.register(self.large(22 * MIB))
        over, late = threading.Event(), []

        def fault(handler):
            if 'partNumber=1&' in handler.path:
                late.append(over.wait(20))
            elif 'partNumber=3&' in handler.path:
                handler.error(403, 'AccessDenied')
                return True
        self.server.fault = fault
        self.fails_with('AccessDenied', 'push X')
        self.assertEqual(late, [])
        over.set()

    def test_silence(self):
        """A connection that says nothing is given up early, if the request only reads."""
        self.share(small(self.tmp / 'ds'))
        stand_in(self, etc, '_READ_TIMEOUT', 0.5)
        left, begin = [1], time.monotonic()
        self.server.fault = lambda handler: left and left.pop() and misbehave(handler, 'silence')
        self.etc('pull X', home='two')
        self.assertLess(time.monotonic() - begin, 10)

    def test_server_that_restarts(self):
        """A server that has answered before is waited for, at least 15 seconds."""
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            if sum(slept) > 15:
                self.server.reopen()

        def fault(handler):
            if handler.command == 'PUT' and not slept:
                handler.close_connection = True
                handler.server.shut()
                return True
        self.serve(ClosingServer(S3Handler, self))
        self.server.fault = fault
        now = stand_in(self, time, 'monotonic', lambda: now() + sum(slept))
        stand_in(self, time, 'sleep', sleep)
        self.share(small(self.tmp / 'ds'))
        self.assertGreater(sum(slept), 15)

    def test_requests(self):
        """How many requests the commands make at most."""
        self.share(small(self.tmp / 'ds'))
        self.register(write(self.tmp / 'large', {'data/train/x': noise(9 * MIB), 'README.md': 'large'}), 'Large')
        rows = '6 push Large, 1 push Large, 1 info -r X, 2 info -r Large, 1 diff X -r X, 2 diff -r Large -r Large, ' \
               '1 ls -r, 3 ls -r -l, 2 ls -r --json L*, 0 purge X, 1 pull X'
        for row in rows.split(', '):
            most, words = row.split(' ', 1)
            with self.subTest(words):
                self.server.log.clear()
                self.etc(words)
                self.assertLessEqual(len(self.server.log), int(most))

    def test_listing_in_full_needs_no_range_from_the_end(self):
        self.share(small(self.tmp / 'ds'))
        self.server.log.clear()
        self.server.fault = lambda h: '=-' in h.headers.get('Range', '') and h.error(416, 'InvalidRange')
        self.assertIn('sha256:', self.etc('ls -r -l')[0])
        self.assertEqual(len(self.server.log), 2)

    def test_ranges_grow_where_all_answers_are_late(self):
        stand_in(self, etc, '_FAST_RANGE', 0)
        self.settings['connections'] = 1
        self.share(self.large(12 * MIB))
        self.server.log.clear()
        self.server.fault = lambda handler: time.sleep(0.05)
        self.etc('pull X', home='two')
        self.assertLess(len(self.server.log), 20)

    def test_ranges_from_the_end(self):
        """Servers that refuse or misread them are asked otherwise."""
        self.share(self.large(100000))
        data, etag, _ = self.server.objects['some/prefix/X.tgz']
        size = len(data)
        for what, start, stop, total in (
                ('the whole object', 0, size, None), ('refused', 0, 0, None), ('from the start', 0, 8193, size),
                ('the last bytes but one', size - 8193, size - 1, size), ('fewer bytes', size - 4000, size, size),
                ('no size', size - 8192, size, '*'), ('another length', size - 8192, size, size)):
            headers, asked = {'ETag': etag}, []
            if total:
                headers['Content-Range'] = 'bytes %d-%d/%s' % (start, stop - 1, total)

            def fault(handler):
                if handler.headers.get('Range', '').startswith('bytes=-'):
                    asked.append(handler.path)
                    body = data[start:stop - (what == 'another length')]
                    handler.answer(206 if total else 200 if body else 416, body, headers)
            with self.subTest(what):
                self.server.fault = fault
                self.etc('pull X', home=what)
                self.assertEqual(tree(self.tmp / what / 'X'), tree(self.tmp / 'ds'))
                self.assertEqual(len(asked), 1)

    def test_lost_upload(self):
        self.register(self.large(12 * MIB))
        self.server.fault = lambda handler: 'partNumber=2' in handler.path and self.server.uploads.clear()
        self.assertRegex(self.etc('push X', status=1)[1], 'NoSuchUpload.*has removed the upload meanwhile; push ')

    def test_connections_that_a_nat_forgets(self):
        """Where one idle connection is dead, so are the others."""
        self.settings['connections'] = 4
        stand_in(self, etc, '_READ_TIMEOUT', 1.5)
        self.register(self.large(25 * MIB))
        known, silent = set(), []

        def fault(handler):
            if handler.command == 'PUT':
                known.add(handler.connection)
            elif handler.connection in known:  # all parts have been sent
                silent.append(handler.command)
                return misbehave(handler, 'silence')
        self.server.fault = fault
        self.etc('push X')
        self.assertGreater(len(known), 1)
        self.assertEqual(len(silent), 1)

    def test_connections_that_were_idle_for_a_minute(self):
        used, clock = [], itertools.count(0, 61)
        stand_in(self, time, 'monotonic', lambda: next(clock))
        self.server.fault = lambda handler: used.append(handler.connection)
        self.share(small(self.tmp / 'ds'))
        self.assertGreater(len(used), 1)
        self.assertEqual(len(set(used)), len(used))

    @POSIX
    def test_interruption_while_the_server_is_silent(self):
        """Ctrl-C ends a push at once, and the upload."""
        started, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        self.serve_slowly(12 * MIB, lambda handler, left: handler.command == 'PUT' and left < MIB and (
            started.set(), go_on.wait(60)))
        for name, status in (('SIGINT', 130), ('SIGTERM', 143)):
            with self.subTest(name):
                started.clear()
                process = self.spawn('push X')
                self.assertTrue(started.wait(20))
                process.send_signal(getattr(signal, name))
                err = process.communicate(timeout=20)[1]
                said = INTERRUPTED
                self.assertEqual((process.returncode, err, self.server.uploads), (status, said, {}))

    @POSIX
    def test_interruption_at_any_time(self):
        self.share(self.large(6 * MIB))
        for command, delay in itertools.product(('push -f X', 'pull -f X'), (0, 0.03, 0.1, 0.2)):
            with self.subTest(command, delay=delay):
                self.server.log.clear()
                process = self.spawn('-q', command)
                while not self.server.log:
                    time.sleep(0.01)
                time.sleep(delay)
                process.send_signal(signal.SIGINT)
                ended = process.communicate(timeout=20)[1], process.returncode
                # the signal may also come when all is done, and Python has put back what it did by default
                self.assertIn(ended, [(b'', 0), (INTERRUPTED, 130), (b'', -signal.SIGINT)])
                self.assertEqual(self.server.uploads, {})
                if ended[1] <= 0:
                    self.assertTrue('pull' in command or any('uploadId' in path for path in self.requests('POST')))
                    self.etc('verify X')

    def test_progress_of_a_single_body(self):
        """Progress tells of bytes when they move, not when all of a part or a range has."""
        told, large, missing = threading.Event(), set(), []

        def slow(handler, left):
            if left > 32768:
                large.add(handler)
            elif handler in large and not told.wait(20):
                missing.append(handler.command)
        self.serve_slowly(4 * MIB, slow)
        for call, home in ((etc.push, 'home'), (etc.pull, 'two')):
            told.clear()
            call('X', config=self.config(home), progress=lambda done, total: done and told.set())
        self.assertEqual(missing, [])


# ---------------------------------------------------------------------------------------
# Installing
# ---------------------------------------------------------------------------------------

def run_python(program, *args, flags=('-S',), **kwargs):
    """Run a program in an interpreter of its own; its exit status, and what it prints."""
    head = 'import os, re, signal, sys, threading\nsys.path.insert(0, %r)\n' % str(HERE)
    command = [sys.executable, *flags, '-c', head + program] + [str(arg) for arg in args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, **kwargs)
    return done.returncode, done.stdout


class Shell:
    """For a Case: works in its directory."""

    def setUp(self):
        super().setUp()
        os.chdir(self.tmp)
        self.addCleanup(os.chdir, HERE)


class Installing(Scaled, Shell, S3Case):
    def setUp(self):
        super().setUp()
        self.here = self.tmp / 'home/X'

    def publish(self, size=20 * UNIT):
        self.root = write('ds', {'data/train/%d' % n: noise(size // 10, n) for n in range(10)})
        self.share(self.root, home='pub')

    def check(self, home='home'):
        """X is here as it was published, and no work is left."""
        self.assertEqual((tree(Path(home, 'X')), self.leftovers(home)), (tree(self.root), []))

    def pulled(self, home='home'):
        """Pull; returns how much the server sent."""
        before = self.server.sent
        self.etc('pull X', home=home)
        self.etc('verify X', home=home)
        self.check(home)
        return self.server.sent - before

    def start(self, when, *args, **kwargs):
        """Start a command that hangs at such a request; returns the process, and an event that lets it go on."""
        stuck, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        self.server.fault = lambda handler: when(handler) and (stuck.set(), go_on.wait(30)) and None
        process = self.spawn(*args, **kwargs)
        self.assertTrue(stuck.wait(20))
        return process, go_on

    def reads(self, count):
        """For start(): after so many reads."""
        reads = itertools.count()
        return lambda handler: handler.command == 'GET' and next(reads) >= count

    def age(self, *paths):
        """Let work that was left look old."""
        for path in paths:
            for place in [path] + list(path.iterdir()):
                os.utime(place, (1, 1))


class Install(Installing):
    @POSIX
    def test_interrupted_pull(self):
        self.publish()
        for name, status in (('SIGKILL', -9), ('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)):
            with self.subTest(name):
                process, go_on = self.start(self.reads(3), 'pull X', home=name)
                self.end(process, name, status)
                go_on.set()
                # for the next to go on from
                self.assertEqual((self.installed(name), len(self.leftovers(name))), ([], 1))
                self.pulled(name)

    @POSIX
    def test_interrupted_push(self):
        self.publish()
        self.sizes['_LAST_TIMEOUT'] = 10  # as this machine may be busy
        for name, status in (('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)):
            with self.subTest(name):
                process, _ = self.start(lambda handler: 'partNumber=2' in handler.path, 'push -f X', home='pub')
                later = [signal.SIGHUP, signal.SIGTERM, signal.SIGHUP]  # as from a terminal that closes

                def fault(handler):
                    if handler.command == 'DELETE' and later:
                        while later:
                            process.send_signal(later.pop())
                        handler.answer(503)
                self.end(process, name, status, fault)
                self.assertEqual((len(self.server.uploads), later), (0, []))

    def end(self, process, name, status, fault=None):
        """End a command that hangs by a signal."""
        begin, self.server.fault = time.time(), fault
        process.send_signal(getattr(signal, name))
        err = process.communicate()[1].decode()
        self.assertLess(time.time() - begin, 15, 'it waits for no answer')
        self.assertEqual(process.returncode, status)
        self.assertRegex(err, r'\Aetc: interrupted[^\n]*\n\Z' if status > 0 else r'\A\Z')

    @POSIX
    @unittest.skipIf(hasattr(sys, 'pypy_version_info'), 'PyPy does not tell which signals it inherited as ignored')
    def test_signals_that_are_not_for_us(self):
        """nohup's SIGHUP is ignored; a program that calls main() keeps its handlers, also in another thread."""
        self.publish(UNIT)
        process, go_on = self.start(
            self.reads(0), 'pull X', preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        process.send_signal(signal.SIGHUP)
        go_on.set()
        self.assertEqual(process.wait(), 0, process.communicate())
        self.addCleanup(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP))
        during = []
        self.server.fault = lambda handler: during.append(signal.getsignal(signal.SIGHUP))
        for own in (signal.SIG_IGN, lambda number, frame: None, signal.SIG_DFL):
            with self.subTest(own), ThreadPoolExecutor(1) as pool:
                signal.signal(signal.SIGHUP, own)
                pool.submit(self.etc, 'info -r X').result()
                self.etc('info -r X')
                self.assertEqual((during[0], signal.getsignal(signal.SIGHUP)), (own, own))
                self.assertEqual(during.pop() == own, own != signal.SIG_DFL)
                during.clear()

    @POSIX
    def test_signal_after_the_end(self):
        """It ends the program, without a traceback."""
        program = 'from etcetera import main\nmain()\nos.kill(os.getpid(), signal.SIGINT)'
        code, out = run_python(program, '--version', preexec_fn=default_signals)
        self.assertEqual((code, out.count('\n')), (-signal.SIGINT, 1), out)

    def test_work_of_the_living_stays(self):
        """However old it is; that of the dead goes, and that of other hosts after a day."""
        self.publish()
        process, go_on = self.start(self.reads(3), 'pull X')
        live, = self.leftovers()
        gone = subprocess.Popen([sys.executable, '-c', ''])
        gone.wait()
        dead, away, long_away = [live.with_name('X@%s@%d@%s' % words) for words in (
            (live.name.split('@')[1], gone.pid, 'aa'), ('elsewhere', 1, 'bb'), ('elsewhere', 1, 'cc'))]
        for path in dead, away, long_away:
            write(path, {'new': None})
        self.age(live, long_away)
        self.etc('create Y')
        self.assertEqual(sorted(self.leftovers()), sorted([live, away]))
        remove(away)
        go_on.set()
        self.assertEqual(process.communicate()[1][:13], b'etc: pulled X')
        self.check()

    @unittest.skipUnless(os.path.isdir('/proc/self/fd'), 'an open directory is read through /proc')
    def test_readers_of_what_is_replaced(self):
        """They see the old dataset or the new one, whole, and for a quarter of an hour."""
        self.publish(UNIT)
        self.etc('pull X')
        versions = [tree(self.root), tree(write('new', {'data/train/x': 'new'}))]
        stop = threading.Event()
        kept = os.open(self.here, os.O_RDONLY)
        self.addCleanup(os.close, kept)

        def watch():
            while not stop.is_set():
                with contextlib.suppress(FileNotFoundError):  # between two renames
                    opened = os.open(self.here, os.O_RDONLY)
                    self.assertIn(tree('/proc/self/fd/%d' % opened), versions)
                    os.close(opened)
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            for root in ['new', self.root] * 5:
                self.etc('register -f', root, 'X', home='pub')
                self.etc('push -f X', home='pub')
                self.etc('pull -f X')
                self.etc('register --copy -f', root, 'X')
            stop.set()
            watching.result()
        self.check()
        self.etc('create Y')
        self.assertEqual(tree('/proc/self/fd/%d' % kept), versions[0])
        replaced = [path for path in Path('home/.etcetera').rglob('data') if path.is_dir()]
        self.assertGreaterEqual(len(replaced), 10)
        for path in replaced:
            self.age(path.parent, path.parent.parent)
        self.etc('create Z')
        self.assertEqual([path for path in replaced if path.exists()], [])

    def test_what_cannot_be_moved(self):
        """Neither aside nor in, as where the store's own directory is on another disk: the old one stays."""
        self.etc('register --copy', small('ds'), 'X')
        for what, code, refused in (('aside', 13, lambda old, new: old == self.here),
                                    ('in', 13, lambda old, new: new == self.here and old.name == 'new'),
                                    ('disk', 18, lambda old, new: new == self.here and old.name == 'new')):
            def busy(old, new):
                if refused(Path(old), Path(new)):
                    raise OSError(code, os.strerror(code), old)
                rename(old, new)
            with self.subTest(what):
                rename = stand_in(self, os, 'rename', busy)
                err = self.etc('register --copy -f ds X', status=1)[1]
                os.rename = rename
                self.assertIn(os.strerror(code), err)
                self.etc('verify X')
                self.assertEqual((tree(self.here), self.leftovers()), (tree('ds'), []))

    def die_at(self, last, words, in_image):
        """In a child: run a command up to one of its steps."""
        steps = itertools.count(1)

        def slow(function):
            def step(path, *args, **kwargs):
                if in_image and function.__name__ == 'rename' and os.path.dirname(path) == str(self.here.parent):
                    raise OSError(errno.EXDEV, 'Invalid cross-device link', path)
                result = function(path, *args, **kwargs)
                if next(steps) == last:
                    os._exit(9)
                return result
            return step
        for name in 'mkdir rename rmdir unlink'.split():
            setattr(os, name, slow(getattr(os, name)))
        os._exit(etc.main(['-q', '--home', 'home', '--url', self.url] + words.split()))

    def steps(self, words, in_image=False):
        """Kill a command at each of its steps; in_image: where the directories of the store cannot be renamed."""
        for number in itertools.count(1):
            child = os.fork()
            if not child:
                try:
                    self.die_at(number, words, in_image)
                finally:
                    os._exit(8)
            code = os.waitpid(child, 0)[1] >> 8
            if code != 9:
                self.assertEqual((code, number > 2), (0, True))
                return
            with self.subTest(number, words=words):
                yield

    @POSIX
    def test_killed_at_each_step(self):
        """What was moved aside is put back by whatever comes next, but not if another one stands there."""
        self.url = (self.tmp / 'share').as_uri()
        old, new = [write(name, {'data/train/x': name}) for name in ('old', 'new')]
        self.share(new, home='pub')
        commands = itertools.cycle(['ls', 'verify X', 'info X', 'create Y -f', 'ls -l'])
        for words in 'register --copy -f new X', 'pull -f X', 'register -f new X', 'purge X':
            is_purge = words == 'purge X'
            self.etc('register --copy -f', old, 'X')
            for _ in self.steps(words):
                self.etc(next(commands), status=None if is_purge else 0)
                if not is_purge or 'X' in self.installed():
                    self.etc('verify X')
                    self.assertIn(tree(self.here), [tree(old), tree(new)])
                self.assertEqual('X' in self.installed(), os.path.lexists(self.here))
                self.etc('register --copy -f', old, 'X')
            self.assertEqual(tree(self.here), {} if is_purge else tree(new))
            self.assertEqual(('X' in self.installed(), self.leftovers()), (not is_purge, []))

    @POSIX
    def test_killed_while_it_removes_what_cannot_be_renamed(self):
        """As in a container's image: nothing half-removed passes for a whole dataset."""
        self.url = (self.tmp / 'share').as_uri()
        self.root = write('ds', {'data/train/x': 'x', 'data/test/y': 'y', 'README.md': 'r'})
        self.share(self.root, home='pub')
        self.etc('pull X')
        for words in 'purge X', 'pull -f X':
            for _ in self.steps(words, in_image=True):
                if self.installed():
                    self.assertEqual(tree(self.here), tree(self.root))
                    self.etc('purge X')
                for use in etc.dataset, etc.verify, etc.push, etc.info:
                    self.assertRaises(etc.NotFound, use, 'X', config=self.config())
                self.etc('pull X')
                self.etc('verify X')
                self.check()

    def test_many_at_once(self):
        self.publish()
        self.server.sent = 0
        code = '''import etcetera as etc
vars(etc).update(%r)
print(etc.dataset('X', auto_install=True, config=etc.Config(%r, home=%r, **%r)).digest)
''' % (self.sizes, self.url, 'home', self.settings)
        with ThreadPoolExecutor(5) as pool:
            results = set(pool.map(run_python, [code] * 5))
        self.assertEqual(results, {(0, etc.Dataset(self.root).digest + '\n')})
        self.check()
        self.assertLess(self.server.sent, 1.5 * 20 * UNIT)

    @POSIX
    def test_many_at_once_where_locks_do_nothing(self):
        """As on some cluster file systems, where all of them succeed."""
        import fcntl
        self.publish(4 * UNIT)
        stand_in(self, fcntl, 'flock', lambda file, operation: None)
        with ThreadPoolExecutor(6) as pool:
            pulls = [pool.submit(etc.pull, 'X', config=self.config()) for _ in range(6)]
        self.assertEqual({pull.result().digest for pull in pulls}, {etc.Dataset(self.root).digest})
        self.etc('verify X')
        self.check()

    @POSIX
    def test_waiting_blocks_no_process(self):
        """As its other green threads may hold the lock: it is asked for, again and again."""
        import fcntl
        self.publish(UNIT)
        asked, waited = [], threading.Event()

        def polled(file, operation):
            asked.append(operation)
            if len(asked) > 2:
                waited.set()
            flock(file, operation | fcntl.LOCK_NB)
        flock = stand_in(self, fcntl, 'flock', polled)
        with open(write('home', {'.etcetera/locks/X': ''}) / '.etcetera/locks/X', 'ab') as held:
            flock(held, fcntl.LOCK_EX)
            with ThreadPoolExecutor(1) as pool:
                pull = pool.submit(etc.pull, 'X', config=self.config())
                self.assertTrue(waited.wait(20))
                self.assertFalse(pull.done())
                held.close()
        self.assertEqual(pull.result().digest, etc.Dataset(self.root).digest)
        self.assertTrue(all(operation & fcntl.LOCK_NB for operation in asked))

    def test_as_python_ends(self):
        """In a thread that outlives the main one, and at exit."""
        self.publish(UNIT)
        code, out = run_python("""
import atexit, sys, threading, time
import etcetera as etc
vars(etc).update(%r)
def get(home, seconds):
    time.sleep(seconds)
    config = etc.Config(sys.argv[1], home=sys.argv[2] + home, **%r)
    print(home, *etc.dataset('X', auto_install=True, config=config), flush=True)
threading.Thread(target=get, args=('late', 0.5)).start()
atexit.register(get, 'exit', 0)
""" % (self.sizes, self.settings), self.url, str(self.tmp) + os.sep)
        self.assertEqual((code, out.split()), (0, ['late', 'train', 'exit', 'train']), out)
        for home in 'late', 'exit':
            self.check(home)


@POSIX
class Resume(Installing):
    """What an interrupted pull has left is verified, and not fetched again."""

    def setUp(self):
        super().setUp()
        self.settings['connections'] = 10
        files = {'data/train/big': noise(20 * UNIT), 'data/train/\u00e9' + 'x' * 120: noise(100), 'README.md': 'hello'}
        files.update({'data/train/%04d' % n: noise(500) for n in range(150)})
        files.update({'data/train/m/%d' % n: noise(UNIT // 2) for n in range(20)})
        files.update({'data/test/%d' % n: noise(20000) for n in range(10)})
        self.root = write('ds', files)
        (self.root / 'data/train/0000').chmod(0o755)
        self.share(self.root, home='pub')
        self.size = len(self.server.objects['some/prefix/X.tgz'][0])

    def start_of(self, handler):
        """Where the range of a read starts, if it is none of the archive's end, which holds the index."""
        range_ = handler.headers.get('Range', 'bytes=-')
        start, stop = asked_range(handler.headers, self.size) if not range_.startswith('bytes=-') else (0, 0)
        return start if start < self.size - 16384 else 0, stop

    def broken_off(self, share, number=signal.SIGTERM):
        """Break a pull off when a share of the data has come and is written."""
        def is_late(handler):
            start, stop = self.start_of(handler)
            return start and (start >= share * self.size or stop > self.size - 16384)
        def is_written(lines):
            return sum(map(int, re.findall(rb'^\[".*?", (\d+), ', lines, re.M))) >= share * self.size - 8 * UNIT
        self.broken_off_when(is_late, is_written, number, 'pull X')

    def broken_off_when(self, is_late, is_written, number, words):
        """Break a pull off at such a request, as soon as the journal tells so."""
        process, go_on = self.start(is_late, '--config settings.yaml', words)
        until, lines = time.time() + 30, b''
        while not is_written(lines):
            self.assertLess(time.time(), until)
            time.sleep(0.02)
            lines = b''.join(path.read_bytes() for path in Path('home/.etcetera').rglob('journal'))
        process.send_signal(number)
        process.communicate()
        self.server.fault = None
        go_on.set()
        self.assertEqual((self.installed(), len(self.leftovers())), ([], 1))

    def test_kills_and_interrupts(self):
        for shares, number in (([0.5], signal.SIGKILL), ([0.9], signal.SIGKILL), ([0.3, 0.9, 0.4], signal.SIGINT)):
            with self.subTest(shares=shares):
                for share in shares:
                    self.broken_off(share, number)
                self.assertLess(self.pulled(), (1.5 - max(shares)) * self.size)  # what is under way is lost
                self.etc('purge X')

    def test_in_the_order_in_which_it_came(self):
        """What had begun first may stand behind the rest."""
        write(self.root, {'data/test/big': noise(10 * UNIT, 5)})
        self.etc('push -f X', home='pub')
        self.size = len(self.server.objects['some/prefix/X.tgz'][0])
        for words, start, name in (('pull -p train X', 30, b'"data/train"'), ('pull X', 6, b'"data/test"')):
            self.broken_off_when(lambda handler: start * UNIT < self.start_of(handler)[0] < (start + 5) * UNIT,
                                 lambda lines: name in lines, signal.SIGKILL, words)
        self.assertLess(self.pulled(), 0.5 * self.size)

    def test_nothing_is_trusted(self):
        self.broken_off(0.9)
        journal, = Path('home/.etcetera').rglob('journal')
        inside = journal.parent.relative_to('home')

        def change(path, old, new):
            path.chmod(0o644)
            data = path.read_bytes()
            path.write_bytes(data[:99] + data[99:].replace(old, new, 1))

        for home, harm in (
                ('a changed file', lambda work: change(work / 'new/data/train/0120', b'', b'x')),
                ('a new file', lambda work: write(work / 'new', {'data/test/00': 'new'})),
                ('a forged length', lambda work: change(work / 'journal', b'"data/train", ', b'"data/train", 1')),
                ('a link', lambda work: (remove(work / 'new/data/train'), write(
                    work / 'new', {'data/train': ('->', str(self.tmp / 'ds/data/train'))}))),
                ('another dataset', lambda work: (write(self.root, {'data/train/0001': 'other'}), self.etc(
                    'push -f X', home='pub')))):
            with self.subTest(home):
                shutil.copytree('home', home)
                harm(Path(home, inside))
                self.etc('pull X', home=home, status=None)  # it may be refused in the end, and then forgotten
                self.pulled(home)

    def test_lost_network(self):
        stand_in(self, time, 'sleep', lambda seconds: None)

        def fault(handler):
            if self.start_of(handler)[0] >= self.size / 2:
                handler.close_connection = True
                return True
        self.server.fault = fault
        self.fails_with('cannot reach %s: ' % self.server.url, 'pull X')
        self.server.fault = None
        self.etc('create Y')
        self.assertEqual((self.installed(), len(self.leftovers())), (['Y'], 1), 'another dataset leaves it alone')
        shutil.copytree('home', 'two')
        self.assertLess(self.pulled(), 0.8 * self.size)
        self.age(*self.leftovers('two'))
        self.etc('create Z', home='two')
        self.assertEqual(self.leftovers('two'), [])


class Receipts(Shell, Case):
    """What is known of a dataset goes where it goes, and is believed of no other."""

    def setUp(self):
        super().setUp()
        self.root = small('ds')
        self.share(self.root, home='pub')
        self.here = Path('home/X')

    def known(self, name='X', home='home'):
        """Whether there is a receipt, and whether it tells of more than is here."""
        found = etc.info(name, config=self.config(home))
        return found['when'] is not None, found['partial']

    def damage(self, path):
        path.chmod(0o644)
        path.write_text('damaged')

    def test_copies_of_a_store(self):
        self.etc('pull -p test X')
        for home, command in (('copy', 'cp -r home copy'), ('times', 'cp -rp home times'),
                              ('tar', 'mkdir tar && tar -cf - -C home . | tar -xf - -C tar'),
                              ('touched', 'cp -r home touched && touch touched/X')):
            with self.subTest(home):
                subprocess.check_call(['sh', '-c', command])
                self.assertEqual(self.known(home=home), (True, True))
                self.fails_with('only partly installed', 'push X', home=home)
                with self.assertRaisesRegex(etc.NotFound, 'only partly installed, without assets, data/train;'):
                    etc.dataset('X', config=self.config(home))
                self.etc('pull -p train X', home=home)
                self.assertEqual(self.known(home=home), (True, True))
                self.assertEqual(etc.dataset('X', True, config=self.config(home)).keys(), {'test', 'train'})
                self.assertEqual(self.known(home=home), (True, False))
                self.damage(Path(home, 'X/data/test/c.txt'))
                err = self.etc('verify X', home=home, status=1)[1]
                self.assertIn("'X' is not what was installed: data/test;", err)

    @POSIX
    def test_believed_of_no_other(self):
        self.etc('pull -p test X')
        shutil.copytree(self.here, 'home/Y')
        self.register(self.here, 'Z')
        write('.', {'two/X': ('->', str(self.tmp / 'home/X'))})
        for name, home in (('Y', 'home'), ('Z', 'home'), ('X', 'two')):
            with self.subTest(name, home=home):
                self.assertEqual(self.known(name, home), (False, False))

    def test_no_part_of_the_dataset(self):
        """It is in no archive and no digest, and in no directory that is registered."""
        self.etc('pull X')
        before = sorted(os.listdir(self.root))
        for name, root in (('Y', self.here), ('X', self.root)):
            self.etc('register -f', root, name, home='pub')
            for words in 'push -f', 'pull', 'verify', 'info':
                self.etc(words, name, home='pub')
            self.etc('pull', name, home='two')
            self.assertEqual(tree(Path('two', name)), tree(self.root))
            self.assertEqual(self.known(name, 'two'), (True, False))
        self.assertEqual(sorted(os.listdir(self.root)), before)
        self.assertEqual(etc.Dataset(self.here).digest, etc.Dataset(self.root).digest)

    def test_odd_ones(self):
        """What is no receipt tells nothing; one with odd times is still one."""
        self.etc('pull X')
        path = self.here / '.etcetera.json'
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o444)
        path.chmod(0o644)
        good = json.loads(path.read_text())
        first = good['segments'][0]
        bad = [{key: value} for key in good if isinstance(good[key], str) for value in (None, 5, ['x', 5], {}, 'Y')
               if (key, value) not in (('when', 'Y'), ('source', 'Y'), ('version', 'Y'))]
        bad += [{'segments': [dict(first, **{key: value})]} for key in first for value in (None, [], 1.5, '\ud800')]
        texts = [json.dumps(dict(good, **change)) for change in bad]
        for text in texts + ['[' * 100000, 'null', '5', '{}', '"x"', '', '\0', '\xff']:
            with self.subTest(text[:200]):
                path.write_text(text, encoding='latin-1')
                self.assertEqual(self.known(), (False, False))
                for words in 'ls -l', 'verify X', 'pull X', 'push X':
                    self.etc(words)
        for when in ('', 'x', '9999-12-31T23:59:59Z', '0001-01-01T00:00:00Z', '2050-01-01T00:00:00+99:99'):
            with self.subTest(when):
                path.write_text(json.dumps(dict(good, when=when)))
                self.assertEqual(etc.info('X', config=self.config())['when'], when)
                self.etc('ls -l')
                self.etc('info X')

    def test_pull_of_what_is_here(self):
        """It says what is known: nothing was read."""
        self.etc('pull X')
        self.damage(self.here / 'data/test/c.txt')
        for name in 'X', 'X@' + etc.info('X', True, self.config())['digest']:
            self.assertRegex(self.etc('pull', name)[1], r"installed already\b.*'etc verify.*' reads it again\n\Z")
        self.etc('verify X', status=1)

    def test_force_narrows_nothing(self):
        """It replaces other contents, and what is not as it was."""
        self.etc('pull X')
        self.etc('pull -f -p test X')
        self.assertEqual((tree(self.here), self.known()), (tree(self.root), (True, False)))
        for what, spoil in (('a file more', lambda: write(self.here, {'data/stray': 'x'})),
                            ('a link', lambda: write(self.here, {'link': ('->', 'nowhere')})),
                            ('a file less', lambda: remove(self.here / 'data/train/a.txt')),
                            ('other bytes', lambda: self.damage(self.here / 'data/train/a.txt'))):
            with self.subTest(what):
                spoil()
                self.etc('pull -f X')
                self.assertEqual(tree(self.here), tree(self.root))
        write(self.root, {'data/test/c.txt': 'newer'})
        self.etc('push -f X', home='pub')
        self.assertIn('train', self.etc('pull -f -p test X')[1], 'it says what goes')
        self.assertEqual(self.known(), (True, True))

    def test_a_partition_that_is_not_here(self):
        self.etc('pull -p test X')
        ds = etc.dataset('X', partitions=['test'], config=self.config())
        for name, said in (('train', r"'train'.*(not here|not installed|'etc pull)"), ('nope', "no partition 'nope'")):
            with self.subTest(name), self.assertRaisesRegex(etc.UnknownPartition, said):
                ds[name]


OPENS = r"""
#define AT int at,
#define PASS at,
OPEN(open, , )
OPEN(open64, , )
OPEN(openat, AT, PASS)
OPEN(openat64, AT, PASS)
"""
PICKY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>
#define REFUSE(code) { errno = code; return -1; }
#define OPEN(name, before, pass) int name(before const char *path, int flags, ...) { \
    static int (*next)(before const char *, int, ...); \
    va_list list; va_start(list, flags); mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0; va_end(list); \
    if (!next) next = dlsym(RTLD_NEXT, #name); \
    if ((flags & O_CREAT) && (flags & O_ACCMODE) != O_RDONLY && !(mode & 0200)) REFUSE(EACCES) \
    return next(pass path, flags, mode); }
""" + OPENS + r"""
int link(const char *a, const char *b) REFUSE(EPERM)
int linkat(int a, const char *b, int c, const char *d, int e) REFUSE(EPERM)
int chmod(const char *a, mode_t b) REFUSE(EPERM)
int fchmodat(int a, const char *b, mode_t c, int d) REFUSE(EPERM)
"""
NO_MODES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#define OPEN(name, before, pass) int name(before const char *path, int flags, ...) { \
    static int (*next)(before const char *, int, ...); \
    if (!next) next = dlsym(RTLD_NEXT, #name); \
    return next(pass path, flags, 0777); }
""" + OPENS + r"""
int symlink(const char *a, const char *b) { errno = EPERM; return -1; }
int symlinkat(const char *a, int b, const char *c) { errno = EPERM; return -1; }
"""


class PullReuse(Scaled, Shell, S3Case):
    """What any installed dataset has is not fetched again."""

    def setUp(self):
        super().setUp()
        self.old = write('old', {'data/train/%d' % n: noise(UNIT, n) for n in range(4)})
        write(self.old, {'data/test/x': noise(2 * UNIT, 9), 'data/test/y': ('->', 'x'), 'README.md': 'one'})
        self.new = Path('new')
        shutil.copytree(self.old, self.new, symlinks=True)
        write(self.new, {'README.md': 'the second one'})
        self.share(self.old, 'Old', home='pub')
        self.share(self.new, 'New', home='pub')
        self.etc('pull Old')
        self.here = Path('home')

    def pulled(self, words, root=None):
        """Pull; returns how many units the server sent, and what was said."""
        before, name = self.server.sent, words.split()[-1]
        err = self.etc('pull', words)[1]
        self.etc('verify', name)
        if '-p' not in words:
            self.assertEqual(tree(self.here / name), tree(root or self.new))
        return (self.server.sent - before) / UNIT, err

    def test_versions_and_names(self):
        self.share(self.old, 'Renamed', home='pub')
        self.share(write('third', {'data/val/v': noise(3 * UNIT, 7)}), 'Third', home='pub')
        write('sum', {'data/val/v': noise(3 * UNIT, 7), 'data/more/m': noise(UNIT, 8)})
        shutil.copytree(self.old / 'data/train', 'sum/data/train')
        self.share('sum', 'Sum', home='pub')
        self.etc('pull Third')
        for name, root, least, said in (
                ('New', self.new, 0, 'pulled New to .*: 7 files, 393 kB in .*; 393 kB were there already'),
                ('Renamed', self.old, 0, 'pulled Renamed to .*; 393 kB were there already'),
                ('Sum', 'sum', 1, '; 459 kB were there already')):
            with self.subTest(name):
                sent, err = self.pulled(name, root=root)
                self.assertTrue(least < sent < least + 0.2, sent)
                self.assertRegex(err, said)
                if os.name != 'nt':
                    self.assertTrue((self.here / 'Old/data/train/2').samefile(self.here / name / 'data/train/2'))
        self.etc('purge Old')
        self.etc('verify New')

    def test_some_partitions_and_the_rest(self):
        sent, err = self.pulled('-p test New')
        self.assertEqual((sent < 0.2, os.listdir(self.here / 'New/data')), (True, ['test']))
        self.assertRegex(err, 'pulled New to .*: 3 files, 131 kB')
        self.etc('purge Old')
        sent, err = self.pulled('New')
        self.assertTrue(4 < sent < 4.2, sent)
        self.assertIn('; 131 kB were there already', err)

    def test_what_changed_is_fetched(self):
        """And nothing that was damaged here spreads."""
        path = self.here / 'Old/data/train/2'
        for name, damage in (
                ('other bytes', lambda: (path.chmod(0o644), path.write_bytes(noise(UNIT, 77)))),
                ('a file less', lambda: remove(path)),
                ('a file more', lambda: write(path.parent, {'2': noise(UNIT, 2), 'more': 'm'})),
                ('no directory', lambda: remove(path.parent))):
            with self.subTest(name):
                damage()
                sent, err = self.pulled('New')
                self.assertTrue(4 < sent < 4.2, sent)
                self.etc('purge New')

    @POSIX
    def test_odd_files(self):
        """What cannot be read is fetched; what is writable, or a link, is copied, so that nobody changes it in both."""
        old, linked = self.here / 'Old/data/test/x', self.here / 'Old/data/train/2'
        old.chmod(0)
        with unprivileged('.'):
            self.assertGreater(self.pulled('New')[0], 2)
        self.etc('purge New')
        old.chmod(0o644)
        linked.rename('blob')
        linked.symlink_to(self.tmp / 'blob')
        self.etc('pull New')
        self.assertEqual(stat.S_IMODE((self.here / 'New/data/test/x').stat().st_mode), 0o444)
        old.write_bytes(b'changed')
        remove('blob')
        self.etc('verify New')
        self.assertEqual(tree(self.here / 'New'), tree(self.new))

    def test_changed_meanwhile(self):
        """What is linked is what was hashed, whatever happens to the other dataset."""
        changed = Path('changed')
        shutil.copytree(self.old, changed, symlinks=True)
        self.share(write(changed, {'data/train/2': noise(UNIT, 22)}), 'Changed', home='pub')
        for words in ('purge Old', 'register --copy -f %s Old' % changed):
            changes = [words]
            etc.pull('New', config=self.config(), progress=lambda done, total: changes and self.etc(changes.pop()))
            self.assertEqual((changes, tree(self.here / 'New')), ([], tree(self.new)))
            self.etc('verify New')
            self.etc('purge New')
            self.etc('register --copy -f', self.old, 'Old')

    def test_interrupted(self):
        """What could be linked is linked again."""
        write(self.new, {'data/late/%d' % n: noise(UNIT, 50 + n) for n in range(20)})
        self.share(self.new, 'Long', home='pub')
        asked = itertools.count()
        self.server.fault = lambda handler: next(asked) > 5 and refusing(403, 'AccessDenied')(handler)
        self.etc('pull Long', status=1)
        self.server.fault = None
        self.assertLess(self.pulled('Long')[0], 21)
        self.assertEqual(self.leftovers(), [])


def refusing(status, code):
    """A fault of a server of S3."""
    return lambda handler: handler.error(status, code)


class PushReuse(Scaled, Shell, S3Case):
    """What archives in the bucket hold is copied there, and not sent."""

    archive = []  # type: list  # that of Old, which is pushed once

    def setUp(self):
        super().setUp()
        self.settings['compression_level'] = 0  # so that names can be found in the archive
        self.old = write('old', {'data/test/y': noise(11 * UNIT, 2), 'data/train/x': noise(12 * UNIT, 1),
                                            'data/val/z': noise(11 * UNIT, 3), 'README.md': 'one', 'assets/a': 'a'})
        self.register(self.old, 'Old')
        if not self.archive:
            self.etc('push Old')
            self.archive.append(self.server.objects['some/prefix/Old.tgz'])
        self.kept, = self.archive
        self.server.objects['some/prefix/Old.tgz'] = self.kept
        self.trees = {}  # of the archives that were pulled
        self.new = Path('new')
        shutil.copytree(self.old, self.new, copy_function=os.link)
        self.change('README.md', 'the second one')

    def change(self, name, content):
        remove(self.new / name)
        write(self.new, {name: content})
        self.etc('register -f', self.new, 'New')

    def restore(self, data=None, **others):
        """Let the bucket hold nothing but Old, with these bytes, and others."""
        self.server.objects = {'some/prefix/%s.tgz' % name: (content, '"%s"' % name, {})
                               for name, content in dict(others, Old=data or self.kept[0]).items()}
        self.server.copied = None
        self.server.uploads.clear()

    def pushed(self, words, fault=lambda handler: None):
        """Push; returns how many units were sent, and what was said. What is there must be what was to be pushed."""
        sent = []
        self.server.log.clear()
        self.server.fault = lambda handler: sent.append(int(handler.headers['Content-Length'] or 0)) or fault(handler)
        err = self.etc('push -v', words)[1]
        self.server.fault = None
        self.assertEqual(self.server.uploads, {})
        name = words.split()[-1]
        data = self.server.objects[self.url.split('/', 3)[3] + '/%s.tgz' % name][0]
        if data not in self.trees:
            self.etc('pull', name, home='other')
            self.trees[data] = tree('other/' + name)
            remove('other')
        self.assertEqual(self.trees[data], tree('home/' + name))
        return sum(sent) / UNIT, err

    def copies(self):
        return [path for _, path, headers in self.server.log if headers['x-amz-copy-source']]

    def test_what_is_new_is_sent(self):
        self.register(self.old, 'Renamed')
        for name in 'New', 'Renamed':
            with self.subTest(name):
                sent, err = self.pushed(name)
                self.assertLess(sent, 6)
                self.assertRegex(err, r'pushed %s to .*: 5 files, 2\.23 MB in [^(]*; 2\.23 MB were there' % name)
                self.assertTrue(self.copies())
        for name, size, most in (('data/test/y', 11, 17), ('data/train/x', 12, 23), ('data/val/z', 11, 17)):
            with self.subTest(name):
                self.restore()
                self.change(name, noise(size * UNIT, name))
                sent, err = self.pushed('New')
                self.assertTrue(size < sent < most, sent)
                self.change(name, (self.old / name).read_bytes())
        self.etc('register -f', self.new, 'Old')
        self.assertLess(self.pushed('-f Old')[0], 6)

    def test_several_sources(self):
        self.change('data/test/y', noise(11 * UNIT, 4))
        self.etc('push New')
        self.change('data/train/x', noise(12 * UNIT, 5))
        self.change('data/more/m', noise(UNIT, 6))
        self.register(self.new, 'Third')
        sent, err = self.pushed('Third')
        self.assertTrue(13 < sent < 22, sent)
        self.assertIn('; 1.44 MB were there already', err)

    def test_what_is_sent(self):
        """Other contents of the same size, and by force what is there already: it may be damaged where nobody looks."""
        for name, seed in (('data/train/x', 5), ('data/test/y', 6), ('data/val/z', 7)):
            self.change(name, noise((self.old / name).stat().st_size, seed))
        data, middle = self.kept[0], len(self.kept[0]) // 2
        self.restore(data[:middle] + bytes(UNIT) + data[middle + UNIT:])
        for words in 'New', '-f Old':
            with self.subTest(words):
                sent, err = self.pushed(words)
                self.assertTrue(34 < sent < 35, sent)
                self.assertNotIn('already', err)
        self.register(write('less', {'data/x/x': noise(16 * UNIT, 2)}), 'Less')
        self.pushed('Less')
        self.assertEqual([path for path in self.requests('GET') if 'Old' in path], [], 'it is not worth a look')

    def test_sources_that_cannot_be_read(self):
        """Archives of other tools, damaged ones, archived ones: none hinders a push."""
        data = self.kept[0]
        self.restore(Damaged=data[:-20] + bytes(20), Foreign=gzip.compress(data, 0), Empty=bytes(30 * UNIT))
        skip_pauses(self)

        def fault(handler):
            if handler.path.endswith('/Empty.tgz'):
                return refusing(403, 'InvalidObjectState')(handler)
            if handler.path.endswith('/Damaged.tgz'):
                handler.close_connection = True
                return True
        self.assertLess(self.pushed('New', fault=fault)[0], 6)

    def test_damaged_sources(self):
        """The ends of what would be copied are compared with the files before anything is copied."""
        data = self.kept[0]
        at, end = data.index(b'data/test/\0'), data.index(noise(11 * UNIT, 2)[-99:])
        for what, bad in (('first block', data[:at] + b'D' + data[at + 1:]),
                          ('last', data[:end] + b'D' + data[end + 1:]),
                          ('sound, but for its checksums', data.replace(b'data/test/y\0', b'data/test/z\0'))):
            with self.subTest(what):
                self.restore(bad)
                self.change('data/train/x', noise(12 * UNIT, 5))
                self.change('data/val/z', noise(11 * UNIT, 5))
                sent, err = self.pushed('New')
                self.assertGreater(sent, 33)
                self.assertNotIn('already', err)
                self.assertEqual(self.copies(), [])

    def test_stores_that_cannot_copy(self):
        """All is sent, and a line of -v tells why."""
        def replace(handler):
            self.server.objects['some/prefix/Old.tgz'] = self.kept[0], '"other"', {}

        def copy_all(handler):
            self.server.copied = lambda data, start, stop: data

        def store_nothing(handler):
            number = re.search(r'partNumber=(\d+)', handler.path).group(1)
            list(self.server.uploads.values())[0][1][int(number)] = b''
            handler.answer(200, b'', {'ETag': '"x"'})

        def no_etag(handler):
            handler.answer(200, b'<CopyPartResult><ETag/></CopyPartResult>')

        copying, completing = 'x-amz-copy-source', 'POST .*uploadId='
        for at, fault, said in (
                (copying, store_nothing, ''), (copying, no_etag, ''), (copying, copy_all, ''),
                (copying, refusing(200, 'InvalidRequest'), ''),
                (copying, refusing(403, 'AccessDenied'), '403 AccessDenied'),
                (copying, refusing(501, 'NotImplemented'), '501 NotImplemented'),
                ('list-type', refusing(403, 'AccessDenied'), '403'),
                (completing, refusing(400, 'PartsMustBeOfOneSize'), 'PartsMustBeOfOneSize'),  # as R2
                (copying, replace, '(replaced|412)'),
                (copying, lambda handler: self.server.objects.clear(), '(replaced|404)')):
            with self.subTest(said, fault=fault):
                self.restore()
                failed = []

                def once(handler):
                    line = '%s %s %s' % (handler.command, handler.path, handler.headers)
                    if re.search(at, line) and not (at == completing and failed):
                        failed.append(1)
                        return fault(handler)
                    if '501' in said and 'partNumber=2' in line and len(failed) < 5:  # which gets as many tries as ever
                        failed.append(1)
                        return refusing(503, 'SlowDown')(handler)
                sent, err = self.pushed('New', fault=once)
                self.assertGreater(sent, 33)
                self.assertRegex(err, 'etc: nothing is copied.*' + said)
                self.assertNotIn('already', err)

    def test_keys_that_some_stores_decode_twice(self):
        self.url = 's3://bucket/100%25/x'
        self.etc('push Old')
        self.assertGreater(self.pushed('New')[0], 33)
        self.assertEqual(self.copies(), [])

    def test_transient_errors_of_copies(self):
        """Which may come with status 200."""
        def fault(handler):
            if handler.headers['x-amz-copy-source'] and len(failed) < 3:
                failed.append(1)
                if len(failed) == 1:
                    handler.close_connection = True
                else:
                    handler.error(200 if len(failed) == 2 else 503, 'InternalError')
                return True
        failed = []
        self.assertLess(self.pushed('New', fault=fault)[0], 6)
        self.assertEqual(len(failed), 3)

    def test_damage_does_not_stay(self):
        """Whether or not the rest can be sent."""
        for refused, left, said in (('POST', ['Old'], '403 AccessDenied'),
                                    ('DELETE', ['New', 'Old'], "'etc push -f New' replaces it")):
            with self.subTest(refused):
                self.restore()
                self.server.copied = lambda data, start, stop: data[start:stop] + b'more'
                begun = itertools.count()

                def fault(handler):
                    if handler.path.endswith('?uploads=') and next(begun) or handler.command == refused == 'DELETE':
                        return refusing(403, 'AccessDenied')(handler)
                self.server.fault = fault
                self.fails_with(said, 'push New')
                self.assertEqual(sorted(key[12:-4] for key in self.server.objects), left)

    def test_damage_is_not_put_right_over_another_push(self):
        self.server.copied = lambda data, start, stop: data[start:stop] + b'more'

        def fault(handler):
            if handler.command == 'DELETE' and 'New' in handler.path and 'uploadId' not in handler.path:
                deleted.append(1)
            elif deleted:
                self.server.objects['some/prefix/New.tgz'] = self.kept
        deleted = []
        self.server.fault = fault
        self.fails_with("another 'New' is in", 'push -f New')
        self.assertEqual(self.server.objects['some/prefix/New.tgz'], self.kept)

    def test_another_push_is_faster(self):
        """It is said, and nothing is sent again, if it ends before this one copies, or before it looks at the end."""
        def overtake(handler):
            self.server.objects.update(then)
            return handler.command == 'POST' and handler.answer(200, COMPLETED % (b'', b'', b'', b'mine'))

        new = {'some/prefix/New.tgz': self.kept}
        for then, at_end, said in ((new, False, "another 'New' is in"),
                                   (new, True, "New' .*(another|replaced|overtaken)"),
                                   ({}, True, "New' .*(removed|gone|no longer)")):
            with self.subTest(said):
                self.restore()
                self.server.log.clear()
                if at_end:
                    self.server.final = lambda handler: (
                        self.server.objects.pop('some/prefix/New.tgz'), overtake(handler))
                else:
                    self.server.fault = lambda handler: handler.headers['x-amz-copy-source'] and overtake(handler)
                err = self.etc('push New', status=None)[1]
                self.server.final = self.server.fault = None
                self.assertTrue(self.copies())
                self.assertEqual((self.server.objects.get('some/prefix/New.tgz'), len(self.server.uploads)),
                                 (then.get('some/prefix/New.tgz'), 0))
                self.assertRegex(err, said)
                self.assertNotRegex(err, 'cannot reach|interrupted')
                self.assertEqual(sum('uploads' in path for path in self.requests('POST')), 1)

    def test_object_lock(self):
        self.server.must_check = True
        self.assertLess(self.pushed('New')[0], 11)  # the first part twice, as this is learned by a refusal

    @POSIX
    def test_killed(self):
        """At each request of a push: nothing, or all, is there, and the next push succeeds."""
        self.etc('register -f', self.new, 'New')
        self.server.log.clear()
        self.etc('push New')
        whole = self.server.objects['some/prefix/New.tgz'][0]
        for number in range(1, len(self.requests()) + 1, 1 if RUNS > 1 else 3):
            with self.subTest(number):
                self.restore()
                left = itertools.count(1)
                self.server.fault = lambda handler: next(left) == number and process.kill()
                process = self.spawn('--config settings.yaml push New')
                process.communicate()
                self.server.fault = None
                self.assertIn(self.server.objects.get('some/prefix/New.tgz', (None,))[0], (None, whole))
                self.etc('push New')
                self.assertEqual(self.server.objects['some/prefix/New.tgz'][0], whole)


class Disks(Scaled, Shell, Case):
    """File systems that cannot do all that is usual."""

    def setUp(self):
        super().setUp()
        self.share(odd(Path('ds'), 40), home='pub')
        self.here = Path('home')

    def preload(self, source):
        """Put functions in C before those of the system, in the processes that are spawned."""
        if sys.platform != 'linux' or not shutil.which('gcc'):
            self.skipTest('no gcc here')
        write('.', {'disk.c': source})
        subprocess.check_call('gcc -shared -fPIC -o disk.so disk.c -ldl'.split())
        os.environ['LD_PRELOAD'] = str(self.tmp / 'disk.so')

    def test_disk_without_modes_and_links(self):
        """As exFAT: all files are executable, and there are no symbolic links."""
        self.share(small('small'), 'Y', home='pub')
        self.preload(NO_MODES)
        no_links = "Operation not permitted; set 'home' to a place on another disk, or register with --copy"
        for words, said in (
                ('pull X', no_links), ('pull Y', 'pulled Y'),
                ('register ds', no_links),
                ('verify Y', 'unless this disk keeps no executable bits')):
            with self.subTest(words):
                self.assertIn(said, self.spawn(words).communicate()[1].decode())

    def test_disk_that_is_picky(self):
        """It opens no read-only file for writing, makes no hard links, and changes no modes."""
        self.preload(PICKY)
        for words in ('pull -p test X', 'pull X', 'pull -f X', 'verify X', 'register --copy ds Y', 'push Y', 'purge Y'):
            with self.subTest(words):
                process = self.spawn(words)
                self.assertEqual((process.communicate()[1][:5], process.returncode), (b'etc: ', 0))
        del os.environ['LD_PRELOAD']
        self.assertEqual(tree(self.here / 'X'), tree('ds'))

    @POSIX
    def test_files_are_read_only(self):
        """Even where opening them so is refused, but chmod is not."""
        opened = os.open
        self.addCleanup(setattr, os, 'open', opened)
        self.addCleanup(os.umask, os.umask(0o022))

        def picky(path, flags, mode=0o777, **kwargs):
            if flags & os.O_CREAT and not mode & 0o200:
                raise PermissionError(13, 'Permission denied', path)
            return opened(path, flags, mode, **kwargs)
        for os.open in opened, picky:
            self.etc('pull X')
            self.assertEqual(tree(self.here / 'X'), tree('ds'))
            for path in (self.here / 'X').rglob('*'):
                mode = 0o755 if path.is_dir() else 0o555 if path.name in ('run.sh', 'up') else 0o444
                self.assertEqual(stat.S_IMODE(path.stat().st_mode), mode, path)
            self.etc('purge X')

    def lock(self, place, mode=0o555):
        for path in [place] + list(place.rglob('*')):
            if path.is_dir() and not path.is_symlink():
                path.chmod(mode)

    @POSIX
    def test_read_only_store(self):
        self.etc('pull X')
        remove(self.here / '.etcetera/locks')
        self.etc('ls -r')  # writes the settings
        self.lock(self.here)
        self.addCleanup(self.lock, self.here, 0o755)
        problem = 'Permission denied: %s/' % (self.tmp / 'home')
        with unprivileged('settings.yaml'):
            for words, said in (('pull X', 'installed already'), ('ls', ''), ('verify X', 'unchanged')):
                self.assertIn(said, self.etc(words)[1])
            self.assertEqual(len(etc.dataset('X', auto_install=True, config=self.config())), 3)
            for words in ('pull -f X', 'purge X', 'create Y', 'register ds Y', 'register -f ds X',
                          'register --copy ds Y'):
                self.fails_with(problem, words)
        self.assertEqual(tree(self.here / 'X'), tree('ds'))

    @POSIX
    def test_read_only_directories_are_replaced(self):
        """And what was private stays private."""
        self.etc('pull -p test X')
        with unprivileged('.'):
            for words in 'pull X', 'pull -f X', 'purge X':
                self.lock(self.here / 'X', 0o500)
                self.etc(words)
                for data in (self.here / '.etcetera').rglob('data'):
                    self.assertEqual(stat.S_IMODE(data.parent.stat().st_mode), 0o700)
        self.nothing_is_left()

    def test_directories_of_an_image(self):
        """As in a container, where overlayfs renames none: they are emptied before others take their places."""
        self.etc('pull -p test X', home='image')
        self.etc('register --copy', small('small'), 'Y', home='image')
        script = '''
            mkdir over home
            mount -t tmpfs tmpfs over && mkdir over/upper over/work || exit 77
            mount -t overlay overlay -o lowerdir=image,upperdir=over/upper,workdir=over/work home || exit 77
            ! "%s" -S -c 'import os; os.rename("home/X", "home/Z")' 2>/dev/null || exit 77
            etc() { echo "$*"; "%s" -S -c "%s" --url "%s" --home home "$@" || echo failed; }
            etc pull -p train X; etc verify X; etc register --copy -f ds Y; etc verify Y
            etc purge X; etc ls; etc pull X; etc verify X; etc pull -f X; etc purge Y; etc ls
            ''' % (sys.executable, sys.executable, START % self.sizes, self.url)
        if not shutil.which('unshare'):
            self.skipTest('nothing can be mounted here')
        done = subprocess.run(['unshare', '-m', 'sh', '-ec', script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 77 or done.stdout.startswith(b'unshare'):
            self.skipTest('nothing can be mounted here')
        self.assertRegex(done.stdout.decode(), ''.join((
            '\\Apull -p train X\n.*; .* were there already\n', 'verify X\n.*unchanged.*\n', 'register .*\n.*copied.*\n',
            'verify Y\n.*unchanged.*\n', 'purge X\n.*\n', 'ls\nY\n',
            'pull X\n.*pulled X.*\n', 'verify X\n.*\n', 'pull -f X\n.*\n', 'purge Y\n.*\n', 'ls\nX\n\\Z')))


@POSIX
class Kills(Scaled, Shell, S3Case):
    """kill -9 at random moments: what stands under a name is what stood there before, or what was to come, whole."""

    # what is installed and remote before, what may be installed and remote after: in the bucket, in the directory
    OPERATIONS = """
        push X                  s3    two -    two      -,- two,-
        push X                  file  two -    two      -,- -,two
        push -f X               s3    two one  two      one,one two,one
        push -f X               file  two one  two      one,one one,two
        pull X                  s3    -   two  -|two    two,two
        pull X                  file  -   two  -|two    two,two
        pull -f X               s3    one two  one|two  two,two
        register --copy two X   s3    -   -    -|two    -,-
        register --copy -f two X s3   one -    one|two  -,-
        purge X                 s3    two -    two|-    -,-
        """

    def setUp(self):
        super().setUp()
        self.urls = {'s3': self.url, 'file': (self.tmp / 'share').as_uri()}
        self.trees, self.archives = {'-': {}}, {'-': None}
        for version in 'one', 'two':
            files = {'data/train/%02d' % n: noise(10000, '%s %d' % (version, n)) for n in range(30)}
            root = write(version, dict(files, **{
                'data/test/noise': noise(6 * UNIT, version), 'meta.json': '{"v": "%s"}' % version,
                'data/train/00': 'shared'}))
            self.register(root, home='maker-' + version)
            self.etc('push X', home='maker-' + version, url=self.urls['file'])
            self.trees[version] = tree(root)
            self.archives[version] = Path('share/X.tgz').read_bytes()
            remove('share/X.tgz')
        self.etc('register --copy', small('other'), 'Other')

    def prepare(self, local, remote):
        """Let the store and both remotes hold these versions."""
        if 'X' in self.installed():
            self.etc('purge X')
        if local != '-':
            self.etc('register --copy', local, 'X')
        self.server.uploads.clear()
        self.server.objects.clear()
        remove('share')
        write('.', {'share': None})
        if remote != '-':
            self.server.objects['some/prefix/X.tgz'] = self.archives[remote], '"%s"' % remote, {}
            write('share', {'X.tgz': self.archives[remote]})

    def local(self):
        """The version that is installed; it must be one, and verify."""
        names = set(self.installed())
        self.assertTrue({'Other'} <= names <= {'X', 'Other', 'Z'})
        self.assertEqual('X' in names, os.path.lexists('home/X'))
        for name in names - {'Z'}:
            self.etc('verify', name)
        found = tree('home/X')
        return [version for version in self.trees if self.trees[version] == found][0]

    def remotes(self):
        path = Path('share/X.tgz')
        self.assertLessEqual(set(self.server.objects), {'some/prefix/X.tgz'})
        both = self.server.objects.get('some/prefix/X.tgz', [None])[0], path.read_bytes() if path.exists() else None
        return ','.join(version for data in both for version in self.archives if self.archives[version] == data)

    def signature(self):
        """What a change to the store or the share would alter."""
        for name in ('home/X', 'home/X/data', 'home/X/data/train', 'share', 'share/X.tgz'):
            try:
                status = os.lstat(name)
                yield status.st_ino, status.st_mtime_ns, status.st_size
            except OSError:
                yield None

    def kill(self, process, rng, lasts):
        """At a moment within its usual running time, at a request, or at a change of files."""
        how = rng.choice(['moment', 'change', 'request'])
        if how == 'request':
            requests, last = itertools.count(1), rng.randrange(1, 9)
            self.server.fault = lambda handler: next(requests) == last and process.kill()
        if how == 'change':
            changes, before = rng.choice([1, 1, 2, 3]), list(self.signature())
            while process.poll() is None and changes:
                now = list(self.signature())
                changes, before = changes - (now != before), now
                time.sleep(0.001)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.25, 1.05) * lasts)
        process.kill()
        process.communicate()
        self.server.fault = None
        return process.returncode == -signal.SIGKILL

    def test_kills(self):
        killed = 0
        for line in self.OPERATIONS.strip().splitlines():
            words, before_and_after = re.split(r' +(?=(?:s3|file) )', line.strip())
            where, local, remote, locals_, *remotes = before_and_after.split()
            self.prepare(local, remote)
            begin = time.time()
            self.spawn(words, url=self.urls[where]).communicate()
            lasts = time.time() - begin
            for seed in range(RUNS):
                self.prepare(local, remote)
                with self.subTest(line, seed=seed):
                    killed += self.kill(self.spawn(words, url=self.urls[where]), random.Random(line + str(seed)), lasts)
                    found = self.local()
                    self.assertIn(found, locals_.split('|'))
                    self.assertIn(self.remotes(), remotes)
                    # all but -f say so if there is nothing left to do
                    done = {'register --copy two X': 'two', 'purge X': '-'}.get(words) == found
                    err = self.etc(words, url=self.urls[where], status=int(done))[1]
                    self.assertRegex(err, "another 'X' is installed|no local dataset 'X';" if done else 'etc: ')
                    self.assertEqual((self.local(), self.remotes()), (locals_.split('|')[-1], remotes[-1]))
                    self.etc('create -f Z')
                    self.assertEqual(self.leftovers(), [])
        self.assertGreater(killed, 2 * RUNS, 'most shall be killed before they end')


# ---------------------------------------------------------------------------------------
# Locked-down interpreters
# ---------------------------------------------------------------------------------------

class Locked(Scaled, Shell):
    """Each command works, and says nothing it should not, where much of Python and of a user's surroundings is missing.

    Subclasses set `url` and `settings`, and put(name, data) stores an object behind etcetera's back.
    """

    COMMANDS = [line.split(None, 1) for line in """
        home register --copy ds X
        home push X
        home push X
        home ls -r
        home info -r X
        two  pull -p test X
        two  pull -f X
        two  pull Bad
        two  pull Nope
        two  verify X
        home purge X
        """.strip().splitlines()]
    FAILED = {'pull Bad': "'Bad' in [^\n]*: the archive is damaged: its index is missing;",
              'pull Nope': "no dataset 'Nope' in "}

    def setUp(self):
        super().setUp()
        self.put('Bad.tgz', block(bytes(1024)) * 3)
        odd(Path('ds'), 3)

    def all_commands(self, flags, before=''):
        """Run them in one such interpreter, after some lines."""
        program = before + """
import gc, io, json
sys.stdout = io.StringIO()
import etcetera
config, url, commands, failing, sizes = sys.argv[1:]
vars(etcetera).update(json.loads(sizes))
for home, words in json.loads(commands):
    found = etcetera.main(['--config', config, '-q', '--url', url, '--home', home] + words.split())
    assert found == (words in failing), (words, found)
    assert 'train' in sys.stdout.getvalue() or 'info' not in words
    gc.collect()
"""
        self.etc('ls')  # writes the settings
        code, out = run_python(program, 'settings.yaml', self.url, json.dumps(self.COMMANDS), list(self.FAILED),
                               json.dumps(self.sizes), flags=flags, stdin=subprocess.DEVNULL, start_new_session=True)
        self.assertEqual(code, 0, out)
        self.assertRegex(out, r'\Aetc: %s[^\n]+\netc: %s[^\n]+\n\Z' % tuple(self.FAILED.values()))
        self.assertEqual(tree('two/X'), tree('ds'))

    def test_strict_interpreter(self):
        os.environ.update(LC_ALL='C', LANG='C')
        self.all_commands(['-I', '-S', '-bb', '-W', 'error'] + ['-X', 'dev'] * (sys.version_info >= (3, 7)))

    def test_what_is_missing(self):
        """No ssl, no fcntl, no ctypes, no MD5, no $HOME, no entry in the passwords file, no terminal, no stdin."""
        self.all_commands(['-I', '-S', '-W', 'error'], """
import hashlib
def refuse(*args, **kwargs):
    raise ValueError('disabled for FIPS')
for name in ('ssl', '_ssl', 'fcntl', 'ctypes', '_ctypes'):
    sys.modules[name] = None
hashlib.md5 = refuse
os.environ.pop('HOME', None)
try:
    import pwd
    def nobody(uid):
        raise KeyError('getpwuid(): uid not found: %d' % uid)
    pwd.getpwuid = nobody
except ImportError:
    pass
""")


class FileLocked(Locked, Case):
    def put(self, name, data):
        write('share', {name: data})


class S3Locked(Locked, S3Case):
    pass


class GsLocked(Locked, GsCase):
    pass


# ---------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------

class Hush(Shell):
    """Runs commands with -v and looks for secrets wherever they could come to light."""

    secrets = ()  # type: tuple

    def setUp(self):
        super().setUp()
        self.said = []
        stand_in(self, time, 'sleep', lambda seconds: None)
        logger = logging.getLogger('etcetera')
        handler = logging.Handler()
        handler.emit = lambda record: self.said.append(record.getMessage())
        logger.addHandler(handler)
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.DEBUG)
        self.addCleanup(logger.removeHandler, handler)

    def type(self, *words):
        """Run the command line; its exit status, and what it says last."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter('ignore', ResourceWarning)  # of sockets, told whenever they are collected
            try:
                code = etc.main(list(words))
            except SystemExit as e:
                code = e.code
        self.said += [out.getvalue(), err.getvalue()]
        return code, (err.getvalue().splitlines() or [''])[-1]

    def everything(self, problem, least=1):
        """All commands, in both ways, of which so many fail, and say that there is this problem."""
        del self.said[:]
        lines = ['%s: %s\n' % (key, json.dumps(value)) for key, value in self.settings.items()]
        write('.', {'settings.yaml': ''.join(lines)})
        os.chmod('settings.yaml', 0o600)
        remove('two')
        small('ds')
        failed, place = 0, ['-v', '--config', 'settings.yaml', '--url', self.url, '--home', 'home']
        for words in ('register -f ds X', 'push -f X', 'push X', 'ls -rl', 'info -r X', '--home two pull X',
                      '--home two verify X', 'pull Nope'):
            code, last = self.type(*place + words.split())
            self.assertIn(code, (0, 1), last)
            if code:
                self.assertRegex(last, problem + "|no local dataset 'X'" * ('verify' in words))
            failed += code
        self.assertGreaterEqual(failed, least)
        with self.heard():
            config = self.config()
            self.said += [repr(config), str(config)]
            for function, args in ((etc.ls, [True]), (etc.info, ['X', True]), (etc.push, ['X', True]),
                                   (etc.pull, ['X', True])):
                with self.heard():
                    self.said.append(repr(function(*args, config=config)))
        self.search()

    @contextlib.contextmanager
    def heard(self):
        """Note all that an error tells."""
        try:
            yield
        except etc.Error as e:
            while e is not None:
                self.said += [str(e), repr(e), repr(vars(e))] + traceback.format_exception(type(e), e, e.__traceback__)
                e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)

    def search(self):
        for path in Path('.').rglob('*'):
            if path.is_file() and path.parts[0] not in ('settings.yaml', '.aws', 'key.json'):
                self.said.append(path.read_bytes().decode('latin-1'))
        for text in self.said:
            for secret in self.secrets:
                self.assertNotIn(secret, text)
        del self.said[:]


class Secrets(Hush, S3Case):
    secrets = SECRET, 'wJalrXUtnFEMI', 'session/hush', 'hush'
    NOPE, WRONG = "no dataset 'Nope' in", 'aws_secret_access_key is missing, or holds characters that it cannot have'

    def test_settings_and_environment(self):
        self.settings['aws_session_token'] = 'session/hush'
        self.everything(self.NOPE)
        for value, problem in (('hu\\nhush', '403 SignatureDoesNotMatch'), (5, "'aws_secret_access_key' must be text"),
                               (['hush'], 'this YAML syntax is not supported'), ('hush\u00e9', self.WRONG)):
            with self.subTest(value):
                self.settings['aws_secret_access_key'] = value
                self.everything(problem, 6)
        os.environ.update(AWS_ACCESS_KEY_ID=AKID, AWS_SESSION_TOKEN='session/hush')
        self.settings = {'endpoint_url': self.server.url}
        for value, problem, least in ((SECRET, self.NOPE, 1), ('hush\nhush', self.WRONG, 6),
                                      ('hush\u00e9', self.WRONG, 6), ('hush hush', self.WRONG, 6),
                                      ('hush', '403 SignatureDoesNotMatch', 6)):
            with self.subTest(value):
                os.environ['AWS_SECRET_ACCESS_KEY'] = value
                self.everything(problem, least)

    def test_files(self):
        keys = '[default]\naws_access_key_id = %s\n' % AKID
        unreadable = 'credentials cannot be read as an AWS settings file'
        self.settings = {'endpoint_url': self.server.url}
        for text, problem, least in (
                (keys + 'aws_secret_access_key = %s\naws_session_token = session/hush' % SECRET, self.NOPE, 1),
                ('[default]\naws_secret_access_key = hush', 'aws_access_key_id is missing', 6),
                ('hush', unreadable, 6), ('[default\nhush = hush', unreadable, 6), (keys + 'hush\nhush', unreadable, 6),
                (keys + 'aws_secret_access_key = hu\u00e9hush', self.WRONG, 6)):
            with self.subTest(text):
                write('.', {'.aws/credentials': text})
                self.everything(problem, least)

    def test_settings_that_cannot_be_read(self):
        path = Path('settings.yaml')
        for line in ('aws_secret_access_key: "hush|1: this YAML syntax is not supported',
                     'aws_secret_access_key: [hush]|1: this YAML syntax is not supported',
                     'aws_secret_access_key: hush: hush|1: this YAML syntax is not supported',
                     "hush|1: not of the form 'key: value'",
                     'aws_secret_access_key: "\\hush"|1: this YAML syntax is not supported',
                     "aws_secret_key: hush|1: unknown setting 'aws_secret_key'",
                     "aws_session_token: hush\naws_session_token: hush|2: 'aws_session_token' is set a second time"):
            with self.subTest(line):
                text, problem = line.split('|')
                path.write_text(text + '\n')
                code, last = self.type('-v', '--config', 'settings.yaml', '--url', self.url, 'ls', '-r')
                self.assertEqual((code, 'settings.yaml:' + problem in last), (1, True), last)
                with self.heard():
                    etc.Config.load(path)
                self.search()

    def test_answers(self):
        """Whatever a server says, and wherever it breaks off."""
        self.settings['aws_session_token'] = 'session/hush'
        for status in (301, 400, 401, 403, 404, 409, 412, 500, 503):
            def fault(handler):
                xml = ('<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message>'
                       '<StringToSign>%s</StringToSign></Error>')
                told, location = escape(str(handler.headers)), {'Location': self.server.url + '/elsewhere'}
                handler.answer(status, (xml % told).encode(), location)
            with self.subTest(status):
                self.server.fault = fault
                self.everything("answers %d SignatureDoesNotMatch: no;|no dataset '" % status, 6)
        self.server.fault = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR) or True
        self.everything('cannot reach ' + self.server.url, 6)
        self.server.fault = lambda handler: handler.answer(200, str(handler.headers).encode())
        self.everything('does not (list its objects|answer with the range that was asked for)', 5)


# what stands between the marks of a secret
MARKS = '/ # @ \u00e9 \n'.split(' ')
if RUNS > 1:  # all of them take minutes
    MARKS += "+/ = ? : %2F ' :1/ ://".split() + [' ', '", "', '/' + 'x' * 300]


def some(rows):
    """Each of these with all marks, or, as that takes long, with two of them in turn."""
    for number, row in enumerate(rows):
        for mark in MARKS if RUNS > 1 else [MARKS[number % 5], MARKS[number % 5 - 3]]:
            yield mark, row


class Places(Hush, S3Case):
    """Secrets where a URL, a path, a name or a choice should be: nothing printed, kept or sent may tell them."""

    secrets = '1hush', '2HUSH', '3hush'

    def setUp(self):
        super().setUp()
        os.environ.update(ETC_HOME='home', ETC_URL=self.url, AWS_ENDPOINT_URL=self.server.url,
                          NO_GCE_CHECK='true', AWS_ACCESS_KEY_ID=AKID, AWS_SECRET_ACCESS_KEY=SECRET)
        self.settings = {}
        write('.', {'file': 'x'})
        etc.register(small('ds'), 'X')

    def told(self, words, status, says, env=(), sent=True):
        """Let the command line, at each verbosity, and the API say what they say, and look for secrets there."""
        del self.said[:], self.server.log[:]
        saved = dict(os.environ)
        os.environ.update(env)
        try:
            for verbosity in ([], ['-v'], ['-q']):
                code, last = self.type(*verbosity + words)
                self.assertEqual(code, status, last)
                self.assertRegex(last if code else '', says or r'\A\Z')
            self.assertEqual(self.said[-1].count('\n'), status, last)
            with self.heard():
                config = etc.Config.load(**self.settings)
                self.said.append(repr(config))
                etc.ls(True, config)
        finally:
            os.environ.clear()
            os.environ.update(saved)
        self.said += ['%s %s\n%s' % item for item in self.server.log if sent]
        self.search()

    def everywhere(self, table, words=('ls', '-r'), more='', says=''):
        """table: lines with a variable or setting, =, its value (% is a secret), other variables, |, what is said."""
        for mark, line in some(table.strip().splitlines()):
            with self.subTest(line, mark=mark, more=more):
                variables, _, said = line.partition('|')
                pairs = [pair.split('=', 1) for pair in (variables + more).split()]
                name, value = pairs[0][0], pairs[0][1].replace('%', mark.join(self.secrets))
                self.settings = {name: value} if name.islower() else {}
                write('.', {'settings.yaml': ''.join('%s: %s' % (key, json.dumps(value)) for key in self.settings)})
                Path('settings.yaml').chmod(0o600)
                env = dict(pairs[1:], **{'ETC_CONFIG' if self.settings else name:
                                         'settings.yaml' if self.settings else value})
                if mark == '\n' and (name.islower() or name in ('ETC_URL', 'ETC_HOME')):
                    said = 'must be text that can be printed'
                self.told(list(words), 1, said.strip() or says, env)

    KEYLESS = ' AWS_ACCESS_KEY_ID= AWS_SECRET_ACCESS_KEY='

    def test_paths_and_choices(self):
        self.everywhere(r"""
            AWS_WEB_IDENTITY_TOKEN_FILE=% AWS_ROLE_ARN=arn:aws:iam::1:role/x     | \$AWS_WEB_IDENTITY_TOKEN_FILE names:
            AWS_ROLE_ARN=% AWS_WEB_IDENTITY_TOKEN_FILE=file                      | \$AWS_ROLE_ARN
            AWS_SHARED_CREDENTIALS_FILE=%                                        | no credentials were found
            AWS_CONFIG_FILE=%                                                    | no credentials were found
            """, more=self.KEYLESS)
        full_uri = ' AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:1/'
        self.everywhere('AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=% | TOKEN_FILE names:', more=full_uri + self.KEYLESS)
        self.everywhere(r"""
            GOOGLE_APPLICATION_CREDENTIALS=% ETC_URL=gs://bucket AWS_ENDPOINT_URL= | \$GOOGLE_APPLICATION_CREDENTIALS
            google_credentials=% ETC_URL=gs://bucket AWS_ENDPOINT_URL=           | google_credentials
            AWS_CA_BUNDLE=% AWS_ENDPOINT_URL=https://127.0.0.1:1                 | \$AWS_CA_BUNDLE
            ca_bundle=% AWS_ENDPOINT_URL=https://127.0.0.1:1                     | ca_bundle
            ETC_CONFIG=%                                                         | HERE/\.\.\.
            ETC_CONFIG=file/%                                                    | HERE/file/\.\.\.
            AWS_PROFILE=%                                                        | \$AWS_PROFILE
            aws_profile=%                                                        | aws_profile
            AWS_REGION=%                                                         | \$AWS_REGION
            region=%                                                             | 'region'
            request_payer=%\u20ac                                               | invalid characters
            """.replace('HERE', str(self.tmp)).replace(r'\u20ac', '\u20ac'))
        self.everywhere('storage_class=%\u20ac\nsse=%\u20ac\nsse_kms_key_id=%\u20ac', ['push', '-f', 'X'],
                        says='invalid characters')
        etc.push('X')  # or pull would not come to look at the home
        for words in ('ls', 'push X', 'pull X', 'create Y', 'register ds Y'):
            self.everywhere('ETC_HOME=HERE/file/%\nhome=HERE/file/% ETC_HOME='.replace('HERE', str(self.tmp)),
                            words.split(), says=r"%s/file/\.\.\.|no local dataset 'X'" % self.tmp)

    def test_urls(self):
        """Passwords and signatures in URLs, and keys instead of URLs."""
        for name in 'ETC_URL', 'url':
            self.everywhere("""
                NAME=%                            | it must start with
                NAME=https://user:%@127.0.0.1:1/x | user or password
                NAME=https://user:x%@127.0.0.1:1/ | user or password
                NAME=https://127.0.0.1:1/x?sig=%  | the url
                NAME=https://127.0.0.1:1/x#%      | the url
                NAME=s3://user:%@bucket           | is not of the form
                NAME=gs://user:%@bucket/x         | is not of the form
                NAME=ftp://user:%@127.0.0.1:1/x   | it must start with
                NAME=file://user:%@host/x         | is no absolute path
                """.replace('NAME', name), more='' if name == 'ETC_URL' else ' ETC_URL= AWS_ENDPOINT_URL=')
        for name, more in (('endpoint_url', ''), ('AWS_ENDPOINT_URL', ''), ('AWS_ENDPOINT_URL_S3', ''),
                           ('STORAGE_EMULATOR_HOST', ' ETC_URL=gs://bucket'),
                           ('AWS_EC2_METADATA_SERVICE_ENDPOINT', self.KEYLESS + ' AWS_EC2_METADATA_DISABLED=')):
            self.everywhere('NAME=http://user:%@127.0.0.1:1\nNAME=http://127.0.0.1:1/?sig=%'.replace(
                'NAME', name), more=more, says='does not have the form|cannot reach|no credentials were found')
        for name, more in ('endpoint_url', ''), ('AWS_ENDPOINT_URL', ''):
            self.everywhere(name + '=%', more=more, says='does not have the form')
        self.everywhere(r"""
            AWS_CONTAINER_CREDENTIALS_FULL_URI=http://user:%@127.0.0.1:1/
            AWS_CONTAINER_CREDENTIALS_FULL_URI=https://user:%@127.0.0.1:1/
            AWS_CONTAINER_CREDENTIALS_FULL_URI=%
            AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:1/?%
            AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:1/%
            AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=:%
            AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=@%
            AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=%
            """, more=self.KEYLESS, says=r'\$AWS_CONTAINER_CREDENTIALS_(FULL_URI must begin with https://|'
                                         r'RELATIVE_URI must be a path)|does not have the form https://host|'
                                         r'cannot reach http://127\.0\.0\.1:1: ')

    def test_queries_that_are_legal(self):
        """In the name of a "directory" of a bucket."""
        for mark, url in some(('s3://bucket/x?sig=%s', 's3://bucket/x#%s', 's3://bucket/user:%s@x')):
            if mark != '\n':
                self.server.objects.clear()
                os.environ['ETC_URL'] = url % mark.join(self.secrets)
                for words in ('push X', 'push X', 'ls -rl', 'info -r X', '--home two pull X', '--home two info X',
                              '--home two ls -l', 'pull Nope'):
                    with self.subTest(words, mark=mark, url=url):
                        nope = "no dataset 'Nope' in s3://" if 'Nope' in words else ''
                        self.told(words.split(), int(bool(nope)), nope, sent=False)

    def test_proxies(self):
        """A password may have any character; what is no plain proxy is asked nothing."""
        proxy = Server(Recorder, self)
        bad = ('https://user:%@PROXY socks5://user:%@PROXY socks5h://PROXY/% http://user:%@ user:%@127.0.0.1:x '
               'http://user:%@127.0.0.1:99999 http://user:%@[')
        for mark, (template, scheme) in some(itertools.product(
                bad.split() + ['http://user:%@PROXY/'], ('http', 'https'))):
            secret, is_bad = mark.join(self.secrets), template in bad
            if is_bad or mark != '\n':
                with self.subTest(template, mark=mark, scheme=scheme):
                    says = (scheme + '_proxy is not of the form http://' if is_bad else
                            'does not list its objects|cannot reach https://')
                    value = template.replace('%', secret).replace('PROXY', proxy.url[len('http://'):])
                    self.told(['ls', '-r'], 1, says, {
                        'no_proxy': '', 'AWS_ENDPOINT_URL': scheme + '://storage.invalid', scheme + '_proxy': value})
                    if is_bad:
                        self.assertEqual(proxy.log, [])
                    elif scheme == 'http':
                        sent = re.search('Proxy-Authorization: Basic (.*)', proxy.log[0]).group(1)
                        self.assertEqual(base64.b64decode(sent).decode(), 'user:' + urllib.parse.unquote(secret))
                    del proxy.log[:]

    WORDS = """
        pull %                 | cannot be a dataset's name
        pull X %               | cannot be a dataset's name
        push %                 | cannot be a dataset's name
        info %                 | cannot be a dataset's name
        info -r %              | cannot be a dataset's name
        diff X %               | cannot be a dataset's name
        diff -r % X            | cannot be a dataset's name
        purge %                | cannot be a dataset's name
        verify %               | cannot be a dataset's name
        create %               | cannot be a dataset's name
        register ds %          | cannot be a dataset's name
        register ds as %       | cannot be a dataset's name
        register %             | no directory
        register % Y           | no directory
        register % ds          | no directory
        diff X X %             | usage: etc diff
        ls %                   | no dataset .* matches
        %                      | argument COMMAND
        pull X --ulr=%         | usage: etc pull|cannot be a dataset's name
        pull X --force=%       | argument -f/--force
        --%                    | argument COMMAND|after SIGHUP
        -x%                    | argument COMMAND|after SIGHUP
        --co=% ls              | cannot read the settings file|usage: etc ls
        --config % ls          | cannot read the settings file
        --config file/% ls     | cannot read the settings file
        --home file/% create Y | Not a directory: |'home' must
        --url % ls -r          | the url[ ;]|'url' must
        pull X -p %            | no partition
        create -f Y a %/       | cannot be a partition's name
        """

    def test_words(self):
        """On the command line: what is typed is shown, but URLs without password and query."""
        etc.push('X')  # or pull would not come to look at partitions
        templates = '''https://user:%s@127.0.0.1:1/x s3://user:%s@bucket https://127.0.0.1/x?sig=%s
                       user:%s@127.0.0.1 https://%s@127.0.0.1 https://127.0.0.1/x#token=%s'''.split()
        for mark, (template, row) in some(itertools.product(templates, self.WORDS.strip().splitlines())):
            word = template % mark.join(self.secrets)
            line, says = row.split('|', 1)
            with self.subTest(line, word=word):
                code, last = self.type('-v', *[part.replace('%', word) for part in line.split()])
                self.assertIn(code, (1, 2))
                self.assertRegex(last, says.strip())  # below the traceback
                for secret in self.secrets:
                    self.assertNotIn(secret, ''.join(self.said))
                del self.said[:]


class GoogleSecrets(Hush, GoogleCase):
    secrets = 'ya29.token', 'hush'

    def test_credentials(self):
        os.environ['PATH'] = ''  # so that there is no gcloud
        self.tokens.respond = lambda handler, form: {'access_token': 'ya29.token', 'expires_in': 3600}
        user = self.user(client_secret='hush', refresh_token='hush')
        account = {'type': 'service_account', 'client_email': 'e', 'token_uri': self.tokens.url}
        pem = '-----BEGIN PRIVATE KEY-----\nhush\n-----END PRIVATE KEY-----'
        others = {'token_url': 'http://user:hush@127.0.0.1:1/x?key=hush', 'client_secret': 'hush'}
        nope, none = "no dataset 'Nope' in", 'key.json holds no Google credentials;'
        unused = 'key.json cannot be used: '
        cases = [(user, nope), (dict(user, refresh_token=['hush']), nope),
                 (dict(user, token_uri='nonsense'), 'a URL from the settings, '),
                 (dict(account, private_key='hush'), unused),
                 (dict(account, private_key=['hush']), unused),
                 (dict(account, private_key=pem), unused),
                 (['hush'], none), ({'private_key': 'hush'}, none),
                 ({'type': 'service_account', 'private_key': 'hush'}, unused),
                 (dict(others, type='external_account'), '.'), (dict(others, type='odd'), '.')]
        for secret in ('hush\nX: y', 'hush\u20ac', 'hu/sh@hush#hush?hush'):
            url = 'http://user:%s@127.0.0.1:1/x?key=%s' % (secret, secret)
            cases += [(dict(user, token_uri=url), 'does not have the form|cannot reach http://127.0.0.1:1: '),
                      (dict(user, token_uri=secret), 'a URL from the settings, '),
                      (dict(user, quota_project_id=secret + '\n'),
                       'a header for http://.* contains invalid characters')]
        for info, problem in cases:
            with self.subTest(info=info):
                self.use(info)
                self.everything(problem, 1 if problem == nope else 6)
        Path('key.json').write_text('{"type": "authorized_user", "refresh_token": "hush')
        self.everything(none, 6)

    def test_answers(self):
        self.use(self.user(client_secret='hush', refresh_token='hush'))
        good = {'access_token': 'ya29.token', 'expires_in': 3600}
        for answer, problem in ((dict(good, access_token='hu\nsh hush'), "cannot be used: "),
                                (dict(good, access_token='hush\u20ac'), "cannot be used: "),
                                (dict(good, access_token=['hush']), 'cannot be used: '),
                                (dict(good, expires_in='soon'), 'cannot be used: '), (['hush'], 'cannot be used: '),
                                ({'hush': 1}, "cannot be used: "), ('no', 'gives no access token: 400: no;')):
            with self.subTest(answer):
                self.tokens.respond = lambda handler, form: answer
                self.everything(problem, 6)
        self.tokens.respond = lambda handler, form: good
        for status in (301, 308, 400, 401, 403, 404, 412, 500):
            with self.subTest(status):
                location = {'Location': self.server.url + '/x'}
                self.server.fault = lambda handler: handler.json({'error': {'message': 'no'}}, status, location)
                self.everything('answers %d: no;|no dataset' % status, 6)


# ---------------------------------------------------------------------------------------
# As a file to copy, pipe, vendor and import
# ---------------------------------------------------------------------------------------

def on_terminal(*words, columns=80, term='xterm', answers=(), meanwhile=lambda: None, **streams):
    """Run a command on a terminal; its exit status, and what it shows. Each answer is typed when it asks."""
    import fcntl
    import pty
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    streams = dict(dict.fromkeys(('stdin', 'stdout', 'stderr'), theirs), **streams)
    process = subprocess.Popen(
        [sys.executable, '-S', '-c', START % {}, *split(words)], env=dict(os.environ, TERM=term),
        preexec_fn=lambda: (default_signals(), fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)),
        start_new_session=True, **streams)
    os.close(theirs)
    guards = [threading.Timer(60, process.kill)]
    if b'\x03' in answers:  # which is lost if it comes just before the program begins to wait
        guards.append(threading.Timer(15, process.send_signal, (signal.SIGINT,)))
    for guard in guards:
        guard.start()
    shown, answers = b'', list(answers)
    with open(ours, 'r+b', 0) as file, contextlib.suppress(OSError):  # EIO when the terminal is closed
        for data in iter(lambda: file.read(4096), b''):
            shown += data
            if answers and shown.endswith(b'[y/N] '):
                meanwhile()
                file.write(answers.pop(0))
    for guard in guards:
        guard.cancel()
    return process.wait(), shown.decode('utf-8', 'replace').replace('\r\n', '\n')


class Progress(Shell, Case):
    def told(self, function, *args, home='home'):
        """What `progress` is told in the end, after a look whether all of it makes sense."""
        calls, here = [], threading.get_ident()

        def progress(done, total):
            self.assertTrue(0 <= done <= total and threading.get_ident() == here)
            self.assertTrue(not calls or done >= calls[-1][0] or total != calls[-1][1])  # of a phase
            calls.append((done, total))
        function(*args, progress=progress, config=self.config(home))
        self.assertEqual(calls[-1][0], calls[-1][1])
        return calls[-1][0]

    def test_api(self):
        root = odd(Path('ds'), 20)
        self.register(root)
        size = etc.info('X', config=self.config())['size']
        self.assertEqual(self.told(etc.push, 'X'), size)
        with tarfile.open('share/Foreign.tgz', 'w:gz') as tar:
            tar.add(root, '.')
        archive = os.path.getsize('share/X.tgz')
        for home, function, args, least, most in (
                ('two', etc.pull, ['X'], archive - 4096, archive),
                ('three', etc.pull, ['X', False, ['empty']], 1, 4096),
                ('three', etc.dataset, ['X', True], archive - 8192, archive),
                ('two', etc.pull, ['Foreign'], size, size), ('two', etc.verify, ['X'], size, size),
                ('home', etc.diff, ['X', 'X', (True, False)], size, size),  # registered here, so it must be read
                ('home', etc.register, [root, 'Y', False, True], size, size)):
            with self.subTest(function.__name__, args=args):
                self.assertTrue(least <= self.told(function, *args, home=home) <= most)
        self.assertEqual([tree(Path(home, 'X')) for home in ('two', 'three')], [tree(root)] * 2)

    @POSIX
    def test_terminal(self):
        write('ds', {'data/train/big': noise(6 * MIB), 'data/train/small': 'x'})
        etc.register('ds', 'MNIST', config=etc.Config())
        for columns in 40, 12:
            for words in ('push -f MNIST', 'verify MNIST', '--home %d pull MNIST' % columns):
                with self.subTest(words, columns=columns):
                    code, shown = on_terminal('--url', self.url, words, columns=columns,
                                              stdout=subprocess.DEVNULL)
                    lines = filter(str.strip, shown.split('\r\033[J'))
                    *drawn, last = sorted(lines, key=lambda line: 'etc: ' in line)  # progress may be shown after it
                    self.assertEqual((code, bool(drawn)), (0, True), shown)
                    for line in drawn:
                        self.assertTrue(line.endswith('\r') and '\n' not in line and len(line) <= columns, drawn)
                        self.assertRegex(line, '(push|verify|pull)' + ' MNIST +[0-9]+%' * (columns > 12))
                    self.assertRegex(last, r'\A\r?etc: [a-z]+ed MNIST.*2 files, 6\.29 MB in [0-9.]+ s \(.*B/s\)\n')
        for words, term in (('-q push -f MNIST', 'xterm'), ('push -f MNIST', 'dumb')):
            self.assertNotRegex(on_terminal('--url', self.url, words, term=term)[1], r'\033|%')
        self.assertNotRegex(self.etc('pull MNIST')[1], r'[\r\033]')


@POSIX
class Question(Shell, Case):
    """`etc purge -r` as a person on a terminal meets it."""

    def purge(self, *words, **kwargs):
        """The exit status, what is left, and what was shown."""
        write('share', {'X.tgz': 'x' * 1500, 'Y.tgz': 'y'})
        code, shown = on_terminal('--url', self.url, 'purge', *words, **kwargs)
        return code, sorted(path.stem for path in Path('share').iterdir()), shown

    def test_answers(self):
        asked = "etc: remove 'X' (1.5 kB) in %s? [y/N] " % self.url
        for answers, code, left in (('\n|no\n|yy\n|\xff\n|\x04', 1, ['X', 'Y']),
                                    ('y\n| YES \n', 0, ['Y'])):
            for answer in answers.split('|'):
                with self.subTest(answer):
                    *found, shown = self.purge('-r -q X', answers=[answer.encode('latin-1')])
                    self.assertEqual((found, shown[:len(asked)]), ([code, left], asked))
                    end = "etc: 'X' (1.5 kB) in %s stays\n" % self.url if code else answer
                    self.assertTrue(shown.endswith(end), shown)

    def test_outcomes(self):
        purged = "etc: purged '%s' from " + self.url + '\n'
        for words, answers, code, left, said in (
                ('-r X Y', [b'\x03'], 130, ['X', 'Y'], 'etc: interrupted'), ('-r -f X', [], 0, ['Y'], purged % 'X'),
                ('-r Nope X Y', [b'n\n', b'y\n'], 1, ['X'], purged % 'Y'),
                ('-r y', [], 1, ['X', 'Y'], "'etc ls -r' lists what is there")):
            with self.subTest(words):
                *found, shown = self.purge(words, answers=answers)
                self.assertEqual((found, said in shown), ([code, left], True), shown)

    def test_another_push_before_the_answer(self):
        newer = {'X.tgz': 'newer'}
        code, _, shown = self.purge('-r X', answers=[b'y\n'], meanwhile=lambda: write('share', newer))
        self.assertEqual((code, Path('share/X.tgz').read_text()), (1, 'newer'))
        self.assertIn("etc: 'X' in %s was replaced meanwhile" % self.url, shown)

    def test_only_one_end_is_a_terminal(self):
        with open('err', 'w+') as err:
            for streams in ({'stdin': subprocess.DEVNULL}, {'stderr': err}):
                with self.subTest(streams):
                    code, left, shown = self.purge('-r X', **streams)
                    self.assertEqual((code, left), (2, ['X', 'Y']))
                    err.seek(0)
                    self.assertIn("etc: without a terminal to ask on, 'etc purge -r' needs -f;", shown + err.read())


class Mistakes(Shell, Case):
    """What people mistype or mistake, and the one line that each prints."""

    # HERE is the current directory, SHARE the url, and ... "'etc COMMAND -h' shows how", after wrong usage
    LINES = """
        pull                   usage: etc pull NAME... [-f] [-p PARTITION]; ...
        create                 usage: etc create NAME [PARTITION...] [-f]; ...
        pull MNIST --forse     usage: etc pull NAME... [-f] [-p PARTITION]; ...
        info MNIST X           usage: etc info NAME [-r] [--json]; ...
        diff MNIST             usage: etc diff A B [-r NAME] [--json]; ...
        diff MNIST -r          argument -r/--remote: expected 1 argument; ...
        register a b c         usage: etc register DIR [NAME] [-f] [--copy]; ...
        purge -r MNIST         without a terminal to ask on, 'etc purge -r' needs -f; ...
        ls -l MNITS            no dataset here matches; without a pattern, all are listed
        ls -r mnist x*         no dataset in the remote storage matches; without a pattern, all are listed
        pull MNIST.tgz         no dataset 'MNIST.tgz' in SHARE; 'etc ls -r' lists what is there
        pull Flowers           no dataset 'Flowers' in SHARE; 'etc ls -r' lists what is there
        pull Partly -p trian   no partition 'trian' in Partly; it has: test, train
        pull s3://bucket/X     's3://bucket/X' cannot be a dataset's name; it takes at most 128 letters, digits, '.', \
'_' and '-', the first a letter or digit; after that, only @sha256: and 64 hexadecimal digits
        pull MNIST@sha256:abc  'MNIST@sha256:abc' cannot be a dataset's name; it takes at most 128 letters, digits, \
'.', '_' and '-', the first a letter or digit; after that, only @sha256: and 64 hexadecimal digits
        push Other             another 'Other' is in SHARE already; push it under another name, or \
'etc push -f Other' replaces it
        pull Other             another 'Other' is installed already; choose another name, or -f (force) to replace it
        register MNIST ./digits  no directory HERE/MNIST; check the path; an archive must be unpacked first
        register ./digits/data as X  HERE/digits/data is no dataset: it needs a directory 'data' with a directory \
for each partition
        register ./images X    HERE/images is no dataset: it needs a directory 'data' with a directory for each \
partition
        register digits.tgz    no directory HERE/digits.tgz; check the path; an archive must be unpacked first
        register ./my~data     'my~data' cannot be a dataset's name; it takes at most 128 letters, digits, '.', '_' \
and '-', the first a letter or digit; after that, only @sha256: and 64 hexadecimal digits
        register ./my~data MNIST  another 'MNIST' is installed already; choose another name, or -f (force) to replace it
        push Flowers           no local dataset 'Flowers'; \
'etc pull Flowers' would fetch it, 'etc register DIR Flowers' add it
        purge Flowers          no local dataset 'Flowers'; \
'etc pull Flowers' would fetch it, 'etc register DIR Flowers' add it
        purge -r -f MNITS      no dataset 'MNITS' in SHARE; 'etc ls -r' lists what is there
        verify Flowers         no local dataset 'Flowers'; \
'etc pull Flowers' would fetch it, 'etc register DIR Flowers' add it
        info mine              no local dataset 'mine'; 'etc pull mine' would fetch it, 'etc register DIR mine' add it
        --url bucket ls -r     cannot use the url (from --url); it must start with file:// or s3:// or gs:// or \
https:// or http://; set where datasets are shared with a line such as 'url: s3://my-bucket' in ~/.etc.yaml, with \
$ETC_URL or with --url
        --url /data ls -r      cannot use the url (from --url); it must start with file:// or s3:// or gs:// or \
https:// or http://; did you mean 'file:///data'?
        --url file://x ls -r   the url (from --url) is no absolute path; write file:///path, with three slashes
        --url file://HERE/no ls -r  no directory HERE/no; check the url (from --url), or make it with the first push
        --config typo.yaml ls  HERE/typo.yaml:2: unknown setting 'ulr'; there are url, home, public, \
aws_access_key_id, aws_secret_access_key, aws_session_token, aws_profile, region, endpoint_url, request_payer, \
storage_class, sse, sse_kms_key_id, google_credentials, ca_bundle, connections, compression_level
        --config toml.yaml ls  HERE/toml.yaml:1: not of the form 'key: value' (lists, nesting and indentation are not \
supported)
        --config no.yaml ls    cannot read the settings file HERE/no.yaml: No such file or directory; make it \
readable, or name another one with --config or $ETC_CONFIG
        """

    def test_each_gets_its_line(self):
        write('.', {'digits/data/train/1': 'one', 'digits/data/test/2': 'two', 'images/1.png': 'png', 'digits.tgz': 'x',
                         'my~data/data/train/x': 'x', 'typo.yaml': '# mine\nulr: s3://bucket\n',
                         'toml.yaml': 'url = "s3://b"\n'})
        for name in 'MNIST', 'Partly', 'Other':
            self.share('digits', name)
        self.etc('purge Partly')
        self.etc('create Mine')
        self.etc('create -f Other')
        for row in self.LINES.strip().splitlines():
            row = row.replace('HERE', str(self.tmp)).replace('SHARE', self.url)
            words, line = re.split('  +', row.strip(), 1)
            with self.subTest(words):
                how = "'etc %s -h' shows how" % words.split()[0]
                said = self.etc(words, status=2 if line.endswith('; ...') else 1)
                self.assertEqual(said, ('', 'etc: %s\n' % re.sub(r'(?<=; )\.\.\.\Z', how, line)))
        self.fails_with('cannot read the settings file', '--config', 'n' * 300, 'ls')
        for words in 'pul MNIST', 'frobnicate', 'help':
            self.assertRegex(self.etc(words, status=2)[1], r"argument COMMAND: .*\bpull\b.*; 'etc -h' shows how\n\Z")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(etc.main(['pull', 'MNIST']), 1)
        self.assertIn('etc: no url; set where datasets are shared', err.getvalue())

    def test_help(self):
        """Each example can be typed as it is; without a command, all are shown."""
        with contextlib.redirect_stderr(io.StringIO()) as overview:
            self.assertEqual(etc.main([]), 2)
        for command in 'ls info diff pull push register create verify purge'.split():
            with self.subTest(command):
                self.assertRegex(overview.getvalue(), r'(?m)^ +%s +\w' % command)
                examples = re.findall(r'^  etc (\w+(?: [^\s)]+)*)', self.etc(command, '-h')[0], re.M)
                self.assertTrue(examples)
                for example in examples:
                    # a status that is not 2, as after wrong usage
                    self.etc(example + ' -f' * (command == 'purge'), status=None)


class People(Shell, Case):
    def test_lists(self):
        root = small('ds').resolve()
        self.register(root, 'Registered')
        self.etc('register --copy', root, 'C')
        self.assertEqual(self.etc('ls -l')[0].splitlines(), [
            'C           6 files, 5.04 kB  %s  %s' % (etc.info('C', config=self.config())['when'],
                                                      etc.Dataset(root).digest),
            'Registered  -                 -                     %s' % root])
        self.etc('push C')
        both = set('digest files name partitions size when meta readme'.split())
        for flags, more in (([], {'partial', 'root', 'source'}), (['-r'], {'archive_size'})):
            for item in json.loads(self.etc('ls --json', *flags)[0]):
                self.assertEqual(set(item), both | more)
        os.utime('share/C.tgz', (86400, 86400))
        self.assertIn('  1970-01-02T00:00:00Z  ', self.etc('ls -l -r')[0])

    def test_patterns(self):
        for name in ('MNIST', 'MNIST-small', 'svhn', 'CIFAR'):
            self.etc('create', name)
        for patterns, names in (('MNIST*', 'MNIST MNIST-small'), ('*-small [a-z]*', 'MNIST-small svhn'), ('M', ''),
                                ('????? svhn', 'CIFAR MNIST svhn'), ('[!M]*', 'CIFAR svhn'), ('', ''),
                                ('mnist [z-a] [', '')):
            with self.subTest(patterns):
                patterns, names = patterns.split(), names.split()
                self.assertEqual(etc.ls(patterns=patterns, config=self.config()), names)
                if names:
                    self.assertEqual(self.etc('ls', *patterns)[0].split(), names)
                    listed = json.loads(self.etc('ls', *patterns[:1], '--json', *patterns[1:])[0])
                    self.assertEqual([item['name'] for item in listed], names)
                    self.assertEqual(re.findall(r'(?m)^\S+', self.etc('ls -l', *patterns)[0]), names)
        with self.assertRaisesRegex(etc.ConfigError, 'must be a list'):
            etc.ls(patterns='MNIST*', config=self.config())
        self.assertEqual(self.etc('ls svhn nope*'), ('svhn\n', ''))
        self.assertEqual(self.etc('ls --json [', status=1)[0], '[]\n')

    def test_info(self):
        readme = ''.join('%d\n' % n for n in range(50))
        root = write('ds', {'data/train/x': 'x' * 1500, 'data/test/y': '', 'README.md': readme})
        self.etc('register --copy', root, 'X')
        shown = self.etc('info X')[0]
        for line in ('name        X', 'digest      ' + etc.Dataset(root).digest, 'size        3 files, 1.64 kB',
                     'data/test   1 file, 0 B\ndata/train  1 file, 1.5 kB\n\n0\n1\n2'):
            self.assertIn('\n%s\n' % line, '\n' + shown)
        self.assertTrue(shown.endswith('\n' + readme))

    def test_what_is_shared_by_accident(self):
        write('.', {'out/x': 'x', 'ds/.env': 'x', 'ds/assets': ('->', '../out'), 'ds/data/train/.git/x': '',
                    'ds/data/@eaDir/x': '', 'ds/data/train/l': ('->', '../../../out/x'), 'ds/data/train/k': ('->', 'x'),
                    'ds/data/train/x': 'x', 'ds/data/train/__init__.py': ''})
        said = ("etc: all of 'X' is shared, also hidden or odd names (3, such as .env), links that lead out of it (2, "
                'such as assets -> %s)\n' % Path('out').resolve())
        for command in ('register ds X', 'push X'):
            with self.subTest(command):
                self.assertIn(said, self.etc(command)[1])
                self.assertEqual(self.etc('-q ' + command + ' -f')[1], '')

    def test_verbosely(self):
        said = self.etc('-v ls')[1].splitlines()[0]
        self.assertRegex(said, r"etc: settings file: \S+; url from --url; Config\('file://")


class Diff(Shell, Case):
    """Of local datasets; RemoteSuite compares remote ones."""

    def setUp(self):
        super().setUp()
        files = {'data/train/x': 'x', 'data/test/y': 'y', 'README.md': 'r', 'assets/a': 'a'}
        self.a = write('A', dict(files, **{'+/p': 'p'}))
        self.b = write('B', {'data/val/v': '', 'more/m': 'm', 'data/train/x': 'other', 'README.md': 'r',
                             'assets/a': 'a'})
        for root in self.a, self.b:
            self.share(root, root.name)

    def statuses(self, *args, **kwargs):
        """As {path: status}, from the columns and from the JSON."""
        out, _ = self.etc('diff', *args, status=None, **kwargs)
        found = json.loads(self.etc('diff --json', *args, status=None, **kwargs)[0])
        statuses = {path: row['status'] for path, row in found['segments'].items()}
        self.assertEqual({re.split('  +', line)[-1]: line.split()[0] for line in out.splitlines()}, statuses)
        self.assertEqual(found['equal'], set(statuses.values()) == {'same'})
        return statuses

    def test_segments(self):
        self.assertEqual(self.etc('diff A B', status=1), (
            'gone     1 file, 1 B  -            +\n'
            'same     1 file, 1 B  1 file, 1 B  .\n'
            'same     1 file, 1 B  1 file, 1 B  assets\n'
            'gone     1 file, 1 B  -            data/test\n'
            'differs  1 file, 1 B  1 file, 5 B  data/train\n'
            'new      -            1 file, 0 B  data/val\n'
            'new      -            1 file, 1 B  more\n', ''))
        found, one = etc.diff('A', 'B', config=self.config()), {'files': 1, 'size': 1}
        self.assertEqual(found, json.loads(self.etc('diff A B --json', status=1)[0]))
        self.assertEqual(found['a'], {'name': 'A', 'remote': False, 'digest': etc.Dataset(self.a).digest})
        self.assertEqual(found['segments']['assets'], {'status': 'same', 'a': one, 'b': one})
        self.assertEqual(found['segments']['+'], {'status': 'gone', 'a': one, 'b': None})
        self.assertEqual(set(self.statuses('A', 'A').values()), {'same'})

    def test_how_names_are_typed(self):
        """In which order, and before or after flags, on every version of argparse; what is remote has a * here."""
        for case in """
                A B|A B; B A|B A; A -r B|A B*; -r A B|A* B; -r A -r B|A* B*; -r B -r A|B* A*; --remote=A B|A* B;
                B -rA|B A*; A -v B|A B; -v A B|A B; A -v -r B|A B*; -r A -v B|A* B; -v -r A -v -r B -v|A* B*;
                B -r B|B B*; -- A B|A B; -r A -- B|A* B""".split(';'):
            words, sides = case.strip().split('|')
            with self.subTest(words):
                found = json.loads(self.etc('diff --json', words, status=None)[0])
                self.assertEqual([found[side]['name'] + '*' * found[side]['remote'] for side in 'ab'], sides.split())
        for words in ('A', '-r A', 'A B B', 'A -r B B', '-r A -r B -r B', ''):
            with self.subTest(words):
                self.assertIn('usage: etc diff A B ', self.etc('diff', words, status=2)[1])

    def test_pins(self):
        digest, other = etc.Dataset(self.a).digest, etc.Dataset(self.b).digest
        self.etc('diff A@' + digest, 'A')
        self.assertEqual(self.statuses('A@' + digest, 'B@' + other)['data/train'], 'differs')
        for words in ('A@%s B', 'B A@%s', '-r A@%s A', 'A -r A@%s', 'A A@%s'):
            with self.subTest(words):
                said = self.etc('diff', words % other, status=1)
                self.assertEqual(said, ('', "etc: 'A': expected digest %s, found %s; those contents are not there, or "
                                            'not any more\n' % (other, digest)))

    def test_partial(self):
        """What is not here counts, too, as the receipt knows it."""
        self.etc('pull -p test A', home='two')
        self.register(self.a, 'Y', home='two')
        same = dict.fromkeys(['.', '+', 'assets', 'data/test', 'data/train'], 'same')
        self.assertEqual(self.statuses('-r', 'A', 'A', home='two'), same)
        self.assertEqual(self.statuses('Y', 'A', home='two'), same)
        write(self.a, {'data/test/y': 'changed', 'data/val/v': 'v'})
        changed = dict(same, **{'data/test': 'differs', 'data/val': 'new'})
        self.assertEqual(self.statuses('A', 'Y', home='two'), changed)

    @POSIX
    def test_nothing_is_read_that_a_receipt_knows(self):
        self.etc('pull A', home='two')
        for path in self.a.glob('*/*/*'), Path('two/A/data').glob('*/*'):
            for file in path:
                file.chmod(0)
        with unprivileged('.'):
            self.etc('diff A -r A', home='two')
            self.fails_with('Permission denied', 'verify A', home='two')


def paths_of(ds):
    """What a worker process does with a dataset."""
    return sorted(str(path) for partition in ds.values() for path in partition.iterdir()), ds.digest, ds.name


class Python(Shell, Case):
    def test_copies(self):
        import copy
        import pickle
        ds = etc.register(small('ds'), 'X', config=self.config())
        digest = ds.digest
        copies = [copy.copy(ds), copy.deepcopy(ds)]
        copies += [pickle.loads(pickle.dumps(ds, protocol)) for protocol in range(5)]
        write('ds', {'data/train/a.txt': 'of which they know nothing'})
        for other in copies:
            self.assertEqual((other, other.name, other.root, other.digest), (ds, 'X', ds.root, digest))
            self.assertEqual(repr(other), '<Dataset X: test, train>')
        for error in (etc.RemoteError('gone', status=404), etc.UnknownPartition('no')):
            other = pickle.loads(pickle.dumps(error))
            self.assertEqual((type(other), str(other), vars(other)), (type(error), str(error), vars(error)))

    def test_stderr_of_notebooks(self):
        said = []
        with contextlib.redirect_stderr(types.SimpleNamespace(write=said.append)):
            self.assertEqual(etc.main(['--home', 'home', '--url', self.url, 'pull', 'X']), 1)
        self.assertIn('no directory', ''.join(said))

    def test_worker_processes(self):
        import multiprocessing
        ds = etc.register(small('ds'), 'X', config=self.config())
        expected = paths_of(ds)
        self.assertEqual(len(expected[0]), 3)
        for method in multiprocessing.get_all_start_methods():
            with self.subTest(method), multiprocessing.get_context(method).Pool(2) as pool:
                self.assertEqual(pool.map(paths_of, [ds] * 4), [expected] * 4)

    def test_logging(self):
        etc.register(small('ds'), 'X', config=self.config())
        with self.assertLogs('etcetera', 'DEBUG') as logged:
            etc.push('X', config=self.config())
        self.assertEqual([record.levelname for record in logged.records], ['INFO'])
        self.assertRegex(logged.output[0], r'pushed X to file://.*: 6 files, 5\.04 kB in .* s \(.*B/s\)\Z')

    def test_help(self):
        import pydoc
        text = pydoc.render_doc(etc, renderer=pydoc.plaintext)
        for name in etc.__all__:
            with self.subTest(name):
                self.assertRegex(text, r'\b(def |class )?%s\(' % name)
                self.assertTrue(getattr(etc, name).__doc__)
        self.assertNotRegex(text, r'(?m)^    (class )?_[a-z]')

    def test_names_in_the_audit_map(self):
        names = re.findall(r'\b_[A-Z_a-z.]*\w', etc.__doc__)
        self.assertTrue(names)
        for name in names:
            self.assertTrue(functools.reduce(getattr, name.split('.'), etc), name)


class Refusals(Shell, Case):
    """Whatever goes wrong is an etc.Error in one line; what is no user's fault comes out as it is."""

    def run_(self, program, number, words, home='home', **kwargs):
        """Run a program of a test; its exit status, and what it prints."""
        return run_python('import etcetera as etc\n' + program + 'sys.exit(etc.main(sys.argv[2:]))', number,
                          '--url', self.url, '--home', home, *words.split(), **kwargs)

    def test_no_ssl(self):
        os.environ.update(AWS_ACCESS_KEY_ID='a', AWS_SECRET_ACCESS_KEY='b', NO_GCE_CHECK='true')
        for url in 'https://127.0.0.1:1/x', 's3://bucket', 'gs://bucket':
            with self.subTest(url):
                code, out = self.run_('sys.modules["ssl"] = None\n', 0, 'ls -r --url ' + url)
                self.assertEqual(code, 1)
                self.assertRegex(out, r'\Aetc: https:// cannot be used: [^\n]*, or use a Python with the module '
                                      r'ssl\n\Z')

    @LINUX
    def test_few_threads(self):
        """Fewer are used where the system gives no more, and none while the interpreter ends."""
        self.register(odd(Path('ds'), 30))
        program = """
started, start, lock = [0], threading.Thread.start, threading.Lock()
def limited(thread):
    with lock:
        if started[0] >= int(sys.argv[1]):
            raise RuntimeError("can't start new thread")
        started[0] += 1
    run = thread.run
    def counted():
        try:
            run()
        finally:
            with lock:
                started[0] -= 1
    thread.run = counted
    try:
        start(thread)
    except BaseException:
        started[0] -= 1
        raise
threading.Thread.start = limited
"""
        write('.', {'one.yaml': 'connections: 1\n'})
        for limit, settings in ((3, ''), (2, ' --config one.yaml')):
            for home, words in (('home', 'push -f X'), ('two', 'pull X'), ('two', 'verify X'), ('two', 'purge X')):
                with self.subTest(words, limit=limit):
                    code, out = self.run_(program, limit, words + settings, home)
                    self.assertEqual(code, 0, out)
        code, out = self.run_(program, 0, 'push -f X')
        self.assertRegex(out, r'\Aetc: pushed X .*\n\Z' if code == 0 else
                         r"\Aetc: the system does not allow this process any more threads; "
                         r"set 'connections: 1', or .*\n\Z")

    @POSIX
    def test_interrupted_while_threads_start(self):
        self.register(odd(Path('ds'), 30))
        program = """
start, last = threading.Thread.start, int(sys.argv[1])
def interrupted(thread):
    global last
    start(thread)
    last -= 1
    if last == 0:
        os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread.start = interrupted
"""
        for last in 1, 2:
            with self.subTest(last):
                code, out = self.run_(program, last, 'push X', timeout=60)
                # it may have pushed before the main thread comes to hear of the signal
                self.assertRegex('%d %s' % (code, out), r'\A130 (etc: pushed X .*\n)?etc: interrupted.*\n\Z')

    @unittest.skipUnless(sys.platform == 'linux' and hasattr(sys, 'getrefcount'), 'no such limit on memory here')
    def test_little_memory(self):
        """As with ulimit -v: the command succeeds, or says what to do."""
        self.share(self.large(12 * MIB))
        program = r"""
import resource
now = int(re.search(r'VmSize:\s+(\d+)', open('/proc/self/status').read()).group(1)) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
"""
        outcomes, lacking, enough = set(), 0, 2048
        for turn in range(80):
            room, code = (lacking + enough) // 2, None
            with self.subTest(room), contextlib.suppress(subprocess.TimeoutExpired):
                # CPython may wait for ever for a thread whose start failed for want of memory
                code, out = self.run_(program, room, 'pull X', 'home%d' % turn, timeout=30)
                if re.search('Fatal Python error|exception in thread|libgcc_s', out, re.I):
                    self.assertTrue(code == 0 or 'pulled' not in out, out)  # the interpreter itself gave up
                else:
                    # Python's own words, where it lacks memory
                    out = re.sub(r'(?ms)\AException ignored .*?(?=^etc: )', '', out)
                    self.assertRegex(out, r'\Aetc: (pulled X.*|.*(memory|threads).*; set .connections: 1..*)\n\Z')
                    self.assertEqual('pulled' in out, code == 0)
                    outcomes.add(code)
            lacking, enough = (lacking, room) if code == 0 else (room, enough)
            if enough - lacking <= 8:  # what is enough is found, as it differs from Python to Python
                if outcomes == {0, 1}:
                    break
                lacking, enough = 0, 2048  # each failure was the interpreter's own
        self.assertEqual(outcomes, {0, 1})

    def test_times_past_2038(self):
        """On some 32-bit systems the functions of `time` end there."""
        def narrow(function):
            def limited(seconds=None):
                if seconds is None or not 0 <= seconds < 1 << 31:
                    raise OverflowError('timestamp out of range for platform time_t')
                return function(seconds)
            return limited

        self.share(small('ds'))
        later, server = 2524608000, Server(S3Handler, self)
        try:
            os.utime('share/X.tgz', (later, later))
        except OverflowError:
            self.skipTest('this system cannot set such times')
        for name, function in (('gmtime', narrow(time.gmtime)), ('localtime', narrow(time.localtime)),
                               ('time', time.time)):
            stand_in(self, time, name, function)
        self.assertIn('2050-01-01T00:00:00Z', self.etc('info -r X')[0])
        time.time = lambda: later + 0.5
        self.etc('pull X', home='two')
        self.assertIn('2050-01-01T00:00:00Z', self.etc('info X', home='two')[0])
        server.RequestHandlerClass = type('Dated', (S3Handler,), {
            'date_time_string': lambda self, timestamp=None: 'Sat, 01 Jan 2050 00:00:00 GMT'})
        self.settings = {'endpoint_url': server.url, 'aws_access_key_id': AKID, 'aws_secret_access_key': SECRET}
        self.assertEqual(self.etc('-q ls -r', url='s3://bucket'), ('', ''))
        self.assertEqual(server.log[-1][2]['x-amz-date'], '20500101T000000Z')

    def test_addresses_that_nothing_can_have(self):
        os.environ.update(NO_GCE_CHECK='true')
        skip_pauses(self)
        for said, cases in (
                ('; check the network, the URL, the proxy settings and ca_bundle',
                 'https://data..example.org|http://%s.example|s3://bucket https://d..e'
                 '|gs://bucket https://d..e' % ('x' * 70)),
                ('; ', 'http://[::::]/|s3://bucket http://[1:::]|gs://bucket http://[1:::]'),
                ('https://host', 'http://127.0.0.1:65536|http://127.0.0.1:0|s3://bucket http://127.0.0.1:99999')):
            for case in cases.split('|'):
                with self.subTest(case):
                    url, *endpoint = case.split()
                    self.settings = dict(zip(['endpoint_url'], endpoint))
                    self.fails_with(said, 'ls -r', url=url)
        os.environ.update(http_proxy='http://proxy..example:9', no_proxy='')
        self.settings = {}
        self.fails_with('cannot reach http://data.example.org', 'ls -r', url='http://data.example.org')

    def test_paths_that_no_file_can_have(self):
        for function, args in ((etc.register, ['a\0b', 'X']), (etc.Dataset, ['a\0b']), (etc.Config.load, ['a\0b']),
                               (etc.ls, [True, self.config(url='file:///a%00b')])):
            with self.subTest(function), self.assertRaisesRegex(etc.Error, 'no file can have the path'):
                function(*args)

    def test_what_a_progress_function_raises(self):
        """It ends the work, and comes out as it is; nothing is left."""
        self.share(odd(Path('ds'), 20))
        with tarfile.open('share/Y.tgz', 'w:gz') as tar:
            tar.add('ds', '.')
        before, config, two = tree('share'), self.config(), self.config('two')
        for kind in (ValueError, OSError, KeyError, EOFError, UnicodeError, MemoryError, etc.Corrupt, KeyboardInterrupt,
                     SystemExit, tarfile.ReadError, RecursionError):
            error = kind('mine')

            def progress(done, total):
                raise error
            for function, settings, args in (
                    (etc.pull, two, ['X']), (etc.pull, two, ['Y']), (etc.dataset, two, ['X', True]),
                    (etc.push, config, ['X', True]), (etc.register, config, ['ds', 'Z', False, True]),
                    (etc.verify, config, ['X']), (etc.info, config, ['X'])):
                with self.subTest(function, error=error), self.assertRaises(kind) as caught:
                    function(*args, config=settings, progress=progress)
                self.assertIs(caught.exception, error)
            self.assertEqual((self.installed('two'), self.installed()), ([], ['X']))
        self.assertEqual(tree('share'), before)

    def test_faults_of_ours_are_not_called_damage(self):
        """As if it called a function of the system wrongly."""
        self.share(small('ds'))
        opened = os.open
        self.addCleanup(setattr, os, 'open', opened)
        for error in (TypeError, ValueError, KeyError):
            def broken(path, flags, *args, **kwargs):
                if flags & os.O_CREAT and str(path).endswith('.txt'):
                    raise error('a fault in etcetera')
                return opened(path, flags, *args, **kwargs)
            os.open = broken
            with self.subTest(error), self.assertRaisesRegex(error, 'a fault in etcetera'):
                etc.pull('X', config=self.config('two'))


class Before(Shell, Case):
    """What users of etcetera 0.0.x have: its settings, its local store, its calls."""

    def test_settings(self):
        write('.', {'other.toml': 'url = "s3://other"\n', '.etc.toml': """# mine
url = "s3://my-bucket"
public = true
  aws_access_key_id="A\\\\x"  # quoted
endpoint_url = 'http://h:1'
aws_access_key_secret = "s"
"""})
        os.chmod('.etc.toml', 0o600)
        config = etc.Config.load()
        self.assertEqual((config.url, config.public, config.aws_access_key_id, config.aws_secret_access_key,
                          config.endpoint_url), ('s3://my-bucket', True, 'A\\x', 's', 'http://h:1'))
        write('.', {'.etc.toml': 'url = "s3://b"\n[profile]\n'})
        with self.assertRaisesRegex(etc.ConfigError, r'\.etc\.toml:2: '):
            etc.Config.load()
        write('.', {'.etc.yaml': 'url: s3://newer\n'})
        self.assertEqual([etc.Config.load(path).url for path in (None, 'other.toml')], ['s3://newer', 's3://other'])

    def test_store_and_calls(self):
        root = small('ds')
        write('.', {'.etc/Registered': ('->', str(self.tmp / 'ds')), '.etc.toml': 'url = "%s"\n' % self.url})
        shutil.copytree(root, '.etc/Pulled')
        self.assertEqual(list(etc.ls()), ['Pulled', 'Registered'])
        etc.push('Registered')
        etc.push('Pulled')
        self.assertEqual(list(etc.ls(remote=True)), ['Pulled', 'Registered'])
        etc.purge('Pulled')
        ds = etc.dataset('Pulled', auto_pull=True)
        self.assertEqual((ds.location, ds.data, ds.file('data', 'train')), (ds.root, ds.root / 'data', ds['train']))
        self.assertEqual((ds.partitions(), ds.keys(), dict(ds.items())['test']),
                         (['test', 'train'], {'test', 'train'}, ds['test']))
        etc.pull('Registered', force=True)
        self.assertFalse(Path('.etc/Registered').is_symlink())
        self.assertTrue((root / 'data').is_dir())


USER = """
import os
from pathlib import Path
from typing import Any, Dict, List

import etcetera as etc


def progress(done: int, total: int) -> None:
    print(done / total)


config = etc.Config('file:///tmp/share', home=Path('home'), connections=4)
ds: etc.Dataset = etc.dataset('X', auto_install=True, partitions=['train'], config=config, progress=progress)
train: Path = ds['train']
paths: List[Path] = [path for path in ds.values()]
names: List[str] = sorted(ds.keys() | {'more'})
meta: Dict[str, Any] = ds.meta
digest: str = etc.push('X', force=True, config=config)
equal: bool = etc.diff('X', 'Y', remote=(False, True), config=config)['equal']
shared: List[str] = etc.ls(remote=True, patterns=['X*'])
size: int = sum(os.path.getsize(str(path)) for path in train.iterdir())
try:
    etc.pull('X', config=etc.Config.load())
except etc.RemoteError as e:
    status: int = e.status
except (etc.NotFound, etc.UnknownPartition) as e:
    print(str(e))
"""


@needs(importable('mypy'), 'mypy is not installed')
class Mypy(Shell, Case):
    def check(self, program, python, status):
        write('.', {'user.py': program})
        done = subprocess.run([sys.executable, '-m', 'mypy', '--strict', '--python-executable', str(python), 'user.py'],
                              stdout=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(done.returncode, status, done.stdout)
        return done.stdout

    def test_a_users_program(self):
        """Where etcetera is vendored, and where it is installed: there mypy wants to be told to follow it."""
        subprocess.check_call([sys.executable, '-m', 'venv', '--without-pip', 'venv'])
        python = self.tmp / 'venv' / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
        site = subprocess.check_output([str(python), '-c', 'import site; print(site.getsitepackages()[-1])'])
        shutil.copy(SCRIPT, site.decode().strip())
        self.assertIn('import-untyped', self.check(USER, python, 1))
        write('.', {'mypy.ini': '[mypy-etcetera]\nfollow_untyped_imports = True\n'})
        self.check(USER, python, 0)  # without the optional libraries
        self.assertIn('"Path" has no attribute "nope"', self.check(USER + 'train.nope\n', python, 1))
        self.assertIn('incompatible type "int"', self.check(USER + 'etc.pull(3)\n', python, 1))
        shutil.copy(SCRIPT, '.')
        remove('mypy.ini')
        self.check(USER, sys.executable, 0)


def may_mount():
    """Whether a command may have mounts of its own."""
    if sys.platform != 'linux' or os.geteuid() or not shutil.which('unshare'):
        return False
    return subprocess.call(['unshare', '--mount', 'true'], stderr=subprocess.DEVNULL) == 0


class Program(Shell, Case):
    def run_(self, *command, **kwargs):
        """What a command prints; it must succeed, and say nothing else."""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                              **kwargs)
        self.assertEqual((done.returncode, done.stderr), (0, ''), command)
        return done.stdout

    def test_ways_to_start(self):
        etc.create('X', config=etc.Config(home='.etc'))
        shutil.copy(SCRIPT, write('vendored', {'__init__.py': ''}))
        for words, cwd in (([SCRIPT], self.tmp), (['-m', 'etcetera'], HERE), (['-m', 'vendored.etcetera'], self.tmp)):
            self.assertEqual(self.run_(sys.executable, *words, 'ls', cwd=str(cwd)), 'X\n')
        with open(SCRIPT, 'rb') as script:
            self.assertEqual(self.run_(sys.executable, '-', 'ls', stdin=script), 'X\n')
        for words, cwd, said in (([SCRIPT], self.tmp, SCRIPT), (['-m', 'etcetera'], HERE, '-m etcetera')):
            with self.subTest(said):
                done = subprocess.run([sys.executable, *words, 'info', 'Y'], cwd=str(cwd), stderr=subprocess.PIPE)
                self.assertIn("; 'python3 %s pull Y' would fetch it" % said, done.stderr.decode())
        code = 'import pickle, vendored.etcetera as e; print(pickle.loads(pickle.dumps(e.dataset("X")))["train"].name)'
        self.assertEqual(self.run_(sys.executable, '-c', code), 'train\n')

    def test_pipes(self):
        write('.', {'.etc/D%0120d/data' % number: None for number in range(700)})
        command = '"%s" "%s" ls' % (sys.executable, SCRIPT)
        for then, said in ((' | head -n 1', ''), (' >/dev/full', 'etc: cannot write to standard output: .*\n'),
                           (' >&-', 'etc: cannot write to standard output: it is closed\n')):
            if '/dev' not in then or os.path.exists('/dev/full'):
                done = subprocess.run(['sh', '-c', command + then], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                self.assertRegex(done.stderr.decode(), r'\A%s\Z' % said)

    def test_odd_surroundings(self):
        for env, said in (({'HOME': ''}, 'cannot tell where your home directory, or the current one, is;'),
                          ({'ETC_HOME': 'rel'}, 'cannot tell where your home directory, or the current one, is;')):
            with self.subTest(**env):
                os.environ.update(env)
                write('.', {'gone': None})
                done = subprocess.run(['sh', '-c', 'rmdir ../gone; "%s" "%s" ls' % (sys.executable, SCRIPT)],
                                      cwd='gone', stderr=subprocess.PIPE)
                self.assertEqual((done.returncode, done.stderr.decode()[:len(said) + 5]), (1, 'etc: ' + said))

    MEMORY = """
import etcetera as etc
if hasattr(os, 'sched_setaffinity'):  # a thread more has more blocks under way
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
scandir, scanned = os.scandir, []
os.scandir = lambda path: (scanned.append(str(path)), scandir(path))[1]
status = etc.main(['-q'] + sys.argv[1:])
peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10
print(max([scanned.count(path) for path in scanned if 'train/' in path] or [0]), peak)
sys.exit(status)
"""

    @unittest.skipUnless(may_mount(), 'needs root, and a mount of its own')
    def test_small_disk(self):
        """What cannot fit is not fetched."""
        self.share(self.large(5 * MIB))
        write('.', {'two': None})
        mount = 'mount -t tmpfs -o size=3m none two && exec "$@"'
        command = ['unshare', '--mount', 'sh', '-c', mount, 'sh', sys.executable, SCRIPT, '--url', self.url]
        done = subprocess.run(command + ['--home', 'two', 'pull', 'X'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertRegex(done.stderr.decode(), r'\Aetc: 5.24 MB are to be written to .*/two/\.etcetera, but only 3.\d+ '
                                               r'MB are free there; free some space, or .*\n\Z')

    @LINUX
    def test_memory_is_flat(self):
        """With many files, which take one walk, in flat directories, and with large ones."""
        for name in 'Many', 'Flat', 'Large':
            self.register(write(name, {'data/train': None}), name)
        write('outside', {'%04d' % number: '' for number in range(1000)})
        write('Many', {'data/train/%03d' % number: ('->', str(self.tmp / 'outside')) for number in range(80)})
        for number in range(45000):
            os.close(os.open('Flat/data/train/%06d' % number, os.O_CREAT))
        os.truncate(write('Large/data/train', {'zeros': ''}) / 'zeros', 60 * MIB)
        extra = 100 if sys.implementation.name == 'pypy' else 0
        for home, words, limit in (('home', 'push Many', 56), ('home', 'verify Flat', 56), ('home', 'push Large', 70),
                                   ('two', 'pull Large', 70)):
            with self.subTest(words):
                code, out = run_python(self.MEMORY, '--url', self.url, '--home', home, *words.split())
                self.assertEqual(code, 0, out)
                walks, peak = map(int, out.split())
                self.assertTrue(walks < 2 and peak < limit + extra, out)  # MiB, with the interpreter itself

    def test_import_is_light(self):
        """And no library of a cloud is loaded for what needs none."""
        heavy = set('''ssl urllib.request http.client xml.etree.ElementTree concurrent.futures argparse tarfile
                       logging socket email configparser ctypes'''.split())
        write('.', {'share': None})
        code = '''if True:
            before = set(sys.modules)
            import etcetera
            print(sorted(%r & (set(sys.modules) - before)))
            etcetera.main(sys.argv[1:])
            print([name for name in sys.modules if name.startswith(('google', 'boto'))])
            ''' % heavy
        self.assertEqual(run_python(code, '--url', self.url, '-q', 'ls', '-r'), (0, '[]\n[]\n'))

    @LINUX
    def test_plain_locale_and_warnings_as_errors(self):
        root = odd(Path('ds'), 3)
        os.environ.update(LC_ALL='C', LANG='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
        run = [sys.executable, '-W', 'error'] + ['-X', 'dev'] * (sys.version_info >= (3, 7))
        command = [SCRIPT]
        for words in ('register ds X', 'push X', '--home two pull X', '--home two pull -f X', '--home two verify X',
                      'info -r X'):
            with self.subTest(words):
                self.run_(*run + command + ['-q', '--url', self.url] + words.split())
                command = ['-c', START % {}]  # once it was compiled without a warning
        self.assertEqual(tree('two/X'), tree(root))
        self.assertEqual(etc.info('X', True, self.config())['digest'], etc.Dataset(root).digest)

    def test_readme_quick_start(self):
        text = (HERE / 'README.md').read_text(encoding='utf-8')
        block = re.search(r'```(?:sh|bash)\n(.*?)```', text, re.S).group(1)
        shutil.copy(SCRIPT, write('.', {'new user': None}) / 'new user')
        (write('.', {'bin/python3': '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable}) / 'bin/python3').chmod(0o755)
        os.environ.update(HOME=str(self.tmp / 'new user'), PATH='%s:%s' % (self.tmp / 'bin', os.environ['PATH']))
        shown = self.run_('sh', '-e', '-c', 'exec 2>&1\n' + block + '\nls "$HOME"/*/digits.tgz', cwd=os.environ['HOME'])
        self.assertIn('digits.tgz', shown)


# ---------------------------------------------------------------------------------------
# Fuzzing; for longer: ETC_TEST_RUNS=100 python3 test_etcetera.py Fuzzing
# ---------------------------------------------------------------------------------------

class Target:
    """Something that reads what others wrote. Called with bytes, it lets nothing out but an error of etcetera's."""

    seeds = ()  # type: tuple

    def __init__(self, place):
        self.place = Path(str(place))
        self.here = write(self.place / 'here', {'.': None})  # all that a target may write is below

    def __call__(self, data):
        with contextlib.suppress(etc.Error):
            self.read(data)


class ArchiveTarget(Target):
    """Pulls. The first byte says what the rest is: an archive, a partition, or an index."""

    def __init__(self, place):
        super().__init__(place)
        self.config = etc.Config((self.here / 'share').as_uri(), self.here / 'home', connections=1)
        train = entry('data/train/')
        files = (train + entry('data/train/a', b'alpha') + entry('data/train/b/')
                 + entry('data/train/b/' + 'n' * 120, mode=0o755)
                 + entry('data/train/l', kind=b'2', link='b/\u00e9') + entry('data/train/m', b'abc'))
        whole = indexed(files, files=4, size=8)
        index, _ = members(whole)[-2:]
        self.blocks = whole[:index[0]]
        self.seeds = [b'\0' + whole, b'\1' + files, b'\1' + train, b'\2' + index[3]] + [
            b'\1' + train + entry(name) for name in ('../x', '/x', 'data/train/../../../x', 'data/train/' + 'd/' * 300)]

    def read(self, data):
        kind, data = data[:1], data[1:]
        if kind == b'\1':
            data = indexed(data, files=4, size=8)
        elif kind == b'\2':
            data = self.blocks + framed(data, len(self.blocks))
        self.pull(data)

    def pull(self, archive):
        write(self.here / 'share', {'X.tgz': archive})
        try:
            with contextlib.suppress(etc.Error):
                etc.info('X', remote=True, config=self.config)
            digest = etc.pull('X', force=True, config=self.config).digest
            assert etc.verify('X', config=self.config) == etc.Dataset(self.here / 'home/X').digest == digest
        finally:
            beside = {str(path.relative_to(self.place)) for place in (self.place, self.here, self.here / 'home')
                      for path in place.glob('*')}
            assert beside <= {'here', 'here/share', 'here/home', 'here/home/X', 'here/home/.etcetera'}, beside


class TgzTarget(ArchiveTarget):
    """Pulls of what other tools packed; the first byte says whether the rest is compressed."""

    def __init__(self, place):
        super().__init__(place)
        self.seeds = [b'\1' + entry('data/train/x') + evil + bytes(1536) for evil in (
            entry('../x'), entry('data/x/../../../x'), entry('data/up', kind=b'2', link='../..') + entry('data/up/x'),
            entry('data/train/sparse', kind=b'S', _386=b'%011o\0%011o\0' % (4096, 512), _483=b'%011o\0' % 8192))]
        root = write(self.here / 'share', {'data/a': 'a', 'data/%s/%s' % ('n' * 60, 'm' * 60): '',
                                           'data/s': ('->', 'a'), 'data/\u00e9': ''})
        os.link(str(root / 'data/a'), str(root / 'data/h'))
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode='w', format=form) as tar:
                tar.add(str(root / 'data'), './data/train')
            self.seeds += [b'\1' + out.getvalue(), b'\0' + gzip.compress(out.getvalue())]

    def read(self, data):
        self.pull(data[1:] if data[:1] == b'\0' else gzip.compress(mended(data[1:]), 1))


class YamlTarget(Target):
    """The YAML subset."""

    seeds = [b'url: s3://bucket/x # c\npublic: yes\nconnections: 0x10\n',
             b'---\nhome: "~/\\u00e9\\n"\nregion: \'it\'\'s\'\nurl: ~\n',
             b'connections: 1_0\nregion: 0b1\nsse: 017\nurl: .5\nhome: 2001-01-01\n',
             b'\xef\xbb\xbf"region": v\r\nsse: - x\n']

    def read(self, data):
        agrees_with_yaml(self.here / 'settings', data)


class AnswerTarget(Target):
    """What a web server answers: a line with the status and headers, and the body."""

    url, settings = '', {}
    seeds = [b'200\n<html><body><pre><a href="X.tgz">X</a> <A HREF=/x/Y.tgz>'
             b'<a href="../Z.tgz"><a href="http://h/x/W%2etgz?q#f">',
             b'200\n<!-- <a href="V.tgz"><a href="http://[x/X.tgz">',
             b'200\n<![CDATA[ <a href="X.tgz"> ]]><script><a href="X.tgz"></script><?x ?><a href="&#88;.tgz" href>',
             b'206|ETag:W/"x"|Last-Modified:Mon, 06 May 2024 07:08:09 -0000|Content-Range:bytes 0-4/5\n12345']

    def __init__(self, place):
        super().__init__(place)
        self.server = Server(S3Handler)
        self.server.fault = self.answer
        os.environ.update(HOME=str(place), AWS_EC2_METADATA_DISABLED='true')

    def answer(self, handler):
        head, _, body = self.data.partition(b'\n')
        headers = re.findall(r'\|([\w-]+):([^|\0-\x1f]*)', head.decode('latin-1'), re.ASCII)
        handler.answer(int(head[:3]) if head[:3] in (b'206', b'403', b'404') else 200, body, headers)

    def read(self, data):
        self.data = data
        url = self.url or self.server.url + '/x'
        config = etc.Config(url, self.here / 'home', connections=1, endpoint_url=self.server.url, **self.settings)
        for call in (lambda: etc.ls(remote=True, config=config), lambda: etc.info('X', remote=True, config=config)):
            try:
                call()
            except etc.Error as e:
                assert str(e).isprintable(), e


class S3Target(AnswerTarget):
    """S3's listings, objects and errors."""

    url, settings = 's3://bucket/some/prefix', {'aws_access_key_id': 'a', 'aws_secret_access_key': 'b'}
    seeds = [b'200\n' + S3_XML.format('ListBucketResult', (
                 '<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated><Contents>'
                 '<Key>some/prefix/X+%41.tgz</Key>'
                 '<LastModified>2024-05-06T07:08:09.000Z</LastModified><ETag>&quot;e&quot;</ETag>'
                 '<Size>123</Size></Contents>')).encode(),
             b'403\n<Error><Code>AccessDenied</Code><Message>about<![CDATA[ <it> ]]>\x1b[31m</Message></Error>',
             b'200\n<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]><ListBucketResult>&a;</ListBucketResult>',
             b'200\n' + b'<a>' * 30 + b'</a>' * 30,
             b'206|ETag:"x"|Last-Modified:Mon, 06 May 2024 07:08:09 GMT|Content-Range:bytes 0-4/5\n12345',
             b'404|x-amz-bucket-region:eu-west-1|ETag:bare\n']


class GoogleTarget(AnswerTarget):
    """Google's listings, objects and errors."""

    url = 'gs://bucket/some/prefix'
    seeds = [b'200\n{"kind": "storage#objects", "items": [{"name": "some/prefix/X.tgz", "size": "5", '
             b'"generation": "17", "updated": "2024-05-06T07:08:09.123Z"}], "nextPageToken": ""}',
             b'200\n{"name": "some/prefix/X.tgz", "size": 5, "generation": 17}',
             b'403\n{"error": {"code": 403, "message": "\\u001b[31m no"}}']


class KeysTarget(S3Target):
    """The keys that a container's service gives."""

    settings = {}
    seeds = [b'200\n{"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "t", "Expiration": "2034-05-06T07:08:09Z"}',
             b'403\n{"Code": "c", "Message": "\\u001b[31m no"}']

    def read(self, data):
        os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI'] = self.server.url + '/keys'
        super().read(data)

    def answer(self, handler):
        return handler.path == '/keys' and super().answer(handler)


class ProfilesTarget(S3Target):
    """Settings and credentials files of AWS."""

    settings = {'aws_profile': 'work'}
    seeds = [b'[default]\naws_access_key_id = a\naws_secret_access_key=b\nregion=eu-west-1\ns3 =\n'
             b'  addressing_style = path\n', b'# c\n[profile work]\nregion: x ; c\nendpoint_url = http://h:1/\n'
             b'ca_bundle = x\n[default]\naws_session_token=t\n']

    def read(self, data):
        path = write(self.here, {'settings': data}) / 'settings'
        os.environ.update(AWS_CONFIG_FILE=str(path), AWS_SHARED_CREDENTIALS_FILE=str(path))
        super().read(b'200\n')


WORDS = [b'../', b'/', b'\0', b'\n', b'null', b'[' * 99, b'"', b'\xff', b'\xc3\xa9', b'<!', b'&#0;', b': ', b'%00']
NUMBERS = [b'0', b'-1', b'1', b'9' * 25, b'77777777777', b'4294967296', b'1e999', b'8']


def mutated(rng, seeds):
    """One of the seeds with some changes."""
    data = rng.choice(seeds)
    for _ in range(rng.choice([1, 1, 2, 3, 5, 9])):
        at = rng.randrange(len(data) + 1)
        part = data[at:at + rng.choice([1, 1, 2, 4, 8, 64, 512])]
        rest = data[at + len(part):]
        other = rng.choice(seeds)
        start = rng.randrange(len(other) + 1)
        part = rng.choice([
            b'', part * 2, part * 9, bytes(len(part)), other[start:start + len(part)], rng.choice(WORDS) + part,
            bytes(byte ^ 1 << rng.randrange(8) for byte in part[:1]) + part[1:], noise(rng.randrange(9), rng.random()),
            re.sub(rb'[0-9]+', rng.choice(NUMBERS), part, 1)])
        data = data[:at] + part + rest
    return data


class Fuzzing(Case):
    def test_targets(self):
        for target in (ArchiveTarget, TgzTarget, YamlTarget, AnswerTarget, S3Target, GoogleTarget, ProfilesTarget,
                       KeysTarget):
            run = target(self.tmp / target.__name__)
            for seed in run.seeds:
                run(seed)
            for number in range((300 if target is YamlTarget else 50) * RUNS):
                with self.subTest(target=target.__name__, number=number):
                    run(mutated(random.Random('%s %d' % (target.__name__, number)), run.seeds))


def run(names):
    done = unittest.main(argv=sys.argv[:1] + names, exit=False).result
    if done.skipped and os.environ.get('ETC_TEST_REQUIRE_PEERS'):
        sys.exit('skipped, though all peers are demanded: %s' % done.skipped)
    sys.exit(not done.wasSuccessful())


def run_class(name, path):
    """Run a class; what it says goes to a file."""
    with open(path, 'wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(1, 2)
    faulthandler.dump_traceback_later(60 * (9 + RUNS), exit=True)  # rather than hang
    run([name])


def all_classes():
    """Run all classes, each in a process of its own, one more at a time than there are cores, as many wait much."""
    begin, names = time.time(), unittest.defaultTestLoader.getTestCaseNames
    waiting = [name for name, cls in globals().items()
               if isinstance(cls, type) and issubclass(cls, unittest.TestCase) and names(cls)]
    context = multiprocessing.get_context('fork' if hasattr(os, 'fork') else None)  # which need not import again
    running, failed = {}, 0
    with tempfile.TemporaryDirectory(prefix='etc-said-') as said:
        while waiting or running:
            if waiting and len(running) <= (os.cpu_count() or 1):
                name = waiting.pop()
                process = context.Process(target=run_class, args=(name, os.path.join(said, name)))
                process.start()
                running[process.sentinel] = name, process, time.time()
                continue
            for name, process, start in map(running.pop, multiprocessing.connection.wait(running)):
                process.join()
                out = Path(said, name).read_text(encoding='utf-8', errors='replace').strip()
                out = out if process.exitcode else out.split('\n')[-1]
                print('%-22s %6.1f s  %s' % (name, time.time() - start, out), flush=True)
                failed |= process.exitcode != 0
    print('%s in %.1f s' % ('FAILED' if failed else 'OK', time.time() - begin))
    return failed


if __name__ == '__main__':
    if len(sys.argv) == 1:
        sys.exit(all_classes())
    run(sys.argv[1:])
