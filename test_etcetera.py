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
        'data/test/big': noise(2 * MIB + 12345), 'data/test/zeros': bytes(MIB), 'data/test/block': noise(MIB - 1024, 1),
        'assets/deep/er/file': 'f',
    })
    for number in range(files):
        write(root, {'data/test/many/%05d.txt' % number: 'number %d\n' % number * (number % 7)})
    os.chmod(str(root / 'data/train/run.sh'), 0o755)
    return root


def tree(root):
    """All that is below a directory, as {name: content}."""
    found = {}
    for top, directories, files in os.walk(str(root)):
        for name in directories + files:
            path = os.path.join(top, name)
            key = os.path.relpath(path, str(root))
            if os.path.islink(path):
                found[key] = ('->', os.readlink(path))
            elif os.path.isdir(path):
                found[key] = None
            else:
                with open(path, 'rb') as file:
                    found[key] = (file.read(), bool(os.stat(path).st_mode & 0o100))
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
        for key in list(os.environ):
            if key.startswith(('ETC_', 'AWS_', 'GOOGLE_', 'CLOUDSDK_', 'STORAGE_')) or key.lower().endswith('_proxy'):
                if key != 'ETC_LIBDEFLATE':
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
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = etc.main(['--config', str(settings), '--url', url or self.url, '--home', str(self.tmp / home)]
                                + [str(arg) for arg in args])
            except SystemExit as e:
                code = e.code
        self.assertIn(code, (0, 1) if status is None else (status,), out.getvalue() + err.getvalue())
        if code == 1 and (err.getvalue() or 'diff' not in args):  # which tells by it that there are differences
            last = err.getvalue().splitlines()[-1]
            self.assertTrue(last.startswith('etc: ') and 'Traceback' not in err.getvalue(), err.getvalue())
        return out.getvalue(), err.getvalue()

    def share(self, root, name='X', home='home'):
        """Publish a dataset."""
        self.etc('register', root, name, home=home)
        self.etc('push', name, home=home)

    def spawn(self, *args, home='home', url=None, python=(), **kwargs):
        command = [sys.executable] + list(python) + [SCRIPT, '--url', url or self.url, '--home', str(self.tmp / home)]
        env = dict(os.environ, **{'AWS_' + k[4:].upper(): v for k, v in self.settings.items() if k.startswith('aws_')})
        if self.settings.get('endpoint_url'):
            env['AWS_ENDPOINT_URL'] = self.settings['endpoint_url']
        if os.name == 'posix':
            kwargs.setdefault('preexec_fn', default_signals)
        return subprocess.Popen(command + [str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=env, **kwargs)

    def installed(self, home='home'):
        return etc.ls(config=self.config(home))

    def leftovers(self, home='home'):
        """What is in staging and the like."""
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

    def __init__(self, handler):
        super().__init__(('127.0.0.1', 0), handler)
        self.url = 'http://127.0.0.1:%d' % self.server_port
        self.lock = threading.RLock()
        self.objects = {}  # path -> (bytes, etag, headers)
        self.uploads = {}
        self.log = []  # (method, path with query, headers)
        self.connections = set()
        self.sent = 0
        self.fault = self.respell = None
        self.final = None  # answers instead, once an object is stored
        self.copied = None  # gives what UploadPartCopy copies instead
        self.page = 1000
        self.conditions = self.encoding = True
        self.must_check = False  # as a bucket with Object Lock
        self.may_list = True
        self.versioned = None  # or the version of the next delete marker
        self.old = {}  # (path, version) -> what a bucket with versions keeps
        self.secrets = {AKID: SECRET}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass

    def stop(self):
        self.shutdown()
        self.server_close()


COMPLETED = (b'<?xml version="1.0" encoding="UTF-8"?>\n<CompleteMultipartUploadResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
             b'<Location>%s/bucket/%s</Location><Bucket>bucket</Bucket><Key>%s</Key><ETag>&quot;%s&quot;</ETag>'
             b'</CompleteMultipartUploadResult>')


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
        xml = '<?xml version="1.0"?>\n<Error><Code>%s</Code><Message>%s</Message></Error>' % (code, message or 'about ' + code)
        self.answer(status, xml.encode(), headers)

    def unsigned(self, body):
        """What is wrong with the signature; written from AWS's description, not from etcetera."""
        match = re.match(r'AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/%s/aws4_request, ?SignedHeaders=([^,]+), '
                         r'?Signature=([0-9a-f]{64})$' % self.service, self.headers.get('Authorization', ''))
        if not match:
            return 'AccessDenied'
        akid, day, region, names, signature = match.groups()
        if akid not in self.server.secrets:
            return 'InvalidAccessKeyId'
        digest = hashlib.sha256(body).hexdigest()
        if self.headers.get('x-amz-content-sha256', 'none' if self.service == 's3' else digest) != digest:
            return 'XAmzContentSHA256Mismatch'
        for name in self.headers:
            if name.lower().startswith('x-amz-') and name.lower() not in names.split(';'):
                return 'AccessDenied'
        path, _, query = self.path.partition('?')
        pairs = sorted(urllib.parse.parse_qsl(query, keep_blank_values=True))
        quote = urllib.parse.quote
        canonical = '\n'.join([
            self.command, quote(urllib.parse.unquote(path), safe='/~'),
            '&'.join(quote(k, safe='~') + '=' + quote(v, safe='~') for k, v in pairs),
            ''.join('%s:%s\n' % (name, self.headers[name].strip()) for name in names.split(';')), names, digest])
        stamp = self.headers['x-amz-date']
        text = '\n'.join(['AWS4-HMAC-SHA256', stamp, '%s/%s/%s/aws4_request' % (day, region, self.service),
                          hashlib.sha256(canonical.encode()).hexdigest()])
        key = b'AWS4' + self.server.secrets[akid].encode()
        for part in (day, region, self.service, 'aws4_request'):
            key = hmac.new(key, part.encode(), 'sha256').digest()
        right = hmac.new(key, text.encode(), 'sha256').hexdigest()
        return None if right == signature and stamp[:8] == day else 'SignatureDoesNotMatch'


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
        parts = urllib.parse.unquote(path).split('/', 2)
        if parts[1] != 'bucket':
            return self.error(404, 'NoSuchBucket')
        self.key = parts[2] if len(parts) > 2 else ''
        with self.server.lock:
            if self.command in ('GET', 'HEAD') and not self.key:
                return self.list()
            getattr(self, 's3_' + self.command.lower())(body)

    def list(self):
        prefix, after = self.query.get('prefix', ''), self.query.get('continuation-token', '')
        keys = sorted(k for k in self.server.objects if k.startswith(prefix) and k > after
                      and '/' not in k[len(prefix):])
        page, more = keys[:self.server.page], len(keys) > self.server.page
        url = self.server.encoding and self.query.get('encoding-type') == 'url'
        encode = urllib.parse.quote_plus if url else escape
        items = ''.join('<Contents><Key>%s</Key><LastModified>2024-05-06T07:08:09.000Z</LastModified><ETag>%s</ETag>'
                        '<Size>%d</Size></Contents>' % (encode(k), escape(self.server.objects[k][1]),
                                                        len(self.server.objects[k][0])) for k in page)
        token = '<NextContinuationToken>%s</NextContinuationToken>' % escape(''.join(page[-1:])) * more
        xml = ('<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
               '%s<IsTruncated>%s</IsTruncated>%s%s</ListBucketResult>' % (
                   '<EncodingType>url</EncodingType>' * url, str(more).lower(), token, items))
        self.answer(200, xml.encode(), {'Content-Type': 'application/xml'})

    def s3_head(self, body):
        self.s3_get(body)

    def s3_get(self, body):
        if 'uploadId' in self.query:
            return self.list_parts()
        if self.key not in self.server.objects:
            return self.error(404, 'NoSuchKey') if self.server.may_list else self.error(403, 'AccessDenied')
        data, etag, _ = self.server.objects[self.key]
        headers = {'ETag': etag, 'Last-Modified': 'Mon, 06 May 2024 07:08:09 GMT'}
        if self.server.conditions and self.headers.get('If-Match', etag) != etag:
            return self.error(412, 'PreconditionFailed')
        if 'Range' not in self.headers:
            return self.answer(200, b'' if self.command == 'HEAD' else data, headers, len(data))
        start, stop = asked_range(self.headers, len(data))
        if start >= stop:
            return self.error(416, 'InvalidRange')
        headers['Content-Range'] = 'bytes %d-%d/%d' % (start, stop - 1, len(data))
        self.answer(206, data[start:stop], headers)

    def s3_put(self, body):
        if self.headers['x-amz-copy-source']:
            return self.copy_part()
        expected = {'Content-MD5': md5(body).digest(), 'x-amz-checksum-sha256': hashlib.sha256(body).digest()}
        given = {name: self.headers[name] for name in expected if self.headers[name]}
        if self.server.must_check and not given:
            return self.error(400, 'InvalidRequest', message='Content-MD5 OR x-amz-checksum- HTTP header is required for Put %s '
                              'requests with Object Lock parameters' % ('Part' if 'partNumber' in self.query else 'Object'))
        if any(base64.b64decode(value) != expected[name] for name, value in given.items()):
            return self.error(400, 'BadDigest')
        if 'partNumber' in self.query:
            if self.query['uploadId'] not in self.server.uploads:
                return self.error(404, 'NoSuchUpload')
            headers, parts = self.server.uploads[self.query['uploadId']]
            if 'x-amz-checksum-sha256' in given and headers['x-amz-checksum-algorithm'] != 'SHA256':
                return self.error(400, 'InvalidRequest', message='Checksum Type mismatch occurred')
            parts[int(self.query['partNumber'])] = body
            given.pop('Content-MD5', None)
            return self.answer(200, b'', dict(given, ETag='"%s"' % hashlib.sha1(body).hexdigest()))
        self.store(body, self.headers)

    def copy_part(self):
        if self.query['uploadId'] not in self.server.uploads:
            return self.error(404, 'NoSuchUpload')
        headers, parts = self.server.uploads[self.query['uploadId']]
        if self.headers['x-amz-checksum-sha256'] or self.headers['Content-MD5']:
            return self.error(400, 'InvalidRequest', message='there is no body to check')
        bucket, key = urllib.parse.unquote(self.headers['x-amz-copy-source']).lstrip('/').split('/', 1)
        if bucket != 'bucket' or key not in self.server.objects:
            return self.error(404, 'NoSuchKey')
        data, etag, _ = self.server.objects[key]
        if self.headers.get('x-amz-copy-source-if-match', etag) != etag:
            return self.error(412, 'PreconditionFailed')
        start, stop = map(int, re.match(r'bytes=(\d+)-(\d+)$', self.headers['x-amz-copy-source-range']).groups())
        if not start <= stop < len(data) or stop - start >= 5 << 30:
            return self.error(400, 'InvalidArgument')
        copied = self.server.copied(data, start, stop + 1) if self.server.copied else data[start:stop + 1]
        parts[int(self.query['partNumber'])] = copied
        etag = hashlib.sha1(copied).hexdigest()
        checksum = '<ChecksumSHA256>%s</ChecksumSHA256>' % base64.b64encode(hashlib.sha256(copied).digest()).decode()
        xml = ('<?xml version="1.0" encoding="UTF-8"?>\n<CopyPartResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><LastModified>'
               '2024-05-06T07:08:09.000Z</LastModified><ETag>&quot;%s&quot;</ETag>%s</CopyPartResult>' % (
                   etag, checksum * (headers['x-amz-checksum-algorithm'] == 'SHA256')))
        self.answer(200, xml.encode(), {'Content-Type': 'application/xml'})

    def list_parts(self):
        if self.query['uploadId'] not in self.server.uploads:
            return self.error(404, 'NoSuchUpload')
        parts = self.server.uploads[self.query['uploadId']][1]
        numbers = [n for n in sorted(parts) if n > int(self.query.get('part-number-marker', 0))][:int(self.query.get('max-parts', 1000))]
        xml = ''.join('<Part><PartNumber>%d</PartNumber><Size>%d</Size></Part>' % (n, len(parts[n])) for n in numbers)
        xml = '<ListPartsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">%s</ListPartsResult>' % xml
        self.answer(200, xml.encode(), {'Content-Type': 'application/xml'})

    def store(self, data, headers):
        if self.server.conditions and self.headers.get('If-None-Match') == '*' and self.key in self.server.objects:
            return self.error(412, 'PreconditionFailed')
        etag = '"%s-x"' % hashlib.sha1(data).hexdigest()
        self.server.objects[self.key] = data, etag, headers
        if self.server.final:
            return self.server.final(self)
        if self.command == 'PUT':
            return self.answer(200, b'', {'ETag': etag})
        self.answer(200, COMPLETED % (self.server.url.encode(), self.key.encode(), self.key.encode(), etag.strip('"').encode()))

    def s3_post(self, body):
        if 'uploads' in self.query:
            upload = os.urandom(8).hex()
            self.server.uploads[upload] = self.headers, {}
            xml = ('<?xml version="1.0" encoding="UTF-8"?>\n<InitiateMultipartUploadResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                   '<Bucket>bucket</Bucket><Key>%s</Key><UploadId>%s</UploadId></InitiateMultipartUploadResult>' % (escape(self.key), upload))
            return self.answer(200, xml.encode())
        upload = self.server.uploads.get(self.query['uploadId'])
        if upload is None:
            return self.error(404, 'NoSuchUpload')
        headers, parts = upload
        if headers['x-amz-checksum-algorithm'] and body.count(b'<ChecksumSHA256>') != len(parts):
            return self.error(400, 'InvalidRequest', message='The upload was created using a sha256 checksum.')
        listed = re.findall(r'<PartNumber>(\d+)</PartNumber><ETag>([^<]*)</ETag>', body.decode())
        if [int(n) for n, _ in listed] != sorted(parts) or any(
                etag.replace('&quot;', '"') != '"%s"' % hashlib.sha1(parts[int(n)]).hexdigest() for n, etag in listed):
            return self.error(400, 'InvalidPart')
        if any(len(parts[n]) < 5 * MIB for n in sorted(parts)[:-1]):
            return self.error(400, 'EntityTooSmall')
        if not (self.server.conditions and self.headers.get('If-None-Match') and self.key in self.server.objects):
            del self.server.uploads[self.query['uploadId']]
        self.store(b''.join(parts[n] for n in sorted(parts)), headers)

    def s3_delete(self, body):
        """https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-deletes.html, and API_DeleteObject.html beside it."""
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
        self.answer(204, headers={'x-amz-delete-marker': 'true', 'x-amz-version-id': self.server.versioned} if self.server.versioned else {})


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

def parse_yaml(text):
    return {key: value for key, (value, _) in etc._parse_yaml(text).items()}


class Settings(Case):
    def parse(self, text):
        try:
            return parse_yaml(text)
        except ValueError as e:
            return e

    def test_what_is_read(self):
        self.assertEqual(self.parse(
            '# comment\n---\nurl: s3://bucket/x#y  # why\nhome:   ~/data \npublic: yes\nregion: "a\\tb\\u00e9"\n'
            "endpoint_url: 'it''s'\nconnections: 0x10\ncompression_level: 0\nca_bundle:\n\naws_profile: null\r\n"
            "aws_access_key_id: a:b\n'google_credentials': x y\n"),
            {'url': 's3://bucket/x#y', 'home': None if False else '~/data', 'public': True, 'region': 'a\tb\u00e9',
             'endpoint_url': "it's", 'connections': 16, 'compression_level': 0, 'ca_bundle': None,
             'aws_profile': None, 'aws_access_key_id': 'a:b', 'google_credentials': 'x y'})

    def test_escapes(self):
        for text, value in ((r'"C:\\udata"', 'C:\\udata'), (r'"\\\u00e9"', '\\\u00e9'), (r'"\u0041"', 'A'), ('"a\tb"', 'a\tb')):
            with self.subTest(text):
                self.assertEqual(self.parse('home: ' + text), {'home': value})
        for text in (r'"\ud83d\ude00"', r'"\\\ud83d"', r'"\ud83d"', r'"\q"', r'"\x41"'):
            with self.subTest(text):
                self.fails('home: ' + text, '.etc.yaml:1: unknown escape; in double quotes, write')

    def test_what_is_refused(self):
        for problem, lines in (
                ("not of the form 'key: value'", ('url', 'url:x', ' url: x', '\turl: x', '- x', '? a', '...', '%YAML 1.1')),
                ('this YAML syntax is not supported; put the value in double quotes',
                 ('url: [a]', 'url: {a: b}', 'url: |', 'url: >', 'url: &a b', 'url: *a', 'url: !!str x', 'url: a: b', 'url: @x', 'url: `x`',
                  'url: %x', 'url: a\tb')),
                ('a quoted value must end on its line', ('url: "a', "url: 'a' b", 'url: "a"#b')),
                ('unknown escape', ('url: "a\\q"',)),
                ('YAML may not read this value as text', ('url: 1.5', 'url: 2001-01-01', 'url: 1:30', 'url: -x', 'url: .inf')),
                ("'yes' cannot be a key", ('yes: x',)),
                ('YAML does not allow one of these characters', ('url: a\x07b', 'url: a\u2028b'))):
            for line in lines:
                with self.subTest(line):
                    self.fails('home: x\n' + line + '\n', '.etc.yaml:2: ' + problem)
        self.fails('url: a\nurl: b', ".etc.yaml:2: 'url' is set a second time")

    def load(self, text, mode=0o600):
        path = self.tmp / '.etc.yaml'
        path.write_bytes(text.encode('utf-8') if isinstance(text, str) else text)
        path.chmod(mode)
        return etc.Config.load()

    def fails(self, text, *words):
        with self.assertRaises(etc.ConfigError) as caught:
            self.load(text)
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertNotIn('\n', str(caught.exception))

    def test_errors_name_file_line_and_remedy(self):
        file = str(self.tmp / '.etc.yaml')
        self.fails('url: s3://b\nendpont_url: x', file + ':2', "did you mean 'endpoint_url'")
        self.fails('public: 1', file + ':1', 'true or false')
        self.fails('\nconnections: many', file + ':2', 'whole number')
        self.fails('aws_access_key_id: 1234', file + ':1', 'quotes')
        self.fails('connections: 0', 'from 1 to 256')
        self.fails('compression_level: 10', 'from 0 to 9')
        self.fails('url: [x]', file + ':1', 'quotes')
        self.fails(b'url: \xff', file, 'UTF-8')

    def test_byte_order_mark(self):
        """Notepad and PowerShell begin files with one."""
        for name, text in (('.etc.toml', 'url = "s3://toml"\nregion = "x"\n'), ('.etc.yaml', 'url: s3://yaml\nregion: x\n')):
            with self.subTest(name):
                (self.tmp / name).write_bytes(b'\xef\xbb\xbf' + text.encode())
                config = etc.Config.load()
                self.assertEqual((config.url, config.region), ('s3://' + name[5:], 'x'))
        self.fails(b'\xef\xbb\xbfurl: x\nulr: x', '.yaml:2', "did you mean 'url'")

    def test_precedence(self):
        self.load('url: file:///a\nhome: /h/a')
        self.assertEqual(etc.Config.load().url, 'file:///a')
        self.assertEqual(str(etc.Config.load().home), os.path.abspath('/h/a'))
        os.environ.update(ETC_URL='file:///b', ETC_HOME='/h/b')
        self.assertEqual((etc.Config.load().url, etc.Config.load().home), ('file:///b', Path(os.path.abspath('/h/b'))))
        self.assertEqual(etc.Config.load(url='file:///c').url, 'file:///c')
        other = self.tmp / 'other.yaml'
        other.write_text('region: x\n')
        os.environ['ETC_CONFIG'] = str(other)
        self.assertEqual(etc.Config.load().region, 'x')
        os.environ['ETC_CONFIG'] = str(self.tmp / 'missing')
        with self.assertRaisesRegex(etc.ConfigError, 'no settings file .*; create it, or drop --config'):
            etc.Config.load()

    def test_nothing_is_needed_for_local_work(self):
        config = etc.Config.load()
        self.assertEqual((config.url, config.home), (None, self.tmp / '.etc'))
        self.assertEqual(etc.ls(), [])
        with self.assertRaises(etc.ConfigError) as caught:
            etc.ls(remote=True)
        self.assertRegex(str(caught.exception), r'^no url; set where datasets are shared .* ~/\.etc\.yaml')
        self.assertFalse((self.tmp / '.etc').exists())

    def test_secrets(self):
        config = etc.Config('s3://b', aws_secret_access_key='hush', aws_session_token='hush')
        self.assertNotIn('hush', repr(config))
        with self.assertLogs('etcetera', 'WARNING') as logs:
            self.load('aws_secret_access_key: x', 0o644)
        self.assertIn('chmod 600', logs.output[0])
        logger = logging.getLogger('etcetera')
        handler = logging.Handler()
        handler.emit = self.fail
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        self.load('aws_secret_access_key: x', 0o600)
        self.load('region: x', 0o644)

    def test_config_in_python(self):
        with self.assertRaisesRegex(etc.ConfigError, "^unknown setting 'nonsense'"):
            etc.Config('s3://b', nonsense=1)
        with self.assertRaisesRegex(etc.ConfigError, "^'public' must be true or false"):
            etc.Config('s3://b', public='yes')
        self.assertEqual(etc.Config('file:///x', self.tmp).home, self.tmp)


@needs(importable('yaml'), 'PyYAML is not installed')
class SettingsOracle(unittest.TestCase):
    def test_generated_documents(self):
        import yaml
        rng = random.Random(7)
        atoms = ['yes', 'No', 'true', 'off', 'null', '~', '', '0', '7', '-3', '+4', '0x1F', '0b101', '017', '08', '1_000', '1.5',
                 '1e3', '.5', '1:30', '2001-01-01', 's3://b/c', 'a b', 'a#b', 'a #b', '# c', '"q"', "'q'", '"a\\nb"',
                 '"\\x41\\u00e9\\U0001F600"', "'it''s'", '"a" # c', "'a'  # c", '"', "'", 'a: b', 'a:', ':a', '-', '- a', '-a', '?',
                 '? a', '[a]', '{a: b}', ',', '&a', '*a', '!a', '|', '>', '%a', '@a', '`a', '\u00e9', '\u65e5', 'a\tb', '\ta',
                 'a\u00a0', 'a\u2028b', 'a\x85b', '<<', '=', '.', '..', '.inf', '.NaN', '0o7', '0_', '_1', '1_', '"\\/"', '"\\ "',
                 '"\\\t"', 'a\\nb', "a'b", 'a"b', '~x', 'nullx', 'Yes!', 'y', 'N', '---', '--- a', '...', 'a  ', '12e03', '1.',
                 '685.230_15e+03', '190:20:30', '-0', '+0x_1', '1__0', 'a]', 'a}', 'a,b', 'a,', 'http://x:1/', '::', 'a::b', 'a :b']
        shapes = ['%s: %s', '%s:  %s', '%s : %s', '%s:%s', ' %s: %s', '"%s": %s', "'%s': %s", '%s:\t%s', '%s: %s ', '%s: %s # c',
                  '# %s%s', '%s', '- %s: %s', '%s: %s\n  more', '%s:\n- %s', '%s:\n %s']
        read = 0
        for _ in range(30000):
            lines = []
            for _ in range(rng.randrange(1, 4)):
                shape = rng.choice(shapes) if rng.random() < .4 else shapes[0]
                key = rng.choice(['url', 'k', 'a-b', 'yes', 'null', 'x1', '_', '<<', 'n'])
                value = ''.join(rng.choice(atoms) for _ in range(1 if rng.random() < .7 else 2))
                lines.append(shape % ((key, value)[:shape.count('%s')]))
            text = rng.choice(['', '---\n', '\n', '# c\n']) + rng.choice(['\n', '\n', '\r\n', '\n\n']).join(lines)
            try:
                found = parse_yaml(text)
            except ValueError:
                continue
            read += 1
            expected = yaml.safe_load(text)
            self.assertEqual(found, {} if expected is None else expected, repr(text))
            self.assertEqual(list(map(type, found.values())), list(map(type, (expected or {}).values())), repr(text))
        self.assertGreater(read, 4000)


# ---------------------------------------------------------------------------------------
# Datasets and local commands
# ---------------------------------------------------------------------------------------

class Datasets(Case):
    def test_mapping(self):
        ds = etc.register(small(self.tmp / 'ds'), 'Small', config=self.config())
        self.assertEqual(ds.keys(), {'test', 'train'})
        self.assertEqual(list(ds), ['test', 'train'])
        self.assertEqual(len(ds), 2)
        self.assertEqual(ds['train'], self.tmp / 'home/Small/data/train')
        self.assertEqual(ds.meta, {'classes': 10})
        self.assertEqual((ds.name, ds.root), ('Small', self.tmp / 'home/Small'))
        self.assertEqual(dict(ds), {'train': ds['train'], 'test': ds['test']})
        self.assertIn('Small', repr(ds))
        self.assertRegex(ds.digest, r'^sha256:[0-9a-f]{64}$')
        with self.assertRaises(KeyError) as caught:
            ds['val']
        self.assertIsInstance(caught.exception, etc.Error)
        self.assertEqual(str(caught.exception), "no partition 'val' in Small; it has: test, train")
        with self.assertRaisesRegex(TypeError, 'does not support item assignment'):
            ds['val'] = 1
        self.assertNotIn('val', ds)
        self.assertIsNone(ds.get('val'))

    def invalid(self, files, *words):
        root = write(self.tmp / 'bad', files)
        _, err = self.etc('register', root, 'Bad', status=1)
        for word in words:
            self.assertIn(word, err)
        self.assertEqual(self.installed(), [])
        shutil.rmtree(str(root))

    def test_validation(self):
        self.invalid({'x': 'y'}, "needs a directory 'data'")
        self.invalid({'data': 'y'}, "needs a directory 'data'")
        self.invalid({'data': None}, "'data' is empty")
        self.invalid({'data/train/x': 'y', 'data/stray': 'z'}, "may hold only directories (partitions), but 'data/stray' is a file")
        self.invalid({'data/train/x': 'y', 'meta.json': '[1]'}, 'JSON object')
        self.invalid({'data/train/x': 'y', 'meta.json': '{'}, 'meta.json', 'not JSON')
        self.invalid({'data/train/x': 'y', 'meta.json': b'\xff'}, 'meta.json', 'not JSON')
        self.invalid({'data/train/x': 'y', 'data/link': ('->', 'nowhere')}, 'data/link', 'link to nothing')
        _, err = self.etc('register', self.tmp / 'absent', status=1)
        self.assertIn('no directory %s' % (self.tmp / 'absent'), err)

    def test_names(self):
        root = small(self.tmp / 'ds')
        for name in ('', '.', '..', '.x', '-x', '_x', 'a/b', 'a\\b', 'a b', '\u00e9', 'x' * 129, 'a\n', 'a@b', '../x', '/x',
                     'a@sha256:12', 'CON\0'):
            problem = 'is not NAME@sha256:' if '@' in name else "cannot be a dataset's name"
            for call in (etc.pull, etc.push, etc.create, etc.purge, etc.verify, etc.dataset, etc.info, etc.register):
                with self.subTest(name=name, call=call.__name__):
                    with self.assertRaisesRegex(etc.InvalidDataset, problem):
                        call(*([root, name] if call is etc.register else [name]), config=self.config())
        self.assertFalse((self.tmp / 'home').exists())
        for name in ('a', '0', 'A.b-c_d', 'x' * 128):
            with self.subTest(name):
                etc.register(root, name, config=self.config())
        self.assertEqual(len(self.installed()), 4)

    def test_register(self):
        root = small(self.tmp / 'ds')
        self.etc('register', root)
        self.etc('register', root, 'as', 'Two')
        self.etc('register', root, 'Three')
        self.assertEqual(self.etc('ls')[0], 'Three\nTwo\nds\n')
        self.assertTrue((self.tmp / 'home/Two').is_symlink())
        self.assertIn('registered already', self.etc('register', root, 'Two')[1])
        other = small(self.tmp / 'other')
        self.assertIn('is installed already', self.etc('register', other, 'Two', status=1)[1])
        self.etc('register', '-f', other, 'Two')
        self.assertEqual(os.path.realpath(str(self.tmp / 'home/Two')), str(other))
        for words in (['a', 'b', 'c'], ['a', 'as', 'b', 'c']):
            with self.subTest(words):
                self.assertIn('register takes DIR, DIR NAME or DIR as NAME;', self.etc('register', *words, status=2)[1])
        self.etc('purge', 'Two', 'Three')
        self.assertEqual(self.installed(), ['ds'])
        self.assertTrue((other / 'data').is_dir())
        cwd = os.getcwd()
        os.chdir(str(self.tmp))
        try:
            self.etc('register', './ds', 'as', 'Relative')
        finally:
            os.chdir(cwd)
        self.assertEqual(etc.dataset('Relative', config=self.config()).keys(), {'train', 'test'})

    def test_register_copy(self):
        root = odd(self.tmp / 'ds', 10)
        self.etc('register', '--copy', root, 'Copy')
        copy = self.tmp / 'home/Copy'
        self.assertFalse(copy.is_symlink())
        self.assertEqual(tree(copy), tree(root))
        self.assertEqual(etc.Dataset(root).digest, etc.dataset('Copy', config=self.config()).digest)
        for path in copy.rglob('*'):
            if path.is_file() and not path.is_symlink():
                self.assertFalse(path.stat().st_mode & 0o222, path)
        self.etc('verify', 'Copy')
        self.assertIn("another 'Copy' is installed already", self.etc('register', '--copy', root, 'Copy', status=1)[1])
        self.etc('register', '--copy', '-f', small(self.tmp / 'new'), 'Copy')
        self.assertEqual(tree(copy), tree(self.tmp / 'new'))
        self.etc('register', '-f', root, 'Copy')  # a directory makes room for a link
        self.assertTrue(copy.is_symlink())
        self.etc('register', '-f', '--copy', self.tmp / 'new', 'Copy')  # and a link for a directory
        self.assertEqual(tree(copy), tree(self.tmp / 'new'))
        self.assertEqual(self.leftovers(), [])

    def test_create(self):
        self.etc('create', 'New')
        self.assertEqual(etc.dataset('New', config=self.config()).keys(), {'train', 'test'})
        self.assertIn("another 'New' is installed already", self.etc('create', 'New', status=1)[1])
        self.etc('create', 'Other', 'val', 'dev set')
        self.assertEqual(etc.dataset('Other', config=self.config()).keys(), {'val', 'dev set'})
        (self.tmp / 'home/New/data/train/x').write_text('x')
        self.etc('create', '-f', 'New', 'one')
        self.assertEqual(tree(self.tmp / 'home/New'), {'data': None, os.path.join('data', 'one'): None})
        for bad in ('..', 'a/b', '.', ''):
            with self.subTest(bad):
                self.assertIn("etc: '%s' cannot be a partition's name" % bad, self.etc('create', 'Bad', bad, status=1)[1])
        for bad in ('train', (), None):
            with self.subTest(bad):
                with self.assertRaisesRegex(etc.InvalidDataset, 'partitions must be a list of one or more names'):
                    etc.create('Bad', bad, config=self.config())

    def test_register_what_is_installed(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        for path in ('home/X', 'home/X/data/..', 'home/X/data'):
            with self.subTest(path):
                write(self.tmp / 'home/X/data', {'data/p/x': 'x'})  # so that even data/ looks like a dataset
                self.assertIn("is what is installed as 'X'; use --copy", self.etc('register', '-f', self.tmp / path, 'X', status=1)[1])
        self.assertTrue((self.tmp / 'home/X/data/train/a.txt').exists())
        self.etc('register', '-f', '--copy', self.tmp / 'home/X', 'X')
        self.etc('register', self.tmp / 'home/X', 'Y')
        self.assertEqual(etc.dataset('Y', config=self.config()).digest, etc.dataset('X', config=self.config()).digest)

    def test_registered_directory_that_is_gone(self):
        self.etc('register', small(self.tmp / 'ds'), 'X')
        shutil.rmtree(str(self.tmp / 'ds'))
        for command in ('push', 'verify', 'info'):
            with self.subTest(command):
                self.assertIn("'etc purge X' forgets it", self.etc(command, 'X', status=1)[1])
        self.etc('ls', '-l')
        self.etc('purge', 'X')

    def test_odd_places(self):
        write(self.tmp, {'file': 'x', 'ds/data/train/x': 'x', 'ds/meta.json': None})
        file = ('Not a directory: ' if os.name == 'posix' else '') + str(self.tmp / 'file')
        self.assertIn(file, self.etc('ls', '-l', home='file', status=1)[1])
        self.assertIn(file, self.etc('ls', home='file', status=1)[1])
        self.assertIn(file, self.etc('ls', '-r', '-l', url=(self.tmp / 'file').as_uri(), status=1)[1])
        self.assertIn('meta.json is not JSON: it is not a file', self.etc('register', self.tmp / 'ds', 'X', status=1)[1])
        self.assertIn('a path cannot contain a NUL', self.etc('register', 'a\0b', 'X', status=1)[1])
        with self.assertRaisesRegex(etc.InvalidDataset, 'meta.json is not JSON: it is not a file'):
            etc.Dataset(self.tmp / 'ds')
        with self.assertRaisesRegex(etc.InvalidDataset, 'partitions must be a list of one or more names'):
            etc.dataset('X', True, 'train', config=self.config())

    def test_purge_of_a_read_only_directory(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'X')
        for path in [self.tmp / 'home/X'] + list((self.tmp / 'home/X').rglob('*')):
            path.chmod(0o555)
        self.etc('purge', 'X')
        self.assertEqual((self.installed(), self.leftovers()), ([], []))

    def test_purge_and_info_and_ls(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'Small')
        out = self.etc('info', 'Small')[0]
        for word in ('sha256:', 'train', 'test', '"classes": 10', '# Small'):
            self.assertIn(word, out)
        found = json.loads(self.etc('info', '--json', 'Small')[0])
        self.assertEqual((found['files'], found['meta'], found['readme']), (6, {'classes': 10}, '# Small\n'))
        self.assertEqual(found['partitions'], {'train': {'files': 2, 'size': 5006}, 'test': {'files': 1, 'size': 5}})
        self.assertEqual(json.loads(self.etc('ls', '--json')[0])[0]['digest'], found['digest'])
        self.assertIn(found['digest'], self.etc('ls', '-l')[0])
        self.assertIn("did you mean 'Small'", self.etc('info', 'Smal', status=1)[1])
        out, err = self.etc('purge', 'Nope', 'Small', 'Nada', status=1)
        self.assertEqual(err.count('etc: no local dataset'), 2)
        self.assertEqual(self.installed(), [])
        self.assertEqual(self.leftovers(), [])

    def test_verify(self):
        self.etc('register', '--copy', small(self.tmp / 'ds'), 'Small')
        digest = etc.verify('Small', config=self.config())
        self.etc('verify', 'Small@' + digest)
        self.assertIn("'Small': expected digest sha256:000", self.etc('verify', 'Small@sha256:' + '0' * 64, status=1)[1])
        victim = self.tmp / 'home/Small/data/train/a.txt'
        victim.chmod(0o644)
        victim.write_text('alphA\n')
        err = self.etc('verify', 'Small', status=1)[1]
        self.assertIn('data/train differs', err)
        self.assertNotIn('data/test', err)
        self.assertIn("the files of 'Small': expected digest %s, found" % digest, self.etc('push', 'Small', status=1)[1])
        self.assertEqual(glob.glob(str(self.tmp / 'share/*')) + glob.glob(str(self.tmp / 'share/.*.tgz*')), [])

    def test_usage(self):
        self.etc(status=2)
        self.assertIn("no command 'nonsense';", self.etc('nonsense', status=2)[1])
        self.assertIn("'etc pull' needs NAME;", self.etc('pull', status=2)[1])
        self.assertIn('register', self.etc('-h')[0])
        self.assertIn(etc.__version__, self.etc('--version')[0])
        self.etc('ls', '-v')
        self.etc('-q', 'create', 'X')
        self.assertEqual(self.etc('-q', 'verify', 'X')[1], '')
        self.assertIn('Traceback', ''.join(self.failing('-v', 'info', 'Nope')))

    def failing(self, *args):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            self.assertEqual(etc.main(list(args)), 1)
        return err.getvalue()


# ---------------------------------------------------------------------------------------
# The archive format, read here by an independent reader
# ---------------------------------------------------------------------------------------

PINNED = 'sha256:04a28282072296f3cbbc2ea22b5cc10bb832a4bcc56f36ef05975be6684a31ae'


def members(archive):
    """All gzip members as (offset, length, tag, extra, payload)."""
    found, at = [], 0
    while at < len(archive):
        assert archive[at:at + 4] == b'\x1f\x8b\x08\x04', at
        total, tag, length = struct.unpack_from('<H2sH', archive, at + 10)
        assert total == length + 4
        extra = archive[at + 16:at + 16 + length]
        inflater = zlib.decompressobj(31)
        payload = inflater.decompress(archive[at:])
        assert inflater.eof
        size = len(archive) - at - len(inflater.unused_data)
        found.append((at, size, tag, extra, payload))
        at += size
    return found


EMPTY = b'\3\0' + bytes(8)  # what follows the header of an empty member


def member(tag, data):
    """The header of a gzip member with one extra field."""
    return b'\x1f\x8b\x08\x04' + bytes(5) + b'\xff' + struct.pack('<H2sH', len(data) + 4, tag, len(data)) + data


def block(payload, body=None):
    """A block with this payload; `body` may lie about it."""
    if body is None:
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = deflate.compress(payload) + deflate.flush()
    return member(b'et', struct.pack('<I', 28 + len(body))) + body + struct.pack('<II', zlib.crc32(payload), len(payload))


def header(name, kind=b'0', mode=0o644, size=0, link='', mtime=315532800):
    """A canonical tar header."""
    fields = [(key, value) for key, value in (('path', name), ('linkpath', link))
              if len(value.encode('ascii', 'replace')) > 100 or re.search('[^\0-\x7f]', value)]
    pax = b''
    for key, value in fields:
        record = (' %s=%s\n' % (key, value)).encode('utf-8')
        length = next(n for n in range(len(record), len(record) + 9) if n == len(record) + len(str(n)))
        pax += str(length).encode() + record
    before = header('././@PaxHeader', b'x', 0, len(pax), mtime=0) + pax + bytes(-len(pax) % 512) if pax else b''
    raw = bytearray(512)
    for at, field in ((0, name.encode('ascii', 'replace')[:100]), (100, b'%07o' % mode), (108, b'%07o' % 0), (116, b'%07o' % 0),
                      (124, b'%011o' % size), (136, b'%011o' % mtime), (148, b' ' * 8), (156, kind),
                      (157, link.encode('ascii', 'replace')[:100]), (257, b'ustar\x0000')):
        raw[at:at + len(field)] = field
    raw[148:155] = b'%06o\0' % sum(raw)
    return before + bytes(raw)


def segment(path, offset, length, files, size, digest):
    return dict(path=path, offset=offset, length=length, files=files, size=size, digest=digest)


def index_of(segments, offset):
    """The index and the footer of an archive with these segments, which may lie."""
    total = hashlib.sha256()
    for each in segments:
        total.update(each['path'].encode() + b'\0' + bytes.fromhex(each['digest'][7:]))
    text = json.dumps({'etcetera': 1, 'digest': 'sha256:' + total.hexdigest(), 'segments': segments},
                      separators=(',', ':'), ensure_ascii=False).encode()
    steps = [text[at:at + 8000] for at in range(0, len(text), 8000)]
    return b''.join(member(b'ei', step) + EMPTY for step in steps) + member(b'ef', struct.pack('<Q', offset)) + EMPTY


def canonical(root, names):
    """The canonical tar bytes of some names, by tarfile (which agrees from Python 3.9 on)."""
    out = b''
    for name in names:
        path = Path(str(root), name)
        info = tarfile.TarInfo(name)
        info.mtime, info.mode = 315532800, 0o644
        data = b''
        if path.is_symlink():
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(str(path))
        elif path.is_dir():
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        else:
            data = path.read_bytes()
            info.size = len(data)
            info.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
        out += info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)
    return out


class Format(Case):
    def push(self, root, **settings):
        etc.register(root, 'X', config=self.config())
        etc.push('X', force=True, config=self.config(**settings))
        return (self.tmp / 'share/X.tgz').read_bytes()

    def test_structure(self):
        root = odd(self.tmp / 'ds')
        archive = self.push(root)
        found = members(archive)
        footer = found[-1]
        self.assertEqual((footer[1], footer[2], footer[4]), (34, b'ef', b''))
        start = struct.unpack('<Q', footer[3])[0]
        index = [m for m in found if m[2] == b'ei']
        self.assertEqual(index[0][0], start)
        self.assertTrue(all(len(m[3]) <= 8000 and m[4] == b'' for m in index))
        text = json.loads(b''.join(m[3] for m in index).decode('utf-8'))
        self.assertEqual(text['etcetera'], 1)
        blocks = [m for m in found if m[2] == b'et']
        self.assertTrue(all(struct.unpack('<I', m[3])[0] == m[1] for m in blocks))
        self.assertEqual(blocks[-1][4], bytes(1024))
        self.assertEqual([s['path'] for s in text['segments']],
                         ['.', 'a', 'assets', 'data/empty', 'data/test', 'data/train'])
        total = hashlib.sha256()
        names = tree(root)
        for s in text['segments']:
            own = [m for m in blocks if s['offset'] <= m[0] < s['offset'] + s['length']]
            self.assertEqual(sum(m[1] for m in own), s['length'])
            self.assertTrue(all(len(m[4]) == MIB for m in own[:-1]) and 0 < len(own[-1][4]) <= MIB)
            digest = hashlib.sha256(b''.join(hashlib.sha256(m[4]).digest() for m in own)).digest()
            self.assertEqual(s['digest'], 'sha256:' + digest.hex())
            total.update(s['path'].encode() + b'\0' + digest)
            if s['path'] == '.':
                inside = [n for n in names if os.sep not in n and (n == 'data' or not (root / n).is_dir())]
            else:
                inside = [n for n in names if (n + os.sep).startswith(s['path'].replace('/', os.sep) + os.sep)]
            inside = sorted((n.replace(os.sep, '/') for n in inside), key=lambda n: n.split('/'))
            if sys.version_info >= (3, 9):
                self.assertEqual(b''.join(m[4] for m in own), canonical(root, inside), s['path'])
            files = [n for n in inside if not (root / n).is_dir() or (root / n).is_symlink()]
            self.assertEqual(s['files'], len(files))
            self.assertEqual(s['size'], sum((root / n).stat().st_size for n in files if not (root / n).is_symlink()))
        self.assertEqual(text['digest'], 'sha256:' + total.hexdigest())
        self.assertEqual(len(blocks) + len(index) + 1, len(found))

    def test_blocks(self):
        root = write(self.tmp / 'ds', {'data/a/noise': noise(3 * MIB), 'data/b/text': 'some text, again and again\n' * 120000})
        archive = self.push(root)
        blocks = [m for m in members(archive) if m[2] == b'et']
        kinds = [archive[m[0] + 20] & 7 for m in blocks if len(m[4]) == MIB]
        self.assertTrue(all(kind & 6 == 0 for kind in kinds[:3]), 'incompressible blocks are stored')
        self.assertTrue(all(m[1] < MIB / 10 for m in blocks[-4:-1]), 'text is compressed')
        self.assertLess(len(archive), 3.4 * MIB)
        self.assertGreater(len(self.push(root, compression_level=0)), 6 * MIB)

    def test_digest_is_pinned(self):
        root = write(self.tmp / 'ds', {
            'README.md': 'pinned\n', 'assets/a': b'\0\1\2', 'data/train/\u00e9/x': 'x' * 3000, 'data/train/' + 'n' * 120: 'long',
            'data/train/link': ('->', '\u00e9/x'), 'data/test': None, 'data/train/big': bytes(range(256)) * 8192})
        os.chmod(str(root / 'assets/a'), 0o700)
        self.assertEqual(etc.Dataset(root).digest, PINNED)

    def test_digest_depends_on_contents_alone(self):
        one, two = odd(self.tmp / 'one', 5), self.tmp / 'two'
        shutil.copytree(str(one), str(two), symlinks=True)
        for path in two.rglob('*'):
            if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() or path.name == 'run.sh' else 0o600)
                os.utime(str(path), (1e9, 1e9))
        self.assertEqual(etc.Dataset(one).digest, etc.Dataset(two).digest)
        digest = etc.Dataset(two).digest
        for what, change in (
                ('a file', lambda: (two / 'data/train/white space').write_text('!')),
                ('an executable bit', lambda: (two / 'data/train/run.sh').chmod(0o644)), ('a partition', lambda: (two / 'data/new').mkdir()),
                ('an empty directory', lambda: (two / 'data/train/sub/x').mkdir()), ('a name', lambda: (two / 'a/x').rename(two / 'a/y'))):
            with self.subTest(what):
                change()
                self.assertNotEqual(etc.Dataset(two).digest, digest)
                digest = etc.Dataset(two).digest

    def test_links(self):
        root = write(self.tmp / 'ds', {
            'outside/f': 'f', 'ds/data/train/real/f': 'real', 'ds/data/train/kept': ('->', 'real/f'),
            'ds/data/train/round': ('->', 'real/../real/f'), 'ds/data/train/out': ('->', '../../../outside'),
            'ds/data/train/other': ('->', '../test/t'), 'ds/data/test/t': 't', 'ds/notes': ('->', 'data/test/t'),
            'ds/data/val': ('->', 'test'), 'ds/extra': ('->', '../outside'),
            'ds/data/train/back': ('->', '../../../ds/data/train/real/f'),
            'ds/data/train/absolute': ('->', str(self.tmp / 'ds/ds/data/train/real/f'))}) / 'ds'
        self.push(root)
        etc.pull('X', config=self.config('two'))
        pulled = tree(self.tmp / 'two/X')
        self.assertEqual(pulled['data/train/kept'], ('->', 'real/f'))
        self.assertEqual(pulled['data/train/round'], ('->', 'real/f'))
        for name in ('data/train/back', 'data/train/absolute'):
            with self.subTest(name):
                self.assertEqual(pulled[name][0], b'real')
        for name in ('data/train/other', 'notes', 'data/val/t'):
            with self.subTest(name):
                self.assertEqual(pulled[name][0], b't')
        self.assertEqual((pulled['data/train/out/f'][0], pulled['extra/f'][0]), (b'f', b'f'))
        etc.verify('X', config=self.config('two'))

    def refused(self, files, *words):
        root = write(self.tmp / 'bad', dict(files, **{'data/train/ok': 'ok'}))
        etc.register(root, 'Bad', force=True, config=self.config())
        err = self.etc('push', 'Bad', status=1)[1]
        for word in words:
            self.assertIn(word, err)
        self.assertEqual(list((self.tmp / 'share').glob('*')) if (self.tmp / 'share').exists() else [], [])
        shutil.rmtree(str(root))

    def test_what_cannot_be_packed(self):
        self.refused({'data/train/x': ('->', 'gone')}, 'data/train/x', 'link to nothing')
        self.refused({'data/train/x': ('->', 'y'), 'data/train/y': ('->', 'x')}, 'data/train/x', 'back to itself')
        self.refused({'assets/up': ('->', '../..')}, 'is a link to a directory above it')
        if hasattr(os, 'mkfifo'):
            root = write(self.tmp / 'fifo', {'data/train/ok': 'ok'})
            os.mkfifo(str(root / 'data/train/pipe'))
            etc.register(root, 'Bad', force=True, config=self.config())
            self.assertIn("'data/train/pipe' is neither a file nor a directory", self.etc('push', 'Bad', status=1)[1])
        if sys.platform.startswith('linux'):
            root = write(self.tmp / 'latin', {'data/train/ok': 'ok'})
            with open(os.fsencode(str(root)) + b'/data/train/caf\xe9', 'wb'):
                pass
            etc.register(root, 'Bad', force=True, config=self.config())
            err = self.etc('push', 'Bad', status=1)[1]
            self.assertIn('is not valid UTF-8', err)
            self.assertIn('caf\\xe9', err)

    def test_file_that_grows(self):
        root = write(self.tmp / 'ds', {'data/train/log': b'x' * (8 * MIB)})
        etc.register(root, 'X', config=self.config())
        stop = threading.Event()

        def grow():
            with open(str(root / 'data/train/log'), 'ab') as file:
                while not stop.is_set():
                    file.write(b'y' * 100)
                    file.flush()
        thread = threading.Thread(target=grow)
        thread.start()
        try:
            err = self.etc('push', 'X', status=1)[1]
        finally:
            stop.set()
            thread.join()
        self.assertIn("'data/train/log' changed", err)
        self.assertEqual(os.listdir(str(self.tmp / 'share')), [])

    @unittest.skipUnless(shutil.which('tar'), 'no tar here')
    def test_other_tools_unpack_it(self):
        root = odd(self.tmp / 'ds')
        archive = self.push(root)
        gz = str(self.tmp / 'share/X.tgz')
        tools = [['tar', 'xzf', gz, '-C'], ['bsdtar', 'xzf', gz, '-C'], ['busybox', 'tar', 'xzf', gz, '-C']]
        for tool in tools:
            with self.subTest(tool[0]):
                if not shutil.which(tool[0]):
                    if os.environ.get('ETC_TEST_REQUIRE_PEERS'):
                        self.fail('no %s here' % tool[0])
                    continue
                target = self.tmp / ('by-' + tool[0])
                target.mkdir()
                done = subprocess.Popen(tool + [str(target)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        env=dict(os.environ, LC_ALL='C.UTF-8'))
                self.assertEqual((done.communicate()[0], done.returncode), (b'', 0), tool)
                self.assertEqual(tree(target), tree(root), tool)
        with tarfile.open(gz) as tar:
            tar.extractall(str(self.tmp / 'by-tarfile'), **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
        self.assertEqual(tree(self.tmp / 'by-tarfile'), tree(root))
        self.assertEqual(len(archive), os.path.getsize(gz))

    def test_many_partitions_make_a_long_index(self):
        root = write(self.tmp / 'ds', {'data/partition %04d/x' % n: str(n) for n in range(500)})
        archive = self.push(root)
        self.assertGreater(sum(m[1] for m in members(archive) if m[2] == b'ei'), etc._TAIL)
        etc.pull('X', config=self.config('two'))
        self.assertEqual(tree(self.tmp / 'two/X'), tree(root))
        self.assertEqual(len(etc.info('X', remote=True, config=self.config())['partitions']), 500)

    def test_unknown_version_is_still_a_tgz(self):
        root = small(self.tmp / 'ds')
        archive = self.push(root)
        (self.tmp / 'share/X.tgz').write_bytes(archive.replace(b'{"etcetera":1,', b'{"etcetera":2,'))
        etc.pull('X', config=self.config('two'))
        self.assertEqual(tree(self.tmp / 'two/X'), tree(root))


class Foreign(Case):
    """Archives that other tools made."""

    def pull(self, root, name='X'):
        ds = etc.pull(name, config=self.config())
        self.assertEqual(tree(ds.root), tree(root))
        self.assertEqual(ds.digest, etc.Dataset(root).digest)
        etc.verify(name, config=self.config())
        self.assertIn('identical', self.etc('pull', name)[1])
        etc.purge(name, config=self.config())

    def test_tarfile(self):
        root = odd(self.tmp / 'ds', 20)
        share = write(self.tmp / 'share', {'.': None})
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            for top in ('', './'):
                with self.subTest(form=form, top=top):
                    with tarfile.open(str(share / 'X.tgz'), 'w:gz', format=form, encoding='utf-8') as tar:
                        for item in root.iterdir() if not top else [root]:
                            tar.add(str(item), top or item.name)
                    self.pull(root)

    def test_broken_off(self):
        """Whatever ends a pull while a thread waits for the network comes out as it is."""
        evil = self.entry('../evil')
        good = self.entry('data/train/x', noise(12 * MIB))
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        read = etc._FileRemote.read
        self.addCleanup(setattr, etc._FileRemote, 'read', read)
        etc._FileRemote.read = lambda remote, obj, start, *args: (start > 2 * MIB and go_on.wait(2), read(remote, obj, start, *args))[1]

        def stop(error):
            def progress(done, total):
                if done:
                    time.sleep(0.2)
                    raise error
            return progress
        for name, tar, progress, expected, message in (
                ('an unsafe name', evil + good, None, etc.Corrupt, "the unsafe name '../evil'"),
                ('a fault of the caller', good, stop(KeyError('mine')), KeyError, '^.mine.$'),
                ('Ctrl-C', good, stop(KeyboardInterrupt('mine')), KeyboardInterrupt, '^mine$')):
            with self.subTest(name):
                write(self.tmp / 'share', {'X.tgz': gzip.compress(tar + bytes(1024), 1)})
                with self.assertRaisesRegex(expected, message):
                    etc.pull('X', config=self.config(), progress=progress)
                self.assertEqual((self.installed(), self.leftovers()), ([], []))

    def refused(self, tar, message):
        """Pull a tar that must be refused with this message, and leave nothing."""
        write(self.tmp / 'share', {'X.tgz': gzip.compress(tar)})
        err = self.etc('pull', 'X', status=1)[1]
        self.assertRegex(err, "^etc: 'X' in file:///.*: the archive is damaged or not a .tgz: .*" + message)
        self.assertEqual((self.installed(), self.leftovers()), ([], []))

    @staticmethod
    def entry(name, data=b'', kind=b'0', size=None, fields=()):
        """The bytes of one entry as GNU tar writes it; `fields` are {offset in the header: other bytes}."""
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data) if size is None else size
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        for offset, value in dict(fields).items():
            header[offset:offset + len(value)] = value
        header[148:156] = b' ' * 8
        header[148:156] = b'%06o\0 ' % sum(header)
        return bytes(header) + data + bytes(-len(data) % 512)

    def three(self):
        return [self.entry('data/train/' + name, name.encode() * 600) for name in 'abc']

    def test_tar_that_breaks_off(self):
        whole = b''.join(self.three())
        broken = bytearray(whole)
        broken[3 * 512] ^= 1
        pax = self.entry('././@PaxHeader', b'32 path=data/train/longlonglong\n', b'x')
        name = self.entry('././@LongLink', b'data/train/' + b'n' * 200 + b'\0', b'L')
        sparse = self.entry('data/train/s', b'', b'S', fields={483: b'%011o\0' % 4096})
        more = self.entry('data/train/s', b'', b'S', fields={482: b'\1', 483: b'%011o\0' % 4096})
        for what, tar, message in (
                ('nothing at all', b'', 'ends too early'),
                ('in the first header', whole[:300], 'ends too early'),
                ('after the first header', whole[:512], 'ends too early'),
                ('within a file', whole[:2000], 'ends too early'),
                ('in the padding of a file', whole[:512 + 610], 'ends too early'),
                ('after one file', whole[:3 * 512], 'ends too early'),
                ('in the second header', whole[:3 * 512 + 200], 'ends too early'),
                ('after all files, without its end', whole, 'ends too early'),
                ('in a pax header', whole + pax[:520], 'ends too early'),
                ('after a pax header', whole + pax, 'ends too early'),
                ('with an end after a pax header', whole + pax + bytes(1024), 'end of file header|subsequent header'),
                ('in a long name', whole + name[:600], 'ends too early'),
                ('after a long name', whole + name, 'ends too early'),
                ('with an end after a long name', whole + name + bytes(1024), 'end of file header|subsequent header'),
                ('in the map of a sparse file', whole + more, 'ends too early'),
                ('further in the map of a sparse file', whole + more + bytes(100), 'ends too early'),
                ('a broken header', bytes(broken) + bytes(1024), 'bad checksum|invalid header'),
                ('a broken first header', b'?' + whole[1:] + bytes(1024), 'bad checksum|invalid header'),
                ('a broken header after a pax header', pax + b'?' + whole[1:] + bytes(1024), 'checksum|subsequent header'),
                ('text', b'<html>' * 1000, 'bad checksum|invalid header'),
                ('two archives', (whole + bytes(1024)) * 2, 'another archive follows its end')):
            with self.subTest(what):
                self.refused(tar, message)
        with self.subTest('within a sparse file'):
            hole = self.entry('data/train/s', b'', b'S', fields={386: b'%011o\0%011o\0' % (0, 2048), 483: b'%011o\0' % 4096})
            self.refused(whole + hole[:512] + bytes(600), 'ends too early')
        for end in (bytes(512), bytes(1024), bytes(10240)):
            with self.subTest('whole', end=len(end)):
                write(self.tmp / 'share', {'X.tgz': gzip.compress(whole + pax + self.three()[0] + sparse + end)})
                self.assertEqual(sorted(p.name for p in etc.pull('X', config=self.config())['train'].iterdir()),
                                 ['a', 'b', 'c', 'long' * 3, 's'])
                etc.purge('X', config=self.config())

    def test_malformed_pax_records(self):
        good, entry = b'12 a=bcdefg\n', self.three()[0]
        for kind in (b'x', b'g', b'X'):
            for what, records in (
                    ('no length', b' a=b\n'), ('not a length', b'x a=b\n'), ('length of nothing', b'0 X=1\n'),
                    ('too short', b'4 a=b\n'), ('too long', b'99 a=b\n'), ('no equals sign', b'6 abc\n'),
                    ('no key', b'5 =b\n'), ('no newline', b'6 a=bc'), ('junk', b'junk'), ('junk after a record', good + b'junk'),
                    ('a record after a zero', good + b'\0' + good), ('a negative length', b'-6 a=b\n'),
                    ('a length of many digits', b'9' * 30 + b' a=b\n')):
                with self.subTest(what, kind=kind):
                    self.refused(self.entry('pax', records, kind) + entry + bytes(1024), 'pax')
            with self.subTest('after a long name', kind=kind):
                name = self.entry('././@LongLink', b'data/train/' + b'n' * 200 + b'\0', b'L')
                self.refused(name + self.entry('pax', b'0 X=1\n', kind) + entry + bytes(1024), 'pax|invalid|subsequent')
            with self.subTest('well-formed', kind=kind):
                write(self.tmp / 'share', {'X.tgz': gzip.compress(self.entry('pax', good * 2, kind) + entry + bytes(1024))})
                self.assertEqual(sorted(etc.pull('X', config=self.config())['train'].iterdir())[0].name, 'a')
                etc.purge('X', config=self.config())

    def test_absurd_sizes(self):
        huge = b'\x80' + (1 << 60).to_bytes(11, 'big')
        negative = b'\xff' + (-512 % (1 << 88)).to_bytes(11, 'big')
        for kind in (b'L', b'K', b'x', b'g', b'X'):
            for size in (b'%011o\0' % (700 * MIB), huge):
                with self.subTest(kind=kind, size=size):
                    tar = self.entry('././@LongLink', b'', kind, fields={124: size}) + bytes(8 * MIB)
                    self.refused(tar, 'headers (of one entry )?take more than 4194304 bytes')
        records = b'1000011 %s=' % (b'k' * 8) + b'v' * 999993 + b'\n'
        many = b''.join(self.entry('pax', records.replace(b'k' * 8, b'%08d' % number), b'g') for number in range(6))
        self.refused(many + self.three()[0] + bytes(1024), '(its global headers|the headers of one entry) take more than 4194304 bytes')
        link = self.entry('././@LongLink', b't' * 5000 + b'\0', b'K') + self.entry('data/train/l', b'', b'2')
        write(self.tmp / 'share', {'X.tgz': gzip.compress(link + self.three()[0] + bytes(1024))})
        err = self.etc('pull', 'X', status=1)[1]
        self.assertIn("leads out of the dataset or nowhere", err)
        self.assertLess(len(err), 1000)
        chain = self.entry('././@LongLink', b'n' * MIB, b'L') * 5
        self.refused(chain + self.three()[0] + bytes(1024), 'headers of one entry take more than 4194304 bytes')
        numbers = self.entry('pax', b'22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=9\n', b'x')
        self.refused(numbers + self.entry('data/train/s', b'9999999\n' + b'0\n' * 4 * MIB),
                     'headers of one entry take more than 4194304 bytes')
        for what, kind in (('a file', b'0'), ('a name', b'L')):
            with self.subTest('negative size of ' + what):
                tar = self.three()[0] + self.entry('data/train/n', b'', kind, fields={124: negative}) + bytes(1024)
                self.refused(tar, 'backward|headers of one entry|ends too early|bad checksum|invalid|subsequent|end of file')
        sparse = self.entry('data/train/x', b'', b'S', fields={483: huge})
        write(self.tmp / 'share', {'X.tgz': gzip.compress(sparse + bytes(1024))})
        self.assertIn('nearly all zeros', self.etc('pull', 'X', status=1)[1])
        for claim in (b'0,0', b'%d,%d' % (1 << 60, 1 << 60)):  # of data that is not there
            with self.subTest(claim):
                records = b''.join(b'%d %s\n' % (len(r) + 4, r) for r in (b'GNU.sparse.size=%d' % (1 << 60), b'GNU.sparse.map=' + claim))
                tar = self.entry('pax', records, b'x') + self.entry('data/train/x') + bytes(1024)
                write(self.tmp / 'share', {'X.tgz': gzip.compress(tar)})
                self.assertIn('nearly all zeros', self.etc('pull', 'X', status=1)[1])

    @unittest.skipUnless(shutil.which('tar') and 'GNU' in subprocess.getoutput('tar --version'), 'no GNU tar here')
    def test_what_gnu_tar_can_write(self):
        root = write(self.tmp / 'ds', {'data/train/sub/file': 'f', 'data/train/sub/link': ('->', 'file'), 'data/test/x': 'x'})
        subprocess.check_call(['cp', '-al', str(root / 'data/train'), str(root / 'data/twin')])  # a link has two names
        (self.tmp / 'share').mkdir()
        for options in ([], ['-V', 'my label'], ['-V', 'my label', '--format=pax'], ['--format=v7']):
            with self.subTest(options):
                subprocess.check_call(['tar', '-czf', str(self.tmp / 'share/X.tgz'), '-C', str(root)] + options + ['.'])
                self.pull(root)

    def test_setuid_bits_are_dropped(self):
        (self.tmp / 'share').mkdir()
        with tarfile.open(str(self.tmp / 'share/X.tgz'), 'w:gz') as tar:
            for mode in (0o4755, 0o2755, 0o6644, 0o1644, 0o7777):
                info = tarfile.TarInfo('data/train/%o' % mode)
                info.mode = mode
                tar.addfile(info)
            info = tarfile.TarInfo('data/train/shared')
            info.type, info.mode = tarfile.DIRTYPE, 0o2775  # as directories of a group are on many servers
            tar.addfile(info)
        found = {path.name: path.stat().st_mode & 0o7777 for path in etc.pull('X', config=self.config())['train'].iterdir()}
        self.assertEqual({name: mode & ~0o222 for name, mode in found.items() if name != 'shared'},
                         {'4755': 0o555, '2755': 0o555, '6644': 0o444, '1644': 0o444, '7777': 0o555})
        self.assertFalse(found['shared'] & 0o6000 and not os.stat(str(self.tmp)).st_mode & 0o6000)

    def test_what_file_managers_leave_beside_partitions(self):
        root = small(self.tmp / 'ds')
        digest = etc.Dataset(root).digest
        self.etc('register', root, 'X')
        litter = ['data/.DS_Store', 'data/._train', 'data/desktop.ini', 'data/Thumbs.db', 'data/.directory']
        write(root, dict.fromkeys(litter, 'left'))
        self.assertEqual((sorted(etc.Dataset(root)), etc.Dataset(root).digest), (['test', 'train'], digest))
        self.etc('push', 'X')
        self.assertEqual(etc.pull('X', config=self.config('other')).digest, digest)
        with tarfile.open(str(self.tmp / 'share/Y.tgz'), 'w:gz') as tar:
            tar.add(str(root), '.')
        ds = etc.pull('Y', config=self.config('other'))
        self.assertEqual((ds.digest, sorted(os.listdir(str(ds.data)))), (digest, ['test', 'train']))
        write(root, {'data/notes.txt': 'no litter'})
        self.assertIn("'data/notes.txt' is a file; move it", self.etc('push', '-f', 'X', status=1)[1])
        write(root, {'data/train/.DS_Store': 'inside a partition it is a file as any'})
        (root / 'data/notes.txt').unlink()
        self.assertNotEqual(etc.Dataset(root).digest, digest)

    def test_archive_in_one_directory(self):
        root = small(self.tmp / 'ds')
        (self.tmp / 'share').mkdir()
        with tarfile.open(str(self.tmp / 'share/X.tgz'), 'w:gz') as tar:
            tar.add(str(root), 'digits')
        self.assertIn("its directory 'digits' is one: pack that with 'tar czf NAME.tgz -C digits .'", self.etc('pull', 'X', status=1)[1])
        self.assertIn('; %s is one' % root, self.etc('register', self.tmp, 'X', status=1)[1])

    def test_push_of_what_was_pulled(self):
        (self.tmp / 'share').mkdir()
        with tarfile.open(str(self.tmp / 'share/X.tgz'), 'w:gz') as tar:
            tar.add(str(small(self.tmp / 'ds')), '.')
        before = (self.tmp / 'share/X.tgz').read_bytes()
        self.etc('pull', 'X')
        self.assertIn('there already, and identical', self.etc('push', 'X')[1].replace('in %s already' % self.url, 'there already'))
        self.assertEqual((self.tmp / 'share/X.tgz').read_bytes(), before)
        with tarfile.open(str(self.tmp / 'share/X.tgz'), 'w:gz') as tar:
            tar.add(str(odd(self.tmp / 'other', 3)), '.')
        self.assertIn("another 'X' is in", self.etc('push', 'X', status=1)[1])

    @unittest.skipUnless(shutil.which('tar'), 'no tar here')
    def test_tools(self):
        root, short = odd(self.tmp / 'ds', 20), small(self.tmp / 'short')
        os.link(str(short / 'data/train/a.txt'), str(short / 'data/train/hard'))
        gz = str(write(self.tmp / 'share', {'.': None}) / 'X.tgz')
        for tool, options, source in (
                ('tar', ['--format=gnu'], root), ('tar', ['--format=pax'], root), ('tar', ['--format=ustar'], short),
                ('tar', ['--sparse'], short), ('bsdtar', [], root), ('bsdtar', ['--format=ustar'], short), ('busybox', [], short)):
            with self.subTest(tool, options=options, source=source.name):
                if not shutil.which(tool):
                    if os.environ.get('ETC_TEST_REQUIRE_PEERS'):
                        self.fail('no %s here' % tool)
                    continue
                command = [tool] + ['tar'] * (tool == 'busybox') + options
                subprocess.check_call(command + ['-czf', gz, '-C', str(source), '.'], env=dict(os.environ, LC_ALL='C.UTF-8'))
                self.pull(source)
                subprocess.check_call(command + ['-czf', gz, '-C', str(source)] + os.listdir(str(source)),
                                      env=dict(os.environ, LC_ALL='C.UTF-8'))
                self.pull(source)

    def test_members_and_missing_directories(self):
        root = small(self.tmp / 'ds')
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode='w') as tar:
            for path in sorted(root.rglob('*')):
                if path.is_file():
                    tar.add(str(path), str(path.relative_to(root)))
        raw = out.getvalue()
        import gzip
        write(self.tmp / 'share', {'X.tgz': gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]) + bytes(512)})
        self.pull(root)

    def test_not_an_archive(self):
        for what, content, problem in (
                ('nothing', b'', 'it ends too early'), ('text', b'hello', r'Not a gzipped file \(b.he.\)'),
                ('half a header', b'\x1f\x8b', 'Compressed file ended before'), ('noise', noise(1000), 'Not a gzipped file')):
            with self.subTest(what):
                write(self.tmp / 'share', {'X.tgz': content})
                self.assertRegex(self.etc('pull', 'X', status=1)[1], 'the archive is damaged or not a .tgz: ' + problem)
        self.assertEqual((self.installed(), self.leftovers()), ([], []))
        with tarfile.open(str(self.tmp / 'share/X.tgz'), 'w:gz') as tar:
            tar.add(SCRIPT, 'X/data/train/x')
        self.assertIn("needs a directory 'data'", self.etc('pull', 'X', status=1)[1])


class Hostile(Case):
    def entry(self, name, data=b'', kind=tarfile.REGTYPE, link='', mode=0o644, **more):
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.mode, info.size = kind, link, mode, len(data)
        for key, value in more.items():
            setattr(info, key, value)
        return info, data

    def attack(self, *entries):
        """Pull a dataset with these entries in it; it must fail, in any order with the same words, and leave nothing anywhere."""
        write(self.tmp / 'victim', {'file': 'precious'})
        share = write(self.tmp / 'share', {'.': None})
        ok = [self.entry('data/train/ok', b'ok')]
        said = set()
        for order in (ok + list(entries), list(entries) + ok):
            with tarfile.open(str(share / 'X.tgz'), 'w:gz', format=tarfile.PAX_FORMAT) as tar:
                for info, data in order:
                    tar.addfile(info, io.BytesIO(data))
            before = {k: v for k, v in tree(self.tmp).items() if not k.startswith('home')}
            err = self.etc('pull', 'X', status=1)[1]
            after = {k: v for k, v in tree(self.tmp).items() if not k.startswith('home')}
            before.update({'settings.yaml': after.get('settings.yaml')})
            self.assertEqual(before, after)
            self.assertEqual((self.installed(), self.leftovers()), ([], []), err)
            said.add(err)
        self.assertEqual(len(said), 1, said)
        return err

    def test_names(self):
        for name in ('/etc/passwd', str(self.tmp / 'victim/new'), '../victim/new', 'data/../../../victim/new', '..', 'data/train/..',
                     '../../../../../../../../tmp/etc-evil'):
            with self.subTest(name):
                problem = "the archive holds the unsafe name '%s'; do not trust it" % name
                self.assertIn(problem, self.attack(self.entry(name, b'evil')))
                self.assertIn(problem, self.attack(self.entry(name, kind=tarfile.DIRTYPE)))
        for name, shown in (('data/train/a\0b', r'data/train/a\x00b'), ('/etc/x', '/etc/x'), ('../x', '../x')):
            with self.subTest(name, pax=True):
                self.assertIn("the archive holds the unsafe name '%s'; do not trust it" % shown,
                              self.attack(self.entry('data/train/x', b'evil', pax_headers={'path': name})))

    def test_links(self):
        S, H = tarfile.SYMTYPE, tarfile.LNKTYPE
        nowhere, twice = ', which leads out of the dataset or nowhere;', "' twice (or names that this disk cannot tell apart);"
        for target in ('/etc/passwd', '../../../victim/file', '..' + '/..' * 20, str(self.tmp / 'victim'), 'gone', 'l',
                       '../../../../X/../victim'):
            with self.subTest(target):
                self.assertIn("the link 'data/train/l' to '%s'" % target + nowhere, self.attack(self.entry('data/train/l', kind=S, link=target)))
        self.assertIn("'data/train/l" + twice, self.attack(
            self.entry('data/train/l', kind=S, link='../../..'), self.entry('data/train/l/victim', b'evil')))
        self.assertIn("the link 'data/train/x' to 'd/e/up/../../../..'" + nowhere, self.attack(
            self.entry('data/train/d/e/up', kind=S, link='../..'), self.entry('data/train/x', kind=S, link='d/e/up/../../../..')))
        self.assertIn("the link 'data/train/b' to 'a/../../victim'" + nowhere, self.attack(
            self.entry('data/train/a', kind=S, link='../..'), self.entry('data/train/b', kind=S, link='a/../../victim')))
        for target in ('/etc/passwd', '../../../victim/file', str(self.tmp / 'victim/file')):
            with self.subTest('hard link', target=target):
                self.assertIn("the unsafe name '%s'; do not trust it" % target, self.attack(self.entry('data/train/h', kind=H, link=target)))
        self.assertIn("the hard link 'data/train/h' to 'data/train/none', which is not in it;", self.attack(
            self.entry('data/train/h', kind=H, link='data/train/none')))
        for count in (60, 1500):
            with self.subTest('a chain', count=count):
                self.assertIn("the link 'data/train/0000' to '0001'" + nowhere, self.attack(
                    *[self.entry('data/train/%04d' % n, kind=S, link='%04d' % (n + 1)) for n in range(count)]))
        for what, target, shown in (('nothing', '', 'x'), ('NUL', 'a\0b', r'a\x00b'), ('not UTF-8', '\udcff', r'\udcff')):
            with self.subTest(what):
                err = self.attack(self.entry('data/train/l', kind=S, link='x', pax_headers={'linkpath': target} if target else {}))
                self.assertRegex(err, "the link 'data/train/l' to '+%s'+%s" % (re.escape(shown), nowhere))
        self.assertIn("the link 'data/train/s' to '../../../victim/file'" + nowhere, self.attack(
            self.entry('data/train/s', kind=S, link='../../../victim/file'),
            self.entry('data/train/h', kind=H, link='data/train/s')))  # which is a link, too
        for kind in (H, S):
            with self.subTest('twice', kind=kind):
                again = self.entry('data/train/s', kind=kind, link='data/train/s' if kind == H else 'ok')
                self.assertIn("'data/train/s" + twice, self.attack(self.entry('data/train/s', kind=S, link='ok'), again))

    def test_depth(self):
        problem = "the archive holds the unsafe name 'data/train/d/d/d/"
        self.assertIn(problem, self.attack(self.entry('data/train/' + 'd/' * 1900 + 'x', b'x')))
        self.assertIn(problem, self.attack(self.entry('data/train/' + 'd/' * 300, kind=tarfile.DIRTYPE)))

    def test_webs_of_links(self):
        root = write(self.tmp / 'web', {'data/p%02d/%s' % (n, side): ('->', '../p%02d' % (n + 1)) for n in range(15) for side in 'ab'})
        write(root, {'data/p15/x': 'x'})
        limit, etc._MAX_FOLLOWED = etc._MAX_FOLLOWED, 2000
        self.addCleanup(setattr, etc, '_MAX_FOLLOWED', limit)
        self.etc('register', root, 'W')
        self.assertIn('its links lead to too many files; remove links', self.etc('push', 'W', status=1)[1])

    def test_indexes_that_take_memory(self):
        for what, text in (
                ('many lists', b'[' + b'[],' * 4000000 + b'1]'), ('a long number', b'{"etcetera":' + b'1' * 1000000 + b'}'),
                ('deep lists', b'[' * 100000), ('a version that is no integer', b'{"etcetera":2.5}'),
                ('only a version', b'{"etcetera":1}'), ('a list', b'[]'), ('null', b'null'), ('not UTF-8', b'\xff')):
            with self.subTest(what):
                blocks = block(bytes(1024))
                steps = [text[n:n + 8000] for n in range(0, len(text), 8000)]
                archive = blocks + b''.join(member(b'ei', step) + EMPTY for step in steps)
                err = self.pull_indexed(archive + member(b'ef', struct.pack('<Q', len(blocks))) + EMPTY)
                self.assertIn('the archive is damaged: its index is unreadable;', err)

    def test_damage_among_the_root_files(self):
        archive = self.archive_of(('.', 1, 2, [header('README.md', size=2) + b'hi'.ljust(512, b'\0') + header('data/', b'5', 0o755)]),
                                  ('data/train', 0, 0, [header('data/train/', b'5', 0o755)]))
        damaged = archive.replace(archive[40:44], b'abcd', 1)
        write(self.tmp / 'share', {'X.tgz': damaged})
        err = self.etc('info', '-r', 'X', status=1)[1]
        self.assertRegex(err, "^etc: 'X' in file:///.*: the archive is damaged: "
                              "a block does not match its checksum or size; 'etc push -f X' from an intact copy repairs it$")

    def test_large_meta(self):
        root = write(self.tmp / 'ds', {'data/train/x': 'x', 'README.md': b'r' * (3 * MIB)})
        self.etc('register', root, 'X')
        self.assertEqual(len(etc.info('X', config=self.config())['readme']), MIB)
        write(root, {'meta.json': b'{' + b' ' * (17 * MIB) + b'}'})
        self.assertIn('meta.json is not JSON: it is larger than 16777216 bytes', self.etc('push', 'X', status=1)[1])
        if hasattr(os, 'mkfifo'):
            (root / 'meta.json').unlink()
            os.mkfifo(str(root / 'meta.json'))
            self.assertIn('meta.json is not JSON: it is not a file', self.etc('push', 'X', status=1)[1])

    def test_kinds_and_duplicates(self):
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            with self.subTest(kind):
                self.assertIn("'data/train/dev', a device or pipe; do not trust it", self.attack(self.entry('data/train/dev', kind=kind)))
        for kind in (b'M', b'D'):  # the rest of a file that began on another volume; a directory of an incremental archive
            with self.subTest(kind):
                self.assertIn("'data/train/x' of the unknown type '%s'; pack it with tar's default options" % kind.decode(),
                              self.attack(self.entry('data/train/x', kind=kind)))
        for what, name, entry in (
                ('a file', 'data/train/ok', self.entry('data/train/ok', b'again')),
                ('a directory', 'data/train/ok', self.entry('data/train/ok', kind=tarfile.DIRTYPE)),
                ('a file below a file', 'data/train/ok', self.entry('data/train/ok/below', b'x')),
                ('a link for a partition', 'data/train', self.entry('data/train', kind=tarfile.SYMTYPE, link='../../../victim')),
                ('a link for data', 'data', self.entry('data', kind=tarfile.SYMTYPE, link='.')),
                ('a file for data', 'data', self.entry('data', b'a file'))):
            with self.subTest(what):
                self.assertIn("the archive holds '%s' twice (or names that this disk cannot tell apart);" % name, self.attack(entry))

    def indexed(self, payload, path='data/train', **lies):
        """An archive with a right index whose data/train segment holds `payload`."""
        first = header('data/', b'5', 0o755, 0, '')
        segments, blocks = [], b''
        for name, data in (('.', first), (path, payload)):
            coded = block(data)
            digest = hashlib.sha256(hashlib.sha256(data).digest()).hexdigest()
            segments.append(segment(name, len(blocks), len(coded), 0, 0, 'sha256:' + digest))
            blocks += coded
        segments[1].update(dict({'files': 1}, **lies))
        return blocks + block(bytes(1024)) + index_of(segments, len(blocks) + len(block(bytes(1024))))

    def pull_indexed(self, archive, status=1):
        write(self.tmp / 'share', {'X.tgz': archive})
        err = self.etc('pull', 'X', status=status)[1]
        if status:
            self.assertEqual((self.installed(), self.leftovers()), ([], []))
            self.assertRegex(err, "^etc: 'X' in file:///.*; ")
        return err

    def test_indexed_archives_are_canonical_or_refused(self):
        top = header('data/train/', b'5', 0o755, 0, '')

        def file(name, kind=b'0', mode=0o644, size=0, link=''):
            return header(name, kind, mode, size, link)
        self.pull_indexed(self.indexed(top + file('data/train/x')), status=0)
        self.etc('verify', 'X')
        self.etc('purge', 'X')
        long = file('data/train/' + 'p' * 200)
        cases = (
            ('no entry at all', b'', 'a block does not match'),
            ('setuid', top + file('data/train/x', mode=0o4755), 'mode'),
            ('private', top + file('data/train/x', mode=0o600), 'mode'),
            ('another mtime', top + header('data/train/x', mtime=0), 'header'),
            ('another partition', top + file('data/test/x'), 'place'),
            ('the root', top + file('x'), 'place'),
            ('an absolute name', top + file('/data/train/x'), 'place'),
            ('..', top + file('data/train/../x'), 'directory'),
            ('an empty component', top + file('data/train//x'), 'directory'),
            ('.', top + file('data/train/./x'), 'directory'),
            ('a device', top + file('data/train/x', b'3'), 'type'),
            ('a pipe', top + file('data/train/x', b'6'), 'type'),
            ('a hard link', top + file('data/train/x', b'1', link='data/train/y'), 'type'),
            ('twice', top + file('data/train/x') * 2, 'order'),
            ('not sorted', top + file('data/train/y') + file('data/train/x'), 'order'),
            ('no directory', file('data/train/x'), 'place'),
            ('more than the index promises', top + file('data/train/x', size=5), 'size'),
            ('a negative size', top + file('data/train/x', size=-1), 'size'),
            ('a link out of the dataset', top + file('data/train/x', b'2', link='../../../victim'), 'link'),
            ('an absolute link', top + file('data/train/x', b'2', link='/etc/passwd'), 'link'),
            ('a link to nothing', top + file('data/train/x', b'2', link='gone'), 'leads out of the dataset or nowhere'),
            ('a link out of its segment', top + file('data/train/x', b'2', link='../../data'), 'link'),
            ('a link with a detour', top + file('data/train/l', b'2', link='./x') + file('data/train/x'), 'link'),
            ('a link with a longer detour', top + file('data/train/l', b'2', link='x/../x') + file('data/train/x'), 'link'),
            ('a link target with NUL', top + file('data/train/x', b'2', link='a\0b'), 'leads out of the dataset or nowhere'),
            ('a chain of links', top + b''.join(file('data/train/%03d' % n, b'2', link='%03d' % (n + 1)) for n in range(50))
             + file('data/train/050'), 'leads out of the dataset or nowhere'),
            ('a file with a target', top + file('data/train/x', link='y'), 'link'),
            ('a file with a slash', top + file('data/train/d/', b'0'), 'name'),
            ('a directory without slash', top + file('data/train/d', b'5', 0o755), 'name'),
            ('too deep', top + file('data/train/' + 'd/' * 300 + 'x'), 'directory'),
            ('zeros', top + bytes(512), 'header'),
            ('noise', top + noise(512), 'header'),
            ('only a pax header', top + long[:-512], 'end'),
            ('another pax header', top + long[:600] + b'x' + long[601:], 'header'),
        )
        for name, payload, problem in cases:
            with self.subTest(name):
                err = self.pull_indexed(self.indexed(payload, files=51 if name == 'a chain of links' else 1))
                self.assertIn(problem if ' ' in problem else "'data/train' violates the format (%s);" % problem, err)
        with self.subTest('padding that is not zero'):
            archive = self.indexed(top + file('data/train/x', size=5) + b'abcdefgh'.ljust(512, b'\1'), size=5)
            self.assertIn('the format (padding);', self.pull_indexed(archive))
        promise, unreadable = "'data/train' does not have the digest that the index promises", 'its index is unreadable'
        for problem, key, values in (
                (promise, 'files', (2, 0)), (promise, 'size', (1,)), (promise, 'digest', ('sha256:' + '0' * 64,)),
                (unreadable, 'digest', ('md5:0', None)), (unreadable, 'offset', (7,)), (unreadable, 'length', (10 ** 12, 0, -5)),
                (unreadable, 'files', (-1,)), (unreadable, 'path', ('../x', 'data', 'data/a/b', '.', '/x', 'a/b', ''))):
            for value in values:
                if key == 'digest' and problem == unreadable:
                    archive = self.indexed(top + file('data/train/x'))
                    digest = re.findall(rb'"digest":"(sha256:[0-9a-f]{64})"', archive)[-1]
                    archive = archive.replace(digest, str(value).encode().ljust(len(digest)))
                else:
                    archive = self.indexed(top + file('data/train/x'), **{key: value})
                with self.subTest(**{key: str(value)}):
                    self.assertIn('the archive is damaged: %s;' % problem, self.pull_indexed(archive))

    def test_short_blocks_in_the_middle(self):
        payload = header('data/train/', b'5', 0o755, 0, '') + header('data/train/x', b'0', 0o644, 4096, '') + bytes(4096)
        first, second, start = block(payload[:2048]), block(payload[2048:]), header('data/', b'5', 0o755, 0, '')
        digests = [hashlib.sha256(part).digest() for part in (payload[:2048], payload[2048:])]
        root, end = block(start), block(bytes(1024))
        segments = [segment('.', 0, len(root), 0, 0, 'sha256:' + hashlib.sha256(hashlib.sha256(start).digest()).hexdigest()),
                    segment('data/train', len(root), len(first + second), 1, 4096,
                                 'sha256:' + hashlib.sha256(b''.join(digests)).hexdigest())]
        blocks = root + first + second + end
        self.assertIn("'data/train' violates the format (block length);", self.pull_indexed(blocks + index_of(segments, len(blocks))))

    def archive_of(self, *segments):
        """An archive of segments given as (path, files, size, [payload of each block])."""
        data, found = b'', []
        for path, files, size, payloads in segments:
            blocks = [block(payload) for payload in payloads]
            digest = hashlib.sha256(b''.join(hashlib.sha256(payload).digest() for payload in payloads)).hexdigest()
            found.append(segment(path, len(data), sum(map(len, blocks)), files, size, 'sha256:' + digest))
            data += b''.join(blocks)
        return data + index_of(found, len(data))

    def test_entries_astray(self):
        def entry(name, content=b''):
            kind = b'5' if name.endswith('/') else b'0'
            mode = 0o755 if kind == b'5' else 0o644
            return header(name, kind, mode, len(content), '') + content + bytes(-len(content) % 512)
        data, train = entry('data/'), entry('data/train/')
        good = [('.', 0, 0, [data]), ('data/train', 1, 2, [train + entry('data/train/x', b'hi')])]
        (self.tmp / 'share').mkdir()
        (self.tmp / 'share/X.tgz').write_bytes(self.archive_of(*good))
        self.etc('pull', 'X')
        self.etc('purge', 'X')
        inside = entry('data/train/A/') + entry('data/train/A/x', b'hi')
        for name, bad, problem in (
                ('a partition among the root files', [('.', 1, 4, [data + entry('data/evil/') + entry('data/evil/f', b'evil')]), good[1]],
                 "'.' violates the format (place)"),
                ('a file in data among the root files', [('.', 1, 4, [data + entry('data/f', b'evil')]), good[1]],
                 "'.' violates the format (place)"),
                ('an empty first block', [('.', 0, 0, [b'', data]), good[1]], 'a block does not match'),
                ('an empty first block of a partition', [good[0], ('data/train', 1, 2, [b''] + good[1][3])], 'a block does not match'),
                ('no entry for a directory', [good[0], ('data/train', 1, 2, [train + entry('data/train/a/x', b'hi')])], 'format (directory)'),
                ('only another directory', [good[0], ('data/train', 2, 4, [train + inside + entry('data/train/a/x', b'hi')])],
                 'format (directory)'),
                ('twice', [good[0], ('data/train', 2, 4, [train + entry('data/train/x', b'hi') * 2])], 'format (order)'),
                ('not sorted', [good[0], ('data/train', 2, 4, [train + entry('data/train/y', b'hi') + entry('data/train/x', b'hi')])],
                 'format (order)')):
            with self.subTest(name):
                (self.tmp / 'share/X.tgz').write_bytes(self.archive_of(*bad))
                self.assertIn(problem, self.etc('pull', 'X', status=1)[1])
                self.assertEqual(self.installed(), [])

    def test_small_files_in_a_row(self):
        top = header('data/train/', b'5', 0o755, 0, '')

        def entry(name, mode=0o644, data=b'hi', **fields):
            """A file's header, with other bytes in some fields, and its data."""
            info = tarfile.TarInfo('data/train/' + name)
            info.mode, info.size, info.mtime = mode, len(data), 315532800
            head = bytearray(info.tobuf(tarfile.USTAR_FORMAT, 'utf-8', 'surrogateescape'))
            head[329:345] = bytes(16)  # as Python 3.9 and later have it
            for start, value in fields.items():
                head[int(start[1:]):int(start[1:]) + len(value)] = value
            if '_148' not in fields:
                head[148:156] = b'%06o\0 ' % (sum(head[:148]) + 8 * 32 + sum(head[156:]))
            return bytes(head) + data.ljust(512, b'\0')

        around = [entry('a'), entry('b'), entry('x', data=b'x'), entry('z')]
        for what, good in (('none more', []), ('one', [entry('m')]), ('an executable', [entry('m', 0o755)]),
                           ('some', [entry('.m'), entry('c')]), ('zeros', [entry('m', data=bytes(512))])):
            with self.subTest(what):
                row = b''.join(sorted(around + good))
                self.pull_indexed(self.indexed(top + row, files=4 + len(good), size=7 + sum(
                    512 if m.endswith(bytes(512)) else 2 for m in good)), status=0)
                self.etc('verify', 'X')
                self.etc('purge', 'X')
        for what, problem, bad in (
                ('twice', 'order', entry('b')), ('not sorted', 'order', entry('am')), ('private', 'mode', entry('m', 0o600)),
                ('setuid', 'mode', entry('m', 0o4755)), ('above', 'order', entry('../m')), ('..', 'order', entry('..')),
                ('below no directory', 'directory', entry('m/n')), ('not ASCII', 'header', entry('m\u00e9')),
                ('NUL in a name', r'm\x00n', entry('m', _11=b'm\0n')), ('after the NUL of a name', r'm\x00\x00', entry('m', _99=b'm')),
                ('an absolute name', 'place', entry('m', _0=b'/')), ('no data', 'place', entry('m', _5=b'T')),
                ('another partition', 'place', entry('m', _10=b'-')), ('no name', 'name', entry('m', _11=b'\0')),
                ('a user', 'header', entry('m', _108=b'0000001')), ('a group', 'header', entry('m', _116=b'0000001')),
                ('too large', 'size', entry('m', _124=b'00000000003')), ('too small', 'padding', entry('m', _124=b'00000000001')),
                ('a size with spaces', 'header', entry('m', _124=b'         2\0 ')), ('a size with _', 'header', entry('m', _124=b'0000000_002')),
                ('a size with 9', 'header', entry('m', _124=b'00000000009')), ('a negative size', 'size', entry('m', _124=b'-0000000002')),
                ('beyond the block', 'size', entry('m', _124=b'00000010002')), ('another mtime', 'header', entry('m', _136=b'1')),
                ('a wrong checksum', 'header', entry('m', _148=b'000000\0 ')), ('a hard link', 'type', entry('m', _156=b'1')),
                ('an old file', 'type', entry('m', _156=b'\0')), ('a target', 'link', entry('m', _157=b'a')),
                ('GNU', 'header', entry('m', _257=b'ustar  ')), ('the name of a user', 'header', entry('m', _265=b'root')),
                ('a prefix', 'header', entry('m', _345=b'p')), ('the last byte', 'header', entry('m', _511=b'p')),
                ('zeros', 'header', bytes(1024)), ('noise', 'header', noise(1024))):
            with self.subTest(what):
                err = self.pull_indexed(self.indexed(top + b''.join(around[:2] + [bad] + around[2:]), files=5, size=9))
                self.assertIn(("the unsafe name 'data/train/%s" if 'NUL' in what else "'data/train' violates the format (%s);") % problem, err)
        bad = b''.join(around[:2] + [entry('m')[:512] + b'hi'.ljust(512, b'p')] + around[2:])
        self.assertIn('the format (padding);', self.pull_indexed(self.indexed(top + bad, files=5, size=9)))
        for name, problem in (('..', "the unsafe name 'data/train/..'; do not trust it"), ('../m', 'the format (directory);')):
            with self.subTest(name):  # where it is sorted
                self.assertIn(problem, self.pull_indexed(self.indexed(top + entry(name) + b''.join(around), files=5, size=9)))
        err = self.pull_indexed(self.indexed(top + b''.join(around), files=4, size=3))  # more bytes than the index says
        self.assertIn("'data/train' violates the format (size);", err)

    def test_blocks_that_lie(self):
        top = header('data/train/', b'5', 0o755, 0, '')
        good = self.indexed(top, files=0)
        self.pull_indexed(good, 0)
        self.etc('purge', 'X')
        bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = bomb.compress(bytes(64 * MIB)) + bomb.flush()
        bad = block(bytes(64 * MIB), body)
        first = block(header('data/', b'5', 0o755, 0, ''))
        digest = 'sha256:' + '0' * 64
        segments = [segment('.', 0, len(first), 0, 0, 'sha256:' + hashlib.sha256(hashlib.sha256(
            header('data/', b'5', 0o755, 0, '')).digest()).hexdigest()), segment('data/x', len(first), len(bad), 1, 1, digest)]
        self.assertIn('not match its checksum', self.pull_indexed(first + bad + index_of(segments, len(first + bad))))

    def test_one_flipped_byte(self):
        root = write(self.tmp / 'ds', {'data/train/a': 'text ' * 3000, 'data/train/n': noise(70000), 'data/test/b': 'b' * 500, 'README.md': 'r'})
        etc.register(root, 'X', config=self.config('pub'))
        etc.push('X', config=self.config('pub'))
        archive = (self.tmp / 'share/X.tgz').read_bytes()
        expected, rng, silent = tree(root), random.Random(3), 0
        tail = len(archive) - 1500
        positions = sorted(set(rng.randrange(len(archive)) for _ in range(250)) | set(range(0, 60))
                           | set(rng.randrange(tail, len(archive)) for _ in range(150)))
        for position in positions:
            with self.subTest(position):
                bad = bytearray(archive)
                bad[position] ^= 1 << rng.randrange(8)
                write(self.tmp / 'share', {'X.tgz': bytes(bad)})
                try:
                    etc.pull('X', config=self.config())
                except etc.Corrupt as e:
                    self.assertRegex(str(e), "^'X' in file:///.*: the archive (is damaged|holds)")
                    self.assertEqual((self.installed(), self.leftovers()), ([], []))
                else:
                    silent += 1  # a byte that means nothing, such as the time in a gzip header
                    self.assertEqual(tree(self.tmp / 'home/X'), expected, position)
                    etc.purge('X', config=self.config())
        self.assertLess(silent, 60)

    def test_truncated(self):
        etc.register(small(self.tmp / 'ds'), 'X', config=self.config('pub'))
        etc.push('X', config=self.config('pub'))
        archive = (self.tmp / 'share/X.tgz').read_bytes()
        for length in list(range(0, len(archive), 37)) + [len(archive) - 1, len(archive) - 34]:
            with self.subTest(length):
                write(self.tmp / 'share', {'X.tgz': archive[:length]})
                problem = 'damaged: its index is missing' if length else 'damaged or not a .tgz: it ends too early'
                self.assertIn("the archive is %s; 'etc push -f X' from" % problem, self.etc('pull', 'X', status=1)[1])
        self.assertEqual((self.installed(), self.leftovers()), ([], []))



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
size_t libdeflate_deflate_compress(void *c, const void *in, size_t n, void *out, size_t room) { return say("deflates\n"); }
int libdeflate_deflate_decompress_ex(void *d, const void *in, size_t n, void *out, size_t room, size_t *read, size_t *written) {
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
        root = write(self.tmp / 'ds', {'data/text/a': text, 'data/noise/n': noise(100000), 'data/zeros/z': bytes(MIB), 'README.md': ''})
        write(root, {'data/padded/%02d' % number: noise(700 + number, number) for number in range(60)})
        etc.register(root, 'X', config=self.config())
        digest, expected, sizes = etc.Dataset(root).digest, tree(root), {}
        for level in range(10):
            for writer in DEFLATERS:
                self.use(writer)
                etc.push('X', force=True, config=self.config(compression_level=level))
                archive = (self.tmp / 'share/X.tgz').read_bytes()
                (self.tmp / 'share/X.tgz').replace(self.tmp / 'share/Y.tgz')
                sizes[writer, level] = sum(m[1] for m in members(archive) if m[2] == b'et')
                self.use('zlib' if writer == 'libdeflate' else 'libdeflate')
                self.assertEqual(etc.pull('Y', config=self.config('two')).digest, digest, (writer, level))
                self.assertEqual(tree(self.tmp / 'two/Y'), expected)
                etc.purge('Y', config=self.config('two'))
        self.assertEqual(sizes['libdeflate', 0], sizes['zlib', 0])
        for level in range(1, 10):
            self.assertLess(sizes['libdeflate', level], min(sizes['zlib', level], 0.6 * sizes['zlib', 0]), level)

    def test_zlib_is_spared(self):
        def refuse(*args):
            raise AssertionError('zlib was asked')
        etc.register(small(self.tmp / 'ds'), 'X', config=self.config())
        functions = zlib.compressobj, zlib.decompressobj
        zlib.compressobj = zlib.decompressobj = refuse
        try:
            etc.push('X', config=self.config())
            etc.pull('X', config=self.config('two'))
        finally:
            zlib.compressobj, zlib.decompressobj = functions
        self.assertEqual(tree(self.tmp / 'two/X'), tree(self.tmp / 'ds'))

    def archive(self, payload, stream, crc=None, size=None):
        """An archive whose last block holds this stream instead of that of the payload, and may lie."""
        top = header('data/', b'5', 0o755)
        first = block(top)
        trailer = struct.pack('<II', zlib.crc32(payload) if crc is None else crc, len(payload) if size is None else size)
        second = member(b'et', struct.pack('<I', 28 + len(stream))) + stream + trailer
        digests = ['sha256:' + hashlib.sha256(hashlib.sha256(data).digest()).hexdigest() for data in (top, payload)]
        segments = [segment('.', 0, len(first), 0, 0, digests[0]),
                    segment('data/train', len(first), len(second), 1, 30000, digests[1])]
        blocks = first + second + block(bytes(1024))
        return blocks + index_of(segments, len(blocks))

    def told(self, archive):
        """What a pull says that is refused; the same with both."""
        said = []
        for name in DEFLATERS:
            self.use(name)
            write(self.tmp / 'share', {'X.tgz': archive})
            err = self.etc('pull', 'X', status=None)[1]
            if 'pulled' in err:
                self.etc('purge', 'X')
                err = ''
            self.assertEqual((self.installed(), self.leftovers()), ([], []))
            said.append(err)
        self.assertEqual(*said)
        return said[0]

    def test_damaged_blocks(self):
        def deflate(data, level=6):
            packer = zlib.compressobj(level, zlib.DEFLATED, -15)
            return packer.compress(data) + packer.flush()
        file = ''.join('%d ' % number for number in range(9999)).encode()[:30000]
        payload = header('data/train/', b'5', 0o755) + header('data/train/x', size=30000) + file + bytes(-30000 % 512)
        good, crc, size = deflate(payload), zlib.crc32(payload), len(payload)
        self.assertEqual(self.told(self.archive(payload, good)), '')
        self.assertEqual(self.told(self.archive(payload, deflate(payload, 0))), '')
        bomb, odd_size, mismatch = bytes(MIB + 512), payload + b'x', 'does not match its checksum or size'
        for name, archive, says in (
                ('without its end', self.archive(payload, good[:-1]), 'the archive is damaged'),
                ('half', self.archive(payload, good[:len(good) // 2]), 'the archive is damaged'),
                ('a byte', self.archive(payload, good[:1]), 'the archive is damaged'),
                ('stored, without its end', self.archive(payload, deflate(payload, 0)[:-1]), 'the archive is damaged'),
                ('a byte after the end', self.archive(payload, good + b'\0'), mismatch),
                ('another stream after the end', self.archive(payload, good + good), mismatch),
                ('the trailer twice', self.archive(payload, good + struct.pack('<II', crc, size)), mismatch),
                ('another checksum', self.archive(payload, good, crc=crc ^ 1), mismatch),
                ('a larger size', self.archive(payload, good, size=size + 512), mismatch),
                ('a smaller size', self.archive(payload, good, size=size - 512), mismatch),
                ('no bytes', self.archive(b'', deflate(b'')), mismatch),
                ('half a record', self.archive(odd_size, deflate(odd_size)), mismatch),
                ('more than a block', self.archive(bomb, deflate(bomb)), mismatch),
                ('other contents', self.archive(payload, deflate(payload[::-1]), zlib.crc32(payload[::-1])), 'in file:///'),
                ('a reserved type', self.archive(payload, b'\7' + good), 'invalid block type'),
                ('a wrong complement', self.archive(payload, b'\1\1\0\1\0x'), 'invalid stored block lengths'),
                ('a distance before the start', self.archive(payload, b'\x4b\x04\xa2' + good), 'too far back'),
                ('noise', self.archive(payload, noise(2000)), 'the archive is damaged')):
            with self.subTest(name):
                self.assertIn(says, self.told(archive))
        rng, silent = random.Random(7), 0
        for number in range(50 * RUNS):
            bad = bytearray(good)
            for _ in range(rng.choice((1, 1, 3))):
                bad[rng.choice((rng.randrange(len(bad)), rng.randrange(60)))] ^= 1 << rng.randrange(8)
            with self.subTest(number=number):
                silent += self.told(self.archive(payload, bytes(bad))) == ''
        self.assertLess(silent, 5)

    def beside(self, make, *commands):
        """What commands say, in a Python beside whose standard library make(path) has put a libdeflate."""
        home = Path(tempfile.mkdtemp(dir=str(self.tmp)))
        stdlib = os.path.dirname(os.path.realpath(os.__file__))
        write(home / 'lib', {os.path.basename(stdlib): ('->', stdlib)})
        make(home / 'lib/libdeflate.so.0')
        os.environ['PYTHONHOME'] = str(home)
        said = ''
        for command in commands:
            process = self.spawn(*command)
            out, err = process.communicate()
            self.assertEqual(process.returncode, 0, err)
            said += (out + err).decode()
        del os.environ['PYTHONHOME']
        return said

    @unittest.skipUnless(sys.platform == 'linux', 'for the paths of Linux')
    def test_broken_libraries(self):
        with open('/proc/self/maps') as maps:
            loaded = maps.read()
        real, other = (re.search(r'/.*/%s[.-]\S*' % name, loaded).group() for name in ('libdeflate', 'libc'))
        version = ['--version']
        self.assertIn('libdeflate', self.beside(lambda path: path.symlink_to(real), version))
        self.assertIn('libdeflate', self.beside(lambda path: None, version))
        for name, make in (('empty', Path.touch), ('a directory', Path.mkdir), ('text', lambda path: path.write_text('text')),
                           ('another library', lambda path: path.symlink_to(other))):
            with self.subTest(name):
                self.assertIn('zlib', self.beside(make, version))

    @unittest.skipUnless(sys.platform == 'linux', 'LD_LIBRARY_PATH is of Linux')
    def test_current_directory(self):
        write(self.tmp, {'libdeflate.so.0': 'text'})
        os.environ['LD_LIBRARY_PATH'] = ':'
        self.assertIn(b'libdeflate', self.spawn('--version', cwd=str(self.tmp)).communicate()[0])

    @unittest.skipUnless(sys.platform == 'linux' and shutil.which('gcc'), 'no gcc here')
    def test_false_libraries(self):
        write(self.tmp, {'false.c': FALSE_LIBRARY})
        root = small(self.tmp / 'ds')
        for memory in 0, 1:
            def make(path):
                subprocess.check_call(['gcc', '-shared', '-fPIC', '-DMEMORY=%d' % memory, '-o', str(path), str(self.tmp / 'false.c')])
            with self.subTest(memory=memory):
                said = self.beside(make, ['register', '-f', root, 'X'], ['push', '-f', 'X'], ['pull', '-f', 'X'], ['--version'])
                self.assertIn('libdeflate', said)
                self.assertEqual(set(re.findall('(?:in|de)flates', said)), {'inflates', 'deflates'} if memory else set())
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

def run_python(program, *args, flags=(), **kwargs):
    """Run a program in an interpreter of its own; its exit status, and what it prints."""
    head = 'import os, re, signal, sys, threading\nsys.path.insert(0, %r)\n' % str(HERE)
    command = [sys.executable, *flags, '-c', head + program] + [str(arg) for arg in args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, **kwargs)
    return done.returncode, done.stdout


POSIX = unittest.skipIf(os.name == 'nt', 'only where there are signals, modes, links and pseudoterminals')


class Shell:
    """For a Case: works in its directory, and lets a command's words stand in one text."""

    def setUp(self):
        super().setUp()
        os.chdir(self.tmp)
        self.addCleanup(os.chdir, HERE)

    def etc(self, *words, **kwargs):
        return super().etc(*self.split(words), **kwargs)

    def spawn(self, *words, **kwargs):
        return super().spawn(*self.split(words), **kwargs)

    def split(self, words):
        return [part for word in words for part in (word.split() if isinstance(word, str) else [word])]

    def fails_with(self, problem, *words, **kwargs):
        """The command line fails and says this."""
        self.assertIn(problem, self.etc(*words, status=1, **kwargs)[1])


class Installing(Shell, S3Case):
    def setUp(self):
        super().setUp()
        self.here = self.tmp / 'home/X'

    def publish(self, size=20 * MIB):
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
                self.assertEqual((self.installed(name), len(self.leftovers(name))), ([], 1))  # for the next to go on from
                self.pulled(name)

    @POSIX
    def test_interrupted_push(self):
        self.publish()
        for name, status in (('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)):
            with self.subTest(name):
                process, _ = self.start(lambda handler: 'partNumber=2' in handler.path, 'push -f X', home='pub')
                later = [signal.SIGHUP, signal.SIGTERM, signal.SIGHUP]  # as from a terminal that closes

                def fault(handler):
                    if handler.command == 'DELETE' and later:
                        while later:
                            process.send_signal(later.pop())
                        return handler.answer(503) or True
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
        self.publish(MIB)
        process, go_on = self.start(
            self.reads(0), 'pull', 'X', preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
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

    def test_work_of_the_living_stays(self):
        """However old it is; that of the dead goes, and that of other hosts after a day."""
        self.publish()
        process, go_on = self.start(self.reads(3), 'pull', 'X')
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
        self.publish(MIB)
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
        rename = os.rename
        self.addCleanup(setattr, os, 'rename', rename)
        for what, code, refused in (('aside', 13, lambda old, new: old == self.here),
                                    ('in', 13, lambda old, new: new == self.here and old.name == 'new'),
                                    ('disk', 18, lambda old, new: new == self.here and old.name == 'new')):
            def busy(old, new):
                if refused(Path(old), Path(new)):
                    raise OSError(code, os.strerror(code), old)
                rename(old, new)
            with self.subTest(what):
                os.rename = busy
                err = self.etc('register --copy -f ds X', status=1)[1]
                os.rename = rename
                self.assertIn(os.strerror(code), err)
                self.etc('verify X')
                self.assertEqual((tree(self.here), self.leftovers()), (tree('ds'), []))

    STEPS = """
import errno, itertools
import etcetera as etc
steps, in_image = itertools.count(1), sys.argv[2] == 'image'
def slow(function):
    def step(path, *args, **kwargs):
        if in_image and function.__name__ == 'rename' and os.path.dirname(path) == os.path.abspath(sys.argv[4]):
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

    def steps(self, words, kind=''):
        """Kill a command at each of its steps; 'image': where the directories of the store cannot be renamed."""
        for number in itertools.count(1):
            place = '--home', 'home', '--url', self.url
            code, out = run_python(self.STEPS, number, kind, *place, *words.split())
            if code != 9:
                self.assertEqual((code, number > 2), (0, True), out)
                return
            with self.subTest(number, words=words):
                yield

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

    def test_killed_while_it_removes_what_cannot_be_renamed(self):
        """As in a container's image: nothing half-removed passes for a whole dataset."""
        self.url = (self.tmp / 'share').as_uri()
        self.root = write('ds', {'data/train/x': 'x', 'data/test/y': 'y', 'README.md': 'r'})
        self.share(self.root, home='pub')
        self.etc('pull X')
        for _ in self.steps('purge X', kind='image'):
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
print(etc.dataset('X', auto_install=True, config=etc.Config(%r, home=%r, **%r)).digest)
''' % (self.url, 'home', self.settings)
        with ThreadPoolExecutor(8) as pool:
            results = set(pool.map(run_python, [code] * 8))
        self.assertEqual(results, {(0, etc.Dataset(self.root).digest + '\n')})
        self.check()
        self.assertLess(self.server.sent, 1.5 * 20 * MIB)

    @POSIX
    def test_many_at_once_where_locks_do_nothing(self):
        """As on some cluster file systems, where all of them succeed."""
        import fcntl
        self.publish(4 * MIB)
        self.addCleanup(setattr, fcntl, 'flock', fcntl.flock)
        fcntl.flock = lambda file, operation: None
        with ThreadPoolExecutor(6) as pool:
            pulls = [pool.submit(etc.pull, 'X', config=self.config()) for _ in range(6)]
        self.assertEqual({pull.result().digest for pull in pulls}, {etc.Dataset(self.root).digest})
        self.etc('verify X')
        self.check()

    @POSIX
    def test_waiting_blocks_no_process(self):
        """As its other green threads may hold the lock: it is asked for, again and again."""
        import fcntl
        self.publish(MIB)
        flock, waited = fcntl.flock, threading.Event()
        self.addCleanup(setattr, fcntl, 'flock', flock)
        asked = []

        def polled(file, operation):
            asked.append(operation)
            if len(asked) > 2:
                waited.set()
            flock(file, operation | fcntl.LOCK_NB)
        fcntl.flock = polled
        with open(write('home', {'.etcetera/locks/X': ''}) / '.etcetera/locks/X', 'ab') as held:
            flock(held, fcntl.LOCK_EX)
            with ThreadPoolExecutor(1) as pool:
                pull = pool.submit(etc.pull, 'X', config=self.config())
                self.assertTrue(waited.wait(20))
                self.assertFalse(pull.done())
                held.close()
        self.assertEqual(pull.result().digest, etc.Dataset(self.root).digest)
        self.assertTrue(all(operation & fcntl.LOCK_NB for operation in asked))


@POSIX
class Resume(Installing):
    """What an interrupted pull has left is verified, and not fetched again."""

    def setUp(self):
        super().setUp()
        self.settings['connections'] = 10
        files = {'data/train/big': noise(20 * MIB), 'data/train/\u00e9' + 'x' * 120: noise(100), 'README.md': 'hello'}
        files.update({'data/train/%04d' % n: noise(1500) for n in range(1500)})
        files.update({'data/train/m/%d' % n: noise(MIB // 2) for n in range(20)})
        files.update({'data/test/%d' % n: noise(300000) for n in range(10)})
        self.root = write('ds', files)
        (self.root / 'data/train/0000').chmod(0o755)
        self.share(self.root, home='pub')
        self.size = len(self.server.objects['some/prefix/X.tgz'][0])

    def start_of(self, handler):
        """Where the range of a read starts, if it is none of the archive's end, which holds the index."""
        range_ = handler.headers.get('Range', 'bytes=-')
        start, stop = asked_range(handler.headers, self.size) if not range_.startswith('bytes=-') else (0, 0)
        return start if start < self.size - 65536 else 0, stop

    def broken_off(self, share, number=signal.SIGTERM):
        """Break a pull off when a share of the data has come and is written."""
        def is_late(handler):
            start, stop = self.start_of(handler)
            return start and (start >= share * self.size or stop > self.size - 65536)
        process, go_on = self.start(is_late, '--config', 'settings.yaml', 'pull', 'X')
        until, written = time.time() + 30, 0
        while written < share * self.size - 8 * MIB:
            self.assertLess(time.time(), until)
            time.sleep(0.02)
            lines = b''.join(path.read_bytes() for path in Path('home/.etcetera').rglob('journal'))
            written = sum(map(int, re.findall(rb'^\[".*?", (\d+), ', lines, re.M)))
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
                self.assertLess(self.pulled(), (1.25 - max(shares)) * self.size)  # what is under way is lost
                self.etc('purge X')

    def test_nothing_is_trusted(self):
        self.broken_off(0.9)
        journal, = Path('home/.etcetera').rglob('journal')
        inside = journal.parent.relative_to('home')

        def change(path, old, new):
            path.chmod(0o644)
            data = path.read_bytes()
            path.write_bytes(data[:99] + data[99:].replace(old, new, 1))

        for home, harm in (
                ('a changed file', lambda work: change(work / 'new/data/train/1200', b'', b'x')),
                ('a new file', lambda work: write(work / 'new', {'data/test/00': 'new'})),
                ('a forged length', lambda work: change(work / 'journal', b'"data/train", ', b'"data/train", 1')),
                ('a link', lambda work: (remove(work / 'new/data/train'), write(
                    work / 'new', {'data/train': ('->', str(self.tmp / 'ds/data/train'))}))),
                ('another dataset', lambda work: (write(self.root, {'data/train/0001': 'other'}), self.etc(
                    'push', '-f', 'X', home='pub')))):
            with self.subTest(home):
                shutil.copytree('home', home)
                harm(Path(home, inside))
                self.etc('pull X', home=home, status=None)  # it may be refused in the end, and then forgotten
                self.pulled(home)

    def test_lost_network(self):
        self.addCleanup(setattr, etc.time, 'sleep', time.sleep)
        etc.time.sleep = lambda seconds: None

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
                self.assertIn("'X' is not what was installed: data/test differs", err)

    @POSIX
    def test_believed_of_no_other(self):
        self.etc('pull -p test X')
        shutil.copytree(self.here, 'home/Y')
        self.etc('register', self.here, 'Z')
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


class PullReuse(Shell, S3Case):
    """What any installed dataset has is not fetched again."""

    def setUp(self):
        super().setUp()
        self.old = write('old', {'data/train/%d' % n: noise(MIB, n) for n in range(4)})
        write(self.old, {'data/test/x': noise(2 * MIB, 9), 'data/test/y': ('->', 'x'), 'README.md': 'one'})
        self.new = Path('new')
        shutil.copytree(self.old, self.new, symlinks=True)
        write(self.new, {'README.md': 'the second one'})
        self.share(self.old, 'Old', home='pub')
        self.share(self.new, 'New', home='pub')
        self.etc('pull Old')
        self.here = Path('home')

    def pulled(self, words, root=None):
        """Pull; returns how many MiB the server sent, and what was said."""
        before, name = self.server.sent, words.split()[-1]
        err = self.etc('pull', words)[1]
        self.etc('verify', name)
        if '-p' not in words:
            self.assertEqual(tree(self.here / name), tree(root or self.new))
        return (self.server.sent - before) / MIB, err

    def test_versions_and_names(self):
        self.share(self.old, 'Renamed', home='pub')
        self.share(write('third', {'data/val/v': noise(3 * MIB, 7)}), 'Third', home='pub')
        write('sum', {'data/val/v': noise(3 * MIB, 7), 'data/more/m': noise(MIB, 8)})
        shutil.copytree(self.old / 'data/train', 'sum/data/train')
        self.share('sum', 'Sum', home='pub')
        self.etc('pull Third')
        for name, root, least, said in (
                ('New', self.new, 0, 'pulled New: 7 files, 6.29 MB in .*; 6.29 MB were here already'),
                ('Renamed', self.old, 0, 'pulled Renamed: .*; 6.29 MB were here already'),
                ('Sum', 'sum', 1, '; 7.34 MB were here already')):
            with self.subTest(name):
                sent, err = self.pulled(name, root=root)
                self.assertTrue(least < sent < least + 0.03, sent)
                self.assertRegex(err, said)
                if os.name != 'nt':
                    self.assertTrue((self.here / 'Old/data/train/2').samefile(self.here / name / 'data/train/2'))
        self.etc('purge Old')
        self.etc('verify New')

    def test_some_partitions_and_the_rest(self):
        sent, err = self.pulled('-p test New')
        self.assertEqual((sent < 0.02, os.listdir(self.here / 'New/data')), (True, ['test']))
        self.assertIn('pulled New: 3 files, 2.1 MB', err)
        self.etc('purge Old')
        sent, err = self.pulled('New')
        self.assertTrue(4 < sent < 4.1, sent)
        self.assertIn('; 2.1 MB were here already', err)

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
        self.share(write(changed, {'data/train/2': noise(MIB, 22)}), 'Changed', home='pub')
        for words in ('purge Old', 'register --copy -f %s Old' % changed):
            changes = [words]
            etc.pull('New', config=self.config(), progress=lambda done, total: changes and self.etc(changes.pop()))
            self.assertEqual((changes, tree(self.here / 'New')), ([], tree(self.new)))
            self.etc('verify New')
            self.etc('purge New')
            self.etc('register --copy -f', self.old, 'Old')

    def test_interrupted(self):
        """What could be linked is linked again."""
        write(self.new, {'data/late/%d' % n: noise(MIB, 50 + n) for n in range(20)})
        self.share(self.new, 'Long', home='pub')
        asked = itertools.count()
        self.server.fault = lambda handler: next(asked) > 5 and refusing(403, 'AccessDenied')(handler)
        self.etc('pull Long', status=1)
        self.server.fault = None
        self.assertLess(self.pulled('Long')[0], 21)
        self.assertEqual(self.leftovers(), [])


def refusing(status, code):
    """A fault of a server of S3."""
    return lambda handler: handler.error(status, code) or True


class PushReuse(Shell, S3Case):
    """What archives in the bucket hold is copied there, and not sent."""

    def setUp(self):
        super().setUp()
        self.old = write('old', {'data/test/y': noise(11 * MIB, 2), 'data/train/x': noise(12 * MIB, 1),
                                            'data/val/z': noise(11 * MIB, 3), 'README.md': 'one', 'assets/a': 'a'})
        self.share(self.old, 'Old')
        self.kept = self.server.objects['some/prefix/Old.tgz']
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
        """Push; returns how many MiB were sent, and what was said. What is there must be what was to be pushed."""
        sent = []
        self.server.log.clear()
        self.server.fault = lambda handler: sent.append(int(handler.headers['Content-Length'] or 0)) or fault(handler)
        err = self.etc('push -v', words)[1]
        self.server.fault = None
        self.assertEqual(self.server.uploads, {})
        name = words.split()[-1]
        self.etc('pull', name, home='other')
        self.assertEqual(tree('other/' + name), tree('home/' + name))
        remove('other')
        return sum(sent) / MIB, err

    def copies(self):
        return [path for _, path, headers in self.server.log if headers['x-amz-copy-source']]

    def test_what_is_new_is_sent(self):
        self.etc('register', self.old, 'Renamed')
        for name in 'New', 'Renamed':
            with self.subTest(name):
                sent, err = self.pushed(name)
                self.assertLess(sent, 6)
                self.assertRegex(err, r'pushed %s to .*: 5 files, 35\.7 MB in [^(]*; 35\.7 MB were there' % name)
                self.assertTrue(self.copies())
        for name, size, most in (('data/test/y', 11, 17), ('data/train/x', 12, 23), ('data/val/z', 11, 17)):
            with self.subTest(name):
                self.restore()
                self.change(name, noise(size * MIB, name))
                sent, err = self.pushed('New')
                self.assertTrue(size < sent < most, sent)
                self.change(name, (self.old / name).read_bytes())
        self.etc('register -f', self.new, 'Old')
        self.assertLess(self.pushed('-f Old')[0], 6)

    def test_several_sources(self):
        self.change('data/test/y', noise(11 * MIB, 4))
        self.etc('push New')
        self.change('data/train/x', noise(12 * MIB, 5))
        self.change('data/more/m', noise(MIB, 6))
        self.etc('register', self.new, 'Third')
        sent, err = self.pushed('Third')
        self.assertTrue(13 < sent < 22, sent)
        self.assertIn('; 23.1 MB were there already', err)

    def test_what_is_sent(self):
        """Other contents of the same size, and by force what is there already: it may be damaged where nobody looks."""
        for name, seed in (('data/train/x', 5), ('data/test/y', 6), ('data/val/z', 7)):
            self.change(name, noise((self.old / name).stat().st_size, seed))
        data, middle = self.kept[0], len(self.kept[0]) // 2
        self.restore(data[:middle] + bytes(MIB) + data[middle + MIB:])
        for words in 'New', '-f Old':
            with self.subTest(words):
                sent, err = self.pushed(words)
                self.assertTrue(34 < sent < 35, sent)
                self.assertNotIn('already', err)
        self.etc('register', write('less', {'data/x/x': noise(16 * MIB, 2)}), 'Less')
        self.pushed('Less')
        self.assertEqual([path for path in self.requests('GET') if 'Old' in path], [], 'it is not worth a look')

    def test_sources_that_cannot_be_read(self):
        """Archives of other tools, damaged ones, archived ones: none hinders a push."""
        data = self.kept[0]
        self.restore(Damaged=data[:-20] + bytes(20), Foreign=gzip.compress(data, 0), Empty=bytes(30 * MIB))
        tries = []

        def fault(handler):
            if handler.path.endswith('/Empty.tgz'):
                return refusing(403, 'InvalidObjectState')(handler)
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
        def replace(handler):
            self.server.objects['some/prefix/Old.tgz'] = self.kept[0], '"other"', {}

        def copy_all(handler):
            self.server.copied = lambda data, start, stop: data

        def store_nothing(handler):
            number = re.search(r'partNumber=(\d+)', handler.path).group(1)
            list(self.server.uploads.values())[0][1][int(number)] = b''
            return handler.answer(200, b'', {'ETag': '"x"'}) or True

        def no_etag(handler):
            return handler.answer(200, b'<CopyPartResult><ETag/></CopyPartResult>') or True

        copying, completing = 'x-amz-copy-source', 'POST .*uploadId='
        for at, fault, said in (
                (copying, store_nothing, ''), (copying, no_etag, ''), (copying, copy_all, ''),
                (copying, refusing(200, 'InvalidRequest'), ''), (copying, refusing(403, 'AccessDenied'), '403 AccessDenied'),
                (copying, refusing(501, 'NotImplemented'), '501 NotImplemented'), ('list-type', refusing(403, 'AccessDenied'), '403'),
                (completing, refusing(400, 'PartsMustBeOfOneSize'), 'PartsMustBeOfOneSize'),  # as R2
                (copying, replace, '(replaced|412)'), (copying, lambda handler: self.server.objects.clear(), '404')):
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
        for refused, left, said in (('POST', ['Old'], '403 AccessDenied'), ('DELETE', ['New', 'Old'], "'etc push -f New' replaces it")):
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

    def test_another_push_is_faster(self):
        """It is said, and nothing is sent again, if it ends before this one copies, or before this one looks at the end."""
        def overtake(handler):
            self.server.objects.update(then)
            return handler.command == 'POST' and handler.answer(200, COMPLETED % (b'', b'', b'', b'mine'))

        new = {'some/prefix/New.tgz': self.kept}
        for then, at_end, said in ((new, False, "another 'New' is in"), (new, True, "New' .*(another|replaced|overtaken)"),
                                   ({}, True, "New' .*(removed|gone|no longer)")):
            with self.subTest(said):
                self.restore()
                self.server.log.clear()
                if at_end:
                    self.server.final = lambda handler: (self.server.objects.pop('some/prefix/New.tgz'), overtake(handler))
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
        self.pushed('New')
        whole = self.server.objects['some/prefix/New.tgz'][0]
        for number in range(1, len(self.requests()) + 1, 1 if RUNS > 1 else 3):
            with self.subTest(number):
                self.restore()
                left = itertools.count(1)
                self.server.fault = lambda handler: next(left) == number and process.kill()
                process = self.spawn('push New')
                process.communicate()
                self.server.fault = None
                self.assertIn(self.server.objects.get('some/prefix/New.tgz', (None,))[0], (None, whole))
                self.etc('push New')
                self.assertEqual(self.server.objects['some/prefix/New.tgz'][0], whole)


class Disks(Shell, Case):
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
        subprocess.check_call(['gcc', '-shared', '-fPIC', '-o', 'disk.so', 'disk.c', '-ldl'])
        os.environ['LD_PRELOAD'] = str(self.tmp / 'disk.so')

    def test_disk_without_modes_and_links(self):
        """As exFAT: all files are executable, and there are no symbolic links."""
        self.share(small('small'), 'Y', home='pub')
        self.preload(NO_MODES)
        no_links = 'this disk cannot hold links: Operation not permitted; '
        for words, said in (
                ('pull X', no_links + "set 'home' to a place on another disk"), ('pull Y', 'pulled Y'),
                ('register ds', no_links + "'etc register --copy'"),
                ('verify Y', "; this disk does not keep executable bits; set 'home' to a place on another")):
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
        problem = "cannot change what is in %s: Permission denied; ask who owns it, or set 'home'" % (self.tmp / 'home')
        with unprivileged('settings.yaml'):
            for words, said in (('pull X', 'installed already'), ('ls', ''), ('verify X', 'complete and unchanged')):
                self.assertIn(said, self.etc(words)[1])
            self.assertEqual(len(etc.dataset('X', auto_install=True, config=self.config())), 3)
            for words in ('pull -f X', 'purge X', 'create Y', 'register ds Y', 'register -f ds X', 'register --copy ds Y'):
                with self.subTest(words):
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
        self.assertEqual((self.installed(), self.leftovers()), ([], []))

    def test_directories_of_an_image(self):
        """As in a container, where overlayfs renames none: replacing is refused, and removing works in place."""
        self.etc('pull -p test X', home='image')
        self.etc('register --copy', small('small'), 'Y', home='image')
        script = '''
            mkdir over home
            mount -t tmpfs tmpfs over && mkdir over/upper over/work || exit 77
            mount -t overlay overlay -o lowerdir=image,upperdir=over/upper,workdir=over/work home || exit 77
            ! mv -T home/X home/Z 2>/dev/null
            etc() { echo "$*"; "%s" "%s" --url "%s" --home home "$@" || echo failed; }
            etc pull X; etc pull -f X; etc verify X; etc register --copy -f ds Y; etc verify Y
            etc purge X; etc ls; etc pull X; etc verify X; etc pull -f X; etc purge Y; etc ls
            ''' % (sys.executable, SCRIPT, self.url)
        if not shutil.which('unshare'):
            self.skipTest('nothing can be mounted here')
        done = subprocess.run(['unshare', '-m', 'sh', '-ec', script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 77 or done.stdout.startswith(b'unshare'):
            self.skipTest('nothing can be mounted here')
        refused = "'?etc.*purge.*\nfailed\n"
        self.assertRegex(done.stdout.decode(), ''.join((
            '\\Apull X\n.*', refused, 'pull -f X\n.*', refused, 'verify X\n.*partly installed, and unchanged.*\n',
            'register .*\n.*', refused, 'verify Y\n.*complete and unchanged.*\n', 'purge X\n.*\n', 'ls\nY\n',
            'pull X\n.*pulled X.*\n', 'verify X\n.*\n', 'pull -f X\n.*\n', 'purge Y\n.*\n', 'ls\nX\n\\Z')))


@POSIX
class Kills(Shell, S3Case):
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
            files = {'data/train/%02d' % n: noise(100000, '%s %d' % (version, n)) for n in range(30)}
            root = write(version, dict(files, **{
                'data/test/noise': noise(6 * MIB, version), 'meta.json': '{"v": "%s"}' % version, 'data/train/00': 'shared'}))
            self.etc('register', root, 'X', home='maker-' + version)
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
            for seed in range(2 * RUNS):
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
        self.assertGreater(killed, 5 * RUNS, 'most shall be killed before they end')


# ---------------------------------------------------------------------------------------
# Locked-down interpreters
# ---------------------------------------------------------------------------------------

class Locked(Shell):
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

    def test_strict_interpreter(self):
        python = ['-I', '-S', '-bb', '-W', 'error'] + ['-X', 'dev'] * (sys.version_info >= (3, 7))
        os.environ.update(LC_ALL='C', LANG='C')
        for home, words in self.COMMANDS:
            with self.subTest(words):
                process = self.spawn('-q', *words.split(), home=home, python=python,
                                     stdin=subprocess.DEVNULL, start_new_session=True)
                err, problem = process.communicate()[1].decode(), self.FAILED.get(words)
                self.assertEqual(process.returncode, int(words in self.FAILED), err)
                self.assertRegex(err, r'\Aetc: %s[^\n]+\n\Z' % problem if problem else r'\A\Z')
        self.assertEqual(tree('two/X'), tree('ds'))

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
            config, url, commands, failing = sys.argv[1:]
            for home, words in json.loads(commands):
                found = etcetera.main(['--config', config, '-q', '--url', url, '--home', home] + words.split())
                assert found == (words in failing), (words, found)
                gc.collect()
            '''
        self.etc('ls')  # writes the settings
        code, out = run_python(program, 'settings.yaml', self.url, json.dumps(self.COMMANDS), list(self.FAILED),
                               flags=['-I', '-S', '-W', 'error'], stdin=subprocess.DEVNULL)
        self.assertEqual(code, 0, out)
        self.assertRegex(out, r'\Aetc: %s[^\n]+\netc: %s[^\n]+\n\Z' % tuple(self.FAILED.values()))
        self.assertEqual(tree('two/X'), tree('ds'))


class FileLocked(Locked, Case):
    def put(self, name, data):
        write('share', {name: data})


class S3Locked(Locked, S3Case):
    def put(self, name, data):
        self.server.objects['some/prefix/' + name] = data, '"%s"' % hashlib.sha1(data).hexdigest(), {}


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
        write('.', {'settings.yaml': ''.join('%s: %s\n' % (key, json.dumps(value)) for key, value in self.settings.items())})
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
        for path in Path('.').rglob('*'):
            if path.is_file() and path.parts[0] not in ('settings.yaml', '.aws', 'key.json'):
                self.said.append(path.read_bytes().decode('latin-1'))
        for text in self.said:
            for secret in self.secrets:
                self.assertNotIn(secret, text)
        del self.said[:]


class Secrets(Hush, S3Case):
    secrets = SECRET, 'wJalrXUtnFEMI', 'session/hush', 'hush'
    NOPE, WRONG = "no dataset 'Nope' in", 'aws_secret_access_key holds characters that it cannot have'

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
        for value, problem, least in ((SECRET, self.NOPE, 1), ('hush\nhush', self.WRONG, 6), ('hush\u00e9', self.WRONG, 6),
                                      ('hush hush', self.WRONG, 6), ('hush', '403 SignatureDoesNotMatch', 6)):
            with self.subTest(value):
                os.environ['AWS_SECRET_ACCESS_KEY'] = value
                self.everything(problem, least)

    def test_files(self):
        keys, unreadable = '[default]\naws_access_key_id = %s\n' % AKID, 'credentials cannot be read as an AWS settings file'
        self.settings = {'endpoint_url': self.server.url}
        for text, problem, least in (
                (keys + 'aws_secret_access_key = %s\naws_session_token = session/hush' % SECRET, self.NOPE, 1),
                ('[default]\naws_secret_access_key = hush', 'aws_access_key_id and aws_secret_access_key go together', 6),
                ('hush', unreadable, 6), ('[default\nhush = hush', unreadable, 6), (keys + 'hush\nhush', unreadable, 6),
                (keys + 'aws_secret_access_key = hu\u00e9hush', self.WRONG, 6)):
            with self.subTest(text):
                write('.', {'.aws/credentials': text})
                self.everything(problem, least)

    def test_settings_that_cannot_be_read(self):
        path = Path('settings.yaml')
        for line in ('aws_secret_access_key: "hush|1: a quoted value must end on its line',
                     'aws_secret_access_key: [hush]|1: this YAML syntax is not supported',
                     'aws_secret_access_key: hush: hush|1: this YAML syntax is not supported',
                     "hush|1: not of the form 'key: value'", 'aws_secret_access_key: "\\hush"|1: unknown escape',
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
                xml = '<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message><StringToSign>%s</StringToSign></Error>'
                told, location = escape(str(handler.headers)), {'Location': self.server.url + '/elsewhere'}
                return handler.answer(status, (xml % told).encode(), location) or True
            with self.subTest(status):
                self.server.fault = fault
                self.everything('answers %d SignatureDoesNotMatch: no;' % status, 6)
        self.server.fault = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR) or True
        self.everything('cannot reach ' + self.server.url, 6)
        self.server.fault = lambda handler: handler.answer(200, str(handler.headers).encode()) or True
        self.everything('does not answer (as S3 does|with the range that was asked for)', 5)


# what stands between the marks of a secret
ALPHABETS = {'slash': '/', 'hash': '#', 'at': '@', 'unicode': '\u00e9', 'newline': '\n'}
if RUNS > 1:  # all of them take minutes
    ALPHABETS.update({'plus': '+/', 'equals': '=', 'question': '?', 'colon': ':', 'percent': '%2F', 'space': ' ',
                      'quote': "'", 'json': '", "', 'port': ':1/', 'scheme': '://', 'long': '/' + 'x' * 300})


class Places(Hush, S3Case):
    """Secrets where a URL, a path, a name or a choice should be: nothing that is printed, kept or sent may tell them."""

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
        """table: lines with a variable or a setting, =, what it holds (% is a secret), other variables, |, what is said."""
        for (alphabet, mark), line in itertools.product(ALPHABETS.items(), table.strip().splitlines()):
            with self.subTest(line, alphabet=alphabet, more=more):
                variables, _, said = line.partition('|')
                pairs = [pair.split('=', 1) for pair in (variables + more).split()]
                name, value = pairs[0][0], pairs[0][1].replace('%', mark.join(self.secrets))
                self.settings = {name: value} if name.islower() else {}
                write('.', {'settings.yaml': ''.join('%s: %s' % (key, json.dumps(value)) for key in self.settings)})
                Path('settings.yaml').chmod(0o600)
                env = dict(pairs[1:], **{'ETC_CONFIG' if self.settings else name:
                                         'settings.yaml' if self.settings else value})
                if mark == '\n' and (name.islower() or name in ('ETC_URL', 'ETC_HOME')):
                    said = 'holds characters that cannot be printed'
                self.told(list(words), 1, said.strip() or says, env)

    KEYLESS = ' AWS_ACCESS_KEY_ID= AWS_SECRET_ACCESS_KEY='

    def test_paths_and_choices(self):
        self.everywhere(r"""
            AWS_WEB_IDENTITY_TOKEN_FILE=% AWS_ROLE_ARN=arn:aws:iam::1:role/x     | \$AWS_WEB_IDENTITY_TOKEN_FILE names:
            AWS_ROLE_ARN=% AWS_WEB_IDENTITY_TOKEN_FILE=file                      | \$AWS_ROLE_ARN
            AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=% AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:1/ | TOKEN_FILE names:
            AWS_SHARED_CREDENTIALS_FILE=%                                        | no credentials were found
            AWS_CONFIG_FILE=%                                                    | no credentials were found
            """, more=self.KEYLESS)
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
            storage_class=%\u20ac                                               | a value that cannot be sent
            sse=%\u20ac                                                         | a value that cannot be sent
            sse_kms_key_id=%\u20ac                                              | a value that cannot be sent
            request_payer=%\u20ac                                               | a value that cannot be sent
            """.replace('HERE', str(self.tmp)).replace(r'\u20ac', '\u20ac'))
        etc.push('X')  # or pull would not come to look at the home
        for words in ('ls', 'push X', 'pull X', 'create Y', 'register ds Y'):
            self.everywhere('ETC_HOME=HERE/file/%\nhome=HERE/file/% ETC_HOME='.replace('HERE', str(self.tmp)),
                            words.split(), says=r'%s/file/\.\.\.' % self.tmp)

    def test_urls(self):
        """Passwords and signatures in URLs, and keys instead of URLs."""
        for name in 'ETC_URL', 'url':
            self.everywhere("""
                NAME=%                            | it must start with
                NAME=https://user:%@127.0.0.1:1/x | user or password
                NAME=https://user:x%@127.0.0.1:1/ | user or password
                NAME=https://127.0.0.1:1/x?sig=%  | the url
                NAME=https://127.0.0.1:1/x#%      | the url
                NAME=s3://user:%@bucket           | the url is not of the form
                NAME=gs://user:%@bucket/x         | the url is not of the form
                NAME=ftp://user:%@127.0.0.1:1/x   | it must start with
                NAME=file://user:%@host/x         | is no absolute path
                """.replace('NAME', name), more='' if name == 'ETC_URL' else ' ETC_URL= AWS_ENDPOINT_URL=')
        for name, more in (('endpoint_url', ''), ('AWS_ENDPOINT_URL', ''), ('AWS_ENDPOINT_URL_S3', ''),
                           ('STORAGE_EMULATOR_HOST', ' ETC_URL=gs://bucket'),
                           ('AWS_EC2_METADATA_SERVICE_ENDPOINT', self.KEYLESS + ' AWS_EC2_METADATA_DISABLED=')):
            self.everywhere('NAME=http://user:%@127.0.0.1:1\nNAME=http://127.0.0.1:1/?sig=%'.replace(
                'NAME', name), more=more, says='the endpoint_url must look like')
        for name, more in ('endpoint_url', ''), ('AWS_ENDPOINT_URL', ''):
            self.everywhere(name + '=%', more=more, says='the endpoint_url must look like')
        self.everywhere(r"""
            AWS_CONTAINER_CREDENTIALS_FULL_URI=http://user:%@127.0.0.1:1/
            AWS_CONTAINER_CREDENTIALS_FULL_URI=https://user:%@127.0.0.1:1/
            AWS_CONTAINER_CREDENTIALS_FULL_URI=%
            AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:1/?%
            AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:1/%
            AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=:%
            AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=@%
            AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=%
            """, more=self.KEYLESS, says=r'\$AWS_CONTAINER_CREDENTIALS_(FULL_URI must begin with https://|RELATIVE_URI must be a '
                                         r'path)|does not have the form https://host|cannot reach http://127\.0\.0\.1:1: ')

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
        bad = ('https://user:%@PROXY socks5://user:%@PROXY socks5h://PROXY/% http://user:%@ user:%@127.0.0.1:x '
               'http://user:%@127.0.0.1:99999 http://user:%@[')
        for (alphabet, mark), scheme in itertools.product(ALPHABETS.items(), ('http', 'https')):
            secret = mark.join(self.secrets)
            for template in bad.split() + ['http://user:%@PROXY/'] * (mark != '\n'):
                with self.subTest(template, alphabet=alphabet, scheme=scheme):
                    is_bad = template in bad
                    says = scheme + '_proxy is not of the form http://' if is_bad else 'does not answer as S3|cannot reach https://'
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
        pull %                 | is not NAME@sha256:|cannot be a dataset's name
        pull X %               | is not NAME@sha256:|cannot be a dataset's name
        push %                 | is not NAME@sha256:|cannot be a dataset's name
        info %                 | is not NAME@sha256:|cannot be a dataset's name
        info -r %              | is not NAME@sha256:|cannot be a dataset's name
        diff X %               | is not NAME@sha256:|cannot be a dataset's name
        diff -r % X            | is not NAME@sha256:|cannot be a dataset's name
        purge %                | is not NAME@sha256:|cannot be a dataset's name
        verify %               | is not NAME@sha256:|cannot be a dataset's name
        create %               | is not NAME@sha256:|cannot be a dataset's name
        register ds %          | is not NAME@sha256:|cannot be a dataset's name
        register ds as %       | is not NAME@sha256:|cannot be a dataset's name
        register %             | no directory
        register % Y           | no directory
        register % ds          | no directory
        diff X X %             | diff takes two names
        ls %                   | no dataset here matches
        %                      | etc: no command |argument COMMAND
        pull X --ulr=%         | etc: '?etc.* takes no |is not NAME@sha256:|cannot be a dataset's name
        pull X --force=%       | argument -f/--force
        --%                    | etc: '?etc.* takes no |etc: no command |argument COMMAND
        -x%                    | etc: '?etc.* takes no |etc: no command |argument COMMAND
        --co=% ls              | no settings file|etc: '?etc.* takes no
        --config % ls          | no settings file
        --config file/% ls     | cannot be read:
        --home file/% create Y | Not a directory: |'home' holds
        --url % ls -r          | the url[ ;]|'url' holds
        pull X -p %            | no partition
        create -f Y a %/       | cannot be a partition's name
        """

    def test_words(self):
        """On the command line: what is typed is shown, but URLs without password and query."""
        etc.push('X')  # or pull would not come to look at partitions
        templates = ('https://user:%s@127.0.0.1:1/x', 's3://user:%s@bucket', 'https://127.0.0.1/x?sig=%s',
                     'user:%s@127.0.0.1', 'https://%s@127.0.0.1', 'https://127.0.0.1/x#token=%s')
        for (alphabet, mark), template in itertools.product(ALPHABETS.items(), templates):
            word = template % mark.join(self.secrets)
            for row in self.WORDS.strip().splitlines():
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
        nope, unused, none = "no dataset 'Nope' in", 'key.json cannot be used: ', 'key.json holds no Google credentials;'
        cases = [(user, nope), (dict(user, refresh_token=['hush']), nope),
                 (dict(user, token_uri='nonsense'), unused + 'the address of a token'),
                 (dict(account, private_key='hush'), unused + 'private_key'), (dict(account, private_key=['hush']), unused),
                 (dict(account, private_key=pem), unused + 'private_key'), (['hush'], none), ({'private_key': 'hush'}, none),
                 ({'type': 'service_account', 'private_key': 'hush'}, unused + "'client_email'"),
                 (dict(others, type='external_account'), '.'), (dict(others, type='odd'), '.')]
        for secret in ('hush\nX: y', 'hush\u20ac', 'hu/sh@hush#hush?hush'):
            url = 'http://user:%s@127.0.0.1:1/x?key=%s' % (secret, secret)
            cases += [(dict(user, token_uri=url), 'does not have the form|cannot reach http://127.0.0.1:1: '),
                      (dict(user, token_uri=secret), unused + 'the address of a token'),
                      (dict(user, quota_project_id=secret + '\n'), 'a header for http://.* contains invalid characters')]
        for info, problem in cases:
            with self.subTest(info=info):
                self.use(info)
                self.everything(problem, 1 if problem == nope else 6)
        Path('key.json').write_text('{"type": "authorized_user", "refresh_token": "hush')
        self.everything(none, 6)

    def test_answers(self):
        self.use(self.user(client_secret='hush', refresh_token='hush'))
        good = {'access_token': 'ya29.token', 'expires_in': 3600}
        for answer, problem in ((dict(good, access_token='hu\nsh hush'), 'cannot be used: access_token'),
                                (dict(good, access_token='hush\u20ac'), 'cannot be used: access_token'),
                                (dict(good, access_token=['hush']), 'cannot be used: access_token'),
                                (dict(good, expires_in='soon'), 'cannot be used: '), (['hush'], 'cannot be used: '),
                                ({'hush': 1}, "cannot be used: 'access_token'"), ('no', 'gives no access token: no;')):
            with self.subTest(answer):
                self.tokens.respond = lambda handler, form: answer
                self.everything(problem, 6)
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
        self.etc('register', root, 'X')
        size = etc.info('X', config=self.config())['size']
        self.assertEqual(self.told(etc.push, 'X'), size)
        with tarfile.open('share/Foreign.tgz', 'w:gz') as tar:
            tar.add(root, '.')
        archive, foreign = [os.path.getsize('share/' + name) for name in ('X.tgz', 'Foreign.tgz')]
        for home, function, args, least, most in (
                ('two', etc.pull, ['X'], archive - 4096, archive), ('three', etc.pull, ['X', False, ['empty']], 1, 4096),
                ('three', etc.dataset, ['X', True], archive - 8192, archive),
                ('two', etc.pull, ['Foreign'], foreign, foreign), ('two', etc.verify, ['X'], size, size),
                ('home', etc.diff, ['X', 'X', (True, False)], size, size),  # registered here, so it must be read
                ('home', etc.register, [root, 'Y', False, True], size, size)):
            with self.subTest(function.__name__, args=args):
                self.assertTrue(least <= self.told(function, *args, home=home) <= most)
        self.assertEqual([tree(Path(home, 'X')) for home in ('two', 'three')], [tree(root)] * 2)

    @POSIX
    def test_terminal(self):
        write('ds', {'data/train/big': noise(3 * MIB), 'data/train/small': 'x'})
        etc.register('ds', 'MNIST', config=etc.Config())
        for columns in 80, 40, 12:
            for words in ('push -f MNIST', 'verify MNIST', '--home %d pull MNIST' % columns):
                with self.subTest(words, columns=columns):
                    code, shown = on_terminal('--url', self.url, *words.split(), columns=columns, stdout=subprocess.DEVNULL)
                    *drawn, last = [line for line in shown.split('\r\033[J') if line]
                    self.assertEqual((code, bool(drawn)), (0, True), shown)
                    for line in drawn:
                        self.assertTrue(line.endswith('\r') and '\n' not in line and len(line) <= columns, drawn)
                        self.assertRegex(line, '(push|verify|pull)ing' + ' MNIST +[0-9]+%' * (columns > 12))
                    self.assertRegex(last, r'\A\r?etc: [a-z]+ed MNIST.*2 files, 3\.15 MB in [0-9.]+ s \(.* [MG]B/s\)\n')
        for words, term in ((['-q', 'push', '-f', 'MNIST'], 'xterm'), (['push', '-f', 'MNIST'], 'dumb')):
            self.assertNotRegex(on_terminal('--url', self.url, *words, term=term)[1], r'\033|pushing')
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
        for answers, code, left in (('\n|n\n|no\n|yy\n|\xff\n| \n|\x04', 1, ['X', 'Y']), ('y\n|Y\n|yes\n| yes \n', 0, ['Y'])):
            for answer in answers.split('|'):
                with self.subTest(answer):
                    *found, shown = self.purge('-r', '-q', 'X', answers=[answer.encode('latin-1')])
                    self.assertEqual((found, shown[:len(asked)]), ([code, left], asked))
                    self.assertTrue(shown.endswith("\netc: 'X' (1.5 kB) in %s stays\n" % self.url if code else answer), shown)

    def test_outcomes(self):
        purged = "etc: purged '%s' from " + self.url + '\n'
        for words, answers, code, left, said in (
                ('-r X Y', [b'\x03'], 130, ['X', 'Y'], 'etc: interrupted'), ('-r -f X', [], 0, ['Y'], purged % 'X'),
                ('-r Nope X Y', [b'n\n', b'y\n'], 1, ['X'], purged % 'Y'), ('-r y', [], 1, ['X', 'Y'], "did you mean 'Y'?")):
            with self.subTest(words):
                *found, shown = self.purge(*words.split(), answers=answers)
                self.assertEqual((found, said in shown), ([code, left], True), shown)

    def test_another_push_before_the_answer(self):
        newer = {'X.tgz': 'newer'}
        code, _, shown = self.purge('-r', 'X', answers=[b'y\n'], meanwhile=lambda: write('share', newer))
        self.assertEqual((code, Path('share/X.tgz').read_text()), (1, 'newer'))
        self.assertIn("etc: 'X' in %s was replaced meanwhile; look again: " % self.url, shown)

    def test_only_one_end_is_a_terminal(self):
        with open('err', 'w+') as err:
            for streams in ({'stdin': subprocess.DEVNULL}, {'stderr': err}):
                with self.subTest(streams):
                    code, left, shown = self.purge('-r', 'X', **streams)
                    self.assertEqual((code, left), (2, ['X', 'Y']))
                    err.seek(0)
                    self.assertIn("etc: without a terminal to ask on, 'etc purge -r' needs -f;", shown + err.read())


class Mistakes(Shell, Case):
    """What people mistype or mistake, and the one line that each prints."""

    # HERE is the current directory, SHARE the url, and ... "'etc COMMAND -h' shows how", after wrong usage
    LINES = """
        pul MNIST              no command 'pul'; did you mean 'pull'? 'etc -h' shows how
        frobnicate             no command 'frobnicate'; 'etc -h' shows how
        pull                   'etc pull' needs NAME; ...
        create                 'etc create' needs NAME; ...
        pull MNIST --forse     'etc pull' takes no '--forse'; did you mean '--force'? ...
        info MNIST X           'etc info' takes no 'X'; ...
        diff MNIST             diff takes two names, and '-r' before one that is remote; ...
        diff MNIST -r          argument -r/--remote: expected 1 argument; ...
        register a b c         register takes DIR, DIR NAME or DIR as NAME; ...
        purge -r MNIST         without a terminal to ask on, 'etc purge -r' needs -f; ...
        ls -l MNITS            no dataset here matches 'MNITS'; did you mean 'MNIST'?
        ls -r mnist x*         no dataset in SHARE matches 'mnist' or 'x*'; did you mean 'MNIST'?
        ls -r s3://bucket/     no dataset in SHARE matches 's3://bucket/'; use --url for a URL
        pull MNITS             no dataset 'MNITS' in SHARE; did you mean 'MNIST'?
        pull mnist             no dataset 'mnist' in SHARE; did you mean 'MNIST'?
        pull MNIST.tgz         no dataset 'MNIST.tgz' in SHARE; did you mean 'MNIST'?
        pull Flowers           no dataset 'Flowers' in SHARE; 'etc ls -r' lists what is there
        pull Partly -p trian   no partition 'trian' in Partly; it has: test, train; did you mean 'train'?
        pull s3://bucket/X     's3://bucket/X' cannot be a dataset's name: it takes at most 128 letters, digits, '.', '_' and \
'-', the first a letter or digit; use --url for a URL
        pull MNIST@sha256:abc  'MNIST@sha256:abc' is not NAME@sha256:... with 64 hexadecimal digits
        push Other             another 'Other' is in SHARE already; push it under another name, or 'etc push -f Other' replaces it
        pull Other             another 'Other' is installed already; 'etc pull -f Other' replaces it
        register MNIST ./digits  no directory HERE/MNIST; the directory comes first: 'etc register ./digits MNIST'
        register ./digits/data as X  HERE/digits/data is no dataset: it needs a directory 'data' with a directory for each \
partition; HERE/digits is one
        register ./images X    HERE/images is no dataset: it needs a directory 'data' with a directory for each partition
        register digits.tgz    HERE/digits.tgz is a file, not a directory; unpack it first
        register ./my~data     'my~data' cannot be a dataset's name: it takes at most 128 letters, digits, '.', '_' and '-', \
the first a letter or digit
        register ./my~data MNIST  another 'MNIST' is installed already; choose another name, or -f (force) to replace it
        push Flowers           no local dataset 'Flowers'; 'etc register DIR Flowers' gives a directory that name
        purge Flowers          no local dataset 'Flowers'; 'etc ls' lists what there is
        purge -r -f MNITS      no dataset 'MNITS' in SHARE; did you mean 'MNIST'?
        verify Flowers         no local dataset 'Flowers'; 'etc pull Flowers' would fetch it
        info mine              no local dataset 'mine'; did you mean 'Mine'?
        --url bucket ls -r     cannot use the url; it must start with file:// or s3:// or gs:// or https:// or http://
        --url file://x ls -r   the url is no absolute path; write file:///path, with three slashes
        --url file://HERE/no ls -r  no directory HERE/no; check the url, or make it with the first push
        --config typo.yaml ls  HERE/typo.yaml:2: unknown setting 'ulr'; did you mean 'url'?
        --config toml.yaml ls  HERE/toml.yaml:1: not of the form 'key: value' (lists, nesting and indentation are not supported)
        --config no.yaml ls    no settings file HERE/no.yaml; create it, or drop --config and $ETC_CONFIG
        """

    def test_each_gets_its_line(self):
        write('.', {'digits/data/train/1': 'one', 'digits/data/test/2': 'two', 'images/1.png': 'png', 'digits.tgz': 'x',
                         'my~data/data/train/x': 'x', 'typo.yaml': '# mine\nulr: s3://bucket\n', 'toml.yaml': 'url = "s3://b"\n'})
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
                said = self.etc(words, status=2 if line.endswith(('; ...', '? ...', 'shows how')) else 1)
                self.assertEqual(said, ('', 'etc: %s\n' % re.sub(r'(?<=[;?] )\.\.\.\Z', how, line)))
        self.fails_with('n: cannot be read: ' if os.name == 'posix' else 'etc: ', '--config', 'n' * 300, 'ls')
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(etc.main(['pull', 'MNIST']), 1)
        self.assertIn('etc: no url; set where datasets are shared', err.getvalue())

    def test_help(self):
        """Each example can be typed as it is; without a command, all are shown."""
        os.environ['COLUMNS'] = '82'  # argparse leaves two of them empty
        with contextlib.redirect_stderr(io.StringIO()) as overview:
            self.assertEqual(etc.main([]), 2)
        for command in ('ls', 'info', 'diff', 'pull', 'push', 'register', 'create', 'verify', 'purge'):
            with self.subTest(command):
                self.assertRegex(self.etc('-h')[0], r'(?m)^    %s +\w' % command)
                with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit):
                    etc.main(['help', command])
                shown = self.etc(command, '-h')[0]
                self.assertEqual(out.getvalue(), shown)
                examples = re.findall(r'^  .*?etc (\w+(?: [^\s)]+)*)', shown.partition('examples:')[2], re.M)
                self.assertIn('etc ' + examples[0], overview.getvalue())
                for example in examples:
                    self.etc(example.split(' | ')[0], '-f' * (command == 'purge'), status=None)  # which is not 2, as after wrong usage


class People(Shell, Case):
    def test_lists(self):
        root = small('ds').resolve()
        self.etc('register', root, 'Registered')
        self.etc('register --copy', root, 'C')
        self.assertEqual(self.etc('ls -l')[0].splitlines(), [
            'C           5.04 kB  6  just now  ' + etc.Dataset(root).digest, 'Registered        -  -  -         ' + root.as_uri()])
        self.etc('push C')
        both = {'digest', 'files', 'name', 'partitions', 'size', 'when'}
        for flags, more in (([], {'partial', 'root', 'source'}), (['-r'], {'archive_size', 'meta', 'readme'})):
            for item in json.loads(self.etc('ls --json', *flags)[0]):
                self.assertEqual(set(item), both | more)
        three_days_ago = time.time() - 3 * 86400 - 60
        os.utime('share/C.tgz', (three_days_ago, three_days_ago))
        self.assertIn('  3 days ago  ', self.etc('ls -l -r')[0])

    def test_patterns(self):
        for name in ('MNIST', 'MNIST-small', 'svhn', 'CIFAR'):
            self.etc('create', name)
        for patterns, names in (('MNIST*', 'MNIST MNIST-small'), ('*-small [a-z]*', 'MNIST-small svhn'), ('M', ''),
                                ('????? svhn', 'CIFAR MNIST svhn'), ('[!M]*', 'CIFAR svhn'), ('', ''), ('mnist [z-a] [', '')):
            with self.subTest(patterns):
                patterns, names = patterns.split(), names.split()
                self.assertEqual(etc.ls(patterns=patterns, config=self.config()), names)
                if names:
                    self.assertEqual(self.etc('ls', *patterns)[0].split(), names)
                    listed = json.loads(self.etc('ls', *patterns[:1], '--json', *patterns[1:])[0])
                    self.assertEqual([item['name'] for item in listed], names)
                    self.assertEqual(re.findall(r'(?m)^\S+', self.etc('ls -l', *patterns)[0]), names)
        with self.assertRaisesRegex(etc.ConfigError, "'patterns' must be a list"):
            etc.ls(patterns='MNIST*', config=self.config())
        said = self.etc('ls svhn nope*', status=1)  # what matches is shown
        self.assertEqual(said, ('svhn\n', "etc: no dataset here matches 'nope*'\n"))
        self.assertEqual(self.etc('ls --json [', status=1)[0], '[]\n')

    def test_info(self):
        readme = ''.join('%d\n' % n for n in range(50))
        root = write('ds', {'data/train/x': 'x' * 1500, 'data/test/y': '', 'README.md': readme})
        self.etc('register --copy', root, 'X')
        shown = self.etc('info X')[0]
        for line in ('name        X', 'digest      ' + etc.Dataset(root).digest, 'size        1.64 kB in 3 files',
                     'partitions  test: 0 B in 1 file\n            train: 1.5 kB in 1 file\n\n0\n1\n2'):
            self.assertIn('\n%s\n' % line, '\n' + shown)
        self.assertTrue(shown.endswith('\n18\n19\n... (30 more lines of README.md)\n'))


class Diff(Shell, Case):
    """Of local datasets; RemoteSuite compares remote ones."""

    def setUp(self):
        super().setUp()
        files = {'data/train/x': 'x', 'data/test/y': 'y', 'README.md': 'r', 'assets/a': 'a'}
        self.a = write('A', dict(files, **{'+/p': 'p'}))
        self.b = write('B', {'data/val/v': '', 'more/m': 'm', 'data/train/x': 'other', 'README.md': 'r', 'assets/a': 'a'})
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
            'same     1 B in 1 file  1 B in 1 file  .\n'
            'gone     1 B in 1 file  -              +\n'
            'same     1 B in 1 file  1 B in 1 file  assets\n'
            'new      -              1 B in 1 file  more\n'
            'gone     1 B in 1 file  -              data/test\n'
            'differs  1 B in 1 file  5 B in 1 file  data/train\n'
            'new      -              0 B in 1 file  data/val\n', ''))
        found, one = etc.diff('A', 'B', config=self.config()), {'files': 1, 'size': 1}
        self.assertEqual(found, json.loads(self.etc('diff A B --json', status=1)[0]))
        self.assertEqual(found['a'], {'name': 'A', 'remote': False, 'digest': etc.Dataset(self.a).digest})
        self.assertEqual(found['segments']['assets'], {'status': 'same', 'a': one, 'b': one})
        self.assertEqual(found['segments']['+'], {'status': 'gone', 'a': one, 'b': None})
        self.assertEqual(set(self.statuses('A', 'A').values()), {'same'})

    def test_how_names_are_typed(self):
        """In which order, and before or after flags, on every version of argparse; what is remote has a * here."""
        for case in """
                A B|A B; B A|B A; A -r B|A B*; -r A B|A* B; -r A -r B|A* B*; -r B -r A|B* A*; --remote=A B|A* B; B -rA|B A*;
                A -v B|A B; -v A B|A B; A -v -r B|A B*; -r A -v B|A* B; -v -r A -v -r B -v|A* B*; B -r B|B B*; -- A B|A B;
                -r A -- B|A* B""".split(';'):
            words, sides = case.strip().split('|')
            with self.subTest(words):
                found = json.loads(self.etc('diff --json', words, status=None)[0])
                self.assertEqual([found[side]['name'] + '*' * found[side]['remote'] for side in 'ab'], sides.split())
        for words in ('A', '-r A', 'A B B', 'A -r B B', '-r A -r B -r B', ''):
            with self.subTest(words):
                self.assertIn('diff takes two names', self.etc('diff', words, status=2)[1])

    def test_status_alone(self):
        for words, status, said in (('A B', 1, ''), ('A B --json', 1, ''), ('A A', 0, ''), ('A A --json', 0, ''),
                                    ('A C', 1, "etc: no local dataset 'C'; ")):
            with self.subTest(words):
                out, err = self.etc('-q diff', words, status=status)
                self.assertEqual((out, err[:27]), ('', said))

    def test_pins(self):
        digest, other = etc.Dataset(self.a).digest, etc.Dataset(self.b).digest
        self.etc('diff', 'A@' + digest, 'A')
        self.assertEqual(self.statuses('A@' + digest, 'B@' + other)['data/train'], 'differs')
        for words in ('A@%s B', 'B A@%s', '-r A@%s A', 'A -r A@%s', 'A A@%s'):
            with self.subTest(words):
                said = self.etc('diff', words % other, status=1)
                self.assertEqual(said, ('', "etc: 'A': expected digest %s, found %s\n" % (other, digest)))

    def test_partial(self):
        """What is not here counts, too, as the receipt knows it."""
        self.etc('pull -p test A', home='two')
        self.etc('register', self.a, 'Y', home='two')
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
            self.assertIn("no dataset 'Z'", self.etc('diff A -r Z', status=1)[1], 'before anything is read')

    @POSIX
    def test_heading(self):
        code, shown = on_terminal('--url', self.url, '--home', 'home', 'diff', 'A', '-r', 'A')
        self.assertRegex(shown, r'\rSTATUS  A +-r A +PATH\n')


def paths_of(ds):
    """What a worker process does with a dataset."""
    return sorted(str(path) for partition in ds.values() for path in partition.iterdir()), ds.digest, ds.name


class Python(Shell, Case):
    def test_copies(self):
        import copy
        import pickle
        ds = etc.register(small('ds'), 'X', config=self.config())
        digest = ds.digest
        copies = [copy.copy(ds), copy.deepcopy(ds)] + [pickle.loads(pickle.dumps(ds, protocol)) for protocol in range(5)]
        write('ds', {'data/train/a.txt': 'of which they know nothing'})
        for other in copies:
            self.assertEqual((other, other.name, other.root, other.digest), (ds, 'X', ds.root, digest))
            self.assertEqual(repr(other), '<Dataset X: test, train>')
        for error in (etc.RemoteError('gone', status=404), etc.UnknownPartition('no')):
            other = pickle.loads(pickle.dumps(error))
            self.assertEqual((type(other), str(other), vars(other)), (type(error), str(error), vars(error)))

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


class Refusals(Shell, Case):
    """Whatever goes wrong is an etc.Error in one line; what is no user's fault comes out as it is."""

    def run_(self, program, number, words, home='home', **kwargs):
        """Run a program of a test; its exit status, and what it prints."""
        return run_python('import etcetera as etc\n' + program + 'sys.exit(etc.main(sys.argv[2:]))', number, '--url', self.url,
                          '--home', home, *words.split(), **kwargs)

    def test_no_ssl(self):
        os.environ.update(AWS_ACCESS_KEY_ID='a', AWS_SECRET_ACCESS_KEY='b', NO_GCE_CHECK='true')
        said = 'etc: this Python has no ssl module, so it cannot use https://; use another Python, or a url that needs none\n'
        for url in 'https://127.0.0.1:1/x', 's3://bucket', 'gs://bucket':
            with self.subTest(url):
                self.assertEqual(self.run_('sys.modules["ssl"] = None\n', 0, 'ls -r --url ' + url), (1, said))

    @unittest.skipUnless(sys.platform == 'linux', 'no /proc here')
    def test_few_threads(self):
        """Fewer are used where the system gives no more, and none while the interpreter ends."""
        self.etc('register', odd(Path('ds'), 30), 'X')
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
        for limit, settings in ((5, ''), (3, ''), (2, ' --config one.yaml')):
            for home, words in (('home', 'push -f X'), ('two', 'pull X'), ('two', 'verify X'), ('two', 'purge X')):
                with self.subTest(words, limit=limit):
                    code, out = self.run_(program, limit, words + settings, home)
                    self.assertEqual(code, 0, out)
        code, out = self.run_(program, 0, 'push -f X')
        self.assertRegex(out, r'\Aetc: pushed X .*\n\Z' if code == 0 else
                         r"\Aetc: the system does not allow this process any more threads; set 'connections: 1', or .*\n\Z")

    @POSIX
    def test_interrupted_while_threads_start(self):
        self.etc('register', odd(Path('ds'), 30), 'X')
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
                self.assertEqual((code, out[:16], out.count('\n')), (130, 'etc: interrupted', 1))

    @unittest.skipUnless(sys.platform == 'linux' and hasattr(sys, 'getrefcount'), 'no such limit on memory here')
    def test_little_memory(self):
        """As with ulimit -v: the command succeeds, or says what to do."""
        self.share(write('ds', {'data/train/x': noise(30 * MIB)}))
        program = r"""
import resource
now = int(re.search(r'VmSize:\s+(\d+)', open('/proc/self/status').read()).group(1)) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
"""
        outcomes = set()
        for room in (1, 12, 24, 40, 70, 150, 1500):
            with self.subTest(room), contextlib.suppress(subprocess.TimeoutExpired):
                # CPython may wait for ever for a thread whose start failed for want of memory
                code, out = self.run_(program, room, 'pull X', 'home%d' % room, timeout=60)
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

        self.share(small('ds'))
        later, server = 2524608000, Server(S3Handler)
        self.addCleanup(server.stop)
        try:
            os.utime('share/X.tgz', (later, later))
        except OverflowError:
            self.skipTest('this system cannot set such times')
        for name, function in (('gmtime', narrow(time.gmtime)), ('localtime', narrow(time.localtime)), ('time', time.time)):
            self.addCleanup(setattr, etc.time, name, getattr(time, name))
            setattr(etc.time, name, function)
        self.assertIn('2050-01-01T00:00:00Z', self.etc('info -r X')[0])
        self.assertIn('just now', self.etc('ls -r -l')[0])
        etc.time.time = lambda: later + 0.5
        self.etc('pull X', home='two')
        self.assertIn('2050-01-01T00:00:00Z', self.etc('info X', home='two')[0])
        server.respell = lambda name, value: 'Sat, 01 Jan 2050 00:00:00 GMT' if name == 'Date' else value
        self.settings = {'endpoint_url': server.url, 'aws_access_key_id': AKID, 'aws_secret_access_key': SECRET}
        self.assertEqual(self.etc('ls -r', url='s3://bucket'), ('', ''))
        self.assertEqual(server.log[-1][2]['x-amz-date'], '20500101T000000Z')

    def test_addresses_that_nothing_can_have(self):
        os.environ.update(NO_GCE_CHECK='true')
        for said, cases in (
                ('has an invalid host name; check the url', 'https://data..example.org|http://%s.example|s3://bucket https://d..e'
                 '|gs://bucket https://d..e' % ('x' * 70)),
                ('the form https://host', 'http://[::::]/|http://127.0.0.1:65536|http://127.0.0.1:0'
                 '|s3://bucket http://127.0.0.1:99999|gs://bucket http://[1:::]')):
            for case in cases.split('|'):
                with self.subTest(case):
                    url, *endpoint = case.split()
                    self.settings = dict(zip(['endpoint_url'], endpoint))
                    self.fails_with(said, 'ls -r', url=url)
        os.environ.update(http_proxy='http://proxy..example:9', no_proxy='')
        self.settings = {}
        self.fails_with('has an invalid host name', 'ls -r', url='http://data.example.org')

    def test_paths_that_no_file_can_have(self):
        for function, args in ((etc.register, ['a\0b', 'X']), (etc.Dataset, ['a\0b']), (etc.Config.load, ['a\0b']),
                               (etc.ls, [True, self.config(url='file:///a%00b')])):
            with self.subTest(function), self.assertRaisesRegex(etc.Error, 'a path cannot contain a NUL'):
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


class Program(Shell, Case):
    def run_(self, *command, **kwargs):
        """What a command prints; it must succeed, and say nothing else."""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, **kwargs)
        self.assertEqual((done.returncode, done.stderr), (0, ''), command)
        return done.stdout

    def test_ways_to_start(self):
        etc.create('X', config=etc.Config(home='.etc'))
        shutil.copy(SCRIPT, write('vendored', {'__init__.py': ''}))
        for words, cwd in (([SCRIPT], self.tmp), (['-m', 'etcetera'], HERE), (['-m', 'vendored.etcetera'], self.tmp)):
            self.assertEqual(self.run_(sys.executable, *words, 'ls', cwd=str(cwd)), 'X\n')
        with open(SCRIPT, 'rb') as script:
            self.assertEqual(self.run_(sys.executable, '-', 'ls', stdin=script), 'X\n')
        code = 'import pickle, vendored.etcetera as e; print(pickle.loads(pickle.dumps(e.dataset("X")))["train"].name)'
        self.assertEqual(self.run_(sys.executable, '-c', code), 'train\n')

    def test_pipes(self):
        write('.', {'.etc/D%04d' % number: None for number in range(3000)})
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

    @unittest.skipUnless(sys.platform.startswith('linux'), 'as Linux measures it')
    def test_memory_is_flat(self):
        """With many files, which take one walk, in flat directories, and with large ones."""
        write('outside', {'%04d' % number: '' for number in range(1000)})
        write('Many', {'data/train/%03d' % number: ('->', str(self.tmp / 'outside')) for number in range(150)})
        flat = write('Flat', {'data/train': None}) / 'data/train'
        for number in range(60000):
            os.close(os.open('%s/%06d' % (flat, number), os.O_CREAT))
        write('Large', {'data/train/zeros': ''})
        os.truncate('Large/data/train/zeros', 300 * MIB)
        extra = 100 if sys.implementation.name == 'pypy' else 0
        for name in 'Many', 'Flat', 'Large':
            self.etc('register', name)
        for home, words, limit in (('home', 'push Many', 56), ('home', 'verify Flat', 56), ('home', 'push Large', 200),
                                   ('two', 'pull Large', 200)):
            with self.subTest(words):
                code, out = run_python(self.MEMORY, '--url', self.url, '--home', home, *words.split())
                self.assertEqual(code, 0, out)
                walks, peak = map(int, out.split())
                self.assertTrue(walks < 2 and peak < limit + extra, out)  # MiB, with the interpreter itself

    def test_import_is_light(self):
        """And no library of a cloud is loaded for what needs none."""
        heavy = {'ssl', 'urllib.request', 'http.client', 'xml.etree.ElementTree', 'concurrent.futures', 'argparse', 'tarfile',
                 'logging', 'socket', 'email', 'configparser', 'ctypes'}
        write('.', {'share': None})
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
        root = odd(Path('ds'), 3)
        os.environ.update(LC_ALL='C', LANG='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
        run = [sys.executable, '-W', 'error'] + ['-X', 'dev'] * (sys.version_info >= (3, 7)) + [SCRIPT, '-q', '--url', self.url]
        for words in ('register ds X', 'push X', '--home two pull X', '--home two pull -f X', '--home two verify X',
                      'info -r X'):
            with self.subTest(words):
                self.run_(*run + words.split())
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
# Fuzzing: python3 test_etcetera.py fuzz [SECONDS] [TARGET]
# ---------------------------------------------------------------------------------------

class Target:
    """Something that reads what others wrote. Called with bytes, it lets nothing out but an error of etcetera's."""

    seeds = ()  # type: tuple

    def __init__(self, place):
        self.place = Path(str(place))
        self.here = self.place / 'here'  # all that a target may write is below

    def __call__(self, data):
        with contextlib.suppress(etc.Error):
            self.read(data)

    def reply(self, body, headers=(), status=200):
        message = http.client.HTTPMessage()
        for key, value in dict(headers).items():
            with contextlib.suppress(ValueError):  # names that newer Pythons refuse, as http.client would before
                message[key] = value
        return etc._Reply(status, message, body)


class ArchiveTarget(Target):
    """Pulls. The first byte says what the rest is: an archive, a segment for a right index, an index for right segments."""

    TOP = header('data/', b'5', 0o755, 0, '')
    TRAIN = header('data/train/', b'5', 0o755, 0, '')
    FILES = (TRAIN + header('data/train/a', b'0', 0o644, 5, '') + b'alpha'.ljust(512, b'\0')
             + header('data/train/b/', b'5', 0o755, 0, '') + header('data/train/b/' + 'n' * 120, b'0', 0o755, 0, '')
             + header('data/train/l', b'2', 0o644, 0, 'b/\u00e9') + header('data/train/m', b'0', 0o644, 3, '') + b'abc'.ljust(512, b'\0'))

    def __init__(self, place):
        super().__init__(place)
        write(self.here / 'share', {'.': None})
        self.config = etc.Config((self.here / 'share').as_uri(), self.here / 'home', connections=1)
        whole = self.indexed(self.FILES)
        text = b''.join(re.findall(rb'\{"etcetera".*\}', whole))
        self.seeds = [b'\0' + whole, b'\0' + self.indexed(self.TRAIN), b'\1' + self.FILES, b'\1' + self.TRAIN, b'\2' + text]
        for name in ('../x', '/x', 'data/train/../../../x', 'data/train/' + 'd/' * 300):
            self.seeds.append(b'\1' + self.TRAIN + header(name, b'0', 0o644, 0, ''))
        self.blocks = whole[:whole.index(member(b'ei', text)[:14])]

    def indexed(self, payload):
        files, sizes, blocks, segments = 0, 0, b'', []
        with contextlib.suppress(Exception):
            with tarfile.open(fileobj=io.BytesIO(payload + bytes(1024)), mode='r:') as tar:
                for member in tar:
                    files += not member.isdir()
                    sizes += member.size if member.isreg() else 0
        for path, data in (('.', self.TOP), ('data/train', payload)):
            parts = [data[at:at + MIB] for at in range(0, len(data), MIB)] or [b'']
            coded = b''.join(block(part) for part in parts)
            digest = hashlib.sha256(b''.join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
            own = path != '.'
            segments.append(segment(path, len(blocks), len(coded), files * own, sizes * own, 'sha256:' + digest))
            blocks += coded
        blocks += block(bytes(1024))
        return blocks + index_of(segments, len(blocks))

    def read(self, data):
        kind, data = data[:1], data[1:]
        if kind == b'\1':
            data = self.indexed(data)
        elif kind == b'\2':
            steps = [data[at:at + 8000] for at in range(0, len(data), 8000)]
            data = self.blocks + b''.join(member(b'ei', step) + EMPTY for step in steps) \
                + member(b'ef', struct.pack('<Q', len(self.blocks))) + EMPTY
        self.pull(data)

    def pull(self, archive):
        write(self.here / 'share', {'X.tgz': archive})
        try:
            with contextlib.suppress(etc.Error):
                etc.info('X', remote=True, config=self.config)
            digest = etc.pull('X', force=True, config=self.config).digest
            assert etc.verify('X', config=self.config) == digest
            assert etc.Dataset(self.here / 'home/X').digest == digest
        finally:
            left = [p for p in self.place.iterdir() if p.name != 'here'] + [
                p for p in self.here.iterdir() if p.name not in ('share', 'home')] + [
                p for p in (self.here / 'home').glob('*') if p.name not in ('X', '.etcetera')] + [
                p for p in (self.here / 'home/.etcetera/staging').glob('*')]
            assert not left, left


class TgzTarget(ArchiveTarget):
    """Pulls of what other tools packed; the first byte says whether the rest is compressed."""

    def __init__(self, place):
        super().__init__(place)
        self.seeds = []
        for kind, evil in ((tarfile.USTAR_FORMAT, ()), (tarfile.GNU_FORMAT, ()), (tarfile.PAX_FORMAT, ()),
                           (tarfile.GNU_FORMAT, (('../x', b'0', '', b'x'),)), (tarfile.PAX_FORMAT, (('data/x/../../../x', b'0', '', b'x'),)),
                           (tarfile.USTAR_FORMAT, (('data/train/up', b'2', '../../..', b''), ('data/train/up/x', b'0', '', b'x')))):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode='w', format=kind) as tar:
                for name, type_, link, data in (('./', b'5', '', b''), ('./data/train/a', b'0', '', b'alpha'),
                                                ('data/train/%s/%s' % ('n' * 60, 'm' * 60), b'0', '', b''), ('data/train/s', b'2', 'a', b''),
                                                ('data/train/h', b'1', 'data/train/a', b''), ('meta.json', b'0', '', b'{}'),
                                                ('data/train/\u00e9', b'0', '', b'x')) + evil:
                    info = tarfile.TarInfo(name)
                    info.type, info.linkname, info.size, info.mode = type_, link, len(data), 0o755 if type_ == b'5' else 0o644
                    if kind == tarfile.PAX_FORMAT:
                        info.pax_headers = {'mtime': '1.5', 'comment': 'c'}
                    tar.addfile(info, io.BytesIO(data))
            tar = out.getvalue().rstrip(b'\0')
            tar += bytes(-len(tar) % 512 + 1024)
            self.seeds += [b'\1' + tar, b'\0' + self.gzip(tar)]
        # a sparse file as old GNU tar writes it
        sparse = bytearray(tarfile.TarInfo('data/train/sparse').tobuf(tarfile.GNU_FORMAT))
        sparse[156:157], sparse[124:136] = b'S', b'00000001000\0'
        sparse[386:410], sparse[483:495] = b'00000010000\0' + b'00000001000\0', b'00000020000\0'
        sparse[148:156] = b' ' * 8
        sparse[148:156] = b'%06o\0 ' % sum(sparse)
        self.seeds.append(b'\1' + bytes(sparse) + b'z' * 512 + bytes(1024))

    def gzip(self, data):
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)
        return packer.compress(data) + packer.flush()

    def read(self, data):
        self.pull(data[1:] if data[:1] == b'\0' else self.gzip(self.mended(data[1:])))

    def mended(self, tar):
        """With right checksums wherever a header may be, or few would be looked at."""
        tar = bytearray(tar)
        for at in range(0, len(tar) - 511, 512):
            if tar[at + 257:at + 262] == b'ustar':
                tar[at + 148:at + 156] = b' ' * 8
                tar[at + 148:at + 156] = b'%06o\0 ' % sum(tar[at:at + 512])
        return bytes(tar)


class IndexTarget(Target):
    """An index by itself: members, footer and where it starts."""

    def __init__(self, place):
        super().__init__(place)
        segments = [segment(path, at, 1, 1, 5, 'sha256:' + '1' * 64) for at, path in enumerate(['.', 'assets', 'data/train'])]
        self.seeds = [index_of(segments, 77), index_of(segments * 99, 77), member(b'ef', bytes(8)) + EMPTY]

    def read(self, data):
        etc._find_index(data, 77 + len(data))
        etc._parse_index(data, 77)


class YamlTarget(Target):
    """The YAML subset: what it accepts means the same to PyYAML."""

    seeds = [b'url: s3://bucket/x # c\npublic: yes\nconnections: 0x10\n', b'---\nhome: "~/\\u00e9\\n"\nregion: \'it\'\'s\'\nurl: ~\n',
             b'a: 1_000\nb: 0b1\nc: 017\nd: .5\ne: 2001-01-01\nf: 1:30\n', b'\xef\xbb\xbf"k": v\r\nk2: - x\n']

    def __call__(self, data):
        try:
            text = data.decode('utf-8')
            found = parse_yaml(text)
        except ValueError:
            return
        if importable('yaml'):
            import yaml
            expected = yaml.load(text, getattr(yaml, 'CSafeLoader', yaml.SafeLoader)) or {}
            assert found == expected and [type(v) for v in found.values()] == [type(v) for v in expected.values()], (found, expected)


class XmlTarget(Target):
    """S3's listings and errors."""

    seeds = [b'<?xml version="1.0"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><EncodingType>url</EncodingType>'
             b'<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken><Contents><Key>some/prefix/X+%41.tgz</Key>'
             b'<LastModified>2024-05-06T07:08:09.000Z</LastModified><ETag>&quot;e&quot;</ETag><Size>123</Size></Contents></ListBucketResult>',
             b'<Error><Code>SlowDown</Code><Message>about<![CDATA[ <it> ]]>\x1b[31m</Message></Error>',
             b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]><ListBucketResult>&a;</ListBucketResult>', b'<a>' * 30 + b'</a>' * 30]

    def __init__(self, place):
        super().__init__(place)
        os.environ.update(HOME=str(place), AWS_EC2_METADATA_DISABLED='true')
        self.config = etc.Config('s3://bucket/some/prefix', endpoint_url='http://127.0.0.1:1', aws_access_key_id='a', aws_secret_access_key='b')

    def read(self, data):
        for status in (200, 403):
            with contextlib.suppress(etc.Error), contextlib.closing(etc._open_remote(self.config)) as store:
                store.http.request = lambda *args, **kwargs: self.reply(data, {}, status)
                for item in store.list():
                    assert etc._is_name(item.name) and type(item.size) is int, item
        assert str(store.error(self.reply(data, {}, 400), etc._S3Request('GET'))).isprintable()


class HeadersTarget(XmlTarget):
    """What S3 says of an object in the headers of its answer."""

    seeds = [b'200\nETag: "x"\nContent-Length: 5\nLast-Modified: Mon, 06 May 2024 07:08:09 GMT\nContent-Range: bytes 0-4/5\n',
             b'206\nETag: W/"x"\nContent-Length: 7\nLast-Modified: Mon, 06 May 2024 07:08:09 -0000\nContent-Range: bytes */5\n',
             b'404\nx-amz-bucket-region: eu-west-1\nETag: bare\n']

    def read(self, data):
        lines = data.decode('latin-1').splitlines() or ['']
        headers = {k.strip(): v.strip() for k, _, v in (line.partition(':') for line in lines[1:]) if k.strip()}
        status = int(lines[0]) if re.match(r'[2-5]\d\d\Z', lines[0], re.ASCII) else 200
        with contextlib.closing(etc._open_remote(self.config)) as store:
            store.http.request = lambda *args, **kwargs: self.reply(b'12345', headers, status)
            found = store.stat('X')
            if found:
                time.gmtime(found.modified)
                assert store.read(found, 0, 5) == b'12345'


class JsonTarget(Target):
    """Google's listings, objects, errors and tokens."""

    seeds = [b'{"kind": "storage#objects", "items": [{"name": "some/prefix/X.tgz", "size": "5", "generation": "17", '
             b'"updated": "2024-05-06T07:08:09.123Z"}], "nextPageToken": "t"}',
             b'{"name": "some/prefix/X.tgz", "size": 5, "generation": 17}', b'{"error": {"code": 403, "message": "\\u001b[31m no"}}',
             b'{"access_token": "t", "expires_in": 3599}', b'{"accessToken": "t", "expireTime": "2024-05-06T07:08:09Z"}']

    def __init__(self, place):
        super().__init__(place)
        self.config = etc.Config('gs://bucket/some/prefix', endpoint_url='http://127.0.0.1:1')

    def read(self, data):
        with contextlib.closing(etc._open_remote(self.config)) as store:
            store.http.request = lambda *args, **kwargs: self.reply(data)
            assert str(store.error(self.reply(data, {}, 403), True)).isprintable()
            with contextlib.suppress(etc.Error):
                found = store.stat('X')
                assert found is None or (found.name, type(found.size)) == ('X', int), found
            with contextlib.suppress(etc.Error):
                for item in store.list():
                    assert etc._is_name(item.name), item
            for info in ({'type': 'authorized_user', 'client_id': 'i', 'client_secret': 's', 'refresh_token': 'r'},
                         {'type': 'impersonated_service_account', 'service_account_impersonation_url': 'http://127.0.0.1:1/', 'source_credentials': {
                             'type': 'authorized_user', 'client_id': 'i', 'client_secret': 's', 'refresh_token': 'r'}}):
                with contextlib.suppress(etc.Error):
                    etc._GoogleCredentials(self.config, store.http).token(info, 'scope')


class HtmlTarget(Target):
    """Indexes of web servers."""

    seeds = [b'<html><body><pre><a href="X.tgz">X</a> <A HREF=/x/Y.tgz><a href="../Z.tgz"><a href="http://h/x/W%2etgz?q#f">',
             b'<!-- <a href="V.tgz">',
             b'<![CDATA[ <a href="X.tgz"> ]]><script><a href="X.tgz"></script><?x ?><a href="&#88;.tgz" href>', b'<a href="http://[x/X.tgz">' * 3]

    def read(self, data):
        for name in etc._linked_names('http://h/x/', data):
            assert etc._is_name(name), name


class AwsTarget(Target):
    """Settings and credentials files of AWS."""

    seeds = [b'[default]\naws_access_key_id = a\naws_secret_access_key=b\nregion=eu-west-1\ns3 =\n  addressing_style = path\n',
             b'# c\n[profile work]\nregion: x ; c\nendpoint_url = http://h:1/\nca_bundle = x\n[default]\naws_session_token=t\n']

    def __init__(self, place):
        super().__init__(place)
        os.environ.update(HOME=str(place), AWS_EC2_METADATA_DISABLED='true')
        write(self.here, {'.': None})
        for variable in ('AWS_CONFIG_FILE', 'AWS_SHARED_CREDENTIALS_FILE'):
            os.environ[variable] = str(self.here / 'settings')

    def read(self, data):
        (self.here / 'settings').write_bytes(data)
        for profile in (None, 'work'):
            with contextlib.suppress(etc.Error):
                etc._open_remote(etc.Config('s3://bucket', aws_profile=profile)).close()


TARGETS = {'archive': ArchiveTarget, 'tgz': TgzTarget, 'index': IndexTarget, 'yaml': YamlTarget, 'xml': XmlTarget, 'headers': HeadersTarget,
           'json': JsonTarget, 'html': HtmlTarget, 'aws': AwsTarget}


def mutated(rng, seeds):
    """One of the seeds with some changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 2, 3, 5, 9])):
        at = rng.randrange(len(data) + 1)
        stop = min(len(data), at + rng.choice([1, 1, 2, 4, 8, 64, 512]))
        kind = rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:stop] = bytes(rng.choice([0, 1, 10, 32, 34, 39, 45, 46, 47, 48, 55, 58, 92, 127, 128, 255]) for _ in range(at, stop))
        elif kind == 2:
            del data[at:stop]
        elif kind == 3:
            data[at:at] = data[at:stop] * rng.choice([1, 1, 2, 9])
        elif kind == 4:
            data[at:at] = noise(rng.randrange(1, 9), rng.random())
        elif kind == 5:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at:stop] = other[start:start + stop - at]
        elif kind == 6:
            numbers = list(re.finditer(rb'[0-9]+', bytes(data)))
            if numbers:
                match = rng.choice(numbers)
                data[match.start():match.end()] = rng.choice([b'0', b'-1', b'1', b'9' * 25, b'77777777777', b'4294967296', b'1e999', b'8'])
        else:
            data[at:at] = rng.choice([b'../', b'/', b'\0', b'\n', b'null', b'[' * 99, b'"', b'\xff', b'\xc3\xa9', b'<!', b'&#0;', b': ', b'%00'])
    return bytes(data)


def fuzz(seconds=60.0, target=None):
    """Feed a target, or each in turn, with ever new inputs; guided by coverage where atheris can be imported."""
    if target is None:
        return max(subprocess.call([sys.executable, __file__, 'fuzz', str(seconds / len(TARGETS)), name]) for name in TARGETS)
    global etc
    with contextlib.suppress(ImportError, ValueError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY) if not importable('atheris') else (-1, -1))
    place = tempfile.mkdtemp(prefix='etc-fuzz-')
    if importable('atheris'):
        import atheris
        del sys.modules['etcetera']
        with atheris.instrument_imports(include=['etcetera', 'tarfile', 'configparser', 'gzip']):
            for name in ('tarfile', 'configparser', 'gzip'):
                sys.modules.pop(name, None)
            import etcetera as etc
        run = TARGETS[target](place)
        seeds = write(place + '-seeds', {'%d' % n: seed for n, seed in enumerate(run.seeds)})
        atheris.Setup([sys.argv[0], '-max_total_time=%d' % seconds, '-timeout=10', '-rss_limit_mb=1024', '-max_len=20000', str(seeds)], run)
        atheris.Fuzz()
    run, end, count, seed = TARGETS[target](place), time.time() + seconds, 0, random.randrange(1 << 32)
    while time.time() < end:
        data, begin = mutated(random.Random('%d %d' % (seed, count)), run.seeds), time.time()
        try:
            run(data)
            assert time.time() - begin < 10, 'too slow'
        except BaseException:
            name = 'crash-%s-%s' % (target, hashlib.sha1(data).hexdigest()[:8])
            Path(name).write_bytes(data)
            print('%s: seed %d, input %d, kept in %s' % (target, seed, count, name))
            raise
        count += 1
    remove(Path(place))
    print('%s: %d inputs, nothing found' % (target, count))
    return 0


class Fuzzing(Case):
    def test_targets(self):
        for name, inputs in (('archive', 60), ('tgz', 60), ('index', 4000), ('yaml', 3000), ('xml', 800), ('headers', 1500), ('json', 800),
                             ('html', 800), ('aws', 700)):
            run = TARGETS[name](write(self.tmp / name, {'.': None}))
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
        codes, ran, skipped = zip(*pool.map(run, classes[::-1]))
    print('Ran %d tests in %.1fs\n\n%s (skipped=%d)' % (sum(ran), time.time() - begin, 'FAILED' if any(codes) else 'OK',
                                                      sum(skipped)))
    return int(any(codes))


if __name__ == '__main__':
    if sys.argv[1:2] == ['fuzz']:
        sys.exit(fuzz(*[float(word) if number == 0 else word for number, word in enumerate(sys.argv[2:])]))
    if len(sys.argv) == 1:
        sys.exit(all_classes())
    done = unittest.main(exit=False).result
    if done.skipped and os.environ.get('ETC_TEST_REQUIRE_PEERS'):
        sys.exit('skipped, though all peers are demanded: %s' % done.skipped)
    sys.exit(not done.wasSuccessful())
