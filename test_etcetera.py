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
        return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, **kwargs)

    def installed(self, home='home'):
        return etc.ls(config=self.config(home))

    def leftovers(self, home='home'):
        inner = self.tmp / home / '.etcetera'
        return [p for kind in ('staging', 'replaced') if (inner / kind).is_dir() for p in (inner / kind).iterdir()]


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
        match = re.match(r'AWS4-HMAC-SHA256 Credential=([^/]+)/((\d{8})/([^/]+)/%s/aws4_request), ?SignedHeaders=([^,]+), '
                         r'?Signature=([0-9a-f]{64})$' % self.service, self.headers.get('Authorization', ''))
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
            return self.error(400, 'InvalidRequest', message='Content-MD5 OR x-amz-checksum- HTTP header is required for '
                              'Put %s requests with Object Lock parameters' % kind)
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
        copied = parts[number] = self.server.copied(data, start, stop + 1) if self.server.copied else data[start:stop + 1]
        xml = '<LastModified>2024-05-06T07:08:09.000Z</LastModified><ETag>&quot;%s&quot;</ETag>' % hashlib.sha1(copied).hexdigest()
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
            return self.xml('InitiateMultipartUploadResult', '<Bucket>bucket</Bucket><Key>%s</Key><UploadId>%s</UploadId>' % (
                escape(self.key), upload))
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
        assert vars(found) == vars(etc.Config(**expected)), (data, found, expected)
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
        self.assertEqual(vars(config), vars(etc.Config(
            's3://bucket/x#y', self.tmp / 'data', public=True, region='aA\u00e9', endpoint_url="it's", connections=16,
            compression_level=0, aws_access_key_id='a:b', google_credentials='x y')))
        for text, value in ((r'"C:\\udata"', 'C:\\udata'), (r'"\\\u00e9"', '\\\u00e9'), ('"yes"', 'yes'), ("'017'", '017'),
                            ('yes!', 'yes!'), ('a_1', 'a_1')):
            with self.subTest(text):
                self.assertEqual(self.load('region: ' + text).region, value)
        self.assertIs(self.load('public: false').public, False)

    def test_what_is_refused(self):
        for problem, texts in (
                ("not of the form 'key: value'", 'url;url:x; url: x;\turl: x;- x;? a;...;%YAML 1.1'),
                ('this YAML syntax is not supported; put the value in double quotes',
                 'url: [a];url: {a: b};url: |;url: >;url: &a b;url: *a;url: !!str x;url: a: b;url: @x;url: `x`;url: %x;url: a\tb'),
                ('quotes', 'url: 1.5;url: 2001-01-01;url: 1:30;url: -x;url: .inf;aws_access_key_id: 1234'),
                ('quotes', 'public: yes;region: No;region: on;region: off;region: TRUE;public: False'),
                ('quotes', 'connections: 0x10;connections: 1_000;connections: 017;region: 0b1;connections: +1'),
                ('a quoted value must end on its line', 'url: "a;url: \'a\' b;url: "a"#b'),
                ('unknown escape; in double quotes, write',
                 r'home: "\ud83d\ude00";home: "\\\ud83d";home: "\ud83d";home: "\q";home: "\x41"'),
                ('yes', 'yes: x'), ('YAML does not allow one of these characters', 'url: a\x07b;url: a\u2028b'),
                ('is set a second time', 'url: a\nurl: b'), ("did you mean 'endpoint_url'", 'url: s3://b\nendpont_url: x'),
                ('true or false', 'public: 1'), ('whole number', '\nconnections: many;connections: true'),
                ('from 1 to 256', 'connections: 0;connections: 257'), ('from 0 to 9', 'compression_level: 10'),
                ("did you mean 'url'", '\ufeffurl: x\nulr: x')):
            for text in texts.split(';'):
                with self.subTest(text):
                    self.fails(text, problem, '%s/.etc.yaml:%d: ' % (self.tmp, text.count('\n') + 1))
        self.fails(b'url: \xff', str(self.tmp / '.etc.yaml'), 'UTF-8')

    def test_byte_order_mark(self):
        """Notepad and PowerShell begin files with one."""
        for name, text in (('toml', 'url = "s3://toml"\nregion = "x"\n'), ('yaml', 'url: s3://yaml\nregion: x\n')):
            with self.subTest(name):
                config = self.load('\ufeff' + text, name='.etc.' + name)
                self.assertEqual((config.url, config.region), ('s3://' + name, 'x'))

    def test_precedence(self):
        place, named = os.path.abspath('/h'), write(self.tmp, {'other.yaml': 'region: x\n'}) / 'other.yaml'
        self.load('url: file:///a\nhome: /h\nregion: y')
        for environment, overrides, found in (
                ({}, {}, ('file:///a', place, 'y')), ({'ETC_URL': 'file:///b', 'ETC_HOME': '/h/b'}, {}, ('file:///b', place + '/b', 'y')),
                ({}, {'url': 'file:///c'}, ('file:///c', place + '/b', 'y')),
                ({'ETC_CONFIG': str(named)}, {}, ('file:///b', place + '/b', 'x'))):
            os.environ.update(environment)
            config = etc.Config.load(**overrides)
            self.assertEqual((config.url, config.home, config.region), (found[0], Path(found[1]), found[2]))
        named.unlink()
        with self.assertRaisesRegex(etc.ConfigError, 'no settings file .*; create it, or drop --config'):
            etc.Config.load()

    def test_nothing_is_needed_for_local_work(self):
        config = etc.Config.load()
        self.assertEqual((config.url, config.home), (None, self.tmp / '.etc'))
        self.assertEqual(etc.ls(), [])
        with self.assertRaisesRegex(etc.ConfigError, r'^no url; set where datasets are shared .* ~/\.etc\.yaml'):
            etc.ls(remote=True)
        self.assertFalse((self.tmp / '.etc').exists())

    def test_secrets(self):
        config = etc.Config('s3://b', aws_secret_access_key='hush', aws_session_token='hush')
        self.assertNotIn('hush', repr(config))
        for text, mode, warns in (('aws_secret_access_key: x', 0o644, True), ('aws_secret_access_key: x', 0o600, False),
                                  ('region: x', 0o644, False)):
            with self.subTest(text, mode=mode), self.assertLogs('etcetera', 'WARNING') as logs:
                logging.getLogger('etcetera').warning('the end')
                self.load(text, mode)
                self.assertEqual(['chmod 600' in line for line in logs.output[1:]], [True] * warns)

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
            'yes;No;true;off;null;~;;0;7;-3;+4;0x1F;0b101;017;08;1_000;1.5;1e3;.5;1:30;2001-01-01;s3://b/c;a b;a#b;a #b;# c;"q";'
            '\'q\';"a\\nb";"\\x41\\u00e9\\U0001F600";\'it\'\'s\';"a" # c;\'a\'  # c;";\';a: b;a:;:a;-;- a;-a;?;? a;[a];{a: b};,;'
            '&a;*a;!a;|;>;%a;@a;`a;\u00e9;\u65e5;a\tb;\ta;a\u00a0;a\u2028b;a\x85b;<<;=;.;..;.inf;.NaN;0o7;0_;_1;1_;"\\/";"\\ ";'
            '"\\\t";a\\nb;a\'b;a"b;~x;nullx;Yes!;y;N;---;--- a;...;a  ;12e03;1.;685.230_15e+03;190:20:30;-0;+0x_1;1__0;a];a};'
            'a,b;a,;http://x:1/;::;a::b;a :b;false;False;12;200;256').split(';')
        shapes = ('%s: %s;%s:  %s;%s : %s;%s:%s; %s: %s;"%s": %s;\'%s\': %s;%s:\t%s;%s: %s ;%s: %s # c;# %s%s;%s;- %s: %s;'
                  '%s: %s\n  more;%s:\n- %s;%s:\n %s').split(';')
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
        with self.assertRaisesRegex(TypeError, 'does not support item assignment'):
            ds['val'] = 1
        self.assertNotIn('val', ds)
        self.assertIsNone(ds.get('val'))

    def test_validation(self):
        root = self.tmp / 'bad'
        for files, problem in (
                ({'x': 'y'}, "needs a directory 'data'"), ({'data': 'y'}, "needs a directory 'data'"), ({'data': None}, "needs a directory 'data'"),
                ({'data/p/x': 'y', 'data/stray': 'z'}, "may hold only directories (partitions), but 'data/stray' is a file"),
                ({'data/p/x': 'y', 'data/link': ('->', 'nowhere')}, "'data/link' is a link to nothing"),
                ({'data/p/x': 'y', 'meta.json': '[1]'}, 'JSON object'), ({'data/p/x': 'y', 'meta.json': '{'}, 'meta.json is not JSON'),
                ({'data/p/x': 'y', 'meta.json': b'\xff'}, 'meta.json is not JSON'),
                ({'data/p/x': 'y', 'meta.json': None}, 'meta.json is not JSON: it is not a file'), ({}, 'no directory %s' % root)):
            with self.subTest(files):
                write(root, files)
                self.fails_with(problem, 'register', root, 'Bad')
                with self.assertRaises(etc.InvalidDataset):
                    etc.Dataset(root)
                self.assertEqual(self.installed(), [])
                remove(root)
        self.fails_with('a path cannot contain a NUL', 'register', 'a\0b', 'X')

    def test_names(self):
        root = small(self.tmp / 'ds')
        for name in ['', 'a b', 'a\n', 'x' * 129] + '. .. .x -x _x a/b a\\b \u00e9 a@b ../x /x a@sha256:12 CON\0'.split():
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
            with self.subTest(words):
                self.assertIn("'etc register' takes no 'c';", self.etc('register', *words.split(), status=2)[1])
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
        self.etc('create', 'Other', 'val', 'dev set')
        for name, partitions in (('New', ['test', 'train']), ('Other', ['dev set', 'val'])):
            self.assertEqual(list(etc.dataset(name, config=self.config())), partitions)
        self.fails_with("another 'New' is installed already", 'create', 'New')
        write(self.tmp / 'home/New', {'data/train/x': 'x'})
        self.etc('create', '-f', 'New', 'one')
        self.assertEqual(tree(self.tmp / 'home/New'), {'data': None, os.path.join('data', 'one'): None})
        for bad in ('..', 'a/b', '.', ''):
            with self.subTest(bad):
                self.fails_with("etc: '%s' cannot be a partition's name" % bad, 'create', 'Bad', bad)
        for bad in ('train', (), None):
            with self.subTest(bad):
                with self.assertRaisesRegex(etc.InvalidDataset, 'partitions must be a list of one or more names'):
                    etc.create('Bad', bad, config=self.config())
        with self.assertRaisesRegex(etc.InvalidDataset, 'partitions must be a list of one or more names'):
            etc.dataset('X', True, 'train', config=self.config())

    def test_register_what_is_installed(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        write(self.tmp / 'home/X/data', {'data/p/x': 'x'})  # so that even data/ looks like a dataset
        for path in ('home/X', 'home/X/data/..', 'home/X/data'):
            with self.subTest(path):
                self.fails_with("is what is installed as 'X'; use --copy", 'register', '-f', self.tmp / path, 'X')
        self.etc('register', '-f', '--copy', self.tmp / 'home/X', 'X')
        self.etc('register', self.tmp / 'home/X', 'Y')
        self.assertEqual(*[etc.dataset(name, config=self.config()).digest for name in 'XY'])

    def test_registered_directory_that_is_gone(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        remove(self.tmp / 'ds')
        for command in ('push', 'verify', 'info'):
            with self.subTest(command):
                self.fails_with("'etc purge X' forgets it", command, 'X')
        self.etc('ls', '-l')
        self.etc('purge', 'X')

    def test_a_file_for_a_directory(self):
        file = str(write(self.tmp, {'file': 'x'}) / 'file')
        problem = ('Not a directory: ' if os.name == 'posix' else '') + file
        self.fails_with(problem, 'ls', home='file')
        self.fails_with(problem, 'ls', '-l', home='file')
        self.fails_with(problem, 'ls', '-r', '-l', url=Path(file).as_uri())

    def test_info_and_purge(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'Small')
        self.assertRegex(self.etc('info', 'Small')[0], '(?s)sha256:.*test.*train.*"classes": 10.*# Small')
        found = json.loads(self.etc('info', '--json', 'Small')[0])
        self.assertEqual((found['files'], found['meta'], found['readme']), (6, {'classes': 10}, '# Small\n'))
        self.assertEqual(found['partitions'], {'train': {'files': 2, 'size': 5006}, 'test': {'files': 1, 'size': 5}})
        self.assertEqual(json.loads(self.etc('ls', '--json')[0])[0]['digest'], found['digest'])
        self.assertIn(found['digest'], self.etc('ls', '-l')[0])
        for path in [self.tmp / 'home/Small'] + list((self.tmp / 'home/Small').rglob('*')):
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

    def test_usage(self):
        self.etc(status=2)
        self.assertIn('register', self.etc('-h')[0])
        self.etc('ls', '-v')
        self.etc('-q', 'create', 'X')
        self.assertEqual(self.etc('-q', 'verify', 'X')[1], '')
        self.assertIn(b'Traceback', self.spawn('-v', 'info', 'Nope').communicate()[1])


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
    for at, value in [(329 - own, bytes(16)), (329, bytes(16))] + [(int(field[1:]), value) for field, value in fields.items()]:
        raw[own + at:own + at + len(value)] = value  # Python 3.9 and later have no device numbers
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
        root = odd(self.tmp / 'ds')
        names = {name.replace(os.sep, '/'): content for name, content in tree(root).items()}
        write(root, {'.etcetera.json': 'the receipt of an installed dataset that was copied'})
        found = members(self.push(root))
        blocks, index = [[m for m in found if m[2] == tag] for tag in (b'et', b'ei')]
        self.assertEqual(found[-1][1:], (34, b'ef', struct.pack('<Q', index[0][0]), b''))
        self.assertEqual(found, blocks + index + found[-1:])
        self.assertTrue(all(len(extra) <= 8000 and payload == b'' for _, _, _, extra, payload in index))
        self.assertTrue(all(extra == struct.pack('<I', length) for _, length, _, extra, _ in blocks))
        self.assertEqual(blocks[-1][4], bytes(1024))
        text = json.loads(b''.join(m[3] for m in index).decode('utf-8'))
        paths, digests = ['.', 'a', 'assets', 'data/empty', 'data/test', 'data/train'], b''
        self.assertEqual((text['etcetera'], [s['path'] for s in text['segments']]), (1, paths))
        for s in text['segments']:
            own = [m for m in blocks if s['offset'] <= m[0] < s['offset'] + s['length']]
            payloads = [m[4] for m in own]
            self.assertEqual([len(p) for p in payloads[:-1]], [MIB] * (len(own) - 1))
            digest = sha256(b''.join(map(sha256, payloads)))
            digests += s['path'].encode() + b'\0' + digest
            if s['path'] == '.':
                inside = [n for n in names if '/' not in n and (n == 'data' or names[n])]
            else:
                inside = [n for n in names if (n + '/').startswith(s['path'] + '/')]
            inside.sort(key=lambda n: n.split('/'))
            self.assertEqual(b''.join(payloads), canonical(root, inside), s['path'])
            sizes = [len(names[n][0]) * (names[n][0] != '->') for n in inside if names[n]]
            self.assertEqual((s['length'], s['files'], s['size'], s['digest']),
                             (sum(m[1] for m in own), len(sizes), sum(sizes), 'sha256:' + digest.hex()))
        self.assertEqual(text['digest'], 'sha256:' + sha256(digests).hex())

    def test_blocks(self):
        root = write(self.tmp / 'ds', {'data/a/noise': noise(3 * MIB), 'data/b/text': 'some text, again and again\n' * 120000})
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
        for change in (
                lambda: write(two, {'.etcetera.json': '{}'}), lambda: write(two, {'data/train/.etcetera.json': '{}'}),
                lambda: write(two, {'data/train/white space': '!'}), lambda: write(two, {'data/new': None}),
                lambda: (two / 'data/train/run.sh').chmod(0o644), lambda: write(two, {'data/train/sub/x': None}),
                lambda: (two / 'a/x').rename(two / 'a/y')):
            change()
            digests.append(etc.Dataset(two).digest)
        self.assertEqual(digests[0], digests[1])
        self.assertEqual(len(set(digests)), 7)

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
            'data/train/back': 'real', 'data/train/absolute': 'real', 'data/train/other': 't', 'notes': 't', 'data/val/t': 't',
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
            tar.extractall(str(self.tmp / 'by-tarfile'), **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
        self.assertEqual(tree(self.tmp / 'by-tarfile'), tree(root))

    def test_many_partitions_make_a_long_index(self):
        root = write(self.tmp / 'ds', {'data/partition %04d/x' % n: str(n) for n in range(500)})
        self.assertGreater(sum(m[1] for m in members(self.push(root)) if m[2] == b'ei'), 65536)
        self.check_pull(tree(root))
        self.assertEqual(len(etc.info('X', remote=True, config=self.config())['partitions']), 500)

    def test_unknown_version_is_still_a_tgz(self):
        root = small(self.tmp / 'ds')
        archive = self.push(root).replace(b'{"etcetera":1,', b'{"etcetera":2,')
        write(self.tmp / 'share', {'X.tgz': archive})
        self.check_pull(tree(root))


class Foreign(Case):
    """Archives that other tools made."""

    def check(self, root):
        """Pull X, which must be the same as this directory."""
        ds = etc.pull('X', config=self.config())
        self.assertEqual((ds.digest, tree(ds.root) == tree(root)), (etc.Dataset(root).digest, True))
        self.etc('verify', 'X')
        self.assertIn('is installed already', self.etc('pull', 'X')[1])
        self.etc('purge', 'X')

    def tar(self, *entries):
        write(self.tmp / 'share', {'X.tgz': gzip.compress(b''.join(entries), 1)})

    def train(self, *entries):
        """Pull X, of these entries; returns the files of its partition train."""
        self.tar(*entries, bytes(1024))
        self.etc('pull', 'X')
        names = sorted(os.listdir(str(self.tmp / 'home/X/data/train')))
        self.etc('purge', 'X')
        return names

    def refused(self, tar, message):
        self.tar(tar)
        err = self.etc('pull', 'X', status=1)[1]
        self.assertRegex(err, "^etc: 'X' in file:///.*: the archive is damaged or not a .tgz: .*(%s)" % message)
        self.nothing_is_left()

    def pack(self, *items, **options):
        """Pack (path, name in the archive) with tarfile."""
        with tarfile.open(str(write(self.tmp / 'share', {'.': None}) / 'X.tgz'), 'w:gz', **options) as tar:
            for path, name in items:
                tar.add(str(path), name)

    def test_tarfile(self):
        root, receipt = odd(self.tmp / 'ds', 20), write(self.tmp, {'.etcetera.json': '{"name": "X"}'}) / '.etcetera.json'
        for form, top in itertools.product((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT), ('', './')):
            with self.subTest(form=form, top=top):
                items = [(path, top + path.name) for path in [receipt] + list(root.iterdir())]
                self.pack(*items, format=form, encoding='utf-8')
                self.check(root)

    def test_tools(self):
        root, short = odd(self.tmp / 'ds', 20), small(self.tmp / 'short')
        write(short, {'data/train/link': ('->', 'a.txt'), 'data/test/a.txt': 'other'})
        os.link(str(short / 'data/train/a.txt'), str(short / 'data/train/hard'))
        os.link(str(short / 'data/train/link'), str(short / 'data/test/twin'), follow_symlinks=False)
        gz = str(write(self.tmp / 'share', {'.': None}) / 'X.tgz')
        for words, source in (
                ('tar --format=gnu', root), ('tar --format=pax', root), ('tar --format=ustar', short), ('tar --sparse', short),
                ('tar --format=v7', short), ('tar -V label', short), ('tar --format=pax -V label', short), ('bsdtar', root),
                ('bsdtar --format=ustar', short), ('busybox tar', short)):
            for names in [['.'], os.listdir(str(source))] * len(foreign_tools(words.split()[0])):
                with self.subTest(words, names=names):
                    subprocess.check_call(words.split() + ['-czf', gz, '-C', str(source), *names], env=dict(os.environ, LC_ALL='C.UTF-8'))
                    self.check(source)

    def test_members_and_missing_directories(self):
        root = small(self.tmp / 'ds')
        raw = canonical(root, [name for name, content in tree(root).items() if content])
        write(self.tmp / 'share', {'X.tgz': gzip.compress(raw[:1000]) + gzip.compress(raw[1000:] + bytes(1024)) + bytes(512)})
        self.check(root)

    def test_tar_that_breaks_off(self):
        whole = b''.join(entry('data/train/' + name, name.encode() * 600) for name in 'abc')
        pax, name = entry('data/train/' + 'l' * 120), entry('././@LongLink', b'data/train/' + b'n' * 200 + b'\0', b'L')
        sparse = entry('data/train/s', kind=b'S', _483=b'%011o\0' % 4096)
        more = entry('data/train/s', kind=b'S', _482=b'\1', _483=b'%011o\0' % 4096)
        hole = entry('data/train/s', kind=b'S', _124=b'%011o\0' % 2048, _386=b'%011o\0%011o\0' % (0, 2048), _483=b'%011o\0' % 4096)
        for cut in list(range(0, len(whole), 500)) + [512, 1536, len(whole)]:
            with self.subTest(cut=cut):
                self.refused(whole[:cut], 'ends too early')
        for what, rest in (('in a pax header', pax[:520]), ('after a pax header', pax[:1024]), ('in a long name', name[:600]),
                           ('after a long name', name), ('in the map of a sparse file', more), ('in the map', more + bytes(100)),
                           ('in a sparse file', hole + bytes(600))):
            with self.subTest(what):
                self.refused(whole + rest, 'ends too early')
        for what, tar, message in (
                ('an end after a pax header', whole + pax[:-512], 'end of file header|subsequent header'),
                ('an end after a long name', whole + name, 'end of file header|subsequent header'),
                ('a broken header', whole[:1536] + b'?' + whole[1537:], 'bad checksum|invalid header'),
                ('a broken first header', b'?' + whole[1:], 'bad checksum|invalid header'),
                ('a broken header after a pax header', pax[:-512] + b'?' + whole[1:], 'checksum|subsequent header'),
                ('text', b'<html>' * 1000, 'bad checksum|invalid header'),
                ('two archives', whole + bytes(1024) + whole, 'another archive follows its end')):
            with self.subTest(what):
                self.refused(tar + bytes(1024), message)
        for end in (0, 512, 10240):  # and two blocks of zeros
            with self.subTest('whole', end=end):
                self.assertEqual(self.train(whole, pax, sparse, bytes(end)), ['a', 'b', 'c', 'l' * 120, 's'])

    def test_malformed_pax_records(self):
        good, ok = b'12 a=bcdefg\n', entry('data/train/a') + bytes(1024)
        name = entry('././@LongLink', b'data/train/' + b'n' * 200 + b'\0', b'L')
        for kind in (b'x', b'g', b'X'):
            for records in (b' a=b\n', b'x a=b\n', b'0 X=1\n', b'4 a=b\n', b'99 a=b\n', b'6 abc\n', b'5 =b\n', b'6 a=bc', b'junk',
                            good + b'junk', good + b'\0' + good, b'-6 a=b\n', b'9' * 30 + b' a=b\n'):
                with self.subTest(records, kind=kind):
                    self.refused(entry('pax', records, kind) + ok, 'pax')
            with self.subTest('after a long name', kind=kind):
                self.refused(name + entry('pax', b'0 X=1\n', kind) + ok, 'pax|invalid|subsequent')
            with self.subTest('well-formed', kind=kind):
                self.assertEqual(self.train(entry('pax', good * 2, kind), ok), ['a'])

    def test_absurd_sizes(self):
        ok, huge, negative = entry('data/train/a'), b'\x80' + (1 << 60).to_bytes(11, 'big'), b'\xff' * 10 + b'\xfe\0'
        headers = '(its global headers|(the )?headers( of one entry)?) take more than 4194304 bytes'
        wrong = 'backward|headers of one entry|ends too early|bad checksum|invalid|subsequent|end of file'
        for kind, size in itertools.product((b'L', b'K', b'x', b'g', b'X'), (b'%011o\0' % (700 * MIB), huge)):
            with self.subTest(kind=kind, size=size):
                self.refused(entry('././@LongLink', kind=kind, _124=size) + bytes(5 * MIB), headers)
        numbers = entry('pax', b'22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=9\n', b'x')
        for what, tar, message in (
                ('many records', b''.join(entry('pax', b'1000011 %08d=%s\n' % (n, b'v' * 999993), b'g') for n in range(6)), headers),
                ('many names', entry('././@LongLink', b'n' * MIB, b'L') * 5, headers),
                ('a sparse map', numbers + entry('data/train/s', b'9999999\n' + b'0\n' * 4 * MIB), headers),
                ('a negative file', ok + entry('data/train/n', _124=negative), wrong),
                ('a negative name', ok + entry('data/train/n', kind=b'L', _124=negative), wrong)):
            with self.subTest(what):
                self.refused(tar + ok + bytes(1024), message)
        self.tar(entry('././@LongLink', b't' * 5000 + b'\0', b'K'), entry('data/train/l', kind=b'2'), ok, bytes(1024))
        self.assertRegex(self.etc('pull', 'X', status=1)[1], r'(?s)\A.{0,700}leads out of the dataset or nowhere.{0,300}\Z')
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
        for pack in (lambda: self.etc('push', 'X'), lambda: self.pack((root, '.'))):
            pack()
            ds = etc.pull('X', force=True, config=self.config('other'))
            self.assertEqual((ds.digest, sorted(os.listdir(str(ds.root / 'data')))), (digest, ['test', 'train']))
        write(root, {'data/notes.txt': 'no litter', 'data/train/.DS_Store': 'inside a partition it is a file as any'})
        self.fails_with("'data/notes.txt' is a file; move it", 'push', '-f', 'X')
        (root / 'data/notes.txt').unlink()
        self.assertNotEqual(etc.Dataset(root).digest, digest)

    def test_push_of_what_was_pulled(self):
        self.pack((small(self.tmp / 'ds'), '.'))
        before = tree(self.tmp / 'share')
        self.etc('pull', 'X')
        self.assertIn('in %s already, and identical' % self.url, self.etc('push', 'X')[1])
        self.assertEqual(tree(self.tmp / 'share'), before)
        self.pack((odd(self.tmp / 'other', 3), '.'))
        self.fails_with("another 'X' is in", 'push', 'X')

    def test_not_an_archive(self):
        for content, problem in ((b'', 'it ends too early'), (b'hello', r'Not a gzipped file \(b.he.\)'),
                                 (b'\x1f\x8b', 'Compressed file ended before'), (noise(1000), 'Not a gzipped file')):
            with self.subTest(problem):
                write(self.tmp / 'share', {'X.tgz': content})
                self.assertRegex(self.etc('pull', 'X', status=1)[1], 'the archive is damaged or not a .tgz: ' + problem)
        self.pack((SCRIPT, 'X/data/train'))
        self.fails_with("needs a directory 'data'", 'pull', 'X')
        root = small(self.tmp / 'ds')
        self.pack((root, 'digits'))
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
        for tar, error, message in ((entry('../evil') + good, None, "the unsafe name '../evil'"), (good, KeyError('mine'), '^.mine.$'),
                                    (good, KeyboardInterrupt('mine'), '^mine$')):
            with self.subTest(message):
                self.server.objects['some/prefix/X.tgz'] = gzip.compress(tar + bytes(1024), 1), '"e"', {}
                with self.assertRaisesRegex(type(error) if error else etc.Corrupt, message):
                    etc.pull('X', config=self.config(), progress=progress)
                self.nothing_is_left()


class Hostile(Case):
    def outside(self):
        """What lies beside the local store, where nothing may change."""
        return {name: content for name, content in tree(self.tmp).items() if not name.startswith(('home', 'settings'))}

    def attack(self, *entries):
        """Pull a .tgz with these entries; it must fail in any order with the same words, and leave nothing anywhere."""
        ok, said = (entry('data/train/ok', b'ok'),), set()
        for order in (ok + entries, entries + ok):
            write(self.tmp, {'victim/file': 'precious', 'share/X.tgz': gzip.compress(b''.join(order) + bytes(1024), 1)})
            before = self.outside()
            said.add(self.etc('pull', 'X', status=1)[1])
            self.assertEqual((self.outside(), self.installed(), self.leftovers()), (before, [], []), said)
        self.assertEqual(len(said), 1, said)
        return said.pop()

    def test_names(self):
        unsafe = "the archive holds the unsafe name '%s; do not trust it"
        for name in ('/etc/passwd', str(self.tmp / 'victim/new'), '../victim/new', 'data/../../../victim/new', '..', 'data/train/..',
                     '../../../../../../../../tmp/etc-evil'):
            for attack in (entry(name, b'evil'), entry(name + '/'), entry('data/train/x', b'evil', pax={'path': name})):
                with self.subTest(name):
                    self.assertIn(unsafe % (name + "'"), self.attack(attack))
        with self.subTest('NUL'):
            self.assertIn(unsafe % r"data/train/a\x00b'", self.attack(entry('data/train/x', pax={'path': 'data/train/a\0b'})))
        for name in ('d/' * 1900 + 'x', 'd/' * 300):
            with self.subTest('deep'):
                self.assertIn("the unsafe name 'data/train/d/d/d/", self.attack(entry('data/train/' + name)))

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
                + [(nowhere % ('0000', '0001'), *[link('%04d' % n, '%04d' % (n + 1)) for n in range(count)]) for count in (60, 1500)]
                + [(nowhere % ('x', 'd/e/up/../../../..'), link('d/e/up', '../..'), link('x', 'd/e/up/../../../..')),
                   (nowhere % ('b', 'a/../../victim'), link('a', '../..'), link('b', 'a/../../victim')),
                   (nowhere % ('s', outside[1]), link('s', outside[1]), link('h', 'data/train/s', b'1')),  # which is a link, too
                   ("the hard link 'data/train/h' to 'data/train/none', which is not in it;", link('h', 'data/train/none', b'1')),
                   (twice % 'l', link('l', '../../..'), entry('data/train/l/victim', b'evil')),
                   (twice % 's', link('s', 'ok'), link('s', 'ok')), (twice % 's', link('s', 'ok'), link('s', 'data/train/s', b'1'))]):
            with self.subTest(problem):
                self.assertIn(problem, self.attack(*entries))

    def test_kinds_and_duplicates(self):
        twice = "the archive holds '%s' twice (or names that this disk cannot tell apart);"
        unknown = "'data/train/x' of the unknown type '%s'; pack it with tar's default options"
        special = [("'data/train/dev', a device or pipe; do not trust it", entry('data/train/dev', kind=kind)) for kind in (b'3', b'4', b'6')]
        for problem, attack in special + [
                (unknown % 'M', entry('data/train/x', kind=b'M')),  # the rest of a file that began on another volume
                (unknown % 'D', entry('data/train/x', kind=b'D')),  # a directory of an incremental archive
                (twice % 'data/train/ok', entry('data/train/ok', b'again')), (twice % 'data/train/ok', entry('data/train/ok/')),
                (twice % 'data/train/ok', entry('data/train/ok/below', b'x')), (twice % 'data', entry('data', b'a file')),
                (twice % 'data/train', entry('data/train', kind=b'2', link='../../../victim')),
                (twice % 'data', entry('data', kind=b'2', link='.'))]:
            with self.subTest(problem):
                self.assertIn(problem, self.attack(attack))

    def test_webs_of_links(self):
        root = write(self.tmp / 'web', {'data/p%02d/%s' % (n, side): ('->', '../p%02d' % (n + 1)) for n in range(15) for side in 'ab'})
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

    def pulled(self, archive, problem=None):
        """Pull this archive, which must be refused with a problem if there is one."""
        write(self.tmp / 'share', {'X.tgz': archive})
        err = self.etc('pull', 'X', status=int(bool(problem)))[1]
        if problem:
            self.assertRegex(err, "^etc: 'X' in file:///.*: the archive (%s)" % problem)
            self.nothing_is_left()
        else:
            self.etc('verify', 'X')
            self.etc('purge', 'X')

    def test_indexes(self):
        blocks, unreadable = block(bytes(1024)), 'is damaged: its index is unreadable; '
        for text in (b'[' + b'[],' * 4000000 + b'1]', b'{"etcetera":' + b'1' * 1000000 + b'}', b'[' * 100000,
                     b'{"etcetera":2.5}', b'{"etcetera":1}', b'[]', b'null', b'\xff'):
            with self.subTest(text[:20]):
                self.pulled(blocks + framed(text, len(blocks)), unreadable)
        promise = "is damaged: 'data/train' does not have the digest that the index promises; "
        for problem, key, values in (
                (promise, 'files', (2, 0)), (promise, 'size', (1,)), (promise, 'digest', ('sha256:' + '0' * 64,)),
                (unreadable, 'digest', ('md5:0', None)), (unreadable, 'offset', (7,)), (unreadable, 'length', (10 ** 12, 0, -5)),
                (unreadable, 'files', (-1,)), (unreadable, 'path', ('../x', 'data', 'data/a/b', '.', '/x', 'a/b', ''))):
            for value in values:
                with self.subTest(**{key: value}):
                    self.pulled(indexed(entry('data/train/') + entry('data/train/x'), **{key: value}), problem)

    def test_entries_are_canonical_or_refused(self):
        def file(name='m', data=b'hi', **more):
            return entry('data/train/' + name, data, **more)

        def link(target, name='m'):
            return file(name, b'', kind=b'2', link=target)
        before, after = entry('data/train/') + file('a') + file('b'), file('x', b'x') + file('z')
        for what, good, size in (('none more', b'', 7), ('an executable', file(mode=0o755), 9), ('some', file('c') + file('d'), 11),
                                 ('zeros', file(data=bytes(512)), 519), ('a link', link('a'), 7)):
            with self.subTest(what):
                self.pulled(indexed(before + good + after, files=4 + (good.count(b'ustar')), size=size))
        pax = file('p' * 200, b'')
        problem = "is damaged: 'data/train' violates the format|holds (the unsafe name|the link .* leads out of the dataset or nowhere)"
        for what, bad in {
                'private': file(mode=0o600), 'setuid': file(mode=0o4755), 'another mtime': file(mtime=0), 'twice': file('b'),
                'not sorted': file('am'), 'below no directory': file('m/n'), 'another partition': entry('data/test/m'),
                'among the root files': entry('m'), 'absolute': entry('/data/train/m'), '..': file('..'), 'after ..': file('../m'),
                'an empty component': file('/m'), '.': file('./m'), 'too deep': file('d/' * 300 + 'x'), 'no name': file(_11=b'\0'),
                'not ASCII': file('mmm', _12='\u00e9'.encode()), 'NUL in a name': file('mmm', _12=b'\0'),
                'after the NUL of a name': file(_99=b'm'), 'a file with a slash': file('d/', kind=b'0'),
                'a directory without slash': file(data=b'', kind=b'5', _12=b'\0'), 'a device': file(kind=b'3'), 'a pipe': file(kind=b'6'),
                'a hard link': file(data=b'', kind=b'1', link='data/train/a'), 'an old file': file(_156=b'\0'),
                'more than the index tells': file(data=b'hello'), 'beyond the block': file(_124=b'00000010002'),
                'a negative size': file(_124=b'-0000000002'), 'too small': file(_124=b'00000000001'),
                'a size with spaces': file(_124=b'         2\0 '), 'a size with _': file(_124=b'0000000_002'),
                'a size with 9': file(_124=b'00000000009'), 'a target': file(link='a'), 'a link to nothing': link('gone'),
                'a link out of the dataset': link('../../../victim'), 'an absolute link': link('/etc/passwd'),
                'a link to data': link('../../data'), 'a link with a detour': link('./a'), 'a longer detour': link('b/../a'),
                'NUL in a link': link('a\0b'), 'a user': file(_108=b'0000001'), 'a group': file(_116=b'0000001'),
                'a chain of links': b''.join(link('m%02d' % n, 'm%02d' % (n + 1)) for n in range(50)) + file('m50'),
                'the name of a user': file(_265=b'root'), 'a prefix': file(_345=b'p'), 'the last byte': file(_511=b'p'),
                'GNU': file(_257=b'ustar  '), 'a wrong checksum': file()[:148] + b'000000\0 ' + file()[156:],
                'padding': file()[:-1] + b'p', 'zeros': bytes(512), 'more zeros': bytes(1024), 'noise': noise(512),
                'more noise': noise(1024), 'only a pax header': pax[:-512],
                'another pax header': pax[:600] + b'x' + pax[601:]}.items():
            for row, size in ((before + bad + after, 9), (before + bad, 6)):
                with self.subTest(what, size=size):
                    self.pulled(indexed(row, files=row.count(b'ustar\0') - 1, size=size - 2 * (b'hi' not in bad)), problem)

    def test_segments(self):
        data, train, x = entry('data/'), entry('data/train/'), entry('data/train/x', b'hi')
        root, good, large = ('.', 0, 0, [data]), ('data/train', 1, 2, [train + x]), train + entry('data/train/x', bytes(4096))
        other = train + entry('data/train/A/') + entry('data/train/a/x', b'hi')
        self.pulled(archive_of(root, good))
        damaged = 'is damaged: a block does not match its checksum or size; '
        astray = "is damaged: '(.|data/train)' violates the format "
        for what, problem, *segments in (
                ('a partition among the root files', astray, ('.', 1, 2, [data + entry('data/evil/') + entry('data/evil/f', b'hi')]), good),
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
            with self.subTest(what):
                self.pulled(archive_of(*segments), problem)

    def test_one_flipped_byte(self):
        root = write(self.tmp / 'ds', {'data/train/a': 'text ' * 3000, 'data/train/n': noise(70000), 'data/test/b': 'b' * 500, 'README.md': 'r'})
        self.share(root, home='pub')
        archive, rng, silent = (self.tmp / 'share/X.tgz').read_bytes(), random.Random(3), 0
        positions = [rng.randrange(len(archive)) for _ in range(150 * RUNS)] + [rng.randrange(1500) - 1500 for _ in range(100)]
        for position in list(range(60)) + positions:
            with self.subTest(position):
                bad = bytearray(archive)
                bad[position] ^= 1 << rng.randrange(8)
                write(self.tmp / 'share', {'X.tgz': bytes(bad)})
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
            with self.subTest(length):
                self.pulled(archive[:length], 'is damaged: its index is missing' + remedy)
        self.pulled(b'', 'is damaged or not a .tgz: it ends too early' + remedy)
        write(self.tmp / 'share', {'X.tgz': archive.replace(archive[40:44], b'abcd', 1)})  # among the root's files
        self.fails_with('the archive is damaged: a block does not match its checksum or size' + remedy, 'info', '-r', 'X')



# ---------------------------------------------------------------------------------------
# libdeflate and zlib: all other classes run with the one that is there
# ---------------------------------------------------------------------------------------

DEFLATERS = {'libdeflate': '1', 'zlib': '0'}

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
size_t libdeflate_gzip_compress(void *c, const void *in, size_t n, void *out, size_t room) { return say("deflates\n"); }
int libdeflate_gzip_decompress_ex(void *d, const void *in, size_t n, void *out, size_t room, size_t *read, size_t *written) {
    memset(out, 1, room);
    *read = n;
    return 1 + say("inflates\n");
}
'''


class Deflate(Case):
    def setUp(self):
        super().setUp()
        self.use('libdeflate')
        if 'libdeflate' not in self.etc('--version')[0]:
            self.skipTest('libdeflate is not installed, or this is not CPython')

    def use(self, name):
        os.environ['ETC_LIBDEFLATE'] = DEFLATERS[name]

    def test_version(self):
        for name, pattern in (('libdeflate', 'libdeflate'), ('zlib', r'zlib \d[\w.-]*')):
            self.use(name)
            self.assertRegex(self.etc('--version')[0], r'\Aetcetera %s \(Python %s, %s\)\n\Z' % (
                re.escape(etc.__version__), re.escape(sys.version.split()[0]), pattern))

    def test_each_reads_what_the_other_writes(self):
        rng = random.Random(1)
        text = ''.join('line %d says %x\n' % (number, rng.randrange(1 << 20)) for number in range(50000))
        root = write(self.tmp / 'ds', {'data/padded/%02d' % number: noise(700 + number, number) for number in range(60)})
        write(root, {'data/text/a': text, 'data/noise/n': noise(100000), 'data/zeros/z': bytes(MIB), 'README.md': ''})
        self.etc('register', root, 'X')
        share, sizes = self.tmp / 'share', {'zlib': [], 'libdeflate': []}
        for level in range(10):
            for writer, reader in (('libdeflate', 'zlib'), ('zlib', 'libdeflate')):
                self.use(writer)
                etc.push('X', config=self.config(compression_level=level))
                sizes[writer].append((share / 'X.tgz').stat().st_size)
                (share / 'X.tgz').replace(share / 'Y.tgz')
                self.use(reader)
                self.etc('pull', 'Y', home='two')
                self.assertEqual(tree(self.tmp / 'two/Y'), tree(root), (writer, level))
                self.etc('purge', 'Y', home='two')
        stored = sizes['zlib'][0]
        self.assertLess(abs(sizes['libdeflate'][0] - stored), 1000)
        for ours, others in zip(sizes['libdeflate'][1:], sizes['zlib'][1:]):
            self.assertLess(ours, min(others, 0.6 * stored))

    def test_zlib_is_spared(self):
        for function in ('compressobj', 'decompressobj'):
            self.addCleanup(setattr, zlib, function, getattr(zlib, function))
            setattr(zlib, function, self.fail)
        self.share(small(self.tmp / 'ds'))
        self.etc('pull', 'X', home='two')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))

    def told(self, payload, *block_of):
        """What a pull says of an archive with this block; the same with both."""
        said = []
        for name in DEFLATERS:
            self.use(name)
            write(self.tmp / 'share', {'X.tgz': indexed((payload, block(payload, *block_of)), size=30000)})
            err = self.etc('pull', 'X', status=None)[1]
            if 'pulled' in err:
                self.etc('purge', 'X')
                err = ''
            self.nothing_is_left()
            said.append(err)
        self.assertEqual(*said)
        return said[0]

    def test_damaged_blocks(self):
        file = ''.join('%d ' % number for number in range(9999)).encode()[:30000]
        payload = entry('data/train/') + entry('data/train/x', file)
        good, stored, crc, size = deflated(payload), deflated(payload, 0), zlib.crc32(payload), len(payload)
        bomb, uneven, trailer = bytes(MIB + 512), payload + b'x', struct.pack('<II', crc, size)
        mismatch = 'does not match its checksum or size'
        for what, problem, *block_of in (
                ('good', '^$', payload, good), ('stored', '^$', payload, stored),
                ('without its end', mismatch, payload, good[:-1]), ('half', 'the archive is damaged', payload, good[:len(good) // 2]),
                ('a byte', 'the archive is damaged', payload, good[:1]), ('noise', 'the archive is damaged', payload, noise(2000)),
                ('stored, without its end', 'the archive is damaged', payload, stored[:-1]),
                ('a byte after the end', mismatch, payload, good + b'\0'), ('another stream', mismatch, payload, good + good),
                ('the trailer twice', mismatch, payload, good + trailer), ('another checksum', mismatch, payload, good, crc ^ 1),
                ('a larger size', mismatch, payload, good, crc, size + 512), ('a smaller size', mismatch, payload, good, crc, size - 512),
                ('no bytes', mismatch, b''), ('half a record', mismatch, uneven), ('more than a block', mismatch, bomb),
                ('other contents', 'in file:///', payload, deflated(payload[::-1]), zlib.crc32(payload[::-1])),
                ('a reserved type', mismatch, payload, b'\7' + good),
                ('a wrong complement', mismatch, payload, b'\1\1\0\1\0x'),
                ('a distance before the start', mismatch, payload, b'\x4b\x04\xa2' + good)):
            with self.subTest(what):
                self.assertRegex(self.told(*block_of), problem)
        rng, silent = random.Random(7), 0
        for number in range(50 * RUNS):
            bad = bytearray(good)
            for _ in range(rng.choice((1, 1, 3))):
                bad[rng.choice((rng.randrange(len(bad)), rng.randrange(60)))] ^= 1 << rng.randrange(8)
            with self.subTest(number=number):
                silent += self.told(payload, bytes(bad)) == ''
        self.assertLess(silent, 5)

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
                (lambda path: path.symlink_to(real), 'libdeflate'), (lambda path: None, 'libdeflate'), (Path.touch, 'zlib'),
                (Path.mkdir, 'zlib'), (lambda path: path.write_text('text'), 'zlib'), (lambda path: path.symlink_to(other), 'zlib')):
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

OVERTAKEN = "etc: 'X' in %s was replaced meanwhile; look again: 'etc info -r X' shows what is there now\n"
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
    stand_in(case, time, 'sleep', slept.append)
    return slept


def no_md5(*args, **kwargs):
    """Instead of hashlib.md5, in FIPS mode."""
    raise ValueError('disabled for FIPS')


@contextlib.contextmanager
def found(case):
    """The dataset X as pull and purge find it: functions that read from this version, and that remove it.

    All other tests talk to remotes through the public surface.
    """
    with contextlib.closing(etc._open_remote(case.config())) as remote:
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
        self.etc('register', '-f', write(self.tmp / ('noise%d' % seed), {'data/train/x': noise(size, seed)}), 'X')
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
        size = (11 if self.copies else 1) * MIB
        root = write(self.tmp / 'ds', {'data/%d/x' % seed: noise(size, seed) for seed in range(3)})
        self.share(root, 'Old')
        for name, changes in (('Readme', {'README.md': 'x'}), ('Middle', {'data/1/x': noise(size, 4)}), ('Same', {})):
            with self.subTest(name):
                self.etc('register', write(root, changes), name)
                err = self.etc('push', '-v', name)[1]
                self.assertTrue(not self.copies or 'were there already' in err, err)
                assert_pulls(self, root, name, home=name)

    def test_round_trip(self):
        root = odd(self.tmp / 'ds')
        self.etc('register', root, 'Odd')
        self.assertIn('pushed', self.etc('push', 'Odd')[1])
        self.assertIn('pulled', self.etc('pull', 'Odd', home='two')[1])
        self.etc('verify', 'Odd', home='two')
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
        self.assertEqual(self.etc('ls', '-r')[0], 'One\na.b-c_d\n')
        self.assertEqual(self.etc('ls', '-r', 'a*')[0], 'a.b-c_d\n')
        self.assertEqual(etc.ls(True, self.config(), ['O?e', 'nope']), ['One'])
        for item in json.loads(self.etc('ls', '-r', '--json')[0]):
            with self.subTest(item['name']):
                self.assertEqual((item['digest'], item['files'], item['when'][:2]), (digest, 6, '20'))
        info = etc.info('One', remote=True, config=self.config('fresh'))
        self.assertEqual((info['meta'], info['readme']), ({'classes': 10}, '# Small\n'))
        self.assertEqual(info['partitions'], {'train': {'files': 2, 'size': 5006}, 'test': {'files': 1, 'size': 5}})
        self.assertFalse((self.tmp / 'fresh').exists())
        self.assertIn("did you mean 'One'", self.etc('pull', 'Onne', status=1)[1])

    def test_push_again(self):
        root = small(self.tmp / 'ds')
        self.share(root)
        old = etc.Dataset(root).digest
        self.assertIn('identical', self.etc('push', 'X')[1])
        write(root, {'data/train/new': 'new'})
        self.assertIn('push -f', self.etc('push', 'X', status=1)[1])
        for pin in (old, 'sha256:' + '1' * 64):  # of other files than there are now
            with self.subTest(pin):
                self.assertIn("'X': expected digest " + pin, self.etc('push', 'X@' + pin, '-f', status=1)[1])
        self.etc('push', '-f', 'X@' + etc.Dataset(root).digest)
        assert_pulls(self, root)
        err = self.etc('push', 'Gone', 'X', status=1)[1]
        self.assertRegex(err, "\\Aetc: no local dataset 'Gone'; .*\netc: 'X' is in .* already, and identical\n\\Z")

    def test_pull_again(self):
        root = small(self.tmp / 'ds')
        self.etc('register', root, 'X')
        old = etc.push('X', config=self.config())
        two = self.config('two')
        assert_pulls(self, root, 'X@' + old)
        for home in ('two', 'home'):  # what is registered is compared, too
            self.assertIn('identical', self.etc('pull', 'X', home=home)[1])
        write(root, {'data/train/new': 'new'})
        new = etc.push('X', force=True, config=self.config())
        self.assertIn('pull -f', self.etc('pull', 'X', home='two', status=1)[1])
        self.assertIn('expected digest', self.etc('pull', '-f', 'X@' + old, home='two', status=1)[1])
        self.assertEqual(etc.dataset('X@' + old, config=two).digest, old)
        assert_pulls(self, root, 'X@' + new, force=True)
        with self.assertRaisesRegex(etc.Corrupt, "'X': expected digest %s, found %s" % (old, new)):
            etc.dataset('X@' + old, auto_install=True, config=two)
        self.assertEqual(self.leftovers('two'), [])
        err = self.etc('pull', 'Nope', 'X', home='three', status=1)[1]
        self.assertRegex(err, "\\Aetc: no dataset 'Nope' in .*\netc: pulled X: ")

    def test_partitions(self):
        root = write(small(self.tmp / 'ds'), {'data/train/large': noise(3 * MIB), 'data/val/v': 'v'})
        self.share(root)
        two, three, call = self.config('two'), self.config('three'), functools.partial(self.etc, home='two')
        call('pull', '-p', 'test', 'X')
        ds = etc.dataset('X', partitions=['test'], config=two)
        self.assertEqual((ds.keys(), ds.meta, ds.digest), ({'test'}, {'classes': 10}, etc.Dataset(root).digest))
        self.assertIn('partly', call('info', 'X')[0])
        call('verify', 'X')
        self.assertIn("'X' is only partly installed, so it cannot be pushed", call('push', 'X', status=1)[1])
        self.assertIn("did you mean 'train'", call('pull', '-p', 'trian', 'X', status=1)[1])
        with self.assertRaisesRegex(etc.NotFound, "'X' is only partly installed, without assets, data/train, data/val"):
            etc.dataset('X', config=two)
        with self.assertRaisesRegex(KeyError, "no partition 'nope' in X; it has: test, train, val"):
            etc.dataset('X', partitions=['nope'], config=two)
        self.assertIn('identical', call('pull', '-p', 'test', 'X')[1])
        call('pull', '-p', 'val', 'X')
        self.assertEqual(etc.Dataset(self.tmp / 'two/X').keys(), {'test', 'val'})
        assert_pulls(self, root)
        call('verify', 'X')
        call('push', 'X')
        self.assertEqual(etc.dataset('X', True, ['val', 'train'], three).keys(), {'train', 'val'})
        self.assertEqual(etc.dataset('X', True, config=three).keys(), {'train', 'test', 'val'})

    def test_overtaken_push(self):
        for name, size in (('Small', 1000), ('Large', 9 * MIB)):  # a single request, and an upload in parts
            with self.subTest(name):
                for seed, home in enumerate(('slow', 'fast')):
                    root = write(self.tmp / name / home, {'data/train/' + home: noise(size, seed)})
                    self.etc('register', root, name, home=home)
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
            root = write(self.tmp / 'ds' / home, {'data/train/big': noise(9 * MIB, seed)})
            self.etc('register', root, 'X', home=home)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(push, homes))
        self.assertEqual([outcome for outcome, _ in results].count('won'), 1, results)
        self.assertEqual(etc.pull('X', config=self.config('two')).digest, dict(results)['won'])

    def test_replaced_meanwhile(self):
        for size in (1000, 9 * MIB):  # a single request, and an upload in parts
            self.publish(size, 1)
            with self.subTest(size), found(self) as (read, remove_old):
                self.assertEqual(len(read()), 45)
                new = self.publish(size, 2)
                if self.bound:
                    with self.assertRaisesRegex(etc.RemoteError, "'X' in .* was replaced while it was read"):
                        read()
                with self.assertRaisesRegex(etc.RemoteError, "'X' in .* was replaced meanwhile; look again: "
                                                             "'etc info -r X' shows"):
                    remove_old()
                self.assertEqual(etc.info('X', True, self.config())['digest'], new)
                with found(self) as (_, remove_new):
                    self.assertIs(remove_new(), False)
                    self.assertEqual(etc.ls(True, self.config()), [])
                    self.assertIs(remove_new(), False)  # another was faster

    def test_foreign(self):
        root = write(odd(self.tmp / 'ds', 5), {'data/test/large': noise(6 * MIB)})
        with tarfile.open(str(self.tmp / 'X.tgz'), 'w:gz', compresslevel=1, format=tarfile.PAX_FORMAT) as tar:
            tar.add(str(root), '.')
        self.put('X.tgz', (self.tmp / 'X.tgz').read_bytes())
        info = etc.info('X', remote=True, config=self.config())
        self.assertEqual({info[key] for key in ('digest', 'files', 'size', 'partitions', 'meta', 'readme')}, {None})
        self.assertIn("'X' in %s was packed by another tool, and has no index to compare; run 'etc pull X', and "
                      'compare what that installs\n' % self.url, self.etc('diff', '-r', 'X', '-r', 'X', status=1)[1])
        assert_pulls(self, root, home='home', partitions=['test'])
        digest, wrong = etc.Dataset(root).digest, 'sha256:' + '2' * 64
        self.assertIn('identical', self.etc('pull', 'X@' + digest)[1])
        self.assertIn("'X': expected digest " + wrong, self.etc('pull', '-f', 'X@' + wrong, status=1)[1])
        self.etc('verify', 'X')
        self.assertIn('is in %s already, and identical' % self.url, self.etc('push', 'X')[1])
        self.etc('register', root, 'X', home='another')  # where no receipt knows that it is the same
        self.assertIn('push -f', self.etc('push', 'X', home='another', status=1)[1])
        self.etc('push', '-f', 'X')
        self.assertEqual(etc.info('X', remote=True, config=self.config())['digest'], digest)

    def test_purge(self):
        root, config = small(self.tmp / 'ds'), self.config()
        self.share(root, 'One')
        self.share(write(self.tmp / 'large', {'data/train/x': noise(9 * MIB)}), 'Large')
        self.put('Foreign.tgz', b'no archive at all')
        digest, wrong = etc.Dataset(root).digest, 'sha256:' + '4' * 64
        for words, status, problem in (
                (['One'], 2, "without a terminal to ask on, 'etc purge -r' needs -f; 'etc purge -h' shows how"),
                (['-f', 'Onne'], 1, "no dataset 'Onne' in %s; did you mean 'One'?" % self.url),
                (['-f', 'One@' + wrong], 1, "'One': expected digest %s, found %s" % (wrong, digest)),
                (['-f', 'Foreign@' + digest], 1,
                 "'Foreign': expected digest %s, found none, as another tool packed it" % digest)):
            with self.subTest(words):
                self.assertEqual(self.etc('purge', '-r', *words, status=status), ('', 'etc: %s\n' % problem))
                self.assertEqual(etc.ls(True, config), ['Foreign', 'Large', 'One'])
        self.assertEqual(self.etc('purge', '-r', '-f', 'Nope', 'Foreign', 'Large', status=1)[1].splitlines(), [
            "etc: no dataset 'Nope' in %s; 'etc ls -r' lists what is there" % self.url,
            "etc: purged 'Foreign' from %s" % self.url, "etc: purged 'Large' from %s" % self.url])
        self.assertIsNone(etc.purge('One@' + digest, remote=True, config=config))
        self.assertEqual((etc.ls(True, config), self.installed()), ([], ['Large', 'One']))
        with self.assertRaisesRegex(etc.NotFound, "no dataset 'One' in "):
            etc.purge('One', remote=True, config=config)
        self.etc('push', 'One')
        etc.purge('One', config)
        self.assertEqual((etc.ls(True, config), self.installed()), (['One'], ['Large']))

    def test_killed_push(self):
        (self.tmp / 'share').mkdir()  # as a push that is killed early may not have made it
        root = write(self.tmp / 'ds', {'data/train/%d' % n: noise(4 * MIB, n) for n in range(8)})
        self.etc('register', root, 'X')
        for seconds in (0.2, 0.35, 0.5):
            process = self.spawn('push', 'X')
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()
            process.communicate()
            if etc.ls(remote=True, config=self.config()):  # it was faster than we
                self.etc('push', 'X')
        self.etc('push', '-f', 'X')
        self.assertEqual(etc.pull('X', config=self.config('two')).digest, etc.Dataset(root).digest)


class BucketSuite(RemoteSuite):
    """What buckets on servers of ours have in common."""

    def test_lost_last_answer(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/large': noise(9 * MIB)}), 'X')
        skip_pauses(self)

        def lose(handler):
            self.server.final = None
            handler.close_connection = True
        for self.server.conditions, words in ((True, ['push']), (False, ['push', '-f'])):
            with self.subTest(words):
                self.server.final = lose
                self.etc(*words, 'X')
                self.assertIsNone(self.server.final)
                assert_pulls(self, 'ds', force=True)

    def test_pages(self):
        for number in range(25):
            self.put('D%02d.tgz' % number, b'x')
        self.server.page = 10
        self.assertEqual(etc.ls(True, self.config()), ['D%02d' % n for n in range(25)])
        self.assertEqual(len(self.server.log), 3)

    def test_odd_prefixes(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        bucket = self.url.replace('some/prefix', '')
        for prefix in ('a b/+~\u00e9/(x)', 'a+b %41&'):
            for self.server.encoding in (True, False):
                with self.subTest(prefix, encoding=self.server.encoding):
                    self.url = bucket + prefix
                    self.server.objects.clear()
                    self.etc('push', 'X')
                    self.assertEqual(list(self.server.objects), [prefix + '/X.tgz'])
                    self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
                    self.etc('pull', '-f', 'X', home='two')


def no_link(*args, **kwargs):
    """Instead of os.link, where a file system has no hard links."""
    raise PermissionError(1, 'Operation not permitted')


class FileRemote(RemoteSuite, Case):
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
                self.etc('pull', *words.split(), home=str(number))
                self.assertEqual(etc.Dataset(self.tmp / str(number) / 'X').keys(), {'train', 'val'})

    def test_copied_installs(self):
        """A copy of a home knows what is missing, and what it has."""
        root = write(small(self.tmp / 'ds'), {'data/val/v': 'v'})
        self.share(root)
        self.etc('pull', '-p', 'test', 'X', home='two')
        shutil.copytree(str(self.tmp / 'two'), str(self.tmp / 'copy'), symlinks=True)
        for home in ('two', 'copy'):
            with self.subTest(home):
                self.assertIn('is only partly installed, so it cannot be pushed',
                              self.etc('push', 'X', home=home, status=1)[1])
                ds = etc.dataset('X@' + etc.Dataset(root).digest, partitions=['test'], config=self.config(home))
                self.assertEqual(ds.keys(), {'test'})
                modes = {path: path.stat().st_mode for path in ds.root.rglob('*') if path.is_file()}
                for path in modes:
                    path.parent.chmod(0o555)
                assert_pulls(self, root, home=home)
                self.etc('verify', 'X', home=home)
                self.assertEqual(modes, {path: path.stat().st_mode for path in modes})
                self.etc('pull', '-f', '-p', 'test', 'X', home=home)
                wrong = 'X@sha256:' + '0' * 64
                self.assertIn("'X': expected digest sha256:000", self.etc('purge', wrong, home=home, status=1)[1])
                self.etc('purge', 'X@' + ds.digest, home=home)

    def test_pull_mends(self):
        root = write(small(self.tmp / 'ds'), {'data/val/v': 'v'})
        self.share(root)
        self.etc('pull', 'X', home='two')
        victim = self.tmp / 'two/X/data/train/a.txt'
        victim.chmod(0o644)
        victim.write_text('broken')
        (self.tmp / 'two/X/data/val/v').unlink()
        self.assertIn("'X' is not what was installed: data/train, data/val differ;",
                      self.etc('verify', 'X', home='two', status=1)[1])
        assert_pulls(self, root, force=True)
        self.etc('verify', 'X', home='two')

    def test_diff(self):
        root = small(self.tmp / 'ds')
        self.share(root)
        self.assertEqual(self.etc('diff', '-r', 'X', 'X', '-q'), ('', ''))
        self.share(write(root, {'data/train/new': 'new'}), 'Y')
        rows = [row.split() for row in self.etc('diff', '-r', 'X', '-r', 'Y', status=1)[0].splitlines()]
        self.assertEqual([(row[0], row[-1]) for row in rows],
                         [('same', '.'), ('same', 'assets'), ('same', 'data/test'), ('differs', 'data/train')])
        contrast = etc.diff('X', 'Y', remote=(True, False), config=self.config())
        self.assertEqual((contrast['equal'], contrast['segments']['data/train']), (
            False, {'status': 'differs', 'a': {'files': 2, 'size': 5006}, 'b': {'files': 3, 'size': 5009}}))
        self.etc('pull', '-p', 'test', 'X', home='two')
        self.etc('diff', 'X', '-r', 'X', home='two')  # what a receipt knows of the whole
        self.assertIn("no dataset 'Z' in", self.etc('diff', 'X', '-r', 'Z', status=1)[1])

    def test_urls(self):
        start, bucket = 'cannot use the url; it must start with file://', 'the url is not of the form s3://bucket'
        nowhere = self.tmp / 'no where'
        for url, problem in (
                ('file://host/x', 'the url is no absolute path; write file:///path'), ('file:x', start),
                ('nonsense', start), ('ftp://x/y', start), ('s3:/x', start), ('S3://x', start), ('s3://', bucket),
                ('s3://a b', bucket), (nowhere.as_uri(), 'no directory %s;' % nowhere)):
            with self.subTest(url):
                self.assertIn('etc: ' + problem, self.etc('ls', '-r', url=url, status=1)[1])
        nowhere.mkdir()
        self.assertEqual(self.etc('ls', '-r', url=nowhere.as_uri()), ('', ''))

    def test_directories_and_dead_links_are_no_datasets(self):
        write(self.tmp / 'share', {'X.tgz/file': 'x', 'Y.tgz': ('->', 'nowhere')})
        self.assertEqual(self.etc('ls', '-r')[0], '')
        for name in 'XY':
            with self.subTest(name):
                self.assertIn("no dataset '%s'" % name, self.etc('pull', name, status=1)[1])

    def test_killed_push_leaves_nothing_under_the_name(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/%d' % n: noise(4 * MIB, n) for n in range(20)}), 'X')
        process = self.spawn('push', 'X')
        while not glob.glob(str(self.tmp / 'share/.X.tgz.*')):
            self.assertIsNone(process.poll())
        process.kill()
        process.communicate()
        rest, = self.shared()
        self.assertNotEqual(rest, 'X.tgz')
        self.assertEqual(etc.ls(True, self.config()), [])
        os.utime(str(self.tmp / 'share' / rest), (1, 1))
        self.etc('push', 'X')
        self.assertEqual(self.shared(), ['X.tgz'])

    def test_signs_in_paths(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        names = ['a#b', 'a?b', 'a?b#c', '#', 'a b', 'per%cent', 'a%23b']
        urls = {'file:///%s/%s' % (self.tmp, name.replace('%', '%25')): name for name in names}
        if sys.platform == 'linux':  # elsewhere names are text
            names.append(os.fsdecode(b'\xff\xc3\xa9'))
        for url, name in itertools.chain(urls.items(), [((self.tmp / name).as_uri(), name) for name in names]):
            with self.subTest(url):
                self.etc('push', 'X', url=url)
                (self.tmp / name / 'X.tgz').unlink()

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_who_may_read(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        share = self.tmp / 'share'
        self.addCleanup(os.umask, os.umask(0o022))
        for umask, directory, public, mode, warned in (
                (0o077, None, True, 0o644, False), (0o077, 0o755, True, 0o644, False),
                (0o077, 0o755, False, 0o600, True), (0o027, 0o755, False, 0o640, True),
                (0o027, 0o750, False, 0o640, False), (0o077, 0o700, False, 0o600, False),
                (0o022, 0o755, False, 0o644, False), (0o002, 0o775, False, 0o664, False),
                (0o077, None, False, 0o600, False)):
            with self.subTest(umask=umask, directory=directory, public=public):
                remove(share)
                if directory:
                    share.mkdir()
                    share.chmod(directory)
                self.settings = {'public': public}
                os.umask(umask)
                err = self.etc('push', 'X')[1]
                self.assertEqual(stat.S_IMODE((share / 'X.tgz').stat().st_mode), mode)
                self.assertEqual("cannot read 'X'; set 'public: true', or change your umask" in err, warned, err)
                if public:
                    self.assertEqual(share.stat().st_mode & 0o055, 0o055)
        self.settings = {'public': True}
        self.etc('push', 'X', url=self.url + '/a/b')
        self.assertEqual([(share / place).stat().st_mode & 0o055 for place in ('a', 'a/b')], [0o055] * 2)

    @unittest.skipUnless(sys.platform == 'linux', 'no limits on files there')
    def test_no_room_for_a_push(self):
        import resource
        self.etc('register', small(self.tmp / 'ds'), 'X')
        process = self.spawn('push', 'X', preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)))
        problem = "etc: cannot write 'X' to %s: File too large; free some space there\n" % (self.tmp / 'share')
        self.assertEqual((process.communicate(), process.returncode), ((b'', problem.encode()), 1))

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_places_where_one_may_not_write(self):
        self.share(small(self.tmp / 'ds'))
        self.etc('register', '-f', odd(self.tmp / 'other', 3), 'X')
        self.etc('push', 'Y', status=1)  # what is imported for an error is there from here on
        share, push, purge = self.tmp / 'share', ['push', '-f'], ['purge', '-r', '-f']
        for mode, words, problem, remedy in (
                (0o1777, push, "write 'X' to %s: Operation not permitted", 'replace'),
                (0o555, push, "write 'X' to %s: Permission denied", 'replace'),
                (0o555, purge, "remove 'X' from %s: Permission denied", 'remove')):
            if mode == 0o1777 and os.geteuid():
                continue  # nobody else's files are here
            with self.subTest(words, mode=oct(mode)):
                share.chmod(mode)
                with unprivileged(self.tmp / 'home', self.tmp / 'settings.yaml', self.tmp / 'other'):
                    err = self.etc(*words, 'X', status=1)[1]
                share.chmod(0o755)
                self.assertEqual(err, "etc: cannot %s; ask the file's owner to %s it, or the directory's owner for "
                                      'write access\n' % (problem % share, remedy))
                self.assertEqual(self.shared(), ['X.tgz'])

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_files_that_cannot_be_read(self):
        self.share(small(self.tmp / 'ds'))
        self.etc('push', 'Y', status=1)  # as above
        share, home, file = self.tmp / 'share', self.tmp / 'home', self.tmp / 'home/X/data/train/a.txt'
        with unprivileged(self.tmp):
            (share / 'X.tgz').chmod(0)
            file.chmod(0)
            denied = 'Permission denied: %s' % file
            ask = "cannot read 'X' in %s: Permission denied; ask who pushed it" % share
            for words, problem in ((['push', '-f'], denied), (['pull'], ask), (['info', '-r'], ask),
                                   (['--url', home.as_uri(), 'push'], denied)):  # below which the file lies
                with self.subTest(words):
                    self.assertIn(problem, self.etc(*words, 'X', status=1)[1])

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
                self.assertEqual(self.etc('purge', '-r', '-f', 'X', status=1)[1], OVERTAKEN % self.url)
                self.assertEqual((share / 'X.tgz').read_bytes(), others[-1])
                self.assertEqual(len(self.shared()), len(others))  # what was overtaken twice is kept for a day

    def test_purge_that_another_overtakes(self):
        self.put('X.tgz', b'x')
        rename = os.rename
        stand_in(self, os, 'rename', lambda source, target: (os.unlink(source), rename(source, target)))
        self.assertIn("purged 'X'", self.etc('purge', '-r', '-f', 'X')[1])

    def test_killed_purge(self):
        program = ('import os, sys; sys.path.insert(0, sys.argv[1]); import etcetera; '
                   'setattr(os, sys.argv[2], lambda *args: os._exit(9)); '
                   "etcetera.main(['--url', sys.argv[3], 'purge', '-r', '-f', 'X'])")
        self.etc('register', small(self.tmp / 'ds'), 'Y')
        for function, left in (('rename', ['X.tgz', 'Y.tgz']), ('unlink', ['Y.tgz'])):
            with self.subTest(function):
                remove(self.tmp / 'share')
                self.put('X.tgz', b'x')
                os.utime(str(self.tmp / 'share/X.tgz'), (1, 1))
                command = [sys.executable, '-c', program, str(HERE), function, self.url]
                self.assertEqual(subprocess.call(command), 9)
                self.assertEqual(etc.ls(True, self.config()), [name[0] for name in left[:-1]])
                self.assertEqual(len(self.shared()), 1)
                self.etc('push', 'Y')
                self.assertEqual(self.shared(), left)

    def test_purge_of_a_link(self):
        write(self.tmp, {'elsewhere': 'x', 'share/X.tgz': ('->', '../elsewhere')})
        self.etc('purge', '-r', '-f', 'X')
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
        """Let `action(handler)` happen at the first deletions; it may answer itself and return True."""
        left = [None] * times
        self.server.fault = lambda h: h.command == 'DELETE' and bool(left) and (left.pop(), action(h))[1]

    def stored(self):
        return [data for data, _, _ in self.server.objects.values()]

    def purge(self, status=0):
        return self.etc('purge', '-r', '-f', 'X', status=status)[1]

    def lose(self, handler, *then):
        """Delete the object, but let the answer be lost."""
        self.server.objects.clear()
        for data in then:
            self.put('X.tgz', data)
        handler.close_connection = True
        return True

    def busy(self, handler):
        handler.answer(503)
        return True

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
        self.assertRegex(self.purge(status=1), r'\Aetc: %s answers 503: [^\n]*\n\Z' % self.url)
        self.assertEqual(self.stored(), [b'first'])

    def test_versions_that_are_kept(self):
        self.server.versioned = '5'
        self.assertEqual(self.purge(), "etc: purged 'X' from %s, which keeps it as an old version\n" % self.url)
        self.assertEqual(self.stored(), [])
        self.assertIn("no dataset 'X'", self.purge(status=1))

    def refused(self, answer, problem):
        with self.subTest(problem):
            self.at_delete(lambda handler: answer(handler) or True, 9)
            self.assertEqual(self.purge(status=1), 'etc: %s answers %s\n' % (self.url, problem))
            self.assertEqual(self.stored(), [b'first'])


class S3Purge(PurgeSuite, S3Case):
    def put(self, name, data):
        self.server.objects['some/prefix/' + name] = data, '"%s"' % hashlib.sha1(data).hexdigest(), {}

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
                        return True
                with self.subTest(code, status=status, look=look):
                    self.put('X.tgz', b'first')
                    self.server.fault = fault
                    self.assertIn('was replaced meanwhile' if look else "purged 'X'",
                                  self.purge(status=int(bool(look))))
                    self.assertEqual(self.stored(), [b'second'] if look else [])

    def test_archive_classes(self):
        """What cannot be read can be listed, and removed."""
        self.server.fault = lambda h: h.command == 'GET' and h.path.endswith('X.tgz') and (
            h.error(403, 'InvalidObjectState') or True)
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.assertIn("purged 'X'", self.purge())


class S3Remote(BucketSuite, S3Case):
    copies = True
    put = S3Purge.put

    def parts(self):
        return [path for path in self.requests('PUT') if 'partNumber=' in path]

    def stored(self):
        """The bytes and the ETag of the only object."""
        (data, etag, _), = self.server.objects.values()
        return data, etag

    def test_reads_go_on_where_they_broke(self):
        skip_pauses(self)
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(5 * MIB)}))
        data, etag = self.stored()
        self.settings['connections'] = 1
        sent = []

        def fault(handler):
            if 'Range' in handler.headers:
                start, stop = asked_range(handler.headers, len(data))
                part = data[start:min(stop, start + 700000)]
                sent.append(len(part))
                handler.answer(206, part, {'ETag': etag, 'Content-Range': 'bytes %d-%d/%d' % (
                    start, stop - 1, len(data))}, stop - start)
                handler.close_connection = True
                return True
        self.server.fault = fault
        assert_pulls(self, 'ds')
        self.assertGreater(len(sent), 7)
        self.assertLess(sum(sent), len(data) + 65536 + 8 * 262144)

    def test_wrong_answers(self):
        skip_pauses(self)
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(20000)}))
        data, etag = self.stored()
        no_range, too_much = 'does not answer with the range that was asked for', 'answers with more than was asked for'
        no_headers, ten = {'ETag': None, 'Content-Range': None}, b'x' * 10
        for problem, status, body, headers, length in (
                (no_range, 200, b'x' * 500, {'Content-Range': None}, None),
                (no_range, 206, ten, {'Content-Range': 'bytes 0-9/10'}, None),
                (no_range, 206, b'0\r\n\r\n', {'Transfer-Encoding': 'chunked'}, None),
                ("'X' in %s was replaced while it was read" % self.url, 206, ten, {'ETag': '"other"'}, None),
                ('IncompleteRead(10 bytes read, 990 more expected)', 206, ten, no_headers, 1000),
                (too_much, 206, b'x' * 3 * MIB, no_headers, None), (too_much, 200, b'x' * 90 * MIB, no_headers, None)):
            def fault(handler):
                if not handler.headers.get('Range', 'bytes=-').startswith('bytes=-'):
                    start, stop = asked_range(handler.headers, len(data))
                    span = 'bytes %d-%d/%d' % (start, stop - 1, len(data))
                    handler.answer(status, body, dict({'ETag': etag, 'Content-Range': span}, **headers), length)
                    handler.close_connection = True
                    return True
            with self.subTest(problem, status=status, headers=headers):
                self.server.log.clear()
                self.server.fault = fault
                self.assertIn(problem, self.etc('pull', 'X', home='two', status=1)[1])
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
                self.assertRegex(self.etc('pull', '-f', 'X', home='two', status=int(said == problem))[1], said)

    def test_stores_without_etags(self):
        self.share(small(self.tmp / 'ds'))
        data = self.stored()[0]
        for etag in ('W/"weak"', ''):
            with self.subTest(etag):
                self.server.objects['some/prefix/X.tgz'] = data, etag, {}
                self.assertIn('sha256:', self.etc('ls', '-r', '-l')[0])  # times of listing and reading differ here
                self.etc('pull', '-f', 'X', home='two')

    def test_nothing_is_left_in_the_temporary_directory(self):
        self.share(small(self.tmp / 'ds'))
        stand_in(self, tempfile, 'tempdir', tempfile.mkdtemp(dir=str(self.tmp)))
        self.etc('info', '-r', 'X')
        self.assertEqual(os.listdir(tempfile.gettempdir()), [])

    def test_last_answers_that_are_not_understood(self):
        """A push is done if the store says so as its API defines, with status 200, or if what is there is right."""
        skip_pauses(self)
        self.publish(6 * MIB, 1)
        self.share(small(self.tmp / 'small'), 'Y')
        others = dict(self.server.objects)
        write(self.tmp, {'noise1/data/train/x': noise(6 * MIB, 2), 'small/README.md': '# Other\n'})  # as large
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
                    for status in (201, 202, 203, 204) for name in 'XY']:
            for before, stored in itertools.product(({}, others), (True, False)):
                def answer(handler):
                    handler.answer(status, body, headers)

                def fault(handler):
                    method, word = ('POST', 'uploadId=') if name == 'X' else ('PUT', '.tgz')
                    return handler.command == method and word in handler.path and (answer(handler) or True)
                with self.subTest(what, name=name, status=status, before=len(before), stored=stored):
                    self.server.objects, self.server.uploads = dict(before), {}
                    self.server.fault, self.server.final = (None, answer) if stored else (fault, None)
                    is_done = what == 'success' or what != 'error' and stored
                    err = self.etc('push', *['-f'] * len(before), name, status=int(not is_done))[1]
                    self.assertIn('pushed' if is_done else 'no;' if what == 'error' else 'does not answer as S3', err)
                    if not stored and not is_done:
                        self.assertEqual((self.server.objects == before, self.server.uploads), (True, {}))

    def test_uploads_that_fail(self):
        """Nothing is left, neither an object nor parts that are billed."""
        skip_pauses(self)
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(16 * MIB)}), 'X')
        for method, word, status, code, problem in (
                ('POST', '?uploads=', 200, '', 'does not answer as S3 does'),
                ('PUT', 'partNumber=2', 200, '', 'does not answer as S3 does'),
                ('PUT', 'partNumber=3', 403, 'AccessDenied', 'AccessDenied'),
                ('POST', 'uploadId=', 200, 'InternalError', 'InternalError')):
            with self.subTest(word):
                self.server.fault = lambda handler: handler.command == method and word in handler.path and (
                    handler.error(status, code) if code else handler.answer(status, PORTAL)) is None
                self.assertIn(problem, self.etc('push', 'X', status=1)[1])
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
                    handler.error(status, code)
                    return True
        self.server.fault = fault
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}))
        self.assertEqual(left, [])
        assert_pulls(self, 'ds')

    def test_white_space_before_answers(self):
        class Slow(S3Handler):
            def answer(self, status, body=b'', headers=(), length=None):
                super().answer(status, b' \n' * 3 + body if body[:6] == b'<?xml ' else body, headers, length)
        self.server.RequestHandlerClass = Slow
        self.test_replaced_meanwhile()
        self.assertIn('NoSuchBucket', self.etc('ls', '-r', url='s3://other', status=1)[1])

    @unittest.skipIf(os.name == 'nt', 'no SIGTERM to send')
    def test_interrupted_while_the_store_is_busy(self):
        """It waits neither for all tries of each thread nor for what Retry-After asks."""
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(20 * MIB)}), 'X')
        busy = threading.Event()
        self.server.fault = lambda handler: handler.command in ('PUT', 'DELETE') and (
            handler.answer(503, b'', {'Retry-After': '3600'}) or busy.set() or True)
        process = self.spawn('push', 'X')
        self.assertTrue(busy.wait(60))
        process.terminate()
        err = process.communicate(timeout=60)[1]
        self.assertEqual((process.returncode, err), (143, b'etc: interrupted\n'))

    def test_object_lock(self):
        """Such buckets want a checksum of every body: MD5, or SHA-256 where there is no MD5."""
        self.etc('register', small(self.tmp / 'small'), 'X')
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB)}), 'Y')
        algorithm, sha256 = 'x-amz-checksum-algorithm', 'x-amz-checksum-sha256'
        unsupported = 400, 'InvalidArgument', "Unsupported header '%s' received for this API call."

        def fault(handler):  # of stores that know no such headers, in their own words
            for name in refused:
                if handler.headers[name]:
                    handler.error(status, code, message=message % name)
                    return True
        self.server.fault = fault
        stand_in(self, hashlib, 'md5', md5)
        for what, hashlib.md5, self.server.must_check, refused, (status, code, message), sent in (
                ('no lock', md5, False, (), unsupported, {}), ('MD5', md5, True, (), unsupported, {'Content-MD5'}),
                ('SHA-256', no_md5, True, (), unsupported, {sha256}),
                ('Cloudflare', no_md5, False, (algorithm,), (
                    501, 'NotImplemented', "Header '%s' with value 'SHA256' not implemented"), {}),
                ('Backblaze', no_md5, False, (algorithm, sha256), unsupported, {})):
            with self.subTest(what):
                self.server.objects.clear()
                self.etc('push', 'X', 'Y')
                headers = [headers for method, _, headers in self.server.log if method == 'PUT'][-1]
                self.assertEqual({sha256, 'Content-MD5'}.intersection(headers), set(sent))
                assert_pulls(self, 'ds', 'Y', home=what)
        self.server.must_check = True
        self.assertIn('Content-MD5', self.etc('push', '-f', 'X', status=1)[1])  # Backblaze's, and no MD5 here

    def test_lists_that_are_not_understood(self):
        page = b'<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>%s</NextContinuationToken>' \
               b'</ListBucketResult>'
        tokens = itertools.cycle((b'a', b'b', b'c'))
        for what, body, problem in (
                ('tokens that go round', lambda: page % next(tokens), 'leads nowhere'),
                ('no such encoding', lambda: b'<?xml version="1.0" encoding="foo"?><ListBucketResult/>', 'as S3 does'),
                ('no text encoding', lambda: b'<?xml version="1.0" encoding="hex"?><ListBucketResult/>', 'as S3 does'),
                ('deep', lambda: b'<ListBucketResult>' + b'<a>' * 100000, 'as S3 does'),
                ('nothing', lambda: b'', 'as S3 does'), ('a page', lambda: PORTAL, 'as S3 does')):
            with self.subTest(what):
                self.server.log.clear()
                self.server.fault = lambda handler: handler.answer(200, body()) or True
                self.assertIn(problem, self.etc('ls', '-r', status=1)[1])
                self.assertLess(len(self.server.log), 5)

    def test_one_bad_archive_does_not_hide_the_others(self):
        self.share(small(self.tmp / 'ds'))
        self.put('Bad.tgz', b'x' * 100)
        self.server.fault = lambda h: 'Bad.tgz' in h.path and (h.error(403, 'AccessDenied') or True)
        out, err = self.etc('ls', '-r', '-l')
        self.assertIn('sha256:', out)
        self.assertIn('AccessDenied', err)

    def test_partial_pull_reads_little(self):
        self.share(write(self.tmp / 'ds', {'data/train/large': noise(20 * MIB), 'data/test/x': noise(100000)}))
        for words, most in ((['pull', '-p', 'test', 'X'], 110000), (['info', '-r', 'X'], 0), (['pull', 'X'], 20 * MIB)):
            with self.subTest(words):
                self.server.sent = 0
                self.etc(*words, home='two')  # what is there is not fetched again
                self.assertLess(self.server.sent, most + 2 * 65536)

    def test_connections_are_kept(self):
        self.share(write(self.tmp / 'ds', {'data/train/large': noise(40 * MIB)}))
        self.settings['connections'] = 8
        for words, most in ((['pull', 'X'], 8), (['ls', '-r', '-l'], 1)):
            with self.subTest(words):
                self.server.connections.clear()
                self.server.log.clear()
                self.etc(*words, home='two')
                self.assertLessEqual(len(self.server.connections), most)
                self.assertGreater(len(self.server.log), most)

    def test_number_of_parts(self):
        """S3 takes 10,000 of 5 MiB to 5 GiB."""
        stand_in(self, etc, '_MAX_PARTS', 4)
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(30 * MIB)}))
        self.assertLessEqual(len(self.parts()), 4)
        self.etc('pull', 'X', home='two')

    def test_parts_are_sent_while_packing_goes_on(self):
        write(self.tmp / 'ds', {'data/train/%d' % n: noise(4 * MIB, n) for n in range(12)})
        self.etc('register', write(self.tmp / 'ds', {'data/train/last': 'x'}), 'X')
        sent = []

        def wait():
            deadline = time.time() + 20
            while not self.parts() and time.time() < deadline:
                time.sleep(0.01)
            sent.append(len(self.parts()))
        self.at_first_read('/last', wait)
        self.etc('push', 'X')
        self.assertGreater(sent[0], 0)

    def test_stores_without_conditions(self):
        self.server.conditions = False
        for answer in ((501, 'NotImplemented'), (400, 'InvalidArgument'), (501, ''), ()):
            with self.subTest(answer):
                self.server.fault = lambda handler: bool(handler.headers.get('If-None-Match') and answer) and (
                    handler.error(*answer) or True)
                for name, size in (('X', 1000), ('Y', 9 * MIB)):
                    self.etc('register', '-f', write(self.tmp / name, {'data/train/x': noise(size)}), name)
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
        odd_one = 'the environment: aws_secret_access_key holds characters that it cannot have;'
        nothing = "no credentials were found in the settings, the environment, the AWS profile 'default', or those " \
                  'of a container or this machine; set aws_access_key_id and aws_secret_access_key, or run '
        for what, settings, akid, secret, problem in (
                ('none', {}, '', '', nothing), ('half', {}, AKID, '', 'set both'),
                ('line ends', {}, AKID + '\n', SECRET + '\r\n', ''), ('a line end inside', {}, AKID, 'hu\nsh', odd_one),
                ('no such profile', {'aws_profile': 'nope'}, '', '',
                 'the AWS profile that aws_profile or $AWS_PROFILE names is not in'),
                ('wrong', dict(right, aws_secret_access_key='wrong' + SECRET[5:]), '', '', 'SignatureDoesNotMatch'),
                ('a token', dict(right, aws_session_token='a/token+=='), '', '', '')):
            with self.subTest(what):
                self.settings = dict(settings, endpoint_url=self.server.url)
                os.environ.update(AWS_ACCESS_KEY_ID=akid, AWS_SECRET_ACCESS_KEY=secret)
                err = self.etc('ls', '-r', status=int(bool(problem)))[1]
                self.assertIn(problem, err)
                for part in (SECRET[5:], 'sh\n'):
                    self.assertNotIn(part, err)
        self.assertEqual(self.server.log[-1][2]['x-amz-security-token'], 'a/token+==')

    def test_unreachable(self):
        self.server.stop()
        skip_pauses(self)
        self.assertIn('cannot reach http://127.0.0.1', self.etc('ls', '-r', status=1)[1])
        for bad in ('h:1', 'ftp://h', 'http://user:pw@h', 'http://h/?q'):
            with self.subTest(bad):
                self.settings['endpoint_url'] = bad
                self.assertIn('the endpoint_url must look like https://host[:port];', self.etc('ls', '-r', status=1)[1])


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
        self.etc('register', small(self.tmp / 'ds'), 'X')

    def behind_proxy(self):
        """Let the server stand for any host."""
        self.server.RequestHandlerClass = AnyHost
        os.environ.update(http_proxy=self.server.url, https_proxy=self.server.url, no_proxy='')

    def as_amazon(self):
        """Let the server be Amazon's, though not over TLS."""
        self.behind_proxy()
        del self.settings['endpoint_url']
        stand_in(self, etc._AwsProfile, 'host',
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
        self.etc('push', 'X')
        self.anonymous()
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.etc('pull', 'X', home='two')

    def test_access_points(self):
        url = 's3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine'
        self.assertIn('-s3alias', self.etc('ls', '-r', url=url, status=1)[1])

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
                self.etc('ls', '-r', url=url, status=1)
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
                for words in (['push', '-f', 'X'], ['pull', '-f', 'X'], ['ls', '-r']):
                    out, err = self.etc(*words, status=int(bucket == 'My_Bucket'))
                    self.assertIn('404 NoSuchBucket' if bucket == 'My_Bucket' else 'X', out + err)
                self.assertEqual(set(self.hosts()), {host})

    def test_region_of_the_signature(self):
        def fault(handler):
            if '/eu-9/s3/' not in handler.headers['Authorization']:
                refused.append(handler)
                handler.answer(400, b'<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong'
                                    b'</Message><Region>%s</Region></Error>' % region)
                return True
        self.server.fault, region = fault, b'eu-9'
        for words in (['push', 'X'], ['push', '-f', 'X'], ['pull', '-f', 'X']):  # asked once, then remembered
            with self.subTest(words):
                refused = []
                self.etc(*words)
                self.assertEqual(len(refused), 1)
        region = b'a/b'
        self.assertIn('AuthorizationHeaderMalformed', self.etc('ls', '-r', status=1)[1])

    def test_regions_of_amazon(self):
        self.as_amazon()
        here, there = ('bucket.s3.%s.amazonaws.example' % region for region in ('us-east-1', 'eu-west-1'))
        self.server.fault = lambda handler: here in handler.path and (handler.answer(
            status, b'<Error><Code>PermanentRedirect</Code></Error>', {'x-amz-bucket-region': region}) or True)
        for anonymous in (False, True):
            if anonymous:
                self.anonymous()
            for status, region in ((301, 'eu-west-1'), (307, 'eu-west-1'), (400, 'eu-west-1'), (403, 'eu-west-1')):
                with self.subTest(anonymous=anonymous, status=status):
                    self.assertEqual(self.etc('ls', '-r')[0], '')
                    self.assertEqual(self.hosts(), [here, there])
        status, region = 301, 'evil.example/'
        self.assertIn('PermanentRedirect', self.etc('ls', '-r', status=1)[1])
        self.assertEqual(set(self.hosts()), {here})

    def test_amazon_knows_conditions(self):
        self.as_amazon()
        self.etc('push', 'X')
        self.server.fault = lambda handler: 'If-Match' in handler.headers and handler.command == 'DELETE' and (
            handler.error(501, 'NotImplemented') or True)
        self.assertIn('answers 501 NotImplemented', self.etc('purge', '-r', '-f', 'X', status=1)[1])
        self.assertEqual(len(self.server.objects), 1)

    def test_keys_that_may_not_list(self):
        """Without s3:ListBucket what is missing is forbidden; on Amazon's hosts the condition of the write decides."""
        self.server.may_list = False
        self.assertIn('s3:ListBucket', self.etc('push', 'X', status=1)[1])  # this store may ignore conditions
        self.as_amazon()
        self.etc('push', 'X')
        self.assertIn('already, and identical', self.etc('push', 'X')[1])
        before = dict(self.server.objects)

        def fault(handler):
            if handler.command in ('GET', 'HEAD'):
                handler.error(403, 'AccessDenied')
                return True
            return bool(handler.headers['If-None-Match'] and answer) and (handler.error(*answer) or True)
        self.server.fault = fault
        for answer, problem in (((), 'cannot read it to compare'),
                                ((501, 'NotImplemented'), 'NotImplemented')):  # nobody would tell if there is another
            with self.subTest(problem):
                self.assertIn(problem, self.etc('push', 'X', status=1)[1])
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
                return True
        self.server.fault = fault
        stand_in(self, Handler, 'date_time_string', lambda h, stamp=None: email.utils.formatdate(now(), usegmt=True))
        stand_in(self, time, 'time', now)
        for skew in (-3 * 3600, 40 * 86400):
            with self.subTest(skew=skew):
                refused = []
                time.time = lambda: now() + skew
                self.assertIn('clock is %d minutes off' % (abs(skew) // 60), self.etc('push', 'X', '-f')[1])
                self.assertEqual(len(refused), 1)
                self.etc('pull', 'X', '-f', home='two')
        Handler.date_time_string = lambda handler, timestamp=None: 'no date'
        self.assertIn("set this machine's clock", self.etc('ls', '-r', status=1)[1])

    def test_headers_that_are_asked_for(self):
        self.etc('register', write(self.tmp / 'big', {'data/train/x': noise(9 * MIB)}), 'Big')
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
                self.etc('push', '-f', 'X', 'Big')
                self.etc('pull', '-f', 'X', home='two')
                self.etc('ls', '-r')
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
        for bad in ('a b', 'caf\u00e9'):
            with self.subTest(bad):
                self.settings['sse'] = bad
                self.assertIn('the header x-amz-server-side-encryption a value that cannot',
                              self.etc('ls', '-r', status=1)[1])

    def test_who_is_to_blame(self):
        self.etc('push', 'X')
        read, style = ('GET', 'HEAD'), 'addressing_style = virtual'
        for words, methods, status, code, remedy in [
                (['pull', '-f', 'X'], read, 403, 'AccessDenied', 'need s3:GetObject, and s3:ListBucket'),
                (['push', '-f', 'X'], ['PUT'], 403, 'AccessDenied', 'need s3:PutObject'),
                (['push', '-f', 'X'], ['PUT'], 400, 'AccessControlListNotSupported',
                 "drop 'public: true', and let a bucket policy make the objects public")] + [
                (['ls', '-r'], read, status, code, remedy) for status, code, remedy in (
                    (403, 'AccessDenied', 'come from the settings, need s3:ListBucket here'),
                    (404, 'NoSuchBucket', 'check the bucket'), (301, 'PermanentRedirect', "set 'region'"),
                    (400, 'InvalidToken', 'renew'), (404, '', 'check the url'), (400, '', 'the region'),
                    (403, 'InvalidAccessKeyId', 'it comes from the settings'),
                    (403, 'SecondLevelDomainForbidden', style),  # Alibaba
                    (403, 'PathStyleDomainForbidden', style),  # Tencent
                    (400, 'VirtualHostDomainRequired', style))]:  # Huawei
            with self.subTest(words, code=code, status=status):
                body = b'<Error><Code>%s</Code><Message>why</Message></Error>' % code.encode() if code else b''
                self.server.fault = lambda handler: handler.command in methods and (
                    handler.answer(status, body) or True)
                err = self.etc(*words, status=1)[1]
                self.assertIn(remedy, err)
                self.assertIn('answers %d%s;' % (status, ' %s: why' % code if code else ': no explanation'), err)
        self.server.fault = None
        for command in ('pull', 'push'):
            self.assertIn('NoSuchBucket', self.etc(command, 'X', url='s3://missing', status=1)[1])


class GsHandler(Handler):
    """Google Cloud Storage's JSON API, as https://cloud.google.com/storage/docs/json_api/v1 describes it."""

    def problem(self, status, message):
        self.json({'error': {'code': status, 'message': message}}, status)

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
        if server.fault and server.fault(self):
            return
        if server.token and self.headers.get('Authorization') != 'Bearer ' + server.token:
            return self.problem(403 if 'Authorization' not in self.headers else 401, 'who are you?')
        with server.lock:
            if path == '/session':
                return self.session(body)
            if path == '/upload/storage/v1/b/bucket/o' and self.command == 'POST':
                return self.start()
            parts = path.split('/')
            if parts[:6] != ['', 'storage', 'v1', 'b', 'bucket', 'o']:
                return self.problem(404, 'The specified bucket does not exist.')
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
            return self.problem(404, 'No such object')
        if self.server.conditions and self.query.get('ifGenerationMatch', found[1]) != found[1]:
            return self.problem(412, 'conditionNotMet')
        if self.command == 'DELETE':
            if self.server.versioned:
                self.server.old[name, found[1]] = found
            del self.server.objects[name]
            return self.answer(204)
        if self.query.get('alt') != 'media':
            return self.json(self.resource(name, found))
        start, stop = asked_range(self.headers, len(found[0]))
        if start >= stop:
            return self.problem(416, 'requestedRangeNotSatisfiable')
        self.answer(206, found[0][start:stop], {
            'Content-Range': 'bytes %d-%d/%d' % (start, stop - 1, len(found[0])),
            'Last-Modified': 'Mon, 06 May 2024 07:08:09 GMT', 'x-goog-generation': found[1]})

    def start(self):
        assert self.query['uploadType'] == 'resumable'
        if self.query.get('ifGenerationMatch') == '0' and self.query['name'] in self.server.objects:
            return self.problem(412, 'conditionNotMet')
        if self.query.get('predefinedAcl') and self.server.uniform:
            return self.problem(400, 'Cannot insert legacy ACL for an object when uniform bucket-level access is '
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
                return self.problem(400, 'wrong chunk')
            self.receive(int(start), body)
        query, data = server.uploads[upload]
        name = query['name']
        if total == '*' or int(total) != len(data):
            return self.answer(308, b'', {'Range': 'bytes=0-%d' % (len(data) - 1)} if data else {})
        if query.get('ifGenerationMatch') == '0' and name in server.objects:
            return self.problem(412, 'conditionNotMet')
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
        self.server = Server(GsHandler)
        self.addCleanup(self.server.stop)
        self.server.cuts, self.server.granule, self.server.token, self.server.finished = [], 1, None, {}
        self.server.generation, self.server.uniform, self.server.garble = 1700000000000000, False, False
        self.url = 'gs://bucket/some/prefix'
        self.settings = {'endpoint_url': self.server.url}
        os.environ['STORAGE_EMULATOR_HOST'] = self.server.url  # for spawned processes

    def put(self, name, data):
        self.server.generation += 1
        self.server.objects['some/prefix/' + name] = data, str(self.server.generation), {}


class GsRemote(BucketSuite, GsCase):
    def test_answers_that_are_not_understood(self):
        """A push is done if the store says so, or if what is there is right."""
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.etc('register', write(self.tmp / 'large', {'data/train/x': noise(17 * MIB)}), 'Y')
        start = b'{"name": "some/prefix/X.tgz"'
        for body in (b'{}', b'', PORTAL, b'[]', b'{"name": "some/prefix/Z.tgz", "generation": "5", "size": "7"}',
                     start + b', "size": "7"}', start + b', "generation": "5"}',
                     start + b', "generation": "5", "size": "7"}'):
            for method, stored in (('POST', False), ('PUT', True), ('PUT', False)):
                with self.subTest(body, method=method, stored=stored):
                    self.server.objects.clear()
                    self.server.final = (lambda handler: handler.answer(200, body)) if stored else None
                    self.server.fault = lambda handler: not stored and handler.command == method and (
                        handler.answer(200, body) or True)
                    err = self.etc('push', 'X', status=int(not stored))[1]
                    self.assertIn('pushed' if stored else 'does not answer as Google', err)
                    self.assertEqual(len(self.server.objects), int(stored))
        self.server.fault = lambda handler: '/*' in handler.headers.get('Content-Range', '') and (
            handler.answer(200, b'{}') or True)
        self.assertIn('does not answer as Google', self.etc('push', 'Y', status=1)[1])

    def test_lists_that_are_not_understood(self):
        """They must not pass for an empty bucket, either."""
        right = b'{"kind": "storage#objects", '
        item = b'"items": [{"name": "some/prefix/X.tgz", "size": %s, "generation": 1}]}'
        for body in (b'', b'[]', PORTAL, b'[' * 100000, b'{}', b'{"login": "https://portal.example"}',
                     b'{"kind": "login"}', right + b'"items": 5}', right + b'"items": [{}]}',
                     right + b'"items": [{"name": 5}]}',
                     right + item % b'"x"', right + item % b'1e999', right + b'"nextPageToken": 3}'):
            with self.subTest(body[:99]):
                self.server.fault = lambda handler: handler.answer(200, body) or True
                for words in (['ls', '-r'], ['pull', 'X']):
                    self.assertIn('does not answer as Google', self.etc(*words, status=1)[1])
        tokens = itertools.cycle('abc')
        self.server.fault = lambda handler: handler.json(
            {'kind': 'storage#objects', 'nextPageToken': next(tokens)}) or True
        self.assertIn('same page of its listing twice', self.etc('ls', '-r', status=1)[1])

    def test_accounts_that_may_only_create(self):
        """The condition of the write decides where storage.objects.get is missing."""
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.server.fault = lambda handler: handler.command == 'GET' and (
            handler.problem(403, 'no storage.objects.get access') or True)
        self.etc('push', 'X')
        self.assertIn('cannot read it to compare', self.etc('push', 'X', status=1)[1])

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
        self.settings['public'] = self.server.uniform = True
        self.assertIn('allUsers', self.etc('push', 'X', status=1)[1])
        self.server.uniform = False
        self.etc('push', 'X')
        self.assertEqual(self.server.objects['some/prefix/X.tgz'][2]['predefinedAcl'], 'publicRead')

    def test_cut_uploads_go_on_where_they_were(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(30 * MIB)}), 'X')
        skip_pauses(self)
        rng = random.Random(9)
        for trial in range(4):
            with self.subTest(trial=trial):
                self.server.cuts = [rng.randrange(9 * MIB) for _ in range(6)] + [0, 1, 8 * MIB]
                rng.shuffle(self.server.cuts)
                self.server.granule = (1, 256 << 10)[trial % 2]
                self.etc('push', '-f', 'X')  # the server asserts that no byte came twice
                self.assertEqual(self.server.cuts, [])
                assert_pulls(self, 'ds', force=True)

    def test_uploads_that_fail(self):
        """Nothing is left."""
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(17 * MIB)}), 'X')
        for what, place, answer, problem in (
                ('it takes nothing', 'bytes', lambda h: h.answer(308), 'takes no more'),  # to some servers a redirect
                ('it refuses a part', '16777216-', lambda h: h.problem(403, 'no'), 'answers 403: no;')):
            with self.subTest(what):
                self.server.fault = lambda h: place in (h.headers.get('Content-Range') or '') and (answer(h) or True)
                self.assertIn(problem, self.etc('push', 'X', status=1)[1])
                self.assertEqual((self.server.uploads, self.server.objects), ({}, {}))

    def test_md5(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.server.garble = True
        self.assertIn('did not arrive', self.etc('push', 'X', status=1)[1])
        self.assertEqual(self.server.objects, {})
        stand_in(self, hashlib, 'md5', no_md5)  # the server has its own
        self.etc('push', 'X')

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
            self.refused(lambda h: h.problem(403, message), '403: ' + message + remedy)

    def test_conditions(self):
        generation = self.server.objects['some/prefix/X.tgz'][1]
        self.assertIn("purged 'X'", self.purge())
        self.assertEqual([path.partition('?')[2] for method, path, _ in self.server.log if method == 'DELETE'],
                         ['ifGenerationMatch=' + generation])

    def test_accounts_that_may_not_read_old_versions(self):
        self.server.fault = lambda h: 'generation=' in h.path and h.command == 'GET' and (h.problem(403, 'no') or True)
        self.assertEqual(self.purge(), "etc: purged 'X' from %s\n" % self.url)


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
        self.tokens = Server(TokenHandler)
        self.addCleanup(self.tokens.stop)
        self.asked = []

        def init(remote, config):
            """Credentials are only for https; a test has none, so it lifts that rule, and nothing else."""
            original(remote, config)
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
        self.assertEqual(self.etc('ls', '-r')[0], '')


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
        self.assertEqual(self.server.log[-1][2]['x-goog-user-project'], 'billing')
        self.respond({'refresh_token': 'other'})
        err = self.etc('ls', '-r', status=1)[1]
        self.assertIn('gives no access token: wrong refresh_token', err)
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
        for token, problem in (('never right', 'permissions'), ('two\nlines', 'access_token is missing'),
                               (['list'], 'access_token is missing'), ('', 'access_token is missing')):
            with self.subTest(token):
                self.tokens.respond = lambda h, form: {'access_token': token, 'expires_in': 3600}
                self.assertIn(problem, self.etc('ls', '-r', status=1)[1])

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
        for bits, form in ((2048, ['pkey']), (3072, ['rsa', '-traditional'])):
            with self.subTest(bits=bits, form=form):
                openssl('genpkey', '-algorithm', 'RSA', '-pkeyopt', 'rsa_keygen_bits:%d' % bits, '-out', 'key.pem')
                openssl('pkey', '-in', 'key.pem', '-pubout', '-out', 'pub.pem')
                self.use(dict(info, private_key=openssl(*form, '-in', 'key.pem')))
                self.works()
        self.use(dict(info, private_key='garbage'))
        self.assertIn('private_key', self.etc('ls', '-r', status=1)[1])

    def library(self, load):
        """Let Google's library be installed, with this load_credentials_from_file(); or not, if that is None."""
        requests = type('requests', (), {'Request': object})
        transport = type('transport', (), {'requests': requests})
        auth = type('auth', (), {'load_credentials_from_file': load, 'transport': transport})
        for name, module in (('google', type('google', (), {'auth': auth})), ('google.auth', auth),
                             ('google.auth.transport', transport), ('google.auth.transport.requests', requests)):
            sys.modules[name] = module if load else None
            self.addCleanup(sys.modules.pop, name, None)

    @unittest.skipIf(os.name == 'nt', 'no scripts there')
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
                    ('gcloud that says nothing', None, 'true', 'gcloud'), ('neither', None, '', 'gcloud')):
                with self.subTest(kind, what=what):
                    remove(self.tmp / 'bin')
                    if script:
                        write(self.tmp / 'bin', {'gcloud': '#!/bin/sh\n' + script}).joinpath('gcloud').chmod(0o755)
                    self.library(load)
                    err = self.etc('ls', '-r', status=int(bool(problem)))[1]
                    self.assertIn(problem or '', err)

    def test_metadata_server(self):
        del os.environ['NO_GCE_CHECK']
        os.environ['GCE_METADATA_HOST'] = self.tokens.url[7:]
        self.tokens.respond = lambda handler, form: {'access_token': 'ya29.token', 'expires_in': 3600} if (
            handler.headers['Metadata-Flavor'] == 'Google') else 'no'
        self.works()
        self.tokens.respell = lambda name, value: None if name == 'Metadata-Flavor' else value
        self.assertIn('no credentials were found', self.etc('ls', '-r', status=1)[1])  # an impostor

    def test_places(self):
        """From the last one that is looked at to the first."""
        self.respond({'refresh_token': 'right'})
        right, wrong = (json.dumps(self.user(refresh_token=token)) for token in ('right', 'wrong'))
        self.assertIn('no credentials were found', self.etc('ls', '-r', status=1)[1])
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
        self.assertIn('cannot read the Google credentials: No such file or directory; check google_credentials and '
                      '$GOOGLE_APPLICATION_CREDENTIALS', self.etc('ls', '-r', status=1)[1])
        self.settings['google_credentials'] = str(sdk / 'right.json')
        self.works()

    def test_what_cannot_be_used(self):
        self.library(None)
        os.environ['PATH'] = ''
        for info, problem in (
                ([], 'holds no Google credentials;'), ({}, 'holds no Google credentials;'),
                ('x', 'holds no Google credentials;'),
                ({'type': 'authorized_user'}, "cannot be used: 'client_id' is missing or wrong"),
                ({'type': 'service_account'}, "cannot be used: 'client_email' is missing or wrong"),
                ({'type': 'service_account', 'client_email': 5, 'private_key': 5},
                 'cannot be used: a value has the wrong type or form'),
                ({'type': '\x1b[31m'}, 'type')):
            with self.subTest(info):
                self.use(info)
                err = self.etc('ls', '-r', status=1)[1]
                self.assertIn(problem, err)
                self.assertIn('key.json', err)
                self.assertNotIn('\x1b', err)

    def test_nothing_is_sent_elsewhere(self):
        self.use(self.user())
        self.respond({})
        other = Server(GsHandler)
        self.addCleanup(other.stop)
        other.cuts, other.token, other.finished = [], None, {}
        self.server.fault = lambda h: h.command == 'POST' and (
            h.answer(200, b'', {'Location': other.url + '/session?upload_id=1'}) or True)
        self.etc('register', small(self.tmp / 'ds'), 'X')
        self.assertIn('answers 404', self.etc('push', 'X', status=1)[1])
        self.assertEqual({headers.get('Authorization') for _, _, headers in other.log}, {None})


class WebHandler(Handler, http.server.SimpleHTTPRequestHandler):
    """`python3 -m http.server`, which gives no ranges; or as a server that does."""
    protocol_version = 'HTTP/1.0'

    def handle_one(self):
        self.server.log.append((self.command, self.path, self.headers))
        if self.server.fault and self.server.fault(self):
            return
        path = Path(self.translate_path(self.path))
        if not self.server.ranges or not path.is_file():
            simple = http.server.SimpleHTTPRequestHandler
            return (simple.do_GET if self.command == 'GET' else simple.do_HEAD)(self)
        data = path.read_bytes()
        headers = {'ETag': '"%s"' % hashlib.sha1(data).hexdigest()}
        if self.server.conditions and self.headers.get('If-Match', headers['ETag']) != headers['ETag']:
            return self.answer(412)
        if 'Range' not in self.headers:
            return self.answer(200, data, headers)
        start, stop = asked_range(self.headers, len(data))
        headers['Content-Range'] = 'bytes %d-%d/%d' % (start, stop - 1, len(data))
        self.answer(206, data[start:stop], headers)

    def translate_path(self, path):
        return os.path.join(self.server.root, os.path.relpath(super().translate_path(path), os.getcwd()))


class WebSuite:
    """What was pushed into a directory is read by its web address. Subclasses start(), and set `url`."""
    path = '/data sets/\u00e9'

    def setUp(self):
        super().setUp()
        self.share = self.tmp / ('www' + self.path)
        self.share.mkdir(parents=True)
        self.start()
        self.etc('register', write(small(self.tmp / 'ds'), {'data/train/large': noise(9 * MIB)}), 'X')
        self.etc('push', 'X', url=self.share.as_uri())

    def test_round_trip(self):
        self.etc('register', odd(self.tmp / 'odd'), 'Odd')
        self.etc('push', 'Odd', url=self.share.as_uri())
        write(self.share, {'other.txt': 'x', 'not a dataset.tgz': 'x', 'sub/Inner.tgz': 'x'})
        with tarfile.open(str(self.share / 'foreign.tgz'), 'w:gz', compresslevel=1) as tar:
            tar.add(str(self.tmp / 'ds'), '.')
        self.assertEqual(self.etc('ls', '-r')[0], 'Odd\nX\nforeign\n')
        self.assertIn(etc.Dataset(self.tmp / 'odd').digest, self.etc('ls', '-r', '-l')[0])
        for name, root in (('X', 'ds'), ('Odd', 'odd'), ('foreign', 'ds')):
            with self.subTest(name):
                assert_pulls(self, root, name)
        self.etc('pull', '-p', 'test', 'X', home='three')
        self.assertEqual(etc.dataset('X', partitions=['test'], config=self.config('three')).keys(), {'test'})
        assert_pulls(self, 'ds', home='three')
        self.assertIn("did you mean 'Odd'", self.etc('pull', 'Odds', status=1)[1])

    def test_read_only(self):
        write(self.tmp / 'ds', {'data/train/new': ''})
        self.etc('register', self.tmp / 'ds', 'Y')
        before = tree(self.share)
        only = 'can only be read; to push or purge, set a url that begins with s3://, gs:// or file://\n'
        for words, problem in ((['push', '-f', 'X'], only), (['push', 'Y'], only), (['push', 'X'], "another 'X' is in"),
                               (['purge', '-r', '-f', 'X'], only), (['purge', '-r', '-f', 'Nope'], only)):
            with self.subTest(words):
                self.assertRegex(self.etc(*words, status=1)[1], r'\Aetc: [^\n]*%s[^\n]*\n?\Z' % problem)
        self.assertEqual(tree(self.share), before)


class Web(WebSuite, Case):
    def start(self):
        self.server = self.serve_files()
        self.url = self.server.url + self.path

    def serve_files(self):
        server = Server(WebHandler)
        self.addCleanup(server.stop)
        server.root, server.ranges = str(self.tmp / 'www'), True
        return server

    def test_partial_pull_reads_little(self):
        self.server.sent = 0
        self.etc('pull', '-p', 'test', 'X', home='two')
        self.etc('info', '-r', 'X')
        self.assertLess(self.server.sent, MIB)

    def test_replaced_while_read(self):
        for self.server.conditions in (True, False):
            with self.subTest(conditions=self.server.conditions), found(self) as (read, _):
                self.assertEqual(len(read()), 45)
                path = self.share / 'X.tgz'
                path.write_bytes(path.read_bytes() + b'x')
                with self.assertRaisesRegex(etc.RemoteError, 'replaced'):
                    read()
                self.assertTrue(self.server.log[-1][2]['If-Match'])

    def test_without_ranges(self):
        self.server.ranges = False
        self.test_round_trip()
        del self.server.log[:]
        self.assertEqual(self.etc('ls', '-r')[0], 'Odd\nX\nforeign\n')
        self.assertEqual([path for method, path, _ in self.server.log if method == 'GET' and path.endswith('.tgz')], [])
        self.assertIn('supports no ranges', self.etc('pull', 'X', home='four')[1])
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
                handler.answer(200, b'x' * MIB, {'Last-Modified': modified}, path.stat().st_size)
                return True
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
                ('<a href=X.tgz><a name="Z.tgz"><a href="http://[x"><a href><![x[<a href="%s/Y.tgz">' % self.url, 'X'),
                ('<a href="X.tgz"><a href="Y%2etgz"><a href="/Y.tgz"><a href="http://else.example/Y.tgz">'
                 '<a href="sub/Y.tgz"><a href="-Y.tgz"><a href="X.tgz?x"><a href="X.tgz">', 'XY'),
                ('<a href="X.tgz"><a href="&#%s;">' % ('1' * 5000), 'X'), ('<p>Welcome!', '')):
            with self.subTest(page[:99]):
                self.server.fault = lambda h: h.path.endswith('/') and (h.answer(200, page.encode()) or True)
                self.assertEqual(''.join(self.etc('ls', '-r')[0].split()), names)
        for status in (403, 404):
            with self.subTest(status):
                self.server.fault = lambda h: h.path.endswith('/') and (h.answer(status) or True)
                self.assertIn('shows no list of what it has (%d); pull works by name' % status,
                              self.etc('ls', '-r', status=1)[1])
                assert_pulls(self, 'ds', force=True)

    def test_redirects(self):
        other = self.serve_files()
        self.server.fault = lambda h: h.answer(302, headers={'Location': other.url + h.path}) or True
        assert_pulls(self, 'ds', force=True)
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        for location in (self.url, 'file:///etc/passwd', 'http://[', 'http://[1/x', '//[x]/', 'http://[::::]/'):
            with self.subTest(location):
                self.server.fault = lambda h: h.answer(302, headers={'Location': location}) or True
                for words in (['ls', '-r'], ['pull', 'X']):
                    self.assertRegex(self.etc(*words, home='three', status=1)[1],
                                     'answers 302;|does not have the form https://host')  # as Python reads it

    def test_head_that_tells_nothing(self):
        """Where GET with a range works."""
        def refuse(handler):
            return handler.command == 'HEAD' and (handler.answer(status) or True)

        def redirect(handler):
            if handler.path.endswith('.tgz'):
                handler.answer(307, headers={'Location': handler.path + '?signed-for=GET'})
                return True
            return 'signed-for=GET' in handler.path and refuse(handler)

        def tell_no_length(handler):
            if handler.command == 'HEAD' and 'Z' not in handler.path:
                handler.send_response(200)
                handler.end_headers()
                return True
        for status, fault in ((403, refuse), (405, refuse), (400, refuse), (501, refuse), (403, redirect),
                              (200, tell_no_length)):
            with self.subTest(status=status, fault=fault.__name__):
                self.server.fault = fault
                assert_pulls(self, 'ds', force=True)
                self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
                self.assertIn("no dataset 'Z'", self.etc('pull', 'Z', status=1)[1])
        for status, body, span, problem in (
                (403, b'', None, 'answers 403'), (206, b'x', 'bytes 0-0/*', "does not say how large 'X' is"),
                (416, b'out of range', 'bytes */0', 'the archive is damaged or not a .tgz: it ends too early')):
            with self.subTest(problem):
                self.server.fault = lambda handler: handler.path.endswith('.tgz') and (
                    handler.answer(405) if handler.command == 'HEAD' else
                    handler.answer(status, body, {'Content-Range': span})) is None
                self.assertIn(problem, self.etc('pull', 'X', home='three', status=1)[1])

    def test_compressed_against_the_request(self):
        """A page is understood; an archive would have other bytes, perhaps under the same version."""
        def fault(handler):
            path = Path(handler.translate_path(handler.path))
            if handler.command == 'GET' and handler.path.endswith(suffix):
                body = gzip.compress(path.read_bytes() if path.is_file() else b'<a href="X.tgz">X</a>', 1)
                modified = handler.date_time_string(path.stat().st_mtime)
                handler.answer(200, body, {'Content-Encoding': 'gzip', 'Last-Modified': modified})
                return True
        self.server.fault, suffix = fault, '/'
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        assert_pulls(self, 'ds')
        suffix = '.tgz'
        for self.server.ranges in (True, False):
            with self.subTest(ranges=self.server.ranges):
                self.assertIn("compresses 'X' although it is asked not to; ask who runs it",
                              self.etc('pull', 'X', home='three', status=1)[1])


class Rfc9110(S3Case):
    """Answers that are rare, but right by RFC 9110."""

    def setUp(self):
        super().setUp()
        root = write(self.tmp / 'ds', {'data/train/x': noise(9 * MIB), 'data/test/y': 'y', 'README.md': '# Hi'})
        self.etc('register', root, 'X')

    def round_trip(self):
        self.etc('push', '-f', 'X')
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.assertIn('# Hi', self.etc('info', '-r', 'X')[0])
        assert_pulls(self, 'ds', force=True)

    def test_interim_answers(self):
        hints = b'HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nContent-Length: 5\r\n\r\n'
        again = b'HTTP/1.1 100 Continue\r\n\r\n'
        for what, interim in (('100', again), ('102', b'HTTP/1.1 102 Processing\r\n\r\n'), ('103', hints),
                              ('several', hints + again + hints * 3)):
            with self.subTest(what):
                self.server.fault = lambda handler: handler.wfile.write(interim) and None
                self.server.connections.clear()
                self.etc('push', '-f', 'X')
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
        self.assertIn('interim answers', self.etc('ls', '-r', status=1)[1])

    def test_spelling_of_ranges(self):
        self.etc('push', 'X')
        for what, pattern, text, is_right in (
                ('size not told', '/.*', '/*', True), ('unit', 'b', 'B', True),
                ('both', 'bytes(.*)/.*', r'BYTES\1/*', True),
                ('another unit', 'bytes', 'lines', False), ('another start', 'bytes .', 'bytes 7', False),
                ('another size', '$', '0', False), ('no number', '.*/.*', 'bytes x-y/z', False),
                ('unsatisfied', ' .*/', ' */', False)):
            with self.subTest(what):
                self.server.respell = lambda key, value: (
                    re.sub(pattern, text, value, 1) if key == 'Content-Range' else value)
                if is_right:
                    self.round_trip()
                else:
                    self.assertIn('range that was asked for', self.etc('pull', 'X', home='three', status=1)[1])

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
                self.server.fault = lambda h: bool(pending) and (
                    h.answer(status, b'', {'Retry-After': pending.pop()}) or True)
                self.etc('ls', '-r')
                self.assertTrue(least <= sum(slept) <= most and max(slept) <= 1, slept)

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
                self.assertIn("no dataset 'Y'", self.etc('pull', 'Y', status=1)[1])
                self.assertIn('NoSuchBucket: about NoSuchBucket', self.etc('ls', '-r', url='s3://other', status=1)[1])


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
        self.assertEqual(self.etc('ls', '-r')[0], 'X\n')
        self.assertIn('CONNECT ' + self.origin, Path(self.log).read_text())
        self.assertIn('without encryption', self.etc('ls', '-r', url='https://%s/away' % self.origin, status=1)[1])
        skip_pauses(self)
        bundle = self.settings.pop('ca_bundle')
        self.assertRegex(self.etc('pull', 'X', home='two', status=1)[1],
                         "certificate that is not trusted.*; if a private CA signed it, set 'ca_bundle'")
        self.settings['ca_bundle'] = bundle
        with socket.socket() as closed:
            closed.bind(('127.0.0.1', 0))
            os.environ['HTTPS_PROXY'] = 'http://127.0.0.1:%d' % closed.getsockname()[1]
            self.assertIn('check the network, the proxy settings', self.etc('pull', 'X', home='two', status=1)[1])
        self.assertEqual(self.installed('two'), [])


class BucketPeer(Peer, RemoteSuite):
    """Subclasses put() and get() objects with another client."""

    def setUp(self):
        super().setUp()
        self.prefix = os.urandom(4).hex()

    def test_another_client_reads_what_we_push(self):
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(20 * MIB)}))
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
        self.assertIn('SignatureDoesNotMatch', self.etc('ls', '-r', status=1)[1])


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
        self.assertEqual(self.etc('purge', '-r', '-f', 'X')[1],
                         "etc: purged 'X' from s3://versions, which keeps it as an old version\n")
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


def patch(case, thing, name, value):
    """Put another value there until the test ends; returns the old one."""
    old = getattr(thing, name)
    case.addCleanup(setattr, thing, name, old)
    setattr(thing, name, value)
    return old


def signed_by(headers):
    """The access key that a request is signed with, or ''."""
    return headers.get('Authorization', '').partition('Credential=')[2].partition('/')[0]


class AwsHandler(SignedHandler):
    """STS, SSO's portal, a container's credentials service, and instance metadata of version 2.

    Every access key has the secret 'secret-of-KEY', and if it is temporary the token 'token/of+KEY'.
    """
    service = 'sts'

    def temporary(self, akid, token='SessionToken'):
        return temporary(akid + self.server.suffix, self.server.lifetime, token)

    def error(self, status, code):
        self.answer(status, b'<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>'
                            b'<Code>%s</Code><Message>about %s</Message></Error></ErrorResponse>' % ((code.encode(),) * 2))

    def handle_one(self):
        body = self.read_body()
        path = self.path.partition('?')[0]
        self.server.log.append((self.command, path, self.headers))
        if self.server.fault and self.server.fault(self):
            return
        if path == '/':
            return self.sts(body, dict(urllib.parse.parse_qsl(body.decode())))
        if path == '/federation/credentials':
            if self.headers['x-amz-sso_bearer_token'] != 'sso-token':
                return self.json({'message': 'Session token not found or invalid'}, 401)
            keys = {key[0].lower() + key[1:]: value for key, value in self.temporary('SSO').items()}
            return self.json({'roleCredentials': dict(keys, expiration=4e12)})
        if path == '/container':
            if self.headers.get('Authorization') != self.server.authorization:
                return self.json({'message': 'wrong authorization'}, 401)
            return self.json(self.temporary('CONTAINER', 'Token'))
        if path == '/latest/api/token' and self.command == 'PUT':
            is_asked = self.headers['x-aws-ec2-metadata-token-ttl-seconds']
            return self.answer(200 if is_asked else 400, b'imds-token')
        if path.startswith('/latest/meta-data/iam/security-credentials/'):
            if self.headers['X-aws-ec2-metadata-token'] != 'imds-token':
                return self.answer(401)
            role = path.rpartition('/')[2]
            if not role:
                return self.answer(200, b'my-role')
            return self.json(dict(self.temporary('INSTANCE-' + role, 'Token'), Code='Success'))
        self.answer(404)

    def sts(self, body, form):
        action, role = form['Action'], form['RoleArn'].rpartition('/')[2]
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
    return {'AccessKeyId': akid, 'SecretAccessKey': 'secret-of-' + akid, token: 'token/of+' + akid, 'Expiration': expires}


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


class AwsCase(S3Case):
    def setUp(self):
        super().setUp()
        self.aws = Server(AwsHandler)
        self.addCleanup(self.aws.stop)
        self.settings = {'endpoint_url': self.server.url}
        self.server.secrets = self.aws.secrets = AnySecret()
        self.aws.lifetime, self.aws.authorization, self.aws.suffix = 3600, None, ''
        os.environ.update(AWS_ENDPOINT_URL=self.aws.url, AWS_EC2_METADATA_SERVICE_ENDPOINT=self.aws.url,
                          AWS_DEFAULT_REGION='us-east-1')
        del os.environ['AWS_EC2_METADATA_DISABLED']

    def profile(self, config, credentials=''):
        write(self.tmp / '.aws', {'config': config, 'credentials': credentials})

    def process(self, **keys):
        """A credential_process that gives these keys."""
        answer = write(self.tmp, {'answer': json.dumps(dict(keys, Version=1))}) / 'answer'
        return '"%s" -S -c "print(open(%r).read())"\n' % (sys.executable, str(answer))

    def web_identity(self, token='web-token'):
        path = write(self.tmp, {'web-token': token}) / 'web-token'
        return {'AWS_WEB_IDENTITY_TOKEN_FILE': str(path), 'AWS_ROLE_ARN': 'arn:aws:iam::1:role/pod'}

    def expect(self, akid, config='', credentials='', profile=None, **env):
        """The files, the setting aws_profile and the environment lead to this access key."""
        saved = dict(os.environ)
        self.settings['aws_profile'] = profile
        self.profile(config, credentials)
        os.environ.update(env)
        try:
            with self.subTest(akid, config=config, credentials=credentials, profile=profile, env=env):
                self.assertEqual(self.found(), akid)
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def found(self):
        """The access key that a listing is signed with; its signature and token are right."""
        self.server.log.clear()
        self.assertEqual(self.etc('ls', '-r')[0], '')
        headers = self.server.log[-1][2]
        akid = signed_by(headers)
        if not akid.startswith('STATIC'):
            self.assertEqual(headers['x-amz-security-token'], 'token/of+' + akid)
        return akid

    def fails(self, *words):
        err = self.etc('ls', '-r', status=1)[1]
        for word in words:
            self.assertIn(word, err)
        for secret in ('secret', 'token/of', 'web-token'):
            self.assertNotIn(secret, err.replace('aws_secret_access_key', ''))

    def pages(self, *steps, status=0):
        """Who signs the requests of a listing, if these things happen on the server when it gets each but the last."""
        self.server.page = 1
        self.server.objects = {'some/prefix/%d.tgz' % number: (b'', '"e"', {}) for number in range(len(steps) + 1)}
        left = list(steps)
        self.server.fault = lambda handler: left and left.pop(0)()
        self.server.log.clear()
        self.etc('ls', '-r', status=status)
        return [signed_by(headers) for _, _, headers in self.server.log]

    def shift(self, seconds):
        """Let time pass."""
        now = patch(self, time, 'time', lambda: now() + seconds)

    def rotate(self, seconds):
        """Let time pass, after which the services give out other keys."""
        self.shift(seconds)
        self.aws.suffix += '2'


class AwsCredentials(AwsCase):
    """Where AWS's tools find credentials, and in which order."""

    BASE = '[base]\n' + static('STATIC-B')
    DEV = '[default]\nsource_profile = base\n' + ROLE + 'dev\n'

    def test_static(self):
        config = ('[default]\n' + static('STATIC-D') + '[profile work]\n' + static('STATIC-W') + '[profile "a b"]\n'
                  + static('STATIC-Q') + '[profile both]\nregion = eu-west-1\n' + static('STATIC-C'))
        credentials = '[both]\n' + static('STATIC-B') + 'credential_process = false\n'
        keys = {'AWS_ACCESS_KEY_ID': 'STATIC-E', 'AWS_SECRET_ACCESS_KEY': 'secret-of-STATIC-E'}
        temporary = {'AWS_ACCESS_KEY_ID': 'TEMP', 'AWS_SECRET_ACCESS_KEY': 'secret-of-TEMP',
                     'AWS_SESSION_TOKEN': 'token/of+TEMP'}
        for akid, profile, env in (
                ('STATIC-D', None, {}),
                ('STATIC-W', None, {'AWS_PROFILE': 'work'}),
                ('STATIC-W', None, {'AWS_DEFAULT_PROFILE': 'work'}),
                ('STATIC-Q', None, {'AWS_PROFILE': 'a b'}),
                ('STATIC-B', None, {'AWS_PROFILE': 'both'}),
                ('STATIC-W', 'work', {'AWS_PROFILE': 'both'}),
                ('STATIC-E', None, dict(keys, AWS_PROFILE='work')),
                ('STATIC-W', 'work', keys),
                ('TEMP', None, temporary)):
            self.expect(akid, config, credentials, profile, **env)
        write(self.tmp, {'else-config': config, 'else-credentials': credentials})
        self.expect('STATIC-B', AWS_PROFILE='both', AWS_CONFIG_FILE=str(self.tmp / 'else-config'),
                    AWS_SHARED_CREDENTIALS_FILE=str(self.tmp / 'else-credentials'))

    def test_roles(self):
        profiles = '[profile top]\n' + ROLE + 'top\nsource_profile = %s\n[profile mid]\n' + ROLE + 'mid\nsource_profile = base\n'
        picky = '[default]\nsource_profile = base\nexternal_id = x y&z\nduration_seconds = 900\nrole_session_name = me\n'
        own = '[profile self]\n' + ROLE + 'dev\nsource_profile = self\n' + static('STATIC-S')
        process = '[default]\n' + ROLE + 'dev\nsource_profile = p\n[profile p]\ncredential_process = '
        source = '[default]\n' + ROLE + 'dev\ncredential_source = '
        keys = {'AWS_ACCESS_KEY_ID': 'STATIC-E', 'AWS_SECRET_ACCESS_KEY': 'secret-of-STATIC-E'}
        self.expect('dev-by-STATIC-B', self.DEV, self.BASE)
        self.expect('dev-by-STATIC-B', self.DEV, self.BASE + '[default]\n' + static('STATIC'))
        self.expect('dev-by-STATIC-B', self.DEV, self.BASE, **self.web_identity())
        self.expect('top-by-mid-by-STATIC-B', profiles % 'mid', self.BASE, AWS_PROFILE='top')
        self.expect('top-by-STATIC-S', profiles % 'mid' + static('STATIC-S'), self.BASE, AWS_PROFILE='top')
        self.expect('dev-by-STATIC-S', own, AWS_PROFILE='self')
        self.expect('picky-by-STATIC-B', picky + ROLE + 'picky\n', self.BASE)
        self.expect('dev-by-PROCESS', process + self.process(**temporary('PROCESS')))
        self.expect('dev-by-' + INSTANCE, source + 'Ec2InstanceMetadata')
        self.expect('dev-by-CONTAINER', source + 'EcsContainer',
                    AWS_CONTAINER_CREDENTIALS_FULL_URI=self.aws.url + '/container')
        self.expect('dev-by-STATIC-E', source + 'Environment', profile='default', **keys)

    def test_web_identity(self):
        env = self.web_identity()
        profile = '[default]\nweb_identity_token_file = %s\n' % env['AWS_WEB_IDENTITY_TOKEN_FILE'] + ROLE + 'prof\n'
        self.expect('WEB-pod', **env)
        self.expect('WEB-prof', profile)
        self.expect('WEB-pod', profile, '[default]\n' + static('STATIC'), **env)
        self.expect('STATIC-W', '[profile work]\n' + static('STATIC-W'), profile='work', **env)

    def test_process(self):
        profile = '[default]\ncredential_process = ' + self.process(**temporary('PROCESS'))
        self.expect('PROCESS', profile)
        self.expect('PROCESS', profile + static('STATIC'))
        self.expect('STATIC', profile, '[default]\n' + static('STATIC'))

    def test_container(self):
        variable = 'AWS_CONTAINER_AUTHORIZATION_TOKEN'
        token = write(self.tmp, {'token': 'Basic secret'}) / 'token'
        os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI'] = self.aws.url + '/container'
        self.expect('CONTAINER')
        self.expect('STATIC', '', '[default]\n' + static('STATIC'))
        self.expect('CONTAINER', '[profile empty]\nregion = us-east-1\n', AWS_PROFILE='empty')
        self.aws.authorization = 'Basic secret'
        self.expect('CONTAINER', **{variable: 'Basic secret'})
        self.expect('CONTAINER', **{variable: 'wrong', variable + '_FILE': str(token)})

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

    def reached(self, bucket, region):
        """The host that a listing connects to first."""
        with self.assertRaises(Reached) as caught:
            etc.ls(True, etc.Config('s3://' + bucket, region=region))
        return caught.exception.args[0]

    def test_hosts(self):
        """Of every region and partition that botocore knows."""
        import ssl

        import botocore.endpoint_provider
        import botocore.exceptions
        import botocore.session

        def connect(address, *args, **kwargs):
            raise Reached(address[0])
        patch(self, socket, 'create_connection', connect)
        patch(self, ssl.SSLContext, 'load_default_certs', lambda context, *args: None)  # which takes long
        del os.environ['AWS_ENDPOINT_URL']
        session = botocore.session.Session()
        loader = session.get_component('data_loader')
        partitions = loader.load_data('partitions')
        regions = [region for partition in session.get_available_partitions()
                   for region in session.get_available_regions('s3', partition)]
        self.assertGreater(len(regions), 30)
        for service, bucket in (('s3', 'bucket'), ('s3', 'my.bucket'), ('s3', 'Upper_1'), ('sts', None)):
            rules = botocore.endpoint_provider.EndpointProvider(
                loader.load_service_model(service, 'endpoint-rule-set-1'), partitions)
            self.profile(self.DEV, self.BASE) if service == 'sts' else self.profile('[default]\n' + static('STATIC'))
            for region, fips, dual in itertools.product(regions, (False, True), (False, True)):
                if service == 'sts' and (dual or 'global' in region):
                    continue
                os.environ.update(AWS_USE_FIPS_ENDPOINT=str(fips).lower(), AWS_USE_DUALSTACK_ENDPOINT=str(dual).lower())
                with self.subTest(service, bucket=bucket, region=region, fips=fips, dual=dual):
                    place = {'Bucket': bucket} if bucket else {}
                    try:
                        theirs = rules.resolve_endpoint(Region=region, UseFIPS=fips, UseDualStack=dual, **place).url
                    except botocore.exceptions.EndpointProviderError:
                        continue
                    self.assertEqual(self.reached(bucket or 'bucket', region), urllib.parse.urlsplit(theirs).netloc)


class AwsLife(AwsCase):
    """How long credentials live, who may see them, and what is said when there are none."""

    def test_renewed_before_they_expire(self):
        signers = self.pages(lambda: self.rotate(3400), lambda: self.rotate(100), lambda: None)
        self.assertEqual(signers, [INSTANCE] * 2 + [INSTANCE + '22'] * 2)
        self.assertEqual(len(self.aws.log), 6)

    def test_threads_ask_once(self):
        self.share(small(self.tmp / 'ds'))
        data = self.server.objects['some/prefix/X.tgz']
        self.server.objects.update({'some/prefix/%d.tgz' % number: data for number in range(8)})
        self.server.fault = lambda handler: 'list-type' in handler.path and self.rotate(3500)
        self.server.log.clear()
        self.aws.log.clear()
        self.etc('ls', '-r', '-l')
        self.assertEqual([signed_by(headers) for _, _, headers in self.server.log], [INSTANCE] + [INSTANCE + '2'] * 9)
        self.assertEqual(len(self.aws.log), 6)

    def test_keys_that_are_given_out_shortly_before_they_expire(self):
        self.aws.lifetime = 60
        self.pages(lambda: None)
        self.assertEqual(len(self.aws.log), 3)

    def test_how_times_are_written(self):
        begin = time.time()
        for end, ahead in (('Z', 0), ('.123456Z', 0), ('+02:00', 7200), ('.5-0530', -19800), ('UTC', 0), ('', 0)):
            patch(self, time, 'time', lambda: begin)

            def give(akid, form='%Y-%m-%dT%H:%M:%S' + end, ahead=ahead):
                keys = temporary(akid, begin + 3600 - time.time(), form=form, offset=ahead)
                self.profile('[default]\ncredential_process = ' + self.process(**keys))
            with self.subTest(end):
                give('OLD')
                signers = self.pages(lambda: (self.shift(3400), give('NEW'))[0], lambda: self.shift(100))
                self.assertEqual(signers, ['OLD', 'OLD', 'NEW'])

    def test_renewed_once_when_refused(self):
        def fault(handler):
            if signed_by(handler.headers) == INSTANCE:
                self.aws.suffix = '2'
                return handler.error(400, 'ExpiredToken') or True
        self.server.fault = fault
        self.assertEqual(self.found(), INSTANCE + '2')
        self.assertEqual(len(self.aws.log), 6)
        self.server.fault = lambda handler: handler.error(400, 'ExpiredToken') or True
        self.server.log.clear()
        self.fails('ExpiredToken', "the instance's role 'my-role'")
        self.assertEqual(len(self.server.log), 1)

    def test_keys_that_are_changed_in_their_file(self):
        def fault(handler):
            self.profile('', '[default]\n' + static('STATIC-NEW'))
            return signed_by(handler.headers) == 'STATIC-OLD' and (handler.error(400, 'ExpiredToken'), True)[1]
        self.server.fault = fault
        self.expect('STATIC-NEW', '', '[default]\n' + static('STATIC-OLD'))

    def test_variables_in_the_paths_of_files(self):
        write(self.tmp / 'place', {'config': '[profile p]\nsource_profile = base\n' + ROLE + 'dev',
                                   'mine.ini': '[base]\n' + static('STATIC')})
        os.environ.update(PLACE=str(self.tmp / 'place'), NAME='mine', AWS_PROFILE='p')
        for config, credentials in (('$PLACE/config', '${PLACE}/$NAME.ini'),
                                    ('$HOME/place/config', '~/place/$NAME.ini')):
            self.expect('dev-by-STATIC', AWS_CONFIG_FILE=config, AWS_SHARED_CREDENTIALS_FILE=credentials)

    def test_byte_order_marks(self):
        bom = '\ufeff'
        process = self.process(**temporary('PROCESS'))
        (self.tmp / 'answer').write_text(bom + (self.tmp / 'answer').read_text(), encoding='utf-8')
        token = write(self.tmp, {'token': bom + 'right'}) / 'token'
        self.aws.authorization = 'right'
        self.expect('STATIC', '', bom + '[default]\n' + static('STATIC'))
        self.expect('PROCESS', bom + '[default]\ncredential_process = ' + process, PYTHONUTF8='1')
        self.expect('WEB-pod', **self.web_identity(bom + 'web-token\n'))
        self.expect('CONTAINER', AWS_CONTAINER_CREDENTIALS_FULL_URI=self.aws.url + '/container',
                    AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(token))

    def test_no_metadata(self):
        for what, path, answer in (
                ('404', 'token', lambda handler: handler.answer(404)),
                ('405', 'token', lambda handler: handler.answer(405)),
                ('403', 'token', lambda handler: handler.answer(403)),
                ('a page', 'token', lambda handler: handler.answer(200, b'<html>\n</html>')),
                ('silence', 'token', lambda handler: handler.rfile.read(1)),
                ('no keys', 'my-role', lambda handler: handler.json({'Code': 'Failed', 'Message': 'x'}))):
            with self.subTest(what):
                self.aws.log.clear()
                self.aws.fault = lambda handler: handler.path.endswith(path) and (answer(handler), True)[1]
                self.fails('no credentials were found')
                if path == 'token':
                    self.assertEqual([method for method, _, _ in self.aws.log], ['PUT'], 'never version 1')
        os.environ['AWS_EC2_METADATA_DISABLED'] = 'TRUE'
        self.aws.log.clear()
        self.fails('no credentials were found')
        self.assertEqual(self.aws.log, [])

    def test_metadata_is_not_asked_through_a_proxy(self):
        os.environ.update(http_proxy='http://127.0.0.1:1', no_proxy=self.server.url[7:])
        self.expect(INSTANCE)
        self.expect('CONTAINER', AWS_CONTAINER_CREDENTIALS_FULL_URI=self.aws.url + '/container')

    def test_containers_that_are_not_trusted(self):
        for url in ('http://example.com/x', 'http://169.254.170.3/', 'http://10.0.0.1/', 'ftp://localhost/', 'nonsense',
                    'http://[::2]/', 'http://[x', 'http://localhost.example.com', 'http://127.0.0.1@example.com/'):
            with self.subTest(url):
                os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI'] = url
                self.fails('must begin with https://, or with http:// and a loopback address')
        for path in ('@example.com/', '.example.com/'):
            with self.subTest(path):
                os.environ['AWS_CONTAINER_CREDENTIALS_RELATIVE_URI'] = path
                self.fails('RELATIVE_URI must be a path that begins with /')

    def test_containers_that_refuse(self):
        variable = 'AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE'
        os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI'] = self.aws.url + '/container'
        self.aws.authorization = 'right'
        self.fails("container's credentials service answers 401: wrong authorization")
        os.environ[variable] = str(self.tmp / 'nowhere')
        self.fails('cannot read the file with a token that $%s names: No such file' % variable)
        write(self.tmp, {'nowhere': 'secret\r\nX: y'})
        self.fails('$AWS_CONTAINER_AUTHORIZATION_TOKEN holds characters that it cannot have')
        write(self.tmp, {'nowhere': 'right'})
        self.aws.fault = lambda handler: handler.json({'AccessKeyId': 'x', 'SecretAccessKey': 'secret\n'}) or True
        self.fails("the container's credentials service returned no usable credentials")

    def test_roles_that_cannot_be(self):
        base = '\n[profile base]\n' + static('STATIC')
        needs = "the AWS profile '%s' needs, besides role_arn, either a source_profile that does not lead back"
        for what, rest, problem in (
                ('forbidden', 'source_profile = base\n' + base,
                 "the AWS profile 'default': AWS STS answers 403 AccessDenied: about AccessDenied"),
                ('no source', '', needs % 'default'),
                ('an unknown source', 'credential_source = Moon', needs % 'default'),
                ('itself', 'source_profile = default', needs % 'default'),
                ('a circle', 'source_profile = a\n[profile a]\nsource_profile = default\n' + ROLE + 'x', needs % 'a'),
                ('two sources', 'source_profile = base\ncredential_source = Environment' + base, needs % 'default'),
                ('a source that is not there', 'source_profile = nope',
                 "the AWS profile that the source_profile of 'default' names is not in"),
                ('an empty source', 'source_profile = a\n[profile a]\n', "'default' finds no credentials in a")):
            with self.subTest(what):
                self.profile('[default]\n' + ROLE + 'forbidden\n' + rest)
                self.fails(problem)

    def test_roles_by_a_wrong_clock(self):
        now = time.time

        def fault(handler):
            stamp = calendar.timegm(time.strptime(handler.headers['x-amz-date'], '%Y%m%dT%H%M%SZ'))
            return abs(stamp - now()) > 300 and (handler.error(403, 'SignatureDoesNotMatch'), True)[1]
        self.server.fault = self.aws.fault = fault
        patch(self, Handler, 'date_time_string', lambda handler, timestamp=None: email.utils.formatdate(now(), usegmt=True))
        self.shift(5 * 3600)
        self.expect('dev-by-STATIC-B', AwsCredentials.DEV, AwsCredentials.BASE)
        self.assertEqual((len(self.aws.log), len(self.server.log)), (2, 1))

    def test_web_identities_that_cannot_be(self):
        os.environ.update(self.web_identity('another'))
        self.fails('web identity: AWS STS answers 403 InvalidIdentityToken', 'role/pod')
        (self.tmp / 'web-token').unlink()
        self.fails('cannot read the file with a token that web_identity_token_file or $AWS_WEB_IDENTITY_TOKEN_FILE names')
        self.web_identity()
        del os.environ['AWS_ROLE_ARN']
        self.fails('web identity is configured without a role; set role_arn or $AWS_ROLE_ARN')

    def test_processes_that_fail(self):
        python = '"%s" -S -c ' % sys.executable
        for command, problem in (
                (python + "'import sys; sys.exit(chr(27) + str(12))'", 'fails (1): \\x1b12'),
                (python + "'print(5)'", 'returned no usable credentials'),
                (python + "'print(chr(123) + chr(125))'", 'returned no usable credentials'),
                (python + "'", 'cannot be run: No closing quotation'),
                ('/nowhere/at/all', 'cannot be run: No such file')):
            with self.subTest(command):
                self.profile('[default]\ncredential_process = ' + command)
                self.fails("the credential_process of the AWS profile 'default' " + problem)

    def test_regions_are_no_hosts(self):
        del self.settings['endpoint_url'], os.environ['AWS_ENDPOINT_URL']
        for os.environ['AWS_REGION'] in ('evil.example/', 'x@evil', 'a#b'):
            with self.subTest(os.environ['AWS_REGION']):
                self.fails("the region is not valid; check 'region', $AWS_REGION")

    def test_endpoints(self):
        other = Server(S3Handler)
        self.addCleanup(other.stop)
        other.secrets = AnySecret()
        del self.settings['endpoint_url']
        services = ('[default]\nservices = s\n[services s]\nsts =\n  endpoint_url = http://127.0.0.1:1\n'
                    's3 =\n  addressing_style = path\n  endpoint_url = ' + other.url)
        for what, config, variable, general in (
                ('variable of the service', '', other.url, self.aws.url),
                ('variable', '', '', other.url),
                ('services', services, '', ''),
                ('profile', '[default]\nendpoint_url = ' + other.url, '', '')):
            with self.subTest(what):
                self.profile(config, '[default]\n' + static('STATIC'))
                os.environ.update(AWS_ENDPOINT_URL_S3=variable, AWS_ENDPOINT_URL=general)
                other.log.clear()
                self.assertEqual(self.etc('ls', '-r')[0], '')
                self.assertEqual(len(other.log), 1)


class AwsRenewal(AwsCase):
    """A service that fails takes nothing away that still works."""

    FAILURES = (('503', lambda handler: handler.answer(503)), ('429', lambda handler: handler.answer(429)),
                ('404', lambda handler: handler.answer(404)), ('silence', lambda handler: handler.rfile.read(1)),
                ('reset', lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)))

    def begin_to_fail(self, answer):
        """Let the keys expire in 100 seconds, and the service fail from now on."""
        self.shift(3500)
        self.aws.fault = lambda handler: (answer(handler), True)[1]

    def mend(self):
        self.rotate(60)
        self.aws.fault = None

    def test_old_keys_serve_until_they_expire(self):
        for what, answer in self.FAILURES:
            with self.subTest(what):
                self.aws.suffix, self.aws.fault = '', None
                signers = self.pages(lambda: self.begin_to_fail(answer), lambda: None, self.mend, lambda: None)
                self.assertEqual(signers[:3], [INSTANCE] * 3)
                self.assertEqual(signers[-1], INSTANCE + '2')

    def test_nobody_becomes_anonymous(self):
        for what, answer in self.FAILURES:
            with self.subTest(what):
                self.aws.fault = None
                signers = self.pages(lambda: self.begin_to_fail(answer), lambda: self.shift(200), status=1)
                self.assertEqual(set(signers), {INSTANCE})

    def test_an_upload_is_aborted_with_old_keys(self):
        def fault(handler):
            if handler.command == 'POST':
                self.begin_to_fail(lambda handler: handler.answer(503))
            return 'partNumber=2' in handler.path and (handler.error(403, 'AccessDenied'), True)[1]
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(12 * MIB)}), 'X')
        self.server.fault = fault
        self.assertIn('AccessDenied', self.etc('push', 'X', status=1)[1])
        self.assertEqual(self.server.uploads, {})
        self.assertEqual({signed_by(headers) for _, _, headers in self.server.log}, {INSTANCE})

    def test_what_is_transient(self):
        patch(self, etc, '_backoff', lambda failures: 0)
        container = {'AWS_CONTAINER_CREDENTIALS_FULL_URI': self.aws.url + '/container'}
        for status, code, times, akid, env in (
                (400, 'Throttling', 2, 'WEB-pod', self.web_identity()),
                (400, 'RequestLimitExceeded', 2, 'WEB-pod', self.web_identity()),
                (400, 'IDPCommunicationError', 2, 'WEB-pod', self.web_identity()),
                (500, 'InternalError', 3, 'CONTAINER', container)):
            left = [code] * times
            self.aws.fault = lambda handler: left and (handler.error(status, left.pop()), True)[1]
            self.expect(akid, **env)


@unittest.skipIf(os.name == 'nt', 'a script of the shell')
class AwsCommand(AwsCase):
    """What needs more than the standard library comes from the command `aws`, where boto3 is not installed."""

    KINDS = {'sso': 'sso_session = corp\nsso_account_id = 1\nsso_role_name = R\n[sso-session corp]\nsso_region = us-east-1\n'
                    'sso_start_url = https://corp\n',
             'sso without a session': 'sso_account_id = 1\nsso_role_name = R\nsso_region = us-east-1\n'
                                      'sso_start_url = https://corp\n',
             'login': 'login_session = arn:aws:iam::1:user/me\n',
             'mfa': 'mfa_serial = arn:aws:iam::1:mfa/me\nsource_profile = b\n' + ROLE + 'x\n[profile b]\n' + static('STATIC')}
    ASKED = 'configure export-credentials --profile work --format process\n'

    def setUp(self):
        super().setUp()
        saved = dict(sys.modules)
        self.addCleanup(lambda: (sys.modules.clear(), sys.modules.update(saved)))
        for name in [name for name in saved if name.split('.')[0] in ('boto3', 'botocore')] + ['boto3', 'botocore']:
            sys.modules[name] = None
        write(self.tmp / 'bin', {'aws': '#!/bin/sh\necho "$*" >> "$HOME/asked"\ncat "$HOME/answer"\n'})
        (self.tmp / 'bin/aws').chmod(0o755)
        os.environ.update(PATH='%s:/usr/bin:/bin' % (self.tmp / 'bin'), AWS_PROFILE='work')

    def asked(self):
        """What the command was called with."""
        asked = (self.tmp / 'asked').read_text()
        (self.tmp / 'asked').unlink()
        return asked

    def test_kinds(self):
        self.process(**temporary('TOOL'))
        for kind, text in self.KINDS.items():
            with self.subTest(kind):
                self.expect('TOOL', '[profile work]\n' + text)
                self.assertEqual(self.asked(), self.ASKED)
        self.expect('dev-by-TOOL', '[profile top]\nsource_profile = work\n' + ROLE + 'dev\n[profile work]\n'
                    + self.KINDS['sso'], AWS_PROFILE='top')
        self.assertEqual(self.asked(), self.ASKED)

    def test_asked_again_before_they_expire(self):
        self.profile('[profile work]\n' + self.KINDS['sso'])
        self.process(**temporary('OLD'))
        new = lambda: (self.shift(3500), self.process(**temporary('NEW')))[0]
        self.assertEqual(self.pages(lambda: None, new, lambda: None), ['OLD', 'OLD', 'NEW', 'NEW'])
        self.assertEqual(self.asked(), self.ASKED * 2)

    def test_what_fails(self):
        for kind, text in self.KINDS.items():
            with self.subTest(kind):
                self.profile('[profile work]\n' + text)
                os.environ['PATH'] = '%s:/usr/bin:/bin' % (self.tmp / 'bin')
                self.fails("the AWS profile 'work'", 'No such file', '--profile work')  # the command's own words
                write(self.tmp, {'answer': '{"Version": 1, "SecretAccessKey": "secret"}'})
                self.fails("the AWS profile 'work'", 'no usable credentials')
                (self.tmp / 'answer').unlink()
                os.environ['PATH'] = str(self.tmp / 'nowhere')
                self.fails("the AWS profile 'work'", 'boto3', '--profile work')


@needs(importable('botocore'), 'botocore is not installed')
class AwsLibrary(AwsCase):
    """What the standard library cannot comes from boto3, where it is installed."""

    def run_ls(self, code, text):
        """The exit status of `etc ls -r`, which may ask for a code; who signed; and what was said."""
        self.profile('[profile m]\n' + text)
        os.environ.update(AWS_PROFILE='m', AWS_ENDPOINT_URL_STS=self.aws.url, AWS_ENDPOINT_URL_SSO=self.aws.url)
        self.server.log.clear()
        process = self.spawn('ls', '-r', stdin=subprocess.PIPE, start_new_session=True)
        err = process.communicate(code)[1].decode()
        return process.returncode, [signed_by(headers) for _, _, headers in self.server.log], err

    def test_mfa(self):
        mfa = AwsCommand.KINDS['mfa']
        for code in (b'123456\n', b''):  # it is asked once an hour
            with self.subTest(code):
                self.assertEqual(self.run_ls(code, mfa)[:2], (0, ['x-by-STATIC']))
        remove(self.tmp / '.aws/cli')
        self.assertIn('EOFError', self.run_ls(b'', mfa)[2])

    def test_sso(self):
        token = {'startUrl': 'https://corp', 'region': 'us-east-1', 'accessToken': 'sso-token',
                 'expiresAt': '2099-01-01T00:00:00Z'}
        name = hashlib.sha1(b'corp').hexdigest() + '.json'
        write(self.tmp / '.aws/sso/cache', {name: json.dumps(token)})
        self.assertEqual(self.run_ls(b'', AwsCommand.KINDS['sso'])[:2], (0, ['SSO']))
        (self.tmp / '.aws/sso/cache' / name).unlink()
        status, _, err = self.run_ls(b'', AwsCommand.KINDS['sso'])
        self.assertEqual(status, 1)
        self.assertIn('aws sso login --profile m', err)


@needs(importable('moto', 'flask', 'boto3'), 'moto[server] and boto3 are not installed')
class MotoIdentity(Case):
    """moto_server as IAM, STS and instance metadata; here it checks signatures and policies, of S3 too."""

    def test_roles_and_metadata(self):
        import boto3
        process, endpoint = serve(tool('moto_server'), '-H', '127.0.0.1', '-p', 'PORT', INITIAL_NO_AUTH_ACTION_COUNT='1000')
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.url = 's3://bucket/prefix'
        os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION='us-east-1')
        session = boto3.Session(aws_access_key_id='x', aws_secret_access_key='y')
        session.client('s3').create_bucket(Bucket='bucket')
        iam = session.client('iam')

        def policy(action, **more):
            statement = dict({'Effect': 'Allow', 'Action': action}, **more)
            return json.dumps({'Version': '2012-10-17', 'Statement': [statement]})
        iam.create_user(UserName='base')
        iam.put_user_policy(UserName='base', PolicyName='p', PolicyDocument=policy('sts:*', Resource='*'))
        key = iam.create_access_key(UserName='base')['AccessKey']
        for name, action in (('mid', 'sts:*'), ('top', 's3:*')):
            anyone = policy('sts:AssumeRole', Principal={'AWS': '*'})
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=anyone)
            iam.put_role_policy(RoleName=name, PolicyName='p', PolicyDocument=policy(action, Resource='*'))
        strict = urllib.request.Request(endpoint + '/moto-api/reset-auth', b'0', {'Content-Type': 'text/plain'})
        self.assertEqual(urllib.request.urlopen(strict).status, 200)

        wrong = '[base]\n' + static(key['AccessKeyId'])
        config = '[profile top]\nsource_profile = mid\n' + ROLE + 'top\n[profile mid]\nsource_profile = base\n' + ROLE + 'mid\n'
        write(self.tmp / '.aws', {
            'config': config, 'credentials': wrong.replace('secret-of-' + key['AccessKeyId'], key['SecretAccessKey'])})
        self.etc('register', small(self.tmp / 'ds'), 'X')
        os.environ['AWS_PROFILE'] = 'base'
        self.assertIn('AccessDenied', self.etc('push', 'X', status=1)[1])
        os.environ['AWS_PROFILE'] = 'top'
        self.etc('push', 'X')
        self.etc('pull', 'X', home='two')
        write(self.tmp / '.aws', {'credentials': wrong})
        self.assertIn('SignatureDoesNotMatch', self.etc('ls', '-r', status=1)[1])
        os.environ.update(AWS_PROFILE='default', AWS_EC2_METADATA_SERVICE_ENDPOINT=endpoint, AWS_EC2_METADATA_DISABLED='')
        self.assertIn('InvalidAccessKeyId', self.etc('ls', '-r', status=1)[1])  # it knows those of its metadata no more


class Signature(unittest.TestCase):
    def test_published_examples(self):
        """What checks signatures in these tests agrees with Amazon's own examples:

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
            with self.subTest(path):
                handler = SignedHandler.__new__(SignedHandler)
                handler.command, handler.path, handler.server = method, path, self
                handler.headers = http.client.HTTPMessage()
                for name, value in dict(more, **{
                        'host': 'examplebucket.s3.amazonaws.com', 'x-amz-date': '20130524T000000Z',
                        'x-amz-content-sha256': hashlib.sha256(body).hexdigest()}).items():
                    handler.headers[name] = value
                handler.headers['Authorization'] = (
                    'AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,'
                    'SignedHeaders=%s,Signature=%s' % (';'.join(sorted(handler.headers.keys())), signature))
                self.secrets = {'AKIAIOSFODNN7EXAMPLE': 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY'}
                self.assertIsNone(handler.unsigned(body))
                self.secrets = {'AKIAIOSFODNN7EXAMPLE': 'another'}
                self.assertEqual(handler.unsigned(body), 'SignatureDoesNotMatch')


@needs(importable('botocore'), 'botocore is not installed')
class SignatureOracle(S3Case):
    """Requests for odd keys, of odd hosts and with all kinds of headers are signed as botocore would."""

    WORDS = ['a', 'b c', '+', '~', '\u00e9', '/', '//', '.', '=', '&', '%', '$', "'", '(', '*', ':', '@', 'Z', '-', '_', '\u65e5']
    HOSTS = ['http://127.0.0.1:9000', 'http://h.example:80', 'https://h.example', 'https://h.example:443', 'https://h.example:8443']
    SETTINGS = [{}, {'public': True, 'storage_class': 'STANDARD_IA'}, {'request_payer': 'requester', 'sse': 'aws:kms'}]

    def lead_here(self):
        """Let all hosts, those of https too, be the test's server."""
        import ssl

        class Plain(http.client.HTTPConnection):
            default_port = 443

            def __init__(self, host, timeout, context):
                super().__init__(host, timeout=timeout)
        patch(self, http.client, 'HTTPSConnection', Plain)
        patch(self, ssl.SSLContext, 'load_default_certs', lambda context, *args: None)  # which takes long
        connect = patch(self, socket, 'create_connection', lambda address, *args, **kwargs: connect(
            self.server.server_address, *args, **kwargs))

    def test_against_botocore(self):
        asked = []

        def fault(handler):
            asked.append((handler.command, handler.path, handler.headers))
            return handler.error(404 if handler.command == 'GET' else 403, 'NoSuchKey') or True
        self.server.fault = fault
        self.lead_here()
        self.etc('register', small(self.tmp / 'ds'), 'X')
        rng = random.Random(11)
        for number in range(100):
            prefix = ''.join(rng.choice(self.WORDS) for _ in range(rng.randrange(8)))
            host, region = rng.choice(self.HOSTS), rng.choice(['us-east-1', 'eu-west-3'])
            token = rng.choice([None, 'to/ken+='])
            config = self.config(url='s3://bucket/' + prefix, endpoint_url=host, region=region, aws_session_token=token,
                                 **rng.choice(self.SETTINGS))
            asked.clear()
            for call in (lambda: etc.ls(True, config), lambda: etc.info('X', True, config), lambda: etc.push('X', config=config)):
                with self.assertRaises(etc.Error):
                    call()
            self.assertIn('PUT', [method for method, _, _ in asked])
            for method, path, headers in asked:
                with self.subTest(number=number, method=method, url=host + path):
                    ours = headers['Authorization'].replace(' ', '')
                    self.assertEqual(ours, self.theirs(method, host + path, headers, region, token))

    def theirs(self, method, url, headers, region, token):
        """What botocore gives for this request."""
        import datetime
        from unittest import mock

        import botocore.auth
        import botocore.awsrequest
        import botocore.credentials
        names = re.search('SignedHeaders=([^,]+)', headers['Authorization']).group(1).split(';')
        added = {'host', 'x-amz-date', 'x-amz-content-sha256', 'x-amz-security-token'}
        request = botocore.awsrequest.AWSRequest(method, url, {name: headers[name] for name in names if name not in added})
        signer = botocore.auth.S3SigV4Auth(botocore.credentials.Credentials(AKID, SECRET, token), 's3', region)
        signer.payload = lambda request: headers['x-amz-content-sha256']
        now = datetime.datetime.strptime(headers['x-amz-date'], '%Y%m%dT%H%M%SZ')
        with mock.patch('botocore.auth.get_current_datetime', lambda *args, **kwargs: now, create=True):
            signer.add_auth(request)
        return request.headers['Authorization'].replace(' ', '')


# ---------------------------------------------------------------------------------------
# Faults of networks, servers and shared directories
# ---------------------------------------------------------------------------------------

class Flaky:
    """Mixed into a handler: commits the fault that `server.plan` names for a request, on the real socket."""

    GARBAGE = [b'', b'<', b'[]', b'null', b'"x"', b'{"items": 5}', b'\xff\xfe' * 99, b'<Error/>', b'{"' * 5000, b'[' * 200000,
               b'[' + b'1' * 100000 + b']', b'<html><body>Welcome to our hotel</body></html>', b'<ListBucketResult><Contents>',
               b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>'
               b'<ListBucketResult>&b;</ListBucketResult>']
    damage = None

    def handle_one(self):
        server, kind = self.server, self.server.plan(self)
        length = int(self.headers.get('Content-Length') or 0)
        if kind in ('refused', 'reset', 'silence'):
            self.rfile.read(server.rng.choice([0, length, server.rng.randrange(length + 1)]))
            if kind == 'refused':
                server.shut()
            if kind == 'silence':
                self.wait()
            return self.slam()
        if isinstance(kind, tuple):  # a status, a code, and where a redirect leads to
            if server.rng.random() < .5:
                self.rfile.read(length)
            else:
                self.close_connection = True
            return self.error(kind[0], kind[1], {'Location': kind[2] + self.path} if kind[2:] else {})
        if kind == 'replaced':
            with server.lock:
                server.replace()
            kind = None
        self.damage = kind
        before = set(server.uploads)
        super().handle_one()
        if kind and self.command == 'POST':  # nobody was told of this upload, so nobody can abort it
            server.orphans |= set(server.uploads) - before

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
        kind, self.damage = self.damage, None
        if kind is None:
            return super().answer(status, body, headers, length)
        if kind == 'lost':
            return self.slam()
        rng, headers = self.server.rng, dict(headers)
        if kind == 'garbage':
            body = rng.choice(self.GARBAGE)
        elif kind == 'range':
            told = headers['Content-Range']
            headers['Content-Range'] = rng.choice([
                '', 'x', 'bytes */9', 'bytes 0-0/1', 'bytes 1-2/3', 'bytes 9-1/5', re.sub(r'/\d+', '/*', told),
                re.sub(r'\d+', lambda match: str(int(match.group()) + 1), told)])
        elif kind == 'whole':
            status, body = 200, next(iter(self.server.objects.values()))[0]
            del headers['Content-Range']
        elif kind == 'flipped':
            at, bit = rng.randrange(len(body)), 1 << rng.randrange(8)
            body = body[:at] + bytes([body[at] ^ bit]) + body[at + 1:]
        length = len(body) if length is None else length
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
            self.connection.sendall('\r\n'.join(lines).encode() + body * (self.command != 'HEAD'))
        if kind == 'torn':
            return self.slam()
        if kind == 'stalled':
            self.wait()
        if kind != 'short':
            self.close_connection = True


def patience(seconds):
    """Let a connection count as broken after so much silence."""
    etc._TIMEOUT = etc._READ_TIMEOUT = seconds


class FlakyServer(Server):
    def __init__(self, handler):
        self.rng, self.fault_at, self.shut_for, self.pauses = random.Random(), None, 0, 0
        self.hits, self.requests, self.orphans, self.finished = [], [], set(), {}
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
                    patience(60)
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
        """The client pauses between two tries, here for no time."""
        with self.lock:  # or others would go on while it is half open
            self.pauses += 1
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
        self.answer(200)


class Runs:
    """What all seeded runs share. ETC_TEST_SEED repeats a single one."""

    def make(self, version, size):
        """A version of X: its archive, its tree, and what of it `pull -p test` installs."""
        root = write(self.tmp / version, {
            'data/train/noise': noise(size, version), 'data/train/x/text': (version + '\n') * 5000, 'README.md': version,
            'data/train/l': ('->', 'noise'), 'data/test/t': 'the same in all', 'meta.json': '{"version": "%s"}' % version})
        local = etc.Config((self.tmp / 'made' / version).as_uri(), self.tmp / 'makers' / version)
        etc.register(root, 'X', config=local)
        etc.push('X', config=local)
        whole = tree(root)
        part = {name: content for name, content in whole.items() if not name.startswith('data/train')}
        return (self.tmp / 'made' / version / 'X.tgz').read_bytes(), whole, part

    def call(self, *args, home='home'):
        """The exit status of a command, and what it says."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = etc.main(['-q', '--config', str(self.tmp / 'settings.yaml'), '--url', self.url,
                             '--home', str(self.tmp / home)] + list(args))
        if code:
            self.assertEqual(code, 1)
            self.assertRegex(err.getvalue(), r'\Aetc: [^\n]+\n\Z')
        return code, out.getvalue(), err.getvalue()

    def works(self, *args, home='home'):
        self.assertEqual(self.call(*args, home=home), (0, '', ''))

    def runs(self, kinds, times=1):
        """Each kind of fault so many times, each with a seed and a generator of its own."""
        seeds = range(len(kinds) * times * RUNS)
        if 'ETC_TEST_SEED' in os.environ:
            seeds = [int(os.environ['ETC_TEST_SEED'])]
        for seed in seeds:
            yield seed, random.Random('%s %d' % (self.id(), seed)), kinds[seed % len(kinds)]

    def found(self, home):
        """What is installed as X."""
        return tree(self.tmp / home / 'X') if os.path.lexists(str(self.tmp / home / 'X')) else None


class Faults(Runs):
    """Each command that talks to a server, with each kind of fault at a random request and byte.

    All end in the right dataset, or with one line and nothing changed.
    """

    SECRETS = [AKID, SECRET, SECRET[:20], 'AWS4-HMAC', 'Signature', 'session/token', 'ya29.token', 'Bearer', 'refresh-secret']
    MENDED = ['refused', 'reset', 'silence', 'lost', 'cut', 'torn', 'stalled', 'long'] + [
        (408, ''), (429, 'SlowDown'), (500, 'InternalError'), (502, ''), (503, 'SlowDown'), (503, 'ServiceUnavailable'), (504, '')]
    ENDED = ['short', 'garbage', 'range', 'whole', 'flipped', 'headless'] + [
        (400, 'InvalidRequest'), (401, ''), (403, 'AccessDenied'), (404, 'NoSuchKey'), (409, 'OperationAborted'), (410, 'Gone'),
        (412, ''), (416, ''), (501, '')]

    def setUp(self):
        super().setUp()
        self.server.stop()
        old, self.server = self.server, FlakyServer(self.handler)
        self.addCleanup(self.server.stop)
        self.addCleanup(self.server.reopen)
        for name, value in vars(old).items():
            vars(self.server).setdefault(name, value)
        self.settings['endpoint_url'] = os.environ['STORAGE_EMULATOR_HOST'] = self.server.url
        self.other = Server(Recorder)
        self.addCleanup(self.other.stop)
        self.kinds = self.MENDED + self.ENDED + [
            (status, 'TemporaryRedirect', self.other.url) for status in (301, 302, 303, 307, 308)]
        patch(self, etc, '_backoff', self.server.paused)
        patch(self, etc, '_TIMEOUT', 60)
        patch(self, etc, '_READ_TIMEOUT', 60)

    def remote(self):
        found = self.server.objects.get('some/prefix/X.tgz')
        return found and found[0]

    def reset(self, archive):
        server = self.server
        server.reopen()
        server.fault_at, server.pauses, server.conditions = None, 0, True
        for kept in (server.objects, server.uploads, server.finished, server.requests, server.hits, server.log, server.orphans):
            kept.clear()
        self.other.log.clear()
        patience(60)
        if archive is not None:
            self.put('X.tgz', archive)

    def strike(self, kinds, ops, prepare, check, others=()):
        """Let each kind of fault strike one of the operations, the arguments of which come first in each.

        prepare(op, home, rng): makes things ready, and gives the home to use. check(op, kind, home, *what call() gives).
        others: what takes the archive's place when it is replaced.
        """
        server, clean = self.server, []
        for number, op in enumerate(ops):
            home = prepare(op, 'clean%d' % number, random.Random(1))
            server.requests.clear()
            self.assertEqual(self.call(*op[0], home=home)[::2], (0, ''))
            clean.append(list(server.requests))
        for seed, rng, kind in self.runs(kinds):
            places = [(op, requests, place + 1) for op, requests in zip(ops, clean) for place in range(
                sum(server.applies(kind, request) for request in requests))]
            if not places:
                continue
            op, requests, place = rng.choice(places)
            count = 1 if kind in ('silence', 'stalled') else rng.choice([1, 1, 1, 2, 2, 4, 10 ** 6, 10 ** 6])
            with self.subTest(seed=seed, args=op[0], kind=kind, place=place, count=count):
                home = prepare(op, 'h%d' % seed, rng)
                new = rng.choice(others or [None])
                server.replace = lambda: (server.objects.clear(), new and self.put('X.tgz', new))
                server.rng, server.shut_for = rng, rng.choice([1, 2]) if count < 3 else 10 ** 9
                server.requests.clear()
                server.fault_at = kind, place, count
                patience(0.5 if kind in ('silence', 'stalled') else 60)
                code, out, err = self.call(*op[0], home=home)
                self.after(kind, count, code, err, len(requests))
                check(op, kind, home, code, out, err)

    def after(self, kind, count, code, err, clean):
        """What holds after each run."""
        server = self.server
        server.reopen()
        server.fault_at = None
        if count <= 2 and kind in self.MENDED:
            self.assertEqual((code, err), (0, ''))
        self.assertLessEqual(len(server.requests) + server.pauses, 25 * clean + 100)
        # the server could not be told to forget an upload if that request failed, too
        told = 'DELETE' not in server.hits or (kind in self.MENDED and server.hits.count('DELETE') < self.tries_of_delete)
        if told and (count < 3 or kind != 'refused' and count < 1000):
            self.assertEqual(set(server.uploads) - server.orphans, set())
        for secret in self.SECRETS:
            self.assertNotIn(secret, ''.join(self.other.log))

    def test_pull(self):
        one, tree_one, part_one = self.make('one', 1200000)
        two, tree_two, part_two = self.make('two', 1200000)
        with tarfile.open(str(self.tmp / 'foreign.tgz'), 'w:gz') as tar:
            tar.add(str(self.tmp / 'two'), '.')
        foreign = (self.tmp / 'foreign.tgz').read_bytes()
        # the words, what is installed before and how, the archive that is there, what comes of it, or of version one
        ops = [(['pull', 'X'], None, [], one, tree_one, tree_one),
               (['pull', 'X'], part_one, ['-p', 'test'], one, tree_one, tree_one),
               (['pull', 'X'], None, [], foreign, tree_two, tree_one),
               (['pull', '-p', 'test', 'X'], None, [], one, part_one, part_one),
               (['pull', '-f', 'X'], tree_one, [], two, tree_two, tree_one),
               (['pull', '-f', 'X'], tree_one, [], foreign, tree_two, tree_one),
               (['pull', '-f', '-p', 'test', 'X'], tree_one, [], two, part_two, part_one)]

        def prepare(op, home, rng):
            _, before, how, archive, _, _ = op
            if before:
                self.reset(one)
                self.works('pull', 'X', *how, home=home)
            self.reset(archive)
            self.server.conditions = rng.random() < .5  # some stores know none
            return home

        def check(op, kind, home, code, out, err):
            args, before, _, _, target, of_one = op
            found = self.found(home)
            if kind == 'replaced' and code:
                self.assertRegex(err, "was replaced|no dataset|another 'X' is installed")
            possible = [before] if code else [target]
            if kind == 'replaced' and not code:
                possible = [part_one, part_two] if '-p' in args else [tree_one, tree_two]
            self.assertTrue(found in possible, (code, err, sorted(found or {})))
            if found:
                self.works('verify', 'X', home=home)
            self.reset(two)
            self.works('pull', '-f', 'X', home=home)
            self.assertTrue(self.found(home) == tree_two)
            self.assertEqual(self.leftovers(home), [])
            remove(self.tmp / home)
        self.strike(self.kinds + ['replaced'], ops, prepare, check, [one, two, None])

    def test_push(self):
        one, two, big = [self.make(*version)[0] for version in (('one', 70000), ('two', 80000), ('big', 9 * MIB))]
        # the words, whose version is pushed, the archive that is there, what comes of it
        ops = [(['push', 'X'], 'two', None, two), (['push', '-f', 'X'], 'two', one, two), (['push', 'X'], 'two', two, two),
               (['push', 'X'], 'big', None, big), (['push', '-f', 'X'], 'big', one, big)]

        def prepare(op, home, rng):
            self.reset(op[2])
            return 'makers/' + op[1]

        def check(op, kind, home, code, out, err):
            _, _, before, target = op
            self.assertTrue(self.remote() in ([before, target] if code else [target]), (code, err))
            self.works('push', '-f', 'X', home=home)
            self.assertTrue(self.remote() == target)
        self.strike(self.kinds, ops, prepare, check)

    def test_purge(self):
        one, two = self.make('one', 70000)[0], self.make('two', 80000)[0]
        ops = [(['purge', '-r', '-f', 'X'],), (['purge', '-r', '-f', 'X@' + etc.Dataset(self.tmp / 'one').digest],)]

        def prepare(op, home, rng):
            self.reset(one)
            return home

        def check(op, kind, home, code, out, err):
            possible = [None, one]
            if kind == 'replaced':
                possible = [None, two]
                if code == 0 and self.remote():  # which came after the deletion
                    self.assertIn('DELETE', [method for method, _, _ in self.server.requests[:-1]])
            elif code == 0 and kind[0] not in (404, 410):  # which some looks take for the truth
                possible = [None]
            self.assertTrue(self.remote() in possible, err)
        self.strike(self.kinds + ['replaced'], ops, prepare, check, [two, None])

    def test_listings(self):
        one = self.make('one', 300000)[0]
        self.server.page = 2
        ops, expected = [(['ls', '-r'],), (['ls', '-r', '--json'],), (['info', '-r', '--json', 'X'],)], {}

        def prepare(op, home, rng):
            self.reset(one)
            for name in ('a.tgz', 'b.tgz', 'c.tgz'):
                self.put(name, one)
            if home.startswith('clean'):
                expected[str(op)] = self.comparable(self.call(*op[0])[1])
            return home

        def check(op, kind, home, code, out, err):
            self.assertFalse((self.tmp / 'home/X').exists())
            if code:
                self.assertEqual(out, '')
            elif err:  # an archive that cannot be read does not hide the others
                self.assertTrue(all(line.startswith('etc: ') for line in err.splitlines()), err)
                found, clean = (json.loads(text) for text in (self.comparable(out), expected[str(op)]))
                self.assertEqual([item['name'] for item in found], ['X', 'a', 'b', 'c'])
                self.assertTrue(all(item in clean or item['digest'] is None for item in found), out)
            else:
                self.assertEqual(self.comparable(out), expected[str(op)])
        self.strike(self.kinds, ops, prepare, check)

    @staticmethod
    def comparable(out):
        return re.sub(r'"when": "[^"]*"', '"when": ""', out)


class S3Faults(Faults, S3Case):
    class handler(Flaky, S3Handler):
        pass
    MENDED = Faults.MENDED + [(200, 'InternalError'), (400, 'RequestTimeout')]
    tries_of_delete = 2

    def setUp(self):
        super().setUp()
        self.settings['aws_session_token'] = 'session/token'
        self.etc('ls')  # writes the settings

    def put(self, name, data):
        self.server.objects['some/prefix/' + name] = data, '"%s"' % hashlib.sha1(data).hexdigest(), {}


class GsFaults(Faults, GoogleCase):
    class handler(Flaky, GsHandler):
        def error(self, status, code, headers=()):
            self.answer(status, json.dumps({'error': {'code': status, 'message': code}}).encode() if code else b'', headers)

        def session(self, body):
            """As Google's, it answers for an upload that is complete with what it became."""
            server, upload = self.server, self.query['upload_id']
            if self.command == 'PUT' and upload in server.finished:
                return self.json(self.resource(server.finished[upload]))
            name = server.uploads.get(upload, [{}])[0].get('name')
            try:
                super().session(body)
            finally:
                if self.command == 'PUT' and upload not in server.uploads and name in server.objects:
                    server.finished[upload] = name
    tries_of_delete = 1

    def setUp(self):
        super().setUp()
        self.respond({'refresh_token': 'refresh-secret'})
        self.use(self.user(refresh_token='refresh-secret'))
        self.etc('ls')  # writes the settings


class SlowBodies(S3Handler):
    """Receives and sends bodies piece by piece: `server.slow(handler, bytes left)` comes before each."""

    def read_body(self):
        left, parts = int(self.headers.get('Content-Length') or 0), []
        while left:
            self.server.slow(self, left)
            parts.append(self.rfile.read(min(left, 32768)))
            left -= len(parts[-1])
            if not parts[-1]:
                self.close_connection = True
                break
        return b''.join(parts)

    def answer(self, status, body=b'', headers=(), length=None):
        super().answer(status, b'', headers, len(body) if length is None else length)
        for start in range(0, len(body), 32768):
            self.server.slow(self, len(body) - start)
            self.wfile.write(body[start:start + 32768])


class Links(S3Case):
    """Slow, lossy and long links, and servers that are slow or gone for a while."""

    def serve(self, server):
        self.server.stop()
        self.server = server
        self.addCleanup(server.stop)
        self.settings['endpoint_url'] = server.url

    def serve_slowly(self, slow):
        self.serve(Server(SlowBodies))
        self.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        self.server.slow = slow

    def test_slow_uplink(self):
        """A link on which a block takes longer than the time-out, but is never silent for so long."""
        patch(self, etc, '_TIMEOUT', 1.6)
        self.serve_slowly(lambda handler, left: time.sleep(0.1 * (handler.command == 'PUT')))
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(MIB)}))
        self.assertEqual(len(self.requests('PUT')), 1)

    def test_answers_in_any_order(self):
        """Each byte is asked for once, by no more connections than are allowed, and all find their places."""
        root = write(self.tmp / 'ds', {'data/train/x': noise(22 * MIB)})
        rng, now, most = random.Random(3), set(), set()

        def fault(handler):
            now.add(handler)
            most.add(len(now))
            time.sleep(rng.random() / 10)
            now.discard(handler)
        for connections in (1, 4):
            with self.subTest(connections):
                most.clear()
                self.server.fault = fault
                self.server.connections.clear()
                self.server.objects.clear()
                self.settings['connections'] = connections
                self.etc('register', '-f', root, 'X')
                self.etc('push', 'X')
                self.server.log.clear()
                self.etc('pull', 'X', home=str(connections))
                self.assertEqual(tree(self.tmp / str(connections) / 'X'), tree(root))
                size = len(self.server.objects['some/prefix/X.tgz'][0])
                ranges = sorted(asked_range(headers, size) for _, _, headers in self.server.log)
                overlap = sum(max(0, stop - start) for (_, stop), (start, _) in zip(ranges, ranges[1:]))
                self.assertLess(overlap, 65537)  # of the end, which is read first
                self.assertEqual(max(most), connections)
        self.assertLessEqual(len(self.server.connections), 2 * connections)  # for push and pull

    def test_silence(self):
        """A connection that says nothing is given up early, if the request only reads."""
        self.share(small(self.tmp / 'ds'))
        patch(self, etc, '_READ_TIMEOUT', 0.5)
        silent = []

        def fault(handler):
            if not silent:
                silent.append(handler)
                handler.connection.settimeout(10)
                silent.append(handler.rfile.read(1))
                return True
        self.server.fault = fault
        self.etc('pull', 'X', home='two')
        self.assertEqual(silent[1:], [b''])

    def test_server_that_restarts(self):
        """A server that has answered before is waited for, at least 15 seconds."""
        pauses = []

        def pause(failures):
            pauses.append(backoff(failures))
            if sum(pauses) > 15:
                self.server.reopen()
            return 0

        def fault(handler):
            if handler.command == 'PUT' and not pauses:
                handler.close_connection = True
                handler.server.shut()
                return True
        backoff = patch(self, etc, '_backoff', pause)
        self.serve(FlakyServer(S3Handler))
        self.server.fault = fault
        self.share(small(self.tmp / 'ds'))
        self.assertGreater(sum(pauses), 15)

    def test_requests(self):
        """How many requests the commands make at most."""
        self.share(small(self.tmp / 'ds'))
        large = write(self.tmp / 'large', {'data/train/x': noise(9 * MIB), 'README.md': 'large'})
        self.etc('register', large, 'Large')
        for what, most, *args in (
                ('push of a new dataset', 6, 'push', 'Large'),
                ('push of the same dataset', 1, 'push', 'Large'),
                ('info of a small dataset', 1, 'info', '-r', 'X'),
                ('info of a large dataset', 2, 'info', '-r', 'Large'),
                ('pull of a small dataset', 1, '--home', self.tmp / 'two', 'pull', 'X'),
                ('diff of here and there', 1, 'diff', 'X', '-r', 'X'),
                ('diff of large ones', 2, 'diff', '-r', 'Large', '-r', 'Large'),
                ('list', 1, 'ls', '-r'),
                ('long list', 3, 'ls', '-r', '-l'),
                ('part of the list', 2, 'ls', '-r', '--json', 'L*')):
            with self.subTest(what):
                self.server.log.clear()
                self.etc(*args)
                self.assertLessEqual(len(self.server.log), most, self.requests())

    def test_ranges_from_the_end(self):
        """Servers that refuse or misread them are asked otherwise."""
        self.share(write(self.tmp / 'ds', {'data/train/x': noise(100000)}))
        data, etag, _ = self.server.objects['some/prefix/X.tgz']
        size = len(data)
        last = 'bytes %d-%d/%%s' % (size - 8192, size - 1)
        for what, status, body, told in (
                ('the whole object', 200, data, None),
                ('refused', 416, b'', None),
                ('from the start', 206, data[:8193], 'bytes 0-8192/%d' % size),
                ('the last bytes but one', 206, data[-8193:-1], 'bytes %d-%d/%d' % (size - 8193, size - 2, size)),
                ('fewer bytes', 206, data[-4000:], 'bytes %d-%d/%d' % (size - 4000, size - 1, size)),
                ('no size', 206, data[-8192:], last % '*'),
                ('another length', 206, data[-8000:], last % size)):
            with self.subTest(what):
                headers = {'ETag': etag, 'Last-Modified': 'Mon, 06 May 2024 07:08:09 GMT', 'Content-Range': told}
                asked = []

                def fault(handler):
                    if handler.headers.get('Range', '').startswith('bytes=-'):
                        asked.append(handler.path)
                        handler.answer(status, body, {key: value for key, value in headers.items() if value})
                        return True
                self.server.fault = fault
                self.etc('pull', 'X', home=what)
                self.assertEqual(tree(self.tmp / what / 'X'), tree(self.tmp / 'ds'))
                self.assertEqual(len(asked), 1)

    def test_lost_upload(self):
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(12 * MIB)}), 'X')
        self.server.fault = lambda handler: 'partNumber=2' in handler.path and self.server.uploads.clear()
        self.assertRegex(self.etc('push', 'X', status=1)[1], 'NoSuchUpload.*has removed the upload meanwhile; push again')

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interruption_while_the_server_is_silent(self):
        """Ctrl-C ends a push at once, and the upload."""
        started, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def slow(handler, left):
            if handler.command == 'PUT' and left < MIB:
                started.set()
                go_on.wait(60)
        self.serve_slowly(slow)
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
        """A signal may strike when the main thread has just taken a lock that others need."""
        program = r"""
import os, signal, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import etcetera
enter, left, main = threading.Condition.__enter__, [COUNT], threading.get_ident()
def taken(condition):
    result = enter(condition)
    if threading.get_ident() == main:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return result
threading.Condition.__enter__ = taken
sys.exit(etcetera.main(sys.argv[2:]))
"""
        root, started = write(self.tmp / 'ds', {'data/train/x': noise(12 * MIB), 'data/train/y': 'y' * 99}), []
        for count in ('1', '2', '3', '9'):
            self.share(root, 'X' + count)
            for command in ('push -f', 'pull -f', 'verify'):
                started.append((command, count))
        ended = []
        for command, count in started:
            with self.subTest(command, count=count):
                process = self.spawn('-q', *command.split(), 'X' + count, python=['-c', program.replace('COUNT', count)])
                self.addCleanup(process.kill)
                err = process.communicate(timeout=20)[1].decode()
                self.assertIn((process.returncode, err), [(0, ''), (130, 'etc: interrupted\n')])
                ended.append(process.returncode)
        self.assertGreater(ended.count(130), 5)
        self.assertEqual(self.server.uploads, {})

    def test_progress_of_a_single_body(self):
        """Progress tells of bytes when they move, not when all of a part or a range has."""
        told = threading.Event()
        missing = []

        def slow(handler, left):
            if left <= 32768 < MIB < int(handler.headers.get('Content-Length') or 2 * MIB) and not told.wait(20):
                missing.append(handler.command)
        self.serve_slowly(slow)
        self.etc('register', write(self.tmp / 'ds', {'data/train/x': noise(4 * MIB)}), 'X')
        for call, home in ((etc.push, 'home'), (etc.pull, 'two')):
            told.clear()
            call('X', config=self.config(home), progress=lambda done, total: done and told.set())
        self.assertEqual(missing, [])


class FileFaults(Runs, Case):
    """A shared directory whose archive changes, shrinks or goes when a file is opened; and a disk that is full."""

    def setUp(self):
        import builtins
        super().setUp()
        self.etc('ls')  # writes the settings
        self.archive, self.source = self.tmp / 'share/X.tgz', self.tmp / 'two/data/train/noise'
        self.left, self.lock = 0, threading.RLock()
        for module in (builtins, os):
            opened = getattr(module, 'open')
            patch(self, module, 'open', lambda path, *args, opened=opened, **kwargs: (
                self.count(path), opened(path, *args, **kwargs))[1])

    def at(self, number, action):
        """Let `action` happen just before the archive or the source is opened so many times."""
        self.left, self.action = number, action

    def count(self, path):
        if str(path) in (str(self.archive), str(self.source)):
            with self.lock:
                self.left -= 1
                if self.left == 0:
                    self.action()

    @contextlib.contextmanager
    def limit(self, size):
        """Let no file grow past `size`, as on a full disk; None: no limit."""
        if size is None:
            yield
            return
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def flip(self, at):
        status = self.archive.stat()
        data = bytearray(self.archive.read_bytes())
        data[at] ^= 1
        with self.archive.open('r+b') as file:
            file.write(data)
        os.utime(str(self.archive), ns=(status.st_atime_ns, status.st_mtime_ns))

    def test_pull(self):
        one, tree_one, _ = self.make('one', 2500000)
        two, tree_two, part_two = self.make('two', 2500000)
        ops = [(None, ['pull', 'X'], tree_two), (None, ['pull', '-p', 'test', 'X'], part_two),
               (tree_one, ['pull', '-f', 'X'], tree_two)]
        share = self.tmp / 'share'
        kinds = ['replaced', 'rewritten', 'truncated', 'emptied', 'removed', 'moved', 'flipped'] + ['full'] * (os.name == 'posix')
        for seed, rng, kind in self.runs(kinds, 3):
            home, byte, number = 'h%d' % seed, rng.randrange(len(two)), rng.randrange(2, 6)
            before, args, target = rng.choice(ops)
            faults = {
                'replaced': lambda: (write(self.tmp, {'new': one}), os.replace(str(self.tmp / 'new'), str(self.archive))),
                'rewritten': lambda: write(share, {'X.tgz': one}),
                'truncated': lambda: os.truncate(str(self.archive), byte),
                'emptied': lambda: write(share, {'X.tgz': b''}),
                'removed': lambda: remove(self.archive),
                'moved': lambda: os.rename(str(share), str(self.tmp / 'elsewhere')),
                'flipped': lambda: self.flip(byte),
                'full': lambda: None}
            if before:
                write(share, {'X.tgz': one})
                self.works('pull', 'X', home=home)
            write(share, {'X.tgz': two})
            with self.subTest(seed=seed, args=args, kind=kind, number=number):
                self.at(number, faults[kind])
                with self.limit(rng.randrange(1000, 1000000) if kind == 'full' else None):
                    code, _, err = self.call(*args, home=home)
                happened, self.left = self.left <= 0, 0
                if happened and kind not in ('flipped', 'full'):
                    self.assertEqual(code, 1)
                if happened and kind in ('replaced', 'rewritten', 'truncated', 'emptied'):
                    self.assertIn('was replaced', err)
                self.assertTrue(self.found(home) == (before if code else target), (code, err))
                write(share, {'X.tgz': two})
                self.works('pull', '-f', 'X', home=home)
                self.assertTrue(self.found(home) == tree_two)
                self.assertEqual(self.leftovers(home), [])
            remove(self.tmp / home)
            remove(self.tmp / 'elsewhere')

    def test_push(self):
        one, two = self.make('one', 500000)[0], self.make('two', 2600000)[0]
        share = self.tmp / 'share'
        kinds = ['gone', 'pushed by another', 'shrunk', 'removed'] + ['full'] * (os.name == 'posix')
        for seed, rng, kind in self.runs(kinds, 4):
            before, byte, number = rng.choice([None, one]), rng.randrange(2600000), rng.randrange(1, 5)
            faults = {'gone': lambda: remove(share),
                      'pushed by another': lambda: write(share, {'X.tgz': one}),
                      'shrunk': lambda: os.truncate(str(self.source), byte),
                      'removed': lambda: remove(self.source),
                      'full': lambda: None}
            remove(share)
            write(share, {'X.tgz': before} if before else {'.': None})
            with self.subTest(seed=seed, before=bool(before), kind=kind, number=number):
                self.at(number, faults[kind])
                with self.limit(rng.randrange(1000, len(two)) if kind == 'full' else None):
                    code, _, err = self.call('push', *['-f'] * bool(before), 'X', home='makers/two')
                if self.left <= 0:
                    before = {'gone': None, 'pushed by another': one}.get(kind, before)
                self.left = 0
                found = self.archive.read_bytes() if self.archive.exists() else None
                self.assertTrue(found == (before if code else two), (code, err))
                self.assertEqual(os.listdir(str(share)) if share.exists() else [], ['X.tgz'] if found else [])
                write(self.tmp / 'two', {'data/train/noise': noise(2600000, 'two')})
                self.works('push', '-f', 'X', home='makers/two')
                self.assertTrue(self.archive.read_bytes() == two)


# ---------------------------------------------------------------------------------------
# Installing
# ---------------------------------------------------------------------------------------

def run_python(program, *args, flags=(), **kwargs):
    """Run a program in an interpreter of its own; its exit status, and what it prints."""
    head = 'import os, re, signal, sys, threading\nsys.path.insert(0, %r)\n' % str(HERE)
    command = [sys.executable, *flags, '-c', head + program] + [str(arg) for arg in args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, **kwargs)
    return done.returncode, done.stdout


class Install(S3Case):
    def publish(self, size=20 * MIB):
        self.root = write(self.tmp / 'ds', {'data/train/%d' % n: noise(size // 10, n) for n in range(10)})
        self.share(self.root, home='pub')

    def check(self, home='home'):
        """X is here as it was published, and no work is left."""
        self.assertEqual((tree(self.tmp / home / 'X'), self.leftovers(home)), (tree(self.root), []))

    def start(self, *args, after=3, **kwargs):
        """Start a command that hangs after so many reads; returns the process, and an event that lets it go on."""
        stuck, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        reads = itertools.count()

        def fault(handler):
            if handler.command == 'GET' and next(reads) >= after:
                stuck.set()
                go_on.wait(30)
        self.server.fault = fault
        process = self.spawn(*args, **kwargs)
        self.assertTrue(stuck.wait(20))
        return process, go_on

    def age(self, *paths):
        """Let work that was left look old."""
        for path in paths:
            for place in [path] + list(path.iterdir()):
                os.utime(place, (1, 1))

    def test_read_only(self):
        self.root = small(self.tmp / 'ds')
        (self.root / 'data/train/a.txt').chmod(0o755)
        self.share(self.root, home='pub')
        umask = os.umask(0o022)
        self.addCleanup(os.umask, umask)
        self.etc('pull', 'X')
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (self.tmp / 'home/X').rglob('*')}
        self.assertEqual((modes['a.txt'], modes['b.txt'], modes['train']), (0o555, 0o444, 0o755))

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interrupted_pull(self):
        self.publish()
        for name, status in (('SIGKILL', -9), ('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)):
            with self.subTest(name):
                process, go_on = self.start('pull', 'X', home=name)
                begin = time.time()
                process.send_signal(getattr(signal, name))
                err = process.communicate()[1].decode()
                self.assertLess(time.time() - begin, 15, 'it waits for no answer')
                self.assertEqual(process.returncode, status)
                self.assertRegex(err, r'\Aetc: interrupted[^\n]*\n\Z' if status > 0 else r'\A\Z')
                self.assertEqual((self.installed(name), len(self.leftovers(name))), ([], 1))  # for the next to go on
                self.server.fault = None
                go_on.set()
                self.etc('pull', 'X', home=name)
                self.check(name)

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    @unittest.skipIf(hasattr(sys, 'pypy_version_info'), 'PyPy does not tell which signals it inherited as ignored')
    def test_signals_that_are_not_for_us(self):
        """nohup's SIGHUP is ignored; a program that calls main() keeps its handlers, also in another thread."""
        self.publish(MIB)
        process, go_on = self.start(
            'pull', 'X', after=0, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        process.send_signal(signal.SIGHUP)
        go_on.set()
        self.assertEqual(process.wait(), 0, process.communicate())
        numbers = signal.SIGTERM, signal.SIGHUP
        for number in numbers:
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        during = []
        self.server.fault = lambda handler: during.append([signal.getsignal(number) for number in numbers])
        for own in (signal.SIG_IGN, lambda number, frame: None, signal.SIG_DFL):
            with self.subTest(own):
                for number in numbers:
                    signal.signal(number, own)
                self.etc('info', '-r', 'X')
                self.assertEqual([handler == own for handler in during.pop()], [own != signal.SIG_DFL] * 2)
                self.assertEqual([signal.getsignal(number) for number in numbers], [own] * 2)
        del during[:]
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.etc, 'info', '-r', 'X').result()
        self.assertEqual(during.pop(), [signal.SIG_DFL] * 2)

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interrupted_push(self):
        self.publish()
        write(self.root, {'data/train/new': noise(30 * MIB)})
        for name, status, later in (('SIGINT', 130, []), ('SIGTERM', 143, []),
                                    ('SIGHUP', 129, ['SIGHUP', 'SIGTERM', 'SIGHUP'])):  # as a terminal that closes
            with self.subTest(name):
                started = threading.Event()

                def fault(handler):
                    if 'partNumber=3' in handler.path:
                        started.set()
                        time.sleep(1)
                    if handler.command == 'DELETE' and later:
                        while later:
                            process.send_signal(getattr(signal, later.pop()))
                        return handler.answer(503) or True
                self.server.fault = fault
                process = self.spawn('push', '-f', 'X', home='pub')
                self.assertTrue(started.wait(20))
                process.send_signal(getattr(signal, name))
                err = process.communicate()[1].decode()
                self.assertEqual((process.returncode, self.server.uploads), (status, {}))
                self.assertRegex(err, r'\Aetc: interrupted[^\n]*\n\Z')

    def large(self, size=20):
        self.settings['connections'] = 10
        files = {'data/train/big': noise(size * MIB), 'data/train/\u00e9' + 'x' * 120: noise(100), 'README.md': 'hello'}
        files.update({'data/train/%04d' % n: noise(1500) for n in range(1500)})
        files.update({'data/train/m/%d' % n: noise(MIB // 2) for n in range(size)})
        files.update({'data/test/%d' % n: noise(300000) for n in range(10)})
        self.root = write(self.tmp / 'ds', files)
        (self.root / 'data/train/0000').chmod(0o755)
        self.share(self.root, home='pub')
        return len(self.server.objects['some/prefix/X.tgz'][0])

    def journals(self):
        return list((self.tmp / 'home/.etcetera').rglob('journal'))

    def broken_off(self, share, number=signal.SIGTERM):
        """Break a pull off when a share of the data has come and is written."""
        stuck, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        size = len(self.server.objects['some/prefix/X.tgz'][0])

        def fault(handler):
            if handler.headers.get('Range', 'bytes=-').startswith('bytes=-'):
                return
            start, stop = asked_range(handler.headers, size)
            if start < size - 65536 and (start >= share * size or stop > size - 65536):  # which holds the index
                stuck.set()
                go_on.wait(30)
        self.server.fault = fault
        process = self.spawn('--config', self.tmp / 'settings.yaml', 'pull', 'X')
        self.assertTrue(stuck.wait(20))
        until, written = time.time() + 30, 0
        while written < share * size - 8 * MIB:
            self.assertLess(time.time(), until)
            time.sleep(0.02)
            lines = b''.join(path.read_bytes() for path in self.journals())
            written = sum(map(int, re.findall(rb'^\[".*?", (\d+), ', lines, re.M)))
        process.send_signal(number)
        process.communicate()
        self.server.fault = None
        go_on.set()
        self.assertEqual((self.installed(), len(self.leftovers())), ([], 1))

    def pulled(self, home='home'):
        """Pull; returns how much the server sent."""
        before = self.server.sent
        self.etc('pull', 'X', home=home)
        self.etc('verify', 'X', home=home)
        self.check(home)
        return self.server.sent - before

    @unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
    def test_resume(self):
        size = self.large()
        self.etc('ls')  # writes the settings
        for shares, number in (([0.5], signal.SIGKILL), ([0.9], signal.SIGKILL), ([0.3, 0.9, 0.4], signal.SIGINT)):
            with self.subTest(shares=shares):
                for share in shares:
                    self.broken_off(share, number)
                self.assertLess(self.pulled(), (1.25 - max(shares)) * size)  # what is under way is lost
                self.etc('purge', 'X')

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_resume_trusts_nothing(self):
        self.large(12)

        def change(path, old=b'', new=b'x'):
            path.chmod(0o644)
            data = path.read_bytes()
            path.write_bytes(data[:99] + data[99:].replace(old, new, 1))

        self.broken_off(0.9)
        journal, = self.journals()
        work = journal.parent.relative_to(self.tmp / 'home')
        for home, harm in (
                ('a changed file', lambda work: change(work / 'new/data/train/1200')),
                ('a new file', lambda work: write(work / 'new', {'data/test/00': 'new'})),
                ('a forged length', lambda work: change(work / 'journal', b'"data/train", ', b'"data/train", 1')),
                ('a link', lambda work: (remove(work / 'new/data/train'), write(
                    work / 'new', {'data/train': ('->', str(self.root / 'data/train'))}))),
                ('another dataset', lambda work: (write(self.root, {'data/train/0001': 'other'}), self.etc(
                    'push', '-f', 'X', home='pub')))):
            with self.subTest(home):
                shutil.copytree(self.tmp / 'home', self.tmp / home)
                harm(self.tmp / home / work)
                self.etc('pull', 'X', home=home, status=None)  # which may be refused in the end, and then forgotten
                self.pulled(home)

    def test_lost_network_keeps_what_came(self):
        size = self.large()
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None

        def fault(handler):
            start = re.match(r'bytes=(\d+)', handler.headers.get('Range', ''))
            if start and size / 2 <= int(start.group(1)) < size - 65536:
                handler.close_connection = True
                return True
        self.server.fault = fault
        self.assertIn('cannot reach %s: ' % self.server.url, self.etc('pull', 'X', status=1)[1])
        self.server.fault = None
        self.etc('create', 'Y')
        self.assertEqual((self.installed(), len(self.leftovers())), (['Y'], 1), 'another dataset leaves it alone')
        shutil.copytree(self.tmp / 'home', self.tmp / 'two')
        self.assertLess(self.pulled(), size * 0.8)
        self.age(*self.leftovers('two'))
        self.etc('create', 'Z', home='two')
        self.assertEqual(self.leftovers('two'), [])

    def test_work_of_the_living_stays(self):
        """However old it is; that of the dead goes, and that of other hosts after a day."""
        self.publish()
        process, go_on = self.start('pull', 'X')
        live, = self.leftovers()
        gone = subprocess.Popen([sys.executable, '-c', ''])
        gone.wait()
        dead, away, away_for_long = [live.with_name('@'.join(['X', host, str(number), tag])) for host, number, tag in (
            (live.name.split('@')[1], gone.pid, 'aa'), ('elsewhere', 1, 'bb'), ('elsewhere', 1, 'cc'))]
        for path in dead, away, away_for_long:
            (path / 'new').mkdir(parents=True)
        self.age(live, away_for_long)
        self.etc('create', 'Y')
        self.assertEqual(sorted(self.leftovers()), sorted([live, away]))
        remove(away)
        go_on.set()
        self.assertEqual(process.communicate()[1][:13], b'etc: pulled X')
        self.check()

    @unittest.skipIf(os.name == 'nt', 'open files cannot be moved')
    def test_readers_of_what_is_replaced(self):
        """They see the old dataset or the new one, whole, and for a quarter of an hour."""
        self.publish(MIB)
        self.etc('pull', 'X')
        versions = [tree(self.root), tree(write(self.tmp / 'new', {'data/train/x': 'new'}))]
        place = '/proc/self/fd/%d' if os.path.isdir('/proc/self/fd') else str(self.tmp / 'home/X')
        kept = os.open(self.tmp / 'home/X', os.O_RDONLY)
        self.addCleanup(os.close, kept)
        seen, stop = [], threading.Event()

        def watch():
            while not stop.is_set():
                with contextlib.suppress(FileNotFoundError):  # between two renames
                    here = os.open(self.tmp / 'home/X', os.O_RDONLY)
                    seen.append(versions.index(tree(place % here)))
                    os.close(here)
            return True
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch) if '%' in place else pool.submit(bool, True)
            for root in [self.tmp / 'new', self.root] * 5:
                self.etc('register', '-f', root, 'X', home='pub')
                self.etc('push', '-f', 'X', home='pub')
                self.etc('pull', '-f', 'X')
                self.etc('register', '--copy', '-f', root, 'X')
            stop.set()
            self.assertTrue(watching.result())
        self.check()
        self.assertEqual(tree(place % kept) if '%' in place else versions[0], versions[0])
        self.etc('create', 'Y')
        replaced = [path for path in (self.tmp / 'home/.etcetera').rglob('data') if path.is_dir()]
        self.assertGreaterEqual(len(replaced), 10)
        for path in replaced:
            self.age(path.parent, path.parent.parent)
        self.etc('create', 'Z')
        self.assertEqual([path for path in replaced if path.exists()], [])

    def test_what_cannot_be_moved(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        here, rename = str(self.tmp / 'home/X'), os.rename
        self.addCleanup(setattr, os, 'rename', rename)
        for what, refused in (('aside', lambda old, new: old == here),
                              ('in', lambda old, new: new == here and old.endswith('new'))):
            def busy(old, new):
                if refused(str(old), str(new)):
                    raise PermissionError(13, 'Permission denied', old)
                rename(old, new)
            with self.subTest(what):
                os.rename = busy
                err = self.etc('register', '--copy', '-f', self.tmp / 'ds', 'X', status=1)[1]
                self.assertIn('cannot change what is in %s: Permission denied;' % (self.tmp / 'home'), err)
                os.rename = rename
                self.etc('verify', 'X')
                self.assertEqual(self.leftovers(), [])

    STEPS = """
import errno, itertools
import etcetera as etc
steps, images = itertools.count(1), sys.argv[2] == 'image'
def slow(function):
    def step(path, *args, **kwargs):
        if images and function.__name__ == 'rename' and os.path.dirname(path) == sys.argv[4]:
            raise OSError(errno.EXDEV, 'Invalid cross-device link', path)
        result = function(path, *args, **kwargs)
        if next(steps) == int(sys.argv[1]):
            os._exit(9)
        return result
    return step
for name in ('mkdir', 'rename', 'rmdir', 'unlink'):
    setattr(os, name, slow(getattr(os, name)))
sys.exit(etc.main(sys.argv[3:]))
"""

    def steps(self, kind, *words):
        """Kill a command at each of its steps; `kind`: 'image' if the store's directories cannot be renamed."""
        for number in itertools.count(1):
            code, out = run_python(self.STEPS, number, kind, '--home', self.tmp / 'home', '--url', self.url, *words)
            if code != 9:
                self.assertEqual((code, number > 2), (0, True), out)
                return
            with self.subTest(number, kind=kind, words=words):
                yield

    def test_killed_at_each_step(self):
        """What was moved aside is put back by whatever command comes next, but not if another one stands there."""
        self.url = (self.tmp / 'share').as_uri()
        old, new = [write(self.tmp / name, {'data/train/x': name}) for name in ('old', 'new')]
        self.share(new, home='pub')
        commands = itertools.cycle([['ls'], ['verify', 'X'], ['info', 'X'], ['create', 'Y', '-f'], ['ls', '-l']])
        for words in (['register', '--copy', '-f', new, 'X'], ['pull', '-f', 'X'], ['register', '-f', new, 'X'],
                      ['purge', 'X']):
            self.etc('register', '--copy', '-f', old, 'X')
            for _ in self.steps('', *words):
                if words[0] != 'purge':
                    self.etc(*next(commands))
                    self.assertIn(tree(self.tmp / 'home/X'), [tree(old), tree(new)])
                if 'X' in self.installed():
                    self.etc('verify', 'X')
                self.assertEqual('X' in self.installed(), os.path.lexists(self.tmp / 'home/X'))
                self.etc('register', '--copy', '-f', old, 'X')
            if words[0] == 'purge':
                self.assertNotIn('X', self.installed(), 'a purge stays one')
            else:
                self.assertEqual(tree(self.tmp / 'home/X'), tree(new))
            self.assertEqual(self.leftovers(), [])

    def test_killed_while_it_removes_what_cannot_be_renamed(self):
        """As in a container's image: nothing half-removed passes for a whole dataset."""
        self.url = (self.tmp / 'share').as_uri()
        root = write(self.tmp / 'ds', {'data/train/x': 'x', 'data/test/y': 'y', 'README.md': 'r'})
        self.share(root, home='pub')
        self.etc('pull', 'X')
        for _ in self.steps('image', 'purge', 'X'):
            if self.installed():
                self.assertEqual(tree(self.tmp / 'home/X'), tree(root))
                self.etc('purge', 'X')
            else:
                for use in etc.dataset, etc.verify, etc.push, etc.info:
                    self.assertRaises(etc.NotFound, use, 'X', config=self.config())
            self.etc('pull', 'X')
            self.etc('verify', 'X')
            self.assertEqual(tree(self.tmp / 'home/X'), tree(root))

    def test_many_at_once(self):
        self.publish()
        self.server.sent = 0
        code = '''import etcetera as etc
print(etc.dataset('X', auto_install=True, config=etc.Config(%r, home=%r, **%r)).digest)
''' % (self.url, str(self.tmp / 'home'), self.settings)
        with ThreadPoolExecutor(8) as pool:
            results = set(pool.map(run_python, [code] * 8))
        self.assertEqual(results, {(0, etc.Dataset(self.root).digest + '\n')})
        self.check()
        self.assertLess(self.server.sent, 1.5 * 20 * MIB)

    @unittest.skipIf(os.name == 'nt', 'no such locks there')
    def test_many_at_once_where_locks_do_nothing(self):
        """As on some cluster file systems, where all of them succeed."""
        import fcntl
        self.publish(4 * MIB)
        self.addCleanup(setattr, fcntl, 'flock', fcntl.flock)
        fcntl.flock = lambda file, operation: None
        with ThreadPoolExecutor(6) as pool:
            pulls = [pool.submit(etc.pull, 'X', config=self.config()) for _ in range(6)]
        self.assertEqual({pull.result().digest for pull in pulls}, {etc.Dataset(self.root).digest})
        self.check()
        self.etc('verify', 'X')

    @unittest.skipIf(os.name == 'nt', 'no such locks there')
    def test_waiting_blocks_no_process(self):
        """As its other green threads may hold the lock."""
        import fcntl
        self.publish(MIB)
        flock, asked = fcntl.flock, []
        self.addCleanup(setattr, fcntl, 'flock', flock)

        def polled(file, operation):
            asked.append(operation & fcntl.LOCK_NB)
            flock(file, operation | fcntl.LOCK_NB)
        fcntl.flock = polled
        (self.tmp / 'home/.etcetera/locks').mkdir(parents=True)
        with ThreadPoolExecutor(1) as pool:
            with open(self.tmp / 'home/.etcetera/locks/X', 'ab') as held:
                flock(held, fcntl.LOCK_EX)
                pull = pool.submit(etc.pull, 'X', config=self.config())
                until = time.time() + 20
                while len(asked) < 3 and time.time() < until and not pull.done():
                    time.sleep(0.02)
                self.assertEqual((pull.done(), all(asked), len(asked) >= 3), (False, True, True))
            self.assertEqual(pull.result().digest, etc.Dataset(self.root).digest)

    def test_home_that_is_a_file(self):
        self.publish(MIB)
        write(self.tmp, {'file': 'x'})
        err = self.etc('pull', 'X', home='file/home', status=1)[1]
        self.assertIn(('Not a directory: ' if os.name == 'posix' else '') + str(self.tmp / 'file'), err)


class Receipts(Case):
    """What is known of a dataset goes where it goes, and is believed of no other."""

    def setUp(self):
        super().setUp()
        self.root = small(self.tmp / 'ds')
        self.share(self.root, home='pub')

    def known(self, name='X', home='home'):
        found = etc.info(name, config=self.config(home))
        return found['when'] is not None, found['partial']

    def damage(self, path):
        path.chmod(0o644)
        path.write_text('damaged')

    def test_copies_of_a_store(self):
        self.etc('pull', '-p', 'test', 'X')
        for home, command in (('copy', 'cp -r home copy'), ('times', 'cp -rp home times'),
                              ('tar', 'mkdir tar && tar -cf - -C home . | tar -xf - -C tar'),
                              ('touched', 'cp -r home touched && touch touched/X')):
            with self.subTest(home):
                subprocess.check_call(['sh', '-c', command], cwd=str(self.tmp))
                self.assertEqual(self.known(home=home), (True, True))
                for words in (['push', 'X'], ['register', '--copy', self.root, 'X']):
                    self.etc(*words, home=home, status=1)
                with self.assertRaisesRegex(etc.NotFound, 'only partly installed, without assets, data/train;'):
                    etc.dataset('X', config=self.config(home))
                self.assertEqual(etc.dataset('X', True, config=self.config(home)).keys(), {'test', 'train'})
                self.etc('verify', 'X', home=home)
                self.damage(self.tmp / home / 'X/data/test/c.txt')
                self.assertIn("'X' is not what was installed: data/test differs", self.etc(
                    'verify', 'X', home=home, status=1)[1])

    @unittest.skipIf(os.name == 'nt', 'no links there')
    def test_believed_of_no_other(self):
        self.etc('pull', '-p', 'test', 'X')
        here = self.tmp / 'home/X'
        shutil.copytree(here, self.tmp / 'home/Y')  # another name
        self.etc('register', here, 'Z')
        write(self.tmp / 'two', {'X': ('->', str(here))})
        for name, home in (('Y', 'home'), ('Z', 'home'), ('X', 'two')):
            with self.subTest(name, home=home):
                self.assertEqual(self.known(name, home), (False, False))

    def test_no_part_of_the_dataset(self):
        """It is in no archive and no digest, and in no directory that is registered."""
        self.etc('pull', 'X')
        before = sorted(os.listdir(self.root))
        for name, root in (('Y', self.tmp / 'home/X'), ('X', self.root)):
            self.etc('register', '-f', root, name, home='pub')
            for words in (['push', '-f'], ['pull'], ['verify'], ['info']):
                self.etc(*words, name, home='pub')
            self.etc('pull', name, home='two')
            self.assertEqual(tree(self.tmp / 'two' / name), tree(self.root))
            self.assertEqual(self.known(name, 'two'), (True, False))
        self.assertEqual(sorted(os.listdir(self.root)), before)
        self.assertEqual(etc.Dataset(self.tmp / 'home/X').digest, etc.Dataset(self.root).digest)

    def test_partitions_one_by_one(self):
        remove(self.root / 'assets')
        self.etc('push', '-f', 'X', home='pub')
        for partition, partial in (('test', True), ('test', True), ('train', False)):
            self.etc('pull', '-p', partition, 'X')
            self.assertEqual(self.known(), (True, partial))
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.root))
        self.etc('push', 'X')

    def test_odd_ones(self):
        """What is no receipt tells nothing; one with odd times is still one."""
        self.etc('pull', 'X')
        path = self.tmp / 'home/X/.etcetera.json'
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o444)
        good = json.loads(path.read_text())
        self.assertIn('X', good.values())
        texts, first = [key for key in good if isinstance(good[key], str)], good['segments'][0]
        bad = [{key: value} for key in texts for value in (None, 5, ['x', 5], {})]
        bad += [{'segments': [dict(first, **{key: value})]} for key in first for value in (None, [], 1.5)]
        bad += [{'segments': [dict(first, path='data/\ud800')]}, {'segments': None}, {'segments': [5]}]
        rows = [json.dumps(dict(good, **change)) for change in bad]
        for text in rows + ['[' * 100000, 'null', '5', '{}', '"x"', '', '\0', '\xff']:
            with self.subTest(text[:200]):
                path.chmod(0o644)
                path.write_text(text, encoding='latin-1')
                self.assertEqual(self.known(), (False, False))
                for words in (['ls', '-l'], ['verify', 'X'], ['pull', 'X'], ['push', 'X']):
                    self.etc(*words)
        for when in ('', 'x', '9999-12-31T23:59:59Z', '0001-01-01T00:00:00Z', '2050-01-01T00:00:00+99:99'):
            with self.subTest(when):
                path.write_text(json.dumps(dict(good, when=when)))
                self.assertEqual(etc.info('X', config=self.config())['when'], when)
                for words in (['ls', '-l'], ['info', 'X']):
                    self.etc(*words)

    def test_pull_of_what_is_here(self):
        """It says what is known: nothing was read."""
        self.etc('pull', 'X')
        self.damage(self.tmp / 'home/X/data/test/c.txt')
        for name in 'X', 'X@' + etc.info('X', True, self.config())['digest']:
            self.assertRegex(self.etc('pull', name)[1], r"installed already\b.*'etc verify.*' reads it again\n\Z")
        self.etc('verify', 'X', status=1)

    def test_force_narrows_nothing(self):
        """It replaces other contents, and what is not as it was."""
        self.etc('pull', 'X')
        self.etc('pull', '-f', '-p', 'test', 'X')
        self.assertEqual((tree(self.tmp / 'home/X'), self.known()), (tree(self.root), (True, False)))
        for what, spoil in (('a file more', lambda here: write(here, {'data/stray': 'x'})),
                            ('a link', lambda here: os.symlink('nowhere', here / 'link')),
                            ('a file less', lambda here: remove(here / 'data/train/a.txt')),
                            ('other bytes', lambda here: self.damage(here / 'data/train/a.txt'))):
            with self.subTest(what):
                spoil(self.tmp / 'home/X')
                self.etc('pull', '-f', 'X')
                self.assertEqual(tree(self.tmp / 'home/X'), tree(self.root))
        write(self.root, {'data/test/c.txt': 'newer'})
        self.etc('push', '-f', 'X', home='pub')
        self.assertIn('train', self.etc('pull', '-f', '-p', 'test', 'X')[1], 'it says what goes')
        self.assertEqual(self.known(), (True, True))

    def test_a_partition_that_is_not_here(self):
        self.etc('pull', '-p', 'test', 'X')
        ds = etc.dataset('X', partitions=['test'], config=self.config())
        with self.assertRaisesRegex(etc.UnknownPartition, r"'train'.*(not here|not installed|'etc pull)"):
            ds['train']
        with self.assertRaisesRegex(etc.UnknownPartition, "no partition 'nope'"):
            ds['nope']


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
        shutil.copytree(self.old, self.new, symlinks=True)
        write(self.new, {'README.md': 'the second one'})
        self.share(self.old, 'Old', home='pub')
        self.share(self.new, 'New', home='pub')
        self.etc('pull', 'Old')
        self.here = self.tmp / 'home'

    def pulled(self, *args):
        """Pull; returns how many MiB the server sent, and what was said."""
        before = self.server.sent
        err = self.etc('pull', *args)[1]
        self.etc('verify', args[-1])
        return (self.server.sent - before) / MIB, err

    def test_another_version_and_another_name(self):
        self.share(self.old, 'Renamed', home='pub')
        for name, root in (('New', self.new), ('Renamed', self.old)):
            with self.subTest(name):
                sent, err = self.pulled(name)
                self.assertLess(sent, 0.02)
                self.assertRegex(err, r'pulled %s: 7 files, 6\.29 MB in [^(]*; 6\.29 MB were here already' % name)
                if os.name != 'nt':
                    self.assertTrue(os.path.samefile(self.here / 'Old/data/test/x', self.here / name / 'data/test/x'))
        self.etc('purge', 'Old')
        self.etc('verify', 'New')
        self.assertEqual(tree(self.here / 'New'), tree(self.new))

    def test_several_sources(self):
        write(self.tmp / 'third', {'data/val/v': noise(3 * MIB, 7)})
        self.share(self.tmp / 'third', 'Third', home='pub')
        self.etc('pull', 'Third')
        write(self.new, {'data/val/v': noise(3 * MIB, 7), 'data/more/m': noise(MIB, 8)})
        self.share(self.new, 'Sum', home='pub')
        sent, err = self.pulled('Sum')
        self.assertTrue(1 < sent < 1.03, sent)
        self.assertIn('; 9.44 MB were here already', err)
        self.assertEqual(tree(self.here / 'Sum'), tree(self.new))

    def test_some_partitions_and_the_rest(self):
        sent, err = self.pulled('-p', 'test', 'New')
        self.assertLess(sent, 0.02)
        self.assertIn('pulled New: 3 files, 2.1 MB', err)
        self.assertEqual(os.listdir(self.here / 'New/data'), ['test'])
        self.etc('purge', 'Old')
        sent, err = self.pulled('New')
        self.assertTrue(4 < sent < 4.1, sent)
        self.assertIn('; 2.1 MB were here already', err)
        self.assertEqual(tree(self.here / 'New'), tree(self.new))

    def test_forced(self):
        self.etc('register', self.new, 'Old', '-f', home='pub')
        self.etc('push', '-f', 'Old', home='pub')
        self.assertLess(self.pulled('-f', 'Old')[0], 0.02)
        self.assertEqual(tree(self.here / 'Old'), tree(self.new))

    def test_what_changed_is_fetched(self):
        """And nothing that was damaged here spreads."""
        path = self.here / 'Old/data/train/2'
        for name, damage in (
                ('other bytes', lambda: (path.chmod(0o644), path.write_bytes(noise(MIB, 77)))),
                ('a file less', lambda: remove(path)),
                ('a file more', lambda: write(path.parent, {'2': noise(MIB, 2), 'more': 'm'})),
                ('no directory', lambda: remove(path.parent))):
            with self.subTest(name):
                damage()
                sent, err = self.pulled('New')
                self.assertTrue(4 < sent < 4.1, sent)
                self.assertEqual(tree(self.here / 'New'), tree(self.new))
                self.etc('purge', 'New')

    @unittest.skipIf(os.name == 'nt', 'no modes and links there')
    def test_odd_files(self):
        """What cannot be read is fetched; what is writable is copied, so that nobody can change it in both; no links."""
        old, new, file = [self.here / name for name in ('Old/data/test/x', 'New/data/test/x', 'Old/data/train/2')]
        old.chmod(0)
        with unprivileged(self.here, self.tmp):
            self.assertGreater(self.pulled('New')[0], 2)
        self.etc('purge', 'New')
        old.chmod(0o644)
        file.rename(self.tmp / 'blob')
        file.symlink_to(self.tmp / 'blob')
        self.etc('pull', 'New')
        self.assertEqual(stat.S_IMODE(new.stat().st_mode), 0o444)
        old.write_bytes(b'changed')
        remove(self.tmp / 'blob')
        self.etc('verify', 'New')
        self.assertEqual(tree(self.here / 'New'), tree(self.new))

    def test_changed_meanwhile(self):
        """What is linked is what was hashed, whatever happens to the other dataset."""
        write(self.new, {'data/train/2': noise(MIB, 22)})
        self.etc('register', '-f', self.new, 'Old', home='pub')

        def replace():
            self.etc('pull', 'Old')
            self.etc('push', '-f', 'Old', home='pub')
            self.etc('pull', '-f', 'Old')

        for change in (lambda: self.etc('purge', 'Old')), replace:
            changes = [change]
            etc.pull('New', config=self.config(), progress=lambda done, total: changes and changes.pop()())
            self.assertEqual(changes, [])
            self.etc('verify', 'New')
            self.assertEqual((self.here / 'New/data/train/2').read_bytes(), noise(MIB, 2))
            self.etc('purge', 'New')

    def test_interrupted(self):
        """What could be linked is linked again."""
        write(self.new, {'data/late/%d' % n: noise(MIB, 50 + n) for n in range(20)})
        self.share(self.new, 'Long', home='pub')
        asked = itertools.count()
        self.server.fault = lambda handler: next(asked) > 5 and (handler.error(403, 'AccessDenied') or True)
        self.etc('pull', 'Long', status=1)
        self.server.fault = None
        self.assertLess(self.pulled('Long')[0], 21)
        self.assertEqual((tree(self.here / 'Long'), self.leftovers()), (tree(self.new), []))


class PushReuse(S3Case):
    """What archives in the bucket hold is copied there, and not sent."""

    def setUp(self):
        super().setUp()
        self.old = write(self.tmp / 'old', {'data/test/y': noise(11 * MIB, 2), 'data/train/x': noise(12 * MIB, 1),
                                            'data/val/z': noise(11 * MIB, 3), 'README.md': 'one', 'assets/a': 'a'})
        self.share(self.old, 'Old')
        self.kept = self.server.objects['some/prefix/Old.tgz']
        self.new = self.tmp / 'new'
        shutil.copytree(self.old, self.new, copy_function=os.link)
        self.change('README.md', 'the second one')

    def change(self, name, content):
        remove(self.new / name)
        write(self.new, {name: content})
        self.etc('register', '-f', self.new, 'New')

    def restore(self, data=None, **others):
        """Let the bucket hold nothing but Old, with these bytes, and others."""
        self.server.objects = {'some/prefix/%s.tgz' % name: (content, '"%s"' % name, {})
                               for name, content in dict(others, Old=data or self.kept[0]).items()}

    def pushed(self, *args, fault=lambda handler: None):
        """Push; returns how many MiB were sent, and what was said. What is there must be what was to be pushed."""
        sent = []
        self.server.log.clear()
        self.server.fault = lambda handler: sent.append(int(handler.headers['Content-Length'] or 0)) or fault(handler)
        err = self.etc('push', '-v', *args)[1]
        self.server.fault = None
        self.assertEqual(self.server.uploads, {})
        name = args[-1]
        self.etc('pull', name, home='other')
        self.assertEqual(tree(self.tmp / 'other' / name), tree(self.tmp / 'home' / name))
        remove(self.tmp / 'other')
        return sum(sent) / MIB, err

    def copies(self):
        return [path for _, path, headers in self.server.log if headers['x-amz-copy-source']]

    def test_what_is_new_is_sent(self):
        self.etc('register', self.old, 'Renamed')
        for name, least, most in (('New', 0, 6), ('Renamed', 0, 6)):
            with self.subTest(name):
                sent, err = self.pushed(name)
                self.assertTrue(least < sent < most, sent)
                self.assertRegex(err, r'pushed %s to .*: 5 files, 35\.7 MB in [^(]*; 35\.7 MB were there' % name)
                self.assertTrue(self.copies())
        for name, size, most in (('data/test/y', 11, 17), ('data/train/x', 12, 23), ('data/val/z', 11, 17)):
            with self.subTest(name):
                self.restore()
                self.change(name, noise(size * MIB, name))
                sent, err = self.pushed('New')
                self.assertTrue(size < sent < most, sent)
                self.change(name, (self.old / name).read_bytes())
        self.etc('register', '-f', self.new, 'Old')
        self.assertLess(self.pushed('-f', 'Old')[0], 6)

    def test_several_sources(self):
        self.change('data/test/y', noise(11 * MIB, 4))
        self.etc('push', 'New')
        self.change('data/train/x', noise(12 * MIB, 5))
        self.change('data/more/m', noise(MIB, 6))
        self.etc('register', self.new, 'Third')
        sent, err = self.pushed('Third')
        self.assertTrue(13 < sent < 22, sent)
        self.assertIn('; 23.1 MB were there already', err)

    def test_nothing_that_is_the_same(self):
        """Of the same size, or too small, or by force what is there already, which may be damaged where nobody looks."""
        for name, seed in (('data/train/x', 5), ('data/test/y', 6), ('data/val/z', 7)):
            self.change(name, noise((self.old / name).stat().st_size, seed))
        small_ones = write(self.tmp / 'many', {'data/%02d/x' % n: noise(MIB, n) for n in range(34)})
        self.share(small_ones, 'Many')
        self.etc('register', write(small_ones, {'README.md': 'new'}), 'Others')
        data, middle = self.kept[0], len(self.kept[0]) // 2
        damaged = data[:middle] + bytes(MIB) + data[middle + MIB:]
        for args in ['New'], ['Others'], ['-f', 'Old']:
            with self.subTest(args):
                if args[0] != 'Others':
                    self.restore(damaged)
                sent, err = self.pushed(*args)
                self.assertTrue(34 < sent < 35, sent)
                self.assertNotIn('already', err)
        self.etc('register', write(self.tmp / 'less', {'data/x/x': noise(16 * MIB, 2)}), 'Less')
        self.pushed('Less')
        self.assertEqual([path for path in self.requests('GET') if 'Old' in path], [], 'it is not worth a look')

    def test_sources_that_cannot_be_read(self):
        """Archives of other tools, damaged ones, archived ones: none hinders a push."""
        data = self.kept[0]
        self.restore(Damaged=data[:-20] + bytes(20), Foreign=gzip.compress(data, 0), Empty=bytes(30 * MIB))
        tries = []

        def fault(handler):
            if handler.path.endswith('/Empty.tgz'):
                return handler.error(403, 'InvalidObjectState') or True
            if handler.path.endswith('/Damaged.tgz'):
                tries.append(1)
                handler.close_connection = True
                return True
        self.assertLess(self.pushed('New', fault=fault)[0], 6)
        self.assertLessEqual(len(tries), 4, 'no long wait: two, and each again if a kept connection was closed')

    def test_damaged_sources(self):
        """The ends of what would be copied are compared with the files before anything is copied."""
        data = self.kept[0]
        at, end = data.index(b'data/test/\0'), data.index(noise(11 * MIB, 2)[-99:])
        for what, bad in (('first block', data[:at] + b'D' + data[at + 1:]), ('last', data[:end] + b'D' + data[end + 1:]),
                          ('sound, but for its checksums', data.replace(b'data/test/y\0', b'data/test/z\0'))):
            with self.subTest(what):
                self.restore(bad)
                self.change('data/train/x', noise(12 * MIB, 5))
                self.change('data/val/z', noise(11 * MIB, 5))
                sent, err = self.pushed('New')
                self.assertGreater(sent, 33)
                self.assertNotIn('already', err)
                self.assertEqual(self.copies(), [])

    def test_stores_that_cannot_copy(self):
        """All is sent, and a line of -v tells why."""
        def refusing(status, code):
            return lambda handler: handler.headers['x-amz-copy-source'] and (handler.error(status, code) or True)

        def unknowing(handler):  # stores an empty part
            if handler.headers['x-amz-copy-source']:
                number = re.search(r'partNumber=(\d+)', handler.path).group(1)
                list(self.server.uploads.values())[0][1][int(number)] = b''
                return handler.answer(200, b'', {'ETag': '"x"'}) or True

        def anonymous(handler):  # its parts have no ETag
            if handler.headers['x-amz-copy-source']:
                return handler.answer(200, b'<CopyPartResult><ETag/></CopyPartResult>') or True

        def equal(handler):  # as R2
            if handler.command == 'POST' and 'uploadId' in handler.path and self.copies() and not refused:
                refused.append(1)
                return handler.error(400, 'InvalidPart', message='All non-trailing parts must have one length.') or True

        def replacing(handler):
            if handler.headers['x-amz-copy-source']:
                self.server.objects['some/prefix/Old.tgz'] = self.kept[0], '"other"', {}

        def removing(handler):
            if handler.headers['x-amz-copy-source']:
                self.server.objects.pop('some/prefix/Old.tgz', None)

        def listing(handler):
            if 'list-type' in handler.path:
                return handler.error(403, 'AccessDenied') or True

        def failing_then(handler):  # faults are then met with as many tries as ever
            if 'partNumber=2' in handler.path and not handler.headers['x-amz-copy-source'] and len(refused) < 4:
                refused.append(1)
                return handler.error(503, 'SlowDown') or True
            return refusing(501, 'NotImplemented')(handler)

        for name, fault, copied, said in (
                ('unknown', unknowing, None, ''), ('no ETag', anonymous, None, ''), ('may not list', listing, None, '403'),
                ('not implemented', refusing(501, 'NotImplemented'), None, '501 NotImplemented'),
                ('always an error', refusing(200, 'InvalidRequest'), None, ''),
                ('forbidden', refusing(403, 'AccessDenied'), None, '403 AccessDenied'),
                ('equal parts', equal, None, 'All non-trailing parts must have one length'),
                ('the whole object', lambda handler: None, lambda data, start, stop: data, ''),
                ('replaced meanwhile', replacing, None, '(replaced|412)'), ('removed meanwhile', removing, None, '404'),
                ('failing then', failing_then, None, '501')):
            with self.subTest(name):
                refused = []
                self.restore()
                self.server.copied = copied
                sent, err = self.pushed('New', fault=fault)
                self.assertGreater(sent, 33)
                self.assertRegex(err, 'etc: nothing is copied.*' + said)
                self.assertNotIn('already', err)
                self.assertEqual(len(refused), {'equal parts': 1, 'failing then': 4}.get(name, 0))

    def test_keys_that_some_stores_decode_twice(self):
        self.url = 's3://bucket/100%25/x'
        self.etc('push', 'Old')
        sent, err = self.pushed('New')
        self.assertGreater(sent, 33)
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
        self.server.copied = lambda data, start, stop: data[start:stop] + b'more'
        for refused, left in (('POST', ['Old']), ('DELETE', ['New', 'Old'])):
            with self.subTest(refused):
                begun = itertools.count()

                def fault(handler):
                    is_again = handler.path.endswith('?uploads=') and next(begun)
                    if is_again or handler.command == refused == 'DELETE':
                        return handler.error(403, 'AccessDenied') or True
                self.server.fault = fault
                err = self.etc('push', 'New', status=1)[1]
                self.server.fault = None
                self.assertEqual(sorted(key[12:-4] for key in self.server.objects), left)
                self.assertIn('403 AccessDenied' if refused == 'POST' else "'etc push -f New' replaces it", err)
        self.server.copied = None
        self.server.uploads.clear()
        self.pushed('-f', 'New')

    def test_another_push_is_faster(self):
        def overtaking(handler):
            if handler.headers['x-amz-copy-source']:
                self.server.objects['some/prefix/New.tgz'] = self.kept
        self.server.fault = overtaking
        self.assertIn("another 'New' is in", self.etc('push', 'New', status=1)[1])
        self.assertEqual(self.server.uploads, {})

    def test_overtaken_at_the_end(self):
        """By a push -f, or a purge, before this one has looked what is there: it is said, and nothing is sent again."""
        for what, then in (('replaced', {'some/prefix/New.tgz': self.kept}), ('gone', {})):
            with self.subTest(what):
                self.restore()

                def final(handler):
                    self.server.objects.pop('some/prefix/New.tgz')
                    self.server.objects.update(then)
                    handler.answer(200, COMPLETED % (b'', b'', b'', b'mine'))
                self.server.final = final
                self.server.log.clear()
                err = self.etc('push', 'New', status=None)[1]
                self.server.final = None
                self.assertTrue(self.copies())
                self.assertEqual(self.server.objects.get('some/prefix/New.tgz'), then.get('some/prefix/New.tgz'))
                self.assertNotRegex(err, 'cannot reach|interrupted')
                self.assertRegex(err, "New' .*(another|replaced|overtaken|removed|gone)")
                self.assertEqual(sum('uploads' in path for path in self.requests('POST')), 1)

    def test_object_lock(self):
        self.server.must_check = True
        self.assertLess(self.pushed('New')[0], 11)  # the first part twice, as this is learned by a refusal

    @unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
    def test_killed(self):
        """At each request of a push: nothing, or all, is there, and the next push succeeds."""
        self.pushed('New')
        whole = self.server.objects['some/prefix/New.tgz'][0]
        for number in range(1, len(self.requests()) + 1, 1 if RUNS > 1 else 3):
            with self.subTest(number):
                self.restore()
                self.server.uploads.clear()
                left = itertools.count(1)
                self.server.fault = lambda handler: next(left) == number and process.kill()
                process = self.spawn('push', 'New')
                process.communicate()
                self.server.fault = None
                self.assertIn(self.server.objects.get('some/prefix/New.tgz', (None,))[0], (None, whole))
                self.etc('push', 'New')
                self.assertEqual(self.server.objects['some/prefix/New.tgz'][0], whole)


class Disks(Case):
    """File systems that cannot do all that is usual."""

    def publish(self):
        self.share(odd(self.tmp / 'ds', 40), home='pub')

    def preload(self, source):
        """Put functions in C before those of the system, in the processes that are spawned."""
        if sys.platform != 'linux' or not shutil.which('gcc'):
            self.skipTest('no gcc here')
        write(self.tmp, {'disk.c': source})
        subprocess.check_call(['gcc', '-shared', '-fPIC', '-o', 'disk.so', 'disk.c', '-ldl'], cwd=str(self.tmp))
        os.environ['LD_PRELOAD'] = str(self.tmp / 'disk.so')

    def test_disk_without_modes_and_links(self):
        """As exFAT: all files are executable, and there are no symbolic links."""
        self.publish()
        self.share(small(self.tmp / 'small'), 'Y', home='pub')
        self.preload(NO_MODES)
        no_links = 'this disk cannot hold links: Operation not permitted; '
        for command, said in (
                (['pull', 'X'], no_links + "set 'home' to a place on another disk"),
                (['register', self.tmp / 'ds'], no_links + "'etc register --copy'"), (['pull', 'Y'], 'pulled Y'),
                (['verify', 'Y'], "; this disk does not keep executable bits; set 'home' to a place on another")):
            with self.subTest(command):
                self.assertIn(said, self.spawn(*command).communicate()[1].decode())

    def test_disk_that_is_picky(self):
        """It opens no read-only file for writing, makes no hard links, and changes no modes."""
        self.publish()
        self.preload(PICKY)
        for command in (['pull', '-p', 'test', 'X'], ['pull', 'X'], ['pull', '-f', 'X'], ['verify', 'X'],
                        ['register', '--copy', self.tmp / 'ds', 'Y'], ['push', 'Y'], ['purge', 'Y']):
            with self.subTest(command):
                process = self.spawn(*command)
                self.assertEqual((process.communicate()[1][:5], process.returncode), (b'etc: ', 0))
        del os.environ['LD_PRELOAD']
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.tmp / 'ds'))
        self.assertEqual(sorted(os.listdir(self.tmp / 'share')), ['X.tgz', 'Y.tgz'])

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

    def lock(self, place, mode=0o555):
        for path in [place] + list(place.rglob('*')):
            if path.is_dir() and not path.is_symlink():
                path.chmod(mode)

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_read_only_store(self):
        self.publish()
        self.etc('pull', 'X')
        remove(self.tmp / 'home/.etcetera/locks')
        self.etc('ls', '-r')  # writes the settings
        self.lock(self.tmp / 'home')
        self.addCleanup(self.lock, self.tmp / 'home', 0o755)
        problem = "cannot change what is in %s: Permission denied; ask who owns it, or set 'home'" % (self.tmp / 'home')
        with unprivileged(self.tmp / 'settings.yaml'):
            self.assertIn('installed already', self.etc('pull', 'X')[1])
            self.assertEqual(self.etc('ls')[0], 'X\n')
            self.assertEqual(len(etc.dataset('X', auto_install=True, config=self.config())), 3)
            self.etc('verify', 'X')
            for command in (['pull', '-f', 'X'], ['purge', 'X'], ['create', 'Y'], ['register', self.tmp / 'ds', 'Y'],
                            ['register', '-f', self.tmp / 'ds', 'X'], ['register', '--copy', self.tmp / 'ds', 'Y']):
                with self.subTest(command):
                    self.assertIn(problem, self.etc(*command, status=1)[1])
        self.assertEqual(tree(self.tmp / 'home/X'), tree(self.tmp / 'ds'))

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_read_only_directories_are_replaced(self):
        """And what was private stays private."""
        self.publish()
        self.etc('pull', '-p', 'test', 'X')
        with unprivileged(self.tmp):
            for command in (['pull', 'X'], ['pull', '-f', 'X'], ['purge', 'X']):
                self.lock(self.tmp / 'home/X', 0o500)
                self.etc(*command)
                for data in (self.tmp / 'home/.etcetera').rglob('data'):
                    self.assertEqual(stat.S_IMODE(data.parent.stat().st_mode), 0o700)
        self.assertEqual((self.installed(), self.leftovers()), ([], []))

    def mounted(self, mounts, *command):
        """Run a command among mounts of its own, which vanish with it; its exit status, and what it prints."""
        done = subprocess.run(['unshare', '-m', 'sh', '-ec', mounts + 'shift; exec "$@"', 'sh', str(self.tmp)]
                              + [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        return done.returncode, done.stdout

    def needs_mounts(self, mounts):
        if sys.platform != 'linux' or not shutil.which('unshare') or self.mounted(mounts, 'true')[0]:
            self.skipTest('nothing can be mounted here')

    def test_nothing_is_removed_for_what_cannot_come(self):
        """Where the store's own directory is on another disk, nothing can be installed."""
        write(self.tmp / 'home', {'.etcetera': None})
        mounts = 'mount -t tmpfs tmpfs "$1/home/.etcetera"\n'
        self.needs_mounts(mounts)
        self.publish()
        before = tree(small(self.tmp / 'home/X'))
        code, out = self.mounted(
            mounts, sys.executable, SCRIPT, '--url', self.url, '--home', self.tmp / 'home', 'pull', '-f', 'X')
        self.assertEqual(code, 1, out)
        self.assertEqual(tree(self.tmp / 'home/X'), before)

    def test_directories_of_an_image(self):
        """As in a container, where overlayfs renames none: replacing is refused, and removing works in place."""
        write(self.tmp, {'over': None, 'home': None, 'image': None})
        mounts = '''
            mount -t tmpfs tmpfs "$1/over"
            mkdir "$1/over/upper" "$1/over/work"
            mount -t overlay overlay -o "lowerdir=$1/image,upperdir=$1/over/upper,workdir=$1/over/work" "$1/home"
            '''
        self.needs_mounts(mounts)
        self.publish()
        self.etc('pull', '-p', 'test', 'X', home='image')
        self.etc('register', '--copy', small(self.tmp / 'small'), 'Y', home='image')
        script = '''
            etc() { echo "$*"; "%s" "%s" --url "%s" --home "%s" "$@" || echo "failed"; }
            ! mv -T "$home/X" "$home/Z" 2>/dev/null
            etc pull X; etc pull -f X; etc verify X; etc register --copy -f "%s" Y; etc verify Y
            etc purge X; etc ls; etc pull X; etc verify X; etc pull -f X; etc purge Y; etc ls
            ''' % (sys.executable, SCRIPT, self.url, self.tmp / 'home', self.tmp / 'ds')
        code, out = self.mounted(mounts, 'sh', '-ec', script)
        refused = "'?etc.*purge.*\nfailed\n"
        self.assertRegex(out, ''.join((
            '\\Apull X\n.*', refused, 'pull -f X\n.*', refused, 'verify X\n.*partly installed, and unchanged.*\n',
            'register .*\n.*', refused, 'verify Y\n.*complete and unchanged.*\n', 'purge X\n.*\n', 'ls\nY\n',
            'pull X\n.*pulled X.*\n', 'verify X\n.*\n', 'pull -f X\n.*\n', 'purge Y\n.*\n', 'ls\nX\n\\Z')))


@unittest.skipIf(os.name == 'nt', 'no SIGKILL to send')
class Kills(S3Case):
    """kill -9 at random moments: what stands under a name is what stood there before, or what was to come, whole."""

    def setUp(self):
        super().setUp()
        self.share = (self.tmp / 'share').as_uri()
        self.versions, self.archives = {}, {}
        for version in 'one', 'two':
            root = write(self.tmp / version, {
                'data/train/%02d' % n: noise(100000, '%s %d' % (version, n)) for n in range(30)})
            write(root, {'data/test/noise': noise(6 * MIB, version), 'meta.json': '{"v": "%s"}' % version,
                         'data/train/00': 'shared'})
            self.etc('register', root, 'X', home='maker-' + version)
            self.etc('push', 'X', home='maker-' + version, url=(self.tmp / 'made' / version).as_uri())
            self.versions[version] = tree(root)
            self.archives[version] = (self.tmp / 'made' / version / 'X.tgz').read_bytes()
        self.etc('register', '--copy', small(self.tmp / 'other'), 'Other')

    def prepare(self, local, remote):
        """Let the store and both remotes hold these versions, or nothing."""
        if 'X' in self.installed():
            self.etc('purge', 'X')
        if local:
            self.etc('register', '--copy', self.tmp / local, 'X')
        self.server.uploads.clear()
        self.server.objects.clear()
        remove(self.tmp / 'share')
        write(self.tmp, {'share': None})
        if remote:
            self.server.objects['some/prefix/X.tgz'] = self.archives[remote], '"%s"' % remote, {}
            write(self.tmp / 'share', {'X.tgz': self.archives[remote]})

    def local(self):
        """The version that is installed; it must be one, and verify."""
        self.assertTrue({'Other'} <= set(self.installed()) <= {'X', 'Other', 'Z'})
        self.etc('verify', 'Other')
        if 'X' not in self.installed():
            self.assertFalse(os.path.lexists(self.tmp / 'home/X'))
            return None
        self.etc('verify', 'X')
        found = tree(self.tmp / 'home/X')
        return [version for version in self.versions if self.versions[version] == found][0]

    def remotes(self):
        found = [data for data, _, _ in self.server.objects.values()]
        found += [path.read_bytes() for path in (self.tmp / 'share').glob('*.tgz')]
        return [[version for version in self.archives if self.archives[version] == data][0] for data in found]

    def signature(self):
        """What a change to the store or the share would alter."""
        for name in ('home/X', 'home/X/data', 'home/X/data/train', 'share', 'share/X.tgz'):
            try:
                status = os.lstat(self.tmp / name)
                yield status.st_ino, status.st_mtime_ns, status.st_size
            except OSError:
                yield None

    def kill(self, process, rng, lasts):
        """At a moment within its usual running time, at a request, or at a change of files."""
        how, left = rng.choice(['moment', 'change', 'request']), itertools.count(1)
        if how == 'request':
            last = rng.randrange(1, 9)
            self.server.fault = lambda handler: next(left) == last and process.kill()
        if how == 'change':
            changes, last = rng.choice([1, 1, 2, 3]), list(self.signature())
            while process.poll() is None and changes:
                now = list(self.signature())
                changes, last = changes - (now != last), now
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.25, 1.05) * lasts)
        process.kill()
        process.communicate()
        self.server.fault = None
        return process.returncode == -signal.SIGKILL

    def test_kills(self):
        push, pull = ['push', 'X'], ['pull', 'X']
        copy = ['register', '--copy', self.tmp / 'two', 'X']
        # the words, where, what is installed and remote before, what may be installed and remote after a kill
        operations = [
            (push, self.url, 'two', None, {'two'}, [[], ['two']]),
            (push, self.share, 'two', None, {'two'}, [[], ['two']]),
            (push + ['-f'], self.url, 'two', 'one', {'two'}, [['one', 'one'], ['two', 'one']]),
            (push + ['-f'], self.share, 'two', 'one', {'two'}, [['one', 'one'], ['one', 'two']]),
            (pull, self.url, None, 'two', {None, 'two'}, None), (pull, self.share, None, 'two', {None, 'two'}, None),
            (pull + ['-f'], self.url, 'one', 'two', {'one', 'two'}, None),
            (copy, self.url, None, None, {None, 'two'}, None),
            (copy + ['-f'], self.url, 'one', None, {'one', 'two'}, None),
            (['purge', 'X'], self.url, 'two', None, {None, 'two'}, None)]
        killed, seeds = 0, itertools.count()
        for args, url, local, remote, locals_, remotes in operations:
            self.prepare(local, remote)
            begin = time.time()
            self.spawn(*args, url=url).communicate()
            lasts = time.time() - begin
            for _ in range(2 * RUNS):
                self.prepare(local, remote)
                seed = next(seeds)
                with self.subTest(seed=seed, args=[str(arg) for arg in args]):
                    killed += self.kill(self.spawn(*args, url=url), random.Random('kill %d' % seed), lasts)
                    found = self.local()
                    self.assertIn(found, locals_)
                    if remotes:
                        self.assertIn(self.remotes(), remotes)
                    # all but -f say so if there is nothing left to do
                    done = args is copy and found == 'two' or args[0] == 'purge' and found is None
                    err = self.etc(*args, url=url, status=int(done))[1]
                    if done:
                        self.assertIn("another 'X' is installed" if args is copy else "no local dataset 'X';", err)
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
    COMMANDS = (('home', 'register --copy ds X', ''), ('home', 'push X', ''), ('home', 'push X', ''), ('home', 'ls -r', ''),
                ('home', 'info -r X', ''), ('two', 'pull -p test X', ''), ('two', 'pull -f X', ''),
                ('two', 'pull Bad', FAILED[0]), ('two', 'pull Nope', FAILED[1]), ('two', 'verify X', ''),
                ('home', 'purge X', ''))

    def setUp(self):
        super().setUp()
        self.put('Bad.tgz', block(bytes(1024)) * 3)
        odd(self.tmp / 'ds', 3)

    def test_strict_interpreter(self):
        python = ['-I', '-S', '-bb', '-W', 'error'] + ['-X', 'dev'] * (sys.version_info >= (3, 7))
        os.environ.update(LC_ALL='C', LANG='C')
        for home, words, problem in self.COMMANDS:
            with self.subTest(words):
                process = self.spawn('-q', *words.split(), home=home, python=python, cwd=str(self.tmp),
                                     stdin=subprocess.DEVNULL, start_new_session=True)
                err = process.communicate()[1].decode()
                self.assertEqual(process.returncode, int(bool(problem)), err)
                self.assertRegex(err, r'\Aetc: %s[^\n]+\n\Z' % problem if problem else r'\A\Z')
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))

    def test_what_is_missing(self):
        """No ssl, no fcntl, no ctypes, no MD5, no $HOME, no entry in the passwords file, no terminal, no stdin."""
        program = '''if True:
            import gc, hashlib, io, json
            sys.stdout = io.StringIO()
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
            import etcetera
            config, url, commands = sys.argv[1:]
            for home, words, problem in json.loads(commands):
                found = etcetera.main(['--config', config, '-q', '--url', url, '--home', home] + words.split())
                assert found == bool(problem), (words, found)
                gc.collect()
            '''
        self.etc('ls')  # writes the settings
        code, out = run_python(program, self.tmp / 'settings.yaml', self.url, json.dumps(self.COMMANDS),
                               flags=['-I', '-S', '-W', 'error'], cwd=str(self.tmp), stdin=subprocess.DEVNULL)
        self.assertEqual(code, 0, out)
        self.assertRegex(out, r'\Aetc: %s[^\n]+\netc: %s[^\n]+\n\Z' % self.FAILED)
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
        write(self.tmp, {'settings.yaml': ''.join(
            '%s: %s\n' % (key, json.dumps(value)) for key, value in self.settings.items())})
        (self.tmp / 'settings.yaml').chmod(0o600)
        remove(self.tmp / 'two')
        small(self.tmp / 'ds')
        place = ['-v', '--config', str(self.tmp / 'settings.yaml'), '--url', self.url, '--home', str(self.tmp / 'home')]
        two, failed = ['--home', str(self.tmp / 'two')], 0
        for words in (['register', '-f', str(self.tmp / 'ds'), 'X'], ['push', '-f', 'X'], ['push', 'X'], ['ls', '-rl'],
                      ['info', '-r', 'X'], two + ['pull', 'X'], two + ['verify', 'X'], ['pull', 'Nope']):
            code, last = self.type(*place + words)
            self.assertIn(code, (0, 1), last)
            if code:
                self.assertRegex(last, problem + "|no local dataset 'X'" * ('verify' in words))
            failed += code
        self.assertGreaterEqual(failed, least)
        with self.heard():
            config = self.config()
            self.said += [repr(config), str(config), '%r' % [config]]
            for function, args in ((etc.ls, [True]), (etc.info, ['X', True]), (etc.push, ['X', True]), (etc.pull, ['X', True])):
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
        own = tuple(str(self.tmp / name) for name in ('settings.yaml', '.aws', 'key.json'))
        for path in self.tmp.rglob('*'):
            if path.is_file() and not str(path).startswith(own):
                self.said.append(path.read_bytes().decode('latin-1'))
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
        self.everything(nope)
        keys = {key: self.settings.pop(key) for key in list(self.settings) if key.startswith('aws_')}
        os.environ.update({key.upper(): value for key, value in keys.items()})
        self.everything(nope)
        for broken, problem in (('hush\nhush', wrong), ('hush\u00e9', wrong), ('hush hush', wrong),
                                ('hush', '403 SignatureDoesNotMatch')):
            with self.subTest(broken):
                os.environ['AWS_SECRET_ACCESS_KEY'] = broken
                self.everything(problem, 6)
        for key in keys:
            del os.environ[key.upper()]
        unreadable = 'credentials cannot be read as an AWS settings file'
        for text, problem, least in (
                ('[default]\n' + ''.join('%s = %s\n' % item for item in keys.items()), nope, 1),
                ('[default]\naws_secret_access_key = hush\n', 'aws_access_key_id and aws_secret_access_key go together', 6),
                ('hush\n', unreadable, 6), ('[default\nhush = hush\n', unreadable, 6),
                ('[default]\naws_secret_access_key\nhush', unreadable, 6),
                ('[default]\naws_access_key_id = a\naws_secret_access_key = hu\u00e9hush\n', wrong, 6)):
            with self.subTest(text):
                write(self.tmp, {'.aws/credentials': text})
                self.everything(problem, least)
        remove(self.tmp / '.aws/credentials')
        yaml = 'this YAML syntax is not supported'
        for value, problem in (('hu\\nhush', '403 InvalidAccessKeyId'), (5, "'aws_secret_access_key' must be text"),
                               (['hush'], yaml), ({'a': 'hush'}, yaml)):
            with self.subTest(value):
                self.settings.update(aws_access_key_id='a', aws_secret_access_key=value)
                self.everything(problem, 6)

    def test_settings_that_cannot_be_read(self):
        syntax, path = '1: this YAML syntax is not supported', self.tmp / 'settings.yaml'
        for line, problem in (
                ('aws_secret_access_key: "hush', '1: a quoted value must end on its line'),
                ('aws_secret_access_key: [hush]', syntax), ('aws_secret_access_key: hush: hush', syntax),
                ('hush', "1: not of the form 'key: value'"), ('aws_secret_access_key: "\\hush"', '1: unknown escape'),
                ('aws_secret_key: hush', "1: unknown setting 'aws_secret_key'"),
                ('aws_session_token: hush\naws_session_token: hush', "2: 'aws_session_token' is set a second time")):
            with self.subTest(line):
                path.write_text(line + '\n')
                code, last = self.type('-v', '--config', str(path), '--url', self.url, 'ls', '-r')
                self.assertEqual((code, 'settings.yaml:' + problem in last), (1, True), last)
                with self.heard():
                    etc.Config.load(path)
                self.search()

    def test_answers(self):
        """Whatever a server says, and wherever it breaks off."""
        self.settings['aws_session_token'] = 'session/hush'
        code = 'SignatureDoesNotMatch'
        for status in (301, 400, 401, 403, 404, 409, 412, 500, 503):
            def fault(handler):
                told = escape(str(handler.headers)), handler.headers['x-amz-security-token']
                xml = '<Error><Code>%s</Code><Message>no</Message><StringToSign>%s</StringToSign><Token>%s</Token></Error>'
                location = {'Location': self.server.url + '/elsewhere'}
                return handler.answer(status, (xml % ((code,) + told)).encode(), location) or True
            with self.subTest(status):
                self.server.fault = fault
                self.everything('answers %d %s: no;' % (status, code), 6)
        self.server.fault = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR) or True
        self.everything('cannot reach ' + self.server.url, 6)
        self.server.fault = lambda handler: handler.answer(200, str(handler.headers).encode()) or True
        self.everything('does not answer (as S3 does|with the range that was asked for)', 5)

    def test_urls(self):
        """Passwords in URLs, where they cannot be used or are of proxies."""
        url, endpoint = self.url, self.settings['endpoint_url']
        for self.url, problem in (
                ('https://user:hush@127.0.0.1:1/x', 'the url has a user or password in it'),
                ('s3://user:hush@bucket', 'not of the form s3://bucket'), ('s3://key:hush@bucket/x', 'not of the form'),
                ('gs://user:hush@bucket', 'not of the form gs://bucket'),
                ('ftp://user:hush@host/x', 'the url; it must start with'),
                ('file://user:hush@host/x', 'the url is no absolute path')):
            with self.subTest(self.url):
                self.everything(problem, 6)
        self.url = url
        for self.settings['endpoint_url'] in (
                endpoint.replace('//', '//user:hush@'), 'http://user:hush@', 'user:hush@host'):
            with self.subTest(self.settings['endpoint_url']):
                self.everything('the endpoint_url must look like https://host', 6)
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
                self.everything(problem, 5)
        self.assertIn('Basic ', proxy.log[0])


# what stands between the marks of a secret
ALPHABETS = {'slash': '/', 'hash': '#', 'at': '@', 'unicode': '\u00e9', 'newline': '\n'}
if RUNS > 1:  # all of them take minutes
    ALPHABETS.update({'plus': '+/', 'equals': '=', 'question': '?', 'colon': ':', 'percent': '%2F', 'space': ' ',
                      'quote': "'", 'json': '", "', 'port': ':1/', 'scheme': '://', 'long': '/' + 'x' * 300})
KEYLESS = {'AWS_ACCESS_KEY_ID': '', 'AWS_SECRET_ACCESS_KEY': ''}


class Places(Hush, S3Case):
    """Secrets where a URL, a path, a name or a choice should be: nothing that is printed, kept or sent may tell them."""

    secrets = '1hush', '2HUSH', '3hush'

    def setUp(self):
        super().setUp()
        os.chdir(self.tmp)
        self.addCleanup(os.chdir, HERE)
        os.environ.update(ETC_HOME=str(self.tmp / 'home'), ETC_URL=self.url, AWS_ENDPOINT_URL=self.server.url,
                          NO_GCE_CHECK='true', AWS_ACCESS_KEY_ID=AKID, AWS_SECRET_ACCESS_KEY=SECRET)
        self.settings = {}
        write(self.tmp, {'file': 'x'})
        etc.register(small(self.tmp / 'ds'), 'X')

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

    def everywhere(self, places, words=('ls', '-r')):
        """places: [(variable or setting, what it holds with %s for a secret, other variables, what is said)]"""
        for alphabet, mark in ALPHABETS.items():
            for name, template, env, says in places:
                with self.subTest(name=name, alphabet=alphabet, template=template):
                    value = template % mark.join(self.secrets)
                    self.settings = {name: value} if name.islower() else {}
                    if mark == '\n' and (name.islower() or name in ('ETC_URL', 'ETC_HOME')):
                        says = 'holds characters that cannot be printed'
                    write(self.tmp, {'settings.yaml': json.dumps(self.settings).strip('{}').replace('"', '', 2)})
                    (self.tmp / 'settings.yaml').chmod(0o600)
                    env = dict(env, ETC_CONFIG=str(self.tmp / 'settings.yaml'))
                    self.told(list(words), 1, says, env if name.islower() else dict(env, **{name: value}))

    def test_paths_and_choices(self):
        role = dict(KEYLESS, AWS_ROLE_ARN='arn:aws:iam::1:role/x')
        token = dict(KEYLESS, AWS_WEB_IDENTITY_TOKEN_FILE='file')
        container = dict(KEYLESS, AWS_CONTAINER_CREDENTIALS_FULL_URI='http://127.0.0.1:1/')
        google = {'ETC_URL': 'gs://bucket', 'AWS_ENDPOINT_URL': ''}
        tls = {'AWS_ENDPOINT_URL': 'https://127.0.0.1:1'}
        here = re.escape(str(self.tmp))
        self.everywhere((
            ('AWS_WEB_IDENTITY_TOKEN_FILE', '%s', role, r'\$AWS_WEB_IDENTITY_TOKEN_FILE names: '),
            ('AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE', '%s', container, r'\$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE names: '),
            ('GOOGLE_APPLICATION_CREDENTIALS', '%s', google, r'\$GOOGLE_APPLICATION_CREDENTIALS'),
            ('google_credentials', '%s', google, 'google_credentials'),
            ('AWS_CA_BUNDLE', '%s', tls, r'\$AWS_CA_BUNDLE'), ('ca_bundle', '%s', tls, 'ca_bundle'),
            ('ETC_CONFIG', '%s', {}, here + r'/\.\.\.'), ('ETC_CONFIG', 'file/%s', {}, here + r'/file/\.\.\.'),
            ('AWS_SHARED_CREDENTIALS_FILE', '%s', KEYLESS, 'no credentials were found'),
            ('AWS_CONFIG_FILE', '%s', KEYLESS, 'no credentials were found'),
            ('AWS_PROFILE', '%s', {}, r'\$AWS_PROFILE'), ('aws_profile', '%s', {}, 'aws_profile'),
            ('AWS_REGION', '%s', {}, r'\$AWS_REGION'), ('region', '%s', {}, "'region'"),
            ('AWS_ROLE_ARN', '%s', token, r'\$AWS_ROLE_ARN')))
        self.everywhere([(name, '%s\u20ac', {}, 'a value that cannot be sent') for name in (
            'storage_class', 'sse', 'sse_kms_key_id', 'request_payer')])
        etc.push('X')  # or pull would not come to look at the home
        home = here + r'/file/\.\.\.'
        for words in (['ls'], ['push', 'X'], ['pull', 'X'], ['create', 'Y'], ['register', 'ds', 'Y']):
            with self.subTest(words):
                self.everywhere((('ETC_HOME', str(self.tmp / 'file/%s'), {}, home),
                                 ('home', str(self.tmp / 'file/%s'), {'ETC_HOME': ''}, home)), words)

    def test_urls(self):
        """Passwords and signatures in URLs, and keys instead of URLs."""
        form, start = 'the url is not of the form', 'it must start with'
        self.everywhere([(name, template, {'ETC_URL': '', 'AWS_ENDPOINT_URL': ''}, says) for name in ('ETC_URL', 'url')
                         for template, says in (
            ('%s', start), ('https://user:%s@127.0.0.1:1/x', 'user or password'),
            ('https://user:x%s@127.0.0.1:1/x', 'user or password'), ('https://127.0.0.1:1/x?sig=%s', 'the url '),
            ('https://127.0.0.1:1/x#%s', 'the url '), ('s3://user:%s@bucket', form), ('gs://user:%s@bucket/x', form),
            ('ftp://user:%s@127.0.0.1:1/x', start), ('file://user:%s@host/x', 'is no absolute path'))])
        self.everywhere([(name, template, more, 'the endpoint_url must look like') for name, more in (
            ('endpoint_url', {}), ('AWS_ENDPOINT_URL', {}), ('AWS_ENDPOINT_URL_S3', {}),
            ('STORAGE_EMULATOR_HOST', {'ETC_URL': 'gs://bucket'}),
            ('AWS_EC2_METADATA_SERVICE_ENDPOINT', dict(KEYLESS, AWS_EC2_METADATA_DISABLED='')))
            for template in ('http://user:%s@127.0.0.1:1', 'http://127.0.0.1:1/?sig=%s')
            + ('%s',) * (name in ('endpoint_url', 'AWS_ENDPOINT_URL'))])
        uri, form = 'AWS_CONTAINER_CREDENTIALS_%s_URI', 'does not have the form https://host'
        self.everywhere([(uri % kind, template, KEYLESS, r'\$%s must b|%s|cannot reach http://127.0.0.1:1: ' % (
            uri % kind, form)) for kind, templates in (
                ('FULL', ('http://user:%s@127.0.0.1:1/', 'https://user:%s@127.0.0.1:1/', '%s', 'http://127.0.0.1:1/?%s',
                          'http://127.0.0.1:1/%s')), ('RELATIVE', (':%s', '@%s', '%s'))) for template in templates])

    def test_queries_that_are_legal(self):
        """In the name of a "directory" of a bucket."""
        for alphabet, mark in ALPHABETS.items():
            for url in ('s3://bucket/x?sig=%s', 's3://bucket/x#%s', 's3://bucket/user:%s@x') * (mark != '\n'):
                self.server.objects.clear()
                os.environ['ETC_URL'] = url % mark.join(self.secrets)
                for words in ('push X', 'push X', 'ls -rl', 'info -r X', '--home two pull X', '--home two info X',
                              '--home two ls -l', 'pull Nope'):
                    with self.subTest(words, alphabet=alphabet, url=url):
                        nope = "no dataset 'Nope' in s3://" if 'Nope' in words else ''
                        self.told(words.split(), int(bool(nope)), nope, sent=False)

    def test_proxies(self):
        """A password may have any character; what is no plain proxy is asked nothing."""
        proxy = Server(Recorder)
        self.addCleanup(proxy.stop)
        os.environ['no_proxy'] = ''
        at = proxy.url[len('http://'):]
        templates = ('https://user:%s@' + at, 'socks5://user:%s@' + at, 'socks5h://' + at + '/%s', 'http://user:%s@',
                     'user:%s@127.0.0.1:x', 'http://user:%s@127.0.0.1:99999', 'http://user:%s@[')
        for (alphabet, mark), scheme in itertools.product(ALPHABETS.items(), ('http', 'https')):
            secret, site = mark.join(self.secrets), {'AWS_ENDPOINT_URL': scheme + '://storage.invalid'}
            for template in templates:
                with self.subTest(alphabet=alphabet, scheme=scheme, template=template):
                    self.told(['ls', '-r'], 1, scheme + '_proxy is not of the form http://',
                              dict(site, **{scheme + '_proxy': template % secret}))
                    self.assertEqual(proxy.log, [])
            if mark != '\n':
                with self.subTest(alphabet=alphabet, scheme=scheme):
                    self.told(['ls', '-r'], 1, 'does not answer as S3|cannot reach https://storage.invalid', dict(
                        site, **{scheme + '_proxy': 'http://user:%s@%s/' % (secret, at)}))
                    if scheme == 'http':
                        sent = re.search('Proxy-Authorization: Basic (.*)', proxy.log[0]).group(1)
                        self.assertEqual(base64.b64decode(sent).decode(), 'user:' + urllib.parse.unquote(secret))
                    del proxy.log[:]

    def test_words(self):
        """On the command line: what is typed is shown, but URLs without password and query."""
        etc.push('X')  # or pull would not come to look at partitions
        name, usage = "is not NAME@sha256:|cannot be a dataset's name", "etc: '?etc.* takes no "
        command, no_directory = 'etc: no command |argument COMMAND', 'no directory'
        templates = ('https://user:%s@127.0.0.1:1/x', 's3://user:%s@bucket', 'https://127.0.0.1/x?sig=%s',
                     'user:%s@127.0.0.1', 'https://%s@127.0.0.1', 'https://127.0.0.1/x#token=%s')
        for (alphabet, mark), template in itertools.product(ALPHABETS.items(), templates):
            word = template % mark.join(self.secrets)
            for line, says in (
                    ('pull %s', name), ('pull X %s', name), ('push %s', name), ('info %s', name), ('info -r %s', name),
                    ('diff X %s', name), ('diff -r %s X', name), ('diff X X %s', 'diff takes two names'),
                    ('ls %s', 'no dataset here matches '), ('purge %s', name), ('verify %s', name), ('create %s', name),
                    ('register %s', no_directory), ('register %s Y', no_directory), ('register ds %s', name),
                    ('register ds as %s', name), ('register %s ds', no_directory), ('%s', command),
                    ('pull X --ulr=%s', usage + '|' + name), ('pull X --force=%s', 'argument -f/--force'),
                    ('--%s', usage + '|' + command), ('-x%s', usage + '|' + command),
                    ('--co=%s ls', 'no settings file|' + usage), ('--config %s ls', 'no settings file'),
                    ('--config file/%s ls', 'cannot be read: '), ('--home file/%s create Y', "Not a directory: |'home' holds"),
                    ('--url %s ls -r', "the url[ ;]|'url' holds"), ('pull X -p %s', 'no partition '),
                    ('create -f Y a %s/', "cannot be a partition's name")):
                with self.subTest(line, word=word):
                    code, last = self.type('-v', *[part.replace('%s', word) for part in line.split()])
                    self.assertIn(code, (1, 2))
                    self.assertRegex(last, says)  # below the traceback
                    for secret in self.secrets:
                        self.assertNotIn(secret, ''.join(self.said))
                    del self.said[:]


class GoogleSecrets(Hush, GoogleCase):
    secrets = 'ya29.token', 'hush'

    def test_credentials(self):
        os.environ['PATH'] = ''  # so that there is no gcloud
        nope, unused, none = "no dataset 'Nope' in", 'key.json cannot be used: ', 'key.json holds no Google credentials;'
        form, header = 'does not have the form', 'a header for http://.* contains invalid characters'
        user = functools.partial(self.user, client_secret='hush', refresh_token='hush')
        account = {'type': 'service_account', 'client_email': 'e', 'token_uri': self.tokens.url}
        pem = '-----BEGIN PRIVATE KEY-----\nhush\n-----END PRIVATE KEY-----'
        external = {'type': 'external_account', 'audience': 'a', 'subject_token_type': 't', 'client_secret': 'hush',
                    'token_url': self.tokens.url, 'credential_source': {'url': 'http://user:hush@127.0.0.1:1/x?key=hush'}}
        self.tokens.respond = lambda handler, form: {'access_token': 'ya29.token', 'expires_in': 3600}
        for what, info, problem in [
                ('right', user(), nope), ('refresh token', user(refresh_token=['hush']), nope),
                ('token_uri', user(token_uri='nonsense'), unused + 'the address of a token'),
                ('private key', dict(account, private_key='hush'), unused + 'private_key'),
                ('list as a private key', dict(account, private_key=['hush']), unused),
                ('PEM', dict(account, private_key=pem), unused + 'private_key'),
                ('no account', {'type': 'service_account', 'private_key': 'hush'}, unused + "'client_email'"),
                ('no type', {'private_key': 'hush'}, none), ('list', ['hush'], none), ('for other tools', external, '.'),
                ('of another kind', dict(external, type='odd'), '.')] + [
                (key, user(**{key: value % secret}), problem)
                for secret in ('hush\nX: y', 'hush\u20ac', 'hu/sh@hush#hush?hush') for key, value, problem in (
                    ('token_uri', 'http://user:%s@127.0.0.1:1/x?key=%%s' % secret, form + '|cannot reach http://127.0.0.1:1: '),
                    ('token_uri', '%s', unused + 'the address of a token'), ('quota_project_id', '%s\n', header))]:
            with self.subTest(what, info=info):
                self.use(info)
                self.everything(problem, 1 if problem == nope else 6)
        (self.tmp / 'key.json').write_text('{"type": "authorized_user", "refresh_token": "hush')
        self.everything(none, 6)

    def test_answers(self):
        self.use(self.user(client_secret='hush', refresh_token='hush'))
        good, unused = {'access_token': 'ya29.token', 'expires_in': 3600}, 'key.json cannot be used: '
        for answer, problem in (
                (dict(good, access_token='hu\nsh hush'), 'access_token'), (dict(good, access_token='hush\u20ac'), 'access_token'),
                (dict(good, access_token=['hush']), 'access_token'), (dict(good, expires_in='soon'), ''),
                ({'hush': 1}, "'access_token'"), (['hush'], '')):
            with self.subTest(answer):
                self.tokens.respond = lambda handler, form: answer
                self.everything(unused + problem, 6)
        self.tokens.respond = lambda handler, form: 'no'
        self.everything('gives no access token: no;', 6)
        self.tokens.respond = lambda handler, form: good
        for status in (301, 308, 400, 401, 403, 404, 412, 500):
            with self.subTest(status):
                location = {'Location': self.server.url + '/x'}
                self.server.fault = lambda handler: handler.answer(status, b'no', location) or True
                self.everything('answers %d: no;' % status, 6)


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
        [sys.executable, SCRIPT] + [str(word) for word in words], env=dict(os.environ, TERM=term),
        start_new_session=True, preexec_fn=lambda: (default_signals(), fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)), **streams)
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


class Progress(Case):
    def told(self, function, *args, home='home', **kwargs):
        """What `progress` is told in the end, after a look whether all of it makes sense."""
        calls = []
        function(*args, progress=lambda done, total: calls.append((done, total, threading.get_ident())),
                 config=self.config(home), **kwargs)
        for total, told in itertools.groupby(calls, lambda call: call[1]):
            told = [done for done, _, _ in told]
            self.assertEqual((told, 0 <= told[0] <= told[-1] <= total), (sorted(told), True))
        self.assertEqual({thread for _, _, thread in calls}, {threading.get_ident()})
        self.assertEqual(calls[-1][0], calls[-1][1])
        return calls[-1][0]

    def test_api(self):
        root = odd(self.tmp / 'ds', 20)
        self.etc('register', root, 'X')
        size = etc.info('X', config=self.config())['size']
        self.assertEqual(self.told(etc.push, 'X'), size)
        archive = os.path.getsize(self.tmp / 'share/X.tgz')
        with tarfile.open(self.tmp / 'share/Foreign.tgz', 'w:gz') as tar:
            tar.add(small(self.tmp / 'small'), '.')
        foreign = os.path.getsize(self.tmp / 'share/Foreign.tgz')
        self.etc('register', '--copy', self.tmp / 'small', 'Z')
        for function, args, more, least, most in (
                (etc.pull, ['X'], {'home': 'two'}, archive - 4096, archive),
                (etc.pull, ['X'], {'partitions': ['empty'], 'home': 'three'}, 1, 4096),
                (etc.dataset, ['X', True], {'home': 'three'}, archive - 8192, archive),
                (etc.pull, ['Foreign'], {}, foreign, foreign), (etc.verify, ['X'], {'home': 'two'}, size, size),
                (etc.diff, ['X', 'X', (True, False)], {}, size, size),  # registered here, so it must be read
                (etc.register, [root, 'Y'], {'copy': True}, size, size)):
            with self.subTest(function.__name__, args=args):
                self.assertTrue(least <= self.told(function, *args, **more) <= most)
        self.assertEqual([tree(self.tmp / home / 'X') for home in ('two', 'three')], [tree(root)] * 2)

    @unittest.skipIf(os.name == 'nt', 'no pseudoterminals')
    def test_terminal(self):
        write(self.tmp / 'ds', {'data/train/big': noise(3 * MIB), 'data/train/small': 'x'})
        etc.register(self.tmp / 'ds', 'MNIST', config=etc.Config())
        for columns in 80, 40, 12:
            for words, what in (('push -f MNIST', 'pushing'), ('verify MNIST', 'verifying'),
                                ('--home %s pull MNIST' % (self.tmp / str(columns)), 'pulling')):
                with self.subTest(what, columns=columns):
                    code, shown = on_terminal('--url', self.url, *words.split(), columns=columns, stdout=subprocess.DEVNULL)
                    *drawn, last = shown.split('\r\033[J')
                    drawn = [line for line in drawn if line]
                    self.assertEqual((code, bool(drawn)), (0, True), shown)
                    for line in drawn:
                        self.assertTrue(line.endswith('\r') and '\n' not in line and len(line) <= columns, drawn)
                        self.assertTrue(line.startswith('%s MNIST'[:14] % what if columns > 12 else what), drawn)
                    self.assertRegex(last, r'\A\r?etc: %sed MNIST.*2 files, 3\.15 MB in [0-9.]+ s \([0-9.]+ [MG]B/s\)\n'
                                     % what[:-3].replace('verify', 'verifi'))
        for words, term in ((['-q', 'push', '-f', 'MNIST'], 'xterm'), (['push', '-f', 'MNIST'], 'dumb')):
            self.assertNotRegex(on_terminal('--url', self.url, *words, term=term)[1], r'\033|pushing')
        self.assertNotRegex(self.etc('pull', 'MNIST')[1], r'[\r\033]')


@unittest.skipIf(os.name == 'nt', 'no pseudoterminals')
class Question(Case):
    """`etc purge -r` as a person on a terminal meets it."""

    def setUp(self):
        super().setUp()
        self.asked = "etc: remove 'X' (1.5 kB) in %s? [y/N] " % self.url
        self.stays = "etc: 'X' (1.5 kB) in %s stays\n" % self.url

    def purge(self, *words, **kwargs):
        """The exit status, what is left, and what was shown."""
        write(self.tmp / 'share', {'X.tgz': 'x' * 1500, 'Y.tgz': 'y'})
        code, shown = on_terminal('--url', self.url, 'purge', *words, **kwargs)
        return code, sorted(path.stem for path in (self.tmp / 'share').iterdir()), shown

    def test_answers(self):
        for answer in ('\n', 'n\n', 'no\n', 'yy\n', '\xff\n', ' \n', '\x04'):
            with self.subTest(answer):
                code, left, shown = self.purge('-r', 'X', answers=[answer.encode('latin-1')])
                self.assertEqual((code, left, shown[:len(self.asked)]), (1, ['X', 'Y'], self.asked))
                self.assertTrue(shown.endswith('\n' + self.stays), shown)
        for answer in ('y\n', 'Y\n', 'yes\n', ' yes \n'):
            with self.subTest(answer):
                self.assertEqual(self.purge('-r', '-q', 'X', answers=[answer.encode()]), (0, ['Y'], self.asked + answer))

    def test_outcomes(self):
        purged = "etc: purged '%s' from " + self.url + '\n'
        for words, answers, code, left, said in (
                ('-r X Y', [b'\x03'], 130, ['X', 'Y'], 'etc: interrupted'), ('-r -f X', [], 0, ['Y'], purged % 'X'),
                ('-r Nope X Y', [b'n\n', b'y\n'], 1, ['X'], purged % 'Y'), ('-r y', [], 1, ['X', 'Y'], "did you mean 'Y'?")):
            with self.subTest(words):
                *found, shown = self.purge(*words.split(), answers=answers)
                self.assertEqual((found, said in shown), ([code, left], True), shown)

    def test_another_push_before_the_answer(self):
        code, _, shown = self.purge('-r', 'X', answers=[b'y\n'],
                                    meanwhile=lambda: write(self.tmp / 'share', {'X.tgz': 'newer'}))
        self.assertEqual((code, (self.tmp / 'share/X.tgz').read_text()), (1, 'newer'))
        self.assertIn("etc: 'X' in %s was replaced meanwhile; look again: " % self.url, shown)

    def test_only_one_end_is_a_terminal(self):
        with open(self.tmp / 'err', 'w+') as err:
            for streams in ({'stdin': subprocess.DEVNULL}, {'stderr': err}):
                with self.subTest(streams):
                    code, left, shown = self.purge('-r', 'X', **streams)
                    self.assertEqual((code, left), (2, ['X', 'Y']))
                    err.seek(0)
                    self.assertIn("etc: without a terminal to ask on, 'etc purge -r' needs -f;", shown + err.read())


class Mistakes(Case):
    """What people mistype or mistake, and the one line that each prints."""

    def setUp(self):
        super().setUp()
        os.chdir(self.tmp)
        self.addCleanup(os.chdir, HERE)

    def test_each_gets_its_line(self):
        write(self.tmp, {'digits/data/train/1': 'one', 'digits/data/test/2': 'two', 'images/1.png': 'png', 'digits.tgz': 'x',
                         'my data/data/train/x': 'x', 'typo.yaml': '# mine\nulr: s3://bucket\n', 'toml.yaml': 'url = "s3://b"\n'})
        self.etc('register', './digits', 'MNIST')
        self.etc('push', 'MNIST')
        self.etc('create', 'Mine')
        here, share, how = str(self.tmp), self.url, "; 'etc %s-h' shows how"
        no_dataset = "%s is no dataset: it needs a directory 'data' with a directory for each partition"
        no_name = ("'%s' cannot be a dataset's name: it takes at most 128 letters, digits, '.', '_' and '-', the first a letter "
                   'or digit')
        start = 'cannot use the url; it must start with file:// or s3:// or gs:// or https:// or http://'
        taken = "another 'MNIST' is installed already; choose another name, or -f (force) to replace it"
        for words, status, line in (
                ('pul MNIST', 2, "no command 'pul'; did you mean 'pull'? 'etc -h' shows how"),
                ('frobnicate', 2, "no command 'frobnicate'" + how % ''), ('pull', 2, "'etc pull' needs NAME" + how % 'pull '),
                ('create', 2, "'etc create' needs NAME" + how % 'create '),
                ('pull MNIST --forse', 2, "'etc pull' takes no '--forse'; did you mean '--force'? 'etc pull -h' shows how"),
                ('info MNIST X', 2, "'etc info' takes no 'X'" + how % 'info '),
                ('diff MNIST', 2, "diff takes two names, and '-r' before one that is remote" + how % 'diff '),
                ('diff MNIST -r', 2, 'argument -r/--remote: expected 1 argument' + how % 'diff '),
                ('ls -l MNITS', 1, "no dataset here matches 'MNITS'; did you mean 'MNIST'?"),
                ('ls -r mnist x*', 1, "no dataset in %s matches 'mnist' or 'x*'; did you mean 'MNIST'?" % share),
                ('ls -r s3://bucket/', 1, "no dataset in %s matches 's3://bucket/'; use --url for a URL" % share),
                ('register a b c', 2, 'register takes DIR, DIR NAME or DIR as NAME' + how % 'register '),
                ('pull MNITS', 1, "no dataset 'MNITS' in %s; did you mean 'MNIST'?" % share),
                ('pull mnist', 1, "no dataset 'mnist' in %s; did you mean 'MNIST'?" % share),
                ('pull MNIST.tgz', 1, "no dataset 'MNIST.tgz' in %s; did you mean 'MNIST'?" % share),
                ('pull Flowers', 1, "no dataset 'Flowers' in %s; 'etc ls -r' lists what is there" % share),
                ('--home two pull MNIST -p trian', 1,
                 "no partition 'trian' in MNIST; it has: test, train; did you mean 'train'?"),
                ('pull s3://bucket/MNIST', 1, no_name % 's3://bucket/MNIST' + '; use --url for a URL'),
                ('pull MNIST@sha256:abc', 1, "'MNIST@sha256:abc' is not NAME@sha256:... with 64 hexadecimal digits"),
                ('register MNIST ./digits', 1,
                 "no directory %s/MNIST; the directory comes first: 'etc register ./digits MNIST'" % here),
                ('register ./digits/data as X', 1, no_dataset % (here + '/digits/data') + '; %s/digits is one' % here),
                ('register ./images X', 1, no_dataset % (here + '/images')),
                ('register digits.tgz', 1, '%s/digits.tgz is a file, not a directory; unpack it first' % here),
                ('register ./my?data', 1, no_name % 'my data'), ('register ./my?data MNIST', 1, taken),
                ('push Flowers', 1, "no local dataset 'Flowers'; 'etc register DIR Flowers' gives a directory that name"),
                ('purge Flowers', 1, "no local dataset 'Flowers'; 'etc ls' lists what there is"),
                ('purge -r MNIST', 2, "without a terminal to ask on, 'etc purge -r' needs -f" + how % 'purge '),
                ('purge -r -f MNITS', 1, "no dataset 'MNITS' in %s; did you mean 'MNIST'?" % share),
                ('verify Flowers', 1, "no local dataset 'Flowers'; 'etc pull Flowers' would fetch it"),
                ('info mine', 1, "no local dataset 'mine'; did you mean 'Mine'?"), ('--url bucket ls -r', 1, start),
                ('push Mine', 1, None), ('pull Mine', 1, "no dataset 'Mine' in %s; 'etc ls -r' lists what is there" % share),
                ('--url file://share ls -r', 1, 'the url is no absolute path; write file:///path, with three slashes'),
                ('--url file://%s/no ls -r' % here, 1,
                 'no directory %s/no; check the url, or make it with the first push' % here),
                ('--config typo.yaml ls', 1, "%s/typo.yaml:2: unknown setting 'ulr'; did you mean 'url'?" % here),
                ('--config toml.yaml ls', 1,
                 "%s/toml.yaml:1: not of the form 'key: value' (lists, nesting and indentation are not supported)" % here),
                ('--config no.yaml ls', 1, 'no settings file %s/no.yaml; create it, or drop --config and $ETC_CONFIG' % here)):
            with self.subTest(words):
                if line:
                    said = self.etc(*[word.replace('?', ' ') for word in words.split()], status=status)
                    self.assertEqual(said, ('', 'etc: %s\n' % line))
        self.assertIn('n: cannot be read: ' if os.name == 'posix' else 'etc: ', self.etc('--config', 'n' * 300, 'ls', status=1)[1])
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            self.assertEqual(etc.main(['pull', 'MNIST']), 1)
        self.assertIn('etc: no url; set where datasets are shared', err.getvalue())

    def test_other_contents(self):
        self.share(small(self.tmp / 'ds'))
        self.etc('create', '-f', 'X')
        self.assertIn("push it under another name, or 'etc push -f X' replaces it", self.etc('push', 'X', status=1)[1])
        self.assertIn("'etc pull -f X' replaces it", self.etc('pull', 'X', status=1)[1])

    def test_help(self):
        """Each example can be typed as it is; without a command, all are shown."""
        os.environ['COLUMNS'] = '82'  # argparse leaves two of them empty
        overview = io.StringIO()
        with contextlib.redirect_stderr(overview):
            self.assertEqual(etc.main([]), 2)
        self.settings['url'] = self.url
        for command in ('ls', 'info', 'diff', 'pull', 'push', 'register', 'create', 'verify', 'purge'):
            with self.subTest(command):
                self.assertRegex(self.etc('-h')[0], r'(?m)^    %s +\w' % command)
                shown = self.etc(command, '-h')[0]
                with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit) as caught:
                    etc.main(['help', command])
                self.assertEqual((out.getvalue(), caught.exception.code), (shown, 0))
                examples = re.findall(r'^  .*?(etc \w+(?: [^\s)]+)*)', shown.partition('examples:')[2], re.M)
                self.assertIn(examples[0], overview.getvalue())
                for example in examples:
                    words = example.split(' | ')[0].split()[1:] + ['-f'] * (command == 'purge')
                    err = self.etc(*words, status=None)[1]
                    self.assertNotIn('shows how', err)  # as after wrong usage


class People(Case):
    def test_lists(self):
        root = small(self.tmp / 'ds')
        self.etc('register', root, 'Registered')
        self.etc('register', '--copy', root, 'C')
        self.assertEqual(self.etc('ls', '-l')[0].splitlines(), [
            'C           5.04 kB  6  just now  ' + etc.Dataset(root).digest, 'Registered        -  -  -         ' + root.as_uri()])
        self.etc('push', 'C')
        both = {'digest', 'files', 'name', 'partitions', 'size', 'when'}
        for flags, more in (([], {'partial', 'root', 'source'}), (['-r'], {'archive_size', 'meta', 'readme'})):
            for item in json.loads(self.etc('ls', '--json', *flags)[0]):
                self.assertEqual(set(item), both | more)
        three_days_ago = time.time() - 3 * 86400 - 60
        os.utime(self.tmp / 'share/C.tgz', (three_days_ago, three_days_ago))
        self.assertIn('  3 days ago  ', self.etc('ls', '-l', '-r')[0])

    def test_patterns(self):
        for name in ('MNIST', 'MNIST-small', 'svhn', 'CIFAR'):
            self.etc('create', name)
        for patterns, names in (('MNIST*', 'MNIST MNIST-small'), ('*-small [a-z]*', 'MNIST-small svhn'),
                                ('????? svhn', 'CIFAR MNIST svhn'), ('[!M]*', 'CIFAR svhn')):
            with self.subTest(patterns):
                patterns, names = patterns.split(), names.split()
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
        said = self.etc('ls', 'svhn', 'nope*', status=1)  # what matches is shown
        self.assertEqual(said, ('svhn\n', "etc: no dataset here matches 'nope*'\n"))
        self.assertEqual(self.etc('ls', '--json', '[', status=1)[0], '[]\n')

    def test_info(self):
        readme = ''.join('%d\n' % n for n in range(50))
        root = write(self.tmp / 'ds', {'data/train/x': 'x' * 1500, 'data/test/y': '', 'README.md': readme})
        self.etc('register', '--copy', root, 'X')
        shown = self.etc('info', 'X')[0]
        for line in ('name        X', 'digest      ' + etc.Dataset(root).digest, 'size        1.64 kB in 3 files',
                     'partitions  test: 0 B in 1 file\n            train: 1.5 kB in 1 file\n\n0\n1\n2'):
            self.assertIn('\n%s\n' % line, '\n' + shown)
        self.assertTrue(shown.endswith('\n18\n19\n... (30 more lines of README.md)\n'))


class Diff(Case):
    """Of local datasets; RemoteSuite compares remote ones."""

    def registered(self, name, files, base=None):
        root = self.tmp / 'ds' / name
        if base:
            shutil.copytree(self.tmp / 'ds' / base, root)
        self.etc('register', '-f', write(root, files), name)
        return root

    def statuses(self, *args, **kwargs):
        """As {path: status}, from the columns and from the JSON."""
        out, _ = self.etc('diff', *args, **kwargs)
        found = json.loads(self.etc('diff', '--json', *args, **kwargs)[0])
        statuses = {path: row['status'] for path, row in found['segments'].items()}
        self.assertEqual({re.split('  +', line)[-1]: line.split()[0] for line in out.splitlines()}, statuses)
        self.assertEqual(found['equal'], set(statuses.values()) == {'same'})
        return statuses

    def test_segments(self):
        self.registered('A', {'data/train/x': 'x', 'data/test/y': 'y', 'README.md': 'r', 'assets/a': 'a', '+/p': 'p'})
        b = self.registered('B', {'data/train/x': 'other', 'data/val/v': '', 'more/m': 'm'}, base='A')
        remove(b / 'data/test')
        remove(b / '+')
        self.assertEqual(self.etc('diff', 'A', 'B', status=1), (
            'same     1 B in 1 file  1 B in 1 file  .\n'
            'gone     1 B in 1 file  -              +\n'
            'same     1 B in 1 file  1 B in 1 file  assets\n'
            'new      -              1 B in 1 file  more\n'
            'gone     1 B in 1 file  -              data/test\n'
            'differs  1 B in 1 file  5 B in 1 file  data/train\n'
            'new      -              0 B in 1 file  data/val\n', ''))
        found = etc.diff('A', 'B', config=self.config())
        self.assertEqual(found, json.loads(self.etc('diff', 'A', 'B', '--json', status=1)[0]))
        self.assertEqual(found['a'], {'name': 'A', 'remote': False, 'digest': etc.Dataset(self.tmp / 'ds/A').digest})
        self.assertEqual((found['equal'], found['segments']['assets'], found['segments']['+']), (
            False, {'status': 'same', 'a': {'files': 1, 'size': 1}, 'b': {'files': 1, 'size': 1}},
            {'status': 'gone', 'a': {'files': 1, 'size': 1}, 'b': None}))
        self.assertEqual(set(self.statuses('A', 'A').values()), {'same'})

    def test_how_names_are_typed(self):
        """In which order, and before or after flags, on every version of argparse."""
        for name in 'A', 'B':
            self.share(write(self.tmp / name, {'data/train/' + name: ''}), name)
        for words, sides in (
                ('A B', 'A B'), ('B A', 'B A'), ('A -r B', 'A rB'), ('-r A B', 'rA B'), ('-r A -r B', 'rA rB'),
                ('-r B -r A', 'rB rA'), ('--remote=A B', 'rA B'), ('B -rA', 'B rA'), ('A -v B', 'A B'), ('-v A B', 'A B'),
                ('A -v -r B', 'A rB'), ('-r A -v B', 'rA B'), ('-v -r A -v -r B -v', 'rA rB'), ('B -r B', 'B rB'),
                ('-- A B', 'A B'), ('-r A -- B', 'rA B')):
            with self.subTest(words):
                found = json.loads(self.etc('diff', '--json', *words.split(), status=None)[0])
                self.assertEqual(['r' * found[side]['remote'] + found[side]['name'] for side in 'ab'], sides.split())
        for words in ('A', '-r A', 'A B B', 'A -r B B', '-r A -r B -r B', ''):
            with self.subTest(words):
                self.assertIn('diff takes two names', self.etc('diff', *words.split(), status=2)[1])

    def test_status_alone(self):
        for name in 'A', 'B':
            self.registered(name, {'data/train/x': name})
        for words, status, said in (('A B', 1, ''), ('A B --json', 1, ''), ('A A', 0, ''), ('A A --json', 0, ''),
                                    ('A C', 1, "etc: no local dataset 'C'; ")):
            with self.subTest(words):
                out, err = self.etc('-q', 'diff', *words.split(), status=status)
                self.assertEqual((out, err[:27]), ('', said))

    def test_pins(self):
        digest = etc.Dataset(self.registered('A', {'data/train/x': 'x'})).digest
        other = etc.Dataset(self.registered('B', {'data/train/x': 'y'})).digest
        self.etc('push', 'A')
        self.etc('diff', 'A@' + digest, 'A')
        self.assertEqual(self.statuses('A@' + digest, 'B@' + other, status=1)['data/train'], 'differs')
        for words in ('A@%s B', 'B A@%s', '-r A@%s A', 'A -r A@%s', 'A A@%s'):
            with self.subTest(words):
                said = self.etc('diff', *(words % other).split(), status=1)
                self.assertEqual(said, ('', "etc: 'A': expected digest %s, found %s\n" % (other, digest)))

    def test_partial(self):
        """What is not here counts, too, as the receipt knows it."""
        root = self.registered('X', {'data/train/x': 'x', 'data/test/y': 'y', 'assets/a': 'a', 'README.md': 'r'})
        self.etc('push', 'X')
        self.etc('pull', '-p', 'test', 'X', home='two')
        self.etc('register', root, 'Y', home='two')
        same = dict.fromkeys(['.', 'assets', 'data/test', 'data/train'], 'same')
        self.assertEqual(self.statuses('-r', 'X', 'X', home='two'), same)
        self.assertEqual(self.statuses('Y', 'X', home='two'), same)
        write(root, {'data/test/y': 'changed', 'data/val/v': 'v'})
        self.assertEqual(self.statuses('X', 'Y', home='two', status=1),
                         dict(same, **{'data/test': 'differs', 'data/val': 'new'}))

    @unittest.skipIf(os.name == 'nt', 'no modes there')
    def test_nothing_is_read_that_a_receipt_knows(self):
        self.share(small(self.tmp / 'ds'), home='pub')
        self.etc('pull', 'X')
        files = [path for path in (self.tmp / 'home/X/data').rglob('*') if path.is_file()]
        for path in files:
            path.chmod(0)
        self.etc('ls')  # writes the settings
        with unprivileged(self.tmp):
            self.etc('diff', 'X', '-r', 'X')
            self.assertIn('Permission denied', self.etc('verify', 'X', status=1)[1])

    @unittest.skipIf(os.name == 'nt', 'no pseudoterminals')
    def test_heading(self):
        self.share(small(self.tmp / 'ds'))
        code, shown = on_terminal('--url', self.url, '--home', self.tmp / 'home', 'diff', 'X', '-r', 'X')
        self.assertIn('STATUS  X                   -r X                PATH\n', shown)


def paths_of(ds):
    """What a worker process does with a dataset."""
    return sorted(str(path) for partition in ds.values() for path in partition.iterdir()), ds.digest, ds.name


class Python(Case):
    def test_copies(self):
        import copy
        import pickle
        ds = etc.register(odd(self.tmp / 'ds', 3), 'X', config=self.config())
        digest = ds.digest
        copies = [copy.copy(ds), copy.deepcopy(ds)] + [pickle.loads(pickle.dumps(ds, protocol)) for protocol in range(5)]
        remove(self.tmp / 'ds/data/train')  # so that the digest is not found anew
        for other in copies:
            self.assertEqual((other, other.name, other.root, other.digest), (ds, 'X', ds.root, digest))
            self.assertEqual(repr(other), '<Dataset X: empty, test, train>')
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
            with self.subTest(method), multiprocessing.get_context(method).Pool(2) as pool:
                self.assertEqual(pool.map(paths_of, [ds] * 4), [expected] * 4)

    def test_logging(self):
        etc.register(small(self.tmp / 'ds'), 'X', config=self.config())
        with self.assertLogs('etcetera', 'DEBUG') as logged:
            digest = etc.push('X', config=self.config())
        self.assertEqual([record.levelname for record in logged.records], ['INFO', 'DEBUG'])
        self.assertRegex(logged.output[0], r'pushed X to file://.*: 6 files, 5\.04 kB in .* s \(.*B/s\)\Z')
        self.assertEqual(logged.records[1].getMessage(), 'X@' + digest)

    def test_help(self):
        import pydoc
        text = pydoc.render_doc(etc, renderer=pydoc.plaintext)
        for name in etc.__all__:
            with self.subTest(name):
                self.assertRegex(text, r'\b(def |class )?%s\(' % name)
                self.assertTrue(getattr(etc, name).__doc__)
        self.assertNotRegex(text, r'(?m)^    (class )?_[a-z]')


class Refusals(Case):
    """Whatever goes wrong is an etc.Error in one line; what is no user's fault comes out as it is."""

    def place(self, home='home'):
        return '--url', self.url, '--home', self.tmp / home

    def test_no_ssl(self):
        program = 'sys.modules["ssl"] = None\nimport etcetera\nsys.exit(etcetera.main(sys.argv[1:]))'
        os.environ.update(AWS_ACCESS_KEY_ID='a', AWS_SECRET_ACCESS_KEY='b', NO_GCE_CHECK='true')
        said = 'etc: this Python has no ssl module, so it cannot use https://; use another Python, or a url that needs none\n'
        for url in 'https://127.0.0.1:1/x', 's3://bucket', 'gs://bucket':
            with self.subTest(url):
                self.assertEqual(run_python(program, '--url', url, 'ls', '-r'), (1, said))

    @unittest.skipUnless(sys.platform == 'linux', 'no /proc here')
    def test_few_threads(self):
        """Fewer are used where the system gives no more, and none while the interpreter ends."""
        self.etc('register', odd(self.tmp / 'ds', 30), 'X')
        program = r"""
import etcetera as etc
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
        write(self.tmp, {'one.yaml': 'connections: 1\n'})
        for limit, settings in ((5, []), (3, []), (2, ['--config', self.tmp / 'one.yaml'])):
            for home, words in (('home', 'push -f X'), ('two', 'pull X'), ('two', 'verify X'), ('two', 'purge X')):
                with self.subTest(words, limit=limit):
                    code, out = run_python(program, limit, *settings, *self.place(home), *words.split())
                    self.assertEqual(code, 0, out)
        code, out = run_python(program, 0, *self.place(), 'push', '-f', 'X')
        self.assertRegex(out, r'\Aetc: pushed X .*\n\Z' if code == 0 else
                         r"\Aetc: the system does not allow this process any more threads; set 'connections: 1', or .*\n\Z")

    @unittest.skipIf(os.name == 'nt', 'no signals to send')
    def test_interrupted_while_threads_start(self):
        self.etc('register', odd(self.tmp / 'ds', 30), 'X')
        program = r"""
import etcetera as etc
start, last = threading.Thread.start, int(sys.argv[1])
def interrupted(thread):
    global last
    start(thread)
    last -= 1
    if last == 0:
        os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread.start = interrupted
sys.exit(etc.main(sys.argv[2:]))
"""
        for last in 1, 2:
            with self.subTest(last):
                code, out = run_python(program, last, *self.place(), 'push', 'X', timeout=60)
                self.assertEqual((code, out[:16], out.count('\n')), (130, 'etc: interrupted', 1))

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
            with self.subTest(room), contextlib.suppress(subprocess.TimeoutExpired):
                # CPython may wait for ever for a thread whose start failed for want of memory
                code, out = run_python(program, room, *self.place('home%d' % room), 'pull', 'X', timeout=60)
                if room == 1 or re.search('Fatal Python error|exception in thread|libgcc_s', out, re.I):
                    self.assertTrue(code == 0 or 'pulled' not in out, out)  # the interpreter itself gave up
                    continue
                out = re.sub(r'\AException ignored [^\n]*?(?=etc: )', '', out)  # Python's own words, where it lacks memory
                self.assertRegex(out, r'\Aetc: (pulled X.*|.*(memory|threads).*; set .connections: 1..*)\n\Z')
                self.assertEqual('pulled' in out, code == 0)
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

        class Dated(S3Handler):
            def date_time_string(self, timestamp=None):
                return 'Sat, 01 Jan 2050 00:00:00 GMT'

        self.share(small(self.tmp / 'ds'))
        for name in ('gmtime', 'localtime', 'time'):
            self.addCleanup(setattr, etc.time, name, getattr(time, name))
        etc.time.gmtime, etc.time.localtime = narrow(time.gmtime), narrow(time.localtime)
        try:
            os.utime(self.tmp / 'share/X.tgz', (2524608000, 2524608000))
        except OverflowError:
            self.skipTest('this system cannot set such times')
        self.assertIn('2050-01-01T00:00:00Z', self.etc('info', '-r', 'X')[0])
        self.assertIn('just now', self.etc('ls', '-r', '-l')[0])
        etc.time.time = lambda: 2524608000.5
        self.etc('pull', 'X', home='two')
        self.assertIn('2050-01-01T00:00:00Z', self.etc('info', 'X', home='two')[0])
        server = Server(Dated)
        self.addCleanup(server.stop)
        self.settings = {'endpoint_url': server.url, 'aws_access_key_id': AKID, 'aws_secret_access_key': SECRET}
        self.assertEqual(self.etc('ls', '-r', url='s3://bucket'), ('', ''))
        self.assertEqual(server.log[-1][2]['x-amz-date'], '20500101T000000Z')

    def test_addresses_that_nothing_can_have(self):
        host, form = 'has an invalid host name; check the url', 'the form https://host'
        for url, endpoint, said in (
                ('https://data..example.org', None, host), ('http://%s.example' % ('x' * 70), None, host),
                ('s3://bucket', 'https://data..example.org', host), ('gs://bucket', 'https://data..example.org', host),
                ('http://[::::]/', None, form), ('http://127.0.0.1:65536', None, form), ('http://127.0.0.1:0', None, form),
                ('s3://bucket', 'http://127.0.0.1:99999', form), ('gs://bucket', 'http://[1:::]', form),
                ('http://data.example.org', None, 'has an invalid host name')):  # through a proxy of that kind
            with self.subTest(url, endpoint=endpoint):
                self.settings = {'endpoint_url': endpoint} if endpoint else {}
                os.environ.update(NO_GCE_CHECK='true')
                if 'data.example' in url:
                    os.environ.update(http_proxy='http://proxy..example:9', no_proxy='')
                self.assertIn(said, self.etc('ls', '-r', url=url, status=1)[1])

    def test_paths_that_no_file_can_have(self):
        for function, args in ((etc.register, ['a\0b', 'X']), (etc.Dataset, ['a\0b']), (etc.Config.load, ['a\0b']),
                               (etc.ls, [True, self.config(url='file:///a%00b')])):
            with self.subTest(function), self.assertRaisesRegex(etc.Error, 'a path cannot contain a NUL'):
                function(*args)

    def test_what_a_progress_function_raises(self):
        """It ends the work, and comes out as it is; nothing is left."""
        self.share(odd(self.tmp / 'ds', 20))
        with tarfile.open(self.tmp / 'share/Y.tgz', 'w:gz') as tar:
            tar.add(self.tmp / 'ds', '.')
        before = tree(self.tmp / 'share')
        for error in (ValueError('mine'), OSError(5, 'mine'), KeyError('mine'), EOFError('mine'), UnicodeError('mine'),
                      MemoryError(), etc.Corrupt('mine'), KeyboardInterrupt(), SystemExit(3), tarfile.ReadError('mine'),
                      RecursionError('mine')):
            def progress(done, total):
                raise error
            for function, home, args in (
                    (etc.pull, 'two', ['X']), (etc.pull, 'two', ['Y']), (etc.dataset, 'two', ['X', True]),
                    (etc.push, 'home', ['X', True]), (etc.register, 'home', [self.tmp / 'ds', 'Z', False, True]),
                    (etc.verify, 'home', ['X']), (etc.info, 'home', ['X'])):
                with self.subTest(function, error=error):
                    with self.assertRaises(type(error)) as caught:
                        function(*args, config=self.config(home), progress=progress)
                    self.assertIs(caught.exception, error)
            self.assertEqual((self.installed('two'), self.installed()), ([], ['X']))
        self.assertEqual(tree(self.tmp / 'share'), before)

    def test_faults_of_ours_are_not_called_damage(self):
        """As if a function of Python's own went wrong."""
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
        write(self.tmp, {'.etc.toml': '''# mine
            url = "s3://my-bucket"
            public = true
              aws_access_key_id="A\\\\x"  # quoted
            endpoint_url = 'http://h:1'
            aws_access_key_secret = "s"
            '''.replace('\n' + ' ' * 12, '\n'), 'other.toml': 'url = "s3://other"\n'}).joinpath('.etc.toml').chmod(0o600)
        config = etc.Config.load()
        self.assertEqual((config.url, config.public, config.aws_access_key_id, config.aws_secret_access_key,
                          config.endpoint_url), ('s3://my-bucket', True, 'A\\x', 's', 'http://h:1'))
        write(self.tmp, {'.etc.toml': 'url = "s3://b"\n[profile]\n'})
        with self.assertRaisesRegex(etc.ConfigError, r'\.etc\.toml:2: '):
            etc.Config.load()
        write(self.tmp, {'.etc.yaml': 'url: s3://newer\n'})
        self.assertEqual(etc.Config.load().url, 's3://newer')
        self.assertEqual(etc.Config.load(self.tmp / 'other.toml').url, 's3://other')

    def test_store_and_calls(self):
        root = small(self.tmp / 'ds')
        write(self.tmp, {'.etc/Registered': ('->', str(root)), '.etc.toml': 'url = "%s"\n' % self.url})
        shutil.copytree(root, self.tmp / '.etc/Pulled')
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
        self.assertFalse((self.tmp / '.etc/Registered').is_symlink())
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
class Mypy(Case):
    def check(self, program, python, status):
        write(self.tmp, {'user.py': program})
        done = subprocess.run([sys.executable, '-m', 'mypy', '--strict', '--python-executable', str(python), 'user.py'],
                              cwd=str(self.tmp), stdout=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(done.returncode, status, done.stdout)
        return done.stdout

    def test_a_users_program(self):
        """Where etcetera is vendored, and where it is installed: there mypy wants to be told to follow it."""
        subprocess.check_call([sys.executable, '-m', 'venv', '--without-pip', str(self.tmp / 'venv')])
        python = self.tmp / 'venv' / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
        site = subprocess.check_output([str(python), '-c', 'import site; print(site.getsitepackages()[-1])'])
        shutil.copy(SCRIPT, site.decode().strip())
        self.assertIn('import-untyped', self.check(USER, python, 1))
        write(self.tmp, {'mypy.ini': '[mypy-etcetera]\nfollow_untyped_imports = True\n'})
        self.check(USER, python, 0)  # without the optional libraries
        self.assertIn('"Path" has no attribute "nope"', self.check(USER + 'train.nope\n', python, 1))
        self.assertIn('incompatible type "int"', self.check(USER + 'etc.pull(3)\n', python, 1))
        shutil.copy(SCRIPT, self.tmp)
        remove(self.tmp / 'mypy.ini')
        self.check(USER, sys.executable, 0)


class Program(Case):
    def run_(self, *command, **kwargs):
        """What a command prints; it must succeed, and say nothing else."""
        done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
        self.assertEqual((done.returncode, done.stderr.decode()), (0, ''), command)
        return done.stdout.decode()

    def test_ways_to_start(self):
        etc.create('X', config=etc.Config(home=self.tmp / '.etc'))
        shutil.copy(SCRIPT, write(self.tmp / 'vendored', {'__init__.py': ''}))
        here, there = {'cwd': str(HERE)}, {'cwd': str(self.tmp)}
        for words, more in (([SCRIPT, 'ls'], there), (['-m', 'etcetera', 'ls'], here), (['-m', 'vendored.etcetera', 'ls'], there)):
            self.assertEqual(self.run_(sys.executable, *words, **more), 'X\n')
        with open(SCRIPT, 'rb') as script:
            self.assertEqual(self.run_(sys.executable, '-', 'ls', stdin=script), 'X\n')
        code = 'import pickle, vendored.etcetera as e; print(pickle.loads(pickle.dumps(e.dataset("X")))["train"].name)'
        self.assertEqual(self.run_(sys.executable, '-c', code, **there), 'train\n')

    def test_pipes(self):
        write(self.tmp, {'.etc/D%04d' % number: None for number in range(3000)})
        command = '"%s" "%s" ls' % (sys.executable, SCRIPT)
        for then, said in ((' | head -n 1', ''), (' >/dev/full', 'etc: cannot write to standard output: .*\n'),
                           (' >&-', 'etc: standard output is closed\n')):
            if '/dev' not in then or os.path.exists('/dev/full'):
                done = subprocess.run(['sh', '-c', command + then], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                self.assertRegex(done.stderr.decode(), r'\A%s\Z' % said)

    def test_odd_surroundings(self):
        for env, said in (({'HOME': ''}, 'cannot tell where your home directory is;'),
                          ({'ETC_HOME': 'rel'}, 'the current directory is gone, so no relative path can be found;')):
            with self.subTest(**env):
                os.environ.update(env)
                write(self.tmp, {'gone': None})
                done = subprocess.run(['sh', '-c', 'rmdir ../gone; "%s" "%s" ls' % (sys.executable, SCRIPT)],
                                      cwd=str(self.tmp / 'gone'), stderr=subprocess.PIPE)
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

    @unittest.skipUnless(sys.platform.startswith('linux'), 'as Linux measures it')
    def test_memory_is_flat(self):
        """In flat directories, with many files, which take one walk, and with large ones."""
        outside = write(self.tmp / 'outside', {'%04d' % number: '' for number in range(1000)})
        write(self.tmp / 'Many', {'data/train/%03d' % number: ('->', str(outside)) for number in range(150)})
        write(self.tmp / 'Flat', {'data/train': None})
        for number in range(60000):
            os.close(os.open('%s/data/train/%06d' % (self.tmp / 'Flat', number), os.O_CREAT | os.O_WRONLY))
        write(self.tmp / 'Large', {'data/train/zeros': ''})
        os.truncate(self.tmp / 'Large/data/train/zeros', 300 * MIB)
        extra = 100 if sys.implementation.name == 'pypy' else 0
        for name, limit in (('Many', 56), ('Flat', 56), ('Large', 200)):
            self.etc('register', self.tmp / name)
            for home, words in (('home', 'verify' if name == 'Flat' else 'push'), ('two', 'pull'))[:1 + (name == 'Large')]:
                with self.subTest(words, name=name):
                    code, out = run_python(self.MEMORY, '--url', self.url, '--home', self.tmp / home, words, name)
                    self.assertEqual(code, 0, out)
                    most, peak = map(int, out.split())
                    self.assertLess((most, peak), (2, limit + extra))  # MiB, with the interpreter itself

    def test_import_is_light(self):
        """And no library of a cloud is loaded for what needs none."""
        heavy = {'ssl', 'urllib.request', 'http.client', 'xml.etree.ElementTree', 'concurrent.futures', 'argparse', 'tarfile',
                 'logging', 'socket', 'email', 'configparser', 'ctypes'}
        write(self.tmp / 'share', {})
        write(self.tmp, {'share': None})
        code = '''if True:
            before = set(sys.modules)
            import etcetera
            print(sorted(%r & (set(sys.modules) - before)))
            etcetera.main(sys.argv[1:])
            print([name for name in sys.modules if name.startswith(('google', 'boto'))])
            ''' % heavy
        self.assertEqual(run_python(code, '--url', self.url, 'ls', '-r'), (0, '[]\n[]\n'))

    @unittest.skipUnless(sys.platform.startswith('linux'), 'as Linux does it')
    def test_plain_locale_and_warnings_as_errors(self):
        root = odd(self.tmp / 'ds', 3)
        os.environ.update(LC_ALL='C', LANG='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
        run = [sys.executable, '-W', 'error'] + ['-X', 'dev'] * (sys.version_info >= (3, 7)) + [SCRIPT, '-q', '--url', self.url]
        for words in ('register ds X', 'push X', '--home two pull X', '--home two pull -f X', '--home two verify X',
                      'info -r X'):
            with self.subTest(words):
                self.run_(*run + words.split(), cwd=str(self.tmp))
        self.assertEqual(tree(self.tmp / 'two/X'), tree(root))
        self.assertEqual(etc.info('X', True, self.config())['digest'], etc.Dataset(root).digest)

    def test_readme_quick_start(self):
        text = (HERE / 'README.md').read_text(encoding='utf-8')
        block = re.search(r'```(?:sh|bash)\n(.*?)```', text, re.S).group(1)
        home = self.tmp / 'new user'
        shutil.copy(SCRIPT, write(self.tmp, {'new user': None}) / 'new user')
        bin_ = write(self.tmp / 'bin', {'python3': '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable})
        (bin_ / 'python3').chmod(0o755)
        os.environ.update(HOME=str(home), PATH='%s:%s' % (bin_, os.environ['PATH']))
        done = subprocess.run(['sh', '-e', '-c', block], cwd=str(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn(b'digits', done.stdout)
        self.assertTrue(list(home.rglob('digits.tgz')))


# ---------------------------------------------------------------------------------------
# Fuzzing: python3 test_etcetera.py fuzz [SECONDS] [TARGET]
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
    """Pulls. The first byte says what the rest is: an archive, a partition for a right index, an index for right blocks."""

    def __init__(self, place):
        super().__init__(place)
        self.config = etc.Config((self.here / 'share').as_uri(), self.here / 'home', connections=1)
        train = entry('data/train/')
        files = (train + entry('data/train/a', b'alpha') + entry('data/train/b/') + entry('data/train/b/' + 'n' * 120, mode=0o755)
                 + entry('data/train/l', kind=b'2', link='b/\u00e9') + entry('data/train/m', b'abc'))
        whole = indexed(files, files=4, size=8)
        index, _ = members(whole)[-2:]
        self.blocks = whole[:index[0]]
        self.seeds = [b'\0' + whole, b'\1' + files, b'\1' + train, b'\2' + index[3]] + [
            b'\1' + train + entry(name) for name in ('../x', '/x', 'data/train/../../../x', 'data/train/' + 'd/' * 300)]

    def read(self, data):
        kind, data = data[:1], data[1:]
        if kind == b'\1':
            sizes = [0]
            with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data + bytes(1024)), mode='r:') as tar:
                sizes = [member.size * member.isreg() for member in tar if not member.isdir()]
            data = indexed(data, files=len(sizes), size=sum(sizes))
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
            beside = {os.path.relpath(str(path), str(self.place)) for place in (self.place, self.here, self.here / 'home')
                      for path in place.glob('*')}
            assert beside <= {'here', 'here/share', 'here/home', 'here/home/X', 'here/home/.etcetera'}, beside


class TgzTarget(ArchiveTarget):
    """Pulls of what other tools packed; the first byte says whether the rest is compressed."""

    def __init__(self, place):
        super().__init__(place)
        evil = [entry('../x'), entry('data/x/../../../x'), entry('data/up', kind=b'2', link='../..') + entry('data/up/x'), entry(
            'data/train/sparse', kind=b'S', _124=b'00000001000\0', _386=b'00000010000\0' + b'00000001000\0', _483=b'00000020000\0')]
        self.seeds = [b'\1' + entry('data/train/x') + each + bytes(1536) for each in evil]
        root = write(self.here / 'share', {'data/train/a': 'a', 'data/train/%s/%s' % ('n' * 60, 'm' * 60): '', 'data/train/s': ('->', 'a'),
                                           'data/train/\u00e9': '', 'meta.json': '{}'})
        os.link(str(root / 'data/train/a'), str(root / 'data/train/h'))
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode='w', format=form) as tar:
                tar.add(str(root), '.')
            self.seeds += [b'\1' + out.getvalue(), b'\0' + gzip.compress(out.getvalue())]

    def read(self, data):
        self.pull(data[1:] if data[:1] == b'\0' else gzip.compress(mended(data[1:]), 1))


class YamlTarget(Target):
    """The YAML subset."""

    seeds = [b'url: s3://bucket/x # c\npublic: yes\nconnections: 0x10\n', b'---\nhome: "~/\\u00e9\\n"\nregion: \'it\'\'s\'\nurl: ~\n',
             b'connections: 1_0\nregion: 0b1\nsse: 017\nurl: .5\nhome: 2001-01-01\n', b'\xef\xbb\xbf"region": v\r\nsse: - x\n']

    def read(self, data):
        agrees_with_yaml(self.here / 'settings', data)


class AnswerTarget(Target):
    """What a web server answers: a line with the status and headers, and the body."""

    url, settings = '', {}
    seeds = [b'200\n<html><body><pre><a href="X.tgz">X</a> <A HREF=/x/Y.tgz><a href="../Z.tgz"><a href="http://h/x/W%2etgz?q#f">',
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
                 '<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated><Contents><Key>some/prefix/X+%41.tgz</Key>'
                 '<LastModified>2024-05-06T07:08:09.000Z</LastModified><ETag>&quot;e&quot;</ETag><Size>123</Size></Contents>')).encode(),
             b'403\n<Error><Code>AccessDenied</Code><Message>about<![CDATA[ <it> ]]>\x1b[31m</Message></Error>',
             b'200\n<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]><ListBucketResult>&a;</ListBucketResult>', b'200\n' + b'<a>' * 30 + b'</a>' * 30,
             b'206|ETag:"x"|Last-Modified:Mon, 06 May 2024 07:08:09 GMT|Content-Range:bytes 0-4/5\n12345',
             b'404|x-amz-bucket-region:eu-west-1|ETag:bare\n']


class GoogleTarget(AnswerTarget):
    """Google's listings, objects and errors."""

    url = 'gs://bucket/some/prefix'
    seeds = [b'200\n{"kind": "storage#objects", "items": [{"name": "some/prefix/X.tgz", "size": "5", "generation": "17", '
             b'"updated": "2024-05-06T07:08:09.123Z"}], "nextPageToken": ""}',
             b'200\n{"name": "some/prefix/X.tgz", "size": 5, "generation": 17}', b'403\n{"error": {"code": 403, "message": "\\u001b[31m no"}}']


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
    seeds = [b'[default]\naws_access_key_id = a\naws_secret_access_key=b\nregion=eu-west-1\ns3 =\n  addressing_style = path\n',
             b'# c\n[profile work]\nregion: x ; c\nendpoint_url = http://h:1/\nca_bundle = x\n[default]\naws_session_token=t\n']

    def read(self, data):
        path = write(self.here, {'settings': data}) / 'settings'
        os.environ.update(AWS_CONFIG_FILE=str(path), AWS_SHARED_CREDENTIALS_FILE=str(path))
        super().read(b'200\n')


TARGETS = {'archive': ArchiveTarget, 'tgz': TgzTarget, 'yaml': YamlTarget, 'web': AnswerTarget, 's3': S3Target, 'google': GoogleTarget,
           'profiles': ProfilesTarget, 'keys': KeysTarget}


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


def fuzz(seconds=60.0, target=None):
    """Feed a target, or each in turn, with ever new inputs."""
    if target is None:
        return max(subprocess.call([sys.executable, __file__, 'fuzz', str(seconds / len(TARGETS)), name]) for name in TARGETS)
    with contextlib.suppress(ImportError, ValueError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
    place = tempfile.mkdtemp(prefix='etc-fuzz-')
    run, end, count, rng = TARGETS[target](place), time.time() + seconds, 0, random.Random()
    while time.time() < end:
        data, begin = mutated(rng, run.seeds), time.time()
        try:
            run(data)
            assert time.time() - begin < 10, 'too slow'
        except BaseException:
            print('%s: input %d is kept in crash-%s' % (target, count, target))
            Path('crash-' + target).write_bytes(data)
            raise
        count += 1
    remove(place)
    print('%s: %d inputs, nothing found' % (target, count))
    return 0


class Fuzzing(Case):
    def test_targets(self):
        for name, inputs in zip(TARGETS, (100, 60, 1000, 150, 150, 150, 150, 150)):
            run = TARGETS[name](self.tmp / name)
            for seed in run.seeds:
                run(seed)
            for number in range(inputs * RUNS):
                with self.subTest(target=name, number=number):
                    run(mutated(random.Random('%s %d' % (name, number)), run.seeds))


def all_classes():
    """Run all classes, each in a process of its own, one more at a time than there are cores, as many wait much."""
    def run(name):
        begin = time.time()
        command = [sys.executable] + ['-W' + option for option in sys.warnoptions] + [__file__, name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out = process.communicate()[0].decode('utf-8', 'replace')
        ran, skipped = (int((re.findall(pattern, out) or ['0'])[-1]) for pattern in (r'\nRan (\d+) test', r'skipped=(\d+)'))
        print('%-22s %4d tests, %2d skipped %6.1f s%s' % (
            name, ran, skipped, time.time() - begin, '\n' + out if process.returncode else ''), flush=True)
        return process.returncode, ran, skipped
    begin, names = time.time(), unittest.defaultTestLoader.getTestCaseNames
    classes = [name for name, cls in globals().items()
               if isinstance(cls, type) and issubclass(cls, unittest.TestCase) and names(cls)]
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        codes, ran, skipped = map(list, zip(*pool.map(run, classes[::-1])))
    verdict = 'FAILED' if any(codes) else 'OK'
    print('Ran %d tests in %.1fs\n\n%s (skipped=%d)' % (sum(ran), time.time() - begin, verdict, sum(skipped)))
    return int(any(codes))


if __name__ == '__main__':
    if sys.argv[1:2] == ['fuzz']:
        sys.exit(fuzz(*[float(word) for word in sys.argv[2:3]], *sys.argv[3:]))
    if len(sys.argv) == 1:
        sys.exit(all_classes())
    done = unittest.main(exit=False).result
    if done.skipped and os.environ.get('ETC_TEST_REQUIRE_PEERS'):
        sys.exit('skipped, though all peers are demanded: %s' % done.skipped)
    sys.exit(not done.wasSuccessful())
