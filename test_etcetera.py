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
import functools
import glob
import gzip
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import logging
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
RUNS = int(os.environ.get('ETC_TEST_RUNS') or 1)  # how many times longer random tests run


def needs(condition, reason):
    """Skip a class without its peers, but fail where they are demanded."""
    if condition or os.environ.get('ETC_TEST_REQUIRE_PEERS'):
        return lambda cls: cls
    return unittest.skip(reason)


def importable(*names):
    try:
        for name in names:
            __import__(name)
    except ImportError:
        return False
    return True


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


@functools.lru_cache(maxsize=4)  # as it takes longer to make than most of what is done with it
def noise(size, seed=0):
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, 'little') if size else b''


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
        'data/test/big': noise(2 * MIB + 12345), 'data/test/zeros': bytes(MIB),
        'data/test/block': noise(MIB - 1024, 1), 'assets/deep/er/file': 'f'})
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
                if not os.path.islink(place):
                    os.chmod(place, 0o700)
        shutil.rmtree(path, ignore_errors=True)


def default_signals():
    """In a child: let signals reach it even where the tests run in the background, or under nohup, and ignore them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Case(unittest.TestCase):
    maxDiff = 2000

    def setUp(self):
        self.tmp = Path(os.path.realpath(tempfile.mkdtemp(prefix='etc-test-')))
        self.tmp.chmod(0o755)
        self.addCleanup(self.clean)
        saved = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(saved)))
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

    def config(self, home='home', **more):
        return etc.Config(**dict(dict(self.settings, url=self.url, home=self.tmp / home), **more))

    def etc(self, *args, home='home', url=None, status=0):
        """Run the command line in this process; returns (stdout, stderr)."""
        settings = self.tmp / 'settings.yaml'
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

    def share(self, root, name='X', home='home'):
        """Publish a dataset."""
        self.etc('register', root, name, home=home)
        self.etc('push', name, home=home)

    def spawn(self, *args, home='home', url=None, python=(), **kwargs):
        command = [sys.executable, *python, SCRIPT, '--url', url or self.url, '--home', self.tmp / home, *args]
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
    """Counts, and lets a test misbehave: `fault(handler)` may answer itself and return True."""
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

    def __init__(self, handler):
        super().__init__(('127.0.0.1', 0), handler)
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


class SignedHandler(Handler):
    """Checks signatures."""
    service = 's3'

    def error(self, status, code, headers=(), message=''):
        xml = '<?xml version="1.0"?>\n<Error><Code>%s</Code><Message>%s</Message></Error>'
        self.answer(status, (xml % (code, message or 'about ' + code)).encode(), headers)

    def unsigned(self, body):
        """What is wrong with the signature; written from AWS's description, not from etcetera."""
        match = re.match(r'AWS4-HMAC-SHA256 Credential=([^/]+)/((\d{8})/([^/]+)/%s/aws4_request), ?SignedHeaders='
                         r'([^,]+), ?Signature=([0-9a-f]{64})$' % self.service, self.headers.get('Authorization', ''))
        if not match:
            return 'AccessDenied'
        akid, scope, day, region, names, signature = match.groups()
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
        if self.server.fault and self.server.fault(self):
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
        if 'Range' not in self.headers:
            return self.answer(200, data, headers)
        start, stop = asked_range(self.headers, len(data))
        if start >= stop:
            return self.error(416, 'InvalidRange')
        headers['Content-Range'] = 'bytes %d-%d/%d' % (start, stop - 1, len(data))
        self.answer(206, data[start:stop], headers)

    s3_head = s3_get

    def s3_put(self, body):
        expected = {'Content-MD5': md5(body).digest(), 'x-amz-checksum-sha256': hashlib.sha256(body).digest()}
        given = {name: self.headers[name] for name in expected if self.headers[name]}
        kind = 'Part' if 'partNumber' in self.query else 'Object'
        copies = self.headers['x-amz-copy-source']
        if copies and given:
            return self.error(400, 'InvalidRequest', message='there is no body to check')
        if self.server.must_check and not given and not copies:
            return self.error(400, 'InvalidRequest', message='Content-MD5 OR x-amz-checksum- HTTP header is '
                              'required for Put %s requests with Object Lock parameters' % kind)
        if any(base64.b64decode(value) != expected[name] for name, value in given.items()):
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
        if any(len(part) < 5 * MIB for part in data[:-1]):
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
        self.server = Server(S3Handler)
        self.addCleanup(self.server.stop)
        self.url = 's3://bucket/some/prefix'
        self.settings = {'endpoint_url': self.server.url, 'aws_access_key_id': AKID, 'aws_secret_access_key': SECRET}

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
                ("did you mean 'endpoint_url'", 'url: s3://b\nendpont_url: x'),
                ('true or false', 'public: 1'), ('whole number', '\nconnections: many;connections: true'),
                ('from 1 to 256', 'connections: 0;connections: 257'), ('from 0 to 9', 'compression_level: 10'),
                ("did you mean 'url'", '\ufeffurl: x\nulr: x')):
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
        with self.assertRaisesRegex(etc.ConfigError, 'no settings file .*; create it, or drop --config'):
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
        for _ in range(5000 * RUNS):
            lines = []
            for _ in range(rng.randrange(1, 4)):
                shape = rng.choice(shapes) if rng.random() < .4 else shapes[0]
                value = ''.join(rng.choice(atoms) for _ in range(1 if rng.random() < .7 else 2))
                lines.append(shape % (rng.choice(keys), value)[:shape.count('%s')])
            text = rng.choice(['', '---\n', '\n', '# c\n']) + rng.choice(['\n', '\n', '\r\n', '\n\n']).join(lines)
            read += agrees_with_yaml(self.tmp / 'settings', text.encode('utf-8'))
        self.assertGreater(read, 500)


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
        self.assertEqual(str(caught.exception), "no partition 'val' in Small; it has: test, train")
        self.assertNotIn('val', ds)
        self.assertIsNone(ds.get('val'))
        self.assertFalse(hasattr(ds, '__setitem__'))

    def test_validation(self):
        root = self.tmp / 'bad'
        for files, problem in (
                ({'x': 'y'}, "needs a directory 'data'"), ({'data': 'y'}, "needs a directory 'data'"),
                ({'data': None}, 'is no dataset: '),
                ({'data/p/x': 'y', 'data/stray': 'z'},
                 "may hold only directories (partitions), but 'data/stray' is a file"),
                ({'data/p/x': 'y', 'data/link': ('->', 'nowhere')}, "'data/link' is a link to nothing"),
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
        self.fails_with('a path cannot contain a NUL', 'register', 'a\0b', 'X')

    def test_names(self):
        root = small(self.tmp / 'ds')
        bad = '. .. .x -x _x a/b a\\b \u00e9 a@b ../x /x a@sha256:12 CON\0'.split() + ['', 'a b', 'a\n', 'x' * 129]
        for name in bad:
            for call in (etc.pull, etc.push, etc.create, etc.purge, etc.verify, etc.dataset, etc.info, etc.register):
                with self.subTest(name=name, call=call.__name__):
                    problem = 'is not NAME@sha256:' if '@' in name else "cannot be a dataset's name"
                    with self.assertRaisesRegex(etc.InvalidDataset, problem):
                        call(*[root] * (call is etc.register), name, config=self.config())
        self.assertFalse((self.tmp / 'home').exists())
        for name in ('a', '0', 'A.b-c_d', 'x' * 128):
            self.etc('register', root, name)

    def test_register(self):
        root, other = small(self.tmp / 'ds'), small(self.tmp / 'other')
        self.etc('register', root)
        self.etc('register', root, 'as', 'Two')
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(str(self.tmp))
        self.etc('register', './ds', 'Three')
        self.assertEqual(self.etc('ls')[0], 'Three\nTwo\nds\n')
        self.assertIn('registered already', self.etc('register', root, 'Two')[1])
        self.fails_with('is installed already', 'register', other, 'Two')
        self.etc('register', '-f', other, 'Two')
        self.assertEqual([(self.tmp / 'home' / name).resolve() for name in ('Two', 'Three')], [other, root])
        for words in ('a b c', 'a as b c'):
            err = self.etc('register', *words.split(), status=2)[1]
            self.assertIn("'etc register -h' shows how", err)
        self.etc('purge', 'Two', 'Three')
        self.assertEqual((self.installed(), tree(other)), (['ds'], tree(root)))

    def test_register_copy(self):
        root, new, copy = odd(self.tmp / 'ds', 10), small(self.tmp / 'new'), self.tmp / 'home/Copy'
        self.etc('register', '--copy', root, 'Copy')
        self.assertFalse(copy.is_symlink())
        self.assertEqual(tree(copy), tree(root))
        self.assertEqual(etc.verify('Copy', config=self.config()), etc.Dataset(root).digest)
        for path in copy.rglob('*'):
            self.assertFalse(path.is_file() and path.stat().st_mode & 0o222, path)
        self.fails_with("another 'Copy' is installed already", 'register', '--copy', root, 'Copy')
        self.etc('register', '--copy', '-f', new, 'Copy')
        self.assertEqual(tree(copy), tree(new))
        self.etc('register', '-f', root, 'Copy')  # a directory makes room for a link
        self.assertTrue(copy.is_symlink())
        self.etc('register', '-f', '--copy', new, 'Copy')  # and a link for a directory
        self.assertEqual((tree(copy), self.leftovers()), (tree(new), []))

    def test_create(self):
        self.etc('create', 'New')
        self.assertEqual(list(etc.dataset('New', config=self.config())), ['test', 'train'])
        self.fails_with("another 'New' is installed already", 'create', 'New')
        write(self.tmp / 'home/New', {'data/train/x': 'x'})
        self.etc('create', '-f', 'New', 'val', 'dev set')
        expected = write(self.tmp / 'new', {'data/val': None, 'data/dev set': None})
        self.assertEqual(tree(self.tmp / 'home/New'), tree(expected))
        for bad in ('..', 'a/b', '.', ''):
            self.fails_with("etc: '%s' cannot be a partition's name" % bad, 'create', 'Bad', bad)
        for call in (functools.partial(etc.create, 'Bad'), functools.partial(etc.dataset, 'Bad', True)):
            for bad in ('train', ()):
                with self.assertRaisesRegex(etc.InvalidDataset, 'partitions must be a list of one or more names'):
                    call(bad, config=self.config())

    def test_register_what_is_installed(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        write(self.tmp / 'home/X/data', {'data/p/x': 'x'})  # so that even data/ looks like a dataset
        for path in ('home/X', 'home/X/data/..', 'home/X/data'):
            self.fails_with("is what is installed as 'X'; use --copy", 'register', '-f', self.tmp / path, 'X')
        self.etc('register', '-f', '--copy', self.tmp / 'home/X', 'X')
        self.etc('register', self.tmp / 'home/X', 'Y')
        self.assertEqual(*[etc.dataset(name, config=self.config()).digest for name in 'XY'])

    def test_registered_directory_that_is_gone(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        remove(self.tmp / 'ds')
        for command in ('push', 'verify', 'info'):
            self.fails_with("'etc purge X' forgets it", command, 'X')
        self.etc('ls', '-l')
        self.etc('purge', 'X')

    def test_a_file_for_a_directory(self):
        file = str(write(self.tmp, {'file': 'x'}) / 'file')
        problem = ('Not a directory: ' if os.name == 'posix' else '') + file
        self.fails_with(problem, 'ls', '-l', home='file')
        self.fails_with(problem, 'ls', '-r', '-l', url=Path(file).as_uri())

    def test_info_and_purge(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'Small')
        self.assertRegex(self.etc('info', 'Small')[0], '(?s)sha256:.*test.*train.*"classes": 10.*# Small')
        found, = json.loads(self.etc('ls', '--json')[0])
        more = json.loads(self.etc('info', '--json', 'Small')[0])
        self.assertEqual(more, dict(found, meta={'classes': 10}, readme='# Small\n'))
        self.assertEqual(found['partitions'], {'train': {'files': 2, 'size': 5006}, 'test': {'files': 1, 'size': 5}})
        self.assertIn(found['digest'], self.etc('ls', '-l')[0])
        self.assertIn(b'Traceback', self.spawn('-v', 'info', 'Nope').communicate()[1])
        for path in (self.tmp / 'home').rglob('Small/**'):
            path.chmod(0o555)
        self.assertEqual(self.etc('purge', 'Nope', 'Small', 'Nada', status=1)[1].count('etc: no local dataset'), 2)
        self.nothing_is_left()

    def test_verify(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'Small')
        digest = etc.verify('Small', config=self.config())
        self.etc('verify', 'Small@' + digest)
        self.fails_with("'Small': expected digest sha256:000", 'verify', 'Small@sha256:' + '0' * 64)
        victim = self.tmp / 'home/Small/data/train/a.txt'
        victim.chmod(0o644)
        victim.write_text('alphA\n')
        err = self.etc('verify', 'Small', status=1)[1]
        self.assertIn('data/train differs', err)
        self.assertNotIn('data/test', err)
        self.fails_with("the files of 'Small': expected digest %s, found" % digest, 'push', 'Small')
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
        self.etc('pull', 'X', home='two')
        self.etc('verify', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), expected)

    def test_structure(self):
        root, segments = odd(self.tmp / 'ds'), []
        names = {name.replace(os.sep, '/'): content for name, content in tree(root).items()}
        for path in ('.', 'a', 'assets', 'data/empty', 'data/test', 'data/train'):
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
                ("'data/train/x' is a link to nothing", lambda: write(train, {'x': ('->', 'gone')})),
                ("'data/train/x'.* back to itself", lambda: write(train, {'x': ('->', 'y'), 'y': ('->', 'x')})),
                ('is a link to a directory above it', lambda: write(train, {'up': ('->', '../../..')})),
                ("'data/train/pipe' is neither a file nor a directory", lambda: os.mkfifo(str(train / 'pipe'))),
                (r'caf\\xe9.* is not valid UTF-8', lambda: os.mkdir(os.fsencode(str(train)) + b'/caf\xe9'))):
            with self.subTest(problem):
                write(train, {'ok': 'ok'})
                make()
                self.etc('register', '-f', self.tmp / 'ds', 'Bad')
                self.assertRegex(self.etc('push', 'Bad', status=1)[1], problem)
                self.assertEqual(tree(self.tmp / 'share'), {})
                remove(train)

    def test_file_that_grows(self):
        root, stop = write(self.tmp / 'ds', {'data/train/log': b'x' * (8 * MIB)}), threading.Event()
        self.etc('register', root, 'X')

        def grow():
            with open(str(root / 'data/train/log'), 'ab', 0) as file:
                while not stop.is_set():
                    file.write(b'y' * 100)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(grow)
            try:
                self.fails_with("'data/train/log' changed", 'push', 'X')
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
            self.assertRegex(self.etc('pull', 'X', status=1)[1], "^etc: 'X' in file:///.*: the archive (%s)" % problem)
            self.nothing_is_left()


class Foreign(Pulls):
    """Archives that other tools made."""

    def check(self, root):
        """Pull X, which must be the same as this directory."""
        ds = etc.pull('X', config=self.config())
        self.assertEqual((ds.digest, tree(ds.root) == tree(root)), (etc.Dataset(root).digest, True))
        self.etc('verify', 'X')
        self.assertIn('is installed already', self.etc('pull', 'X')[1])
        self.etc('purge', 'X')

    def tar(self, *entries):
        self.offer(gzip.compress(b''.join(entries), 1))

    def train(self, *entries):
        """Pull X, of these entries; returns the files of its partition train."""
        self.tar(*entries, bytes(1024))
        self.etc('pull', 'X')
        names = sorted(os.listdir(str(self.tmp / 'home/X/data/train')))
        self.etc('purge', 'X')
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
        os.link(str(short / 'data/train/link'), str(short / 'data/test/twin'), follow_symlinks=False)
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
        headers = '(its global headers|(the )?headers( of one entry)?) take more than 4194304 bytes'
        wrong = 'backward|headers of one entry|ends too early|bad checksum|invalid|subsequent|end of file'
        for kind, size in itertools.product((b'L', b'K', b'x', b'g', b'X'), (b'%011o\0' % (700 * MIB), huge)):
            self.breaks(headers, entry('././@LongLink', kind=kind, _124=size) + bytes(5 * MIB), (kind, size))
        numbers = entry('pax', b'22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=9\n', b'x')
        for what, tar, message in (
                ('many records', b''.join(entry('pax', b'1000011 %08d=%s\n' % (number, b'v' * 999993), b'g')
                                          for number in range(6)), headers),
                ('many names', entry('././@LongLink', b'n' * MIB, b'L') * 5, headers),
                ('a sparse map', numbers + entry('data/train/s', b'9999999\n' + b'0\n' * 4 * MIB), headers),
                ('a negative file', ok + entry('data/train/n', _124=negative), wrong),
                ('a negative name', ok + entry('data/train/n', kind=b'L', _124=negative), wrong)):
            self.breaks(message, tar + ok + bytes(1024), what)
        self.tar(entry('././@LongLink', b't' * 5000 + b'\0', b'K'), entry('data/train/l', kind=b'2'), ok, bytes(1024))
        err = self.etc('pull', 'X', status=1)[1]
        self.assertIn('leads out of the dataset or nowhere', err)
        self.assertLess(len(err), 1000)
        for zeros in [entry('data/train/x', kind=b'S', _483=huge)] + [
                entry('data/train/x', pax={'GNU.sparse.size': str(1 << 60), 'GNU.sparse.map': claim})
                for claim in ('0,0', '%d,%d' % (1 << 60, 1 << 60))]:  # of data that is not there
            self.tar(zeros, bytes(1024))
            self.fails_with('nearly all zeros', 'pull', 'X')

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
        self.etc('register', root, 'X')
        write(root / 'data', dict.fromkeys(['.DS_Store', '._train', 'desktop.ini', 'Thumbs.db', '.directory'], 'left'))
        self.assertEqual((list(etc.Dataset(root)), etc.Dataset(root).digest), (['test', 'train'], digest))
        for pack in (lambda: self.etc('push', 'X'), lambda: self.pack(root)):
            pack()
            ds = etc.pull('X', force=True, config=self.config('other'))
            self.assertEqual((ds.digest, sorted(os.listdir(str(ds.root / 'data')))), (digest, ['test', 'train']))
        write(root, {'data/notes.txt': 'no litter', 'data/train/.DS_Store': 'inside a partition it is a file as any'})
        self.fails_with("'data/notes.txt' is a file; move it", 'push', '-f', 'X')
        (root / 'data/notes.txt').unlink()
        self.assertNotEqual(etc.Dataset(root).digest, digest)

    def test_push_of_what_was_pulled(self):
        self.pack(small(self.tmp / 'ds'))
        before = tree(self.tmp / 'share')
        self.etc('pull', 'X')
        self.assertIn('in %s already, and identical' % self.url, self.etc('push', 'X')[1])
        self.assertEqual(tree(self.tmp / 'share'), before)
        self.pack(odd(self.tmp / 'other', 3))
        self.fails_with("another 'X' is in", 'push', 'X')

    def test_not_an_archive(self):
        for content, problem in ((b'', 'it ends too early'), (b'hello', r'Not a gzipped file \(b.he.\)'),
                                 (b'\x1f\x8b', 'Compressed file ended before'), (noise(1000), 'Not a gzipped file')):
            self.refused('is damaged or not a .tgz: ' + problem, content)
        self.pack(SCRIPT, 'X/data/train')
        self.fails_with("needs a directory 'data'", 'pull', 'X')
        root = small(self.tmp / 'ds')
        self.pack(root, 'digits')
        self.fails_with("its directory 'digits' is one: pack that with 'tar czf NAME.tgz -C digits .'", 'pull', 'X')
        self.nothing_is_left()
        self.fails_with('; %s is one' % root, 'register', self.tmp, 'X')


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
        """Pull a .tgz with these entries; it must fail in any order with the same words, and leave nothing anywhere."""
        ok, said = (entry('data/train/ok', b'ok'),), set()
        for order in (ok + entries, entries + ok):
            write(self.tmp, {'victim/file': 'precious', 'share/X.tgz': gzip.compress(b''.join(order) + bytes(1024), 1)})
            before = self.outside()
            said.add(self.etc('pull', 'X', status=1)[1])
            self.assertEqual((self.outside(), self.installed(), self.leftovers()), (before, [], []), said)
        with self.subTest(problem):
            err, = said
            self.assertIn(problem, err)

    def test_names(self):
        unsafe = "the archive holds the unsafe name '%s'; do not trust it"
        for name in ('/etc/passwd', str(self.tmp / 'victim/new'), '../victim/new', 'data/../../../victim/new', '..',
                     'data/train/..',
                     '../../../../../../../../tmp/etc-evil'):
            for attack in (entry(name, b'evil'), entry(name + '/'), entry('data/train/x', b'evil', pax={'path': name})):
                self.attack(unsafe % name, attack)
        self.attack(unsafe % r'data/train/a\x00b', entry('data/train/x', pax={'path': 'data/train/a\0b'}))
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
                   (nowhere % ('s', outside[1]), link('s', outside[1]), link('h', 'data/train/s', b'1')),
                   # which is a link, too
                   ("the hard link 'data/train/h' to 'data/train/none', which is not in it;",
                    link('h', 'data/train/none', b'1')),
                   (twice % 'l', link('l', '../../..'), entry('data/train/l/victim', b'evil')),
                   (twice % 's', link('s', 'ok'), link('s', 'ok')),
                   (twice % 's', link('s', 'ok'), link('s', 'data/train/s', b'1'))]):
            self.attack(problem, *entries)

    def test_kinds_and_duplicates(self):
        twice = "the archive holds '%s' twice (or names that this disk cannot tell apart);"
        unknown = "'data/train/x' of the unknown type '%s'; pack it with tar's default options"
        special = [("'data/train/dev', a device or pipe; do not trust it", entry('data/train/dev', kind=kind))
                   for kind in (b'3', b'4', b'6')]
        for problem, attack in special + [
                (unknown % 'M', entry('data/train/x', kind=b'M')),  # the rest of a file that began on another volume
                (unknown % 'D', entry('data/train/x', kind=b'D')),  # a directory of an incremental archive
                (twice % 'data/train/ok', entry('data/train/ok', b'again')),
                (twice % 'data/train/ok', entry('data/train/ok/')),
                (twice % 'data/train/ok', entry('data/train/ok/below', b'x')),
                (twice % 'data', entry('data', b'a file')),
                (twice % 'data/train', entry('data/train', kind=b'2', link='../../../victim')),
                (twice % 'data', entry('data', kind=b'2', link='.'))]:
            self.attack(problem, attack)

    def test_webs_of_links(self):
        root = write(self.tmp / 'web', {'data/p%02d/%s' % (n, side): ('->', '../p%02d' % (n + 1))
                                        for n in range(15) for side in 'ab'})
        write(root, {'data/p15/x': 'x'})
        self.addCleanup(setattr, etc, '_MAX_FOLLOWED', etc._MAX_FOLLOWED)
        etc._MAX_FOLLOWED = 2000
        self.etc('register', root, 'W')
        self.fails_with('its links lead to too many files; remove links', 'push', 'W')

    def test_large_meta(self):
        root = write(self.tmp / 'ds', {'data/train/x': 'x', 'README.md': b'r' * (3 * MIB)})
        self.etc('register', root, 'X')
        self.assertEqual(len(etc.info('X', config=self.config())['readme']), MIB)
        write(root, {'meta.json': b'{' + b' ' * (17 * MIB) + b'}'})
        self.fails_with('meta.json is not JSON: it is larger than 16777216 bytes', 'push', 'X')
        (root / 'meta.json').unlink()
        getattr(os, 'mkfifo', os.mkdir)(str(root / 'meta.json'))
        self.fails_with('meta.json is not JSON: it is not a file', 'push', 'X')

    def test_indexes(self):
        blocks, unreadable = block(bytes(1024)), 'is damaged: its index is unreadable; '
        for text in (b'[' + b'[],' * 4000000 + b'1]', b'{"etcetera":' + b'1' * 1000000 + b'}', b'[' * 100000,
                     b'{"etcetera":2.5}', b'{"etcetera":1}', b'[]', b'null', b'\xff'):
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
                for os.environ['ETC_LIBDEFLATE'] in '01':
                    self.refused(problem, indexed((says[0], block(*says)), size=30000), what)
        for body in (good, stored):
            for os.environ['ETC_LIBDEFLATE'] in '01':
                self.accepted(indexed((payload, block(payload, body)), size=30000))

    def test_one_flipped_byte(self):
        root = write(self.tmp / 'ds', {'data/train/a': 'text ' * 3000, 'data/train/n': noise(70000),
                                       'data/test/b': 'b' * 500, 'README.md': 'r'})
        self.share(root, home='pub')
        archive, rng, silent = (self.tmp / 'share/X.tgz').read_bytes(), random.Random(3), 0
        positions = [rng.randrange(len(archive)) for _ in range(150 * RUNS)]
        positions += list(range(60)) + [rng.randrange(-1500, 0) for _ in range(100)]
        for position in positions:
            with self.subTest(position):
                bad = bytearray(archive)
                bad[position] ^= 1 << rng.randrange(8)
                os.environ['ETC_LIBDEFLATE'] = rng.choice('01')
                self.offer(bytes(bad))
                err = self.etc('pull', 'X', status=None)[1]
                if 'pulled' in err:  # a byte that means nothing, such as the time in a gzip header
                    silent += 1
                    self.assertEqual(tree(self.tmp / 'home/X'), tree(root))
                    self.etc('purge', 'X')
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
        self.fails_with('is damaged: a block does not match its checksum or size' + remedy, 'info', '-r', 'X')



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
size_t libdeflate_deflate_compress(void *c, const void *in, size_t n, void *out, size_t room) {
    return say("deflates\n");
}
int libdeflate_deflate_decompress_ex(void *d, const void *in, size_t n, void *out, size_t room,
                                     size_t *read, size_t *written) {
    memset(out, 0, *written = 1024);
    *read = n - 8;
    return say("inflates\n");
}
unsigned libdeflate_crc32(unsigned crc, const unsigned char *data, size_t n) {
    crc = ~crc;
    for (size_t at = 0; at < 8 * n; at++)
        crc = crc >> 1 ^ (0xedb88320 & -((crc ^ data[at / 8] >> at % 8) & 1));
    return ~crc;
}
'''


class Deflate(Case):
    def setUp(self):
        super().setUp()
        os.environ['ETC_LIBDEFLATE'] = '1'
        if 'libdeflate' not in self.etc('--version')[0]:
            self.skipTest('libdeflate is not installed, or this is not CPython')

    def test_version(self):
        for os.environ['ETC_LIBDEFLATE'], pattern in (('1', 'libdeflate'), ('0', r'zlib \d[\w.-]*')):
            self.assertRegex(self.etc('--version')[0], r'\Aetcetera %s \(Python %s, %s\)\n\Z' % (
                re.escape(etc.__version__), re.escape(sys.version.split()[0]), pattern))

    def test_each_reads_what_the_other_writes(self):
        rng = random.Random(1)
        text = ''.join('line %d says %x\n' % (number, rng.randrange(1 << 20)) for number in range(50000))
        root = write(self.tmp / 'ds', {'data/padded/%02d' % n: noise(700 + n, n) for n in range(60)})
        write(root, {'data/text/a': text, 'data/noise/n': noise(100000), 'data/zeros/z': bytes(MIB), 'README.md': ''})
        self.etc('register', root, 'X')
        share, zlib_sizes, sizes = self.tmp / 'share', [], []
        for level in range(10):
            for writer, reader, found in (('0', '1', zlib_sizes), ('1', '0', sizes)):
                os.environ['ETC_LIBDEFLATE'] = writer
                etc.push('X', config=self.config(compression_level=level))
                found.append((share / 'X.tgz').stat().st_size)
                (share / 'X.tgz').replace(share / 'Y.tgz')
                os.environ['ETC_LIBDEFLATE'] = reader
                self.etc('pull', 'Y', home='two')
                self.assertEqual(tree(self.tmp / 'two/Y'), tree(root), (writer, level))
                self.etc('purge', 'Y', home='two')
        self.assertEqual(sizes[0], zlib_sizes[0])
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
            process = self.spawn(*words.split())
            said += b''.join(process.communicate()).decode()
            self.assertEqual(process.returncode, 0, said)
        del os.environ['PYTHONHOME']
        return said

    @unittest.skipUnless(sys.platform == 'linux', 'for the paths of Linux')
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
                self.etc('purge', 'X')
                (self.tmp / 'share/X.tgz').unlink()


# ---------------------------------------------------------------------------------------
# Remotes: one suite for all of them
# ---------------------------------------------------------------------------------------

class RemoteSuite:
    """What push, pull, ls and info do, wherever the datasets live.

    Subclasses set `url` and `settings`, and put(name, data) stores an object behind etcetera's back.
    """

    conditions = True  # whether the second of two pushes is refused
    atomic = True  # and does so when both end at the same instant
    copies = True  # whether it copies what a push need not send
    conditional_delete = True  # whether a push survives that ends just before what it replaced is removed

    def test_another_version(self):
        """Whether or not it copies, the new archive is right."""
        root = write(self.tmp / 'ds', {'data/test/y': noise(11 * MIB, 2), 'data/train/x': noise(12 * MIB, 1),
                                       'data/val/z': noise(11 * MIB, 3), 'README.md': 'one'})
        self.share(root, 'Old')
        for name, changes in (('Readme', {'README.md': 'two'}), ('Middle', {'data/train/x': noise(12 * MIB, 4)}), ('Same', {})):
            with self.subTest(name):
                write(root, changes)
                self.etc('register', root, name)
                err = self.etc('push', '-v', name)[1]
                self.assertEqual('were there already' in err, self.copies, err)
                self.etc('pull', name, home='two')
                self.assertEqual(tree(self.tmp / 'two' / name), tree(root))
                self.etc('purge', name, home='two')
        self.assertEqual(self.etc('ls', '-r')[0].split(), ['Middle', 'Old', 'Readme', 'Same'])

    def test_round_trip(self):
        root = odd(self.tmp / 'ds')
        self.etc('register', root, 'Odd')
        self.assertIn('pushed', self.etc('push', 'Odd')[1])
        self.assertIn('pulled', self.etc('pull', 'Odd', home='two')[1])
        self.assertEqual(tree(self.tmp / 'two/Odd'), tree(root))
        self.etc('verify', 'Odd', home='two')
        self.etc('purge', 'Odd', home='two')
        ds = etc.dataset('Odd', auto_install=True, config=self.config('two'))
        self.assertEqual(ds.digest, etc.Dataset(root).digest)
        self.assertEqual(tree(ds.root), tree(root))

    def test_listing(self):
        self.etc('register', small(self.tmp / 'ds'), 'One')
        self.etc('push', 'One')
        self.etc('register', self.tmp / 'ds', 'a.b-c_d')
        self.etc('push', 'a.b-c_d')
        self.put('not a dataset.tgz', b'x')
        self.put('other.txt', b'x')
        self.put('sub/Inner.tgz', b'x')
        self.assertEqual(self.etc('ls', '-r')[0], 'One\na.b-c_d\n')
        self.assertEqual(etc.ls(remote=True, config=self.config()), ['One', 'a.b-c_d'])
        digest = etc.Dataset(self.tmp / 'ds').digest
        for item in json.loads(self.etc('ls', '-r', '--json')[0]):
            with self.subTest(item['name']):
                self.assertEqual((item['digest'], item['files']), (digest, 6))
                self.assertRegex(item['when'], r'^20\d\d-')
        self.assertIn(digest, self.etc('ls', '-r', '-l')[0])
        found = etc.info('One', remote=True, config=self.config('fresh'))
        self.assertEqual((found['meta'], found['readme']), ({'classes': 10}, '# Small\n'))
        self.assertEqual(found['partitions'], {'train': {'files': 2, 'size': 5006}, 'test': {'files': 1, 'size': 5}})
        self.assertFalse((self.tmp / 'fresh').exists())
        self.assertEqual(self.etc('ls', '-r', 'a*')[0], 'a.b-c_d\n')
        self.assertEqual(etc.ls(True, self.config(), ['O?e', 'nope']), ['One'])
        self.assertIn("did you mean 'One'", self.etc('pull', 'Onne', status=1)[1])
        self.assertIn("no dataset 'Nope' in", self.etc('info', '-r', 'Nope', status=1)[1])

    def test_push_again(self):
        self.share(small(self.tmp / 'ds'))
        self.assertIn('identical', self.etc('push', 'X')[1])
        write(self.tmp / 'ds', {'data/train/new': 'new'})
        self.assertIn('push -f', self.etc('push', 'X', status=1)[1])
        self.assertIn("'X': expected digest sha256:111", self.etc('push', 'X@sha256:' + '1' * 64, '-f', status=1)[1])
        self.etc('push', '-f', 'X@' + etc.Dataset(self.tmp / 'ds').digest)
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
        err = self.etc('push', 'Gone', 'X', status=1)[1]
        self.assertRegex(err, "\\Aetc: no local dataset 'Gone'; .*\netc: 'X' is in .* already, and identical\n\\Z")

    def test_pull_again(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        digest = etc.push('X', config=self.config())
        self.etc('pull', 'X@' + digest, home='two')
        self.assertIn('identical', self.etc('pull', 'X', home='two')[1])
        self.assertIn('identical', self.etc('pull', 'X')[1])  # what is registered is compared, too
        write(self.tmp / 'ds', {'data/train/new': 'new'})
        newer = etc.push('X', force=True, config=self.config())
        self.assertIn('pull -f', self.etc('pull', 'X', home='two', status=1)[1])
        self.assertIn('expected digest sha256', self.etc('pull', '-f', 'X@' + digest, home='two', status=1)[1])
        self.assertEqual(etc.dataset('X@' + digest, config=self.config('two')).digest, digest)
        self.etc('pull', '-f', 'X@' + newer, home='two')
        with self.assertRaisesRegex(etc.Corrupt, "'X': expected digest %s, found %s" % (digest, newer)):
            etc.dataset('X@' + digest, auto_install=True, config=self.config('two'))
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
        self.assertEqual(self.leftovers('two'), [])
        self.assertRegex(self.etc('pull', 'Nope', 'X', home='three', status=1)[1], "\\Aetc: no dataset 'Nope' in .*\netc: pulled X: ")
        self.assertEqual(self.installed('three'), ['X'])

    def test_partitions(self):
        root = write(small(self.tmp / 'ds'), {'data/train/large': noise(3 * MIB), 'data/val/v': 'v'})
        self.share(root)
        self.etc('pull', '-p', 'test', 'X', home='two')
        ds = etc.dataset('X', partitions=['test'], config=self.config('two'))
        self.assertEqual((ds.keys(), ds.meta), ({'test'}, {'classes': 10}))
        self.assertEqual(ds.digest, etc.Dataset(root).digest)
        self.assertIn('is only partly installed, so it cannot be pushed', self.etc('push', 'X', home='two', status=1)[1])
        self.assertIn('partly', self.etc('info', 'X', home='two')[0])
        self.etc('verify', 'X', home='two')
        with self.assertRaisesRegex(etc.NotFound, "'X' is only partly installed, without assets, data/train, data/val"):
            etc.dataset('X', config=self.config('two'))
        with self.assertRaisesRegex(KeyError, "no partition 'nope' in X; it has: test, train, val"):
            etc.dataset('X', partitions=['nope'], config=self.config('two'))
        self.assertIn("did you mean 'train'", self.etc('pull', '-p', 'trian', 'X', home='two', status=1)[1])
        self.assertIn('identical', self.etc('pull', '-p', 'test', 'X', home='two')[1])
        self.etc('pull', '-p', 'val', 'X', home='two')
        self.assertEqual(etc.Dataset(self.tmp / 'two/X').keys(), {'test', 'val'})
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(root))
        self.etc('verify', 'X', home='two')
        self.etc('push', 'X', home='two')
        self.assertEqual(etc.dataset('X', True, ['val', 'train'], self.config('three')).keys(), {'train', 'val'})
        self.assertEqual(etc.dataset('X', True, config=self.config('three')).keys(), {'train', 'test', 'val'})

    def test_several_partitions(self):
        self.share(write(small(self.tmp / 'ds'), {'data/val/v': 'v'}))
        for number, words in enumerate((['X', '-p', 'train', 'val'], ['-p', 'train', '-p', 'val', 'X'], ['-p', 'val', 'X', '-p', 'train'],
                                        ['X', '--partition', 'val', 'train', '-f'])):
            with self.subTest(words):
                self.etc('pull', *words, home=str(number))
                self.assertEqual(etc.Dataset(self.tmp / str(number) / 'X').keys(), {'train', 'val'})
        self.assertIn("'etc pull' takes no '--nonsense'", self.etc('pull', 'X', 'Y', '--nonsense', status=2)[1])

    def test_touched_and_copied_installs(self):
        root = write(small(self.tmp / 'ds'), {'data/val/v': 'v'})
        self.share(root)
        self.etc('pull', '-p', 'test', 'X', home='two')
        digest = etc.Dataset(root).digest
        shutil.copytree(str(self.tmp / 'two'), str(self.tmp / 'copy'), symlinks=True)
        partly = 'is only partly installed, so it cannot be pushed'
        self.assertIn(partly, self.etc('push', 'X', home='copy', status=1)[1])  # a copy is partial, too
        self.assertEqual(etc.dataset('X@' + digest, partitions=['test'], config=self.config('copy')).keys(), {'test'})
        write(self.tmp / 'two/X', {'.DS_Store': 'x'})
        (self.tmp / 'two/X/.DS_Store').unlink()
        self.assertIn(partly, self.etc('push', 'X', home='two', status=1)[1])
        self.assertEqual(etc.dataset('X@' + digest, partitions=['test'], config=self.config('two')).keys(), {'test'})
        self.assertEqual(etc.info('X', config=self.config('two'))['digest'], digest)
        modes = {p: p.stat().st_mode for p in (self.tmp / 'two/X').rglob('*') if p.is_file()}
        for path in modes:
            path.parent.chmod(0o555)
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(root))
        self.assertEqual(modes, {p: p.stat().st_mode for p in modes})
        self.etc('pull', 'X', home='copy')
        self.etc('verify', 'X', home='copy')
        self.etc('pull', '-f', '-p', 'test', 'X', home='copy')
        self.assertIn("'X': expected digest sha256:000", self.etc('purge', 'X@sha256:' + '0' * 64, home='copy', status=1)[1])
        self.etc('purge', 'X@' + digest, home='copy')

    def test_pins_are_about_the_files(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        digest = etc.push('X', config=self.config())
        write(self.tmp / 'ds', {'data/train/new': 'new'})
        self.assertIn('expected digest sha256', self.etc('push', 'X@' + digest, status=1)[1])

    def test_pull_mends(self):
        root = write(small(self.tmp / 'ds'), {'data/val/v': 'v'})
        self.share(root)
        self.etc('pull', 'X', home='two')
        victim = self.tmp / 'two/X/data/train/a.txt'
        victim.chmod(0o644)
        victim.write_text('broken')
        (self.tmp / 'two/X/data/val/v').unlink()
        self.assertIn("'X' is not what was installed: data/train, data/val differ;", self.etc('verify', 'X', home='two', status=1)[1])
        self.etc('pull', '-f', 'X', home='two')
        self.etc('verify', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(root))

    def test_overtaken_push(self):
        original = etc._read_file
        self.addCleanup(setattr, etc, '_read_file', original)
        for name, size in (('Small', 1000), ('Large', 9 * MIB)):  # a single request, and a multipart upload
            with self.subTest(name):
                self.etc('register', write(self.tmp / name / 'slow', {'data/train/x': noise(size, 1)}), name, home='one')
                self.etc('register', write(self.tmp / name / 'fast', {'data/train/x': noise(size, 2)}), name, home='two')
                overtaken = []

                def read(entry, start, stop, name=name, overtaken=overtaken):
                    if not overtaken:
                        overtaken.append(None)
                        overtaken[0] = etc.push(name, config=self.config('two'))
                    return original(entry, start, stop)
                etc._read_file = read
                err = self.etc('push', name, home='one', status=1 if self.conditions else 0)[1]
                etc._read_file = original
                if self.conditions:
                    self.assertIn("another '%s' is in %s already; push it under another name" % (name, self.url), err)
                    self.assertEqual(etc.info(name, remote=True, config=self.config())['digest'], overtaken[0])

    def test_races(self):
        if not (self.conditions and self.atomic):
            return
        for number in range(4):
            write(self.tmp / ('ds%d' % number), {'data/train/x': 'content %d' % number, 'data/train/big': noise(9 * MIB, number)})
            self.etc('register', self.tmp / ('ds%d' % number), 'X', home='home%d' % number)
        results, barrier = [], threading.Barrier(4)

        def push(number):
            barrier.wait()
            try:
                results.append(('won', etc.push('X', config=self.config('home%d' % number))))
            except (etc.Exists, etc.RemoteError) as e:  # RemoteError: the other is not ready yet
                results.append(('lost', str(e)))
        threads = [threading.Thread(target=push, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([kind for kind, _ in results].count('won'), 1, results)
        self.assertEqual(etc.pull('X', config=self.config('two')).digest, dict(results)['won'])

    def test_replaced_while_read(self):
        write(self.tmp / 'one', {'data/train/x': noise(9 * MIB, 1)})
        write(self.tmp / 'two', {'data/train/x': noise(9 * MIB, 2)})
        self.share(self.tmp / 'one')
        with etc.contextlib.closing(etc._open_remote(self.config())) as store:
            found = store.stat('X')
            self.assertEqual(len(store.read(found, 5, 50)), 45)
            self.etc('register', '-f', self.tmp / 'two', 'X')
            self.etc('push', '-f', 'X')
            with self.assertRaises(etc.RemoteError) as caught:
                store.read(found, 5, 50)
            self.assertIn('replaced', str(caught.exception))

    def test_foreign(self):
        root = odd(self.tmp / 'ds', 5)
        write(root, {'data/test/large': noise(6 * MIB)})
        with tarfile.open(str(self.tmp / 'X.tgz'), 'w:gz', format=tarfile.PAX_FORMAT) as tar:
            tar.add(str(root), '.')
        self.put('X.tgz', (self.tmp / 'X.tgz').read_bytes())
        found = etc.info('X', remote=True, config=self.config())
        self.assertEqual([found[key] for key in ('digest', 'files', 'size', 'partitions', 'meta', 'readme')], [None] * 6)
        self.assertIn("'X' in %s was packed by another tool, and has no index to compare; run 'etc pull X', and compare what that "
                      'installs\n' % self.url, self.etc('diff', '-r', 'X', '-r', 'X', status=1)[1])
        self.assertEqual(tree(etc.pull('X', partitions=['test'], config=self.config()).root), tree(root))
        self.assertIn('identical', self.etc('pull', 'X')[1])
        self.etc('pull', '-f', 'X@' + etc.Dataset(root).digest)
        self.assertIn("'X': expected digest sha256:222", self.etc('pull', '-f', 'X@sha256:' + '2' * 64, status=1)[1])
        self.etc('verify', 'X')
        self.assertIn('is in %s already, and identical' % self.url, self.etc('push', 'X')[1])
        self.etc('register', root, 'X', home='another')  # where no receipt knows that it is the same
        self.assertIn('push -f', self.etc('push', 'X', home='another', status=1)[1])
        self.etc('push', '-f', 'X')
        self.assertEqual(etc.info('X', remote=True, config=self.config())['digest'], etc.Dataset(root).digest)

    def test_diff(self):
        root = small(self.tmp / 'ds')
        self.share(root)
        self.assertEqual(self.etc('diff', '-r', 'X', 'X', '-q'), ('', ''))
        write(root, {'data/train/new': 'new'})
        self.etc('register', root, 'Y')
        self.etc('push', 'Y')
        rows = [line.split() for line in self.etc('diff', '-r', 'X', '-r', 'Y', status=1)[0].splitlines()]
        self.assertEqual([(row[0], row[-1]) for row in rows],
                         [('same', '.'), ('same', 'assets'), ('same', 'data/test'), ('differs', 'data/train')])
        found = etc.diff('X', 'Y', remote=(True, False), config=self.config())
        self.assertEqual(found, dict(etc.diff('X', 'Y', remote=True, config=self.config()), b=dict(found['b'], remote=False)))
        self.assertEqual((found['equal'], found['segments']['data/train']), (
            False, {'status': 'differs', 'a': {'files': 2, 'size': 5006}, 'b': {'files': 3, 'size': 5009}}))
        self.etc('pull', '-p', 'test', 'X', home='two')
        self.etc('diff', 'X', '-r', 'X', home='two')  # what a receipt knows of the whole
        self.assertIn("no dataset 'Z' in", self.etc('diff', 'X', '-r', 'Z', status=1)[1])

    def test_purge(self):
        self.etc('register', small(self.tmp / 'ds'), 'One')
        self.etc('register', write(self.tmp / 'large', {'data/train/x': noise(9 * MIB)}), 'Large')
        self.etc('push', 'One', 'Large')
        self.put('Foreign.tgz', b'no archive at all')
        digest = etc.Dataset(self.tmp / 'ds').digest
        for words, status, problem in (
                (['One', 'Large'], 2, "without a terminal to ask on, 'etc purge -r' needs -f; 'etc purge -h' shows how"),
                (['-f', 'Onne'], 1, "no dataset 'Onne' in %s; did you mean 'One'?" % self.url),
                (['-f', 'One@sha256:' + '4' * 64], 1, "'One': expected digest sha256:%s, found %s" % ('4' * 64, digest)),
                (['-f', 'Foreign@' + digest], 1, "'Foreign': expected digest %s, found none, as another tool packed it" % digest)):
            with self.subTest(words):
                self.assertEqual(self.etc('purge', '-r', *words, status=status), ('', 'etc: %s\n' % problem))
                self.assertEqual(etc.ls(True, self.config()), ['Foreign', 'Large', 'One'])
        self.assertEqual(self.etc('purge', '-r', '-f', 'Nope', 'Foreign', 'Large', status=1)[1].splitlines(), [
            "etc: no dataset 'Nope' in %s; 'etc ls -r' lists what is there" % self.url,
            "etc: purged 'Foreign' from %s" % self.url, "etc: purged 'Large' from %s" % self.url])
        self.assertEqual(etc.ls(True, self.config()), ['One'])
        self.assertIsNone(etc.purge('One@' + digest, remote=True, config=self.config()))
        self.assertEqual((etc.ls(True, self.config()), self.installed()), ([], ['Large', 'One']))
        with self.assertRaisesRegex(etc.NotFound, "no dataset 'One' in "):
            etc.purge('One', remote=True, config=self.config())
        self.etc('push', 'One')
        etc.purge('One', self.config())
        self.assertEqual((etc.ls(True, self.config()), self.installed()), (['One'], ['Large']))

    def test_purge_of_a_version(self):
        for number, size in enumerate((1000, 9 * MIB)):  # a single request, and a multipart upload
            self.etc('register', '-f', write(self.tmp / ('one%d' % number), {'data/train/x': noise(size, 1)}), 'X')
            self.etc('push', '-f', 'X')
            with self.subTest(size), etc.contextlib.closing(etc._open_remote(self.config())) as store:
                old = store.stat('X')
                self.etc('register', '-f', write(self.tmp / ('two%d' % number), {'data/train/x': noise(size, 2)}), 'X')
                self.etc('push', '-f', 'X')
                with self.assertRaisesRegex(etc.RemoteError, "'X' in .* was replaced meanwhile; look again: 'etc info -r X' shows"):
                    store.remove(old)
                self.assertEqual(etc.info('X', True, self.config())['digest'], etc.Dataset(self.tmp / ('two%d' % number)).digest)
                new = store.stat('X')
                self.assertIs(store.remove(new), False)
                self.assertIsNone(store.stat('X'))
                self.assertIs(store.remove(new), False)  # another was faster

    def test_purge_just_after_a_push(self):
        if not self.conditional_delete:
            return
        self.put('X.tgz', b'first')
        with etc.contextlib.closing(etc._open_remote(self.config())) as store:
            old, look, looks = store.stat('X'), store.is_current, []
            self.put('X.tgz', b'the second')
            store.is_current = lambda obj: look(obj) if looks else looks.append(obj) or True  # as if the push ended after the first look
            with self.assertRaisesRegex(etc.RemoteError, "'X' in .* was replaced meanwhile"):
                store.remove(old)
            self.assertEqual(store.stat('X').size, len(b'the second'))

    def test_killed_push(self):
        write(self.tmp / 'share', {'.': None})  # a push that is killed early may not have made it
        root = write(self.tmp / 'ds', {'data/train/%d' % n: noise(4 * MIB, n) for n in range(12)})
        self.etc('register', root, 'X')
        rng = random.Random(5)
        for _ in range(4):
            process = self.spawn('push', 'X')
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.15, 0.5))
            process.kill()
            process.communicate()
            with contextlib.suppress(etc.NotFound):  # it had not even made the directory
                if etc.ls(remote=True, config=self.config()):  # it was faster than we
                    self.etc('push', 'X')
                    break
        self.etc('push', '-f', 'X')
        self.assertEqual(etc.pull('X', config=self.config('two')).digest, etc.Dataset(root).digest)


class FileRemote(RemoteSuite, Case):
    def put(self, name, data):
        write(self.tmp / 'share', {name: data})

    def test_urls(self):
        start, bucket = 'cannot use the url; it must start with file://', 'the url is not of the form s3://bucket'
        for url, problem in (
                ('file://host/x', 'the url is no absolute path; write file:///path'), ('file:x', start), ('nonsense', start), ('ftp://x/y', start),
                ('s3:/x', start), ('s3://', bucket), ('s3://a b', bucket), ('S3://x', start)):
            with self.subTest(url):
                self.assertIn('etc: ' + problem, self.etc('ls', '-r', url=url, status=1)[1])
        (self.tmp / 'with space').mkdir()
        self.assertEqual(self.etc('ls', '-r', url=(self.tmp / 'with space').as_uri()), ('', ''))
        self.assertIn('no directory %s;' % (self.tmp / 'nowhere'), self.etc('ls', '-r', url=(self.tmp / 'nowhere').as_uri(), status=1)[1])

    def test_directories_and_dead_links_are_no_datasets(self):
        write(self.tmp / 'share', {'X.tgz/file': 'x'})
        (self.tmp / 'share/Y.tgz').symlink_to('nowhere')
        self.assertEqual(self.etc('ls', '-r')[0], '')
        for name in 'X', 'Y':
            with self.subTest(name):
                self.assertIn("no dataset '%s'" % name, self.etc('pull', name, status=1)[1])

    def test_killed_push_leaves_nothing_under_the_name(self):
        root = write(self.tmp / 'ds', {'data/train/%d' % n: noise(4 * MIB, n) for n in range(20)})
        self.etc('register', root, 'X')
        process = self.spawn('push', 'X')
        while not glob.glob(str(self.tmp / 'share/.X.tgz.*')):
            self.assertIsNone(process.poll())
        process.kill()
        process.communicate()
        self.assertFalse((self.tmp / 'share/X.tgz').exists())
        rest = glob.glob(str(self.tmp / 'share/.X.tgz.*'))
        self.assertEqual(len(rest), 1)
        self.assertEqual(etc.ls(True, self.config()), [])
        os.utime(rest[0], (1, 1))
        self.etc('push', 'X')
        self.assertEqual(os.listdir(str(self.tmp / 'share')), ['X.tgz'])

    def test_signs_in_paths(self):
        for name in ('a#b', 'a?b', 'a?b#c', '#', 'a b', 'per%cent', 'a%23b'):
            for url in ('file://%s/%s' % (self.tmp, name.replace('%', '%25')), (self.tmp / name).as_uri()):
                with self.subTest(url):
                    self.etc('register', '-f', small(self.tmp / name / 'ds'), 'X')
                    self.etc('push', 'X', url=url)
                    self.assertTrue((self.tmp / name / 'X.tgz').exists())
                    (self.tmp / name / 'X.tgz').unlink()
        self.etc('push', 'X', url='file:///%s/slashes' % self.tmp)
        self.assertTrue((self.tmp / 'slashes/X.tgz').exists())

    @unittest.skipUnless(sys.platform == 'linux', 'names are text there')
    def test_bytes_in_paths(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.etc('push', 'X', url='%s/%%FF%%C3%%A9' % self.tmp.as_uri())
        self.assertTrue(os.path.exists(os.fsencode(str(self.tmp)) + b'/\xff\xc3\xa9/X.tgz'))

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_who_may_read(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        share = self.tmp / 'share'
        for umask, directory, public, mode, warned in (
                (0o077, None, True, 0o644, False), (0o077, 0o755, True, 0o644, False), (0o077, 0o755, False, 0o600, True),
                (0o027, 0o755, False, 0o640, True), (0o027, 0o750, False, 0o640, False), (0o077, 0o700, False, 0o600, False),
                (0o022, 0o755, False, 0o644, False), (0o002, 0o775, False, 0o664, False), (0o077, None, False, 0o600, False)):
            with self.subTest(umask=oct(umask), directory=directory and oct(directory), public=public):
                remove(share)
                if directory:
                    share.mkdir()
                    share.chmod(directory)
                self.settings = {'public': public}
                before = os.umask(umask)
                try:
                    err = self.etc('push', 'X')[1]
                finally:
                    os.umask(before)
                self.assertEqual(stat.S_IMODE((share / 'X.tgz').stat().st_mode), mode)
                self.assertEqual("cannot read 'X'; set 'public: true', or change your umask" in err, warned, err)
                if public:
                    self.assertEqual(share.stat().st_mode & 0o055, 0o055)
        self.settings = {'public': True}
        before = os.umask(0o077)
        try:
            self.etc('push', 'X', url=self.url + '/a/b')
        finally:
            os.umask(before)
        for place in (share / 'a', share / 'a/b'):
            with self.subTest(place.name):
                self.assertEqual(place.stat().st_mode & 0o055, 0o055, place)
        (share / 'X.tgz').chmod(0)
        with unprivileged(share, self.tmp / 'home', self.tmp / 'settings.yaml'):
            for command in (['pull', 'X'], ['info', '-r', 'X']):
                with self.subTest(command):
                    self.assertIn("cannot read 'X' in %s: Permission denied; ask who pushed it to let you read it" % share,
                                  self.etc(*command, status=1)[1])

    @unittest.skipUnless(sys.platform == 'linux', 'no limits on files there')
    def test_no_room_for_a_push(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        limit = 'import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); sys.path.insert(0, %r); import etcetera; ' % str(HERE)
        done = subprocess.run([sys.executable, '-B', '-c', limit + 'sys.exit(etcetera.main(sys.argv[1:]))', '--home', str(self.tmp / 'home'),
                               '--url', self.url, 'push', 'X'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        self.assertEqual((done.stdout, done.returncode), ("etc: cannot write 'X' to %s: File too large; free some space there\n"
                                                          % (self.tmp / 'share'), 1))

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_places_where_one_may_not_write(self):
        self.share(small(self.tmp / 'ds'))
        self.etc('register', '-f', odd(self.tmp / 'other', 3), 'X')
        self.assertIn("no local dataset 'Y'", self.etc('push', 'Y', status=1)[1])  # what is imported for an error is there from here on
        share = self.tmp / 'share'
        if os.geteuid() == 0:  # others' files in a sticky directory
            share.chmod(0o1777)
            with unprivileged(self.tmp / 'home', self.tmp / 'settings.yaml', self.tmp / 'other'):
                err = self.etc('push', '-f', 'X', status=1)[1]
            self.assertIn("cannot write 'X' to %s: Operation not permitted; ask the file's owner to replace it" % share, err)
        share.chmod(0o555)
        with unprivileged(self.tmp / 'home', self.tmp / 'settings.yaml'):
            err = self.etc('push', '-f', 'X', status=1)[1]
        share.chmod(0o755)
        self.assertIn("cannot write 'X' to %s: Permission denied; ask the file's owner to replace it" % share, err)
        self.assertEqual(os.listdir(str(share)), ['X.tgz'])

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_files_that_cannot_be_read(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.assertIn("no local dataset 'Y'", self.etc('push', 'Y', status=1)[1])
        with unprivileged(self.tmp):
            (self.tmp / 'ds/data/train/a.txt').chmod(0)
            err = self.etc('push', 'X', status=1)[1]
            self.assertIn('Permission denied: %s' % (self.tmp / 'home/X/data/train/a.txt'), err)
            err = self.etc('push', 'X', status=1, url=(self.tmp / 'home').as_uri())[1]  # so it lies below where it is pushed to
            self.assertIn('Permission denied: %s' % (self.tmp / 'home/X/data/train/a.txt'), err)

    def racing(self, *replacements):
        """Let pushes of others end before and after the file is set aside to be removed."""
        rename = os.rename
        self.addCleanup(setattr, os, 'rename', rename)

        def late(source, target):
            os.rename = rename
            for at, data in enumerate(replacements):
                if at:
                    rename(source, target)
                write(self.tmp, {'new': data})
                os.replace(str(self.tmp / 'new'), str(self.tmp / 'share/X.tgz'))
            if len(replacements) == 1:
                rename(source, target)
        os.rename = late

    def test_purge_while_others_push(self):
        link = os.link
        self.addCleanup(setattr, os, 'link', link)

        def no_link(*args, **kwargs):
            raise PermissionError(1, 'Operation not permitted')
        for os.link in (link, no_link):
            for others in ((b'second',), (b'second', b'third')):
                with self.subTest(others, links=os.link is link):
                    remove(self.tmp / 'share')
                    self.put('X.tgz', b'first')
                    self.racing(*others)
                    self.assertEqual(self.etc('purge', '-r', '-f', 'X', status=1)[1], "etc: 'X' in %s was replaced meanwhile; look again: "
                                     "'etc info -r X' shows what is there now\n" % self.url)
                    self.assertEqual((self.tmp / 'share/X.tgz').read_bytes(), others[-1])
                    self.assertEqual(len(os.listdir(str(self.tmp / 'share'))), len(others))  # what was overtaken twice is kept for a day

    def test_purge_of_what_was_replaced_before(self):
        self.put('X.tgz', b'first')
        with etc.contextlib.closing(etc._open_remote(self.config())) as store:
            old = store.stat('X')
            write(self.tmp, {'new': b'second'})
            os.replace(str(self.tmp / 'new'), str(self.tmp / 'share/X.tgz'))
            self.addCleanup(setattr, os, 'rename', os.rename)
            os.rename = None  # it is left where it is
            with self.assertRaisesRegex(etc.RemoteError, 'was replaced meanwhile'):
                store.remove(old)
        self.assertEqual(os.listdir(str(self.tmp / 'share')), ['X.tgz'])

    def test_purge_that_another_overtakes(self):
        self.put('X.tgz', b'x')
        rename = os.rename
        self.addCleanup(setattr, os, 'rename', rename)
        os.rename = lambda source, target: (os.unlink(source), rename(source, target))
        self.assertIn("purged 'X'", self.etc('purge', '-r', '-f', 'X')[1])

    def test_killed_purge(self):
        program = r'''
import os, sys
sys.path.insert(0, sys.argv[1])
import etcetera
setattr(os, sys.argv[2], lambda *args: os._exit(9))
etcetera.main(['--url', sys.argv[3], 'purge', '-r', '-f', 'X'])
'''
        self.etc('register', small(self.tmp / 'ds'), 'Y')
        for function, left in (('rename', ['X.tgz', 'Y.tgz']), ('unlink', ['Y.tgz'])):
            with self.subTest(function):
                remove(self.tmp / 'share')
                self.put('X.tgz', b'x')
                os.utime(str(self.tmp / 'share/X.tgz'), (1, 1))
                self.assertEqual(subprocess.call([sys.executable, '-c', program, str(HERE), function, self.url]), 9)
                self.assertEqual(etc.ls(True, self.config()), [name[0] for name in left[:-1]])
                self.assertEqual(len(os.listdir(str(self.tmp / 'share'))), 1)
                self.etc('push', 'Y')
                self.assertEqual(sorted(os.listdir(str(self.tmp / 'share'))), left)

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_purge_where_one_may_not(self):
        self.put('X.tgz', b'x')
        self.assertIn("no dataset 'Y'", self.etc('purge', '-r', '-f', 'Y', status=1)[1])  # what is imported for an error is there from here on
        (self.tmp / 'share').chmod(0o555)
        with unprivileged(self.tmp / 'settings.yaml'):
            err = self.etc('purge', '-r', '-f', 'X', status=1)[1]
        (self.tmp / 'share').chmod(0o755)
        self.assertEqual(err, "etc: cannot remove 'X' from %s: Permission denied; ask the file's owner to remove it, or the "
                              "directory's owner for write access\n" % (self.tmp / 'share'))
        self.assertEqual(os.listdir(str(self.tmp / 'share')), ['X.tgz'])

    def test_purge_of_a_link(self):
        write(self.tmp, {'elsewhere': 'x', 'share': None})
        os.symlink('../elsewhere', str(self.tmp / 'share/X.tgz'))
        self.etc('purge', '-r', '-f', 'X')
        self.assertEqual((os.listdir(str(self.tmp / 'share')), (self.tmp / 'elsewhere').read_text()), ([], 'x'))

    def test_races_without_hard_links(self):
        link = os.link
        self.addCleanup(setattr, os, 'link', link)

        def no_link(*args, **kwargs):
            raise PermissionError(1, 'Operation not permitted')
        os.link = no_link
        self.test_races()

    def test_no_hard_links(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        link = os.link
        self.addCleanup(setattr, os, 'link', link)

        def no_link(*args, **kwargs):
            raise PermissionError(1, 'Operation not permitted')
        os.link = no_link
        self.etc('push', 'X')
        self.assertIn('identical', self.etc('push', 'X')[1])
        self.etc('pull', '-p', 'test', 'X', home='two')
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))


class PurgeSuite:
    """How purge -r fares with answers that are lost, refusals and other pushes; on servers of ours."""

    def setUp(self):
        super().setUp()
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        self.put('X.tgz', b'first')

    def at_delete(self, action, times=1):
        """Let `action(handler)` happen at the first deletions; it may answer itself and return True."""
        left = [times]

        def fault(handler):
            if handler.command == 'DELETE' and left[0]:
                left[0] -= 1
                return action(handler)
        self.server.fault = fault

    def stored(self):
        return [found[0] for found in self.server.objects.values()]

    def purge(self, status=0):
        return self.etc('purge', '-r', '-f', 'X', status=status)[1]

    def lose(self, handler, *then):
        """Delete the object, but let the answer be lost."""
        self.server.objects.clear()
        for data in then:
            self.put('X.tgz', data)
        handler.close_connection = True
        return True

    def test_another_push_meanwhile(self):
        self.at_delete(lambda handler: self.put('X.tgz', b'second'))
        self.assertEqual(self.purge(status=1), "etc: 'X' in %s was replaced meanwhile; look again: 'etc info -r X' shows what is there now\n"
                         % self.url)
        self.assertEqual(self.stored(), [b'second'])

    def test_lost_answers(self):
        for what, action in (('a broken connection', self.lose), ('a busy proxy', lambda h: self.lose(h) and (h.answer(503), True)[1]),
                             ('another purge', lambda h: self.server.objects.clear())):
            with self.subTest(what):
                self.put('X.tgz', b'first')
                self.at_delete(action)
                self.assertEqual(self.purge(), "etc: purged 'X' from %s\n" % self.url)
                self.assertEqual(self.stored(), [])

    def test_lost_answers_and_another_push(self):
        for self.server.conditions in (True, False):
            with self.subTest(conditions=self.server.conditions):
                self.put('X.tgz', b'first')
                self.at_delete(lambda handler: self.lose(handler, b'second') and (handler.answer(503), True)[1])
                self.assertIn("'X' in %s was replaced meanwhile" % self.url, self.purge(status=1))
                self.assertEqual(self.stored(), [b'second'])

    def test_no_answer_at_all(self):
        self.at_delete(lambda handler: (handler.answer(503), True)[1], 4)
        self.assertIn("purged 'X'", self.purge())
        self.put('X.tgz', b'first')
        self.at_delete(lambda handler: (handler.answer(503), True)[1], 100)
        self.assertRegex(self.purge(status=1), r'\Aetc: %s answers 503: [^\n]*\n\Z' % self.url)
        self.assertEqual(self.stored(), [b'first'])

    def test_versions_that_are_kept(self):
        self.server.versioned = '5'
        self.assertEqual(self.purge(), "etc: purged 'X' from %s, which keeps it as an old version\n" % self.url)
        self.assertEqual(self.stored(), [])
        self.assertIn("no dataset 'X'", self.purge(status=1))

    def refused(self, *answers):
        for answer, problem in answers:
            with self.subTest(problem):
                self.at_delete(lambda handler: (answer(handler), True)[1], 9)
                self.assertEqual(self.purge(status=1), 'etc: %s answers %s\n' % (self.url, problem))
                self.assertEqual(self.stored(), [b'first'])


class S3Purge(PurgeSuite, S3Case):
    def put(self, name, data):
        self.server.objects['some/prefix/' + name] = data, '"%s"' % hashlib.sha1(data).hexdigest(), {}

    def test_refusals(self):
        rule = '; a rule of the bucket protects it; ask whoever made the rule'
        lock = 'Access Denied because object protected by object lock.'
        self.refused(
            (lambda h: h.error(403, 'AccessDenied', message='Access Denied'),
             '403 AccessDenied: Access Denied; the credentials, which come from the settings, need s3:DeleteObject here'),
            (lambda h: h.error(403, 'AccessDenied', message=lock), '403 AccessDenied: ' + lock + rule),
            (lambda h: h.error(400, 'InvalidRequest', message='Object is WORM protected and cannot be overwritten'),  # MinIO
             '400 InvalidRequest: Object is WORM protected and cannot be overwritten' + rule),
            (lambda h: h.error(409, 'FileImmutable', message='The object you specified is immutable.'),  # Alibaba
             '409 FileImmutable: The object you specified is immutable.' + rule))

    def test_conditions(self):
        self.assertEqual(self.purge(), "etc: purged 'X' from %s\n" % self.url)
        method, path, headers = self.server.log[-1]
        self.assertEqual((method, path, headers['If-Match']), ('DELETE', '/bucket/some/prefix/X.tgz', '"%s"' % hashlib.sha1(b'first').hexdigest()))

    def test_buckets_that_keep_no_more_versions(self):
        """https://docs.aws.amazon.com/AmazonS3/latest/userguide/DeletingObjectsfromVersioningSuspendedBuckets.html"""
        self.server.versioned = 'null'
        self.assertEqual(self.purge(), "etc: purged 'X' from %s\n" % self.url)

    def test_stores_that_know_no_conditions(self):
        for status, code in ((501, 'NotImplemented'), (400, 'InvalidArgument'), (400, 'InvalidRequest'), (501, ''),
                             (412, 'PreconditionFailed'), (None, '')):  # 412: Swift; None: they ignore conditions
            self.server.conditions = False
            for look in (None, 2, 3)[:3 if status else 2]:  # before which another push ends: before a deletion
                with self.subTest(code, status=status, look=look):
                    self.put('X.tgz', b'first')
                    looks = []

                    def fault(handler):
                        looks.append(handler.command)
                        if handler.command == 'HEAD' and looks.count('HEAD') == look:
                            self.put('X.tgz', b'second')
                        if status and 'If-Match' in handler.headers and handler.command == 'DELETE':
                            handler.error(status, code)
                            return True
                    self.server.fault = fault
                    if look:
                        self.assertIn('was replaced meanwhile', self.purge(status=1))
                        self.assertEqual(self.stored(), [b'second'])
                    else:
                        self.assertIn("purged 'X'", self.purge())
                        self.assertEqual(self.stored(), [])

    def test_amazon_knows_them(self):
        self.addCleanup(setattr, etc._S3Remote, 'choose_addressing', etc._S3Remote.choose_addressing)
        self.addCleanup(setattr, etc._AwsProfile, 'host', etc._AwsProfile.host)
        etc._S3Remote.choose_addressing = lambda remote: False
        etc._AwsProfile.host = lambda aws, service, region: self.server.url
        del self.settings['endpoint_url']
        self.server.fault = lambda h: h.command == 'DELETE' and 'If-Match' in h.headers and (h.error(501, 'NotImplemented'), True)[1]
        self.assertIn('answers 501 NotImplemented', self.purge(status=1))
        self.assertEqual(self.stored(), [b'first'])

    def test_objects_without_a_strong_etag(self):
        self.server.respell = lambda keyword, value: 'W/"weak"' if keyword == 'ETag' else value
        self.assertIn("purged 'X'", self.purge())
        self.assertEqual(['If-Match' in headers for method, _, headers in self.server.log if method == 'DELETE'], [False])

    def test_archive_classes(self):
        """What cannot be read can be removed."""
        self.server.fault = lambda h: h.command == 'GET' and 'Range' in h.headers and (h.error(403, 'InvalidObjectState'), True)[1]
        self.assertIn("purged 'X'", self.purge())


class S3Remote(RemoteSuite, S3Case):
    def put(self, name, data):
        self.server.objects['some/prefix/' + name] = data, '"%s"' % hashlib.sha1(data).hexdigest(), {}

    def test_reads_go_on_where_they_broke(self):
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(5 * MIB)}))
        size = len(next(iter(self.server.objects.values()))[0])
        self.settings['connections'] = 1
        sent = []

        def fault(handler):
            match = re.match(r'bytes=(\d+)-(\d+)$', handler.headers.get('Range', ''))
            if match:
                start, stop = int(match.group(1)), int(match.group(2)) + 1
                data, etag, _ = next(iter(self.server.objects.values()))
                part = data[start:min(stop, start + 700000)]
                sent.append(len(part))
                handler.answer(206, part, {'ETag': etag, 'Last-Modified': 'Mon, 06 May 2024 07:08:09 GMT',
                                           'Content-Range': 'bytes %d-%d/%d' % (start, stop - 1, size)}, stop - start)
                handler.close_connection = True
                return True
        self.server.fault = fault
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
        self.assertGreater(len(sent), 7)
        self.assertLess(sum(sent), size + 65536 + 8 * 262144)

    def test_answers_that_end_before_they_begin(self):
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(20000)}))

        def fault(handler):
            match = re.match(r'bytes=(\d+)-(\d+)$', handler.headers.get('Range', ''))
            if match:
                start, stop = int(match.group(1)), int(match.group(2)) + 1
                data, etag, _ = next(iter(self.server.objects.values()))
                handler.answer(206, b'0\r\n\r\n', {'ETag': etag, 'Transfer-Encoding': 'chunked', 'Content-Range': 'bytes %d-%d/%d' % (
                    start, stop - 1, len(data))}, stop - start)
                return True
        self.server.fault = fault
        self.assertIn('does not answer with the range that was asked for', self.etc('pull', 'X', home='two', status=1)[1])
        self.assertLess(len(self.server.log), 30)

    def test_nothing_is_left_in_the_temporary_directory(self):
        self.share(small(self.tmp / 'ds'))
        scratch = write(self.tmp / 'scratch', {'journal': 'mine'})
        self.addCleanup(setattr, tempfile, 'tempdir', tempfile.tempdir)
        tempfile.tempdir = str(scratch)
        self.etc('info', '-r', 'X')
        self.assertEqual(tree(scratch), {'journal': (b'mine', False)})

    def test_answers_that_are_not_understood(self):
        """A push is done if the store says so as its API defines, or if what is there is what was sent."""
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        one = write(self.tmp / 'one', {'data/train/x': noise(9 * MIB)})
        other = write(self.tmp / 'other', {'data/train/x': noise(9 * MIB, 1)})  # as large as the other, packed
        tiny, tinier = small(self.tmp / 'tiny'), write(small(self.tmp / 'tinier'), {'README.md': '# Other'})
        for name, root in (('X', one), ('Y', tiny)):
            self.etc('register', root, name, home=name)
        for name, root in (('X', other), ('Y', tinier)):
            self.etc('register', root, name, home='old' + name)
        portal = b'<!DOCTYPE html><html><body>Please log in</body></html>'
        done = b'<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>'
        error = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'
        for name, what, body, headers, believed in (
                ('X', 'white space before success', b' \n \r\n<?xml version="1.0" encoding="UTF-8"?>\n' + done, {}, True),
                ('X', 'white space before an error', b' \n ' + error, {}, False),
                ('X', 'nothing', b'', {'ETag': '"e"'}, None), ('X', 'white space', b'   ', {}, None),
                ('X', 'a page', portal, {'ETag': '"portal"'}, None), ('X', 'another result', b'<R/>', {}, None),
                ('X', 'a result without ETag', b'<CompleteMultipartUploadResult/>', {}, None), ('X', 'half a result', done[:40], {}, None),
                ('Y', 'a page', portal, {'ETag': '"portal"', 'Content-Type': 'text/html'}, None),
                ('Y', 'no ETag', b'', {}, None)):
            path = '/bucket/some/prefix/%s.tgz' % name

            def answer(handler):
                handler.answer(200, body, headers)

            def fault(handler):
                last = 'uploadId=' in handler.path and handler.command == 'POST' if name == 'X' else handler.command == 'PUT'
                return handler.path.startswith(path) and last and (answer(handler), True)[1]

            for before in ('nothing', 'another'):
                for stored in (True, False):
                    with self.subTest(what, name=name, before=before, stored=stored):
                        self.server.fault = self.server.final = None
                        self.server.objects.clear()
                        if before == 'another':
                            self.etc('push', name, home='old' + name)
                        objects = dict(self.server.objects)
                        self.server.fault, self.server.final = (None, answer) if stored else (fault, None)
                        success = believed if believed is not None else stored
                        out = self.etc('push', *['-f'] * (before == 'another') + [name], home=name, status=int(not success))[1]
                        self.server.fault = self.server.final = None
                        self.assertIn('pushed' if success else 'no;' if believed is False else 'does not answer as S3 does', out)
                        if not stored and not success:
                            self.assertTrue(self.server.objects == objects and not self.server.uploads)
                        self.server.uploads.clear()

    def test_statuses_that_are_not_defined(self):
        """PutObject and CompleteMultipartUpload say 200; after any other 2xx, what is there decides."""
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.etc('register', write(self.tmp / 'large', {'data/train/x': noise(9 * MIB)}), 'Y')
        done = COMPLETED % (b'http://store', b'key', b'key', b'e')
        for status, name, stored in itertools.product((201, 202, 203, 204), 'XY', (True, False)):
            with self.subTest(status=status, name=name, stored=stored):
                def answer(handler):
                    handler.answer(status, done if name == 'Y' and status != 204 else b'', {'ETag': '"e"'})

                def fault(handler):
                    last = handler.command == ('POST' if name == 'Y' else 'PUT') and '?uploads=' not in handler.path
                    return last and (answer(handler), True)[1]
                self.server.objects.clear()
                self.server.fault, self.server.final = (None, answer) if stored else (fault, None)
                out = self.etc('push', name, status=int(not stored))[1]
                self.server.fault = self.server.final = None
                self.assertIn('pushed' if stored else 'does not answer as S3 does', out)
                self.assertEqual((len(self.server.objects), self.server.uploads), (int(stored), {}))

    def test_parts_that_are_not_confirmed(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}), 'X')
        self.server.fault = lambda handler: 'partNumber=' in handler.path and (handler.answer(200, b'<html>Log in</html>'), True)[1]
        self.assertIn('does not answer as S3 does', self.etc('push', 'X', status=1)[1])
        self.server.fault = lambda handler: handler.path.endswith('?uploads=') and (handler.answer(200, b'<html>Log in</html>'), True)[1]
        self.assertIn('does not answer as S3 does', self.etc('push', 'X', status=1)[1])
        self.assertEqual((self.server.uploads, self.server.objects), ({}, {}))

    def test_white_space_before_answers(self):
        class Slow(S3Handler):
            def answer(self, status, body=b'', headers=(), length=None):
                super().answer(status, b' \n' * 3 + body if body[:6] == b'<?xml ' else body, headers, length)
            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = S3Handler.handle_one
        self.server.RequestHandlerClass = Slow
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}))
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
        self.assertIn('NoSuchBucket', self.etc('ls', '-r', url='s3://other', status=1)[1])

    @unittest.skipIf(os.name == 'nt', 'no SIGTERM to send')
    def test_interrupted_while_the_store_is_busy(self):
        """It waits neither for all tries of each thread nor for what Retry-After asks."""
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(20 * MIB)}), 'X')
        busy = threading.Event()

        def fault(handler):
            if handler.command in ('PUT', 'DELETE'):
                handler.answer(503, b'', {'Retry-After': '3600'})
                busy.set()
                return True
        self.server.fault = fault
        for signalled, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(signalled):
                busy.clear()
                process = self.spawn('push', 'X')
                self.assertTrue(busy.wait(60))
                process.send_signal(signalled)
                out, err = process.communicate(timeout=60)
                self.assertEqual((process.returncode, err), (code, b'etc: interrupted\n'))

    def test_object_lock(self):
        """Such buckets want a checksum of every body: MD5, or SHA-256 where there is no MD5."""
        self.server.must_check = True
        self.etc('register', small(self.tmp / 'small'), 'X')
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(20 * MIB)}), 'Y')
        for there in (True, False):
            if not there:  # as in FIPS mode
                self.addCleanup(setattr, hashlib, 'md5', hashlib.md5)
                hashlib.md5 = lambda *args, **kwargs: (_ for _ in ()).throw(ValueError('disabled for FIPS'))
            with self.subTest(md5=there):
                self.server.objects.clear()
                del self.server.log[:]
                self.etc('push', 'X', 'Y')
                self.etc('pull', 'X', 'Y', home='two%s' % there)
                self.assertEqual(tree(self.tmp / ('two%s/Y' % there)), tree(self.tmp / 'ds'))
                name = 'Content-MD5' if there else 'x-amz-checksum-sha256'
                self.assertTrue(all(headers[name] for method, path, headers in self.server.log[-12:] if method == 'PUT'))
        self.server.must_check = False
        for what, status, code, message in (
                ('Cloudflare', 501, 'NotImplemented', "Header '%s' with value 'SHA256' not implemented"),
                ('Backblaze', 400, 'InvalidArgument', "Unsupported header '%s' received for this API call.")):
            refused = ['x-amz-checksum-algorithm'] + ['x-amz-checksum-sha256'] * (what == 'Backblaze')

            def fault(handler):
                name = next((name for name in refused if handler.headers[name]), None)
                return bool(name) and (handler.error(status, code, message=message % name), True)[1]

            with self.subTest(what):  # in its own words
                self.server.fault = fault
                self.server.objects.clear()
                self.etc('push', 'X', 'Y')
                self.etc('pull', 'X', 'Y', home='two' + what)
                self.assertEqual(tree(self.tmp / ('two%s/Y' % what)), tree(self.tmp / 'ds'))
        self.server.must_check = True
        self.assertIn('Content-MD5', self.etc('push', '-f', 'X', status=1)[1])  # Backblaze's, and no MD5 here
        self.server.fault, self.server.must_check = None, False
        hashlib.md5 = md5
        del self.server.log[:]
        self.etc('push', '-f', 'X')
        self.assertFalse(any(headers['Content-MD5'] for _, _, headers in self.server.log))  # where none is wanted, none is computed

    def test_acls_that_a_bucket_does_not_know(self):
        self.settings['public'] = True
        self.server.fault = lambda handler: handler.command == 'PUT' and (
            handler.error(400, 'AccessControlListNotSupported', message='The bucket does not allow ACLs'), True)[1]
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.assertIn("drop 'public: true', and let a bucket policy make the objects public", self.etc('push', 'X', status=1)[1])

    def test_addressing_style(self):
        """Of ~/.aws/config; the server here knows only the style that is set."""
        self.etc('register', small(self.tmp / 'ds'), 'X')
        port = self.server.url.rpartition(':')[2]
        os.environ.update(http_proxy=self.server.url, no_proxy='')  # so that any name leads to the server
        self.settings['endpoint_url'] = 'http://store.example:' + port
        hosts = set()

        def fault(handler):
            parts = urllib.parse.urlsplit(handler.path)
            hosts.add(parts.hostname)
            bucket = '/bucket' if parts.hostname == 'bucket.store.example' else ''
            problem = handler.unsigned_as(parts.path + ('?' + parts.query if parts.query else ''))
            handler.path = bucket + parts.path + ('?' + parts.query if parts.query else '')
            handler.unsigned = lambda body: problem(body)

        class Proxy(S3Handler):
            def unsigned_as(self, path):
                def problem(body):
                    handler, self.path = self.path, path
                    try:
                        return S3Handler.unsigned(self, body)
                    finally:
                        self.path = handler
                return problem
            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = S3Handler.handle_one
        self.server.RequestHandlerClass, self.server.fault = Proxy, fault
        for style, host in (('virtual', 'bucket.store.example'), ('path', 'store.example'), ('auto', 'store.example')):
            with self.subTest(style):
                hosts.clear()
                write(self.tmp, {'.aws/config': '[default]\ns3 =\n    max_concurrent_requests = 20\n    addressing_style = %s\n' % style})
                self.etc('push', '-f', 'X')
                self.etc('pull', '-f', 'X', home='two')
                self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
                self.assertEqual(hosts, {host})
        write(self.tmp, {'.aws/config': '[default]\ns3 =\n    addressing_style = virtual\n'})
        hosts.clear()
        self.assertIn('404 NoSuchBucket', self.etc('ls', '-r', url='s3://My_Bucket', status=1)[1])  # no host can have such a name
        self.assertEqual(hosts, {'store.example'})
        self.settings['endpoint_url'] = self.server.url
        hosts.clear()
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.assertEqual(hosts, {'127.0.0.1'})  # nor can a name stand before an address

    def test_keys_that_may_not_list(self):
        """Without s3:ListBucket what is missing is forbidden; on Amazon's own hosts the condition of the write decides."""
        self.server.may_list = False
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.assertIn('s3:ListBucket', self.etc('push', 'X', status=1)[1])  # this store may ignore conditions
        port = self.server.url.rpartition(':')[2]
        del self.settings['endpoint_url']
        self.addCleanup(setattr, etc._AwsProfile, 'host', etc._AwsProfile.host)
        self.addCleanup(setattr, etc._S3Remote, 'choose_addressing', etc._S3Remote.choose_addressing)
        etc._AwsProfile.host = lambda aws, service, region: 'http://127.0.0.1:' + port
        etc._S3Remote.choose_addressing = lambda remote: False
        self.etc('push', 'X')
        self.assertIn('already, and identical', self.etc('push', 'X')[1])
        self.server.fault = lambda handler: handler.command in ('GET', 'HEAD') and (handler.error(403, 'AccessDenied'), True)[1]
        before = dict(self.server.objects)
        self.assertIn('cannot read it to compare', self.etc('push', 'X', status=1)[1])
        self.assertEqual(self.server.objects, before)
        self.server.fault = lambda handler: (
            handler.command in ('GET', 'HEAD') and (handler.error(403, 'AccessDenied'), True)[1]
            or bool(handler.headers['If-None-Match']) and (handler.error(501, 'NotImplemented'), True)[1])
        self.assertIn('NotImplemented', self.etc('push', 'X', status=1)[1])  # nobody would tell whether there is another
        self.assertEqual(self.server.objects, before)
        self.server.fault = lambda handler: handler.command in ('GET', 'HEAD') and (handler.error(403, 'AccessDenied'), True)[1]
        self.etc('register', small(self.tmp / 'ds'), 'Y')
        self.etc('push', 'Y')
        self.assertEqual(len(self.server.objects), 2)

    def test_head_that_is_refused(self):
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}))
        etag = self.server.objects['some/prefix/X.tgz'][1]

        def tell_no_length(handler):
            handler.send_response(200)
            handler.send_header('ETag', etag)
            handler.end_headers()

        for what, answer in (('403', lambda handler: handler.answer(403)), ('405', lambda handler: handler.answer(405)),
                             ('501', lambda handler: handler.answer(501)), ('no length', tell_no_length)):
            with self.subTest(what):
                self.server.fault = lambda handler: handler.command == 'HEAD' and (answer(handler), True)[1]
                self.etc('pull', 'X', home='two')
                self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
                self.etc('purge', 'X', home='two')
                self.assertIn('already, and identical', self.etc('push', 'X')[1])

    def test_errors_that_hide(self):
        """InternalError in a 200 of CompleteMultipartUpload, RequestTimeout in a 400."""
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}), 'X')
        failures = [('uploadId=', 'POST', 200, 'InternalError'), ('partNumber=', 'PUT', 400, 'RequestTimeout'),
                    ('uploads=', 'POST', 400, 'RequestTimeout')]
        left = {failure: 2 for failure in failures}

        def fault(handler):
            for failure in failures:
                word, method, status, code = failure
                if handler.command == method and word in handler.path and left[failure]:
                    left[failure] -= 1
                    handler.error(status, code)
                    return True
        self.server.fault = fault
        self.etc('push', 'X')
        self.assertEqual(set(left.values()), {0})
        self.etc('pull', 'X', home='two')
        left = {failures[0]: 99, failures[1]: 0, failures[2]: 0}
        self.assertIn('InternalError', self.etc('push', '-f', 'X', status=1)[1])
        self.assertEqual(self.server.uploads, {})

    def test_pages(self):
        for number in range(25):
            self.put('D%02d.tgz' % number, b'x')
        self.server.page = 10
        self.assertEqual(etc.ls(True, self.config()), ['D%02d' % n for n in range(25)])
        self.assertEqual(len(self.requests('GET')), 3)

    def test_partial_pull_reads_little(self):
        root = write(self.tmp / 'ds', {'data/train/large': noise(20 * MIB), 'data/test/x': noise(100000), 'README.md': 'r'})
        self.share(root)
        self.server.sent = 0
        self.etc('pull', '-p', 'test', 'X', home='two')
        self.assertLess(self.server.sent, 100000 + 2 * 65536 + 10000)
        self.server.sent = 0
        self.etc('info', '-r', 'X')
        self.assertLess(self.server.sent, 2 * 65536)
        self.server.sent = 0
        self.etc('pull', 'X', home='two')  # what is there is not fetched again
        self.assertLess(self.server.sent, 20 * MIB + 2 * 65536)

    def test_connections_are_kept(self):
        write(self.tmp / 'ds', {'data/train/large': noise(40 * MIB)})
        self.share(self.tmp / 'ds')
        self.server.connections.clear()
        self.server.log.clear()
        self.settings['connections'] = 8
        self.etc('pull', 'X', home='two')
        self.assertGreater(len(self.server.log), 10)
        self.assertLessEqual(len(self.server.connections), 8)
        self.server.connections.clear()
        self.etc('ls', '-r', '-l')
        self.assertEqual(len(self.server.connections), 1)

    def test_multipart(self):
        write(self.tmp / 'ds', {'data/train/large': noise(20 * MIB)})
        self.etc('register', self.tmp / 'ds', 'X')
        self.settings['public'] = True
        self.etc('push', 'X')
        self.assertEqual([h.get('x-amz-acl') for m, p, h in self.server.log if m == 'POST'], ['public-read', None])
        self.assertEqual(self.server.uploads, {})
        write(self.tmp / 'tiny', {'data/train/x': 'x'})
        self.etc('register', self.tmp / 'tiny', 'T')
        self.server.log.clear()
        self.etc('push', 'T')
        self.assertEqual([(m, h.get('x-amz-acl'), h.get('If-None-Match')) for m, p, h in self.server.log if m not in ('GET', 'HEAD')],
                         [('PUT', 'public-read', '*')])

    def test_pages_that_go_round(self):
        tokens = itertools.cycle('abc')
        page = '<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>%s</NextContinuationToken></ListBucketResult>'
        self.server.fault = lambda h: (h.answer(200, (page % next(tokens)).encode()), True)[1]
        self.assertIn('leads nowhere', self.etc('ls', '-r', status=1)[1])
        self.assertEqual(len(self.server.log), 4)

    def test_parts_are_sent_while_packing_goes_on(self):
        write(self.tmp / 'ds', {'data/train/%d' % n: noise(4 * MIB, n) for n in range(8)})
        fifo = self.tmp / 'ds/data/train/9'
        fifo.write_bytes(noise(20 * MIB))
        self.etc('register', self.tmp / 'ds', 'X')
        seen = []
        original = etc._read_file

        def slow(entry, start, stop):
            if entry.name.endswith('/9') and start > 15 * MIB and not seen:
                deadline = time.time() + 20
                while not any('partNumber' in p for p in self.requests('PUT')) and time.time() < deadline:
                    time.sleep(0.01)
                seen.append(len([p for p in self.requests('PUT') if 'partNumber' in p]))
            return original(entry, start, stop)
        etc._read_file = slow
        self.addCleanup(setattr, etc, '_read_file', original)
        self.etc('push', 'X')
        self.assertGreater(seen[0], 0)

    def test_failed_upload_is_aborted(self):
        write(self.tmp / 'ds', {'data/train/large': noise(30 * MIB)})
        self.etc('register', self.tmp / 'ds', 'X')

        def fault(handler):
            if 'partNumber=3' in handler.path:
                handler.error(403, 'AccessDenied')
                return True
        self.server.fault = fault
        self.assertIn('AccessDenied', self.etc('push', 'X', status=1)[1])
        self.assertEqual((self.server.uploads, self.server.objects), ({}, {}))
        self.assertIn('DELETE', [m for m, _, _ in self.server.log])

    def test_store_without_conditions(self):
        write(self.tmp / 'ds', {'data/train/x': 'x'})
        write(self.tmp / 'big', {'data/train/x': noise(20 * MIB)})
        self.etc('register', self.tmp / 'ds', 'X')
        self.etc('register', self.tmp / 'big', 'Y')

        def fault(handler):
            if handler.headers.get('If-None-Match') and answer:
                handler.error(*answer)
                return True
        self.server.fault = fault
        self.server.conditions = False
        for answer in ((501, 'NotImplemented'), (400, 'InvalidArgument'), (501, ''), ()):
            with self.subTest(answer):
                self.server.objects.clear()
                self.etc('push', 'X', 'Y')
                self.etc('push', 'X', 'Y')
                self.assertEqual((len(self.server.objects), self.server.uploads), (2, {}))
                write(self.tmp / 'ds', {'data/train/x': 'changed %s' % (answer,)})
                self.assertIn("another 'X' is in %s already" % self.url, self.etc('push', 'X', status=1)[1])

    def test_errors_of_complete(self):
        write(self.tmp / 'ds', {'data/train/large': noise(20 * MIB)})
        self.etc('register', self.tmp / 'ds', 'X')

        def fault(handler):
            if handler.command == 'POST' and 'uploadId' in handler.path:
                handler.error(200, 'InternalError')
                return True
        self.server.fault = fault
        self.assertIn('InternalError', self.etc('push', 'X', status=1)[1])
        self.assertEqual((self.server.uploads, self.server.objects), ({}, {}))

    def test_wrong_answers(self):
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(20000)}))
        etag = {'ETag': self.server.objects['some/prefix/X.tgz'][1]}
        no_range, too_much = 'does not answer with the range that was asked for', 'answers with more than was asked for'
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        for name, problem, answer in (
                ('no range', no_range, lambda h: h.answer(200, b'x' * 500, etag)),
                ('wrong range', no_range, lambda h: h.answer(206, b'x' * 10, dict(etag, **{'Content-Range': 'bytes 0-9/10'}))),
                ('other etag', "'X' in %s was replaced while it was read" % self.url,
                 lambda h: h.answer(206, b'x' * 10, {'ETag': '"other"', 'Content-Range': 'bytes 0-9/10'})),
                ('short', 'IncompleteRead(10 bytes read, 990 more expected)',
                 lambda h: (h.answer(206, b'x' * 10, {}, 1000), setattr(h, 'close_connection', True))),
                ('endless', too_much, lambda h: h.answer(206, b'x' * 3 * MIB)), ('all', too_much, lambda h: h.answer(200, b'x' * 90 * MIB))):
            def fault(handler, answer=answer):
                if handler.headers.get('Range', 'bytes=-').startswith('bytes=-'):
                    return False
                answer(handler)
                return True
            with self.subTest(name):
                self.server.fault = fault
                self.assertIn(problem, self.etc('pull', 'X', home='two', status=1)[1])
                self.assertEqual(self.installed('two'), [])

    def test_absurd_headers(self):
        self.share(small(self.tmp / 'ds'))
        etag = {'ETag': self.server.objects['some/prefix/X.tgz'][1]}
        for modified in ('Mon, 06 May 99999999999 07:08:09 GMT', 'Mon, 06 May 9999999999999999999999 07:08:09 GMT', 'never'):
            with self.subTest(modified):
                self.server.respell = lambda name, value: modified if name == 'Last-Modified' else value
                self.etc('pull', '-f', 'X', home='two')
        self.server.respell = None
        for size in ('1e3', '5 5', ' ', '-5', '9' * 5000):
            with self.subTest(size[:9]):
                def fault(handler):
                    if handler.headers.get('Range', '').startswith('bytes=-'):
                        return handler.answer(416) or True
                    return handler.command == 'HEAD' and (handler.answer(200, b'', etag, size), True)[1]
                self.server.fault = fault
                self.etc('pull', '-f', 'X', home='two')  # a range tells the size
                self.server.respell = lambda name, value: None if name == 'Content-Range' else value
                self.assertIn("does not say how large 'X' is", self.etc('pull', '-f', 'X', home='two', status=1)[1])
                self.server.respell = None

    def test_lost_answer_of_complete(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/large': noise(20 * MIB)}), 'X')
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        original, lost = S3Handler.answer, []

        def answer(handler, status, *args, **kwargs):
            if handler.command == 'POST' and 'uploadId' in handler.path and not lost:
                lost.append(1)
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            original(handler, status, *args, **kwargs)
        self.addCleanup(setattr, S3Handler, 'answer', original)
        S3Handler.answer = answer
        for conditions in (True, False):
            with self.subTest(conditions=conditions):
                del lost[:]
                self.server.conditions = conditions
                self.etc('push', 'X' if conditions else '-f', *[] if conditions else ['X'])
                self.assertEqual(lost, [1])

    def test_stores_without_etags(self):
        self.share(small(self.tmp / 'ds'))
        for etag in ('W/"weak"', ''):
            with self.subTest(etag):
                key, (data, _, headers) = list(self.server.objects.items())[0]
                self.server.objects[key] = data, etag, headers
                self.assertIn('sha256:', self.etc('ls', '-r', '-l')[0])  # times of listing and reading differ here
                self.etc('pull', '-f', 'X', home='two')

    def test_credentials_with_line_ends(self):
        os.environ.update(AWS_ACCESS_KEY_ID=self.settings.pop('aws_access_key_id') + '\n',
                          AWS_SECRET_ACCESS_KEY=self.settings.pop('aws_secret_access_key') + '\r\n')
        self.etc('ls', '-r')
        os.environ['AWS_SECRET_ACCESS_KEY'] = 'hu\nsh'
        err = self.etc('ls', '-r', status=1)[1]
        self.assertIn('the environment: aws_secret_access_key holds characters that it cannot have;', err)
        self.assertNotIn('sh\n', err.replace('etc: ', '', 1)[:-1])

    def test_one_bad_archive_does_not_hide_the_others(self):
        self.share(small(self.tmp / 'ds'))
        self.put('Bad.tgz', b'x' * 100)
        self.server.fault = lambda h: 'Bad.tgz' in h.path and (h.error(403, 'AccessDenied'), True)[1]
        out, err = self.etc('ls', '-r', '-l')
        self.assertIn('sha256:', out)
        self.assertIn('AccessDenied', err)

    def test_ignored_if_match(self):
        self.server.conditions = False
        self.test_replaced_while_read()

    def test_credentials(self):
        self.assertEqual(self.etc('ls', '-r')[0], '')
        secret, akid = self.settings.pop('aws_secret_access_key'), self.settings.pop('aws_access_key_id')
        self.assertIn('no credentials were found', self.etc('ls', '-r', status=1)[1])
        os.environ.update(AWS_ACCESS_KEY_ID=akid)
        self.assertIn('set both', self.etc('ls', '-r', status=1)[1])
        os.environ.update(AWS_SECRET_ACCESS_KEY=secret)
        self.etc('ls', '-r')
        del os.environ['AWS_ACCESS_KEY_ID'], os.environ['AWS_SECRET_ACCESS_KEY']
        write(self.tmp, {'.aws/credentials': '[default]\naws_access_key_id=x\naws_secret_access_key=y\n[work]\n'
                         'aws_access_key_id = %s\naws_secret_access_key = %s\n' % (akid, secret),
                         '.aws/config': '[default]\nregion = eu-west-1\n[profile work]\nregion = eu-north-1\n'})
        self.assertIn('InvalidAccessKeyId', self.etc('ls', '-r', status=1)[1])
        os.environ['AWS_PROFILE'] = 'work'
        self.etc('ls', '-r')
        self.assertIn('/eu-north-1/s3/', self.server.log[-1][2]['Authorization'])
        os.environ.update(AWS_ACCESS_KEY_ID='x', AWS_SECRET_ACCESS_KEY='y', AWS_PROFILE='default')
        self.settings.update(aws_profile='work', region='ap-south-1')
        self.etc('ls', '-r')
        self.assertIn('/ap-south-1/s3/', self.server.log[-1][2]['Authorization'])
        self.settings['aws_profile'] = 'nope'
        self.assertIn('the AWS profile that aws_profile or $AWS_PROFILE names is not in', self.etc('ls', '-r', status=1)[1])
        self.settings.update(aws_access_key_id=akid, aws_secret_access_key='wrong' + secret[5:])
        self.settings['aws_profile'] = 'work'
        err = self.etc('ls', '-r', status=1)[1]
        self.assertIn('SignatureDoesNotMatch', err)
        self.assertNotIn(secret, err)

    def test_session_token(self):
        self.settings['aws_session_token'] = 'a/token+=='
        self.etc('ls', '-r')
        self.assertEqual(self.server.log[-1][2]['x-amz-security-token'], 'a/token+==')

    def test_odd_prefix(self):
        self.url = 's3://bucket/a b/+~\u00e9/(x)'
        self.share(small(self.tmp / 'ds'))
        self.assertEqual(list(self.server.objects), ['a b/+~\u00e9/(x)/X.tgz'])
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.etc('pull', 'X', home='two')

    def test_unreachable(self):
        self.server.stop()
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        self.assertIn('cannot reach http://127.0.0.1', self.etc('ls', '-r', status=1)[1])

    def test_addresses(self):
        def address(url='s3://bucket', **settings):
            remote = etc._open_remote(etc.Config(url, **settings))
            return remote.address('k e+y', {'a': 'b c'})
        self.assertEqual(address(), 'https://bucket.s3.us-east-1.amazonaws.com/k%20e%2By?a=b%20c')
        self.assertEqual(address(region='cn-north-1'), 'https://bucket.s3.cn-north-1.amazonaws.com.cn/k%20e%2By?a=b%20c')
        self.assertEqual(address('s3://my.bucket'), 'https://s3.us-east-1.amazonaws.com/my.bucket/k%20e%2By?a=b%20c')
        self.assertEqual(address(endpoint_url='http://h:1/'), 'http://h:1/bucket/k%20e%2By?a=b%20c')
        for bad in ('h:1', 'ftp://h', 'http://user:pw@h', 'http://h/?q'):
            with self.subTest(bad):
                self.settings['endpoint_url'] = bad
                self.assertIn(r'the endpoint_url must look like https://host[:port];', self.etc('ls', '-r', status=1)[1])

    def test_part_sizes_reach_5_tib(self):
        for limit in (0, 1 << 30, 1 << 36, 5 << 40):
            with self.subTest(limit=limit):
                size = max(etc._MIN_PART, -(-limit // etc._MAX_PARTS >> 20) << 20)
                self.assertGreaterEqual(size * etc._MAX_PARTS, limit)
                self.assertLessEqual(size, 5 << 30)
        chunks = [noise(n) for n in (0, 3, 10, 25, 1, 1, 9, 10)]
        parts = [b''.join(part) for part in etc._split_parts(chunks, 10)]
        self.assertEqual(b''.join(parts), b''.join(chunks))
        self.assertEqual({len(part) for part in parts[:-1]}, {10})


class S3Kinds(S3Case):
    """In what Amazon's regions and the stores that are like S3 differ."""

    def setUp(self):
        super().setUp()
        self.etc('register', small(self.tmp / 'ds'), 'X')

    def region(self):
        return self.server.log[-1][2]['Authorization'].split('/')[2]

    def test_region_of_the_signature(self):
        def fault(handler):
            if '/eu-9/s3/' not in handler.headers['Authorization']:
                handler.answer(400, b'<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong</Message>'
                                    b'<Region>eu-9</Region></Error>')
                return True
        self.server.fault = fault
        self.etc('push', 'X')
        self.assertEqual([m for m, _, _ in self.server.log], ['GET', 'GET', 'HEAD', 'PUT'])  # asked once, then remembered
        self.assertEqual(self.region(), 'eu-9')
        del self.server.log[:]
        self.etc('push', '-f', 'X')
        self.assertEqual([m for m, _, _ in self.server.log], ['PUT', 'PUT'])
        self.server.fault = lambda h: (h.answer(400, b'<Error><Code>AuthorizationHeaderMalformed</Code><Region>a/b</Region></Error>'), 1)[1]
        self.assertIn('AuthorizationHeaderMalformed', self.etc('ls', '-r', status=1)[1])

    def test_regions_of_amazon(self):
        """Its hosts are reached through a proxy here, and not over TLS."""
        del self.settings['endpoint_url']
        os.environ.update(http_proxy=self.server.url, no_proxy='')
        self.addCleanup(setattr, etc._AwsProfile, 'host', etc._AwsProfile.host)
        etc._AwsProfile.host = lambda aws, service, region: 'http://%s.%s.amazonaws.example' % (service, region)
        answers = [(301, {'x-amz-bucket-region': 'eu-west-1'}), (307, {'x-amz-bucket-region': 'eu-west-1'}),
                   (400, {'x-amz-bucket-region': 'eu-west-1'}), (403, {'x-amz-bucket-region': 'eu-west-1'})]
        hosts = []

        def fault(handler):
            parts = urllib.parse.urlsplit(handler.path)
            handler.path = parts.path + '?' + parts.query
            hosts.append(parts.netloc)
            self.assertIsNone(handler.unsigned(b'') if handler.headers['Authorization'] else None)
            if '.eu-west-1.' in parts.netloc:
                handler.answer(200, b'<ListBucketResult></ListBucketResult>')
            else:
                handler.answer(status, b'<Error><Code>PermanentRedirect</Code></Error>', headers)
            return True
        self.server.fault = fault
        for anonymous in (False, True):
            for status, headers in answers:
                with self.subTest(anonymous=anonymous, status=status):
                    del hosts[:]
                    self.assertEqual(self.etc('ls', '-r')[0], '')
                    self.assertEqual(hosts, ['bucket.s3.us-east-1.amazonaws.example', 'bucket.s3.eu-west-1.amazonaws.example'])
            self.settings = {}
        status, headers = 301, {'x-amz-bucket-region': 'evil.example/'}
        self.assertIn('PermanentRedirect', self.etc('ls', '-r', status=1)[1])
        self.assertEqual(set(hosts), {'bucket.s3.us-east-1.amazonaws.example', 'bucket.s3.eu-west-1.amazonaws.example'})

    def test_clock(self):
        skew, now = 0, time.time
        self.addCleanup(setattr, etc.time, 'time', now)

        def fault(handler):
            stamp = time.strptime(handler.headers['x-amz-date'], '%Y%m%dT%H%M%SZ')
            if abs(calendar.timegm(stamp) - now()) > 900:
                handler.error(403, 'RequestTimeTooSkewed')
                return True
        self.server.fault = fault
        self.addCleanup(setattr, Handler, 'date_time_string', Handler.date_time_string)
        Handler.date_time_string = lambda handler, timestamp=None: email.utils.formatdate(now(), usegmt=True)
        for skew in (-3 * 3600, 40 * 86400):
            with self.subTest(skew=skew):
                etc.time.time = lambda skew=skew: now() + skew
                del self.server.log[:]
                self.assertIn('clock is %d minutes off' % (abs(skew) // 60), self.etc('push', 'X', '-f')[1])
                self.etc('pull', 'X', '-f', home='two')
                methods = [m for m, _, _ in self.server.log]
                self.assertEqual(methods[:2], ['PUT', 'PUT'])
        Handler.date_time_string = lambda handler, timestamp=None: 'no date'
        self.assertIn("set this machine's clock", self.etc('ls', '-r', status=1)[1])

    def test_headers_that_are_asked_for(self):
        self.etc('register', write(self.tmp / 'big', {'data/train/x': noise(20 * MIB)}), 'Big')
        self.settings.update(request_payer='requester', sse_kms_key_id='arn:aws:kms:eu-west-1:1:key/k', storage_class='STANDARD_IA')
        self.etc('push', 'X', 'Big')
        self.etc('pull', 'X', home='two')
        self.etc('ls', '-r')
        names = ('x-amz-server-side-encryption', 'x-amz-server-side-encryption-aws-kms-key-id', 'x-amz-storage-class')
        created = 0
        for method, path, headers in self.server.log:
            self.assertEqual(headers['x-amz-request-payer'], 'requester', (method, path))
            new = method == 'PUT' and '?' not in path or path.endswith('?uploads=')
            created += new
            self.assertEqual([headers.get(name) for name in names],
                             ['aws:kms', 'arn:aws:kms:eu-west-1:1:key/k', 'STANDARD_IA'] if new else [None] * 3)
            for name in headers:
                self.assertNotRegex(name.lower(), 'checksum|trailer|content-md5|transfer-encoding|expect')
            self.assertRegex(headers['x-amz-content-sha256'], '^[0-9a-f]{64}$')
        self.assertEqual(created, 2)
        self.settings['sse'] = 'AES256'
        self.settings.pop('sse_kms_key_id')
        self.etc('push', '-f', 'X')
        self.assertEqual(self.server.log[-1][2]['x-amz-server-side-encryption'], 'AES256')
        for bad in ('a b', 'caf\u00e9'):
            with self.subTest(bad):
                self.settings['sse'] = bad
                self.assertIn('the header x-amz-server-side-encryption a value that cannot', self.etc('ls', '-r', status=1)[1])

    def test_keys_that_are_not_encoded(self):
        self.url = 's3://bucket/a+b %41&'
        self.etc('push', 'X')
        for self.server.encoding in (True, False):
            with self.subTest(encoding=self.server.encoding):
                self.assertEqual(self.etc('ls', '-r')[0], 'X\n')

    def test_who_is_to_blame(self):
        self.etc('push', 'X')

        def refuse(code, message='', status=403, methods=('GET', 'HEAD', 'PUT'), key=''):
            body = '<Error><Code>%s</Code><Message>%s</Message></Error>' % (code, message)
            self.server.fault = lambda h: h.command in methods and key in h.path and (
                h.answer(status, body.encode() if code else b''), True)[1]
        refuse('AccessDenied')
        self.assertIn('come from the settings, need s3:ListBucket here', self.etc('ls', '-r', status=1)[1])
        self.assertIn('need s3:GetObject, and s3:ListBucket', self.etc('pull', 'X', home='two', status=1)[1])
        refuse('AccessDenied', methods=['PUT'])
        self.assertIn('need s3:PutObject', self.etc('push', 'X', '-f', status=1)[1])
        for code, status, word in (('NoSuchBucket', 404, 'check the bucket'), ('PermanentRedirect', 301, "set 'region'"),
                                   ('InvalidToken', 400, 'renew'), ('', 404, 'check the url'), ('', 400, 'the region'),
                                   ('InvalidAccessKeyId', 403, 'it comes from the settings'),
                                   ('SecondLevelDomainForbidden', 403, 'addressing_style = virtual'),  # Alibaba
                                   ('PathStyleDomainForbidden', 403, 'addressing_style = virtual'),  # Tencent
                                   ('VirtualHostDomainRequired', 400, 'addressing_style = virtual')):  # Huawei
            with self.subTest(code, status=status):
                refuse(code, 'why', status)
                err = self.etc('ls', '-r', status=1)[1]
                self.assertIn(word, err)
                self.assertIn('answers %d %s: why;' % (status, code) if code else 'answers %d: no explanation;' % status, err)
        self.server.fault = None
        self.assertIn('NoSuchBucket', self.etc('pull', 'X', home='two', url='s3://missing', status=1)[1])
        self.assertIn('NoSuchBucket', self.etc('push', 'X', url='s3://missing', status=1)[1])
        del self.settings['aws_access_key_id'], self.settings['aws_secret_access_key']
        write(self.tmp, {'.aws/config': '[profile work]\nregion = x\n'})
        self.settings['aws_profile'] = 'work'
        err = self.etc('ls', '-r', status=1)[1]
        for word in ('no credentials were found', 'settings', 'environment', "profile 'work'", 'container', 'aws sso login'):
            self.assertIn(word, err)

    def test_anonymous(self):
        self.etc('push', 'X')
        self.settings = {'endpoint_url': self.server.url}
        self.addCleanup(setattr, S3Handler, 'unsigned', S3Handler.unsigned)
        S3Handler.unsigned = lambda handler, body: handler.headers['Authorization'] and 'AccessDenied'
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.etc('pull', 'X', home='two')

    def test_access_points(self):
        self.assertIn('-s3alias', self.etc('ls', '-r', url='s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine', status=1)[1])


class GsHandler(Handler):
    """Google Cloud Storage's JSON API, as https://cloud.google.com/storage/docs/json_api/v1 describes it."""

    is_damaged = False  # what arrives here

    def problem(self, status, message):
        self.answer(status, json.dumps({'error': {'code': status, 'message': message}}).encode())

    def handle_one(self):
        server = self.server
        path, _, query = self.path.partition('?')
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        server.log.append((self.command, self.path, self.headers))
        server.connections.add(self.client_address)
        if self.command == 'PUT' and path == '/session' and server.cuts and 'bytes */' not in self.headers['Content-Range']:
            start = int(re.match(r'bytes (\d+)-', self.headers['Content-Range']).group(1))
            cut = server.cuts.pop(0)
            received = self.rfile.read(min(cut, int(self.headers['Content-Length'])))
            with server.lock:
                self.receive(start, received[:len(received) // server.granule * server.granule])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.read_body()
        if server.fault and server.fault(self):
            return
        if server.token and self.headers.get('Authorization') != 'Bearer ' + server.token:
            return self.problem(403 if 'Authorization' not in self.headers else 401, 'who are you?')
        with server.lock:
            if path == '/session':
                return self.session(body)
            if path == '/upload/storage/v1/b/bucket/o' and self.command == 'POST':
                return self.start(body)
            parts = path.split('/')
            if parts[:5] != ['', 'storage', 'v1', 'b', 'bucket'] or parts[5:6] != ['o']:
                return self.problem(404, 'The specified bucket does not exist.')
            if len(parts) == 6:
                return self.list()
            if len(parts) != 7:
                return self.problem(404, 'Not Found')
            self.object(urllib.parse.unquote(parts[6]))

    def resource(self, name, found=None):
        data, generation, headers = found or self.server.objects[name]
        return {'kind': 'storage#object', 'id': 'bucket/%s/%s' % (name, generation), 'name': name, 'bucket': 'bucket',
                'contentType': 'application/gzip', 'storageClass': 'STANDARD', 'metageneration': '1',
                'size': str(len(data)), 'generation': generation, 'updated': '2024-05-06T07:08:09.123Z',
                'md5Hash': base64.b64encode(md5(data).digest()).decode()}

    def list(self):
        prefix, after = self.query.get('prefix', ''), self.query.get('pageToken', '')
        names = sorted(n for n in self.server.objects if n.startswith(prefix) and n > after and '/' not in n[len(prefix):])
        page = {'kind': 'storage#objects'} if 'kind' in self.query.get('fields', 'kind').split(',') else {}
        if names:
            page['items'] = [self.resource(n) for n in names[:self.server.page]]
        if len(names) > self.server.page:
            page['nextPageToken'] = names[self.server.page - 1]
        self.answer(200, json.dumps(page).encode())

    def object(self, name):
        found = self.server.objects.get(name)
        if not found or self.query.get('generation', found[1]) != found[1]:
            found = self.server.old.get((name, self.query.get('generation')))
        if not found:
            return self.problem(404, 'No such object')
        if self.server.conditions and self.query.get('ifGenerationMatch', found[1]) != found[1]:
            return self.problem(412, 'conditionNotMet')
        if self.command == 'DELETE':
            if self.server.versioned:
                self.server.old[name, found[1]] = found
            del self.server.objects[name]
            return self.answer(204)
        if self.query.get('alt') != 'media':
            return self.answer(200, json.dumps(self.resource(name, found)).encode())
        start, stop = asked_range(self.headers, len(found[0]))
        if start >= stop:
            return self.problem(416, 'requestedRangeNotSatisfiable')
        self.answer(206, found[0][start:stop], {'Content-Range': 'bytes %d-%d/%d' % (start, stop - 1, len(found[0])),
                                                'Last-Modified': 'Mon, 06 May 2024 07:08:09 GMT', 'x-goog-generation': found[1]})

    def start(self, body):
        is_whole = self.query['uploadType'] == 'multipart'
        resource, data = self.related(body) if is_whole else (body, b'')
        expected = json.loads(resource.decode()).get('md5Hash')
        if self.query.get('ifGenerationMatch') == '0' and self.query['name'] in self.server.objects:
            return self.problem(412, 'conditionNotMet')
        if self.query.get('predefinedAcl') and self.server.uniform:
            return self.problem(400, 'Cannot insert legacy ACL for an object when uniform bucket-level access is enabled.')
        if is_whole:
            found = base64.b64encode(md5(data).digest()).decode()
            if expected and expected != found:
                return self.problem(400, 'Provided MD5 hash "%s" doesn\'t match calculated MD5 hash "%s".' % (expected, found))
            return self.store(self.query, data)
        upload = os.urandom(8).hex()
        self.server.uploads[upload] = [self.query, bytearray(), 0]
        self.answer(200, b'', {'Location': self.server.url + '/session?upload_id=' + upload})

    def related(self, body):
        """The resource and the data in a body of the type multipart/related (RFC 2387; the parts as RFC 2046, 5.1.1 frames them)."""
        boundary = re.match('multipart/related; boundary=([0-9a-zA-Z]{1,70})$', self.headers['Content-Type']).group(1).encode()
        before, resource, data, after = (b'\r\n' + body).split(b'\r\n--' + boundary)
        assert (before, after) == (b'', b'--\r\n')
        resource, data = (part.split(b'\r\n\r\n', 1) for part in (resource, data))
        assert (resource[0], data[0]) == (b'\r\nContent-Type: application/json', b'\r\nContent-Type: application/gzip')
        return resource[1], data[1][:-1] + b'?' if self.is_damaged else data[1]

    def store(self, query, data):
        self.server.generation += 1
        self.server.objects[query['name']] = bytes(data), str(self.server.generation), query
        resource = self.resource(query['name'])
        if self.server.garble:
            resource['md5Hash'] = 'AAAA'
        if self.server.final:
            return self.server.final(self)
        self.answer(200, json.dumps(resource).encode())

    def receive(self, start, data):
        upload = self.server.uploads[self.query['upload_id']]
        assert start == len(upload[1]), 'neither a gap nor a byte again'
        upload[1] += data
        upload[2] += len(data)

    def session(self, body):
        upload = self.server.uploads.get(self.query['upload_id'])
        if self.command == 'DELETE' or upload is None:
            self.server.uploads.pop(self.query['upload_id'], None)
            return self.answer(499 if upload else 404)
        start, stop, total = re.match(r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)$', self.headers['Content-Range']).groups()
        if start is not None:
            if int(stop) + 1 - int(start) != len(body) or (total == '*' and (int(stop) + 1) % (256 << 10)):
                return self.problem(400, 'wrong chunk')
            self.receive(int(start), body)
        query, data, _ = upload
        if total == '*' or int(total) != len(data):
            headers = {'Range': 'bytes=0-%d' % (len(data) - 1)} if data else {}
            return self.answer(308, b'', headers)
        if query.get('ifGenerationMatch') == '0' and query['name'] in self.server.objects:
            return self.problem(412, 'conditionNotMet')
        del self.server.uploads[self.query['upload_id']]
        self.store(query, data)


class GsCase(Case):
    def setUp(self):
        super().setUp()
        self.server = Server(GsHandler)
        self.addCleanup(self.server.stop)
        self.server.cuts, self.server.granule, self.server.token = [], 1, None
        self.server.generation, self.server.uniform, self.server.garble = 1700000000000000, False, False
        self.url = 'gs://bucket/some/prefix'
        self.settings = {'endpoint_url': self.server.url}
        os.environ['STORAGE_EMULATOR_HOST'] = self.server.url  # for spawned processes

    def put(self, name, data):
        self.server.generation += 1
        self.server.objects['some/prefix/' + name] = data, str(self.server.generation), {}


class GsRemote(RemoteSuite, GsCase):
    copies = False
    def test_answers_that_are_not_understood(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.etc('register', write(self.tmp / 'medium', {'data/train/x': noise(9 * MIB)}), 'W')
        self.etc('register', write(self.tmp / 'large', {'data/train/x': noise(17 * MIB)}), 'Y')
        for what, body in (('an empty object', b'{}'), ('nothing', b''), ('a page', b'<html>Log in</html>'), ('a list', b'[]'),
                           ('another object', b'{"name": "some/prefix/Z.tgz", "generation": "5", "size": "7"}'),
                           ('no generation', b'{"name": "some/prefix/X.tgz", "size": "7"}'),
                           ('no size', b'{"name": "some/prefix/X.tgz", "generation": "5"}'),
                           ('another size', b'{"name": "some/prefix/X.tgz", "generation": "5", "size": "7"}')):
            for name, method, stored in (('X', 'POST', True), ('X', 'POST', False), ('W', 'POST', False), ('W', 'PUT', True), ('W', 'PUT', False)):
                with self.subTest(what, name=name, method=method, stored=stored):
                    body = body.replace(b'X.tgz', name.encode() + b'.tgz')
                    self.server.objects.clear()
                    self.server.final = (lambda handler: handler.answer(200, body)) if stored else None
                    self.server.fault = None if stored else lambda handler: (
                        handler.command == method and (handler.answer(200, body), True)[1])
                    self.assertIn('pushed' if stored else 'does not answer as Google', self.etc('push', name, status=int(not stored))[1])
                    self.server.final = None
                    self.assertEqual(len(self.server.objects), int(stored))
        self.server.fault = lambda handler: '/*' in handler.headers.get('Content-Range', '') and (handler.answer(200, b'{}'), True)[1]
        self.assertIn('does not answer as Google', self.etc('push', 'Y', status=1)[1])

    def test_accounts_that_may_only_create(self):
        """The condition of the write decides where storage.objects.get is missing."""
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.server.fault = lambda handler: handler.command == 'GET' and (handler.problem(403, 'no storage.objects.get access'), True)[1]
        self.etc('push', 'X')
        self.assertIn('cannot read it to compare', self.etc('push', 'X', status=1)[1])

    def test_pages(self):
        for number in range(25):
            self.put('D%02d.tgz' % number, b'x')
        self.server.page = 10
        self.assertEqual(etc.ls(True, self.config()), ['D%02d' % n for n in range(25)])

    def test_emulator_host(self):
        del self.settings['endpoint_url']
        self.put('X.tgz', b'x')
        for host in (self.server.url, self.server.url[7:]):
            with self.subTest(host):
                os.environ['STORAGE_EMULATOR_HOST'] = host
                self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.assertIsNone(self.server.log[-1][2].get('Authorization'))

    def test_public(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.settings['public'] = True
        self.server.uniform = True
        self.assertIn('allUsers', self.etc('push', 'X', status=1)[1])
        self.server.uniform = False
        self.etc('push', 'X')
        self.assertEqual(self.server.objects['some/prefix/X.tgz'][2]['predefinedAcl'], 'publicRead')

    def test_cut_uploads_go_on_where_they_were(self):
        root = write(self.tmp / 'ds', {'data/train/x': noise(30 * MIB)})
        self.etc('register', root, 'X')
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        rng = random.Random(9)
        for trial in range(6):
            with self.subTest(trial=trial):
                cuts = [rng.randrange(9 * MIB) for _ in range(6)] + [0, 1, 8 * MIB]
                rng.shuffle(cuts)
                self.server.cuts, self.server.granule = list(cuts), (1, 256 << 10)[trial % 2]
                received = []
                self.server.fault = lambda h: received.append(len(self.server.uploads)) and None
                self.etc('push', '-f', 'X')  # the server asserts that no byte came twice
                self.assertEqual(self.server.cuts, [])
        data = self.server.objects['some/prefix/X.tgz'][0]
        os.environ.pop('STORAGE_EMULATOR_HOST')
        etc.push('X', config=etc.Config((self.tmp / 'share').as_uri(), self.tmp / 'home'))
        self.assertEqual(data, (self.tmp / 'share/X.tgz').read_bytes())

    def test_lost_last_answer(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}), 'X')
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        seen = []

        def fault(handler):
            if handler.command == 'PUT' and not seen:
                seen.append(1)
                handler.problem(503, 'busy')
                return True
        self.server.fault = fault
        self.etc('push', 'X')
        self.etc('pull', 'X', home='two')

    def test_requests(self):
        """What is small goes there in one request."""
        whole = [('GET', None), ('POST', 'multipart')]
        for size, requests in ((10, whole), (8 * MIB - 65536, whole), (8 * MIB, [('GET', None), ('POST', 'resumable'), ('PUT', None)]),
                               (16 * MIB, [('GET', None), ('POST', 'resumable'), ('PUT', None), ('PUT', None)])):
            with self.subTest(size=size):
                self.etc('register', '-f', write(self.tmp / str(size), {'data/train/x': noise(size)}), 'X')
                self.server.log.clear()
                self.server.objects.clear()
                self.etc('push', 'X')
                kinds = [re.search('uploadType=([a-z]+)', path) for _, path, _ in self.server.log]
                self.assertEqual([(method, kind and kind.group(1)) for (method, _, _), kind in zip(self.server.log, kinds)], requests)
                self.etc('pull', '-f', 'X', home='two')
                self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / str(size)))

    def test_lost_answer(self):
        """The next try finds the name taken, by the very object."""
        self.etc('register', small(self.tmp / 'ds'), 'X')
        for words, generations in ((['push', 'X'], 1), (['push', '-f', 'X'], 2)):
            with self.subTest(words):
                self.server.objects.clear()
                before = self.server.generation
                lost = []

                def final(handler):
                    self.server.final = None
                    lost.append(handler.path)
                    handler.close_connection = True
                self.server.final = final
                self.etc(*words)
                self.assertEqual((len(lost), self.server.generation - before), (1, generations))
                self.etc('pull', '-f', 'X', home='two')

    def test_session_that_takes_nothing(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}), 'X')
        self.server.fault = lambda h: h.command == 'PUT' and (h.answer(308), True)[1]  # to some servers a redirect
        self.assertIn('takes no more', self.etc('push', 'X', status=1)[1])
        self.assertEqual((self.server.uploads, self.server.objects), ({}, {}))

    def test_failed_upload_is_cancelled(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(30 * MIB)}), 'X')
        self.server.fault = lambda h: '16777216-' in (h.headers.get('Content-Range') or '') and (h.problem(403, 'no'), True)[1]
        self.assertIn('answers 403: no;', self.etc('push', 'X', status=1)[1])
        self.assertEqual((self.server.uploads, self.server.objects), ({}, {}))

    def test_md5(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.etc('register', write(self.tmp / 'medium', {'data/train/x': noise(9 * MIB)}), 'Y')
        for name in 'XY':
            with self.subTest(name):
                self.server.garble = True
                self.assertIn('did not arrive', self.etc('push', name, status=1)[1])
                self.assertEqual(self.server.objects, {})
                self.server.garble = False
        with self.subTest('refused'):
            self.server.fault = lambda handler: setattr(handler, 'is_damaged', True)
            self.assertRegex(self.etc('push', 'X', status=1)[1], 'answers 400: Provided MD5 hash .*; it did not arrive as it was sent; push again')
            self.assertEqual((self.server.objects, self.server.log[-1][0]), ({}, 'POST'))

        def no_md5(*args, **kwargs):
            raise ValueError('disabled for FIPS')
        self.addCleanup(setattr, hashlib, 'md5', hashlib.md5)
        hashlib.md5 = no_md5  # the server has its own
        self.etc('push', 'X')

    def test_odd_prefix(self):
        self.url = 'gs://bucket/a b/+~\u00e9/(x)'
        self.share(small(self.tmp / 'ds'))
        self.assertEqual(list(self.server.objects), ['a b/+~\u00e9/(x)/X.tgz'])
        self.etc('pull', 'X', home='two')

    def test_strange_answers(self):
        for body in (b'', b'[]', b'{"items": 5}', b'{"items": [{}]}', b'{"items": [{"name": 5}]}', b'<html>', b'[' * 100000,
                     b'{"items": [{"name": "some/prefix/X.tgz", "size": "x", "generation": 1}]}',
                     b'{"items": [{"name": "some/prefix/X.tgz", "size": 1e999, "generation": 1}]}', b'{"nextPageToken": 3}'):
            for body in (body, body.replace(b'{', b'{"kind": "storage#objects", ', 1)):
                with self.subTest(body[:99]):
                    self.server.fault = lambda h: (h.answer(200, body), True)[1]
                    self.assertIn('does not answer as Google', self.etc('ls', '-r', status=1)[1])
                    self.assertIn('does not answer as Google', self.etc('pull', 'X', status=1)[1])
        for body in (b'{}', b'{"login": "https://portal.example"}', b'{"kind": "login"}'):
            with self.subTest(body):  # which must not pass for an empty bucket
                self.server.fault = lambda h: (h.answer(200, body), True)[1]
                self.assertIn('does not answer as Google', self.etc('ls', '-r', status=1)[1])
        tokens = itertools.cycle('abc')
        self.server.fault = lambda h: (
            h.answer(200, b'{"kind": "storage#objects", "nextPageToken": "%s"}' % next(tokens).encode()), True)[1]
        self.assertIn('same page of its listing twice', self.etc('ls', '-r', status=1)[1])
        self.server.fault = lambda h: (h.answer(200, b'{"name": "some/prefix/Y.tgz", "size": 5, "generation": 1}'), True)[1]
        self.assertIn('does not answer as Google', self.etc('pull', 'X', status=1)[1])


class GsPurge(PurgeSuite, GsCase):
    def test_refusals(self):
        rule = '; a rule of the bucket protects it; ask whoever made the rule'
        os.environ.pop('STORAGE_EMULATOR_HOST')
        for message, remedy in (
                ("Object 'bucket/X.tgz' is subject to bucket's retention policy or object retention and cannot be deleted or "
                 'overwritten until 2030-01-01T00:00:00Z', rule),
                ("Object 'bucket/X.tgz' is under active Event-Based hold and cannot be deleted, overwritten or archived until hold is "
                 'removed.', rule),
                ("a@b.example does not have storage.objects.delete access to the Google Cloud Storage object.",
                 "; no credentials were found: run 'gcloud auth application-default login', or set google_credentials or "
                 '$GOOGLE_APPLICATION_CREDENTIALS to a credentials file')):
            self.refused((lambda h: h.problem(403, message), '403: ' + message + remedy))

    def test_conditions(self):
        generation = self.server.objects['some/prefix/X.tgz'][1]
        self.assertIn("purged 'X'", self.purge())
        self.assertEqual([path.partition('?')[2] for method, path, _ in self.server.log if method == 'DELETE'],
                         ['ifGenerationMatch=' + generation])

    def test_accounts_that_may_not_read_old_versions(self):
        self.server.fault = lambda h: 'generation=' in h.path and h.command == 'GET' and (h.problem(403, 'no'), True)[1]
        self.assertEqual(self.purge(), "etc: purged 'X' from %s\n" % self.url)


class TokenHandler(Handler):
    """Google's token endpoints: OAuth, STS, IAM Credentials, metadata; `server.check(handler, form)` says what is wrong."""

    def handle_one(self):
        body = self.read_body()
        self.server.log.append((self.command, self.path, self.headers))
        is_form = 'form' in (self.headers.get('Content-Type') or '')
        form = dict(urllib.parse.parse_qsl(body.decode())) if is_form else json.loads(body.decode() or '{}')
        answer = self.server.respond(self, form)
        if isinstance(answer, str):
            self.answer(400, json.dumps({'error': 'invalid_grant', 'error_description': answer}).encode())
        else:
            self.answer(200, json.dumps(answer).encode(), {'Metadata-Flavor': 'Google'})


def make_key(bits):
    """A PEM key from openssl, or None."""
    if not shutil.which('openssl'):
        return None
    return subprocess.check_output(['openssl', 'genpkey', '-algorithm', 'RSA', '-pkeyopt', 'rsa_keygen_bits:%d' % bits],
                                   stderr=subprocess.DEVNULL).decode()


class GoogleCase(GsCase):
    def setUp(self):
        super().setUp()
        del os.environ['STORAGE_EMULATOR_HOST']
        os.environ['NO_GCE_CHECK'] = 'true'
        self.server.token = 'ya29.token'
        self.tokens = Server(TokenHandler)
        self.addCleanup(self.tokens.stop)
        self.asked = []
        # credentials are only for https; a test has none, so it lifts that rule, and nothing else
        original = etc._GsRemote.__init__

        def init(remote, config):
            original(remote, config)
            remote.credentials = etc._GoogleCredentials(config, remote.http)
        etc._GsRemote.__init__ = init
        self.addCleanup(setattr, etc._GsRemote, '__init__', original)

    def respond(self, checks, **answer):
        """Let the token endpoint answer, if all `checks` {key: value or function} hold for the form."""
        def respond(handler, form):
            self.asked.append(form)
            for key, expected in checks.items():
                value = form.get(key)
                if not (expected(value) if callable(expected) else value == expected):
                    return 'wrong %s: %s' % (key, value)
            return answer or {'access_token': 'ya29.token', 'expires_in': 3599, 'token_type': 'Bearer'}
        self.tokens.respond = respond

    def use(self, info):
        self.settings['google_credentials'] = str(self.tmp / 'key.json')
        (self.tmp / 'key.json').write_text(json.dumps(info))

    def user(self, **more):
        return dict({'type': 'authorized_user', 'client_id': 'i', 'client_secret': 's', 'refresh_token': 'r',
                     'token_uri': self.tokens.url}, **more)

    def works(self):
        self.assertEqual(self.etc('ls', '-r')[0], '')


class GoogleCredentials(GoogleCase):
    def test_authorized_user(self):
        self.use({'type': 'authorized_user', 'client_id': 'id', 'client_secret': 'se+cret', 'refresh_token': 'a/b',
                  'token_uri': self.tokens.url + '/token', 'quota_project_id': 'billing'})
        self.respond({'grant_type': 'refresh_token', 'client_id': 'id', 'client_secret': 'se+cret', 'refresh_token': 'a/b'})
        self.share(small(self.tmp / 'ds'))
        self.assertEqual(len(self.asked), 1, 'a token is kept')
        self.assertEqual(self.server.log[-1][2]['x-goog-user-project'], 'billing')
        self.respond({'refresh_token': 'other'})
        err = self.etc('ls', '-r', status=1)[1]
        self.assertIn('gives no access token: wrong refresh_token', err)
        self.assertNotIn('se+cret', err)

    def test_byte_order_marks(self):
        base = {'type': 'external_account', 'audience': 'a', 'token_url': self.tokens.url + '/sts', 'subject_token_type': 't'}
        (self.tmp / 'subject').write_bytes(b'\xef\xbb\xbfsubject-jwt')
        (self.tmp / 'subject.json').write_bytes(b'\xef\xbb\xbf{"id_token": "subject-jwt"}')
        for what, info, checks in (
                ('credentials', self.user(), {}),
                ('text', dict(base, credential_source={'file': str(self.tmp / 'subject')}), {'subject_token': 'subject-jwt'}),
                ('JSON', dict(base, credential_source={'file': str(self.tmp / 'subject.json'), 'format': {
                    'type': 'json', 'subject_token_field_name': 'id_token'}}), {'subject_token': 'subject-jwt'})):
            with self.subTest(what):
                self.use(info)
                (self.tmp / 'key.json').write_bytes(b'\xef\xbb\xbf' + (self.tmp / 'key.json').read_bytes())
                self.respond(checks)
                self.works()

    def test_renewed_when_refused_and_before_it_expires(self):
        self.use(self.user())
        tokens = iter(['old', 'ya29.token'])
        self.tokens.respond = lambda h, form: {'access_token': next(tokens), 'expires_in': 3600}
        self.works()
        self.assertEqual(len(self.server.log), 2)
        self.tokens.respond = lambda h, form: (self.asked.append(1), {'access_token': 'ya29.token', 'expires_in': 100})[1]
        self.share(small(self.tmp / 'ds'))
        self.assertGreater(len(self.asked), 1)
        self.tokens.respond = lambda h, form: {'access_token': 'never right', 'expires_in': 3600}
        self.assertIn('permissions', self.etc('ls', '-r', status=1)[1])
        for token in ('two\nlines', ['list'], ''):
            with self.subTest(token):
                self.tokens.respond = lambda h, form: {'access_token': token, 'expires_in': 3600}
                self.assertIn('access_token is missing', self.etc('ls', '-r', status=1)[1])

    @unittest.skipUnless(shutil.which('openssl') or os.environ.get('ETC_TEST_REQUIRE_PEERS'), 'no openssl here')
    def test_service_account(self):
        for bits, traditional in ((2048, False), (4096, False), (2048, True)):
            with self.subTest(bits=bits, traditional=traditional):
                pem = make_key(bits)
                (self.tmp / 'key.pem').write_text(pem)
                if traditional:
                    pem = subprocess.check_output(['openssl', 'rsa', '-in', str(self.tmp / 'key.pem'), '-traditional'],
                                                  stderr=subprocess.DEVNULL).decode()
                subprocess.check_call(['openssl', 'pkey', '-in', str(self.tmp / 'key.pem'), '-pubout', '-out',
                                       str(self.tmp / 'pub.pem')])

                def decode(text):
                    return base64.urlsafe_b64decode(text + '=' * (-len(text) % 4))

                def right(assertion):
                    head, claims, signature = assertion.split('.')
                    (self.tmp / 'signature').write_bytes(decode(signature))
                    (self.tmp / 'message').write_text(head + '.' + claims)
                    self.assertEqual(subprocess.call(['openssl', 'dgst', '-sha256', '-verify', str(self.tmp / 'pub.pem'), '-signature',
                                                      str(self.tmp / 'signature'), str(self.tmp / 'message')],
                                                     stdout=subprocess.DEVNULL), 0)
                    self.assertEqual(json.loads(decode(head).decode()), {'alg': 'RS256', 'typ': 'JWT', 'kid': 'kid1'})
                    claims = json.loads(decode(claims).decode())
                    self.assertEqual((claims['iss'], claims['aud']), ('me@project', self.tokens.url + '/token'))
                    self.assertTrue(claims['scope'].startswith('https://www.googleapis.com/auth/devstorage.'))
                    self.assertTrue(abs(claims['iat'] - time.time()) < 60 and claims['exp'] - claims['iat'] == 3600)
                    return True
                self.use({'type': 'service_account', 'client_email': 'me@project', 'private_key_id': 'kid1', 'private_key': pem,
                          'token_uri': self.tokens.url + '/token'})
                self.respond({'grant_type': 'urn:ietf:params:oauth:grant-type:jwt-bearer', 'assertion': right})
                self.works()
        self.use({'type': 'service_account', 'client_email': 'me@project', 'private_key': 'garbage', 'token_uri': self.tokens.url})
        self.assertIn('private_key', self.etc('ls', '-r', status=1)[1])

    def test_external_account(self):
        (self.tmp / 'subject').write_text('subject-jwt')
        (self.tmp / 'subject.json').write_text('{"id_token": "subject-jwt"}')
        base = {'type': 'external_account', 'audience': '//iam.googleapis.com/pool', 'token_url': self.tokens.url + '/sts',
                'subject_token_type': 'urn:ietf:params:oauth:token-type:jwt'}
        checks = {'grant_type': 'urn:ietf:params:oauth:grant-type:token-exchange', 'audience': '//iam.googleapis.com/pool',
                  'requested_token_type': 'urn:ietf:params:oauth:token-type:access_token', 'subject_token': 'subject-jwt',
                  'subject_token_type': 'urn:ietf:params:oauth:token-type:jwt', 'scope': lambda s: 'auth/' in s}
        for source in ({'file': str(self.tmp / 'subject')}, {
                'file': str(self.tmp / 'subject.json'), 'format': {'type': 'json', 'subject_token_field_name': 'id_token'}}):
            with self.subTest(source):
                self.use(dict(base, credential_source=source))
                self.respond(checks)
                self.works()

        def respond(handler, form):
            self.asked.append(handler.path)
            if handler.path == '/subject':
                return {'value': 'subject-jwt'} if handler.headers['X-Secret'] == 'x' else 'no'
            if handler.path == '/sts':
                return {'access_token': 'federated', 'expires_in': 3600} if form['subject_token'] == 'subject-jwt' else 'no'
            if handler.headers['Authorization'] != 'Bearer federated' or form['lifetime'] != '3600s':
                return 'no'
            return {'accessToken': 'ya29.token', 'expireTime': '2099-01-01T00:00:00Z'}
        self.tokens.respond = respond
        self.use(dict(base, service_account_impersonation_url=self.tokens.url + '/sa:generateAccessToken', credential_source={
            'url': self.tokens.url + '/subject', 'headers': {'X-Secret': 'x'},
            'format': {'type': 'json', 'subject_token_field_name': 'value'}}))
        self.works()
        self.assertEqual(self.asked[-3:], ['/subject', '/sts', '/sa:generateAccessToken'])
        self.use(dict(base, credential_source={'file': str(self.tmp / 'nowhere')}))
        self.assertIn('cannot read the file with a token that the credential_source names', self.etc('ls', '-r', status=1)[1])

    def test_impersonated_service_account(self):
        def respond(handler, form):
            if handler.path == '/token':
                return {'access_token': 'mine', 'expires_in': 3600}
            right = handler.headers['Authorization'] == 'Bearer mine' and form['delegates'] == ['d']
            return {'accessToken': 'ya29.token', 'expireTime': '2099-01-01T00:00:00Z'} if right else 'no'
        self.tokens.respond = respond
        self.use({'type': 'impersonated_service_account', 'delegates': ['d'],
                  'service_account_impersonation_url': self.tokens.url + '/sa',
                  'source_credentials': self.user(token_uri=self.tokens.url + '/token')})
        self.works()

    def test_metadata_server(self):
        del os.environ['NO_GCE_CHECK']
        os.environ['GCE_METADATA_HOST'] = self.tokens.url[7:]
        os.environ.update(http_proxy='http://127.0.0.1:1', no_proxy=self.server.url[7:])  # it is never asked through a proxy
        self.tokens.respond = lambda handler, form: (
            {'access_token': 'ya29.token', 'expires_in': 3600} if handler.headers['Metadata-Flavor'] == 'Google' else 'no')
        os.environ['no_proxy'] = '127.0.0.1'
        self.works()
        answer = TokenHandler.answer
        self.addCleanup(setattr, TokenHandler, 'answer', answer)
        TokenHandler.answer = lambda h, status, body=b'', headers=(), length=None: answer(h, status, body, (), length)
        self.assertIn('no credentials were found', self.etc('ls', '-r', status=1)[1])  # an impostor

    def test_places(self):
        self.respond({'refresh_token': 'right'})
        right, wrong = json.dumps(self.user(refresh_token='right')), json.dumps(self.user(refresh_token='wrong'))
        self.assertIn('no credentials were found', self.etc('ls', '-r', status=1)[1])
        well_known = write(self.tmp, {'.config/gcloud/application_default_credentials.json': right}) / '.config/gcloud'
        if os.name != 'nt':
            self.works()
        write(well_known, {'application_default_credentials.json': wrong})
        write(self.tmp / 'sdk', {'application_default_credentials.json': right})
        os.environ['CLOUDSDK_CONFIG'] = str(self.tmp / 'sdk')
        self.works()
        write(self.tmp / 'sdk', {'application_default_credentials.json': wrong, 'right.json': right})
        os.environ['GOOGLE_APPLICATION_CREDENTIALS'] = str(self.tmp / 'sdk/right.json')
        self.works()
        os.environ['GOOGLE_APPLICATION_CREDENTIALS'] = str(self.tmp / 'sdk/gone.json')
        self.assertIn('cannot read the Google credentials: No such file or directory; check google_credentials and '
                      '$GOOGLE_APPLICATION_CREDENTIALS', self.etc('ls', '-r', status=1)[1])
        self.settings['google_credentials'] = str(self.tmp / 'sdk/right.json')
        self.works()

    def test_what_cannot_be_used(self):
        unknown = "does not know credentials of type '.*' in|key.json cannot be used: "  # the latter with Google's library
        for info, problem in (
                ([], 'holds no Google credentials;'), ({}, 'holds no Google credentials;'), ('x', 'holds no Google credentials;'),
                ({'type': 'authorized_user'}, "cannot be used: 'client_id' is missing or wrong"),
                ({'type': 'service_account'}, "cannot be used: 'client_email' is missing or wrong"),
                ({'type': 'external_account'}, unknown),
                ({'type': 'impersonated_service_account', 'source_credentials': 5}, 'cannot be used: a value has the wrong type or form'),
                ({'type': 'external_account', 'credential_source': {'executable': {'command': 'x'}}},
                 unknown),
                ({'type': 'external_account', 'audience': 'a', 'subject_token_type': 't', 'token_url': self.tokens.url,
                  'credential_source': {'environment_id': 'aws1', 'url': self.tokens.url}},
                 unknown),
                ({'type': '\x1b[31m'}, unknown)):
            with self.subTest(info):
                self.use(info)
                err = self.etc('ls', '-r', status=1)[1]
                self.assertRegex(err, problem)
                self.assertIn('key.json', err)
                self.assertNotIn('\x1b', err)

    def test_nothing_is_sent_elsewhere(self):
        self.use(self.user())
        other = Server(GsHandler)
        self.addCleanup(other.stop)
        other.cuts, other.token = [], None

        def respond(handler, form):
            return {'access_token': 'ya29.token', 'expires_in': 3600}
        self.tokens.respond = respond
        self.server.fault = lambda h: h.command == 'POST' and (h.answer(200, b'', {'Location': other.url + '/session?upload_id=1'}), True)[1]
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}), 'X')
        self.assertIn('answers 404', self.etc('push', 'X', status=1)[1])
        self.assertTrue(other.log)
        self.assertEqual([h.get('Authorization') for _, _, h in other.log], [None] * len(other.log))


class WebHandler(http.server.SimpleHTTPRequestHandler):
    """`python3 -m http.server`, which gives no ranges; or as a server that does."""

    def log_message(self, *args):
        pass

    def handle_one(self):
        self.server.log.append((self.command, self.path, self.headers))
        if self.server.fault and self.server.fault(self):
            return
        path = Path(self.translate_path(self.path))
        if not self.server.ranges or not path.is_file():
            return super().do_GET() if self.command == 'GET' else super().do_HEAD()
        data = path.read_bytes()
        self.headers_sent = {'ETag': '"%s"' % hashlib.sha1(data).hexdigest()}
        if self.server.conditions and self.headers.get('If-Match', self.headers_sent['ETag']) != self.headers_sent['ETag']:
            self.headers_sent, data, status = {}, b'', 412
        elif 'Range' in self.headers:
            start, stop = asked_range(self.headers, len(data))
            self.headers_sent['Content-Range'] = 'bytes %d-%d/%d' % (start, stop - 1, len(data))
            data, status = data[start:stop], 206
        else:
            status = 200
        self.answer(status, data)

    def answer(self, status, data=b'', **headers):
        self.send_response(status)
        for key, value in dict(headers, **getattr(self, 'headers_sent', {})).items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)
            self.server.sent += len(data)

    do_GET = do_HEAD = handle_one

    def translate_path(self, path):
        path = super().translate_path(path)
        return os.path.join(self.server.root, os.path.relpath(path, os.getcwd()))


class WebSuite:
    """What was pushed into a directory is read by its web address. Subclasses start(), and set `url`."""
    path = '/data sets/\u00e9'

    def setUp(self):
        super().setUp()
        self.share = self.tmp / ('www' + self.path)
        self.share.mkdir(parents=True)
        self.file_url = self.share.as_uri()
        self.start()
        self.etc('register', write(small(self.tmp / 'ds'), {'data/train/large': noise(9 * MIB)}), 'X')
        self.etc('push', 'X', url=self.file_url)

    def test_round_trip(self):
        self.etc('register', odd(self.tmp / 'odd'), 'Odd')
        self.etc('push', 'Odd', url=self.file_url)
        write(self.share, {'other.txt': 'x', 'not a dataset.tgz': 'x', 'sub/Inner.tgz': 'x', 'foreign.tgz': ''})
        with tarfile.open(str(self.share / 'foreign.tgz'), 'w:gz') as tar:
            tar.add(str(self.tmp / 'ds'), '.')
        self.assertEqual(self.etc('ls', '-r')[0], 'Odd\nX\nforeign\n')
        self.assertIn(etc.Dataset(self.tmp / 'odd').digest, self.etc('ls', '-r', '-l')[0])
        self.etc('pull', 'X', 'Odd', 'foreign', home='two')
        for name, root in (('X', 'ds'), ('Odd', 'odd'), ('foreign', 'ds')):
            with self.subTest(name):
                self.assertEqual(tree(self.tmp / 'two' / name), tree(self.tmp / root))
        self.etc('verify', 'X', 'Odd', home='two')
        self.etc('pull', '-p', 'test', 'X', home='three')
        self.assertEqual(etc.Dataset(self.tmp / 'three/X').keys(), {'test'})
        self.etc('pull', 'X', home='three')
        self.assertEqual(tree(self.tmp / 'three/X'), tree(self.tmp / 'ds'))
        found = etc.info('X', remote=True, config=self.config('fresh'))
        self.assertEqual((found['meta'], found['readme']), ({'classes': 10}, '# Small\n'))
        self.assertIn("did you mean 'Odd'", self.etc('pull', 'Odds', status=1)[1])

    def test_read_only(self):
        write(self.tmp / 'ds', {'data/train/new': ''})
        before = tree(self.share)
        self.assertIn('can only be read; to push or purge, set a url', self.etc('push', '-f', 'X', status=1)[1])
        for name in ('X', 'Nope'):
            self.assertRegex(self.etc('purge', '-r', '-f', name, status=1)[1],
                             r'\Aetc: https?://[^\n]+ can only be read; to push or purge, set a url that begins with s3://, gs:// or file://\n\Z')
        self.assertIn("another 'X' is in", self.etc('push', 'X', status=1)[1])
        self.etc('register', self.tmp / 'ds', 'Y')
        self.assertIn('can only be read; to push or purge, set a url', self.etc('push', 'Y', status=1)[1])
        self.assertEqual(tree(self.share), before)


class Web(WebSuite, Case):
    def start(self):
        self.server = Server(WebHandler)
        self.addCleanup(self.server.stop)
        self.server.root, self.server.ranges = str(self.tmp / 'www'), True
        self.url = self.server.url + self.path

    def test_partial_pull_reads_little(self):
        self.server.sent = 0
        self.etc('pull', '-p', 'test', 'X', home='two')
        self.etc('info', '-r', 'X')
        self.assertLess(self.server.sent, MIB)

    def test_replaced_while_read(self):
        for self.server.ranges, self.server.conditions in ((True, True), (True, False), (False, False)):
            with self.subTest(ranges=self.server.ranges, conditions=self.server.conditions):
                del self.server.log[:]
                with contextlib.closing(etc._open_remote(self.config())) as store:
                    found = store.stat('X')
                    self.assertEqual(len(store.read(found, 5, 50)), 45)
                with contextlib.closing(etc._open_remote(self.config())) as store:
                    data = (self.share / 'X.tgz').read_bytes()
                    (self.share / 'X.tgz').write_bytes(data + b'x')
                    os.utime(str(self.share / 'X.tgz'), (5, 5))
                    with self.assertRaises(etc.RemoteError) as caught:
                        store.read(found, 5, 50)
                    self.assertIn('replaced', str(caught.exception))
                self.assertEqual(self.server.log[-1][2]['If-Match'], found.version if self.server.ranges else None)

    def test_without_ranges(self):
        self.server.ranges = False
        self.test_round_trip()
        del self.server.log[:]
        self.assertIn('supports no ranges', self.etc('pull', 'X', home='four')[1])
        self.assertEqual([m for m, _, _ in self.server.log], ['GET', 'HEAD', 'GET', 'GET'])

    def test_cut_download(self):
        self.server.ranges = False
        cuts = []

        def fault(handler):
            if handler.command == 'GET' and not handler.headers.get('Range') and len(cuts) < 2:
                cuts.append(1)
                handler.send_response(200)
                handler.send_header('Content-Length', str(os.path.getsize(str(self.share / 'X.tgz'))))
                handler.send_header('Last-Modified', handler.date_time_string(os.path.getmtime(str(self.share / 'X.tgz'))))
                handler.end_headers()
                handler.wfile.write(b'x' * MIB)
                handler.close_connection = True
                return True
        self.server.fault = fault
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
        self.assertEqual(len(cuts), 2)

    def test_indexes(self):
        """As Apache, nginx and lighttpd write them, and worse."""
        (self.share / 'Y.tgz').write_bytes(b'x')
        here = urllib.parse.quote(self.path)
        for page in ('<?xml version="1.0"?><!DOCTYPE html><a href="X.tgz"></a><a href="Y.tgz">',
                     '<tr><td><a href="?C=N;O=D">Name</a><td><a href="X.tgz">X.tgz</a> 9M</tr><A HREF="%s/Y.tgz">Y' % here,
                     '<html><body>\r\n<h1>Index of</h1><hr><pre><a href="../">../</a>\r\n<a href="X.tgz">X.tgz</a> 1-Jan-2024 9\r\n'
                     '<a href="./Y.tgz">Y</a>', '<a href=X.tgz><a name="Z.tgz"><a href="http://[x"><a href><![x[<a href="%s/Y.tgz">' % self.url,
                     '<a href="X.tgz"><a href="Y%2etgz"><a href="/Y.tgz"><a href="http://else.example/Y.tgz"><a href="sub/Y.tgz">'
                     '<a href="-Y.tgz"><a href="X.tgz?x"><a href="X.tgz">'):
            with self.subTest(page):
                self.server.fault = lambda h: h.path.endswith('/') and (h.answer(200, page.encode()), True)[1]
                names = self.etc('ls', '-r')[0].split()
                self.assertEqual(names, ['X'] if '<![' in page else ['X', 'Y'], page)
        self.server.fault = lambda h: h.path.endswith('/') and (h.answer(200, b'<p>Welcome!'), True)[1]
        self.assertEqual(self.etc('ls', '-r')[0], '')

    def test_redirects(self):
        other = Server(WebHandler)
        self.addCleanup(other.stop)
        other.root, other.ranges = self.server.root, True
        self.server.fault = lambda h: (h.answer(302, Location=other.url + h.path), True)[1]
        self.etc('pull', 'X', home='two')
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.server.fault = lambda h: (h.answer(302, Location=h.path), True)[1]
        self.assertIn('answers 302', self.etc('ls', '-r', status=1)[1])
        self.server.fault = lambda h: (h.answer(302, Location='file:///etc/passwd'), True)[1]
        self.assertIn('answers 302', self.etc('ls', '-r', status=1)[1])

    def test_head_that_tells_nothing(self):
        """Where GET with a range works."""
        self.etc('register', small(self.tmp / 'small'), 'Y')
        self.etc('push', 'Y', url=self.file_url)

        def refuse(handler):
            if handler.command == 'HEAD':
                handler.answer(status)
                return True

        def redirect(handler):
            if handler.path.endswith('.tgz'):
                handler.answer(307, Location=handler.path + '?signed-for=' + 'GET')
                return True
            return 'signed-for=GET' in handler.path and refuse(handler)

        def keep_silent(handler):
            if handler.command == 'HEAD':
                handler.send_response(200)
                handler.end_headers()
                return True

        for what, status, fault in (('forbidden', 403, refuse), ('not allowed', 405, refuse), ('not implemented', 501, refuse),
                                    ('a signed redirect', 403, redirect), ('bad request', 400, refuse), ('no length', 200, keep_silent)):
            with self.subTest(what):
                self.server.fault = fault
                self.etc('pull', 'X', 'Y', home='two')
                self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
                self.etc('purge', 'X', 'Y', home='two')
                self.assertEqual(self.etc('ls', '-r')[0], 'X\nY\n')
                self.assertIn("no dataset 'Z'", self.etc('pull', 'Z', status=1)[1] if what != 'no length' else "no dataset 'Z'")
        status, self.server.fault = 403, lambda handler: handler.path.endswith('.tgz') and (handler.answer(403), True)[1]
        self.assertIn('answers 403', self.etc('pull', 'X', home='two', status=1)[1])

        def foreign_range(handler):  # by which the size cannot be known
            if handler.command == 'GET' and handler.path.endswith('.tgz'):
                handler.answer(206, b'x', **{'Content-Range': 'bytes 0-0/*'})
                return True
            return refuse(handler)
        self.server.fault = foreign_range
        self.assertIn("does not say how large 'X' is", self.etc('pull', 'X', home='two', status=1)[1])

    def test_empty_file_where_head_is_refused(self):
        (self.share / 'Z.tgz').write_bytes(b'')

        def fault(handler):
            if handler.command == 'HEAD':
                handler.answer(405)
                return True
            if handler.headers.get('Range'):
                handler.answer(416, b'out of range', **{'Content-Range': 'bytes */0'})
                return True
        self.server.fault = fault
        self.assertIn('the archive is damaged or not a .tgz: it ends too early', self.etc('pull', 'Z', status=1)[1])

    def test_answers_made_to_confuse(self):
        for location in ('http://[', 'http://[1/x', '//[x]/', 'http://[::::]/'):
            with self.subTest(location):
                self.server.fault = lambda handler: (handler.answer(302, Location=location), True)[1]
                err = self.etc('pull', 'X', home='two', status=1)[1]
                self.assertRegex(err, 'answers 302;|does not have the form https://host')  # as Python reads it
        self.server.fault = lambda handler: handler.path.endswith('/') and (
            handler.answer(200, b'<a href="X.tgz"><a href="&#%s;">' % (b'1' * 5000)), True)[1]
        self.etc('ls', '-r')
        for body in (b'<?xml version="1.0" encoding="foo"?><ListBucketResult/>', b'<?xml version="1.0" encoding="hex"?><ListBucketResult/>',
                     b'<ListBucketResult>' + b'<a>' * 100000 + b'</a>' * 100000 + b'</ListBucketResult>'):
            with self.subTest(body[:60]):
                self.server.fault = lambda handler: handler.path.endswith('/') and (handler.answer(200, body), True)[1]
                self.assertIn('shows no list of what it has (200);', self.etc('ls', '-r', status=1)[1])
        self.server.fault = None
        for modified in ('01 Jan , 00:00:00', 'x', 'Mon, 99 Foo 2024 07:08:09 GMT'):
            with self.subTest(modified):
                self.server.fault = lambda handler: handler.command == 'HEAD' and (handler.answer(200, b'12345', **{
                    'Last-Modified': modified}), True)[1]
                with contextlib.closing(etc._open_remote(self.config())) as store:
                    self.assertEqual((store.stat('X').size, store.stat('X').modified), (5, 0.0))

    def test_compressed_against_the_request(self):
        def fault(handler):
            if handler.path.endswith(suffix):
                path = Path(handler.translate_path(handler.path))
                body = gzip.compress(path.read_bytes() if path.is_file() else b'<a href="X.tgz">X</a>')
                handler.answer(200, body, **{'Content-Encoding': 'gzip', 'ETag': 'W/"x"'})
                return True
        self.server.fault, suffix = fault, '/'
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.etc('pull', 'X', home='two')
        suffix = '.tgz'
        self.server.fault = lambda handler: handler.command == 'GET' and fault(handler)
        self.assertIn("compresses 'X' although it is asked not to; ask who runs it", self.etc('pull', 'X', home='three', status=1)[1])

    def test_compressed_without_another_version(self):
        """By a server that supports no ranges: the same time of change, but other bytes."""
        def fault(handler):
            path = Path(handler.translate_path(handler.path))
            if handler.command in ('GET', 'HEAD') and path.suffix == '.tgz':
                body, headers = path.read_bytes(), {'Last-Modified': handler.date_time_string(int(path.stat().st_mtime))}
                if handler.command == 'GET':
                    body = gzip.compress(body)
                    headers['Content-Encoding'] = 'gzip'
                handler.answer(200, body, **headers)
                return True
        self.server.fault = fault
        self.assertIn("compresses 'X' although it is asked not to", self.etc('pull', 'X', home='two', status=1)[1])


class Rfc9110(S3Case):
    """Answers that are rare, but right by RFC 9110."""

    def setUp(self):
        super().setUp()
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB), 'data/test/y': 'y', 'README.md': '# Hi'}), 'X')

    def round_trip(self):
        self.etc('push', '-f', 'X')
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.assertIn('# Hi', self.etc('info', '-r', 'X')[0])
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
        self.etc('purge', 'X', home='two')

    def slept(self):
        """The seconds of all calls of sleep() from now on, which do not wait."""
        slept = []
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = slept.append
        return slept

    def test_interim_answers(self):
        hints = b'HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nContent-Length: 5\r\n\r\n'
        for what, interim in (('100', b'HTTP/1.1 100 Continue\r\n\r\n'), ('102', b'HTTP/1.1 102 Processing\r\n\r\n'),
                              ('103', hints), ('several', hints + b'HTTP/1.1 100 Continue\r\n\r\n' + hints * 3)):
            with self.subTest(what):
                self.server.fault = lambda handler: handler.wfile.write(interim) and None
                self.server.connections.clear()
                self.etc('push', '-f', 'X')
                self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
                self.assertLess(len(self.server.connections), 15)  # so connections were used again
                self.round_trip()

    def test_interim_answers_without_end(self):
        self.slept()

        def flood(handler):
            with contextlib.suppress(OSError):
                for _ in range(10000):
                    handler.wfile.write(b'HTTP/1.1 102 Processing\r\n\r\n')
            handler.close_connection = True
            return True
        self.server.fault = flood
        self.assertIn('interim answers', self.etc('ls', '-r', status=1)[1])

    def test_spelling_of_ranges(self):
        for what, change in (('size not told', lambda span: span.rpartition('/')[0] + '/*'), ('unit', lambda span: 'B' + span[1:]),
                             ('both', lambda span: 'BYTES' + span[5:].rpartition('/')[0] + '/*')):
            with self.subTest(what):
                self.server.respell = lambda key, value: change(value) if key == 'Content-Range' else value
                self.round_trip()
        for what, change in (('other unit', lambda span: 'lines' + span[5:]), ('another start', lambda span: 'bytes 7' + span[7:]),
                             ('another size', lambda span: span + '0'), ('no number', lambda span: 'bytes x-y/z'),
                             ('unsatisfied', lambda span: 'bytes */' + span.rpartition('/')[2])):
            with self.subTest(what):
                self.server.respell = lambda key, value: change(value) if key == 'Content-Range' else value
                self.assertIn('range that was asked for', self.etc('pull', 'X', home='two', status=1)[1])

    def test_retry_after(self):
        slept = self.slept()
        now = time.time()
        for what, status, headers, least, most in (
                ('seconds', 429, {'Retry-After': '7'}, 7, 9), ('seconds', 503, {'Retry-After': '30'}, 30, 32),
                ('a time', 503, {'Retry-After': email.utils.formatdate(now + 20, usegmt=True)}, 15, 22),
                ('a time, by the clock of the server', 503, {'Retry-After': 'Mon, 06 May 2024 07:08:29 GMT',
                                                             'X-Date': 'Mon, 06 May 2024 07:08:09 GMT'}, 20, 22),
                ('a time that has passed', 503, {'Retry-After': 'Mon, 06 May 2024 07:08:09 GMT'}, 0, 2),
                ('beyond reason', 429, {'Retry-After': '999999999'}, 60, 62), ('negative', 429, {'Retry-After': '-9'}, 0, 2),
                ('nonsense', 429, {'Retry-After': 'soon'}, 0, 2), ('nothing', 429, {}, 0, 2)):
            with self.subTest(what, status=status):
                del slept[:]
                pending = [True]
                date = headers.pop('X-Date', None)
                self.server.respell = lambda key, value: date if date and key == 'Date' else value

                def busy(handler):
                    if pending:
                        pending.pop()
                        handler.answer(status, b'', headers)
                        return True
                self.server.fault = busy
                self.etc('ls', '-r')
                self.assertTrue(least <= sum(slept) <= most and max(slept) <= 1, slept)

    def test_pages_that_are_compressed_against_the_request(self):
        class Compressing(S3Handler):
            encoding = 'gzip'

            def answer(self, status, body=b'', headers=(), length=None):
                if body and 'Content-Range' not in dict(headers) and self.command == 'GET':
                    packer = zlib.compressobj(6, zlib.DEFLATED, 31 if 'gzip' in self.encoding else 15)
                    body, headers = packer.compress(body) + packer.flush(), dict(headers, **{'Content-Encoding': self.encoding})
                super().answer(status, body, headers, length)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = S3Handler.handle_one

        self.server.RequestHandlerClass = Compressing
        for Compressing.encoding in ('gzip', 'X-GZIP', 'deflate'):
            with self.subTest(Compressing.encoding):
                self.round_trip()
                self.assertIn("no dataset 'Y'", self.etc('pull', 'Y', status=1)[1])
                self.assertIn('NoSuchBucket: about NoSuchBucket', self.etc('ls', '-r', url='s3://other', status=1)[1])


class WebBucket(S3Case):
    """A public bucket by its web address."""

    def setUp(self):
        super().setUp()
        self.share(small(self.tmp / 'ds'))
        self.settings = {}
        self.addCleanup(setattr, S3Handler, 'unsigned', S3Handler.unsigned)
        S3Handler.unsigned = lambda handler, body: handler.headers['Authorization'] and 'AccessDenied'

    def reads(self, url):
        self.assertEqual(self.etc('ls', '-r', url=url)[0], 'X\n')
        self.etc('pull', '-f', 'X', home='two', url=url)

    def test_bucket_in_the_path(self):
        self.reads(self.server.url + '/bucket/some/prefix')
        self.server.objects = {'X.tgz': self.server.objects['some/prefix/X.tgz']}
        self.reads(self.server.url + '/bucket')
        self.reads(self.server.url + '/bucket/')

    def test_bucket_in_the_host(self):
        def fault(handler):
            handler.path = '/bucket' + handler.path
        self.server.fault = fault
        self.reads(self.server.url + '/some/prefix')
        self.server.objects = {'X.tgz': self.server.objects['some/prefix/X.tgz']}
        self.reads(self.server.url)


def serve(*command, conf=None, **env):
    """Start a peer's server with a free port in place of PORT; its process and URL, when it answers.

    conf: a directory, and a text (with PORT) that is written there to the file CONF.
    """
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    if conf:
        path = os.path.join(conf[0], 'server.conf')
        write(conf[0], {'server.conf': conf[1].replace('PORT', str(port))})
        command = [path if part == 'CONF' else part for part in command]
    command = [str(part).replace('PORT', str(port)) for part in command]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, **env))
    deadline = time.time() + 60
    while time.time() < deadline:
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return process, 'http://127.0.0.1:%d' % port
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.05)
    process.kill()
    raise AssertionError('%s does not start' % command[0])


def tool(name):
    beside = os.path.join(os.path.dirname(sys.executable), name)
    return beside if os.path.exists(beside) else shutil.which(name)


@needs(all(map(tool, ('nginx', 'tinyproxy', 'openssl'))), 'nginx, tinyproxy and openssl are not installed')
class Nginx(WebSuite, Case):
    """nginx over TLS, with a certificate of a private CA (and without the newer extensions), behind a proxy (tinyproxy)."""

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix='etc-nginx-')

        def openssl(*args):
            subprocess.check_output(['openssl'] + list(args), stderr=subprocess.STDOUT, cwd=cls.root)
        new = ['-newkey', 'rsa:2048', '-nodes', '-days', '9']
        openssl('req', '-x509', '-subj', '/CN=A private CA', '-keyout', 'ca.key', '-out', 'ca.pem', *new)
        openssl('req', '-subj', '/CN=data', '-keyout', 'key.pem', '-out', 'request.pem', *new[:3])
        write(cls.root, {'names': 'subjectAltName = DNS:localhost, IP:127.0.0.1'})
        openssl('x509', '-req', '-in', 'request.pem', '-CA', 'ca.pem', '-CAkey', 'ca.key', '-CAcreateserial', '-days', '9',
                '-extfile', 'names', '-out', 'cert.pem')
        cls.log = os.path.join(cls.root, 'proxy.log')
        cls.proxy, cls.proxy_url = serve(tool('tinyproxy'), '-d', '-c', 'CONF', conf=(
            cls.root, 'Port PORT\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout 60\nMaxClients 50\nLogLevel Connect\nLogFile "%s"\n' % cls.log))

    @classmethod
    def tearDownClass(cls):
        cls.proxy.kill()
        cls.proxy.wait()
        shutil.rmtree(cls.root)

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
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.assertIn('CONNECT ' + self.origin, Path(self.log).read_text())
        self.assertIn('without encryption', self.etc('ls', '-r', url='https://%s/away' % self.origin, status=1)[1])
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        del self.settings['ca_bundle']
        err = self.etc('pull', 'X', home='two', status=1)[1]
        self.assertRegex(err, "certificate that is not trusted.*; if a private CA signed it, set 'ca_bundle'")
        self.settings['ca_bundle'] = os.path.join(self.root, 'ca.pem')
        with socket.socket() as closed:
            closed.bind(('127.0.0.1', 0))
            os.environ['HTTPS_PROXY'] = 'http://127.0.0.1:%d' % closed.getsockname()[1]
            self.assertIn('check the network, the proxy settings', self.etc('pull', 'X', home='two', status=1)[1])
        self.assertEqual(self.installed('two'), [])


@needs(tool('rclone') and importable('boto3'), 'rclone and boto3 are not installed')
class Rclone(RemoteSuite, Case):
    """rclone serve s3: checks signatures, ignores conditions (so we look ourselves), answers 200 to ranges."""
    atomic = conditional_delete = copies = False
    akid, secret = AKID, SECRET

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix='etc-rclone-')
        os.mkdir(os.path.join(cls.root, 'bucket'))
        cls.process, cls.endpoint = serve(tool('rclone'), 'serve', 's3', '--addr', '127.0.0.1:PORT', '--auth-key',
                                          AKID + ',' + SECRET, '--config', os.devnull, cls.root)

    @classmethod
    def tearDownClass(cls):
        cls.process.kill()
        cls.process.wait()
        shutil.rmtree(cls.root)

    def setUp(self):
        super().setUp()
        self.prefix = os.urandom(4).hex()
        self.url = 's3://bucket/' + self.prefix
        self.settings = {'endpoint_url': self.endpoint, 'aws_access_key_id': self.akid, 'aws_secret_access_key': self.secret}

    def client(self):
        import boto3
        import botocore.config
        return boto3.client('s3', endpoint_url=self.endpoint, aws_access_key_id=self.akid, aws_secret_access_key=self.secret,
                            region_name='us-east-1', config=botocore.config.Config(
                                s3={'addressing_style': 'path'}, request_checksum_calculation='when_required'))

    def put(self, name, data):
        self.client().put_object(Bucket='bucket', Key=self.prefix + '/' + name, Body=data)

    def test_boto3_reads_what_we_push(self):
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(20 * MIB)}))
        body = self.client().get_object(Bucket='bucket', Key=self.prefix + '/X.tgz')['Body'].read()
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            self.assertEqual(tar.extractfile('data/train/x').read(), noise(20 * MIB))

    def test_wrong_secret(self):
        self.settings['aws_secret_access_key'] = 'wrong'
        self.assertIn('SignatureDoesNotMatch', self.etc('ls', '-r', status=1)[1])


@needs(importable('moto', 'flask', 'boto3'), 'moto[server] and boto3 are not installed')
class Moto(Rclone):
    """moto_server: knows conditions, checks no signature."""
    conditional_delete = copies = True

    @classmethod
    def setUpClass(cls):
        cls.process, cls.endpoint = serve(tool('moto_server'), '-H', '127.0.0.1', '-p', 'PORT')

    @classmethod
    def tearDownClass(cls):
        cls.process.kill()
        cls.process.wait()

    def setUp(self):
        super().setUp()
        self.client().create_bucket(Bucket='bucket')

    def test_wrong_secret(self):
        pass

    def test_no_upload_is_left(self):
        root = write(self.tmp / 'ds', {'data/train/x': noise(20 * MIB)})
        self.etc('register', '--copy', root, 'X')
        self.etc('push', 'X')
        self.assertIn("'X': expected digest sha256:333", self.etc('push', '-f', 'X@sha256:' + '3' * 64, status=1)[1])
        uploads = self.client().list_multipart_uploads(Bucket='bucket', Prefix=self.prefix).get('Uploads', [])
        self.assertEqual(uploads, [])

    def test_purge_from_a_bucket_with_versions(self):
        self.url = 's3://versions'
        self.client().create_bucket(Bucket='versions')
        self.client().put_bucket_versioning(Bucket='versions', VersioningConfiguration={'Status': 'Enabled'})
        self.share(small(self.tmp / 'ds'))
        self.assertEqual(self.etc('purge', '-r', '-f', 'X')[1], "etc: purged 'X' from s3://versions, which keeps it as an old version\n")
        self.assertEqual(etc.ls(True, self.config()), [])
        self.assertEqual(len(self.client().list_object_versions(Bucket='versions')['Versions']), 1)

    def test_public(self):
        self.settings['public'] = True
        self.share(small(self.tmp / 'ds'))
        grants = self.client().get_object_acl(Bucket='bucket', Key=self.prefix + '/X.tgz')['Grants']
        self.assertIn('http://acs.amazonaws.com/groups/global/AllUsers', [g['Grantee'].get('URI') for g in grants])


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
    conf(kind, '[DEFAULT]\nswift_dir = %s\ndevices = %s/devices\nmount_check = false\n[app:main]\nuse = egg:swift#%s\n' % (
        root, root, 'mem_object' if kind == 'object' else kind))
filters = ['catch_errors', 'gatekeeper', 'listing_formats', 'bulk', 's3api', 'tempauth', 'slo', 'dlo']
conf('proxy', '[DEFAULT]\nswift_dir = %s\n[pipeline:main]\npipeline = %s proxy-server\n[app:proxy-server]\nuse = egg:swift#proxy\n'
     'account_autocreate = true\n' % (root, ' '.join(filters)) + ''.join('[filter:%s]\nuse = egg:swift#%s\n%s' % (
         name, name, 'user_%s = %s .admin\n' % (user.replace(':', '_'), secret) * (name == 'tempauth')) for name in filters))


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
class Swift(Rclone):
    """OpenStack Swift's S3 interface: checks signatures; it knows no conditions of writes, but says so."""
    akid = 'test:tester'
    copies = conditional_delete = True

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix='etc-swift-')
        script = os.path.join(cls.root, 'server.py')
        with open(script, 'w') as file:
            file.write(SWIFT)
        cls.process, cls.endpoint = serve('/usr/bin/python3', script, 'PORT', os.path.join(cls.root, 'swift'), cls.akid, SECRET)

    def setUp(self):
        super().setUp()
        if not self.client().list_buckets()['Buckets']:
            self.client().create_bucket(Bucket='bucket')


@needs(importable('boto3') and tool('s3rver'), 's3rver (npm) and boto3 are not installed')
class S3rver(Rclone):
    """A sloppy one: it checks no signature, knows no conditions, and misreads ranges that name only the last bytes."""
    copies = False
    akid = secret = 'S3RVER'

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix='etc-s3rver-')
        cls.process, cls.endpoint = serve(tool('s3rver'), '-d', cls.root, '-a', '127.0.0.1', '-p', 'PORT',
                                          '--configure-bucket', 'bucket')

    def test_wrong_secret(self):
        pass


@needs(importable('gcp_storage_emulator', 'google.cloud.storage'), 'gcp-storage-emulator, google-cloud-storage are not installed')
class GcpEmulator(RemoteSuite, Case):
    """gcp-storage-emulator, which knows no conditions, and Google's own client."""
    copies = conditions = conditional_delete = False

    @classmethod
    def setUpClass(cls):
        cls.process, cls.endpoint = serve(tool('gcp-storage-emulator'), 'start', '--host', '127.0.0.1', '--port', 'PORT',
                                          '--in-memory', '--default-bucket', 'bucket')

    @classmethod
    def tearDownClass(cls):
        cls.process.kill()
        cls.process.wait()

    def setUp(self):
        super().setUp()
        self.prefix = os.urandom(4).hex()
        self.url = 'gs://bucket/' + self.prefix
        os.environ['STORAGE_EMULATOR_HOST'] = self.endpoint

    def bucket(self):
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage
        return storage.Client(project='p', credentials=AnonymousCredentials()).bucket('bucket')

    def put(self, name, data):
        self.bucket().blob(self.prefix + '/' + name).upload_from_string(data)

    def test_replaced_while_read(self):
        pass  # it neither knows ifGenerationMatch nor says which generation it sends

    def test_official_client_reads_what_we_push(self):
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(20 * MIB)}))
        body = self.bucket().blob(self.prefix + '/X.tgz').download_as_bytes(raw_download=True)
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            self.assertEqual(tar.extractfile('data/train/x').read(), noise(20 * MIB))

    def test_we_pull_what_the_official_client_uploads(self):
        etc.register(small(self.tmp / 'ds'), 'X', config=self.config())
        etc.push('X', config=etc.Config((self.tmp / 'share').as_uri(), self.tmp / 'home'))
        self.bucket().blob(self.prefix + '/X.tgz').upload_from_filename(str(self.tmp / 'share/X.tgz'))
        self.assertEqual(tree(etc.pull('X', config=self.config('two')).root), tree(self.tmp / 'ds'))


class AwsHandler(SignedHandler):
    """STS, SSO's portal and its OIDC, a container's credentials service, and instance metadata of version 2.

    Every access key has the secret 'secret-of-KEY', and if it is temporary the token 'token/of+KEY'.
    """
    service = 'sts'

    def temporary(self, akid, token='SessionToken', milliseconds=False, lower=False):
        expires = time.time() + self.server.lifetime
        keys = {'AccessKeyId': akid, 'SecretAccessKey': 'secret-of-' + akid, token: 'token/of+' + akid, 'Expiration': (
            int(expires * 1000) if milliseconds else time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(expires)))}
        return {k[0].lower() + k[1:]: v for k, v in keys.items()} if lower else keys

    def handle_one(self):
        body = self.read_body()
        path, _, query = self.path.partition('?')
        self.server.log.append((self.command, path, self.headers))
        if self.server.fault and self.server.fault(self):
            return
        if path == '/':
            return self.sts(body, dict(urllib.parse.parse_qsl(body.decode())))
        if path == '/federation/credentials':
            if self.headers['x-amz-sso_bearer_token'] != 'sso-token':
                return self.json({'message': 'Session token not found or invalid'}, 401)
            query = dict(urllib.parse.parse_qsl(query))
            return self.json({'roleCredentials': self.temporary(
                'SSO-%s-%s' % (query['account_id'], query['role_name']), milliseconds=True, lower=True)})
        if path == '/token':
            form = json.loads(body.decode())
            right = {'grantType': 'refresh_token', 'clientId': 'i', 'clientSecret': 'client-secret', 'refreshToken': 'refresh'}
            if form != right:
                return self.json({'error': 'invalid_grant'}, 400)
            return self.json({'accessToken': 'sso-token', 'expiresIn': 3600, 'refreshToken': 'next', 'tokenType': 'Bearer'})
        if path == '/container':
            if self.headers.get('Authorization') != self.server.authorization:
                return self.json({'message': 'wrong authorization'}, 401)
            return self.json(self.temporary('CONTAINER', 'Token'))
        if path == '/latest/api/token':
            if self.command != 'PUT' or not self.headers['x-aws-ec2-metadata-token-ttl-seconds']:
                return self.answer(400)
            return self.answer(200, b'imds-token')
        if path.startswith('/latest/meta-data/iam/security-credentials/'):
            if self.headers.get('X-aws-ec2-metadata-token', 'imds-token' * self.server.version_1) != 'imds-token':
                return self.answer(401)
            if path.endswith('/'):
                return self.answer(200, b'my-role')
            role = path.rpartition('/')[2] + '2' * self.server.rotated
            return self.json(dict(self.temporary('INSTANCE-' + role, 'Token'), Code='Success'))
        self.answer(404)

    def sts(self, body, form):
        form['RoleArn'] = form['RoleArn'].rpartition('/')[2]
        if form['Action'] == 'AssumeRoleWithWebIdentity':
            problem, akid = form['WebIdentityToken'] != 'web-token' and 'InvalidIdentityToken', 'WEB-' + form['RoleArn']
        else:
            problem = self.unsigned(body)
            caller = self.headers['Authorization'].partition('Credential=')[2].partition('/')[0]
            akid = '%s-by-%s' % (form['RoleArn'], caller)
            if form['RoleArn'] == 'picky' and (form.get('ExternalId'), form.get('DurationSeconds'), form['RoleSessionName']) != (
                    'x y&z', '900', 'me'):
                problem = 'AccessDenied'
            if form['RoleArn'] == 'forbidden':
                problem = 'AccessDenied'
        if problem:
            xml = '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>%s</Code>' \
                  '<Message>about %s</Message></Error></ErrorResponse>' % (problem, problem)
            return self.answer(403, xml.encode())
        xml = ''.join('<%s>%s</%s>' % (k, v, k) for k, v in self.temporary(akid).items())
        self.answer(200, ('<{0}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{0}Result><AssumedRoleUser><Arn>a</Arn>'
                          '</AssumedRoleUser><Credentials>{1}</Credentials></{0}Result></{0}Response>').format(
                              form['Action'], xml).encode())


class AnySecret(dict):
    def __missing__(self, akid):
        return 'secret-of-' + akid

    def __contains__(self, akid):
        return True


class AwsCase(S3Case):
    def setUp(self):
        super().setUp()
        self.settings = {'endpoint_url': self.server.url}
        self.aws = Server(AwsHandler)
        self.addCleanup(self.aws.stop)
        self.server.secrets = self.aws.secrets = AnySecret()
        self.aws.lifetime, self.aws.authorization, self.aws.version_1, self.aws.rotated = 3600, None, False, False
        self.cache = self.tmp / '.aws/sso/cache'
        os.environ.update(AWS_ENDPOINT_URL=self.aws.url, AWS_EC2_METADATA_SERVICE_ENDPOINT=self.aws.url,
                          AWS_DEFAULT_REGION='us-east-1')
        del os.environ['AWS_EC2_METADATA_DISABLED']

    def sso(self, start, **more):
        token = dict({'startUrl': 'https://corp', 'region': 'us-east-1', 'accessToken': 'sso-token',
                      'expiresAt': '2099-01-01T00:00:00Z'}, **more)
        name = hashlib.sha1(start.encode()).hexdigest() + '.json'
        write(self.cache, {name: json.dumps(token)})
        return self.cache / name

    def akid(self):
        """The access key that a listing is signed with; its signature and token are right."""
        del self.server.log[:]
        self.assertEqual(self.etc('ls', '-r')[0], '')
        headers = self.server.log[-1][2]
        akid = headers['Authorization'].partition('Credential=')[2].partition('/')[0]
        if not akid.startswith('STATIC'):
            self.assertEqual(headers['x-amz-security-token'], 'token/of+' + akid)
        return akid


def static(akid, **more):
    return ''.join('%s = %s\n' % item for item in dict(
        {'aws_access_key_id': akid, 'aws_secret_access_key': 'secret-of-' + akid}, **more).items())


ROLE = 'role_arn = arn:aws:iam::123456789012:role/'
PROCESS = "import json; print(json.dumps({'Version': 1, 'AccessKeyId': 'PROCESS', 'SecretAccessKey': 'secret-of-PROCESS', " \
          "'SessionToken': 'token/of+PROCESS', 'Expiration': '2099-01-01T00:00:00+02:00'}))"
INSTANCE = 'INSTANCE-my-role'


class AwsCredentials(AwsCase):
    """Where AWS's tools find credentials, and in which order."""

    def expect(self, akid, config='', credentials='', settings=(), **env):
        """The files and the environment ('{aws}' is the services' address) lead to this access key."""
        saved = dict(os.environ)
        self.settings = dict(settings, endpoint_url=self.server.url)
        for name, text in (('config', config), ('credentials', credentials)):
            write(self.tmp / '.aws', {name: text})
        os.environ.update({key: (value or '').replace('{aws}', self.aws.url) for key, value in env.items()})
        for key in [key for key, value in env.items() if value is None]:
            del os.environ[key]
        try:
            self.assertEqual(self.found(), akid, (config, credentials, settings, env))
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def found(self):
        return self.akid()

    def test_static(self):
        env = {'AWS_ACCESS_KEY_ID': 'STATIC-E', 'AWS_SECRET_ACCESS_KEY': 'secret-of-STATIC-E'}
        files = {'config': '[default]\n' + static('STATIC-D') + '[profile work]\n' + static('STATIC-W'),
                 'credentials': '[both]\n' + static('STATIC-B') + 'credential_process = false\n'}
        self.expect('STATIC-D', **files)
        self.expect('STATIC-W', AWS_PROFILE='work', **files)
        self.expect('STATIC-W', AWS_DEFAULT_PROFILE='work', **files)
        self.expect('STATIC-B', AWS_PROFILE='both', **files)
        self.expect('STATIC-W', settings={'aws_profile': 'work'}, AWS_PROFILE='both', **files)
        self.expect('STATIC-E', AWS_PROFILE='work', **dict(env, **files))
        self.expect('STATIC-W', settings={'aws_profile': 'work'}, **dict(env, **files))
        self.expect('STATIC-B', config='[profile both]\n' + static('STATIC-C') + 'region = eu-west-1\n',
                    credentials=files['credentials'], AWS_PROFILE='both')
        self.expect('STATIC-Q', config='[profile "a b"]\n' + static('STATIC-Q'), AWS_PROFILE='a b')
        self.expect('TEMP', AWS_ACCESS_KEY_ID='TEMP', AWS_SECRET_ACCESS_KEY='secret-of-TEMP', AWS_SESSION_TOKEN='token/of+TEMP')
        for name, text in (('else-config', files['config']), ('else-credentials', files['credentials'])):
            write(self.tmp, {name: text})
        self.expect('STATIC-B', AWS_PROFILE='both', AWS_CONFIG_FILE=str(self.tmp / 'else-config'),
                    AWS_SHARED_CREDENTIALS_FILE=str(self.tmp / 'else-credentials'))

    def test_roles(self):
        base = '[base]\n' + static('STATIC-B')
        self.expect('dev-by-STATIC-B', '[default]\nsource_profile = base\n' + ROLE + 'dev\n', base)
        self.expect('dev-by-STATIC-B', '[default]\nsource_profile = base\n' + ROLE + 'dev\n', base + '[default]\n' + static('STATIC'))
        self.expect('top-by-mid-by-STATIC-B', '[profile top]\nsource_profile = mid\n' + ROLE + 'top\n'
                    '[profile mid]\nsource_profile = base\n' + ROLE + 'mid\n', base, AWS_PROFILE='top')
        self.expect('dev-by-STATIC-S', '[profile self]\nsource_profile = self\n' + ROLE + 'dev\n' + static('STATIC-S'),
                    AWS_PROFILE='self')
        self.expect('top-by-STATIC-S', '[profile top]\nsource_profile = mid\n' + ROLE + 'top\n[profile mid]\n' + static('STATIC-S')
                    + 'source_profile = base\n' + ROLE + 'mid\n', base, AWS_PROFILE='top')
        self.expect('picky-by-STATIC-B', '[default]\nsource_profile = base\nexternal_id = x y&z\nduration_seconds = 900\n'
                    'role_session_name = me\n' + ROLE + 'picky\n', base)
        self.expect('dev-by-' + INSTANCE, '[default]\ncredential_source = Ec2InstanceMetadata\n' + ROLE + 'dev\n')
        self.expect('dev-by-CONTAINER', '[default]\ncredential_source = EcsContainer\n' + ROLE + 'dev\n',
                    AWS_CONTAINER_CREDENTIALS_FULL_URI='{aws}/container')
        self.expect('dev-by-PROCESS', '[default]\nsource_profile = p\n' + ROLE + 'dev\n[profile p]\ncredential_process = '
                    + self.process() + '\n')
        self.sso('https://corp')
        self.expect('dev-by-SSO-42-Reader', '[default]\nsource_profile = p\n' + ROLE + 'dev\n[profile p]\nsso_start_url = https://corp\n'
                    'sso_region = us-east-1\nsso_account_id = 42\nsso_role_name = Reader\n')

    def process(self):
        (self.tmp / 'process.py').write_text(PROCESS)
        return '"%s" "%s"' % (sys.executable, self.tmp / 'process.py')

    def test_environment_as_source(self):
        self.expect('dev-by-STATIC-E', '[profile x]\ncredential_source = Environment\n' + ROLE + 'dev\n',
                    settings={'aws_profile': 'x'}, AWS_ACCESS_KEY_ID='STATIC-E', AWS_SECRET_ACCESS_KEY='secret-of-STATIC-E')

    def test_web_identity(self):
        write(self.tmp, {'token': 'web-token'})
        env = {'AWS_WEB_IDENTITY_TOKEN_FILE': str(self.tmp / 'token'), 'AWS_ROLE_ARN': 'arn:aws:iam::1:role/pod'}
        profile = '[default]\nweb_identity_token_file = %s\n' % (self.tmp / 'token') + ROLE + 'prof\n'
        self.expect('WEB-pod', **env)
        self.expect('WEB-prof', profile)
        self.expect('WEB-pod', profile, '[default]\n' + static('STATIC'), **env)
        self.expect('dev-by-STATIC-B', '[default]\nsource_profile = base\n' + ROLE + 'dev\n', '[base]\n' + static('STATIC-B'), **env)
        self.expect('STATIC-W', '[profile work]\n' + static('STATIC-W'), settings={'aws_profile': 'work'}, **env)

    def test_sso(self):
        session = '[sso-session corp]\nsso_region = us-east-1\nsso_start_url = https://corp\n'
        profile = '[default]\nsso_account_id = 123\nsso_role_name = Reader\n'
        legacy = profile + 'sso_region = us-east-1\nsso_start_url = https://corp\n'
        self.sso('https://corp', expiresAt='2099-01-01T00:00:00UTC')
        self.expect('SSO-123-Reader', legacy)
        self.expect('SSO-123-Reader', legacy, '[default]\n' + static('STATIC'))
        (self.cache / (hashlib.sha1(b'https://corp').hexdigest() + '.json')).unlink()
        self.sso('corp')
        self.expect('SSO-123-Reader', session + profile + 'sso_session = corp\n')
        renewable = {'accessToken': 'old', 'refreshToken': 'refresh', 'clientId': 'i', 'clientSecret': 'client-secret',
                     'registrationExpiresAt': '2099-01-01T00:00:00Z'}
        for expires in (-9, 100):
            with self.subTest(expires=expires):
                renewable['expiresAt'] = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() + expires))
                path = self.sso('corp', **renewable)
                self.expect('SSO-123-Reader', session + profile + 'sso_session = corp\n')
        if os.name == 'posix':
            self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        kept = json.loads(path.read_text())
        self.assertEqual((kept['accessToken'], kept['refreshToken'], kept['clientSecret']), ('sso-token', 'next', 'client-secret'))
        self.assertGreater(kept['expiresAt'], '2026')
        self.assertEqual(os.listdir(str(self.cache)), [path.name])

    def test_process(self):
        self.expect('PROCESS', '[default]\ncredential_process = ' + self.process())
        self.expect('PROCESS', '[default]\ncredential_process = ' + self.process() + '\n' + static('STATIC'))
        self.expect('STATIC', '[default]\ncredential_process = ' + self.process(), '[default]\n' + static('STATIC'))

    def test_container(self):
        full = {'AWS_CONTAINER_CREDENTIALS_FULL_URI': '{aws}/container'}
        self.expect('CONTAINER', **full)
        self.expect('STATIC', '', '[default]\n' + static('STATIC'), **full)
        self.expect('CONTAINER', '[profile empty]\nregion = us-east-1\n', AWS_PROFILE='empty', **full)
        self.aws.authorization = 'Basic secret'
        self.expect('CONTAINER', AWS_CONTAINER_AUTHORIZATION_TOKEN='Basic secret', **full)
        write(self.tmp, {'token': 'Basic secret'})
        self.expect('CONTAINER', AWS_CONTAINER_AUTHORIZATION_TOKEN='wrong',
                    AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(self.tmp / 'token'), **full)

    def test_instance(self):
        self.expect(INSTANCE)
        self.expect(INSTANCE, settings={'aws_profile': 'x'}, config='[profile x]\nregion = us-east-1\n')
        self.expect(INSTANCE, '[default]\nec2_metadata_service_endpoint = %s\n' % self.aws.url, AWS_EC2_METADATA_SERVICE_ENDPOINT=None)


@needs(importable('botocore'), 'botocore is not installed')
class AwsCredentialsOracle(AwsCredentials):
    """The same, and each time botocore finds the same keys as we do."""

    def found(self):
        import botocore.credentials
        import botocore.session
        import botocore.tokens
        for provider in (botocore.credentials.SSOProvider, botocore.tokens.SSOTokenProvider):
            provider._SSO_TOKEN_CACHE_DIR = str(self.cache)  # they looked for $HOME when they were imported
        akid = self.akid()
        found = botocore.session.Session(profile=self.settings.get('aws_profile')).get_credentials().get_frozen_credentials()
        self.assertEqual((found.access_key, found.secret_key), (akid, 'secret-of-' + akid))
        return akid

    def test_hosts(self):
        """Of every region and partition that botocore knows."""
        import botocore.endpoint_provider
        import botocore.exceptions
        import botocore.session
        session = botocore.session.Session()
        loader = session.get_component('data_loader')
        partitions = loader.load_data('partitions')
        del os.environ['AWS_ENDPOINT_URL']
        seen = set()
        for service, params in (('s3', {'Bucket': 'bucket'}), ('s3', {'Bucket': 'my.bucket'}), ('s3', {'Bucket': 'Upper_1'}),
                                ('sts', {}), ('sso', {}), ('sso-oidc', {})):
            rules = botocore.endpoint_provider.EndpointProvider(
                loader.load_service_model(service, 'endpoint-rule-set-1'), partitions)
            for partition in session.get_available_partitions():
                for region in session.get_available_regions('s3', partition):
                    for fips, dual in ((False, False), (True, False), (False, True), (True, True)):
                        with self.subTest(service, region=region, fips=fips, dual=dual):
                            os.environ.update(AWS_USE_FIPS_ENDPOINT=str(fips).lower(), AWS_USE_DUALSTACK_ENDPOINT=str(dual).lower())
                            try:
                                theirs = rules.resolve_endpoint(Region=region, UseFIPS=fips, UseDualStack=dual, **params).url
                            except botocore.exceptions.EndpointProviderError:
                                continue
                            config = etc.Config('s3://' + params.get('Bucket', 'bucket'), region=region)
                            with contextlib.closing(etc._open_remote(config)) as store:
                                if service == 's3':
                                    self.assertEqual(store.address('', {}), theirs + '/')
                                elif not dual and 'global' not in region:
                                    name = {'sso': 'portal.sso', 'sso-oidc': 'oidc'}.get(service, service)
                                    self.assertEqual(store.profile.host(name, region), theirs)
                            seen.add(region)
        self.assertGreater(len(seen), 30)


class AwsLife(AwsCase):
    """How long credentials live, who may see them, and what is said when there are none."""

    def profile(self, text, name='default'):
        write(self.tmp, {'.aws/config': '[%s]\n%s\n' % (name, text)})

    def fails(self, *words):
        err = self.etc('ls', '-r', status=1)[1]
        for word in words:
            self.assertIn(word, err)
        for secret in ('secret', 'token/of', 'sso-token', 'web-token', 'refresh'):
            self.assertNotIn(secret, err.replace('aws_secret_access_key', ''))
        return err

    def shift(self, seconds):
        now = time.time
        self.addCleanup(setattr, etc.time, 'time', now)
        etc.time.time = lambda: now() + seconds

    def test_asked_once_and_renewed_before_they_expire(self):
        with contextlib.closing(etc._open_remote(self.config())) as store:
            threads = [threading.Thread(target=store.list) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(len(self.aws.log), 3)
            self.shift(3600 - 100)
            self.server.fault = lambda handler: (handler.answer(200, b'<ListBucketResult/>'), True)[1]  # its clock is ours
            store.list()
            self.assertEqual(len(self.aws.log), 6)
            store.list()
            self.assertEqual(len(self.aws.log), 6)

    def test_keys_that_are_given_out_shortly_before_they_expire(self):
        self.aws.lifetime = 60
        with contextlib.closing(etc._open_remote(self.config())) as store:
            store.list()
            store.list()
        self.assertEqual(len(self.aws.log), 3)

    def test_renewed_once_when_refused(self):
        def fault(handler):
            if 'my-role/' in handler.headers['Authorization']:
                self.aws.rotated = True
                handler.error(400, 'ExpiredToken')
                return True
        self.server.fault = fault
        self.assertEqual(self.akid(), INSTANCE + '2')
        self.assertEqual(len(self.aws.log), 6)
        self.aws.rotated = False
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.etc('push', 'X')  # it begins with a HEAD, whose answer does not say why
        self.assertEqual(self.aws.rotated, True)
        self.aws.rotated = False
        self.server.fault = lambda handler: (handler.error(400, 'ExpiredToken'), True)[1]
        del self.server.log[:]
        self.fails('ExpiredToken', "the instance's role 'my-role'")
        self.assertEqual(len(self.server.log), 1)

    def test_variables_in_the_paths_of_files(self):
        os.environ.update(PLACE=str(self.tmp / 'place'), AWS_CONFIG_FILE='$PLACE/config', AWS_PROFILE='p',
                          AWS_SHARED_CREDENTIALS_FILE='${PLACE}/$NAME.ini', NAME='mine')
        write(self.tmp / 'place', {'config': '[profile p]\nsource_profile = base\n' + ROLE + 'dev',
                                   'mine.ini': '[base]\n' + static('STATIC')})
        self.assertEqual(self.akid(), 'dev-by-STATIC')
        os.environ.update(AWS_CONFIG_FILE='$HOME/place/config', AWS_SHARED_CREDENTIALS_FILE='~/place/$NAME.ini')
        self.assertEqual(self.akid(), 'dev-by-STATIC')

    def test_byte_order_marks(self):
        bom = '\ufeff'
        write(self.tmp, {'.aws/credentials': bom + '[default]\n' + static('STATIC')})
        self.assertEqual(self.akid(), 'STATIC')
        write(self.tmp, {'.aws/credentials': '', 'process.py': PROCESS.replace('print(', 'print(chr(0xfeff) + ')})
        os.environ['PYTHONIOENCODING'] = 'utf-8'
        write(self.tmp, {'.aws/config': bom + '[default]\ncredential_process = "%s" "%s"\n' % (sys.executable, self.tmp / 'process.py')})
        self.assertEqual(self.akid(), 'PROCESS')
        self.profile('sso_session = corp\nsso_account_id = 123\nsso_role_name = Reader\n[sso-session corp]\n'
                     'sso_region = us-east-1\nsso_start_url = https://corp')
        path = self.sso('corp')
        path.write_bytes(bom.encode('utf-8') + path.read_bytes())
        self.assertEqual(self.akid(), 'SSO-123-Reader')
        write(self.tmp, {'.aws/config': '', 'token': bom + 'web-token\n'})
        os.environ.update(AWS_WEB_IDENTITY_TOKEN_FILE=str(self.tmp / 'token'), AWS_ROLE_ARN='arn:aws:iam::1:role/pod')
        self.assertEqual(self.akid(), 'WEB-pod')
        del os.environ['AWS_WEB_IDENTITY_TOKEN_FILE']
        self.aws.authorization = 'right'
        write(self.tmp, {'token': bom + 'right'})
        os.environ.update(AWS_CONTAINER_CREDENTIALS_FULL_URI=self.aws.url + '/container',
                          AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(self.tmp / 'token'))
        self.assertEqual(self.akid(), 'CONTAINER')

    def test_keys_that_are_changed_in_their_file(self):
        write(self.tmp, {'.aws/credentials': '[default]\n' + static('STATIC-OLD')})

        def fault(handler):
            write(self.tmp, {'.aws/credentials': '[default]\n' + static('STATIC-NEW')})
            if 'STATIC-OLD' in handler.headers['Authorization']:
                handler.error(400, 'ExpiredToken')
                return True
        self.server.fault = fault
        self.assertEqual(self.akid(), 'STATIC-NEW')

    def test_no_metadata(self):
        for what, answer in (('404', lambda h: h.answer(404)), ('405', lambda h: h.answer(405)),
                             ('a page', lambda h: h.answer(200, b'<html>\n</html>')), ('403', lambda h: h.answer(403))):
            with self.subTest(what):
                del self.aws.log[:]
                self.aws.version_1 = True
                self.aws.fault = lambda h, answer=answer: h.path.endswith('/api/token') and (answer(h), True)[1]
                self.fails('no credentials were found')
                self.assertEqual([method for method, _, _ in self.aws.log], ['PUT'], 'never version 1')
        self.aws.fault = lambda h: h.path.endswith('my-role') and (h.json({'Code': 'Failed', 'Message': 'x'}), True)[1]
        self.fails('no credentials were found')
        os.environ['AWS_EC2_METADATA_DISABLED'] = 'TRUE'
        del self.aws.log[:]
        self.fails('no credentials were found')
        self.assertEqual(self.aws.log, [])

    def test_silent_metadata(self):
        with socket.socket() as silent:
            silent.bind(('127.0.0.1', 0))
            silent.listen(5)
            os.environ['AWS_EC2_METADATA_SERVICE_ENDPOINT'] = 'http://127.0.0.1:%d' % silent.getsockname()[1]
            self.fails('no credentials were found')

    def test_metadata_is_not_asked_through_a_proxy(self):
        os.environ.update(http_proxy='http://127.0.0.1:1', no_proxy=self.server.url[7:])
        self.assertEqual(self.akid(), INSTANCE)
        os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI'] = self.aws.url + '/container'
        self.assertEqual(self.akid(), 'CONTAINER')

    def test_containers_that_are_not_trusted(self):
        os.environ['AWS_CONTAINER_AUTHORIZATION_TOKEN'] = 'secret'
        for url in ('http://example.com/x', 'http://169.254.170.3/', 'http://10.0.0.1/', 'ftp://localhost/', 'http://[::2]/',
                    'http://localhost.example.com', 'http://127.0.0.1@example.com/', 'nonsense', 'http://[x'):
            with self.subTest(url):
                os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI'] = url
                self.fails('must begin with https://, or with http:// and a loopback address')
        del os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI']
        for relative in ('@example.com/', '.example.com/'):
            with self.subTest(relative):
                os.environ['AWS_CONTAINER_CREDENTIALS_RELATIVE_URI'] = relative
                self.fails('RELATIVE_URI must be a path that begins with /')

    def test_containers_that_refuse(self):
        os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI'] = self.aws.url + '/container'
        self.aws.authorization = 'right'
        self.fails("container's credentials service answers 401: wrong authorization")
        os.environ['AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE'] = str(self.tmp / 'nowhere')
        self.fails('cannot read the file with a token that $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE names: No such file')
        os.environ['AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE'] = str(write(self.tmp, {'t': 'secret\r\nX: y'}) / 't')
        self.fails('$AWS_CONTAINER_AUTHORIZATION_TOKEN holds characters that it cannot have')
        self.aws.fault = lambda h: (h.json({'AccessKeyId': 'x', 'SecretAccessKey': 'secret\n'}), True)[1]
        del os.environ['AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE']
        self.fails("the container's credentials service returned no usable credentials")

    def test_roles_that_cannot_be(self):
        base = '\n[profile base]\n' + static('STATIC')
        self.profile('source_profile = base\n' + ROLE + 'forbidden' + base)
        self.fails("the AWS profile 'default': AWS STS answers 403 AccessDenied: about AccessDenied", 'role/forbidden')
        for what, profile, text in (
                ('no source', 'default', ROLE + 'x'), ('an unknown source', 'default', 'credential_source = Moon\n' + ROLE + 'x'),
                ('itself', 'default', 'source_profile = default\n' + ROLE + 'x'),
                ('a circle', 'a', 'source_profile = a\n' + ROLE + 'x\n[profile a]\nsource_profile = default\n' + ROLE + 'x'),
                ('two sources', 'default', 'source_profile = base\ncredential_source = Environment\n' + ROLE + 'x' + base)):
            with self.subTest(what):
                self.profile(text)
                self.fails("the AWS profile '%s' needs, besides role_arn, either a source_profile that does not lead back" % profile)
        self.profile('source_profile = nope\n' + ROLE + 'x')
        self.fails("the AWS profile that the source_profile of 'default' names is not in")
        self.profile('source_profile = a\n' + ROLE + 'x\n[profile a]\n')
        self.fails("'default' finds no credentials in a")

    def test_roles_by_a_wrong_clock(self):
        self.profile('source_profile = base\n' + ROLE + 'dev\n[profile base]\n' + static('STATIC'))
        now = time.time
        for name in ('server', 'aws'):
            getattr(self, name).fault = lambda h: abs(calendar.timegm(time.strptime(
                h.headers['x-amz-date'], '%Y%m%dT%H%M%SZ')) - now()) > 300 and (h.error(403, 'SignatureDoesNotMatch'), True)[1]
        self.addCleanup(setattr, Handler, 'date_time_string', Handler.date_time_string)
        Handler.date_time_string = lambda handler, timestamp=None: email.utils.formatdate(now(), usegmt=True)
        self.shift(5 * 3600)
        self.assertEqual(self.akid(), 'dev-by-STATIC')
        self.assertEqual((len(self.aws.log), len(self.server.log)), (2, 1))

    def test_web_identities_that_cannot_be(self):
        os.environ['AWS_WEB_IDENTITY_TOKEN_FILE'] = str(write(self.tmp, {'token': 'another'}) / 'token')
        self.fails('web identity is configured without a role; set role_arn or $AWS_ROLE_ARN')
        os.environ['AWS_ROLE_ARN'] = 'arn:aws:iam::1:role/pod'
        self.fails('web identity: AWS STS answers 403 InvalidIdentityToken')
        os.environ['AWS_WEB_IDENTITY_TOKEN_FILE'] += '-gone'
        self.fails('cannot read the file with a token that web_identity_token_file or $AWS_WEB_IDENTITY_TOKEN_FILE names')

    def test_logged_out(self):
        profile = 'sso_account_id = 123\nsso_role_name = Reader\nsso_region = us-east-1\nsso_start_url = https://corp\n'
        self.profile(profile, 'profile work')
        os.environ['AWS_PROFILE'] = 'work'
        login = "the AWS profile 'work' has no SSO login, or it has expired; run: aws sso login --profile work"
        self.fails(login)
        gone = {'expiresAt': '2020-01-01T00:00:00Z', 'refreshToken': 'refresh', 'clientId': 'i', 'clientSecret': 'client-secret',
                'registrationExpiresAt': '2099-01-01T00:00:00Z'}  # it can only be renewed for a session
        for what, more in (('expired', gone), ('revoked', {'accessToken': 'revoked'}), ('no token', {'accessToken': None}),
                           ('no time', {'expiresAt': 5})):
            with self.subTest(what):
                self.sso('https://corp', **more)
                self.fails(login)
        for token in ('sso-token\nsecret', 'sso-token\u20ac'):
            with self.subTest(token):
                self.sso('https://corp', accessToken=token)
                self.fails('contains invalid characters')
        self.sso('https://corp').write_text('[')
        self.fails(login)
        self.profile('sso_session = corp\n' + profile + '[sso-session corp]\nsso_region = us-east-1\n', 'profile work')
        for what, more in (('another client', {'clientId': 'other'}),
                           ('an expired client', {'registrationExpiresAt': '2020-01-01T00:00:00Z'}), ('no answer', {})):
            with self.subTest(what):
                path = self.sso('corp', **dict(gone, **more))
                kept = path.read_text()
                self.aws.fault = lambda h, more=more: not more and h.path == '/token' and (h.answer(500), True)[1]
                self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
                etc.time.sleep = lambda seconds: None
                self.fails(login)
                self.assertEqual(path.read_text(), kept)
        self.profile('sso_account_id = 123', 'profile work')
        self.fails('lacks sso_start_url', 'aws configure sso --profile work')

    def test_processes_that_fail(self):
        python = '"%s" -c ' % sys.executable
        for code, word in (("'import sys; sys.exit(chr(27) + str(1) + str(2))'", 'fails (1): \\x1b12'), ("'print(5)'", 'no usable credentials'),
                           ("'print(chr(123) + chr(125))'", 'no usable credentials'), ("'", 'cannot be run: No closing quotation')):
            with self.subTest(code):
                self.profile('credential_process = ' + python + code)
                self.fails("credential_process of the AWS profile 'default'", word)
        self.profile('credential_process = /nowhere/at/all')
        self.fails("credential_process of the AWS profile 'default' cannot be run: No such file")

    def test_times(self):
        for text, seconds in (('2024-05-06T07:08:09Z', 0), ('2024-05-06T07:08:09.123456Z', 0), ('2024-05-06T09:08:09+02:00', 0),
                              ('2024-05-06T01:38:09.5-0530', 0), ('2024-05-06T07:08:09UTC', 0), ('2024-05-06T07:08:10', 1)):
            with self.subTest(text):
                self.assertEqual(etc._iso_time(text), 1714979289 + seconds, text)
        self.assertEqual(etc._iso_time('tomorrow'), 0)

    def test_regions_are_no_hosts(self):
        del self.settings['endpoint_url'], os.environ['AWS_ENDPOINT_URL']
        for region in ('evil.example/', 'x@evil', 'a#b'):
            with self.subTest(region):
                os.environ['AWS_REGION'] = region
                self.assertIn("the region is not valid; check 'region', $AWS_REGION", self.etc('ls', '-r', status=1)[1])

    def test_beyond_us(self):
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] == 'botocore'}
        self.addCleanup(sys.modules.update, hidden)
        sys.modules['botocore'] = None
        self.addCleanup(sys.modules.pop, 'botocore')
        self.profile('mfa_serial = arn:aws:iam::1:mfa/me\nsource_profile = b\n' + ROLE + 'x\n[profile b]\n' + static('STATIC'), 'profile m')
        os.environ['AWS_PROFILE'] = 'm'
        self.fails('pip install boto3', 'aws configure export-credentials --profile m --format env')
        self.profile('login_session = arn:aws:iam::1:user/me\n')
        os.environ['AWS_PROFILE'] = 'default'
        self.fails('pip install boto3', 'aws login --profile default')

    def test_endpoints(self):
        other = Server(S3Handler)
        self.addCleanup(other.stop)
        other.secrets = AnySecret()
        del self.settings['endpoint_url']
        write(self.tmp, {'.aws/credentials': '[default]\n' + static('STATIC')})
        services = 'services = s\n[services s]\nsts =\n  endpoint_url = http://127.0.0.1:1\ns3 =\n  addressing_style = path\n' \
                   '  endpoint_url = %s\n' % other.url
        for what, config, env in (
                ('variable of the service', '', {'AWS_ENDPOINT_URL_S3': other.url, 'AWS_ENDPOINT_URL': self.aws.url}),
                ('variable', '', {'AWS_ENDPOINT_URL': other.url}), ('services', services, {'AWS_ENDPOINT_URL': ''}),
                ('profile', 'endpoint_url = ' + other.url, {'AWS_ENDPOINT_URL': ''})):
            with self.subTest(what):
                self.profile(config)
                os.environ.update({'AWS_ENDPOINT_URL_S3': ''}, **env)
                del other.log[:]
                self.assertEqual(self.etc('ls', '-r')[0], '')
                self.assertEqual(len(other.log), 1)


@needs(importable('botocore'), 'botocore is not installed')
class AwsLibrary(AwsCase):
    """What only botocore can."""

    def test_mfa(self):
        write(self.tmp, {'.aws/config': '[profile m]\nmfa_serial = arn:aws:iam::1:mfa/me\nsource_profile = b\n' + ROLE
                         + 'x\n[profile b]\n' + static('STATIC')})
        os.environ.update(AWS_PROFILE='m', AWS_ENDPOINT_URL_STS=self.aws.url)
        for code in (b'123456\n', b''):  # it is asked once an hour
            with self.subTest(code):
                process = self.spawn('ls', '-r', stdin=subprocess.PIPE, start_new_session=True)
                err = process.communicate(code)[1]
                self.assertEqual(process.returncode, 0, err)
                self.assertIn('Credential=x-by-STATIC/', self.server.log[-1][2]['Authorization'])
        os.environ['HOME'] = str(self.tmp / 'else')
        os.environ['AWS_CONFIG_FILE'] = str(self.tmp / '.aws/config')
        process = self.spawn('ls', '-r', stdin=subprocess.DEVNULL, start_new_session=True)
        self.assertIn(b'EOFError; try: eval', process.communicate()[1])


@needs(importable('moto', 'flask', 'boto3'), 'moto[server] and boto3 are not installed')
class MotoIdentity(Case):
    """moto_server as IAM, STS and instance metadata; here it checks signatures and policies, of S3 too."""

    def setUp(self):
        super().setUp()
        self.process, endpoint = serve(tool('moto_server'), '-H', '127.0.0.1', '-p', 'PORT', INITIAL_NO_AUTH_ACTION_COUNT='1000')
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)
        self.url = 's3://bucket/prefix'
        os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION='us-east-1')
        import boto3
        session = boto3.Session(aws_access_key_id='x', aws_secret_access_key='y')
        session.client('s3').create_bucket(Bucket='bucket')
        iam = session.client('iam')
        anyone = {'Effect': 'Allow', 'Principal': {'AWS': '*'}, 'Action': 'sts:AssumeRole'}
        for name, action in (('base', 'sts:*'), ('mid', 'sts:*'), ('top', 's3:*')):
            document = json.dumps({'Version': '2012-10-17', 'Statement': [{'Effect': 'Allow', 'Action': action, 'Resource': '*'}]})
            if name == 'base':
                iam.create_user(UserName=name)
                iam.put_user_policy(UserName=name, PolicyName='p', PolicyDocument=document)
                self.key = iam.create_access_key(UserName=name)['AccessKey']
            else:
                iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps({'Version': '2012-10-17', 'Statement': [anyone]}))
                iam.put_role_policy(RoleName=name, PolicyName='p', PolicyDocument=document)
        strict = urllib.request.Request(endpoint + '/moto-api/reset-auth', b'0', {'Content-Type': 'text/plain'})
        self.assertEqual(urllib.request.urlopen(strict).status, 200)
        write(self.tmp, {
            '.aws/config': '[profile top]\nsource_profile = mid\n%stop\n[profile mid]\nsource_profile = base\n%smid\n' % (ROLE, ROLE),
            '.aws/credentials': '[base]\n' + static(self.key['AccessKeyId'], aws_secret_access_key=self.key['SecretAccessKey'])})

    def test_chained_roles(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        os.environ['AWS_PROFILE'] = 'base'
        self.assertIn('AccessDenied', self.etc('push', 'X', status=1)[1])
        os.environ['AWS_PROFILE'] = 'top'
        self.etc('push', 'X')
        self.etc('pull', 'X', home='two')
        with contextlib.closing(etc._open_remote(self.config())) as store:
            self.assertRegex(store.credentials.keys().access_key, '^ASIA')
        write(self.tmp, {'.aws/credentials': '[base]\n' + static(self.key['AccessKeyId'])})
        self.assertIn('SignatureDoesNotMatch', self.etc('ls', '-r', status=1)[1])

    def test_metadata(self):
        del os.environ['AWS_EC2_METADATA_DISABLED']
        os.environ['AWS_EC2_METADATA_SERVICE_ENDPOINT'] = os.environ['AWS_ENDPOINT_URL']
        with contextlib.closing(etc._open_remote(self.config())) as store:
            self.assertEqual(store.credentials.keys()[:3], ('test-key', 'test-secret-key', 'test-session-token'))


class Signature(unittest.TestCase):
    def test_published_examples(self):
        """https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html"""
        credentials = etc._AwsKeys('AKIAIOSFODNN7EXAMPLE', 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY')
        empty, base = hashlib.sha256().hexdigest(), 'https://examplebucket.s3.amazonaws.com'
        for method, path, headers, digest, signature in (
                ('GET', '/test.txt', {'Range': 'bytes=0-9'}, empty,
                 'f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41'),
                ('PUT', '/test%24file.text', {'Date': 'Fri, 24 May 2013 00:00:00 GMT', 'x-amz-storage-class': 'REDUCED_REDUNDANCY'},
                 '44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072',
                 '98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd'),
                ('GET', '/?lifecycle', {}, empty, 'fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543'),
                ('GET', '/?max-keys=2&prefix=J', {}, empty, '34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7')):
            with self.subTest(path):
                signed = etc._aws_sign(etc._Request(method, base + path, headers), digest, credentials, 'us-east-1/s3', 1369353600)
                self.assertTrue(signed['Authorization'].endswith('Signature=' + signature), path)


@needs(importable('botocore'), 'botocore is not installed')
class SignatureOracle(unittest.TestCase):
    def test_against_botocore(self):
        import datetime
        from unittest import mock

        import botocore.auth
        import botocore.awsrequest
        import botocore.credentials
        rng = random.Random(11)
        words = ['a', 'b c', '+', '~', '\u00e9', '/', '//', '.', '=', '&', '%', '$', "'", '(', '*', ':', '@', 'Z', '-', '_', '\u65e5']
        for number in range(600):
            with self.subTest(number=number):
                path = '/bucket/' + ''.join(rng.choice(words) for _ in range(rng.randrange(8)))
                query = {''.join(rng.choice(words) for _ in range(1, 4)): ''.join(rng.choice(words) for _ in range(rng.randrange(3)))
                         for _ in range(rng.randrange(4))}
                host = rng.choice(['http://127.0.0.1:9000', 'https://h.example', 'https://h.example:8443', 'http://h.example:80'])
                url = host + etc._quote(path, safe='/')
                if query:
                    url += '?' + '&'.join(etc._quote(k) + '=' + etc._quote(v) for k, v in query.items())
                headers = {key: value for key, value in {
                    'Range': 'bytes=%d-%d' % (number, 2 * number), 'If-Match': '"x"', 'x-amz-acl': 'public-read',
                    'Content-Type': 'application/gzip', 'X-Amz-Meta-Odd': ' two  spaces '}.items() if rng.random() < .5}
                method, body = rng.choice(['GET', 'PUT', 'POST', 'HEAD', 'DELETE']), rng.choice([b'', b'body'])
                region, token = rng.choice(['us-east-1', 'eu-west-3']), rng.choice([None, 'to/ken+='])
                now = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.timezone.utc)
                ours = etc._aws_sign(etc._Request(method, url, headers), hashlib.sha256(body).hexdigest(),
                                     etc._AwsKeys(AKID, SECRET, token), region + '/s3', now.timestamp())
                request = botocore.awsrequest.AWSRequest(method, url, headers=dict(headers), data=body)
                request.context['payload_signing_enabled'] = True
                signer = botocore.auth.S3SigV4Auth(botocore.credentials.Credentials(AKID, SECRET, token), 's3', region)
                with mock.patch('botocore.auth.get_current_datetime', lambda *a, **k: now.replace(tzinfo=None), create=True):
                    signer.add_auth(request)
                self.assertEqual(ours['Authorization'].replace(' ', ''), request.headers['Authorization'].replace(' ', ''), url)


# ---------------------------------------------------------------------------------------
# Faults of networks, servers and shared directories
# ---------------------------------------------------------------------------------------

class Flaky:
    """Mixed into a handler: commits the fault that `server.plan` names for a request, on the real socket."""

    GARBAGE = [b'', b'<', b'[]', b'null', b'"x"', b'{"items": 5}', b'\xff\xfe' * 99, b'<html><body>Welcome to our hotel</body></html>',
               b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><ListBucketResult>&b;</ListBucketResult>',
               b'<ListBucketResult><Contents>', b'<Error/>', b'{"' * 5000, b'[' * 200000, b'[' + b'1' * 100000 + b']']

    def handle_one(self):
        server, self.damage = self.server, None
        kind = server.plan(self)
        if kind is None:
            return super().handle_one()
        length = int(self.headers.get('Content-Length') or 0)
        if kind in ('refused', 'reset', 'silence'):
            self.rfile.read(server.rng.choice([0, length, server.rng.randrange(length + 1)]))
            if kind == 'refused':
                server.shut()
            elif kind == 'silence':
                self.wait()
            return self.slam()
        if isinstance(kind, tuple):  # a status and a code
            if server.rng.random() < .5:
                self.rfile.read(length)
            else:
                self.close_connection = True
            return self.error(kind[0], kind[1], {'Location': kind[2] + self.path} if kind[2:] else {})
        if kind == 'replaced':
            with server.lock:
                server.replace()
            return super().handle_one()
        self.damage = kind
        before = set(server.uploads)
        super().handle_one()
        if self.command == 'POST':  # nobody was told of this upload, so nobody can abort it
            server.orphans |= set(server.uploads) - before

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

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
        kind, self.damage, rng = self.damage, None, self.server.rng
        if kind is None:
            return super().answer(status, body, headers, length)
        headers, length = dict(headers), len(body) if length is None else length
        if self.command == 'HEAD':
            body = b''
        if kind == 'lost':
            return self.slam()
        if kind == 'garbage':
            body = rng.choice(self.GARBAGE)
            length = len(body)
        elif kind == 'long':
            length += rng.randrange(1, 1000)
        elif kind == 'short':
            length = rng.randrange(length) if length else 0
        elif kind == 'range':
            headers['Content-Range'] = rng.choice(['', 'bytes */9', 'bytes 0-0/1', 'bytes 1-2/3', 'bytes 9-1/5', 'x',
                                                   re.sub(r'/\d+', '/*', headers['Content-Range']),
                                                   re.sub(r'\d+', lambda m: str(int(m.group()) + 1), headers['Content-Range'])])
        elif kind == 'whole':
            status, body = 200, next(iter(self.server.objects.values()))[0]
            headers.pop('Content-Range')
            length = len(body)
        elif kind == 'flipped':
            body = bytearray(body)
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        lines = ['HTTP/1.1 %d Whatever' % status] + ['%s: %s' % item for item in headers.items()] + ['Content-Length: %d' % length]
        if kind == 'headless':
            lines, body = lines[:rng.randrange(1, len(lines))], b''
        head = '\r\n'.join(lines + [''] * (1 if kind == 'headless' else 2)).encode()
        if kind in ('cut', 'torn', 'stalled'):
            body = body[:rng.randrange(len(body))] if body else b''
        with contextlib.suppress(OSError):
            self.connection.sendall(head + body)
        if kind == 'torn':
            return self.slam()
        if kind == 'stalled':
            self.wait()
        if kind != 'short':
            self.close_connection = True


class FlakyServer(Server):
    def __init__(self, handler):
        self.rng, self.hits, self.fault_at, self.requests = random.Random(), [], None, []
        self.orphans, self.shut_for, self.replace = set(), 0, None
        super().__init__(handler)

    def plan(self, handler):
        """The fault of this request, or None; it remembers requests and hits."""
        request = handler.command, handler.path, handler.headers
        with self.lock:
            self.requests.append(request)
            if self.fault_at and self.applies(self.fault_at[0], request):
                kind, start, count = self.fault_at
                self.fault_at = kind, start - 1, count - (start <= 1)
                if start <= 1 and count > 0:
                    self.hits.append(handler.command)
                    return kind
        return None

    @staticmethod
    def applies(kind, request):
        method, path, headers = request
        if kind in ('range', 'whole', 'flipped'):
            return method == 'GET' and 'Range' in headers
        if kind in ('short', 'long', 'cut', 'torn', 'stalled', 'garbage', (400, 'RequestTimeout')):  # it is told in a body
            return method != 'HEAD'
        if kind == (200, 'InternalError'):
            return method == 'POST' and 'uploadId' in path
        return True

    def shut(self):
        """Refuse connections until `shut_for` pauses of the client are over."""
        with self.lock:
            if self.socket.fileno() >= 0:
                self.shutdown()
                self.socket.close()

    def paused(self, failures=0):
        with self.lock:  # or others would go on while it is half open
            self.pauses += 1
            if self.socket.fileno() < 0:
                self.shut_for -= 1
                if self.shut_for <= 0:
                    self.reopen()
        return 0

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
        self.send_response(200)
        self.send_header('Content-Length', '0')
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one


class Runs:
    """What all seeded runs share."""

    def make(self, version, size):
        """A version of X: its directory, archive and tree."""
        root = write(self.tmp / version, {
            'data/train/noise': noise(size, version), 'data/train/x/text': (version + '\n') * 5000, 'data/train/l': ('->', 'noise'),
            'data/test/t': 'the same in all', 'meta.json': '{"version": "%s"}' % version, 'README.md': version})
        local = etc.Config((self.tmp / 'made' / version).as_uri(), self.tmp / 'makers' / version)
        etc.register(root, 'X', config=local)
        etc.push('X', config=local)
        return (self.tmp / 'made' / version / 'X.tgz').read_bytes(), tree(root)

    def call(self, *args, home='home'):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = etc.main(['-q', '--config', str(self.tmp / 'settings.yaml'), '--url', self.url, '--home', str(self.tmp / home)] + list(args))
        return code, out.getvalue(), err.getvalue()

    def runs(self, count):
        seeds = range(count * RUNS)
        if 'ETC_TEST_SEED' in os.environ:
            seeds = [int(os.environ['ETC_TEST_SEED'])]
        for seed in seeds:
            rng = random.Random('%s %d' % (self.id(), seed))
            yield seed, rng

    def staged(self, home):
        return [p for p in self.leftovers(home) if '@%d@' % os.getpid() in p.name]


class Faults(Runs):
    """Seeded runs of each command that talks to a server, with a fault at a chosen request and byte.

    All end in the right dataset, or with one line and nothing changed. ETC_TEST_SEED repeats a single run.
    """

    SECRETS = [AKID, SECRET, SECRET[:20], 'AWS4-HMAC', 'Signature', 'session/token', 'ya29.token', 'Bearer', 'refresh-secret']
    MENDED = ['refused', 'reset', 'silence', 'lost', 'cut', 'torn', 'stalled', 'long'] + [
        (408, ''), (429, 'SlowDown'), (500, 'InternalError'), (502, ''), (503, 'SlowDown'), (503, 'ServiceUnavailable'), (504, '')]
    ENDED = ['short', 'garbage', 'range', 'whole', 'flipped', 'headless', (400, 'InvalidRequest'),
             (401, ''), (403, 'AccessDenied'), (404, 'NoSuchKey'), (409, 'OperationAborted'), (410, 'Gone'), (412, ''), (416, ''), (501, '')]

    def setUp(self):
        super().setUp()
        self.server.stop()
        old, self.server = self.server, FlakyServer(self.handler)
        self.addCleanup(self.server.stop)
        self.addCleanup(self.server.reopen)
        vars(self.server).update({k: v for k, v in vars(old).items() if k in ('cuts', 'granule', 'token', 'generation', 'uniform', 'garble')})
        self.server.finished, self.server.pauses = {}, 0
        self.settings['endpoint_url'] = os.environ['STORAGE_EMULATOR_HOST'] = self.server.url
        self.other = Server(Recorder)
        self.addCleanup(self.other.stop)
        self.addCleanup(setattr, etc, '_backoff', etc._backoff)
        etc._backoff = self.server.paused
        init = etc._Http.__init__
        self.addCleanup(setattr, etc._Http, '__init__', init)

        def patient(http, *args, **kwargs):
            init(http, *args, **kwargs)
            http.timeout = self.patience
        etc._Http.__init__ = patient
        self.patience = 60
        (self.tmp / 'settings.yaml').write_text(''.join('%s: %s\n' % (k, json.dumps(v)) for k, v in self.settings.items()))
        (self.tmp / 'settings.yaml').chmod(0o600)

    def remote(self):
        found = self.server.objects.get('some/prefix/X.tgz')
        return found and found[0]

    def reset(self, archive):
        server = self.server
        server.reopen()
        server.fault_at, server.pauses, self.patience = None, 0, 60
        for kept in (server.objects, server.uploads, server.finished, server.requests, server.hits, server.log, self.other.log, server.orphans):
            kept.clear()
        if archive is not None:
            self.put('X.tgz', archive)

    def inject(self, rng, kind, start, count):
        server = self.server
        server.rng = rng
        server.shut_for = rng.choice([1, 2]) if count < 3 else 10 ** 9
        if kind in ('silence', 'stalled'):
            self.patience, count = 1.0, 1  # on a busy machine, less would be silence where there is none
        server.requests.clear()
        server.fault_at = kind, start, count
        return count

    def aim(self, rng, kinds, requests):
        """A fault and where: (kind, number among the requests that it applies to, how many times)."""
        while True:
            kind = rng.choice(kinds)
            places = sum(self.server.applies(kind, request) for request in requests)
            if places:
                return kind, rng.randrange(places) + 1, rng.choice([1, 1, 1, 2, 2, 4, 10 ** 6, 10 ** 6])

    def after(self, seed, fault, code, err, clean):
        """What holds after each run."""
        server, (kind, _, count) = self.server, fault
        server.reopen()
        if count <= 2 and kind in self.MENDED:
            self.assertEqual((code, err), (0, ''))
        elif code:
            self.assertEqual(code, 1)
            self.assertRegex(err, r'\Aetc: [^\n]+\n\Z')
        self.assertLessEqual(len(server.requests) + server.pauses, 25 * clean + 100)
        # the server could not be told to forget an upload if that request failed, too
        told = 'DELETE' not in server.hits or (kind in self.MENDED and server.hits.count('DELETE') < self.tries_of_delete)
        if told and (count < 3 or kind != 'refused' and count < 1000):
            self.assertEqual(set(server.uploads) - server.orphans, set())
        for text in self.other.log:
            for secret in self.SECRETS:
                self.assertNotIn(secret, text)

    def test_pull(self):
        one, tree_one = self.make('one', 1200000)
        two, tree_two = self.make('two', 1200000)
        part_one = {k: v for k, v in tree_one.items() if not k.startswith('data/train')}
        part_two = {k: v for k, v in tree_two.items() if not k.startswith('data/train')}
        foreign = self.tmp / 'foreign.tgz'
        with tarfile.open(str(foreign), 'w:gz') as tar:
            tar.add(str(self.tmp / 'two'), '.')
        foreign = foreign.read_bytes()
        # what is installed before, which archive is there, the words, the trees that may come of it
        ops = [(None, one, ['pull', 'X'], tree_one), (None, one, ['pull', '-p', 'test', 'X'], part_one),
               ('part', one, ['pull', 'X'], tree_one), ('one', two, ['pull', '-f', 'X'], tree_two),
               ('one', two, ['pull', '-f', '-p', 'test', 'X'], part_two), (None, foreign, ['pull', 'X'], tree_two),
               ('one', foreign, ['pull', '-f', 'X'], tree_two)]
        before = {None: None, 'part': part_one, 'one': tree_one}
        clean = {}

        def prepare(at, home):
            installed, archive = ops[at][:2]
            self.reset(one)
            if installed:
                self.assertEqual(self.call('pull', 'X', *['-p', 'test'][:2 * (installed == 'part')], home=home), (0, '', ''))
            self.reset(archive)
        for at in range(len(ops)):
            prepare(at, 'clean%d' % at)
            self.assertEqual(self.call(*ops[at][2], home='clean%d' % at), (0, '', ''))
            clean[at] = list(self.server.requests)
        for seed, rng in self.runs(self.pulls):
            at, home = rng.randrange(len(ops)), 'h%d' % seed
            installed, _, args, target = ops[at]
            prepare(at, home)
            fault = self.aim(rng, rng.choice([self.MENDED, self.ENDED, ['replaced']]), clean[at])
            self.server.replace = lambda two=rng.choice([one, two, None]): (self.server.objects.clear(), two and self.put('X.tgz', two))
            with self.subTest(seed=seed, args=args, fault=fault):
                fault = fault[:2] + (self.inject(rng, *fault),)
                self.server.conditions = rng.random() < .5  # some stores know none
                code, out, err = self.call(*args, home=home)
                self.server.conditions = True
                self.after(seed, fault, code, err, len(clean[at]))
                if fault[0] == 'replaced' and code:
                    self.assertRegex(err, "was replaced|no dataset|another 'X' is installed")
                found = tree(self.tmp / home / 'X') if os.path.lexists(str(self.tmp / home / 'X')) else None
                if fault[0] == 'replaced' and code == 0:
                    self.assertTrue(found in ([part_one, part_two] if '-p' in args else [tree_one, tree_two]))
                else:
                    self.assertTrue(found == (before[installed] if code else target), (code, err, sorted(found or {})))
                self.assertEqual(self.staged(home), [])
                if found:
                    etc.verify('X', config=self.config(home))
                self.reset(two)
                self.assertEqual(self.call('pull', '-f', 'X', home=home), (0, '', ''))
                self.assertTrue(tree(self.tmp / home / 'X') == tree_two)
                self.assertEqual(self.leftovers(home), [])
            remove(self.tmp / home)

    def test_push(self):
        one, _ = self.make('one', 70000)
        two, _ = self.make('two', 80000)
        big, _ = self.make('big', 9 * MIB)
        ops = [('two', None, ['push', 'X'], two), ('two', one, ['push', '-f', 'X'], two), ('two', two, ['push', 'X'], two),
               ('big', None, ['push', 'X'], big), ('big', one, ['push', '-f', 'X'], big)]
        clean = {}
        for at, (home, before, args, target) in enumerate(ops):
            self.reset(before)
            self.assertEqual(self.call(*args, home='makers/' + home), (0, '', ''))
            self.assertTrue(self.remote() == target)
            clean[at] = list(self.server.requests)
        for seed, rng in self.runs(self.pushes):
            at = rng.randrange(len(ops))
            home, before, args, target = ops[at]
            self.reset(before)
            fault = self.aim(rng, rng.choice([self.MENDED, self.ENDED]), clean[at])
            with self.subTest(seed=seed, args=args, home=home, fault=fault):
                fault = fault[:2] + (self.inject(rng, *fault),)
                code, out, err = self.call(*args, home='makers/' + home)
                self.after(seed, fault, code, err, len(clean[at]))
                self.assertTrue(self.remote() in ([target] if code == 0 else [before, target]), (code, err))
                self.server.fault_at, self.patience = None, 60
                self.assertEqual(self.call('push', '-f', 'X', home='makers/' + home), (0, '', ''))
                self.assertTrue(self.remote() == target)

    def test_purge(self):
        one, _ = self.make('one', 70000)
        two, _ = self.make('two', 80000)
        ops = [['purge', '-r', '-f', 'X'], ['purge', '-r', '-f', 'X@' + etc.Dataset(self.tmp / 'one').digest]]
        clean = {}
        for at, args in enumerate(ops):
            self.reset(one)
            self.assertEqual(self.call(*args), (0, '', ''))
            self.assertIsNone(self.remote())
            clean[at] = list(self.server.requests)
        for seed, rng in self.runs(self.purges):
            at = rng.randrange(len(ops))
            self.reset(one)
            fault = self.aim(rng, rng.choice([self.MENDED, self.ENDED, ['replaced']]), clean[at])
            self.server.replace = lambda new=rng.choice([two, None]): (self.server.objects.clear(), new and self.put('X.tgz', new))
            with self.subTest(seed=seed, args=ops[at], fault=fault):
                fault = fault[:2] + (self.inject(rng, *fault),)
                code, out, err = self.call(*ops[at])
                self.after(seed, fault, code, err, len(clean[at]))
                if fault[0] == 'replaced':
                    self.assertTrue(self.remote() in (None, two))
                    if code == 0 and self.remote():  # which came after the deletion
                        self.assertIn('DELETE', [method for method, _, _ in self.server.requests[:-1]])
                elif code == 0 and fault[0][0] not in (404, 410):  # which some looks take for the truth
                    self.assertIsNone(self.remote(), err)
                else:
                    self.assertTrue(self.remote() in (None, one))

    def test_listings(self):
        one, _ = self.make('one', 300000)
        self.server.page = 2
        ops = [['ls', '-r'], ['ls', '-r', '--json'], ['info', '-r', '--json', 'X']]

        def prepare():
            self.reset(one)
            for name in ('a.tgz', 'b.tgz', 'c.tgz'):
                self.put(name, one)
        clean = {}
        for at, args in enumerate(ops):
            prepare()
            clean[at] = self.call(*args), list(self.server.requests)
            self.assertEqual(clean[at][0][0], 0)
        for seed, rng in self.runs(self.lists):
            at = rng.randrange(len(ops))
            prepare()
            fault = self.aim(rng, rng.choice([self.MENDED, self.ENDED]), clean[at][1])
            with self.subTest(seed=seed, args=ops[at], fault=fault):
                fault = fault[:2] + (self.inject(rng, *fault),)
                code, out, err = self.call(*ops[at])
                if ops[at][-1] == '--json' and code == 0 and err:  # one that cannot be read does not hide the others
                    self.assertTrue(all(line.startswith('etc: ') for line in err.splitlines()), err)
                    self.assertEqual([item['name'] for item in json.loads(out)], ['X', 'a', 'b', 'c'])
                    expected = json.loads(clean[at][0][1])
                    for item in json.loads(out):
                        self.assertTrue(item in expected or item['digest'] is None, out)
                else:
                    self.after(seed, fault, code, err, len(clean[at][1]))
                    if code == 0:
                        self.same_listing(out, clean[at][0][1])
                    else:
                        self.assertEqual(out, '')
                self.assertFalse((self.tmp / 'home/X').exists())

    def same_listing(self, out, expected):
        self.assertEqual(re.sub(r'"when": "[^"]*"', '', out), re.sub(r'"when": "[^"]*"', '', expected))

    def test_redirects(self):
        one, tree_one = self.make('one', 1200000)
        big, _ = self.make('big', 9 * MIB)
        for args, before, home in ((['pull', 'X'], one, 'two'), (['push', 'X'], None, 'makers/big'), (['ls', '-r'], one, 'two'),
                                   (['info', '-r', 'X'], one, 'two'), (['push', 'X'], None, 'makers/one'),
                                   (['purge', '-r', '-f', 'X'], one, 'two')):
            self.reset(before)
            self.assertEqual(self.call(*args, home=home)[0], 0)
            places = len(self.server.requests)
            for status in (301, 302, 303, 307, 308):
                for place in range(1, places + 1):
                    self.reset(before)
                    remove(self.tmp / 'two')
                    fault = (status, 'TemporaryRedirect', self.other.url), place, random.Random(place + status).choice([1, 10 ** 6])
                    with self.subTest(args=args, fault=fault):
                        self.inject(random.Random(place), *fault)
                        code, out, err = self.call(*args, home=home)
                        self.after(None, fault, code, err, places)
                        if code == 0 and args[0] == 'pull':
                            self.assertTrue(tree(self.tmp / 'two/X') == tree_one)
                        elif args[0] == 'push':
                            self.assertTrue(code == 0 and self.remote() or self.remote() in (before, one, big), err)


class S3Faults(Faults, S3Case):
    class handler(Flaky, S3Handler):
        pass
    pulls, pushes, lists, purges, tries_of_delete = 50, 30, 16, 40, 2
    MENDED = Faults.MENDED + [(200, 'InternalError'), (400, 'RequestTimeout')]

    def setUp(self):
        super().setUp()
        self.settings['aws_session_token'] = 'session/token'
        with (self.tmp / 'settings.yaml').open('a') as file:
            file.write('aws_session_token: session/token\n')

    def put(self, name, data):
        self.server.objects['some/prefix/' + name] = data, '"%s"' % hashlib.sha1(data).hexdigest(), {}


class GsFaults(Faults, GoogleCase):
    class handler(Flaky, GsHandler):
        def error(self, status, code, headers=()):
            self.answer(status, json.dumps({'error': {'code': status, 'message': code}}).encode() if code else b'', headers)

        def session(self, body):
            """As Google's, it answers for an upload that is complete with what it became."""
            upload = self.query['upload_id']
            if self.command == 'PUT' and upload in self.server.finished:
                return self.answer(200, json.dumps(self.resource(self.server.finished[upload])).encode())
            name = self.server.uploads.get(upload, [{}])[0].get('name')
            try:
                super().session(body)
            finally:
                if self.command == 'PUT' and upload not in self.server.uploads and name in self.server.objects:
                    self.server.finished[upload] = name
    pulls, pushes, lists, purges, tries_of_delete = 40, 30, 16, 40, 1

    def setUp(self):
        super().setUp()
        self.respond({'refresh_token': 'refresh-secret'})
        self.use(self.user(refresh_token='refresh-secret'))
        with (self.tmp / 'settings.yaml').open('a') as file:
            file.write('google_credentials: %s\n' % (self.tmp / 'key.json'))


class SlowBodies(S3Handler):
    """Reads the bodies of parts and objects as the test says: `server.receive(handler, size)` before each read."""

    def read_body(self):
        left, parts = int(self.headers.get('Content-Length') or 0), []
        while left:
            if self.command == 'PUT':
                self.server.receive(self, left)
            parts.append(self.rfile.read(min(left, 32768)))
            left -= len(parts[-1])
            if not parts[-1]:
                self.close_connection = True
                break
        return b''.join(parts)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = S3Handler.handle_one


class Links(S3Case):
    """Slow, lossy and long links, and servers that are slow or gone for a while."""

    def slow_bodies(self, receive):
        self.server.stop()
        self.server = Server(SlowBodies)
        self.addCleanup(self.server.stop)
        self.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        self.server.receive = receive
        self.settings['endpoint_url'] = self.server.url

    def set(self, name, value):
        self.addCleanup(setattr, etc, name, getattr(etc, name))
        setattr(etc, name, value)

    def test_slow_uplink(self):
        """A link on which a block takes longer than the time-out, but is never silent for so long."""
        self.set('_TIMEOUT', 4.0)
        self.slow_bodies(lambda handler, left: time.sleep(0.25))
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(MIB)}))
        self.assertEqual(len(self.requests('PUT')), 1)

    def test_parts_in_any_order(self):
        """A slow part holds up none of the others."""
        others = threading.Semaphore(0)

        def fault(handler):
            if 'partNumber=1&' in handler.path:
                for _ in range(6):
                    self.assertTrue(others.acquire(timeout=20))
            elif 'partNumber=' in handler.path:
                others.release()
        self.server.fault = fault
        self.settings['connections'] = 2
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(34 * MIB)}))
        self.assertIn('partNumber=1&', ' '.join(self.requests('PUT')))
        self.server.fault = None
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))

    def test_ranges_in_any_order(self):
        """A range that is late in coming holds up none of the others, and is not asked for again."""
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(20 * MIB)}))
        size = len(next(iter(self.server.objects.values()))[0])
        self.server.log.clear()
        self.set('_MIN_RANGE', 2 * MIB)
        seen = []
        rest = threading.Event()

        def fault(handler):
            if handler.headers.get('Range', '').startswith('bytes=-'):
                return
            start, stop = asked_range(handler.headers, size)
            if not start:
                self.assertTrue(rest.wait(20))
            seen.append(stop)
            if size - max(seen) < 10000:
                rest.set()
        self.server.fault = fault
        self.settings['connections'] = 2
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
        self.assertTrue(rest.is_set())
        self.assertEqual(len(seen), len(set(seen)))

    def test_slow_connection(self):
        """Where all others wait for a range, another connection goes on with it."""
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(12 * MIB)}))
        data, etag, _ = next(iter(self.server.objects.values()))
        self.set('_MIN_RANGE', 2 * MIB)
        asked, left = [], []
        rest = threading.Event()

        def fault(handler):
            if handler.headers.get('Range', '').startswith('bytes=-'):
                return
            start, stop = asked_range(handler.headers, len(data))
            asked.append((start, stop))
            if len(data) - stop < 10000:
                rest.set()
            if start != 2 * MIB:
                return
            headers = {'Content-Range': 'bytes %d-%d/%d' % (start, stop - 1, len(data)), 'ETag': etag}
            handler.answer(206, b'', headers, stop - start)
            self.assertTrue(rest.wait(20))
            handler.close_connection = True
            handler.connection.settimeout(0.2)
            for at in range(start, stop, 65536):
                handler.connection.sendall(data[at:at + 65536])
                with contextlib.suppress(socket.timeout):
                    left.append(handler.connection.recv(1))
                    break
            return True
        self.server.fault = fault
        self.settings['connections'] = 2
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))
        self.assertEqual(left, [b''])
        asked.sort()
        late, again = asked.pop(1), asked[1]
        self.assertTrue(late[0] < again[0] < again[1] == late[1], (late, asked))
        self.assertEqual([stop for _, stop in asked[1:-1]], [start for start, _ in asked[2:]])

    def test_silence(self):
        """A connection that says nothing is given up early, if the request only reads."""
        self.share(small(self.tmp / 'ds'))
        self.set('_READ_TIMEOUT', 0.5)
        late = []
        over = threading.Event()

        def fault(handler):
            if handler.command == 'GET' and not late:
                late.append(None)
                late.append(not over.wait(10))
                return True
            over.set()
        self.server.fault = fault
        self.etc('pull', 'X', home='two')
        self.assertTrue(over.wait(20))
        self.assertNotIn(True, late)

    def test_server_that_restarts(self):
        """A server that has answered before is waited for, at least 15 seconds."""
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            if sum(slept) > 15:
                self.server.reopen()
        self.server.stop()
        self.server = FlakyServer(S3Handler)
        self.addCleanup(self.server.stop)
        self.settings['endpoint_url'] = self.server.url
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = sleep

        def fault(handler):
            if handler.command == 'PUT' and not slept:
                handler.server.socket.close()
                handler.close_connection = True
                threading.Thread(target=handler.server.shutdown).start()
                return True
        self.server.fault = fault
        self.etc('push', 'X')
        self.assertGreater(sum(slept), 15)

    def test_requests(self):
        """How many requests the commands make."""
        self.share(small(self.tmp / 'ds'))
        large = write(self.tmp / 'large', {'data/train/x': noise(9 * MIB), 'README.md': 'large'})
        self.etc('register', large, 'Large')
        for what, args, methods in (
                ('push of a new dataset', ['push', 'Large'], ['GET', 'HEAD', 'POST', 'POST', 'PUT', 'PUT']),
                ('push of the same dataset', ['push', 'Large'], ['GET']),
                ('info of a small dataset', ['info', '-r', 'X'], ['GET']),
                ('info of a large dataset', ['info', '-r', 'Large'], ['GET', 'GET']),
                ('pull of a small dataset', ['--home', self.tmp / 'two', 'pull', 'X'], ['GET']),
                ('diff of here and there', ['diff', 'X', '-r', 'X'], ['GET']),
                ('diff of large ones', ['diff', '-r', 'Large', '-r', 'Large'], ['GET', 'GET']),
                ('list', ['ls', '-r'], ['GET']), ('long list', ['ls', '-r', '-l'], ['GET'] * 3),
                ('part of the list', ['ls', '-r', '--json', 'L*'], ['GET'] * 2)):
            with self.subTest(what):
                self.server.log.clear()
                self.server.sent = 0
                self.etc(*args)
                self.assertEqual(sorted(m for m, _, _ in self.server.log), methods)

    def test_ranges_from_the_end(self):
        """Servers that refuse or misread them are asked otherwise."""
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(100000)}))
        data, etag, _ = next(iter(self.server.objects.values()))
        headers = {'ETag': etag, 'Last-Modified': 'Mon, 06 May 2024 07:08:09 GMT'}

        def part(start, stop, **more):
            return 206, data[start:stop], dict(headers, **dict({'Content-Range': 'bytes %d-%d/%d' % (start, stop - 1, len(data))}, **more))
        size = len(data)
        for what, answer in (
                ('the whole object', (200, data, headers)), ('refused', (416, b'', {})), ('from the start', part(0, 8193)),
                ('the last bytes but one', part(size - 8193, size - 1)), ('fewer bytes', part(size - 4000, size)),
                ('no size', part(size - 8192, size, **{'Content-Range': 'bytes %d-%d/*' % (size - 8192, size - 1)})),
                ('another length', (206, data[-8000:], part(size - 8192, size)[2]))):
            with self.subTest(what):
                asked = []

                def fault(handler):
                    if handler.headers.get('Range', '').startswith('bytes=-'):
                        asked.append(handler.path)
                        return handler.answer(*answer) or True
                self.server.fault = fault
                self.etc('pull', 'X', home=what)
                self.assertEqual(tree(self.tmp / what / 'X'), tree(self.tmp / 'ds'))
                self.assertEqual(len(asked), 1)

    def test_lost_upload(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(12 * MIB)}), 'X')

        def fault(handler):
            if 'partNumber=2' in handler.path:
                self.server.uploads.clear()
        self.server.fault = fault
        self.assertRegex(self.etc('push', 'X', status=1)[1], 'NoSuchUpload.*has removed the upload meanwhile; push again')

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interruption_while_the_server_is_silent(self):
        """Ctrl-C ends a push at once, and the upload."""
        started, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def receive(handler, left):
            if left < MIB:
                started.set()
                go_on.wait(60)
        self.slow_bodies(receive)
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(30 * MIB)}), 'X')
        for name, status in (('SIGINT', 130), ('SIGTERM', 143)):
            with self.subTest(name):
                started.clear()
                process = self.spawn('push', 'X')
                self.assertTrue(started.wait(20))
                process.send_signal(getattr(signal, name))
                err = process.communicate(timeout=20)[1].decode()
                self.assertEqual((process.returncode, err), (status, 'etc: interrupted\n'))
                self.assertEqual(self.server.uploads, {})

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interruption_while_a_lock_is_held(self):
        """A signal may strike when the main thread has just taken a lock that the threads of a pool need."""
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(12 * MIB), 'data/train/y': 'y' * 99}))
        self.etc('ls')  # writes the settings
        program = r"""
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import etcetera
enter, left, main = threading.Condition.__enter__, [int(sys.argv[2])], threading.get_ident()
def taken(condition):
    result = enter(condition)
    if threading.get_ident() == main:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return result
threading.Condition.__enter__ = taken
sys.exit(etcetera.main(sys.argv[3:]))
"""
        ended = []
        for command in (['push', '-f', 'X'], ['pull', '-f', 'X'], ['verify', 'X']):
            for count in (1, 2, 5, 10, 20, 40):
                with self.subTest(command, count=count):
                    process = subprocess.Popen(
                        [sys.executable, '-c', program, os.path.dirname(SCRIPT), str(count), '-q', '--config', str(self.tmp / 'settings.yaml'),
                         '--url', self.url, '--home', str(self.tmp / 'home')] + command, stderr=subprocess.PIPE, preexec_fn=default_signals)
                    self.addCleanup(process.kill)
                    err = process.communicate(timeout=20)[1].decode()
                    self.assertIn((process.returncode, err), [(0, ''), (130, 'etc: interrupted\n')])
                    ended.append(process.returncode)
        self.assertGreater(ended.count(130), 5)
        self.assertEqual(self.server.uploads, {})

    def test_progress_of_a_part(self):
        """Progress tells of bytes when they are sent, not when all of a part is."""
        told = threading.Event()
        missing = []

        def receive(handler, left):
            if left < 2 * MIB and not told.wait(20):
                missing.append(left)

        def progress(done, total):
            if done:
                told.set()
        self.slow_bodies(receive)
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(4 * MIB)}), 'X')
        etc.push('X', config=self.config(), progress=progress)
        self.assertEqual(missing, [])

    def test_progress_of_a_range(self):
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(MIB)}))
        told = threading.Event()
        data, etag, _ = next(iter(self.server.objects.values()))
        missing = []

        def fault(handler):
            if handler.headers.get('Range', '').startswith('bytes=-'):
                return
            start, stop = asked_range(handler.headers, len(data))
            handler.send_response(206)
            for header in (('ETag', etag), ('Content-Range', 'bytes %d-%d/%d' % (start, stop - 1, len(data))),
                           ('Content-Length', str(stop - start))):
                handler.send_header(*header)
            handler.end_headers()
            handler.wfile.write(data[start:stop - 1])
            if not told.wait(20):
                missing.append(start)
            handler.wfile.write(data[stop - 1:stop])
            return True

        def progress(done, total):
            if done:
                told.set()
        self.server.fault = fault
        etc.pull('X', config=self.config('two'), progress=progress)
        self.assertEqual(missing, [])


class FileFaults(Runs, Case):
    """A shared directory whose archive changes, shrinks or goes at a chosen read; and a disk that is full."""

    def setUp(self):
        super().setUp()
        (self.tmp / 'settings.yaml').write_text('')
        self.archive = self.tmp / 'share/X.tgz'
        self.countdown = lambda: None
        read, load = etc._FileRemote.read, etc._read_file
        self.addCleanup(setattr, etc._FileRemote, 'read', read)
        self.addCleanup(setattr, etc, '_read_file', load)
        etc._FileRemote.read = lambda *args: (self.countdown(), read(*args))[1]
        etc._read_file = lambda *args: (self.countdown(), load(*args))[1]

    def at(self, number, action):
        """Let `action` happen just before the read of that number."""
        lock, left = threading.Lock(), [number]

        def countdown():
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    action()
        self.countdown = countdown
        return left

    @contextlib.contextmanager
    def limit(self, size):
        """Let no file grow past `size`, as on a full disk."""
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_pull(self):
        one, tree_one = self.make('one', 2500000)
        two, tree_two = self.make('two', 2500000)
        part_two = {k: v for k, v in tree_two.items() if not k.startswith('data/train')}
        ops = [(None, ['pull', 'X'], tree_two), (None, ['pull', '-p', 'test', 'X'], part_two), ('one', ['pull', '-f', 'X'], tree_two)]

        def flip(at):
            status = self.archive.stat()
            with self.archive.open('r+b') as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))
            os.utime(str(self.archive), ns=(status.st_atime_ns, status.st_mtime_ns))

        for seed, rng in self.runs(40):
            home = 'h%d' % seed
            before, args, target = rng.choice(ops)
            if before:
                write(self.tmp / 'share', {'X.tgz': one})
                self.assertEqual(self.call('pull', 'X', home=home), (0, '', ''))
            write(self.tmp / 'share', {'X.tgz': two})
            faults = {
                'replaced': lambda: (write(self.tmp, {'new': one}), os.replace(str(self.tmp / 'new'), str(self.archive))),
                'rewritten': lambda: write(self.tmp / 'share', {'X.tgz': one}), 'removed': self.archive.unlink,
                'truncated': lambda: os.truncate(str(self.archive), rng.randrange(len(two))),
                'flipped': lambda: flip(rng.randrange(len(two))), 'emptied': lambda: write(self.tmp / 'share', {'X.tgz': b''}),
                'moved': lambda: os.rename(str(self.tmp / 'share'), str(self.tmp / 'elsewhere')), 'full': lambda: None}
            if os.name == 'nt':
                del faults['full']
            kind, number = rng.choice(sorted(faults)), rng.randrange(1, 5)
            with self.subTest(seed=seed, args=args, fault=(kind, number)):
                left = self.at(number, faults[kind])
                with self.limit(rng.randrange(1000, 1000000)) if kind == 'full' else contextlib.suppress():
                    code, out, err = self.call(*args, home=home)
                happened, self.countdown = left[0] <= 0, lambda: None
                if happened and kind in ('replaced', 'rewritten', 'truncated', 'emptied'):
                    self.assertIn('was replaced', err)
                if code or happened and kind not in ('flipped', 'full'):
                    self.assertEqual(code, 1)
                    self.assertRegex(err, r'\Aetc: [^\n]+\n\Z')
                found = tree(self.tmp / home / 'X') if (self.tmp / home / 'X').exists() else None
                self.assertTrue(found == ((tree_one if before else None) if code else target), (code, err))
                self.assertEqual(self.staged(home), [])
                write(self.tmp / 'share', {'X.tgz': two})
                self.assertEqual(self.call('pull', '-f', 'X', home=home), (0, '', ''))
                self.assertTrue(tree(self.tmp / home / 'X') == tree_two)
                self.assertEqual(self.leftovers(home), [])
            remove(self.tmp / home)
            remove(self.tmp / 'elsewhere')

    def test_push(self):
        one, _ = self.make('one', 500000)
        two, _ = self.make('two', 2600000)
        for seed, rng in self.runs(20):
            before = rng.choice([None, one])
            remove(self.tmp / 'share')
            write(self.tmp / 'share', {'X.tgz': before} if before else {'.': None})
            source = self.tmp / 'two/data/train/noise'
            faults = {'gone': lambda: remove(self.tmp / 'share'), 'pushed by another': lambda: write(self.tmp / 'share', {'X.tgz': one}),
                      'shrunk': lambda: os.truncate(str(source), rng.randrange(2600000)), 'removed': source.unlink, 'full': lambda: None}
            if os.name == 'nt':
                del faults['full']
            kind, number = rng.choice(sorted(faults)), rng.randrange(1, 5)
            with self.subTest(seed=seed, before=bool(before), fault=(kind, number)):
                left = self.at(number, faults[kind])
                with self.limit(rng.randrange(1000, len(two))) if kind == 'full' else contextlib.suppress():
                    code, out, err = self.call('push', *['-f', 'X'][not before:], home='makers/two')
                self.countdown = lambda: None
                if code:
                    self.assertEqual(code, 1)
                    self.assertRegex(err, r'\Aetc: [^\n]+\n\Z')
                shared = self.tmp / 'share'
                found = self.archive.read_bytes() if self.archive.exists() else None
                if kind == 'gone' and left[0] <= 0:
                    before = None
                if kind == 'pushed by another' and left[0] <= 0:
                    before = one
                self.assertTrue(found == (before if code else two), (code, err))
                self.assertEqual(os.listdir(str(shared)) if shared.exists() else [], ['X.tgz'] if found else [])
                write(self.tmp / 'two', {'data/train/noise': noise(2600000, 'two')})
                self.assertEqual(self.call('push', '-f', 'X', home='makers/two'), (0, '', ''))
                self.assertTrue(self.archive.read_bytes() == two)


# ---------------------------------------------------------------------------------------
# Installing
# ---------------------------------------------------------------------------------------

class Install(S3Case):
    def publish(self, size=20 * MIB):
        self.root = write(self.tmp / 'ds', {'data/train/%d' % n: noise(size // 10, n) for n in range(10)})
        self.share(self.root, home='pub')

    def test_read_only(self):
        self.etc('register', small(self.tmp / 'ds'), 'X', home='pub')
        os.chmod(str(self.tmp / 'ds/data/train/a.txt'), 0o755)
        self.etc('push', 'X', home='pub')
        umask = os.umask(0o022)
        try:
            self.etc('pull', 'X')
        finally:
            os.umask(umask)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (self.tmp / 'home/X').rglob('*')}
        self.assertEqual((modes['a.txt'], modes['b.txt'], modes['train']), (0o555, 0o444, 0o755))

    def test_killed_pull(self):
        self.publish()
        started = threading.Event()

        def fault(handler):
            if handler.headers.get('Range') and 'home' not in handler.path and len(self.requests('GET')) > 3:
                started.set()
                time.sleep(30)
        self.server.fault = fault
        process = self.spawn('pull', 'X')
        self.assertTrue(started.wait(20))
        process.kill()
        process.communicate()
        self.server.fault = None
        self.assertEqual(self.installed(), [])
        self.assertEqual(len(self.leftovers()), 1)
        self.etc('pull', 'X')
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.root))
        self.assertEqual(self.leftovers(), [])

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interrupt(self):
        self.publish()
        for name, status in (('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)):
            with self.subTest(name):
                started = threading.Event()
                del self.server.log[:]

                def fault(handler):
                    if len(self.requests('GET')) > 3:
                        started.set()
                        time.sleep(30)
                self.server.fault = fault
                process = self.spawn('pull', 'X', home=name)
                self.assertTrue(started.wait(20))
                begin = time.time()
                process.send_signal(getattr(signal, name))
                out, err = process.communicate()
                self.assertEqual((process.returncode, err.decode()), (status, 'etc: interrupted\n'))
                self.assertLess(time.time() - begin, 15, 'it waits for no answer')
                self.assertEqual((self.installed(name), len(self.leftovers(name))), ([], 1))  # for the next to go on from
                self.server.fault = None
                self.etc('pull', 'X', home=name)
                self.assertEqual((tree(self.tmp / name / 'X'), self.leftovers(name)), (tree(self.root), []))

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    @unittest.skipIf(hasattr(sys, 'pypy_version_info'), 'PyPy does not tell which signals it inherited as ignored')
    def test_signals_that_are_not_for_us(self):
        """nohup's SIGHUP is ignored; a program that calls main() keeps its handlers, also in another thread."""
        self.publish()
        started, go_on = threading.Event(), threading.Event()

        def fault(handler):
            started.set()
            go_on.wait(30)
        self.server.fault = fault
        process = self.spawn('pull', 'X', preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        self.assertTrue(started.wait(20))
        process.send_signal(signal.SIGHUP)
        go_on.set()
        self.assertEqual(process.wait(), 0, process.communicate())
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        self.addCleanup(lambda: [signal.signal(*item) for item in handlers.items()])
        during = []
        self.server.fault = lambda handler: during.append([signal.getsignal(number) for number in handlers])
        heard = []
        for own in (signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: heard.append(number)):
            with self.subTest(own):
                for number in handlers:
                    signal.signal(number, own)
                del during[:]
                self.etc('info', '-r', 'X')
                self.assertEqual([handler == own for handler in during[0]], [own != signal.SIG_DFL] * 2)
                self.assertEqual([signal.getsignal(number) for number in handlers], [own] * 2)
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        del during[:]
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.etc, 'info', '-r', 'X').result()
        self.assertEqual(during[0], [signal.SIG_DFL] * 2)
        self.assertEqual(self.leftovers(), [])

    def broken_off(self, share, end=lambda process: process.kill()):
        """Break a pull off when a share of the data has come; gives a function that pulls, and counts the bytes."""
        stuck, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        size = len(next(iter(self.server.objects.values()))[0])

        def fault(handler):
            if handler.headers.get('Range', 'bytes=-').startswith('bytes=-'):
                return
            start, stop = asked_range(handler.headers, size)
            is_last = stop > size - 65536  # which may begin before
            if start < size - 65536 and (start >= share * size or is_last):
                stuck.set()
                return go_on.wait(30)
        self.server.fault = fault
        self.settings['connections'] = 10
        process = self.spawn_with_settings('pull', 'X')
        self.assertTrue(stuck.wait(20))
        self.wait_for_journal(share * size - 8 * MIB)
        end(process)
        process.communicate()
        self.assertEqual(self.installed(), [])
        self.server.fault = None
        go_on.set()
        before = self.server.sent
        return lambda: (self.etc('pull', 'X'), self.server.sent - before)[1] / size

    def spawn_with_settings(self, *args):
        self.etc('ls')  # writes the settings
        return self.spawn('--config', self.tmp / 'settings.yaml', *args)

    def wait_for_journal(self, size):
        """Until a pull has written so much of its archive."""
        def written():
            lines = b''.join(path.read_bytes() for path in (self.tmp / 'home/.etcetera/staging').glob('*/journal'))
            return sum(map(int, re.findall(rb'^\[".*?", (\d+), ', lines, re.M)))
        until = time.time() + 30
        while written() < size:
            self.assertLess(time.time(), until)
            time.sleep(0.02)

    def large(self, size=20):
        files = {'data/train/big': noise(size * MIB), 'data/train/\u00e9' + 'x' * 120: noise(100), 'README.md': 'hello'}
        files.update({'data/train/%04d' % n: noise(1500) for n in range(1500)})
        files.update({'data/train/m/%d' % n: noise(MIB // 2) for n in range(size)})
        files.update({'data/test/%d' % n: noise(300000) for n in range(10)})
        self.root = write(self.tmp / 'ds', files)
        (self.root / 'data/train/0000').chmod(0o755)
        self.share(self.root, home='pub')
        return len(next(iter(self.server.objects.values()))[0])

    @unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
    def test_resume(self):
        self.large()
        for share in (0.5, 0.9):
            with self.subTest(share=share):
                rest = self.broken_off(share)
                self.assertLess(rest(), 1.25 - share)  # what is under way is lost
                self.assertEqual(tree(self.tmp / 'home/X'), tree(self.root))
                self.etc('verify', 'X')
                self.assertEqual(self.leftovers(), [])
                self.etc('purge', 'X')

    @unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
    def test_resume_again_and_again(self):
        self.large()
        for share in (0.3, 0.9, 0.4):
            rest = self.broken_off(share, lambda process: process.send_signal(signal.SIGINT))
        self.assertEqual(len(self.leftovers()), 1)
        self.assertLess(rest(), 0.5)
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.root))

    @unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
    def test_resume_trusts_nothing(self):
        self.large(12)

        def staged():
            outer, = (self.tmp / 'home/.etcetera/staging').iterdir()
            return outer / 'new'

        def change(path):
            path.chmod(0o644)
            data = path.read_bytes()
            path.write_bytes(data[:99] + b'x' + data[100:])

        def forge():
            lines = (staged().parent / 'journal').read_bytes().splitlines()
            lines[-1] = lines[-1].replace(b'"data/train", ', b'"data/train", 1')
            (staged().parent / 'journal').write_bytes(b'\n'.join(lines))
        for what, harm in (
                ('a changed file', lambda: change(staged() / 'data/train/1200')),
                ('a new file', lambda: (staged() / 'data/test/00').write_bytes(b'new')),
                ('another dataset', lambda: self.etc('register', '-f', small(self.tmp / 'other'), 'X', home='pub') and self.etc(
                    'push', '-f', 'X', home='pub'))):
            with self.subTest(what):
                rest = self.broken_off(0.9)
                harm()
                rest()
                self.etc('verify', 'X')
                self.assertEqual(tree(self.tmp / 'home/X'), tree(Path(os.path.realpath(str(self.tmp / 'pub/X')))))
                self.etc('purge', 'X')
        self.etc('register', '-f', self.root, 'X', home='pub')
        self.etc('push', '-f', 'X', home='pub')
        self.broken_off(0.9)
        forge()
        # refused in the end, and then forgotten
        self.assertRegex(self.etc('pull', 'X', status=1)[1], r'violates the format \(end\);|a block does not start where')
        self.assertEqual((self.installed(), self.leftovers()), ([], []))
        self.etc('pull', 'X')
        self.etc('verify', 'X')

    def test_lost_network_keeps_what_came(self):
        size = self.large()
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        self.settings['connections'] = 10

        def fault(handler):
            start = re.match(r'bytes=(\d+)', handler.headers.get('Range', ''))
            if start and size / 2 <= int(start.group(1)) < size - 65536:
                handler.close_connection = True
                return True
        self.server.fault = fault
        self.assertIn('cannot reach %s: ' % self.server.url, self.etc('pull', 'X', status=1)[1])
        self.assertEqual((self.installed(), len(self.leftovers())), ([], 1))
        self.etc('create', 'Y')
        self.assertEqual(len(self.leftovers()), 1, 'another dataset leaves it alone')
        self.server.fault, before = None, self.server.sent
        self.etc('pull', 'X')
        self.assertLess(self.server.sent - before, size * 0.8)
        self.assertEqual((tree(self.tmp / 'home/X'), self.leftovers()), (tree(self.root), []))
        self.server.fault = fault
        self.assertIn('cannot reach %s: ' % self.server.url, self.etc('pull', 'X', home='two', status=1)[1])
        for path in self.leftovers('two'):
            os.utime(str(path), (1, 1))
            os.utime(str(path / 'new'), (1, 1))
        self.etc('create', 'Y', home='two')
        self.assertEqual(self.leftovers('two'), [])

    @unittest.skipIf(os.name == 'nt', 'open files cannot be moved')
    def test_readers_of_what_is_replaced(self):
        self.publish(MIB)
        self.etc('pull', 'X')
        before = tree(self.tmp / 'home/X')
        here = os.open(str(self.tmp / 'home/X'), os.O_RDONLY)
        self.addCleanup(os.close, here)
        write(self.root, {'data/train/new': 'new'})
        self.etc('push', '-f', 'X', home='pub')
        self.etc('pull', '-f', 'X')
        self.assertEqual(tree('/proc/self/fd/%d' % here) if os.path.isdir('/proc/self/fd') else before, before)
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.root))
        old, = (self.tmp / 'home/.etcetera/old').iterdir()
        self.etc('create', 'Y')
        self.assertTrue(old.exists())
        os.utime(str(old), (1, 1))
        self.etc('create', 'Z')
        self.assertFalse(old.exists())

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interrupted_push(self):
        self.publish()
        write(self.root, {'data/train/new': noise(30 * MIB)})
        for name, status in (('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)):
            with self.subTest(name):
                started, later = threading.Event(), ['SIGHUP', 'SIGTERM', 'SIGHUP'] if name == 'SIGHUP' else []

                def fault(handler):
                    if 'partNumber=3' in handler.path:
                        started.set()
                        time.sleep(1)
                    if handler.command == 'DELETE' and later:  # as a terminal that closes may send several
                        while later:
                            process.send_signal(getattr(signal, later.pop()))
                        return handler.answer(503) or True
                self.server.fault = fault
                process = self.spawn('push', '-f', 'X', home='pub')
                self.assertTrue(started.wait(20))
                process.send_signal(getattr(signal, name))
                err = process.communicate()[1].decode()
                self.assertEqual((process.returncode, err), (status, 'etc: interrupted\n'))
                self.assertEqual(self.server.uploads, {})

    def swaps(self):
        """Replace a dataset many times; how often its name was seen to be absent."""
        self.publish(MIB)
        write(self.tmp / 'new', {'data/train/x': 'new'})
        self.etc('pull', 'X')
        self.etc('register', '-f', self.tmp / 'new', 'X', home='pub')
        self.etc('push', '-f', 'X', home='pub')
        absent, stop = [], threading.Event()

        def watch():
            while not stop.is_set():
                if not os.path.lexists(str(self.tmp / 'home/X')):
                    absent.append(1)
        thread = threading.Thread(target=watch)
        thread.start()
        for _ in range(10):
            self.etc('pull', '-f', 'X')
            self.etc('register', '--copy', '-f', self.root, 'X')
        stop.set()
        thread.join()
        self.assertEqual(self.leftovers(), [])
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.root))
        return len(absent)

    def test_replacing_is_atomic(self):
        one, other = write(self.tmp, {'swap/one/1': '1', 'swap/other/2': '2'}) / 'swap/one', self.tmp / 'swap/other'
        if etc._swap(str(one), str(other)):  # else this system cannot
            self.assertEqual((os.listdir(str(one)), os.listdir(str(other))), (['2'], ['1']))
            self.assertEqual(self.swaps(), 0)
        elif sys.platform.startswith('linux'):
            self.fail('renameat2 does not work')

    def test_replacing_where_names_cannot_be_swapped(self):
        swap = etc._swap
        self.addCleanup(setattr, etc, '_swap', swap)
        etc._swap = lambda one, other: False
        self.swaps()

    def test_what_cannot_be_moved(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        problem = 'cannot change what is in %s: Permission denied;' % (self.tmp / 'home')
        rename = os.rename
        self.addCleanup(setattr, os, 'rename', rename)
        swap, etc._swap = etc._swap, lambda one, other: False
        self.addCleanup(setattr, etc, '_swap', swap)

        def busy(old, new):
            if str(old).endswith('X'):
                raise PermissionError(13, 'Permission denied', old)
            rename(old, new)
        os.rename = busy
        self.assertIn(problem, self.etc('register', '--copy', '-f', self.tmp / 'ds', 'X', status=1)[1])

        def half(old, new):
            if 'staging' in str(old) and str(new).endswith('X'):
                raise PermissionError(13, 'Permission denied', old)
            rename(old, new)
        os.rename = half
        self.assertIn(problem, self.etc('register', '--copy', '-f', self.tmp / 'ds', 'X', status=1)[1])
        os.rename = rename
        self.etc('verify', 'X')
        self.assertEqual(self.leftovers(), [])

    def test_killed_while_it_replaces_in_two_renames(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        digest = etc.verify('X', config=self.config())
        swap, rename = etc._swap, os.rename
        self.addCleanup(setattr, etc, '_swap', swap)
        self.addCleanup(setattr, os, 'rename', rename)
        etc._swap = lambda one, other: False
        program = """
import os, sys
sys.path.insert(0, sys.argv[1])
import etcetera as etc
rename = os.rename
def die(old, new):
    rename(old, new)
    if str(old).endswith('X'):
        os._exit(9)
etc._swap, os.rename = lambda one, other: False, die
sys.exit(etc.main(sys.argv[2:]))
"""
        write(self.tmp / 'ds', {'data/train/new': 'new'})
        command = ['--home', self.tmp / 'home', 'register', '-f', '--copy', self.tmp / 'ds', 'X']
        self.assertEqual(subprocess.call([sys.executable, '-c', program, str(HERE)] + list(map(str, command))), 9)
        self.assertFalse(os.path.lexists(str(self.tmp / 'home/X')))
        self.assertEqual(self.installed(), ['X'])
        self.assertEqual(etc.verify('X', config=self.config()), digest)

        def purge(old, new):
            os.rename = rename
            rename(old, new)
            if str(new).endswith('X'):
                etc._Home(self.tmp / 'home').remove('X')
        os.rename = lambda old, new: purge(old, new) if str(old).endswith('new') else rename(old, new)
        err = self.etc('register', '-f', '--copy', self.tmp / 'ds', 'X', status=1)[1]
        self.assertIn('no directory %s' % (self.tmp / 'home/X'), err)
        self.assertEqual(self.installed(), [], 'a purge stays one')

    def test_killed_between_two_renames(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        digest = etc.verify('X', config=self.config())
        aside = self.tmp / 'home/.etcetera/replaced/X@host@1@00'
        aside.parent.mkdir()
        os.rename(str(self.tmp / 'home/X'), str(aside))
        self.assertEqual(self.installed(), ['X'])
        self.assertEqual(etc.verify('X', config=self.config()), digest)
        self.assertEqual(self.leftovers(), [])

    def test_many_at_once(self):
        self.publish()
        self.server.sent = 0
        code = 'import sys; sys.path.insert(0, %r); import etcetera as e; print(e.dataset("X", auto_install=True, ' \
               'config=e.Config(%r, home=%r, **%r)).digest)' % (str(HERE), self.url, str(self.tmp / 'home'), self.settings)
        processes = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                     for _ in range(8)]
        results = [process.communicate() for process in processes]
        self.assertEqual({out.decode().strip() for out, _ in results}, {etc.Dataset(self.root).digest}, results)
        self.assertEqual(self.leftovers(), [])
        self.assertLess(self.server.sent, 1.5 * 20 * MIB)

    def test_many_at_once_without_locks(self):
        self.publish(4 * MIB)
        lock = etc._Home.lock
        self.addCleanup(setattr, etc._Home, 'lock', lock)
        etc._Home.lock = lambda home, name: contextlib.suppress()
        results = []

        def pull():
            results.append(etc.pull('X', config=self.config()).digest)
        threads = [threading.Thread(target=pull) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(results, [etc.Dataset(self.root).digest] * 6)
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.root))
        self.assertEqual(self.leftovers(), [])
        self.etc('verify', 'X')

    def test_force_repairs_what_is_invalid(self):
        self.share(small(self.tmp / 'ds'), home='pub')
        for name, spoil in (('a stray file', lambda root: write(root, {'data/stray': 'x'})),
                            ('a link to nothing', lambda root: os.symlink('nowhere', str(root / 'link')))):
            with self.subTest(name):
                self.etc('pull', 'X')
                spoil(self.tmp / 'home/X')
                self.etc('pull', '-f', 'X')
                self.assertEqual(tree(self.tmp / 'home/X'), tree(self.tmp / 'ds'))
                self.etc('purge', 'X')

    def test_receipts_that_are_odd(self):
        """What is no receipt tells nothing; one with odd times is still one."""
        self.share(small(self.tmp / 'ds'), home='pub')
        self.etc('pull', 'X')
        path, = (self.tmp / 'home/.etcetera/receipts').iterdir()
        good = json.loads(path.read_text())
        bad = [dict(good, **{key: value}) for key in ('digest', 'source', 'version', 'when', 'installed')
               for value in (None, 5, ['x', 5], {}) if (key, value) != ('installed', None)]
        bad += [dict(good, segments=[dict(good['segments'][0], **{key: value})]) for key in good['segments'][0] for value in (None, [], 1.5)]
        bad.append(dict(good, segments=[dict(good['segments'][0], path='data/\ud800')]))
        for text in [json.dumps(receipt) for receipt in bad] + ['[' * 100000, 'null', '5', '{}', '"x"', '']:
            with self.subTest(text[:200]):
                path.write_text(text)
                self.assertIsNone(etc.info('X', config=self.config())['when'])
                for command in (['ls', '-l'], ['verify', 'X'], ['pull', 'X'], ['push', 'X'], ['info', 'X']):
                    self.etc(*command)
        for when in ('', 'x', '9999-12-31T23:59:59Z', '0001-01-01T00:00:00Z', '2050-01-01T00:00:00+99:99'):
            with self.subTest(when):
                path.write_text(json.dumps(dict(good, when=when)))
                self.assertEqual(etc.info('X', config=self.config())['when'], when)
                for command in (['ls', '-l'], ['info', 'X']):
                    self.etc(*command)

    def test_receipts_follow_their_directories(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        old = self.tmp / 'home/X'
        digest = etc.dataset('X', config=self.config())._digest
        self.assertIsNotNone(digest)
        write(old, {'extra': 'something'})
        self.assertNotEqual(etc.dataset('X', config=self.config()).digest, digest)
        shutil.rmtree(str(old))
        shutil.copytree(str(self.tmp / 'ds'), str(old))
        self.assertEqual(etc.dataset('X', config=self.config()).digest, digest)
        self.etc('purge', 'X')
        self.assertEqual(list((self.tmp / 'home/.etcetera/receipts').iterdir()), [])

    def test_live_staging_stays_however_old(self):
        staging = self.tmp / 'home/.etcetera/staging' / ('X@%s@%d@aa' % (etc._host(), os.getppid()))
        staging.mkdir(parents=True)
        os.utime(str(staging), (1, 1))
        self.etc('create', 'Y')
        self.assertTrue(staging.exists())
        staging.rmdir()

    def test_stale_staging_goes_and_live_staging_stays(self):
        staging = self.tmp / 'home/.etcetera/staging'
        host = etc._host()
        dead = subprocess.Popen([sys.executable, '-c', ''])
        dead.wait()
        names = ['X@%s@%d@aa' % (host, os.getppid()), 'X@%s@%d@bb' % (host, dead.pid), 'X@elsewhere@1@cc', 'X@elsewhere@1@dd']
        for name in names:
            (staging / name / 'data').mkdir(parents=True)
        os.utime(str(staging / names[3]), (1, 1))
        self.etc('create', 'Y')
        self.assertEqual(sorted(os.listdir(str(staging))), sorted([names[0], names[2]]))

    def test_home_that_cannot_be_written(self):
        self.publish(MIB)
        write(self.tmp, {'file': 'x', 'locked': None})
        err = self.etc('pull', 'X', home='file/home', status=1)[1]
        self.assertIn(('Not a directory: ' if os.name == 'posix' else '') + str(self.tmp / 'file'), err)
        if os.name == 'posix' and os.geteuid() != 0:  # root may write anywhere
            (self.tmp / 'locked').chmod(0o555)
            self.assertIn('Permission denied', self.etc('pull', 'X', home='locked', status=1)[1])


PICKY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>
#define REFUSE(code) { errno = code; return -1; }
#define OPEN(name) int name(const char *path, int flags, ...) { \
    static int (*next)(const char *, int, ...); \
    va_list list; va_start(list, flags); mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0; va_end(list); \
    if (!next) next = dlsym(RTLD_NEXT, #name); \
    if ((flags & O_CREAT) && (flags & O_ACCMODE) != O_RDONLY && !(mode & 0200)) REFUSE(EACCES) \
    return next(path, flags, mode); }
OPEN(open)
OPEN(open64)
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
#define OPEN(name) int name(const char *path, int flags, ...) { \
    static int (*next)(const char *, int, ...); \
    if (!next) next = dlsym(RTLD_NEXT, #name); \
    return next(path, flags, 0777); }
OPEN(open)
OPEN(open64)
int symlink(const char *a, const char *b) { errno = EPERM; return -1; }
int symlinkat(const char *a, int b, const char *c) { errno = EPERM; return -1; }
"""


class PullReuse(S3Case):
    """What any installed dataset has is not fetched again."""

    def setUp(self):
        super().setUp()
        self.old = write(self.tmp / 'old', {'data/train/%d' % n: noise(MIB, n) for n in range(4)})
        write(self.old, {'data/test/x': noise(2 * MIB, 9), 'data/test/y': ('->', 'x'), 'README.md': 'one'})
        self.new = self.tmp / 'new'
        shutil.copytree(str(self.old), str(self.new), symlinks=True)
        write(self.new, {'README.md': 'the second one'})
        self.share(self.old, 'Old', home='pub')
        self.share(self.new, 'New', home='pub')
        self.etc('pull', 'Old')

    def pulled(self, *args):
        """Pull; return how many bytes the server sent, and what was said."""
        before = self.server.sent
        err = self.etc('pull', *args)[1]
        self.etc('verify', args[-1])
        return self.server.sent - before, err

    def test_another_version(self):
        sent, err = self.pulled('New')
        self.assertLess(sent, 20000)
        self.assertRegex(err, r'pulled New: 7 files, 6\.29 MB in [^(]*; 6\.29 MB were here already')
        self.assertEqual(tree(self.tmp / 'home/New'), tree(self.new))
        self.etc('purge', 'Old')
        self.etc('verify', 'New')
        self.assertEqual(tree(self.tmp / 'home/New'), tree(self.new))

    @unittest.skipIf(os.name == 'nt', 'no links there')
    def test_files_are_shared_on_disk(self):
        self.etc('pull', 'New')
        self.assertTrue(os.path.samefile(str(self.tmp / 'home/Old/data/test/x'), str(self.tmp / 'home/New/data/test/x')))

    def test_another_name(self):
        self.share(self.old, 'Renamed', home='pub')
        sent, err = self.pulled('Renamed')
        self.assertLess(sent, 20000)
        self.assertRegex(err, r'pulled Renamed: 7 files, 6\.29 MB in [^(]*; 6\.29 MB were here already')

    def test_several_sources(self):
        write(self.tmp / 'third', {'data/val/v': noise(3 * MIB, 7)})
        self.share(self.tmp / 'third', 'Third', home='pub')
        self.etc('pull', 'Third')
        write(self.new, {'data/val/v': noise(3 * MIB, 7), 'data/more/m': noise(MIB, 8)})
        self.share(self.new, 'Sum', home='pub')
        sent, err = self.pulled('Sum')
        self.assertTrue(MIB < sent < MIB + 30000, sent)
        self.assertIn('; 9.44 MB were here already', err)
        self.assertEqual(tree(self.tmp / 'home/Sum'), tree(self.new))

    def test_some_partitions_and_the_rest(self):
        sent, err = self.pulled('-p', 'test', 'New')
        self.assertLess(sent, 20000)
        self.assertIn('pulled New: 3 files, 2.1 MB', err)
        self.assertEqual(os.listdir(str(self.tmp / 'home/New/data')), ['test'])
        self.etc('purge', 'Old')
        sent, err = self.pulled('New')
        self.assertTrue(4 * MIB < sent < 4.1 * MIB, sent)
        self.assertIn('; 2.1 MB were here already', err)
        self.assertEqual(tree(self.tmp / 'home/New'), tree(self.new))

    def test_forced(self):
        self.etc('push', '-f', 'New', home='pub')
        self.etc('register', self.new, 'Old', '-f', home='pub')
        self.etc('push', '-f', 'Old', home='pub')
        sent, err = self.pulled('-f', 'Old')
        self.assertLess(sent, 20000)
        self.assertEqual(tree(self.tmp / 'home/Old'), tree(self.new))

    def test_what_changed_is_fetched(self):
        """And nothing that was damaged here spreads."""
        path = self.tmp / 'home/Old/data/train/2'
        for name, damage in (
                ('other bytes', lambda: (os.chmod(str(path), 0o644), path.write_bytes(noise(MIB, 77)))),
                ('a file less', lambda: remove(path)),
                ('a file more', lambda: write(path.parent, {'2': noise(MIB, 2), 'more': 'm'})),
                ('no directory', lambda: remove(path.parent))):
            with self.subTest(name):
                damage()
                sent, err = self.pulled('New')
                self.assertTrue(4 * MIB < sent < 4.1 * MIB, sent)
                self.assertEqual(tree(self.tmp / 'home/New'), tree(self.new))
                self.etc('purge', 'New')

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_what_cannot_be_read_is_fetched(self):
        os.chmod(str(self.tmp / 'home/Old/data/test/x'), 0)
        with unprivileged(self.tmp / 'home', self.tmp):
            self.assertGreater(self.pulled('New')[0], 2 * MIB)
        self.assertEqual(tree(self.tmp / 'home/New'), tree(self.new))

    def test_changed_meanwhile(self):
        """What is linked is what was hashed, whatever happens to the other dataset."""
        write(self.new, {'data/train/2': noise(MIB, 22)})
        self.etc('register', '-f', self.new, 'Old', home='pub')

        def purge():
            self.etc('purge', 'Old')

        def replace():
            self.etc('pull', 'Old')
            self.etc('push', '-f', 'Old', home='pub')
            self.etc('pull', '-f', 'Old')

        for change in purge, replace:
            with self.subTest(change.__name__):
                calls = []

                def progress(done, total):
                    calls.append(done)
                    if len(calls) == 1:
                        time.sleep(0.3)  # so that it is called again with the first block
                    elif len(calls) == 2:
                        change()
                etc.pull('New', config=self.config(), progress=progress)
                self.assertGreater(len(calls), 1)
                self.etc('verify', 'New')
                self.assertEqual((self.tmp / 'home/New/data/train/2').read_bytes(), noise(MIB, 2))
                self.etc('purge', 'New')

    @unittest.skipIf(os.name == 'nt', 'no links there')
    def test_files_that_became_links(self):
        file = self.tmp / 'home/Old/data/train/2'
        os.rename(str(file), str(self.tmp / 'blob'))
        os.symlink(str(self.tmp / 'blob'), str(file))
        self.etc('pull', 'New')
        remove(self.tmp / 'blob')
        self.etc('verify', 'New')
        self.assertEqual(tree(self.tmp / 'home/New'), tree(self.new))

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_writable_files_are_copied(self):
        """So that nobody can change a file of one dataset in the other."""
        old, new = self.tmp / 'home/Old/data/test/x', self.tmp / 'home/New/data/test/x'
        os.chmod(str(old), 0o644)
        self.assertLess(self.pulled('New')[0], 20000)
        self.assertEqual(stat.S_IMODE(new.stat().st_mode), 0o444)
        old.write_bytes(b'changed')
        self.etc('verify', 'New')
        self.assertEqual(tree(self.tmp / 'home/New'), tree(self.new))

    def test_interrupted(self):
        """What could be linked is linked again."""
        write(self.new, {'data/late/%d' % n: noise(MIB, 50 + n) for n in range(20)})
        self.share(self.new, 'Long', home='pub')
        asked = itertools.count()

        def fault(handler):
            if next(asked) > 5:
                handler.error(403, 'AccessDenied')
                return True
        self.server.fault = fault
        self.etc('pull', 'Long', status=1)
        self.server.fault = None
        self.assertLess(self.pulled('Long')[0], 21 * MIB)
        self.assertEqual(tree(self.tmp / 'home/Long'), tree(self.new))
        self.assertEqual(self.leftovers(), [])

    def test_progress(self):
        def told(name):
            calls = []
            etc.pull(name, config=self.config(), progress=lambda done, total: calls.append((done, total)))
            self.assertEqual(calls[0][0], 0)
            self.assertEqual(calls, sorted(calls))
            self.assertEqual(calls[-1][0], calls[-1][1])
            return calls
        length = len(self.server.objects['some/prefix/New.tgz'][0])
        calls = told('New')
        self.assertTrue(length - 4096 < calls[-1][1] < length)
        self.etc('purge', 'New')
        remove(self.tmp / 'home/Old/data/train/3')
        self.assertGreater(told('New')[-1][1], length)


class Versions:
    """Two datasets that differ in a file, of which one is in the remote."""

    def setUp(self):
        super().setUp()
        self.old = write(self.tmp / 'old', {'data/test/y': noise(11 * MIB, 2), 'data/train/x': noise(12 * MIB, 1),
                                            'data/val/z': noise(11 * MIB, 3), 'README.md': 'one', 'assets/a': 'a'})
        self.share(self.old, 'Old')
        self.new = self.tmp / 'new'
        shutil.copytree(str(self.old), str(self.new), copy_function=os.link)
        self.change('README.md', 'the second one')
        self.etc('register', self.new, 'New')

    def change(self, name, content):
        os.unlink(str(self.new / name))
        write(self.new, {name: content})

    def check(self, name):
        self.etc('pull', name, home='other')
        self.assertEqual(tree(self.tmp / 'other' / name), tree(self.tmp / 'home' / name))
        self.etc('purge', name, home='other')


class PushReuse(Versions, S3Case):
    """What archives in the remote hold is copied there, and not sent."""

    def pushed(self, *args, fault=lambda handler: None):
        """Push; return how many bytes were sent, and what was said. What is there must be what was to be pushed."""
        sent = []

        def watch(handler):
            sent.append(int(handler.headers.get('Content-Length') or 0))
            return fault(handler)
        self.server.fault = watch
        err = self.etc('push', '-v', *args)[1]
        self.server.fault = None
        self.assertEqual(self.server.uploads, {})
        self.check(args[-1])
        return sum(sent), err

    def copies(self):
        return [headers['x-amz-copy-source-range'] for _, _, headers in self.server.log if headers['x-amz-copy-source']]

    def test_another_version(self):
        sent, err = self.pushed('New')
        self.assertLess(sent, 6 * MIB)
        self.assertRegex(err, r'pushed New to .*: 5 files, 35\.7 MB in [^(]*; 35\.7 MB were there already')
        self.assertEqual(len(self.copies()), 1)

    def test_another_name(self):
        self.etc('register', self.old, 'Renamed')
        self.assertLess(self.pushed('Renamed')[0], 20000)

    def test_one_partition_changed(self):
        for name, size, most in (('data/test/y', 11, 17), ('data/train/x', 12, 23), ('data/val/z', 11, 17)):
            with self.subTest(name):
                self.change(name, noise(size * MIB, name))
                self.etc('register', self.new, 'New' + name[5:7])
                sent, err = self.pushed('New' + name[5:7])
                self.assertTrue(size * MIB < sent < most * MIB, sent)

    def test_several_sources(self):
        """Long runs are copied, even if they come from another archive than the newest."""
        self.change('data/test/y', noise(11 * MIB, 4))
        self.etc('push', 'New')
        self.change('data/train/x', noise(12 * MIB, 5))
        self.change('README.md', 'the third')
        write(self.new, {'data/more/m': noise(MIB, 6)})
        self.etc('register', self.new, 'Third')
        sent, err = self.pushed('Third')
        self.assertTrue(13 * MIB < sent < 22 * MIB, sent)
        self.assertIn('; 23.1 MB were there already', err)

    def test_forced(self):
        self.etc('register', '-f', self.new, 'Old')
        self.assertLess(self.pushed('-f', 'Old')[0], 6 * MIB)
        self.assertEqual(len(self.server.objects), 1)

    def test_many_partitions(self):
        """Small ones are copied together, where they follow one another, and sent otherwise."""
        old = write(self.tmp / 'many', {'data/%02d/x' % n: noise(MIB, n) for n in range(40)})
        self.share(old, 'Many')
        for name, changed, most in (('none', [], 6), ('one', [20], 12), ('every third', range(0, 40, 3), 41)):
            with self.subTest(name):
                for n in changed:
                    write(old, {'data/%02d/x' % n: noise(MIB, '%s %d' % (name, n))})
                write(old, {'README.md': name})
                self.etc('register', old, 'X' + name[0])
                self.assertLess(self.pushed('X' + name[0])[0], most * MIB)

    def test_other_contents_of_the_same_size(self):
        self.change('data/train/x', noise(12 * MIB, 5))
        self.change('data/test/y', noise(11 * MIB, 6))
        self.change('data/val/z', noise(11 * MIB, 7))
        sent, err = self.pushed('New')
        self.assertTrue(34 * MIB < sent < 35 * MIB, sent)
        self.assertNotIn('already', err)

    def test_small_datasets_are_just_sent(self):
        self.etc('register', write(self.tmp / 'less', {'data/x/x': noise(16 * MIB, 2)}), 'Less')
        before = len(self.requests('GET'))
        self.etc('push', 'Less')
        self.assertEqual(len(self.requests('GET')) - before, 1)

    def test_sources_that_cannot_be_read(self):
        """Archives of other tools, damaged ones, archived ones: none hinders a push."""
        data, etag, headers = self.server.objects['some/prefix/Old.tgz']
        for name, bad in (('Damaged', data[:-20] + bytes(20)), ('Foreign', gzip.compress(data, 0)), ('Empty', bytes(30 * MIB))):
            self.server.objects['some/prefix/%s.tgz' % name] = bad, '"%s"' % name, headers

        def fault(handler):
            if handler.path.endswith('/Empty.tgz'):
                handler.error(403, 'InvalidObjectState')
                return True
            if handler.path.endswith('/Damaged.tgz'):
                tries.append(1)
                handler.close_connection = True
                return True
        tries = []
        self.assertLess(self.pushed('New', fault=fault)[0], 6 * MIB)
        self.assertLessEqual(len(tries), 4, 'no long wait: two, and each again if a kept connection was closed')

    def test_no_list(self):
        def fault(handler):
            if 'list-type' in handler.path:
                handler.error(403, 'AccessDenied')
                return True
        sent, err = self.pushed('New', fault=fault)
        self.assertGreater(sent, 33 * MIB)
        self.assertIn('etc: nothing is copied: %s answers 403 AccessDenied' % self.url, err)

    def test_stores_that_cannot_copy(self):
        """All is sent, and one line of -v tells why."""
        def refusing(status, code):
            def fault(handler):
                if handler.headers['x-amz-copy-source']:
                    handler.error(status, code)
                    return True
            return fault

        def unknowing(handler):  # stores an empty part
            if handler.headers['x-amz-copy-source']:
                number = re.search(r'partNumber=(\d+)', handler.path).group(1)
                list(self.server.uploads.values())[0][1][int(number)] = b''
                handler.answer(200, b'', {'ETag': '"x"'})
                return True

        def equal(handler):  # as R2
            if handler.command == 'POST' and 'uploadId' in handler.path and self.copies() and not done:
                done.append(1)
                handler.error(400, 'InvalidPart', message='All non-trailing parts must have the same length.')
                return True

        def replacing(handler):
            if handler.headers['x-amz-copy-source']:
                data, etag, headers = self.server.objects['some/prefix/Old.tgz']
                self.server.objects['some/prefix/Old.tgz'] = data, '"other"', headers

        def removing(handler):
            if handler.headers['x-amz-copy-source']:
                self.server.objects.pop('some/prefix/Old.tgz', None)

        def anonymous(handler):  # its parts have no ETag
            if handler.headers['x-amz-copy-source']:
                handler.answer(200, b'<CopyPartResult><ETag/></CopyPartResult>')
                return True

        kept = self.server.objects['some/prefix/Old.tgz']
        for name, fault, copied, said in (
                ('unknown', unknowing, None, 'did not copy a part of an object'),
                ('no ETag', anonymous, None, 'did not copy a part of an object'),
                ('not implemented', refusing(501, 'NotImplemented'), None, '501 NotImplemented'),
                ('always an error', refusing(200, 'InvalidRequest'), None, 'did not copy a part of an object'),
                ('forbidden', refusing(403, 'AccessDenied'), None, '403 AccessDenied'),
                ('equal parts', equal, None, 'All non-trailing parts must have the same length'),
                ('the whole object', None, lambda data, start, stop: data, 'did not copy a part of an object'),
                ('another range', None, lambda data, start, stop: data[start - 512:stop - 512], 'what was copied is damaged'),
                ('replaced meanwhile', replacing, None, 'was replaced while it was read'),
                ('removed meanwhile', removing, None, '404 NoSuchKey')):
            with self.subTest(name):
                done = []
                self.server.objects = {'some/prefix/Old.tgz': kept}
                self.server.copied = copied
                sent, err = self.pushed('New', fault=fault or (lambda handler: None))
                self.assertGreater(sent, 33 * MIB)
                self.assertRegex(err, 'etc: nothing is copied, so all is sent: .*' + said)
                self.assertNotIn('already', err)
        with self.subTest('then, faults are met with as many tries as ever'):
            def refusing_then_failing(handler):
                if handler.headers['x-amz-copy-source']:
                    handler.error(501, 'NotImplemented')
                    return True
                if 'partNumber=2' in handler.path and len(done) < 4:
                    done.append(1)
                    handler.error(503, 'SlowDown')
                    return True
            del done[:]
            self.server.objects = {'some/prefix/Old.tgz': kept}
            self.server.copied = None
            self.assertGreater(self.pushed('New', fault=refusing_then_failing)[0], 33 * MIB)
            self.assertEqual(len(done), 4)

    def test_amazon(self):
        """Which needs no second look. It is reached through a proxy here, and not over TLS."""
        del self.settings['endpoint_url']
        write(self.tmp, {'.aws/config': '[default]\ns3 =\n  addressing_style = path\n'})
        os.environ.update(http_proxy=self.server.url, no_proxy='')
        self.addCleanup(setattr, etc._AwsProfile, 'host', etc._AwsProfile.host)
        etc._AwsProfile.host = lambda aws, service, region: 'http://%s.%s.amazonaws.example' % (service, region)

        def proxy(handler):
            handler.path = re.sub('^http://[^/]*', '', handler.path)

        def replacing(handler):
            proxy(handler)
            if handler.headers['x-amz-copy-source']:
                data, etag, headers = self.server.objects['some/prefix/Old.tgz']
                self.server.objects['some/prefix/Old.tgz'] = data, '"other"', headers

        self.server.fault = proxy
        err = self.etc('push', '-v', 'New')[1]
        self.assertIn('were there already', err)
        self.assertFalse([path for path in self.requests() if 'max-parts' in path])
        self.check('New')
        self.server.objects.pop('some/prefix/New.tgz')
        self.server.fault = replacing
        self.assertIn('412 PreconditionFailed', self.etc('push', '-v', 'New')[1])
        self.check('New')

    def test_transient_errors_of_copies(self):
        """Which may come with status 200."""
        def fault(handler):
            mark = 'x-amz-copy-source' if handler.headers['x-amz-copy-source'] else 'max-parts' if 'max-parts' in handler.path else ''
            if mark and len(done[mark]) < 3:
                done[mark].append(1)
                if len(done[mark]) == 1:
                    handler.close_connection = True
                else:
                    handler.error(200 if len(done[mark]) == 2 and mark != 'max-parts' else 503, 'InternalError')
                return True
        done = {'x-amz-copy-source': [], 'max-parts': []}
        self.assertLess(self.pushed('New', fault=fault)[0], 6 * MIB)
        self.assertEqual([len(found) for found in done.values()], [3, 3])

    def test_damaged_source(self):
        """Where copies begin, what they hold is compared with the files."""
        data, etag, headers = self.server.objects['some/prefix/Old.tgz']
        at = data.index(b'data/test/\0')
        other = data.replace(b'data/test/y\0', b'data/test/z\0')  # sound, but for its checksums
        for name, bad in (('broken', data[:at] + b'D' + data[at + 1:]), ('another', other)):
            with self.subTest(name):
                self.server.objects = {'some/prefix/Old.tgz': (bad, etag, headers)}
                sent, err = self.pushed('New')
                self.assertGreater(sent, 33 * MIB)
                self.assertIn('etc: nothing is copied, so all is sent: what was copied is damaged', err)

    def test_repair(self):
        """To push what is there already, by force, copies nothing: it may be damaged where nobody looks."""
        data, etag, headers = self.server.objects['some/prefix/Old.tgz']
        middle = len(data) // 2
        self.server.objects['some/prefix/Old.tgz'] = data[:middle] + bytes(MIB) + data[middle + MIB:], etag, headers
        self.assertIn("'etc push -f Old' from an intact copy repairs it", self.etc('pull', 'Old', home='other', status=1)[1])
        sent, err = self.pushed('-f', 'Old')
        self.assertGreater(sent, 33 * MIB)
        self.assertNotIn('already', err)

    def test_damage_does_not_stay(self):
        """Whether or not the rest can be sent."""
        def fault(handler):
            words = handler.command, handler.path.partition('?')[2]
            if words == ('POST', 'uploads='):
                begun.append(1)
            if len(begun) > 1 and words == ('POST', 'uploads=') or handler.command == refused:
                handler.error(403, 'AccessDenied')
                return True

        self.server.copied = lambda data, start, stop: bytes(stop - start)
        for refused, said, left in ((None, '403 AccessDenied', []),
                                    ('DELETE', "is damaged, and cannot be removed: .* 403 .*'etc push -f New' replaces it", ['New'])):
            with self.subTest(refused):
                begun = []
                self.server.fault = fault
                self.assertRegex(self.etc('push', 'New', status=1)[1], said)
                self.server.fault = None
                self.assertEqual(sorted(key[12:-4] for key in self.server.objects), left + ['Old'])
        self.pushed('-f', 'New')

    def test_another_push_is_faster(self):
        def fault(handler):
            if handler.headers['x-amz-copy-source']:
                self.server.objects['some/prefix/New.tgz'] = self.server.objects['some/prefix/Old.tgz']
        self.server.fault = fault
        self.assertIn("another 'New' is in", self.etc('push', 'New', status=1)[1])
        self.assertEqual(self.server.uploads, {})

    def test_object_lock(self):
        self.server.must_check = True
        self.assertLess(self.pushed('New')[0], 11 * MIB)  # the first part twice, as this is learned by a refusal

    def test_progress(self):
        self.change('data/test/y', noise(11 * MIB, 4))
        for force in False, True:
            with self.subTest(force=force):
                calls = []
                etc.push('New', force, config=self.config(), progress=lambda done, total: calls.append((done, total)))
                self.assertEqual(calls[0][0], 0)
                self.assertEqual(calls, sorted(calls))
                self.assertEqual(calls[-1][0], calls[-1][1])

    @unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
    def test_killed(self):
        """At each request of a push: nothing, or all, is there, and the next push succeeds."""
        self.pushed('New')
        before = len(self.server.log)
        self.server.objects.pop('some/prefix/New.tgz')
        self.etc('push', 'New')
        whole = self.server.objects['some/prefix/New.tgz'][0]
        for number in range(1, len(self.server.log) - before + 1, 1 if RUNS > 1 else 3):
            with self.subTest(number):
                self.server.objects.pop('some/prefix/New.tgz', None)
                self.server.uploads.clear()
                left = [number]

                def fault(handler):
                    left[0] -= 1
                    if left[0] == 0:
                        process.kill()
                self.server.fault = fault
                process = self.spawn('push', 'New')
                process.communicate()
                self.server.fault = None
                self.assertIn(self.server.objects.get('some/prefix/New.tgz', (None,))[0], (None, whole))
                self.etc('push', 'New')
                self.assertEqual(self.server.objects['some/prefix/New.tgz'][0], whole)


class FilePushReuse(Versions, Case):
    """What archives in a shared directory hold is copied there, and not packed."""

    def pushed(self, *args):
        err = self.etc('push', '-v', *args)[1]
        self.check(args[-1])
        return err

    def test_another_version(self):
        self.assertIn('; 35.7 MB were there already', self.pushed('New'))

    def test_one_partition_changed(self):
        for name, size in (('data/test/y', 11), ('data/train/x', 12), ('data/val/z', 11)):
            with self.subTest(name):
                self.change(name, noise(size * MIB, name))
                self.etc('register', self.new, 'New' + name[5:7])
                self.assertIn('; 2%s MB were there already' % ('3.1' if size == 12 else '4.1'), self.pushed('New' + name[5:7]))

    def test_forced(self):
        self.etc('register', '-f', self.new, 'Old')
        self.assertIn('; 35.7 MB were there already', self.pushed('-f', 'Old'))

    @unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
    def test_killed(self):
        begin = time.time()
        self.pushed('New')
        lasts = time.time() - begin
        whole = (self.tmp / 'share/New.tgz').read_bytes()
        rng = random.Random(1)
        for number in range(3 * RUNS):
            remove(self.tmp / 'share/New.tgz')
            process = self.spawn('push', 'New')
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.2, 1) * lasts)
            process.kill()
            process.communicate()
            if (self.tmp / 'share/New.tgz').exists():
                self.assertEqual((self.tmp / 'share/New.tgz').read_bytes(), whole)
            self.etc('push', 'New')
            self.assertEqual((self.tmp / 'share/New.tgz').read_bytes(), whole)

    def test_damaged_source(self):
        path = self.tmp / 'share/Old.tgz'
        data = path.read_bytes()
        at = data.index(b'data/test/\0')
        path.write_bytes(data[:at] + b'D' + data[at + 1:])
        self.assertIn('nothing is copied, so all is sent: what was copied is damaged', self.pushed('New'))

    def scribble(self, path):
        with open(str(path), 'r+b') as file:
            file.seek(20 * MIB)
            file.write(b'scribble')

    def test_replaced_meanwhile(self):
        for name, replace in (('replaced', lambda: os.utime(str(self.tmp / 'share/Old.tgz'), (1, 1))),
                              ('changed', lambda: self.scribble(self.tmp / 'share/Old.tgz')),
                              ('removed', lambda: remove(self.tmp / 'share/Old.tgz'))):
            with self.subTest(name):
                said = []
                handler = logging.Handler()
                handler.emit = lambda record: said.append(record.getMessage())
                logging.getLogger('etcetera').addHandler(handler)
                logging.getLogger('etcetera').setLevel(logging.DEBUG)
                etc.push('New', config=self.config(), progress=lambda done, total: replace() if done else None)
                self.check('New')
                self.assertIn('was replaced while it was read', ' '.join(said))
                remove(self.tmp / 'share/New.tgz')
                logging.getLogger('etcetera').removeHandler(handler)


class Disks(Case):
    """File systems that cannot do all that is usual."""

    def publish(self):
        self.share(odd(self.tmp / 'ds', 40), home='pub')

    def preload(self, source):
        """Put functions in C before those of the system, in the processes that are spawned."""
        write(self.tmp, {'disk.c': source})
        subprocess.check_call(['gcc', '-shared', '-fPIC', '-o', str(self.tmp / 'disk.so'), str(self.tmp / 'disk.c'), '-ldl'])
        os.environ['LD_PRELOAD'] = str(self.tmp / 'disk.so')

    @unittest.skipUnless(sys.platform == 'linux' and shutil.which('gcc'), 'no gcc here')
    def test_disk_without_modes_and_links(self):
        """As exFAT: all files are executable, and there are no symbolic links."""
        self.publish()
        self.etc('register', small(self.tmp / 'small'), 'Y', home='pub')
        self.etc('push', 'Y', home='pub')
        self.preload(NO_MODES)
        for command, said in (
                (['pull', 'X'], "this disk cannot hold links: Operation not permitted; set 'home' to a place on another disk"),
                (['register', str(self.tmp / 'ds')], "this disk cannot hold links: Operation not permitted; 'etc register --copy'"),
                (['pull', 'Y'], 'pulled Y'),
                (['verify', 'Y'], "; this disk does not keep executable bits; set 'home' to a place on another")):
            with self.subTest(command):
                self.assertIn(said, self.spawn(*command).communicate()[1].decode())

    @unittest.skipUnless(sys.platform == 'linux' and shutil.which('gcc'), 'no gcc here')
    def test_disk_that_is_picky(self):
        """It opens no read-only file for writing, makes no hard links, and changes no modes."""
        self.publish()
        self.preload(PICKY)
        for command in (['pull', '-p', 'test', 'X'], ['pull', 'X'], ['pull', '-f', 'X'], ['verify', 'X'],
                        ['register', '--copy', str(self.tmp / 'ds'), 'Y'], ['push', 'Y'], ['purge', 'Y']):
            with self.subTest(command):
                process = self.spawn(*command)
                self.assertEqual((process.communicate()[1][:5], process.returncode), (b'etc: ', 0), command)
        del os.environ['LD_PRELOAD']
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.tmp / 'ds'))
        self.assertEqual(sorted(os.listdir(str(self.tmp / 'share'))), ['X.tgz', 'Y.tgz'])

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_files_end_up_read_only_even_so(self):
        """Where opening is refused, but chmod is not."""
        self.publish()
        opened = os.open
        self.addCleanup(setattr, os, 'open', opened)

        def picky(path, flags, mode=0o777, **kwargs):
            if flags & os.O_CREAT and not mode & 0o200:
                raise PermissionError(13, 'Permission denied', path)
            return opened(path, flags, mode, **kwargs)
        os.open = picky
        self.etc('pull', 'X')
        os.open = opened
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.tmp / 'ds'))
        for path in (self.tmp / 'home/X').rglob('*'):
            if path.is_file():
                self.assertFalse(path.stat().st_mode & 0o222, path)

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_read_only_store(self):
        self.publish()
        self.etc('pull', 'X')
        self.assertIn("no dataset 'Z'", self.etc('pull', 'Z', status=1)[1])
        remove(self.tmp / 'home/.etcetera/locks')
        places = [path for path in (self.tmp / 'home').rglob('*') if path.is_dir()] + [self.tmp / 'home']
        for path in places:
            path.chmod(0o555)
        try:
            with unprivileged(self.tmp / 'settings.yaml'):
                self.assertIn('installed already, and identical', self.etc('pull', 'X')[1])
                self.assertEqual(self.etc('ls')[0], 'X\n')
                self.assertEqual(etc.dataset('X', auto_install=True, config=self.config()).keys(), {'empty', 'test', 'train'})
                self.etc('verify', 'X')
                for command in (['pull', '-f', 'X'], ['purge', 'X'], ['create', 'Y'], ['register', self.tmp / 'ds', 'Y'],
                                ['register', '-f', self.tmp / 'ds', 'X'], ['register', '--copy', self.tmp / 'ds', 'Y']):
                    with self.subTest(command):
                        self.assertIn("cannot change what is in %s: Permission denied; ask who owns it, or set 'home'" % (self.tmp / 'home'),
                                      self.etc(*command, status=1)[1])
        finally:
            for path in places:
                path.chmod(0o755)
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.tmp / 'ds'))

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_read_only_directories_are_replaced(self):
        self.publish()
        self.assertIn("no dataset 'Z'", self.etc('pull', 'Z', status=1)[1])
        for what, exchange in (('in one step', etc._swap), ('in two', lambda one, other: False)):
            with self.subTest(what):
                self.addCleanup(setattr, etc, '_swap', etc._swap)
                etc._swap = exchange
                self.etc('pull', '-p', 'test', 'X')
                with unprivileged(self.tmp):
                    for command in (['pull', 'X'], ['pull', '-f', 'X'], ['purge', 'X']):
                        for path in [self.tmp / 'home/X'] + [p for p in (self.tmp / 'home/X').rglob('*') if p.is_dir() and not p.is_symlink()]:
                            path.chmod(0o555)
                        self.etc(*command)
                self.assertEqual((self.installed(), self.leftovers()), ([], []))

    def test_what_a_dead_process_left(self):
        """It does not bring back what was purged."""
        self.publish()
        self.etc('pull', 'X')
        write(self.tmp / 'home/.etcetera/replaced', {'X@other@0@abcd': None})
        self.etc('purge', 'X')
        self.assertEqual(self.installed(), [])

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_what_was_private_stays_private(self):
        self.publish()
        self.etc('pull', 'X')
        for what, exchange in (('in one step', etc._swap), ('in two', lambda one, other: False)):
            with self.subTest(what):
                self.addCleanup(setattr, etc, '_swap', etc._swap)
                etc._swap = exchange
                (self.tmp / 'home/X').chmod(0o500)
                self.etc('pull', '-f', 'X')
                old, = (self.tmp / 'home/.etcetera/old').iterdir()
                self.assertEqual(stat.S_IMODE(old.stat().st_mode), 0o700)
                remove(old)

    def test_nothing_is_removed_for_what_cannot_come(self):
        """Where the store's own directory is on another disk, nothing can be installed."""
        (self.tmp / 'home/.etcetera').mkdir(parents=True)
        elsewhere = ['unshare', '-m', 'sh', '-c', 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"', 'sh', str(self.tmp / 'home/.etcetera')]
        if sys.platform != 'linux' or subprocess.run(elsewhere + ['true'], stdout=subprocess.PIPE, stderr=subprocess.PIPE).returncode:
            self.skipTest('nothing can be mounted here')
        self.publish()
        small(self.tmp / 'home/X')
        before = tree(self.tmp / 'home/X')
        done = subprocess.run(elsewhere + [sys.executable, SCRIPT, '--url', self.url, '--home', str(self.tmp / 'home'), 'pull', '-f', 'X'],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn('cross-device', done.stdout)
        self.assertEqual(tree(self.tmp / 'home/X'), before)

    def test_what_is_being_removed_is_not_there(self):
        """Another process takes away, in its place, what cannot be renamed; or it did so, and was killed."""
        self.publish()
        self.etc('pull', 'X')
        going = self.tmp / 'home/.etcetera/successors/X@another-host@1@12345678'
        write(self.tmp / 'home', {'.etcetera/successors/X@another-host@1@12345678': ''})
        self.assertEqual(self.installed(), [])
        with self.assertRaisesRegex(etc.NotFound, "no local dataset 'X'"):
            etc.dataset('X', config=self.config())
        self.etc('pull', '-f', 'X')  # which comes later, so it is what stays
        self.assertEqual((self.installed(), going.exists()), (['X'], False))
        write(self.tmp / 'home', {'.etcetera/successors/X@another-host@1@12345678': ''})
        os.utime(str(going), (1, 1))
        self.assertEqual((self.installed(), going.exists(), (self.tmp / 'home/X').exists()), ([], False, False))

    OVERLAY = """
        set -e
        mount -t tmpfs tmpfs "$1/over"
        mkdir "$1/over/upper" "$1/over/work"
        mount -t overlay overlay -o "lowerdir=$1/image,upperdir=$1/over/upper,workdir=$1/over/work" "$1/home"
        shift
        exec "$@"
    """

    def overlaid(self, *command, **kwargs):
        """Run a command in which home is an overlay over `image`, as in a container; its changes vanish with it."""
        return subprocess.run(['unshare', '-m', 'sh', '-c', self.OVERLAY, 'sh', str(self.tmp)] + list(command), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, **kwargs)

    def test_overlay(self):
        """Directories of a lower layer cannot be renamed (EXDEV)."""
        for name in ('over', 'home', 'image'):
            (self.tmp / name).mkdir()
        if sys.platform != 'linux' or self.overlaid('true').returncode:
            self.skipTest('no overlay can be mounted here')
        self.publish()
        self.etc('pull', '-p', 'test', 'X', home='image')
        self.etc('register', '--copy', small(self.tmp / 'small'), 'Y', home='image')
        program = r"""
import os, sys
sys.path.insert(0, sys.argv[1])
import etcetera as etc
config = etc.Config(sys.argv[2], sys.argv[3])
try:
    os.rename(sys.argv[3] + '/X', sys.argv[3] + '/Z')
    sys.exit('this overlay renames')
except OSError as e:
    print(e.errno)
remove = etc._remove
class Killed(BaseException): pass
def killed(path):
    if path.name in 'XY' and not etc.stop:
        etc.stop = True
        remove(path / 'data')
        print('meanwhile', etc.ls(config=config))
        raise Killed
    remove(path)
etc.stop = True
etc._remove = killed
for task in sys.argv[4:]:
    print(task, flush=True)
    name = task.rpartition(' ')[2].rstrip('!')
    etc.stop = not task.endswith('!')
    try:
        if task.startswith('pull -f'): etc.pull(name, force=True, config=config)
        elif task.startswith('pull'): etc.pull(name, config=config)
        elif task.startswith('purge'): etc.purge(name, config=config)
        elif task.startswith('push'): print(etc.push(name, config=config))
        elif task.startswith('ls'): print(etc.ls(config=config))
        elif task == 'forget': open('/proc/sys/vm/drop_caches', 'w').write('2')  # directories of a lower layer get other inodes
        elif task.startswith('verify'): print(etc.verify(name, config=config))
        print('done')
    except Killed:
        for kind in os.listdir(sys.argv[3] + '/.etcetera'):  # as if its process were gone
            for left in os.listdir(sys.argv[3] + '/.etcetera/' + kind):
                if '@%d@' % os.getpid() in left:
                    os.rename(sys.argv[3] + '/.etcetera/%s/' % kind + left, sys.argv[3] + '/.etcetera/%s/' % kind + left.replace(
                        '@%d@' % os.getpid(), '@0@'))
        print('killed')
"""
        digest = etc.Dataset(self.tmp / 'ds').digest
        for tasks, printed in (
                (['pull X', 'verify X', 'pull -f X', 'verify X', 'purge X', 'ls'], ['done', digest, 'done', 'done', digest, 'done', 'done', "['Y']"]),
                (['pull -f X', 'verify X'], ['done', digest]), (['purge X', 'ls', 'pull X', 'verify X'], ['done', "['Y']", 'done', 'done', digest]),
                (['pull -f X!', 'ls', 'verify X'], ["meanwhile ['Y']", 'killed', "['X', 'Y']", 'done', digest]),
                (['pull -f X!', 'forget', 'ls', 'verify X'], ["meanwhile ['Y']", 'killed', 'done', "['X', 'Y']", 'done', digest]),
                (['purge X!', 'ls'], ["meanwhile ['Y']", 'killed', "['Y']"]),
                (['purge Y!', 'purge X', 'ls'], ["meanwhile ['X']", 'killed', 'done', '[]'])):
            with self.subTest(tasks):
                done = self.overlaid(sys.executable, '-c', program, str(HERE), self.url, str(self.tmp / 'home'), *tasks)
                lines = [line for line in done.stdout.splitlines() if line not in tasks]
                self.assertEqual((lines[0], lines[1:1 + len(printed)], done.returncode), ('18', printed, 0), done.stdout)


@unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
class Kills(S3Case):
    """kill -9 at random moments: what stands under a name is what stood there before, or what was to come, whole."""

    def setUp(self):
        super().setUp()
        self.share = (self.tmp / 'share').as_uri()
        self.versions = {}
        for number, version in enumerate(('one', 'two')):
            root = write(self.tmp / version, {'data/train/%02d' % n: noise(100000, '%s %d' % (version, n)) for n in range(30)})
            write(root, {'data/test/noise': noise(6 * MIB, version), 'meta.json': '{"v": %d}' % number, 'data/train/00': 'shared'})
            self.etc('register', root, 'X', home='maker-' + version)
            self.etc('push', 'X', home='maker-' + version, url=(self.tmp / 'made' / version).as_uri())
            self.versions[version] = tree(root), (self.tmp / 'made' / version / 'X.tgz').read_bytes()
        small(self.tmp / 'other')
        self.etc('register', '--copy', self.tmp / 'other', 'Other')

    def prepare(self, local, remote):
        """Let the store and both remotes hold these versions, or nothing."""
        if 'X' in self.installed():
            self.etc('purge', 'X')
        if local:
            self.etc('register', '--copy', self.tmp / local, 'X')
        self.server.uploads.clear()
        self.server.objects.clear()
        remove(self.tmp / 'share')
        (self.tmp / 'share').mkdir()
        if remote:
            self.server.objects['some/prefix/X.tgz'] = self.versions[remote][1], '"%s"' % remote, {}
            write(self.tmp / 'share', {'X.tgz': self.versions[remote][1]})

    def local(self):
        """The version that is installed; it must be one, and verify."""
        self.assertTrue(set(self.installed()) <= {'X', 'Other', 'Z'})
        self.etc('verify', 'Other')
        if 'X' not in self.installed():
            self.assertFalse(os.path.lexists(str(self.tmp / 'home/X')))
            return None
        self.etc('verify', 'X')
        found = tree(self.tmp / 'home/X')
        return [version for version in self.versions if self.versions[version][0] == found][0]

    def remotes(self):
        found = [data for key, (data, _, _) in self.server.objects.items() if key == 'some/prefix/X.tgz']
        self.assertEqual(len(found), len(self.server.objects))
        for path in (self.tmp / 'share').glob('*.tgz'):
            found.append(path.read_bytes())
        return [[version for version in self.versions if self.versions[version][1] == data][0] for data in found]

    def signature(self):
        """What a change to the store or the share would alter."""
        found = []
        for name in ('home/X', 'home/X/data', 'home/X/data/train', 'share', 'share/X.tgz'):
            try:
                status = os.lstat(str(self.tmp / name))
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                found.append(None)
        return found

    def wait(self, process, rng, lasts):
        """Until a moment within its usual running time, a request, or a change of files."""
        how = rng.choice(['moment', 'change', 'request'])
        if how == 'request':
            left = [rng.randrange(1, 9)]

            def fault(handler):
                left[0] -= 1
                if left[0] == 0:
                    process.kill()
            self.server.fault = fault
        if how == 'change':
            left, last = rng.choice([1, 1, 2, 3]), self.signature()
            while process.poll() is None and left:
                now = self.signature()
                left, last = left - (now != last), now
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.25, 1.05) * lasts)
        process.kill()
        process.communicate()
        self.server.fault = None

    def test_kills(self):
        push, pull = ['push', 'X'], ['pull', 'X']
        copy = ['register', '--copy', self.tmp / 'two', 'X']
        # the words, where, what is installed and remote before, what may be installed and remote after a kill
        ops = [(push, self.url, 'two', None, {'two'}, [[], ['two']]),
               (push, self.share, 'two', None, {'two'}, [[], ['two']]),
               (push + ['-f'], self.url, 'two', 'one', {'two'}, [['one', 'one'], ['two', 'one']]),
               (push + ['-f'], self.share, 'two', 'one', {'two'}, [['one', 'one'], ['one', 'two']]),
               (pull, self.url, None, 'two', {None, 'two'}, None), (pull, self.share, None, 'two', {None, 'two'}, None),
               (pull + ['-f'], self.url, 'one', 'two', {'one', 'two'}, None),
               (copy, self.url, None, None, {None, 'two'}, None), (copy + ['-f'], self.url, 'one', None, {'one', 'two'}, None),
               (['purge', 'X'], self.url, 'two', None, {None, 'two'}, None)]
        lasts, killed = {}, 0
        for seed in range(20 * RUNS):
            rng = random.Random('kill %d' % seed)
            args, url, local, remote, locals_, remotes = ops[seed % len(ops)]
            self.prepare(local, remote)
            if seed % len(ops) not in lasts:
                begin = time.time()
                self.spawn(*args, url=url).communicate()
                lasts[seed % len(ops)] = time.time() - begin
                self.prepare(local, remote)
            with self.subTest(seed=seed, args=[str(arg) for arg in args]):
                process = self.spawn(*args, url=url)
                self.wait(process, rng, lasts[seed % len(ops)])
                killed += process.returncode == -signal.SIGKILL
                found = self.local()
                self.assertIn(found, locals_)
                if remotes:
                    self.assertIn(self.remotes(), remotes)
                # all but -f say so if there is nothing left to do
                done = args is copy and found == 'two' or args[0] == 'purge' and found is None
                err = self.etc(*args, url=url, status=1 if done else 0)[1]
                if done:
                    self.assertIn("another 'X' is installed already;" if args is copy else "no local dataset 'X';", err)
                self.assertEqual(self.local(), None if args[0] == 'purge' else 'two')
                if remotes:
                    self.assertEqual(self.remotes(), remotes[1])
                self.etc('create', '-f', 'Z')
                self.assertEqual(self.leftovers(), [])
        self.assertGreater(killed, 5 * RUNS, 'most shall be killed before they end')


# ---------------------------------------------------------------------------------------
# Locked-down interpreters
# ---------------------------------------------------------------------------------------

class Locked:
    """Each command works, and says nothing it should not, where much of Python and of a user's surroundings is missing.

    Subclasses set `url` and `settings`, and put(name, data) stores an object behind etcetera's back.
    """

    FAILED = "'Bad' in [^\n]*: the archive is damaged: its index is missing;", "no dataset 'Nope' in "

    def commands(self):
        """(home, words, what is said if it fails)"""
        self.put('Bad.tgz', block(bytes(1024)) * 3)
        root = odd(self.tmp / 'ds', 3)
        return [('home', ['register', '--copy', str(root), 'X'], ''), ('home', ['push', 'X'], ''), ('home', ['push', 'X'], ''),
                ('home', ['ls', '-r'], ''), ('home', ['info', '-r', 'X'], ''), ('two', ['pull', '-p', 'test', 'X'], ''),
                ('two', ['pull', '-f', 'X'], ''),
                ('two', ['pull', 'Bad'], self.FAILED[0]), ('two', ['pull', 'Nope'], self.FAILED[1]), ('two', ['verify', 'X'], ''),
                ('home', ['purge', 'X'], '')]

    def check(self, words, problem, process):
        out, err = process.communicate()
        self.assertEqual(process.returncode, int(bool(problem)), (words, err))
        self.assertRegex(err.decode(), r'\Aetc: %s[^\n]+\n\Z' % problem if problem else r'\A\Z', words)

    def test_strict_interpreter(self):
        python = ['-I', '-S', '-bb', '-W', 'error'] + ['-X', 'dev'] * (sys.version_info >= (3, 7))
        os.environ.update(LC_ALL='C', LANG='C')
        for home, words, problem in self.commands():
            with self.subTest(words):
                self.check(words, problem, self.spawn('-q', *words, home=home, python=python, stdin=subprocess.DEVNULL, start_new_session=True))
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))

    def test_what_is_missing(self):
        """No ssl, no fcntl, no ctypes, no MD5, no $HOME, no entry in the passwords file, no terminal, no stdin."""
        code = '''if True:
            import gc, hashlib, json, os, sys
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
            folder, url, commands = sys.argv[1:]
            sys.path.insert(0, folder)
            import etcetera
            for home, words, problem in json.loads(commands):
                found = etcetera.main(['-q', '--url', url, '--home', home] + words)
                assert found == bool(problem), (words, found)
                gc.collect()
            '''
        commands = [(str(self.tmp / home), words, problem) for home, words, problem in self.commands()]
        env = dict(os.environ, **{'AWS_' + k[4:].upper(): v for k, v in self.settings.items() if k.startswith('aws_')})
        env.update(AWS_ENDPOINT_URL=self.settings.get('endpoint_url', ''))
        command = [sys.executable, '-I', '-S', '-W', 'error', '-c', code, str(HERE), self.url, json.dumps(commands)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        out, err = process.communicate()
        self.assertEqual(process.returncode, 0, err.decode())
        self.assertRegex(err.decode(), r'\Aetc: %s[^\n]+\netc: %s[^\n]+\n\Z' % self.FAILED)
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))


class FileLocked(Locked, Case):
    def put(self, name, data):
        write(self.tmp / 'share', {name: data})


class S3Locked(Locked, S3Case):
    def put(self, name, data):
        self.server.objects['some/prefix/' + name] = data, '"%s"' % hashlib.sha1(data).hexdigest(), {}


class GsLocked(Locked, GsCase):
    pass


# ---------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------

class Hush:
    """Runs commands with -v and looks for secrets wherever they could come to light."""

    secrets = ()  # type: tuple

    def setUp(self):
        super().setUp()
        self.said = []
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None
        logger = logging.getLogger('etcetera')
        handler, level = logging.Handler(), logger.level
        handler.emit = lambda record: self.said.append(record.getMessage())
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        self.addCleanup(logger.setLevel, level)
        self.addCleanup(logger.removeHandler, handler)

    def everything(self, problem):
        """All commands, in both ways; how many failed. They say that there is this problem, or that X was not pulled."""
        failed = 0
        remove(self.tmp / 'two')
        small(self.tmp / 'ds')
        for words in (['register', '-f', str(self.tmp / 'ds'), 'X'], ['push', '-f', 'X'], ['push', 'X'], ['ls', '-r', '-l'], ['info', '-r', 'X'],
                      ['--home', str(self.tmp / 'two'), 'pull', 'X'], ['--home', str(self.tmp / 'two'), 'verify', 'X'], ['pull', 'Nope']):
            out, err = io.StringIO(), io.StringIO()
            settings = self.tmp / 'settings.yaml'
            settings.write_text(''.join('%s: %s\n' % (k, json.dumps(v)) for k, v in self.settings.items()))
            settings.chmod(0o600)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = etc.main(['-v', '--config', str(settings), '--url', self.url, '--home', str(self.tmp / 'home')] + words)
            self.assertIn(code, (0, 1), err.getvalue())
            if code:
                self.assertRegex(err.getvalue().splitlines()[-1], problem + "|no local dataset 'X'" * ('verify' in words))
            failed += code
            self.said += [out.getvalue(), err.getvalue()]
        try:
            config = self.config()
            self.said += [repr(config), str(config), '%r' % [config]]
            for call in (lambda: etc.ls(True, config), lambda: etc.info('X', True, config), lambda: etc.push('X', True, config),
                         lambda: etc.pull('X', True, config=config)):
                try:
                    self.said.append(repr(call()))
                except etc.Error as e:
                    self.hear(e)
        except etc.Error as e:
            self.hear(e)
        self.search()
        return failed

    def hear(self, e):
        while e is not None:
            self.said += [str(e), repr(e), repr(vars(e))] + traceback.format_exception(type(e), e, e.__traceback__)
            e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)

    def search(self):
        own = [str(self.tmp / name) for name in ('settings.yaml', '.aws', 'key.json', 'subject')]
        for top, _, files in os.walk(str(self.tmp)):
            for name in files:
                path = os.path.join(top, name)
                if not path.startswith(tuple(own)):
                    with open(path, 'rb') as file:
                        self.said.append(file.read().decode('latin-1'))
        for text in self.said:
            for secret in self.secrets:
                self.assertNotIn(secret, text)
        del self.said[:]


class Secrets(Hush, S3Case):
    secrets = SECRET, 'wJalrXUtnFEMI', 'session/hush', 'hush'

    def test_sources(self):
        """Secrets from settings, environment and files; right ones, wrong ones, broken ones."""
        self.settings['aws_session_token'] = 'session/hush'
        nope, wrong = "no dataset 'Nope' in", 'aws_secret_access_key holds characters that it cannot have'
        self.assertEqual(self.everything(nope), 1)
        keys = {key: self.settings.pop(key) for key in list(self.settings) if key.startswith('aws_')}
        os.environ.update({key.upper(): value for key, value in keys.items()})
        self.assertEqual(self.everything(nope), 1)
        for broken, problem in (('hush\nhush', wrong), ('hush\u00e9', wrong), ('hush hush', wrong), ('hush', '403 SignatureDoesNotMatch')):
            with self.subTest(broken):
                os.environ['AWS_SECRET_ACCESS_KEY'] = broken
                self.assertGreater(self.everything(problem), 5)
        for key in keys:
            del os.environ[key.upper()]
        write(self.tmp, {'.aws/credentials': '[default]\n' + ''.join('%s = %s\n' % item for item in keys.items())})
        self.assertEqual(self.everything(nope), 1)
        unreadable = 'credentials cannot be read as an AWS settings file'
        for broken, problem in (
                ('[default]\naws_secret_access_key = hush\n', 'aws_access_key_id and aws_secret_access_key go together'),
                ('hush\n', unreadable), ('[default\nhush = hush\n', unreadable), ('[default]\naws_secret_access_key\nhush', unreadable),
                ('[default]\naws_access_key_id = a\naws_secret_access_key = hu\u00e9hush\n', wrong)):
            with self.subTest(broken):
                write(self.tmp, {'.aws/credentials': broken})
                self.assertGreater(self.everything(problem), 5)
        remove(self.tmp / '.aws/credentials')
        for value, problem in (('hu\\nhush', '403 InvalidAccessKeyId'), (5, "'aws_secret_access_key' must be text"),
                               (['hush'], 'this YAML syntax is not supported'), ({'a': 'hush'}, 'this YAML syntax is not supported')):
            with self.subTest(value):
                self.settings.update(aws_access_key_id='a', aws_secret_access_key=value)
                self.assertGreater(self.everything(problem), 5)

    def test_settings_that_cannot_be_read(self):
        syntax = '1: this YAML syntax is not supported'
        for line, problem in (
                ('aws_secret_access_key: "hush', '1: a quoted value must end on its line'), ('aws_secret_access_key: [hush]', syntax),
                ('aws_secret_access_key: hush: hush', syntax), ('hush', "1: not of the form 'key: value'"),
                ('aws_secret_access_key: "\\hush"', '1: unknown escape'), ('aws_secret_key: hush', "1: unknown setting 'aws_secret_key'"),
                ('aws_session_token: hush\naws_session_token: hush', "2: 'aws_session_token' is set a second time")):
            with self.subTest(line):
                write(self.tmp, {'settings.yaml': line + '\n'})
                out, err = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    self.assertEqual(etc.main(['-v', '--config', str(self.tmp / 'settings.yaml'), '--url', self.url, 'ls', '-r']), 1)
                self.assertIn('settings.yaml:' + problem, err.getvalue())
                self.said += [out.getvalue(), err.getvalue()]
                try:
                    etc.Config.load(self.tmp / 'settings.yaml')
                except etc.Error as e:
                    self.hear(e)
                self.search()

    def test_answers(self):
        """Whatever a server says, and wherever it breaks off."""
        self.settings['aws_session_token'] = 'session/hush'
        for status in (301, 400, 401, 403, 404, 409, 412, 500, 503):
            def fault(handler):
                xml = '<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message><StringToSign>%s</StringToSign><Token-0>%s</Token-0></Error>' % (
                    escape(str(handler.headers)), handler.headers['x-amz-security-token'])
                return handler.answer(status, xml.encode(), {'Location': self.server.url + '/elsewhere'}) or True
            with self.subTest(status):
                self.server.fault = fault
                self.assertGreater(self.everything('answers %d SignatureDoesNotMatch: no;' % status), 5)
        self.server.fault = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR) or True
        self.assertGreater(self.everything('cannot reach ' + self.server.url), 5)
        self.server.fault = lambda handler: handler.answer(200, str(handler.headers).encode()) or True
        self.assertGreater(self.everything('does not answer (as S3 does|with the range that was asked for)'), 4)

    def test_urls(self):
        """Passwords in URLs, where they cannot be used or are of proxies."""
        url = self.url
        for self.url, problem in (
                ('https://user:hush@127.0.0.1:1/x', 'the url has a user or password in it'), ('s3://user:hush@bucket', 'not of the form s3://bucket'),
                ('s3://key:hush@bucket/x', 'not of the form s3://bucket'), ('gs://user:hush@bucket', 'not of the form gs://bucket'),
                ('ftp://user:hush@host/x', 'the url; it must start with'), ('file://user:hush@host/x', 'the url is no absolute path')):
            with self.subTest(self.url):
                self.assertGreater(self.everything(problem), 5)
        self.url = url
        endpoint = self.settings['endpoint_url']
        for self.settings['endpoint_url'] in (endpoint.replace('//', '//user:hush@'), 'http://user:hush@', 'user:hush@host'):
            with self.subTest(self.settings['endpoint_url']):
                self.assertGreater(self.everything('the endpoint_url must look like https://host'), 5)
        self.settings['endpoint_url'] = 'http://storage.invalid'
        os.environ['no_proxy'] = ''
        proxy = Server(Recorder)
        self.addCleanup(proxy.stop)
        no_proxy = 'http_proxy is not of the form http://'
        for os.environ['http_proxy'], problem in (
                ('http://user:hush@127.0.0.1:1', 'cannot reach http://storage.invalid: '),
                (proxy.url.replace('//', '//user:hush@'), "does not answer as S3 does|another 'X' is in|it ends too early"),
                ('http://user:hush@[', no_proxy), ('user:hush@127.0.0.1:x', no_proxy)):
            with self.subTest(os.environ['http_proxy']):
                self.assertGreater(self.everything(problem), 4)
        self.assertTrue(proxy.log)
        self.assertIn('Basic ', proxy.log[0])


# what stands between the marks of a secret
ALPHABETS = {'slash': '/', 'plus': '+/', 'equals': '=', 'hash': '#', 'question': '?', 'at': '@', 'colon': ':', 'percent': '%2F', 'space': ' ',
             'unicode': '\u00e9', 'quote': "'", 'json': '", "', 'port': ':1/', 'scheme': '://', 'newline': '\n', 'long': '/' + 'x' * 300}
if RUNS == 1:  # all of them take minutes
    ALPHABETS = {name: ALPHABETS[name] for name in ('slash', 'hash', 'at', 'unicode', 'newline')}


class Places(Hush, S3Case):
    """Secrets where a URL, a path, a name or a choice should be: nothing that is printed, kept or sent may tell them."""

    secrets = '1hush', '2HUSH', '3hush'

    def setUp(self):
        super().setUp()
        os.chdir(str(self.tmp))
        self.addCleanup(os.chdir, str(HERE))
        os.environ.update(ETC_HOME=str(self.tmp / 'home'), ETC_URL=self.url, AWS_ENDPOINT_URL=self.server.url, NO_GCE_CHECK='true',
                          AWS_ACCESS_KEY_ID=AKID, AWS_SECRET_ACCESS_KEY=SECRET)
        self.settings = {}
        write(self.tmp, {'file': 'x'})
        etc.register(small(self.tmp / 'ds'), 'X')

    def told(self, words, statuses, says, env=(), sent=True):
        """Let the command line, at each verbosity, and the API say what they say, and look for secrets there and in what was sent."""
        del self.said[:], self.server.log[:]
        saved = dict(os.environ)
        os.environ.update(env)
        try:
            for verbosity in ([], ['-v'], ['-q']):
                out, err = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                    warnings.simplefilter('ignore', ResourceWarning)  # of sockets, told whenever they are collected
                    try:
                        code = etc.main(verbosity + words)
                    except SystemExit as e:
                        code = e.code
                self.assertIn(code, statuses, err.getvalue())
                self.assertTrue(any(word in err.getvalue() for word in ([says] if isinstance(says, str) else says)), err.getvalue())
                self.said += [out.getvalue(), err.getvalue()]
            self.assertEqual(err.getvalue().count('\n'), 1 if code else 0, err.getvalue())
            with self.heard():
                config = etc.Config.load(**self.settings)
                self.said.append(repr(config))
                etc.ls(True, config)
        finally:
            os.environ.clear()
            os.environ.update(saved)
        self.said += ['%s %s\n%s' % item for item in self.server.log if sent]
        self.search()

    @contextlib.contextmanager
    def heard(self):
        try:
            yield
        except etc.Error as e:
            self.hear(e)

    def everywhere(self, places, words=('ls', '-r'), statuses=(1,)):
        """places: [(variable or setting, what it holds with %s for a secret, other variables, what is said, or a choice)]"""
        for alphabet, mark in ALPHABETS.items():
            secret = mark.join(self.secrets)
            for name, template, env, says in places:
                with self.subTest(name=name, alphabet=alphabet, template=template):
                    value = template % secret
                    if name.islower():  # a setting
                        if mark == '\n':
                            says = 'holds characters that cannot be printed'
                        self.settings = {name: value}
                        (self.tmp / 'settings.yaml').write_text(json.dumps(name)[1:-1] + ': ' + json.dumps(value))
                        os.chmod(str(self.tmp / 'settings.yaml'), 0o600)
                        self.told(list(words), statuses, says, dict(env, ETC_CONFIG=str(self.tmp / 'settings.yaml')))
                        (self.tmp / 'settings.yaml').unlink()
                    else:
                        self.settings = {}
                        if name in ('ETC_URL', 'ETC_HOME') and mark == '\n':
                            says = 'holds characters that cannot be printed'
                        self.told(list(words), statuses, says, dict(env, **{name: value}))

    def test_paths(self):
        keyless = {'AWS_ACCESS_KEY_ID': '', 'AWS_SECRET_ACCESS_KEY': ''}
        role = dict(keyless, AWS_ROLE_ARN='arn:aws:iam::1:role/x')
        container = dict(keyless, AWS_CONTAINER_CREDENTIALS_FULL_URI='http://127.0.0.1:1/')
        google = {'ETC_URL': 'gs://bucket', 'AWS_ENDPOINT_URL': ''}
        tls = {'AWS_ENDPOINT_URL': 'https://127.0.0.1:1'}
        nothing = 'no credentials were found'
        self.everywhere((
            ('AWS_WEB_IDENTITY_TOKEN_FILE', '%s', role, '$AWS_WEB_IDENTITY_TOKEN_FILE names: '),
            ('AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE', '%s', container, '$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE names: '),
            ('GOOGLE_APPLICATION_CREDENTIALS', '%s', google, '$GOOGLE_APPLICATION_CREDENTIALS'),
            ('google_credentials', '%s', google, 'google_credentials'),
            ('AWS_CA_BUNDLE', '%s', tls, '$AWS_CA_BUNDLE'), ('ca_bundle', '%s', tls, 'ca_bundle'),
            ('ETC_CONFIG', '%s', {}, str(self.tmp / '...')), ('ETC_CONFIG', 'file/%s', {}, str(self.tmp / 'file' / '...')),
            ('AWS_SHARED_CREDENTIALS_FILE', '%s', dict(keyless, AWS_EC2_METADATA_DISABLED='true'), nothing),
            ('AWS_CONFIG_FILE', '%s', dict(keyless, AWS_EC2_METADATA_DISABLED='true'), nothing),
        ))
        etc.push('X')  # or pull would not come to look at the home
        home = str(self.tmp / 'file' / '...')
        for words in (['ls'], ['push', 'X'], ['pull', 'X'], ['create', 'Y'], ['register', str(self.tmp / 'ds'), 'Y']):
            with self.subTest(words):
                self.everywhere((('ETC_HOME', str(self.tmp / 'file/%s'), {}, home),
                                 ('home', str(self.tmp / 'file/%s'), {'ETC_HOME': ''}, home)), words)

    def test_choices(self):
        """Names and kinds, as of a profile."""
        keyless = {'AWS_ACCESS_KEY_ID': '', 'AWS_SECRET_ACCESS_KEY': ''}
        self.everywhere((
            ('AWS_PROFILE', '%s', {}, '$AWS_PROFILE'), ('aws_profile', '%s', {}, 'aws_profile'),
            ('AWS_REGION', '%s', {}, '$AWS_REGION'), ('region', '%s', {}, "'region'"),
            ('AWS_ROLE_ARN', '%s', dict(keyless, AWS_WEB_IDENTITY_TOKEN_FILE='file'), '$AWS_ROLE_ARN'),
        ))
        self.everywhere([(name, '%s\u20ac', {}, 'a value that cannot be sent') for name in (
            'storage_class', 'sse', 'sse_kms_key_id', 'request_payer')])

    def test_urls(self):
        """Passwords and signatures in URLs, and keys instead of URLs."""
        form = 'the url is not of the form'
        self.everywhere([(name, template, {'ETC_URL': '', 'AWS_ENDPOINT_URL': ''}, says) for name in ('ETC_URL', 'url') for template, says in (
            ('%s', 'it must start with'), ('https://user:%s@127.0.0.1:1/x', 'user or password'),
            ('https://user:x%s@127.0.0.1:1/x', 'user or password'),
            ('https://127.0.0.1:1/x?sig=%s', 'the url '), ('https://127.0.0.1:1/x#%s', 'the url '), ('s3://user:%s@bucket', form),
            ('gs://user:%s@bucket/x', form), ('ftp://user:%s@127.0.0.1:1/x', 'it must start with'),
            ('file://user:%s@host/x', 'is no absolute path'))])
        must = 'the endpoint_url must look like'
        self.everywhere([(name, template, more, must) for name, more in (
            ('endpoint_url', {}), ('AWS_ENDPOINT_URL', {}), ('AWS_ENDPOINT_URL_S3', {}),
            ('STORAGE_EMULATOR_HOST', {'ETC_URL': 'gs://bucket'}),
            ('AWS_EC2_METADATA_SERVICE_ENDPOINT', {'AWS_ACCESS_KEY_ID': '', 'AWS_SECRET_ACCESS_KEY': '', 'AWS_EC2_METADATA_DISABLED': ''}))
            for template in ('http://user:%s@127.0.0.1:1', 'http://127.0.0.1:1/?sig=%s')])
        self.everywhere([(name, '%s', {}, must) for name in ('endpoint_url', 'AWS_ENDPOINT_URL')])
        keyless = {'AWS_ACCESS_KEY_ID': '', 'AWS_SECRET_ACCESS_KEY': ''}
        refused = ('$AWS_CONTAINER_CREDENTIALS_FULL_URI must begin with https://',
                   '$AWS_CONTAINER_CREDENTIALS_RELATIVE_URI must be a path that begins with /', 'does not have the form https://host',
                   'cannot reach http://127.0.0.1:1: ')
        self.everywhere([('AWS_CONTAINER_CREDENTIALS_FULL_URI', template, keyless, refused) for template in (
            'http://user:%s@127.0.0.1:1/', 'https://user:%s@127.0.0.1:1/', '%s', 'http://127.0.0.1:1/?%s', 'http://127.0.0.1:1/%s')])
        self.everywhere([('AWS_CONTAINER_CREDENTIALS_RELATIVE_URI', template, keyless, refused[1:3])
                         for template in (':%s', '@%s', '%s')])

    def test_queries_that_are_legal(self):
        """In the name of a "directory" of a bucket."""
        for alphabet, mark in ALPHABETS.items():
            if mark != '\n':
                for url in ('s3://bucket/x?sig=%s', 's3://bucket/x#%s', 's3://bucket/user:%s@x'):
                    self.server.objects.clear()
                    os.environ['ETC_URL'] = url % mark.join(self.secrets)
                    for words in (['push', 'X'], ['push', 'X'], ['ls', '-r', '-l'], ['info', '-r', 'X'], ['--home', 'two', 'pull', 'X'],
                                  ['--home', 'two', 'info', 'X'], ['--home', 'two', 'ls', '-l'], ['pull', 'Nope']):
                        with self.subTest(words, alphabet=alphabet, url=url):
                            nope = words[-1] == 'Nope'
                            self.told(words, (int(nope),), "no dataset 'Nope' in s3://" if nope else '', sent=False)

    def test_proxies(self):
        """A password may have any character; what is no plain proxy is asked nothing."""
        proxy = Server(Recorder)
        self.addCleanup(proxy.stop)
        os.environ['no_proxy'] = ''
        for alphabet, mark in ALPHABETS.items():
            secret = mark.join(self.secrets)
            for scheme in ('http', 'https'):
                for template in ('https://user:%s@' + proxy.url[7:], 'socks5://user:%s@' + proxy.url[7:], 'socks5h://' + proxy.url[7:] + '/%s',
                                 'http://user:%s@', 'user:%s@127.0.0.1:x', 'http://user:%s@127.0.0.1:99999', 'http://user:%s@['):
                    with self.subTest(alphabet=alphabet, scheme=scheme, template=template):
                        self.told(['ls', '-r'], (1,), scheme + '_proxy is not of the form http://',
                                  {'AWS_ENDPOINT_URL': scheme + '://storage.invalid', scheme + '_proxy': template % secret})
                        self.assertEqual(proxy.log, [])
            if mark != '\n':
                with self.subTest(alphabet=alphabet):
                    self.told(['ls', '-r'], (1,), 'does not answer as S3', {
                        'AWS_ENDPOINT_URL': 'http://storage.invalid', 'http_proxy': 'http://user:%s@%s/' % (secret, proxy.url[7:])})
                    sent = re.search('Proxy-Authorization: Basic (.*)', proxy.log[0]).group(1)
                    self.assertEqual(base64.b64decode(sent).decode(), 'user:' + urllib.parse.unquote(secret))
                    self.told(['ls', '-r'], (1,), 'cannot reach https://storage.invalid', {
                        'AWS_ENDPOINT_URL': 'https://storage.invalid', 'https_proxy': 'http://user:%s@%s' % (secret, proxy.url[7:])})
                    del proxy.log[:]

    def test_words(self):
        """On the command line: what is typed is shown, but URLs without password and query."""
        self.settings = {}
        etc.push('X')  # or pull would not come to look at partitions
        name, usage = "is not NAME@sha256:|cannot be a dataset's name", "etc: '?etc.* takes no "
        command = 'etc: no command |argument COMMAND'
        file, home, url = 'no settings file', "Not a directory: |'home' holds", "the url[ ;]|'url' holds"
        for alphabet, mark in ALPHABETS.items():
            secret = mark.join(self.secrets)
            for template in ('https://user:%s@127.0.0.1:1/x', 's3://user:%s@bucket', 'https://127.0.0.1/x?sig=%s', 'user:%s@127.0.0.1',
                             'https://%s@127.0.0.1', 'https://127.0.0.1/x#token=%s'):
                word = template % secret
                for words, status, says in (
                        (['pull', word], 1, name), (['pull', 'X', word], 1, name), (['push', word], 1, name), (['info', word], 1, name),
                        (['info', '-r', word], 1, name), (['diff', 'X', word], 1, name), (['diff', '-r', word, 'X'], 1, name),
                        (['diff', 'X', 'X', word], 2, 'diff takes two names'), (['ls', word], 1, 'no dataset here matches '),
                        (['purge', word], 1, name), (['verify', word], 1, name), (['create', word], 1, name),
                        (['register', word], 1, 'no directory'), (['register', word, 'Y'], 1, 'no directory'),
                        (['register', 'ds', word], 1, name), (['register', 'ds', 'as', word], 1, name),
                        (['register', word, 'ds'], 1, 'no directory'),
                        ([word], 2, command), (['pull', 'X', '--ulr=' + word], (1, 2), usage + '|' + name),
                        (['pull', 'X', '--force=' + word], 2, 'argument -f/--force'), (['--' + word], 2, usage + '|' + command),
                        (['-x' + word], 2, usage + '|' + command),
                        (['--co=' + word, 'ls'], (1, 2), file + '|' + usage),
                        (['completion', word], 2, 'argument SHELL'), (['--config', word, 'ls'], 1, file),
                        (['--config', 'file/' + word, 'ls'], 1, 'cannot be read: '),
                        (['--home', 'file/' + word, 'ls'], (0, 1), home), (['--home', 'file/' + word, 'create', 'Y'], 1, home),
                        (['--url', word, 'ls', '-r'], 1, url), (['pull', 'X', '-p', word], 1, 'no partition '),
                        (['create', '-f', 'Y', 'a', word + '/'], 1, "cannot be a partition's name")):
                    with self.subTest(words=words):
                        del self.said[:]
                        out, err = io.StringIO(), io.StringIO()
                        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                            try:
                                code = etc.main(['-v'] + words)
                            except SystemExit as e:
                                code = e.code
                        self.assertIn(code, status if isinstance(status, tuple) else (status,), err.getvalue())
                        self.assertRegex(err.getvalue().splitlines()[-1], says)  # below the traceback
                        for part in self.secrets:
                            self.assertNotIn(part, out.getvalue() + err.getvalue())


class GoogleSecrets(Hush, GoogleCase):
    secrets = 'ya29.token', 'hush'

    def test_all(self):
        good = {'access_token': 'ya29.token', 'expires_in': 3600}
        impersonated = {'type': 'impersonated_service_account', 'service_account_impersonation_url': self.tokens.url + '/i',
                        'source_credentials': self.user(client_secret='hush', refresh_token='hush')}
        (self.tmp / 'subject').write_text('hush')
        external = {'type': 'external_account', 'audience': 'a', 'subject_token_type': 't', 'token_url': self.tokens.url + '/s',
                    'credential_source': {'file': str(self.tmp / 'subject')}, 'client_id': 'i', 'client_secret': 'hush'}
        later = dict(good, accessToken='ya29.token', expireTime='2099-01-01T00:00:00Z')
        self.tokens.respond = lambda handler, form: later
        nope, header, unused = "no dataset 'Nope' in", 'a header for http://.* contains invalid characters', 'key.json cannot be used: '
        form = 'a URL from the settings, the credentials or a server does not have the form'
        for info in (self.user(client_secret='hush', refresh_token='hush'), impersonated, external):
            with self.subTest(info['type']):
                self.use(info)
                self.assertEqual(self.everything(nope), 1)
        for secret in ('hush\nX: y', 'hush\u20ac', 'hu/sh@hush#hush?hush'):
            url = 'http://user:%s@127.0.0.1:1/x?key=%s' % (secret, secret)
            query = 'cannot reach http://127.0.0.1:1: ' if '@' in secret else form
            for source, problem in (
                    ({'url': self.tokens.url, 'headers': {'Authorization': secret + '\n'}}, header), ({'url': url}, form), ({'url': secret}, form),
                    ({'file': secret}, 'cannot read the file with a token that the credential_source names'),
                    ({'url': self.tokens.url + '/ x?key=' + secret}, form), ({'url': 'http://127.0.0.1:1/x?key=' + secret}, query)):
                with self.subTest(source):
                    self.use(dict(external, credential_source=source))
                    self.assertGreater(self.everything(problem), 5)
            for more, problem in (({'token_uri': url}, form), ({'token_uri': secret}, unused + 'the address of a token'),
                                  ({'quota_project_id': secret + '\n'}, header)):
                with self.subTest(more):
                    self.use(self.user(**more))
                    self.assertGreater(self.everything(problem), 5)
        none = 'key.json holds no Google credentials;'
        for what, problem, info in (
                ('refresh token', nope, self.user(client_secret='hush', refresh_token=['hush'])),
                ('token_uri', unused + 'the address of a token', self.user(client_secret='hush', token_uri='nonsense')),
                ('private key', unused + 'private_key', {'type': 'service_account', 'client_email': 'e', 'private_key': 'hush',
                                                         'token_uri': self.tokens.url}),
                ('list as a private key', unused, {'type': 'service_account', 'client_email': 'e', 'private_key': ['hush'],
                                                   'token_uri': self.tokens.url}),
                ('PEM', unused + 'private_key', {'type': 'service_account', 'client_email': 'e', 'token_uri': self.tokens.url,
                                                 'private_key': '-----BEGIN PRIVATE KEY-----\nhush\n-----END PRIVATE KEY-----'}),
                ('no account', unused + "'client_email'", {'type': 'service_account', 'private_key': 'hush'}),
                ('no type', none, {'private_key': 'hush'}), ('list', none, ['hush']),
                ('subject', unused, dict(external, credential_source={
                    'file': str(self.tmp / 'subject'), 'format': {'type': 'json', 'subject_token_field_name': 'x'}})),
                ('client secret', nope, dict(external, client_secret=5, audience=None)),
                ('source', unused, dict(impersonated, source_credentials='hush'))):
            with self.subTest(what):
                self.use(info)
                self.everything(problem)
        self.use(self.user(client_secret='hush', refresh_token='hush'))
        (self.tmp / 'key.json').write_text('{"type": "authorized_user", "refresh_token": "hush')
        self.assertGreater(self.everything(none), 5)
        self.use(self.user(client_secret='hush', refresh_token='hush'))
        for answer, problem in (
                (dict(good, access_token='hu\nsh hush'), unused + 'access_token'), (dict(good, access_token='hush\u20ac'), unused + 'access_token'),
                (dict(good, access_token=['hush']), unused + 'access_token'), (dict(good, expires_in='soon'), unused),
                ({'hush': 1}, unused + "'access_token'"), (['hush'], unused), ('no', 'gives no access token: no;')):
            with self.subTest(answer):
                self.tokens.respond = lambda handler, form: answer
                self.assertGreater(self.everything(problem), 5)
        self.tokens.respond = lambda handler, form: good
        for status in (301, 308, 400, 401, 403, 404, 412, 500):
            with self.subTest(status):
                self.server.fault = lambda handler: handler.answer(status, b'no', {'Location': self.server.url + '/x'}) or True
                self.assertGreater(self.everything('answers %d: no;' % status), 5)


# ---------------------------------------------------------------------------------------
# As a file to copy, pipe, vendor and import
# ---------------------------------------------------------------------------------------

class Progress(Case):
    def told(self, function, *args, **kwargs):
        """What `progress` is told, after a look whether that makes sense."""
        calls = []
        function(*args, progress=lambda done, total: calls.append((done, total, threading.get_ident())),
                 config=self.config(kwargs.pop('home', 'home')), **kwargs)
        self.assertEqual(calls[0][0], 0)
        self.assertEqual([done for done, _, _ in calls], sorted(done for done, _, _ in calls))
        self.assertEqual({(total, thread) for _, total, thread in calls}, {(calls[-1][0], threading.get_ident())})
        return calls[-1][0]

    def test_api(self):
        root = odd(self.tmp / 'ds', 20)
        size = etc.info('X', config=etc.register(root, 'X', config=self.config()) and self.config())['size']
        self.assertEqual(self.told(etc.push, 'X'), size)
        archive = os.path.getsize(str(self.tmp / 'share/X.tgz'))
        self.assertTrue(archive - 4096 < self.told(etc.pull, 'X', home='two') < archive)
        self.assertTrue(0 < self.told(etc.pull, 'X', partitions=['empty'], home='three') < 4096)
        self.assertTrue(archive - 8192 < self.told(etc.dataset, 'X', True, home='three') < archive)
        self.assertEqual(self.told(etc.verify, 'X', home='two'), size)
        self.assertEqual(self.told(etc.diff, 'X', 'X', (True, False)), size)  # registered here, so it must be read
        self.assertEqual(self.told(etc.register, root, 'Y', copy=True), size)
        etc.register(small(self.tmp / 'small'), 'Z', copy=True, config=self.config())
        self.assertEqual(self.told(etc.diff, 'Y', 'Z', files=True), size)
        for kept in ('two', 'three'):
            with self.subTest(kept):
                self.assertEqual(tree(self.tmp / kept / 'X'), tree(root))

    def test_foreign_archive(self):
        (self.tmp / 'share').mkdir()
        with tarfile.open(str(self.tmp / 'share/X.tgz'), 'w:gz') as tar:
            tar.add(str(small(self.tmp / 'ds')), '.')
        self.assertEqual(self.told(etc.pull, 'X'), os.path.getsize(str(self.tmp / 'share/X.tgz')))

    def test_what_it_raises_ends_the_work(self):
        class Enough(Exception):
            pass

        def progress(done, total):
            if done > total // 2:
                raise Enough

        etc.register(odd(self.tmp / 'ds', 20), 'X', config=self.config())
        with self.assertRaises(Enough):
            etc.push('X', config=self.config(), progress=progress)
        self.assertEqual(etc.ls(True, self.config()), [])
        etc.push('X', config=self.config())
        with self.assertRaises(Enough):
            etc.pull('X', config=self.config('two'), progress=progress)
        self.assertEqual((self.installed('two'), self.leftovers('two')), ([], []))

    def on_terminal(self, *args, columns=80, term='xterm'):
        """What a command writes to a terminal of that width."""
        import fcntl
        import pty
        import termios
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
        process = subprocess.Popen([sys.executable, SCRIPT, '--url', self.url] + list(args), stdout=subprocess.DEVNULL,
                                   stderr=theirs, env=dict(os.environ, TERM=term))
        os.close(theirs)
        out = b''
        with open(ours, 'rb', 0) as file, contextlib.suppress(OSError):  # EIO when the terminal is closed
            for data in iter(lambda: file.read(4096), b''):
                out += data
        self.assertEqual(process.wait(), 0, out)
        return out.decode()

    @unittest.skipIf(os.name == 'nt', 'no pseudoterminals')
    def test_terminal(self):
        write(self.tmp / 'ds', {'data/train/big': noise(3 * MIB), 'data/train/small': 'x'})
        etc.register(self.tmp / 'ds', 'MNIST', config=etc.Config())
        summary = r'etc: %s MNIST%s: 2 files, 3\.15 MB in [0-9.]+ s \([0-9.]+ [MG]B/s\)\r\n\Z'
        for columns in (80, 40, 12):
            for args, what, done in ((['push', '-f', 'MNIST'], 'pushing', 'pushed'), (['verify', 'MNIST'], 'verifying', 'verified'),
                                     (['--home', str(self.tmp / str(columns)), 'pull', 'MNIST'], 'pulling', 'pulled')):
                with self.subTest(what, columns=columns):
                    out = self.on_terminal(*args, columns=columns)
                    *drawn, last = out.split('\r\033[J')
                    drawn = [line for line in drawn if line]
                    for line in drawn:
                        self.assertTrue(line.endswith('\r') and '\n' not in line and len(line) <= columns, drawn)
                    whole = '%s MNIST  0%%  0 B of 3.15 MB' % what
                    self.assertTrue(drawn and drawn[0].startswith(whole if columns > 12 else whole[:11]), drawn)
                    self.assertRegex(last if what != 'verifying' else last.partition('etc: MNIST@')[0].replace(
                        'nothing known to compare it with; ', ''), summary % (done, ' to ' + self.url if done == 'pushed' else ''))
        for args, term in ((['-q', 'push', '-f', 'MNIST'], 'xterm'), (['push', '-f', 'MNIST'], 'dumb')):
            with self.subTest(term, args=args):
                self.assertNotRegex(self.on_terminal(*args, term=term), r'\033|pushing')
        self.assertNotRegex(self.etc('pull', 'MNIST')[1], r'[\r\033]')


@unittest.skipIf(os.name == 'nt', 'no pseudoterminals')
class Question(Case):
    """`etc purge -r` as a person on a terminal meets it."""

    def setUp(self):
        super().setUp()
        write(self.tmp / 'share', {'X.tgz': 'x' * 1500, 'Y.tgz': 'y'})

    def on_terminal(self, *args, answers=(), meanwhile=lambda: None):
        """The exit status, and what it shows; each answer is typed when it asks."""
        import fcntl
        import pty
        import termios
        ours, theirs = pty.openpty()
        process = subprocess.Popen([sys.executable, SCRIPT, '--url', self.url, 'purge'] + list(args), stdin=theirs, stdout=theirs, stderr=theirs,
                                   start_new_session=True, preexec_fn=lambda: (default_signals(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)))
        os.close(theirs)
        guard = threading.Timer(60, process.kill)
        guard.start()
        shown, answers = b'', list(answers)
        with open(ours, 'r+b', 0) as file, contextlib.suppress(OSError):  # EIO when the terminal is closed
            for data in iter(lambda: file.read(4096), b''):
                shown += data
                if answers and shown.endswith(b'[y/N] '):
                    meanwhile()
                    file.write(answers.pop(0))
        guard.cancel()
        return process.wait(), shown.decode('utf-8', 'replace').replace('\r\n', '\n')

    def left(self):
        return sorted(os.listdir(str(self.tmp / 'share')))

    def test_answers(self):
        asked = "etc: remove 'X' (1.5 kB) in %s? [y/N] " % self.url
        for answer in (b'\n', b'n\n', b'no\n', b'yy\n', b'\xff\n', b' \n'):
            with self.subTest(answer):
                code, shown = self.on_terminal('-r', 'X', answers=[answer])
                self.assertEqual((code, shown.startswith(asked), self.left()), (1, True, ['X.tgz', 'Y.tgz']), shown)
                self.assertTrue(shown.endswith("\netc: 'X' (1.5 kB) in %s stays\n" % self.url), shown)
        for answer in (b'y\n', b'Y\n', b'yes\n', b' yes \n'):
            with self.subTest(answer):
                write(self.tmp / 'share', {'X.tgz': 'x' * 1500})
                code, shown = self.on_terminal('-r', '-q', 'X', answers=[answer])
                self.assertEqual((code, shown, self.left()), (0, asked + answer.decode(), ['Y.tgz']))

    def test_end_of_input(self):
        code, shown = self.on_terminal('-r', 'X', answers=[b'\x04'])
        self.assertEqual((code, self.left()), (1, ['X.tgz', 'Y.tgz']))
        self.assertRegex(shown, r"\[y/N\] (\^D\x08\x08)?\netc: 'X' \(1\.5 kB\) in .* stays\n\Z")

    def test_ctrl_c(self):
        code, shown = self.on_terminal('-r', 'X', 'Y', answers=[b'\x03'])
        self.assertEqual((code, self.left()), (130, ['X.tgz', 'Y.tgz']))
        self.assertTrue(shown.endswith('etc: interrupted\n'), shown)

    def test_several(self):
        code, shown = self.on_terminal('-r', 'Nope', 'X', 'Y', answers=[b'n\n', b'y\n'])
        self.assertEqual((code, self.left()), (1, ['X.tgz']), shown)
        self.assertIn("etc: purged 'Y' from %s\n" % self.url, shown)

    def test_no_question(self):
        self.assertEqual(self.on_terminal('-r', '-f', 'X'), (0, "etc: purged 'X' from %s\n" % self.url))
        self.assertIn("did you mean 'Y'?", self.on_terminal('-r', 'y')[1])

    def test_another_push_before_the_answer(self):
        code, shown = self.on_terminal('-r', 'X', answers=[b'y\n'], meanwhile=lambda: write(self.tmp / 'share', {'X.tgz': 'newer'}))
        self.assertEqual((code, (self.tmp / 'share/X.tgz').read_text()), (1, 'newer'))
        self.assertIn("etc: 'X' in %s was replaced meanwhile; look again: " % self.url, shown)

    def test_only_one_end_is_a_terminal(self):
        for stdin, stderr in ((True, False), (False, True)):
            with self.subTest(stdin=stdin, stderr=stderr):
                import pty
                ours, theirs = pty.openpty()
                process = subprocess.Popen([sys.executable, SCRIPT, '--url', self.url, 'purge', '-r', 'X'], stdout=subprocess.DEVNULL,
                                           stdin=theirs if stdin else subprocess.DEVNULL, stderr=theirs if stderr else subprocess.PIPE)
                try:
                    err = process.communicate(timeout=60)[1]
                finally:
                    process.kill()
                if stderr:
                    err = os.read(ours, 4096)
                os.close(ours)
                os.close(theirs)
                self.assertEqual((process.returncode, self.left()), (2, ['X.tgz', 'Y.tgz']))
                self.assertIn(b"etc: without a terminal to ask on, 'etc purge -r' needs -f;", err)


class Mistakes(Case):
    """What people mistype or mistake, and the one line that each prints."""

    def setUp(self):
        super().setUp()
        os.chdir(str(self.tmp))
        self.addCleanup(os.chdir, str(HERE))

    def test_each_gets_its_line(self):
        write(self.tmp, {'digits/data/train/1': 'one', 'digits/data/test/2': 'two', 'images/1.png': 'png', 'digits.tgz': 'x',
                         'my data/data/train/x': 'x', 'typo.yaml': '# mine\nulr: s3://bucket\n', 'toml.yaml': 'url = "s3://b"\n'})
        self.etc('register', './digits', 'MNIST')
        self.etc('push', 'MNIST')
        self.etc('create', 'Mine')
        here, share = str(self.tmp), self.url
        no_dataset = "%s is no dataset: it needs a directory 'data' with a directory for each partition"
        no_name = "'%s' cannot be a dataset's name: it takes at most 128 letters, digits, '.', '_' and '-', the first a letter or digit"
        for command, status, line in (
            (['pul', 'MNIST'], 2, "no command 'pul'; did you mean 'pull'? 'etc -h' shows how"),
            (['frobnicate'], 2, "no command 'frobnicate'; 'etc -h' shows how"),
            (['pull'], 2, "'etc pull' needs NAME; 'etc pull -h' shows how"),
            (['pull', 'MNIST', '--forse'], 2, "'etc pull' takes no '--forse'; did you mean '--force'? 'etc pull -h' shows how"),
            (['info', 'MNIST', 'X'], 2, "'etc info' takes no 'X'; 'etc info -h' shows how"),
            (['diff', 'MNIST'], 2, "diff takes two names, and '-r' before one that is remote; 'etc diff -h' shows how"),
            (['diff', 'MNIST', '-r'], 2, "argument -r/--remote: expected 1 argument; 'etc diff -h' shows how"),
            (['diff', 'MNIST', '-r', 'MNIST', '--files'], 2,
             "'--files' takes two local datasets; pull the remote one first; 'etc diff -h' shows how"),
            (['ls', '-l', 'MNITS'], 1, "no dataset here matches 'MNITS'; did you mean 'MNIST'?"),
            (['ls', '-r', 'mnist', 'x*'], 1, "no dataset in %s matches 'mnist' or 'x*'; did you mean 'MNIST'?" % share),
            (['ls', '-r', 's3://bucket/'], 1, "no dataset in %s matches 's3://bucket/'; use --url for a URL" % share),
            (['register', 'a', 'b', 'c'], 2, "register takes DIR, DIR NAME or DIR as NAME; 'etc register -h' shows how"),
            (['pull', 'MNITS'], 1, "no dataset 'MNITS' in %s; did you mean 'MNIST'?" % share),
            (['pull', 'mnist'], 1, "no dataset 'mnist' in %s; did you mean 'MNIST'?" % share),
            (['pull', 'MNIST.tgz'], 1, "no dataset 'MNIST.tgz' in %s; did you mean 'MNIST'?" % share),
            (['pull', 'Flowers'], 1, "no dataset 'Flowers' in %s; 'etc ls -r' lists what is there" % share),
            (['--home', 'two', 'pull', 'MNIST', '-p', 'trian'], 1,
             "no partition 'trian' in MNIST; it has: test, train; did you mean 'train'?"),
            (['pull', 's3://bucket/MNIST'], 1, no_name % 's3://bucket/MNIST' + '; use --url for a URL'),
            (['pull', 'MNIST@sha256:abc'], 1, "'MNIST@sha256:abc' is not NAME@sha256:... with 64 hexadecimal digits"),
            (['register', 'MNIST', './digits'], 1,
             "no directory %s/MNIST; the directory comes first: 'etc register ./digits MNIST'" % here),
            (['register', './digits/data', 'as', 'X'], 1, no_dataset % (here + '/digits/data') + '; %s/digits is one' % here),
            (['register', './images', 'X'], 1, no_dataset % (here + '/images')),
            (['register', 'digits.tgz'], 1, '%s/digits.tgz is a file, not a directory; unpack it first' % here),
            (['register', './my data'], 1, no_name % 'my data'),
            (['register', './my data', 'MNIST'], 1,
             "another 'MNIST' is installed already; choose another name, or -f (force) to replace it"),
            (['push', 'Flowers'], 1, "no local dataset 'Flowers'; 'etc register DIR Flowers' gives a directory that name"),
            (['purge', 'Flowers'], 1, "no local dataset 'Flowers'; 'etc ls' lists what there is"),
            (['purge', '-r', 'MNIST'], 2, "without a terminal to ask on, 'etc purge -r' needs -f; 'etc purge -h' shows how"),
            (['purge', '-r', '-f', 'MNITS'], 1, "no dataset 'MNITS' in %s; did you mean 'MNIST'?" % share),
            (['verify', 'Flowers'], 1, "no local dataset 'Flowers'; 'etc pull Flowers' would fetch it"),
            (['info', 'mine'], 1, "no local dataset 'mine'; did you mean 'Mine'?"),
            (['--url', 'bucket', 'ls', '-r'], 1,
             'cannot use the url; it must start with file:// or s3:// or gs:// or https:// or http://'),
            (['--url', 'file://share', 'ls', '-r'], 1, "the url is no absolute path; write file:///path, with three slashes"),
            (['--url', 'file://%s/no' % here, 'ls', '-r'], 1,
             'no directory %s/no; check the url, or make it with the first push' % here),
            (['--config', 'typo.yaml', 'ls'], 1, "%s/typo.yaml:2: unknown setting 'ulr'; did you mean 'url'?" % here),
            (['--config', 'toml.yaml', 'ls'], 1,
             "%s/toml.yaml:1: not of the form 'key: value' (lists, nesting and indentation are not supported)" % here),
            (['--config', 'no.yaml', 'ls'], 1, 'no settings file %s/no.yaml; create it, or drop --config and $ETC_CONFIG' % here),
        ):
            with self.subTest(command):
                self.assertEqual(self.etc(*command, status=status), ('', 'etc: %s\n' % line))
        self.assertIn("'etc create' needs NAME", self.etc('create', status=2)[1])
        self.assertIn('n: cannot be read: ' if os.name == 'posix' else 'etc: ', self.etc('--config', 'n' * 300, 'ls', status=1)[1])
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            self.assertEqual(etc.main(['pull', 'MNIST']), 1)
        self.assertIn('etc: no url; set where datasets are shared', err.getvalue())

    def test_other_contents(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        self.etc('push', 'X')
        self.etc('create', '-f', 'X')
        self.assertIn("push it under another name, or 'etc push -f X' replaces it", self.etc('push', 'X', status=1)[1])
        self.assertIn("'etc pull -f X' replaces it", self.etc('pull', 'X', status=1)[1])

    def test_help(self):
        os.environ['COLUMNS'] = '82'  # argparse leaves two of them empty
        overview = io.StringIO()
        with contextlib.redirect_stderr(overview):
            self.assertEqual(etc.main([]), 2)
        whole = self.etc('-h')[0]
        commands = re.findall(r'^    (\w+) +\w', whole, re.M)
        self.assertEqual(len(commands), 10)
        for command in commands:
            with self.subTest(command):
                shown = self.etc(command, '-h')[0]
                self.assertEqual(shown, etc._parser(['-h']).commands.choices[command].format_help())
                examples = re.findall(r'^  .*?(etc \w+(?: [^\s)]+)*)', shown.partition('examples:')[2], re.M)
                self.assertTrue(examples[0] in overview.getvalue(), (command, examples))
                for example in examples:
                    words = example.split(' | ')[0].split()[1:]
                    self.assertEqual(etc._arguments(words).command, command)  # they can be typed as they are

    def test_help_as_a_command(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), self.assertRaises(SystemExit) as caught:
            etc.main(['help', 'pull'])
        self.assertEqual(caught.exception.code, 0)
        self.assertIn('etc pull MNIST -p test', out.getvalue())


class People(Case):
    def test_lists(self):
        root = small(self.tmp / 'ds')
        self.etc('register', root, 'Registered')
        self.etc('register', '--copy', root, 'C')
        digest = etc.Dataset(root).digest
        rows = self.etc('ls', '-l')[0].splitlines()
        self.assertEqual(rows, ['C           5.04 kB  6  just now  ' + digest, 'Registered        -  -  -         ' + root.as_uri()])
        listed = json.loads(self.etc('ls', '--json')[0])
        self.assertEqual([sorted(item) for item in listed],
                         [['digest', 'files', 'name', 'partial', 'partitions', 'root', 'size', 'source', 'when']] * 2)
        self.etc('push', 'C')
        listed = json.loads(self.etc('ls', '-r', '--json')[0])[0]
        self.assertEqual(sorted(listed), sorted(['archive_size', 'digest', 'files', 'meta', 'name', 'partitions', 'readme',
                                                 'size', 'when']))
        when = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - 3 * 86400 - 60))
        receipt, = (self.tmp / 'home/.etcetera/receipts').glob('C@*')
        receipt.write_text(json.dumps(dict(json.loads(receipt.read_text()), when=when)))
        self.assertIn('  3 days ago  ', self.etc('ls', '-l')[0])

    def test_patterns(self):
        for name in ('MNIST', 'MNIST-small', 'svhn', 'CIFAR'):
            etc.create(name, config=self.config())
        for patterns, names in ((['MNIST*'], ['MNIST', 'MNIST-small']), (['*-small', '[a-z]*'], ['MNIST-small', 'svhn']),
                                (['?????', 'svhn'], ['CIFAR', 'MNIST', 'svhn']), (['[!M]*'], ['CIFAR', 'svhn'])):
            with self.subTest(patterns):
                self.assertEqual(etc.ls(patterns=patterns, config=self.config()), names)
                self.assertEqual(self.etc('ls', *patterns)[0].split(), names)
                listed = self.etc('ls', *(patterns[:1] + ['--json'] + patterns[1:]))[0]
                self.assertEqual([item['name'] for item in json.loads(listed)], names)
                self.assertEqual([line.split()[0] for line in self.etc('ls', '-l', *patterns)[0].splitlines()], names)
        for patterns in ([], ['M'], ['mnist'], ['[z-a]'], ['[']):
            with self.subTest(patterns):
                self.assertEqual(etc.ls(patterns=patterns, config=self.config()), [])
        with self.assertRaisesRegex(etc.ConfigError, "'patterns' must be a list"):
            etc.ls(patterns='MNIST*', config=self.config())
        out, err = self.etc('ls', 'svhn', 'nope*', status=1)  # what matches is shown
        self.assertEqual((out, err), ('svhn\n', "etc: no dataset here matches 'nope*'\n"))
        self.assertEqual(self.etc('ls', '--json', '[', status=1)[0], '[]\n')

    def test_info(self):
        root = write(self.tmp / 'ds', {'data/train/x': 'x' * 1500, 'data/test/y': '', 'README.md': '\n'.join(map(str, range(50)))})
        self.etc('register', '--copy', root, 'X')
        text, readme = self.etc('info', 'X')[0].split('\n\n', 1)
        lines = [line[:11].strip() + '|' + line[12:] for line in text.splitlines()]
        self.assertEqual(lines[0], 'name|X')
        self.assertEqual(lines[1], 'digest|' + etc.Dataset(root).digest)
        self.assertIn('size|1.64 kB in 3 files', lines)
        self.assertEqual(lines[-2:], ['partitions|test: 0 B in 1 file', '|train: 1.5 kB in 1 file'])
        self.assertEqual(readme, '\n'.join(map(str, range(20))) + '\n... (30 more lines of README.md)\n')


class Diff(Case):
    """Of local datasets; RemoteSuite compares remote ones."""

    def registered(self, name, files, base=None):
        root = self.tmp / 'ds' / name
        if base:
            shutil.copytree(str(self.tmp / 'ds' / base), str(root), symlinks=True)
        self.etc('register', '-f', write(root, files), name)
        return root

    def statuses(self, *args, **kwargs):
        """As {path: status}, from the columns and from the JSON."""
        out, _ = self.etc('diff', *args, **kwargs)
        found = json.loads(self.etc('diff', '--json', *args, **kwargs)[0])
        rows = found['segments' if found['files'] is None else 'files']
        statuses = {re.split('  +', line)[-1]: line.split()[0] for line in out.splitlines()}
        self.assertEqual(statuses, {etc._printable(path): row['status'] for path, row in rows.items()})
        self.assertEqual(found['equal'], not kwargs.get('status'))
        return statuses

    def test_segments(self):
        self.registered('A', {'data/train/x': 'x', 'data/test/y': 'y', 'README.md': 'r', 'assets/a': 'a', '+/p': 'p'})
        b = self.registered('B', {'data/train/x': 'other', 'data/val/v': '', 'more/m': 'm'}, base='A')
        shutil.rmtree(str(b / 'data/test'))
        shutil.rmtree(str(b / '+'))
        self.assertEqual(self.etc('diff', 'A', 'B', status=1), (
            'same     1 B in 1 file  1 B in 1 file  .\n'
            'gone     1 B in 1 file  -              +\n'
            'same     1 B in 1 file  1 B in 1 file  assets\n'
            'new      -              1 B in 1 file  more\n'
            'gone     1 B in 1 file  -              data/test\n'
            'differs  1 B in 1 file  5 B in 1 file  data/train\n'
            'new      -              0 B in 1 file  data/val\n', ''))
        found = json.loads(self.etc('diff', 'A', 'B', '--json', status=1)[0])
        one = {'files': 1, 'size': 1}
        self.assertEqual(found, etc.diff('A', 'B', config=self.config()))
        self.assertEqual(list(found), ['equal', 'a', 'b', 'segments', 'files'])
        self.assertEqual((found['equal'], found['files'], found['a']), (
            False, None, {'name': 'A', 'remote': False, 'digest': etc.Dataset(self.tmp / 'ds/A').digest}))
        self.assertEqual(found['segments']['assets'], {'status': 'same', 'a': one, 'b': one})
        self.assertEqual(found['segments']['+'], {'status': 'gone', 'a': one, 'b': None})
        self.assertEqual(found['segments']['more'], {'status': 'new', 'a': None, 'b': one})
        self.assertEqual(set(self.statuses('A', 'A').values()), {'same'})

    def test_files(self):
        self.registered('A', {'data/train/%s' % name: content for name, content in {
            'same': 'same', 'size': 'a', 'text': 'old', 'run': 'x', 'a/b': 'in a directory', 'a-': '', 'link': ('->', 'same'), 'kept': ('->', 'run'),
            'file': 'or directory', 'alike': 'of one time', 'gone/hollow': None, 'new\nline': '', 'either': ('->', 'same'),
            'large': noise(MIB + 5), 'larger': noise(2 * MIB + 5)}.items()})
        b = self.registered('B', {'data/train/%s' % name: content for name, content in {
            'size': 'ab', 'text': 'new', 'a/c': 'new', 'later': 'x' * 1500, 'large': noise(MIB + 4) + b'x'}.items()}, base='A')
        (b / 'data/train/run').chmod(0o755)
        for name, content in (('link', ('->', 'a/b')), ('file', None), ('either', 'same'), ('new\nline', 'x')):
            (b / 'data/train' / name).unlink()
            write(b, {'data/train/' + name: content})
        shutil.rmtree(str(b / 'data/train/gone'))
        os.utime(str(b / 'data/train/text'), (1, 1))
        os.utime(str(self.tmp / 'ds/A/data/train/text'), (1, 1))
        self.assertEqual(self.etc('diff', '--files', 'A', 'B', status=1), (
            'new      -          3 B              data/train/a/c\n'
            'differs  -> same    4 B              data/train/either\n'
            'gone     12 B       -                data/train/file\n'
            'new      -          directory        data/train/file/\n'
            'gone     directory  -                data/train/gone/\n'
            'gone     directory  -                data/train/gone/hollow/\n'
            'differs  1.05 MB    1.05 MB          data/train/large\n'
            'new      -          1.5 kB           data/train/later\n'
            'differs  -> same    -> a/b           data/train/link\n'
            'differs  0 B        1 B              data/train/new\\nline\n'
            'differs  1 B        1 B, executable  data/train/run\n'
            'differs  1 B        2 B              data/train/size\n'
            'differs  3 B        3 B              data/train/text\n', ''))
        found = etc.diff('A', 'B', files=True, config=self.config())
        self.assertEqual(found, json.loads(self.etc('diff', 'A', '--files', '--json', 'B', status=1)[0]))
        self.assertEqual(found['files']['data/train/link'], {
            'status': 'differs', 'a': {'size': 0, 'link': 'same', 'executable': False}, 'b': {'size': 0, 'link': 'a/b', 'executable': False}})
        self.assertEqual(found['files']['data/train/file/'], {'status': 'new', 'a': None, 'b': {'size': None, 'link': None, 'executable': False}})
        self.assertTrue(found['files']['data/train/run']['b']['executable'])
        write(b, {'data/train/text': 'old'})
        os.utime(str(b / 'data/train/text'), (1, 1))
        self.assertNotIn('data/train/text', etc.diff('A', 'B', files=True, config=self.config())['files'])
        self.assertEqual(self.etc('diff', '--files', 'A', 'A'), ('', ''))
        with self.assertRaisesRegex(etc.ConfigError, 'only local datasets can be compared file by file; pull the remote one first'):
            etc.diff('A', 'B', [False, True], files=True, config=self.config())

    def test_odd_names(self):
        root = odd(self.tmp / 'odd', 3)
        self.etc('register', root, 'Odd')
        self.etc('register', '--copy', root, 'Copy')
        self.assertEqual(set(self.statuses('Odd', 'Copy').values()), {'same'})
        self.etc('create', 'Empty', 'empty')
        gone = self.statuses('--files', 'Odd', 'Empty', status=1)
        self.assertEqual(set(gone.values()), {'gone'})
        with tarfile.open(fileobj=io.BytesIO(b''.join(block.read() for block in etc._blocks(etc._segments(root)))), mode='r:') as tar:
            names = {etc._printable(member.name + '/' * member.isdir()) for member in tar}
        self.assertEqual(set(gone) ^ names, {'data/', 'data/empty/'})
        self.assertEqual(set(self.statuses('Empty', 'Odd', '--files', status=1)), set(gone))

    def test_how_names_are_typed(self):
        """In which order, and before or after flags, on every version of argparse."""
        self.share(small(self.tmp / 'ds'), 'A')
        write(self.tmp / 'ds', {'data/val/v': 'v'})
        self.share(self.tmp / 'ds', 'B')
        a, b = {'name': 'A', 'remote': False}, {'name': 'B', 'remote': False}
        far_a, far_b = dict(a, remote=True), dict(b, remote=True)
        for words, sides in (
                ('A B', (a, b)), ('B A', (b, a)), ('A -r B', (a, far_b)), ('-r A B', (far_a, b)), ('-r A -r B', (far_a, far_b)),
                ('-r B -r A', (far_b, far_a)), ('--remote=A B', (far_a, b)), ('B -rA', (b, far_a)), ('A -v B', (a, b)), ('-v A B', (a, b)),
                ('A -v -r B', (a, far_b)), ('-r A -v B', (far_a, b)), ('-v -r A -v -r B -v', (far_a, far_b)), ('B -r B', (b, far_b)),
                ('-- A B', (a, b)), ('-r A -- B', (far_a, b))):
            with self.subTest(words):
                found = json.loads(self.etc('diff', '--json', *words.split(), status=None)[0])
                self.assertEqual([{key: found[side][key] for key in ('name', 'remote')} for side in 'ab'], list(sides))
        for words in ('A', '-r A', 'A B B', 'A -r B B', '-r A -r B -r B', ''):
            with self.subTest(words):
                self.assertIn('diff takes two names', self.etc('diff', *words.split(), status=2)[1])

    def test_status_alone(self):
        self.registered('A', {'data/train/x': 'x'})
        self.registered('B', {'data/train/x': 'y'})
        for words in ([], ['--json'], ['--files']):
            with self.subTest(words):
                self.assertEqual(self.quiet('A', 'B', *words), (1, '', ''))
                self.assertEqual(self.quiet('A', 'A', *words), (0, '', ''))
        code, out, err = self.quiet('A', 'C')
        self.assertEqual((code, out, err[:35]), (1, '', "etc: no local dataset 'C'; 'etc pul"))

    def test_pins(self):
        digest = etc.Dataset(self.registered('A', {'data/train/x': 'x'})).digest
        other = etc.Dataset(self.registered('B', {'data/train/x': 'y'})).digest
        self.etc('push', 'A')
        self.etc('diff', 'A@' + digest, 'A')
        self.assertEqual(self.statuses('A@' + digest, 'B@' + other, status=1)['data/train'], 'differs')
        for words in (['A@' + other, 'B'], ['B', 'A@' + other], ['-r', 'A@' + other, 'A'], ['A', '-r', 'A@' + other],
                      ['A@' + digest, 'A@' + other]):
            with self.subTest(words):
                out, err = self.etc('diff', *words, status=1)
                self.assertEqual((out, err), ('', "etc: 'A': expected digest %s, found %s\n" % (other, digest)))

    def test_partial(self):
        root = self.registered('X', {'data/train/x': 'x', 'data/test/y': 'y', 'assets/a': 'a', 'README.md': 'r'})
        self.etc('push', 'X')
        self.etc('pull', '-p', 'test', 'X', home='two')
        same = dict.fromkeys(['.', 'assets', 'data/test', 'data/train'], 'same')
        self.assertEqual(self.statuses('-r', 'X', 'X', home='two'), same)
        self.etc('register', root, 'Y', home='two')
        self.assertEqual(self.statuses('Y', 'X', home='two'), same)
        self.assertEqual(self.etc('diff', '--files', 'Y', 'X', home='two'), ('', ''))
        write(root, {'data/test/y': 'changed', 'data/val/v': 'v'})
        self.assertEqual(self.statuses('--files', 'X', 'Y', home='two', status=1),
                         {'data/test/y': 'differs', 'data/val/': 'new', 'data/val/v': 'new'})
        write(root, {'data/train/x': 'changed', 'assets/b': 'b'})
        for words in (['X', 'Y'], ['Y', 'X']):
            with self.subTest(words):
                self.assertEqual(self.etc('diff', '--files', *words, home='two', status=1), (
                    '', "etc: 'X' is only partly installed, without assets, data/train; 'etc pull X' fetches the rest\n"))
        write(self.tmp / 'two/X', {'touched': ''})  # what is here is read, of the rest the receipt knows
        self.assertEqual(self.statuses('-r', 'X', 'X', home='two', status=1), dict(same, **{'.': 'differs'}))
        (self.tmp / 'two/X/touched').unlink()
        self.assertEqual(self.statuses('-r', 'X', 'X', home='two'), same)

    def test_nothing_is_read_that_a_receipt_knows(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        self.etc('push', 'X')
        self.assertEqual(self.read(lambda: self.etc('diff', 'X', '-r', 'X')), [])
        self.etc('register', self.tmp / 'ds', 'Y')
        self.assertEqual(self.read(lambda: self.etc('diff', 'X', 'Z', status=1)), [])  # before it turns out that there is none
        self.assertEqual(self.read(lambda: self.etc('diff', 'Y', '-r', 'Z', status=1)), [])
        self.assertEqual(len(self.read(lambda: self.etc('diff', 'X', 'Y'))), 6)

    def read(self, work):
        """The files of datasets that are read meanwhile."""
        original, files = etc._read_file, []
        self.addCleanup(setattr, etc, '_read_file', original)
        etc._read_file = lambda entry, start, stop: (files.append(entry.name), original(entry, start, stop))[1]
        work()
        etc._read_file = original
        return files

    def quiet(self, *words):
        process = self.spawn('diff', '-q', *words)
        out, err = process.communicate()
        return process.returncode, out.decode(), err.decode()

    @unittest.skipIf(os.name == 'nt', 'no pseudoterminals')
    def test_heading(self):
        import pty
        self.share(small(self.tmp / 'ds'))
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, SCRIPT, '--url', self.url, '--home', str(self.tmp / 'home'), 'diff', 'X', '-r', 'X'], stdout=theirs)
        os.close(theirs)
        self.assertEqual(process.wait(), 0)
        with open(ours, 'rb', 0) as file:
            self.assertEqual(file.read(4096).decode().splitlines()[0], 'STATUS  X                   -r X                PATH')


@needs(os.name == 'posix' and shutil.which('bash'), 'bash is not installed')
class Bash(Case):
    """Completion as a user sees it: typed into a shell on a terminal."""
    shell = ['bash', '--norc', '--noprofile', '-i']
    load = 'eval "$(etc completion bash)"'

    def setUp(self):
        super().setUp()
        bin_ = write(self.tmp / 'bin', {'etc': '#!/bin/sh\nexec "%s" "%s" "$@"\n' % (sys.executable, SCRIPT)})
        (bin_ / 'etc').chmod(0o755)
        os.environ.update(PATH='%s:%s' % (bin_, os.environ['PATH']), ETC_URL=self.url, ETC_HOME=str(self.tmp / 'home'),
                          TERM='xterm', PS1='ready$ ', XDG_CONFIG_HOME=str(self.tmp), XDG_DATA_HOME=str(self.tmp))

    def type(self, lines):
        """Each line is sent when the shell shows its prompt."""
        import fcntl
        import pty
        import termios
        ours, theirs = pty.openpty()
        process = subprocess.Popen(self.shell, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=str(self.tmp),
                                   preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        guard = threading.Timer(60, process.kill)
        guard.start()
        shown = b''
        with open(ours, 'r+b', 0) as file, contextlib.suppress(OSError):  # EIO when the terminal is closed
            for line in lines:
                while b'ready' not in shown:
                    shown += file.read(4096) or b'ready'
                shown = b''
                file.write(line.encode() + b'\n')
            for _ in iter(lambda: file.read(4096), b''):
                pass
        process.wait()
        guard.cancel()

    def test_typed(self):
        etc.push(etc.register(small(self.tmp / 'ds'), 'Small', config=self.config('pub')).name, config=self.config('pub'))
        self.type([self.load, 'etc pul\tSm\t',           # a command, and a remote name
                   'etc ls --js\t >listed',               # an option
                   'etc register d\tCopy --c\t',          # a file
                   'etc purg\tSm\t', 'etc pur\tN\tCo\t',  # local names
                   'exit'])
        self.assertEqual([item['name'] for item in json.loads((self.tmp / 'listed').read_text())], ['Small'])
        self.assertEqual(self.installed(), [])


@needs(shutil.which('zsh'), 'zsh is not installed')
class Zsh(Bash):
    shell = ['zsh', '-f', '-i']
    load = 'autoload -Uz compinit; compinit -u; eval "$(etc completion zsh)"'


@needs(shutil.which('fish'), 'fish is not installed')
class Fish(Bash):
    shell = ['fish', '--no-config', '-i', '-C', 'function fish_prompt; echo "ready> "; end']
    load = 'etc completion fish | source'


class Completion(Case):
    def words(self, *words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.assertEqual(etc.main(['completion', 'bash'] + list(words)), 0)
        self.assertEqual(err.getvalue(), '')
        return out.getvalue().split()

    def test_words(self):
        home = str(self.tmp / 'home')
        etc.create('Alpha', config=self.config())
        etc.create('Beta', config=self.config())
        self.assertEqual(self.words('pu'), ['push', 'pull', 'purge'])
        self.assertEqual(self.words('--ver'), ['--version', '--verbose'])
        self.assertEqual(sorted(self.words('pull', '--')), ['--config', '--force', '--help', '--home', '--partition', '--quiet', '--url',
                                                            '--verbose'])
        self.assertEqual(self.words('--home', home, 'purge', ''), ['Alpha', 'Beta'])
        self.assertEqual(self.words('--home', home, 'purge', 'Alpha', ''), ['Beta'])
        write(self.tmp / 'share', {'Gamma.tgz': 'x', 'Delta.tgz': 'x'})
        for flag in ('-r', '--remote'):
            with self.subTest(flag):
                self.assertEqual(self.words('--home', home, '--url', self.url, 'purge', flag, ''), ['Delta', 'Gamma'])
        remove(self.tmp / 'share')
        self.assertEqual(self.words('completion', 'z'), ['zsh'])
        etc.register(small(self.tmp / 'ds'), 'Gamma', config=self.config())
        etc.push('Gamma', config=self.config())
        place = ['--home', home, '--url', self.url]
        for words, known in ((['diff', ''], ['Alpha', 'Beta', 'Gamma']), (['diff', 'Gamma', 'G'], ['Gamma']), (['diff', '-r', ''], ['Gamma']),
                             (['diff', 'Gamma', '--remote', ''], ['Gamma']), (['diff', '-r', 'Gamma', 'A'], ['Alpha']),
                             (['diff', '--f'], ['--files']), (['ls', 'A'], ['Alpha']), (['ls', '-r', ''], ['Gamma'])):
            with self.subTest(words=words):
                self.assertEqual(self.words(*(place + words)), known)
        for words in (['--home', ''], ['register', ''], ['pull', ''], ['--url', 'http://127.0.0.1:9', 'pull', ''],
                      ['--config', '/nowhere', 'push', '']):
            with self.subTest(words):
                self.assertEqual(self.words(*words), [], words)


def paths_of(ds):
    """What a worker process does with a dataset."""
    return sorted(str(path) for partition in ds.values() for path in partition.iterdir()), ds.digest, ds.name


class Python(Case):
    def test_copies(self):
        import copy
        import pickle
        ds = etc.register(odd(self.tmp / 'ds', 3), 'X', config=self.config())
        ds.digest
        pickled = [('pickle %d' % protocol, pickle.loads(pickle.dumps(ds, protocol))) for protocol in range(5)]
        for how, other in [('copy', copy.copy(ds)), ('deepcopy', copy.deepcopy(ds))] + pickled:
            with self.subTest(how):
                self.assertEqual((other, other.name, other.root, other._digest), (ds, 'X', ds.root, ds.digest))
        self.assertEqual(repr(pickle.loads(pickle.dumps(ds))), '<Dataset X: empty, test, train>')
        for error in (etc.RemoteError('gone', status=404), etc.UnknownPartition('no')):
            with self.subTest(error):
                other = pickle.loads(pickle.dumps(error))
                self.assertEqual((type(other), str(other), vars(other)), (type(error), str(error), vars(error)))

    def test_worker_processes(self):
        import multiprocessing
        ds = etc.register(small(self.tmp / 'ds'), 'X', config=self.config())
        expected = paths_of(ds)
        self.assertEqual(len(expected[0]), 3)
        for method in multiprocessing.get_all_start_methods():
            with self.subTest(method):
                with multiprocessing.get_context(method).Pool(2) as pool:
                    self.assertEqual(pool.map(paths_of, [ds] * 4), [expected] * 4, method)

    def test_logging(self):
        etc.register(small(self.tmp / 'ds'), 'X', config=self.config())
        with self.assertLogs('etcetera', 'DEBUG') as logged:
            digest = etc.push('X', config=self.config())
        self.assertEqual([record.levelname for record in logged.records], ['INFO', 'DEBUG'])
        self.assertRegex(logged.records[0].getMessage(), r'\Apushed X to file://.*: 6 files, 5\.04 kB in .* s \(.*B/s\)\Z')
        self.assertEqual(logged.records[1].getMessage(), 'X@' + digest)

    def test_help(self):
        import pydoc
        text = pydoc.render_doc(etc, renderer=pydoc.plaintext)
        for name in etc.__all__:
            with self.subTest(name):
                self.assertRegex(text, r'\b(def |class )?%s\(' % name)
        self.assertNotRegex(text, r'(?m)^    (class )?_[a-z]')


class Refusals(Case):
    """Whatever goes wrong is an etc.Error in one line; what is no user's fault comes out as it is."""

    def run_python(self, program, *args, **kwargs):
        done = subprocess.run([sys.executable, '-c', 'import sys\nsys.path.insert(0, %r)\n%s' % (str(HERE), program)] + [str(a) for a in args],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, **kwargs)
        return done.returncode, done.stdout

    def test_no_ssl(self):
        program = 'sys.modules["ssl"] = None\nimport etcetera\nsys.exit(etcetera.main(sys.argv[1:]))'
        for args in (['--url', 'https://127.0.0.1:1/x', 'ls', '-r'], ['--url', 's3://bucket', 'pull', 'X'], ['--url', 'gs://bucket', 'pull', 'X']):
            with self.subTest(args):
                os.environ.update(AWS_ACCESS_KEY_ID='a', AWS_SECRET_ACCESS_KEY='b', NO_GCE_CHECK='true')
                code, out = self.run_python(program, '--home', self.tmp / 'home', *args)
                self.assertEqual((code, out), (1, 'etc: this Python has no ssl module, so it cannot use https://; use another Python, or a '
                                                  'url that needs none\n'))

    @unittest.skipUnless(sys.platform == 'linux', 'no /proc here')
    def test_few_threads(self):
        """Fewer are used where the system gives no more; none at all is an error that says what to do."""
        self.etc('register', odd(self.tmp / 'ds', 30), 'X')
        program = r"""
import threading, etcetera as etc
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
sys.exit(etc.main(sys.argv[2:]))
"""
        place = ['--url', self.url, '--home', self.tmp / 'home']
        write(self.tmp, {'one.yaml': 'connections: 1\n'})
        for limit, settings in ((3, []), (5, []), (2, ['--config', self.tmp / 'one.yaml'])):
            with self.subTest(limit):
                for command in (['push', '-f', 'X'], ['--home', self.tmp / 'two', 'pull', 'X'], ['--home', self.tmp / 'two', 'verify', 'X'],
                                ['--home', self.tmp / 'two', 'purge', 'X']):
                    with self.subTest(command):
                        code, out = self.run_python(program, limit, *settings + place + command)
                        self.assertEqual(code, 0, out)
        code, out = self.run_python(program, 0, *place + ['push', '-f', 'X'])
        self.assertEqual((code, out), (1, "etc: the system does not allow this process any more threads; set 'connections: 1', or raise the limits "
                                          '(ulimit -u, ulimit -v)\n'))

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interrupted_while_threads_start(self):
        self.etc('register', odd(self.tmp / 'ds', 30), 'X')
        program = r"""
import os, signal, threading, etcetera as etc
start, last = threading.Thread.start, int(sys.argv[1])
def interrupted(thread):
    global last
    start(thread)
    last -= 1
    if last == 0:
        os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread.start = interrupted
etc._cores = lambda: 4
sys.exit(etc.main(sys.argv[2:]))
"""
        for last in (1, 2, 4):
            with self.subTest(last):
                done = self.run_python(program, last, '--url', self.url, '--home', self.tmp / 'home', 'push', 'X', timeout=60)
                self.assertEqual(done, (130, 'etc: interrupted\n'))

    @unittest.skipUnless(sys.platform == 'linux' and hasattr(sys, 'getrefcount'), 'no such limit on memory here')
    def test_little_memory(self):
        """As with ulimit -v: the command succeeds, or says what to do."""
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(30 * MIB)}))
        program = r"""
import resource, etcetera as etc
now = int(re.search(r'VmSize:\s+(\d+)', open('/proc/self/status').read()).group(1)) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
sys.exit(etc.main(sys.argv[2:]))
"""
        outcomes = set()
        for room in (1, 12, 24, 40, 70, 150, 1500):
            with self.subTest(room):
                try:
                    code, out = self.run_python('import re' + program, room, '--url', self.url, '--home', self.tmp / ('home%d' % room),
                                                'pull', 'X', timeout=60)
                except subprocess.TimeoutExpired:
                    continue  # CPython may wait for ever for a thread whose start failed for want of memory
                if room == 1 or re.search('Fatal Python error|exception in thread|libgcc_s', out, re.I):
                    self.assertTrue(code == 0 or 'pulled' not in out, out)  # the interpreter itself gave up
                    continue
                out = re.sub(r'\AException ignored [^\n]*?(?=etc: )', '', out)  # Python's own words, where it lacks memory
                self.assertEqual(len(out.splitlines()), 1, out)
                self.assertRegex(out, r'\Aetc: (pulled X|.*(memory|threads).*; set .connections: 1.)' if code else r'\Aetc: pulled X')
                outcomes.add(code)
        self.assertEqual(outcomes, {0, 1})

    def test_times_past_2038(self):
        """On some 32-bit systems the functions of `time` end there."""
        def narrow(function):
            def limited(seconds=None):
                if seconds is None or not 0 <= seconds < 1 << 31:
                    raise OverflowError('timestamp out of range for platform time_t')
                return function(seconds)
            return limited

        self.share(small(self.tmp / 'ds'))
        for name in ('gmtime', 'localtime'):
            self.addCleanup(setattr, etc.time, name, getattr(time, name))
            setattr(etc.time, name, narrow(getattr(time, name)))
        try:
            os.utime(str(self.tmp / 'share/X.tgz'), (2524608000, 2524608000))
        except OverflowError:
            self.skipTest('this system cannot set such times')
        self.assertIn('2050-01-01T00:00:00Z', self.etc('info', '-r', 'X')[0])
        self.assertIn('just now', self.etc('ls', '-r', '-l')[0])
        self.addCleanup(setattr, etc.time, 'time', time.time)
        etc.time.time = lambda: 2524608000.5
        self.etc('pull', 'X', home='two')
        self.assertIn('2050-01-01T00:00:00Z', self.etc('info', 'X', home='two')[0])

        class Dated(S3Handler):
            def date_time_string(self, timestamp=None):
                return 'Sat, 01 Jan 2050 00:00:00 GMT'
        server = Server(Dated)
        self.addCleanup(server.stop)
        self.settings = {'endpoint_url': server.url, 'aws_access_key_id': AKID, 'aws_secret_access_key': SECRET}
        self.assertEqual(self.etc('ls', '-r', url='s3://bucket'), ('', ''))
        self.assertEqual(server.log[-1][2]['x-amz-date'], '20500101T000000Z')

    def test_names_that_no_host_can_have(self):
        for url, endpoint in (('https://data..example.org', None), ('http://%s.example' % ('x' * 70), None),
                              ('s3://bucket', 'https://data..example.org'), ('gs://bucket', 'https://data..example.org')):
            with self.subTest(url, endpoint=endpoint):
                self.settings = {'endpoint_url': endpoint} if endpoint else {}
                os.environ['NO_GCE_CHECK'] = 'true'
                self.assertIn('has an invalid host name; check the url', self.etc('ls', '-r', url=url, status=1)[1])

        os.environ.update(http_proxy='http://proxy..example:9', no_proxy='')
        self.settings = {}
        self.assertIn('has an invalid host name', self.etc('ls', '-r', url='http://data.example.org', status=1)[1])

    def test_addresses_that_nothing_can_have(self):
        for url, endpoint in (('http://[::::]/', None), ('http://127.0.0.1:65536', None), ('s3://bucket', 'http://127.0.0.1:99999'),
                              ('gs://bucket', 'http://[1:::]'), ('http://127.0.0.1:0', None)):
            with self.subTest(url, endpoint=endpoint):
                self.settings = {'endpoint_url': endpoint} if endpoint else {}
                self.assertIn('the form https://host', self.etc('ls', '-r', url=url, status=1)[1])

    def test_paths_that_no_file_can_have(self):
        bad = 'a\0b'
        for what, call in (('register', lambda: etc.register(bad, 'X', config=self.config())), ('Dataset', lambda: etc.Dataset(bad)),
                           ('settings', lambda: etc.Config.load(bad)), ('url', lambda: etc.ls(True, self.config(url='file:///a%00b')))):
            with self.subTest(what):
                with self.assertRaises(etc.Error) as caught:
                    call()
                self.assertIn('a path cannot contain a NUL', str(caught.exception))

    def test_what_a_progress_function_raises(self):
        self.share(small(self.tmp / 'ds'))
        with tarfile.open(str(self.tmp / 'share/Y.tgz'), 'w:gz') as tar:
            tar.add(str(self.tmp / 'ds'), '.')
        config = self.config()
        for error in (ValueError('mine'), OSError(5, 'mine'), KeyError('mine'), EOFError('mine'), UnicodeError('mine'), MemoryError(),
                      etc.Corrupt('mine'), KeyboardInterrupt(), SystemExit(3), tarfile.ReadError('mine'), RecursionError('mine')):
            def progress(done, total):
                raise error
            for what, call in (
                    ('pull', lambda: etc.pull('X', config=self.config('two'), progress=progress)),
                    ('pull of another tool\'s', lambda: etc.pull('Y', config=self.config('two'), progress=progress)),
                    ('dataset', lambda: etc.dataset('X', auto_install=True, config=self.config('two'), progress=progress)),
                    ('push', lambda: etc.push('X', force=True, config=config, progress=progress)),
                    ('register', lambda: etc.register(self.tmp / 'ds', 'Z', copy=True, config=config, progress=progress)),
                    ('verify', lambda: etc.verify('X', config=config, progress=progress)),
                    ('info', lambda: etc.info('X', config=config, progress=progress))):
                with self.subTest(what, error=error):
                    with self.assertRaises(type(error)) as caught:
                        call()
                    self.assertIs(caught.exception, error)
            self.assertEqual((self.installed('two'), self.installed()), ([], ['X']))

    def test_faults_of_ours_are_not_called_damage(self):
        self.share(small(self.tmp / 'ds'))
        for error in (TypeError, ValueError, KeyError):
            def broken(*args):
                raise error('a fault in etcetera')
            with self.subTest(error):
                self.addCleanup(setattr, etc, '_is_safe', etc._is_safe)
                etc._is_safe = broken
                with self.assertRaisesRegex(error, 'a fault in etcetera'):
                    etc.pull('X', config=self.config('two'))


class Before(Case):
    """What users of etcetera 0.0.x have: its settings, its local store, its calls."""

    def test_settings(self):
        (self.tmp / '.etc.toml').write_text(
            '# mine\nurl = "s3://my-bucket"\npublic = true\n  aws_access_key_id="A\\\\x"  # quoted\nendpoint_url = \'http://h:1\'\n'
            'aws_access_key_secret = "s"\n')
        (self.tmp / '.etc.toml').chmod(0o600)
        config = etc.Config.load()
        self.assertEqual(config.aws_secret_access_key, 's')
        self.assertEqual((config.url, config.public, config.aws_access_key_id, config.endpoint_url),
                         ('s3://my-bucket', True, 'A\\x', 'http://h:1'))
        (self.tmp / '.etc.toml').write_text('url = "s3://b"\n[profile]\n')
        with self.assertRaisesRegex(etc.ConfigError, r'\.etc\.toml:2: '):
            etc.Config.load()
        (self.tmp / '.etc.yaml').write_text('url: s3://newer\n')
        self.assertEqual(etc.Config.load().url, 's3://newer')
        (self.tmp / 'other.toml').write_text('url = "s3://other"\n')
        self.assertEqual(etc.Config.load(self.tmp / 'other.toml').url, 's3://other')

    def test_store_and_calls(self):
        (self.tmp / '.etc').mkdir()
        os.symlink(str(small(self.tmp / 'ds')), str(self.tmp / '.etc/Registered'))
        shutil.copytree(str(self.tmp / 'ds'), str(self.tmp / '.etc/Pulled'))
        (self.tmp / '.etc.toml').write_text('url = "%s"\n' % self.url)
        self.assertEqual(list(etc.ls()), ['Pulled', 'Registered'])
        etc.push('Registered')
        etc.push('Pulled')
        self.assertEqual(list(etc.ls(remote=True)), ['Pulled', 'Registered'])
        etc.purge('Pulled')
        ds = etc.dataset('Pulled', auto_pull=True)
        self.assertEqual((ds.location, ds.data, ds.file('data', 'train')), (ds.root, ds.root / 'data', ds['train']))
        self.assertEqual((ds.partitions(), ds.keys(), dict(ds.items())['test']), (['test', 'train'], {'test', 'train'}, ds['test']))
        etc.pull('Registered', force=True)
        self.assertFalse((self.tmp / '.etc/Registered').is_symlink())
        self.assertTrue((self.tmp / 'ds/data').is_dir())


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
class Mypy(Case):
    def check(self, program, python, status):
        (self.tmp / 'user.py').write_text(program)
        process = subprocess.Popen([sys.executable, '-m', 'mypy', '--strict', '--python-executable', str(python), '--cache-dir',
                                    str(self.tmp / 'cache'), 'user.py'], cwd=str(self.tmp), stdout=subprocess.PIPE)
        out = process.communicate()[0].decode()
        self.assertEqual(process.returncode, status, out)
        return out

    def test_a_users_program(self):
        """Where etcetera is vendored, and where it is installed: there mypy wants to be told to follow it."""
        subprocess.check_call([sys.executable, '-m', 'venv', '--without-pip', str(self.tmp / 'venv')])
        python = self.tmp / 'venv' / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
        site = subprocess.check_output([str(python), '-c', 'import site; print(site.getsitepackages()[-1])']).decode().strip()
        shutil.copy(SCRIPT, site)
        self.assertIn('import-untyped', self.check(USER, python, 1))
        write(self.tmp, {'mypy.ini': '[mypy-etcetera]\nfollow_untyped_imports = True\n'})
        self.check(USER, python, 0)
        self.assertIn('"Path" has no attribute "nope"', self.check(USER + 'train.nope\n', python, 1))
        self.assertIn('incompatible type "int"', self.check(USER + 'etc.pull(3)\n', python, 1))
        shutil.copy(SCRIPT, str(self.tmp))
        (self.tmp / 'mypy.ini').unlink()
        self.check(USER, sys.executable, 0)
        self.check(USER, python, 0)  # without the optional libraries


class Program(Case):
    def run_(self, *command, **kwargs):
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
        out, err = process.communicate()
        self.assertEqual((process.returncode, err.decode()), (0, ''), command)
        return out.decode()

    def test_ways_to_start(self):
        etc.create('X', config=etc.Config(home=self.tmp / '.etc'))
        write(self.tmp / 'vendored', {'__init__.py': ''})
        shutil.copy(SCRIPT, str(self.tmp / 'vendored'))
        self.assertEqual(self.run_(sys.executable, SCRIPT, 'ls'), 'X\n')
        self.assertEqual(self.run_(sys.executable, '-m', 'etcetera', 'ls', cwd=str(HERE)), 'X\n')
        self.assertEqual(self.run_(sys.executable, '-m', 'vendored.etcetera', 'ls', cwd=str(self.tmp)), 'X\n')
        with open(SCRIPT, 'rb') as script:
            self.assertEqual(self.run_(sys.executable, '-', 'ls', stdin=script), 'X\n')
        code = 'import pickle, vendored.etcetera as e; d = e.dataset("X"); print(pickle.loads(pickle.dumps(d))["train"].name)'
        self.assertEqual(self.run_(sys.executable, '-c', code, cwd=str(self.tmp)), 'train\n')

    def test_pipes(self):
        home = self.tmp / '.etc'
        for number in range(3000):
            (home / ('D%04d' % number)).mkdir(parents=True)
        process = subprocess.Popen([sys.executable, SCRIPT, 'ls'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        self.assertEqual(process.stderr.read(), b'')
        process.stderr.close()
        process.wait()
        if os.path.exists('/dev/full'):
            with open('/dev/full', 'wb') as full:
                process = subprocess.Popen([sys.executable, SCRIPT, 'ls'], stdout=full, stderr=subprocess.PIPE)
                self.assertRegex(process.communicate()[1].decode(), r'\Aetc: cannot write to standard output: .*\n\Z')
        process = subprocess.Popen(['sh', '-c', '"%s" "%s" ls >&-' % (sys.executable, SCRIPT)], stderr=subprocess.PIPE)
        self.assertEqual(process.communicate()[1].decode(), 'etc: standard output is closed\n')

    def test_odd_surroundings(self):
        for env, word in (({'HOME': ''}, 'cannot tell where your home directory is;'),
                          ({'ETC_HOME': 'rel'}, 'the current directory is gone, so no relative path can be found;')):
            with self.subTest(**env):
                cwd = self.tmp / 'gone'
                cwd.mkdir()
                command = 'rmdir "%s" && "%s" "%s" ls' % (cwd, sys.executable, SCRIPT)
                process = subprocess.Popen(['sh', '-c', command], cwd=str(cwd), env=dict(os.environ, **env), stderr=subprocess.PIPE)
                err = process.communicate()[1].decode()
                self.assertTrue(err.startswith('etc: ' + word) and process.returncode == 1, err)

    def test_flat_directories_take_little_memory(self):
        if not sys.platform.startswith('linux'):
            return
        root = write(self.tmp / 'ds', {'data/train': None})
        for number in range(60000):
            os.close(os.open(str(root) + '/data/train/%06d' % number, os.O_CREAT | os.O_WRONLY))
        code = 'import sys; sys.path.insert(0, %r); import etcetera as e; e.Dataset(%r).digest; ' \
               'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])' % (str(HERE), str(root))
        limit = 128 if sys.implementation.name == 'pypy' else 56  # MiB, with the interpreter itself
        self.assertLess(int(self.run_(sys.executable, '-c', code)), limit * 1024)

    def test_many_files_take_one_walk_and_little_memory(self):
        if not sys.platform.startswith('linux'):
            return
        outside = write(self.tmp / 'outside', {'%04d' % number: '' for number in range(1000)})
        root = write(self.tmp / 'ds', {'data/train/%03d' % number: ('->', str(outside)) for number in range(150)})
        (self.tmp / 'share').mkdir()
        code = """if True:
            import os, sys
            sys.path.insert(0, %r)
            import etcetera as etc
            if hasattr(os, 'sched_setaffinity'):  # a thread more has more blocks under way
                os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
            scandir, scanned = os.scandir, []
            os.scandir = lambda path: (scanned.append(os.fspath(path)), scandir(path))[1]
            config = etc.Config(%r, home=%r)
            etc.register(%r, 'X', config=config)
            etc.push('X', config=config)
            print(*[scanned.count(path) for path in scanned if '/train/' in path])
            print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
            """ % (str(HERE), (self.tmp / 'share').as_uri(), str(self.tmp / 'home'), str(root))
        counts, memory = self.run_(sys.executable, '-c', code).splitlines()
        self.assertEqual(counts.split(), ['1'] * 150)
        limit = 160 if sys.implementation.name == 'pypy' else 56  # MiB, with the interpreter itself
        self.assertLess(int(memory), limit * 1024)

    def test_import_is_light(self):
        heavy = ('ssl', 'urllib.request', 'http.client', 'xml.etree.ElementTree', 'concurrent.futures', 'argparse', 'tarfile',
                 'logging', 'socket', 'email', 'configparser', 'ctypes')
        code = 'import sys; before = set(sys.modules); import etcetera; print(sorted(set(%r) & (set(sys.modules) - before)))'
        self.assertEqual(self.run_(sys.executable, '-c', code % (heavy,), cwd=str(HERE)), '[]\n')

    def test_no_library_of_a_cloud_is_loaded(self):
        code = 'import sys; sys.path.insert(0, %r); import etcetera; etcetera.main(sys.argv[1:]); ' \
               'print([m for m in sys.modules if m.startswith(("google", "boto"))])' % str(HERE)
        (self.tmp / 'share').mkdir()
        self.assertEqual(self.run_(sys.executable, '-c', code, '--url', (self.tmp / 'share').as_uri(), 'ls', '-r'), '[]\n')

    def test_public_names(self):
        for name in etc.__all__:
            with self.subTest(name):
                self.assertTrue(getattr(etc, name).__doc__, name)

    def test_warnings_are_errors(self):
        small(self.tmp / 'ds')
        url = (self.tmp / 'share').as_uri()
        run = [sys.executable, '-W', 'error'] + ['-X', 'dev'] * (sys.version_info >= (3, 7)) + [SCRIPT, '-q', '--url', url]
        for args in (['register', self.tmp / 'ds', 'X'], ['push', 'X'], ['--home', self.tmp / 'two', 'pull', 'X'],
                     ['--home', self.tmp / 'two', 'pull', '-f', 'X'], ['--home', self.tmp / 'two', 'verify', 'X'],
                     ['info', '-r', 'X'], ['--home', self.tmp / 'two', 'purge', 'X']):
            with self.subTest(args):
                self.run_(*(run + args))

    @unittest.skipUnless(sys.platform.startswith('linux'), 'as Linux does it')
    def test_plain_locale(self):
        root = odd(self.tmp / 'ds', 3)
        url = (self.tmp / 'share').as_uri()
        env = dict(os.environ, LC_ALL='C', LANG='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
        run = [sys.executable, SCRIPT, '-q', '--url', url]
        for args in (['register', root, 'X'], ['push', 'X'], ['--home', self.tmp / 'two', 'pull', 'X'],
                     ['--home', self.tmp / 'two', 'verify', 'X']):
            with self.subTest(args):
                self.run_(*(run + args), env=env)
        self.assertEqual(tree(self.tmp / 'two/X'), tree(root))
        self.assertEqual(etc.info('X', True, etc.Config(url))['digest'], etc.Dataset(root).digest)

    @unittest.skipUnless(sys.platform.startswith('linux'), 'as Linux measures it')
    def test_memory_is_flat(self):
        root = write(self.tmp / 'ds', {'data/train/x': None})
        with open(str(root / 'data/train/x/zeros'), 'wb') as file:
            file.truncate(300 * MIB)
        url = (self.tmp / 'share').as_uri()
        code = 'import sys; sys.path.insert(0, %r); import etcetera; status = etcetera.main(sys.argv[1:]); ' \
               'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]); sys.exit(status)' % str(HERE)
        for args in (['register', root, 'X'], ['push', 'X'], ['--home', self.tmp / 'two', 'pull', 'X']):
            with self.subTest(args[-2:]):
                peak = int(self.run_(sys.executable, '-c', code, '-q', '--url', url, *args))
                self.assertLess(peak, 200 * 1024, args)

    def test_readme_quick_start(self):
        text = (HERE / 'README.md').read_text(encoding='utf-8')
        block = re.search(r'```(?:sh|bash)\n(.*?)```', text, re.S).group(1)
        home = self.tmp / 'new user'
        home.mkdir()
        shutil.copy(SCRIPT, str(home))
        bin_ = write(self.tmp / 'bin', {'python3': '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable})
        (bin_ / 'python3').chmod(0o755)
        env = dict(os.environ, HOME=str(home), PATH='%s:%s' % (bin_, os.environ['PATH']))
        process = subprocess.Popen(['sh', '-e', '-c', block], cwd=str(home), env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        out = process.communicate()[0].decode()
        self.assertEqual(process.returncode, 0, out)
        self.assertIn('digits', out)
        self.assertTrue(list(home.rglob('digits.tgz')), out)


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
        return True

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
        for target, inputs in ((ArchiveTarget, 100), (TgzTarget, 60), (YamlTarget, 1000), (AnswerTarget, 150),
                               (S3Target, 150),
                               (GoogleTarget, 150), (ProfilesTarget, 150), (KeysTarget, 150)):
            run = target(self.tmp / target.__name__)
            for seed in run.seeds:
                run(seed)
            for number in range(inputs * RUNS):
                with self.subTest(target=target.__name__, number=number):
                    run(mutated(random.Random('%s %d' % (target.__name__, number)), run.seeds))


def all_classes():
    """Run all classes, each in a process of its own, one more at a time than there are cores, as many wait much."""
    def run(name):
        begin = time.time()
        command = [sys.executable, *['-W' + option for option in sys.warnoptions], __file__, name]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out = done.stdout.decode('utf-8', 'replace').strip()
        print('%-22s %6.1f s  %s' % (name, time.time() - begin, out if done.returncode else out.split('\n')[-1]),
              flush=True)
        return done.returncode
    begin, names = time.time(), unittest.defaultTestLoader.getTestCaseNames
    classes = [name for name, cls in globals().items()
               if isinstance(cls, type) and issubclass(cls, unittest.TestCase) and names(cls)]
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        failed = any(list(pool.map(run, classes[::-1])))
    print('%s in %.1f s' % ('FAILED' if failed else 'OK', time.time() - begin))
    return int(failed)


if __name__ == '__main__':
    if len(sys.argv) == 1:
        sys.exit(all_classes())
    done = unittest.main(exit=False).result
    if done.skipped and os.environ.get('ETC_TEST_REQUIRE_PEERS'):
        sys.exit('skipped, though all peers are demanded: %s' % done.skipped)
    sys.exit(not done.wasSuccessful())
